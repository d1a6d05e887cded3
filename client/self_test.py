"""The self-test of the mechanism: a round's own code on a synthetic module and public records.

Everything but coins is known beforehand, so that what comes out can be held against what the plan
claims (`privacy.conformance`). Two trials go through the same code: one with the plan's own noise,
and one with so little of it that clipping and sampling are seen sharply. What is tried is the sum
of gradients, or a site's update, and of a run with statistics (`statistics_test`) theirs: the noise
of evaluations and of an adapting norm's indicator, and what a server does with a sum, are not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..config import FedveilError, RunConfig
from ..models import Batch
from ..models.family import Family
from ..models.state import Arrays
from ..privacy import vector
from ..privacy.books import order
from ..privacy.clipping import CLIPPING_SLACK, clipped_sum
from ..privacy.conformance.claim import Check, Claim, Observed, Shares
from ..privacy.conformance.verdict import ALARM, Outcome, Verdict, judge, sizes
from ..privacy.ledger import Ledger
from ..privacy.limits import Lifetime
from ..privacy.mechanism import mechanism_of
from ..privacy.noise import Coins
from ..privacy.plan import Plan
from .site import Side
from .training import clipped_update, gradient_sum

STEPS = 30
# Coordinates without records, over all steps, in the trial of the noise (they show noise x 0.99),
# and in the other one, where each costs as much as a coordinate of every record's gradient.
_NOISES, _FEW_NOISES = 120_000, 15_000
_LITTLE = 0.02  # noise multiplier of the trial of clipping and sampling, at most
_GAIN = 1000.0  # clipping norms that a record's gradient is long
_OF_A_PERSON = 2  # records: one more than if a record were what is clipped and sampled
# At most so many records, and so many sampled over all steps: of a rate very near to 0 or 1, which
# takes more, the test is inconclusive.
_MOST_RECORDS, _MOST_SAMPLED = 1 << 22, 100_000
# Least clipping norm of a trial: a lesser one takes a finer grid than 32 bits have for its width.
_LEAST_NORM = 1e-4
# Checks whose sharpness is the first trial's business.
_SCALES = {"noise", "accounted noise", "share"}
_Committed = Mapping[str, tuple[int, ...]]


class ConformanceError(FedveilError):
    """The mechanism is not what the plan claims: do not run."""


@dataclass(frozen=True)
class Tested:
    """What the self-test found.

    Attributes:
        noise: Of the trial with the plan's own noise.
        records: Of the trial in which clipping and sampling are seen.
    """

    noise: Verdict
    records: Verdict

    @property
    def outcome(self) -> Outcome:
        """Violated if either is; what noise drowns in the one, the other sees."""
        if "violated" in {self.noise.outcome, self.records.outcome}:
            return "violated"
        weak = (_SCALES & {*self.noise.weak}) | ({*self.records.weak} - _SCALES)
        return "inconclusive" if weak else "consistent"

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(dict.fromkeys((*self.noise.failed, *self.records.failed)))

    @property
    def checks(self) -> tuple[Check, ...]:
        """All that count: each of the trial that sees what it is for, and all that failed."""
        # What is debited is the same for both.
        skipped = {"ledger", *_SCALES}
        of_noise = (one for one in self.noise.checks if one.conclusive or not one.passed)
        others = (one for one in self.records.checks if one.name not in skipped or not one.passed)
        return (*of_noise, *(replace(one, name=f"{one.name}, little noise") for one in others))


Own = Callable[[RunConfig, Plan, Claim, int, int, Coins], Arrays]


@dataclass(frozen=True)
class Tried:
    """What a trial is of; its plan says of rounds what is claimed of these releases.

    Attributes:
        part: Which part of the plan they are.
        block: What they are called in a secure vector.
        own: (config, plan, claim, width, place, coins) -> what one site makes of its records
            before masking, through the code of a round.
    """

    part: Literal["rounds", "statistics"]
    block: str
    own: Own


def self_test(
    config: RunConfig,
    priced: Plan,
    sites: int = 1,
    make: Callable[[], Coins] = Coins.from_system,
    *,
    parameters: int = 0,
    alarm: float = ALARM,
) -> Tested:
    """Holds the installed code against a plan.

    Formal guarantee: a mechanism that is as claimed is called violated with a chance of at most
    `alarm`; of privacy beyond the claim nothing is said.

    Args:
        config: The run.
        priced: Its plan.
        sites: How many take part where noise is shared out: one tests its own share, all of
            `numbers.n` the sum.
        make: Gives each of them its coins.
        parameters: Coordinates of the run's own update, whose grid is computed anew too; 0 if
            they are not known.
        alarm: The false-alarm rate of both trials together.

    Raises:
        ConformanceError: There is no mechanism, or its grid has less noise than was priced.
    """
    if priced.epsilon is None:
        raise ConformanceError('privacy.mechanism = "none": adds no noise that could be tested')
    if priced.shares_noise and parameters:
        check_grid(ROUNDS, priced, parameters)
    _check_split(priced)
    _check_whole_norm(priced)
    priced = replace(priced, clipping_norm=max(priced.clipping_norm, _LEAST_NORM))
    return trials(ROUNDS, config, priced, sites, make, alarm)


def trials(
    tried: Tried,
    config: RunConfig,
    priced: Plan,
    sites: int,
    make: Callable[[], Coins],
    alarm: float,
) -> Tested:
    """Both trials; see `self_test`."""
    little = replace(priced, noise_multiplier=min(priced.noise_multiplier, _LITTLE))
    committed = _committed(tried, priced)
    return Tested(
        judge(*_trial(tried, config, priced, sites, make, committed, records=False), alarm / 2),
        judge(*_trial(tried, config, little, sites, make, committed, records=True), alarm / 2),
    )


def _trial(
    tried: Tried,
    config: RunConfig,
    priced: Plan,
    sites: int,
    make: Callable[[], Coins],
    committed: _Committed,
    *,
    records: bool,
) -> tuple[Observed, Claim]:
    """What was released and what is claimed of it, with many records or hardly any."""
    claim, width = _claim(tried, priced, sites, records=records)
    site_coins = [make() for _ in range(claim.sites)]
    steps = [_step(tried, config, priced, claim, width, site_coins) for _ in range(claim.steps)]
    shares = None
    if claim.sites > 1:
        shares = np.stack([own for _, own in steps], axis=1)[:, :, claim.slots :]
    released = np.stack([total for total, _ in steps])
    return Observed(released, committed, shares), claim


def _claim(tried: Tried, priced: Plan, sites: int, *, records: bool) -> tuple[Claim, int]:
    """What is claimed of a trial's releases, and how many coordinates they have."""
    of_sites, norm = priced.unit == "site", priced.clipping_norm
    rate = 1.0 if of_sites else priced.sampling_rate
    per_commit = _per_commit(priced)
    steps = per_commit * math.ceil(STEPS / per_commit)
    sigma, clip = _multiplier(priced) * norm, norm / CLIPPING_SLACK
    wanted = sizes(sigma, clip, rate, steps)
    most = min(_MOST_RECORDS, _MOST_SAMPLED / (steps * rate)) / wanted.slots
    slots, each = (wanted.slots, min(wanted.records, int(most))) if records else (1, 1)
    width = slots + math.ceil((_FEW_NOISES if records else _NOISES) / steps)
    if of_sites:
        sites = slots * each  # each adds one update
    shares = Shares(sites, 1) if of_sites and sites > 1 else None
    if priced.shares_noise:
        share, grid = check_grid(tried, priced, width)
        least = min(sites, _honest(priced))
        sigma, shares = share * math.sqrt(least), Shares(sites, least, grid)
    claim = Claim(sigma, clip, rate, slots, each, steps, per_commit, shares)
    return claim, width


