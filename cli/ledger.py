"""What a site's data sets have spent: show, verify, end."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .show import Json

app = typer.Typer(help="What a site's data sets have spent.", no_args_is_help=True)

LedgerPath = Annotated[
    Path, typer.Argument(help="A ledger, a folder of ledgers, or the folder of a simulated run.")
]


@app.command()
def show(path: LedgerPath, *, as_json: Json = False) -> None:
    """What each account has spent of what it may spend."""
    from ..ledgers import describe, find

    found = [describe(file) for file in find(path)]
    if as_json:
        typer.echo(json.dumps({"ledgers": found}))
        return
    for facts in found:
        simulated = ", SIMULATED" if facts["simulated"] else ""
        typer.echo(f"{facts['file']}: {facts['site']}{simulated}")
        typer.echo(f"  head {facts['entries']}:{facts['head']}")
        for account in facts["accounts"]:
            typer.echo(
                f"  {account['account']:32} {_spent(account['epsilon'])}, delta "
                f"{_of(account['delta'])}, by {account['composition']}; "
                f"{account['runs']} runs, {account['made']} of {account['reserved']} releases made"
            )


@app.command()
def verify(
    path: LedgerPath,
    head: Annotated[
        str | None, typer.Option(help="COUNT:HASH that is known of it elsewhere.")
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Check every entry, the heads that the run saw, and every price; a fault is an error."""
    from ..ledgers import check, find, known_heads, parse_head
    from ..privacy.limits import UnavailableError

    known, files = known_heads(path), find(path)
    if head is not None:
        known = {files[0].stem: parse_head(head, files)}
    elif missing := sorted(known.keys() - {file.stem for file in files}):
        raise UnavailableError(
            f"{path}: the ledger of {missing[0]} is missing, which the run saw; put it back"
        )
    found = [check(file, known.get(file.stem)) for file in files]
    if as_json:
        typer.echo(json.dumps({"whole": True, "ledgers": found}))
        return
    for facts in found:
        held = facts["held_against"]
        seen = f"holds entry {held[0]} as known elsewhere" if held else "held against no known head"
        typer.echo(
            f"{facts['file']}: whole, {facts['entries']} entries, {len(facts['prices'])} prices "
            f"recomputed; {seen}"
        )


@app.command()
def end(
    path: Annotated[Path, typer.Argument(help="The ledger.")],
    run_id: Annotated[str, typer.Argument(help="The run that no more may come of.")],
) -> None:
    """End a run at this site; an account kept in RDP gets back what the run did not draw."""
    from ..privacy.ledger import Ledger

    opened = Ledger.open(path)
    opened.end(run_id)
    opened.close()
    typer.echo(f"{path}: run {run_id} is closed")


def _spent(pair: list[float | None]) -> str:
    return "NOT PRIVATE" if pair[0] is None else f"epsilon {_of(pair)}"


def _of(pair: list[float | None]) -> str:
    spent, limit = (("-" if value is None else f"{value:.6g}") for value in pair)
    return f"{spent} of {limit}"
