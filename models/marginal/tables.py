"""Tables: a mixture of products, fitted to noisy marginals by gradient descent.

A component draws every column's cell by itself, the label's class among them:
p(cells) = sum_k p(k) prod_c p(cell of c | k). All its marginals are sums of products of small
tables, never negative, and agree with one another, whatever the noisy ones do. Where a number
stands within its cell depends on the cell and the class. Fitting a product mixture to noisy
marginals is what Liu et al. (2021), "Iterative methods for private synthetic data" (section 4.2,
the relaxed projection of GEM and RAP) do; here all marginals are fitted at once.
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
from ...data_prep.queries.tables import fine_table, table_of, tables
from ...data_prep.schema import Block, Schema, TableSchema
from ...data_prep.tabular import whole
from ..family import Batch
from ..layers import Table

_RATE = 0.15
_SPREAD = 1.0
"""Of the components' first logits around those of the columns' own histograms."""
_LEAST = 1e-6
"""Least share of a cell, for what is counted as less."""


class Mixture(nn.Module):
    """A mixture of products over the cells of a table's columns.

    Attributes:
        options: The run's.
        schema: What a record is.
        columns: The cells of each column, the label's last.
        spans: Where each column stands among the levels.
        weights: [components] logits.
        levels: [components, all cells] logits of each column's cells, one column after another.
        places: [classes, all finer cells] logits of numbers' finer cells, read within a cell; of
            several numbers one after another.
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
        self.places = Table(max(1, len(schema.classes)), max(1, self.place_spans[-1].stop))

    def log_levels(self) -> list[Tensor]:
        """For each column, [components, cells] log-probabilities."""
        return [self.levels.values[:, span].log_softmax(1) for span in self.spans]

    def log_places(self, column: int) -> Tensor:
        """[classes, finer cells] log-probabilities of a number's finer cells within their cells."""
        logits = self.places.values[:, self.place_spans[column]]
        parts = torch.from_numpy(self.columns[column].parts[: logits.shape[1]])
        count = len(self.columns[column].edges) - 1
        within = torch.nn.functional.one_hot(parts, count).T.bool()
        sums = logits[:, None].masked_fill(~within, -torch.inf).logsumexp(2)
        return logits - sums[:, parts]


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
    _start(mixture, statistics, total, generator)
    targets = _targets(mixture, statistics, total)
    cells_asked = sum(target.shares.numel() for target in targets)
    optimiser = torch.optim.Adam(
        [mixture.weights.values, mixture.levels.values], lr=_RATE, betas=(0.9, 0.99)
    )
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)
    for _ in range(options.steps):
        optimiser.zero_grad()
        loss = _misfit(mixture, targets) / cells_asked
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        rates.step()
    _place(mixture, statistics)
    return mixture


def _start(mixture: Mixture, statistics: Noisy, total: float, generator: torch.Generator) -> None:
    """Components that differ, around what each column's own histogram says."""
    logits = []
    for column in mixture.columns:
        counts, _ = table_of((column.column,), statistics, mixture.schema)
        logits.append(np.log(np.maximum(counts / total, 1e-4)))
    levels = mixture.levels.values
    drawn = torch.randn(levels.shape, generator=generator)
    with torch.no_grad():
        levels.copy_(torch.from_numpy(np.concatenate(logits)) + _SPREAD * drawn)


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
        counts, edges, _ = fine_table(column.column, statistics, mixture.schema)
        if len(edges) != len(column.fine):  # was not asked: even within the cells
            continue
        shares = np.maximum(counts, 0) / max(counts.sum(), 1.0)
        with torch.no_grad():
            mixture.places.values[:, span] = torch.from_numpy(np.log(shares + _LEAST)).float()


@torch.no_grad()
def scores(module: nn.Module, batch: Batch) -> Tensor:
    """[B] log-likelihoods: of the cells, and of the density of numbers within them."""
    mixture = _mixture(module)
    found = codes(Encoded(batch.x.detach().numpy(), batch.y.numpy()), mixture.schema)
    total = mixture.weights.values.log_softmax(0)[None]
    for log_levels, (coarse, _) in zip(mixture.log_levels(), found, strict=True):
        total = total + log_levels.T[torch.from_numpy(coarse)]
    within = torch.zeros(len(batch.y), dtype=total.dtype)
    for place, (column, (_, fine)) in enumerate(zip(mixture.columns, found, strict=True)):
        if column.number:
            widths = torch.tensor(np.diff(column.fine), dtype=total.dtype).log()
            density = mixture.log_places(place) - widths
            present = torch.from_numpy(fine < _places(column))
            cell = torch.from_numpy(np.minimum(fine, _places(column) - 1))
            row = batch.y if mixture.schema.classes else torch.zeros_like(batch.y)
            within = within + torch.where(present, density[row, cell], 0.0)
    return total.logsumexp(1) + within


def score_bounds(module: nn.Module) -> tuple[float, float]:
    """Twice the score of an even guess, and all numbers in one finer cell each."""
    mixture = _mixture(module)
    low = -2.0 * sum(math.log(len(column.names)) for column in mixture.columns) - 1.0
    high = sum(math.log(_places(column)) for column in mixture.columns if column.number)
    return low, high


def sample(
    module: nn.Module, n: int, generator: torch.Generator, labels: Tensor | None = None
) -> Batch:
    """N records, drawn so that shares are kept as nearly as n allows (systematic sampling)."""
    mixture = _mixture(module)
    levels = [table.exp().double() for table in mixture.log_levels()]
    weights = mixture.weights.values.double().softmax(0)
    nowhere = torch.zeros(n, dtype=torch.int64)
    if labels is None or not mixture.schema.classes:
        which = _draw(weights[None], nowhere, generator)
    else:
        by_class = (weights[:, None] * levels[-1]).T
        which = _draw(by_class / by_class.sum(1, keepdim=True), labels, generator)
    found = [_draw(table, which, generator) for table in levels]
    y = found[-1] if mixture.schema.classes else nowhere
    y = y if labels is None else labels
    x = torch.zeros(n, mixture.schema.width)
    for place, block in enumerate(mixture.schema.blocks):
        if block.column.kind == "categorical":
            x[torch.arange(n), block.start + found[place]] = 1.0
        else:
            _number(x, block, mixture, place, found[place], y, generator)
    return Batch(x, y)


def _number(
    x: Tensor,
    block: Block,
    mixture: Mixture,
    place: int,
    cell: Tensor,
    y: Tensor,
    generator: torch.Generator,
) -> None:
    """Sets a number (and its presence bit) of all records, by their cells and classes."""
    column = mixture.columns[place]
    count = len(column.edges) - 1
    inside = torch.from_numpy(column.parts[: _places(column)])
    shares = mixture.log_places(place).exp().double()
    within = shares[:, None] * (inside == torch.arange(count)[:, None])
    present = cell < count
    fine = _draw(within.flatten(0, 1), y * count + cell.clamp(max=count - 1), generator)
    ends = torch.tensor(column.fine, dtype=torch.float64)
    where = torch.rand(len(y), generator=generator, dtype=torch.float64)
    number = ends[fine] + where * (ends[fine + 1] - ends[fine])
    if block.column.kind == "integer":
        number = torch.from_numpy(whole(block.column, number.numpy()))
    x[:, block.start] = torch.where(present, number, 0.0).float()
    if block.column.nullable:
        x[:, block.start + 1] = present.float()


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
