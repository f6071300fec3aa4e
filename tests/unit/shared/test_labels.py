"""Labels: their grammar and their limits."""

from __future__ import annotations

import pytest

from shared.errors import Code, HearthError
from shared.labels import MOST_LABELS, check_labels, labels_text, parse_labels


def test_labels_are_written_as_pairs() -> None:
    assert parse_labels("") == parse_labels("  ") == {}
    assert parse_labels("gpu=a40") == {"gpu": "a40"}
    assert parse_labels(" zone=eu-west-1 , example.com/pool=x_1,empty=") == {
        "zone": "eu-west-1", "example.com/pool": "x_1", "empty": "",
    }  # fmt: skip
    assert labels_text({"b": "2", "a": "1"}) == "a=1, b=2"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("gpu", "'gpu' is no KEY=VALUE"),
        ("a=1,,b=2", "'' is no KEY=VALUE"),
        ("a=1,a=2", "'a' is there twice"),
        ("=1", "'' is no key"),
        ("-a=1", "'-a' is no key"),
        ("a b=1", "'a b' is no key"),
        ("k" * 64 + "=1", "is no key"),
        ("a=b=c", "'b=c' is no value of 'a'"),
        ("a=x/y", "'x/y' is no value of 'a'"),
        ("a=x-", "'x-' is no value of 'a'"),
        ("a=" + "v" * 64, "is no value of 'a'"),
        ("a=ä", "'ä' is no value of 'a'"),
        (",".join(f"k{number}=v" for number in range(MOST_LABELS + 1)), "must not be more than 16, not 17"),
    ],
)
def test_what_is_no_label_is_refused_with_the_rule_that_it_breaks(text: str, sentence: str) -> None:
    with pytest.raises(HearthError, match="labels") as caught:
        parse_labels(text)
    assert sentence in caught.value.failure.message
    assert (caught.value.failure.code, caught.value.failure.param) == (Code.INVALID_REQUEST, "labels")


def test_a_value_may_end_with_no_newline() -> None:
    with pytest.raises(HearthError):
        check_labels({"a": "b\n"})
