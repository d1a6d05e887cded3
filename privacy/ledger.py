"""The site's durable ledger: one SQLite file, debited before data is read.

It survives rounds, restarts and runs, and serves several processes at once: each change is one
immediate transaction, synced to the disk before it counts. What the entries mean stands in
`books.py`; this is where they are kept.
"""

import errno
import json
import os
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..config import FedveilError
from ..files import draft_of, publish
from .accounting import events_epsilon
from .books import EMPTY, Books, Entry, Head, Order, canonical, events_of, sealed
from .limits import DamagedError, LedgerError, Lifetime, UnavailableError
from .plan import Side

_APPLICATION = 0x46564C47  # "FVLG", where SQLite says whose file it is
_FORMAT = 1
Journal = Literal["wal", "delete"]
_CLOCK_SLACK = timedelta(minutes=5)  # what a time server may put a clock back by
_LOCK_SECONDS = 30.0
_TABLE = """CREATE TABLE entries (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    time TEXT NOT NULL,
    kind TEXT NOT NULL,
    body TEXT NOT NULL,
    hash TEXT NOT NULL
) STRICT"""


def now() -> datetime:
    """The site's clock."""
    return datetime.now(UTC)


_Proposal = tuple[str, Callable[[Books], dict[str, Any] | None]]


