"""A federation in one process whose every message and vector a test may look at, lose or alter."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from fedveil.client import own_files
from fedveil.client import secure as client_secure
from fedveil.client.app import client_app
from fedveil.config import RunConfig
from fedveil.data_prep import modality, run_schema
from fedveil.flower import Message
from fedveil.models import family
from fedveil.models.layers import initialise
from fedveil.models.metrics import exam_to_arrays
from fedveil.models.state import to_arrays
from fedveil.privacy import vector
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import plan
from fedveil.privacy.secagg.quantise import quantise
from fedveil.privacy.secagg.site import Site as Party
from fedveil.server import coordinator as coordinator_module
from fedveil.server.collect import open_channel
from fedveil.server.coordinator import coordinator
from fedveil.server.evaluation import questions
from fedveil.server.replies import Collected
from fedveil.server.secure import Sum
from fedveil.server.simulation.local import local_grid
from fedveil.server.simulation.recorder import Alter, Crossing, RecordingGrid, passed_on
from fedveil.server.simulation.sites import load_shards, pin_identities, simulated_site
from fedveil.server.store import RunFolder
from fedveil.wire import Task

if TYPE_CHECKING:
    from fedveil.client.site import Site

RUN = f"{7:016x}"
RECORDS = 30


@dataclass(frozen=True)
class Made:
    """A site's vector before it was masked: with its noise, and without."""

    noised: np.ndarray
    clear: np.ndarray


class World:
    """Sites, and a server's channel to them over a recorded grid; rounds are asked for one by one.

    Attributes:
        alter: What happens to each message on its way; a test changes it as it goes.
        made: Each vector that a site made, by site, in order.
        sums: Each sum that the server got, as it got it.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        stack: ExitStack,
        change: Callable[[Any], Any],
    ) -> None:
        self.config, self.folder = config.resolved(), folder
        self.schema, self.plan = run_schema(self.config), plan(self.config)
        self.alter: Alter = passed_on
        self.made: dict[int, list[Made]] = {}
        self.sums: list[Sum] = []
        folder.mkdir(parents=True, exist_ok=True)
        RunFolder(folder).describe(self.config, self.schema)
        self._shards = load_shards(self.config, self.schema)
        self._change = change
        pin_identities(self.config.federation.sites, folder)
        self.sites: dict[int, Site] = {}
        for number in range(1, self.config.federation.sites + 1):
            self.start(number)
        stack.callback(self.close)
        app = client_app(lambda context: self.sites[context.node_id])
        inner = stack.enter_context(local_grid(app, list(self.sites), int(RUN, 16)))
        self.grid = RecordingGrid(inner, self._altered)
        kind = family(self.config.model.family)
        self.module = kind.build(self.config.model, self.schema)
        initialise(self.module, torch.Generator().manual_seed(0))
        self.model = to_arrays(self.module)
        self.channel = self.open()

    def close(self) -> None:
        """All sites' processes end."""
        for site in self.sites.values():
            site.close()

    def _altered(self, crossing: Crossing) -> Message | None:
        return self.alter(crossing)

    def start(self, number: int) -> None:
        """A site's process begins, on the files that it may have left."""
        if number in self.sites:
            self.sites[number].close()
        records = self._shards.report.records
        few = np.arange(RECORDS)  # a round then takes a moment
        raw = modality(self.schema).take(self._shards.parts[number - 1], few)
        site = simulated_site(number, self._change(raw), self.folder, self.config, records)
        site.coins = Coins(bytes([number]) * 32)
        self.sites[number] = site

    def open(self) -> Any:  # noqa: ANN401
        """The server's process begins, on the files that it may have left."""
        parameters = to_arrays(self.module, family(self.config.model.family).trainable(self.module))
        nodes = {number: number for number in self.sites}
        channel = open_channel(
            self.grid,
            nodes,
            self.config,
            self.schema,
            self.plan,
            RUN,
            parameters,
            RunFolder(self.folder),
            coordinator(self.folder),
        )
        if channel.secure is not None:
            collect = channel.secure.collect

            def kept(*arguments: Any) -> Sum:  # noqa: ANN401
                self.sums.append(collect(*arguments))
                return self.sums[-1]

            channel.secure.collect = kept  # type: ignore[method-assign, assignment]
        self.channel = channel
        return channel

    def task(self, number: int, evaluation: int = 0, **changes: Any) -> Task:  # noqa: ANN401
        """What a round or an evaluation asks for; the model is the same in each."""
        exam = questions(self.model, self.config, self.schema) if evaluation else None
        values: dict[str, Any] = {
            "round": number,
            "evaluation": evaluation,
            "arrays": self.model if number else {},
            "released": self.model if exam else {},
            "exam": exam_to_arrays(exam) if exam else {},
        }
        asked: Task = self.channel.question(self.plan.clipping_norm)
        return replace(asked, **(values | changes))

    def ask(
        self,
        number: int,
        evaluation: int = 0,
        ledgers: Mapping[int, tuple[int, str]] | None = None,
        **changes: Any,  # noqa: ANN401
    ) -> Collected:
        """One round."""
        found: Collected = self.channel.ask(self.task(number, evaluation, **changes), ledgers or {})
        return found

    def plain_sum(self, sites: tuple[int, ...], *, noised: bool = True) -> np.ndarray:
        """The sum of the last vectors of some sites modulo 2^32, in Python's own integers."""
        last = [self.made[site][-1] for site in sites]
        vectors = [(one.noised if noised else one.clear).tolist() for one in last]
        return np.array([sum(c) % 2**32 for c in zip(*vectors, strict=True)], dtype=np.uint32)

    def check_sum(self, *sites: int) -> None:
        """The last sum is that of these sites' vectors, to the bit."""
        found = self.sums[-1]
        assert found.sites == sites
        assert np.array_equal(found.total, self.plain_sum(sites))

    def entries(self, number: int) -> dict[str, int]:
        """How many releases of each part a site's ledger has committed for the run."""
        books = self.sites[number]._budget.ledger.read()
        made = books.runs[RUN].made if RUN in books.runs else {}
        return {part: count for part, count in made.items() if count}

    def crossed(self, site: int, action: str, *, down: bool) -> list[Crossing]:
        """What crossed, in order."""
        return [
            one
            for one in self.grid.crossings
            if (one.site, one.action, one.down) == (site, action, down)
        ]

    def lose(self, *sites: int, action: str, down: bool) -> None:
        """From their next message of an action on, sites are silent."""
        dead: set[int] = set()

        def alter(crossing: Crossing) -> Message | None:
            if (crossing.action, crossing.down) == (action, down) and crossing.site in sites:
                dead.add(crossing.site)
            return None if crossing.site in dead else crossing.message

        self.alter = alter


