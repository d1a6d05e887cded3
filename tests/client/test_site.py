"""A site reads and cleans its records once, and debits its ledger for what is made of them."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedveil.client.site import Budget, Records, Side, Site, no_records
from fedveil.config import ConfigError, RunConfig, UnitName
from fedveil.data_prep import modality, run_schema
from fedveil.data_prep.clean import DataError
from fedveil.data_prep.images import Images
from fedveil.data_prep.partition import keyed_split
from fedveil.data_prep.schema import ImageSchema, Schema, TableSchema, parse_schema
from fedveil.models import Batch
from fedveil.privacy.books import (
    EMPTY,
    Head,
)
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.limits import BudgetError, DamagedError, LedgerError, Lifetime, TermsError
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import plan

MakeConfig = Callable[..., RunConfig]
KEY = bytes(range(32))
SIDES = ("training", "holdout", "audit")
SCHEMA = ImageSchema(height=8, width=8, classes=tuple("0123456789"))


def images(count: int, seed: int = 1) -> Images:
    """So many different images, all usable."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
    labels = np.array([str(index % 10) for index in range(count)])
    return Images(pixels, labels, np.ones(count, dtype=bool))


def site(
    raw: Any,  # noqa: ANN401
    coins: Coins,
    budget: Budget,
    folder: Path | None = None,
    key: bytes = KEY,
) -> Site:
    """A site that holds these raw records."""
    return Site("site-001", lambda _: raw, key, budget, coins, folder)


@pytest.fixture(scope="module")
def budget(tmp_path_factory: pytest.TempPathFactory) -> Budget:
    """A ledger that nothing is ever debited from: splitting records is free."""
    path = tmp_path_factory.mktemp("ledger") / "site.sqlite"
    Ledger.create(path, "site-001")
    return Budget(Ledger.open(path), "data", Lifetime(None, 0.5))


def failing(error: Exception) -> Callable[[Schema], Any]:
    """A reader that raises."""

    def read(_: Schema) -> Any:  # noqa: ANN401
        raise error

    return read


def sizes(records: Records) -> tuple[int, ...]:
    """How many records each side has."""
    sides = (records.training, records.holdout, records.audit)
    return tuple(len(side.batch.y) for side in sides)


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    """With all three sides."""
    return make_config(data={"holdout": 0.3, "audit": 0.2})


def test_records_are_read_once(coins: Coins, budget: Budget, config: RunConfig) -> None:
    reads = []

    def read(_: Schema) -> Images:
        reads.append(1)
        return images(20)

    one = Site("site-001", read, KEY, budget, coins)
    assert reads == []
    assert one.records(config, SCHEMA) is one.records(config, SCHEMA)
    assert reads == [1]


def test_the_sides_are_the_keyed_split(coins: Coins, budget: Budget, config: RunConfig) -> None:
    raw = images(200)
    records = site(raw, coins, budget).records(config, SCHEMA)
    kind = modality(SCHEMA)
    encoded = kind.encode(raw, SCHEMA)
    sides = keyed_split(kind.identities(raw, SCHEMA), KEY, 0.3, 0.2)
    for side, rows in (
        (records.training, sides.training),
        (records.holdout, sides.holdout),
        (records.audit, sides.audit),
    ):
        assert len(rows)
        assert np.array_equal(side.batch.x.numpy(), encoded.x[rows])
        assert np.array_equal(side.batch.y.numpy(), encoded.y[rows])
    assert sum(sizes(records)) == 200


def test_a_record_keeps_its_side_when_others_go(
    coins: Coins, budget: Budget, config: RunConfig
) -> None:
    raw = images(200)
    some = modality(SCHEMA).take(raw, np.arange(0, 200, 3))
    whole, part = (site(r, coins, budget).records(config, SCHEMA) for r in (raw, some))
    for side in SIDES:
        of_whole = {image.numpy().tobytes() for image in getattr(whole, side).batch.x}
        assert all(image.numpy().tobytes() in of_whole for image in getattr(part, side).batch.x)


