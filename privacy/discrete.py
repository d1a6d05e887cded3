"""Integer noise: discrete Gaussians from secret coins, by an exact and fast sampler.

The base draw X is a discrete Gaussian on the integers of parameter S = 1024, with probabilities
proportional to exp(-x^2 / (2 S^2)) (Canonne, Kamath and Steinke 2020, "The Discrete Gaussian for
Differential Privacy", definition 1). It comes from a table of whole numbers by Walker's alias
method (Walker 1977, "An Efficient Method for Generating Discrete Random Variables with General
Distributions"): nothing is rounded when a draw is made. The one error is the table's, see
`DISTANCE`.

A wider noise is k X1 + X2 for a whole number k, the *stretch*, with independent base draws. It is
within a pure-epsilon slack of the discrete Gaussian of variance S^2 (k^2 + 1), by completing the
square (Micciancio and Peikert 2013, "Hardness of SIS and LWE with Small Parameters", theorem 3.3,
for any lattice): with c = k y / (k^2 + 1) and w = S / sqrt(k^2 + 1),

    P(k X1 + X2 = y)  ~  sum over a in Z of exp(-(a^2 + (y - k a)^2) / (2 S^2))
                      =  exp(-y^2 / (2 S^2 (k^2 + 1))) * sum over a of exp(-(a - c)^2 / (2 w^2)).

By Poisson's summation the last sum is w sqrt(2 pi) (1 + 2 sum over j >= 1 of exp(-2 pi^2 w^2 j^2)
cos(2 pi j c)), which lies within w sqrt(2 pi) (1 +- e) for every c, with e = 2 q / (1 - q) and
q = exp(-2 pi^2 w^2). So the logarithm of the ratio of the two probabilities is at most
log((1 + e) / (1 - e)) in size, for every y: that is `ripple(w^2)`. A stretch of 256 has
w^2 = 2^20 / 65537 > 15.99 and a slack below 1e-136.

The coins are AES in counter mode: "independent" and "uniform" hold for whoever cannot break it.
Look-ups in a table of secret places are not of constant time; a program on the site's own machine
that watches its caches is not defended against.
"""

import math
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import cache

import numpy as np

from .noise import Coins
from .secagg.slices import SLICE, over_slices

MAX_STRETCH = 256
DISTANCE = 2.0**-113
"""Statistical distance of one noise (two draws) from the sum of two exact discrete Gaussians.

A base draw's is at most 2^-114. The cut at 13 S takes away a mass below 2^-125. Each of the 26625
weights, in units of 2^-128, is rounded by at most 1/2, and the mode takes up what is missing in the
sum, at most as much as all that rounding: half the sum of the errors is at most 26625 / 2 units,
which is below 2^-114.2.
"""

_S = 1024
_REACH = 13 * _S  # from about 12.8 S on the weights round to zero
_COLUMN_BITS = 15
_COLUMNS = 1 << _COLUMN_BITS
_MODE = _COLUMNS >> 1  # the column that stands for zero
_LOW_BITS = 64  # of a threshold: looked at only when its high bits tie
_HIGH_BITS = 64 - _COLUMN_BITS
_FULL = 1 << (_HIGH_BITS + _LOW_BITS)  # what a column holds
_TOTAL = _COLUMNS * _FULL  # 2^128
_DIGITS = 50  # decimals of a probability, of which 2^-128 is 39
_BLOCK = 1 << 14  # coordinates at a time: table and scratch stay in cache
_RIPPLE_FLOOR = 700.0  # exp(-700) is no subnormal yet


def variance(stretch: int) -> int:
    """S^2 (k^2 + 1): of the discrete Gaussian that the noise of a stretch stands for.

    Raises:
        ValueError: The stretch is no whole number from 0 to `MAX_STRETCH`.
    """
    if type(stretch) is not int or not 0 <= stretch <= MAX_STRETCH:
        raise ValueError(f"stretch = {stretch!a}: must be a whole number, 0 to {MAX_STRETCH}")
    return _S**2 * (stretch**2 + 1)


def sigma(stretch: int) -> float:
    """The square root of `variance`, in steps of the grid.

    Raises:
        ValueError: As `variance`.
    """
    return math.sqrt(variance(stretch))


def stretch_of(noise: float) -> int:
    """The stretch whose `sigma` this is, exactly: what a signed block says is what is drawn.

    Raises:
        ValueError: It is no stretch's.
    """
    for stretch in range(MAX_STRETCH + 1):
        if sigma(stretch) == noise:
            return stretch
    raise ValueError(
        f"sigma = {noise!r}: must be 1024 sqrt(k^2 + 1) for a whole k of 0 to {MAX_STRETCH}"
    )


def ripple(width: float) -> float:
    """How far, as a logarithm, sums of a Gaussian over shifted integers are apart: an upper bound.

    It bounds log((1 + e) / (1 - e)) of the module's text: with q < 1e-8 that is at most 4.1 q.

    Args:
        width: w^2, the Gaussian's variance in squared steps, at least 1.

    Raises:
        ValueError: It is narrower.
    """
    if not width >= 1:
        raise ValueError(f"width = {width!r}: must be at least 1 squared step")
    return 5 * math.exp(-min(_RIPPLE_FLOOR, 2 * math.pi**2 * width))


