"""Intervals for a mechanism's noise: hand-computed ends, and how often they hold the truth."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from fedveil.server.intervals import (
    BELOW,
    FEW,
    LEVEL,
    Range,
    _edge_noise,
    quantile_cells,
    share_ranges,
)

FALSE_ALARM = 1e-6


class TestShares:
    def test_ends_by_hand(self) -> None:
        """Of 50 and 50 with noise 10: a = 10000 - 200 z^2, b = 5000 - 100 z^2, d = 2500 - 100 z^2.

        With z^2 = 3.841459: a = 9231.708, b = 4615.854, d = 2115.854; b^2 - a d = 1773161.4.
        """
        first, second = share_ranges(np.array([50.0, 50.0]), np.array([10.0, 10.0]))
        assert first == second
        assert first.value == 0.5
        assert first.low == pytest.approx(0.5 - 1331.6011 / 9231.708, abs=1e-6)
        assert first.high == pytest.approx(0.5 + 1331.6011 / 9231.708, abs=1e-6)
        assert first.told == ""

    def test_without_noise_they_have_no_width(self) -> None:
        found = share_ranges(np.array([30.0, 10.0, 0.0]), np.zeros(3))
        for one, share in zip(found, (0.75, 0.25, 0.0), strict=True):
            assert (one.value, one.low, one.high) == pytest.approx((share, share, share), abs=1e-12)
            assert one.told == ""

    def test_small_ones_are_flagged(self) -> None:
        """Around a count of 1.96 and of 3.92 standard deviations, of a total that is large."""
        counts = np.array([1e6, 15.0, 25.0, 35.0, 45.0, -40.0])
        told = [one.told for one in share_ranges(counts, np.full(6, 10.0))]
        assert told[:5] == ["", BELOW, FEW, FEW, ""]
        assert share_ranges(counts, np.full(6, 10.0))[5].value == 0.0

    def test_a_total_within_its_noise_says_nothing(self) -> None:
        for counts in ([6.0, 6.0], [-5.0, 3.0], [0.0, 0.0]):
            for one in share_ranges(np.array(counts), np.full(2, 10.0)):
                assert (one.low, one.high) == (0.0, 1.0)
                assert 0.0 <= one.value <= 1.0
                assert one.told == BELOW

    def test_they_hold_the_truth_as_often_as_they_say(self) -> None:
        counts, noise = np.array([700.0, 250.0, 40.0, 10.0]), np.array([30.0, 30.0, 30.0, 15.0])
        rng, draws = np.random.default_rng(1), 2000
        hits = np.zeros(4)
        for _ in range(draws):
            found = share_ranges(counts + rng.normal(0, noise), noise)
            pairs = zip(found, counts / 1000, strict=True)
            hits += [one.low <= share <= one.high for one, share in pairs]
        least, most = (binom.ppf(part, draws, LEVEL) for part in (FALSE_ALARM, 1 - FALSE_ALARM))
        assert (hits >= least).all()
        assert (hits <= most).all()


class TestQuantiles:
    def test_the_noise_at_an_edge_by_hand(self) -> None:
        """Two cells of two finer ones: noise 1 of a cell, 2 of a finer one.

        Between cells: 0.25 a cell. In the middle of one: its own noise is halved on either side and
        falls out at q = 0.5; 0.25 of the other cell, and 4 * 1 * (1 - 1 / 2) of the finer ones.
        """
        found = _edge_noise(np.array([2, 2]), 1.0, 2.0, 0.5)
        ends, middles = math.sqrt(0.5), 1.5
        assert found == pytest.approx([ends, middles, ends, middles, ends])

    def test_without_noise_it_is_the_cell(self) -> None:
        counts = np.array([10.0, 20.0, 30.0, 40.0])
        found = [quantile_cells(counts, np.array([2, 2]), 0.0, 0.0, q) for q in (0.05, 0.5, 0.95)]
        assert found == [(0, 0), (2, 2), (3, 3)]

    def test_noise_makes_it_wider_and_a_lot_of_it_everything(self) -> None:
        counts, sizes = np.full(100, 100.0), np.full(10, 10)
        widths = []
        for noise in (1.0, 10.0, 100.0, 10000.0):
            first, last = quantile_cells(counts, sizes, noise, noise, 0.5)
            widths.append(last - first)
        assert widths == sorted(widths)
        assert widths[0] <= 2
        assert widths[-1] == 99

    def test_they_hold_the_truth_as_often_as_they_say(self) -> None:
        """A finer cell's noise, shifted within its cell, as `fine_histogram` does."""
        rng, draws, coarse, fine = np.random.default_rng(2), 200, 20.0, 30.0
        sizes = np.array([4, 2, 6, 4])
        parts = np.repeat(np.arange(4), sizes)
        counts = np.array([5, 10, 40, 80, 90, 70, 120, 200, 150, 90, 60, 30, 20, 10, 10, 5.0])
        for q in (0.05, 0.5, 0.95):
            truth, hits = quantile_cells(counts, sizes, 0.0, 0.0, q)[0], 0
            for _ in range(draws):
                finer = counts + rng.normal(0, fine, 16)
                sums = np.bincount(parts, counts) + rng.normal(0, coarse, 4)
                shift = (sums - np.bincount(parts, finer)) / sizes
                low, high = quantile_cells(finer + shift[parts], sizes, coarse, fine, q)
                hits += low <= truth <= high
            assert hits >= binom.ppf(FALSE_ALARM, draws, LEVEL)


def test_a_range_at_zero_without_width_is_no_matter_of_noise() -> None:
    assert Range(0.0, 0.0, 0.0).told == ""
