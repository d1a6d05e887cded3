"""Building blocks and public initial weights."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedveil.models.layers import Lookup, initialise
from fedveil.models.state import to_arrays
from fedveil.privacy.clipping import clipped_sum


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.SiLU(),
        nn.ConvTranspose2d(3, 2, 2),
        nn.Linear(5, 4),
        nn.Linear(4, 2, bias=False),
        Lookup(3, 4, gain=2.0),
    )


class TestInitialise:
    def test_is_the_same_for_the_same_generator(self) -> None:
        first, second = network(), network()
        initialise(first, gen(4))
        initialise(second, gen(4))
        assert all(
            np.array_equal(a, b)
            for a, b in zip(to_arrays(first).values(), to_arrays(second).values(), strict=True)
        )

    def test_differs_for_another(self) -> None:
        first, second = network(), network()
        initialise(first, gen(4))
        initialise(second, gen(5))
        assert not np.array_equal(to_arrays(first)["0.weight"], to_arrays(second)["0.weight"])

    def test_neither_reads_nor_moves_the_global_generator(self) -> None:
        torch.manual_seed(1)
        first = network()
        torch.manual_seed(2)
        second = network()
        before = torch.get_rng_state()
        initialise(first, gen(4))
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(3)
        initialise(second, gen(4))
        a, b = to_arrays(first), to_arrays(second)
        assert all(np.array_equal(a[name], b[name]) for name in a)

    def test_leaves_no_parameter_as_it_was_built(self) -> None:
        """What `build` drew from the global generator must not last."""
        net = network()
        for parameter in net.parameters():
            parameter.data.fill_(math.nan)
        initialise(net, gen())
        assert all(parameter.isfinite().all() for parameter in net.parameters())

    def test_weights_lie_within_one_over_the_root_of_the_fan_in_and_biases_are_zero(self) -> None:
        net = network()
        initialise(net, gen())
        arrays = to_arrays(net)
        for name, fan_in in (
            ("0.weight", 9),
            ("2.weight", 2 * 4),
            ("3.weight", 5),
            ("4.weight", 4),
        ):
            bound = 1 / math.sqrt(fan_in)
            assert 0.5 * bound < np.abs(arrays[name]).max() <= bound * (1 + 1e-6)
        for name in ("0.bias", "2.bias", "3.bias"):
            assert not arrays[name].any()

    def test_a_lookup_starts_at_zero(self) -> None:
        net = network()
        initialise(net, gen())
        assert not to_arrays(net)["5.weights.weight"].any()


class TestLookup:
    def test_gives_the_row_times_the_gain(self) -> None:
        layer = Lookup(2, 3, gain=5.0)
        layer.weights.weight.data = torch.tensor([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]])
        rows = layer(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        assert rows.tolist() == [[20.0, 25.0, 30.0], [5.0, 10.0, 15.0]]

    def test_has_per_example_gradients(self) -> None:
        # The loss 3 * first number has gradient 3 * gain in one weight: clipped to 1/1.001.
        def loss(module: nn.Module, batch: tuple[Tensor], generator: torch.Generator) -> Tensor:
            return 3 * torch.as_tensor(module(batch[0]))[:, 0]

        layer = Lookup(2, 3, gain=5.0)
        batch = (torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),)
        (total,) = clipped_sum(layer, loss, batch, 1.0, gen()).values()
        expected = torch.tensor([[2.0, 1.0], [0.0, 0.0], [0.0, 0.0]]) / 1.001
        assert torch.allclose(total.float(), expected, rtol=1e-6)
        (plain,) = clipped_sum(layer, loss, batch, math.inf, gen()).values()
        assert plain[0].tolist() == pytest.approx([30.0, 15.0])


def test_a_layer_without_declared_initial_weights_is_refused() -> None:
    """Or it would start from torch's global state, which is no public randomness."""
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with pytest.raises(TypeError, match=r"^1\.weight: "):
        initialise(module, gen())
