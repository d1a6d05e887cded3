"""The server's half of an evaluation: free questions, noise where the plan says, honest figures.

The checks of scale are exact chi-squared bounds with a false-alarm rate of 1e-7 on fixed coins.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedveil.config import FedveilError, MechanismName, RunConfig
from fedveil.data_prep import run_schema
from fedveil.data_prep.schema import ImageSchema
from fedveil.models import Batch, family, metrics
from fedveil.models.layers import initialise
from fedveil.models.metrics import Exam, blocks, exam_to_arrays, loss_noise_scale, noise_scale
from fedveil.models.state import Arrays, StateError, to_arrays
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import Plan, plan
from fedveil.server.evaluation import (
    NOT_EVALUATED,
    Evaluated,
    evaluated,
    expected_sums,
    questions,
)
from fedveil.server.replies import Collected
from fedveil.wire import NO_LEDGER, Update

MakeConfig = Callable[..., RunConfig]
KEY = bytes(range(32))
ALARM = 1e-7
MULTIPLIER, FIGURES = 1.5, 0.6
EXACT: Mapping[str, float] = {}


class Noted(Coins):
    """Coins that note which noise they were asked for."""

    def __init__(self) -> None:
        super().__init__(KEY)
        self.asked: list[tuple[tuple[int, ...], float]] = []

    def gaussian(self, shape: tuple[int, ...], scale: float) -> np.ndarray:
        self.asked.append((shape, scale))
        return super().gaussian(shape, scale)


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    """A table of thirty numbers and two classes, without a mechanism, so that nothing is priced."""
    return make_config(
        data={"source": "sklearn:breast_cancer"},
        privacy={"mechanism": "none"},
        evaluation={"samples": 200},
    ).resolved()


@pytest.fixture
def digits(make_config: MakeConfig) -> RunConfig:
    """Images of ten classes."""
    return make_config(privacy={"mechanism": "none"}, evaluation={"samples": 200}).resolved()


def noisy(config: RunConfig, mechanism: MechanismName, figures: float = FIGURES) -> Plan:
    """A plan with noise, unpriced."""
    noise = MULTIPLIER if mechanism != "none" else 0.0
    return replace(
        plan(config),
        mechanism=mechanism,
        evaluation_noise=noise,
        figures_noise=figures if mechanism != "none" else 0.0,
    )


def released(config: RunConfig, seed: int = 0) -> Arrays:
    """A model with public initial weights."""
    module = family("vae").build(config.model, run_schema(config))
    initialise(module, torch.Generator().manual_seed(seed))
    return to_arrays(module)


@lru_cache
def asked(config: RunConfig) -> Exam:
    """The questions of that model."""
    return questions(released(config), config, run_schema(config))


def some_sums(config: RunConfig, fixed: Plan, count: int = 50, seed: int = 1) -> Arrays:
    """What a site may send: exact sums of random records."""
    schema, rng = run_schema(config), np.random.default_rng(seed)
    x = torch.from_numpy(rng.random((count, *schema.shape), dtype=np.float32))
    records = Batch(x, torch.from_numpy(rng.integers(0, len(schema.classes), count)))
    module = family("vae").build(config.model, schema)
    initialise(module, torch.Generator().manual_seed(0))
    exam = asked(config)
    sums = metrics.answers(family("vae"), module, exam, records, schema)
    found = {f"holdout/{name}": array for name, array in sums.items()}
    if fixed.figures_noise:
        trained = metrics.loss_answers(family("vae"), module, records)
        found |= {f"training/{name}": array for name, array in trained.items()}
    return found


def collected(
    fixed: Plan, parts: Sequence[Mapping[str, np.ndarray]], rounding: Mapping[str, float] = EXACT
) -> Collected:
    """What the sites sent: under `local` each with its own noise in it, else with one in all."""
    sites = tuple(range(1, len(parts) + 1))
    return Collected(
        parts=tuple(Update("run", 0, 1, {}, part, NO_LEDGER) for part in parts),
        sites=sites,
        dropped={},
        ledgers=dict.fromkeys(sites, NO_LEDGER),
        noises=len(sites) if fixed.mechanism == "local" else 1,
        rounding=rounding,
    )


def after(
    config: RunConfig,
    fixed: Plan,
    *parts: Mapping[str, np.ndarray],
    before: Evaluated = NOT_EVALUATED,
    coins: Coins | None = None,
    rounding: Mapping[str, float] = EXACT,
) -> Evaluated:
    """What is known after one more evaluation, of the model of round 7."""
    exam, schema = asked(config), run_schema(config)
    found = collected(fixed, parts, rounding)
    return evaluated(before, 7, found, exam, config, schema, fixed, coins or Noted())


def has_scale(residual: np.ndarray, scale: float) -> bool:
    """Whether it may be noise of mean 0 and that scale: z and chi-squared, 1e-7 together."""
    unit = residual.ravel() / scale
    low, high = stats.chi2.ppf([ALARM / 4, 1 - ALARM / 4], unit.size)
    centred = abs(unit.sum()) < stats.norm.isf(ALARM / 4) * math.sqrt(unit.size)
    return bool(centred and low < float(np.square(unit).sum()) < high)


def values(found: Evaluated) -> dict[str, float]:
    return {name: figure["value"] for name, figure in found.quality.items()}


class TestQuestions:
    def test_are_made_of_the_released_model_and_public_randomness_alone(
        self, config: RunConfig
    ) -> None:
        schema, found = run_schema(config), []
        for seed, noise in ((0, 1), (0, 2), (1, 1)):
            torch.manual_seed(noise)
            np.random.seed(noise)  # noqa: NPY002  what must not matter
            exam = questions(released(config, seed), config, schema)
            arrays = exam_to_arrays(exam) | {"one": exam.one_way, "two": exam.two_way}
            found.append(np.concatenate([array.ravel() for array in arrays.values()]))
        assert np.array_equal(found[0], found[1])
        assert not np.array_equal(found[0], found[2])

    def test_hang_on_the_runs_public_seed(self, config: RunConfig) -> None:
        federation = config.federation.model_copy(update={"seed": 2**63 - 1})
        other = config.model_copy(update={"federation": federation})
        found = [questions(released(c), c, run_schema(c)).one_way for c in (config, other)]
        assert not np.array_equal(found[0], found[1])

    @pytest.mark.parametrize("samples", [100, 450])
    def test_are_of_so_many_synthetic_records(self, config: RunConfig, samples: int) -> None:
        section = config.evaluation.model_copy(update={"samples": samples})
        asked = config.model_copy(update={"evaluation": section})
        exam = questions(released(asked), asked, run_schema(asked))
        # Each record once in each of 31 histograms, all of them over sqrt(31).
        assert exam.one_way.sum() == pytest.approx(samples * math.sqrt(31))

    def test_of_another_model_are_refused(self, config: RunConfig) -> None:
        with pytest.raises(StateError):
            questions({"w": np.zeros(3, dtype=np.float32)}, config, run_schema(config))

    @pytest.mark.parametrize("name", ["config", "digits"])
    def test_of_a_model_that_has_blown_up_are_our_error(
        self, name: str, request: pytest.FixtureRequest
    ) -> None:
        """Its weights are finite, but what it draws may not be; no library's error is passed on."""
        config: RunConfig = request.getfixturevalue(name)
        rng, huge = np.random.default_rng(0), released(config)
        for part, array in huge.items():
            if "decoder" in part:
                huge[part] = (1e25 * rng.standard_normal(array.shape)).astype(np.float32)
        with suppress(FedveilError):
            questions(huge, config, run_schema(config))


