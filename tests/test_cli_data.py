"""`fedveil data schema|check|clean`: exit codes, what goes where; nothing is overwritten."""

import json
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedveil.config import ConfigError, load_config
from fedveil.data_prep import run_schema
from fedveil.data_prep.schema import load_schema, marks

PEOPLE = "id,age,sex,y\n" + "".join(
    f"P{i},{20 + i * 7 % 30},{'fm'[i % 2]},{'no' if i % 3 else 'yes'}\n" for i in range(30)
)
SCHEMA = """
label = "sex"
[[column]]
name = "age"
kind = "integer"
bounds = [0, 40]
[[column]]
name = "sex"
kind = "categorical"
categories = ["f", "m"]
"""
RUN = """
[data]
source = "x.csv"
schema = "s.toml"
records = 20000
[model]
family = "vae"
[clean]
out_of_bounds = "drop"
"""
IMAGES = 'modality = "image"\nheight = 8\nwidth = 8\n'


Call = Callable[..., Any]


@pytest.fixture(name="call")
def _call(call: Call) -> Call:
    """Calls `fedveil data` in a folder that holds data and their schema."""
    for name, text in (("x.csv", PEOPLE), ("s.toml", SCHEMA), ("run.toml", RUN)):
        Path(name).write_text(text, encoding="utf-8")
    return partial(call, "data")


