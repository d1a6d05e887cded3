"""A deployed SuperLink, as the server's own processes use it: its nodes, and a run's grid."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app.message.message import make_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, ErrorCode, SubStatus
from flwr.common.serde import message_from_proto, run_from_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from . import Error, Message
from .fleet import UnreachableError, called, whole
from .superlink import WithKey, deployed_bundle

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_NOT_WHOLE = ErrorCode.MESSAGE_UNAVAILABLE
_BEAT = 10.0  # seconds between a task's signs of life; Flower waits for three times as long


@dataclass(frozen=True)
class Address:
    """Where a SuperLink is, and how its own server's processes prove themselves.

    Attributes:
        at: HOST:PORT.
        ca: The certificate that must have issued its own, PEM.
        secret: 32 bytes that only the server's processes know.
    """

    at: str
    ca: bytes
    secret: bytes


def node_key(openssh: str) -> bytes:
    """A site's public key as a SuperLink keeps it (PEM), from its OpenSSH form.

    Raises:
        ValueError: It is none.
    """
    found: bytes = public_key_to_bytes(load_ssh_public_key(openssh.encode("ascii")))  # type: ignore[arg-type]
    return found


def keep_nodes(app: Any, keys: Mapping[str, bytes]) -> dict[str, tuple[int, bool]]:  # noqa: ANN401
    """Makes a SuperLink know these sites, and no others.

    Args:
        app: Of `deployed_superlink`, in this process.
        keys: Public keys (PEM) by the site's name.

    Returns:
        Node and whether it is connected, by the site's name; none of a key that was known before
        and taken off: a SuperLink has each key once.
    """
    state = app.state.linkstate_factory.state()
    known = _known(state)
    for public in known.keys() - set(keys.values()):
        state.delete_node(NOOP_FLWR_AID, known[public].node_id)
    for name, public in keys.items():
        if public not in known:
            with suppress(ValueError):
                state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, public, 0, name=name)
    nodes = _known(state)
    return {
        name: (int(nodes[public].node_id), nodes[public].status == NodeStatus.ONLINE)
        for name, public in keys.items()
        if public in nodes
    }


def _known(state: Any) -> dict[bytes, Any]:  # noqa: ANN401
    return {
        node.public_key: node
        for node in state.get_node_info(owner_aids=[NOOP_FLWR_AID])
        if node.status != NodeStatus.UNREGISTERED
    }


@contextmanager
def run_at(address: Address, told: Callable[[str], None]) -> Iterator["RunGrid"]:
    """A new run at a SuperLink, for as long as the block runs.

    Args:
        address: Of the SuperLink.
        told: Is told, in a line, of what is refused.

    Yields:
        The grid that reaches the sites.

    Raises:
        UnreachableError: The SuperLink is not there.
        RefusedError: It does not take the run.
    """
    run_id = _started(address)
    grid = RunGrid(address, _task_of(address, run_id, told))
    done = SubStatus.FAILED
    try:
        grid.begin()
        yield grid
        done = SubStatus.COMPLETED
    finally:
        grid.end(done)


def _started(address: Address) -> int:
    key = WithKey(address.secret.hex())
    with closing(
        ControlHttpClient.from_server_address(
            address.at, insecure=False, root_certificates=address.ca, interceptors=(key,)
        )
    ) as control:
        asked = StartRunRequest(fab=Fab(content=deployed_bundle()))
        return int(called(control.StartRun, asked).run_id)


def _task_of(address: Address, run_id: int, told: Callable[[str], None]) -> str:
    """The token of a run's task; tasks of others, such as of a killed process, are refused."""
    proves = SuperExecAuthHttpInterceptor(
        master_secret=address.secret, protected_methods={_ACQUIRE}
    )
    version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    asked = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
    with closing(_runtime(address, version, proves)) as client:
        while True:
            found = called(client.AcquireTask, asked)
            if not found.token:
                raise UnreachableError(f"run {run_id}: its task is not there")
            if found.task.run_id == run_id:
                return str(found.token)
            told(f"run {found.task.run_id} at the SuperLink: was not begun here, refused")
            with closing(_of_task(address, found.token)) as other:
                called(other.PullTaskInput, PullTaskInputRequest())
                refused = PushTaskOutputRequest(sub_status=SubStatus.FAILED, details="refused")
                called(other.PushTaskOutput, refused)


def _runtime(address: Address, *interceptors: Any) -> RuntimeHttpClient:  # noqa: ANN401
    return RuntimeHttpClient.from_server_address(
        address.at, insecure=False, root_certificates=address.ca, interceptors=interceptors
    )


def _of_task(address: Address, token: str) -> RuntimeHttpClient:
    version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
    return _runtime(address, version, RuntimeTokenHttpInterceptor(token))


def patient(seconds: float) -> RetryInvoker:
    """Tries again while nobody is there: a SuperLink that is restarted is back in a moment."""
    return RetryInvoker(
        wait_gen_factory=lambda: exponential(base_delay=0.2, max_delay=5),
        recoverable_exceptions=httpx.TransportError,
        max_tries=None,
        max_time=seconds,
    )


class RunGrid(HttpGrid):
    """Flower's grid of one run, with signs of life, and patience for a restarted SuperLink."""

    def __init__(self, address: Address, token: str) -> None:
        """Of a task's token; nothing is asked yet."""
        super().__init__(address.at, root_certificates=address.ca, token=token)
        self._retry_invoker = patient(60)  # Flower's would end the process on a refusal
        self._stop, self._beating = threading.Event(), threading.Thread(target=self._beat)
        self.lost = threading.Event()
        """Set once the SuperLink no longer counts the run as running."""

    def begin(self) -> None:
        """Takes the run up."""
        found = called(self._runtime_client.PullTaskInput, PullTaskInputRequest())
        TaskIdentity.task_id = found.task_id
        TaskIdentity.run_id = found.run.run_id
        TaskIdentity.node_id = found.context.node_id
        self.set_run(run_from_proto(found.run))
        self._beating.start()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid`: Flower's own waits a second for what is still on its way."""
        client, run_id = self._runtime_client, self.run.run_id
        found = client.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
        pull = make_pull_object_fn_protobuf(client.PullObject, self.node, run_id)
        confirm = make_confirm_message_received_fn_protobuf(
            client.ConfirmMessageReceived, self.node, run_id
        )
        pulled = []
        for about, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            try:
                message = whole(tree, pull, confirm)
            except ObjectPullError:  # the site has begun to send it, and no more
                empty = message_from_proto(about).metadata
                message = make_message(empty, error=Error(_NOT_WHOLE, ""))
            message.metadata.__dict__["_message_id"] = tree.object_id
            pulled.append(message)
        return pulled

    def end(self, status: str) -> None:
        """Tells the SuperLink that the run is over, if it is there."""
        self._stop.set()
        self._retry_invoker.max_time = 5
        with suppress(OSError):
            over = PushTaskOutputRequest(sub_status=status, details="")
            called(self._runtime_client.PushTaskOutput, over)
        if self._beating.is_alive():
            self._beating.join()
        self.close()

    def _beat(self) -> None:
        while not self._stop.wait(_BEAT):
            try:
                beat = SendTaskHeartbeatRequest()
                alive = called(self._runtime_client.SendTaskHeartbeat, beat).success
            except UnreachableError:
                continue
            except OSError:
                alive = False
            if not alive:
                self.lost.set()
                return