class TestExpectedSums:
    def test_are_the_blocks_of_held_out_records(self, digits: RunConfig) -> None:
        found = expected_sums(run_schema(digits), noisy(digits, "central", figures=0.0))
        assert {name: array.shape for name, array in found.items()} == {
            "holdout/count": (1,),
            "holdout/loss": (1,),
            "holdout/one_way": (10,),
            "holdout/tstr_mlp": (2,),
        }
        assert {array.dtype for array in found.values()} == {np.dtype(np.float64)}

    def test_and_count_and_loss_of_training_records_if_they_are_paid_for(
        self, digits: RunConfig
    ) -> None:
        found = expected_sums(run_schema(digits), noisy(digits, "central"))
        assert {name: a.shape for name, a in found.items() if name.startswith("training/")} == {
            "training/count": (1,),
            "training/loss": (1,),
        }


class TestNoise:
    @pytest.mark.parametrize("sites", [1, 5])
    def test_under_central_comes_in_once_for_all_sites_and_each_account(
        self, config: RunConfig, sites: int
    ) -> None:
        fixed, coins, schema = noisy(config, "central"), Noted(), run_schema(config)
        part = some_sums(config, fixed)
        after(config, fixed, *[part] * sites, coins=coins)
        held_out = [(shape, noise_scale(MULTIPLIER, schema)) for shape in blocks(schema).values()]
        assert coins.asked == [*held_out, *[((1,), loss_noise_scale(FIGURES))] * 2]
        assert noise_scale(MULTIPLIER, schema) == pytest.approx(MULTIPLIER * math.sqrt(6) * 1.001)

    def test_under_central_grows_with_what_rounding_adds_to_the_sensitivity(
        self, config: RunConfig
    ) -> None:
        """A secure sum's words are rounded: the trusted server's noise covers that as well."""
        fixed, coins, schema = noisy(config, "central"), Noted(), run_schema(config)
        rounding = {"holdout": 1.25, "training": 1.5}
        after(config, fixed, some_sums(config, fixed), coins=coins, rounding=rounding)
        assert [scale for _, scale in coins.asked] == [
            *[1.25 * noise_scale(MULTIPLIER, schema)] * 6,
            *[1.5 * loss_noise_scale(FIGURES)] * 2,
        ]

    def test_of_a_site_is_as_many_times_that_of_a_record_as_it_may_have_of_them(
        self, config: RunConfig
    ) -> None:
        fixed = replace(noisy(config, "central", figures=0.0), evaluation_units=7.0)
        coins, schema = Noted(), run_schema(config)
        after(config, fixed, some_sums(config, fixed), coins=coins)
        assert {scale for _, scale in coins.asked} == {noise_scale(7 * MULTIPLIER, schema)}
        assert noise_scale(7 * MULTIPLIER, schema) == pytest.approx(
            7 * MULTIPLIER * math.sqrt(6) * 1.001
        )

    @pytest.mark.parametrize("sites", [1, 5])
    def test_under_central_has_that_scale(self, config: RunConfig, sites: int) -> None:
        """Of the 902 numbers whose noised sums are kept."""
        fixed = noisy(config, "central")
        part = some_sums(config, fixed)
        found = after(config, fixed, *[part] * sites)
        assert found.sums.keys() == {"one_way", "two_way"}
        residual = np.concatenate(
            [found.sums[name] - sites * part[f"holdout/{name}"] for name in found.sums]
        )
        assert residual.size == 302 + 600
        scale = MULTIPLIER * math.sqrt(6) * 1.001
        assert has_scale(residual, scale)
        for wrong in (2 / 3, 3 / 2):
            assert not has_scale(residual, wrong * scale)

    @pytest.mark.parametrize("mechanism", ["local", "none"])
    def test_is_not_the_servers_under_local_and_none(
        self, config: RunConfig, mechanism: MechanismName
    ) -> None:
        fixed, coins = noisy(config, mechanism), Noted()
        part = some_sums(config, fixed)
        found = after(config, fixed, part, part, coins=coins)
        assert coins.asked == []
        assert np.array_equal(coins.words(4), Coins(KEY).words(4))
        for name, total in found.sums.items():
            assert np.array_equal(total, 2 * part[f"holdout/{name}"])

    def test_every_evaluation_has_its_own(self, config: RunConfig) -> None:
        fixed, coins = noisy(config, "central"), Noted()
        part = some_sums(config, fixed)
        first = after(config, fixed, part, coins=coins)
        second = after(config, fixed, part, before=first, coins=coins)
        fresh = second.sums["two_way"] - first.sums["two_way"]
        assert has_scale(
            fresh - part["holdout/two_way"], noise_scale(MULTIPLIER, run_schema(config))
        )
        assert not np.array_equal(fresh, first.sums["two_way"])

    def test_of_a_sum_that_is_not_finite_is_refused(self, config: RunConfig) -> None:
        fixed = noisy(config, "central")
        part = some_sums(config, fixed)
        with pytest.raises(ValueError, match="not finite"):
            after(config, fixed, part | {"holdout/loss": np.array([math.nan])})


