"""The round loop: what is divided by what, what is asked once, and how a run ends or goes on."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedveil.config import FedveilError, RunConfig
from fedveil.data_prep import run_schema
from fedveil.data_prep.schema import schema_from_json
from fedveil.flower import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    FlowerRun,
    Grid,
    Message,
    RecordDict,
    empty_run,
    set_identity,
)
from fedveil.models import family
from fedveil.models.layers import initialise
from fedveil.models.metrics import exam_to_arrays
from fedveil.models.state import StateError, read_file, to_arrays
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import Plan, plan
from fedveil.server import rounds
from fedveil.server.aggregation import STRATEGIES, ServerState
from fedveil.server.coordinator import coordinator
from fedveil.server.evaluation import expected_sums, questions
from fedveil.server.replies import RunError
from fedveil.server.rounds import advance, train
from fedveil.server.store import Asked, Checkpoint, Event, RunFolder
from fedveil.wire import EVALUATE, NO_LEDGER, TRAIN, Refusal, Refused, Task, Update, pack, read_task

MakeConfig = Callable[..., RunConfig]
Answer = Callable[[int, Task], RecordDict | Error | None]
PLANTED = "PATIENT-4711"


@pytest.fixture(autouse=True, scope="module")
def _identity() -> None:
    set_identity(1, 0)


def reply(node: int, content: RecordDict | Error) -> Message:
    """What the server gets when a site answers so."""
    request = Message(RecordDict(), node, TRAIN)
    if isinstance(content, Error):
        return Message(content, reply_to=request)
    return Message(content, reply_to=request)


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    """Plain gradient descent of rate 1 without a mechanism: a round's arithmetic in the open."""
    return make_config(
        data={"holdout": 0.0},
        privacy={"mechanism": "none"},
        aggregation={"strategy": "sgd"},
        training={"learning_rate": 1.0, "ema": 0.0},
    ).resolved()


def model_for(config: RunConfig) -> tuple[nn.Module, ServerState]:
    """A model and the state that a run starts from."""
    module = family("vae").build(config.model, run_schema(config))
    initialise(module, torch.Generator().manual_seed(0))
    return module, STRATEGIES[config.strategy].init(to_arrays(module))


def sent_as(config: RunConfig) -> type[np.floating]:
    """The type of what a site sends: sums are float64, changes of the model float32."""
    return np.float32 if config.trains_at_sites else np.float64


def constant(
    model: Mapping[str, np.ndarray], value: float, kind: type[np.floating]
) -> dict[str, np.ndarray]:
    """Arrays of the model's shapes, all of one value."""
    return {name: np.full(array.shape, value, dtype=kind) for name, array in model.items()}


