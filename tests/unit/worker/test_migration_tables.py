"""The tables of a migration by themselves, and the two machines composed with a gateway's epochs in every possible way.

The composition is explored exhaustively: messages may be lost, late and doubled without end (what was sent may arrive
at any time, any number of times, until all that is on its way is lost), timers may fire at any time, and source or
destination may die.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final, TypeVar

import pytest

from services.worker.incoming import EXPIRES_S
from services.worker.migration import (
    DESTINATION,
    DESTINATION_BEGIN,
    DESTINATION_FINAL,
    SOURCE,
    SOURCE_BEGIN,
    SOURCE_FINAL,
    SOURCE_FROZEN,
    DestinationEffect,
    DestinationInput,
    DestinationState,
    SourceEffect,
    SourceInput,
    SourceState,
)
from shared.subjects import HAND_OVER, ROUND

S, SI, SE = SourceState, SourceInput, SourceEffect
D, DI, DE = DestinationState, DestinationInput, DestinationEffect
Table = Mapping[tuple[Any, Any], tuple[Any, tuple[Any, ...]]]

# -- each table by itself ---------------------------------------------------------------------------------------------

# What ends a state in which nothing is heard any more, and the timer that sees to it. No loss of messages leaves a
# machine where it is.
SOURCE_TIMERS: Final = {
    S.QUEUED: (SI.TURN, "the end of the migrations before it, each of which ends"),
    S.ROUND: (SI.ROUND_FAILED, "the ROUND call's timeout"),
    S.LAST_TOKEN: (SI.TOKEN_SENT, "two intervals of its tokens"),
    S.HANDOVER: (SI.HAND_OVER_FAILED, "the HAND_OVER call's timeout"),
    # The claim is repeated until the gateway answers; one that never does is found dead by HOLDS (gateway_lost_s).
    S.RECLAIM: (SI.OVER, "the gateway_lost_s of HOLDS"),
}
DESTINATION_TIMERS: Final = {
    D.PREFILL: (DI.EXPIRED, "EXPIRES_S since the source's last word"),
    D.WAITING: (DI.EXPIRED, "EXPIRES_S since the source's last word"),
    D.CLAIMING: (DI.REFUSED, "the CLAIM call's timeout, after CLAIM_RETRIES_S"),
}
MACHINES: Final = [
    pytest.param(SOURCE, SOURCE_BEGIN, SOURCE_FINAL, S, SOURCE_TIMERS, id="source"),
    pytest.param(DESTINATION, DESTINATION_BEGIN, DESTINATION_FINAL, D, DESTINATION_TIMERS, id="destination"),
]


@pytest.mark.parametrize(("table", "begin", "final", "states", "timers"), MACHINES)
class TestTable:
    def test_every_state_is_reached(self, table: Table, begin: Any, final: Any, states: Any, timers: Any) -> None:
        reached, left = {begin[0]}, [begin[0]]
        while left:
            state = left.pop()
            for (at, _), (to, _) in table.items():
                if at is state and to not in reached:
                    reached.add(to)
                    left.append(to)
        assert reached == set(states)

    def test_final_states_have_no_way_out_and_all_others_end(
        self, table: Table, begin: Any, final: Any, states: Any, timers: Any
    ) -> None:
        assert not [at for at, _ in table if at in final]
        for state in set(states) - final:
            reached, left = {state}, [state]
            while left:
                now = left.pop()
                for (at, _), (to, _) in table.items():
                    if at is now and to not in reached:
                        reached.add(to)
                        left.append(to)
            assert reached & final, f"{state} never ends"

    def test_a_timer_leads_out_of_every_state(
        self, table: Table, begin: Any, final: Any, states: Any, timers: Any
    ) -> None:
        assert set(timers) == set(states) - final
        for state, (what, timer) in timers.items():
            to, _ = table[state, what]
            assert to is not state, f"{timer} changes nothing in {state}"
        # What a timer leads to is left by another one, so silence alone ends the machine.
        state, steps = begin[0], 0
        while state not in final:
            state, steps = table[state, timers[state][0]][0], steps + 1
            assert steps <= len(states)

    def test_every_input_matters_somewhere(
        self, table: Table, begin: Any, final: Any, states: Any, timers: Any
    ) -> None:
        inputs = SI if states is S else DI
        assert {what for _, what in table} == {*inputs}


def test_a_source_that_is_frozen_never_ends_without_knowing_who_owns_the_request() -> None:
    """It thaws only with a claim granted; it lets go only when told that somebody else owns the request."""
    for (at, what), (_, effects) in SOURCE.items():
        if SE.THAW in effects:
            assert (at, what) == (S.RECLAIM, SI.RECLAIMED)
        if SE.LET_GO in effects:
            assert at in SOURCE_FROZEN
            assert what in (SI.HANDED_OVER, SI.SUPERSEDED)
        if SE.FREEZE in effects:
            assert at not in SOURCE_FROZEN


def test_a_destination_begins_to_emit_with_a_granted_claim_only_and_frees_its_slot_exactly_when_it_does_not() -> None:
    for (at, what), (to, effects) in DESTINATION.items():
        assert (DE.BEGIN in effects) == ((at, what) == (D.CLAIMING, DI.CLAIMED)) == (to is D.OWNER)
        assert (DE.FREE in effects) == (to is D.GONE)


def test_who_hands_over_hears_how_it_went_and_who_asked_for_a_round_too() -> None:
    for (at, what), (to, effects) in DESTINATION.items():
        if at is D.CLAIMING:
            assert (DE.ANSWER_HAND_OVER in effects) != (DE.REFUSE_HAND_OVER in effects)
        if at is D.PREFILL and to is D.GONE and what is not DI.ABANDONED and what is not DI.EXPIRED:
            assert DE.REFUSE_ROUND in effects


def test_a_destination_waits_for_longer_than_a_source_may_be_silent() -> None:
    # Two rounds' or hand-overs' timeouts, each repeated once, fit into it.
    assert 2 * (ROUND.timeout_s + 1.0) < EXPIRES_S
    assert 2 * HAND_OVER.timeout_s < EXPIRES_S


# -- source × destination × gateway -----------------------------------------------------------------------------------

MOST_ROUNDS: Final = 2
FIRST_EPOCH: Final = 1


class Who(StrEnum):
    """Owners. `OTHER`: whoever the queue hands a request to whose owner was lost."""

    SOURCE = "source"
    DESTINATION = "destination"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class State:
    """The whole of it. `sent` is everything that was sent and is not lost: it may arrive at any time, and again.

    `source_runs` and `destination_runs`: the request is in that worker, at this epoch (the destination's after its
    claim). `streaming`: the gateway believes in its `owner`. `granted` are the claims with an id that it granted.
    """

    source: SourceState = SOURCE_BEGIN[0]
    number: int = 0
    source_runs: bool = True
    source_epoch: int = FIRST_EPOCH
    source_alive: bool = True
    destination: DestinationState | None = None
    destination_number: int = 0
    destination_runs: bool = False
    destination_epoch: int = 0
    destination_alive: bool = True
    epoch: int = FIRST_EPOCH
    owner: Who = Who.SOURCE
    streaming: bool = True
    granted: frozenset[tuple[Who, int]] = frozenset()
    over: bool = False
    sent: frozenset[str] = frozenset()

    @property
    def emitters(self) -> list[Who]:
        """Those whose frames the gateway accepts now."""
        if self.over or not self.streaming:
            return []
        found = [Who.OTHER] if self.owner is Who.OTHER else []
        if self.source_alive and self.source_runs and self.source not in SOURCE_FROZEN:
            found += [Who.SOURCE] if self.source_epoch == self.epoch else []
        if self.destination_alive and self.destination_runs:
            found += [Who.DESTINATION] if self.destination_epoch == self.epoch else []
        return found

    @property
    def cleared(self) -> bool:
        """Nobody holds anything of it any more."""
        source = not self.source_alive or (not self.source_runs and self.source in SOURCE_FINAL)
        landing = self.destination not in (None, *DESTINATION_FINAL)
        return source and (not self.destination_alive or not (self.destination_runs or landing))

    def send(self, *messages: str) -> State:
        """Once sent, it may arrive."""
        return replace(self, sent=self.sent | frozenset(messages))


def source_input(state: State, what: SourceInput, table: Table = SOURCE) -> State:
    """The source's machine makes a step, and its effects follow."""
    row = table.get((state.source, what))
    if row is None or not state.source_alive:
        return state
    state = replace(state, source=row[0])
    for effect in row[1]:
        match effect:
            case SE.SEND_ROUND:
                state = replace(state, number=state.number + 1).send(f"round {state.number + 1}")
            case SE.HAND_OVER:
                state = state.send(f"hand over after {state.number}")
            case SE.RECLAIM:
                state = state.send("claim back")
            case SE.THAW:
                epochs = [epoch for who, epoch in state.granted if who is Who.SOURCE]
                assert epochs, "thawed without a claim"
                state = replace(state, source_epoch=epochs[0])
            case SE.ABANDON:
                state = state.send("abandon")
            case SE.LET_GO:
                state = replace(state, source_runs=False)
    if what is SI.OVER:
        state = replace(state, source_runs=False)
    return state


