"""Tokens → text: stop strings, limits, resuming."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.generation import REPLAYED_TOKENS, Generation, StopScan, encode, limit_tokens
from services.worker.ports import PositionLogprobs
from shared.contracts.generation import FinishReason, Frame, Ledger
from shared.contracts.requests import Sampling, TextPrompt, TokensPrompt
from shared.errors import Code, Failure
from tests.unit.worker.world import EOS, LetterTokenizer, request


def generation(*, so_far: Sequence[int] = (), limit: int = 100, echo_text: str = "", **sampling: Any) -> Generation:
    return Generation(
        request=request(sampling=Sampling(**sampling)),
        epoch=3,
        tokenizer=LetterTokenizer(),
        prompt_tokens=2,
        limit_tokens=limit,
        so_far=so_far,
        echo_text=echo_text,
    )


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def run(made: Generation, token_ids: Sequence[int]) -> tuple[list[Frame], str]:
    """Frames of one token each, and the whole text with that of the end."""
    frames = []
    for token_id in token_ids:
        if made.finished is not None:
            break
        made.push(token_id)
        frame = made.frame()
        assert frame is not None
        frames.append(frame)
    text = "".join(frame.text for frame in frames)
    return frames, text + made.end(made.finished or FinishReason.LENGTH, ledger=Ledger()).text


# -- stop strings


def scan(stops: Sequence[str], pieces: Sequence[str]) -> tuple[str, str | None]:
    scanner = StopScan(stops)
    text = "".join(scanner.push(piece) for piece in pieces)
    return text + scanner.finish(), scanner.found


def pieces_of(text: str, cuts: Sequence[int]) -> list[str]:
    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(borders)]


# Few letters and short stops, so that overlaps and near misses are the rule.
short_stops = st.lists(st.text("ab.", min_size=1, max_size=4), max_size=4)


@given(st.text("ab.", max_size=30), short_stops, st.lists(st.integers(0, 30), max_size=12))
def test_any_split_into_pieces_gives_the_text_of_the_whole(text: str, stops: list[str], cuts: list[int]) -> None:
    assert scan(stops, pieces_of(text, cuts)) == scan(stops, [text])


@given(st.text("ab.", max_size=30), short_stops)
def test_the_text_holds_no_stop_string_and_nothing_before_one_is_lost(text: str, stops: list[str]) -> None:
    released, found = scan(stops, list(text))
    assert not any(stop in released for stop in stops)
    assert text.startswith(released)
    if found is None:
        assert released == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(released + found)


def test_a_stop_string_across_three_tokens_is_cut_out_and_nothing_of_it_was_sent_before() -> None:
    scanner = StopScan(["END"])
    assert [scanner.push(piece) for piece in ("one E", "N", "D two")] == ["one ", "", ""]
    assert scanner.found == "END"


def test_what_only_began_like_a_stop_string_is_released_as_soon_as_it_is_none() -> None:
    scanner = StopScan(["END"])
    assert [scanner.push(piece) for piece in ("E", "N", "T")] == ["", "", "ENT"]


def test_what_began_like_a_stop_string_at_the_very_end_is_part_of_the_text() -> None:
    assert scan(["END"], ["the E", "N"]) == ("the EN", None)


def test_the_longest_of_the_stop_strings_that_end_together_wins() -> None:
    assert scan(["b", "ab"], ["xab"]) == ("x", "ab")


def test_an_empty_stop_string_stops_nothing() -> None:
    assert scan([""], ["abc"]) == ("abc", None)


# -- ends


def test_the_end_of_sequence_token_ends_the_text_counts_as_a_token_and_has_no_text() -> None:
    made = generation()
    frames, text = run(made, [*ids("ab"), EOS])
    assert (text, made.finished, made.usage().completion_tokens) == ("ab", FinishReason.STOP, 3)
    assert frames[-1].token_ids == (EOS,)
    assert frames[-1].text == ""


def test_with_ignore_eos_the_text_goes_on() -> None:
    made = generation(ignore_eos=True, limit=4)
    _, text = run(made, [*ids("a"), EOS, *ids("bc")])
    assert (text, made.finished) == ("a\0bc", FinishReason.LENGTH)


def test_a_stop_token_of_the_request_is_not_part_of_the_text_even_with_ignore_eos() -> None:
    made = generation(ignore_eos=True, stop_token_ids=(ord("x"),))
    assert run(made, ids("abxcd"))[1] == "ab"
    assert made.finished is FinishReason.STOP


def test_the_limit_ends_by_length_and_further_tokens_are_ignored() -> None:
    made = generation(limit=2)
    for token_id in ids("abcd"):
        made.push(token_id)
    assert (made.finished, made.index) == (FinishReason.LENGTH, 2)


def test_a_stop_string_completed_by_the_last_allowed_token_is_a_stop() -> None:
    made = generation(limit=4, stop=("EN",))
    assert run(made, ids("abEN"))[1] == "ab"
    assert made.end(FinishReason.LENGTH, ledger=Ledger()).reason is FinishReason.STOP


def test_the_end_tells_which_stop_string_it_was() -> None:
    made = generation(stop=("##", "EN"))
    run(made, ids("abEN"))
    assert made.end(FinishReason.STOP, ledger=Ledger()).stop == "EN"


def test_an_end_token_of_the_model_names_no_stop_string() -> None:
    made = generation(stop=("##",))
    run(made, [*ids("a"), EOS])
    assert made.end(FinishReason.STOP, ledger=Ledger()).stop is None


def test_half_a_character_and_half_a_stop_string_come_with_the_end() -> None:
    made = generation(limit=4, stop=("bc",))
    frames, text = run(made, [*ids("ab"), *ids("b"), 1])
    assert "".join(frame.text for frame in frames) == "ab"
    assert text == "abb\ufffd"


def test_a_limit_of_no_tokens_ends_at_once_with_the_echo() -> None:
    made = generation(limit=0, echo_text="hi")
    assert made.finished is FinishReason.LENGTH
    assert made.frame() is None
    assert made.end(FinishReason.LENGTH, ledger=Ledger()).text == "hi"


# -- frames


def test_a_frame_holds_all_tokens_since_the_last_one_and_their_index() -> None:
    made = generation()
    for token_id in ids("ab"):
        made.push(token_id)
    made.frame()
    for token_id in ids("cde"):
        made.push(token_id)
    frame = made.frame()
    assert frame == Frame(request_id="q1", epoch=3, index=2, token_ids=tuple(ids("cde")), text="cde")
    assert made.frame() is None


def test_the_echo_comes_once_with_the_first_token() -> None:
    made = generation(echo_text="hi")
    assert run(made, ids("ab"))[1] == "hiab"


def test_logprobs_are_named_and_stay_with_their_tokens() -> None:
    made = generation(logprobs=1)
    made.push(ord("a"), PositionLogprobs(chosen=-0.5, top=((ord("b"), -0.25),)))
    frame = made.frame()
    assert frame is not None
    (logprobs,) = frame.logprobs
    assert (logprobs.chosen.text, logprobs.chosen.logprob) == ("a", -0.5)
    assert [(top.text, top.logprob) for top in logprobs.top] == [("b", -0.25)]


# -- resuming


@given(
    st.lists(st.sampled_from([1, *ids("abE")]), max_size=20),
    st.lists(st.text("abEé", min_size=1, max_size=3), max_size=3),
    st.integers(0, 20),
    st.integers(1, 20),
)
def test_wherever_a_worker_takes_over_the_client_sees_the_same_text(
    token_ids: list[int], stops: list[str], cut: int, limit: int
) -> None:
    whole = generation(stop=tuple(stops), limit=limit)
    frames, text = run(whole, token_ids)
    delivered = frames[:cut]
    resumed = generation(
        stop=tuple(stops), limit=limit, so_far=[token for frame in delivered for token in frame.token_ids]
    )
    assert resumed.finished == (whole.finished if len(delivered) == len(frames) else None)
    more, rest = run(resumed, token_ids[len(delivered) :])
    assert "".join(frame.text for frame in delivered) + rest == text
    assert [frame.index for frame in more] == [frame.index for frame in frames[len(delivered) :]]
    assert resumed.usage() == whole.usage()


class CountingTokenizer(LetterTokenizer):
    pushed = 0

    def stream(self, *, skip_special: bool = True) -> Any:
        counting, inner = self, super().stream()

        class Stream:
            def push(self, token_id: int) -> str:
                counting.pushed += 1
                return inner.push(token_id)

            def finish(self) -> str:
                return inner.finish()

        return Stream()


@pytest.mark.parametrize("stop", [(), ("END",), ("x" * 300,)])
def test_who_takes_over_does_not_replay_a_long_text_from_its_beginning(stop: tuple[str, ...]) -> None:
    tokenizer = CountingTokenizer()
    made = Generation(
        request=request(sampling=Sampling(stop=stop)),
        epoch=3,
        tokenizer=tokenizer,
        prompt_tokens=2,
        limit_tokens=20_000,
        so_far=ids("a" * 10_000 + "EN"),
    )
    assert made.emitted == made.resumed_tokens == len(made.output) == 10_002
    assert tokenizer.pushed <= REPLAYED_TOKENS + 4 * max(map(len, stop), default=0)
    frames, text = run(made, ids("Db"))
    assert (text, made.finished) == (("", FinishReason.STOP) if stop == ("END",) else ("Db", None))
    assert frames[0].index == 10_002


def test_who_takes_over_does_not_echo_again() -> None:
    made = generation(so_far=ids("a"), echo_text="hi")
    assert run(made, ids("b"))[1] == "b"


def test_tokens_beyond_our_own_limit_were_delivered_and_count() -> None:
    made = generation(so_far=ids("abc"), limit=2)
    assert (made.finished, made.index) == (FinishReason.LENGTH, 3)
    assert made.end(FinishReason.LENGTH, ledger=Ledger()).text == ""


# -- prompts and limits


def test_max_tokens_is_cut_to_what_the_context_leaves() -> None:
    asked = request(sampling=Sampling(max_tokens=50))
    assert limit_tokens(asked, prompt_tokens=90, max_context_tokens=100) == 10
    assert limit_tokens(asked, prompt_tokens=10, max_context_tokens=100) == 50


def test_without_max_tokens_the_context_is_the_limit() -> None:
    assert limit_tokens(request(sampling=Sampling()), prompt_tokens=90, max_context_tokens=100) == 10


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers() -> None:
    failure = limit_tokens(request(), prompt_tokens=100, max_context_tokens=100)
    assert isinstance(failure, Failure)
    assert failure.code is Code.PROMPT_TOO_LONG
    assert failure.message == (
        "The prompt has 100 tokens; model demo takes at most 100 tokens including the completion."
    )


class TextTokenizer(LetterTokenizer):
    def encode_prompt(self, prompt: Any) -> list[int]:
        return ids(prompt.text) if isinstance(prompt, TextPrompt) else list(prompt.token_ids)


def test_the_echo_of_a_text_is_the_text_itself_and_of_tokens_their_text() -> None:
    tokenizer = TextTokenizer()
    assert encode(request(prompt=TextPrompt(text="hi"), echo=True), tokenizer) == ((104, 105), "hi")
    assert encode(request(prompt=TokensPrompt(token_ids=(104, 105)), echo=True), tokenizer) == ((104, 105), "hi")
    assert encode(request(prompt=TextPrompt(text="hi")), tokenizer) == ((104, 105), "")
