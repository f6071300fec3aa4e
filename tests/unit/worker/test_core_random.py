"""Thousands of random histories: whatever happens in whatever order, nothing leaks and each request ends once.

A failing seed is printed by pytest; `-k "[seed]"` replays it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from services.worker import events as e
from services.worker.ports import EndReason, EngineDied, EngineEvent, SequenceEnd, StepToken
from shared.contracts.generation import End, Frame
from shared.contracts.migration import (
    AbandonRound,
    HandedOver,
    HandOver,
    Migrate,
    Round,
    RoundDone,
    RoundPending,
)
from shared.contracts.placement import StopReplica
from shared.contracts.records import ReplicaState
from shared.contracts.requests import Cancel, Claimed, Gone, Request, Sampling, Unwanted
from shared.contracts.residency import Arrival, Lease, Progress, Renewed
from shared.errors import Code, Failure
from tests.unit.worker.world import EOS, FakeLoaded, FakePuller, World, lease, load, request

FAILURE = Failure(code=Code.UNAVAILABLE, message="Nobody is there.")
REFUSAL = Failure(code=Code.CHECKPOINT_CORRUPT, message="It is broken.")


class History:
    """A worker, and everything around it played by dice."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        on_device = seed % 3 == 0  # weights copied to the device: more memory, and no lease after the load
        self.world = World(memory_total_bytes=3035 if on_device else 35, weights_on_device=on_device, drain_s=20)
        self.pending: list[e.Action] = []
        self.wanted: Counter[str] = Counter()
        self.pullers: dict[int, str] = {}
        self.live: dict[str, str] = {}
        self.dead: set[str] = set()
        self.granted: list[str] = []
        self.released: list[str] = []
        self.deliveries: list[str] = []
        self.settled: Counter[str] = Counter()
        self.void: set[str] = set()
        self.requests: list[Request] = []
        self.epochs: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        self.next_index: dict[tuple[str, int], int] = {}
        self.ended: set[tuple[str, int]] = set()
        self.drained = 0
        self.away = False
        self.unserved = False  # the gateway that was asked last
        self.stopped: set[str] = set()
        self.replicas = 0
        self.migrated = 0
        self.refused = 0
        self.handed: set[str] = set()
        self.owned: set[str] = set()
        self.arriving: dict[str, tuple[int, int]] = {}
        self.kept: list[FakePuller] = []  # so that ids stay unique

    def send(self, event: e.Event | None) -> None:
        for action in self.world.send(event):
            self.carry_out(action)

    def carry_out(self, action: e.Action) -> None:
        match action:
            case e.SubmitSequence():
                assert action.sequence_id not in self.live, "submitted twice"
                assert action.max_new_tokens > 0
                self.live[action.sequence_id] = next(
                    owner.replica.id
                    for owner in (*self.world.core.runs.values(), *self.world.core.incoming.landings.values())
                    if owner.sequence_id == action.sequence_id
                )
            case e.CancelSequence():
                pass  # the engine goes on for a while; what it says finds nobody
            case e.Ack() | e.Nak():
                self.settled[action.token] += 1
            case e.Want():
                self.wanted[self.pullers[id(action.puller)]] += action.requests
            case e.ReleaseLease():
                self.released.append(action.message.lease_id)
            case e.RequestFinished():
                if action.outcome == "superseded" or (action.outcome == "gateway_lost" and not self.unserved):
                    self.void.add(action.request_id)
                elif action.outcome == "migrated":
                    self.migrated += 1
                elif action.request_id in self.handed and action.request_id not in self.owned:
                    self.refused += 1  # never ours: its source settles with the queue
            case e.PublishFrames():
                for item in action.batch.items:
                    self.hear(item)
            case e.Drained():
                self.drained += 1
            case e.StopAttach():
                assert action.replica_id not in self.stopped, "stopped twice"
                self.stopped.add(action.replica_id)
            case e.AllowEngine():
                assert action.until > self.world.now - 60
            case _ if isinstance(action, e.LONG):
                self.pending.append(action)
            case _:
                pass

    def hear(self, item: Frame | End) -> None:
        """What a gateway checks: the order of the indices, and one end."""
        key = (item.request_id, item.epoch)
        assert item.index == self.next_index[key], "a gap or a repeat"
        assert key not in self.ended, "something after the end"
        if isinstance(item, Frame):
            self.next_index[key] += len(item.token_ids)
        else:
            self.ended.add(key)
            assert (item.reason is None) != (item.failure is None)

    # -- what may happen

    def ask_load(self) -> None:
        self.replicas += 1
        replica_id = f"r{self.dice.randrange(max(1, self.replicas - 2), self.replicas + 1)}"
        self.send(e.LoadAsked(load(replica_id), lambda answer: None))

    def ask_stop(self) -> None:
        if self.world.core.replicas:
            replica_id = self.dice.choice(list(self.world.core.replicas))
            drain, abort = self.dice.random() < 0.5, self.dice.random() < 0.2
            message = StopReplica(replica_id=replica_id, reason="dice", drain=drain, abort=abort)
            self.send(e.StopAsked(message, lambda answer: None))

    def deliver(self) -> None:
        ready = [replica_id for replica_id, count in self.wanted.items() if count > 0]
        if not ready:
            return
        replica_id = self.dice.choice(ready)
        self.wanted[replica_id] -= 1
        if self.requests and self.dice.random() < 0.3:
            asked = self.dice.choice(self.requests)
        else:
            sampling = Sampling(max_tokens=self.dice.choice([1, 3, 50, None]), stop=("bc",))
            asked = request(f"q{len(self.requests)}", gateway_id=self.dice.choice(["g1", "g2"]), sampling=sampling)
            self.requests.append(asked)
        self.delivered[asked.request_id] += 1
        token = f"t{len(self.deliveries)}"
        self.deliveries.append(token)
        self.send(e.DeliveryArrived(replica_id, asked, token, self.delivered[asked.request_id]))

    def step(self) -> None:
        engines = sorted({replica_id for replica_id in self.live.values() if replica_id not in self.dead})
        if not engines:
            return
        replica_id = self.dice.choice(engines)
        steps: list[EngineEvent] = []
        mine = [sequence_id for sequence_id, owner in self.live.items() if owner == replica_id]
        died = self.dice.random() < 0.03
        for sequence_id in mine:
            steps.append(StepToken(sequence_id, self.dice.choice([97, 98, 99, 1, EOS])))
            end = self.dice.random()
            if died:
                steps.append(SequenceEnd(sequence_id, EndReason.FAILED, FAILURE))
            elif end < 0.1:
                steps.append(SequenceEnd(sequence_id, EndReason.LENGTH))
            elif end < 0.12:
                steps.append(SequenceEnd(sequence_id, EndReason.FAILED, REFUSAL))
            else:
                continue
            del self.live[sequence_id]
        if died:
            self.dead.add(replica_id)
            steps.append(EngineDied(FAILURE))
        self.send(e.EngineStepped(replica_id, steps))

    def migrate(self) -> None:
        if self.world.core.replicas:
            replica_id = self.dice.choice(list(self.world.core.replicas))
            message = Migrate(to_worker_id="w2", to_replica_id="p2", replica_id=replica_id, most=self.dice.randrange(3))
            self.send(e.MigrateAsked(message, lambda answer: None))

    def arrive(self) -> None:
        """A source sends a round, asks again, hands over, abandons: in any order, also nonsense."""
        luck = self.dice.random()
        if luck < 0.4 or not self.arriving:
            if not self.world.core.replicas:
                return
            id = f"m{len(self.handed)}"
            asked = request(f"h{len(self.handed)}", gateway_id=self.dice.choice(["g1", "g2"]))
            self.handed.add(asked.request_id)
            self.arriving[id] = (1, 2)
            replica_id = self.dice.choice(list(self.world.core.replicas))
            message = Round(
                migration_id=id, number=1, source_worker_id="w2", replica_id=replica_id, checkpoint_id="c1", index=0,
                token_ids=(97, 98), request=asked,
            )  # fmt: skip
            self.send(e.RoundAsked(message, lambda answer: None))
            return
        id = self.dice.choice(list(self.arriving))
        number, tokens = self.arriving[id]
        if luck < 0.6:
            self.arriving[id] = (number + 1, tokens + 1)
            message = Round(
                migration_id=id, number=number + 1, source_worker_id="w2", replica_id="r1", checkpoint_id="c1",
                index=tokens + (luck < 0.42), token_ids=(99,),
            )  # fmt: skip
            self.send(e.RoundAsked(message, lambda answer: None))
        elif luck < 0.7:
            message = Round(
                migration_id=id, number=number, source_worker_id="w2", replica_id="r1", checkpoint_id="c1", index=tokens
            )
            self.send(e.RoundAsked(message, lambda answer: None))
        elif luck < 0.9:
            over = HandOver(migration_id=id, epoch=3, token=f"from-{id}", sequence=1, delivery=1, index=tokens)
            self.send(e.HandOverAsked(over, lambda answer: None))
        else:
            del self.arriving[id]
            self.send(e.AbandonArrived(AbandonRound(migration_id=id)))

    def operator_drains(self) -> None:
        self.send(e.DrainSet(self.dice.random() < 0.5, lambda answer: None))

    def cancel(self) -> None:
        if self.requests:
            asked = self.dice.choice(self.requests)
            epoch = max(0, self.epochs[asked.request_id] - self.dice.randrange(2))
            how = self.dice.random()
            message = Cancel(request_id=asked.request_id, epoch=epoch, requeue=how < 0.3, superseded=how > 0.8)
            self.send(e.CancelArrived(message))

    def wait(self) -> None:
        for action in self.world.wait(self.dice.choice([0.1, 1.0, 6.0])):
            self.carry_out(action)

    def bus(self) -> None:
        self.away = not self.away
        self.send(e.BusLost() if self.away else e.BusBack())
        self.send(e.ServerChanged(self.dice.choice(["s1", "s2"])))

    def answer(self) -> None:
        if self.pending:
            self.finish(self.pending.pop(self.dice.randrange(len(self.pending))))

    def finish(self, action: e.Action) -> None:
        """An effect ends, well or badly."""
        luck = self.dice.random()
        match action:
            case e.AcquireLease(message=message):
                answer: Progress | Lease | Failure
                if luck < 0.3:
                    answer = Progress(phase="reading")
                elif luck < 0.4:
                    answer = self.dice.choice([FAILURE, REFUSAL])
                else:
                    arrival = Arrival(
                        tag=1, chunk_bytes=4, board_offset=64, image_bytes=20, window_chunks=2 if luck < 0.5 else 0
                    )
                    answer = lease(lease_id=f"l{len(self.granted)}", arrival=arrival if luck < 0.7 else None)
                    self.granted.append(answer.lease_id)
                self.send(e.LeaseAnswered(message.replica_id, answer))
            case e.OpenPuller(replica_id=replica_id):
                if luck < 0.1:
                    self.send(e.PullerFailed(replica_id, FAILURE))
                else:
                    puller = FakePuller()
                    self.pullers[id(puller)] = replica_id
                    self.kept.append(puller)
                    self.send(e.PullerOpened(replica_id, puller))
            case e.ClosePuller(replica_id=replica_id):
                self.wanted[replica_id] = 0
                self.send(e.PullerClosed(replica_id))
            case e.Attach(message=message):
                if luck < 0.5:
                    self.send(e.AttachProgressed(message.replica_id, int(luck * 40), 20))
                    self.send(e.ChunksConsumed(message.replica_id, int(luck * 10)))
                if luck < 0.1 or message.replica_id in self.stopped:
                    self.send(e.AttachFailed(message.replica_id, REFUSAL))
                else:
                    self.dead.discard(message.replica_id)
                    self.send(e.Attached(message.replica_id, FakeLoaded()))
            case e.Detach(replica_id=replica_id):
                self.live = {key: owner for key, owner in self.live.items() if owner != replica_id}
                self.send(e.Detached(replica_id))
            case e.RemoveRecord(replica_id=replica_id):
                self.stopped.discard(replica_id)
                self.send(e.RecordRemoved(replica_id))
            case e.ClaimRequest(token=token, message=message):
                if luck < 0.1:
                    self.send(e.ClaimAnswered(token, FAILURE))
                elif luck < 0.2:
                    self.send(e.ClaimAnswered(token, Gone(reason="left")))
                else:
                    self.epochs[message.request_id] += 1
                    epoch = self.epochs[message.request_id]
                    token_ids = tuple(self.dice.choices([97, 99], k=self.dice.randrange(3)))
                    self.next_index[message.request_id, epoch] = len(token_ids)
                    self.owned.add(message.request_id)
                    claimed = Claimed(epoch=epoch, budget_s=30, waited_s=luck, token_ids=token_ids)
                    self.send(e.ClaimAnswered(token, claimed))
            case e.Tokenise(token=token):
                if luck < 0.05:
                    self.send(e.TokeniseFailed(token, REFUSAL))
                else:
                    self.send(e.Tokenised(token, (104,) * self.dice.choice([1, 2, 99, 100])))
            case e.RenewLeases(lease_ids=lease_ids):
                unknown = tuple(lease_id for lease_id in lease_ids if self.dice.random() < 0.05)
                unserved = self.dice.random() < 0.5
                answered = FAILURE if luck < 0.2 or self.away else Renewed(unknown=unknown)
                self.send(e.LeasesRenewed(answered, unserved=unserved))
            case e.TellHolds(gateway_id=gateway_id, message=message):
                ids = [one.request_id for one in message.requests]
                held: Unwanted | Failure = Unwanted(
                    ended=tuple(one for one in ids if self.dice.random() < 0.05),
                    superseded=tuple(one for one in ids if self.dice.random() < 0.05),
                )
                self.unserved = self.dice.random() < 0.5
                unheard = luck < 0.3
                told = FAILURE if unheard else held
                self.send(e.HoldsAnswered(gateway_id, told, unserved=unheard and self.unserved))
            case e.SendRound(message=message):
                done = RoundDone(number=message.number, prefilled_tokens=5, prefill_s=luck, step_s=0.01)
                rounded = RoundPending(number=message.number) if luck < 0.2 else FAILURE if luck < 0.4 else done
                self.send(e.RoundAnswered(message.migration_id, message.number, rounded))
            case e.SendHandOver(migration_id=moving):
                self.send(e.HandOverAnswered(moving, HandedOver(epoch=9) if luck < 0.5 else FAILURE))
            case e.Reclaim(migration_id=moving, message=message):
                back: Claimed | Gone | Failure = FAILURE
                mine = [run for run in self.world.core.runs.values() if run.request_id == message.request_id]
                if luck < 0.2 or not mine:
                    back = Gone(reason="left")
                elif luck < 0.4:
                    back = Failure(code=Code.STALE_EPOCH, message="It is somebody else's.")
                elif luck < 0.8:
                    self.epochs[message.request_id] += 1
                    run = mine[0]
                    assert run.generation is not None
                    epoch = self.epochs[message.request_id]
                    self.next_index[message.request_id, epoch] = run.emitted_tokens
                    back = Claimed(
                        epoch=epoch,
                        budget_s=9,
                        waited_s=1,
                        token_ids=tuple(run.generation.output[: run.emitted_tokens]),
                    )
                self.send(e.ReclaimAnswered(moving, back))
            case e.LookAtServer():
                self.send(e.ServerSeen(self.dice.choice(["", "/dev/shm/a", "/dev/shm/b"])))
            case e.PrepareSegment():
                self.send(e.SegmentPrepared())
            case _:
                raise AssertionError(f"nobody answers {action}")


