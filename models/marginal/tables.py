"""Tables: a mixture of products for the features, and a logistic regression of the label on them.

A component draws the cell of every column by itself: p(cells) = sum_k p(k) prod_c p(cell | k). All
its marginals are sums of products of small tables, never negative, and agree with one another,
whatever the noisy ones do. It is fitted to all noisy marginals at once by gradient descent, as in
Liu, Vietri and Wu (2021), "Iterative methods for private synthetic data", section 4. Where a number
stands within its cell is drawn from its fine histogram.

The label has a column in the mixture, which knows how features work together on it, and noisily
so. What the label's tables with single columns say is known far better: additive effects of the
cells correct the mixture's guess of the label until these tables are met (`labels`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from ...config import MarginalOptions
from ...data_prep.modality import Encoded
from ...data_prep.queries import Noisy
from ...data_prep.queries.cells import Cells, cells, codes
from ...data_prep.queries.tables import fine_histogram, table_of, tables
from ...data_prep.schema import Block, Schema, TableSchema
from ...data_prep.tabular import whole
from ..family import Batch
from ..layers import Table
from .labels import fit_effects

_RATE = 0.15
_SPREAD = 1.0
"""Of the components' first logits around those of the columns' own histograms."""
_PULL = 0.3
"""Weight of what holds the logits there: it smooths what the noise would fill with detail."""
_LEAST = 1e-6
"""Least share of a cell, for what is counted as less."""
_BELIEF = 0.5
"""What the mixture's log-odds of the label count for; the effects make up for the rest."""
_FARTHEST = 8.0
"""Log-odds of the mixture count for so much at most."""
_DRAWN = 30_000
"""Records that the effects are fitted on."""
_POOL = 4
"""Candidates for each record of a given label."""


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
        self.place_spans = _spans([_places(column) for column in self.columns])
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
        parts = torch.from_numpy(column.parts[: _places(column)])
        within = torch.arange(len(column.edges) - 1)[:, None] == parts
        sums = torch.where(within, logits, -torch.inf).logsumexp(1)
        return logits - sums[parts]


def _places(column: Cells) -> int:
    return max(0, len(column.fine) - 1)


def _spans(sizes: Sequence[int]) -> list[slice]:
    stops = np.cumsum([0, *sizes])
    return [slice(int(a), int(b)) for a, b in pairwise(stops)]


def build(options: MarginalOptions, schema: Schema) -> Mixture:
    """All components alike and even over the cells.

    Raises:
        TypeError: The schema is no table's.
    """
    if not isinstance(schema, TableSchema):
        raise TypeError("marginal tables: needs the schema of a table")
    return Mixture(options, schema)


@dataclass(frozen=True)
class _Target:
    """Noisy marginals that have all their columns but the last in common.

    Attributes:
        first: Places of the columns in common.
        levels: [R] where the last columns' cells stand among the levels.
        shares: [A, R] of all records.
        precision: [R] one over the standard deviation of a share.
    """

    first: tuple[int, ...]
    levels: Tensor
    shares: Tensor
    precision: Tensor


def fit(
    options: MarginalOptions, schema: Schema, statistics: Noisy, generator: torch.Generator
) -> Mixture:
    """The mixture whose marginals are nearest to the noisy ones, each by the noise that it has."""
    mixture = build(options, schema)
    total = max(float(table_of((), statistics, mixture.schema)[0]), 1.0)
    targets = _targets(mixture, statistics, total)
    base = _own_logits(mixture, statistics, total)
    cells_asked = sum(target.shares.numel() for target in targets)
    levels = mixture.levels.values
    with torch.no_grad():
        levels.copy_(base + _SPREAD * torch.randn(levels.shape, generator=generator))
    optimiser = torch.optim.Adam([mixture.weights.values, levels], lr=_RATE, betas=(0.9, 0.99))
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)
    for _ in range(options.steps):
        optimiser.zero_grad()
        loss = _misfit(mixture, targets) + _PULL * (levels - base).square().sum()
        (loss / cells_asked).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        rates.step()
    _place(mixture, statistics)
    if mixture.schema.classes:
        _correct(mixture, statistics, total, generator)
    return mixture


def _own_logits(mixture: Mixture, statistics: Noisy, total: float) -> Tensor:
    """[all cells] what each column's own histogram says."""
    logits = []
    for column in mixture.columns:
        counts, _ = table_of((column.column,), statistics, mixture.schema)
        logits.append(np.log(np.maximum(counts / total, 1e-4)))
    return torch.from_numpy(np.concatenate(logits)).float()


def _targets(mixture: Mixture, statistics: Noisy, total: float) -> list[_Target]:
    places = {column.column: place for place, column in enumerate(mixture.columns)}
    groups: dict[tuple[int, ...], list[tuple[int, Tensor, float]]] = {}
    for query in tables(statistics.asked):
        *first, last = (places[name] for name in query.columns)
        shares = torch.from_numpy(statistics.values[query.name] / total).float()
        noise = max(statistics.noise[query.name] / total, 1e-6)
        groups.setdefault(tuple(first), []).append((last, shares.flatten(0, -2), 1 / noise))
    return [
        _Target(
            first,
            torch.cat([torch.arange(*_ends(mixture.spans[last])) for last, _, _ in group]),
            torch.cat([shares.reshape(-1, shares.shape[-1]) for _, shares, _ in group], dim=1),
            torch.cat([torch.full(shares.shape[-1:], weight) for _, shares, weight in group]),
        )
        for first, group in groups.items()
    ]


