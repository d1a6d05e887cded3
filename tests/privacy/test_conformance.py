"""What runs against what is claimed: residuals, realised sampling, realised releases.

`shared/auditing.md`, Conformance. Everything here goes through the code of a site's round
(`client.training`, `client.evaluation`) and of the server's (`server.rounds.advance`,
`server.evaluation.evaluated`), or through a whole simulation.
Each statistical bound has a false-alarm rate of 1e-7 over the choice of the coins, which are fixed.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import fedveil
from fedveil.client.evaluation import holdout_sums, training_sums
from fedveil.client.site import Budget, Side, Site
from fedveil.client.training import gradient_sum, train
from fedveil.config import RunConfig
from fedveil.data_prep.schema import ImageSchema, parse_schema
from fedveil.models import Batch, Family, family, metrics
from fedveil.models.layers import initialise
from fedveil.models.state import read_file, to_arrays
from fedveil.privacy.accounting import Releases, pld_epsilon
from fedveil.privacy.clipping import CLIPPING_SLACK, clipped_sum
from fedveil.privacy.ledger import Ledger, verify
from fedveil.privacy.limits import Lifetime
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import Plan, plan
from fedveil.server.aggregation import STRATEGIES, ServerState
from fedveil.server.evaluation import NOT_EVALUATED, evaluated, expected_sums
from fedveil.server.replies import Collected
from fedveil.server.rounds import advance
from fedveil.server.simulation.sites import simulated_site
from fedveil.wire import NO_LEDGER, Update

MakeConfig = Callable[..., RunConfig]

KEY, OTHER_KEY = bytes(range(32)), bytes(range(32, 64))
ALARM = 1e-7
DIGITS = ImageSchema(height=8, width=8, classes=tuple("0123456789"))
FAST = {"epsilon": 2.0, "sampling_rate": 1.0}  # priced in a moment


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def budget(tmp_path_factory: pytest.TempPathFactory) -> Budget:
    """A ledger that nothing is debited from."""
    path = tmp_path_factory.mktemp("ledger") / "site.sqlite"
    Ledger.create(path, "site")
    return Budget(Ledger.open(path), "data", Lifetime(None, 0.5))


class Recorder(Coins):
    """Coins that note what is drawn of them."""

    def __init__(self, key: bytes) -> None:
        super().__init__(key)
        self.samples: list[np.ndarray] = []
        self.rates: list[float] = []
        self.noises: list[tuple[tuple[int, ...], float]] = []

    def poisson_sample(self, count: int, rate: float) -> np.ndarray:
        rows = super().poisson_sample(count, rate)
        self.samples.append(rows)
        self.rates.append(rate)
        return rows

    def gaussian(self, shape: tuple[int, ...], scale: float) -> np.ndarray:
        self.noises.append((shape, scale))
        return super().gaussian(shape, scale)


def attendance_losses(module: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
    """[B] losses whose gradient is the record itself: a one-hot row counts who was in."""
    return torch.as_tensor(module(batch.x)).squeeze(1)


def no_samples(
    module: nn.Module, n: int, generator: torch.Generator, labels: Tensor | None = None
) -> Batch:
    raise NotImplementedError


ATTENDANCE = Family(
    build=lambda _options, _schema: nn.Linear(8, 1, bias=False),
    example_losses=attendance_losses,
    sample=no_samples,
    scores=lambda _module, batch: batch.x.sum(1),
    score_bounds=lambda _module: (0.0, 1.0),
)


def digits_records(count: int) -> Batch:
    generator = torch.Generator().manual_seed(5)
    return Batch(
        torch.rand(count, 1, 8, 8, generator=generator),
        torch.randint(0, 10, (count,), generator=generator),
    )


def digits_vae(config: RunConfig) -> nn.Module:
    module = family("vae").build(config.model, DIGITS)
    initialise(module, torch.Generator().manual_seed(0))
    return module


def flat(arrays: dict[str, np.ndarray]) -> np.ndarray:
    joined: np.ndarray = np.concatenate([a.astype(np.float64).ravel() for a in arrays.values()])
    return joined


def has_scale(residual: np.ndarray, scale: float) -> bool:
    """Whether it may be noise of mean 0 and that scale: z and chi-squared, 1e-7 together."""
    unit = residual.astype(np.float64).ravel() / scale
    low, high = stats.chi2.ppf([ALARM / 4, 1 - ALARM / 4], unit.size)
    centred = abs(unit.sum()) < stats.norm.isf(ALARM / 4) * math.sqrt(unit.size)
    return bool(centred and low < float(np.square(unit).sum()) < high)


def poisson_fault(members: np.ndarray, rate: float) -> str | None:
    """What is wrong with the attendance [steps, records], if anything, as Poisson sampling.

    Four two-sided bounds, 1e-7 each: the rate (exact binomial), how much the steps' sizes and how
    much the records' counts vary (chi-squared), and how often a record is in two steps on end.
    """
    steps, records = members.shape
    half = [ALARM / 2, 1 - ALARM / 2]
    low, high = stats.binom.ppf(half, members.size, rate)
    if not low <= members.sum() <= high:
        return "rate"
    for axis, groups, each in ((1, steps, records), (0, records, steps)):
        spread = ((members.sum(axis) - each * rate) ** 2).sum() / (each * rate * (1 - rate))
        low, high = stats.chi2.ppf(half, groups)
        if not low <= spread <= high:
            return "sizes" if axis else "counts"
    again = (members[1:] & members[:-1]).sum()
    low, high = stats.binom.ppf(half, (steps - 1) * records, rate**2)
    # A pair shares its middle step with the next pair: the variance is up to 1 + 2 rate as large.
    middle = (steps - 1) * records * rate**2
    return None if (low - middle) * 1.5 <= again - middle <= (high - middle) * 1.5 else "repeats"


class TestTheChecksThemselves:
    def test_the_check_of_scale_rejects_two_thirds_and_three_halves(self) -> None:
        noise = Coins(KEY).gaussian((1000,), 2.0)
        assert has_scale(noise, 2.0)
        assert not has_scale(noise * np.float32(2 / 3), 2.0)
        assert not has_scale(noise * np.float32(3 / 2), 2.0)
        assert not has_scale(np.zeros(1000), 2.0)

    def test_the_check_of_sampling_accepts_poisson_and_rejects_all_else(self) -> None:
        steps, records, rate = 200, 400, 0.1
        uniform = Coins(KEY).uniform(steps * records).reshape(steps, records)
        assert poisson_fault(uniform <= rate, rate) is None
        for wrong in (0.09, 0.11):
            assert poisson_fault(uniform <= wrong, rate) == "rate"
        of_fixed_size = uniform.argsort(axis=1) < records * rate
        assert poisson_fault(of_fixed_size, rate) == "sizes"
        epochs = uniform[::10].argsort(axis=1) // (records // 10)  # each record once in ten steps
        shuffled = np.stack([epoch == part for epoch in epochs for part in range(10)])
        assert poisson_fault(shuffled, rate) in {"sizes", "counts"}
        fixed = np.repeat(uniform[:1] <= rate, steps, axis=0)
        assert poisson_fault(fixed, rate) is not None
        chosen = rate * np.where(np.arange(records) % 2, 1.5, 0.5)
        assert poisson_fault(uniform <= chosen, rate) == "counts"
        repeated = np.repeat((uniform <= rate)[::2], 2, axis=0)
        assert poisson_fault(repeated, rate) is not None


class TestResidualUnderCentral:
    @pytest.fixture
    def config(self, make_config: MakeConfig) -> RunConfig:
        return make_config(
            training={"learning_rate": 1.0, "ema": 0.0},
            privacy={**FAST, "clipping_norm": 0.5},
            aggregation={"strategy": "sgd"},
        )

    def residual(self, config: RunConfig, priced: Plan) -> np.ndarray:
        """The noise, from the model before and after a round: old - new is the mean gradient."""
        module, records = digits_vae(config), digits_records(60)
        state = STRATEGIES["sgd"].init(to_arrays(module))
        coins = Coins(OTHER_KEY)
        sums = tuple(
            gradient_sum(family("vae"), module, part, config, priced, coins)
            for part in (
                Side(Batch(records.x[:40], records.y[:40])),
                Side(Batch(records.x[40:], records.y[40:])),
            )
        )
        after = advance(state, sums, module, config, priced, Coins(KEY))
        step = {n: state.model[n].astype(np.float64) - after.model[n] for n in state.model}
        noise: np.ndarray = flat(step) * priced.expected_batch - flat(sums[0]) - flat(sums[1])
        return noise

    def test_released_sum_less_clipped_sum_is_noise_of_the_priced_scale(
        self, config: RunConfig
    ) -> None:
        priced = plan(config)
        residual = self.residual(config, priced)
        assert residual.size > 1000
        assert has_scale(residual, priced.noise_multiplier * 0.5)

    @pytest.mark.parametrize("wrong", [2 / 3, 3 / 2])
    def test_noise_of_another_scale_is_seen(self, config: RunConfig, wrong: float) -> None:
        priced = plan(config)
        used = replace(priced, noise_multiplier=wrong * priced.noise_multiplier)
        assert not has_scale(self.residual(config, used), priced.noise_multiplier * 0.5)

    def test_every_round_has_noise_of_its_own(self, config: RunConfig) -> None:
        """Two rounds' noise correlates within 5.33 standard errors; equal sums, one stream."""
        priced, coins = plan(config), Coins(KEY)
        module = digits_vae(config)
        state: ServerState = STRATEGIES["sgd"].init(to_arrays(module))
        nothing = {name: np.zeros_like(array) for name, array in state.model.items()}
        steps = []
        for _ in range(3):
            after = advance(state, [nothing], module, config, priced, coins)
            steps.append(flat({n: state.model[n] - after.model[n] for n in state.model}))
            state = after
        correlation = np.corrcoef(np.stack(steps)) - np.eye(3)
        assert np.abs(correlation).max() < 5.33 / math.sqrt(steps[0].size)
        for step in steps:
            assert has_scale(step * priced.expected_batch, priced.noise_multiplier * 0.5)

    def test_the_noise_does_not_shrink_when_sites_drop_out(self, config: RunConfig) -> None:
        priced, module = plan(config), digits_vae(config)
        state = STRATEGIES["sgd"].init(to_arrays(module))
        nothing = {name: np.zeros_like(array) for name, array in state.model.items()}
        models = [
            advance(state, [nothing] * n, module, config, priced, Coins(KEY)).model
            for n in (1, 2, 3)
        ]
        for other in models[1:]:
            assert all(np.array_equal(models[0][n], other[n]) for n in other)


