"""The Python API: simulate, load, sample, and what a run says of itself."""

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import fedveil
from fedveil import api as api_module
from fedveil.api import default_folder, resolve
from fedveil.config import ConfigError, FedveilError, RunConfig

MakeConfig = Callable[..., RunConfig]
PRIVACY_KEYS = {
    "unit", "mechanism", "against", "epsilon", "delta", "target_epsilon", "accountant",
}  # fmt: skip
TINY = """
[federation]
sites = 2
rounds = 1
[data]
source = "sklearn:digits"
[model]
family = "vae"
width = 4
latent = 2
[privacy]
mechanism = "none"
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A configuration file of one quick round."""
    file = tmp_path / "tiny.toml"
    file.write_text(TINY, encoding="utf-8")
    return file


def keys(value: Any) -> Iterator[str]:  # noqa: ANN401
    """All keys, at every depth."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


class TestSimulate:
    def test_by_path(self, tiny: Path, tmp_path: Path) -> None:
        run = fedveil.simulate(tiny, out=tmp_path / "run")
        assert run.path == tmp_path / "run"
        assert (run.metrics["rounds"], run.metrics["sites"]) == (1, 2)

    def test_by_text_and_with_overrides(self, tiny: Path, tmp_path: Path) -> None:
        run = fedveil.simulate(
            str(tiny), out=str(tmp_path / "run"), federation={"sites": 3, "name": "other"}
        )
        assert run.metrics["sites"] == 3
        assert (run.config.federation.name, run.config.federation.rounds) == ("other", 1)

    def test_by_configuration_with_overrides(self, make_config: MakeConfig, tmp_path: Path) -> None:
        config = make_config()
        run = fedveil.simulate(
            config,
            out=tmp_path / "run",
            privacy={"mechanism": "none"},
            federation={"rounds": 1},
        )
        assert run.config.privacy.mechanism == "none"
        assert (run.metrics["rounds"], run.metrics["sites"]) == (1, 3)
        assert config.privacy.mechanism == "central"

    def test_it_can_be_watched(self, tiny: Path, tmp_path: Path) -> None:
        seen: list[dict[str, Any]] = []
        run = fedveil.simulate(tiny, out=tmp_path / "run", observe=seen.append)
        assert seen == list(run.events())

    def test_without_a_folder_it_makes_one(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        run = fedveil.simulate(tiny)
        assert run.path.parent == Path("runs")
        assert run.path.name.startswith("fedveil-")

    def test_two_runs_in_one_second_have_two_folders(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Stopped(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> "Stopped":  # noqa: ANN401
                del tz
                return cls(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(api_module, "datetime", Stopped)
        first = default_folder("digits")
        first.mkdir(parents=True)
        assert default_folder("digits") != first

    def test_a_folder_that_holds_something_is_left_alone(self, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.txt").write_text("mine", encoding="utf-8")
        with pytest.raises(ConfigError, match="not empty"):
            fedveil.simulate(tiny, out=tmp_path / "run")
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]

    def test_a_budget_out_of_reach_runs_nothing(self, tiny: Path, tmp_path: Path) -> None:
        """`ConfigError: ... Nothing has run`: so there is no folder either."""
        with pytest.raises(ConfigError, match="epsilon"):
            fedveil.simulate(
                tiny, out=tmp_path / "run", privacy={"mechanism": "central", "epsilon": 1e-7}
            )
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        "overrides",
        [
            {"privacy": {"epsilon": -1.0}},
            {"privacy": {"epsilom": 1.0}},
            {"nonsense": {"a": 1}},
            {"aggregation": {"strategy": "median"}},
        ],
    )
    def test_wrong_overrides(self, tiny: Path, tmp_path: Path, overrides: dict[str, Any]) -> None:
        with pytest.raises(ConfigError):
            fedveil.simulate(tiny, out=tmp_path / "run", **overrides)
        assert not (tmp_path / "run").exists()


class TestResolve:
    def test_derived_values_are_written_in(self, make_config: MakeConfig) -> None:
        config, schema = resolve(make_config())
        assert config.data.records == 1797
        assert config.aggregation.strategy == "adam"
        assert config.federation.min_replies == 2
        assert config.privacy.delta == pytest.approx(1e-5)
        assert schema.classes == tuple("0123456789")

    def test_it_can_be_resolved_again(self, make_config: MakeConfig) -> None:
        config, _ = resolve(make_config())
        assert resolve(config)[0] == config
        assert resolve(config, {"federation": {"rounds": 5}})[0].federation.rounds == 5


SOURCES = ["sklearn:digits", "sklearn:breast_cancer"]


@pytest.fixture(scope="module")
def finished(
    finished_run: fedveil.Run,
    finished_table_run: fedveil.Run,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], fedveil.Run]:
    """A finished run of two rounds by source and mechanism."""
    runs = {
        ("sklearn:digits", "central"): finished_run,
        ("sklearn:breast_cancer", "central"): finished_table_run,
    }

    def find(source: str, mechanism: str) -> fedveil.Run:
        if (source, mechanism) not in runs:
            central = runs[source, "central"].config
            raw = central.model_dump(by_alias=True)
            raw["privacy"] |= {"mechanism": mechanism, "sampling_rate": None}
            raw["aggregation"], raw["training"]["learning_rate"] = {}, None
            folder = tmp_path_factory.mktemp("runs") / mechanism
            config = RunConfig.model_validate(raw)
            runs[source, mechanism] = fedveil.simulate(config, out=folder)
        return runs[source, mechanism]

    return find


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mechanism", ["central", "local", "none"])
class TestEveryMechanism:
    def test_metrics_keep_the_contract(
        self, finished: Callable[[str, str], fedveil.Run], source: str, mechanism: str
    ) -> None:
        run = finished(source, mechanism)
        metrics = run.metrics
        assert {
            "run_id", "family", "rounds", "privacy", "quality", "seconds", "sites",
        } <= metrics.keys()  # fmt: skip
        assert metrics["privacy"].keys() >= PRIVACY_KEYS
        assert metrics["family"] == "vae"
        assert (metrics["rounds"], metrics["sites"]) == (2, 3)
        assert metrics["seconds"]["total"] > 0
        assert metrics["privacy"]["mechanism"] == mechanism
        assert metrics["privacy"]["unit"] == "record"
        assert run.privacy == metrics["privacy"]

    def test_the_budget_is_kept(
        self, finished: Callable[[str, str], fedveil.Run], source: str, mechanism: str
    ) -> None:
        privacy = finished(source, mechanism).privacy
        if mechanism == "none":
            assert privacy["epsilon"] is None
            assert privacy["target_epsilon"] is None
            assert "NOBODY" in privacy["against"]
            return
        assert privacy["target_epsilon"] == 8.0
        # The budget is used up to the grid of the accountant, and never overdrawn.
        assert 7.9 < privacy["epsilon"] <= 8.0
        assert privacy["noise_multiplier"] > 0

    def test_events_say_what_was_spent(
        self, finished: Callable[[str, str], fedveil.Run], source: str, mechanism: str
    ) -> None:
        run = finished(source, mechanism)
        events = list(run.events())
        assert [event["event"] for event in events] == ["run", "round", "round", "finished"]
        spent = [event["epsilon"] for event in events if event["event"] == "round"]
        if mechanism == "none":
            assert spent == [None, None]
        else:
            assert 0 < spent[0] < spent[1] == run.privacy["epsilon"]

    def test_no_loss_and_no_count_leaves_a_site(
        self, finished: Callable[[str, str], fedveil.Run], source: str, mechanism: str
    ) -> None:
        """Privacy rule 1: every figure is accounted, public, or absent."""
        run = finished(source, mechanism)
        told = set(keys(run.metrics)) | set(keys(list(run.events())))
        words = {word for key in told - {"clipping_norm"} for word in key.split("_")}
        assert not words & {
            "loss", "losses", "record", "records", "example", "examples", "norm", "norms", "count",
            "counts", "kept", "size", "accuracy", "score", "gradient", "missing",
        }  # fmt: skip
        assert run.metrics["quality"] == {}

    def test_the_folder_is_complete(
        self, finished: Callable[[str, str], fedveil.Run], source: str, mechanism: str
    ) -> None:
        run = finished(source, mechanism)
        names = {path.name for path in run.path.iterdir()}
        assert {
            "config.toml", "schema.json", "events.jsonl", "environment.json", "checkpoint",
            "model.safetensors", "metrics.json", "samples.png",
        } <= names  # fmt: skip
        assert ("samples.csv" in names) == (source == "sklearn:breast_cancer")
        assert not [name for name in names if name.endswith(".partial")]
        assert run.config.privacy.mechanism == mechanism

    def test_it_can_be_loaded_and_sampled(
        self, finished: Callable[[str, str], fedveil.Run], source: str, mechanism: str
    ) -> None:
        run = fedveil.load(finished(source, mechanism).path)
        drawn = run.sample(5, seed=1)
        if source == "sklearn:digits":
            assert isinstance(drawn, np.ndarray)
            assert drawn.shape == (5, 8, 8)
            assert drawn.dtype == np.uint8
        else:
            assert isinstance(drawn, pl.DataFrame)
            assert drawn.shape == (5, 31)
            assert drawn["diagnosis"].is_in(["malignant", "benign"]).all()
            assert drawn["mean_radius"].is_between(0, 40).all()


class TestSample:
    def test_equal_seeds_are_equal(self, finished_run: fedveil.Run) -> None:
        first, again, other = (finished_run.sample(20, seed=seed) for seed in (1, 1, 2))
        assert isinstance(first, np.ndarray)
        assert isinstance(again, np.ndarray)
        assert isinstance(other, np.ndarray)
        assert first.tobytes() == again.tobytes() != other.tobytes()

    def test_of_a_table_too(self, finished_table_run: fedveil.Run) -> None:
        first, again, other = (finished_table_run.sample(20, seed=seed) for seed in (1, 1, 2))
        assert isinstance(first, pl.DataFrame)
        assert isinstance(again, pl.DataFrame)
        assert isinstance(other, pl.DataFrame)
        assert first.equals(again)
        assert not first.equals(other)

    def test_without_a_seed_they_are_fresh(self, finished_run: fedveil.Run) -> None:
        first, second = (finished_run.sample(20) for _ in range(2))
        assert not np.array_equal(np.asarray(first), np.asarray(second))

    def test_labels_are_obeyed(
        self, finished_run: fedveil.Run, finished_table_run: fedveil.Run
    ) -> None:
        images = finished_run.sample_records(3, 1, [9, 0, 4])
        assert images.labels.tolist() == ["9", "0", "4"]
        frame = finished_table_run.sample(3, 1, [1, 0, 1])
        assert isinstance(frame, pl.DataFrame)
        assert frame["diagnosis"].to_list() == ["benign", "malignant", "benign"]

    @pytest.mark.parametrize("labels", [[0], [0, 1, 2], [0, 10], [0, -1], []])
    def test_labels_are_checked(self, finished_run: fedveil.Run, labels: list[int]) -> None:
        with pytest.raises(ConfigError, match="labels: must be 2 class indices from 0 to 9"):
            finished_run.sample(2, labels=labels)

    @pytest.mark.parametrize("n", [0, -1])
    def test_at_least_one(self, finished_run: fedveil.Run, n: int) -> None:
        with pytest.raises(ConfigError, match=f"n = {n}: must be at least 1"):
            finished_run.sample(n)

    @pytest.mark.parametrize("seed", [-(2**80), 2**80])
    def test_a_seed_out_of_range_is_our_error(self, finished_run: fedveil.Run, seed: int) -> None:
        with pytest.raises(ConfigError, match="seed"):
            finished_run.sample(2, seed=seed)


class TestLoad:
    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FedveilError, match=r"metrics\.json"):
            fedveil.load(tmp_path / "gone")

    def test_an_unfinished_run(self, finished_run: fedveil.Run, tmp_path: Path) -> None:
        for name in ("config.toml", "schema.json", "events.jsonl"):
            (tmp_path / name).write_bytes((finished_run.path / name).read_bytes())
        with pytest.raises(FedveilError, match="finished run"):
            fedveil.load(tmp_path)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("metrics.json", "{}"),
            ("metrics.json", "[]"),
            ("metrics.json", "{"),
            ("schema.json", None),
            ("schema.json", "{}"),
            ("schema.json", "["),
            ("config.toml", None),
            ("config.toml", "= ="),
            ("model.safetensors", None),
            ("model.safetensors", ""),
            ("model.safetensors", "garbage"),
        ],
    )
    def test_a_damaged_run_is_our_error(
        self, finished_run: fedveil.Run, tmp_path: Path, name: str, content: str | None
    ) -> None:
        copied = copy_of(finished_run, tmp_path)
        if content is None:
            (copied / name).unlink()
        else:
            (copied / name).write_text(content, encoding="utf-8")
        with pytest.raises(FedveilError):
            fedveil.load(copied).sample(1)

    def test_a_model_of_another_run(self, finished_run: fedveil.Run, tmp_path: Path) -> None:
        copied = copy_of(finished_run, tmp_path)
        metrics = json.loads((copied / "metrics.json").read_text(encoding="utf-8"))
        metrics["run_id"] = "0000"
        (copied / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
        with pytest.raises(FedveilError, match="another run"):
            fedveil.load(copied).sample(1)

    def test_a_moved_run_still_works(self, finished_run: fedveil.Run, tmp_path: Path) -> None:
        moved = fedveil.load(copy_of(finished_run, tmp_path))
        assert np.array_equal(
            np.asarray(moved.sample(3, seed=1)), np.asarray(finished_run.sample(3, seed=1))
        )


def copy_of(run: fedveil.Run, target: Path) -> Path:
    """What is needed of a run, elsewhere."""
    for name in ("metrics.json", "schema.json", "config.toml", "model.safetensors"):
        (target / name).write_bytes((run.path / name).read_bytes())
    return target


def test_provenance(finished_run: fedveil.Run) -> None:
    assert finished_run.provenance() == {
        "synthetic": True,
        "generator": "fedveil vae",
        "run_id": finished_run.metrics["run_id"],
        "unit": "record",
        "mechanism": "central",
        "against": finished_run.privacy["against"],
        "epsilon": finished_run.privacy["epsilon"],
        "delta": finished_run.privacy["delta"],
        "not_claimed": [],
    }


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        fedveil.nonsense  # noqa: B018
    assert fedveil.Run is api_module.Run
