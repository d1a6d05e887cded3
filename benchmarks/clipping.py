"""`clipped_sum`, beside the plain gradient sum and the per-example gradients of `torch.func`."""

from collections.abc import Callable

import numpy as np
import torch
from harness import interleaved, start
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedveil.config import VaeOptions
from fedveil.data_prep.schema import ImageSchema, Schema
from fedveil.data_prep.tabular import breast_cancer_schema
from fedveil.models import Batch, family
from fedveil.models.layers import initialise
from fedveil.privacy.clipping import clipped_sum


def main() -> None:
    """Examples a second with one thread, by model, and the price of privacy as a ratio."""
    report = start(__doc__ or "")
    torch.set_num_threads(1)
    models: dict[str, tuple[Schema, int]] = {
        "digits": (ImageSchema(height=8, width=8, classes=tuple("0123456789")), 256),
        "mnist": (ImageSchema(height=28, width=28, classes=tuple("0123456789")), 128),
        "table": (breast_cancer_schema(), 512),
    }
    for name, (schema, size) in models.items():
        contestants = _contestants(schema, size)
        seconds = interleaved(contestants, repeats=5 if report.quick else 15)
        for contestant, value in seconds.items():
            report.add(f"{name}_{contestant}_per_second", size / value, "examples a second")
        report.add(f"{name}_clipped_over_plain", seconds["clipped"] / seconds["plain"])
        report.add(f"{name}_clipped_over_vmap", seconds["clipped"] / seconds["vmap"])
    report.finish()


def _contestants(schema: Schema, size: int) -> dict[str, Callable[[], object]]:
    kind = family("vae")
    module = kind.build(VaeOptions(family="vae"), schema)
    initialise(module, torch.Generator().manual_seed(0))
    batch = kind.sample(module, size, torch.Generator().manual_seed(1))
    coins = torch.Generator().manual_seed(2)
    return {
        "clipped": lambda: clipped_sum(module, kind.example_losses, batch, 1.0, coins),
        "plain": lambda: clipped_sum(module, kind.example_losses, batch, np.inf, coins),
        "vmap": lambda: _by_vmap(module, batch, coins),
    }


def _by_vmap(module: nn.Module, batch: Batch, coins: torch.Generator) -> dict[str, Tensor]:
    """The textbook way: a gradient for each example, materialised, then clipped and summed."""
    kind = family("vae")
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return kind.example_losses(self.inner, Batch(x, y), coins)[0]

    loss = Loss()
    prefixed = {f"inner.{name}": p for name, p in parameters.items()}

    def one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = functional_call(loss, values, (x[None], y[None]))
        return found

    total = {name: torch.zeros_like(p) for name, p in prefixed.items()}
    for start_at in range(0, len(batch.y), 64):
        part = slice(start_at, start_at + 64)
        gradients = vmap(grad(one), (None, 0, 0), randomness="different")(
            prefixed, batch.x[part], batch.y[part]
        )
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
        factors = 1 / norms.clamp(min=1)
        for name, gradient in gradients.items():
            total[name] += torch.tensordot(factors, gradient, 1)
    return total


if __name__ == "__main__":
    main()
