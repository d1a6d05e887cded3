"""The HTML report of a run, of one that failed or was cut off too."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .show import Json


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="An .html file; report.html in RUN by default."),
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Write a run's report: one HTML file, without scripts, that needs no network."""
    from ..run import Run

    written = Run(run).report(out)
    if as_json:
        typer.echo(json.dumps({"file": str(written)}))
    else:
        typer.echo(f"{written}: written")
