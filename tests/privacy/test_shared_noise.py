"""The grid gives the noise that is accounted for, and the slack covers what integers change.

Statistical tests run on fixed coins; each has a false-alarm rate of at most 1e-7 over the keys.
"""

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from scipy import stats

from fedveil.config import ConfigError
from fedveil.privacy import discrete, shared_noise
from fedveil.privacy.discrete import DISTANCE, MAX_STRETCH, add_noise, ripple, sigma, variance
from fedveil.privacy.noise import Coins
from fedveil.privacy.secagg.encoding import MAX_WORDS
from fedveil.privacy.secagg.quantise import dequantise, quantise, saturation
from fedveil.privacy.secagg.terms import MAX_SCALE, Numbers
from fedveil.privacy.shared_noise import (
    Grid,
    accounted_multiplier,
    choose_grid,
    public_scale,
    slack,
)

ALARM = 1e-7

multipliers = st.floats(1e-3, 50) | st.floats(0.3, 3)
sensitivities = st.floats(1e-3, 1e6) | st.floats(1e-300, 1e300)
lengths = st.integers(1, MAX_WORDS) | st.integers(1, 50)
honests = st.integers(2, 255)


def root(square: int, *, up: bool) -> Fraction:
    """The square root of a whole number to 2^-200, rounded up or down."""
    return Fraction(math.isqrt(square << 400) + up, 1 << 200)


def multiplier(grid: Grid, sensitivity: float, length: int, honest: int) -> Fraction:
    """sqrt(V - 9) / ((1 + 2^-22) (scale C + sqrt(d))), rounded down, in rational numbers."""
    moved = Fraction(grid.scale) * Fraction(sensitivity) + root(length, up=True)
    noise = root(honest * 2**20 * (grid.stretch**2 + 1) - 9, up=False)
    return noise / (moved * (1 + Fraction(1, 1 << 22)))


