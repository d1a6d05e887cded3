"""What an auditor asks of a finished run."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .show import Json

if TYPE_CHECKING:
    from ..privacy.secagg.transcript import Verdict

app = typer.Typer(help="Verify what a run leaves to show.", no_args_is_help=True)


@app.callback()
def audit() -> None:
    """Verify what a run leaves to show."""


@app.command()
def transcript(
    path: Annotated[Path, typer.Argument(help="The transcript of a run's secure sums.")],
    identities: Annotated[
        Path,
        typer.Option(help="TOML with a section [identities]: the sites' public keys by name."),
    ],
    *,
    as_json: Json = False,
) -> None:
    """Check, offline, what the sites signed in each secure sum; a fault is an error."""
    from ..config import ConfigError
    from ..privacy.secagg.errors import SecAggError
    from ..privacy.secagg.pins import read_identities
    from ..privacy.secagg.transcript import verify_transcript

    pinned = read_identities(identities)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    try:
        facts = _facts(verify_transcript(data, pinned))
    except SecAggError as error:
        raise type(error)(f"{path}: {error}") from None
    if as_json:
        typer.echo(json.dumps({"valid": True, **facts}))
        return
    typer.echo(f"{path}: every signature holds; run {facts['run']}")
    for epoch in facts["epochs"]:
        typer.echo(
            "  epoch {epoch}: {n} sites, threshold {t}, at least {n_min} uploaders, safe against "
            "the server with up to {t_collude} of them".format(**epoch)
        )
    for found in facts["rounds"]:
        outcome = f"sum {found['sum'][:16]}" if found["sum"] else "no sum"
        typer.echo(
            f"  epoch {found['epoch']} round {found['round']}: {len(found['uploaders'])} uploaded, "
            f"{len(found['confirmed'])} confirmed; {outcome}, says the server"
        )
    for site, (count, head) in facts["ledgers"].items():
        typer.echo(f"  {site}: its ledger has {count} entries, head {head[:16]}")


def _facts(verdict: "Verdict") -> dict[str, Any]:
    """A verdict as plain values."""
    from dataclasses import asdict

    return {
        "run": verdict.run,
        "epochs": [
            {"epoch": setup.epoch, "rounds": setup.rounds, **asdict(setup.numbers)}
            for setup in verdict.epochs
        ],
        "rounds": [
            {
                "epoch": found.epoch,
                "round": found.round,
                "model": found.model.hex(),
                "uploaders": list(found.uploaders),
                "confirmed": list(found.confirmed),
                "sum": found.released.hex() if found.released else None,
            }
            for found in verdict.rounds
        ],
        "ledgers": {
            site: [count, head.hex()] for site, (count, head) in sorted(verdict.ledgers.items())
        },
    }