def _per_commit(priced: Plan) -> int:
    """Releases that a commit pays for; of very many in a round only a part is tried."""
    return min(priced.releases_per_round, STEPS)


def _multiplier(priced: Plan) -> float:
    return priced.update_noise if priced.unit == "site" else priced.noise_multiplier


def _honest(priced: Plan) -> int:
    """n_min - t_collude, not taken from the plan's own sum."""
    numbers = priced.numbers
    return numbers.n_min - numbers.t_collude if numbers is not None else 1


def check_grid(
    tried: Tried, priced: Plan, width: int, bound: float | None = None
) -> tuple[float, float]:
    """A share's standard deviation and the grid's width, in units of the release.

    Computed anew: the honest sites' noise is what was priced, for the sum as it is rounded
    (`shared_noise`: a unit moves it by C and, rounded, by sqrt(d) steps more; nine steps squared of
    the variance are not counted). Of a release whose values are large, `bound` is theirs.
    """
    block = _placed(tried, priced, width, bound).block
    share, grid = block.sigma / block.scale, 1 / block.scale
    variance = _honest(priced) * share**2 - 9 * grid**2
    moved = priced.clipping_norm + math.sqrt(width) * grid
    least = _multiplier(priced) * moved
    if not variance >= least**2:
        raise ConformanceError(
            f"noise on the grid = {math.sqrt(max(0.0, variance)):g}: must be at least {least:g}; "
            "do not run, the installed code is not what was priced"
        )
    return share, grid


