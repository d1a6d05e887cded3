"""Prices, held against closed forms that are computed here and against each other."""

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedveil.privacy import accounting
from fedveil.privacy.accounting import (
    COARSE_GRID,
    FILTER_ORDERS,
    FINE_GRID,
    AccountingError,
    Releases,
    calibrate,
    cross_check,
    event_from_plain,
    event_to_plain,
    events_epsilon,
    filter_epsilon,
    grids,
    pld_epsilon,
    pld_schedule,
    prv_epsilon,
    rdp_epsilon,
)
from fedveil.privacy.books import (
    Charge,
    Order,
)
from fedveil.privacy.ledger import Ledger, verify
from fedveil.privacy.limits import Lifetime
from fedveil.privacy.plan import Part

# `test_no_warning_and_no_log_of_a_library_reaches_the_user` asks for none; the others go on.
pytestmark = pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """Balle and Wang 2018, theorem 8, at sensitivity 1."""
    left = norm.cdf(0.5 / sigma - epsilon * sigma)
    return float(left - math.exp(epsilon + norm.logcdf(-0.5 / sigma - epsilon * sigma)))


def subsampled_delta(epsilon: float, sigma: float, rate: float) -> float:
    """One Poisson-subsampled Gaussian: the larger hockey-stick divergence of both directions.

    With P = (1 - q) N(0, s^2) + q N(1, s^2) and Q = N(0, s^2), the likelihood ratio rises in x, so
    that each divergence is a difference of tails at the point where it equals e^epsilon.
    """

    def crossing(ratio: float) -> float:
        inner = (ratio - 1 + rate) / rate
        return sigma**2 * math.log(inner) + 0.5 if inner > 0 else -math.inf

    def tail(x: float) -> float:
        return float((1 - rate) * norm.sf(x / sigma) + rate * norm.sf((x - 1) / sigma))

    def head(x: float) -> float:
        return float((1 - rate) * norm.cdf(x / sigma) + rate * norm.cdf((x - 1) / sigma))

    x = crossing(math.exp(epsilon))
    removed = tail(x) - math.exp(epsilon) * norm.sf(x / sigma)
    x = crossing(math.exp(-epsilon))
    added = norm.cdf(x / sigma) - math.exp(epsilon) * head(x)
    return float(max(removed, added, 0.0))


def exact_epsilon(sigma: float, delta: float, rate: float = 1.0) -> float:
    def excess(epsilon: float) -> float:
        at = gaussian_delta(epsilon, sigma) if rate == 1 else subsampled_delta(epsilon, sigma, rate)
        return at - delta

    return float(brentq(excess, 0.0, 100.0, xtol=1e-10)) if excess(0.0) > 0 else 0.0


def test_the_closed_forms_agree_with_published_values() -> None:
    # sigma = sqrt(2 ln(1.25/delta))/epsilon is enough (Dwork and Roth 2014).
    classic = math.sqrt(2 * math.log(1.25e5)) / 0.5
    assert 0 < gaussian_delta(0.5, classic) < 1e-5
    # auditing.md, Andrew et al. 2023 at delta 1e-6: sigma 4.22, 1.54, 0.541 -> 1, 3.01, 10.
    for sigma, epsilon in ((4.22, 1.0), (1.54, 3.01), (0.541, 10.0)):
        assert exact_epsilon(sigma, 1e-6) == pytest.approx(epsilon, abs=0.01)
    assert subsampled_delta(1.0, 1.3, 1.0) == pytest.approx(gaussian_delta(1.0, 1.3), rel=1e-9)


