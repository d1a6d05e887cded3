"""Record-wise cleaning of a table, by declared rules only.

Every rule maps one record to one record or to none, with public parameters: that is what keeps the
sensitivity of a later private sum at one record (design.md, privacy rule 6). No rule looks across
records, so cleaning commutes with any sharing-out of the records.
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
    """What was found in one column, in values."""

    missing: int = 0
    type_errors: int = 0
    unknown_categories: int = 0
    out_of_bounds: int = 0


@dataclass(frozen=True)
class CleaningReport:
    """What cleaning did, in exact counts: private, it never leaves the site."""

    records: int
    kept: int
    columns: Mapping[str, ColumnReport]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def clean(
    frame: pl.DataFrame, schema: TableSchema, rules: Clean
) -> tuple[pl.DataFrame, CleaningReport]:
    """Cleans a table record by record.

    Args:
        frame: [N] rows; the schema's columns (others are left out) as strings, `None` for missing.
        schema: Declares columns, domains and missing markers.
        rules: What to do with a bad value.

    Returns:
        The kept records, numbers as Float64 and the rest as String, and the report.

    Raises:
        DataError: A column is wrong throughout, or no record is usable.
    """
    columns: list[pl.Series] = []
    reports: dict[str, ColumnReport] = {}
    keep = pl.Series([True]).new_from_index(0, frame.height)
    for column in schema.columns:
        text = trimmed(frame[column.name], schema.missing)
        values, dropped, report = (
            _categories(text, column, rules)
            if column.kind == "categorical"
            else _numbers(text, column, rules)
        )
        _refuse_wrong_throughout(text, report, column)
        if not column.nullable:
            dropped |= values.is_null()
        keep &= ~dropped
        columns.append(values)
        reports[column.name] = report
    if schema.person is not None:
        person = trimmed(frame[schema.person], schema.missing)
        keep &= person.is_not_null()
        columns.append(person)
    cleaned = pl.DataFrame(columns).filter(keep)
    if frame.height and not cleaned.height:
        raise DataError(
            f"data: none of {frame.height} records is usable: {_commonest(reports)}; compare the "
            "schema with the file"
        )
    return cleaned, CleaningReport(frame.height, cleaned.height, reports)


def trimmed(text: pl.Series, missing: tuple[str, ...]) -> pl.Series:
    """Values without blanks around them, `None` for missing markers."""
    text = text.cast(pl.String).str.strip_chars()
    return text.set(text.is_in(list(missing)), None)


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
    values = text.replace(column.aliases) if column.aliases else text
    unknown = values.is_not_null() & ~_filled(values.is_in(list(column.categories)))
    report = ColumnReport(missing=text.null_count(), unknown_categories=_count(unknown))
    return values.set(unknown, None), _dropped(unknown, rules.unknown_category), report


def _numbers(
    text: pl.Series, column: Column, rules: Clean
) -> tuple[pl.Series, pl.Series, ColumnReport]:
    low, high = bounds(column)
    values = text.cast(pl.Float64, strict=False) + 0.0  # so that -0 is 0, in hashes too
    usable = _filled(values.is_finite())
    if column.kind == "integer":
        usable &= _filled(values == values.round())
    wrong = text.is_not_null() & ~usable
    values = values.set(wrong, None)
    outside = _filled((values < low) | (values > high))
    report = ColumnReport(
        missing=text.null_count(), type_errors=_count(wrong), out_of_bounds=_count(outside)
    )
    dropped = _dropped(wrong, rules.type_error) | _dropped(outside, rules.out_of_bounds)
    clips = rules.out_of_bounds == "clip"
    values = values.clip(low, high) if clips else values.set(outside, None)
    return values, dropped, report


def _filled(mask: pl.Series) -> pl.Series:
    return mask.fill_null(value=False)


def _count(mask: pl.Series) -> int:
    return int(mask.sum())


def _dropped(mask: pl.Series, rule: str) -> pl.Series:
    return mask if rule == "drop" else mask & False


def _refuse_wrong_throughout(text: pl.Series, report: ColumnReport, column: Column) -> None:
    present = text.len() - text.null_count()
    wrong = report.type_errors + report.unknown_categories
    if present and wrong == present:
        wanted = (
            f"one of {', '.join(column.categories[:3])}, ..."
            if column.kind == "categorical"
            else f"of kind {column.kind}"
        )
        raise DataError(
            f'column "{column.name}" = {text.drop_nulls()[0]!r}, ...: no value is {wanted}; '
            "check the schema, the file's header and its separator"
        )


def _commonest(reports: Mapping[str, ColumnReport]) -> str:
    name = max(reports, key=lambda n: sum(asdict(reports[n]).values()))
    return f'most is wrong in column "{name}" ({asdict(reports[name])})'