class TestChooseGrid:
    @given(multipliers, sensitivities, lengths, honests)
    @example(1.0, 1.0, MAX_WORDS, 2)
    @example(22.6, 1.0, MAX_WORDS, 2)
    def test_the_noise_is_never_less_than_asked(
        self, noise_multiplier: float, sensitivity: float, length: int, honest: int
    ) -> None:
        try:
            grid = choose_grid(noise_multiplier, sensitivity, length, honest)
        except ConfigError:
            assume(False)
        accounted = accounted_multiplier(grid, sensitivity, length, honest)
        assert accounted >= noise_multiplier
        exact = multiplier(grid, sensitivity, length, honest)
        assert exact >= Fraction(accounted)
        assert exact < Fraction(noise_multiplier) * (1 + Fraction(1, 10**10))  # nor wasted

    @given(
        st.floats(2.0**-1074, MAX_SCALE), st.integers(0, MAX_STRETCH),
        st.floats(2.0**-1074, 1e308), lengths, honests,
    )  # fmt: skip
    def test_what_is_accounted_for_is_never_more_than_there_is(
        self, scale: float, stretch: int, sensitivity: float, length: int, honest: int
    ) -> None:
        found = accounted_multiplier(Grid(scale, stretch), sensitivity, length, honest)
        assert Fraction(found) <= multiplier(Grid(scale, stretch), sensitivity, length, honest)

    def test_by_hand(self) -> None:
        # d = 1, z = 1, h = 2: sqrt(2 * 2^20 - 9) = 1448.1516 > 512 without a stretch.
        grid = choose_grid(1.0, 1.0, 1, 2)
        assert grid.stretch == 0
        assert grid.sigma == 1024
        assert grid.scale == pytest.approx(1448.1516 / (1 + 2**-22) - 1, rel=1e-6)
        # d = 100, z = 2, h = 4: V >= 9 + (512 * 10 * 2)^2 = 104857609 = 4 * 2^20 * 25.00000215:
        # k^2 + 1 >= 25.000002, so k = 5 (26) and sqrt(V - 9) / z = 5221.38...
        grid = choose_grid(2.0, 4.0, 100, 4)
        assert grid.stretch == 5
        assert grid.sigma == 1024 * math.sqrt(26)
        size = math.sqrt(4 * 2**20 * 26 - 9) / 2
        assert grid.scale == pytest.approx((size - 10) / 4, rel=1e-6)

    @given(st.floats(0.1, 10), st.integers(1, 10**7), honests)
    def test_the_least_stretch_with_which_rounding_costs_little(
        self, noise_multiplier: float, length: int, honest: int
    ) -> None:
        grid = choose_grid(noise_multiplier, 1e3, length, honest)

        def share(stretch: int) -> float:
            whole = math.sqrt(honest * variance(stretch) - 9) / noise_multiplier
            return 512 * math.sqrt(length) / whole

        assert share(grid.stretch) <= 1 + 1e-9 or grid.stretch == MAX_STRETCH
        assert grid.stretch == 0 or share(grid.stretch - 1) > 1 - 1e-9

    @pytest.mark.parametrize(("noise_multiplier", "fits"), [(22.6, True), (22.7, False)])
    def test_refuses_more_noise_than_rounding_leaves(
        self, noise_multiplier: float, fits: bool
    ) -> None:
        # sqrt(2) * 1024 * sqrt(65537) / sqrt(2^28) = 22.627
        if fits:
            assert choose_grid(noise_multiplier, 1.0, MAX_WORDS, 2).stretch == MAX_STRETCH
            return
        with pytest.raises(ConfigError, match=r"takes less than 22\.6276 with 2 honest sites; ask"):
            choose_grid(noise_multiplier, 1.0, MAX_WORDS, 2)

    @pytest.mark.parametrize(("noise_multiplier", "sensitivity"), [(1.0, 1e-18), (1e-320, 1.0)])
    def test_refuses_a_grid_that_is_too_fine(
        self, noise_multiplier: float, sensitivity: float
    ) -> None:
        with pytest.raises(ConfigError, match=r"more than 2\^62; release larger values"):
            choose_grid(noise_multiplier, sensitivity, 10, 3)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0.0, 1.0, 1, 2), "noise_multiplier = 0.0: must be > 0"),
            ((math.inf, 1.0, 1, 2), "noise_multiplier = inf: must be > 0"),
            ((math.nan, 1.0, 1, 2), "noise_multiplier = nan: must be > 0"),
            ((1.0, 0.0, 1, 2), "sensitivity = 0.0: must be > 0"),
            ((1.0, math.inf, 1, 2), "sensitivity = inf: must be > 0"),
            ((1.0, 1.0, 0, 2), "length = 0: must be 1 to"),
            ((1.0, 1.0, MAX_WORDS + 1, 2), "must be 1 to 268435456"),
            ((1.0, 1.0, 1, 1), "honest = 1: must be at least 2"),
        ],
    )
    def test_refuses_what_is_out_of_range(
        self, arguments: tuple[float, float, int, int], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            choose_grid(*arguments)
        if not message.startswith("noise"):
            with pytest.raises(ValueError, match=message):
                accounted_multiplier(Grid(1.0, 0), *arguments[1:])

    @pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, 2.0**62 * 1.01])
    def test_a_scale_that_is_none_has_no_multiplier(self, scale: float) -> None:
        with pytest.raises(ValueError, match="scale = "):
            accounted_multiplier(Grid(scale, 0), 1.0, 1, 2)


