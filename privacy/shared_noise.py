"""A block of reals on the integer grid under shared noise, and what that costs.

Of each secure sum the noises of at least h sites are unknown to the adversary, h = n_min -
t_collude. A site scales its sum of clipped contributions, rounds it stochastically (`quantise`) and
adds integer noise (`discrete.add_noise`) of variance s^2 in each coordinate. The accountants price
continuous Gaussians, Poisson-subsampled. This is how the one becomes the other.

1. *Sensitivity.* Add or remove one privacy unit, which is at one site, and leave that site's
   rounding coins as they are. The sum of the rounded vectors moves by a vector of integers whose L2
   norm is at most D = (1 + 2^-22) (scale C + sqrt(d)), whatever the coins are (`quantise`).
2. *The others.* Fix h honest uploaders; the adversary may choose them, but by masked words, which
   are independent of their noise. Everything else in the sum (other noises, the colluders' words,
   reduction modulo 2^32) is made without regard to their noise, too: post-processing.
3. *One Gaussian.* Write "within t" for two distributions whose probabilities have a ratio of
   exp(-t) to exp(t) at each point. In each coordinate each noise is within ripple(S^2 / (k^2 + 1))
   of the discrete Gaussian of variance s^2 = S^2 (k^2 + 1) (see `discrete`). The sum of j + 1 of
   these is, by the same square and sum with j s^2 and s^2, within ripple(s^2 j / (j + 1)) of one
   discrete Gaussian added to one of variance j s^2: step by step the sum of h is within
   sum over j < h of ripple(s^2 j / (j + 1)) of the discrete Gaussian of variance V = h s^2.
   (Kairouz, Liu and Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated
   Learning with Secure Aggregation", section 3, has the factor 10 for its tau where `ripple` has
   5.)
4. *Continuous.* Let m be the sum without noise, whole numbers. Take the Gaussian N(m, V - 9) and
   post-process each coordinate x: draw y from the discrete Gaussian around x, proportional to
   exp(-(y - x)^2 / 18). Its normaliser depends on x by a factor of 1 +- e, with e of w^2 = 9, and
   without it the integral over x is exactly the density of N(m, V) at y. So y is within ripple(9)
   of the discrete Gaussian around m of variance V. (Canonne, Kamath and Steinke 2020, "The Discrete
   Gaussian for Differential Privacy", compare the two; this comparison keeps sampling, too.)
5. *Price.* Hence each release is, up to slack, a post-processing of a Gaussian mechanism. Given the
   other records of the batch and all rounding coins, it is N(m, V - 9) on the one data set, and on
   the other the mixture of it and of N(m + v, V - 9) by the sampling rate, with v no longer than D.
   The hockey-stick divergence is jointly convex, so without what was given the pair is no further
   apart than the subsampled Gaussian mechanism of noise multiplier sqrt(V - 9) / D allows. PLD
   prices the adaptive composition of these.
6. *Slack.* Being within t at each coordinate, for all data alike, stays so in mixtures, and adds up
   over coordinates and over adaptive releases: the transcript P on some data is within A of the
   transcript G of post-processed Gaussians, A the sum of all. If G are (epsilon, delta)-close,
   P(E) <= e^A G(E) <= e^(A + epsilon) G'(E) + e^A delta <= e^(2A + epsilon) P'(E) + e^A delta.
   The sampler is no more than T, the sum of all statistical distances, from what P has, whatever
   was released before: that adds T on the one side and e^(2A + epsilon) T on the other.

All this is for independent, uniform coins; with those of AES it holds against whoever cannot break
it.
"""

import math
from dataclasses import dataclass

from ..config import ConfigError
from .discrete import DISTANCE, MAX_STRETCH, ripple, sigma, variance
from .secagg.encoding import MAX_WORDS
from .secagg.terms import MAX_SCALE

SMOOTHING = 9
"""r^2 in squared steps: given away so that the noise counts as continuous; ripple(9) is 4e-77."""

_FLOATS = 2.0**-40  # more than all roundings of a dozen operations, and a loss of nothing
_SCALING = 1 + 2.0**-22  # see `quantise`
_LITTLE = 512  # rounding costs little if it is at most this part of the sensitivity


