"""What everybody asked of the server: one line an entry, each bound to the one before by its hash.

Entry n holds the hash of entry n - 1, and its own hash is over all of its other fields. So nobody
changes, removes, inserts or reorders entries without breaking the chain, but whoever may write the
file can write all of it anew, or cut off its end. What shows that is a receipt (an entry's number
and hash), which everybody gets who submits a run, and keeps.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from ..config import ConfigError, FedveilError

GENESIS = "0" * 64
"""What the first entry has as the hash of the one before."""
_RECEIPT = re.compile(r"([1-9][0-9]{0,17}):([0-9a-f]{64})", re.ASCII)
_LONGEST = 2000
"""Characters of any field: a line stays readable whatever a caller sends."""
_TAIL = 1 << 17
"""Bytes that hold any whole last line."""


@dataclass(frozen=True)
class Entry:
    """One call.

    Attributes:
        number: From 1.
        time: When, in ISO form (UTC).
        member: Who called; of one who is in no roster, the certificate's SHA-256.
        role: Of the member; empty for one who is none.
        call: What for.
        about: A run, or a digest of what was sent.
        outcome: What became of it.
        previous: Hash of the entry before.
        hash: SHA-256 of all that stands above.
    """

    number: int
    time: str
    member: str
    role: str
    call: str
    about: str
    outcome: str
    previous: str
    hash: str


@dataclass(frozen=True)
class Verified:
    """A whole chain.

    Attributes:
        count: Its entries.
        head: Hash of the last.
        torn: Bytes after them of a line that was cut off by a crash; the next entry will tell.
    """

    count: int
    head: str
    torn: int


class AuditLog:
    """The log in a file; several processes may add to it."""

    def __init__(self, path: Path) -> None:
        """Checks what is there.

        Raises:
            FedveilError: It is broken: it must be looked into, and is not added to.
        """
        self._path = path
        if path.exists():
            verify(path)

    def append(self, member: str, role: str, call: str, about: str, outcome: str) -> Entry:
        """Adds an entry, durably.

        Raises:
            FedveilError: The disk refuses, or what is there is no such log.
        """
        told = (member, role, call, about, outcome)
        try:
            with self._path.open("ab+", buffering=0) as opened:
                fcntl.flock(opened, fcntl.LOCK_EX)
                number, head = self._end(opened)
                return _add(opened, number, head, told)
        except OSError as error:
            raise FedveilError(f"{self._path}: cannot be written ({error.strerror})") from None

    def _end(self, opened: IO[bytes]) -> tuple[int, str]:
        """Number and hash of the last entry; a torn line goes, and an entry says so."""
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - _TAIL))
        whole, newline, torn = opened.read().rpartition(b"\n")
        number, head = 0, GENESIS
        if newline:
            last = _parse(whole.rpartition(b"\n")[2])
            if last is None:
                raise FedveilError(
                    f"{self._path}: its last line is no entry; look into it, and move it away"
                )
            number, head = last.number, last.hash
        elif size > _TAIL:
            raise FedveilError(f"{self._path}: is no audit log; look into it, and move it away")
        if torn:
            opened.truncate(size - len(torn))
            why = f"removed {len(torn)} bytes of an entry that was never whole"
            healed = _add(opened, number, head, ("server", "", "log", "", why))
            number, head = healed.number, healed.hash
        return number, head


def verify(path: Path, receipt: tuple[int, str] | None = None) -> Verified:
    """Recomputes the whole chain.

    Args:
        path: The log.
        receipt: Number and hash of an entry that is known elsewhere.

    Raises:
        ConfigError: There is no such file.
        FedveilError: By the first line that breaks the chain; or the receipt is of no entry in it.
    """
    count, head, known = 0, GENESIS, receipt is None
    whole, torn = _lines(path)
    for number, line in enumerate(whole, start=1):
        entry = _parse(line)
        if entry is None:
            raise FedveilError(f"{path}, line {number}: is no entry, or was changed")
        if (entry.number, entry.previous) != (number, head):
            raise FedveilError(
                f"{path}, line {number}: does not follow the line before; lines were removed, "
                "inserted or moved"
            )
        count, head = number, entry.hash
        known = known or receipt == (count, head)
    if receipt is not None and not known:
        raise FedveilError(
            f"{path}: entry {receipt[0]} of the receipt is not in it; the log was cut off or "
            "written anew"
        )
    return Verified(count, head, len(torn))


def parse_receipt(text: str) -> tuple[int, str]:
    """Reads ENTRY:HASH.

    Raises:
        ConfigError: It is none.
    """
    found = _RECEIPT.fullmatch(text)
    if found is None:
        raise ConfigError(f"--receipt {text}: must be ENTRY:HASH, such as 7:1f3c... (64 digits)")
    return int(found[1]), found[2]


def entries(path: Path) -> Iterator[Entry]:
    """The entries of a log that was verified."""
    for line in _lines(path)[0]:
        entry = _parse(line)
        if entry is not None:
            yield entry


def _lines(path: Path) -> tuple[list[bytes], bytes]:
    try:
        *whole, torn = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return whole, torn


def _add(opened: IO[bytes], number: int, previous: str, told: tuple[str, ...]) -> Entry:
    member, role, call, about, outcome = (text[:_LONGEST] for text in told)
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    entry = Entry(number + 1, now, member, role, call, about, outcome, previous, "")
    entry = Entry(**{**asdict(entry), "hash": _hash(entry)})
    line = _line(entry) + b"\n"
    if opened.write(line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(opened.fileno())
    return entry


def _parse(line: bytes) -> Entry | None:
    """A line as an entry; `None` unless every byte of it is as `_add` wrote it."""
    try:
        entry = Entry(**json.loads(line))
        whole = _line(entry) == line and entry.hash == _hash(entry) and type(entry.number) is int
    except (TypeError, ValueError, RecursionError):
        return None
    return entry if whole else None


def _hash(entry: Entry) -> str:
    values = asdict(entry)
    del values["hash"]
    return hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()


def _line(entry: Entry) -> bytes:
    return json.dumps(asdict(entry), separators=(",", ":")).encode()
