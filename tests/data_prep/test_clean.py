"""Cleaning: each rule by hand, and that no record's fate depends on another's."""

from typing import Any, Literal

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.config import Clean
from fedveil.data_prep.clean import CleaningReport, ColumnReport, DataError, clean
from fedveil.data_prep.schema import TableSchema, parse_schema

Rule = Literal["clip", "missing", "drop"]

NUMBER = {"name": "n", "kind": "numeric", "bounds": [0.0, 10.0]}
WHOLE = {"name": "n", "kind": "integer", "bounds": [0, 10]}
LETTER = {"name": "n", "kind": "categorical", "categories": ["a", "b"]}
GOOD = {"numeric": "5", "integer": "5", "categorical": "a"}


def schema_of(*columns: dict[str, Any], **options: Any) -> TableSchema:  # noqa: ANN401
    schema = parse_schema({"column": list(columns), **options}, "s.toml")
    assert isinstance(schema, TableSchema)
    return schema


def frame_of(**columns: list[str | None]) -> pl.DataFrame:
    return pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))


def cleaned(
    column: dict[str, Any],
    texts: list[str | None],
    rules: Clean | None = None,
    **options: Any,  # noqa: ANN401
) -> tuple[list[Any], ColumnReport]:
    """Cleans one column; a good value at its end keeps it from being wrong throughout."""
    frame = frame_of(n=[*texts, GOOD[column["kind"]]])
    found, report = clean(frame, schema_of(column, **options), rules or Clean())
    assert report.records == len(texts) + 1
    assert report.kept == found.height
    values = found["n"].to_list()
    assert values[-1] == (5.0 if column["kind"] != "categorical" else "a")
    return values[:-1], report.columns["n"]


# Missing values.


def test_values_are_trimmed() -> None:
    assert cleaned(NUMBER, [" 1.5 ", "\t2", "3\r"]) == ([1.5, 2.0, 3.0], ColumnReport())
    assert cleaned(LETTER, [" a", "b\t "]) == (["a", "b"], ColumnReport())


@pytest.mark.parametrize("marker", [None, "", "NA", "?", "  ", " ? ", "NA "])
def test_a_missing_value_stays_where_it_may_be_and_drops_the_record_where_not(
    marker: str | None,
) -> None:
    for column in (NUMBER, WHOLE, LETTER):
        assert cleaned({**column, "nullable": True}, [marker]) == ([None], ColumnReport(missing=1))
        assert cleaned(column, [marker]) == ([], ColumnReport(missing=1))


def test_missing_markers_are_the_declared_ones() -> None:
    nullable = {**NUMBER, "nullable": True}
    values, report = cleaned(nullable, ["-9", "NA"], missing=["-9"])
    assert values == [None, None]
    assert report == ColumnReport(missing=1, type_errors=1)


def test_no_missing_markers_may_be_declared() -> None:
    nullable = {**LETTER, "nullable": True}
    values, report = cleaned(nullable, ["?", None], missing=[])
    assert values == [None, None]
    assert report == ColumnReport(missing=1, unknown_categories=1)


# Numbers.


@pytest.mark.parametrize(
    "text", ["x", "nan", "NaN", "inf", "-inf", "Infinity", "1e999", "1,5", "1 2"]
)
def test_what_is_no_finite_number_is_a_type_error(text: str) -> None:
    nullable = {**NUMBER, "nullable": True}
    one = ColumnReport(type_errors=1)
    assert cleaned(nullable, [text]) == ([None], one)
    assert cleaned(NUMBER, [text]) == ([], one)
    assert cleaned(nullable, [text], Clean(type_error="drop")) == ([], one)


@pytest.mark.parametrize("text", ["1.5", "0.0001", "1e-3"])
def test_an_integer_is_whole(text: str) -> None:
    nullable = {**WHOLE, "nullable": True}
    assert cleaned(nullable, [text]) == ([None], ColumnReport(type_errors=1))
    assert cleaned(WHOLE, [text], Clean(type_error="drop")) == ([], ColumnReport(type_errors=1))


@pytest.mark.parametrize(("text", "number"), [("3", 3.0), ("3.0", 3.0), ("1e1", 10.0), ("+2", 2.0)])
def test_an_integer_may_be_written_in_many_ways(text: str, number: float) -> None:
    assert cleaned(WHOLE, [text]) == ([number], ColumnReport())


@pytest.mark.parametrize("column", [NUMBER, WHOLE], ids=["numeric", "integer"])
def test_bounds_are_inside(column: dict[str, Any]) -> None:
    assert cleaned(column, ["0", "10"]) == ([0.0, 10.0], ColumnReport())


