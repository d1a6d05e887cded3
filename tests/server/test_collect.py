"""Whole runs: every pair that is allowed, sums that are the plain ones, runs that go on."""

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedveil
from fedveil.client.site import Site
from fedveil.config import COMPATIBILITY, RunConfig
from fedveil.data_prep import run_schema
from fedveil.flower import Grid, Message
from fedveil.privacy.secagg.encoding import decode
from fedveil.privacy.secagg.terms import Opening, Setup
from fedveil.server.app import ignore
from fedveil.server.replies import RunError
from fedveil.server.rounds import Observer
from fedveil.server.simulation import local, run
from fedveil.server.simulation.begun import Begun
from fedveil.server.simulation.recorder import Alter, Crossing, RecordingGrid, passed_on
from fedveil.server.simulation.sites import load_shards
from fedveil.server.store import RunFolder
from fedveil.wire import (
    ADVERTISE,
    CONFIRM,
    DEAL,
    END,
    EVALUATE,
    TRAIN,
    UNMASK,
    read_step,
    read_task,
)

# Of an order that Opacus does not use; `privacy.accounting` ignores it, pytest forgets that.
pytestmark = pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")

World = Any
OpenWorld = Callable[..., World]
MakeConfig = Callable[..., RunConfig]
Call = Callable[..., Any]
PHASES = (ADVERTISE, DEAL, TRAIN, CONFIRM, UNMASK)
ALL = (1, 2, 3, 4)
RUN_LOCAL = local.run_local

CELLS = [
    (mechanism, encryption, strategy)
    for mechanism, row in COMPATIBILITY.items()
    for encryption in row.encryptions
    for strategy in row.strategies
    if (strategy, encryption) != ("median", "secagg")
]
FAST = {(m, e): s for m, e, s in reversed(CELLS)}
"""The first strategy of each mechanism and encryption."""


def tiny(make_config: MakeConfig, mechanism: str, encryption: str, strategy: str) -> RunConfig:
    """Two rounds of four sites, an evaluation with the second and one at the end."""
    privacy: dict[str, Any] = {"mechanism": mechanism, "epsilon": 20.0, "sampling_rate": 0.05}
    steps = 2 if strategy == "fedprox" else 1
    return make_config(
        federation={"sites": 4, "rounds": 2},
        privacy=privacy,
        aggregation={"encryption": encryption, "strategy": strategy},
        training={"local_steps": steps},
        evaluation={"samples": 100, "every": 1},
    )


def two_rounds(config: RunConfig, path: Path) -> list[dict[str, Any]]:
    """The events of a run, without its report."""
    config, schema = config.resolved(), run_schema(config)
    folder = RunFolder(path)
    events: list[dict[str, Any]] = []
    with folder.locked(resume=False):
        run(config, schema, load_shards(config, schema), path, events.append)
    return events


class TestTheMatrix:
    def cell(self, make_config: MakeConfig, path: Path, *names: str) -> None:
        mechanism, encryption, _ = names
        events = two_rounds(tiny(make_config, *names), path / "run")
        rounds = [event for event in events if event["event"] == "round"]
        assert [(one["round"], one["sites"], one["dropped"]) for one in rounds] == [
            (1, 4, []), (2, 4, []),
        ]  # fmt: skip
        assert sum(event["event"] == "evaluated" for event in events) == 2
        assert events[-1]["event"] == "finished"
        shared = encryption == "secagg" and mechanism in {"distributed", "site"}
        # Four uploaders' noise where that of n_min - t_collude = 2 is accounted.
        expected = [pytest.approx(math.sqrt(2), abs=1e-6)] * 2 if shared else [None, None]
        assert [one.get("excess") for one in rounds] == expected
        assert (path / "run" / "transcript.bin").exists() == (encryption == "secagg")

    @pytest.mark.parametrize(("pair", "strategy"), FAST.items())
    def test_each_mechanism_and_encryption(
        self, make_config: MakeConfig, tmp_path: Path, pair: tuple[str, str], strategy: str
    ) -> None:
        self.cell(make_config, tmp_path, *pair, strategy)

    @pytest.mark.slow
    @pytest.mark.parametrize("names", [c for c in CELLS if FAST[c[0], c[1]] != c[2]])
    def test_each_strategy(
        self, make_config: MakeConfig, tmp_path: Path, names: tuple[str, str, str]
    ) -> None:
        self.cell(make_config, tmp_path, *names)


