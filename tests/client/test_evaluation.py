"""What a site says of the model: of which records, with how much noise, and of none that are kept.

The checks of scale are exact chi-squared bounds with a false-alarm rate of 1e-7 on fixed coins.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from scipy import stats
from torch import nn

from fedveil.client.app import client_app
from fedveil.client.evaluation import holdout_sums, training_sums
from fedveil.client.site import Budget, Side, Site, no_records
from fedveil.config import MechanismName, Policy, RunConfig
from fedveil.data_prep import modality
from fedveil.data_prep.partition import keyed_split
from fedveil.data_prep.schema import Schema, parse_schema, schema_to_json
from fedveil.flower import Context, Message, RecordDict, set_identity, set_message_id
from fedveil.models import Batch, family
from fedveil.models.layers import initialise
from fedveil.models.metrics import (
    Exam,
    answers,
    blocks,
    exam_to_arrays,
    loss_answers,
    loss_noise_scale,
    noise_scale,
    prepare,
)
from fedveil.models.state import Arrays, load_arrays, to_arrays
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.limits import (
    Lifetime,
)
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import Plan, plan
from fedveil.privacy.secagg.terms import Numbers
from fedveil.server.evaluation import expected_sums
from fedveil.wire import EVALUATE, NO_LEDGER, TRAIN, Task, Update, pack, read_reply

MakeConfig = Callable[..., RunConfig]
KEY = bytes(range(32))
ALARM = 1e-7
MULTIPLIER, FIGURES = 1.5, 0.6
NUMBER = {"kind": "numeric", "bounds": [0, 1]}
SCHEMA = parse_schema(
    {
        "column": [
            {"name": "height", **NUMBER},
            {"name": "weight", **NUMBER},
            {"name": "visits", "kind": "integer", "bounds": [0, 9], "nullable": True},
            {"name": "sick", "kind": "categorical", "categories": ["no", "yes"]},
        ],
        "label": "sick",
        "person": "who",
    },
    "test",
)


@pytest.fixture(autouse=True, scope="module")
def _identity() -> None:
    set_identity(1, 0)


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    """Without a mechanism, so that nothing has to be priced."""
    return make_config(data={"records": 600}, privacy={"mechanism": "none"}).resolved()


def noisy(config: RunConfig, mechanism: MechanismName) -> Plan:
    """A plan that pays for figures of both sides, unpriced."""
    return replace(
        plan(config), mechanism=mechanism, evaluation_noise=MULTIPLIER, figures_noise=FIGURES
    )


def model(config: RunConfig) -> nn.Module:
    """One with public initial weights."""
    module = family("vae").build(config.model, SCHEMA)
    initialise(module, torch.Generator().manual_seed(0))
    return module


def persons(count: int, seed: int = 1) -> pl.DataFrame:
    """Raw records, one a person, as they are read."""
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "height": rng.random(count).round(4).astype(str),
            "weight": rng.random(count).round(4).astype(str),
            "visits": [["", "0", "3", "9"][i] for i in rng.integers(0, 4, count)],
            "sick": [["no", "yes"][i] for i in rng.integers(0, 2, count)],
            "who": [f"person {index}" for index in range(count)],
        }
    )


def encoded(raw: pl.DataFrame, config: RunConfig, rows: np.ndarray | None = None) -> Batch:
    """Records as a model takes them: some rows, or all."""
    kind = modality(SCHEMA)
    cleaned, _ = kind.clean(raw, SCHEMA, config.clean)
    batch = kind.encode(cleaned, SCHEMA)
    batch = batch if rows is None else batch.take(rows)
    return Batch(torch.from_numpy(batch.x), torch.from_numpy(batch.y))


@pytest.fixture(scope="module")
def exam() -> Exam:
    """Made of synthetic records, here random ones."""
    rng = np.random.default_rng(3)
    x = rng.random((200, *SCHEMA.shape), dtype=np.float32)
    return prepare(Batch(torch.from_numpy(x), torch.from_numpy(rng.integers(0, 2, 200))), SCHEMA, 1)


def has_scale(residual: np.ndarray, scale: float) -> bool:
    """Whether it may be noise of mean 0 and that scale: z and chi-squared, 1e-7 together."""
    unit = residual.ravel() / scale
    low, high = stats.chi2.ppf([ALARM / 4, 1 - ALARM / 4], unit.size)
    centred = abs(unit.sum()) < stats.norm.isf(ALARM / 4) * math.sqrt(unit.size)
    return bool(centred and low < float(np.square(unit).sum()) < high)


def only(residual: np.ndarray, scale: float) -> None:
    """It has that scale, and neither two thirds nor one and a half of it."""
    assert has_scale(residual, scale)
    for wrong in (2 / 3, 3 / 2):
        assert not has_scale(residual, wrong * scale)


def residuals(found: Arrays, exact: Arrays) -> np.ndarray:
    return np.concatenate([(found[name] - exact[name]).ravel() for name in exact])


class TestHoldoutSums:
    @pytest.mark.parametrize("mechanism", ["central", "none"])
    def test_are_exact_and_draw_nothing_where_the_noise_is_anothers(
        self, config: RunConfig, exam: Exam, coins: Coins, mechanism: MechanismName
    ) -> None:
        module, records = model(config), encoded(persons(40), config)
        found = holdout_sums(
            module, exam, Side(records), config, SCHEMA, noisy(config, mechanism), coins
        )
        exact = answers(family("vae"), module, exam, records, SCHEMA)
        assert list(found) == list(exact)
        assert all(np.array_equal(found[name], exact[name]) for name in exact)
        assert np.array_equal(coins.words(4), Coins(KEY).words(4))

    def test_have_the_names_shapes_and_type_that_the_server_expects(
        self, config: RunConfig, exam: Exam, coins: Coins
    ) -> None:
        fixed = noisy(config, "local")
        for count in (0, 7):
            records = encoded(persons(9), config, np.arange(count))
            sums = holdout_sums(model(config), exam, Side(records), config, SCHEMA, fixed, coins)
            trained = training_sums(model(config), Side(records), config, fixed, coins)
            found = {f"holdout/{name}": array for name, array in sums.items()}
            found |= {f"training/{name}": array for name, array in trained.items()}
            expected = expected_sums(SCHEMA, fixed)
            assert found.keys() == expected.keys()
            for name, array in found.items():
                assert array.shape == expected[name].shape
                assert array.dtype == np.float64

    def test_under_local_carry_the_noise_of_all_blocks_together(
        self, config: RunConfig, exam: Exam, coins: Coins
    ) -> None:
        module, records = model(config), encoded(persons(40), config)
        exact = answers(family("vae"), module, exam, records, SCHEMA)
        fixed, drawn = noisy(config, "local"), []
        for _ in range(8):
            found = holdout_sums(module, exam, Side(records), config, SCHEMA, fixed, coins)
            drawn.append(residuals(found, exact))
        assert len(blocks(SCHEMA)) == 6
        only(np.concatenate(drawn), MULTIPLIER * math.sqrt(6) * 1.001)

    def test_under_local_every_block_carries_all_of_it(
        self, config: RunConfig, exam: Exam, coins: Coins
    ) -> None:
        """Of no records the sums are zeros, so what a site sends is its noise."""
        none, fixed, module = no_records(SCHEMA).holdout, noisy(config, "local"), model(config)
        drawn = [holdout_sums(module, exam, none, config, SCHEMA, fixed, coins) for _ in range(500)]
        for name in blocks(SCHEMA):
            noise = np.stack([sums[name] for sums in drawn])
            only(noise, noise_scale(MULTIPLIER, SCHEMA))
        # The lattice of the mechanism: no low-order bits of a sum are left to tell.
        assert all((a * 2.0**19 % 1 == 0).all() for sums in drawn for a in sums.values())


class TestHoldoutSumsOfASite:
    """All its held-out records are one unit's: their sums are clipped as a whole."""

    @staticmethod
    def whole(config: RunConfig, units: float, *, alone: bool) -> Plan:
        """A plan for the unit `site`; in a secure sum, parts are bare."""
        numbers = None if alone else Numbers(3, 3, 3, 1)
        return replace(noisy(config, "site"), unit="site", evaluation_units=units, numbers=numbers)

    @pytest.mark.parametrize("units", [1.0, 7.5, 39.0])
    def test_it_adds_no_more_than_its_share_of_records_may(
        self, config: RunConfig, exam: Exam, coins: Coins, units: float
    ) -> None:
        module, records = model(config), encoded(persons(400), config)
        fixed = self.whole(config, units, alone=False)
        found = holdout_sums(module, exam, Side(records), config, SCHEMA, fixed, coins)
        exact = answers(family("vae"), module, exam, records, SCHEMA)
        size = math.sqrt(sum(float(np.square(array).sum()) for array in found.values()))
        # `units` records of six blocks: units * sqrt(6), and the slack of their rounding.
        bound = units * math.sqrt(6) * 1.001
        assert 0.99 * bound < size <= bound
        # Scaled as a whole: shares stay what they are.
        factor = float(found["count"][0] / exact["count"][0])
        for name, array in found.items():
            assert array == pytest.approx(factor * exact[name], rel=1e-9)

    def test_fewer_records_are_not_clipped(
        self, config: RunConfig, exam: Exam, coins: Coins
    ) -> None:
        module, records = model(config), encoded(persons(40), config)
        fixed = self.whole(config, 41.0, alone=False)
        found = holdout_sums(module, exam, Side(records), config, SCHEMA, fixed, coins)
        exact = answers(family("vae"), module, exam, records, SCHEMA)
        assert all(np.array_equal(found[name], exact[name]) for name in exact)

    def test_its_noise_is_for_as_many(self, config: RunConfig, exam: Exam, coins: Coins) -> None:
        none, module = no_records(SCHEMA).holdout, model(config)
        fixed, drawn = self.whole(config, 7.5, alone=True), []
        for _ in range(20):
            sums = holdout_sums(module, exam, none, config, SCHEMA, fixed, coins)
            drawn.append(np.concatenate([array.ravel() for array in sums.values()]))
        only(np.concatenate(drawn), 7.5 * MULTIPLIER * math.sqrt(6) * 1.001)

    def test_in_a_secure_sum_it_adds_none_by_itself(
        self, config: RunConfig, exam: Exam, coins: Coins
    ) -> None:
        none, fixed = no_records(SCHEMA).holdout, self.whole(config, 7.5, alone=False)
        sums = holdout_sums(model(config), exam, none, config, SCHEMA, fixed, coins)
        assert not any(array.any() for array in sums.values())
        assert np.array_equal(coins.words(4), Coins(KEY).words(4))


