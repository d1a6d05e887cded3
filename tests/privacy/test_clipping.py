"""Per-example clipped sums: the bound on one record's influence, and nothing but that changed."""

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedveil.config import VaeOptions
from fedveil.data_prep.schema import ImageSchema
from fedveil.models import Batch, family
from fedveil.models.layers import initialise
from fedveil.privacy.clipping import (
    CLIPPING_SLACK,
    ClippingError,
    Gradients,
    clipped_sum,
)

Pair = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Pair, torch.Generator], Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=gen(seed))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(2, 1, 4, stride=2, padding=1)
        self.out = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(torch.tanh(self.conv(x.view(-1, 1, 4, 4))))
        return torch.as_tensor(self.out(hidden.flatten(1)))


class Learnt(nn.Module):
    """A layer and numbers that depend on no input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 3)
        self.constant = nn.Linear(1, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        constant = torch.as_tensor(self.constant(x.new_full((len(x), 1), 10.0)))
        return (torch.tanh(self.linear(x)) + constant).sum(1, keepdim=True)


class Bare(nn.Module):
    """A bare parameter beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.tanh(self.linear(x)) * self.scale).sum(1, keepdim=True)


class Twice(nn.Module):
    """One layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(torch.tanh(self.linear(x)))).sum(1, keepdim=True)


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x)))).sum(1, keepdim=True)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 1))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(16, 1),
    "mlp": mlp,
    "conv": Conv,
    "constant": Learnt,
    "bare": Bare,
    "twice": Twice,
    "tied": Tied,
}


def make(name: str) -> nn.Module:
    module = MODULES[name]()
    for index, parameter in enumerate(module.parameters()):
        parameter.data = numbers(*parameter.shape, seed=100 + index) / 3
    return module


def squared(module: nn.Module, batch: Pair, generator: torch.Generator) -> Tensor:
    x, y = batch
    return (torch.as_tensor(module(x)).squeeze(1) - y).square()


def absolute(module: nn.Module, batch: Pair, generator: torch.Generator) -> Tensor:
    """A gradient that stays large near the target, so that clipping is always at work."""
    x, y = batch
    return 100 * (torch.as_tensor(module(x)).squeeze(1) - y).abs()


def by_loops(module: nn.Module, loss: Loss, batch: Pair, bound: float) -> Gradients:
    """The clipped sum by plain autograd, one example at a time, summed in float64."""
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    total = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in named.items()}
    for row in range(len(batch[0])):
        one = (batch[0][row : row + 1], batch[1][row : row + 1])
        found = torch.autograd.grad(loss(module, one, gen()).sum(), list(named.values()))
        wide = [g.double() for g in found]
        norm = math.sqrt(sum(float(g.square().sum()) for g in wide))
        for name, gradient in zip(named, wide, strict=True):
            total[name] += gradient * min(1.0, bound / norm if norm else 1.0)
    return total


def flat(gradients: Gradients) -> Tensor:
    return torch.cat([g.double().flatten() for g in gradients.values()])


def difference(first: Gradients, second: Gradients) -> float:
    return float((flat(first) - flat(second)).norm())


def without(batch: Pair, row: int) -> Pair:
    return (
        torch.cat([batch[0][:row], batch[0][row + 1 :]]),
        torch.cat([batch[1][:row], batch[1][row + 1 :]]),
    )


@st.composite
def wild_batches(draw: st.DrawFn, least: int = 1) -> Pair:
    """Up to 12 records, each at a wild scale of its own."""
    scales = st.sampled_from([0.0, 1e-4, 1.0, 30.0, 1e4])
    chosen = draw(st.lists(scales, min_size=least, max_size=12))
    seed = draw(st.integers(0, 2**32 - 1))
    x = numbers(len(chosen), 16, seed=seed) * torch.tensor(chosen)[:, None]
    return x.float(), numbers(len(chosen), seed=seed ^ 1)


class TestOneRecord:
    @pytest.mark.parametrize("name", sorted(MODULES))
    @given(data=st.data(), clipping_norm=st.sampled_from([1e-3, 1.0, 50.0]))
    def test_one_record_more_or_less_changes_the_sum_by_at_most_the_clipping_norm(
        self, name: str, data: st.DataObject, clipping_norm: float
    ) -> None:
        batch = data.draw(wild_batches())
        row = data.draw(st.integers(0, len(batch[0]) - 1))
        module = make(name)

        def total(part: Pair) -> Gradients:
            return clipped_sum(module, squared, part, clipping_norm, gen(), micro_batch=4)

        assert difference(total(batch), total(without(batch, row))) <= clipping_norm

    @given(
        st.integers(0, 9),
        st.sampled_from([1.0, 1e4]),
        st.integers(0, 2**31),
        st.sampled_from([4, 10]),
    )
    def test_so_it_is_for_the_vae_with_the_draws_of_the_others_held(
        self, count: int, scale: float, seed: int, micro_batch: int
    ) -> None:
        schema = ImageSchema(height=4, width=4, classes=("a", "b"))
        kind = family("vae")
        module = kind.build(VaeOptions(family="vae", width=2, latent=2), schema)
        initialise(module, gen(seed))
        x = torch.rand(count + 1, 1, 4, 4, generator=gen(seed)) * scale
        y = torch.randint(0, 2, (count + 1,), generator=gen(seed))

        def total(rows: int) -> Gradients:
            batch = Batch(x[:rows], y[:rows])
            return clipped_sum(
                module, kind.example_losses, batch, 1.0, gen(seed), micro_batch=micro_batch
            )

        assert difference(total(count + 1), total(count)) <= 1.0

    @pytest.mark.parametrize("name", sorted(MODULES))
    @pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
    def test_one_example_alone_has_the_norm_that_leaves_room_for_rounding(
        self, name: str, scale: float
    ) -> None:
        batch = (numbers(1, 16) * scale, numbers(1))
        for clipping_norm in (1e-3, 1.0, 7.0):
            total = clipped_sum(make(name), absolute, batch, clipping_norm, gen())
            norm = float(flat(total).norm())
            assert norm <= clipping_norm / 1.001 * (1 + 1e-6)
            if scale > 1e-3:
                assert norm == pytest.approx(clipping_norm / 1.001, rel=1e-5)

    @pytest.mark.parametrize(("count", "micro_batch"), [(1000, 64), (30_000, 256), (50_000, 256)])
    def test_rounding_in_a_large_batch_stays_within_the_slack(
        self, count: int, micro_batch: int
    ) -> None:
        """Like gradients add up to a sum whose float32 rounding must not exceed the slack."""
        module = nn.Linear(3, 1)
        x = numbers(count, 3) + torch.tensor([30.0, 20.0, 10.0])
        batch = (x, torch.zeros(count))

        def plain(module: nn.Module, batch: Pair, generator: torch.Generator) -> Tensor:
            return torch.as_tensor(module(batch[0])).squeeze(1)

        def total(part: Pair) -> Gradients:
            return clipped_sum(module, plain, part, 1.0, gen(), micro_batch=micro_batch)

        whole = total(batch)
        rows = (0, 1, 7, count // 3, count // 2, count - 1)
        assert max(difference(whole, total(without(batch, row))) for row in rows) <= 1.0


class TestTheSum:
    @pytest.mark.parametrize("name", sorted(MODULES))
    @given(data=st.data(), clipping_norm=st.sampled_from([1e-2, 1.0, 1e3]))
    def test_equals_single_example_gradients_by_plain_autograd(
        self, name: str, data: st.DataObject, clipping_norm: float
    ) -> None:
        x, y = data.draw(wild_batches())
        # In float64, where even the wildest record's gradient is well conditioned.
        module, batch = make(name).double(), (x.double(), y.double())
        total = clipped_sum(module, squared, batch, clipping_norm, gen(), micro_batch=5)
        expected = by_loops(module, squared, batch, clipping_norm / CLIPPING_SLACK)
        scale = max(float(flat(expected).norm()), clipping_norm)
        assert difference(total, expected) <= 1e-5 * scale

    def test_a_hand_computed_sum(self) -> None:
        # loss = (w x - y)^2 at w = 2: gradient 2 (2x - y) x, for (x, y) = (1, 1), (1, 2), (-1, 3):
        # 2, 0 and 10; clipped to 3/1.001 the last becomes 2.997003.
        module = nn.Linear(1, 1, bias=False)
        module.weight.data.fill_(2.0)
        batch = (torch.tensor([[1.0], [1.0], [-1.0]]), torch.tensor([1.0, 2.0, 3.0]))
        total = clipped_sum(module, squared, batch, 3.0, gen())
        assert float(total["weight"]) == pytest.approx(2 + 3 / 1.001, rel=1e-6)
        plain = clipped_sum(module, squared, batch, math.inf, gen())
        assert float(plain["weight"]) == 12.0

    def test_the_norm_is_over_all_parameters_together(self) -> None:
        # Two parameters with gradients 3 and 4: norm 5, clipped to 1/1.001 of it in both.
        module = nn.Linear(1, 1)
        batch = (torch.tensor([[0.75]]), torch.tensor([0.0]))

        def loss(module: nn.Module, batch: Pair, generator: torch.Generator) -> Tensor:
            return 4 * torch.as_tensor(module(batch[0])).squeeze(1)

        total = clipped_sum(module, loss, batch, 1.0, gen())
        assert float(total["weight"]) == pytest.approx(0.6 / 1.001, rel=1e-6)
        assert float(total["bias"]) == pytest.approx(0.8 / 1.001, rel=1e-6)

    @pytest.mark.parametrize("name", sorted(MODULES))
    @pytest.mark.parametrize("clipping_norm", [1.0, math.inf])
    def test_does_not_depend_on_the_micro_batch(self, name: str, clipping_norm: float) -> None:
        batch, module = (numbers(23, 16), numbers(23)), make(name)
        sums = [
            clipped_sum(module, squared, batch, clipping_norm, gen(), micro_batch=size)
            for size in (1, 7, 64, 23)
        ]
        for other in sums[1:]:
            assert difference(sums[0], other) <= 1e-5 * float(flat(sums[0]).norm())

    @pytest.mark.parametrize("name", sorted(MODULES))
    def test_infinity_gives_the_plain_sum(self, name: str) -> None:
        batch, module = (numbers(9, 16) * 50, numbers(9)), make(name)
        total = clipped_sum(module, squared, batch, math.inf, gen(), micro_batch=4)
        loss = squared(module, batch, gen()).sum()
        plain = torch.autograd.grad(loss, list(module.parameters()))
        expected = {n: g for (n, _), g in zip(module.named_parameters(), plain, strict=True)}
        assert difference(total, expected) <= 1e-5 * float(flat(expected).norm())

    @pytest.mark.parametrize("clipping_norm", [1.0, math.inf])
    def test_no_records_give_zeros(self, clipping_norm: float) -> None:
        module = make("mlp")
        total = clipped_sum(
            module, squared, (torch.zeros(0, 16), torch.zeros(0)), clipping_norm, gen()
        )
        assert list(total) == [name for name, _ in module.named_parameters()]
        for name, parameter in module.named_parameters():
            assert total[name].shape == parameter.shape
            assert total[name].is_floating_point()
            assert not total[name].any()

    @pytest.mark.parametrize("clipping_norm", [1e6, math.inf])
    @pytest.mark.parametrize("count", [1, 3, 64, 65])
    def test_padding_counts_for_nothing_even_where_zeros_have_no_finite_loss(
        self, clipping_norm: float, count: int
    ) -> None:
        # d/dw log(w x) = 1/w = 1 at w = 1, for every x but the padding's zero.
        module = nn.Linear(1, 1, bias=False)
        module.weight.data.fill_(1.0)
        batch = (torch.rand(count, 1, generator=gen()) + 0.5, torch.zeros(count))

        def loss(module: nn.Module, batch: Pair, generator: torch.Generator) -> Tensor:
            return torch.as_tensor(module(batch[0])).squeeze(1).log()

        total = clipped_sum(module, loss, batch, clipping_norm, gen())
        assert float(total["weight"]) == pytest.approx(count, rel=1e-5)

    @pytest.mark.parametrize("clipping_norm", [1e6, math.inf])
    def test_padding_counts_for_nothing_where_its_loss_is_large(self, clipping_norm: float) -> None:
        module, batch = make("linear"), (numbers(3, 16), numbers(3))

        def loss(module: nn.Module, batch: Pair, generator: torch.Generator) -> Tensor:
            far = 1e3 * (batch[0].abs().sum(1) == 0)
            return (torch.as_tensor(module(batch[0])).squeeze(1) - batch[1] - far).square()

        total = clipped_sum(module, loss, batch, clipping_norm, gen(), micro_batch=64)
        exact = clipped_sum(module, loss, batch, clipping_norm, gen(), micro_batch=3)
        assert difference(total, exact) <= 1e-5 * float(flat(exact).norm())


Grouped = tuple[Tensor, Tensor, Tensor]


@st.composite
def persons(draw: st.DrawFn) -> Grouped:
    """Up to 6 persons of up to 9 records each, in any order; some of no finite gradient."""
    scales = st.sampled_from([0.0, 1e-4, 1.0, 30.0, 1e4, 1e15, math.nan, math.inf])
    held = draw(st.lists(st.lists(scales, min_size=1, max_size=9), min_size=1, max_size=6))
    labels = draw(st.lists(st.integers(-(2**40), 2**40), min_size=6, max_size=6, unique=True))
    seed = draw(st.integers(0, 2**32 - 1))
    chosen = torch.tensor([scale for person in held for scale in person])
    groups = torch.tensor(
        [label for label, person in zip(labels, held, strict=False) for _ in person]
    )
    mixed = torch.randperm(len(chosen), generator=gen(seed))
    x = numbers(len(chosen), 16, seed=seed) * chosen[:, None]
    # Some persons' records all pull one way, which is when a sum is largest.
    if draw(st.booleans()):
        x = x.abs()
    return x[mixed], numbers(len(chosen), seed=seed ^ 1), groups[mixed]


def loops_by_group(module: nn.Module, loss: Loss, held: Grouped, bound: float) -> Gradients:
    """The sum of clipped sums by plain autograd, one person at a time."""
    x, y, groups = held
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    total = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in named.items()}
    for label in torch.unique(groups):
        own = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in named.items()}
        for row in torch.nonzero(groups == label).flatten().tolist():
            one = by_loops(module, loss, (x[row : row + 1], y[row : row + 1]), math.inf)
            if flat(one).isfinite().all():
                own = {n: own[n] + one[n] for n in own}
        norm = float(flat(own).norm())
        for name, gradient in own.items():
            total[name] += gradient * min(1.0, bound / norm if norm else 1.0)
    return total


def parity(module: nn.Module, batch: Pair, generator: torch.Generator) -> Tensor:
    """Losses whose gradients turn round with the row: what a server can make of last bits."""
    rows = 1 - 2 * (torch.arange(len(batch[0])) % 2)
    return torch.as_tensor(module(batch[0])).squeeze(1) * rows


class TestPlaces:
    """A record's row in a micro-batch is its own, whatever other records there are."""

    @given(
        count=st.integers(1, 40),
        micro_batch=st.sampled_from([1, 2, 3, 8, 64]),
        out=st.integers(0, 39),
        seed=st.integers(0, 2**31),
    )
    def test_one_record_less_moves_no_other(
        self, count: int, micro_batch: int, out: int, seed: int
    ) -> None:
        batch, module = (numbers(count, 16, seed=seed) * 50, numbers(count)), make("linear")
        places = torch.randint(0, 2**62, (count,), generator=gen(seed))
        keep = torch.arange(count) != out % count

        def summed(held: Pair, own: Tensor) -> Gradients:
            return clipped_sum(
                module, parity, held, 1.0, gen(), micro_batch=micro_batch, places=own
            )

        whole = summed(batch, places)
        rest = summed((batch[0][keep], batch[1][keep]), places[keep])
        assert difference(whole, rest) <= 1 / CLIPPING_SLACK + 1e-9

    def test_without_places_it_moves_all_that_follow(self) -> None:
        batch, module = (numbers(40, 16) * 50, numbers(40)), make("linear")
        whole = clipped_sum(module, parity, batch, 1.0, gen())
        rest = clipped_sum(module, parity, (batch[0][1:], batch[1][1:]), 1.0, gen())
        assert difference(whole, rest) > 2

    def test_the_sum_is_that_of_any_other_order(self) -> None:
        batch, module = (numbers(23, 16) * 3, numbers(23)), make("conv")
        places = torch.randint(0, 2**62, (23,), generator=gen(1))
        placed = clipped_sum(module, squared, batch, 1.0, gen(), micro_batch=8, places=places)
        plain = clipped_sum(module, squared, batch, 1.0, gen(), micro_batch=8)
        assert difference(placed, plain) <= 1e-6

    def test_no_records_give_zeros(self) -> None:
        nothing = (numbers(0, 16), numbers(0))
        total = clipped_sum(make("mlp"), squared, nothing, 1.0, gen(), places=torch.zeros(0).long())
        assert not flat(total).any()

    def test_places_that_are_not_one_an_example(self) -> None:
        with pytest.raises(ValueError, match=r"places = .*must be int64"):
            clipped_sum(
                make("mlp"), squared, (numbers(3, 16), numbers(3)), 1.0, gen(),
                places=torch.zeros(3),
            )  # fmt: skip


