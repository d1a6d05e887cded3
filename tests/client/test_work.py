"""One round's work by parts: what a whole site adds, with how much noise, within which bound.

The checks of scale are exact chi-squared bounds with a false-alarm rate of 1e-7 on fixed coins.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from fedveil.client import work
from fedveil.client.site import Records, Side, Site, no_records
from fedveil.client.training import train
from fedveil.client.work import Parts, parts_of
from fedveil.config import RunConfig
from fedveil.data_prep import run_schema
from fedveil.data_prep.schema import ImageSchema, Schema
from fedveil.models import Batch, family, metrics
from fedveil.models.layers import initialise
from fedveil.models.state import Arrays, to_arrays
from fedveil.privacy.clipping import CLIPPING_SLACK
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import Plan, plan
from fedveil.privacy.secagg.terms import Numbers
from fedveil.wire import NO_LEDGER, Task

MakeConfig = Callable[..., RunConfig]
KEY = bytes(range(32))
DIGITS = ImageSchema(height=8, width=8, classes=tuple("0123456789"))
PLANTED = "PATIENT-4711"


class Noted(Coins):
    """Coins that note which noise they were asked for, and give none."""

    def __init__(self) -> None:
        super().__init__(KEY)
        self.asked: list[tuple[tuple[int, ...], float]] = []

    def gaussian(self, shape: tuple[int, ...], scale: float) -> np.ndarray:
        self.asked.append((shape, scale))
        return np.zeros(shape)


class FakeSite:
    """All that the work needs of a site: its records, its coins and where it notes a failure."""

    def __init__(self, count: int, coins: Coins) -> None:
        self.name, self.coins, self.failures = "site-005", coins, 0
        rng = np.random.default_rng(5)
        x = torch.from_numpy(rng.random((count, 1, 8, 8), dtype=np.float32))
        side = Side(Batch(x, torch.arange(count) % 10))
        self._records = Records(side, side, side)

    def records(self, config: RunConfig, schema: Schema) -> Records:
        del config, schema
        return self._records

    def fail(self) -> None:
        self.failures += 1


@pytest.fixture(scope="module", name="config")
def _config() -> RunConfig:
    """Sites are what is hidden; each takes two steps, on all its records."""
    return RunConfig.model_validate(
        {
            "federation": {"sites": 3, "rounds": 2},
            "data": {"source": "sklearn:digits"},
            "model": {"family": "vae", "width": 4, "latent": 2, "hidden": 8},
            "privacy": {"mechanism": "site", "epsilon": 8.0, "sampling_rate": 1.0},
            "aggregation": {"encryption": "none"},
            "training": {"local_steps": 2},
        }
    ).resolved()


def initial(config: RunConfig) -> Arrays:
    """The model that a run starts from."""
    module = family("vae").build(config.model, run_schema(config))
    initialise(module, torch.Generator().manual_seed(0))
    return to_arrays(module)


def task_for(config: RunConfig, norm: float, *, evaluation: int = 0) -> Task:
    """The server's request for a round, and an evaluation if there is to be one."""
    exam: Mapping[str, np.ndarray] = {}
    if evaluation:
        x = torch.from_numpy(np.random.default_rng(3).random((200, 1, 8, 8), dtype=np.float32))
        exam = metrics.exam_to_arrays(
            metrics.prepare(Batch(x, torch.arange(200) % 10), DIGITS, seed=0)
        )
    return Task(
        run_id="run",
        round=1,
        evaluation=evaluation,
        config="",
        schema="",
        arrays=initial(config),
        released=initial(config) if evaluation else {},
        exam=exam,
        ledger=NO_LEDGER,
        clipping_norm=norm,
    )


def work_of(config: RunConfig, priced: Plan, task: Task, site: FakeSite) -> Parts:
    return parts_of(task, config, run_schema(config), priced, cast("Site", site))


def norm_of(arrays: Arrays) -> float:
    """L2 norm of all numbers."""
    return math.sqrt(sum(float(np.square(array).sum()) for array in arrays.values()))


def summed(priced: Plan) -> Plan:
    """The same, in a secure sum: the noise then comes with the words, and parts are bare."""
    return replace(priced, numbers=Numbers(3, 3, 3, 1))