class TestTrainingSums:
    @pytest.mark.parametrize("mechanism", ["central", "none"])
    def test_are_count_and_loss_and_exact_where_the_noise_is_anothers(
        self, config: RunConfig, coins: Coins, mechanism: MechanismName
    ) -> None:
        module, records = model(config), encoded(persons(40), config)
        found = training_sums(module, Side(records), config, noisy(config, mechanism), coins)
        assert found == loss_answers(family("vae"), module, records)
        assert found["count"].tolist() == [40]
        assert np.array_equal(coins.words(4), Coins(KEY).words(4))

    def test_under_local_carry_the_noise_of_two_blocks(
        self, config: RunConfig, coins: Coins
    ) -> None:
        none, fixed, module = no_records(SCHEMA).training, noisy(config, "local"), model(config)
        drawn = [training_sums(module, none, config, fixed, coins) for _ in range(500)]
        for name in ("count", "loss"):
            noise = np.stack([sums[name] for sums in drawn])
            only(noise, loss_noise_scale(FIGURES))
            only(noise, FIGURES * math.sqrt(2) * 1.001)


class Asking:
    """A site behind the real app, with a ledger of its own."""

    def __init__(self, raw: pl.DataFrame, folder: Path) -> None:
        path = folder / "site.sqlite"
        Ledger.create(path, "site-001")
        budget = Budget(Ledger.open(path), "data", Lifetime(None, 0.5))
        policy = Policy(self_test=False)
        self.site = Site("site-001", lambda _: raw, KEY, budget, Coins(KEY), policy=policy)
        self.app = client_app(lambda _: self.site)

    def __call__(self, task: Task) -> Update:
        message = Message(pack(task), 5, TRAIN if task.round else EVALUATE, group_id="1")
        set_message_id(message, "abc")
        reply = read_reply(self.app(message, Context(1, 5, {}, RecordDict(), {})))
        self.site.close()
        assert isinstance(reply, Update)
        assert not self.site.failed
        return reply


