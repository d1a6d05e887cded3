"""The vector of a secure round: which blocks it has, on which grids, and how reals get there.

Site and server derive the blocks by themselves, from the plan and public sizes. A site holds the
opening against its own before anything else: noise that the server promised is not taken on trust.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import discrete
from .noise import Coins
from .plan import Plan
from .secagg.quantise import dequantise, quantise
from .secagg.terms import Block, Numbers
from .shared_noise import Grid, choose_grid, public_scale


@dataclass(frozen=True)
class Release:
    """A part of a round's vector, for which noise is made by itself.

    Attributes:
        name: What it is.
        length: Coordinates.
        sensitivity: L2 bound of what one privacy unit adds; infinity where there is none.
        noise_multiplier: Noise of the sum over the sensitivity; 0 where the vector gets none.
        sampling_rate: Of the sample that it is a sum over.
        bound: Where no noise says how fine the grid is: a size that no coordinate goes beyond; one
            that does is brought back to about it.
    """

    name: str
    length: int
    sensitivity: float
    noise_multiplier: float
    sampling_rate: float
    bound: float


@dataclass(frozen=True)
class Sizes:
    """What a round's vector is about, in public numbers.

    Attributes:
        update: Coordinates of the gradient sum or update.
        clipping_norm: Its bound in this round.
        answers: Coordinates of the sums over held-out records, and what one privacy unit adds to
            them at most.
        figures: The same of the sums over training records.
        records: Declared size of the whole federation.
        statistics: As of `answers`, of the statistics; none by default.
        peak: About what one record adds at most to a coordinate of these; for room in a word.
    """

    update: int
    clipping_norm: float
    answers: tuple[int, float]
    figures: tuple[int, float]
    records: int
    statistics: tuple[int, float] = (0, 0.0)
    peak: float = 0.0


_MOST_SHARE = 4.0
"""Times the mean that one site may have of all records; who has more saturates its statistics."""
# What no coordinate goes beyond where nothing clips it: a sum of gradients, a change of weights.
_GRADIENT_BOUND, _CHANGE_BOUND = 1024.0, 8.0
_NOISE_BOUND = 20.0  # standard deviations of noise that is in a block already


def releases(
    sizes: Sizes,
    plan: Plan,
    *,
    at_sites: bool,
    training: bool,
    evaluating: bool,
    describing: bool = False,
) -> tuple[Release, ...]:
    """The parts of a round's vector.

    Args:
        sizes: Of each part.
        plan: The run's.
        at_sites: Whether sites send changes of the model, and not gradient sums.
        training: Whether there is an update.
        evaluating: Whether there is an evaluation.
        describing: Whether it is the round of statistics.
    """
    found = []
    if describing:
        (length, norm), noise = sizes.statistics, plan.statistics_noise
        sites = plan.numbers.n if plan.numbers else 1
        share = min(1.0, _MOST_SHARE / sites) * sizes.records
        bound = max(64.0, share) * sizes.peak + _NOISE_BOUND * noise * norm
        found.append(Release("statistics", length, norm, noise, 1.0, bound))
    if training:
        bound = _CHANGE_BOUND if at_sites else _GRADIENT_BOUND
        norm = sizes.clipping_norm
        if plan.unit == "site":
            release = Release("update", sizes.update, norm, plan.update_noise, 1.0, norm)
        else:
            # A site's part of the expected batch, all of it pulling one way, and twice that.
            most = max(
                64.0, 2 * plan.expected_batch / max(1, plan.numbers.n if plan.numbers else 1)
            )
            capped = bound if at_sites or math.isinf(norm) else most * norm
            noise, rate = plan.noise_multiplier, plan.sampling_rate
            release = Release("update", sizes.update, norm, noise, rate, capped)
        found.append(release)
        if plan.adaptive:
            found.append(Release("clipping", 1, 0.5, plan.indicator_noise, 1.0, 1.0))
    for name, (length, norm), noise, paid in (
        ("holdout", sizes.answers, plan.evaluation_noise, True),
        ("training", sizes.figures, plan.figures_noise, bool(plan.figures_noise)),
    ):
        if evaluating and paid:
            bound = sizes.records + _NOISE_BOUND * noise * norm
            found.append(Release(name, length, norm, noise, 1.0, bound))
    return tuple(found)


@dataclass(frozen=True)
class Placed:
    """A block of the vector, and the integer noise that a site adds to it.

    Attributes:
        block: As the opening has it.
        stretch: Of the site's noise, see `discrete`; `None` for none.
    """

    block: Block
    stretch: int | None


def placed(releases: Sequence[Release], plan: Plan) -> tuple[Placed, ...]:
    """The blocks of a round, one a release, in their order.

    Formal guarantee: where the plan shares noise out, the sum of the words over any n_min sites,
    of which t_collude tell all they know, is a release of its `noise_multiplier`, up to the plan's
    slack (`shared_noise`). Where it does not, the words hide nothing by themselves.

    Raises:
        ValueError: The plan has no secure sum.
    """
    numbers = plan.numbers
    if numbers is None:
        raise ValueError(f'encryption = "{plan.encryption}": only a secure sum has a vector')
    return tuple(_placed(release, plan, numbers) for release in releases)


def _placed(release: Release, plan: Plan, numbers: Numbers) -> Placed:
    noised = plan.shares_noise
    if noised:
        # An update's coordinates are within few sensitivities; counts of records are not.
        room = release.bound if release.name == "statistics" else 0.0
        grid = choose_grid(
            release.noise_multiplier,
            release.sensitivity,
            release.length,
            plan.honest,
            public_scale(room, numbers.n) if room else math.inf,
        )
    else:
        grid = Grid(public_scale(release.bound, numbers.n), 0)
    block = Block(
        release.name,
        release.length,
        release.sensitivity if math.isfinite(release.sensitivity) else release.bound,
        grid.scale,
        grid.sigma if noised else 0.0,
        release.sampling_rate,
    )
    return Placed(block, grid.stretch if noised else None)


def words(
    parts: Mapping[str, Mapping[str, np.ndarray]],
    blocks: Sequence[Placed],
    numbers: Numbers,
    coins: Coins,
) -> np.ndarray:
    """A site's vector: each block's arrays on its grid, with the site's share of the noise.

    Args:
        parts: Arrays by name, by block; they are taken in the order of their names.
        blocks: See `placed`.
        numbers: The secure sum's.
        coins: The site's own, secret.

    Returns:
        [d] uint32, the blocks one after another.

    Raises:
        ValueError: A block has another length, or is not finite.
    """
    vector = np.empty(sum(one.block.length for one in blocks), dtype="<u4")
    start = 0
    for one in blocks:
        block, values = one.block, flat(parts[one.block.name])
        if len(values) != block.length:
            raise ValueError(f"{block.name}: {len(values)} coordinates, must be {block.length}")
        part = vector[start : start + block.length]
        part[:] = quantise(values, block.scale, block.saturation(numbers), coins)
        if one.stretch is not None:
            discrete.add_noise(part, one.stretch, coins)
        start += block.length
    return vector


def reals(total: np.ndarray, blocks: Sequence[Placed]) -> dict[str, np.ndarray]:
    """The sum of the sites' vectors as reals: float64 by block."""
    found, start = {}, 0
    for one in blocks:
        part = total[start : start + one.block.length]
        found[one.block.name] = dequantise(part, one.block.scale)
        start += one.block.length
    return found


def flat(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Arrays one after another, in the order of their names."""
    if len(arrays) == 1:
        return next(iter(arrays.values())).reshape(-1)
    return np.concatenate([arrays[name].reshape(-1) for name in sorted(arrays)])


def unflat(values: np.ndarray, like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The opposite of `flat`, in the names and shapes of others."""
    found, start = {}, 0
    for name in sorted(like):
        shape, size = like[name].shape, like[name].size
        found[name] = values[start : start + size].reshape(shape)
        start += size
    return found


def rounding(release: Release, block: Block, plan: Plan) -> float:
    """How many times the noise that a sum would need on a continuum it needs on its grid.

    Where noise is shared out, it is the honest sites' over the accounted one; where a server adds
    it, the sum's sensitivity over the release's. `quantise`: (1 + 2^-22) (scale C + sqrt(d)) steps.
    """
    steps = block.scale * release.sensitivity
    if plan.shares_noise:
        return block.sigma * math.sqrt(plan.honest) / (steps * release.noise_multiplier)
    return (1 + 2.0**-22) * (1 + math.sqrt(release.length) / steps)
