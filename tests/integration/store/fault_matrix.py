"""Every operation of a store × every system call of it that changes something × what can go wrong there.

`python -m tests.integration.store.fault_matrix OPERATION HOME [--all]` prints one line of JSON per case that went
wrong, and last how many cases there were. Each case is a forked child: this process has no threads.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.store import events as e
from shared.contracts.manifest import MANIFEST_NAME
from shared.contracts.residency import (
    Acquire,
    Done,
    Evict,
    Export,
    Import,
    Imported,
    Lease,
    Pin,
    Prefetch,
    Source,
    Verified,
    Verify,
)
from shared.errors import Failure, HearthError
from tests.builders.checkpoints import make_checkpoint
from tests.integration.store.faults import (
    CHUNK,
    SPACE,
    Call,
    Fault,
    FaultyDisk,
    Life,
    a_life,
    check_accounts,
    check_claims,
    dump,
    failure_faults,
    open_files,
)
from tests.unit.store.sources import make_source

_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_STUCK_S: Final = 20


@dataclass(frozen=True)
class Scene:
    """What lies in the base directory: sources, and the ids of what they become."""

    base: Path
    ids: dict[str, str]

    def source(self, name: str) -> Source:
        """A source by its name."""
        return Source(url=str(self.base / name))


@dataclass(frozen=True)
class Operation:
    """Something that a store is asked to do. `after`: names of the sources whose checkpoints are whole when it is done.

    `template` is the state of the disk before; `gone`: what may be gone after a fault; `corrupt` has bad chunks.
    """

    template: str
    run: Callable[[Scene, Life], Awaitable[Any]]
    good: Callable[[Any], bool]
    after: tuple[str, ...]
    gone: tuple[str, ...] = ()
    corrupt: tuple[str, ...] = ()
    codes: frozenset[str] = frozenset()


def _call(kind: Callable[[Any, Any], e.Event], message: Callable[[Scene, Life], Any]) -> Any:
    async def run(scene: Scene, life: Life) -> Any:
        return await life.call(kind, message(scene, life))

    return run


async def _nothing(scene: Scene, life: Life) -> Any:
    return Done()


def _acquire(name: str) -> Any:
    return _call(
        e.AcquireAsked,
        lambda scene, life: Acquire(checkpoint_id="", source=scene.source(name), holder="w", ttl_s=600, wait_s=60),
    )


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda answer: isinstance(answer, kinds)


OPERATIONS: Final[dict[str, Operation]] = {
    "import": Operation(
        "one",
        _call(e.ImportAsked, lambda scene, life: Import(source=scene.source("b"), wait_s=60)),
        _is(Imported),
        ("a", "b"),
    ),
    "import-and-load": Operation("one", _acquire("b"), _is(Lease), ("a", "b")),
    "fetch": Operation(
        "one",
        _call(e.PrefetchAsked, lambda scene, life: Prefetch(source=scene.source("h"), tier="ssd", wait_s=60)),
        _is(Done),
        ("a", "h"),
    ),
    "resume": Operation("part", _acquire("h"), _is(Lease), ("a", "h")),
    "load": Operation("two", _acquire("a"), _is(Lease), ("a", "h")),
    "evict": Operation(
        "two",
        _call(e.EvictAsked, lambda scene, life: Evict(checkpoint_id=scene.ids["h"], tier="ssd")),
        _is(Done),
        ("a",),
        gone=("h",),
    ),
    "repair": Operation(
        "damaged",
        _call(e.VerifyAsked, lambda scene, life: Verify(checkpoint_id=scene.ids["h"], wait_s=60)),
        _is(Verified),
        ("a", "h"),
        corrupt=("h",),
    ),
    "quarantine": Operation(
        "lost",
        _call(e.VerifyAsked, lambda scene, life: Verify(checkpoint_id=scene.ids["c"], wait_s=60)),
        _is(Failure),
        ("a",),
        gone=("c",),
        corrupt=("c",),
        codes=frozenset({"checkpoint_corrupt", "not_found"}),
    ),
    "pins": Operation(
        "two",
        _call(e.PinAsked, lambda scene, life: Pin(checkpoint_id=scene.ids["a"], tier="ssd")),
        _is(Done),
        ("a", "h"),
    ),
    "export": Operation(
        "two",
        _call(
            e.ExportAsked,
            lambda scene, life: Export(checkpoint_id=scene.ids["a"], url=str(life.home / "out" / "copy"), wait_s=60),
        ),
        _is(Done),
        ("a", "h"),
    ),
    "start": Operation("mess", _nothing, _is(Done), ("a",), gone=("h",), corrupt=("h",)),
}


# -- the scene ---------------------------------------------------------------------------------------------------------


def _weights(home: Path, id: str) -> Path:
    return home / "store" / "checkpoints" / id / "model.safetensors"


def _damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(2 * CHUNK + 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def make_scene(base: Path) -> Scene:
    """Write the sources and the templates."""
    for number, name in enumerate("abc"):
        make_source(base / name, seed=number)
    make_checkpoint(base / "h", chunks=4, chunk_bytes=CHUNK, seed=9)
    ids: dict[str, str] = {}
    scene = Scene(base, ids)

    def home(name: str, of: str = "") -> Path:
        place = base / name
        if of:
            shutil.copytree(base / of, place)
        for part in ("store", "shm", "out"):
            (place / part).mkdir(parents=True, exist_ok=True)
        return place

    async def bring(place: Path, name: str) -> None:
        async with a_life(place) as life:
            answer = await life.call(e.PrefetchAsked, Prefetch(source=scene.source(name), tier="ssd", wait_s=60))
            assert isinstance(answer, Done), answer
            ids[name] = life.core._tiers.ssd.of_source(scene.source(name))
        shutil.rmtree(place / "shm")
        (place / "shm").mkdir()

    asyncio.run(bring(home("one"), "a"))
    asyncio.run(bring(home("two", "one"), "h"))
    _damage(_weights(home("damaged", "two"), ids["h"]))
    asyncio.run(bring(home("other", "one"), "b"))
    asyncio.run(bring(home("lost", "one"), "c"))
    _damage(_weights(base / "lost", ids["c"]))
    shutil.rmtree(base / "c")
    # Cut off where the second chunk of four has been noted down.
    home("part", "one")
    calls = record(OPERATIONS["fetch"], scene, base / "part")
    marks = [at for at, call in enumerate(calls, 1) if call.name == "write" and call.path.endswith("/.arriving")]
    shutil.rmtree(base / "part")
    home("part", "one")
    _in_child(lambda tell: _run_case(OPERATIONS["fetch"], scene, base / "part", Fault(marks[3], "before"), tell))
    store = home("mess", "damaged") / "store"
    (store / "incoming" / "0123").mkdir()
    (store / "incoming" / "0123" / "model.safetensors").write_bytes(bytes(5000))
    (store / "incoming" / "4567").write_bytes(b"{}")
    (store / "checkpoints" / ("f" * 32)).mkdir()
    (store / "checkpoints" / ("f" * 32) / "config.json").write_text("{}")
    (store / "checkpoints" / ids["h"] / ".quarantined").write_text("Chunk 2 is bad.")
    (store / "pins.json").write_text(json.dumps({ids["a"]: "ssd"}))
    return scene


# -- cases -------------------------------------------------------------------------------------------------------------

Tell = Callable[[object], None]


def _in_child(work: Callable[[Tell], None]) -> tuple[list[Any], int]:
    """Fork; what the child told, and its status: 0, or minus the signal that ended it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        signal.alarm(_STUCK_S)
        status = 1
        real_write = os.write

        def tell(value: object) -> None:
            real_write(write, dump(value))

        try:
            work(tell)
            status = 0
        except BaseException:  # the child ends here, whatever comes: nothing of the parent may run in it
            tell({"crashed": traceback.format_exc()[-3000:]})
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = [json.loads(line) for line in pipe]
    _, status = os.waitpid(pid, 0)
    return told, os.waitstatus_to_exitcode(status)


