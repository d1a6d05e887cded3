"""The hooks that add noise: how much of it, to what, and to what not.

The checks of scale are exact chi-squared bounds with a false-alarm rate of 1e-7 on fixed coins.
"""

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from scipy import stats

from fedveil.config import COMPATIBILITY, MechanismName
from fedveil.privacy.mechanism import MECHANISMS, add_noise, add_nothing
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import Plan

KEY = bytes(range(32))
ALARM = 1e-7


def make_plan(noise_multiplier: float = 1.0, clipping_norm: float = 1.0) -> Plan:
    return Plan(
        mechanism="central",
        unit="record",
        against="",
        target_epsilon=1.0,
        epsilon=1.0,
        delta=1e-5,
        clipping_norm=clipping_norm,
        noise_multiplier=noise_multiplier,
        sampling_rate=1.0,
        expected_batch=1.0,
        rounds=1,
        releases_per_round=1,
        schedule=(1.0,),
        accountant="PLD",
        second_opinions=(),
    )


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
    @pytest.mark.parametrize(
        ("multiplier", "clipping"), [(1.0, 1.0), (0.7, 1.0), (3.0, 0.01), (1.3, 25.0)]
    )
    def test_scale_is_noise_multiplier_times_clipping_norm(
        self, multiplier: float, clipping: float
    ) -> None:
        # 2^20 samples: a scale that is off by 1 % is rejected too.
        total = {"w": np.zeros((1024, 1024), dtype=np.float32)}
        noise = add_noise(total, make_plan(multiplier, clipping), Coins(KEY))["w"]
        assert has_scale(noise, multiplier * clipping)
        for wrong in (2 / 3, 0.99, 1.01, 3 / 2):
            assert not has_scale(noise * np.float32(wrong), multiplier * clipping)

    def test_noise_is_added_to_the_sum(self) -> None:
        total = {"w": np.linspace(-5, 5, 4000, dtype=np.float32).reshape(40, 100)}
        released = add_noise(total, make_plan(0.5, 2.0), Coins(KEY))
        assert has_scale(released["w"] - total["w"], 1.0)

    def test_names_shapes_and_type_stay_and_the_sum_is_not_changed_in_place(self) -> None:
        total: dict[str, np.ndarray] = {
            "a": np.ones((2, 3)), "b": np.ones(()), "c": np.ones(0, np.float32)
        }  # fmt: skip
        released = add_noise(total, make_plan(), Coins(KEY))
        assert list(released) == ["a", "b", "c"]
        assert [a.shape for a in released.values()] == [(2, 3), (), (0,)]
        assert {a.dtype for a in released.values()} == {np.dtype(np.float64)}
        assert all((a == 1).all() for a in total.values())

    def test_each_array_and_each_call_has_noise_of_its_own(self) -> None:
        """Correlations within 5.33 standard errors (1e-7)."""
        total = {name: np.zeros(20_000, dtype=np.float32) for name in "ab"}
        coins = Coins(KEY)
        noises = [a for _ in range(2) for a in add_noise(total, make_plan(), coins).values()]
        correlation = np.corrcoef(np.stack(noises)) - np.eye(4)
        assert np.abs(correlation).max() < 5.33 / math.sqrt(20_000)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_sum_that_is_not_finite_is_refused(self, bad: float) -> None:
        total = {"a": np.zeros(3), "b": np.array([0.0, bad])}
        with pytest.raises(ValueError, match="not finite"):
            add_noise(total, make_plan(), Coins(KEY))

    @pytest.mark.parametrize(
        "plan",
        [
            make_plan(0.0, 1.0),
            make_plan(1.0, math.inf),
            make_plan(0.0, math.inf),
            make_plan(-1.0, 1.0),
            make_plan(math.nan, 1.0),
        ],
    )
    def test_a_plan_without_noise_is_refused(self, plan: Plan) -> None:
        with pytest.raises(ValueError, match="must be > 0 and finite"):
            add_noise({"w": np.zeros(3)}, plan, Coins(KEY))

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
            released = add_noise({"w": array}, make_plan(), coins)["w"].astype(np.float64)
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
        plan = replace(make_plan(1.5, 0.5), mechanism=name)
        total = {"w": np.zeros(20_000, dtype=np.float32)}
        at_site = row.at_site(total, plan, Coins(KEY))
        released = row.at_server(at_site, plan, Coins(KEY[::-1]))["w"]
        assert (not released.any()) if name == "none" else has_scale(released, 0.75)

    def test_local_noise_leaves_with_the_site_and_central_noise_comes_at_the_server(self) -> None:
        total = {"w": np.zeros(5000, dtype=np.float32)}
        assert has_scale(MECHANISMS["local"].at_site(total, make_plan(), Coins(KEY))["w"], 1.0)
        assert has_scale(MECHANISMS["central"].at_server(total, make_plan(), Coins(KEY))["w"], 1.0)

    def test_adding_nothing_draws_nothing_and_changes_nothing(self) -> None:
        total, coins = {"w": np.arange(3.0)}, Coins(KEY)
        assert np.array_equal(add_nothing(total, make_plan(), coins)["w"], total["w"])
        assert np.array_equal(coins.words(2), Coins(KEY).words(2))
