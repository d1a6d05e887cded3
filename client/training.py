"""One round's work at a site, on its training records only."""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ..config import RunConfig
from ..models import Batch, Family, family
from ..models.state import Arrays, to_arrays
from ..privacy.clipping import CLIPPING_SLACK, clipped_sum
from ..privacy.mechanism import mechanism_of
from ..privacy.noise import Coins
from ..privacy.plan import Plan
from .site import Side


def gradient_sum(
    kind: Family, module: nn.Module, records: Side, config: RunConfig, plan: Plan, coins: Coins
) -> Arrays:
    """One step's clipped gradient sum over a fresh Poisson sample, after the site's own noise.

    Formal guarantee: the sum has sensitivity `plan.clipping_norm` in one privacy unit, a record or
    all records of a person, which is in it as a whole with probability `plan.sampling_rate`; under
    `local` the result is one priced release, under `central` it becomes one at the server, under
    `distributed` in the secure sum.
    """
    batch, groups = records.batch, records.groups(plan.unit)
    rows = _poisson_sample(len(batch.y), groups, plan.sampling_rate, coins)
    total = clipped_sum(
        module,
        kind.example_losses,
        Batch(batch.x[rows], batch.y[rows]),
        plan.clipping_norm,
        coins.generator(),
        micro_batch=config.training.micro_batch,
        places=None if records.places is None else records.places[rows],
        groups=None if groups is None else groups[rows],
    )
    arrays = {name: gradient.numpy() for name, gradient in total.items()}
    return mechanism_of(plan).at_site(arrays, plan.noise_scale, coins)


def _poisson_sample(count: int, groups: Tensor | None, rate: float, coins: Coins) -> Tensor:
    """Rows of a true Poisson sample: of records, or of persons with all the records of each."""
    if groups is None:
        return torch.from_numpy(coins.poisson_sample(count, rate))
    persons = int(groups.max()) + 1 if count else 0
    # One coin a person: with one a record, who has many would be in nearly every step.
    sampled = np.zeros(persons, dtype=np.bool_)
    sampled[coins.poisson_sample(persons, rate)] = True
    return torch.from_numpy(np.flatnonzero(sampled[groups.numpy()]))


def train(module: nn.Module, records: Side, config: RunConfig, plan: Plan, coins: Coins) -> Arrays:
    """What a site sends for one round.

    Returns:
        Under `adam` and `sgd` a gradient sum (float64), else how `local_steps` steps of Adam, each
        on a sum of its own, changed the parameters (float32). Under `fedprox` each step is also
        drawn towards the server's model (Li et al. 2020, equation 2): by public numbers, after the
        noise. Under `site` the steps have no bound and no noise: what comes of them must be clipped
        as a whole (`clipped_update`).
    """
    kind = family(config.model.family)
    names = kind.trainable(module)
    # Frozen parameters are not differentiated, clipped, noised or sent.
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
    if not config.trains_at_sites:
        return gradient_sum(kind, module, records, config, plan, coins)
    steps = plan.releases_per_round
    if plan.mechanism == "site":  # its steps are no releases
        steps = config.training.local_steps
        plan = replace(plan, mechanism="none", clipping_norm=math.inf, noise_multiplier=0.0)
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    # Its moments start anew each round: they are not the site's to carry from model to model.
    optimiser = torch.optim.Adam(parameters.values(), lr=config.learning_rate)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    pull = config.aggregation.proximal if config.strategy == "fedprox" else 0.0
    for _ in range(steps):
        total = gradient_sum(kind, module, records, config, plan, coins)
        for name, parameter in parameters.items():
            mean = torch.from_numpy(total[name]) / plan.expected_batch
            parameter.grad = mean.to(parameter.dtype) + pull * (parameter.detach() - start[name])
        optimiser.step()
    after = to_arrays(module, names)
    return {name: after[name] - start[name].numpy() for name in names}


def clipped_update(change: Mapping[str, np.ndarray], clipping_norm: float) -> tuple[Arrays, bool]:
    """A site's whole update, clipped in L2, and whether it was within the bound.

    Formal guarantee: whatever the site's records are, the result has a norm of at most
    `clipping_norm` over all parameters together, and one that is not finite counts as zero.

    Args:
        change: How the site's steps changed the parameters.
        clipping_norm: The bound.

    Returns:
        float64 by name; and whether nothing was cut off.
    """
    update = {name: array.astype(np.float64) for name, array in change.items()}
    norm = math.sqrt(sum(float(np.square(array).sum()) for array in update.values()))
    if not math.isfinite(norm):
        return {name: np.zeros_like(array) for name, array in update.items()}, False
    bound = clipping_norm / CLIPPING_SLACK
    factor = bound / max(norm, bound)
    return {name: array * factor for name, array in update.items()}, norm <= bound
