"""Import: what comes out is the same model in Hearth's layout; what cannot be imported leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash

from services.store.convert import ConversionOrigin, make_plan
from services.store.fetch import Fetcher
from services.store.importer import Importer, Outcome
from services.store.local import LocalTree
from services.store.manifest import DTYPES, decode_stored
from services.store.mover import Mover
from services.store.pool import Pool
from services.store.ports import Peer, SourceTree
from services.store.source_model import open_model
from services.store.tier import SsdTier
from shared.contracts.manifest import Manifest, padded_bytes
from shared.contracts.residency import Extent, Source, arrival_word
from shared.errors import Code, HearthError
from tests.unit.store.sources import CONFIG, LLAMA, Tensors, an_importer, make_source, safetensors

CHUNK = 8192


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[SsdTier]:
    tier = SsdTier(tmp_path / "store")
    yield tier
    tier.close()


@pytest.fixture
def importer(tier: SsdTier) -> Iterator[Importer]:
    with an_importer(tier, chunk_bytes=CHUNK) as importer:
        yield importer


def do_import(tier: SsdTier, directory: Path, **source: Any) -> Outcome:
    with an_importer(tier, chunk_bytes=CHUNK) as importer:
        return importer.run(Source(url=str(directory), **source), progressed=lambda done, total: None)


def is_empty(tier: SsdTier) -> bool:
    """Whether nothing is in the tier or on its way."""
    return os.listdir(tier.checkpoints) == os.listdir(tier.root / "incoming") == []


def manifest_of(tier: SsdTier, outcome: Outcome) -> Manifest:
    return tier.manifest(Path(outcome.stored.directory))


def contents_of(tier: SsdTier, outcome: Outcome) -> dict[str, bytes]:
    manifest = manifest_of(tier, outcome)
    files = [Path(outcome.stored.directory, file.name).read_bytes() for file in manifest.files]
    return {name: files[t.file][t.offset : t.offset + t.bytes] for name, t in manifest.tensors.items()}


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_arrives_unchanged_and_every_chunk_has_its_checksum(
    tier: SsdTier, importer: Importer, tmp_path: Path, shards: int
) -> None:
    tensors: Tensors = {**LLAMA, "odd": ("I8", (13,)), "empty": ("F32", (0, 4))}
    contents = make_source(tmp_path / "m", tensors, shards=shards)
    progress: list[tuple[int, int]] = []
    outcome = importer.run(Source(url=str(tmp_path / "m")), progressed=lambda *at: progress.append(at))
    assert contents_of(tier, outcome) == contents
    manifest = manifest_of(tier, outcome)
    data = Path(outcome.stored.directory, "model.safetensors").read_bytes()
    image = data.ljust(padded_bytes(len(data)), b"\0")
    assert len(image) == manifest.image_bytes() == outcome.stored.image_bytes
    assert list(manifest.chunks) == [
        xxhash.xxh3_64_hexdigest(image[at : at + CHUNK]) for at in range(0, len(image), CHUNK)
    ]
    assert progress[-1] == (len(image), len(image))
    names = list(manifest.tensors)
    assert names.index("model.embed_tokens.weight") < names.index("model.layers.10.self_attn.q_proj.weight")
    assert names[-1] == "odd"
    facts = outcome.stored.checkpoint
    assert (facts.architecture, facts.dtype, facts.max_context_tokens) == ("LlamaForCausalLM", "float32", 128)
    assert facts.weight_bytes == sum(map(len, contents.values()))
    assert facts.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert not facts.has_chat_template


def test_what_is_stored_takes_no_more_than_was_announced(tier: SsdTier, importer: Importer, tmp_path: Path) -> None:
    make_source(tmp_path / "m")
    look = importer.look(Source(url=str(tmp_path / "m")))
    outcome = do_import(tier, tmp_path / "m")
    assert outcome.stored.stored_bytes <= look.peak_bytes
    assert outcome.stored.image_bytes == look.image_bytes


def test_the_same_content_is_the_same_checkpoint(tier: SsdTier, tmp_path: Path) -> None:
    for name in ("m", "copy"):
        make_source(tmp_path / name, seed=1)
    make_source(tmp_path / "other", seed=2)
    make_source(tmp_path / "template", seed=1)
    (tmp_path / "template" / "chat_template.jinja").write_text("{{ messages }}")
    first, copy, other, template = (do_import(tier, tmp_path / name) for name in ("m", "copy", "other", "template"))
    assert copy.existing
    assert copy.stored == first.stored
    assert len({first.stored.id, other.stored.id, template.stored.id}) == 3
    assert template.stored.checkpoint.has_chat_template


@pytest.mark.parametrize("form", ["hugging face", "hearth"])
def test_what_is_imported_is_in_the_pool_at_the_same_time(
    tier: SsdTier, tmp_path: Path, hearth_form: Path, form: str
) -> None:
    pool = Pool.open(tmp_path, prefix="t", server_id="s", chunk_bytes=CHUNK, chunk_count=16)
    extents = [Extent(offset=8 * CHUNK, length=3 * CHUNK), Extent(offset=0, length=6 * CHUNK)]
    url = str(hearth_form if form == "hearth" else tmp_path / "m")
    with an_importer(tier, pool=pool) as importer:
        outcome = importer.run(Source(url=url), extents=extents, tag=7, progressed=lambda done, total: None)
    assert outcome.in_dram
    image = Path(outcome.stored.directory, "model.safetensors").read_bytes().ljust(outcome.stored.image_bytes, b"\0")
    there = b"".join(pool.memory[one.offset : one.offset + one.length] for one in extents)
    assert there[: len(image)] == image
    board = pool.path.read_bytes()[pool.board_offset :][: 16 * 8]
    words = [int.from_bytes(board[at : at + 8], "little") for at in range(0, len(board), 8)]
    used = [8, 9, 10, 0, 1, 2, 3, 4, 5][: -(-len(image) // CHUNK)]
    assert [index for index, word in enumerate(words) if word == arrival_word(7, 0)] == sorted(used)
    pool.close(keep=False)


def test_only_what_belongs_to_the_model_is_copied(tier: SsdTier, tmp_path: Path) -> None:
    make_source(tmp_path / "m")
    for name in ("modeling_evil.py", "optimizer.pt", "README.md", "training_args.bin"):
        (tmp_path / "m" / name).write_text("x")
    stored = do_import(tier, tmp_path / "m").stored
    assert sorted(os.listdir(stored.directory)) == ["config.json", "hearth.json", "model.safetensors", "tokenizer.json"]


def test_a_head_that_repeats_the_embedding_is_stored_once_if_the_config_ties_them(
    tier: SsdTier, tmp_path: Path
) -> None:
    same = {"lm_head.weight": "model.embed_tokens.weight"}
    make_source(tmp_path / "tied", config={"tie_word_embeddings": True}, same=same)
    manifest = manifest_of(tier, do_import(tier, tmp_path / "tied"))
    assert manifest.tied == same
    assert "lm_head.weight" not in manifest.tensors
    # Equal bytes alone are no reason, and neither is the word of the config when the bytes differ.
    make_source(tmp_path / "equal", same=same)
    make_source(tmp_path / "differ", config={"tie_word_embeddings": True})
    for name in ("equal", "differ"):
        manifest = manifest_of(tier, do_import(tier, tmp_path / name))
        assert manifest.tied == {}
        assert "lm_head.weight" in manifest.tensors


def _rm(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        table = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
        (directory / "config.json").write_text(json.dumps(table))

    return change


def _index(weight_map: dict[str, str]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / "model.safetensors").unlink()
        (directory / "model-1.safetensors").write_bytes(safetensors({"a": ("F32", (2,))})[0])
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def _pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _link_out(name: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).rename(directory.parent / "elsewhere")
        (directory / name).symlink_to(directory.parent / "elsewhere")

    return change


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (_rm("config.json"), Code.INVALID_CHECKPOINT, "no config.json"),
        (_rm("model.safetensors"), Code.INVALID_CHECKPOINT, "no weights"),
        (lambda d: (d / "config.json").write_text("{"), Code.INVALID_CHECKPOINT, "config.json is malformed"),
        (_config(architectures=None), Code.INVALID_CHECKPOINT, "architectures"),
        (_config(architectures=["T5Model"]), Code.UNSUPPORTED, "no causal language model"),
        (_config(auto_map={"AutoConfig": "x.Y"}, model_type="never_heard_of"), Code.UNSUPPORTED, "auto_map"),
        (_pickle, Code.INVALID_CHECKPOINT, "pickled PyTorch files"),
        (_cut, Code.INVALID_CHECKPOINT, "truncated"),
        (_index({"a": "../../etc/passwd"}), Code.INVALID_CHECKPOINT, "no file beside it"),
        (_index({"a": "/etc/model.safetensors"}), Code.INVALID_CHECKPOINT, "no file beside it"),
        (_index({"a": "model-1.safetensors", "b": "model-2.safetensors"}), Code.INVALID_CHECKPOINT, "is missing"),
        (_link_out("model.safetensors"), Code.INVALID_CHECKPOINT, "link that leaves"),
        (_link_out("tokenizer.json"), Code.INVALID_CHECKPOINT, "link that leaves"),
    ],
)
def test_refusals(
    tier: SsdTier, importer: Importer, tmp_path: Path, damage: Callable[[Path], None], code: Code, words: str
) -> None:
    make_source(tmp_path / "m")
    damage(tmp_path / "m")
    for call in (importer.look, lambda source: do_import(tier, Path(source.url))):
        with pytest.raises(HearthError, match=words) as refused:
            call(Source(url=str(tmp_path / "m")))
        assert refused.value.failure.code is code
    assert is_empty(tier)


def test_paths_that_no_filesystem_takes_are_clear_errors(tier: SsdTier, importer: Importer) -> None:
    for url in ("/" + "x" * 5000, "/x\0y", "/" + "x/" * 5000):
        with pytest.raises(HearthError) as refused:
            importer.look(Source(url=url))
        assert refused.value.failure.code in (Code.INVALID_CHECKPOINT, Code.CHECKPOINT_UNAVAILABLE)


def test_missing_directory_file_and_relative_path_are_refused(
    tier: SsdTier, importer: Importer, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    cases = {str(tmp_path / "none"): "does not exist", str(tmp_path / "file"): "not a directory", "m": "neither"}
    for url, words in cases.items():
        with pytest.raises(HearthError, match=words):
            importer.look(Source(url=url))
    make_source(tmp_path / "m")
    with pytest.raises(HearthError, match="none of") as refused:
        importer.look(Source(url=str(tmp_path / "m"), dtype="int3"))
    assert refused.value.failure.code is Code.INVALID_REQUEST


def test_snapshots_of_a_hugging_face_cache_are_links_and_can_be_imported(tier: SsdTier, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    contents = make_source(snapshot)
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    assert contents_of(tier, do_import(tier, snapshot)) == contents


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(
    tier: SsdTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_source(tmp_path / "m")
    monkeypatch.setattr(tier, "free_bytes", lambda: 1000)
    with pytest.raises(HearthError, match="has 1000 B free") as refused:
        do_import(tier, tmp_path / "m")
    assert refused.value.failure.code is Code.NO_CAPACITY
    monkeypatch.undo()
    for number, code in ((errno.ENOSPC, Code.NO_CAPACITY), (errno.EIO, Code.CHECKPOINT_UNAVAILABLE)):
        for call in ("posix_fallocate", "pwrite", "fsync"):

            def fail(*_: object, number: int = number) -> None:
                raise OSError(number, os.strerror(number))

            monkeypatch.setattr(os, call, fail)
            with pytest.raises(HearthError) as refused:
                do_import(tier, tmp_path / "m")
            monkeypatch.undo()
            assert refused.value.failure.code is code, call
            assert is_empty(tier)


def test_a_source_that_is_too_large_is_refused_before_anything_is_read(tier: SsdTier, tmp_path: Path) -> None:
    make_source(tmp_path / "m")
    source = Source(url=str(tmp_path / "m"))
    with an_importer(tier, max_checkpoint_bytes=1000) as importer:
        with pytest.raises(HearthError, match="at most 1000") as refused:
            importer.look(source)
        assert refused.value.failure.code is Code.TOO_LARGE
        with pytest.raises(HearthError, match="at most 1000"):
            importer.run(source, progressed=lambda done, total: None)
    assert is_empty(tier)


def test_a_source_that_changes_meanwhile_is_noticed(tier: SsdTier, importer: Importer, tmp_path: Path) -> None:
    make_source(tmp_path / "m")

    def touch(done: int, total: int) -> None:
        os.utime(tmp_path / "m" / "model.safetensors", ns=(done, done))

    with pytest.raises(HearthError, match=r"changed while .* try again") as refused:
        importer.run(Source(url=str(tmp_path / "m")), progressed=touch)
    assert refused.value.failure.code is Code.CHECKPOINT_UNAVAILABLE
    assert is_empty(tier)


def test_a_closed_importer_stops_and_leaves_nothing(tier: SsdTier, importer: Importer, tmp_path: Path) -> None:
    make_source(tmp_path / "m")
    with pytest.raises(HearthError) as refused:
        importer.run(Source(url=str(tmp_path / "m")), progressed=lambda done, total: importer.close())
    assert refused.value.failure.code is Code.DRAINING
    assert is_empty(tier)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("architecture", "tie", "shard_bytes", "dtype"),
    [
        ("llama", False, 0, None),
        ("llama", True, 100_000, None),
        ("llama", False, 100_000, "bfloat16"),
        ("qwen2", True, 0, None),
        ("qwen2", False, 100_000, None),
        ("qwen2", True, 100_000, "float16"),
        ("qwen3", False, 0, None),
        ("opt", True, 0, None),
        ("opt", False, 100_000, "bfloat16"),
        ("gpt2", True, 0, None),
        ("gpt2", False, 100_000, None),
        ("gpt2", True, 100_000, "bfloat16"),
        ("mistral", False, 0, None),
    ],
)
def test_from_pretrained_gives_the_same_model_bit_for_bit(
    tier: SsdTier, tmp_path: Path, architecture: str, tie: bool, shard_bytes: int, dtype: str | None
) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.builders.models import make_model

    source = make_model(tmp_path / "m", architecture, tie=tie, shard_bytes=shard_bytes)
    assert (source / "model.safetensors.index.json").exists() == bool(shard_bytes)
    stored = do_import(tier, source, dtype=dtype).stored
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto")
    ours = AutoModelForCausalLM.from_pretrained(stored.directory)
    assert (ours.get_input_embeddings().weight is ours.get_output_embeddings().weight) == tie
    assert ours.dtype == theirs.dtype
    theirs, ours = theirs.state_dict(), ours.state_dict()
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    assert AutoTokenizer.from_pretrained(stored.directory)("the fire").input_ids
    names = set(open_model(LocalTree(source)).tensors)
    with safe_open(Path(stored.directory, "model.safetensors"), "pt") as file:
        assert set(file.keys()) == names
        assert file.metadata() == {"format": "pt"}
        for name in names & theirs.keys():
            assert torch.equal(file.get_tensor(name), theirs[name]), name


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_cast_gives_what_torch_gives(tier: SsdTier, tmp_path: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tests.builders.models import make_model

    source = make_model(tmp_path / "m", "llama")
    plain, cast = do_import(tier, source), do_import(tier, source, dtype=dtype)
    assert cast.stored.checkpoint.dtype == dtype
    assert (cast.stored.id == plain.stored.id) == (dtype == "float32" and cast.existing)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(cast.stored.directory).state_dict()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype == getattr(torch, dtype)
        assert torch.equal(ours[name], tensor), name
    facts = cast.stored.checkpoint
    assert facts.parameters == plain.stored.checkpoint.parameters
    assert facts.weight_bytes == facts.parameters * getattr(torch, dtype).itemsize


def test_moving_bytes_needs_no_torch(tmp_path: Path) -> None:
    make_source(tmp_path / "m")
    script = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path;"
        "from services.store.tier import SsdTier; from shared.contracts.residency import Source;"
        "from tests.unit.store.sources import an_importer\n"
        f"with an_importer(SsdTier(Path({str(tmp_path / 'store')!r}))) as one:\n"
        f"  print(one.run(Source(url={str(tmp_path / 'm')!r}), progressed=lambda a, b: None).stored.id)\n"
        f"  try: one.look(Source(url={str(tmp_path / 'm')!r}, dtype='bfloat16'))\n"
        "  except Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    id, refusal = done.stdout.splitlines()
    assert len(id) == 32
    assert "needs torch" in refusal


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    make_source(tmp_path / "m")
    tree = LocalTree(tmp_path / "m")
    origin = ConversionOrigin(tree, make_plan(tree, open_model(tree), None, chunk_bytes=CHUNK), chunk_bytes=CHUNK)
    os.truncate(tmp_path / "m" / "model.safetensors", 1000)
    with pytest.raises(HearthError, match="changed while"):
        origin.read(1, memoryview(bytearray(CHUNK)))


def test_a_directory_is_read_exactly_whatever_the_page_cache_holds(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(9_000_001)
    (tmp_path / "model.safetensors").write_bytes(data)
    tree = LocalTree(tmp_path)
    ends = [(0, 9_000_001), (1, 9_000_000), (4096, 5_000_000), (3_999_999, 9_000_001), (8_999_999, 9_000_001), (5, 5)]
    for cached in (False, True):
        for start, end in ends:
            file = os.open(tmp_path / "model.safetensors", os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_WILLNEED if cached else os.POSIX_FADV_DONTNEED)
            os.close(file)
            buffer = bytearray(end - start)
            tree.read("model.safetensors", start, memoryview(buffer))
            assert buffer == data[start:end]
            parts = [bytearray(size) for size in (1, 0, 70_000, 4096) if size <= end - start]
            parts.append(bytearray(end - start - sum(map(len, parts))) if end - start > 80_000 else bytearray())
            tree.read_parts("model.safetensors", start, [memoryview(part) for part in parts])
            assert b"".join(parts) == data[start : start + sum(map(len, parts))]


# -- any chunk, in any order, from any kind of source


class PlainTree:
    """A source without scattered reads, over a network, that counts what is asked of it."""

    remote = True

    def __init__(self, directory: Path) -> None:
        self._tree = LocalTree(directory)
        self.url, self.revision = self._tree.url, self._tree.revision
        self.files: Mapping[str, int] = self._tree.files
        self.reads: list[tuple[str, int, int]] = []

    def read(self, name: str, offset: int, into: memoryview) -> None:
        self.reads.append((name, offset, len(into)))
        self._tree.read(name, offset, into)

    def read_small(self, name: str, limit_bytes: int) -> bytes:
        return self._tree.read_small(name, limit_bytes)

    def close(self) -> None:
        self._tree.close()


def image_of(tree: SourceTree, dtype: str | None, chunk_bytes: int) -> bytes:
    plan = make_plan(tree, open_model(tree), dtype, chunk_bytes=chunk_bytes)
    origin = ConversionOrigin(tree, plan, chunk_bytes=chunk_bytes)
    image = bytearray(plan.image_bytes)
    for index in reversed(range(-(-len(image) // chunk_bytes))):
        origin.read(index, memoryview(image)[index * chunk_bytes : (index + 1) * chunk_bytes])
    return bytes(image)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
def test_every_size_of_chunks_and_kind_of_source_gives_the_same_image(tmp_path: Path, dtype: str | None) -> None:
    tensors: Tensors = {**LLAMA, "half": ("BF16", (33, 7)), "double": ("F64", (9, 3)), "odd": ("I8", (13,))}
    make_source(tmp_path / "m", tensors, shards=3, finite=True)
    images = {image_of(LocalTree(tmp_path / "m"), dtype, 4096 * pages) for pages in (1, 2, 3, 7, 1000)}
    images |= {image_of(PlainTree(tmp_path / "m"), dtype, 4096 * pages) for pages in (1, 3, 1000)}
    assert len(images) == 1


@pytest.mark.torch
def test_elements_across_the_border_of_chunks(tmp_path: Path) -> None:
    make_source(tmp_path / "m", finite=True)
    tree = LocalTree(tmp_path / "m")
    plan = make_plan(tree, open_model(tree), "bfloat16", chunk_bytes=4096)
    whole = bytearray(plan.image_bytes)
    ConversionOrigin(tree, plan, chunk_bytes=plan.image_bytes).read(0, memoryview(whole))
    odd = ConversionOrigin(tree, plan, chunk_bytes=333)  # borders within elements of two bytes
    parts = bytearray(plan.image_bytes)
    for at in range(0, len(parts), 333):
        odd.read(at // 333, memoryview(parts)[at : at + 333])
    assert parts == whole


def test_many_small_tensors_are_read_at_once(tmp_path: Path) -> None:
    experts: Tensors = {
        f"model.layers.0.mlp.experts.{number}.w{part}.weight": ("BF16", (4, 8))
        for number in range(300)
        for part in (1, 2)
    }
    make_source(tmp_path / "m", dict(sorted({**LLAMA, **experts}.items())))
    tree = PlainTree(tmp_path / "m")
    plan = make_plan(tree, open_model(tree), None, chunk_bytes=2**20)
    tree.reads.clear()
    origin = ConversionOrigin(tree, plan, chunk_bytes=2**20)
    origin.read(0, memoryview(bytearray(min(2**20, plan.image_bytes))))
    assert len(tree.reads) == 1


def test_looking_at_a_source_over_a_network_reads_configuration_and_headers_only(tmp_path: Path) -> None:
    tensors: Tensors = {f"model.layers.{number}.big": ("F32", (300, 1000)) for number in range(4)}
    make_source(tmp_path / "m", tensors, shards=4)
    tree = PlainTree(tmp_path / "m")
    make_plan(tree, open_model(tree), None, chunk_bytes=CHUNK, compare=False)
    assert sum(length for _, _, length in tree.reads) < 0.3 * sum(tree.files.values())
    assert {name for name, _, _ in tree.reads} == {name for name in tree.files if name.endswith(".safetensors")}


# -- dtypes


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_of_safetensors_is_kept_as_it_is(tier: SsdTier, tmp_path: Path, dtype: str) -> None:
    contents = make_source(tmp_path / "m", {**LLAMA, "model.layers.0.mlp.scale": (dtype, (4, 24))})
    outcome = do_import(tier, tmp_path / "m")
    assert contents_of(tier, outcome) == contents
    assert manifest_of(tier, outcome).tensors["model.layers.0.mlp.scale"].dtype == dtype


@pytest.mark.torch
def test_fp8_and_integers_are_not_cast_and_open_in_safetensors(tier: SsdTier, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(64, 32),
        "model.layers.0.q.weight": torch.randn(32, 32).to(torch.float8_e4m3fn),
        "model.layers.0.v.weight": torch.randn(32, 32).to(torch.float8_e5m2),
        "model.layers.0.steps": torch.arange(5),
        "model.layers.0.norm": torch.randn(32, dtype=torch.float64),
    }
    make_source(tmp_path / "m")
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    for asked, dtype in ((None, None), ("bfloat16", torch.bfloat16)):
        stored = do_import(tier, tmp_path / "m", dtype=asked).stored
        found = load_file(Path(stored.directory, "model.safetensors"))
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            cast = dtype is not None and tensor.dtype in (torch.float32, torch.float64)
            wanted = tensor.to(dtype) if cast else tensor
            assert found[name].dtype == wanted.dtype
            assert torch.equal(found[name].view(torch.uint8), wanted.view(torch.uint8)), name


# -- sources in Hearth's form


class OnePeer(Fetcher):
    """A fetcher whose one peer gives a manifest and then is gone."""

    known: tuple[Manifest, bytes]

    def find(self, checkpoint_id: str, peers: Sequence[Peer]) -> tuple[Manifest, bytes] | None:
        return self.known if self.known[0].checkpoint.checkpoint_id == checkpoint_id else None


@pytest.fixture
def hearth_form(tier: SsdTier, tmp_path: Path) -> Path:
    """A directory in Hearth's form."""
    make_source(tmp_path / "m")
    return Path(do_import(tier, tmp_path / "m").stored.directory).rename(tmp_path / "exported")


