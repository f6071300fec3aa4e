"""The choice of threads and blocks: cheapest of the fastest, measured once per disk, never a reason not to start."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store import bench, tuning
from services.store.tuning import (
    ALIKE,
    DEFAULT,
    NEAR,
    TUNING_NAME,
    VERSION,
    Setting,
    Tuning,
    choose,
    filesystem_of,
    measure,
    noise,
    temporary_sample,
    tune,
)
from shared.contracts.manifest import PAGE_BYTES
from shared.errors import HearthError

CHUNK = 4 * PAGE_BYTES


def setting(threads: int, block: int, rate: float, cpu: float) -> Setting:
    return Setting(threads=threads, block_bytes=block, gb_per_s=rate, cpu_s_per_gb=cpu)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store's directory without checkpoints; small files are large enough."""
    monkeypatch.setattr(tuning, "SAMPLE_BYTES", 64 * CHUNK)
    monkeypatch.setattr(tuning, "BUDGET_S", 0.05)
    (tmp_path / "checkpoints" / "one").mkdir(parents=True)
    return tmp_path


def give_checkpoint(store: Path, size_bytes: int = 64 * CHUNK) -> Path:
    path = store / "checkpoints" / "one" / "model.safetensors"
    path.write_bytes(os.urandom(size_bytes))
    return path


def test_the_cheapest_of_the_fastest_is_taken() -> None:
    best = setting(2, 4096, 1.96, 0.05)
    table = [setting(8, 4096, 2.0, 0.09), best, setting(1, 4096, 1.9, 0.01)]
    assert choose(table) == best
    assert choose(table, 0.06) == table[2], "a disk that varies by itself says less"
    usual = setting(4, 8192, 2.0, 0.05)
    assert choose([setting(8, 8192, 2.0, 0.049), setting(4, 4096, 2.0, 0.05), usual, setting(1, 1, 2.0, 0.05)]) == usual


def test_the_noise_of_a_disk_is_what_its_settings_vary_by() -> None:
    assert noise([]) == noise([[1.0], [5.0]]) == tuning.NEAR_UNKNOWN
    assert noise([[2.0, 2.0], [3.0, 3.0], [5.0]]) == 0.0
    assert noise([[1.0, 1.0], [9.0, 11.0], [1.0, 9.0]]) == pytest.approx(0.1)


@given(
    st.lists(
        st.builds(setting, st.sampled_from(tuning.THREADS), st.just(4096), st.floats(0.01, 20), st.floats(0, 1)),
        min_size=1,
    ),
    st.floats(NEAR, 0.3),
)
def test_what_is_taken_is_fast_and_cheap(table: list[Setting], near: float) -> None:
    chosen = choose(table, near)
    fastest = max(one.gb_per_s for one in table)
    assert chosen.gb_per_s >= (1 - near) * fastest
    assert all(ALIKE * one.cpu_s_per_gb >= chosen.cpu_s_per_gb for one in table if one.gb_per_s >= (1 - near) * fastest)


