"""Runs, of a folder or of a server: list, compare, watch, cancel, resume, fetch."""

import json
import os.path
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import not_below, small_not_below
from .remote import KitOption, OperatorOption, RunNumber, follow, print_runs
from .show import Json, figure, plus_minus

if TYPE_CHECKING:
    from ..compare import Comparison, Facts

app = typer.Typer(
    help="Runs: list, compare; a server's: watch, cancel, resume, fetch.", no_args_is_help=True
)

_LABEL, _CELL = 28, 17  # columns of a terminal; three runs stand side by side on 80
_Row = tuple[str, Sequence[str]]


@app.command("list")
def list_runs(
    folder: Annotated[
        Path | None, typer.Argument(help="The folder that holds runs; runs by default.")
    ] = None,
    kit: Annotated[
        Path | None,
        typer.Option(envvar="FEDVEIL_KIT", help="List the server's runs; without FOLDER only."),
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """One line a run, the newest first."""
    if kit is not None and folder is None:
        _list_remote(kit, as_json=as_json)
    else:
        _list_folder(folder or Path("runs"), as_json=as_json)


@app.command()
def watch(run: RunNumber, kit: KitOption, *, as_json: Json = False) -> None:
    """Show a run of the server until it ends: exit 1 if it failed."""
    from ..deployment.control import member_kit

    follow(member_kit(kit), run, as_json=as_json)


@app.command()
def cancel(run: RunNumber, kit: OperatorOption, *, as_json: Json = False) -> None:
    """Take a run out of the server's queue, or stop it."""
    _change("cancel", run, kit, "cancelled", as_json=as_json)


@app.command()
def resume(run: RunNumber, kit: OperatorOption, *, as_json: Json = False) -> None:
    """Put a run that failed, was cancelled or interrupted back into the server's queue."""
    _change("resume", run, kit, "queued again", as_json=as_json)


@app.command()
def fetch(
    run: RunNumber,
    kit: KitOption,
    out: Annotated[Path, typer.Option("-o", "--out", help="A new folder.")],
    *,
    as_json: Json = False,
) -> None:
    """Get a run that has ended: then sample it, audit it, write its report."""
    from ..deployment.control import ControlClient, member_kit
    from ..deployment.fetching import receive, refuse_taken

    opened = member_kit(kit)
    refuse_taken(out)
    with ControlClient(opened) as client:
        summary = receive(client.stream("fetch", {"run": run}), out)
    if as_json:
        typer.echo(json.dumps({**summary, "folder": str(out)}))
    elif summary["state"] == "finished":
        from ..run import Run
        from .run import print_summary

        print_summary(Run(out))
    else:
        cause = f": {summary['cause']}" if summary["cause"] else ""
        typer.echo(
            f"{out}: run {run}, {summary['state']}{cause}; `fedveil report {out}` shows how far it "
            "came"
        )


def _change(method: str, run: str, kit: Path, done: str, *, as_json: bool) -> None:
    from ..deployment.control import ControlClient
    from ..deployment.kit import open_kit

    with ControlClient(open_kit(kit, "operator")) as client:
        answer = client.call(method, {"run": run})
    if as_json:
        typer.echo(json.dumps(answer))
        return
    receipt = answer["receipt"]
    typer.echo(f"run {run}: {done}; receipt {receipt['entry']}:{receipt['hash']}")


def _list_remote(kit: Path, *, as_json: bool) -> None:
    from ..deployment.control import ControlClient, member_kit

    opened = member_kit(kit)
    with ControlClient(opened) as client:
        answer = client.call("list")
    if as_json:
        typer.echo(json.dumps({"server": opened.control, **answer}))
    elif answer["runs"]:
        print_runs(answer["runs"], answer["older"])
    else:
        typer.echo(f"{opened.control}: has no runs")


def _list_folder(folder: Path, *, as_json: bool) -> None:
    from ..compare import plain
    from ..config import ConfigError

    if not folder.is_dir():
        raise ConfigError(f"{folder}: is no folder; give the one that holds your runs")
    whole, damaged = _read_all(folder)
    if as_json:
        broken = [{"folder": str(p), "state": "damaged", "cause": why} for p, why in damaged]
        typer.echo(json.dumps({"folder": str(folder), "runs": [*map(plain, whole), *broken]}))
        return
    if not whole and not damaged:
        typer.echo(f"{folder}: holds no runs")
        return
    typer.echo(_line("run", "begun (UTC)", "family", "epsilon", "rounds", "state", "seconds"))
    for facts in whole:
        told = facts.told
        typer.echo(
            _line(
                facts.path.name, f"{facts.begun:%Y-%m-%d %H:%M}", told.family or "-",
                _epsilon(facts), _rounds(facts), facts.state, _seconds(facts),
            )
        )  # fmt: skip
    for path, why in damaged:
        typer.echo(f"{path.name:24} damaged: {why}")


@app.command("compare")
def compare_runs(
    runs: Annotated[list[Path], typer.Argument(help="Folders of two runs or more.")],
    *,
    as_json: Json = False,
) -> None:
    """What differs, what each promised, and which is better by more than chance explains."""
    from rich.console import Console

    from ..compare import compare

    found = compare(runs)
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
        return
    console = Console(highlight=False)
    side_by_side = max(1, (console.width - _LABEL) // _CELL)
    for start in range(0, len(found.runs), side_by_side):
        console.print(_table(found, slice(start, start + side_by_side)))
        console.print()
    for note in _notes(found):
        console.print(note, markup=False)


def _read_all(folder: Path) -> "tuple[list[Facts], list[tuple[Path, str]]]":
    from ..compare import is_run, read_run
    from ..config import FedveilError

    whole, damaged = [], []
    for path in sorted(filter(is_run, folder.iterdir())):
        try:
            whole.append(read_run(path))
        except FedveilError as error:
            damaged.append((path, str(error)))
    return sorted(whole, key=lambda facts: facts.begun, reverse=True), damaged


def _line(*cells: str) -> str:
    return "{:24} {:16} {:8} {:>11} {:>9}  {:10} {:>8}".format(*cells)


def _table(found: "Comparison", shown: slice) -> Any:  # noqa: ANN401
    """The table of some of the runs, a column each."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("", width=_LABEL - 1, overflow="fold")
    for name in _names(found.runs)[shown]:
        table.add_column(Text(name), width=_CELL - 1, overflow="fold")
    for heading, rows in _groups(found).items():
        table.add_row(Text(heading.upper(), style="bold"))
        for label, cells in rows:
            table.add_row(Text(f"  {label}"), *map(Text, cells[shown]))
    return table


def _groups(found: "Comparison") -> dict[str, list[_Row]]:
    """All rows below their headings; a heading without rows is left out."""
    groups: dict[str, list[_Row]] = {
        "run": list(_about(found.runs)),
        "configuration": [
            ("schema", ["the same" if found.same_schema else "DIFFERS"] * len(found.runs)),
            *((key, _values(row)) for key, row in found.config.items()),
        ],
        "privacy": list(_privacy(found.runs)),
        "quality": list(_quality(found)),
        "versions": [(key, _hashes(row)) for key, row in found.versions.items()],
    }
    return {heading: rows for heading, rows in groups.items() if rows}


def _about(runs: "Sequence[Facts]") -> Iterator[_Row]:
    told = [facts.told for facts in runs]
    yield "state", [f"{f.state}: {f.cause}" if f.cause else f.state for f in runs]
    yield "begun (UTC)", [f"{facts.begun:%Y-%m-%d %H:%M}" for facts in runs]
    yield "family", [one.family or "-" for one in told]
    yield "sites", [figure(one.sites) for one in told]
    yield "rounds", list(map(_rounds, runs))
    yield "steps", [figure(one.steps) for one in told]
    yield "seconds", list(map(_seconds, runs))
    each = [
        one.seconds["total"] / one.rounds if one.rounds and one.seconds else None for one in told
    ]
    yield "seconds a round", [figure(seconds and round(seconds, 3)) for seconds in each]


def _privacy(runs: "Sequence[Facts]") -> Iterator[_Row]:
    promises = [facts.told.privacy for facts in runs]
    yield "epsilon", list(map(_epsilon, runs))
    for name in ("target_epsilon", "delta", "mechanism", "unit", "against"):
        yield name, [figure(getattr(promise, name, None)) for promise in promises]


def _quality(found: "Comparison") -> Iterator[_Row]:
    for name in dict.fromkeys(name for facts in found.runs for name in facts.told.quality):
        cells = []
        for place, facts in enumerate(found.runs):
            known = facts.told.quality.get(name)
            said = plus_minus(known.model_dump(exclude_none=True)) if known else "-"
            cells.append(f"* {said}" if found.best.get(name) == place else said)
        yield name, cells


def _notes(found: "Comparison") -> Iterator[str]:
    if found.obstacles:
        yield f"Not comparable, no figure is marked: {'; '.join(found.obstacles)}."
    elif not found.best:
        yield "No run is better than every other by more than chance explains."
    else:
        yield (
            "* is better than every other by more than twice the standard deviation of noise and "
            "of the held-out records' draw (a loss: of noise alone). Luck in training is not in it."
        )
    if any(facts.state != "finished" for facts in found.runs):
        yield "What is not finished counts its whole plan as spent; its figures are of midway."
    if found.epsilon is not None:
        total, delta = not_below(found.epsilon), small_not_below(found.delta)
        yield f"All runs together cost at most epsilon {total}, delta {delta} (by plain addition)."
    yield (
        "To choose by these accounted figures costs nothing more; to choose by the exact ones of "
        "`fedveil evaluate` is a release that nobody accounts for."
    )


def _names(runs: "Sequence[Facts]") -> list[str]:
    names = [facts.path.resolve().name for facts in runs]
    if len(set(names)) == len(names):
        return names
    return _shortened([str(facts.path.resolve()) for facts in runs])


def _values(row: Sequence[Any]) -> list[str]:
    texts = [figure(value) for value in row]
    return _shortened(texts) if all(text.startswith("/") for text in texts) else texts


def _hashes(row: Sequence[Any]) -> list[str]:
    """Versions; of a hash its beginning."""
    return [text[:12] if len(text) == 64 else text for text in map(figure, row)]


def _shortened(paths: Sequence[str]) -> list[str]:
    """Paths without the folders that all are in."""
    common = os.path.commonpath(paths)
    return [f".../{os.path.relpath(path, common)}" for path in paths]


def _epsilon(facts: "Facts") -> str:
    promise = facts.told.privacy
    if promise is None:
        return "-"
    return "NOT PRIVATE" if promise.epsilon is None else not_below(promise.epsilon)


def _rounds(facts: "Facts") -> str:
    if facts.state == "finished":
        return str(facts.told.rounds)
    return f"{facts.told.rounds} of {figure(facts.config.get('federation.rounds'))}"


def _seconds(facts: "Facts") -> str:
    total = facts.told.seconds.get("total")
    return "-" if total is None else f"{total:.1f}"
