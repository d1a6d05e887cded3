"""Gaussians by class in a public cosine basis, clipped to the range of pixels.

A class's images are those of a Gaussian over the lowest frequencies (`data_prep.queries.images`).
Pixels end at black and white, so each pixel's Gaussian is then moved and widened until what is left
of it after clipping has the mean and the variance that the statistics say: strokes become sharp, as
of a pixel that is either black or white most of the time (a rectified Gaussian, as in Socci, Lee
and Seung 1997, fitted by its moments).

What the noise hides is left out: eigenvalues of a noisy matrix count for what they are worth
against the spectrum of the noise (Wigner's semicircle; Benaych-Georges and Nadakuditi 2011;
Gavish and Donoho 2017), class means are drawn to the common one (James and Stein 1961).
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from ...config import MarginalOptions
from ...data_prep.queries import Noisy
from ...data_prep.queries.images import CENTRE, MOST_COEFFICIENTS, axes, lowest, matrix, weights
from ...data_prep.schema import ImageSchema, Schema
from ..family import Batch
from ..histograms import nearest
from ..layers import Table

_LEAST_SPREAD = 0.02
"""Of a coefficient in samples: what a module's factors are counted from."""
_BLUR = 0.25
"""Of a coefficient in scores: no record is farther off than the Gaussian is narrow."""
_LEAST_SHARE = 0.01
"""Of an even share: that of a class that the noise hides."""
_CONTRAST = 0.6
"""Most variance of a pixel, in parts of that of one which is black or white: more is mostly noise.

It takes white specks from black backgrounds, and did better than 0.95 on MNIST at epsilon 1."""
_WIDEST = 3.0
"""Of a pixel's Gaussian before clipping, in ranges of a pixel."""
_STEPS = 40


class ImageGaussians(nn.Module):
    """p(y) N(z; mean of y, F F^T) over orthonormal coefficients z of an image less the grey.

    Attributes:
        shares: [classes] logits.
        means: [classes, size].
        factors: [classes, size, size], less `_LEAST_SPREAD` of the identity.
    """

    def __init__(self, options: MarginalOptions, schema: ImageSchema) -> None:
        super().__init__()
        self.options, self.schema = options, schema
        self.size = min(MOST_COEFFICIENTS, math.prod(schema.shape))
        classes = max(1, len(schema.classes))
        self.shares = Table(classes)
        self.means = Table(classes, self.size)
        self.factors = Table(classes, self.size, self.size)

    def factor(self, label: int) -> Tensor:
        """F of a class, [size, size]."""
        values = self.factors.values[label]
        return values + _LEAST_SPREAD * torch.eye(self.size, dtype=values.dtype)


def build(options: MarginalOptions, schema: Schema) -> ImageGaussians:
    """The module for a schema: as it is, every image is grey."""
    if not isinstance(schema, ImageSchema):
        raise TypeError("schema: is for no images")
    return ImageGaussians(options, schema)


def fit(
    options: MarginalOptions, schema: Schema, statistics: Noisy, generator: torch.Generator
) -> ImageGaussians:
    """The Gaussians that noisy class moments say; nothing is drawn."""
    del generator
    module = build(options, schema)
    sums, noise = statistics.values, statistics.noise
    classes, size = sums["sum"].shape
    # A class that the noise hides has a small share, and no moments of its own.
    least = max(_LEAST_SHARE * statistics.units / classes, 1.0)
    counts = np.maximum(sums["count"], least)
    shares = nearest(sums["count"] / max(sums["count"].sum(), least)).clip(_LEAST_SHARE / classes)
    means = _means(sums["sum"], counts, noise["sum"])
    squares = np.stack([matrix(cells, size) for cells in sums["square"]])
    covariances = _covariances(squares, counts, means, noise["square"])
    scales = weights(module.schema, size)
    with torch.no_grad():
        module.shares.values.copy_(torch.from_numpy(np.log(shares / shares.sum())))
        module.means.values[:, :size] = torch.from_numpy(means / scales)
        for label, covariance in enumerate(covariances):
            root = _root(covariance / np.outer(scales, scales))
            less = root - _LEAST_SPREAD * np.eye(size)
            module.factors.values[label, :size, :size] = torch.from_numpy(less)
    return module