class TestResidualUnderLocal:
    @pytest.fixture
    def config(self, make_config: MakeConfig) -> RunConfig:
        return make_config(privacy={**FAST, "mechanism": "local", "clipping_norm": 2.0})

    def residual(self, config: RunConfig, used: Plan) -> np.ndarray:
        generator = torch.Generator().manual_seed(1)
        module = nn.Linear(4000, 1, bias=False)
        records = Batch(torch.rand(30, 4000, generator=generator), torch.zeros(30).long())
        released = gradient_sum(ATTENDANCE, module, Side(records), config, used, Coins(KEY))
        exact = clipped_sum(module, attendance_losses, records, 2.0, generator)
        noise: np.ndarray = flat(released) - flat({n: g.numpy() for n, g in exact.items()})
        return noise

    def test_what_leaves_the_site_has_noise_of_the_priced_scale(self, config: RunConfig) -> None:
        priced = plan(config)
        assert has_scale(self.residual(config, priced), priced.noise_multiplier * 2.0)

    @pytest.mark.parametrize("wrong", [2 / 3, 3 / 2])
    def test_noise_of_another_scale_is_seen(self, config: RunConfig, wrong: float) -> None:
        priced = plan(config)
        used = replace(priced, noise_multiplier=wrong * priced.noise_multiplier)
        assert not has_scale(self.residual(config, used), priced.noise_multiplier * 2.0)

    def test_a_site_without_records_sends_noise_too(self, config: RunConfig) -> None:
        priced, module = plan(config), nn.Linear(4000, 1, bias=False)
        nobody = Side(Batch(torch.zeros(0, 4000), torch.zeros(0).long()))
        released = gradient_sum(ATTENDANCE, module, nobody, config, priced, Coins(KEY))
        assert has_scale(flat(released), priced.noise_multiplier * 2.0)


