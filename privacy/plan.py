"""A run is priced once: `plan()` fixes its noise and its epsilon before anything runs.

A run draws on two accounts. The keyed split puts a record on one side by the site's key and the
record alone, and cleaning maps records one by one; so adding or removing one record changes one
side by one record (or none, if cleaning drops it) and leaves the others as they were.
Where the unit is a person, read "person" for "record": all records of a person share a side.
Let the run's outputs be a training mechanism M_T of the training side and a hold-out mechanism M_H
of the hold-out side, in any interleaving, each of which may look at all earlier outputs. If the
record is on the training side, every release of M_H is a function of equal records and of earlier
outputs: post-processing, and the pair costs what M_T costs. If it is held out, the same with M_H.
If it is on the audit side, nothing changes. So with (epsilon_T, delta) for the one account and
(epsilon_H, delta) for the other, the run is (max(epsilon_T, epsilon_H), delta)-DP. That is what is
claimed; a record that ever changed its side would pay the sum, which the ledger refuses.
A person's records are all on one side, so that the same holds for the unit `person`. A site's are
on both: under the unit `site` there is one account, and every release is drawn from it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from ..config import COMPATIBILITY, ConfigError, EncryptionName, MechanismName, RunConfig, UnitName
from .accounting import (
    AccountingError,
    Releases,
    calibrate,
    cross_check,
    grids,
    pld_epsilon,
    pld_schedule,
)
from .secagg.errors import UnsafeNumbersError
from .secagg.terms import Numbers
from .shared_noise import slack

Side = Literal["training", "holdout"]
PartName = Literal["statistics", "rounds", "evaluations", "training_figures"]

_Beside = tuple[Releases, ...]
_SCHEDULE_POINTS = 32
# Of a round's budget, what it costs to learn how many updates were below the clipping norm.
_INDICATOR_SHARE = 0.1


@dataclass(frozen=True)
class Part:
    """Equal releases from one account.

    Attributes:
        name: What they are for.
        side: Whose records they are made from.
        each: What one commit in the ledger stands for.
        count: How many commits the run may make.
    """

    name: PartName
    side: Side
    each: Releases
    count: int


@dataclass(frozen=True)
class Plan:
    """Everything that a run's privacy rests on, so that no two of its parts can drift apart.

    Attributes:
        mechanism: Where noise is added.
        unit: What is hidden, under add-or-remove-one; a site, under zero-out.
        encryption: How replies travel.
        numbers: Of the secure sum; `None` where each reply is read by itself.
        against: Whom it is hidden from.
        target_epsilon: What was asked for, of the dearer account; `None` without a mechanism.
        epsilon: What the whole run costs, the larger of the two accounts, at most the target;
            `None` without a mechanism.
        training_epsilon: What it costs a training record.
        holdout_epsilon: What it costs a held-out record.
        delta: Of every price.
        clipping_norm: Sensitivity of a sum, at first where it adapts; infinity without a mechanism.
        adaptive: Whether the clipping norm follows a quantile of the sites' updates.
        noise_multiplier: Standard deviation of the noise over the clipping norm, of a round as a
            whole where that adapts (see `update_noise`).
        sampling_rate: Chance of a record, or of a person, to be in a step; true Poisson sampling.
        expected_batch: Expected records, or persons, a step by public numbers, the divisor of
            noised sums.
        rounds: Rounds of the run.
        releases_per_round: Noised sums of one record's data in a round.
        schedule: Cumulative epsilon of the training account after each round, [rounds]; empty
            without a mechanism.
        statistics: Rounds of statistics before the first of these: one, or none.
        statistics_noise: Standard deviation of their noise over their sensitivity.
        statistics_units: What one privacy unit may add to them, in records or persons.
        statistics_epsilon: What they cost by themselves; `None` without a mechanism.
        evaluations: How often the held-out records are summed over.
        evaluation_noise: Standard deviation of the noise of those sums over their sensitivity.
        evaluation_units: What one privacy unit may add to them, in records.
        evaluation_schedule: Cumulative epsilon of the hold-out account, [evaluations].
        figures_noise: As `evaluation_noise`, of sums over training records; 0 if none are made.
        accountant: Whose epsilon it is.
        second_opinions: Epsilon of the training account by other accountants.
        slack: Epsilon and delta that integer noise adds to a price of Gaussians; they are in it.
    """

    mechanism: MechanismName
    unit: UnitName
    encryption: EncryptionName
    numbers: Numbers | None
    against: str
    target_epsilon: float | None
    epsilon: float | None
    training_epsilon: float | None
    holdout_epsilon: float | None
    delta: float
    clipping_norm: float
    adaptive: bool
    noise_multiplier: float
    sampling_rate: float
    expected_batch: float
    rounds: int
    releases_per_round: int
    schedule: tuple[float, ...]
    statistics: int
    statistics_noise: float
    statistics_units: float
    statistics_epsilon: float | None
    evaluations: int
    evaluation_noise: float
    evaluation_units: float
    evaluation_schedule: tuple[float, ...]
    figures_noise: float
    accountant: str
    second_opinions: tuple[tuple[str, float], ...]
    slack: tuple[float, float]

    @property
    def noise_scale(self) -> float:
        """Standard deviation of the noise of a gradient sum; 0 without a mechanism."""
        return self.noise_multiplier * self.clipping_norm if self.noise_multiplier else 0.0

    @property
    def update_noise(self) -> float:
        """Noise multiplier of a round's sum itself: more than the round's where the norm adapts.

        Andrew et al. 2021, theorem 1: z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2).
        """
        return self.noise_multiplier / math.sqrt(1 - _INDICATOR_SHARE * self.adaptive)

    @property
    def indicator_noise(self) -> float:
        """Noise multiplier of the number of updates below the norm: 2 sigma_b, of halves."""
        return self.noise_multiplier / math.sqrt(_INDICATOR_SHARE)

    @property
    def shares_noise(self) -> bool:
        """Whether a site adds a share of the noise, for only the sum is seen."""
        return self.numbers is not None and self.mechanism in {"distributed", "site"}

    @property
    def honest(self) -> int:
        """Sites whose noise is surely in a sum, beside the colluders': n_min - t_collude."""
        return self.numbers.n_min - self.numbers.t_collude if self.numbers is not None else 1

    @property
    def excess(self) -> float:
        """How many times the accounted noise is in a sum to which every site has uploaded."""
        return self.numbers.excess(self.numbers.n) if self.numbers and self.shares_noise else 1.0

    @property
    def parts(self) -> tuple[Part, ...]:
        """All that the run may release, as the ledgers keep it."""
        # A site's update is made of all its records, whatever its own steps sample.
        rate = 1.0 if self.unit == "site" else self.sampling_rate
        step = Releases(self.noise_multiplier, rate, self.releases_per_round)
        parts = []
        if self.statistics:
            once = Releases(self.statistics_noise, 1.0, 1)
            parts.append(Part("statistics", "training", once, self.statistics))
        if self.rounds:
            parts.append(Part("rounds", "training", step, self.rounds))
        # The sums over records that are not sampled: all of a site's, every time.
        if self.evaluations:
            each = Releases(self.evaluation_noise, 1.0, 1)
            side: Side = "training" if self.unit == "site" else "holdout"
            parts.append(Part("evaluations", side, each, self.evaluations))
        if self.figures_noise:
            each = Releases(self.figures_noise, 1.0, 1)
            parts.append(Part("training_figures", "training", each, self.evaluations))
        return tuple(parts)

    def epsilon_after(self, rounds: int, evaluations: int = 0, statistics: int = 0) -> float | None:
        """Cumulative epsilon after so many releases; `None` without a mechanism.

        Raises:
            ValueError: More than were priced.
        """
        if not 0 <= rounds <= self.rounds:
            raise ValueError(f"rounds = {rounds}: must be 0 to the {self.rounds} that are priced")
        if not 0 <= evaluations <= self.evaluations:
            raise ValueError(
                f"evaluations = {evaluations}: must be 0 to the {self.evaluations} that are priced"
            )
        if not 0 <= statistics <= self.statistics:
            raise ValueError(
                f"statistics = {statistics}: must be 0 to the {self.statistics} that are priced"
            )
        if self.epsilon is None:
            return None
        training = self.statistics_epsilon or 0.0 if statistics else 0.0
        if rounds:
            training = self.schedule[rounds - 1]
        elif evaluations and (self.figures_noise or self.unit == "site"):
            # The schedule has the statistics and all training figures in each of its prices;
            # before the first round there is none to look up.
            training = self.schedule[0] if self.schedule else self.training_epsilon or 0.0
        if not evaluations or self.unit == "site":
            return training
        return max(training, self.evaluation_schedule[evaluations - 1])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: without the schedules, and with `None` for infinity."""
        values = asdict(self) | {
            "second_opinions": dict(self.second_opinions),
            "slack": dict(zip(("epsilon", "delta"), self.slack, strict=True)),
            "excess": self.excess,
        }
        del values["schedule"], values["evaluation_schedule"]
        return {k: None if v == math.inf else v for k, v in values.items()}


def plan(config: RunConfig) -> Plan:
    """Prices a whole run: the least noise whose cumulative epsilon ends at or below the target.

    Records are at one site each, so sites compose in parallel: under `central` and `distributed` a
    round is one release of the sum over all sites, under `local` a site's own releases are what a
    record is in. Noise is calibrated on a PLD grid of 1e-3 and the claim confirmed on 1e-4.

    Raises:
        ConfigError: The budget cannot be reached, or the secure sum's numbers are not safe.
        AccountingError: The accountants disagree: do not run.
    """
    return _plan(config.shared())


@lru_cache(maxsize=16)
def _plan(config: RunConfig) -> Plan:
    mechanism = config.privacy.mechanism
    none, of_sites = mechanism == "none", config.unit == "site"
    numbers = _numbers(config)
    over = _slack(config) if numbers and mechanism in {"distributed", "site"} else (0.0, 0.0)
    price = _NO_PRICE if none else _price(config, over)
    unpaid = none or not config.evaluations
    held_out = _NO_HOLDOUT if unpaid else _price_holdout(config, over)
    training = price.epsilon
    holdout = held_out.schedule[-1] if held_out.schedule and not of_sites else None
    targets = [config.privacy.epsilon] + [config.epsilon_holdout] * bool(config.evaluations)
    site_records = config.records / config.federation.sites
    return Plan(
        mechanism=mechanism,
        unit=config.unit,
        encryption=config.encryption,
        numbers=numbers,
        against=_against(config),
        target_epsilon=None if none else max(targets),
        epsilon=None if training is None else max(training, holdout or 0.0),
        training_epsilon=training,
        holdout_epsilon=holdout,
        delta=config.delta,
        clipping_norm=math.inf if none else config.privacy.clipping_norm,
        adaptive=config.privacy.clipping == "adaptive",
        noise_multiplier=price.noise_multiplier,
        sampling_rate=config.sampling_rate,
        expected_batch=config.sampling_rate * config.pool,
        rounds=config.rounds,
        releases_per_round=_releases_per_round(config),
        schedule=price.schedule,
        statistics=int(config.statistics_share > 0),
        statistics_noise=price.statistics_noise,
        statistics_units=max(1.0, config.trained / config.federation.sites) if of_sites else 1.0,
        statistics_epsilon=price.statistics_epsilon,
        evaluations=config.evaluations,
        evaluation_noise=held_out.noise_multiplier,
        evaluation_units=max(1.0, site_records * config.data.holdout) if of_sites else 1.0,
        evaluation_schedule=() if of_sites else held_out.schedule,
        figures_noise=price.figures_noise,
        accountant=price.accountant,
        second_opinions=price.second_opinions,
        slack=over,
    )


def _against(config: RunConfig) -> str:
    """Whom a run protects against, with its own numbers."""
    mechanism = config.privacy.mechanism
    if mechanism not in {"distributed", "site"}:
        return COMPATIBILITY[mechanism].against
    if config.encryption != "secagg":
        return "everyone, the server and the other sites included"
    colluding = config.secagg.t_collude
    return f"everyone: the server, and up to {colluding} of the other sites beside it"


def _numbers(config: RunConfig) -> Numbers | None:
    if config.encryption != "secagg":
        return None
    try:
        numbers = Numbers(
            config.federation.sites, config.threshold, config.n_min, config.secagg.t_collude
        )
        if config.privacy.mechanism in {"distributed", "site"}:
            numbers.noise_share(1.0)
    except UnsafeNumbersError as error:
        raise ConfigError(f"secagg: {error}") from None
    return numbers


def _slack(config: RunConfig) -> tuple[float, float]:
    """Of all blocks that a run may release: statistics, updates, who was in bounds, figures."""
    adaptive = config.privacy.clipping == "adaptive"
    most = 1 + (1 + adaptive) * config.rounds + 2 * config.evaluations
    dearest = max(config.privacy.epsilon, config.epsilon_holdout)
    try:
        over = slack(most, config.federation.sites, dearest)
    except ValueError:
        over = 0.0, 1.0
    if over[1] >= config.delta:
        option = "epsilon" if dearest == config.privacy.epsilon else "epsilon_holdout"
        raise ConfigError(
            f"privacy.{option} = {dearest:g}: is more than noise on integers can keep within "
            f"privacy.delta = {config.delta:g}; lower it"
        )
    return over


def _releases_per_round(config: RunConfig) -> int:
    """A site's whole update is one; else each of its steps is."""
    return 1 if config.unit == "site" else config.training.local_steps


