"""What a run costs: `DpEvent`s say what ran, accountants price them.

All three accountants are for the add-or-remove-one relation and for Poisson sampling, which is
what the code does. The claim is the PLD's (Koskela et al. 2020; Doroshenko et al. 2022, whose
pessimistic discretisation makes it an upper bound). Opacus's PRV (Gopi et al. 2021) and RDP
(Mironov et al. 2019) are second opinions.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import dp_accounting
import numpy as np
from dp_accounting.pld import privacy_loss_distribution

from ..config import FedveilError

# Opacus's PRV bounds its domain by RDP and warns of an order that it does not use for the price.
warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)

COARSE_GRID = 1e-3
"""Grid to search on; `grids` widens both for an epsilon above 10, where they would take minutes."""

FINE_GRID = 1e-4


class AccountingError(FedveilError):
    """A price that cannot be trusted, or cannot be had."""


@dataclass(frozen=True)
class Releases:
    """Equal releases, `count` of them.

    Each is a sum over a Poisson sample of rate `sampling_rate`, with Gaussian noise of
    `noise_multiplier` times its sensitivity.
    """

    noise_multiplier: float
    sampling_rate: float
    count: int

    @property
    def event(self) -> dp_accounting.DpEvent:
        """What runs, in the accountants' language."""
        one = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        if self.sampling_rate < 1:
            one = dp_accounting.PoissonSampledDpEvent(self.sampling_rate, one)
        return dp_accounting.SelfComposedDpEvent(one, self.count)


def grids(epsilon: float) -> tuple[float, float]:
    """The grids to search and to confirm on: 1e-3 and 1e-4 up to epsilon 10, then in proportion."""
    wider = max(1.0, epsilon / 10)
    return COARSE_GRID * wider, FINE_GRID * wider


def pld_schedule(
    releases: Releases, delta: float, after: Sequence[int], grid: float = COARSE_GRID
) -> list[float]:
    """Cumulative epsilon after so many of the releases, by privacy loss distributions.

    Args:
        releases: What runs.
        delta: The delta of every price.
        after: Numbers of releases.
        grid: Discretisation of the privacy loss; finer is tighter and slower.

    Returns:
        An upper bound for each number of releases.
    """
    one = privacy_loss_distribution.from_gaussian_mechanism(
        releases.noise_multiplier,
        sampling_prob=releases.sampling_rate,
        value_discretization_interval=grid,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )
    return [float(one.self_compose(n).get_epsilon_for_delta(delta)) for n in after]


def pld_epsilon(releases: Releases, delta: float, grid: float = COARSE_GRID) -> float:
    """Epsilon of all releases together."""
    return pld_schedule(releases, delta, [releases.count], grid)[0]


def rdp_epsilon(releases: Releases, delta: float) -> float:
    """Epsilon by Renyi DP at integer orders: valid, and looser than the PLD."""
    # Integer orders only: fractional ones converge badly at high sampling rates, and gain little.
    orders = [*range(2, 64), 80, 96, 128, 192, 256, 512, 1024]
    accountant = dp_accounting.rdp.RdpAccountant(
        orders, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    with _quiet_absl():
        return float(accountant.compose(releases.event).get_epsilon(delta))


def prv_epsilon(releases: Releases, delta: float, error: float = 0.01) -> float:
    """Epsilon by Opacus's numerical composition of privacy random variables.

    It is the upper end of an interval of half-width `error`.
    """
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(releases.noise_multiplier, releases.sampling_rate, releases.count)]
    with np.errstate(all="ignore"):
        return float(accountant.get_epsilon(delta, eps_error=error))


def cross_check(releases: Releases, delta: float, claimed: float) -> dict[str, float]:
    """Second opinions on a claimed epsilon.

    The known gaps: PRV lies within twice its asked-for error (2 % of epsilon, between 0.001 and
    0.01) and 1 % of the PLD; RDP is not below it by more than that, for it is the looser bound.

    Returns:
        Epsilon by accountant.

    Raises:
        AccountingError: They disagree beyond their known gaps: do not run.
    """
    if not 0 <= claimed < math.inf:
        raise AccountingError(f"PLD: epsilon {claimed} for {releases} is no price")
    error = min(0.01, max(0.001, 0.02 * claimed))
    opinions = {"rdp": rdp_epsilon(releases, delta), "prv": prv_epsilon(releases, delta, error)}
    tolerance = 2 * error + 0.01 * claimed
    if not abs(opinions["prv"] - claimed) <= tolerance:
        raise AccountingError(
            f"accountants disagree: PLD {claimed:.4f}, PRV {opinions['prv']:.4f} for {releases}"
        )
    if not opinions["rdp"] >= claimed - tolerance:
        raise AccountingError(
            f"accountants disagree: PLD {claimed:.4f}, RDP {opinions['rdp']:.4f} for {releases}"
        )
    return opinions


def calibrate(sampling_rate: float, count: int, epsilon: float, delta: float) -> Releases:
    """The releases of least noise that end at or below epsilon.

    Raises:
        AccountingError: No noise multiplier up to 10^4 reaches it.
    """
    coarse, fine = grids(epsilon)

    def price(noise_multiplier: float, grid: float = coarse) -> float:
        return pld_epsilon(Releases(noise_multiplier, sampling_rate, count), delta, grid)

    # Bracket from the side of much noise: small noise makes wide, slow distributions.
    high = 1.0
    while price(high) > epsilon:
        high *= 2
        if high > 1e4:
            raise AccountingError(
                f"privacy.epsilon = {epsilon:g}: cannot be reached with {count} releases at "
                f"sampling rate {sampling_rate:g}; raise epsilon or lower federation.rounds"
            )
    low = high / 2
    while low > 0.05 and price(low) <= epsilon:
        high, low = low, low / 2
    while high - low > 1e-4 * high:
        middle = (high + low) / 2
        low, high = (low, middle) if price(middle) <= epsilon else (middle, high)
    # The coarse grid errs on the safe side, and in runs of thousands of releases by much.
    low = high * price(high, fine) / epsilon
    while high - low > 5e-3 * high:
        middle = (high + low) / 2
        low, high = (low, middle) if price(middle, fine) <= epsilon else (middle, high)
    return Releases(high, sampling_rate, count)


@contextmanager
def _quiet_absl() -> Iterator[None]:
    """dp_accounting logs each order that it leaves out, which is its right."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
