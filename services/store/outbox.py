"""What one event brings about: the actions in their order, gathered by the parts of the core. Pure."""

from __future__ import annotations

from services.store.events import Action, Answer, Facts, Message, Note, ReplyHandle, SavePool, TouchRecord
from services.store.pool_state import PoolState


class Outbox:
    """Collects the actions of one event; `now` is the event's monotonic second.

    Parts say that the record or the pool's state have changed as often as they like; each goes out once, and the
    pool's state first: what it claims must be true before anybody is told and before any chunk is written to.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._actions: list[Action] = []
        self._touched = False
        self._pool_changed = False

    def open(self, now: float) -> None:
        """An event begins. What the constructor has left here goes out with the first one."""
        self.now = now

    def add(self, action: Action) -> None:
        """Want this done, after what was wanted before."""
        self._actions.append(action)

    def answer(self, reply: ReplyHandle, message: Message) -> None:
        """Answer a call."""
        self._actions.append(Answer(reply, message))

    def note(self, event: str, facts: Facts) -> None:
        """Something for the log."""
        self._actions.append(Note(event, facts))

    def touch(self) -> None:
        """The server's record changed."""
        self._touched = True

    def save_pool(self) -> None:
        """What the pool holds for its next life changed."""
        self._pool_changed = True

    @property
    def pool_changed(self) -> bool:
        """Whether a state is to be saved."""
        return self._pool_changed

    def close(self, state: PoolState | None) -> list[Action]:
        """The event is over: its actions. `state` is the pool's when it has changed."""
        actions = self._actions if state is None else [SavePool(state), *self._actions]
        if self._touched:
            actions.append(TouchRecord())
        self._actions, self._touched, self._pool_changed = [], False, False
        return actions
