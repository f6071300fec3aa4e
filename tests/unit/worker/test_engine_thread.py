"""The engine's thread with hand-written steppers, and the engine that costs nothing."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any, cast

import pytest

from services.worker.engine_thread import Submission, ThreadedEngine
from services.worker.null_engine import NullLoader, NullStepper
from services.worker.ports import EndReason, EngineEvent
from shared.contracts.requests import ChatMessage, ChatPrompt, Sampling, TextPrompt, TokensPrompt
from shared.contracts.residency import Lease
from shared.errors import Code, Failure, HearthError
from tests.unit.worker.sinks import Recorder

GREEDY = Sampling(temperature=0.0)


class Gated(NullStepper):
    """Waits before each step until the test says so, and can be told to crash."""

    def __init__(self) -> None:
        super().__init__(slots=4, max_sequence_tokens=64)
        self.gate = threading.Semaphore(0)
        self.crash = threading.Event()
        self.closed = threading.Event()
        self.removed: list[str] = []
        self.steps = 0

    def remove(self, sequence_id: str) -> None:
        self.removed.append(sequence_id)
        super().remove(sequence_id)

    def step(self) -> list[EngineEvent]:
        self.gate.acquire(timeout=60)
        if self.crash.is_set():
            raise RuntimeError("the stepper fell over")
        self.steps += 1
        return super().step()

    def close(self) -> None:
        super().close()
        self.closed.set()


def submit(engine: ThreadedEngine, sequence_id: str, count: int = 3, **fields: Any) -> None:
    values: dict[str, Any] = {
        "token_ids": [1, 2, 3],
        "first_index": 0,
        "max_new_tokens": count,
        "sampling": GREEDY,
    } | fields
    engine.submit(sequence_id, **values)


def test_tokens_come_in_order_and_then_one_end() -> None:
    heard = Recorder()
    engine = ThreadedEngine(NullStepper(slots=4, max_sequence_tokens=64), heard)
    submit(engine, "a", 5)
    submit(engine, "b", 2, token_ids=[9, 9], first_index=2)
    heard.ended("a", "b")
    assert bytes(heard.tokens["a"]) == b"heart"
    assert bytes(heard.tokens["b"]) == b"ar", "a resumed sequence goes on at its index"
    assert heard.end("a").reason is EndReason.LENGTH
    engine.close()
    assert not heard.deaths


def test_a_stop_token_ends_a_sequence_and_is_told() -> None:
    heard = Recorder()
    engine = ThreadedEngine(NullStepper(slots=4, max_sequence_tokens=64), heard)
    submit(engine, "a", 20, sampling=Sampling(stop_token_ids=(ord("r"),)))
    assert heard.end("a").reason is EndReason.STOP
    assert bytes(heard.tokens["a"]) == b"hear"
    engine.close()


def test_an_id_can_be_used_again_after_its_end_only() -> None:
    heard, stepper = Recorder(), Gated()
    engine = ThreadedEngine(stepper, heard)
    submit(engine, "a", 1)
    with pytest.raises(ValueError, match="live already"):
        submit(engine, "a", 1)
    stepper.gate.release()
    heard.ended("a")
    heard.ends.clear()
    submit(engine, "a", 1)
    stepper.gate.release()
    heard.ended("a")
    engine.close()


def test_a_cancelled_sequence_ends_before_the_next_step() -> None:
    heard, stepper = Recorder(), Gated()
    engine = ThreadedEngine(stepper, heard)
    submit(engine, "a", 30)
    submit(engine, "b", 30)
    stepper.gate.release()
    heard.until(lambda: "a" in heard.tokens)
    engine.cancel("a")
    engine.cancel("never heard of")
    stepper.gate.release()
    assert heard.end("a").reason is EndReason.CANCELLED
    assert len(heard.tokens["a"]) <= 2
    assert stepper.removed == ["a"]
    engine.cancel("a")
    stepper.gate.release(5)
    heard.until(lambda: len(heard.tokens["b"]) >= 5)
    assert len(heard.ends["a"]) == 1
    stepper.gate.release(100)
    engine.close()


def test_a_sequence_can_be_cancelled_before_it_began() -> None:
    heard, stepper = Recorder(), Gated()
    engine = ThreadedEngine(stepper, heard)
    submit(engine, "a", 3)  # the thread is in, or on its way to, the gate
    submit(engine, "b", 3)
    engine.cancel("b")
    stepper.gate.release(10)
    heard.ended("a", "b")
    assert heard.end("b").reason is EndReason.CANCELLED
    engine.close()


def test_close_ends_what_is_live_and_refuses_what_comes_later() -> None:
    heard, stepper = Recorder(), Gated()
    engine = ThreadedEngine(stepper, heard)
    submit(engine, "a", 30)
    stepper.gate.release(2)
    engine.close()
    assert heard.end("a").reason is EndReason.CANCELLED
    assert stepper.closed.is_set()
    submit(engine, "late")
    end = heard.end("late")
    assert end.failure is not None
    assert end.failure.code is Code.DRAINING
    assert not heard.deaths
    engine.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crash_fails_everything_once_and_is_told_once() -> None:
    heard, stepper = Recorder(), Gated()
    engine = ThreadedEngine(stepper, heard)
    submit(engine, "a", 30)
    submit(engine, "b", 30)
    stepper.gate.release()
    heard.until(lambda: len(heard.tokens) == 2)
    stepper.crash.set()
    stepper.gate.release()
    heard.ended("a", "b")
    heard.until(lambda: bool(heard.deaths))
    failure = heard.end("a").failure
    assert failure == heard.end("b").failure == heard.deaths[0].failure
    assert failure is not None
    assert failure.code is Code.INTERNAL
    submit(engine, "late")
    assert heard.end("late").failure == failure
    engine.close()
    assert stepper.closed.is_set()
    assert len(heard.deaths) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crash_is_called_what_the_engine_calls_it() -> None:
    heard, stepper = Recorder(), Gated()
    failure = Failure(code=Code.OUT_OF_MEMORY, message="No more.")
    engine = ThreadedEngine(stepper, heard, failure_of=lambda _: failure)
    stepper.crash.set()
    stepper.gate.release()
    submit(engine, "a")
    assert heard.end("a").failure == failure
    engine.close()


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"token_ids": []}, Code.INVALID_REQUEST),
        ({"max_new_tokens": 0}, Code.INVALID_REQUEST),
        ({"first_index": 4}, Code.INVALID_REQUEST),
        ({"token_ids": [1] * 64}, Code.PROMPT_TOO_LONG),
        ({"token_ids": [256]}, Code.INVALID_REQUEST),
        ({"token_ids": [-1]}, Code.INVALID_REQUEST),
        ({"sampling": Sampling(logit_bias={300: 1.0})}, Code.INVALID_REQUEST),
    ],
)
def test_a_bad_submission_ends_with_a_clear_failure(fields: dict[str, Any], code: Code) -> None:
    heard = Recorder()
    engine = ThreadedEngine(NullStepper(slots=4, max_sequence_tokens=64), heard)
    submit(engine, "a", **fields)
    end = heard.end("a")
    assert end.reason is EndReason.FAILED
    assert end.failure is not None
    assert end.failure.code is code
    assert end.failure.message.endswith(".")
    submit(engine, "b", 1)
    heard.ended("b")
    engine.close()


def test_the_answer_is_cut_to_what_fits() -> None:
    heard = Recorder()
    engine = ThreadedEngine(NullStepper(slots=4, max_sequence_tokens=64), heard)
    submit(engine, "a", 1000, token_ids=[1] * 60)
    assert heard.end("a").reason is EndReason.LENGTH
    assert len(heard.tokens["a"]) == 4
    engine.close()


def test_more_sequences_than_slots_wait_their_turn() -> None:
    heard = Recorder()
    engine = ThreadedEngine(NullStepper(slots=2, max_sequence_tokens=64), heard)
    ids = [str(number) for number in range(9)]
    for sequence_id in ids:
        submit(engine, sequence_id, 3)
    heard.ended(*ids)
    assert all(bytes(tokens) == b"hea" for tokens in heard.tokens.values())
    engine.close()


def test_the_null_loader_needs_no_store() -> None:
    heard = Recorder()
    loader = NullLoader()
    loader.warm_up()
    loaded = loader.load(cast(Lease, None), kv_bytes=0, slots=4, max_context_tokens=100, sink=heard)
    tokens = loaded.tokenizer.encode_prompt(ChatPrompt(messages=(ChatMessage(role="user", content="hi"),)))
    assert loaded.tokenizer.decode(tokens) == "user: hi\n"
    assert loaded.tokenizer.encode_prompt(TextPrompt(text="é")) == list("é".encode())
    for bad in (TextPrompt(text=""), TokensPrompt(token_ids=(256,))):
        with pytest.raises(HearthError):
            loaded.tokenizer.encode_prompt(bad)
    loaded.engine.submit("a", tokens, first_index=0, max_new_tokens=6, sampling=GREEDY)
    heard.ended("a")
    stream = loaded.tokenizer.stream()
    assert "".join(stream.push(token) for token in heard.tokens["a"]) + stream.finish() == "hearth"
    loaded.close()
    loader.close()


def test_submission_is_what_the_stepper_gets() -> None:
    got: list[Submission] = []

    class Curious(NullStepper):
        eos_token_ids = frozenset({7})

        def add(self, submission: Submission) -> None:
            got.append(submission)
            super().add(submission)

    heard = Recorder()
    engine = ThreadedEngine(Curious(slots=1, max_sequence_tokens=64), heard)
    submit(engine, "a", sampling=Sampling(stop_token_ids=(9,)))
    submit(engine, "b", sampling=Sampling(ignore_eos=True, stop_token_ids=(9,)))
    heard.ended("a", "b")
    assert [one.stop_token_ids for one in got] == [frozenset({7, 9}), frozenset({9})]
    engine.close()


# -- a step that hangs


def test_who_looks_sees_since_when_a_step_hangs_and_can_still_submit_and_cancel() -> None:
    clock, stepper, heard = HandClock(), Gated(), Recorder()
    entered = threading.Event()
    wait = stepper.gate.acquire

    class Hanging:
        def acquire(self, timeout: float) -> None:
            entered.set()
            wait(timeout=timeout)

    gate, stepper.gate = stepper.gate, cast(Any, Hanging())
    engine = ThreadedEngine(stepper, heard, clock=clock)
    seen = [engine.step_began_at]
    submit(engine, "a", 30)
    assert entered.wait(60)
    clock.now = 140.0  # time passes, the step does not end
    seen.append(engine.step_began_at)
    submit(engine, "b", 1)
    engine.cancel("a")
    engine.allow_until(1000.0)
    assert (heard.tokens, heard.ends) == ({}, {}), "nothing can be said before the step has ended"
    seen.append(engine.step_began_at)
    gate.release()
    assert heard.end("a").reason is EndReason.CANCELLED
    gate.release()
    assert heard.end("b").reason is EndReason.LENGTH
    assert [len(heard.tokens[name]) for name in ("a", "b")] == [1, 1]
    engine.close()
    assert [*seen, engine.step_began_at] == [None, 100.0, 100.0, None]


def test_a_process_whose_step_hangs_for_ever_can_end() -> None:
    """The thread is a daemon: nobody has to close the engine, which would wait for the step."""
    script = (
        "import threading\n"
        "from services.worker.engine_thread import ThreadedEngine\n"
        "from services.worker.null_engine import NullStepper\n"
        "from shared.contracts.requests import Sampling\n"
        "entered = threading.Event()\n"
        "class Hanging(NullStepper):\n"
        "    def step(self):\n"
        "        entered.set()\n"
        "        threading.Event().wait()\n"
        "engine = ThreadedEngine(Hanging(slots=1, max_sequence_tokens=64), print)\n"
        "engine.submit('a', [1], first_index=0, max_new_tokens=1, sampling=Sampling())\n"
        "assert entered.wait(60)\n"
        "assert engine.step_began_at is not None\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


# -- the lease's end


class HandClock:
    """Monotonic seconds that stand still until they are set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_no_step_begins_after_the_second_until_which_the_bytes_are_promised() -> None:
    clock, stepper, heard = HandClock(), Gated(), Recorder()
    engine = ThreadedEngine(stepper, heard, clock=clock)
    engine.allow_until(115.0)
    clock.now = 120.0  # the worker was paused
    stepper.gate.release(10)
    submit(engine, "a", 3)
    submit(engine, "b", 1)
    engine.cancel("b")
    assert heard.end("b").reason is EndReason.CANCELLED
    assert (heard.tokens, stepper.steps) == ({}, 0), "a token from bytes that may be another checkpoint's"
    engine.allow_until(130.0)
    assert heard.end("a").reason is EndReason.LENGTH
    assert len(heard.tokens["a"]) == 3
    engine.close()


