"""What a run costs: `DpEvent`s say what ran, accountants price them.

All three accountants are for the add-or-remove-one relation and for Poisson sampling, which is
what the code does. The claim is the PLD's (Koskela et al. 2020; Doroshenko et al. 2022, whose
pessimistic discretisation makes it an upper bound). Opacus's PRV (Gopi et al. 2021) and RDP
(Mironov et al. 2019) are second opinions.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting.pld import privacy_loss_distribution

from ..config import FedveilError

# Opacus's PRV bounds its domain by RDP and warns of an order that it does not use for the price.
warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)

COARSE_GRID = 1e-3
"""Grid to search on; `grids` widens both for an epsilon above 10, where they would take minutes."""

FINE_GRID = 1e-4


_LEAST_NOISE, _MOST_NOISE = 0.02, 1e4

FILTER_ORDERS = (2, 3, 4, 6, 10, 16, 32, 64)
"""Renyi orders of an account that is kept in RDP; few, for each takes its part of delta."""

_EVENTS: Mapping[str, tuple[type[dp_accounting.DpEvent], tuple[str, ...]]] = {
    "Gaussian": (dp_accounting.GaussianDpEvent, ("noise_multiplier",)),
    "PoissonSampled": (dp_accounting.PoissonSampledDpEvent, ("sampling_probability", "event")),
    "SelfComposed": (dp_accounting.SelfComposedDpEvent, ("event", "count")),
    "NonPrivate": (dp_accounting.NonPrivateDpEvent, ()),
}


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
        """What runs, in the accountants' language; without noise it is not private."""
        if self.noise_multiplier == 0:
            return dp_accounting.NonPrivateDpEvent()
        one = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        if self.sampling_rate < 1:
            one = dp_accounting.PoissonSampledDpEvent(self.sampling_rate, one)
        return dp_accounting.SelfComposedDpEvent(one, self.count)


def event_to_plain(event: dp_accounting.DpEvent) -> dict[str, Any]:
    """An event as plain values, as a ledger keeps it.

    Raises:
        AccountingError: It is of a kind that never runs here.
    """
    kind = next((name for name, (made, _) in _EVENTS.items() if type(event) is made), None)
    if kind is None:
        raise AccountingError(f"event: {event} is none that is accounted for")
    values = {field: getattr(event, field) for field in _EVENTS[kind][1]}
    if "event" in values:
        values["event"] = event_to_plain(values["event"])
    return {"kind": kind, **values}


def event_from_plain(plain: Mapping[str, Any]) -> dp_accounting.DpEvent:
    """Reads what `event_to_plain` made.

    Raises:
        AccountingError: It is no such event.
    """
    try:
        made, fields = _EVENTS[plain["kind"]]
        if plain.keys() != {"kind", *fields}:
            raise KeyError
        values = {field: plain[field] for field in fields}
    except (KeyError, TypeError, AttributeError):
        raise AccountingError(f"event: {plain!r} is none that is accounted for") from None
    if "event" in values:
        values["event"] = event_from_plain(values["event"])
    sound = (
        _is_number(values.get("noise_multiplier", 1.0), 0, 1e9)
        and _is_number(values.get("sampling_probability", 1.0), 0, 1)
        and type(values.get("count", 1)) is int
        and 1 <= values.get("count", 1) <= 2**53
    )
    if not sound:
        raise AccountingError(f"event: {plain!r} has numbers that none can have")
    return made(**values)


def _is_number(value: object, above: float, at_most: float) -> bool:
    return type(value) in {int, float} and above < value <= at_most  # type: ignore[operator]


def events_epsilon(
    events: Mapping[dp_accounting.DpEvent, int], delta: float, about: float
) -> float | None:
    """Epsilon of releases that were fixed beforehand, by dp-accounting's own PLD accountant.

    Args:
        events: How often each event runs.
        delta: Of the price.
        about: What it should be, which the grids are chosen for.

    Returns:
        The smaller of the bounds on our two grids; `None` if an event has no noise.
    """
    return _events_epsilon(frozenset(events.items()), delta, about)


@lru_cache(maxsize=64)  # the sites of one run all reserved the same
def _events_epsilon(
    counts: frozenset[tuple[dp_accounting.DpEvent, int]], delta: float, about: float
) -> float | None:
    events = dict(counts)
    if dp_accounting.NonPrivateDpEvent() in events:
        return None
    prices = []
    for grid in grids(about):
        accountant = dp_accounting.pld.PLDAccountant(
            dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, grid
        )
        for event, count in events.items():
            accountant.compose(event, count)
        prices.append(float(accountant.get_epsilon(delta)))
    return min(prices)


