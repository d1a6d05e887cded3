"""Sessions for the tests: small, set up, with fixed coins."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from fedveil.privacy.secagg.simulator import Hook, Simulator, deliver
from fedveil.privacy.secagg.terms import Numbers

Session = Callable[..., Simulator]


def make_session(
    n: int = 4,
    t: int = 3,
    n_min: int = 3,
    t_collude: int = 1,
    *,
    rounds: int = 4,
    hook: Hook = deliver,
    seed: int = 0,
) -> Simulator:
    """A federation that is not set up yet; equal seeds make equal ones."""
    entropy = np.random.default_rng(seed).bytes
    return Simulator(Numbers(n, t, n_min, t_collude), rounds, hook, entropy)


@pytest.fixture(name="make_session")
def _make_session() -> Session:
    return make_session


@pytest.fixture
def session() -> Simulator:
    """Four sites of which three must stay and one may collude, set up."""
    made = make_session()
    made.set_up()
    return made


def make_vectors(sites: int, length: int = 10, seed: int = 0) -> dict[int, np.ndarray]:
    """Uniform words, a vector a site."""
    draws = np.random.default_rng(seed)
    return {i: draws.integers(0, 2**32, length, dtype=np.uint32) for i in range(sites)}


@pytest.fixture(name="make_vectors")
def _make_vectors() -> Callable[..., dict[int, np.ndarray]]:
    return make_vectors


def plain_sum(vectors: Mapping[int, np.ndarray], sites: list[int]) -> np.ndarray:
    """The sum modulo 2^32, computed with Python's own integers."""
    columns = zip(*(vectors[site].tolist() for site in sites), strict=True)
    return np.array([sum(column) % 2**32 for column in columns], dtype=np.uint32)


@pytest.fixture(name="plain_sum")
def _plain_sum() -> Callable[..., np.ndarray]:
    return plain_sum