def task(config: RunConfig, exam: Exam, schema: Schema = SCHEMA) -> Task:
    """The server's request to train and to evaluate."""
    return Task(
        run_id="run",
        round=1,
        evaluation=1,
        config=config.shared().model_dump_json(by_alias=True),
        schema=schema_to_json(schema),
        arrays=to_arrays(model(config)),
        released={
            name: array + np.float32(0.01) for name, array in to_arrays(model(config)).items()
        },
        exam=exam_to_arrays(exam),
        ledger=NO_LEDGER,
        clipping_norm=math.inf if config.privacy.mechanism == "none" else 1.0,
    )


def released(config: RunConfig, exam: Exam) -> nn.Module:
    """The model that the task asks to evaluate; it is not the one to train."""
    module = model(config)
    load_arrays(module, task(config, exam).released)
    return module


@pytest.fixture
def three_sided(config: RunConfig) -> RunConfig:
    """With all three sides."""
    sides = config.data.model_copy(update={"holdout": 0.3, "audit": 0.3})
    return config.model_copy(update={"data": sides})


@pytest.fixture(scope="module")
def paid() -> RunConfig:
    """A configuration that pays for figures of training records."""
    raw = {
        "federation": {"sites": 1, "rounds": 1},
        "data": {"source": "none.csv", "records": 600, "holdout": 0.3, "audit": 0.3},
        "model": {"family": "vae", "latent": 2, "hidden": 8},
        "privacy": {"epsilon": 8.0, "mechanism": "central", "sampling_rate": 1.0},
        "evaluation": {"training_share": 0.25},
    }
    return RunConfig.model_validate(raw).resolved()