class _Made:
    """Looks at each vector where its site makes it, and says whose it is by its coins."""

    def __init__(self, worlds: list[World]) -> None:
        self._worlds, self._local = worlds, threading.local()

    def words(self, parts: Any, blocks: Any, numbers: Any, coins: Coins) -> np.ndarray:  # noqa: ANN401
        self._local.clear = []
        made = _WORDS(parts, blocks, numbers, coins)
        clear = np.concatenate(self._local.clear)
        for world in self._worlds:
            for number, site in world.sites.items():
                if site.coins is coins:
                    world.made.setdefault(number, []).append(Made(made.copy(), clear))
        return made

    def quantise(self, *arguments: Any) -> np.ndarray:  # noqa: ANN401
        found = _QUANTISE(*arguments)
        self._local.clear.append(found.copy())
        return found


def noon() -> datetime:
    """A clock that stands, so that equal ledgers have equal heads."""
    return datetime(2026, 1, 1, 12, tzinfo=UTC)


class _Entropy:
    """Fixed coins in place of the system's."""

    def __init__(self, key: bytes) -> None:
        self._coins = Coins(key.ljust(32, b"."))

    def __call__(self, count: int) -> bytes:
        return self._coins.words(-(-count // 8)).tobytes()[:count]

    def token_hex(self, count: int) -> str:
        return self(count).hex()


def _fix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes all chance out of what follows, but for the nonces of files that stay at a site."""
    secret = _Entropy(b"files")
    monkeypatch.setattr(own_files, "secrets", secret)
    monkeypatch.setattr(coordinator_module, "secrets", secret)
    monkeypatch.setattr(
        own_files,
        "Ledger",
        SimpleNamespace(
            create=partial(Ledger.create, clock=noon), open=partial(Ledger.open, clock=noon)
        ),
    )

    def party(name: str, *others: object) -> Party:
        make: Callable[..., Party] = _PARTY
        return make(name, *others, _Entropy(name.encode()))

    monkeypatch.setattr(client_secure, "Party", party)


@pytest.fixture
def open_world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., RunConfig]
) -> Iterator[Callable[..., World]]:
    """Makes federations of four sites of which three must stay and one may collude.

    With `fixed`, equal ones are equal to the byte; `change` alters the sites' raw records.
    """
    worlds: list[World] = []
    look = _Made(worlds)
    with ExitStack() as stack:

        def make(
            name: str = "run",
            *,
            fixed: bool = False,
            change: Callable[[Any], Any] = lambda raw: raw,
            **sections: dict[str, Any],
        ) -> World:
            options: dict[str, dict[str, Any]] = {
                "federation": {"sites": 4, "rounds": 5},
                "privacy": {"mechanism": "distributed", "epsilon": 4.0, "sampling_rate": 1.0},
                "evaluation": {"samples": 100, "every": 1},
            }
            for section, values in sections.items():
                options[section] = {**options.get(section, {}), **values}
            if fixed:
                _fix(monkeypatch)
            world = World(make_config(**options), tmp_path / name, stack, change)
            worlds.append(world)
            return world

        monkeypatch.setattr(vector, "words", look.words)
        monkeypatch.setattr(vector, "quantise", look.quantise)
        yield make


_WORDS, _QUANTISE, _PARTY = vector.words, quantise, Party
