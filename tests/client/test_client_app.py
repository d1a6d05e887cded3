"""The site's handlers, asked by real Flower messages: what they answer and what they never say."""

import json
import logging
import math
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from polars.exceptions import PanicException
from torch import nn

from fedveil.client import understanding, work
from fedveil.client.app import client_app
from fedveil.client.evaluation import holdout_sums
from fedveil.client.secure import Keys, SecureSite
from fedveil.client.site import Budget, Side, Site
from fedveil.client.training import train
from fedveil.config import Policy, RunConfig
from fedveil.data_prep import modality, run_schema
from fedveil.data_prep.clean import DataError
from fedveil.data_prep.images import Images
from fedveil.data_prep.partition import keyed_split
from fedveil.data_prep.schema import ImageSchema, Schema, schema_to_json
from fedveil.flower import (
    Array,
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    Message,
    RecordDict,
    set_identity,
    set_message_id,
)
from fedveil.models import Batch, family, metrics
from fedveil.models.layers import initialise
from fedveil.models.state import Arrays, load_arrays, to_arrays
from fedveil.privacy.accounting import AccountingError
from fedveil.privacy.ledger import Ledger, verify
from fedveil.privacy.limits import (
    BudgetError,
    DamagedError,
    LedgerError,
    Lifetime,
    TermsError,
    UnavailableError,
)
from fedveil.privacy.noise import Coins
from fedveil.privacy.secagg.encoding import decode
from fedveil.privacy.secagg.errors import SecAggError
from fedveil.privacy.secagg.keys import Identity, public_of
from fedveil.privacy.secagg.sealed import SealedReply, open_reply
from fedveil.privacy.secagg.terms import Floor
from fedveil.wire import (
    ADVERTISE,
    CONFIRM,
    DEAL,
    EVALUATE,
    NO_LEDGER,
    TRAIN,
    UNMASK,
    Refusal,
    Refused,
    Step,
    Task,
    Update,
    from_bytes,
    pack,
    read_answer,
    read_reply,
    run_statement,
    task_digest,
)

MakeConfig = Callable[..., RunConfig]
KEY = bytes(range(32))
PLANTED = "PATIENT-4711"
NODE = 5
FAST = {"epsilon": 2.0, "sampling_rate": 1.0}  # priced in a moment
DIGITS = ImageSchema(height=8, width=8, classes=tuple("0123456789"))
ANYTHING = Policy(self_test=False)
FACTS = {"run-id", "round", "evaluation", "statistics", "ledger-count", "ledger-hash"}


@pytest.fixture(autouse=True, scope="module")
def _identity() -> None:
    set_identity(1, 0)


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    """Without a mechanism, so that nothing has to be priced."""
    return make_config(privacy={"mechanism": "none"}).resolved()


def images(count: int, seed: int = 1) -> Images:
    """So many different images, all usable."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
    labels = np.array([str(index % 10) for index in range(count)])
    return Images(pixels, labels, np.ones(count, dtype=bool))


class Asked:
    """One site behind a real ClientApp, its ledger, and how often its data were read."""

    def __init__(
        self,
        ledger: Path,
        read: Callable[[], Any] | None,
        lifetime: Lifetime,
        policy: Policy,
        secure: SecureSite | None,
    ) -> None:
        self.reads, self.path = 0, ledger
        self._read = read or (lambda: images(40))
        self.ledger = Ledger.open(ledger, clock=noon)
        budget = Budget(self.ledger, "data", lifetime)
        coins = Coins(bytes(range(1, 33)))
        self.site = Site(
            "site-005", self._reading, KEY, budget, coins, secure=secure, policy=policy
        )
        self.app = client_app(lambda _: self.site)
        self.context = Context(1, NODE, {}, RecordDict(), {})

    def _reading(self, _: Schema) -> Any:  # noqa: ANN401
        self.reads += 1
        return self._read()

    def __call__(self, content: RecordDict, action: str = TRAIN) -> Message:
        return call(self.app, self.context, content, action)

    def answer(self, task: Task) -> Update | Refused:
        """What the site answers, as the server reads it."""
        return read_reply(self(pack(task), TRAIN if task.round else EVALUATE))

    @property
    def entries(self) -> int:
        """How many entries its ledger has."""
        return self.ledger.read().head.number

    def made(self, run_id: str = "run-a") -> dict[str, int]:
        """How many releases of a run are committed, as another process finds them."""
        ledger = Ledger.open(self.path, read_only=True)
        try:
            return dict(ledger.read().runs[run_id].made)
        finally:
            ledger.close()


Ask = Callable[..., Asked]


def noon() -> datetime:
    """A clock that stands, so that equal ledgers have equal heads."""
    return datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """Makes sites, each with a ledger of its own unless it is given one."""
    made: list[Asked] = []

    def make(
        read: Callable[[], Any] | None = None,
        *,
        ledger: Path | None = None,
        lifetime: Lifetime = Lifetime(None, 0.5),  # noqa: B008  it is frozen
        policy: Policy = ANYTHING,
        secure: SecureSite | None = None,
    ) -> Asked:
        if ledger is None:
            ledger = tmp_path / f"{len(made)}.sqlite"
            Ledger.create(ledger, "site-005", clock=noon)
        made.append(Asked(ledger, read, lifetime, policy, secure))
        return made[-1]

    yield make
    for site in made:
        site.site.close()


def call(app: ClientApp, context: Context, content: RecordDict, action: str = TRAIN) -> Message:
    """One message to an app and its reply."""
    message = Message(content, NODE, action, group_id="1")
    set_message_id(message, "abc")
    return app(message, context)


def initial(config: RunConfig) -> dict[str, np.ndarray]:
    """The model that a run starts from."""
    module = family("vae").build(config.model, run_schema(config))
    initialise(module, torch.Generator().manual_seed(0))
    return to_arrays(module)


def norm_of(config: RunConfig) -> float:
    """What the plan of a run bounds sums by."""
    return math.inf if config.privacy.mechanism == "none" else config.privacy.clipping_norm


def task_for(config: RunConfig, number: int = 1, /, **changes: Any) -> Task:  # noqa: ANN401
    """The server's request for one round."""
    values: dict[str, Any] = {
        "run_id": "run-a",
        "round": number,
        "evaluation": 0,
        "config": config.shared().model_dump_json(by_alias=True),
        "schema": schema_to_json(run_schema(config)),
        "arrays": initial(config) if number else {},
        "released": {},
        "exam": {},
        "ledger": NO_LEDGER,
        "clipping_norm": norm_of(config),
    }
    return Task(**(values | changes))


@lru_cache
def questions() -> Mapping[str, np.ndarray]:
    """An exam on digits, from synthetic records that are noise."""
    rng = np.random.default_rng(3)
    x = torch.from_numpy(rng.random((200, 1, 8, 8), dtype=np.float32))
    exam = metrics.prepare(Batch(x, torch.arange(200) % 10), DIGITS, seed=0)
    return metrics.exam_to_arrays(exam)


def evaluation_of(
    config: RunConfig,
    evaluation: int = 1,
    number: int = 0,
    **changes: Any,  # noqa: ANN401
) -> Task:
    """The server's request for an evaluation: alone, or along with a round."""
    asked = {"evaluation": evaluation, "released": initial(config), "exam": questions()}
    return task_for(config, number, **(asked | changes))


def updated(answer: Update | Refused) -> Update:
    """A site's part of a round."""
    assert isinstance(answer, Update)
    return answer


def outcome(answer: Update | Refused) -> Refusal | None:
    """Why a site refused, if it did."""
    return answer.code if isinstance(answer, Refused) else None


def refusal(answer: Update | Refused) -> Refusal:
    """Why a site refused."""
    assert isinstance(answer, Refused)
    return answer.code


def everything_in(message: Message) -> bytes:
    """All bytes and texts of a message, as it would travel and as it would be shown."""

    def deflated(part: Any) -> bytes:  # noqa: ANN401
        children = part.children or {}
        return bytes(part.deflate()) + b"".join(deflated(child) for child in children.values())

    return deflated(message) + repr(message).encode()


