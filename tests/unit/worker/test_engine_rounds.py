"""Rounds of a migration as the destination's engine sees them: growing prefixes, then the sequence that goes on."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch

from services.worker.engine import VERIFIED_TYPES, BatchingStepper, kv_bytes_per_token, make_engine
from services.worker.engine_sequential import SequentialStepper
from services.worker.engine_thread import Stepper, Submission
from services.worker.ports import EndReason, PositionLogprobs, SequenceEnd, StepToken
from shared.contracts.requests import Sampling
from tests.builders.models import make_config
from tests.unit.worker.sinks import Recorder

pytestmark = pytest.mark.torch

TOKENS = 60
CUTS = (7, 24, 25, 41)  # output tokens at the end of each round
HANDED_OVER = 44
ROUND = Sampling(temperature=0.0, ignore_eos=True)
HOWS = (
    Sampling(temperature=0.0, logprobs=2),
    Sampling(seed=3, logprobs=0),
    Sampling(seed=4, top_k=20, repetition_penalty=1.2, logprobs=5),
    Sampling(seed=5, top_p=0.9, temperature=0.8, presence_penalty=0.7, frequency_penalty=0.4, logprobs=1),
    Sampling(seed=6, min_p=0.05, logit_bias={17: 4.0, 30: -5.0}, logprobs=3),
    Sampling(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.3),
)
# Sliding windows of 32 tokens are shorter than the sequences, those of "-wide" longer than any; Gemma 2 has a window in
# every other layer, and Falcon is served one sequence at a time.
SHARED = (*sorted(VERIFIED_TYPES), "qwen2_moe")
UNSHARED = ("mistral-narrow", "gemma2", "qwen2-hybrid")


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

    architecture = kind.split("-")[0]
    config = make_config(architecture, eos_token_id=None)
    if kind in ("mistral-narrow", "gemma2"):
        config.sliding_window = 32
    if kind == "qwen2-hybrid":
        config.sliding_window, config.layer_types = 32, ["full_attention", "sliding_attention"]
    config.initializer_range = config.init_std = 0.08
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def stepper_of(model: Any, engine: str = "batching", **fields: Any) -> Any:
    if engine == "sequential":
        return SequentialStepper(model, kv_bytes=1 << 24, kv_bytes_per_token=1 << 12, max_context_tokens=400)
    return BatchingStepper(model, **({"kv_bytes": 1 << 23, "slots": 8, "max_context_tokens": 400} | fields))


def prompt_of(seed: int, tokens: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(5, 500) for _ in range(tokens)]


def run(stepper: Stepper, heard: Recorder, *sequence_ids: str) -> None:
    """Step until these have ended."""
    for _ in range(5000):
        if heard.ends.keys() >= set(sequence_ids):
            return
        heard(stepper.step())
    raise AssertionError("the sequences do not end")


def sequence(name: str, tokens: list[int], first_index: int, count: int, how: Sampling) -> Submission:
    return Submission(name, tokens, first_index, count, how, frozenset())


def same_logprobs(ones: list[PositionLogprobs | None], others: list[PositionLogprobs | None]) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.chosen == pytest.approx(other.chosen, abs=1e-3)
            assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-3)


def migrate(
    model: Any, hows: Sequence[Sampling], engine: str, lengths: Sequence[int], round_tokens: int
) -> list[list[int]]:
    """These sequences undisturbed, and in rounds; they must say the same.

    Returns, for each, how many tokens of each round and of what was handed over had to be computed.
    """
    prompts = [prompt_of(number, length) for number, length in enumerate(lengths)]
    alone, undisturbed = stepper_of(model, engine), Recorder()
    for number, how in enumerate(hows):
        alone.add(sequence(str(number), prompts[number], 0, TOKENS, how))
    run(alone, undisturbed, *map(str, range(len(hows))))
    alone.close()

    destination, heard = stepper_of(model, engine), Recorder()
    others = [] if engine == "sequential" else ["other0", "other1"]
    for number, name in enumerate(others):
        destination.add(sequence(name, prompt_of(100 + number, 40 + number), 0, 350, HOWS[number]))
    for _ in range(3 if others else 0):
        heard(destination.step())
    computed: list[list[int]] = [[] for _ in hows]
    for at, cut in enumerate((*CUTS, HANDED_OVER)):
        names = [f"{number}.{at}" for number in range(len(hows))]
        for number, how in enumerate(hows):
            tokens = [*prompts[number], *undisturbed.tokens[str(number)][:cut]]
            if cut == HANDED_OVER:
                destination.add(sequence(names[number], tokens, cut, TOKENS - cut, how))
            else:
                destination.add(sequence(names[number], tokens, cut, round_tokens, ROUND))
        run(destination, heard, *names)
        for number, name in enumerate(names):
            computed[number].append(lengths[number] + cut - heard.ends[name][0].cached_tokens)
    for number in range(len(hows)):
        name = f"{number}.{len(CUTS)}"
        assert heard.tokens[name] == undisturbed.tokens[str(number)][HANDED_OVER:]
        same_logprobs(heard.logprobs[name], undisturbed.logprobs[str(number)][HANDED_OVER:])
    for name in others:
        assert name not in heard.ends
        destination.remove(name)
    destination.close()
    return computed


def differences(length: int) -> list[int]:
    """Tokens between the ends of one round and the next, and of the hand-over."""
    return [length + CUTS[0], *(later - sooner for sooner, later in pairwise((*CUTS, HANDED_OVER)))]


LENGTHS = (50, 81, 112, 143, 174, 205)


@pytest.mark.parametrize("kind", SHARED)
def test_rounds_compute_the_difference_and_the_stream_goes_on(kind: str) -> None:
    for round_tokens in (1, 2):
        for length, found in zip(
            LENGTHS, migrate(model_of(kind), HOWS, "batching", LENGTHS, round_tokens), strict=True
        ):
            assert found[0] == length + CUTS[0]
            for one, other in zip(found[1:], differences(length)[1:], strict=True):
                assert other <= one <= other + 16, "more than the difference and one unfinished block"


@pytest.mark.parametrize("kind", UNSHARED)
def test_where_nothing_can_be_shared_the_stream_goes_on_all_the_same(kind: str) -> None:
    for length, found in zip(LENGTHS, migrate(model_of(kind), HOWS, "batching", LENGTHS, 1), strict=True):
        assert found == [length + cut for cut in (*CUTS, HANDED_OVER)]


@pytest.mark.parametrize("kind", ["falcon", "llama", "gpt2"])
def test_one_at_a_time_rounds_compute_the_difference_too(kind: str) -> None:
    for number, how in enumerate(HOWS):
        length = LENGTHS[number]
        for round_tokens in (1, 2):
            (found,) = migrate(model_of(kind), [how], "sequential", [length], round_tokens)
            for one, other in zip(found, differences(length), strict=True):
                # The second token of a round is in the cache, and may be what the stream says.
                assert other - (round_tokens - 1) <= one <= other


def test_one_at_a_time_a_window_is_shared_where_nothing_has_to_be_cut() -> None:
    for how in HOWS:
        (found,) = migrate(model_of("mistral-narrow"), [how], "sequential", [50], 1)
        assert found == differences(50)
    (found,) = migrate(model_of("mistral-narrow"), HOWS[1:2], "sequential", [50], 2)
    assert any(one == 50 + cut for one, cut in zip(found[1:], (*CUTS[1:], HANDED_OVER), strict=True))


def test_the_last_block_of_a_round_with_one_token_is_shared() -> None:
    """Transformers leaves out what a sequence's last step completed; a round of one token is nothing but such steps."""
    stepper, heard = stepper_of(model_of("llama")), Recorder()
    prompt = prompt_of(5, 96)
    for name, tokens in (("a", prompt), ("b", [*prompt, 7])):
        stepper.add(sequence(name, tokens, 0, 1, ROUND))
        run(stepper, heard, name)
    assert heard.ends["b"][0].cached_tokens == 96
    stepper.close()