class TestResidualOfEvaluation:
    """Sums of figures: what is released less what is exact is noise of the priced scale."""

    EXAM = metrics.prepare(digits_records(200), DIGITS, seed=0)

    @pytest.fixture
    def config(self, make_config: MakeConfig, request: pytest.FixtureRequest) -> RunConfig:
        return make_config(
            privacy={**FAST, "mechanism": request.param, "epsilon_holdout": 1.0},
            evaluation={"training_share": 0.3, "every": 0},
        )

    def residuals(self, config: RunConfig, priced: Plan, sites: int) -> dict[str, np.ndarray]:
        """By account, of many releases of sums over no record at all: nothing but their noise.

        At the site under `local`; under `central` read off the server's noised histograms.
        """
        module, nobody = digits_vae(config), Side(digits_records(0))
        coins = [Coins(bytes([n]) * 32) for n in range(sites)]
        found: dict[str, list[np.ndarray]] = {"holdout": [], "training": []}
        for _ in range(150):
            parts = [
                {
                    "holdout": holdout_sums(
                        module, self.EXAM, nobody, config, DIGITS, priced, coin
                    ),
                    "training": training_sums(module, nobody, config, priced, coin),
                }
                for coin in coins
            ]
            for side, arrays in found.items():
                arrays.append(np.sum([flat(dict(part[side])) for part in parts], axis=0))
        return {side: np.concatenate(arrays) for side, arrays in found.items()}

    @pytest.mark.parametrize("config", ["local"], indirect=True)
    @pytest.mark.parametrize("sites", [1, 3])
    def test_a_site_adds_the_noise_of_either_account(self, config: RunConfig, sites: int) -> None:
        priced = plan(config)
        scales = {
            "holdout": metrics.noise_scale(priced.evaluation_noise, DIGITS),
            "training": metrics.loss_noise_scale(priced.figures_noise),
        }
        for side, residual in self.residuals(config, priced, sites).items():
            assert residual.size >= 300
            scale = scales[side] * math.sqrt(sites)
            assert has_scale(residual, scale), side
            for wrong in (2 / 3, 3 / 2):
                assert not has_scale(residual, wrong * scale), side

    @pytest.mark.parametrize("config", ["central", "none"], indirect=True)
    def test_it_adds_none_where_it_is_not_its_to_add(self, config: RunConfig) -> None:
        for residual in self.residuals(config, plan(config), 1).values():
            assert not residual.any()

    @pytest.mark.parametrize("config", ["central"], indirect=True)
    def test_the_server_adds_the_noise_once_however_many_sites_there_are(
        self, config: RunConfig
    ) -> None:
        """Its noise is that of the hold-out's own plan, to the sum of all sites."""
        priced = plan(config)
        scale = metrics.noise_scale(priced.evaluation_noise, DIGITS)
        for sites in (1, 3):
            recorder, noises = Recorder(KEY), []
            for _ in range(20):
                found = evaluated(
                    NOT_EVALUATED,
                    2,
                    self.of_nothing(priced, sites),
                    self.EXAM,
                    config,
                    DIGITS,
                    priced,
                    recorder,
                )
                noises.append(found.sums["one_way"])
            assert has_scale(np.concatenate(noises), scale)
            drawn = Counter(scale for _, scale in recorder.noises)
            assert drawn == {
                scale: 20 * len(metrics.blocks(DIGITS)),
                metrics.loss_noise_scale(priced.figures_noise): 40,
            }

    @staticmethod
    def of_nothing(priced: Plan, sites: int) -> Collected:
        """What sites without records send under `central`."""
        zeros = {name: np.zeros_like(a) for name, a in expected_sums(DIGITS, priced).items()}
        parts = (Update("run", 0, 1, {}, zeros, NO_LEDGER),) * sites
        return Collected(parts, tuple(range(sites)), {}, {}, noises=1)

    def test_the_sensitivities_are_those_of_one_record(self) -> None:
        """Each block has norm 1 at most: of B blocks sqrt(B), of count and loss sqrt(2)."""
        assert set(metrics.blocks(DIGITS)) == {"count", "loss", "one_way", "tstr_mlp"}
        assert metrics.noise_scale(1.5, DIGITS) == pytest.approx(1.5 * 2 * 1.001)
        assert metrics.loss_noise_scale(1.5) == pytest.approx(1.5 * math.sqrt(2) * 1.001)
        module = digits_vae(
            RunConfig.model_validate(
                {"data": {"source": "sklearn:digits"}, "model": {"family": "vae"}}
            )
        )
        records = digits_records(40)
        for row in range(40):
            one = Batch(records.x[row : row + 1], records.y[row : row + 1])
            sums = metrics.answers(family("vae"), module, self.EXAM, one, DIGITS)
            assert all(np.linalg.norm(array) <= 1 for array in sums.values())
            both = metrics.loss_answers(family("vae"), module, one)
            assert np.linalg.norm(flat(both)) <= math.sqrt(2)


