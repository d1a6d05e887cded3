"""The federation's server: up, status."""

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from .show import Json

app = typer.Typer(help="The federation's server: run it, ask how it is.", no_args_is_help=True)

KitPath = Annotated[Path, typer.Argument(metavar="KIT", help="The server's kit.")]


@app.command()
def up(kit: KitPath) -> None:
    """Run the server until it is stopped; a program of it that ends is started again."""
    from ..server.up import up as run

    shown = logging.getLogger().isEnabledFor(logging.DEBUG)  # by --debug
    raise typer.Exit(run(kit, level=logging.DEBUG if shown else logging.INFO))


@app.command()
def status(kit: KitPath, *, as_json: Json = False) -> None:
    """How the server is; exits with 1 if it is not up, or a port does not answer."""
    from ..server.status import status as status_of

    found = status_of(kit)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _print(found)
    if not found["well"]:
        raise typer.Exit(1)


def _print(found: dict[str, Any]) -> None:
    up = "is not up" if found["pid"] is None else f"is up, pid {found['pid'] or 'unknown'}"
    typer.echo(f"{found['federation']}: server {found['name']} {up}")
    for name, one in found["ports"].items():
        answer = f"answers, certificate until {one['until']}" if one["answers"] else one["cause"]
        typer.echo(f"  {name + ' port':14} {one['port']:<6} {answer}")
    for name, about in (found["state"].get("nodes") or {}).items():
        connected = "connected" if about["online"] else "away"
        typer.echo(f"  site {name:9} {connected} since {about['since']}")
    noted = found["state"].get("up") or {}
    if found["pid"] is None and noted:
        typer.echo(f"  as it was when its supervisor ended, begun {noted['since']}:")
    for name, about in noted.get("programs", {}).items():
        told = f", {about['cause']}" if about.get("cause") else ""
        since = f" since {about['since']}" if "since" in about else ""
        typer.echo(f"  {name:14} {about['state']}{since}, started {about['starts']} times{told}")
