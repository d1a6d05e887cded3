"""A site's connection to Flower's Fleet API: outbound HTTPS, each request signed by the site.

It does what Flower's SuperNode does, without its local Runtime API: nothing listens at the site, no
bundle is fetched, and a message goes straight to the app in the same process.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from . import Error, Message, RecordDict

ANSWER = TypeVar("ANSWER")
HEARTBEAT = 10.0
"""Seconds between signs of life, the least that Flower takes; after two of them a site is away."""

whole = partial(
    pull_and_inflate_object_from_tree,
    return_type=Message,
    initial_backoff=0.05,
    backoff_cap=0.5,
    max_tries_per_object=None,
)
"""A message with all its parts. Of those on their way, seconds between two looks, first and last;
the SuperLink says when they will not come any more."""

_LEAST_TTL = 1.0


class UnreachableError(OSError):
    """The server cannot be reached, or is not ready: it may be later."""


class RefusedError(OSError):
    """The server does not take a request, and will not take the same one later."""


class Fleet:
    """One site's session at a SuperLink. Safe across threads but for `receive` and `reply`."""

    def __init__(self, address: str, ca: bytes, key: ec.EllipticCurvePrivateKey) -> None:
        """Connects to nobody yet.

        Args:
            address: HOST:PORT.
            ca: The certificate that must have issued the server's, PEM; no other is trusted.
            key: The site's P-384 key.
        """
        self._public = public_key_to_bytes(key.public_key())
        interceptors = (
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(key, key.public_key()),
        )
        self._client = FleetHttpClient.from_server_address(
            address, insecure=False, root_certificates=ca, interceptors=interceptors
        )
        self._node: Any = None
        self._stop = threading.Event()
        self.lost = threading.Event()
        """Set once the server no longer knows the session."""

    @property
    def node_id(self) -> int:
        """What Flower calls the site; 0 without a session."""
        return int(self._node.node_id) if self._node is not None else 0

    @contextmanager
    def session(self, before: int) -> Iterator[int]:
        """The site is there for as long as the block runs.

        Args:
            before: The node of a session that a killed process has left open, or 0.

        Yields:
            The site's node.

        Raises:
            UnreachableError: The server is not there.
            RefusedError: It does not know the site's key, or knows it to be connected.
        """
        if before:  # else it would count as connected until its time is out
            with suppress(OSError):
                self._call(self._client.DeactivateNode, DeactivateNodeRequest(node_id=before))
        asked = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT)
        self._node = Node(node_id=self._call(self._client.ActivateNode, asked).node_id)
        self.lost.clear()
        self._stop.clear()
        beating = threading.Thread(target=self._beat, daemon=True)
        beating.start()
        try:
            yield self.node_id
        finally:
            self._stop.set()
            with suppress(OSError):
                gone = DeactivateNodeRequest(node_id=self.node_id)
                self._call(self._client.DeactivateNode, gone)
            beating.join()

    def close(self) -> None:
        """Lets go of the connections."""
        self._client.close()

    def bundle(self, run_id: int) -> str:
        """SHA-256 of the bundle that a run was started with; it is not fetched."""
        asked = GetRunRequest(node=self._node, run_id=run_id)
        found: str = self._call(self._client.GetRun, asked).run.fab_hash
        return found

    def receive(self) -> Message | None:
        """The oldest message that waits, whole; `None` if none does.

        Raises:
            UnreachableError: The server is not there.
            RefusedError: It does not know the session, or the run is over.
        """
        found = self._call(self._client.PullMessages, PullMessagesRequest(node=self._node))
        if not found.messages_list:
            return None
        run_id = found.messages_list[0].metadata.run_id
        tree = found.message_object_trees[0]
        pull = make_pull_object_fn_protobuf(self._called("PullObject"), self._node, run_id)
        received = self._called("ConfirmMessageReceived")
        confirm = make_confirm_message_received_fn_protobuf(received, self._node, run_id)
        try:
            message = whole(tree, pull, confirm)
        except OSError:
            raise
        except ObjectPullError as error:
            raise RefusedError(f"message: {error}") from None
        except Exception as error:  # noqa: BLE001  objects that make no message fail anyhow
            raise RefusedError(f"message: is none ({type(error).__name__})") from None
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def reply(self, message: Message) -> None:
        """Sends a reply; the same one may be sent again.

        Raises:
            UnreachableError: The server is not there.
            RefusedError: It does not take it: the run is over, or the message too old.
        """
        _keep_in_time(message)
        message.metadata.__dict__["_message_id"] = message.object_id
        with no_object_id_recompute():
            empty = remove_content_from_message(message)
            asked = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(empty)],
                message_object_trees=[get_object_tree(message)],
            )
            found = self._call(self._client.PushMessages, asked)
            run_id, session = message.metadata.run_id, found.session_id
            push = make_push_object_fn_protobuf(
                self._called("PushObject"), self._node, run_id, session
            )
            wanted = set(found.objects_to_push)
            try:
                push_objects(get_all_nested_objects(message), push, object_ids_to_push=wanted)
            except ObjectPushError as error:
                raise RefusedError(f"reply: {error}") from None

    def _beat(self) -> None:
        """Signs of life, until it is stopped or the server knows it no longer."""
        while not self._stop.wait(HEARTBEAT * 0.6):
            asked = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT)
            try:
                known = self._call(self._client.SendNodeHeartbeat, asked).success
            except UnreachableError:
                continue
            except RefusedError:
                known = False
            if not known:
                self.lost.set()
                return

    def _called(self, name: str) -> Callable[[Any], Any]:
        method = getattr(self._client, name)
        return lambda asked: self._call(method, asked)

    def _call(self, method: Callable[[Any], ANSWER], asked: Any) -> ANSWER:  # noqa: ANN401
        return called(method, asked)