def test_a_source_in_hearths_form_is_fetched_as_it_is(tier: SsdTier, importer: Importer, hearth_form: Path) -> None:
    source = Source(url=str(hearth_form))
    look = importer.look(source)
    opened: list[str] = []
    outcome = importer.run(
        source, opened=lambda stored: opened.append(stored.directory), progressed=lambda done, total: None
    )
    stored = outcome.stored
    assert (look.checkpoint_id, look.arrived_bytes, look.image_bytes) == (stored.id, 0, stored.image_bytes)
    assert opened == [stored.directory]
    assert (stored.source, stored.revision) == (source, look.revision)
    assert sorted(os.listdir(stored.directory)) == sorted(os.listdir(hearth_form))
    for name in os.listdir(hearth_form):
        if name != "hearth.json":
            assert Path(stored.directory, name).read_bytes() == (hearth_form / name).read_bytes()
    assert importer.look(source).arrived_bytes == stored.image_bytes
    assert importer.run(source, progressed=lambda done, total: None).existing
    # It is a model in Hugging Face's form as well.
    with an_importer(tier, fetching=False) as converting:
        assert converting.run(source, progressed=lambda done, total: None).stored.id == stored.id


def test_a_source_in_hearths_form_is_not_cast(tier: SsdTier, hearth_form: Path) -> None:
    with an_importer(tier) as importer:
        with pytest.raises(HearthError, match=r"of dtype float32, .* to cast it to bfloat16") as refused:
            importer.look(Source(url=str(hearth_form), dtype="bfloat16"))
        assert refused.value.failure.code is Code.UNSUPPORTED
        assert importer.look(Source(url=str(hearth_form), dtype="float32")).checkpoint_id