@dataclass(frozen=True)
class Grid:
    """How a block lies on the integers.

    Attributes:
        scale: Steps of the grid for one unit.
        stretch: Of the noise that each site adds, see `discrete.add_noise`.
    """

    scale: float
    stretch: int

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise that each site adds, in steps."""
        return sigma(self.stretch)


def choose_grid(
    noise_multiplier: float,
    sensitivity: float,
    length: int,
    honest: int,
    most: float = math.inf,
) -> Grid:
    """The grid on which the honest sites' noise is as much as is accounted for.

    The noises to choose from are few, so the noise fixes the scale. It is the least with which
    rounding is at most 1/512 of the sensitivity (that much more noise is in the sum than on a
    continuum), or else the largest. Values that are many sensitivities large need a coarser one,
    `most`, to find room in a word, at the price of more noise in the sum.

    Formal guarantee: `accounted_multiplier` of the grid is at least the noise multiplier.

    Args:
        noise_multiplier: Standard deviation of the accounted Gaussian over its sensitivity.
        sensitivity: C, the L2 bound of one unit's contribution before rounding.
        length: d, coordinates of the block.
        honest: n_min - t_collude, sites whose noise is surely in the sum and unknown.
        most: Steps for one unit that the block's values leave room for.

    Raises:
        ConfigError: No scale gives so much noise, or only one that is too fine.
        ValueError: An argument is out of its range.
    """
    if not 0 < noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier = {noise_multiplier}: must be > 0 and finite")
    _check(sensitivity, length, honest)
    rounding = math.sqrt(length)
    sizes = [_root(stretch, honest) / noise_multiplier for stretch in range(MAX_STRETCH + 1)]
    little = [stretch for stretch, size in enumerate(sizes) if size >= _LITTLE * rounding]
    stretch = little[0] if little else MAX_STRETCH
    rooms = [size * (1 - 2 * _FLOATS) / _SCALING - rounding for size in sizes[: stretch + 1]]
    usable = [at for at, room in enumerate(rooms) if room > 0]
    fitting = [at for at in usable if rooms[at] <= most * sensitivity]
    if usable:
        # Where even the least noise is for a finer grid than the values leave room for, it is used
        # on the one that they do: more than was asked for.
        stretch = fitting[-1] if fitting else usable[0]
    room = min(rooms[stretch], most * sensitivity)
    if not room > 0:
        raise ConfigError(
            f"noise multiplier = {noise_multiplier:g}: on integers a block of {length} coordinates "
            f"takes less than {sizes[-1] / rounding * noise_multiplier:g} with {honest} honest "
            "sites; ask for less noise, release fewer coordinates or raise n_min"
        )
    scale = room / sensitivity
    if not scale <= MAX_SCALE:
        raise ConfigError(
            f"sensitivity = {sensitivity:g}: with a noise multiplier of {noise_multiplier:g} it "
            f"needs {scale:g} steps for one unit, more than 2^62; release larger values or raise "
            "the noise multiplier"
        )
    return Grid(scale, stretch)


def accounted_multiplier(grid: Grid, sensitivity: float, length: int, honest: int) -> float:
    """sqrt(V - 9) / D of the module's text, rounded down: the noise multiplier to be priced.

    Args:
        grid: Where the block lies.
        sensitivity: C, see `choose_grid`.
        length: d.
        honest: h.

    Raises:
        ValueError: An argument is out of its range.
    """
    _check(sensitivity, length, honest)
    if not 0 < grid.scale <= MAX_SCALE:
        raise ValueError(f"scale = {grid.scale}: must be > 0, at most 2^62")
    moved = _SCALING * (grid.scale * sensitivity + math.sqrt(length))
    return _root(grid.stretch, honest) / moved * (1 - _FLOATS)


def public_scale(bound: float, sites: int) -> float:
    """Steps for one unit of a block without noise, whose values are public anyway.

    Args:
        bound: Coordinates are expected within +-bound at each site; beyond it they saturate.
        sites: n, of which each adds one vector.

    Raises:
        ValueError: The bound is not positive, or there is no site or too many.
    """
    if not 0 < bound < math.inf:
        raise ValueError(f"bound = {bound}: must be > 0 and finite")
    if not 1 <= sites < 2**31:
        raise ValueError(f"sites = {sites}: must be 1 to 2^31 - 1")
    return min(MAX_SCALE, (2**31 - 1) // sites / bound)


def slack(releases: int, sites: int, epsilon: float) -> tuple[float, float]:
    """What integer noise adds to the price of a whole run made for continuous Gaussians.

    Formal guarantee: a run of such releases, of any length up to 2^28 coordinates each and any
    stretch, is (epsilon + slack[0], delta + slack[1])-DP if the Gaussians with the noise
    multipliers of `accounted_multiplier` are (epsilon, delta)-DP. With A and T of step 6 of the
    module's text, slack[0] = 2A and slack[1] = (e^A - 1) + (1 + e^(epsilon + 2A)) T, for e^A delta
    is at most delta + (e^A - 1).

    Args:
        releases: Noised blocks in the run.
        sites: n, at least the number of honest ones in any sum.
        epsilon: Of the price: a distance of two distributions counts e^epsilon times on one side.

    Returns:
        What to add to epsilon, and what to add to delta.

    Raises:
        ValueError: An argument is out of its range, or so much slack is no guarantee.
    """
    if releases < 0 or sites < 1 or not 0 <= epsilon < math.inf:
        raise ValueError(
            f"releases, sites, epsilon = {releases}, {sites}, {epsilon}: must be at least 0, 1 and "
            "0, and finite"
        )
    narrowest = variance(0) / (MAX_STRETCH**2 + 1)
    # A discrete Gaussian of a lesser stretch, and of more than two sites, has less.
    joining = (sites - 1) * ripple(variance(0) / 2)
    apart = releases * MAX_WORDS * (ripple(SMOOTHING) + sites * ripple(narrowest) + joining)
    distance = releases * MAX_WORDS * sites * DISTANCE
    more = 2 * apart * (1 + _FLOATS)
    # The exponent is far below that of the largest float where the bound says anything at all.
    share = (1 + math.exp(min(700.0, epsilon + more))) * distance + math.expm1(apart)
    if not more < 1 or not share < 1:
        raise ValueError(
            f"releases = {releases}: the slack of integer noise is ({more:g}, {share:g}), which is "
            "no guarantee; make fewer releases or lower epsilon"
        )
    return more, share * (1 + _FLOATS)


def _root(stretch: int, honest: int) -> float:
    """sqrt(V - 9): the standard deviation that counts as continuous, in steps."""
    return math.sqrt(honest * variance(stretch) - SMOOTHING)


def _check(sensitivity: float, length: int, honest: int) -> None:
    if not 0 < sensitivity < math.inf:
        raise ValueError(f"sensitivity = {sensitivity}: must be > 0 and finite")
    if not 1 <= length <= MAX_WORDS:
        raise ValueError(f"length = {length}: must be 1 to {MAX_WORDS} coordinates")
    if honest < 2:
        raise ValueError(
            f"honest = {honest}: must be at least 2, for each site knows its own noise; raise n_min"
        )
