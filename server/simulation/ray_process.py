"""The process that runs a Ray simulation: it loads all that is slow, then waits to be told."""

import sys
from importlib import import_module

from ...deployment.processes import end_with_parent
from ...flower.simulation import acquire_task, simulate_task


def main() -> None:
    """Reads the SuperLink's address and key from stdin, takes the task there, and runs it."""
    end_with_parent()
    for slow in ("flwr.simulation.app", "ray", "torch", "opacus"):  # while the SuperLink starts
        import_module(slow)
    address, key = sys.stdin.readline().split()
    simulate_task(address, acquire_task(address, key))


if __name__ == "__main__":
    main()
