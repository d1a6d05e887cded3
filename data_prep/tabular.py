"""Tables: read, encode to numbers in [0, 1], decode back."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl

from ..config import Clean
from .clean import CleaningReport, DataError, bounds, trimmed
from .clean import clean as clean_table
from .harmonise import NO_MAP, Columns, own_columns
from .modality import Encoded, Modality
from .schema import Block, Column, Schema, TableSchema, parse_schema, repeated
from .words import nearest

TEXT_SUFFIXES = (".csv", ".tsv", ".data")
_SUFFIXES = (*TEXT_SUFFIXES, ".parquet")


def read(source: str, schema: Schema, columns: Columns = NO_MAP) -> pl.DataFrame:
    """Reads a CSV or Parquet file, or a built-in table, with every value as a string.

    Args:
        source: The file, or the name of a built-in table.
        schema: What a record is.
        columns: What a column of the schema is called in this file, where it is called otherwise.

    Returns:
        [N] rows; the schema's columns and the key of a person, if it has one.

    Raises:
        DataError: The file or a column is missing, or it cannot be read.
        ConfigError: `columns` does not fit the schema.
    """
    schema = _table(schema)
    wanted = own_columns(columns, schema)
    frame = _breast_cancer() if source == "sklearn:breast_cancer" else _read_file(source, schema)
    if absent := [name for name, own in wanted.items() if own not in frame.columns]:
        found = ", ".join(ascii(name[:30]) for name in frame.columns[:8]) or "no columns"
        own = wanted[absent[0]]
        what = f'column "{own}"' + (f" (map.{absent[0]})" if own != absent[0] else "")
        raise DataError(
            f"data.source = {source}: {what} is missing; the file has {found}"
            f"{_hint(own, frame.columns)}"
        )
    with _reading(source):
        return frame.select(as_text(frame[own]).alias(name) for name, own in wanted.items())


def is_number(text: str) -> bool:
    """Whether a text is a number, NaN and infinity included."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_parquet(path: Path) -> pl.DataFrame:
    """Reads a Parquet file with the types that it has.

    Raises:
        DataError: It cannot be read.
    """
    with _reading(str(path)):
        return pl.read_parquet(path)


def read_rows(path: Path) -> list[list[str]]:
    """Reads the fields of each line of a text table that is not blank; the header is one of them.

    A quote that is not closed ends with its line, and bytes that are not UTF-8 are replaced: no
    record can spoil the reading of another.

    Raises:
        DataError: It cannot be read.
    """
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    with _reading(str(path)), path.open(encoding="utf-8", errors="replace") as opened:
        # A byte order mark is taken off any line, or the first record would differ from others.
        lines = [line.removeprefix("\ufeff") for line in opened]
    return [_fields(line, separator) for line in lines if line.strip()]


