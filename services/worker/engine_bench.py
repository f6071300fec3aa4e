"""What this machine's device does: copies to it, attaching a model, prefill and decode. For `hearth profile`.

The models are made here, with random weights in bfloat16, of two sizes: what does not depend on the size (launching
kernels, Python) shows in the difference. Times are medians of a few turns; nothing else should run meanwhile.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from services.worker.attach import SmallFiles, fill, model_class, skeleton
from services.worker.engine import kv_bytes_per_token, make_engine
from services.worker.engine_thread import ThreadedEngine
from services.worker.loader import TorchLoader
from services.worker.ports import EngineEvent, SequenceEnd, StepToken
from shared.contracts.manifest import CHUNK_BYTES, Manifest
from shared.contracts.requests import Sampling
from shared.contracts.residency import Checkpoint
from shared.errors import Code, HearthError

CONTEXT_TOKENS: Final = 1024
PREFILL_TOKENS: Final = (32, 256)
BATCHES: Final = (1, 4)
DECODE_TOKENS: Final = 12
TURNS: Final = 3
COPY_BYTES: Final = 1 << 30
WAIT_S: Final = 300.0
_GREEDY: Final = Sampling(temperature=0.0, ignore_eos=True)
SHAPES: Final[dict[str, dict[str, int]]] = {
    "small": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 8192,
    },
    "large": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 8, "vocab_size": 16384,
    },
}  # fmt: skip


@dataclass(frozen=True)
class DeviceFound:
    """`copy_bytes_per_s` is DRAM → device from pinned memory; 0 where parameters are used where they lie (the CPU)."""

    device: str
    device_name: str
    memory_bytes: int
    copy_bytes_per_s: float


@dataclass(frozen=True)
class ModelFound:
    """Seconds. `prefill` maps tokens, `decode` batch sizes, to the seconds of one prefill or one step."""

    name: str
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    layers: int
    attach_s: float
    prefill: dict[int, float]
    decode: dict[int, float]


def measure(
    device: str = "auto",
    told: Callable[[str], None] = lambda text: None,
    shapes: Mapping[str, dict[str, int]] = SHAPES,
) -> tuple[DeviceFound, list[ModelFound]]:
    """The device, and models of these shapes on it. `told` hears what is being done.

    Raises HearthError: UNAVAILABLE (no such device), OUT_OF_MEMORY.
    """
    loader = TorchLoader(device=device)
    facts = loader.device
    where = torch.device(facts.device)
    told("copies to the device")
    found = DeviceFound(
        facts.device, facts.device_name, facts.memory_bytes, copy_rate(where) if where.type == "cuda" else 0.0
    )
    models = []
    for name, shape in shapes.items():
        told(f"a generated model, {name}")
        models.append(_model(name, shape, where))
        gc.collect()
    return found, models


def copy_rate(device: torch.device) -> float:
    """Bytes per second from pinned memory, the median of some copies."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True).fill_(1)
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    rates = []
    for _ in range(TURNS + 1):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        rates.append(COPY_BYTES / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def _model(name: str, shape: dict[str, int], device: torch.device) -> ModelFound:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "llama", **shape, max_position_embeddings=CONTEXT_TOKENS, eos_token_id=None, bos_token_id=None
    )
    config.dtype = torch.bfloat16
    files = SmallFiles(_manifest(), config, model_class(config), torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: (torch.randn(value.shape, generator=generator) * 0.02).to(torch.bfloat16).to(device)
        for key, value in skeleton(files).state_dict().items()
    }
    parameters = sum(weight.numel() for weight in weights.values())
    run = _Run()
    times = []
    engine: ThreadedEngine | None = None
    for _ in range(TURNS + 1):  # the first turn imports
        if engine is not None:
            engine.close()
            gc.collect()
        began = time.perf_counter()
        engine = _attached(files, weights, device, run)
        times.append(time.perf_counter() - began)
    assert engine is not None
    try:
        run.prompts(engine, [_prompt(shape, 32, 1000)], 4)  # first kernels
        prefill = {
            tokens: statistics.median(
                run.prompts(engine, [_prompt(shape, tokens, 7 * tokens + turn)], 1)[0] for turn in range(TURNS)
            )
            for tokens in PREFILL_TOKENS
        }
        decode = {
            batch: statistics.median(
                run.prompts(
                    engine, [_prompt(shape, 16, 9000 + 100 * turn + one) for one in range(batch)], DECODE_TOKENS
                )[1]
                for turn in range(TURNS)
            )
            for batch in BATCHES
        }
    finally:
        engine.close()
    return ModelFound(
        name=name,
        parameters=parameters,
        weight_bytes=sum(weight.nbytes for weight in weights.values()),
        kv_bytes_per_token=kv_bytes_per_token(config, torch.bfloat16),
        layers=shape["num_hidden_layers"],
        attach_s=statistics.median(times[1:]),
        prefill=prefill,
        decode=decode,
    )


