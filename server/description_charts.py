"""The facts of a federation's data (`description.describe`) laid out for a page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .bars import WIDTH, Box
from .intervals import BELOW, FEW

_ROW, _THICK = 30, 8  # of lying bars
_MOST_ROWS = 12
_MOST_PAIRS = 20
_STRIP = 140  # width of a number's strip
_SIDES = (14, 40)  # of a heat map's cell, at least and at most
_ROOM = 600  # for a heat map's cells
_PRINTED = 28  # in cells of this side the value is printed
_NAME = 190  # room for a column's name

_SHORT = {BELOW: "below the noise", FEW: FEW}

Fact = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """A category: its share with its interval, in words and in short, and where that is drawn."""

    name: str
    words: str
    short: str
    told: str
    bar: Box
    line: Box


@dataclass(frozen=True)
class Groups:
    """A column's categories: the largest, how many more there are, how many say nothing."""

    column: str
    shown: tuple[Group, ...]
    more: int
    untold: int
    count: int
    height: int
    width: int = WIDTH


@dataclass(frozen=True)
class Number:
    """A number's range: declared, quantiles with their intervals, and a strip (0 to `width`)."""

    column: str
    declared: str
    quantiles: tuple[tuple[str, str], ...]
    whisker: tuple[float, float]
    box: tuple[float, float]
    median: float
    words: str
    width: int = _STRIP


@dataclass(frozen=True)
class Square:
    """A cell of the heat map; `share` is how much of the colour it has, none where noise hides."""

    x: float
    y: float
    share: float | None
    words: str
    text: str


@dataclass(frozen=True)
class HeatMap:
    """A lower triangle: a column's name ends its row, and its cells hang below the name."""

    side: int
    names: tuple[tuple[float, float, str], ...]
    squares: tuple[Square, ...]
    words: str
    width: int
    height: int


@dataclass(frozen=True)
class Pair:
    """Two columns and how strongly they go together."""

    names: str
    value: str
    interval: str
    floor: str


@dataclass(frozen=True)
class Federation:
    """What the page says of the federation's data.

    Attributes:
        epsilon: Of the release, if it is known.
        unit: What was hidden.
        units: Declared number of them.
        table: Whether the records have columns.
        level: Of the intervals, in percent.
        total: Records as noised, with their interval; empty if not asked.
        classes: Of the label.
        missing: Column, share, interval, why it says nothing, width of its bar in percent.
        columns: How many there are.
        numbers: With their quantiles.
        groups: Of categorical columns but the label.
        characters: Kinds of characters in texts.
        heat: Of the pairs that were asked; none where there are none.
        strongest: Those clear of the noise, by the lower end of their interval.
        clear: How many are.
        pairs: How many were asked.
    """

    epsilon: float | None
    unit: str
    units: float
    table: bool
    level: float
    total: tuple[str, str] | None
    classes: Groups | None
    missing: tuple[tuple[str, str, str, str, float], ...]
    columns: int
    numbers: tuple[Number, ...]
    groups: tuple[Groups, ...]
    characters: Groups | None
    heat: HeatMap | None
    strongest: tuple[Pair, ...]
    clear: int
    pairs: int


def federation(facts: Fact) -> Federation:
    """Lays out what `statistics.json` holds.

    Raises:
        LookupError, TypeError, ValueError: It is none of ours.
    """
    columns, pairs = facts.get("columns", []), facts.get("pairs", [])
    total = facts.get("total")
    groups: dict[str | None, Groups] = {c["name"]: _groups(c) for c in columns if "levels" in c}
    label = next((c["name"] for c in columns if c["label"]), None)
    text = next((c["name"] for c in columns if c["kind"] == "text"), None)
    clear = sorted((p for p in pairs if not p["told"]), key=lambda p: -p["low"])
    missing = sorted((c for c in columns if "missing" in c), key=lambda c: -c["missing"]["value"])
    return Federation(
        epsilon=facts.get("epsilon"),
        unit=str(facts.get("unit", "record")),
        units=float(facts["units"]),
        table=facts["modality"] == "table",
        level=100 * float(facts["interval"]["level"]),
        total=(_count(total["value"]), f"{_count(total['low'])} to {_count(total['high'])}")
        if total
        else None,
        classes=groups.pop(label, None),
        characters=groups.pop(text, None),
        missing=tuple(_missing(column) for column in missing),
        columns=len(columns),
        numbers=tuple(_number(column) for column in columns if "quantiles" in column),
        groups=tuple(groups.values()),
        heat=_heat([column["name"] for column in columns], pairs, clear) if pairs else None,
        strongest=tuple(_pair(pair) for pair in clear[:_MOST_PAIRS]),
        clear=len(clear),
        pairs=len(pairs),
    )


def _missing(column: Fact) -> tuple[str, str, str, str, float]:
    share = column["missing"]
    value, interval = _percents(share)
    return column["name"], value, interval, share["told"], round(100 * share["value"], 1)


