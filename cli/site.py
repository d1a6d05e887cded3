"""A partner site: its keys, its process, and its owner's say over runs."""

import getpass
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .show import Json

if TYPE_CHECKING:
    from ..client.approvals import Held
    from ..client.deployed import Own
    from ..deployment.kit import Kit

app = typer.Typer(
    help="A partner site: its keys, its process, and its owner's say.", no_args_is_help=True
)

KitPath = Annotated[Path, typer.Argument(metavar="KIT", help="The site's kit, a folder.")]
RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run that is held.")]


@app.command("keygen")
def make_keys(
    kit: KitPath,
    *,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="New keys in place of those that are there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make the site's keys and the request that the authority is to sign; tells its fingerprint."""
    from ..deployment.keygen import keygen, request_fingerprint

    request = keygen(kit, rotate)
    told = request_fingerprint(request)
    if as_json:
        typer.echo(json.dumps({"request": str(request), "fingerprint": told}))
        return
    typer.echo(f"{request}: send it to the federation's authority; nothing in it is secret")
    typer.echo(f"its fingerprint, which you read to them by telephone, is {told}")


@app.command("up")
def start(kit: KitPath, *, as_json: Json = False) -> None:
    """Take part, until it is told to stop; the site opens no port."""
    from ..client.up import up

    code = up(kit)
    if as_json:
        typer.echo(json.dumps({"kit": str(kit), "code": code}))
    raise typer.Exit(code)


@app.command()
def status(kit: KitPath, *, as_json: Json = False) -> None:
    """What the site does, what waits for its owner, what it has spent, whom it knows."""
    facts = _facts(_kit(kit))
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for line in _told(facts):
        typer.echo(line)


@app.command()
def check(
    kit: KitPath,
    schema: Annotated[
        Path | None, typer.Option(help="A federation's schema, to read the records by it.")
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Try all that the site needs, here and at the server; changes nothing."""
    from .site_checks import examine

    found = []
    for one in examine(kit, schema):
        found.append(one)
        if not as_json:
            typer.echo(f"{one.name:12} {'ok: ' if one.ok else 'FAILED: '}{one.said}")
    whole = all(one.ok for one in found)
    if as_json:
        typer.echo(json.dumps({"ok": whole, "checks": [asdict(one) for one in found]}))
    raise typer.Exit(0 if whole else 1)


@app.command()
def approve(
    kit: KitPath,
    run: RunId,
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a held run asks, and let it in on these terms."""
    from ..client.approvals import approve as admit
    from ..client.approvals import find
    from ..config import ConfigError

    if as_json and not yes:
        raise ConfigError("--json: nobody could be asked; read `site status`, then add --yes")
    state = _kit(kit).state
    held = find(state, run)
    if held is not None and not held.approved and not as_json:
        for line in held.words:
            typer.echo(line)
        if not yes and not _agrees("Approve it?"):
            typer.echo(f"{run}: is not approved")
            raise typer.Exit(1)
    # Of what was shown: a run that was asked for anew meanwhile is another one.
    approved = admit(state, run, _who(), None if held is None else held.terms)
    if as_json:
        typer.echo(json.dumps(_held(approved)))
        return
    typer.echo(f"{run}: approved by {approved.approved_by} at {approved.approved_at}")


@app.command()
def pause(kit: KitPath, *, as_json: Json = False) -> None:
    """Refuse everything from now on, runs that are under way included."""
    from ..client.approvals import pause as close

    close(_kit(kit).state)
    _say_paused(kit, paused=True, as_json=as_json)


@app.command()
def resume(kit: KitPath, *, as_json: Json = False) -> None:
    """Take a pause back."""
    from ..client.approvals import resume as reopen

    reopen(_kit(kit).state)
    _say_paused(kit, paused=False, as_json=as_json)


def _say_paused(kit: Path, *, paused: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"kit": str(kit), "paused": paused}))
        return
    typer.echo(f"{kit}: {'paused; everything is refused' if paused else 'takes part again'}")


def _kit(folder: Path) -> "Kit":
    from ..deployment.kit import Kit

    return Kit.read(folder, "site")


def _agrees(question: str) -> bool:
    try:
        return typer.confirm(question)
    except typer.Abort:  # nobody is there to be asked
        return False


def _who() -> str:
    """Who calls, as the system knows them."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such user in the system's list
        return f"uid {os.getuid()}"


def _facts(kit: "Kit") -> dict[str, Any]:
    from ..client.approvals import is_paused, pending
    from ..client.deployed import read_own
    from ..client.status import read_status

    own, roster = read_own(kit), kit.read_roster()
    return {
        "site": kit.name,
        "federation": kit.about.federation,
        "process": asdict(read_status(kit.state)),
        "paused": is_paused(kit.state),
        "records_failed": (kit.state / "records.failed").exists(),
        "approval": own.file.policy.approval,
        "held": [_held(one) for one in pending(kit.state)],
        "accounts": _accounts(own),
        "roster": {
            "version": roster.version,
            "members": [{"name": one.name, "role": one.role} for one in roster.members],
        },
        "certificate": {"last_day": _last_day(kit)},
    }


def _held(run: "Held") -> dict[str, Any]:
    return asdict(run)


def _accounts(own: "Own") -> list[dict[str, Any]]:
    """Each account: epsilon and delta that are spent, and what is left by the limits in force."""
    from ..ledgers import describe

    policy = own.file.policy
    limits = (policy.epsilon_lifetime, policy.delta_lifetime)
    if not own.ledger.exists() and not own.witness.exists():
        fresh = {"epsilon": 0.0, "delta": 0.0, "runs": 0}
        left = {"epsilon_left": limits[0], "delta_left": limits[1]}
        return [{"account": policy.dataset_id, **fresh, **left}]
    found = []
    for account in describe(own.ledger)["accounts"]:
        ours = account["account"].startswith(f"{policy.dataset_id}/")
        spent, delta = account["epsilon"][0], account["delta"][0]
        most = limits if ours else (account["epsilon"][1], account["delta"][1])
        found.append(
            {
                "account": account["account"],
                "epsilon": spent,
                "delta": delta,
                "runs": account["runs"],
                "epsilon_left": _left(most[0], spent),
                # A Renyi filter charges its delta once, for all runs.
                "delta_left": 0.0 if account["composition"] == "rdp" else _left(most[1], delta),
            }
        )
    return found


def _left(limit: float | None, spent: float | None) -> float | None:
    if limit is None:
        return None
    return 0.0 if spent is None else max(0.0, limit - spent)


def _last_day(kit: "Kit") -> str | None:
    from cryptography import x509

    from ..config import ConfigError

    try:
        found = x509.load_pem_x509_certificate(kit.certificate())
    except (ConfigError, ValueError):
        return None
    return f"{found.not_valid_after_utc:%Y-%m-%d}"


def _told(facts: Mapping[str, Any]) -> list[str]:
    process = facts["process"]
    doing = process["state"] + (f" since {process['since']}" if process["since"] else "")
    if process["state"] in {"connected", "working"}:
        doing += f", server {process['server']}"
    if process["state"] == "working":
        doing += f", run {process['run']}, round {process['round']}"
    lines = [f"{facts['site']} in {facts['federation']}: {doing}"]
    if process["last_error"]:
        lines.append(f"  last error: {process['last_error']}")
    if facts["paused"]:
        lines.append("  PAUSED: everything is refused until `fedveil site resume`")
    if facts["records_failed"]:
        lines.append(
            "  it took part WITHOUT its records, which made it fail; its own log says why, and "
            "`fedveil site check` tries them"
        )
    for run in facts["held"]:
        lines.append(f"  run {run['run_id']} waits for approval since {run['asked_at']}:")
        lines += [f"    {line}" for line in run["words"]]
    lines += [_account(one) for one in facts["accounts"]]
    members = [f"{one['name']} ({one['role']})" for one in facts["roster"]["members"]]
    lines.append(f"  roster version {facts['roster']['version']}: {', '.join(members)}")
    lines.append(f"  certificate: last day {facts['certificate']['last_day'] or 'not known'}")
    return lines


def _account(account: Mapping[str, Any]) -> str:
    if account["epsilon"] is None:
        return f"  {account['account']}: NOT PRIVATE, a run without noise took part"
    left = account["epsilon_left"]
    epsilon = "no limit" if left is None else f"{left:.6g} left"
    return (
        f"  {account['account']}: epsilon {account['epsilon']:.6g} spent, {epsilon}; delta "
        f"{account['delta']:.6g} spent, {account['delta_left']:.6g} left; {account['runs']} runs"
    )
