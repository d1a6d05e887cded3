"""Real supervisors over small programs, and how to wait for what they do."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_SUPERVISOR = """
import json, signal, sys
from fedveil.deployment import restarts
from fedveil.deployment.logs import configure
from fedveil.deployment.supervise import Program, supervise

restarts.FIRST = 0.02
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have set it aside
configure("supervisor")
given = json.loads(sys.argv[1])
sys.exit(supervise([Program(name, (sys.executable, "-c", text), 0.5) for name, text in given]))
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in {"Z", "X"}


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:  # noqa: ANN401
    """Waits for a condition, and gives what it gave."""
    last = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < last, "it did not come to pass"
        time.sleep(0.01)
    return found


@dataclass
class Supervisor:
    """A supervisor that runs, and what can be seen of it."""

    process: subprocess.Popen[bytes]
    log: Path
    notes: Path
    pids: set[int] = field(default_factory=set)

    def lines(self) -> list[dict[str, Any]]:
        """What is in its log so far, whole lines only."""
        text = self.log.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def events(self, program: str) -> list[str]:
        """What it logged of a program."""
        return [line["event"] for line in self.lines() if line.get("program") == program]

    def noted(self, count: int) -> list[str]:
        """The lines that the programs wrote into `notes`, once there are so many."""

        def there() -> list[str] | None:
            words = self.notes.read_text().splitlines() if self.notes.exists() else []
            return words if len(words) >= count else None

        found: list[str] = until(there)
        self.pids |= {int(word) for line in found for word in line.split() if word.isdigit()}
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Tells it to stop; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


StartSupervisor = Callable[..., Supervisor]


@pytest.fixture
def start_supervisor(tmp_path: Path) -> Iterator[StartSupervisor]:
    """Starts a supervisor over programs, given as name and Python text.

    In the text `note(words...)` adds a line to `notes`.
    """
    begun: list[Supervisor] = []
    notes = tmp_path / "notes"
    helpers = f"""
import os, signal, subprocess, sys
def note(*words):
    handle = os.open({str(notes)!r}, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.write(handle, (" ".join(map(str, words)) + "\\n").encode())
    os.close(handle)
def notes():
    return open({str(notes)!r}).read().splitlines() if os.path.exists({str(notes)!r}) else []
"""

    def start(*programs: tuple[str, str]) -> Supervisor:
        given: Sequence[tuple[str, str]] = [(name, helpers + text) for name, text in programs]
        log = tmp_path / "log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _SUPERVISOR, json.dumps(given)], stderr=errors
            )
        begun.append(Supervisor(process, log, notes))
        return begun[-1]

    yield start
    for one in begun:
        one.process.kill()
        one.process.wait()
        for pid in one.pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(name="until")
def _until() -> Callable[..., Any]:
    return until


@pytest.fixture(name="alive")
def _alive() -> Callable[[int], bool]:
    return alive
