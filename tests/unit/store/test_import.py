"""Import: what comes out is the same model in Hearth's layout; what cannot be imported leaves nothing."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from services.store import convert
from services.store.importer import Importer, Outcome
from services.store.local import open_local
from services.store.remote import Hub
from services.store.tier import SsdTier
from shared.contracts.manifest import Manifest, padded_bytes
from shared.contracts.residency import Source
from shared.errors import Code, HearthError
from tests.unit.store.sources import CONFIG, LLAMA, Tensors, make_source, safetensors

CHUNK = 8192


@pytest.fixture
def tier(tmp_path: Path) -> SsdTier:
    return SsdTier(tmp_path / "store")


def importer(tier: SsdTier) -> Importer:
    return Importer(tier, Hub("http://127.0.0.1:9"), chunk_bytes=CHUNK)


def do_import(tier: SsdTier, directory: Path, **source: Any) -> Outcome:
    return importer(tier).run(Source(url=str(directory), **source), progressed=lambda done, total: None)


def manifest_of(tier: SsdTier, outcome: Outcome) -> Manifest:
    return tier.manifest(Path(outcome.stored.directory))


def contents_of(tier: SsdTier, outcome: Outcome) -> dict[str, bytes]:
    manifest = manifest_of(tier, outcome)
    files = [Path(outcome.stored.directory, file.name).read_bytes() for file in manifest.files]
    return {name: files[t.file][t.offset : t.offset + t.bytes] for name, t in manifest.tensors.items()}


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_arrives_unchanged_and_every_chunk_has_its_checksum(
    tier: SsdTier, tmp_path: Path, shards: int
) -> None:
    tensors: Tensors = {**LLAMA, "odd": ("I8", (13,)), "empty": ("F32", (0, 4))}
    contents = make_source(tmp_path / "m", tensors, shards=shards)
    progress: list[tuple[int, int]] = []
    outcome = importer(tier).run(Source(url=str(tmp_path / "m")), progressed=lambda *at: progress.append(at))
    assert contents_of(tier, outcome) == contents
    manifest = manifest_of(tier, outcome)
    data = Path(outcome.stored.directory, "model.safetensors").read_bytes()
    image = data.ljust(padded_bytes(len(data)), b"\0")
    assert len(image) == manifest.image_bytes() == outcome.stored.image_bytes
    assert list(manifest.chunks) == [
        xxhash.xxh3_64_hexdigest(image[at : at + CHUNK]) for at in range(0, len(image), CHUNK)
    ]
    assert progress[-1] == (len(data), len(data))
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    names = list(manifest.tensors)
    assert names.index("model.embed_tokens.weight") < names.index("model.layers.10.self_attn.q_proj.weight")
    assert names[-1] == "odd"
    facts = outcome.stored.checkpoint
    assert (facts.architecture, facts.dtype, facts.max_context_tokens) == ("LlamaForCausalLM", "float32", 128)
    assert facts.weight_bytes == sum(map(len, contents.values()))
    assert facts.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert not facts.has_chat_template


def test_what_is_stored_takes_no_more_than_was_announced(tier: SsdTier, tmp_path: Path) -> None:
    make_source(tmp_path / "m")
    look = importer(tier).look(Source(url=str(tmp_path / "m")))
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
def test_refusals(tier: SsdTier, tmp_path: Path, damage: Callable[[Path], None], code: Code, words: str) -> None:
    make_source(tmp_path / "m")
    damage(tmp_path / "m")
    for call in (importer(tier).look, lambda source: do_import(tier, Path(source.url))):
        with pytest.raises(HearthError, match=words) as refused:
            call(Source(url=str(tmp_path / "m")))
        assert refused.value.failure.code is code
    assert os.listdir(tier.checkpoints) == os.listdir(tier.root / "incoming") == []


def test_paths_that_no_filesystem_takes_are_clear_errors(tier: SsdTier) -> None:
    for url in ("/" + "x" * 5000, "/x\0y", "/" + "x/" * 5000):
        with pytest.raises(HearthError) as refused:
            importer(tier).look(Source(url=url))
        assert refused.value.failure.code in (Code.INVALID_CHECKPOINT, Code.CHECKPOINT_UNAVAILABLE)


def test_missing_directory_file_and_relative_path_are_refused(tier: SsdTier, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cases = {str(tmp_path / "none"): "does not exist", str(tmp_path / "file"): "not a directory", "m": "neither"}
    for url, words in cases.items():
        with pytest.raises(HearthError, match=words):
            importer(tier).look(Source(url=url))
    make_source(tmp_path / "m")
    with pytest.raises(HearthError, match="none of") as refused:
        importer(tier).look(Source(url=str(tmp_path / "m"), dtype="int3"))
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
    with pytest.raises(HearthError, match="has 1000 free") as refused:
        do_import(tier, tmp_path / "m")
    assert refused.value.failure.code is Code.NO_CAPACITY

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr(convert.os, "posix_fallocate", full)
    with pytest.raises(HearthError, match="disk is full") as refused:
        do_import(tier, tmp_path / "m")
    assert refused.value.failure.code is Code.NO_CAPACITY
    assert os.listdir(tier.checkpoints) == os.listdir(tier.root / "incoming") == []


def test_a_source_that_changes_meanwhile_is_noticed(tier: SsdTier, tmp_path: Path) -> None:
    make_source(tmp_path / "m")

    def touch(done: int, total: int) -> None:
        os.utime(tmp_path / "m" / "model.safetensors", ns=(done, done))

    with pytest.raises(HearthError, match="changed while"):
        importer(tier).run(Source(url=str(tmp_path / "m")), progressed=touch)
    assert os.listdir(tier.checkpoints) == []


def test_a_closed_importer_stops_and_leaves_nothing(tier: SsdTier, tmp_path: Path) -> None:
    make_source(tmp_path / "m")
    one = importer(tier)
    with pytest.raises(HearthError) as refused:
        one.run(Source(url=str(tmp_path / "m")), progressed=lambda done, total: one.close())
    assert refused.value.failure.code is Code.DRAINING
    assert os.listdir(tier.checkpoints) == os.listdir(tier.root / "incoming") == []


def test_a_hub_that_cannot_be_reached_is_a_clear_error(tier: SsdTier) -> None:
    with pytest.raises(HearthError, match="hub cannot be reached for org/name") as refused:
        importer(tier).look(Source(url="hf:org/name"))
    assert refused.value.failure.code is Code.CHECKPOINT_UNAVAILABLE
    for url in ("hf:", "hf:../x", "hf:a/b/c", "hf:a b"):
        with pytest.raises(HearthError) as refused:
            importer(tier).look(Source(url=url))
        assert refused.value.failure.code is Code.INVALID_REQUEST


@pytest.mark.torch
@pytest.mark.parametrize(
    ("architecture", "tie"),
    [
        ("llama", False),
        ("llama", True),
        ("qwen2", True),
        ("qwen3", False),
        ("opt", True),
        ("gpt2", True),
        ("mistral", False),
    ],
)
def test_from_pretrained_gives_the_same_model_bit_for_bit(
    tier: SsdTier, tmp_path: Path, architecture: str, tie: bool
) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.builders.models import make_model

    source = make_model(tmp_path / "m", architecture, tie=tie)
    stored = do_import(tier, source).stored
    theirs = AutoModelForCausalLM.from_pretrained(source).state_dict()
    ours = AutoModelForCausalLM.from_pretrained(stored.directory).state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert AutoTokenizer.from_pretrained(stored.directory)("the fire").input_ids
    with safe_open(Path(stored.directory, "model.safetensors"), "pt") as file:
        assert set(file.keys()) == set(open_local(source).tensors)


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
    import subprocess
    import sys

    make_source(tmp_path / "m")
    script = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path; from services.store.main import main;"
        "from services.store.importer import Importer; from services.store.tier import SsdTier;"
        "from shared.contracts.residency import Source;"
        f"one = Importer(SsdTier(Path({str(tmp_path / 'store')!r})), None, chunk_bytes=8192);"
        f"print(one.run(Source(url={str(tmp_path / 'm')!r}), progressed=lambda a, b: None).stored.id)\n"
        f"try: one.look(Source(url={str(tmp_path / 'm')!r}, dtype='bfloat16'))\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    id, refusal = done.stdout.splitlines()
    assert len(id) == 32
    assert "needs torch" in refusal


def test_pieces_of_a_file_that_becomes_shorter(tmp_path: Path) -> None:
    make_source(tmp_path / "m")
    source = open_local(tmp_path / "m")
    plan = convert.make_plan(source, None, chunk_bytes=CHUNK)
    os.truncate(tmp_path / "m" / "model.safetensors", 1000)
    (tmp_path / "out").mkdir()
    with pytest.raises(HearthError, match="truncated"):
        convert.run_import(
            source,
            plan,
            tmp_path / "out",
            asked=Source(url="x"),
            revision="",
            chunk_bytes=CHUNK,
            progressed=lambda done, total: None,
            stop=threading.Event(),
        )
