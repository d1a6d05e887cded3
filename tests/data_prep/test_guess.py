"""What a column seems to be: its kind, its rounded bounds, and why one is left out."""

import math
from collections.abc import Sequence

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.data_prep.guess import Guess, LeftOut, guess, round_outwards
from fedveil.data_prep.schema import Column


def series(values: Sequence[object], name: str = "c") -> pl.Series:
    return pl.Series(name, [None if v is None else str(v) for v in values], dtype=pl.String)


def column(values: Sequence[object], *, name: str = "c", label: bool = False) -> Column:
    return found(values, name=name, label=label).column


def found(values: Sequence[object], *, name: str = "c", label: bool = False) -> Guess:
    made = guess(series(values, name), label=label)
    assert isinstance(made, Guess), made
    return made


def left_out(values: Sequence[object], *, name: str = "c", label: bool = False) -> LeftOut:
    made = guess(series(values, name), label=label)
    assert isinstance(made, LeftOut), made
    assert made.name == name
    return made


# Bounds.


@pytest.mark.parametrize(
    ("low", "high", "whole", "bounds"),
    [
        (17, 90, True, (0, 100)),
        (1, 99, True, (0, 100)),
        (0, 4356, True, (0, 5000)),
        (12285, 1484705, True, (0, 1500000)),
        (1950, 2020, True, (1940, 2020)),
        (35.1, 41.2, False, (34, 42)),
        (0.1, 0.3, False, (0.1, 0.3)),
        (-7, 3, True, (-8, 4)),
        (1, 4, True, (1, 4)),
        (0, 7, True, (0, 8)),
        (0.0012, 0.0087, False, (0, 0.01)),
        (6.9, 7.6, False, (6.8, 7.6)),
    ],
)
def test_bounds_are_round_and_around(
    low: float, high: float, whole: bool, bounds: tuple[float, float]
) -> None:
    assert round_outwards(float(low), float(high), whole=whole) == bounds


@given(
    st.floats(-(2.0**53), 2.0**53),
    st.floats(-(2.0**53), 2.0**53),
    st.booleans(),
)
def test_bounds_hold_the_extremes_and_are_not_far(one: float, two: float, whole: bool) -> None:
    low, high = sorted([math.floor(one), math.ceil(two)] if whole else [one, two])
    if low == high:
        return
    below, above = round_outwards(float(low), float(high), whole=whole)
    assert below <= low < high <= above
    # A step is at most 5/2 of a fifth of the range (2 to 5), or 1; one at either end.
    step = max((high - low) / 2, 1.0 * whole)
    assert low - below <= step * 1.001
    assert above - high <= step * 1.001
    assert not whole or (below.is_integer() and above.is_integer())


# Numbers.


def test_whole_numbers_are_integers_also_as_44_0() -> None:
    made = column([*range(20, 89, 2), *range(21, 90, 2), "44.0", None])
    assert (made.kind, made.bounds, made.nullable) == ("integer", (20, 100), True)
    assert made.unconfirmed == ("name", "kind", "bounds", "nullable")


def test_fractions_are_numeric_however_unique() -> None:
    made = column([i + 0.5 for i in range(100)])
    assert (made.kind, made.bounds, made.nullable) == ("numeric", (0, 100), False)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0, 1] * 10, "categorical"),
        (["1.0", "1", 2] * 10, "integer"),  # two numbers in three spellings
        ([0.5, 1.0] * 10, "numeric"),
        ([1, 2, 3, 4] * 10, "integer"),
    ],
)
def test_numbers_with_few_values(values: list[object], kind: str) -> None:
    assert column(values).kind == kind


def test_few_whole_numbers_may_be_codes() -> None:
    assert found([1, 2, 3] * 9).remarks == (
        'Few distinct numbers: kind = "categorical" if they are codes.',
    )


def test_a_few_words_among_many_numbers_are_slips() -> None:
    made = found([*range(1, 100, 2), *range(0, 100, 2), "x", "inf"])
    assert (made.column.kind, made.column.bounds) == ("integer", (0, 100))
    assert made.remarks == ("Some values are no finite numbers; `fedveil data check` shows them.",)


def test_a_word_among_few_numbers_is_a_category() -> None:
    assert column([0, 1, 2, 3, "4+"] * 10).categories == ("0", "1", "2", "3", "4+")