@pytest.mark.parametrize("seed", range(150))
def test_a_random_history_leaks_nothing(seed: int) -> None:
    history = History(seed)
    choices: list[tuple[Callable[[], None], int]] = [
        (history.answer, 40),
        (history.step, 20),
        (history.deliver, 20),
        (history.wait, 6),
        (history.cancel, 4),
        (history.ask_load, 6),
        (history.ask_stop, 2),
        (history.bus, 1),
        (history.migrate, 5),
        (history.arrive, 8),
        (history.operator_drains, 1),
    ]
    for _ in range(400):
        (happen,) = history.dice.choices([choice for choice, _ in choices], [weight for _, weight in choices])
        happen()
    if history.away:
        history.bus()
    history.send(e.DrainAsked())
    for _ in range(4000):
        if history.drained:
            break
        history.answer()
        history.wait()
    assert history.drained == 1
    core = history.world.core
    assert not core.replicas
    assert not core.runs
    assert core.memory_used_bytes == 0
    assert core.count(ReplicaState.READY) == 0
    assert sorted(history.released) == sorted(history.granted)
    assert all(count == 1 for count in history.settled.values()), "acknowledged twice"
    unsettled = [token for token in history.deliveries if token not in history.settled]
    void = sum(max(1, history.delivered[request_id]) for request_id in history.void)
    assert len(unsettled) <= void + history.migrated
    assert not core.outgoing and not core.incoming
