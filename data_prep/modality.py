"""What every modality offers: seven functions over its own kind of raw records."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Encoded(NamedTuple):
    """Records as numbers: x [N, ...] float32 in [0, 1], y [N] int64 (0 without classes)."""

    x: np.ndarray
    y: np.ndarray

    def take(self, rows: np.ndarray) -> "Encoded":
        """The given rows."""
        return Encoded(self.x[rows], self.y[rows])


@dataclass(frozen=True)
class Modality:
    """One kind of data. `Any` stands for its records: a polars frame, an `Images`.

    Attributes:
        read: (source, schema, columns) -> raw records; `columns` says what a table's columns are
            called at this site. Raises DataError.
        clean: (raw, schema, rules) -> cleaned records and report, record by record.
        values: (raw, schema, column) -> one column as strings, for a simulation's sharing-out.
        take: (raw, rows) -> the given records.
        identities: (cleaned, schema) -> what decides each record's side of the split.
        encode: (cleaned, schema) -> numbers, in the schema's layout.
        decode: (encoded, schema) -> records as people read them.
    """

    read: Callable[..., Any]
    clean: Callable[..., Any]
    values: Callable[..., list[str]]
    take: Callable[[Any, np.ndarray], Any]
    identities: Callable[..., list[bytes]]
    encode: Callable[..., Encoded]
    decode: Callable[..., Any]
