"""The command line: thin handlers over the Python API.

Importing it loads neither torch nor Flower; every handler imports what it needs.
"""

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from .run import Run

app = typer.Typer(
    help="Federated, differentially private training of generative models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def main() -> None:
    """The console script: an error of ours is one line on stderr and an exit code."""
    from .config import FedveilError

    # Taken out here, so that it may stand anywhere on the line.
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]

    logging.basicConfig(
        level=logging.DEBUG if debug else logging.CRITICAL, format="%(name)s: %(message)s"
    )
    try:
        app(arguments, prog_name="fedveil")
    except FedveilError as error:
        _fail(str(error), error.exit_code, debug=debug)
    except Exception as error:  # noqa: BLE001  an error that nobody foresaw is one line too
        _fail(f"{type(error).__name__}: {error}; --debug shows where", 1, debug=debug)


def _fail(text: str, exit_code: int, *, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"error: {' '.join(text.split())}", file=sys.stderr)  # noqa: T201
    sys.exit(exit_code)


@app.callback(invoke_without_command=True)
def common(
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and logs.")] = False,
) -> None:
    """Federated, differentially private training of generative models."""
    del debug  # read by main(), before the arguments are parsed
    if version:
        typer.echo(f"fedveil {__version__}")
        raise typer.Exit


@app.command()
def simulate(
    config: Annotated[Path, typer.Argument(help="The run, a TOML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option that wins over the file: section.key=value."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder, new or empty.")] = None,
    *,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, from its last round.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Simulate a federation on this machine."""
    from .config import ConfigError, load_config, parse_setting

    if resume and out is None:
        raise ConfigError("--resume: needs --out, the folder of the run that is to go on")
    parsed = dict(parse_setting(text) for text in settings or [])
    loaded = load_config(config, parsed)
    if dry_run:
        _print_plan(loaded, as_json=as_json)
        return
    from .api import default_folder
    from .api import simulate as run_simulation

    folder = out or default_folder(loaded.federation.name)
    try:
        with _progress() as observe:
            run = run_simulation(loaded, out=folder, resume=resume, observe=observe)
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted: go on with `fedveil simulate {config} --out {folder} --resume` and the "
            "same --set; until then all of the plan counts as spent",
            err=True,
        )
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps({**run.metrics, "folder": str(run.path)}))
    else:
        _print_summary(run)


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Images: .png, .npz. Tables: .csv, .parquet, .png.")
    ],
    n: Annotated[int, typer.Option("-n", help="How many records.")] = 100,
    seed: Annotated[int | None, typer.Option(help="For equal draws.")] = None,
    *,
    as_json: Json = False,
) -> None:
    """Draw synthetic records from a finished run."""
    from .api import load
    from .export import write

    loaded = load(run)
    write(loaded, n, out, seed)
    if as_json:
        typer.echo(json.dumps({"file": str(out), "n": n, **loaded.provenance()}))
    else:
        typer.echo(f"{out}: {n} synthetic records, {_promise(loaded.privacy)}")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    data: Annotated[Path, typer.Option("--data", help="Records of your own, as the run's are.")],
    *,
    as_json: Json = False,
) -> None:
    """Exact figures of a run's model for records of your own: NOT PRIVATE."""
    from .api import load
    from .data_prep.clean import DataError

    loaded = load(run)
    try:
        found = loaded.evaluate(data)
    except DataError as error:
        raise DataError(str(error).replace("data.source = ", "--data ")) from None
    if as_json:
        typer.echo(json.dumps({**found, "run_id": loaded.metrics["run_id"]}))
        return
    typer.echo(f"NOT PRIVATE: exact figures of {found['records']} records in {data}")
    for name, value in found["figures"].items():
        accounted = loaded.metrics["quality"].get(name)
        beside = f"   in the run: {_plus_minus(accounted)}" if accounted else ""
        typer.echo(f"{name:24} {value:9.4f}{beside}")


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The TOML file to write.")],
) -> None:
    """Write a commented configuration to start from."""
    from .config import ConfigError
    from .reference import template

    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(template())
    except FileExistsError:
        raise ConfigError(f"{file}: is there already; choose another name") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror})") from None
    typer.echo(f"{file}: written; run it with `fedveil simulate {file}`")


ledger = typer.Typer(help="What a site's data sets have spent.", no_args_is_help=True)
app.add_typer(ledger, name="ledger")

LedgerPath = Annotated[
    Path, typer.Argument(help="A ledger, a folder of ledgers, or the folder of a simulated run.")
]


@ledger.command()
def show(path: LedgerPath, *, as_json: Json = False) -> None:
    """What each account has spent of what it may spend."""
    from .ledgers import describe, find

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


