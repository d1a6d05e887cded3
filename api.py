"""The Python API: simulate a federation, open a finished run."""

import itertools
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .compare import check_run
from .config import TRANSPORT, ConfigError, FedveilError, RunConfig, load_config, override
from .data_prep import check_unit, run_schema
from .data_prep.schema import Schema
from .export import GRID_SAMPLES, TABLE_SAMPLES, TEXT_SAMPLES, write
from .run import Run
from .server.store import RunFolder

if TYPE_CHECKING:
    from .privacy.plan import Plan
    from .server.rounds import Observer

__all__ = ["Run", "default_folder", "load", "resolve", "simulate"]


def simulate(
    config: RunConfig | Path | str,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    observe: "Observer | None" = None,
    **overrides: Mapping[str, Any],
) -> "Run":
    """Simulates a federation on this machine.

    Args:
        config: A configuration, or the path of one.
        out: The run folder, new or empty. Default: `runs/NAME-TIME`.
        resume: Go on with the run that `out` holds, from its last whole round, and with the
            configuration that it was begun with; a run that never began begins.
        observe: Sees every event of the run as it happens.
        overrides: Options that win, by section: `privacy={"epsilon": 3.0}`.

    Returns:
        The finished run, with samples of its model and a report in its folder.

    Raises:
        ConfigError: The configuration, the data or the folder is unusable. Nothing has run.
        FedveilError: The run failed; its folder says why.
    """
    from .server.app import ignore
    from .server.simulation import check as check_engine
    from .server.simulation import run as run_engine
    from .server.simulation.sites import load_shards

    resolved, schema = resolve(config, overrides)
    if resume and out is None:
        raise ConfigError("--resume: needs --out, the folder of the run that is to go on")
    path = Path(out) if out is not None else default_folder(resolved.federation.name)
    folder, run = RunFolder(path), Run(path)
    if not (resume and run.finished):
        # What cannot be used is refused before anything is written.
        shards = load_shards(resolved, schema)
        price(resolved, schema)
        check_engine(resolved)
    with folder.locked(resume=resume):
        if resume:
            _same_config(run, resolved, schema)
        try:
            if not run.finished:
                run_engine(resolved, schema, shards, path, observe or ignore)
            _write_samples(run)
        except Exception:
            # What must be told is why the run failed, not that there is no report of it.
            with suppress(Exception):
                run.report()
            raise
        run.report()
    return run


def _same_config(run: Run, resolved: RunConfig, schema: Schema) -> None:
    """Refuses to go on with another configuration than the run was begun with."""
    if not (run.path / "config.toml").exists():
        return
    if (run.path / "schema.json").exists() and run.schema != schema:
        raise ConfigError(
            f"data.schema: has changed since the run in {run.path} was begun; resume it with that"
        )
    before, now = (config.model_dump(by_alias=True) for config in (run.config, resolved))
    for section, options in now.items():
        for key, value in options.items():
            if section == "federation" and key in TRANSPORT:
                continue  # it may go on elsewhere
            if before[section][key] != value:
                raise ConfigError(
                    f"{section}.{key} = {_said(value)}: the run in {run.path} was begun with "
                    f"{_said(before[section][key])}; resume it with that"
                )


def _said(value: object) -> object:
    return "its default" if value is None else value


def _write_samples(run: Run) -> None:
    samples = {
        "image": {"samples.png": GRID_SAMPLES},
        "table": {"samples.png": GRID_SAMPLES, "samples.csv": TABLE_SAMPLES},
        "text": {"samples.txt": TEXT_SAMPLES},
    }[run.schema.modality]
    for name, n in samples.items():
        if not (run.path / name).exists():
            write(run, n, run.path / name)


def resolve(
    config: RunConfig | Path | str, overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> tuple[RunConfig, Schema]:
    """The configuration in force and its schema.

    Raises:
        ConfigError: They are unusable.
    """
    from .models import check_modality

    settings: dict[str, Any] = {}
    for section, options in (overrides or {}).items():
        if not isinstance(options, Mapping):
            raise ConfigError(f"{section} = {options!r}: must be a section, {section}={{...}}")
        settings |= {f"{section}.{key}": value for key, value in options.items()}
    if not isinstance(config, RunConfig):
        config = load_config(config, settings)
    elif settings:
        config = override(config.model_dump(by_alias=True), settings)
    schema = run_schema(config)
    check_unit(config, schema)
    check_modality(config.model.family, schema)
    return config.resolved(schema.modality), schema


def price(config: RunConfig, schema: Schema) -> "Plan":
    """What a run will cost, once all of it can be had.

    Raises:
        ConfigError: The budget cannot be reached, or its statistics cannot be asked.
    """
    from .data_prep.queries import run_workload
    from .privacy.plan import plan

    priced = plan(config)
    if priced.statistics:
        run_workload(config, schema, priced.statistics_noise)
    return priced


def load(path: Path | str) -> "Run":
    """Opens a finished run.

    Raises:
        ConfigError: The folder holds none.
        FedveilError: It is unfinished or damaged.
    """
    check_run(Path(path))
    run = Run(Path(path))
    if missing := [key for key in ("run_id", "family", "privacy") if key not in run.metrics]:
        raise FedveilError(f"{run.path}: metrics.json: {missing[0]}: missing")
    return run


def default_folder(name: str) -> Path:
    """A new folder below `runs/`."""
    base = f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    names = (base if again == 1 else f"{base}-{again}" for again in itertools.count(1))
    return next(path for path in map(Path("runs").joinpath, names) if not path.exists())
