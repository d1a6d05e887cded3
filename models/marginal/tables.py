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

import numpy as np
import torch
from torch import Tensor, nn

from ...config import MarginalOptions
from ...data_prep.modality import Encoded
from ...data_prep.queries import Noisy
from ...data_prep.queries.cells import Cells, codes
from ...data_prep.queries.tables import fine_histogram, table_of, tables
from ...data_prep.schema import Block, Schema, TableSchema
from ...data_prep.tabular import whole
from ..family import Batch
from .labels import fit_effects
from .mixture import (
    BELIEF,
    Features,
    Mixture,
    draw,
    effects_at,
    features,
    log_joint,
    log_labels,
    log_odds,
    place_count,
)

_RATE = 0.15
_SPREAD = 1.0
"""Of the components' first logits around those of the columns' own histograms."""
_PULL = 0.3
"""Weight of what holds the logits there: it smooths what the noise would fill with detail."""
_LEAST = 1e-6
"""Least share of a cell, for what is counted as less."""
_DRAWN = 30_000
"""Records that the effects are fitted on."""
_POOL = 4
"""Candidates for each record of a given label."""


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
        groups.setdefault(tuple(first), []).append((last, shares, 1 / noise))
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
        found = features(mixture, _DRAWN, generator, None)
        guess = BELIEF * log_odds(mixture, found)
        at = effects_at(mixture, found)
        effects = fit_effects(mixture.columns, statistics, mixture.schema, total, at, guess)
        mixture.effects.values.copy_(effects)


@torch.no_grad()
def scores(module: nn.Module, batch: Batch) -> Tensor:
    """[B] log-likelihoods: of cells, of numbers' density within them, of the label given both."""
    mixture = _mixture(module)
    pairs = codes(Encoded(batch.x.numpy(), batch.y.numpy()), mixture.schema)
    pairs_of_features = pairs[: len(mixture.schema.blocks)]
    found = Features(
        [torch.from_numpy(coarse) for coarse, _ in pairs_of_features],
        [torch.from_numpy(fine) for _, fine in pairs_of_features],
    )
    total = log_joint(mixture, found).logsumexp(1)
    for place, column in enumerate(mixture.columns):
        if column.number:
            widths = torch.tensor(np.diff(column.fine), dtype=total.dtype).log()
            density = mixture.log_places(place) - widths
            fine = found.fine[place]
            last = place_count(column) - 1
            total = total + torch.where(fine <= last, density[fine.clamp(max=last)], 0.0)
    if mixture.schema.classes:
        label = torch.from_numpy(pairs[-1][0])
        total = total + log_labels(mixture, found).gather(1, label[:, None])[:, 0]
    return total


def score_bounds(module: nn.Module) -> tuple[float, float]:
    """Twice the score of an even guess, and all numbers in one finer cell each."""
    mixture = _mixture(module)
    low = -2.0 * sum(math.log(len(column.names)) for column in mixture.columns) - 1.0
    high = sum(math.log(place_count(column)) for column in mixture.columns if column.number)
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
        found = features(mixture, n, generator, None)
        return Batch(_encoded(mixture, found, generator), torch.zeros(n, dtype=torch.int64))
    if labels is None:
        found = features(mixture, n, generator, None)
        chances = log_labels(mixture, found).double().exp()
        drawn = torch.rand(n, 1, generator=generator, dtype=torch.float64)
        y = (chances.cumsum(1) < drawn).sum(1).clamp(max=chances.shape[1] - 1)
        return Batch(_encoded(mixture, found, generator), y)
    pool = features(mixture, _POOL * n, generator, labels.repeat(_POOL))
    wanted = labels.repeat(_POOL)
    ratio = log_labels(mixture, pool) - log_joint(mixture, pool).log_softmax(1)
    chance = ratio.gather(1, wanted[:, None])[:, 0].double().exp()
    classes = len(mixture.schema.classes)
    by_class = chance * (wanted == torch.arange(classes)[:, None]) + 1e-300
    kept = draw(by_class / by_class.sum(1, keepdim=True), labels, generator)
    found = Features([cell[kept] for cell in pool.cells], [fine[kept] for fine in pool.fine])
    return Batch(_encoded(mixture, found, generator), labels)


def _encoded(mixture: Mixture, found: Features, generator: torch.Generator) -> Tensor:
    """[n, width] records: numbers are drawn within their finer cells."""
    n = len(found.cells[0])
    x = torch.zeros(n, mixture.schema.width)
    for place, block in enumerate(mixture.schema.blocks):
        if block.column.kind == "categorical":
            x[torch.arange(n), block.start + found.cells[place]] = 1.0
            continue
        column = mixture.columns[place]
        present = found.fine[place] < place_count(column)
        number = _number(block, column, found.fine[place], generator)
        x[:, block.start] = torch.where(present, number, 0.0)
        if block.column.nullable:
            x[:, block.start + 1] = present.float()
    return x


def _number(block: Block, column: Cells, fine: Tensor, generator: torch.Generator) -> Tensor:
    """[n] float32 evenly within finer cells; a whole number's, at whole numbers."""
    ends = torch.tensor(column.fine, dtype=torch.float64)
    fine = fine.clamp(max=place_count(column) - 1)
    where = torch.rand(len(fine), generator=generator, dtype=torch.float64)
    number = ends[fine] + where * (ends[fine + 1] - ends[fine])
    if block.column.kind == "integer":
        number = torch.from_numpy(whole(block.column, number.numpy()))
    return number.float()


def _mixture(module: nn.Module) -> Mixture:
    if not isinstance(module, Mixture):
        raise TypeError(f"marginal tables: given {type(module).__name__}")
    return module
