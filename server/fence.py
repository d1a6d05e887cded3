"""Who may reach what of Flower's SuperLink, whose own Control API knows no accounts."""

from collections.abc import Awaitable, Callable, MutableMapping
from hmac import compare_digest
from typing import Any

from ..flower.superlink import KEY_HEADER

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

FLEET, RUNTIME, HEALTH = "/v1/fleet/", "/v1/runtime/", "/health"
ACQUIRE = "/v1/runtime/acquire-task"
# One address and no network: what is bound to another one of 127.0.0.0/8 is somebody else.
_LOOPBACK = ("127.0.0.1", "::1")


def untold(scope: Scope, status: int) -> None:
    """Nobody is told."""
    del scope, status


def fenced(
    app: Asgi,
    may_pass: Callable[[Scope], bool],
    told: Callable[[Scope, int], None] = untold,
) -> Asgi:
    """Lets some requests through and answers 403 to the others.

    Args:
        app: What stands behind the fence.
        may_pass: Of a request's scope.
        told: Is told of each request that is refused, by the fence or behind it: scope and status.
    """

    async def fence(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        if not may_pass(scope):
            told(scope, 403)
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return

        async def seen(message: Scope) -> None:
            if message["type"] == "http.response.start" and 400 <= message["status"] < 500:
                told(scope, message["status"])
            await send(message)

        await app(scope, receive, seen)

    return fence


def bounded(app: Asgi, longest: int) -> Asgi:
    """Answers 413 to a request whose body is longer than this, and reads no more of it.

    Flower reads all of a body before it looks at who sent it: anybody could fill the memory.

    Args:
        app: What stands behind.
        longest: Bytes that a body may have.
    """

    async def bound(scope: Scope, receive: Receive, send: Send) -> None:
        read, answered = 0, False

        async def counted() -> Scope:
            nonlocal read, answered
            message = {"type": "http.disconnect"} if answered else await receive()
            read += len(message.get("body", b""))
            if read <= longest or answered:
                return message
            answered = True
            close = [(b"connection", b"close")]
            await send({"type": "http.response.start", "status": 413, "headers": close})
            await send({"type": "http.response.body", "body": b""})
            return {"type": "http.disconnect"}

        async def unless_answered(message: Scope) -> None:
            if not answered:
                await send(message)

        try:
            await app(scope, counted, unless_answered)
        except Exception:
            if not answered:  # else it only says that its caller has gone
                raise

    return bound


def has_key(scope: Scope, key: str) -> bool:
    """Whether a request carries a SuperLink's key."""
    given = dict(scope["headers"]).get(KEY_HEADER.encode(), b"")
    return compare_digest(given, key.encode())


def is_local(scope: Scope) -> bool:
    """Whether a request comes from this very machine, over its own loopback address."""
    client = scope.get("client")
    return client is not None and client[0] in _LOOPBACK


def for_one_process(key: str) -> Callable[[Scope], bool]:
    """Requests that carry the key, or are about a task and so carry its token."""

    def may_pass(scope: Scope) -> bool:
        path: str = scope["path"]
        if scope["type"] != "http":
            return False
        return (path.startswith(RUNTIME) and path != ACQUIRE) or has_key(scope, key)

    return may_pass


def for_sites(key: str) -> Callable[[Scope], bool]:
    """Whoever may speak to a deployed SuperLink.

    Anybody reaches the Fleet API, where Flower asks each site's signature, and the health check.
    The server's own processes reach the Runtime API over loopback, where Flower asks a token or a
    secret; and with the key, the rest.
    """

    def may_pass(scope: Scope) -> bool:
        path: str = scope["path"]
        if scope["type"] != "http":
            return False
        if path.startswith(FLEET) or path == HEALTH:
            return True
        return is_local(scope) and (path.startswith(RUNTIME) or has_key(scope, key))

    return may_pass
