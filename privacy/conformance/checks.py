"""The statistics of a self-test, one check each; `conformance.py` says what they are for.

Each check takes what was seen and its own alarm: the most that the chance of its failing may be
where all is as claimed. One that looks at many things divides the alarm by their number.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from .claim import Check, Claim, Observed
from .intervals import (
    ONE_SIDED,
    POWER,
    Draw,
    Interval,
    cosine_bound,
    cosine_detectable,
    distance_bound,
    scale_detectable,
    scale_interval,
    square_interval,
    sum_interval,
)

_LATTICE = 2.0**-20  # a release may be rounded to this part of its sigma, see `mechanism.add_noise`
_EMPTY = 4  # coordinates without records: two halves of two


class Seen(NamedTuple):
    """What was observed, as the checks need it.

    Attributes:
        claim: What it is held against.
        committed: By ledger, its committed indices.
        noise: [steps, k] at the coordinates without records, in units of the noise claimed there.
        slots: [steps, slots] at the others.
        shares: [sites, steps, k], in units of one share.
    """

    claim: Claim
    committed: Mapping[str, tuple[int, ...]]
    noise: np.ndarray
    slots: np.ndarray
    shares: np.ndarray | None


def seen(observed: Observed, claim: Claim) -> Seen:
    """The observations in units of the claim.

    Raises:
        ValueError: They have another shape than the claim says, or are not finite.
    """
    released = _finite("released", observed.released, "[steps, d]")
    if released.shape[1] < claim.slots + _EMPTY:
        raise ValueError(
            f"released = {released.shape}: must have {claim.slots + _EMPTY} coordinates at least, "
            f"{_EMPTY} more than slots"
        )
    if not observed.committed:
        raise ValueError("committed = {}: must have a ledger's indices")
    shares = observed.shares
    if shares is not None:
        shares = _finite("shares", shares, "[sites, steps, k]")
        first = (claim.sites, len(released))
        if claim.shares is None or shares.shape[:2] != first or shares.shape[2] < 2:
            raise ValueError(
                f"shares = {shares.shape}: must be {(*first, 'k')} with k >= 2, and claimed"
            )
        shares = shares / claim.share
    noise, slots = released[:, claim.slots :] / claim.noise, released[:, : claim.slots]
    return Seen(claim, observed.committed, noise, slots, shares)


def ledger(seen: Seen, alarm: float) -> Check:
    """As many releases as claimed, and every ledger has their commits, each once; exact."""
    del alarm
    claim = seen.claim
    due = Counter(range(1, claim.steps // claim.per_commit + 1))
    faults = abs(len(seen.noise) - claim.steps)
    for indices in seen.committed.values():
        made = Counter(indices)
        faults += (made - due).total() + (due - made).total()
    bounds = Interval(0, 0)
    return _check("ledger", faults, bounds, "releases or commits too many or missing", 1, 1)


def noise(seen: Seen, alarm: float) -> Check:
    """The noise's standard deviation over the claimed one: chi-squared over everything."""
    return _scale("noise", seen.noise.reshape(1, -1), alarm, seen.claim, 0.02)


def accounted_noise(seen: Seen, alarm: float) -> Check:
    """As `noise`, over the least that is accounted for: chi-squared, one-sided."""
    claim = seen.claim
    found = float(_rms(seen.noise.reshape(1, -1))[0]) * claim.noise / claim.sigma
    low = scale_interval(seen.noise.size, 2 * alarm).low
    shortfall = 1 - low / math.sqrt(stats.chi2.ppf(POWER, seen.noise.size) / seen.noise.size)
    bounds = Interval(low, math.inf)
    return _check("accounted noise", found, bounds, "noise short by this part", shortfall, 0.02)


def noise_mean(seen: Seen, alarm: float) -> Check:
    """The sum of all noise over its own standard deviation: normal."""
    root = math.sqrt(seen.noise.size)
    high = float(stats.norm.isf(alarm / 2)) * seen.claim.rounding
    found = float(seen.noise.sum()) / root
    what = "bias of each coordinate, in sigma"
    return _check("noise mean", found, Interval(-high, high), what, (high + ONE_SIDED) / root, 0.1)


