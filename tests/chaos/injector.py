"""Faults that happen to a running fleet: each begins, lasts, and is undone."""

from __future__ import annotations

import heapq
import itertools
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.builders.fleet import Fleet
from tests.builders.streams import Stream
from tests.chaos.plan import CUT, DRAIN, END, KILL, MIGRATE, STOP, Fault

TERM_S = 45.0  # a service that is told to end does so within this
UNDRAIN_S = 60.0  # a worker hears within this that it may take work again, whatever else is away meanwhile
ASK_S = 2.0  # nobody waits longer for a word of a gateway: the faults have to end in time


@dataclass
class Happened:
    """A fault with its monotonic times, and the streams that it hit: the victim's, or all if everybody needs it."""

    fault: Fault
    began: float
    hit: list[Stream] = field(default_factory=list)
    undone: float = 0.0
    result: str = ""


class Injector:
    """Carries out a plan. One fault per process at a time, `at_once` in all, one gateway at a time.

    `complaints` are things that nobody did: a service that ended by itself, one that did not end when it was told to.
    """

    def __init__(
        self, fleet: Fleet, plan: Iterator[Fault], streams: Callable[[], list[Stream]], *, seed: int, at_once: int
    ) -> None:
        self.happened: list[Happened] = []
        self.complaints: list[str] = []
        self._fleet, self._plan, self._streams, self._at_once = fleet, plan, streams, at_once
        self._dice = random.Random(f"moves {seed}")
        self._busy: dict[str, Happened] = {}
        self._undo: list[tuple[float, int, Happened]] = []
        self._numbers = itertools.count()
        self._moves: list[threading.Thread] = []

    def usable(self, gateway: str) -> bool:
        """Whether nothing is being done to this gateway."""
        return gateway not in self._busy

    def was_killed(self, gateway: str, after: float, before: float) -> bool:
        """Whether this gateway was killed in this span of monotonic time."""
        return any(
            one.fault.victim == gateway and one.fault.kind == KILL and after <= one.began <= before
            for one in self.happened
        )

    def run(self, seconds: float, *, over: Callable[[], bool] = lambda: False) -> None:
        """Let things go wrong for so long, then undo everything."""
        began = time.monotonic()
        coming = next(self._plan)
        while time.monotonic() < began + seconds and not over():
            now = time.monotonic()
            self._undo_due(now)
            if now - began >= coming.at_s:
                if self._possible(coming):
                    self._do(coming)
                coming = next(self._plan)
            self._look()
            time.sleep(0.05)
        while self._undo:
            self._undo_due(float("inf"))
            time.sleep(0.05)
        for thread in self._moves:
            thread.join(60)

    def _possible(self, fault: Fault) -> bool:
        if fault.kind == MIGRATE:
            return len(self._moves) < 10_000
        taken = [one.fault for one in self._busy.values()]
        if fault.victim in self._busy or len(taken) >= self._at_once or not self._fleet.running(fault.victim):
            return False
        if fault.kind in (END, DRAIN) and not self._is_ready(fault.victim):
            return False  # one that starts is busy importing, and hears of it after that
        return fault.service != "gateway" or all(one.service != "gateway" for one in taken)

    def _is_ready(self, worker: str) -> bool:
        status, view = self._fleet.call("GET", "/v1/admin/cluster", timeout_s=ASK_S, gateway=self._calls())
        workers = view.get("workers", []) if status == 200 else []
        return any(one["worker_id"] == worker and one["phase"] == "ready" for one in workers)

    def _do(self, fault: Fault) -> None:
        fleet, name = self._fleet, fault.victim
        happened = Happened(fault, time.monotonic())
        if fault.kind == MIGRATE:
            self._begin_move(happened)
            return
        happened.hit = self._hit(fault)
        happened.began = time.monotonic()
        self.happened.append(happened)
        self._busy[name] = happened
        match fault.kind:
            case "kill":
                fleet.kill(name)
            case "stop":
                fleet.kill(name, signal.SIGSTOP)
            case "cut":
                fleet.links[name].cut()
            case "end":
                fleet.kill(name, signal.SIGTERM)
            case "drain":
                happened.result = str(self._drain(name, on=True))
        heapq.heappush(self._undo, (happened.began + fault.lasts_s, next(self._numbers), happened))

    def _hit(self, fault: Fault) -> list[Stream]:
        streams = self._streams()
        if fault.service in ("nats", "redis"):
            return streams
        if fault.service == "gateway":
            return [stream for stream in streams if stream.url == self._fleet.urls[fault.victim]]
        if fault.service == "worker":
            mine = {one["request_id"][:24] for one in self._requests() if one["worker_id"] == fault.victim}
            return [stream for stream in streams if stream.heard.request_id in mine]
        return streams  # nobody should notice

    def _requests(self) -> list[dict[str, Any]]:
        for gateway in self._fleet.named("gateway"):
            if self.usable(gateway) and (found := self._fleet.requests(gateway, ASK_S)):
                return found
        return []

    def _calls(self) -> str:
        return next((name for name in self._fleet.named("gateway") if self.usable(name)), "gateway")

    def _drain(self, worker: str, *, on: bool) -> int:
        path, body = f"/v1/admin/workers/{worker}/drain", {"on": on, "wait_s": 0}
        return self._fleet.call("POST", path, body, timeout_s=ASK_S, gateway=self._calls())[0]

    def _begin_move(self, happened: Happened) -> None:
        running = self._requests()
        if not running:
            return
        chosen = self._dice.choice(running)
        to = self._dice.choice([name for name in self._fleet.named("worker") if name != chosen["worker_id"]])
        gateway = self._calls()

        def move() -> None:
            path = f"/v1/admin/requests/{chosen['request_id']}/migrate"
            status, body = self._fleet.call("POST", path, {"to": to}, timeout_s=90, gateway=gateway)
            outcome = body.get("migrated", {}).get("outcome") if status == 200 else None
            error = (body or {}).get("error", {})
            happened.result = outcome or f"{status} {error.get('code', '')}"
            happened.undone = time.monotonic()

        self.happened.append(happened)
        self._moves.append(threading.Thread(target=move, daemon=True))
        self._moves[-1].start()

    def _undo_due(self, now: float) -> None:
        due = [one for one in self._undo if one[0] <= now]
        self._undo = [one for one in self._undo if one[0] > now]
        heapq.heapify(self._undo)
        for _, _, happened in sorted(due):
            fault, name = happened.fault, happened.fault.victim
            match fault.kind:
                case "kill":
                    self._fleet.restart(name)
                case "stop":
                    self._fleet.kill(name, signal.SIGCONT)
                case "cut":
                    self._fleet.links[name].heal()
                case "end":
                    if self._fleet.running(name):
                        if time.monotonic() < happened.began + TERM_S:
                            self._undo_later(happened)
                            continue
                        self.complaints.append(f"{name} has not ended {TERM_S:.0f} s after it was told to")
                        self._fleet.kill(name)
                    self._fleet.restart(name)
                case "drain":
                    status = self._drain(name, on=False)
                    happened.result = f"{happened.result.split()[0]} {status}"
                    if status != 200:  # what it takes to be told is away just now
                        if time.monotonic() < happened.began + fault.lasts_s + UNDRAIN_S:
                            self._undo_later(happened)
                            continue
                        self.complaints.append(f"{name} cannot be told to take work again: {status}")
            happened.undone = time.monotonic()
            del self._busy[name]

    def _undo_later(self, happened: Happened) -> None:
        heapq.heappush(self._undo, (time.monotonic() + 0.5, next(self._numbers), happened))

    def _look(self) -> None:
        for name, process in self._fleet.processes.items():
            if name in self._busy or process.poll() is None:
                continue
            if process.returncode != 1 or not self._had_no_servers(name):
                self.complaints.append(f"{name} ended by itself with {process.returncode}")
            self._fleet.start(name)

    def _had_no_servers(self, name: str) -> bool:
        """Whether it ended as NATS or Redis was away just when it started: its supervisor starts it again, as here."""
        last = self._fleet.log(name).splitlines()[-1:]
        return any('"service.failed"' in line and '"unavailable"' in line for line in last)


__all__ = ["CUT", "DRAIN", "END", "KILL", "MIGRATE", "STOP", "Happened", "Injector"]
