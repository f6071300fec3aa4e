"""From a lease to a model that answers: the parameters (see `attach.py`), a tokenizer and an engine.

On the CPU the parameters are views on the store's memory; on CUDA the whole segment is registered as pinned memory and
each piece is copied as soon as it is there, while later ones still arrive. `AttachedModel.close` drops every view
before the lease may be released.
"""

from __future__ import annotations

import gc
import os
import platform
import threading
import time
from collections import deque
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Final

import torch

from services.worker.arrival import Arrivals, Piece, image_bytes, pieces_of, stream, streams
from services.worker.attach import bytes_at, fill, model_class, own_parameter_bytes, read_files, skeleton, tensors
from services.worker.engine import choose_engine, make_engine
from services.worker.engine_thread import ThreadedEngine
from services.worker.loader_memory import Image, Mappings
from services.worker.loader_transfer import REAL_TIME, Placed, in_memory
from services.worker.ports import UNWATCHED, AttachTimes, DeviceFacts, LoadWatch, Sink
from services.worker.tokenizer import ModelTokenizer, Tokenizers
from shared.contracts.residency import Lease
from shared.errors import Code, HearthError
from shared.sizes import size

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


class TorchLoader:
    """See `Loader`. `device` is "auto" (CUDA if there is any), "cpu", "cuda" or "cuda:N"; `torch_threads` those of one
    torch operation (0: torch's default). Raises HearthError: UNAVAILABLE for a device that is not there.

    Models are built one after another, as transformers patches itself meanwhile; their bytes arrive side by side.
    """

    def __init__(self, *, device: str = "auto", torch_threads: int = 0) -> None:
        self._device = _device(device)
        if torch_threads:
            torch.set_num_threads(torch_threads)
        self._mappings = Mappings(writable=self._device.type == "cuda", before_unmap=self._unpin)
        self._pins: dict[int, int] = {}  # address of a pinned mapping → bytes
        self._tokenizers = Tokenizers()
        self._pin_lock = threading.Lock()
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
                model_class(AutoConfig.for_model(model_type))
            warm_engine(self._device)
            if self._device.type == "cuda":
                torch.zeros(1, device=self._device)
            gc.collect()
            gc.freeze()  # a hundred thousand objects of the imports, which no later collection needs to look at

    def prepare(self, segment: str) -> None:
        """See `Loader`. On CUDA the segment is registered as pinned memory: copies are then done by the device."""
        try:
            mapped = self._mappings.prepare(segment)
        except HearthError:
            return  # it may be gone already: the next record, or the next lease, names another
        try:
            if self._device.type == "cuda":
                with torch.cuda.device(self._device):
                    self._pin(mapped.address, mapped.size_bytes)
        finally:
            self._mappings.release(mapped)

    def load(
        self,
        lease: Lease,
        *,
        kv_bytes: int,
        slots: int,
        max_context_tokens: int | None,
        sink: Sink,
        engine: str = "auto",
        watch: LoadWatch = UNWATCHED,
    ) -> AttachedModel:
        """See `Loader`."""
        # CUDA's current device is a matter of each thread; without this, a worker of cuda:1 takes memory of cuda:0 too.
        on_device = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        with on_device:
            try:
                return self._load(lease, kv_bytes, slots, max_context_tokens, sink, engine, watch)
            except (MemoryError, torch.OutOfMemoryError) as error:
                raise HearthError(Code.OUT_OF_MEMORY, "The model does not fit the device's memory.") from error

    def close(self) -> None:
        """See `Loader`."""
        with self._lock:
            self._mappings.close()

    def _load(
        self,
        lease: Lease,
        kv_bytes: int,
        slots: int,
        max_context_tokens: int | None,
        sink: Sink,
        engine: str,
        watch: LoadWatch,
    ) -> AttachedModel:
        if engine not in ("auto", "batching", "sequential"):
            raise HearthError(Code.UNSUPPORTED, f"There is no engine {engine!r}; use auto, batching or sequential.")
        started = time.perf_counter()
        directory = Path(lease.directory)
        with ExitStack() as undo:
            # First of all the bytes: what copies them does so while everything else is made.
            image, placed, buffer = self._place(lease, watch)
            undo.callback(self._mappings.release, image)
            undo.callback(placed.cancel)
            with self._lock:
                files = read_files(directory)
                limits = (max_context_tokens, files.manifest.checkpoint.max_context_tokens or None)
                context = min((limit for limit in limits if limit), default=2048)
                manifest_done = time.perf_counter()
                tokenizer = self._tokenizers.load(directory, files.config)
                tokenizer_done = time.perf_counter()
                name = choose_engine(files.config) if engine == "auto" else engine
                model = skeleton(files)
                skeleton_done = time.perf_counter()
                views = tensors(files.manifest, buffer)
                model = fill(model, views, files, self._device, lambda: self._wait_unlocked(placed))
                del views, buffer
            placed.wait()  # without the lock: another checkpoint may be there already
            own_bytes = placed.memory_bytes or own_parameter_bytes(model, image)
            parameters_done = time.perf_counter()
            engine_name = f"engine-{lease.checkpoint.checkpoint_id[:8]}"
            with self._lock:
                threaded, engine_bytes = make_engine(
                    model, engine=name, kv_bytes=kv_bytes, slots=slots, max_context_tokens=context,
                    eos_token_ids=tokenizer.eos_token_ids, sink=sink, name=engine_name,
                )  # fmt: skip
            undo.pop_all()
        if self._device.type == "cuda":  # the parameters are the device's own
            self._mappings.release(image)
        ended = time.perf_counter()
        return AttachedModel(
            engine=threaded,
            tokenizer=tokenizer,
            max_context_tokens=min(context, threaded.max_sequence_tokens),
            memory_bytes=own_bytes + engine_bytes,
            times=AttachTimes(
                manifest_s=manifest_done - started,
                tokenizer_s=tokenizer_done - manifest_done,
                skeleton_s=skeleton_done - tokenizer_done,
                parameters_s=parameters_done - skeleton_done - placed.waited_s,
                waited_s=placed.waited_s,
                arrived_s=max(0.0, placed.arrived_at - started) if placed.arrived_at is not None else 0.0,
                engine_s=ended - parameters_done,
                total_s=ended - started,
            ),
            image=None if self._device.type == "cuda" else image,
            mappings=self._mappings,
        )

    def _wait_unlocked(self, placed: Placed) -> None:
        self._lock.release()
        try:
            placed.wait()
        finally:
            self._lock.acquire()

    def _place(self, lease: Lease, watch: LoadWatch) -> tuple[Image, Placed, torch.Tensor]:
        """What is mapped, how its bytes come, and the bytes themselves."""
        if self._device.type != "cuda":
            image, placed = in_memory(lease, self._mappings, watch)
            return image, placed, bytes_at(placed.address, placed.size_bytes)
        pieces, size_bytes = pieces_of(lease), image_bytes(lease)
        with ExitStack() as undo:
            segment = self._mappings.hold(lease)
            undo.callback(self._mappings.release, segment)
            self._pin(segment.address, segment.size_bytes)
            try:
                buffer = torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
            except torch.OutOfMemoryError as error:
                raise HearthError(
                    Code.OUT_OF_MEMORY, f"{size(size_bytes)} of parameters do not fit the device."
                ) from error
            copier = DeviceCopier(bytes_at(segment.address, segment.size_bytes), buffer)
            undo.pop_all()

        def copy(own: LoadWatch) -> float | None:
            arrivals = Arrivals(pieces, segment.word, own, REAL_TIME)
            with torch.cuda.device(self._device):
                stream(arrivals, copier, own, REAL_TIME, windowed=streams(lease))
            return arrivals.complete_at

        arriving = lease.arrival is not None
        return segment, Placed(0, size_bytes, memory_bytes=size_bytes, arriving=arriving).meanwhile(copy, watch), buffer

    def _pin(self, address: int, size_bytes: int) -> None:
        """Register a segment as pinned memory, once. Refusal costs only speed."""
        with self._pin_lock:
            if address in self._pins:
                return
            portable = 1
            result = torch.cuda.cudart().cudaHostRegister(address, size_bytes, portable)
            if int(result) == 0:
                self._pins[address] = size_bytes
                return
            with suppress(RuntimeError):  # CUDA keeps a refusal as its "last error", which the next launch would report
                torch.ones(1, device=self._device).add_(1)

    def _unpin(self, address: int) -> None:
        # Nobody pins it meanwhile: who pins holds an image of it.
        if self._pins.pop(address, None) is not None:
            torch.cuda.cudart().cudaHostUnregister(address)


class DeviceCopier:
    """Copies from a segment to a buffer of a CUDA device, on a stream of its own. See `Copier`."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self._source = source
        self._target = target
        self._stream = torch.cuda.Stream(target.device)
        self._stream.wait_stream(torch.cuda.current_stream(target.device))  # whatever had the buffer before
        self._copying: deque[torch.cuda.Event] = deque()
        self._finished = 0

    def start(self, piece: Piece) -> None:
        """See `Copier`."""
        into = self._target[piece.image_offset : piece.image_offset + piece.length]
        event = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            into.copy_(self._source[piece.segment_offset : piece.segment_offset + piece.length], non_blocking=True)
            event.record(self._stream)
        self._copying.append(event)

    def finished(self) -> int:
        """See `Copier`."""
        while self._copying and self._copying[0].query():
            self._copying.popleft()
            self._finished += 1
        return self._finished

    def finish(self) -> None:
        """See `Copier`."""
        self._stream.synchronize()


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
