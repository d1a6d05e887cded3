"""What a site's process says of itself, and what a reader makes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedveil.client.status import NOTHING, Status, read_status, started, write_status
from fedveil.config import ConfigError


def spoilt(folder: Path, **changes: Any) -> None:  # noqa: ANN401
    path = folder / "status.json"
    raw = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(raw), encoding="utf-8")


def test_what_was_said_is_read(tmp_path: Path) -> None:
    first = Status("starting", version="1.2")
    working = first.now("working", server="h:1", run="run-a", round=3)
    for said in (first, working):
        write_status(tmp_path, said)
        assert read_status(tmp_path) == said
    assert (working.pid, working.version, working.round) == (os.getpid(), "1.2", 3)
    assert (tmp_path / "status.json").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_before_the_first_start_it_is_down(tmp_path: Path) -> None:
    assert read_status(tmp_path) == NOTHING
    assert NOTHING.state == "down"


def test_a_process_that_is_gone_is_down(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    write_status(tmp_path, Status("connected", run="run-a", pid=gone.pid, began=0))
    found = read_status(tmp_path)
    assert (found.state, found.run) == ("down", "run-a")


def test_so_is_one_whose_number_another_process_has(tmp_path: Path) -> None:
    assert started(os.getpid()) > 0
    write_status(tmp_path, Status("connected", began=started(os.getpid()) - 1))
    assert read_status(tmp_path).state == "down"


def test_one_that_was_stopped_is_stopped(tmp_path: Path) -> None:
    write_status(tmp_path, Status("stopped", pid=2**22 + 1, began=1))
    assert read_status(tmp_path).state == "stopped"


@pytest.mark.parametrize(
    "changes",
    [
        {"state": "fine"}, {"state": 3}, {"pid": "1"}, {"pid": True}, {"round": 1.5},
        {"since": None}, {"more": 1}, {"last_error": ["a"]},
    ],
)  # fmt: skip
def test_what_is_no_status_is_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_status(tmp_path, Status("connected"))
    spoilt(tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"status\.json: is no status; start the site again"):
        read_status(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"3"])
def test_so_are_other_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "status.json").write_bytes(content)
    with pytest.raises(ConfigError, match="is no status"):
        read_status(tmp_path)


@pytest.mark.parametrize("pid", [0, -1, 10**30])
def test_numbers_that_are_no_process(tmp_path: Path, pid: int) -> None:
    write_status(tmp_path, Status("connected", pid=pid, began=0))
    assert read_status(tmp_path).state == "down"