def _means(sums: np.ndarray, counts: np.ndarray, noise: float) -> np.ndarray:
    """Class means, each drawn to the mean of all by as much of their distance as may be noise."""
    common = sums.sum(axis=0) / counts.sum()
    off = sums / counts[:, None] - common
    heard = np.square(off).sum(axis=1)
    hidden = (noise / counts) ** 2 * sums.shape[1]
    kept = np.maximum(1 - hidden / np.maximum(heard, 1e-12), 0)
    drawn: np.ndarray = common + off * kept[:, None]
    return drawn


def _covariances(
    squares: np.ndarray, counts: np.ndarray, means: np.ndarray, noise: float
) -> list[np.ndarray]:
    """Of each class, by what the sums of squares say: its own where there are such.

    Args:
        squares: [classes, size, size], or [1, size, size] of all classes together.
        counts: [classes], at least 1.
        means: [classes, size].
        noise: Standard deviation of the noise of a cell (off the diagonal, of sqrt(2) of it).
    """
    outer = means[:, :, None] * means[:, None, :] * counts[:, None, None]
    within = squares.sum(axis=0) - outer.sum(axis=0)
    edge = noise * math.sqrt(2 * means.shape[1])
    total = counts.sum()
    pooled = _denoised(within / total, edge * math.sqrt(len(squares)) / total)
    if len(squares) == 1:
        return [pooled] * len(counts)
    own = []
    for square, product, count in zip(squares, outer, counts, strict=True):
        rest = (square - product) / count - pooled
        own.append(pooled + _denoised(rest, edge / count, signed=True))
    return own


def _denoised(noisy: np.ndarray, edge: float, *, signed: bool = False) -> np.ndarray:
    """A few directions that stand out of the noise, and the variances of the others.

    A symmetric matrix of noise has all its eigenvalues within +-`edge`; one of l > edge that is
    seen is best taken for sqrt(l^2 - edge^2). Cells of the diagonal are far less noisy than
    eigenvalues: what the directions do not say of them is kept.

    Args:
        noisy: [d, d] symmetric.
        edge: Of the noise's spectrum.
        signed: It is the difference of two covariances, and any of it may be negative.
    """
    if not noisy[~np.eye(len(noisy), dtype=bool)].any():
        return np.diag(np.diag(noisy))
    hidden = edge / math.sqrt(2 * len(noisy)) if signed else 0.0
    rest = np.zeros(len(noisy))
    for _ in range(5):
        values, vectors = np.linalg.eigh(noisy - np.diag(rest))
        seen = (np.abs(values) if signed else values) > edge
        worth = np.sign(values) * np.sqrt(np.maximum(values**2 - edge**2, 0)) * seen
        found = (vectors * worth) @ vectors.T
        left = np.diag(noisy - found)
        rest = np.sign(left) * np.maximum(np.abs(left) - hidden, 0) if signed else left.clip(0)
    return np.asarray(found + np.diag(rest))


def _root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric root of what is nearest to it and no narrower than `_LEAST_SPREAD`."""
    values, vectors = np.linalg.eigh(covariance)
    root: np.ndarray = (vectors * np.sqrt(np.maximum(values, _LEAST_SPREAD**2))) @ vectors.T
    return root


def sample(
    module: nn.Module, n: int, generator: torch.Generator, labels: Tensor | None = None
) -> Batch:
    """N images; labels [n] are drawn by the classes' shares where they are not given."""
    gaussians = _gaussians(module)
    if labels is None:
        ends = gaussians.shares.values.softmax(dim=0).cumsum(dim=0)[:-1]
        labels = torch.bucketize(torch.rand(n, generator=generator), ends)
    # One draw for all: what an image is does not depend on which others are asked for.
    draws = torch.randn(n, gaussians.size, generator=generator)
    x = torch.zeros(n, *gaussians.schema.shape)
    for label in torch.unique(labels).tolist():
        rows = labels == label
        factor, mean = gaussians.factor(label), gaussians.means.values[label]
        shift, gain = _pixels(gaussians, mean, factor)
        x[rows] = (shift + gain * _pictures(gaussians, draws[rows] @ factor.T)).clamp(0, 1)
    return Batch(x, labels)