class TestASecureSumIsThePlainOne:
    """With equal coins, up to what the grid rounds away: less than a step at each site."""

    @pytest.mark.parametrize(
        ("mechanism", "strategy"), [("none", "adam"), ("none", "fedavg"), ("central", "adam")]
    )
    def test_within_a_step(self, open_world: OpenWorld, mechanism: str, strategy: str) -> None:
        found = {}
        for encryption in ("none", "secagg"):
            world = open_world(
                encryption,
                fixed=True,
                privacy={"mechanism": mechanism},
                aggregation={"encryption": encryption, "strategy": strategy},
            )
            found[encryption] = world.ask(1, 1)
        blocks = {
            one.name: one
            for one in decode(
                Opening, read_task(world.crossed(1, TRAIN, down=True)[0].content).opening
            ).blocks
        }
        plain, [secure] = found["none"].parts, found["secagg"].parts
        assert len(plain) == 4
        share = 4 if world.config.trains_at_sites else 1  # of models it is their mean
        for name, total in secure.arrays.items():
            expected = sum(part.arrays[name].astype(np.float64) for part in plain) / share
            step = 4 / blocks["update"].scale / share
            assert np.abs(total - expected).max() < step
            assert np.abs(expected).max() > 100 * step  # it is not nothing that is compared
        assert secure.sums.keys() == plain[0].sums.keys()
        for name, total in secure.sums.items():
            expected = sum(part.sums[name] for part in plain)
            assert np.abs(total - expected).max() < 4 / blocks["holdout"].scale
        assert any(total.any() for total in secure.sums.values())

    def test_of_noise_that_each_site_makes(self, open_world: OpenWorld) -> None:
        """Under `local` the noise is in the vector before the grid, and as it was."""
        found = {}
        for encryption in ("none", "secagg"):
            world = open_world(
                encryption,
                fixed=True,
                privacy={"mechanism": "local", "epsilon": 20.0},
                aggregation={"encryption": encryption},
            )
            found[encryption] = world.ask(1)
        plain, [secure] = found["none"].parts, found["secagg"].parts
        for name, total in secure.arrays.items():
            expected = sum(part.arrays[name].astype(np.float64) for part in plain) / 4
            assert np.abs(total - expected).max() < 1e-6
        assert found["secagg"].noises == found["none"].noises == 4

    def test_the_server_s_noise_covers_the_grid_s_rounding(self, open_world: OpenWorld) -> None:
        """Under `central` the sum's sensitivity is a little more on the grid, and so is the noise:
        (1 + 2^-22) (scale C + sqrt(d)) / (scale C)."""
        world = open_world(privacy={"mechanism": "central"}, aggregation={"encryption": "secagg"})
        found = world.ask(1)
        [block] = decode(
            Opening, read_task(world.crossed(1, TRAIN, down=True)[0].content).opening
        ).blocks
        steps = block.scale * world.plan.clipping_norm
        expected = (1 + 2**-22) * (steps + math.sqrt(block.length)) / steps
        assert found.rounding["update"] == pytest.approx(expected, rel=1e-12)
        assert found.rounding["update"] > 1


