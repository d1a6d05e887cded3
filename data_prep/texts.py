"""Texts: a plain text file, a folder of them, or a JSONL file; records are runs of bytes.

A plain text is cut into records at every `length` bytes from its start, whatever it says: cut by
its content, one byte more would move the ends of all that follow. A line of JSONL is one record,
cut off at `length` bytes. A token is a byte; 256 stands behind the end of a shorter record.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import Clean
from .clean import CleaningReport, ColumnReport, DataError
from .harmonise import NO_MAP, Columns, check_columns
from .modality import Encoded, Modality
from .schema import PADDING, Schema, TextSchema, tokens_of

ENDINGS = (".txt", ".jsonl")
_LONGEST_CHARACTER = 4  # bytes, in UTF-8
_MARK = "\ufeff"  # of byte order
# Control characters other than a tab and a line's end become blanks; a carriage return goes.
_MENDED = {code: " " for code in (*range(1, 32), 127) if chr(code) not in "\t\n"}
_MENDED |= {ord("\r"): "", ord(_MARK): ""}


@dataclass(frozen=True)
class Texts:
    """Raw records, or cleaned ones.

    Attributes:
        contents: [N] the bytes of each; `None` for a line that is no record.
        persons: [N] whose record each one is, "" where nobody says.
    """

    contents: tuple[bytes | None, ...]
    persons: tuple[str, ...]


def read(source: str, schema: Schema, columns: Columns = NO_MAP) -> Texts:
    """Reads a .txt, a folder of .txt, or a .jsonl.

    Raises:
        DataError: There is none, it cannot be read, or it does not say whose a record is and must.
        ConfigError: There are `columns`, which texts have not.
    """
    schema = _text(schema)
    check_columns(columns, schema)
    path = text_path(source)
    if path.suffix.lower() == ".jsonl":
        lines = [_line(line, schema) for line in _lines(path)]
        return Texts(tuple(text for text, _ in lines), tuple(person for _, person in lines))
    if schema.person is not None:
        raise DataError(
            f'data.source = {source}: plain text does not say whose it is, person = "'
            f'{schema.person}"; write .jsonl, a record a line'
        )
    chunks = [chunk for file in text_files(path) for chunk in _chunks(file, schema.length)]
    return Texts(tuple(chunks), ("",) * len(chunks))


def clean(raw: Texts, schema: Schema, rules: Clean) -> tuple[Texts, CleaningReport]:
    """Mends or drops records one by one.

    A character that a cut went through loses the bytes that are left of it; carriage returns and
    byte order marks are taken out, and other control characters but tabs and line ends become
    blanks. Dropped is what is not UTF-8 even so, what holds a byte of zero (no text does: it is
    UTF-16, or no text at all), what is empty and, where persons count, what is nobody's.
    """
    del rules  # they are for values of columns
    schema = _text(schema)
    blank, wrong, mended, nobody = 0, 0, 0, 0
    example: str | None = None
    contents: list[bytes] = []
    persons: list[str] = []
    for content, person in zip(raw.contents, raw.persons, strict=True):
        if content == b"":
            blank += 1
            continue
        text = None if content is None else _decoded(content)
        if text is None:
            wrong += 1
            example = example or ("not UTF-8" if content is not None else "no record of text")
            continue
        kept = text.translate(_MENDED)
        mended += kept != text
        nobody += schema.person is not None and not person
        if kept and (schema.person is None or person):
            contents.append(kept.encode())
            persons.append(person)
    columns = {"text": ColumnReport(type_errors=wrong, out_of_bounds=mended, example=example)}
    if schema.person is not None:
        columns["person"] = ColumnReport(missing=nobody)
    report = CleaningReport(len(raw.contents), blank, len(contents), columns, _ADVICE)
    return Texts(tuple(contents), tuple(persons)), report


_ADVICE = (
    "save it as UTF-8 (not UTF-16, and no binary file), or compare the lines of a .jsonl with the "
    "schema's field"
)


def values(raw: Texts, schema: Schema, column: str) -> list[str]:
    """The persons, the only column that texts may have."""
    if column != _text(schema).person:
        raise DataError(f'data.column = "{column}": texts have no column but the key of a person')
    return list(raw.persons)


def take(raw: Texts, rows: np.ndarray) -> Texts:
    """The given records."""
    places = rows.tolist()
    return Texts(
        tuple(raw.contents[row] for row in places), tuple(raw.persons[row] for row in places)
    )


def identities(cleaned: Texts, schema: Schema) -> list[bytes]:
    """What decides a record's side of the split: its person, else its text."""
    if _text(schema).person is not None:
        return [person.encode() for person in cleaned.persons]
    return [content or b"" for content in cleaned.contents]


