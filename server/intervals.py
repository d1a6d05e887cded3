"""What the noise of a mechanism leaves open about shares and quantiles.

The noise has a known standard deviation, so these intervals need nothing of the data but the noised
counts. They are of the noise alone: chance in who was recorded comes on top.
"""

import math
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""How often an interval holds what the counts would say without noise."""
Z = 1.959963984540054
"""So many standard deviations each way hold `LEVEL` of a normal distribution."""


@dataclass(frozen=True)
class Range:
    """A value and between what it may lie."""

    value: float
    low: float
    high: float

    @property
    def told(self) -> str:
        """Empty, or why the noise lets nothing be said of the value."""
        if self.low <= 0 < self.high:
            return BELOW
        return FEW if self.high - self.low > self.value else ""


BELOW = "below what the noise lets see"
"""The interval covers zero."""
FEW = "too few to tell"
"""The interval is wider than the value."""


def share_ranges(counts: np.ndarray, noise: np.ndarray) -> list[Range]:
    """Each cell's share of its column, by Fieller's interval for a ratio of normals.

    Both the cell and the total are noised, and the cell's noise is in both. The interval holds all
    shares p for which count - p * total is within 1.96 of its standard deviations of zero, so it
    covers at its level exactly where the noise is normal (Fieller 1954, section 2). A column whose
    total is itself within its noise says nothing: 0 to 1.

    Args:
        counts: [cells] noised.
        noise: [cells] standard deviations, independent of one another.

    Returns:
        One a cell; `low` may be below 0.
    """
    total, variance = float(counts.sum()), float((noise**2).sum())
    a = total**2 - Z**2 * variance
    if total <= 0 or a <= 0:
        return [Range(_within(c / total) if total > 0 else 0.0, 0.0, 1.0) for c in counts.tolist()]
    found = []
    for count, square in zip(counts.tolist(), (noise**2).tolist(), strict=True):
        b = count * total - Z**2 * square
        root = math.sqrt(max(b**2 - a * (count**2 - Z**2 * square), 0.0))
        low, high = (b - root) / a, (b + root) / a
        found.append(Range(_within(count / total), min(low, 1.0), _within(high)))
    return found


def quantile_cells(
    counts: np.ndarray, sizes: np.ndarray, coarse: float, fine: float, q: float
) -> tuple[int, int]:
    """First and last of a number's finer cells that may hold a quantile.

    A cell is left out where the noised counts speak against it: its lower edge is too high, or its
    upper edge too low, for a part `q` to lie below, each at half of what `LEVEL` leaves. The cell
    that holds the quantile without noise is thus left out at most so often, whatever the counts.

    Args:
        counts: [finer cells] noised, shifted within each cell so that they add up to its own count.
        sizes: [cells] int64, how many finer cells each has.
        coarse: Standard deviation of the noise of a cell.
        fine: That of a finer cell before it was shifted.
        q: Which part of the records lies below, 0 to 1.
    """
    total, whole = float(counts.sum()), len(sizes)
    if total <= Z * coarse * math.sqrt(whole):
        return 0, len(counts) - 1
    # Of each edge: how many more lie below it than a part q of all.
    excess = np.concatenate([[0.0], np.cumsum(counts)]) - q * total
    slack = Z * _edge_noise(sizes, coarse, fine, q) + 1e-9 * total
    held = np.flatnonzero((excess[:-1] <= slack[:-1]) & (excess[1:] >= -slack[1:]))
    return int(held[0]), int(held[-1])


def _edge_noise(sizes: np.ndarray, coarse: float, fine: float, q: float) -> np.ndarray:
    """Standard deviation of (1 - q) x (count below) - q x (count above), at each finer edge.

    Of the cell that the edge is within, a part f of the finer cells is below. The shift leaves f of
    the cell's own noise there, and of m finer ones' noise what does not show in the cell's sum.
    """
    ends = np.concatenate([[0], np.cumsum(sizes)])
    edges = np.arange(ends[-1] + 1)
    cell = np.minimum(np.searchsorted(ends, edges, side="right") - 1, len(sizes) - 1)
    inside = edges - ends[cell]
    f = inside / sizes[cell]
    below, above = cell, len(sizes) - 1 - cell
    own = (1 - q) ** 2 * below + q**2 * above + (f - q) ** 2
    spread: np.ndarray = np.sqrt(coarse**2 * own + fine**2 * inside * (1 - f))
    return spread


def _within(share: float) -> float:
    return min(max(share, 0.0), 1.0)
