"""The executor and a run that it has; the SuperLink is a fake, the run's app only asks."""

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
from fedveil.flower import Grid
from fedveil.server import executor
from fedveil.server.coordinator import read_coordinator
from fedveil.server.executor import work
from fedveil.server.queue import Queue


class SilentGrid:
    """Sites that never answer."""

    def __init__(self, asked: Callable[[], None]) -> None:
        self._asked = asked
        self.run, self.lost = SimpleNamespace(run_id=1), threading.Event()

    def push_messages(self, _: object) -> list[str]:
        self._asked()
        return ["a"]

    def pull_messages(self, _: object) -> list[Any]:
        return []


def test_a_run_of_a_server_that_is_stopped_says_so_and_may_go_on(
    kits: Path, make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    kit, stop, config = Kit.read(kits / "server", "server"), threading.Event(), make_config()
    queue = Queue(kit.state)
    run = queue.submit(config.resolved(), run_schema(config), "boss", kit.read_roster().identities)

    @contextmanager
    def run_at(*_: object) -> Iterator[SilentGrid]:
        yield SilentGrid(stop.set)

    def app(_: object) -> Callable[[Grid, object], None]:
        def ask(grid: Grid, _: object) -> None:
            grid.send_and_receive([])

        return ask

    monkeypatch.setattr(executor, "run_at", run_at)
    monkeypatch.setattr(executor, "server_app", app)
    asks = read_coordinator(kit.keys / "coordinator.key")
    assert work(kit, queue, None, asks, stop)  # type: ignore[arg-type]
    summary = queue.summary(run)
    assert (summary.state, summary.cause) == (
        "failed",
        f"the server was stopped; `fedveil runs resume {run}` goes on with it",
    )
    queue.resume(run, "boss")
    assert queue.next() == run
