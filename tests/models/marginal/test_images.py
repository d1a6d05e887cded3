"""Gaussians by class, fitted to noisy class moments."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedveil.config import MarginalOptions, Statistics
from fedveil.data_prep import Encoded, modality
from fedveil.data_prep.queries import Noisy, answers, noisy, workload
from fedveil.data_prep.schema import ImageSchema
from fedveil.models import Batch, marginal
from fedveil.models.layers import initialise
from fedveil.models.marginal import images

OPTIONS = MarginalOptions(family="marginal")
DIGITS = ImageSchema(height=8, width=8, classes=tuple("0123456789"))
COLOUR = ImageSchema(height=4, width=8, channels=3, classes=("cat", "dog"))
PLAIN = ImageSchema(height=4, width=4)
SCHEMAS = (DIGITS, COLOUR, PLAIN)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def digits() -> Encoded:
    kind = modality(DIGITS)
    return kind.encode(kind.read("sklearn:digits", DIGITS), DIGITS)


def some(schema: ImageSchema, count: int) -> Encoded:
    rng = np.random.default_rng(1)
    x = rng.random((count, *schema.shape), dtype=np.float32)
    return Encoded(x, rng.integers(0, max(1, len(schema.classes)), count))


def released(
    records: Encoded, schema: ImageSchema, noise_multiplier: float, seed: int = 0, **options: object
) -> Noisy:
    units = max(1, len(records.y))
    asked = workload(schema, Statistics.model_validate(options), units, noise_multiplier)
    scale = noise_multiplier * asked.sensitivity
    noise = np.random.default_rng(seed).normal(0, 1, asked.length) * scale
    return noisy(asked, answers(asked, records, schema) + noise, scale, units)


def accuracy(noise_multiplier: float) -> float:
    """Of the nearest class mean of samples, over real digits."""
    records = digits()
    module = marginal.fit(OPTIONS, DIGITS, released(records, DIGITS, noise_multiplier), gen())
    drawn = marginal.sample(module, 3000, gen(), torch.arange(3000) % 10)
    x = drawn.x.flatten(1).numpy()
    means = np.stack([x[drawn.y.numpy() == label].mean(axis=0) for label in range(10)])
    far = np.linalg.norm(records.x.reshape(-1, 1, 64) - means, axis=2)
    return float((far.argmin(axis=1) == records.y).mean())


class TestFit:
    def test_draws_the_digits(self) -> None:
        assert accuracy(0.0) > 0.85
        assert accuracy(1.4) > 0.8

    def test_says_nothing_where_noise_is_all_there_is(self) -> None:
        assert accuracy(300.0) < 0.5

    def test_learns_shares_means_and_variances_of_a_gaussian(self) -> None:
        """Of images that no clipping touches: greys around 0.25, a dog a little lighter."""
        rng = np.random.default_rng(0)
        y = (rng.random(6000) < 0.25).astype(np.int64)
        x = rng.normal(0.25, 0.03, (6000, *COLOUR.shape)) + 0.05 * y[:, None, None, None]
        found = released(Encoded(x.astype(np.float32), y), COLOUR, 0.0)
        module = images.fit(OPTIONS, COLOUR, found, gen())
        assert module.shares.values.softmax(dim=0).tolist() == pytest.approx([0.75, 0.25], abs=0.02)
        cat, dog = module.means.values
        assert cat.abs().max() < 0.01
        assert dog[0].item() == pytest.approx(0.05 * math.sqrt(96), abs=0.01)
        for label in range(2):
            factor = module.factor(label)
            spread = (factor @ factor.T).diagonal().sqrt()
            assert spread.tolist() == pytest.approx([0.03] * 96, rel=0.15)
        drawn = marginal.sample(module, 4000, gen(), torch.ones(4000, dtype=torch.int64))
        assert drawn.x.mean().item() == pytest.approx(0.30, abs=0.01)
        assert drawn.x.std(dim=0).mean().item() == pytest.approx(0.03, abs=0.005)

    @pytest.mark.parametrize("kind", ["class", "shared", "diagonal"])
    @pytest.mark.parametrize("schema", SCHEMAS)
    @pytest.mark.parametrize("noise_multiplier", [0.0, 1.0, 1e6])
    def test_is_finite_whatever_the_noise(
        self, schema: ImageSchema, kind: str, noise_multiplier: float
    ) -> None:
        for records in (some(schema, 0), some(schema, 3), some(schema, 60)):
            found = released(records, schema, noise_multiplier, image_covariances=kind)
            module = marginal.fit(OPTIONS, schema, found, gen())
            built = marginal.build(OPTIONS, schema)
            initialise(built, gen())
            assert {n: p.shape for n, p in module.named_parameters()} == {
                n: p.shape for n, p in built.named_parameters()
            }
            assert all(parameter.isfinite().all() for parameter in module.parameters())
            drawn = marginal.sample(module, 20, gen())
            assert drawn.x.isfinite().all()
            assert ((drawn.x >= 0) & (drawn.x <= 1)).all()
            assert marginal.scores(module, drawn).isfinite().all()

    def test_is_by_the_release_alone(self) -> None:
        found = released(some(COLOUR, 50), COLOUR, 0.5)
        first, second = (marginal.fit(OPTIONS, COLOUR, found, gen(seed)) for seed in (1, 2))
        for one, other in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(one, other)


class TestScores:
    def test_are_those_of_a_gaussian_by_hand(self) -> None:
        """A module that says nothing: 16 coefficients of spread 0.02, blurred by 0.25."""
        module = marginal.build(OPTIONS, PLAIN)
        x = torch.full((1, *PLAIN.shape), 0.25)
        variance = 0.02**2 + 0.25**2
        expected = -8 * math.log(2 * math.pi * variance)
        batch = Batch(x, torch.zeros(1, dtype=torch.int64))
        assert marginal.scores(module, batch).item() == pytest.approx(expected, rel=1e-5)
        expected -= 16 * 0.1**2 / variance / 2
        lighter = Batch(x + 0.1, batch.y)
        assert marginal.scores(module, lighter).item() == pytest.approx(expected, rel=1e-4)

    def test_are_higher_for_the_class_that_a_record_is_of(self) -> None:
        records = digits()
        module = marginal.fit(OPTIONS, DIGITS, released(records, DIGITS, 0.5), gen())
        x = torch.from_numpy(records.x)
        right = marginal.scores(module, Batch(x, torch.from_numpy(records.y)))
        wrong = marginal.scores(module, Batch(x, (torch.from_numpy(records.y) + 1) % 10))
        assert (right > wrong).float().mean() > 0.9

    @pytest.mark.parametrize("value", [3e38, -3e38, 1e18, -0.02])
    def test_fail_for_no_class_whatever_a_server_sent(self, value: float) -> None:
        # Else one record of that class, held out, would empty its whole site's sums.
        module = marginal.build(OPTIONS, DIGITS)
        with torch.no_grad():
            module.get_parameter("factors.values")[1] = value
        records = some(DIGITS, 2)
        x = torch.from_numpy(records.x)
        both = marginal.scores(module, Batch(x, torch.tensor([0, 1])))
        assert both[0] == marginal.scores(module, Batch(x[:1], torch.tensor([0])))[0]

    def test_of_a_fitted_module_are_within_their_bounds(self) -> None:
        records = digits()
        module = marginal.fit(OPTIONS, DIGITS, released(records, DIGITS, 1.4), gen())
        found = marginal.scores(
            module, Batch(torch.from_numpy(records.x), torch.from_numpy(records.y))
        )
        low, high = marginal.score_bounds(module)
        assert ((low <= found) & (found <= high)).float().mean() > 0.99


class TestRectified:
    @given(mean=st.floats(0.02, 0.98), share=st.floats(0.05, 0.6))
    def test_has_the_moments_after_clipping(self, mean: float, share: float) -> None:
        variance = share * mean * (1 - mean)
        wanted = torch.tensor([mean, variance], dtype=torch.float64)
        middle, spread = images.rectified(wanted[:1], wanted[1:])
        normal = torch.special.ndtri((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
        clipped = (middle + spread * normal).clamp(0, 1)
        assert clipped.mean().item() == pytest.approx(mean, abs=0.02)
        assert clipped.var().item() == pytest.approx(variance, abs=0.01)

    def test_leaves_black_pixels_without_specks(self) -> None:
        """Noise says a variance that no dark pixel has."""
        middle, spread = images.rectified(*torch.tensor([[0.02], [0.5]], dtype=torch.float64))
        assert spread.item() < 1
        bright = torch.special.ndtr((middle - 0.5) / spread).item()
        assert bright < 0.03

    def test_takes_a_grey_pixel_as_it_is(self) -> None:
        middle, spread = images.rectified(*torch.tensor([[0.5], [0.0001]], dtype=torch.float64))
        assert middle.item() == pytest.approx(0.5)
        assert spread.item() == pytest.approx(0.01)


class TestDenoised:
    def test_leaves_out_what_noise_alone_would_say(self) -> None:
        rng = np.random.default_rng(0)
        noise = rng.normal(size=(80, 80)) / math.sqrt(2)
        noise = (noise + noise.T) / math.sqrt(2)  # variance 1 / 2 off the diagonal, 1 on it
        edge = math.sqrt(2 * 80)
        found = images._denoised(noise, edge, signed=True)
        assert np.linalg.norm(found) < 0.15 * np.linalg.norm(noise)

    def test_comes_nearer_to_the_matrix_than_what_was_seen(self) -> None:
        rng = np.random.default_rng(1)
        strokes = rng.normal(size=(60, 4)) * 2
        true = strokes @ strokes.T + np.diag(rng.uniform(1, 3, 60))
        noise = rng.normal(size=(60, 60)) * 3
        noise = (noise + noise.T) / 2
        found = images._denoised(true + noise, 3 * math.sqrt(2 * 60))
        assert np.linalg.norm(found - true) < 0.5 * np.linalg.norm(noise)