class TestOneGroup:
    """A privacy unit of several examples: their sum is clipped, not each of them."""

    @pytest.mark.parametrize("name", ["linear", "mlp", "conv", "tied"])
    @given(
        held=persons(),
        which=st.integers(0, 5),
        clipping_norm=st.sampled_from([1e-3, 1.0, 50.0]),
        micro_batch=st.sampled_from([1, 4, 64]),
    )
    def test_one_group_more_or_less_changes_the_sum_by_at_most_the_clipping_norm(
        self, name: str, held: Grouped, which: int, clipping_norm: float, micro_batch: int
    ) -> None:
        x, y, groups = held
        labels = torch.unique(groups)
        others = groups != labels[which % len(labels)]
        module = make(name)

        def total(rows: Tensor) -> Gradients:
            return clipped_sum(
                module,
                squared,
                (x[rows], y[rows]),
                clipping_norm,
                gen(),
                micro_batch=micro_batch,
                groups=groups[rows],
            )

        whole = total(torch.ones(len(x), dtype=torch.bool))
        assert flat(whole).isfinite().all()
        assert difference(whole, total(others)) <= clipping_norm

    @pytest.mark.parametrize("count", [1, 3, 4, 5, 50])
    def test_however_many_examples_it_has_alone_it_has_the_clipping_norm(self, count: int) -> None:
        batch = (numbers(1, 16).repeat(count, 1), numbers(1).repeat(count))
        groups = torch.full((count,), 7)
        total = clipped_sum(make("mlp"), absolute, batch, 2.0, gen(), micro_batch=4, groups=groups)
        assert float(flat(total).norm()) == pytest.approx(2.0 / 1.001, rel=1e-5)

    @pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 64])
    def test_a_hand_computed_sum(self, micro_batch: int) -> None:
        # loss = (w x - y)^2 at w = 2: gradients 2 (2x - y) x. Of group 9: 2 - 6 = -4, clipped to
        # -3/1.001; of group -1: 10 - 8 = 2, which stays; of group 4: 0.
        module = nn.Linear(1, 1, bias=False)
        module.weight.data.fill_(2.0)
        batch = (
            torch.tensor([[1.0], [-1.0], [1.0], [1.0], [1.0]]),
            torch.tensor([1.0, 3.0, 2.0, 5.0, 6.0]),
        )
        groups = torch.tensor([9, -1, 4, 9, -1])
        total = clipped_sum(
            module, squared, batch, 3.0, gen(), micro_batch=micro_batch, groups=groups
        )
        assert float(total["weight"]) == pytest.approx(2 - 3 / 1.001, rel=1e-6)

    @pytest.mark.parametrize("name", sorted(MODULES))
    @given(
        held=persons(),
        clipping_norm=st.sampled_from([1e-2, 1.0, 1e3]),
        micro_batch=st.sampled_from([1, 3, 64]),
    )
    def test_equals_a_loop_over_persons(
        self, name: str, held: Grouped, clipping_norm: float, micro_batch: int
    ) -> None:
        x, y, groups = held[0].double(), held[1].double(), held[2]
        module = make(name).double()
        total = clipped_sum(
            module, squared, (x, y), clipping_norm, gen(), micro_batch=micro_batch, groups=groups
        )
        expected = loops_by_group(module, squared, (x, y, groups), clipping_norm / CLIPPING_SLACK)
        scale = max(float(flat(expected).norm()), clipping_norm)
        assert difference(total, expected) <= 1e-5 * scale

    def test_groups_of_one_are_as_no_groups(self) -> None:
        batch, module = (numbers(23, 16) * 3, numbers(23)), make("conv")
        alone = clipped_sum(module, squared, batch, 1.0, gen(), micro_batch=8)
        groups = torch.randperm(23, generator=gen(3))
        grouped = clipped_sum(module, squared, batch, 1.0, gen(), micro_batch=8, groups=groups)
        assert difference(alone, grouped) <= 1e-6

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_bad_example_is_left_out_of_its_groups_sum(self, bad: float) -> None:
        x, y, groups = numbers(10, 16), numbers(10), torch.arange(10) // 4
        x[5, 3] = bad
        keep = torch.arange(10) != 5
        module = make("mlp")
        total = clipped_sum(module, squared, (x, y), 1.0, gen(), micro_batch=4, groups=groups)
        rest = clipped_sum(
            module, squared, (x[keep], y[keep]), 1.0, gen(), micro_batch=4, groups=groups[keep]
        )
        assert difference(total, rest) <= 1e-6

    def test_without_a_bound_they_do_not_matter(self) -> None:
        batch, module = (numbers(9, 16) * 50, numbers(9)), make("mlp")
        plain = clipped_sum(module, squared, batch, math.inf, gen(), micro_batch=4)
        grouped = clipped_sum(
            module, squared, batch, math.inf, gen(), micro_batch=4, groups=torch.arange(9) % 2
        )
        assert all(torch.equal(plain[name], grouped[name]) for name in plain)

    def test_no_records_give_zeros(self) -> None:
        nothing = (torch.zeros(0, 16), torch.zeros(0))
        groups = torch.zeros(0, dtype=torch.int64)
        total = clipped_sum(make("mlp"), squared, nothing, 1.0, gen(), groups=groups)
        assert not flat(total).any()

    def test_padding_is_in_no_group(self) -> None:
        module, batch = make("linear"), (numbers(3, 16), numbers(3))

        def loss(module: nn.Module, batch: Pair, generator: torch.Generator) -> Tensor:
            far = 1e3 * (batch[0].abs().sum(1) == 0)
            return (torch.as_tensor(module(batch[0])).squeeze(1) - batch[1] - far).square()

        sums = [
            clipped_sum(
                module, loss, batch, 1e6, gen(), micro_batch=size, groups=torch.zeros(3).long()
            )
            for size in (64, 3)
        ]
        assert difference(*sums) <= 1e-5 * float(flat(sums[1]).norm())

    def test_last_bits_of_gradients_that_cancel_are_not_blown_up(self) -> None:
        """Of 2000 pairs whose gradients cancel but for bits that hang on the place in the part."""
        module = nn.Linear(2, 1, bias=False)
        pairs = torch.arange(2000).repeat_interleave(2)

        def loss(module: nn.Module, batch: Pair, generator: torch.Generator) -> Tensor:
            # 3e-8 is what float32 may round a gradient by.
            place = 1 + 3e-8 * (torch.arange(len(batch[0])) % 2).double()
            return torch.as_tensor(module(batch[0])).squeeze(1) * place * batch[1]

        module = module.double()
        x = torch.ones(4000, 2, dtype=torch.float64) * 1e6
        sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(2000)
        whole = clipped_sum(module, loss, (x, sign), 0.01, gen(), groups=pairs)
        # One small group before all others, which shifts the place of each.
        more = (torch.cat([x[:1] * 1e-20, x]), torch.cat([sign[:1], sign]))
        shifted = clipped_sum(
            module, loss, more, 0.01, gen(), groups=torch.cat([torch.tensor([-1]), pairs])
        )
        # Each pair has micro-batches of its own, and with them its places.
        assert difference(whole, shifted) <= 1e-12

    @pytest.mark.parametrize(
        "groups",
        [torch.zeros(4).long(), torch.zeros(3), torch.zeros(3, 1).long(), torch.zeros(3).int()],
    )
    @pytest.mark.parametrize("clipping_norm", [1.0, math.inf])
    def test_groups_that_are_not_one_an_example(self, groups: Tensor, clipping_norm: float) -> None:
        with pytest.raises(ValueError, match="must be int64"):
            clipped_sum(
                make("mlp"), squared, (numbers(3, 16), numbers(3)), clipping_norm, gen(),
                groups=groups,
            )  # fmt: skip


