"""Cleaned records as a file that reads as the same records again, with a report beside it."""

import csv
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl

from ..config import Clean, ConfigError
from ..files import create_secret_file, publish
from . import modality
from .clean import CleaningReport, refuse_unusable
from .images import Images
from .schema import Column, ImageSchema, Schema, TableSchema, TextSchema
from .texts import Texts


def write_cleaned(source: str, schema: Schema, rules: Clean, out: Path) -> CleaningReport:
    """Cleans a file or folder into a new file, and writes `OUT.cleaning.json` beside it.

    Tables: `.csv`, `.parquet`; images: `.npz`; texts: `.jsonl`. Both files are for their owner's
    eyes, for they are as private as the data, and both are there or none is.

    Raises:
        DataError: The data cannot be used.
        ConfigError: OUT has another ending, is there already, or cannot be written.
    """
    report_file = out.with_name(f"{out.name}.cleaning.json")
    writer = _writer(schema, out)
    for path in (out, report_file):
        if path.resolve() == Path(source).resolve():
            raise ConfigError(f"--out {path}: is the data itself; choose another name")
        refuse_old(path)
    kind = modality(schema)
    report: CleaningReport
    cleaned, report = kind.clean(kind.read(source, schema), schema, rules)
    refuse_unusable(report)

    def read_again(path: Path) -> None:
        again, _ = kind.clean(kind.read(str(path), schema), schema, rules)
        if not _same(again, cleaned):
            raise ConfigError(
                f"--out {out}: would not read as the same records again: a value holds a line "
                "break, or the schema's aliases rename a category; write .parquet, or mend them"
            )

    note = json.dumps(report.as_dict(), indent=2) + "\n"
    _write_pair(out, writer(cleaned, schema), report_file, note.encode(), read_again)
    return report


def _writer(schema: Schema, out: Path) -> Callable[[Any, Any], bytes]:
    writers = _WRITERS[schema.modality]
    writer = writers.get(out.suffix)
    if writer is None:
        endings = " or ".join(writers)
        raise ConfigError(f"--out {out}: the schema is for {schema.modality}s; end it in {endings}")
    return writer


def refuse_old(path: Path) -> None:
    """Refuses a path where no new file can be.

    Raises:
        ConfigError: Something is there already, or its folder is not.
    """
    if path.exists() or path.is_symlink():
        raise ConfigError(f"--out {path}: is there already; choose another name")
    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: its folder is not there; make it first")


def _write_pair(
    out: Path, content: bytes, beside: Path, note: bytes, check: Callable[[Path], None]
) -> None:
    """Writes both under other names, checks the first, and gives them their names."""
    try:
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            drafts = Path(folder, out.name), Path(folder, beside.name)
            create_secret_file(drafts[0], content)
            create_secret_file(drafts[1], note)
            check(drafts[0])
            publish(drafts[1], beside)
            try:
                publish(drafts[0], out)
            except OSError:
                beside.unlink()
                raise
    except OSError as error:
        raise ConfigError(
            f"--out {out}: cannot be written ({error.strerror}); choose another folder"
        ) from None


def _same(again: Any, cleaned: Any) -> bool:  # noqa: ANN401
    if isinstance(cleaned, pl.DataFrame):
        return cleaned.equals(again)
    if isinstance(cleaned, Texts):
        return bool(cleaned == again)
    return np.array_equal(again.pixels, cleaned.pixels) and np.array_equal(
        again.labels, cleaned.labels
    )


def _csv(cleaned: pl.DataFrame, schema: TableSchema) -> bytes:
    texts = _texts(cleaned, schema)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if schema.header:
        writer.writerow(texts.columns)
    writer.writerows(texts.iter_rows())
    return buffer.getvalue().encode()


def _parquet(cleaned: pl.DataFrame, schema: TableSchema) -> bytes:
    texts = _texts(cleaned, schema)
    whole = [c.name for c in schema.columns if c.kind == "integer"]
    typed = cleaned.with_columns(pl.col(whole).cast(pl.Int64))
    # A number that would read as a missing marker stays in the spelling that does not.
    columns = [
        typed[name] if typed[name].cast(pl.String).equals(texts[name]) else texts[name]
        for name in typed.columns
    ]
    buffer = io.BytesIO()
    pl.DataFrame(columns).write_parquet(buffer)
    return buffer.getvalue()


def _texts(cleaned: pl.DataFrame, schema: TableSchema) -> pl.DataFrame:
    """Cleaned values in spellings that clean to the same values."""
    columns = {column.name: column for column in schema.columns if column.kind != "categorical"}
    return pl.DataFrame(
        _spelled(series, columns[series.name], schema.missing) if series.name in columns else series
        for series in cleaned
    )


def _spelled(series: pl.Series, column: Column, missing: tuple[str, ...]) -> pl.Series:
    typed = series.cast(pl.Int64) if column.kind == "integer" else series
    text = typed.cast(pl.String)
    if not text.is_in(list(missing)).any():
        return text
    spellings = [None if value is None else _spelling(value, missing) for value in series]
    return pl.Series(series.name, spellings, dtype=pl.String)


def _spelling(value: float, missing: tuple[str, ...]) -> str:
    """A number so that it is no missing marker: 99, 99.0, 99.00, ..."""
    plain = f"{value:.0f}" if value.is_integer() else repr(value)
    exact = f"{plain}.0" if value.is_integer() else f"{value:.17e}".replace("e", "0e")
    texts = [plain, exact]
    while texts[-1] in missing:
        texts.append(texts[-1].replace("e", "0e") if "e" in exact else f"{texts[-1]}0")
    return next(text for text in texts if text not in missing)


def _npz(cleaned: Images, schema: ImageSchema) -> bytes:
    arrays = {schema.images: cleaned.arrays()}
    if schema.classes:
        arrays[schema.labels] = cleaned.labels
    buffer = io.BytesIO()
    # Not by numpy's own function: it takes no array that is called "file".
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as opened:
                np.lib.format.write_array(opened, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _jsonl(cleaned: Texts, schema: TextSchema) -> bytes:
    lines = []
    for content, person in zip(cleaned.contents, cleaned.persons, strict=True):
        whose = {} if schema.person is None else {schema.person: person}
        record = {schema.field: (content or b"").decode(), **whose}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


_WRITERS: dict[str, dict[str, Callable[[Any, Any], bytes]]] = {
    "table": {".csv": _csv, ".parquet": _parquet},
    "image": {".npz": _npz},
    "text": {".jsonl": _jsonl},
}
