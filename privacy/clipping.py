"""Per-example clipped gradient sums: the only door to private gradients."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Opacus hooks the first layer although nothing asks for its input's gradient, which is as intended.
warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)

BatchT = TypeVar("BatchT", bound=tuple[Tensor, ...])
Gradients = dict[str, Tensor]
LossFn = Callable[[nn.Module, BatchT, torch.Generator], Tensor]

CLIPPING_SLACK = 1.001
"""The accounted norm over the one clipped to: room for rounding.

Norms and sums are float64: the sum of N examples is off by at most N^2 2^-53 clipping norms, which
is 1e-4 for a million of them. The gradients themselves are float32, and an example's last bits may
differ by its place in the micro-batch, which one record more shifts: measured on a table, by up to
1.2e-8 clipping norms for one example and 2e-7 for 500 together. If such errors all pointed one way
the slack would be used up near 10^5 sampled records a step; no bound is enforced.
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
    depends on that example alone (BatchNorm is refused), that each parameter is used through its
    own layer, and that `generator` is secret (see `Coins.generator`). A gradient that is not finite
    counts as zero, before the sum.

    Args:
        module: Its parameters with `requires_grad` are differentiated; left as it was found.
        loss_fn: (module, batch, generator) -> [B] losses, one an example.
        batch: Tensors of one leading length N >= 0.
        clipping_norm: The bound; infinity asks for the plain sum, without any guarantee.
        generator: For the draws inside the loss.
        micro_batch: Examples at a time. The last part is padded up to it with zeros that are masked
            out again, so that only the number of parts depends on N.

    Returns:
        Gradient sums by parameter name, float64; zeros for an empty batch.

    Raises:
        ClippingError: A layer has no per-example gradient, or the losses are not [B].
        ValueError: A bound or size out of range.
    """
    if not clipping_norm > 0 or micro_batch < 1:
        raise ValueError(
            f"clipping_norm, micro_batch = {clipping_norm}, {micro_batch}: must be > 0, >= 1"
        )
    if norm_layer := next((m for m in module.modules() if isinstance(m, _BatchNorm)), None):
        raise ClippingError(f"{type(norm_layer).__name__}: couples records; use GroupNorm")
    total = {
        name: torch.zeros_like(parameter, dtype=torch.float64)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    if math.isinf(clipping_norm):
        for part, real in _parts(batch, micro_batch):
            _add_plain(total, module, loss_fn, part, real, generator)
        return total
    with _hooked(module):
        for part, real in _parts(batch, micro_batch):
            _losses(module, loss_fn, part, generator).sum().backward()  # type: ignore[no-untyped-call]
            _add_clipped(total, module, real, clipping_norm / CLIPPING_SLACK)
    return total


@contextmanager
def _hooked(module: nn.Module) -> Iterator[None]:
    """Within it, a backward pass leaves `grad_sample` [B, ...] on every trainable parameter."""
    from opacus import GradSampleModule
    from opacus.validators.errors import UnsupportedModuleError

    try:
        hooks = GradSampleModule(module, loss_reduction="sum", strict=True)
    except (UnsupportedModuleError, NotImplementedError) as error:
        raise ClippingError(f"{type(module).__name__}: {str(error).splitlines()[0]}") from None
    try:
        yield
    finally:
        for parameter in module.parameters():
            parameter.grad = None
            parameter.grad_sample = None  # type: ignore[attr-defined]
        hooks.remove_hooks()
        for layer in module.modules():
            for kept in ("activations", "max_batch_len"):  # after a failure: records
                if hasattr(layer, kept):
                    delattr(layer, kept)


@torch.no_grad()
def _add_clipped(total: Gradients, module: nn.Module, real: int, bound: float) -> None:
    """Adds one micro-batch's per-example gradients; examples from `real` on are padding."""
    flat = {}
    for name, parameter in module.named_parameters():
        if name in total:
            per_example = parameter.grad_sample  # type: ignore[attr-defined]
            if not isinstance(per_example, Tensor):
                raise ClippingError(f"{name}: took no part in the loss")
            flat[name] = per_example.flatten(1).double()
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
    # The norm over all parameters together: clipping each by itself would allow sqrt(their number).
    norms = torch.stack([g.norm(dim=1) for g in flat.values()]).norm(dim=0)
    usable = norms.isfinite()
    usable[real:] = False
    factors = usable.double()
    if not math.isinf(bound):
        factors = torch.where(usable, bound / norms.clamp(min=bound), factors)
    for name, per_example in flat.items():
        # 0 * NaN is NaN: a weight of zero is not enough to leave an example out.
        if not usable.all():
            per_example[~usable] = 0
        total[name] += (factors @ per_example).view_as(total[name])


def _add_plain(
    total: Gradients,
    module: nn.Module,
    loss_fn: LossFn[BatchT],
    part: BatchT,
    real: int,
    generator: torch.Generator,
) -> None:
    """Adds one micro-batch's gradient, unclipped; by example where one of them is not finite."""
    parameters = {name: p for name, p in module.named_parameters() if name in total}
    losses = _losses(module, loss_fn, part, generator)[:real]
    gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            raise ClippingError(f"{name}: took no part in the loss")
    if all(gradient.isfinite().all() for gradient in gradients):
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient
        return
    with _hooked(module):
        _losses(module, loss_fn, part, generator).sum().backward()  # type: ignore[no-untyped-call]
        _add_clipped(total, module, real, math.inf)


def _losses(
    module: nn.Module, loss_fn: LossFn[BatchT], part: BatchT, generator: torch.Generator
) -> Tensor:
    losses = loss_fn(module, part, generator)
    if losses.shape != (len(part[0]),):
        raise ClippingError(
            f"losses have shape {tuple(losses.shape)}: must be [{len(part[0])}], one an example"
        )
    return losses


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