class TestWholeSite:
    @pytest.mark.parametrize("norm", [0.01, 2.5])
    def test_its_update_has_all_of_the_noise_where_it_is_read_alone(
        self, config: RunConfig, norm: float
    ) -> None:
        site, priced = FakeSite(20, Noted()), plan(config)
        parts = work_of(config, priced, task_for(config, norm), site)
        assert parts.keys() == {"update"}
        shapes = [array.shape for array in parts["update"].values()]
        expected = [(shape, priced.noise_multiplier * norm) for shape in shapes]
        assert cast("Noted", site.coins).asked == expected
        assert all(array.dtype == np.float64 for array in parts["update"].values())

    def test_which_is_as_much_as_it_says(self, config: RunConfig) -> None:
        """Of no records the change is zero, so that what is sent is the noise."""
        priced, norm = plan(config), 0.25
        drawn = []
        coins = Coins(KEY)
        for _ in range(10):
            parts = work_of(config, priced, task_for(config, norm), FakeSite(0, coins))
            drawn.append(np.concatenate([array.ravel() for array in parts["update"].values()]))
        noise = np.concatenate(drawn)
        # 21 550 numbers: 5.33 standard errors of a standard deviation, 1e-7, are 2.6 %.
        assert noise.size > 20_000
        assert noise.std() == pytest.approx(priced.noise_multiplier * norm, rel=0.026)

    def test_with_a_norm_that_adapts_it_has_more_and_the_share_within_has_its_own(
        self, config: RunConfig
    ) -> None:
        """z_delta = z / sqrt(0.9) of the norm in force; 2 sigma_b = z sqrt(10), of halves."""
        priced = replace(plan(config), adaptive=True)
        site = FakeSite(20, Noted())
        parts = work_of(config, priced, task_for(config, 0.5), site)
        assert parts.keys() == {"update", "clipping"}
        scales = [scale for _, scale in cast("Noted", site.coins).asked]
        z = priced.noise_multiplier
        assert scales[:-1] == pytest.approx([0.5 * z / math.sqrt(0.9)] * len(parts["update"]))
        assert scales[-1] == pytest.approx(z * math.sqrt(10) / 2)
        assert parts["clipping"].keys() == {"within"}
        assert parts["clipping"]["within"].shape == (1,)

    def test_in_a_secure_sum_parts_are_bare(self, config: RunConfig) -> None:
        """The noise is added on the grid: twice would be too much, and here it would be rounded."""
        site, priced = FakeSite(20, Noted()), summed(replace(plan(config), adaptive=True))
        work_of(config, priced, task_for(config, 1.0, evaluation=1), site)
        assert cast("Noted", site.coins).asked == []

    @pytest.mark.parametrize("norm", [1e-6, 0.01, 0.1, 50.0])
    def test_its_update_is_within_the_bound_that_the_task_says(
        self, config: RunConfig, norm: float
    ) -> None:
        priced = summed(replace(plan(config), adaptive=True))
        parts = work_of(config, priced, task_for(config, norm), FakeSite(20, Noted()))
        # Two steps of Adam at rate 0.005 over 2155 weights: at most 0.47.
        free = norm == 50.0
        size = norm_of(parts["update"])
        assert (0.05 < size < 0.5) if free else (0.99 * norm < size <= norm)
        assert parts["clipping"]["within"].tolist() == [0.5 if free else -0.5]

    def test_it_is_how_the_parameters_changed(self, config: RunConfig) -> None:
        priced, site = summed(plan(config)), FakeSite(20, Coins(KEY))
        parts = work_of(config, priced, task_for(config, 50.0), site)
        module = family("vae").build(config.model, run_schema(config))
        initialise(module, torch.Generator().manual_seed(0))
        records = site.records(config, run_schema(config)).training
        change = train(module, records, config, priced, Coins(KEY))
        for name, array in parts["update"].items():
            assert array.tobytes() == change[name].astype(np.float64).tobytes(), name

    def test_one_whose_records_fail_says_what_one_without_says(
        self, config: RunConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failing(module: Any, records: Side, *rest: Any) -> Arrays:  # noqa: ANN401
            if len(records.batch.y):
                raise RuntimeError(PLANTED)
            return train(module, records, *rest)

        priced, task = replace(plan(config), adaptive=True), task_for(config, 0.5)
        empty = work_of(config, priced, task, FakeSite(0, Coins(KEY)))
        monkeypatch.setattr(work, "train", failing)
        site = FakeSite(20, Coins(KEY))
        failed = work_of(config, priced, task, site)
        assert site.failures == 1
        for part, arrays in empty.items():
            for name, array in arrays.items():
                assert failed[part][name].tobytes() == array.tobytes(), (part, name)


class TestParts:
    def test_are_what_is_asked_for_and_paid_for(self, config: RunConfig) -> None:
        priced = plan(config)
        evaluated = task_for(config, 1.0, evaluation=1)
        for asked, paid, expected in (
            (replace(evaluated, evaluation=0), 0.0, {"update"}),
            (evaluated, 0.0, {"update", "holdout"}),
            (evaluated, 1.0, {"update", "holdout", "training"}),
            (replace(evaluated, round=0), 1.0, {"holdout", "training"}),
        ):
            site = FakeSite(20, Noted())
            found = work_of(config, replace(priced, figures_noise=paid), asked, site)
            assert found.keys() == expected

    def test_are_the_blocks_of_the_rounds_vector(self, make_config: MakeConfig) -> None:
        """Their names and sizes are what site and server lay the vector out by."""
        config = make_config(privacy={"mechanism": "none"}).resolved()
        task = task_for(config, math.inf, evaluation=1)
        priced = replace(plan(config), figures_noise=1.0)
        found = work_of(config, priced, task, FakeSite(20, Noted()))
        sizes = {part: sum(a.size for a in arrays.values()) for part, arrays in found.items()}
        assert sizes == {
            "update": sum(array.size for array in initial(config).values()),
            "holdout": metrics.size(DIGITS)[0],
            "training": metrics.loss_size()[0],
        }

    def test_without_records_there_is_one_of_each_all_the_same(self, config: RunConfig) -> None:
        priced, task = summed(plan(config)), task_for(config, 1.0, evaluation=1)
        found = work_of(config, priced, task, FakeSite(0, Noted()))
        assert not any(array.any() for part in found.values() for array in part.values())
        assert len(no_records(DIGITS).training.batch.y) == 0


def test_a_share_of_the_noise_is_the_plans_to_say(config: RunConfig) -> None:
    """`distributed` as well: nothing is added to the sum before it is on the grid."""
    site = FakeSite(20, Noted())
    priced = replace(
        summed(plan(config)), mechanism="distributed", unit="record", clipping_norm=1.0
    )
    parts = work_of(
        config.model_copy(
            update={"aggregation": config.aggregation.model_copy(update={"strategy": "adam"})}
        ),
        priced,
        task_for(config, 1.0, evaluation=1),
        site,
    )
    assert cast("Noted", site.coins).asked == []
    assert 0 < norm_of(parts["update"]) <= 20 * CLIPPING_SLACK
    assert SimpleNamespace(**parts).holdout["count"].tolist() == [20]
