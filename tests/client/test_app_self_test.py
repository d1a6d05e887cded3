"""A site tests its own code before it debits or reads anything, and refuses what is not as priced.

Asked by real Flower messages, with fixed coins.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedveil.client import app as client_module
from fedveil.client.app import client_app
from fedveil.client.self_test import ConformanceError, self_test
from fedveil.client.site import Budget, Site
from fedveil.client.understanding import understand
from fedveil.config import Policy, RunConfig
from fedveil.data_prep import run_schema
from fedveil.data_prep.images import Images
from fedveil.data_prep.schema import Schema, schema_to_json
from fedveil.flower import Context, Message, RecordDict, set_identity, set_message_id
from fedveil.models import family
from fedveil.models.layers import initialise
from fedveil.models.state import to_arrays
from fedveil.privacy import vector
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.limits import Lifetime
from fedveil.privacy.noise import Coins
from fedveil.privacy.shared_noise import choose_grid
from fedveil.wire import NO_LEDGER, TRAIN, Refusal, Refused, Task, pack, read_reply

MakeConfig = Callable[..., RunConfig]
FAST = {"epsilon": 2.0, "sampling_rate": 1.0}  # priced in a moment
NODE = 5


@pytest.fixture(autouse=True, scope="module")
def _identity() -> None:
    set_identity(1, 0)


class Asked:
    """One site behind a real ClientApp, its ledger, and how often its data were read."""

    def __init__(self, path: Path) -> None:
        Ledger.create(path, "site-005")
        self.reads, self.ledger = 0, Ledger.open(path)
        budget = Budget(self.ledger, "data", Lifetime(None, 0.5))
        self.site = Site("site-005", self._read, bytes(32), budget, Coins(bytes(range(32))))
        self.app = client_app(lambda _: self.site)
        self.context = Context(1, NODE, {}, RecordDict(), {})

    def _read(self, _: Schema) -> Images:
        self.reads += 1
        pixels = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
        labels = np.array([str(index % 10) for index in range(40)])
        return Images(pixels, labels, np.ones(40, dtype=bool))

    def answer(self, task: Task) -> Refusal | None:
        """Why the site refuses; `None` if it takes part."""
        message = Message(pack(task), NODE, TRAIN, group_id="1")
        set_message_id(message, "abc")
        found = read_reply(self.app(message, self.context))
        return found.code if isinstance(found, Refused) else None

    @property
    def entries(self) -> int:
        """How many entries its ledger has."""
        return self.ledger.read().head.number


Ask = Callable[[], Asked]


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """Makes sites, each with a ledger of its own."""
    made: list[Asked] = []

    def make() -> Asked:
        made.append(Asked(tmp_path / f"{len(made)}.sqlite"))
        return made[-1]

    yield make
    for site in made:
        site.site.close()


def task_for(config: RunConfig, number: int = 1) -> Task:
    """The server's request for a round."""
    schema = run_schema(config)
    module = family("vae").build(config.model, schema)
    initialise(module, torch.Generator().manual_seed(0))
    return Task(
        run_id="run-a",
        round=number,
        evaluation=0,
        config=config.shared().model_dump_json(by_alias=True),
        schema=schema_to_json(schema),
        arrays=to_arrays(module),
        released={},
        exam={},
        ledger=NO_LEDGER,
        clipping_norm=config.privacy.clipping_norm
        if config.privacy.mechanism != "none"
        else np.inf,
    )


class TestConformance:
    """A site tests its own code before it debits or reads anything."""

    @pytest.fixture(autouse=True)
    def _untested(self) -> Iterator[None]:
        """No self-test that another test made counts."""
        client_module._tested.cache_clear()
        yield
        client_module._tested.cache_clear()

    @pytest.fixture
    def priced(self, make_config: MakeConfig) -> RunConfig:
        return make_config(privacy=FAST).resolved()

    def test_code_that_is_not_as_priced_is_not_run(
        self,
        priced: RunConfig,
        ask: Ask,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        real = Coins.gaussian
        monkeypatch.setattr(Coins, "gaussian", lambda *asked: 0.9 * real(*asked))
        site = ask()
        before = site.entries
        for number in (1, 1, 2):
            assert site.answer(task_for(priced, number)) is Refusal.CONFORMANCE
        assert (site.reads, site.entries) == (0, before)
        assert "self-test: noise" in caplog.text
        assert "is not as priced; do not run this code" in caplog.text

    def test_nor_is_one_with_a_grid_for_too_few(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of the run's own vector, too: this fault shows in a long one only."""
        config = make_config(privacy={**FAST, "mechanism": "distributed"}).resolved()
        task = task_for(config)
        understood = understand(task.config, task.schema)
        client_module._check_conformance(understood)
        real = choose_grid
        monkeypatch.setattr(vector, "choose_grid", lambda z, c, d, *h: real(z, c, min(d, 9999), *h))
        client_module._check_conformance(replace(understood, parameters=9999))
        with pytest.raises(ConformanceError, match="noise on the grid"):
            client_module._check_conformance(replace(understood, parameters=500_000))

    def test_right_code_is_tested_once_a_run(
        self, priced: RunConfig, ask: Ask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[RunConfig] = []
        real = self_test

        def counted(config: RunConfig, *rest: Any, **options: Any) -> Any:  # noqa: ANN401
            made.append(config)
            return real(config, *rest, **options)

        monkeypatch.setattr(client_module, "self_test", counted)
        sites = [ask(), ask()]
        with ThreadPoolExecutor(2) as pool:  # the second waits for the first one's verdict
            answers = list(pool.map(lambda site: site.answer(task_for(priced)), sites))
        answers += [site.answer(task_for(priced, 2)) for site in sites]
        assert answers == [None] * 4
        assert len(made) == 1
        client_module._tested.cache_clear()  # as another process
        assert ask().answer(task_for(priced)) is None
        assert len(made) == 2

    def test_an_owner_may_go_without(
        self, priced: RunConfig, ask: Ask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client_module, "self_test", unreachable)
        site = ask()
        site.site.policy = Policy(self_test=False)
        assert site.answer(task_for(priced)) is None
        assert site.reads == 1

    def test_a_run_without_noise_has_none(
        self, make_config: MakeConfig, ask: Ask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client_module, "self_test", unreachable)
        config = make_config(privacy={"mechanism": "none"}).resolved()
        assert ask().answer(task_for(config)) is None

    def test_what_the_policy_forbids_is_refused_first(
        self, priced: RunConfig, ask: Ask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client_module, "self_test", unreachable)
        site = ask()
        site.site.policy = Policy(mechanisms=("distributed",))
        assert site.answer(task_for(priced)) is Refusal.MECHANISM


def unreachable(*arguments: object, **options: object) -> None:
    raise RuntimeError("must not be called")
