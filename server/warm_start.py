"""What the rounds begin with: a model made of the noisy statistics, at no further cost.

A family that is fitted to statistics is done then. Any other learns from them how to scale and
impute, and is trained on samples of the `marginal` generator as on any public data. All of it is
post-processing of one release, from public randomness.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import MarginalOptions, RunConfig
from ..data_prep.queries import Noisy
from ..data_prep.schema import Schema, TableSchema
from ..models import Batch, Family, family
from ..models.scaling import Scaling, learn
from ..models.state import Arrays, load_arrays, to_arrays

_SAMPLES = 20_000
_STEPS = 2_000
_BATCH = 128
_RATE = 2e-3


@dataclass(frozen=True)
class Begun:
    """A model that the statistics made.

    Attributes:
        model: Its parameters.
        facts: What was done, for the events.
    """

    model: Arrays
    facts: Mapping[str, Any]


def begin(
    config: RunConfig, schema: Schema, statistics: Noisy, model: Mapping[str, np.ndarray]
) -> Begun:
    """The model that rounds begin with, or that is released where there are none.

    Args:
        config: The run.
        schema: What a record is.
        statistics: The released sums.
        model: Initial parameters by public randomness.
    """
    with _one_thread():
        return _begun(config, schema, statistics, model)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The last bits of sums hang on how many threads make them; the models are too small for two.

    What is simulated is then what is deployed, to the bit.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _begun(
    config: RunConfig, schema: Schema, statistics: Noisy, model: Mapping[str, np.ndarray]
) -> Begun:
    kind = family(config.model.family)
    generator = torch.Generator().manual_seed(config.federation.seed)
    if kind.fit is not None:
        fitted = kind.fit(config.model, schema, statistics, generator)
        return Begun(to_arrays(fitted), {"family": config.model.family})
    module = kind.build(config.model, schema)
    load_arrays(module, model)
    if isinstance(schema, TableSchema):
        for part in module.modules():
            if isinstance(part, Scaling):
                learn(part, statistics, schema)
    facts: dict[str, Any] = {"family": config.model.family, "warm_start": config.warm_start}
    if config.warm_start:
        _train(kind, module, _samples(schema, statistics, generator), generator)
        facts |= {"samples": _SAMPLES, "steps": _STEPS}
    return Begun(to_arrays(module), facts)


def _samples(schema: Schema, statistics: Noisy, generator: torch.Generator) -> Batch:
    """Records of the `marginal` generator."""
    marginal = family("marginal")
    if marginal.fit is None:
        raise TypeError("marginal: is no family that is fitted")
    options = MarginalOptions(family="marginal")
    fitted = marginal.fit(options, schema, statistics, generator)
    return marginal.sample(fitted, _SAMPLES, generator)


def _train(kind: Family, module: nn.Module, records: Batch, generator: torch.Generator) -> None:
    """Plain training on public records; the rate falls to nothing."""
    names = set(kind.trainable(module))
    trained = [parameter for name, parameter in module.named_parameters() if name in names]
    optimiser = torch.optim.Adam(trained, lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    for _ in range(_STEPS):
        rows = torch.randint(len(records.y), (_BATCH,), generator=generator)
        batch = Batch(records.x[rows], records.y[rows])
        optimiser.zero_grad()
        kind.example_losses(module, batch, generator).mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
