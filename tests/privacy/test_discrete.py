"""Integer noise: the table is the discrete Gaussian's, and every draw is what the table says.

Statistical tests run on fixed coins, so that they answer alike every time. Each has a false-alarm
rate of at most 1e-7 over the choice of the key.
"""

import math
import os
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedveil.privacy import discrete
from fedveil.privacy.discrete import (
    DISTANCE,
    MAX_STRETCH,
    add_noise,
    ripple,
    sigma,
    stretch_of,
    variance,
)
from fedveil.privacy.noise import Coins
from fedveil.privacy.secagg import slices
from fedveil.privacy.secagg.slices import SLICE

KEY = bytes(range(32))
ALARM = 1e-7
Z = float(stats.norm.isf(ALARM / 2))  # 5.33 standard errors
S, COLUMNS, MODE = 1024, 1 << 15, 1 << 14
LOW, FULL = 1 << 64, 1 << 113
BLOCK = 1 << 14
COUNT = 4 * SLICE + 17


class Scripted(Coins):
    """Coins whose calls give the given words, one list a call."""

    def __init__(self, *calls: Sequence[int]) -> None:
        super().__init__(KEY)
        self.calls = [np.array(call, dtype=np.uint64) for call in calls]

    def words(self, count: int) -> np.ndarray:
        call = self.calls.pop(0)
        assert len(call) == count
        return call


@cache
def columns() -> tuple[list[int], list[int]]:
    """Thresholds of 113 bits and aliases, as the sampler reads them."""
    table = discrete._table()
    highs = [entry >> 15 for entry in table.entries.tolist()]
    thresholds = [high * LOW + low for high, low in zip(highs, table.lows.tolist(), strict=True)]
    return thresholds, [entry % COLUMNS for entry in table.entries.tolist()]


@cache
def masses() -> list[int]:
    """What the columns give to -2^14, ..., 2^14 - 1 in units of 2^-128: whole numbers."""
    found = [0] * COLUMNS
    for column, (threshold, alias) in enumerate(zip(*columns(), strict=True)):
        found[column] += threshold
        found[alias] += FULL - threshold
    return found


@cache
def noise(stretch: int, count: int = COUNT, key: bytes = KEY) -> np.ndarray:
    """[count] int64: noise from fixed coins."""
    words = np.zeros(count, dtype="<u4")
    add_noise(words, stretch, Coins(key))
    return words.view(np.int32).astype(np.int64)


class TestTheTable:
    def test_is_so_close_to_the_discrete_gaussian(self) -> None:
        """The whole distance in whole numbers, against powers of one number by another route.

        In steps of 2^-400: exp(-1/2^21) by its series, then x^2-th powers by multiplication, each
        of which errs by at most a few steps; 33 thousand in a row err by less than 2^-360.
        """
        one = 1 << 400
        root, term = 0, one
        for order in range(1, 40):
            root += term
            term = -term // ((1 << 21) * order)
        sizes, size, factor = [], one, root
        for _ in range(3 * COLUMNS):
            sizes.append(size)
            size = size * factor >> 400
            factor = factor * (root * root >> 400) >> 400
        whole = 2 * sum(sizes) - one  # what is further out is below 2^-6000
        exact = [sizes[abs(column - MODE)] for column in range(COLUMNS)]
        inside = sum(abs(Fraction(mass, 1 << 128) - Fraction(size, whole)) for mass, size in zip(
            masses(), exact, strict=True
        ))  # fmt: skip
        distance = (inside + Fraction(whole - sum(exact), whole)) / 2
        assert Fraction(1, 1 << 117) < distance < Fraction(1, 1 << 114) - Fraction(1, 1 << 300)
        assert 2 * distance < Fraction(DISTANCE)  # of two draws

    def test_has_no_mass_too_much_or_too_little(self) -> None:
        found = masses()
        assert sum(found) == 1 << 128
        assert all(0 <= threshold < FULL for threshold in columns()[0])
        assert found[MODE + 1 :] == found[MODE - 1 : 0 : -1]  # symmetric
        assert found[0] == 0

    def test_has_the_variance_that_is_claimed(self) -> None:
        found = sum(mass * (column - MODE) ** 2 for column, mass in enumerate(masses()))
        assert abs(Fraction(found, 1 << 128) - S**2) < Fraction(1, 1 << 80)


