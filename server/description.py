"""What the noisy statistics say of the federation's data, as plain facts.

Formal guarantee: none of its own and none needed: everything here is made of `Noisy` and the
public schema alone, so it is post-processing of what was released and costs no budget. Equal
statistics make equal facts, whatever the records are.

Every figure has an interval for the noise of the mechanism. It is not one for sampling error.
"""

import math
from collections.abc import Collection
from itertools import combinations
from typing import Any

import numpy as np

from ..data_prep.queries import Noisy, Workload
from ..data_prep.queries.cells import Cells, cells, own_units
from ..data_prep.queries.tables import fine_histogram, has_table, quantiles, table_of
from ..data_prep.schema import Column, ImageSchema, Schema, TableSchema
from .association import Margin, cramers_v, margin
from .intervals import LEVEL, Range, Z, quantile_cells, share_ranges

PARTS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Which quantiles of a number are given."""
_PLACES = 6  # after the point, at most
WITHIN = "within its noise"
ONE_GROUP = "no two groups of a column are clear of the noise"
_ABOUT = {
    "level": LEVEL,
    "of": "noise of the mechanism, not sampling error",
    "shares": "Fieller's interval for a ratio of normals",
    "quantiles": "the cells that the noised counts on either side do not speak against, whole",
    "association": "parametric bootstrap, inverted; 500 draws from a fixed public seed",
}
_SMALL, _CAPITAL = range(ord("a"), ord("z") + 1), range(ord("A"), ord("Z") + 1)
_DIGITS, _BLANKS = range(ord("0"), ord("9") + 1), b" \t\r\n"
_OTHERS = set(range(33, 127)) - {*_SMALL, *_CAPITAL, *_DIGITS}
_CHARACTERS: dict[str, Collection[int]] = {
    "small letters": _SMALL,
    "capital letters": _CAPITAL,
    "digits": _DIGITS,
    "blanks": _BLANKS,
    "marks and signs": sorted(_OTHERS),
    "control characters": sorted({*range(33), 127} - {*_BLANKS}),
    "bytes beyond ASCII": range(128, 256),
}


def describe(statistics: Noisy, schema: Schema) -> dict[str, Any]:
    """What there is to say of the federation's data; plain values, for JSON.

    What was not asked, or what this kind of data does not have, is absent.

    Args:
        statistics: What was released.
        schema: What a record is.

    Returns:
        `modality`, `units` (declared), `interval` (what its intervals are), `total` (records, as
        noised), and `columns`: each with its name and kind; `missing`, the share without it;
        `levels`, shares of its categories (of a text, of kinds of characters); of a number,
        `declared` bounds, `quantiles` in its own units and `cells`, shares of parts of its range.
        `pairs`: Cramer's V of two columns with its interval and its floor. Each figure is a `value`
        between `low` and `high`; `told` is empty, or why it lets nothing be said.
    """
    found: dict[str, Any] = {
        "modality": schema.modality, "units": statistics.units, "interval": _ABOUT,
    }  # fmt: skip
    if isinstance(schema, TableSchema):
        return found | _table(statistics, schema)
    if isinstance(schema, ImageSchema) and "count" in statistics.values:
        return found | _images(statistics, schema)
    if "bytes" in statistics.values:
        return found | {"columns": [_characters(statistics)]}
    return found


def _table(statistics: Noisy, schema: TableSchema) -> dict[str, Any]:
    described = cells(schema)
    declared = {column.name: column for column in schema.columns}
    columns, margins = [], {}
    for about in described:
        counts, noise = _counts((about.column,), statistics, schema)
        columns.append(_column(about, declared[about.column], counts, noise))
        if about.number:
            columns[-1]["quantiles"] = _quantiles(declared[about.column], statistics, schema)
        margins[about.column] = margin(counts, noise, ordered=about.number)
    columns[-1]["label"] = schema.label is not None
    counted, spread = table_of((), statistics, schema)
    total = float(counted)
    pairs = _pairs(described, margins, statistics, schema, (total, spread))
    return {"total": _total(total, spread), "columns": columns, "pairs": pairs}


def _about(names: tuple[str, ...], statistics: Noisy) -> Noisy:
    """What was asked of some columns: with many columns, most queries are about others."""
    queries = (q for q in statistics.asked.queries if set(names) <= set(q.columns))
    asked = Workload(tuple(queries))
    return Noisy(asked, statistics.values, statistics.noise, statistics.units)


def _total(total: float, spread: float) -> dict[str, Any]:
    return _fact(Range(total, total - Z * spread, total + Z * spread))


def _images(statistics: Noisy, schema: ImageSchema) -> dict[str, Any]:
    """How many images there are, and of which classes."""
    counts = statistics.values["count"]
    noise = np.full(counts.shape, statistics.noise["count"])
    found: dict[str, Any] = {"total": _total(float(counts.sum()), float(np.linalg.norm(noise)))}
    if not schema.classes:
        return found
    shares = zip(schema.classes, share_ranges(counts, noise), strict=True)
    levels = [{"name": name, **_fact(share)} for name, share in shares]
    label = {"name": schema.label, "kind": "categorical", "label": True, "levels": levels}
    return found | {"columns": [label]}


def _characters(statistics: Noisy) -> dict[str, Any]:
    """Kinds of characters in texts, of their bytes; a text's weigh less if it was clipped."""
    counts, square = statistics.values["bytes"], statistics.noise["bytes"] ** 2
    sums = np.array([counts[list(members)].sum() for members in _CHARACTERS.values()])
    noise = np.sqrt([len(members) * square for members in _CHARACTERS.values()])
    shares = zip(_CHARACTERS, share_ranges(sums, noise), strict=True)
    levels = [{"name": name, **_fact(found)} for name, found in shares]
    return {"name": "characters", "kind": "text", "label": False, "levels": levels}