def _ends(span: slice) -> tuple[int, int]:
    return span.start, span.stop


def _misfit(mixture: Mixture, targets: Sequence[_Target]) -> Tensor:
    """Sum over the asked cells of the squared difference, in standard deviations of its noise."""
    levels = torch.cat(mixture.log_levels(), dim=1).exp()
    weights = mixture.weights.values.softmax(0)
    loss = torch.zeros(())
    for target in targets:
        left = weights[:, None]
        for place in target.first:
            left = (left[:, :, None] * levels[:, None, mixture.spans[place]]).flatten(1)
        model = left.T @ levels[:, target.levels]
        loss = loss + ((model - target.shares) * target.precision).square().sum()
    return loss


def _place(mixture: Mixture, statistics: Noisy) -> None:
    """Where numbers stand within their cells, as the noisy fine histograms say."""
    for column, span in zip(mixture.columns, mixture.place_spans, strict=True):
        if not column.number:
            continue
        counts, edges, _ = fine_histogram(column.column, statistics, mixture.schema)
        if len(edges) != len(column.fine):  # was not asked: even within the cells
            continue
        shares = np.maximum(counts, 0) / max(counts.sum(), 1.0)
        with torch.no_grad():
            mixture.places.values[span] = torch.from_numpy(np.log(shares + _LEAST)).float()


def _correct(mixture: Mixture, statistics: Noisy, total: float, generator: torch.Generator) -> None:
    """Effects by which the label's tables with single columns are met, on drawn records."""
    with torch.no_grad():
        found = _features(mixture, _DRAWN, generator, None)
        guess = _BELIEF * _log_odds(mixture, found)
        at = _effects_at(mixture, found)
        effects = fit_effects(mixture.columns, statistics, mixture.schema, total, at, guess)
        mixture.effects.values.copy_(effects)


@dataclass(frozen=True)
class _Features:
    """Where records stand, their labels aside.

    Attributes:
        cells: For each feature, [n] its cell.
        fine: For each feature, [n] its finer cell; of a category, 0.
    """

    cells: list[Tensor]
    fine: list[Tensor]


def _effects_at(mixture: Mixture, found: _Features) -> Tensor:
    """[n, E] which effects each record has; the last one of all is everyone's."""
    whole_length = mixture.effects.values.shape[0]
    at = []
    for place, column in enumerate(mixture.columns[: len(found.cells)]):
        at.append(mixture.spans[place].start + found.cells[place])
        if column.number:
            start = mixture.spans[-1].stop + mixture.place_spans[place].start
            missing = found.fine[place] >= _places(column)
            fine = start + found.fine[place]
            at.append(torch.where(missing, at[-1], fine))  # twice: a missing number has no place
    at.append(torch.full_like(at[-1], whole_length - 1))
    return torch.stack(at, dim=1)


def _log_joint(mixture: Mixture, found: _Features) -> Tensor:
    """[n, classes] the mixture's log-probabilities of features' cells with each class."""
    tables = mixture.log_levels()
    total = mixture.weights.values.log_softmax(0)[None]
    for table, cell in zip(tables, found.cells, strict=False):
        total = total + table.T[cell]
    if not mixture.schema.classes:
        return total.logsumexp(1, keepdim=True)
    return torch.stack([(total + row).logsumexp(1) for row in tables[-1].T], dim=1)


def _log_odds(mixture: Mixture, found: _Features) -> Tensor:
    """[n, classes] the mixture's log-probabilities of the classes, around their mean."""
    joint = _log_joint(mixture, found)
    return (joint - joint.mean(1, keepdim=True)).clamp(-_FARTHEST, _FARTHEST)


def _log_labels(mixture: Mixture, found: _Features) -> Tensor:
    """[n, classes] log-probabilities of a record's label."""
    effects = mixture.effects.values
    added = nn.functional.embedding_bag(_effects_at(mixture, found), effects, mode="sum")
    return (_BELIEF * _log_odds(mixture, found) + added).log_softmax(1)


@torch.no_grad()
def scores(module: nn.Module, batch: Batch) -> Tensor:
    """[B] log-likelihoods: of cells, of numbers' density within them, of the label given both."""
    mixture = _mixture(module)
    pairs = codes(Encoded(batch.x.numpy(), batch.y.numpy()), mixture.schema)
    features = pairs[: len(mixture.schema.blocks)]
    found = _Features(
        [torch.from_numpy(coarse) for coarse, _ in features],
        [torch.from_numpy(fine) for _, fine in features],
    )
    total = _log_joint(mixture, found).logsumexp(1)
    for place, column in enumerate(mixture.columns):
        if column.number:
            widths = torch.tensor(np.diff(column.fine), dtype=total.dtype).log()
            density = mixture.log_places(place) - widths
            fine = found.fine[place]
            last = _places(column) - 1
            total = total + torch.where(fine <= last, density[fine.clamp(max=last)], 0.0)
    if mixture.schema.classes:
        label = torch.from_numpy(pairs[-1][0])
        total = total + _log_labels(mixture, found).gather(1, label[:, None])[:, 0]
    return total


