"""Where a statistic lies when all is as claimed, with a stated chance of lying outside.

Each interval is exact where the law is known, and otherwise a Chernoff bound, which is never too
narrow. Nothing here knows what is tested; `conformance.py` does.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import optimize, special, stats

POWER = 0.9
"""With this chance a violation of the size called detectable is seen."""

ONE_SIDED = float(stats.norm.ppf(POWER))
_WINDOW = 1e-3  # the part of an alarm that a window on the binomial's values may take
_REACH = math.log(1e3)  # how far from its natural size a Chernoff exponent is looked for
_EXACT = 1e-18  # what a sum over a binomial may leave out


class Interval(NamedTuple):
    """Both ends belong to it."""

    low: float
    high: float


class Draw(NamedTuple):
    """A law: `each` times a Binomial(`trials`, `rate`) count, plus N(0, `noise`^2).

    Attributes:
        trials: Records, each with a coin of its own.
        rate: The coins' chance.
        each: What a record adds.
        noise: Standard deviation of the noise, > 0.
    """

    trials: int
    rate: float
    each: float
    noise: float

    @property
    def mean(self) -> float:
        """Its expectation."""
        return self.each * self.trials * self.rate

    @property
    def sampled(self) -> float:
        """The part of its variance that sampling makes."""
        return self.each**2 * self.trials * self.rate * (1 - self.rate)

    @property
    def variance(self) -> float:
        """All of it."""
        return self.sampled + self.noise**2

    def spread(self, slope: float) -> float:
        """Standard deviation of Y^2 + slope Y, Y being the draw less its mean.

        From the third and fourth central moments of the binomial, M p (1-p) (1-2p) and
        M p (1-p) (1 + 3 (M-2) p (1-p)).
        """
        coin = self.rate * (1 - self.rate)
        third = self.each**3 * self.trials * coin * (1 - 2 * self.rate)
        fourth = self.each**4 * self.trials * coin * (1 + 3 * (self.trials - 2) * coin)
        fourth += 6 * self.sampled * self.noise**2 + 3 * self.noise**4
        square = fourth - self.variance**2 + 2 * slope * third + slope**2 * self.variance
        return math.sqrt(square)


@lru_cache(maxsize=256)
def scale_interval(count: int, alarm: float) -> Interval:
    """Of the root mean square of `count` standard normals: chi-squared, exact."""
    low, high = stats.chi2.ppf(alarm / 2, count), stats.chi2.isf(alarm / 2, count)
    return Interval(math.sqrt(low / count), math.sqrt(high / count))


@lru_cache(maxsize=256)
def scale_detectable(count: int, bounds: Interval) -> float:
    """The smallest relative error of a scale that leaves `bounds` with the stated power."""
    least = bounds.low / math.sqrt(stats.chi2.ppf(POWER, count) / count)
    most = bounds.high / math.sqrt(stats.chi2.isf(POWER, count) / count)
    return max(1 - least, most - 1)


@lru_cache(maxsize=256)
def cosine_bound(length: int, alarm: float) -> float:
    """What the cosine of two independent vectors of normals does not pass in size: exact.

    The cosine's square is Beta(1/2, (length - 1)/2), whatever the one vector is (Fisher 1915).
    """
    return math.sqrt(stats.beta.isf(alarm, 0.5, (length - 1) / 2))


def cosine_detectable(length: int, bound: float) -> float:
    """The correlation that passes `bound` with the stated power, by Fisher's z."""
    if bound >= 1:
        return math.inf
    return math.tanh(math.atanh(bound) + ONE_SIDED / math.sqrt(length))


@lru_cache(maxsize=256)
def distance_bound(count: int, alarm: float) -> float:
    """What a sample's distribution function is apart from its law's at most: Kolmogorov, exact."""
    return float(stats.kstwo.isf(alarm, count))


@lru_cache(maxsize=256)
def sum_interval(draw: Draw, alarm: float) -> Interval:
    """Of one draw: the binomial's sum over the normal's tails, exact but for 1e-18."""
    trials, rate, each, noise = draw
    counts = _likely(trials, rate, _EXACT)
    weights = stats.binom.pmf(counts, trials, rate)

    def above(x: float) -> float:
        return float(weights @ special.ndtr((each * counts - x) / noise)) - alarm / 2

    def below(x: float) -> float:
        return float(weights @ special.ndtr((x - each * counts) / noise)) - alarm / 2

    start, stop = each * counts[0] - 40 * noise, each * counts[-1] + 40 * noise
    precise = 1e-9 * math.sqrt(draw.variance)
    return Interval(
        optimize.brentq(below, start, stop, xtol=precise),
        optimize.brentq(above, start, stop, xtol=precise),
    )


@lru_cache(maxsize=256)
def square_interval(draw: Draw, count: int, slope: float, alarm: float) -> Interval:
    """Of the mean of Y^2 + slope Y over `count` draws, Y being a draw less its mean.

    By Chernoff: P[mean >= x] <= exp(-count (t x - log E exp(t (Y^2 + slope Y)))) for every t > 0,
    and likewise below; any t gives a valid bound, so that the search for the best need not be
    exact. Given the binomial's value the expectation over the noise S g is a Gaussian integral,
    with y that value less its mean and u = 2 y + slope:

        E exp(t (y^2 + slope y + u S g + S^2 g^2))
            = (1 - 2 t S^2)^(-1/2) exp(t (y^2 + slope y) + (t u S)^2 / (2 (1 - 2 t S^2))).

    The sum goes over a window that all draws are in but for a thousandth of the alarm; on that
    event the draws' sum is what the window's weights, which sum to less than 1, give.
    """
    counts = _likely(draw.trials, draw.rate, _WINDOW * alarm / count)
    weights = stats.binom.logpmf(counts, draw.trials, draw.rate)
    values = draw.each * (counts - draw.trials * draw.rate)
    level = math.log(2 / ((1 - _WINDOW) * alarm)) / count
    square = draw.noise**2

    def log_moment(t: float) -> float:
        room = 1 - 2 * t * square
        inner = t * (values + slope) * values
        inner += (t * (2 * values + slope)) ** 2 * square / (2 * room)
        return float(special.logsumexp(weights + inner)) - math.log(room) / 2

    def best(sign: int) -> float:
        def bound(log_t: float) -> float:
            t = math.exp(log_t)
            return (log_moment(sign * t) + level) / t

        middle = math.log(math.sqrt(2 * level) / draw.spread(slope))
        most = middle + _REACH
        if sign > 0:
            most = min(most, math.log((1 - 1e-9) / (2 * square)))
        found = optimize.minimize_scalar(
            bound, bounds=(min(middle, most) - _REACH, most), method="bounded"
        )
        return float(found.fun)

    return Interval(-best(-1), best(1))


def _likely(trials: int, rate: float, outside: float) -> np.ndarray:
    """Counts that a binomial is among but for a chance of `outside`, by Bernstein's inequality.

    P[|K - mean| >= x] <= 2 exp(-x^2 / (2 (variance + x / 3))), solved for x.
    """
    level = math.log(2 / outside)
    reach = level / 3 + math.sqrt((level / 3) ** 2 + 2 * level * trials * rate * (1 - rate))
    first = max(0, math.floor(trials * rate - reach))
    last = min(trials, math.ceil(trials * rate + reach))
    return np.arange(first, last + 1)
