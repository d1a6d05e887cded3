"""The mixture of products: fitted to tables, sampled, scored."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedveil.config import MarginalOptions, Statistics
from fedveil.data_prep import Encoded
from fedveil.data_prep.queries import Noisy, answers, noisy, workload
from fedveil.data_prep.schema import TableSchema, parse_schema
from fedveil.models import Batch
from fedveil.models.marginal import tables
from fedveil.models.marginal.mixture import Mixture, draw

HUE: dict[str, Any] = {"name": "hue", "kind": "categorical", "categories": ["a", "b", "c"]}
SIZE: dict[str, Any] = {"name": "size", "kind": "categorical", "categories": ["s", "l"]}
AGE: dict[str, Any] = {"name": "age", "kind": "integer", "bounds": [10, 49]}
PAY: dict[str, Any] = {
    "name": "pay",
    "kind": "numeric",
    "bounds": [0, 8],
    "nullable": True,
    "bins": 4,
}
ILL: dict[str, Any] = {"name": "ill", "kind": "categorical", "categories": ["no", "yes"]}
OPTIONS = MarginalOptions(family="marginal", components=8, steps=200)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def table(*columns: dict[str, Any], label: str | None = None) -> TableSchema:
    schema = parse_schema({"column": list(columns), "label": label}, "test")
    assert isinstance(schema, TableSchema)
    return schema


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def statistics(
    schema: TableSchema, records: Encoded, z: float = 0.0, options: Statistics | None = None
) -> Noisy:
    units = len(records.y)
    asked = workload(schema, options or Statistics(), units, z)
    scale = z * asked.sensitivity
    exact = answers(asked, records, schema)
    noise = np.random.default_rng(5).normal(0, scale, asked.length) if z else 0.0
    return noisy(asked, exact + noise, scale, units)


def fitted(schema: TableSchema, records: Encoded, z: float = 0.0, **more: Any) -> Mixture:  # noqa: ANN401
    return tables.fit(OPTIONS, schema, statistics(schema, records, z, **more), gen())


def one_hot(codes: np.ndarray, count: int) -> np.ndarray:
    rows: np.ndarray = np.eye(count, dtype=np.float32)[codes]
    return rows


def people(n: int = 4000) -> tuple[TableSchema, Encoded]:
    """Hue goes with size; the old are ill; pay is missing for a quarter and high for the rest."""
    rng = np.random.default_rng(1)
    size = rng.integers(0, 2, n)
    hue = np.where(rng.random(n) < 0.8, size, 2)
    age = rng.integers(0, 40, n)
    y = (age + 8 * rng.standard_normal(n) > 25).astype(np.int64)
    present = rng.random(n) < 0.75
    pay = (0.75 + rng.random(n) / 4) * present
    numbers = np.stack([age / 39, pay, present], axis=1).astype(np.float32)
    x = np.concatenate([one_hot(hue, 3), one_hot(size, 2), numbers], axis=1)
    return table(HUE, SIZE, AGE, PAY, ILL, label="ill"), Encoded(x, y)


class TestFit:
    def test_samples_have_the_tables_that_it_was_fitted_to(self) -> None:
        schema, records = people()
        drawn = tables.sample(fitted(schema, records), 4000, gen())
        x, real = drawn.x.numpy(), records.x
        np.testing.assert_allclose(x[:, :5].mean(0), real[:, :5].mean(0), atol=0.02)
        ours, theirs = ((a[:, :3].T @ a[:, 3:5]) / len(a) for a in (x, real))
        np.testing.assert_allclose(ours, theirs, atol=0.02)
        assert x[:, 5].mean() == pytest.approx(real[:, 5].mean(), abs=0.02)
        assert drawn.y.float().mean().item() == pytest.approx(records.y.mean(), abs=0.02)
        for label in (0, 1):
            ages = x[drawn.y.numpy() == label, 5], real[records.y == label, 5]
            ours, theirs = (np.quantile(a, [0.1, 0.5, 0.9]) for a in ages)
            np.testing.assert_allclose(ours, theirs, atol=0.06)

    def test_what_is_missing_is_encoded_as_such(self) -> None:
        schema, records = people()
        x = tables.sample(fitted(schema, records), 2000, gen()).x
        missing = x[:, 7] == 0
        assert missing.float().mean().item() == pytest.approx(0.25, abs=0.03)
        assert not x[missing, 6].any()
        assert (x[~missing, 6] > 0.74).float().mean() > 0.98

    def test_whole_numbers_are_encoded_as_records_are(self) -> None:
        schema, records = people()
        ages = tables.sample(fitted(schema, records), 500, gen()).x[:, 5]
        assert set(ages.tolist()) <= {float(np.float32(age / 39)) for age in range(40)}

    def test_two_features_that_only_together_say_the_label(self) -> None:
        """Additive effects know nothing of it: the mixture does."""
        rng = np.random.default_rng(2)
        a, b = rng.integers(0, 2, (2, 3000))
        x = np.concatenate([one_hot(a, 2), one_hot(b, 2)], axis=1)
        schema = table(SIZE, {**SIZE, "name": "other"}, ILL, label="ill")
        drawn = tables.sample(fitted(schema, Encoded(x, a ^ b)), 2000, gen())
        exclusive = (drawn.x[:, 1] != drawn.x[:, 3]).long()
        assert (drawn.y == exclusive).float().mean() > 0.85

    def test_works_without_a_label(self) -> None:
        rng = np.random.default_rng(3)
        size = rng.integers(0, 2, 1000)
        x = np.concatenate([one_hot(size, 2), one_hot(2 * size, 3)], axis=1)
        schema = table(SIZE, HUE)
        drawn = tables.sample(
            fitted(schema, Encoded(x, np.zeros(1000, dtype=np.int64))), 999, gen()
        )
        assert (drawn.x[:, 0] == drawn.x[:, 2]).float().mean() > 0.97
        assert not drawn.y.any()

    def test_marginals_of_ones_own_without_the_label_leave_it_its_share(self) -> None:
        schema, records = people()
        options = Statistics.model_validate({"marginals": [["hue", "size"]]})
        drawn = tables.sample(fitted(schema, records, options=options), 3000, gen())
        assert drawn.y.float().mean().item() == pytest.approx(records.y.mean(), abs=0.03)
        together = (drawn.x[:, :3].T @ drawn.x[:, 3:5]) / 3000
        assert together[0, 0].item() == pytest.approx(0.4, abs=0.03)

    def test_noise_beyond_all_signal_still_gives_a_generator(self) -> None:
        schema, records = people(200)
        mixture = fitted(schema, records, z=1000.0)
        drawn = tables.sample(mixture, 100, gen())
        assert drawn.x.isfinite().all()
        assert tables.scores(mixture, drawn).isfinite().all()

    def test_is_the_same_for_the_same_generator(self) -> None:
        schema, records = people(300)
        known = statistics(schema, records, 0.1)
        few = OPTIONS.model_copy(update={"steps": 20})
        one, two, other = (tables.fit(few, schema, known, gen(s)) for s in (1, 1, 2))
        assert torch.equal(one.levels.values, two.levels.values)
        assert torch.equal(one.effects.values, two.effects.values)
        assert not torch.equal(one.levels.values, other.levels.values)


def moved(schema: TableSchema) -> Mixture:
    """A module that says something."""
    mixture = tables.build(OPTIONS, schema)
    with torch.no_grad():
        for index, parameter in enumerate(mixture.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=gen(index)))
    return mixture


class TestScores:
    @pytest.mark.parametrize("label", ["ill", None])
    def test_are_logarithms_of_chances_that_add_up_to_one(self, label: str | None) -> None:
        columns = [HUE, SIZE, *([ILL] if label else [])]
        every = itertools.product(range(3), range(2), range(2 if label else 1))
        hue, size, y = np.array(list(every)).T
        x = np.concatenate([one_hot(hue, 3), one_hot(size, 2)], axis=1)
        batch = Batch(torch.from_numpy(x), torch.from_numpy(y))
        scores = tables.scores(moved(table(*columns, label=label)), batch)
        assert scores.exp().sum().item() == pytest.approx(1, abs=1e-5)

    def test_of_numbers_are_those_of_a_density(self) -> None:
        schema = table({**PAY, "nullable": False}, ILL, label="ill")
        x = (torch.arange(1000) + 0.5)[:, None] / 1000
        found = [torch.full((1000,), label) for label in (0, 1)]
        mixture = moved(schema)
        total = sum(tables.scores(mixture, Batch(x, y)).exp().sum().item() for y in found) / 1000
        assert total == pytest.approx(1, abs=1e-3)

    def test_are_higher_for_what_was_fitted(self) -> None:
        schema, records = people()
        mixture = fitted(schema, records)
        x, y = torch.from_numpy(records.x), torch.from_numpy(records.y)
        shuffled = Batch(x[torch.randperm(len(x), generator=gen())], y)
        real = tables.scores(mixture, Batch(x, y)).mean()
        assert real > tables.scores(mixture, shuffled).mean() + 0.1

    def test_samples_are_of_the_distribution_that_is_scored(self) -> None:
        """Shares of samples against the scores of what there can be, also by given labels."""
        schema = table(HUE, ILL, label="ill")
        mixture = moved(schema)
        hue, y = np.array(list(itertools.product(range(3), range(2)))).T
        batch = Batch(torch.from_numpy(one_hot(hue, 3)), torch.from_numpy(y))
        chances = tables.scores(mixture, batch).exp().reshape(3, 2)
        drawn = tables.sample(mixture, 20_000, gen())
        shares = [
            [(drawn.x[drawn.y == c, h].sum() / 20_000).item() for c in (0, 1)] for h in range(3)
        ]
        np.testing.assert_allclose(shares, chances, atol=0.01)
        ill = tables.sample(mixture, 20_000, gen(), torch.ones(20_000, dtype=torch.int64))
        expected = chances[:, 1] / chances[:, 1].sum()
        np.testing.assert_allclose(ill.x.mean(0), expected, atol=0.01)

    def test_bounds_are_twice_an_even_guess(self) -> None:
        """Hue 3, pay 4 and missing, ill 2 cells; pay has 25 finer ones in each of 4."""
        low, high = tables.score_bounds(tables.build(OPTIONS, table(HUE, PAY, ILL, label="ill")))
        assert low == pytest.approx(-2 * math.log(3 * 5 * 2) - 1)
        assert high == pytest.approx(math.log(100))


class TestDraw:
    def test_counts_are_the_shares_but_for_rounding(self) -> None:
        shares = torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0]], dtype=torch.float64)
        rows = torch.tensor([0, 1] * 50)
        found = draw(shares, rows, gen())
        assert (found[rows == 1] == 1).all()
        counts = torch.bincount(found[rows == 0], minlength=3).tolist()
        assert counts == pytest.approx([25, 15, 10], abs=1)

    def test_of_one_is_of_the_shares(self) -> None:
        shares = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
        row, coins = torch.zeros(1, dtype=torch.int64), gen()
        ones = sum(draw(shares, row, coins).item() for _ in range(2000))
        assert ones == pytest.approx(1500, abs=90)  # 4.6 standard deviations

    def test_columns_are_independent(self) -> None:
        shares = torch.full((1, 2), 0.5, dtype=torch.float64)
        rows, coins = torch.zeros(4000, dtype=torch.int64), gen()
        one, two = draw(shares, rows, coins), draw(shares, rows, coins)
        assert (one == two).float().mean().item() == pytest.approx(0.5, abs=0.04)

    @given(st.integers(0, 30), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
    def test_never_what_has_no_chance(self, n: int, rows: int, places: int, seed: int) -> None:
        coins = gen(seed)
        raw = torch.randint(0, 3, (rows, places), generator=coins).double()
        raw[:, 0] += raw.sum(1) == 0
        which = torch.randint(0, rows, (n,), generator=coins)
        found = draw(raw / raw.sum(1, keepdim=True), which, coins)
        assert (raw[which, found] > 0).all()