def unusable() -> Images:
    """Images of which none can be used."""
    return Images(
        np.zeros((9, 8, 8, 1), dtype=np.uint8), np.array(["?"] * 9), np.zeros(9, dtype=bool)
    )


def broken() -> Images:
    """Data that cannot be read at all."""
    raise DataError(PLANTED)


def crashing() -> Images:
    """Data that make the reader crash."""
    raise RuntimeError(PLANTED)


def strange() -> Images:
    """Data that can be read, but not cleaned."""
    return cast("Images", object())


FAILING = [unusable, broken, crashing, strange]


class TestAnswer:
    def test_an_update_of_exactly_the_trainable_arrays(self, config: RunConfig, ask: Ask) -> None:
        answer = ask().answer(task_for(config))
        assert isinstance(answer, Update)
        assert (answer.run_id, answer.round, answer.evaluation) == ("run-a", 1, 0)
        assert answer.sums == {}
        expected = initial(config)
        module = family("vae").build(config.model, run_schema(config))
        assert answer.arrays.keys() == set(family("vae").trainable(module))
        for name, array in answer.arrays.items():
            assert array.shape == expected[name].shape
            assert array.dtype == np.float64
            assert np.isfinite(array).all()

    def test_under_fedavg_a_change_of_the_model_in_float32(
        self, make_config: MakeConfig, ask: Ask
    ) -> None:
        averaged = make_config(
            privacy={"mechanism": "none"}, aggregation={"strategy": "fedavg"}
        ).resolved()
        answer = ask().answer(task_for(averaged))
        assert isinstance(answer, Update)
        expected = initial(averaged)
        assert answer.arrays.keys() == expected.keys()
        for name, array in answer.arrays.items():
            assert array.shape == expected[name].shape
            assert array.dtype == np.float32
            assert np.isfinite(array).all()
            # One step of Adam moves a weight by its rate; a whole model would be larger.
            assert np.abs(array).max() <= 1.001 * averaged.learning_rate

    def test_it_replies_to_the_message(self, config: RunConfig, ask: Ask) -> None:
        reply = ask()(pack(task_for(config)))
        assert reply.metadata.reply_to_message_id == "abc"
        assert reply.metadata.src_node_id == NODE
        assert set(reply.content) == {"facts", "arrays", "sums", "upload"}
        # Nothing is sealed or masked here, and so nothing is said twice.
        assert not reply.content["upload"]
        assert set(reply.content["facts"]) == FACTS

    def test_it_tells_the_head_of_its_ledger(self, config: RunConfig, ask: Ask) -> None:
        site = ask()
        for number in (1, 2):
            head = updated(site.answer(task_for(config, number))).ledger
            assert head == site.ledger.read().head
            assert verify(site.path).head == head

    def test_records_are_read_once_a_run(self, config: RunConfig, ask: Ask) -> None:
        site = ask()
        for number in (1, 2):
            assert isinstance(site.answer(task_for(config, number)), Update)
        assert site.reads == 1
        assert site.site.failed is False

    def test_under_central_the_sum_is_clipped_and_without_noise(
        self, make_config: MakeConfig, ask: Ask
    ) -> None:
        central = make_config(privacy=FAST).resolved()
        answer = ask(lambda: images(1)).answer(task_for(central))
        assert isinstance(answer, Update)
        norm = np.sqrt(sum(float(np.square(a).sum()) for a in answer.arrays.values()))
        # One record at most: the noise of this plan would be a norm of 20.
        assert norm <= central.privacy.clipping_norm


class TestCount:
    """Each round of a run is answered once, whatever becomes of it."""

    def test_the_same_round_again(self, config: RunConfig, ask: Ask) -> None:
        site = ask()
        assert isinstance(site.answer(task_for(config)), Update)
        assert refusal(site.answer(task_for(config))) is Refusal.BUDGET

    def test_an_earlier_round(self, config: RunConfig, ask: Ask) -> None:
        site = ask()
        assert isinstance(site.answer(task_for(config, 2)), Update)
        assert refusal(site.answer(task_for(config, 1))) is Refusal.BUDGET

    @pytest.mark.parametrize("number", [3, 100, 0, -1])
    def test_a_round_that_is_not_in_the_plan(
        self, config: RunConfig, number: int, ask: Ask
    ) -> None:
        site = ask()
        assert config.federation.rounds == 2
        assert refusal(site.answer(task_for(config, number))) is Refusal.BUDGET
        assert site.reads == 0

    def test_a_refused_round_costs_nothing(self, config: RunConfig, ask: Ask) -> None:
        site = ask()
        site.answer(task_for(config, 3))
        assert isinstance(site.answer(task_for(config, 1)), Update)

    def test_runs_are_counted_apart(self, config: RunConfig, ask: Ask) -> None:
        site = ask()
        assert isinstance(site.answer(task_for(config, 2)), Update)
        assert isinstance(site.answer(task_for(config, 1, run_id="run-b")), Update)

    def test_the_count_is_made_before_data_are_read(self, config: RunConfig, ask: Ask) -> None:
        spent_when_read: list[dict[str, int]] = []

        def read() -> Images:
            spent_when_read.append(site.made())
            raise OSError(PLANTED)

        site = ask(read)
        assert isinstance(site.answer(evaluation_of(config, 1, 1)), Update)
        assert spent_when_read
        assert all(spent == {"rounds": 1, "evaluations": 1} for spent in spent_when_read)
        reads = site.reads
        assert refusal(site.answer(task_for(config))) is Refusal.BUDGET
        assert site.reads == reads

    def test_a_round_that_failed_altogether_is_spent_too(
        self, config: RunConfig, monkeypatch: pytest.MonkeyPatch, ask: Ask
    ) -> None:
        site = ask()
        with monkeypatch.context() as patch:
            patch.setattr(work, "train", always_failing)
            assert refusal(site.answer(task_for(config))) is Refusal.FAILED
        assert refusal(site.answer(task_for(config))) is Refusal.BUDGET
        assert isinstance(site.answer(task_for(config, 2)), Update)

    def test_a_restart_forgets_nothing(self, config: RunConfig, ask: Ask) -> None:
        """Nor does what Flower keeps of a site count for anything."""
        first = ask()
        assert isinstance(first.answer(task_for(config)), Update)
        first.site.close()
        again = ask(ledger=first.path)
        again.context.state["run-a"] = ConfigRecord({"round": 0, "terms": "none"})
        assert refusal(again.answer(task_for(config))) is Refusal.BUDGET
        assert again.reads == 0
        assert isinstance(again.answer(task_for(config, 2)), Update)

    @pytest.mark.parametrize("copies", [2, 8])
    def test_many_copies_at_once_are_answered_once(
        self, config: RunConfig, copies: int, ask: Ask
    ) -> None:
        site = ask()
        start = threading.Barrier(copies)
        task = task_for(config)

        def answer() -> Update | Refused:
            start.wait(60)
            return site.answer(task)

        with ThreadPoolExecutor(copies) as pool:
            answers = [future.result() for future in [pool.submit(answer) for _ in range(copies)]]
        assert sum(isinstance(answer, Update) for answer in answers) == 1
        refused = [answer for answer in answers if isinstance(answer, Refused)]
        assert [refusal(answer) for answer in refused] == [Refusal.BUDGET] * (copies - 1)
        assert site.reads == 1
        assert site.made() == {"rounds": 1, "evaluations": 0}

    def test_nor_by_two_that_share_a_ledger(self, config: RunConfig, ask: Ask) -> None:
        """As two processes do: each has its own connection, and neither asks the other."""
        first = ask()
        sites = (first, ask(ledger=first.path))
        start = threading.Barrier(2)

        def answer(site: Asked, number: int) -> Update | Refused:
            start.wait(60)
            return site.answer(task_for(config, number))

        with ThreadPoolExecutor(2) as pool:
            for number in (1, 2):
                replies = [pool.submit(answer, site, number) for site in sites]
                outcomes = {outcome(reply.result()) for reply in replies}
                assert outcomes == {None, Refusal.BUDGET}
        assert sum(site.reads for site in sites) <= 2
        assert first.made() == {"rounds": 2, "evaluations": 0}

    def test_a_longer_plan_does_not_reopen_a_round(self, make_config: MakeConfig, ask: Ask) -> None:
        site = ask()
        for rounds in (2, 3):
            config = make_config(
                federation={"rounds": rounds}, privacy={"mechanism": "none"}
            ).resolved()
            answer = site.answer(task_for(config, 2))
            assert outcome(answer) is (None if rounds == 2 else Refusal.CONFIGURATION)

    def test_a_run_is_bound_to_its_first_price(self, make_config: MakeConfig, ask: Ask) -> None:
        """Or a server would ask for one more round at a time, each of a run that is not spent."""
        local = {**FAST, "mechanism": "local"}
        kept = {"holdout": 0.0}
        first = make_config(
            data=kept, privacy={**local, "epsilon": 1.0}, federation={"rounds": 1}
        ).resolved()
        site = ask()
        assert isinstance(site.answer(task_for(first)), Update)
        for rounds, epsilon in ((2, 1.0), (2, 1.5), (1, 1.5)):
            other = make_config(
                data=kept,
                privacy={**local, "epsilon": epsilon},
                federation={"rounds": rounds},
            ).resolved()
            assert refusal(site.answer(task_for(other, 2))) is Refusal.CONFIGURATION
        assert refusal(site.answer(task_for(first, 2))) is Refusal.BUDGET

    def test_a_panic_of_the_reader_is_a_site_without_records(
        self, config: RunConfig, ask: Ask
    ) -> None:
        """polars panics with what is no Exception; it must not get past the site either."""

        def read() -> Images:
            raise PanicException(PLANTED)

        site = ask(read)
        answer = site.answer(task_for(config))
        assert isinstance(answer, Update)
        assert not any(array.any() for array in answer.arrays.values())


