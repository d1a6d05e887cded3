"""The ledger's file: what is committed stays, what was tampered with is noticed, and how it fails.

What a ledger cannot notice by itself is tested as such: a copy that was put back, a write-ahead log
that was cut, a chain that was rewritten as a whole. They are noticed where its head is known.
"""

import inspect
import json
import multiprocessing
import os
import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta, timezone
from fractions import Fraction
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from shutil import copy
from typing import Any, NamedTuple

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fedveil.privacy import books as books_module
from fedveil.privacy.accounting import Releases, event_to_plain, filter_epsilon
from fedveil.privacy.books import EMPTY, Books, Charge, Head, Order, RunBook, canonical, sealed
from fedveil.privacy.ledger import Ledger, verify
from fedveil.privacy.limits import (
    BudgetError,
    DamagedError,
    LedgerError,
    Lifetime,
    TermsError,
    UnavailableError,
)
from fedveil.privacy.plan import Part, Side

FREE = Lifetime(None, 0.5)
LIMIT = Lifetime(0.3, 3e-6)
NOON = datetime(2025, 3, 1, 12, tzinfo=UTC)
MEND = r"put |wait|set the clock|check the|update|begin"
"""What every error ends with: what to do."""


def asked(
    run_id: str = "a",
    epsilon: float | None = 0.1,
    count: int = 3,
    *,
    side: Side = "training",
    noise: float = 100.0,
    delta: float = 1e-6,
    dataset_id: str = "heart",
) -> Order:
    """A run of a few releases, each far cheaper than is stated."""
    part = Part("rounds", side, Releases(noise, 1.0, 1), count)
    return Order(run_id, "t", dataset_id, "record", (Charge(side, epsilon, delta, (part,)),))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A new ledger."""
    file = tmp_path / "site.sqlite"
    Ledger.create(file, "st-mary")
    return file


@pytest.fixture
def used(path: Path) -> Path:
    """A ledger of eight entries that was closed in order."""
    with closing(Ledger.open(path)) as ledger:
        ledger.bind("heart", {"holdout": 0.1})
        ledger.reserve(asked(), FREE)
        for index in (1, 2, 3):
            ledger.commit("a", [("rounds", index)])
        ledger.reserve(asked("b", 0.2, 5), FREE)
        ledger.commit("b", [("rounds", 1)])
    return path


@contextmanager
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    """Somebody's own connection to the file; what was changed is kept."""
    with closing(sqlite3.connect(path)) as connection:
        yield connection
        connection.commit()


class Row(NamedTuple):
    """An entry as it stands in the file."""

    sequence: int
    time: str
    kind: str
    body: str
    hash: str


def rows(path: Path) -> list[Row]:
    """All entries, read without any code of ours."""
    with raw(path) as connection:
        found = connection.execute("SELECT * FROM entries ORDER BY sequence").fetchall()
    return [Row(*row) for row in found]


def head(path: Path) -> Head:
    """What a server would know of it."""
    last = rows(path)[-1]
    return Head(last.sequence, last.hash)


def fresh(path: Path) -> Books:
    """The books as the file alone gives them."""
    with closing(Ledger.open(path, read_only=True)) as ledger:
        return ledger.read()


def serves(path: Path) -> None:
    """A ledger that is sound takes a new run and its releases."""
    with closing(Ledger.open(path)) as ledger:
        before = ledger.read().head.number
        ledger.reserve(asked("after"), Lifetime(None, 0.5))
        assert ledger.commit("after", [("rounds", 1)]).number == before + 2
    verify(path)


def rewritten(path: Path, change: Callable[[str, dict[str, Any]], None]) -> None:
    """Changes bodies and seals every entry anew, as whoever knows this code can."""
    sound, known = rows(path), EMPTY
    with raw(path) as connection:
        for row in sound:
            body = json.loads(row.body)
            change(row.kind, body)
            entry = sealed(known, row.time, row.kind, body)
            known = Head(entry.sequence, entry.hash)
            connection.execute(
                "UPDATE entries SET body = ?, hash = ? WHERE sequence = ?",
                (canonical(body), entry.hash, entry.sequence),
            )


def names(folder: Path) -> list[str]:
    """The files in a folder, but for those that SQLite keeps beside an open ledger."""
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(("-wal", "-shm")))


def is_of_one_line(error: LedgerError | None, path: Path) -> bool:
    """And names the file."""
    return error is not None and "\n" not in str(error) and str(path) in str(error)


def refusal(call: Callable[[], object]) -> LedgerError | None:
    """What a call was refused with, if it was."""
    try:
        call()
    except LedgerError as error:
        return error
    return None


class TestLife:
    def test_a_new_ledger_holds_who_opened_it(self, path: Path) -> None:
        books = fresh(path)
        assert books.opened == {"site": "st-mary", "simulated": False, "format": 1}
        assert (books.head.number, books.runs, books.datasets) == (1, {}, {})

    def test_it_survives_restarts(self, used: Path) -> None:
        before = fresh(used)
        with closing(Ledger.open(used)) as ledger:
            assert ledger.read() == before
            with pytest.raises(BudgetError, match="release 3 asked, 3 of 3 are used up"):
                ledger.commit("a", [("rounds", 3)])
            assert ledger.commit("b", [("rounds", 2)]).number == 9
        assert fresh(used).runs["b"].last == {"rounds": 2}

    def test_what_is_committed_is_seen_at_once_and_is_the_head_that_is_returned(
        self, used: Path
    ) -> None:
        with closing(Ledger.open(used)) as ledger:
            known = ledger.commit("b", [("rounds", 2)])
            assert head(used) == known
            assert json.loads(rows(used)[-1].body) == {
                "run_id": "b",
                "part": "rounds",
                "index": 2,
                "event": event_to_plain(Releases(100.0, 1.0, 1).event),
            }

    def test_each_commit_reaches_the_disk(self, used: Path) -> None:
        """As SQLite documents it: in WAL mode FULL syncs the log after each transaction."""
        with closing(Ledger.open(used)) as ledger:
            ask = ledger._connection.execute
            assert ask("PRAGMA journal_mode").fetchone() == ("wal",)
            assert ask("PRAGMA synchronous").fetchone() == (2,)

    def test_so_it_does_where_hosts_share_a_network_disk(self, tmp_path: Path) -> None:
        """A rollback journal's removal is synced by EXTRA; no memory is shared between hosts."""
        path = tmp_path / "shared.sqlite"
        Ledger.create(path, "site-001", simulated=True, journal="delete")
        with closing(Ledger.open(path, journal="delete")) as ledger:
            ask = ledger._connection.execute
            assert ask("PRAGMA journal_mode").fetchone() == ("delete",)
            assert ask("PRAGMA synchronous").fetchone() == (3,)
            ledger.reserve(asked(), FREE)
            assert [f.name for f in tmp_path.iterdir()] == [path.name]
            with closing(Ledger.open(path, journal="delete")) as other:
                assert other.read() == ledger.read()
        assert verify(path).books.head.number == 2

    def test_a_ledger_whose_journal_was_changed_is_changed_back_or_refused(
        self, used: Path
    ) -> None:
        """As tools do that copy or compact a file."""
        sql("PRAGMA journal_mode = DELETE")(used)
        try:
            ledger = Ledger.open(used)
        except LedgerError as refused:
            assert str(used) in str(refused)  # noqa: PT017  either will do
        else:
            with closing(ledger):
                assert ledger._connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)

    @pytest.mark.parametrize("journal", ["WAL", "DELETE"])
    def test_a_disk_that_cannot_have_it_so_is_refused(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, journal: str
    ) -> None:
        """Without shared memory, as on some network disks, SQLite keeps its old journal and says
        so; a commit in that journal is not surely on the disk when it returns."""
        sql(f"PRAGMA journal_mode = {journal}")(path)
        connect_as(monkeypatch, lambda uri: f"{uri}&vfs=unix-dotfile")
        with pytest.raises(UnavailableError) as refused:
            Ledger.open(path)
        assert is_of_one_line(refused.value, path)

    def test_several_releases_are_committed_together_or_not_at_all(self, used: Path) -> None:
        with closing(Ledger.open(used)) as ledger:
            before = rows(used)
            for releases in (
                [("rounds", 2), ("rounds", 2)],
                [("rounds", 3), ("rounds", 2)],
                [("rounds", 2), ("rounds", 6)],
                [("rounds", 2), ("evaluations", 1)],
            ):
                with pytest.raises(BudgetError):
                    ledger.commit("b", releases)
                assert rows(used) == before
                assert ledger.read() == fresh(used)
            # Two releases are two entries, and their indices rise.
            assert ledger.commit("b", [("rounds", 2), ("rounds", 4)]).number == 10
            assert ledger.read().runs["b"].made == {"rounds": 3}
            assert ledger.commit("b", []).number == 10

    def test_a_debit_binds_reserves_and_commits_or_does_nothing(self, path: Path) -> None:
        split = {"holdout": 0.1}
        with closing(Ledger.open(path)) as ledger:
            refused: list[tuple[Order, list[tuple[str, int]]]] = [
                (asked(), [("rounds", 4)]),
                (asked(), [("rounds", 1), ("rounds", 1)]),
                (asked(), [("evaluations", 1)]),
                (asked(epsilon=0.4), [("rounds", 1)]),
            ]
            for order, releases in refused:
                with pytest.raises(BudgetError):
                    ledger.debit(order, LIMIT, split, releases)
                assert head(path).number == 1
                assert ledger.read() == fresh(path)
            assert ledger.debit(asked(), LIMIT, split, [("rounds", 1)]).number == 4
            assert [row.kind for row in rows(path)[1:]] == ["dataset", "reserve", "commit"]
            # From then on it is one entry a release.
            assert ledger.debit(asked(), LIMIT, split, [("rounds", 2)]).number == 5
            with pytest.raises(TermsError, match="may never change its side"):
                ledger.debit(asked(), LIMIT, {"holdout": 0.2}, [("rounds", 3)])
            with pytest.raises(TermsError, match="reserved on other terms"):
                ledger.debit(asked(epsilon=0.2), LIMIT, split, [("rounds", 3)])
            assert head(path).number == 5
        serves(path)

    def test_what_is_done_already_adds_no_entry(self, used: Path) -> None:
        with closing(Ledger.open(used)) as ledger:
            ledger.reserve(asked(), FREE)
            ledger.bind("heart", {"holdout": 0.1})
            assert ledger.read().head.number == 8

    def test_an_ended_run(self, used: Path) -> None:
        with closing(Ledger.open(used)) as ledger:
            ledger.end("b")
            with pytest.raises(BudgetError, match="run b: is closed"):
                ledger.commit("b", [("rounds", 2)])
            with pytest.raises(BudgetError, match="run c: has reserved nothing"):
                ledger.end("c")
        assert fresh(used).runs["b"].closed
        serves(used)

    def test_what_was_read_is_not_changed_by_what_comes_after(self, used: Path) -> None:
        """A thread may look at books while another one commits."""
        with closing(Ledger.open(used)) as ledger:
            books = ledger.read()
            ledger.reserve(asked("c"), FREE)
            assert (books.head.number, sorted(books.runs)) == (8, ["a", "b"])

    @pytest.mark.parametrize("name", ["a b", "50%25?mode=memory", "#1", "é", "--x", "a'b"])
    def test_any_name_will_do(self, tmp_path: Path, name: str) -> None:
        file = tmp_path / name / f"{name}.sqlite"
        file.parent.mkdir()
        Ledger.create(file, "st-mary")
        serves(file)
        assert names(file.parent) == [file.name]

    def test_after_it_was_closed_it_says_so(self, used: Path) -> None:
        ledger = Ledger.open(used)
        ledger.close()
        for call in (ledger.read, lambda: ledger.commit("b", [("rounds", 2)])):
            with pytest.raises(UnavailableError) as refused:
                call()
            assert is_of_one_line(refused.value, used)
        serves(used)


