"""Per-example clipped gradient sums: the only door to private gradients."""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

# Opacus hooks the first layer although nothing asks for its input's gradient, which is as intended.
warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)

BatchT = TypeVar("BatchT", bound=tuple[Tensor, ...])
Gradients = dict[str, Tensor]
LossFn = Callable[[nn.Module, BatchT, torch.Generator], Tensor]

CLIPPING_SLACK = 1.001
"""The accounted norm over the one clipped to: room for float32 rounding of norms and sums.

Norms and the weighted sum of a micro-batch are float32; micro-batches are added in float64. The sum
of one micro-batch of B examples is off by at most B^2 2^-24 clipping norms (2.4e-4 at B = 64) in
the worst case and by about 1e-6 in practice; the worst case of many is not covered.
"""


class ClippingError(Exception):
    """A module or loss that per-example clipping cannot serve."""


def clipped_sum(
    module: nn.Module,
    loss_fn: LossFn[BatchT],
    batch: BatchT,
    clipping_norm: float,
    generator: torch.Generator,
    *,
    micro_batch: int = 64,
) -> Gradients:
    """The sum over a batch of per-example gradients, each clipped to `clipping_norm` in L2.

    Formal guarantee: one record more or less changes the sum by at most `clipping_norm` in L2 over
    all trainable parameters together (add-or-remove). It assumes that the loss of an example
    depends on that example alone (no BatchNorm: Opacus refuses it), and that `generator` is secret
    (see `Coins.generator`). A gradient that is not finite counts as zero, before the sum.

    Args:
        module: Its parameters with `requires_grad` are differentiated; left as it was found.
        loss_fn: (module, batch, generator) -> [B] losses, one an example.
        batch: Tensors of one leading length N >= 0.
        clipping_norm: The bound; infinity asks for the plain sum, without any guarantee.
        generator: For the draws inside the loss.
        micro_batch: Examples at a time. The last part is padded up to it with zeros that are masked
            out again, so that only the number of parts depends on N.

    Returns:
        Gradient sums by parameter name, float32; zeros for an empty batch.

    Raises:
        ClippingError: A layer has no per-example gradient, or the losses are not [B].
        ValueError: A bound or size out of range.
    """
    if not clipping_norm > 0 or micro_batch < 1:
        raise ValueError(
            f"clipping_norm, micro_batch = {clipping_norm}, {micro_batch}: must be > 0, >= 1"
        )
    total = {
        name: torch.zeros_like(parameter, dtype=torch.float64)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    if math.isinf(clipping_norm):
        _add_plain(total, module, loss_fn, batch, generator, micro_batch)
    else:
        _add_clipped(total, module, loss_fn, batch, clipping_norm, generator, micro_batch)
    return {name: sums.to(torch.float32) for name, sums in total.items()}


def _add_clipped(
    total: Gradients,
    module: nn.Module,
    loss_fn: LossFn[BatchT],
    batch: BatchT,
    clipping_norm: float,
    generator: torch.Generator,
    micro_batch: int,
) -> None:
    from opacus import GradSampleModule
    from opacus.validators.errors import UnsupportedModuleError

    try:
        hooked = GradSampleModule(module, loss_reduction="sum", strict=True)
    except (UnsupportedModuleError, NotImplementedError) as error:
        raise ClippingError(f"{type(module).__name__}: {str(error).splitlines()[0]}") from None
    try:
        for part, real in _parts(batch, micro_batch):
            losses = _checked(loss_fn(module, part, generator), micro_batch)
            losses.sum().backward()  # type: ignore[no-untyped-call]
            _add_part(total, module, real, clipping_norm / CLIPPING_SLACK)
    finally:
        for parameter in module.parameters():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
        hooked.remove_hooks()


@torch.no_grad()
def _add_part(total: Gradients, module: nn.Module, real: int, bound: float) -> None:
    """Adds one micro-batch's clipped gradients; examples from `real` on are padding."""
    flat = {}
    for name, parameter in module.named_parameters():
        if name in total:
            per_example = parameter.grad_sample  # type: ignore[attr-defined]
            if not isinstance(per_example, Tensor):
                raise ClippingError(f"{name}: took no part in the loss, or was used twice")
            flat[name] = per_example.to(torch.float32).flatten(1)
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
    norms = torch.stack([g.norm(dim=1) for g in flat.values()]).norm(dim=0)
    usable = norms.isfinite()
    usable[real:] = False
    factors = (bound / norms.clamp(min=bound)).where(usable, torch.zeros(()))
    for name, per_example in flat.items():
        # 0 * NaN is NaN: a weight of zero is not enough to leave an example out.
        if not usable.all():
            per_example = per_example.where(usable[:, None], torch.zeros(()))  # noqa: PLW2901
        total[name] += (factors @ per_example).view_as(total[name])


def _add_plain(
    total: Gradients,
    module: nn.Module,
    loss_fn: LossFn[BatchT],
    batch: BatchT,
    generator: torch.Generator,
    micro_batch: int,
) -> None:
    parameters = {n: p for n, p in module.named_parameters() if n in total}
    for part, real in _parts(batch, micro_batch):
        losses = _checked(loss_fn(module, part, generator), micro_batch)[:real]
        gradients = torch.autograd.grad(losses[losses.isfinite()].sum(), list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient


def _parts(batch: BatchT, size: int) -> Iterator[tuple[BatchT, int]]:
    """The batch in parts of `size` examples, with how many of them are real."""
    count = len(batch[0])
    for start in range(0, count, size):
        part = [tensor[start : start + size] for tensor in batch]
        real = len(part[0])
        if real < size:
            part = [torch.cat([t, t.new_zeros(size - real, *t.shape[1:])]) for t in part]
        yield _like(batch, part), real


def _like(batch: BatchT, tensors: list[Tensor]) -> BatchT:
    make = getattr(type(batch), "_make", type(batch))  # a named tuple, or a plain one
    return make(tensors)


def _checked(losses: Tensor, count: int) -> Tensor:
    if losses.shape != (count,):
        raise ClippingError(
            f"losses have shape {tuple(losses.shape)}: must be [{count}], one an example"
        )
    return losses