class TestRoom:
    """Values that are many sensitivities large need a coarser grid."""

    @given(multipliers, st.floats(1e-3, 1e6), lengths, honests, st.floats(1e-6, 1e12))
    @example(0.5, 1.0, 100, 8, 50.0)
    @example(1.0, 1.0, MAX_WORDS, 2, 1e-3)
    def test_the_noise_is_never_less_than_asked_and_the_grid_never_finer(
        self, noise_multiplier: float, sensitivity: float, length: int, honest: int, most: float
    ) -> None:
        try:
            grid = choose_grid(noise_multiplier, sensitivity, length, honest, most)
        except ConfigError:
            with pytest.raises(ConfigError):  # which room has nothing to do with
                choose_grid(noise_multiplier, sensitivity, length, honest)
            return
        assert grid.scale <= most * (1 + 1e-12)
        assert accounted_multiplier(grid, sensitivity, length, honest) >= noise_multiplier
        assert multiplier(grid, sensitivity, length, honest) >= Fraction(noise_multiplier)

    @given(multipliers, st.floats(1e-3, 1e6), lengths, honests)
    def test_without_a_limit_it_is_as_before(
        self, noise_multiplier: float, sensitivity: float, length: int, honest: int
    ) -> None:
        try:
            grid = choose_grid(noise_multiplier, sensitivity, length, honest)
        except ConfigError:
            assume(False)
        enough = grid.scale * (1 + 1e-9)
        assert choose_grid(noise_multiplier, sensitivity, length, honest, enough) == grid

    @given(st.floats(0.3, 3), st.integers(1, 10**5), honests, st.floats(1.0, 1e4))
    def test_a_finer_one_that_fits_would_have_been_taken(
        self, noise_multiplier: float, length: int, honest: int, most: float
    ) -> None:
        grid = choose_grid(noise_multiplier, 1.0, length, honest, most)
        free = choose_grid(noise_multiplier, 1.0, length, honest)
        if grid.stretch == free.stretch:
            return
        size = math.sqrt(honest * variance(grid.stretch + 1) - 9) / noise_multiplier
        assert size - math.sqrt(length) > most * (1 - 1e-5)

    def test_by_hand(self) -> None:
        # d = 100, z = 2, h = 4: with stretch k it is sqrt(4 * 2^20 * (k^2 + 1) - 9) / 2 - 10
        # steps: 1014 of k = 0, 1438.15 of k = 1, ..., 5211.38 of k = 5, which is taken.
        assert choose_grid(2.0, 1.0, 100, 4, 6000.0) == choose_grid(2.0, 1.0, 100, 4)
        coarser = choose_grid(2.0, 1.0, 100, 4, 1500.0)
        assert coarser.stretch == 1
        assert coarser.scale == pytest.approx(1438.15, abs=0.01)
        # Where not even the least noise fits, it is used on the grid that does: 2 is asked, and
        # 2 * 1024 / (50 + 10) = 34.1 is there.
        coarsest = choose_grid(2.0, 1.0, 100, 4, 50.0)
        assert (coarsest.stretch, coarsest.scale) == (0, 50.0)
        assert accounted_multiplier(coarsest, 1.0, 100, 4) == pytest.approx(2048 / 60, rel=1e-4)


class TestTheSum:
    @pytest.mark.parametrize(("noise_multiplier", "length"), [(1.0, 1 << 18), (0.3, 40_000)])
    def test_has_the_variance_of_the_honest_noises_that_is_accounted_for(
        self, noise_multiplier: float, length: int
    ) -> None:
        """All honest sites and no other, in units: from the accounted variance up, by chi-squared.

        What rounding and the float's room add is known, and above it there is no more than chance.
        """
        numbers, sensitivity = Numbers(n=5, t=4, n_min=4, t_collude=1), 2.5
        honest = numbers.n_min - numbers.t_collude
        grid = choose_grid(noise_multiplier, sensitivity, length, honest)
        total = np.zeros(length, dtype="<u4")
        for site in range(honest):
            bound = saturation(numbers.n, grid.sigma)
            words = quantise(np.zeros(length), grid.scale, bound, Coins(bytes([site]) * 32))
            add_noise(words, grid.stretch, Coins(bytes([64 + site]) * 32))
            total += words
        found = dequantise(total, grid.scale) / (noise_multiplier * sensitivity)
        low, high = stats.chi2.ppf([ALARM / 2, 1 - ALARM / 2], length) / length
        extra = (1 + math.sqrt(length) / (grid.scale * sensitivity)) ** 2
        assert low < float((found**2).mean()) / extra < high + 1e-5
        assert low > 0.962  # 0.98^2 = 0.9604: two per cent less noise at each site would be seen

    @given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.integers(0, 255), st.data())
    def test_moves_no_further_than_the_sensitivity_that_is_accounted_for(
        self, values: list[float], coin: int, data: st.DataObject
    ) -> None:
        """A unit's contribution at its bound, added under equal coins."""
        length, sensitivity = len(values), 0.7
        grid = choose_grid(1.0, sensitivity, length, 2)
        unit = np.array(data.draw(st.lists(st.floats(-1, 1), min_size=length, max_size=length)))
        assume(np.linalg.norm(unit) > 1e-6)
        unit *= sensitivity / np.linalg.norm(unit) * (1 - 1e-12)
        without = np.array(values)
        bound = saturation(3, grid.sigma)
        moved = np.zeros(length)
        for sign, vector in ((1, without + unit), (-1, without)):
            words = quantise(vector, grid.scale, bound, Coins(bytes([coin]) * 32))
            moved += sign * words.view(np.int32).astype(float)
        noise = math.sqrt(2 * variance(grid.stretch) - 9)
        assert noise / np.linalg.norm(moved) >= accounted_multiplier(grid, sensitivity, length, 2)


