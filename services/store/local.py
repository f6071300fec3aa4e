"""A Hugging Face directory as a source: configuration and headers are read, what is no checkpoint is refused."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from services.store.manifest import HeaderTensor, corrupt, header_bytes, parse_header
from services.store.model_config import ModelConfig, parse_config, weight_map_of
from shared.errors import Code, HearthError

SMALL_FILES: Final = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "chat_template.jinja",
    "*.model", "*.tiktoken", "normalizer.json",
)  # fmt: skip
SMALL_LIMIT_BYTES: Final = 256 * 2**20
SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHARD: Final = re.compile(r"[^/\\\0]+\.safetensors")


@dataclass(frozen=True, slots=True)
class LocalSource:
    """A readable source. `tensors` maps each tensor to its file and its place there; `small` are the other files."""

    directory: Path
    config: ModelConfig
    small: dict[str, bytes]
    files: tuple[Path, ...]
    tensors: dict[str, tuple[int, HeaderTensor]]
    fingerprint: str

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors as they are now."""
        return sum(tensor.bytes for _, tensor in self.tensors.values())


def is_small_file(name: str) -> bool:
    """Whether a file belongs to the checkpoint besides its weights."""
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in SMALL_FILES)


def weight_files(names: list[str], read_index: bytes | None) -> list[str]:
    """Which of a source's files hold its weights. Raises `invalid_checkpoint` with the reason if none do."""
    if SINGLE in names:
        return [SINGLE]
    if read_index is not None:
        wanted = sorted(set(weight_map_of(read_index).values()))
        for name in wanted:
            if not _SHARD.fullmatch(name) or name.startswith("."):
                raise corrupt(f"{INDEX} names {name!r}, which is no file beside it.")
        missing = [name for name in wanted if name not in names]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise corrupt(f"{missing[0]}{more} of {INDEX} is missing.")
        return wanted
    if any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in _PICKLES):
        raise corrupt(
            "Its weights are pickled PyTorch files, which can run code when they are read; convert them to safetensors."
        )
    if "adapter_model.safetensors" in names:
        raise corrupt("It is an adapter (adapter_model.safetensors), not a model.")
    raise corrupt(f"It has no weights: neither {SINGLE} nor {INDEX} is there.")


def absolute_directory(url: str) -> Path:
    """The directory that a source's url names. Raises `invalid_checkpoint`."""
    path = Path(url)
    if not path.is_absolute() or "\0" in url:
        raise corrupt(f"{url!r} is neither an absolute directory nor hf:ORG/NAME.")
    if not path.exists():
        raise corrupt(f"{url} does not exist on this server.")
    if not path.is_dir():
        raise corrupt(f"{url} is not a directory.")
    return path


def open_local(directory: Path) -> LocalSource:
    """Read everything but the weights themselves. Raises `HearthError` with the reason for a refusal."""
    try:
        return _open(directory)
    except OSError as error:
        raise HearthError(Code.CHECKPOINT_UNAVAILABLE, f"{directory} cannot be read: {error}.") from error


def _open(directory: Path) -> LocalSource:
    names = sorted(entry.name for entry in os.scandir(directory) if entry.is_file())
    if "config.json" not in names:
        raise corrupt(f"{directory} has no config.json, so it is no model in Hugging Face's form.")
    small: dict[str, bytes] = {}
    digest = hashlib.sha256()
    for name in filter(is_small_file, names):
        path = _inside(directory, name)
        if path.stat().st_size + sum(map(len, small.values())) > SMALL_LIMIT_BYTES:
            raise HearthError(Code.TOO_LARGE, f"The files besides the weights exceed {SMALL_LIMIT_BYTES} bytes.")
        small[name] = path.read_bytes()
        digest.update(f"{name} {hashlib.sha256(small[name]).hexdigest()}\n".encode())
    config = parse_config(small["config.json"])
    index = _inside(directory, INDEX).read_bytes() if INDEX in names else None
    files = [_inside(directory, name) for name in weight_files(names, index)]
    tensors: dict[str, tuple[int, HeaderTensor]] = {}
    for number, path in enumerate(files):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns} {status.st_ino}\n".encode())
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise corrupt(f"Tensor {name!r} is in two files.")
            tensors[name] = (number, tensor)
    if not tensors:
        raise corrupt("Its weight files hold no tensors.")
    if index is not None and len(files) > 1:
        missing = [name for name in weight_map_of(index) if name not in tensors]
        if missing:
            raise corrupt(f"Tensor {missing[0]!r} of {INDEX} is in none of its files.")
    return LocalSource(directory, config, small, tuple(files), tensors, digest.hexdigest()[:32])


def read_header(path: Path) -> dict[str, HeaderTensor]:
    """The tensors of a safetensors file in the order of their data. Raises `invalid_checkpoint`, OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = header_bytes(file.read(8), size, path.name)
        return parse_header(file.read(length), size, path.name)


def _inside(directory: Path, name: str) -> Path:
    """The file, if it lies in the directory or is a link into the blobs of a Hugging Face cache, as snapshots have."""
    path = directory / name
    real, home = path.resolve(), directory.resolve()
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if real.parent != home and real.parent != cache:
        raise corrupt(f"{name} is a link that leaves its directory.")
    return path
