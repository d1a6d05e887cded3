"""The ServerApp: it reads its run configuration, runs the loop, and lets the run be watched."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fedveil.config import ConfigError, FedveilError, RunConfig
from fedveil.data_prep import run_schema
from fedveil.data_prep.schema import schema_to_json
from fedveil.flower import (
    Context,
    FlowerRun,
    Grid,
    Message,
    RecordDict,
    empty_run,
    set_identity,
)
from fedveil.server.app import Setting, ignore, server_app
from fedveil.server.store import Event, RunFolder
from fedveil.wire import Update, pack, read_task

MakeConfig = Callable[..., RunConfig]


class Obliging(Grid):
    """Two sites whose gradient sums, float64, are all zero."""

    def __init__(self) -> None:
        self.asked = 0

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
        return [1, 2]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        del timeout
        for message in messages:
            self.asked += 1
            task = read_task(message.content)
            zeros = {name: np.zeros(array.shape) for name, array in task.arrays.items()}
            head = (task.ledger[0] + 1, "a" * 64)
            update = Update(task.run_id, task.round, task.evaluation, zeros, {}, head)
            yield Message(pack(update), reply_to=message)


@pytest.fixture
def values(make_config: MakeConfig, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A complete run configuration, of a folder that is held."""
    set_identity(1, 0)
    config = make_config(data={"holdout": 0.0}, privacy={"mechanism": "none"}).resolved()
    folder = RunFolder(tmp_path / "run")
    with folder.locked(resume=False):
        yield {
            "config": config.model_dump_json(by_alias=True),
            "schema": schema_to_json(run_schema(config)),
            "run-id": "run-a",
            "folder": str(folder.path),
        }


def start(values: dict[str, str], observe: Callable[[Event], None] = ignore) -> Obliging:
    """Runs the app over the obliging sites."""
    grid = Obliging()
    server_app(Setting(lambda _: observe))(grid, Context(1, 0, {}, RecordDict(), {**values}))
    return grid


def test_it_runs_the_whole_run(values: dict[str, str]) -> None:
    observed: list[Event] = []
    grid = start(values, observed.append)
    assert grid.asked == 4
    folder = RunFolder(Path(values["folder"]))
    assert folder.read_json("metrics.json")["run_id"] == "run-a"
    assert list(folder.events()) == observed
    assert [event["event"] for event in observed] == ["run", "round", "round", "finished"]


def test_nobody_has_to_watch(values: dict[str, str]) -> None:
    start(values)
    assert (Path(values["folder"]) / "events.jsonl").is_file()


@pytest.mark.parametrize("key", ["config", "schema", "run-id", "folder"])
def test_a_missing_value_is_named(values: dict[str, str], key: str) -> None:
    del values[key]
    with pytest.raises(ConfigError, match=f"run configuration: {key}: missing"):
        start(values)


@pytest.mark.parametrize("key", ["config", "schema", "run-id", "folder"])
def test_so_is_one_that_is_no_text(values: dict[str, str], key: str) -> None:
    context = Context(1, 0, {}, RecordDict(), {**values, key: 3})
    with pytest.raises(ConfigError, match=key):
        server_app()(Obliging(), context)


def test_an_observer_that_fails_fails_the_run(values: dict[str, str]) -> None:
    def observe(event: Event) -> None:
        if event["event"] == "round":
            raise ValueError("no screen")

    with pytest.raises(ValueError, match="no screen"):
        start(values, observe)
    folder = RunFolder(Path(values["folder"]))
    events = list(folder.events())
    assert [event["event"] for event in events] == ["run", "round", "failed"]
    assert (events[-1]["cause"], events[-1]["epsilon"]) == ("ValueError", None)


def test_started_again_it_goes_on(values: dict[str, str]) -> None:
    """A coordinator that was stopped in round 1 asks for round 2 next, of the same run."""

    def stop(event: Event) -> None:
        if event["event"] == "round":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(values, stop)
    observed: list[Event] = []
    grid = start(values, observed.append)
    assert grid.asked == 2
    assert [event["event"] for event in observed] == ["resumed", "round", "finished"]
    assert (observed[0]["run_id"], observed[0]["lost"], observed[1]["round"]) == ("run-a", [], 2)


def test_the_folder_of_another_run_is_left_alone(values: dict[str, str]) -> None:
    start(values)
    with pytest.raises(FedveilError, match="holds run run-a, not run-b"):
        start(values | {"run-id": "run-b"})