class TestClippingIsInForce:
    @pytest.mark.parametrize("clipping_norm", [0.1, 1.0, 3.0])
    def test_a_site_sends_at_most_the_clipping_norm_of_one_record(
        self, make_config: MakeConfig, clipping_norm: float
    ) -> None:
        config = make_config(privacy={**FAST, "clipping_norm": clipping_norm})
        one = Side(Batch(torch.full((1, 8), 1e4), torch.zeros(1).long()))
        sent = gradient_sum(
            ATTENDANCE, nn.Linear(8, 1, bias=False), one, config, plan(config), Coins(KEY)
        )
        assert np.linalg.norm(flat(sent)) == pytest.approx(clipping_norm / 1.001, rel=1e-5)


class TestOneRecordAtASite:
    """From raw records to the clipped sum: one record more or less moves one record's worth."""

    def sent(
        self, make_config: MakeConfig, budget: Budget, rows: list[tuple[str, str]]
    ) -> np.ndarray:
        columns = [
            {"name": "size", "kind": "numeric", "bounds": [0, 10]},
            {"name": "age", "kind": "integer", "bounds": [0, 120], "nullable": True},
        ]
        schema = parse_schema({"column": columns}, "test")
        frame = pl.DataFrame(rows, schema=["size", "age"], orient="row")
        config = make_config(privacy=FAST, data={"holdout": 0.0})
        site = Site("site", lambda _: frame, KEY, budget, Coins(KEY))
        records = site.records(config, schema).training
        module = nn.Linear(schema.shape[0], 1, bias=False)
        priced = plan(config)
        return flat(gradient_sum(ATTENDANCE, module, records, config, priced, Coins(KEY)))

    @pytest.mark.parametrize(
        "record",
        [("5", "40"), ("5", "forty"), ("5", ""), ("", ""), ("x", "y"), ("1e9", "-3"), ("nan", "1")],
    )
    @pytest.mark.parametrize("others", [[("3", "")] * 9, [("3", "unknown")] * 9, [("3", "30")] * 9])
    def test_cleaning_does_not_let_a_record_decide_on_others(
        self,
        make_config: MakeConfig,
        budget: Budget,
        record: tuple[str, str],
        others: list[tuple[str, str]],
    ) -> None:
        with_it = self.sent(make_config, budget, [*others, record])
        without_it = self.sent(make_config, budget, others)
        assert np.linalg.norm(with_it - without_it) <= 1.0


