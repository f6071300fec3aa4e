"""The engines for real models: continuous batching (transformers' own, on our thread) or one sequence at a time.

Continuous batching here is transformers' `ContinuousBatchProcessor`: paged KV cache, prefix sharing, prefills cut into
slices. Its manager's loop is not used: it polls when idle (0.1 s), copies all tokens of a sequence for every new one
and hands results over by queues. `BatchingStepper` drives the same processor step by step instead, from a thread that
sleeps on a condition (`engine_thread.py`), and puts `sampling.choose` in the place of its sampler, so that every
sequence has its own seed, penalties, bias and logprobs, and `engine_blocks.py` in the place of its scheduler. CUDA
graphs and asynchronous batching are off: the sampler's state is the host's.

The parts of transformers used here are not its public interface: they are those of `TRANSFORMERS`, which the extra
`worker` asks for, and the warm-up of a worker (`warm_engine`) runs them before any model is asked for.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import numpy
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.overrides import TorchFunctionMode

from services.worker.engine_sequential import SequentialStepper
from services.worker.engine_thread import Stepper, Submission, ThreadedEngine
from services.worker.ports import EndReason, EngineEvent, KvShort, PositionLogprobs, SequenceEnd, Sink, StepToken
from services.worker.sampling import SamplingRow, choose
from shared.contracts.requests import Sampling
from shared.errors import Code, Failure, HearthError
from shared.sizes import size

TRANSFORMERS: Final = "5.23"  # the version whose batching this is made for
PAGE_TOKENS: Final = 16  # tokens of a KV block: the unit of prefix sharing
SLICE_TOKENS_CPU: Final = 128  # most tokens of one step; a prefill is cut into such slices, between which others decode
SLICE_TOKENS_CUDA: Final = 1024
KV_SHORT_EVERY_S: Final = 1.0  # at most this often it is told that sequences wait for blocks
PROBE_TOKENS: Final = 6
# What the code of an architecture raises when its config makes no sense, or it is run in a way it was not made for.
FOREIGN_ERRORS: Final = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError, StrictDataclassError, HearthError,
)  # fmt: skip
_GREEDY: Final = Sampling(temperature=0.0)

# Model types whose batching is known to give the tokens of `generate()`; tests/unit/worker/test_engine_probe.py holds
# this list to it. Everything else is probed before it is served.
VERIFIED_TYPES: Final = frozenset({"gpt2", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3"})


class _LazyZeros(TorchFunctionMode):
    """Within it, and on this thread only, large zeroed byte tensors on the CPU come from the kernel's zero pages.

    `torch.zeros` writes them all: 0.1 s of a cold start for a KV cache of 256 MiB, most of which is not used soon.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func is torch.zeros
            and kwargs.get("dtype") is torch.uint8
            and torch.device(kwargs.get("device", "cpu")).type == "cpu"
        ):
            return torch.from_numpy(numpy.zeros(args[0], dtype=numpy.uint8))  # calloc
        return func(*args, **kwargs)


@contextmanager
def _within_window(config: Any, max_context_tokens: int) -> Iterator[None]:
    """Within it, sliding layers whose window no sequence will fill count as what they are then: full attention.

    Blocks of full attention can be shared by sequences with the same prefix, those of a window cannot.
    """
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "layer_types", None) is not None or max_context_tokens > window:
        yield
        return
    config.sliding_window = None
    try:
        yield
    finally:
        config.sliding_window = window


class _Live:
    """A sequence in the batch."""

    __slots__ = ("cached_tokens", "row", "submission")

    def __init__(self, submission: Submission) -> None:
        self.submission = submission
        self.row = SamplingRow(submission.sampling, submission.token_ids, submission.first_index)
        self.cached_tokens = -1  # not known before its first step


