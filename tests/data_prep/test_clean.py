"""Cleaning: each rule by hand, and that no record's fate depends on another's."""

from typing import Any, Literal

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.config import Clean
from fedveil.data_prep.clean import (
    CleaningReport,
    ColumnReport,
    DataError,
    clean,
    refuse_unusable,
)
from fedveil.data_prep.schema import TableSchema, parse_schema

Rule = Literal["clip", "missing", "drop"]

NUMBER = {"name": "n", "kind": "numeric", "bounds": [0.0, 10.0]}
WHOLE = {"name": "n", "kind": "integer", "bounds": [0, 10]}
LETTER = {"name": "n", "kind": "categorical", "categories": ["a", "b"]}
OTHER = {"name": "o", "kind": "categorical", "categories": ["k", "l"]}


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
    """Cleans one column; a good one beside it keeps its records from being blank."""
    frame = frame_of(n=texts, o=["k"] * len(texts))
    found, report = clean(frame, schema_of(column, OTHER, **options), rules or Clean())
    assert report.records == len(texts)
    assert report.blank == 0
    assert report.kept == found.height
    assert report.columns["o"] == ColumnReport()
    assert found["o"].to_list() == ["k"] * found.height
    return found["n"].to_list(), report.columns["n"]


def refusal(report: CleaningReport) -> str:
    """The one line that refuses what cleaning found."""
    with pytest.raises(DataError) as caught:
        refuse_unusable(report)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    return line


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
    assert report == ColumnReport(missing=1, type_errors=1, example="NA")


@pytest.mark.parametrize("missing", [[], ["-9"], [""]])
@pytest.mark.parametrize("nothing", [None, "", " ", "\t"])
def test_nothing_at_all_is_missing_whatever_is_declared(
    missing: list[str], nothing: str | None
) -> None:
    for column in (NUMBER, WHOLE, LETTER):
        nullable = {**column, "nullable": True}
        one = ColumnReport(missing=1)
        assert cleaned(nullable, [nothing], missing=missing) == ([None], one)
        assert cleaned(column, [nothing], missing=missing) == ([], one)


def test_nothing_at_all_has_no_alias() -> None:
    column = {**LETTER, "nullable": True, "aliases": {"": "a"}}
    assert cleaned(column, [""], missing=[]) == ([None], ColumnReport(missing=1))


def test_no_missing_markers_may_be_declared() -> None:
    nullable = {**LETTER, "nullable": True}
    values, report = cleaned(nullable, ["?", None], missing=[])
    assert values == [None, None]
    assert report == ColumnReport(missing=1, unknown_categories=1, example="?")


# Numbers.


@pytest.mark.parametrize(
    "text", ["x", "nan", "NaN", "inf", "-inf", "Infinity", "1e999", "1,5", "1 2"]
)
def test_what_is_no_finite_number_is_a_type_error(text: str) -> None:
    nullable = {**NUMBER, "nullable": True}
    one = ColumnReport(type_errors=1, example=text)
    assert cleaned(nullable, [text]) == ([None], one)
    assert cleaned(NUMBER, [text]) == ([], one)
    assert cleaned(nullable, [text], Clean(type_error="drop")) == ([], one)


@pytest.mark.parametrize("text", ["1.5", "0.0001", "1e-3"])
def test_an_integer_is_whole(text: str) -> None:
    nullable = {**WHOLE, "nullable": True}
    one = ColumnReport(type_errors=1, example=text)
    assert cleaned(nullable, [text]) == ([None], one)
    assert cleaned(WHOLE, [text], Clean(type_error="drop")) == ([], one)


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
    assert report == ColumnReport(out_of_bounds=2, example="-0.5")


def test_a_type_error_is_not_out_of_bounds_too() -> None:
    nullable = {**WHOLE, "nullable": True}
    values, report = cleaned(nullable, ["99.5"], Clean(out_of_bounds="drop"))
    assert (values, report) == ([None], ColumnReport(type_errors=1, example="99.5"))


# Examples.


