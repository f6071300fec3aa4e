"""From a lease to a model that answers: parameters as views on the store's memory (CPU) or copied to the device (CUDA).

The order of a load: manifest and config → skeleton on the meta device (no memory, no initialisation) → buffers that
are in no checkpoint (rotary frequencies) by the model's own initialisation, while every parameter is still on meta →
parameters assigned from the image → engine. Nothing is parsed or copied on the CPU, so a checkpoint in DRAM is
attached in tens of milliseconds; the price is that **the parameters are the store's memory**, mapped read-only.
`Loaded.close` drops every view before the lease may be released.

No pickle, no remote code: `trust_remote_code` is False wherever transformers asks.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import threading
import time
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from services.worker.engine import FOREIGN_ERRORS, choose_engine, make_engine
from services.worker.engine_thread import ThreadedEngine
from services.worker.loader_memory import Image, Mappings
from services.worker.ports import AttachTimes, DeviceFacts, Sink
from services.worker.tokenizer import ModelTokenizer, Tokenizers
from shared.contracts.manifest import MANIFEST_NAME, Manifest, decode_manifest
from shared.contracts.residency import Lease
from shared.errors import Code, HearthError

DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
COPY_BYTES: Final = 64 << 20  # bytes of one copy to a CUDA device
_WARM_TYPES: Final = ("llama", "qwen2", "qwen3", "opt", "gpt2", "mistral")


class AttachedModel:
    """See `Loaded`: a model, its engine and tokenizer, and the image that its parameters lie in."""

    def __init__(
        self,
        *,
        engine: ThreadedEngine,
        tokenizer: ModelTokenizer,
        max_context_tokens: int,
        memory_bytes: int,
        times: AttachTimes,
        image: Image | None,
        mappings: Mappings,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.max_context_tokens = max_context_tokens
        self.memory_bytes = memory_bytes
        self.times = times
        self._image = image
        self._mappings = mappings
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """See `Loaded`. The engine's thread held the only reference to the model."""
        with self._lock:
            if self._closed:
                return
            self.engine.close()
            # Models are full of reference cycles. A view must not outlive its memory, and a device's memory is counted
            # as free from now on.
            gc.collect()
            if self._image is not None:
                self._mappings.release(self._image)
            self._closed = True


@dataclass(frozen=True)
class _Read:
    """The small files of a checkpoint."""

    manifest: Manifest
    config: Any
    model_class: Any
    dtype: torch.dtype