def test_it_is_measured_once_and_kept(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_checkpoint(store)
    first = tune(store, chunk_bytes=CHUNK)
    assert first.table and not first.temporary
    assert first.device == os.stat(store).st_dev and first.filesystem == filesystem_of(store)
    assert (first.threads, first.block_bytes) in [(one.threads, one.block_bytes) for one in first.table]
    assert sorted(os.listdir(store)) == ["checkpoints", TUNING_NAME]

    def again(*_: object, **__: object) -> Tuning:
        raise AssertionError("measured twice")

    monkeypatch.setattr(tuning, "measure", again)
    assert tune(store, chunk_bytes=CHUNK) == first


@pytest.mark.parametrize(
    "kept",
    [
        b"{",
        b"[]",
        msgspec.json.encode(msgspec.structs.replace(DEFAULT, version=VERSION + 1)),
        msgspec.json.encode(msgspec.structs.replace(DEFAULT, device=1, filesystem="elsewhere")),
        msgspec.json.encode(msgspec.structs.replace(DEFAULT, threads=0)),
        msgspec.json.encode(msgspec.structs.replace(DEFAULT, block_bytes=1)),
    ],
)
def test_what_is_kept_of_another_disk_or_damaged_is_measured_again(store: Path, kept: bytes) -> None:
    give_checkpoint(store)
    (store / TUNING_NAME).write_bytes(kept)
    tuned = tune(store, chunk_bytes=CHUNK)
    assert tuned.table and tuned.threads > 0 and tuned.block_bytes % PAGE_BYTES == 0
    assert json.loads((store / TUNING_NAME).read_bytes())["device"] == os.stat(store).st_dev


def test_without_a_checkpoint_a_temporary_file_serves_until_there_is_one(store: Path) -> None:
    give_checkpoint(store, CHUNK)  # too small
    first = tune(store)
    assert first.temporary and first.table
    assert sorted(os.listdir(store)) == ["checkpoints", TUNING_NAME], "the file has no name"
    assert tune(store) == first
    give_checkpoint(store)
    assert not tune(store, chunk_bytes=CHUNK).temporary


def test_where_nothing_can_be_measured_there_is_a_default(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(store)

    class Full:
        f_bavail, f_frsize = 0, real.f_frsize

    monkeypatch.setattr(tuning.os, "statvfs", lambda directory: Full)
    assert tune(store) == DEFAULT
    assert not (store / TUNING_NAME).exists(), "room may come"
    assert tune(store / "gone") == DEFAULT
    give_checkpoint(store)

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    assert tune(store, chunk_bytes=CHUNK) == DEFAULT


def test_a_slow_disk_is_measured_with_fewer_settings(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(64 * CHUNK))
    hurried = measure(path, chunk_bytes=CHUNK, budget_s=0.0, span_bytes=4 * CHUNK)
    assert len(hurried.table) == 1
    full = measure(path, chunk_bytes=CHUNK, budget_s=60.0, span_bytes=4 * CHUNK, laps=2)
    assert len({(one.threads, one.block_bytes) for one in full.table}) == len(tuning.THREADS)


def test_a_file_that_is_too_short_or_is_cut_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(CHUNK - 1))
    with pytest.raises(OSError, match="less than a chunk"):
        measure(path, chunk_bytes=CHUNK)
    path.write_bytes(bytes(8 * CHUNK))
    reader = tuning.Reader(path, 2, CHUNK)
    os.truncate(path, CHUNK)
    with pytest.raises(HearthError, match="ends at byte"):
        reader.read(2, CHUNK, 8 * CHUNK, verify=True)
    reader.close()


def test_a_sample_needs_room_and_leaves_nothing(tmp_path: Path) -> None:
    with temporary_sample(tmp_path, 2**60) as none:
        assert none is None
    with temporary_sample(tmp_path, 32 << 20) as path:
        assert path is not None and path.stat().st_size >= 8 << 20
        assert os.listdir(tmp_path) == []


def test_the_bench_explains_itself(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_checkpoint(store)
    for name, value in (("CHUNK_BYTES", str(CHUNK)), ("SHM_DIR", str(store)), ("IO_THREADS", "3")):
        monkeypatch.setenv(f"HEARTH_{name}", value)
    monkeypatch.setattr(bench, "POOL_BYTES", 4 * CHUNK)
    monkeypatch.setattr(bench, "WRITE_BYTES", 16 << 20)
    monkeypatch.setattr(bench, "HASH_BYTES", 16 << 20)
    assert bench.main(["--dir", str(store), "--bytes", "256KiB", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["table"]) == len(tuning.THREADS)
    assert report["in_use"]["threads"] == 3 and report["in_use"]["threads_from"] == "HEARTH_IO_THREADS"
    assert report["ceiling_gb_per_s"] > 0 and report["pool"]["bytes"] == 4 * CHUNK
    assert os.listdir(store) == ["checkpoints"], "nothing is left behind or changed"
    assert bench.main(["--dir", str(store), "--bytes", "256KiB"]) == 0
    shown = capsys.readouterr().out
    assert "CPU s/GB" in shown and "plain sequential direct reads" in shown and "3 threads (HEARTH_IO_THREADS)" in shown
    assert bench.main(["--dir", str(store / "gone")]) == 1
    assert "gone is no directory" in capsys.readouterr().err
    assert bench.main(["--bytes", "many"]) == 2