CODES: dict[type[LedgerError], Refusal] = {
    BudgetError: Refusal.BUDGET,
    TermsError: Refusal.CONFIGURATION,
    DamagedError: Refusal.LEDGER,
    UnavailableError: Refusal.LEDGER,
    LedgerError: Refusal.LEDGER,
}


def edit(path: Path) -> None:
    """Changes one entry of a closed ledger, as somebody with an editor would."""
    connection = sqlite3.connect(path)
    connection.execute("UPDATE entries SET body = replace(body, 'site-005', 'site-006')")
    connection.commit()
    connection.close()


class TestLedger:
    """No debit, no data: whatever is wrong with a ledger, the site's records are not read."""

    @pytest.mark.parametrize("kind", CODES)
    def test_an_error_of_it_is_a_refusal_and_data_stay_unread(
        self, config: RunConfig, ask: Ask, monkeypatch: pytest.MonkeyPatch, kind: type[LedgerError]
    ) -> None:
        def fail(*arguments: object) -> None:
            raise kind(PLANTED)

        site = ask()
        monkeypatch.setattr(site.ledger, "debit", fail)
        reply = site(pack(evaluation_of(config, 1, 1)))
        assert refusal(read_reply(reply)) is CODES[kind]
        assert site.reads == 0
        assert PLANTED.encode() not in everything_in(reply)
        assert set(reply.content) == {"facts"}

    @pytest.mark.parametrize(
        "error",
        [OSError(PLANTED), sqlite3.OperationalError(PLANTED), KeyError(PLANTED), MemoryError()],
        ids=lambda error: type(error).__name__,
    )
    @pytest.mark.parametrize("step", ["check_head", "debit"])
    def test_so_is_one_that_nobody_foresaw_at_any_step(
        self,
        config: RunConfig,
        ask: Ask,
        monkeypatch: pytest.MonkeyPatch,
        step: str,
        error: Exception,
    ) -> None:
        def fail(*arguments: object) -> None:
            raise error

        site = ask()
        monkeypatch.setattr(site.ledger, step, fail)
        reply = site(pack(task_for(config)))
        assert refusal(read_reply(reply)) is Refusal.LEDGER
        assert site.reads == 0
        assert PLANTED.encode() not in everything_in(reply)

    def test_a_ledger_that_was_edited_admits_nothing(self, config: RunConfig, ask: Ask) -> None:
        site = ask()
        assert isinstance(site.answer(task_for(config)), Update)
        edit(site.path)

        def reopen(context: Context) -> Site:
            Ledger.open(site.path)
            raise AssertionError("it was opened")

        app = client_app(reopen)
        reply = call(app, site.context, pack(task_for(config, 2)))
        assert refusal(read_reply(reply)) is Refusal.LEDGER

    def test_nor_does_one_that_was_edited_while_it_was_open(
        self, config: RunConfig, ask: Ask
    ) -> None:
        site = ask()
        assert isinstance(site.answer(task_for(config)), Update)
        connection = sqlite3.connect(site.path)
        connection.execute(
            "DELETE FROM entries WHERE sequence = (SELECT max(sequence) FROM entries)"
        )
        connection.commit()
        connection.close()
        for number in (1, 2):
            assert refusal(site.answer(task_for(config, number))) is Refusal.LEDGER
        assert site.reads == 1

    @pytest.mark.parametrize("known", [(99, "0" * 64), (1, "0" * 64), (4, "f" * 64)])
    def test_a_head_that_the_server_knows_and_it_has_not_is_a_rolled_back_ledger(
        self, config: RunConfig, ask: Ask, known: tuple[int, str]
    ) -> None:
        site = ask()
        assert isinstance(site.answer(task_for(config)), Update)
        answer = site.answer(task_for(config, 2, ledger=known))
        assert refusal(answer) is Refusal.LEDGER
        assert site.reads == 1
        # The ledger is the truth, whatever a server pretends: nothing of it was spent.
        assert isinstance(site.answer(task_for(config, 2)), Update)

    def test_the_head_that_it_told_is_one_that_it_has(self, config: RunConfig, ask: Ask) -> None:
        site = ask()
        first = updated(site.answer(task_for(config)))
        second = updated(site.answer(task_for(config, 2, ledger=first.ledger)))
        assert second.ledger[0] > first.ledger[0]

    def test_an_old_copy_put_in_its_place_is_noticed(
        self, config: RunConfig, ask: Ask, tmp_path: Path
    ) -> None:
        site = ask()
        site.answer(task_for(config))
        site.site.close()
        old = site.path.read_bytes()
        again = ask(ledger=site.path)
        told = updated(again.answer(task_for(config, 2))).ledger
        again.site.close()
        restored = tmp_path / "restored.sqlite"
        restored.write_bytes(old)
        third = ask(ledger=restored)
        assert refusal(third.answer(task_for(config, 2, ledger=told))) is Refusal.LEDGER
        assert third.reads == 0

    def test_a_run_beyond_the_lifetime_is_refused_unread(
        self, make_config: MakeConfig, ask: Ask
    ) -> None:
        cheap = make_config(data={"holdout": 0.0}, privacy={**FAST, "epsilon": 1.0}).resolved()
        for lifetime in (Lifetime(0.5, 1e-4), Lifetime(2.0, 1e-6), Lifetime(1.5, 1e-5, "rdp")):
            site = ask(lifetime=lifetime)
            answers = [site.answer(task_for(cheap, run_id=run)) for run in ("run-a", "run-b")]
            expected = [None, Refusal.BUDGET] if lifetime.composition == "rdp" else [Refusal.BUDGET]
            assert [outcome(answer) for answer in answers] == (2 * expected)[:2]
            assert site.reads == (1 if lifetime.composition == "rdp" else 0)

    def test_a_run_without_noise_is_beyond_any_limit(self, config: RunConfig, ask: Ask) -> None:
        site = ask(lifetime=Lifetime(1e9, 0.5))
        assert refusal(site.answer(task_for(config))) is Refusal.BUDGET
        assert site.reads == 0

    def test_a_record_may_not_change_its_side(
        self, config: RunConfig, make_config: MakeConfig, ask: Ask
    ) -> None:
        site = ask()
        assert isinstance(site.answer(task_for(config)), Update)
        other = make_config(privacy={"mechanism": "none"}, data={"holdout": 0.2}).resolved()
        assert refusal(site.answer(task_for(other, run_id="run-b"))) is Refusal.CONFIGURATION
        assert site.reads == 1

    def test_codes_are_the_same_whatever_the_records_are(self, config: RunConfig, ask: Ask) -> None:
        """Of configuration and ledger only: a site whose records fail refuses like any other."""
        requests = [
            evaluation_of(config, 1, 1),
            task_for(config, 1),
            evaluation_of(config, 1),
            task_for(config, 3),
            task_for(config, 0),
            evaluation_of(config, 3),
            task_for(config, 2, config="{}"),
            task_for(config, 2, ledger=(99, "0" * 64)),
            task_for(config, 2, arrays={}),
            evaluation_of(config, 2),
        ]
        found = []
        for read in (None, partial(images, 0), partial(images, 1), *FAILING):
            site = ask(read)
            found.append([outcome(site.answer(task)) for task in requests])
        assert found[0] == [
            None,
            Refusal.BUDGET,
            Refusal.BUDGET,
            Refusal.BUDGET,
            Refusal.BUDGET,
            Refusal.BUDGET,
            Refusal.CONFIGURATION,
            Refusal.LEDGER,
            Refusal.FAILED,
            None,
        ]
        assert all(codes == found[0] for codes in found)


