"""From `make demo` to one's own CSV: five steps, each a command, as the README tells them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from fedveil.export import read_provenance

Call = Callable[..., Any]


@pytest.fixture
def fedveil(call: Call) -> Call:
    """One command, as typed."""
    return lambda line: call(*line.split())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with somebody's table."""
    draw = random.Random(5)  # noqa: S311  a made-up table
    lines = ["age,income,sex,smoker"]
    for _ in range(400):
        age = draw.randint(20, 80)
        smokes = "yes" if draw.random() < age / 100 else "no"
        lines.append(f"{age},{draw.uniform(0, 5000):.2f},{draw.choice('fm')},{smokes}")
    (tmp_path / "mine.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_the_five_steps(folder: Path, fedveil: Call) -> None:
    schema, run = folder / "mine.schema.toml", folder / "run.toml"

    # 1. Draft a schema.
    drafted = fedveil("data schema mine.csv -o mine.schema.toml --label smoker")
    assert drafted.code == 0
    draft = schema.read_text(encoding="utf-8")
    (folder / "draft.toml").write_text(draft, encoding="utf-8")
    assert 'name = "income"' in draft

    # 2. Confirm it: hold it against the code book, mend what is wrong, delete the marks.
    lines = [line for line in draft.splitlines() if not line.startswith("unconfirmed = ")]
    assert "unconfirmed" not in "\n".join(line for line in lines if not line.startswith("#"))
    schema.write_text("\n".join(lines) + "\n", encoding="utf-8")

    # 3. See what cleaning would do.
    checked = fedveil("data check mine.csv --schema mine.schema.toml")
    assert checked.code == 0
    assert "USABLE: 400 of 400 records, 0 dropped" in checked.out

    # 4. Write a run, beginning with the commented one.
    assert fedveil("init run.toml").code == 0
    text = run.read_text(encoding="utf-8")
    for option, value in {
        'source = "sklearn:digits"': 'source = "mine.csv"',
        "# schema =": 'schema = "mine.schema.toml"',
        "# records =": "records = 400",
        "# sites = 10": "sites = 3",
        "# rounds = 200": "rounds = 1",
        "# hidden = 96": "hidden = 8",
        "# epsilon = 3.0": "epsilon = 8.0",
        "# samples = 5000": "samples = 500",
    }.items():
        assert text.splitlines().count(option) == 1
        text = text.replace(f"{option}\n", f"{value}\n")
    run.write_text(text, encoding="utf-8")
    refused = fedveil("simulate run.toml --set data.schema=draft.toml")
    assert (refused.code, refused.out) == (2, "")
    assert "unconfirmed" in refused.err

    # 5. Simulate, look at it, sample.
    simulated = fedveil("simulate run.toml --out runs/mine --json")
    assert simulated.code == 0
    assert json.loads(simulated.out)["privacy"]["epsilon"] <= 8
    assert "<html" in (folder / "runs/mine/report.html").read_text(encoding="utf-8")
    sampled = fedveil("sample runs/mine -n 50 -o synthetic.csv")
    assert sampled.code == 0
    synthetic = pl.read_csv(folder / "synthetic.csv")
    assert synthetic.columns == ["age", "income", "sex", "smoker"]
    assert len(synthetic) == 50
    assert set(synthetic["smoker"]) <= {"yes", "no"}
    assert read_provenance(folder / "synthetic.csv")["synthetic"] is True
    listed = fedveil("runs list")
    assert [line.split()[0] for line in listed.out.splitlines()] == ["run", "mine"]