def sides_of(raw: pl.DataFrame) -> dict[str, np.ndarray]:
    """Rows by the side that the site's key puts them on."""
    sides = keyed_split([who.encode() for who in raw["who"]], KEY, 0.3, 0.3)
    return {"training": sides.training, "holdout": sides.holdout, "audit": sides.audit}


class TestWhoIsAsked:
    def test_each_accounts_figures_are_of_its_own_side_and_of_the_released_model(
        self, paid: RunConfig, exam: Exam, tmp_path: Path
    ) -> None:
        raw = persons(150)
        sums = Asking(raw, tmp_path)(task(paid, exam)).sums
        sides, module = sides_of(raw), released(paid, exam)
        held_out = answers(
            family("vae"), module, exam, encoded(raw, paid, sides["holdout"]), SCHEMA
        )
        trained = loss_answers(family("vae"), module, encoded(raw, paid, sides["training"]))
        exact = {f"holdout/{name}": array for name, array in held_out.items()}
        exact |= {f"training/{name}": array for name, array in trained.items()}
        assert min(len(rows) for rows in sides.values()) > 20
        assert sums.keys() == exact.keys()
        # Under `central` they leave the site as they are.
        assert all(np.array_equal(sums[name], exact[name]) for name in exact)

    def test_nothing_is_said_of_training_records_unless_it_is_paid_for(
        self, three_sided: RunConfig, exam: Exam, tmp_path: Path
    ) -> None:
        assert not plan(three_sided).figures_noise
        found = Asking(persons(150), tmp_path)(task(three_sided, exam)).sums
        assert {name.partition("/")[0] for name in found} == {"holdout"}

    def test_nothing_is_summed_unless_it_is_asked_for(
        self, three_sided: RunConfig, exam: Exam, tmp_path: Path
    ) -> None:
        unasked = replace(task(three_sided, exam), evaluation=0, released={}, exam={})
        assert Asking(persons(150), tmp_path)(unasked).sums == {}

    @pytest.mark.parametrize("side", ["training", "holdout", "audit"])
    def test_what_one_side_says_hangs_on_no_other(
        self, three_sided: RunConfig, exam: Exam, tmp_path: Path, side: str
    ) -> None:
        """The audit side is in nothing; held-out records are in no gradient, and the reverse."""
        raw, other = persons(150), persons(150, seed=2)
        moved = set(sides_of(raw)[side].tolist())
        mixed = pl.concat([(other if row in moved else raw)[row] for row in range(150)])
        found = []
        for number, records in enumerate((raw, mixed)):
            (tmp_path / str(number)).mkdir()
            found.append(Asking(records, tmp_path / str(number))(task(three_sided, exam)))

        def same(first: Arrays, second: Arrays) -> bool:
            return all(np.array_equal(first[name], second[name]) for name in first)

        assert same({**found[0].arrays}, {**found[1].arrays}) == (side != "training")
        assert same({**found[0].sums}, {**found[1].sums}) == (side != "holdout")

    def test_a_site_whose_records_make_it_fail_answers_as_one_without(
        self, three_sided: RunConfig, exam: Exam, tmp_path: Path
    ) -> None:
        asking = Asking(pl.DataFrame({"wrong": ["1"]}), tmp_path)
        message = Message(pack(task(three_sided, exam)), 5, TRAIN, group_id="1")
        set_message_id(message, "abc")
        reply = read_reply(asking.app(message, Context(1, 5, {}, RecordDict(), {})))
        asking.site.close()
        assert isinstance(reply, Update)
        assert asking.site.failed
        assert reply.sums.keys() == expected_sums(SCHEMA, plan(three_sided)).keys()
        assert not any(array.any() for array in reply.sums.values())