def test_another_key_splits_otherwise(coins: Coins, budget: Budget, config: RunConfig) -> None:
    first = site(images(200), coins, budget).records(config, SCHEMA)
    second = site(images(200), coins, budget, key=bytes(32)).records(config, SCHEMA)
    assert not torch.equal(first.training.batch.y, second.training.batch.y)


def test_unusable_records_are_in_no_side(coins: Coins, budget: Budget, config: RunConfig) -> None:
    raw = images(50)
    raw.usable[:10] = False
    raw.labels[10:15] = "unknown"
    assert sum(sizes(site(raw, coins, budget).records(config, SCHEMA))) == 35


def test_the_cleaning_report_stays_in_the_sites_folder(
    coins: Coins, budget: Budget, config: RunConfig, tmp_path: Path
) -> None:
    raw = images(12)
    raw.usable[:2] = False
    site(raw, coins, budget, tmp_path / "own").records(config, SCHEMA)
    report = json.loads((tmp_path / "own" / "cleaning.json").read_text(encoding="utf-8"))
    assert (report["records"], report["kept"]) == (12, 10)


@pytest.mark.parametrize("error", [DataError("no disk"), OSError("no disk")])
def test_data_that_fail_are_the_callers_to_handle(
    coins: Coins, budget: Budget, config: RunConfig, tmp_path: Path, error: Exception
) -> None:
    """Nothing is made up here: `client.app` decides what a site without records sends."""
    own = tmp_path / "own"
    one = Site("site-007", failing(error), KEY, budget, coins, own)
    for _ in range(2):
        with pytest.raises(type(error), match="no disk"):
            one.records(config, SCHEMA)
    assert not own.exists()


def test_a_failed_reading_leaves_nothing_behind(
    coins: Coins, budget: Budget, config: RunConfig
) -> None:
    """What a site has after a failure is all of its records, not the beginning of them."""
    outcomes: list[Images] = []

    def read(_: Schema) -> Images:
        outcomes.append(images(50))
        if len(outcomes) == 1:
            raise DataError("no disk")
        return outcomes[-1]

    one = Site("site-007", read, KEY, budget, coins)
    with pytest.raises(DataError, match="no disk"):
        one.records(config, SCHEMA)
    assert sum(sizes(one.records(config, SCHEMA))) == 50


def test_another_run_gets_records_of_its_own(
    coins: Coins, budget: Budget, config: RunConfig, make_config: MakeConfig
) -> None:
    """By its own rules and shares, or by none: never those of the run before."""
    outcomes: list[Exception | None] = [None, OSError("no disk"), None, None]

    def read(_: Schema) -> Images:
        if (error := outcomes.pop(0)) is not None:
            raise error
        return images(200)

    one = Site("site-001", read, KEY, budget, coins)
    first = sizes(one.records(config, SCHEMA))
    other = make_config(data={"holdout": 0.6, "audit": 0.0})
    with pytest.raises(OSError, match="no disk"):
        one.records(other, SCHEMA)
    second = sizes(one.records(other, SCHEMA))
    assert second == sizes(site(images(200), coins, budget).records(other, SCHEMA))
    assert second != first
    assert sizes(one.records(config, SCHEMA)) == first
    assert outcomes == []


def test_a_site_has_not_failed_yet(coins: Coins, budget: Budget, config: RunConfig) -> None:
    one = site(images(20), coins, budget)
    one.records(config, SCHEMA)
    assert one.failed is False


@pytest.mark.parametrize("source", ["sklearn:digits", "sklearn:breast_cancer"])
def test_no_records_are_the_empty_batch_on_every_side(
    source: str, make_config: MakeConfig, coins: Coins, budget: Budget
) -> None:
    config = make_config(data={"source": source})
    schema: Schema = run_schema(config)
    nothing = no_records(schema)
    # It is what a site whose data are in order has, if it has none.
    kind = modality(schema)
    emptied = kind.take(kind.read(source, schema), np.arange(0))
    found = site(emptied, coins, budget).records(config, schema)
    width = (30,) if isinstance(schema, TableSchema) else (1, 8, 8)
    for side in SIDES:
        for batch in (getattr(nothing, side).batch, getattr(found, side).batch):
            assert (batch.x.shape, batch.x.dtype) == ((0, *width), torch.float32), side
            assert (batch.y.shape, batch.y.dtype) == ((0,), torch.int64), side