@pytest.mark.parametrize(
    ("column", "texts", "example"),
    [
        (NUMBER, ["1", " 2x ", "3x"], "2x"),
        (NUMBER, ["1", "11", "3x"], "11"),
        (NUMBER, ["?", "3x", "11"], "3x"),
        (LETTER, ["a", "\tC ", "D"], "C"),
        (NUMBER, ["1", None, "?"], None),
        (LETTER, ["a", "", "B"], None),
        (NUMBER, [], None),
    ],
)
def test_the_example_is_the_first_bad_value_trimmed_as_it_came(
    column: dict[str, Any], texts: list[str | None], example: str | None
) -> None:
    aliases = {"aliases": {"B": "b"}} if column is LETTER else {}
    for rules in (Clean(), Clean(type_error="drop", unknown_category="drop", out_of_bounds="drop")):
        _, report = cleaned({**column, **aliases}, texts, rules)
        assert report.example == example


# Categories.


def test_aliases_stand_for_their_category() -> None:
    column = {**LETTER, "aliases": {"alpha": "a", "B": "b"}}
    assert cleaned(column, ["alpha", " B ", "a"]) == (["a", "b", "a"], ColumnReport())


@pytest.mark.parametrize("text", ["A", "c", "1", "ab"])
def test_an_unknown_category(text: str) -> None:
    nullable = {**LETTER, "nullable": True}
    one = ColumnReport(unknown_categories=1, example=text)
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
        extra=["0", "1", "2", "3", "4", "5", "6", "7", "8"],
        sex=["f", "w", "m", "x", "f", None, "m", None, " "],
        age=["30", "200", "4.5", "40", "?", "x", "50", None, "?"],
        pay=["0.5", "x", "0.1", "0.2", "0.3", "-1", "NA", None, "NA"],
        id=["p", " q ", "r", "s", "t", "u", "?", None, ""],
    )
    found, report = clean(frame, schema, Clean())
    # Dropped: 4.5 and ? and x are no age, x and null no sex; m has no person; two are blank.
    assert found.to_dict(as_series=False) == {
        "age": [30.0, 100.0], "pay": [0.5, None], "sex": ["f", "f"], "id": ["p", "q"],
    }  # fmt: skip
    assert found.dtypes == [pl.Float64, pl.Float64, pl.String, pl.String]
    assert report == CleaningReport(
        records=9,
        blank=2,
        kept=2,
        columns={
            "age": ColumnReport(missing=1, type_errors=2, out_of_bounds=1, example="200"),
            "pay": ColumnReport(missing=1, type_errors=1, out_of_bounds=1, example="x"),
            "sex": ColumnReport(missing=1, unknown_categories=1, example="x"),
        },
    )
    assert report.as_dict()["columns"]["age"] == {
        "missing": 1, "type_errors": 2, "unknown_categories": 0, "out_of_bounds": 1,
        "example": "200",
    }  # fmt: skip
    assert {key: report.as_dict()[key] for key in ("records", "blank", "kept")} == {
        "records": 9, "blank": 2, "kept": 2,
    }  # fmt: skip


@pytest.mark.parametrize("person", [None, "", "?", " NA "])
def test_a_record_of_nobody_is_dropped(person: str | None) -> None:
    frame = frame_of(n=["1", "2"], id=["p", person])
    found, report = clean(frame, schema_of(NUMBER, person="id"), Clean())
    assert found["id"].to_list() == ["p"]
    assert (report.records, report.blank, report.kept) == (2, 0, 1)


def test_a_blank_record_is_dropped_first_and_counted_nowhere_else() -> None:
    nullable = {**NUMBER, "nullable": True}
    frame = frame_of(n=[None, "x", "?", "1"], o=[None, None, " ", "k"])
    schema = schema_of(nullable, {**OTHER, "nullable": True})
    found, report = clean(frame, schema, Clean())
    # Both columns may be missing, but a record of nothing is no record: nor is one whose only
    # value was a bad one, or the cleaned file would lose it when it is read again.
    assert found.rows() == [(1.0, "k")]
    assert report == CleaningReport(
        records=4,
        blank=2,
        kept=1,
        columns={"n": ColumnReport(type_errors=1, example="x"), "o": ColumnReport(missing=1)},
    )


