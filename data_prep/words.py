"""How values of a data set are quoted in a line for people, and which name was meant."""

import difflib
from collections.abc import Iterable

MARKERS = (
    "?", "-", "--", ".", "NA", "N/A", "n/a", "na", "#N/A", "NaN", "nan", "NULL", "Null", "null",
)  # fmt: skip
"""What people write for a missing value, and hardly ever for anything else."""

_SHOWN = 40


def near(word: str, choices: Iterable[str]) -> str | None:
    """The choice most like a word, whatever its case; `None` if none is."""
    folded: dict[str, str] = {}
    for choice in choices:
        folded.setdefault(choice.casefold(), choice)
    close = difflib.get_close_matches(word.casefold(), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of an error line that names a near choice; nothing if there is none."""
    found = near(word, choices)
    return "" if found is None else f"; did you mean {quoted(found)}?"


def quoted(text: str) -> str:
    """A value as a TOML string on one line, with nothing in it that a terminal would obey."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else _escape(c) for c in escaped) + '"'


def shown(text: str) -> str:
    """As `quoted`, cut off where it is long."""
    return quoted(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
