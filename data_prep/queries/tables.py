"""Counts of tables: which are asked, a site's answers, and what the noisy ones say.

A record is in exactly one cell of each marginal, so that one more record adds a vector of norm 1 to
each, and sqrt(sum of weight^2) to all of them together. Three kinds of queries:

- *cells*: a marginal, the counts over the cells of up to three columns. Norm 1.
- *fine*: a number's histogram over its finer cells, by the label's classes. Norm 1.
- *moments*: sums of z and z^2 of a number, z = 2 x - 1 for x in [0, 1] as it is encoded, and 0
  where it is missing. |z| <= 1, so that the norm is sqrt(z^2 + z^4) <= sqrt(2).
"""

import math
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
from scipy import sparse

from ...config import ConfigError, Statistics
from ..modality import Encoded
from ..schema import TableSchema
from ..words import nearest, quoted
from .cells import Cells, cells, codes
from .workload import Noisy, Query, Workload, clipped_sum, rows_at_a_time

_SINGLE_WEIGHT = 2.0
_FINE_WEIGHT = 0.5
_MOMENTS_WEIGHT = 0.5
_NO_COUNTS = 1e-9  # nor is there a way to divide evenly by much less
_LEAST_SIGNAL = 0.15
"""A pair of columns is asked if its mean count is so many times the noise of a cell."""


_MOST_PAIRED = 500
"""Columns of which pairs are looked at; there are too many of more, for whatever limit of cells."""


def marginal(columns: Sequence[str], described: Iterable[Cells], weight: float = 1.0) -> Query:
    """Counts over the cells of some columns together; of none, the count of all.

    Sensitivity: a record is in one cell: 1.
    """
    sizes = {column.column: len(column.names) for column in described}
    shape = tuple(sizes[name] for name in columns)
    return Query(_name("cells", columns), shape, 1.0, weight, tuple(columns))


def fine(column: Cells, label: Cells | None, weight: float = _FINE_WEIGHT) -> Query:
    """A number's counts over its finer cells, by class where there is a label.

    Sensitivity: a record is in one cell: 1.
    """
    by = () if label is None else (label,)
    shape = (*(len(c.names) for c in by), column.fine_count)
    names = (*(c.column for c in by), column.column)
    return Query(_name("fine", names), shape, 1.0, weight, names)


def moments(column: Cells, weight: float = _MOMENTS_WEIGHT) -> Query:
    """Sums of a number and of its square, both of 2 x - 1.

    Sensitivity: each term is at most 1: sqrt(1 + 1).
    """
    names = (column.column,)
    return Query(_name("moments", names), (2,), math.sqrt(2), weight, names)


def _name(kind: str, columns: Sequence[str]) -> str:
    return " ".join([kind, *map(quoted, columns)])


def _kind(query: Query) -> str:
    return query.name.split(" ", 1)[0]


def workload(
    schema: TableSchema, options: Statistics, units: float, noise_multiplier: float
) -> Workload:
    """What is asked of a table, by the schema, the options and public numbers.

    Every number is asked for its moments and its fine histogram. Every column is asked for with the
    label, and every two columns together with it, smallest tables first, while the mean count of a
    cell is well above the noise and the limit of cells is kept.

    Raises:
        ConfigError: `statistics.marginals` names no column, or there are too many cells.
    """
    described = cells(schema)
    label = described[-1] if schema.label is not None else None
    numbers = [column for column in described if column.number]
    always = [fine(column, label) for column in numbers] + [moments(c) for c in numbers]
    if options.marginals:
        asked = _chosen(options, described, schema.label)
        _check_cells([*always, *asked], described, options)
        return Workload((*always, *asked))
    by = [] if label is None else [label.column]
    features = [c.column for c in described if c is not label]
    singles = [marginal([*by, name], described, _SINGLE_WEIGHT) for name in features]
    _check_cells([*always, *singles], described, options)
    found = {column.column: column for column in described}  # of thousands of columns, not all
    paired = features if len(features) <= _MOST_PAIRED else []
    named = [(*by, *two) for two in combinations(paired, 2)]
    pairs = [marginal(names, map(found.__getitem__, names)) for names in named]
    pairs = _affordable(pairs, [*always, *singles], options, units / max(noise_multiplier, 1e-9))
    return Workload((*always, *singles, *pairs))


def _affordable(
    pairs: list[Query], before: list[Query], options: Statistics, ratio: float
) -> list[Query]:
    """The smallest pairs of which the last is still worth its noise, in their first order."""
    ordered = sorted(pairs, key=lambda query: query.length)
    total = sum(query.length for query in before)
    square = Workload(tuple(before)).norm ** 2
    kept = set()
    for query in ordered:
        total, square = total + query.length, square + 1
        if total > options.max_cells:
            break
        if ratio / query.length < _LEAST_SIGNAL * math.sqrt(square):
            break
        kept.add(query.name)
    return [query for query in pairs if query.name in kept]