def noise_shape(seen: Seen, alarm: float) -> Check:
    """How far the noise's distribution is from the normal at most: Kolmogorov and Smirnov, exact.

    A grid's steps add what one of its values may have of probability.
    """
    count = seen.noise.size
    high = distance_bound(count, alarm) + seen.claim.grid_chance
    normal = special.ndtr(np.sort(seen.noise, axis=None))
    steps = np.arange(count + 1) / count
    found = max(float((steps[1:] - normal).max()), float((normal - steps[:-1]).max()))
    least = high + distance_bound(count, 1 - POWER)
    return _check("noise shape", found, Interval(0, high), "distance of distributions", least, 0.05)


def zeros(seen: Seen, alarm: float) -> Check:
    """Coordinates that are exactly 0, in all steps: binomial, by the release's own rounding."""
    chance = max(seen.claim.grid_chance, _LATTICE / math.sqrt(2 * math.pi))
    high = float(stats.binom.isf(alarm, seen.noise.size, chance))
    least = (high + 1) / seen.noise.size
    found = seen.noise.size - int(np.count_nonzero(seen.noise))
    return _check("zeros", found, Interval(0, high), "part of the noise left out", least, 0.01)


def noise_of_a_step(seen: Seen, alarm: float) -> Check:
    """As `noise`, of the step that is furthest off."""
    return _scale("noise of a step", seen.noise, alarm, seen.claim, 0.5)


def noise_of_a_coordinate(seen: Seen, alarm: float) -> Check:
    """As `noise`, of the coordinate that is furthest off, over all steps."""
    return _scale("noise of a coordinate", seen.noise.T, alarm, seen.claim, math.inf)


def steps_alike(seen: Seen, alarm: float) -> Check:
    """The largest correlation of the noise of any two steps."""
    return _alike("correlation of steps", seen.noise, alarm)


def halves_alike(seen: Seen, alarm: float) -> Check:
    """The largest correlation of a step's two halves, the one turned by any number of places.

    So a step's noise that repeats itself is found whatever its period, up to the half. Each turn of
    a vector of independent normals has the law of the vector.
    """
    length = seen.noise.shape[1] // 2
    first, second = seen.noise[:, :length], seen.noise[:, length : 2 * length]
    turned = np.fft.rfft(_unit(first)) * np.fft.rfft(_unit(second)).conj()
    cosines = np.fft.irfft(turned, length)
    return _cosines("correlation of halves", cosines, length, alarm / cosines.size)


def clipping_bound(seen: Seen, alarm: float) -> Check:
    """The largest sum of a slot, over what all of its records may add: normal, whatever the rate.

    What sampling leaves out makes it fail less often.
    """
    claim = seen.claim
    noise = claim.noise * claim.rounding
    most = claim.clip * claim.records + float(stats.norm.isf(alarm / seen.slots.size)) * noise
    bounds = Interval(-math.inf, most / (claim.clip * claim.records))
    found = float(seen.slots.max()) / (claim.clip * claim.records)
    excess = most / (claim.clip * claim.records * claim.rate) - 1
    return _check("clipping bound", found, bounds, "records clipped too late by", excess, math.inf)


def slot_mean(seen: Seen, alarm: float) -> Check:
    """The slots' mean over clip records rate, which the two make together: exact."""
    draw, count = _cells(seen), seen.slots.size
    low, high = _mean_interval(seen, alarm)
    unit = count * draw.mean
    reach = ONE_SIDED * math.sqrt(count * draw.variance)
    least = (max(high, -low) + reach) / unit
    found = float(seen.slots.sum()) / unit
    what = "rate or clipping wrong by this part"
    return _check("slot mean", found, Interval(1 + low / unit, 1 + high / unit), what, least, 0.05)


def clipping(seen: Seen, alarm: float) -> Check:
    """What a record adds, over the claim, whatever the rate is.

    With mean a and variance v of X, (v - sigma^2) - clip a + a^2 / records has the expectation
    (c - clip) a where the records add c, at any rate. Over clip a it is c / clip - 1.
    """
    claim = seen.claim
    slope = -claim.clip * (1 - 2 * claim.rate)
    found, bounds, least = _dispersion(seen, alarm, slope, 1 - 1 / claim.records)
    return _check("clipping", found, bounds, "clipping wrong by this part", least, 1.0)