def _groups(column: Fact) -> Groups:
    levels = column["levels"]
    order = sorted(range(len(levels)), key=lambda i: (-levels[i]["value"], i))
    kept = sorted(order[:_MOST_ROWS]) if len(levels) > _MOST_ROWS else range(len(levels))
    shown = [levels[i] for i in kept]
    top = min(1.0, 1.05 * max([0.01, *(level["high"] for level in shown)]))
    return Groups(
        column["name"],
        tuple(_group(level, place, top) for place, level in enumerate(shown)),
        len(levels) - len(shown),
        sum(bool(level["told"]) for level in levels),
        len(levels),
        _ROW * len(shown),
    )


def _group(level: Fact, place: int, top: float) -> Group:
    y = _ROW * place + 17
    value, low, high = (WIDTH * min(level[k] / top, 1.0) for k in ("value", "low", "high"))
    bar = Box(0.0, y, round(value, 1), _THICK)
    line = Box(round(low, 1), y, round(high - low, 1), _THICK)
    told, (share, interval) = level["told"], _percents(level)
    words = f"{level['name']}: {share} ({interval}){', ' if told else ''}{told}"
    short = _SHORT.get(told, f"{share} ({interval.removesuffix(' %').replace(' to ', '-')})")
    return Group(level["name"], words, short, told, bar, line)


def _number(column: Fact) -> Number:
    found = {one["part"]: one for one in column["quantiles"]}
    low, high = column["declared"]
    bend = math.log1p if column.get("transform") == "log1p" else float

    def at(part: float) -> float:
        share = (bend(found[part]["value"]) - bend(low)) / (bend(high) - bend(low))
        return round(_STRIP * min(max(share, 0.0), 1.0), 1)

    quantiles = [(_figure(q["value"]), _between(q)) for q in column["quantiles"]]
    parts = zip(found, quantiles, strict=True)
    return Number(
        column["name"],
        f"{_figure(low)} to {_figure(high)}" + (", log scale" if bend is math.log1p else ""),
        tuple(quantiles),
        (at(0.05), at(0.95)),
        (at(0.25), at(0.75)),
        at(0.5),
        "; ".join(f"{part:.0%} below {value}" for part, (value, _) in parts),
    )


def _heat(names: Sequence[str], pairs: Sequence[Fact], clear: Sequence[Fact]) -> HeatMap:
    least, most = _SIDES
    side = min(max(_ROOM // len(names), least), most)
    places = {name: place for place, name in enumerate(names)}
    squares = []
    for pair in pairs:
        row, column = sorted((places[name] for name in pair["columns"]), reverse=True)
        share = None if pair["told"] else float(pair["value"])
        text = _printed(pair) if share is not None and side >= _PRINTED else ""
        words = f"{' and '.join(pair['columns'])}: {_in_words(pair)}"
        squares.append(Square(column * side, row * side, share, words, text))
    labels = [(side * i + 6.0, side * i + side / 2 + 4, name) for i, name in enumerate(names)]
    strongest = "; ".join(f"{' and '.join(p['columns'])} {p['value']:.2f}" for p in clear[:5])
    words = f"{len(clear)} of {len(pairs)} pairs of columns are clear of the noise"
    words += f". Strongest: {strongest}" if strongest else ""
    width, height = side * len(names) + _NAME, side * len(names)
    return HeatMap(side, tuple(labels), tuple(squares), words, width, height)


def _printed(pair: Fact) -> str:
    """To two places, with a question mark where the interval is wider than the value."""
    wide = bool(pair["high"] - pair["low"] > pair["value"])
    return f"{pair['value']:.2f}".removeprefix("0") + "?" * wide


def _in_words(pair: Fact) -> str:
    if "value" not in pair:
        return str(pair["told"])
    said = f"{pair['value']:.2f} ({pair['low']:.2f} to {pair['high']:.2f})"
    return f"{said}, {pair['told']}" if pair["told"] else said


def _pair(pair: Fact) -> Pair:
    between = f"{pair['low']:.2f} to {pair['high']:.2f}"
    return Pair(" and ".join(pair["columns"]), f"{pair['value']:.2f}", between, _rough(pair))


def _rough(pair: Fact) -> str:
    return f"{pair['floor']:.2f}" if pair["floor"] >= 0.005 else "below 0.01"


def _percents(share: Fact) -> tuple[str, str]:
    """A share and its interval; small ones have a digit more."""
    digits = 2 if share["high"] < 0.01 else 1
    value, low, high = (f"{100 * share[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} %", f"{low} to {high} %"


def _between(quantile: Fact) -> str:
    return f"{_figure(quantile['low'])} to {_figure(quantile['high'])}"


def _figure(value: float) -> str:
    return f"{value:,.5g}" if abs(value) < 1e5 else f"{value:,.0f}"


def _count(value: float) -> str:
    return f"{value:,.0f}"
