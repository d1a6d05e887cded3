"""Cramer's V of noised tables: hand-computed values, its floor, its coverage."""

import math

import numpy as np
import pytest
from scipy.stats import binom

from fedveil.server.association import Association, Margin, cramers_v, margin
from fedveil.server.intervals import LEVEL

FALSE_ALARM = 1e-6


def association(table: np.ndarray, noise: float, total: float | None = None) -> Association:
    """With margins and total of the table itself."""
    found = []
    for axis in (1, 0):
        sums = table.sum(axis=axis)
        spread = np.full(len(sums), noise * math.sqrt(table.shape[axis]))
        found.append(margin(sums, spread, ordered=False))
    first, second = found
    assert first is not None
    assert second is not None
    whole = float(table.sum()) if total is None else total
    of_all = noise * math.sqrt(table.size)
    return cramers_v(table, np.full(table.shape, noise), (first, second), whole, of_all)


def true_v(table: np.ndarray) -> float:
    """The textbook's."""
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    square = ((table - expected) ** 2 / expected).sum() / table.sum()
    return math.sqrt(square / (min(table.shape) - 1))


class TestMargin:
    def groups(self, counts: list[float], noise: float = 0.0, *, ordered: bool) -> list[int] | None:
        """Of each cell."""
        found = margin(np.array(counts), np.full(len(counts), noise), ordered=ordered)
        return None if found is None else found.group.tolist()

    def test_rare_cells_join_the_smallest_others(self) -> None:
        """Of 100: 1 joins 2, and both join 7."""
        assert self.groups([60, 2, 30, 1, 7], ordered=False) == [0, 2, 1, 2, 2]

    def test_parts_of_a_range_join_neighbours_only(self) -> None:
        """Of 100: 1 joins 7, its smaller neighbour; 2 joins 30."""
        assert self.groups([60, 2, 30, 1, 7], ordered=True) == [0, 1, 1, 2, 2]

    def test_the_last_two_may_be_rare_but_not_within_their_noise(self) -> None:
        assert self.groups([97, 3], ordered=False) == [0, 1]
        assert self.groups([97, 3], noise=1.4, ordered=False) == [0, 1]
        assert self.groups([97, 3], noise=1.6, ordered=False) is None
        assert self.groups([97, 0], ordered=False) is None
        assert self.groups([-4, 3], ordered=True) is None

    def test_shares_add_up_and_have_their_noise(self) -> None:
        found = margin(np.array([50.0, 48.0, 2.0, -4.0]), np.full(4, 3.0), ordered=False)
        assert found is not None
        assert found.shares.sum() == pytest.approx(1.0)
        # -4 joins 2, both join 48: 46 of 96, with noise sqrt(3 * 9).
        assert found.shares.tolist() == pytest.approx([50 / 96, 46 / 96])
        assert found.noise.tolist() == pytest.approx([3 / 96, math.sqrt(27) / 96])


