"""What a site adds to the round of statistics, by mechanism and unit, on a table made by hand.

Two columns, "kind" (a, b) with the label "sick" (no, yes): what is asked are the counts of both
together, and a record is in one cell.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from fedveil.client import statistics as module
from fedveil.client import work
from fedveil.client.site import Records, Side, Site
from fedveil.client.statistics import statistics_sums
from fedveil.client.work import parts_of
from fedveil.config import MechanismName, RunConfig
from fedveil.data_prep.queries import run_workload, tables
from fedveil.data_prep.queries.workload import SLACK, Workload
from fedveil.data_prep.schema import Schema, parse_schema
from fedveil.models import Batch
from fedveil.models.state import Arrays
from fedveil.privacy.clipping import CLIPPING_SLACK
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import Plan, plan
from fedveil.privacy.secagg.terms import Numbers
from fedveil.wire import NO_LEDGER, Task

MakeConfig = Callable[..., RunConfig]
ALARM = 1e-7
PLANTED = "PATIENT-4711"
# (kind, sick), and how many of each: the answers, where nothing is clipped.
COUNTS = {(0, 0): 5, (0, 1): 3, (1, 0): 2, (1, 1): 7}


def columns(levels: int = 2) -> Schema:
    names = ["a", "b", *(f"level-{n}" for n in range(2, levels))]
    kind = {"name": "kind", "kind": "categorical", "categories": names}
    sick = {"name": "sick", "kind": "categorical", "categories": ["no", "yes"]}
    return parse_schema({"label": "sick", "column": [kind, sick]}, "test")


SCHEMA = columns()


def side(rows: list[tuple[int, int]], persons: list[int] | None = None, levels: int = 2) -> Side:
    x = torch.zeros(len(rows), levels)
    for place, (kind, _) in enumerate(rows):
        x[place, kind] = 1.0
    labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
    return Side(Batch(x, labels), None if persons is None else torch.tensor(persons))


@pytest.fixture(autouse=True)
def _unweighted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each query weighs is the workload's own business."""
    real = tables.workload

    def plain(*arguments: Any) -> Workload:  # noqa: ANN401
        return Workload(tuple(replace(q, weight=1.0) for q in real(*arguments).queries))

    monkeypatch.setattr(tables, "workload", plain)


ROWS = [row for row, count in COUNTS.items() for _ in range(count)]


@pytest.fixture(scope="module", name="config")
def _config() -> RunConfig:
    return RunConfig.model_validate(
        {
            "federation": {"sites": 3, "rounds": 2},
            "data": {"source": "sklearn:breast_cancer", "holdout": 0.0},
            "model": {"family": "vae", "hidden": 4, "latent": 2},
            "privacy": {
                "mechanism": "central",
                "epsilon": 2.0,
                "sampling_rate": 1.0,
                "statistics_share": 0.5,
            },
        }
    ).resolved("table")


@pytest.fixture(scope="module", name="priced")
def _priced(config: RunConfig) -> Plan:
    return replace(plan(config), statistics_noise=2.0)


def of(priced: Plan, mechanism: MechanismName, **changes: Any) -> Plan:  # noqa: ANN401
    numbers = Numbers(3, 3, 3, 1) if mechanism == "distributed" else None
    return replace(priced, mechanism=mechanism, numbers=numbers, **changes)


def norm_of(arrays: Arrays) -> float:
    return math.sqrt(sum(float(np.square(array).sum()) for array in arrays.values()))


