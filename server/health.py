"""gRPC's own health service on the control plane's port; it speaks for the fleet's port too."""

import ssl
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..deployment.control import FLEET_SERVICE, SERVICE
from ..deployment.kit import Kit

if TYPE_CHECKING:
    from grpc_health.v1.health import HealthServicer

_SECONDS = 5.0


def health_service(refuse_stranger: Callable[[Any], None]) -> "HealthServicer":
    """The service, for those only whom `refuse_stranger` lets pass: it ends others' calls."""
    from grpc_health.v1 import health, health_pb2

    class Health(health.HealthServicer):  # type: ignore[misc]
        def Check(self, request: Any, context: Any) -> Any:  # noqa: ANN401, N802
            refuse_stranger(context)
            return super().Check(request, context)

        def Watch(  # noqa: N802
            self,
            request: Any,  # noqa: ANN401
            context: Any,  # noqa: ANN401
            send_response_callback: Any = None,  # noqa: ANN401
        ) -> Any:  # noqa: ANN401
            refuse_stranger(context)
            return super().Watch(request, context, send_response_callback)

    made = Health()
    made.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    made.set(FLEET_SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
    return made


def follow_fleet(kit: Kit, health: "HealthServicer", stopping: threading.Event) -> None:
    """Says whether sites reach the server, by asking the SuperLink itself, until told to stop."""
    import httpx
    from grpc_health.v1.health_pb2 import HealthCheckResponse

    address = f"https://127.0.0.1:{kit.about.fleet_port}/health"
    context = ssl.create_default_context(cafile=str(kit.ca))
    # No proxy of the environment's stands between the two.
    with httpx.Client(verify=context, timeout=3.0, trust_env=False) as client:
        while True:
            try:
                well = client.get(address).is_success
            except httpx.HTTPError:
                well = False
            state = HealthCheckResponse.SERVING if well else HealthCheckResponse.NOT_SERVING
            health.set(FLEET_SERVICE, state)
            if stopping.wait(_SECONDS):
                return