class TestNotFinite:
    @pytest.mark.parametrize("name", sorted(MODULES))
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("clipping_norm", [1.0, math.inf])
    def test_a_bad_record_counts_as_zero_and_the_others_as_ever(
        self, name: str, bad: float, clipping_norm: float
    ) -> None:
        row = 3  # the last of its micro-batch: the rest falls into the same parts but one
        x, y = numbers(10, 16), numbers(10)
        x[row, 5] = bad
        module = make(name)
        total = clipped_sum(module, squared, (x, y), clipping_norm, gen(), micro_batch=4)
        rest = clipped_sum(
            module, squared, without((x, y), row), clipping_norm, gen(), micro_batch=4
        )
        assert flat(total).isfinite().all()
        assert difference(total, rest) <= 1e-6 * float(flat(rest).norm())

    @pytest.mark.parametrize("clipping_norm", [1.0, math.inf])
    def test_so_does_a_record_of_finite_loss_and_infinite_gradient(
        self, clipping_norm: float
    ) -> None:
        # sqrt(w x) with w x = 0 exactly: the loss is 0 and its slope infinite.
        def root(module: nn.Module, batch: Pair, generator: torch.Generator) -> Tensor:
            return torch.as_tensor(module(batch[0])).squeeze(1).sqrt()

        module = nn.Linear(16, 1, bias=False)
        module.weight.data.fill_(0.125)
        x = numbers(6, 16).abs()
        x[2] = torch.tensor([1.0, -1.0] * 8)
        batch = (x, torch.zeros(6))
        assert root(module, batch, gen()).isfinite().all()
        total = clipped_sum(module, root, batch, clipping_norm, gen(), micro_batch=2)
        rest = clipped_sum(module, root, without(batch, 2), clipping_norm, gen(), micro_batch=5)
        assert difference(total, rest) <= 1e-6 * float(flat(rest).norm())

    @pytest.mark.parametrize("clipping_norm", [1.0, math.inf])
    def test_only_bad_records_give_zeros(self, clipping_norm: float) -> None:
        batch = (torch.full((3, 16), math.nan), torch.zeros(3))
        total = clipped_sum(make("mlp"), squared, batch, clipping_norm, gen())
        assert not flat(total).any()

    def test_a_finite_gradient_whose_norm_overflows_stays_within_the_bound(self) -> None:
        batch = (torch.full((2, 16), 1e19), torch.zeros(2))
        total = clipped_sum(make("linear"), squared, batch, 1.0, gen())
        assert flat(total).isfinite().all()
        assert float(flat(total).norm()) <= 2.0