def test_a_round_that_leaves_room_for_one_token_only() -> None:
    heard = Recorder()
    for engine in ("batching", "sequential"):
        started, _ = make_engine(
            model_of("llama"),
            engine=engine,
            kv_bytes=64 * kv_bytes_per_token(model_of("llama").config, torch.float32),
            slots=2,
            max_context_tokens=64,
            eos_token_ids=[],
            sink=heard,
        )
        name = f"{engine}.0"
        started.submit(name, prompt_of(1, 63), first_index=3, max_new_tokens=1, sampling=ROUND)
        assert heard.end(name).reason is EndReason.LENGTH
        assert len(heard.tokens[name]) == 1
        started.submit(f"{engine}.1", prompt_of(1, 62), first_index=3, max_new_tokens=2, sampling=ROUND)
        heard.ended(f"{engine}.1")
        assert len(heard.tokens[f"{engine}.1"]) == 2
        started.close()


def test_two_engines_hand_streams_to_each_other_at_the_same_time() -> None:
    """Eight streams on each of two engines; half of each moves to the other in rounds while all go on."""
    model, count = model_of("qwen3"), 300
    heard = {"left": Recorder(), "right": Recorder()}
    engines = {
        side: make_engine(
            model, engine="batching", kv_bytes=1 << 24, slots=16, max_context_tokens=400, eos_token_ids=[], sink=sink
        )[0]
        for side, sink in heard.items()
    }
    names = [f"{side}{number}" for side in engines for number in range(8)]
    prompts = {name: prompt_of(at, 30 + 4 * at) for at, name in enumerate(names)}
    hows = {name: HOWS[at % len(HOWS)] for at, name in enumerate(names)}
    undisturbed, alone = Recorder(), stepper_of(model, slots=16, kv_bytes=1 << 24)
    for name in names:
        alone.add(sequence(name, prompts[name], 0, count, hows[name]))
    run(alone, undisturbed, *names)
    alone.close()
    for name in names:
        engines[name[:-1]].submit(name, prompts[name], first_index=0, max_new_tokens=count, sampling=hows[name])

    def move(source: str, destination: str) -> None:
        tokens = heard[source].tokens
        for number in range(4):
            name = f"{source}{number}"
            for part in range(3):
                so_far = tokens.get(name, [])[:]
                engines[destination].submit(
                    f"{name}.{part}",
                    [*prompts[name], *so_far],
                    first_index=len(so_far),
                    max_new_tokens=1,
                    sampling=ROUND,
                )
                heard[destination].ended(f"{name}.{part}")
            engines[source].cancel(name)
            heard[source].ended(name)
            so_far = tokens[name][:]
            engines[destination].submit(
                f"{name}.moved", [*prompts[name], *so_far], first_index=len(so_far),
                max_new_tokens=count - len(so_far), sampling=hows[name],
            )  # fmt: skip

    threads = [threading.Thread(target=move, args=sides) for sides in (("left", "right"), ("right", "left"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for source, destination in (("left", "right"), ("right", "left")):
        for number in range(8):
            name = f"{source}{number}"
            heard[source].ended(name)
            if number < 4:
                heard[destination].ended(f"{name}.moved")
                assert heard[source].end(name).reason is EndReason.CANCELLED, "it was over before it moved"
                assert heard[destination].end(f"{name}.moved").cached_tokens > 0
            moved = heard[destination].tokens.get(f"{name}.moved", [])
            assert heard[source].tokens[name] + moved == undisturbed.tokens[name]
    for engine in engines.values():
        engine.close()


def test_after_many_migrations_and_cancellations_every_block_is_free() -> None:
    model = model_of("llama")
    chance = random.Random(4)
    stepper = stepper_of(model, kv_bytes=100 * 16 * kv_bytes_per_token(model.config, torch.float32))
    empty, heard = stepper.free_blocks_bytes, Recorder()
    common = prompt_of(0, 64)
    live: list[str] = []
    for migration in range(200):
        tokens = [*common[: chance.choice((0, 20, 64))], *prompt_of(migration + 1, chance.randrange(1, 120))]
        done = 0
        for number in range(chance.randrange(1, 4)):
            name = f"{migration}.{number}"
            stepper.add(sequence(name, tokens, done, chance.choice((1, 2)), ROUND))
            live.append(name)
            for _ in range(chance.randrange(0, 5)):
                if live := [name for name in live if name not in heard.ends]:
                    heard(stepper.step())
            gap = chance.randrange(1, 20)
            tokens = [*tokens, *prompt_of(7000 + migration, gap)]
            done += gap
        name = f"{migration}.moved"
        stepper.add(sequence(name, tokens, done, chance.randrange(1, 30), HOWS[migration % len(HOWS)]))
        live.append(name)
        for _ in range(chance.randrange(0, 8)):
            if live := [name for name in live if name not in heard.ends]:
                heard(stepper.step())
        live = [name for name in live if name not in heard.ends]
        for name in chance.sample(live, len(live) // 3):
            stepper.remove(name)
            live.remove(name)
    run(stepper, heard, *live)
    assert stepper.free_blocks_bytes == empty
    scheduler, ledger = stepper._scheduler, stepper._processor.cache.cache_allocators["full_attention"].ledger
    assert not scheduler._arrivals
    assert not scheduler.active_requests
    assert not scheduler.waiting_requests
    assert not ledger.shared_ref_counts
    assert ledger.cached_blocks.keys() == ledger.block_to_hash.keys()
    assert not stepper._live
    stepper.close()


def test_sharing_needs_the_whole_prefix_to_be_the_same() -> None:
    """The second block is the same in both, the first is not: its keys and values are others."""
    model = model_of("llama")
    ends, ones, others = prompt_of(1, 40), prompt_of(2, 16), prompt_of(3, 16)
    plain: dict[str, list[int]] = {}
    stepper, heard = stepper_of(model), Recorder()
    for name, beginning in (("ones", ones), ("others", others)):
        fresh = stepper_of(model)
        fresh.add(sequence(name, [*beginning, *ends], 0, 20, ROUND))
        alone = Recorder()
        run(fresh, alone, name)
        fresh.close()
        plain[name] = alone.tokens[name]
        stepper.add(sequence(name, [*beginning, *ends], 0, 20, ROUND))
        run(stepper, heard, name)
        assert heard.ends[name][0].cached_tokens == 0
    assert heard.tokens == plain
    assert plain["ones"] != plain["others"]
    stepper.close()


def test_an_unfinished_block_is_never_shared() -> None:
    stepper, heard = stepper_of(model_of("llama")), Recorder()
    prompt = prompt_of(1, 31)
    stepper.add(sequence("a", prompt, 0, 40, ROUND))
    heard(stepper.step())
    stepper.add(sequence("b", [*prompt[:30], 9, 9, 9], 0, 5, ROUND))
    run(stepper, heard, "a", "b")
    assert heard.ends["b"][0].cached_tokens == 16
    stepper.close()


def test_blocks_in_use_by_another_survive_a_cancellation() -> None:
    model = model_of("llama")
    prompt = prompt_of(1, 100)
    alone, undisturbed = Recorder(), stepper_of(model)
    undisturbed.add(sequence("b", prompt, 0, 80, ROUND))
    run(undisturbed, alone, "b")
    undisturbed.close()
    stepper, heard = stepper_of(model, kv_bytes=24 * 16 * kv_bytes_per_token(model.config, torch.float32)), Recorder()
    stepper.add(sequence("a", prompt, 0, 80, ROUND))
    heard(stepper.step())
    stepper.add(sequence("b", prompt, 0, 80, ROUND))
    for _ in range(3):
        heard(stepper.step())
    stepper.remove("a")
    for number in range(12):  # these take every block that is free, and write into it
        stepper.add(sequence(f"c{number}", prompt_of(50 + number, 60), 0, 60, ROUND))
    run(stepper, heard, "b")
    assert heard.ends["b"][0].cached_tokens == 96
    assert heard.tokens["b"] == alone.tokens["b"]
    stepper.close()


def test_blocks_are_found_by_long_hashes_with_a_key() -> None:
    from transformers.generation.continuous_batching.cache_allocators import cache_allocator

    stepper = stepper_of(model_of("llama"))
    tokens = list(range(16))
    parent = cache_allocator.compute_block_hash(None, tokens)
    assert parent.bit_length() > 64
    assert cache_allocator.compute_block_hash(parent, tokens) not in (
        parent,
        cache_allocator.compute_block_hash(parent ^ 1, tokens),
    )
    assert cache_allocator.compute_block_hash(None, tokens) == parent
    stepper.add(sequence("a", prompt_of(1, 40), 0, 1, ROUND))
    stepper.step()
    ledger = stepper._processor.cache.cache_allocators["full_attention"].ledger
    assert max(ledger.hash_to_block).bit_length() > 64
    stepper.close()


def test_what_was_used_longest_ago_is_forgotten_first_and_no_more_than_is_needed() -> None:
    model = model_of("llama")
    stepper = stepper_of(
        model, kv_bytes=30 * 16 * kv_bytes_per_token(model.config, torch.float32), max_context_tokens=400
    )
    heard = Recorder()
    for name in ("old", "new"):
        stepper.add(sequence(name, prompt_of(len(name) + ord(name[0]), 160), 0, 1, ROUND))
        run(stepper, heard, name)
    stepper.add(sequence("again", [*prompt_of(3 + ord("n"), 160), 5], 0, 1, ROUND))
    run(stepper, heard, "again")
    assert heard.ends["again"][0].cached_tokens == 160
    stepper.add(sequence("big", prompt_of(9, 240), 0, 1, ROUND))  # 15 blocks, of which ten are free
    run(stepper, heard, "big")
    stepper.add(sequence("new again", [*prompt_of(3 + ord("n"), 160), 5], 0, 1, ROUND))
    stepper.add(sequence("old again", [*prompt_of(3 + ord("o"), 160), 5], 0, 1, ROUND))
    run(stepper, heard, "new again", "old again")
    assert heard.ends["new again"][0].cached_tokens == 160
    assert 16 <= heard.ends["old again"][0].cached_tokens < 160, "its end was forgotten, its beginning was not"
    stepper.close()


def test_steps_tell_tokens_before_ends() -> None:
    stepper = stepper_of(model_of("llama"))
    stepper.add(sequence("a", [5, 6], 0, 1, ROUND))
    first, last = stepper.step()
    assert isinstance(first, StepToken)
    assert isinstance(last, SequenceEnd)
    stepper.close()
