"""Rounding to the grid: its guarantee with equal coins, its mean, and where it saturates.

Statistical tests run on fixed coins, so that they answer alike every time; each single check has a
false-alarm rate of 1e-7 over the choice of the key.
"""

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from fedveil.privacy.noise import Coins
from fedveil.privacy.secagg import quantise as module
from fedveil.privacy.secagg.errors import UnsafeNumbersError
from fedveil.privacy.secagg.quantise import dequantise, quantise, saturation

KEY = bytes(range(32))
ALARM = 1e-7
Z = float(stats.norm.isf(ALARM / 2))  # 5.33 standard errors
BLOCK = module._BLOCK
BOUND = 1 << 20


def steps(
    values: np.ndarray, scale: float = 1.0, bound: int = BOUND, key: bytes = KEY
) -> np.ndarray:
    """[d] int64: what is summed, as signed numbers."""
    return quantise(values, scale, bound, Coins(key)).view(np.int32).astype(np.int64)


def draws(count: int, key: bytes = KEY) -> np.ndarray:
    """[count] uint32: the coins that one call takes, one a coordinate, count within a slice."""
    own = Coins(Coins(key).words(4).tobytes())  # of the first slice
    return own.words((count + 1) // 2).view(np.uint32)[:count]


def awkward() -> st.SearchStrategy[float]:
    """Reals by whole numbers and halves, just below zero, beyond the bound, and any others."""
    near = st.builds(
        lambda whole, off: whole + off,
        st.integers(-5, 5),
        st.sampled_from([0.0, 0.5, -0.5, 2.0**-32, -(2.0**-32), 2.0**-52, -(2.0**-53), 1e-12]),
    )
    tiny = st.sampled_from([-5e-324, 5e-324, -1e-20, -(2.0**-54), -0.0, 0.0])
    large = st.sampled_from([BOUND + 0.5, -BOUND - 0.5, BOUND - 0.5, 0.5 - BOUND, 1e15, -1e15])
    return near | tiny | large | st.floats(-100, 100) | st.floats(-1e12, 1e12)


@st.composite
def neighbours(draw: st.DrawFn, kind: type[np.floating]) -> tuple[np.ndarray, np.ndarray]:
    """Two vectors of one length: alike, a little apart in some coordinates, or strangers."""
    first = np.array(draw(st.lists(awkward(), min_size=1, max_size=9)), dtype=kind)
    moves = st.sampled_from([0.0, 1e-300, -1e-16, 2.0**-33, -0.25, 1.0, -3.0]) | awkward()
    second = first + draw(hnp.arrays(np.float64, len(first), elements=moves))
    return first, second.astype(kind)


class TestEqualCoins:
    """The formal guarantee: |q(x) - q(y)|_2 <= scale |x - y|_2 + sqrt(d), whatever the coins."""

    @pytest.mark.parametrize("kind", [np.float64, np.float32])
    @given(data=st.data(), key=st.binary(min_size=32, max_size=32))
    def test_bring_neighbours_no_further_apart_than_promised(
        self, kind: type[np.floating], data: st.DataObject, key: bytes
    ) -> None:
        one, other = data.draw(neighbours(kind))
        scale = data.draw(st.sampled_from([1.0, 0.37, 1e-3, 65536.0, 1e5 / 3]))
        apart = steps(one, scale, key=key) - steps(other, scale, key=key)
        distance = np.linalg.norm(one.astype(float) - other.astype(float))
        # A product below 2^31 is rounded by at most 2^-23, twice.
        allowed = scale * distance + math.sqrt(len(one)) * (1 + 2.0**-22)
        assert np.linalg.norm(apart) <= allowed * (1 + 1e-12)

    @given(data=st.data(), key=st.binary(min_size=32, max_size=32))
    def test_exactly_so_in_every_coordinate(self, data: st.DataObject, key: bytes) -> None:
        """With a scale that is a power of two, in whole and rational numbers."""
        one, other = data.draw(neighbours(np.float64))
        scale = data.draw(st.sampled_from([1.0, 0.125, 4096.0]))
        apart = steps(one, scale, key=key) - steps(other, scale, key=key)
        for found, x, y in zip(apart.tolist(), one.tolist(), other.tolist(), strict=True):
            # A fraction next to 1 has no bits below 2^-53.
            allowed = abs(Fraction(x) - Fraction(y)) * Fraction(scale) + 1 + Fraction(2) ** -53
            assert abs(found) <= allowed

    @given(st.lists(awkward(), min_size=2, max_size=9), st.integers(0, 9))
    def test_keep_the_order_of_values(self, values: list[float], coin: int) -> None:
        key = bytes([coin]) * 32
        ordered = [int(steps(np.full(len(values), value), key=key)[-1]) for value in sorted(values)]
        assert ordered == sorted(ordered)

    def test_can_bring_them_nearly_so_far_apart(self) -> None:
        """The worst case: each coordinate of the one just above its coin, of the other below."""
        count, whole = 4096, 3
        coins = draws(count) * 2.0**-32
        above, below = coins + 2.0**-40, coins - 2.0**-40
        for extra in (0, whole):
            apart = steps(above + extra) - steps(below)
            assert (apart == extra + 1).all()
            distance = float(np.linalg.norm(above + extra - below))
            limit = distance + math.sqrt(count)
            assert limit * (1 - 1e-9) <= np.linalg.norm(apart) <= limit

    def test_say_nothing_of_another_coordinate(self) -> None:
        """One coordinate changed moves no other: its coin is its own."""
        values = np.linspace(-9, 9, 101)
        for place in (0, 1, 50, 100):
            changed = values.copy()
            changed[place] += 2
            assert np.flatnonzero(steps(changed) - steps(values)).tolist() == [place]


class TestRounding:
    @given(st.lists(awkward(), min_size=1, max_size=9), st.integers(0, 255))
    @example([-5e-324], 0)
    def test_goes_to_a_neighbouring_step_or_the_bound(self, values: list[float], coin: int) -> None:
        found = steps(np.array(values), key=bytes([coin]) * 32)
        for step, value in zip(found.tolist(), values, strict=True):
            clamped = max(Fraction(-BOUND), min(Fraction(BOUND), Fraction(value)))
            assert math.floor(clamped) <= step <= math.ceil(clamped)

    def test_leaves_whole_numbers_alone(self) -> None:
        values = np.arange(-1000, 1001, dtype=np.float64)
        assert np.array_equal(steps(values), values)

    @pytest.mark.parametrize("kind", [np.float32, np.float64])
    @pytest.mark.parametrize("count", [1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
    def test_is_up_where_the_coin_is_below_the_fraction(
        self, kind: type[np.floating], count: int
    ) -> None:
        values = (np.arange(count) % 8191 / 37 - 100).astype(kind)
        scaled = values.astype(np.float64) * 2.5
        up = draws(count) * 2.0**-32 < scaled - np.floor(scaled)
        assert np.array_equal(steps(values, 2.5), np.floor(scaled) + up)

    def test_takes_no_coins_of_nothing(self) -> None:
        assert quantise(np.zeros(0), 1.0, BOUND, Coins(KEY)).shape == (0,)

    @pytest.mark.parametrize("kind", [np.float32, np.float64])
    def test_leaves_the_values_as_they_were(self, kind: type[np.floating]) -> None:
        values = np.array([0.5, -1.25, 1e9], dtype=kind)
        steps(values)
        assert values.tolist() == [0.5, -1.25, 1e9]

    def test_gives_words_modulo_2_to_the_32(self) -> None:
        words = quantise(np.array([-1.0, 1.0, -1e9, 1e9]), 1.0, BOUND, Coins(KEY))
        assert words.dtype == np.dtype("<u4")
        assert words.tolist() == [2**32 - 1, 1, 2**32 - BOUND, BOUND]

    @pytest.mark.parametrize("kind", [np.float32, np.float64])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("place", [0, 7, BLOCK, BLOCK + 4])
    def test_refuses_what_is_not_finite(
        self, kind: type[np.floating], bad: float, place: int
    ) -> None:
        values = np.zeros(BLOCK + 5, dtype=kind)
        values[place] = bad
        with pytest.raises(ValueError, match="not all finite"):
            quantise(values, 1.0, BOUND, Coins(KEY))

    @pytest.mark.parametrize("scale", [1.0, 1e300, 1.7e308])
    def test_no_finite_value_makes_it_fail_whatever_the_scale(self, scale: float) -> None:
        """A refusal or a warning would tell whether an un-noised value is beyond a bound."""
        values = np.array([0.9, 1.1, 1e300, -1e300, 1.79e308, 5e-324, -0.0])
        found = quantise(values, scale, BOUND, Coins(KEY)).view(np.int32)
        assert found[2:5].tolist() == [BOUND, -BOUND, BOUND]
        assert found[6] == 0


class TestTheMean:
    @pytest.mark.parametrize("value", [0.5, 0.25, 1e-3, 1 - 1e-3, -0.25, -7.125, 3.9])
    def test_is_the_value(self, value: float) -> None:
        """A binomial number of ups, to Z standard errors; a 180th of a step off would be seen."""
        count = 1 << 18
        fraction = value - math.floor(value)
        ups = int((steps(np.full(count, value)) - math.floor(value)).sum())
        error = math.sqrt(count * fraction * (1 - fraction))
        assert abs(ups - count * fraction) < Z * error
        if 0.1 < fraction < 0.9:
            assert 0.0055 * count > Z * error

    def test_of_all_equal_coordinates_at_a_hundred_sites_is_unbiased_and_nothing_wraps(
        self,
    ) -> None:
        """Each coordinate's sum is binomial: the whole to Z, the worst of all to Bonferroni's."""
        sites, count, value, scale = 100, 2048, 0.7123, 1000.0
        bound = saturation(sites, 50.0)
        words = np.zeros(count, dtype="<u4")
        for site in range(sites):
            words += quantise(np.full(count, value), scale, bound, Coins(bytes([site]) * 32))
        total = dequantise(words, scale)
        fraction = value * scale % 1
        error = math.sqrt(sites * fraction * (1 - fraction)) / scale  # of one coordinate
        assert abs(total.mean() - sites * value) < Z * error / math.sqrt(count)
        worst = float(stats.binom.isf(ALARM / count, sites, fraction)) - sites * fraction
        least = sites * fraction - float(stats.binom.ppf(ALARM / count, sites, fraction))
        assert (total - sites * value).max() * scale <= worst + 1e-6
        assert (sites * value - total).max() * scale <= least + 1e-6
        # The coordinates err for themselves: their variance is a sum of so many, to Z.
        assert abs(total.var() / error**2 - 1) < Z * math.sqrt(2 / count)

    @pytest.mark.parametrize("lag", [1, 2, 3, BLOCK])
    def test_is_reached_by_independent_coins(self, lag: int) -> None:
        """Pairs of coordinates at any distance go up and down together as often as not."""
        ups = steps(np.full(4 * BLOCK, 0.5))
        together = int((ups[lag:] == ups[:-lag]).sum())
        count = len(ups) - lag
        assert abs(together - count / 2) < Z * math.sqrt(count) / 2

    def test_is_reached_by_other_coins_in_every_run(self) -> None:
        values = np.full(256, 0.5)
        first, second = (quantise(values, 1.0, BOUND, Coins.from_system()) for _ in range(2))
        assert not np.array_equal(first, second)

    def test_is_reached_by_other_coins_in_every_call(self) -> None:
        coins, values = Coins(KEY), np.full(256, 0.5)
        first, second = (quantise(values, 1.0, BOUND, coins) for _ in range(2))
        assert not np.array_equal(first, second)


class TestSaturation:
    @pytest.mark.parametrize(
        ("sites", "sigma", "expected"),
        [
            (3, 0.0, 715827882),  # 2147483647 = 3 * 715827882 + 1
            (3, 1000.0, 715815882),
            (10, 100.5, 214747158),  # 214748364 - 1206
            (10, 0.01, 214748363),  # 214748364 - 0.12, rounded down
            (100, 1e6, 9474836),  # 21474836 - 12000000
        ],
    )
    def test_by_hand(self, sites: int, sigma: float, expected: int) -> None:
        assert saturation(sites, sigma) == expected

    @given(st.integers(1, 255), st.floats(0, 1e9))
    @example(255, 0.0)
    @example(3, 1 / 3)
    def test_leaves_room_for_twelve_standard_deviations_of_each_site(
        self, sites: int, sigma: float
    ) -> None:
        try:
            bound = saturation(sites, sigma)
        except UnsafeNumbersError:
            assert (2**31 - 1) // sites - 12 * sigma < 1
            return
        furthest = bound + Fraction(12) * Fraction(sigma)
        assert sites * furthest <= (2**31 - 1) + Fraction(1, 10**4)  # of the float's rounding
        assert sites * (furthest + 1) > (2**31 - 1) // sites * sites  # and no room is wasted

    @pytest.mark.parametrize("sites", [3, 10, 100])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_keeps_the_sum_of_saturated_vectors_with_their_noise(
        self, sites: int, sign: int
    ) -> None:
        sigma = 1000.25
        bound = saturation(sites, sigma)
        noise = np.array([sign * math.floor(12 * sigma)], dtype=np.int32).view("<u4")
        total = np.zeros(1, dtype="<u4")
        for _ in range(sites):
            total += quantise(np.array([sign * 1e30]), 1e3, bound, Coins(KEY)) + noise
        expected = sign * sites * (bound + math.floor(12 * sigma))
        assert dequantise(total, 1.0)[0] == expected
        assert abs(expected) > (2**31 - 1) - 2 * sites  # all the room there is

    @pytest.mark.parametrize("sites", [3, 10, 100])
    def test_a_step_more_at_each_site_would_wrap(self, sites: int) -> None:
        total = np.full(1, sites * (saturation(sites, 0.0) + 1), dtype="<u4")
        assert dequantise(total, 1.0)[0] < 0

    @pytest.mark.parametrize("sites", [3, 10, 100])
    @pytest.mark.parametrize("more", [1.0, 1.5, 1e300, math.inf, math.nan])
    def test_refuses_noise_that_fills_the_words(self, sites: int, more: float) -> None:
        with pytest.raises(UnsafeNumbersError, match=f"no room in 32 bits for {sites} sites"):
            saturation(sites, (2**31 - 1) // sites / 12 * more)

    def test_takes_noise_that_leaves_one_step(self) -> None:
        assert saturation(3, (715827882 - 1) / 12) == 1


class TestDequantise:
    @given(hnp.arrays(np.int32, st.integers(0, 20)), st.sampled_from([1.0, 0.5, 1024.0, 2.0**-20]))
    def test_gives_back_what_lies_on_the_grid(self, whole: np.ndarray, scale: float) -> None:
        values = whole / scale
        bound = 2**31 - 1
        clamped = np.maximum(whole, -bound) / scale
        found = dequantise(quantise(values, scale, bound, Coins(KEY)), scale)
        assert found.dtype == np.float64
        assert np.array_equal(found, clamped)

    def test_of_a_sum_across_zero_by_hand(self) -> None:
        words = np.array([2**32 - 5, 3], dtype="<u4") + np.array([2, 2**32 - 10], dtype="<u4")
        assert dequantise(words, 2.0).tolist() == [-1.5, -3.5]

    def test_of_the_furthest_words(self) -> None:
        words = np.array([0, 2**31 - 1, 2**31, 2**32 - 1], dtype="<u4")
        assert dequantise(words, 1.0).tolist() == [0, 2**31 - 1, -(2**31), -1]

    def test_of_three_sites_signs(self) -> None:
        for signs in product((-1.0, 1.0), repeat=3):
            total = np.zeros(1, dtype="<u4")
            for sign in signs:
                total += quantise(np.array([sign * 7.0]), 16.0, BOUND, Coins(KEY))
            assert dequantise(total, 16.0)[0] == 7 * sum(signs)


def test_float32_values_are_scaled_as_float64() -> None:
    """The product of two float32 would be off by up to 128 steps at 2^31."""
    values = np.linspace(-1, 1, 4099).astype(np.float32) / 3
    scale = float(2**30 - 1)
    found = quantise(values, scale, BOUND, Coins(KEY))
    assert (found == quantise(values.astype(np.float64), scale, BOUND, Coins(KEY))).all()


def test_a_whole_number_stays_whatever_the_coin(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zeros(Coins):
        def words(self, count: int) -> np.ndarray:
            return np.zeros(count, dtype=np.uint64)

    monkeypatch.setattr(module, "Coins", Zeros)
    found = quantise(np.array([-2.0, 0.0, 3.0, 3.5]), 1.0, BOUND, Coins(KEY))
    assert found.view(np.int32).tolist() == [-2, 0, 3, 4]


@pytest.mark.parametrize("total", [np.zeros(3), np.zeros(3, np.int64), np.zeros(3, np.int32)])
def test_a_sum_that_is_none_is_refused(total: np.ndarray) -> None:
    with pytest.raises(ValueError, match="must be uint32"):
        dequantise(total, 1.0)
