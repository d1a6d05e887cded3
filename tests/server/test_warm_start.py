"""What rounds begin with: made of the noisy vector and of public randomness alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedveil.config import MarginalOptions, RunConfig
from fedveil.data_prep import run_schema
from fedveil.data_prep.queries import Noisy, noisy, run_workload
from fedveil.data_prep.schema import Schema
from fedveil.models import Batch, family
from fedveil.models.layers import initialise
from fedveil.models.marginal import labels, tables
from fedveil.models.state import Arrays, load_arrays, to_arrays
from fedveil.server import warm_start
from fedveil.server.warm_start import begin

MakeConfig = Callable[..., RunConfig]
FIT = MarginalOptions(family="marginal", components=4, steps=5)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_start, "_STEPS", 60)
    monkeypatch.setattr(warm_start, "_SAMPLES", 400)
    monkeypatch.setattr(warm_start, "MarginalOptions", lambda **_: FIT)
    monkeypatch.setattr(tables, "_DRAWN", 200)
    monkeypatch.setattr(labels, "_STEPS", 5)


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    return make_config(
        data={"source": "sklearn:breast_cancer"},
        model={"hidden": 8, "latent": 2},
        privacy={"epsilon": 2.0, "statistics_share": 0.5},
        statistics={"marginals": [["diagnosis", "mean_radius"]]},
    ).resolved("table")


@pytest.fixture
def schema(config: RunConfig) -> Schema:
    return run_schema(config)


@pytest.fixture
def found(config: RunConfig, schema: Schema) -> Noisy:
    """Counts by the hundred, whose noise is 2."""
    asked = run_workload(config, schema, 2.0)
    vector = np.random.default_rng(0).gamma(0.5, 20, asked.length)
    return noisy(asked, vector, 2.0, config.trained)


def initial(config: RunConfig, schema: Schema) -> Arrays:
    module = family("vae").build(config.model, schema)
    initialise(module, torch.Generator().manual_seed(config.federation.seed))
    return to_arrays(module)


def bits(arrays: Any) -> dict[str, bytes]:  # noqa: ANN401
    return {name: array.tobytes() for name, array in arrays.items()}


def without(config: RunConfig) -> RunConfig:
    model = config.model.model_copy(update={"warm_start": False})
    return config.model_copy(update={"model": model})


class TestTraining:
    def test_the_loss_on_what_the_statistics_say_falls(
        self, config: RunConfig, schema: Schema, found: Noisy
    ) -> None:
        kind, start = family("vae"), initial(config, schema)
        made = begin(config, schema, found, start)
        assert made.facts == {
            "family": "vae", "warm_start": True, "samples": 400, "steps": 60,
        }  # fmt: skip
        drawn = warm_start._samples(schema, found, torch.Generator().manual_seed(9))
        assert len(drawn.y) == 400
        losses = []
        for arrays in (begin(without(config), schema, found, start).model, made.model):
            module = kind.build(config.model, schema)
            load_arrays(module, arrays)
            with torch.no_grad():
                losses.append(float(kind.scores(module, drawn).mean()))
        assert losses[1] > losses[0] + 1  # nats, a score is larger where it is likelier

    def test_the_same_seed_makes_the_same_and_another_another(
        self, config: RunConfig, schema: Schema, found: Noisy
    ) -> None:
        start = initial(config, schema)
        one, again = (begin(config, schema, found, start).model for _ in range(2))
        assert bits(one) == bits(again)
        seeded = config.federation.model_copy(update={"seed": 1})
        other = begin(config.model_copy(update={"federation": seeded}), schema, found, start)
        assert bits(one) != bits(other.model)

    def test_no_other_randomness_is_drawn(
        self, config: RunConfig, schema: Schema, found: Noisy
    ) -> None:
        start = initial(config, schema)
        torch.manual_seed(1)
        one = begin(config, schema, found, start).model
        torch.manual_seed(2)
        assert bits(begin(config, schema, found, start).model) == bits(one)

    def test_another_vector_makes_another_model(
        self, config: RunConfig, schema: Schema, found: Noisy
    ) -> None:
        start = initial(config, schema)
        values = {name: array[::-1] + 3 for name, array in found.values.items()}
        other = begin(config, schema, replace(found, values=values), start)
        assert bits(begin(config, schema, found, start).model) != bits(other.model)

    def test_scaling_is_learnt_and_not_trained(
        self, config: RunConfig, schema: Schema, found: Noisy
    ) -> None:
        start = initial(config, schema)
        warm, cold = (begin(c, schema, found, start).model for c in (config, without(config)))
        assert not start["scaling.shift"].any()
        assert cold["scaling.shift"].any()
        assert warm["scaling.shift"].tobytes() == cold["scaling.shift"].tobytes()

    def test_what_it_was_given_is_left_as_it_is(
        self, config: RunConfig, schema: Schema, found: Noisy
    ) -> None:
        start = initial(config, schema)
        before, values = bits(start), bits(found.values)
        begin(config, schema, found, start)
        assert bits(start) == before
        assert bits(found.values) == values


class TestWithout:
    def test_weights_are_as_initialised_but_for_the_scaling(
        self, config: RunConfig, schema: Schema, found: Noisy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def never(*_: object) -> Batch:
            raise RuntimeError("must not be called")

        monkeypatch.setattr(warm_start, "_samples", never)
        start = initial(config, schema)
        made = begin(without(config), schema, found, start)
        assert made.facts == {"family": "vae", "warm_start": False}
        changed = {name for name in start if bits(made.model)[name] != bits(start)[name]}
        assert changed == {"scaling.shift", "scaling.fill"}


class TestFitted:
    def test_a_family_that_is_fitted_is_done(
        self, config: RunConfig, schema: Schema, found: Noisy
    ) -> None:
        raw = config.model_dump(by_alias=True)
        raw["model"] = FIT.model_dump()
        raw["privacy"]["statistics_share"] = 1.0
        fitted = RunConfig.model_validate(raw)
        kind = family("marginal")
        module = kind.build(fitted.model, schema)
        start = to_arrays(module)
        made = begin(fitted, schema, found, start)
        assert made.facts == {"family": "marginal"}
        assert made.model.keys() == start.keys()
        assert kind.fit is not None
        generator = torch.Generator().manual_seed(fitted.federation.seed)
        again = to_arrays(kind.fit(fitted.model, schema, found, generator))
        assert bits(made.model) == bits(again) != bits(start)
        load_arrays(module, made.model)
        assert len(kind.sample(module, 7, torch.Generator().manual_seed(0)).y) == 7