def _pixels(gaussians: ImageGaussians, mean: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Where each pixel's Gaussian is moved to and how much it is widened, [C, H, W] each."""
    middle = (_pictures(gaussians, mean[None])[0] + CENTRE).double()
    variance = torch.zeros_like(middle)
    for columns in torch.split(factor.T, 16):
        variance += _pictures(gaussians, columns).double().square().sum(dim=0)
    shift, spread = rectified(middle, variance)
    gain = spread / variance.clamp(min=1e-12).sqrt()
    return shift.to(mean.dtype), gain.to(mean.dtype)


def rectified(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of Gaussians that, clipped to [0, 1], have a mean and a variance.

    A variance counts for at most `_CONTRAST` of mean (1 - mean), that of a pixel which is black or
    white; what cannot be met is met as nearly as a spread of `_WIDEST` does.

    Args:
        mean: Of each pixel, any shape, float64.
        variance: In the same shape.
    """
    mean = mean.clamp(1e-3, 1 - 1e-3)
    variance = torch.minimum(variance.clamp(min=1e-6), _CONTRAST * mean * (1 - mean))
    middle, spread = mean.clone(), variance.sqrt()
    for _ in range(_STEPS):
        first, second = _clipped_moments(middle, spread)
        middle = (middle + mean - first).clamp(-6, 7)
        change = (variance / second.clamp(min=1e-9)).sqrt().clamp(0.7, 1.4)
        spread = (spread * change).clamp(1e-3, _WIDEST)
    return middle, spread


def _clipped_moments(mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of N(mean, spread^2) clipped to [0, 1]."""
    low, high = -mean / spread, (1 - mean) / spread
    below, above = torch.special.ndtr(low), torch.special.ndtr(-high)
    at_low, at_high = ((-0.5 * end.square()).exp() / math.sqrt(2 * math.pi) for end in (low, high))
    inside = 1 - below - above
    first = mean * inside + spread * (at_low - at_high) + above
    second = (mean**2 + spread**2) * inside + spread * (mean * at_low - (mean + 1) * at_high)
    return first, second + above - first**2


def _pictures(gaussians: ImageGaussians, z: Tensor) -> Tensor:
    """[N, size] coefficients -> [N, C, H, W], without the grey."""
    found = (torch.from_numpy(axis).to(z.dtype) for axis in axes(gaussians.schema, z.shape[1]))
    deep, tall, wide = found
    channel, row, column = torch.from_numpy(lowest(gaussians.schema, z.shape[1])[0]).T
    grid = z.new_zeros(len(z), len(deep), len(tall), len(wide))
    grid[:, channel, row, column] = z
    pictures = tall.T @ grid @ wide
    return torch.einsum("nkhw,kc->nchw", pictures, deep)


def scores(module: nn.Module, batch: Batch) -> Tensor:
    """[B] log-likelihoods of label and coefficients, blurred by `_BLUR`; slopes are of x alone."""
    gaussians = _gaussians(module)
    z = _coefficients(gaussians, batch.x)
    shares = gaussians.shares.values.detach().log_softmax(dim=0)
    total = z.new_zeros(len(z))
    for label in torch.unique(batch.y).tolist():
        rows = (batch.y == label).nonzero()[:, 0]
        density = _density(gaussians, label, z[rows]) + shares[label]
        total = total.index_put((rows,), density)
    return total


def _density(gaussians: ImageGaussians, label: int, z: Tensor) -> Tensor:
    factor = gaussians.factor(label).detach()
    blur = _BLUR**2 * torch.eye(gaussians.size, dtype=factor.dtype)
    # Not one that raises: whoever sends the model could make a record of one class fail its site.
    lower, _ = torch.linalg.cholesky_ex(factor @ factor.T + blur)
    off = z - gaussians.means.values[label].detach()
    white = torch.linalg.solve_triangular(lower, off.T, upper=False)
    logarithm = lower.diagonal().log().sum() + gaussians.size / 2 * math.log(2 * math.pi)
    density: Tensor = -0.5 * white.square().sum(dim=0) - logarithm
    return density


def _coefficients(gaussians: ImageGaussians, x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, size]."""
    deep, tall, wide = (
        torch.from_numpy(axis).to(x.dtype) for axis in axes(gaussians.schema, gaussians.size)
    )
    channel, row, column = torch.from_numpy(lowest(gaussians.schema, gaussians.size)[0]).T
    grid = torch.einsum("nchw,kc->nkhw", tall @ (x - CENTRE) @ wide.T, deep)
    return grid[:, channel, row, column]


def score_bounds(module: nn.Module) -> tuple[float, float]:
    """A nat and a half a pixel below zero; above, the density that `_BLUR` allows."""
    gaussians = _gaussians(module)
    highest = -gaussians.size * math.log(_BLUR * math.sqrt(2 * math.pi))
    return -1.5 * math.prod(gaussians.schema.shape), highest


def _gaussians(module: nn.Module) -> ImageGaussians:
    if not isinstance(module, ImageGaussians):
        raise TypeError(f"{type(module).__name__}: is no ImageGaussians")
    return module
