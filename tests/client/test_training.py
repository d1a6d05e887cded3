"""One round's work: the right sum over the right records, with noise where the plan says."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedveil.client import training
from fedveil.client.site import Side
from fedveil.client.training import clipped_update, gradient_sum, train
from fedveil.config import RunConfig
from fedveil.data_prep import run_schema
from fedveil.models import Batch, Family, family
from fedveil.models.layers import initialise
from fedveil.models.state import Arrays, to_arrays
from fedveil.privacy.clipping import CLIPPING_SLACK
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import Plan, plan

MakeConfig = Callable[..., RunConfig]


class Everyone(Coins):
    """Coins that fall for every record, and that note what they were asked."""

    def __init__(self) -> None:
        super().__init__(bytes(range(32)))
        self.asked: list[tuple[int, float]] = []

    def poisson_sample(self, count: int, rate: float) -> np.ndarray:
        self.asked.append((count, rate))
        return np.arange(count)


def batch(count: int) -> Side:
    """So many images; the first ones are the same whatever the count."""
    rng = np.random.default_rng(5)
    x = rng.random((count, 1, 8, 8), dtype=np.float32)
    return Side(Batch(torch.from_numpy(x), torch.arange(count) % 10))


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    """Without a mechanism, so that nothing has to be priced."""
    return make_config(privacy={"mechanism": "none"}).resolved()


@pytest.fixture
def averaged(make_config: MakeConfig) -> RunConfig:
    """Three local steps."""
    return make_config(
        privacy={"mechanism": "none"},
        aggregation={"strategy": "fedavg"},
        training={"local_steps": 3, "learning_rate": 0.01},
    ).resolved()


def noisy(config: RunConfig, mechanism: str) -> Plan:
    """A plan with noise of standard deviation 0.75 * 2, unpriced."""
    return replace(
        plan(config),
        mechanism=mechanism,  # type: ignore[arg-type]
        clipping_norm=2.0,
        noise_multiplier=0.75,
    )


def module_for(config: RunConfig) -> nn.Module:
    """A model with public initial weights."""
    module = family("vae").build(config.model, run_schema(config))
    initialise(module, torch.Generator().manual_seed(0))
    return module


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """All numbers in one vector."""
    return np.concatenate([array.ravel() for array in arrays.values()])


def use(monkeypatch: pytest.MonkeyPatch, kind: Family) -> None:
    """Lets a site train another kind of generator."""
    monkeypatch.setattr(training, "family", lambda _: kind)


class TestGradientSum:
    def test_without_records_it_is_zero_under_central(self, config: RunConfig) -> None:
        """Un-noised: had the site added noise, this would not be zero."""
        total = gradient_sum(
            family("vae"),
            module_for(config),
            batch(0),
            config,
            noisy(config, "central"),
            Everyone(),
        )
        assert not flat(total).any()

    def test_under_local_it_carries_the_plans_noise(self, config: RunConfig) -> None:
        total = gradient_sum(
            family("vae"), module_for(config), batch(0), config, noisy(config, "local"), Everyone()
        )
        noise = flat(total)
        assert len(noise) > 500
        assert noise.std() == pytest.approx(1.5, rel=0.1)
        assert abs(noise.mean()) < 4 * 1.5 / math.sqrt(len(noise))

    @pytest.mark.parametrize("mechanism", ["central", "local", "none"])
    @pytest.mark.parametrize("count", [0, 1, 20])
    def test_sums_are_float64(self, config: RunConfig, mechanism: str, count: int) -> None:
        module = module_for(config)
        fixed = noisy(config, mechanism)
        total = gradient_sum(family("vae"), module, batch(count), config, fixed, Everyone())
        assert {name: array.shape for name, array in total.items()} == {
            name: tuple(parameter.shape) for name, parameter in module.named_parameters()
        }
        assert all(array.dtype == np.float64 for array in total.values())

    def test_they_were_never_rounded_to_float32(self, config: RunConfig) -> None:
        """Clipped in float64: most factors, and so most sums, are no float32 numbers."""
        fixed = replace(noisy(config, "central"), clipping_norm=0.01)
        total = flat(
            gradient_sum(family("vae"), module_for(config), batch(20), config, fixed, Everyone())
        )
        assert (total.astype(np.float32)[total != 0] != total[total != 0]).mean() > 0.9

    @pytest.mark.parametrize("count", [0, 20])
    def test_under_local_it_is_on_the_lattice(self, config: RunConfig, count: int) -> None:
        """Noise of scale 1.5: multiples of 2^-20, and of no coarser power of two."""
        fixed = noisy(config, "local")
        sent = flat(
            gradient_sum(family("vae"), module_for(config), batch(count), config, fixed, Everyone())
        )
        steps = sent * 2.0**20
        assert (steps == np.rint(steps)).all()
        assert 0.4 < (steps % 2 == 1).mean() < 0.6
        # Without noise the sums of the same records are off it: it is the release that is rounded.
        plain = flat(
            gradient_sum(
                family("vae"),
                module_for(config),
                batch(20),
                config,
                noisy(config, "central"),
                Everyone(),
            )
        )
        assert (plain * 2.0**20 != np.rint(plain * 2.0**20)).mean() > 0.5

    def test_noise_is_added_to_the_sum(self, config: RunConfig) -> None:
        """With coins of one key the two mechanisms differ by noise of the plan's scale."""
        plain, loud = (
            flat(
                gradient_sum(
                    family("vae"),
                    module_for(config),
                    batch(20),
                    config,
                    noisy(config, mechanism),
                    Everyone(),
                )
            )
            for mechanism in ("central", "local")
        )
        assert (loud - plain).std() == pytest.approx(1.5, rel=0.1)

    @pytest.mark.parametrize("count", [1, 5, 70])
    def test_a_record_adds_at_most_the_clipping_norm(self, config: RunConfig, count: int) -> None:
        fixed = replace(noisy(config, "central"), clipping_norm=0.01)
        smaller, larger = (
            flat(
                gradient_sum(family("vae"), module_for(config), batch(n), config, fixed, Everyone())
            )
            for n in (count - 1, count)
        )
        moved = np.linalg.norm(larger - smaller)
        # The gradients of an untrained model are far above 0.01, so that clipping binds.
        assert 0.0099 < moved <= 0.01

    def test_the_sample_is_of_all_records_at_the_plans_rate(self, config: RunConfig) -> None:
        coins = Everyone()
        fixed = noisy(config, "central")
        gradient_sum(family("vae"), module_for(config), batch(30), config, fixed, coins)
        assert coins.asked == [(30, fixed.sampling_rate)]

    def test_only_sampled_records_count(self, config: RunConfig) -> None:
        class Some(Everyone):
            def poisson_sample(self, count: int, rate: float) -> np.ndarray:
                del count, rate
                return np.array([1, 4])

        fixed = noisy(config, "central")
        whole = batch(6)
        chosen = Side(Batch(whole.batch.x[[1, 4]], whole.batch.y[[1, 4]]))
        sampled = gradient_sum(family("vae"), module_for(config), whole, config, fixed, Some())
        direct = gradient_sum(family("vae"), module_for(config), chosen, config, fixed, Everyone())
        assert flat(sampled).tobytes() == flat(direct).tobytes()

    def test_the_coins_own_sample_is_within_the_rate(self, coins: Coins, config: RunConfig) -> None:
        """Of 400 records at rate 0.25 about 100 are in: their clipped norms bound the sum."""
        fixed = replace(noisy(config, "central"), sampling_rate=0.25, clipping_norm=1e-3)
        sizes = []

        def note(module: nn.Module, part: Batch, generator: torch.Generator) -> torch.Tensor:
            sizes.append(int((part.x.flatten(1).sum(dim=1) > 0).sum()))
            return family("vae").example_losses(module, part, generator)

        kind = replace(family("vae"), example_losses=note)
        total = gradient_sum(kind, module_for(config), batch(400), config, fixed, coins)
        assert sum(sizes) == pytest.approx(100, abs=30)
        assert np.linalg.norm(flat(total)) <= sum(sizes) * 1e-3

    def test_two_steps_draw_different_samples(self, coins: Coins, config: RunConfig) -> None:
        fixed = noisy(config, "central")
        first, second = (
            gradient_sum(family("vae"), module_for(config), batch(50), config, fixed, coins)
            for _ in range(2)
        )
        assert not np.array_equal(flat(first), flat(second))


