"""What cleaning would do to a site's data, column by column, and how to mend it.

Everything here quotes the data: it is for the eyes of the site, and stays there.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ..config import Clean, RunConfig
from . import modality
from .clean import (
    CleaningReport,
    DataError,
    categories_of,
    numbers_of,
    refuse_unusable,
    trimmed,
)
from .images import Images
from .schema import Column, ImageSchema, Schema, TableSchema, TextSchema
from .tabular import TEXT_SUFFIXES, read_rows, separator_hint
from .words import MARKERS, near, quoted

DROPPED = "the record is dropped"
_EXAMPLES = 3
_ADVISED = 5


@dataclass(frozen=True)
class Finding:
    """One kind of fault in one column.

    Attributes:
        column: Its name; `None` for whole records.
        what: The fault.
        count: How many values (or records) have it.
        examples: The commonest of them.
        becomes: What cleaning does to them.
        mend: What to do about it; "" for nothing.
    """

    column: str | None
    what: str
    count: int
    examples: tuple[str, ...]
    becomes: str
    mend: str = ""


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        report: What cleaning counted.
        findings: The faults, in the order of the columns.
        refusal: Why the data cannot be used at all; `None` if it can.
    """

    report: CleaningReport
    findings: tuple[Finding, ...]
    refusal: str | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "usable": self.refusal is None,
            "refusal": self.refusal,
            "records": self.report.records,
            "kept": self.report.kept,
            "findings": [asdict(finding) for finding in self.findings],
        }


def check(source: str, schema: Schema, rules: Clean) -> Checked:
    """Reads and cleans a file or folder, and keeps what was found.

    Raises:
        DataError: It cannot be read, or is of the other modality.
    """
    kind = modality(schema)
    raw = kind.read(source, schema)
    _, report = kind.clean(raw, schema, rules)
    try:
        refuse_unusable(report)
        refusal = None
    except DataError as error:
        refusal = str(error)
    if isinstance(schema, ImageSchema):
        return Checked(report, tuple(_image_findings(raw, schema, report)), refusal)
    if isinstance(schema, TextSchema):
        return Checked(report, tuple(_text_findings(source, schema, report)), refusal)
    return Checked(report, tuple(_table_findings(source, raw, schema, rules, report)), refusal)


def records_note(config: RunConfig, source: str, kept: int) -> str | None:
    """Whether the declared `data.records` is far from what was found; `None` if it is not."""
    if config.data.records is None:
        return None
    whole = config.data.source == source
    expected = config.data.records / (1 if whole else config.federation.sites)
    if expected / 2 <= kept <= expected * 2:
        return None
    about = "" if whole else f", about {expected:.0f} at each of {config.federation.sites} sites"
    return (
        f"data.records = {config.data.records}: declared for the whole federation{about}; {kept} "
        "are usable here. Steps are too long or too short if it is wrong: declare a round figure "
        "that all sites may know"
    )


def _table_findings(
    source: str, raw: pl.DataFrame, schema: TableSchema, rules: Clean, report: CleaningReport
) -> Iterable[Finding]:
    if report.blank:
        yield _blank(source, schema, report.blank)
    for column in schema.columns:
        text = trimmed(raw[column.name], schema.missing)
        if missing := report.columns[column.name].missing:
            yield _missing(column, missing)
        if column.kind == "categorical":
            _, unknown = categories_of(text, column)
            if values := _counted(text, unknown):
                yield _unknown(column, values, rules.unknown_category)
            continue
        _, wrong, outside = numbers_of(text, column)
        if values := _counted(text, wrong):
            yield _no_number(column, values, rules.type_error)
        if values := _counted(text, outside):
            yield _outside(column, values, rules.out_of_bounds)
    yield from _nobody(raw, schema)


def _blank(source: str, schema: TableSchema, count: int) -> Finding:
    what, mend = "no value, or a wrong number of fields", "compare these lines with the others"
    if Path(source).suffix.lower() in TEXT_SUFFIXES:
        rows = read_rows(Path(source))
        wanted = len(rows[0]) if schema.header else len(schema.columns)
        if wrong := Counter(len(row) for row in rows if len(row) != wanted):
            fields, times = wrong.most_common(1)[0]
            hint = separator_hint(rows[0]) or ": mend their separators and quotes"
            mend = f"{times} with {fields} fields in place of {wanted}{hint}"
    return Finding(None, what, count, (), DROPPED, mend)


def _missing(column: Column, count: int) -> Finding:
    if column.nullable:
        return Finding(column.name, "missing", count, (), "stays missing")
    mend = "nullable = true keeps these records, if the value may be missing"
    return Finding(column.name, "missing", count, (), DROPPED, mend)


def _nobody(raw: pl.DataFrame, schema: TableSchema) -> Iterable[Finding]:
    """Records without the key of a person."""
    if schema.person is None:
        return
    names = [column.name for column in schema.columns]
    texts = [trimmed(raw[name], schema.missing) for name in (*names, schema.person)]
    filled = pl.DataFrame(texts).filter(~pl.all_horizontal(pl.all().is_null()))
    if count := filled[schema.person].null_count():
        mend = "a record of nobody cannot be kept with its person's others; fill the key in"
        yield Finding(schema.person, "missing", count, (), DROPPED, mend)


