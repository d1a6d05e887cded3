"""The price of the round of statistics: beside rounds, alone, and in the ledger's terms."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from fedveil.config import RunConfig
from fedveil.privacy import plan as plan_module
from fedveil.privacy import shared_noise
from fedveil.privacy.books import order
from fedveil.privacy.plan import Plan, plan

pytestmark = pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")

MakeConfig = Callable[..., RunConfig]
Priced = Callable[..., Plan]


@pytest.fixture
def priced(make_config: MakeConfig) -> Priced:
    """Plans of runs that are soon priced, for nothing is sampled."""

    def made(share: float, **sections: dict[str, Any]) -> Plan:
        privacy = {"epsilon": 2.0, "sampling_rate": 1.0, "statistics_share": share}
        asked = {**privacy, **sections.pop("privacy", {})}
        rounds = {"federation": {"rounds": 5}} if share < 1 else {}
        options = {**rounds, "evaluation": {"samples": 100}, **sections}
        config = make_config(privacy=asked, **options).resolved()
        return _remembered(config.model_dump_json(by_alias=True))

    return made


@lru_cache
def _remembered(config: str) -> Plan:
    return plan(RunConfig.model_validate_json(config))


def composed(delta: float, *gaussians: tuple[float, int]) -> float:
    """Epsilon of Gaussian releases (noise multiplier, count), as dp_accounting composes them."""
    accountant = PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-4
    )
    for noise, count in gaussians:
        accountant.compose(dp_accounting.GaussianDpEvent(noise), count)
    return float(accountant.get_epsilon(delta))


def analytic(noise: float, epsilon: float) -> float:
    """Delta of one Gaussian release (Balle and Wang 2018, theorem 8)."""

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    a, b = 1 / (2 * noise), epsilon * noise
    return below(a - b) - math.exp(epsilon) * below(-a - b)


class TestBesideRounds:
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_together_they_end_at_the_target(self, priced: Priced, share: float) -> None:
        found = priced(share)
        assert found.statistics == 1
        assert found.rounds == 5
        together = (found.statistics_noise, 1), (found.noise_multiplier, 5)
        assert 0.98 * 2 < composed(found.delta, *together) <= 2.0
        assert found.training_epsilon == pytest.approx(composed(found.delta, *together), rel=2e-3)
        alone = composed(found.delta, together[0])
        assert 0.98 * share * 2 < alone <= share * 2 + 1e-6
        assert found.statistics_epsilon == pytest.approx(alone, rel=2e-3)
        # Not what one of them leaves out.
        assert composed(found.delta, together[1]) < 0.999 * 2

    def test_the_noise_is_the_analytic_one(self, priced: Priced) -> None:
        found = priced(0.5)
        assert found.statistics_epsilon is not None
        delta = analytic(found.statistics_noise, found.statistics_epsilon)
        assert 0.98 * found.delta < delta <= found.delta

    def test_more_for_them_is_less_for_the_rounds(self, priced: Priced) -> None:
        plans = [priced(share) for share in (0.0, 0.1, 0.5, 0.9)]
        assert [one.statistics for one in plans] == [0, 1, 1, 1]
        noises = [one.noise_multiplier for one in plans]
        assert noises == sorted(noises)
        assert len(set(noises)) == 4
        first = [one.statistics_noise for one in plans[1:]]
        assert first == sorted(first, reverse=True)

    def test_and_beside_training_figures(self, priced: Priced) -> None:
        found = priced(0.5, evaluation={"training_share": 0.2, "every": 2})
        assert found.evaluations == 3
        parts = [(found.statistics_noise, 1), (found.noise_multiplier, 5), (found.figures_noise, 3)]
        assert 0.98 * 2 < composed(found.delta, *parts) <= 2.0
        for left_out in parts:
            rest = [part for part in parts if part is not left_out]
            assert composed(found.delta, *rest) < 0.999 * 2

    def test_sites_that_release_by_themselves_pay_the_same(self, priced: Priced) -> None:
        found = priced(0.5, privacy={"mechanism": "local"}, training={"local_steps": 2})
        parts = (found.statistics_noise, 1), (found.noise_multiplier, 10)
        assert 0.98 * 2 < composed(found.delta, *parts) <= 2.0


class TestAlone:
    def test_they_have_the_whole_budget(self, priced: Priced) -> None:
        found = priced(1.0)
        assert (found.rounds, found.noise_multiplier, found.schedule) == (0, 0.0, ())
        assert [part.name for part in found.parts] == ["statistics", "evaluations"]
        assert 0.98 * 2 < composed(found.delta, (found.statistics_noise, 1)) <= 2.0
        assert found.training_epsilon == pytest.approx(found.statistics_epsilon, rel=1e-3)
        assert found.evaluations == 1
        assert {name for name, _ in found.second_opinions} == {"rdp", "prv"}

    def test_but_for_what_training_figures_take(self, priced: Priced) -> None:
        found = priced(1.0, evaluation={"training_share": 0.3})
        parts = (found.statistics_noise, 1), (found.figures_noise, 1)
        assert 0.98 * 2 < composed(found.delta, *parts) <= 2.0
        assert found.training_epsilon == pytest.approx(composed(found.delta, *parts), rel=2e-3)
        assert composed(found.delta, parts[0]) < 0.99 * 2
        assert composed(found.delta, parts[1]) <= 0.3 * 2
        assert found.epsilon_after(0, 1, 1) == found.epsilon

    def test_of_a_family_that_is_fitted(self, make_config: MakeConfig) -> None:
        raw = make_config().model_dump(by_alias=True)
        raw["model"] = {"family": "marginal"}
        raw["privacy"] |= {"statistics_share": None, "epsilon": 2.0}
        found = plan(RunConfig.model_validate(raw).resolved("image"))
        assert (found.rounds, found.statistics) == (0, 1)
        assert found.epsilon is not None
        assert 0.98 * 2 < found.epsilon <= 2.0

    def test_without_a_share_there_are_none(self, priced: Priced) -> None:
        found = priced(0.0)
        assert (found.statistics, found.statistics_noise) == (0, 0.0)
        assert not found.statistics_epsilon
        assert "statistics" not in {part.name for part in found.parts}
        with pytest.raises(ValueError, match="statistics = 1: must be 0 to the 0"):
            found.epsilon_after(0, 0, 1)


class TestEpsilonAfter:
    @pytest.mark.parametrize(("share", "figures"), [(0.5, 0.2), (0.95, 0.0), (1.0, 0.3)])
    def test_begins_with_their_price_and_never_falls(
        self, priced: Priced, share: float, figures: float
    ) -> None:
        found = priced(share, evaluation={"training_share": figures, "every": 2})
        after = found.epsilon_after
        assert after(0, 0, 0) == 0.0
        assert after(0, 0, 1) == found.statistics_epsilon
        assert found.epsilon is not None
        most = found.rounds, found.evaluations
        path = [(0, 0, 0), *((n, e, 1) for n, e in product(range(most[0] + 1), [0]))]
        path += [(most[0], e, 1) for e in range(most[1] + 1)]
        spent = [after(*step) or 0.0 for step in path]
        assert spent == sorted(spent)
        assert spent[-1] == found.epsilon
        other = [after(0, e, 1) or 0.0 for e in range(most[1] + 1)]
        assert other == sorted(other)
        assert other[-1] <= found.epsilon

    def test_of_rounds_has_them_in_it(self, priced: Priced) -> None:
        found = priced(0.5)
        for done in range(1, 6):
            exact = composed(
                found.delta, (found.statistics_noise, 1), (found.noise_multiplier, done)
            )
            after = found.epsilon_after(done, 0, 1)
            assert after is not None
            assert after >= min(exact, found.training_epsilon or 0.0) - 1e-4

    @pytest.mark.parametrize("wrong", [-1, 2])
    def test_more_than_are_priced_are_refused(self, priced: Priced, wrong: int) -> None:
        with pytest.raises(ValueError, match=f"statistics = {wrong}: must be 0 to the 1 that"):
            priced(0.5).epsilon_after(0, 0, wrong)


class TestTheLedger:
    @pytest.mark.parametrize("share", [0.5, 1.0])
    def test_reserves_them_as_one_commit_of_the_training_account(
        self, priced: Priced, share: float
    ) -> None:
        found = priced(share)
        asked = order("run", "terms", "data", found)
        charges = {charge.side: charge for charge in asked.charges}
        assert charges["training"].epsilon == found.training_epsilon
        first = charges["training"].parts[0]
        assert (first.name, first.side, first.count) == ("statistics", "training", 1)
        each = dp_accounting.GaussianDpEvent(found.statistics_noise)
        assert first.each.event == dp_accounting.SelfComposedDpEvent(each, 1)
        assert [part.name for part in charges["training"].parts[1:]] == ["rounds"] * (share < 1)
        assert [part.name for part in charges["holdout"].parts] == ["evaluations"]

    def test_without_noise_as_what_it_is(self, priced: Priced) -> None:
        found = priced(0.5, privacy={"mechanism": "none"})
        assert (found.statistics, found.statistics_noise) == (1, 0.0)
        assert (found.statistics_epsilon, found.epsilon_after(0, 0, 1)) == (None, None)
        assert str(found.parts[0].each.event) == "NonPrivateDpEvent()"


class TestUnits:
    def test_a_record_or_a_person_adds_one_to_them(self, priced: Priced) -> None:
        assert priced(0.5).statistics_units == 1.0
        person = priced(0.5, privacy={"unit": "person"}, data={"persons": 300})
        assert person.statistics_units == 1.0

    def test_a_site_adds_all_its_records_on_one_account(self, priced: Priced) -> None:
        site = {"mechanism": "site", "epsilon_holdout": 0.2}
        found = priced(0.5, privacy=site, aggregation={"encryption": "none"})
        # 1797 records, of which a tenth is held out, at three sites.
        assert found.statistics_units == pytest.approx(1797 * 0.9 / 3)
        assert {part.side for part in found.parts} == {"training"}
        parts = [
            (found.statistics_noise, 1),
            (found.noise_multiplier, found.rounds),
            (found.evaluation_noise, found.evaluations),
        ]
        assert 0.98 * 2 < composed(found.delta, *parts) <= 2.0
        assert found.epsilon_after(0, 0, 1) == found.statistics_epsilon

    def test_their_price_is_a_part_of_what_is_claimed(self, priced: Priced) -> None:
        """So that a folder that was priced otherwise is not taken for this run's."""
        assert priced(0.5).as_dict()["statistics_noise"] == priced(0.5).statistics_noise
        assert replace(priced(0.5), statistics_units=2.0) != priced(0.5)


class TestSlack:
    def test_counts_their_block_too(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counted = []
        real = shared_noise.slack

        def noted(releases: int, *rest: Any) -> tuple[float, float]:  # noqa: ANN401
            counted.append(releases)
            return real(releases, *rest)

        monkeypatch.setattr(plan_module, "slack", noted)
        plan_module._plan.cache_clear()
        privacy = {"epsilon": 2.0, "sampling_rate": 1.0, "mechanism": "distributed"}
        for share, blocks in ((0.5, 1 + 2 + 2 * 2), (1.0, 1 + 0 + 2 * 1)):
            config = make_config(privacy={**privacy, "statistics_share": share})
            found = plan(config.resolved())
            assert (counted[-1], found.evaluations) == (blocks, 2 if share < 1 else 1)
            assert found.slack == real(blocks, 3, 2.0)
            # And it is in what is told of them alone.
            alone = composed(found.delta - found.slack[1], (found.statistics_noise, 1))
            assert found.statistics_epsilon == pytest.approx(alone + found.slack[0], rel=2e-3)
            assert (found.epsilon or math.inf) <= 2.0
