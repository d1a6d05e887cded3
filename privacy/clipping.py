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

RECORD_NORMS = 16
"""How many clipping norms one example may add to its group's sum before that is clipped.

In a group's sum large gradients may cancel, and then it is their last bits that are left and
scaled up. Without a limit, 2000 groups of two examples of gradients 10^8 clipping norms long that
cancel moved the sum by 40 clipping norms when another group shifted their places by one; with it,
all bits stay as small against the clipping norm as those of 16 examples on their own.
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
        groups: [N] int64, which privacy unit each example belongs to; any labels, in any order.
            `None`: each example is its own.

    Returns:
        Gradient sums by parameter name, float64; zeros for an empty batch.

    Raises:
        ClippingError: A layer has no per-example gradient, or the losses are not [B].
        ValueError: A bound or size out of range, or groups that are not [N] int64.
    """
    if not clipping_norm > 0 or micro_batch < 1:
        raise ValueError(
            f"clipping_norm, micro_batch = {clipping_norm}, {micro_batch}: must be > 0, >= 1"
        )
    if groups is not None and (groups.shape, groups.dtype) != ((len(batch[0]),), torch.int64):
        raise ValueError(
            f"groups = {groups.dtype} {tuple(groups.shape)}: must be int64 ({len(batch[0])},)"
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
    bound = clipping_norm / CLIPPING_SLACK
    if groups is not None:
        # A unit's examples side by side, so that one unit at most is unfinished at any time.
        order = groups.argsort(stable=True)
        batch, groups = _like(batch, [tensor[order] for tensor in batch]), groups[order]
    carried = Gradients()
    with _hooked(module):
        for number, (part, real) in enumerate(_parts(batch, micro_batch)):
            _losses(module, loss_fn, part, generator).sum().backward()  # type: ignore[no-untyped-call]
            if groups is None:
                _add_clipped(total, _per_example(total, module), real, bound)
            else:
                left = groups[number * micro_batch :]
                carried = _add_units(total, _per_example(total, module), left, real, carried, bound)
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


def _add_units(
    total: Gradients, flat: Gradients, groups: Tensor, real: int, carried: Gradients, bound: float
) -> Gradients:
    """Adds the clipped sums of the units that end within one micro-batch.

    Args:
        total: What they are added to.
        flat: Per-example gradients of the micro-batch.
        groups: The unit of each example from the micro-batch's first one on.
        real: How many of the micro-batch's examples are no padding.
        carried: The sum so far of the unit that goes on from the micro-batch before, or nothing.
        bound: What a unit's sum is clipped to.

    Returns:
        The same of the unit that goes on into the next micro-batch.
    """
    units, place = torch.unique_consecutive(groups[:real], return_inverse=True)
    factors = _factors(flat, real, RECORD_NORMS * bound)[:real, None]
    as_they_are = bool((factors == 1).all())
    sums = {}
    for name, per_example in flat.items():
        rows = per_example[:real] if as_they_are else per_example[:real] * factors
        sums[name] = rows.new_zeros(len(units), rows.shape[1]).index_add_(0, place, rows)
        if carried:
            sums[name][0] += carried[name]
    goes_on = len(groups) > real and bool(groups[real] == units[-1])
    carried = {name: rows[-1].clone() for name, rows in sums.items()} if goes_on else {}
    _add_clipped(total, sums, len(units) - goes_on, bound)
    return carried


def _add_clipped(total: Gradients, flat: Gradients, count: int, bound: float) -> None:
    """Adds the first `count` rows, each clipped: gradients of examples, or sums of units."""
    factors = _factors(flat, count, bound)
    for name, rows in flat.items():
        total[name] += (factors @ rows).view_as(total[name])


def _factors(flat: Gradients, count: int, bound: float) -> Tensor:
    """What each row is to be multiplied by; makes those zero that are not to count at all."""
    # The norm over all parameters together: clipping each by itself would allow sqrt(their number).
    norms = torch.stack([rows.norm(dim=1) for rows in flat.values()]).norm(dim=0)
    usable = norms.isfinite()
    usable[count:] = False
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