def refused(result: tuple[object, str, str]) -> str:
    """The one line of a wrong call; nothing is on stdout."""
    found_code, out, err = result
    assert (found_code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


class TestSchema:
    def test_a_draft_goes_to_stdout(self, call: Call) -> None:
        result = call("schema", "x.csv")
        assert result.code == 0
        Path("draft.toml").write_text(result.out, encoding="utf-8")
        assert marks(load_schema("draft.toml", draft=True))
        assert "left out: column 'id': nearly every record" in result.err
        assert "this is a draft, as private as the data: 15 options are unconfirmed" in result.err

    def test_a_draft_goes_into_a_new_file_for_its_owner(self, call: Call) -> None:
        result = call("schema", "x.csv", "-o", "draft.toml", "--label", "sex")
        assert (result.code, result.out) == (0, "")
        assert load_schema("draft.toml", draft=True).label == "sex"
        assert stat.S_IMODE(Path("draft.toml").stat().st_mode) == 0o600
        assert refused(call("schema", "x.csv", "-o", "draft.toml")) == (
            "--out draft.toml: is there already; choose another name"
        )

    @pytest.mark.parametrize("out", [None, "draft.toml"])
    def test_json(self, call: Call, out: str | None) -> None:
        result = call("schema", "x.csv", "--json", *(("-o", out) if out else ()))
        found = json.loads(result.out)
        assert found["file"] == out
        assert found["schema"].startswith("# A DRAFT")
        assert (found["unconfirmed"], found["keys"], found["private"]) == (15, ["id"], True)
        assert found["left_out"].keys() == {"id"}

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (["gone.csv"], "gone.csv: is no file; check the path"),
            (["x.csv", "-o", "no/s.toml"], "--out no/s.toml: its folder is not there; make it"),
            (["x.csv", "-o", "x.csv"], "--out x.csv: is there already; choose another name"),
            (["x.csv", "--label", "sox"], "--label sox: is no column of the file; did you mean"),
            (["sklearn:digits"], "sklearn:digits: its schema is built in"),
        ],
    )
    def test_wrong_calls(self, call: Call, arguments: list[str], line: str) -> None:
        assert refused(call("schema", *arguments)).startswith(line)
        assert Path("x.csv").read_text() == PEOPLE

    def test_a_full_disk(self, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(path: Path, content: bytes) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("fedveil.files.create_secret_file", full)
        assert refused(call("schema", "x.csv", "-o", "draft.toml")) == (
            "--out draft.toml: cannot be written (No space left on device); choose another folder"
        )

    def test_a_run_refuses_what_was_drafted(self, call: Call) -> None:
        call("schema", "x.csv", "-o", "draft.toml")
        Path("run.toml").write_text(RUN.replace("s.toml", "draft.toml"))
        with pytest.raises(ConfigError, match="was read off the data; check it against the code"):
            run_schema(load_config("run.toml"))


class TestCheck:
    def test_what_is_found_is_shown_and_mended(self, call: Call) -> None:
        result = call("check", "x.csv", "--schema", "s.toml")
        assert (result.code, result.err) == (0, "")
        first, *_, last = result.out.splitlines()
        assert first.endswith("This quotes the data: it stays at the site")
        assert 'column "age": out of bounds: widen bounds if the code book says so' in result.out
        assert last == "USABLE: 30 of 30 records, 0 dropped"

    def test_the_rules_and_the_size_of_a_run(self, call: Call) -> None:
        result = call("check", "x.csv", "--schema", "s.toml", "--config", "run.toml", "--json")
        found = json.loads(result.out)
        assert result.code == 0
        assert (found["usable"], found["records"], found["kept"]) == (True, 30, 21)
        assert [f["becomes"] for f in found["findings"]] == ["the record is dropped"]
        assert found["note"].startswith("data.records = 20000: declared for the whole federation;")
        assert found["private"]

    @pytest.mark.parametrize("form", [[], ["--json"]])
    def test_unusable_data_are_shown_and_end_with_2(self, call: Call, form: list[str]) -> None:
        Path("x.csv").write_text("age,sex\n4,femal\n5,femal\n")
        result = call("check", "x.csv", "--schema", "s.toml", *form)
        assert result.code == 2
        assert result.err.startswith("error: column \"sex\" = 'femal', ...: no value is what")
        if form:
            assert not json.loads(result.out)["usable"]
        else:
            assert result.out.splitlines()[-1] == "NOT USABLE: 0 of 2 records would be kept"

    def test_a_draft_is_taken_and_called_one(self, call: Call) -> None:
        call("schema", "x.csv", "-o", "draft.toml")
        result = call("check", "x.csv", "--schema", "draft.toml")
        assert result.code == 0
        assert result.err == (
            "draft.toml: is a draft; runs refuse it until its `unconfirmed` lines are gone\n"
        )

    def test_what_the_data_hold_cannot_command_the_terminal(self, call: Call) -> None:
        Path("x.csv").write_text("age,sex\n4,m\n\x1b[31m[bold]4,m\n4,\x1b]0;x\n")
        result = call("check", "x.csv", "--schema", "s.toml")
        assert result.code == 0
        assert "\x1b" not in result.out
        assert "\\u001b[31m[bold]4" in result.out

    @pytest.mark.parametrize(
        ("data", "schema", "line"),
        [
            ("gone.csv", "s.toml", "gone.csv: is no file; check the path"),
            ("x.csv", "gone.toml", "gone.toml: cannot be read"),
            ("x.csv", "i.toml", "--schema i.toml: is for images; x.csv holds tables"),
            (".", "s.toml", "--schema s.toml: is for tables; . holds images"),
            ("semi.csv", "s.toml", 'semi.csv: column "age" is missing; the file has'),
            ("empty.csv", "s.toml", 'empty.csv: column "age" is missing; the file has no columns'),
        ],
    )
    def test_wrong_calls(self, call: Call, data: str, schema: str, line: str) -> None:
        Path("i.toml").write_text(IMAGES)
        Path("empty.csv").write_text("")
        Path("semi.csv").write_text("age;sex\n4;m\n")
        assert refused(call("check", data, "--schema", schema)).startswith(line)


class TestClean:
    def test_records_and_their_report(self, call: Call) -> None:
        result = call("clean", "x.csv", "--schema", "s.toml", "-o", "out.csv")
        assert (result.code, result.err) == (0, "")
        assert result.out.splitlines() == [
            "out.csv: 30 of 30 records; out.csv.cleaning.json says what was found",
            "Both are as private as the data: they stay at the site",
        ]
        assert Path("out.csv").read_text().startswith("age,sex\n20,f\n27,m\n")
        again = call("check", "out.csv", "--schema", "s.toml", "--json")
        assert json.loads(again.out)["findings"] == []

    def test_json_and_the_rules_of_a_run(self, call: Call) -> None:
        arguments = ("--schema", "s.toml", "--config", "run.toml", "-o", "out.parquet", "--json")
        result = call("clean", "x.csv", *arguments)
        found = json.loads(result.out)
        assert (found["file"], found["report"]) == ("out.parquet", "out.parquet.cleaning.json")
        assert (found["records"], found["kept"], found["private"]) == (30, 21, True)
        report = json.loads(Path("out.parquet.cleaning.json").read_text())
        assert report["columns"] == found["columns"]

    def test_images(self, call: Call) -> None:
        np.savez("x.npz", images=np.zeros((3, 8, 8), dtype=np.uint8))
        Path("i.toml").write_text(IMAGES)
        assert call("clean", "x.npz", "--schema", "i.toml", "-o", "out.npz").code == 0
        assert np.load("out.npz")["images"].shape == (3, 8, 8)

    @pytest.mark.parametrize(
        ("out", "line"),
        [
            ("x.csv", "--out x.csv: is the data itself; choose another name"),
            ("s.csv", "--out s.csv: is there already; choose another name"),
            ("no/o.csv", "--out no/o.csv: its folder is not there; make it first"),
            ("o.npz", "--out o.npz: the schema is for tables; end it in .csv or .parquet"),
        ],
    )
    def test_wrong_calls(self, call: Call, out: str, line: str) -> None:
        Path("s.csv").write_text("mine")
        before = {path.name: path.read_bytes() for path in Path().iterdir()}
        assert refused(call("clean", "x.csv", "--schema", "s.toml", "-o", out)) == line
        assert {path.name: path.read_bytes() for path in Path().iterdir()} == before

    def test_unusable_data(self, call: Call) -> None:
        Path("x.csv").write_text("age,sex\n")
        result = call("clean", "x.csv", "--schema", "s.toml", "-o", "out.csv")
        assert refused(result) == "data: holds no records; check the file"
        assert not Path("out.csv").exists()
