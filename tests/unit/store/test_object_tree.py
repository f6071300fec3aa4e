"""Object stores and web servers as sources, and as targets of exports, against a server on loopback that fails."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from services.store import object_tree
from services.store.object_tree import PIECE_BYTES, ObjectTree
from services.store.object_writer import PART_BYTES, ObjectWriter
from services.store.objects import open_directory_store, open_store
from services.store.remote_config import ObjectOptions, RemoteConfig, decode_remote_config, read_remote_config
from shared.errors import Code, HearthError
from tests.builders.s3 import ACCESS_KEY, SECRET_KEY, Fault, S3Server
from tests.unit.store.sources import make_source

MIB = 2**20
SIZE = 4 * MIB + 4321
CONTENT = random.Random(1).randbytes(SIZE)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server) -> Path:
    """The directory behind s3://models, with one file in one directory; nothing goes wrong yet."""
    s3.control(faults=[], forget=True, authorization=True)
    directory = s3.bucket()
    (directory / "llama" / "deeper").mkdir(parents=True, exist_ok=True)
    (directory / "llama" / "deeper" / "more").write_bytes(b"not directly in it")
    (directory / "llama" / "model.safetensors").write_bytes(CONTENT)
    (directory / "llama" / "config.json").write_text("{}")
    return directory


def options(s3: S3Server, **more: object) -> ObjectOptions:
    table = s3.options | more
    return decode_remote_config(json.dumps({"s3://models": table}).encode()).options("s3://models/llama")


def tree(s3: S3Server, **more: object) -> ObjectTree:
    return ObjectTree("s3://models/llama", options(s3, **more))


def web_tree(s3: S3Server, path: str = "models/llama") -> ObjectTree:
    s3.control(authorization=False)  # web servers know nothing of S3's signatures
    return ObjectTree(f"{s3.endpoint}/{path}", ObjectOptions(client={"allow_http": True}))


def read(source: ObjectTree, name: str = "model.safetensors", offset: int = 0, length: int = SIZE) -> bytes:
    data = bytearray(length)
    source.read(name, offset, memoryview(data))
    return bytes(data)


def refusal(source: ObjectTree, name: str = "model.safetensors", offset: int = 0, length: int = SIZE) -> HearthError:
    with pytest.raises(HearthError) as refused:
        read(source, name, offset, length)
    return refused.value


def test_files_that_lie_directly_in_it(s3: S3Server, bucket: Path) -> None:
    source = tree(s3)
    assert dict(source.files) == {"config.json": 2, "model.safetensors": SIZE}
    assert (source.url, source.remote) == ("s3://models/llama", True)
    assert source.read_small("config.json", 2) == b"{}"
    assert read(source) == CONTENT
    assert read(source, offset=1234, length=99) == CONTENT[1234:1333]
    assert read(source, offset=SIZE, length=0) == b""


def test_many_objects_are_listed_page_by_page(s3: S3Server, bucket: Path) -> None:
    (bucket / "many").mkdir(exist_ok=True)
    for number in range(1203):
        (bucket / "many" / f"f{number:04}").write_bytes(b"x" * (number % 7))
    found = ObjectTree("s3://models/many", options(s3)).files
    assert len(found) == 1203
    assert found["f1202"] == 1202 % 7
    assert len(s3.served("GET", "")) >= 2


def test_a_listing_is_ended_when_it_is_too_long(s3: S3Server, bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_tree, "MOST_FILES", 1500)
    for number in range(2600):
        (bucket / "long" / f"d{number % 3}").mkdir(parents=True, exist_ok=True)
        (bucket / "long" / f"d{number % 3}" / f"f{number:04}").write_bytes(b"")
    with pytest.raises(HearthError, match=r"s3://models/long has more than 1500 files in it and below it\.") as refused:
        ObjectTree("s3://models/long", options(s3))
    assert refused.value.failure.code is Code.TOO_LARGE
    assert len(s3.served("GET", "")) == 2, "not the third page"


