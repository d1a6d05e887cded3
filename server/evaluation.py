"""The server's half of an evaluation: questions of synthetic records, figures of noised sums."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..config import RunConfig
from ..data_prep.schema import Schema
from ..models import family, metrics
from ..models.metrics import Exam
from ..models.state import Arrays, load_arrays
from ..privacy.mechanism import mechanism_of
from ..privacy.noise import Coins
from ..privacy.plan import Plan
from .aggregation import summed
from .replies import Collected

# What these count hangs on no model: every evaluation measures them anew, and their mean is better.
_OF_RECORDS_ALONE = ("one_way", "two_way")


@dataclass(frozen=True)
class Evaluated:
    """What a run knows of its quality.

    Attributes:
        count: Evaluations whose sums arrived.
        round: Whose model the last one looked at.
        quality: Figures by name: `value`, `noise` (its standard deviation by the noise alone) and,
            of a total variation, its `floor`.
        sums: Noised histograms of records, added up over evaluations.
        noises: Noises in each of `sums`: their variance over that of one.
    """

    count: int = 0
    round: int = 0
    quality: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    sums: Mapping[str, np.ndarray] = field(default_factory=dict)
    noises: float = 0

    def facts(self) -> dict[str, Any]:
        """All but the sums, as plain values."""
        facts = asdict(replace(self, sums={}))
        del facts["sums"]
        return facts


NOT_EVALUATED = Evaluated()


def questions(model: Mapping[str, np.ndarray], config: RunConfig, schema: Schema) -> Exam:
    """The exam of a released model: post-processing, from public randomness."""
    kind = family(config.model.family)
    module = kind.build(config.model, schema)
    load_arrays(module, model)
    generator = torch.Generator().manual_seed(config.federation.seed)
    synthetic = kind.sample(module, config.evaluation.samples, generator)
    return metrics.prepare(synthetic, schema, seed=config.federation.seed % 2**32)


def expected_sums(schema: Schema, plan: Plan) -> Arrays:
    """Zeros in the names and shapes that a site's sums must have."""
    shapes = {f"holdout/{name}": shape for name, shape in metrics.blocks(schema).items()}
    if plan.figures_noise:
        shapes |= {"training/count": (1,), "training/loss": (1,)}
    return {name: np.zeros(shape) for name, shape in shapes.items()}


def evaluated(
    before: Evaluated,
    number: int,
    collected: Collected,
    exam: Exam,
    config: RunConfig,
    schema: Schema,
    plan: Plan,
    coins: Coins,
) -> Evaluated:
    """One evaluation's figures.

    Formal guarantee: under `central` only the noised sums are used from here on, each account's
    with its own noise.

    Args:
        before: What was known.
        number: The round of the model that was evaluated.
        collected: The usable sites' sums, or their one sum.
        exam: The questions.
        config: The run.
        schema: What a record is.
        plan: Its price.
        coins: The server's, for its noise.
    """
    add, noises = mechanism_of(plan).at_server, collected.noises
    parts = [part.sums for part in collected.parts]
    rounded = collected.rounding
    scale = metrics.noise_scale(plan.evaluation_noise * plan.evaluation_units, schema)
    held_out = add(_total(parts, "holdout/"), scale * rounded.get("holdout", 1.0), coins)
    bounds = family(config.model.family).score_bounds(_module(config, schema))
    count, all_noises = before.count + 1, before.noises + noises
    scales = dict.fromkeys(held_out, scale * math.sqrt(noises))
    sums = {name: held_out[name] for name in _OF_RECORDS_ALONE if name in held_out}
    sums = summed([before.sums, sums])
    for name, total in sums.items():
        held_out[name], scales[name] = total / count, scale * math.sqrt(all_noises) / count
    found = metrics.figures(held_out, exam, schema, bounds)
    noise = metrics.noise_of_figures(held_out, scales, exam, schema, bounds)
    floors = metrics.floors(held_out, scales, exam, schema)
    if plan.figures_noise:
        scale = metrics.loss_noise_scale(plan.figures_noise)
        trained = add(_total(parts, "training/"), scale * rounded.get("training", 1.0), coins)
        found["training_loss"] = metrics.mean_loss(trained, bounds)
        scales = dict.fromkeys(trained, scale * math.sqrt(noises))
        noise["training_loss"] = metrics.noise_of_loss(trained, scales, bounds)
    quality = {name: {"value": value, "noise": noise[name]} for name, value in found.items()}
    quality |= {name: {**quality[name], "floor": floor} for name, floor in floors.items()}
    tidy = {n: {k: round(v, 6) for k, v in facts.items()} for n, facts in quality.items()}
    return Evaluated(count, number, tidy, sums, all_noises)


def _module(config: RunConfig, schema: Schema) -> torch.nn.Module:
    return family(config.model.family).build(config.model, schema)


def _total(parts: Sequence[Mapping[str, np.ndarray]], prefix: str) -> Arrays:
    sums = summed(parts).items()
    return {name.removeprefix(prefix): a for name, a in sums if name.startswith(prefix)}