class TestAgainstClosedForms:
    @pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 2.0, 8.0, 50.0])
    @pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
    def test_one_gaussian_costs_what_the_analytic_formula_says(
        self, sigma: float, delta: float
    ) -> None:
        exact = exact_epsilon(sigma, delta)
        priced = pld_epsilon(Releases(sigma, 1.0, 1), delta)
        assert exact - 1e-6 <= priced <= exact + 1e-3

    @pytest.mark.parametrize(("count", "sigma"), [(2, 1.0), (9, 3.0), (100, 8.0), (400, 60.0)])
    def test_many_gaussians_cost_as_one_of_less_noise(self, count: int, sigma: float) -> None:
        exact = exact_epsilon(sigma / math.sqrt(count), 1e-5)
        assert pld_epsilon(Releases(sigma, 1.0, count), 1e-5) == pytest.approx(exact, abs=1e-3)

    @pytest.mark.parametrize("sigma", [0.6, 1.0, 4.0])
    @pytest.mark.parametrize("rate", [0.001, 0.05, 0.5, 0.99])
    def test_one_subsampled_gaussian_costs_the_larger_of_both_directions(
        self, sigma: float, rate: float
    ) -> None:
        exact = exact_epsilon(sigma, 1e-5, rate)
        priced = pld_epsilon(Releases(sigma, rate, 1), 1e-5)
        assert exact - 1e-6 <= priced <= exact + 1.1e-3

    def test_the_fine_grid_is_tighter_and_still_an_upper_bound(self) -> None:
        releases = Releases(8.0, 1.0, 100)
        exact = exact_epsilon(0.8, 1e-5)
        fine, coarse = (pld_epsilon(releases, 1e-5, g) for g in (FINE_GRID, COARSE_GRID))
        assert exact - 1e-6 <= fine <= coarse + 1e-6
        assert fine <= exact + 1e-4

    @pytest.mark.parametrize("sigma", [1.0, 4.0])
    def test_second_opinions_bound_the_exact_epsilon_of_a_gaussian(self, sigma: float) -> None:
        exact = exact_epsilon(sigma, 1e-5)
        releases = Releases(sigma, 1.0, 1)
        assert exact <= rdp_epsilon(releases, 1e-5) <= 1.15 * exact
        assert exact <= prv_epsilon(releases, 1e-5) <= exact + 0.02 + 0.01 * exact


class TestOrder:
    @settings(max_examples=6)
    @given(st.floats(0.7, 6), st.floats(0.01, 1), st.integers(1, 50))
    def test_less_noise_more_releases_and_a_higher_rate_cost_more(
        self, sigma: float, rate: float, count: int
    ) -> None:
        price = pld_epsilon(Releases(sigma, rate, count), 1e-5)
        assert pld_epsilon(Releases(sigma * 1.1, rate, count), 1e-5) < price + 1e-9
        assert pld_epsilon(Releases(sigma, rate * 0.8, count), 1e-5) < price + 1e-9
        assert pld_epsilon(Releases(sigma, rate, 2 * count), 1e-5) > price - 1e-9
        assert pld_epsilon(Releases(sigma, rate, count), 1e-4) < price + 1e-9

    def test_a_schedule_is_the_price_of_each_number_of_releases(self) -> None:
        releases = Releases(1.5, 0.1, 30)
        schedule = pld_schedule(releases, 1e-5, [1, 7, 30])
        single = [pld_epsilon(Releases(1.5, 0.1, n), 1e-5) for n in (1, 7, 30)]
        assert schedule == pytest.approx(single, abs=1e-12)

    def test_the_event_says_what_runs(self) -> None:
        assert str(Releases(2.0, 0.25, 3).event) == (
            "SelfComposedDpEvent(event=PoissonSampledDpEvent(sampling_probability=0.25, "
            "event=GaussianDpEvent(noise_multiplier=2.0)), count=3)"
        )
        assert "Poisson" not in str(Releases(2.0, 1.0, 3).event)

    def test_releases_without_noise_are_not_private(self) -> None:
        for rate in (0.25, 1.0):
            assert Releases(0.0, rate, 3).event == dp_accounting.NonPrivateDpEvent()


all_releases = st.builds(
    Releases, st.floats(0.1, 1e4), st.floats(1e-6, 1.0), st.integers(1, 100_000)
)
GAUSSIAN = {"kind": "Gaussian", "noise_multiplier": 2.0}
SAMPLED = {"kind": "PoissonSampled", "sampling_probability": 0.25, "event": GAUSSIAN}