def test_the_revision_names_the_content(s3: S3Server, bucket: Path) -> None:
    first = tree(s3).revision
    assert tree(s3).revision == first
    (bucket / "llama" / "deeper" / "more").write_bytes(b"changed, but not directly in it")
    assert tree(s3).revision == first
    (bucket / "llama" / "config.json").write_text("[]")
    assert tree(s3).revision != first


def test_ranges_come_in_parallel_but_never_more_than_connections(s3: S3Server, bucket: Path) -> None:
    source = ObjectTree("s3://models/llama", options(s3), connections=3)
    s3.fail(Fault("slow", times=-1, key="model.safetensors", bytes_per_s=8 * MIB))
    data = bytearray(SIZE)
    view = memoryview(data)
    step = SIZE // 12 + 1

    def fetch(at: int) -> None:
        source.read("model.safetensors", at, view[at : at + step])

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(fetch, range(0, SIZE, step)))
    assert bytes(data) == CONTENT
    # An answer may be over for its reader a moment before its server knows; without a limit there would be 12.
    assert 2 <= s3.control()["most_open"] <= 6


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.999])
@pytest.mark.parametrize("web", [False, True])
def test_a_cut_connection_costs_only_what_was_in_flight(s3: S3Server, bucket: Path, fraction: float, web: bool) -> None:
    source = web_tree(s3) if web else tree(s3)
    s3.fail(Fault("cut", key="model.safetensors", fraction=fraction))
    assert read(source) == CONTENT
    ranges = list(s3.ranges("model.safetensors"))
    assert len(ranges) == 2, "one connection that was cut, one for the rest"
    assert ranges[1][0] >= int(fraction * SIZE) - 1, "what had arrived is not asked for again"
    assert s3.sent_bytes("model.safetensors") <= SIZE + 64 * 1024


def test_connections_that_are_cut_again_and_again_still_bring_everything_once(s3: S3Server, bucket: Path) -> None:
    source = tree(s3)
    s3.fail(Fault("cut", times=12, key="model.safetensors", fraction=0.5))
    assert read(source) == CONTENT
    assert s3.sent_bytes("model.safetensors") <= SIZE + 13 * (PIECE_BYTES + 64 * 1024)


def test_a_server_that_never_finishes_ends_in_a_clear_error(s3: S3Server, bucket: Path) -> None:
    source = tree(s3)
    s3.fail(Fault("cut", times=-1, key="model.safetensors", after_bytes=1))
    failure = refusal(source).failure
    assert failure.code is Code.CHECKPOINT_UNAVAILABLE
    assert "s3://models/llama/model.safetensors" in failure.message and "cut" in failure.message
    assert len(s3.served("GET", "model.safetensors")) < 50, "tries are bounded"


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_server_with_a_moment_of_weakness_is_asked_again(s3: S3Server, bucket: Path, status: int) -> None:
    source = tree(s3)
    s3.fail(Fault("status", times=2, key="model.safetensors", status=status))
    assert read(source, length=1000) == CONTENT[:1000]


def test_a_server_that_stays_weak_ends_in_a_clear_error(s3: S3Server, bucket: Path) -> None:
    source = tree(s3)
    s3.fail(Fault("status", times=-1, key="model.safetensors", status=503))
    failure = refusal(source, length=10).failure
    assert (failure.code, failure.message) == (
        Code.CHECKPOINT_UNAVAILABLE,
        "s3://models/llama/model.safetensors cannot be used now: its server answered 503.",
    )


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (Fault("whole", times=-1), Code.INVALID_CHECKPOINT, "does not serve ranges"),
        (Fault("status", times=-1, status=403), Code.FORBIDDEN, "credentials do not allow"),
        (Fault("status", times=-1, status=401), Code.UNAUTHENTICATED, "asks for credentials"),
        (Fault("status", times=-1, status=404), Code.NOT_FOUND, "is not there"),
        (Fault("status", times=-1, status=416), Code.INVALID_CHECKPOINT, "shorter than it was"),
        (Fault("status", times=-1, status=400), Code.CHECKPOINT_UNAVAILABLE, "answered 400"),
        (Fault("change"), Code.CHECKPOINT_UNAVAILABLE, "changed while it was read"),
    ],
)
def test_what_a_server_refuses_is_one_clear_sentence(
    s3: S3Server, bucket: Path, fault: Fault, code: Code, words: str
) -> None:
    source = tree(s3)
    fault.key = "model.safetensors"
    s3.fail(fault)
    error = refusal(source, offset=10, length=1000)
    message = error.failure.message
    assert error.failure.code is code
    assert words in message and message.startswith("s3://models/llama/model.safetensors") and message.endswith(".")
    assert "\n" not in message and "Debug" not in message and "127.0.0.1" not in message
    assert ACCESS_KEY not in message and SECRET_KEY not in message
    assert error.__cause__ is None, "the library's text, which holds signed urls, goes nowhere"