class TestBudget:
    def test_exactly_used_up_and_no_more(self, path: Path) -> None:
        with closing(Ledger.open(path)) as ledger:
            for run_id in "abc":
                ledger.reserve(asked(run_id), LIMIT)
            before, books = rows(path), ledger.read()
            for order in (asked("d", 1e-9), asked("d", 1e-9, delta=1e-15)):
                with pytest.raises(
                    BudgetError, match=r"heart/record/training: epsilon 0\.3 of 0\.3"
                ):
                    ledger.reserve(order, LIMIT)
            assert rows(path) == before
            assert ledger.read() == books == fresh(path)
            # Nor after a restart; and the reserved runs go on.
        with closing(Ledger.open(path)) as ledger:
            with pytest.raises(BudgetError):
                ledger.reserve(asked("d", 1e-9), LIMIT)
            for run_id in "abc":
                for index in (1, 2, 3):
                    ledger.commit(run_id, [("rounds", index)])
                with pytest.raises(BudgetError):
                    ledger.commit(run_id, [("rounds", 4)])
        assert fresh(path).statements()[0].epsilon == 0.3

    def test_so_is_it_for_delta(self, path: Path) -> None:
        with closing(Ledger.open(path)) as ledger:
            for run_id in "abc":
                ledger.reserve(asked(run_id), Lifetime(9.0, 3e-6))
            with pytest.raises(BudgetError, match="delta 3e-06 of 3e-06 is spent"):
                ledger.reserve(asked("d", delta=1e-15), Lifetime(9.0, 3e-6))
        assert fresh(path).statements()[0].delta == 3e-6

    def test_refusals_leave_the_ledger_as_it_was(self, used: Path) -> None:
        with closing(Ledger.open(used)) as ledger:
            before, books = rows(used), ledger.read()
            calls: list[Callable[[], object]] = [
                lambda: ledger.reserve(asked("c", 0.5), LIMIT),
                lambda: ledger.reserve(asked("a", 0.2), FREE),
                lambda: ledger.reserve(asked("c"), Lifetime(9.0, 1e-3, "rdp")),
                lambda: ledger.commit("b", [("rounds", 1)]),
                lambda: ledger.commit("c", [("rounds", 1)]),
                lambda: ledger.bind("heart", {"holdout": 0.2}),
                lambda: ledger.end("c"),
            ]
            for call in calls:
                with pytest.raises((BudgetError, TermsError)):
                    call()
                assert rows(used) == before
                assert ledger.read() == books == fresh(used)
        serves(used)


