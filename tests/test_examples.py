"""The examples run as they stand."""

import runpy
from pathlib import Path

import pytest

import fedveil
from fedveil.api import resolve
from fedveil.config import load_config

EXAMPLES = Path(fedveil.__file__).parent / "examples"


def test_the_api_from_a_csv_to_a_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDVEIL_EXAMPLE_ROUNDS", "1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    after = runpy.run_path(str(EXAMPLES / "api.py"))
    out = capsys.readouterr().out
    assert after["run"].privacy["epsilon"] <= 8
    assert after["cautious"].privacy["epsilon"] <= 1
    assert after["synthetic"].columns == [*after["COLUMNS"], "diagnosis"]
    assert len(after["synthetic"]) == 569
    assert after["exact"]["private"] is False
    assert set(after["found"].config) >= {"privacy.epsilon"}
    assert "trained on synthetic, tested on real: AUROC 0." in out
    assert "NOT PRIVATE" not in out
    assert {path.name for path in after["FOLDER"].iterdir()} == {
        "mine.csv", "mine.schema.toml", "run.toml", "epsilon-8", "epsilon-1",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [after["FOLDER"]]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*-vae.toml")), ids=lambda file: file.stem)
def test_configurations_are_whole(file: Path) -> None:
    """Checked with their schemas; the data of some is not shipped."""
    resolved, schema = resolve(load_config(file))
    assert resolved.federation.name == file.stem.removesuffix("-vae")
    assert schema.modality in {"table", "image"}
    assert Path(resolved.data.source).is_absolute() or resolved.data.source.startswith("sklearn:")
