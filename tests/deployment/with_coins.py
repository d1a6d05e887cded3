"""`fedveil site up` and `fedveil server up` with fixed coins: what a test may do, and nobody else.

`with_coins.py up site|server KEY KIT` keeps a kit's programs running, each of which is started
through this file: `with_coins.py MODULE KEY KIT`.
"""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

from fedveil.deployment.kit import Kit
from fedveil.deployment.supervise import Program


def started_here(program: Program, key: str) -> Program:
    """A program of ours, started through this file."""
    *_, module, kit = program.command
    return replace(program, command=(sys.executable, "-P", __file__, module, key, kit))


def up(role: str, key: str, folder: Path) -> int:
    """Keeps a kit's programs running."""
    from fedveil.client import up as site
    from fedveil.server import up as server

    one, all_of = site.program, server.programs

    def program(kit: Kit) -> Program:
        return started_here(one(kit), key)

    def programs(kit: Kit) -> list[Program]:
        return [started_here(program, key) for program in all_of(kit)]

    site.program, server.programs = program, programs
    return site.up(folder) if role == "site" else server.up(folder)


def run(module: str, key: str, kit: str) -> None:
    """Runs a module, all of whose coins are of one stream."""
    from fedveil.privacy.noise import Coins

    coins = Coins(bytes.fromhex(key))
    Coins.from_system = lambda: coins  # type: ignore[method-assign]
    sys.argv = [module, kit]
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "up":
        sys.exit(up(sys.argv[2], sys.argv[3], Path(sys.argv[4])))
    run(*sys.argv[1:])
