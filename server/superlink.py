"""The server's SuperLink: Flower's own over TLS, behind a fence, with the roster's sites in it.

`python -m fedveil.server.superlink KIT` serves until it is told to stop.
"""

import json
import logging
import socket
import ssl
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..config import ConfigError, FedveilError
from ..deployment.keys import LINK, read_hex
from ..deployment.kit import Kit, open_kit
from ..deployment.logs import configure, level_asked, scrubbed
from ..deployment.roster import Roster
from ..files import replace_file
from ..flower.link import keep_nodes, node_key
from ..flower.superlink import deployed_superlink
from ..flower.waiting import Waiting
from .fence import Scope, bounded, fenced, for_sites
from .gate import Gate

log = logging.getLogger(__name__)

NODES = "nodes.json"
"""Which sites are known and connected, in the server's state folder; kept by the SuperLink."""

LONGEST = 32 << 20
"""Bytes of a request: Flower sends arrays in parts of 5 MiB."""

_DATABASE = "superlink.sqlite"
_LOOK = 1.0  # seconds between looks at the roster and at who is connected


def main(folder: Path) -> int:
    """Serves the SuperLink of a server's kit."""
    configure("superlink", level_asked())
    try:
        kit = open_kit(folder, "server")
        listening = listen(kit.about.fleet_port)
        app, key = link(kit)
        gate = Gate(kit)
    except FedveilError as error:
        log.error("%s", error)
        return error.exit_code
    stop = threading.Event()
    watching = threading.Thread(target=watch, args=(kit, gate, app, stop), daemon=True)
    watching.start()
    serve(kit, app, key, listening)
    stop.set()
    return 0


def link(kit: Kit) -> tuple[Any, str]:
    """The SuperLink of a kit, and its key.

    Raises:
        ConfigError: The kit's state folder, its key or its roster cannot be used.
    """
    secret = read_hex(kit.keys / LINK, 32)
    try:
        kit.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{kit.state}: cannot be made ({error.strerror})") from None
    app = deployed_superlink(kit.state / _DATABASE, secret)
    keep_roster(kit.read_roster(), app)
    return app, secret.hex()


def listen(port: int) -> socket.socket:
    """Listens at a port on all addresses: sites come from outside, see `for_sites`.

    Raises:
        ConfigError: Another process has it.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("0.0.0.0", port))  # noqa: S104
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"fleet_port = {port}: cannot be listened on ({error.strerror}); stop the process that "
            "has it, or choose another port in kit.toml"
        ) from None
    return listening


def serve(kit: Kit, app: Any, key: str, listening: socket.socket) -> None:  # noqa: ANN401
    """Answers on the kit's Fleet port until a signal comes."""
    import uvicorn

    config = uvicorn.Config(
        fenced(bounded(Waiting(app), LONGEST), for_sites(key), tell_refused),
        ssl_certfile=str(kit.folder / "certificate.pem"),
        ssl_keyfile=str(kit.keys / "server.key"),
        ssl_version=ssl.PROTOCOL_TLS_SERVER,
        log_config=None,
        access_log=False,
        proxy_headers=False,  # a header must not say who is local
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(config).run(sockets=[listening])


def tell_refused(scope: Scope, status: int) -> None:
    """Logs a request that was refused."""
    client = scope.get("client") or ("?", 0)
    path = ascii(scope.get("path", ""))[1:-1][:80]
    log.warning("refused %s from %s: HTTP %d", path, client[0], status)


def watch(kit: Kit, gate: Gate, app: Any, stop: threading.Event) -> None:  # noqa: ANN401
    """Follows the roster, and notes who is connected, until it is stopped.

    A roster that is damaged, or older than what was there, changes nothing: a key that was taken
    off does not come back.
    """
    before: dict[str, Any] = {}
    told = ""
    while True:
        try:
            roster = gate.roster()
            found = keep_roster(roster, app)
            before = _noted(kit, before, found)
            lost = ", ".join(site.name for site in roster.sites if site.name not in found)
            trouble = f"{lost}: a key that was taken off before, have it rotated" if lost else ""
        except Exception as error:  # noqa: BLE001  such as of a locked database: it goes on
            trouble = scrubbed(error)
        if trouble and trouble != told:
            log.error("sites are not as the roster has them: %s", trouble)
        told = trouble
        if stop.wait(_LOOK):
            return


def keep_roster(roster: Roster, app: Any) -> dict[str, tuple[int, bool]]:  # noqa: ANN401
    """Makes a SuperLink know a roster's sites and no others.

    Returns:
        Node and whether it is connected, by the site's name; none of a key that was taken off.

    Raises:
        ValueError: A node's key is none.
    """
    return keep_nodes(app, {site.name: node_key(site.node) for site in roster.sites})


def _noted(kit: Kit, before: dict[str, Any], found: dict[str, tuple[int, bool]]) -> dict[str, Any]:
    """Writes down who is connected, where that has changed."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    nodes: dict[str, Any] = {}
    for name, (node, online) in found.items():
        known = before.get(name)
        if known is None or (known["node"], known["online"]) != (node, online):
            if known is not None or online:
                log.info("site %s is %s", name, "connected" if online else "away")
            known = {"node": node, "online": online, "since": now}
        nodes[name] = known
    if nodes != before or not (kit.state / NODES).exists():
        replace_file(kit.state / NODES, json.dumps(nodes).encode(), sync=False)
    return nodes


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