class TestEvaluation:
    @pytest.mark.parametrize("number", [0, 1])
    def test_it_is_answered_alone_or_along_with_a_round(
        self, config: RunConfig, number: int, ask: Ask
    ) -> None:
        site = ask()
        answer = updated(site.answer(evaluation_of(config, 1, number)))
        assert (answer.run_id, answer.round, answer.evaluation) == ("run-a", number, 1)
        assert answer.arrays.keys() == (initial(config).keys() if number else set())
        expected = {f"holdout/{name}": shape for name, shape in metrics.blocks(DIGITS).items()}
        assert {name: array.shape for name, array in answer.sums.items()} == expected
        assert all(array.dtype == np.float64 for array in answer.sums.values())
        assert site.made() == {"rounds": number, "evaluations": 1}

    def test_a_round_without_one_has_no_sums(self, config: RunConfig, ask: Ask) -> None:
        assert updated(ask().answer(task_for(config))).sums == {}

    def test_sums_are_of_the_held_out_records(self, config: RunConfig, ask: Ask) -> None:
        """By hand: how many there are, of which classes, and the clipped scores added up."""
        raw = images(200)
        sums = updated(ask(lambda: raw).answer(evaluation_of(config))).sums
        kind, schema = modality(DIGITS), run_schema(config)
        rows = keyed_split(kind.identities(raw, schema), KEY, 0.1, 0.0).holdout
        assert 5 < len(rows) < 40
        assert sums["holdout/count"].tolist() == [len(rows)]
        classes = np.bincount(np.arange(200)[rows] % 10, minlength=10)
        assert sums["holdout/one_way"].tolist() == classes.tolist()
        assert sums["holdout/tstr_mlp"].sum() == len(rows)
        encoded = kind.encode(raw, schema).take(rows)
        module = family("vae").build(config.model, schema)
        load_arrays(module, initial(config))
        scores = family("vae").scores(
            module, Batch(torch.from_numpy(encoded.x), torch.from_numpy(encoded.y))
        )
        # An untrained model's are within -64 to 0, which counts as 1 to -1.
        by_hand = (-1 - scores.double() / 32).sum()
        assert sums["holdout/loss"].tolist() == pytest.approx([float(by_hand)], rel=1e-5)

    @pytest.mark.parametrize("mechanism", ["central", "local", "none"])
    def test_each_side_decides_on_its_own_sums_alone(
        self, make_config: MakeConfig, ask: Ask, mechanism: str
    ) -> None:
        """Equal coins: one side's records are exchanged, and nothing of another side's moves."""
        config = figured(make_config, mechanism)
        schema, kind = run_schema(config), modality(DIGITS)
        pools = [images(120, seed) for seed in (1, 2)]
        first, second = (keyed_split(kind.identities(p, schema), KEY, 0.3, 0.3) for p in pools)
        # As many of each, so that the coins fall alike.
        counts = {n: min(len(getattr(first, n)), len(getattr(second, n))) for n in SIDES}

        def mixed(exchanged: str) -> Images:
            taken = [
                kind.take(pools[side == exchanged], getattr(sides, side)[: counts[side]])
                for side in SIDES
                for sides in [second if side == exchanged else first]
            ]
            return Images(
                *(np.concatenate(parts) for parts in zip(*map(fields, taken), strict=True))
            )

        answers = {}
        for exchanged in ("none of them", *SIDES):
            site = ask(partial(mixed, exchanged))
            answers[exchanged] = updated(site.answer(evaluation_of(config, 1, 1)))
            assert site.site.failed is False
        before = answers["none of them"]
        paid = mechanism != "none"
        assert ("training/loss" in before.sums) == paid
        assert "training/one_way" not in before.sums
        for exchanged, after in answers.items():
            moved = {n for n, sums in after.sums.items() if (sums != before.sums[n]).any()}
            assert {name.partition("/")[0] for name in moved} == {
                "holdout": {"holdout"}, "training": {"training"} if paid else set(),
            }.get(exchanged, set())  # fmt: skip
            trained = any((a != before.arrays[n]).any() for n, a in after.arrays.items())
            assert trained == (exchanged == "training")

    def test_training_and_audit_records_are_not_touched(
        self, config: RunConfig, ask: Ask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Poisoned: to look at one of them is an error, and the site would go on without any."""

        class Poison:
            def __getattribute__(self, name: str) -> object:
                raise AssertionError(f"{name} was looked at")

        expected = updated(ask(partial(images, 200)).answer(evaluation_of(config))).sums
        site = ask(partial(images, 200))
        records = site.site.records(config, run_schema(config))
        poison = cast("Side", Poison())
        monkeypatch.setattr(site.site, "_records", replace(records, training=poison, audit=poison))
        sums = updated(site.answer(evaluation_of(config))).sums
        assert site.site.failed is False
        assert sums["holdout/count"] > 0
        assert same(sums, expected)

    @pytest.mark.parametrize("number", [0, 1])
    def test_each_once(self, config: RunConfig, ask: Ask, number: int) -> None:
        site = ask()
        assert isinstance(site.answer(evaluation_of(config, 1, number)), Update)
        assert refusal(site.answer(evaluation_of(config, 1))) is Refusal.BUDGET
        assert refusal(site.answer(evaluation_of(config, 1, 2))) is Refusal.BUDGET
        assert isinstance(site.answer(evaluation_of(config, 2, 2)), Update)
        assert refusal(site.answer(evaluation_of(config, 3))) is Refusal.BUDGET

    @pytest.mark.parametrize("evaluation", [-1, 3, 100])
    def test_one_that_is_not_in_the_plan(
        self, config: RunConfig, ask: Ask, evaluation: int
    ) -> None:
        site = ask()
        assert config.evaluations == 2
        assert refusal(site.answer(evaluation_of(config, evaluation))) is Refusal.BUDGET
        assert site.reads == 0

    def test_none_is_in_a_plan_without_held_out_records(
        self, make_config: MakeConfig, ask: Ask
    ) -> None:
        config = make_config(privacy={"mechanism": "none"}, data={"holdout": 0.0}).resolved()
        site = ask()
        assert refusal(site.answer(evaluation_of(config, 1, 1))) is Refusal.BUDGET
        assert site.reads == 0
        assert site.entries == 1

    def test_it_and_the_round_are_committed_together_or_not_at_all(
        self, config: RunConfig, ask: Ask
    ) -> None:
        site = ask()
        assert isinstance(site.answer(evaluation_of(config, 1)), Update)
        entries = site.entries
        # The evaluation is used up; the round that came with it is not.
        assert refusal(site.answer(evaluation_of(config, 1, 1))) is Refusal.BUDGET
        assert site.entries == entries
        assert site.made() == {"rounds": 0, "evaluations": 1}
        answer = updated(site.answer(evaluation_of(config, 2, 1)))
        assert answer.ledger[0] == entries + 2
        # And the other way round: the round is used up, the evaluation is not.
        site = ask()
        assert isinstance(site.answer(task_for(config, 1)), Update)
        assert refusal(site.answer(evaluation_of(config, 1, 1))) is Refusal.BUDGET
        assert site.made() == {"rounds": 1, "evaluations": 0}
        assert isinstance(site.answer(evaluation_of(config, 1)), Update)

    def test_figures_of_training_records_are_a_third_release(
        self, make_config: MakeConfig, ask: Ask
    ) -> None:
        config = figured(make_config, "central")
        site = ask()
        answer = updated(site.answer(evaluation_of(config, 1, 1)))
        assert site.made() == {"rounds": 1, "evaluations": 1, "training_figures": 1}
        # Opened, the data set's terms, the reservation, three commits.
        assert answer.ledger[0] == 6
        trained = {name for name in answer.sums if name.startswith("training/")}
        assert trained == {"training/count", "training/loss"}
        schema, kind = run_schema(config), modality(DIGITS)
        rows = keyed_split(kind.identities(images(40), schema), KEY, 0.3, 0.3)
        assert answer.sums["training/count"].tolist() == [len(rows.training)]
        assert answer.sums["holdout/count"].tolist() == [len(rows.holdout)]
        assert refusal(site.answer(evaluation_of(config, 1))) is Refusal.BUDGET

    @pytest.mark.parametrize("mechanism", ["central", "local", "none"])
    @pytest.mark.parametrize("read", [broken, crashing])
    def test_a_site_whose_records_fail_sends_sums_without_them(
        self, make_config: MakeConfig, ask: Ask, mechanism: str, read: Callable[[], Images]
    ) -> None:
        config = figured(make_config, mechanism)
        failed, empty = ask(read), ask(partial(images, 0))
        answers = [updated(site.answer(evaluation_of(config, 1, 1))) for site in (failed, empty)]
        assert failed.site.failed
        assert same(answers[0].sums, answers[1].sums)
        assert same(answers[0].arrays, answers[1].arrays)
        assert answers[0].ledger == answers[1].ledger
        assert failed.made() == empty.made()
        assert failed.made()["rounds"] == failed.made()["evaluations"] == 1
        noise = any(array.any() for array in answers[0].sums.values())
        assert noise == (mechanism == "local")

    def test_what_a_held_out_record_breaks_leaves_training_as_it_was(
        self, config: RunConfig, ask: Ask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Or one record would decide on both accounts."""
        whole = updated(ask(partial(images, 200)).answer(evaluation_of(config, 1, 1)))
        nobody = updated(ask(partial(images, 0)).answer(evaluation_of(config, 1, 1)))
        monkeypatch.setattr(work, "holdout_sums", only_without_records(holdout_sums, 2))
        site = ask(partial(images, 200))
        answer = updated(site.answer(evaluation_of(config, 1, 1)))
        assert site.site.failed
        assert same(answer.arrays, whole.arrays)
        assert same(answer.sums, nobody.sums)

    def test_nor_does_a_training_record_break_evaluation(
        self, config: RunConfig, ask: Ask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = updated(ask(partial(images, 200)).answer(evaluation_of(config, 1, 1)))
        monkeypatch.setattr(work, "train", only_without_records(train, 1))
        answer = updated(ask(partial(images, 200)).answer(evaluation_of(config, 1, 1)))
        assert not any(array.any() for array in answer.arrays.values())
        assert same(answer.sums, whole.sums)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda asked: asked["exam"].popitem(),
            lambda asked: asked["exam"].update(more=np.zeros(1)),
            lambda asked: asked["exam"].update({"mlp/edges": np.zeros(3)}),
            lambda asked: asked["exam"].clear(),
            lambda asked: asked["released"].popitem(),
            lambda asked: asked["released"].clear(),
        ],
        ids=["less", "more", "edges", "no exam", "released less", "no model"],
    )
    def test_questions_that_are_none_of_ours(
        self,
        config: RunConfig,
        ask: Ask,
        spoil: Callable[[dict[str, dict[str, np.ndarray]]], object],
    ) -> None:
        asked = {"exam": dict(questions()), "released": initial(config)}
        spoil(asked)
        site = ask()
        task = replace(evaluation_of(config), exam=asked["exam"], released=asked["released"])
        assert refusal(site.answer(task)) is Refusal.FAILED
        assert site.reads == 0


