"""Attaching while the bytes still arrive, through a window, and next to another worker: real memory, real models."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from services.worker.attach import attach
from services.worker.loader import AttachedModel, TorchLoader
from services.worker.loader_memory import Mappings
from shared.contracts.manifest import PAGE_BYTES
from shared.contracts.residency import Lease
from shared.errors import Code, HearthError
from tests.builders.images import HandMadePool, make_lease, write_manifest
from tests.builders.models import make_model
from tests.unit.worker.sinks import Recorder
from tests.unit.worker.test_loader import expected_tokens, tokens_through

pytestmark = pytest.mark.torch

CHUNK = 64 * 1024
CHUNKS = 32


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def loader() -> Iterator[TorchLoader]:
    made = TorchLoader(device="cpu")
    yield made
    made.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_model(tmp_path_factory.mktemp("llama"), "llama", eos=False)
    write_manifest(directory)
    return directory


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[HandMadePool]:
    made = HandMadePool(tmp_path / "pool", chunk_bytes=CHUNK, chunk_count=CHUNKS)
    yield made
    made.close()


class Watch:
    """Remembers what a load says; `waiting` is set when it waits for bytes."""

    def __init__(self, consumed: Callable[[int], None] = lambda chunks: None) -> None:
        self.stopped = False
        self.told: list[tuple[int, int]] = []
        self.taken: list[int] = []
        self.waiting = threading.Event()
        self._consumed = consumed

    def arrived(self, done_bytes: int, total_bytes: int) -> None:
        self.told.append((done_bytes, total_bytes))
        self.waiting.set()

    def consumed(self, chunks: int) -> None:
        self.taken.append(chunks)
        self._consumed(chunks)


class Load:
    """A load on a thread of its own: `result()` is the model, or raises what it raised."""

    def __init__(self, loader: TorchLoader, lease: Lease, watch: Watch, heard: Recorder | None = None) -> None:
        self._made: AttachedModel | None = None
        self._error: HearthError | None = None
        values: dict[str, Any] = {"kv_bytes": 1 << 22, "slots": 2, "max_context_tokens": None}

        def run() -> None:
            try:
                self._made = loader.load(lease, sink=heard or Recorder(), watch=watch, **values)
            except HearthError as error:
                self._error = error

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def result(self) -> AttachedModel:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the load does not end"
        if self._error is not None:
            raise self._error
        assert self._made is not None
        return self._made


def answer(loaded: AttachedModel, heard: Recorder) -> list[int]:
    from tests.unit.worker.test_loader import GREEDY, PROMPT, TOKENS

    loaded.engine.submit("a", PROMPT, first_index=0, max_new_tokens=TOKENS, sampling=GREEDY)
    heard.ended("a")
    return heard.tokens["a"]


@pytest.mark.parametrize("stitched", [False, True])
def test_a_model_is_made_while_its_bytes_arrive_in_any_order(
    loader: TorchLoader, llama: Path, pool: HandMadePool, stitched: bool
) -> None:
    dice = random.Random(3)
    places = dice.sample(range(CHUNKS), 30) if stitched else list(range(1, CHUNKS))
    places = places[: -(-(llama / "model.safetensors").stat().st_size // CHUNK)]
    lease = pool.lease(llama, places)
    watch, heard = Watch(), Recorder()
    load = Load(loader, lease, watch, heard)
    assert watch.waiting.wait(60)
    assert watch.told[0][0] == 0
    order = list(range(pool.chunks()))
    dice.shuffle(order)
    for number in order:
        pool.bring(number)
        time.sleep(0.005)
    loaded = load.result()
    assert loaded.times.waited_s > 0
    assert watch.told[-1] == (lease.arrival.image_bytes, lease.arrival.image_bytes)  # type: ignore[union-attr]
    assert watch.taken == []
    assert answer(loaded, heard) == expected_tokens(llama)
    loaded.close()


def test_what_has_arrived_before_is_not_waited_for(loader: TorchLoader, llama: Path, pool: HandMadePool) -> None:
    lease = pool.lease(llama, range(len_of(llama)))
    for number in range(pool.chunks()):
        pool.bring(number)
    watch, heard = Watch(), Recorder()
    loaded = Load(loader, lease, watch, heard).result()
    assert watch.told == []
    assert answer(loaded, heard) == expected_tokens(llama)
    loaded.close()


def len_of(directory: Path) -> int:
    """Chunks of its image."""
    return -(-(directory / "model.safetensors").stat().st_size // CHUNK)


@pytest.mark.parametrize("converted", [False, True])
def test_a_load_that_waits_holds_nobody_up(
    loader: TorchLoader, llama: Path, pool: HandMadePool, tmp_path: Path, converted: bool
) -> None:
    waiting = llama
    if converted:
        waiting = make_model(tmp_path / "mixture", "mixtral", eos=False, hidden=16, heads=2)
        write_manifest(waiting)
    watch = Watch()
    load = Load(loader, pool.lease(waiting, range(len_of(waiting))), watch)
    assert watch.waiting.wait(60)
    assert tokens_through(loader, make_lease(llama, tmp_path / "other")) == expected_tokens(llama)
    watch.stopped = True
    with pytest.raises(HearthError) as stopped:
        load.result()
    assert stopped.value.failure.code is Code.DRAINING


@pytest.mark.parametrize("window", [False, True])
def test_bytes_that_will_not_come_fail_the_load_and_nothing_stays(
    llama: Path, pool: HandMadePool, tmp_path: Path, window: bool
) -> None:
    loader = TorchLoader(device="cpu")
    watch = Watch()
    load = Load(loader, pool.lease(llama, range(3 if window else len_of(llama)), window=window), watch)
    assert watch.waiting.wait(60)
    pool.bring(0)
    pool.fail()
    with pytest.raises(HearthError) as failed:
        load.result()
    assert failed.value.failure.code is Code.CHECKPOINT_UNAVAILABLE
    loader.close()
    own = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(own) == 1, "but for the pool's own mapping"


def test_a_place_that_went_to_another_load_fails_this_one(loader: TorchLoader, llama: Path, pool: HandMadePool) -> None:
    watch = Watch()
    load = Load(loader, pool.lease(llama, range(len_of(llama))), watch)
    assert watch.waiting.wait(60)
    pool.lease(llama, range(len_of(llama)), tag=2)
    pool.bring(0, tag=2)
    with pytest.raises(HearthError) as failed:
        load.result()
    assert failed.value.failure.code is Code.CHECKPOINT_UNAVAILABLE


def test_an_image_larger_than_its_window_is_copied_into_memory_that_goes_with_the_model(
    loader: TorchLoader, llama: Path, pool: HandMadePool
) -> None:
    lease = pool.lease(llama, [7, 3, 12], window=True)
    assert lease.arrival is not None
    total = pool.chunks()
    assert total > 6
    brought = 3

    def consumed(chunks: int) -> None:
        nonlocal brought
        while brought < min(total, chunks + 3):
            pool.bring(brought)
            brought += 1

    for number in range(3):
        pool.bring(number)
    watch, heard = Watch(consumed), Recorder()
    loaded = Load(loader, lease, watch, heard).result()
    assert watch.taken[-1] == total
    assert loaded.memory_bytes >= lease.arrival.image_bytes + (1 << 20)
    for number in range(3):  # the places may go to somebody else
        pool.memory[CHUNK * (7, 3, 12)[number] : CHUNK * ((7, 3, 12)[number] + 1)] = b"\xff" * CHUNK
    assert answer(loaded, heard) == expected_tokens(llama)
    before = anonymous_mappings()
    loaded.close()
    # Counting resident bytes would count what else the process does meanwhile.
    gone = set(before) - set(anonymous_mappings())
    assert any(end - begin >= lease.arrival.image_bytes for begin, end in gone)


def anonymous_mappings() -> list[tuple[int, int]]:
    """(begin, end) of what this process has mapped that is no file's."""
    found: list[tuple[int, int]] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        if fields[4] == "0":
            begin, end = (int(address, 16) for address in fields[0].split("-"))
            found.append((begin, end))
    return found