class TestPlainEvents:
    @given(all_releases | st.just(Releases(0.0, 1.0, 1)))
    def test_an_event_survives_json(self, releases: Releases) -> None:
        plain = event_to_plain(releases.event)
        assert event_from_plain(json.loads(json.dumps(plain, allow_nan=False))) == releases.event

    def test_it_is_written_out_in_full(self) -> None:
        assert event_to_plain(Releases(2.0, 0.25, 3).event) == {
            "kind": "SelfComposed",
            "count": 3,
            "event": {
                "kind": "PoissonSampled",
                "sampling_probability": 0.25,
                "event": {"kind": "Gaussian", "noise_multiplier": 2.0},
            },
        }
        assert event_to_plain(Releases(0.0, 0.25, 3).event) == {"kind": "NonPrivate"}

    @pytest.mark.parametrize(
        "event",
        [
            dp_accounting.LaplaceDpEvent(1.0),
            dp_accounting.NoOpDpEvent(),
            dp_accounting.ComposedDpEvent([dp_accounting.GaussianDpEvent(1.0)]),
            dp_accounting.SelfComposedDpEvent(dp_accounting.LaplaceDpEvent(1.0), 2),
            dp_accounting.SampledWithoutReplacementDpEvent(
                10, 2, dp_accounting.GaussianDpEvent(1.0)
            ),
        ],
        ids=lambda event: type(event).__name__,
    )
    def test_an_event_that_never_runs_here_is_not_written(
        self, event: dp_accounting.DpEvent
    ) -> None:
        with pytest.raises(AccountingError, match="is none that is accounted for"):
            event_to_plain(event)

    @pytest.mark.parametrize(
        "plain",
        [
            None,
            3,
            "Gaussian",
            [],
            {},
            {"kind": "Laplace", "noise_multiplier": 1.0},
            {"kind": "gaussian", "noise_multiplier": 1.0},
            {"kind": ["Gaussian"], "noise_multiplier": 1.0},
            {"kind": None},
            {"kind": "Gaussian"},
            {"noise_multiplier": 1.0},
            {**GAUSSIAN, "count": 3},
            {"kind": "NonPrivate", "noise_multiplier": 1.0},
            {"kind": "SelfComposed", "count": 3},
            {"kind": "SelfComposed", "event": None, "count": 3},
            {"kind": "SelfComposed", "event": [GAUSSIAN], "count": 3},
            {"kind": "SelfComposed", "event": {**SAMPLED, "more": 1}, "count": 3},
        ],
        ids=repr,
    )
    def test_what_is_no_event_is_refused(self, plain: Any) -> None:  # noqa: ANN401
        with pytest.raises(AccountingError, match="is none that is accounted for"):
            event_from_plain(plain)

    @pytest.mark.parametrize("value", ["2", None, [1.0], True, 0.0, -1.0, math.inf, math.nan])
    def test_so_is_noise_that_is_none(self, value: object) -> None:
        """An account that is read back must never find a price in it."""
        with pytest.raises(AccountingError):
            event_from_plain({**GAUSSIAN, "noise_multiplier": value})

    @pytest.mark.parametrize("value", ["0.1", None, [0.1], True, 0.0, -0.1, 1.5, math.nan])
    def test_so_is_a_rate_that_is_none(self, value: object) -> None:
        with pytest.raises(AccountingError):
            event_from_plain({**SAMPLED, "sampling_probability": value})

    @pytest.mark.parametrize("value", ["3", None, [3], True, 2.5, 0, -3, math.nan])
    def test_so_is_a_number_of_times_that_is_none(self, value: object) -> None:
        with pytest.raises(AccountingError):
            event_from_plain({"kind": "SelfComposed", "event": SAMPLED, "count": value})


# The corners and the middle of noise 0.5..8, rate 0.001..1 and count 1..1000. What costs more than
# an epsilon of 400 is left out: no plan asks for it, and PRV takes many seconds to answer infinity.
GRID = [
    (0.5, 0.001, 1),
    (0.5, 0.01, 10),
    (0.5, 0.1, 100),
    (0.5, 0.001, 1000),
    (0.5, 1.0, 10),
    (1.0, 0.001, 100),
    (1.0, 0.01, 1000),
    (1.0, 0.1, 10),
    (1.0, 1.0, 1),
    (2.0, 0.1, 1000),
    (2.0, 1.0, 100),
    (8.0, 0.001, 1),
    (8.0, 0.001, 1000),
    (8.0, 0.5, 100),
    (8.0, 1.0, 1),
    (8.0, 1.0, 1000),
]


