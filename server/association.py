"""How strongly two columns go together: Cramer's V of a noised table, and what noise leaves open.

Noise alone makes a table look associated. What it adds on average is taken off, and the interval is
all values of V under which the table seen is not unlikely: a parametric bootstrap with a fixed
public seed, so that equal statistics say equal things.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from .intervals import LEVEL

SMALLEST = 0.05
"""Cells with a smaller share of their column are put together with others."""
_DRAWS = 500
_SEED = 20_261_121
_STEPS = 24  # of a bisection


@dataclass(frozen=True)
class Margin:
    """A column, its small cells put together.

    Attributes:
        group: [cells] int64, which group a cell is in.
        shares: [groups] of the records, all above 0, with sum 1.
        noise: [groups] standard deviation of each, as if the total had none.
    """

    group: np.ndarray
    shares: np.ndarray
    noise: np.ndarray


@dataclass(frozen=True)
class Association:
    """Cramer's V, from 0 (independent) to 1 (each tells the other).

    Attributes:
        value: Less what noise adds on average.
        low: Lower end of its interval; above 0 only if the value is above `floor`.
        high: Upper end; with `low` at 0 it is never below `floor`.
        floor: What the value of two independent columns stays below in 97.5 % of all cases.
    """

    value: float
    low: float
    high: float
    floor: float


def margin(counts: np.ndarray, noise: np.ndarray, *, ordered: bool) -> Margin | None:
    """Puts together cells that are rare, or not clear of their noise, with the smallest others.

    A rare cell weighs much in Cramer's V, and its noise with it.

    Args:
        counts: [cells] noised.
        noise: [cells] standard deviations.
        ordered: Whether the cells are parts of a range: only neighbours are put together.

    Returns:
        `None` where there are not two groups that are clear of the noise.
    """
    total = float(counts.sum())
    groups = [[cell] for cell in range(len(counts))]
    if total <= 0:
        return None
    while len(groups) > 1:
        sums = [float(counts[group].sum()) for group in groups]
        spreads = [2 * math.sqrt(float((noise[group] ** 2).sum())) for group in groups]
        least = 0.0 if len(groups) == 2 else SMALLEST * total  # the last two may be rare
        poor = [i for i, s in enumerate(sums) if s <= spreads[i] or s < least]
        if not poor:
            break
        first = min(poor, key=sums.__getitem__)
        near = [first - 1, first + 1] if ordered else [i for i in range(len(sums)) if i != first]
        other = min((i for i in near if 0 <= i < len(sums)), key=sums.__getitem__)
        groups[other] = sorted(groups[other] + groups[first])
        del groups[first]
    if len(groups) < 2:
        return None
    group = np.zeros(len(counts), dtype=np.int64)
    for index, members in enumerate(groups):
        group[members] = index
    shares = np.array([counts[members].sum() for members in groups]) / total
    spread = np.sqrt([(noise[members] ** 2).sum() for members in groups]) / total
    return Margin(group, shares, spread)


def cramers_v(
    counts: np.ndarray,
    noise: np.ndarray,
    margins: tuple[Margin, Margin],
    total: float,
    total_noise: float,
) -> Association:
    """Cramer's V of a noised table (Cramer 1946, section 21.9), less what the noise adds.

    With p and q the margins' shares, n the table and N the total, it is made of
    g = (n - p n_.j - q n_i. + p q n_..) / sqrt(p q), in which errors of p and q are of second
    order; phi^2 = |g|^2 / N^2, of which the noise adds its own |g|^2 on average.

    Args:
        counts: [rows, columns] noised.
        noise: [rows, columns] standard deviations, independent of one another.
        margins: Of the rows and of the columns.
        total: Number of records, noised, above 0.
        total_noise: Standard deviation of its noise.
    """
    rows, columns = (_indicator(one) for one in margins)
    p, q = (one.shares for one in margins)
    spread = np.sqrt(rows @ noise**2 @ columns.T)
    seen = _residual(rows @ counts @ columns.T, p, q)
    most = math.sqrt(min(spread.shape) - 1)
    length = math.sqrt(float((seen**2).sum()))
    added = float((1 / p - 1) @ spread**2 @ (1 / q - 1))  # the mean of |g|^2 of noise alone
    null = _draws(seen / max(length, 1e-300), spread, margins, (total, total_noise))
    tail = (1 - LEVEL) / 2
    observed = (length / total) ** 2
    value = math.sqrt(max(length**2 - added, 0.0)) / total / most
    low, high = (null.inverted(observed, part, most) / most for part in (1 - tail, tail))
    above = _quantile(null.at(0.0), 1 - tail) - added / total**2
    floor = math.sqrt(max(above, 0.0)) / most
    value, low, high, floor = (min(one, 1.0) for one in (value, low, high, floor))
    # A table that shows less than noise usually does rules nothing out up to its floor.
    return Association(value, min(low, value), max(high, value, 0.0 if low else floor), floor)


@dataclass(frozen=True)
class _Draws:
    """Draws of |g|^2 / N^2 as a function of phi, its direction held as it was seen.

    Attributes:
        square: [draws] |g|^2 of a table of length 1 without noise, by drawn margins.
        along: [draws] its product with the noise's g.
        alone: [draws] |g|^2 of the noise.
        totals: [draws] of the number of records.
        total: That number as it was seen.
    """

    square: np.ndarray
    along: np.ndarray
    alone: np.ndarray
    totals: np.ndarray
    total: float

    def at(self, phi: float) -> np.ndarray:
        length = phi * self.total
        squares: np.ndarray = length**2 * self.square + 2 * length * self.along + self.alone
        found: np.ndarray = np.maximum(squares, 0.0) / self.totals**2
        return found

    def inverted(self, observed: float, part: float, most: float) -> float:
        """The phi under which a part of all draws lies below what was observed.

        It grows with phi (Anderson 1955, theorem 1), so it is found by bisection.
        """
        low, high = 0.0, 2 * most
        if observed <= _quantile(self.at(low), part):
            return low
        for _ in range(_STEPS):
            middle = (low + high) / 2
            if _quantile(self.at(middle), part) < observed:
                low = middle
            else:
                high = middle
        return low


def _quantile(draws: np.ndarray, part: float) -> float:
    """The draw that is nearest to it; numpy's own, which interpolates, is ten times as slow."""
    place = round(part * (len(draws) - 1))
    return float(np.partition(draws, place)[place])


