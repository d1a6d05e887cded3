"""The round of statistics: what is released and kept, when, and what a crash leaves of it."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedveil
from fedveil.client import work
from fedveil.client.statistics import statistics_sums
from fedveil.config import ConfigError, FedveilError, RunConfig
from fedveil.data_prep import Encoded, run_schema
from fedveil.data_prep.queries import Noisy, answers, noisy, run_workload
from fedveil.data_prep.schema import TableSchema
from fedveil.ledgers import find
from fedveil.models import Batch
from fedveil.models.state import to_bytes
from fedveil.privacy.ledger import verify
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import Plan, plan
from fedveil.server import rounds, statistics, warm_start
from fedveil.server.replies import Collected
from fedveil.server.statistics import FILE, Released, keep, kept, released
from fedveil.server.store import RunFolder
from fedveil.wire import NO_LEDGER, Refusal, Update

MakeConfig = Callable[..., RunConfig]
OpenWorld = Callable[..., Any]
TABLE = {"data": {"source": "sklearn:breast_cancer"}, "model": {"hidden": 4, "latent": 2}}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is begun in a moment; what it is trained on is `warm_start`'s."""
    monkeypatch.setattr(warm_start, "_STEPS", 3)
    monkeypatch.setattr(warm_start, "_SAMPLES", 50)

    def anything(schema: TableSchema, statistics: Noisy, generator: torch.Generator) -> Batch:
        del statistics
        x = torch.rand(50, schema.width, generator=generator)
        return Batch(x, torch.zeros(50, dtype=torch.int64))

    monkeypatch.setattr(warm_start, "_samples", anything)


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    """A run of three sites, all that is asked one table."""
    return make_config(
        **TABLE,
        privacy={"epsilon": 2.0, "sampling_rate": 1.0, "statistics_share": 0.5},
        evaluation={"samples": 100},
        statistics={"marginals": [["diagnosis", "mean_radius"]]},
    )


@pytest.fixture
def whole(config: RunConfig) -> RunConfig:
    """The same with nothing trained beyond the statistics."""
    privacy = config.privacy.model_copy(update={"statistics_share": 1.0})
    return config.model_copy(update={"privacy": privacy})


def folder_of(run: fedveil.Run | Path) -> RunFolder:
    return RunFolder(run if isinstance(run, Path) else run.path)


def told(run: fedveil.Run | Path) -> list[str]:
    return [event["event"] for event in folder_of(run).events()]


def collected(length: int, *values: float, **more: Any) -> Collected:  # noqa: ANN401
    parts = tuple(
        Update("run", 0, 0, {}, {"statistics/answers": np.full(length, value)}, NO_LEDGER)
        for value in values
    )
    sites = tuple(range(1, len(values) + 1))
    options = {"dropped": {}, "ledgers": {}, "noises": 1.0, **more}
    return Collected(parts=parts, sites=sites, **options)


