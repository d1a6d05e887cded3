"""Charts as plain coordinates: what a template needs to draw them, and nothing it must compute."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

Point = tuple[float, float]

WIDTH, HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40
_MOST_POINTS = 400
_FLAT = 1e-9  # a smaller range is none
_NOISES = 2  # a band is two standard deviations each way


@dataclass(frozen=True)
class Series:
    """What one line of a chart says.

    Attributes:
        name: For the legend.
        points: (round, value), ascending.
        noise: Standard deviation of each value; empty where there is none.
        dashed: Whether it is a limit or a floor rather than a finding.
        stepped: Whether a value holds until the next one.
        marked: Whether each point is a finding of its own.
    """

    name: str
    points: tuple[Point, ...]
    noise: tuple[float, ...] = ()
    dashed: bool = False
    stepped: bool = False
    marked: bool = False


@dataclass(frozen=True)
class Tick:
    """A label of an axis and where it stands, in the chart's own units."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A series as it is drawn; `path` and `band` are SVG path data."""

    name: str
    hue: int
    path: str
    band: str
    marks: tuple[Point, ...]
    dashed: bool


@dataclass(frozen=True)
class Chart:
    """A line chart, laid out.

    Attributes:
        title: What it shows.
        summary: The same in words, for whoever does not see it.
        x: Ticks below it.
        y: Ticks left of it.
        lines: One a series; a dashed one has the hue of the line that stands before it.
    """

    title: str
    summary: str
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    lines: tuple[Line, ...]
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM
    width: int = WIDTH
    height: int = HEIGHT


def line_chart(
    title: str,
    series: Sequence[Series],
    rounds: int,
    *,
    within: tuple[float, float] | None = None,
    holds: Sequence[float] = (),
) -> Chart:
    """Lays out series over rounds, with bands of two standard deviations of their noise.

    Args:
        title: What it shows.
        series: At least one, each with a point at least.
        rounds: Where the axis of rounds ends, all of the run's.
        within: The range that values can have: nothing is drawn outside it.
        holds: Values that the axis must have on it.
    """
    thin = [_thinned(one) for one in series]
    x_ticks = _ticks(0.0, float(rounds), whole=True)
    low, high = _range(thin, within, holds)
    y_ticks = _ticks(low, high)
    scale = _Scale(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    hues = [sum(not one.dashed for one in thin[: i + 1]) for i in range(len(thin))]
    digits = max(0, -math.floor(math.log10(y_ticks[1] - y_ticks[0])))
    return Chart(
        title,
        "; ".join(_in_words(one) for one in series),
        tuple(Tick(scale.x(at), f"{at:g}") for at in x_ticks),
        tuple(Tick(scale.y(at), f"{at:.{digits}f}") for at in y_ticks),
        tuple(_line(one, hue, scale) for one, hue in zip(thin, hues, strict=True)),
    )


@dataclass(frozen=True)
class _Scale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        part = (value - self.x_low) / (self.x_high - self.x_low)
        return round(_LEFT + part * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        part = (value - self.y_low) / (self.y_high - self.y_low)
        # What does not fit ends at the frame.
        return round(HEIGHT - _BOTTOM - min(max(part, 0.0), 1.0) * (HEIGHT - _TOP - _BOTTOM), 1)


def _line(series: Series, hue: int, scale: _Scale) -> Line:
    points = [(scale.x(x), scale.y(y)) for x, y in series.points]
    band = ""
    if series.noise:
        pairs = list(zip(series.points, series.noise, strict=True))
        above = [(scale.x(x), scale.y(y + _NOISES * noise)) for (x, y), noise in pairs]
        below = [(scale.x(x), scale.y(y - _NOISES * noise)) for (x, y), noise in pairs]
        band = _path([*above, *reversed(below)], stepped=False) + "Z"
    marks = tuple(points) if series.marked else ()
    path = _path(points, stepped=series.stepped)
    return Line(series.name, hue, path, band, marks, series.dashed)


def _path(points: Sequence[Point], *, stepped: bool) -> str:
    parts = [f"M{points[0][0]} {points[0][1]}"]
    for x, y in points[1:]:
        parts.append(f"H{x}V{y}" if stepped else f"L{x} {y}")
    return "".join(parts)


def _thinned(series: Series) -> Series:
    """At most some hundred points of a long run, the first, the last and every low among them."""
    points = series.points
    if series.stepped:
        changes = (b for a, b in pairwise(points[:-1]) if a[1] != b[1])
        points = (points[0], *changes, *points[1:][-1:])
    if len(points) <= _MOST_POINTS:
        return replace(series, points=points)
    size = math.ceil(len(points) / (_MOST_POINTS - 2))
    inner = range(1, len(points) - 1, size)
    lowest = [min(points[i : min(i + size, len(points) - 1)], key=lambda p: p[1]) for i in inner]
    return Series(series.name, (points[0], *lowest, points[-1]), (), series.dashed, series.stepped)


def _range(
    series: Sequence[Series], within: tuple[float, float] | None, holds: Sequence[float]
) -> tuple[float, float]:
    """Lowest and highest value with their bands."""
    ends = [*holds]
    for one in series:
        noises = one.noise or [0.0] * len(one.points)
        for (_, y), noise in zip(one.points, noises, strict=True):
            ends += [y - _NOISES * noise, y + _NOISES * noise]
    low, high = min(ends), max(ends)
    if within is not None:
        low, high = max(low, within[0]), min(high, within[1])
    return low, high


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Some five round numbers that hold a range between them: steps of 1, 2 or 5 times a power."""
    size = max(abs(low), abs(high))
    if high - low <= _FLAT * max(size, 1.0):
        pad = size / 10 if size > _FLAT else 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def _in_words(series: Series) -> str:
    (first, begin), (last, end) = series.points[0], series.points[-1]
    if first == last or series.dashed:
        return f"{series.name}: {end:.4g}"
    return f"{series.name}: {begin:.4g} at round {first:g}, {end:.4g} at round {last:g}"