class TestTheModule:
    def test_is_left_as_it_was_found(self) -> None:
        module = make("conv")
        module.get_parameter("conv.bias").requires_grad_(False)
        values = copy.deepcopy(module.state_dict())
        batch = (numbers(5, 16), numbers(5))
        first = clipped_sum(module, squared, batch, 1.0, gen())
        assert "conv.bias" not in first
        assert not module.get_parameter("conv.bias").requires_grad
        for name, parameter in module.named_parameters():
            assert parameter.requires_grad == (name != "conv.bias")
            assert parameter.grad is None
            assert getattr(parameter, "grad_sample", None) is None
            assert torch.equal(parameter, values[name])
        for layer in module.modules():
            assert layer.training
            assert not layer._forward_hooks
            assert not layer._forward_pre_hooks
            assert not layer._backward_hooks
            assert not layer._backward_pre_hooks
        second = clipped_sum(module, squared, batch, 1.0, gen())
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_works_as_usual_afterwards(self) -> None:
        module = make("mlp")
        batch = (numbers(5, 16), numbers(5))
        clipped_sum(module, squared, batch, 1.0, gen())
        squared(module, batch, gen()).sum().backward()  # type: ignore[no-untyped-call]
        for parameter in module.parameters():
            assert parameter.grad is not None
            assert getattr(parameter, "grad_sample", None) is None
        copy.deepcopy(module)

    def test_keeps_no_record_after_success(self) -> None:
        module = make("conv")
        clipped_sum(module, squared, (numbers(5, 16), numbers(5)), 1.0, gen())
        assert not any(getattr(layer, "activations", []) for layer in module.modules())

    def test_keeps_no_record_after_a_failure(self) -> None:
        module = make("conv")
        with pytest.raises(ClippingError):
            clipped_sum(module, of_wrong_shape, (numbers(5, 16), numbers(5)), 1.0, gen())
        assert not any(getattr(layer, "activations", []) for layer in module.modules())
        assert not any(layer._forward_hooks for layer in module.modules())

    @pytest.mark.parametrize("name", sorted(MODULES))
    def test_a_failed_call_does_not_spoil_the_next(self, name: str) -> None:
        module, batch = make(name), (numbers(9, 16), numbers(9))
        expected = clipped_sum(make(name), squared, batch, 1.0, gen(), micro_batch=7)
        with pytest.raises(ClippingError):
            clipped_sum(module, of_wrong_shape, batch, 1.0, gen(), micro_batch=64)
        total = clipped_sum(module, squared, batch, 1.0, gen(), micro_batch=7)
        assert difference(total, expected) <= 1e-6


