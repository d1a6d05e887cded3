"""The one interface of all generators: a handful of functions over a module."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..data_prep.queries import Noisy
from ..data_prep.schema import Schema


class Batch(NamedTuple):
    """Encoded records: x [B, ...] float32 in [0, 1], y [B] int64 class (0 without classes)."""

    x: Tensor
    y: Tensor


class Sampler(Protocol):
    """Draws n synthetic records; `labels` [n] are drawn from the model where they are not given."""

    def __call__(
        self, module: nn.Module, n: int, generator: torch.Generator, labels: Tensor | None = None
    ) -> Batch:
        """See the class."""


def all_parameters(module: nn.Module) -> list[str]:
    """Every parameter is trained."""
    return [name for name, _ in module.named_parameters()]


def unchanged(
    module: nn.Module, gradient: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """The optimiser gets the sites' mean gradient as it is."""
    del module, generator
    return gradient


@dataclass(frozen=True)
class Family:
    """A kind of generator.

    Attributes:
        build: (options, schema) -> module. Its parameters are then set by `layers.initialise` or
            from arrays, so that what `build` itself draws does not matter.
        example_losses: (module, batch, generator) -> [B] losses. An example's loss depends on that
            example alone: that is what clipping bounds.
        sample: (module, n, generator, labels) -> n synthetic records.
        scores: (module, batch) -> [B], larger for a likelier record; deterministic.
        score_bounds: module -> (low, high), public bounds that scores are clipped to where they are
            added up: from the schema and the options alone.
        trainable: module -> names of the parameters that are trained.
        modalities: The kinds of data that it makes.
        fit: (options, schema, statistics, generator) -> a module that says what the statistics
            say: post-processing. Of a family that is fitted so and never trained; else `None`.
        server_step: (module, mean gradient, generator) -> the gradient for the optimiser; where a
            family adds what touches no record, such as a GAN's fake part.
    """

    build: Callable[[Any, Schema], nn.Module]
    example_losses: Callable[[nn.Module, Batch, torch.Generator], Tensor]
    sample: Sampler
    scores: Callable[[nn.Module, Batch], Tensor]
    score_bounds: Callable[[nn.Module], tuple[float, float]]
    trainable: Callable[[nn.Module], list[str]] = all_parameters
    modalities: tuple[str, ...] = ("table", "image", "text")
    fit: Callable[[Any, Schema, Noisy, torch.Generator], nn.Module] | None = None
    server_step: Callable[[nn.Module, dict[str, Tensor], torch.Generator], dict[str, Tensor]] = (
        unchanged
    )