def called(method: Callable[[Any], ANSWER], asked: Any) -> ANSWER:  # noqa: ANN401
    """The answer of a method over HTTP, or one of our errors with a short cause.

    Raises:
        UnreachableError: Nobody is there, or they are not ready.
        RefusedError: They refuse.
    """
    try:
        return method(asked)
    except httpx.TransportError as error:
        cause = error.__cause__ or error
        raise UnreachableError(f"{type(error).__name__}: {cause}") from None
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        if code in {502, 503, 504}:
            raise UnreachableError(f"HTTP {code}") from None
        raise RefusedError(f"HTTP {code}") from None
    except (httpx.HTTPError, ValueError) as error:  # such as of a body that cannot be read
        raise RefusedError(f"{type(error).__name__}: is no answer") from None


def _keep_in_time(reply: Message) -> None:
    """Lets the server alone say whether a reply comes too late.

    By the clock of a site that is ahead its time may be over already, and Flower would drop it
    without a word. When it is over by the server's clock stays as it was.
    """
    about = reply.metadata
    if about.ttl < _LEAST_TTL:
        ends = about.created_at + about.ttl
        about.__dict__["_created_at"] = ends - _LEAST_TTL
        about.ttl = _LEAST_TTL


def error_reply(message: Message) -> Message:
    """An error with Flower's code for an app that failed, and not a word of why."""
    return Message(Error(_APP_FAILED, ""), reply_to=message)


def note_of(message: Message) -> dict[str, Any]:
    """What it takes to answer a message after the process that had it in hand was killed."""
    about = message.metadata
    return {name: getattr(about, name) for name in _NOTED}


def noted(note: object) -> Message:
    """A message without its content, as noted before; to be answered with an error.

    Raises:
        ValueError: It is no note.
    """
    if not isinstance(note, dict) or note.keys() != set(_NOTED):
        raise ValueError("note: is none of a message")
    return make_message(Metadata(**note), content=RecordDict())


_APP_FAILED = 2
_NOTED = (
    "run_id", "message_id", "src_node_id", "dst_node_id", "reply_to_message_id", "group_id",
    "created_at", "ttl", "message_type", "src_task_id", "dst_task_id",
)  # fmt: skip


def bundle_hash(content: bytes) -> str:
    """What a SuperLink calls a bundle by."""
    return hashlib.sha256(content).hexdigest()
