"""Reals on an integer grid: what is summed modulo 2^32.

Formal guarantee (`quantise`): with the same coins, two vectors whose scaled difference has L2 norm
D give integers whose difference has at most D + sqrt(d), whatever the coins are. For each
coordinate is rounded by one non-decreasing function with steps of one at distances of one, and a
clamp brings values no further apart.
"""

import numpy as np

from ..noise import Coins
from .errors import UnsafeNumbersError

_BLOCK = 1 << 15  # coordinates at a time: the scratch stays in cache
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


def quantise(values: np.ndarray, scale: float, bound: int, coins: Coins) -> np.ndarray:
    """Scales, rounds stochastically, saturates; the coins are the site's own and secret.

    A coordinate is rounded up with the probability of its fraction (to 2^-32), independently of
    the others, and is not drawn again.

    Args:
        values: [d] float32 or float64.
        scale: Steps of the grid for one unit.
        bound: See `saturation`.
        coins: Half a word for each coordinate.

    Returns:
        [d] uint32: the integers modulo 2^32.

    Raises:
        ValueError: A value is not finite: it must be made so before the sum is clipped.
    """
    words = np.empty(len(values), dtype="<u4")
    for start in range(0, len(values), _BLOCK):
        scaled = values[start : start + _BLOCK] * np.float64(scale)
        if not np.isfinite(scaled).all():
            raise ValueError("values: are not all finite; zero the others before clipping")
        below = np.floor(scaled)
        scaled -= below  # the fraction, in [0, 1]
        draws = coins.words((len(scaled) + 1) // 2).view(np.uint32)[: len(scaled)]
        below += draws * 2.0**-32 < scaled
        np.clip(below, -bound, bound, out=below)
        words[start : start + _BLOCK].view(np.int32)[:] = below
    return words


def dequantise(total: np.ndarray, scale: float) -> np.ndarray:
    """[d] float64 of a sum modulo 2^32 of quantised vectors, which did not wrap."""
    return total.view(np.int32) / np.float64(scale)
