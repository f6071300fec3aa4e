"""A checkpoint as a worker gets it, without a store: a manifest beside the model's files, and its image in a file."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Sequence
from pathlib import Path

from shared.contracts.manifest import (
    CHUNK_BYTES,
    FORMAT_VERSION,
    MANIFEST_NAME,
    PAGE_BYTES,
    Manifest,
    TensorEntry,
    WeightFile,
    decode_manifest,
    encode_manifest,
    padded_bytes,
)
from shared.contracts.residency import FAILED_TURN, Arrival, Checkpoint, Extent, Lease, arrival_word

_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def write_manifest(directory: Path, *, context_tokens: int = 512, tied: dict[str, str] | None = None) -> Manifest:
    """Describe the safetensors files of a Hugging Face directory in its `hearth.json` (chunks are left out)."""
    paths = sorted(directory.glob("*.safetensors"))
    tensors: dict[str, TensorEntry] = {}
    for number, path in enumerate(paths):
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, facts in header.items():
            begin, end = facts["data_offsets"]
            tensors[name] = TensorEntry(
                file=number,
                offset=8 + header_bytes + begin,
                bytes=end - begin,
                dtype=facts["dtype"],
                shape=tuple(facts["shape"]),
            )
    config_bytes = (directory / "config.json").read_bytes()
    config = json.loads(config_bytes)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        checkpoint=Checkpoint(
            checkpoint_id=hashlib.sha256(str(directory).encode()).hexdigest()[:32],
            architecture=config["architectures"][0],
            weight_bytes=sum(entry.bytes for entry in tensors.values()),
            parameters=0,
            dtype=_NAMES[max(tensors.values(), key=lambda entry: entry.bytes).dtype],
            max_context_tokens=context_tokens,
            kv_bytes_per_token=1,
            vocab_tokens=config["vocab_size"],
            has_chat_template=True,
        ),
        chunk_bytes=CHUNK_BYTES,
        files=tuple(WeightFile(name=path.name, bytes=path.stat().st_size) for path in paths),
        tensors=tensors,
        chunks=(),
        config_digest=hashlib.sha256(config_bytes).hexdigest(),
        tied=tied or {},
    )
    (directory / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return manifest


def make_lease(directory: Path, segment: Path, *, pieces: Sequence[int] | None = None) -> Lease:
    """Write the image of a directory with a manifest into a new file `segment` and lease it.

    `pieces` is an order in which pieces of the image lie in the segment: (1, 0) puts its second half first, so that two
    extents are needed. Without, it is one extent that begins on the second page.
    """
    manifest = decode_manifest((directory / MANIFEST_NAME).read_bytes())
    image = image_of(directory, manifest)
    order = list(pieces or (0,))
    length = padded_bytes(-(-len(image) // len(order)))
    parts = [image[number * length : (number + 1) * length] for number in range(len(order))]
    content, places = bytearray(b"\xff" * PAGE_BYTES), {}
    for number in order:
        places[number] = Extent(offset=len(content), length=len(parts[number]))
        content += parts[number] + b"\xff" * PAGE_BYTES
    segment.unlink(missing_ok=True)
    segment.write_bytes(content)
    return Lease(
        lease_id=f"lease-{segment.name}",
        checkpoint=manifest.checkpoint,
        segment=str(segment),
        segment_bytes=len(content),
        extents=tuple(places[number] for number in range(len(order))),
        directory=str(directory),
        tier="dram",
    )


class HandMadePool:
    """A store's segment, filled by hand: `chunk_count` chunks, then the board."""

    def __init__(self, path: Path, *, chunk_bytes: int, chunk_count: int) -> None:
        self.path = path
        self.chunk_bytes = chunk_bytes
        self.board_offset = chunk_bytes * chunk_count
        self.size_bytes = self.board_offset + padded_bytes(8 * chunk_count)
        path.unlink(missing_ok=True)
        with path.open("w+b") as file:
            file.truncate(self.size_bytes)
            self.memory = mmap.mmap(file.fileno(), self.size_bytes)
        self._words = memoryview(self.memory)[self.board_offset :].cast("Q")
        self._images: dict[int, tuple[bytes, Sequence[int], int]] = {}

    def lease(self, directory: Path, places: Sequence[int], *, tag: int = 1, window: bool = False) -> Lease:
        """An early lease of a directory with a manifest whose image comes into these chunks; nothing is there yet.

        With `window` the chunks are fewer than the image has.
        """
        manifest = decode_manifest((directory / MANIFEST_NAME).read_bytes())
        image = image_of(directory, manifest)
        self._images[tag] = (image, places, len(places) if window else 0)
        for place in places:
            self._words[place] = 0
        left = self.chunk_bytes * len(places) if window else len(image)
        extents = []
        for place in places:
            extents.append(Extent(offset=place * self.chunk_bytes, length=min(self.chunk_bytes, left)))
            left -= self.chunk_bytes
        return Lease(
            lease_id=f"lease-{tag}",
            checkpoint=manifest.checkpoint,
            segment=str(self.path),
            segment_bytes=self.size_bytes,
            extents=tuple(extents),
            directory=str(directory),
            tier="ssd",
            arrival=Arrival(
                tag=tag,
                chunk_bytes=self.chunk_bytes,
                board_offset=self.board_offset,
                image_bytes=len(image),
                window_chunks=len(places) if window else 0,
            ),
        )

    def chunks(self, tag: int = 1) -> int:
        """Chunks of the image."""
        return -(-len(self._images[tag][0]) // self.chunk_bytes)

    def bring(self, number: int, tag: int = 1) -> None:
        """Chunk `number` of the image arrives."""
        image, places, window = self._images[tag]
        place = places[number % (window or len(places))]
        part = image[number * self.chunk_bytes : (number + 1) * self.chunk_bytes]
        self._words[place] = 0
        self.memory[place * self.chunk_bytes : place * self.chunk_bytes + len(part)] = part
        self._words[place] = arrival_word(tag, number // (window or len(places)))

    def fail(self, tag: int = 1) -> None:
        """What has not arrived never will."""
        for place in self._images[tag][1]:
            self._words[place] = arrival_word(tag, FAILED_TURN)

    def close(self) -> None:
        """Let go of the memory."""
        self._words.release()
        self.memory.close()


def image_of(directory: Path, manifest: Manifest) -> bytes:
    """The image of the weight files of a directory."""
    image = b""
    for file in manifest.files:
        data = (directory / file.name).read_bytes()
        image += data + bytes(padded_bytes(len(data)) - len(data))
    return image