SIDES = ("training", "holdout", "audit")


def figured(make_config: MakeConfig, mechanism: str) -> RunConfig:
    """A run with all three sides that also pays for figures of training records."""
    return make_config(
        data={"holdout": 0.3, "audit": 0.3},
        privacy={**FAST, "mechanism": mechanism},
        evaluation={"training_share": 0.2, "every": 0},
    ).resolved()


def fields(raw: Images) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays of images."""
    return raw.pixels, raw.labels, raw.usable


def same(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> bool:
    """The same names, and bitwise the same arrays."""
    return first.keys() == second.keys() and all(
        first[name].tobytes() == second[name].tobytes() for name in first
    )


def only_without_records(work: Callable[..., Arrays], place: int) -> Callable[..., Arrays]:
    """The same work, but it fails if the side that is its argument there holds any record."""

    def fail(*arguments: Any) -> Arrays:  # noqa: ANN401
        if len(arguments[place].batch.y):
            raise ValueError(PLANTED)
        return work(*arguments)

    return fail


class TestConfiguration:
    @pytest.mark.parametrize(
        "text",
        ["", "nonsense", "[]", "3", "{}", '{"data": {}, "model": {"family": "vae"}}'],
    )
    def test_no_configuration(self, config: RunConfig, text: str, ask: Ask) -> None:
        site = ask()
        answer = site.answer(task_for(config, config=text))
        assert refusal(answer) is Refusal.CONFIGURATION
        assert site.reads == 0

    @pytest.mark.parametrize(
        ("section", "option", "value"),
        [
            ("privacy", "epsilon", -1.0),
            ("privacy", "mechanism", "trust-me"),
            ("privacy", "noise_multiplier", 0.0),
            ("federation", "rounds", 0),
            ("model", "family", "gan-from-the-server"),
            ("data", "records", None),
        ],
    )
    def test_a_configuration_that_is_not_acceptable(
        self, config: RunConfig, section: str, option: str, value: object, ask: Ask
    ) -> None:
        raw = json.loads(config.model_dump_json(by_alias=True))
        raw[section][option] = value
        if option == "records":
            raw["data"]["source"] = "elsewhere.csv"
        site = ask()
        answer = site.answer(task_for(config, config=json.dumps(raw)))
        assert refusal(answer) is Refusal.CONFIGURATION
        assert (answer.run_id, answer.round) == ("run-a", 1)
        assert site.reads == 0

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "nonsense",
            "[]",
            "{}",
            '{"modality": "sound"}',
            '{"modality": ["image"]}',
            '{"modality": "image", "height": 7, "width": 8}',
        ],
    )
    def test_no_schema(self, config: RunConfig, text: str, ask: Ask) -> None:
        site = ask()
        answer = site.answer(task_for(config, schema=text))
        assert refusal(answer) is Refusal.CONFIGURATION
        assert site.reads == 0

    def test_persons_that_the_schema_does_not_know(self, make_config: MakeConfig, ask: Ask) -> None:
        """Whatever a server sends: nothing would say whose records are to be hidden."""
        config = make_config(
            data={"persons": 900}, privacy={"mechanism": "none", "unit": "person"}
        ).resolved()
        site = ask()
        assert refusal(site.answer(task_for(config))) is Refusal.CONFIGURATION
        assert (site.reads, site.entries) == (0, 1)

    def test_the_site_prices_the_run_itself(self, make_config: MakeConfig, ask: Ask) -> None:
        """The server claims nothing that counts: an unreachable budget is refused unread."""
        cheap = make_config(privacy={"epsilon": 1e-7}).resolved()
        site = ask()
        assert refusal(site.answer(task_for(cheap))) is Refusal.CONFIGURATION
        assert site.reads == 0
        # Nor was anything counted for it.
        assert site.entries == 1

    def test_a_price_in_doubt_is_a_refusal(
        self, config: RunConfig, monkeypatch: pytest.MonkeyPatch, ask: Ask
    ) -> None:
        def doubt(config: RunConfig) -> None:
            raise AccountingError("the accountants disagree")

        monkeypatch.setattr(understanding, "plan", doubt)
        renamed = config.model_dump(by_alias=True)
        renamed["federation"]["name"] = "in-doubt"
        site = ask()
        answer = site.answer(task_for(RunConfig.model_validate(renamed)))
        assert isinstance(answer, Refused)
        assert site.reads == 0


COORDINATOR, SEALING = Identity(bytes(range(64, 96))), bytes(range(96, 128))


def signed(task: Task, who: Identity = COORDINATOR) -> Task:
    """A task that somebody signed."""
    statement = run_statement(task.run_id, task.config, task.schema, task.aggregator)
    return replace(task, coordinator=who.public, signature=who.sign(statement))


class TestTheOwnersPolicy:
    """Whatever breaks it is refused by its own code, before anything is debited or read."""

    @pytest.mark.parametrize(
        ("options", "code"),
        [
            ({"mechanisms": ("local", "site")}, Refusal.MECHANISM),
            ({"encryption": ("sealed", "secagg")}, Refusal.ENCRYPTION),
            ({"units": ("person",)}, Refusal.UNIT),
            ({"families": ("gan",)}, Refusal.FAMILY),
            ({"max_parameters": 100}, Refusal.PARAMETERS),
            ({"epsilon_per_run": 1.9}, Refusal.PRICE),
            ({"delta_per_run": 1e-9}, Refusal.PRICE),
            ({"coordinator": COORDINATOR.public.hex()}, Refusal.COORDINATOR),
            ({}, None),
        ],
        ids=lambda value: next(iter(value), "none") if isinstance(value, dict) else None,
    )
    def test_each_rule_has_its_code(
        self,
        make_config: MakeConfig,
        ask: Ask,
        options: dict[str, Any],
        code: Refusal | None,
    ) -> None:
        central = make_config(privacy=FAST).resolved()
        site = ask(policy=ANYTHING.model_copy(update=options))
        assert outcome(site.answer(task_for(central))) is code
        assert (site.reads, site.entries) == ((1, 4) if code is None else (0, 1))

    def test_numbers_of_a_secure_sum_below_its_floor(
        self, make_config: MakeConfig, ask: Ask, tmp_path: Path
    ) -> None:
        summed = make_config(
            privacy={"mechanism": "none"}, aggregation={"encryption": "secagg"}
        ).resolved()
        site = ask(policy=ANYTHING.model_copy(update={"min_sites": 4}), secure=keys(tmp_path))
        assert refusal(site.answer(task_for(summed))) is Refusal.ROSTER
        assert (site.reads, site.entries) == (0, 1)

    def test_a_run_that_the_expected_coordinator_signed(self, config: RunConfig, ask: Ask) -> None:
        policy = ANYTHING.model_copy(update={"coordinator": COORDINATOR.public.hex()})
        site = ask(policy=policy)
        assert outcome(site.answer(signed(task_for(config)))) is None
        # What a round brings is not part of the run.
        assert outcome(site.answer(signed(task_for(config, 2)))) is None

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda task: replace(task, signature=b""),
            lambda task: replace(task, signature=bytes(64)),
            lambda task: replace(task, coordinator=b""),
            lambda task: signed(task, Identity(bytes(32))),
            lambda task: replace(signed(task, Identity(bytes(32))), coordinator=task.coordinator),
            lambda task: replace(task, run_id="run-b"),
            lambda task: replace(task, aggregator=public_of(SEALING)),
            lambda task: replace(task, config=task.config.replace('"seed":0', '"seed":1')),
            lambda task: replace(task, schema=task.schema.replace('"0"', '"zero"')),
        ],
        ids=[
            "none", "zeros", "nobody", "another", "another's", "run", "aggregator", "config",
            "schema",
        ],
    )  # fmt: skip
    def test_one_that_it_did_not(
        self, config: RunConfig, ask: Ask, spoil: Callable[[Task], Task]
    ) -> None:
        good = signed(task_for(config))
        spoilt = spoil(good)
        assert spoilt != good
        site = ask(policy=ANYTHING.model_copy(update={"coordinator": COORDINATOR.public.hex()}))
        assert refusal(site.answer(spoilt)) is Refusal.COORDINATOR
        assert (site.reads, site.entries) == (0, 1)


class TestClippingNorm:
    """The server says it, for it may adapt; otherwise it is the plan's, or a sum has another."""

    @pytest.mark.parametrize("norm", [0.0, 0.5, 2.0, math.nan, math.inf, -1.0])
    def test_another_than_was_priced_is_refused(
        self, make_config: MakeConfig, ask: Ask, norm: float
    ) -> None:
        central = make_config(privacy=FAST).resolved()
        site = ask()
        answer = site.answer(task_for(central, clipping_norm=norm))
        assert refusal(answer) is Refusal.CONFIGURATION
        assert (site.reads, site.entries) == (0, 1)
        assert outcome(site.answer(task_for(central))) is None

    def test_one_where_there_is_no_mechanism_as_well(self, config: RunConfig, ask: Ask) -> None:
        answer = ask().answer(task_for(config, clipping_norm=1.0))
        assert refusal(answer) is Refusal.CONFIGURATION

    def test_one_that_adapts_is_within_what_may_be_asked_for(
        self, make_config: MakeConfig, ask: Ask
    ) -> None:
        adaptive = make_config(
            data={"holdout": 0.0},
            privacy={"mechanism": "site", "clipping": "adaptive", "epsilon": 8.0},
            aggregation={"encryption": "none"},
        ).resolved()
        site = ask()
        for norm in (0.0, -1.0, 9e-7, 1.1e6, math.inf, math.nan):
            answer = site.answer(task_for(adaptive, clipping_norm=norm))
            assert refusal(answer) is Refusal.CONFIGURATION, norm
        assert (site.reads, site.entries) == (0, 1)
        for number, norm in ((1, 0.03), (2, 40.0)):
            answer = site.answer(task_for(adaptive, number, clipping_norm=norm))
            assert updated(answer).sums.keys() == {"clipping/within"}


