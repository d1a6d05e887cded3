"""A SuperLink of Flower's own for one simulation: on a free port of loopback, behind a key.

Flower's Control API knows no accounts: whoever reaches its port may start code. On a machine that
others use too, loopback is no protection. So every request needs the key that the process was
given, but for those that carry a task's own token.
"""

import os
import re
import signal
import socket
import sys
import threading
from contextlib import suppress

from ...flower.superlink import simulating_superlink
from ..fence import fenced, for_one_process


def main() -> None:
    """Serves until the parent is gone: reads the key from stdin, prints the port, reads a group."""
    import uvicorn

    key = sys.stdin.readline().strip()
    if re.fullmatch("[0-9a-f]{64}", key) is None:  # an empty one would open to everybody
        sys.exit("key: must be 64 hexadecimal digits")
    threading.Thread(target=_bury, daemon=True).start()
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen()  # before its port is told: who connects early waits
    app = fenced(simulating_superlink(), for_one_process(key))
    sys.stdout.write(f"{listening.getsockname()[1]}\n")
    sys.stdout.flush()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    server.run(sockets=[listening])


def _bury() -> None:
    """Kills the process group that stdin names when the parent is gone, and ends.

    The kernel kills the parent's own children; of Ray's some would look for it for minutes.
    """
    group = sys.stdin.readline().strip()
    sys.stdin.readline()  # nothing more is said: it ends with the parent, however that ends
    if group.isdigit():
        with suppress(ProcessLookupError):
            os.killpg(int(group), signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main()