def table_path(source: str) -> Path:
    """The file of a table.

    Raises:
        DataError: There is none, or its ending is not a table's.
    """
    path = Path(source)
    if source.startswith("sklearn:"):
        raise DataError(f"data.source = {source}: is no table that is built in")
    if path.suffix.lower() not in _SUFFIXES:
        raise DataError(f"data.source = {source}: must end in {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"data.source = {source}: is no file; check the path")
    return path


def as_text(series: pl.Series) -> pl.Series:
    """Values as strings; bytes that are not UTF-8 are replaced, value by value.

    Raises:
        polars.exceptions.PolarsError: They are no plain values, such as lists.
    """
    if series.dtype != pl.Binary:
        return series.cast(pl.String, strict=False)
    decoded = [None if value is None else value.decode(errors="replace") for value in series]
    return pl.Series(series.name, decoded, dtype=pl.String)


def separator_hint(names: Sequence[str]) -> str:
    """What to do where a header of one name, or a line of one field, is several in disguise."""
    told = {";": "a semicolon", "\t": "a tab", "|": "a bar", ",": "a comma"}
    found = next((told[s] for s in told if len(names) == 1 and s in names[0]), None)
    if found is None:
        return ""
    return f"; its separator seems to be {found}: save it with commas as .csv, or with tabs as .tsv"


def clean(raw: pl.DataFrame, schema: Schema, rules: Clean) -> tuple[pl.DataFrame, CleaningReport]:
    """Cleans records one by one; see `data_prep.clean`."""
    return clean_table(raw, _table(schema), rules)


def values(raw: pl.DataFrame, schema: Schema, column: str) -> list[str]:
    """One column of raw records as trimmed strings, "" for missing."""
    schema = _table(schema)
    if column not in raw.columns:
        raise DataError(
            f'data.column = "{column}": is no column of the schema; known are '
            f"{', '.join(raw.columns)}"
        )
    aliases = next((c.aliases for c in schema.columns if c.name == column), {})
    text = trimmed(raw[column], schema.missing)
    return (text.replace(aliases) if aliases else text).fill_null("").to_list()


def take(raw: pl.DataFrame, rows: np.ndarray) -> pl.DataFrame:
    """The given rows."""
    return raw[rows]


def identities(cleaned: pl.DataFrame, schema: Schema) -> list[bytes]:
    """What decides a record's side of the split: its person, else its whole content."""
    person = _table(schema).person
    if person is not None:
        return [key.encode() for key in cleaned[person]]
    return [repr(row).encode() for row in cleaned.iter_rows()]


def encode(cleaned: pl.DataFrame, schema: Schema) -> Encoded:
    """Encodes cleaned records by the schema's layout.

    Returns:
        x: [N, schema.width] float32: one-hot categories, numbers scaled to [0, 1] by their
        bounds (after the transform), presence bits. y: [N] int64 class, 0 without a label.
    """
    schema = _table(schema)
    x = np.zeros((cleaned.height, schema.width), dtype=np.float32)
    for block in schema.blocks:
        series = cleaned[block.column.name]
        if block.column.kind == "categorical":
            codes = _codes(series, block.column.categories)
            x[np.arange(len(codes)), block.start + codes] = 1
        else:
            present = series.is_not_null().to_numpy()
            x[:, block.start] = _scale(series.fill_null(0).to_numpy(), block) * present
            if block.column.nullable:
                x[:, block.start + 1] = present
    y = np.zeros(cleaned.height, dtype=np.int64)
    if schema.label is not None:
        y = _codes(cleaned[schema.label], schema.classes)
    return Encoded(x, y)


def decode(encoded: Encoded, schema: Schema) -> pl.DataFrame:
    """Turns encoded records into a table: the largest level, numbers within their bounds."""
    schema = _table(schema)
    decoded: dict[str, pl.Series] = {}
    for block in schema.blocks:
        part = encoded.x[:, block.start : block.stop]
        decoded[block.column.name] = (
            _named(part.argmax(1), block.column.categories)
            if block.column.kind == "categorical"
            else _unscale(part, block)
        )
    if schema.label is not None:
        decoded[schema.label] = _named(encoded.y, schema.classes)
    return pl.DataFrame({c.name: decoded[c.name] for c in schema.columns})


def _table(schema: Schema) -> TableSchema:
    if not isinstance(schema, TableSchema):
        raise DataError(f"schema: is for {schema.modality}s, the source is a table")
    return schema


def _hint(absent: str, names: Sequence[str]) -> str:
    """Why a column may be missing."""
    hint = separator_hint(names) or nearest(absent, names)
    unlike_names = any(is_number(name) for name in names)
    return hint or ("; if it has no header: header = false" if unlike_names else "")


def _read_file(source: str, schema: TableSchema) -> pl.DataFrame:
    path = table_path(source)
    return read_parquet(path) if path.suffix.lower() == ".parquet" else _read_lines(path, schema)


def _read_lines(path: Path, schema: TableSchema) -> pl.DataFrame:
    """Reads a CSV file, where one line is one record whatever stands in the others.

    A line with a wrong number of fields is blank.
    """
    rows = read_rows(path)
    names = [column.name for column in schema.columns]
    if schema.header:
        names = named(rows.pop(0)) if rows else []
        if (twice := repeated(names)) is not None:
            raise DataError(f"data.source = {path}: column {twice!a} is there twice")
    blank = [None] * len(names)
    whole = [row if len(row) == len(names) else blank for row in rows]
    with _reading(str(path)):
        return pl.DataFrame(whole, schema=dict.fromkeys(names, pl.String), orient="row")


def named(header: list[str]) -> list[str]:
    """Column names; one that is empty becomes blanks of its own, so that no schema can name it.

    Spreadsheets leave commas at the ends of lines.
    """
    names = [name.strip() for name in header]
    return [name or " " * place for place, name in enumerate(names, start=1)]


def _fields(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator, skipinitialspace=True))
    except csv.Error:
        return []