@pytest.mark.parametrize("conditional", [True, False])
def test_an_object_that_changes_between_two_ranges_is_never_mixed(
    s3: S3Server, bucket: Path, conditional: bool
) -> None:
    source = tree(s3)
    assert read(source, length=MIB) == CONTENT[:MIB]
    faults = [Fault("change", key="model.safetensors")]
    if not conditional:
        faults.append(Fault("unconditional", times=-1, key="model.safetensors"))
    s3.fail(*faults)
    failure = refusal(source, offset=MIB, length=MIB).failure
    assert (failure.code, "changed" in failure.message) == (Code.CHECKPOINT_UNAVAILABLE, True)
    assert s3.sent_bytes("model.safetensors") <= MIB


@pytest.mark.parametrize("conditional", [True, False])
def test_an_object_that_changes_while_a_cut_range_is_resumed_is_never_mixed(
    s3: S3Server, bucket: Path, conditional: bool
) -> None:
    source = tree(s3)
    faults = [Fault("cut", key="safetensors", fraction=0.3), Fault("change", key="safetensors", skip=1)]
    if not conditional:
        faults.append(Fault("unconditional", times=-1, key="safetensors"))
    s3.fail(*faults)
    failure = refusal(source).failure
    assert (failure.code, "changed" in failure.message) == (Code.CHECKPOINT_UNAVAILABLE, True)
    assert len(s3.served("GET", "safetensors")) >= 2


def test_a_silent_server_is_given_up_on_and_asked_again(s3: S3Server, bucket: Path) -> None:
    source = tree(s3, client_options={"allow_http": True, "read_timeout": "1s"})
    s3.fail(Fault("stall", key="model.safetensors", after_bytes=MIB, seconds=30))
    assert read(source) == CONTENT
    assert len(s3.served("GET", "model.safetensors")) >= 2


def test_closing_ends_what_runs(s3: S3Server, bucket: Path) -> None:
    source = tree(s3)
    s3.fail(Fault("slow", times=-1, key="model.safetensors", bytes_per_s=8 * MIB))
    failed: list[HearthError] = []

    def fetch() -> None:
        failed.append(refusal(source))

    thread = threading.Thread(target=fetch)
    thread.start()
    while not s3.served("GET", "model.safetensors"):
        time.sleep(0.01)
    source.close()
    thread.join(20)
    assert [error.failure.code for error in failed] == [Code.DRAINING]
    assert refusal(source, length=1).failure.code is Code.DRAINING


def test_bounds(s3: S3Server, bucket: Path) -> None:
    source = tree(s3)
    assert refusal(source, offset=SIZE - 5, length=10).failure.code is Code.INVALID_CHECKPOINT
    assert refusal(source, offset=-1, length=10).failure.code is Code.INVALID_CHECKPOINT
    assert refusal(source, name="nothing", length=1).failure.code is Code.NOT_FOUND
    assert refusal(source, name="../other/x", length=1).failure.code is Code.NOT_FOUND
    with pytest.raises(HearthError) as refused:
        source.read_small("model.safetensors", SIZE - 1)
    assert refused.value.failure.code is Code.TOO_LARGE
    assert s3.served("GET", "model.safetensors") == []


