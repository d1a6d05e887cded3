"""The self-test on the real code as it is, and on grids with less noise than was priced."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from fedveil.client import self_test as tested
from fedveil.client import training
from fedveil.client.self_test import ConformanceError, self_test
from fedveil.config import RunConfig
from fedveil.privacy import clipping, vector
from fedveil.privacy.plan import Plan, plan
from fedveil.privacy.shared_noise import choose_grid

MakeConfig = Callable[..., RunConfig]
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


class TestRightCode:
    @pytest.mark.parametrize("name", ALL)
    def test_is_consistent(self, case: MakeCase, name: str) -> None:
        found = case(name).tested()
        assert (found.outcome, found.failed) == ("consistent", ())
        scales = {"noise", "accounted noise", "share"}  # which the first trial is for
        assert {*found.records.weak} <= scales
        assert not (scales | {"ledger"}) & {*found.noise.weak}

    @pytest.mark.parametrize("name", ["distributed", "distributed, person", "site, secagg"])
    def test_a_site_s_own_share_too(self, case: MakeCase, name: str) -> None:
        assert case(name).tested(sites=1).outcome == "consistent"

    def test_two_self_tests_draw_other_coins(self, case: MakeCase) -> None:
        one = case("central")
        first, second = (self_test(one.config, one.priced) for _ in range(2))
        assert first.noise.checks != second.noise.checks

    @pytest.mark.parametrize(("name", "norm"), [("central", 1e6), ("site, secagg", 1e-6)])
    def test_whatever_the_clipping_norm(self, case: MakeCase, name: str, norm: float) -> None:
        one = case(name)
        found = one._replace(priced=replace(one.priced, clipping_norm=norm)).tested()
        assert found.outcome == "consistent"

    @pytest.mark.parametrize("rate", [1e-3, 0.99])
    def test_whatever_the_rate(self, case: MakeCase, rate: float) -> None:
        one = case("central")
        found = one._replace(priced=replace(one.priced, sampling_rate=rate)).tested()
        assert found.outcome == "consistent"

    def test_a_rate_too_near_to_1_is_inconclusive(self, case: MakeCase) -> None:
        one = case("central")
        found = one._replace(priced=replace(one.priced, sampling_rate=0.999999)).tested()
        assert (found.outcome, found.failed) == ("inconclusive", ())
        assert "batch sizes" in found.records.weak

    @pytest.mark.parametrize("steps", [7, 400])
    def test_however_many_steps_a_round_has(self, case: MakeCase, steps: int) -> None:
        one = case("local")
        found = one._replace(priced=replace(one.priced, releases_per_round=steps)).tested()
        assert found.outcome == "consistent"

    def test_none_has_nothing_to_test(self, make_config: MakeConfig) -> None:
        config = make_config(privacy={"mechanism": "none"}).resolved()
        with pytest.raises(ConformanceError, match='"none": adds no noise'):
            self_test(config, plan(config))

    def test_of_a_person_both_records_count_as_one(
        self, case: MakeCase, monkeypatch: Patch
    ) -> None:
        seen = []
        real = clipping.clipped_sum

        def watched(*arguments: Any, groups: Any = None, **options: Any) -> Any:  # noqa: ANN401
            seen.append(groups)
            return real(*arguments, groups=groups, **options)

        monkeypatch.setattr(training, "clipped_sum", watched)
        case("central, person").tested()
        assert {int(count) for groups in seen for count in groups.bincount()} == {0, 2}


class TestGrid:
    """What no noise that is drawn can show: that so much of it was priced."""

    @pytest.mark.parametrize("name", ["distributed", "site, secagg"])
    @pytest.mark.parametrize("sites", [1, 5])
    def test_noise_for_all_sites_where_fewer_are_counted_on(
        self, case: MakeCase, monkeypatch: Patch, name: str, sites: int
    ) -> None:
        one = case(name)
        monkeypatch.setattr(Plan, "honest", property(lambda priced: priced.numbers.n))
        with pytest.raises(ConformanceError, match=r"noise on the grid = .*: must be at least"):
            one.tested(sites=sites)

    def test_by_the_grid_s_own_count(self, case: MakeCase, monkeypatch: Patch) -> None:
        one, real = case("distributed"), choose_grid
        monkeypatch.setattr(vector, "choose_grid", lambda z, c, d, h, *m: real(z, c, d, h + 1, *m))
        with pytest.raises(ConformanceError, match="noise on the grid"):
            one.tested()

    def test_a_grid_that_ignores_how_many_coordinates_are_rounded(
        self, case: MakeCase, monkeypatch: Patch
    ) -> None:
        one, real = case("distributed"), choose_grid
        monkeypatch.setattr(vector, "choose_grid", lambda z, c, _d, *h: real(z, c, 1, *h))
        with pytest.raises(ConformanceError, match="noise on the grid"):
            one.tested()

    def test_only_of_a_vector_as_long_as_the_run_s(
        self, case: MakeCase, monkeypatch: Patch
    ) -> None:
        one, real = case("distributed"), choose_grid
        monkeypatch.setattr(
            vector, "choose_grid", lambda z, c, d, *h: real(z, c, min(d, 10_000), *h)
        )
        assert one.tested().outcome == "consistent"  # its own vectors are shorter
        with pytest.raises(ConformanceError, match="noise on the grid"):
            one.tested(parameters=1_000_000)

    @pytest.mark.parametrize("count", [1, 10_000, 1_000_000])
    def test_the_right_one_passes(self, case: MakeCase, count: int) -> None:
        for name in ("distributed", "site, secagg"):
            one = case(name)
            share, grid = tested.check_grid(tested.ROUNDS, one.priced, count)
            assert 0 < grid < share / 500
