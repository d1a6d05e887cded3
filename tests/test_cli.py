"""The command line is a contract: what goes to stdout, what to stderr, and with which exit code."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import fedveil
from fedveil import api as api_module
from fedveil.config import FedveilError
from fedveil.data_prep import modality
from fedveil.data_prep.tabular import breast_cancer_schema
from fedveil.export import read_provenance

HEAVY = (
    "torch", "flwr", "sklearn", "scipy", "matplotlib", "opacus", "polars", "numpy", "grpc",
    "cryptography",
)  # fmt: skip
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


Call = Callable[..., Any]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A configuration file of one quick round."""
    file = tmp_path / "tiny.toml"
    file.write_text(TINY, encoding="utf-8")
    return file


def process(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own."""
    return subprocess.run(
        [*map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def fields(text: str) -> dict[str, str]:
    """Lines by their first word, where it is a name and blanks follow."""
    lines = (line.partition(" ") for line in text.splitlines())
    return {name: rest.strip() for name, blank, rest in lines if blank and name.islower()}


def script() -> Path:
    """The console script of this environment."""
    return Path(sys.executable).parent / "fedveil"


class TestStart:
    @pytest.mark.parametrize("how", ["script", "module"])
    def test_help(self, how: str, tmp_path: Path) -> None:
        command = [script()] if how == "script" else [sys.executable, "-m", "fedveil"]
        result = process(*command, "--help", cwd=tmp_path)
        assert result.returncode == 0
        assert result.stderr == ""
        for word in (
            "simulate", "sample", "evaluate", "init", "report", "ledger", "--version", "--debug",
        ):  # fmt: skip
            assert word in result.stdout
        assert "Usage: fedveil" in result.stdout

    def test_version(self, call: Call) -> None:
        assert call("--version") == (0, f"fedveil {fedveil.__version__}\n", "")

    @pytest.mark.parametrize("module", ["fedveil", "fedveil.cli", "fedveil.config"])
    def test_nothing_heavy_is_imported(self, module: str, tmp_path: Path) -> None:
        code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
        assert process(sys.executable, "-c", code, cwd=tmp_path).stdout == "[]\n"

    def test_nor_by_a_dry_error(self, tmp_path: Path) -> None:
        """A wrong configuration is told at once."""
        code = (
            "import sys; sys.argv = ['fedveil', 'simulate', 'gone.toml']\n"
            "from fedveil.cli import main\n"
            "try:\n    main()\nexcept SystemExit:\n    pass\n"
            f"print([m for m in {HEAVY!r} if m in sys.modules])"
        )
        assert process(sys.executable, "-c", code, cwd=tmp_path).stdout == "[]\n"

    def test_no_command_is_a_wrong_call(self, call: Call) -> None:
        result = call()
        assert result.code == 2
        assert (result.out + result.err).count("Usage: fedveil") == 1

    @pytest.mark.parametrize(
        "wrong", [["fly"], ["simulate"], ["--fly"], ["sample", "x", "-n", "y"]]
    )
    def test_wrong_calls(self, call: Call, wrong: list[str]) -> None:
        result = call(*wrong)
        assert result.code == 2
        assert result.out == ""
        assert result.err.startswith("error: ")
        assert "--help`" in result.err
        assert result.err.count("\n") == 1


class TestSimulate:
    def test_json_is_all_of_stdout(self, tiny: Path, tmp_path: Path) -> None:
        """In a process, so that nothing can slip past."""
        result = process(script(), "simulate", tiny, "--json", "--out", "run", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert len(result.stdout.splitlines()) == 1
        metrics = fedveil.load(tmp_path / "run").metrics
        assert json.loads(result.stdout) == {**metrics, "folder": "run"}

    def test_a_summary(self, call: Call, tiny: Path, tmp_path: Path) -> None:
        result = call("simulate", tiny, "--out", "run")
        assert result.code == 0
        assert "1 rounds, 2 sites" in result.out
        assert "NOT PRIVATE" in result.out
        assert "run/samples.png" in result.out
        assert "Report: run/report.html" in result.out
        assert (tmp_path / "run" / "metrics.json").is_file()

    def test_the_promise_of_a_private_run(
        self, call: Call, finished_run: fedveil.Run, monkeypatch: pytest.MonkeyPatch, tiny: Path
    ) -> None:
        monkeypatch.setattr(api_module, "simulate", lambda *_, **__: finished_run)
        result = call("simulate", tiny)
        assert f"epsilon {finished_run.privacy['epsilon']:.3f} of 8" in result.out
        assert "mechanism central" in result.out
        assert "Protects one record against everyone but the server" in result.out

    def test_a_summary_tells_the_figures_with_their_noise(
        self, call: Call, finished_run: fedveil.Run, monkeypatch: pytest.MonkeyPatch, tiny: Path
    ) -> None:
        monkeypatch.setattr(api_module, "simulate", lambda *_, **__: finished_run)
        told = fields(call("simulate", tiny).out)
        quality = finished_run.metrics["quality"]
        assert quality.keys() == {"loss", "one_way_tv", "tstr_accuracy_mlp"}
        for name, figure in quality.items():
            floor = f" (floor {figure['floor']:.4f})" if "floor" in figure else ""
            spread = floor or f" +- {figure['noise']:.4f}"
            assert told[name] == f"{figure['value']:.4f}{spread}"

    def test_settings_win(self, call: Call, tiny: Path, tmp_path: Path) -> None:
        result = call(
            "simulate", tiny, "--set", "federation.sites=3", "--set", "federation.name=other",
            "--set", "federation.rounds = 2", "--json", "--out", "run",
        )  # fmt: skip
        assert result.code == 0
        metrics = json.loads(result.out)
        assert (metrics["sites"], metrics["rounds"]) == (3, 2)
        assert fedveil.load(tmp_path / "run").config.federation.name == "other"

    def test_without_out_it_goes_below_runs(self, call: Call, tiny: Path, tmp_path: Path) -> None:
        assert call("simulate", tiny, "--json").code == 0
        assert len(list((tmp_path / "runs").iterdir())) == 1

    def test_the_engine_may_be_named(self, call: Call, tiny: Path) -> None:
        """It wins over the file, and is checked as the file's is."""
        wrong = call("simulate", tiny, "--engine", "cloud", "--dry-run")
        assert wrong.code == 2
        assert wrong.err.startswith('error: federation.engine = "cloud": must be ')
        assert call("simulate", tiny, "--engine", "local", "--dry-run").code == 0
        nowhere = ("--set", "federation.ray_address=127.0.0.1:1")
        assert "no Ray answers" in call("simulate", tiny, "--engine", "ray", *nowhere).err

    def test_a_dry_run_prints_the_plan_and_writes_nothing(
        self, call: Call, tmp_path: Path, finished_run: fedveil.Run
    ) -> None:
        before = sorted(tmp_path.rglob("*"))
        priced = finished_run.path / "config.toml"
        result = call("simulate", priced, "--dry-run", "--out", "run")
        assert result.code == 0
        for word in ("epsilon", "noise_multiplier", "sampling_rate", "against", "central"):
            assert word in result.out
        assert sorted(tmp_path.rglob("*")) == before

    def test_a_dry_run_as_json(self, call: Call, tmp_path: Path, finished_run: fedveil.Run) -> None:
        result = call("simulate", finished_run.path / "config.toml", "--dry-run", "--json")
        assert (result.code, result.err) == (0, "")
        found = json.loads(result.out)
        assert found["epsilon"] == finished_run.privacy["epsilon"]
        assert found["schedule"][-1] == found["training_epsilon"] <= found["epsilon"]
        assert len(found["schedule"]) == found["rounds"] == 2
        assert not list(tmp_path.iterdir())

    def test_a_dry_run_without_a_mechanism(self, call: Call, tiny: Path) -> None:
        result = call("simulate", tiny, "--dry-run", "--json")
        found = json.loads(result.out)
        assert (found["epsilon"], found["clipping_norm"], found["schedule"]) == (None, None, [])

    def test_paths_are_relative_to_the_file(self, call: Call, tmp_path: Path) -> None:
        folder = tmp_path / "deep"
        folder.mkdir()
        (folder / "schema.toml").write_text(
            'modality = "image"\nheight = 8\nwidth = 8\nclasses = ["0", "1"]\n', encoding="utf-8"
        )
        text = TINY.replace(
            'source = "sklearn:digits"',
            'source = "sklearn:digits"\nschema = "schema.toml"',
        )
        (folder / "tiny.toml").write_text(text, encoding="utf-8")
        assert call("simulate", "deep/tiny.toml", "--dry-run").code == 0


class Interrupted(Exception):  # noqa: N818  it stands for Ctrl-C
    """Raised by whoever watches a run."""


@pytest.fixture
def cut_off(tiny: Path, tmp_path: Path) -> Path:
    """The folder of a run of three rounds that was cut off after the first."""
    tiny.write_text(TINY.replace("rounds = 1", "rounds = 3"), encoding="utf-8")

    def stop(event: dict[str, object]) -> None:
        if event["event"] == "round":
            raise Interrupted

    with pytest.raises(Interrupted):
        fedveil.simulate(tiny, out=tmp_path / "run", observe=stop)
    return tmp_path / "run"


class TestResume:
    def test_ctrl_c_says_how_to_go_on(
        self, call: Call, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*arguments: object, **options: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(api_module, "simulate", stop)
        result = call("simulate", tiny, "--out", "run", "--json")
        assert (result.code, result.out) == (130, "")
        assert f"`fedveil simulate {tiny} --out run --resume` and the same --set" in result.err
        assert "all of the plan counts as spent" in result.err
        assert len(result.err.splitlines()) == 1

    def test_it_also_names_a_folder_that_was_chosen_for_the_user(
        self, call: Call, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[object] = []

        def stop(*arguments: object, **options: object) -> None:
            asked.append(options["out"])
            raise KeyboardInterrupt

        monkeypatch.setattr(api_module, "simulate", stop)
        result = call("simulate", tiny)
        assert f"--out {asked[0]} --resume" in result.err

    def test_it_goes_on_and_says_from_where(self, call: Call, tiny: Path, cut_off: Path) -> None:
        result = call("simulate", tiny, "--out", cut_off, "--resume", "--json")
        assert result.code == 0, result.err
        metrics = json.loads(result.out)
        assert (metrics["rounds"], metrics["steps"]) == (3, 3)
        assert "resumed after round 1\n" in result.err
        assert "cut off" not in result.err

    def test_a_round_that_was_asked_for_and_lost_is_told(
        self, call: Call, tiny: Path, cut_off: Path
    ) -> None:
        """As after a crash between the asking and the checkpoint."""
        note = cut_off / "checkpoint" / "asked.json"
        asked = json.loads(note.read_text(encoding="utf-8"))
        assert asked["round"] == 1
        note.write_text(json.dumps(asked | {"round": 2}), encoding="utf-8")
        result = call("simulate", tiny, "--out", cut_off, "--resume", "--json")
        assert result.code == 0, result.err
        assert "resumed after round 1; round 2 was cut off and counts as spent\n" in result.err
        metrics = json.loads(result.out)
        assert (metrics["rounds"], metrics["steps"]) == (3, 2)

    def test_a_damaged_checkpoint_is_told(self, call: Call, tiny: Path, cut_off: Path) -> None:
        last = max((cut_off / "checkpoint").glob("*.safetensors"))
        last.write_bytes(last.read_bytes()[:-7])
        result = call("simulate", tiny, "--out", cut_off, "--resume", "--json")
        assert result.code == 0, result.err
        lines = result.err.splitlines()
        assert [line for line in lines if last.name in line and "checkpoint before" in line]
        assert "resumed after round 0; round 1 was cut off and counts as spent" in lines
        assert json.loads(result.out)["steps"] == 2

    def test_a_finished_run_is_told_again(self, call: Call, tiny: Path) -> None:
        first = call("simulate", tiny, "--out", "run", "--json")
        again = call("simulate", tiny, "--out", "run", "--resume", "--json")
        assert (again.code, again.err) == (0, "")
        assert json.loads(again.out) == json.loads(first.out)

    def test_it_needs_a_folder(self, call: Call, tiny: Path, tmp_path: Path) -> None:
        result = call("simulate", tiny, "--resume")
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("error: --resume: needs --out")
        assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]

    def test_another_setting_is_a_wrong_call(self, call: Call, tiny: Path, cut_off: Path) -> None:
        result = call(
            "simulate", tiny, "--out", cut_off, "--resume", "--set", "federation.rounds=5"
        )
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("error: federation.rounds = 5: the run in ")
        assert len(result.err.splitlines()) == 1

    def test_a_folder_without_a_run_is_a_wrong_call(
        self, call: Call, tiny: Path, tmp_path: Path
    ) -> None:
        result = call("simulate", tiny, "--out", tmp_path, "--resume")
        assert (result.code, result.out) == (2, "")
        assert "holds no run" in result.err

    def test_without_it_a_folder_in_use_is_refused_and_it_is_offered(
        self, call: Call, tiny: Path, cut_off: Path
    ) -> None:
        result = call("simulate", tiny, "--out", cut_off)
        assert (result.code, result.out) == (2, "")
        assert "is not empty" in result.err
        assert "--resume" in result.err


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A table of one's own: thirty records."""
    schema = breast_cancer_schema()
    frame = modality(schema).read("sklearn:breast_cancer", schema).head(30)
    frame.write_csv(tmp_path / "mine.csv")
    return tmp_path / "mine.csv"


class TestEvaluate:
    def test_a_table_beside_the_accounted_figures(
        self, call: Call, finished_table_run: fedveil.Run, mine: Path
    ) -> None:
        result = call("evaluate", finished_table_run.path, "--data", mine)
        assert (result.code, result.err) == (0, "")
        first, *lines = result.out.splitlines()
        assert first == f"NOT PRIVATE: exact figures of 30 records in {mine}"
        found = finished_table_run.evaluate(mine)["figures"]
        told = fields("\n".join(lines))
        assert told.keys() == found.keys() == finished_table_run.metrics["quality"].keys()
        for name, value in found.items():
            accounted = finished_table_run.metrics["quality"][name]
            exact, _, beside = told[name].partition("in the run:")
            assert exact.strip() == f"{value:.4f}"
            spread = "(floor" if "floor" in accounted else f"+- {accounted['noise']:.4f}"
            assert f"{accounted['value']:.4f} {spread}" in beside

    def test_as_json(self, call: Call, finished_table_run: fedveil.Run, mine: Path) -> None:
        result = call("evaluate", finished_table_run.path, "--data", mine, "--json")
        assert (result.code, result.err) == (0, "")
        assert len(result.out.splitlines()) == 1
        assert json.loads(result.out) == {
            "private": False,
            "records": 30,
            "figures": finished_table_run.evaluate(mine)["figures"],
            "run_id": finished_table_run.metrics["run_id"],
        }

    @pytest.mark.parametrize("name", ["gone.csv", "gone.parquet", "gone"])
    def test_a_wrong_path(
        self,
        call: Call,
        finished_run: fedveil.Run,
        finished_table_run: fedveil.Run,
        name: str,
    ) -> None:
        for run in (finished_run, finished_table_run):
            result = call("evaluate", run.path, "--data", name, "--json")
            assert (result.code, result.out) == (2, "")
            assert result.err.startswith("error: ")
            assert name in result.err
            assert len(result.err.splitlines()) == 1

    def test_an_error_names_the_option_that_was_given(
        self, call: Call, finished_table_run: fedveil.Run
    ) -> None:
        result = call("evaluate", finished_table_run.path, "--data", "gone.csv")
        assert result.err.startswith("error: --data gone.csv: ")

    def test_the_wrong_modality(self, call: Call, finished_run: fedveil.Run, mine: Path) -> None:
        result = call("evaluate", finished_run.path, "--data", mine)
        assert (result.code, result.out) == (2, "")
        assert "mine.csv: is no .npz file and no folder" in result.err

    def test_images_for_a_table(
        self, call: Call, finished_table_run: fedveil.Run, tmp_path: Path
    ) -> None:
        np.savez(tmp_path / "mine.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.arange(3))
        result = call("evaluate", finished_table_run.path, "--data", "mine.npz")
        assert (result.code, result.out) == (2, "")
        assert "mine.npz" in result.err

    @pytest.mark.parametrize(
        ("content", "named"),
        [
            ("", "mine.csv"),
            ("a,b\n1,2\n", '"mean_radius" is missing'),
            (None, "holds no records"),
        ],
    )
    def test_data_that_cannot_be_used(
        self,
        call: Call,
        finished_table_run: fedveil.Run,
        mine: Path,
        content: str | None,
        named: str,
    ) -> None:
        if content is None:  # the header alone
            content = mine.read_text(encoding="utf-8").splitlines()[0] + "\n"
        mine.write_text(content, encoding="utf-8")
        result = call("evaluate", finished_table_run.path, "--data", mine)
        assert (result.code, result.out) == (2, "")
        assert named in result.err
        assert len(result.err.splitlines()) == 1

    def test_a_column_that_is_wrong_throughout(
        self, call: Call, finished_table_run: fedveil.Run, mine: Path
    ) -> None:
        frame = pl.read_csv(mine).with_columns(diagnosis=pl.lit("unknown"))
        frame.write_csv(mine)
        result = call("evaluate", finished_table_run.path, "--data", mine)
        assert (result.code, result.out) == (2, "")
        assert 'column "diagnosis"' in result.err

    def test_no_run(self, call: Call, tmp_path: Path, mine: Path) -> None:
        result = call("evaluate", tmp_path / "gone", "--data", mine)
        assert (result.code, result.out) == (2, "")
        assert "gone: holds no run; check the path" in result.err

    def test_no_data(self, call: Call, finished_run: fedveil.Run) -> None:
        assert call("evaluate", finished_run.path).code == 2


class TestSample:
    @pytest.mark.parametrize("ending", [".png", ".npz"])
    def test_images(
        self, call: Call, finished_run: fedveil.Run, tmp_path: Path, ending: str
    ) -> None:
        result = call("sample", finished_run.path, "-n", 4, "-o", f"drawn{ending}", "--seed", 1)
        assert result.code == 0
        assert "4 synthetic records, epsilon" in result.out
        assert read_provenance(tmp_path / f"drawn{ending}") == finished_run.provenance()

    def test_tables_and_json(
        self, call: Call, finished_table_run: fedveil.Run, tmp_path: Path
    ) -> None:
        result = call("sample", finished_table_run.path, "-n", 4, "--out", "drawn.csv", "--json")
        assert (result.code, result.err) == (0, "")
        found = json.loads(result.out)
        assert (found["n"], found["file"], found["synthetic"]) == (4, "drawn.csv", True)
        assert pl.read_csv(tmp_path / "drawn.csv").height == 4

    def test_equal_seeds(self, call: Call, finished_table_run: fedveil.Run, tmp_path: Path) -> None:
        for name in ("a.csv", "b.csv"):
            call("sample", finished_table_run.path, "-n", 4, "-o", name, "--seed", 5)
        assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


class TestInit:
    def test_what_it_writes_runs(self, call: Call, tmp_path: Path) -> None:
        result = call("init", "new.toml")
        assert result.code == 0
        assert "new.toml" in result.out
        text = (tmp_path / "new.toml").read_text(encoding="utf-8")
        assert text.count("#") > 20
        dry = call("simulate", "new.toml", "--dry-run", "--json", "--set", "privacy.mechanism=none")
        assert dry.code == 0, dry.err
        assert json.loads(dry.out)["rounds"] == 200

    def test_every_line_can_be_switched_on(self, call: Call, tmp_path: Path) -> None:
        """The shown defaults are the defaults: switched on, they change nothing."""
        call("init", "new.toml")
        lines = (tmp_path / "new.toml").read_text(encoding="utf-8").splitlines()
        switched = [
            line.removeprefix("# ") if " = " in line and not line.endswith("=") else line
            for line in lines
            if not (line.startswith("# ") and " = " in line and " " in line[2:].split(" = ")[0])
        ]
        (tmp_path / "on.toml").write_text("\n".join(switched), encoding="utf-8")
        plans = [
            call("simulate", name, "--dry-run", "--json", "--set", "privacy.mechanism=none")
            for name in ("new.toml", "on.toml")
        ]
        assert plans[1].code == 0, plans[1].err
        assert plans[0].out == plans[1].out

    def test_it_never_overwrites(self, call: Call, tmp_path: Path) -> None:
        (tmp_path / "new.toml").write_text("mine", encoding="utf-8")
        result = call("init", "new.toml")
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("error: new.toml: is there already")
        assert (tmp_path / "new.toml").read_text(encoding="utf-8") == "mine"

    def test_an_unwritable_place(self, call: Call) -> None:
        result = call("init", "gone/new.toml")
        assert result.code == 2
        assert result.err.startswith("error: gone/new.toml: cannot be written")


class TestErrors:
    def test_one_line_and_no_traceback(self, tmp_path: Path) -> None:
        result = process(script(), "simulate", "gone.toml", cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("error: gone.toml: cannot be read")
        assert len(result.stderr.splitlines()) == 1

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_debug_shows_a_traceback(self, tmp_path: Path, place: int) -> None:
        arguments = ["simulate", "gone.toml"]
        arguments.insert(place, "--debug")
        result = process(sys.executable, "-m", "fedveil", *arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert "Traceback" in result.stderr
        assert "gone.toml: cannot be read" in result.stderr

    def test_a_failed_run_is_exit_code_1(
        self, call: Call, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*arguments: object, **options: object) -> None:
            raise FedveilError("round 3: 1 of 10 replies are usable")

        monkeypatch.setattr(api_module, "simulate", fail)
        result = call("simulate", tiny, "--json")
        assert (result.code, result.out) == (1, "")
        assert result.err == "error: round 3: 1 of 10 replies are usable\n"

    @pytest.mark.parametrize("kind", [RuntimeError, OSError, MemoryError, KeyError])
    def test_nor_has_an_error_that_nobody_foresaw_a_traceback(
        self, call: Call, tiny: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
    ) -> None:
        def fail(*arguments: object, **options: object) -> None:
            raise kind("a bug")

        monkeypatch.setattr(api_module, "simulate", fail)
        result = call("simulate", tiny)
        assert result.code == 1
        assert result.err.startswith("error: ")
        assert len(result.err.splitlines()) == 1

    def test_but_with_debug_it_has(
        self, call: Call, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*arguments: object, **options: object) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(api_module, "simulate", fail)
        result = call("--debug", "simulate", tiny)
        assert result.code == 1
        assert "Traceback" in result.err
        assert "a bug" in result.err