def destination_input(state: State, what: DestinationInput, table: Table = DESTINATION) -> State:
    """The destination's machine makes a step, and its effects follow."""
    row = table.get((state.destination, what))
    if row is None or not state.destination_alive:
        return state
    state = replace(state, destination=row[0])
    for effect in row[1]:
        match effect:
            case DE.ANSWER_ROUND:
                state = state.send(f"round {state.destination_number} done")
            case DE.REFUSE_ROUND:
                state = state.send("round refused")
            case DE.CLAIM:
                state = state.send("claim")
            case DE.BEGIN:
                epochs = [epoch for who, epoch in state.granted if who is Who.DESTINATION]
                assert epochs, "begun without a claim"
                state = replace(state, destination_runs=True, destination_epoch=epochs[0])
            case DE.ANSWER_HAND_OVER:
                state = state.send("handed over")
            case DE.REFUSE_HAND_OVER:
                state = state.send("hand over refused")
    return state


def claim(state: State, who: Who) -> State:
    """The gateway judges a claim after the first epoch: the same again, a grant, or stale."""
    again = [epoch for claimant, epoch in state.granted if claimant is who]
    to = "the source" if who is Who.SOURCE else "the destination"
    if state.over:
        return state.send(f"gone to {to}")
    if again:
        same = again[0] == state.epoch and state.owner is who and state.streaming
        return state.send(f"{'claimed' if same else 'stale'} to {to}")
    if state.epoch != FIRST_EPOCH or not state.streaming:
        return state.send(f"stale to {to}")
    granted = state.granted | {(who, state.epoch + 1)}
    return replace(state, epoch=state.epoch + 1, owner=who, granted=granted).send(f"claimed to {to}")


