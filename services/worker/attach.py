"""From a lease to a model whose parameters are all there: views on the store's memory, or on a copy of it.

The order: manifest and config → skeleton on the meta device (no memory, no initialisation) → buffers that are in no
checkpoint (rotary frequencies) by the model's own initialisation, while every parameter is still on meta → parameters
assigned from the image. Nothing is parsed or copied on the CPU, so the time depends on the number of modules and
tensors, not on their sizes; and none of it needs the image's bytes, which may still be arriving. The price is that
**the parameters are the store's memory**, mapped read-only.

No pickle, no remote code: `trust_remote_code` is False wherever transformers asks.
"""

from __future__ import annotations

import ctypes
import math
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils._device import DeviceContext

from services.worker.attach_names import renamed
from services.worker.engine import FOREIGN_ERRORS
from services.worker.loader_memory import Image, Mappings
from services.worker.loader_transfer import in_memory
from services.worker.ports import UNWATCHED, AttachTimes, LoadWatch
from shared.contracts.manifest import MANIFEST_NAME, Manifest, decode_manifest
from shared.contracts.residency import Lease
from shared.errors import Code, HearthError

# The dtypes of safetensors whose elements torch has: not those of 6 bits, and of 4 bits only in pairs.
DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
CPU: Final = torch.device("cpu")
# What a checkpoint may hold beyond the model's parameters: what is computed anew, and causal masks of old GPTs.
_SUPERFLUOUS: Final = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"attn\.(masked_)?bias$")


@dataclass(frozen=True)
class SmallFiles:
    """What the small files of a checkpoint say."""

    manifest: Manifest
    config: Any
    model_class: Any
    dtype: torch.dtype


@dataclass(frozen=True)
class Attached:
    """A model whose parameters are all there. Drop it before `image` is released. `memory_bytes` are its own."""

    model: Any
    image: Image
    memory_bytes: int
    times: AttachTimes


def attach(lease: Lease, mappings: Mappings, *, watch: LoadWatch = UNWATCHED) -> Attached:
    """A model on the CPU without tokenizer and engine. Raises what `Loader.load` raises."""
    started = time.perf_counter()
    files = read_files(Path(lease.directory))
    files_done = time.perf_counter()
    model = skeleton(files)
    skeleton_done = time.perf_counter()
    with ExitStack() as undo:
        image, placed = in_memory(lease, mappings, watch)
        undo.callback(mappings.release, image)
        undo.callback(placed.cancel)
        views = tensors(files.manifest, bytes_at(placed.address, placed.size_bytes))
        model = fill(model, views, files, CPU, placed.wait)
        placed.wait()
        undo.pop_all()
    ended = time.perf_counter()
    return Attached(
        model=model,
        image=image,
        memory_bytes=placed.memory_bytes or own_parameter_bytes(model, image),
        times=AttachTimes(
            manifest_s=files_done - started,
            skeleton_s=skeleton_done - files_done,
            parameters_s=ended - skeleton_done - placed.waited_s,
            waited_s=placed.waited_s,
            total_s=ended - started,
        ),
    )


# ------------------------------------------------------------------------------------------------- where the bytes are


def bytes_at(address: int, size_bytes: int) -> torch.Tensor:
    """Memory of this process as a tensor of bytes, which does not keep it."""
    return torch.frombuffer((ctypes.c_ubyte * size_bytes).from_address(address), dtype=torch.uint8)