def _check_split(priced: Plan) -> None:
    """Computed anew: update and indicator together are the one release that was priced.

    Two Gaussian releases of noise a and b are one of (a^-2 + b^-2)^(-1/2) (Andrew et al. 2021).
    """
    both = priced.update_noise**-2 + priced.adaptive * priced.indicator_noise**-2
    if not both * priced.noise_multiplier**2 <= 1 + 1e-9:
        raise ConformanceError(
            f"noise of a round = {both**-0.5:g}: must be at least {priced.noise_multiplier:g}; do "
            "not run, the installed code is not what was priced"
        )


def _check_whole_norm(priced: Plan) -> None:
    """One record's gradient, or one site's update, has the bound over all parameters together."""
    norm, gain = priced.clipping_norm, _GAIN * priced.clipping_norm
    shapes = {"first": (3, 2), "second": (1,), "third": (2, 2, 2)}
    if priced.unit == "site":
        change = {name: np.full(shape, gain) for name, shape in shapes.items()}
        found, _ = clipped_update(change, norm)
    else:
        one = Batch(torch.full((1, 3), gain), torch.zeros(1, dtype=torch.int64))
        module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        summed = clipped_sum(module, _first, one, norm, torch.Generator())
        found = {name: gradient.numpy() for name, gradient in summed.items()}
    moved = math.sqrt(sum(float(np.square(array).sum()) for array in found.values()))
    if not moved <= norm:
        raise ConformanceError(
            f"clipping = {moved:g}: one {priced.unit} must move all parameters together by at most "
            f"{norm:g}; do not run, the installed code is not what was priced"
        )