class Runs:
    """Whole simulations behind a recorder that may lose or alter what passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: RunConfig, out: Path) -> None:
        self.config, self.out = config, out
        self.alter: Alter = passed_on
        self.sites: Mapping[int, Site] = {}
        self.grid: RecordingGrid | None = None
        self.crossings: list[Crossing] = []
        monkeypatch.setattr(local, "run_local", self._engine)

    def _engine(self, begun: Begun, sites: Mapping[int, Site], observe: Observer) -> None:
        self.sites = sites
        RUN_LOCAL(begun, sites, observe, self._around)

    def _around(self, grid: Grid) -> RecordingGrid:
        made = RecordingGrid(grid, self._altered)
        self.crossings = made.crossings
        return made

    def _altered(self, crossing: Crossing) -> Message | None:
        return self.alter(crossing)

    def __call__(self, *, resume: bool = False) -> fedveil.Run:
        return fedveil.simulate(self.config, out=self.out, resume=resume, observe=ignore)

    def tasks(self) -> list[Any]:
        """What each site was asked, of training."""
        return [
            read_task(one.message.content)
            for one in self.crossings
            if one.down and one.action in {TRAIN, EVALUATE}
        ]

    def epochs(self) -> list[int]:
        found = [
            decode(Setup, read_step(one.message.content).body).epoch
            for one in self.crossings
            if one.down and (one.action, one.site) == (ADVERTISE, 1)
        ]
        assert found == sorted(set(found))
        return found

    def events(self) -> list[dict[str, Any]]:
        text = (self.out / "events.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


def two_are_gone(action: str, after: int) -> Alter:
    """Sites 2 and 3 answer no more from an action on, once so many messages of it went out."""
    dead: set[int] = set()
    seen: list[int] = []

    def alter(crossing: Crossing) -> Message | None:
        if crossing.down and crossing.action == action:
            seen.append(crossing.site)
            if len(seen) > after and crossing.site in {2, 3}:
                dead.add(crossing.site)
        return None if crossing.site in dead else crossing.message

    return alter


@pytest.mark.parametrize("action", PHASES)
def test_too_few_remain_and_the_run_goes_on(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
    action: str,
) -> None:
    """In the second round of three: it is burnt, and the third is asked in a new epoch."""
    config = make_config(
        federation={"sites": 4, "rounds": 3},
        data={"holdout": 0.0},
        privacy={"mechanism": "distributed", "sampling_rate": 0.05},
        secagg={"epoch_rounds": 1 if action in {ADVERTISE, DEAL} else 64},
    )
    runs = Runs(monkeypatch, config, tmp_path / "run")
    runs.alter = two_are_gone(action, after=4)
    with pytest.raises(RunError) as caught:
        runs()
    line = str(caught.value)
    assert line.startswith("round 2: secure sum: ")
    assert line.endswith("(site 2: no reply; site 3: no reply)")
    assert "\n" not in line
    before = runs.epochs()
    assert max(task.round for task in runs.tasks()) == (1 if action in {ADVERTISE, DEAL} else 2)
    [failed] = [event for event in runs.events() if event["event"] == "failed"]
    assert failed["cause"] == line

    runs.alter = passed_on
    found = runs(resume=True)
    assert runs.epochs() == [before[-1] + 1]
    assert {task.round for task in runs.tasks()} == {3}
    [resumed] = [event for event in runs.events() if event["event"] == "resumed"]
    assert resumed["lost"] == [2]
    assert found.metrics["steps"] == 2
    # Who had opened round 2 has debited it, and it stays so; nothing was debited twice.
    opened = {ADVERTISE: set(), DEAL: set(), TRAIN: {1, 4}}.get(action, set(ALL))
    made = made_of(found)
    assert made == {site: 3 if site in opened else 2 for site in ALL}
    transcript, pins = runs.out / "transcript.bin", runs.out / "identities.toml"
    audited = call("audit", "transcript", transcript, "--identities", pins, "--json")
    verdict = json.loads(audited.out)
    assert (audited.code, verdict["valid"]) == (0, True)
    released = [one for one in verdict["rounds"] if one["sum"]]
    assert len(released) == 2
    for site in ALL:
        count, head = verdict["ledgers"][f"site-{site:03d}"]
        assert {"count": count, "head": head} == found.metrics["ledgers"][str(site)]


def made_of(found: fedveil.Run) -> dict[int, int]:
    """How many rounds each site's ledger has committed for a run."""
    from fedveil.privacy.ledger import Ledger

    made = {}
    for site in ALL:
        ledger = Ledger.open(found.path / "ledger" / f"site-{site:03d}.sqlite", read_only=True)
        try:
            made[site] = ledger.read().runs[found.metrics["run_id"]].made["rounds"]
        finally:
            ledger.close()
    return made


def test_a_recorder_sees_what_a_run_without_one_sends(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run behind it; and by default nothing is in between."""
    runs = Runs(monkeypatch, tiny(make_config, "distributed", "secagg", "adam"), tmp_path / "run")
    runs()
    actions = [one.action for one in runs.crossings]
    # Two rounds and an evaluation in one epoch, four sites, there and back.
    assert {action: actions.count(action) for action in actions} == {
        ADVERTISE: 8, DEAL: 8, TRAIN: 16, EVALUATE: 8, CONFIRM: 24, UNMASK: 24, END: 8,
    }  # fmt: skip
    assert partial(RUN_LOCAL).func.__defaults__ == (local.alone,)
