"""A run's price: never above what was asked for, and for exactly what runs."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from fedveil.config import ConfigError, RunConfig
from fedveil.privacy.accounting import Releases, pld_epsilon, pld_schedule
from fedveil.privacy.plan import Plan, plan

# That a library's warning reaches the user is test_accounting's to tell.
pytestmark = pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")

MakeConfig = Callable[..., RunConfig]

# (mechanism, epsilon, rounds, local steps, sampling rate, delta)
GRID = [
    ("central", 3.0, 200, 1, None, None),
    ("central", 4.0, 2, 1, 0.3, 1e-5),
    ("central", 1.0, 1, 1, 1.0, 1e-6),
    ("central", 0.1, 130, 1, 0.02, 1e-5),
    ("local", 4.0, 3, 5, 0.3, 1e-5),
    ("local", 0.5, 70, 2, 0.01, 1e-9),
]
NAMES = [f"{row[0]}-epsilon{row[1]:g}-rounds{row[2]}x{row[3]}" for row in GRID]


@pytest.fixture(scope="module", params=GRID, ids=NAMES)
def configuration(request: pytest.FixtureRequest) -> RunConfig:
    mechanism, epsilon, rounds, steps, rate, delta = request.param
    privacy = {"mechanism": mechanism, "epsilon": epsilon, "sampling_rate": rate, "delta": delta}
    return small(
        federation={"sites": 3, "rounds": rounds},
        training={"local_steps": steps},
        privacy={key: value for key, value in privacy.items() if value is not None},
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


class TestThePrice:
    def test_never_exceeds_the_target_and_wastes_no_noise(self, priced: Plan) -> None:
        assert priced.epsilon is not None
        assert priced.target_epsilon is not None
        assert 0.98 * priced.target_epsilon < priced.epsilon <= priced.target_epsilon

    def test_is_an_upper_bound_on_the_finest_price(self, priced: Plan) -> None:
        assert priced.epsilon is not None
        assert pld_epsilon(releases_of(priced), priced.delta, grid=1e-4) <= priced.epsilon + 1e-12

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
        assert priced.target_epsilon == configuration.privacy.epsilon
        assert priced.accountant == "PLD"
        assert {name for name, _ in priced.second_opinions} == {"rdp", "prv"}

    def test_the_divisor_is_the_expected_batch_by_public_numbers(self, priced: Plan) -> None:
        pool = 1797 * 0.9 / (3 if priced.mechanism == "local" else 1)
        assert priced.expected_batch == pytest.approx(priced.sampling_rate * pool)


class TestTheSchedule:
    def test_never_falls_and_ends_at_the_price(self, priced: Plan) -> None:
        assert len(priced.schedule) == priced.rounds
        assert list(priced.schedule) == sorted(priced.schedule)
        assert priced.schedule[-1] == priced.epsilon
        assert priced.schedule[0] > 0

    def test_bounds_the_exact_price_of_every_round(self, priced: Plan) -> None:
        rounds = sorted({1, 2, 3, priced.rounds // 2, priced.rounds - 1, priced.rounds} - {0})
        rounds = [r for r in rounds if r <= priced.rounds]
        exact = pld_schedule(
            releases_of(priced), priced.delta, [r * priced.releases_per_round for r in rounds]
        )
        for number, price in zip(rounds, exact, strict=True):
            # The last round's claim may come from the finer grid, which is below the coarse one.
            epsilon = priced.epsilon_after(number)
            assert epsilon is not None
            assert epsilon == priced.schedule[number - 1]
            assert epsilon >= min(price, priced.schedule[-1]) - 1e-12

    def test_nothing_is_spent_before_the_first_round(self, priced: Plan) -> None:
        assert priced.epsilon_after(0) == 0.0

    def test_more_rounds_than_priced_are_refused(self, priced: Plan) -> None:
        for wrong in (-1, priced.rounds + 1, 10 * priced.rounds):
            with pytest.raises(ValueError, match=f"must be 0 to the {priced.rounds} that are"):
                priced.epsilon_after(wrong)


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
    plan.cache_clear()
    first = plan(config)
    plan.cache_clear()
    assert plan(theirs) == first


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
        assert priced.accountant == "none"
        assert [priced.epsilon_after(n) for n in (0, 1, 2)] == [None, None, None]
        with pytest.raises(ValueError, match="must be 0 to the 2"):
            priced.epsilon_after(3)

    def test_neither_clips_nor_adds_noise(self, priced: Plan) -> None:
        assert priced.clipping_norm == math.inf
        assert priced.noise_multiplier == 0

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


def test_a_budget_out_of_reach_is_a_configuration_error(make_config: MakeConfig) -> None:
    config = make_config(federation={"rounds": 1}, privacy={"epsilon": 1e-6, "sampling_rate": 1.0})
    with pytest.raises(ConfigError, match=r"privacy\.epsilon = 1e-06: cannot be reached"):
        plan(config)