def test_without_credentials_or_files_there_is_no_tree(s3: S3Server, bucket: Path) -> None:
    with pytest.raises(HearthError, match="has no files") as refused:
        ObjectTree("s3://models/empty", options(s3))
    assert refused.value.failure.code is Code.NOT_FOUND
    with pytest.raises(HearthError, match="is not there") as refused:
        ObjectTree("s3://nobucket/a", options(s3))
    assert refused.value.failure.code is Code.NOT_FOUND
    with pytest.raises(HearthError, match="do not allow") as refused:
        ObjectTree("s3://models/llama", options(s3, skip_signature=True))
    assert refused.value.failure.code is Code.FORBIDDEN
    with pytest.raises(HearthError, match="cannot be reached") as refused:
        ObjectTree("s3://models/llama", options(s3, endpoint="http://127.0.0.1:1"))
    assert refused.value.failure.code is Code.CHECKPOINT_UNAVAILABLE
    with pytest.raises(HearthError, match=r"not encrypted; allow it in HEARTH_REMOTE_CONFIG") as refused:
        ObjectTree("s3://models/llama", options(s3, client_options={}))
    assert refused.value.failure.code is Code.FORBIDDEN
    with pytest.raises(HearthError, match="there is no option 'secret_access_kee'") as refused:
        ObjectTree("s3://models/llama", options(s3, secret_access_kee=SECRET_KEY))
    assert SECRET_KEY not in refused.value.failure.message


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_other_object_stores(s3: S3Server, bucket: Path, tmp_path: Path, scheme: str) -> None:
    table = s3.google_options if scheme == "gs" else s3.azure_options
    config = decode_remote_config(json.dumps({f"{scheme}://": table}).encode())
    source = ObjectTree(f"{scheme}://models/llama", config.options(f"{scheme}://models/llama"))
    assert dict(source.files) == {"config.json": 2, "model.safetensors": SIZE}
    s3.fail(Fault("cut", key="safetensors", fraction=0.5), Fault("status", key="safetensors"))
    assert read(source) == CONTENT
    assert s3.sent_bytes("safetensors") <= SIZE + 64 * 1024
    s3.fail(Fault("change", key="safetensors"))
    assert "changed" in refusal(source, offset=5, length=10).failure.message
    url = f"{scheme}://models/out-{scheme}"
    writer = ObjectWriter(url, open_store(url, config.options(url), connections=4, uploading=True))
    writer.put("weights", bytes(PART_BYTES) + CONTENT)
    writer.put("hearth.json", b"{}")
    writer.finish()
    home = bucket / f"out-{scheme}"
    assert (home / "weights").read_bytes() == bytes(PART_BYTES) + CONTENT
    assert sorted(os.listdir(home)) == ["hearth.json", "weights"]
    with pytest.raises(HearthError) as refused:
        ObjectTree(f"{scheme}://nobucket/a", config.options(f"{scheme}://nobucket/a"))
    assert refused.value.failure.code is Code.NOT_FOUND


# --------------------------------------------------------------------------------------------------------- web servers


@pytest.mark.parametrize("shards", [1, 3])
def test_a_web_server_is_asked_for_what_a_checkpoint_can_consist_of(s3: S3Server, bucket: Path, shards: int) -> None:
    make_source(bucket / f"web{shards}", shards=shards)
    source = web_tree(s3, f"models/web{shards}")
    local = {path.name: path.stat().st_size for path in (bucket / f"web{shards}").iterdir()}
    assert dict(source.files) == local
    assert (
        read(source, "config.json", 0, local["config.json"]) == (bucket / f"web{shards}" / "config.json").read_bytes()
    )
    first = source.revision
    assert web_tree(s3, f"models/web{shards}").revision == first


