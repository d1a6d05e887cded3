"""A run that is cut off anywhere goes on: nothing is released twice, nothing is spent unseen.

What the sites computed is witnessed here, outside the ledgers: a line is written as a site begins
to compute. The file is also a program (`python test_crash.py CONFIG`): it imports and prices once,
then forks a process for every attempt, to be killed.
"""

import errno
import itertools
import json
import math
import os
import random
import select
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import dp_accounting
import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import nn

import fedveil
from fedveil import api
from fedveil.client import app, work
from fedveil.client.site import Records, Site
from fedveil.config import ConfigError, FedveilError, RunConfig
from fedveil.data_prep.schema import Schema
from fedveil.ledgers import known_heads
from fedveil.models.state import Arrays, to_arrays
from fedveil.models.vae import trainable
from fedveil.privacy.books import EMPTY, Head
from fedveil.privacy.ledger import Ledger, verify
from fedveil.privacy.limits import DamagedError, LedgerError, UnavailableError
from fedveil.privacy.plan import plan
from fedveil.server.store import Checkpoint, Event, RunFolder
from fedveil.wire import read_task

# Opacus's PRV says so of large noise; it is a second opinion only.
pytestmark = pytest.mark.filterwarnings("ignore:Optimal order is the:UserWarning")

PARTS = {
    "train": "rounds", "holdout_sums": "evaluations", "training_sums": "training_figures",
}  # fmt: skip
"""What a site computes, by name in `client/work.py`, and what its ledger calls it."""
Made = Counter[tuple[str, str]]  # releases by site and part

SCHEMA = """
[[column]]
name = "a"
kind = "numeric"
bounds = [0, 1]
[[column]]
name = "b"
kind = "numeric"
bounds = [0, 1]
"""
LABEL = """
[[column]]
name = "c"
kind = "categorical"
categories = ["no", "yes"]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table of 60 records and its schema."""
    folder = tmp_path_factory.mktemp("crash")
    lines = [f"{i % 7 / 7},{i % 5 / 5},{('no', 'yes')[i % 2]}" for i in range(60)]
    (folder / "table.csv").write_text("\n".join(["a,b,c", *lines]), encoding="utf-8")
    (folder / "schema.toml").write_text(SCHEMA, encoding="utf-8")
    (folder / "labelled.toml").write_text('label = "c"' + SCHEMA + LABEL, encoding="utf-8")
    return folder


def tiny(home: Path, **sections: Mapping[str, Any]) -> RunConfig:
    """A run of two rounds and two evaluations over the table, with little to compute."""
    raw: dict[str, Any] = {
        "federation": {"sites": 2, "rounds": 2},
        "data": {
            "source": str(home / "table.csv"),
            "schema": str(home / "schema.toml"),
            "records": 60,
        },
        "model": {"family": "vae", "hidden": 2, "latent": 1},
        "privacy": {
            "epsilon": 1.0,
            "delta": 1e-3,
            "mechanism": "central",
            "statistics_share": 0.0,
        },
        "evaluation": {"every": 1, "samples": 200},
        "policy": {"self_test": False},
    }
    for section, options in sections.items():
        raw.setdefault(section, {}).update(options)
    return RunConfig.model_validate(raw).resolved()


@contextmanager
def witnessed(file: Path) -> Iterator[None]:
    """Has every site of this process write a line to a file as it begins to compute."""
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    serving = threading.local()

    def reading(content: Any) -> Any:  # noqa: ANN401
        serving.task = read_task(content)
        return serving.task

    def opening(site: Site, config: RunConfig, schema: Schema) -> Records:
        serving.site = site.name
        return records(site, config, schema)

    def computing(name: str, compute: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401
        number = serving.task.round if name == "train" else serving.task.evaluation
        os.write(handle, f"{serving.site} {PARTS[name]} {number}\n".encode())
        return compute(*args)

    records = Site.records
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "read_task", reading)
        patch.setattr(Site, "records", opening)
        for name in PARTS:
            patch.setattr(work, name, partial(computing, name, getattr(work, name)))
        yield
    os.close(handle)


def computed(file: Path) -> Made:
    """How many releases each site computed; it never computed one twice, or an earlier one."""
    last: dict[tuple[str, str], int] = {}
    made: Made = Counter()
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        site, part, number = line.split()
        assert int(number) > last.get((site, part), 0), line
        last[site, part] = int(number)
        made[site, part] += 1
    return made


