"""A site's process against a server that sends what it should not; the connection is a fake."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fedveil.client import node as node_module
from fedveil.client.node import Node
from fedveil.config import ConfigError
from fedveil.flower import ConfigRecord, Message, RecordDict, set_identity, set_message_id
from fedveil.flower.fleet import bundle_hash
from fedveil.flower.superlink import deployed_bundle
from fedveil.wire import READY

Kit = Any  # `conftest.SiteKit`; test modules cannot import it
Step = Callable[[], Message | None]


class FakeFleet:
    """A session whose messages are a script; the site is told to stop after the last."""

    def __init__(self, script: list[Step], stop: threading.Event) -> None:
        self._script, self._stop = script, stop
        self.node_id, self.lost = 5, threading.Event()
        self.replies: list[Message] = []
        self.sessions = 0

    @contextmanager
    def session(self, _: int) -> Iterator[int]:
        self.sessions += 1
        yield self.node_id

    def close(self) -> None: ...

    def receive(self) -> Message | None:
        step = self._script.pop(0)
        if not self._script:
            self._stop.set()
        return step()

    def reply(self, message: Message) -> None:
        self.replies.append(message)

    def bundle(self, _: int) -> str:
        return bundle_hash(deployed_bundle())


@pytest.fixture
def serve(site_kit: Kit, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeFleet]:
    """Lets a node run through a script, with a roster of its own making."""
    set_identity(1, 5)
    monkeypatch.setattr(node_module, "_FIRST_RETRY", 0.0)
    monkeypatch.setattr(node_module, "node_key", lambda _: None)

    def run(script: list[Step], take_roster: Callable[[], None] = lambda: None) -> FakeFleet:
        (site_kit.folder / "state").mkdir(mode=0o700, exist_ok=True)
        stop = threading.Event()
        fleet = FakeFleet(script, stop)
        monkeypatch.setattr(node_module, "Fleet", lambda *_: fleet)
        monkeypatch.setattr(Node, "_take_roster", lambda _: take_roster())
        monkeypatch.setattr(Node, "_called", lambda _, message, __: message)
        Node(site_kit.kit, object(), stop).serve()  # type: ignore[arg-type]
        return fleet

    return run


def message() -> Message:
    made = Message(RecordDict({"facts": ConfigRecord({"run-id": "a"})}), 5, READY)
    set_message_id(made, "abc")
    return made


def raising(error: Exception) -> Step:
    def step() -> Message | None:
        raise error

    return step


def test_garbage_ends_a_session_and_not_the_process(serve: Callable[..., FakeFleet]) -> None:
    garbage = [ValueError("Invalid protobuf"), KeyError("Message"), TypeError("no bytes")]
    fleet = serve([*map(raising, garbage), message])
    assert fleet.sessions == 1 + len(garbage)
    assert len(fleet.replies) == 1


def test_a_roster_that_is_refused_keeps_its_run_out(serve: Callable[..., FakeFleet]) -> None:
    """Not for the first message only."""
    answers: list[Exception | None] = [None, *[ConfigError("roster: is older")] * 3]

    def take_roster() -> None:
        if (error := answers.pop(0)) is not None:
            raise error

    fleet = serve([message] * 3, take_roster)
    assert [reply.has_error() for reply in fleet.replies] == [True] * 3