class Ledger:
    """An open ledger, whole and verified. Safe across threads and processes."""

    def __init__(
        self, path: Path, connection: sqlite3.Connection, clock: Callable[[], datetime]
    ) -> None:
        self.path, self._connection, self._clock = path, connection, clock
        self._books, self._lock = Books(), threading.Lock()
        self._process, self._file = os.getpid(), _identity(path)

    @classmethod
    def create(
        cls,
        path: Path,
        site: str,
        *,
        simulated: bool = False,
        journal: Journal = "wal",
        clock: Callable[[], datetime] = now,
    ) -> None:
        """Makes a new ledger: all of it, or nothing; for its arguments see `open`.

        Raises:
            FileExistsError: There is a file already.
            UnavailableError: None can be written.
        """
        draft = draft_of(path)
        body = {"site": site, "simulated": simulated, "format": _FORMAT}
        entry = sealed(EMPTY, _stamp(clock()), "opened", body)
        try:
            with _typed(path):
                if os.path.lexists(path):
                    raise FileExistsError
                for left in (f"{path}-wal", f"{path}-shm", f"{path}-journal"):
                    if os.path.lexists(left):
                        raise UnavailableError(
                            f"{path}: a lost ledger left {left}; put that ledger back, or move "
                            "this file away"
                        )
                os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                _fill(draft, entry, journal)
                publish(draft, path)
        except FileExistsError:
            raise FileExistsError(errno.EEXIST, "is there already", str(path)) from None
        finally:
            with suppress(OSError):
                draft.unlink()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        wait: float = _LOCK_SECONDS,
        read_only: bool = False,
        journal: Journal = "wal",
        clock: Callable[[], datetime] = now,
    ) -> "Ledger":
        """Opens a ledger and verifies all of it.

        Args:
            path: The file; it is never made here, for an empty ledger is a fresh budget.
            wait: Seconds to wait for another process.
            read_only: Whether it is only looked at.
            journal: SQLite's; `delete` where hosts share a network disk, on which `wal` cannot be
                (sqlite.org/wal.html, section 1). Either is synced before a release counts.
            clock: The time; for people, no number rests on it.

        Raises:
            UnavailableError: It is missing, locked or unreadable.
            DamagedError: It is no ledger, or not as it was written.
        """
        with _typed(path):
            if not stat.S_ISREG(path.stat().st_mode):
                raise FileNotFoundError
            connection = sqlite3.connect(
                f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rw'}",
                uri=True,
                timeout=wait,
                isolation_level=None,
                check_same_thread=False,
            )
            # Bytes that are no UTF-8 are damage, which the hashes find; not an error of SQLite's.
            connection.text_factory = partial(str, encoding="utf-8", errors="replace")
            try:
                ledger = cls(path, connection, clock)
                ledger._check_file()
                if not read_only:
                    _keep_journal(connection, journal)
                ledger.read()
            except BaseException:
                connection.close()
                raise
        return ledger

    def close(self) -> None:
        """Lets go of the file."""
        self._connection.close()

    def read(self) -> Books:
        """What the entries add up to, those of other processes included.

        Raises:
            LedgerError: As `open`.
        """
        with self._transaction("BEGIN") as books:
            # A copy: other threads go on with theirs.
            return replace(books, datasets=dict(books.datasets), runs=dict(books.runs))

    def bind(self, dataset_id: str, terms: Mapping[str, Any]) -> None:
        """Fixes what decides on which side of the split a data set's records are.

        Raises:
            TermsError: It was fixed otherwise before.
            LedgerError: As `open`.
        """
        self._add(("dataset", lambda books: books.bind(dataset_id, terms)))

    def reserve(self, asked: Order, lifetime: Lifetime) -> None:
        """Reserves a whole run from all of its accounts; doing it again changes nothing.

        Raises:
            BudgetError: An account would be overdrawn: it says what is spent and what was asked.
            TermsError: The run was reserved on other terms.
            LedgerError: As `open`.
        """
        self._add(("reserve", lambda books: books.reserve(asked, lifetime)))

    def debit(
        self,
        asked: Order,
        lifetime: Lifetime,
        split: Mapping[str, Any],
        releases: Sequence[tuple[str, int]],
    ) -> Head:
        """`bind`, `reserve` and `commit` at once: all of it or, if any is refused, nothing.

        Formal guarantee: as of `commit`.

        Args:
            asked: The run.
            lifetime: The limits of its accounts.
            split: See `bind`.
            releases: See `commit`.

        Returns:
            The head with these releases.

        Raises:
            LedgerError: As the three.
        """
        return self._add(
            ("dataset", lambda books: books.bind(asked.dataset_id, split)),
            ("reserve", lambda books: books.reserve(asked, lifetime)),
            *_commits(asked.run_id, releases),
        )

    def commit(self, run_id: str, releases: Sequence[tuple[str, int]]) -> Head:
        """Commits releases, each a part's name and an index, durably and all or none.

        Formal guarantee: when this returns, no restart and no other process will admit an index of
        that part again, this one included; so that what is released afterwards is at most what was
        reserved. It assumes that the disk keeps what it has synced and that the file is not put
        back (`check_head` notices).

        Raises:
            BudgetError: A release was made already, or was never reserved.
            LedgerError: As `open`.
        """
        return self._add(*_commits(run_id, releases))

    def end(self, run_id: str) -> None:
        """Ends a run at this site; no more of it will be admitted.

        Raises:
            BudgetError: There is no such run.
            LedgerError: As `open`.
        """
        self._add(("close", lambda books: books.close(run_id)))

    def check_head(self, known: Head) -> None:
        """Holds the ledger against a head that is known elsewhere.

        Raises:
            DamagedError: This is an older copy, or another ledger.
            LedgerError: As `open`.
        """
        with self._transaction("BEGIN") as books:
            if known == EMPTY:
                return
            if known.number > books.head.number:
                raise DamagedError(
                    f"{self.path}: has {books.head.number} entries, {known.number} are known "
                    "elsewhere; an older copy was put in its place, put the newest back"
                )
            found = self._connection.execute(
                "SELECT hash FROM entries WHERE sequence = ?", (max(known.number, 0),)
            ).fetchone()
            if found is None or found[0] != known.hash:
                raise DamagedError(
                    f"{self.path}: entry {known.number} is another than is known elsewhere; it was "
                    "rewritten, put a whole copy back"
                )

    def _add(self, *proposals: _Proposal) -> Head:
        """Appends what is proposed, each against the books as they are by then; all or none."""
        with self._transaction("BEGIN IMMEDIATE") as books:
            for kind, propose in proposals:
                body = propose(books)
                if body is not None:
                    entry = sealed(books.head, self._time(), kind, body)
                    _insert(self._connection, entry)
                    books.apply(entry)
            self._connection.execute("COMMIT")
            return books.head

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Books]:
        """The latest books, all from one moment; what is not committed is undone."""
        if os.getpid() != self._process:
            raise UnavailableError(f"{self.path}: is open in another process; open it anew here")
        with self._lock, _typed(self.path):
            if _identity(self.path) != self._file:
                raise UnavailableError(
                    f"{self.path}: another file was put in its place; open it anew"
                )
            before = self._books.head
            try:
                self._connection.execute(begin)
                self._catch_up()
                before = self._books.head
                yield self._books
            except BaseException as error:
                # Ahead of the file, or cut off in the middle of an entry: they are read anew.
                if self._books.head != before or not isinstance(error, LedgerError):
                    self._books = Books()
                raise
            finally:
                with suppress(sqlite3.Error):
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")

    def _catch_up(self) -> None:
        """Takes in the entries that came since the last look."""
        head = self._books.head
        rows = self._connection.execute(
            "SELECT sequence, time, kind, body, hash FROM entries WHERE sequence >= ? "
            "ORDER BY sequence",
            (head.number,),
        ).fetchall()
        if head != EMPTY:
            if not rows or (rows[0][0], rows[0][4]) != head:
                raise DamagedError(
                    f"{self.path}: entry {head.number} has changed since it was read; the file was "
                    "edited or put back, put a whole copy back"
                )
            rows = rows[1:]
        for row in rows:
            try:
                self._books.apply(_entry(*row))
            except DamagedError as error:
                raise DamagedError(f"{self.path}: {error}; put a whole copy back") from None
        self._check_tail()

    def _check_tail(self) -> None:
        # SQLite remembers the highest number that it ever gave out, deleted ones included.
        given = self._connection.execute(
            "SELECT seq FROM sqlite_sequence WHERE name = 'entries'"
        ).fetchone()
        if given is None or given[0] != self._books.head.number:
            raise DamagedError(
                f"{self.path}: holds {self._books.head.number} entries, "
                f"{given[0] if given else 'none'} were given out; the last ones were removed, put "
                "a whole copy back"
            )

    def _check_file(self) -> None:
        application = self._connection.execute("PRAGMA application_id").fetchone()[0]
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if application != _APPLICATION:
            raise DamagedError(
                f"{self.path}: is no ledger; it was emptied, or is another file, put it back"
            )
        if version != _FORMAT:
            raise UnavailableError(
                f"{self.path}: is of format {version}, this reads {_FORMAT}; update fedveil"
            )
        found = self._connection.execute("PRAGMA quick_check").fetchone()[0]
        if found != "ok":
            text = " ".join(str(found).split())
            raise DamagedError(f"{self.path}: SQLite finds {text}; put a whole copy back")
        # No other table, index, trigger or looser column: each could give a row another meaning.
        objects = self._connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name")
        if [tuple(row) for row in objects] != [
            ("entries", _TABLE), ("sqlite_sequence", "CREATE TABLE sqlite_sequence(name,seq)"),
        ]:  # fmt: skip
            raise DamagedError(f"{self.path}: its tables were altered; put a whole copy back")

    def _time(self) -> str:
        moment = self._clock()
        last = datetime.fromisoformat(self._books.time) if self._books.time else moment
        if moment < last - _CLOCK_SLACK:
            raise UnavailableError(
                f"{self.path}: the clock says {_stamp(moment)}, its last entry {self._books.time}; "
                "set the clock, or see whether the machine was put back to an older state"
            )
        return _stamp(max(moment, last))