def filter_epsilon(events: Mapping[dp_accounting.DpEvent, int], delta: float) -> float:
    """Epsilon of releases that were chosen adaptively, by a Renyi filter.

    Formal guarantee: if runs go on only while this stays at or below a limit that was fixed
    beforehand, everything together is (limit, delta)-DP, whatever later runs took from the outcomes
    of earlier ones. For one order that is the filter of Feldman and Zrnic (2021, theorem 3.1;
    Lecuyer 2021, section 3). Of K orders, each has delta / K: sort the outcomes by the first order
    that is within the limit at the end; in each sort the filter of that order alone would have let
    the same runs pass, so P(S and sort) <= e^limit Q(S and sort) + delta / K, and these add up.

    Args:
        events: How often each event ran, or may still run.
        delta: Of the whole account.
    """
    total = sum(count * _renyi(event) for event, count in events.items() if count)
    if not np.any(total):
        return 0.0
    if not np.isfinite(total).any():
        return math.inf
    with _quiet_absl():
        epsilon, _ = dp_accounting.rdp.compute_epsilon(
            FILTER_ORDERS, total, delta / len(FILTER_ORDERS)
        )
    return float(epsilon)


@lru_cache(maxsize=1024)  # an account is added up anew for each of its runs
def _renyi(event: dp_accounting.DpEvent) -> np.ndarray:
    """Renyi divergences of one event at the filter's orders."""
    accountant = dp_accounting.rdp.RdpAccountant(
        FILTER_ORDERS, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    return np.asarray(accountant.compose(event).rdp)


def grids(epsilon: float) -> tuple[float, float]:
    """The grids to search and to confirm on: 1e-3 and 1e-4 up to epsilon 10, then in proportion."""
    wider = max(1.0, epsilon / 10)
    return COARSE_GRID * wider, FINE_GRID * wider


def pld_schedule(
    releases: Releases,
    delta: float,
    after: Sequence[int],
    grid: float = COARSE_GRID,
    beside: Sequence[Releases] = (),
) -> list[float]:
    """Cumulative epsilon after so many of the releases, by privacy loss distributions.

    Args:
        releases: What runs.
        delta: The delta of every price.
        after: Numbers of releases.
        grid: Discretisation of the privacy loss; finer is tighter and slower.
        beside: Other releases from the same account, all of them in every price.

    Returns:
        An upper bound for each number of releases.
    """
    one = _loss_distribution(releases, grid)
    others = [_loss_distribution(other, grid).self_compose(other.count) for other in beside]
    return [
        float(
            reduce(lambda a, b: a.compose(b), others, one.self_compose(n)).get_epsilon_for_delta(
                delta
            )
        )
        for n in after
    ]


def _loss_distribution(releases: Releases, grid: float) -> Any:  # noqa: ANN401
    return privacy_loss_distribution.from_gaussian_mechanism(
        releases.noise_multiplier,
        sampling_prob=releases.sampling_rate,
        value_discretization_interval=grid,
        neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


@lru_cache(maxsize=256)  # a search ends with prices that are then claimed
def pld_epsilon(
    releases: Releases,
    delta: float,
    grid: float = COARSE_GRID,
    beside: tuple[Releases, ...] = (),
) -> float:
    """Epsilon of all releases together."""
    return pld_schedule(releases, delta, [releases.count], grid, beside)[0]


def rdp_epsilon(releases: Releases, delta: float, beside: Sequence[Releases] = ()) -> float:
    """Epsilon by Renyi DP at integer orders: valid, and looser than the PLD."""
    # Integer orders only: fractional ones converge badly at high sampling rates, and gain little.
    orders = [*range(2, 64), 80, 96, 128, 192, 256, 512, 1024]
    accountant = dp_accounting.rdp.RdpAccountant(
        orders, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    )
    with _quiet_absl():
        for part in (releases, *beside):
            accountant.compose(part.event)
        return float(accountant.get_epsilon(delta))


def prv_epsilon(
    releases: Releases, delta: float, error: float = 0.01, beside: Sequence[Releases] = ()
) -> float:
    """Epsilon by Opacus's numerical composition of privacy random variables.

    It is the upper end of an interval of half-width `error`.
    """
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [
        (part.noise_multiplier, part.sampling_rate, part.count) for part in (releases, *beside)
    ]
    with np.errstate(all="ignore"):
        return float(accountant.get_epsilon(delta, eps_error=error))


def cross_check(
    releases: Releases, delta: float, claimed: float, beside: Sequence[Releases] = ()
) -> dict[str, float]:
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
    opinions = {
        "rdp": rdp_epsilon(releases, delta, beside),
        "prv": prv_epsilon(releases, delta, error, beside),
    }
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


def calibrate(
    sampling_rate: float,
    count: int,
    epsilon: float,
    delta: float,
    beside: tuple[Releases, ...] = (),
) -> Releases:
    """The releases of least noise that end, with those beside them, at or below epsilon.

    Raises:
        AccountingError: No noise multiplier up to 10^4 reaches it.
    """
    coarse, fine = grids(epsilon)

    def price(noise_multiplier: float, grid: float) -> float:
        return pld_epsilon(Releases(noise_multiplier, sampling_rate, count), delta, grid, beside)

    start = _guess(sampling_rate, count, epsilon, delta)
    found = _least(lambda noise: price(noise, coarse), epsilon, start, 5e-4)
    if found is None:
        raise AccountingError(
            f"privacy.epsilon = {epsilon:g}: cannot be reached with {count} releases at "
            f"sampling rate {sampling_rate:g}; raise epsilon or lower federation.rounds"
        )
    # The coarse grid errs on the safe side, and in runs of thousands of releases by much.
    if price(found, fine) > epsilon * (1 - 5e-3):
        return Releases(found, sampling_rate, count)
    finer = _least(lambda noise: price(noise, fine), epsilon, found, 5e-3)
    return Releases(found if finer is None else finer, sampling_rate, count)


def _guess(sampling_rate: float, count: int, epsilon: float, delta: float) -> float:
    """About the noise multiplier that is sought, by the central limit (Bu et al. 2020, section 4).

    Only where the search begins: what it ends with has been priced.
    """
    # delta of a Gaussian mechanism of mean mu falls in 1 / mu (Balle and Wang 2018, theorem 8).
    low, high = 1e-6, 1e3
    for _ in range(60):
        mu = math.sqrt(low * high)
        above = _gaussian_delta(mu, epsilon) > delta
        low, high = (low, mu) if above else (mu, high)
    # Within what can be squared: a rate of 1e-160 is allowed, if of no use.
    growth = max(1e-12, min(1e12, low / sampling_rate)) ** 2 / count
    # Without sampling it is exact: the releases together are one Gaussian mechanism.
    square = growth if sampling_rate == 1 else math.log1p(growth)
    return min(_MOST_NOISE, max(_LEAST_NOISE, 1 / math.sqrt(square)))


def _gaussian_delta(mu: float, epsilon: float) -> float:
    def tail(x: float) -> float:
        return math.erfc(x / math.sqrt(2)) / 2

    far = epsilon / mu + mu / 2
    # e^epsilon tail(far) in logs, for an epsilon beyond what exp can take.
    weighted = math.exp(epsilon + math.log(tail(far))) if tail(far) else 0.0
    return tail(epsilon / mu - mu / 2) - weighted


def _least(
    price: Callable[[float], float], epsilon: float, start: float, width: float
) -> float | None:
    """The least noise whose price is at most epsilon, to a relative `width`; that one is priced.

    Prices fall with noise, nearly as a power of it. So each guess is that power's through the two
    ends known; it is tried with half the width more and less, so that both ends close in on it.
    The middle comes last, so that every turn at least halves what is left.

    Returns:
        The noise multiplier; `None` if none up to 10^4 is enough.
    """
    # From the side of much noise: small noise makes wide, slow distributions.
    high, at_high = start, price(start)
    while at_high > epsilon:
        if high >= _MOST_NOISE:
            return None
        high = min(_MOST_NOISE, high * min(2.0, 1.01 * at_high / epsilon))
        at_high = price(high)
    low, at_low = high, at_high
    while at_low <= epsilon:
        if low < _LEAST_NOISE or not at_low:  # nothing costs less than nothing
            return low
        high, at_high = low, at_low
        low /= min(2.0, 1.01 * epsilon / at_low)
        at_low = price(low)
    while high > low * (1 + width):
        between = math.sqrt(low * high)
        if at_high and at_low < math.inf:
            slope = math.log(at_high / at_low) / math.log(high / low)
            between = low * (epsilon / at_low) ** (1 / slope)
        for noise in (between * (1 + width / 2), between * (1 - width / 2), math.sqrt(low * high)):
            if low < noise < high:
                found = price(noise)
                low, at_low, high, at_high = (
                    (low, at_low, noise, found)
                    if found <= epsilon
                    else (noise, found, high, at_high)
                )
            if high <= low * (1 + width):
                break
    return high


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
