"""Class moments of images in a public cosine basis: counts, sums, sums of squares.

An image, less a public grey, is described by its lowest frequencies of an orthonormal cosine
transform (Ahmed, Natarajan and Rao 1974), over rows, columns and channels. A coefficient is then
weighted by its frequency, for the square root of what such coefficients spread in common pictures
(power falls off as the square of the frequency; Field 1987): of all weights that leave the norm as
it is, these leave the least noise in the products of the coefficients as they were.
"""

import itertools
import math
from functools import lru_cache

import numpy as np

from ...config import ConfigError, Statistics
from ..modality import Encoded
from ..schema import ImageSchema, Schema
from .workload import Query, Workload

CENTRE = 0.25
"""The public grey: between the black backgrounds of scans and the middle grey of photographs."""
MOST_COEFFICIENTS = 144
"""That describe an image, whatever is asked; a fitted model has so many."""
_KNEE = 2.0
"""Frequency, in half periods an image, from which on power falls off."""
_CHROMA = 4.0
"""So many half periods a step from grey to colour counts for."""
_SPREAD = 0.35
"""How far a pixel is from the public grey, root mean square, where clipping begins."""
_SHARES = (0.2, 0.7, 1.0)
"""How loud counts, sums and squares are in the vector, relative to what a record can add to each.

Counts need the least and squares the most: they are the many."""
_LOUDNESS = math.hypot(*_SHARES)
_AUDIBLE = {"class": 0.06, "shared": 0.03}
"""Edge of the noise's spectrum, over the largest square a record can have, up to which matrices
were worth their noise (MNIST and digits, 1,797 to 60,000 records, epsilon 0.3 to 10)."""
_SMALLER = (100, 64, 36, 16, 4, 1)
"""Numbers of coefficients to come down to where there are too many classes for the cells."""
_BLOCK = 2**22
"""Pixels at a time: memory, not privacy."""


def workload(
    schema: Schema, options: Statistics, units: float, noise_multiplier: float
) -> Workload:
    """Asks for the count, the sum of z and the sum of z z^T of each class's clipped descriptions z.

    A record has one class (all have the same one where the schema declares none), so it adds
    (1, z, the triangle of z z^T) to one class's cells and nothing to the others'. Off-diagonal
    cells stand once, times sqrt(2): the triangle's L2 norm is then the matrix's Frobenius norm
    |z|^2. With |z| <= R and weights a, b / R and c / R^2, that is at most sqrt(a^2 + b^2 + c^2),
    whatever the number of classes. Squares that all classes share, or variances alone (whose norm
    is sqrt(sum of z_i^4) <= |z|^2), have no larger ones.

    Raises:
        ConfigError: It would have too many cells.
    """
    image = _image(schema)
    size, kind = _chosen(image, options, units, noise_multiplier)
    classes = max(1, len(image.classes))
    radius = clipping_radius(image, size)
    count, total, square = _SHARES
    groups = classes if kind == "class" else 1
    width = size if kind == "diagonal" else size * (size + 1) // 2
    return Workload(
        (
            Query("count", (classes,), 1.0, count),
            Query("sum", (classes, size), radius, total / radius),
            Query("square", (groups, width), radius**2, square / radius**2),
        )
    )


