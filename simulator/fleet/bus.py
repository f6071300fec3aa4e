"""Messages between processes of the fleet: a delay, and by dice what is lost or late. Pure."""

from __future__ import annotations

from typing import Final

from simulator.kernel import Call, Dice, Kernel

CALL_TIMEOUT_S: Final = 2.0  # as `shared.subjects` says of LOAD, STOP and MIGRATE


class Bus:
    """`lost` and `late` are parts of messages, 0 once the trouble is over (`calm`)."""

    def __init__(self, kernel: Kernel, dice: Dice, *, delay_s: float, jitter_s: float) -> None:
        self._kernel: Final = kernel
        self._dice: Final = dice
        self._delay_s: Final = delay_s
        self._jitter_s: Final = jitter_s
        self.lost = self.late = self.late_s = 0.0
        self.losses = 0

    def calm(self) -> None:
        """No trouble from now on."""
        self.lost = self.late = 0.0

    @property
    def way_s(self) -> float:
        """A message's way on the average."""
        return self._delay_s + 0.5 * self._jitter_s

    def tell(self, call: Call) -> bool:
        """Send something that may be lost; whether it was sent."""
        delay_s = self._way_s()
        if delay_s is None:
            self.losses += 1
            return False
        self._kernel.after(delay_s, call)
        return True

    def sure(self, call: Call) -> None:
        """Send something whose loss is repaired by who sends it (a queue, a stream): it comes, perhaps late."""
        delay_s = self._way_s()
        self._kernel.after(self._late() if delay_s is None else delay_s, call)

    def ask(self, call: Call, lost: Call) -> None:
        """Send a command whose answer is waited for: `lost` is called after the timeout if it did not arrive."""
        if not self.tell(call):
            self._kernel.after(CALL_TIMEOUT_S, lost)

    def _way_s(self) -> float | None:
        delay_s = self._delay_s + self._jitter_s * self._dice.random()
        if self.lost or self.late:
            luck = self._dice.random()
            if luck < self.lost:
                return None
            if luck < self.lost + self.late:
                return delay_s + self._late()
        return delay_s

    def _late(self) -> float:
        return self.late_s * self._dice.random()