@ledger.command()
def verify(
    path: LedgerPath,
    head: Annotated[
        str | None, typer.Option(help="COUNT:HASH that is known of it elsewhere.")
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Check every entry, the heads that the run saw, and every price; a fault is an error."""
    from .ledgers import check, find, known_heads, parse_head
    from .privacy.limits import UnavailableError

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


@ledger.command()
def end(
    path: Annotated[Path, typer.Argument(help="The ledger.")],
    run_id: Annotated[str, typer.Argument(help="The run that no more may come of.")],
) -> None:
    """End a run at this site; an account kept in RDP gets back what the run did not draw."""
    from .privacy.ledger import Ledger

    opened = Ledger.open(path)
    opened.end(run_id)
    opened.close()
    typer.echo(f"{path}: run {run_id} is closed")


def _spent(pair: list[float | None]) -> str:
    return "NOT PRIVATE" if pair[0] is None else f"epsilon {_of(pair)}"


def _of(pair: list[float | None]) -> str:
    spent, limit = (("-" if value is None else f"{value:.6g}") for value in pair)
    return f"{spent} of {limit}"


def _plus_minus(figure: dict[str, float]) -> str:
    # Noise pulls a total variation towards its floor, so that its spread alone would mislead.
    if "floor" in figure:
        return f"{figure['value']:.4f} (floor {figure['floor']:.4f})"
    return f"{figure['value']:.4f} +- {figure['noise']:.4f}"


def _print_plan(loaded: Any, *, as_json: bool) -> None:  # noqa: ANN401
    from .api import resolve
    from .privacy.plan import plan
    from .server.simulation import load_shards

    resolved, schema = resolve(loaded)
    report = load_shards(resolved, schema).report
    priced = plan(resolved)
    if as_json:
        typer.echo(json.dumps({**priced.as_dict(), "schedule": list(priced.schedule)}))
        return
    for key, value in priced.as_dict().items():
        typer.echo(f"{key:20} {_figure(value)}")
    # A simulation may look at its data; a federation's sites keep these counts to themselves.
    typer.echo(f"{'simulated data':20} {report.records} records, {report.kept} usable")


def _print_summary(run: "Run") -> None:
    privacy, metrics = run.privacy, run.metrics
    typer.echo(
        f"{metrics['rounds']} rounds, {metrics['sites']} sites, {metrics['seconds']['total']:.1f} s"
    )
    typer.echo(f"Privacy: {_promise(privacy)}")
    typer.echo(f"Protects one {privacy['unit']} against {privacy['against']}")
    for open_end in privacy["not_claimed"]:
        typer.echo(f"Not claimed: {open_end}")
    for name, figure in metrics["quality"].items():
        typer.echo(f"{name:24} {_plus_minus(figure)}")
    typer.echo(f"Run folder: {run.path}")
    typer.echo(f"What cleaning found: {run.path}/sites/*/cleaning.json")
    for file in sorted(run.path.glob("samples.*")):
        typer.echo(f"Samples: {file}")


def _promise(privacy: dict[str, Any]) -> str:
    if privacy["epsilon"] is None:
        return "NONE: THIS RUN IS NOT PRIVATE"
    return (
        f"epsilon {privacy['epsilon']:.3f} of {privacy['target_epsilon']:g}, "
        f"delta {privacy['delta']:.2g}, mechanism {privacy['mechanism']}, "
        f"accountant {privacy['accountant']}"
    )


def _figure(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, dict):
        return ", ".join(f"{key} {_figure(part)}" for key, part in value.items())
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _print_resumed(event: dict[str, Any], console: "Console") -> None:
    for fault in event["damaged"]:
        console.print(f"{fault}; went back to the checkpoint before", markup=False, soft_wrap=True)
    lost = ", ".join(map(str, event["lost"]))
    told = f"; round {lost} was cut off and counts as spent" if lost else ""
    console.print(f"resumed after round {event['round']}{told}", markup=False, soft_wrap=True)


@contextmanager
def _progress() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on stderr: round, epsilon spent of target, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[spent]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=None, start=False, spent="", visible=False)
        target, loss = None, ""

        def observe(event: dict[str, Any]) -> None:
            nonlocal target, loss
            if event["event"] in {"run", "resumed"}:
                target = event["privacy"]["target_epsilon"]
                bar.start_task(task)
                bar.update(task, total=event["privacy"]["rounds"], visible=True)
                if event["event"] == "resumed":
                    _print_resumed(event, console)
                    bar.update(task, completed=event["round"] + len(event["lost"]))
            elif event["event"] == "evaluated":
                loss = f", loss {event['loss']:.2f}"
            elif event["event"] == "round":
                spent = (
                    "NOT PRIVATE"
                    if target is None
                    else f"epsilon {event['epsilon']:.2f}/{target:g}"
                )
                bar.update(task, completed=event["round"], spent=f"{spent}{loss}")
                for dropped in event["dropped"]:
                    console.print(
                        f"round {event['round']}: site {dropped['site']} dropped: "
                        f"{dropped['reason']}",
                        markup=False,
                    )

        yield observe