def _draws(
    direction: np.ndarray,
    spread: np.ndarray,
    margins: tuple[Margin, Margin],
    total: tuple[float, float],
) -> _Draws:
    rows, columns = direction.shape
    normals = _normals()
    p = _redrawn(margins[0], normals[:, -1, :rows])
    q = _redrawn(margins[1], normals[:, :columns, -1])
    noise = _residual(normals[:, :rows, :columns] * spread, p, q)
    weights = np.sqrt((margins[0].shares / p)[:, :, None] * (margins[1].shares / q)[:, None, :])
    signal = direction * weights
    return _Draws(
        (signal**2).sum(axis=(1, 2)),
        (signal * noise).sum(axis=(1, 2)),
        (noise**2).sum(axis=(1, 2)),
        np.maximum(total[0] + total[1] * normals[:, -1, -1], total[0] / 10),
        total[0],
    )


def _redrawn(one: Margin, normals: np.ndarray) -> np.ndarray:
    """[draws, groups] shares with their noise once more, none below a quarter of what it was."""
    drawn = np.maximum(one.shares + one.noise * normals, one.shares / 4)
    shares: np.ndarray = drawn / drawn.sum(axis=1, keepdims=True)
    return shares


def _indicator(one: Margin) -> np.ndarray:
    """[groups, cells]: 1 where a cell is in a group."""
    return np.asarray(np.arange(len(one.shares))[:, None] == one.group, dtype=np.float64)


def _residual(table: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """What the margins do not explain, over the root of what they do: g, [..., rows, columns]."""
    p, q = p[..., :, None], q[..., None, :]
    across = table - p * table.sum(axis=-2, keepdims=True)
    both = across - q * across.sum(axis=-1, keepdims=True)
    found: np.ndarray = both / np.sqrt(p * q)
    return found


@cache
def _normals() -> np.ndarray:
    """Standard normal draws for the largest table: 1 / `SMALLEST` groups each way, and a total."""
    most = math.floor(1 / SMALLEST) + 1
    return np.random.default_rng(_SEED).standard_normal((_DRAWS, most, most))
