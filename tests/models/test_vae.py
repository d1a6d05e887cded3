"""The variational autoencoder's numbers, computed by hand beside it."""

import math

import pytest
import torch
from torch import Tensor, nn

from fedveil.config import VaeOptions
from fedveil.data_prep.schema import ImageSchema, Schema, parse_schema
from fedveil.models import Batch, family
from fedveil.models.layers import initialise
from fedveil.models.vae import Vae

KIND = family("vae")


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def silent(schema: Schema, **options: object) -> Vae:
    """A VAE of zero weights: every logit, mean and log variance is zero."""
    raw = {"family": "vae", "latent": 2, "width": 2, "hidden": 4, **options}
    module = KIND.build(VaeOptions.model_validate(raw), schema)
    assert isinstance(module, Vae)
    for parameter in module.parameters():
        parameter.data.zero_()
    return module


def column(name: str, kind: str, **more: object) -> dict[str, object]:
    return {"name": name, "kind": kind, **more}


IMAGE = ImageSchema(height=4, width=4)


class TestLossesByHand:
    def test_cross_entropy_of_pixels_at_one_half_is_log_two_each(self) -> None:
        batch = Batch(torch.rand(3, 1, 4, 4, generator=gen()), torch.zeros(3).long())
        losses = KIND.example_losses(silent(IMAGE, reconstruction="bce"), batch, gen())
        assert losses.tolist() == pytest.approx([16 * math.log(2)] * 3, rel=1e-6)

    def test_squares_of_pixels_are_summed(self) -> None:
        batch = Batch(torch.full((1, 1, 4, 4), 0.75), torch.zeros(1).long())
        losses = KIND.example_losses(silent(IMAGE, reconstruction="mse"), batch, gen())
        assert losses.tolist() == pytest.approx([16 * 0.0625], rel=1e-6)

    def test_classes_cost_their_own_cross_entropy(self) -> None:
        schema = ImageSchema(height=4, width=4, classes=("a", "b", "c", "d"))
        batch = Batch(torch.zeros(2, 1, 4, 4), torch.tensor([0, 3]))
        losses = KIND.example_losses(silent(schema, reconstruction="bce"), batch, gen())
        assert losses.tolist() == pytest.approx([16 * math.log(2) + math.log(4)] * 2, rel=1e-6)

    @pytest.mark.parametrize("beta", [0.5, 2.0])
    def test_the_divergence_of_the_posterior_is_weighted_by_beta(self, beta: float) -> None:
        # q = N(1, e^0.5) in both latents: KL = 2 * (1 + e^0.5 - 1 - 0.5) / 2.
        vae = silent(IMAGE, reconstruction="bce", beta=beta)
        vae.posterior.bias.data = torch.tensor([1.0, 1.0, 0.5, 0.5])
        batch = Batch(torch.zeros(1, 1, 4, 4), torch.zeros(1).long())
        expected = 16 * math.log(2) + beta * (math.exp(0.5) - 0.5)
        losses = KIND.example_losses(vae, batch, gen())
        assert losses.tolist() == pytest.approx([expected], rel=1e-6)

    def test_a_tables_columns_add_up(self) -> None:
        columns = [
            column("a", "categorical", categories=["x", "y", "z"]),
            column("b", "numeric", bounds=[0, 1]),
            column("c", "numeric", bounds=[0, 1], nullable=True),
        ]
        schema = parse_schema({"column": columns}, "test")
        vae = silent(schema, reconstruction="bce")
        # level y, b = 0.3, c = 0.9; then c missing, whose value costs nothing.
        x = torch.tensor([[0, 1, 0, 0.3, 0.9, 1], [0, 1, 0, 0.3, 0, 0]])
        losses = KIND.example_losses(vae, Batch(x, torch.zeros(2).long()), gen())
        with_c = math.log(3) + 3 * math.log(2)
        assert losses.tolist() == pytest.approx([with_c, with_c - math.log(2)], rel=1e-6)

    def test_scores_are_bounds_at_the_posteriors_mean(self) -> None:
        batch = Batch(torch.rand(3, 1, 4, 4, generator=gen()), torch.zeros(3).long())
        vae = silent(IMAGE, reconstruction="bce")
        assert KIND.scores(vae, batch).tolist() == pytest.approx([-16 * math.log(2)] * 3)


