"""Reals on an integer grid: what is summed modulo 2^32.

Formal guarantee (`quantise`): with the same coins, two vectors whose scaled difference has L2 norm
D give integers whose difference has at most (1 + 2^-22) (D + sqrt(d)), whatever the coins are. For
each coordinate is rounded by one non-decreasing function with steps of one at distances of one, and
a clamp brings values no further apart; the factor is for what float64 rounds in the scaling.
"""

import numpy as np

from ..noise import Coins
from .errors import UnsafeNumbersError
from .slices import over_slices

_SLICE = 1 << 20  # coordinates that share a key
_BLOCK = 1 << 16  # coordinates at a time: the scratch stays in cache
_NOISE_TAIL = 12  # standard deviations; beyond them a normal has less than 1e-32


def saturation(sites: int, sigma: float) -> int:
    """The largest size of a coordinate before noise with which no sum can wrap.

    Args:
        sites: n, of which each adds one vector.
        sigma: Standard deviation of the noise that each adds, in steps of the grid.

    Raises:
        UnsafeNumbersError: The noise alone fills the 32 bits.
    """
    # Beyond float's 2^53 and at a sigma that is none, too.
    bound = (2**31 - 1) // sites - _NOISE_TAIL * sigma
    if not bound >= 1:
        raise UnsafeNumbersError(
            f"sigma = {sigma:g} steps: leaves no room in 32 bits for {sites} sites, expected less "
            f"than {(2**31 - 1) // sites / _NOISE_TAIL:g}; lower the block's scale"
        )
    return int(bound)


def quantise(
    values: np.ndarray, scale: float, bound: int, coins: Coins, *, in_place: bool = False
) -> np.ndarray:
    """Scales, saturates, rounds stochastically; the coins are the site's own and secret.

    A coordinate is rounded up with the probability of its fraction (to 2^-32), independently of
    the others, and is not drawn again. No finite value makes it fail, whatever the scale.

    Args:
        values: [d] float32 or float64.
        scale: Steps of the grid for one unit.
        bound: See `saturation`.
        coins: Give a key for each slice, of which come 32 bits for each coordinate.
        in_place: Whether the integers take the place of the values, which must be flat, writeable
            float32: it saves a second vector.

    Returns:
        [d] uint32: the integers modulo 2^32.

    Raises:
        ValueError: A value is not finite: it must be made so before the sum is clipped. Or the
            values cannot be overwritten.
    """
    flat = values.dtype == np.float32 and values.flags.c_contiguous and values.flags.writeable
    if in_place and not flat:
        raise ValueError(f"values: are {values.dtype}, must be flat, writeable float32 in place")
    words = values.view("<u4") if in_place else np.empty(len(values), dtype="<u4")
    if not all(over_slices(len(values), lambda part: bool(np.isfinite(values[part]).all()))):
        raise ValueError("values: are not all finite; zero the others before clipping")
    keys = [coins.words(4).tobytes() for _ in range(0, len(values), _SLICE)]

    def work(part: slice) -> None:
        own = Coins(keys[part.start // _SLICE])
        _quantise(values[part], scale, bound, own, words[part])

    over_slices(len(values), work, _SLICE)
    return words


def _quantise(
    values: np.ndarray, scale: float, bound: int, coins: Coins, words: np.ndarray
) -> None:
    room = np.empty((3, min(_BLOCK, len(values))))
    for start in range(0, len(values), _BLOCK):
        part = values[start : start + _BLOCK]
        scaled, below, draws = room[:, : len(part)]
        with np.errstate(over="ignore"):
            np.multiply(part, scale, out=scaled, dtype=np.float64)
        # First of all, and without a word: whether a value is beyond it is nobody's business.
        np.clip(scaled, -bound, bound, out=scaled)
        np.floor(scaled, out=below)
        scaled -= below  # the fraction, in [0, 1]
        halves = coins.words((len(part) + 1) // 2).view(np.uint32)
        np.multiply(halves[: len(part)], 2.0**-32, out=draws)
        below += draws < scaled
        words[start : start + _BLOCK].view(np.int32)[:] = below


def dequantise(total: np.ndarray, scale: float) -> np.ndarray:
    """[d] float64 of a sum modulo 2^32 of quantised vectors, which did not wrap.

    Raises:
        ValueError: The sum is no uint32 vector.
    """
    if total.dtype != np.dtype("<u4"):
        raise ValueError(f"total: is {total.dtype}, must be uint32")
    return total.view(np.int32) / np.float64(scale)