def arrivals(state: State) -> Iterator[State]:
    """Everything that was sent may arrive now."""
    for message in state.sent:
        match message.split():
            case ["round", number, "done"] if int(number) == state.number:
                yield source_input(state, SI.ROUND_DONE_NEAR)
                if state.number < MOST_ROUNDS:
                    yield source_input(state, SI.ROUND_DONE_FAR)
            case ["round", "refused"]:
                yield source_input(state, SI.ROUND_FAILED)
            case ["round", number]:
                yield round_arrives(state, int(number))
            case ["hand", "over", "after", number]:
                if state.destination is not None and state.destination_number == int(number):
                    yield destination_input(state, DI.HAND_OVER)
                elif state.destination is not D.CLAIMING:  # tokens are missing, or nothing is known of it
                    yield state.send("hand over refused")
            case ["hand", "over", "refused"]:
                yield source_input(state, SI.HAND_OVER_FAILED)
            case ["handed", "over"]:
                yield source_input(state, SI.HANDED_OVER)
            case ["abandon"]:
                yield destination_input(state, DI.ABANDONED)
            case ["claim"]:
                yield claim(state, Who.DESTINATION)
            case ["claim", "back"]:
                yield claim(state, Who.SOURCE)
            case ["claimed", "to", "the", "destination"]:
                yield destination_input(state, DI.CLAIMED)
            case [_, "to", "the", "destination"]:
                yield destination_input(state, DI.REFUSED)
            case ["claimed", "to", "the", "source"]:
                yield source_input(state, SI.RECLAIMED)
            case ["stale", "to", "the", "source"]:
                if state.source is S.RECLAIM:
                    yield source_input(state, SI.SUPERSEDED)
            case ["gone", "to", "the", "source"]:
                if state.source is S.RECLAIM:
                    yield source_input(state, SI.OVER)


