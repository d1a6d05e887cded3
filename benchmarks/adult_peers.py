"""Peers on Adult: centralised synthesizers with the pooled records, in an environment of their own.

All get the same declared domain and spend nothing on finding it. Those that know no numbers get
equal parts of a number's encoded range, or its values where they are as few, and what they return
is spread evenly over the part.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from adult_scores import as_encoded

from fedveil.data_prep import Encoded, modality
from fedveil.data_prep.clean import bounds
from fedveil.data_prep.schema import Block, TableSchema

SMARTNOISE = "smartnoise-synth==1.0.8"
WITH = ("torch==2.13.0", "numpy<2.3", "mbi==1.1.0", "setuptools<80", "packaging")
"""What it runs with here; it declares no upper bounds."""
PARTS = 30
"""Equal parts of a number's range; a multiple of the ten that distances are measured in."""
PEER = Path(__file__).with_name("adult_peer.py")


@dataclass(frozen=True)
class Order:
    """What is asked of a peer.

    Attributes:
        peer: Its name, as its library has it.
        epsilon: Its budget, with `delta`.
        delta: See `epsilon`.
        seed: Of all that it draws but its noise, which may be secret.
        limit: Seconds after which it is given up.
    """

    peer: str
    epsilon: float
    delta: float
    seed: int
    limit: float


@dataclass(frozen=True)
class Found:
    """What a peer made, or why there is nothing.

    Attributes:
        records: Encoded as real ones are.
        seconds: Of fitting and sampling.
        fault: One line; "" where there is none.
    """

    records: Encoded | None
    seconds: float = 0.0
    fault: str = ""


def environment() -> Path | None:
    """The Python of an environment that has the peers and nothing of the project, if there is any.

    Without a network there is none, and one line says so.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "fedveil-benchmarks" / SMARTNOISE.replace("==", "-")
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists():
        return python
    make = [sys.executable, "-m", "venv", "--clear", str(folder)]
    install = [str(python), "-I", "-m", "pip", "install", "--quiet", SMARTNOISE, *WITH]
    try:
        for command in (make, install):
            subprocess.run(command, check=True, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"peers: left out, {SMARTNOISE} cannot be installed: {error}", file=sys.stderr)
        return None
    ready.touch()
    return python


def run(python: Path, order: Order, records: Encoded, schema: TableSchema, scratch: Path) -> Found:
    """As many synthetic records as there are real ones, or why there are none."""
    given, found = scratch / "given.npz", scratch / "found.npz"
    found.unlink(missing_ok=True)
    levels = [
        *(_levels(block, whole=order.peer.endswith("gan")) for block in schema.blocks),
        len(schema.classes),
    ]
    np.savez(given, table=_table(records, schema, levels), levels=levels)
    numbers = [str(number) for number in (order.epsilon, order.delta, order.seed)]
    command = [str(python), "-I", str(PEER), order.peer, *numbers, str(given), str(found)]
    try:
        done = subprocess.run(
            command, check=False, timeout=order.limit, text=True, capture_output=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Found(None, order.limit, f"did not end within {order.limit:.0f} s")
    if done.returncode or not found.exists():
        return Found(None, 0.0, (done.stderr.strip().splitlines() or ["no message"])[-1])
    with np.load(found) as opened:
        table, seconds = opened["table"], float(opened["seconds"])
    drawn = _encoded(table, schema, levels, np.random.default_rng(order.seed))
    return Found(as_encoded(modality(schema).decode(drawn, schema), schema), seconds)


def _levels(block: Block, *, whole: bool) -> int:
    """Codes of a column; 0 for a number that is left whole."""
    column = block.column
    if column.kind == "categorical":
        return column.levels
    if column.nullable:
        raise ValueError(f'column "{column.name}": peers get no numbers that may be missing')
    low, high = bounds(column)
    if whole:
        return 0
    few = column.kind == "integer" and column.transform == "none" and high - low < PARTS - 1
    return int(high - low) + 1 if few else PARTS


def _table(records: Encoded, schema: TableSchema, levels: list[int]) -> np.ndarray:
    columns = []
    for block, n in zip(schema.blocks, levels[:-1], strict=True):
        part = records.x[:, block.start : block.stop]
        if block.column.kind == "categorical":
            columns.append(part.argmax(axis=1))
        elif n == 0:
            columns.append(part[:, 0])
        elif n < PARTS:
            columns.append(np.rint(part[:, 0] * (n - 1)))
        else:
            columns.append(np.floor(part[:, 0] * n).clip(0, n - 1))
    return np.column_stack([*columns, records.y]).astype(np.float64)


def _encoded(
    table: np.ndarray, schema: TableSchema, levels: list[int], rng: np.random.Generator
) -> Encoded:
    x = np.zeros((len(table), schema.width), np.float32)
    for column, block, n in zip(table.T, schema.blocks, levels[:-1], strict=False):
        if block.column.kind == "categorical":
            x[np.arange(len(x)), block.start + column.astype(np.int64)] = 1
        elif n == 0:
            x[:, block.start] = column.clip(0, 1)
        elif n < PARTS:
            x[:, block.start] = column / (n - 1)
        else:
            x[:, block.start] = (column + rng.random(len(x))) / n
    return Encoded(x, table[:, -1].astype(np.int64))
