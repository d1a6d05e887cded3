"""One supervisor a kit: its lock, its programs' environment, and what it notes of them."""

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..config import ConfigError
from ..files import replace_file
from .kit import Kit
from .logs import LEVEL, configure, now
from .supervise import Notice, Program, log_notice, supervise

STATUS = "up.json"
"""What the supervisor notes of its programs, in the kit's state."""

_LOCK = "up.lock"
_TRIES, _PAUSE = 5, 0.1  # `holder` takes the lock for an instant, too

_FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
"""As `flower.py` sets them, for whatever starts Flower without it."""


def keep_running(kit: Kit, programs: Sequence[Program], level: int = logging.INFO) -> int:
    """Keeps a kit's programs running; the kit must be held.

    Args:
        kit: The kit.
        programs: See `supervise.supervise`, as for what is returned.
        level: The least that supervisor and programs log.
    """
    configure("supervisor", level)
    board = _Board(kit.state / STATUS, programs)
    return supervise(
        programs, environment=environment(kit.state, os.environ, level), announce=board.note
    )


@contextmanager
def held(kit: Kit) -> Iterator[None]:
    """Holds a kit, so that its programs run once.

    Raises:
        ConfigError: It is up already, or its state cannot be written.
    """
    path = kit.state / _LOCK
    try:
        kit.state.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); start it as the kit's owner"
        ) from None
    try:
        if not _taken(handle):
            raise ConfigError(
                f"{kit.folder}: is up already, pid {_pid_in(handle) or 'unknown'}; stop it first"
            )
        os.ftruncate(handle, os.pwrite(handle, f"{os.getpid()}\n".encode(), 0))
        yield
    finally:
        os.close(handle)


def holder(kit: Kit) -> int | None:
    """The process of the supervisor that holds a kit, if one does; 0 if it does not say which."""
    try:
        handle = os.open(kit.state / _LOCK, os.O_RDONLY)
    except OSError:
        return None
    try:
        return None if _lock(handle, fcntl.LOCK_SH) else _pid_in(handle)
    finally:
        os.close(handle)


def environment(state: Path, given: Mapping[str, str], level: int) -> dict[str, str]:
    """The environment of a kit's programs: nothing of another Flower gets into it.

    Args:
        state: The kit's state; Flower's own files are kept there.
        given: The supervisor's environment.
        level: The least that the programs log.
    """
    kept = {name: value for name, value in given.items() if not name.startswith("FLWR_")}
    own = {
        "FLWR_HOME": str(state / "flower"),
        "PYTHONUNBUFFERED": "1",
        LEVEL: logging.getLevelName(level),
    }
    return kept | _FLOWER | own


class _Board:
    """What `server status` and `site status` read of the programs."""

    def __init__(self, path: Path, programs: Sequence[Program]) -> None:
        self._path, self._since = path, now()
        self._programs: dict[str, dict[str, object]] = {
            program.name: {"state": "waiting", "starts": 0} for program in programs
        }

    def note(self, notice: Notice) -> None:
        """Logs what happened to a program, and writes it down."""
        log_notice(notice)
        about = self._programs[notice.program]
        match notice.event:
            case "started":
                starts = int(str(about["starts"])) + 1
                about = {"state": "running", "starts": starts, "pid": notice.pid}
            case "ended":
                about = {"state": "waiting", "starts": about["starts"]}
            case _:
                about = {"state": notice.event, "starts": about["starts"]}
        if notice.event != "started":
            about |= {"code": notice.code, "cause": notice.cause}
        self._programs[notice.program] = about | {"since": now()}
        self._write()

    def _write(self) -> None:
        """Writes all of it down; a disk that is full ends no program."""
        about = {"pid": os.getpid(), "since": self._since, "programs": self._programs}
        with suppress(OSError):
            replace_file(self._path, f"{json.dumps(about)}\n".encode(), 0o600, sync=False)


def _taken(handle: int) -> bool:
    for _ in range(_TRIES):
        if _lock(handle, fcntl.LOCK_EX):
            return True
        time.sleep(_PAUSE)
    return False


def _lock(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _pid_in(handle: int) -> int:
    found = os.pread(handle, 32, 0).strip()
    return int(found) if found.isdigit() else 0
