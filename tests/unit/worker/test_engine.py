"""The engines with tiny real models, against `generate()` and against themselves."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker import engine as engines
from services.worker.engine import BatchingStepper, make_engine
from services.worker.engine_thread import Submission, ThreadedEngine
from services.worker.ports import EndReason
from shared.contracts.requests import Sampling
from shared.errors import Code, HearthError
from tests.builders.models import make_model
from tests.unit.worker.sinks import Recorder

pytestmark = pytest.mark.torch

ARCHITECTURES = ("llama", "qwen2", "qwen3", "opt", "gpt2")
ENGINES = ("batching", "sequential")
GREEDY = Sampling(temperature=0.0)
TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    model_of.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def directories(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _root
    _root = tmp_path_factory.mktemp("models")


_root = Path()


@cache
def model_of(architecture: str, eos: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    directory = make_model(_root / f"{architecture}-{eos}", architecture, tie=architecture == "qwen2", eos=eos)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def prompts_of(count: int, seed: int = 0, longest: int = 150) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(5, 500) for _ in range(chance.randrange(1, longest))] for _ in range(count)]


def generated(model: Any, prompt: list[int], count: int = TOKENS) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


@contextmanager
def running(
    model: Any,
    engine: str = "batching",
    *,
    kv_bytes: int = 1 << 23,
    slots: int = 16,
    context: int = 512,
    eos: int | None = None,
) -> Iterator[tuple[ThreadedEngine, Recorder]]:
    heard = Recorder()
    ids = [] if eos is None else [eos]
    started, memory_bytes = make_engine(
        model, engine=engine, kv_bytes=kv_bytes, slots=slots, max_context_tokens=context, eos_token_ids=ids, sink=heard
    )
    assert memory_bytes > 0
    try:
        yield started, heard
    finally:
        started.close()
    assert not heard.deaths


def tokens_of(
    model: Any,
    prompts: list[list[int]],
    how: list[Sampling],
    *,
    engine: str = "batching",
    first: list[int] | None = None,
    count: int = TOKENS,
) -> list[list[int]]:
    """The tokens of all these sequences in one batch. `first[i]` of the tokens of prompt i are output already."""
    with running(model, engine) as (started, heard):
        for number, (prompt, sampling) in enumerate(zip(prompts, how, strict=True)):
            index = first[number] if first else 0
            started.submit(str(number), prompt, first_index=index, max_new_tokens=count - index, sampling=sampling)
        heard.ended(*map(str, range(len(prompts))))
        return [heard.tokens[str(number)] for number in range(len(prompts))]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_are_those_of_generate_alone_and_in_a_batch(architecture: str, engine: str) -> None:
    model = model_of(architecture)
    prompts = prompts_of(16)
    expected = [generated(model, prompt) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) > 8, "the model says the same to everybody"
    assert tokens_of(model, prompts, [GREEDY] * 16, engine=engine) == expected
    assert tokens_of(model, prompts[3:4], [GREEDY], engine=engine) == expected[3:4]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sequence_ends_with_the_models_eos(engine: str) -> None:
    model = model_of("llama")
    prompt = prompts_of(1)[0]
    expected = generated(model, prompt)
    eos = expected[5]
    upto = expected.index(eos) + 1
    with running(model, engine, eos=eos) as (started, heard):
        started.submit("a", prompt, first_index=0, max_new_tokens=TOKENS, sampling=GREEDY)
        started.submit(
            "b", prompt, first_index=0, max_new_tokens=TOKENS, sampling=Sampling(temperature=0.0, ignore_eos=True)
        )
        heard.ended("a", "b")
        assert heard.tokens["a"] == expected[:upto]
        assert heard.end("a").reason is EndReason.STOP
        assert heard.tokens["b"] == expected
        assert heard.end("b").reason is EndReason.LENGTH


MIXTURE = [
    Sampling(seed=3),
    Sampling(seed=4, top_k=20),
    Sampling(seed=5, top_p=0.9, temperature=0.8),
    Sampling(seed=6, min_p=0.05, presence_penalty=0.5),
    Sampling(seed=7, frequency_penalty=0.4, repetition_penalty=1.2),
    GREEDY,
    Sampling(seed=8, logit_bias={17: 5.0}),
    Sampling(temperature=0.0, repetition_penalty=1.3, presence_penalty=0.2),
]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sampled_tokens_do_not_depend_on_the_batch_or_the_engine(architecture: str) -> None:
    model = model_of(architecture)
    prompts, how = prompts_of(8, seed=1), MIXTURE
    together = tokens_of(model, prompts, how)
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    shuffled = tokens_of(model, [prompts[i] for i in order], [how[i] for i in order])
    assert [shuffled[order.index(i)] for i in range(8)] == together
    assert [tokens_of(model, [prompts[i]], [how[i]])[0] for i in range(8)] == together
    assert tokens_of(model, prompts, how, engine="sequential") == together
    assert tokens_of(model, prompts, [Sampling(seed=99 + i) for i in range(8)]) != together


@pytest.mark.parametrize("engine", ENGINES)
def test_resuming_anywhere_goes_on_as_it_would_have(engine: str) -> None:
    model = model_of("qwen3")
    prompts = prompts_of(8, seed=2, longest=60)
    whole = tokens_of(model, prompts, MIXTURE, engine=engine)
    for cut in (1, 5, 11) if engine == "sequential" else range(1, TOKENS):
        resumed = [[*prompt, *tokens[:cut]] for prompt, tokens in zip(prompts, whole, strict=True)]
        rest = tokens_of(model, resumed, MIXTURE, engine=engine, first=[cut] * 8)
        assert [[*tokens[:cut], *more] for tokens, more in zip(whole, rest, strict=True)] == whole


def test_logprobs_are_those_of_a_plain_forward_pass() -> None:
    model = model_of("llama")
    prompt = prompts_of(1, seed=5)[0]
    with running(model) as (started, heard):
        started.submit("a", prompt, first_index=0, max_new_tokens=4, sampling=Sampling(seed=1, logprobs=3))
        started.submit("b", prompt, first_index=0, max_new_tokens=4, sampling=GREEDY)
        heard.ended("a", "b")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *heard.tokens["a"]]])).logits[0, len(prompt) - 1 : -1]
    plain = logits.log_softmax(dim=-1)
    for position, (token, entry) in enumerate(zip(heard.tokens["a"], heard.logprobs["a"], strict=True)):
        assert entry is not None
        assert entry.chosen == pytest.approx(float(plain[position, token]), abs=1e-3)
        assert [value for _, value in entry.top] == pytest.approx(plain[position].topk(3).values.tolist(), abs=1e-3)
    assert heard.logprobs["b"] == [None] * 4


def stepper_of(model: Any, **fields: Any) -> BatchingStepper:
    return BatchingStepper(model, **({"kv_bytes": 1 << 23, "slots": 4, "max_context_tokens": 512} | fields))


def test_a_cancelled_sequence_gives_its_blocks_back_between_two_steps() -> None:
    stepper = stepper_of(model_of("llama"))
    empty = stepper.free_blocks_bytes
    for name, token_id in (("a", 5), ("b", 6)):
        stepper.add(Submission(name, [token_id] * 50, 0, 100, GREEDY, frozenset()))
    for _ in range(4):
        stepper.step()
    held = empty - stepper.free_blocks_bytes
    assert held > 0
    assert stepper.kv_used_bytes == held
    stepper.remove("a")
    assert 0 < empty - stepper.free_blocks_bytes < held
    stepper.step()
    stepper.remove("b")
    assert stepper.free_blocks_bytes == empty
    assert stepper.kv_used_bytes == 0
    stepper.close()


def test_a_full_cache_delays_sequences_but_changes_nothing() -> None:
    """Twelve sequences in a cache that holds about three: some are put off and prefilled again."""
    model = model_of("llama")
    prompts = prompts_of(12, seed=4, longest=60)
    expected = tokens_of(model, prompts, [Sampling(seed=number) for number in range(12)], count=60)
    token_bytes = engines.kv_bytes_per_token(model.config, torch.float32)
    with running(model, kv_bytes=22 * 16 * token_bytes, slots=12, context=200) as (started, heard):
        assert started.max_sequence_tokens == 200
        for number, prompt in enumerate(prompts):
            started.submit(str(number), prompt, first_index=0, max_new_tokens=60, sampling=Sampling(seed=number))
        heard.ended(*map(str, range(12)))
        assert [heard.tokens[str(number)] for number in range(12)] == expected


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_sequences_that_are_put_off_keep_their_penalties_their_noise_and_their_logprobs(architecture: str) -> None:
    """Sixteen long sequences in a cache for three, some of which leave early: the others notice nothing."""
    model = model_of(architecture)
    prompts = prompts_of(16, seed=11, longest=40)
    hows = [
        Sampling(seed=number, top_p=0.95, top_k=50, frequency_penalty=0.5, presence_penalty=0.3, logprobs=2)
        if number % 2
        else Sampling(temperature=0.0, repetition_penalty=1.3, logprobs=1)
        for number in range(16)
    ]
    with running(model) as (started, heard):
        for number, (prompt, how) in enumerate(zip(prompts, hows, strict=True)):
            started.submit(str(number), prompt, first_index=0, max_new_tokens=90, sampling=how)
        heard.ended(*map(str, range(16)))
    token_bytes = engines.kv_bytes_per_token(model.config, torch.float32)
    stepper = stepper_of(model, kv_bytes=24 * 16 * token_bytes, slots=16, max_context_tokens=160)
    empty, put_off = stepper.free_blocks_bytes, 0
    requeue = stepper._scheduler.add_waiting_request

    def count(state: Any) -> None:
        nonlocal put_off
        put_off += state._true_initial_tokens > 0
        requeue(state)

    stepper._scheduler.add_waiting_request = count
    for number, (prompt, how) in enumerate(zip(prompts, hows, strict=True)):
        stepper.add(Submission(str(number), prompt, 0, 90, how, frozenset()))
    found = Recorder()
    gone = {"3": 20, "7": 40, "12": 60}  # sequence → the step before which it leaves
    others = {str(number) for number in range(16)} - gone.keys()
    for step in range(5000):
        if others <= found.ends.keys():
            break
        for name in [name for name, at in gone.items() if at == step]:
            stepper.remove(name)
        found(stepper.step())
    assert put_off > 5, "the cache was not full"
    assert not gone.keys() & found.ends.keys(), "they left too late"
    for name in sorted(others):
        assert found.tokens[name] == heard.tokens[name]
        for one, other in zip(found.logprobs[name], heard.logprobs[name], strict=True):
            assert one is not None
            assert other is not None
            assert one.chosen == pytest.approx(other.chosen, abs=1e-3)
    assert stepper.free_blocks_bytes == empty, "blocks of what is over are still held"
    stepper.close()


def test_cancelling_in_a_full_cache_lets_the_others_go_on() -> None:
    model = model_of("llama")
    token_bytes = engines.kv_bytes_per_token(model.config, torch.float32)
    with running(model, kv_bytes=8 * 16 * token_bytes, slots=8, context=128) as (started, heard):
        prompts = prompts_of(8, seed=6, longest=50)
        for number, prompt in enumerate(prompts):
            started.submit(str(number), prompt, first_index=0, max_new_tokens=70, sampling=GREEDY)
        heard.until(lambda: len(heard.tokens) >= 1)
        for number in range(0, 8, 2):
            started.cancel(str(number))
        heard.ended(*map(str, range(8)))
        assert all(heard.end(str(number)).reason is EndReason.LENGTH for number in range(1, 8, 2))


def test_a_shared_prefix_is_not_computed_again() -> None:
    model = model_of("llama")
    prompt = prompts_of(1, seed=8)[0] * 3
    with running(model) as (started, heard):
        started.submit("a", prompt, first_index=0, max_new_tokens=5, sampling=GREEDY)
        heard.ended("a")
        assert heard.end("a").cached_tokens == 0
        started.submit("b", [*prompt, *heard.tokens["a"]], first_index=5, max_new_tokens=3, sampling=GREEDY)
        heard.ended("b")
        assert heard.end("b").cached_tokens >= len(prompt) // 16 * 16 - 16
    assert [*heard.tokens["a"], *heard.tokens["b"]] == generated(model, prompt, 8)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_does_not_fit_is_said_clearly(engine: str) -> None:
    model = model_of("llama")
    token_bytes = engines.kv_bytes_per_token(model.config, torch.float32)
    with running(model, engine, kv_bytes=64 * token_bytes) as (started, heard):
        assert started.max_sequence_tokens == 64
        started.submit("long", [7] * 64, first_index=0, max_new_tokens=5, sampling=GREEDY)
        failure = heard.end("long").failure
        assert failure is not None
        assert failure.code is Code.PROMPT_TOO_LONG
        assert "64" in failure.message
        started.submit("cut", [7] * 60, first_index=0, max_new_tokens=50, sampling=GREEDY)
        assert heard.end("cut").reason is EndReason.LENGTH
        assert len(heard.tokens["cut"]) == 4
    with pytest.raises(HearthError) as refused:
        make_engine(
            model,
            engine=engine,
            kv_bytes=token_bytes,
            slots=4,
            max_context_tokens=512,
            eos_token_ids=[],
            sink=Recorder(),
        )
    assert refused.value.failure.code is Code.OUT_OF_MEMORY


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_that_falls_over_kills_its_engine_and_nothing_hangs() -> None:
    model = model_of("opt", eos=True)
    heard = Recorder()
    started, _ = make_engine(
        model, engine="batching", kv_bytes=1 << 22, slots=4, max_context_tokens=256, eos_token_ids=[], sink=heard
    )
    hook = model.lm_head.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    started.submit("a", [5, 6, 7], first_index=0, max_new_tokens=5, sampling=GREEDY)
    started.submit("b", [5, 6, 7], first_index=0, max_new_tokens=5, sampling=GREEDY)
    for name in ("a", "b"):
        failure = heard.end(name).failure
        assert failure is not None
        assert failure.code is Code.INTERNAL
    heard.until(lambda: len(heard.deaths) == 1)
    hook.remove()
    started.close()
