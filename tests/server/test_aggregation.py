"""Strategies by hand-computed numbers, and against torch's own Adam."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from fedveil.config import COMPATIBILITY, RunConfig
from fedveil.server.aggregation import (
    STRATEGIES,
    ServerState,
    adapted,
    init_plain,
    mean,
    median,
    scaled,
    summed,
)

MakeConfig = Callable[..., RunConfig]
Arrays = Mapping[str, np.ndarray]


def vector(*numbers: float) -> np.ndarray:
    """A float32 vector that cannot be written to."""
    array = np.array(numbers, dtype=np.float32)
    array.flags.writeable = False
    return array


@pytest.fixture
def configured(make_config: MakeConfig) -> Callable[..., RunConfig]:
    """A configuration for one strategy."""

    def make(strategy: str, rate: float = 0.1, ema: float = 0.0) -> RunConfig:
        return make_config(
            privacy={"mechanism": "none"},
            aggregation={"strategy": strategy},
            training={
                "learning_rate": rate,
                "ema": ema,
                "local_steps": 2 if strategy == "fedprox" else 1,
            },
        )

    return make


def steps(config: RunConfig, model: Arrays, means: Sequence[Arrays]) -> list[ServerState]:
    """The states after each of some rounds, the initial one first."""
    strategy = STRATEGIES[config.strategy]
    states = [strategy.init(model)]
    for combined in means:
        states.append(strategy.apply(states[-1], combined, config))
    return states


def test_every_strategy_of_the_table_is_there() -> None:
    assert set(STRATEGIES) == {name for row in COMPATIBILITY.values() for name in row.strategies}


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestEvery:
    def test_it_starts_from_the_model(
        self, strategy: str, configured: Callable[..., RunConfig]
    ) -> None:
        model = {"w": vector(1, 2)}
        state = STRATEGIES[configured(strategy).strategy].init(model)
        assert (state.round, state.steps) == (0, 0)
        assert state.model["w"].tobytes() == model["w"].tobytes()
        assert state.average["w"].tobytes() == model["w"].tobytes()

    def test_steps_are_counted(self, strategy: str, configured: Callable[..., RunConfig]) -> None:
        states = steps(configured(strategy), {"w": vector(1)}, [{"w": vector(2)}] * 3)
        assert [state.steps for state in states] == [0, 1, 2, 3]

    def test_whose_round_it_is_the_caller_says(
        self, strategy: str, configured: Callable[..., RunConfig]
    ) -> None:
        """A round that is lost counts in the plan, but the optimiser has not seen it."""
        config, rule = configured(strategy, ema=0.9), STRATEGIES[configured(strategy).strategy]
        model, mean = {"w": vector(1, 2)}, {"w": vector(2, -1)}
        plain = steps(config, model, [mean] * 2)
        for before, expected in pairwise(plain):
            after = rule.apply(replace(before, round=7), mean, config)
            assert after.steps == expected.steps == before.steps + 1
            for part in ("model", "average", "first", "second"):
                old, new = getattr(expected, part), getattr(after, part)
                assert {n: a.tobytes() for n, a in old.items()} == {
                    n: a.tobytes() for n, a in new.items()
                }

    def test_all_stays_float32(self, strategy: str, configured: Callable[..., RunConfig]) -> None:
        states = steps(
            configured(strategy, ema=0.9), {"w": vector(1), "v": vector(1)}, [{"w": vector(2)}] * 2
        )
        for state in states:
            for part in (state.model, state.average, state.first, state.second):
                assert all(array.dtype == np.float32 for array in part.values())

    def test_nothing_is_changed_in_place(
        self, strategy: str, configured: Callable[..., RunConfig]
    ) -> None:
        model, mean = {"w": vector(1, 2), "v": vector(3)}, {"w": vector(0.5, -1)}
        states = steps(configured(strategy, ema=0.9), model, [mean])
        before = copy.deepcopy(states[-1])
        for state in states:
            for part in (state.model, state.average, state.first, state.second):
                for array in part.values():
                    array.flags.writeable = False
        STRATEGIES[configured(strategy).strategy].apply(states[-1], mean, configured(strategy))
        assert model.keys() == {"w", "v"}
        assert mean.keys() == {"w"}
        for name in ("model", "average", "first", "second"):
            old, new = getattr(before, name), getattr(states[-1], name)
            assert old.keys() == new.keys()
            assert all(old[key].tobytes() == new[key].tobytes() for key in old)

    def test_what_got_no_mean_stays(
        self, strategy: str, configured: Callable[..., RunConfig]
    ) -> None:
        states = steps(
            configured(strategy), {"w": vector(1), "frozen": vector(7)}, [{"w": vector(2)}] * 2
        )
        assert states[-1].model["frozen"].tolist() == [7]
        assert states[-1].average["frozen"].tolist() == [7]
        assert states[-1].model["w"].tolist() != [1]


class TestSums:
    def test_by_hand(self) -> None:
        parts = [{"w": np.array([n, 2.0 * n], dtype=np.float32)} for n in (1, 2, 3)]
        assert summed(parts)["w"].tolist() == [6, 12]

    def test_of_nothing(self) -> None:
        assert summed([]) == {}

    def test_in_float64(self) -> None:
        parts = [{"w": np.array([v], dtype=np.float32)} for v in (1e8, 1.0, -1e8)]
        assert summed(parts)["w"].tolist() == [1.0]

    def test_float64_parts_keep_their_bits(self) -> None:
        parts = [{"w": np.array([v])} for v in (1.0, 2.0**-50, 2.0**-51)]
        assert summed(parts)["w"].dtype == np.float64
        assert summed(parts)["w"].tolist() == [1 + 2.0**-50 + 2.0**-51]

    @pytest.mark.parametrize("kind", [np.float32, np.float64])
    def test_parts_are_not_changed(self, kind: type[np.floating]) -> None:
        parts = [{"w": np.ones(2, dtype=kind)} for _ in range(3)]
        summed(parts)
        assert all(part["w"].tolist() == [1, 1] for part in parts)

    def test_scaled(self) -> None:
        found = scaled({"w": np.array([3.0])}, 1 / 6)
        assert found["w"].dtype == np.float32
        assert found["w"].tolist() == [0.5]


class TestSgd:
    def test_by_hand(self, configured: Callable[..., RunConfig]) -> None:
        means = [{"w": vector(2, -4)}, {"w": vector(1, 0)}]
        states = steps(configured("sgd", rate=0.25), {"w": vector(1, 1)}, means)
        assert states[1].model["w"].tolist() == [0.5, 2.0]
        assert states[2].model["w"].tolist() == [0.25, 2.0]


class TestAdam:
    def test_three_steps_by_hand(self, configured: Callable[..., RunConfig]) -> None:
        """With one gradient all along, each step is the learning rate against its sign."""
        states = steps(
            configured("adam", rate=0.125), {"w": vector(1, 1)}, [{"w": vector(3, -5)}] * 3
        )
        for number, state in enumerate(states):
            assert state.model["w"] == pytest.approx(
                [1 - 0.125 * number, 1 + 0.125 * number], abs=1e-6
            )

    def test_moments_by_hand(self, configured: Callable[..., RunConfig]) -> None:
        states = steps(configured("adam"), {"w": vector(0)}, [{"w": vector(2)}, {"w": vector(-1)}])
        assert states[0].first["w"].tolist() == [0]
        assert states[1].first["w"] == pytest.approx([0.2], rel=1e-6)  # 0.1 * 2
        assert states[1].second["w"] == pytest.approx([0.004], rel=1e-6)  # 0.001 * 4
        assert states[2].first["w"] == pytest.approx([0.08], rel=1e-6)  # 0.9 * 0.2 - 0.1
        assert states[2].second["w"] == pytest.approx([0.004996], rel=1e-6)  # 0.999 * 0.004 + 0.001

    def test_as_torch_does(self, configured: Callable[..., RunConfig]) -> None:
        rng = np.random.default_rng(3)
        start = rng.normal(size=(4, 3)).astype(np.float32)
        gradients = [rng.normal(size=(4, 3)).astype(np.float32) for _ in range(20)]
        parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
        optimiser = torch.optim.Adam([parameter], lr=0.01)
        states = steps(configured("adam", rate=0.01), {"w": start}, [{"w": g} for g in gradients])
        for gradient, state in zip(gradients, states[1:], strict=True):
            parameter.grad = torch.from_numpy(gradient)
            optimiser.step()
            assert np.abs(parameter.detach().numpy() - state.model["w"]).max() < 1e-6

    def test_a_gradient_of_zero_moves_nothing(self, configured: Callable[..., RunConfig]) -> None:
        states = steps(configured("adam"), {"w": vector(1)}, [{"w": vector(0)}])
        assert states[1].model["w"].tolist() == [1]


class TestAverage:
    """Its decay is min(ema, t / (t + 9)) at step t."""

    def test_the_warm_up_by_hand(self, configured: Callable[..., RunConfig]) -> None:
        # The model goes 10, 9, 8, 7; the decays are 1/10, 2/11 and 3/12.
        config = configured("sgd", rate=1.0, ema=0.9)
        states = steps(config, {"w": vector(10)}, [{"w": vector(1)}] * 3)
        first = 10 * 0.1 + 9 * 0.9
        second = first * 2 / 11 + 8 * 9 / 11
        third = second * 0.25 + 7 * 0.75
        assert [float(s.average["w"][0]) for s in states] == pytest.approx(
            [10, first, second, third], rel=1e-6
        )

    def test_it_ends_at_the_decay_asked_for(self, configured: Callable[..., RunConfig]) -> None:
        # 0.2 is reached where t / (t + 9) is above it: at step 3 (0.25), not at 2 (0.18).
        config = configured("sgd", rate=1.0, ema=0.2)
        states = steps(config, {"w": vector(10)}, [{"w": vector(1)}] * 4)
        averages = [float(state.average["w"][0]) for state in states]
        assert averages[3] == pytest.approx(0.2 * averages[2] + 0.8 * 7, rel=1e-6)
        assert averages[4] == pytest.approx(0.2 * averages[3] + 0.8 * 6, rel=1e-6)

    @pytest.mark.parametrize("strategy", ["sgd", "adam"])
    def test_it_can_be_off(self, strategy: str, configured: Callable[..., RunConfig]) -> None:
        states = steps(configured(strategy, ema=0.0), {"w": vector(1)}, [{"w": vector(1)}] * 3)
        assert states[-1].average["w"].tobytes() == states[-1].model["w"].tobytes()

    def test_training_goes_on_from_the_model(self, configured: Callable[..., RunConfig]) -> None:
        config = configured("sgd", rate=1.0, ema=0.9)
        states = steps(config, {"w": vector(10)}, [{"w": vector(1)}] * 3)
        assert [float(s.model["w"][0]) for s in states] == [10, 9, 8, 7]


def test_fedavg_takes_the_mean_change(configured: Callable[..., RunConfig]) -> None:
    changes: list[Any] = [{"w": vector(4, 6)}, {"w": vector(-3, -5)}]
    states = steps(configured("fedavg", ema=0.9), {"w": vector(10, 20)}, changes)
    assert states[1].model["w"].tolist() == [14, 26]
    assert states[1].average["w"].tolist() == [14, 26]
    assert states[2].model["w"].tolist() == [11, 21]
    assert states[2].model["w"].dtype == np.float32


def test_what_is_not_sent_stays(configured: Callable[..., RunConfig]) -> None:
    model = {"w": vector(1), "frozen": vector(5)}
    for strategy in ("fedavg", "fedadam"):
        after = steps(configured(strategy), model, [{"w": vector(2)}])[1].model
        assert after["frozen"].tolist() == [5]
        assert after["w"].tolist() != [1]


def test_fedprox_takes_it_too_for_the_pull_is_the_sites(
    configured: Callable[..., RunConfig],
) -> None:
    states = steps(configured("fedprox", ema=0.9), {"w": vector(1, 2)}, [{"w": vector(4, 6)}])
    assert states[1].model["w"].tolist() == states[1].average["w"].tolist() == [5, 8]


class TestFedAdam:
    """Reddi et al. 2021, algorithm 2, with beta 0.9 and 0.99, tau 1e-3, here at rate 0.01."""

    def test_the_first_step_by_hand(self, configured: Callable[..., RunConfig]) -> None:
        # A mean change of 2: first 0.2, second 0.99e-6 + 0.04, root 0.2000025.
        states = steps(configured("fedadam"), {"w": vector(1)}, [{"w": vector(2)}])
        expected = 1 + 0.01 * 0.2 / (math.sqrt(0.99e-6 + 0.04) + 1e-3)
        assert float(states[1].model["w"][0]) == pytest.approx(expected, rel=1e-6)
        assert float(states[1].model["w"][0]) == pytest.approx(1.00995, abs=1e-6)

    def test_the_second_step_by_hand(self, configured: Callable[..., RunConfig]) -> None:
        # The sites' mean change is 2, twice.
        states = steps(configured("fedadam"), {"w": vector(1)}, [{"w": vector(2)}] * 2)
        first = 0.9 * 0.2 + 0.1 * 2
        second = 0.99 * (0.99e-6 + 0.04) + 0.01 * 4
        step = 0.01 * first / (math.sqrt(second) + 1e-3)
        moved = float(states[2].model["w"][0]) - float(states[1].model["w"][0])
        assert moved == pytest.approx(step, rel=1e-4)

    def test_without_a_change_the_model_stays(self, configured: Callable[..., RunConfig]) -> None:
        states = steps(configured("fedadam"), {"w": vector(5)}, [{"w": vector(0)}])
        assert states[1].model["w"].tolist() == [5]

    def test_a_small_change_makes_a_small_step(self, configured: Callable[..., RunConfig]) -> None:
        """The floor keeps the step in proportion where changes are far below it."""
        states = steps(configured("fedadam"), {"w": vector(0)}, [{"w": vector(1e-6)}])
        expected = 0.01 * 1e-7 / (math.sqrt(0.99e-6) + 1e-3)
        assert float(states[1].model["w"][0]) == pytest.approx(expected, rel=1e-4)

    def test_what_is_released_is_the_average(self, configured: Callable[..., RunConfig]) -> None:
        states = steps(configured("fedadam", ema=0.9), {"w": vector(1)}, [{"w": vector(2)}])
        moved = float(states[1].model["w"][0])
        assert float(states[1].average["w"][0]) == pytest.approx(0.1 * 1 + 0.9 * moved, rel=1e-6)


class TestCombining:
    def test_the_mean_by_hand(self) -> None:
        models = [{"w": vector(1, 8)}, {"w": vector(2, 0)}, {"w": vector(6, 1)}]
        assert mean(models)["w"].tolist() == [3, 3]

    def test_the_median_by_hand(self) -> None:
        models = [{"w": vector(1, 8)}, {"w": vector(2, 0)}, {"w": vector(6, 1)}]
        assert median(models)["w"].tolist() == [2, 1]

    def test_of_an_even_number_the_two_in_the_middle_count(self) -> None:
        models = [{"w": vector(number)} for number in (10, 1, 4, 2)]
        assert median(models)["w"].tolist() == [3]

    @pytest.mark.parametrize("evil", [-1e30, 1e30])
    def test_fewer_than_half_cannot_move_the_median_beyond_the_others(self, evil: float) -> None:
        models = [{"w": vector(number)} for number in (1.0, 2.0, 3.0, evil, evil)]
        assert 1 <= float(median(models)["w"][0]) <= 3
        assert abs(float(mean(models)["w"][0])) > 1e29

    def test_types_stay(self) -> None:
        models = [{"w": vector(1)}, {"w": vector(2)}]
        assert mean(models)["w"].dtype == median(models)["w"].dtype == np.float32

    def test_only_the_median_strategy_takes_it(self) -> None:
        assert {n for n, s in STRATEGIES.items() if s.combine is median} == {"median"}


class TestAdapted:
    """Andrew et al. 2021, algorithm 1, with eta_C = 0.2: C exp(-0.2 (b - gamma))."""

    @staticmethod
    def norm(make_config: MakeConfig, norm: float, within: float, quantile: float = 0.5) -> float:
        config = make_config(
            privacy={
                "mechanism": "site",
                "clipping": "adaptive",
                "clipping_quantile": quantile,
                "epsilon": 8.0,
            },
            aggregation={"encryption": "none"},
        )
        state = replace(init_plain({"w": vector(1)}), clipping_norm=norm)
        after = adapted(state, within, config)
        assert after.model is state.model
        return after.clipping_norm

    def test_by_hand(self, make_config: MakeConfig) -> None:
        # All updates were within: exp(-0.2 * 0.5). None was: exp(0.1). A quarter of 0.8 too few.
        assert self.norm(make_config, 2.0, 1.0) == pytest.approx(2 * 0.904837418)
        assert self.norm(make_config, 2.0, 0.0) == pytest.approx(2 * 1.105170918)
        assert self.norm(make_config, 1.0, 0.6, quantile=0.8) == pytest.approx(1.040810774)

    def test_at_the_quantile_it_stays(self, make_config: MakeConfig) -> None:
        assert self.norm(make_config, 0.3, 0.5) == 0.3
        assert self.norm(make_config, 0.3, 0.9, quantile=0.9) == 0.3

    @pytest.mark.parametrize("wild", [1.5, 40.0, math.inf])
    def test_a_share_that_noise_drove_out_of_0_to_1_counts_as_its_end(
        self, make_config: MakeConfig, wild: float
    ) -> None:
        assert self.norm(make_config, 1.0, wild) == self.norm(make_config, 1.0, 1.0)
        assert self.norm(make_config, 1.0, -wild) == self.norm(make_config, 1.0, 0.0)

    def test_it_ends_where_a_configuration_does(self, make_config: MakeConfig) -> None:
        assert self.norm(make_config, 1.05e-6, 1.0) == 1e-6
        assert self.norm(make_config, 0.99e6, 0.0) == 1e6