def answers(
    asked: Workload, encoded: Encoded, schema: Schema, persons: np.ndarray | None = None
) -> np.ndarray:
    """A site's exact sums.

    Formal guarantee: one record more or less changes them by at most `asked.norm` in L2, up to the
    rounding of float64 (`SLACK`), whatever its pixels and its label are. A record whose description
    is not finite, or whose label is no class, adds nothing.

    Args:
        asked: What `workload` asked.
        encoded: x [N, C, H, W], y [N].
        schema: What a record is.
        persons: `None`: images carry no key of a person.

    Returns:
        [asked.length] float64, weighted.

    Raises:
        ValueError: There are persons.
    """
    if persons is not None:
        raise ValueError("persons: images carry no key of a person")
    image = _image(schema)
    parts = {query.name: np.zeros(query.shape) for query in asked.queries}
    classes, size = parts["sum"].shape
    radius = next(query.norm for query in asked.queries if query.name == "sum")
    block = max(1, _BLOCK // math.prod(schema.shape))
    for start in range(0, len(encoded.y), block):
        rows = slice(start, start + block)
        z, usable = described(encoded.x[rows], image, size, radius)
        labels = encoded.y[rows] if image.classes else np.zeros(len(z))
        for label in range(classes):
            _add(parts, label, z[usable & (labels == label)])
    return np.concatenate([query.weight * parts[query.name].ravel() for query in asked.queries])


def described(
    x: np.ndarray, schema: ImageSchema, size: int, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """Clipped weighted coefficients of images, whatever the images hold.

    Args:
        x: [N, C, H, W].
        schema: Of the images.
        size: How many coefficients.
        radius: Their L2 norm at most.

    Returns:
        [N, size] float64, and [N] whether a row is finite; one that is not is not to be used.
    """
    with np.errstate(all="ignore"):
        z = coefficients(x.astype(np.float64) - CENTRE, schema, size) * weights(schema, size)
        norms = np.sqrt(np.square(z).sum(axis=1))
        z *= (radius / np.maximum(norms, radius))[:, None]
    return z, np.isfinite(norms)


def _add(parts: dict[str, np.ndarray], label: int, z: np.ndarray) -> None:
    """Adds one class's records z [n, size]."""
    squares = parts["square"]
    group = label if len(squares) > 1 else 0
    parts["count"][label] += len(z)
    parts["sum"][label] += z.sum(axis=0)
    if squares.shape[1] == z.shape[1] > 1:
        squares[group] += np.square(z).sum(axis=0)
    else:
        squares[group] += triangle(z.T @ z)


def _chosen(
    schema: ImageSchema, options: Statistics, units: float, noise_multiplier: float
) -> tuple[int, str]:
    """How many coefficients, and which squares: all that fit, and the richest that are heard.

    More coefficients did better at every noise (the fit leaves out what it hides); squares by class
    did better than shared ones, and those better than variances, up to the noise of `_AUDIBLE`.
    """
    pixels, classes = math.prod(schema.shape), max(1, len(schema.classes))
    wanted = options.image_coefficients or MOST_COEFFICIENTS
    kinds = [options.image_covariances] if options.image_covariances else [*_AUDIBLE, "diagonal"]
    sizes = [min(wanted, pixels)]
    if options.image_coefficients is None:
        sizes += [size for size in _SMALLER if size < sizes[0]]
    for size, kind in itertools.product(sizes, kinds):
        groups = classes if kind == "class" else 1
        edge = noise_multiplier * _LOUDNESS * math.sqrt(2 * size) * groups / units
        heard = len(kinds) == 1 or edge <= _AUDIBLE.get(kind, math.inf)
        if heard and _cells(classes, size, kind) <= options.max_cells:
            return size, kind
    raise ConfigError(
        f"statistics.max_cells = {options.max_cells}: {classes} classes of images with {size} "
        f"coefficients have {_cells(classes, size, kind)} cells; raise it, or lower "
        "statistics.image_coefficients"
    )


def _cells(classes: int, size: int, kind: str) -> int:
    width = size if kind == "diagonal" else size * (size + 1) // 2
    return classes * (1 + size) + (classes if kind == "class" else 1) * width


def triangle(matrix: np.ndarray) -> np.ndarray:
    """The cells of a symmetric matrix [d, d] that stand for it: [d (d + 1) / 2], of its norm."""
    places = np.triu_indices(len(matrix))
    return matrix[places] * np.where(places[0] == places[1], 1.0, math.sqrt(2))


def matrix(cells: np.ndarray, size: int) -> np.ndarray:
    """The symmetric matrix [size, size] that a triangle or a diagonal stands for."""
    if len(cells) == size:
        return np.diag(cells)
    places = np.triu_indices(size)
    upper = np.zeros((size, size))
    upper[places] = cells / np.where(places[0] == places[1], 2.0, math.sqrt(2))
    return upper + upper.T


def coefficients(x: np.ndarray, schema: ImageSchema, size: int) -> np.ndarray:
    """The lowest frequencies of images: [N, C, H, W] -> [N, size], orthonormal."""
    channel, row, column = lowest(schema, size)[0].T
    deep, tall, wide = axes(schema, size)
    found = np.matmul(tall, np.matmul(x, wide.T))
    found = np.tensordot(found, deep, axes=(1, 1))
    chosen: np.ndarray = found[:, row, column, channel]
    return chosen


def axes(schema: ImageSchema, size: int) -> list[np.ndarray]:
    """Cosines of channels, rows and columns, as many of each as the lowest frequencies take."""
    most = lowest(schema, size)[0].max(axis=0) + 1
    return [_cosines(length)[:k] for length, k in zip(schema.shape, most, strict=True)]


@lru_cache(maxsize=8)
def weights(schema: ImageSchema, size: int) -> np.ndarray:
    """What coefficients are multiplied by, [size], at least 1."""
    _, frequencies = lowest(schema, size)
    return _power(frequencies) ** -0.25


def clipping_radius(schema: ImageSchema, size: int) -> float:
    """The L2 norm that descriptions are clipped to: that of a common picture, by public rule."""
    _, every = lowest(schema, math.prod(schema.shape))
    _, frequencies = lowest(schema, size)
    share = np.sum(_power(frequencies) ** 0.5) / np.sum(_power(every))
    return _SPREAD * math.sqrt(math.prod(schema.shape) * float(share))


def _power(frequencies: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.square(frequencies / _KNEE))


@lru_cache(maxsize=8)
def lowest(schema: ImageSchema, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the lowest frequencies stand, [size, 3], and what they are, [size]."""
    places = np.stack(np.meshgrid(*map(np.arange, schema.shape), indexing="ij"), axis=-1)
    places = places.reshape(-1, 3)
    middle = math.sqrt(schema.height * schema.width)
    scales = np.array([_CHROMA, middle / schema.height, middle / schema.width])
    found = np.sqrt(np.square(places * scales).sum(axis=1))
    order = np.lexsort((*places.T, found.round(9)))[:size]
    return places[order], found[order]


def _cosines(length: int) -> np.ndarray:
    """Orthonormal cosine transform (type II), frequencies by rows."""
    k, n = np.arange(length)[:, None], np.arange(length)[None]
    rows = math.sqrt(2 / length) * np.cos(math.pi * (n + 0.5) * k / length)
    rows[0] /= math.sqrt(2)
    return rows


def _image(schema: Schema) -> ImageSchema:
    if not isinstance(schema, ImageSchema):
        raise TypeError("schema: is for no images")
    return schema