def _chosen(options: Statistics, described: Sequence[Cells], label: str | None) -> list[Query]:
    """The marginals that the options name, each once, and the columns that they leave out."""
    order = {column.column: place for place, column in enumerate(described)}
    if label is not None:
        order[label] = -1
    found = {}
    for names in options.marginals:
        for name in names:
            if name not in order:
                raise ConfigError(
                    f"statistics.marginals = {_list(names)}: {quoted(name)} is no column"
                    f"{nearest(name, order)}"
                )
        if len(set(names)) < len(names):
            raise ConfigError(f"statistics.marginals = {_list(names)}: names a column twice")
        query = marginal(sorted(names, key=order.__getitem__), described)
        found[query.name] = query
    named = {name for query in found.values() for name in query.columns}
    rest = [marginal([c.column], described) for c in described if c.column not in named]
    return [*found.values(), *rest]


def _check_cells(queries: Sequence[Query], described: Sequence[Cells], options: Statistics) -> None:
    total = sum(query.length for query in queries)
    if total <= options.max_cells:
        return
    largest = max(queries, key=lambda query: query.length)
    widest = max(
        (column for column in described if column.column in largest.columns),
        key=lambda column: len(column.names),
    )
    mend = "give it fewer `bins`" if widest.number else "declare fewer categories of it"
    raise ConfigError(
        f"statistics.max_cells = {options.max_cells}: the tables asked have {total} cells, "
        f"{largest.length} of them {_list(largest.columns)}; column {quoted(widest.column)} has "
        f"{len(widest.names)}: {mend}, or raise the limit"
    )


def _list(names: Iterable[str]) -> str:
    return f"[{', '.join(map(quoted, names))}]"


def answers(
    asked: Workload, records: Encoded, schema: TableSchema, persons: np.ndarray | None = None
) -> np.ndarray:
    """A site's exact sums.

    Formal guarantee: one record more or less, or with `persons` one whole person, changes the
    result by at most `asked.norm` in L2, up to rounding. A record's row has norm `asked.norm` at
    most by what it is made of (one cell of each marginal, numbers clipped), whatever the record
    holds; a person's rows are added up and clipped to it.

    Args:
        asked: What `workload` made for the schema.
        records: The site's, [N].
        schema: What a record is.
        persons: [N] int64, whose record each one is; `None`: each is its own unit.

    Returns:
        [asked.length] float64, weighted.
    """
    total = np.zeros(asked.length)
    for block in rows_at_a_time(len(records.y), len(asked.queries), persons):
        columns, values = _entries(asked, records.take(block), schema)
        if persons is None:
            places, added = np.concatenate(columns), np.concatenate(values)
            total += np.bincount(places, added, minlength=asked.length)
            continue
        ends = np.arange(len(block) + 1) * len(columns)
        entries = np.stack(values, axis=1).ravel(), np.stack(columns, axis=1).ravel(), ends
        rows = sparse.csr_array(entries, shape=(len(block), asked.length))
        total += clipped_sum(rows, asked.norm, persons[block])
    return total


