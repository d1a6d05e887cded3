"""A column's shares as bars: real ones (noised, with an interval) beside synthetic ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

WIDTH = 240
_HEIGHT, _TOP, _BOTTOM = 130, 14, 20  # of an upright histogram
_ROW, _THICK = 38, 7  # of lying bars
_MOST_ROWS = 12
_NOISES = 2  # an interval is two standard deviations each way


@dataclass(frozen=True)
class Shares:
    """What is known of one column.

    Attributes:
        column: Its name.
        ordered: Whether its cells are parts of a range.
        names: Of the cells, [cells].
        real: Shares of the real records, noised, [cells]; empty where none were counted.
        noise: The standard deviation of each of them.
        synthetic: Shares of synthetic records, [cells]; empty where there is no model.
    """

    column: str
    ordered: bool
    names: tuple[str, ...]
    real: tuple[float, ...] = ()
    noise: tuple[float, ...] = ()
    synthetic: tuple[float, ...] = ()


@dataclass(frozen=True)
class Box:
    """A rectangle, in the picture's own units."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Bar:
    """One cell: its name, what it says in words, and its bars, those that there are."""

    name: str
    words: str
    real: Box | None
    interval: Box | None
    synthetic: Box | None


@dataclass(frozen=True)
class Histogram:
    """A column's bars, laid out; `ends` are the first and the last cell of an upright one."""

    column: str
    upright: bool
    bars: tuple[Bar, ...]
    ends: tuple[str, str]
    top: float
    height: int
    width: int = WIDTH


def histogram(shares: Shares) -> Histogram:
    """Lays out a column: upright for a range, lying rows with their names for categories."""
    shown = shares if shares.ordered else _most(shares)
    tallest = max([0.01, *shown.real, *shown.synthetic])
    top = min(1.0, tallest * 1.2)
    bars = tuple(_bar(shown, index, top) for index in range(len(shown.names)))
    height = _HEIGHT if shown.ordered else _ROW * len(bars)
    # "0 to 10", ..., "90 to 100": the outer ends of the range.
    numbers = [name for name in shown.names if " to " in name] or [""]
    ends = (numbers[0].partition(" to ")[0], numbers[-1].partition(" to ")[2])
    return Histogram(shown.column, shown.ordered, bars, ends, top, height)


def _most(shares: Shares) -> Shares:
    """The largest categories of a column that has many, the others added up."""
    if len(shares.names) <= _MOST_ROWS:
        return shares
    weights = [
        max(part[index] for part in (shares.real, shares.synthetic) if part)
        for index in range(len(shares.names))
    ]
    order = sorted(range(len(weights)), key=lambda index: -weights[index])
    kept, rest = sorted(order[: _MOST_ROWS - 1]), order[_MOST_ROWS - 1 :]

    def gathered(part: Sequence[float]) -> tuple[float, ...]:
        return (*(part[i] for i in kept), sum(part[i] for i in rest)) if part else ()

    squares = gathered([noise**2 for noise in shares.noise])
    return replace(
        shares,
        names=(*(shares.names[i] for i in kept), f"{len(rest)} others"),
        real=gathered(shares.real),
        noise=tuple(map(math.sqrt, squares)),
        synthetic=gathered(shares.synthetic),
    )


def _bar(shares: Shares, index: int, top: float) -> Bar:
    place = _upright if shares.ordered else _lying
    cells, name = len(shares.names), shares.names[index]
    said, boxes = [], {}
    if shares.real:
        share, spread = shares.real[index], _NOISES * shares.noise[index]
        low, high = max(share - spread, 0.0), min(share + spread, 1.0)
        said.append(f"real {share:.1%} ({low:.1%} to {high:.1%})")
        boxes["real"] = place(index, cells, 0, 0.0, share / top)
        boxes["interval"] = place(index, cells, 0, low / top, min(high / top, 1.0))
    if shares.synthetic:
        said.append(f"synthetic {shares.synthetic[index]:.1%}")
        boxes["synthetic"] = place(index, cells, 1, 0.0, shares.synthetic[index] / top)
    words = f"{name}: {', '.join(said)}"
    return Bar(name, words, boxes.get("real"), boxes.get("interval"), boxes.get("synthetic"))


def _upright(index: int, cells: int, side: int, begin: float, end: float) -> Box:
    room, step = _HEIGHT - _TOP - _BOTTOM, WIDTH / cells
    each = step * 0.42
    x, y = step * index + step * 0.08 + side * each, _TOP + room * (1 - end)
    return Box(round(x, 1), round(y, 1), round(each, 1), round(room * (end - begin), 1))


def _lying(index: int, cells: int, side: int, begin: float, end: float) -> Box:
    del cells
    y = _ROW * index + 18 + side * (_THICK + 1)
    return Box(round(WIDTH * begin, 1), y, round(WIDTH * (end - begin), 1), _THICK)