@dataclass(frozen=True)
class Verdict:
    """What a verification found; a fault raises instead.

    Attributes:
        head: Which ledger it was.
        books: What its entries add up to.
        prices: Epsilon stated and recomputed, by run and side; `None` without noise.
    """

    head: Head
    books: Books
    prices: Mapping[tuple[str, Side], tuple[float | None, float | None]]


def verify(path: Path, known: Head = EMPTY) -> Verdict:
    """Verifies a ledger: its file, every entry, a head known elsewhere, every price.

    Raises:
        DamagedError: Any of these does not hold.
        UnavailableError: It cannot be read.
    """
    ledger = Ledger.open(path, read_only=True)
    try:
        ledger.check_head(known)
        books = ledger.read()
        return Verdict(books.head, books, _recomputed(books, path))
    finally:
        ledger.close()


def _recomputed(
    books: Books, path: Path
) -> dict[tuple[str, Side], tuple[float | None, float | None]]:
    """Each reservation's price by its events alone."""
    prices = {}
    for run_id, run in books.runs.items():
        for charge in run.reservation.charges:
            stated = charge.epsilon
            try:
                real = events_epsilon(events_of(charge), charge.delta, stated or 10.0)
            except (FedveilError, ArithmeticError, TypeError, ValueError) as error:
                raise DamagedError(
                    f"{path}: run {run_id}, {charge.side}: nobody can price it: {error}; put a "
                    "whole copy back"
                ) from None
            # Two ways to compute one bound, on grids that need not be the same: 1 % is known.
            if stated is not None and (real is None or real > stated * 1.01):
                raise DamagedError(
                    f"{path}: run {run_id}, {charge.side}: epsilon {stated} is stated, its "
                    f"releases cost {real}; put a whole copy back"
                )
            prices[run_id, charge.side] = (stated, real)
    return prices