def record(operation: Operation, scene: Scene, home: Path) -> list[Call]:
    """The calls of an operation that nothing goes wrong in."""
    told, status = _in_child(lambda tell: _run_case(operation, scene, home, Fault(), tell))
    assert status == 0, told
    return [Call(*call) for call in told[-1]["calls"]]


def _allowed(operation: Operation, fault: Fault) -> frozenset[str]:
    return operation.codes | {"no_capacity" if fault.number in _FULL else "checkpoint_unavailable"}


def _run_case(operation: Operation, scene: Scene, home: Path, fault: Fault, tell: Tell) -> None:
    """One life in which one thing goes wrong; in a child."""
    disk = FaultyDisk(
        home, fault, dying=lambda: tell({"dirty": sorted(disk.dirty), "call": list(_flat(disk.calls[-1]))})
    )
    found: list[str] = []
    report: dict[str, Any] = {"found": found}
    before = open_files(home)
    disk.install()
    starting = operation.run is _nothing

    async def live() -> None:
        disk.armed = starting
        async with a_life(home) as life:
            disk.armed = True
            answer = await operation.run(scene, life)
            disk.armed = False
            report["struck"] = disk.struck
            if not operation.good(answer):
                if isinstance(answer, Failure):
                    found.extend(failure_faults(answer, _allowed(operation, fault)))
                else:
                    found.append(f"the answer is {answer}")
            if not starting and not (fault.reads and fault.how == "forever"):
                found.extend(f"afterwards: {one}" for one in check_accounts(life))
            answer = await operation.run(scene, life)
            if not operation.good(answer):
                found.append(f"when the disk is well again: {answer}")
            if not starting:
                found.extend(f"after a second attempt: {one}" for one in check_accounts(life))
            life.tier.remove(life.tier.checkpoints / "nothing")  # with any change the store tries again to delete
            if life.tier.unwanted:
                found.append(f"after a second attempt: {len(life.tier.unwanted)} are not deleted")

    try:
        asyncio.run(live())
    except HearthError as error:  # at the start
        if not starting:
            raise
        found.extend(failure_faults(error.failure, _allowed(operation, fault) | {"out_of_memory", "unavailable"}))
    disk.armed = False
    # A traceback may still hold a view of the pool, which the end of the process unmaps.
    if (left := [name for name in open_files(home) if name not in before and not name.startswith("shm/")]) != []:
        found.append(f"left open: {left}")
    report["calls"] = [_flat(call) for call in disk.calls]
    report["reads"] = disk.reads
    tell(report)


