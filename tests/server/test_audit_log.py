"""The audit log: a chain that shows any change, and that a crash does not break."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedveil.config import ConfigError, FedveilError
from fedveil.server import audit_log
from fedveil.server.audit_log import GENESIS, AuditLog, entries, parse_receipt, verify

MANY = """
import sys
from pathlib import Path
from fedveil.server.audit_log import AuditLog
log = AuditLog(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
for number in range(200):
    log.append(sys.argv[2], "operator", "list", str(number), "allowed")
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A log of five calls."""
    file = tmp_path / "audit.jsonl"
    log = AuditLog(file)
    for number in range(1, 6):
        log.append("olga", "operator", "cancel", f"run {number}", "allowed")
    return file


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def write(path: Path, found: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in found))


def test_a_chain(path: Path) -> None:
    found = list(entries(path))
    assert [one.number for one in found] == [1, 2, 3, 4, 5]
    assert [one.previous for one in found] == [GENESIS, *(one.hash for one in found[:-1])]
    verified = verify(path)
    assert (verified.count, verified.head, verified.torn) == (5, found[-1].hash, 0)


def test_it_goes_on_after_what_is_there(path: Path) -> None:
    AuditLog(path).append("ada", "auditor", "list", "", "allowed")
    assert verify(path).count == 6


def test_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    AuditLog(tmp_path / "log")
    assert (verify(tmp_path / "log").count, verify(tmp_path / "log").head) == (0, GENESIS)


@pytest.mark.parametrize(
    "field",
    ["number", "time", "member", "role", "call", "about", "outcome", "previous", "hash"],
)
@pytest.mark.parametrize("line", [1, 3, 5])
def test_a_field_that_was_changed(path: Path, field: str, line: int) -> None:
    found = lines(path)
    entry = json.loads(found[line - 1])
    entry[field] = entry[field] + 1 if field == "number" else entry[field][::-1] + "0"
    found[line - 1] = json.dumps(entry, separators=(",", ":"))
    write(path, found)
    with pytest.raises(FedveilError, match=f"line {line}:"):
        verify(path)
    with pytest.raises(FedveilError, match=f"line {line}:"):
        AuditLog(path)


def test_a_changed_entry_with_a_hash_of_its_own(path: Path) -> None:
    """Its own line is right then, and the next one tells."""
    forged = path.with_name("forged")
    log = AuditLog(forged)
    for number in range(1, 6):
        log.append("olga", "operator", "cancel", f"run {9 * number}", "allowed")
    found = lines(path)
    found[1] = lines(forged)[1]
    write(path, found)
    with pytest.raises(FedveilError, match="line 2:"):
        verify(path)


Change = Callable[[list[str]], list[str]]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda found: found[1:], 1),
        (lambda found: found[:2] + found[3:], 3),
        (lambda found: [*found[:2], found[2], *found[2:]], 4),
        (lambda found: [found[1], found[0], *found[2:]], 1),
        (lambda found: [*found[:4], ""], 5),
        (lambda found: [*found[:4], "null"], 5),
        (lambda found: [*found[:4], found[4].replace(',"', ', "', 1)], 5),
        (lambda found: [*found[:4], found[4][:-1] + ',"hash":"0"}'], 5),
        (lambda found: [*found[:4], "[" * 100_000], 5),
    ],
)
def test_lines_that_were_removed_moved_or_written_otherwise(
    path: Path, change: Change, line: int
) -> None:
    write(path, change(lines(path)))
    with pytest.raises(FedveilError, match=f"line {line}:"):
        verify(path)


class TestATornEnd:
    @pytest.mark.parametrize("kept", [1, 40, -1])
    def test_it_is_told_and_healed(self, path: Path, kept: int) -> None:
        last = lines(path)[-1]
        write(path, lines(path)[:-1])
        with path.open("a") as opened:
            opened.write(last[:kept])
        assert (verify(path).count, verify(path).torn) == (4, len(last[:kept]))
        entry = AuditLog(path).append("ada", "auditor", "list", "", "allowed")
        found = list(entries(path))
        assert (verify(path).count, verify(path).torn, entry.number) == (6, 0, 6)
        assert (found[4].member, found[4].call) == ("server", "log")
        assert f"{len(last[:kept])} bytes" in found[4].outcome

    def test_of_the_very_first_entry(self, tmp_path: Path) -> None:
        (tmp_path / "log").write_text('{"number":')
        assert AuditLog(tmp_path / "log").append("a", "site", "roster", "", "allowed").number == 2

    def test_what_is_no_log_is_left_alone(self, path: Path) -> None:
        log = AuditLog(path)
        with path.open("a") as opened:
            opened.write("hello\n")
        before = path.read_bytes()
        with pytest.raises(FedveilError, match="no entry"):
            log.append("ada", "auditor", "list", "", "allowed")
        assert path.read_bytes() == before


def test_a_cut_off_end_is_shown_by_a_receipt(path: Path) -> None:
    known = [(one.number, one.hash) for one in entries(path)]
    for receipt in known:
        assert verify(path, receipt).count == 5
    write(path, lines(path)[:3])
    assert verify(path, known[2]).count == 3
    for receipt in (known[3], (3, "0" * 64), (2, known[2][1])):
        with pytest.raises(FedveilError, match=f"entry {receipt[0]} of the receipt"):
            verify(path, receipt)


def test_the_longest_entry_is_found_again(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log")
    for _ in range(3):
        log.append(*("\U0001f600" * 9000 for _ in range(5)))
    assert verify(tmp_path / "log").count == 3


def test_two_processes_at_once(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    command = [sys.executable, "-P", "-c", MANY, str(path)]
    processes = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for name in ("olga", "otto")
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()  # both begin here
    for process in processes:
        with process:
            assert process.wait(60) == 0
    assert verify(path).count == 400


def test_a_number_that_was_left_out(path: Path) -> None:
    """With the right hashes: somebody wrote the end anew."""
    with path.open("ab", buffering=0) as opened:
        audit_log._add(opened, 8, verify(path).head, ("olga", "operator", "list", "", "allowed"))
    with pytest.raises(FedveilError, match="line 6: does not follow"):
        verify(path)


class TestTheCommand:
    def test_whole(self, call: Callable[..., Any], path: Path) -> None:
        head = verify(path).head
        assert call("audit", "log", path) == (0, f"{path}: whole, 5 entries, head {head}\n", "")
        result = call("audit", "log", path, "--json", "--receipt", f"5:{head}")
        assert json.loads(result.out) == {"whole": True, "count": 5, "head": head, "torn": 0}

    def test_broken(self, call: Callable[..., Any], path: Path) -> None:
        write(path, lines(path)[1:])
        result = call("audit", "log", path)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith(f"error: {path}, line 1:")

    def test_torn(self, call: Callable[..., Any], path: Path) -> None:
        with path.open("a") as opened:
            opened.write("{")
        assert "1 bytes after them" in call("audit", "log", path).out

    @pytest.mark.parametrize("receipt", ["5", "0:" + "0" * 64, "5:xyz"])
    def test_wrong_calls(self, call: Callable[..., Any], path: Path, receipt: str) -> None:
        assert call("audit", "log", path, "--receipt", receipt).code == 2
        with pytest.raises(ConfigError):
            parse_receipt(receipt)
        assert call("audit", "log", "gone").code == 2
