"""The report of a run folder: what is read for it, and where it goes."""

from pathlib import Path
from typing import TYPE_CHECKING

from .compare import check_run
from .config import ConfigError, FedveilError, read_toml
from .export import legible
from .files import replace_file
from .server.report import GENERATOR, Sources, render
from .server.store import Checkpoint, RunFolder

if TYPE_CHECKING:
    import numpy as np

    from .run import Run

_SYNTHETIC = 5000
_TEXTS = 12
_OURS = 4096  # within so many bytes a report says that it is one


def write_report(run: "Run", out: Path | None = None) -> Path:
    """Writes the report of a run, finished or not, whole or not at all.

    Raises:
        ConfigError: `out` is no name for a report, is another file, or cannot be written; or the
            folder holds no run.
        FedveilError: It holds damaged files.
    """
    path = run.path / "report.html" if out is None else out
    if path.suffix.lower() not in {".html", ".htm"}:
        raise ConfigError(f"--out {path}: a report is HTML; end it in .html")
    page = render(read_sources(run)).encode()
    try:
        if path.exists() and not _is_report(path):
            raise ConfigError(
                f"--out {path}: is there already and is no report of ours; choose another name"
            )
        if not path.exists() or path.read_bytes() != page:
            replace_file(path, page)
    except OSError as error:
        raise ConfigError(
            f"--out {path}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    return path


def read_sources(run: "Run") -> Sources:
    """What a report is made of: accounted and public files only, nothing of a site's own.

    Raises:
        ConfigError: The folder holds no run.
        FedveilError: There are no events, or a file that is there is damaged.
    """
    check_run(run.path)
    path, folder = run.path, RunFolder(run.path)
    events = tuple(folder.events())
    if not events:
        raise FedveilError(f"{path}: holds no readable events.jsonl; is it a run folder?")
    config, environment = path / "config.toml", path / "environment.json"
    told = path / "statistics.json"
    schema = run.schema if (path / "schema.json").exists() else None
    return Sources(
        folder=path.resolve().name,
        events=events,
        config=(config.read_text(encoding="utf-8"), read_toml(config)) if config.exists() else None,
        environment=folder.read_json(environment.name) if environment.exists() else None,
        schema=schema,
        metrics=run.metrics if run.finished else None,
        point=_checkpoint(folder),
        synthetic=_synthetic(run) if run.finished and schema is not None else None,
        # A table's shows what the marginals show.
        statistics=folder.read_json("statistics.json") if told.exists() else None,
        samples=_samples(path) if schema is not None and schema.modality == "image" else None,
        texts=_texts(run) if run.finished and schema is not None else (),
    )


def _checkpoint(folder: RunFolder) -> Checkpoint | None:
    """The last state; a report can do without one, as of an older version's run."""
    try:
        return folder.load_checkpoint()[0]
    except FedveilError:
        return None


def _synthetic(run: "Run") -> "np.ndarray | None":
    """Histograms of the released model, the same ones every time; none if it cannot be read."""
    try:
        return run.histograms(_SYNTHETIC, run.config.federation.seed)
    except FedveilError:
        return None


def _texts(run: "Run") -> tuple[str, ...]:
    """Some texts of the released model, the same ones every time."""
    if run.schema.modality != "text":
        return ()
    try:
        found = run.sample_records(_TEXTS, run.config.federation.seed)
    except FedveilError:
        return ()
    return tuple(legible(text) for text in found)


def _samples(path: Path) -> bytes | None:
    try:
        return (path / "samples.png").read_bytes()
    except OSError:
        return None


def _is_report(path: Path) -> bool:
    with path.open("rb") as opened:
        return f'content="{GENERATOR}"'.encode() in opened.read(_OURS)