class TestReleased:
    @pytest.fixture
    def asked(self, config: RunConfig) -> tuple[RunConfig, Any, Plan]:
        resolved = config.resolved("table")
        schema = run_schema(resolved)
        return resolved, schema, replace(plan(resolved), statistics_noise=2.0)

    def test_a_trusted_server_adds_the_noise_once(self, asked: Any, coins: Coins) -> None:  # noqa: ANN401
        config, schema, priced = asked
        workload = run_workload(config, schema, 2.0)
        found = released(collected(workload.length, 1e6, 2e6), config, schema, priced, coins)
        assert found.scale == pytest.approx(2.0 * workload.sensitivity)
        noise = (found.vector - 3e6) / found.scale
        # 5.4 standard errors: once in 1e7 keys.
        assert abs(noise.mean()) < 5.4 / math.sqrt(workload.length)
        assert abs(noise.std() - 1) < 5.4 / math.sqrt(2 * workload.length)

    @pytest.mark.parametrize("mechanism", ["local", "distributed", "none", "site"])
    def test_others_add_none(self, asked: Any, coins: Coins, mechanism: str) -> None:  # noqa: ANN401
        config, schema, priced = asked
        length = run_workload(config, schema, 2.0).length
        priced = replace(priced, mechanism=mechanism)
        found = released(collected(length, 1.0, 2.0), config, schema, priced, coins)
        assert np.array_equal(found.vector, np.full(length, 3.0))

    def test_its_scale_has_all_noise_in_it(self, asked: Any, coins: Coins) -> None:  # noqa: ANN401
        """Of more sites than are counted on, for a coarse grid, of a site's many records."""
        config, schema, priced = asked
        workload = run_workload(config, schema, 2.0)
        priced = replace(priced, mechanism="local", statistics_units=7.0)
        more = {"noises": 4.0, "rounding": {"statistics": 1.5, "update": 9.0}}
        found = released(collected(workload.length, 1.0, **more), config, schema, priced, coins)
        assert found.scale == pytest.approx(2.0 * workload.sensitivity * 7.0 * 1.5 * 2.0)

    def test_is_kept_to_the_bit(self, asked: Any, tmp_path: Path) -> None:  # noqa: ANN401
        config, schema, priced = asked
        workload = run_workload(config, schema, 2.0)
        vector = np.random.default_rng(0).normal(0, 1e3, workload.length)
        found = Released(workload, vector, 3.25)
        (tmp_path / "run").mkdir()
        folder = RunFolder(tmp_path / "run")
        first = keep(folder, found, "run-a", config, schema, priced)
        again = kept(folder, "run-a", config, schema, priced)
        direct = noisy(workload, vector, 3.25, config.trained)
        for found_again in (first, again):
            assert found_again.noise == direct.noise
            assert found_again.units == config.trained == pytest.approx(569 * 0.9)
            for name, values in direct.values.items():
                assert found_again.values[name].tobytes() == values.tobytes()

    def test_what_is_no_such_file_is_refused_in_one_line(
        self,
        asked: Any,  # noqa: ANN401
        tmp_path: Path,
    ) -> None:
        config, schema, priced = asked
        folder = RunFolder(tmp_path)
        with pytest.raises(FedveilError, match=FILE):
            kept(folder, "run-a", config, schema, priced)
        workload = run_workload(config, schema, 2.0)
        found = Released(workload, np.zeros(workload.length), 1.0)
        keep(folder, found, "run-b", config, schema, priced)
        with pytest.raises(FedveilError, match=r"is of run run-b, not run-a$"):
            kept(folder, "run-a", config, schema, priced)
        raw = (tmp_path / FILE).read_bytes()
        (tmp_path / FILE).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        with pytest.raises(FedveilError, match="is damaged"):
            kept(folder, "run-b", config, schema, priced)
        (tmp_path / FILE).write_bytes(to_bytes({"other": np.zeros(3)}, {"run_id": "x"}))
        with pytest.raises(FedveilError, match="holds no statistics of this run"):
            kept(folder, "x", config, schema, priced)
        short = to_bytes({"answers": np.zeros(3)}, {"run_id": "x", "scale": 1.0})
        (tmp_path / FILE).write_bytes(short)
        with pytest.raises(FedveilError, match="holds no statistics of this run"):
            kept(folder, "x", config, schema, priced)


class TestARun:
    def test_asks_once_before_all_rounds(self, config: RunConfig, tmp_path: Path) -> None:
        run = fedveil.simulate(config, out=tmp_path / "run")
        events = [e for e in run.events() if e["event"] not in {"ready", "waiting", "evaluated"}]
        names = [event["event"] for event in events]
        first = names.index("statistics")
        assert names[first - 1 :] == [
            "run", "statistics", "prepared", "round", "round", "finished",
        ]  # fmt: skip
        assert names.count("statistics") == 1
        priced = plan(run.config)
        described, prepared = events[first], events[first + 1]
        assert described["epsilon"] == priced.statistics_epsilon
        assert described["epsilon"] < events[first + 2]["epsilon"] == priced.schedule[0]
        assert (described["sites"], described["dropped"]) == (3, [])
        assert described["cells"] == run.statistics.asked.length
        assert (prepared["steps"], prepared["samples"]) == (3, 50)
        assert run.privacy["statistics"] == 1
        books = [ledger.books.runs for ledger in _ledgers(run.path)]
        made = [next(iter(runs.values())).made for runs in books]
        assert [one["statistics"] for one in made] == [1, 1, 1]
        assert [one["rounds"] for one in made] == [2, 2, 2]

    def test_says_of_the_records_what_is_there(self, config: RunConfig, tmp_path: Path) -> None:
        """Without a mechanism all sums are exact: 357 of the 569 are benign, less a tenth."""
        sections = {"privacy": config.privacy.model_copy(update={"mechanism": "none"})}
        run = fedveil.simulate(config.model_copy(update=sections), out=tmp_path / "run")
        name = next(n for n in run.statistics.values if n.startswith("cells"))
        counts = run.statistics.values[name]
        assert counts.sum() == pytest.approx(569 * 0.9, abs=25)
        assert counts.sum() == round(counts.sum())
        assert set(run.statistics.noise.values()) == {0.0}

    def test_alone_is_a_whole_run(self, whole: RunConfig, tmp_path: Path) -> None:
        run = fedveil.simulate(whole, out=tmp_path / "run")
        assert [name for name in told(run) if name in {"statistics", "prepared", "round"}] == [
            "statistics", "prepared",
        ]  # fmt: skip
        assert run.config.federation.rounds == 0
        assert run.metrics["rounds"] == 0
        assert run.metrics["evaluated"]["evaluations"] == 1
        assert run.privacy["epsilon"] <= 2.0
        assert len(run.sample(5)) == 5

    def test_too_many_cells_are_refused_before_anybody_is_asked(
        self, config: RunConfig, tmp_path: Path
    ) -> None:
        few = config.statistics.model_copy(update={"max_cells": 5})
        with pytest.raises(ConfigError, match=r"^statistics\.max_cells = 5: the tables asked"):
            fedveil.simulate(config.model_copy(update={"statistics": few}), out=tmp_path / "run")
        assert not (tmp_path / "run" / "checkpoint" / "asked.json").exists()


