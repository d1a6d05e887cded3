"""The local engine: real apps and messages, isolated sites, secret coins, ledgers that last."""

import errno
import itertools
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fedveil
from fedveil import machine
from fedveil.client import own_files, work
from fedveil.client.evaluation import holdout_sums
from fedveil.client.site import Side
from fedveil.config import ConfigError, FedveilError, RunConfig
from fedveil.data_prep import run_schema
from fedveil.data_prep.schema import ImageSchema, Schema
from fedveil.flower import (
    Array,
    ArrayRecord,
    ClientApp,
    ConfigRecord,
    Context,
    FlowerRun,
    Message,
    RecordDict,
    empty_run,
)
from fedveil.ledgers import known_heads
from fedveil.models.state import read_file
from fedveil.privacy.books import (
    Books,
    Head,
    order,
)
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
from fedveil.privacy.plan import plan
from fedveil.server.aggregation import STRATEGIES
from fedveil.server.app import ignore
from fedveil.server.replies import RunError
from fedveil.server.simulation import run
from fedveil.server.simulation.local import LocalGrid, local_grid
from fedveil.server.simulation.sites import Shards, load_shards, simulated_site
from fedveil.server.store import Checkpoint, Event, RunFolder

MakeConfig = Callable[..., RunConfig]
Handler = Callable[[Message, Context], RecordDict]
PLANTED = "PATIENT-4711"
FAILED = (
    "a simulated site failed and took part without records; sites/*.failed in the run folder names "
    "it, sites/site.log says why"
)


def app_of(handler: Handler) -> ClientApp:
    """A tiny app around one function."""
    app = ClientApp()

    @app.train("step")
    def step(message: Message, context: Context) -> Message:
        return Message(handler(message, context), reply_to=message)

    return app


def cores(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Lets the machine have so many cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))
    monkeypatch.setattr(machine, "cores_allowed", lambda: None)


def messages(nodes: Iterable[int], content: RecordDict | None = None) -> list[Message]:
    """One message a node, all of the same content."""
    shared = content if content is not None else RecordDict()
    return [Message(shared, node, "train.step", group_id="1") for node in nodes]


def by_node(replies: Iterable[Message]) -> dict[int, Message]:
    """Replies by the site that sent them."""
    return {reply.metadata.src_node_id: reply for reply in replies}


