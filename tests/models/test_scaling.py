"""Scaling and imputation: a way there and back for each number, learnt from noisy sums alone."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedveil.config import Statistics, VaeOptions
from fedveil.data_prep import Encoded
from fedveil.data_prep.queries import Noisy, answers, noisy, workload
from fedveil.data_prep.schema import TableSchema, parse_schema
from fedveil.models import Batch, family, vae
from fedveil.models.layers import initialise
from fedveil.models.scaling import Scaling, learn
from fedveil.models.state import to_arrays
from fedveil.privacy.clipping import CLIPPING_SLACK, clipped_sum

OPTIONS = VaeOptions(family="vae", latent=2, hidden=4)
PARTS = 16


def schema(*, nullable: bool = False) -> TableSchema:
    numbers = [
        {"name": name, "kind": "numeric", "bounds": [0, 1000], "nullable": nullable}
        for name in ("income", "debt")
    ]
    kind = {"name": "kind", "kind": "categorical", "categories": ["a", "b", "c"]}
    sick = {"name": "sick", "kind": "categorical", "categories": ["no", "yes"]}
    found = parse_schema({"label": "sick", "column": [numbers[0], kind, numbers[1], sick]}, "t")
    assert isinstance(found, TableSchema)
    return found


SCHEMA = schema()


def records(count: int, seed: int = 0, of: TableSchema = SCHEMA) -> Encoded:
    """Incomes of which nearly all are in the lowest hundredth of their range; debts anywhere."""
    rng = np.random.default_rng(seed)
    x = np.zeros((count, of.width), dtype=np.float32)
    for block, values in zip(
        [b for b in of.blocks if b.column.kind != "categorical"],
        (rng.beta(0.5, 60, count), rng.random(count)),
        strict=True,
    ):
        x[:, block.start] = values
        if block.column.nullable:
            x[:, block.start + 1] = 1.0
    kind = next(b for b in of.blocks if b.column.kind == "categorical")
    x[np.arange(count), kind.start + rng.integers(0, 3, count)] = 1.0
    return Encoded(x, rng.integers(0, 2, count))


def released(
    encoded: Encoded, of: TableSchema = SCHEMA, noise: float = 1.0, seed: int = 1
) -> Noisy:
    asked = workload(of, Statistics(), 5000.0, noise)
    scale = noise * asked.sensitivity
    drawn = np.random.default_rng(seed).normal(0, scale, asked.length)
    return noisy(asked, answers(asked, encoded, of) + drawn, scale, 5000.0)


def learnt(of: TableSchema = SCHEMA, noise: float = 1.0) -> Scaling:
    made = Scaling(of)
    learn(made, released(records(5000, of=of), of, noise), of)
    return made


def places(of: TableSchema) -> list[int]:
    return [block.start for block in of.blocks if block.column.kind != "categorical"]


@st.composite
def maps(draw: st.DrawFn) -> Scaling:
    """Any that could be learnt: parts of a tenth of their equal share at least."""
    made = Scaling(SCHEMA)
    share = np.linspace(0, 1, PARTS + 1)
    with torch.no_grad():
        for index in range(2):
            inner = sorted(draw(st.lists(st.floats(0, 1), min_size=PARTS - 1, max_size=PARTS - 1)))
            ends = 0.9 * np.array([0.0, *inner, 1.0]) + 0.1 * share
            made.shift[index] = torch.from_numpy(ends - share).float()
            made.fill[index] = 0.5
    return made


class TestMaps:
    @given(maps(), st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30))
    def test_there_and_back(self, scaling: Scaling, values: list[float]) -> None:
        x = torch.zeros(len(values), SCHEMA.width)
        for place in places(SCHEMA):
            x[:, place] = torch.tensor(values)
        assert torch.allclose(scaling.inverse(scaling(x)), x, atol=2e-5)
        assert torch.allclose(scaling(scaling.inverse(x)), x, atol=2e-4)  # where it is steep

    @given(maps(), st.lists(st.floats(0, 1, width=32), min_size=2, max_size=30))
    def test_larger_stays_larger_and_all_is_within_0_and_1(
        self, scaling: Scaling, values: list[float]
    ) -> None:
        x = torch.zeros(len(values), SCHEMA.width)
        x[:, places(SCHEMA)[0]] = torch.tensor(sorted(values))
        for found in (scaling(x), scaling.inverse(x)):
            moved = found[:, places(SCHEMA)[0]]
            assert (moved.diff() >= -1e-6).all()
            assert 0 <= float(moved.min()) <= float(moved.max()) <= 1

    @given(maps())
    def test_the_ends_stay_where_they_are(self, scaling: Scaling) -> None:
        x = torch.zeros(2, SCHEMA.width)
        x[1, places(SCHEMA)] = 1.0
        assert torch.allclose(scaling(x), x, atol=1e-6)
        assert torch.allclose(scaling.inverse(x), x, atol=1e-6)

    @given(maps())
    def test_what_is_no_number_is_left_alone(self, scaling: Scaling) -> None:
        x = torch.from_numpy(records(20).x)
        others = [place for place in range(SCHEMA.width) if place not in places(SCHEMA)]
        assert torch.equal(scaling(x)[:, others], x[:, others])
        assert torch.equal(scaling.inverse(x)[:, others], x[:, others])

    def test_a_record_s_own_is_all_it_hangs_on(self) -> None:
        scaling, x = learnt(), torch.from_numpy(records(20).x)
        alone = torch.cat([scaling(x[row : row + 1]) for row in range(20)])
        assert torch.equal(scaling(x), alone)

    def test_by_hand(self) -> None:
        """Half of all records below an eighth: two parts of sixteen are mapped to eight."""
        scaling = Scaling(SCHEMA)
        ends = torch.cat([torch.linspace(0, 0.125, 9), torch.linspace(0.125, 1, 9)[1:]])
        with torch.no_grad():
            scaling.shift[0] = ends - torch.linspace(0, 1, PARTS + 1)
        x = torch.zeros(4, SCHEMA.width)
        x[:, places(SCHEMA)[0]] = torch.tensor([0.0625, 0.125, 0.5625, 2.0])
        found = scaling(x)[:, places(SCHEMA)[0]].tolist()
        assert found == pytest.approx([0.25, 0.5, 0.75, 1.0])


class TestBeforeAnythingIsLearnt:
    def test_numbers_are_as_they_were(self) -> None:
        scaling, x = Scaling(SCHEMA), torch.from_numpy(records(50).x)
        assert torch.allclose(scaling(x), x, atol=1e-6)
        assert torch.allclose(scaling.inverse(x), x, atol=1e-6)

    def test_initial_weights_leave_it_alone(self) -> None:
        scaling = learnt()
        before = to_arrays(scaling)
        initialise(scaling, torch.Generator().manual_seed(0))
        assert all(np.array_equal(a, before[n]) for n, a in to_arrays(scaling).items())


class TestMissing:
    of = schema(nullable=True)

    def test_is_seen_as_the_median_and_comes_back_as_nothing(self) -> None:
        scaling = learnt(self.of)
        x = torch.from_numpy(records(4, of=self.of).x)
        for place in places(self.of):
            x[0, place : place + 2] = 0.0
        seen = scaling(x)
        for place in places(self.of):
            assert seen[0, place] == 0.5
            assert seen[0, place + 1] == 0.0
            assert seen[1, place] != 0.5
        back = scaling.inverse(seen)
        assert torch.allclose(back, x, atol=1e-4)
        assert back[0, places(self.of)].tolist() == [0.0, 0.0]

    def test_is_seen_as_nought_before_anything_is_learnt(self) -> None:
        scaling, x = Scaling(self.of), torch.zeros(1, self.of.width)
        assert torch.equal(scaling(x), x)
        assert torch.equal(scaling.inverse(x), x)


class TestLearn:
    def test_spreads_what_is_crowded(self) -> None:
        scaling = learnt()
        x = torch.from_numpy(records(2000, seed=7).x)
        before, after = (t[:, places(SCHEMA)[0]] for t in (x, scaling(x)))
        assert float(before.median()) < 0.01
        # As far as a hundredth of the range, in which most of them are, can be told apart.
        assert 0.2 < float(after.median()) < 0.65
        assert float(after.std()) > 0.2 > 10 * float(before.std())
        even = scaling(x)[:, places(SCHEMA)[1]]
        assert float((even - x[:, places(SCHEMA)[1]]).abs().max()) < 0.05

    def test_a_part_never_vanishes(self) -> None:
        """Of all records at one value, a tenth of what a network sees is left to the others."""
        same = records(5000)
        same.x[:, places(SCHEMA)[0]] = 0.3
        scaling = Scaling(SCHEMA)
        learn(scaling, released(same, noise=0.01), SCHEMA)
        ends = torch.linspace(0, 1, PARTS + 1) + scaling.shift[0]
        # They are in 1 of 100 cells, with 0.9 of all, 1/16 of it in each part.
        assert float(ends.diff().min()) == pytest.approx(0.01 / (0.9 * PARTS), rel=0.1)
        x = torch.zeros(2, SCHEMA.width)
        x[:, places(SCHEMA)[0]] = torch.tensor([0.4, 0.9])
        seen = scaling(x)[:, places(SCHEMA)[0]]
        assert float(seen.diff()) == pytest.approx(0.1 * 0.5, rel=0.05)
        assert (float(ends[0]), float(ends[-1])) == (0.0, 1.0)

    @pytest.mark.parametrize("noise", [0.0, 1e4])
    def test_of_noise_alone_nothing_is_learnt(self, noise: float) -> None:
        nobody = records(0)
        scaling = Scaling(SCHEMA)
        learn(scaling, released(nobody, noise=noise), SCHEMA)
        assert not scaling.shift.any()
        assert not scaling.fill.any()

    def test_hangs_on_the_noisy_vector_only(self) -> None:
        """Post-processing: of equal vectors of unequal data the same is learnt."""
        found = released(records(5000))
        one, other = Scaling(SCHEMA), Scaling(SCHEMA)
        learn(one, found, SCHEMA)
        learn(other, replace(found, values=dict(found.values)), SCHEMA)
        for name, array in to_arrays(one).items():
            assert np.array_equal(array, to_arrays(other)[name])
        assert set(Noisy.__dataclass_fields__) == {"asked", "values", "noise", "units"}

    @pytest.mark.parametrize("value", [math.inf, -1e30, 1e30])
    def test_whatever_was_released_it_rises(self, value: float) -> None:
        found = released(records(5000))
        values = {name: array.copy() for name, array in found.values.items()}
        for name, array in values.items():
            if name.startswith("fine"):
                array[..., 3] = value
        scaling = Scaling(SCHEMA)
        if math.isinf(value):
            values = {n: np.nan_to_num(a, posinf=1e300) for n, a in values.items()}
        learn(scaling, replace(found, values=values), SCHEMA)
        ends = torch.linspace(0, 1, PARTS + 1) + scaling.shift
        assert (ends.diff(dim=1) > 0).all()


class TestInAModel:
    def made(self) -> vae.Vae:
        module = vae.build(OPTIONS, SCHEMA)
        initialise(module, torch.Generator().manual_seed(0))
        assert module.scaling is not None
        learn(module.scaling, released(records(5000)), SCHEMA)
        return module

    def test_no_step_trains_it(self) -> None:
        names = family("vae").trainable(self.made())
        assert names
        assert not [name for name in names if name.startswith("scaling")]
        assert {n for n in to_arrays(self.made()) if n.startswith("scaling")} == {
            "scaling.shift", "scaling.fill",
        }  # fmt: skip

    def test_gradients_are_clipped_as_before(self) -> None:
        module, encoded = self.made(), records(9)
        batch = Batch(torch.from_numpy(encoded.x), torch.from_numpy(encoded.y))

        def one(row: int) -> dict[str, Any]:
            return clipped_sum(
                module, vae.example_losses, Batch(batch.x[row : row + 1], batch.y[row : row + 1]),
                1e-3, torch.Generator().manual_seed(0),
            )  # fmt: skip

        for row in range(9):
            found = one(row)
            assert not [name for name in found if name.startswith("scaling")]
            size = math.sqrt(sum(float(g.square().sum()) for g in found.values()))
            assert 0 < size <= 1e-3
            assert size == pytest.approx(1e-3 / CLIPPING_SLACK, rel=1e-3)

    def test_what_it_draws_is_in_the_data_s_own_range(self) -> None:
        drawn = family("vae").sample(self.made(), 500, torch.Generator().manual_seed(0))
        incomes = drawn.x[:, places(SCHEMA)[0]]
        assert 0 <= float(incomes.min()) <= float(incomes.max()) <= 1
        assert float(incomes.median()) < 0.02  # where they are, untrained as it is

    def test_losses_see_a_record_where_it_stands_among_others(self) -> None:
        module = self.made()
        plain = vae.build(OPTIONS, SCHEMA)
        initialise(plain, torch.Generator().manual_seed(0))
        batch = Batch(torch.from_numpy(records(5).x), torch.from_numpy(records(5).y))
        assert module.scaling is not None
        scaled = Batch(module.scaling(batch.x), batch.y)
        assert torch.allclose(vae.scores(module, batch), vae.scores(plain, scaled), atol=1e-5)
        assert not torch.allclose(vae.scores(module, batch), vae.scores(plain, batch), atol=1e-3)
