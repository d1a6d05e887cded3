"""Where noise is added. One row a mechanism; each is two hooks of one shape."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..config import MechanismName
from .noise import Coins
from .plan import Plan

Arrays = dict[str, np.ndarray]
_LATTICE_BITS = 20
Hook = Callable[[Mapping[str, np.ndarray], float, Coins], Arrays]


def add_noise(total: Mapping[str, np.ndarray], scale: float, coins: Coins) -> Arrays:
    """Adds Gaussian noise of standard deviation `scale` to a sum of bounded contributions.

    Formal guarantee: of a sum of L2 sensitivity `scale` / noise multiplier, over the Poisson sample
    or the records that a plan says, the result is one of the releases that the plan is priced for:
    `plan.noise_scale` for a clipped gradient sum, `metrics.noise_scale` for a sum of figures. The
    noise is added in float64 and the result rounded to a public lattice of 2^-20 of its scale, so
    that the low-order bits, which would tell one sum from another (Mironov 2012), are gone; what
    follows is post-processing. It assumes that the sampler's float64 normals are as good as real
    ones down to that lattice.

    Raises:
        ValueError: There is no noise, or the sum is not finite.
    """
    if not (0 < scale < math.inf):
        raise ValueError(f"noise of standard deviation {scale}: must be > 0 and finite")
    if not all(np.isfinite(array).all() for array in total.values()):
        raise ValueError("sum: is not finite; it must be clipped before noise is added")
    # A power of two, so that dividing and multiplying by it are exact.
    lattice = 2.0 ** (math.floor(math.log2(scale)) - _LATTICE_BITS)
    noised = {name: array + coins.gaussian(array.shape, scale) for name, array in total.items()}
    released = {name: np.rint(array / lattice) * lattice for name, array in noised.items()}
    if not all(np.isfinite(array).all() for array in released.values()):
        raise ValueError(f"noise of standard deviation {scale}: the result is not finite")
    return released


def add_nothing(total: Mapping[str, np.ndarray], scale: float, coins: Coins) -> Arrays:
    """The hook of whoever adds no noise."""
    del scale, coins
    return dict(total)


@dataclass(frozen=True)
class Mechanism:
    """Two hooks on a sum of bounded contributions.

    Attributes:
        at_site: What a site does to its own sum before it leaves.
        at_server: What the server does to the sum over all sites before it is used.
        noise_per_site: Whether the sum then has the noise of each site in it, not one noise.
    """

    at_site: Hook
    at_server: Hook
    noise_per_site: bool = False


# The noise comes as integers, when the sum is put on the grid of the secure sum (`vector.words`).
SHARED = Mechanism(at_site=add_nothing, at_server=add_nothing)

MECHANISMS: Mapping[MechanismName, Mechanism] = {
    "distributed": SHARED,
    "central": Mechanism(at_site=add_nothing, at_server=add_noise),
    "local": Mechanism(at_site=add_noise, at_server=add_nothing, noise_per_site=True),
    "site": Mechanism(at_site=add_noise, at_server=add_nothing, noise_per_site=True),
    "none": Mechanism(at_site=add_nothing, at_server=add_nothing),
}


def mechanism_of(plan: Plan) -> Mechanism:
    """The hooks in force: of `site`, all of the noise at each site or, in a secure sum, shares."""
    return SHARED if plan.shares_noise else MECHANISMS[plan.mechanism]