def test_a_record_of_somebody_is_not_blank() -> None:
    frame = frame_of(n=[None, None], id=["p", " "])
    found, report = clean(frame, schema_of({**NUMBER, "nullable": True}, person="id"), Clean())
    assert found.rows() == [(None, "p")]
    assert report == CleaningReport(2, 1, 1, {"n": ColumnReport(missing=1)})


def test_nothing_stays_nothing() -> None:
    found, report = clean(frame_of(n=[], id=[]), schema_of(NUMBER, person="id"), Clean())
    assert report == CleaningReport(records=0, blank=0, kept=0, columns={"n": ColumnReport()})
    assert found.schema == {"n": pl.Float64, "id": pl.String}
    assert found.height == 0


# What is unusable as a whole: cleaning reports it, and only asked is it refused.


def test_no_records_are_refused() -> None:
    _, report = clean(frame_of(n=[]), schema_of(NUMBER), Clean())
    assert refusal(report) == "data: holds no records; check the file"


WRONG = (
    "no value is what the schema declares; check the schema, the file's header and its separator"
)


@pytest.mark.parametrize(
    ("column", "texts", "example"),
    [
        (NUMBER, ["age", "sex"], "age"),
        (WHOLE, [None, " 1.5"], "1.5"),
        (LETTER, ["x", "y"], "x"),
        (LETTER, ["?", "a\nb"], "a\nb"),
    ],
)
@pytest.mark.parametrize("rule", ["missing", "drop"])
def test_a_column_that_is_wrong_throughout_is_refused(
    column: dict[str, Any],
    texts: list[str | None],
    example: str,
    rule: Literal["missing", "drop"],
) -> None:
    # Even where it may be missing: nobody wants a column of nothing but mistakes.
    schema = schema_of(OTHER, {**column, "nullable": True})
    # The third record is blank, and no excuse either.
    frame = frame_of(n=[*texts, None], o=["k", "k", None])
    found, report = clean(frame, schema, Clean(type_error=rule, unknown_category=rule))
    missing = texts.count(None) + texts.count("?")
    kept: list[None] = [None] * (2 if rule == "missing" else missing)
    assert found["n"].to_list() == kept
    assert (report.records, report.blank, report.kept) == (3, 1, len(kept))
    assert refusal(report) == f'column "n" = {example!r}, ...: {WRONG}'


def test_the_first_column_that_is_wrong_throughout_is_named() -> None:
    schema = schema_of(NUMBER, {**LETTER, "name": "m"}, {**WHOLE, "name": "z"})
    _, report = clean(frame_of(n=["1", "2"], m=["x", "x"], z=["y", "y"]), schema, Clean())
    assert refusal(report).startswith("column \"m\" = 'x', ...: ")


@pytest.mark.parametrize("column", [NUMBER, WHOLE, LETTER])
def test_one_right_value_keeps_a_column_from_being_refused(column: dict[str, Any]) -> None:
    right = "a" if column is LETTER else "1"
    for place in range(3):
        texts: list[str | None] = ["x", "x"]
        texts.insert(place, right)
        _, report = clean(frame_of(n=texts), schema_of(column), Clean())
        refuse_unusable(report)
        assert report.kept == 1


def test_a_number_out_of_bounds_is_still_a_number() -> None:
    frame = frame_of(n=["11", "-1"])
    found, report = clean(frame, schema_of(NUMBER), Clean(out_of_bounds="clip"))
    refuse_unusable(report)
    assert found["n"].to_list() == [10.0, 0.0]
    _, report = clean(frame, schema_of(NUMBER), Clean(out_of_bounds="drop"))
    assert refusal(report).startswith("data: none of 2 records is usable (0 are blank; ")


def test_a_nullable_column_may_be_empty() -> None:
    schema = schema_of({**NUMBER, "nullable": True}, OTHER)
    found, report = clean(frame_of(n=[None, "?"], o=["k", "l"]), schema, Clean())
    refuse_unusable(report)
    assert found["n"].to_list() == [None, None]
    assert report.kept == 2


