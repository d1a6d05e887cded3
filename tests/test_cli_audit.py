"""`fedveil audit transcript`: one line for each fault, plain facts otherwise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedveil.privacy.secagg.simulator import Simulator
from fedveil.privacy.secagg.terms import Numbers

Call = Callable[..., Any]


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, Path]:
    """A transcript of two rounds, and the identities to hold it against."""
    session = Simulator(Numbers(3, 3, 3, 1), rounds=2, entropy=np.random.default_rng(0).bytes)
    session.set_up()
    for _ in range(2):
        session.round({site: np.zeros(4, dtype=np.uint32) for site in range(3)})
    transcript, pins = tmp_path / "run.transcript", tmp_path / "pins.toml"
    transcript.write_bytes(session.transcript)
    lines = [f'{name} = "{key.hex()}"' for name, key in session.pinned.items()]
    pins.write_text("\n".join(["[identities]", *lines]), encoding="utf-8")
    return transcript, pins


def test_what_it_says(call: Call, kept: tuple[Path, Path]) -> None:
    transcript, pins = kept
    result = call("audit", "transcript", transcript, "--identities", pins)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == f"{transcript}: every signature holds; run simulated"
    assert lines[1].endswith("safe against the server with up to 1 of them")
    assert lines[2].startswith("  epoch 0 round 0: 3 uploaded, 3 confirmed; sum ")
    assert lines[2].endswith(", says the server")
    assert lines[4].startswith("  site-000: its ledger has 2 entries, head ")


def test_json(call: Call, kept: tuple[Path, Path]) -> None:
    transcript, pins = kept
    result = call("audit", "transcript", transcript, "--identities", pins, "--json")
    found = json.loads(result.out)
    assert found["valid"] is True
    assert found["epochs"] == [
        {"epoch": 0, "rounds": 2, "n": 3, "t": 3, "n_min": 3, "t_collude": 1}
    ]
    assert [one["uploaders"] for one in found["rounds"]] == [
        ["site-000", "site-001", "site-002"]
    ] * 2
    assert found["ledgers"]["site-002"][0] == 2


@pytest.mark.parametrize("place", [100, 2000, -1])
def test_a_tampered_one(call: Call, kept: tuple[Path, Path], place: int) -> None:
    transcript, pins = kept
    content = bytearray(transcript.read_bytes())
    content[place] ^= 1
    transcript.write_bytes(content)
    if place == -1:  # the server's own word on the sum, which the sum itself must match
        content[-33] ^= 1
        transcript.write_bytes(content)
    result = call("audit", "transcript", transcript, "--identities", pins)
    assert result.code == 1
    assert result.out == ""
    assert result.err.startswith(f"error: {transcript}: transcript")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_file(call: Call, kept: tuple[Path, Path], missing: int) -> None:
    kept[missing].unlink()
    result = call("audit", "transcript", kept[0], "--identities", kept[1])
    assert result.code == 2
    assert "cannot be read (No such file or directory)" in result.err


def test_an_empty_one_is_refused(call: Call, kept: tuple[Path, Path]) -> None:
    kept[0].write_bytes(b"")
    result = call("audit", "transcript", kept[0], "--identities", kept[1], "--json")
    assert result.code == 1
    assert "is empty" in result.err
