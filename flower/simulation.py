"""What the Ray engine touches of Flower: a SuperLink for one simulation, and its one task."""

import os
from collections.abc import Mapping
from contextlib import closing
from queue import Queue

from .superlink import WithKey, bundle


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
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.proto.fab_pb2 import Fab
    from flwr.proto.federation_config_pb2 import SimulationConfig
    from flwr.supercore.control.control_http_client import ControlHttpClient

    content = bundle(apps, values)
    wanted = SimulationConfig(
        num_supernodes=nodes,
        client_resources_num_cpus=cpus,
        client_resources_num_gpus=gpus,
        init_args_logging_level="ERROR",
        init_args_log_to_driver=True,
    )
    request = StartRunRequest(fab=Fab(content=content), override_federation_config=wanted)
    with closing(ControlHttpClient(f"http://{address}", interceptors=(WithKey(key),))) as control:
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
    interceptors = (version, WithKey(key))
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
