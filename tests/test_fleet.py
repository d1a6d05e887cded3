"""A site's half of Flower's Fleet API: what comes back, in errors of ours, and replies in time."""

import time
from typing import Any

import httpx
import pytest

from fedveil.flower import ConfigRecord, Message, RecordDict, set_identity, set_message_id
from fedveil.flower.fleet import (
    Fleet,
    RefusedError,
    UnreachableError,
    called,
    error_reply,
)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx.ConnectError("x"), UnreachableError),
        (ValueError("Invalid protobuf response payload"), RefusedError),
        (httpx.DecodingError("x"), RefusedError),
        (httpx.TooManyRedirects("x"), RefusedError),
    ],
)
def test_what_is_no_answer_is_an_error_of_ours(error: Exception, kind: type[Exception]) -> None:
    def fails(_: object) -> None:
        raise error

    with pytest.raises(kind):
        called(fails, None)


@pytest.mark.parametrize("ahead", [0.0, 200.0])
def test_a_clock_that_is_ahead_costs_no_reply(
    monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """Flower's server drops what has no time left by its sender's clock, without a word."""
    set_identity(1, 5)
    asked = Message(RecordDict({"a": ConfigRecord({"b": 1})}), 5, "query.ready", ttl=120.0)
    set_message_id(asked, "abc")
    about = asked.metadata
    ends = about.created_at + about.ttl
    about.__dict__["_created_at"] -= ahead  # as a site sees it whose clock is ahead
    sent: list[Any] = []

    class StopError(Exception): ...

    def call(_: Fleet, method: object, request: Any) -> None:  # noqa: ANN401
        sent.append(request)
        raise StopError

    monkeypatch.setattr(Fleet, "_call", call)
    fleet = object.__new__(Fleet)
    fleet._client, fleet._node = type("Client", (), {"PushMessages": None})(), None
    with pytest.raises(StopError):
        fleet.reply(error_reply(asked))
    found = sent[0].messages_list[0].metadata
    assert found.ttl >= 1.0
    assert found.created_at + found.ttl == pytest.approx(ends - ahead)
    assert found.created_at <= time.time()
