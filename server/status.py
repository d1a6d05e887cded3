"""`fedveil server status`: what the server's programs noted, and whether its ports answer."""

import json
import socket
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..config import ConfigError
from ..deployment.kit import Kit
from ..deployment.running import holder

_PATIENCE = 5.0  # seconds for a port of this machine


def status(kit_folder: Path) -> dict[str, Any]:
    """How the server of a kit is.

    Returns:
        `federation`, `name`, `well`; `pid` of the supervisor or `None`; `ports`, each with `port`,
        `answers`, and `until` or `cause`; `state`, the JSON files that its programs keep, by name.

    Raises:
        ConfigError: It is no server's kit, or its `ca.pem` cannot be read.
    """
    kit = Kit.read(kit_folder, "server")
    trusting = _trusting(kit.ca)
    pid = holder(kit)
    ports = {
        "fleet": asked(trusting, kit.about.fleet_port),
        "control": asked(trusting, kit.about.control_port),
    }
    return {
        "federation": kit.about.federation,
        "name": kit.name,
        "well": pid is not None and all(one["answers"] for one in ports.values()),
        "pid": pid,
        "ports": ports,
        "state": {file.stem: _content(file) for file in sorted(kit.state.glob("*.json"))},
    }


def asked(trusting: ssl.SSLContext, port: int) -> dict[str, Any]:
    """Whether a port of this machine answers with a certificate of the federation."""
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE) as reached,
            trusting.wrap_socket(reached, server_hostname="127.0.0.1") as answering,
        ):
            certificate = answering.getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        cause = f"its certificate does not hold ({error.verify_message})"
        return {"port": port, "answers": False, "cause": cause}
    except OSError as error:
        cause = error.strerror or "does not answer in time"
        return {"port": port, "answers": False, "cause": cause}
    ends = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    return {"port": port, "answers": True, "until": f"{datetime.fromtimestamp(ends, UTC):%Y-%m-%d}"}


def _trusting(authority: Path) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(authority))
    except OSError as error:
        why = error.strerror or "is no certificate"
        raise ConfigError(f"{authority}: cannot be read ({why}); put the kit's back") from None
    # With 1.3 a client that has no certificate sees the server's before it is turned away.
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def _content(path: Path) -> Any:  # noqa: ANN401
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
