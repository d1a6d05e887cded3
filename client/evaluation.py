"""How good the model is by a site's own records: sums of bounded answers, after its own noise."""

from torch import nn

from ..config import RunConfig
from ..data_prep.schema import Schema
from ..models import family
from ..models.metrics import Exam, answers, loss_answers, loss_noise_scale, noise_scale
from ..models.state import Arrays
from ..privacy.mechanism import mechanism_of
from ..privacy.noise import Coins
from ..privacy.plan import Plan
from .site import Side
from .training import clipped_update


def holdout_sums(
    module: nn.Module,
    exam: Exam,
    records: Side,
    config: RunConfig,
    schema: Schema,
    plan: Plan,
    coins: Coins,
) -> Arrays:
    """What a site sends of its held-out records for one evaluation: float64 by block.

    Where a person is what is hidden, each one counts once, whatever number of records they have.

    Formal guarantee: a function of the held-out records alone, with sensitivity
    sqrt(number of blocks) in one privacy unit, a record or all records of a person, and one release
    of the hold-out account: under `local` as it is, under `central` once the server has added its
    noise.
    """
    kind, weights = family(config.model.family), records.weights(plan.unit)
    sums = answers(kind, module, exam, records.batch, schema, weights)
    if plan.unit == "site":
        # All its held-out records are one unit's, which adds no more than so many records may.
        sums, _ = clipped_update(sums, noise_scale(plan.evaluation_units, schema))
    scale = noise_scale(plan.evaluation_noise * plan.evaluation_units, schema)
    return mechanism_of(plan).at_site(sums, scale, coins)


def training_sums(
    module: nn.Module, records: Side, config: RunConfig, plan: Plan, coins: Coins
) -> Arrays:
    """What a site sends of its training records, where the plan pays for it: count and loss.

    Formal guarantee: as of `holdout_sums`, from the training account, with sensitivity sqrt(2).
    """
    weights = records.weights(plan.unit)
    sums = loss_answers(family(config.model.family), module, records.batch, weights)
    return mechanism_of(plan).at_site(sums, loss_noise_scale(plan.figures_noise), coins)