@contextmanager
def _reading(source: str) -> Iterator[None]:
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"data.source = {source}: cannot be read: {first}") from None


def _codes(series: pl.Series, categories: tuple[str, ...]) -> np.ndarray:
    codes = {category: code for code, category in enumerate(categories)}
    missing = len(categories)
    return np.array([codes.get(value, missing) for value in series], dtype=np.int64)


def _named(codes: np.ndarray, categories: tuple[str, ...]) -> pl.Series:
    names: list[str | None] = [*categories, None]
    return pl.Series([names[code] for code in codes], dtype=pl.String)


def _scale(numbers: np.ndarray, block: Block) -> np.ndarray:
    low, high = _range(block)
    if block.column.transform == "log1p":
        numbers = np.log1p(np.maximum(numbers, 0))
    return np.asarray((numbers - low) / (high - low), dtype=np.float32)


def _unscale(part: np.ndarray, block: Block) -> pl.Series:
    column = block.column
    low, high = _range(block)
    numbers = low + part[:, 0].astype(np.float64).clip(0, 1) * (high - low)
    if column.transform == "log1p":
        numbers = np.expm1(numbers)
    if column.kind == "integer":
        numbers = np.rint(numbers)
    series = pl.Series(numbers).clip(*bounds(column))  # rounding may have left them by a hair
    if column.nullable:
        series = series.set(pl.Series(part[:, 1] < 0.5), None)
    return series.cast(pl.Int64) if column.kind == "integer" else series


def whole(column: Column, encoded: np.ndarray) -> np.ndarray:
    """Encoded numbers [N] of a column, moved to where its nearest whole numbers are encoded."""
    block = Block(column, 0, column.width)
    present = np.ones(len(encoded))
    numbers = _unscale(np.stack([encoded, present], axis=1), block).to_numpy()
    return _scale(numbers.astype(np.float64), block)


def _range(block: Block) -> tuple[float, float]:
    low, high = bounds(block.column)
    if block.column.transform == "log1p":
        return float(np.log1p(low)), float(np.log1p(high))
    return low, high


def _breast_cancer() -> pl.DataFrame:
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    frame = pl.DataFrame(
        bunch.data, schema=[name.replace(" ", "_") for name in bunch.feature_names]
    )
    names = [str(bunch.target_names[target]) for target in bunch.target]
    return frame.with_columns(pl.Series("diagnosis", names))


_BREAST_CANCER_MAXIMA = {
    "radius": 40, "texture": 50, "perimeter": 300, "area": 5000, "smoothness": 0.25,
    "compactness": 1.2, "concavity": 1.5, "concave_points": 0.4, "symmetry": 0.8,
    "fractal_dimension": 0.25,
}  # fmt: skip
"""Upper bounds by what the measure can be, rounded generously; public, not read off the data."""


def breast_cancer_schema() -> TableSchema:
    """The built-in schema of `sklearn:breast_cancer`."""
    columns = []
    for prefix, factor in (("mean_", 1.0), ("", 0.5), ("worst_", 1.0)):
        for measure, maximum in _BREAST_CANCER_MAXIMA.items():
            name = f"{prefix}{measure}" if prefix else f"{measure}_error"
            columns.append({"name": name, "kind": "numeric", "bounds": [0.0, maximum * factor]})
    columns.append(
        {"name": "diagnosis", "kind": "categorical", "categories": ["malignant", "benign"]}
    )
    schema = parse_schema({"label": "diagnosis", "column": columns}, "sklearn:breast_cancer")
    return _table(schema)


MODALITY = Modality(read, clean, values, take, identities, encode, decode)
