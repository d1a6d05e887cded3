"""Texts from a file to a report: a run of the family that is fitted, and what comes of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedveil
from fedveil.config import ConfigError, RunConfig
from fedveil.data_prep.schema import ImageSchema, TextSchema
from fedveil.export import legible, read_provenance, write
from fedveil.models import check_modality

PLAY = "The cat sat; a dog ran!\n\tThe <b>dog</b> sat & a cat ran?\n" * 60
CONFIG = """
[federation]
sites = 2
[data]
source = "play.txt"
schema = "schema.toml"
records = 200
[model]
family = "marginal"
[privacy]
mechanism = "central"
epsilon = 60.0
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fedveil.Run:
    """A finished run on a made-up play."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "play.txt").write_text(PLAY, encoding="utf-8")
    (folder / "schema.toml").write_text('modality = "text"\nlength = 16\n', encoding="utf-8")
    (folder / "run.toml").write_text(CONFIG, encoding="utf-8")
    return fedveil.simulate(folder / "run.toml", out=folder / "run")


def test_its_figures_are_a_texts(run: fedveil.Run) -> None:
    quality = run.metrics["quality"]
    assert set(quality) == {"loss", "bits_per_character", "one_way_tv"}
    bits = quality["bits_per_character"]
    assert 0 < bits["value"] < 3
    assert 0 < bits["noise"] < 1
    assert "floor" in quality["one_way_tv"]


def test_it_says_what_of_a_text_is_not_hidden(run: fedveil.Run) -> None:
    [open_end] = run.privacy["not_claimed"]
    assert open_end.startswith("a text of several records is not hidden, only each record of 16 b")


def test_its_description_says_against_whom(run: fedveil.Run) -> None:
    said = json.loads((run.path / "statistics.json").read_text(encoding="utf-8"))
    assert said["against"] == run.privacy["against"]
    assert said["against"].startswith("everyone but the server")


def test_it_samples_texts(run: fedveil.Run) -> None:
    drawn = run.sample(20, seed=1)
    assert isinstance(drawn, list)
    assert all(isinstance(text, str) and 0 < len(text) <= 16 for text in drawn)
    assert drawn == run.sample(20, seed=1)
    assert drawn != run.sample(20, seed=2)


def test_it_is_evaluated_exactly(run: fedveil.Run) -> None:
    found = run.evaluate(run.path.parent / "play.txt")
    assert found["private"] is False
    assert found["records"] == len(PLAY.encode()) // 16 + 1
    bits = run.metrics["quality"]["bits_per_character"]
    assert found["figures"]["bits_per_character"] == pytest.approx(
        bits["value"], abs=0.3 + 4 * bits["noise"]
    )


def test_its_folder_has_samples_to_read(run: fedveil.Run) -> None:
    text = (run.path / "samples.txt").read_text(encoding="utf-8")
    assert text.startswith("---- synthetic record 1 of 100 ----\n")
    assert text.count("---- synthetic record ") == 100
    assert read_provenance(run.path / "samples.txt") == run.provenance()
    assert not (run.path / "samples.png").exists()


def test_its_report_shows_some_escaped(run: fedveil.Run) -> None:
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "Synthetic texts" in page
    assert "bits_per_character" in page
    assert "<b>dog" not in page
    assert "<b>" not in "".join(page.split("Synthetic texts")[1].split("</section>")[0])


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_its_files_say_what_they_are(run: fedveil.Run, tmp_path: Path, ending: str) -> None:
    path = write(run, 5, tmp_path / f"drawn{ending}", seed=1)
    assert read_provenance(path) == run.provenance()
    assert {p.name for p in tmp_path.iterdir()} == {
        f"drawn{ending}", f"drawn{ending}.provenance.json",
    }  # fmt: skip


def test_lines_of_json_read_as_the_same_texts(run: fedveil.Run, tmp_path: Path) -> None:
    path = write(run, 30, tmp_path / "drawn.jsonl", seed=3)
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == [{"text": text} for text in run.sample(30, 3)]
    assert run.evaluate(path)["records"] == 30


def test_another_ending_is_refused(run: fedveil.Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"makes texts; end it in \.txt or \.jsonl"):
        write(run, 5, tmp_path / "drawn.csv")


def test_by_the_command_line(
    run: fedveil.Run, tmp_path: Path, call: Callable[..., tuple[Any, str, str]]
) -> None:
    out = tmp_path / "drawn.txt"
    code, _, err = call("sample", str(run.path), "-n", "3", "-o", str(out))
    assert (code, err) == (0, "")
    assert out.read_text(encoding="utf-8").count("synthetic record") == 3
    code, said, _ = call("evaluate", str(run.path), "--data", str(run.path.parent / "play.txt"))
    assert code == 0
    assert "bits_per_character" in said


def test_legible_is_what_no_terminal_obeys() -> None:
    assert legible("a\tb\nc\x1b[31m\x00\u202e\u00e9") == "a\tb\nc\ufffd[31m\ufffd\ufffd\u00e9"


class TestFamilies:
    def test_that_do_not_make_texts_are_refused_before_anything_runs(self) -> None:
        with pytest.raises(ConfigError, match='family = "vae": makes no texts; use "marginal"'):
            check_modality("vae", TextSchema())
        check_modality("marginal", TextSchema())
        check_modality("vae", ImageSchema(height=8, width=8))

    def test_a_site_refuses_them_too(self, make_config: Callable[..., RunConfig]) -> None:
        from fedveil.client.understanding import understand

        with pytest.raises(ConfigError, match="makes no texts"):
            understand(
                make_config().resolved().model_dump_json(by_alias=True),
                TextSchema().model_dump_json(),
            )