class TestLocalGrid:
    def test_every_site_answers(self) -> None:
        def handler(message: Message, context: Context) -> RecordDict:
            return RecordDict({"facts": ConfigRecord({"node": context.node_id})})

        with local_grid(app_of(handler), [1, 2, 3], 7) as grid:
            assert list(grid.get_node_ids()) == [1, 2, 3]
            sent = messages([1, 2, 3])
            replies = by_node(grid.send_and_receive(sent))
        assert {n: r.content["facts"]["node"] for n, r in replies.items()} == {1: 1, 2: 2, 3: 3}
        ids = {m.metadata.dst_node_id: m.metadata.message_id for m in sent}
        assert len(set(ids.values())) == 3
        assert {n: r.metadata.reply_to_message_id for n, r in replies.items()} == ids

    def test_a_site_cannot_reach_anothers_message(self) -> None:
        """All get the same content object; each spoils what it got."""
        seen: dict[int, tuple[list[str], list[float]]] = {}

        def handler(message: Message, context: Context) -> RecordDict:
            arrays = message.content.array_records["arrays"]
            facts = message.content.config_records["facts"]
            seen[context.node_id] = (list(facts), arrays["w"].numpy().tolist())
            facts[PLANTED] = context.node_id
            arrays["w"].data = b"spoilt"
            del arrays["w"]
            return RecordDict()

        content = RecordDict(
            {
                "facts": ConfigRecord({"round": 1}),
                "arrays": ArrayRecord({"w": Array(np.array([1.0, 2.0], dtype=np.float32))}),
            }
        )
        with local_grid(app_of(handler), [1, 2, 3, 4], 7) as grid:
            grid.send_and_receive(messages([1, 2, 3, 4], content))
        assert seen == {node: (["round"], [1.0, 2.0]) for node in (1, 2, 3, 4)}
        assert list(content["facts"]) == ["round"]
        assert content.array_records["arrays"]["w"].numpy().tolist() == [1.0, 2.0]

    def test_an_exception_is_an_error_without_text(self) -> None:
        def handler(message: Message, context: Context) -> RecordDict:
            if context.node_id == 2:
                raise ValueError(PLANTED)
            return RecordDict()

        with local_grid(app_of(handler), [1, 2], 7) as grid:
            replies = by_node(grid.send_and_receive(messages([1, 2])))
        assert replies[1].has_content()
        assert replies[2].has_error()
        assert replies[2].error.code == 2
        assert not replies[2].error.reason
        assert PLANTED not in repr(replies[2])
        assert PLANTED.encode() not in replies[2].deflate()

    def test_an_action_that_the_app_does_not_have(self) -> None:
        def handler(message: Message, context: Context) -> RecordDict:
            return RecordDict()

        with local_grid(app_of(handler), [1], 7) as grid:
            [reply] = grid.send_and_receive([Message(RecordDict(), 1, "train.other")])
        assert reply.has_error()

    def test_contexts_keep_their_state(self) -> None:
        def handler(message: Message, context: Context) -> RecordDict:
            record = context.state.get("count")
            before = record["times"] if isinstance(record, ConfigRecord) else 0
            assert isinstance(before, int)
            context.state["count"] = ConfigRecord({"times": before + context.node_id})
            return RecordDict({"facts": ConfigRecord({"before": before})})

        with local_grid(app_of(handler), [1, 2], 7) as grid:
            found = [
                {
                    node: reply.content["facts"]["before"]
                    for node, reply in by_node(grid.send_and_receive(messages([1, 2]))).items()
                }
                for _ in range(3)
            ]
        assert found == [{1: 0, 2: 0}, {1: 1, 2: 2}, {1: 2, 2: 4}]

    def test_a_timeout_returns_what_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cores(monkeypatch, 2)
        release = threading.Event()
        answered: set[int] = set()

        def handler(message: Message, context: Context) -> RecordDict:
            if context.node_id == 2:
                release.wait(60)
            answered.add(context.node_id)
            return RecordDict()

        with local_grid(app_of(handler), [1, 2], 7) as grid:
            try:
                replies = by_node(grid.send_and_receive(messages([1, 2]), timeout=1))
                assert set(replies) == {1}
                assert answered == {1}
            finally:
                release.set()

    def test_late_replies_can_be_pulled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cores(monkeypatch, 2)
        release = threading.Event()

        def handler(message: Message, context: Context) -> RecordDict:
            release.wait(60)
            return RecordDict()

        with local_grid(app_of(handler), [1, 2], 7) as grid:
            ids = list(grid.push_messages(messages([1, 2])))
            assert list(grid.pull_messages(ids)) == []
            release.set()
            wait(list(grid._pending.values()), 60)
            assert set(by_node(grid.pull_messages(ids))) == {1, 2}
            assert list(grid.pull_messages(ids)) == []
            assert list(grid.pull_messages(["never pushed"])) == []

    @pytest.mark.parametrize(("machine", "sites", "workers"), [(3, 8, 3), (8, 2, 2), (1, 4, 1)])
    def test_as_many_workers_as_cores_or_sites(
        self, monkeypatch: pytest.MonkeyPatch, machine: int, sites: int, workers: int
    ) -> None:
        cores(monkeypatch, machine)
        lock = threading.Lock()
        first_wave = threading.Barrier(workers)
        started: list[int] = []
        threads: set[int] = set()

        def handler(message: Message, context: Context) -> RecordDict:
            with lock:
                started.append(context.node_id)
                in_first_wave = len(started) <= workers
                threads.add(threading.get_ident())
            if in_first_wave:
                first_wave.wait(60)  # passes only if so many are at work at once
            return RecordDict()

        nodes = list(range(1, sites + 1))
        with local_grid(app_of(handler), nodes, 7) as grid:
            replies = list(grid.send_and_receive(messages(nodes)))
        assert len(replies) == sites
        assert not any(reply.has_error() for reply in replies)
        assert len(threads) == workers

    def test_one_torch_thread_in_each(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cores(monkeypatch, 2)
        counts: set[int] = set()

        def handler(message: Message, context: Context) -> RecordDict:
            counts.add(torch.get_num_threads())
            return RecordDict()

        with local_grid(app_of(handler), [1, 2, 3], 7) as grid:
            grid.send_and_receive(messages([1, 2, 3]))
        assert counts == {1}

    def test_the_grid_is_flowers(self) -> None:
        def handler(message: Message, context: Context) -> RecordDict:
            return RecordDict()

        with local_grid(app_of(handler), [4], 7) as grid:
            assert isinstance(grid, LocalGrid)
            assert grid.run.run_id == 7
            made = grid.create_message(RecordDict(), "train.step", 4, "1")
            assert (made.metadata.dst_node_id, made.metadata.group_id) == (4, "1")
            other: FlowerRun = empty_run(8)
            grid.set_run(other)
            assert grid.run is other


class TestShards:
    @pytest.mark.parametrize("partition", ["iid", "dirichlet", "column"])
    def test_every_record_is_at_one_site(self, make_config: MakeConfig, partition: str) -> None:
        options: dict[str, Any] = {"partition": partition}
        if partition == "column":
            options["column"] = "label"
        config = make_config(data=options)
        shards = load_shards(config, run_schema(config))
        assert len(shards.parts) == 3
        assert sum(len(part.labels) for part in shards.parts) == shards.report.records == 1797
        assert all(len(part.labels) for part in shards.parts)

    def test_the_split_is_public(self, make_config: MakeConfig) -> None:
        """Equal seeds share out alike, another seed otherwise."""

        def split(seed: int) -> list[bytes]:
            config = make_config(federation={"seed": seed})
            parts = load_shards(config, run_schema(config)).parts
            return [part.pixels.tobytes() for part in parts]

        assert split(0) == split(0)
        assert split(0) != split(1)

    def test_more_sites_than_records(self, make_config: MakeConfig) -> None:
        config = make_config(federation={"sites": 1798})
        with pytest.raises(ConfigError, match=r"federation\.sites = 1798"):
            load_shards(config, run_schema(config))


def simulated(
    config: RunConfig, folder: Path, observe: Callable[[dict[str, Any]], None] = ignore
) -> dict[str, np.ndarray]:
    """The model of one whole simulation."""
    with RunFolder(folder).locked(resume=False):
        local(config, folder, observe)
    return read_file(folder / "model.safetensors")[0]


def local(
    config: RunConfig,
    folder: Path,
    observe: Callable[[Event], None] = ignore,
    schema: Schema | None = None,
) -> None:
    """One process of a simulation: it begins or goes on."""
    schema = schema or run_schema(config)
    run(config, schema, load_shards(config, schema), folder, observe)


def digest(arrays: dict[str, np.ndarray]) -> bytes:
    """All numbers of a model."""
    return b"".join(arrays[name].tobytes() for name in sorted(arrays))


class TestRuns:
    @pytest.mark.parametrize("mechanism", ["none", "central"])
    def test_two_runs_of_one_seed_differ(
        self, make_config: MakeConfig, tmp_path: Path, mechanism: str
    ) -> None:
        """Samples and noise come from secret coins, never from the run's seed."""
        config = make_config(privacy={"mechanism": mechanism}).resolved()
        first, second = (simulated(config, tmp_path / name) for name in ("a", "b"))
        assert first.keys() == second.keys()
        assert digest(first) != digest(second)

    @pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "fedprox"])
    def test_the_number_of_workers_changes_nothing(
        self,
        make_config: MakeConfig,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        strategy: str,
    ) -> None:
        config = make_config(
            federation={"sites": 5},
            privacy={"mechanism": "none"},
            aggregation={"strategy": strategy},
            evaluation={"samples": 128},
        ).resolved()
        models = []
        for workers in (1, 2, 5):
            with monkeypatch.context() as patch:
                cores(patch, workers)
                equal_secrets(patch)
                models.append(digest(simulated(config, tmp_path / str(workers))))
        assert models[0] == models[1] == models[2]

    def test_with_noise_too(
        self, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = make_config().resolved()
        models = []
        for workers in (1, 3):
            with monkeypatch.context() as patch:
                cores(patch, workers)
                equal_secrets(patch)
                models.append(digest(simulated(config, tmp_path / str(workers))))
        assert models[0] == models[1]

    def test_each_site_has_a_folder_a_ledger_and_a_key_of_its_own(
        self, finished_run: fedveil.Run
    ) -> None:
        folders = sorted(p for p in (finished_run.path / "sites").iterdir() if p.is_dir())
        names = ["site-001", "site-002", "site-003"]
        assert [folder.name for folder in folders] == names
        assert all((folder / "cleaning.json").is_file() for folder in folders)
        home = finished_run.path / "ledger"
        assert {file.name for file in home.iterdir()} == {
            name + ending for name in names for ending in (".sqlite", ".SIMULATED-split.key")
        }
        assert all(file.stat().st_mode & 0o077 == 0 for file in home.iterdir())
        secret = [(home / f"{n}.SIMULATED-split.key").read_text(encoding="ascii") for n in names]
        assert len(set(secret)) == 3
        assert all(len(bytes.fromhex(key)) == 32 for key in secret)
        assert [books(home, name).opened["site"] for name in names] == names

    @pytest.mark.parametrize("mechanism", ["none", "central", "local"])
    def test_a_failing_site_takes_part_and_says_why_to_itself_only(
        self, make_config: MakeConfig, tmp_path: Path, mechanism: str
    ) -> None:
        """The federation is not told; whoever simulates one is, at the end of the round."""
        config = make_config(privacy={"mechanism": mechanism}).resolved()
        folder = RunFolder(tmp_path / "run")
        log = folder.path / "sites" / "site.log"
        with folder.locked(resume=False), pytest.raises(RunError) as caught:
            run_spoilt(config, folder, [3])
        assert str(caught.value) == FAILED
        assert marked(folder) == ["site-003"]
        # The round itself had every site, and the folder does not pass for a finished run.
        events = list(folder.events())
        assert [event["event"] for event in events] == ["run", "round", "failed"]
        assert (events[1]["sites"], events[1]["dropped"]) == (3, [])
        assert not (folder.path / "metrics.json").exists()
        assert not (folder.path / "model.safetensors").exists()
        assert "namespace" not in (folder.path / "events.jsonl").read_text(encoding="utf-8").lower()
        # The cause, and which site it was, stand in the log.
        text = log.read_text(encoding="utf-8")
        assert "SimpleNamespace" in text
        assert "site-003" in text
        assert "site-001" not in text
        assert "site-002" not in text

    def test_each_that_fails_is_marked(self, make_config: MakeConfig, tmp_path: Path) -> None:
        config = make_config(federation={"sites": 5}, privacy={"mechanism": "none"}).resolved()
        folder = RunFolder(tmp_path / "run")
        with folder.locked(resume=False), pytest.raises(RunError, match=f"^{re.escape(FAILED)}$"):
            run_spoilt(config, folder, [1, 2, 4, 5])
        assert list(folder.events())[-1]["event"] == "failed"
        assert marked(folder) == ["site-001", "site-002", "site-004", "site-005"]

    def test_nothing_that_is_told_of_it_names_a_site_or_a_path(
        self, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        """The events go into the report, which holds nothing of a site's own."""
        config = make_config(privacy={"mechanism": "none"}).resolved()
        folder = RunFolder(tmp_path / "run")
        with folder.locked(resume=False), pytest.raises(RunError):
            run_spoilt(config, folder, [2])
        cause = list(folder.events())[-1]["cause"]
        assert "site-002" not in cause
        assert str(tmp_path) not in cause

    def test_to_go_on_again_and_again_is_no_way_round_it(
        self, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        """Each attempt loses a round; when none is left the run does not pass for finished."""
        config = make_config(privacy={"mechanism": "none"}, evaluation={"samples": 128}).resolved()
        folder = RunFolder(tmp_path / "run")
        for attempt in range(6):
            with folder.locked(resume=attempt > 0), pytest.raises(RunError, match="failed and"):
                run_spoilt(config, folder, [2])
        assert folder.asked().round == 2
        assert not (folder.path / "metrics.json").exists()

    def test_a_site_that_succeeds_again_is_forgiven(
        self, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        config = make_config(
            federation={"rounds": 4}, privacy={"mechanism": "none"}, evaluation={"samples": 128}
        ).resolved()
        folder = RunFolder(tmp_path / "run")
        with folder.locked(resume=False), pytest.raises(RunError):
            run_spoilt(config, folder, [2])
        with folder.locked(resume=True):
            run_spoilt(config, folder, [])
        assert marked(folder) == []
        assert folder.read_json("metrics.json")["rounds"] == 4

    def test_all_sites_failing_is_no_finished_run(
        self, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        config = make_config(privacy={"mechanism": "none"}, evaluation={"samples": 128}).resolved()
        folder = RunFolder(tmp_path / "run")
        with (
            folder.locked(resume=False),
            pytest.raises(RunError, match=f"^{re.escape(FAILED)}$"),
        ):
            run_spoilt(config, folder, [1, 2, 3])
        assert list(folder.events())[-1]["event"] == "failed"

    def test_without_a_failure_there_is_neither_error_nor_log(
        self, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        config = make_config(privacy={"mechanism": "none"}, evaluation={"samples": 128}).resolved()
        simulated(config, tmp_path / "run")
        assert not (tmp_path / "run" / "sites" / "site.log").exists()

    def test_one_that_fails_in_the_last_evaluation_only_is_told_of_too(
        self, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No round comes after it whose end would tell."""

        def fail(module: Any, exam: Any, records: Side, *rest: Any) -> Any:  # noqa: ANN401
            if len(records.batch.y):
                raise ValueError(PLANTED)
            return holdout_sums(module, exam, records, *rest)

        monkeypatch.setattr(work, "holdout_sums", fail)
        config = make_config(
            privacy={"mechanism": "none"}, evaluation={"every": 0, "samples": 128}
        ).resolved()
        folder = RunFolder(tmp_path / "run")
        with (
            folder.locked(resume=False),
            pytest.raises(RunError, match=f"^{re.escape(FAILED)}$"),
        ):
            local(config, folder.path)
        assert PLANTED not in (folder.path / "events.jsonl").read_text(encoding="utf-8")


def marked(folder: RunFolder) -> list[str]:
    """The sites that are marked as failed."""
    return sorted(path.stem for path in (folder.path / "sites").glob("*.failed"))


def run_spoilt(config: RunConfig, folder: RunFolder, failing: Collection[int]) -> None:
    """A simulation some of whose sites hold what is no data at all."""
    schema = run_schema(config)
    shards = load_shards(config, schema)
    broken = SimpleNamespace(labels=PLANTED)
    parts = tuple(
        broken if node in failing else part for node, part in enumerate(shards.parts, start=1)
    )
    run(config, schema, Shards(parts, shards.report), folder.path, ignore)


def equal_secrets(patch: pytest.MonkeyPatch) -> None:
    """Gives the sites and the server of the next run the same secrets every time."""
    numbers = itertools.count()

    def next_key(count: int = 32) -> bytes:
        return next(numbers).to_bytes(count, "big")

    secrets = SimpleNamespace(token_hex=lambda count: next_key(count).hex(), randbits=lambda _: 77)
    patch.setattr(own_files, "secrets", secrets)
    patch.setattr(Coins, "from_system", classmethod(lambda cls: cls(next_key())))


def books(home: Path, name: str = "site-001") -> Books:
    """What a simulated site's ledger says; it is verified first."""
    return verify(home / f"{name}.sqlite").books


def heads(home: Path) -> dict[str, Head]:
    """The heads of all ledgers."""
    return {file.stem: books(home, file.stem).head for file in sorted(home.glob("*.sqlite"))}


def secrets_of(home: Path) -> dict[str, bytes]:
    """All split keys."""
    return {file.name: file.read_bytes() for file in sorted(home.glob("*.key"))}


def stopping(event: str, number: int) -> Callable[[Event], None]:
    """An observer that interrupts the run at one of its events."""

    def observe(seen: Event) -> None:
        if (seen["event"], seen.get("round")) == (event, number):
            raise KeyboardInterrupt

    return observe


class TestResume:
    """Real sites with real ledgers; what the server does by itself stands in test_rounds.py."""

    @pytest.fixture
    def config(self, make_config: MakeConfig) -> RunConfig:
        """Three rounds and two evaluations, without a mechanism."""
        return make_config(
            federation={"rounds": 3},
            privacy={"mechanism": "none"},
            evaluation={"every": 2, "samples": 128},
        ).resolved()

    def test_ledgers_and_keys_are_made_once(self, config: RunConfig, tmp_path: Path) -> None:
        folder, home = tmp_path / "run", tmp_path / "run" / "ledger"
        with RunFolder(folder).locked(resume=False):
            with pytest.raises(KeyboardInterrupt):
                local(config, folder, stopping("round", 1))
            before, known = secrets_of(home), heads(home)
            assert {name: books(home, name).opened["simulated"] for name in known} == {
                "site-001": True, "site-002": True, "site-003": True,
            }  # fmt: skip
        with RunFolder(folder).locked(resume=True):
            local(config, folder)
        assert secrets_of(home) == before
        for name, head in known.items():
            # Each ledger goes on from where it was, with the same run.
            found = verify(home / f"{name}.sqlite", head).books
            [(run_id, run)] = found.runs.items()
            assert run_id == RunFolder(folder).read_json("metrics.json")["run_id"]
            assert run.made == {"rounds": 3, "evaluations": 2}
            assert len(found.datasets) == 1
        assert known_heads(folder) == heads(home)

    def test_a_release_that_was_committed_and_lost_counts(
        self, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder, home = tmp_path / "run", tmp_path / "run" / "ledger"
        save = RunFolder.save_checkpoint

        def lose(self: RunFolder, checkpoint: Checkpoint) -> None:
            if checkpoint.state.round == 2:
                raise KeyboardInterrupt
            save(self, checkpoint)

        with RunFolder(folder).locked(resume=False), monkeypatch.context() as patch:
            patch.setattr(RunFolder, "save_checkpoint", lose)
            with pytest.raises(KeyboardInterrupt):
                local(config, folder)
        assert books(home).runs.popitem()[1].made == {"rounds": 2, "evaluations": 0}
        with RunFolder(folder).locked(resume=True):
            local(config, folder)
        metrics = RunFolder(folder).read_json("metrics.json")
        assert (metrics["rounds"], metrics["steps"]) == (3, 2)
        for name in heads(home):
            run = books(home, name).runs[metrics["run_id"]]
            assert run.made == run.last == {"rounds": 3, "evaluations": 1}
        assert metrics["ledgers"] == {
            str(node): {"count": head.number, "head": head.hash}
            for node, head in enumerate(heads(home).values(), start=1)
        }

    def test_a_ledger_that_was_put_back_meanwhile_is_noticed(
        self, config: RunConfig, tmp_path: Path
    ) -> None:
        """By its head, which the server knows; nothing has run then."""
        folder, old = tmp_path / "run", tmp_path / "old.sqlite"
        ledger = folder / "ledger" / "site-002.sqlite"
        with RunFolder(folder).locked(resume=False):
            for number in (1, 2):
                if number == 2:
                    shutil.copy(ledger, old)
                with pytest.raises(KeyboardInterrupt):
                    local(config, folder, stopping("round", number))
            shutil.copy(old, ledger)
            events, asked = list(RunFolder(folder).events()), RunFolder(folder).asked()
            with pytest.raises(DamagedError, match=r"^site-002: .* older copy"):
                local(config, folder)
        assert list(RunFolder(folder).events()) == events
        assert RunFolder(folder).asked() == asked

    def test_a_full_disk_is_one_line_and_no_end(
        self, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From any sync on, that of a ledger or of a key as well; resumed, the run ends."""
        config = make_config(
            federation={"sites": 2, "rounds": 1},
            data={"holdout": 0.0},
            privacy={"mechanism": "none"},
        ).resolved()
        sync = os.fsync
        for at in itertools.count(1):
            folder, calls = RunFolder(tmp_path / str(at)), itertools.count(1)

            def limited(
                descriptor: int, at: int = at, calls: "itertools.count[int]" = calls
            ) -> None:
                if next(calls) >= at:
                    raise OSError(errno.ENOSPC, "No space left on device")
                sync(descriptor)

            with folder.locked(resume=False):
                cause = "No space left on device"
                with monkeypatch.context() as patch:
                    patch.setattr(os, "fsync", limited)
                    try:
                        local(config, folder.path)
                    except FedveilError as error:
                        cause = str(error)
                assert "No space left on device" in cause
                assert "\n" not in cause
                if next(calls) <= at:
                    break
                local(config, folder.path)
            metrics = folder.read_json("metrics.json")
            assert metrics["rounds"] == 1
            for name in heads(folder.path / "ledger"):
                run = books(folder.path / "ledger", name).runs.get(metrics["run_id"])
                assert metrics["steps"] <= (run.made["rounds"] if run else 0) <= 1
        assert at > 15


def durable(home: Path, **changes: Mapping[str, Any]) -> RunConfig:
    """A run of epsilon 1 over a data set that has 2; soon priced, for nothing is sampled."""
    options: dict[str, dict[str, Any]] = {
        "federation": {"sites": 2, "rounds": 1},
        "data": {"source": "sklearn:digits", "ledger": str(home), "dataset_id": "wards"},
        "model": {"family": "vae", "width": 4, "latent": 2, "hidden": 8},
        "privacy": {"epsilon": 1.0, "mechanism": "central", "sampling_rate": 1.0},
        "evaluation": {"every": 0, "samples": 128},
        "policy": {"epsilon_lifetime": 2.0, "delta_lifetime": 1e-3},
    }
    for section, values in changes.items():
        options.setdefault(section, {}).update(values)
    return RunConfig.model_validate(options).resolved()


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Durable ledgers and keys after one run."""
    home = tmp_path_factory.mktemp("used") / "home"
    simulated(durable(home), home.parent / "first")
    return home


def identity(found: os.stat_result) -> tuple[int, int]:
    """Which file it is, by whatever name."""
    return found.st_dev, found.st_ino


class TestDurableLedgers:
    """One data set, several runs: `data.ledger` outlives the run folders."""

    @pytest.fixture
    def home(self, used: Path, tmp_path: Path) -> Path:
        """Where ledgers and keys are kept, after one run over the data set."""
        return Path(shutil.copytree(used, tmp_path / "home"))

    @pytest.fixture
    def opened(self, tmp_path: Path) -> Path:
        """The same before any run: one ledger was made and nothing else."""
        (tmp_path / "opened").mkdir()
        Ledger.create(tmp_path / "opened" / "site-001.sqlite", "site-001", simulated=True)
        return tmp_path / "opened"

    def refused(
        self,
        home: Path,
        config: RunConfig,
        kind: type[LedgerError],
        reason: str,
        schema: Schema | None = None,
    ) -> str:
        """Nothing has run and nothing was written down; why."""
        before, known, folder = secrets_of(home), heads(home), RunFolder(home.parent / "refused")
        seen: list[Event] = []
        with folder.locked(resume=False), pytest.raises(kind, match=reason) as caught:
            local(config, folder.path, seen.append, schema)
        assert "\n" not in str(caught.value)
        assert seen == []
        assert not (folder.path / "events.jsonl").exists()
        assert list((folder.path / "checkpoint").iterdir()) == []
        assert list(folder.path.glob("sites/*/cleaning.json")) == []
        assert secrets_of(home) == before
        assert heads(home) == known
        return str(caught.value)

    def test_runs_add_up_until_the_budget_is_used(self, home: Path, tmp_path: Path) -> None:
        config, keys, after_one = durable(home), secrets_of(home), heads(home)
        price = plan(config)
        assert price.training_epsilon is not None
        assert price.holdout_epsilon is not None
        simulated(config, tmp_path / "second")
        assert not (tmp_path / "second" / "ledger").exists()
        assert secrets_of(home) == keys
        assert len(set(keys.values())) == 2
        run_id = RunFolder(tmp_path / "second").read_json("metrics.json")["run_id"]
        for name, head in after_one.items():
            # The same ledger, gone on with: what it was is still in it.
            found = verify(home / f"{name}.sqlite", head).books
            assert list(found.runs)[1:] == [run_id]
            assert list(found.datasets) == ["wards"]
            assert {str(s.account): s.epsilon for s in found.statements()} == {
                "account wards/record/training": pytest.approx(2 * price.training_epsilon),
                "account wards/record/holdout": pytest.approx(2 * price.holdout_epsilon),
            }
        # A third run would make it 3 of 2.
        text = self.refused(home, config, BudgetError, "^site-001: account wards/record/training: ")
        spent, asked = 2 * price.training_epsilon, price.training_epsilon
        assert f"epsilon {spent:.6g} of 2 is spent, {asked:.6g} more is asked" in text
        assert f"which makes {spent + asked:.6g} by addition" in text

    def test_one_site_that_has_spent_it_elsewhere_is_enough(self, home: Path) -> None:
        config = durable(home)
        ledger = Ledger.open(home / "site-002.sqlite")
        ledger.reserve(order("elsewhere", "0" * 64, "wards", plan(config)), Lifetime(2.0, 1e-3))
        ledger.close()
        self.refused(home, config, BudgetError, "^site-002: account wards/record/training: ")

    def test_another_data_set_has_an_account_of_its_own(self, home: Path, tmp_path: Path) -> None:
        """Where there is no more left for the first one."""
        tight = {"policy": {"epsilon_lifetime": 1.0}}
        self.refused(home, durable(home, **tight), BudgetError, "account wards/record/training")
        other = durable(home, data={"dataset_id": "clinics"}, **tight)
        simulated(other, tmp_path / "other")
        accounts = [statement.account.dataset_id for statement in books(home).statements()]
        assert accounts == ["clinics", "clinics", "wards", "wards"]

    def test_a_lost_ledger_is_not_made_anew(self, home: Path) -> None:
        """Its key is there, so that there was one: a new one would forget what is spent."""
        (home / "site-001.sqlite").unlink()
        self.refused(home, durable(home), UnavailableError, "site-001.* put the ledger back")
        assert not (home / "site-001.sqlite").exists()

    def test_a_lost_key_is_not_made_anew(self, home: Path) -> None:
        """Records that were trained on would be held out, unpaid."""
        key = home / "site-002.SIMULATED-split.key"
        key.unlink()
        self.refused(home, durable(home), UnavailableError, f"{key.name}: is missing; put it back")
        assert not key.exists()

    def test_but_one_that_was_never_used_is(self, opened: Path, tmp_path: Path) -> None:
        """A crash after the making of a ledger leaves it without its key."""
        simulated(durable(opened), tmp_path / "first")
        assert [len(bytes.fromhex(key.decode())) for key in secrets_of(opened).values()] == [32, 32]

    def test_a_key_is_on_the_disk_before_a_record_has_a_side(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Or a power cut could leave a ledger of a data set whose sides nobody knows any more."""
        synced: list[tuple[int, int]] = []
        sync, home = os.fsync, tmp_path / "home"

        def noted(descriptor: int) -> None:
            synced.append(identity(os.fstat(descriptor)))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", noted)
        simulated_site(1, None, tmp_path / "run", durable(home), 9).close()
        first = synced.index(identity((home / "site-001.SIMULATED-split.key").stat()))
        assert identity(home.stat()) in synced[first:]

    def test_two_processes_that_begin_at_once_agree_on_a_key(self, tmp_path: Path) -> None:
        """Whoever is first makes it; a site with two would split one data set in two ways."""
        workers = 4
        barrier = threading.Barrier(workers)

        def begin(home: Path, worker: int) -> bytes:
            barrier.wait(60)
            site = simulated_site(1, None, home / f"run-{worker}", durable(home), 9)
            site.close()
            return site._split_key

        with ThreadPoolExecutor(workers) as pool:
            for attempt in range(25):
                home = tmp_path / str(attempt)
                keys = set(pool.map(partial(begin, home), range(workers)))
                assert len(keys) == 1
                assert {f"{key.hex()}\n".encode() for key in keys} == {*secrets_of(home).values()}
                assert books(home).opened["site"] == "site-001"
                assert list(home.glob("*.partial")) == []  # no draft is left behind

    @pytest.mark.parametrize("content", ["", "no key", "ab" * 31, "ab" * 33])
    def test_a_damaged_key_is_refused(self, opened: Path, content: str) -> None:
        (opened / "site-001.SIMULATED-split.key").write_text(content, encoding="ascii")
        self.refused(opened, durable(opened), UnavailableError, "site-001.*: holds no key")

    def test_another_key_is_refused(self, home: Path) -> None:
        (home / "site-001.SIMULATED-split.key").write_text("ab" * 32, encoding="ascii")
        text = self.refused(home, durable(home), TermsError, 'data set "wards": split_key = ')
        assert "ab" * 8 not in text  # only hashes of it are named

    @pytest.mark.parametrize(
        ("changes", "change"),
        [
            ({"data": {"holdout": 0.2}}, "holdout = 0.2: was 0.1 in its first run"),
            ({"data": {"audit": 0.1}}, "audit = 0.1: was 0.0 in its first run"),
            ({"clean": {"out_of_bounds": "drop"}}, "identity = "),
            ({"federation": {"seed": 1}}, "shared_out = iid to 2 sites, seed 1, "),
            ({"federation": {"sites": 1}}, "shared_out = iid to 1 sites, seed 0, "),
            ({"data": {"partition": "column", "column": "label"}}, "shared_out = column to 2"),
        ],
    )
    def test_nothing_that_decides_on_sides_may_change(
        self, home: Path, changes: dict[str, dict[str, Any]], change: str
    ) -> None:
        """A record that was trained on would be held out, or the other way round."""
        text = self.refused(home, durable(home, **changes), TermsError, change)
        assert text.startswith('site-001: data set "wards": ')
        assert "a record may never change its side; keep it" in text

    def test_nor_the_schema_that_records_are_known_by(self, home: Path) -> None:
        turned = ImageSchema(height=8, width=8, classes=tuple("9876543210"))
        self.refused(home, durable(home), TermsError, "identity = ", turned)

    def test_what_decides_on_no_side_may(self, home: Path, tmp_path: Path) -> None:
        """Another model and other options of training are another run over the same data."""
        other = durable(home, model={"latent": 3}, training={"learning_rate": 0.1})
        simulated(other, tmp_path / "other")
        assert len(books(home).runs) == 2

    def test_without_a_mechanism_no_budget_pays(
        self, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match=r'no budget pays for .*mechanism = "none"'):
            fedveil.simulate(
                make_config(privacy={"mechanism": "none"}),
                out=tmp_path / "run",
                data={"ledger": str(tmp_path / "home"), "dataset_id": "wards"},
                policy={"epsilon_lifetime": 2.0, "delta_lifetime": 1e-3},
            )
        assert list(tmp_path.iterdir()) == []