def _counts(
    names: tuple[str, ...], statistics: Noisy, schema: TableSchema
) -> tuple[np.ndarray, np.ndarray]:
    """Counts over some columns' cells, and the standard deviation of the noise of each."""
    counts, noise = table_of(names, statistics, schema)
    return counts, np.broadcast_to(np.asarray(noise, dtype=np.float64), counts.shape)


def _column(about: Cells, column: Column, counts: np.ndarray, noise: np.ndarray) -> dict[str, Any]:
    ranges = share_ranges(counts, noise)
    found: dict[str, Any] = {"name": about.column, "kind": column.kind, "label": False}
    names = list(about.names)
    if column.nullable:
        found["missing"] = _fact(ranges.pop())
        names.pop()
    shares = [{"name": n, **_fact(r)} for n, r in zip(names, ranges, strict=True)]
    if column.kind == "categorical":
        return found | {"levels": shares}
    found |= {"declared": list(column.bounds or ()), "transform": column.transform}
    return found | {"cells": shares}


def _quantiles(column: Column, statistics: Noisy, schema: TableSchema) -> list[dict[str, Any]]:
    """Quantiles of those who have a value, in the column's own units."""
    about = next(one for one in cells(schema) if one.column == column.name)
    counts, edges, fine = fine_histogram(column.name, statistics, schema)
    sizes, coarse = _sizes(about, len(counts)), _coarse_noise(column.name, statistics, schema)
    found = []
    for part, value in zip(PARTS, quantiles(counts, edges, PARTS), strict=True):
        first, last = quantile_cells(counts, sizes, coarse, fine, part)
        ends = np.array([min(edges[first], value), value, max(edges[last + 1], value)])
        low, middle, high = _in_units(column, ends)
        found.append({"part": part, "value": middle, "low": low, "high": high})
    return found


def _sizes(about: Cells, cells_found: int) -> np.ndarray:
    """[cells] how many of the histogram's cells each cell of the column has."""
    whole = len(about.edges) - 1
    if cells_found == whole:
        return np.ones(whole, dtype=np.int64)
    return np.bincount(about.parts[:cells_found], minlength=whole)


def _coarse_noise(column: str, statistics: Noisy, schema: TableSchema) -> float:
    """Of a cell's count, as `fine_histogram` knows it: summed over the label's classes."""
    if schema.label is not None and has_table((schema.label, column), statistics):
        _, noise = table_of((schema.label, column), statistics, schema)
        return noise * math.sqrt(len(schema.classes))
    return table_of((column,), statistics, schema)[1]


def _in_units(column: Column, encoded: np.ndarray) -> list[float]:
    """Low, value and high in the column's own units, whole numbers where the column is."""
    low, value, high = own_units(column, encoded).tolist()
    if column.kind == "integer":
        # Cells end between whole numbers.
        low, value, high = math.ceil(low - 1e-6), round(value), math.floor(high + 1e-6)
        least, most = (int(end) for end in column.bounds or (low, high))
        low, high = max(min(low, value), least), min(max(high, value), most)
        return [low, min(max(value, low), high), high]
    return [float(f"{end:.5g}") for end in (low, value, high)]


def _pairs(
    described: tuple[Cells, ...],
    margins: dict[str, Margin | None],
    statistics: Noisy,
    schema: TableSchema,
    total: tuple[float, float],
) -> list[dict[str, Any]]:
    """Cramer's V of every two columns that were asked for together."""
    found: list[dict[str, Any]] = []
    about_each = {one.column: _about((one.column,), statistics) for one in described}
    for pair in combinations((about.column for about in described), 2):
        asked = _about(pair, about_each[pair[0]])
        if not has_table(pair, asked):
            continue
        first, second = (margins[name] for name in pair)
        if first is None or second is None or total[0] <= Z * total[1]:
            found.append({"columns": list(pair), "told": ONE_GROUP})
            continue
        v = cramers_v(*_counts(pair, asked, schema), (first, second), *total)
        told = "" if v.low > 0 else WITHIN
        figures = _fact(Range(v.value, v.low, v.high)) | {"told": told}
        found.append({"columns": list(pair), **figures, "floor": round(v.floor, 4)})
    return found


def _fact(found: Range) -> dict[str, Any]:
    """To three digits of the interval's width: the noise leaves no more."""
    ends = {"value": found.value, "low": max(found.low, 0.0), "high": found.high}
    width = ends["high"] - ends["low"]
    places = min(2 - math.floor(math.log10(width)), _PLACES) if width > 0 else _PLACES
    return {key: round(end, places) for key, end in ends.items()} | {"told": found.told}
