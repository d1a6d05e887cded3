"""A site's process goes on, whatever the server sends."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Self

import pytest

from fedveil.client import node as module
from fedveil.client.node import Node
from fedveil.client.status import read_status
from fedveil.deployment.control import UnreachableError as NoControlError
from fedveil.flower.fleet import Fleet, RefusedError, called

Kit = Any  # `conftest.SiteKit`; test modules cannot import it


def fails(error: Exception) -> Callable[..., Any]:
    def method(*_: object, **__: object) -> Any:  # noqa: ANN401
        raise error

    return method


class FakeFleet:
    """A server whose first session ends as it is told to, and whose second ends the process."""

    lost = threading.Event()
    node_id = 7

    def __init__(self, stop: threading.Event, receive: Callable[..., Any]) -> None:
        self._stop, self._receive, self.sessions = stop, receive, 0

    def close(self) -> None:
        pass

    @contextmanager
    def session(self, before: int) -> Iterator[int]:
        del before
        self.sessions += 1
        yield 7

    def receive(self) -> Any:  # noqa: ANN401
        if self.sessions == 1:
            return self._receive()
        self._stop.set()
        return None


class FakeControl:
    """A control plane that answers this when it is asked for the roster."""

    answers: Iterator[Any]

    def __init__(self, kit: object) -> None:
        del kit

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, *_: object) -> Any:  # noqa: ANN401
        answer = next(self.answers)
        if answer is None:
            raise NoControlError("is away")
        return answer


@pytest.fixture
def served(site_kit: Kit, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Serves until the second session, and gives the status before it."""

    def serve(receive: Callable[..., Any], *rosters: Any) -> str:  # noqa: ANN401
        stop, seen = threading.Event(), list[str]()
        fleet = FakeFleet(stop, receive)
        (site_kit.folder / "state").mkdir(exist_ok=True)
        FakeControl.answers = iter([*rosters, None, None, None])
        monkeypatch.setattr(module, "Fleet", lambda *_: fleet)
        monkeypatch.setattr(module, "ControlClient", FakeControl)
        monkeypatch.setattr(module, "_FIRST_RETRY", 0.0)
        monkeypatch.setattr(module, "read_node", lambda _: None)
        node = Node(site_kit.kit, SimpleNamespace(), stop)  # type: ignore[arg-type]
        said = node._say

        def say(state: Any, **changes: Any) -> None:  # noqa: ANN401
            seen.append(changes.get("last_error", ""))
            said(state, **changes)

        monkeypatch.setattr(node, "_say", say)
        node.serve()
        assert fleet.sessions == 2
        assert read_status(site_kit.folder / "state").state == "stopped"
        return next(error for error in seen if error)

    return serve


def test_an_error_that_nobody_foresaw_ends_no_process(served: Callable[..., str]) -> None:
    # Its text could be anybody's.
    assert served(fails(KeyError("of Mrs Miller"))) == "KeyError"


@pytest.mark.parametrize("roster", [{}, {"roster": 3}, {"roster": None}, {"roster": "\ud800"}])
def test_a_roster_that_is_none(served: Callable[..., str], roster: object) -> None:
    said = served(fails(RefusedError("enough")), roster)
    assert "roster" in said


def test_an_answer_that_cannot_be_read_is_a_refusal() -> None:
    with pytest.raises(RefusedError, match="is no answer"):
        called(fails(ValueError("Invalid protobuf response payload")), None)


def test_objects_that_make_no_message(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet: Any = Fleet.__new__(Fleet)
    fleet._client = SimpleNamespace(PullObject=None, ConfirmMessageReceived=None)
    fleet._node = None
    tree = SimpleNamespace(object_id="a")
    envelope = SimpleNamespace(metadata=SimpleNamespace(run_id=1))
    found = SimpleNamespace(messages_list=[envelope], message_object_trees=[tree])
    fleet._client.PullMessages = lambda _: found
    name = "fedveil.flower.fleet.whole"
    monkeypatch.setattr(name, fails(KeyError("of Mrs Miller")))
    with pytest.raises(RefusedError, match=r"is none \(KeyError\)"):
        fleet.receive()