class TestScoreBoundsByHand:
    """Bounds of a score, which is a log-likelihood in nats: of what the schema declares alone."""

    @pytest.mark.parametrize("reconstruction", ["bce", "mse"])
    def test_of_an_image_are_a_nat_a_pixel_and_certainty(self, reconstruction: str) -> None:
        for channels in (1, 3):
            schema = ImageSchema(height=4, width=8, channels=channels, classes=("a", "b"))
            vae = silent(schema, reconstruction=reconstruction)
            assert KIND.score_bounds(vae) == (-32.0 * channels, 0.0)

    def test_of_a_table_are_its_columns_widest_guesses(self) -> None:
        columns = [
            column("a", "categorical", categories=["x", "y", "z"]),
            column("b", "categorical", categories=["x", "y"], nullable=True),
            column("c", "numeric", bounds=[0, 1]),
            column("d", "integer", bounds=[0, 9], nullable=True),
            column("e", "categorical", categories=["no", "yes"]),
        ]
        schema = parse_schema({"column": columns, "label": "e"}, "test")
        # Four columns beside the label; levels 3, 3 (a missing one counts) and 2 classes.
        low = -(2 * 4 + 2 * math.log(3) + math.log(2))
        # A number may be known to e^-4 of its range: 4 nats each.
        assert KIND.score_bounds(silent(schema)) == pytest.approx((low, 8.0))
        # Without a spread of its own a number is a coin: never more than certainty.
        assert KIND.score_bounds(silent(schema, reconstruction="bce")) == pytest.approx((low, 0.0))

    def test_without_numbers_certainty_is_the_most(self) -> None:
        schema = parse_schema(
            {"column": [column("a", "categorical", categories=["x", "y", "z"])]}, "test"
        )
        assert KIND.score_bounds(silent(schema)) == pytest.approx((-(2 + math.log(3)), 0.0))

    def test_the_sharpest_spread_reaches_the_upper_end(self) -> None:
        schema = parse_schema({"column": [column("a", "numeric", bounds=[0, 1])]}, "test")
        vae = silent(schema)
        assert vae.spread is not None
        for parameter in vae.spread.parameters():
            parameter.data.fill_(-1e3)
        # Its mean is sigmoid(0), and there the record is: no error, log scale -4.
        batch = Batch(torch.full((1, 1), 0.5), torch.zeros(1).long())
        assert KIND.scores(vae, batch).tolist() == pytest.approx([4.0])
        assert KIND.score_bounds(vae)[1] == 4.0


class TestFloat64:
    """The parts that made float32 of their own: labels, the prior, the spread."""

    def test_losses_and_scores_keep_their_type(self) -> None:
        columns = [
            column("a", "numeric", bounds=[0, 1]),
            column("b", "categorical", categories=["no", "yes"]),
        ]
        schema = parse_schema({"column": columns, "label": "b"}, "test")
        vae = silent(schema).double()
        batch = Batch(torch.full((3, 1), 0.25).double(), torch.tensor([0, 1, 1]))
        scores = KIND.scores(vae, batch)
        assert scores.dtype == torch.float64
        # N(0.5, e^-1.5) at 0.25, without its constant, and one of two labels.
        expected = -(0.5 * 0.0625 * math.exp(3) - 1.5) - math.log(2)
        assert scores.tolist() == pytest.approx([expected] * 3, rel=1e-14)


class TestLabels:
    def schema(self) -> ImageSchema:
        return ImageSchema(height=4, width=4, classes=("a", "b", "c"))

    def test_the_learnt_prior_finds_the_shares_of_the_classes(self) -> None:
        vae = silent(self.schema())
        y = torch.tensor([0] * 6 + [1] * 3 + [2])
        batch = Batch(torch.zeros(10, 1, 4, 4), y)
        optimiser = torch.optim.Adam(vae.parameters(), lr=0.02)
        generator = gen()
        for _ in range(200):
            optimiser.zero_grad()
            loss = KIND.example_losses(vae, batch, generator).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        drawn = KIND.sample(vae, 20_000, gen()).y
        shares = torch.bincount(drawn, minlength=3) / 20_000
        assert shares.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.03)

    def test_condition_what_is_sampled(self) -> None:
        module = KIND.build(VaeOptions(family="vae"), self.schema())
        initialise(module, gen())
        first, second = (
            KIND.sample(module, 4, gen(1), torch.full((4,), label)).x for label in (0, 2)
        )
        assert not torch.allclose(first, second)


def test_the_log_variance_is_bounded() -> None:
    vae = silent(IMAGE)
    vae.posterior.bias.data = torch.tensor([0.0, 0.0, 1e4, -1e4])
    nothing = torch.zeros(1, 0)
    _, log_variance = vae.encode(torch.zeros(1, 1, 4, 4), nothing)
    assert log_variance.tolist() == [[8.0, -8.0]]


def test_missing_and_extreme_pixels_give_finite_losses() -> None:
    module = KIND.build(VaeOptions(family="vae"), IMAGE)
    initialise(module, gen())
    for value in (0.0, 1.0):
        batch = Batch(torch.full((2, 1, 4, 4), value), torch.zeros(2).long())
        losses: Tensor = KIND.example_losses(module, batch, gen())
        assert losses.isfinite().all()


def test_another_module_is_refused() -> None:
    module, batch = nn.Linear(2, 2), Batch(torch.zeros(1, 2), torch.zeros(1).long())
    with pytest.raises(TypeError, match="Linear: is no Vae"):
        KIND.example_losses(module, batch, gen())
    with pytest.raises(TypeError, match="Linear: is no Vae"):
        KIND.scores(module, batch)
    with pytest.raises(TypeError, match="Linear: is no Vae"):
        KIND.sample(module, 1, gen())
    with pytest.raises(TypeError, match="Linear: is no Vae"):
        KIND.score_bounds(module)
