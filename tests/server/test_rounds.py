"""The round loop: which replies count, what is divided by what, and how a run ends."""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedveil.config import RunConfig
from fedveil.data_prep import run_schema
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
from fedveil.models.state import read_file, to_arrays
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import Plan, plan
from fedveil.server import rounds
from fedveil.server.aggregation import STRATEGIES, ServerState
from fedveil.server.rounds import (
    Replies,
    RunError,
    advance,
    scaled,
    summed,
    train,
    usable_replies,
)
from fedveil.server.store import Event, RunFolder
from fedveil.wire import TRAIN, Refusal, Refused, Task, Update, pack, read_task

MakeConfig = Callable[..., RunConfig]
Answer = Callable[[int, Task], RecordDict | Error | None]
PLANTED = "PATIENT-4711"
SHAPES = {"w": (2, 2), "b": (3,)}


@pytest.fixture(autouse=True, scope="module")
def _identity() -> None:
    set_identity(1, 0)


def reply(node: int, content: RecordDict | Error) -> Message:
    """What the server gets when a site answers so."""
    request = Message(RecordDict(), node, TRAIN)
    if isinstance(content, Error):
        return Message(content, reply_to=request)
    return Message(content, reply_to=request)


def like(kind: str) -> dict[str, np.ndarray]:
    """What is expected of a reply: sums are float64, models float32."""
    return {name: np.zeros(shape, dtype=kind) for name, shape in SHAPES.items()}


def fine(kind: str, **changes: object) -> dict[str, np.ndarray]:
    """Arrays as they are expected, but for some."""
    arrays = {"w": np.ones((2, 2), dtype=kind), "b": np.full(3, 2, dtype=kind)}
    return arrays | {name: np.array(value, dtype=kind) for name, value in changes.items()}


GOOD = fine("float64")
LIKE = like("float64")


def update(arrays: Mapping[str, Any], run_id: str = "run", number: int = 4) -> RecordDict:
    """An update of round 4."""
    return pack(Update(run_id, number, arrays))


def with_array(kind: str, dtype: str, data: bytes, encoding: str = "little-endian") -> RecordDict:
    """An update whose array b is these bytes of what it calls this type."""
    content = update(fine(kind))
    whole = content.array_records["arrays"]["w"]
    content["arrays"] = ArrayRecord({"w": whole, "b": Array(dtype, (3,), encoding, data)})
    return content


def with_fact(kind: str, **values: Any) -> RecordDict:  # noqa: ANN401
    """A good update with other facts."""
    content = update(fine(kind))
    content["facts"] = ConfigRecord({"run-id": "run", "round": 4, **values})
    return content


def bad_replies(kind: str) -> dict[str, tuple[RecordDict | Error, str]]:
    """Replies that are not to be used where arrays of this type are expected, and why."""
    good, size = fine(kind), np.dtype(kind).itemsize
    other = {"float32": "float64", "float64": "float32"}[kind]
    types, count = "expected float32 or float64", "as many bytes as the shape asks for"
    expected = f"b: expected (3,) {kind}, got "
    return {
        "wrong run": (update(good, run_id="other"), "another run or round"),
        "wrong round": (update(good, number=3), "another run or round"),
        "wrong shape": (update(fine(kind, b=np.zeros(4))), f"{expected}(4,)"),
        "transposed": (update(fine(kind, b=np.zeros((3, 1)))), f"{expected}(3, 1)"),
        "the other type": (update(fine(other)), f"{kind}, got (2, 2) of another type"),
        "one of the other type": (
            update(good | {"b": fine(other)["b"]}),
            f"{expected}(3,) of another type",
        ),
        "the other type's bytes": (
            with_array(kind, kind, bytes(3 * np.dtype(other).itemsize)),
            count,
        ),
        "the encoding of before": (with_array(kind, kind, bytes(3 * size), "float32"), types),
        "numpy's encoding": (with_array(kind, kind, bytes(3 * size), "numpy.ndarray"), types),
        "big-endian": (with_array(kind, f">f{size}", bytes(3 * size)), types),
        "integers": (with_array(kind, "int32", bytes(12)), types),
        "half precision": (with_array(kind, "float16", bytes(6)), types),
        "named fields": (with_array(kind, f"[({PLANTED!r}, float32)]", bytes(12)), types),
        "NaN": (update(fine(kind, b=[0, np.nan, 0])), "finite"),
        "infinity": (update(fine(kind, b=[0, np.inf, 0])), "finite"),
        "extra key": (update(good | {PLANTED: good["b"]}), "2 names"),
        "missing key": (update({"w": good["w"]}), "2 names"),
        "other key": (update({"w": good["w"], PLANTED: good["b"]}), "2 names"),
        "no arrays": (update({}), "2 names"),
        "refused": (pack(Refused("run", 4, Refusal.BUDGET)), "all releases"),
        "failed": (
            pack(Refused("run", 4, Refusal.FAILED)),
            "refused: the site fails even without records",
        ),
        "refused another round": (pack(Refused("run", 3, Refusal.BUDGET)), "another run or round"),
        "Flower error": (Error(2, PLANTED), "Flower error 2"),
        "no message of ours": (RecordDict({PLANTED: ConfigRecord({PLANTED: PLANTED})}), "facts"),
        "a task": (pack(Task("run", 4, PLANTED, "{}", good)), "keys"),
        "a loss": (with_fact(kind, loss=0.5), "keys"),
        "text for a round": (with_fact(kind, round=PLANTED), "round"),
        "unreadable": (with_array(kind, kind, PLANTED.encode() + b"!"), count),
        "an archive": (with_array(kind, kind, b"PK\x05\x06" + bytes(18)), count),
        "half an archive": (with_array(kind, kind, b"PK\x03\x04" + PLANTED.encode() * 2), count),
    }


