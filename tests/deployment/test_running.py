"""One supervisor a kit, its programs' environment, and what is noted of them."""

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedveil.config import ConfigError
from fedveil.deployment import running
from fedveil.deployment.kit import Kit
from fedveil.deployment.logs import LEVEL
from fedveil.deployment.running import environment, held, holder
from fedveil.deployment.supervise import Notice, Program

MakeKit = Callable[..., Path]
PROGRAMS = [Program("one", ("x",)), Program("two", ("y",))]


@pytest.fixture
def kit(make_kit: MakeKit) -> Kit:
    """A site's kit."""
    return Kit.read(make_kit("site"), "site")


class TestTheLock:
    def test_nobody_holds_it(self, kit: Kit) -> None:
        assert holder(kit) is None
        with held(kit):
            pass
        assert holder(kit) is None

    def test_this_process_does(self, kit: Kit) -> None:
        with held(kit):
            assert holder(kit) == os.getpid()

    def test_a_second_one_is_refused(self, kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(running, "_PAUSE", 0.0)
        with held(kit), pytest.raises(ConfigError) as caught, held(kit):
            pytest.fail("held twice")
        assert str(caught.value) == (
            f"{kit.folder}: is up already, pid {os.getpid()}; stop it first"
        )

    def test_whoever_looks_is_in_nobody_s_way(
        self, kit: Kit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`status` takes the lock for an instant."""
        with held(kit):
            pass
        looking = os.open(kit.state / "up.lock", os.O_RDONLY)
        assert running._lock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr("time.sleep", lambda _: os.close(looking))
        with held(kit):
            assert holder(kit) == os.getpid()

    def test_a_killed_one_leaves_none(self, kit: Kit) -> None:
        text = """
import os, signal, sys
from pathlib import Path
from fedveil.deployment.kit import Kit
from fedveil.deployment.running import held
with held(Kit.read(Path(sys.argv[1]), "site")):
    os.kill(os.getpid(), signal.SIGKILL)
"""
        done = subprocess.run([sys.executable, "-P", "-c", text, str(kit.folder)], check=False)
        assert done.returncode == -signal.SIGKILL
        assert holder(kit) is None
        with held(kit):
            pass

    def test_the_state_is_for_its_owner(self, kit: Kit) -> None:
        with held(kit):
            assert kit.state.stat().st_mode & 0o777 == 0o700
            assert (kit.state / "up.lock").stat().st_mode & 0o777 == 0o600

    def test_a_state_that_is_no_folder(self, kit: Kit) -> None:
        kit.state.write_text("")
        with pytest.raises(ConfigError, match=r"up.lock: cannot be written \(.+\); start it as"):
            held(kit).__enter__()


class TestTheEnvironment:
    def test_nothing_of_another_flower(self, tmp_path: Path) -> None:
        given = {"FLWR_HOME": "/root/.flwr", "FLWR_LOG_LEVEL": "DEBUG", "PATH": "/bin"}
        found = environment(tmp_path, given, logging.INFO)
        assert found["PATH"] == "/bin"
        assert found["FLWR_HOME"] == str(tmp_path / "flower")
        assert "FLWR_LOG_LEVEL" not in found
        assert found[LEVEL] == "INFO"

    def test_as_flower_py_has_it(self, tmp_path: Path) -> None:
        text = (
            "import os, fedveil.flower; print({k: v for k, v in os.environ.items() if 'FLWR' in k})"
        )
        set_there = subprocess.run(
            [sys.executable, "-P", "-c", text],
            capture_output=True,
            check=True,
            text=True,
            env={name: value for name, value in os.environ.items() if "FLWR" not in name},
        )
        found = environment(tmp_path, {}, logging.INFO)
        ours = {k: v for k, v in found.items() if k.startswith("FLWR_") and k != "FLWR_HOME"}
        assert str(ours) == set_there.stdout.strip()


class TestWhatIsNoted:
    def noted(self, kit: Kit) -> dict[str, Any]:
        found = json.loads((kit.state / "up.json").read_text(encoding="utf-8"))
        assert found.pop("pid") == os.getpid()
        programs: dict[str, Any] = found["programs"]
        assert all(about.pop("since", "Z").endswith("Z") for about in programs.values())
        return programs

    def test_the_last_of_each_program(self, kit: Kit) -> None:
        kit.state.mkdir()
        board = running._Board(kit.state / "up.json", PROGRAMS)
        board.note(Notice("started", "one", 7))
        assert self.noted(kit) == {
            "one": {"state": "running", "starts": 1, "pid": 7},
            "two": {"state": "waiting", "starts": 0},
        }
        board.note(Notice("ended", "one", 7, code=1, wait=1.0, cause="no disk"))
        board.note(Notice("started", "one", 8))
        board.note(Notice("failed", "one", 8, code=2, cause="no key"))
        board.note(Notice("stopped", "two", 9))
        assert self.noted(kit) == {
            "one": {"state": "failed", "starts": 2, "code": 2, "cause": "no key"},
            "two": {"state": "stopped", "starts": 0, "code": 0, "cause": ""},
        }

    def test_a_disk_that_is_full_ends_no_program(self, kit: Kit) -> None:
        running._Board(kit.state / "up.json", PROGRAMS).note(Notice("started", "one", 7))
        assert not kit.state.exists()