class TestPersons:
    """A person counts once: one more or less moves every block by at most one."""

    OWNERS = (0, 0, 0, 0, 1, 2, 2, 3, 4, 4)

    @pytest.fixture
    def by_person(self, config: RunConfig) -> Plan:
        return replace(noisy(config, "central"), unit="person")

    def side(self, config: RunConfig, without: int | None = None) -> Side:
        kept = [row for row, owner in enumerate(self.OWNERS) if owner != without]
        owners = torch.tensor([self.OWNERS[row] for row in kept])
        return Side(encoded(persons(10), config, np.array(kept)), owners)

    @pytest.mark.parametrize("person", [0, 1, 2, 3, 4])
    def test_a_person_changes_each_block_by_at_most_one(
        self, config: RunConfig, by_person: Plan, exam: Exam, coins: Coins, person: int
    ) -> None:
        module = model(config)
        sides = [self.side(config, without) for without in (None, person)]
        held_out = [
            holdout_sums(module, exam, side, config, SCHEMA, by_person, coins) for side in sides
        ]
        trained = [training_sums(module, side, config, by_person, coins) for side in sides]
        for whole, rest in (held_out, trained):
            moved = [np.linalg.norm(whole[name] - rest[name]) for name in whole]
            assert max(moved) <= 1 + 1e-9
            assert whole["count"][0] - rest["count"][0] == pytest.approx(1)

    def test_they_are_counted(
        self, config: RunConfig, by_person: Plan, exam: Exam, coins: Coins
    ) -> None:
        side, module = self.side(config), model(config)
        sums = holdout_sums(module, exam, side, config, SCHEMA, by_person, coins)
        assert sums["count"][0] == pytest.approx(5)
        assert training_sums(module, side, config, by_person, coins)["count"][0] == pytest.approx(5)
        by_record = replace(by_person, unit="record")
        assert training_sums(module, side, config, by_record, coins)["count"][0] == 10

    def test_records_of_nobody_are_refused(
        self, config: RunConfig, by_person: Plan, exam: Exam, coins: Coins
    ) -> None:
        side, module = Side(self.side(config).batch), model(config)
        with pytest.raises(ValueError, match="not every record has one"):
            holdout_sums(module, exam, side, config, SCHEMA, by_person, coins)
        with pytest.raises(ValueError, match="not every record has one"):
            training_sums(module, side, config, by_person, coins)