def keys(folder: Path) -> SecureSite:
    """A site's secrets."""
    identity = Identity(KEY)
    secrets = Keys(identity, {"site-005": identity.public}, folder / "secagg", KEY[::-1])
    return SecureSite("site-005", secrets, Floor(2, 2, 0))


KNOWN = Identity(KEY[::-1])
"""The coordinator that a site knows, for whom it seals."""


def signed_by(task: Task) -> Task:
    """The task, signed by that coordinator."""
    statement = run_statement(task.run_id, task.config, task.schema, task.aggregator)
    return replace(task, coordinator=KNOWN.public, signature=KNOWN.sign(statement))


SEALS = Policy(self_test=False, coordinator=KNOWN.public.hex())


class TestSealed:
    @pytest.fixture
    def sealed(self, make_config: MakeConfig) -> RunConfig:
        return make_config(
            privacy={"mechanism": "none"}, aggregation={"encryption": "sealed"}
        ).resolved()

    def test_a_reply_is_for_the_aggregator_only_and_the_same_inside(
        self, config: RunConfig, sealed: RunConfig, ask: Ask, tmp_path: Path
    ) -> None:
        plain = updated(ask().answer(evaluation_of(config, 1, 1)))
        site = ask(secure=keys(tmp_path), policy=SEALS)
        task = signed_by(evaluation_of(sealed, 1, 1, aggregator=public_of(SEALING)))
        packed = pack(task)
        reply = site(packed)
        answer = updated(read_reply(reply))
        # Outside stands what any reply tells, and no array.
        assert (answer.run_id, answer.round, answer.evaluation) == ("run-a", 1, 1)
        assert (answer.arrays, answer.sums) == ({}, {})
        assert answer.ledger == site.ledger.read().head
        assert set(reply.content["facts"]) == FACTS
        # Inside stands what would have come in the open, by equal coins.
        sent, pinned = decode(SealedReply, answer.upload), {"site-005": Identity(KEY).public}
        opened = from_bytes(open_reply(sent, pinned, SEALING, task_digest(packed)))
        assert replace(opened, arrays={}, sums={}) == replace(answer, upload=b"")
        assert same(opened.arrays, plain.arrays)
        assert same(opened.sums, plain.sums)
        first = next(iter(plain.arrays.values()))
        assert first.tobytes() not in answer.upload
        with pytest.raises(SecAggError):
            open_reply(sent, pinned, SEALING[::-1], task_digest(packed))

    def test_without_an_identity_nothing_leaves_the_site(self, sealed: RunConfig, ask: Ask) -> None:
        task = signed_by(task_for(sealed, aggregator=public_of(SEALING)))
        assert refusal(ask(policy=SEALS).answer(task)) is Refusal.PROTOCOL

    def test_nor_for_a_key_that_no_known_coordinator_has_signed(
        self, sealed: RunConfig, ask: Ask, tmp_path: Path
    ) -> None:
        """Whoever relays a task could put a key of its own in the place of the server's."""
        task = signed_by(task_for(sealed, aggregator=public_of(SEALING)))
        site = ask(secure=keys(tmp_path), policy=SEALS)
        relayed = replace(task, aggregator=public_of(SEALING[::-1]))
        assert refusal(site.answer(relayed)) is Refusal.COORDINATOR
        stranger = ask(secure=keys(tmp_path / "other"))  # it knows no coordinator
        assert refusal(stranger.answer(task)) is Refusal.COORDINATOR
        assert (site.entries, stranger.reads) == (1, 0)

    @pytest.mark.parametrize("key", [b"", bytes(32), b"short"])
    def test_nor_for_a_key_that_is_none(
        self, sealed: RunConfig, ask: Ask, tmp_path: Path, key: bytes
    ) -> None:
        site = ask(secure=keys(tmp_path), policy=SEALS)
        task = signed_by(task_for(sealed, aggregator=key))
        assert refusal(site.answer(task)) is Refusal.PROTOCOL
        assert (site.reads, site.entries) == (0, 1)


