"""Prices, held against closed forms that are computed here and against each other."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedveil.privacy.accounting import (
    COARSE_GRID,
    FINE_GRID,
    AccountingError,
    Releases,
    calibrate,
    cross_check,
    pld_epsilon,
    pld_schedule,
    prv_epsilon,
    rdp_epsilon,
)

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