@cache
def of_two_sites() -> tuple[np.ndarray, np.ndarray]:
    """Values and chances of the sum of two unstretched noises, as the sampler draws them."""
    base = np.array(discrete._weights(), dtype=float) / 2.0**128
    base = base[(1 << 14) - 8000 : (1 << 14) + 8001]  # what is cut off is below 1e-13
    found = np.convolve(base, base)
    return np.arange(-16000, 16001), found


class TestThePrice:
    """On one coordinate, where the exact privacy loss can be summed: it is the Gaussian's."""

    @pytest.mark.parametrize("moved", [400, 1449, 5000])
    @pytest.mark.parametrize("rate", [1.0, 0.2, 0.01])
    @pytest.mark.parametrize("epsilon", [0.05, 1.0, 3.0])
    @pytest.mark.parametrize("added", [True, False])
    def test_covers_the_integer_noise(
        self, moved: int, rate: float, epsilon: float, added: bool
    ) -> None:
        _, chances = of_two_sites()
        without = np.append(chances, np.zeros(moved))
        with_it = (1 - rate) * without + rate * np.append(np.zeros(moved), chances)
        first, second = (with_it, without) if added else (without, with_it)
        found = float(np.maximum(first - math.exp(epsilon) * second, 0).sum())
        width = math.sqrt(2 * variance(0) - 9)
        continuous = _divergence(width, moved, rate, epsilon, added=added)
        assert found <= continuous + 1e-12
        # And it is no looser than the 9 squared steps and the steps themselves.
        assert found >= continuous * (1 - 1e-3) - 1e-12


def _divergence(width: float, moved: int, rate: float, epsilon: float, *, added: bool) -> float:
    """Hockey-stick divergence of (1 - q) N(0) + q N(moved) from N(0), or the other way round."""
    factor = math.exp(epsilon)
    weight = (factor - 1 + rate) / rate if added else (1 / factor - 1 + rate) / rate
    if weight <= 0:
        return 0.0  # nowhere is N(0) so much likelier
    edge = (math.log(weight) * width**2 + moved**2 / 2) / moved
    side = stats.norm.sf if added else stats.norm.cdf
    without, shifted = float(side(edge / width)), float(side((edge - moved) / width))
    mixed = (1 - rate) * without + rate * shifted
    return mixed - factor * without if added else without - factor * mixed


class TestSmoothing:
    @pytest.mark.parametrize(("whole", "width"), [(1.05, 1.0), (1.2, 1.1), (4.0, 1.0)])
    def test_a_rounded_gaussian_is_so_close_to_the_discrete_one(
        self, whole: float, width: float
    ) -> None:
        """Step 4 with r narrow enough for floats to see its slack, by integration."""
        steps = np.arange(-300, 301)
        density = np.arange(-2400, 2400) / 100  # the trapezoid rule errs by e^-(thousands)
        gaussian = np.exp(-(density**2) / (2 * (whole - width)))
        kernel = np.exp(-((steps[:, None] - density) ** 2) / (2 * width))
        found = (kernel / kernel.sum(axis=0) * gaussian).sum(axis=1)
        exact = np.exp(-(steps**2) / (2 * whole))
        ratio = np.log((found / found.sum())[285:316] / (exact / exact.sum())[285:316])
        assert np.abs(ratio).max() < ripple(width)
        # A wider Gaussian averages over the ripple: the bound is far from it then.
        assert whole > 2 or np.abs(ratio).max() > ripple(width) / 10