class BatchingStepper:
    """Continuous batching. See `Stepper`.

    `kv_bytes` bounds the KV cache (never more is taken than `slots` sequences of `max_context_tokens` need). Raises
    HearthError: OUT_OF_MEMORY when that is not one block, or does not fit the machine.
    """

    name = "batching"

    def __init__(
        self,
        model: Any,
        *,
        kv_bytes: int,
        slots: int,
        max_context_tokens: int,
        eos_token_ids: Iterable[int] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from transformers import GenerationConfig
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens

        from services.worker.engine_blocks import BlockScheduler, read_into_buffers, share_blocks

        config = model.config.get_text_config()
        block_bytes = PAGE_TOKENS * kv_bytes_per_token(config, model.dtype)
        wanted_blocks = slots * (-(-max_context_tokens // PAGE_TOKENS) + 1)
        blocks = min(kv_bytes // block_bytes, wanted_blocks)
        if blocks < 1:
            raise HearthError(
                Code.OUT_OF_MEMORY,
                f"A KV cache of {size(kv_bytes)} holds not one block of this model ({size(block_bytes)}).",
            )
        slice_tokens = SLICE_TOKENS_CUDA if model.device.type == "cuda" else SLICE_TOKENS_CPU
        self._attention = model.config._attn_implementation
        try:
            manager = model.init_continuous_batching(
                generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=PAGE_TOKENS,
                    num_blocks=blocks,
                    max_batch_tokens=max(slots, min(slice_tokens, max_context_tokens)),
                    max_requests_per_batch=slots,
                    max_blocks_per_request=0,
                    use_async_batching=False,
                    use_cuda_graph=False,
                    cpu_offload_space=0.0,
                    max_memory_percent=1.0,
                    auto_switch_to_flash=may_use_flash(model.device, model.dtype),
                    seed=0,
                ),
            )
            with _LazyZeros(), _within_window(config, max_context_tokens):
                processor = manager._create_batch_processor()
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise HearthError(
                Code.OUT_OF_MEMORY, f"The KV cache of {size(blocks * block_bytes)} does not fit."
            ) from error
        except FOREIGN_ERRORS as error:
            raise HearthError(
                Code.UNSUPPORTED, f"A {config.model_type} model cannot be batched ({type(error).__name__})."
            ) from error
        self._model, self._processor = model, processor
        self._io = processor.inputs_and_outputs
        self._scheduler: Any = BlockScheduler(processor.cache, slots)
        processor.scheduler = processor.offloading_manager.scheduler = self._scheduler
        share_blocks(processor.cache)
        if model.device.type == "cpu":
            read_into_buffers(processor.cache)
        processor.model_runner._sample = self._sample
        self._live: dict[str, _Live] = {}
        self._logprobs: list[PositionLogprobs | None] = []
        self._clock = clock
        self._told_short_at = -math.inf
        self.slots = slots
        self.vocab_tokens = int(config.vocab_size)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_sequence_tokens = min(max_context_tokens, infer_max_single_request_tokens(processor.cache))
        self.memory_bytes = _tensor_bytes(processor.cache.cache_tensor, *_tensors_of(self._io))
        self._kv_bytes = self.free_blocks_bytes

    @property
    def kv_used_bytes(self) -> int:
        """See `Engine`."""
        return self._kv_bytes - self.free_blocks_bytes

    @property
    def free_blocks_bytes(self) -> int:
        """Bytes of the KV cache that no live sequence holds (blocks kept for prefix sharing count as free)."""
        return int(self._scheduler.free_bytes())

    def start(self) -> None:
        """See `Stepper`."""
        if self._model.device.type == "cuda":
            torch.cuda.set_device(self._model.device)

    def add(self, submission: Submission) -> None:
        """See `Stepper`."""
        from transformers.generation.continuous_batching.requests import RequestState

        self._live[submission.sequence_id] = _Live(submission)
        self._scheduler.add_waiting_request(
            RequestState(
                request_id=submission.sequence_id,
                initial_tokens=submission.token_ids,
                max_new_tokens=submission.max_new_tokens,
                eos_token_id=sorted(submission.stop_token_ids),
            )
        )

    def remove(self, sequence_id: str) -> None:
        """See `Stepper`. Between two steps nothing is in flight, so the blocks are free at once."""
        self._live.pop(sequence_id, None)
        self._scheduler.forget(sequence_id)

    def step(self) -> list[EngineEvent]:
        """See `Stepper`."""
        from transformers.generation.continuous_batching.requests import RequestStatus

        processor = self._processor
        if not processor.prepare_next_batch():
            raise RuntimeError("sequences are waiting but none can be scheduled")
        states = self._io.requests_in_batch
        for future in states:
            live = self._live[future.state.request_id]
            if live.cached_tokens < 0:
                live.cached_tokens = future.state.position_offset - future.query_length
        processor._generation_step(self._model)
        processor.update_batch()
        events: list[EngineEvent] = []
        if self._scheduler.short and self._clock() >= self._told_short_at + KV_SHORT_EVERY_S:
            self._told_short_at = self._clock()
            events.append(KvShort(self._scheduler.short))
        position = 0
        for future in states:
            if not future.has_new_token:
                continue
            state, sequence_id = future.state, future.state.request_id
            live = self._live[sequence_id]
            token_id = state.generated_tokens[-1]
            live.row.push(token_id)
            events.append(StepToken(sequence_id, token_id, self._logprobs[position] if self._logprobs else None))
            position += 1
            if state.status == RequestStatus.FINISHED:
                del self._live[sequence_id]
                self._scheduler.forget(sequence_id)
                stopped = token_id in live.submission.stop_token_ids
                events.append(
                    SequenceEnd(
                        sequence_id, EndReason.STOP if stopped else EndReason.LENGTH, cached_tokens=live.cached_tokens
                    )
                )
        return events

    def close(self) -> None:
        """See `Stepper`."""
        self._live.clear()
        if self._model is not None and self._model.config._attn_implementation != self._attention:
            self._model.set_attn_implementation(self._attention)
        self._model = self._processor = self._io = self._scheduler = None

    def _sample(self, scores: torch.Tensor, output_ids: torch.Tensor) -> None:
        """In place of `ModelRunner._sample`. `scores`: (1, rows, vocabulary); the other rows mean nothing."""
        rows = [
            self._live[future.state.request_id].row for future in self._io.requests_in_batch if future.has_new_token
        ]
        self._logprobs = []
        if rows:
            tokens, logprobs = choose(scores[0, : len(rows)], rows)
            output_ids[0, : len(rows)].copy_(tokens)
            if any(entry is not None for entry in logprobs):
                self._logprobs = logprobs


def may_use_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether transformers may take flash attention where it is installed.

    The kernels know half precision only; and with the package `kernels` transformers would fetch them from the hub,
    which is remote code.
    """
    from transformers.utils import is_kernels_available

    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and not is_kernels_available()


def make_engine(
    model: Any,
    *,
    engine: str,
    kv_bytes: int,
    slots: int,
    max_context_tokens: int,
    eos_token_ids: Iterable[int],
    sink: Sink,
    name: str = "engine",
) -> tuple[ThreadedEngine, int]:
    """Start an engine ("batching" or "sequential") for a model; also the bytes that it takes besides the parameters.

    Raises HearthError: OUT_OF_MEMORY.
    """
    if engine == "sequential":
        token_bytes = kv_bytes_per_token(model.config.get_text_config(), model.dtype)
        sequential = SequentialStepper(
            model,
            kv_bytes=kv_bytes,
            kv_bytes_per_token=token_bytes,
            max_context_tokens=max_context_tokens,
            eos_token_ids=eos_token_ids,
        )
        return ThreadedEngine(sequential, sink, failure_of=failure_of, name=name), sequential.memory_bytes
    batching = BatchingStepper(
        model, kv_bytes=kv_bytes, slots=slots, max_context_tokens=max_context_tokens, eos_token_ids=eos_token_ids
    )
    return ThreadedEngine(batching, sink, failure_of=failure_of, name=name), batching.memory_bytes


def failure_of(error: BaseException) -> Failure:
    """What a crash of an engine's thread is called."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return Failure(code=Code.OUT_OF_MEMORY, message="The engine ran out of memory.")
    return Failure(code=Code.INTERNAL, message=f"The engine failed ({type(error).__name__}).")


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token over all layers. Raises HearthError: UNSUPPORTED if there are no heads."""
    from transformers.generation.continuous_batching.utils import find_head_dim, find_num_key_value_heads

    try:
        per_layer = 2 * find_num_key_value_heads(config) * find_head_dim(config) * dtype.itemsize
        return int(config.num_hidden_layers * per_layer)
    except (ValueError, AttributeError, ZeroDivisionError) as error:
        raise HearthError(
            Code.UNSUPPORTED, f"The architecture {config.model_type} has no attention heads to cache."
        ) from error


def choose_engine(config: Any) -> str:
    """The engine for a model of this config: "batching" or "sequential". Raises HearthError: UNSUPPORTED.

    Types in `VERIFIED_TYPES` are known; others are tried out on a tiny random model of the same architecture (see
    `probe`).
    """
    return "batching" if config.model_type in VERIFIED_TYPES else probe(config)


_probed: dict[str, str] = {}


def probe(config: Any) -> str:
    """Which engine serves this architecture: greedy tokens of a tiny random model, against its plain forward pass.

    Answers are remembered per shape of architecture. Raises HearthError: UNSUPPORTED when neither engine gives the
    right tokens, or no tiny model of this architecture can be made.
    """
    try:
        tiny = shrink(config)
    except AttributeError as error:
        raise HearthError(Code.UNSUPPORTED, f"The architecture {config.model_type} has no attention heads.") from error
    key = f"{tiny.model_type}:{tiny.to_json_string(use_diff=False)}"
    if key not in _probed:
        _probed[key] = _probe(tiny)
    if _probed[key] == "":
        raise HearthError(Code.UNSUPPORTED, f"The architecture {config.model_type} cannot be served.")
    return _probed[key]


def shrink(config: Any) -> Any:
    """A config of the same architecture with tiny sizes: every kind of layer still occurs, ratios of heads are kept."""
    tiny = copy.deepcopy(config).get_text_config()
    heads = min(4, tiny.num_attention_heads)
    kv_heads = getattr(tiny, "num_key_value_heads", None)
    old_head = getattr(tiny, "head_dim", None) or tiny.hidden_size // tiny.num_attention_heads
    if kv_heads is not None and kv_heads != config.get_text_config().num_attention_heads:
        tiny.num_key_value_heads = max(1, heads * kv_heads // tiny.num_attention_heads)
    elif kv_heads is not None:
        tiny.num_key_value_heads = heads
    head = 16
    kinds = list(getattr(tiny, "layer_types", None) or [])
    layers = max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])
    sizes = {
        "num_attention_heads": heads,
        "hidden_size": heads * head,
        "intermediate_size": 4 * head,
        "ffn_dim": 4 * head,
        "word_embed_proj_dim": heads * head,
        "num_hidden_layers": layers,
        "vocab_size": 128,
        "num_local_experts": 4,
        "num_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 2 * head,
        "head_dim": head,
        "query_pre_attn_scalar": head,
        "sliding_window": 4,
    }
    for name, number in sizes.items():
        if isinstance(getattr(tiny, name, None), int) and not isinstance(getattr(tiny, name), bool):
            with suppress(AttributeError):  # computed from the others
                setattr(tiny, name, number)
    if kinds:
        tiny.layer_types = kinds[:layers]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tiny, name, None) is not None:
            setattr(tiny, name, 0)
    scaling = getattr(tiny, "rope_parameters", None)
    if isinstance(scaling, dict):  # factors per frequency
        for name, value in scaling.items():
            if isinstance(value, list) and len(value) * 2 >= old_head // 4:
                scaling[name] = value[: max(1, len(value) * head // old_head)]
    return tiny


def _probe(tiny: Any) -> str:
    from transformers import AutoModelForCausalLM

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tiny.initializer_range = tiny.init_std = 0.1
            model = AutoModelForCausalLM.from_config(tiny, dtype=torch.float32).eval()
        prompts = [[5, 9, 17, 33, 2, 64, 7, 11, 90], [3, 1, 4]]
        expected = [_plain_tokens(model, prompt) for prompt in prompts]
    except FOREIGN_ERRORS as error:
        raise HearthError(
            Code.UNSUPPORTED, f"The architecture {tiny.model_type} cannot be tried out ({type(error).__name__})."
        ) from error
    for engine in ("batching", "sequential"):
        try:
            stepper: Stepper
            if engine == "batching":
                stepper = BatchingStepper(model, kv_bytes=1 << 22, slots=2, max_context_tokens=64)
            else:
                stepper = SequentialStepper(model, kv_bytes=1 << 22, kv_bytes_per_token=1, max_context_tokens=64)
            if _run(stepper, prompts) == expected:
                return engine
        except FOREIGN_ERRORS:
            continue
    return ""


def warm_engine(device: torch.device) -> None:
    """Generate a few tokens with a tiny model: imports, first kernels, thread pools are then paid for.

    Raises HearthError: UNSUPPORTED if the engine does not work with the installed transformers.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    config = shrink(AutoConfig.for_model("llama"))
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(device)
    for kind in (Sampling(temperature=0.0), Sampling(top_p=0.9, top_k=5, min_p=0.1, logprobs=1, presence_penalty=1.0)):
        try:
            _run(BatchingStepper(model, kv_bytes=1 << 20, slots=2, max_context_tokens=64), [[1, 2, 3], [4]], kind)
        except FOREIGN_ERRORS as error:
            raise HearthError(
                Code.UNSUPPORTED,
                f"The engine is made for transformers {TRANSFORMERS}; with {transformers.__version__} on {device} it "
                f"does not work ({type(error).__name__}: {error}).",
            ) from error


def _plain_tokens(model: Any, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(PROBE_TOKENS):
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def _run(stepper: Stepper, prompts: list[list[int]], sampling: Sampling = _GREEDY) -> list[list[int]]:
    tokens: dict[str, list[int]] = {}
    try:
        for position, prompt in enumerate(prompts):
            tokens[str(position)] = []
            stepper.add(Submission(str(position), prompt, 0, PROBE_TOKENS, sampling, frozenset()))
        ends = 0
        for _ in range(4 * PROBE_TOKENS):
            for event in stepper.step() if ends < len(prompts) else []:
                if isinstance(event, StepToken):
                    tokens[event.sequence_id].append(event.token_id)
                elif isinstance(event, SequenceEnd):
                    ends += 1
    finally:
        stepper.close()
    return list(tokens.values())


def _tensors_of(io: Any) -> list[torch.Tensor]:
    masks = list((io.attention_mask or {}).values())
    return [io._bulk_input_tensor, io.write_index_storage, io.read_index_storage, *masks]


def _tensor_bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