def _flat(call: Call) -> tuple[str, str, str]:
    return (call.name, call.path, call.to)


def _recover(operation: Operation, scene: Scene, home: Path, tell: Tell) -> None:
    """The next life, on a disk that is well; in a child."""
    found: list[str] = []
    corrupt = frozenset(scene.ids[name] for name in operation.corrupt)
    names = {id: name for name, id in scene.ids.items()}

    async def live() -> None:
        async with a_life(home) as life:
            found.extend(check_claims(life, corrupt=corrupt))
            whole = {
                names.get(one.id, one.id) for one in life.stored if one.arrived_bytes is None and not one.quarantined
            }
            was = {"a", *(("h",) if operation.template in ("two", "damaged", "mess") else ())}
            was |= {"c"} if operation.template == "lost" else set()
            if lost := was - whole - set(operation.gone):
                found.append(f"lost: {lost}")
            if more := whole - was - set(operation.after):
                found.append(f"claimed and never there: {more}")
            if any(warning[0] == "pins.dropped" for warning in life.warnings):
                found.append(f"pins: {life.warnings}")
            answer = await operation.run(scene, life)
            if not operation.good(answer):
                found.append(f"it does not work now: {answer}")
            found.extend(f"after that: {one}" for one in check_accounts(life))
        async with a_life(home) as life:
            found.extend(f"finally: {one}" for one in check_claims(life))
            whole = {
                names.get(one.id, one.id) for one in life.stored if one.arrived_bytes is None and not one.quarantined
            }
            if whole != set(operation.after):
                found.append(f"finally: {whole} are whole and not {operation.after}")

    asyncio.run(live())
    out = sorted(os.listdir(home / "out"))
    if out not in ([], ["copy"]):
        found.append(f"left in out: {out}")
    if left := open_files(home):
        found.append(f"left open: {left}")
    tell({"found": found})


def run_case(operation: Operation, scene: Scene, home: Path, fault: Fault) -> list[str]:
    """What is wrong with one case."""
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(scene.base / operation.template, home)
    found: list[str] = []
    told, status = _in_child(lambda tell: _run_case(operation, scene, home, fault, tell))
    killed = fault.how in ("before", "after", "torn") and fault.at
    last: dict[str, Any] = told[-1] if told else {}
    if "crashed" in last:
        found.append(last["crashed"])
    elif status != (-signal.SIGKILL if killed else 0):
        found.append(f"the child ended with {status}")
    found += last.get("found", [])
    what = " ".join(last.get("call", []))
    homes = [("", home)]
    # The power fails: names are on the disk, what was not flushed is not. Worst is when the manifest is, and no bytes.
    dirty = last.get("dirty", [])
    if dirty := [name for name in dirty if os.path.basename(name) != MANIFEST_NAME] or dirty:
        after = home.with_name(home.name + "-cut")
        shutil.rmtree(after, ignore_errors=True)
        shutil.copytree(home, after)
        for name in dirty:
            path = after / name
            if path.exists() and not name.startswith("shm/") and path.name != ".arriving":
                path.write_bytes(bytes(path.stat().st_size))
        homes.append(("power cut: ", after))
    for label, place in homes:
        told, status = _in_child(lambda tell, place=place: _recover(operation, scene, place, tell))  # type: ignore[misc]
        last = told[-1] if told else {"found": [f"nothing was told, status {status}"]}
        found += [label + one for one in last.get("found", [last.get("crashed")])]
    return [f"{fault} {what}: {one}" for one in found]