class TestSlack:
    @pytest.mark.parametrize(("releases", "sites", "epsilon"), [(1, 2, 0.0), (4096, 255, 10.0)])
    def test_is_the_formula(self, releases: int, sites: int, epsilon: float) -> None:
        with localcontext() as context:
            context.prec = 60
            square = Decimal(str(math.pi)) ** 2  # 16 digits are enough
            ripples = [
                5 * (-2 * square * width).exp() * times
                for width, times in (
                    (Decimal(9), 1),
                    (Decimal(2**20) / 65537, sites),
                    (Decimal(2**19), sites - 1),
                )
            ]
            apart = releases * 2**28 * sum(ripples, Decimal(0))
            distance = releases * 2**28 * sites * Decimal(DISTANCE)
            more = 2 * apart
            share = apart.exp() - 1 + (1 + (Decimal(epsilon) + more).exp()) * distance
        found = slack(releases, sites, epsilon)
        assert float(more) <= found[0] * (1 + 1e-11)
        assert found == pytest.approx((float(more), float(share)), rel=1e-9, abs=0)

    def test_is_negligible_for_the_longest_run_and_never_nothing(self) -> None:
        more, share = slack(64 * 4096, 255, 10.0)
        assert 0 < more < 1e-60
        assert 0 < share < 1e-12

    @pytest.mark.parametrize("sites", [2, 255])
    def test_counts_the_stretch_of_every_site(
        self, sites: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Far below the smoothing's share, so with that out of the way."""
        monkeypatch.setattr(shared_noise, "SMOOTHING", 10**6)
        least = 2 * 3 * 2**28 * sites * ripple(variance(0) / (MAX_STRETCH**2 + 1))
        assert slack(3, sites, 1.0)[0] == pytest.approx(least, rel=1e-9, abs=0)

    def test_of_no_release_is_nothing(self) -> None:
        assert slack(0, 10, 1.0) == (0.0, 0.0)

    @given(st.integers(1, 10**6), st.integers(2, 255), st.floats(0, 10))
    def test_grows_with_everything(self, releases: int, sites: int, epsilon: float) -> None:
        least = slack(releases, sites, epsilon)
        for other in (
            slack(releases + 1, sites, epsilon),
            slack(releases, sites + 1, epsilon),
            slack(releases, sites, epsilon + 0.5),
        ):
            assert other[0] >= least[0]
            assert other[1] > least[1]

    @pytest.mark.parametrize(("releases", "epsilon"), [(10**30, 0.0), (100, 80.0), (1, 1e9)])
    def test_is_refused_where_it_is_no_guarantee(self, releases: int, epsilon: float) -> None:
        with pytest.raises(ValueError, match="which is no guarantee; make fewer releases"):
            slack(releases, 10, epsilon)

    @pytest.mark.parametrize(
        ("releases", "sites", "epsilon"),
        [(-1, 2, 1.0), (1, 0, 1.0), (1, 2, -0.1), (1, 2, math.inf), (1, 2, math.nan)],
    )
    def test_refuses_what_is_out_of_range(self, releases: int, sites: int, epsilon: float) -> None:
        with pytest.raises(ValueError, match="releases, sites, epsilon = "):
            slack(releases, sites, epsilon)


class TestPublicScale:
    @given(st.floats(1e-6, 1e12), st.integers(1, 255))
    def test_the_sum_of_values_at_the_bound_does_not_wrap(self, bound: float, sites: int) -> None:
        scale = public_scale(bound, sites)
        assert 0 < scale <= MAX_SCALE
        words = quantise(np.array([bound, -bound]), scale, saturation(sites, 0.0), Coins(bytes(32)))
        total = dequantise(words * np.uint32(sites), scale)
        assert total == pytest.approx(
            [sites * bound, -sites * bound], rel=1e-6, abs=1.01 * sites / scale
        )

    @given(st.floats(1e-6, 1e12), st.integers(1, 255))
    def test_uses_all_the_room_there_is(self, bound: float, sites: int) -> None:
        scale = public_scale(bound, sites)
        assert scale == MAX_SCALE or scale * bound * sites > (2**31 - 1) - sites - 1

    def test_by_hand(self) -> None:
        assert public_scale(2.0, 10) == 107374182.0  # floor(214748364.7) / 2
        assert public_scale(1e-12, 10) == 2.0**62

    @pytest.mark.parametrize(("bound", "sites"), [(0.0, 3), (math.inf, 3), (math.nan, 3), (1.0, 0)])
    def test_refuses_what_is_out_of_range(self, bound: float, sites: int) -> None:
        with pytest.raises(ValueError, match=r"(bound|sites) = "):
            public_scale(bound, sites)


def distributed_rdp(order: np.ndarray, d2: float, d1: float, tau: float, length: int) -> np.ndarray:
    """Renyi divergence of the distributed discrete Gaussian without sampling, at each order.

    Kairouz, Liu and Steinke 2021, section 3; a second opinion beside the module's argument.

    Args:
        order: [a] Renyi orders above 1.
        d2: L2 distance of two neighbouring sums over the noise's standard deviation.
        d1: Their L1 distance, likewise.
        tau: Distance of a sum of discrete Gaussians from one, a coordinate.
        length: Coordinates.
    """
    bounds = (
        order / 2 * d2**2 + tau * length,
        order / 2 * (d2**2 + 2 * d1 * tau + tau**2 * length),
        order / 2 * (d2 + math.sqrt(length) * tau) ** 2,
    )
    least: np.ndarray = np.minimum.reduce(bounds)
    return least


class TestDistributedRdp:
    @pytest.mark.parametrize(
        ("bits", "expected"), [(None, 5.222), (20, 5.222), (18, 5.223), (16, 5.234)]
    )
    def test_known_values(self, bits: int | None, expected: float) -> None:
        """d = 2^20, z = 1, delta = 1e-6, n = 100, C = 1, four standard deviations in the words.

        The grid and the rounded norm are those of Kairouz et al. 2021; two implementations agree
        to 0.0012.
        """
        length, sites = 1 << 20, 100
        orders = np.arange(1.01, 60, 0.01)
        norm, tau = 1.0, 0.0
        if bits is not None:
            step = 8 * math.sqrt(sites**2 / length / 4 + 1) / 2**bits
            # The rounded norm with their beta = exp(-1/2), for which sqrt(2 log(1 / beta)) = 1.
            root = step * math.sqrt(length)
            norm = math.sqrt(1 + root**2 / 4 + step * (1 + root / 2))
            own = (1 / step) ** 2 / sites
            tau = 10 * sum(math.exp(-2 * math.pi**2 * own * k / (k + 1)) for k in range(1, sites))
        rdp = distributed_rdp(orders, norm, math.sqrt(length) * norm, tau, length)
        # Canonne, Kamath and Steinke 2020, proposition 12.
        epsilons = rdp + np.log1p(-1 / orders) - np.log(1e-6 * orders) / (orders - 1)
        assert float(epsilons.min()) == pytest.approx(expected, abs=0.0012)

    def test_is_the_least_of_three_by_hand(self) -> None:
        two = np.array([2.0])
        # Of the first: 1.4, 1.44 and 1.44; of the second: 1.4, 1.14 and 1.44.
        assert distributed_rdp(two, 1.0, 2.0, 0.1, 4) == pytest.approx(1.4)
        assert distributed_rdp(two, 1.0, 0.5, 0.1, 4) == pytest.approx(1.14)
        assert distributed_rdp(two, 0.1, 2.0, 0.1, 4) == pytest.approx(0.09)


def test_a_grid_says_what_each_site_adds() -> None:
    assert Grid(1.0, 3).sigma == sigma(3)
