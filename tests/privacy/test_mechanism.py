"""The hooks that add noise: how much of it, to what, and to what not.

The checks of scale are exact chi-squared bounds with a false-alarm rate of 1e-7 on fixed coins.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from scipy import stats

from fedveil.config import COMPATIBILITY, MechanismName, RunConfig
from fedveil.privacy.mechanism import MECHANISMS, SHARED, add_noise, add_nothing, mechanism_of
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import Plan, plan
from fedveil.privacy.secagg.terms import Numbers

KEY = bytes(range(32))
ALARM = 1e-7
# No noise at all, or all of it with the words of the secure sum: neither hook adds any.
GIVEN_AS_INTEGERS = ("none", "distributed")


def has_scale(residual: np.ndarray, scale: float) -> bool:
    """Whether it may be noise of mean 0 and that scale: z and chi-squared, 1e-7 together."""
    unit = residual.astype(np.float64).ravel() / scale
    low, high = stats.chi2.ppf([ALARM / 4, 1 - ALARM / 4], unit.size)
    centred = abs(unit.sum()) < stats.norm.isf(ALARM / 4) * math.sqrt(unit.size)
    return bool(centred and low < float(np.square(unit).sum()) < high)


@pytest.mark.parametrize("size", [500, 5000])
def test_the_check_of_scale_accepts_the_right_one_and_rejects_others(size: int) -> None:
    noise = Coins(KEY).gaussian((size,), 1.7)
    assert has_scale(noise, 1.7)
    for wrong in (2 / 3, 3 / 2, 0.0):
        assert not has_scale(noise * np.float32(wrong), 1.7)
    assert not has_scale(noise + 1, 1.7)


class TestAddNoise:
    @pytest.mark.parametrize("scale", [1.0, 0.7, 0.03, 32.5])
    def test_the_scale_is_the_standard_deviation(self, scale: float) -> None:
        # 2^20 samples: a scale that is off by 1 % is rejected too.
        total = {"w": np.zeros((1024, 1024), dtype=np.float32)}
        noise = add_noise(total, scale, Coins(KEY))["w"]
        assert has_scale(noise, scale)
        for wrong in (2 / 3, 0.99, 1.01, 3 / 2):
            assert not has_scale(noise * np.float32(wrong), scale)

    @pytest.mark.parametrize("scale", [0.03, 1.0, 1.5, 32.5])
    def test_what_is_released_is_on_a_lattice_of_the_scale_alone(self, scale: float) -> None:
        """Steps of 2^-20 of the power of two at or below the scale, whatever the sum is."""
        step = 2.0 ** (math.floor(math.log2(scale)) - 20)
        for total in (0.0, 1e-9, 1 / 3, 1e6):
            released = add_noise({"w": np.full(1000, total)}, scale, Coins(KEY))["w"] / step
            assert (released == np.rint(released)).all()
            assert 0.4 < (released % 2 == 1).mean() < 0.6

    def test_noise_is_added_to_the_sum(self) -> None:
        total = {"w": np.linspace(-5, 5, 4000, dtype=np.float32).reshape(40, 100)}
        released = add_noise(total, 1.0, Coins(KEY))
        assert has_scale(released["w"] - total["w"], 1.0)

    def test_names_shapes_and_type_stay_and_the_sum_is_not_changed_in_place(self) -> None:
        total: dict[str, np.ndarray] = {
            "a": np.ones((2, 3)), "b": np.ones(()), "c": np.ones(0, np.float32)
        }  # fmt: skip
        released = add_noise(total, 1.0, Coins(KEY))
        assert list(released) == ["a", "b", "c"]
        assert [a.shape for a in released.values()] == [(2, 3), (), (0,)]
        assert {a.dtype for a in released.values()} == {np.dtype(np.float64)}
        assert all((a == 1).all() for a in total.values())

    def test_each_array_and_each_call_has_noise_of_its_own(self) -> None:
        """Correlations within 5.33 standard errors (1e-7)."""
        total = {name: np.zeros(20_000, dtype=np.float32) for name in "ab"}
        coins = Coins(KEY)
        noises = [a for _ in range(2) for a in add_noise(total, 1.0, coins).values()]
        correlation = np.corrcoef(np.stack(noises)) - np.eye(4)
        assert np.abs(correlation).max() < 5.33 / math.sqrt(20_000)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_sum_that_is_not_finite_is_refused(self, bad: float) -> None:
        total = {"a": np.zeros(3), "b": np.array([0.0, bad])}
        with pytest.raises(ValueError, match="not finite"):
            add_noise(total, 1.0, Coins(KEY))

    @pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, -math.inf, math.nan])
    def test_noise_that_is_none_is_refused(self, scale: float) -> None:
        with pytest.raises(ValueError, match="must be > 0 and finite"):
            add_noise({"w": np.zeros(3)}, scale, Coins(KEY))

    def test_a_result_that_is_not_finite_is_refused(self) -> None:
        total = {"w": np.full(50, 1.7e308)}
        with np.errstate(over="ignore"), pytest.raises(ValueError, match="result is not finite"):
            add_noise(total, 1e307, Coins(KEY))

    @pytest.mark.parametrize("record", [1.0, 0.01])
    def test_low_order_bits_do_not_tell_whether_a_record_was_in(self, record: float) -> None:
        """Mironov 2012: an exact zero and a record's gradient must leave like bits behind.

        Near zero, the sum of a large number and of noise that was rounded before it was added lies
        on the coarse grid of the large ones; noise alone does not. Seeing one sample off that grid
        then proves that the record is not in. Two-sided two-proportion test at 1e-7.
        """
        coins, size = Coins(KEY), 400_000
        grid = 2.0 ** (math.floor(math.log2(record)) - 24)
        off = []
        for total in (0.0, record):
            array = np.full(size, total, dtype=np.float32)
            released = add_noise({"w": array}, 1.0, coins)["w"].astype(np.float64)
            near = released[np.abs(released) < record / 4]
            off.append((int((np.mod(near, grid) != 0).sum()), len(near)))
        (k0, n0), (k1, n1) = off
        assert min(n0, n1) > 300
        pooled = (k0 + k1) / (n0 + n1)
        error = math.sqrt(max(pooled * (1 - pooled), 1e-12) * (1 / n0 + 1 / n1))
        assert abs(k0 / n0 - k1 / n1) <= 5.33 * error, f"{k0} of {n0} against {k1} of {n1}"


class TestTable:
    def test_every_mechanism_of_the_configuration_has_a_row(self) -> None:
        assert set(MECHANISMS) == set(get_args(MechanismName)) == set(COMPATIBILITY)

    @pytest.mark.parametrize("name", sorted(MECHANISMS))
    def test_noise_is_added_exactly_once_and_never_under_none(self, name: MechanismName) -> None:
        row = MECHANISMS[name]
        total = {"w": np.zeros(20_000, dtype=np.float32)}
        at_site = row.at_site(total, 0.75, Coins(KEY))
        released = row.at_server(at_site, 0.75, Coins(KEY[::-1]))["w"]
        if name in GIVEN_AS_INTEGERS:
            assert not released.any()
        else:
            assert has_scale(released, 0.75)

    @pytest.mark.parametrize("name", sorted(MECHANISMS))
    def test_a_row_says_whether_a_sum_has_the_noise_of_each_site(self, name: MechanismName) -> None:
        row, sites = MECHANISMS[name], 5
        total = {"w": np.zeros(20_000)}
        parts = [row.at_site(total, 0.75, Coins(bytes([n]) * 32))["w"] for n in range(sites)]
        summed = row.at_server({"w": np.sum(parts, axis=0)}, 0.75, Coins(KEY))["w"]
        if name not in GIVEN_AS_INTEGERS:
            noises = sites if row.noise_per_site else 1
            assert has_scale(summed, 0.75 * math.sqrt(noises))
        else:
            assert not row.noise_per_site

    def test_local_noise_leaves_with_the_site_and_central_noise_comes_at_the_server(self) -> None:
        total = {"w": np.zeros(5000, dtype=np.float32)}
        assert has_scale(MECHANISMS["local"].at_site(total, 1.0, Coins(KEY))["w"], 1.0)
        assert has_scale(MECHANISMS["central"].at_server(total, 1.0, Coins(KEY))["w"], 1.0)

    def test_adding_nothing_draws_nothing_and_changes_nothing(self) -> None:
        total, coins = {"w": np.arange(3.0)}, Coins(KEY)
        assert np.array_equal(add_nothing(total, 1.0, coins)["w"], total["w"])
        assert np.array_equal(coins.words(2), Coins(KEY).words(2))


class TestInForce:
    """Whether noise comes as a share, with the words of a secure sum, is the plan's to say."""

    @pytest.fixture
    def priced(self, make_config: Callable[..., RunConfig]) -> Plan:
        return plan(make_config(privacy={"mechanism": "none"}))

    @pytest.mark.parametrize("name", sorted(MECHANISMS))
    def test_without_a_secure_sum_it_is_the_row(self, priced: Plan, name: MechanismName) -> None:
        assert mechanism_of(replace(priced, mechanism=name)) is MECHANISMS[name]

    @pytest.mark.parametrize("name", sorted(MECHANISMS))
    def test_in_one_only_two_share_their_noise(self, priced: Plan, name: MechanismName) -> None:
        summed = replace(priced, mechanism=name, numbers=Numbers(5, 4, 4, 1))
        expected = SHARED if name in {"distributed", "site"} else MECHANISMS[name]
        assert mechanism_of(summed) is expected

    def test_a_site_by_itself_adds_all_of_it(self, priced: Plan) -> None:
        """Nothing else would hide it: its reply is read alone."""
        row = mechanism_of(replace(priced, mechanism="site"))
        assert has_scale(row.at_site({"w": np.zeros(5000)}, 1.0, Coins(KEY))["w"], 1.0)
        assert row.noise_per_site