def test_a_web_server_with_a_stored_checkpoint_is_asked_for_the_files_of_its_manifest(
    s3: S3Server, bucket: Path
) -> None:
    home = bucket / "stored"
    home.mkdir(exist_ok=True)
    manifest = {
        "format_version": 1,
        "checkpoint": {
            "checkpoint_id": "c", "architecture": "A", "weight_bytes": 1, "parameters": 1, "dtype": "F32",
            "max_context_tokens": 1, "kv_bytes_per_token": 1, "vocab_tokens": 1, "has_chat_template": False,
        },
        "chunk_bytes": 4096, "tensors": {}, "chunks": [], "config_digest": "",
        "files": [{"name": "weights-a.safetensors", "bytes": 3}, {"name": "../../secret", "bytes": 3}],
        "small_files": {"config.json": "", "odd name.txt": ""},
    }  # fmt: skip
    (home / "hearth.json").write_text(json.dumps(manifest))
    for name in ("weights-a.safetensors", "config.json", "odd name.txt", "unknown"):
        (home / name).write_bytes(b"abc")
    source = web_tree(s3, "models/stored")
    assert set(source.files) == {"hearth.json", "weights-a.safetensors", "config.json", "odd name.txt"}
    assert read(source, "odd name.txt", 1, 2) == b"bc"
    (home / "hearth.json").write_text("{}")
    assert set(web_tree(s3, "models/stored").files) == {"hearth.json", "config.json"}, "its reader refuses it"


def test_what_a_web_server_does_not_have(s3: S3Server, bucket: Path) -> None:
    with pytest.raises(HearthError, match=r"neither hearth\.json nor config\.json") as refused:
        web_tree(s3, "models/nothing")
    assert refused.value.failure.code is Code.NOT_FOUND
    make_source(bucket / "web404")
    s3.fail(Fault("status", times=-1, key="special_tokens_map", status=403))
    assert "special_tokens_map.json" not in web_tree(s3, "models/web404").files
    s3.fail(Fault("status", times=-1, key="config.json", status=403))
    with pytest.raises(HearthError) as refused:
        web_tree(s3, "models/web404")
    assert refused.value.failure.code is Code.FORBIDDEN
    with pytest.raises(HearthError, match="not encrypted") as refused:
        ObjectTree(f"{s3.endpoint}/models/web404")
    assert refused.value.failure.code is Code.FORBIDDEN
    with pytest.raises(HearthError, match="there is no option 'region'"):
        ObjectTree(f"{s3.endpoint}/models/web404", ObjectOptions({"region": "x"}, {"allow_http": True}))


# ------------------------------------------------------------------------------------------------------- configuration


def test_options_belong_to_the_longest_beginning_of_a_url() -> None:
    config = decode_remote_config(
        b'{"s3://": {"region": "a"}, "s3://models/": {"region": "b"}, "s3://models/x": {"region": "c"},'
        b' "https://Host:443/a": {"client_options": {"default_headers": {"Authorization": "Bearer s3cr3t"}}}}'
    )
    assert config.options("s3://other/x").store == {"region": "a"}
    assert config.options("s3://models/y").store == {"region": "b"}
    assert config.options("s3://models/x/y").store == {"region": "c"}
    assert config.options("s3://models/xy").store == {"region": "b"}
    assert config.options("gs://models/x").store == {}
    assert config.options("https://host/a/b").client["default_headers"] == {"Authorization": "Bearer s3cr3t"}
    assert config.options("https://host/ab").client == {}
    assert "s3cr3t" not in repr(config) and "s3cr3t" not in repr(config.options("https://host/a"))


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"s3://b": "s3cr3t"}', '{"s3://b": {"a": ["s3cr3t"]}}', '{"s3://b": {"a": {"b": "s3cr3t"}}}',
     '{"s3://b": {"client_options": "s3cr3t"}}', '{"/models": {}}', '{"s3://u:s3cr3t@b": {}}',
     '{"s3://b": {"endpoint": "s3cr3t"}}', '{"hf:a": {}}', "{"],
)  # fmt: skip
def test_a_malformed_file_of_options_is_refused_without_being_quoted(text: str, tmp_path: Path) -> None:
    (tmp_path / "remote.json").write_text(text)
    with pytest.raises(HearthError, match="HEARTH_REMOTE_CONFIG") as refused:
        read_remote_config(str(tmp_path / "remote.json"))
    assert refused.value.failure.code is Code.INVALID_REQUEST
    assert "s3cr3t" not in refused.value.failure.message


