"""Whether a site would take part: asked beforehand, and held against its owner's word each time.

A real site, opened from its kit, behind a real ClientApp.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedveil.client import app as client_module
from fedveil.client.app import client_app
from fedveil.client.approvals import approve, is_approved, pause, pending, resume
from fedveil.client.deployed import open_deployed
from fedveil.client.understanding import terms_of, understand
from fedveil.client.work import parts_of
from fedveil.config import RunConfig
from fedveil.data_prep import run_schema
from fedveil.data_prep.schema import parse_schema, schema_to_json
from fedveil.flower import Context, Message, RecordDict, set_identity, set_message_id
from fedveil.models import family
from fedveil.models.layers import initialise
from fedveil.models.state import to_arrays
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.noise import Coins
from fedveil.wire import (
    ADVERTISE,
    CONFIRM,
    DEAL,
    END,
    EVALUATE,
    NO_LEDGER,
    READY,
    TRAIN,
    UNMASK,
    Refusal,
    Refused,
    Step,
    Task,
    Update,
    pack,
    read_answer,
    read_reply,
    run_statement,
)

MakeConfig = Callable[..., RunConfig]
Kit = Any  # `conftest.SiteKit`; test modules cannot import it
NODE = 5
FAST = {"epsilon": 2.0, "sampling_rate": 1.0}  # priced in a moment
OPEN = 'mechanisms = ["central", "distributed"]\nencryption = ["none", "secagg", "sealed"]\n'


@pytest.fixture(autouse=True, scope="module")
def _identity() -> None:
    set_identity(1, 0)


class Asked:
    """A real site, what is asked of it, and what became of its ledger and records."""

    def __init__(self, made: Kit) -> None:
        self.made = made
        self.state: Path = made.folder / "state"
        self.open()

    def open(self, policy: str = OPEN, **lines: str) -> None:
        """Opens it anew, under another policy."""
        self.made.site_toml(policy, **lines)
        toml = (self.made.folder / "site.toml").read_text(encoding="utf-8")
        self.made.write("site.toml", toml.replace("records.csv", "records.npz"))
        self.close()
        self.site = open_deployed(self.made.kit, Coins(bytes(range(32))))

    def close(self) -> None:
        if hasattr(self, "site"):
            self.site.close()

    def message(self, content: RecordDict, action: str) -> Message:
        message = Message(content, NODE, action, group_id="1")
        set_message_id(message, "abc")
        return client_app(lambda _: self.site)(message, Context(1, NODE, {}, RecordDict(), {}))

    def ready(self, task: Task) -> Refusal | None:
        """Whether it would take part; `None` for yes."""
        found = read_answer(self.message(pack(task), READY))
        assert found.run_id == task.run_id
        if isinstance(found, Step):
            assert found == Step(task.run_id, b"")
            return None
        assert (found.round, found.evaluation) == (task.round, task.evaluation)
        return found.code

    def take_part(self, task: Task, action: str = TRAIN) -> Refusal | None:
        found = read_reply(self.message(pack(task), action))
        return found.code if isinstance(found, Refused) else None

    def step(self, action: str) -> Step | Refused:
        return read_answer(self.message(pack(Step("run-a", b"")), action))

    @property
    def entries(self) -> int:
        ledger = Ledger.open(self.state / "ledger.sqlite", read_only=True)
        try:
            return ledger.read().head.number
        finally:
            ledger.close()

    @property
    def was_read(self) -> bool:
        """Whether its records were ever read: it keeps a report of that."""
        folder: Path = self.state / "records"
        return folder.exists() or (self.state / "records.failed").exists()

    def signed(self, task: Task) -> Task:
        statement = run_statement(task.run_id, task.config, task.schema, task.aggregator)
        who = self.made.coordinator
        return replace(task, coordinator=who.public, signature=who.sign(statement))


@pytest.fixture
def ask(site_kit: Kit) -> Iterator[Asked]:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (40, 8, 8)).astype(np.uint8)
    np.savez(site_kit.folder / "records.npz", images=images, labels=np.arange(40) % 10)
    made = Asked(site_kit)
    yield made
    made.close()


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    return make_config(privacy=FAST).resolved()


@pytest.fixture
def summed(make_config: MakeConfig) -> RunConfig:
    return make_config(privacy={**FAST, "mechanism": "distributed"}).resolved()


def question(config: RunConfig, /, run: str = "run-a", **changes: Any) -> Task:  # noqa: ANN401
    """Whether a site is ready for a run, not signed yet."""
    shown = config.shared().model_dump_json(by_alias=True), schema_to_json(run_schema(config))
    task = Task(run, 0, 0, *shown, {}, {}, {}, NO_LEDGER)
    return replace(task, **changes)


def round_of(config: RunConfig, /, number: int = 1, run: str = "run-a") -> Task:
    """A round of it."""
    module = family("vae").build(config.model, run_schema(config))
    initialise(module, torch.Generator().manual_seed(0))
    norm = config.privacy.clipping_norm
    return question(config, run, round=number, arrays=to_arrays(module), clipping_norm=norm)


def terms(task: Task) -> str:
    return terms_of(task.config, task.schema)


class TestAQuestion:
    def test_is_answered_with_nothing_debited_and_no_record_read(
        self, ask: Asked, config: RunConfig, summed: RunConfig
    ) -> None:
        (ask.made.folder / "records.npz").unlink()
        for one in (config, summed):
            for _ in range(2):
                assert ask.ready(ask.signed(question(one))) is None
        assert (ask.entries, ask.was_read) == (1, False)
        assert not (ask.state / "secagg").exists()

    def test_does_not_stand_in_the_way_of_the_run(self, ask: Asked, config: RunConfig) -> None:
        for number in (1, 2):
            assert ask.ready(ask.signed(question(config))) is None
            assert ask.take_part(ask.signed(round_of(config, number))) is None
        assert ask.was_read

    @pytest.mark.parametrize(
        ("policy", "code"),
        [
            ("", Refusal.MECHANISM),
            ('mechanisms = ["central"]', Refusal.ENCRYPTION),
            (f'{OPEN}units = ["person"]', Refusal.UNIT),
            (f'{OPEN}families = ["gan"]', Refusal.FAMILY),
            (f"{OPEN}max_parameters = 9", Refusal.PARAMETERS),
            (f"{OPEN}epsilon_per_run = 1.0", Refusal.PRICE),
            (f'{OPEN}coordinator = "{"ab" * 32}"', Refusal.COORDINATOR),
            (f'{OPEN}approval = "manual"', Refusal.APPROVAL),
        ],
    )
    def test_is_refused_as_the_run_would_be(
        self, ask: Asked, config: RunConfig, policy: str, code: Refusal
    ) -> None:
        ask.open(policy)
        assert ask.ready(ask.signed(question(config))) is code
        assert ask.take_part(ask.signed(round_of(config))) is code
        assert (ask.entries, ask.was_read) == (1, False)

    def test_that_nobody_signed(self, ask: Asked, config: RunConfig) -> None:
        assert ask.ready(question(config)) is Refusal.COORDINATOR
        other = ask.signed(question(config, "run-b"))
        assert ask.ready(replace(other, run_id="run-a")) is Refusal.COORDINATOR

    def test_of_a_run_that_is_none(self, ask: Asked, config: RunConfig) -> None:
        assert ask.ready(ask.signed(question(config, config="{}"))) is Refusal.CONFIGURATION
        assert ask.ready(ask.signed(question(config, schema="{}"))) is Refusal.CONFIGURATION

    def test_by_what_is_no_task(self, ask: Asked) -> None:
        for content in (RecordDict(), pack(Step("run-a", b""))):
            found = read_answer(ask.message(content, READY))
            assert found == Refused("", 0, 0, Refusal.CONFIGURATION)

    @pytest.mark.parametrize(
        "changes",
        [{"round": 1}, {"evaluation": 1}, {"statistics": 1}, {"arrays": {"w": np.zeros(1)}}],
    )
    def test_asks_for_nothing_more(
        self, ask: Asked, config: RunConfig, changes: dict[str, Any]
    ) -> None:
        task = ask.signed(question(config, **changes))
        assert ask.ready(task) is Refusal.CONFIGURATION
        assert (ask.entries, ask.was_read) == (1, False)

    def test_beyond_the_budget(self, ask: Asked, make_config: MakeConfig) -> None:
        dear = make_config(privacy={**FAST, "epsilon": 10.5}).resolved()
        assert ask.ready(ask.signed(question(dear))) is Refusal.BUDGET
        assert ask.entries == 1

    def test_against_a_ledger_that_was_put_back(self, ask: Asked, config: RunConfig) -> None:
        task = question(config, ledger=(9, "a" * 64))
        assert ask.ready(ask.signed(task)) is Refusal.LEDGER

    def test_by_code_that_is_not_as_priced(
        self, ask: Asked, config: RunConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = SimpleNamespace(outcome="violated", failed=("noise",))
        monkeypatch.setattr(client_module, "_tested", lambda *_: (found,))
        assert ask.ready(ask.signed(question(config))) is None  # its owner asks for no test
        ask.site.policy = ask.site.policy.model_copy(update={"self_test": True})
        assert ask.ready(ask.signed(question(config))) is Refusal.CONFORMANCE

    def test_of_fewer_or_other_sites_than_it_knows(
        self, ask: Asked, make_config: MakeConfig
    ) -> None:
        private = {**FAST, "mechanism": "distributed"}
        four = make_config(federation={"sites": 4}, privacy=private).resolved()
        assert ask.ready(ask.signed(question(four))) is Refusal.PROTOCOL
        ask.open(f"{OPEN}min_sites = 4")
        three = make_config(privacy=private).resolved()
        assert ask.ready(ask.signed(question(three))) is Refusal.ROSTER

    def test_of_replies_that_cannot_be_sealed(self, ask: Asked, make_config: MakeConfig) -> None:
        sealed = make_config(privacy=FAST, aggregation={"encryption": "sealed"}).resolved()
        assert ask.ready(ask.signed(question(sealed))) is Refusal.PROTOCOL
        key = ask.signed(question(sealed, aggregator=bytes(range(32))))
        assert ask.ready(key) is None

    def test_by_a_map_that_does_not_fit(self, ask: Asked, config: RunConfig) -> None:
        """The server is told of the configuration only; the site would take part with nothing."""
        ask.open(section='[map]\nage = "alter"')
        assert ask.ready(ask.signed(question(config))) is Refusal.CONFIGURATION
        assert ask.take_part(ask.signed(round_of(config))) is Refusal.CONFIGURATION
        age = {"name": "age", "kind": "integer", "bounds": [0, 100]}
        sex = {"name": "sex", "kind": "categorical", "categories": ["f", "m"]}
        table = schema_to_json(parse_schema({"column": [age, sex]}, "s.toml"))
        assert ask.ready(ask.signed(question(config, schema=table))) is None
        ask.open(section='[map]\nagee = "alter"')
        assert ask.ready(ask.signed(question(config, schema=table))) is Refusal.CONFIGURATION
        assert (ask.entries, ask.was_read) == (1, False)


class TestApproval:
    @pytest.fixture
    def ask(self, ask: Asked) -> Asked:
        ask.open(f'{OPEN}approval = "manual"')
        return ask

    @pytest.mark.parametrize("asked_before", [False, True])
    def test_a_run_without_it_trains_on_nothing(
        self, ask: Asked, config: RunConfig, asked_before: bool
    ) -> None:
        """Whoever does not ask whether the site is ready gets no further."""
        if asked_before:
            assert ask.ready(ask.signed(question(config))) is Refusal.APPROVAL
        assert ask.take_part(ask.signed(round_of(config))) is Refusal.APPROVAL
        evaluation = ask.signed(question(config, evaluation=1))
        assert ask.take_part(evaluation, EVALUATE) is Refusal.APPROVAL
        assert (ask.entries, ask.was_read) == (1, False)

    def test_it_waits_with_what_it_asks(self, ask: Asked, config: RunConfig) -> None:
        task = ask.signed(question(config))
        assert ask.ready(task) is Refusal.APPROVAL
        (run,) = pending(ask.state)
        assert (run.run_id, run.terms) == ("run-a", terms(task))
        priced = understand(task.config, task.schema)
        assert run.asks == {
            "name": config.federation.name, "family": "vae", "parameters": priced.parameters,
            "rounds": 2, "statistics": False, "sites": 3, "unit": "record", "mechanism": "central",
            "encryption": "none", "epsilon": priced.priced.epsilon, "delta": priced.priced.delta,
            "n_min": None, "t_collude": None, "coordinator": ask.made.coordinator.public.hex(),
        }  # fmt: skip
        assert run.left == {"training": (10.0, 1e-4), "holdout": (10.0, 1e-4)}

    def test_what_is_left_is_without_earlier_runs(self, ask: Asked, config: RunConfig) -> None:
        assert ask.ready(ask.signed(question(config))) is Refusal.APPROVAL
        approve(ask.state, "run-a", "dr jones")
        assert ask.take_part(ask.signed(round_of(config))) is None
        assert ask.ready(ask.signed(question(config, "run-b"))) is Refusal.APPROVAL
        (run,) = pending(ask.state)
        epsilon, delta = run.left["training"]
        assert epsilon is not None
        assert delta is not None
        assert config.privacy.delta is not None
        assert 8.0 <= epsilon < 8.1
        assert delta == pytest.approx(1e-4 - config.privacy.delta)

    def test_approved_it_takes_part_and_outlives_a_restart(
        self, ask: Asked, config: RunConfig
    ) -> None:
        assert ask.ready(ask.signed(question(config))) is Refusal.APPROVAL
        approve(ask.state, "run-a", "dr jones")
        assert ask.ready(ask.signed(question(config))) is None
        assert ask.take_part(ask.signed(round_of(config))) is None
        ask.open(f'{OPEN}approval = "manual"')
        assert ask.take_part(ask.signed(round_of(config, 2))) is None

    def test_on_other_terms_it_is_held_anew(
        self, ask: Asked, config: RunConfig, make_config: MakeConfig
    ) -> None:
        assert ask.ready(ask.signed(question(config))) is Refusal.APPROVAL
        approve(ask.state, "run-a", "dr jones")
        longer = make_config(federation={"rounds": 3}, privacy=FAST).resolved()
        assert ask.take_part(ask.signed(round_of(longer))) is Refusal.APPROVAL
        assert (ask.entries, ask.was_read) == (1, False)
        (run,) = pending(ask.state)
        assert (run.run_id, run.asks["rounds"]) == ("run-a", 3)
        assert not is_approved(ask.state, "run-a", terms(question(longer)))

    def test_of_one_run_is_none_of_another(self, ask: Asked, config: RunConfig) -> None:
        assert ask.ready(ask.signed(question(config))) is Refusal.APPROVAL
        approve(ask.state, "run-a", "dr jones")
        assert ask.take_part(ask.signed(round_of(config, run="run-b"))) is Refusal.APPROVAL
        assert (ask.entries, ask.was_read) == (1, False)

    def test_what_would_be_refused_anyhow_is_not_put_before_the_owner(
        self, ask: Asked, config: RunConfig, make_config: MakeConfig
    ) -> None:
        dear = make_config(privacy={**FAST, "epsilon": 10.5}).resolved()
        assert ask.ready(ask.signed(question(dear))) is Refusal.BUDGET
        assert ask.ready(question(config)) is Refusal.COORDINATOR
        rolled = question(config, ledger=(9, "a" * 64))
        assert ask.ready(ask.signed(rolled)) is Refusal.LEDGER
        assert pending(ask.state) == []

    def test_a_run_s_name_is_no_path(self, ask: Asked, config: RunConfig) -> None:
        for name in ("../run", "a/b", "..", ""):
            task = ask.signed(question(config, name))
            assert ask.ready(task) is Refusal.CONFIGURATION
            assert ask.take_part(ask.signed(round_of(config, run=name))) is Refusal.CONFIGURATION
        assert not (ask.state / "approvals").exists()
        assert not list(Path(ask.made.folder.parent).glob("*.json"))


class TestAPause:
    def test_refuses_everything_until_it_ends(self, ask: Asked, config: RunConfig) -> None:
        assert ask.take_part(ask.signed(round_of(config))) is None
        entries = ask.entries
        pause(ask.state)  # in the middle of the run
        assert ask.ready(ask.signed(question(config))) is Refusal.PAUSED
        assert ask.take_part(ask.signed(round_of(config, 2))) is Refusal.PAUSED
        evaluation = ask.signed(question(config, evaluation=1))
        assert ask.take_part(evaluation, EVALUATE) is Refusal.PAUSED
        assert ask.entries == entries
        resume(ask.state)
        assert ask.take_part(ask.signed(round_of(config, 2))) is None

    def test_holds_back_what_was_computed_while_it_came(
        self, ask: Asked, config: RunConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        compute = parts_of

        def slow(*given: Any) -> Any:  # noqa: ANN401
            parts = compute(*given)
            pause(ask.state)
            return parts

        monkeypatch.setattr(client_module, "parts_of", slow)
        assert ask.take_part(ask.signed(round_of(config))) is Refusal.PAUSED

    @pytest.mark.parametrize("action", [ADVERTISE, DEAL, CONFIRM, UNMASK])
    def test_steps_of_a_secure_sum_too(self, ask: Asked, action: str) -> None:
        pause(ask.state)
        found = ask.step(action)
        assert isinstance(found, Refused)
        assert found.code is Refusal.PAUSED
        resume(ask.state)
        found = ask.step(action)
        assert isinstance(found, Refused)
        assert found.code is Refusal.PROTOCOL  # it was none anyhow

    def test_but_for_the_one_that_only_erases(self, ask: Asked) -> None:
        pause(ask.state)
        assert ask.step(END) == Step("run-a", b"")

    def test_which_makes_no_file_for_a_run_that_nobody_knows(self, ask: Asked) -> None:
        for number in range(3):
            content = pack(Step(f"run-{number}", b""))
            assert read_answer(ask.message(content, END)) == Step(f"run-{number}", b"")
        refused = read_answer(ask.message(pack(Step("../run-a", b"")), END))
        assert isinstance(refused, Refused)
        assert not list((ask.state / "secagg").glob("*"))

    def test_whoever_may_not_ask_is_not_told_of_it(self, ask: Asked, config: RunConfig) -> None:
        pause(ask.state)
        assert ask.ready(question(config)) is Refusal.COORDINATOR

    def test_an_approval_does_not_end_it(self, ask: Asked, config: RunConfig) -> None:
        ask.open(f'{OPEN}approval = "manual"')
        assert ask.ready(ask.signed(question(config))) is Refusal.APPROVAL
        approve(ask.state, "run-a", "dr jones")
        pause(ask.state)
        assert ask.take_part(ask.signed(round_of(config))) is Refusal.PAUSED
        assert (ask.entries, ask.was_read) == (1, False)


def test_an_update_is_of_the_records(ask: Asked, config: RunConfig) -> None:
    found = read_reply(ask.message(pack(ask.signed(round_of(config))), TRAIN))
    assert isinstance(found, Update)
    assert not (ask.state / "records.failed").exists()
    assert any(np.any(array) for array in found.arrays.values())