class TestCreate:
    def test_only_the_owner_may_read_it(self, path: Path) -> None:
        """Its journal too: SQLite gives its own files the mode of the ledger's."""
        with closing(Ledger.open(path)) as ledger:
            ledger.reserve(asked(), FREE)
            files = sorted(path.parent.iterdir())
            assert [f.name for f in files] == [path.name, f"{path.name}-shm", f"{path.name}-wal"]
            assert {f.stat().st_mode & 0o777 for f in files} == {0o600}

    @pytest.mark.parametrize("mask", [0o000, 0o022])
    def test_whatever_the_mask_says(self, tmp_path: Path, mask: int) -> None:
        before = os.umask(mask)
        try:
            Ledger.create(tmp_path / "a.sqlite", "st-mary")
        finally:
            os.umask(before)
        assert (tmp_path / "a.sqlite").stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("there", ["ledger", "file", "folder", "link"])
    def test_it_never_overwrites(self, used: Path, there: str) -> None:
        file = used.parent / "other.sqlite"
        if there == "ledger":
            copy(used, file)
        elif there == "file":
            file.write_bytes(b"mine")
        elif there == "folder":
            file.mkdir()
        else:
            file.symlink_to(used.parent / "gone")
        before = file.read_bytes() if file.is_file() else b""
        with pytest.raises(FileExistsError) as refused:
            Ledger.create(file, "st-mary")
        assert str(file) in str(refused.value)
        assert not file.is_file() or file.read_bytes() == before
        assert sorted(used.parent.iterdir()) == sorted([used, file])

    @pytest.mark.parametrize("below", ["gone", "file", "n" * 300])
    def test_a_place_that_cannot_be_written(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").write_bytes(b"mine")
        file = tmp_path / below / "a.sqlite"
        with pytest.raises(UnavailableError) as refused:
            Ledger.create(file, "st-mary")
        assert is_of_one_line(refused.value, file)
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    @pytest.mark.parametrize("failing", range(8))
    def test_a_disk_that_fails_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
    ) -> None:
        """At each statement in turn; past the last one it is made."""
        calls, file = list[str](), tmp_path / "a.sqlite"

        def fail(statement: str) -> None:
            calls.append(statement)
            if len(calls) == failing + 1:
                raise sqlite3.OperationalError("database or disk is full")

        with monkeypatch.context() as patch:
            statements_as(patch, before=fail)
            refused = refusal(lambda: Ledger.create(file, "st-mary"))
        if len(calls) > failing:
            assert is_of_one_line(refused, file)
            assert not list(tmp_path.iterdir())
            Ledger.create(file, "st-mary")
        serves(file)
        assert names(tmp_path) == ["a.sqlite"]

    def test_a_folder_that_cannot_be_linked_in(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*arguments: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", fail)
        with pytest.raises(UnavailableError, match="Operation not permitted; check the path"):
            Ledger.create(tmp_path / "a.sqlite", "st-mary")
        assert not list(tmp_path.iterdir())

    def test_what_a_lost_ledger_left_behind_is_not_mixed_into_a_new_one(self, used: Path) -> None:
        """SQLite would play an old write-ahead log into whatever file has its name."""
        kept = used.read_bytes()
        with closing(Ledger.open(used)) as ledger:
            ledger.commit("b", [("rounds", 2)])
            log = Path(f"{used}-wal").read_bytes()
        Path(f"{used}-wal").write_bytes(log)
        used.unlink()
        with pytest.raises(UnavailableError) as refused:
            Ledger.create(used, "st-mary")
        assert is_of_one_line(refused.value, used)
        used.write_bytes(kept)
        assert fresh(used).runs["b"].last == {"rounds": 2}


class Fault(NamedTuple):
    """What somebody did to a closed ledger, and what the error says of it."""

    name: str
    do: Callable[[Path], object]
    kind: type[LedgerError]
    says: str


def sql(statements: str) -> Callable[[Path], object]:
    """A change by SQL."""

    def do(path: Path) -> None:
        with raw(path) as connection:
            connection.executescript(statements)

    return do


def kept(change: Callable[[list[Row]], list[Row]]) -> Callable[[Path], object]:
    """Other entries in place of these."""

    def do(path: Path) -> None:
        changed = change(rows(path))
        with raw(path) as connection:
            connection.execute("DELETE FROM entries")
            connection.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", changed)

    return do


def edited(number: int, **values: Any) -> Callable[[Path], object]:  # noqa: ANN401
    """Other values in one entry."""
    return kept(lambda found: [r._replace(**values) if r.sequence == number else r for r in found])


def without(*numbers: int) -> Callable[[Path], object]:
    """Fewer entries."""
    return kept(lambda found: [row for row in found if row.sequence not in numbers])


def swapped(first: int, second: int) -> Callable[[Path], object]:
    """Two entries in each other's place, but for their numbers."""

    def change(found: list[Row]) -> list[Row]:
        place = {first: second, second: first}
        return [
            found[place.get(row.sequence, row.sequence) - 1]._replace(sequence=row.sequence)
            for row in found
        ]

    return kept(change)


def appended(
    kind: str, body: Mapping[str, Any], digest: str | None = None
) -> Callable[[Path], object]:
    """One more entry; well sealed if no hash is given."""

    def change(found: list[Row]) -> list[Row]:
        last = found[-1]
        entry = sealed(Head(last.sequence, last.hash), last.time, kind, body)
        text = canonical(body)
        return [*found, Row(entry.sequence, last.time, kind, text, digest or entry.hash)]

    return kept(change)


def cut(size: Callable[[int], int]) -> Callable[[Path], object]:
    """The file's first part alone."""
    return lambda path: os.truncate(path, size(path.stat().st_size))


def becomes_a_folder(path: Path) -> None:
    """What a mount that is missing looks like."""
    path.unlink()
    path.mkdir()


LOOSER = """
CREATE TEMP TABLE found AS SELECT * FROM entries;
DROP TABLE entries;
CREATE TABLE entries (sequence INTEGER PRIMARY KEY AUTOINCREMENT, time, kind, body, hash);
INSERT INTO entries SELECT * FROM found;
UPDATE entries SET body = 5 WHERE sequence = 8;
"""
FORGETFUL = """
CREATE TRIGGER forget AFTER INSERT ON entries BEGIN
    DELETE FROM entries WHERE sequence = new.sequence;
    UPDATE sqlite_sequence SET seq = new.sequence - 1;
END;
"""
COMMIT = {
    "run_id": "b",
    "part": "rounds",
    "index": 2,
    "event": event_to_plain(Releases(100.0, 1.0, 1).event),
}
TWICE = canonical({**COMMIT, "index": 1}).replace("{", '{"index":9,', 1)
SPACED = json.dumps({**COMMIT, "index": 1})
SEALED, GIVEN = "its hash does not fit", "were given out"
Damaged, Unavailable = DamagedError, UnavailableError
FAULTS = [
    Fault("edited time", edited(4, time="2020-01-01T00:00:00.000+00:00"), Damaged, SEALED),
    Fault("edited kind", edited(4, kind="close"), Damaged, f"entry 4: {SEALED}"),
    Fault("edited reservation", edited(3, body="{}"), Damaged, f"entry 3: {SEALED}"),
    Fault("edited first entry", edited(1, body="{}"), Damaged, f"entry 1: {SEALED}"),
    Fault("edited last entry", edited(8, body="{}"), Damaged, f"entry 8: {SEALED}"),
    Fault("edited hash", edited(8, hash="0" * 64), Damaged, f"entry 8: {SEALED}"),
    Fault("edited number", edited(8, sequence=40), Damaged, "entry 40: expected entry 8"),
    Fault("a value given twice", edited(8, body=TWICE), Damaged, "entry 8"),
    Fault("a space", edited(8, body=SPACED), Damaged, "entry 8"),
    Fault("no JSON", edited(8, body="{"), Damaged, "entry 8"),
    Fault("another JSON", edited(8, body="[]"), Damaged, "entry 8"),
    Fault("not a number", edited(8, body='{"index": NaN}'), Damaged, "entry 8"),
    Fault("a huge number", edited(8, body='{"index": %s}' % ("9" * 5000)), Damaged, "entry 8"),
    Fault("a deep body", edited(8, body="[" * 90_000), Damaged, "entry 8"),
    Fault("no text", sql("UPDATE entries SET body = CAST(x'ff' AS TEXT)"), Damaged, "body"),
    Fault("removed first entry", without(1), Damaged, "entry 2: expected entry 1"),
    Fault("removed middle entry", without(5), Damaged, "entry 6: expected entry 5"),
    Fault("removed and counted anew",
          kept(lambda found: [*found[:4], *(r._replace(sequence=r[0] - 1) for r in found[5:])]),
          Damaged, f"entry 5: {SEALED}"),
    Fault("removed last entry", without(8), Damaged, f"holds 7 entries, 8 {GIVEN}"),
    Fault("removed last entries", without(6, 7, 8), Damaged, f"holds 5 entries, 8 {GIVEN}"),
    Fault("removed all", without(*range(9)), Damaged, f"holds 0 entries, 8 {GIVEN}"),
    Fault("removed count", sql("DELETE FROM sqlite_sequence"), Damaged, f"none {GIVEN}"),
    Fault("removed table", sql("DROP TABLE entries"), Damaged, ""),
    Fault("removed column", sql("ALTER TABLE entries DROP COLUMN hash"), Damaged, ""),
    Fault("a looser table", sql(LOOSER), Damaged, ""),
    Fault("a trigger", sql(FORGETFUL), Damaged, ""),
    Fault("swapped entries", swapped(4, 5), Damaged, f"entry 4: {SEALED}"),
    Fault("swapped last entries", swapped(7, 8), Damaged, f"entry 7: {SEALED}"),
    Fault("swapped kinds", swapped(3, 6), Damaged, f"entry 3: {SEALED}"),
    Fault("appended entry", appended("commit", COMMIT, "0" * 64), Damaged, f"entry 9: {SEALED}"),
    Fault("appended a release that was made", appended("commit", {**COMMIT, "index": 1}),
          Damaged, "release 1 asked, 1 of 5"),
    Fault("appended a release beyond the plan", appended("commit", {**COMMIT, "index": 6}),
          Damaged, "release 6 asked"),
    Fault("appended another kind", appended("refund", {"epsilon": 1.0}), Damaged, "unknown kind"),
    Fault("truncated to nothing", cut(lambda size: size * 0), Damaged, "is no ledger"),
    Fault("truncated to half", cut(lambda size: size // 2), Damaged, ""),
    Fault("truncated by a page", cut(lambda size: size - 4096), Damaged, ""),
    Fault("truncated by a byte", cut(lambda size: size - 1), Damaged, ""),
    Fault("no SQLite", lambda path: path.write_bytes(b"epsilon,spent\n" * 999),
          Damaged, "file is not a database"),
    Fault("another application's", sql("PRAGMA application_id = 7"), Damaged, "is no ledger"),
    Fault("of a newer format", sql("PRAGMA user_version = 2"), Unavailable, "is of format 2"),
    Fault("missing", lambda path: path.unlink(), Unavailable, "is missing; put the ledger back"),
    Fault("a folder", becomes_a_folder, Unavailable, "is missing"),
]  # fmt: skip


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound ledger that nobody opens again."""
    path = tmp_path_factory.mktemp("closed") / "sound.sqlite"
    Ledger.create(path, "st-mary")
    with closing(Ledger.open(path)) as ledger:
        ledger.reserve(asked(), LIMIT)
        for index in (1, 2, 3):
            ledger.commit("a", [("rounds", index)])
    return path


class TestFaults:
    @pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
    def test_each_is_a_typed_error_and_never_a_wrong_number(self, used: Path, fault: Fault) -> None:
        sound = used.read_bytes()
        fault.do(used)
        looks: list[Callable[[], object]] = [
            lambda: Ledger.open(used),
            lambda: Ledger.open(used, read_only=True),
            lambda: verify(used),
        ]
        for look in looks:
            with pytest.raises(fault.kind) as noticed:
                look()
            assert is_of_one_line(noticed.value, used)
            assert fault.says in str(noticed.value)
        # The sound one serves on, whatever the other left beside it.
        if used.is_dir():
            used.rmdir()
        for left in used.parent.glob(f"{used.name}-*"):
            left.unlink()
        used.write_bytes(sound)
        serves(used)

    def test_each_says_what_to_do(self, used: Path) -> None:
        sound, silent = used.read_bytes(), []
        for number, fault in enumerate(FAULTS):
            file = used.with_name(f"{number}.sqlite")
            file.write_bytes(sound)
            fault.do(file)
            try:
                Ledger.open(file).close()
            except LedgerError as noticed:
                mended = re.search(rf"[;,] .*({MEND})", str(noticed).removeprefix(str(file)))
                silent += [] if mended else [str(noticed)]
        assert silent == []

    def test_a_ledger_that_is_open_notices_what_came_since(self, used: Path) -> None:
        """The entries that it had taken in before are looked at when it is opened."""
        with closing(Ledger.open(used)) as ledger:
            appended("commit", COMMIT, "0" * 64)(used)
            for _ in range(2):
                with pytest.raises(DamagedError, match="entry 9") as noticed:
                    ledger.commit("b", [("rounds", 3)])
                assert is_of_one_line(noticed.value, used)
                with pytest.raises(DamagedError, match="entry 9"):
                    ledger.read()
            sql("DELETE FROM entries WHERE sequence = 9; UPDATE sqlite_sequence SET seq = 8")(used)
            assert ledger.commit("b", [("rounds", 2)]).number == 9
        serves(used)

    def test_nor_may_its_last_entry_change_below_it(self, used: Path) -> None:
        with closing(Ledger.open(used)) as ledger:
            sql("DELETE FROM entries WHERE sequence = 8; UPDATE sqlite_sequence SET seq = 7")(used)
            with pytest.raises(DamagedError, match="entry 8 has changed since it was read"):
                ledger.commit("b", [("rounds", 2)])
            assert len(rows(used)) == 7

    @settings(max_examples=150)
    @given(place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
    def test_a_flipped_byte_anywhere_is_an_error_or_changes_no_number(
        self, closed: Path, place: float, mask: int
    ) -> None:
        damaged, path, found = bytearray(closed.read_bytes()), closed.with_name("a"), list[Books]()
        damaged[int(place * len(damaged))] ^= mask
        path.write_bytes(damaged)
        noticed = refusal(lambda: found.append(fresh(path)))
        assert is_of_one_line(noticed, path) or found[0].runs["a"].made == {"rounds": 3}
        assert noticed or found[0].statements()[0].epsilon == 0.1

    @settings(max_examples=60)
    @given(place=st.floats(0, 1, exclude_max=True))
    def test_cut_anywhere_it_is_an_error(self, closed: Path, place: float) -> None:
        path, sound = closed.with_name("b"), closed.read_bytes()
        path.write_bytes(sound[: int(place * len(sound))])
        with pytest.raises(DamagedError):
            fresh(path)


class TestOldCopies:
    def test_a_copy_that_was_put_back_is_noticed_where_its_head_is_known(self, used: Path) -> None:
        """And not otherwise: by itself it is a sound ledger of an earlier day."""
        old = used.with_name("old")
        copy(used, old)
        with closing(Ledger.open(used)) as ledger:
            known = ledger.commit("b", [("rounds", 2)])
        copy(old, used)
        with closing(Ledger.open(used)) as ledger:
            assert ledger.read().runs["b"].last == {"rounds": 1}
            with pytest.raises(DamagedError, match="has 8 entries, 9 are known elsewhere") as gone:
                ledger.check_head(known)
            assert is_of_one_line(gone.value, used)
        with pytest.raises(DamagedError, match="has 8 entries, 9 are known elsewhere"):
            verify(used, known)

    def test_so_is_one_that_went_on_since(self, used: Path) -> None:
        """As many entries, and others."""
        old = used.with_name("old")
        copy(used, old)
        with closing(Ledger.open(used)) as ledger:
            known = ledger.commit("b", [("rounds", 2)])
        copy(old, used)
        with closing(Ledger.open(used)) as ledger:
            ledger.commit("b", [("rounds", 3)])
            ledger.commit("b", [("rounds", 4)])
            with pytest.raises(DamagedError, match="entry 9 is another than is known") as gone:
                ledger.check_head(known)
            assert is_of_one_line(gone.value, used)

    def test_a_chain_that_was_rewritten_is_noticed_there_only(self, used: Path) -> None:
        known = head(used)

        def cheaper(kind: str, body: dict[str, Any]) -> None:
            if kind == "reserve":
                body["charges"][0]["epsilon"] *= 0.9

        rewritten(used, cheaper)
        assert fresh(used).statements()[0].epsilon == pytest.approx(0.27)
        verify(used)
        with pytest.raises(DamagedError, match="entry 8 is another than is known"):
            verify(used, known)

    def test_an_entry_that_was_added_by_our_own_rules_takes_budget_and_gives_none(
        self, used: Path
    ) -> None:
        """Nothing notices it, and nothing has to: it can only close a run or use releases up."""
        known, before = head(used), fresh(used).statements()
        appended("commit", COMMIT)(used)
        appended("close", {"run_id": "a"})(used)
        assert verify(used, known).head.number == 10
        after = fresh(used).statements()
        assert [s.epsilon for s in after] == [s.epsilon for s in before]
        with closing(Ledger.open(used)) as ledger, pytest.raises(BudgetError):
            ledger.commit("b", [("rounds", 2)])

    @pytest.mark.parametrize("number", [1, 5, 8])
    def test_every_earlier_head_is_known_again(self, used: Path, number: int) -> None:
        with closing(Ledger.open(used)) as ledger:
            ledger.check_head(Head(number, rows(used)[number - 1].hash))
            ledger.check_head(EMPTY)

    @pytest.mark.parametrize("number", [9, 2**63, 2**80, -1, -(2**80), 0])
    def test_a_head_that_it_never_had(self, used: Path, number: int) -> None:
        known = Head(number, "0" * 64)
        with closing(Ledger.open(used)) as ledger:
            with pytest.raises(DamagedError) as noticed:
                ledger.check_head(known)
            assert is_of_one_line(noticed.value, used)
        with pytest.raises(DamagedError):
            verify(used, known)

    def test_a_file_that_was_put_in_its_place_while_it_is_open(self, used: Path) -> None:
        """Or commits would go to a file that has no name, and be forgotten with the process."""
        old = used.with_name("old")
        copy(used, old)
        with closing(Ledger.open(used)) as ledger:
            ledger.commit("b", [("rounds", 2)])
            for left in used.parent.glob(f"{used.name}-*"):
                left.unlink()
            old.replace(used)
            with pytest.raises(LedgerError) as noticed:
                ledger.commit("b", [("rounds", 3)])
            assert is_of_one_line(noticed.value, used)
            with pytest.raises(LedgerError):
                ledger.read()
        serves(used)

    def test_a_file_that_was_removed_while_it_is_open(self, used: Path) -> None:
        with closing(Ledger.open(used)) as ledger:
            used.unlink()
            with pytest.raises(UnavailableError) as noticed:
                ledger.commit("b", [("rounds", 2)])
            assert is_of_one_line(noticed.value, used)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger as a killed process leaves it: `file`, and its `log`."""
    path = tmp_path_factory.mktemp("crashed") / "site.sqlite"
    Ledger.create(path, "st-mary")
    with closing(Ledger.open(path)) as ledger:
        ledger.reserve(asked(), FREE)
        for index in (1, 2, 3):
            ledger.commit("a", [("rounds", index)])
        path.with_name("file").write_bytes(path.read_bytes())
        path.with_name("log").write_bytes(Path(f"{path}-wal").read_bytes())
    return path


class TestCutLog:
    def test_wherever_the_log_is_cut_the_ledger_is_one_of_an_earlier_moment(
        self, used: Path, tmp_path: Path
    ) -> None:
        """What a lying disk loses in a power cut, or somebody cuts: SQLite drops what is not whole.

        The ledger by itself cannot tell, for it was sound at that moment; a known head does.
        """
        with closing(Ledger.open(used)) as ledger:
            heads = [head(used)] + [ledger.commit("b", [("rounds", i)]) for i in (2, 3, 4)]
            log, file = Path(f"{used}-wal").read_bytes(), used.read_bytes()
        found, copied = [], tmp_path / "copied" / "site.sqlite"
        copied.parent.mkdir()
        chosen = np.random.default_rng(3).integers(len(log), size=50).tolist()
        for length in [*sorted(chosen), len(log)]:
            copied.write_bytes(file)
            Path(f"{copied}-wal").write_bytes(log[:length])
            with closing(Ledger.open(copied)) as ledger:
                now = ledger.read().head
                assert now in heads
                found.append(heads.index(now))
                for earlier in heads[: found[-1] + 1]:
                    ledger.check_head(earlier)
                for later in heads[found[-1] + 1 :]:
                    with pytest.raises(DamagedError, match="are known elsewhere"):
                        ledger.check_head(later)
        assert found == sorted(found)
        assert set(found) == {0, 1, 2, 3}
        serves(copied)

    def test_a_log_that_was_removed(self, used: Path, tmp_path: Path) -> None:
        copied = tmp_path / "copied.sqlite"
        with closing(Ledger.open(used)) as ledger:
            known = ledger.commit("b", [("rounds", 2)])
            copied.write_bytes(used.read_bytes())
        assert fresh(copied).head.number == 8
        with pytest.raises(DamagedError, match="has 8 entries, 9 are known elsewhere"):
            verify(copied, known)

    @settings(max_examples=40)
    @given(place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
    def test_a_flipped_byte_of_the_log(self, crashed: Path, place: float, mask: int) -> None:
        path, found = crashed.with_name("a"), list[Books]()
        for left in path.parent.glob("a-*"):
            left.unlink()
        damaged = bytearray(crashed.with_name("log").read_bytes())
        damaged[int(place * len(damaged))] ^= mask
        path.write_bytes(crashed.with_name("file").read_bytes())
        Path(f"{path}-wal").write_bytes(damaged)
        noticed = refusal(lambda: found.append(fresh(path)))
        earlier = [Head(1, rows(crashed)[0].hash)] + [Head(r[0], r[4]) for r in rows(crashed)]
        assert is_of_one_line(noticed, path) or found[0].head in earlier


def connect_as(monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str]) -> None:
    """Lets ledgers be opened by another address."""
    connect = sqlite3.connect

    def other(address: object, **options: Any) -> Any:  # noqa: ANN401
        return connect(change(str(address)), **options)

    monkeypatch.setattr(sqlite3, "connect", other)


def statements_as(
    monkeypatch: pytest.MonkeyPatch,
    before: Callable[[str], object] = str,
    after: Callable[[str], object] = str,
) -> None:
    """Has something happen around every statement that a ledger hands to SQLite from now on."""

    class Watched(sqlite3.Connection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:  # noqa: ANN401
            before(statement)
            cursor = super().execute(statement, *values)
            after(statement)
            return cursor

    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *a, **options: connect(*a, factory=Watched, **options)
    )


def takes_a_run(path: Path) -> None:
    """What a process that comes anew does."""
    with closing(Ledger.open(path, wait=0.001)) as ledger:
        ledger.reserve(asked(), FREE)


class TestUnavailable:
    def test_a_disk_that_may_only_be_read(
        self, used: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = rows(used)
        with monkeypatch.context() as patch:
            connect_as(patch, lambda uri: uri.replace("mode=rw", "mode=ro"))
            with closing(Ledger.open(used)) as ledger:
                for call in (
                    lambda: ledger.commit("b", [("rounds", 2)]),
                    lambda: ledger.reserve(asked("c"), FREE),
                    lambda: ledger.end("b"),
                ):
                    with pytest.raises(UnavailableError, match="readonly") as noticed:
                        call()
                    assert is_of_one_line(noticed.value, used)
                    assert "check the disk and the permissions" in str(noticed.value)
                    assert ledger.read() == fresh(used)
        assert rows(used) == before
        serves(used)

    def test_so_it_is_when_it_is_new(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            connect_as(patch, lambda uri: uri.replace("mode=rw", "mode=ro"))
            refused = refusal(lambda: takes_a_run(path))
        assert isinstance(refused, UnavailableError)
        assert is_of_one_line(refused, path)
        assert "check the disk and the permissions" in str(refused)
        serves(path)

    def test_opened_to_look_at_it_cannot_be_written(self, used: Path) -> None:
        with closing(Ledger.open(used, read_only=True)) as ledger:
            with pytest.raises(UnavailableError, match="readonly"):
                ledger.commit("b", [("rounds", 2)])
            assert ledger.read().runs["b"].last == {"rounds": 1}

    def test_locked_by_another_process(self, used: Path) -> None:
        before = rows(used)
        with closing(Ledger.open(used, wait=0.001)) as ledger:
            with raw(used) as other:
                other.execute("BEGIN EXCLUSIVE")
                for call in (
                    lambda: ledger.commit("b", [("rounds", 2)]),
                    lambda: ledger.reserve(asked("c"), FREE),
                ):
                    with pytest.raises(UnavailableError, match="locked; another process") as told:
                        call()
                    assert is_of_one_line(told.value, used)
                # It may be looked at meanwhile.
                assert ledger.read().head.number == 8
                assert fresh(used).head.number == 8
                other.rollback()
            assert rows(used) == before
            assert ledger.commit("b", [("rounds", 2)]).number == 9
        serves(used)

    def test_locked_before_it_was_ever_opened(self, path: Path) -> None:
        with raw(path) as other:
            other.execute("BEGIN EXCLUSIVE")
            refused = refusal(lambda: takes_a_run(path))
        assert isinstance(refused, UnavailableError)
        assert is_of_one_line(refused, path)
        assert "locked; another process" in str(refused)
        serves(path)

    def test_the_first_time_too_it_opens_beside_one_that_looks(self, path: Path) -> None:
        """Two sites of one machine start at once; neither may find the other's ledger locked."""
        with raw(path) as other:
            other.execute("BEGIN")
            other.execute("SELECT * FROM entries").fetchall()
            Ledger.open(path, wait=0.001).close()
            other.rollback()

    def test_a_full_disk(self, used: Path) -> None:
        """SQLite's own SQLITE_FULL: it may not take one page more."""
        with closing(Ledger.open(used)) as ledger:
            ask = ledger._connection.execute
            ask(f"PRAGMA max_page_count = {ask('PRAGMA page_count').fetchone()[0]}")
            refusals = [refusal(partial(ledger.reserve, asked(f"c{n}"), FREE)) for n in range(30)]
            done = refusals.index(next(filter(None, refusals)))
            refused = refusals[done]
            assert all(refusals[done:])
            assert isinstance(refused, UnavailableError)
            assert is_of_one_line(refused, used)
            assert "full; check the disk" in str(refused)
            assert ledger.read() == fresh(used)
            assert len(fresh(used).runs) == 2 + done
            ask("PRAGMA max_page_count = 999999")
            ledger.reserve(asked(f"c{done}"), FREE)
            assert ledger.read() == fresh(used)
        serves(used)

    @pytest.mark.parametrize("failing", ["BEGIN", "SELECT", "INSERT", "COMMIT"])
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize(
        "error", [sqlite3.OperationalError("disk I/O error"), KeyboardInterrupt(), MemoryError()]
    )
    def test_whatever_fails_where_the_books_are_the_files(
        self,
        used: Path,
        monkeypatch: pytest.MonkeyPatch,
        failing: str,
        when: str,
        error: BaseException,
    ) -> None:
        """A commit that the disk took and failed to confirm counts as made."""
        armed = False

        def fail(statement: str) -> None:
            if armed and statement.startswith(failing):
                raise error

        with monkeypatch.context() as patch:
            statements_as(patch, **{when: fail})
            with closing(Ledger.open(used, wait=0.001)) as ledger:
                armed = True
                with pytest.raises((UnavailableError, KeyboardInterrupt, MemoryError)) as noticed:
                    ledger.commit("b", [("rounds", 2), ("rounds", 3)])
                if isinstance(noticed.value, LedgerError):
                    assert is_of_one_line(noticed.value, used)
                armed = False
                made = 2 * (failing == "COMMIT" and when == "after")
                assert len(rows(used)) == 8 + made
                assert ledger.read() == fresh(used)
                # And the lock is not kept.
                assert ledger.commit("b", [("rounds", 4)]).number == 9 + made
        serves(used)

    @pytest.mark.parametrize("kind", ["dataset", "reserve", "commit", "close"])
    def test_an_interrupt_between_the_books_and_their_head(
        self, used: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        """Wherever it comes, a reservation that is not in the file is not in the books."""

        def interrupt(*arguments: object) -> None:
            raise KeyboardInterrupt

        with closing(Ledger.open(used)) as ledger:
            calls: dict[str, Callable[[], object]] = {
                "dataset": lambda: ledger.bind("lung", {"holdout": 0.1}),
                "reserve": lambda: ledger.reserve(asked("c"), FREE),
                "commit": lambda: ledger.commit("b", [("rounds", 2)]),
                "close": lambda: ledger.end("b"),
            }
            with monkeypatch.context() as patch:
                # The head is what an entry changes last.
                patch.setattr(books_module, "Head", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    calls[kind]()
            assert ledger.read() == fresh(used)
            calls[kind]()
            assert ledger.read() == fresh(used)
            assert head(used).number == 9
        verify(used)

    def test_a_name_that_the_system_refuses(self, tmp_path: Path) -> None:
        for file in (tmp_path / ("n" * 300), tmp_path / "gone" / "a.sqlite"):
            for read_only in (False, True):
                with pytest.raises(UnavailableError) as noticed:
                    Ledger.open(file, read_only=read_only)
                assert is_of_one_line(noticed.value, file)

    def test_a_folder_that_may_not_be_looked_into(
        self, used: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*arguments: object, **options: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "stat", refuse)
        with pytest.raises(UnavailableError) as noticed:
            Ledger.open(used)
        assert is_of_one_line(noticed.value, used)


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.moment = NOON

    def __call__(self) -> datetime:
        return self.moment


class TestClock:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def ledger(self, tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
        """A ledger whose last entry is of noon."""
        Ledger.create(tmp_path / "a.sqlite", "st-mary", clock=clock)
        with closing(Ledger.open(tmp_path / "a.sqlite", clock=clock)) as opened:
            opened.reserve(asked("a", 0.5, 9), FREE)
            yield opened

    def test_time_is_kept_in_utc(self, ledger: Ledger, clock: Clock) -> None:
        clock.moment = (NOON + timedelta(seconds=1)).astimezone(timezone(timedelta(hours=5)))
        ledger.commit("a", [("rounds", 1)])
        assert rows(ledger.path)[-1].time == "2025-03-01T12:00:01.000+00:00"

    def test_a_little_back_and_time_stands_still(self, ledger: Ledger, clock: Clock) -> None:
        for index, moved in enumerate((30, -1, -270, 31), start=1):
            clock.moment = NOON + timedelta(seconds=moved)
            ledger.commit("a", [("rounds", index)])
        assert [row.time[14:19] for row in rows(ledger.path)] == [
            "00:00", "00:00", "00:30", "00:30", "00:30", "00:31",
        ]  # fmt: skip
        verify(ledger.path)

    @pytest.mark.parametrize("back", [timedelta(minutes=5, milliseconds=1), timedelta(days=900)])
    def test_far_back_and_nothing_is_written(
        self, ledger: Ledger, clock: Clock, back: timedelta
    ) -> None:
        before, books = rows(ledger.path), ledger.read()
        clock.moment = NOON - back
        for call in (
            lambda: ledger.commit("a", [("rounds", 1)]),
            lambda: ledger.reserve(asked("b"), FREE),
        ):
            with pytest.raises(UnavailableError, match=r"the clock says .* set the clock") as told:
                call()
            assert is_of_one_line(told.value, ledger.path)
        assert rows(ledger.path) == before
        assert ledger.read() == books
        # Refusals and repeats need no time.
        ledger.reserve(asked("a", 0.5, 9), FREE)
        with pytest.raises(BudgetError):
            ledger.commit("a", [("rounds", 10)])
        clock.moment = NOON
        assert ledger.commit("a", [("rounds", 1)]).number == 3
        serves(ledger.path)


def works(jobs: list[tuple[Callable[..., None], tuple[object, ...]]], count: int) -> list[Any]:
    """What jobs put into a queue, done by so many processes behind one barrier; by job.

    A process that is spawned cannot import this file: it gets the functions' text.
    """
    context = multiprocessing.get_context("spawn")
    barrier, said = context.Barrier(count, timeout=60), context.Queue()
    calls = "".join(
        f"    {job.__name__}(number, barrier, lambda v: said.put(({place}, v)), *shared[{place}])\n"
        for place, (job, _) in enumerate(jobs)
    )
    text = "\n".join(
        (
            "from __future__ import annotations",
            *(inspect.getsource(job) for job, _ in jobs),
            f"try:\n{calls}finally:\n    said.put(None)",
        )
    )
    shared = [arguments for _, arguments in jobs]
    processes = [
        context.Process(
            target=exec,
            args=(text, {"number": n, "barrier": barrier, "said": said, "shared": shared}),
        )
        for n in range(count)
    ]
    for process in processes:
        process.start()
    found: list[Any] = [[] for _ in jobs]
    ended = 0
    while ended < count:
        value = said.get(timeout=120)
        if value is None:
            ended += 1
        else:
            found[value[0]].append(value[1])
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count
    return found


Said = Callable[[object], None]


def creates(number: int, barrier: Barrier, say: Said, folder: str, times: int) -> None:
    from pathlib import Path

    from fedveil.privacy.ledger import Ledger
    from fedveil.privacy.limits import LedgerError, UnavailableError

    for time in range(times):
        file = Path(folder) / f"{time}.sqlite"
        barrier.wait()
        try:
            Ledger.create(file, "st-mary")
            say((time, "made"))
        except FileExistsError:
            say((time, "found"))
        except UnavailableError as error:
            say((time, str(error)))
        # Both open it at once too, for the first time.
        barrier.wait()
        try:
            Ledger.open(file).close()
        except LedgerError as error:
            say((time, str(error)))


def races_for_releases(number: int, barrier: Barrier, say: Said, file: str, times: int) -> None:
    from pathlib import Path

    from fedveil.privacy.ledger import Ledger
    from fedveil.privacy.limits import BudgetError

    ledger = Ledger.open(Path(file))
    for time in range(times):
        barrier.wait()
        try:
            ledger.commit(f"r{time}", [("rounds", 1)])
        except BudgetError as refused:
            say((time, number, str(refused)))
        else:
            say((time, number, "won"))
    ledger.close()


def races_for_budget(number: int, barrier: Barrier, say: Said, file: str, times: int) -> None:
    from pathlib import Path

    from fedveil.privacy.accounting import Releases
    from fedveil.privacy.books import Charge, Order
    from fedveil.privacy.ledger import Ledger
    from fedveil.privacy.limits import BudgetError, Lifetime
    from fedveil.privacy.plan import Part

    ledger = Ledger.open(Path(file))
    part = Part("rounds", "training", Releases(100.0, 1.0, 1), 3)
    charges = (Charge("training", 0.1, 1e-6, (part,)),)
    for time in range(times):
        order = Order(f"{time} of {number}", "t", f"d{time}", "record", charges)
        barrier.wait()
        try:
            ledger.reserve(order, Lifetime(0.1, 1e-5))
        except BudgetError as refused:
            say((time, str(refused)))
        else:
            say((time, "won"))
    ledger.close()


def commits_on_and_on(number: int, barrier: Barrier, say: Said, file: str, times: int) -> None:
    """Of a run of its own, and of one that both go through; it reads and looks in between."""
    from pathlib import Path

    from fedveil.privacy.ledger import Ledger
    from fedveil.privacy.limits import BudgetError

    ledger = Ledger.open(Path(file))
    barrier.wait()
    for index in range(1, times + 1):
        for run_id in (f"own-{number}", "shared"):
            try:
                head = ledger.commit(run_id, [("rounds", index)])
            except BudgetError:
                continue
            ledger.check_head(head)
            assert ledger.read().runs[run_id].last["rounds"] >= index
            say((run_id, index, head.number))
    ledger.close()


class Contended(NamedTuple):
    """What two processes said that worked at the same ledgers at once."""

    folder: Path
    creates: list[tuple[int, str]]
    releases: list[tuple[int, int, str]]
    budget: list[tuple[int, str]]
    turns: list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def contended(tmp_path_factory: pytest.TempPathFactory) -> Contended:
    """Two processes, spawned once for four contests."""
    folder = tmp_path_factory.mktemp("contended")
    (folder / "new").mkdir()
    names = ("releases", "budget", "turns")
    for name in names:
        Ledger.create(folder / name, "st-mary")
    with closing(Ledger.open(folder / "releases")) as ledger:
        for time in range(100):
            ledger.reserve(asked(f"r{time}", count=1), FREE)
    with closing(Ledger.open(folder / "turns")) as ledger:
        for run_id in ("own-0", "own-1", "shared"):
            ledger.reserve(asked(run_id, 0.6, 80), FREE)
    releases, budget, turns = (str(folder / name) for name in names)
    return Contended(
        folder,
        *works(
            [
                (creates, (str(folder / "new"), 40)),
                (races_for_releases, (releases, 100)),
                (races_for_budget, (budget, 40)),
                (commits_on_and_on, (turns, 80)),
            ],
            count=2,
        ),
    )


class TestTwoProcesses:
    def test_one_makes_a_ledger_and_the_other_finds_it_and_both_open_it(
        self, contended: Contended
    ) -> None:
        for time in range(40):
            said = sorted(text for t, text in contended.creates if t == time)
            assert said == ["found", "made"], time
            serves(contended.folder / "new" / f"{time}.sqlite")
        assert len(names(contended.folder / "new")) == 40

    def test_exactly_one_wins_the_last_release_each_time(self, contended: Contended) -> None:
        for time in range(100):
            outcomes = sorted(text for t, _, text in contended.releases if t == time)
            assert outcomes == [
                f"run r{time}: rounds: release 1 asked, 1 of 1 are used up", "won",
            ]  # fmt: skip
        assert fresh(contended.folder / "releases").statements()[0].made == 100

    def test_exactly_one_wins_the_last_of_the_budget_each_time(self, contended: Contended) -> None:
        for time in range(40):
            outcomes = sorted(text for t, text in contended.budget if t == time)
            assert outcomes[1:] == ["won"]
            assert outcomes[0].startswith(
                f"account d{time}/record/training: epsilon 0.1 of 0.1 is spent, 0.1 more is asked"
            )
        assert len(fresh(contended.folder / "budget").runs) == 40

    def test_their_commits_interleave(self, contended: Contended) -> None:
        said = sorted((run_id, index) for run_id, index, _ in contended.turns)
        runs = ("own-0", "own-1", "shared")
        assert said == [(run_id, index) for run_id in runs for index in range(1, 81)]
        # The heads that they were given are those of one chain.
        assert sorted(number for _, _, number in contended.turns) == list(range(5, 245))
        kept = {r.sequence: json.loads(r.body) for r in rows(contended.folder / "turns")[4:]}
        for run_id, index, number in contended.turns:
            assert (kept[number]["run_id"], kept[number]["index"]) == (run_id, index)
        assert verify(contended.folder / "turns").head.number == 244


def forks(number: int, barrier: Barrier, say: Said, file: str) -> None:
    """Its child commits on the connection that it had from its parent, which has closed it."""
    import os
    from pathlib import Path

    from fedveil.privacy.ledger import Ledger
    from fedveil.privacy.limits import LedgerError

    ledger = Ledger.open(Path(file))
    come, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(come, 1)
        try:
            ledger.commit("b", [("rounds", 2)])
        except LedgerError:
            os._exit(1)
        os._exit(0)
    ledger.close()
    os.write(go, b"x")
    say("refused" if os.waitpid(child, 0)[1] else "committed")


def is_killed_in_create(number: int, barrier: Barrier, say: Said, folder: str, times: int) -> None:
    """At each statement, at the link and after it, in turn."""
    import os
    import signal
    import sqlite3
    from functools import partial
    from pathlib import Path

    from fedveil.privacy.ledger import Ledger

    connect, link, left = sqlite3.connect, os.link, 0

    def step() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    class Dying(sqlite3.Connection):
        def execute(self, *arguments: Any) -> sqlite3.Cursor:  # noqa: ANN401
            step()
            return super().execute(*arguments)

    def dying_link(*arguments: Any) -> None:  # noqa: ANN401
        step()
        link(*arguments)
        step()

    for time in range(times):
        file = Path(folder) / str(time) / "a.sqlite"
        file.parent.mkdir(parents=True)
        child = os.fork()
        if child == 0:
            left = time
            sqlite3.connect = partial(connect, factory=Dying)  # type: ignore[assignment]
            os.link = dying_link  # type: ignore[assignment]
            Ledger.create(file, "st-mary")
            os._exit(0)
        say(os.WIFSIGNALED(os.waitpid(child, 0)[1]))


def is_killed_in_commit(number: int, barrier: Barrier, say: Said, file: str, times: int) -> None:
    """Before and after each statement of a commit of two releases, in turn."""
    import os
    import signal
    import sqlite3
    from functools import partial
    from pathlib import Path

    from fedveil.privacy.ledger import Ledger

    connect, path = sqlite3.connect, Path(file)

    class Dying(sqlite3.Connection):
        left = 1000

        def step(self) -> None:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def execute(self, *arguments: Any) -> sqlite3.Cursor:  # noqa: ANN401
            self.step()
            cursor = super().execute(*arguments)
            self.step()
            return cursor

    def run() -> RunBook:
        ledger = Ledger.open(path)
        found = ledger.read().runs["a"]
        ledger.close()
        return found

    for time in range(times):
        before = run()
        child = os.fork()
        if child == 0:
            sqlite3.connect = partial(connect, factory=Dying)  # type: ignore[assignment]
            ledger = Ledger.open(path)
            ledger._connection.left = time  # type: ignore[attr-defined]
            index = before.last["rounds"] + 1
            ledger.commit("a", [("rounds", index), ("rounds", index + 1)])
            os._exit(0)
        os.waitpid(child, 0)
        say(run().made["rounds"] - before.made["rounds"])


def is_killed_at_random(number: int, barrier: Barrier, say: Said, file: str, times: int) -> None:
    """In a loop of commits, each of which is told once it has returned."""
    import os
    import random
    import signal
    from pathlib import Path

    from fedveil.privacy.ledger import Ledger

    chance, path = random.Random(8), Path(file)  # noqa: S311  public: when to kill
    for _ in range(times):
        come, go = os.pipe()
        child = os.fork()
        if child == 0:
            ledger = Ledger.open(path)
            index = ledger.read().runs["a"].last["rounds"]
            while True:
                index += 1
                ledger.commit("a", [("rounds", index)])
                os.write(go, f"{index}\n".encode())
        os.close(go)
        with os.fdopen(come, encoding="ascii") as told:
            lines = [told.readline() for _ in range(chance.randrange(1, 40))]
            for _ in range(chance.randrange(60_000)):
                pass
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            lines += told.readlines()
        ledger = Ledger.open(path)
        run = ledger.read().runs["a"]
        ledger.close()
        say(([int(line) for line in lines], run.made["rounds"], run.last["rounds"]))


class Killed(NamedTuple):
    """What a process said whose children were killed."""

    folder: Path
    forks: list[str]
    created: list[bool]
    committed: list[int]
    random: list[tuple[list[int], int, int]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """One process that forks, spawned once: it has no thread, and so its children may go on."""
    folder = tmp_path_factory.mktemp("killed")
    names = ("forks", "committed", "random")
    for name in names:
        Ledger.create(folder / name, "st-mary")
        with closing(Ledger.open(folder / name)) as ledger:
            ledger.reserve(asked("a", count=10**6), Lifetime(None, 0.5))
            ledger.reserve(asked("b"), FREE)
    forked, committed, at_random = (str(folder / name) for name in names)
    return Killed(
        folder,
        *works(
            [
                (forks, (forked,)),
                (is_killed_in_create, (str(folder / "created"), 12)),
                (is_killed_in_commit, (committed, 20)),
                (is_killed_at_random, (at_random, 15)),
            ],
            count=1,
        ),
    )


class TestKilled:
    def test_at_random_instants(self, killed: Killed) -> None:
        """All that was told is there, and at most the one more that was about to be told."""
        before, more = 0, 0
        for told, made, last in killed.random:
            assert told == list(range(before + 1, before + 1 + len(told)))
            assert made == last
            assert made - before - len(told) in {0, 1}
            more += made - before - len(told)
            before = made
        assert len(killed.random) == 15
        assert fresh(killed.folder / "random").head.number == 3 + before

    def test_at_every_statement_of_a_commit(self, killed: Killed) -> None:
        """Two releases of one call are both there or neither; once on the disk, they stay."""
        assert killed.committed == sorted(killed.committed)
        assert set(killed.committed) == {0, 2}
        books = fresh(killed.folder / "committed")
        assert books.runs["a"].made == {"rounds": sum(killed.committed)}

    def test_at_every_statement_of_making_one(self, killed: Killed) -> None:
        """There is a whole ledger then, or none; and the next one makes it, or finds it."""
        assert killed.created == sorted(killed.created, reverse=True)
        assert 6 <= sum(killed.created) < 12
        for time in range(12):
            file = killed.folder / "created" / str(time) / "a.sqlite"
            if not file.exists():
                Ledger.create(file, "st-mary")
            serves(file)
            with pytest.raises(FileExistsError):
                Ledger.create(file, "st-mary")
            # A draft may lie there hidden, for it may be another process's that is at it.
            assert [name for name in names(file.parent) if name[0] != "."] == [file.name]

    def test_a_forked_child_may_not_use_its_parents_connection(self, killed: Killed) -> None:
        """SQLite forbids it: its locks stay behind, and what such a child commits can be lost."""
        assert killed.forks == ["refused"]
        assert fresh(killed.folder / "forks").head.number == 3


class TestOneProcess:
    @pytest.mark.parametrize("look", ["open", "read", "check_head"])
    def test_whoever_looks_sees_one_moment(
        self, used: Path, monkeypatch: pytest.MonkeyPatch, look: str
    ) -> None:
        """Somebody else commits after each of its statements."""
        committed, armed = list[Head](), look == "open"
        with closing(Ledger.open(used)) as other:
            other.reserve(asked("c", count=99), FREE)
            known = head(used)

            def intrude(statement: str) -> None:
                if armed and len(committed) < 99:
                    with suppress(UnavailableError):
                        committed.append(other.commit("c", [("rounds", len(committed) + 1)]))

            statements_as(monkeypatch, after=intrude)
            with closing(Ledger.open(used, read_only=True)) as ledger:
                armed = True
                if look == "check_head":
                    ledger.check_head(known)
                assert ledger.read().head.number >= 9
                armed = False
            assert len(committed) > 1
        monkeypatch.undo()
        assert fresh(used).runs["c"].made == {"rounds": len(committed)}

    def test_threads_share_one_ledger(self, path: Path) -> None:
        with closing(Ledger.open(path)) as ledger:
            ledger.reserve(asked(count=40), FREE)
            barrier = threading.Barrier(8, timeout=60)

            def race(number: int) -> list[int]:
                won = []
                for index in range(1, 41):
                    barrier.wait()
                    with suppress(BudgetError):
                        ledger.commit("a", [("rounds", index)])
                        won.append(index)
                return won

            with ThreadPoolExecutor(8) as pool:
                found = [index for won in pool.map(race, range(8)) for index in won]
            assert sorted(found) == list(range(1, 41))
            assert ledger.read() == fresh(path)


class TestVerify:
    def test_a_sound_ledger(self, used: Path) -> None:
        verdict = verify(used)
        assert verdict.head == head(used)
        assert verdict.books == fresh(used)
        assert {key: stated for key, (stated, _) in verdict.prices.items()} == {
            ("a", "training"): 0.1,
            ("b", "training"): 0.2,
        }
        # Five Gaussian sums of noise 100 are one of noise 100 / sqrt(5): by Balle and Wang 2018,
        # theorem 8, epsilon 0.07998 at delta 1e-6; the grid's bound is a little above.
        recomputed = verdict.prices["b", "training"][1]
        assert recomputed is not None
        assert 0.07997 < recomputed < 0.0805

    @pytest.mark.parametrize("stated", [0.0, 1e-9, 0.05, 0.079])
    def test_a_price_that_is_too_small_for_its_releases(self, used: Path, stated: float) -> None:
        """A chain that was made anew is whole: what its releases cost is not."""

        def cheaper(kind: str, body: dict[str, Any]) -> None:
            if kind == "reserve" and body["run_id"] == "b":
                body["charges"][0]["epsilon"] = stated

        rewritten(used, cheaper)
        assert fresh(used).statements()[0].epsilon == pytest.approx(0.1 + stated)
        with pytest.raises(DamagedError, match=rf"run b, training: epsilon {stated} is") as told:
            verify(used)
        assert is_of_one_line(told.value, used)

    @pytest.mark.parametrize(
        ("place", "value"), [("count", 60), ("noise_multiplier", 20.0), ("delta", 1e-12)]
    )
    def test_so_are_releases_that_are_more_than_was_paid_for(
        self, path: Path, place: str, value: float
    ) -> None:
        with closing(Ledger.open(path)) as ledger:
            ledger.reserve(asked(), LIMIT)

        def dearer(kind: str, body: dict[str, Any]) -> None:
            if kind == "reserve":
                charge = body["charges"][0]
                part = charge["parts"][0]
                target = {"count": part, "delta": charge}.get(place, part["event"]["event"])
                assert place in target
                target[place] = value

        rewritten(path, dearer)
        fresh(path)
        with pytest.raises(DamagedError, match=r"run a, training: epsilon 0\.1 is stated"):
            verify(path)

    def test_equal_releases_of_two_parts_are_both_priced(self, path: Path) -> None:
        """Three sums of noise 100 are below epsilon 0.07, six are above it."""
        sums = Releases(100.0, 1.0, 1)
        parts = (Part("rounds", "training", sums, 3), Part("training_figures", "training", sums, 3))
        with closing(Ledger.open(path)) as ledger:
            order = Order("a", "t", "heart", "record", (Charge("training", 0.07, 1e-6, parts),))
            ledger.reserve(order, FREE)
        with pytest.raises(
            DamagedError, match=r"epsilon 0\.07 is stated, its releases cost 0\.0[89]"
        ):
            verify(path)

    def test_a_run_without_noise_states_none(self, path: Path) -> None:
        with closing(Ledger.open(path)) as ledger:
            ledger.reserve(asked(epsilon=None, noise=0.0), FREE)
        assert verify(path).prices == {("a", "training"): (None, None)}

    def test_a_run_that_states_none_for_its_noise_is_charged_more_than_it_costs(
        self, path: Path
    ) -> None:
        with closing(Ledger.open(path)) as ledger:
            ledger.reserve(asked(epsilon=None), FREE)
        assert fresh(path).statements()[0].epsilon is None
        (stated, recomputed), *_ = verify(path).prices.values()
        assert stated is None
        assert recomputed is not None
        assert recomputed > 0.0608

    def test_and_no_epsilon_if_it_has_one(self, path: Path) -> None:
        with closing(Ledger.open(path)) as ledger:
            ledger.reserve(asked(noise=0.0), FREE)
        with pytest.raises(DamagedError, match="its releases cost None"):
            verify(path)

    @pytest.mark.parametrize(
        "event",
        [
            {"kind": "Laplace", "noise_multiplier": 1.0},
            {"kind": "Gaussian", "noise_multiplier": -1.0},
            {"kind": "Gaussian", "noise_multiplier": "1"},
            {"kind": "PoissonSampled", "sampling_probability": 3.0,
             "event": {"kind": "Gaussian", "noise_multiplier": 100.0}},
            {"kind": "SelfComposed", "count": -5,
             "event": {"kind": "Gaussian", "noise_multiplier": 100.0}},
        ],
    )  # fmt: skip
    def test_an_event_that_nobody_can_price(self, path: Path, event: dict[str, Any]) -> None:
        with closing(Ledger.open(path)) as ledger:
            ledger.reserve(asked(), LIMIT)

        def other(kind: str, body: dict[str, Any]) -> None:
            if kind == "reserve":
                body["charges"][0]["parts"][0]["event"] = event

        rewritten(path, other)
        with pytest.raises(DamagedError) as told:
            verify(path)
        assert is_of_one_line(told.value, path)

    def test_it_writes_nothing(self, used: Path) -> None:
        before = used.read_bytes()
        verify(used)
        assert used.read_bytes() == before


DATASETS: Mapping[str, Lifetime] = {
    "heart": Lifetime(0.6, 3e-6),
    "lung": Lifetime(0.7, 1e-5, "rdp"),
}
RUNS = st.sampled_from(["a", "b", "c", "d", "e", "f"])
SIDES: tuple[Side, ...] = ("training", "holdout")


class Ledgers(RuleBasedStateMachine):
    """Two processes at one ledger, against a model that keeps what it must have kept.

    The model knows of each run what it asked for, and of each part what was committed.
    """

    folder: Path
    made = 0

    @initialize()
    def begin(self) -> None:
        type(self).made += 1
        self.path = self.folder / f"{self.made}.sqlite"
        Ledger.create(self.path, "st-mary")
        self.handles = [Ledger.open(self.path), Ledger.open(self.path)]
        self.orders: dict[str, Order] = {}
        self.closed: set[str] = set()
        self.committed: dict[str, list[int]] = {}
        self.entries = 1

    def teardown(self) -> None:
        """Reading the file anew gives the books that each process has; the file verifies."""
        books = [handle.read() for handle in self.handles]
        for handle in self.handles:
            handle.close()
        assert books[0] == books[1] == fresh(self.path)
        verify(self.path)
        found = [json.loads(row.body) for row in rows(self.path) if row.kind == "commit"]
        assert Counter((body["run_id"], body["index"]) for body in found) == Counter(
            (run_id, index) for run_id, indices in self.committed.items() for index in indices
        )

    def spent(self, dataset_id: str, side: Side, extra: Order | None = None) -> Fraction:
        """What the account must stand at, with one more run."""
        lifetime = DATASETS[dataset_id]
        orders = [*self.orders.values(), *([extra] if extra else [])]
        found = [
            (order.run_id, charge)
            for order in orders
            for charge in order.charges
            if (order.dataset_id, charge.side) == (dataset_id, side)
        ]
        if lifetime.composition == "addition":
            return sum((Fraction(repr(charge.epsilon)) for _, charge in found), Fraction(0))
        events = Counter[dp_accounting.DpEvent]()
        for run_id, charge in found:
            (part,) = charge.parts
            indices = self.committed.get(run_id, [])
            left = 0 if run_id in self.closed else part.count - max(indices, default=0)
            events[part.each.event] += len(indices) + left
        return Fraction(filter_epsilon(events, lifetime.delta)) if +events else Fraction(0)

    @rule(
        handle=st.integers(0, 1),
        run_id=RUNS,
        dataset_id=st.sampled_from(sorted(DATASETS)),
        side=st.sampled_from(SIDES),
        epsilon=st.sampled_from([0.1, 0.2, 0.3]),
        count=st.integers(1, 6),
        noise=st.sampled_from([20.0, 25.0]),
    )
    def reserve(
        self, handle: int, run_id: str, dataset_id: str, side: Side, epsilon: float, count: int,
        noise: float,
    ) -> None:  # fmt: skip
        lifetime = DATASETS[dataset_id]
        # By its sum of epsilons a run is dear or cheap, and by its noise: what it states is true.
        if lifetime.composition == "addition":
            noise *= 5
        else:
            epsilon += 0.5
        order = asked(run_id, epsilon, count, side=side, noise=noise, dataset_id=dataset_id)
        ledger = self.handles[handle]
        if run_id in self.orders:
            if self.orders[run_id] != order:
                with pytest.raises(TermsError):
                    ledger.reserve(order, lifetime)
            elif run_id in self.closed:
                with pytest.raises(BudgetError, match="is closed"):
                    ledger.reserve(order, lifetime)
            else:
                ledger.reserve(order, lifetime)
            return
        assert lifetime.epsilon is not None
        if self.spent(dataset_id, side, order) > Fraction(repr(lifetime.epsilon)):
            with pytest.raises(BudgetError, match=f"account {dataset_id}/record/{side}: epsilon"):
                ledger.reserve(order, lifetime)
        elif lifetime.composition == "addition" and self.delta(dataset_id, side, order) > 3:
            with pytest.raises(BudgetError, match=f"account {dataset_id}/record/{side}: delta"):
                ledger.reserve(order, lifetime)
        else:
            ledger.reserve(order, lifetime)
            self.orders[run_id] = order
            self.entries += 1

    def delta(self, dataset_id: str, side: Side, extra: Order) -> int:
        """In millionths."""
        return sum(
            (order.dataset_id, charge.side) == (dataset_id, side)
            for order in [*self.orders.values(), extra]
            for charge in order.charges
        )

    @rule(
        handle=st.integers(0, 1),
        run_id=RUNS,
        indices=st.lists(st.integers(0, 7), min_size=1, max_size=3),
        following=st.booleans(),
    )
    def commit(self, handle: int, run_id: str, indices: list[int], following: bool) -> None:
        ledger, done = self.handles[handle], self.committed.get(run_id, [])
        last = max(done, default=0)
        if following:
            indices = [last + 1 + place for place in range(len(indices))]
        rising = all(a < b for a, b in zip([last, *indices], indices, strict=False))
        order = self.orders.get(run_id)
        reserved = order.charges[0].parts[0].count if order else 0
        releases = [("rounds", index) for index in indices]
        if run_id in self.closed or not rising or indices[-1] > reserved:
            with pytest.raises(BudgetError, match=f"run {run_id}"):
                ledger.commit(run_id, releases)
        else:
            self.entries += len(indices)
            assert ledger.commit(run_id, releases).number == self.entries
            self.committed[run_id] = [*done, *indices]

    @rule(handle=st.integers(0, 1), run_id=RUNS)
    def end(self, handle: int, run_id: str) -> None:
        if run_id not in self.orders:
            with pytest.raises(BudgetError):
                self.handles[handle].end(run_id)
        elif run_id not in self.closed:
            self.handles[handle].end(run_id)
            self.closed.add(run_id)
            self.entries += 1

    @rule(handle=st.integers(0, 1))
    def reopen(self, handle: int) -> None:
        self.handles[handle].close()
        self.handles[handle] = Ledger.open(self.path)

    @invariant()
    def the_figures_are_the_models_and_within_the_limit(self) -> None:
        if not hasattr(self, "orders"):
            return
        for ledger in self.handles:
            books = ledger.read()
            assert books.head.number == self.entries
            for statement in books.statements():
                account, limit = statement.account, statement.lifetime.epsilon
                assert statement.lifetime == DATASETS[account.dataset_id]
                assert statement.epsilon is not None
                assert limit is not None
                assert 0 <= statement.epsilon <= limit
                assert 0 < statement.delta <= statement.lifetime.delta
                assert statement.epsilon == pytest.approx(
                    float(self.spent(account.dataset_id, account.side)), rel=1e-12
                )

    @precondition(lambda self: any(self.committed.values()))
    @rule()
    def what_was_released_never_cost_more_than_the_figure(self) -> None:
        """Held against dp_accounting, with all orders and all of delta."""
        for statement in self.handles[0].read().statements():
            if statement.lifetime.composition == "rdp":
                accountant = dp_accounting.rdp.RdpAccountant([*range(2, 65)])
                for order in self.orders.values():
                    for charge in order.charges:
                        if (order.dataset_id, charge.side) == (
                            statement.account.dataset_id, statement.account.side,
                        ):  # fmt: skip
                            for _ in self.committed.get(order.run_id, []):
                                accountant.compose(charge.parts[0].each.event)
                real = accountant.get_epsilon(statement.lifetime.delta)
                assert statement.epsilon is not None
                assert real <= statement.epsilon


def test_any_sequence_against_a_model(tmp_path: Path) -> None:
    class Here(Ledgers):
        folder = tmp_path

    run_state_machine_as_test(Here, settings=settings(max_examples=25, stateful_step_count=30))