class TestSums:
    @pytest.mark.parametrize("mechanism", ["none", "central", "distributed"])
    def test_are_exact_where_the_noise_comes_later(
        self, config: RunConfig, priced: Plan, coins: Coins, mechanism: MechanismName
    ) -> None:
        found = statistics_sums(side(ROWS), config, SCHEMA, of(priced, mechanism), coins)
        assert found.keys() == {"answers"}
        assert found["answers"].dtype == np.float64
        assert sorted(found["answers"].tolist()) == sorted(COUNTS.values())
        assert found["answers"].reshape(2, 2).tolist() == [[5, 2], [3, 7]]  # the label comes first

    @pytest.mark.parametrize("seed", range(3))
    def test_are_noised_where_a_site_releases_by_itself(
        self, config: RunConfig, priced: Plan, seed: int
    ) -> None:
        """Of 2 x 20 000 cells, the noise 2 x 1.001: chi-squared bounds of 1e-7 on fixed coins."""
        schema, coins = columns(20_000), Coins(bytes([seed]) * 32)
        found = statistics_sums(
            side(ROWS, levels=20_000), config, schema, of(priced, "local"), coins
        )
        noise = found["answers"].reshape(2, 20_000).copy()
        noise[:, :2] -= np.array([[5, 2], [3, 7]])
        share = float(np.square(noise / (2.0 * SLACK)).sum())
        low, high = chi2.ppf([ALARM / 2, 1 - ALARM / 2], noise.size)
        assert low < share < high
        assert abs(noise.mean()) < 5.4 * 2.0 / math.sqrt(noise.size)

    def test_one_record_more_is_one_more_in_one_cell(
        self, config: RunConfig, priced: Plan, coins: Coins
    ) -> None:
        central = of(priced, "central")
        one, more = (
            statistics_sums(side(rows), config, SCHEMA, central, coins)["answers"]
            for rows in (ROWS, [*ROWS, (1, 1)])
        )
        assert np.abs(more - one).tolist() == [0, 0, 0, 1]
        assert np.linalg.norm(more - one) <= run_workload(config, SCHEMA, 2.0).sensitivity

    def test_a_person_of_many_records_adds_no_more_than_one(
        self, config: RunConfig, priced: Plan, coins: Coins
    ) -> None:
        """Of 17 records 12 are one person's: 5 + 3 + 2 of three kinds, and 2 of the last."""
        person = of(priced, "central", unit="person")
        persons = [0] * 12 + [1, 2, 3, 4, 5]
        found = statistics_sums(side(ROWS, persons), config, SCHEMA, person, coins)["answers"]
        length = math.sqrt(5**2 + 3**2 + 2**2 + 2**2)
        expected = np.array([[5 / length, 2 / length], [3 / length, 2 / length + 5]])
        assert found.reshape(2, 2) == pytest.approx(expected)
        without = statistics_sums(side(ROWS[12:], [0, 1, 2, 3, 4]), config, SCHEMA, person, coins)[
            "answers"
        ]
        assert np.linalg.norm(found - without) <= SLACK

    def test_nor_goes_on_where_nothing_says_whose_records_they_are(
        self, config: RunConfig, priced: Plan, coins: Coins
    ) -> None:
        with pytest.raises(ValueError, match="are what is hidden"):
            statistics_sums(side(ROWS), config, SCHEMA, of(priced, "central", unit="person"), coins)

    @pytest.mark.parametrize(("units", "clipped"), [(4.0, True), (100.0, False)])
    def test_a_site_adds_no_more_than_so_many_records(
        self, config: RunConfig, priced: Plan, coins: Coins, units: float, *, clipped: bool
    ) -> None:
        whole = of(priced, "central", unit="site", statistics_units=units)
        found = statistics_sums(side(ROWS), config, SCHEMA, whole, coins)
        bound = units * SLACK
        if clipped:
            assert norm_of(found) == pytest.approx(bound / CLIPPING_SLACK)
            direction = found["answers"] / norm_of(found)
            assert direction == pytest.approx(np.array([5, 2, 3, 7]) / math.sqrt(87))
        else:
            assert found["answers"].tolist() == [5, 2, 3, 7]
        assert norm_of(found) <= bound

    def test_and_has_noise_for_so_many(
        self, config: RunConfig, priced: Plan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []

        def noted(coins: Coins, shape: tuple[int, ...], scale: float) -> np.ndarray:
            asked.append((shape, scale))
            return np.zeros(shape)

        monkeypatch.setattr(Coins, "gaussian", noted)
        whole = replace(priced, mechanism="site", unit="site", statistics_units=4.0)
        statistics_sums(side(ROWS), config, SCHEMA, whole, Coins(bytes(32)))
        [(shape, scale)] = asked
        assert shape == (4,)
        assert scale == pytest.approx(2.0 * 4.0 * SLACK)


class FakeSite:
    """All that the work needs of a site."""

    def __init__(self, records: Side) -> None:
        self.name, self.coins, self.failures = "site-005", Coins(bytes(32)), 0
        self._records = records

    def records(self, config: RunConfig, schema: Schema) -> Records:
        del config, schema
        none = side([])
        return Records(self._records, none, none)

    def fail(self) -> None:
        self.failures += 1


def task(**changes: Any) -> Task:  # noqa: ANN401
    asked = Task("run", 0, 0, "", "", {}, {}, {}, NO_LEDGER, 1.0, statistics=1)
    return replace(asked, **changes)


class TestParts:
    def test_are_the_statistics_and_nothing_else(self, config: RunConfig, priced: Plan) -> None:
        site = FakeSite(side(ROWS))
        found = parts_of(task(), config, SCHEMA, of(priced, "central"), cast("Site", site))
        assert found.keys() == {"statistics"}
        assert found["statistics"]["answers"].tolist() == [5, 2, 3, 7]
        assert site.failures == 0

    @pytest.mark.parametrize("unit", ["record", "person", "site"])
    def test_without_records_are_zeros_of_the_right_length(
        self, config: RunConfig, priced: Plan, unit: str
    ) -> None:
        nobody = side([], [])
        plan_of = of(priced, "central", unit=unit)
        found = parts_of(task(), config, SCHEMA, plan_of, cast("Site", FakeSite(nobody)))
        assert found["statistics"]["answers"].tolist() == [0.0] * 4

    def test_of_records_that_fail_are_what_a_site_without_any_says(
        self, config: RunConfig, priced: Plan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failing(records: Side, *rest: Any) -> Arrays:  # noqa: ANN401
            if len(records.batch.y):
                raise RuntimeError(PLANTED)
            return statistics_sums(records, *rest)

        local = of(priced, "local")
        none = FakeSite(side([]))
        empty = parts_of(task(), config, SCHEMA, local, cast("Site", none))
        monkeypatch.setattr(work, "statistics_sums", failing)
        site = FakeSite(side(ROWS))
        found = parts_of(task(), config, SCHEMA, local, cast("Site", site))
        assert (site.failures, none.failures) == (1, 0)
        assert np.array_equal(found["statistics"]["answers"], empty["statistics"]["answers"])
        assert found["statistics"]["answers"].any()  # the noise comes all the same

    def test_a_record_that_is_no_number_harms_itself_only(
        self, config: RunConfig, priced: Plan
    ) -> None:
        bad = side(ROWS)
        bad.batch.x[0] = float("nan")
        central = of(priced, "central")
        found = parts_of(task(), config, SCHEMA, central, cast("Site", FakeSite(bad)))
        answers = found["statistics"]["answers"]
        assert np.abs(answers - np.array([5, 2, 3, 7])).sum() <= 2

    def test_are_of_the_training_side(self, config: RunConfig, priced: Plan) -> None:
        """The account that pays for them."""
        seen = []

        class Watched(FakeSite):
            def records(self, config: RunConfig, schema: Schema) -> Records:
                del config, schema
                none = side([])
                seen.append(1)
                return Records(none, side(ROWS), side(ROWS))

        site = Watched(side([]))
        found = parts_of(task(), config, SCHEMA, of(priced, "central"), cast("Site", site))
        assert seen == [1]
        assert found["statistics"]["answers"].tolist() == [0.0] * 4


def test_what_is_asked_hangs_on_no_record(
    config: RunConfig, priced: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def noted(*arguments: Any) -> Any:  # noqa: ANN401
        asked.append(arguments)
        return run_workload(*arguments)

    monkeypatch.setattr(module, "run_workload", noted)
    for rows in ([], ROWS, ROWS * 10):
        statistics_sums(side(rows), config, SCHEMA, of(priced, "central"), Coins(bytes(32)))
    assert asked == [(config, SCHEMA, 2.0)] * 3