BAD = {kind: bad_replies(kind) for kind in ("float64", "float32")}


class TestUsableReplies:
    @pytest.mark.parametrize("expected", BAD)
    @pytest.mark.parametrize("kind", BAD["float64"])
    def test_a_bad_reply_is_dropped_with_a_reason(self, kind: str, expected: str) -> None:
        content, reason = BAD[expected][kind]
        good = update(fine(expected))
        messages = [reply(3, good), reply(2, content), reply(1, good)]
        found = usable_replies(messages, [1, 2, 3], "run", 4, like(expected))
        assert len(found.usable) == 2
        assert found.dropped.keys() == {2}
        assert reason in found.dropped[2]
        assert PLANTED not in found.dropped[2]

    @pytest.mark.parametrize("expected", ["float64", "float32"])
    def test_good_ones_are_in_site_order(self, expected: str) -> None:
        messages = [reply(n, update(fine(expected, b=[n] * 3))) for n in (3, 1, 2)]
        found = usable_replies(messages, [1, 2, 3], "run", 4, like(expected))
        assert [int(arrays["b"][0]) for arrays in found.usable] == [1, 2, 3]
        assert {a.dtype.name for arrays in found.usable for a in arrays.values()} == {expected}
        assert found.dropped == {}

    @pytest.mark.parametrize("times", [2, 3, 4])
    def test_neither_of_two_replies_is_used(self, times: int) -> None:
        messages = [reply(1, update(GOOD))] + [reply(2, update(GOOD))] * times
        found = usable_replies(messages, [1, 2], "run", 4, LIKE)
        assert len(found.usable) == 1
        assert found.dropped == {2: "replied twice"}

    @pytest.mark.parametrize("first_is_good", [True, False])
    def test_nor_where_one_of_them_is_bad(self, first_is_good: bool) -> None:
        pair = [reply(2, update(GOOD)), reply(2, update(GOOD, number=3))]
        messages = pair if first_is_good else pair[::-1]
        found = usable_replies(messages, [1, 2], "run", 4, LIKE)
        assert found.usable == ()
        assert found.dropped == {1: "no reply", 2: "replied twice"}

    def test_unknown_nodes_are_ignored(self) -> None:
        found = usable_replies(
            [reply(9, update(GOOD)), reply(1, update(GOOD))], [1], "run", 4, LIKE
        )
        assert len(found.usable) == 1
        assert found.dropped == {}

    def test_silence(self) -> None:
        found = usable_replies([], [2, 1], "run", 4, LIKE)
        assert found == Replies((), {1: "no reply", 2: "no reply"})

    def test_the_order_of_replies_does_not_matter(self) -> None:
        """Floating-point sums depend on their order: it is the sites', whoever was first."""
        rng = np.random.default_rng(1)
        nodes = [1, 2, 3, 4]
        messages = [
            reply(
                node,
                update(
                    {
                        name: rng.normal(size=shape) * 10.0 ** rng.integers(-8, 8)
                        for name, shape in SHAPES.items()
                    }
                ),
            )
            for node in nodes
        ]
        sums = {
            b"".join(
                summed(usable_replies(order, nodes, "run", 4, LIKE).usable)[name].tobytes()
                for name in LIKE
            )
            for order in itertools.permutations(messages)
        }
        assert len(sums) == 1


