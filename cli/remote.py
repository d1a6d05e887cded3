"""What the commands share that ask a server: the kit, watching a run, lines about runs."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import not_below
from .show import progress

if TYPE_CHECKING:
    from ..deployment.kit import Kit

KitOption = Annotated[
    Path, typer.Option("--kit", envvar="FEDVEIL_KIT", help="The kit of an operator or auditor.")
]
OperatorOption = Annotated[
    Path, typer.Option("--kit", envvar="FEDVEIL_KIT", help="The kit of an operator.")
]
RunNumber = Annotated[str, typer.Argument(metavar="RUN", help="The number of a run.")]


def follow(kit: "Kit", run_id: str, *, as_json: bool) -> None:
    """Shows a run until it ends; a run that did not finish is an error.

    Raises:
        FedveilError: It failed, was cancelled or was interrupted; or the server is gone for long.
        Exit: The user had enough (130); the run goes on.
    """
    from ..config import FedveilError

    summary: dict[str, Any] = {}
    try:
        summary = _followed(kit, run_id)
    except KeyboardInterrupt:
        at = f"{run_id} --kit {kit.folder}"
        typer.echo(
            f"run {run_id} goes on at the server: watch it with `fedveil runs watch {at}`, cancel "
            f"it with `fedveil runs cancel {at}`",
            err=True,
        )
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(summary))
    state, cause = summary.get("state"), summary.get("cause")
    if state != "finished":
        raise FedveilError(f"run {run_id}: {state}{f': {cause}' if cause else ''}")
    if not as_json:
        typer.echo(
            f"run {run_id}: finished after {summary['rounds']} rounds; get it with "
            f"`fedveil runs fetch {run_id} --kit {kit.folder} -o OUT`"
        )


def _followed(kit: "Kit", run_id: str) -> dict[str, Any]:
    """Drives the bar; how the run ended."""
    from ..deployment.watching import watch

    def told(text: str) -> None:
        typer.echo(text, err=True)

    state, waited = "", list[str]()
    with progress() as observe:
        for message in watch(kit, run_id, told):
            if "event" in message and message["event"]["event"] == "waiting":
                # Each has all that are waited for; of a run that is over it is long past.
                lines = list(_waited_for(message["event"]))
                for line in lines:
                    if state == "running" and line not in waited:
                        told(line)
                waited = lines
            elif "event" in message:
                observe(message["event"])
            elif "state" in message:
                state = message["state"]["state"]
                told(_standing(message["state"]))
            elif "end" in message:
                found: dict[str, Any] = message["end"]
                return found
    return {}


def _waited_for(event: dict[str, Any]) -> Iterator[str]:
    """Why a run has not begun: what its sites said when they were asked whether they are ready."""
    for one in event["waiting"]:
        yield f"waits for site {one['site']}: {one['reason']}"
    for one in event["refused"]:
        yield f"site {one['site']} refuses: {one['reason']}"


def _standing(summary: dict[str, Any]) -> str:
    place = f", place {summary['position']} in the queue" if summary.get("position") else ""
    return f"run {summary['run_id']}: {summary['state']}{place}"


def print_runs(runs: Sequence[dict[str, Any]], older: int) -> None:
    """A server's runs, a line each."""
    for line in _lines(runs):
        typer.echo(line)
    if older:
        typer.echo(f"and {older} older ones")


def _lines(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    row = "{:16}  {:20} {:16} {:16} {:>11} {:>11}  {}"
    yield row.format("run", "name", "submitted (UTC)", "by", "epsilon", "rounds", "state")
    for one in runs:
        yield row.format(
            one["run_id"], one["name"][:20], one["at"][:16].replace("T", " "), one["by"][:16],
            _epsilon(one), f"{one['round']} of {one['rounds']}", _state(one),
        )  # fmt: skip


def _epsilon(run: dict[str, Any]) -> str:
    if run["mechanism"] == "none":
        return "NOT PRIVATE"
    return "-" if run["epsilon"] is None else not_below(run["epsilon"])


def _state(run: dict[str, Any]) -> str:
    if run["cause"]:
        return f"{run['state']}: {run['cause']}"
    return f"{run['state']} ({run['position']})" if run.get("position") else str(run["state"])