TWO = ImageSchema(height=8, width=8, classes=("a", "b"))


def share_of_b(fixed: Plan, counts: list[tuple[float, float]], config: RunConfig) -> Evaluated:
    """Evaluations by so many (sites, records of class b at each) of 500 records a site.

    Every synthetic record is of class a: so the total variation is the share of class b, linear in
    the counts.
    """
    probes = metrics.exam_from_arrays(
        {
            "mlp/weights/0": np.zeros((64, 64)),
            "mlp/biases/0": np.zeros(64),
            "mlp/weights/1": np.zeros((64, 2)),
            "mlp/biases/1": np.zeros(2),
            "mlp/edges": np.full(11, 0.5),
        },
        TWO,
    ).probes
    exam, found = Exam(probes, np.array([100.0, 0.0]), np.zeros(0)), NOT_EVALUATED
    for sites, b in counts:
        part = {
            "holdout/count": np.array([500.0]),
            "holdout/loss": np.array([100.0]),
            "holdout/one_way": np.array([500.0 - b, b]),
            "holdout/tstr_mlp": np.full((2, 12), 500 / 24),
        }
        sent = collected(fixed, [part] * int(sites))
        found = evaluated(found, 7, sent, exam, config, TWO, fixed, Noted())
    return found


class TestFigures:
    def test_are_those_of_the_sum_over_sites(self, config: RunConfig) -> None:
        fixed = noisy(config, "none")
        parts = [some_sums(config, fixed, seed=seed) for seed in (1, 2, 3)]
        schema, exam = run_schema(config), asked(config)
        total = {name: np.sum([part[name] for part in parts], axis=0) for name in parts[0]}
        module = family("vae").build(config.model, schema)
        by_hand = metrics.figures(
            {name.removeprefix("holdout/"): array for name, array in total.items()},
            exam,
            schema,
            family("vae").score_bounds(module),
        )
        found = after(config, fixed, *parts)
        assert values(found).keys() == by_hand.keys()
        assert by_hand.keys() == {
            "loss", "one_way_tv", "two_way_tv", "tstr_accuracy_logistic", "tstr_auroc_logistic",
            "tstr_accuracy_mlp", "tstr_auroc_mlp",
        }  # fmt: skip
        for name, value in values(found).items():
            assert value == pytest.approx(by_hand[name], abs=1e-6)

    def test_without_noise_say_so(self, config: RunConfig) -> None:
        fixed = noisy(config, "none")
        found = after(config, fixed, some_sums(config, fixed))
        assert {figure["noise"] for figure in found.quality.values()} == {0.0}

    @pytest.mark.parametrize("mechanism", ["central", "local"])
    def test_of_training_records_are_told_if_they_are_paid_for(
        self, config: RunConfig, mechanism: MechanismName
    ) -> None:
        fixed = noisy(config, mechanism, figures=1e-6)
        part = some_sums(config, fixed)
        found = after(config, fixed, part | {"holdout/loss": part["holdout/loss"] + 20})
        # The same random records stand for both sides here, but for the loss that was added.
        low, high = family("vae").score_bounds(
            family("vae").build(config.model, run_schema(config))
        )
        mean = float(part["training/loss"][0] / part["training/count"][0])
        assert values(found)["training_loss"] == pytest.approx(
            -high + (mean + 1) / 2 * (high - low), rel=1e-4
        )
        assert values(found)["loss"] > values(found)["training_loss"]

    @pytest.mark.parametrize("mechanism", ["central", "local", "none"])
    def test_of_training_records_are_not_told_otherwise(
        self, config: RunConfig, mechanism: MechanismName
    ) -> None:
        unpaid = noisy(config, mechanism, figures=0.0)
        # Even if a site had sent them.
        part = some_sums(config, unpaid) | {
            "training/count": np.array([9.0]), "training/loss": np.array([9.0]),
        }  # fmt: skip
        found = after(config, unpaid, part)
        assert not [name for name in found.quality if "training" in name]

    def test_are_plain_values_with_a_noise_each_and_a_floor_for_total_variation(
        self, config: RunConfig
    ) -> None:
        fixed = noisy(config, "central")
        found = after(config, fixed, some_sums(config, fixed))
        facts: dict[str, Any] = json.loads(json.dumps(found.facts(), allow_nan=False))
        assert facts == {"count": 1, "round": 7, "quality": found.quality, "noises": 1}
        for name, figure in found.quality.items():
            expected = {"value", "noise", "floor"} if name.endswith("_tv") else {"value", "noise"}
            assert figure.keys() == expected
            assert figure["noise"] > 0

    def test_stated_noise_under_local_is_of_all_sites_together(self, digits: RunConfig) -> None:
        """Of a share it is scale * sqrt(sites) * sqrt(p^2 + (1 - p)^2) / (500 sites)."""
        fixed = noisy(digits, "local", figures=0.0)
        scale, share = MULTIPLIER * math.sqrt(4) * 1.001, 0.3
        for sites in (1, 9):
            figure = share_of_b(fixed, [(sites, 500 * share)], digits).quality["one_way_tv"]
            by_hand = scale * math.sqrt(sites) * math.hypot(share, 1 - share) / (500 * sites)
            assert figure["value"] == pytest.approx(share, abs=1e-6)
            # A bootstrap of 200 draws: 30 % are six standard errors.
            assert figure["noise"] == pytest.approx(by_hand, rel=0.3)

    def test_stated_noise_under_central_is_one(self, digits: RunConfig) -> None:
        fixed = noisy(digits, "central", figures=0.0)
        scale, share = MULTIPLIER * math.sqrt(4) * 1.001, 0.3
        for sites in (1, 9):
            figure = share_of_b(fixed, [(sites, 500 * share)], digits).quality["one_way_tv"]
            by_hand = scale * math.hypot(share, 1 - share) / (500 * sites)
            assert figure["noise"] == pytest.approx(by_hand, rel=0.3)
            assert abs(figure["value"] - share) < 6 * by_hand