def committed(ledgers: Path, known: Mapping[str, Head]) -> Made:
    """How many releases the ledgers have; they verify, against the heads that are known too."""
    made: Made = Counter()
    for file in sorted(ledgers.glob("*.sqlite")):
        runs = verify(file, known.get(file.stem, EMPTY)).books.runs
        assert len(runs) <= 1
        for run in runs.values():
            made.update({(file.stem, part): count for part, count in run.made.items()})
    assert all((ledgers / f"{site}.sqlite").is_file() for site in known)
    return made


def hold_against_each_other(folder: Path, copy: Path, crashes: int) -> None:
    """Each site committed what it computed, and at most one release more for each crash.

    The ledgers are looked at in a copy: what opens them next finds what the crash has left.
    """
    if (folder / "ledger").exists():
        shutil.copytree(folder / "ledger", copy)
    ran, paid = computed(folder.with_suffix(".witness")), committed(copy, known_heads(folder))
    for key in ran | paid:
        assert ran[key] <= paid[key] <= ran[key] + crashes, key
    shutil.rmtree(copy, ignore_errors=True)


def hold_finished(folder: Path, config: RunConfig, crashes: int) -> None:
    """A finished run adds up, however often it was cut off."""
    run = fedveil.load(folder)
    metrics, events, rounds = run.metrics, list(run.events()), config.federation.rounds
    assert metrics["privacy"]["training_epsilon"] <= config.privacy.epsilon
    assert (metrics["privacy"]["holdout_epsilon"] or 0) <= config.epsilon_holdout
    assert metrics["privacy"]["epsilon"] <= metrics["privacy"]["target_epsilon"]
    told = [event["round"] for event in events if event["event"] == "round"]
    resumed = [event for event in events if event["event"] == "resumed"]
    lost = {number for event in resumed for number in event["lost"]}
    assert told == sorted(set(told))
    assert not any(event["damaged"] for event in resumed)
    assert not lost & set(told)
    assert len(lost) <= crashes
    # A crash between a round's checkpoint and its event leaves it untold, not lost.
    assert set(range(1, rounds + 1)) - set(told) - lost <= {event["round"] for event in resumed}
    assert metrics["steps"] == rounds - len(lost)
    spent = [event["epsilon"] for event in events if "epsilon" in event]
    assert max(spent, default=0) <= metrics["privacy"]["epsilon"]
    heads = {f"site-{int(n):03d}": Head(**head) for n, head in heads_of(metrics).items()}
    assert heads == known_heads(folder)
    committed(folder / "ledger", heads)
    assert (folder / "samples.png").exists()


