"""A site's process: what it answers, what it never says, and that nothing stops it for good."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Protocol, Self

import pytest

from fedveil.client import node as module
from fedveil.client.node import Node
from fedveil.config import ConfigError
from fedveil.deployment.control import UnreachableError as NoControlError
from fedveil.deployment.kit import Kit
from fedveil.flower import ConfigRecord, Message, RecordDict, set_identity
from fedveil.flower.fleet import RefusedError, UnreachableError, bundle_hash, note_of
from fedveil.flower.folding import fold, unfold
from fedveil.flower.superlink import deployed_bundle

OURS = bundle_hash(deployed_bundle())
RUN = 77
TOLD_BY_RECORDS = "patient 4711 has"


def message(text: str = "hello", run: int = RUN) -> Message:
    """What the server sends."""
    set_identity(run, 1)
    content = fold(RecordDict({"said": ConfigRecord({"text": text})}))
    made = Message(content, 5, "train.step", group_id="3")
    made.metadata.__dict__["_message_id"] = f"{text}-{run}"
    return made


class FakeFleet:
    """The connection, by a script: what is received in turn; an exception is raised."""

    def __init__(self, script: list[Any], stop: threading.Event) -> None:
        self.script, self.stop, self.lost = script, stop, threading.Event()
        self.sessions: list[int] = []
        self.replies: list[Message] = []
        self.bundles: dict[int, str] = {}
        self.refuses: list[Exception] = []
        self.node_id = 5
        self.forgot: list[int] = []

    def __call__(self, *_: object) -> "FakeFleet":
        return self

    @contextmanager
    def session(self, before: int) -> Iterator[int]:
        self.sessions.append(before)
        self.lost.clear()
        if self.refuses:
            raise self.refuses.pop(0)
        yield self.node_id

    def bundle(self, run_id: int) -> str:
        return self.bundles.get(run_id, OURS)

    def receive(self) -> Message | None:
        if not self.script:
            self.stop.set()
            return None
        found = self.script.pop(0)
        if isinstance(found, Exception):
            raise found
        if found == "lost":
            self.lost.set()
            return None
        assert found is None or isinstance(found, Message)
        return found

    def reply(self, reply: Message) -> None:
        self.replies.append(reply)

    def close(self) -> None:
        pass


class FakeControl:
    """The control plane; it has no newer roster."""

    def __init__(self, kit: Kit) -> None:
        self.kit = kit

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def call(self, *_: object) -> dict[str, Any]:
        return {"roster": self.kit.roster.read_text(encoding="utf-8")}


Serve = Callable[..., FakeFleet]


class HasKit(Protocol):
    """What these tests want of the fixture `site_kit`."""

    @property
    def kit(self) -> Kit: ...


@pytest.fixture
def serve(site_kit: HasKit, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Serves a kit until the script is over."""
    kit = site_kit.kit
    kit.state.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setattr(module, "read_node", lambda _: None)
    monkeypatch.setattr(module, "ControlClient", FakeControl)
    monkeypatch.setattr(module, "refresh_identities", lambda *_: None)
    monkeypatch.setattr(module, "_FIRST_RETRY", 0.001)

    def run(
        *script: object, app: Callable[[Message], RecordDict] | None = None, **options: object
    ) -> FakeFleet:
        stop = threading.Event()
        fleet = FakeFleet(list(script), stop)
        for name, value in options.items():
            setattr(fleet, name, value)

        def answer(received: Message, context: object) -> Message:
            found = app(received) if app else received.content
            return Message(found, reply_to=received)

        monkeypatch.setattr(module, "Fleet", fleet)
        monkeypatch.setattr(module, "client_app", lambda _: answer)
        site: Any = SimpleNamespace(secure=SimpleNamespace(forget=lambda: fleet.forgot.append(1)))
        Node(kit, site, stop).serve()
        return fleet

    return run


def text_of(reply: Message) -> str:
    return str(unfold(reply.content)["said"]["text"])