def of_wrong_shape(module: nn.Module, batch: Pair, generator: torch.Generator) -> Tensor:
    return torch.as_tensor(module(batch[0]))  # [B, 1]


class TestRefused:
    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("track", [True, False])
    def test_batch_norm_of_any_kind(self, *, affine: bool, track: bool) -> None:
        """It couples records: one of them moves the gradients of all others."""
        module = nn.Sequential(
            nn.Linear(16, 4),
            nn.BatchNorm1d(4, affine=affine, track_running_stats=track),
            nn.Linear(4, 1),
        )
        with pytest.raises(ClippingError):
            clipped_sum(module, squared, (numbers(8, 16), numbers(8)), 1.0, gen())

    @pytest.mark.parametrize("clipping_norm", [1.0, math.inf])
    @pytest.mark.parametrize("shape", ["scalar", "column", "short"])
    def test_losses_that_are_not_one_an_example(self, clipping_norm: float, shape: str) -> None:
        def loss(module: nn.Module, batch: Pair, generator: torch.Generator) -> Tensor:
            losses = squared(module, batch, generator)
            return {"scalar": losses.sum(), "column": losses[:, None], "short": losses[1:]}[shape]

        with pytest.raises(ClippingError, match="one an example"):
            clipped_sum(make("mlp"), loss, (numbers(8, 16), numbers(8)), clipping_norm, gen())

    @pytest.mark.parametrize("clipping_norm", [1.0, math.inf])
    def test_a_parameter_that_takes_no_part(self, clipping_norm: float) -> None:
        module = make("mlp")
        module.add_module("idle", nn.Linear(2, 2))

        def loss(module: nn.Module, batch: Pair, generator: torch.Generator) -> Tensor:
            hidden = batch[0]
            for name in "012":
                hidden = module.get_submodule(name)(hidden)
            return (hidden.squeeze(1) - batch[1]).square()

        with pytest.raises(ClippingError, match=r"idle\.weight"):
            clipped_sum(module, loss, (numbers(3, 16), numbers(3)), clipping_norm, gen())

    def test_a_parameter_whose_gradient_the_layer_does_not_see(self) -> None:
        """A weight used past its layer has a per-example gradient of none or half of its uses."""
        module = make("linear")

        def loss(module: nn.Module, batch: Pair, generator: torch.Generator) -> Tensor:
            weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
            return (nn.functional.linear(batch[0], weight, bias).squeeze(1) - batch[1]).square()

        with pytest.raises(ClippingError):
            clipped_sum(module, loss, (numbers(3, 16), numbers(3)), 1.0, gen())

    @pytest.mark.parametrize("clipping_norm", [0.0, -1.0, math.nan, -math.inf])
    def test_bounds_out_of_range(self, clipping_norm: float) -> None:
        with pytest.raises(ValueError, match="must be > 0"):
            clipped_sum(make("mlp"), squared, (numbers(3, 16), numbers(3)), clipping_norm, gen())

    def test_a_micro_batch_out_of_range(self) -> None:
        with pytest.raises(ValueError, match="must be > 0, >= 1"):
            clipped_sum(
                make("mlp"), squared, (numbers(3, 16), numbers(3)), 1.0, gen(), micro_batch=0
            )


def test_global_generators_are_not_touched() -> None:
    module, batch = make("conv"), (numbers(5, 16), numbers(5))
    before, numpy_before = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    clipped_sum(module, squared, batch, 1.0, gen())
    assert torch.equal(torch.get_rng_state(), before)
    assert str(np.random.get_state()) == numpy_before  # noqa: NPY002