def _ledgers(path: Path) -> list[Any]:
    return [verify(file) for file in sorted(find(path))]


class Killed(BaseException):
    """As if the process were."""


def cut(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:  # noqa: ANN401
    def die(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(owner, name, die)


class TestACrash:
    def lost(self, config: RunConfig, out: Path, owner: Any, name: str) -> None:  # noqa: ANN401
        with pytest.MonkeyPatch.context() as patch:
            cut(patch, owner, name)
            with pytest.raises(Killed):
                fedveil.simulate(config, out=out)

    def test_before_the_answers_came_the_rounds_go_on_without(
        self, config: RunConfig, tmp_path: Path
    ) -> None:
        out = tmp_path / "run"
        self.lost(config, out, statistics, "released")
        run = fedveil.simulate(config, out=out, resume=True)
        events = list(run.events())
        (resumed,) = [event for event in events if event["event"] == "resumed"]
        assert resumed["lost_statistics"] is True
        assert resumed["epsilon"] == plan(run.config).statistics_epsilon  # it is spent
        assert not {"statistics", "prepared"} & {*told(run)}
        assert told(run).count("round") == 2
        made = [next(iter(one.books.runs.values())).made for one in _ledgers(out)]
        assert [one["statistics"] for one in made] == [1, 1, 1]
        assert run.finished

    def test_and_where_there_are_none_the_run_fails_and_says_so(
        self, whole: RunConfig, tmp_path: Path
    ) -> None:
        out = tmp_path / "run"
        self.lost(whole, out, statistics, "released")
        line = r"^statistics: were lost in a crash and are spent; begin a new run$"
        for _ in range(2):
            with pytest.raises(FedveilError, match=line):
                fedveil.simulate(whole, out=out, resume=True)
        assert told(out)[-1] == "failed"

    @pytest.mark.parametrize("share", [0.5, 1.0])
    def test_while_the_model_is_made_of_them_nothing_is_lost(
        self, config: RunConfig, whole: RunConfig, tmp_path: Path, share: float
    ) -> None:
        config, out = (whole if share == 1 else config), tmp_path / "run"
        self.lost(config, out, rounds, "begin")
        before = (out / FILE).read_bytes()
        run = fedveil.simulate(config, out=out, resume=True)
        (resumed,) = [event for event in run.events() if event["event"] == "resumed"]
        assert resumed["lost_statistics"] is False
        names = told(run)
        assert (names.count("statistics"), names.count("prepared")) == (1, 1)
        assert names.index("statistics") < names.index("resumed") < names.index("prepared")
        assert (out / FILE).read_bytes() == before
        made = [next(iter(one.books.runs.values())).made for one in _ledgers(out)]
        assert [one["statistics"] for one in made] == [1, 1, 1]

    def test_but_a_file_that_is_damaged_is_lost(self, config: RunConfig, tmp_path: Path) -> None:
        out = tmp_path / "run"
        self.lost(config, out, rounds, "begin")
        (out / FILE).write_bytes(b"torn")
        run = fedveil.simulate(config, out=out, resume=True)
        (resumed,) = [event for event in run.events() if event["event"] == "resumed"]
        assert resumed["lost_statistics"] is True
        assert "prepared" not in told(run)

    def test_after_it_was_stored_nobody_is_asked_again(
        self, config: RunConfig, tmp_path: Path
    ) -> None:
        out = tmp_path / "run"
        self.lost(config, out, rounds, "_round")
        stored, _ = folder_of(out).load_checkpoint()
        assert stored is not None
        assert (stored.described, stored.state.round) == (True, 0)
        with pytest.MonkeyPatch.context() as patch:
            cut(patch, rounds, "begin")
            run = fedveil.simulate(config, out=out, resume=True)
        assert (told(run).count("statistics"), told(run).count("round")) == (1, 2)
        (resumed,) = [event for event in run.events() if event["event"] == "resumed"]
        assert resumed["lost_statistics"] is False


class TestPostProcessing:
    def test_equal_vectors_of_unequal_data_make_the_same_model(
        self, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever the sites hold, what the rounds begin with is made of the vector alone."""
        models = []
        real = statistics.released

        def fixed(*arguments: Any) -> Released:  # noqa: ANN401
            found = real(*arguments)
            noise = np.random.default_rng(4).normal(20, 5, found.asked.length)
            return Released(found.asked, noise, 5.0)

        def noted(*arguments: Any) -> Any:  # noqa: ANN401
            made = warm_start.begin(*arguments)
            models.append({name: array.tobytes() for name, array in made.model.items()})
            raise Killed

        monkeypatch.setattr(statistics, "released", fixed)
        monkeypatch.setattr(rounds, "begin", noted)
        for alpha in (0.3, 5.0):
            parts = {"partition": "dirichlet", "alpha": alpha, "holdout": 0.1}
            data = config.data.model_copy(update=parts)
            with pytest.raises(Killed):
                fedveil.simulate(
                    config.model_copy(update={"data": data}), out=tmp_path / f"{alpha}"
                )
        assert models[0] == models[1]


SECTIONS: dict[str, Any] = {
    **TABLE,
    "federation": {"sites": 4, "rounds": 2},
    "statistics": {"marginals": [["diagnosis", "mean_radius"]]},
}


class TestSites:
    def world(self, open_world: OpenWorld, **privacy: Any) -> Any:  # noqa: ANN401
        options = {"epsilon": 2.0, "statistics_share": 0.5, **privacy}
        return open_world(**SECTIONS, privacy=options)

    @pytest.mark.parametrize("mechanism", ["distributed", "central", "local"])
    def test_debit_before_a_record_is_read(
        self, open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch, mechanism: str
    ) -> None:
        world = self.world(open_world, mechanism=mechanism)
        seen = []
        real = statistics_sums

        def noted(*arguments: Any) -> Any:  # noqa: ANN401
            seen.append([world.entries(number) for number in world.sites])
            return real(*arguments)

        monkeypatch.setattr(work, "statistics_sums", noted)
        reads = []
        for number, site in world.sites.items():

            def read(schema: Any, raw: Any = site._read(world.schema), by: int = number) -> Any:  # noqa: ANN401, B008
                del schema
                reads.append((by, world.entries(by)))
                return raw

            site._read = read
        found = world.ask(0, statistics=1)
        assert len(found.sites) == 4
        assert sorted(reads) == [(number, {"statistics": 1}) for number in (1, 2, 3, 4)]
        assert len(seen) == 4

    @pytest.mark.parametrize("mechanism", ["distributed", "central"])
    def test_the_sum_has_the_noise_that_is_told(
        self, open_world: OpenWorld, mechanism: str
    ) -> None:
        """Against the sites' exact sums; 5.4 standard errors, once in 1e7 keys."""
        world = self.world(open_world, mechanism=mechanism)
        exact = world.ask(0, statistics=1)
        found = released(exact, world.config, world.schema, world.plan, Coins(bytes(32)))
        total = np.zeros(found.asked.length)
        for site in world.sites.values():
            side = site.records(world.config, world.schema).training
            encoded = Encoded(side.batch.x.numpy(), side.batch.y.numpy())
            total += answers(found.asked, encoded, world.schema)
        noise = (found.vector - total) / found.scale
        assert len(noise) > 1000
        assert abs(noise.std() - 1) < 5.4 / math.sqrt(2 * len(noise))
        assert abs(noise.mean()) < 5.4 / math.sqrt(len(noise))
        least = world.plan.statistics_noise * found.asked.sensitivity
        assert found.scale >= least * (1 - 1e-9)

    def test_a_second_time_is_refused_by_each_ledger(self, open_world: OpenWorld) -> None:
        world = self.world(open_world, mechanism="central")
        world.ask(0, statistics=1)
        for number in (1, 2):
            with pytest.raises(FedveilError, match=rf"{Refusal.BUDGET.value}|BUDGET|budget"):
                world.ask(0, statistics=number)
        assert [world.entries(number) for number in world.sites] == [{"statistics": 1}] * 4

    def test_of_an_epoch_no_more_keys_are_made_than_sums_are_left(
        self, open_world: OpenWorld
    ) -> None:
        world = self.world(open_world, mechanism="distributed")
        # One of statistics, two rounds, one for the last evaluation.
        assert world.channel.secure.federation.rounds == 4


def test_events_are_json(config: RunConfig, tmp_path: Path) -> None:
    run = fedveil.simulate(config, out=tmp_path / "run")
    assert json.loads(json.dumps(list(run.events()), allow_nan=False))