def _first(module: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """[B] losses whose gradients touch every parameter."""
    del generator
    return torch.as_tensor(module(batch.x)).squeeze(1) * batch.x[:, 0]


def _placed(tried: Tried, priced: Plan, width: int, bound: float | None = None) -> vector.Placed:
    norm, rate = priced.clipping_norm, priced.sampling_rate
    release = vector.Release(tried.block, width, norm, _multiplier(priced), rate, bound or norm)
    return vector.placed([release], priced)[0]


def _step(
    tried: Tried,
    config: RunConfig,
    priced: Plan,
    claim: Claim,
    width: int,
    site_coins: Sequence[Coins],
) -> tuple[np.ndarray, np.ndarray]:
    """One release [d], and what each site added to it, [sites, d]."""
    own = [
        tried.own(config, priced, claim, width, place, coins)
        for place, coins in enumerate(site_coins)
    ]
    hooks = mechanism_of(priced)
    if priced.shares_noise and priced.numbers is not None:
        placed = (_placed(tried, priced, width),)
        words = [
            vector.words({tried.block: part}, placed, priced.numbers, coins)
            for part, coins in zip(own, site_coins, strict=True)
        ]
        total = np.add.reduce(np.stack(words), axis=0, dtype=np.uint32)
        each = [vector.reals(part, placed)[tried.block] for part in words]
        return vector.reals(total, placed)[tried.block], np.stack(each)
    summed = {name: np.sum([part[name] for part in own], axis=0) for name in own[0]}
    released = hooks.at_server(summed, priced.noise_scale, site_coins[0])
    return vector.flat(released), np.stack([vector.flat(part) for part in own])


def _own(
    config: RunConfig, priced: Plan, claim: Claim, width: int, place: int, coins: Coins
) -> Arrays:
    """What one site makes of its records before masking, through the code of a round."""
    mine, persons = whose(priced, claim, place)
    gain = _GAIN * priced.clipping_norm
    if priced.unit == "site":
        change = np.zeros(width)
        change[mine.numpy()] = gain
        halves = dict(zip(_HALVES, np.split(change, [width // 2]), strict=True))
        update, _ = clipped_update(halves, priced.clipping_norm)
        scale = priced.update_noise * priced.clipping_norm
        return mechanism_of(priced).at_site(update, scale, coins)
    records = Side(Batch(torch.full((len(mine), 1), gain), mine), persons)
    return gradient_sum(SLOTS, _Slots(width), records, config, priced, coins)


def whose(priced: Plan, claim: Claim, place: int) -> tuple[Tensor, Tensor]:
    """The slots of the records that a site has, [N], and whose they are, [N]."""
    pulled = np.arange(claim.slots * claim.records) // claim.records
    mine = torch.from_numpy(pulled[place :: claim.sites])
    persons = torch.arange(len(mine))
    if priced.unit == "person":
        persons, mine = persons.repeat(_OF_A_PERSON), mine.repeat(_OF_A_PERSON)
    return mine, persons


_HALVES = ("first.weight", "second.weight")


class _Slots(nn.Module):
    """One weight a coordinate, in two parameters; a record pulls that of its slot."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._half = width // 2
        self.first, self.second = nn.Embedding(self._half, 1), nn.Embedding(width - self._half, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[B] weights of the slots y [B], times the gains x [B, 1]."""
        low = self.first(y.clamp(max=self._half - 1))
        high = self.second((y - self._half).clamp(min=0))
        pulled: Tensor = (torch.where((y < self._half)[:, None], low, high) * x).squeeze(1)
        return pulled


def _pulls(module: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """[B] losses; the gradient of one is its gain, at its slot."""
    del generator
    return torch.as_tensor(module(batch.x, batch.y))


def _no_samples(
    module: nn.Module, n: int, generator: torch.Generator, labels: Tensor | None = None
) -> Batch:
    raise NotImplementedError("the self-test's module makes no records")


SLOTS = Family(
    build=lambda options, schema: _Slots(2),  # noqa: ARG005
    example_losses=_pulls,
    sample=_no_samples,
    scores=lambda module, batch: batch.x.sum(1),  # noqa: ARG005
    score_bounds=lambda module: (0.0, 1.0),  # noqa: ARG005
)
"""The synthetic family: its records are (gain, slot)."""


ROUNDS = Tried("rounds", "update", _own)


def _of(tried: Tried, priced: Plan, commits: int) -> Plan:
    """A plan with so many releases of what is tried."""
    if tried.part == "statistics":
        return replace(priced, statistics=commits)
    return replace(priced, rounds=commits)


def _committed(tried: Tried, priced: Plan) -> _Committed:
    """Debits the trial's releases from a ledger of its own; what that ledger then says."""
    commits = math.ceil(STEPS / _per_commit(priced))
    asked = order("self-test", "", "public-records", _of(tried, priced, commits))
    with TemporaryDirectory(prefix="fedveil-") as folder:
        path = Path(folder) / "ledger.sqlite"
        Ledger.create(path, "self-test", simulated=True)
        ledger = Ledger.open(path)
        try:
            for index in range(1, commits + 1):
                ledger.debit(asked, Lifetime(None, 0.5), {}, [(tried.part, index)])
            book = ledger.read().runs["self-test"]
        finally:
            ledger.close()
    made = book.made[tried.part]
    # Indices only go up: as many as the last one says are all of them.
    return {"self-test": tuple(range(1, made + 1)) if made == book.last[tried.part] else ()}