class TestStepsOfASecureSum:
    @pytest.mark.parametrize("action", [ADVERTISE, DEAL, CONFIRM, UNMASK])
    def test_what_is_none_is_refused_and_touches_nothing(
        self, ask: Ask, tmp_path: Path, action: str
    ) -> None:
        site = ask(secure=keys(tmp_path))
        for content in (
            pack(Step("run-a", b"")),
            pack(Step("run-a", b"nonsense")),
            pack(Step("../run", b"nonsense")),
            pack(Update("run-a", 1, 0, {}, {}, NO_LEDGER)),
            RecordDict(),
        ):
            answer = read_answer(site(content, action))
            assert isinstance(answer, Refused)
            assert answer.code is Refusal.PROTOCOL
        assert (site.reads, site.entries) == (0, 1)
        assert not list(tmp_path.rglob("*.state"))

    def test_nor_does_a_site_without_keys_take_part(
        self, make_config: MakeConfig, ask: Ask
    ) -> None:
        site = ask()
        answer = read_answer(site(pack(Step("run-a", b"")), ADVERTISE))
        assert isinstance(answer, Refused)
        summed = make_config(
            privacy={"mechanism": "none"}, aggregation={"encryption": "secagg"}
        ).resolved()
        assert refusal(site.answer(task_for(summed))) is Refusal.PROTOCOL
        assert (site.reads, site.entries) == (0, 1)

    def test_a_round_that_was_not_set_up_is_refused_before_it_is_debited(
        self, make_config: MakeConfig, ask: Ask, tmp_path: Path
    ) -> None:
        summed = make_config(
            privacy={"mechanism": "none"}, aggregation={"encryption": "secagg"}
        ).resolved()
        site = ask(secure=keys(tmp_path))
        for opening in (b"", b"nonsense"):
            answer = site.answer(task_for(summed, opening=opening))
            assert refusal(answer) is Refusal.PROTOCOL
        assert (site.reads, site.entries) == (0, 1)


class TestMalformed:
    @pytest.mark.parametrize(
        "content",
        [
            RecordDict(),
            RecordDict({"facts": ConfigRecord({"run-id": "run-a"})}),
            RecordDict({"facts": ConfigRecord({"round": 1}), "arrays": ArrayRecord({})}),
            pack(Update("run-a", 1, 0, {}, {}, NO_LEDGER)),
            pack(Refused("run-a", 1, 0, Refusal.FAILED)),
        ],
        ids=["empty", "no round", "no run", "an update", "a refusal"],
    )
    def test_what_is_no_task_is_refused(self, content: RecordDict, ask: Ask) -> None:
        site = ask()
        assert refusal(read_reply(site(content))) is Refusal.CONFIGURATION
        assert site.reads == 0

    @pytest.mark.parametrize("encoding", ["numpy.ndarray", "safetensors"])
    @pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"PK\x05\x06" + bytes(18)])
    def test_so_are_arrays_that_are_none(
        self, config: RunConfig, data: bytes, encoding: str, ask: Ask
    ) -> None:
        content = pack(task_for(config))
        array = Array("uint8", (len(data),), encoding, data)
        content["arrays"] = ArrayRecord({"safetensors": array})
        site = ask()
        assert refusal(read_reply(site(content))) is Refusal.CONFIGURATION
        assert site.reads == 0

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda arrays: arrays.popitem(),
            lambda arrays: arrays.update(more=np.zeros(1, dtype=np.float32)),
            lambda arrays: arrays.update({"posterior.bias": arrays["posterior.bias"][:1]}),
            lambda arrays: arrays.update(
                {"posterior.bias": np.full_like(arrays["posterior.bias"], np.nan)}
            ),
            lambda arrays: arrays.update(
                {"posterior.bias": arrays["posterior.bias"].astype(np.float64)}
            ),
        ],
        ids=["missing", "foreign", "short", "nan", "float64"],
    )
    def test_arrays_that_do_not_fit_the_model(
        self, config: RunConfig, spoil: Callable[[dict[str, np.ndarray]], object], ask: Ask
    ) -> None:
        arrays = initial(config)
        spoil(arrays)
        site = ask()
        assert refusal(site.answer(task_for(config, arrays=arrays))) is Refusal.FAILED
        assert site.reads == 0


KINDS = [RuntimeError, OSError, KeyError, ValueError, TypeError, DataError, MemoryError]


def always_failing(*arguments: object) -> Arrays:
    """Work that fails whatever the records are."""
    raise RuntimeError(f"no {PLANTED}")


