"""The local engine: real apps and messages, isolated sites, secret coins, any number of workers."""

import os
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fedveil
from fedveil.config import ConfigError, RunConfig
from fedveil.data_prep import run_schema
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
from fedveil.models.state import read_file
from fedveil.privacy.noise import Coins
from fedveil.server import simulation
from fedveil.server.app import ignore
from fedveil.server.rounds import RunError
from fedveil.server.simulation import LocalGrid, load_shards, local_grid, run_local
from fedveil.server.store import RunFolder

MakeConfig = Callable[..., RunConfig]
Handler = Callable[[Message, Context], RecordDict]
PLANTED = "PATIENT-4711"


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
    schema = run_schema(config)
    RunFolder(folder).create()
    run_local(config, schema, load_shards(config, schema), folder, observe)
    return read_file(folder / "model.safetensors")[0]


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

    @pytest.mark.parametrize("strategy", ["adam", "fedavg"])
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

    def test_each_site_has_a_folder_and_a_key_of_its_own(self, finished_run: fedveil.Run) -> None:
        folders = sorted(p for p in (finished_run.path / "sites").iterdir() if p.is_dir())
        assert [folder.name for folder in folders] == ["site-001", "site-002", "site-003"]
        keys = [(f / "SIMULATED-split.key").read_text(encoding="utf-8") for f in folders]
        assert len(set(keys)) == 3
        for folder in folders:
            assert (folder / "SIMULATED-split.key").stat().st_mode & 0o077 == 0
            assert (folder / "cleaning.json").is_file()

    @pytest.mark.parametrize("mechanism", ["none", "central", "local"])
    def test_a_failing_site_takes_part_and_says_why_to_itself_only(
        self, make_config: MakeConfig, tmp_path: Path, mechanism: str
    ) -> None:
        """The federation is not told; whoever simulates one is, at the end of the round."""
        config = make_config(privacy={"mechanism": mechanism}).resolved()
        folder = RunFolder(tmp_path / "run")
        folder.create()
        log = folder.path / "sites" / "site.log"
        with pytest.raises(RunError) as caught:
            run_spoilt(config, folder, [3])
        assert str(caught.value).startswith("site-003: ")
        assert str(log) in str(caught.value)
        assert "SimpleNamespace" not in str(caught.value)
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

    def test_many_failing_sites_are_not_all_named(
        self, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        config = make_config(federation={"sites": 5}, privacy={"mechanism": "none"}).resolved()
        folder = RunFolder(tmp_path / "run")
        folder.create()
        with pytest.raises(RunError, match=r"^site-001, site-002, site-004, \.\.\.: "):
            run_spoilt(config, folder, [1, 2, 4, 5])
        assert list(folder.events())[-1]["event"] == "failed"

    def test_all_sites_failing_is_no_finished_run(
        self, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        config = make_config(privacy={"mechanism": "none"}).resolved()
        folder = RunFolder(tmp_path / "run")
        folder.create()
        with pytest.raises(RunError, match=r"^site-001, site-002, site-003: "):
            run_spoilt(config, folder, [1, 2, 3])
        assert list(folder.events())[-1]["event"] == "failed"

    def test_without_a_failure_there_is_neither_error_nor_log(
        self, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        config = make_config(privacy={"mechanism": "none"}).resolved()
        simulated(config, tmp_path / "run")
        assert not (tmp_path / "run" / "sites" / "site.log").exists()


def run_spoilt(config: RunConfig, folder: RunFolder, failing: Collection[int]) -> None:
    """A simulation some of whose sites hold what is no data at all."""
    schema = run_schema(config)
    shards = load_shards(config, schema)
    broken = SimpleNamespace(labels=PLANTED)
    parts = tuple(
        broken if node in failing else part for node, part in enumerate(shards.parts, start=1)
    )
    run_local(config, schema, simulation.Shards(parts, shards.report), folder.path, ignore)


def equal_secrets(patch: pytest.MonkeyPatch) -> None:
    """Gives the sites and the server of the next run the same secrets every time."""
    numbers = iter(range(1000))

    def next_key(count: int = 32) -> bytes:
        return next(numbers).to_bytes(count, "big")

    secrets = SimpleNamespace(
        token_bytes=next_key,
        token_hex=lambda count: os.urandom(count).hex(),
        randbits=lambda _: 77,
    )
    patch.setattr(simulation, "secrets", secrets)
    patch.setattr(Coins, "from_system", classmethod(lambda cls: cls(next_key())))
