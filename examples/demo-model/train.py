"""Train the demo model of Hearth from scratch: corpus, tokenizer, weights, and a Hugging Face directory.

The corpus is generated (``corpus.py``); a word list from a Debian package adds rare words, so that the model learns to
copy a subject which it does not know from the question into its answer. Everything is drawn from one seed: the same
seed, options and versions on the same kind of processor give the same model.

    python train.py                      # about half an hour on two idle cores
    python train.py --steps 200          # a quick look whether everything works
    python train.py --words ""           # without the word list, for machines that are not Debian
"""

import argparse
import json
import logging
import math
import random
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import corpus
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
LOG = logging.getLogger("train")

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
IGNORE = -100
# The exported logits are twice the trained ones, so a client that names no temperature, which means 1, gets what would
# be 0.5: a model this small wanders at 1. A power of two is exact, so greedy answers do not change.
SHARPNESS = 2.0

# A message is its role's token, its text and <|end|>. A developer counts as the system, any other role as the user.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- set content = message['content'] or '' -%}
    {%- if content is not string -%}
        {%- set content = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') -%}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|assistant|>' -}}
    {%- elif message['role'] in ['system', 'developer'] -%}
        {{- '<|system|>' -}}
    {%- else -%}
        {{- '<|user|>' -}}
    {%- endif -%}
    {{- content | trim -}}
    {{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def rare_words(package: str) -> list[str]:
    """Read the word list of a Debian package, downloaded for the moment only: nothing of it is installed or kept."""
    if not package:
        return []
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["apt-get", "download", package], cwd=directory, check=True, capture_output=True)
        archive = next(Path(directory).glob("*.deb"))
        LOG.info("rare words from %s", archive.name)
        subprocess.run(["dpkg-deb", "-x", archive, directory], check=True)
        listed = next(path for path in Path(directory, "usr/share/dict").iterdir() if not path.is_symlink())
        lines = listed.read_text("utf-8").split()
    return sorted({word for word in lines if word.isascii() and word.isalpha() and word.islower() and len(word) > 3})


def text_of(document: corpus.Document) -> Iterator[str]:
    """Yield the texts of a document, for the tokenizer."""
    if isinstance(document, corpus.Plain):
        yield document.text
    else:
        yield from (message.content for message in document)


def train_tokenizer(
    rng: random.Random, words: corpus.Words, vocabulary: int, documents: int
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer. Digits stay apart, because counting and sums are easier digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, END, *ROLES.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    drawn = (corpus.document(rng, words) for _ in range(documents))
    tokenizer.train_from_iterator((text for document in drawn for text in text_of(document)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=list(ROLES.values()),
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


class Encoder:
    """Turns documents into token ids and labels, laid out exactly as the chat template lays them out."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Keep the fast tokenizer underneath: the wrapper costs more time than the encoding."""
        self._tokenizer = tokenizer.backend_tokenizer
        self._bos = tokenizer.convert_tokens_to_ids(BOS)
        self._end = tokenizer.convert_tokens_to_ids(END)
        self._roles = {role: tokenizer.convert_tokens_to_ids(token) for role, token in ROLES.items()}

    def encode(self, rng: random.Random, document: corpus.Document) -> tuple[list[int], list[int]]:
        """Return ids and labels. Only what the model itself would say has a label: answers and plain texts."""
        if isinstance(document, corpus.Plain):
            ids = [*self._tokenizer.encode(document.text).ids, self._end]
            return ([self._bos, *ids], [IGNORE, *ids]) if rng.random() < 0.5 else (ids, [IGNORE, *ids[1:]])
        ids, labels = [self._bos], [IGNORE]
        for message in document:
            content = [*self._tokenizer.encode(message.content.strip()).ids, self._end]
            ids += [self._roles[message.role], *content]
            labels += [IGNORE, *(content if message.role == "assistant" else [IGNORE] * len(content))]
        return ids, labels


def rows(
    rng: random.Random, words: corpus.Words, encoder: Encoder, length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Pack whole documents into rows, each of which begins with one, as every request does; padding fills the rest."""
    waiting = [encoder.encode(rng, corpus.document(rng, words)) for _ in range(64)]
    while True:
        ids: list[int] = []
        labels: list[int] = []
        while fits := [at for at, one in enumerate(waiting) if len(one[0]) <= length - len(ids) or not ids]:
            chosen = waiting[fits[0]]
            waiting[fits[0] : fits[0] + 1] = []
            waiting.append(encoder.encode(rng, corpus.document(rng, words)))
            ids += chosen[0][:length]
            labels += chosen[1][:length]
        padding = length - len(ids)
        yield ids + [0] * padding, labels + [IGNORE] * padding


def batches(
    rng: random.Random, words: corpus.Words, encoder: Encoder, tokens: int, length: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of a fixed number of tokens; every fifth has rows of double length, for long dialogues."""
    usual, long = rows(rng, words, encoder, length), rows(rng, words, encoder, 2 * length)
    step = 0
    while True:
        step += 1
        source, count = (long, tokens // (2 * length)) if step % 5 == 0 else (usual, tokens // length)
        drawn = [next(source) for _ in range(count)]
        yield torch.tensor([ids for ids, _ in drawn]), torch.tensor([labels for _, labels in drawn])


def make_model(tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace) -> LlamaForCausalLM:
    """Build an untrained model of the Llama architecture."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=max(1, arguments.hidden // 128),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the directory that transformers, and Hearth, load: float32 weights, so that greedy answers are stable."""
    directory.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with torch.no_grad():
        model.model.norm.weight.mul_(SHARPNESS)
        model.save_pretrained(directory)
        model.model.norm.weight.div_(SHARPNESS)
    for weights in directory.glob("*.safetensors"):
        weights.chmod(0o644)  # They are written for their owner alone, and whoever serves the model must read them.
    tokenizer.save_pretrained(directory, save_jinja_files=False)


def say(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """Answer one question greedily, to see in the log how the training goes."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        output = model.generate(**prompt, max_new_tokens=220, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=False)


def train(arguments: argparse.Namespace) -> None:
    """Run the whole recipe."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    words = corpus.Words(rare_words(arguments.words))
    if arguments.start is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.start)
        model = LlamaForCausalLM.from_pretrained(arguments.start).train()
        with torch.no_grad():
            model.model.norm.weight.div_(SHARPNESS)
    else:
        tokenizer = train_tokenizer(random.Random(arguments.seed), words, arguments.vocabulary, documents=15000)
        model = make_model(tokenizer, arguments)
    encoder = Encoder(tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    LOG.info("vocabulary %d, %.2f M parameters, %d rare words", len(tokenizer), parameters / 1e6, len(words.rare))

    matrices = [
        parameter for name, parameter in model.named_parameters() if parameter.ndim == 2 and "embed" not in name
    ]
    others = [parameter for name, parameter in model.named_parameters() if parameter.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=arguments.lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    if arguments.optimizer == "adamw":
        optimizers = [torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.02)]

    def loss_of(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False).logits
        return functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE
        )

    compiled = torch.compile(loss_of, dynamic=False) if arguments.compile else loss_of
    source = batches(random.Random(arguments.seed + 1), words, encoder, arguments.batch_tokens, arguments.length)
    began, recent, labelled = time.monotonic(), [], 0
    history = []
    for step in range(1, arguments.steps + 1):
        minutes = (time.monotonic() - began) / 60
        progress = max((step - 1) / arguments.steps, minutes / arguments.minutes)
        scale = min(1.0, step / arguments.warmup) * max(0.0, 1.0 - progress)
        last = step == arguments.steps or minutes >= arguments.minutes
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = arguments.lr * scale
        ids, labels = next(source)
        labelled += int((labels != IGNORE).sum())
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            loss = compiled(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if step % arguments.log_every == 0 or last:
            tokens = step * arguments.batch_tokens
            mean = sum(recent) / len(recent)
            history.append({"step": step, "tokens": tokens, "minutes": round(minutes, 2), "loss": round(mean, 4)})
            LOG.info("step %d, %.2f M tokens, %.1f minutes, loss %.4f", step, tokens / 1e6, minutes, mean)
            recent = []
        if step % arguments.save_every == 0 or last:
            model.eval()
            save(model, tokenizer, arguments.output)
            for question in ("Hello, who are you?", "Tell me a story about a dragon", "Write a haiku about fire"):
                LOG.info("%s -> %s", question, say(model, tokenizer, question))
            model.train()
        if last:
            break
    LOG.info("%.2f M of the tokens had a label", labelled / 1e6)
    if arguments.history is not None:
        arguments.history.write_text(json.dumps(history, indent=1) + "\n", "utf-8")


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "model", help="where the Hugging Face directory goes")
    parser.add_argument("--history", type=Path, help="a JSON file for the losses; none by default")
    parser.add_argument(
        "--words", default="wamerican-small", help="the Debian package of the word list; empty for none"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="finish by then, with fewer steps if need be (the result then depends on the speed of the machine)",
    )
    parser.add_argument("--start", type=Path, help="go on from the model in this directory instead of from scratch")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per row; every fifth batch has twice as many")
    parser.add_argument("--lr", type=float, default=3e-3, help="the peak learning rate")
    parser.add_argument(
        "--warmup", type=int, default=60, help="steps of warmup; after it the rate falls linearly to zero"
    )
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=544)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="compute in bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=400)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