def test_data_without_a_usable_record_is_refused_and_the_worst_column_named() -> None:
    schema = schema_of(NUMBER, {**LETTER, "name": "m"})
    frame = frame_of(n=[None, "1", "?", None], m=["a", "c", "b", None])
    found, report = clean(frame, schema, Clean())
    assert found.height == report.kept == 0
    assert refusal(report) == (
        'data: none of 4 records is usable (1 are blank; column "n": missing 2); '
        "compare the schema with the file"
    )


def test_the_worst_column_s_example_is_shown_on_the_same_line() -> None:
    """A Parquet value may hold a line break or a terminal's escape sequence."""
    schema = schema_of(NUMBER, {**LETTER, "name": "m"})
    frame = frame_of(n=["1", "1", None], m=["c\n\x1b[31m", "d", "a"])
    _, report = clean(frame, schema, Clean())
    line = refusal(report)
    assert line.startswith('data: none of 3 records is usable (0 are blank; column "m": ')
    assert "unknown_categories 2" in line
    assert line.isprintable()


@pytest.mark.parametrize("person", [None, "p"])
def test_data_without_a_usable_record_is_refused_where_no_column_is_to_blame(
    person: str | None,
) -> None:
    """All records blank, or all of nobody: no column has anything to show."""
    frame = frame_of(n=[None, "?"] if person else ["1", "2"], id=[None, " "])
    _, report = clean(frame, schema_of(NUMBER, person="id"), Clean())
    line = refusal(report)
    blank = 2 if person else 0
    assert line.startswith(f"data: none of 2 records is usable ({blank} are blank")
    assert ": )" not in line  # a list of nothing


# No record's fate depends on another's.

SCHEMA = schema_of(
    {"name": "i", "kind": "integer", "bounds": [-3, 3]},
    {"name": "x", "kind": "numeric", "bounds": [0.0, 2.5], "nullable": True},
    {"name": "c", "kind": "categorical", "categories": ["a", "b"], "aliases": {"A": "a"}},
    {"name": "d", "kind": "categorical", "categories": ["u", "v", "w"], "nullable": True},
    person="id",
)
NAMES = ["i", "x", "c", "d", "id"]
# Unicode's blanks; Python strips four separators (file, group, record, unit) besides.
BLANKS = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f")

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


def outcome(records: list[Record], rules: Clean) -> tuple[list[tuple[Any, ...]], CleaningReport]:
    frame = pl.DataFrame(records, schema=dict.fromkeys(NAMES, pl.String), orient="row")
    found, report = clean(frame, SCHEMA, rules)
    kept = found.rows()
    assert found.columns == NAMES
    assert found.dtypes == [pl.Float64, pl.Float64, pl.String, pl.String, pl.String]
    assert report.records == len(records)
    assert report.kept == len(kept)
    return kept, report


def rows(records: list[Record], rules: Clean) -> list[tuple[Any, ...]]:
    """The cleaned records."""
    return outcome(records, rules)[0]


@given(many, many, rule_sets)
def test_cleaning_commutes_with_putting_together(
    first: list[Record], second: list[Record], rules: Clean
) -> None:
    assert rows(first + second, rules) == rows(first, rules) + rows(second, rules)


@given(many, many, rule_sets)
def test_reports_add_up(first: list[Record], second: list[Record], rules: Clean) -> None:
    _, one = outcome(first, rules)
    _, other = outcome(second, rules)
    _, both = outcome(first + second, rules)
    assert both.blank == one.blank + other.blank
    assert both.kept == one.kept + other.kept
    for name in both.columns:
        a, b = one.columns[name], other.columns[name]
        assert both.columns[name] == ColumnReport(
            missing=a.missing + b.missing,
            type_errors=a.type_errors + b.type_errors,
            unknown_categories=a.unknown_categories + b.unknown_categories,
            out_of_bounds=a.out_of_bounds + b.out_of_bounds,
            example=b.example if a.example is None else a.example,
        )


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
        assert person == person.strip(BLANKS) != ""
        assert person not in SCHEMA.missing


@given(many, rule_sets)
def test_cleaning_what_is_clean_changes_nothing(found: list[Record], rules: Clean) -> None:
    once = rows(found, rules)
    again = [tuple(v if v is None else str(v) for v in row) for row in once]
    assert rows(again, rules) == once
