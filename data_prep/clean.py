"""Record-wise cleaning of a table, by declared rules only.

Every rule maps one record to one record or to none, with public parameters: that is what keeps the
sensitivity of a later private sum at one record. No rule looks across records, so that cleaning
commutes with any sharing-out of the records.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from ..config import Clean, FedveilError
from .schema import Column, TableSchema


class DataError(FedveilError):
    """Data that cannot be used at all. Its text may quote the data: it stays at the site."""

    exit_code = 2


@dataclass(frozen=True)
class ColumnReport:
    """What was found in one column, in values, with the first bad one as an example."""

    missing: int = 0
    type_errors: int = 0
    unknown_categories: int = 0
    out_of_bounds: int = 0
    example: str | None = None


@dataclass(frozen=True)
class CleaningReport:
    """What cleaning did, in exact counts: private, it never leaves the site.

    Attributes:
        records: How many came.
        blank: Those without any value, such as a line with a wrong number of fields.
        kept: How many are left.
        columns: What was found in those that are not blank.
        advice: What to do where no value of a column is what the schema declares.
    """

    records: int
    blank: int
    kept: int
    columns: Mapping[str, ColumnReport]
    advice: str = "check the schema, the file's header and its separator"

    def as_dict(self) -> dict[str, Any]:
        """What was found as plain values, for JSON."""
        found = asdict(self)
        del found["advice"]
        return found


def clean(
    frame: pl.DataFrame, schema: TableSchema, rules: Clean
) -> tuple[pl.DataFrame, CleaningReport]:
    """Cleans a table record by record; what becomes of one never hangs on another.

    Args:
        frame: [N] rows; the schema's columns (others are left out) as strings, `None` for missing.
        schema: Declares columns, domains and missing markers.
        rules: What to do with a bad value.

    Returns:
        The kept records, numbers as Float64 and the rest as String, and the report.
    """
    names = [c.name for c in schema.columns] + ([] if schema.person is None else [schema.person])
    texts = frame.select(trimmed(frame[name], schema.missing) for name in names)
    texts = texts.filter(~_all_null(texts.get_columns()))
    columns: list[pl.Series] = []
    reports: dict[str, ColumnReport] = {}
    keep = pl.Series([True]).new_from_index(0, texts.height)
    for column in schema.columns:
        mend = _categories if column.kind == "categorical" else _numbers
        values, dropped, reports[column.name] = mend(texts[column.name], column, rules)
        keep &= ~dropped if column.nullable else ~(dropped | values.is_null())
        columns.append(values)
    if schema.person is not None:
        keep &= texts[schema.person].is_not_null()
        columns.append(texts[schema.person])
    # Of whom nothing is left is blank when read again: so that cleaning twice is cleaning once.
    cleaned = pl.DataFrame(columns).filter(keep & ~_all_null(columns))
    blank = frame.height - texts.height
    return cleaned, CleaningReport(frame.height, blank, cleaned.height, reports)


def refuse_unusable(report: CleaningReport) -> None:
    """Refuses data that cannot be what the schema means.

    This looks across records: it is for whoever may look at all of them, before a run; a site in a
    run takes part with what it has.

    Raises:
        DataError: There are no records, a column is wrong throughout, or nothing was kept.
    """
    if not report.records:
        raise DataError("data: holds no records; check the file")
    for name, column in report.columns.items():
        present = report.records - report.blank - column.missing
        if present and column.type_errors + column.unknown_categories == present:
            raise DataError(
                f'column "{name}" = {column.example!r}, ...: no value is what the schema declares; '
                f"{report.advice}"
            )
    if not report.kept:
        found = {name: asdict(column) for name, column in report.columns.items()}
        worst = max(found, key=lambda name: sum(v for v in found[name].values() if type(v) is int))
        counts = ", ".join(f"{key} {value!r}" for key, value in found[worst].items() if value)
        blame = f'; column "{worst}": {counts}' if counts else ""
        raise DataError(
            f"data: none of {report.records} records is usable ({report.blank} are blank{blame}); "
            "compare the schema with the file"
        )


def trimmed(text: pl.Series, missing: tuple[str, ...]) -> pl.Series:
    """Values without blanks around them, `None` for the missing markers and for nothing at all."""
    text = text.cast(pl.String).str.strip_chars()
    return text.set(text.is_in(["", *missing]), None)


def categories_of(text: pl.Series, column: Column) -> tuple[pl.Series, pl.Series]:
    """Trimmed values with their aliases resolved, and which of them are not declared."""
    values = text.replace(column.aliases) if column.aliases else text
    return values, values.is_not_null() & ~_filled(values.is_in(list(column.categories)))


def numbers_of(text: pl.Series, column: Column) -> tuple[pl.Series, pl.Series, pl.Series]:
    """Trimmed values as Float64, null for what is none; which are none; which are out of bounds."""
    low, high = bounds(column)
    values = text.cast(pl.Float64, strict=False) + 0.0  # so that -0 is 0, in hashes too
    usable = _filled(values.is_finite())
    if column.kind == "integer":
        usable &= _filled(values == values.round())
    wrong = text.is_not_null() & ~usable
    values = values.set(wrong, None)
    return values, wrong, _filled((values < low) | (values > high))


def bounds(column: Column) -> tuple[float, float]:
    """A number's declared bounds.

    Raises:
        DataError: It has none; a checked schema has.
    """
    if column.bounds is None:
        raise DataError(f'column "{column.name}": bounds: missing')
    return column.bounds


def _categories(
    text: pl.Series, column: Column, rules: Clean
) -> tuple[pl.Series, pl.Series, ColumnReport]:
    values, unknown = categories_of(text, column)
    report = ColumnReport(
        missing=text.null_count(), unknown_categories=_count(unknown), example=_first(text, unknown)
    )
    return values.set(unknown, None), _dropped(unknown, rules.unknown_category), report


def _numbers(
    text: pl.Series, column: Column, rules: Clean
) -> tuple[pl.Series, pl.Series, ColumnReport]:
    low, high = bounds(column)
    values, wrong, outside = numbers_of(text, column)
    report = ColumnReport(
        missing=text.null_count(),
        type_errors=_count(wrong),
        out_of_bounds=_count(outside),
        example=_first(text, wrong | outside),
    )
    dropped = _dropped(wrong, rules.type_error) | _dropped(outside, rules.out_of_bounds)
    clips = rules.out_of_bounds == "clip"
    values = values.clip(low, high) if clips else values.set(outside, None)
    return values, dropped, report


def _filled(mask: pl.Series) -> pl.Series:
    return mask.fill_null(value=False)


def _all_null(columns: list[pl.Series]) -> pl.Series:
    """Which rows have no value at all."""
    return pl.DataFrame(columns).select(pl.all_horizontal(pl.all().is_null())).to_series()


def _count(mask: pl.Series) -> int:
    return int(mask.sum())


def _dropped(mask: pl.Series, rule: str) -> pl.Series:
    return mask if rule == "drop" else mask & False


def _first(text: pl.Series, bad: pl.Series) -> str | None:
    found = text.filter(bad)
    return str(found[0]) if len(found) else None
