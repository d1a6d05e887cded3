"""What is counted of texts: runs of one to four tokens, a record's counts clipped as a whole.

A record is read as start, its bytes, end; the end is counted of a record that is shorter than
`length`. Asked are single bytes, pairs of tokens, and where it pays runs of three and of four in
`CLASSES` public classes, the latter in cells of a public hash. Nothing of it is read off the data:
neither an alphabet nor a vocabulary.

"aaaa..." adds its length to a single cell. So the weighted counts of a record, of all lengths of
runs together, are clipped in L2, to half of what a record of `length` different ones would have:
for the ratio of signal to noise a small clipping norm is never worse, and most records then weigh
the same, short ones too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from ...config import ConfigError, Statistics
from ..modality import Encoded
from ..schema import PADDING, Schema, TextSchema, tokens_of
from .workload import Query, Workload, clipped_sum, rows_at_a_time

EDGE = PADDING
"""The token before the first and behind the last: a pair (EDGE, x) is the beginning of a record."""

TOKENS = PADDING + 1

_ALONE = (b" ", b"\n", b"0123456789", b"'", b",", b".", b";:", b"!?", b"-")
_HIGH = 11  # classes of the bytes above 127, by their low bits: of scripts other than Latin


def _classes() -> np.ndarray:
    """The class of each token: letters whatever their case, blanks, digits, marks, others."""
    found = np.full(TOKENS, 26 + len(_ALONE))
    letters = np.arange(26)
    found[ord("a") + letters] = found[ord("A") + letters] = letters
    for place, members in enumerate(_ALONE):
        found[list(members)] = 26 + place
    high = np.arange(128, 256)
    found[high] = 27 + len(_ALONE) + high % _HIGH
    found[EDGE] = 27 + len(_ALONE) + _HIGH
    return found


CLASS_OF = _classes()
"""[257] the class of each token; public."""

CLASSES = int(CLASS_OF.max()) + 1

CLASS_NAMES = (
    *map(chr, range(ord("a"), ord("z") + 1)), "blank", "line end", "digit", "'", ",", ".", "; :",
    "! ?", "-", "other below 128", *(f"above 127, kind {place}" for place in range(_HIGH)),
)  # fmt: skip
"""Of the classes of bytes: all but the last one, the edge's."""

HASHED = 2**14
"""Cells of runs of four."""

CLIP = 0.5
"""The clipping norm over that of a record of `length` different runs."""

_MEMORY = 16  # numbers, at most, that a place of a record takes while it is counted

_SHAPES = {
    "bytes": (TOKENS,),
    "pairs": (TOKENS, TOKENS),
    "triples": (CLASSES, CLASSES, CLASSES),
    "fours": (HASHED,),
}

# From so many units * sqrt(length) / noise multiplier on, these weights. Signal over noise decides
# how long runs may be; measured on plays, where a half or twice of one costs 0.02 bits a byte.
_WEIGHTS: tuple[tuple[float, Mapping[str, float]], ...] = (
    (8_000.0, {"bytes": 0.2, "pairs": 0.8, "triples": 1.0, "fours": 0.8}),
    (1_000.0, {"bytes": 0.3, "pairs": 0.8, "triples": 0.8}),
    (0.0, {"bytes": 0.4, "pairs": 1.0}),
)


@dataclass(frozen=True)
class Runs:
    """The runs of tokens of N records, one for each place that has one, [M] each.

    Attributes:
        record: Whose it is.
        tokens: [M, 4] three tokens before it, the furthest first, and the token itself.
    """

    record: np.ndarray
    tokens: np.ndarray


def workload(
    schema: Schema, options: Statistics, units: float, noise_multiplier: float
) -> Workload:
    """Runs of up to four tokens, the longer ones where signal and `options.max_cells` allow."""
    length = _text(schema).length
    signal = units * math.sqrt(length) / noise_multiplier if noise_multiplier else math.inf
    weights = next(weights for least, weights in _WEIGHTS if signal >= least)
    norm = CLIP * math.sqrt(length)
    queries: list[Query] = []
    cells = 0
    for name, weight in weights.items():
        query = Query(name, _SHAPES[name], norm, weight)
        cells += query.length
        if cells <= options.max_cells:
            queries.append(query)
        elif name in {"bytes", "pairs"}:
            least = math.prod(_SHAPES["bytes"]) + math.prod(_SHAPES["pairs"])
            raise ConfigError(
                f"statistics.max_cells = {options.max_cells}: must be at least {least} for texts"
            )
        else:
            break
    return Workload(tuple(queries))


def answers(
    asked: Workload, records: Encoded, schema: Schema, persons: np.ndarray | None = None
) -> np.ndarray:
    """The sum of the records' weighted counts, each record's, or person's, clipped.

    Formal guarantee: see `workload.clipped_sum`; it holds whatever the records are, for it is the
    weighted counts of all queries together that are clipped.
    """
    total = np.zeros(asked.length)
    each = _MEMORY * _text(schema).length
    for block in rows_at_a_time(len(records.x), each, persons):
        runs = runs_of(tokens_of(records.x[block]))
        cells = [query.weight * _counts(query.name, runs, len(block)) for query in asked.queries]
        whose = None if persons is None else persons[block]
        total += clipped_sum(sparse.csr_array(sparse.hstack(cells)), asked.norm, whose)
    return total


def runs_of(tokens: np.ndarray) -> Runs:
    """The runs of records [N, length]: all up to the first padding, which ends a record."""
    count, length = tokens.shape
    live = np.ones((count, length), dtype=bool)
    live[:, 1:] = np.logical_and.accumulate(tokens != PADDING, axis=1)[:, :-1]
    padded = np.concatenate([np.full((count, 3), EDGE), tokens], axis=1)
    found = np.stack([padded[:, place : place + length][live] for place in range(4)], axis=1)
    return Runs(np.nonzero(live)[0], found)


def hashed(run: np.ndarray) -> np.ndarray:
    """The cells of runs of four classes, [...] int64 each a number in base `CLASSES`: public.

    The finaliser of MurmurHash3 (Appleby, public domain), on 32 bits.
    """
    mixed = run.astype(np.uint64) & _WORD
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed ^= mixed >> np.uint64(shift)
        mixed = (mixed * np.uint64(factor)) & _WORD
    mixed ^= mixed >> np.uint64(16)
    found: np.ndarray = (mixed % np.uint64(HASHED)).astype(np.int64)
    return found


_WORD = np.uint64(0xFFFFFFFF)


def _counts(name: str, runs: Runs, count: int) -> sparse.csr_array:
    """[N, cells] how often each record has each run."""
    cells = _cells(name, runs.tokens)
    ones = np.ones(len(cells))
    shape = (count, math.prod(_SHAPES[name]))
    return sparse.csr_array(sparse.coo_array((ones, (runs.record, cells)), shape=shape))


def _cells(name: str, tokens: np.ndarray) -> np.ndarray:
    if name == "bytes":
        last: np.ndarray = tokens[:, 3]
        return last
    if name == "pairs":
        pairs: np.ndarray = tokens[:, 2] * TOKENS + tokens[:, 3]
        return pairs
    classes = CLASS_OF[tokens]
    triples: np.ndarray = (classes[:, 1] * CLASSES + classes[:, 2]) * CLASSES + classes[:, 3]
    return triples if name == "triples" else hashed(classes[:, 0] * CLASSES**3 + triples)


def _text(schema: Schema) -> TextSchema:
    if not isinstance(schema, TextSchema):
        raise TypeError("schema: is for no text")
    return schema