def rollup(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


# -- mappings


def mapped(path: Path) -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if line.rstrip().endswith(str(path))]


def test_a_segment_that_was_prepared_is_not_mapped_again(loader: TorchLoader, llama: Path, tmp_path: Path) -> None:
    lease = make_lease(llama, tmp_path / "pool")
    loader.prepare(str(tmp_path / "pool"))
    (before,) = mapped(tmp_path / "pool")
    loader.prepare(str(tmp_path / "pool"))
    assert tokens_through(loader, lease) == expected_tokens(llama)
    assert mapped(tmp_path / "pool") == [before]
    loader.prepare(str(tmp_path / "no-such-segment"))
    assert mapped(tmp_path / "pool") == [before]


def test_an_old_segment_goes_when_nobody_uses_it_any_more(loader: TorchLoader, llama: Path, tmp_path: Path) -> None:
    mappings = Mappings()
    old = make_lease(llama, tmp_path / "old")
    make_lease(llama, tmp_path / "new")
    image = mappings.map(old)
    mappings.release(mappings.prepare(str(tmp_path / "new")))
    assert (len(mapped(tmp_path / "old")), len(mapped(tmp_path / "new"))) == (1, 1)
    mappings.release(image)
    assert (mapped(tmp_path / "old"), len(mapped(tmp_path / "new"))) == ([], 1)
    mappings.close()
    assert mapped(tmp_path / "new") == []


