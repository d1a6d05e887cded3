"""The executor: what it takes, what it leaves, and that no run ends without a word."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedveil.config import RunConfig
from fedveil.data_prep import run_schema
from fedveil.deployment.kit import Kit
from fedveil.flower.fleet import UnreachableError
from fedveil.server import executor
from fedveil.server.executor import nodes_of, work
from fedveil.server.grid import PollingGrid
from fedveil.server.queue import Queue
from fedveil.server.replies import RunError
from fedveil.server.store import RunFolder

SITES = {name: name.encode().ljust(32) for name in ("east", "north", "west")}
NODES = {"east": 101, "north": 2**64 - 1, "west": 103, "another": 7}
App = Callable[[Any, Any], None]


class World:
    """A server's kit with a queue, and a SuperLink that is there or not."""

    def __init__(self, kit: Kit, config: RunConfig, patch: pytest.MonkeyPatch) -> None:
        self.kit, self.config = kit, config
        self.queue = Queue(kit.state)
        self.away, self.begun, self.stop = False, 0, threading.Event()
        self.write_nodes(NODES)
        patch.setattr(executor, "run_at", self._run_at)
        self._patch = patch

    def write_nodes(self, nodes: dict[str, int]) -> None:
        text = json.dumps({name: {"node": node, "online": True} for name, node in nodes.items()})
        (self.kit.state / "nodes.json").write_text(text, encoding="utf-8")

    def submit(self) -> str:
        return self.queue.submit(self.config, run_schema(self.config), "olga", SITES)

    def folder(self, run: str) -> RunFolder:
        return RunFolder(self.queue.path(run))

    def events(self, run: str) -> list[dict[str, Any]]:
        return self.folder(run).events_from(0)[0]

    def work(self, app: App) -> float:
        self._patch.setattr(executor, "server_app", lambda _: app)
        nobody: Any = None
        return work(self.kit, self.queue, nobody, nobody, self.stop)

    @contextmanager
    def _run_at(self, *_: object) -> Iterator[Any]:
        if self.away:
            raise UnreachableError("ConnectError: refused")
        self.begun += 1
        yield SimpleNamespace(run=SimpleNamespace(run_id=5), lost=SimpleNamespace(is_set=bool))


@pytest.fixture
def world(
    make_kit: Callable[..., Path],
    make_config: Callable[..., RunConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> World:
    kit = Kit.read(make_kit("server"), "server")
    kit.state.mkdir()
    return World(kit, make_config().resolved(), monkeypatch)


def finishes(grid: object, context: Any) -> None:  # noqa: ANN401
    folder = RunFolder(Path(context.run_config["folder"]))
    folder.append({"event": "finished", "rounds": 2})


def test_nothing_waits(world: World) -> None:
    assert world.work(finishes) > 0
    assert world.begun == 0


def test_runs_in_their_order_and_one_at_a_time(world: World) -> None:
    runs, seen = [world.submit(), world.submit()], []

    def app(grid: object, context: Any) -> None:  # noqa: ANN401
        seen.append(context.run_config["run-id"])
        assert world.queue.active() == {runs[0]: "running", runs[1]: "queued"} or len(seen) == 2
        finishes(grid, context)

    assert (world.work(app), world.work(app)) == (0.0, 0.0)
    assert seen == runs
    assert world.queue.active() == {}


def test_without_a_superlink_it_stays_queued(world: World) -> None:
    run = world.submit()
    world.away = True
    assert world.work(finishes) > 0
    assert world.queue.next() == run
    world.away = False
    assert world.work(finishes) == 0.0
    assert world.queue.next() is None


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (RunError("4 of 4 sites refuse"), "4 of 4 sites refuse"),
        (ValueError("patient 4711"), "ValueError"),  # only our own errors have a text of ours
    ],
)
def test_a_run_that_fails_before_its_first_event_says_so(
    world: World, error: Exception, cause: str
) -> None:
    def app(grid: object, context: object) -> None:
        raise error

    run = world.submit()
    assert world.work(app) == 0.0
    (told,) = world.events(run)
    assert (told["event"], told["cause"]) == ("failed", cause)
    assert world.queue.summary(run).state == "failed"


def test_a_failure_is_told_once(world: World) -> None:
    def app(grid: object, context: Any) -> None:  # noqa: ANN401
        folder = RunFolder(Path(context.run_config["folder"]))
        folder.append({"event": "failed", "round": 1, "epsilon": 1.0, "cause": "too few"})
        raise RunError("too few")

    run = world.submit()
    world.work(app)
    assert [event["cause"] for event in world.events(run)] == ["too few"]


def test_an_earlier_failure_does_not_stand_for_a_later_one(world: World) -> None:
    def app(grid: object, context: object) -> None:
        raise RunError("again")

    run = world.submit()
    world.work(app)
    world.queue.resume(run, "olga")
    world.work(app)
    assert [event["cause"] for event in world.events(run)] == ["again", "again"]


def test_a_cancelled_run_stops(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[Callable[[], str | None]] = []
    real = PollingGrid

    def watched(grid: Any, why: Callable[[], str | None]) -> Any:  # noqa: ANN401
        stopped.append(why)
        return real(grid, why)

    monkeypatch.setattr(executor, "PollingGrid", watched)
    run = world.submit()

    def app(grid: object, context: object) -> None:
        (why,) = stopped
        assert why() is None
        world.queue.cancel(run, "olga")
        raise RunError(str(why()))

    world.work(app)
    assert "cancelled by an operator" in world.events(run)[-1]["cause"]
    assert world.queue.summary(run).state == "cancelled"


def test_a_run_of_a_server_that_is_stopped_says_so_and_may_go_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[Callable[[], str | None]] = []
    monkeypatch.setattr(executor, "PollingGrid", lambda _, why: stopped.append(why))

    def app(grid: object, context: object) -> None:
        world.stop.set()
        raise RunError(str(stopped[0]()))

    run = world.submit()
    world.work(app)
    summary = world.queue.summary(run)
    cause = f"the server was stopped; `fedveil runs resume {run}` goes on with it"
    assert (summary.state, summary.cause) == ("failed", cause)
    world.queue.resume(run, "olga")
    assert world.queue.next() == run


class TestNodes:
    def test_by_name_in_the_order_of_the_pins(self, world: World) -> None:
        found = nodes_of(world.kit, world.folder(world.submit()), world.config)
        assert found == {1: 101, 2: 2**64 - 1, 3: 103}

    def test_a_site_that_has_left(self, world: World) -> None:
        world.write_nodes({"east": 101, "west": 103})
        with pytest.raises(RunError, match="site north: is no longer in the federation"):
            nodes_of(world.kit, world.folder(world.submit()), world.config)

    def test_another_number_of_sites(
        self, world: World, make_config: Callable[..., RunConfig]
    ) -> None:
        config = make_config(federation={"sites": 4}).resolved()
        with pytest.raises(RunError, match=r"federation\.sites = 4: the run was submitted to 3"):
            nodes_of(world.kit, world.folder(world.submit()), config)

    @pytest.mark.parametrize("text", [None, "", "{", "\xff"])
    def test_no_list_of_nodes(self, world: World, text: str | None) -> None:
        path = world.kit.state / "nodes.json"
        if text is None:
            path.unlink()
        else:
            path.write_bytes(text.encode("latin-1"))
        with pytest.raises(RunError, match="is the SuperLink up"):
            nodes_of(world.kit, world.folder(world.submit()), world.config)
