"""What a site's process says of itself: one small file, for its owner's eyes only."""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from ..config import ConfigError
from ..files import replace_file

State = Literal["starting", "connecting", "connected", "working", "paused", "stopped", "down"]
_FILE = "status.json"


def started(pid: int) -> int:
    """When a process began, in the kernel's ticks since it started; 0 where nobody tells.

    With it a number that was given out again is not taken for the process that had it before.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(line.rpartition(")")[2].split()[19])  # field 22, proc(5)
    except (OSError, ValueError, IndexError):
        return 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Status:
    """What a site's process was doing when it said so.

    Attributes:
        state: What it is doing; `down` is never written, it is what a reader finds.
        since: Since when, UTC.
        server: HOST:PORT of the Fleet API.
        run: The run that it works on, or worked on last.
        round: Its round.
        last_error: In one line, as the site's own log has it; it never leaves the site.
        version: Of Fedveil.
        pid: Of the process, and
        began: when that began, see `started`.
    """

    state: State
    server: str = ""
    run: str = ""
    round: int = 0
    last_error: str = ""
    version: str = ""
    since: str = field(default_factory=_now)
    pid: int = field(default_factory=os.getpid)
    began: int = field(default_factory=lambda: started(os.getpid()))

    def now(self, state: State, **changes: Any) -> "Status":  # noqa: ANN401
        """The same process in another state, from this moment on."""
        return replace(self, state=state, since=_now(), **changes)


NOTHING = Status("down", since="", pid=0, began=0)


def write_status(folder: Path, status: Status) -> None:
    """Says it: whole or not at all.

    Args:
        folder: The kit's state folder.
        status: What to say.

    Raises:
        OSError: The disk refuses.
    """
    # It need not outlive a power cut: the process does not.
    content = f"{json.dumps(asdict(status))}\n".encode()
    replace_file(folder / _FILE, content, 0o600, sync=False)


def read_status(folder: Path) -> Status:
    """What the process said last; `down` if it is gone or never was.

    Raises:
        ConfigError: The file cannot be read, or is none.
    """
    path = folder / _FILE
    try:
        said = Status(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return NOTHING
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check its owner") from None
    except (ValueError, TypeError, RecursionError):
        raise ConfigError(f"{path}: is no status; start the site again") from None
    if not _is_plain(said):
        raise ConfigError(f"{path}: is no status; start the site again")
    if said.state == "stopped" or _is_alive(said.pid, said.began):
        return said
    return replace(said, state="down")


def _is_plain(said: Status) -> bool:
    texts = (said.since, said.server, said.run, said.last_error, said.version)
    numbers = (said.round, said.pid, said.began)
    return (
        said.state in get_args(State)
        and all(isinstance(text, str) for text in texts)
        and all(type(number) is int for number in numbers)
    )


def _is_alive(pid: int, began: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's, and there
        pass
    return began == 0 or started(pid) == began