def encode(cleaned: Texts, schema: Schema) -> Encoded:
    """Encodes texts: x [N, length] float32, token / 256, which is exact; y [N] zeros."""
    length = _text(schema).length
    contents = [(content or b"")[:length] for content in cleaned.contents]
    padded = b"".join(content.ljust(length, b"\0") for content in contents)
    tokens = np.frombuffer(padded, dtype=np.uint8).reshape(-1, length).astype(np.float32)
    ends = np.array([len(content) for content in contents], dtype=np.int64)
    tokens[np.arange(length) >= ends[:, None]] = PADDING
    return Encoded(tokens / np.float32(PADDING), np.zeros(len(contents), dtype=np.int64))


def decode(encoded: Encoded, schema: Schema) -> list[str]:
    """Turns encoded records into texts; bytes that are not UTF-8 are replaced."""
    _text(schema)
    rows = tokens_of(encoded.x)
    return [row[row < PADDING].astype(np.uint8).tobytes().decode(errors="replace") for row in rows]


def text_path(source: str) -> Path:
    """The file or folder of texts.

    Raises:
        DataError: There is none, or its ending is not a text's.
    """
    path = Path(source)
    if source.startswith("sklearn:"):
        raise DataError(f"data.source = {source}: is no text that is built in")
    if not path.is_dir():
        if path.suffix.lower() not in ENDINGS:
            raise DataError(
                f"data.source = {source}: must end in {' or '.join(ENDINGS)}, or be a folder of "
                ".txt files"
            )
        if not path.is_file():
            raise DataError(f"data.source = {source}: is no file; check the path")
    return path


def text_files(path: Path) -> list[Path]:
    """A plain text file, or those of a folder and the folders in it, in order."""
    if not path.is_dir():
        return [path]
    return sorted(p for p in path.rglob("*") if p.suffix.lower() == ".txt" and p.is_file())


def objects(path: Path) -> Iterable[dict[str, Any] | None]:
    """The objects of a .jsonl, `None` for a line that is none.

    Raises:
        DataError: It cannot be read.
    """
    return (_object(line) for line in _lines(path) if line.strip())


def _chunks(file: Path, length: int) -> list[bytes]:
    content = _content(file)
    return [content[start : start + length] for start in range(0, len(content), length)]


def _lines(path: Path) -> list[bytes]:
    lines = _content(path).split(b"\n")
    return lines[:-1] if lines[-1] == b"" else lines


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"data.source = {file}: cannot be read: {error.strerror}") from None


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _line(line: bytes, schema: TextSchema) -> tuple[bytes | None, str]:
    """What a line holds, cut off, and whose it is."""
    if not line.strip():
        return b"", ""
    found = _object(line)
    text = None if found is None else found.get(schema.field)
    if found is None or not isinstance(text, str):
        return None, ""
    try:
        content = text.encode()[: schema.length]
    except UnicodeEncodeError:  # half of a pair of surrogates
        return None, ""
    return content, "" if schema.person is None else _person(found.get(schema.person))


def _person(key: object) -> str:
    """A key as a string, so that 7 and "7" are one person; "" for what names nobody."""
    if isinstance(key, int) and not isinstance(key, bool):
        return str(key)
    text = key.strip() if isinstance(key, str) else ""
    return text if _writable(text) else ""


def _writable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decoded(content: bytes) -> str | None:
    """A record as text, without what a cut left of characters; `None` if it is none."""
    if b"\0" in content:
        return None
    start = 0
    while start < min(len(content), _LONGEST_CHARACTER - 1) and content[start] & 0xC0 == 0x80:
        start += 1
    content = content[start:]
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        # The last character may have been cut; what stands before it must be sound by itself.
        if error.reason != "unexpected end of data":
            return None
        return content[: error.start].decode()


def _text(schema: Schema) -> TextSchema:
    if not isinstance(schema, TextSchema):
        raise DataError(f"schema: is for a {schema.modality}, the source holds texts")
    return schema


MODALITY = Modality(read, clean, values, take, identities, encode, decode)
