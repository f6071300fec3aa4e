"""A worker's core in a test: hand-written fakes, valid messages by default, and `check()` after every event."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from services.worker import events as e
from services.worker.core import WorkerCore
from services.worker.ports import AttachTimes, EngineEvent
from services.worker.run import Limits
from shared.contracts.generation import End, Frame
from shared.contracts.placement import LoadReplica, StopReplica
from shared.contracts.requests import Cancel, Claimed, Prompt, Request, Sampling, TokensPrompt
from shared.contracts.residency import Checkpoint, Lease, Source

T = TypeVar("T")
EOS = 0


class LetterTokenizer:
    """A token is a code point; 0 is the end of sequence; 1 holds back until the next token (half a character)."""

    has_chat_template = True
    eos_token_ids = frozenset({EOS})

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        assert isinstance(prompt, TokensPrompt)
        return list(prompt.token_ids)

    def stream(self, *, skip_special: bool = True) -> LetterStream:
        return LetterStream()

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        return "".join(map(chr, token_ids))

    def text_of(self, token_id: int) -> str:
        return chr(token_id)


class LetterStream:
    """See `LetterTokenizer`."""

    def __init__(self) -> None:
        self._half = False

    def push(self, token_id: int) -> str:
        if token_id == 1:
            self._half = True
            return ""
        text = ("é" if self._half else "") + chr(token_id)
        self._half = False
        return text

    def finish(self) -> str:
        return "\ufffd" if self._half else ""


@dataclass
class FakeEngine:
    """Only its constants are looked at; what it is told stands in the actions."""

    name: str = "fake"
    slots: int = 4
    max_sequence_tokens: int = 100
    step_began_at: float | None = None
    kv_used_bytes: int = 0

    def submit(
        self, sequence_id: str, token_ids: Sequence[int], *, first_index: int, max_new_tokens: int, sampling: Sampling
    ) -> None:
        raise AssertionError("the core does nothing itself")

    def cancel(self, sequence_id: str) -> None:
        raise AssertionError("the core does nothing itself")

    def allow_until(self, at: float) -> None:
        raise AssertionError("the core does nothing itself")

    def close(self) -> None:
        raise AssertionError("the core does nothing itself")


@dataclass
class FakeLoaded:
    """A model that answers."""

    engine: FakeEngine = field(default_factory=FakeEngine)
    tokenizer: LetterTokenizer = field(default_factory=LetterTokenizer)
    max_context_tokens: int = 100
    memory_bytes: int = 10
    times: AttachTimes = field(default_factory=AttachTimes)

    def close(self) -> None:
        raise AssertionError("the core does nothing itself")


class FakePuller:
    """A queue that is open."""

    def want(self, n: int, /) -> None:
        raise AssertionError("the core does nothing itself")

    async def close(self) -> None:
        raise AssertionError("the core does nothing itself")


CHECKPOINT = Checkpoint(
    checkpoint_id="c1",
    architecture="LlamaForCausalLM",
    weight_bytes=1000,
    parameters=500,
    dtype="bfloat16",
    max_context_tokens=100,
    kv_bytes_per_token=1,
    vocab_tokens=256,
    has_chat_template=True,
)


def lease(**changes: Any) -> Lease:
    """A lease, granted from SSD."""
    first = Lease(
        lease_id="l1",
        checkpoint=CHECKPOINT,
        segment="/dev/shm/x",
        segment_bytes=4096,
        extents=(),
        directory="/d",
        tier="ssd",
        read_s=0.5,
        ssd_bytes=1000,
    )
    return msgspec.structs.replace(first, **changes)


def load(replica_id: str = "r1", **changes: Any) -> LoadReplica:
    """A command to load."""
    first = LoadReplica(
        replica_id=replica_id,
        deployment="demo",
        slug="demo-0",
        revision="v",
        checkpoint_id="c1",
        source=Source(url="/m"),
        slots=2,
        max_context_tokens=100,
        kv_bytes=10,
        decision_s=0.01,
        checkpoint=CHECKPOINT,
    )
    return msgspec.structs.replace(first, **changes)


def request(request_id: str = "q1", **changes: Any) -> Request:
    """A request for the text after "hi"."""
    sampling = changes.pop("sampling", None) or Sampling(max_tokens=10)
    first = Request(
        request_id=request_id,
        gateway_id="g1",
        deployment="demo",
        prompt=TokensPrompt(token_ids=(104, 105)),
        sampling=sampling,
        budget_s=60.0,
    )
    return msgspec.structs.replace(first, **changes)


def limits(**changes: Any) -> Limits:
    """What the worker of these tests may do."""
    values: dict[str, Any] = {
        "worker_id": "w1",
        "server_id": "s1",
        "memory_total_bytes": 100,
        "weights_on_device": False,
        "max_replicas": 3,
        "lease_ttl_s": 15.0,
        "ack_wait_s": 9.0,
        "max_deliveries": 3,
        "drain_s": 30.0,
        "kv_bytes_max": 50,
    }
    return Limits(**{**values, **changes})


class World:
    """A core, the time, and everything that it has wanted so far."""

    def __init__(self, **changes: Any) -> None:
        self.core = WorkerCore(limits(**changes))
        self.now = 100.0
        self.actions: list[e.Action] = []
        self.replies: list[Any] = []

    def send(self, event: e.Event | None) -> list[e.Action]:
        """What the core wants after this event."""
        actions = self.core.handle(event, self.now)
        self.core.check()
        self.actions += actions
        return actions

    def wait(self, seconds: float) -> list[e.Action]:
        """What the core wants while time passes; it is woken when it asked to be."""
        until, wanted = self.now + seconds, list[e.Action]()
        while (deadline := self.core.deadline()) is not None and deadline <= until:
            self.now = max(self.now, deadline)
            wanted += self.send(None)
        self.now = until
        return wanted

    def ask_load(self, message: LoadReplica | None = None) -> Any:
        """The answer to a LOAD."""
        return self._answer(self.send(e.LoadAsked(message or load(), self.replies.append)))

    def ask_stop(self, replica_id: str = "r1", **how: bool) -> Any:
        """The answer to a STOP."""
        message = StopReplica(replica_id=replica_id, reason="test", **how)
        return self._answer(self.send(e.StopAsked(message, self.replies.append)))

    def ready(self, replica_id: str = "r1", **changes: Any) -> FakeLoaded:
        """A replica that takes requests."""
        loaded = FakeLoaded()
        self.ask_load(load(replica_id, **changes))
        self.send(e.PullerOpened(replica_id, FakePuller()))
        self.send(e.LeaseAnswered(replica_id, lease(lease_id=f"lease-{replica_id}")))
        self.send(e.Attached(replica_id, loaded))
        return loaded

    def deliver(self, asked: Request | None = None, *, token: str = "t1", delivery: int = 1) -> list[e.Action]:
        """The queue gives a request to r1."""
        return self.send(e.DeliveryArrived("r1", asked or request(), token, delivery))

    def claim(
        self, token: str = "t1", *, epoch: int = 1, token_ids: tuple[int, ...] = (), waited_s: float = 0.0
    ) -> list[e.Action]:
        """The gateway grants it."""
        claimed = Claimed(epoch=epoch, budget_s=60.0, waited_s=waited_s, token_ids=token_ids)
        return self.send(e.ClaimAnswered(token, claimed))

    def running(self, asked: Request | None = None, *, token: str = "t1", delivery: int = 1, epoch: int = 1) -> str:
        """A request that the engine works on; its sequence id."""
        self.deliver(asked, token=token, delivery=delivery)
        self.claim(token, epoch=epoch)
        prompt = (asked or request()).prompt
        assert isinstance(prompt, TokensPrompt)
        submitted = only(self.send(e.Tokenised(token, prompt.token_ids)), e.SubmitSequence)
        return submitted.sequence_id

    def step(self, *steps: EngineEvent, replica_id: str = "r1") -> list[e.Action]:
        """The engine made a step."""
        return self.send(e.EngineStepped(replica_id, steps))

    def cancel(self, request_id: str = "q1", *, epoch: int = 1, requeue: bool = False) -> list[e.Action]:
        """A gateway cancels."""
        return self.send(e.CancelArrived(Cancel(request_id=request_id, epoch=epoch, requeue=requeue)))

    def leave(self, replica_id: str = "r1") -> None:
        """Everything that a leaving replica waits for comes back."""
        for kind, event in (
            (e.ClosePuller, e.PullerClosed(replica_id)),
            (e.Detach, e.Detached(replica_id)),
            (e.RemoveRecord, e.RecordRemoved(replica_id)),
        ):
            assert some(self.actions, kind), f"{kind.__name__} was never wanted"
            self.send(event)

    def _answer(self, actions: list[e.Action]) -> Any:
        return only(actions, e.ReplyTo).answer


def some(actions: Sequence[e.Action], kind: type[T]) -> list[T]:
    """The actions of this kind."""
    return [action for action in actions if isinstance(action, kind)]


def only(actions: Sequence[e.Action], kind: type[T]) -> T:
    """The one action of this kind."""
    found = some(actions, kind)
    assert len(found) == 1, f"{len(found)} of {kind.__name__} in {actions}"
    return found[0]


def items(actions: Sequence[e.Action]) -> list[Frame | End]:
    """Frames and ends that were published."""
    return [item for action in some(actions, e.PublishFrames) for item in action.batch.items]


def end(actions: Sequence[e.Action]) -> End:
    """The one end that was published."""
    found = [item for item in items(actions) if isinstance(item, End)]
    assert len(found) == 1, f"{len(found)} ends"
    return found[0]