def round_arrives(state: State, number: int) -> State:
    known = state.destination not in (None, *DESTINATION_FINAL)
    if not state.destination_alive:
        return state
    if known:
        if number == state.destination_number + 1:
            return destination_input(replace(state, destination_number=number), DI.ROUND)
        return state
    if number == 1 and not state.destination_runs:
        return replace(state, destination=DESTINATION_BEGIN[0], destination_number=1)
    return state.send("round refused")


def happenings(state: State, *, deaths: bool, ends: bool) -> Iterator[State]:
    """Timers, failures and words of the gateway that need no message of the migration. Each may come at any time."""
    for what in (SI.TURN, SI.TOKEN_SENT, SI.ROUND_FAILED, SI.HAND_OVER_FAILED):
        yield source_input(state, what)
    for outcome in (DI.PREFILLED, DI.PREFILL_FAILED, DI.EXPIRED, DI.LEAVING):
        yield destination_input(state, outcome)
    if state.sent:  # everything that is on its way is lost
        yield replace(state, sent=frozenset())
    # Claims that are not answered are repeated: by the source for ever, by the destination a few times.
    if state.source is S.RECLAIM and state.source_alive:
        yield state.send("claim back")
    if state.destination is D.CLAIMING and state.destination_alive:
        yield state.send("claim")
    yield destination_input(state, DI.REFUSED)
    # Whoever speaks or reports (HOLDS) with an older epoch is told that he is superseded; after the end, that it ended.
    if state.source_alive and state.source_runs and (state.over or state.source_epoch < state.epoch):
        if state.source in SOURCE_FROZEN and not state.over:
            yield source_input(state, SI.SUPERSEDED)
        else:
            yield replace(source_input(state, SI.OVER), source_runs=False)
    if state.destination_runs and (state.over or state.destination_epoch < state.epoch):
        yield replace(state, destination_runs=False)
    # CHECK: an owner that does not run the request (dead or alive) has lost it; one that may be claiming has not.
    if state.streaming and not state.over and lost(state):
        yield replace(state, streaming=False)
    if not state.streaming and not state.over:
        yield replace(state, streaming=True, owner=Who.OTHER, epoch=state.epoch + 1)
    if deaths and state.source_alive and state.destination_alive:
        yield replace(state, source_alive=False)
        yield replace(state, destination_alive=False)
    if ends and state.emitters:
        yield replace(state, over=True)


def lost(state: State) -> bool:
    match state.owner:
        case Who.SOURCE:
            return not (state.source_alive and state.source_runs)
        case Who.DESTINATION:
            claiming = state.destination is D.CLAIMING
            return not (state.destination_alive and (state.destination_runs or claiming))
        case Who.OTHER:
            return False


Graph = dict[State, frozenset[State]]
T = TypeVar("T")