class TestTrain:
    def test_adam_at_the_server_gets_a_gradient_sum(self, config: RunConfig) -> None:
        module = module_for(config)
        before = to_arrays(module)
        sent = train(module, batch(8), config, plan(config), Everyone())
        assert sent.keys() == before.keys()
        assert {n: a.shape for n, a in sent.items()} == {n: a.shape for n, a in before.items()}
        assert all(a.dtype == np.float64 for a in sent.values())
        # The site took no step of its own.
        assert flat(to_arrays(module)).tobytes() == flat(before).tobytes()

    def test_fedavg_sends_how_the_model_changed(self, averaged: RunConfig) -> None:
        module = module_for(averaged)
        before = to_arrays(module)
        sent = train(module, batch(8), averaged, plan(averaged), Everyone())
        after = to_arrays(module)
        assert sent.keys() == before.keys()
        assert all(array.dtype == np.float32 for array in sent.values())
        for name, array in sent.items():
            assert array.any(), name
            assert array.tobytes() == (after[name] - before[name]).tobytes(), name

    @pytest.mark.parametrize("strategy", ["adam", "sgd"])
    def test_what_is_summed_at_the_server_is_the_gradient_sum(
        self, strategy: str, make_config: MakeConfig
    ) -> None:
        config = make_config(
            privacy={"mechanism": "none"}, aggregation={"strategy": strategy}
        ).resolved()
        fixed = noisy(config, "central")
        sent = train(module_for(config), batch(8), config, fixed, Everyone())
        total = gradient_sum(family("vae"), module_for(config), batch(8), config, fixed, Everyone())
        assert all(array.dtype == np.float64 for array in sent.values())
        assert flat(sent).tobytes() == flat(total).tobytes()

    def test_fedavg_takes_as_many_steps_as_are_priced(self, averaged: RunConfig) -> None:
        coins = Everyone()
        train(module_for(averaged), batch(8), averaged, plan(averaged), coins)
        assert len(coins.asked) == 3

    def test_fedavg_without_records_or_noise_stays(self, averaged: RunConfig) -> None:
        module = module_for(averaged)
        before = to_arrays(module)
        sent = train(module, batch(0), averaged, plan(averaged), Everyone())
        assert sent.keys() == before.keys()
        assert not flat(sent).any()
        assert flat(to_arrays(module)).tobytes() == flat(before).tobytes()

    def test_the_first_local_step_is_adams(self, make_config: MakeConfig) -> None:
        """Adam's first step is the learning rate against the sign of the gradient."""
        config = make_config(
            privacy={"mechanism": "none"},
            aggregation={"strategy": "fedavg"},
            training={"learning_rate": 0.01},
        ).resolved()
        module = module_for(config)
        gradient = flat(
            gradient_sum(family("vae"), module, batch(8), config, plan(config), Everyone())
        )
        change = flat(train(module, batch(8), config, plan(config), Everyone()))
        clear = np.abs(gradient) > 0.01
        assert clear.sum() > 100
        assert change[clear] == pytest.approx(-0.01 * np.sign(gradient[clear]), rel=1e-2)

    def test_fedavg_divides_by_the_public_batch(
        self, averaged: RunConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One plain gradient-descent step of rate 1 is minus the sum over the expected batch."""

        def descend(parameters: object, lr: float) -> torch.optim.SGD:
            return torch.optim.SGD(parameters, lr=1.0)  # type: ignore[arg-type]

        monkeypatch.setattr(torch.optim, "Adam", descend)
        once = replace(plan(averaged), releases_per_round=1, expected_batch=1000.0)
        for count in (3, 30):
            module = module_for(averaged)
            total = flat(
                gradient_sum(family("vae"), module, batch(count), averaged, once, Everyone())
            )
            change = flat(train(module, batch(count), averaged, once, Everyone()))
            assert change == pytest.approx(-total / 1000.0, abs=1e-6)


class TestFedProx:
    """Li et al. 2020, equation 2: a step's gradient has mu (w - w0) in it."""

    def after(
        self, proximal: float, make_config: MakeConfig, patch: pytest.MonkeyPatch
    ) -> list[np.ndarray]:
        """The start, and where two plain steps of rate 1 lead, with their noised gradient sums."""
        config = make_config(
            privacy={"mechanism": "none"},
            aggregation={"strategy": "fedprox", "proximal": proximal},
            training={"local_steps": 2},
        ).resolved()

        def descend(parameters: object, lr: float) -> torch.optim.SGD:
            return torch.optim.SGD(parameters, lr=1.0)  # type: ignore[arg-type]

        seen: list[Arrays] = []

        def fixed(_: Family, module: nn.Module, *rest: object) -> Arrays:
            seen.append(to_arrays(module))
            return {name: np.ones(a.shape) for name, a in to_arrays(module).items()}

        patch.setattr(torch.optim, "Adam", descend)
        patch.setattr(training, "gradient_sum", fixed)
        module, priced = module_for(config), replace(plan(config), expected_batch=4.0)
        sent = train(module, batch(8), config, priced, Everyone())
        start, second = (flat(arrays) for arrays in seen)
        return [start, second, start + flat(sent)]

    def test_two_steps_by_hand(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Every gradient is 1/4. Step one starts at w0, so nothing pulls: w0 - 1/4. Step two is
        # pulled back by half of that way: w0 - 1/4 - (1/4 - 1/8) = w0 - 3/8.
        start, first, second = self.after(0.5, make_config, monkeypatch)
        assert first - start == pytest.approx(-0.25, abs=1e-6)
        assert second - start == pytest.approx(-0.375, abs=1e-6)

    def test_the_stronger_it_is_the_nearer_the_site_stays(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start, _, end = self.after(1.0, make_config, monkeypatch)
        assert end - start == pytest.approx(-0.25, abs=1e-6)


class TestFrozen:
    """A family may train some of its parameters only."""

    @staticmethod
    def partly(module: nn.Module) -> list[str]:
        return [name for name, _ in module.named_parameters() if name.startswith("posterior.")]

    @pytest.mark.parametrize("strategy", ["adam", "fedavg"])
    @pytest.mark.parametrize("mechanism", ["none", "noisy"])
    def test_only_the_trainable_ones_move_and_travel(
        self,
        strategy: str,
        mechanism: str,
        make_config: MakeConfig,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        use(monkeypatch, replace(family("vae"), trainable=self.partly))
        config = make_config(
            privacy={"mechanism": "none"}, aggregation={"strategy": strategy}
        ).resolved()
        module = module_for(config)
        before = to_arrays(module)
        where = "central" if strategy == "adam" else "local"
        priced = plan(config) if mechanism == "none" else noisy(config, where)
        sent = train(module, batch(8), config, priced, Everyone())
        assert sent.keys() == {"posterior.weight", "posterior.bias"}
        after = to_arrays(module)
        for name in before.keys() - sent.keys():
            assert after[name].tobytes() == before[name].tobytes(), name
        assert all(array.any() for array in sent.values())
        expected = np.float64 if strategy == "adam" else np.float32
        assert all(array.dtype == expected for array in sent.values())


class TestPersons:
    """What is hidden is a person: sampled whole, clipped whole."""

    STEPS, PERSONS, RATE = 400, 60, 0.3

    @pytest.fixture
    def by_person(self, config: RunConfig) -> Plan:
        return replace(
            noisy(config, "central"), unit="person", sampling_rate=self.RATE, clipping_norm=1.0
        )

    @staticmethod
    def side(sizes: list[int]) -> Side:
        """A record is one where its place is: the sum of such records says who was in."""
        owners = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        mixed = torch.randperm(len(owners), generator=torch.Generator().manual_seed(2))
        return Side(Batch(torch.eye(len(owners)), torch.zeros(len(owners)).long()), owners[mixed])

    @staticmethod
    def summed(side: Side, config: RunConfig, fixed: Plan, coins: Coins) -> np.ndarray:
        """The released sum of a loss whose gradient is the record itself."""

        def losses(module: nn.Module, part: Batch, generator: torch.Generator) -> torch.Tensor:
            return torch.as_tensor(module(part.x)).squeeze(1)

        kind = replace(family("vae"), example_losses=losses)
        module = nn.Linear(side.batch.x.shape[1], 1, bias=False)
        return flat(gradient_sum(kind, module, side, config, fixed, coins))

    def members(self, side: Side, config: RunConfig, fixed: Plan, steps: int) -> np.ndarray:
        """[steps, persons] who was in; fails where some of a person's records were and some not."""
        coins, found = Coins(bytes(range(32))), []
        assert side.persons is not None
        owners = side.persons.numpy()
        for _ in range(steps):
            there = self.summed(side, config, fixed, coins) != 0
            counts = np.bincount(owners, there)
            sizes = np.bincount(owners)
            assert np.isin(counts / sizes, [0.0, 1.0]).all()
            found.append(counts > 0)
        return np.stack(found)

    def test_persons_are_sampled_whole_and_at_the_plans_rate(
        self, config: RunConfig, by_person: Plan
    ) -> None:
        """5.3 standard errors either way: a false-alarm rate of 1e-7 each, on fixed coins."""
        sizes = [1, 2, 9] * (self.PERSONS // 3)
        members = self.members(self.side(sizes), config, by_person, self.STEPS)
        for chosen in (slice(0, None, 3), slice(1, None, 3), slice(2, None, 3)):
            part = members[:, chosen]
            spread = math.sqrt(self.RATE * (1 - self.RATE) / part.size)
            assert abs(part.mean() - self.RATE) < 5.3 * spread
        # Poisson: the size of a sample varies as independent coins make it, and never by a quota.
        sizes_of = members.sum(axis=1)
        expected = self.PERSONS * self.RATE * (1 - self.RATE)
        assert abs(sizes_of.var() / expected - 1) < 5.3 * math.sqrt(2 / self.STEPS)

    def test_the_sample_is_of_persons(self, config: RunConfig, by_person: Plan) -> None:
        coins = Everyone()
        self.summed(self.side([1, 2, 9]), config, by_person, coins)
        assert coins.asked == [(3, self.RATE)]

    def test_without_records_it_is_of_nobody(self, config: RunConfig, by_person: Plan) -> None:
        coins, nobody = Everyone(), torch.zeros(0, dtype=torch.int64)
        sides = Side(Batch(torch.zeros(0, 4), nobody), nobody)
        assert not self.summed(sides, config, by_person, coins).any()
        assert coins.asked == [(0, self.RATE)]

    @pytest.mark.parametrize("records", [1, 3, 200])
    def test_a_person_adds_at_most_the_clipping_norm(
        self, config: RunConfig, by_person: Plan, records: int
    ) -> None:
        """In all directions alike, where each record by itself would add as much."""
        side = self.side([5, records])
        assert side.persons is not None
        rows = torch.nonzero(side.persons == 0).flatten()
        whole = self.summed(side, config, by_person, Everyone())
        rest = self.summed(
            Side(Batch(side.batch.x[rows], side.batch.y[rows]), side.persons[rows]),
            config, by_person, Everyone(),
        )  # fmt: skip
        assert np.linalg.norm(whole - rest) == pytest.approx(1 / 1.001, rel=1e-6)

    def test_where_records_are_hidden_each_adds_as_much(
        self, config: RunConfig, by_person: Plan
    ) -> None:
        side, coins = self.side([5, 20]), Everyone()
        whole = self.summed(side, config, replace(by_person, unit="record"), coins)
        assert np.linalg.norm(whole) == pytest.approx(5 / 1.001, rel=1e-6)
        assert coins.asked == [(25, self.RATE)]

    def test_records_of_nobody_are_refused(self, config: RunConfig, by_person: Plan) -> None:
        with pytest.raises(ValueError, match="not every record has one"):
            train(module_for(config), batch(8), config, by_person, Everyone())


class TestUnderSite:
    """A site's steps are its own affair: only the update that comes of them is bounded."""

    @pytest.fixture
    def config(self, make_config: MakeConfig) -> RunConfig:
        return make_config(
            privacy={"mechanism": "site", "sampling_rate": 1.0},
            aggregation={"encryption": "none"},
            training={"local_steps": 3, "learning_rate": 0.01},
        ).resolved()

    def test_as_many_steps_as_it_may_take_though_one_release_is_priced(
        self, config: RunConfig
    ) -> None:
        priced, coins = plan(config), Everyone()
        assert priced.releases_per_round == 1
        train(module_for(config), batch(8), config, priced, coins)
        assert len(coins.asked) == 3

    def test_they_are_neither_clipped_nor_noised(
        self, config: RunConfig, make_config: MakeConfig
    ) -> None:
        """To the bit what a run without a mechanism trains, whatever the plan's noise and bound."""
        free = make_config(
            privacy={"mechanism": "none", "sampling_rate": 1.0},
            aggregation={"strategy": "fedavg"},
            training={"local_steps": 3, "learning_rate": 0.01},
        ).resolved()
        expected = train(module_for(free), batch(8), free, plan(free), Everyone())
        for norm in (1e-6, 1.0):
            priced = replace(plan(config), clipping_norm=norm, noise_multiplier=9.0)
            sent = train(module_for(config), batch(8), config, priced, Everyone())
            assert all(array.dtype == np.float32 for array in sent.values())
            assert flat(sent).tobytes() == flat(expected).tobytes()


class TestClippedUpdate:
    def test_what_is_within_the_bound_stays_as_it_is(self) -> None:
        change = {"a": np.array([3.0], dtype=np.float32), "b": np.array([[4.0]], dtype=np.float32)}
        update, within = clipped_update(change, 10.0)
        assert within
        assert (update["a"].tolist(), update["b"].tolist()) == ([3.0], [[4.0]])
        assert all(array.dtype == np.float64 for array in update.values())

    def test_what_is_beyond_is_scaled_over_all_parameters_together(self) -> None:
        # The norm of (3, 4) is 5, and the bound half of it, but for the rounding of sums.
        update, within = clipped_update({"a": np.array([3.0]), "b": np.array([4.0])}, 2.5)
        assert not within
        assert update["a"][0] == pytest.approx(1.5 / CLIPPING_SLACK)
        assert update["b"][0] == pytest.approx(2.0 / CLIPPING_SLACK)
        assert np.linalg.norm(flat(update)) <= 2.5

    def test_nothing_is_within_any_bound(self) -> None:
        update, within = clipped_update({"a": np.zeros(3)}, 1e-6)
        assert within
        assert not update["a"].any()

    @pytest.mark.parametrize("evil", [math.nan, math.inf, -math.inf])
    def test_what_is_not_finite_counts_as_zero(self, evil: float) -> None:
        update, within = clipped_update({"a": np.array([1.0, evil]), "b": np.ones(2)}, 1.0)
        assert not within
        assert not flat(update).any()

    @pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 3e38])
    @pytest.mark.parametrize("norm", [1e-6, 0.3, 1e6])
    def test_no_update_is_beyond_the_bound(self, coins: Coins, size: float, norm: float) -> None:
        for _ in range(20):
            change = {"a": (size * coins.gaussian((50,), 0.3)).astype(np.float32)}
            update, within = clipped_update(change, norm)
            assert np.linalg.norm(update["a"]) <= norm
            assert within == np.array_equal(update["a"], change["a"].astype(np.float64))
