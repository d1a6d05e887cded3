"""What is installed, what is missing, what would fail."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .show import Json

if TYPE_CHECKING:
    from ..doctor import Check

_COLOURS = {"ok": "green", "missing": "red", "warning": "yellow"}


def doctor(
    out: Annotated[Path, typer.Option(help="The folder where runs are to go.")] = Path("runs"),
    *,
    as_json: Json = False,
) -> None:
    """What is installed, what is missing, what would fail, and the mend of each."""
    from ..doctor import examine, whole

    checks = examine(out)
    if as_json:
        typer.echo(json.dumps({"ok": whole(checks), "checks": [asdict(c) for c in checks]}))
    elif sys.stdout.isatty():
        _print_table(checks)
    else:
        for check in checks:
            mend = f"; mend: {check.mend}" if check.mend else ""
            typer.echo(f"{check.state:8} {check.name:16} {check.found}{mend}")
    if not whole(checks):
        raise typer.Exit(1)


def _print_table(checks: "list[Check]") -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "found", "mend"):
        table.add_column(heading, overflow="fold")
    for check in checks:
        colour = _COLOURS[check.state]
        cells = map(escape, (check.name, check.found, check.mend))
        table.add_row(f"[{colour}]{check.state}[/{colour}]", *cells)
    Console().print(table)