class TorchLoader:
    """See `Loader`. `device` is "auto" (CUDA if there is any), "cpu", "cuda" or "cuda:N"; `torch_threads` those of one
    torch operation (0: torch's default). Raises HearthError: UNAVAILABLE for a device that is not there.

    Loads are one after another: transformers patches itself while it builds a model.
    """

    def __init__(self, *, device: str = "auto", torch_threads: int = 0) -> None:
        self._device = _device(device)
        if torch_threads:
            torch.set_num_threads(torch_threads)
        self._mappings = Mappings(writable=self._device.type == "cuda", before_unmap=self._unpin)
        self._pins: dict[int, int] = {}  # address of a pinned mapping → bytes
        self._tokenizers = Tokenizers()
        self._lock = threading.Lock()

    @property
    def device(self) -> DeviceFacts:
        """See `Loader`."""
        if self._device.type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(self._device)
            name = torch.cuda.get_device_name(self._device)
            return DeviceFacts(device=str(self._device), device_name=name, memory_bytes=free_bytes)
        name = platform.processor() or platform.machine()
        return DeviceFacts(device="cpu", device_name=name, memory_bytes=_dram_bytes())

    def warm_up(self) -> None:
        """See `Loader`."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig  # noqa: F401
        from transformers.utils import logging

        from services.worker.engine import warm_engine

        logging.disable_progress_bar()
        with self._lock:
            for (
                model_type
            ) in _WARM_TYPES:  # transformers imports the module of an architecture when it is first asked for
                _skeleton_class(AutoConfig.for_model(model_type))
            warm_engine(self._device)
            if self._device.type == "cuda":
                torch.zeros(1, device=self._device)
            gc.collect()
            gc.freeze()  # a hundred thousand objects of the imports, which no later collection needs to look at

    def load(
        self,
        lease: Lease,
        *,
        kv_bytes: int,
        slots: int,
        max_context_tokens: int | None,
        sink: Sink,
        engine: str = "auto",
    ) -> AttachedModel:
        """See `Loader`."""
        # CUDA's current device is a matter of each thread; without this, a worker of cuda:1 takes memory of cuda:0 too.
        on_device = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        with self._lock, on_device:
            try:
                return self._load(lease, kv_bytes, slots, max_context_tokens, sink, engine)
            except (MemoryError, torch.OutOfMemoryError) as error:
                raise HearthError(Code.OUT_OF_MEMORY, "The model does not fit the device's memory.") from error

    def close(self) -> None:
        """See `Loader`."""
        with self._lock:
            self._mappings.close()

    def _load(
        self, lease: Lease, kv_bytes: int, slots: int, max_context_tokens: int | None, sink: Sink, engine: str
    ) -> AttachedModel:
        if engine not in ("auto", "batching", "sequential"):
            raise HearthError(Code.UNSUPPORTED, f"There is no engine {engine!r}; use auto, batching or sequential.")
        started = time.perf_counter()
        directory = Path(lease.directory)
        read = _read(directory)
        limits = (max_context_tokens, read.manifest.checkpoint.max_context_tokens or None)
        context = min((limit for limit in limits if limit), default=2048)
        manifest_done = time.perf_counter()
        tokenizer = self._tokenizers.load(directory, read.config)
        tokenizer_done = time.perf_counter()
        name = choose_engine(read.config) if engine == "auto" else engine
        model = _skeleton(read)
        skeleton_done = time.perf_counter()
        with ExitStack() as undo:
            image = self._mappings.map(lease)
            undo.callback(self._mappings.release, image)
            views = _views(read.manifest, image)
            memory_bytes = 0
            if self._device.type == "cuda":
                views = self._to_device(read.manifest, image)
                memory_bytes = image.size_bytes
            model = _fill(model, views, read, self._device)
            del views
            parameters_done = time.perf_counter()
            threaded, engine_bytes = make_engine(
                model, engine=name, kv_bytes=kv_bytes, slots=slots, max_context_tokens=context,
                eos_token_ids=tokenizer.eos_token_ids, sink=sink, name=f"engine-{lease.checkpoint.checkpoint_id[:8]}",
            )  # fmt: skip
            undo.pop_all()
        if self._device.type == "cuda":  # the parameters are the device's own
            self._mappings.release(image)
        ended = time.perf_counter()
        return AttachedModel(
            engine=threaded,
            tokenizer=tokenizer,
            max_context_tokens=min(context, threaded.max_sequence_tokens),
            memory_bytes=memory_bytes + engine_bytes,
            times=AttachTimes(
                manifest_s=manifest_done - started,
                tokenizer_s=tokenizer_done - manifest_done,
                skeleton_s=skeleton_done - tokenizer_done,
                parameters_s=parameters_done - skeleton_done,
                engine_s=ended - parameters_done,
                total_s=ended - started,
            ),
            image=None if self._device.type == "cuda" else image,
            mappings=self._mappings,
        )

    def _to_device(self, manifest: Manifest, image: Image) -> dict[str, torch.Tensor]:
        """The same tensors in one buffer of the device, copied piece by piece on a stream of its own."""
        self._pin(image)
        source = _bytes_at(image.address, image.size_bytes)
        stream = torch.cuda.Stream(self._device)
        try:
            buffer = torch.empty(image.size_bytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise HearthError(
                Code.OUT_OF_MEMORY, f"{image.size_bytes} bytes of parameters do not fit the device."
            ) from error
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for start in range(0, image.size_bytes, COPY_BYTES):
                piece = slice(start, min(start + COPY_BYTES, image.size_bytes))
                buffer[piece].copy_(source[piece], non_blocking=True)
        stream.synchronize()
        return _tensors(manifest, buffer)

    def _pin(self, image: Image) -> None:
        """Register the mapping as pinned memory, once: copies are then done by the device itself, at the bus's speed.

        A stitched image is not pinned: registering costs about as much as copying it once. Refusal costs only speed.
        """
        if image.stitched or image.segment_address in self._pins:
            return
        portable = 1
        result = torch.cuda.cudart().cudaHostRegister(image.segment_address, image.segment_bytes, portable)
        if int(result) == 0:
            self._pins[image.segment_address] = image.segment_bytes
            return
        with suppress(RuntimeError):  # CUDA keeps a refusal as its "last error", which the next launch would report
            torch.ones(1, device=self._device).add_(1)

    def _unpin(self, address: int) -> None:
        if self._pins.pop(address, None) is not None:
            torch.cuda.cudart().cudaHostUnregister(address)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise HearthError(Code.UNAVAILABLE, f"{name!r} is no device; use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise HearthError(Code.UNAVAILABLE, f"There is no {name}: this machine has {count} CUDA devices.")
        return torch.device("cuda", device.index or 0)
    if device.type != "cpu":
        raise HearthError(Code.UNAVAILABLE, f"Devices of type {device.type} cannot be used.")
    return device


def _dram_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read(directory: Path) -> _Read:
    from transformers import AutoConfig

    try:
        manifest = decode_manifest((directory / MANIFEST_NAME).read_bytes())
    except OSError as error:
        raise HearthError(Code.CHECKPOINT_UNAVAILABLE, f"The manifest cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise HearthError(Code.CHECKPOINT_CORRUPT, f"The manifest is malformed: {error}.") from error
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except FOREIGN_ERRORS as error:
        raise HearthError(
            Code.UNSUPPORTED, "config.json names no architecture that can be served without remote code."
        ) from error
    dtype = getattr(torch, manifest.checkpoint.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise HearthError(Code.UNSUPPORTED, f"Parameters of type {manifest.checkpoint.dtype} cannot be served.")
    if getattr(config, "quantization_config", None) is not None:
        raise HearthError(Code.UNSUPPORTED, "Quantised checkpoints cannot be served.")
    return _Read(manifest=manifest, config=config, model_class=_skeleton_class(config), dtype=dtype)


def _skeleton_class(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise HearthError(Code.UNSUPPORTED, f"{config.model_type} is no causal language model.") from error


def _skeleton(read: _Read) -> Any:
    """The model without memory: every parameter on the meta device, the buffers of no checkpoint in place."""
    try:
        with torch.device("meta"):  # a mode of this thread only
            # float32 is torch's default: another one would be set for the whole process, engines of other models
            # included.
            model = read.model_class._from_config(read.config, dtype=torch.float32)
    except FOREIGN_ERRORS as error:
        raise HearthError(
            Code.UNSUPPORTED, f"A {read.config.model_type} model cannot be made ({type(error).__name__})."
        ) from error
    return model


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Compute what is in no checkpoint, by the model's own initialisation, which finds all parameters on meta."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    owners: list[Any] = []
    for module in model.modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if names:
            owners.append(module)
    if owners:
        model.initialize_weights()


def _fill(model: Any, views: dict[str, torch.Tensor], read: _Read, device: torch.device) -> Any:
    """Give the skeleton its parameters. Returns the model, ready: eval mode, no gradients, nothing left on meta."""
    for alias, name in read.manifest.tied.items():
        if name in views:
            views.setdefault(alias, views[name])
    names = set(model.state_dict())
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for target, source in tied.items():
        for one, other in ((target, source), (source, target)):
            if one not in views and other in views:
                views[one] = views[other]
    missing, unexpected = names - views.keys(), views.keys() - names
    if missing or not all(_ignored(model, name) for name in unexpected):
        # Names or layouts of another version of this architecture: transformers' own loading converts them, with
        # copies.
        model = _convert(read, views, device)
    else:
        for name, view in views.items():
            if view.is_floating_point() and view.dtype != read.dtype:
                views[name] = view.to(read.dtype)
        _fill_buffers(model, device)
        try:
            model.load_state_dict({name: views[name] for name in names}, strict=True, assign=True)
        except RuntimeError as error:
            raise HearthError(
                Code.CHECKPOINT_CORRUPT, "The checkpoint's tensors have not the shapes that its config says."
            ) from error
        model.config.dtype = read.dtype
        model.tie_weights(recompute_mapping=False)
    model.requires_grad_(False)
    model.eval()
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise HearthError(Code.CHECKPOINT_CORRUPT, f"The checkpoint has no {left[0]}.")
    return model


def _ignored(model: Any, name: str) -> bool:
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()) | {
        r"rotary_emb\.inv_freq$",
        r"(^|\.)position_ids$",
    }
    patterns |= {r"attn\.(masked_)?bias$"}  # causal masks that old GPT checkpoints carry
    return any(re.search(pattern, name) for pattern in patterns)


def _convert(read: _Read, views: dict[str, torch.Tensor], device: torch.device) -> Any:
    try:
        model, info = read.model_class.from_pretrained(
            None, config=read.config, state_dict=views, dtype=read.dtype, output_loading_info=True
        )
    except torch.OutOfMemoryError:  # a RuntimeError, but not the checkpoint's fault
        raise
    except FOREIGN_ERRORS as error:
        raise HearthError(
            Code.CHECKPOINT_CORRUPT, f"The checkpoint's tensors do not fit its config ({type(error).__name__})."
        ) from error
    missing = sorted(info["missing_keys"]) or sorted(str(entry) for entry in info.get("mismatched_keys", ()))
    if missing:
        raise HearthError(Code.CHECKPOINT_CORRUPT, f"The checkpoint has no {missing[0]}.")
    return model.to(device)


def _views(manifest: Manifest, image: Image) -> dict[str, torch.Tensor]:
    if manifest.image_bytes() > image.size_bytes:
        raise HearthError(Code.CHECKPOINT_CORRUPT, "The lease is shorter than the checkpoint.")
    return _tensors(manifest, _bytes_at(image.address, image.size_bytes))


def _bytes_at(address: int, size_bytes: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_ubyte * size_bytes).from_address(address), dtype=torch.uint8)


def _tensors(manifest: Manifest, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views on the image by name. Raises HearthError: CHECKPOINT_CORRUPT, UNSUPPORTED (a dtype unknown to torch)."""
    starts = manifest.starts()
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in manifest.tensors.items():
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise HearthError(Code.UNSUPPORTED, f"Tensors of type {entry.dtype} cannot be served.")
        if not 0 <= entry.file < len(starts):
            raise HearthError(Code.CHECKPOINT_CORRUPT, f"The manifest places {name} in a file that is not there.")
        start = starts[entry.file] + entry.offset
        if entry.offset < 0 or start + entry.bytes > image.numel():
            raise HearthError(Code.CHECKPOINT_CORRUPT, f"The manifest places {name} outside the checkpoint.")
        try:
            tensors[name] = image[start : start + entry.bytes].view(dtype).view(entry.shape)
        except RuntimeError as error:
            raise HearthError(
                Code.CHECKPOINT_CORRUPT, f"The manifest's shape of {name} does not match its bytes."
            ) from error
    return tensors