class TestSampling:
    RECORDS = 400

    def attendance(self, config: RunConfig, coins: Coins, steps: int) -> np.ndarray:
        """[steps, records] who was in, read off the un-noised sums that `gradient_sum` returns."""
        module = nn.Linear(self.RECORDS, 1, bias=False)
        everyone = Side(Batch(torch.eye(self.RECORDS), torch.zeros(self.RECORDS).long()))
        priced = plan(config)
        sums = [
            flat(gradient_sum(ATTENDANCE, module, everyone, config, priced, coins))
            for _ in range(steps)
        ]
        counts = np.stack(sums) * CLIPPING_SLACK
        assert np.allclose(counts, np.rint(counts), atol=1e-4)
        members = np.rint(counts).astype(bool)
        assert np.rint(counts).max() <= 1
        return members

    @pytest.mark.parametrize("rate", [0.02, 0.3])
    def test_the_realised_sampling_is_poisson_at_the_priced_rate(
        self, make_config: MakeConfig, rate: float
    ) -> None:
        config = make_config(
            federation={"rounds": 50},
            privacy={"epsilon": 2.0, "sampling_rate": rate},
            training={"micro_batch": 32},
        )
        members = self.attendance(config, Coins(KEY), 150)
        assert plan(config).sampling_rate == rate
        assert poisson_fault(members, rate) is None
        assert poisson_fault(members, rate * 1.2) == "rate"
        assert poisson_fault(members, rate / 1.2) == "rate"

    def test_at_rate_one_everybody_is_in(self, make_config: MakeConfig) -> None:
        assert self.attendance(make_config(privacy=FAST), Coins(KEY), 2).all()

    def test_the_derived_rate_is_the_one_that_is_priced(self, make_config: MakeConfig) -> None:
        # 512 of 1797 * 0.9 training records; under `local` 512 of a third of them are all.
        assert plan(make_config(privacy={"epsilon": 2.0})).sampling_rate == pytest.approx(
            512 / 1617.3
        )
        local = plan(make_config(privacy={"epsilon": 2.0, "mechanism": "local"}))
        assert local.sampling_rate == pytest.approx(512 / 539.1)