def heads_of(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The ledgers' heads by node, in the words of `Head`."""
    ledgers = metrics["ledgers"].items()
    return {node: {"number": ledger["count"], "hash": ledger["head"]} for node, ledger in ledgers}


# --- killed by the system -------------------------------------------------------------------------


def nursery() -> None:
    """Reads a line for every attempt, forks a process for it, and writes how it ended."""
    config = RunConfig.model_validate_json(sys.argv[1])
    plan(config)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            attempt(config, Path(order["folder"]))
        handle = os.pidfd_open(child)
        if not select.select([handle], [], [], order["seconds"])[0]:
            os.kill(child, signal.SIGKILL)
        os.close(handle)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def attempt(config: RunConfig, folder: Path) -> None:
    """Runs, or goes on, to the end of this process."""
    status = 1
    try:
        with witnessed(folder.with_suffix(".witness")):
            fedveil.simulate(config, out=folder, resume=True)
        status = 0
    except BaseException:  # noqa: BLE001  a fork never returns to what was forked
        traceback.print_exc()
    finally:
        os._exit(status)


class Nursery:
    """`nursery` in a process of its own, which has imported and priced."""

    def __init__(self, config: RunConfig) -> None:
        command = [sys.executable, "-P", __file__, config.model_dump_json(by_alias=True)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(600) == 0
        assert self._process.stdout is not None
        self._process.stdout.close()

    def survives(self, folder: Path, seconds: float) -> bool:
        """Whether an attempt ended by itself, well, before it was to be killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"folder": str(folder), "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        assert status in (0, -signal.SIGKILL)
        return status == 0


@pytest.mark.parametrize(
    ("kills", "rounds"), [(5, 25), pytest.param(50, 90, marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_at_random_instants_goes_on(
    home: Path, tmp_path: Path, kills: int, rounds: int
) -> None:
    """Where a run ends before all kills are done, another one takes the rest."""
    config = tiny(
        home,
        federation={"sites": 3, "rounds": rounds},
        data={"schema": str(home / "labelled.toml")},
        evaluation={"every": 5},
    )
    schedule, crashes = random.Random(4711), [0]  # noqa: S311  public: when to kill
    with Nursery(config) as nursery:
        while sum(crashes) < kills:
            folder = tmp_path / f"run-{len(crashes)}"
            if nursery.survives(folder, schedule.uniform(0, 1.5)):
                crashes.append(0)
            else:
                crashes[-1] += 1
                hold_against_each_other(folder, tmp_path / "copy", crashes[-1])
        assert nursery.survives(tmp_path / f"run-{len(crashes)}", 300)
    for number, count in enumerate(crashes, start=1):
        folder = tmp_path / f"run-{number}"
        hold_against_each_other(folder, tmp_path / "copy", count)
        hold_finished(folder, config, count)


# --- killed at counted instants, in this process --------------------------------------------------


class Crash(BaseException):
    """The end of a process."""


class Machine:
    """Dies at a counted instant, whoever reaches it; from then on it writes and sends nothing.

    Instants are before and after every sync of a file, every commit in a ledger and everything that
    a site computes. What was not synced when it died lacks its last bytes.
    """

    def __init__(self, instants: float = math.inf) -> None:
        self.left, self.dead, self._lock = instants, False, threading.Lock()

    def instant(self) -> None:
        """Passes an instant, or dies in it."""
        with self._lock:
            self.dead = self.dead or self.left < 1
            self.left -= 1
            if self.dead:
                raise Crash

    def around(self, act: Callable[..., Any], *args: Any, **options: Any) -> Any:  # noqa: ANN401
        """Does something between two instants."""
        self.instant()
        done = act(*args, **options)
        self.instant()
        return done

    def alive(self, act: Callable[..., Any], *args: Any, **options: Any) -> Any:  # noqa: ANN401
        """Does something, unless it is too late."""
        if self.dead:
            raise Crash
        return act(*args, **options)

    def sync(self, sync: Callable[[int], None], handle: int) -> None:
        """Syncs between two instants."""
        was_dead = self.dead
        try:
            self.instant()
        except Crash:
            if not was_dead and stat.S_ISREG(os.fstat(handle).st_mode):
                os.truncate(handle, max(os.fstat(handle).st_size - 3, 0))
            raise
        sync(handle)
        self.instant()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Lets all of this process run on this machine, its sites one after another."""
        acts: list[tuple[Any, str, Callable[..., Any]]] = [
            (os, "fsync", self.sync),
            (RunFolder, "write", self.alive),
            (RunFolder, "append", self.alive),
            (Ledger, "create", self.around),
            (Ledger, "commit", self.around),
            *((work, name, self.around) for name in PARTS),
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "sched_getaffinity", lambda _: {0})
            for owner, name, how in acts:
                patch.setattr(owner, name, wrapped(how, getattr(owner, name)))
            with quick_samples():
                yield


def wrapped(how: Callable[..., Any], act: Callable[..., Any]) -> Callable[..., Any]:
    """A function, so that it is a method where the act was one."""
    return lambda *args, **options: how(act, *args, **options)


@contextmanager
def quick_samples() -> Iterator[None]:
    """Leaves empty files in place of samples and pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "write", lambda _run, _n, path: path.touch())
        yield


def run_on(
    machine: Machine,
    config: RunConfig,
    folder: Path,
    observe: Callable[[Event], None] | None = None,
) -> None:
    """Runs, or goes on, until the machine dies or all is done."""
    with witnessed(folder.with_suffix(".witness")), machine.running():
        fedveil.simulate(config, out=folder, resume=True, observe=observe)


@pytest.mark.parametrize(
    ("mechanism", "every"),
    [
        ("central", 9),
        ("distributed", 23),
        pytest.param("central", 1, marks=pytest.mark.slow),
        pytest.param("distributed", 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_from_every_instant(
    home: Path, tmp_path: Path, mechanism: str, every: int
) -> None:
    config = tiny(home, federation={"sites": 3}, privacy={"mechanism": mechanism})
    for instant in itertools.count(step=every):
        folder = tmp_path / str(instant)
        try:
            run_on(Machine(instant), config, folder)
            break  # this one did not die: there are no more instants
        except Crash:
            hold_against_each_other(folder, tmp_path / "copy", 1)
        run_on(Machine(), config, folder)
        hold_against_each_other(folder, tmp_path / "copy", 1)
        hold_finished(folder, config, 1)
    assert instant > 60


def test_a_run_that_was_cut_off_at_its_very_end_says_that_it_finished(
    home: Path, tmp_path: Path
) -> None:
    """Between the last two things that a run writes, `metrics.json` and its last event."""

    def pull_the_plug(folder: RunFolder, event: Event) -> None:
        if event["event"] in ("finished", "failed"):
            raise Crash
        append(folder, event)

    config, folder, append = tiny(home), tmp_path / "run", RunFolder.append
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "append", pull_the_plug)
        with pytest.raises(Crash):
            fedveil.simulate(config, out=folder)
    run_on(Machine(), config, folder)
    assert list(fedveil.load(folder).events())[-1]["event"] == "finished"


def test_what_was_half_written_does_not_stay(home: Path, tmp_path: Path) -> None:
    """A draft of a checkpoint is four models large."""

    def replace(draft: Path, target: Path) -> Path:
        if target.name == "000001.safetensors":
            raise Crash
        return rename(draft, target)

    config, folder, rename = tiny(home), tmp_path / "run", Path.replace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(Crash):
            run_on(Machine(), config, folder)
    assert [file.name for file in folder.rglob("*.partial")] == [".000001.safetensors.partial"]
    run_on(Machine(), config, folder)
    assert list(folder.rglob("*.partial")) == []


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    home: Path, tmp_path: Path, every: int
) -> None:
    """All syncs but the first few fail, for any number of first ones."""
    config, passed = tiny(home), 0
    for syncs in itertools.count(step=every):
        folder, passed = tmp_path / str(syncs), 0

        def sync(handle: int, *, syncs: int = syncs) -> None:
            nonlocal passed
            passed += 1
            if passed > syncs:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        error = None
        with pytest.MonkeyPatch.context() as patch, quick_samples():
            patch.setattr(os, "fsync", sync)
            with witnessed(folder.with_suffix(".witness")):
                try:
                    fedveil.simulate(config, out=folder)
                except FedveilError as raised:
                    error = str(raised)
        if error is None:
            break
        assert "No space left" in error
        assert "\n" not in error
        run_on(Machine(), config, folder)
        hold_against_each_other(folder, tmp_path / "copy", 1)
        hold_finished(folder, config, 1)
    assert syncs > 15


# --- what it cost ---------------------------------------------------------------------------------

Priced = tuple[tuple[float, float, int], ...]  # noise multiplier, sampling rate, how often


@lru_cache(maxsize=1024)
def cost(releases: Priced, delta: float, grid: float) -> float:
    """What dp-accounting says of releases."""
    accountant = dp_accounting.pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, grid
    )
    for noise, rate, count in releases:
        event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(noise)
        if rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(rate, event)
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))


def hold_covered(reported: float, made: Made, config: RunConfig) -> None:
    """What was reported is no less than the price of what any site computed, on either side."""
    priced = plan(config)
    for site in {site for site, _ in made}:
        rounds, evaluations, figures = (made[site, part] for part in PARTS.values())
        steps = rounds * priced.releases_per_round
        training = [
            (priced.noise_multiplier, priced.sampling_rate, steps),
            (priced.figures_noise, 1.0, figures),
        ]
        for side in (training, [(priced.evaluation_noise, 1.0, evaluations)]):
            releases = tuple(release for release in side if release[2])
            # Either grid is an upper bound; the coarse one is enough where it is covered.
            if releases and reported < cost(releases, priced.delta, 1e-3):
                assert reported >= cost(releases, priced.delta, 1e-4) * (1 - 1e-9)


@st.composite
def plans(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Sections of a configuration, for any small plan."""
    mechanism = draw(st.sampled_from(["central", "local"]))
    holdout = draw(st.sampled_from([0.25, 0.25, 0.0]))
    return {
        "federation": {"sites": 2, "rounds": draw(st.integers(1, 12))},
        "data": {"holdout": holdout},
        "training": {"local_steps": draw(st.integers(1, 3)) if mechanism == "local" else 1},
        "privacy": {
            "mechanism": mechanism,
            "epsilon": draw(st.sampled_from([0.5, 1.0, 2.0])),
            "epsilon_holdout": draw(st.sampled_from([0.5, 2.0])),
            "sampling_rate": draw(st.sampled_from([0.1, 0.5, 1.0])),
        },
        "evaluation": {
            "every": draw(st.integers(0, 4)),
            "training_share": draw(st.sampled_from([0.0, 0.3])) if holdout else 0.0,
        },
    }


schedules = st.lists(st.lists(st.integers(0, 300), max_size=4), min_size=1, max_size=2)


# An example takes seconds, and a shorter one would say no more.
unshrunk = settings(phases=[Phase.explicit, Phase.reuse, Phase.generate])


@settings(unshrunk, max_examples=3)
@given(options=plans(), schedules=schedules)
@example(
    options={
        "federation": {"rounds": 4},
        "training": {"local_steps": 3},
        "privacy": {"mechanism": "local", "sampling_rate": 0.5},
        "evaluation": {"every": 2, "training_share": 0.3},
    },
    schedules=[[30, 60], [45]],
)
def test_no_reported_epsilon_is_below_the_price_of_what_was_computed(
    home: Path,
    tmp_path_factory: pytest.TempPathFactory,
    options: dict[str, dict[str, Any]],
    schedules: list[list[int]],
) -> None:
    hold_reports(tiny(home, **options), tmp_path_factory.mktemp("plan"), schedules)


@pytest.mark.slow
@settings(unshrunk, max_examples=15)
@given(options=plans(), schedules=schedules)
def test_nor_is_it_of_any_of_many_plans(
    home: Path,
    tmp_path_factory: pytest.TempPathFactory,
    options: dict[str, dict[str, Any]],
    schedules: list[list[int]],
) -> None:
    hold_reports(tiny(home, **options), tmp_path_factory.mktemp("plan"), schedules)


def hold_reports(config: RunConfig, folder: Path, schedules: list[list[int]]) -> None:
    """Every event is covered as it is told, and `metrics.json`; whenever a run was cut off."""
    reports: set[tuple[float, frozenset[tuple[tuple[str, str], int]]]] = set()
    for number, instants in enumerate(schedules):
        path = folder / str(number)
        report = partial(note_report, reports, path.with_suffix(".witness"))
        for instant in instants:
            with suppress(Crash):
                run_on(Machine(instant), config, path, report)
        run_on(Machine(), config, path, report)
        report(fedveil.load(path).metrics["privacy"])
    for epsilon, made in reports:
        hold_covered(epsilon, Counter(dict(made)), config)
    for number, instants in enumerate(schedules):
        hold_against_each_other(folder / str(number), folder / "copy", len(instants))
        hold_finished(folder / str(number), config, len(instants))


def note_report(
    reports: set[tuple[float, frozenset[tuple[tuple[str, str], int]]]],
    witness: Path,
    told: Mapping[str, Any],
) -> None:
    """Adds the epsilon that is told, if any, and what the sites have computed by then."""
    if "epsilon" in told:
        reports.add((told["epsilon"], frozenset(computed(witness).items())))


# --- what else may lie between a crash and its resume ---------------------------------------------


def after_round(number: int, do: Callable[[], None]) -> Callable[[Event], None]:
    """An observer that acts as soon as a round is told of."""

    def observe(event: Event) -> None:
        if (event["event"], event.get("round")) == ("round", number):
            do()

    return observe


def interrupt() -> None:
    """Ctrl-C."""
    raise KeyboardInterrupt


def interrupted(config: RunConfig, folder: Path, number: int) -> None:
    """A run on which Ctrl-C was pressed after a round."""
    with pytest.raises(KeyboardInterrupt):
        run_on(Machine(), config, folder, after_round(number, interrupt))


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time of change, but for the lock's."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != ".lock"]
    return {str(f.relative_to(folder)): (f.read_bytes(), f.stat().st_mtime_ns) for f in files}


def told(folder: Path, kind: str) -> list[Event]:
    """The events of a kind."""
    return [event for event in RunFolder(folder).events() if event["event"] == kind]


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files, in order."""
    return sorted((folder / "checkpoint").glob("*.safetensors"))


def last_checkpoint(folder: Path) -> Checkpoint:
    """What a resume would go on from."""
    point, _ = RunFolder(folder).load_checkpoint()
    assert point is not None
    return point


def spoil(file: Path) -> None:
    """Flips a bit of a file's numbers."""
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


class TestResume:
    @pytest.fixture
    def config(self, home: Path) -> RunConfig:
        return tiny(home, federation={"rounds": 4}, evaluation={"every": 2})

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return tmp_path / "run"

    def test_ctrl_c_loses_nothing_that_was_told(self, config: RunConfig, folder: Path) -> None:
        interrupted(config, folder, 2)
        [failed] = told(folder, "failed")
        assert failed["cause"] == "KeyboardInterrupt"
        before = known_heads(folder)
        run_on(Machine(), config, folder)
        [resumed] = told(folder, "resumed")
        assert (resumed["round"], resumed["lost"], resumed["damaged"]) == (2, [], [])
        assert [event["round"] for event in told(folder, "round")] == [1, 2, 3, 4]
        assert fedveil.load(folder).metrics["steps"] == 4
        assert all(head.number > before[site].number for site, head in known_heads(folder).items())
        hold_finished(folder, config, 0)

    def test_ctrl_c_while_the_sites_compute_costs_that_round(
        self, config: RunConfig, folder: Path
    ) -> None:
        def train(*args: object) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(work, "train", train)
            with pytest.raises(KeyboardInterrupt):
                run_on(Machine(), config, folder)
        run_on(Machine(), config, folder)
        [resumed] = told(folder, "resumed")
        assert (resumed["round"], resumed["lost"]) == (0, [1])
        assert resumed["epsilon"] == plan(config).epsilon_after(1)
        assert [event["round"] for event in told(folder, "round")] == [2, 3, 4]
        assert fedveil.load(folder).metrics["steps"] == 3

    @pytest.mark.parametrize("strategy", ["adam", "sgd", "fedavg"])
    def test_model_optimiser_average_and_quality_go_on_exactly(
        self, home: Path, folder: Path, strategy: str
    ) -> None:
        """One run, without noise, and a copy of it that is cut off after every round."""

        def train(module: nn.Module, *args: object) -> Arrays:
            wanted = np.float32 if strategy == "fedavg" else np.float64
            return {
                name: (a + 0.1).astype(wanted)
                for name, a in to_arrays(module, trainable(module)).items()
            }

        config = tiny(
            home,
            federation={"rounds": 6},
            privacy={"mechanism": "none"},
            aggregation={"strategy": strategy},
            evaluation={"every": 2},
        )
        copy = folder.with_name("copy")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(work, "train", train)
            interrupted(config, folder, 1)
            shutil.copytree(folder, copy)
            interrupted(config, copy, 2)
            interrupted(config, copy, 3)
            once = last_checkpoint(copy).evaluated
            interrupted(config, copy, 4)
            interrupted(config, copy, 5)
            for path in (folder, copy):
                run_on(Machine(), config, path)
        whole, pieced = (fedveil.load(path) for path in (folder, copy))
        assert len(told(copy, "resumed")) == 5
        for key in ("run_id", "steps", "quality", "evaluated", "privacy"):
            assert whole.metrics[key] == pieced.metrics[key]
        assert whole.metrics["evaluated"] == {"round": 6, "evaluations": 3}
        np.testing.assert_equal(whole._arrays, pieced._arrays)
        one, other = (last_checkpoint(path) for path in (folder, copy))
        np.testing.assert_equal(vars(one.state), vars(other.state))
        np.testing.assert_equal(vars(one.evaluated), vars(other.evaluated))
        # Sums over the records alone add up over evaluations.
        assert (once.count, set(once.sums)) == (1, {"one_way", "two_way"})
        for name, sums in once.sums.items():
            np.testing.assert_allclose(other.evaluated.sums[name], 3 * sums, rtol=1e-12)

    def test_a_finished_run_only_gets_its_missing_samples(
        self, config: RunConfig, folder: Path
    ) -> None:
        fedveil.simulate(config, out=folder)
        before = contents(folder)
        fedveil.simulate(config, out=folder, resume=True)
        assert contents(folder) == before
        (folder / "samples.csv").unlink()
        fedveil.simulate(config, out=folder, resume=True)
        after = contents(folder)
        changed = {name for name, found in after.items() if found != before[name]}
        assert after.keys() == before.keys()
        assert changed == {"samples.csv", "samples.csv.provenance.json"}

    @pytest.mark.parametrize("found", ["nothing", "an empty folder", "a lock", "half a file"])
    def test_a_run_that_was_killed_before_it_began_begins(
        self, config: RunConfig, folder: Path, found: str
    ) -> None:
        if found != "nothing":
            folder.mkdir()
        if found in ("a lock", "half a file"):
            (folder / ".lock").touch()
        if found == "half a file":
            (folder / ".config.toml.partial").write_text("[feder", encoding="utf-8")
        run_on(Machine(), config, folder)
        assert next(RunFolder(folder).events())["event"] == "run"
        hold_finished(folder, config, 0)

    def test_a_folder_that_holds_no_run_is_not_taken_for_one(
        self, config: RunConfig, folder: Path
    ) -> None:
        folder.mkdir()
        (folder / "thesis.txt").touch()
        with pytest.raises(ConfigError, match=r"holds no run; check the path$"):
            fedveil.simulate(config, out=folder, resume=True)
        assert [file.name for file in folder.iterdir()] == ["thesis.txt"]

    @pytest.mark.parametrize(
        ("section", "options", "said"),
        [
            ("federation", {"rounds": 5}, r"^federation\.rounds = 5: .* begun with 4; resume"),
            ("privacy", {"epsilon": 2.0}, r"^privacy\.epsilon = 2\.0: .* begun with 1\.0; resume"),
            ("privacy", {"delta": 1e-4}, r"^privacy\.delta = 0\.0001: .* begun with 0\.001; "),
            (
                "policy",
                {"epsilon_lifetime": 9.0},
                r"^policy\.epsilon_lifetime = 9\.0: .* with its default",
            ),
            ("data", {"dataset_id": "other"}, r"^data\.dataset_id = other: .* with fedveil; "),
        ],
    )
    def test_another_configuration_is_refused_by_name(
        self,
        config: RunConfig,
        folder: Path,
        section: str,
        options: dict[str, Any],
        said: str,
    ) -> None:
        interrupted(config, folder, 1)
        before = contents(folder)
        raw = config.model_dump(by_alias=True)
        raw[section] |= options
        with pytest.raises(ConfigError, match=said) as caught:
            fedveil.simulate(RunConfig.model_validate(raw), out=folder, resume=True)
        assert "\n" not in str(caught.value)
        assert contents(folder).keys() == before.keys()
        assert told(folder, "resumed") == []

    def test_another_schema_is_refused(
        self, config: RunConfig, folder: Path, write_file: Callable[[str, str], Path]
    ) -> None:
        raw = config.model_dump(by_alias=True)
        file = write_file("schema.toml", SCHEMA)
        raw["data"]["schema"] = str(file)
        config = RunConfig.model_validate(raw)
        interrupted(config, folder, 1)
        file.write_text(SCHEMA.replace("[0, 1]", "[0, 2]"), encoding="utf-8")
        with pytest.raises(ConfigError, match=r"^data\.schema: has changed since the run in "):
            fedveil.simulate(config, out=folder, resume=True)
        assert told(folder, "resumed") == []

    def test_resume_needs_a_folder(self, config: RunConfig) -> None:
        with pytest.raises(ConfigError, match=r"^--resume: needs --out"):
            fedveil.simulate(config, resume=True)

    def test_a_damaged_checkpoint_costs_its_round_and_is_named(
        self, config: RunConfig, folder: Path
    ) -> None:
        interrupted(config, folder, 3)
        newest = checkpoints(folder)[-1]
        spoil(newest)
        run_on(Machine(), config, folder)
        [resumed] = told(folder, "resumed")
        assert (resumed["round"], resumed["lost"]) == (2, [3])
        [damaged] = resumed["damaged"]
        assert str(newest) in damaged
        assert "its checksum does not fit" in damaged
        # It was computed and told of before, but the model does not have it.
        assert [event["round"] for event in told(folder, "round")] == [1, 2, 3, 4]
        assert fedveil.load(folder).metrics["steps"] == 3
        assert computed(folder.with_suffix(".witness"))["site-001", "rounds"] == 4
        hold_against_each_other(folder, folder.with_suffix(".copy"), 0)

    @pytest.mark.parametrize("how", ["spoilt", "cut short", "empty"])
    def test_a_run_without_a_whole_checkpoint_is_refused(
        self, config: RunConfig, folder: Path, how: str
    ) -> None:
        interrupted(config, folder, 3)
        ran = computed(folder.with_suffix(".witness"))
        for file in checkpoints(folder):
            if how == "spoilt":
                spoil(file)
            else:
                os.truncate(file, 0 if how == "empty" else file.stat().st_size // 2)
        with pytest.raises(FedveilError, match="no earlier checkpoint is whole") as caught:
            run_on(Machine(), config, folder)
        assert "\n" not in str(caught.value)
        assert computed(folder.with_suffix(".witness")) == ran

    def test_a_damaged_checkpoint_does_not_take_the_place_of_a_whole_one(
        self, config: RunConfig, folder: Path
    ) -> None:
        """After a fall-back and one more round there are again two that a run can go on from."""
        interrupted(config, folder, 2)
        spoil(checkpoints(folder)[-1])
        interrupted(config, folder, 3)
        spoil(checkpoints(folder)[-1])
        run_on(Machine(), config, folder)
        assert [event["lost"] for event in told(folder, "resumed")] == [[2], [2, 3]]
        assert fedveil.load(folder).metrics["steps"] == 2

    def test_a_second_process_is_turned_away(self, config: RunConfig, folder: Path) -> None:
        refusals = []

        def another() -> None:
            for resume in (True, False):
                with pytest.raises(ConfigError) as caught:
                    fedveil.simulate(config, out=folder, resume=resume)
                refusals.append(str(caught.value))

        run_on(Machine(), config, folder, after_round(2, another))
        assert refusals == [
            f"--out {folder}: another process is at it; wait for that one",
            f"--out {folder}: is not empty; choose another folder, or --resume what is in it",
        ]
        assert told(folder, "resumed") == []
        hold_finished(folder, config, 0)

    def test_an_older_copy_of_a_ledger_is_refused_and_said_why(
        self, config: RunConfig, folder: Path
    ) -> None:
        ledger, copy = folder / "ledger" / "site-002.sqlite", folder.with_suffix(".sqlite")
        interrupted(config, folder, 1)
        shutil.copy(ledger, copy)
        interrupted(config, folder, 2)
        shutil.copy(copy, ledger)
        ran = computed(folder.with_suffix(".witness"))
        said = r"^site-002: .*: has 4 entries, 5 are known elsewhere; an older copy was put in its"
        with pytest.raises(DamagedError, match=said):
            run_on(Machine(), config, folder)
        assert computed(folder.with_suffix(".witness")) == ran

    def test_a_ledger_that_is_put_back_while_the_run_goes_on_is_refused_too(
        self, home: Path, folder: Path
    ) -> None:
        """The server learns no more than a code; the other sites are enough to go on with."""
        config = tiny(home, federation={"sites": 3, "rounds": 4}, evaluation={"every": 0})
        ledger, copy = folder / "ledger" / "site-002.sqlite", folder.with_suffix(".sqlite")
        interrupted(config, folder, 1)
        shutil.copy(ledger, copy)

        def put_back() -> None:
            with closing(sqlite3.connect(copy)) as old, closing(sqlite3.connect(ledger)) as now:
                old.backup(now)

        run_on(Machine(), config, folder, after_round(2, put_back))
        dropped = [{"site": 2, "reason": "refused: its ledger cannot be used"}]
        assert [event["dropped"] for event in told(folder, "round")] == [[], [], dropped, dropped]
        log = (folder / "sites" / "site.log").read_text(encoding="utf-8")
        assert "was edited or put back" in log
        assert computed(folder.with_suffix(".witness"))["site-002", "rounds"] == 2

    @pytest.mark.parametrize("how", ["of another run", "new"])
    def test_other_ledgers_are_refused(self, config: RunConfig, folder: Path, how: str) -> None:
        interrupted(config, folder, 2)
        shutil.rmtree(folder / "ledger")
        if how == "of another run":
            other = folder.with_name("other")
            interrupted(config, other, 3)
            shutil.copytree(other / "ledger", folder / "ledger")
        ran = computed(folder.with_suffix(".witness"))
        with pytest.raises(LedgerError, match=r"^site-001: .*known elsewhere") as caught:
            run_on(Machine(), config, folder)
        assert "\n" not in str(caught.value)
        assert computed(folder.with_suffix(".witness")) == ran

    def test_a_ledger_that_is_gone_is_not_made_anew(self, config: RunConfig, folder: Path) -> None:
        interrupted(config, folder, 2)
        (folder / "ledger" / "site-001.sqlite").unlink()
        with pytest.raises(UnavailableError, match="put the ledger back"):
            run_on(Machine(), config, folder)
        assert not (folder / "ledger" / "site-001.sqlite").exists()


if __name__ == "__main__":
    nursery()
