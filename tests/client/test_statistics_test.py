"""The self-test of the statistics: right code is consistent, and faults are called by their name.

Coins are fixed, so that a test says the same every time.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedveil.client import self_test as running
from fedveil.client import statistics, statistics_test
from fedveil.client.self_test import ConformanceError
from fedveil.config import RunConfig
from fedveil.data_prep.queries import answers, tables
from fedveil.data_prep.queries.workload import Workload, clipped_sum
from fedveil.data_prep.schema import Schema, parse_schema
from fedveil.privacy import discrete, mechanism, vector
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.mechanism import add_nothing, mechanism_of
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import Plan
from fedveil.privacy.shared_noise import Grid, choose_grid

MakeCase = Callable[[str], Any]
Patch = pytest.MonkeyPatch
ALL = (
    "central",
    "central, person",
    "distributed",
    "distributed, person",
    "local",
    "local, person",
    "site",
    "site, secagg",
)
NUMBER = {"name": "age", "kind": "numeric", "bounds": [0, 120]}
KIND = {"name": "kind", "kind": "categorical", "categories": ["a", "b", "c"]}
SICK = {"name": "sick", "kind": "categorical", "categories": ["no", "yes"]}
SCHEMA = parse_schema({"label": "sick", "column": [NUMBER, KIND, SICK]}, "test")
OF_A_SITE = 30.0  # records


class Given:
    """A run with statistics, of which nothing but them is tried."""

    def __init__(self, config: RunConfig, priced: Plan, all_sites: int, coins: Any) -> None:  # noqa: ANN401
        self.config, self.all_sites, self.coins = config, all_sites, coins
        units = OF_A_SITE if priced.unit == "site" else 1.0
        self.priced = replace(
            priced,
            statistics=1,
            statistics_noise=2.0,
            statistics_units=units,
            statistics_epsilon=1.0,
        )

    def tested(self, sites: int | None = None, schema: Schema = SCHEMA) -> running.Tested:
        sites = self.all_sites if sites is None else sites
        return statistics_test.statistics_test(
            self.config, schema, self.priced, sites, self.coins(0)
        )


@pytest.fixture
def given(case: MakeCase) -> Callable[[str], Given]:
    def make(name: str) -> Given:
        one = case(name)
        return Given(one.config, one.priced, one.all_sites, one.coins)

    return make


class TestRightCode:
    @pytest.mark.parametrize("name", ALL)
    def test_is_consistent(self, given: MakeCase, name: str) -> None:
        found = given(name).tested()
        assert (found.outcome, found.failed) == ("consistent", ())

    @pytest.mark.parametrize("name", ["distributed", "distributed, person", "site, secagg"])
    def test_a_site_s_own_share_too(self, given: MakeCase, name: str) -> None:
        assert given(name).tested(sites=1).outcome == "consistent"

    @pytest.mark.parametrize("noise", [0.3, 20.0])
    def test_whatever_the_noise(self, given: MakeCase, noise: float) -> None:
        for name in ("central", "distributed"):
            one = given(name)
            one.priced = replace(one.priced, statistics_noise=noise)
            assert one.tested().outcome == "consistent"

    def test_of_what_the_run_counts_together_nothing_is_asked_of_the_column_tried(
        self, given: MakeCase
    ) -> None:
        one = given("central")
        asked = one.config.statistics.model_copy(update={"marginals": (("age", "kind"),)})
        one.config = one.config.model_copy(update={"statistics": asked})
        assert one.tested().outcome == "consistent"

    def test_without_statistics_there_is_nothing_to_try(self, given: MakeCase) -> None:
        one = given("central")
        for change in ({"statistics": 0}, {"epsilon": None}):
            one.priced = replace(one.priced, **{"statistics": 1, "epsilon": 2.0} | change)
            with pytest.raises(ConformanceError, match="releases none that could be tested"):
                one.tested()


def no_noise(patch: Patch) -> None:
    nothing = {
        name: replace(row, at_site=add_nothing, at_server=add_nothing)
        for name, row in mechanism.MECHANISMS.items()
    }
    patch.setattr(mechanism, "MECHANISMS", nothing)
    patch.setattr(discrete, "add_noise", lambda *_: None)


def nine_tenths(patch: Patch) -> None:
    gaussian, integer = Coins.gaussian, discrete.add_noise
    patch.setattr(
        Coins, "gaussian", lambda coins, shape, scale: 0.9 * gaussian(coins, shape, scale)
    )

    def added(words: np.ndarray, stretch: int, coins: Coins) -> None:
        noise = np.zeros_like(words)
        integer(noise, stretch, coins)
        words += np.rint(0.9 * noise.view("<i4")).astype(np.int64).astype("<u4")

    patch.setattr(discrete, "add_noise", added)


def half_the_sensitivity(patch: Patch) -> None:
    patch.setattr(statistics_test, "_check_whole_norm", lambda *_: None)
    patch.setattr(Workload, "sensitivity", property(lambda asked: asked.norm / 2))


def noise_for_half(patch: Patch) -> None:
    """As the site adds it."""
    real = mechanism_of

    def halved(priced: Plan) -> Any:  # noqa: ANN401
        row = real(priced)
        return replace(row, at_site=lambda sums, scale, coins: row.at_site(sums, scale / 2, coins))

    patch.setattr(statistics, "mechanism_of", halved)


def persons_not_clipped(patch: Patch) -> None:
    patch.setattr(statistics_test, "_check_whole_norm", lambda *_: None)
    real = clipped_sum
    patch.setattr(tables, "clipped_sum", lambda rows, _bound, persons: real(rows, 1e9, persons))


def persons_by_record(patch: Patch) -> None:
    patch.setattr(statistics, "answers", lambda *arguments: answers(*arguments[:3]))


def sites_not_clipped(patch: Patch) -> None:
    patch.setattr(statistics, "clipped_update", lambda sums, _bound: (sums, True))


def counted_twice(patch: Patch) -> None:
    real = answers
    patch.setattr(statistics, "answers", lambda *arguments: 2 * real(*arguments))


def not_debited(patch: Patch) -> None:
    real = Ledger.debit

    def debit(ledger: Ledger, asked: Any, lifetime: Any, terms: Any, releases: Any) -> Any:  # noqa: ANN401
        if releases == [("statistics", 17)]:
            return ledger.read().head
        return real(ledger, asked, lifetime, terms, releases)

    patch.setattr(Ledger, "debit", debit)


CLIPPED = {"clipping"}
FAULTS: list[tuple[Callable[[Patch], None], str, set[str]]] = [
    (no_noise, "central", {"noise", "zeros"}),
    (no_noise, "distributed", {"noise", "zeros"}),
    (no_noise, "local", {"noise", "zeros"}),
    (no_noise, "site", {"noise", "zeros"}),
    (nine_tenths, "central", {"noise"}),
    (nine_tenths, "distributed", {"noise"}),
    (nine_tenths, "site, secagg", {"noise"}),
    (noise_for_half, "local", {"noise"}),
    (noise_for_half, "site", {"noise"}),
    (half_the_sensitivity, "central", CLIPPED),
    (half_the_sensitivity, "distributed", CLIPPED),
    (persons_not_clipped, "central, person", CLIPPED),
    (persons_not_clipped, "distributed, person", CLIPPED),
    (persons_by_record, "central, person", CLIPPED),
    (persons_by_record, "local, person", CLIPPED),
    (sites_not_clipped, "site", CLIPPED),
    (sites_not_clipped, "site, secagg", CLIPPED),
    (counted_twice, "central", CLIPPED),
    (not_debited, "central", {"ledger"}),
]


class TestFaults:
    @pytest.mark.parametrize(
        ("inject", "name", "due"),
        FAULTS,
        ids=[f"{inject.__name__}-{name}" for inject, name, _ in FAULTS],
    )
    def test_is_flagged_by_its_name(
        self,
        given: MakeCase,
        monkeypatch: Patch,
        inject: Callable[[Patch], None],
        name: str,
        due: set[str],
    ) -> None:
        one = given(name)
        inject(monkeypatch)
        found = one.tested()
        assert found.outcome == "violated"
        assert due <= {*found.failed}


class TestTheRunsOwn:
    """What a column of the self-test's own cannot show."""

    @pytest.mark.parametrize("name", ["central", "distributed", "local, person"])
    def test_several_queries_that_count_as_one(
        self, given: MakeCase, monkeypatch: Patch, name: str
    ) -> None:
        """Each adds 1, and all of them together sqrt(their number)."""
        largest = property(lambda asked: max(q.weight * q.norm for q in asked.queries))
        monkeypatch.setattr(Workload, "norm", largest)
        one = given(name)
        monkeypatch.setattr(statistics_test, "trials", lambda *_: None)
        if name.endswith("person"):  # who is clipped to what is said, whatever that is
            one.tested()
            return
        with pytest.raises(ConformanceError, match=r"^statistics = .*: one record must move all"):
            one.tested()

    def test_persons_that_are_not_clipped(self, given: MakeCase, monkeypatch: Patch) -> None:
        real = clipped_sum
        monkeypatch.setattr(
            tables, "clipped_sum", lambda rows, _, persons: real(rows, 1e9, persons)
        )
        with pytest.raises(ConformanceError, match=r"^statistics = .*: one person must move all"):
            given("central, person").tested()

    def test_weights_that_are_left_out_of_the_norm(
        self, given: MakeCase, monkeypatch: Patch
    ) -> None:
        real = tables.fine
        monkeypatch.setattr(tables, "fine", lambda column, label: real(column, label, weight=8.0))
        unweighted = property(lambda asked: sum(q.norm**2 for q in asked.queries) ** 0.5)
        monkeypatch.setattr(Workload, "norm", unweighted)
        monkeypatch.setattr(statistics_test, "trials", lambda *_: None)
        with pytest.raises(ConformanceError, match=r"^statistics = "):
            given("central").tested()

    def test_a_grid_with_less_noise_for_the_run_s_own_counts(
        self, given: MakeCase, monkeypatch: Patch
    ) -> None:
        """As coarse as they need, of which the self-test's own vectors have no need."""
        one = given("distributed")
        one.config = one.config.model_copy(
            update={"data": one.config.data.model_copy(update={"records": 10**9})}
        )
        monkeypatch.setattr(statistics_test, "trials", lambda *_: None)
        one.tested()

        def finer(z: float, c: float, d: int, h: int, most: float) -> Grid:
            found = choose_grid(z, c, d, h, most)
            return replace(found, scale=100_000 * found.scale) if most < 10 else found

        monkeypatch.setattr(vector, "choose_grid", finer)
        with pytest.raises(ConformanceError, match="noise on the grid"):
            one.tested()

    def test_the_grid_counts_on_all_sites(self, given: MakeCase, monkeypatch: Patch) -> None:
        monkeypatch.setattr(Plan, "honest", property(lambda priced: priced.numbers.n))
        with pytest.raises(ConformanceError, match="noise on the grid"):
            given("distributed").tested()


def test_tried_is_what_a_round_calls() -> None:
    """Not a copy of it."""
    assert vars(statistics_test)["statistics_sums"] is statistics.statistics_sums
    assert vars(statistics_test)["trials"] is running.trials
