"""The README says what is so: its files are there, its examples are valid, its figures measured."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedveil.config import RunConfig, load_config, read_federation, validated
from fedveil.data_prep.schema import load_schema, parse_schema

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", README, re.DOTALL)]


def test_it_opens_with_the_two_commands_and_the_picture() -> None:
    opening = README[:1200]
    assert opening.index("make demo") < opening.index("make test") < opening.index("![")


def test_there_are_no_placeholders() -> None:
    assert not re.findall(r"@[A-Z]+@|TODO|XXX", README)


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"(?:examples|benchmarks)/[\w./-]+\.\w+", README)))
)
def test_the_files_it_names_are_there(name: str) -> None:
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("block", BLOCKS)
def test_its_toml_is_valid(block: dict[str, Any]) -> None:
    if "modality" in block:
        parse_schema(block, "README")
    else:
        validated(RunConfig, block)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda p: p.name)
def test_the_examples_are_valid(path: Path) -> None:
    if ".schema." in path.name:
        load_schema(path)
    elif path.name == "federation.toml":
        assert len(read_federation(path).members.sites) == 4
    else:
        load_config(path)


COLUMNS = ("central", "local", "none", "real")


@pytest.mark.parametrize(("row", "metric"), [("Adult", "auroc"), ("Digits", "accuracy")])
def test_its_figures_are_those_measured(row: str, metric: str) -> None:
    results = json.loads((ROOT / "benchmarks/results/quality.json").read_text(encoding="utf-8"))
    (line,) = re.findall(rf"^\| {row},.*$", README, re.MULTILINE)
    quoted = re.findall(r"0\.\d{3}", line)
    names = [f"{row.lower()}_{column}_{metric}" for column in COLUMNS]
    figures = [results["figures"][name] for name in names if name in results["figures"]]
    assert quoted == [f"{figure:.3f}" for figure in figures]
