"""A run's price: never above what was asked for, and for exactly what runs."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from fedveil.config import ConfigError, RunConfig
from fedveil.privacy import plan as plan_module
from fedveil.privacy.accounting import Releases, events_epsilon, pld_epsilon, pld_schedule
from fedveil.privacy.plan import Part, Plan, plan
from fedveil.privacy.secagg.terms import Numbers

# That a library's warning reaches the user is test_accounting's to tell.
pytestmark = pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")

MakeConfig = Callable[..., RunConfig]

# (mechanism, epsilon, rounds, local steps, sampling rate, delta, epsilon_holdout, training_share)
GRID = [
    ("central", 3.0, 200, 1, None, None, None, 0.0),
    ("central", 4.0, 2, 1, 0.3, 1e-5, 1.0, 0.2),
    ("central", 1.0, 1, 1, 1.0, 1e-6, 2.5, 0.0),
    ("central", 0.1, 130, 1, 0.02, 1e-5, None, 0.5),
    ("local", 4.0, 3, 5, 0.3, 1e-5, None, 0.0),
    ("local", 0.5, 70, 2, 0.01, 1e-9, None, 0.1),
]
NAMES = [
    f"{row[0]}-epsilon{row[1]:g}-rounds{row[2]}x{row[3]}-holdout{row[6]}-share{row[7]}"
    for row in GRID
]


@pytest.fixture(scope="module", params=GRID, ids=NAMES)
def configuration(request: pytest.FixtureRequest) -> RunConfig:
    mechanism, epsilon, rounds, steps, rate, delta, holdout, share = request.param
    return small(
        federation={"sites": 3, "rounds": rounds},
        training={"local_steps": steps},
        privacy={
            "mechanism": mechanism,
            "epsilon": epsilon,
            "sampling_rate": rate,
            "delta": delta,
            "epsilon_holdout": holdout,
        },
        evaluation={"training_share": share},
    )


def small(**sections: dict[str, Any]) -> RunConfig:
    raw: dict[str, Any] = {"data": {"source": "sklearn:digits"}, "model": {"family": "vae"}}
    return RunConfig.model_validate(raw | sections)


@pytest.fixture(scope="module")
def priced(configuration: RunConfig) -> Plan:
    return plan(configuration)


def releases_of(priced: Plan) -> Releases:
    count = priced.rounds * priced.releases_per_round
    return Releases(priced.noise_multiplier, priced.sampling_rate, count)


def figures_of(priced: Plan) -> tuple[Releases, ...]:
    """The sums over training records that an evaluation makes, if they are paid for."""
    each = Releases(priced.figures_noise, 1.0, priced.evaluations)
    return (each,) if priced.figures_noise else ()


def evaluations_of(priced: Plan) -> Releases:
    return Releases(priced.evaluation_noise, 1.0, priced.evaluations)


class TestThePrice:
    def test_never_exceeds_the_target_and_wastes_no_noise(
        self, configuration: RunConfig, priced: Plan
    ) -> None:
        training, holdout = priced.training_epsilon, priced.holdout_epsilon
        assert training is not None
        assert holdout is not None
        target = configuration.privacy.epsilon
        assert 0.98 * target < training <= target
        target = configuration.privacy.epsilon_holdout or target
        assert 0.98 * target < holdout <= target

    def test_is_the_larger_of_the_two_accounts(self, priced: Plan) -> None:
        assert priced.training_epsilon is not None
        assert priced.holdout_epsilon is not None
        assert priced.epsilon == max(priced.training_epsilon, priced.holdout_epsilon)

    def test_is_an_upper_bound_on_the_finest_price(self, priced: Plan) -> None:
        assert priced.training_epsilon is not None
        finest = pld_epsilon(releases_of(priced), priced.delta, 1e-4, figures_of(priced))
        assert finest <= priced.training_epsilon + 1e-12
        assert priced.holdout_epsilon is not None
        finest = pld_epsilon(evaluations_of(priced), priced.delta, 1e-4)
        assert finest <= priced.holdout_epsilon + 1e-12

    def test_of_either_account_is_dp_accountings_own_of_its_parts(self, priced: Plan) -> None:
        """What a ledger reserves and recomputes; within what two ways to compose may differ."""
        stated = {"training": priced.training_epsilon, "holdout": priced.holdout_epsilon}
        for side, epsilon in stated.items():
            events = {part.each.event: part.count for part in priced.parts if part.side == side}
            assert epsilon is not None
            found = events_epsilon(events, priced.delta, epsilon)
            assert found == pytest.approx(epsilon, rel=1e-4)

    def test_is_for_what_the_configuration_says(
        self, configuration: RunConfig, priced: Plan
    ) -> None:
        assert priced.mechanism == configuration.privacy.mechanism
        assert priced.unit == "record"
        assert priced.sampling_rate == configuration.sampling_rate
        assert priced.delta == configuration.delta
        assert priced.clipping_norm == configuration.privacy.clipping_norm
        assert priced.rounds == configuration.federation.rounds
        assert priced.releases_per_round == configuration.training.local_steps
        assert priced.target_epsilon == max(
            configuration.privacy.epsilon, configuration.epsilon_holdout
        )
        assert priced.evaluations == configuration.evaluations
        assert priced.accountant == "PLD"
        assert {name for name, _ in priced.second_opinions} == {"rdp", "prv"}

    def test_the_divisor_is_the_expected_batch_by_public_numbers(self, priced: Plan) -> None:
        pool = 1797 * 0.9 / (3 if priced.mechanism == "local" else 1)
        assert priced.expected_batch == pytest.approx(priced.sampling_rate * pool)


class TestTheSchedule:
    def test_never_falls_and_ends_at_the_price(self, priced: Plan) -> None:
        assert len(priced.schedule) == priced.rounds
        assert list(priced.schedule) == sorted(priced.schedule)
        assert priced.schedule[-1] == priced.training_epsilon
        assert priced.schedule[0] > 0

    def test_of_evaluations_never_falls_and_ends_at_its_price(self, priced: Plan) -> None:
        assert len(priced.evaluation_schedule) == priced.evaluations
        assert list(priced.evaluation_schedule) == sorted(priced.evaluation_schedule)
        assert priced.evaluation_schedule[-1] == priced.holdout_epsilon
        assert priced.evaluation_schedule[0] > 0

    def test_of_evaluations_bounds_the_exact_price_of_each(self, priced: Plan) -> None:
        count = priced.evaluations
        exact = pld_schedule(evaluations_of(priced), priced.delta, range(1, count + 1), 1e-4)
        for found, price in zip(priced.evaluation_schedule, exact, strict=True):
            assert found >= min(price, priced.evaluation_schedule[-1]) - 1e-12

    def test_bounds_the_exact_price_of_every_round(self, priced: Plan) -> None:
        rounds = sorted({1, 2, 3, priced.rounds // 2, priced.rounds - 1, priced.rounds} - {0})
        rounds = [r for r in rounds if r <= priced.rounds]
        exact = pld_schedule(
            releases_of(priced),
            priced.delta,
            [r * priced.releases_per_round for r in rounds],
            beside=figures_of(priced),
        )
        for number, price in zip(rounds, exact, strict=True):
            # The last round's claim may come from the finer grid, which is below the coarse one.
            epsilon = priced.epsilon_after(number)
            assert epsilon is not None
            assert epsilon == priced.schedule[number - 1]
            assert epsilon >= min(price, priced.schedule[-1]) - 1e-12

    def test_nothing_is_spent_before_the_first_round(self, priced: Plan) -> None:
        assert priced.epsilon_after(0) == priced.epsilon_after(0, 0) == 0.0

    def test_of_all_is_the_claim(self, priced: Plan) -> None:
        assert priced.epsilon_after(priced.rounds, priced.evaluations) == priced.epsilon

    def test_never_falls_with_either_count(self, priced: Plan) -> None:
        rounds = sorted({0, 1, priced.rounds // 2, priced.rounds})
        spent = [
            [priced.epsilon_after(n, e) or 0.0 for e in range(priced.evaluations + 1)]
            for n in rounds
        ]
        for row in (*spent, *zip(*spent, strict=True)):
            assert list(row) == sorted(row)

    def test_of_both_bounds_what_either_account_has_spent(self, priced: Plan) -> None:
        """Each account's own releases, priced by themselves."""
        steps, delta = priced.releases_per_round, priced.delta
        for rounds, done in {(0, 1), (1, 1), (priced.rounds // 2, priced.evaluations)}:
            found, claimed = priced.epsilon_after(rounds, done), priced.epsilon
            assert found is not None
            assert claimed is not None
            assert found <= claimed
            held_out = pld_epsilon(replace(evaluations_of(priced), count=done), delta)
            figures = [replace(part, count=done) for part in figures_of(priced)]
            trained = [replace(releases_of(priced), count=rounds * steps)] * bool(rounds)
            first, *beside = [*trained, *figures] or [Releases(1e4, 1.0, 1)]
            training = pld_epsilon(first, delta, beside=tuple(beside))
            # The coarse grid may price all of an account above its own claim.
            held_out = min(held_out, priced.evaluation_schedule[-1])
            training = min(training, priced.schedule[-1])
            assert found >= max(held_out, training) - 1e-12, (rounds, done)

    def test_more_rounds_than_priced_are_refused(self, priced: Plan) -> None:
        for wrong in (-1, priced.rounds + 1, 10 * priced.rounds):
            with pytest.raises(ValueError, match=f"must be 0 to the {priced.rounds} that are"):
                priced.epsilon_after(wrong)

    def test_more_evaluations_than_priced_are_refused(self, priced: Plan) -> None:
        for wrong in (-1, priced.evaluations + 1, 10 * priced.evaluations):
            with pytest.raises(
                ValueError,
                match=f"evaluations = {wrong}: must be 0 to the {priced.evaluations} that are",
            ):
                priced.epsilon_after(1, wrong)


class TestParts:
    """What ledgers reserve: each kind of release with its account, its event and its number."""

    def test_are_the_rounds_the_evaluations_and_the_training_figures(self, priced: Plan) -> None:
        step = replace(releases_of(priced), count=priced.releases_per_round)
        evaluation = Releases(priced.evaluation_noise, 1.0, 1)
        expected = [
            Part("rounds", "training", step, priced.rounds),
            Part("evaluations", "holdout", evaluation, priced.evaluations),
        ]
        if priced.figures_noise:
            each = Releases(priced.figures_noise, 1.0, 1)
            expected.append(Part("training_figures", "training", each, priced.evaluations))
        assert list(priced.parts) == expected

    def test_training_figures_are_made_only_if_they_are_paid_for(
        self, configuration: RunConfig, priced: Plan
    ) -> None:
        paid = configuration.evaluation.training_share > 0
        assert bool(priced.figures_noise) == paid
        assert ("training_figures" in {part.name for part in priced.parts}) == paid

    def test_the_noise_of_a_sum_is_for_its_sensitivity(self, priced: Plan) -> None:
        doubled = replace(priced, clipping_norm=2 * priced.clipping_norm)
        assert priced.noise_scale == priced.noise_multiplier * priced.clipping_norm > 0
        assert doubled.noise_scale == 2 * priced.noise_scale
        assert doubled.parts == priced.parts


FEW = {"epsilon": 2.0, "sampling_rate": 1.0}


class TestTheHoldout:
    @pytest.mark.parametrize(("epsilon", "held_out"), [(2.0, 0.5), (0.5, 2.0)])
    def test_the_claim_is_of_whoever_pays_more(
        self, make_config: MakeConfig, epsilon: float, held_out: float
    ) -> None:
        config = make_config(privacy={**FEW, "epsilon": epsilon, "epsilon_holdout": held_out})
        priced = plan(config)
        assert priced.training_epsilon == pytest.approx(epsilon, rel=0.01)
        assert priced.holdout_epsilon == pytest.approx(held_out, rel=0.01)
        assert priced.target_epsilon == 2.0
        assert priced.epsilon == pytest.approx(2.0, rel=0.01)
        # Not the sum: no record is on both sides.
        assert priced.epsilon is not None
        assert priced.epsilon <= 2.0

    def test_neither_account_pays_for_the_other(self, make_config: MakeConfig) -> None:
        cheap, dear = (
            plan(make_config(privacy={**FEW, "epsilon_holdout": held_out}))
            for held_out in (0.5, 4.0)
        )
        assert cheap.noise_multiplier == dear.noise_multiplier
        assert cheap.schedule == dear.schedule
        assert cheap.evaluation_noise > 4 * dear.evaluation_noise

    def test_more_evaluations_have_more_noise_each(self, make_config: MakeConfig) -> None:
        config = {"federation": {"rounds": 4}, "privacy": FEW}
        end, often = (plan(make_config(**config, evaluation={"every": n})) for n in (0, 1))
        assert (end.evaluations, often.evaluations) == (1, 4)
        # Four Gaussians of twice the scale are one of it.
        assert often.evaluation_noise == pytest.approx(2 * end.evaluation_noise, rel=5e-3)

    def test_without_one_nothing_is_evaluated_or_claimed_for_it(
        self, make_config: MakeConfig
    ) -> None:
        config = make_config(data={"holdout": 0.0}, privacy={**FEW, "epsilon_holdout": 9.0})
        priced = plan(config)
        assert priced.evaluations == 0
        assert priced.holdout_epsilon is None
        assert (priced.evaluation_noise, priced.evaluation_schedule) == (0.0, ())
        assert [part.name for part in priced.parts] == ["rounds"]
        assert priced.target_epsilon == 2.0
        assert priced.epsilon == priced.training_epsilon == priced.epsilon_after(2, 0)
        with pytest.raises(ValueError, match="evaluations = 1: must be 0 to the 0"):
            priced.epsilon_after(2, 1)

    def test_a_budget_out_of_its_reach_names_its_own_option(self, make_config: MakeConfig) -> None:
        config = make_config(privacy={**FEW, "epsilon_holdout": 1e-6})
        with pytest.raises(ConfigError, match=r"^privacy\.epsilon_holdout = 1e-06: cannot be"):
            plan(config)


class TestTrainingFigures:
    @pytest.mark.parametrize("share", [0.05, 0.5])
    def test_leave_less_for_the_rounds_and_end_at_the_target_with_them(
        self, make_config: MakeConfig, share: float
    ) -> None:
        def priced_at(share: float) -> Plan:
            return plan(make_config(privacy=FEW, evaluation={"training_share": share}))

        without, priced = priced_at(0.0), priced_at(share)
        assert priced.noise_multiplier > 1.001 * without.noise_multiplier
        figures = Releases(priced.figures_noise, 1.0, priced.evaluations)
        assert 0.98 * share * 2 < pld_epsilon(figures, priced.delta, 1e-4) <= share * 2
        both = pld_epsilon(releases_of(priced), priced.delta, 1e-4, (figures,))
        assert 0.98 * 2 < both <= 2.0
        assert priced.training_epsilon == pytest.approx(both, abs=1e-6)
        # The hold-out is another account.
        assert priced.evaluation_noise == without.evaluation_noise

    def test_are_in_the_price_before_the_first_round(self, make_config: MakeConfig) -> None:
        priced = plan(make_config(privacy=FEW, evaluation={"training_share": 0.5}))
        figures = pld_epsilon(Releases(priced.figures_noise, 1.0, 1), priced.delta, 1e-4)
        after = priced.epsilon_after(0, 1)
        assert after is not None
        assert after >= figures
        assert priced.epsilon_after(0, 0) == 0


def test_a_long_run_of_a_low_rate_wastes_no_noise_either() -> None:
    """The coarse grid's error grows with the number of releases."""
    config = small(
        federation={"rounds": 20_000},
        privacy={"epsilon": 1.0, "sampling_rate": 0.001, "delta": 1e-5},
    )
    priced = plan(config)
    assert priced.epsilon is not None
    assert 0.98 < priced.epsilon <= 1.0


def test_a_price_is_the_same_whoever_asks() -> None:
    """A site reads the resolved configuration off the wire and prices it anew."""
    config = small(privacy={"epsilon": 1.0, "sampling_rate": 1.0}, federation={"rounds": 1})
    theirs = RunConfig.model_validate_json(config.resolved().model_dump_json(by_alias=True))
    plan_module._plan.cache_clear()
    first = plan(config)
    plan_module._plan.cache_clear()
    assert plan(theirs) == first


def test_a_site_s_own_policy_and_ledger_change_no_price() -> None:
    """Nor are they worth another minute of pricing: it is one entry of the cache."""
    privacy = {"epsilon": 1.0, "sampling_rate": 1.0}
    run = small(privacy=privacy, federation={"rounds": 1})
    own = small(
        data={"source": "sklearn:digits", "dataset_id": "fedveil", "ledger": "/srv/ledger"},
        privacy=privacy,
        federation={"rounds": 1},
        policy={"epsilon_lifetime": 1.0, "delta_lifetime": 1e-4, "composition": "rdp"},
    )
    assert plan(own) == plan(run)
    assert plan(own) is plan(own.shared())


def test_local_steps_and_rounds_count_alike(make_config: MakeConfig) -> None:
    def noise(rounds: int, steps: int) -> float:
        return plan(
            make_config(
                federation={"rounds": rounds},
                training={"local_steps": steps},
                privacy={"mechanism": "local", "sampling_rate": 1.0, "epsilon": 1.0},
            )
        ).noise_multiplier

    assert noise(2, 6) == noise(6, 2) > noise(2, 2)


def test_against_names_whom_the_records_are_hidden_from(make_config: MakeConfig) -> None:
    privacy = {"epsilon": 1.0, "sampling_rate": 1.0}
    local = plan(make_config(privacy={**privacy, "mechanism": "local"}))
    central = plan(make_config(privacy=privacy))
    assert local.against == "everyone, the server and the other sites included"
    assert central.against.startswith("everyone but the server")


class TestNone:
    @pytest.fixture
    def priced(self, make_config: MakeConfig) -> Plan:
        return plan(make_config(privacy={"mechanism": "none"}))

    def test_promises_nothing_and_says_so(self, priced: Plan) -> None:
        assert "NOT PRIVATE" in priced.against
        assert priced.epsilon is None
        assert priced.target_epsilon is None
        assert priced.schedule == ()
        assert (priced.training_epsilon, priced.holdout_epsilon) == (None, None)
        assert priced.evaluation_schedule == ()
        assert priced.accountant == "none"
        assert [priced.epsilon_after(n) for n in (0, 1, 2)] == [None, None, None]
        assert priced.epsilon_after(2, 2) is None
        with pytest.raises(ValueError, match="must be 0 to the 2"):
            priced.epsilon_after(3)
        with pytest.raises(ValueError, match="must be 0 to the 2"):
            priced.epsilon_after(2, 3)

    def test_neither_clips_nor_adds_noise(self, priced: Plan) -> None:
        assert priced.clipping_norm == math.inf
        assert priced.noise_multiplier == 0
        assert priced.noise_scale == 0
        assert priced.evaluation_noise == priced.figures_noise == 0

    def test_evaluates_all_the_same(self, priced: Plan) -> None:
        """Its releases are counted like any other's; no ledger takes them for private."""
        assert [(part.name, part.count) for part in priced.parts] == [
            ("rounds", 2), ("evaluations", 2),
        ]  # fmt: skip
        assert {str(part.each.event) for part in priced.parts} == {"NonPrivateDpEvent()"}

    def test_makes_no_figures_of_training_records(self, make_config: MakeConfig) -> None:
        config = make_config(privacy={"mechanism": "none"}, evaluation={"training_share": 0.5})
        assert plan(config).figures_noise == 0

    def test_is_json_without_infinity(self, priced: Plan) -> None:
        values = json.loads(json.dumps(priced.as_dict(), allow_nan=False))
        assert values["epsilon"] is None
        assert values["clipping_norm"] is None


def test_plain_values_hold_the_claim_and_no_schedule(make_config: MakeConfig) -> None:
    priced = plan(make_config(privacy={"epsilon": 1.0, "sampling_rate": 1.0}))
    values = json.loads(json.dumps(priced.as_dict(), allow_nan=False))
    assert values["epsilon"] == priced.epsilon
    assert values["mechanism"] == "central"
    assert values["second_opinions"] == dict(priced.second_opinions)
    assert "schedule" not in values
    assert "evaluation_schedule" not in values
    assert values["training_epsilon"] == priced.training_epsilon
    assert values["holdout_epsilon"] == priced.holdout_epsilon
    assert values["evaluation_noise"] == priced.evaluation_noise


def test_a_budget_out_of_reach_is_a_configuration_error(make_config: MakeConfig) -> None:
    config = make_config(federation={"rounds": 1}, privacy={"epsilon": 1e-6, "sampling_rate": 1.0})
    with pytest.raises(ConfigError, match=r"privacy\.epsilon = 1e-06: cannot be reached"):
        plan(config)


def of_sites(**sections: dict[str, Any]) -> RunConfig:
    """A run of five sites under the unit `site`."""
    raw: dict[str, Any] = {
        "federation": {"sites": 5, "rounds": 8},
        "data": {"source": "sklearn:digits"},
        "model": {"family": "vae"},
        "privacy": {"mechanism": "site", "epsilon": 8.0},
    }
    for section, options in sections.items():
        raw[section] = raw.get(section, {}) | options
    return RunConfig.model_validate(raw)


class TestUnitSite:
    """A site's records are on both sides: one account, and nothing that a sample hides."""

    def test_there_is_one_account(self) -> None:
        priced = plan(of_sites())
        assert [(part.name, part.side) for part in priced.parts] == [
            ("rounds", "training"), ("evaluations", "training"),
        ]  # fmt: skip
        assert priced.holdout_epsilon is None
        assert priced.evaluation_schedule == ()
        assert priced.epsilon == priced.training_epsilon
        assert priced.target_epsilon == 8.0
        assert priced.epsilon is not None
        assert 0.98 * 8 < priced.epsilon <= 8

    def test_which_pays_for_rounds_and_evaluations_together(self) -> None:
        priced = plan(of_sites())
        rounds = Releases(priced.noise_multiplier, 1.0, 8)
        evaluations = Releases(priced.evaluation_noise, 1.0, priced.evaluations)
        assert priced.training_epsilon is not None
        alone = pld_epsilon(rounds, priced.delta, 1e-4)
        both = pld_epsilon(rounds, priced.delta, 1e-4, (evaluations,))
        assert alone + 0.05 < both <= priced.training_epsilon + 1e-12
        # By hand: Gaussians of z each are one of (sum of z^-2)^(-1/2).
        together = (8 / rounds.noise_multiplier**2 + 4 / evaluations.noise_multiplier**2) ** -0.5
        assert priced.evaluations == 4
        assert both == pytest.approx(
            pld_epsilon(Releases(together, 1.0, 1), priced.delta, 1e-4), rel=1e-3
        )
        events = {part.each.event: part.count for part in priced.parts}
        found = events_epsilon(events, priced.delta, priced.training_epsilon)
        assert found == pytest.approx(priced.training_epsilon, rel=1e-4)

    @pytest.mark.parametrize(("asked", "paid"), [(None, 0.8), (2.0, 2.0)])
    def test_evaluations_are_a_part_of_it(self, asked: float | None, paid: float) -> None:
        priced = plan(of_sites(privacy={"epsilon_holdout": asked}))
        evaluations = Releases(priced.evaluation_noise, 1.0, priced.evaluations)
        assert 0.98 * paid < pld_epsilon(evaluations, priced.delta, 1e-4) <= paid

    def test_their_first_is_in_the_price_before_the_first_round(self) -> None:
        priced = plan(of_sites())
        each = Releases(priced.evaluation_noise, 1.0, 1)
        for rounds in (0, 1, 5):
            found = priced.epsilon_after(rounds, 1)
            assert found is not None
            trained = (Releases(priced.noise_multiplier, 1.0, rounds),) * bool(rounds)
            assert found >= pld_epsilon(each, priced.delta, 1e-4, trained)
        assert priced.epsilon_after(0, 0) == 0
        assert priced.epsilon_after(8, 4) == priced.epsilon

    def test_without_evaluations_all_of_it_is_the_rounds(self) -> None:
        without, some = plan(of_sites(data={"holdout": 0.0})), plan(of_sites())
        assert [part.name for part in without.parts] == ["rounds"]
        assert without.noise_multiplier < some.noise_multiplier
        rounds = Releases(without.noise_multiplier, 1.0, 8)
        assert 0.98 * 8 < pld_epsilon(rounds, without.delta, 1e-4) <= 8

    def test_what_a_site_does_by_itself_is_one_release_at_rate_1(self) -> None:
        """Its steps and their samples hide nothing: the whole update is its own."""
        steps = of_sites(training={"local_steps": 7}, privacy={"sampling_rate": 0.1})
        priced = plan(steps)
        assert priced.releases_per_round == 1
        assert priced.sampling_rate == 0.1
        assert priced.parts[0] == Part(
            "rounds", "training", Releases(priced.noise_multiplier, 1.0, 1), 8
        )
        assert priced.schedule == plan(of_sites()).schedule

    @pytest.mark.parametrize(("holdout", "units"), [(0.1, 35.94), (0.5, 179.7), (0.002, 1.0)])
    def test_one_unit_adds_a_sites_share_of_the_held_out_records(
        self, holdout: float, units: float
    ) -> None:
        # 1797 records at 5 sites; and never less than one record.
        priced = plan(of_sites(data={"holdout": holdout}))
        assert priced.evaluation_units == pytest.approx(units)

    def test_under_other_units_it_is_one(self, make_config: MakeConfig) -> None:
        assert plan(make_config(privacy=FEW)).evaluation_units == 1.0

    def test_a_part_out_of_reach_names_its_own_option(self) -> None:
        with pytest.raises(ConfigError, match=r"^privacy\.epsilon_holdout = 1e-07: cannot be"):
            plan(of_sites(privacy={"epsilon_holdout": 1e-7}))


class TestAdaptiveClipping:
    """Andrew et al. 2021, theorem 1: z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)."""

    def test_by_hand(self) -> None:
        priced = replace(plan(of_sites()), noise_multiplier=3.0, adaptive=True)
        # A tenth of a round's z^-2: 2 sigma_b = 3 sqrt(10), z_delta = 3 / sqrt(0.9).
        assert priced.indicator_noise == pytest.approx(9.486832980505138)
        assert priced.update_noise == pytest.approx(3.1622776601683795)
        assert priced.update_noise == pytest.approx(
            (priced.noise_multiplier**-2 - priced.indicator_noise**-2) ** -0.5
        )

    def test_both_releases_of_a_round_cost_what_it_is_priced_for(self) -> None:
        priced = plan(of_sites(privacy={"clipping": "adaptive"}))
        round_price = pld_epsilon(Releases(priced.noise_multiplier, 1.0, 8), priced.delta, 1e-4)
        update = Releases(priced.update_noise, 1.0, 8)
        indicator = Releases(priced.indicator_noise, 1.0, 8)
        assert pld_epsilon(update, priced.delta, 1e-4, (indicator,)) == pytest.approx(
            round_price, rel=1e-3
        )

    def test_the_round_as_a_whole_is_priced_as_without_it(self) -> None:
        fixed, adaptive = plan(of_sites()), plan(of_sites(privacy={"clipping": "adaptive"}))
        assert (fixed.adaptive, adaptive.adaptive) == (False, True)
        assert adaptive.noise_multiplier == fixed.noise_multiplier
        assert adaptive.parts == fixed.parts
        assert fixed.update_noise == fixed.noise_multiplier < adaptive.update_noise


class TestSharedNoise:
    @pytest.mark.parametrize(
        ("numbers", "honest", "excess"),
        [
            (Numbers(5, 4, 4, 1), 3, math.sqrt(5 / 3)),
            (Numbers(10, 6, 9, 1), 8, math.sqrt(10 / 8)),
            (Numbers(10, 7, 10, 3), 7, math.sqrt(10 / 7)),
        ],
    )
    def test_the_honest_sites_and_the_excess_by_hand(
        self, numbers: Numbers, honest: int, excess: float
    ) -> None:
        priced = replace(plan(of_sites()), numbers=numbers)
        assert priced.honest == honest
        assert priced.excess == pytest.approx(excess)
        assert priced.as_dict()["excess"] == priced.excess

    def test_is_of_two_mechanisms_in_a_secure_sum_only(self, make_config: MakeConfig) -> None:
        none = plan(make_config(privacy={"mechanism": "none"}))
        numbers = Numbers(5, 4, 4, 1)
        for mechanism in ("distributed", "site", "central", "local", "none"):
            secret = replace(none, mechanism=mechanism, numbers=numbers)
            assert secret.shares_noise == (mechanism in {"distributed", "site"}), mechanism
            alone = replace(none, mechanism=mechanism)
            assert not alone.shares_noise
            assert alone.excess == 1.0
            assert alone.honest == 1

    def test_the_numbers_are_the_configurations_and_only_of_a_secure_sum(
        self, make_config: MakeConfig
    ) -> None:
        distributed = make_config(
            federation={"sites": 10},
            privacy={**FEW, "mechanism": "distributed"},
            secagg={"t_collude": 2, "n_min": 8},
        )
        # floor((10 + 2) / 2) + 1 = 7.
        assert plan(distributed).numbers == Numbers(10, 7, 8, 2)
        assert plan(distributed).encryption == "secagg"
        central = plan(make_config(privacy=FEW))
        assert (central.numbers, central.encryption) == (None, "none")
        assert central.slack == (0.0, 0.0)
        assert plan(make_config(privacy=FEW, aggregation={"encryption": "secagg"})).slack == (0, 0)

    def test_a_price_beyond_what_integers_can_keep_is_a_configuration_error(self) -> None:
        for epsilon in (50.0, 100.0):
            with pytest.raises(ConfigError, match=rf"^privacy\.epsilon = {epsilon:g}: is more"):
                plan(small(privacy={"epsilon": epsilon, "mechanism": "distributed"}))
        with pytest.raises(ConfigError, match=r"^privacy\.epsilon_holdout = 99: is more than"):
            plan(small(privacy={"epsilon_holdout": 99.0, "mechanism": "distributed"}))


class TestSlack:
    """It is far too small to be seen: here the integers cost more, to see where it goes."""

    OVER = (0.25, 4e-6)

    @pytest.fixture
    def counted(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, float]]]:
        asked: list[tuple[int, int, float]] = []

        def costly(releases: int, sites: int, epsilon: float) -> tuple[float, float]:
            asked.append((releases, sites, epsilon))
            return self.OVER

        monkeypatch.setattr(plan_module, "slack", costly)
        plan_module._plan.cache_clear()
        yield asked
        plan_module._plan.cache_clear()

    def test_is_inside_the_claim_of_either_account(
        self, counted: list[tuple[int, int, float]]
    ) -> None:
        config = small(
            federation={"sites": 5, "rounds": 2},
            privacy={"epsilon": 3.0, "delta": 1e-5, "epsilon_holdout": 1.0},
            evaluation={"every": 1},
        )
        priced = plan(config)
        assert priced.slack == self.OVER
        assert priced.as_dict()["slack"] == {"epsilon": 0.25, "delta": 4e-6}
        left = priced.delta - self.OVER[1]
        assert priced.delta == 1e-5
        for releases, target, schedule in (
            (releases_of(priced), 3.0, priced.schedule),
            (evaluations_of(priced), 1.0, priced.evaluation_schedule),
        ):
            exact = pld_schedule(releases, left, [1, 2], 1e-4)
            assert 0.98 * target < exact[-1] + 0.25 <= schedule[-1] + 1e-12 <= target + 1e-12
            assert schedule[0] >= exact[0] + 0.25 - 1e-12
        # One of statistics, if there is one; two rounds; two evaluations, of up to two blocks each.
        assert counted == [(7, 5, 3.0)]

    def test_of_one_account_is_paid_once(self, counted: list[tuple[int, int, float]]) -> None:
        priced = plan(of_sites(privacy={"delta": 1e-5}))
        left = priced.delta - self.OVER[1]
        rounds = Releases(priced.noise_multiplier, 1.0, 8)
        evaluations = Releases(priced.evaluation_noise, 1.0, 4)
        both = pld_epsilon(rounds, left, 1e-4, (evaluations,))
        assert priced.epsilon is not None
        assert 0.98 * 8 < both + 0.25 <= priced.epsilon + 1e-12 <= 8 + 1e-12
        assert 0.98 * 0.8 < pld_epsilon(evaluations, left, 1e-4) <= 0.8
        assert counted == [(17, 5, 8.0)]

    def test_a_norm_that_adapts_is_another_block_a_round(
        self, counted: list[tuple[int, int, float]]
    ) -> None:
        plan(of_sites(privacy={"clipping": "adaptive"}))
        # Statistics, eight updates, eight numbers of those within, four evaluations of up to two.
        assert counted == [(25, 5, 8.0)]

    def test_without_shared_noise_there_is_none(
        self, counted: list[tuple[int, int, float]], make_config: MakeConfig
    ) -> None:
        for config in (
            make_config(privacy=FEW, aggregation={"encryption": "secagg"}),
            make_config(privacy={**FEW, "mechanism": "local"}),
            of_sites(aggregation={"encryption": "none"}),
        ):
            assert plan(config).slack == (0.0, 0.0)
        assert counted == []

    def test_more_than_the_whole_delta_is_refused(
        self, counted: list[tuple[int, int, float]]
    ) -> None:
        with pytest.raises(
            ConfigError, match=r"^privacy\.epsilon = 8: .* within privacy\.delta = 1e-06; lower it$"
        ):
            plan(of_sites(privacy={"delta": 1e-6}))
        assert counted