@contextmanager
def _typed(path: Path) -> Iterator[None]:
    """Turns what SQLite and the system raise into errors of ours."""
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.ProgrammingError) as error:
        if "no such" in str(error):
            raise DamagedError(f"{path}: {error}; put a whole copy back") from None
        raise UnavailableError(f"{path}: {error}; {_mend(str(error))}") from None
    except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite's own texts quote the file
        raise DamagedError(f"{path}: {error}; put a whole copy back") from None
    except FileNotFoundError:
        raise UnavailableError(
            f"{path}: is missing; put the ledger back, for a new one would forget what is spent"
        ) from None
    except FileExistsError:
        raise
    except OSError as error:
        raise UnavailableError(f"{path}: {error.strerror}; check the path and the disk") from None


def _mend(text: str) -> str:
    if "locked" in text:
        return "another process holds it; wait, or stop that one"
    return "check the disk and the permissions of the file and its folder"


def _identity(path: Path) -> tuple[int, int]:
    """Which file a name stands for."""
    found = path.stat()
    return found.st_dev, found.st_ino


def _keep_journal(connection: sqlite3.Connection, journal: Journal) -> None:
    """The journal asked for, which other tools may have changed; a sync before anything counts."""
    if connection.execute("PRAGMA journal_mode").fetchone()[0] != journal:
        kept = connection.execute(f"PRAGMA journal_mode = {journal}").fetchone()[0]
        if kept != journal:
            asked = journal.upper()
            raise sqlite3.OperationalError(f"the disk keeps the journal as {kept}, not as {asked}")
    # A rollback journal is committed by its removal: EXTRA syncs that too (sqlite.org/pragma.html).
    connection.execute(f"PRAGMA synchronous = {'FULL' if journal == 'wal' else 'EXTRA'}")


def _commits(run_id: str, releases: Sequence[tuple[str, int]]) -> list[_Proposal]:
    return [
        ("commit", partial(Books.commit, run_id=run_id, part=part, index=index))
        for part, index in releases
    ]


def _fill(draft: Path, entry: Entry, journal: Journal) -> None:
    """A whole new ledger with its first entry."""
    connection = sqlite3.connect(draft, isolation_level=None)
    try:
        _keep_journal(connection, journal)
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute(f"PRAGMA user_version = {_FORMAT}")
        connection.execute("BEGIN")
        connection.execute(_TABLE)
        _insert(connection, entry)
        connection.execute("COMMIT")
    finally:
        connection.close()


def _insert(connection: sqlite3.Connection, entry: Entry) -> None:
    connection.execute(
        "INSERT INTO entries VALUES (?, ?, ?, ?, ?)",
        (entry.sequence, entry.time, entry.kind, canonical(entry.body), entry.hash),
    )


def _entry(sequence: int, time: str, kind: str, body: str, digest: str) -> Entry:
    """An entry as it stands in the file: its body in the one form that we write."""
    try:
        values = json.loads(body)
        if not isinstance(values, dict) or canonical(values) != body:
            raise DamagedError(f"entry {sequence}: is not as it was written")
    except (TypeError, ValueError, RecursionError):
        raise DamagedError(f"entry {sequence}: its body is no JSON object") from None
    return Entry(sequence, time, kind, values, digest)


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")
