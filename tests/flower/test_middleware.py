"""A SuperLink whose layers are called directly answers and refuses as Flower's own does."""

import asyncio
import inspect
import json
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response

from fedveil.flower import middleware
from fedveil.flower.link import keep_nodes
from fedveil.flower.middleware import (
    WHOLE,
    Asgi,
    Direct,
    OwnRepliesMiddleware,
    Receive,
    Scope,
    Send,
)
from fedveil.flower.superlink import deployed_superlink

PULL = "/v1/fleet/pull-messages"
pytestmark = pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")  # Flower's


@dataclass(frozen=True)
class Link:
    """A SuperLink in this process, and a site that it knows."""

    app: Asgi
    key: ec.EllipticCurvePrivateKey
    node: int = 0

    @property
    def question(self) -> bytes:
        return bytes(PullMessagesRequest(node=Node(node_id=self.node)).SerializeToString())

    def asked(
        self, path: str, body: bytes, headers: Mapping[str, str], *, whole: bool = True
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer."""
        sent: list[Any] = []
        parts = [body] if whole else [body[:1], body[1:]]

        async def receive() -> Any:  # noqa: ANN401
            if parts:
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts)}
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:  # noqa: ANN401
            sent.append(message)

        lines = {"host": "x", "content-type": "application/protobuf", **headers}
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "scheme": "https", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(name.lower().encode(), value.encode()) for name, value in lines.items()],
            "client": ("127.0.0.1", 1), "server": ("x", 1), "root_path": "", "state": {},
        }  # fmt: skip

        async def answered() -> None:
            await self.app(scope, receive, send)

        asyncio.run(answered())
        found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], found, b"".join(m.get("body", b"") for m in sent[1:])


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return bytes(public_key_to_bytes(key.public_key()))


def signed(key: ec.EllipticCurvePrivateKey, late: float = 0.0) -> dict[str, str]:
    stamp = (now() - timedelta(seconds=late)).isoformat()
    return {
        TIMESTAMP_HEADER: stamp,
        FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(public(key)).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: b64encode(sign_message(key, stamp.encode())).decode(),
    }


@pytest.fixture(scope="module", params=["directly", "as Flower does"])
def link(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Link:
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "directly":
            patch.setattr(middleware, "called_directly", lambda app: app)
        app = deployed_superlink(tmp_path_factory.mktemp("link") / "x.sqlite", b"s" * 32)
    key = new_key()
    node, _ = keep_nodes(app, {"east": public(key)})["east"]
    return Link(app, key, node)


class TestAnswers:
    def test_of_a_site_that_is_known(self, link: Link) -> None:
        for whole in (True, False):
            status, headers, body = link.asked(PULL, link.question, signed(link.key), whole=whole)
            assert (status, body) == (200, b"")
            assert headers["content-type"] == "application/protobuf"
            assert headers["content-length"] == "0"

    def test_of_a_site_that_nobody_knows(self, link: Link) -> None:
        stranger = signed(new_key())
        assert link.asked(PULL, link.question, stranger)[0] == 401

    def test_of_nobody_in_particular(self, link: Link) -> None:
        for path in sorted(WHOLE):
            assert link.asked(path, link.question, {})[0] == 401, path

    def test_of_one_who_signed_long_ago(self, link: Link) -> None:
        assert link.asked(PULL, link.question, signed(link.key, late=3600))[0] == 401

    def test_of_one_who_names_another(self, link: Link) -> None:
        body = PullMessagesRequest(node=Node(node_id=link.node + 1)).SerializeToString()
        assert link.asked(PULL, body, signed(link.key))[0] == 401

    def test_of_a_question_that_is_none(self, link: Link) -> None:
        status, headers, body = link.asked(PULL, b"\xff\xff", signed(link.key))
        assert (status, headers["content-type"]) == (400, "application/json")
        assert set(json.loads(body)) >= {"code"}

    def test_of_a_question_of_another_kind(self, link: Link) -> None:
        headers = signed(link.key) | {"content-type": "text/plain"}
        assert link.asked(PULL, link.question, headers)[0] == 415

    def test_of_what_flower_does_not_foresee(self, link: Link) -> None:
        asked = PullObjectRequest(node=Node(node_id=link.node), run_id=1, object_id="0" * 64)
        path, body = "/v1/fleet/pull-object", asked.SerializeToString()
        status, headers, _ = link.asked(path, body, signed(link.key))  # a run that is none
        assert (status, headers["content-type"]) == (500, "application/json")


SERVER = 1
ANOTHER = 4711


def pushed(link: Link, **changes: Any) -> int:  # noqa: ANN401
    """What a site is answered that pushes a reply of its own, with something else in it."""
    about: dict[str, Any] = {
        "run_id": 1, "message_id": "a" * 64, "src_node_id": link.node, "dst_node_id": SERVER,
        "reply_to_message_id": "b" * 64, "created_at": 1.0, "ttl": 60.0,
        "message_type": "train.step",
    }  # fmt: skip
    good = Message(metadata=Metadata(**about))
    changed = Message(metadata=Metadata(**(about | changes)))
    asked = PushMessagesRequest(
        node=Node(node_id=link.node), messages_list=[good, changed], message_object_trees=[]
    )
    body = asked.SerializeToString()
    return link.asked("/v1/fleet/push-messages", body, signed(link.key))[0]


class TestOwnReplies:
    def test_go_on_to_flower(self, link: Link) -> None:
        assert pushed(link) not in {401, 403}  # which then finds no such run

    @pytest.mark.parametrize(
        "change",
        [
            {"src_node_id": ANOTHER},  # a reply for another site
            {"src_node_id": SERVER, "dst_node_id": ANOTHER},  # the server's, to another site
            {"dst_node_id": ANOTHER},
            {"reply_to_message_id": ""},  # none at all
        ],
    )
    def test_and_nothing_else(self, link: Link, change: dict[str, Any]) -> None:
        """One is enough: none of the request is taken."""
        assert pushed(link, **change) == 403


def test_a_layer_and_what_is_behind_it_read_the_same() -> None:
    class Reader(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            request.state.read = await request.body()
            return await call_next(request)

    async def twice(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        await Response(request.state.read + await request.body())(scope, receive, send)

    link = Link(Direct(twice, Reader(twice)), new_key())
    assert link.asked(PULL, b"letter", {})[2] == b"letterletter"


def test_every_layer_is_still_there(tmp_path: Path) -> None:
    from flwr.superlink.main import _get_middleware

    app = deployed_superlink(tmp_path / "x.sqlite", b"s" * 32)
    assert len(app.user_middleware) == len(_get_middleware()) + 1
    stack, layers = app.build_middleware_stack(), list[Any]()
    while (stack := getattr(stack, "app", None) or getattr(stack, "_app", None)) is not None:
        if isinstance(stack, Direct):
            layers.append(type(stack._layer))
    assert OwnRepliesMiddleware in layers
    layers.remove(OwnRepliesMiddleware)
    assert layers == [layer.cls for layer in _get_middleware()]


def test_what_a_superlink_is_told_otherwise_is_still_asked_of_there(tmp_path: Path) -> None:
    """Names in Flower's modules; should one go, the setting would be lost without a word."""
    from flwr.supercore import sql_mixin
    from flwr.supercore.corestate import sql_corestate

    assert "OBJECT_PUSH_SESSION_TTL_SECONDS" in inspect.getsource(sql_corestate.SqlCoreState)
    assert "SQLITE_PRAGMAS" in inspect.getsource(sql_mixin)
    deployed_superlink(tmp_path / "x.sqlite", b"s" * 32)
    assert vars(sql_corestate)["OBJECT_PUSH_SESSION_TTL_SECONDS"] == 60
    assert ("busy_timeout", "20000") in vars(sql_mixin)["SQLITE_PRAGMAS"]