class TestSecrecy:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_text_of_an_exception_stays(
        self, config: RunConfig, kind: type[Exception], caplog: pytest.LogCaptureFixture, ask: Ask
    ) -> None:
        def read() -> Images:
            raise kind(f"cannot read {PLANTED}")

        site = ask(read)
        with caplog.at_level(logging.ERROR, "fedveil.client"):
            reply = site(pack(task_for(config)))
        # It takes part like any other; that it failed is for its own log.
        assert isinstance(read_reply(reply), Update)
        assert set(reply.content["facts"]) == FACTS
        assert PLANTED.encode() not in everything_in(reply)
        assert site.site.failed is True
        assert "site-005" in caplog.text
        assert PLANTED in caplog.text

    @pytest.mark.parametrize("kind", KINDS)
    def test_where_it_fails_without_records_too(
        self,
        config: RunConfig,
        kind: type[Exception],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        ask: Ask,
    ) -> None:
        sizes: list[int] = []

        def fail(module: nn.Module, records: Side, *arguments: object) -> Arrays:
            sizes.append(len(records.batch.y))
            raise kind(f"no {PLANTED}")

        monkeypatch.setattr(work, "train", fail)
        with caplog.at_level(logging.ERROR, "fedveil.client"):
            reply = ask(lambda: images(0))(pack(task_for(config)))
        assert refusal(read_reply(reply)) is Refusal.FAILED
        assert PLANTED.encode() not in everything_in(reply)
        assert PLANTED in caplog.text
        assert sizes == [0, 0]

    def test_of_a_module_that_cannot_be_built_too(
        self, config: RunConfig, monkeypatch: pytest.MonkeyPatch, ask: Ask
    ) -> None:
        def build(*arguments: object) -> nn.Module:
            raise ValueError(PLANTED)

        unbuildable = replace(family("vae"), build=build)
        task = pack(task_for(config))
        understanding.understand.cache_clear()
        for module, code in ((understanding, Refusal.CONFIGURATION), (work, Refusal.FAILED)):
            with monkeypatch.context() as patch:
                patch.setattr(module, "family", lambda _: unbuildable)
                site = ask()
                reply = site(task)
            assert refusal(read_reply(reply)) is code
            assert PLANTED.encode() not in everything_in(reply)
            assert site.reads == 0

    def test_of_opening_the_site_too(self, config: RunConfig) -> None:
        def open_site(context: Context) -> Site:
            raise FileNotFoundError(f"/srv/{PLANTED}.parquet")

        context = Context(1, NODE, {}, RecordDict(), {})
        reply = call(client_app(open_site), context, pack(task_for(config)))
        assert refusal(read_reply(reply)) is Refusal.LEDGER
        assert PLANTED.encode() not in everything_in(reply)

    def test_of_data_that_cannot_be_used_too(self, config: RunConfig, ask: Ask) -> None:
        def read() -> Images:
            raise DataError(f'column "age" = {PLANTED}')

        reply = ask(read)(pack(task_for(config)))
        assert isinstance(read_reply(reply), Update)
        assert PLANTED.encode() not in everything_in(reply)

    def test_a_reply_holds_no_count_and_no_loss(self, config: RunConfig, ask: Ask) -> None:
        replies = []
        for count in (17, 23):
            reply = ask(partial(images, count))(pack(task_for(config)))
            replies.append(dict(reply.content["facts"]))
        assert replies[0] == replies[1]
        assert set(replies[0]) == FACTS


class TestDataThatFailAltogether:
    """Whether a site's data failed is private: it takes part like any other."""

    @pytest.mark.parametrize("read", FAILING)
    def test_zeros_under_central(
        self, make_config: MakeConfig, read: Callable[[], Images], ask: Ask
    ) -> None:
        central = make_config(privacy=FAST).resolved()
        site = ask(read)
        answer = site.answer(task_for(central))
        assert isinstance(answer, Update)
        expected = initial(central)
        assert answer.arrays.keys() == expected.keys()
        for name, array in answer.arrays.items():
            assert array.shape == expected[name].shape
            assert array.dtype == np.float64
            assert not array.any(), name
        assert site.site.failed is (read is not unusable)

    @pytest.mark.parametrize("read", FAILING)
    def test_noise_under_local(
        self, make_config: MakeConfig, read: Callable[[], Images], ask: Ask
    ) -> None:
        local = make_config(privacy={**FAST, "mechanism": "local"}).resolved()
        answer = ask(read).answer(task_for(local))
        assert isinstance(answer, Update)
        assert answer.arrays.keys() == initial(local).keys()
        # Adam's first step on noise moves every weight by the learning rate.
        for name, array in answer.arrays.items():
            assert np.abs(array) == pytest.approx(local.learning_rate, rel=0.05), name

    @pytest.mark.parametrize("mechanism", ["central", "local", "none"])
    @pytest.mark.parametrize("read", FAILING)
    def test_a_failing_site_says_what_one_without_records_says(
        self, make_config: MakeConfig, mechanism: str, read: Callable[[], Images], ask: Ask
    ) -> None:
        """To the byte under equal coins: the failure itself draws none."""
        config = make_config(privacy={**FAST, "mechanism": mechanism}).resolved()
        replies = [ask(each)(pack(task_for(config))) for each in (read, partial(images, 0))]
        failed, empty = (read_reply(reply) for reply in replies)
        assert isinstance(failed, Update)
        assert isinstance(empty, Update)
        assert failed.arrays.keys() == empty.arrays.keys()
        for name, array in failed.arrays.items():
            assert array.dtype == empty.arrays[name].dtype, name
            assert array.tobytes() == empty.arrays[name].tobytes(), name
        assert dict(replies[0].content["facts"]) == dict(replies[1].content["facts"])

    @pytest.mark.parametrize("strategy", ["adam", "fedavg"])
    def test_nothing_of_a_training_that_failed_is_sent(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, strategy: str, ask: Ask
    ) -> None:
        """It fails in the midst of its records, when the module has already learned from them."""
        config = make_config(
            privacy={"mechanism": "none"}, aggregation={"strategy": strategy}
        ).resolved()

        def halfway(module: nn.Module, records: Side, *rest: Any) -> Arrays:  # noqa: ANN401
            if len(records.batch.y):
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.add_(1)
                raise RuntimeError(PLANTED)
            return train(module, records, *rest)

        monkeypatch.setattr(work, "train", halfway)
        site = ask()
        reply = site(pack(task_for(config)))
        assert PLANTED.encode() not in everything_in(reply)
        answer = read_reply(reply)
        assert isinstance(answer, Update)
        assert site.site.failed is True
        for name, array in initial(config).items():
            kind = np.float32 if strategy == "fedavg" else np.float64
            expected = np.zeros(array.shape, dtype=kind)
            assert answer.arrays[name].dtype == expected.dtype, name
            assert answer.arrays[name].tobytes() == expected.tobytes(), name

    def test_it_tries_its_records_again_in_the_next_round(
        self, config: RunConfig, ask: Ask
    ) -> None:
        def read() -> Images:
            return broken() if site.reads == 1 else images(40)

        site = ask(read)
        first, second = (site.answer(task_for(config, number)) for number in (1, 2))
        assert isinstance(first, Update)
        assert isinstance(second, Update)
        assert not any(array.any() for array in first.arrays.values())
        assert any(array.any() for array in second.arrays.values())
        # That it has failed once is not forgotten.
        assert site.site.failed is True


def test_held_out_and_audit_records_never_train(make_config: MakeConfig, ask: Ask) -> None:
    """Labels tell the sides apart: training records are 1, all the others 9.

    The prior starts uniform, so its cross-entropy has gradient gain * (n / 10 - n_k) for class k:
    the reply itself says which labels, and how many, were trained on.
    """
    config = make_config(
        data={"holdout": 0.3, "audit": 0.3},
        privacy={"mechanism": "none", "sampling_rate": 1.0},
        aggregation={"strategy": "sgd"},
    ).resolved()
    schema = run_schema(config)
    kind = modality(schema)
    chosen: list[Mapping[str, np.ndarray]] = []
    for label, wanted in (("1", True), ("9", False)):
        candidates = images(90, seed=int(label))
        candidates.labels[:] = label
        sides = keyed_split(kind.identities(candidates, schema), KEY, 0.3, 0.3)
        rows = sides.training if wanted else np.concatenate([sides.holdout, sides.audit])
        taken = kind.take(candidates, rows)
        chosen.append({"pixels": taken.pixels, "labels": taken.labels})
    trained, kept = (len(part["labels"]) for part in chosen)
    assert trained > 20
    assert kept > 40
    raw = Images(
        np.concatenate([part["pixels"] for part in chosen]),
        np.concatenate([part["labels"] for part in chosen]),
        np.ones(trained + kept, dtype=bool),
    )
    answer = ask(lambda: raw).answer(task_for(config))
    assert isinstance(answer, Update)
    module = family("vae").build(config.model, schema)
    gain = float(module.prior.gain)  # type: ignore[union-attr,arg-type]
    expected = np.full(10, trained / 10)
    expected[1] -= trained
    assert answer.arrays["prior.weights.weight"].ravel() / gain == pytest.approx(expected, rel=1e-4)
