"""A run is priced once: `plan()` fixes its noise and its epsilon before anything runs."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from ..config import COMPATIBILITY, ConfigError, MechanismName, RunConfig, UnitName
from .accounting import (
    AccountingError,
    calibrate,
    cross_check,
    grids,
    pld_epsilon,
    pld_schedule,
)

_SCHEDULE_POINTS = 64


@dataclass(frozen=True)
class Plan:
    """Everything that a run's privacy rests on, so that no two of its parts can drift apart.

    Attributes:
        mechanism: Where noise is added.
        unit: What is hidden, under add-or-remove-one.
        against: Whom it is hidden from.
        target_epsilon: What was asked for; `None` without a mechanism.
        epsilon: What the whole run costs, at most the target; `None` without a mechanism.
        delta: Of every price.
        clipping_norm: Sensitivity of a sum; infinity without a mechanism.
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        sampling_rate: Chance of a record to be in a step; true Poisson sampling.
        expected_batch: Expected records a step by public numbers, the divisor of noised sums.
        rounds: Rounds of the run.
        releases_per_round: Noised sums of one record's data in a round.
        schedule: Cumulative epsilon after each round, [rounds]; empty without a mechanism.
        accountant: Whose epsilon it is.
        second_opinions: Epsilon by other accountants.
    """

    mechanism: MechanismName
    unit: UnitName
    against: str
    target_epsilon: float | None
    epsilon: float | None
    delta: float
    clipping_norm: float
    noise_multiplier: float
    sampling_rate: float
    expected_batch: float
    rounds: int
    releases_per_round: int
    schedule: tuple[float, ...]
    accountant: str
    second_opinions: tuple[tuple[str, float], ...]

    def epsilon_after(self, rounds: int) -> float | None:
        """Cumulative epsilon after so many rounds; `None` without a mechanism.

        Raises:
            ValueError: More rounds than were priced.
        """
        if not 0 <= rounds <= self.rounds:
            raise ValueError(f"rounds = {rounds}: must be 0 to the {self.rounds} that are priced")
        if self.epsilon is None:
            return None
        return self.schedule[rounds - 1] if rounds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: without the schedule, and with `None` for infinity."""
        values = asdict(self) | {"second_opinions": dict(self.second_opinions)}
        del values["schedule"]
        return {k: None if v == math.inf else v for k, v in values.items()}


@lru_cache(maxsize=16)
def plan(config: RunConfig) -> Plan:
    """Prices a whole run: the least noise whose cumulative epsilon ends at or below the target.

    Records are at one site each, so sites compose in parallel: under `central` a round is one
    release of the sum over all sites, under `local` a site's own releases are what a record is in.
    Noise is calibrated on a PLD grid of 1e-3 and the claim confirmed on 1e-4.

    Raises:
        ConfigError: The budget cannot be reached.
        AccountingError: The accountants disagree: do not run.
    """
    mechanism = config.privacy.mechanism
    price = _NO_PRICE if mechanism == "none" else _price(config)
    return Plan(
        mechanism=mechanism,
        unit=config.privacy.unit,
        against=COMPATIBILITY[mechanism].against,
        target_epsilon=None if mechanism == "none" else config.privacy.epsilon,
        epsilon=price.schedule[-1] if price.schedule else None,
        delta=config.delta,
        clipping_norm=math.inf if mechanism == "none" else config.privacy.clipping_norm,
        noise_multiplier=price.noise_multiplier,
        sampling_rate=config.sampling_rate,
        expected_batch=config.sampling_rate * config.pool,
        rounds=config.federation.rounds,
        releases_per_round=config.training.local_steps,
        schedule=price.schedule,
        accountant=price.accountant,
        second_opinions=price.second_opinions,
    )


@dataclass(frozen=True)
class _Price:
    noise_multiplier: float
    schedule: tuple[float, ...]
    accountant: str
    second_opinions: tuple[tuple[str, float], ...]


_NO_PRICE = _Price(0.0, (), "none", ())


def _price(config: RunConfig) -> _Price:
    rounds, per_round = config.federation.rounds, config.training.local_steps
    delta = config.delta
    try:
        releases = calibrate(
            config.sampling_rate, rounds * per_round, config.privacy.epsilon, delta
        )
    except AccountingError as error:
        raise ConfigError(str(error)) from None
    coarse, fine = grids(config.privacy.epsilon)
    claimed = min(pld_epsilon(releases, delta, fine), pld_epsilon(releases, delta, coarse))
    opinions = cross_check(releases, delta, claimed)
    # Pricing 64 rounds takes a second; between them a later price stands in, which is no lower.
    points = _points(rounds)
    prices = pld_schedule(releases, delta, [point * per_round for point in points[:-1]], coarse)
    return _Price(
        noise_multiplier=releases.noise_multiplier,
        schedule=_fill(points, [*prices, claimed]),
        accountant="PLD",
        second_opinions=tuple(opinions.items()),
    )


def _points(rounds: int) -> list[int]:
    """The rounds after which a long run is priced exactly: at most 64, the last among them."""
    step = math.ceil(rounds / _SCHEDULE_POINTS)
    return sorted({rounds, *range(step, rounds + 1, step)})


def _fill(points: Sequence[int], prices: Sequence[float]) -> tuple[float, ...]:
    """A price for every round: between two points the later one's, which is an upper bound."""
    schedule: list[float] = []
    for point, price in zip(points, prices, strict=True):
        schedule += [min(price, prices[-1])] * (point - len(schedule))
    return tuple(schedule)
