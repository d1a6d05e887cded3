"""A table as it is found, before anything is declared of it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from .clean import DataError
from .guess import LeftOut
from .schema import repeated
from .tabular import as_text, is_number, named, read_parquet, read_rows, separator_hint, table_path
from .words import MARKERS


@dataclass(frozen=True)
class Sheet:
    """A table as it is found: `frame` [N] strings, whether a header named them, broken lines."""

    frame: pl.DataFrame
    header: bool
    broken: int
    odd: tuple[LeftOut, ...] = ()


def read_sheet(source: str) -> Sheet:
    """Reads a table without a schema; a line of another number of fields than most is broken.

    Raises:
        DataError: It cannot be read, or holds no records.
    """
    path = table_path(source)
    sheet = _parquet_sheet(path) if path.suffix.lower() == ".parquet" else _text_sheet(path)
    if not sheet.frame.height:
        raise DataError(f"data.source = {source}: holds no records; check the file")
    return sheet


def _parquet_sheet(path: Path) -> Sheet:
    frame = read_parquet(path)
    columns, odd = [], []
    for name in frame.columns:
        try:
            columns.append(as_text(frame[name]))
        except pl.exceptions.PolarsError:
            odd.append(LeftOut(name, "it holds no plain values"))
    if not columns:
        raise DataError(f"data.source = {path}: holds no column of plain values")
    return _without_nameless(Sheet(pl.DataFrame(columns), True, 0, tuple(odd)))  # noqa: FBT003


def _text_sheet(path: Path) -> Sheet:
    rows = read_rows(path)
    if any("\0" in cell for row in rows for cell in row):
        raise DataError(f"data.source = {path}: is no text in UTF-8; save it as such")
    if not rows:
        raise DataError(f"data.source = {path}: holds no records; check the file")
    width = Counter(map(len, rows)).most_common(1)[0][0]
    if width <= 1 and (hint := separator_hint(rows[0])):
        raise DataError(f"data.source = {path}: has one column{hint}")
    header = len(rows[0]) == width and _is_header(rows[0], rows[1:])
    names = [f"column_{place}" for place in range(1, width + 1)]
    if header:
        names = named(rows.pop(0))
        if (twice := repeated(names)) is not None:
            raise DataError(f"data.source = {path}: column {twice!a} is there twice; rename one")
    whole = [row for row in rows if len(row) == width]
    frame = pl.DataFrame(whole, schema=dict.fromkeys(names, pl.String), orient="row")
    return _without_nameless(Sheet(frame, header, len(rows) - len(whole)))


def _without_nameless(sheet: Sheet) -> Sheet:
    """A column that has no name cannot be declared; row numbers often have none."""
    blank = [name for name in sheet.frame.columns if not name.strip()]
    nameless = (LeftOut("", "it has no name; give it one if the model needs it"),) * bool(blank)
    return replace(sheet, frame=sheet.frame.drop(blank), odd=(*sheet.odd, *nameless))


def _is_header(first: Sequence[str], others: Iterable[Sequence[str]]) -> bool:
    """Whether a line names what stands below it: words, none of which stands there again."""
    names = [name.strip() for name in first]
    if any(name in MARKERS or is_number(name) for name in names) or not any(names):
        return False
    return not any(
        name and name == cell.strip()
        for row in others
        for name, cell in zip(names, row, strict=False)
    )