@pytest.mark.parametrize("what", ["id", "chunk", "tied", "tensor", "head", "twice", "architecture"])
def test_a_manifest_that_is_not_that_of_its_files_is_refused(tier: SsdTier, hearth_form: Path, what: str) -> None:
    path = hearth_form / "hearth.json"
    table = json.loads(path.read_bytes())
    match what:
        case "id":
            table["checkpoint"]["checkpoint_id"] = "0" * 32
        case "chunk":
            table["chunks"][1] = "0" * 16
        case "tied":
            table["tied"] = {"x": "model.norm.weight"}
        case "tensor":
            one, other = (table["tensors"][f"model.layers.{n}.self_attn.q_proj.weight"] for n in (0, 1))
            one["offset"], other["offset"] = other["offset"], one["offset"]
            order = sorted(table["tensors"].items(), key=lambda item: item[1]["offset"])
            table["tensors"] = dict(order)
        case "head":
            weights = hearth_form / "model.safetensors"
            data = weights.read_bytes()
            weights.write_bytes(data.replace(b'"format":"pt"', b'"format":"tf"', 1))
        case "architecture":
            table["checkpoint"]["architecture"] = "OtherForCausalLM"
    text = json.dumps(table)
    path.write_text(text.replace('"chunk_bytes"', '"chunk_bytes": 4096, "chunk_bytes"', 1) if what == "twice" else text)
    with an_importer(tier) as importer:
        for call in (importer.look, lambda source: do_import(tier, Path(source.url))):
            with pytest.raises(HearthError) as refused:
                call(Source(url=str(hearth_form)))
            assert refused.value.failure.code is Code.CHECKPOINT_CORRUPT
    assert is_empty(tier)


