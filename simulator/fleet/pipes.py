"""Bandwidth that is shared: disks, network cards, the object store. Processor sharing, by priority. Pure.

A flow goes through one or more pipes. Each pipe gives its bandwidth in even shares to its flows of the most urgent
priority, and nothing to the others while such flows are there (as the store's mover does); a flow is as fast as the
least that its pipes give it. What a pipe gives to a flow that is slower elsewhere is not given to others.
"""

from __future__ import annotations

from typing import Final

from simulator.kernel import Call, Kernel, Timer

NEARLY: Final = 1e-3  # bytes: less than this is nothing


class Pipe:
    """A resource of `bytes_per_s`; `most_bytes_per_s` is what one flow gets at most (0: all of it)."""

    __slots__ = ("bytes_per_s", "flows", "most_bytes_per_s")

    def __init__(self, bytes_per_s: float, most_bytes_per_s: float = 0.0) -> None:
        self.bytes_per_s = bytes_per_s
        self.most_bytes_per_s = most_bytes_per_s
        self.flows: dict[Flow, None] = {}

    def share(self, priority: int) -> float:
        """What a flow of this priority gets now."""
        top, count = priority, 0
        for flow in self.flows:
            if flow.priority < top:
                return 0.0
            count += flow.priority == priority
        share = self.bytes_per_s / max(1, count)
        return min(share, self.most_bytes_per_s) if self.most_bytes_per_s else share


class Flow:
    """Bytes on their way through some pipes."""

    __slots__ = ("at", "began_at", "call", "left_bytes", "pipes", "priority", "rate", "size_bytes", "timer")

    def __init__(self, pipes: tuple[Pipe, ...], size_bytes: float, priority: int, now: float, call: Call) -> None:
        self.pipes = pipes
        self.size_bytes = self.left_bytes = size_bytes
        self.priority = priority
        self.began_at = self.at = now
        self.call = call
        self.rate = 0.0
        self.timer: Timer | None = None


class Plumbing:
    """Starts and stops flows; keeps the times at which they end."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def start(self, pipes: tuple[Pipe, ...], size_bytes: float, priority: int, call: Call) -> Flow:
        """Let bytes flow; `call` is called when the last has arrived."""
        flow = Flow(pipes, size_bytes, priority, self._kernel.now, call)
        for pipe in pipes:
            pipe.flows[flow] = None
        self._level(pipes)
        return flow

    def stop(self, flow: Flow) -> None:
        """It flows no more; `call` is not called. Idempotent."""
        if flow.timer is not None:
            flow.timer.cancel()
            flow.timer = None
        self._settle(flow)
        for pipe in flow.pipes:
            pipe.flows.pop(flow, None)
        self._level(flow.pipes)

    def urge(self, flow: Flow, priority: int) -> None:
        """It goes before or after others from now on."""
        if priority != flow.priority:
            flow.priority = priority
            self._level(flow.pipes)

    def done_bytes(self, flow: Flow) -> float:
        """What has arrived."""
        return flow.size_bytes - flow.left_bytes + flow.rate * (self._kernel.now - flow.at)

    def _settle(self, flow: Flow) -> None:
        now = self._kernel.now
        flow.left_bytes = max(0.0, flow.left_bytes - flow.rate * (now - flow.at))
        flow.at = now

    def _level(self, pipes: tuple[Pipe, ...]) -> None:
        """Who shares these pipes gets what is due now."""
        seen: dict[Flow, None] = {}
        for pipe in pipes:
            seen.update(pipe.flows)
        for flow in seen:
            rate = min(pipe.share(flow.priority) for pipe in flow.pipes)
            if rate == flow.rate and flow.timer is not None:
                continue
            self._settle(flow)
            flow.rate = rate
            if flow.timer is not None:
                flow.timer.cancel()
                flow.timer = None
            if rate > 0:
                flow.timer = self._kernel.after(flow.left_bytes / rate, lambda flow=flow: self._ended(flow))  # type: ignore[misc]

    def _ended(self, flow: Flow) -> None:
        flow.timer = None
        self.stop(flow)
        flow.left_bytes = 0.0
        flow.call()