class TestCramersV:
    @pytest.mark.parametrize(
        ("table", "value"),
        [
            ([[50, 0], [0, 50]], 1.0),
            ([[30, 10], [10, 30]], 0.5),  # phi = (30 * 30 - 10 * 10) / 40^2
            ([[36, 24], [24, 16]], 0.0),
            ([[20, 0, 0], [0, 30, 0], [0, 0, 50]], 1.0),
        ],
    )
    def test_without_noise_it_is_the_textbooks(self, table: list[list[int]], value: float) -> None:
        found = association(np.array(table, dtype=float), 0.0)
        assert (found.value, found.low, found.high) == pytest.approx((value,) * 3, abs=1e-6)
        assert found.floor == 0.0

    def test_what_noise_adds_is_taken_off_by_hand(self) -> None:
        """Of [[50, 0], [0, 50]]: |g| = 100; noise of 5 a cell adds 4 * 5^2: sqrt(9900) / 100."""
        found = association(np.array([[50.0, 0], [0, 50]]), 5.0)
        assert found.value == pytest.approx(math.sqrt(0.99))
        assert found.low < found.value
        assert found.high == 1.0

    def test_the_floor_by_hand(self) -> None:
        """Noise alone: |g| is normal with sd 2 * 5 = 10 here: 97.5 % of its squares are below 5.02.

        With 100 records and the mean taken off: sqrt(5.02 - 1) * 10 / 100 = 0.2. Draws, noise of
        margins and of the total blur it.
        """
        assert association(np.full((2, 2), 25.0), 5.0).floor == pytest.approx(0.2, abs=0.05)

    def test_a_value_is_clear_just_when_it_is_above_its_floor(self) -> None:
        rng = np.random.default_rng(5)
        for _ in range(50):
            found = association(100 + rng.normal(0, 10, (3, 3)), 10.0)
            assert (found.low > 0) == (found.value > found.floor)
            assert found.low <= found.value <= found.high <= 1.0
            assert found.low > 0 or found.high >= found.floor

    def test_pooled_cells_have_the_noise_of_all_of_them(self) -> None:
        """Three cells against one, in groups: what four cells add is their variances' sum."""
        group = Margin(np.array([0, 0, 0, 1]), np.array([0.5, 0.5]), np.zeros(2))
        pair = Margin(np.array([0, 1]), np.array([0.5, 0.5]), np.zeros(2))
        table = np.array([[20.0, 0], [20, 0], [10, 0], [0, 50]])
        found = cramers_v(table, np.full((4, 2), 5.0), (group, pair), 100.0, 0.0)
        assert found.value == pytest.approx(math.sqrt(1e4 - 8 * 25) / 100)

    def test_noise_of_a_margin_is_in_the_interval(self) -> None:
        """V of 2 x 2 goes with 1 / sqrt(p0 p1): 10 % of p1 = 0.04 is 5 % of V, 1.96 times each way.

        By 1.96 standard deviations p1 is 0.0478 or 0.0322: V is 0.918 or 1.111 times as large.
        """
        rare = Margin(np.array([0, 1]), np.array([0.96, 0.04]), np.array([0.0, 0.004]))
        even = Margin(np.array([0, 1]), np.array([0.5, 0.5]), np.zeros(2))
        table = np.array([[480.0, 480], [30, 10]])
        found = cramers_v(table, np.zeros((2, 2)), (rare, even), 1000.0, 0.0)
        assert found.low / found.value == pytest.approx(1 / 1.111, abs=0.02)
        assert found.high / found.value == pytest.approx(1 / 0.918, abs=0.02)

    @pytest.mark.parametrize("seed", [0, 1])
    def test_independent_columns_read_near_nothing(self, seed: int) -> None:
        """At most so many are clear as their floor says; the others are drowned."""
        rng, draws = np.random.default_rng(seed), 200
        table = 5000 * np.outer([0.4, 0.3, 0.2, 0.1], [0.5, 0.3, 0.2])
        found = [association(table + rng.normal(0, 20, table.shape), 20.0) for _ in range(draws)]
        clear = sum(one.low > 0 for one in found)
        assert clear <= binom.ppf(1 - FALSE_ALARM, draws, (1 - LEVEL) / 2)
        assert np.median([one.value for one in found]) < np.median([one.floor for one in found]) / 2
        raw = np.median([true_v(table + rng.normal(0, 20, table.shape)) for _ in range(50)])
        assert np.median([one.value for one in found]) < raw / 2

    @pytest.mark.parametrize(
        ("table", "noise"),
        [
            ([[5000, 0], [0, 5000]], 100.0),
            ([[3000, 1000], [1000, 3000]], 100.0),
            ([[900, 100, 100], [100, 900, 200], [100, 100, 600]], 30.0),
            ([[9500, 100], [200, 200]], 20.0),
        ],
    )
    def test_they_hold_the_truth_as_often_as_they_say(
        self, table: list[list[float]], noise: float
    ) -> None:
        exact, draws, rng = np.array(table, dtype=float), 200, np.random.default_rng(3)
        truth, hits = true_v(exact), 0
        for _ in range(draws):
            found = association(exact + rng.normal(0, noise, exact.shape), noise)
            hits += found.low - 1e-9 <= truth <= found.high + 1e-9
        assert hits >= binom.ppf(FALSE_ALARM, draws, LEVEL)

    def test_it_has_no_chance_of_its_own(self) -> None:
        table = np.array([[30.0, 12.5], [11, 28]])
        np.random.seed(1)  # noqa: NPY002  the global state must not matter
        first = association(table, 3.0)
        np.random.seed(2)  # noqa: NPY002
        assert association(table, 3.0) == first
