"""Every Flower internal that is touched, so that an upgrade of Flower is this file's work.

Import Flower through this module: it first closes Flower's calls to the outside. What only the Ray
engine needs is imported on use.
"""

import os
from collections.abc import Mapping
from contextlib import closing
from queue import Queue
from typing import TYPE_CHECKING, Any

os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    RAY_USAGE_STATS_ENABLED="0",
    # A proxy would be shown what goes from one of our processes to another, keys and all.
    NO_PROXY=f"{os.environ.get('NO_PROXY', '')},127.0.0.1,localhost".lstrip(","),
    no_proxy=f"{os.environ.get('no_proxy', '')},127.0.0.1,localhost".lstrip(","),
)

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity

if TYPE_CHECKING:
    import httpx
    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

KEY_HEADER = "x-fedveil-key"
"""Carries the key of a private SuperLink; see `server/simulation/superlink.py`."""

__all__ = [
    "Array",
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Error",
    "FlowerRun",
    "Grid",
    "Message",
    "RecordDict",
    "ServerApp",
    "acquire_task",
    "empty_run",
    "set_identity",
    "set_message_id",
    "simulate_task",
    "start_simulation",
    "superlink_app",
]


def set_identity(run_id: int, node_id: int) -> None:
    """Tells Flower whose process this is; without it no `Message` can be made."""
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = run_id


def empty_run(run_id: int) -> FlowerRun:
    """A run that has not come from a SuperLink."""
    return FlowerRun.create_empty(run_id)


def set_message_id(message: Message, message_id: str) -> None:
    """Gives a message the identity that a SuperLink would have given it."""
    message.metadata.__dict__["_message_id"] = message_id


def superlink_app() -> Any:  # noqa: ANN401
    """Flower's SuperLink for simulations, as an ASGI app with its state in memory.

    It starts nothing by itself: no legacy gRPC server, no process that would take tasks.
    """
    from flwr.common.constant import ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
    from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
    from flwr.superlink.main import create_app

    config = SuperLinkLifespanConfig(
        control_address="127.0.0.1:0",
        health_server_address=None,
        host="127.0.0.1",
        port=0,
        insecure=True,
        certificates=None,
        superexec_auth_secret=None,
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=False,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=True,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=FLWR_IN_MEMORY_DB_NAME,
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )
    return create_app(config, SuperLinkLifespan)


class _WithKey:
    """Adds the SuperLink's key to every request."""

    def __init__(self, key: str) -> None:
        self._key = key

    def intercept(
        self, context: "ProtobufRequestContext", call_next: "ProtobufCall"
    ) -> "httpx.Response":
        context.request.headers[KEY_HEADER] = self._key
        return call_next(context)


def start_simulation(
    address: str,
    key: str,
    apps: tuple[str, str],
    values: Mapping[str, str],
    nodes: int,
    cpus: int,
    gpus: float,
) -> None:
    """Asks a SuperLink for a simulation.

    Args:
        address: HOST:PORT of the SuperLink.
        key: Its key.
        apps: Where ServerApp and ClientApp stand, as "module:object" of installed code: the bundle
            that Flower wants holds no code.
        values: The apps' run configuration.
        nodes: How many simulated sites.
        cpus: CPU cores of a client.
        gpus: GPUs of a client, or a part of one.

    Raises:
        OSError: The SuperLink does not take it.
    """
    import httpx
    import tomli_w
    from flwr.cli.build import build_fab_from_files
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.proto.fab_pb2 import Fab
    from flwr.proto.federation_config_pb2 import SimulationConfig
    from flwr.supercore.control.control_http_client import ControlHttpClient

    server, client = apps
    app = {
        "publisher": "fedveil",
        "components": {"serverapp": server, "clientapp": client},
        "config": {**values},
    }
    project = {"name": "fedveil-run", "version": "1.0.0", "license": "Apache-2.0"}
    manifest = tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}})
    content, _ = build_fab_from_files({"pyproject.toml": manifest.encode()})
    wanted = SimulationConfig(
        num_supernodes=nodes,
        client_resources_num_cpus=cpus,
        client_resources_num_gpus=gpus,
        init_args_logging_level="ERROR",
        init_args_log_to_driver=True,
    )
    request = StartRunRequest(fab=Fab(content=content), override_federation_config=wanted)
    with closing(ControlHttpClient(f"http://{address}", interceptors=(_WithKey(key),))) as control:
        try:
            control.StartRun(request)
        except httpx.HTTPError as error:
            raise OSError(f"Flower's SuperLink does not take the run ({error})") from None


def acquire_task(address: str, key: str) -> str:
    """Takes the one task that waits at a SuperLink; its token."""
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    request = AcquireTaskRequest(supported_task_types=[TaskType.SIMULATION])
    interceptors = (version, _WithKey(key))
    with closing(RuntimeHttpClient(f"http://{address}", interceptors=interceptors)) as client:
        return client.AcquireTask(request).token


def simulate_task(address: str, token: str) -> None:
    """Runs a simulation's ServerApp, and its ClientApp over Ray; ends this process."""
    from flwr.simulation.app import run_simulation_process

    run_simulation_process(
        runtime_api_address=address,
        log_queue=Queue(),
        token=token,
        insecure=True,
        parent_pid=os.getppid(),
        runtime_dependency_install=False,
    )
