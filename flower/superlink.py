"""Flower's SuperLink, for a simulation and for a deployment, and what is sent to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx
    from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

KEY_HEADER = "x-fedveil-key"
"""Carries the key of a SuperLink of ours, whose Control API would know no accounts otherwise."""

_PRAGMAS = {
    "page_size": "16384",  # first: it is settled with the file's first page
    "wal_autocheckpoint": "8192",  # pages: not after each part of a model, of 5 MB
    "busy_timeout": "20000",  # ms; less than what whoever asks waits for
}
"""For messages of 100 MB and more; Flower's others hold beside them."""

_STALLED = 60
"""Seconds after which a message of which no further part comes counts as lost: whoever was killed
while it sent one holds the others up for so long, and a line may be as slow as 5 MB a minute."""


def simulating_superlink() -> Any:  # noqa: ANN401
    """A SuperLink for one simulation, as an ASGI app with its state in memory."""
    from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME

    return _superlink(FLWR_IN_MEMORY_DB_NAME, None, simulation=True)


def deployed_superlink(database: Path, secret: bytes) -> Any:  # noqa: ANN401
    """A SuperLink for sites that sign their requests, as an ASGI app with its state in SQLite.

    Args:
        database: Its file.
        secret: At least 32 bytes; who takes a task must know it.
    """
    from flwr.supercore import sql_mixin
    from flwr.supercore.constant import SQLITE_PRAGMAS
    from flwr.supercore.corestate import sql_corestate

    kept = [(name, value) for name, value in SQLITE_PRAGMAS if name not in _PRAGMAS]
    vars(sql_mixin)["SQLITE_PRAGMAS"] = (*_PRAGMAS.items(), *kept)
    vars(sql_corestate)["OBJECT_PUSH_SESSION_TTL_SECONDS"] = _STALLED
    return _superlink(str(database), secret, simulation=False)


def _superlink(database: str, secret: bytes | None, *, simulation: bool) -> Any:  # noqa: ANN401
    """It starts nothing by itself: no legacy gRPC server, no process that would take tasks."""
    from flwr.common.constant import ISOLATION_MODE_PROCESS, TRANSPORT_TYPE_GRPC_RERE
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
    from flwr.superlink.main import create_app
    from starlette.middleware import Middleware

    from .middleware import OwnRepliesMiddleware, called_directly

    config = SuperLinkLifespanConfig(
        control_address="127.0.0.1:0",
        health_server_address=None,
        host="127.0.0.1",
        port=0,
        insecure=simulation,
        certificates=None,
        superexec_auth_secret=secret,
        authn_plugin=load_control_authn_plugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=not simulation,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=simulation,
        ssl_ca_certfile=None,
        ssl_certfile=None,
        ssl_keyfile=None,
        database=database,
        isolation=ISOLATION_MODE_PROCESS,
        runtime_dependency_install=False,
    )
    app = create_app(config, SuperLinkLifespan)
    # Behind all that says who asks, and before what only writes that down.
    app.user_middleware.insert(-1, Middleware(OwnRepliesMiddleware))
    return called_directly(app)


class WithKey:
    """Adds a SuperLink's key to every request."""

    def __init__(self, key: str) -> None:
        """With this key."""
        self._key = key

    def intercept(
        self, context: "ProtobufRequestContext", call_next: "ProtobufCall"
    ) -> "httpx.Response":
        """See Flower's `ProtobufClientInterceptor`."""
        context.request.headers[KEY_HEADER] = self._key
        return call_next(context)


def deployed_bundle() -> bytes:
    """The bundle of every deployed run: who runs one runs what is installed."""
    return bundle(("fedveil.server.app:server_app", "fedveil.client.app:client_app"), {})


def bundle(apps: tuple[str, str], values: Mapping[str, str]) -> bytes:
    """The bundle that Flower wants for a run; it holds no code, and the same bytes each time.

    Args:
        apps: Where ServerApp and ClientApp stand, as "module:object" of installed code.
        values: The apps' run configuration.
    """
    import tomli_w
    from flwr.cli.build import build_fab_from_files

    server, client = apps
    app = {
        "publisher": "fedveil",
        "components": {"serverapp": server, "clientapp": client},
        "config": {**values},
    }
    project = {"name": "fedveil-run", "version": "1.0.0", "license": "Apache-2.0"}
    manifest = tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}})
    content: bytes = build_fab_from_files({"pyproject.toml": manifest.encode()})[0]
    return content
