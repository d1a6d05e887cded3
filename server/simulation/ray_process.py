"""The process that runs a Ray simulation: it loads all that is slow, then waits to be told."""

import ctypes
import os
import signal
import sys
from importlib import import_module

from ...flower.simulation import acquire_task, simulate_task

_PR_SET_PDEATHSIG = 1  # prctl(2)


def main() -> None:
    """Reads the SuperLink's address and key from stdin, takes the task there, and runs it."""
    end_with_parent()
    for slow in ("flwr.simulation.app", "ray", "torch", "opacus"):  # while the SuperLink starts
        import_module(slow)
    address, key = sys.stdin.readline().split()
    simulate_task(address, acquire_task(address, key))


def end_with_parent() -> None:
    """Has the kernel kill this process when its parent's thread ends, by SIGKILL too.

    A server that went on by itself would write into a run folder that another one may hold by then.
    """
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended meanwhile
        os._exit(1)


if __name__ == "__main__":
    main()
