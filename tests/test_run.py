"""The Python API: simulate, load, sample, and what a run says of itself."""

import itertools
import json
import math
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import fedveil
from fedveil import api as api_module
from fedveil.api import default_folder, resolve
from fedveil.config import ConfigError, FedveilError, RunConfig
from fedveil.data_prep import modality
from fedveil.data_prep.partition import keyed_split
from fedveil.models import Batch, family, metrics
from fedveil.models.state import load_arrays, read_file
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import plan
from fedveil.server.evaluation import questions
from fedveil.server.simulation.sites import load_shards
from fedveil.server.store import Event

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
statistics_share = 0.0
mechanism = "none"
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A configuration file of one quick round."""
    file = tmp_path / "tiny.toml"
    file.write_text(TINY, encoding="utf-8")
    return file


PROBES = ("logistic", "mlp")
FIGURES = {
    "loss", "losses", "record", "records", "example", "examples", "norm", "norms", "count",
    "counts", "kept", "size", "accuracy", "auroc", "tv", "score", "gradient", "missing",
}  # fmt: skip
"""Words of what is made from records."""


def keys(value: Any) -> Iterator[str]:  # noqa: ANN401
    """All keys, at every depth."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


def without(values: Mapping[str, Any], *names: str) -> list[str]:
    """All keys at every depth, but those of some parts."""
    return list(keys({name: value for name, value in values.items() if name not in names}))


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
            {"aggregation": {"strategy": "krum"}},
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
            # What was derived from the mechanism is derived anew.
            raw["privacy"] |= {"mechanism": mechanism, "sampling_rate": None}
            raw["aggregation"], raw["training"]["learning_rate"] = {}, None
            raw["policy"] = {}
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
        # The model of round 1 is evaluated along with round 2, the last one by itself.
        assert [event["event"] for event in events] == [
            "run", "round", "round", "evaluated", "evaluated", "finished",
        ]  # fmt: skip
        spent = [event["epsilon"] for event in events if "epsilon" in event]
        if mechanism == "none":
            assert spent == [None] * 4
            return
        assert 0 < spent[0] <= spent[1] <= spent[2] <= spent[3] == run.privacy["epsilon"]
        accounts = run.privacy["training_epsilon"], run.privacy["holdout_epsilon"]
        assert max(accounts) == run.privacy["epsilon"]
        assert min(accounts) > 7.9
        assert run.privacy["evaluations"] == run.metrics["evaluated"]["evaluations"] == 2

    def test_evaluations_are_told(
        self, finished: Callable[[str, str], fedveil.Run], source: str, mechanism: str
    ) -> None:
        run = finished(source, mechanism)
        told = [event for event in run.events() if event["event"] == "evaluated"]
        assert [(event["round"], event["evaluation"]) for event in told] == [(1, 1), (2, 2)]
        for event in told:
            assert event["loss"] == event["quality"]["loss"]["value"]
        assert told[-1]["quality"] == run.metrics["quality"]
        assert run.metrics["evaluated"] == {"round": 2, "evaluations": 2}
        of_two = {f"tstr_{kind}_{name}" for kind in ("auroc", "accuracy") for name in PROBES}
        assert run.metrics["quality"].keys() == (
            {"loss", "one_way_tv", "tstr_accuracy_mlp"}
            if source == "sklearn:digits"
            else {"loss", "one_way_tv", "two_way_tv", *of_two}
        )

    def test_figures_have_a_range_and_their_noise(
        self, finished: Callable[[str, str], fedveil.Run], source: str, mechanism: str
    ) -> None:
        for name, figure in finished(source, mechanism).metrics["quality"].items():
            variation = name.endswith("_tv")
            assert figure.keys() == {"value", "noise"} | ({"floor"} if variation else set())
            assert (figure["noise"] == 0) if mechanism == "none" else (figure["noise"] > 0)
            if name != "loss":
                assert 0 <= figure["value"] <= 1
                assert 0 <= figure.get("floor", 0) <= 1

    def test_no_figure_leaves_a_site_but_those_that_are_paid_for(
        self, finished: Callable[[str, str], fedveil.Run], source: str, mechanism: str
    ) -> None:
        """Privacy rule 1: every figure is accounted, public, or absent."""
        run = finished(source, mechanism)
        told = without(run.metrics, "quality", "ledgers")
        for event in run.events():
            paid = ("quality", "loss") if event["event"] == "evaluated" else ()
            told += without(event, *paid)
        words = {word for key in set(told) - {"clipping_norm"} for word in key.split("_")}
        assert not words & FIGURES

    def test_the_folder_is_complete(
        self, finished: Callable[[str, str], fedveil.Run], source: str, mechanism: str
    ) -> None:
        run = finished(source, mechanism)
        names = {path.name for path in run.path.iterdir()}
        assert {
            "config.toml", "schema.json", "events.jsonl", "environment.json", "checkpoint",
            "model.safetensors", "metrics.json", "samples.png", "report.html",
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


def held_out(run: fedveil.Run) -> tuple[Any, Batch, Batch]:
    """The simulated sites' records again: raw held-out ones, and two sides as a model takes them.

    Nobody could do that to a federation: the sites' keys lie in the run folder for once.
    """
    config, kind = run.config, modality(run.schema)
    raws, sides = [], []
    for node, raw in enumerate(load_shards(config, run.schema).parts, start=1):
        key = (run.path / "ledger" / f"site-{node:03d}.SIMULATED-split.key").read_text("ascii")
        cleaned, report = kind.clean(raw, run.schema, config.clean)
        assert report.kept == report.records
        identities = kind.identities(cleaned, run.schema)
        split = keyed_split(identities, bytes.fromhex(key), config.data.holdout, config.data.audit)
        encoded = kind.encode(cleaned, run.schema)
        raws.append(kind.take(raw, split.holdout))
        sides.append([encoded.take(rows) for rows in (split.holdout, split.training)])
    batches = [
        Batch(*(torch.from_numpy(np.concatenate(part)) for part in zip(*side, strict=True)))
        for side in zip(*sides, strict=True)
    ]
    return raws, batches[0], batches[1]


class Exact:
    """What a run's figures would be without noise, and what its noise makes of them."""

    def __init__(self, run: fedveil.Run) -> None:
        self.run, kind = run, family("vae")
        self.schema, self.priced = run.schema, plan(run.config)
        _, self.records, training = held_out(run)
        arrays, _ = read_file(run.path / "model.safetensors")
        module = kind.build(run.config.model, run.schema)
        load_arrays(module, arrays)
        self.exam = questions(arrays, run.config, run.schema)
        self.bounds = kind.score_bounds(module)
        self.sums = metrics.answers(kind, module, self.exam, self.records, run.schema)
        self.trained = metrics.loss_answers(kind, module, training)
        self.figures = metrics.figures(self.sums, self.exam, run.schema, self.bounds)
        if self.priced.figures_noise:
            self.figures["training_loss"] = metrics.mean_loss(self.trained, self.bounds)

    def scale(self, block: str) -> float:
        """Of the noise in a block by the plan; histograms of records are means of evaluations."""
        scale = metrics.noise_scale(self.priced.evaluation_noise, self.schema)
        averaged = block in {"one_way", "two_way"}
        return scale / math.sqrt(self.priced.evaluations) if averaged else scale

    def bias(self, draws: int = 200) -> dict[str, float]:
        """By how much noise moves each figure on average, by draws around the exact sums."""
        rng, drawn = np.random.default_rng(1), []
        for _ in range(draws):
            noised = {n: a + rng.normal(0, self.scale(n), a.shape) for n, a in self.sums.items()}
            drawn.append(metrics.figures(noised, self.exam, self.schema, self.bounds))
        return {n: float(np.mean([d[n] for d in drawn]) - self.figures[n]) for n in drawn[0]}

    def noise_of_shares(self) -> dict[str, float]:
        """By hand, of (a + e) / (n + f): scale * sqrt(k + (a / n)^2) / n to first order.

        Where a is a sum of k noised numbers: of two classes the right records are in 12 cells.
        """
        low, high = self.bounds
        noise, count = {}, float(self.sums["count"][0])
        for name, value in self.figures.items():
            if "accuracy" in name:
                cells = 12 if len(self.schema.classes) == 2 else 1
                noise[name] = self.scale("count") * math.hypot(math.sqrt(cells), value) / count
        clipped = float(self.sums["loss"][0]) / count
        noise["loss"] = self.scale("count") * math.hypot(1, clipped) / count * (high - low) / 2
        if self.priced.figures_noise:
            count, scale = float(self.trained["count"][0]), self.priced.figures_noise
            clipped = float(self.trained["loss"][0]) / count
            scale *= math.sqrt(2) * 1.001 * (high - low) / 2
            noise["training_loss"] = scale * math.hypot(1, clipped) / count
        return noise


@lru_cache
def exact_of(run: fedveil.Run) -> Exact:
    """Made once for a run."""
    return Exact(run)


@pytest.fixture(scope="module")
def fixed_run(tmp_path_factory: pytest.TempPathFactory) -> fedveil.Run:
    """A run on a table with half of it held out, whose coins and split keys are fixed."""
    draw, numbers = secrets.token_hex, itertools.count(1)
    keys = itertools.count(100)

    def fixed(size: int | None = None) -> str:
        return f"{next(keys):064x}" if size == 32 else draw(size)  # the others name messages

    config = RunConfig.model_validate(
        {
            "federation": {"sites": 2, "rounds": 2},
            "data": {"source": "sklearn:breast_cancer", "holdout": 0.5},
            "model": {"family": "vae", "latent": 2, "hidden": 8},
            "privacy": {"epsilon": 20.0, "mechanism": "central", "epsilon_holdout": 20.0},
            "evaluation": {"every": 0, "training_share": 0.25},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "token_hex", fixed)
        patch.setattr(Coins, "from_system", lambda: Coins(bytes([next(numbers)] * 32)))
        return fedveil.simulate(config, out=tmp_path_factory.mktemp("runs") / "fixed")


class TestQualityIsRight:
    """Accounted figures against the exact ones of the same records, which no federation knows.

    Linear figures (shares of a count, the loss) lie within six times the stated noise. It is a
    bootstrap of 200 draws, so the ratio r of stated and real noise is about normal around 1 with
    standard deviation 0.05: a false alarm is E[P(|z| > 6 r)], which is 1e-8. Total variation and
    AUROC are curved, and noise moves them on average: total variation towards its floor, AUROC
    towards one half. By how much is drawn around the exact sums, and allowed for on top.
    """

    def check(self, run: fedveil.Run) -> None:
        exact = exact_of(run)
        quality, bias, linear = run.metrics["quality"], exact.bias(), exact.noise_of_shares()
        assert quality.keys() == exact.figures.keys()
        for name, figure in quality.items():
            allowed = 0.0 if name in linear else abs(bias[name])
            error = abs(figure["value"] - exact.figures[name])
            assert error <= 6 * figure["noise"] + allowed, name
            assert error > 0, name
        for name, noise in linear.items():
            assert quality[name]["noise"] == pytest.approx(noise, rel=0.4), name

    def test_of_images(self, finished_run: fedveil.Run) -> None:
        self.check(finished_run)

    def test_of_a_table_and_of_its_training_records(self, fixed_run: fedveil.Run) -> None:
        """Its coins are fixed: it gives the same answer every time."""
        self.check(fixed_run)
        assert fixed_run.metrics["quality"].keys() > {"training_loss", "tstr_auroc_mlp"}

    def test_without_a_mechanism_they_are_exact(
        self, finished: Callable[[str, str], fedveil.Run]
    ) -> None:
        for source in SOURCES:
            run = finished(source, "none")
            exact = exact_of(run).figures
            quality = run.metrics["quality"]
            assert quality.keys() == exact.keys()
            for name, figure in quality.items():
                assert figure["value"] == pytest.approx(exact[name], rel=1e-5, abs=1e-5)

    def test_the_allowance_is_small_where_records_are_many(self, fixed_run: fedveil.Run) -> None:
        for name, bias in exact_of(fixed_run).bias().items():
            assert abs(bias) < (1.0 if name == "loss" else 0.15), name


def test_where_nothing_is_held_out_there_is_no_figure_anywhere(tiny: Path, tmp_path: Path) -> None:
    run = fedveil.simulate(tiny, out=tmp_path / "run", data={"holdout": 0.0})
    assert run.metrics["quality"] == {}
    assert run.metrics["evaluated"] == {"round": 0, "evaluations": 0}
    assert [event["event"] for event in run.events()] == ["run", "round", "finished"]
    told = without(run.metrics, "ledgers") + list(keys(list(run.events())))
    words = {word for key in set(told) - {"clipping_norm"} for word in key.split("_")}
    assert not words & FIGURES


class TestEvaluate:
    def test_held_out_records_from_a_file_give_the_exact_figures(
        self, fixed_run: fedveil.Run, tmp_path: Path
    ) -> None:
        raws, records, _ = held_out(fixed_run)
        pl.concat(raws).write_csv(tmp_path / "mine.csv")
        found = fixed_run.evaluate(tmp_path / "mine.csv")
        exact = {n: v for n, v in exact_of(fixed_run).figures.items() if n != "training_loss"}
        assert (found["private"], found["records"]) == (False, len(records.y))
        assert found["figures"] == pytest.approx(exact)

    def test_of_images(self, finished_run: fedveil.Run, tmp_path: Path) -> None:
        raws, records, _ = held_out(finished_run)
        images = np.concatenate([raw.arrays() for raw in raws])
        labels = np.concatenate([raw.labels for raw in raws]).astype(int)
        np.savez(tmp_path / "mine.npz", images=images, labels=labels)
        found = finished_run.evaluate(str(tmp_path / "mine.npz"))
        assert found["records"] == len(records.y)
        assert found["figures"] == pytest.approx(exact_of(finished_run).figures)

    def test_records_are_cleaned_by_the_runs_rules(
        self, fixed_run: fedveil.Run, tmp_path: Path
    ) -> None:
        raws, records, _ = held_out(fixed_run)
        frame = pl.concat(raws).with_columns(
            diagnosis=pl.when(pl.int_range(pl.len()) < 5).then(pl.lit("?")).otherwise("diagnosis")
        )
        frame.write_csv(tmp_path / "mine.csv")
        assert fixed_run.evaluate(tmp_path / "mine.csv")["records"] == len(records.y) - 5

    def test_it_writes_nothing_into_the_run(self, fixed_run: fedveil.Run, tmp_path: Path) -> None:
        pl.concat(held_out(fixed_run)[0]).write_csv(tmp_path / "mine.csv")
        before = {p: p.stat().st_mtime_ns for p in fixed_run.path.rglob("*")}
        fixed_run.evaluate(tmp_path / "mine.csv")
        assert {p: p.stat().st_mtime_ns for p in fixed_run.path.rglob("*")} == before

    @pytest.mark.parametrize("name", ["gone.csv", "gone.npz", "gone", "."])
    def test_a_wrong_path_is_our_error(
        self,
        finished_run: fedveil.Run,
        finished_table_run: fedveil.Run,
        tmp_path: Path,
        name: str,
    ) -> None:
        for run in (finished_run, finished_table_run):
            with pytest.raises(FedveilError):
                run.evaluate(tmp_path / name)

    def test_so_is_the_wrong_modality(
        self, finished_run: fedveil.Run, finished_table_run: fedveil.Run, tmp_path: Path
    ) -> None:
        np.savez(tmp_path / "mine.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.arange(3))
        (tmp_path / "mine.csv").write_text("mean_radius,diagnosis\n1,benign\n", encoding="utf-8")
        with pytest.raises(FedveilError, match=r"mine\.npz"):
            finished_table_run.evaluate(tmp_path / "mine.npz")
        with pytest.raises(FedveilError, match=r"mine\.csv"):
            finished_run.evaluate(tmp_path / "mine.csv")

    def test_so_are_records_of_which_none_can_be_used(
        self, finished_run: fedveil.Run, fixed_run: fedveil.Run, tmp_path: Path
    ) -> None:
        frame = pl.concat(held_out(fixed_run)[0]).with_columns(diagnosis=pl.lit("unknown"))
        frame.write_csv(tmp_path / "mine.csv")
        with pytest.raises(FedveilError):
            fixed_run.evaluate(tmp_path / "mine.csv")
        np.savez(tmp_path / "mine.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.full(3, 10))
        with pytest.raises(FedveilError):
            finished_run.evaluate(tmp_path / "mine.npz")


class Interrupted(Exception):  # noqa: N818  it stands for Ctrl-C
    """Raised by whoever watches a run."""


def interrupted_after(rounds: int) -> Callable[[Event], None]:
    """Watches a run and stops it once so many rounds are done."""

    def observe(event: Event) -> None:
        if (event["event"], event.get("round")) == ("round", rounds):
            raise Interrupted

    return observe


class TestResume:
    @pytest.fixture
    def cut_off(self, tiny: Path, tmp_path: Path) -> Path:
        """The folder of a run of three rounds that was cut off after the first."""
        tiny.write_text(TINY.replace("rounds = 1", "rounds = 3"), encoding="utf-8")
        with pytest.raises(Interrupted):
            fedveil.simulate(tiny, out=tmp_path / "run", observe=interrupted_after(1))
        return tmp_path / "run"

    def test_the_rounds_that_are_left_are_run(self, tiny: Path, cut_off: Path) -> None:
        before = [event["event"] for event in fedveil.Run(cut_off).events()]
        assert before == ["run", "round", "failed"]
        run = fedveil.simulate(tiny, out=cut_off, resume=True)
        events = list(run.events())
        assert [event["event"] for event in events if event["event"] != "evaluated"] == [
            *before, "resumed", "round", "round", "finished",
        ]  # fmt: skip
        rounds = [event["round"] for event in events if event["event"] == "round"]
        assert rounds == [1, 2, 3]
        assert (run.metrics["rounds"], run.metrics["steps"]) == (3, 3)
        assert (cut_off / "samples.png").is_file()
        assert run.metrics["run_id"] == events[0]["run_id"]

    def test_a_run_that_never_began_begins(self, tiny: Path, tmp_path: Path) -> None:
        run = fedveil.simulate(tiny, out=tmp_path / "new", resume=True)
        assert run.finished
        assert "resumed" not in [event["event"] for event in run.events()]

    def test_a_finished_run_is_left_as_it_is(self, tiny: Path, tmp_path: Path) -> None:
        first = fedveil.simulate(tiny, out=tmp_path / "run")
        (tmp_path / "run" / "samples.png").unlink()
        before = list(first.events()), dict(first.metrics)
        again = fedveil.simulate(tiny, out=tmp_path / "run", resume=True)
        assert (list(again.events()), dict(again.metrics)) == before
        assert (tmp_path / "run" / "samples.png").is_file()

    def test_it_needs_a_folder(self, tiny: Path) -> None:
        with pytest.raises(ConfigError, match="--resume: needs --out"):
            fedveil.simulate(tiny, resume=True)

    def test_a_folder_without_a_run_is_left_alone(self, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "thesis.txt").write_text("mine", encoding="utf-8")
        with pytest.raises(ConfigError, match="holds no run"):
            fedveil.simulate(tiny, out=tmp_path / "run", resume=True)
        assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]

    @pytest.mark.parametrize(
        ("overrides", "named"),
        [
            ({"federation": {"rounds": 4}}, "federation.rounds = 4"),
            ({"federation": {"seed": 9}}, "federation.seed = 9"),
            ({"privacy": {"epsilon": 9.0}}, "privacy.epsilon = 9"),
            ({"data": {"holdout": 0.3}}, "data.holdout = 0.3"),
            ({"training": {"micro_batch": 5}}, "training.micro_batch = 5"),
        ],
    )
    def test_another_configuration_is_refused_by_name(
        self, tiny: Path, cut_off: Path, overrides: dict[str, Any], named: str
    ) -> None:
        before = sorted(cut_off.rglob("*"))
        with pytest.raises(ConfigError, match=re.escape(named)):
            fedveil.simulate(tiny, out=cut_off, resume=True, **overrides)
        assert sorted(cut_off.rglob("*")) == before

    def test_another_schema_is_refused(self, tiny: Path, cut_off: Path) -> None:
        schema = json.loads((cut_off / "schema.json").read_text(encoding="utf-8"))
        schema["classes"] = schema["classes"][::-1]
        (cut_off / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
        with pytest.raises(ConfigError, match=r"data\.schema: has changed"):
            fedveil.simulate(tiny, out=cut_off, resume=True)

    def test_without_resume_a_run_that_was_cut_off_is_left_alone(
        self, tiny: Path, cut_off: Path
    ) -> None:
        with pytest.raises(ConfigError, match=r"not empty.*--resume"):
            fedveil.simulate(tiny, out=cut_off)


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
        with pytest.raises(ConfigError, match=r"gone: holds no run; check the path"):
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


PATIENTS = """
label = "sick"
person = "patient"

[[column]]
name = "age"
kind = "integer"
bounds = [0, 99]

[[column]]
name = "sick"
kind = "categorical"
categories = ["no", "yes"]
"""


class TestPersons:
    """Runs that hide a patient with all their records."""

    @pytest.fixture
    def wards(self, tmp_path: Path) -> dict[str, Any]:
        """A table of 120 patients with one to four records each, and its declaration."""
        rng = np.random.default_rng(3)
        lines = [
            f"{rng.integers(0, 100)},{('no', 'yes')[rng.integers(0, 2)]},patient {number}"
            for number in range(120)
            for _ in range(1 + number % 4)
        ]
        lines += ["50,no,", "51,yes,NA"]
        rng.shuffle(lines)
        table, schema = tmp_path / "wards.csv", tmp_path / "wards.toml"
        table.write_text("\n".join(["age,sick,patient", *lines]), encoding="utf-8")
        schema.write_text(PATIENTS, encoding="utf-8")
        return {"source": str(table), "schema": str(schema), "records": 300, "persons": 120}

    def by_person(
        self, make_config: MakeConfig, wards: Mapping[str, Any], **sections: dict[str, Any]
    ) -> RunConfig:
        made = {"data": dict(wards), "privacy": {"unit": "person", "sampling_rate": 0.5}}
        for section, options in {"evaluation": {"samples": 200, "every": 1}, **sections}.items():
            made.setdefault(section, {}).update(options)
        return make_config(**made)

    @pytest.mark.parametrize("mechanism", ["central", "local"])
    def test_a_run_over_them(
        self, make_config: MakeConfig, wards: Mapping[str, Any], tmp_path: Path, mechanism: str
    ) -> None:
        config = self.by_person(
            make_config,
            wards,
            privacy={"mechanism": mechanism},
            evaluation={"training_share": 0.2},
        )
        run = fedveil.simulate(config, out=tmp_path / "run")
        privacy = run.metrics["privacy"]
        assert (privacy["unit"], privacy["mechanism"]) == ("person", mechanism)
        assert 0 < privacy["epsilon"] <= 8.0
        # 120^-1.5 is above 1e-5, so the smaller one holds; a step expects so many patients.
        assert privacy["delta"] == 1e-5
        expected = 0.5 * 120 * 0.9 / (3 if mechanism == "local" else 1)
        assert privacy["expected_batch"] == pytest.approx(expected)
        [open_end] = privacy["not_claimed"]
        assert open_end.startswith("a patient with records at k sites is hidden k times less")
        assert {"loss", "one_way_tv", "training_loss"} <= run.metrics["quality"].keys()
        assert not any((run.path / "sites").glob("*.failed"))
        assert len(run.sample(5)) == 5

    def test_their_figures_count_each_once(
        self, make_config: MakeConfig, wards: Mapping[str, Any], tmp_path: Path
    ) -> None:
        """Without noise they are those of one record a patient, had each patient equal records."""
        lines = Path(wards["source"]).read_text(encoding="utf-8").splitlines()
        first = {line.rpartition(",")[2]: line for line in reversed(lines[1:])}
        first = {who: line for who, line in first.items() if who.startswith("patient")}
        several = [line for who, line in first.items() for _ in range(1 + int(who.split()[1]) % 4)]
        for name, kept in (("once.csv", list(first.values())), ("often.csv", several)):
            (tmp_path / name).write_text("\n".join([lines[0], *kept]), encoding="utf-8")
        config = self.by_person(make_config, wards, privacy={"mechanism": "none"})
        run = fedveil.simulate(config, out=tmp_path / "run")
        once, often = (run.evaluate(tmp_path / name) for name in ("once.csv", "often.csv"))
        assert (once["records"], often["records"]) == (120, 300)
        assert once["figures"] == pytest.approx(often["figures"])

    def test_delta_is_by_their_number(
        self, make_config: MakeConfig, wards: Mapping[str, Any]
    ) -> None:
        many = self.by_person(make_config, {**wards, "records": 10**7, "persons": 10**6})
        assert many.delta == plan(many).delta == pytest.approx(1e-9)
        assert make_config(data={**wards, "records": 10**7, "persons": None}).delta < 1e-10

    def test_by_record_it_is_said_that_they_are_not_hidden(
        self, make_config: MakeConfig, wards: Mapping[str, Any], tmp_path: Path
    ) -> None:
        config = make_config(
            data={**wards, "persons": None},
            privacy={"mechanism": "none"},
            evaluation={"samples": 200, "every": 0},
        )
        run = fedveil.simulate(config, out=tmp_path / "run")
        assert run.metrics["privacy"]["not_claimed"] == [
            "a patient with several records is not hidden, only each record"
        ]

    @pytest.mark.parametrize("kind", ["table", "image"])
    def test_a_schema_that_knows_none_is_refused(
        self, make_config: MakeConfig, wards: Mapping[str, Any], tmp_path: Path, kind: str
    ) -> None:
        if kind == "table":
            bare = PATIENTS.replace('person = "patient"\n', "")
            Path(wards["schema"]).write_text(bare, encoding="utf-8")
        else:
            wards = {"source": "sklearn:digits", "persons": 1000}
        config = self.by_person(make_config, wards)
        message = (
            f'privacy.unit = "person": the schema of these {kind}s knows no person; '
            + ('name the column of its key, person = "...", or ' if kind == "table" else "")
            + 'use privacy.unit = "record"'
        )
        for call in (resolve, lambda c: fedveil.simulate(c, out=tmp_path / "run")):
            with pytest.raises(ConfigError) as refused:
                call(config)
            assert str(refused.value) == message
        assert not (tmp_path / "run").exists()
