"""The pool's segment: shared, private, adopted by the next life of its store exactly when its state can be believed."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.store import pool as pool_module
from services.store.pool import STATE_SUFFIX, Pool
from services.store.pool_state import STATE_VERSION, CopyState, KeptState, LeaseState, PoolState, encode_state
from shared.contracts.manifest import PAGE_BYTES
from shared.contracts.residency import FAILED_TURN, Extent, Lease, arrival_word
from shared.errors import Code, HearthError
from tests.unit.store.images import CHECKPOINT

CHUNK = 2 * PAGE_BYTES
COUNT = 8
TEXT = b"a copy of a checkpoint"


def open_pool(directory: Path, *, prefix: str = "p", chunk_bytes: int = CHUNK, chunk_count: int = COUNT) -> Pool:
    return Pool.open(directory, prefix=prefix, server_id="s", chunk_bytes=chunk_bytes, chunk_count=chunk_count)


def state_of(pool: Pool, *, at: int = 2, count: int = 3) -> PoolState:
    """A copy in `count` chunks from `at` on, and a lease on it."""
    extent = Extent(offset=at * CHUNK, length=count * CHUNK)
    lease = Lease(
        lease_id="lease-1",
        checkpoint=CHECKPOINT,
        segment=str(pool.path),
        segment_bytes=pool.segment_bytes,
        extents=(Extent(offset=extent.offset, length=extent.length - PAGE_BYTES),),
        directory="/store",
        tier="ssd",
    )
    return PoolState(
        version=STATE_VERSION,
        chunk_bytes=CHUNK,
        chunk_count=COUNT,
        next_tag=9,
        next_lease=2,
        copies=(CopyState(checkpoint_id=CHECKPOINT.checkpoint_id, extents=(extent,)),),
        leases=(LeaseState(lease=lease, holder="worker-1", ttl_s=15.0),),
    )


def test_a_pool_is_shared_allocated_private_and_unlinked_at_the_end(tmp_path: Path) -> None:
    pool = open_pool(tmp_path)
    status = os.stat(pool.path)
    assert status.st_size == pool.segment_bytes == COUNT * CHUNK + PAGE_BYTES
    assert status.st_blocks * 512 >= pool.segment_bytes, "the pool is allocated, not sparse"
    assert status.st_mode & 0o777 == 0o600
    assert pool.restored is None and pool.removed == () and pool.huge_bytes == 0
    assert pool.path.name == f"hearth-p-s-{pool.nonce}"
    pool.memory[10:13] = b"abc"
    assert len(pool.memory) == pool.data_bytes == pool.board_offset
    pool.announce(3, arrival_word(7, 1))
    data = pool.path.read_bytes()
    assert data[:14] == bytes(10) + b"abc" + bytes(1)
    at = pool.board_offset + 8 * 3
    assert int.from_bytes(data[at : at + 8], "little") == arrival_word(7, 1) == pool.word(3)
    pool.clear([Extent(offset=2 * CHUNK, length=CHUNK + PAGE_BYTES)])
    assert pool.word(3) == 0
    pool.save(state_of(pool))
    assert os.stat(pool.path.with_name(pool.path.name + STATE_SUFFIX)).st_mode & 0o777 == 0o600
    pool.close()
    assert os.listdir(tmp_path) == []


def test_the_next_life_finds_copies_and_leases_in_place_and_holders_keep_their_mappings(tmp_path: Path) -> None:
    first = open_pool(tmp_path)
    first.memory[2 * CHUNK : 2 * CHUNK + len(TEXT)] = TEXT
    for chunk in range(COUNT):
        first.announce(chunk, arrival_word(8, 0))
    state = state_of(first)
    first.save(PoolState(version=STATE_VERSION, chunk_bytes=CHUNK, chunk_count=COUNT, next_tag=1, next_lease=1))
    first.save(state)
    with first.path.open("rb") as file:
        holder = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    first.close(keep=True)

    second = open_pool(tmp_path)
    assert (second.path, second.nonce, second.restored) == (first.path, first.nonce, state)
    assert bytes(second.memory[2 * CHUNK : 2 * CHUNK + len(TEXT)]) == TEXT
    assert [second.word(chunk) for chunk in range(COUNT)] == [0, 0, *[arrival_word(8, 0)] * 3, 0, 0, 0]
    second.memory[:3] = b"new"
    assert holder[:3] == b"new" and holder[2 * CHUNK : 2 * CHUNK + len(TEXT)] == TEXT
    holder.close()
    second.close()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("words", [3, 2], ids=["all", "not all"])
def test_what_was_arriving_is_kept_for_its_leases_if_the_board_says_that_it_is_all_there(
    tmp_path: Path, words: int
) -> None:
    first = open_pool(tmp_path)
    claimed = state_of(first)
    kept = KeptState(
        checkpoint_id=CHECKPOINT.checkpoint_id,
        extents=claimed.copies[0].extents,
        tag=8,
        image_bytes=3 * CHUNK - PAGE_BYTES,
        whole=False,
    )
    for chunk in (0, *range(2, 2 + words)):
        first.announce(chunk, arrival_word(8, 0))
    first.save(msgspec.structs.replace(claimed, copies=(), kept=(kept,)))
    first.close(keep=True)

    second = open_pool(tmp_path)
    assert second.restored is not None
    found = (second.restored.copies, second.restored.kept, second.restored.leases)
    assert found == ((), *(((kept,), claimed.leases) if words == 3 else ((), ())))
    word = arrival_word(8, 0 if words == 3 else FAILED_TURN)
    assert [second.word(chunk) for chunk in range(COUNT)] == [0, 0, word, word, word, 0, 0, 0]
    second.close()


def test_a_killed_store_s_copies_are_adopted(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from tests.unit.store.test_pool import *
pool = open_pool(Path({str(tmp_path)!r}))
pool.memory[2 * CHUNK : 2 * CHUNK + len(TEXT)] = TEXT
pool.announce(2, arrival_word(8, 0))
pool.announce(7, arrival_word(9, 0))
pool.save(state_of(pool))
print(pool.path, flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )
    assert process.stdout is not None and process.stdin is not None
    path = Path(process.stdout.readline().strip())
    other = open_pool(tmp_path)
    assert other.path != path and other.restored is None, "a living store's pool is left alone"
    other.close()
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    process.stdin.close()
    process.stdout.close()
    pool = open_pool(tmp_path)
    assert pool.path == path and pool.restored == state_of(pool)
    assert bytes(pool.memory[2 * CHUNK : 2 * CHUNK + len(TEXT)]) == TEXT
    assert (pool.word(2), pool.word(7)) == (arrival_word(8, 0), 0)
    pool.close()


def abandoned(directory: Path) -> Path:
    """A segment with a sound state, left by a store that has ended."""
    pool = open_pool(directory)
    pool.save(state_of(pool))
    pool.close(keep=True)
    return pool.path


def replaced(path: Path, **changes: object) -> None:
    """Change fields of the state beside a segment."""
    state = path.with_name(path.name + STATE_SUFFIX)
    now = msgspec.json.decode(state.read_bytes(), type=PoolState)
    state.write_bytes(encode_state(msgspec.structs.replace(now, **changes)))


def lease_changed(path: Path, **changes: object) -> None:
    state = path.with_name(path.name + STATE_SUFFIX)
    now = msgspec.json.decode(state.read_bytes(), type=PoolState)
    lease = msgspec.structs.replace(now.leases[0], lease=msgspec.structs.replace(now.leases[0].lease, **changes))
    state.write_bytes(encode_state(msgspec.structs.replace(now, leases=(lease,))))


def copies(*extents: tuple[int, int]) -> tuple[CopyState, ...]:
    return (CopyState(checkpoint_id="c", extents=tuple(Extent(offset=at, length=size) for at, size in extents)),)


UNBELIEVABLE: dict[str, Callable[[Path], object]] = {
    "no state": lambda path: path.with_name(path.name + STATE_SUFFIX).unlink(),
    "a torn state": lambda path: os.truncate(path.with_name(path.name + STATE_SUFFIX), 40),
    "a state that is no text": lambda path: path.with_name(path.name + STATE_SUFFIX).write_bytes(b"\xff\x00"),
    "another version": lambda path: replaced(path, version=STATE_VERSION + 1),
    "another geometry": lambda path: replaced(path, chunk_count=COUNT + 1),
    "a copy outside": lambda path: replaced(path, copies=copies((6 * CHUNK, 3 * CHUNK)), leases=()),
    "a copy before the beginning": lambda path: replaced(path, copies=copies((-CHUNK, CHUNK)), leases=()),
    "a copy of nothing": lambda path: replaced(path, copies=copies(), leases=()),
    "an empty copy": lambda path: replaced(path, copies=copies((0, 0)), leases=()),
    "a copy of no whole chunks": lambda path: replaced(path, copies=copies((0, PAGE_BYTES)), leases=()),
    "a copy on itself": lambda path: replaced(path, copies=copies((0, CHUNK), (0, CHUNK)), leases=()),
    "a copy twice": lambda path: replaced(path, copies=copies((0, CHUNK)) + copies((CHUNK, CHUNK)), leases=()),
    "a lease without its copy": lambda path: replaced(path, copies=()),
    "a lease on other bytes": lambda path: lease_changed(path, extents=(Extent(offset=0, length=CHUNK),)),
    "a lease of less than nothing": lambda path: lease_changed(path, extents=(Extent(offset=3 * CHUNK, length=-1),)),
    "a lease of another segment": lambda path: lease_changed(path, segment="/dev/shm/other"),
    "a state that others may write": lambda path: path.with_name(path.name + STATE_SUFFIX).chmod(0o666),
    "a shorter segment": lambda path: os.truncate(path, PAGE_BYTES),
}


@pytest.mark.parametrize("fault", list(UNBELIEVABLE))
def test_a_segment_that_cannot_be_believed_is_replaced(tmp_path: Path, fault: str) -> None:
    path = abandoned(tmp_path)
    UNBELIEVABLE[fault](path)
    pool = open_pool(tmp_path)
    assert pool.restored is None and pool.path != path and pool.removed == (path.name,)
    assert os.listdir(tmp_path) == [pool.path.name]
    pool.close()


def test_a_segment_of_another_geometry_is_replaced(tmp_path: Path) -> None:
    path = abandoned(tmp_path)
    pool = open_pool(tmp_path, chunk_count=COUNT // 2)
    assert pool.restored is None and pool.removed == (path.name,)
    assert os.listdir(tmp_path) == [pool.path.name]
    pool.close()


def test_only_what_dead_stores_of_this_server_left_is_removed(tmp_path: Path) -> None:
    path = abandoned(tmp_path)
    live = open_pool(tmp_path, prefix="q")
    others = ["hearth-p-s-2-0123abcd", "hearth-q-s-2-0123abcd.state", "other", "hearth-p-s-0123abcd.txt"]
    for name in ("hearth-p-s-0123abcd", "hearth-p-s-4567abcd.state", "hearth-p-s-89ababcd.state.new", *others):
        (tmp_path / name).write_bytes(b"x")
        (tmp_path / name).chmod(0o600)
    (tmp_path / "hearth-p-s-aaaaaaaa").symlink_to(tmp_path / "other")
    pool = open_pool(tmp_path)
    assert pool.path == path and pool.restored is not None
    assert pool.removed == ("hearth-p-s-0123abcd",)
    left = [path.name, path.name + STATE_SUFFIX, live.path.name, "hearth-p-s-aaaaaaaa", *others]
    assert sorted(os.listdir(tmp_path)) == sorted(left)
    pool.close()
    live.close()


def test_a_segment_that_others_may_write_is_not_adopted(tmp_path: Path) -> None:
    path = abandoned(tmp_path)
    path.chmod(0o666)
    pool = open_pool(tmp_path)
    assert pool.restored is None and pool.path != path
    pool.close()


def test_the_newest_of_several_is_adopted(tmp_path: Path) -> None:
    first = open_pool(tmp_path)
    second = open_pool(tmp_path)
    for pool, moment in ((second, 1000), (first, 2000)):
        pool.save(state_of(pool))
        os.utime(pool.path.with_name(pool.path.name + STATE_SUFFIX), (moment, moment))
    first.close(keep=True)
    second.close(keep=True)
    pool = open_pool(tmp_path)
    assert pool.path == first.path and pool.removed == (second.path.name,)
    pool.close()


def test_a_pool_that_does_not_fit_names_both_numbers_and_an_adopted_one_needs_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HearthError, match=r"needs 1048576 TiB and .* free.*HEARTH_DRAM_BYTES") as refused:
        open_pool(tmp_path, chunk_bytes=2**40, chunk_count=2**20)
    assert refused.value.failure.code is Code.OUT_OF_MEMORY
    assert os.listdir(tmp_path) == []
    path = abandoned(tmp_path)
    real = os.statvfs(tmp_path)

    class Full:
        f_bavail, f_frsize = 0, real.f_frsize

    monkeypatch.setattr(pool_module.os, "statvfs", lambda directory: Full)
    pool = open_pool(tmp_path)
    assert pool.path == path and pool.restored is not None
    with pytest.raises(HearthError, match="has 0 B free"):
        open_pool(tmp_path)
    pool.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_state_is_either_refused_or_means_what_it_says(tmp_path: Path, data: st.DataObject) -> None:
    path = abandoned(tmp_path)
    state = path.with_name(path.name + STATE_SUFFIX)
    raw = bytearray(state.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        what = data.draw(st.sampled_from(["change", "cut", "insert"]))
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        if what == "cut":
            del raw[at : at + data.draw(st.integers(1, 20))]
        elif what == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        elif raw:
            raw[at] = data.draw(st.sampled_from([*b'0123456789-"{}[],:e.', 0, 255]))
    state.write_bytes(raw)
    pool = open_pool(tmp_path)
    try:
        if pool.restored is None:
            assert pool.path != path and os.listdir(tmp_path) == [pool.path.name]
            return
        taken: set[int] = set()
        for copy in pool.restored.copies:
            for extent in copy.extents:
                chunks = range(extent.offset // CHUNK, (extent.offset + extent.length) // CHUNK)
                assert chunks and chunks[0] >= 0 and chunks[-1] < COUNT and taken.isdisjoint(chunks)
                taken.update(chunks)
        ids = {copy.checkpoint_id for copy in pool.restored.copies}
        for held in pool.restored.leases:
            assert held.lease.checkpoint.checkpoint_id in ids and held.ttl_s > 0
            for part in held.lease.extents:
                assert part.length > 0
                assert set(range(part.offset // CHUNK, -(-(part.offset + part.length) // CHUNK))) <= taken
    finally:
        pool.close()


def test_a_full_tmpfs_costs_the_state_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = open_pool(tmp_path)
    assert pool.save(state_of(pool))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    assert not pool.save(state_of(pool, at=4))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [pool.path.name], "an old state would claim what is overwritten"
    assert pool.save(state_of(pool, at=4))
    pool.close(keep=True)
    again = open_pool(tmp_path)
    assert again.restored == state_of(again, at=4)
    again.close()


def test_a_directory_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(HearthError, match=r"cannot be made in .*: No such file or directory") as caught:
        open_pool(tmp_path / "gone")
    assert caught.value.failure.code is Code.UNAVAILABLE