@dataclass(frozen=True)
class _Price:
    noise_multiplier: float
    figures_noise: float
    statistics_noise: float
    statistics_epsilon: float | None
    epsilon: float | None
    schedule: tuple[float, ...]
    accountant: str
    second_opinions: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class _HoldoutPrice:
    noise_multiplier: float
    schedule: tuple[float, ...]


_NO_PRICE = _Price(0.0, 0.0, 0.0, None, None, (), "none", ())
_NO_HOLDOUT = _HoldoutPrice(0.0, ())


def _price(config: RunConfig, slack: tuple[float, float]) -> _Price:
    rounds, per_round = config.rounds, _releases_per_round(config)
    delta, epsilon = config.delta - slack[1], config.privacy.epsilon - slack[0]
    # A site's update is made of all its records; nothing is sampled that it could hide behind.
    rate = 1.0 if config.unit == "site" else config.sampling_rate
    figures = _figures(config, delta)
    statistics = _statistics(config, epsilon, delta, figures)
    if rounds:
        beside = figures + statistics
        releases = _calibrated("privacy.epsilon", rate, rounds * per_round, epsilon, delta, beside)
    else:
        (releases,), beside = statistics, figures
    coarse, fine = grids(epsilon)
    claimed = min(pld_epsilon(releases, delta, grid, beside) for grid in (coarse, fine))
    opinions = cross_check(releases, delta, claimed, beside)
    # Each of these prices takes 10 ms or more; between them a later one stands in, no lower.
    points = _points(rounds) if rounds else []
    steps = [point * per_round for point in points[:-1]]
    prices = pld_schedule(releases, delta, steps, coarse, beside) if steps else []
    return _Price(
        noise_multiplier=releases.noise_multiplier if rounds else 0.0,
        figures_noise=figures[0].noise_multiplier if config.evaluation.training_share else 0.0,
        statistics_noise=statistics[0].noise_multiplier if statistics else 0.0,
        statistics_epsilon=pld_epsilon(statistics[0], delta, fine) + slack[0]
        if statistics
        else 0.0,
        epsilon=claimed + slack[0],
        schedule=_fill(points, [price + slack[0] for price in (*prices, claimed)])
        if rounds
        else (),
        accountant="PLD",
        second_opinions=tuple(opinions.items()),
    )


