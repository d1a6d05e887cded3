"""The cells of a table's columns: what they are called, where they end, which one a record is in.

They follow from the schema alone. A category is a cell, and so is "missing" of a nullable column,
its last one. A number has cells twice: about a dozen for tables of several columns, and within
them finer ones, of which a whole number with few values has one for each value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..clean import bounds
from ..modality import Encoded
from ..schema import Block, Column, TableSchema

PARTS = 12
"""Cells of a number, where the schema does not say how many (`bins`)."""
VALUES = 16
"""A whole number with no more values than these has a cell for each."""
FINE = 100
"""Finer cells of a number, about: a whole number with no more values has one for each."""


@dataclass(frozen=True)
class Cells:
    """What a column's cells are.

    Attributes:
        column: The column's name.
        number: Whether they are parts of a range, in order.
        names: Of each cell, "missing" the last one of a nullable column.
        edges: Where a number's cells end, in the encoded range: from 0 to 1, one more than cells
            that are not "missing".
        fine: Where its finer cells end, all edges among them.
    """

    column: str
    number: bool
    names: tuple[str, ...]
    edges: tuple[float, ...] = ()
    fine: tuple[float, ...] = ()

    @property
    def nullable(self) -> bool:
        """Whether a number's last cell is "missing"."""
        return self.number and len(self.names) == len(self.edges)

    @property
    def fine_count(self) -> int:
        """How many finer cells a number has, "missing" included."""
        return len(self.fine) - 1 + self.nullable

    @property
    def parts(self) -> np.ndarray:
        """[fine_count] the cell that each finer cell is a part of."""
        inner = np.searchsorted(self.edges, self.fine[:-1], side="right") - 1
        return np.append(inner, len(self.names) - 1) if self.nullable else inner


def cells(schema: TableSchema) -> tuple[Cells, ...]:
    """The cells of each feature in the order of an encoded record; the label's come last."""
    found = [cells_of(block.column) for block in schema.blocks]
    if schema.label is not None:
        found.append(Cells(schema.label, number=False, names=schema.classes))
    return tuple(found)


def cells_of(column: Column, parts: int | None = None) -> Cells:
    """The cells of one column.

    Args:
        column: The schema's.
        parts: A number's are so many equal parts of its encoded range, whatever its values.
    """
    missing = ("missing",) if column.nullable else ()
    if column.kind == "categorical":
        return Cells(column.name, number=False, names=(*column.categories, *missing))
    fine, edges = _edges(column) if parts is None else _equal(parts)
    names = _names(column, edges)
    return Cells(column.name, True, (*names, *missing), tuple(edges), tuple(fine))  # noqa: FBT003


def codes(records: Encoded, schema: TableSchema) -> list[tuple[np.ndarray, np.ndarray]]:
    """Which cell, and which finer cell, each record is in.

    Each record is in exactly one cell of each column, whatever it holds: that is what the
    sensitivity of the statistics rests on.

    Args:
        records: [N] with any numbers in them.
        schema: What a record is.

    Returns:
        For each of `cells(schema)`, two arrays [N] int64; the same one twice but for a number.
    """
    found = []
    described = cells(schema)
    for block, column in zip(schema.blocks, described, strict=False):
        part = records.x[:, block.start : block.stop]
        if column.number:
            fine = _fine_codes(part, block, column)
            found.append((column.parts[fine], fine))
        else:
            found.append((part.argmax(axis=1), part.argmax(axis=1)))
    if schema.label is not None:
        label = np.clip(records.y, 0, len(schema.classes) - 1)
        found.append((label, label))
    return found


def own_units(column: Column, encoded: np.ndarray) -> np.ndarray:
    """Encoded numbers in the column's own units."""
    low, high = _range(column)
    numbers = low + np.asarray(encoded, dtype=np.float64) * (high - low)
    return np.expm1(numbers) if column.transform == "log1p" else numbers


def encoded_units(column: Column, numbers: np.ndarray) -> np.ndarray:
    """Numbers in the column's own units as they are encoded, within [0, 1]."""
    low, high = _range(column)
    if column.transform == "log1p":
        numbers = np.log1p(np.maximum(numbers, 0))
    inside: np.ndarray = np.clip((numbers - low) / (high - low), 0, 1)
    return inside


def _range(column: Column) -> tuple[float, float]:
    low, high = bounds(column)
    return (math.log1p(low), math.log1p(high)) if column.transform == "log1p" else (low, high)


def _fine_codes(part: np.ndarray, block: Block, column: Cells) -> np.ndarray:
    inner = np.asarray(column.fine[1:-1])
    place = np.searchsorted(inner, part[:, 0].astype(np.float64), side="right")
    if block.column.nullable:
        place = np.where(part[:, 1] < 0.5, column.fine_count - 1, place)
    return place


def _edges(column: Column) -> tuple[list[float], list[float]]:
    """Finer edges and edges of a number, in the encoded range."""
    low, high = bounds(column)
    values = int(high - low) + 1
    if column.kind != "integer" or values > FINE:
        return _equal(column.bins or PARTS)
    middles = encoded_units(column, np.arange(low, high) + 0.5)
    fine = [0.0, *middles.tolist(), 1.0]
    if not np.all(np.diff(fine) > 0):  # too large numbers for a half between two of them
        return _equal(column.bins or PARTS)
    parts = min(values, column.bins or (values if values <= VALUES else PARTS))
    return fine, [fine[i] for i in np.linspace(0, values, parts + 1).round().astype(int)]


def _equal(parts: int) -> tuple[list[float], list[float]]:
    each = max(1, round(FINE / parts))
    fine = [i / (parts * each) for i in range(parts * each + 1)]
    return fine, fine[::each]


def _names(column: Column, edges: Sequence[float]) -> list[str]:
    """By whole numbers where there is a cell edge between each two of them, else by its ends."""
    ends = own_units(column, np.asarray(edges))
    low, high = bounds(column)
    if column.kind != "integer" or high - low + 1 > FINE or not _between(ends[1:-1]):
        return [f"{start:.4g} to {end:.4g}" for start, end in pairwise(ends)]
    starts = [int(low), *(math.ceil(end) for end in ends[1:-1])]
    lasts = [*(math.floor(end) for end in ends[1:-1]), int(high)]
    pairs = zip(starts, lasts, strict=True)
    return [f"{a}" if a == b else f"{a} to {b}" for a, b in pairs]


def _between(ends: np.ndarray) -> bool:
    """Whether all of these stand half way between two whole numbers."""
    return bool(np.all(np.abs(ends - np.floor(ends) - 0.5) < 1e-6))
