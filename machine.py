"""Facts of the machine that this process runs on, a container's limits before the host's."""

import ctypes
import fcntl
import json
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from .files import replace_file

_PATIENCE = 30.0  # seconds for a process that loads packages; 4 are usual
_TIMEX_BYTES = 512  # above any system's struct timex
_GROUPS = Path("/sys/fs/cgroup")


def read(path: Path | str) -> str:
    """A file's text, stripped; empty where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def cores() -> int:
    """How many cores this process may keep busy: of those it may run on, a container's share."""
    usable, allowed = len(os.sched_getaffinity(0)), cores_allowed()
    return usable if allowed is None else max(1, min(usable, round(allowed)))


def cores_allowed(groups: Path = _GROUPS, membership: str | None = None) -> float | None:
    """The cores that the process's control groups allow it; `None` is no limit.

    Args:
        groups: Where control groups stand.
        membership: The lines of /proc/self/cgroup.
    """
    quotas = []
    for place in _own_groups(groups, "cpu", membership):
        if both := read(place / "cpu.max").split():
            quotas.append((both[0], both[-1]))
        quotas.append((read(place / "cpu.cfs_quota_us"), read(place / "cpu.cfs_period_us")))
    return min((int(q) / int(p) for q, p in quotas if q.isdigit() and p.isdigit()), default=None)


def memory_available(
    groups: Path = _GROUPS, membership: str | None = None, host: str | None = None
) -> int:
    """Bytes that the process may still take: of the host's, and of each control group's limit.

    Args:
        groups: Where control groups stand.
        membership: The lines of /proc/self/cgroup.
        host: The lines of /proc/meminfo.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", host or read("/proc/meminfo"), re.MULTILINE)
    free = [int(found[1]) * 1024] if found else []
    for place in _own_groups(groups, "memory", membership):
        for limit, used in _MEMORY_FILES:
            if (top := read(place / limit)).isdigit() and (taken := read(place / used)).isdigit():
                free.append(max(0, int(top) - int(taken) + _cache(place)))
    if not free:
        raise OSError("neither /proc/meminfo nor a control group tells")
    return min(free)


_MEMORY_FILES = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def _cache(place: Path) -> int:
    """What the kernel gives back when asked: files that it keeps at hand count as used."""
    found = re.search(r"^(?:total_)?inactive_file (\d+)", read(place / "memory.stat"), re.MULTILINE)
    return int(found[1]) if found else 0


def _own_groups(groups: Path, controller: str, membership: str | None) -> Iterator[Path]:
    """The folders of the groups that hold this process: each version's, and all above each."""
    lines = membership if membership is not None else read("/proc/self/cgroup")
    for line in lines.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # In a container the path may be the host's; then the top is the container's own group.
        top = groups / controller if controllers else groups
        inner = PurePosixPath(path.lstrip("/"))
        yield from (top / part for part in (inner, *inner.parents))


_NETWORKS = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "fuse.sshfs",
    "ceph",
    "glusterfs",
    "lustre",
}


def on_network(place: Path) -> bool:
    """Whether a folder (or where it is to be) is on a disk that other machines share."""
    there = next(path for path in (place, *place.resolve().parents) if path.exists())
    return is_network(file_system(there, read("/proc/self/mountinfo")))


def is_network(kind: str) -> bool:
    """Whether a kind of file system is one over a network."""
    return kind in _NETWORKS


def file_system(place: Path, mounts: str) -> str:
    """The kind of the mount that a folder is on, by the lines of /proc/self/mountinfo."""
    kinds = {}
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), before.split()[4])
        kinds[Path(point)] = after.split()[0]  # the last one on a point hides the others
    place = place.resolve()
    return next((kinds[p] for p in (place, *place.parents) if p in kinds), "")


def _syncs(place: Path) -> None:
    for content in (b"first", b"second"):
        replace_file(place / "synced", content)
    if (place / "synced").read_bytes() != b"second":
        raise OSError("what was written cannot be read back")


def _links(place: Path) -> None:
    """A ledger gets its name by a link, because that replaces nothing."""
    for name in ("draft", "other"):
        (place / name).write_bytes(name.encode())
    os.link(place / "draft", place / "linked")
    with suppress(FileExistsError):
        os.link(place / "other", place / "linked")
        raise OSError("a link replaces another file")
    if not (place / "draft").samefile(place / "linked"):
        raise OSError("a link is a copy")


def _locks(place: Path) -> None:
    with (place / "lock").open("w") as ours, (place / "lock").open("w") as another:
        fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(BlockingIOError):
            fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise OSError("two hold one lock")


def _journals(place: Path) -> None:
    def connect() -> "closing[sqlite3.Connection]":
        return closing(sqlite3.connect(place / "ledger", timeout=0, isolation_level=None))

    with connect() as ours, connect() as another:
        if (kept := ours.execute("PRAGMA journal_mode = WAL").fetchone()[0]) != "wal":
            raise sqlite3.OperationalError(f"the journal is kept as {kept}, not as WAL")
        ours.execute("PRAGMA synchronous = FULL")
        ours.execute("CREATE TABLE entries (sequence INTEGER)")
        ours.execute("BEGIN IMMEDIATE")
        with suppress(sqlite3.OperationalError):
            another.execute("BEGIN IMMEDIATE")
            raise OSError("two write at once")
        ours.execute("INSERT INTO entries VALUES (1)")
        ours.execute("COMMIT")
        if another.execute("SELECT sequence FROM entries").fetchall() != [(1,)]:
            raise OSError("another connection does not see what was committed")


TRIALS: dict[str, Callable[[Path], None]] = {
    "fsync": _syncs,
    "hard links": _links,
    "file locks": _locks,
    "SQLite WAL": _journals,
}
"""What ledgers and run folders rest on, to be tried in a folder; each raises what is amiss."""


def clock_state() -> int | None:
    """What the kernel says of its clock: 5 is kept by no time server; `None`: it says nothing."""
    try:
        state = int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES)))
    except (OSError, AttributeError):
        return None
    return state if state >= 0 else None


@contextmanager
def child(code: str) -> "Iterator[subprocess.Popen[str] | str]":
    """A Python process that runs `code` meanwhile, and is gone afterwards; or why there is none."""
    # -P: in a folder with modules of its own, such as ours, `import` must not find those.
    command = [sys.executable, "-P", "-c", code]
    pipe = subprocess.PIPE
    try:
        started = subprocess.Popen(  # noqa: S603  our own code
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )
    except OSError as error:
        yield f"no process can be started ({error.strerror})"
        return
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def answer(
    started: "subprocess.Popen[str] | str", patience: float = _PATIENCE
) -> dict[str, Any] | str:
    """The JSON object that a process prints last, or why there is none, on one line."""
    if isinstance(started, str):
        return started
    try:
        out, err = started.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        return f"no answer in {patience:g} s"
    if started.returncode < 0:
        return f"killed by signal {-started.returncode}"
    try:
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        return (err.strip().splitlines() or ["it printed nothing"])[-1][:200]
    return found