def flat(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """All numbers in one vector, whatever order the arrays came in."""
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


def bits(arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    """All numbers, bit by bit."""
    return {name: array.tobytes() for name, array in arrays.items()}


def step(
    config: RunConfig, priced: Plan, replies: Iterable[float], coins: Coins
) -> tuple[ServerState, ServerState]:
    """The state before and after a round whose replies are constants."""
    module, state = model_for(config)
    parts = [constant(state.model, value, sent_as(config)) for value in replies]
    return state, advance(state, parts, module, config, priced, coins)


@pytest.fixture(scope="module", name="private")
def _private() -> RunConfig:
    """A run that is soon priced, for nothing is sampled: three rounds, as many evaluations."""
    return RunConfig.model_validate(
        {
            "federation": {"sites": 3, "rounds": 3},
            "data": {"source": "sklearn:digits"},
            "model": {"family": "vae", "width": 4, "latent": 2, "hidden": 8},
            "privacy": {"epsilon": 2.0, "mechanism": "central", "sampling_rate": 1.0},
            "evaluation": {"every": 1, "samples": 128, "training_share": 0.5},
        }
    ).resolved()


class TestAdvance:
    @pytest.mark.parametrize("replies", [(5.0,), (5.0, 10.0), (5.0, 10.0, -3.0)])
    def test_the_divisor_is_public(
        self, config: RunConfig, coins: Coins, replies: tuple[float, ...]
    ) -> None:
        """However many sites replied, and whatever they hold, the sum is over 100."""
        priced = replace(plan(config), expected_batch=100.0)
        before, after = step(config, priced, replies, coins)
        moved = flat(before.model) - flat(after.model)
        assert moved == pytest.approx(sum(replies) / 100, abs=1e-6)
        assert after.steps == 1

    def test_the_plans_own_divisor(self, config: RunConfig, coins: Coins) -> None:
        before, after = step(config, plan(config), [512.0], coins)
        # 512 of the declared 1797 records are expected in a step.
        assert flat(before.model) - flat(after.model) == pytest.approx(1.0, abs=1e-5)

    def test_central_noise_is_added_once(self, config: RunConfig, coins: Coins) -> None:
        priced = replace(
            plan(config),
            mechanism="central",
            clipping_norm=3.0,
            noise_multiplier=2.0,
            expected_batch=10.0,
        )
        before, after = step(config, priced, [1.0] * 4, coins)
        moved = flat(before.model) - flat(after.model)
        # The mean of the sum, 4 / 10, and noise of 3 * 2 / 10, whatever the number of sites.
        assert moved.mean() == pytest.approx(0.4, abs=0.1)
        assert moved.std() == pytest.approx(0.6, rel=0.1)

    def test_the_noised_sum_is_on_the_lattice(self, config: RunConfig, coins: Coins) -> None:
        """Noise of scale 6: all that is used of the sites' sum is multiples of 2^-18.

        From a model of zeros, at rate 1 and over a batch of 1, the step is the release itself.
        """
        priced = replace(
            plan(config),
            mechanism="central",
            clipping_norm=3.0,
            noise_multiplier=2.0,
            expected_batch=1.0,
        )
        module, state = model_for(config)
        zeros = constant(state.model, 0.0, np.float32)
        parts = [constant(state.model, v, np.float64) for v in (0.1, 1 / 3)]
        after = advance(replace(state, model=zeros), parts, module, config, priced, coins)
        steps = flat(after.model).astype(np.float64) * 2.0**18
        assert (steps == np.rint(steps)).all()
        assert 0.4 < (steps % 2 == 1).mean() < 0.6

    def test_the_model_stays_float32(self, config: RunConfig, coins: Coins) -> None:
        priced = replace(plan(config), mechanism="central", clipping_norm=3.0, noise_multiplier=2.0)
        for strategy in ("sgd", "adam"):
            raw = config.model_dump(by_alias=True)
            raw["aggregation"]["strategy"] = strategy
            _, after = step(RunConfig.model_validate(raw), priced, [0.1, 1 / 3], coins)
            for part in (after.model, after.average, after.first, after.second):
                assert all(array.dtype == np.float32 for array in part.values())

    def test_local_replies_get_no_noise(self, config: RunConfig, coins: Coins) -> None:
        priced = replace(
            plan(config),
            mechanism="local",
            clipping_norm=3.0,
            noise_multiplier=2.0,
            expected_batch=10.0,
        )
        before, after = step(config, priced, [1.0] * 4, coins)
        assert flat(before.model) - flat(after.model) == pytest.approx(0.4, abs=1e-6)

    def test_fedavg_takes_the_plain_mean_change_of_those_who_replied(
        self, make_config: MakeConfig, coins: Coins
    ) -> None:
        averaged = make_config(
            privacy={"mechanism": "none"}, aggregation={"strategy": "fedavg"}
        ).resolved()
        for replies, moved in (([1.0, 2.0, 6.0], 3.0), ([1.0, 2.0], 1.5)):
            before, after = step(averaged, plan(averaged), replies, coins)
            assert np.array_equal(flat(after.model), flat(before.model) + np.float32(moved))

    def test_a_familys_server_step_is_called(
        self, config: RunConfig, coins: Coins, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a GAN's would be: it sees the mean only, and its gradient goes to the optimiser."""
        seen: list[tuple[float, float]] = []

        def hook(
            module: nn.Module, gradient: dict[str, torch.Tensor], generator: torch.Generator
        ) -> dict[str, torch.Tensor]:
            weight = dict(module.named_parameters())["posterior.weight"]
            seen.append((weight.sum().item(), gradient["posterior.weight"][0, 0].item()))
            torch.randn(1, generator=generator)
            return {name: 10 * tensor for name, tensor in gradient.items()}

        kind = replace(family("vae"), server_step=hook)
        monkeypatch.setattr(rounds, "family", lambda _: kind)
        module, state = model_for(config)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        priced = replace(plan(config), expected_batch=100.0)
        parts = [constant(state.model, 5.0, np.float64)]
        after = advance(state, parts, module, config, priced, coins)
        # The module was loaded with the round's model first.
        weight = float(torch.from_numpy(state.model["posterior.weight"]).sum())
        assert seen == [pytest.approx((weight, 0.05), abs=1e-5)]
        assert flat(state.model) - flat(after.model) == pytest.approx(0.5, abs=1e-6)

    def test_but_not_where_sites_send_models(
        self, make_config: MakeConfig, coins: Coins, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def hook(*arguments: object) -> dict[str, torch.Tensor]:
            raise RuntimeError("must not be called")

        kind = replace(family("vae"), server_step=hook)
        monkeypatch.setattr(rounds, "family", lambda _: kind)
        averaged = make_config(
            privacy={"mechanism": "none"}, aggregation={"strategy": "fedavg"}
        ).resolved()
        step(averaged, plan(averaged), [1.0], coins)


class FakeGrid(Grid):
    """Sites that answer as they are told, in any order."""

    def __init__(self, nodes: Iterable[int], answer: Answer) -> None:
        self._nodes, self._answer = list(nodes), answer
        self.tasks: list[tuple[int, Task]] = []
        self.actions: list[str] = []

    @property
    def run(self) -> FlowerRun:
        return empty_run(1)

    def set_run(self, run: FlowerRun) -> None:
        del run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return self._nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        del timeout
        found = []
        for message in messages:
            node = message.metadata.dst_node_id
            task = read_task(message.content)
            self.tasks.append((node, task))
            self.actions.append(message.metadata.message_type)
            answered = self._answer(node, task)
            if answered is not None:
                found.append(reply(node, answered))
        return found[::-1]


def grown(task: Task) -> tuple[int, str]:
    """A ledger with one entry more."""
    number = task.ledger[0] + 1
    return number, f"{number:064x}"


def sums(task: Task) -> dict[str, np.ndarray]:
    """Twenty for every sum that an evaluation asks for."""
    if not task.evaluation:
        return {}
    priced = plan(RunConfig.model_validate_json(task.config))
    like = expected_sums(schema_from_json(task.schema), priced)
    return {name: np.full(array.shape, 20.0) for name, array in like.items()}


def answer_with(task: Task, arrays: Mapping[str, np.ndarray]) -> RecordDict:
    """A site's whole answer, with these arrays in it."""
    return pack(Update(task.run_id, task.round, task.evaluation, arrays, sums(task), grown(task)))


def ones(task: Task, kind: type[np.floating]) -> RecordDict:
    """Every number is 1."""
    return answer_with(task, constant(task.arrays, 1.0, kind))


def refusal(task: Task, code: Refusal) -> RecordDict:
    """A site's refusal of what it is asked."""
    return pack(Refused(task.run_id, task.round, task.evaluation, code))


def good(node: int, task: Task) -> RecordDict:
    """Every weight's gradient, or every weight, is 1."""
    return ones(task, sent_as(RunConfig.model_validate_json(task.config)))


def only(nodes: set[int], otherwise: RecordDict | Error | None = None) -> Answer:
    """Some sites answer well, the others so."""

    def answer(node: int, task: Task) -> RecordDict | Error | None:
        return good(node, task) if node in nodes else otherwise

    return answer


@pytest.fixture
def folder(tmp_path: Path) -> Iterable[RunFolder]:
    """A new run folder, held by this process."""
    made = RunFolder(tmp_path / "run")
    with made.locked(resume=False):
        yield made


def run(config: RunConfig, grid: Grid, folder: RunFolder, run_id: str = "run-a") -> list[Event]:
    """Trains over a grid; what was observed."""
    observed: list[Event] = []
    sites = {node: node for node in sorted(grid.get_node_ids())}
    asks = coordinator(folder.path)
    train(grid, sites, config, run_schema(config), run_id, folder, observed.append, asks)
    return observed


def stored(folder: RunFolder) -> Checkpoint:
    """The last checkpoint, of which no later one is damaged."""
    found, damaged = folder.load_checkpoint()
    assert found is not None
    assert damaged == []
    return found


def told(events: Iterable[Event], kind: str) -> list[Event]:
    """The events of one kind."""
    return [event for event in events if event["event"] == kind]


def dropped_in(event: Event) -> list[int]:
    """The sites that a round's event says were dropped."""
    return [dropped["site"] for dropped in event["dropped"]]


class TestTrain:
    def test_all_rounds(self, config: RunConfig, folder: RunFolder) -> None:
        grid = FakeGrid([3, 1, 2], good)
        observed = run(config, grid, folder)
        assert [event["event"] for event in observed] == ["run", "round", "round", "finished"]
        assert list(folder.events()) == observed
        assert [(node, task.round) for node, task in grid.tasks] == [
            (1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2),
        ]  # fmt: skip
        metrics = folder.read_json("metrics.json")
        assert (metrics["run_id"], metrics["rounds"], metrics["sites"]) == ("run-a", 2, 3)
        arrays, facts = read_file(folder.path / "model.safetensors")
        assert facts["run_id"] == "run-a"
        state = stored(folder).state
        assert (state.round, state.steps, metrics["steps"]) == (2, 2, 2)
        assert (
            flat({n: arrays[n] for n in state.average}).tobytes() == flat(state.average).tobytes()
        )

    def test_sites_get_the_run_and_the_current_model(
        self, config: RunConfig, folder: RunFolder
    ) -> None:
        grid = FakeGrid([1, 2], good)
        run(config, grid, folder)
        first, second = grid.tasks[0][1], grid.tasks[2][1]
        assert RunConfig.model_validate_json(first.config) == config.shared()
        assert set(grid.actions) == {TRAIN}
        assert first.run_id == second.run_id == "run-a"
        expected = 2 / plan(config).expected_batch
        assert flat(first.arrays) - flat(second.arrays) == pytest.approx(expected, abs=1e-6)

    def test_what_is_a_sites_own_to_say_is_not_sent(
        self, make_config: MakeConfig, folder: RunFolder
    ) -> None:
        """Its policy, and where its ledger is."""
        config = make_config(
            data={"holdout": 0.0}, privacy={"mechanism": "none"}, policy={"epsilon_lifetime": 77.5}
        ).resolved()
        grid = FakeGrid([1, 2], good)
        run(config, grid, folder)
        assert config.policy.epsilon_lifetime == 77.5
        assert all("77.5" not in task.config for _, task in grid.tasks)

    def test_initial_weights_are_of_the_public_seed(
        self, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        starts = []
        for index, seed in enumerate((0, 0, 1)):
            config = make_config(
                federation={"seed": seed, "rounds": 1},
                data={"holdout": 0.0},
                privacy={"mechanism": "none"},
            ).resolved()
            grid = FakeGrid([1, 2], good)
            folder = RunFolder(tmp_path / str(index))
            with folder.locked(resume=False):
                run(config, grid, folder)
            starts.append(flat(grid.tasks[0][1].arrays).tobytes())
        assert starts[0] == starts[1] != starts[2]

    def test_dropped_sites_are_named(self, config: RunConfig, folder: RunFolder) -> None:
        def answer(node: int, task: Task) -> RecordDict:
            if node == 2 and task.round == 2:
                return refusal(task, Refusal.FAILED)
            return good(node, task)

        observed = run(config, FakeGrid([1, 2, 3], answer), folder)
        assert [(e["sites"], e["dropped"]) for e in told(observed, "round")] == [
            (3, []),
            (2, [{"site": 2, "reason": f"refused: {Refusal.FAILED.value}"}]),
        ]
        assert [dropped_in(event) for event in told(observed, "round")] == [[], [2]]

    @pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "fedprox"])
    def test_sums_are_float64_and_models_float32(
        self, make_config: MakeConfig, folder: RunFolder, strategy: str
    ) -> None:
        """A site that sends the other type is dropped; the sums' rounding is accounted for."""
        config = make_config(
            data={"holdout": 0.0},
            privacy={"mechanism": "none"},
            aggregation={"strategy": strategy},
        ).resolved()
        wanted = sent_as(config)
        other = np.float64 if wanted is np.float32 else np.float32

        def answer(node: int, task: Task) -> RecordDict:
            return ones(task, other) if node == 2 else good(node, task)

        grid = FakeGrid([1, 2, 3], answer)
        observed = run(config, grid, folder)
        rounds_told = told(observed, "round")
        assert [event["sites"] for event in rounds_told] == [2, 2]
        for event in rounds_told:
            [dropped] = event["dropped"]
            assert dropped["site"] == 2
            assert f"{np.dtype(wanted).name}, got " in dropped["reason"]
            assert dropped["reason"].endswith(" of another type")
        # The model itself travels as float32, whatever comes back.
        assert {a.dtype.name for _, task in grid.tasks for a in task.arrays.values()} == {"float32"}

    @pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "fedprox"])
    def test_only_the_trainable_parameters_are_expected(
        self,
        make_config: MakeConfig,
        folder: RunFolder,
        monkeypatch: pytest.MonkeyPatch,
        strategy: str,
    ) -> None:
        config = make_config(
            data={"holdout": 0.0},
            privacy={"mechanism": "none"},
            aggregation={"strategy": strategy},
        ).resolved()
        names = ["posterior.weight", "posterior.bias"]
        partly = replace(family("vae"), trainable=lambda _: names)
        monkeypatch.setattr(rounds, "family", lambda _: partly)

        def answer(node: int, task: Task) -> RecordDict:
            if node == 2:
                return good(node, task)  # all of them
            some = {name: task.arrays[name] for name in names}
            return answer_with(task, constant(some, 1.0, sent_as(config)))

        grid = FakeGrid([1, 2, 3], answer)
        observed = run(config, grid, folder)
        found = told(observed, "round")
        assert [dropped_in(event) for event in found] == [[2], [2]]
        assert "expected the 2 names of the model" in found[0]["dropped"][0]["reason"]
        first, second = grid.tasks[0][1].arrays, grid.tasks[3][1].arrays
        moved = {n for n in first if not np.array_equal(first[n], second[n])}
        assert moved == set(names)

    @pytest.mark.parametrize(
        ("nodes", "otherwise"),
        [
            ({1}, None),
            ({1}, pack(Refused("run-a", 1, 0, Refusal.BUDGET))),
            ({1}, Error(2, PLANTED)),
            (set(), None),
        ],
    )
    def test_too_few_replies(
        self,
        config: RunConfig,
        folder: RunFolder,
        nodes: set[int],
        otherwise: RecordDict | Error | None,
    ) -> None:
        assert config.min_replies == 2
        with pytest.raises(RunError) as caught:
            run(config, FakeGrid([1, 2, 3], only(nodes, otherwise)), folder)
        assert f"{len(nodes)} of 3 replies" in str(caught.value)
        assert "federation.min_replies = 2" in str(caught.value)
        last = list(folder.events())[-1]
        assert (last["event"], last["round"], last["cause"]) == ("failed", 0, str(caught.value))
        assert PLANTED not in json.dumps(list(folder.events()))
        assert not (folder.path / "metrics.json").exists()
        assert not (folder.path / "model.safetensors").exists()

    def test_just_enough_replies(self, config: RunConfig, folder: RunFolder) -> None:
        run(config, FakeGrid([1, 2, 3], only({1, 3})), folder)
        assert folder.read_json("metrics.json")["rounds"] == 2

    def test_a_later_failure_keeps_the_last_whole_state(
        self, config: RunConfig, folder: RunFolder
    ) -> None:
        def answer(node: int, task: Task) -> RecordDict | None:
            return good(node, task) if task.round == 1 else None

        with pytest.raises(RunError, match="round 2: 0 of 3"):
            run(config, FakeGrid([1, 2, 3], answer), folder)
        assert stored(folder).state.round == 1
        assert list(folder.events())[-1]["round"] == 1

    @pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, MemoryError])
    def test_whatever_stops_it_is_noted_by_its_kind_only(
        self, config: RunConfig, folder: RunFolder, kind: type[BaseException]
    ) -> None:
        def answer(node: int, task: Task) -> RecordDict:
            raise kind(PLANTED)

        with pytest.raises(kind):
            run(config, FakeGrid([1, 2, 3], answer), folder)
        last = list(folder.events())[-1]
        assert (last["event"], last["cause"]) == ("failed", kind.__name__)
        assert last["epsilon"] is None

    @pytest.mark.parametrize("kind", [None, RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("stop", [1, 2])
    def test_a_run_that_stops_early_is_charged_its_plan(
        self,
        private: RunConfig,
        folder: RunFolder,
        kind: type[BaseException] | None,
        stop: int,
    ) -> None:
        """What sites have released is out, whether or not the server used it."""
        priced = plan(private)
        assert priced.epsilon is not None

        def answer(node: int, task: Task) -> RecordDict | None:
            if task.round < stop:
                return good(node, task)
            if kind is not None:
                raise kind(PLANTED)
            return None

        with pytest.raises(kind or RunError):
            run(private, FakeGrid([1, 2, 3], answer), folder)
        last = list(folder.events())[-1]
        assert (last["event"], last["round"]) == ("failed", stop - 1)
        assert last["epsilon"] == priced.epsilon
        spent = priced.epsilon_after(stop - 1)
        assert spent is not None
        assert spent < last["epsilon"]

    @pytest.mark.parametrize("encoding", ["numpy.ndarray", "safetensors"])
    def test_one_site_cannot_stop_a_run_by_bad_bytes(
        self, config: RunConfig, folder: RunFolder, encoding: str
    ) -> None:
        archive = RecordDict(
            {
                "facts": ConfigRecord(
                    {
                        "run-id": "run-a",
                        "round": 1,
                        "evaluation": 0,
                        "ledger-count": 1,
                        "ledger-hash": "a" * 64,
                    }
                ),
                "arrays": ArrayRecord(
                    {"safetensors": Array("uint8", (14,), encoding, b"PK\x03\x04 and so on")}
                ),
                "sums": ArrayRecord(),
            }
        )
        observed = run(config, FakeGrid([1, 2, 3], only({1, 3}, archive)), folder)
        assert [dropped_in(event) for event in told(observed, "round")] == [[2], [2]]
        assert folder.read_json("metrics.json")["rounds"] == 2


def evaluated_config(make_config: MakeConfig, rounds: int, every: int) -> RunConfig:
    """A run without a mechanism that is evaluated every so many rounds."""
    return make_config(
        federation={"rounds": rounds},
        privacy={"mechanism": "none"},
        evaluation={"every": every, "samples": 128},
    ).resolved()


class TestEvaluations:
    def test_along_with_rounds_and_at_the_end(
        self, make_config: MakeConfig, folder: RunFolder
    ) -> None:
        """Of the model after rounds 2 and 4 along with the next one, of the last one alone."""
        config = evaluated_config(make_config, 5, 2)
        grid = FakeGrid([1, 2], good)
        observed = run(config, grid, folder)
        asked = zip(grid.actions, grid.tasks, strict=True)
        assert [(action, t.round, t.evaluation) for action, (node, t) in asked if node == 1] == [
            (TRAIN, 1, 0),
            (TRAIN, 2, 0),
            (TRAIN, 3, 1),
            (TRAIN, 4, 0),
            (TRAIN, 5, 2),
            (EVALUATE, 0, 3),
        ]
        assert [(e["round"], e["evaluation"]) for e in told(observed, "evaluated")] == [
            (2, 1), (4, 2), (5, 3),
        ]  # fmt: skip
        metrics = folder.read_json("metrics.json")
        assert metrics["evaluated"] == {"round": 5, "evaluations": 3}
        # Of 20 probes 20 were right, and the mean of 20 losses of 1 is the upper bound.
        assert metrics["quality"]["tstr_accuracy_mlp"] == {"value": 1.0, "noise": 0.0}
        assert told(observed, "evaluated")[-1]["quality"] == metrics["quality"]
        assert told(observed, "evaluated")[-1]["loss"] == metrics["quality"]["loss"]["value"]

    def test_what_is_evaluated_is_the_average_that_is_released(
        self, make_config: MakeConfig, folder: RunFolder
    ) -> None:
        config = make_config(
            privacy={"mechanism": "none"},
            training={"ema": 0.5, "learning_rate": 1.0},
            aggregation={"strategy": "sgd"},
            evaluation={"every": 1, "samples": 128},
        ).resolved()
        grid = FakeGrid([1, 2], good)
        run(config, grid, folder)
        first, second, last = (task for node, task in grid.tasks if node == 1)
        assert first.released == first.exam == {}
        model = flat(first.arrays)
        # The average of round 1 is 0.1 of the first model and 0.9 of the next.
        average = 0.1 * model + 0.9 * flat(second.arrays)
        assert flat(second.released) == pytest.approx(average, abs=1e-6)
        assert last.arrays == {}
        whole, _ = read_file(folder.path / "model.safetensors")
        assert bits(last.released) == bits(whole)
        # So are the questions: what was drawn from it, not from the model that is trained.
        for task in (second, last):
            exam = questions(task.released, config, run_schema(config))
            assert bits(task.exam) == bits(exam_to_arrays(exam))

    def test_without_a_hold_out_there_is_none(self, config: RunConfig, folder: RunFolder) -> None:
        grid = FakeGrid([1, 2], good)
        observed = run(config, grid, folder)
        assert {task.evaluation for _, task in grid.tasks} == {0}
        assert told(observed, "evaluated") == []
        metrics = folder.read_json("metrics.json")
        assert metrics["quality"] == {}
        assert metrics["evaluated"] == {"round": 0, "evaluations": 0}

    def test_too_few_replies_to_the_last_one_fail_the_run(
        self, make_config: MakeConfig, folder: RunFolder
    ) -> None:
        def answer(node: int, task: Task) -> RecordDict | None:
            return good(node, task) if task.round else None

        config = evaluated_config(make_config, 2, 0)
        with pytest.raises(RunError, match=r"^evaluation 1: 0 of 2 replies are usable"):
            run(config, FakeGrid([1, 2], answer), folder)
        assert not (folder.path / "metrics.json").exists()
        # It was asked for, so it is used up: the run then ends without it.
        grid = FakeGrid([1, 2], good)
        run(config, grid, folder)
        assert grid.tasks == []
        assert folder.read_json("metrics.json")["evaluated"] == {"round": 0, "evaluations": 0}

    def test_each_figure_is_paid_for(self, private: RunConfig, folder: RunFolder) -> None:
        priced = plan(private)
        observed = run(private, FakeGrid([1, 2, 3], good), folder)
        assert [e["epsilon"] for e in told(observed, "round")] == [
            priced.epsilon_after(1, 0), priced.epsilon_after(2, 1), priced.epsilon_after(3, 2),
        ]  # fmt: skip
        assert [e["epsilon"] for e in told(observed, "evaluated")] == [
            priced.epsilon_after(2, 1), priced.epsilon_after(3, 2), priced.epsilon_after(3, 3),
        ]  # fmt: skip
        metrics = folder.read_json("metrics.json")
        assert metrics["privacy"]["epsilon"] == priced.epsilon_after(3, 3)
        assert metrics["privacy"]["epsilon"] <= metrics["privacy"]["target_epsilon"] == 2.0
        assert metrics["quality"].keys() == {
            "loss", "one_way_tv", "tstr_accuracy_mlp", "training_loss",
        }  # fmt: skip
        assert metrics["quality"]["loss"]["noise"] > 0


class TestLedgers:
    def test_each_site_is_sent_the_head_that_it_reported_last(
        self, config: RunConfig, folder: RunFolder
    ) -> None:
        observed = run(config, grid := FakeGrid([1, 2], good), folder)
        assert [task.ledger for node, task in grid.tasks if node == 1] == [
            NO_LEDGER, (1, f"{1:064x}"),
        ]  # fmt: skip
        head = {"count": 2, "head": f"{2:064x}"}
        assert folder.read_json("metrics.json")["ledgers"] == {"1": head, "2": head}
        assert "head" not in json.dumps(observed)

    def test_a_site_that_was_dropped_is_held_against_the_one_before(
        self, make_config: MakeConfig, folder: RunFolder
    ) -> None:
        """What was not used is not known: it was checked against nothing."""
        config = make_config(
            federation={"rounds": 3}, data={"holdout": 0.0}, privacy={"mechanism": "none"}
        ).resolved()

        def answer(node: int, task: Task) -> RecordDict:
            if node == 3 and task.round == 2:
                evil = Update(task.run_id, task.round, 0, {}, {}, (1_000_000, "e" * 64))
                return pack(evil)
            return good(node, task)

        run(config, grid := FakeGrid([1, 2, 3], answer), folder)
        assert [task.ledger[0] for node, task in grid.tasks if node == 3] == [0, 1, 1]
        assert [task.ledger[0] for node, task in grid.tasks if node == 1] == [0, 1, 2]

    def test_a_ledger_that_was_put_back_is_noticed(
        self, config: RunConfig, folder: RunFolder
    ) -> None:
        def answer(node: int, task: Task) -> RecordDict:
            whole = constant(task.arrays, 1.0, np.float64)
            old = Update(task.run_id, task.round, 0, whole, {}, (1, f"{1:064x}"))
            return pack(old) if node == 3 else good(node, task)

        observed = run(config, FakeGrid([1, 2, 3], answer), folder)
        assert [e["dropped"] for e in told(observed, "round")] == [
            [], [{"site": 3, "reason": "its ledger has not grown"}],
        ]  # fmt: skip


class Crash(BaseException):
    """A `kill -9`: nothing that the process would still do gets done."""


class Moments:
    """Every moment of a process at which it may be killed, in the order in which they come."""

    def __init__(self, kill_at: int | str | None = None) -> None:
        self._kill_at, self._dead = kill_at, False
        self.names: list[str] = []

    def reach(self, name: str, leave: Callable[[], object] = lambda: None) -> None:
        """Goes on, unless it ends here; `leave` is what a killed process leaves half done."""
        if self._dead:
            raise Crash
        self.names.append(name)
        if self._kill_at in (name, len(self.names) - 1):
            self._dead = True
            leave()
            raise Crash


@dataclass(frozen=True)
class FragileFolder(RunFolder):
    """A run folder whose every write may be the last thing that its process does."""

    moments: Moments

    def write(self, name: str, content: bytes) -> None:
        known, half = name, self.path / name
        if name.endswith("asked.json"):
            known = "note {round} {evaluation}".format(**json.loads(content))
        elif name.startswith("checkpoint"):
            known = f"state {int(half.stem)}"
        half = half.with_name(f".{half.name}.partial")
        self.moments.reach(f"before {known}")
        self.moments.reach(f"within {known}", lambda: half.write_bytes(content[:20]))
        super().write(name, content)
        self.moments.reach(f"after {known}")

    def append(self, event: Event) -> None:
        known = f"{event['event']} {event.get('round', '')}".strip()

        def tear() -> None:
            with (self.path / "events.jsonl").open("ab") as opened:
                opened.write(json.dumps(event).encode()[:20])

        self.moments.reach(f"before event {known}")
        self.moments.reach(f"within event {known}", tear)
        super().append(event)
        self.moments.reach(f"after event {known}")


class Sites:
    """Sites that outlive the server: a release is made once, and the ledger's head grows."""

    def __init__(self) -> None:
        self.made: dict[int, list[tuple[str, int]]] = {}
        self.moments = Moments()

    def __call__(self, node: int, task: Task) -> RecordDict:
        self.moments.reach(f"before site {node} {task.round} {task.evaluation}")
        made = self.made.setdefault(node, [])
        asked = [("round", task.round)] * bool(task.round)
        asked += [("evaluation", task.evaluation)] * bool(task.evaluation)
        for part, index in asked:
            assert index > max([i for p, i in made if p == part], default=0), "asked for again"
        assert task.ledger in {NO_LEDGER, *(self._head(node, n + 1) for n in range(len(made)))}
        made += asked
        config = RunConfig.model_validate_json(task.config)
        whole = drawn(node, task.round, task.arrays, sent_as(config))
        head = self._head(node, len(made))
        reply = Update(task.run_id, task.round, task.evaluation, whole, sums(task), head)
        self.moments.reach(f"after site {node} {task.round} {task.evaluation}")
        return pack(reply)

    @staticmethod
    def _head(node: int, number: int) -> tuple[int, str]:
        return number, hashlib.sha256(f"{node} {number}".encode()).hexdigest()


def drawn(
    node: int, number: int, like: Mapping[str, np.ndarray], kind: type[np.floating]
) -> dict[str, np.ndarray]:
    """What a site sends in a round: it hangs on the round's number and on nothing else."""
    rng = np.random.default_rng((node, number))
    return {name: rng.normal(0, 100, like[name].shape).astype(kind) for name in sorted(like)}


NODES = (1, 2)


def attempt(
    config: RunConfig, folder: RunFolder, sites: Sites, kill_at: int | str | None = None
) -> list[str]:
    """One process of a run: it begins or goes on, and may be killed. The moments that it saw."""
    sites.moments = Moments(kill_at)
    fragile = FragileFolder(folder.path, sites.moments)
    try:
        run(config, FakeGrid(NODES, sites), fragile)
    except Crash:
        assert kill_at is not None
    return sites.moments.names


def released(folder: RunFolder) -> dict[str, bytes]:
    """The model of a finished run, bit by bit."""
    return bits(read_file(folder.path / "model.safetensors")[0])


def after_rounds(config: RunConfig, numbers: Iterable[int]) -> dict[str, bytes]:
    """The model after these rounds and no others, by hand."""
    module, state = model_for(config)
    for number in numbers:
        parts = [drawn(node, number, state.model, sent_as(config)) for node in NODES]
        state = advance(state, parts, module, config, plan(config), Coins(bytes(32)))
    return bits(state.average)


def last(moments: Iterable[str], kind: str) -> int:
    """The last round that such a file was written of."""
    done = (moment.split() for moment in moments if moment.startswith(f"after {kind} "))
    return max((int(words[2]) for words in done), default=0)


def lost_rounds(folder: RunFolder) -> list[int]:
    """The rounds that the events say were lost."""
    events = told(folder.events(), "resumed")
    return sorted({number for event in events for number in event["lost"]})


@pytest.fixture(params=["adam", "sgd", "fedavg", "fedadam"])
def each(request: pytest.FixtureRequest, make_config: MakeConfig) -> RunConfig:
    """Three rounds of each strategy without a mechanism: the replies are all that moves a model."""
    return make_config(
        federation={"rounds": 3},
        data={"holdout": 0.0},
        privacy={"mechanism": "none"},
        aggregation={"strategy": request.param},
    ).resolved()


@pytest.fixture
def steady(make_config: MakeConfig) -> RunConfig:
    """The same of the default strategy, which has the largest state."""
    return make_config(
        federation={"rounds": 3}, data={"holdout": 0.0}, privacy={"mechanism": "none"}
    ).resolved()


@pytest.fixture(scope="module")
def long() -> RunConfig:
    """Four such rounds."""
    return RunConfig.model_validate(
        {
            "federation": {"sites": 2, "rounds": 4},
            "data": {"source": "sklearn:digits", "holdout": 0.0},
            "model": {"family": "vae", "width": 4, "latent": 2, "hidden": 8},
            "privacy": {"mechanism": "none"},
        }
    ).resolved()


LOST = [
    "after note 2 0",
    "before site 1 2 0",
    "after site 1 2 0",
    "before site 2 2 0",
    "after site 2 2 0",
    "before state 2",
    "within state 2",
]
KEPT = [
    "before note 2 0",
    "within note 2 0",
    "after state 2",
    "before event round 2",
    "within event round 2",
    "after event round 2",
]


class TestResume:
    @pytest.mark.parametrize("kill_at", KEPT)
    def test_with_no_round_lost_it_is_the_same_run(
        self, each: RunConfig, folder: RunFolder, tmp_path: Path, kill_at: str
    ) -> None:
        """Model, moments, average: every bit of them is as if nothing had happened."""
        whole = RunFolder(tmp_path / "whole")
        with whole.locked(resume=False):
            attempt(each, whole, Sites())
        sites = Sites()
        assert attempt(each, folder, sites, kill_at)[-1] == kill_at
        attempt(each, folder, sites)
        assert released(folder) == released(whole) == after_rounds(each, (1, 2, 3))
        ours, theirs = stored(folder).state, stored(whole).state
        for part in ("model", "average", "first", "second"):
            assert bits(getattr(ours, part)) == bits(getattr(theirs, part))
        assert (ours.round, ours.steps) == (3, 3)
        assert sites.made == {node: [("round", 1), ("round", 2), ("round", 3)] for node in NODES}
        assert lost_rounds(folder) == []

    @pytest.mark.parametrize("kill_at", LOST)
    def test_a_lost_round_is_spent_and_not_asked_for_again(
        self, each: RunConfig, folder: RunFolder, kill_at: str
    ) -> None:
        sites = Sites()
        assert attempt(each, folder, sites, kill_at)[-1] == kill_at
        made = {node: list(releases) for node, releases in sites.made.items()}
        assert attempt(each, folder, sites)[-1] == "after metrics.json"
        # The run ends at the plan's last round, with a step less.
        for node, found in sites.made.items():
            assert found[len(made.get(node, [])) :] == [("round", 3)]
        assert released(folder) == after_rounds(each, (1, 3))
        metrics = folder.read_json("metrics.json")
        assert (metrics["rounds"], metrics["steps"]) == (3, 2)
        assert (stored(folder).state.round, stored(folder).state.steps) == (3, 2)
        [resumed] = told(folder.events(), "resumed")
        assert (resumed["round"], resumed["lost"], resumed["damaged"]) == (1, [2], [])
        assert resumed["lost_evaluations"] == 0
        [finished] = told(folder.events(), "finished")
        assert (finished["rounds"], finished["steps"]) == (3, 2)

    @pytest.mark.parametrize("holdout", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
    def test_killed_at_any_moment_at_all(
        self, make_config: MakeConfig, tmp_path: Path, holdout: float
    ) -> None:
        """Each moment of a run: it ends, and the model is of what was kept, to the bit."""
        config = make_config(
            federation={"rounds": 2},
            data={"holdout": holdout},
            privacy={"mechanism": "none"},
            evaluation={"every": 1, "samples": 128},
        ).resolved()
        whole = RunFolder(tmp_path / "whole")
        with whole.locked(resume=False):
            moments = attempt(config, whole, Sites())
        for kill_at, moment in enumerate(moments):
            folder, sites = RunFolder(tmp_path / str(kill_at)), Sites()
            with folder.locked(resume=False):
                assert attempt(config, folder, sites, kill_at)[-1] == moment
            with folder.locked(resume=True):
                # A run that was killed at its very end is finished, as the API finds it.
                if not (folder.path / "metrics.json").exists():
                    attempt(config, folder, sites)
            metrics, lost = folder.read_json("metrics.json"), lost_rounds(folder)
            kept = [number for number in (1, 2) if number not in lost]
            assert released(folder) == after_rounds(config, kept), moment
            assert folder.asked().round == metrics["rounds"] == 2
            assert metrics["steps"] == len(kept)
            noted, saved = (last(moments[: kill_at + 1], kind) for kind in ("note", "state"))
            assert lost == list(range(saved + 1, noted + 1))
            # Whatever was noted, no more was made than was planned, and nothing twice.
            assert folder.asked().evaluation <= plan(config).evaluations
            assert all(len(set(made)) == len(made) for made in sites.made.values())
            if metrics["evaluated"]["evaluations"] == plan(config).evaluations:
                assert metrics["quality"] == whole.read_json("metrics.json")["quality"]
        assert len(moments) > 40

    @settings(max_examples=20)
    @given(kills=st.lists(st.integers(0, 40), max_size=5))
    def test_killed_again_and_again(
        self, long: RunConfig, tmp_path_factory: pytest.TempPathFactory, kills: list[int]
    ) -> None:
        folder, sites = RunFolder(tmp_path_factory.mktemp("run") / "run"), Sites()
        for index, kill_at in enumerate([*kills, None]):
            with folder.locked(resume=index > 0):
                attempt(long, folder, sites, kill_at)
            if (folder.path / "metrics.json").exists():
                break
        metrics, lost = folder.read_json("metrics.json"), lost_rounds(folder)
        kept = [number for number in (1, 2, 3, 4) if number not in lost]
        assert released(folder) == after_rounds(long, kept)
        assert (metrics["rounds"], metrics["steps"]) == (4, len(kept))
        assert folder.asked() == Asked(4, 0)
        # What is told of is what is in the model, each round once.
        rounds_told = [event["round"] for event in told(folder.events(), "round")]
        assert set(rounds_told) <= set(kept)
        assert len(set(rounds_told)) == len(rounds_told)
        # No site made more releases than were noted, and every kept round was made by all.
        for made in sites.made.values():
            assert {("round", number) for number in kept} <= set(made)

    @pytest.mark.parametrize(
        "kills",
        [
            ("after note 2 1",),
            ("after site 2 3 2",),
            ("after note 1 0", "after note 2 0", "after note 3 1"),
            ("before state 2", "after site 1 0 3"),
            ("after state 3",),
        ],
    )
    def test_the_target_still_holds(
        self, private: RunConfig, folder: RunFolder, kills: tuple[str, ...]
    ) -> None:
        """However many releases were lost, all of them are counted, and they are in the plan."""
        priced, sites = plan(private), Sites()
        for kill_at in kills:
            assert attempt(private, folder, sites, kill_at)[-1] == kill_at
        attempt(private, folder, sites)
        metrics = folder.read_json("metrics.json")
        assert metrics["privacy"]["epsilon"] == priced.epsilon
        assert metrics["privacy"]["epsilon"] <= metrics["privacy"]["target_epsilon"] == 2.0
        asked = Asked(0, 0)
        for event in folder.events():
            if event["event"] == "round":
                asked = asked._replace(round=event["round"])
            elif event["event"] == "evaluated":
                asked = asked._replace(evaluation=event["evaluation"])
            elif event["event"] == "resumed":
                asked = asked._replace(round=event["round"] + len(event["lost"]))
            if "epsilon" in event:
                # Never below what the releases that were made cost, never above the target.
                floor = priced.epsilon_after(*asked)
                assert floor is not None
                assert floor <= event["epsilon"] <= 2.0
        for made in sites.made.values():
            assert len([index for part, index in made if part == "round"]) <= priced.rounds
            assert len([i for part, i in made if part == "evaluation"]) <= priced.evaluations

    def test_a_lost_round_is_in_the_epsilon_from_then_on(
        self, private: RunConfig, folder: RunFolder
    ) -> None:
        priced, sites = plan(private), Sites()
        attempt(private, folder, sites, "after site 2 2 1")
        attempt(private, folder, sites, "before note 3 2")
        [resumed] = told(folder.events(), "resumed")
        assert (resumed["round"], resumed["lost"]) == (1, [2])
        assert resumed["epsilon"] == priced.epsilon_after(2, 1)

    def test_the_last_evaluation_is_kept_for_the_end(
        self, make_config: MakeConfig, folder: RunFolder
    ) -> None:
        """Two are planned; the first one is lost with its round, and is not made up for."""
        config = evaluated_config(make_config, 4, 2)
        sites = Sites()
        attempt(config, folder, sites, "after site 2 3 1")
        attempt(config, folder, sites)
        assert sites.made[1] == [
            ("round", 1), ("round", 2), ("round", 3), ("evaluation", 1), ("round", 4),
            ("evaluation", 2),
        ]  # fmt: skip
        assert folder.read_json("metrics.json")["evaluated"] == {"round": 4, "evaluations": 1}

    def test_one_that_was_lost_replaces_a_later_one(
        self, make_config: MakeConfig, folder: RunFolder
    ) -> None:
        """Four are planned; the model of round 1 is evaluated again, and one later is not."""
        config = evaluated_config(make_config, 4, 1)
        sites = Sites()
        attempt(config, folder, sites, "after site 2 2 1")
        attempt(config, folder, sites)
        found = [(e["round"], e["evaluation"]) for e in told(folder.events(), "evaluated")]
        assert found == [(1, 2), (3, 3), (4, 4)]
        [resumed] = told(folder.events(), "resumed")
        assert (resumed["lost"], resumed["lost_evaluations"]) == ([2], 1)

    def test_none_is_made_that_is_not_needed(
        self, make_config: MakeConfig, folder: RunFolder
    ) -> None:
        """Four are planned, but round 1 was lost; the last model is evaluated once."""
        config = evaluated_config(make_config, 4, 1)
        sites = Sites()
        attempt(config, folder, sites, "after site 2 1 0")
        attempt(config, folder, sites, "after event evaluated 4")
        attempt(config, folder, sites)
        assert [index for part, index in sites.made[1] if part == "evaluation"] == [1, 2, 3]
        found = [(e["round"], e["evaluation"]) for e in told(folder.events(), "evaluated")]
        assert found == [(2, 1), (3, 2), (4, 3)]

    def test_one_that_is_lost_at_the_end_leaves_the_figures_before(
        self, make_config: MakeConfig, folder: RunFolder
    ) -> None:
        config = evaluated_config(make_config, 2, 1)
        sites = Sites()
        attempt(config, folder, sites, "after site 2 0 2")
        attempt(config, folder, sites)
        assert sites.made[1][-1] == ("evaluation", 2)
        metrics = folder.read_json("metrics.json")
        assert metrics["evaluated"] == {"round": 1, "evaluations": 1}
        assert metrics["quality"].keys() == {"loss", "one_way_tv", "tstr_accuracy_mlp"}

    @pytest.mark.parametrize("kill_at", ["after event evaluated 1", "after event evaluated 2"])
    def test_one_that_was_told_of_is_never_lost(
        self, make_config: MakeConfig, folder: RunFolder, kill_at: str
    ) -> None:
        config = evaluated_config(make_config, 2, 1)
        sites = Sites()
        assert attempt(config, folder, sites, kill_at)[-1] == kill_at
        last = told(folder.events(), "evaluated")[-1]
        assert stored(folder).evaluated.quality == last["quality"]
        attempt(config, folder, sites)
        assert folder.read_json("metrics.json")["evaluated"] == {"round": 2, "evaluations": 2}

    def test_sums_of_records_are_averaged_over_processes(
        self, make_config: MakeConfig, folder: RunFolder
    ) -> None:
        """What evaluations have in common is carried over a crash: two of them, added up."""
        config = evaluated_config(make_config, 2, 1)
        sites = Sites()
        attempt(config, folder, sites, "after state 2")
        # Both sites answered 20 in every cell, once so far.
        assert stored(folder).evaluated.sums["one_way"].tolist() == [40.0] * 10
        attempt(config, folder, sites)
        assert stored(folder).evaluated.sums["one_way"].tolist() == [80.0] * 10
        assert stored(folder).evaluated.count == 2

    def test_the_heads_of_the_ledgers_are_carried_over(
        self, steady: RunConfig, folder: RunFolder
    ) -> None:
        """A site that put its ledger back while the server was down is asked with the old head."""
        attempt(steady, folder, Sites(), "after event round 2")
        run(steady, grid := FakeGrid(NODES, good), folder)
        assert {node: task.ledger for node, task in grid.tasks} == {
            node: Sites._head(node, 2) for node in NODES
        }

    def test_a_run_that_failed_goes_on_with_the_next_round(
        self, steady: RunConfig, folder: RunFolder
    ) -> None:
        def answer(node: int, task: Task) -> RecordDict | None:
            return good(node, task) if task.round != 2 else None

        with pytest.raises(RunError, match="round 2: 0 of 2"):
            run(steady, FakeGrid(NODES, answer), folder)
        grid = FakeGrid(NODES, answer)
        run(steady, grid, folder)
        assert {task.round for _, task in grid.tasks} == {3}
        assert folder.read_json("metrics.json")["steps"] == 2
        assert [event["event"] for event in folder.events()] == [
            "run", "round", "failed", "resumed", "round", "finished",
        ]  # fmt: skip

    def test_seconds_are_those_of_all_processes(
        self, steady: RunConfig, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By a clock that moves on by one whenever it is looked at."""
        ticks, sites = count(), Sites()
        clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
        monkeypatch.setattr(rounds, "time", clock)
        attempt(steady, folder, sites, "after event round 2")
        before, between = stored(folder).seconds, next(ticks)
        assert 0 < before < between
        attempt(steady, folder, sites)
        # The second process began with the tick after, and looked last when it had finished.
        last = next(ticks) - 1
        assert folder.read_json("metrics.json")["seconds"]["total"] == before + last - between - 1

    def test_a_damaged_checkpoint_falls_back_and_says_so(
        self, steady: RunConfig, folder: RunFolder
    ) -> None:
        """The round that only it held is lost; what came before is exact."""
        sites = Sites()
        attempt(steady, folder, sites, "before note 3 0")
        file = folder.path / "checkpoint" / "000002.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        attempt(steady, folder, sites)
        [resumed] = told(folder.events(), "resumed")
        assert (resumed["round"], resumed["lost"]) == (1, [2])
        [fault] = resumed["damaged"]
        assert "000002.safetensors: is damaged" in fault
        assert released(folder) == after_rounds(steady, (1, 3))
        assert sites.made[1] == [("round", 1), ("round", 2), ("round", 3)]
        assert folder.read_json("metrics.json")["steps"] == 2

    def test_all_checkpoints_damaged_is_an_error(
        self, steady: RunConfig, folder: RunFolder
    ) -> None:
        attempt(steady, folder, Sites(), "before note 3 0")
        for file in (folder.path / "checkpoint").glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        refused(steady, folder, "is damaged: .* begin a new run")

    @pytest.mark.parametrize("content", [b"", b"{", b'{"round": 2}'])
    def test_a_damaged_note_is_an_error(
        self, steady: RunConfig, folder: RunFolder, content: bytes
    ) -> None:
        """What was asked is not known then: it must not pass for nothing."""
        attempt(steady, folder, Sites(), "before note 3 0")
        (folder.path / "checkpoint" / "asked.json").write_bytes(content)
        refused(steady, folder, r"asked\.json")

    @pytest.mark.parametrize("note", [None, Asked(0, 0), Asked(1, 0)])
    def test_so_is_one_that_is_behind_the_state(
        self, steady: RunConfig, folder: RunFolder, note: Asked | None
    ) -> None:
        """It is gone, or of an older copy: rounds 1 and 2 were asked for, the state has them."""
        attempt(steady, folder, Sites(), "before note 3 0")
        if note is None:
            (folder.path / "checkpoint" / "asked.json").unlink()
        else:
            folder.ask(note)
        refused(steady, folder, r"asked\.json")

    def test_another_run(self, steady: RunConfig, folder: RunFolder) -> None:
        attempt(steady, folder, Sites(), "before note 3 0")
        refused(steady, folder, "holds run run-a, not run-b", run_id="run-b")

    def test_another_plan(self, steady: RunConfig, folder: RunFolder) -> None:
        attempt(steady, folder, Sites(), "before note 3 0")
        longer = steady.model_copy(
            update={"federation": steady.federation.model_copy(update={"rounds": 4})}
        )
        refused(longer, folder, "was priced otherwise; .* environment.json")

    def test_another_price_by_the_same_configuration(
        self, private: RunConfig, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As another version of the accountants might find."""
        attempt(private, folder, Sites(), "before note 2 1")
        dearer = replace(plan(private), noise_multiplier=plan(private).noise_multiplier * 1.01)
        monkeypatch.setattr(rounds, "plan", lambda _: dearer)
        refused(private, folder, "was priced otherwise")

    def test_another_model(self, steady: RunConfig, folder: RunFolder) -> None:
        attempt(steady, folder, Sites(), "before note 3 0")
        wider = steady.model_copy(update={"model": steady.model.model_copy(update={"latent": 3})})
        refused(wider, folder, "expected .* got", StateError)


def refused(
    config: RunConfig,
    folder: RunFolder,
    reason: str,
    kind: type[FedveilError] = FedveilError,
    run_id: str = "run-a",
) -> None:
    """A folder is not gone on with: nobody is asked, nothing is changed."""
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    grid = FakeGrid(NODES, good)
    with pytest.raises(kind, match=reason) as caught:
        run(config, grid, folder, run_id)
    assert "\n" not in str(caught.value)
    assert grid.tasks == []
    after = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    assert after == before


class FullDisk:
    """A disk that is full from some call on that writes, for ever or once."""

    def __init__(self, patch: pytest.MonkeyPatch, call: str, at: int, *, once: bool) -> None:
        self.calls, self._at, self._once = 0, at, once
        sync, open_descriptor, open_path = os.fsync, os.open, Path.open

        def limited_sync(descriptor: int) -> None:
            self._write()
            sync(descriptor)

        def limited_descriptor(path: Path, flags: int, mode: int = 0o777) -> int:
            if flags & os.O_WRONLY:
                self._write()
            return open_descriptor(path, flags, mode)

        def limited_path(path: Path, mode: str = "r", **options: Any) -> Any:  # noqa: ANN401
            if mode != "r":
                self._write()
            return open_path(path, mode, **options)

        if call == "fsync":
            patch.setattr(os, "fsync", limited_sync)
        else:
            patch.setattr(os, "open", limited_descriptor)
            patch.setattr(Path, "open", limited_path)

    def _write(self) -> None:
        self.calls += 1
        if self.calls == self._at or (self.calls > self._at and not self._once):
            raise OSError(errno.ENOSPC, "No space left on device")


class TestFullDisk:
    @pytest.mark.parametrize(("call", "once"), [("fsync", True), ("fsync", False), ("open", False)])
    def test_at_any_call(
        self,
        make_config: MakeConfig,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        call: str,
        once: bool,
    ) -> None:
        """One line says so, the state before is whole, and what is resumed ends as it should."""
        config = make_config(
            federation={"rounds": 2}, data={"holdout": 0.0}, privacy={"mechanism": "none"}
        ).resolved()
        for at in count(1):
            folder, sites = RunFolder(tmp_path / str(at)), Sites()
            with folder.locked(resume=False):
                with monkeypatch.context() as patch:
                    disk = FullDisk(patch, call, at, once=once)
                    try:
                        run(config, FakeGrid(NODES, sites), folder)
                    except FedveilError as error:
                        text = str(error)
                        assert "cannot be written (No space left on device)" in text
                        assert "\n" not in text
                if disk.calls < at:
                    break
                found, damaged = folder.load_checkpoint()
                assert damaged == []
                # What the sites were asked for is noted, whatever could not be written.
                asked = max((index for _, index in sites.made.get(1, [])), default=0)
                assert folder.asked().round >= asked >= (found.state.round if found else 0)
                run(config, FakeGrid(NODES, sites), folder)
            metrics = folder.read_json("metrics.json")
            kept = [number for number in (1, 2) if number not in lost_rounds(folder)]
            assert (metrics["rounds"], metrics["steps"]) == (2, len(kept))
            assert released(folder) == after_rounds(config, kept)
        assert at >= 12

    @pytest.mark.parametrize("call", ["fsync", "open"])
    def test_an_event_that_cannot_be_told_does_not_hide_the_cause(
        self,
        steady: RunConfig,
        folder: RunFolder,
        monkeypatch: pytest.MonkeyPatch,
        call: str,
    ) -> None:
        def answer(node: int, task: Task) -> RecordDict | None:
            if task.round == 2:
                FullDisk(monkeypatch, call, 1, once=False)
                return None
            return good(node, task)

        with pytest.raises(RunError, match=r"^round 2: 0 of 2 replies are usable"):
            run(steady, FakeGrid([1, 2], answer), folder)

    def test_the_cause_is_told_where_there_is_room(
        self, steady: RunConfig, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def answer(node: int, task: Task) -> RecordDict:
            if node == 2 and task.round == 2:
                FullDisk(monkeypatch, "fsync", 1, once=True)
            return good(node, task)

        with pytest.raises(FedveilError, match=r"000002\.safetensors: cannot be written"):
            run(steady, FakeGrid([1, 2], answer), folder)
        last = list(folder.events())[-1]
        assert (last["event"], last["round"]) == ("failed", 1)
        assert "000002.safetensors: cannot be written (No space left" in last["cause"]
