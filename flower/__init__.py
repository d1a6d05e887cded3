"""Every Flower internal that is touched, so that an upgrade of Flower is this folder's work.

Import Flower through this package: it first closes Flower's calls to the outside. What only some
need stands in modules of its own: `simulation` for the Ray engine, `link` for a deployed server,
`fleet` for a deployed site.
"""

import os

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
    "empty_run",
    "set_identity",
    "set_message_id",
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
