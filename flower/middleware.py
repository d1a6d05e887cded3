"""Flower's HTTP middleware, called directly where an answer is one whole message.

Starlette runs each of a SuperLink's nine layers in a task of its own and passes every answer
through it as a stream, which is most of what a short request costs. Here each layer's own code
still runs, in the same order, on the same request; only the streams between them are gone.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import HTTPException
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2 import PushMessagesRequest
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

_PUSH = "/v1/fleet/push-messages"
WHOLE = frozenset(
    f"/v1/{api}/{call}"
    for api in ("fleet", "runtime")
    for call in (
        "pull-messages",
        "push-messages",
        "pull-object",
        "push-object",
        "confirm-message-received",
    )
)
"""The requests of a round, whose answers are no streams. All others go Flower's own way."""


def called_directly(app: Any) -> Any:  # noqa: ANN401
    """A FastAPI app that has not begun, each of its layers called directly for `WHOLE`."""
    app.user_middleware = [_directly(layer) for layer in app.user_middleware]
    return app


def _directly(layer: Middleware) -> Middleware:
    made = layer.cls
    if not (isinstance(made, type) and issubclass(made, BaseHTTPMiddleware)):
        return layer

    def build(app: Asgi) -> "Direct":
        return Direct(app, made(app, *layer.args, **layer.kwargs))  # type: ignore[arg-type]

    return Middleware(build)


class OwnRepliesMiddleware(BaseHTTPMiddleware):
    """Lets a site push replies of its own to the server, and nothing else.

    Flower asks that a request is signed by the node that it names, and not that the messages in it
    are from that node: one site could reply for another one, or send it messages as the server.
    """

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        """See Starlette's `BaseHTTPMiddleware`."""
        asked = getattr(request.state, "protobuf_request", None)
        if request.url.path == _PUSH and not is_own(asked):
            raise HTTPException(status_code=403, detail="push-messages: not a reply of its own")
        return await call_next(request)


def is_own(asked: Any) -> bool:  # noqa: ANN401
    """Whether a request to push messages has replies only, of the node that it is from."""
    return isinstance(asked, PushMessagesRequest) and all(
        message.metadata.src_node_id == asked.node.node_id
        and message.metadata.dst_node_id == SUPERLINK_NODE_ID
        and message.metadata.reply_to_message_id
        for message in asked.messages_list
    )


class Direct:
    """One layer around an app."""

    def __init__(self, app: Asgi, layer: BaseHTTPMiddleware) -> None:
        """Of the app that stands behind the layer, and the layer around the same app."""
        self._app, self._layer = app, layer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http" or scope["path"] not in WHOLE:
            await self._layer(scope, receive, send)
            return
        request = Request(scope, receive)

        async def behind(asked: Request) -> Response:
            return await _answer(self._app, asked, receive)

        response = await self._layer.dispatch_func(request, behind)
        await response(scope, receive, send)


async def _answer(app: Asgi, request: Request, receive: Receive) -> Response:
    """What an app answers, as a whole."""
    response, body = Response(), list[bytes]()

    async def keep(message: Scope) -> None:
        if message["type"] == "http.response.start":
            response.status_code = message["status"]
            response.raw_headers = list(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            body.append(message.get("body", b""))

    await app(request.scope, _reread(request, receive), keep)
    response.body = body[0] if len(body) == 1 else b"".join(body)
    return response


def _reread(request: Request, receive: Receive) -> Receive:
    """A request's messages; its body once more, if a layer has read it."""
    if (body := getattr(request, "_body", None)) is None:
        return receive
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Scope:
        return left.pop() if left else await receive()

    return again