def test_pages_of_a_prepared_segment_are_in_the_page_table(llama: Path, tmp_path: Path) -> None:
    lease = make_lease(llama, tmp_path / "pool")
    before = rollup(os.getpid(), "Rss:")
    mappings = Mappings()
    mappings.release(mappings.prepare(str(tmp_path / "pool")))
    mappings._segments[0][1].populate.join()
    assert rollup(os.getpid(), "Rss:") - before >= lease.segment_bytes - (1 << 20)
    mappings.close()


_SECOND = """
import ctypes, os, sys
import msgspec
from services.worker.attach import attach
from services.worker.loader_memory import Mappings
from shared.contracts.residency import Lease

def pss():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024

leases = [msgspec.json.decode(open(path, "rb").read(), type=Lease) for path in sys.argv[1:3]]
mappings = Mappings()
held = [attach(leases[0], mappings)]  # imports and first times are paid for by a small model
print(pss(), flush=True)
sys.stdin.readline()
held.append(attach(leases[1], mappings))
for parameter in held[1].model.parameters():
    parameter.sum()  # every page is touched
print(pss(), flush=True)
sys.stdin.readline()
"""


def test_a_second_worker_on_the_same_server_adds_no_resident_memory(llama: Path, tmp_path: Path) -> None:
    import msgspec

    big = make_model(tmp_path / "big", "llama", eos=False, hidden=512, vocab=32_000)
    write_manifest(big)
    paths = []
    shm = Path("/dev/shm") / f"hearth-test-{os.getpid()}"
    try:
        leases = [make_lease(llama, tmp_path / "small-pool"), make_lease(big, shm)]
        for number, lease in enumerate(leases):
            paths.append(tmp_path / f"lease-{number}")
            paths[-1].write_bytes(msgspec.json.encode(lease))
        command = [sys.executable, "-c", _SECOND, *map(str, paths)]
        both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        try:
            before = sum(number_of(process) for process in both)
            after = 0
            for process in both:
                go_on(process)
                number_of(process)
            # Measured when both have everything: each page of the pool counts once over both.
            after = sum(rollup(process.pid, "Pss:") for process in both)
        finally:
            for process in both:
                process.kill()
                process.communicate()
        image = leases[1].extents[0].length
        assert image > 100 << 20
        assert after - before < 1.25 * image, "the second one has a copy of its own"
    finally:
        shm.unlink(missing_ok=True)


def number_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


# -- attaching alone


def test_parameters_are_usable_without_tokenizer_and_engine(llama: Path, tmp_path: Path) -> None:
    mappings = Mappings()
    attached = attach(make_lease(llama, tmp_path / "pool"), mappings)
    ids = torch.tensor([[5, 6, 7]])
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(llama)(ids).logits
        assert torch.equal(attached.model(ids).logits, expected)
    assert not attached.model.training
    assert not any(parameter.requires_grad for parameter in attached.model.parameters())
    assert attached.times.total_s > 0
    assert attached.memory_bytes == 0
    image = attached.image
    assert image.size_bytes % PAGE_BYTES == 0
    assert mmap.PAGESIZE == PAGE_BYTES
    del attached
    mappings.release(image)
    mappings.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("window", [False, True])
def test_a_cuda_device_copies_each_chunk_as_it_arrives(llama: Path, pool: HandMadePool, window: bool) -> None:
    loader = TorchLoader(device="cuda")
    loader.prepare(str(pool.path))
    places = [5, 2, 9] if window else list(range(len_of(llama)))
    lease = pool.lease(llama, places, window=window)
    total, brought = pool.chunks(), 0

    def bring(until: int) -> None:
        nonlocal brought
        while brought < min(total, until):
            pool.bring(brought)
            brought += 1

    watch, heard = Watch(lambda chunks: bring(chunks + len(places))), Recorder()
    load = Load(loader, lease, watch, heard)
    assert watch.waiting.wait(60)
    bring(len(places))
    loaded = load.result()
    assert loaded.memory_bytes > (llama / "model.safetensors").stat().st_size
    assert answer(loaded, heard) == expected_tokens(llama)
    loaded.close()
    loader.close()
