"""Synthetic files: a picture, a table, arrays; each says that it is synthetic and of which run."""

import io
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from errno import EISDIR
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import ConfigError, FedveilError, not_below
from .data_prep.schema import Column, TableSchema, TextSchema

if TYPE_CHECKING:
    import polars as pl

    from .run import Run

GRID_SAMPLES = 100
TABLE_SAMPLES = 1000
TEXT_SAMPLES = 100
_MARGINAL_SAMPLES = 5000
_GRID_PIXELS = 800
_KEY = "fedveil"
_FOREIGN_FILE = (OSError, LookupError, ValueError, TypeError, EOFError, zipfile.BadZipFile)


def write(run: "Run", n: int, path: Path, seed: int | None = None) -> Path:
    """Writes n synthetic records of a run, in the form that the ending names.

    Images: `.png` (a grid, classes in order), `.npz` (arrays). Tables: `.csv` (with the provenance
    beside it, in `NAME.csv.provenance.json`), `.parquet`, `.png` (its marginals). Texts, with the
    same beside them: `.txt` (for reading), `.jsonl` (a record a line, as a run reads them).

    Raises:
        ConfigError: The ending does not go with the run, or the file cannot be written.
    """
    writers = _WRITERS[run.schema.modality]
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise ConfigError(
            f"--out {path}: this run makes {run.schema.modality}s; end it in {' or '.join(writers)}"
        )
    if n < 1:
        raise ConfigError(f"n = {n}: must be at least 1")
    files = {path.with_name(path.name + end): found for end, found in writer(run, n, seed).items()}
    partials = {target: target.with_name(f".{target.name}.partial") for target in files}
    try:
        for target, content in files.items():
            if target.is_dir():
                raise IsADirectoryError(EISDIR, "is a folder")
            partials[target].write_bytes(content)
        # The file itself comes last: it never stands there without the note beside it.
        for target in reversed(files):
            partials[target].replace(target)
    except OSError as error:
        raise ConfigError(
            f"--out {path}: cannot be written ({error.strerror}); choose another"
        ) from None
    finally:
        for partial in partials.values():
            with suppress(OSError):
                partial.unlink()
    return path


def read_provenance(path: Path) -> dict[str, Any]:
    """What a synthetic file says of itself.

    Raises:
        FedveilError: It says nothing.
    """
    import polars as pl
    from PIL import Image, UnidentifiedImageError

    try:
        match path.suffix.lower():
            case ".png":
                with Image.open(path) as image:
                    found = image.info[_KEY]
            case ".parquet":
                found = pl.read_parquet_metadata(path)[_KEY]
            case ".npz":
                with path.open("rb") as file:
                    arrays = np.load(file, allow_pickle=False)
                    found = str(arrays["provenance"])
            case _:
                found = path.with_name(f"{path.name}.provenance.json").read_text(encoding="utf-8")
        values = json.loads(found)
    except (*_FOREIGN_FILE, UnidentifiedImageError, pl.exceptions.PolarsError):
        values = None
    if not isinstance(values, dict):
        raise FedveilError(f"{path}: carries no provenance of ours")
    return values


def _csv(run: "Run", n: int, seed: int | None) -> dict[str, bytes]:
    frame: pl.DataFrame = run.sample_records(n, seed)
    return {"": frame.write_csv().encode(), **_beside(run)}


def _beside(run: "Run") -> dict[str, bytes]:
    note = json.dumps(run.provenance(), indent=2) + "\n"
    return {".provenance.json": note.encode()}


def _blocks(run: "Run", n: int, seed: int | None) -> dict[str, bytes]:
    """Texts for reading: below a line with its number stands each, with what lines it has."""
    texts = run.sample_records(n, seed)
    blocks = [
        f"---- synthetic record {place} of {n} ----\n{legible(text)}\n"
        for place, text in enumerate(texts, start=1)
    ]
    return {"": "\n".join(blocks).encode(), **_beside(run)}


def _jsonl(run: "Run", n: int, seed: int | None) -> dict[str, bytes]:
    schema = run.schema
    if not isinstance(schema, TextSchema):
        raise ConfigError("jsonl: is of texts")
    texts = run.sample_records(n, seed)
    lines = [json.dumps({schema.field: text}, ensure_ascii=False) + "\n" for text in texts]
    return {"": "".join(lines).encode(), **_beside(run)}