def tensors(manifest: Manifest, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views on the image by name. Raises HearthError: CHECKPOINT_CORRUPT, UNSUPPORTED (a dtype unknown to torch)."""
    starts = manifest.starts()
    size_bytes = image.numel()
    if manifest.image_bytes() > size_bytes:
        raise HearthError(Code.CHECKPOINT_CORRUPT, "The lease is shorter than the checkpoint.")
    typed: dict[str, tuple[torch.Tensor, int]] = {}
    found: dict[str, torch.Tensor] = {}
    for name, entry in manifest.tensors.items():
        if entry.dtype not in typed:
            dtype = DTYPES.get(entry.dtype)
            if dtype is None:
                message = f"{name} has elements of type {entry.dtype}, which cannot be served."
                raise HearthError(Code.UNSUPPORTED, message)
            typed[entry.dtype] = (image[: size_bytes - size_bytes % dtype.itemsize].view(dtype), dtype.itemsize)
        if not 0 <= entry.file < len(starts):
            raise HearthError(Code.CHECKPOINT_CORRUPT, f"The manifest places {name} in a file that is not there.")
        start = starts[entry.file] + entry.offset
        if entry.offset < 0 or entry.bytes < 0 or start + entry.bytes > size_bytes:
            raise HearthError(Code.CHECKPOINT_CORRUPT, f"The manifest places {name} outside the checkpoint.")
        view, item_bytes = typed[entry.dtype]
        shape = entry.shape
        fits = math.prod(shape) * item_bytes == entry.bytes and start % item_bytes == 0
        if not fits or (shape and min(shape) < 0):
            raise HearthError(Code.CHECKPOINT_CORRUPT, f"The manifest's shape of {name} does not match its bytes.")
        # One operation for each tensor, where slicing and viewing would be three.
        found[name] = view.as_strided(shape, _strides(shape), start // item_bytes)
    return found


def _strides(shape: tuple[int, ...]) -> list[int]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(1, shape[axis + 1])
    return strides


# -------------------------------------------------------------------------------------------------------- the skeleton


def read_files(directory: Path) -> SmallFiles:
    """Manifest and config. Raises HearthError: CHECKPOINT_UNAVAILABLE, CHECKPOINT_CORRUPT, UNSUPPORTED."""
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
    return SmallFiles(manifest=manifest, config=config, model_class=model_class(config), dtype=dtype)


def model_class(config: Any) -> Any:
    """The class of a causal language model of this config. Raises HearthError: UNSUPPORTED."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise HearthError(Code.UNSUPPORTED, f"{config.model_type} is no causal language model.") from error


class _Meta(DeviceContext):
    """`torch.device("meta")` for this thread that leaves initialisation out, which costs as much as all the rest."""

    _INITIALISATIONS: Final = frozenset(
        (torch.nn.init.uniform_, torch.nn.init.normal_, torch.nn.init.constant_, torch.nn.init.kaiming_uniform_)
    )

    def __init__(self) -> None:
        super().__init__("meta")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._INITIALISATIONS:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return super().__torch_function__(func, types, args, kwargs)


def skeleton(files: SmallFiles) -> Any:
    """The model without memory: every parameter and buffer on the meta device. Raises HearthError: UNSUPPORTED."""
    try:
        with _Meta():
            # float32 is torch's default: another one would be set for the whole process, engines of other models
            # included.
            return files.model_class._from_config(files.config, dtype=torch.float32)
    except FOREIGN_ERRORS as error:
        raise HearthError(
            Code.UNSUPPORTED, f"A {files.config.model_type} model cannot be made ({type(error).__name__})."
        ) from error


# ------------------------------------------------------------------------------------------------------ the parameters


@dataclass(slots=True)
class _Parts:
    """What one walk over a skeleton finds. `slots`: dictionary and key of everything that a checkpoint holds, by name.
    `owners`: names of the modules with buffers that no checkpoint holds."""

    modules: dict[str, Any]
    slots: dict[str, tuple[dict[str, Any], str]]
    owners: list[str]
    plain: bool = True


def fill(
    model: Any,
    views: dict[str, torch.Tensor],
    files: SmallFiles,
    device: torch.device,
    wait: Callable[[], None] = lambda: None,
) -> Any:
    """Give the skeleton its parameters. Returns the model, ready: eval mode, no gradients, nothing left on meta.

    `wait` is called before the first byte of a view is looked at, which most models do not need. Raises HearthError:
    CHECKPOINT_CORRUPT, and what `wait` raises.
    """
    parts = _walk(model)
    for alias, name in files.manifest.tied.items():
        if name in views:
            views.setdefault(alias, views[name])
    if not views.keys() <= parts.slots.keys():
        views = renamed(model, views, frozenset(parts.slots)) or views
    for target, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        for one, other in ((target, source), (source, target)):
            if one not in views and other in views:
                views[one] = views[other]
    superfluous = views.keys() - parts.slots.keys()
    if parts.slots.keys() - views.keys() or not all(_ignored(model, name) for name in superfluous):
        # A layout of another version of this architecture: transformers' own loading converts it, with copies.
        wait()
        model = _convert(files, views, device)
        model.requires_grad_(False)
        model.eval()
    else:
        for name, view in views.items():
            if view.dtype != files.dtype and view.is_floating_point() and name not in superfluous:
                wait()
                views[name] = view.to(files.dtype)
        _fill_buffers(model, parts, device)
        _assign(model, parts, views)
        model.config.dtype = files.dtype
        model.tie_weights(recompute_mapping=False)
    for tensor_name, tensor in _left(model):
        if tensor.is_meta:
            raise HearthError(Code.CHECKPOINT_CORRUPT, f"The checkpoint has no {tensor_name}.")
    return model


def _walk(model: Any) -> _Parts:
    from torch.nn import Module
    from transformers import PreTrainedModel

    parts = _Parts({}, {}, [])
    for prefix, module in model.named_modules(remove_duplicate=False):
        parts.modules[prefix] = module
        start = f"{prefix}." if prefix else ""
        kind = type(module)
        if (
            kind._load_from_state_dict is not Module._load_from_state_dict
            or kind.train not in (Module.train, PreTrainedModel.train)
            or module._load_state_dict_pre_hooks
            or module._load_state_dict_post_hooks
        ):
            parts.plain = False
        for name, parameter in module._parameters.items():
            if parameter is not None:
                parameter._is_hf_initialized = True
                parts.slots[start + name] = (module._parameters, name)
        owner = False
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if name in module._non_persistent_buffers_set:
                owner = True
            else:
                parts.slots[start + name] = (module._buffers, name)
        if owner:
            parts.owners.append(prefix)
    return parts


def _fill_buffers(model: Any, parts: _Parts, device: torch.device) -> None:
    """Compute what is in no checkpoint, by the model's own initialisation, which finds all parameters on meta.

    This is `initialize_weights` of transformers, but for the modules that have such buffers and those around them only.
    """
    from transformers import PreTrainedModel, initialization

    if not parts.owners:
        return
    for prefix in parts.owners:
        module = parts.modules[prefix]
        for name in module._non_persistent_buffers_set:
            if module._buffers.get(name) is not None:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
    if type(model).initialize_weights is not PreTrainedModel.initialize_weights:
        model.initialize_weights()
        return
    touched: dict[str, None] = {}  # the inner ones before those around them, as transformers goes
    for prefix in parts.owners:
        at = prefix
        while at not in touched:
            touched[at] = None
            if not at:
                break
            at = at.rpartition(".")[0]
    with torch.no_grad(), initialization.guard_torch_init_functions():
        for prefix in sorted(touched, key=lambda one: one.count(".") + bool(one), reverse=True):
            at = prefix
            while not isinstance(parts.modules[at], PreTrainedModel):
                at = at.rpartition(".")[0]
            parts.modules[at]._initialize_weights(parts.modules[prefix])


def _assign(model: Any, parts: _Parts, views: dict[str, torch.Tensor]) -> None:
    """What `load_state_dict(assign=True)`, `requires_grad_(False)` and `eval()` do, in one walk."""
    if not parts.plain:
        try:
            model.load_state_dict({name: views[name] for name in parts.slots}, strict=True, assign=True)
        except RuntimeError as error:
            raise _misshapen() from error
        model.requires_grad_(False)
        model.eval()
        return
    for name, (where, key) in parts.slots.items():
        view = views[name]
        if where[key].shape != view.shape:
            raise _misshapen()
        is_parameter = isinstance(where[key], torch.nn.Parameter)
        where[key] = torch.nn.Parameter(view, requires_grad=False) if is_parameter else view
    for module in parts.modules.values():
        module.__dict__["training"] = False


def own_parameter_bytes(model: Any, image: Image) -> int:
    """Bytes of the parameters that are not the image's: those that had to be converted or cast."""
    inside = range(image.address, image.address + image.size_bytes)
    return sum(one.nbytes for one in model.parameters() if one.data_ptr() not in inside)


def _misshapen() -> HearthError:
    return HearthError(Code.CHECKPOINT_CORRUPT, "The checkpoint's tensors have not the shapes that its config says.")


def _left(model: Any) -> list[tuple[str, torch.Tensor]]:
    found: list[tuple[str, torch.Tensor]] = []
    for prefix, module in model.named_modules():
        for where in (module._parameters, module._buffers):
            found += [(f"{prefix}.{name}", tensor) for name, tensor in where.items() if tensor is not None]
    return found


def _ignored(model: Any, name: str) -> bool:
    patterns = (*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_SUPERFLUOUS)
    return any(re.search(pattern, name) for pattern in patterns)


def _convert(files: SmallFiles, views: dict[str, torch.Tensor], device: torch.device) -> Any:
    try:
        model, info = files.model_class.from_pretrained(
            None, config=files.config, state_dict=views, dtype=files.dtype, output_loading_info=True
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