def _attached(files: SmallFiles, weights: dict[str, Any], device: torch.device, run: _Run) -> ThreadedEngine:
    """What attaching takes besides the bytes: skeleton, parameters assigned, engine."""
    model = fill(skeleton(files), dict(weights), files, device)
    engine, _ = make_engine(
        model,
        engine="batching",
        kv_bytes=256 << 20,
        slots=max(BATCHES),
        max_context_tokens=CONTEXT_TOKENS,
        eos_token_ids=(),
        sink=run.sink,
    )
    return engine


class _Run:
    """Hears the engine, and keeps when each token came."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._stamps: dict[str, list[float]] = {}
        self._open = 0
        self._count = 0
        self._failed = ""

    def sink(self, events: Sequence[EngineEvent]) -> None:
        """Called on the engine's thread."""
        now = time.perf_counter()
        with self._changed:
            for event in events:
                if isinstance(event, StepToken):
                    self._stamps.setdefault(event.sequence_id, []).append(now)
                elif isinstance(event, SequenceEnd):
                    self._open -= 1
                    self._failed = event.failure.message if event.failure else self._failed
            self._changed.notify()

    def prompts(self, engine: ThreadedEngine, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, float]:
        """(seconds to the first token, median seconds of a step once all decode) of prompts submitted at once.

        Raises HearthError: INTERNAL if the engine fails.
        """
        began = time.perf_counter()
        ids = []
        self._stamps = {}
        self._open += len(prompts)
        for prompt in prompts:
            self._count += 1
            ids.append(f"p{self._count}")
            engine.submit(ids[-1], prompt, first_index=0, max_new_tokens=tokens, sampling=_GREEDY)
        with self._changed:
            done = self._changed.wait_for(lambda: self._open == 0, WAIT_S)
        if not done or self._failed:
            raise HearthError(
                Code.INTERNAL, f"The engine could not be measured: {self._failed or 'it takes too long'}."
            )
        first = min(stamps[0] for stamps in self._stamps.values()) - began
        all_there = max(stamps[0] for stamps in self._stamps.values())
        steps = [
            after - before
            for stamps in self._stamps.values()
            for before, after in itertools.pairwise(stamps)
            if before >= all_there
        ]
        return first, statistics.median(steps) if steps else 0.0


def _prompt(shape: dict[str, int], tokens: int, seed: int) -> list[int]:
    """Random tokens that begin differently, so that no prefix is shared."""
    generator = torch.Generator().manual_seed(seed)
    return [int(one) for one in torch.randint(2, shape["vocab_size"], (tokens,), generator=generator)]


def _manifest() -> Manifest:
    """Of a model that is in no store."""
    checkpoint = Checkpoint(
        checkpoint_id="generated", architecture="LlamaForCausalLM", weight_bytes=0, parameters=0, dtype="bfloat16",
        max_context_tokens=CONTEXT_TOKENS, kv_bytes_per_token=0, vocab_tokens=0, has_chat_template=False,
    )  # fmt: skip
    return Manifest(
        format_version=1, checkpoint=checkpoint, chunk_bytes=CHUNK_BYTES, files=(), tensors={}, chunks=(),
        config_digest="",
    )  # fmt: skip