def _statistics(config: RunConfig, epsilon: float, delta: float, figures: _Beside) -> _Beside:
    """The one release of statistics: of its share of the budget, or of all that figures leave."""
    share = config.statistics_share
    if not share:
        return ()
    if share == 1:
        return (_calibrated("privacy.epsilon", 1.0, 1, epsilon, delta, figures),)
    option = "privacy.statistics_share x privacy.epsilon"
    return (_calibrated(option, 1.0, 1, share * epsilon, delta),)


def _figures(config: RunConfig, delta: float) -> _Beside:
    """The figures that the training account pays for beside the rounds."""
    option, share = "privacy.epsilon", config.evaluation.training_share * config.privacy.epsilon
    if config.unit == "site" and config.evaluations:
        option, share = "privacy.epsilon_holdout", config.epsilon_holdout
    return (_calibrated(option, 1.0, config.evaluations, share, delta),) if share else ()


def _calibrated(
    option: str, rate: float, count: int, epsilon: float, delta: float, beside: _Beside = ()
) -> Releases:
    try:
        return calibrate(rate, count, epsilon, delta, beside)
    except AccountingError as error:
        raise ConfigError(str(error).replace("privacy.epsilon", option)) from None


def _price_holdout(config: RunConfig, slack: tuple[float, float]) -> _HoldoutPrice:
    count, delta = config.evaluations, config.delta - slack[1]
    epsilon = config.epsilon_holdout - (0.0 if config.unit == "site" else slack[0])
    releases = _calibrated("privacy.epsilon_holdout", 1.0, count, epsilon, delta)
    coarse, fine = grids(epsilon)
    claimed = min(pld_epsilon(releases, delta, grid) for grid in (coarse, fine))
    cross_check(releases, delta, claimed)
    points = _points(count)
    prices = pld_schedule(releases, delta, points[:-1], coarse)
    schedule = _fill(points, [price + slack[0] for price in (*prices, claimed)])
    return _HoldoutPrice(releases.noise_multiplier, schedule)


def _points(rounds: int) -> list[int]:
    """The rounds after which a long run is priced exactly: at most 32, the last among them."""
    step = math.ceil(rounds / _SCHEDULE_POINTS)
    return sorted({rounds, *range(step, rounds + 1, step)})


def _fill(points: Sequence[int], prices: Sequence[float]) -> tuple[float, ...]:
    """A price for every round: between two points the later one's, which is an upper bound."""
    schedule: list[float] = []
    for point, price in zip(points, prices, strict=True):
        schedule += [min(price, prices[-1])] * (point - len(schedule))
    return tuple(schedule)