def _unknown(column: Column, values: dict[str, int], rule: str) -> Finding:
    markers = [value for value in values if value in MARKERS]
    words = [value for value in values if value not in MARKERS][:_ADVISED]
    meant = {word: near(word, column.categories) for word in words}
    aliases = {**column.aliases, **{word: to for word, to in meant.items() if to is not None}}
    advice = _add_markers(markers)
    if alike := [(word, to) for word, to in meant.items() if to is not None]:
        asked = ", ".join(f"{quoted(to)} by {quoted(word)}" for word, to in alike)
        table = ", ".join(f"{quoted(a)} = {quoted(b)}" for a, b in aliases.items())
        advice.append(f"did you mean {asked}? then aliases = {{ {table} }}")
    if others := [word for word, to in meant.items() if to is None]:
        names = ", ".join(map(quoted, others))
        advice.append(f"add {names} to categories if the code book has it")
    becomes = _becomes(column, rule)
    return _finding(column, "unknown category", values, becomes, "; ".join(advice))


def _no_number(column: Column, values: dict[str, int], rule: str) -> Finding:
    advice = _add_markers([value for value in values if value in MARKERS])
    if any(re.fullmatch(r"[+-]?\d+,\d+", value) for value in values):
        advice.append("write decimals with a point")
    if column.kind == "integer" and any(re.fullmatch(r"[+-]?\d*\.\d+", v) for v in values):
        advice.append('kind = "numeric" if the code book has fractions')
    mend = "; ".join(advice) or "correct them in the file, or check the column's kind"
    what = "no whole number" if column.kind == "integer" else "no number"
    return _finding(column, what, values, _becomes(column, rule), mend)


def _outside(column: Column, values: dict[str, int], rule: str) -> Finding:
    becomes = "clipped" if rule == "clip" else _becomes(column, rule)
    mend = "widen bounds if the code book says so, or leave it"
    return _finding(column, "out of bounds", values, becomes, mend)


def _add_markers(markers: Sequence[str]) -> list[str]:
    return [f"add {', '.join(map(quoted, markers))} to missing"] if markers else []


def _becomes(column: Column, rule: str) -> str:
    return "becomes missing" if rule == "missing" and column.nullable else DROPPED


def _finding(column: Column, what: str, values: dict[str, int], becomes: str, mend: str) -> Finding:
    examples = tuple(values)[:_EXAMPLES]
    return Finding(column.name, what, sum(values.values()), examples, becomes, mend)


def _counted(text: pl.Series, bad: pl.Series) -> dict[str, int]:
    """The bad values and how often each occurs, the commonest first."""
    found = text.filter(bad).alias("value").value_counts(name="times")
    pairs = sorted(found.rows(), key=lambda pair: (-pair[1], pair[0]))
    return {str(value): int(times) for value, times in pairs}


def _text_findings(source: str, schema: TextSchema, report: CleaningReport) -> Iterable[Finding]:
    lines = Path(source).suffix.lower() == ".jsonl"
    if report.blank:
        yield Finding(None, "nothing in it", report.blank, (), DROPPED)
    if count := report.columns["text"].type_errors:
        what = f"no JSON object with a text {quoted(schema.field)}" if lines else "not UTF-8"
        mend = (
            "compare these lines with the others, or the schema's field with their keys"
            if lines
            else "save the text as UTF-8; a byte of zero is part of no text"
        )
        yield Finding("text", what, count, (), DROPPED, mend)
    if count := report.columns["text"].out_of_bounds:
        becomes = "carriage returns go, others become blanks"
        yield Finding("text", "control characters", count, (), becomes)
    if schema.person is not None and (count := report.columns["person"].missing):
        mend = "a record of nobody cannot be kept with its person's others; fill the key in"
        yield Finding(schema.person, "missing", count, (), DROPPED, mend)


def _image_findings(raw: Images, schema: ImageSchema, report: CleaningReport) -> Iterable[Finding]:
    if count := report.columns["image"].type_errors:
        what = f"cannot be read, or is not {schema.height}x{schema.width}"
        yield Finding("image", what, count, (), DROPPED, "scale or pad them, or leave it")
    if not schema.classes:
        return
    names, counts = np.unique(raw.labels[~np.isin(raw.labels, schema.classes)], return_counts=True)
    values = dict(sorted(zip(names.tolist(), counts.tolist(), strict=True), key=lambda p: -p[1]))
    if values:
        meant = [(v, to) for v in values if (to := near(v, schema.classes))][:_ADVISED]
        asked = "".join(f"did you mean {quoted(to)} by {quoted(v)}? rename it; " for v, to in meant)
        mend = f"{asked}add to classes what the code book has"
        examples = tuple(values)[:_EXAMPLES]
        yield Finding("label", "unknown class", sum(values.values()), examples, DROPPED, mend)