def faults_for(calls: Sequence[Call], reads: int, *, all_of_them: bool) -> list[Fault]:
    """What can go wrong in these calls: shared memory may be full, and a disk may do anything.

    Without `all_of_them`: one kill and one error at each call, and of many equal ones in a row only the first and last.
    """
    found: list[Fault] = []
    for at, call in enumerate(calls, 1):
        alike = 1 < at < len(calls) and calls[at - 2] == call == calls[at]
        if alike and not all_of_them:
            continue
        kills = [Fault(at, "before")] + ([Fault(at, "torn")] if call.name == "write" else [])
        wrong: list[Fault] = []
        if call.name in SPACE:
            wrong += [Fault(at, "forever", errno.ENOSPC), Fault(at, "once", errno.EDQUOT)]
        if not call.path.startswith("shm/"):
            wrong += [Fault(at, "once", errno.EIO), Fault(at, "forever", errno.EIO), Fault(at, "forever", errno.EROFS)]
        found += [*kills, *wrong] if all_of_them else [kills[-1], *wrong[at % max(1, len(wrong)) :][:1]]
    if calls:
        found.append(Fault(len(calls), "after"))
    for at in range(1, reads + 1):
        wrong = [Fault(at, "once", errno.EIO, reads=True), Fault(at, "forever", errno.EIO, reads=True)]
        if all_of_them or at % 3 == 1:
            found += wrong if all_of_them else wrong[at % 2 :][:1]
    return found


def names_at_risk(calls: Sequence[Call]) -> list[str]:
    """Which names a power cut could still undo, or undo too late, although every call went well.

    A directory is flushed after a name in it was changed, and before what had that name is taken apart.
    """
    found: list[str] = []
    for at, call in enumerate(calls):
        if call.path.startswith("shm/") or not (call.name == "rename" or call.path.endswith("/.arriving")):
            continue
        if call.name not in ("rename", "unlink") or (call.path.startswith("store/incoming/") and not call.to):
            continue
        later = list(calls[at + 1 :])
        for parent in {os.path.dirname(name) for name in (call.path, call.to) if name} - {"store/incoming"}:
            flushed = next((n for n, one in enumerate(later) if (one.name, one.path) == ("fsync", parent)), None)
            taken = next(
                (n for n, one in enumerate(later) if one.name == "unlink" and one.path.startswith(call.to + "/")), None
            )
            if flushed is None:
                found.append(f"{parent} is not flushed after {call}")
            elif call.to.startswith("store/incoming/") and taken is not None and taken < flushed:
                found.append(f"{call.to} is deleted before {parent} is flushed")
    return found


def main(arguments: Sequence[str]) -> int:
    """See the module's text."""
    name, base = arguments[0], Path(arguments[1])
    operation, scene = OPERATIONS[name], make_scene(base)
    home = base / "case"
    shutil.copytree(base / operation.template, home)
    told, status = _in_child(lambda tell: _run_case(operation, scene, home, Fault(), tell))
    if status != 0 or told[-1]["found"]:
        print(json.dumps(f"without any fault: {told}"))
    calls = [Call(*call) for call in told[-1].get("calls", [])]
    for one in names_at_risk(calls):
        print(json.dumps(one))
    faults = faults_for(calls, told[-1].get("reads", 0), all_of_them="--all" in arguments)
    if "--calls" in arguments:
        for at, call in enumerate(calls, 1):
            print(at, *_flat(call))
        return 0
    for fault in faults:
        for one in run_case(operation, scene, home, fault):
            print(json.dumps(one), flush=True)
    print(json.dumps({"cases": len(faults), "calls": [_flat(call) for call in calls]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