class TestCrossCheck:
    @pytest.mark.parametrize(("sigma", "rate", "count"), GRID)
    def test_accountants_agree_on_all_that_a_plan_may_ask(
        self, sigma: float, rate: float, count: int
    ) -> None:
        releases = Releases(sigma, rate, count)
        claimed = min(pld_epsilon(releases, 1e-5), pld_epsilon(releases, 1e-5, FINE_GRID))
        opinions = cross_check(releases, 1e-5, claimed)
        assert set(opinions) == {"rdp", "prv"}
        tolerance = 0.02 + 0.01 * claimed
        assert abs(opinions["prv"] - claimed) <= tolerance
        assert opinions["rdp"] >= claimed - tolerance

    @pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 2.0])
    @pytest.mark.parametrize(
        ("sigma", "rate", "count"), [(1.0, 0.1, 10), (2.0, 0.1, 1000), (4.0, 1.0, 10)]
    )
    def test_a_claim_that_is_off_by_a_tenth_is_refused(
        self, factor: float, sigma: float, rate: float, count: int
    ) -> None:
        releases = Releases(sigma, rate, count)
        claimed = pld_epsilon(releases, 1e-5) * factor
        with pytest.raises(AccountingError, match="accountants disagree"):
            cross_check(releases, 1e-5, claimed)

    @pytest.mark.parametrize("claimed", [math.nan, math.inf, 0.0, -1.0])
    def test_a_claim_that_is_no_price_is_refused(self, claimed: float) -> None:
        with pytest.raises(AccountingError):
            cross_check(Releases(1.0, 0.1, 10), 1e-5, claimed)

    @pytest.mark.parametrize(
        "priced", [Releases(2.2, 0.1, 100), Releases(2.0, 0.09, 100), Releases(2.0, 0.1, 80)]
    )
    def test_a_claim_for_other_releases_than_those_that_run_is_refused(
        self, priced: Releases
    ) -> None:
        with pytest.raises(AccountingError):
            cross_check(Releases(2.0, 0.1, 100), 1e-5, pld_epsilon(priced, 1e-5))

    def test_no_warning_and_no_log_of_a_library_reaches_the_user(self) -> None:
        # Digits at epsilon 3, the defaults nearly; in a process without pytest's own filters.
        program = (
            "from fedveil.privacy.accounting import *\n"
            "releases = Releases(6.0137, 0.3, 200)\n"
            "cross_check(releases, 1e-5, pld_epsilon(releases, 1e-5))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
        assert (done.stdout, done.stderr) == (b"", b"")


def accountant_epsilon(parts: Sequence[Releases], delta: float, grid: float = COARSE_GRID) -> float:
    """The same by dp-accounting's own accountant, which is given one event after another."""
    accountant = dp_accounting.pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, grid
    )
    for part in parts:
        accountant.compose(part.event)
    return float(accountant.get_epsilon(delta))


def composed(part: Releases) -> Any:  # noqa: ANN401
    """The privacy loss distribution of releases, by dp-accounting alone."""
    one = privacy_loss_distribution.from_gaussian_mechanism(
        part.noise_multiplier,
        sampling_prob=part.sampling_rate,
        value_discretization_interval=COARSE_GRID,
    )
    return one.self_compose(part.count)