@pytest.mark.parametrize(
    ("rule", "nullable", "expected"),
    [
        ("clip", False, [0.0, 10.0]),
        ("clip", True, [0.0, 10.0]),
        ("missing", False, []),
        ("missing", True, [None, None]),
        ("drop", False, []),
        ("drop", True, []),
    ],
)
def test_a_number_out_of_bounds(rule: Rule, nullable: bool, expected: list[float | None]) -> None:
    column = {**NUMBER, "nullable": nullable}
    values, report = cleaned(column, ["-0.5", "11"], Clean(out_of_bounds=rule))
    assert values == expected
    assert report == ColumnReport(out_of_bounds=2)


def test_a_type_error_is_not_out_of_bounds_too() -> None:
    nullable = {**WHOLE, "nullable": True}
    values, report = cleaned(nullable, ["99.5"], Clean(out_of_bounds="drop"))
    assert (values, report) == ([None], ColumnReport(type_errors=1))


# Categories.


def test_aliases_stand_for_their_category() -> None:
    column = {**LETTER, "aliases": {"alpha": "a", "B": "b"}}
    assert cleaned(column, ["alpha", " B ", "a"]) == (["a", "b", "a"], ColumnReport())


@pytest.mark.parametrize("text", ["A", "c", "1", "ab"])
def test_an_unknown_category(text: str) -> None:
    nullable = {**LETTER, "nullable": True}
    one = ColumnReport(unknown_categories=1)
    assert cleaned(nullable, [text]) == ([None], one)
    assert cleaned(LETTER, [text]) == ([], one)
    assert cleaned(nullable, [text], Clean(unknown_category="drop")) == ([], one)


# Whole records.


def test_a_record_is_kept_or_dropped_whole_and_the_report_counts_exactly() -> None:
    schema = schema_of(
        {"name": "age", "kind": "integer", "bounds": [0, 100]},
        {"name": "pay", "kind": "numeric", "bounds": [0.0, 1.0], "nullable": True},
        {"name": "sex", "kind": "categorical", "categories": ["f", "m"], "aliases": {"w": "f"}},
        person="id",
    )
    frame = frame_of(
        extra=["0", "1", "2", "3", "4", "5", "6"],
        sex=["f", "w", "m", "x", "f", None, "m"],
        age=["30", "200", "4.5", "40", "?", "x", "50"],
        pay=["0.5", "x", "0.1", "0.2", "0.3", "-1", "NA"],
        id=["p", " q ", "r", "s", "t", "u", "?"],
    )
    found, report = clean(frame, schema, Clean())
    # Dropped: 4.5 and ? and x are no age, x and null no sex; the last has no person.
    assert found.to_dict(as_series=False) == {
        "age": [30.0, 100.0], "pay": [0.5, None], "sex": ["f", "f"], "id": ["p", "q"],
    }  # fmt: skip
    assert found.dtypes == [pl.Float64, pl.Float64, pl.String, pl.String]
    assert report == CleaningReport(
        records=7,
        kept=2,
        columns={
            "age": ColumnReport(missing=1, type_errors=2, out_of_bounds=1),
            "pay": ColumnReport(missing=1, type_errors=1, out_of_bounds=1),
            "sex": ColumnReport(missing=1, unknown_categories=1),
        },
    )
    assert report.as_dict()["columns"]["age"] == {
        "missing": 1, "type_errors": 2, "unknown_categories": 0, "out_of_bounds": 1,
    }  # fmt: skip


@pytest.mark.parametrize("person", [None, "", "?", " NA "])
def test_a_record_of_nobody_is_dropped(person: str | None) -> None:
    frame = frame_of(n=["1", "2"], id=["p", person])
    found, report = clean(frame, schema_of(NUMBER, person="id"), Clean())
    assert found["id"].to_list() == ["p"]
    assert (report.records, report.kept) == (2, 1)


def test_nothing_stays_nothing() -> None:
    found, report = clean(frame_of(n=[]), schema_of(NUMBER), Clean())
    assert (found.height, report.records, report.kept) == (0, 0, 0)


@pytest.mark.parametrize(
    ("column", "texts", "message"),
    [
        (NUMBER, ["age", "sex"], "column \"n\" = 'age', ...: no value is of kind numeric"),
        (WHOLE, [None, "1.5"], "column \"n\" = '1.5', ...: no value is of kind integer"),
        (LETTER, ["x", "y"], "column \"n\" = 'x', ...: no value is one of a, b, ..."),
    ],
)
def test_a_column_that_is_wrong_throughout_is_refused(
    column: dict[str, Any], texts: list[str | None], message: str
) -> None:
    # Even where it may be missing: nobody wants a column of nothing but mistakes.
    with pytest.raises(DataError) as caught:
        clean(frame_of(n=texts), schema_of({**column, "nullable": True}), Clean())
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_nullable_column_may_be_empty() -> None:
    found, report = clean(frame_of(n=[None, "?"]), schema_of({**NUMBER, "nullable": True}), Clean())
    assert found["n"].to_list() == [None, None]
    assert report.kept == 2


