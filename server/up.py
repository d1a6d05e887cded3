"""`fedveil server up`: keeps the server's three programs running."""

import errno
import logging
import socket
import sys
from pathlib import Path

from ..config import ConfigError
from ..deployment.kit import Kit, KitFile, open_kit
from ..deployment.running import held, keep_running
from ..deployment.supervise import Program

_PROGRAMS = ("superlink", "executor", "control")


def up(kit_folder: Path, *, level: int = logging.INFO) -> int:
    """Keeps the server's programs running until it is told to stop.

    Args:
        kit_folder: The server's kit.
        level: The least that is logged.

    Returns:
        0 if it was told to stop, 2 if a program finds its kit unusable.

    Raises:
        ConfigError: It is no server's kit, it is up already, or a port is taken.
    """
    kit = open_kit(kit_folder, "server")
    with held(kit):
        check_ports(kit.about)
        return keep_running(kit, programs(kit), level)


def programs(kit: Kit) -> list[Program]:
    """The server's programs, in the order in which they are started."""
    # -P: what lies where it is started must not stand in for an installed package.
    return [
        Program(name, (sys.executable, "-P", "-m", f"{__package__}.{name}", str(kit.folder)))
        for name in _PROGRAMS
    ]


def check_ports(about: KitFile) -> None:
    """Refuses ports that nobody could listen at; the programs would find it out one by one.

    Raises:
        ConfigError: One of them.
    """
    if about.fleet_port == about.control_port:
        raise ConfigError(
            f"server.control_port = {about.control_port}: is the fleet_port, too; change one of "
            "them in kit.toml"
        )
    _check_port("fleet_port", about.fleet_port)
    _check_port("control_port", about.control_port)


def _check_port(name: str, port: int) -> None:
    with socket.socket() as tried:
        # As servers do it: a connection that has just ended does not count.
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError as error:
            why = (
                "is taken by another process; stop it, or change the port in kit.toml"
                if error.errno == errno.EADDRINUSE
                else f"cannot be used ({error.strerror}); change the port in kit.toml"
            )
            raise ConfigError(f"server.{name} = {port}: {why}") from None