class TestBeside:
    """Releases beside others come from the same account: they are in every price."""

    @pytest.mark.parametrize(
        "beside",
        [
            (Releases(3.0, 1.0, 2),),
            (Releases(2.0, 0.3, 5),),
            (Releases(3.0, 1.0, 2), Releases(2.0, 0.3, 5)),
        ],
    )
    def test_is_the_hand_made_composition(self, beside: tuple[Releases, ...]) -> None:
        after = [1, 7, 20]
        prices = pld_schedule(Releases(1.5, 0.1, 20), 1e-5, after, beside=beside)
        for count, price in zip(after, prices, strict=True):
            parts = (Releases(1.5, 0.1, count), *beside)
            whole = reduce(lambda a, b: a.compose(b), map(composed, parts))
            assert price == pytest.approx(whole.get_epsilon_for_delta(1e-5), abs=1e-9)
            # dp-accounting's own accountant bundles Gaussians first, and is so a shade tighter.
            theirs = accountant_epsilon(parts, 1e-5)
            assert theirs - 1e-9 <= price <= theirs + 1e-5
        assert pld_epsilon(Releases(1.5, 0.1, 20), 1e-5, beside=beside) == prices[-1]
        assert prices[0] > pld_epsilon(Releases(1.5, 0.1, 1), 1e-5) + 0.1

    @pytest.mark.parametrize(("first", "second"), [((2.0, 3), (5.0, 7)), ((1.0, 1), (10.0, 40))])
    def test_gaussians_of_two_scales_cost_what_one_of_both_would(
        self, first: tuple[float, int], second: tuple[float, int]
    ) -> None:
        # n Gaussians of scale s are one of s / sqrt(n); squares of inverse scales add up.
        (s1, n1), (s2, n2) = first, second
        exact = exact_epsilon((n1 / s1**2 + n2 / s2**2) ** -0.5, 1e-5)
        releases, beside = Releases(s1, 1.0, n1), (Releases(s2, 1.0, n2),)
        priced = pld_epsilon(releases, 1e-5, FINE_GRID, beside)
        assert exact - 1e-6 <= priced <= exact + 2e-4
        assert exact <= rdp_epsilon(releases, 1e-5, beside) <= 1.2 * exact
        assert exact <= prv_epsilon(releases, 1e-5, 0.01, beside) <= exact + 0.02 + 0.01 * exact

    def test_order_does_not_matter(self) -> None:
        one, other = Releases(1.5, 0.1, 20), Releases(3.0, 1.0, 2)
        assert pld_epsilon(one, 1e-5, beside=(other,)) == pytest.approx(
            pld_epsilon(other, 1e-5, beside=(one,)), abs=1e-8
        )

    def test_second_opinions_are_of_both(self) -> None:
        releases, beside = Releases(2.0, 0.1, 100), (Releases(4.0, 1.0, 3),)
        claimed = pld_epsilon(releases, 1e-5, beside=beside)
        opinions = cross_check(releases, 1e-5, claimed, beside)
        assert opinions["prv"] == pytest.approx(claimed, abs=0.02 + 0.01 * claimed)
        assert opinions["rdp"] >= claimed
        for forgotten in ((), (Releases(4.0, 1.0, 1),)):
            with pytest.raises(AccountingError, match="accountants disagree"):
                cross_check(releases, 1e-5, claimed, forgotten)
            with pytest.raises(AccountingError, match="accountants disagree"):
                cross_check(releases, 1e-5, pld_epsilon(releases, 1e-5, beside=forgotten), beside)

    def test_calibration_leaves_room_for_them(self) -> None:
        beside = (Releases(8.0, 1.0, 4),)
        releases = calibrate(1.0, 25, 3.0, 1e-5, beside)
        # Squares of inverse scales add up to that of one Gaussian of epsilon 3.
        whole = float(brentq(lambda s: exact_epsilon(s, 1e-5) - 3.0, 0.5, 10.0))
        expected = (25 / (whole**-2 - 4 / 8.0**2)) ** 0.5
        assert releases.noise_multiplier == pytest.approx(expected, rel=5e-3)
        assert releases.noise_multiplier >= expected * (1 - 1e-6)
        assert releases.noise_multiplier > 1.02 * 5 * whole  # which would do alone

    def test_what_they_alone_overdraw_is_out_of_reach(self) -> None:
        with pytest.raises(AccountingError, match=r"privacy\.epsilon = 1: cannot be reached"):
            calibrate(1.0, 3, 1.0, 1e-5, (Releases(1.0, 1.0, 4),))