def add_noise(words: np.ndarray, stretch: int, coins: Coins) -> None:
    """Adds noise of its own to each word, in place and modulo 2^32.

    Formal guarantee: the noises are independent over coordinates and calls, and each is within a
    statistical distance of `DISTANCE` of k X1 + X2 (for k = 0: of X2), X1 and X2 exact discrete
    Gaussians of S = 1024, whatever the words are. How many cores there are changes nothing.

    Args:
        words: [d] uint32, writeable.
        stretch: k, from 0 to `MAX_STRETCH`; the standard deviation is `sigma(k)`.
        coins: The site's own and secret; they give a key for each slice.

    Raises:
        ValueError: The words cannot be added to, or the stretch is out of its range.
    """
    if words.dtype != np.dtype("<u4") or words.ndim != 1 or not words.flags.writeable:
        raise ValueError(
            f"words: are {words.dtype} of {words.ndim} axes, must be flat, writeable uint32"
        )
    variance(stretch)
    keys = [coins.words(4).tobytes() for _ in range(0, len(words), SLICE)]

    def work(part: slice) -> None:
        _add(words[part], stretch, Coins(keys[part.start // SLICE]))

    over_slices(len(words), work)


def _add(words: np.ndarray, stretch: int, coins: Coins) -> None:
    zero = np.uint32((stretch + 1) * _MODE)
    for start in range(0, len(words), _BLOCK):
        part = words[start : start + _BLOCK]
        drawn = _draw(len(part), coins)
        if stretch:
            drawn *= np.uint64(stretch)
            drawn += _draw(len(part), coins)
        part += drawn.astype(np.uint32)
        part -= zero


@dataclass(frozen=True)
class _Table:
    """Walker's columns, [2^15] each.

    Attributes:
        entries: uint64: the 49 high bits of the threshold, then the 15 of the alias.
        lows: uint64: the 64 low bits of the threshold.
    """

    entries: np.ndarray
    lows: np.ndarray


def _draw(count: int, coins: Coins) -> np.ndarray:
    """[count] uint64, count > 0: base draws plus 2^14.

    A word is a column and the 49 high bits of a number below 2^113; it takes the column if the
    number is below the threshold, and its alias otherwise. The low bits are drawn only where the
    high ones tie, which leaves the comparison exact.
    """
    table = _table()
    words = coins.words(count)
    columns = words >> np.uint64(_HIGH_BITS)
    entries = np.take(table.entries, columns.view(np.int64), mode="clip")
    # The number above 15 zeros: it exceeds the entry, whose low bits are the alias, if and only if
    # its high bits exceed the threshold's; and if they tie, it is less than 2^15 below the entry.
    numbers = words << np.uint64(_COLUMN_BITS)
    aliases = entries & np.uint64(_COLUMNS - 1)
    drawn: np.ndarray = np.where(numbers > entries, aliases, columns)
    np.subtract(entries, numbers, out=numbers)  # wraps where it exceeds
    if numbers.min() < _COLUMNS:
        ties = np.flatnonzero(numbers < _COLUMNS)
        above = ties[coins.words(len(ties)) >= table.lows[columns[ties]]]
        drawn[above] = aliases[above]
    return drawn


@cache
def _table() -> _Table:
    """Built at the first draw, which takes about 0.3 s; two threads may build it twice, equally."""
    thresholds, aliases = _columns(_weights())
    return _Table(
        entries=np.array(
            [
                threshold >> _LOW_BITS << _COLUMN_BITS | alias
                for threshold, alias in zip(thresholds, aliases, strict=True)
            ],
            dtype=np.uint64,
        ),
        lows=np.array([threshold % (1 << _LOW_BITS) for threshold in thresholds], dtype=np.uint64),
    )


def _weights() -> list[int]:
    """[2^15] whole numbers that sum to 2^128: the probabilities of -2^14, ..., 2^14 - 1."""
    with localcontext(Context(prec=_DIGITS)):
        # The exponents have at most 30 digits: they are exact.
        sizes = [(Decimal(-x * x) / (2 * _S**2)).exp() for x in range(_REACH + 1)]
        unit = _TOTAL / (2 * sum(sizes, Decimal(0)) - 1)
        half = [int((size * unit).to_integral_value()) for size in sizes]
    weights = [0] * _COLUMNS
    for x, weight in enumerate(half):
        weights[_MODE + x] = weights[_MODE - x] = weight
    weights[_MODE] += _TOTAL - sum(weights)
    return weights


def _columns(weights: list[int]) -> tuple[list[int], list[int]]:
    """Thresholds below 2^113 and aliases, [2^15] each; in whole numbers, so exactly the weights.

    A column that is full with what it stands for is its own alias.
    """
    left = list(weights)
    thresholds, aliases = [0] * _COLUMNS, list(range(_COLUMNS))
    small = [column for column, weight in enumerate(left) if weight < _FULL]
    large = [column for column, weight in enumerate(left) if weight >= _FULL]
    # The mean of what is left is always a full column: while one has less, another has more.
    while small:
        poor, rich = small.pop(), large[-1]
        thresholds[poor], aliases[poor] = left[poor], rich
        left[rich] -= _FULL - left[poor]
        if left[rich] < _FULL:
            small.append(large.pop())
    return thresholds, aliases