class TestSeveralEvaluations:
    def test_histograms_of_records_are_averaged(self, digits: RunConfig) -> None:
        found = share_of_b(noisy(digits, "none"), [(1, 100), (1, 200), (1, 400)], digits)
        assert found.count == 3
        assert found.sums["one_way"].tolist() == [1500 - 700, 700]
        assert values(found)["one_way_tv"] == pytest.approx(700 / 1500, abs=1e-6)

    def test_what_hangs_on_the_model_is_of_the_last_one(self, config: RunConfig) -> None:
        fixed = noisy(config, "none")
        first, second = (some_sums(config, fixed, seed=seed) for seed in (1, 2))
        alone = after(config, fixed, second)
        both = after(config, fixed, second, before=after(config, fixed, first))
        for name in values(alone):
            assert (values(alone)[name] == values(both)[name]) == (not name.endswith("_tv"))

    def test_their_noise_falls_with_the_root_of_their_number(self, digits: RunConfig) -> None:
        fixed = noisy(digits, "central", figures=0.0)
        noise = []
        for number in (1, 9):
            found = share_of_b(fixed, [(1, 150.0)] * number, digits)
            noise.append(found.quality["one_way_tv"]["noise"])
            by_hand = MULTIPLIER * 2 * 1.001 * math.hypot(0.3, 0.7) / 500 / math.sqrt(number)
            assert noise[-1] == pytest.approx(by_hand, rel=0.3)
            assert abs(values(found)["one_way_tv"] - 0.3) < 6 * by_hand
        # The loss is of the last model alone.
        assert found.quality["loss"]["noise"] == pytest.approx(
            share_of_b(fixed, [(1, 150.0)], digits).quality["loss"]["noise"], rel=0.3
        )

    def test_stated_noise_counts_every_site_that_ever_added_some(self, digits: RunConfig) -> None:
        """Under `local`: nine sites, then one; the sum has ten noises, of 5000 records."""
        fixed = noisy(digits, "local", figures=0.0)
        found = share_of_b(fixed, [(9, 150.0), (1, 150.0)], digits)
        scale = MULTIPLIER * math.sqrt(4) * 1.001
        by_hand = scale * math.sqrt(10) * math.hypot(0.3, 0.7) / 5000
        assert found.quality["one_way_tv"]["noise"] == pytest.approx(by_hand, rel=0.3)

    def test_nothing_of_before_is_changed(self, config: RunConfig) -> None:
        fixed = noisy(config, "central")
        part = some_sums(config, fixed)
        first = after(config, fixed, part)
        kept = {name: array.copy() for name, array in first.sums.items()}
        after(config, fixed, part, before=first)
        assert all(np.array_equal(kept[name], first.sums[name]) for name in kept)
        assert first.count == 1
