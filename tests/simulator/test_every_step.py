"""A fault at every step of a migration, enumerated: each packet of an undisturbed one is lost, doubled, or late beyond
every timeout; each process dies before and after each packet; then the same for the runs in which one message of the
hand-over was lost already. In each run the client gets exactly its stream, and nothing is left over anywhere.

What must hold at every moment is asserted inside (`simulator.clients`, and the cores' own invariants).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from shared.contracts.migration import MigrationOutcome
from simulator.clients import Outcome
from tests.simulator.one_migration import DELAY_S, KINDS, LATE_S, OneMigration, Plan, Sent, complete

FAULTS: dict[str, tuple[float, ...]] = {
    "lost": (),
    "doubled": (DELAY_S, DELAY_S + 0.05),
    "doubled late": (DELAY_S, DELAY_S + LATE_S),
    "late": (DELAY_S + LATE_S,),
}
PROTOCOL = KINDS - {"Migrate", "Migrating"}  # the command itself is the scheduler's to repeat
PROCESSES = ("w0", "w1", "g0")
# The longest wait of a client for a token (virtual seconds): in an undisturbed migration, and with one fault in it.
UNDISTURBED_GAP_S = 0.25  # five decode steps
MOST_GAP_S = 5.0
# The messages of the hand-over, and what comes after the loss of one of them: taking back, abandoning, finding out.
HAND_OVER = ("HandOver", "HandedOver", "Claim", "Claimed")


@cache
def undisturbed() -> OneMigration:
    migration = OneMigration()
    assert complete(migration.run())
    assert migration.outcomes == [MigrationOutcome.COMMITTED]
    return migration


@cache
def after_the_loss_of(kind: str) -> tuple[OneMigration, int]:
    """The run in which the first message of this kind is lost, and that message's number."""
    number = next(one.number for one in undisturbed().steps() if one.kind == kind)
    migration = OneMigration(Plan(delays_s={number: ()}))
    assert complete(migration.run())
    return migration, number


def packets(base: str) -> list[Sent]:
    if not base:
        return undisturbed().steps(PROTOCOL)
    migration, number = after_the_loss_of(base)
    return migration.steps(PROTOCOL, after=number)


def lost_before(base: str) -> dict[int, tuple[float, ...]]:
    return {after_the_loss_of(base)[1]: ()} if base else {}


def killing(base: str, one: Sent, victim: str, moment: str) -> OneMigration:
    """A run in which a process dies around a packet: before it is sent, while it is on its way, or once it is there."""
    plan = Plan(delays_s=lost_before(base))
    migration = OneMigration(plan)

    def now() -> None:
        if moment == "before":
            migration.kill(victim)
            if victim == one.source:
                plan.delays_s[one.number] = ()
        else:
            after_s = DELAY_S / 2 if moment == "during" else DELAY_S * 1.01
            migration.kernel.after(after_s, lambda: migration.kill(victim))

    plan.actions[one.number] = now
    return migration


def bases() -> Iterator[str]:
    yield ""
    yield from HAND_OVER


def test_an_undisturbed_migration_takes_rounds_and_one_hand_over() -> None:
    kinds = [one.kind for one in undisturbed().steps()]
    assert kinds.count("Round") >= 2
    assert [kinds.count(kind) for kind in HAND_OVER] == [1, 1, 1, 1]
    assert undisturbed().cluster.clients.streams["q1"].longest_gap_s < UNDISTURBED_GAP_S
    (ended,) = undisturbed().cluster.migrations_ended
    assert ended.rounds == kinds.count("Round")
    owners = {one.source for one in undisturbed().plan.sent if one.kind == "FrameBatch"}
    assert owners == {"w0", "w1"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("base", list(bases()))
def test_every_message_may_be_lost_doubled_or_late(base: str, fault: str) -> None:
    tried = 0
    for one in packets(base):
        migration = OneMigration(Plan(delays_s={**lost_before(base), one.number: FAULTS[fault]}))
        with failing(f"{fault}: {one}"):
            stream = migration.run()
            assert complete(stream), f"{stream.outcome}: {stream.failure}"
            # What gets lost in a migration is settled between source and destination; only lost tokens are resumed.
            assert stream.end is not None
            assert base or one.kind == "FrameBatch" or stream.end.ledger.recoveries == 0
            assert base or stream.longest_gap_s < MOST_GAP_S
        tried += 1
    assert tried > 5


@pytest.mark.parametrize("moment", ["before", "during", "after"])
@pytest.mark.parametrize("victim", PROCESSES)
@pytest.mark.parametrize("base", list(bases()))
def test_every_process_may_die_around_every_message(base: str, victim: str, moment: str) -> None:
    tried = 0
    for one in packets(base):
        migration = killing(base, one, victim, moment)
        with failing(f"{victim} dies {moment} {one}"):
            stream = migration.run()
            if victim == "g0":
                assert stream.outcome in (Outcome.COMPLETE, Outcome.GATEWAY_DIED)
            else:
                assert complete(stream), f"{stream.outcome}: {stream.failure}"
                assert stream.longest_gap_s < MOST_GAP_S
        tried += 1
    assert tried > 5


class failing:
    """Says which step it was."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(self._what)