def test_data_without_a_usable_record_is_refused_and_the_worst_column_named() -> None:
    schema = schema_of(NUMBER, {**LETTER, "name": "m"})
    frame = frame_of(n=[None, "1", "?"], m=["a", "c", None])
    with pytest.raises(DataError) as caught:
        clean(frame, schema, Clean())
    assert str(caught.value).startswith(
        "data: none of 3 records is usable: most is wrong in column \"n\" ({'missing': 2, "
    )


# No record's fate depends on another's.

SCHEMA = schema_of(
    {"name": "i", "kind": "integer", "bounds": [-3, 3]},
    {"name": "x", "kind": "numeric", "bounds": [0.0, 2.5], "nullable": True},
    {"name": "c", "kind": "categorical", "categories": ["a", "b"], "aliases": {"A": "a"}},
    {"name": "d", "kind": "categorical", "categories": ["u", "v", "w"], "nullable": True},
    person="id",
)
NAMES = ["i", "x", "c", "d", "id"]
ANCHOR = ("1", "1", "a", "u", "anchor")  # keeps every part from being wrong throughout

cells = (
    st.none()
    | st.sampled_from(["", "?", "NA", " ", "nan", "inf", "-inf", "1e400", "1e5", "-0", "0.1"])
    | st.sampled_from(["a", "b", "A", " a", "u", "v", "w", "z", "1", "2", "-3", "3", "4", "2.5"])
    | st.integers(-5, 5).map(str)
    | st.floats(-5, 5).map(repr)
    | st.text(max_size=4)
)
records = st.tuples(cells, cells, cells, cells, cells)
usable = st.tuples(
    st.integers(-5, 5).map(str),
    cells,
    st.sampled_from(["a", "b", "A"]),
    cells,
    st.text(max_size=2),
)
many = st.lists(records | usable, max_size=8)
rule_sets = st.builds(
    Clean,
    type_error=st.sampled_from(["missing", "drop"]),
    unknown_category=st.sampled_from(["missing", "drop"]),
    out_of_bounds=st.sampled_from(["clip", "missing", "drop"]),
)
Record = tuple[str | None, ...]


def rows(records: list[Record], rules: Clean) -> list[tuple[Any, ...]]:
    """The cleaned records, without the anchor that is cleaned along with them."""
    frame = pl.DataFrame([*records, ANCHOR], schema=dict.fromkeys(NAMES, pl.String), orient="row")
    found, report = clean(frame, SCHEMA, rules)
    kept = found.rows()
    assert report.kept == len(kept)
    assert kept[-1] == (1.0, 1.0, "a", "u", "anchor")
    return kept[:-1]


@given(many, many, rule_sets)
def test_cleaning_commutes_with_putting_together(
    first: list[Record], second: list[Record], rules: Clean
) -> None:
    assert rows(first + second, rules) == rows(first, rules) + rows(second, rules)


@given(many, records | usable, st.integers(0, 8), rule_sets)
def test_one_more_record_adds_at_most_itself(
    before: list[Record], record: Record, place: int, rules: Clean
) -> None:
    place = min(place, len(before))
    with_it = rows([*before[:place], record, *before[place:]], rules)
    alone = rows([record], rules)
    assert len(alone) <= 1
    start = len(rows(before[:place], rules))
    assert with_it[start : start + len(alone)] == alone
    assert with_it[:start] + with_it[start + len(alone) :] == rows(before, rules)


@given(many, rule_sets)
def test_cleaned_values_are_in_the_declared_domain(found: list[Record], rules: Clean) -> None:
    for i, x, c, d, person in rows(found, rules):
        assert -3 <= i <= 3
        assert i == int(i)
        assert x is None or 0 <= x <= 2.5
        assert c in ("a", "b")
        assert d in ("u", "v", "w", None)
        assert person is not None
        assert person == person.strip()
        assert person not in SCHEMA.missing


@given(many, rule_sets)
def test_cleaning_what_is_clean_changes_nothing(found: list[Record], rules: Clean) -> None:
    once = rows(found, rules)
    again = [tuple(v if v is None else str(v) for v in row) for row in once]
    assert rows(again, rules) == once
