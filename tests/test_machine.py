"""Facts of the machine: limits of containers, kinds of disks, processes, and what a disk can do."""

import fcntl
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from fedveil import machine

GIB = 2**30


def put(folder: Path, files: dict[str, str]) -> Path:
    """Files below a folder, by their path in it."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return folder


class TestLimits:
    @pytest.mark.parametrize(
        ("files", "membership", "cores"),
        [
            ({"job/cpu.max": "150000 100000"}, "0::/job", 1.5),
            ({"job/cpu.max": "max 100000"}, "0::/job", None),
            ({"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 0.5),
            ({"cpu.max": "200000 100000"}, "0::/of/the/host", 2.0),
            ({"cpu/job/cpu.cfs_quota_us": "-1"}, "4:cpu,cpuacct:/job", None),
            (
                {"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "100000"},
                "4:cpu,cpuacct:/job\n3:memory:/other",
                0.5,
            ),
            ({}, "", None),
        ],
    )
    def test_cores(
        self, files: dict[str, str], membership: str, cores: float | None, tmp_path: Path
    ) -> None:
        assert machine.cores_allowed(put(tmp_path, files), membership) == cores

    def test_the_groups_own_limit_counts_not_the_hosts_memory(self, tmp_path: Path) -> None:
        """Three of limit, two used, of which the kernel gives a half back."""
        files = {
            "job/memory.max": str(3 * GIB),
            "job/memory.current": str(2 * GIB),
            "job/memory.stat": f"anon 5\ninactive_file {GIB // 2}",
        }
        host = f"MemTotal: 99 kB\nMemAvailable:   {20 * GIB // 1024} kB"
        assert machine.memory_available(put(tmp_path, files), "0::/job", host) == 1.5 * GIB

    def test_the_hosts_memory_counts_where_no_limit_is_lower(self, tmp_path: Path) -> None:
        files = {
            "memory/job/memory.limit_in_bytes": "9223372036854771712",
            "memory/job/memory.usage_in_bytes": "4096",
        }
        found = machine.memory_available(
            put(tmp_path, files), "4:memory:/job", "MemAvailable: 7 kB"
        )
        assert found == 7 * 1024

    def test_more_used_than_allowed_is_nothing_left(self, tmp_path: Path) -> None:
        files = {"memory.max": "100", "memory.current": "130"}
        assert machine.memory_available(put(tmp_path, files), "0::/", "MemAvailable: 7 kB") == 0

    def test_no_answer_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="neither"):
            machine.memory_available(tmp_path, "", "nothing")

    def test_of_this_machine(self) -> None:
        assert machine.memory_available() > 0
        assert (machine.cores_allowed() or 1) > 0

    @pytest.mark.parametrize(
        ("usable", "allowed", "cores"),
        [(8, None, 8), (8, 2.0, 2), (8, 2.6, 3), (8, 0.5, 1), (8, 0.1, 1), (2, 16.0, 2)],
    )
    def test_the_smaller_of_what_it_may_run_on_and_its_share(
        self, usable: int, allowed: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(usable)))
        monkeypatch.setattr(machine, "cores_allowed", lambda: allowed)
        assert machine.cores() == cores


class TestFileSystem:
    MOUNTS = (
        "27 1 254:0 / / rw - ext4 /dev/vda rw\n"
        "30 27 0:27 / /data rw shared:1 - xfs /dev/b rw\n"
        "31 27 0:28 / /data rw - nfs4 server:/x rw\n"
        r"32 27 0:29 / /my\040disk rw - tmpfs none rw"
    )

    @pytest.mark.parametrize(
        ("place", "kind"),
        [("/home", "ext4"), ("/data/runs", "nfs4"), ("/database", "ext4"), ("/my disk/a", "tmpfs")],
    )
    def test_of_the_nearest_mount(self, place: str, kind: str) -> None:
        assert machine.file_system(Path(place), self.MOUNTS) == kind

    def test_unknown(self) -> None:
        assert machine.file_system(Path("/home"), "") == ""


class TestProcesses:
    @pytest.mark.parametrize(
        ("code", "told"),
        [
            ("print('noise'); print('{\"a\": 1}')", {"a": 1}),
            ("import gone_package", "ModuleNotFoundError: No module named 'gone_package'"),
            ("import os; os.kill(os.getpid(), 11)", "killed by signal 11"),
            ("pass", "it printed nothing"),
        ],
    )
    def test_answers(self, code: str, told: object) -> None:
        with machine.child(code) as started:
            assert machine.answer(started) == told

    def test_one_that_hangs_is_ended(self) -> None:
        with machine.child("import threading; threading.Event().wait()") as started:
            assert machine.answer(started, patience=0.01) == "no answer in 0.01 s"
        assert not isinstance(started, str)
        assert started.returncode == -9

    def test_modules_of_the_folder_are_not_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As in our own repository, whose `config` and `client` are no packages of others."""
        put(tmp_path, {"json.py": "raise SystemExit(3)"})
        monkeypatch.chdir(tmp_path)
        with machine.child("import json; print(json.dumps({}))") as started:
            assert machine.answer(started) == {}

    def test_none_can_be_started(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.executable", "/gone/python")
        with machine.child("pass") as started:
            assert machine.answer(started) == (
                "no process can be started (No such file or directory)"
            )


@pytest.mark.parametrize("name", machine.TRIALS)
def test_the_disk_of_the_tests_passes_every_trial(name: str, tmp_path: Path) -> None:
    machine.TRIALS[name](tmp_path)


def copied(source: Path, target: Path) -> None:
    """A link as on a disk that has none."""
    if target.exists():
        raise FileExistsError
    target.write_bytes(source.read_bytes())


def replacing(source: Path, target: Path) -> None:
    """A link as on a disk that asks nobody."""
    target.write_bytes(source.read_bytes())


connect = sqlite3.connect


@pytest.mark.parametrize(
    ("name", "broken", "told"),
    [
        ("hard links", lambda p: p.setattr(os, "link", copied), "a link is a copy"),
        ("hard links", lambda p: p.setattr(os, "link", replacing), "replaces another file"),
        ("file locks", lambda p: p.setattr(fcntl, "flock", lambda *_: None), "two hold one lock"),
        (
            "SQLite WAL",
            lambda p: p.setattr(sqlite3, "connect", lambda _, **how: connect(":memory:", **how)),
            "kept as memory, not as WAL",
        ),
        (
            "fsync",
            lambda p: p.setattr(machine, "replace_file", lambda path, _: path.write_bytes(b"old")),
            "cannot be read back",
        ),
    ],
)
def test_a_disk_that_lies_is_found_out(
    name: str,
    broken: Callable[[pytest.MonkeyPatch], None],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken(monkeypatch)
    with pytest.raises((OSError, sqlite3.Error), match=told):
        machine.TRIALS[name](tmp_path)


@pytest.mark.parametrize(
    ("kind", "shared"), [("ext4", False), ("overlay", False), ("nfs4", True), ("lustre", True)]
)
def test_a_disk_that_other_machines_share(
    kind: str, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder that is yet to be made it is where that will be."""
    lines = f"1 0 0:1 / / rw - ext4 /dev/a rw\n2 1 0:2 / {tmp_path} rw - {kind} server:/x rw"
    monkeypatch.setattr(machine, "read", lambda _: lines)
    assert machine.on_network(tmp_path / "yet" / "to be") is shared
    assert machine.on_network(Path("/")) is False