def test_peers_are_asked_first_and_the_source_when_they_are_gone(tier: SsdTier, hearth_form: Path) -> None:
    data = (hearth_form / "hearth.json").read_bytes()
    net = Mover(None, threads=1, name="net")
    fetcher, peers = OnePeer(tier, net, own_id="here"), [Peer("one", "http://one", whole=True)]
    fetcher.known = (decode_stored(data), data)
    id = fetcher.known[0].checkpoint.checkpoint_id
    with an_importer(tier, fetcher=fetcher) as importer:
        assert importer.look(Source(url="/nowhere"), id, peers).checkpoint_id == id
        with pytest.raises(HearthError, match="does not exist"):
            importer.look(Source(url="/nowhere"), "f" * 32, peers)
        with pytest.raises(HearthError, match=f"No peer has checkpoint {'f' * 32}"):
            importer.look(Source(url=f"peer:{'f' * 32}"), "f" * 32, peers)
        source = Source(url=str(hearth_form))
        outcome = importer.run(source, checkpoint_id=id, peers=lambda: peers, progressed=lambda done, total: None)
        assert (outcome.stored.id, outcome.peer_bytes) == (id, 0)
    net.close()


# -- repair


@pytest.mark.parametrize("form", ["hugging face", "hearth", "changed", "gone"])
def test_a_chunk_is_made_again_from_the_source_if_that_is_what_it_was(
    tier: SsdTier, tmp_path: Path, hearth_form: Path, form: str
) -> None:
    stored = do_import(tier, tmp_path / "m").stored
    manifest = tier.manifest(Path(stored.directory))
    if form == "hearth":
        manifest = msgspec.structs.replace(manifest, source=Source(url=str(hearth_form)))
    elif form == "changed":
        os.utime(tmp_path / "m" / "model.safetensors", ns=(1, 1))
    elif form == "gone":
        (tmp_path / "m").rename(tmp_path / "n")
    image = Path(stored.directory, "model.safetensors").read_bytes().ljust(manifest.image_bytes(), b"\0")
    with an_importer(tier) as importer:
        repair = importer.repairer(manifest)
        for index in range(len(manifest.chunks)):
            wanted = image[index * CHUNK : (index + 1) * CHUNK]
            buffer = bytearray(b"?" * len(wanted))
            if form == "gone":
                with pytest.raises(HearthError, match="does not exist"):
                    repair(index, memoryview(buffer))
            else:
                assert repair(index, memoryview(buffer)) == (form != "changed")
                assert (bytes(buffer) == wanted) == (form != "changed")


# -- memory


@pytest.mark.slow
def test_a_large_import_needs_little_memory(tmp_path: Path) -> None:
    """One tensor of 1.5 GB: what stays resident is a chunk per thread and no more."""
    header = json.dumps(
        {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [750_000, 1000], "data_offsets": [0, 1_500_000_000]}}
    )
    make_source(tmp_path / "m")
    with (tmp_path / "m" / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        file.truncate(8 + len(header) + 1_500_000_000)
    script = (
        "import resource; from pathlib import Path; from services.store.tier import SsdTier;"
        "from shared.contracts.residency import Source; from tests.unit.store.sources import an_importer\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"with an_importer(SsdTier(Path({str(tmp_path / 'store')!r})), chunk_bytes=2**24, threads=4) as one:\n"
        f"  one.run(Source(url={str(tmp_path / 'm')!r}), progressed=lambda a, b: None)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 160 * 1024  # KiB: four chunks of 16 MiB, and what modules take
