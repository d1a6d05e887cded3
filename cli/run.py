"""What a run is begun with and asked for: simulate, sample, evaluate, init."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .show import Json, figure, plus_minus, progress, promise

if TYPE_CHECKING:
    from ..run import Run


def simulate(
    config: Annotated[Path, typer.Argument(help="The run, a TOML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option that wins over the file: section.key=value."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder, new or empty.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Where it runs: local, ray. Wins over the file.")
    ] = None,
    *,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, from its last round.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Simulate a federation on this machine."""
    from ..config import ConfigError, load_config, parse_setting

    if resume and out is None:
        raise ConfigError("--resume: needs --out, the folder of the run that is to go on")
    parsed = dict(parse_setting(text) for text in settings or [])
    if engine is not None:
        parsed["federation.engine"] = engine
    loaded = load_config(config, parsed)
    if dry_run:
        _print_plan(loaded, as_json=as_json)
        return
    from ..api import default_folder
    from ..api import simulate as run_simulation

    folder = out or default_folder(loaded.federation.name)
    try:
        with progress() as observe:
            run = run_simulation(loaded, out=folder, resume=resume, observe=observe)
    except KeyboardInterrupt:
        typer.echo(
            f"interrupted: go on with `fedveil simulate {config} --out {folder} --resume` and the "
            "same --set and --engine; until then all of the plan counts as spent",
            err=True,
        )
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps({**run.metrics, "folder": str(run.path)}))
    else:
        print_summary(run)


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
    from ..api import load
    from ..export import write

    loaded = load(run)
    write(loaded, n, out, seed)
    if as_json:
        typer.echo(json.dumps({"file": str(out), "n": n, **loaded.provenance()}))
    else:
        typer.echo(f"{out}: {n} synthetic records, {promise(loaded.privacy)}")


def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    data: Annotated[Path, typer.Option("--data", help="Records of your own, as the run's are.")],
    *,
    as_json: Json = False,
) -> None:
    """Exact figures of a run's model for records of your own: NOT PRIVATE."""
    from ..api import load
    from ..data_prep.clean import DataError

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
        beside = f"   in the run: {plus_minus(accounted)}" if accounted else ""
        typer.echo(f"{name:24} {value:9.4f}{beside}")


def init(
    file: Annotated[Path, typer.Argument(help="The TOML file to write.")],
) -> None:
    """Write a commented configuration to start from."""
    from ..config import ConfigError
    from ..reference import template

    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(template())
    except FileExistsError:
        raise ConfigError(f"{file}: is there already; choose another name") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror})") from None
    typer.echo(f"{file}: written; run it with `fedveil simulate {file}`")


def _print_plan(loaded: Any, *, as_json: bool) -> None:  # noqa: ANN401
    from ..api import price, resolve
    from ..server.simulation.sites import load_shards

    resolved, schema = resolve(loaded)
    report = load_shards(resolved, schema).report
    priced = price(resolved, schema)
    if as_json:
        typer.echo(json.dumps({**priced.as_dict(), "schedule": list(priced.schedule)}))
        return
    for key, value in priced.as_dict().items():
        typer.echo(f"{key:20} {figure(value)}")
    # A simulation may look at its data; a federation's sites keep these counts to themselves.
    typer.echo(f"{'simulated data':20} {report.records} records, {report.kept} usable")


def print_summary(run: "Run") -> None:
    """What a finished run promised and found, and where its files are."""
    privacy, metrics = run.privacy, run.metrics
    typer.echo(
        f"{metrics['rounds']} rounds, {metrics['sites']} sites, {metrics['seconds']['total']:.1f} s"
    )
    typer.echo(f"Privacy: {promise(privacy)}")
    typer.echo(f"Protects one {privacy['unit']} against {privacy['against']}")
    if privacy["excess"] > 1:
        typer.echo(f"Noise: {privacy['excess']:.4g} times what a trusted server would add")
    for open_end in privacy["not_claimed"]:
        typer.echo(f"Not claimed: {open_end}")
    for name, found in metrics["quality"].items():
        typer.echo(f"{name:24} {plus_minus(found)}")
    typer.echo(f"Run folder: {run.path}")
    if (run.path / "sites").is_dir():  # a simulation's; a federation's sites keep theirs
        typer.echo(f"What cleaning found: {run.path}/sites/*/cleaning.json")
    for file in sorted(run.path.glob("samples.*")):
        typer.echo(f"Samples: {file}")
    if (run.path / "report.html").is_file():
        typer.echo(f"Report: {run.path / 'report.html'}")
