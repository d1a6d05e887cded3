"""What a fitted table is made of: components, places, effects; and drawing from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from ...config import MarginalOptions
from ...data_prep.queries.cells import Cells, cells
from ...data_prep.schema import TableSchema
from ..layers import Table

_FARTHEST = 8.0
"""Log-odds of the mixture count for so much at most."""
BELIEF = 0.5
"""What the mixture's log-odds of the label count for; the effects make up for the rest."""


class Mixture(nn.Module):
    """A mixture of products over the cells of a table's columns, and effects on the label.

    Attributes:
        options: The run's.
        schema: What a record is.
        columns: The cells of each column, the label's last.
        spans: Where each column stands among the levels.
        place_spans: Where each number stands among the places.
        weights: [components] logits.
        levels: [components, all cells] logits of each column's cells, one column after another.
        places: [all finer cells] logits of numbers' finer cells, read within a cell; of several
            numbers one after another.
        effects: [all cells and all finer cells and 1, classes] what adds to the label's log-odds:
            by the features' cells, by their finer cells, and always.
    """

    def __init__(self, options: MarginalOptions, schema: TableSchema) -> None:
        super().__init__()
        self.options = options
        self.schema = schema
        self.columns = cells(schema)
        self.spans = _spans([len(column.names) for column in self.columns])
        self.place_spans = _spans([place_count(column) for column in self.columns])
        self.weights = Table(options.components)
        self.levels = Table(options.components, self.spans[-1].stop)
        self.places = Table(max(1, self.place_spans[-1].stop))
        effects = self.spans[-1].stop + self.place_spans[-1].stop + 1
        self.effects = Table(effects, max(1, len(schema.classes)))

    def log_levels(self) -> list[Tensor]:
        """For each column, [components, cells] log-probabilities."""
        return [self.levels.values[:, span].log_softmax(1) for span in self.spans]

    def log_places(self, place: int) -> Tensor:
        """[finer cells] log-probabilities of a number's finer cells within their cells."""
        logits = self.places.values[self.place_spans[place]]
        column = self.columns[place]
        parts = torch.from_numpy(column.parts[: place_count(column)])
        within = torch.arange(len(column.edges) - 1)[:, None] == parts
        sums = torch.where(within, logits, -torch.inf).logsumexp(1)
        return logits - sums[parts]


def place_count(column: Cells) -> int:
    """How many finer cells a number has, "missing" left out; none of a category."""
    return max(0, len(column.fine) - 1)


def _spans(sizes: Sequence[int]) -> list[slice]:
    stops = np.cumsum([0, *sizes])
    return [slice(int(a), int(b)) for a, b in pairwise(stops)]


@dataclass(frozen=True)
class Features:
    """Where records stand, their labels aside.

    Attributes:
        cells: For each feature, [n] its cell.
        fine: For each feature, [n] its finer cell; of a category, 0.
    """

    cells: list[Tensor]
    fine: list[Tensor]


def effects_at(mixture: Mixture, found: Features) -> Tensor:
    """[n, E] which effects each record has; the last one of all is everyone's."""
    whole_length = mixture.effects.values.shape[0]
    at = []
    for place, column in enumerate(mixture.columns[: len(found.cells)]):
        at.append(mixture.spans[place].start + found.cells[place])
        if column.number:
            start = mixture.spans[-1].stop + mixture.place_spans[place].start
            missing = found.fine[place] >= place_count(column)
            fine = start + found.fine[place]
            at.append(torch.where(missing, at[-1], fine))  # twice: a missing number has no place
    at.append(torch.full_like(at[-1], whole_length - 1))
    return torch.stack(at, dim=1)


def log_joint(mixture: Mixture, found: Features) -> Tensor:
    """[n, classes] the mixture's log-probabilities of features' cells with each class."""
    tables = mixture.log_levels()
    total = mixture.weights.values.log_softmax(0)[None]
    for table, cell in zip(tables, found.cells, strict=False):
        total = total + table.T[cell]
    if not mixture.schema.classes:
        return total.logsumexp(1, keepdim=True)
    return torch.stack([(total + row).logsumexp(1) for row in tables[-1].T], dim=1)


def log_odds(mixture: Mixture, found: Features) -> Tensor:
    """[n, classes] the mixture's log-probabilities of the classes, around their mean."""
    joint = log_joint(mixture, found)
    return (joint - joint.mean(1, keepdim=True)).clamp(-_FARTHEST, _FARTHEST)


def log_labels(mixture: Mixture, found: Features) -> Tensor:
    """[n, classes] log-probabilities of a record's label."""
    effects = mixture.effects.values
    added = nn.functional.embedding_bag(effects_at(mixture, found), effects, mode="sum")
    return (BELIEF * log_odds(mixture, found) + added).log_softmax(1)


def features(
    mixture: Mixture, n: int, generator: torch.Generator, labels: Tensor | None
) -> Features:
    """Where n records stand, drawn; by the mixture's column of the label where it is given."""
    tables = [table.exp().double() for table in mixture.log_levels()]
    weights = mixture.weights.values.double().softmax(0)
    if labels is None:
        which = draw(weights[None], torch.zeros(n, dtype=torch.int64), generator)
    else:
        by_class = (weights[:, None] * tables[-1]).T
        which = draw(by_class / by_class.sum(1, keepdim=True), labels, generator)
    drawn, fine = [], []
    for place, column in enumerate(mixture.columns[: len(mixture.schema.blocks)]):
        drawn.append(draw(tables[place], which, generator))
        fine.append(torch.zeros_like(which))
        if column.number:
            count = len(column.edges) - 1
            inside = torch.from_numpy(column.parts[: place_count(column)])
            shares = mixture.log_places(place).double().exp()
            within = shares * (inside == torch.arange(count)[:, None])
            cell = drawn[-1].clamp(max=count - 1)
            fine[-1] = draw(within, cell, generator)
            fine[-1][drawn[-1] == count] = place_count(column)
    return Features(drawn, fine)


def draw(shares: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a place from row `rows[i]` of shares, for each i: [n] int64.

    The records of one row get evenly spaced quantiles, in random order, from one random start: each
    record's draw has the row's shares, and the counts of all stray from them by less than one.

    Args:
        shares: [rows, places], each row adding up to 1.
        rows: [n].
        generator: Where it is drawn from.
    """
    n = len(rows)
    mixed = torch.randperm(n, generator=generator)
    order = mixed[torch.argsort(rows[mixed], stable=True)]
    counts = torch.bincount(rows, minlength=len(shares))
    start = torch.rand(len(shares), generator=generator, dtype=torch.float64)
    ordered = rows[order]
    rank = torch.arange(n) - (counts.cumsum(0) - counts)[ordered]
    quantile = (rank + start[ordered]) / counts[ordered]
    # One long rising line, row after row, is searched at once.
    sums = (shares.cumsum(1) / shares.sum(1, keepdim=True)).clamp(max=1.0)
    line = sums + torch.arange(len(shares))[:, None]
    found = torch.searchsorted(line.flatten(), ordered + quantile, right=True)
    found = (found - ordered * shares.shape[1]).clamp(0, shares.shape[1] - 1)
    drawn = torch.empty_like(found)
    drawn[order] = found
    return drawn
