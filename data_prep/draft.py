"""A draft of a schema, read off a table, images or texts, for a person to confirm.

Domains come from the declared schema, never silently from the data: so all that a draft took from
them is marked, and a run refuses a schema with a mark.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ..config import ConfigError
from . import held_by
from .clean import DataError, trimmed
from .draft_images import Found, find_images
from .draft_text import image_text, table_text, text_text
from .draft_texts import find_texts
from .guess import Guess, LeftOut, guess
from .schema import Column, ImageSchema, Schema, TableSchema, TextSchema, marks
from .sheet import Sheet, read_sheet
from .words import MARKERS, nearest, quoted

_LABELS = {"label", "class", "target", "outcome", "diagnosis", "response", "y"}
_LABEL_CLASSES = 20


@dataclass(frozen=True)
class Draft:
    """A drafted schema; as private as the data until a person confirmed it.

    Attributes:
        schema: What the text says.
        text: TOML, commented.
        left_out: Why a column is no part of it, by name.
        keys: Columns that may be the key of a person.
        notes: What a person should know beside it, a line each.
    """

    schema: Schema
    text: str
    left_out: dict[str, str]
    keys: tuple[str, ...]
    notes: tuple[str, ...]


def draft_schema(source: str, label: str | None = None) -> Draft:
    """Drafts the schema of a table (CSV, TSV, Parquet), of images (npz, folder) or texts.

    Args:
        source: The file or folder.
        label: The column that is the label; guessed without it.

    Raises:
        DataError: It cannot be read, or nothing in it can be drafted.
        ConfigError: `label` is no column that can be one.
    """
    path = Path(source)
    if source.startswith("sklearn:"):
        raise ConfigError(f"{source}: its schema is built in; leave data.schema out of the run")
    held = held_by(source)
    if held == "table":
        return _draft_table(source, label)
    if label is not None:
        why = "of images the class is the label" if held == "image" else "texts have none"
        raise ConfigError(f"--label {label}: is for tables; {why}")
    return _draft_texts(source) if held == "text" else _draft_images(find_images(path), path.name)


def _draft_texts(source: str) -> Draft:
    found = find_texts(source)
    schema = TextSchema(length=found.length, field=found.field, unconfirmed=found.read_off)
    return Draft(schema, text_text(schema, found.keys, Path(source).name), {}, found.keys, ())


def _draft_images(found: Found, name: str) -> Draft:
    read_off = ["height", "width", "channels"] + ["classes"] * bool(found.classes)
    read_off += ["images", "labels"][: len(found.arrays)]
    options = {
        "height": found.height,
        "width": found.width,
        "channels": found.channels,
        "classes": found.classes,
        "unconfirmed": read_off,
        **dict(zip(("images", "labels"), found.arrays, strict=False)),
    }
    schema = ImageSchema.model_validate(options)
    return Draft(schema, image_text(schema, name), {}, (), found.notes)


def _draft_table(source: str, label: str | None) -> Draft:
    sheet = read_sheet(source)
    _check_label(label, sheet.frame.columns)
    missing = _markers(sheet.frame)
    texts = [trimmed(sheet.frame[name], missing) for name in sheet.frame.columns]
    found = [*sheet.odd, *(guess(text, label=text.name == label) for text in texts)]
    guesses = [each for each in found if isinstance(each, Guess)]
    left_out = [each for each in found if isinstance(each, LeftOut)]
    _check_guesses(source, label, guesses, left_out)
    # A file without a header has all its columns declared: to leave one out, they need names.
    header = sheet.header or bool(left_out)
    columns = tuple(each.column for each in guesses)
    chosen = label or _likely_label(columns, sheet.frame.columns[-1])
    # A Parquet file names its columns by itself.
    read_off = ["missing"] + ["header"] * (Path(source).suffix.lower() != ".parquet")
    read_off += ["label"] * (label is None and chosen is not None)
    schema = TableSchema(
        column=columns, label=chosen, missing=missing, header=header, unconfirmed=tuple(read_off)
    )
    notes = _notes(sheet, header=header)
    text = table_text(schema, guesses, left_out, notes, Path(source).name)
    keys = tuple(each.name for each in left_out if each.key)
    return Draft(schema, text, {each.name: each.why for each in left_out}, keys, notes)


def _check_guesses(
    source: str, label: str | None, guesses: Sequence[Guess], left_out: Sequence[LeftOut]
) -> None:
    if why := next((each.why for each in left_out if each.name == label), None):
        raise ConfigError(f"--label {label}: cannot be a label: {why}")
    if not any(each.column.name != label for each in guesses):
        reasons = "".join(f"; column {quoted(each.name)}: {each.why}" for each in left_out[:3])
        beside = "" if label is None else " beside the label"
        raise DataError(f"data.source = {source}: no column can be drafted{beside}{reasons}")


def _markers(frame: pl.DataFrame) -> tuple[str, ...]:
    """The usual markers of a missing value that occur."""
    occur: set[str] = set()
    for series in frame:
        text = series.str.strip_chars()
        occur |= set(text.filter(text.is_in(list(MARKERS))).unique())
    return tuple(sorted(occur))


def _check_label(label: str | None, names: list[str]) -> None:
    if label is not None and label not in names:
        known = ", ".join(map(ascii, names[:8]))
        hint = nearest(label, names) or f"; the file has {known}"
        raise ConfigError(f"--label {label}: is no column of the file{hint}")


def _likely_label(columns: Sequence[Column], last: str) -> str | None:
    """The column that is called as labels are, or else the last one, if it can be a label."""
    likely = [
        c.name for c in columns if 2 <= len(c.categories) <= _LABEL_CLASSES and not c.nullable
    ]
    if len(columns) < 2:
        return None
    named = next((name for name in likely if name.casefold() in _LABELS), None)
    return named or (last if last in likely else None)


def _notes(sheet: Sheet, *, header: bool) -> tuple[str, ...]:
    notes = []
    if sheet.broken:
        notes.append("Some lines have another number of fields than most: they will be dropped.")
    if header and not sheet.header:
        notes.append(
            "The file has no header, but a column is left out: put the line "
            f"{','.join(sheet.frame.columns)} on its top, with names of your choice."
        )
    return tuple(notes)


def open_marks(schema: Schema) -> int:
    """How many options of a draft nobody confirmed yet."""
    return sum(len(names) for names in marks(schema).values())
