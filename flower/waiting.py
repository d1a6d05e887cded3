"""Answers of "nothing yet" that are kept back for a moment, so that nobody has to ask often.

Flower's protocol is one of questions: a site asks whether a message waits for it, a run whether
replies have come. A question costs the server some milliseconds, and many of them are most of a
short round. Here one to which there is no answer yet waits until something was sent that may be
one, and is then put to the app again, whole: each answer is the app's own, and so is each check.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

HOLD = 2.0
"""Seconds that a question waits at most; whoever asks is stopped no sooner."""
MOST = 1024
"""Questions that wait at a time; further ones are answered at once."""
LONGEST = 1 << 16
"""Bytes of a question that may wait."""

_ANSWERED_BY = {
    "/v1/fleet/pull-messages": "/v1/runtime/push-messages",
    "/v1/runtime/pull-messages": "/v1/fleet/push-messages",
}


class Waiting:
    """An app around a SuperLink's."""

    def __init__(self, app: Asgi, hold: float = HOLD) -> None:
        """Around an app; a question waits `hold` seconds at most."""
        self._app, self._hold, self._held = app, hold, 0
        self._sent = {path: asyncio.Event() for path in _ANSWERED_BY.values()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        path = scope["path"] if scope["type"] == "http" else ""
        if path in _ANSWERED_BY and self._held < MOST:
            self._held += 1
            try:
                await self._ask(_ANSWERED_BY[path], scope, receive, send)
            finally:
                self._held -= 1
            return
        await self._app(scope, receive, send)
        if path in self._sent:
            self._sent[path].set()  # wakes all that wait, and nobody after them
            self._sent[path] = asyncio.Event()

    async def _ask(self, sent: str, scope: Scope, receive: Receive, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        end, question = clock() + self._hold, await _read(receive)
        while True:
            something = self._sent[sent]  # before it is asked: what comes meanwhile is not missed
            reply = _Reply(send)
            asked = {**scope, "state": dict(scope.get("state", {}))}
            await self._app(asked, _replay(question, receive), reply.take)
            if reply.passed:
                return
            left = end - clock()
            if question[-1].get("more_body", False) or left <= 0:
                await reply.give()
                return
            if not await _until(something, receive, left):
                return


class _Reply:
    """An answer on its way; an empty one is kept back."""

    def __init__(self, send: Send) -> None:
        self._send, self._kept = send, list[Scope]()
        self.passed = False

    async def take(self, message: Scope) -> None:
        begins = message["type"] == "http.response.start"
        empty = message["status"] == 200 if begins else not message.get("body")
        if self.passed:
            await self._send(message)
            return
        self._kept.append(message)
        if not empty or message.get("more_body", False):
            await self.give()

    async def give(self) -> None:
        self.passed = True
        for message in self._kept:
            await self._send(message)


async def _read(receive: Receive) -> list[Scope]:
    """A request's messages; of a long one only the first."""
    messages, size = [await receive()], 0
    while messages[-1].get("more_body", False):
        size += len(messages[-1].get("body", b""))
        if size > LONGEST:
            break
        messages.append(await receive())
    return messages


def _replay(messages: list[Scope], receive: Receive) -> Receive:
    """These messages, and then what comes."""
    left = messages[::-1]

    async def again() -> Scope:
        return left.pop() if left else await receive()

    return again


async def _until(something: asyncio.Event, receive: Receive, seconds: float) -> bool:
    """Waits for an event, for so long; `False` if whoever asked has gone."""
    event, gone = asyncio.ensure_future(something.wait()), asyncio.ensure_future(receive())
    try:
        await asyncio.wait({event, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        return not gone.done()
    finally:
        for task in (event, gone):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