class TestADraw:
    def test_compares_all_113_bits(self) -> None:
        """In every column: one below, at and above the threshold, in its high and its low bits."""
        thresholds, aliases = columns()
        words, lows, expected = [], [], []
        for column, (threshold, alias) in enumerate(zip(thresholds, aliases, strict=True)):
            for number in {
                threshold - LOW, threshold - 1, threshold, threshold + 1, threshold + LOW, 0,
                FULL - 1, threshold // LOW * LOW, threshold // LOW * LOW + LOW - 1,
            }:  # fmt: skip
                if not 0 <= number < FULL:
                    continue
                words.append(column << 49 | number // LOW)
                if number // LOW == threshold // LOW:
                    lows.append(number % LOW)
                expected.append(column if number < threshold else alias)
        assert len(lows) > 3 * 26_000
        found = discrete._draw(len(words), Scripted(words, lows))
        assert found.tolist() == expected

    def test_takes_no_further_word_without_a_tie(self) -> None:
        thresholds, _ = columns()
        words = [MODE + x << 49 | (thresholds[MODE + x] // LOW ^ 1) for x in range(-99, 100)]
        assert len(discrete._draw(len(words), Scripted(words))) == len(words)

    @pytest.mark.parametrize("low", [0, LOW - 1])
    def test_gives_a_tie_to_column_or_alias_by_the_low_bits(self, low: int) -> None:
        thresholds, aliases = columns()
        column = MODE + 3000
        assert 0 < thresholds[column] % LOW < LOW - 1
        word = column << 49 | thresholds[column] // LOW
        other = column << 49 | thresholds[column] // LOW - 1
        found = discrete._draw(3, Scripted([other, word, other], [low]))
        assert found.tolist() == [column, aliases[column] if low else column, column]

    @pytest.mark.parametrize("stretch", [0, 1, 7, MAX_STRETCH])
    def test_is_made_of_the_coins_by_the_book(self, stretch: int) -> None:
        """Every sample of a few blocks, in Python's whole numbers."""
        thresholds, aliases = columns()

        def base(coins: Coins, count: int) -> list[int]:
            found = []
            for word in coins.words(count).tolist():
                column, high = divmod(word, 1 << 49)
                assert high != thresholds[column] // LOW  # a tie has a chance of 2^-49
                found.append(column if high * LOW < thresholds[column] else aliases[column])
            return [column - MODE for column in found]

        own, expected = Coins(Coins(KEY).words(4).tobytes()), []
        for size in (BLOCK, BLOCK, 17):
            first = base(own, size)
            second = base(own, size) if stretch else [0] * size
            factor = stretch or 1
            expected += [factor * x + y for x, y in zip(first, second, strict=True)]
        assert noise(stretch, 2 * BLOCK + 17).tolist() == expected


class TestTheLaw:
    @pytest.mark.parametrize("stretch", [0, 1, 2, 31, MAX_STRETCH])
    def test_is_the_discrete_gaussians(self, stretch: int) -> None:
        """Chi-squared over 400 equally likely bins of whole numbers, both tails at 1e-7."""
        width, drawn = sigma(stretch), noise(stretch)
        edges = np.unique(np.round(stats.norm.ppf(np.arange(1, 400) / 400) * width)) + 0.5
        # The midpoint rule of the sums errs by 1 / (24 S^2), far less than can be seen.
        chances = np.diff(stats.norm.cdf(edges / width), prepend=0, append=1)
        counts = np.bincount(np.searchsorted(edges, drawn), minlength=len(chances))
        statistic = float(((counts - COUNT * chances) ** 2 / (COUNT * chances)).sum())
        low, high = stats.chi2.ppf([ALARM, 1 - ALARM], len(chances) - 1)
        assert low < statistic < high

    def test_of_a_base_draw_holds_value_by_value(self) -> None:
        """Chi-squared over each of the 2001 middle values and the rest, both tails at 1e-7."""
        drawn = noise(0)
        chances = np.array(masses(), dtype=float)[MODE - 1000 : MODE + 1001] / 2.0**128
        counts = np.bincount((drawn + 1000)[np.abs(drawn) <= 1000], minlength=2001)
        chances, counts = np.append(chances, 1 - chances.sum()), np.append(counts, 0)
        counts[-1] = COUNT - counts.sum()
        statistic = float(((counts - COUNT * chances) ** 2 / (COUNT * chances)).sum())
        low, high = stats.chi2.ppf([ALARM, 1 - ALARM], 2001)
        assert low < statistic < high

    @pytest.mark.parametrize("stretch", [2, 31, MAX_STRETCH])
    def test_knows_no_multiples_of_the_stretch(self, stretch: int) -> None:
        """Residues are uniform: chi-squared, both tails at 1e-7. k X1 alone would have but one."""
        counts = np.bincount(noise(stretch) % stretch, minlength=stretch)
        statistic = float(((counts - COUNT / stretch) ** 2).sum() / (COUNT / stretch))
        low, high = stats.chi2.ppf([ALARM, 1 - ALARM], stretch - 1)
        assert low < statistic < high

    @pytest.mark.parametrize("stretch", [0, 1, 31, MAX_STRETCH])
    @pytest.mark.parametrize("threshold", [3.0, 4.5])
    def test_has_tails_as_heavy_as_they_must_be(self, stretch: int, threshold: float) -> None:
        """Two-sided binomial bound at 1e-7."""
        edge = round(threshold * sigma(stretch)) + 0.5
        chance = 2 * stats.norm.sf(edge / sigma(stretch))
        low, high = stats.binom.ppf([ALARM / 2, 1 - ALARM / 2], COUNT, chance)
        assert low <= (np.abs(noise(stretch)) > edge).sum() <= high

    @pytest.mark.parametrize("stretch", [0, 1, 2, 100, MAX_STRETCH])
    def test_has_the_mean_and_the_variance_that_are_accounted_for(self, stretch: int) -> None:
        """Mean to 5.33 standard errors, variance by chi-squared; two per cent would be seen."""
        scaled = noise(stretch) / sigma(stretch)
        assert abs(scaled.mean()) < Z / math.sqrt(COUNT)
        low, high = stats.chi2.ppf([ALARM / 2, 1 - ALARM / 2], COUNT)
        assert low < float((scaled**2).sum()) < high
        assert low > 0.98 * COUNT
        assert high < 1.02 * COUNT


class TestIndependence:
    @pytest.mark.parametrize("stretch", [0, 3, MAX_STRETCH])
    @pytest.mark.parametrize("lag", [1, 2, 3, BLOCK - 1, BLOCK, BLOCK + 1, SLICE - 1, SLICE])
    def test_of_coordinates_blocks_and_slices(self, stretch: int, lag: int) -> None:
        """Correlations of values and of squares within 5.33 standard errors."""
        scaled = noise(stretch) / sigma(stretch)
        assert uncorrelated(scaled[lag:], scaled[:-lag])

    @pytest.mark.parametrize("stretch", [0, 3, MAX_STRETCH])
    def test_of_calls(self, stretch: int) -> None:
        coins, words = Coins(KEY), np.zeros((2, COUNT), dtype="<u4")
        for row in words:
            add_noise(row, stretch, coins)
        first, second = words.view(np.int32) / sigma(stretch)
        assert uncorrelated(first, second)

    @pytest.mark.parametrize("lag", [-1, 0, 1])
    def test_of_the_two_draws_of_a_noise(self, lag: int) -> None:
        """The parts of k X1 + X2 that a large k shows: the sum's rounded quotient, and its rest.

        X2 is far wider than k, so the rest is uniform whatever X1 is; were X1 = X2, it would be
        the rest of (k + 1) X1, which follows the quotient.
        """
        drawn = noise(MAX_STRETCH)
        rest = (drawn % MAX_STRETCH) - (MAX_STRETCH - 1) / 2
        quotient = np.roll(drawn // MAX_STRETCH, lag) / S
        assert uncorrelated(quotient, rest / rest.std())
        parity = quotient * S % 2 - 0.5
        assert uncorrelated(2 * parity, rest / rest.std(), squares=False)

    @pytest.mark.parametrize("stretch", [0, 3])
    def test_no_two_slices_have_equal_noise(self, stretch: int) -> None:
        drawn = noise(stretch)
        parts = [drawn[start : start + SLICE].tobytes() for start in range(0, 4 * SLICE, SLICE)]
        assert len(set(parts)) == 4

    def test_two_systems_coins_differ(self) -> None:
        words = np.zeros((2, 64), dtype="<u4")
        add_noise(words[0], 1, Coins.from_system())
        add_noise(words[1], 1, Coins.from_system())
        assert (words[0] != words[1]).any()


class TestAddNoise:
    @given(st.integers(0, 2**32 - 1), st.integers(0, MAX_STRETCH), st.integers(0, 40))
    def test_is_added_modulo_2_to_the_32_and_does_not_look_at_the_words(
        self, start: int, stretch: int, count: int
    ) -> None:
        words = np.arange(start, start + count, dtype=np.uint64).astype("<u4")
        before = words.astype(np.int64)
        add_noise(words, stretch, Coins(KEY))
        assert words.tolist() == ((before + noise(stretch, count)) % 2**32).tolist()

    @pytest.mark.parametrize("start", [0, 2**32 - 1, 2**31 - 1, 2**31])
    def test_wraps_both_ways(self, start: int) -> None:
        words = np.full(64, start, dtype="<u4")
        add_noise(words, MAX_STRETCH, Coins(KEY))
        moved = words.astype(np.int64) - start
        assert ((moved - noise(MAX_STRETCH, 64)) % 2**32 == 0).all()
        assert start not in (0, 2**32 - 1) or np.abs(moved).max() > 2**31

    @pytest.mark.parametrize("stretch", [0, 5])
    def test_is_the_same_on_one_core_and_on_many(
        self, stretch: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = []
        for cores in (1, 4):
            monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
            monkeypatch.setattr(slices, "_QUOTA", None)
            words = np.zeros(COUNT, dtype="<u4")
            add_noise(words, stretch, Coins(KEY))
            found.append(words)
        assert np.array_equal(found[0], found[1])
        assert np.array_equal(found[0].view(np.int32), noise(stretch))

    def test_of_a_view_leaves_the_rest_alone(self) -> None:
        words = np.zeros(20, dtype="<u4")
        add_noise(words[5:10], 2, Coins(KEY))
        assert words[5:10].all()
        assert not words[:5].any()
        assert not words[10:].any()

    @pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint64, np.float32, ">u4"])
    def test_refuses_words_of_another_type(self, kind: str) -> None:
        with pytest.raises(ValueError, match="must be flat, writeable uint32"):
            add_noise(np.zeros(3, dtype=kind), 0, Coins(KEY))

    def test_refuses_words_that_it_cannot_write_to(self) -> None:
        words = np.zeros(3, dtype="<u4")
        with pytest.raises(ValueError, match="must be flat"):
            add_noise(words.reshape(1, 3), 0, Coins(KEY))
        words.flags.writeable = False
        with pytest.raises(ValueError, match="writeable"):
            add_noise(words, 0, Coins(KEY))

    @pytest.mark.parametrize("stretch", [-1, MAX_STRETCH + 1, 1.0, True, None, np.int64(3)])
    def test_refuses_a_stretch_out_of_range_before_it_draws(self, stretch: object) -> None:
        words = np.zeros(3, dtype="<u4")
        for call in (variance, sigma, lambda k: add_noise(words, k, Scripted())):
            with pytest.raises(ValueError, match="must be a whole number, 0 to 256"):
                call(cast("int", stretch))
        assert not words.any()


class TestStretches:
    @pytest.mark.parametrize(
        ("stretch", "squared"), [(0, 2**20), (1, 2**21), (2, 5 * 2**20), (256, 65537 * 2**20)]
    )
    def test_by_hand(self, stretch: int, squared: int) -> None:
        assert variance(stretch) == squared
        assert sigma(stretch) == math.sqrt(squared)

    def test_every_sigma_gives_back_its_stretch_and_no_other_number_does(self) -> None:
        for stretch in range(MAX_STRETCH + 1):
            width = sigma(stretch)
            assert stretch_of(width) == stretch
            for other in (math.nextafter(width, 0), math.nextafter(width, math.inf)):
                with pytest.raises(ValueError, match=r"must be 1024 sqrt\(k\^2 \+ 1\)"):
                    stretch_of(other)

    @pytest.mark.parametrize(
        "width", [0.0, -1024.0, 1.0, 1e300, math.inf, math.nan, 1024 * math.sqrt(257**2 + 1)]
    )
    def test_refuses_what_is_no_sigma(self, width: float) -> None:
        with pytest.raises(ValueError, match="must be 1024"):
            stretch_of(width)


class TestRipple:
    @pytest.mark.parametrize("width", [1.0, 1.1, 1.25])
    def test_bounds_how_sums_over_shifted_integers_differ(self, width: float) -> None:
        """The extremes are at shifts of none and of a half."""
        points = np.arange(-40, 41)
        sums = [math.fsum(np.exp(-((points - c) ** 2) / (2 * width))) for c in (0.0, 0.5)]
        apart = math.log(sums[0] / sums[1])
        assert ripple(width) / 2 < apart < ripple(width)

    @pytest.mark.parametrize(("squared", "stretch"), [(2, 1), (5, 2), (11, 3)])
    def test_bounds_the_slack_of_a_stretch(self, squared: int, stretch: int) -> None:
        """k X1 + X2 of base draws narrow enough for floats to see the slack, at every value."""
        points = np.arange(-60, 61)
        base = np.exp(-(points**2) / (2 * squared))
        wide = np.zeros(2 * 60 * stretch + 1)
        wide[::stretch] = base
        found = np.convolve(wide, base)
        reach = len(found) // 2
        whole = squared * (stretch**2 + 1)
        exact = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * whole))
        middle = slice(reach - 15, reach + 16)  # further out the tables' ends are missing
        ratio = np.log((found / found.sum())[middle] / (exact / exact.sum())[middle])
        assert np.abs(ratio).max() < ripple(squared / (stretch**2 + 1)) + 1e-14
        assert np.abs(ratio).max() > ripple(squared / (stretch**2 + 1)) / 5

    def test_is_nothing_at_the_largest_stretch_and_is_never_zero(self) -> None:
        assert 0 < ripple(variance(0) / (MAX_STRETCH**2 + 1)) < 1e-136
        assert ripple(1e300) > 0

    @pytest.mark.parametrize("width", [0.99, 0.0, -1.0, math.nan])
    def test_refuses_what_is_too_narrow(self, width: float) -> None:
        with pytest.raises(ValueError, match="must be at least 1"):
            ripple(width)


def uncorrelated(first: np.ndarray, second: np.ndarray, *, squares: bool = True) -> bool:
    """Of two standardised samples, values and squares, to 5.33 standard errors."""
    found = abs(float((first * second).mean())) < Z / math.sqrt(len(first))
    if squares:
        a, b = (x**2 - (x**2).mean() for x in (first, second))
        error = float(a.std() * b.std()) / math.sqrt(len(first))
        found = found and abs(float((a * b).mean())) < Z * error
    return found