def explore(*, deaths: bool, ends: bool) -> Graph:
    """Every state that can be reached, with what can follow."""
    begin = State()
    graph: Graph = {}
    left = deque([begin])
    seen = {begin}
    while left:
        state = left.popleft()
        following = frozenset(itertools.chain(arrivals(state), happenings(state, deaths=deaths, ends=ends))) - {state}
        graph[state] = following
        for one in following - seen:
            seen.add(one)
            left.append(one)
    return graph


def closed_sets(graph: Graph) -> list[list[State]]:
    """The sets of states that are never left again: the sinks among the strongly connected components (Tarjan, 1972).

    If nothing that can happen is kept from happening for ever, every history ends in one of them.
    """
    index: dict[State, int] = {}
    low: dict[State, int] = {}
    stack: list[State] = []
    on_stack: set[State] = set()
    found: list[list[State]] = []
    for root in graph:
        if root in index:
            continue
        work = [(root, iter(graph[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            state, following = work[-1]
            descended = False
            for one in following:
                if one not in index:
                    index[one] = low[one] = len(index)
                    stack.append(one)
                    on_stack.add(one)
                    work.append((one, iter(graph[one])))
                    descended = True
                    break
                if one in on_stack:
                    low[state] = min(low[state], index[one])
            if descended:
                continue
            work.pop()
            if work:
                low[work[-1][0]] = min(low[work[-1][0]], low[state])
            if low[state] == index[state]:
                component: list[State] = []
                while True:
                    one = stack.pop()
                    on_stack.discard(one)
                    component.append(one)
                    if one == state:
                        break
                members = set(component)
                if all(graph[one] <= members for one in component):
                    found.append(component)
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["all live", "one may die"])
def histories(request: pytest.FixtureRequest) -> Graph:
    return explore(deaths=request.param, ends=False)


@pytest.fixture(scope="module")
def ending() -> Graph:
    return explore(deaths=True, ends=True)


def test_never_are_two_emitters_accepted(histories: Graph) -> None:
    assert len(histories) > 1000
    assert max(len(state.emitters) for state in histories) == 1


def test_no_epoch_has_two_owners(histories: Graph) -> None:
    for state in histories:
        epochs = [epoch for _, epoch in state.granted]
        assert len(set(epochs)) == len(epochs)


def test_never_is_nobody_accepted_for_ever(histories: Graph) -> None:
    """Wherever a history has got to, and whatever was lost on the way: in the end somebody emits, and goes on."""
    final = closed_sets(histories)
    assert final
    for states in final:
        for state in states:
            assert len(state.emitters) == 1, state


def test_both_ends_are_reached(histories: Graph) -> None:
    owners = {states[0].owner for states in closed_sets(histories)}
    assert owners == {Who.SOURCE, Who.DESTINATION, Who.OTHER}


def test_after_the_end_of_the_request_nobody_holds_anything(ending: Graph) -> None:
    final = closed_sets(ending)
    assert final
    for states in final:
        # A first round that arrives again and again begins a landing that expires again and again; nothing else lasts.
        assert all((state.over and state.cleared) or "round 1" in state.sent for state in states)
        assert any(state.over and state.cleared for state in states), states[0]


@pytest.mark.parametrize(
    ("row", "broken"),
    [
        pytest.param((S.HANDOVER, SI.HAND_OVER_FAILED), (S.HANDOVER, ()), id="waits for ever for an answer"),
        pytest.param((S.ROUND, SI.ROUND_DONE_NEAR), (S.RECLAIM, (SE.FREEZE,)), id="freezes and tells nobody"),
    ],
)
def test_a_wrong_table_would_be_noticed(row: Any, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a table that is wrong, histories end with nobody who emits, or never with a destination that does."""
    monkeypatch.setattr(source_input, "__defaults__", ({**SOURCE, row: broken},))
    final = [state for states in closed_sets(explore(deaths=False, ends=False)) for state in states]
    stuck = [state for state in final if not state.emitters]
    assert stuck or Who.DESTINATION not in {state.owner for state in final}