class TestEvents:
    """What a ledger recomputes from events is what the plan stated of releases."""

    @pytest.mark.parametrize(
        ("releases", "delta"),
        [
            (Releases(1.0, 1.0, 1), 1e-5),
            (Releases(4.0, 0.1, 300), 1e-5),
            (Releases(1.0, 0.01, 10), 1e-6),
            (Releases(30.0, 1.0, 400), 1e-5),
        ],
    )
    def test_cost_what_the_releases_cost(self, releases: Releases, delta: float) -> None:
        stated = min(pld_epsilon(releases, delta, grid) for grid in (COARSE_GRID, FINE_GRID))
        assert events_epsilon({releases.event: 1}, delta, stated) == pytest.approx(stated, rel=1e-5)
        one = Releases(releases.noise_multiplier, releases.sampling_rate, 1)
        counted = events_epsilon({one.event: releases.count}, delta, stated)
        assert counted == pytest.approx(stated, rel=1e-5)

    def test_of_several_kinds_cost_what_they_cost_together(self) -> None:
        releases, beside = Releases(1.5, 0.1, 20), (Releases(3.0, 1.0, 2),)
        stated = min(pld_epsilon(releases, 1e-5, g, beside) for g in (COARSE_GRID, FINE_GRID))
        events = {releases.event: 1, Releases(3.0, 1.0, 1).event: 2}
        assert events_epsilon(events, 1e-5, stated) == pytest.approx(stated, rel=1e-5)

    def test_a_wider_grid_is_an_upper_bound_too(self) -> None:
        releases = Releases(0.3, 0.2, 4)
        stated = pld_epsilon(releases, 1e-5)
        assert stated > 12
        found = events_epsilon({releases.event: 1}, 1e-5, 120.0)
        assert found is not None
        assert found == pytest.approx(stated, rel=1e-3)
        assert found >= stated * (1 - 1e-6)

    @pytest.mark.parametrize(
        ("releases", "delta", "target"),
        [
            (Releases(4.0, 0.1, 300), 1e-5, 3.0),
            (Releases(250.0, 0.5, 20_000), 1e-10, 2.0),
            (Releases(250.0, 0.5, 20_000), 1e-12, 2.0),
            # Its Renyi price is above 10, where grids become wider.
            (Releases(0.471282958984375, 0.001, 3000), 1e-9, 9.5),
        ],
    )
    def test_a_ledger_finds_what_a_plan_stated(
        self, tmp_path: Path, releases: Releases, delta: float, target: float
    ) -> None:
        """The two compose in different ways; an honest ledger is not damaged for that."""
        stated = min(pld_epsilon(releases, delta, grid) for grid in grids(target))
        assert stated <= target
        parts = (Part("rounds", "training", releases, 1),)
        Ledger.create(tmp_path / "site.sqlite", "site")
        ledger = Ledger.open(tmp_path / "site.sqlite")
        asked = Order(
            "run", "0" * 64, "data", "record", (Charge("training", stated, delta, parts),)
        )
        ledger.reserve(asked, Lifetime(target, delta))
        ledger.close()
        found = verify(tmp_path / "site.sqlite").prices["run", "training"]
        assert found[0] == stated
        assert found[1] == pytest.approx(stated, rel=2e-3)

    def test_without_noise_have_no_price(self) -> None:
        bare, noised = Releases(0.0, 1.0, 1).event, Releases(2.0, 1.0, 1).event
        assert events_epsilon({bare: 1}, 1e-5, math.inf) is None
        assert events_epsilon({noised: 3, bare: 1}, 1e-5, 1.0) is None


def sampled_rdp(alpha: int, sigma: float, rate: float) -> float:
    """Mironov, Talwar and Zhang 2019, section 3.3: one subsampled Gaussian at an integer order."""
    terms = [
        math.comb(alpha, k)
        * (1 - rate) ** (alpha - k)
        * rate**k
        * math.exp((k * k - k) / (2 * sigma**2))
        for k in range(alpha + 1)
    ]
    return math.log(math.fsum(terms)) / (alpha - 1)


def converted(alpha: int, rdp: float, delta: float) -> float:
    """Canonne, Kamath and Steinke 2020, proposition 12."""
    return rdp + math.log1p(-1 / alpha) - math.log(delta * alpha) / (alpha - 1)


counts = st.integers(0, 500)
noises = st.floats(0.5, 50.0)
rates = st.sampled_from([0.01, 0.1, 1.0])


