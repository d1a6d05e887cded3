"""Building blocks that are safe under per-example clipping, and public initial weights."""

import math

import torch
from torch import Tensor, nn


class Lookup(nn.Module):
    """Learnt numbers that depend on a one-hot row alone: `gain` times the row's weights.

    They start at 0.

    A bare `nn.Parameter` beside children would throw the whole module to Opacus's slow fallback; a
    linear layer does not. A gain above 1 lets few numbers be heard under a clipping norm that they
    share with many.
    """

    def __init__(self, rows: int, width: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weights = nn.Linear(rows, width, bias=False)
        self.gain = gain

    def forward(self, one_hot: Tensor) -> Tensor:
        """one_hot [B, rows] -> [B, width]."""
        rows: Tensor = self.weights(self.gain * one_hot)
        return rows


class Table(nn.Module):
    """A plain table of learnt numbers, all 0 at first: nothing is said yet.

    Attributes:
        values: The numbers, in the shape that the table was made with.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(shape))


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Sets all parameters from public randomness: Kaiming-uniform weights, zero biases.

    `torch.manual_seed` is global and not thread-safe, so every draw names its generator. `Lookup`
    and `Table` start at zero, and a parameter that no step trains stays as it was made.

    Raises:
        TypeError: A layer of another kind has parameters: say here how they start.
    """
    known: set[int] = set()
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            known |= {id(parameter) for parameter in layer.parameters()}
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if isinstance(layer, Table):
            known.add(id(layer.values))
            nn.init.zeros_(layer.values)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise TypeError(f"{name}: no layer whose initial weights are declared")
    for layer in module.modules():
        if isinstance(layer, Lookup):
            nn.init.zeros_(layer.weights.weight)
