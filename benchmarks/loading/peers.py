"""One load by one loader, in a process of its own that has imported everything before the clock starts.

    python benchmarks/loading/peers.py LOADER CHECKPOINT_DIRECTORY SMALL_DIRECTORY
    python benchmarks/loading/peers.py --make KIND DIRECTORY

Needs nothing of Hearth, so that it runs in any interpreter that has the loader's package. It imports, loads the small
checkpoint once, prints a line of JSON (`ready`), waits for a line on standard input, loads, touches one byte of every
4096, prints a line of JSON with what it took, and lives until standard input ends. A package that cannot be imported
is a line too (`missing`). `--make` writes the file of a loader with a format of its own beside the safetensors file.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE_BYTES = 4096
Load = Callable[[Path], Any]


def weights(directory: Path) -> str:
    """The one weight file of a checkpoint."""
    return str(directory / "model.safetensors")


def _safetensors() -> Load:
    from safetensors.torch import load_file

    return lambda directory: load_file(weights(directory))


def _torch_load(*, mapped: bool) -> Load:
    import torch

    return lambda directory: torch.load(directory / "model.pt", mmap=mapped, weights_only=True)


def _from_pretrained() -> Load:
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return lambda directory: AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True)


def _fastsafetensors() -> Load:
    from fastsafetensors import fastsafe_open

    def load(directory: Path) -> Any:
        with fastsafe_open(filenames=[weights(directory)], nogds=True, device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)

    return load


def _runai() -> Load:
    os.environ.setdefault("RUNAI_STREAMER_CONCURRENCY", "16")
    from runai_model_streamer import SafetensorsStreamer

    def load(directory: Path) -> Any:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([weights(directory)])  # the tensors are the caller's own: nothing to copy
            return dict(streamer.get_tensors())

    return load


def _tensorizer() -> Load:
    from tensorizer import TensorDeserializer

    def load(directory: Path) -> Any:
        return TensorDeserializer(str(directory / "model.tensors"), device="cpu", num_readers=4)

    return load


LOADERS: dict[str, Callable[[], Load]] = {
    "safetensors": _safetensors,
    "torch.load(mmap)": lambda: _torch_load(mapped=True),
    "torch.load": lambda: _torch_load(mapped=False),
    "from_pretrained": _from_pretrained,
    "fastsafetensors": _fastsafetensors,
    "run:ai streamer": _runai,
    "tensorizer": _tensorizer,
}
PACKAGES = {
    "safetensors": "safetensors", "torch.load(mmap)": "torch", "torch.load": "torch",
    "from_pretrained": "transformers", "fastsafetensors": "fastsafetensors", "run:ai streamer": "runai-model-streamer",
    "tensorizer": "tensorizer",
}  # fmt: skip
MAKES = {"torch.load(mmap)": "pt", "torch.load": "pt", "tensorizer": "tensors"}


def tensors_of(loaded: Any) -> list[Any]:
    """Every tensor of a model or of a mapping."""
    if hasattr(loaded, "state_dict") and not hasattr(loaded, "items"):
        return list(loaded.state_dict().values())
    return [loaded[name] for name in list(loaded.keys())]


def touch(tensors: list[Any]) -> tuple[int, int]:
    """Read one byte of every page; (a sum that nobody can optimise away, bytes in all)."""
    import torch

    total, size = 0, 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        total += int(flat[::PAGE_BYTES].sum())
        size += flat.numel()
    return total, size


def _kib(name: str, path: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(load: Load, directory: Path) -> dict[str, Any]:
    """Load once. Seconds until the tensors are usable, and until every page of them was read; memory and processor."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _kib("VmRSS", "/proc/self/status")
    pss = _kib("Pss", "/proc/self/smaps_rollup")
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    cpu_s, start = _cpu_s(), time.perf_counter()
    loaded = load(directory)
    usable_s, usable_cpu_s = time.perf_counter() - start, _cpu_s() - cpu_s
    _, size = touch(tensors_of(loaded))
    touched_s, touched_cpu_s = time.perf_counter() - start, _cpu_s() - cpu_s
    cpu_s = _cpu_s()
    touch(tensors_of(loaded))
    retouch_cpu_s = _cpu_s() - cpu_s
    return {
        "usable_s": usable_s, "touched_s": touched_s, "usable_cpu_s": usable_cpu_s, "touched_cpu_s": touched_cpu_s,
        "retouch_cpu_s": retouch_cpu_s, "bytes": size, "peak_bytes": _kib("VmHWM", "/proc/self/status") - before,
        "pss_bytes": _kib("Pss", "/proc/self/smaps_rollup") - pss,
        "page_faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults, "keep": loaded,
    }  # fmt: skip


def make(kind: str, directory: Path) -> None:
    """Write the checkpoint in a loader's own format, beside the safetensors file it has."""
    from safetensors.torch import load_file

    tensors = load_file(weights(directory))
    if kind == "pt":
        import torch

        torch.save(tensors, directory / "model.pt.part")
        (directory / "model.pt.part").rename(directory / "model.pt")
    else:
        from tensorizer import TensorSerializer

        serializer = TensorSerializer(str(directory / "model.tensors.part"))
        serializer.write_state_dict(tensors)
        serializer.close()
        (directory / "model.tensors.part").rename(directory / "model.tensors")


def _version(loader: str) -> str:
    from importlib.metadata import version

    return version(PACKAGES[loader])


def _say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def main() -> None:
    """See the module."""
    if sys.argv[1] == "--make":
        make(sys.argv[2], Path(sys.argv[3]))
        return
    name, directory, small = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    out = os.dup(1)  # what a loader prints is not ours
    os.dup2(2, 1)
    sys.stdout = os.fdopen(out, "w")
    try:
        import torch  # noqa: F401

        load = LOADERS[name]()
    except ImportError as error:
        _say(missing=str(error))
        return
    touch(tensors_of(load(small)))  # what is imported or started at the first load
    _say(ready=True, version=_version(name), pid=os.getpid())
    if not sys.stdin.readline():
        return
    found = measure(load, directory)
    keep = found.pop("keep")
    _say(**found)
    sys.stdin.read()
    del keep
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
