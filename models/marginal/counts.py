"""What counts were before noise was added, as far as that can be known."""

import numpy as np
from scipy.special import gammainc, gammaln

_SHAPES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # of the prior: small ones are heavy-tailed
_GRID = 160  # counts at which a cell is looked at, evenly spaced in their logarithm
_LEAST, _MOST = 1e-3, 18.0  # the ends of that grid, in standard deviations of the noise
_PLAIN = 12.0  # so many standard deviations above nought, noise is no matter
_NOWHERE = 1e-3  # a cell of which so little is expected, in standard deviations, ...
_SILENT = 4.0  # ... and that says no more than that, says nothing
_CHUNK = 4096


def shrunk(noisy: np.ndarray, expected: np.ndarray, noise: float) -> np.ndarray:
    """The mean of each count given its noisy value: between what was expected and what is read.

    Empirical Bayes (Robbins 1956): a count is Gamma distributed around what simpler counts let
    expect, how closely is fitted to all cells at once by marginal likelihood, and its noise is
    Gaussian of a known size. What is below the noise thus falls back on what was expected; all
    results are positive. Post-processing of released values.

    Args:
        noisy: Released counts, in any shape.
        expected: What simpler counts let expect, > 0, in the same shape.
        noise: Standard deviation of the noise of a cell, > 0.
    """
    read, prior = noisy.ravel().astype(np.float64), expected.ravel().astype(np.float64)
    found = np.where(read >= _PLAIN * noise, read, prior)
    usual = np.flatnonzero((prior > _NOWHERE * noise) & (read < _PLAIN * noise))
    odd = np.flatnonzero(
        (prior <= _NOWHERE * noise) & (read > _SILENT * noise) & (read < _PLAIN * noise)
    )
    if len(usual):
        tried = [_posterior(read[usual], prior[usual], noise, shape) for shape in _SHAPES]
        best = max(range(len(_SHAPES)), key=lambda index: tried[index][1])
        found[usual] = tried[best][0]
        if len(odd):
            found[odd], _ = _posterior(read[odd], prior[odd], noise, _SHAPES[best])
    return found.reshape(noisy.shape)


def _posterior(
    read: np.ndarray, prior: np.ndarray, noise: float, shape: float
) -> tuple[np.ndarray, float]:
    """Posterior means of cells [n], and the log of their marginal likelihood."""
    logs = np.linspace(np.log(_LEAST * noise), np.log(_MOST * noise), _GRID)
    means, likelihood = np.empty(len(read)), 0.0
    for start in range(0, len(read), _CHUNK):
        part = slice(start, start + _CHUNK)
        means[part], some = _on_grid(read[part], prior[part], noise, shape, logs)
        likelihood += some
    return means, likelihood


def _on_grid(
    read: np.ndarray, prior: np.ndarray, noise: float, shape: float, logs: np.ndarray
) -> tuple[np.ndarray, float]:
    grid, rate = np.exp(logs), shape / prior
    density = (shape * logs - rate[:, None] * grid) + (shape * np.log(rate) - gammaln(shape))[
        :, None
    ]
    density += np.log(logs[1] - logs[0]) - ((read[:, None] - grid) / noise) ** 2 / 2
    # Below the grid a count is as good as nought, but for what it is expected to be itself.
    below = -((read / noise) ** 2) / 2
    top = np.maximum(density.max(axis=1), below)
    weights = np.exp(density - top[:, None])
    tail = np.exp(below - top)
    chance = gammainc(shape, rate * grid[0])
    mean = prior * gammainc(shape + 1, rate * grid[0])
    total = weights.sum(axis=1) + tail * chance
    total = np.maximum(total, np.finfo(np.float64).tiny)
    return (weights @ grid + tail * mean) / total, float((top + np.log(total)).sum())
