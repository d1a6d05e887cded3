"""The label of a table given its features: additive effects, fitted to noisy counts by class.

A logistic regression meets the tables of the label with every column that it has effects for: the
gradient of its log-likelihood is the difference of these tables and the model's (Berger et al.
1996, "A maximum entropy approach to natural language processing", section 3). So it can be fitted
to noisy tables, without records. What is noise in them is held down by a ridge that is the
variance of the noise, times a constant: the dual of a squared misfit (Dudik, Phillips and Schapire
2004, "Performance guarantees for regularized maximum entropy density estimation", section 2).
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch import Tensor

from ...data_prep.queries import Noisy
from ...data_prep.queries.cells import Cells
from ...data_prep.queries.tables import fine_table, has_table, table_of
from ...data_prep.schema import TableSchema

_RIDGE = 0.04
"""By the noise alone it would be 1, and a rare cell would say nothing; measured on Adult."""
_STEPS = 150
_UNKNOWN = 1e9
"""Variance of what was not asked."""


def fit_effects(
    columns: Sequence[Cells],
    statistics: Noisy,
    schema: TableSchema,
    total: float,
    at: Tensor,
    guess: Tensor,
) -> Tensor:
    """Effects by which records with these features have the labels that the statistics say.

    Args:
        columns: The cells of each column, the label's last.
        statistics: What was released.
        schema: What a record is; it has a label.
        total: How many records there are.
        at: [n, E] which effects each of n drawn records has.
        guess: [n, classes] log-odds that the effects add to.

    Returns:
        [effects, classes] float32, one after another as `Mixture.effects` has them.
    """
    shares, variance = _known(columns, statistics, schema)
    n, each = at.shape
    rows = sparse.csr_array(
        (np.ones(n * each), at.numpy().ravel(), np.arange(n + 1) * each), shape=(n, len(shares))
    )
    effects = _ridge_regression(
        rows, guess.double().numpy(), shares, _RIDGE * variance, weight=total / n
    )
    return torch.from_numpy(effects).float()


def _ridge_regression(
    rows: sparse.csr_array,
    guess: np.ndarray,
    shares: np.ndarray,
    ridge: np.ndarray,
    weight: float,
) -> np.ndarray:
    """Effects that make the classes' shares among records with each effect the given ones.

    Args:
        rows: [n, effects] how often each record has each effect.
        guess: [n, classes] log-odds before the effects.
        shares: [effects, classes].
        ridge: [effects], in counts.
        weight: Records that each of the n stands for.

    Returns:
        [effects, classes].
    """
    columns = sparse.csr_array(rows.T)
    counts = weight * np.asarray(rows.sum(axis=0)).ravel()
    held = counts[:, None] * shares
    # Steps are taken in units in which the loss is about equally curved along all of them.
    spread = (shares * (1 - shares)).mean(axis=1).clip(0.01)
    unit = 1 / np.sqrt(5 * counts * spread + ridge + 1.0)[:, None]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        effects = flat.reshape(shares.shape) * unit
        logits = guess + rows @ effects
        sums = logsumexp(logits, axis=1, keepdims=True)
        slope = weight * (columns @ np.exp(logits - sums)) - held + ridge[:, None] * effects
        misfit = weight * sums.sum() - (held * effects).sum()
        misfit += 0.5 * (ridge[:, None] * effects**2).sum()
        return float(misfit), (slope * unit).ravel()

    options = {"maxiter": _STEPS, "maxcor": 20}
    start = np.zeros(shares.size)
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    effects: np.ndarray = found.x.reshape(shares.shape) * unit
    return effects


def _known(
    columns: Sequence[Cells], statistics: Noisy, schema: TableSchema
) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the classes by effect [effects, classes], and variances of their counts."""
    label = columns[-1]
    classes, noise = table_of((label.column,), statistics, schema)
    prior = np.maximum(classes, 1e-3) / np.maximum(classes, 1e-3).sum()
    coarse, finer = [], []
    for column in columns[:-1]:
        if has_table((label.column, column.column), statistics):
            counts, std = table_of((label.column, column.column), statistics, schema)
            coarse.append((counts, std**2))
        else:
            coarse.append((np.zeros((len(prior), len(column.names))), _UNKNOWN))
        if column.number:
            counts, edges, std = fine_table(column.column, statistics, schema)
            asked = len(edges) == len(column.fine) and len(counts) == len(prior)
            empty = np.zeros((len(prior), len(column.fine) - 1))
            finer.append((counts, std**2) if asked else (empty, _UNKNOWN))
    unused = (np.zeros((len(prior), len(prior))), _UNKNOWN)  # the label's own cells
    known = [*coarse, unused, *finer, (classes[:, None], noise**2)]
    counts = np.maximum(np.concatenate([counts for counts, _ in known], axis=1), 0).T
    sums = counts.sum(axis=1, keepdims=True)
    shares = np.where(sums > 0, counts / np.where(sums > 0, sums, 1), prior)
    variance = np.concatenate([np.full(counts.shape[1], value) for counts, value in known])
    return shares, variance
