"""What a file of texts seems to hold, for a person to confirm."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .clean import DataError
from .schema import TextSchema
from .texts import objects, text_files, text_path

_COMMON = 0.5  # a key of fewer lines is none
_WHOLE = 0.9  # so many records fit into the drafted length
_KEYS = 3


@dataclass(frozen=True)
class Found:
    """Texts as they are found.

    Attributes:
        length: Bytes of a record.
        field: The key of the text in a line.
        keys: Other keys that lines have: one may be a person's.
        read_off: Which of these were read off the data.
    """

    length: int
    field: str
    keys: tuple[str, ...] = ()
    read_off: tuple[str, ...] = ()


def find_texts(source: str) -> Found:
    """Looks at a .jsonl; of a plain text nothing need be known but that it is there.

    Raises:
        DataError: It cannot be read, or no line of it is an object with a text.
    """
    path = text_path(source)
    default = TextSchema()
    if path.suffix.lower() == ".jsonl":
        return _in_lines(path, default)
    if not text_files(path):
        raise DataError(f"data.source = {source}: holds no .txt")
    return Found(default.length, default.field)


def _in_lines(path: Path, default: TextSchema) -> Found:
    lines = [line for line in objects(path) if line is not None]
    keys = Counter(key for line in lines for key in line if key)
    sizes: dict[str, list[int]] = defaultdict(list)
    for line in lines:
        for key, value in line.items():
            if key and isinstance(value, str):
                sizes[key].append(len(value.encode(errors="replace")))
    texts = [key for key in sizes if len(sizes[key]) >= _COMMON * len(lines)]
    if not texts:
        raise DataError(f"data.source = {path}: no line is a JSON object with a text")
    longest = max(texts, key=lambda key: (sum(sizes[key]), key))
    field = default.field if default.field in texts else longest
    # The next power of two: rounded, it shows less of any one record.
    whole = float(np.quantile(sizes[field], _WHOLE))
    length = min(max(2 ** int(np.ceil(np.log2(max(whole, 1)))), 4), 4096)
    others = tuple(key for key, _ in keys.most_common() if key != field)[:_KEYS]
    return Found(length, field, others, ("length", "field"))