def rate(seen: Seen, alarm: float) -> Check:
    """The sampling rate, over the claim, whatever a record adds.

    With mean a and variance v of X, (v - sigma^2) - a^2 (1 - rate) / (records rate) has the
    expectation c^2 records (q / rate) (rate - q) at the rate q, for any c: near the claim, less it
    is q / rate - 1 in units of clip^2 records rate.
    """
    claim = seen.claim
    slope = -2 * claim.clip * (1 - claim.rate)
    square = 1 + (1 - claim.rate) / (claim.records * claim.rate)
    found, bounds, least = _dispersion(seen, alarm, slope, square)
    mirrored = Interval(2 - bounds.high, 2 - bounds.low)
    return _check("rate", 2 - found, mirrored, "rate wrong by this part", least, 1.0)


def batch_sizes(seen: Seen, alarm: float) -> Check:
    """How much the steps' sums over all slots vary, over the claim: a fixed size varies less."""
    claim, slots = seen.claim, seen.slots.shape[1]
    draw = Draw(slots * claim.records, claim.rate, claim.clip, math.sqrt(slots) * claim.noise)
    found, bounds, shortfall, _ = _variation(seen.slots.sum(1), draw, alarm, claim.rounding)
    what = "part of the batch size's variance missing"
    return _check("batch sizes", found, bounds, what, shortfall, 1.0)


def slot_totals(seen: Seen, alarm: float) -> Check:
    """How much the slots' sums over all steps vary, over the claim.

    They vary too much where a record's steps are not independent of one another (the same batch in
    each), and too little where each record has its turns (shuffling).
    """
    claim, steps = seen.claim, len(seen.slots)
    draw = Draw(steps * claim.records, claim.rate, claim.clip, math.sqrt(steps) * claim.noise)
    found, bounds, _, excess = _variation(seen.slots.sum(0), draw, alarm, claim.rounding)
    what = "excess of the sampling's variance over steps"
    return _check("slot totals", found, bounds, what, excess, steps - 1)


def share(seen: Seen, alarm: float) -> Check:
    """As `noise`, of the site whose own noise is furthest off."""
    shares = _shares(seen)
    return _scale("share", shares.reshape(len(shares), -1), alarm, seen.claim, 0.02)


def share_of_a_step(seen: Seen, alarm: float) -> Check:
    """As `noise`, of the site and step that are furthest off."""
    shares = _shares(seen)
    rows = shares.reshape(-1, shares.shape[2])
    return _scale("share of a step", rows, alarm, seen.claim, 0.5)


def shares_alike(seen: Seen, alarm: float) -> Check:
    """The largest correlation of any two noises, of any sites and steps."""
    shares = _shares(seen)
    return _alike("correlation of shares", shares.reshape(-1, shares.shape[2]), alarm)


def _shares(seen: Seen) -> np.ndarray:
    if seen.shares is None:
        raise ValueError("shares = None: must be observed for this check")
    return seen.shares


def _check(
    name: str,
    statistic: float,
    bounds: Interval,
    violation: str,
    detectable: float,
    wanted: float,
) -> Check:
    low, high = (float(end) for end in bounds)
    passed = bool(low <= statistic <= high)
    return Check(name, float(statistic), low, high, passed, violation, detectable, wanted)


def _scale(name: str, rows: np.ndarray, alarm: float, claim: Claim, wanted: float) -> Check:
    """The standard deviation, over the claim, of the row that is nearest to a bound or beyond it.

    Rounding to a grid may add a little.
    """
    low, high = scale_interval(rows.shape[1], alarm / len(rows))
    bounds = Interval(low, high * claim.rounding)
    ratios = _rms(rows)
    distances = np.maximum((1 - ratios) / (1 - bounds.low), (ratios - 1) / (bounds.high - 1))
    found = float(ratios[distances.argmax()])
    least = scale_detectable(rows.shape[1], bounds)
    return _check(name, found, bounds, "noise wrong by this part", least, wanted)


