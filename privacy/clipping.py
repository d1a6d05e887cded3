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
differ by its row in the micro-batch. Whoever chooses the parameters can make those bits decide on a
whole gradient; so a row must be the example's own, whatever others there are (`places`). Within a
row the bits are the same then: products of matrices of one size go through the same steps for it,
whatever the other rows hold.
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
    places: Tensor | None = None,
    groups: Tensor | None = None,
) -> Gradients:
    """The sum over a batch of per-example gradients, each clipped to `clipping_norm` in L2.

    With `groups`, the examples of a group are summed first and their sum is clipped: what a user
    contributes is bounded as a whole (McMahan et al. 2018, "Learning differentially private
    recurrent language models", algorithm 1; there it is a user's update).

    Formal guarantee: one record more or less, or with `groups` one whole group, changes the sum by
    at most `clipping_norm` in L2 over all trainable parameters together (add-or-remove). It assumes
    that the loss of an example depends on that example alone (BatchNorm is refused), that each
    parameter is used through its own layer, and that `generator` is secret (see
    `Coins.generator`). A gradient that is not finite counts as zero, before any sum.

    Args:
        module: Its parameters with `requires_grad` are differentiated; left as it was found.
        loss_fn: (module, batch, generator) -> [B] losses, one an example.
        batch: Tensors of one leading length N >= 0.
        clipping_norm: The bound; infinity asks for the plain sum, without any guarantee.
        generator: For the draws inside the loss.
        micro_batch: Examples at a time. The last part is padded up to it with zeros that are masked
            out again, so that only the number of parts depends on N.
        places: [N] int64, a number of each example's own, which says in which row of a micro-batch
            it is; `None`: the rows are filled in order, and the guarantee is for parameters that
            nobody has chosen to make the last bits of a row count.
        groups: [N] int64, which privacy unit each example belongs to; any labels, in any order.
            `None`: each example is its own. A group has micro-batches of its own, and its examples
            places in them in their order.

    Returns:
        Gradient sums by parameter name, float64; zeros for an empty batch.

    Raises:
        ClippingError: A layer has no per-example gradient, or the losses are not [B].
        ValueError: A bound or size out of range, or places or groups that are not [N] int64.
    """
    _check(module, len(batch[0]), clipping_norm, micro_batch, places, groups)
    total = {
        name: torch.zeros_like(parameter, dtype=torch.float64)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    if math.isinf(clipping_norm):
        for part, real in _parts(batch, micro_batch):
            _add_plain(total, module, loss_fn, part, real, generator)
        return total
    bound = clipping_norm / CLIPPING_SLACK
    with _hooked(module):
        if groups is None:
            for part, real in _placed(batch, micro_batch, places):
                _losses(module, loss_fn, part, generator).sum().backward()  # type: ignore[no-untyped-call]
                _add_clipped(total, _per_example(total, module), real, bound)
            return total
        for unit in _units(batch, groups):
            whole = {name: torch.zeros(1, g.numel(), dtype=g.dtype) for name, g in total.items()}
            for part, real in _parts(unit, micro_batch):
                _losses(module, loss_fn, part, generator).sum().backward()  # type: ignore[no-untyped-call]
                _add_clipped(whole, _per_example(total, module), real, math.inf)
            _add_clipped(total, whole, torch.ones(1, dtype=torch.bool), bound)
    return total


def _check(
    module: nn.Module,
    count: int,
    clipping_norm: float,
    micro_batch: int,
    places: Tensor | None,
    groups: Tensor | None,
) -> None:
    if not clipping_norm > 0 or micro_batch < 1:
        raise ValueError(
            f"clipping_norm, micro_batch = {clipping_norm}, {micro_batch}: must be > 0, >= 1"
        )
    for what, found in (("places", places), ("groups", groups)):
        if found is not None and (found.shape, found.dtype) != ((count,), torch.int64):
            raise ValueError(
                f"{what} = {found.dtype} {tuple(found.shape)}: must be int64 ({count},)"
            )
    if norm_layer := next((m for m in module.modules() if isinstance(m, _BatchNorm)), None):
        raise ClippingError(f"{type(norm_layer).__name__}: couples records; use GroupNorm")


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


def _per_example(total: Gradients, module: nn.Module) -> Gradients:
    """Takes one micro-batch's gradients, [B, numbers] a parameter in float64."""
    flat = {}
    for name, parameter in module.named_parameters():
        if name in total:
            per_example = parameter.grad_sample  # type: ignore[attr-defined]
            if not isinstance(per_example, Tensor):
                raise ClippingError(f"{name}: took no part in the loss")
            flat[name] = per_example.detach().flatten(1).double()
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
    return flat


def _units(batch: BatchT, groups: Tensor) -> Iterator[BatchT]:
    """The examples of each group, in their order."""
    order = groups.argsort(stable=True)
    _, counts = torch.unique_consecutive(groups[order], return_counts=True)
    for rows in torch.split(order, counts.tolist()):
        yield _like(batch, [tensor[rows] for tensor in batch])


def _add_clipped(total: Gradients, flat: Gradients, real: Tensor, bound: float) -> None:
    """Adds the rows that are `real`, each clipped: gradients of examples, or sums of units."""
    factors = _factors(flat, real, bound)
    for name, rows in flat.items():
        total[name] += (factors @ rows).view_as(total[name])


def _factors(flat: Gradients, real: Tensor, bound: float) -> Tensor:
    """What each row is to be multiplied by; makes those zero that are not to count at all."""
    # The norm over all parameters together: clipping each by itself would allow sqrt(their number).
    norms = torch.stack([rows.norm(dim=1) for rows in flat.values()]).norm(dim=0)
    usable = norms.isfinite() & real
    factors: Tensor = usable.double()
    if not math.isinf(bound):
        factors = torch.where(usable, bound / norms.clamp(min=bound), factors)
    # 0 * NaN is NaN: a weight of zero is not enough to leave a row out.
    if not usable.all():
        for rows in flat.values():
            rows[~usable] = 0
    return factors


def _add_plain(
    total: Gradients,
    module: nn.Module,
    loss_fn: LossFn[BatchT],
    part: BatchT,
    real: Tensor,
    generator: torch.Generator,
) -> None:
    """Adds one micro-batch's gradient, unclipped; by example where one of them is not finite."""
    parameters = {name: p for name, p in module.named_parameters() if name in total}
    losses = _losses(module, loss_fn, part, generator)[real]
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
        _add_clipped(total, _per_example(total, module), real, math.inf)


def _losses(
    module: nn.Module, loss_fn: LossFn[BatchT], part: BatchT, generator: torch.Generator
) -> Tensor:
    losses = loss_fn(module, part, generator)
    if losses.shape != (len(part[0]),):
        raise ClippingError(
            f"losses have shape {tuple(losses.shape)}: must be [{len(part[0])}], one an example"
        )
    return losses


def _parts(batch: BatchT, size: int) -> Iterator[tuple[BatchT, Tensor]]:
    """The batch in parts of `size` examples, the last one padded; and which of them are real."""
    count = len(batch[0])
    for start in range(0, count, size):
        part = [tensor[start : start + size] for tensor in batch]
        real = torch.arange(size) < len(part[0])
        if not real.all():
            part = [torch.cat([t, t.new_zeros(size - len(t), *t.shape[1:])]) for t in part]
        yield _like(batch, part), real


def _placed(batch: BatchT, size: int, places: Tensor | None) -> Iterator[tuple[BatchT, Tensor]]:
    """As `_parts`, but every example is in the row that its own place says.

    Of those that share a row the first is in the first part, the second in the second: one example
    more moves others to later parts, and never to another row.
    """
    if places is None:
        yield from _parts(batch, size)
        return
    rows = places % size
    order = rows.argsort(stable=True)
    _, counts = torch.unique_consecutive(rows[order], return_counts=True)
    ranks = torch.empty_like(order)
    starts = counts.cumsum(0) - counts
    ranks[order] = torch.arange(len(order)) - starts.repeat_interleave(counts)
    for number in range(int(ranks.max()) + 1 if len(ranks) else 0):
        found = ranks == number
        real = torch.zeros(size, dtype=torch.bool)
        real[rows[found]] = True
        part = [tensor.new_zeros(size, *tensor.shape[1:]) for tensor in batch]
        for whole, tensor in zip(part, batch, strict=True):
            whole[rows[found]] = tensor[found]
        yield _like(batch, part), real


def _like(batch: BatchT, tensors: list[Tensor]) -> BatchT:
    make = getattr(type(batch), "_make", type(batch))  # a named tuple, or a plain one
    return make(tensors)
