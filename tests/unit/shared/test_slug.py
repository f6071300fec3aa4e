"""Names and slugs."""

from __future__ import annotations

import pytest

from shared.backoff import delay_s
from shared.errors import TABLE, Code, HearthError
from shared.slug import check_name, slug
from shared.subjects import ID_PATTERN


@pytest.mark.parametrize("name", ["demo", "org/model-7b", "llama3.1:8b", "a", "A" * 128])
def test_good_names_have_slugs_that_fit_into_subjects(name: str) -> None:
    assert check_name(name) == name
    assert ID_PATTERN.fullmatch(slug(name))


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "../a", "a/..", "a/./b", "a b", "a\n", "ä", "-a", "A" * 129, "a\\b"]
)
def test_bad_names_are_refused_with_the_rule(name: str) -> None:
    with pytest.raises(HearthError) as caught:
        check_name(name)
    assert caught.value.failure.param == "name"


def test_distinct_names_have_distinct_slugs() -> None:
    names = ["a/b", "a-b", "a.b", "a:b", "a_b"]
    assert len({slug(name) for name in names}) == len(names)


def test_backoff_grows_and_is_bounded() -> None:
    assert [delay_s(n, first_s=1, most_s=5) for n in (0, 1, 2, 3, 4, 10_000)] == [0, 1, 2, 4, 5, 5]


def test_every_error_code_has_its_row() -> None:
    assert set(TABLE) == set(Code)