def _alike(name: str, vectors: np.ndarray, alarm: float) -> Check:
    """The largest cosine of any two rows."""
    unit = _unit(vectors)
    # Not `@`: its threads wait for one another where cores are busy, for what is little work.
    cosines = np.einsum("ik,jk->ij", unit, unit)[np.triu_indices(len(unit), 1)]
    return _cosines(name, cosines, vectors.shape[1], alarm / max(1, cosines.size))


def _cosines(name: str, cosines: np.ndarray, length: int, alarm: float) -> Check:
    high = cosine_bound(length, alarm)
    least = cosine_detectable(length, high) if cosines.size else math.inf
    found = float(np.abs(cosines).max(initial=0.0))
    return _check(name, found, Interval(0, high), "correlation of this size", least, 0.5)


def _cells(seen: Seen) -> Draw:
    """The law of one slot in one step."""
    claim = seen.claim
    return Draw(claim.records, claim.rate, claim.clip, claim.noise)


def _mean_interval(seen: Seen, alarm: float) -> Interval:
    """Of the sum over slots and steps, less its expectation."""
    claim, count = seen.claim, seen.slots.size
    spread = math.sqrt(count) * claim.noise * claim.rounding
    draw = Draw(count * claim.records, claim.rate, claim.clip, spread)
    low, high = sum_interval(draw, alarm)
    return Interval(low - draw.mean, high - draw.mean)


def _dispersion(
    seen: Seen, alarm: float, slope: float, square: float
) -> tuple[float, Interval, float]:
    """mean(Y^2) + slope mean(Y) - square mean(Y)^2 less its expectation, Y = X less its mean.

    In units of clip^2 records rate, plus 1; with its interval, and the least deviation that is
    seen. The first two terms have a Chernoff bound. The third is between 0 and what `slot_mean`
    allows, on the event that that check passes: its failing is in the verdict's alarm already.
    """
    claim, draw, count = seen.claim, _cells(seen), seen.slots.size
    unit = claim.clip**2 * claim.records * claim.rate
    centred = seen.slots - draw.mean
    mean = float(centred.mean())
    value = float(np.square(centred).mean()) + slope * mean - square * mean**2 - draw.variance
    allowed = max(abs(end) for end in _mean_interval(seen, alarm)) / count
    low = square_interval(draw, count, slope, alarm).low - square * allowed**2
    wider = draw._replace(noise=draw.noise * claim.rounding)
    high = square_interval(wider, count, slope, alarm).high
    low, high = (low - draw.variance) / unit, (high - draw.variance) / unit
    reach = ONE_SIDED * draw.spread(slope) / math.sqrt(count) / unit
    return 1 + value / unit, Interval(1 + low, 1 + high), max(-low, high) + reach


def _variation(
    sums: np.ndarray, draw: Draw, alarm: float, rounding: float
) -> tuple[float, Interval, float, float]:
    """The mean square of sums less their mean, over their variance, with its interval.

    Also which part of the sampling's variance must be missing, and which be there beside it, to be
    seen: as if the sums were normal.
    """
    count = len(sums)
    wider = draw._replace(noise=draw.noise * rounding)
    low = square_interval(draw, count, 0.0, alarm).low / draw.variance
    high = square_interval(wider, count, 0.0, alarm).high / draw.variance
    found = float(np.square(sums - draw.mean).mean()) / draw.variance
    part = draw.sampled / draw.variance
    shortfall = (1 - low / (stats.chi2.ppf(POWER, count) / count)) / part
    excess = (high / (stats.chi2.isf(POWER, count) / count) - 1) / part
    return found, Interval(low, high), float(shortfall), float(excess)


def _rms(rows: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.sqrt(np.square(rows).mean(axis=1))
    return found


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros, which other checks find, stays one."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: np.ndarray = vectors / np.where(lengths > 0, lengths, 1)
    return unit


def _finite(name: str, values: np.ndarray, axes: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != axes.count(",") + 1 or not array.size or array.dtype.kind not in "iuf":
        raise ValueError(f"{name} = {array.dtype} {array.shape}: must be numbers {axes}, not empty")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: is not finite everywhere; look for what overflowed")
    return array.astype(np.float64)
