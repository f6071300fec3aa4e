"""A KV cache that is too small for what the engine was given: nobody's tokens change, nobody waits for ever."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from services.worker.engine import KV_SHORT_EVERY_S, BatchingStepper, kv_bytes_per_token, make_engine
from services.worker.engine_thread import Submission
from services.worker.ports import EndReason, EngineEvent, KvShort, StepToken
from shared.contracts.requests import Sampling
from shared.errors import Code
from tests.builders.models import make_config
from tests.unit.worker.sinks import Recorder

pytestmark = pytest.mark.torch

PLAIN = Sampling(temperature=0.0, ignore_eos=True)
HOWS = (
    Sampling(temperature=0.0, repetition_penalty=1.3, logprobs=1),
    Sampling(seed=3, top_p=0.95, top_k=50, frequency_penalty=0.5, presence_penalty=0.3, logprobs=2),
    Sampling(seed=4, min_p=0.02, logit_bias={17: 2.0}),
    PLAIN,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    model_of.cache_clear()


@cache
def model_of(kind: str) -> Any:
    from transformers import AutoModelForCausalLM

    config = make_config(kind, layers=3 if kind == "gemma2" else 2, eos_token_id=None)
    if kind in ("mistral", "gemma2"):
        config.sliding_window = 48
    config.initializer_range = config.init_std = 0.08
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def stepper_of(model: Any, *, blocks: int, slots: int = 16, context: int = 400, **fields: Any) -> BatchingStepper:
    kv_bytes = blocks * 16 * kv_bytes_per_token(model.config, torch.float32)
    return BatchingStepper(model, kv_bytes=kv_bytes, slots=slots, max_context_tokens=context, **fields)


def prompt_of(seed: int, tokens: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(5, 500) for _ in range(tokens)]


def sequence(name: str, tokens: list[int], count: int, how: Sampling = PLAIN, first_index: int = 0) -> Submission:
    return Submission(name, tokens, first_index, count, how, frozenset())


def put_off_by(stepper: BatchingStepper) -> list[str]:
    """The sequences whose blocks are taken away from now on, as it happens."""
    names: list[str] = []
    put_off = stepper._scheduler._put_off

    def note(state: Any) -> None:
        names.append(state.request_id)
        put_off(state)

    stepper._scheduler._put_off = note
    return names


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "mistral", "gemma2"])
def test_a_small_cache_changes_nobodys_tokens(kind: str) -> None:
    """Twenty long sequences, some with the same beginning, in a cache for about two, of which some are cancelled."""
    model = model_of(kind)
    chance = random.Random(7)
    common = prompt_of(0, 40)
    prompts = {str(n): [*common[: 40 * (n % 2)], *prompt_of(n + 1, chance.randrange(2, 90))] for n in range(20)}
    counts = {name: chance.randrange(60, 120) for name in prompts}
    hows = {name: HOWS[int(name) % len(HOWS)] for name in prompts}
    wide, undisturbed = stepper_of(model, blocks=400, slots=20), Recorder()
    for name, prompt in prompts.items():
        wide.add(sequence(name, prompt, counts[name], hows[name]))
    while undisturbed.ends.keys() != prompts.keys():
        undisturbed(wide.step())
    wide.close()

    # A window of 48 tokens is three blocks and no more, however long the sequence.
    blocks = {"mistral": 8, "gemma2": 14}.get(kind, 26)
    narrow, heard = stepper_of(model, blocks=blocks, slots=10, context=256), Recorder()
    assert kind == "mistral" or narrow.max_sequence_tokens >= 250  # never more than the whole cache, window or not
    empty, put_off = narrow.free_blocks_bytes, put_off_by(narrow)
    cancelled = {"4", "9", "13"}
    for name, prompt in prompts.items():
        narrow.add(sequence(name, prompt, counts[name], hows[name]))
    for step in range(20_000):
        if heard.ends.keys() >= prompts.keys() - cancelled:
            break
        if step in (15, 60, 150):
            narrow.remove(["4", "9", "13"][(15, 60, 150).index(step)])
        heard(narrow.step())
    else:
        pytest.fail("they do not end")
    assert put_off, "the cache was not full"
    for name in prompts.keys() - cancelled:
        assert heard.tokens[name] == undisturbed.tokens[name]
        for one, other in zip(heard.logprobs[name], undisturbed.logprobs[name], strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.chosen == pytest.approx(other.chosen, abs=1e-3)
    assert narrow.free_blocks_bytes == empty
    assert not narrow._scheduler._arrivals
    narrow.close()


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_any_load_ends_and_leaves_nothing(kind: str) -> None:
    """Random arrivals, lengths, cancellations and caches, down to one that holds a single sequence only."""
    model = model_of(kind)
    for seed in range(4):
        chance = random.Random(seed)
        blocks = chance.choice((5, 9, 17, 30))
        stepper, heard = stepper_of(model, blocks=blocks, slots=chance.choice((1, 4, 12)), context=200), Recorder()
        empty, longest = stepper.free_blocks_bytes, stepper.max_sequence_tokens
        live: list[str] = []
        for number in range(25):
            length = chance.randrange(1, longest)
            prompt = prompt_of(chance.randrange(4), length)
            stepper.add(sequence(str(number), prompt, min(chance.randrange(1, 60), longest - length)))
            live.append(str(number))
            for _ in range(chance.randrange(0, 12)):
                live = [name for name in live if name not in heard.ends]
                if live:
                    heard(stepper.step())
            live = [name for name in live if name not in heard.ends]
            if live and chance.random() < 0.3:
                gone = chance.choice(live)
                stepper.remove(gone)
                live.remove(gone)
        for _ in range(20_000):
            if not (live := [name for name in live if name not in heard.ends]):
                break
            heard(stepper.step())
        assert not live, f"seed {seed}: they wait for ever"
        assert stepper.free_blocks_bytes == empty
        stepper.close()


def test_the_oldest_goes_on_and_the_newest_is_put_off_and_comes_back_before_the_others() -> None:
    stepper, heard = stepper_of(model_of("llama"), blocks=20, slots=3, context=300), Recorder()
    put_off, spoke = put_off_by(stepper), []
    for name in ("old", "middle", "new"):
        stepper.add(sequence(name, prompt_of(len(name), 60), 200))
    for number in range(3):
        stepper.add(sequence(f"later{number}", prompt_of(number + 50, 60), 5))
    while len(heard.ends) < 6:
        events = stepper.step()
        heard(events)
        spoke += [event.sequence_id for event in events if put_off and isinstance(event, StepToken)]
    assert put_off[0] == "new"
    assert "old" not in put_off
    assert next(iter(heard.ends)) == "old"
    first = list(dict.fromkeys(spoke))
    assert first.index("new") < first.index("later0") < first.index("later1")
    stepper.close()


def shorts(events: list[EngineEvent]) -> list[int]:
    return [event.sequences for event in events if isinstance(event, KvShort)]


def test_it_is_told_when_sequences_wait_for_blocks_at_once_and_then_every_second() -> None:
    clock = Clock()
    stepper = stepper_of(model_of("llama"), blocks=20, slots=4, context=300, clock=clock)
    stepper.add(sequence("a", prompt_of(1, 150), 100))
    assert shorts(stepper.step()) == []
    for number in range(5):  # three have a slot, none has room
        stepper.add(sequence(f"b{number}", prompt_of(number + 2, 200), 10))
    assert shorts(stepper.step()) == [3]
    for _ in range(5):
        clock.now += KV_SHORT_EVERY_S / 10
        assert shorts(stepper.step()) == []
    clock.now += KV_SHORT_EVERY_S / 2 + 0.001
    assert shorts(stepper.step()) == [3]
    for number in range(5):
        stepper.remove(f"b{number}")
    clock.now += 2 * KV_SHORT_EVERY_S
    assert shorts(stepper.step()) == []
    stepper.close()


def test_sequences_that_wait_for_a_slot_or_a_turn_are_not_short_of_blocks() -> None:
    clock = Clock()
    stepper = stepper_of(model_of("llama"), blocks=200, slots=2, clock=clock)
    for number in range(6):
        stepper.add(sequence(str(number), prompt_of(number, 300), 20))  # each is prefilled in three slices
    told = []
    for _ in range(40):
        clock.now += 2 * KV_SHORT_EVERY_S
        told += shorts(stepper.step())
    assert told == []
    stepper.close()


def test_a_sequence_that_was_put_off_counts_although_there_is_no_slot_for_it() -> None:
    clock = Clock()
    stepper = stepper_of(model_of("llama"), blocks=12, slots=2, context=180, clock=clock)
    put_off, told = put_off_by(stepper), []
    for name in ("a", "b"):
        stepper.add(sequence(name, prompt_of(ord(name), 60), 110))
    while not put_off:
        clock.now += 2 * KV_SHORT_EVERY_S
        told = shorts(stepper.step())
    assert told == [1]
    stepper.close()


def test_what_can_never_fit_ends_at_once_and_the_others_go_on() -> None:
    model, heard = model_of("llama"), Recorder()
    engine, _ = make_engine(
        model,
        engine="batching",
        kv_bytes=4 * 16 * kv_bytes_per_token(model.config, torch.float32),
        slots=4,
        max_context_tokens=400,
        eos_token_ids=[],
        sink=heard,
    )
    assert engine.max_sequence_tokens == 64
    engine.submit("fits", prompt_of(1, 30), first_index=0, max_new_tokens=34, sampling=PLAIN)
    engine.submit("never", prompt_of(1, 64), first_index=0, max_new_tokens=1, sampling=PLAIN)
    engine.submit("later", prompt_of(2, 63), first_index=0, max_new_tokens=1, sampling=PLAIN)
    failure = heard.end("never").failure
    assert failure is not None
    assert failure.code is Code.PROMPT_TOO_LONG
    assert heard.end("fits").reason is heard.end("later").reason is EndReason.LENGTH
    assert len(heard.tokens["fits"]) == 34
    engine.close()


def test_one_long_prompt_is_not_overtaken_for_ever() -> None:
    """A prompt for most of the cache, while short ones keep coming."""
    stepper, heard = stepper_of(model_of("llama"), blocks=20, slots=4, context=300), Recorder()
    stepper.add(sequence("first", prompt_of(1, 40), 10))
    heard(stepper.step())
    stepper.add(sequence("long", prompt_of(2, 290), 2))
    for number in range(60):
        stepper.add(sequence(f"short{number}", prompt_of(number + 3, 40), 10))
        heard(stepper.step())
        if "long" in heard.tokens:
            break
    assert "long" in heard.tokens
    assert not any(name.startswith("short") for name in heard.ends), "it was overtaken"
    stepper.close()


def test_sequences_that_share_more_than_can_be_read_at_once_all_end() -> None:
    """Each reads the shared blocks for itself: together more than the cache has."""
    stepper, heard = stepper_of(model_of("llama"), blocks=24, slots=8, context=380), Recorder()
    common = prompt_of(1, 160)
    stepper.add(sequence("0", [*common, 5], 40))
    heard(stepper.step())
    heard(stepper.step())  # 160 tokens are two slices; the last brings the first token
    for number in range(1, 5):
        stepper.add(sequence(str(number), [*common, 5 + number], 20))
    tokens = 0
    for _ in range(2000):
        if len(heard.ends) == 5:
            break
        events = stepper.step()
        tokens += sum(isinstance(event, StepToken) for event in events)
        heard(events)
    assert len(heard.ends) == 5
    assert tokens == 40 + 4 * 20 - 1
    assert all(heard.ends[str(number)][0].cached_tokens == 160 for number in range(1, 5))
    stepper.close()