class TestReleases:
    def test_local_steps_are_the_releases_that_are_priced(self, make_config: MakeConfig) -> None:
        config = make_config(
            federation={"rounds": 3},
            training={"local_steps": 4},
            privacy={"epsilon": 2.0, "sampling_rate": 0.5, "mechanism": "local"},
        )
        priced, coins = plan(config), Recorder(KEY)
        module, records = digits_vae(config), Side(digits_records(20))
        for _ in range(priced.rounds):
            train(module, records, config, priced, coins)
        releases = len(coins.samples)
        assert releases == 12 == priced.rounds * priced.releases_per_round
        assert set(coins.rates) == {0.5}
        shapes = [p.shape for p in module.parameters()]
        assert [shape for shape, _ in coins.noises] == shapes * 12
        assert {scale for _, scale in coins.noises} == {priced.noise_multiplier}
        assert priced.epsilon is not None
        again = pld_epsilon(Releases(priced.noise_multiplier, 0.5, releases), priced.delta)
        assert 0.999 * again <= priced.epsilon <= 2.0
        assert len({rows.tobytes() for rows in coins.samples}) > 6  # a fresh sample each

    @pytest.mark.parametrize("mechanism", ["central", "local", "none"])
    def test_a_whole_run_makes_the_releases_that_it_is_priced_for(
        self,
        make_config: MakeConfig,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        mechanism: str,
    ) -> None:
        made: list[Recorder] = []

        def record(cls: type[Coins]) -> Coins:
            made.append(Recorder(bytes([len(made)]) * 32))
            return made[-1]

        monkeypatch.setattr(Coins, "from_system", classmethod(record))
        steps = 2 if mechanism == "local" else 1
        config = make_config(
            federation={"rounds": 3},
            training={"local_steps": steps},
            privacy={**FAST, "mechanism": mechanism, "sampling_rate": 0.4},
            evaluation={"samples": 200},
        )
        run = fedveil.simulate(config, out=tmp_path / "run")
        arrays, _ = read_file(run.path / "model.safetensors")
        priced = plan(config)
        sites = [coins for coins in made if coins.samples]
        others = [coins for coins in made if not coins.samples]
        assert len(sites) == 3
        assert all(len(coins.samples) == 3 * steps for coins in sites)
        assert {rate for coins in sites for rate in coins.rates} == {0.4}
        # Of three rounds; and of three evaluations, each of the same blocks, one array a block.
        assert priced.evaluations == 3
        kept = len(metrics.blocks(DIGITS))
        noises = {3 * steps * len(arrays) + 3 * kept} if mechanism != "none" else {0}
        assert {len(coins.noises) for coins in sites} == (noises if mechanism == "local" else {0})
        at_server = {sum(len(coins.noises) for coins in others)}
        assert at_server == (noises if mechanism == "central" else {0})
        scales = Counter(scale for coins in made for _, scale in coins.noises)
        if mechanism == "none":
            assert not scales
        else:
            releases = 3 if mechanism == "local" else 1
            assert scales == {
                priced.noise_multiplier: releases * 3 * steps * len(arrays),
                metrics.noise_scale(priced.evaluation_noise, DIGITS): releases * 3 * kept,
            }
        for node in (1, 2, 3):
            books = verify(run.path / "ledger" / f"site-{node:03d}.sqlite").books
            (kept_run,) = books.runs.values()
            assert kept_run.made == {"rounds": 3, "evaluations": 3}
        assert run.privacy["epsilon"] == priced.epsilon