def test_no_records_of_colour_images() -> None:
    colour = ImageSchema(height=8, width=12, channels=3, classes=("a", "b"))
    assert no_records(colour).holdout.batch.x.shape == (0, 3, 8, 12)


def test_a_site_whose_records_are_all_unusable_has_none(
    coins: Coins, budget: Budget, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(data={"source": "sklearn:breast_cancer"})
    schema = run_schema(config)
    assert isinstance(schema, TableSchema)
    raw = pl.DataFrame({c.name: ["nonsense"] * 3 for c in schema.columns})
    one = site(raw, coins, budget, tmp_path / "own")
    assert sizes(one.records(config, schema)) == (0, 0, 0)
    assert one.records(config, schema) is one.records(config, schema)


def test_a_site_without_any_record_has_none(
    coins: Coins, budget: Budget, config: RunConfig
) -> None:
    assert sizes(site(images(0), coins, budget).records(config, SCHEMA)) == (0, 0, 0)


# One record more.

keys = st.binary(min_size=16, max_size=40)
shares = st.tuples(st.floats(0, 0.49), st.floats(0, 0.5))
few = st.integers(0, 3)
TABLE = parse_schema(
    {
        "column": [
            {"name": "age", "kind": "integer", "bounds": [0, 120]},
            {"name": "town", "kind": "categorical", "categories": ["a", "b"], "nullable": True},
        ]
    },
    "test",
)
PERSONS = parse_schema({**TABLE.model_dump(by_alias=True), "person": "who"}, "test")
# Good values, others that a rule decides on, and some that are no value at all.
rows = st.tuples(
    st.sampled_from(["30", "31", "31.0", " 31", "-5", "1e9", "forty", "", "NA", "nan"]),
    st.sampled_from(["a", "b", "c", "", "?"]),
    st.sampled_from(["ann", "bob", "cid", "", "NA"]),
)
cleaning = st.builds(
    lambda *rules: dict(
        zip(("type_error", "unknown_category", "out_of_bounds"), rules, strict=True)
    ),
    st.sampled_from(["missing", "drop"]),
    st.sampled_from(["missing", "drop"]),
    st.sampled_from(["clip", "missing", "drop"]),
)


def split(
    raw: Any,  # noqa: ANN401
    schema: Schema,
    budget: Budget,
    key: bytes,
    held_out: tuple[float, float],
    rules: Mapping[str, str] | None = None,
) -> dict[str, Counter[bytes]]:
    """How often each encoded record is on each side."""
    holdout, audit = held_out
    config = RunConfig.model_validate(
        {
            "data": {"source": "here", "holdout": holdout, "audit": audit},
            "clean": rules or {},
            "model": {"family": "vae"},
        }
    )
    records = site(raw, Coins(KEY), budget, key=key).records(config, schema)
    sides = {side: getattr(records, side).batch for side in SIDES}
    return {
        side: Counter(
            x.numpy().tobytes() + y.numpy().tobytes() for x, y in zip(*batch, strict=True)
        )
        for side, batch in sides.items()
    }


def gained(
    before: dict[str, Counter[bytes]], after: dict[str, Counter[bytes]]
) -> dict[str, Counter[bytes]]:
    """What each side has more; nothing may be missing from any."""
    for side in SIDES:
        assert not before[side] - after[side], side
    return {side: after[side] - before[side] for side in SIDES}


class TestOneRecordMore:
    """Adding one record changes exactly one side by exactly one record, and no other record's side.

    That is why a record pays from one account only, and the claim is the larger of the two.
    """

    @given(st.lists(few, max_size=12), few, st.integers(0, 12), keys, shares)
    def test_changes_one_side_by_that_record(
        self,
        budget: Budget,
        held: list[int],
        more: int,
        place: int,
        key: bytes,
        held_out: tuple[float, float],
    ) -> None:
        """Images of a few kinds, so that there are often two alike."""
        kinds = images(4)
        place = min(place, len(held))
        take = modality(SCHEMA).take
        before = split(take(kinds, np.array(held, dtype=int)), SCHEMA, budget, key, held_out)
        longer = np.array([*held[:place], more, *held[place:]], dtype=int)
        found = gained(before, split(take(kinds, longer), SCHEMA, budget, key, held_out))
        encoded = modality(SCHEMA).encode(take(kinds, np.array([more])), SCHEMA)
        record = encoded.x[0].tobytes() + encoded.y[0].tobytes()
        assert sum(found.values(), Counter()) == Counter([record])

    @given(st.lists(rows, max_size=10), rows, st.integers(0, 10), keys, shares, cleaning)
    def test_of_a_table_changes_at_most_one_side_by_one(
        self,
        budget: Budget,
        held: list[tuple[str, str, str]],
        more: tuple[str, str, str],
        place: int,
        key: bytes,
        held_out: tuple[float, float],
        rules: dict[str, str],
    ) -> None:
        """Whatever stands in it: cleaning may drop it, and changes no other record's side."""
        for schema in (TABLE, PERSONS):
            before, after = (
                split(table(part), schema, budget, key, held_out, rules)
                for part in (held, [*held[:place], more, *held[place:]])
            )
            kept = split(table([more]), schema, budget, key, held_out, rules)
            # It goes where it would go alone, if it is kept at all.
            assert gained(before, after) == kept
            assert sum(kept.values(), Counter()).total() <= 1

    @given(st.lists(rows, min_size=1, max_size=10), keys, shares)
    def test_all_records_of_a_person_share_a_side(
        self,
        budget: Budget,
        held: list[tuple[str, str, str]],
        key: bytes,
        held_out: tuple[float, float],
    ) -> None:
        for name in ("ann", "bob"):
            own = [(age, town, name) for age, town, _ in held]
            found = split(table(own), PERSONS, budget, key, held_out)
            assert sum(1 for side in found.values() if side) <= 1


def table(held: Sequence[tuple[str, str, str]]) -> pl.DataFrame:
    """Raw rows of text."""
    kinds = {"age": pl.String, "town": pl.String, "who": pl.String}
    return pl.DataFrame(list(held), schema=kinds, orient="row")


# The ledger.


@pytest.fixture
def plain(make_config: MakeConfig) -> RunConfig:
    """Without a mechanism, so that nothing has to be priced: two rounds, two evaluations."""
    return make_config(privacy={"mechanism": "none"}, data={"holdout": 0.3, "audit": 0.2})


class Books:
    """A site with a ledger of its own, whose records must not be read."""

    def __init__(self, folder: Path, coins: Coins) -> None:
        self.path, self.coins = folder / "site.sqlite", coins
        Ledger.create(self.path, "site-001")
        self.ledger = Ledger.open(self.path)
        self.budget = Budget(self.ledger, "data", Lifetime(None, 0.5), {"shared_out": "iid"})

    def site(self, key: bytes = KEY, **changes: Any) -> Site:  # noqa: ANN401
        """It, with another key or budget."""

        def never(_: Schema) -> None:
            raise AssertionError("records were read")

        return Site("site-001", never, key, replace(self.budget, **changes), self.coins)

    def debit(
        self,
        site: Site,
        config: RunConfig,
        releases: Sequence[tuple[str, int]] = (("rounds", 1),),
        schema: Schema = SCHEMA,
        run_id: str = "run-a",
        terms: str = "terms",
        known: Head = EMPTY,
    ) -> Head:
        """One debit of a run."""
        return site.debit(run_id, terms, releases, known, config, schema, plan(config))

    @property
    def entries(self) -> int:
        """How many entries the ledger has."""
        return self.ledger.read().head.number


@pytest.fixture
def books(tmp_path: Path, coins: Coins) -> Books:
    return Books(tmp_path, coins)


class TestDebit:
    def test_binds_reserves_and_commits(self, books: Books, plain: RunConfig) -> None:
        head = books.debit(books.site(), plain, [("rounds", 1), ("evaluations", 1)])
        read = books.ledger.read()
        assert head == read.head
        # Opened, the data set's terms, the run's reservation, two commits.
        assert head.number == 5
        run = read.runs["run-a"]
        assert (run.last, run.made) == ({"rounds": 1, "evaluations": 1},) * 2
        assert set(read.datasets) == {"data"}

    def test_again_of_the_same_run_only_commits(self, books: Books, plain: RunConfig) -> None:
        site = books.site()
        books.debit(site, plain)
        head = books.debit(site, plain, [("rounds", 2)])
        assert head.number == 5

    def test_each_release_once(self, books: Books, plain: RunConfig) -> None:
        site = books.site()
        books.debit(site, plain)
        for _ in range(2):
            with pytest.raises(BudgetError, match="release 1 asked, 1 of 2 are used up"):
                books.debit(site, plain)
        # Nor by another site object, as after a restart.
        with pytest.raises(BudgetError, match="release 1 asked"):
            books.debit(books.site(), plain)

    def test_all_of_it_or_none(self, books: Books, plain: RunConfig) -> None:
        site = books.site()
        books.debit(site, plain, [("evaluations", 1)])
        with pytest.raises(BudgetError, match="evaluations: release 1 asked"):
            books.debit(site, plain, [("rounds", 1), ("evaluations", 1)])
        assert books.ledger.read().runs["run-a"].made == {"rounds": 0, "evaluations": 1}
        books.debit(site, plain, [("rounds", 1), ("evaluations", 2)])

    def test_what_is_not_in_the_plan_is_refused(self, books: Books, plain: RunConfig) -> None:
        for part, index in (("rounds", 3), ("evaluations", 3), ("training_figures", 1)):
            with pytest.raises(BudgetError, match=part):
                books.debit(books.site(), plain, [(part, index)])
        assert books.entries == 1

    def test_a_run_on_other_terms_is_refused(self, books: Books, plain: RunConfig) -> None:
        books.debit(books.site(), plain)
        with pytest.raises(TermsError, match="was reserved on other terms"):
            books.debit(books.site(), plain, [("rounds", 2)], terms="other")

    def test_a_run_without_a_price_overdraws_any_limit(
        self, books: Books, plain: RunConfig
    ) -> None:
        site = books.site(lifetime=Lifetime(100.0, 0.5))
        with pytest.raises(BudgetError, match="account data/record/training: epsilon 0 of 100"):
            books.debit(site, plain)
        assert books.ledger.read().runs == {}

    def test_a_run_that_is_refused_leaves_no_trace(self, books: Books, plain: RunConfig) -> None:
        """Or whoever is refused would have fixed the terms of all later runs."""
        with pytest.raises(BudgetError):
            books.debit(books.site(lifetime=Lifetime(100.0, 0.5)), plain)
        assert books.ledger.read().datasets == {}
        assert books.entries == 1

    def test_the_price_is_this_sites_own(self, books: Books, make_config: MakeConfig) -> None:
        priced = make_config(privacy={"epsilon": 2.0, "sampling_rate": 1.0})
        enough = books.site(lifetime=Lifetime(2.0, 1e-5))
        books.debit(enough, priced)
        statements = books.ledger.read().statements()
        assert [str(found.account) for found in statements] == [
            "account data/record/holdout", "account data/record/training",
        ]  # fmt: skip
        assert [found.epsilon for found in statements] == [
            plan(priced).holdout_epsilon, plan(priced).training_epsilon,
        ]  # fmt: skip
        with pytest.raises(BudgetError, match=r"is spent, .* more is asked"):
            books.debit(enough, priced, run_id="run-b")

    def test_an_older_copy_is_noticed(self, books: Books, plain: RunConfig, tmp_path: Path) -> None:
        first = books.debit(books.site(), plain)
        books.ledger.close()
        shutil.copy(books.path, tmp_path / "copy")
        books.ledger = Ledger.open(books.path)
        books.budget = replace(books.budget, ledger=books.ledger)
        later = books.debit(books.site(), plain, [("rounds", 2)], known=first)
        books.ledger.close()
        shutil.copy(tmp_path / "copy", books.path)
        books.ledger = Ledger.open(books.path)
        books.budget = replace(books.budget, ledger=books.ledger)
        with pytest.raises(DamagedError, match="an older copy was put in its place"):
            books.debit(books.site(), plain, [("rounds", 2)], known=later)
        assert books.ledger.read().head == first

    def test_another_ledger_is_noticed(self, books: Books, plain: RunConfig) -> None:
        with pytest.raises(DamagedError, match="is another than is known elsewhere"):
            books.debit(books.site(), plain, known=Head(1, "0" * 64))
        assert books.entries == 1


class TestSplitTerms:
    """A record that changed its side would pay from two accounts: what decides on it stays."""

    OTHERS: Mapping[str, dict[str, dict[str, Any]]] = {
        "holdout": {"data": {"holdout": 0.25}},
        "no holdout": {"data": {"holdout": 0.0}},
        "audit": {"data": {"audit": 0.0}},
        "type_error": {"clean": {"type_error": "drop"}},
        "out_of_bounds": {"clean": {"out_of_bounds": "missing"}},
    }

    def other(self, make_config: MakeConfig, **changes: dict[str, Any]) -> RunConfig:
        data = {"holdout": 0.3, "audit": 0.2, **changes.pop("data", {})}
        return make_config(privacy={"mechanism": "none"}, data=data, **changes)

    @pytest.mark.parametrize("name", OTHERS)
    def test_none_of_them_may_change(
        self, books: Books, plain: RunConfig, make_config: MakeConfig, name: str
    ) -> None:
        books.debit(books.site(), plain)
        entries = books.entries
        changed = self.other(make_config, **self.OTHERS[name])
        with pytest.raises(TermsError, match="may never change its side; keep it"):
            books.debit(books.site(), changed, run_id="run-b")
        assert books.entries == entries

    def test_nor_may_the_key(self, books: Books, plain: RunConfig) -> None:
        books.debit(books.site(), plain)
        with pytest.raises(TermsError, match="split_key") as caught:
            books.debit(books.site(key=KEY[::-1]), plain, run_id="run-b")
        assert KEY.hex() not in str(caught.value)

    def test_nor_the_schema_where_a_record_is_known_by_its_content(
        self, books: Books, plain: RunConfig
    ) -> None:
        books.debit(books.site(), plain)
        with pytest.raises(TermsError, match="identity"):
            books.debit(
                books.site(),
                plain,
                schema=SCHEMA.model_copy(update={"classes": tuple("012345678")}),
                run_id="run-b",
            )

    def test_but_where_it_is_known_by_its_person(
        self, books: Books, plain: RunConfig, make_config: MakeConfig
    ) -> None:
        """A person's side is the person's key alone, whatever is declared or cleaned beside."""
        books.debit(books.site(), plain, schema=PERSONS)
        assert isinstance(PERSONS, TableSchema)
        wider = PERSONS.model_copy(update={"columns": PERSONS.columns[:1]})
        books.debit(books.site(), plain, schema=wider, run_id="run-b", terms="b")
        cleaned = self.other(make_config, clean={"out_of_bounds": "drop"})
        books.debit(books.site(), cleaned, schema=PERSONS, run_id="run-c", terms="c")
        for schema in (PERSONS.model_copy(update={"person": "town"}), TABLE):
            with pytest.raises(TermsError, match="identity"):
                books.debit(books.site(), plain, schema=schema, run_id="run-d")

    def test_nor_which_records_are_the_sites(self, books: Books, plain: RunConfig) -> None:
        books.debit(books.site(), plain)
        for origin in ({"shared_out": "column"}, {}, {"shared_out": "iid", "more": 1}):
            with pytest.raises(TermsError, match="keep it"):
                books.debit(books.site(origin=origin), plain, run_id="run-b")

    def test_what_decides_on_no_side_may(
        self, books: Books, plain: RunConfig, make_config: MakeConfig
    ) -> None:
        books.debit(books.site(), plain)
        later = self.other(
            make_config,
            federation={"rounds": 5, "seed": 9},
            model={"latent": 3},
            evaluation={"every": 0},
        )
        books.debit(books.site(), later, run_id="run-b", terms="b")

    def test_another_data_set_has_its_own(
        self, books: Books, plain: RunConfig, make_config: MakeConfig
    ) -> None:
        books.debit(books.site(), plain)
        other = self.other(make_config, data={"holdout": 0.1})
        books.debit(books.site(dataset_id="other"), other, run_id="run-b")

    def test_the_ledger_keeps_no_secret(self, books: Books, plain: RunConfig) -> None:
        books.debit(books.site(), plain)
        books.site().close()
        content = b"".join(file.read_bytes() for file in books.path.parent.iterdir())
        assert KEY not in content
        assert KEY.hex().encode() not in content


class TestCheck:
    """Whether a site would take part, before anything runs."""

    def test_changes_nothing(self, books: Books, plain: RunConfig) -> None:
        books.site().check("run-a", "terms", EMPTY, plain, SCHEMA, plan(plain))
        assert books.entries == 1
        books.debit(books.site(), plain)
        entries = books.entries
        books.site().check("run-a", "terms", EMPTY, plain, SCHEMA, plan(plain))
        assert books.entries == entries

    def test_says_what_a_debit_would(
        self, books: Books, plain: RunConfig, make_config: MakeConfig
    ) -> None:
        books.debit(books.site(), plain)
        changed = make_config(privacy={"mechanism": "none"}, data={"holdout": 0.1})
        limited = books.site(lifetime=Lifetime(3.0, 0.5))
        cases: list[tuple[Site, RunConfig, str, str, Head]] = [
            (books.site(), plain, "run-a", "other", EMPTY),
            (books.site(), changed, "run-b", "terms", EMPTY),
            (books.site(key=KEY[::-1]), plain, "run-b", "terms", EMPTY),
            (limited, plain, "run-b", "terms", EMPTY),
            (books.site(lifetime=Lifetime(None, 0.5, "rdp")), plain, "run-b", "terms", EMPTY),
            (books.site(), plain, "run-a", "terms", Head(99, "0" * 64)),
            (books.site(), plain, "run-a", "terms", Head(2, "0" * 64)),
        ]
        for site, config, run_id, terms, known in cases:
            with pytest.raises(LedgerError) as checked:
                site.check(run_id, terms, known, config, SCHEMA, plan(config))
            with pytest.raises(LedgerError) as debited:
                books.debit(site, config, run_id=run_id, terms=terms, known=known)
            assert type(checked.value) is type(debited.value)
            assert str(checked.value) == str(debited.value)


def test_not_even_a_mark_that_cannot_be_made_tells_of_a_failure(
    tmp_path: Path, budget: Budget
) -> None:
    """An error of the disk would make the site look unlike the others."""
    folder = tmp_path / "gone" / "site-001"
    one = Site("site-001", lambda _: None, KEY, budget, Coins.from_system(), folder)
    one.fail()
    one.succeed()
    assert one.failed


def test_a_mark_goes_when_the_site_has_taken_part_with_its_records(
    tmp_path: Path, budget: Budget
) -> None:
    folder = tmp_path / "site-001"
    one = Site("site-001", lambda _: None, KEY, budget, Coins.from_system(), folder)
    one.fail()
    assert (tmp_path / "site-001.failed").exists()
    one.succeed()
    assert not (tmp_path / "site-001.failed").exists()
    assert one.failures == 1


# Persons.


def of_persons(unit: str = "person", **data: Any) -> RunConfig:  # noqa: ANN401
    """A run over persons' records; its mechanism is not asked for here."""
    return RunConfig.model_validate(
        {
            "data": {
                "source": "here", "records": 1000, "holdout": 0.3, "audit": 0.2,
                **({"persons": 300} if unit == "person" else {}), **data,
            },
            "model": {"family": "vae"},
            "privacy": {"mechanism": "central", "unit": unit},
        }
    )  # fmt: skip


class TestPersons:
    # An age is given to one person only, so that a record tells whose it is.
    WHO = st.lists(st.integers(0, 30), max_size=60)

    @staticmethod
    def table(who: Sequence[int]) -> pl.DataFrame:
        names = [f"person {number}" for number in who]
        ages = [str(number) for number in who]
        return pl.DataFrame({"age": ages, "town": ["a"] * len(who), "who": names})

    @given(who=WHO, key=keys)
    def test_each_record_has_its_person_and_a_person_one_side(
        self, budget: Budget, who: list[int], key: bytes
    ) -> None:
        records = site(self.table(who), Coins(KEY), budget, key=key).records(of_persons(), PERSONS)
        seen: list[float] = []
        for name in SIDES:
            side = getattr(records, name)
            assert side.persons.dtype == torch.int64
            assert side.persons.shape == side.batch.y.shape
            ages = side.batch.x[:, 0].tolist()
            numbers = side.persons.tolist()
            assert sorted(set(numbers)) == list(range(len(set(ages))))
            assert len(set(zip(ages, numbers, strict=True))) == len(set(ages))
            seen += set(ages)
        assert len(seen) == len(set(seen)) == len(set(who))

    def test_a_missing_key_is_nobodys_and_its_record_is_dropped(
        self, coins: Coins, budget: Budget
    ) -> None:
        """Or all such records were one large person, or each a person of its own."""
        who = ["ann", "", None, "NA", " ", "?", "ann", "bob"]
        raw = pl.DataFrame({"age": ["30"] * 8, "town": ["a"] * 8, "who": who})
        records = site(raw, coins, budget).records(of_persons(holdout=0.0, audit=0.0), PERSONS)
        assert records.training.persons is not None
        assert records.training.persons.tolist() == [0, 0, 1]
        assert sizes(records) == (3, 0, 0)

    def test_blanks_around_a_key_do_not_make_another_person(
        self, coins: Coins, budget: Budget
    ) -> None:
        raw = pl.DataFrame({"age": ["30"] * 3, "town": ["a"] * 3, "who": ["ann", " ann", "ann\t"]})
        records = site(raw, coins, budget).records(of_persons(holdout=0.0, audit=0.0), PERSONS)
        assert records.training.persons is not None
        assert records.training.persons.tolist() == [0, 0, 0]

    def test_they_are_known_only_where_they_are_what_is_hidden(
        self, coins: Coins, budget: Budget
    ) -> None:
        one = site(self.table([1, 2, 2, 3] * 5), coins, budget)
        for unit in ("record", "person", "record"):
            records = one.records(of_persons(unit), PERSONS)
            assert [getattr(records, side).persons is not None for side in SIDES] == [
                unit == "person"
            ] * 3

    def test_a_schema_without_them_is_refused(self, coins: Coins, budget: Budget) -> None:
        """By content, equal records would be one person, and a person's records several."""
        with pytest.raises(ConfigError, match=r'^privacy\.unit = "person": '):
            site(self.table([1, 2]), coins, budget).records(of_persons(), TABLE)

    def test_no_records_are_of_nobody(self) -> None:
        side = no_records(PERSONS).training
        assert side.persons is not None
        assert (side.persons.dtype, side.persons.shape) == (torch.int64, (0,))


class TestSide:
    BATCH = Batch(torch.zeros(4, 2), torch.zeros(4).long())

    def test_weights_count_each_person_once(self) -> None:
        side = Side(self.BATCH, torch.tensor([1, 0, 1, 1]))
        weights = side.weights("person")
        assert weights is not None
        assert weights.tolist() == [1 / 3, 1.0, 1 / 3, 1 / 3]
        assert torch.equal(side.groups("person"), torch.tensor([1, 0, 1, 1]))  # type: ignore[arg-type]

    @pytest.mark.parametrize("unit", ["record", "site"])
    def test_of_another_unit_there_are_neither(self, unit: UnitName) -> None:
        side = Side(self.BATCH, torch.tensor([1, 0, 1, 1]))
        assert side.weights(unit) is None
        assert side.groups(unit) is None

    @pytest.mark.parametrize("persons", [None, torch.zeros(3).long()])
    def test_without_its_persons_it_hides_none(self, persons: Tensor | None) -> None:
        side = Side(self.BATCH, persons)
        for ask in (side.groups, side.weights):
            with pytest.raises(ValueError, match="not every record has one"):
                ask("person")