class TestFilter:
    """Epsilon of releases chosen adaptively: a Renyi filter over a few orders, by a union bound."""

    def test_the_orders_are_fixed_and_few(self) -> None:
        """An account that is kept by other orders would be another account."""
        assert FILTER_ORDERS == (2, 3, 4, 6, 10, 16, 32, 64)

    @pytest.mark.parametrize("sigma", [0.8, 2.0, 10.0, 60.0])
    @pytest.mark.parametrize("count", [1, 7, 300])
    @pytest.mark.parametrize("delta", [1e-4, 1e-6])
    def test_of_gaussians_is_the_union_bound_by_hand(
        self, sigma: float, count: int, delta: float
    ) -> None:
        by_hand = min(
            converted(alpha, count * alpha / (2 * sigma**2), delta / 8)
            for alpha in (2, 3, 4, 6, 10, 16, 32, 64)
        )
        event = Releases(sigma, 1.0, 1).event
        assert filter_epsilon({event: count}, delta) == pytest.approx(by_hand, rel=1e-9)

    def test_of_several_kinds_each_order_adds_up(self) -> None:
        by_hand = min(
            converted(alpha, 5 * alpha / (2 * 4.0**2) + 40 * sampled_rdp(alpha, 2.0, 0.1), 1e-5 / 8)
            for alpha in FILTER_ORDERS
        )
        events = {Releases(4.0, 1.0, 1).event: 5, Releases(2.0, 0.1, 1).event: 40}
        assert filter_epsilon(events, 1e-5) == pytest.approx(by_hand, rel=1e-6)
        # However they are bundled.
        bundled = {Releases(4.0, 1.0, 5).event: 1, Releases(2.0, 0.1, 20).event: 2}
        assert filter_epsilon(bundled, 1e-5) == pytest.approx(by_hand, rel=1e-6)

    @given(noises, rates, counts, st.integers(1, 100), noises, counts)
    def test_never_falls_when_more_runs(
        self, sigma: float, rate: float, count: int, more: int, other: float, others: int
    ) -> None:
        spent = Counter({Releases(sigma, rate, 1).event: count})
        before = filter_epsilon(spent, 1e-5)
        for asked in (
            Counter({Releases(sigma, rate, 1).event: more}),
            Counter({Releases(other, 1.0, 1).event: others}),
        ):
            assert filter_epsilon(spent + asked, 1e-5) >= before * (1 - 1e-12)

    @given(noises, rates, st.integers(1, 500), st.sampled_from([1e-4, 1e-5, 1e-9]))
    def test_never_falls_below_the_price_of_one_plan(
        self, sigma: float, rate: float, count: int, delta: float
    ) -> None:
        """What was chosen adaptively costs no less than the same, fixed beforehand."""
        releases = Releases(sigma, rate, count)
        priced = filter_epsilon({Releases(sigma, rate, 1).event: count}, delta)
        assert priced >= rdp_epsilon(releases, delta)

    def test_is_above_the_tightest_price_too(self) -> None:
        for sigma, count in ((1.0, 1), (4.0, 30), (20.0, 100)):
            exact = exact_epsilon(sigma / math.sqrt(count), 1e-5)
            event = Releases(sigma, 1.0, 1).event
            assert exact < filter_epsilon({event: count}, 1e-5) < 1.6 * exact

    def test_of_nothing_is_nothing(self) -> None:
        assert filter_epsilon({}, 1e-5) == 0
        assert filter_epsilon({Releases(2.0, 1.0, 1).event: 0}, 1e-5) == 0
        assert filter_epsilon({Releases(0.0, 1.0, 1).event: 0}, 1e-5) == 0

    def test_without_noise_is_without_bound(self) -> None:
        bare, noised = Releases(0.0, 1.0, 1).event, Releases(2.0, 1.0, 1).event
        assert filter_epsilon({bare: 1}, 1e-5) == math.inf
        assert filter_epsilon({noised: 1, bare: 1}, 1e-5) == math.inf


class TestCalibrate:
    @pytest.mark.parametrize(
        ("rate", "count", "epsilon"),
        [(0.3, 20, 8.0), (1.0, 1, 1.0), (0.01, 500, 0.5), (1.0, 10, 20.0), (0.05, 100, 0.1)],
    )
    def test_reaches_the_target_with_the_least_noise(
        self, rate: float, count: int, epsilon: float
    ) -> None:
        releases = calibrate(rate, count, epsilon, 1e-5)
        assert (releases.sampling_rate, releases.count) == (rate, count)
        assert pld_epsilon(releases, 1e-5, FINE_GRID) <= epsilon
        less = Releases(0.99 * releases.noise_multiplier, rate, count)
        assert pld_epsilon(less, 1e-5, FINE_GRID) > epsilon

    def test_agrees_with_the_analytic_gaussian(self) -> None:
        sigma = float(brentq(lambda s: exact_epsilon(s, 1e-5) - 1.0, 1.0, 10.0))
        releases = calibrate(1.0, 25, 1.0, 1e-5)
        assert releases.noise_multiplier == pytest.approx(5 * sigma, rel=2e-3)
        assert releases.noise_multiplier >= 5 * sigma * (1 - 1e-6)

    def test_an_epsilon_out_of_reach_names_the_option_and_the_mend(self) -> None:
        with pytest.raises(AccountingError, match=r"privacy\.epsilon = 1e-06: cannot be reached"):
            calibrate(1.0, 4, 1e-6, 1e-7)


def test_numpy_error_state_is_left_alone() -> None:
    before = np.geterr()
    prv_epsilon(Releases(1.0, 0.1, 10), 1e-5)
    assert np.geterr() == before