def test_what_a_step_brought_that_a_pause_fell_into_is_told_only_when_the_bytes_were_right() -> None:
    clock, stepper, heard = HandClock(), Gated(), Recorder()
    engine = ThreadedEngine(stepper, heard, clock=clock)
    engine.allow_until(115.0)
    submit(engine, "a", 2)
    clock.now = 114.0
    in_step = threading.Event()

    class Pausing:
        def acquire(self, timeout: float) -> None:
            in_step.set()
            clock.now = 116.0

    stepper.gate = cast(Any, Pausing())
    submit(engine, "b", 1)
    assert in_step.wait(60)
    engine.cancel("b")
    assert heard.tokens == {}
    assert heard.ends == {}
    engine.allow_until(1000.0)
    heard.ended("a", "b")
    assert len(heard.tokens["a"]) == 2
    engine.close()


def test_an_engine_that_stands_still_can_be_closed_and_what_it_held_back_is_never_told() -> None:
    clock, stepper, heard = HandClock(), Gated(), Recorder()
    engine = ThreadedEngine(stepper, heard, clock=clock)
    engine.allow_until(99.0)
    submit(engine, "a", 3)
    stepper.gate.release(3)
    engine.close()
    assert heard.end("a").reason is EndReason.CANCELLED
    assert heard.tokens == {}
    assert stepper.steps == 0