def _entries(
    asked: Workload, records: Encoded, schema: TableSchema
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Where in the vector each record adds something, and how much: lists of [N]."""
    described = cells(schema)
    found = dict(zip((c.column for c in described), codes(records, schema), strict=True))
    scaled = _scaled(records, schema)
    columns, values = [], []
    count = len(records.y)
    for query, span in asked.spans():
        weight = np.full(count, query.weight)
        if _kind(query) == "moments":
            z = scaled[query.columns[0]]
            columns += [np.full(count, span.start), np.full(count, span.start + 1)]
            values += [weight * z, weight * z**2]
            continue
        place = np.full(count, 0, dtype=np.int64)
        for name, size in zip(query.columns, query.shape, strict=True):
            coarse, finer = found[name]
            place = place * size + (finer if _kind(query) == "fine" else coarse)
        columns.append(span.start + place)
        values.append(weight)
    return columns, values


def _scaled(records: Encoded, schema: TableSchema) -> dict[str, np.ndarray]:
    """Each number as 2 x - 1 within [-1, 1], 0 where it is missing or none."""
    found = {}
    for block in schema.blocks:
        if block.column.kind == "categorical":
            continue
        x = records.x[:, block.start].astype(np.float64)
        z = np.nan_to_num(2 * x - 1, nan=0.0).clip(-1, 1)
        if block.column.nullable:
            z = np.where(records.x[:, block.start + 1] < 0.5, 0.0, z)
        found[block.column.name] = z
    return found


def table_of(
    columns: Sequence[str], statistics: Noisy, schema: TableSchema
) -> tuple[np.ndarray, float]:
    """The best estimate of the counts over some columns' cells together.

    Every query that has all the columns says something about them, once the others are summed
    over; what they say is averaged by the inverse of its variance.

    Args:
        columns: Names, the label's among them or not; none for the count of all records.
        statistics: What was released.
        schema: What a record is.

    Returns:
        Counts in the shape of the columns' cells, in their order; the standard deviation of the
        noise of a cell.

    Raises:
        KeyError: No query has all these columns; `has_table` says so before.
    """
    described = {column.column: column for column in cells(schema)}
    total, weights = 0.0, 0.0
    for query in statistics.asked.queries:
        if not _says(query, columns):
            continue
        counts = statistics.values[query.name]
        if _kind(query) == "fine" and query.columns[-1] in columns:
            counts = _coarse(counts, described[query.columns[-1]])
        others = tuple(i for i, name in enumerate(query.columns) if name not in columns)
        left = [name for name in query.columns if name in columns]
        counts = counts.sum(axis=others).transpose([left.index(name) for name in columns])
        weight = counts.size / query.length / max(statistics.noise[query.name], 1e-9) ** 2
        total, weights = total + weight * counts, weights + weight
    if not weights:
        raise KeyError(f"statistics: no query about {_list(columns)}")
    return np.asarray(total / weights), 1 / math.sqrt(weights)


def tables(asked: Workload) -> list[Query]:
    """The marginals that were asked: counts over the cells of columns together."""
    return [query for query in asked.queries if _kind(query) == "cells"]


def has_table(columns: Sequence[str], statistics: Noisy) -> bool:
    """Whether a query has all these columns together."""
    return any(_says(query, columns) for query in statistics.asked.queries)


def _says(query: Query, columns: Sequence[str]) -> bool:
    return _kind(query) in ("cells", "fine") and set(columns) <= set(query.columns)


def _coarse(counts: np.ndarray, column: Cells) -> np.ndarray:
    """Counts over finer cells [..., fine_count] summed up to those over cells."""
    starts = np.searchsorted(column.parts, np.arange(len(column.names)))
    found: np.ndarray = np.add.reduceat(counts, starts, axis=-1)
    return found


def fine_table(
    column: str, statistics: Noisy, schema: TableSchema
) -> tuple[np.ndarray, np.ndarray, float]:
    """The best estimate of a number's counts by class and finer cell.

    The fine histogram is shifted within each cell so that it adds up to `table_of`, which knows the
    sum better (the least-squares estimate, for the noise of its cells is equal and independent).

    Returns:
        Counts [classes, finer cells without "missing"] (one row without a label); their edges in
        the encoded range; the standard deviation of the noise of a cell, at most.

    Raises:
        KeyError: No query has this column.
    """
    described = {each.column: each for each in cells(schema)}
    about, by = described[column], () if schema.label is None else (schema.label,)
    known = has_table((*by, column), statistics)
    coarse, std = table_of((*by, column) if known else (column,), statistics, schema)
    coarse = np.atleast_2d(coarse)[:, : len(about.edges) - 1]
    name = _name("fine", (*by, column))
    if name not in statistics.values:
        return coarse, np.asarray(about.edges), std
    finer = np.atleast_2d(statistics.values[name])[:, : len(about.fine) - 1]
    parts = about.parts[: len(about.fine) - 1]
    sizes = np.bincount(parts)
    sums = np.add.reduceat(finer, np.searchsorted(parts, np.arange(len(sizes))), axis=-1)
    shifted = finer + ((coarse - sums) / sizes)[:, parts]
    return shifted, np.asarray(about.fine), statistics.noise[name]


def fine_histogram(
    column: str, statistics: Noisy, schema: TableSchema
) -> tuple[np.ndarray, np.ndarray, float]:
    """As `fine_table`, over all classes: counts [cells], edges, the noise of a cell at most."""
    counts, edges, std = fine_table(column, statistics, schema)
    return counts.sum(axis=0), edges, std * math.sqrt(len(counts))


def quantiles(counts: np.ndarray, edges: np.ndarray, q: Sequence[float]) -> np.ndarray:
    """Quantiles of a noisy histogram, as if a cell's records were spread evenly over it.

    The noisy cumulated counts are made to rise: the mean of the largest before and the least after.

    Args:
        counts: [cells], of any sign.
        edges: [cells + 1], rising.
        q: Between 0 and 1.

    Returns:
        [len(q)] in the units of the edges; of no counts, of an even spread.
    """
    sums = np.concatenate([[0.0], np.cumsum(counts)])
    rising = (np.maximum.accumulate(sums) + np.minimum.accumulate(sums[::-1])[::-1]) / 2
    if rising[-1] - rising[0] <= _NO_COUNTS:
        rising = np.arange(len(edges), dtype=np.float64)
    wanted = rising[0] + np.asarray(q) * (rising[-1] - rising[0])
    found: np.ndarray = np.interp(wanted, rising, edges)
    return found


def mean_and_spread(column: str, statistics: Noisy, schema: TableSchema) -> tuple[float, float]:
    """A number's mean and standard deviation in the encoded range, over records that have it.

    Raises:
        KeyError: It was not asked for.
    """
    z, squares = statistics.values[_name("moments", (column,))]
    about = next(each for each in cells(schema) if each.column == column)
    counts, _ = table_of((column,), statistics, schema)
    present = max(counts[: len(about.edges) - 1].sum(), 1.0)
    mean = float(np.clip(z / present, -1, 1))
    variance = float(np.clip(squares / present - mean**2, 0, 1))
    return (mean + 1) / 2, math.sqrt(variance) / 2
