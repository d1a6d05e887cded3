"""Counts behind noise: where noise is small they are read, where it is large they are expected."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.models.marginal.counts import shrunk

NUMBERS = st.floats(-1e6, 1e6)


def test_what_stands_out_is_read() -> None:
    expected = np.full(50, 10.0)
    read = np.linspace(1e3, 1e4, 50)
    assert shrunk(read, expected, 1.0) == pytest.approx(read)
    assert shrunk(np.array([9.0, 11.0]), np.array([10.0, 10.0]), 0.01) == pytest.approx(
        [9.0, 11.0], rel=1e-3
    )


def test_what_noise_hides_is_what_was_expected() -> None:
    rng = np.random.default_rng(0)
    expected = rng.uniform(0.5, 5.0, 2000)
    read = expected + rng.normal(0, 1000.0, 2000)
    found = shrunk(read, expected, 1000.0)
    assert np.median(abs(found / expected - 1)) < 0.2
    assert found.sum() < 2 * expected.sum()  # its parts above nought alone would be 400,000


def test_a_count_that_nobody_expected_shows_above_the_noise_alone() -> None:
    read = np.array([-30.0, 0.0, 30.0, 200.0, 2000.0])
    found = shrunk(read, np.full(5, 1e-9), 10.0)
    assert (found[:3] < 0.1).all()
    assert found[3:] == pytest.approx([200.0, 2000.0])


@pytest.mark.parametrize("shape", [0.1, 1.0])
@pytest.mark.parametrize("noise", [3.0, 30.0])
def test_is_nearer_the_truth_than_either(shape: float, noise: float) -> None:
    """For counts of the prior itself, both what is read and what was expected are worse."""
    rng = np.random.default_rng(1)
    expected = rng.uniform(5, 50, 5000)
    truth = rng.gamma(shape, expected / shape)
    read = truth + rng.normal(0, noise, 5000)
    found = shrunk(read, expected, noise)
    errors = [((guess - truth) ** 2).mean() for guess in (found, np.maximum(read, 0), expected)]
    assert errors[0] < min(errors[1:])
    assert found.mean() == pytest.approx(truth.mean(), rel=0.1)


def test_of_gamma_and_gauss_it_is_the_mean_by_numbers() -> None:
    """Against a sum over a fine, even grid; of one cell the likeliest of the shapes is taken."""
    read, expected, noise = 12.0, 8.0, 4.0
    grid = np.arange(1e-4, 100, 1e-3)
    best = (0.0, 0.0)
    for shape in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2):
        prior = grid ** (shape - 1) * np.exp(-shape * grid / expected)
        prior /= prior.sum()
        joint = prior * np.exp(-(((read - grid) / noise) ** 2) / 2)
        best = max(best, (joint.sum(), (joint * grid).sum() / joint.sum()))
    found = shrunk(np.array([read]), np.array([expected]), noise)
    assert found[0] == pytest.approx(best[1], rel=0.02)


@given(
    st.lists(st.tuples(NUMBERS, st.floats(1e-12, 1e6)), min_size=1, max_size=30),
    st.floats(1e-3, 1e6),
)
def test_is_positive_and_finite_whatever_is_read(
    cells: list[tuple[float, float]], noise: float
) -> None:
    read, expected = np.array(cells).T
    found = shrunk(read, expected, noise)
    assert np.isfinite(found).all()
    assert (found >= 0).all()


def test_keeps_the_shape() -> None:
    assert shrunk(np.ones((2, 3, 4)), np.ones((2, 3, 4)), 1.0).shape == (2, 3, 4)
    assert shrunk(np.ones((0,)), np.ones((0,)), 1.0).shape == (0,)