class TestSecrets:
    def test_two_runs_of_one_seed_draw_other_batches_and_other_noise(
        self, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        """From one seed and one start, the models differ by two independent noises at least."""
        config = make_config(
            federation={"rounds": 1, "seed": 7},
            training={"learning_rate": 1.0, "ema": 0.0},
            privacy={**FAST, "epsilon": 0.5},
            aggregation={"strategy": "sgd"},
            evaluation={"samples": 200},
        )
        runs = [fedveil.simulate(config, out=tmp_path / name) for name in "ab"]
        models = [flat(read_file(run.path / "model.safetensors")[0]) for run in runs]
        priced = plan(config)
        apart = (models[0] - models[1]) * priced.expected_batch
        scale = priced.noise_multiplier * math.sqrt(2)
        low = stats.chi2.ppf(ALARM, apart.size)
        assert float(np.square(apart / scale).sum()) > low

    def test_two_sites_of_one_run_and_one_site_of_two_runs_have_coins_of_their_own(
        self, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        sites = [
            simulated_site(node, None, tmp_path / run, make_config(), 9)
            for run in ("a", "b")
            for node in (1, 2)
        ]
        samples = {site.coins.poisson_sample(500, 0.5).tobytes() for site in sites}
        noises = {site.coins.gaussian((8,), 1.0).tobytes() for site in sites}
        assert len(samples) == len(noises) == 4

    @pytest.mark.parametrize("seeds", [(0, 0), (1, 2)])
    def test_neither_the_runs_seed_nor_a_global_one_changes_what_coins_give(
        self, make_config: MakeConfig, seeds: tuple[int, int]
    ) -> None:
        sums = []
        for seed in seeds:
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            config = make_config(federation={"seed": seed}, privacy={**FAST, "mechanism": "local"})
            module, records = digits_vae(config), Side(digits_records(20))
            torch_state = torch.get_rng_state()
            numpy_state = str(np.random.get_state())  # noqa: NPY002
            kind = family("vae")
            sums.append(flat(gradient_sum(kind, module, records, config, plan(config), Coins(KEY))))
            assert torch.equal(torch.get_rng_state(), torch_state)
            assert str(np.random.get_state()) == numpy_state  # noqa: NPY002
        assert np.array_equal(sums[0], sums[1])

    def test_other_coins_give_other_noise_from_the_same_records(
        self, make_config: MakeConfig
    ) -> None:
        config = make_config(privacy={**FAST, "mechanism": "local"})
        priced, records = plan(config), Side(digits_records(20))
        module = digits_vae(config)
        sums = [
            flat(gradient_sum(family("vae"), module, records, config, priced, coins))
            for coins in (Coins(KEY), Coins(OTHER_KEY), Coins.from_system(), Coins.from_system())
        ]
        correlation = np.corrcoef(np.stack(sums)) - np.eye(4)
        assert np.abs(correlation).max() < 0.5