class TestLeast:
    """The search for the least noise, on prices whose least noise is known by hand."""

    @staticmethod
    def counted(price: Callable[[float], float]) -> tuple[Callable[[float], float], list[float]]:
        asked: list[float] = []

        def ask(noise: float) -> float:
            asked.append(noise)
            return price(noise)

        return ask, asked

    @pytest.mark.parametrize("start", [0.02, 0.5, 3.9, 4.0, 4.1, 50.0, 1e4])
    @pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
    def test_a_power_of_the_noise(self, start: float, power: float) -> None:
        """(4 / noise)^power is 1 at noise 4."""
        price, asked = self.counted(lambda noise: (4 / noise) ** power)
        found = accounting._least(price, 1.0, start, 1e-3)
        assert found is not None
        assert 4 <= found <= 4 * 1.001
        assert found in asked  # what is returned has been priced
        assert len(asked) <= 30

    def test_from_a_good_guess_a_few_prices_are_enough(self) -> None:
        price, asked = self.counted(lambda noise: (4 / noise) ** 1.2)
        accounting._least(price, 1.0, 3.95, 1e-3)
        assert len(asked) <= 6

    @pytest.mark.parametrize("start", [1.0, 3.0, 8.0])
    def test_stairs(self, start: float) -> None:
        """A price that jumps from 3 to 0.5 at noise 5 and is flat elsewhere."""
        price, asked = self.counted(lambda noise: 0.5 if noise >= 5 else 3.0)
        found = accounting._least(price, 1.0, start, 1e-3)
        assert found is not None
        assert 5 <= found <= 5 * 1.001
        assert len(asked) <= 60

    def test_a_price_of_zero(self) -> None:
        price, _ = self.counted(lambda noise: 0.0 if noise >= 2 else 9.0)
        found = accounting._least(price, 1.0, 1.5, 1e-3)
        assert found is not None
        assert 2 <= found <= 3  # the first guess above it

    def test_a_price_that_is_beyond_all_bounds(self) -> None:
        price, asked = self.counted(lambda noise: math.inf if noise < 3 else 0.9)
        found = accounting._least(price, 1.0, 1.0, 1e-3)
        assert found is not None
        assert 3 <= found <= 3 * 1.001
        assert len(asked) <= 60

    def test_what_costs_nothing_is_not_made_cheaper(self) -> None:
        """Less noise is slower to price, and would buy nothing."""
        price, asked = self.counted(lambda _: 0.0)
        assert accounting._least(price, 1.0, 4.0, 1e-3) == 4.0
        assert asked == [4.0]

    def test_no_noise_is_enough(self) -> None:
        assert accounting._least(lambda _: 2.0, 1.0, 1.0, 1e-3) is None

    def test_hardly_any_noise_is_needed(self) -> None:
        found = accounting._least(lambda _: 0.5, 1.0, 1.0, 1e-3)
        assert found is not None
        assert found < 0.02

    @pytest.mark.parametrize(
        ("epsilon", "delta", "multiplier"),
        [(1.0, 1e-5, 3.730632), (3.0, 1e-5, 1.390593), (0.5, 1e-6, 8.057618)],
    )
    def test_the_guess_for_one_gaussian_mechanism_is_exact(
        self, epsilon: float, delta: float, multiplier: float
    ) -> None:
        """Balle and Wang 2018, theorem 8, solved by scipy's normal distribution and brentq."""
        assert accounting._guess(1.0, 1, epsilon, delta) == pytest.approx(multiplier, rel=1e-5)
        four = accounting._guess(1.0, 4, epsilon, delta)
        assert four == pytest.approx(2 * multiplier, rel=1e-5)


@pytest.mark.parametrize(
    ("rate", "count", "epsilon", "delta"),
    [(0.1, 100, 3.0, 1e-15), (1.0, 5, 3.0, 1e-15), (1.0, 5, 3.0, 1e-16), (1e-160, 1, 3.0, 1e-5),
     (1e-6, 1, 3.0, 1e-5)],
)  # fmt: skip
def test_at_the_edge_a_price_is_found_or_refused(
    rate: float, count: int, epsilon: float, delta: float
) -> None:
    try:
        found = calibrate(rate, count, epsilon, delta)
    except AccountingError:
        return
    assert pld_epsilon(found, delta) <= epsilon
