"""Queries that are sums of bounded contributions, and the one vector in which they are asked.

Every record adds to each query a vector of known L2 norm. Several queries share one vector, and one
noise: a record then adds at most sqrt(sum of (weight x norm)^2) to it, however many queries there
are; a larger weight buys a query less noise at the others' cost.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

SLACK = 1.001
"""The noise is for so many times the sensitivity, for what adding up in float64 may round."""

_ENTRIES = 2**22
"""Numbers of records' rows at a time: memory, not privacy."""


@dataclass(frozen=True)
class Query:
    """A sum over records of vectors of bounded norm.

    Attributes:
        name: Its own within a workload.
        shape: Of its answer.
        norm: L2 bound of what one record adds to the answer.
        weight: What the answer is multiplied by in the vector.
        columns: What it is about, where the records have columns.
    """

    name: str
    shape: tuple[int, ...]
    norm: float = 1.0
    weight: float = 1.0
    columns: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """Cells of its answer."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Workload:
    """What one round of statistics asks: public, by the schema and by declared numbers alone.

    Attributes:
        queries: In the order in which they stand in the vector.
    """

    queries: tuple[Query, ...]

    @property
    def length(self) -> int:
        """Coordinates of the vector."""
        return sum(query.length for query in self.queries)

    @cached_property
    def norm(self) -> float:
        """What one record adds to the vector at most, in L2, without any slack."""
        return math.sqrt(sum((query.weight * query.norm) ** 2 for query in self.queries))

    @property
    def sensitivity(self) -> float:
        """L2 bound of what one privacy unit adds to the vector, as it is accounted for."""
        return self.norm * SLACK

    def size(self, units: float) -> tuple[int, float]:
        """Coordinates of the vector, and its norm where one unit adds `units` records."""
        return self.length, self.sensitivity * units

    @property
    def peak(self) -> float:
        """About what one record adds at most to any coordinate of the vector: for room, no bound.

        Where a query's cells are shared by hash, it may be somewhat more.
        """
        return max(query.weight * query.norm for query in self.queries)

    def spans(self) -> Iterator[tuple[Query, slice]]:
        """Where each query stands in the vector."""
        start = 0
        for query in self.queries:
            yield query, slice(start, start + query.length)
            start += query.length


@dataclass(frozen=True)
class Noisy:
    """Answers as they were released; whatever is made of them is post-processing.

    Attributes:
        asked: What the answers are to.
        values: Sums by query, float64 in its shape, without its weight.
        noise: Standard deviation of the noise of a query's cells.
        units: Declared public number of privacy units that the sums are over.
    """

    asked: Workload
    values: Mapping[str, np.ndarray]
    noise: Mapping[str, float]
    units: float


def noisy(workload: Workload, vector: np.ndarray, scale: float, units: float) -> Noisy:
    """Reads a released vector.

    Args:
        workload: What was asked.
        vector: [length] the noised sum.
        scale: Standard deviation of the noise of each coordinate of the vector.
        units: Declared public number of privacy units that it is a sum over.

    Raises:
        ValueError: It has another length.
    """
    if vector.shape != (workload.length,):
        raise ValueError(f"statistics: {vector.shape}: must be {workload.length} coordinates")
    values, noise = {}, {}
    for query, span in workload.spans():
        values[query.name] = vector[span].astype(np.float64).reshape(query.shape) / query.weight
        noise[query.name] = scale / query.weight
    return Noisy(workload, values, noise, units)


def rows_at_a_time(
    count: int, each: int, persons: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Places of records, block by block, all of a person's in one block.

    Args:
        count: N records.
        each: Numbers that the row of one takes in memory.
        persons: [N] int64, whose record each one is; `None`: each is its own unit.
    """
    most = max(1, _ENTRIES // max(1, each))
    if persons is None:
        yield from (np.arange(at, min(at + most, count)) for at in range(0, count, most))
        return
    order = np.argsort(persons, kind="stable")
    starts = np.flatnonzero(np.diff(persons[order], prepend=-1))
    start = 0
    while start < count:
        # To the last end of a person within the block; to that of this one, if it is beyond it.
        ends = np.append(starts[starts > start], count)
        end = int(ends[max(0, int(np.searchsorted(ends, start + most, side="right")) - 1)])
        yield order[start:end]
        start = end


def clipped_sum(
    rows: sparse.csr_array, bound: float, persons: np.ndarray | None = None
) -> np.ndarray:
    """The sum of what each privacy unit adds, each clipped in L2.

    Formal guarantee: one record more or less, or with `persons` one whole person, changes the sum
    by at most `bound` in L2, up to the rounding of float64 (`SLACK`); whatever the rows hold.

    Args:
        rows: [N, d] what each record adds, weighted.
        bound: The clipping norm.
        persons: [N] int64, whose record each one is; `None`: each is its own unit.

    Returns:
        [d] float64.
    """
    if persons is not None and len(persons):
        _, places = np.unique(persons, return_inverse=True)
        ones = np.ones(len(persons))
        whose = sparse.csr_array((ones, (places, np.arange(len(persons)))))
        rows = sparse.csr_array(whose @ rows)
    norms = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1), dtype=np.float64).ravel())
    finite = np.isfinite(norms)
    factors = np.where(finite, bound / np.maximum(norms, bound, where=finite, out=norms), 0.0)
    if not finite.all():
        rows = rows[np.flatnonzero(finite)]
        factors = factors[finite]
    total: np.ndarray = rows.T @ factors
    return total
