"""A model in Hugging Face's form, in any source: configuration and headers are read; what is no model is refused."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

from services.store.manifest import HeaderTensor, corrupt, header_bytes, is_file_name, parse_header
from services.store.model_config import ModelConfig, parse_config, weight_map_of
from services.store.ports import SourceTree
from shared.errors import Code, HearthError
from shared.sizes import size

T = TypeVar("T")

SMALL_FILES: Final = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "chat_template.jinja",
    "*.model", "*.tiktoken", "normalizer.json",
)  # fmt: skip
SMALL_LIMIT_BYTES: Final = 256 * 2**20
CONFIG: Final = "config.json"
CONFIG_LIMIT_BYTES: Final = 2**24
INDEX_LIMIT_BYTES: Final = 2**27
SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
_FILES_LIMIT: Final = 10_000
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SHARD: Final = re.compile(r"[^/\\\0]+\.safetensors")
# Of a file over a network, read at once in the hope that the header is no longer: a round trip costs more than bytes.
_FIRST_BYTES: Final = 2**18
_PARALLEL_HEADERS: Final = 8


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A model that can be converted. `tensors` maps each tensor to its file and its place there.

    `small_files` are the sizes of the files that belong to it besides its weights (name → bytes).
    """

    config: ModelConfig
    tensors: Mapping[str, tuple[str, HeaderTensor]]
    small_files: Mapping[str, int]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors as they are now."""
        return sum(tensor.bytes for _, tensor in self.tensors.values())


def is_small_file(name: str) -> bool:
    """Whether a file belongs to the checkpoint besides its weights."""
    return is_file_name(name) and any(fnmatch.fnmatchcase(name, pattern) for pattern in SMALL_FILES)


def weight_files(names: Iterable[str], index: bytes | None) -> list[str]:
    """Which of a source's files hold its weights. Raises `invalid_checkpoint` with the reason if none do."""
    names = set(names)
    if SINGLE in names:
        return [SINGLE]
    if index is not None:
        wanted = sorted(set(weight_map_of(index).values()))
        if len(wanted) > _FILES_LIMIT:
            raise corrupt(f"{INDEX} names more than {_FILES_LIMIT} files.")
        for name in wanted:
            if not _SHARD.fullmatch(name) or not is_file_name(name):
                raise corrupt(f"{INDEX} names {name[:200]!r}, which is no file beside it.")
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


def open_model(tree: SourceTree) -> SourceModel:
    """Read configuration, index and headers, nothing else. Raises `HearthError` with the reason for a refusal."""
    if CONFIG not in tree.files:
        raise corrupt(f"{tree.url} has no config.json, so it is no model in Hugging Face's form.")
    small_files = {name: size for name, size in sorted(tree.files.items()) if is_small_file(name)}
    if sum(small_files.values()) > SMALL_LIMIT_BYTES:
        raise HearthError(Code.TOO_LARGE, f"The files besides the weights exceed {size(SMALL_LIMIT_BYTES)}.")
    sharded = SINGLE not in tree.files and INDEX in tree.files
    index = tree.read_small(INDEX, INDEX_LIMIT_BYTES) if sharded else None
    files = weight_files(tree.files, index)
    config = parse_config(tree.read_small(CONFIG, CONFIG_LIMIT_BYTES))
    tensors: dict[str, tuple[str, HeaderTensor]] = {}
    for file, header in zip(files, read_headers(tree, files), strict=True):
        for name, tensor in header.items():
            if name in tensors:
                raise corrupt(f"Tensor {name!r} is in two files.")
            tensors[name] = (file, tensor)
    if not tensors:
        raise corrupt("Its weight files hold no tensors.")
    if index is not None:
        missing = [name for name in weight_map_of(index) if name not in tensors]
        if missing:
            raise corrupt(f"Tensor {missing[0][:200]!r} of {INDEX} is in none of its files.")
    return SourceModel(config=config, tensors=tensors, small_files=small_files)


def read_small_files(tree: SourceTree, model: SourceModel) -> dict[str, bytes]:
    """The files besides the weights (name → content)."""
    left_bytes = SMALL_LIMIT_BYTES  # what is listed may not be what is there

    def read(name: str) -> bytes:
        nonlocal left_bytes
        data = tree.read_small(name, max(0, left_bytes))
        left_bytes -= len(data)
        return data

    names = list(model.small_files)
    return dict(zip(names, _each(tree, names, read), strict=True))


def read_headers(tree: SourceTree, files: list[str]) -> list[dict[str, HeaderTensor]]:
    """The tensors of these weight files, each in the order of its data. Raises `HearthError`."""

    def read(file: str) -> dict[str, HeaderTensor]:
        head = read_head(tree, file)
        return parse_header(head[8:], tree.files[file], file)

    return _each(tree, files, read)


def read_heads(tree: SourceTree, files: list[str]) -> list[bytes]:
    """The heads of these safetensors files: length and JSON header, unparsed. Raises `HearthError`."""
    return _each(tree, files, lambda file: read_head(tree, file))


def read_head(tree: SourceTree, file: str) -> bytes:
    """Length and JSON header of a safetensors file, unparsed. Raises `HearthError`."""
    size_bytes = tree.files[file]
    first = bytearray(min(size_bytes, _FIRST_BYTES if tree.remote else 8))
    tree.read(file, 0, memoryview(first))
    end = 8 + header_bytes(bytes(first[:8]), size_bytes, file)
    if end <= len(first):
        return bytes(first[:end])
    rest = bytearray(end - len(first))
    tree.read(file, len(first), memoryview(rest))
    return bytes(first + rest)


def _each(tree: SourceTree, files: list[str], read: Callable[[str], T]) -> list[T]:
    if not tree.remote or len(files) < 2:
        return [read(file) for file in files]
    with ThreadPoolExecutor(_PARALLEL_HEADERS, thread_name_prefix="header") as executor:
        return list(executor.map(read, files))