def score_bounds(module: nn.Module) -> tuple[float, float]:
    """Twice the score of an even guess, and all numbers in one finer cell each."""
    mixture = _mixture(module)
    low = -2.0 * sum(math.log(len(column.names)) for column in mixture.columns) - 1.0
    high = sum(math.log(_places(column)) for column in mixture.columns if column.number)
    return low, high


def sample(
    module: nn.Module, n: int, generator: torch.Generator, labels: Tensor | None = None
) -> Batch:
    """N records, drawn so that shares are kept as nearly as n allows (systematic sampling).

    Given labels, several candidates are drawn for each, and of these as many as are asked, by how
    likely the label is with them.
    """
    mixture = _mixture(module)
    if not mixture.schema.classes:
        found = _features(mixture, n, generator, None)
        return Batch(_encoded(mixture, found, generator), torch.zeros(n, dtype=torch.int64))
    if labels is None:
        found = _features(mixture, n, generator, None)
        chances = _log_labels(mixture, found).double().exp()
        drawn = torch.rand(n, 1, generator=generator, dtype=torch.float64)
        y = (chances.cumsum(1) < drawn).sum(1).clamp(max=chances.shape[1] - 1)
        return Batch(_encoded(mixture, found, generator), y)
    pool = _features(mixture, _POOL * n, generator, labels.repeat(_POOL))
    wanted = labels.repeat(_POOL)
    ratio = _log_labels(mixture, pool) - _log_joint(mixture, pool).log_softmax(1)
    chance = ratio.gather(1, wanted[:, None])[:, 0].double().exp()
    classes = len(mixture.schema.classes)
    by_class = chance * (wanted == torch.arange(classes)[:, None]) + 1e-300
    kept = _draw(by_class / by_class.sum(1, keepdim=True), labels, generator)
    found = _Features([cell[kept] for cell in pool.cells], [fine[kept] for fine in pool.fine])
    return Batch(_encoded(mixture, found, generator), labels)


def _features(
    mixture: Mixture, n: int, generator: torch.Generator, labels: Tensor | None
) -> _Features:
    """Where n records stand, drawn; by the mixture's column of the label where it is given."""
    tables = [table.exp().double() for table in mixture.log_levels()]
    weights = mixture.weights.values.double().softmax(0)
    if labels is None:
        which = _draw(weights[None], torch.zeros(n, dtype=torch.int64), generator)
    else:
        by_class = (weights[:, None] * tables[-1]).T
        which = _draw(by_class / by_class.sum(1, keepdim=True), labels, generator)
    drawn, fine = [], []
    for place, column in enumerate(mixture.columns[: len(mixture.schema.blocks)]):
        drawn.append(_draw(tables[place], which, generator))
        fine.append(torch.zeros_like(which))
        if column.number:
            count = len(column.edges) - 1
            inside = torch.from_numpy(column.parts[: _places(column)])
            shares = mixture.log_places(place).double().exp()
            within = shares * (inside == torch.arange(count)[:, None])
            cell = drawn[-1].clamp(max=count - 1)
            fine[-1] = _draw(within, cell, generator)
            fine[-1][drawn[-1] == count] = _places(column)
    return _Features(drawn, fine)


def _encoded(mixture: Mixture, found: _Features, generator: torch.Generator) -> Tensor:
    """[n, width] records: numbers are drawn within their finer cells."""
    n = len(found.cells[0])
    x = torch.zeros(n, mixture.schema.width)
    for place, block in enumerate(mixture.schema.blocks):
        if block.column.kind == "categorical":
            x[torch.arange(n), block.start + found.cells[place]] = 1.0
            continue
        column = mixture.columns[place]
        present = found.fine[place] < _places(column)
        number = _number(block, column, found.fine[place], generator)
        x[:, block.start] = torch.where(present, number, 0.0)
        if block.column.nullable:
            x[:, block.start + 1] = present.float()
    return x


def _number(block: Block, column: Cells, fine: Tensor, generator: torch.Generator) -> Tensor:
    """[n] float32 evenly within finer cells; a whole number's, at whole numbers."""
    ends = torch.tensor(column.fine, dtype=torch.float64)
    fine = fine.clamp(max=_places(column) - 1)
    where = torch.rand(len(fine), generator=generator, dtype=torch.float64)
    number = ends[fine] + where * (ends[fine + 1] - ends[fine])
    if block.column.kind == "integer":
        number = torch.from_numpy(whole(block.column, number.numpy()))
    return number.float()


def _draw(shares: Tensor, rows: Tensor, generator: torch.Generator) -> Tensor:
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


def _mixture(module: nn.Module) -> Mixture:
    if not isinstance(module, Mixture):
        raise TypeError(f"marginal tables: given {type(module).__name__}")
    return module