def legible(text: str) -> str:
    """A text without what a terminal or a browser would obey: tabs and line ends are kept."""
    return "".join(c if c.isprintable() or c in "\t\n" else "\ufffd" for c in text)


def _parquet(run: "Run", n: int, seed: int | None) -> dict[str, bytes]:
    frame: pl.DataFrame = run.sample_records(n, seed)
    buffer = io.BytesIO()
    frame.write_parquet(buffer, metadata={_KEY: json.dumps(run.provenance())})
    return {"": buffer.getvalue()}


def _npz(run: "Run", n: int, seed: int | None) -> dict[str, bytes]:
    images = run.sample_records(n, seed)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        images=images.arrays(),
        labels=images.labels,
        provenance=np.array(json.dumps(run.provenance())),
    )
    return {"": buffer.getvalue()}


def _grid(run: "Run", n: int, seed: int | None) -> dict[str, bytes]:
    """A grid of images, a row a class where they fit."""
    from PIL import Image

    classes = len(run.schema.classes)
    labels = [index * classes // n for index in range(n)] if classes else None
    images = run.sample_records(n, seed, labels).pixels
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    _, height, width, channels = images.shape
    gap = max(1, width // 8)
    canvas = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8
    )
    for index, image in enumerate(images):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        # Stroke data sets are light on dark; on paper dark on light reads better.
        canvas[top : top + height, left : left + width] = 255 - image if channels == 1 else image
    scale = max(1, _GRID_PIXELS // canvas.shape[1])
    picture = Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)
    # Smoothed: few people recognise a digit in eight times eight squares.
    picture = picture.resize(
        (picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC
    )
    return {"": _png(picture, run.provenance())}


def _png(picture: Any, provenance: Mapping[str, Any]) -> bytes:  # noqa: ANN401
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(_KEY, json.dumps(provenance))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info, optimize=True)
    return buffer.getvalue()


def _marginals(run: "Run", n: int, seed: int | None) -> dict[str, bytes]:
    """A picture of every column's synthetic distribution."""
    from matplotlib.figure import Figure

    schema = run.schema
    if not isinstance(schema, TableSchema):
        raise ConfigError("marginals: are of tables")
    frame: pl.DataFrame = run.sample_records(max(n, _MARGINAL_SAMPLES), seed)
    across = 4
    down = math.ceil(len(schema.columns) / across)
    figure = Figure(figsize=(3.2 * across, 2.4 * down), layout="constrained")
    for place, column in enumerate(schema.columns, start=1):
        axes = figure.add_subplot(down, across, place)
        axes.set_title(column.name, fontsize=9)
        axes.tick_params(labelsize=7)
        values = frame[column.name].drop_nulls()
        if column.kind == "categorical":
            counts = [int((values == category).sum()) for category in column.categories]
            top = sorted(zip(counts, column.categories, strict=True), reverse=True)[:8][::-1]
            axes.barh([name[:18] for _, name in top], [c / frame.height for c, _ in top])
        else:
            axes.hist(values.to_numpy(), bins=_edges(column).tolist(), density=True)
            axes.set_yticks([])
    epsilon = run.privacy["epsilon"]
    promise = "NOT PRIVATE" if epsilon is None else f"epsilon {not_below(epsilon)}"
    figure.suptitle(f"Synthetic records of {run.config.federation.name}, {promise}", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={_KEY: json.dumps(run.provenance())})
    return {"": buffer.getvalue()}


def _edges(column: Column) -> np.ndarray:
    """Some 30 bins over the bounds; of whole numbers each holds equally many."""
    low, high = column.bounds or (0.0, 1.0)
    if column.kind == "integer":
        width = math.ceil((high - low + 1) / 30)
        return np.arange(low, high + 1 + width, width) - 0.5
    return np.linspace(low, high, 31)


_Writer = Callable[["Run", int, int | None], dict[str, bytes]]
_WRITERS: dict[str, dict[str, _Writer]] = {
    "image": {".png": _grid, ".npz": _npz},
    "table": {".csv": _csv, ".parquet": _parquet, ".png": _marginals},
    "text": {".txt": _blocks, ".jsonl": _jsonl},
}