class TestSums:
    def test_by_hand(self) -> None:
        parts = [{"w": np.array([n, 2.0 * n], dtype=np.float32)} for n in (1, 2, 3)]
        assert summed(parts)["w"].tolist() == [6, 12]

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


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    """Plain gradient descent of rate 1 without a mechanism: a round's arithmetic in the open."""
    return make_config(
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
    """The type of what a site sends: sums are float64, models float32."""
    return np.float32 if config.strategy == "fedavg" else np.float64


def constant(
    model: Mapping[str, np.ndarray], value: float, kind: type[np.floating]
) -> dict[str, np.ndarray]:
    """Arrays of the model's shapes, all of one value."""
    return {name: np.full(array.shape, value, dtype=kind) for name, array in model.items()}


def flat(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """All numbers in one vector."""
    return np.concatenate([array.ravel() for array in arrays.values()])


def step(
    config: RunConfig, priced: Plan, replies: Iterable[float], coins: Coins
) -> tuple[ServerState, ServerState]:
    """The state before and after a round whose replies are constants."""
    module, state = model_for(config)
    usable = tuple(constant(state.model, value, sent_as(config)) for value in replies)
    return state, advance(state, Replies(usable, {}), module, config, priced, coins)


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
        assert after.round == 1

    def test_the_plans_own_divisor(self, config: RunConfig, coins: Coins) -> None:
        before, after = step(config, plan(config), [512.0], coins)
        # 512 of the declared 1797 * 0.9 training records are expected in a step.
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
        usable = tuple(constant(state.model, v, np.float64) for v in (0.1, 1 / 3))
        after = advance(
            replace(state, model=zeros), Replies(usable, {}), module, config, priced, coins
        )
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

    def test_fedavg_is_the_plain_mean_of_those_who_replied(
        self, make_config: MakeConfig, coins: Coins
    ) -> None:
        averaged = make_config(
            privacy={"mechanism": "none"}, aggregation={"strategy": "fedavg"}
        ).resolved()
        _, after = step(averaged, plan(averaged), [1.0, 2.0, 6.0], coins)
        assert (flat(after.model) == 3).all()
        _, after = step(averaged, plan(averaged), [1.0, 2.0], coins)
        assert (flat(after.model) == 1.5).all()

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
        replies = Replies((constant(state.model, 5.0, np.float64),), {})
        after = advance(state, replies, module, config, priced, coins)
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
            answered = self._answer(node, task)
            if answered is not None:
                found.append(reply(node, answered))
        return found[::-1]


def ones(task: Task, kind: type[np.floating]) -> RecordDict:
    """Every number is 1."""
    return pack(Update(task.run_id, task.round, constant(task.arrays, 1.0, kind)))


def good(node: int, task: Task) -> RecordDict:
    """Every weight's gradient, or every weight, is 1."""
    return ones(task, sent_as(RunConfig.model_validate_json(task.config)))


def only(nodes: set[int], otherwise: RecordDict | Error | None = None) -> Answer:
    """Some sites answer well, the others so."""

    def answer(node: int, task: Task) -> RecordDict | Error | None:
        return good(node, task) if node in nodes else otherwise

    return answer


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A new run folder."""
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


def run(config: RunConfig, grid: FakeGrid, folder: RunFolder) -> list[Event]:
    """Trains over a grid; what was observed."""
    observed: list[Event] = []
    train(grid, config, run_schema(config), "run-a", folder, observed.append)
    return observed


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
        state = folder.load_checkpoint()
        assert state.round == 2
        assert (
            flat({n: arrays[n] for n in state.average}).tobytes() == flat(state.average).tobytes()
        )

    def test_sites_get_the_run_and_the_current_model(
        self, config: RunConfig, folder: RunFolder
    ) -> None:
        grid = FakeGrid([1, 2], good)
        run(config, grid, folder)
        first, second = grid.tasks[0][1], grid.tasks[2][1]
        assert RunConfig.model_validate_json(first.config) == config
        assert first.run_id == second.run_id == "run-a"
        expected = 2 / plan(config).expected_batch
        assert flat(first.arrays) - flat(second.arrays) == pytest.approx(expected, abs=1e-6)

    def test_initial_weights_are_of_the_public_seed(
        self, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        starts = []
        for index, seed in enumerate((0, 0, 1)):
            config = make_config(
                federation={"seed": seed, "rounds": 1}, privacy={"mechanism": "none"}
            ).resolved()
            grid = FakeGrid([1, 2], good)
            folder = RunFolder(tmp_path / str(index))
            folder.create()
            run(config, grid, folder)
            starts.append(flat(grid.tasks[0][1].arrays).tobytes())
        assert starts[0] == starts[1] != starts[2]

    def test_dropped_sites_are_named(self, config: RunConfig, folder: RunFolder) -> None:
        def answer(node: int, task: Task) -> RecordDict:
            if node == 2 and task.round == 2:
                return pack(Refused(task.run_id, task.round, Refusal.FAILED))
            return good(node, task)

        observed = run(config, FakeGrid([1, 2, 3], answer), folder)
        assert [(e["sites"], e["dropped"]) for e in observed if e["event"] == "round"] == [
            (3, []),
            (2, [{"site": 2, "reason": f"refused: {Refusal.FAILED.value}"}]),
        ]
        assert [dropped_in(event) for event in observed if event["event"] == "round"] == [[], [2]]

    @pytest.mark.parametrize("strategy", ["sgd", "adam", "fedavg"])
    def test_sums_are_float64_and_models_float32(
        self, make_config: MakeConfig, folder: RunFolder, strategy: str
    ) -> None:
        """A site that sends the other type is dropped; the sums' rounding is accounted for."""
        config = make_config(
            privacy={"mechanism": "none"}, aggregation={"strategy": strategy}
        ).resolved()
        wanted = sent_as(config)
        other = np.float64 if wanted is np.float32 else np.float32

        def answer(node: int, task: Task) -> RecordDict:
            return ones(task, other) if node == 2 else good(node, task)

        grid = FakeGrid([1, 2, 3], answer)
        observed = run(config, grid, folder)
        rounds_told = [event for event in observed if event["event"] == "round"]
        assert [event["sites"] for event in rounds_told] == [2, 2]
        for event in rounds_told:
            [dropped] = event["dropped"]
            assert dropped["site"] == 2
            assert f"{np.dtype(wanted).name}, got " in dropped["reason"]
            assert dropped["reason"].endswith(" of another type")
        # The model itself travels as float32, whatever comes back.
        assert {a.dtype.name for _, task in grid.tasks for a in task.arrays.values()} == {"float32"}

    @pytest.mark.parametrize("strategy", ["sgd", "fedavg"])
    def test_only_the_trainable_parameters_are_expected(
        self,
        make_config: MakeConfig,
        folder: RunFolder,
        monkeypatch: pytest.MonkeyPatch,
        strategy: str,
    ) -> None:
        config = make_config(
            privacy={"mechanism": "none"}, aggregation={"strategy": strategy}
        ).resolved()
        names = ["posterior.weight", "posterior.bias"]
        partly = replace(family("vae"), trainable=lambda _: names)
        monkeypatch.setattr(rounds, "family", lambda _: partly)

        def answer(node: int, task: Task) -> RecordDict:
            if node == 2:
                return good(node, task)  # all of them
            some = {name: task.arrays[name] for name in names}
            return pack(Update(task.run_id, task.round, constant(some, 1.0, sent_as(config))))

        grid = FakeGrid([1, 2, 3], answer)
        observed = run(config, grid, folder)
        told = [event for event in observed if event["event"] == "round"]
        assert [dropped_in(event) for event in told] == [[2], [2]]
        assert "expected the 2 names of the model" in told[0]["dropped"][0]["reason"]
        first, second = grid.tasks[0][1].arrays, grid.tasks[3][1].arrays
        moved = {n for n in first if not np.array_equal(first[n], second[n])}
        assert moved == set(names)

    @pytest.mark.parametrize(
        ("nodes", "otherwise"),
        [
            ({1}, None),
            ({1}, pack(Refused("run-a", 1, Refusal.BUDGET))),
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
        assert folder.load_checkpoint().round == 1
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
        make_config: MakeConfig,
        folder: RunFolder,
        kind: type[BaseException] | None,
        stop: int,
    ) -> None:
        """What sites have released is out, whether or not the server used it."""
        config = make_config().resolved()
        priced = plan(config)
        assert priced.epsilon is not None

        def answer(node: int, task: Task) -> RecordDict | None:
            if task.round < stop:
                return good(node, task)
            if kind is not None:
                raise kind(PLANTED)
            return None

        with pytest.raises(kind or RunError):
            run(config, FakeGrid([1, 2, 3], answer), folder)
        last = list(folder.events())[-1]
        assert (last["event"], last["round"]) == ("failed", stop - 1)
        assert last["epsilon"] == priced.epsilon
        spent = priced.epsilon_after(stop - 1)
        assert spent is not None
        assert spent < last["epsilon"]

    @pytest.mark.parametrize("encoding", ["numpy.ndarray", "little-endian"])
    def test_one_site_cannot_stop_a_run_by_bad_bytes(
        self, config: RunConfig, folder: RunFolder, encoding: str
    ) -> None:
        archive = RecordDict(
            {
                "facts": ConfigRecord({"run-id": "run-a", "round": 1}),
                "arrays": ArrayRecord(
                    {"w": Array("float64", (1,), encoding, b"PK\x03\x04 and so on")}
                ),
            }
        )
        observed = run(config, FakeGrid([1, 2, 3], only({1, 3}, archive)), folder)
        assert [dropped_in(event) for event in observed if event["event"] == "round"] == [[2], [2]]
        assert folder.read_json("metrics.json")["rounds"] == 2
