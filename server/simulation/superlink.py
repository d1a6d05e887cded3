"""A SuperLink of Flower's own for one simulation: on a free port of loopback, behind a key.

Flower's Control API knows no accounts: whoever reaches its port may start code. On a machine that
others use too, loopback is no protection. So every request needs the key that the process was
given, but for those that carry a task's own token.
"""

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from hmac import compare_digest
from typing import Any

from ...flower.superlink import KEY_HEADER, simulating_superlink

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

_TASK_PATHS = "/v1/runtime/"
_ACQUIRE = "/v1/runtime/acquire-task"


def gated(app: Asgi, key: str) -> Asgi:
    """Lets requests through that carry the key, or are about a task and so carry its token."""

    async def gate(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or _may_pass(scope, key):
            await app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 403, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return gate


def _may_pass(scope: Scope, key: str) -> bool:
    path: str = scope["path"]
    if scope["type"] != "http":
        return False
    if path.startswith(_TASK_PATHS) and path != _ACQUIRE:
        return True
    given = dict(scope["headers"]).get(KEY_HEADER.encode(), b"")
    return compare_digest(given, key.encode())


def main() -> None:
    """Serves until the parent is gone: reads the key from stdin, prints the port, reads a group."""
    import uvicorn

    key = sys.stdin.readline().strip()
    if re.fullmatch("[0-9a-f]{64}", key) is None:  # an empty one would open to everybody
        sys.exit("key: must be 64 hexadecimal digits")
    threading.Thread(target=_bury, daemon=True).start()
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()  # before its port is told: who connects early waits
    app = gated(simulating_superlink(), key)
    sys.stdout.write(f"{listening.getsockname()[1]}\n")
    sys.stdout.flush()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    server.run(sockets=[listening])


def _bury() -> None:
    """Kills the process group that stdin names when the parent is gone, and ends.

    The kernel kills the parent's own children; of Ray's some would look for it for minutes.
    """
    group = sys.stdin.readline().strip()
    sys.stdin.readline()  # nothing more is said: it ends with the parent, however that ends
    if group.isdigit():
        with suppress(ProcessLookupError):
            os.killpg(int(group), signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main()