class TestAnswers:
    def test_each_message_once_and_in_order(self, serve: Serve) -> None:
        found = serve(message("a"), None, message("b"))
        assert [text_of(reply) for reply in found.replies] == ["a", "b"]
        assert [r.metadata.reply_to_message_id for r in found.replies] == ["a-77", "b-77"]

    def test_the_app_sees_it_unfolded(self, serve: Serve) -> None:
        seen = []

        def app(received: Message) -> RecordDict:
            seen.append(set(received.content))
            return received.content

        serve(message(), app=app)
        assert seen == [{"said"}]

    def test_an_error_says_nothing(self, serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
        def app(received: Message) -> RecordDict:
            raise ValueError(TOLD_BY_RECORDS)

        (reply,) = serve(message(), app=app).replies
        assert reply.has_error()
        assert (reply.error.code, reply.error.reason) == (2, "")
        assert TOLD_BY_RECORDS not in caplog.text  # at this level

    @pytest.mark.parametrize(
        "content",
        [
            RecordDict({"folded": ConfigRecord({"folded": b"\xff" * 9})}),
            RecordDict({"folded": ConfigRecord({"other": 1})}),
            RecordDict({"folded": ConfigRecord({"folded": 1}), "more": ConfigRecord({})}),
        ],
    )
    def test_garbage_is_answered_and_the_next_message_too(
        self, serve: Serve, content: RecordDict
    ) -> None:
        bad = message("bad")
        bad.content = content
        found = serve(bad, message("good"))
        assert [reply.has_error() for reply in found.replies] == [True, False]

    def test_a_run_with_another_bundle(
        self, serve: Serve, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is refused before the app hears of it; other runs are not."""
        seen = []

        def app(received: Message) -> RecordDict:
            seen.append(received.metadata.run_id)
            return received.content

        theirs = {78: "0" * 64}
        found = serve(message(run=78), message(), message(run=78), app=app, bundles=theirs)
        assert [reply.has_error() for reply in found.replies] == [True, False, True]
        assert seen == [RUN]
        assert "refused run 78: it was started with a bundle of its own" in caplog.text


class TestItGoesOn:
    def test_while_nobody_is_there(self, serve: Serve) -> None:
        down = UnreachableError("ConnectError: refused")
        found = serve(down, down, message("a"), down, message("b"))
        assert [text_of(reply) for reply in found.replies] == ["a", "b"]
        assert found.sessions == [0]  # a hiccup is no new session

    def test_after_a_session_that_is_not_granted(self, serve: Serve) -> None:
        refused: list[Exception] = [RefusedError("HTTP 401"), UnreachableError("x"), OSError("y")]
        found = serve(message("a"), refuses=refused)
        assert len(found.sessions) == 4
        assert [text_of(reply) for reply in found.replies] == ["a"]

    def test_after_a_session_that_is_lost(self, serve: Serve) -> None:
        found = serve(message("a"), "lost", message("b"))
        assert found.sessions == [0, 5]  # the second ends what the first left open
        assert [text_of(reply) for reply in found.replies] == ["a", "b"]

    def test_when_the_server_refuses_a_question_or_sends_garbage(self, serve: Serve) -> None:
        for error in (RefusedError("HTTP 500"), ValueError("garbage"), KeyError("x")):
            found = serve(error, message("a"))
            assert len(found.sessions) == 2
            assert [text_of(reply) for reply in found.replies] == ["a"]

    def test_when_a_reply_is_not_taken(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its run is over, or it came too late; the next one is answered."""
        real, refused = FakeFleet.reply, [RefusedError("HTTP 403")]

        def reply(fleet: FakeFleet, sent: Message) -> None:
            if refused:
                raise refused.pop()
            real(fleet, sent)

        monkeypatch.setattr(FakeFleet, "reply", reply)
        found = serve(message("a"), message("b"))
        assert [text_of(one) for one in found.replies] == ["b"]

    def test_when_a_reply_meets_nobody_it_is_sent_again(
        self, serve: Serve, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, down = FakeFleet.reply, [UnreachableError("x"), UnreachableError("x")]
        asked = []

        def reply(fleet: FakeFleet, sent: Message) -> None:
            if down:
                raise down.pop()
            real(fleet, sent)

        def app(received: Message) -> RecordDict:
            asked.append(1)
            return received.content

        monkeypatch.setattr(FakeFleet, "reply", reply)
        found = serve(message("a"), app=app)
        assert [text_of(one) for one in found.replies] == ["a"]
        assert asked == [1]  # and computed once

    def test_without_a_control_plane(
        self, serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def call(*_: object) -> dict[str, Any]:
            raise NoControlError("cannot be reached")

        monkeypatch.setattr(FakeControl, "call", call)
        assert len(serve(message("a")).replies) == 1
        assert "control plane: cannot be reached" in caplog.text

    def test_not_with_a_server_of_another_version(
        self, serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It says so and tries again, and answers nothing until that is mended."""
        wrong = [ConfigError("version 0.1.0: the server has fedveil 9.9")]
        real = FakeControl.call

        def call(*given: Any) -> dict[str, Any]:  # noqa: ANN401
            if wrong:
                raise wrong.pop()
            return real(*given)

        monkeypatch.setattr(FakeControl, "call", call)
        found = serve(message("a"))
        assert "the server has fedveil 9.9; trying again in" in caplog.text
        assert len(found.sessions) == len(found.replies) == 1


def test_a_roster_that_is_refused_keeps_its_run_out(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for the first message only."""
    real, calls = FakeControl.call, list[int]()

    def call(*given: Any) -> dict[str, Any]:  # noqa: ANN401
        calls.append(1)
        if len(calls) > 1:  # the first is the session's own
            raise ConfigError("roster: version 1 is not above 2")
        return real(*given)

    monkeypatch.setattr(FakeControl, "call", call)
    found = serve(message("a"), message("b"), message("c"))
    assert [reply.has_error() for reply in found.replies] == [True] * 3


class TestKeysOfEarlierRuns:
    def test_go_once_with_each_new_run(self, serve: Serve) -> None:
        """A run that was cancelled or failed says no END."""
        found = serve(message("a"), message("b"), message("c", run=78), message("d"))
        assert len(found.forgot) == 2

    def test_stay_where_a_process_follows_another_one_in_a_run(self, serve: Serve) -> None:
        assert len(serve(message("a")).forgot) == 1
        assert serve(message("b")).forgot == []
        assert len(serve(message("c", run=78)).forgot) == 1

    def test_not_for_a_run_that_is_refused(self, serve: Serve) -> None:
        assert serve(message(run=78), bundles={78: "0" * 64}).forgot == []


class TestAKilledProcess:
    def test_what_it_had_in_hand_is_answered_with_an_error(
        self, serve: Serve, site_kit: HasKit
    ) -> None:
        """So that the server asks again, and need not wait until the time is out."""
        left = note_of(message("half done"))
        state = site_kit.kit.state
        (state / "in-hand.json").write_text(json.dumps(left), encoding="utf-8")
        (state / "session.json").write_text('{"node": 4}', encoding="utf-8")
        found = serve(message("again"))
        assert found.sessions == [4]
        first, second = found.replies
        assert first.metadata.reply_to_message_id == "half done-77"
        assert (first.error.code, first.error.reason) == (2, "")
        assert text_of(second) == "again"
        assert not (state / "in-hand.json").exists()

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"run_id": 1}', "\0", '{"node": "x"}'])
    def test_notes_that_are_none(self, serve: Serve, site_kit: HasKit, text: str) -> None:
        for name in ("in-hand.json", "session.json"):
            (site_kit.kit.state / name).write_text(text, encoding="utf-8")
        assert [text_of(reply) for reply in serve(message("a")).replies] == ["a"]

    def test_a_message_is_noted_before_it_is_worked_on(
        self, serve: Serve, site_kit: HasKit
    ) -> None:
        noted = []

        def app(received: Message) -> RecordDict:
            path = site_kit.kit.state / "in-hand.json"
            noted.append(json.loads(path.read_text(encoding="utf-8"))["message_id"])
            return received.content

        serve(message("a"), app=app)
        assert noted == ["a-77"]
        assert not (site_kit.kit.state / "in-hand.json").exists()


def test_its_owner_can_see_what_it_does(serve: Serve, site_kit: HasKit) -> None:
    seen = []

    def app(received: Message) -> RecordDict:
        path = site_kit.kit.state / "status.json"
        said = json.loads(path.read_text(encoding="utf-8"))
        seen.append((said["state"], said["run"], said["round"]))
        return received.content

    serve(message(), app=app)
    assert seen == [("working", f"{RUN:016x}", 3)]
    path = site_kit.kit.state / "status.json"
    assert json.loads(path.read_text(encoding="utf-8"))["state"] == "stopped"