def test_the_file_of_options_may_be_missing_only_when_none_is_named(tmp_path: Path) -> None:
    assert read_remote_config("") == RemoteConfig()
    with pytest.raises(HearthError, match="cannot be read"):
        read_remote_config(str(tmp_path / "nothing.json"))


def test_credentials_come_from_the_environment_as_obstore_reads_it(
    s3: S3Server, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_ENDPOINT_URL": s3.endpoint,
        "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    source = ObjectTree("s3://models/llama")
    assert read(source, length=10) == CONTENT[:10]
    assert all(one.authorized for one in s3.served("GET", ""))


# -------------------------------------------------------------------------------------------------------------- exports


def test_an_export_is_a_checkpoint_only_when_it_is_finished(s3: S3Server, bucket: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(os.urandom(1000) * (PART_BYTES * 2 // 1000 + 1))
    moved: list[int] = []
    store = open_store("s3://models/out", options(s3), connections=4, uploading=True)
    (bucket / "out").mkdir(exist_ok=True)
    (bucket / "out" / "hearth.json").write_text("of an earlier export")
    writer = ObjectWriter("s3://models/out", store, progressed=moved.append)
    assert not (bucket / "out" / "hearth.json").exists(), "its files are about to change"
    writer.put("hearth.json", b"manifest")
    writer.put("model.safetensors", large)
    writer.put("config.json", b"{}")
    assert sorted(os.listdir(bucket / "out")) == ["config.json", "model.safetensors"]
    writer.finish()
    assert (bucket / "out" / "model.safetensors").read_bytes() == large.read_bytes()
    assert (bucket / "out" / "hearth.json").read_bytes() == b"manifest"
    assert sum(moved) == large.stat().st_size + len(b"{}") + len(b"manifest")
    assert len(s3.served("PUT", "model.safetensors")) == 3, "in parts"
    assert dict(ObjectTree("s3://models/out", options(s3)).files)["model.safetensors"] == large.stat().st_size


def test_an_export_into_a_directory(tmp_path: Path) -> None:
    store = open_directory_store(str(tmp_path / "a" / "b"))
    large = os.urandom(PART_BYTES + 10)
    writer = ObjectWriter(str(tmp_path / "a" / "b"), store, directory=tmp_path / "a" / "b")
    writer.put("model.safetensors", large)
    writer.put("hearth.json", b"{}")
    assert os.listdir(tmp_path / "a" / "b") == ["model.safetensors"]
    writer.finish()
    assert (tmp_path / "a" / "b" / "model.safetensors").read_bytes() == large
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["hearth.json", "model.safetensors"]


def test_an_export_that_is_closed_or_refused_leaves_no_checkpoint(s3: S3Server, bucket: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(PART_BYTES * 3))
    store = open_store("s3://models/half", options(s3), connections=4, uploading=True)
    writer: ObjectWriter
    writer = ObjectWriter("s3://models/half", store, progressed=lambda moved: writer.close())
    writer.put("hearth.json", b"{}")
    with pytest.raises(HearthError) as refused:
        writer.put("model.safetensors", large)
    assert refused.value.failure.code is Code.DRAINING
    assert not (bucket / "half" / "model.safetensors").exists()
    assert not (bucket / "half" / "hearth.json").exists()
    s3.fail(Fault("status", times=-1, key="PUT", status=403))
    writer = ObjectWriter("s3://models/half", store)
    with pytest.raises(HearthError, match="do not allow") as refused:
        writer.put("model.safetensors", b"abc")
    assert refused.value.failure.code is Code.FORBIDDEN
    with pytest.raises(HearthError) as refused:
        ObjectWriter("memory", MemoryStore()).finish()
    assert refused.value.failure.code is Code.INTERNAL


def test_pieces_are_small_enough_to_stop_between_them() -> None:
    assert PIECE_BYTES <= PART_BYTES
