"""What a report shows: charts by round, the last figures in words, every column's marginals."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data_prep.queries.cells import Cells
from ..data_prep.schema import Schema
from ..models import histograms, metrics
from .bars import Histogram, Shares, histogram
from .charts import Chart, Series, line_chart
from .evaluation import Evaluated
from .history import History


@dataclass(frozen=True)
class Figure:
    """An accounted figure of the last evaluation, and what it is in a sentence."""

    name: str
    value: float
    noise: float | None
    floor: float | None
    words: str
    drowned: bool


def epsilon_chart(told: History) -> tuple[Chart, ...]:
    """What was spent by round, below its limit; none without a mechanism."""
    spent = [(r.number, r.epsilon) for r in told.rounds if r.epsilon is not None]
    if not spent:
        return ()
    target = float(told.privacy["target_epsilon"])
    ends = ((0.0, target), (float(told.planned), target))
    series = [
        Series("spent", ((0.0, 0.0), *spent), stepped=True),
        Series("limit", ends, dashed=True),
    ]
    return (line_chart("Epsilon spent by round", series, told.planned),)


_GROUPS = {
    "loss": ("Loss", None),
    "training_loss": ("Loss", None),
    "bits_per_character": ("Bits a character", None),
    "tv": ("Total variation: real against synthetic", (0.0, 1.0)),
    "accuracy": ("Accuracy: trained on synthetic, tested on real", (0.0, 1.0)),
    "auroc": ("AUROC: trained on synthetic, tested on real", (0.0, 1.0)),
}


def quality_charts(told: History) -> list[Chart]:
    """A chart for each kind of figure."""
    grouped: dict[str, list[Series]] = {}
    ranges: dict[str, tuple[float, float] | None] = {}
    names = {name: None for found in told.evaluations.values() for name in found}
    for name in names:
        title, ranges_of = _GROUPS.get(_kind(name), (name, None))
        ranges[title] = ranges_of
        grouped.setdefault(title, []).extend(_series(name, told))
    return [line_chart(t, s, told.planned, within=ranges[t]) for t, s in grouped.items() if s]


def _series(name: str, told: History) -> list[Series]:
    found = [(n, of[name]) for n, of in told.evaluations.items() if name in of]
    found = [(n, one) for n, one in found if math.isfinite(one["value"])]
    if not found:
        return []
    noise = tuple(one["noise"] for _, one in found)
    points = tuple((float(n), one["value"]) for n, one in found)
    series = [Series(_label(name), points, noise, marked=True)]
    if all("floor" in one for _, one in found):
        floor = tuple((float(n), one["floor"]) for n, one in found)
        series.append(Series(f"its floor ({_label(name)})", floor, dashed=True))
    return series


def _kind(name: str) -> str:
    if name.startswith("tstr_"):
        return name.split("_")[1]
    return "tv" if name.endswith("_tv") else name


_CLASSIFIERS = {"logistic": "logistic regression", "mlp": "one hidden layer"}
_LABELS = {
    "loss": "held-out records",
    "training_loss": "training records",
    "bits_per_character": "held-out texts",
    "one_way_tv": "single columns",
    "two_way_tv": "pairs of columns",
}


def _label(name: str) -> str:
    if name.startswith("tstr_"):
        probe = name.split("_", 2)[2]
        return _CLASSIFIERS.get(probe, probe)
    return _LABELS.get(name, name)


_WORDS = {
    "loss": "The mean negative score of held-out records under the model, clipped to public "
    "bounds. Lower is better; only its course within one run can be compared.",
    "training_loss": "The same of training records: far below the held-out one, the model would "
    "have learnt records by heart.",
    "bits_per_character": "The loss in bits, over the number of bytes of a text: how well the "
    "model guesses the next byte. 8 is no guess at all; English takes some 4.8 by its letters.",
    "one_way_tv": "How far the synthetic histogram of a column, or of a text's letters, is from "
    "the real one, the mean over columns: 0 is alike, 1 is nothing in common.",
    "two_way_tv": "The same of pairs of columns: whether what goes together does so in the "
    "synthetic records too.",
    "accuracy": "How often a classifier that has only seen synthetic records is right about real "
    "ones: 1 is always.",
    "auroc": "How often a classifier that has only seen synthetic records ranks two real ones of "
    "different classes rightly: 1 is always, 0.5 is a coin.",
}


def figure(name: str, found: Mapping[str, float]) -> Figure:
    """A figure with a sentence on what it is, and whether its noise lets it say anything."""
    kind = _kind(name)
    words = _WORDS.get(name) or _WORDS.get(kind, "An accounted figure of this run.")
    noise, floor = found["noise"], found.get("floor")
    # Two standard deviations each way then take up the whole range of 0 to 1.
    drowned = kind in {"tv", "accuracy", "auroc"} and noise > 0.25
    if floor is not None:
        drowned = found["value"] <= floor + 2 * noise
    return Figure(name, found["value"], noise, floor, words, drowned)


def marginals(
    schema: Schema | None,
    known: Evaluated | None,
    synthetic_counts: np.ndarray | None,
    privacy: Mapping[str, Any],
) -> tuple[tuple[Histogram, ...], float]:
    """Every column's shares, and how many records the real ones are of."""
    if schema is None:
        return (), 0.0
    columns = histograms.described(schema)
    real = synthetic = [np.zeros(0)] * len(columns)
    counted = scale = 0.0
    if known is not None and known.count and "one_way" in known.sums:
        counts = histograms.parted(known.sums["one_way"], schema)
        # Every column counts the same records: the mean of their totals has the least noise.
        counted = max(float(np.mean([column.sum() for column in counts])), 1.0)
        real = [histograms.nearest(column / counted) for column in counts]
        # Of one cell: joined histograms are scaled down by the root of their number.
        scale = metrics.noise_scale(privacy["evaluation_noise"], schema)
        scale *= math.sqrt(known.noises * len(columns)) / counted
        counted /= known.count
    if synthetic_counts is not None:
        synthetic = histograms.parted(synthetic_counts, schema)
    if not counted and synthetic_counts is None:
        return (), 0.0
    shares = zip(columns, real, synthetic, strict=True)
    return tuple(histogram(_shares(c, r, scale, s)) for c, r, s in shares), counted


def _shares(cells: Cells, real: np.ndarray, noise: float, synthetic: np.ndarray) -> Shares:
    return Shares(
        cells.column,
        cells.number,
        cells.names,
        tuple(real.tolist()),
        (noise,) * real.size,
        tuple(histograms.shares(synthetic).tolist()) if synthetic.size else (),
    )


def attendance(told: History) -> Chart | None:
    """How many sites' replies could be used, by round; `None` before the first."""
    if not told.rounds:
        return None
    points = tuple((float(one.number), float(one.sites)) for one in told.rounds)
    ends = ((0.0, float(told.sites)), (float(told.planned), float(told.sites)))
    series = [
        Series("usable replies", points, stepped=True),
        Series("sites", ends, dashed=True),
    ]
    return line_chart("Usable replies by round", series, told.planned, holds=(0.0,))
