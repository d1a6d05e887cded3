"""Histograms of encoded records: the cells of a column, their names, shares of counts.

The cells follow from the schema alone: the declared categories, or ten equal parts of a number's
encoded range; a nullable column's last cell is "missing", and a label's classes come last of all.
"""

import math
from collections.abc import Sequence

import numpy as np

from ..data_prep.queries.cells import Cells, cells_of
from ..data_prep.queries.texts import CLASS_NAMES, CLASS_OF
from ..data_prep.schema import PADDING, Schema, TableSchema, TextSchema, tokens_of
from .family import Batch

NUMBER_BINS = 10
"""Equal parts of a number's encoded range."""


def levels(schema: Schema) -> list[int]:
    """How many cells each column has."""
    return [len(column.names) for column in described(schema)]


def described(schema: Schema) -> list[Cells]:
    """The cells of each column, in the order of `cells`."""
    found = []
    if isinstance(schema, TextSchema):
        found = [Cells("characters", number=False, names=CLASS_NAMES)]
    if isinstance(schema, TableSchema):
        found = [cells_of(block.column, NUMBER_BINS) for block in schema.blocks]
    if schema.label is not None:
        found.append(Cells(schema.label, number=False, names=schema.classes))
    return found


def cells(records: Batch, schema: Schema) -> list[np.ndarray]:
    """Which cell each record is in, [N] for each column; a text is in many, see `one_way`."""
    found = []
    if isinstance(schema, TableSchema):
        x = records.x.numpy()
        for block in schema.blocks:
            if block.column.kind == "categorical":
                found.append(x[:, block.start : block.stop].argmax(axis=1))
                continue
            place = np.floor(x[:, block.start] * NUMBER_BINS).astype(np.int64)
            place = place.clip(0, NUMBER_BINS - 1)
            if block.column.nullable:
                place = np.where(x[:, block.start + 1] < 0.5, NUMBER_BINS, place)
            found.append(place)
    return found + [records.y.numpy()] * bool(schema.classes)


def one_way(records: Batch, schema: Schema, weights: np.ndarray | None = None) -> np.ndarray:
    """The histograms of all columns, joined; each record counts by its weight [N], or once.

    A text is spread over the classes of its bytes, by their shares: in L1, and so in L2, it adds no
    more than 1.
    """
    if isinstance(schema, TextSchema):
        return _byte_shares(records, weights)
    pairs = zip(cells(records, schema), levels(schema), strict=True)
    return joined([np.bincount(c, weights, minlength=n) for c, n in pairs])


def _byte_shares(records: Batch, weights: np.ndarray | None) -> np.ndarray:
    tokens = tokens_of(records.x.numpy())
    real = tokens < PADDING
    each = np.ones(len(tokens)) if weights is None else weights
    each = each / np.maximum(real.sum(axis=1), 1)
    spread = np.broadcast_to(each[:, None], tokens.shape)[real]
    found = np.bincount(CLASS_OF[tokens[real]], spread, minlength=len(CLASS_NAMES))
    return found.astype(np.float64)


def characters(records: Batch, schema: Schema, weights: np.ndarray | None = None) -> np.ndarray:
    """How many bytes texts have, over the most that so many could have: [1], at most 1 a record."""
    shares = (tokens_of(records.x.numpy()) < PADDING).sum(axis=1) / schema.shape[0]
    return np.array([float((shares if weights is None else shares * weights).sum())])


def joined(counts: Sequence[np.ndarray]) -> np.ndarray:
    """Histograms one after another, so scaled that a record's L2 norm is 1."""
    if not counts:
        return np.zeros(0)
    whole: np.ndarray = np.concatenate(counts) / math.sqrt(len(counts))
    return whole


def parted(whole: np.ndarray, schema: Schema) -> list[np.ndarray]:
    """What `joined` was given, [cells] for each column.

    Raises:
        ValueError: It is not one of this schema.
    """
    sizes = levels(schema)
    if whole.shape != (sum(sizes),):
        raise ValueError(f"histograms: expected {sum(sizes)} cells, found {whole.shape}")
    return np.split(whole * math.sqrt(len(sizes)), np.cumsum(sizes)[:-1]) if sizes else []


def shares(counts: np.ndarray) -> np.ndarray:
    """The nearest distribution to noised counts."""
    total = counts.sum()
    if total <= 0:
        return np.full(len(counts), 1 / len(counts))
    return nearest(counts / total)


def nearest(raw: np.ndarray) -> np.ndarray:
    """The nearest distribution to any finite numbers (Duchi et al. 2008, figure 1)."""
    ordered = np.sort(raw)[::-1]
    excess = (np.cumsum(ordered) - 1) / np.arange(1, len(raw) + 1)
    threshold = excess[np.flatnonzero(ordered > excess)[-1]]
    projected: np.ndarray = np.maximum(raw - threshold, 0)
    return projected
