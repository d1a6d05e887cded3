"""What an auditor asks of a finished run."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .show import Json, figure

if TYPE_CHECKING:
    from ..privacy.secagg.transcript import Verdict

PARTS = ("conformance", "transcript")

app = typer.Typer(help="Verify what a run leaves to show.", no_args_is_help=True)


@app.callback()
def audit() -> None:
    """Verify what a run leaves to show."""


@app.command()
def run(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Parts of the audit: {', '.join(PARTS)}. Default: all."),
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Audit a run: exit 1 if anything is violated."""
    from ..api import load
    from ..config import ConfigError
    from ..privacy.audit.conformance import audit_conformance
    from ..privacy.audit.transcript import audit_transcript

    if unknown := [part for part in only or [] if part not in PARTS]:
        raise ConfigError(f"--only {unknown[0]}: must be {' or '.join(PARTS)}")
    loaded = load(path)
    found: dict[str, Any] = {"run_id": loaded.metrics["run_id"]}
    if "conformance" in (only or PARTS):
        found["conformance"] = audit_conformance(loaded).as_dict()
    if "transcript" in (only or PARTS):
        found["transcript"] = audit_transcript(loaded)
    verdicts = [part.get("verdict") for part in found.values() if isinstance(part, dict)]
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _print_audit(path, found)
    raise typer.Exit(1 if "violated" in verdicts else 0)


def _print_audit(path: Path, found: dict[str, Any]) -> None:
    """What an audit found, for people."""
    if "conformance" in found:
        part = found["conformance"]
        rate = part["false_alarm_rate"]
        typer.echo(f"{path}: conformance {part['verdict']} (false alarms at most {rate:g})")
        for check in part["checks"]:
            low, high = (figure(check[end]) for end in ("low", "high"))
            typer.echo(
                f"  {'ok' if check['passed'] else 'VIOLATED':8} {check['name']:36} "
                f"{figure(check['statistic']):>12} within {low} to {high}"
            )
        if not part["ledgers"]:
            typer.echo("  no ledger here: what the sites committed was not looked at")
        for ledger in part["ledgers"]:
            typer.echo(
                f"  {'ok' if ledger['holds'] else 'VIOLATED':8} ledger of {ledger['site']}: "
                f"{ledger['made']} rounds committed, in {ledger['took_part']} of the run's, "
                f"{ledger['asked']} asked for"
            )
    if "transcript" in found:
        kept = found["transcript"]
        if kept is None:
            typer.echo(f"{path}: no transcript: this run made no secure sums")
            return
        typer.echo(f"{path}: transcript {kept['verdict']}: {kept['sums']} secure sums, each signed")
        for fault in kept["failed"]:
            typer.echo(f"  VIOLATED {fault}")


def _verified(path: Path, identities: Path) -> dict[str, Any]:
    """What a transcript shows; a fault is an error."""
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
        return _facts(verify_transcript(data, pinned))
    except SecAggError as error:
        raise type(error)(f"{path}: {error}") from None


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
    facts = _verified(path, identities)
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


@app.command()
def log(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A server's audit.jsonl.")],
    receipt: Annotated[
        str | None,
        typer.Option(help="ENTRY:HASH that submit, cancel or resume printed: must be in it."),
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Check that nothing was changed or removed in the log of a server; a fault is an error."""
    from dataclasses import asdict

    from ..server.audit_log import parse_receipt, verify

    found = verify(path, parse_receipt(receipt) if receipt is not None else None)
    if as_json:
        typer.echo(json.dumps({"whole": True, **asdict(found)}))
        return
    typer.echo(f"{path}: whole, {found.count} entries, head {found.head}")
    if found.torn:
        typer.echo(f"  {found.torn} bytes after them are of an entry that a crash cut off")


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