def test_codes_with_leading_noughts_are_words() -> None:
    assert column(["01", "02", "10"] * 5).categories == ("01", "02", "10")


@pytest.mark.parametrize(
    ("values", "tailed"),
    [
        ([0] * 50 + [10, 100, 99999], True),
        ([*range(0, 200, 4), *range(2, 200, 4)], False),
        ([0.0] * 50 + [0.1, 0.9], False),  # log1p does nothing to small numbers
        ([-1] + [0] * 50 + [10, 100, 99999], False),
    ],
)
def test_log1p_is_suggested_for_a_long_tail_of_large_amounts(
    values: list[object], tailed: bool
) -> None:
    assert ('transform = "log1p"' in (found(values).suggestion or "")) == tailed


def test_numbers_beyond_what_a_schema_takes_are_left_out() -> None:
    assert left_out([1e17, 2.5, 1.0]).why == "it holds numbers beyond 2^53; use a larger unit"


# Words.


def test_categories_are_sorted_by_name_and_not_by_how_often_they_are_there() -> None:
    made = column(["b"] * 9 + ["a", "c", None])
    assert (made.kind, made.categories, made.nullable) == ("categorical", ("a", "b", "c"), True)
    assert made.unconfirmed == ("name", "kind", "categories", "nullable")


def test_spellings_in_another_case_are_told() -> None:
    made = found(["Male", "male", "Female"] * 4)
    assert made.suggestion == 'aliases = { "male" = "Male" }'
    assert made.remarks == (
        "Some categories differ by case only: keep one of each if they are one.",
    )


@pytest.mark.parametrize(("count", "drafted"), [(50, True), (51, False)])
def test_more_than_fifty_words_are_no_categories(count: int, drafted: bool) -> None:
    values = [f"w{i}" for i in range(count)] * 3
    if drafted:
        assert len(column(values).categories) == 50
    else:
        assert "more than 50" in left_out(values).why


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([], "it has no value"),
        ([None] * 5, "it has no value"),
        (["x"] * 5, "it has one value only"),
        (["x", None], "it has one value only"),
        (["1", "1.0"], "it has one number only"),
        (["inf", "-inf"], "it has one number only"),
    ],
)
def test_a_column_that_says_nothing_is_left_out(values: list[object], why: str) -> None:
    assert left_out(values).why == why


@pytest.mark.parametrize(
    "day", ["2020-01-{:02}", "{:02}.03.1999", "{}/12/20", "2020-01-{:02} 10:00:00", "2020/1/{}"]
)
def test_dates_are_left_out(day: str) -> None:
    assert "dates" in left_out([day.format(i % 28 + 1) for i in range(60)]).why


def test_words_of_their_own_are_a_key_and_long_ones_free_text() -> None:
    assert left_out([f"P{i}" for i in range(30)]).key
    text = left_out([f"{i} {'long ' * 20}" for i in range(30)])
    assert (text.key, text.why) == (False, "it seems to be free text")


@pytest.mark.parametrize(
    ("values", "name", "key"),
    [
        (list(range(1000, 1060)), "n", True),  # counted through
        ([i * 7 % 60 for i in range(60)], "n", False),  # no more than sixty ages
        ([i * 7 % 300 for i in range(300)], "n", True),
        ([i * i for i in range(60)], "n", False),  # unique, but spread like an amount
        ([i * i for i in range(60)] * 3, "patient_id", True),
        ([i * i for i in range(60)] * 3, "paid", False),
        ([i + 0.5 for i in range(60)], "id", False),
    ],
)
def test_which_whole_numbers_seem_to_be_a_key(values: list[object], name: str, key: bool) -> None:
    made = guess(series(values, name))
    assert (isinstance(made, LeftOut) and made.key) == key


def test_control_characters_around_a_category_leave_it_out() -> None:
    assert "control characters" in left_out(["\x1ca", "b"] * 6).why


# The label.


def test_a_label_is_categorical_and_never_nullable() -> None:
    made = found([0, 1, 2, None] * 5, label=True)
    assert made.column.categories == ("0", "1", "2")
    assert not made.column.nullable
    assert made.remarks == ("Some records have no label: they will be dropped.",)


def test_what_has_too_many_values_is_no_label() -> None:
    assert "more than 50" in left_out([*range(60)] * 2, label=True).why
    assert "value of its own" in left_out(range(60), label=True).why
