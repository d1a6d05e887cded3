"""The self-test of a mechanism: statistics of what was released, against what is claimed.

The records are public and made for the test: each pulls one coordinate, its *slot*, so hard that it
is clipped, and adds exactly `clip` to it. Each of the first `slots` coordinates is pulled by
`records` records, the others by none. A mechanism that is as claimed releases, independently,

    X = clip Binomial(records, rate) + N(0, sigma^2)    at a slot, and
    Z = N(0, sigma^2)                                   elsewhere,

so that every way to be otherwise (less noise, another rate, one noise twice) shows in statistics of
X and Z whose laws are known, whatever goes on inside.

Formal guarantee: over the coins of a mechanism that is as claimed, the chance that `judge` says
"violated" is at most `alarm`, for all checks together (Bonferroni, and likewise within a check);
with noise on an integer grid, as nearly as that noise is normal. Nothing is said about privacy
beyond the claim, nor about violations smaller than what a check calls detectable.

Clipping and rate: the slots' mean is clip records rate, which tells the product only. The variance
of X less sigma^2 is clip^2 records rate (1 - rate), so that mean and variance together tell each by
itself, though less finely: the checks `clipping` and `rate`. If `slot mean` fails and neither does,
either may be the cause, and the verdict does not say which. Far from the claim both fail; then only
`clipping bound`, which no rate can pass, tells. A wrong mean also fails `batch sizes` and `slot
totals`, which speak for themselves only if the mean is right.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from . import checks
from .checks import Seen, seen
from .claim import Check, Claim, Observed
from .intervals import POWER, Draw, square_interval

Outcome = Literal["consistent", "violated", "inconclusive"]
Test = Callable[[Seen, float], Check]

ALARM = 1e-3
"""A correct mechanism is called violated once in a thousand self-tests at most."""

_ALWAYS: tuple[Test, ...] = (
    checks.ledger,
    checks.noise,
    checks.noise_mean,
    checks.noise_shape,
    checks.zeros,
    checks.noise_of_a_step,
    checks.noise_of_a_coordinate,
    checks.steps_alike,
    checks.halves_alike,
    checks.clipping_bound,
    checks.slot_mean,
    checks.clipping,
    checks.rate,
)
_SAMPLED: tuple[Test, ...] = (checks.batch_sizes, checks.slot_totals)
_SHARED: tuple[Test, ...] = (checks.share, checks.share_of_a_step, checks.shares_alike)
_MOST = len(_ALWAYS) + len(_SAMPLED) + len(_SHARED) + 1

_NOISES = 120_000  # values without records: shows noise x 0.99
_SAMPLES = 40_000  # sampled records over all steps: shows a rate x 1.03
_LEAST_SLOTS = 16  # enough for the spread of their totals
_LEAST_STEPS = 8  # below it batch sizes would need millions of records
_MARGIN = 1.2  # over what the sampling's variance must be at least


@dataclass(frozen=True)
class Verdict:
    """What all checks say together.

    Attributes:
        outcome: "violated" if a check failed; otherwise "inconclusive" if one had too little data
            to see what it is wanted for with probability 0.9; otherwise "consistent".
        alarm: Where all is as claimed, "violated" has this probability at most.
        checks: All that were made.
    """

    outcome: Outcome
    alarm: float
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(check.name for check in self.checks if not check.passed)

    @property
    def weak(self) -> tuple[str, ...]:
        """Names of the checks that had too little data."""
        return tuple(check.name for check in self.checks if not check.conclusive)


@dataclass(frozen=True)
class Sizes:
    """How large a self-test should be.

    Attributes:
        steps: Releases.
        slots: Coordinates that records pull.
        records: Records for each slot, over all sites that are in a release.
        coordinates: All of them, slots included.
    """

    steps: int
    slots: int
    records: int
    coordinates: int


def judge(observed: Observed, claim: Claim, alarm: float = ALARM) -> Verdict:
    """Compares what was released with what is claimed; for the guarantee see the module.

    Args:
        observed: The releases, however many there are.
        claim: Says how they are distributed.
        alarm: The false-alarm rate of the verdict as a whole.

    Raises:
        ValueError: The observations have another shape than the claim, or are not finite.
    """
    if not 0 < alarm < 1:
        raise ValueError(f"alarm = {alarm}: must be between 0 and 1")
    data = seen(observed, claim)
    tests = list(_ALWAYS)
    if claim.rate < 1:
        tests += _SAMPLED
    if claim.shares and claim.shares.sites > claim.shares.least:
        tests.append(checks.accounted_noise)
    if data.shares is not None:
        tests += _SHARED
    made = tuple(test(data, alarm / len(tests)) for test in tests)
    outcome: Outcome = "consistent"
    if not all(check.passed for check in made):
        outcome = "violated"
    elif not all(check.conclusive for check in made):
        outcome = "inconclusive"
    return Verdict(outcome, alarm, made)


def sizes(sigma: float, clip: float, rate: float, steps: int = 30) -> Sizes:
    """Sizes with which `judge` is conclusive at its own alarm, and that take seconds.

    Its costs are steps slots records rate clipped gradients of as many coordinates. A batch of
    fixed size shows by what is missing of the batch sizes' variance, which so few steps tell only
    if most of it was the sampling's: that sets the records. The more steps, the fewer they are.

    Args:
        sigma: Standard deviation of the noise in a release.
        clip: What a record adds.
        rate: Its sampling rate; very near 1 it takes many records, for hardly anything is left out.
        steps: Releases, 8 at least.

    Raises:
        ValueError: A number is out of its range.
    """
    Claim(sigma, clip, rate, slots=1, records=1, steps=steps)
    if steps < _LEAST_STEPS:
        raise ValueError(f"steps = {steps}: must be at least {_LEAST_STEPS}")
    noise = (sigma / clip) ** 2
    slots = _LEAST_SLOTS
    if rate < 1:
        # Enough also for a few records of each slot in a step, so that sums are near to normal.
        least = max(4 / rate, _MARGIN * noise * _sampling_share(steps) / (rate * (1 - rate)))
        records = math.ceil(least)
        slots = max(slots, math.ceil(_SAMPLES / (steps * records * rate)))
    else:
        # Only noise is in the way: for the mean to 5 %, and for the spread.
        records = math.ceil(max(noise, 150 * math.sqrt(noise / (steps * slots))))
    return Sizes(steps, slots, records, slots + math.ceil(_NOISES / steps))


def _sampling_share(steps: int) -> float:
    """Variance of the sampling over that of the noise with which a fixed batch size is seen."""
    unit = Draw(trials=1, rate=1.0, each=1.0, noise=1.0)  # nothing but noise
    low = square_interval(unit, steps, 0.0, ALARM / _MOST).low
    return float(stats.chi2.ppf(POWER, steps)) / steps / low - 1
