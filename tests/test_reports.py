"""Reports of real runs: what is read for them, where they go, and what never gets into them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedveil
from fedveil import cli, reports
from fedveil.config import ConfigError, FedveilError, RunConfig
from fedveil.reports import read_sources, write_report
from fedveil.server.store import Event

MakeConfig = Callable[..., RunConfig]
MARK = "Tuesday-4711-Mary-Smith"


@pytest.fixture
def copied(finished_table_run: fedveil.Run, tmp_path: Path) -> fedveil.Run:
    """A run folder of the test's own."""
    return fedveil.Run(shutil.copytree(finished_table_run.path, tmp_path / "run"))


def text_of(run: fedveil.Run) -> str:
    """A report, made anew."""
    return run.report().read_text(encoding="utf-8")


class TestSimulate:
    def test_every_run_ends_with_a_report(self, finished_run: fedveil.Run) -> None:
        made = (finished_run.path / "report.html").read_text(encoding="utf-8")
        assert finished_run.metrics["run_id"] in made
        assert "data:image/png;base64," in made
        assert "Shares by class" in made

    def test_a_report_says_the_same_every_time(self, finished_table_run: fedveil.Run) -> None:
        made = (finished_table_run.path / "report.html").read_text(encoding="utf-8")
        assert text_of(finished_table_run) == made
        assert "mean_radius" in made
        assert "Synthetic ones are of records drawn from the released model." in made

    def test_a_failed_run_has_one_too_and_its_own_error(
        self, make_config: MakeConfig, tmp_path: Path
    ) -> None:
        def fail(event: Event) -> None:
            if event["event"] == "round":
                raise FedveilError("the roof is on fire")

        with pytest.raises(FedveilError, match="the roof is on fire"):
            fedveil.simulate(make_config(), out=tmp_path / "run", observe=fail)
        made = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        assert "The run failed</strong> after round 1: the roof is on fire" in made
        run = fedveil.simulate(make_config(), out=tmp_path / "run", resume=True)
        again = (run.path / "report.html").read_text(encoding="utf-8")
        assert "roof" not in again
        assert "After round 1." in again

    def test_a_report_that_cannot_be_made_hides_no_failure(
        self, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(event: Event) -> None:
            raise FedveilError("the roof is on fire")

        def broken(*arguments: object) -> None:
            raise RuntimeError("no report today")

        monkeypatch.setattr(reports, "write_report", broken)
        with pytest.raises(FedveilError, match="the roof is on fire"):
            fedveil.simulate(make_config(), out=tmp_path / "run", observe=fail)


class TestWhatIsRead:
    def test_nothing_that_is_a_sites_own(self, copied: fedveil.Run) -> None:
        private = [*copied.path.glob("sites/*/cleaning.json"), copied.path / "sites" / "site.log"]
        assert len(private) == copied.metrics["sites"] + 1
        private += [copied.path / "sites" / "site-001" / "other.txt", copied.path / "ledger" / "x"]
        private += [copied.path / name for name in ("samples.csv", "notes.txt", "raw.csv")]
        for file in private:
            file.write_text(json.dumps({"example": MARK}), encoding="utf-8")
        assert MARK not in text_of(copied)

    def test_but_the_test_would_see_it(self, copied: fedveil.Run) -> None:
        config = copied.path / "config.toml"
        config.write_text(config.read_text(encoding="utf-8") + f"# {MARK}\n", encoding="utf-8")
        assert MARK in text_of(copied)

    @pytest.mark.parametrize(
        "gone",
        [
            ["checkpoint"], ["model.safetensors"], ["metrics.json"], ["environment.json"],
            ["config.toml"], ["schema.json"], ["samples.png"],
            ["checkpoint", "model.safetensors", "metrics.json", "schema.json", "config.toml"],
        ],
    )  # fmt: skip
    def test_what_is_missing_is_left_out(self, copied: fedveil.Run, gone: list[str]) -> None:
        run_id = copied.metrics["run_id"]
        for name in gone:
            path = copied.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        assert run_id in text_of(fedveil.Run(copied.path))

    def test_without_a_state_the_real_shares_are_not_known(self, copied: fedveil.Run) -> None:
        for file in copied.path.glob("checkpoint/*.safetensors"):
            file.write_bytes(b"torn")
        assert "no histogram of real ones was paid for" in text_of(copied)

    def test_a_model_that_cannot_be_read_draws_nothing(self, copied: fedveil.Run) -> None:
        (copied.path / "model.safetensors").write_bytes(b"torn")
        assert read_sources(copied).synthetic is None
        assert "There is no released model" in text_of(copied)

    @pytest.mark.parametrize("name", ["metrics.json", "environment.json", "schema.json"])
    def test_what_is_damaged_is_one_line(self, copied: fedveil.Run, name: str) -> None:
        (copied.path / name).write_text('{"torn": ', encoding="utf-8")
        before = (copied.path / "report.html").read_bytes()
        with pytest.raises(FedveilError, match=f"holds no readable {name}"):
            fedveil.Run(copied.path).report()
        assert (copied.path / "report.html").read_bytes() == before

    def test_a_folder_without_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="holds no run; check the path"):
            fedveil.Run(tmp_path).report()
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("content", [None, "", '{"event": "run"'])
    def test_a_run_without_events(
        self, copied: fedveil.Run, tmp_path: Path, content: str | None
    ) -> None:
        (tmp_path / "config.toml").write_bytes((copied.path / "config.toml").read_bytes())
        if content is not None:
            (tmp_path / "events.jsonl").write_text(content, encoding="utf-8")
        with pytest.raises(FedveilError) as error:
            fedveil.Run(tmp_path).report()
        assert str(error.value) == (
            f"{tmp_path}: holds no readable events.jsonl; is it a run folder?"
        )
        assert not (tmp_path / "report.html").exists()


