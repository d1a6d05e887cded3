"""What the noisy statistics say, as a generator: fitted to them at the server, never trained.

Each kind of data has a module of its own, with the functions of a family: `tables` (a mixture of
products), `images` (Gaussians by class in a cosine basis), `texts` (n-grams with back-off).
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ...config import MarginalOptions
from ...data_prep.queries import Noisy
from ...data_prep.schema import Schema
from ..family import Batch, Family

_MODULES = {"image": ".images", "table": ".tables", "text": ".texts"}


def build(options: MarginalOptions, schema: Schema) -> nn.Module:
    """The module for a schema; its parameters say nothing yet."""
    module: nn.Module = _of(schema).build(options, schema)
    return module


def fit(
    options: MarginalOptions, schema: Schema, statistics: Noisy, generator: torch.Generator
) -> nn.Module:
    """A module that says what noisy statistics say: post-processing, from public randomness."""
    module: nn.Module = _of(schema).fit(options, schema, statistics, generator)
    return module


def example_losses(module: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """[B] negative log-likelihoods; nothing is drawn."""
    del generator
    return -scores(module, batch)


def sample(
    module: nn.Module, n: int, generator: torch.Generator, labels: Tensor | None = None
) -> Batch:
    """N synthetic records; labels [n] are drawn from the model where they are not given."""
    with torch.no_grad():
        found: Batch = _of(module.schema).sample(module, n, generator, labels)
    return found


def scores(module: nn.Module, batch: Batch) -> Tensor:
    """[B] log-likelihoods in nats."""
    found: Tensor = _of(module.schema).scores(module, batch)
    return found


def score_bounds(module: nn.Module) -> tuple[float, float]:
    """Public bounds of what a score may count for."""
    found: tuple[float, float] = _of(module.schema).score_bounds(module)
    return found


def nothing(module: nn.Module) -> list[str]:
    """No parameter is trained."""
    del module
    return []


def _of(schema: Any) -> Any:  # noqa: ANN401  a module; its functions are those of a family
    return import_module(_MODULES[schema.modality], __name__)


FAMILY = Family(
    build=build,
    example_losses=example_losses,
    sample=sample,
    scores=scores,
    score_bounds=score_bounds,
    trainable=nothing,
    fit=fit,
)
