"""The vector of a secure round: its blocks carry the noise that is priced, and reals survive."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2

from fedveil.config import RunConfig
from fedveil.privacy import discrete
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import Plan, plan
from fedveil.privacy.secagg.terms import Block, Numbers
from fedveil.privacy.shared_noise import Grid, accounted_multiplier
from fedveil.privacy.vector import (
    Placed,
    Release,
    Sizes,
    flat,
    placed,
    reals,
    releases,
    rounding,
    unflat,
    words,
)

# Of an order that Opacus does not use; `privacy.accounting` ignores it, pytest forgets that.
pytestmark = pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")

MakeConfig = Callable[..., RunConfig]
NUMBERS = Numbers(4, 3, 3, 1)
SIZES = Sizes(
    update=700, clipping_norm=1.0, answers=(20, 2.0), figures=(2, math.sqrt(2)), records=1797
)
ALARM = 1e-7
SOON: dict[str, Any] = {"privacy": {"sampling_rate": 1.0}}  # is priced in a moment


def block(length: int, scale: float, sigma: float = 0.0, name: str = "update") -> Block:
    return Block(name, length, 1.0, scale, sigma, 1.0)


def still(length: int, scale: float, name: str = "update") -> Placed:
    """A block without noise."""
    return Placed(block(length, scale, name=name), None)


def noised(length: int, stretch: int, scale: float = 1.0, name: str = "update") -> Placed:
    return Placed(block(length, scale, discrete.sigma(stretch), name), stretch)


@pytest.fixture
def price(make_config: MakeConfig) -> Callable[..., Plan]:
    """Plans of four sites, two of which are surely honest in each sum."""

    def made(mechanism: str, encryption: str = "secagg", **sections: dict[str, object]) -> Plan:
        privacy = {"mechanism": mechanism, "epsilon": 20.0, "sampling_rate": 0.05}
        options = {
            "federation": {"sites": 4, "rounds": 2},
            "privacy": {**privacy, **sections.pop("privacy", {})},
            "aggregation": {"encryption": encryption},
        }
        return plan(make_config(**options, **sections).resolved())

    return made


class TestReleases:
    def names(self, found: Plan, **about: bool) -> list[str]:
        asked = {"at_sites": False, "training": True, "evaluating": False, **about}
        return [one.name for one in releases(SIZES, found, **asked)]

    def test_what_a_round_is_made_of(self, price: Callable[..., Plan]) -> None:
        found = price("distributed")
        assert self.names(found) == ["update"]
        assert self.names(found, evaluating=True) == ["update", "holdout"]
        assert self.names(found, training=False, evaluating=True) == ["holdout"]
        assert self.names(found, training=False) == []
        paid = price("distributed", evaluation={"training_share": 0.2})
        assert self.names(paid, evaluating=True) == ["update", "holdout", "training"]
        adaptive = price("site", privacy={"clipping": "adaptive"})
        assert self.names(adaptive, at_sites=True, evaluating=True) == [
            "update", "clipping", "holdout",
        ]  # fmt: skip

    def test_each_has_the_plan_s_noise(self, price: Callable[..., Plan]) -> None:
        found = price("distributed", evaluation={"training_share": 0.2})
        update, holdout, training = releases(
            SIZES, found, at_sites=False, training=True, evaluating=True
        )
        assert (update.noise_multiplier, update.sampling_rate) == (found.noise_multiplier, 0.05)
        assert (update.length, update.sensitivity, update.bound) == (700, 1.0, 64.0)
        assert (holdout.noise_multiplier, holdout.sampling_rate) == (found.evaluation_noise, 1.0)
        assert (holdout.length, holdout.sensitivity) == (20, 2.0)
        assert holdout.bound == 1797 + 20 * found.evaluation_noise * 2.0
        assert training.noise_multiplier == found.figures_noise
        assert (training.length, training.sensitivity) == (2, math.sqrt(2))

    def test_a_whole_site_is_sampled_always(self, price: Callable[..., Plan]) -> None:
        found = price("site", privacy={"clipping": "adaptive"})
        sizes = replace(SIZES, clipping_norm=0.25)
        update, clipping = releases(sizes, found, at_sites=True, training=True, evaluating=False)
        assert (update.sampling_rate, update.sensitivity, update.bound) == (1.0, 0.25, 0.25)
        assert update.noise_multiplier == found.update_noise > found.noise_multiplier
        assert (clipping.length, clipping.sensitivity) == (1, 0.5)
        assert clipping.noise_multiplier == found.indicator_noise

    @pytest.mark.parametrize(("at_sites", "bound"), [(True, 8.0), (False, 1024.0)])
    def test_without_a_norm_the_bound_is_public(
        self, price: Callable[..., Plan], at_sites: bool, bound: float
    ) -> None:
        found, sizes = price("none"), replace(SIZES, clipping_norm=math.inf)
        [update] = releases(sizes, found, at_sites=at_sites, training=True, evaluating=False)
        assert update.bound == bound
        [one] = placed([update], found)
        # A sum of all sites at the bound fits: (2^31 - 1) // 4 steps for one.
        assert one.block.scale == ((2**31 - 1) // 4) / bound
        assert one.block.sensitivity == bound
        assert (one.block.sigma, one.stretch) == (0.0, None)


class TestPlaced:
    @pytest.mark.parametrize("mechanism", ["distributed", "site"])
    def test_any_two_honest_sites_have_the_noise_that_is_priced(
        self, price: Callable[..., Plan], mechanism: str
    ) -> None:
        """n_min - t_collude = 2 of 4: and little more than is priced, nowhere less."""
        found = price(mechanism, evaluation={} if mechanism == "site" else {"training_share": 0.2})
        at_sites = mechanism == "site"
        asked = releases(SIZES, found, at_sites=at_sites, training=True, evaluating=True)
        for release, one in zip(asked, placed(asked, found), strict=True):
            assert one.stretch is not None
            assert one.block.sigma == discrete.sigma(one.stretch)
            grid = Grid(one.block.scale, one.stretch)
            has = accounted_multiplier(grid, release.sensitivity, release.length, 2)
            assert release.noise_multiplier <= has < 1.0001 * release.noise_multiplier
            # By hand: sqrt(2) sigma over (scale C + sqrt(d)).
            moved = one.block.scale * release.sensitivity + math.sqrt(release.length)
            plain = math.sqrt(2) * one.block.sigma / moved
            assert plain == pytest.approx(release.noise_multiplier, rel=1e-3)
            assert (one.block.name, one.block.length) == (release.name, release.length)
            assert one.block.sampling_rate == release.sampling_rate

    @pytest.mark.parametrize("mechanism", ["central", "local", "none"])
    def test_others_have_none(self, price: Callable[..., Plan], mechanism: str) -> None:
        found = price(mechanism)
        asked = releases(SIZES, found, at_sites=False, training=True, evaluating=True)
        assert [(one.block.sigma, one.stretch) for one in placed(asked, found)] == [(0, None)] * 2

    @pytest.mark.parametrize("encryption", ["none", "sealed"])
    def test_only_a_secure_sum_has_a_vector(
        self, price: Callable[..., Plan], encryption: str
    ) -> None:
        found = price("central", encryption)
        asked = releases(SIZES, found, at_sites=False, training=True, evaluating=False)
        with pytest.raises(ValueError, match="only a secure sum has a vector"):
            placed(asked, found)


class TestWords:
    def test_by_hand(self, coins: Coins) -> None:
        """Blocks in their order, arrays in the order of their names; whole steps are not rounded
        and negative ones are modulo 2^32."""
        parts = {
            "b": {"y": np.array([[1.0], [-0.25]]), "x": np.array([0.5])},
            "a": {"only": np.array([-3.0])},
        }
        made = words(parts, [still(3, 4.0, "b"), still(1, 1.0, "a")], NUMBERS, coins)
        assert made.dtype == np.dtype("<u4")
        assert made.tolist() == [2, 4, 2**32 - 1, 2**32 - 3]

    def test_what_goes_beyond_saturates_and_no_sum_wraps(self, coins: Coins) -> None:
        one, huge = still(2, 1.0), {"update": {"w": np.array([1e30, -1e30])}}
        made = [words(huge, [one], NUMBERS, coins) for _ in range(NUMBERS.n)]
        total = sum(made[1:], made[0])
        most = float((2**31 - 1) // 4)
        assert made[0].view(np.int32).tolist() == [most, -most]
        assert reals(total, [one])["update"].tolist() == [4 * most, -4 * most]

    def test_another_length(self, coins: Coins) -> None:
        with pytest.raises(ValueError, match="update: 3 coordinates, must be 2"):
            words({"update": {"w": np.zeros(3)}}, [still(2, 1.0)], NUMBERS, coins)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_not_finite(self, coins: Coins, value: float) -> None:
        with pytest.raises(ValueError, match="not all finite"):
            words({"update": {"w": np.array([value])}}, [still(1, 1.0)], NUMBERS, coins)

    @pytest.mark.parametrize("stretch", [0, 1, 17, 256])
    def test_every_block_has_the_noise_that_it_says(self, coins: Coins, stretch: int) -> None:
        """Sums of squares over sigma^2 are chi-squared; by chance one fails once in 1 / ALARM."""
        blocks = [noised(20_000, stretch), noised(5_000, 3, name="holdout")]
        parts = {one.block.name: {"w": np.zeros(one.block.length)} for one in blocks}
        made = words(parts, blocks, NUMBERS, coins).view(np.int32).astype(np.float64)
        start = 0
        for one in blocks:
            part = made[start : start + one.block.length] / one.block.sigma
            start += one.block.length
            low, high = chi2.ppf([ALARM / 2, 1 - ALARM / 2], one.block.length)
            assert low < float(np.square(part).sum()) < high
            assert abs(part.mean()) < 5.4 / math.sqrt(len(part))
        assert len(set(made[:5000].tolist()) & set(made[20_000:].tolist())) < 4000  # not the same

    def test_noise_is_new_each_time(self, coins: Coins) -> None:
        one, zeros = noised(1000, 5), {"update": {"w": np.zeros(1000)}}
        first, second = (words(zeros, [one], NUMBERS, coins).view(np.int32) for _ in range(2))
        difference = (first.astype(np.float64) - second) / (math.sqrt(2) * one.block.sigma)
        low, high = chi2.ppf([ALARM / 2, 1 - ALARM / 2], 1000)
        assert low < float(np.square(difference).sum()) < high

    def test_what_is_not_noised_says_so(self, coins: Coins) -> None:
        """A stretch, not the signed sigma, makes the noise: `placed` gives both from one grid."""
        quiet = still(1000, 1.0)
        made = words({"update": {"w": np.ones(1000)}}, [quiet], NUMBERS, coins)
        assert quiet.block.sigma == 0
        assert set(made.tolist()) == {1}

    @given(st.integers(1, 40), st.floats(0.1, 1e6), st.integers(0, 2**32 - 1))
    def test_neighbours_with_equal_coins_are_as_near_as_is_priced(
        self, length: int, scale: float, seed: int
    ) -> None:
        """scale C + sqrt(d), deterministically; the noise is the same and cancels."""
        draws = np.random.default_rng(seed)
        one = draws.normal(0, 3, length)
        moved = draws.normal(0, 1, length)
        moved /= max(1.0, float(np.linalg.norm(moved)))  # C = 1
        placing = Placed(block(length, scale, discrete.sigma(2)), 2)
        made = [
            words({"update": {"w": values}}, [placing], NUMBERS, Coins(bytes(32)))
            for values in (one, one + moved)
        ]
        apart = np.linalg.norm((made[0] - made[1]).view(np.int32).astype(np.float64))
        assert apart <= (1 + 2.0**-22) * (scale + math.sqrt(length))


class TestReals:
    @given(
        st.lists(st.floats(-7, 7, width=32), min_size=1, max_size=12),
        st.integers(2, 6),
        st.floats(1, 1e6),
    )
    def test_a_sum_is_within_a_step_a_site(
        self, values: list[float], sites: int, scale: float
    ) -> None:
        one, parts = still(len(values), scale), {"update": {"w": np.array(values)}}
        keys = [bytes([site]) * 32 for site in range(sites)]
        made = [words(parts, [one], NUMBERS, Coins(key)) for key in keys]
        found = reals(sum(made[1:], made[0]), [one])["update"]
        assert found.dtype == np.float64
        assert np.abs(found - sites * np.array(values)).max() <= sites / scale * (1 + 1e-9)

    def test_by_hand(self) -> None:
        total = np.array([6, 2**32 - 8, 5], dtype="<u4")
        found = reals(total, [still(2, 4.0, "a"), still(1, 0.5, "b")])
        assert {name: part.tolist() for name, part in found.items()} == {
            "a": [1.5, -2.0], "b": [10.0],
        }  # fmt: skip


class TestFlat:
    @given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5))
    def test_there_and_back(self, shapes: list[tuple[int, int]]) -> None:
        draws = np.random.default_rng(0)
        arrays = {f"{k % 3}-{k}": draws.normal(size=shape) for k, shape in enumerate(shapes)}
        back = unflat(flat(arrays), arrays)
        assert back.keys() == arrays.keys()
        assert all(np.array_equal(back[name], arrays[name]) for name in arrays)

    def test_the_order_is_that_of_names_however_they_come(self) -> None:
        one = {"b": np.array([2.0]), "a": np.array([1.0])}
        assert flat(one).tolist() == [1.0, 2.0]
        assert unflat(np.array([1.0, 2.0]), one)["b"].tolist() == [2.0]


def test_rounding_by_hand(price: Callable[..., Plan]) -> None:
    """d = 4, scale 8, C = 1: 8 steps become 8 + 2 at most."""
    release = Release("update", 4, 1.0, 1.0, 1.0, 64.0)
    expected = (1 + 2.0**-22) * 1.25
    assert rounding(release, block(4, 8.0), price("central", **SOON)) == expected
    # Shared out, it is what the grid's noise is of the accounted: two sites' of 10 steps, over 8.
    shared = rounding(release, block(4, 8.0, 10.0), price("distributed", **SOON))
    assert shared == pytest.approx(10 * math.sqrt(2) / 8)


def describing(found: Plan, records: int, length: int = 1000, peak: float = 1.0) -> Release:
    """The one block of a round of statistics whose sensitivity is 2."""
    sizes = replace(SIZES, records=records, statistics=(length, 2.0), peak=peak)
    [release] = releases(
        sizes, found, at_sites=False, training=False, evaluating=False, describing=True
    )
    return release


class TestStatistics:
    """Counts of records, which are many sensitivities large."""

    def test_is_a_block_by_itself_of_all_records(self, price: Callable[..., Plan]) -> None:
        found = replace(price("distributed", **SOON), statistics_noise=3.0)
        release = describing(found, 1600, peak=0.5)
        assert (release.name, release.length, release.sensitivity) == ("statistics", 1000, 2.0)
        assert (release.noise_multiplier, release.sampling_rate) == (3.0, 1.0)
        # Of four sites each may have all the records; their noise is within 20 deviations.
        assert release.bound == 1600 * 0.5 + 20 * 3.0 * 2.0
        assert describing(found, 10).bound == 64 + 120.0

    def test_of_many_sites_each_may_have_four_times_the_mean(
        self, price: Callable[..., Plan]
    ) -> None:
        found = replace(
            price("central", **SOON), numbers=Numbers(10, 6, 9, 1), statistics_noise=0.0
        )
        assert describing(found, 100_000).bound == 40_000.0

    @pytest.mark.parametrize("noise", [0.3, 1.0, 4.0, 20.0])
    @pytest.mark.parametrize("records", [100, 1_000_000, 100_000_000])
    @pytest.mark.parametrize("mechanism", ["distributed", "central", "none"])
    def test_four_times_the_mean_fits(
        self, price: Callable[..., Plan], coins: Coins, mechanism: str, records: int, noise: float
    ) -> None:
        """Each site's word has room for it, and for its own noise."""
        numbers = Numbers(10, 6, 9, 1)
        found = replace(price(mechanism, **SOON), numbers=numbers, statistics_noise=noise)
        release = describing(found, records, length=50)
        [one] = placed([release], found)
        assert one.block.scale * release.bound <= (2**31 - 1) / 10
        count = 0.995 * 4 * records / 10
        made = words({"statistics": {"a": np.full(50, count)}}, [one], numbers, coins)
        sent = reals(made, [one])["statistics"]
        share = one.block.sigma / one.block.scale
        assert sent == pytest.approx(np.full(50, count), abs=6 * share + 2 / one.block.scale)
        assert share <= max(0.01 * count, 3 * noise)  # the room is not bought with the answers

    @pytest.mark.parametrize("records", [100, 1_000_000, 100_000_000])
    def test_its_noise_is_told_as_it_is(
        self, price: Callable[..., Plan], coins: Coins, records: int
    ) -> None:
        """The variance of the sum of ten, by chi-squared bounds of 1e-7 on fixed coins."""
        numbers = Numbers(10, 6, 9, 1)
        found = replace(price("distributed", **SOON), numbers=numbers, statistics_noise=0.5)
        release = describing(found, records, length=4000)
        [one] = placed([release], found)
        zeros = {"statistics": {"a": np.zeros(4000)}}
        made = [words(zeros, [one], numbers, coins) for _ in range(10)]
        summed = np.add.reduce(np.stack(made), axis=0, dtype=np.uint32)
        total = reals(summed, [one])["statistics"]
        told = rounding(release, one.block, found) * 0.5 * 2.0 * math.sqrt(10 / 8)
        low, high = chi2.ppf([ALARM / 2, 1 - ALARM / 2], 4000)
        assert low < float(np.square(total / told).sum()) < high