class TestWhereItGoes:
    def test_a_place_of_ones_own(self, copied: fedveil.Run, tmp_path: Path) -> None:
        out = tmp_path / "mine.html"
        assert copied.report(out) == out
        assert out.read_bytes() == copied.report().read_bytes()
        assert copied.report(str(out)) == out  # a report may be made anew

    @pytest.mark.parametrize("name", ["run/metrics.json", "report", "x.csv"])
    def test_a_report_is_html(self, copied: fedveil.Run, tmp_path: Path, name: str) -> None:
        with pytest.raises(ConfigError, match=r"a report is HTML; end it in \.html"):
            write_report(copied, tmp_path / name)

    def test_another_page_is_never_overwritten(self, copied: fedveil.Run, tmp_path: Path) -> None:
        page = tmp_path / "thesis.html"
        page.write_text("<p>years of work", encoding="utf-8")
        with pytest.raises(ConfigError, match="is no report of ours; choose another name"):
            copied.report(page)
        assert page.read_text(encoding="utf-8") == "<p>years of work"

    @pytest.mark.parametrize("name", ["gone/report.html", "folder.html"])
    def test_a_place_that_cannot_be_written(
        self, copied: fedveil.Run, tmp_path: Path, name: str
    ) -> None:
        (tmp_path / "folder.html").mkdir()
        with pytest.raises(ConfigError, match=r"cannot be written \(.*\); choose another folder"):
            copied.report(tmp_path / name)
        assert not list(tmp_path.rglob("*.partial"))


class TestTheCommand:
    def call(self, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:  # noqa: ANN401
        """Calls the console script's function; its exit code."""
        monkeypatch.setattr("sys.argv", ["fedveil", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code or 0
        return 0

    def test_it_says_where(
        self,
        copied: fedveil.Run,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert self.call(monkeypatch, "report", copied.path) == 0
        assert capsys.readouterr() == (f"{copied.path / 'report.html'}: written\n", "")

    def test_as_json(
        self,
        copied: fedveil.Run,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = tmp_path / "x.html"
        assert self.call(monkeypatch, "report", copied.path, "-o", out, "--json") == 0
        assert json.loads(capsys.readouterr().out) == {"file": str(out)}
        assert out.exists()

    @pytest.mark.parametrize(
        ("arguments", "code", "said"),
        [
            (["."], 2, "holds no run; check the path"),
            (["gone"], 2, "gone: holds no run; check the path"),
            (["run", "-o", "x.csv"], 2, "--out x.csv: a report is HTML; end it in .html"),
            (["run", "-o", "no/x.html"], 2, "cannot be written (No such file or directory)"),
        ],
    )
    def test_errors_are_one_line(
        self,
        copied: fedveil.Run,
        arguments: list[str],
        code: int,
        said: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(copied.path.parent)
        assert self.call(monkeypatch, "report", *arguments) == code
        told = capsys.readouterr()
        assert told.out == ""
        assert said in told.err
        assert told.err.count("\n") == 1
