"""Questions that wait for an answer: the app's own answer, sooner or later, and nothing else."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from fedveil.flower import waiting
from fedveil.flower.waiting import LONGEST, Asgi, Receive, Scope, Send, Waiting

ASK, SEND = "/v1/fleet/pull-messages", "/v1/runtime/push-messages"
REPLIES, REPLY = "/v1/runtime/pull-messages", "/v1/fleet/push-messages"
LONG = 30.0  # seconds that no test is to take


@dataclass
class App:
    """Answers with what was sent to it, once; with a status of its own, if it has one."""

    status: int = 200
    letters: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if scope["path"] in (SEND, REPLY):
            self.letters.append(body)
        else:
            self.bodies.append(body)
        asks = scope["path"] in (ASK, REPLIES)
        answer = self.letters.pop() if asks and self.letters else b""
        scope["state"]["seen"] = scope["state"].get("seen", 0) + 1
        assert scope["state"]["seen"] == 1  # each question is put to it afresh
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": answer})


class Call:
    """One request."""

    def __init__(self, app: Asgi, path: str, *body: bytes) -> None:
        self._app, self._path, self._body = app, path, list(body) or [b""]
        self.gone, self.sent = asyncio.Event(), list[Any]()

    async def __call__(self) -> list[Any]:
        scope = {"type": "http", "path": self._path, "state": {}}

        async def receive() -> Any:  # noqa: ANN401
            if self._body:
                body = self._body.pop(0)
                return {"type": "http.request", "body": body, "more_body": bool(self._body)}
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:  # noqa: ANN401
            self.sent.append(message)

        await self._app(scope, receive, send)
        return self.sent


async def settled(done: Callable[[], bool]) -> None:
    while not done():
        await asyncio.sleep(0)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), LONG)

    asyncio.run(bounded())


@pytest.mark.parametrize(("ask", "send"), [(ASK, SEND), (REPLIES, REPLY)])
def test_a_question_waits_for_what_is_sent(ask: str, send: str) -> None:
    async def scenario() -> None:
        inner = App()
        app = Waiting(inner, hold=10 * LONG)
        call = Call(app, ask, b"who", b" asks")
        asked = asyncio.create_task(call())
        await settled(lambda: bool(inner.bodies))
        assert not call.sent
        await Call(app, send, b"letter")()
        assert [message.get("body") for message in await asked] == [None, b"letter"]
        assert inner.bodies == [b"who asks", b"who asks"]

    run(scenario)


def test_what_another_api_sends_wakes_nobody() -> None:
    async def scenario() -> None:
        inner = App()
        app = Waiting(inner, hold=10 * LONG)
        asked = asyncio.create_task(Call(app, ASK)())
        await settled(lambda: bool(inner.bodies))
        await Call(app, REPLY, b"letter")()
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(inner.bodies) == 1
        asked.cancel()

    run(scenario)


def test_an_answer_that_is_there_does_not_wait() -> None:
    async def scenario() -> None:
        app = Waiting(App(letters=[b"letter"]), hold=10 * LONG)
        assert (await Call(app, ASK)())[1]["body"] == b"letter"

    run(scenario)


def test_the_time_comes_to_an_end() -> None:
    async def scenario() -> None:
        inner = App()
        sent = await Call(Waiting(inner, hold=0.0), ASK)()
        assert [(m.get("status"), m.get("body")) for m in sent] == [(200, None), (None, b"")]
        assert len(inner.bodies) == 1

    run(scenario)


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_refusal_does_not_wait(status: int) -> None:
    """Who may not ask holds nothing of the server's."""

    async def scenario() -> None:
        sent = await Call(Waiting(App(status), hold=10 * LONG), ASK)()
        assert sent[0]["status"] == status

    run(scenario)


def test_other_requests_pass() -> None:
    async def scenario() -> None:
        app = Waiting(App(), hold=10 * LONG)
        assert len(await Call(app, "/v1/fleet/pull-object", b"x" * (LONGEST + 1), b"y")()) == 2

    run(scenario)


def test_a_long_question_is_not_kept() -> None:
    async def scenario() -> None:
        inner = App()
        parts = b"x" * (LONGEST + 1), b"y"
        assert len(await Call(Waiting(inner, hold=10 * LONG), ASK, *parts)()) == 2
        assert inner.bodies == [b"".join(parts)]

    run(scenario)


def test_no_more_than_so_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "MOST", 1)

    async def scenario() -> None:
        inner = App()
        app = Waiting(inner, hold=10 * LONG)
        first = asyncio.create_task(Call(app, ASK)())
        await settled(lambda: bool(inner.bodies))
        assert len(await Call(app, ASK)()) == 2
        await Call(app, SEND, b"letter")()
        await first
        assert app._held == 0

    run(scenario)


def test_whoever_has_gone_is_answered_nothing() -> None:
    async def scenario() -> None:
        inner = App()
        call = Call(Waiting(inner, hold=10 * LONG), ASK)
        asked = asyncio.create_task(call())
        await settled(lambda: bool(inner.bodies))
        call.gone.set()
        assert await asked == []

    run(scenario)
