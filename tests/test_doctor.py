"""What is installed, what is missing, what would fail: each answer by hand."""

import json
import os
import sys
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from fedveil import cli, doctor, machine
from fedveil.cli.doctor import _print_table
from fedveil.doctor import Check

GIB = 2**30
SHARED = "/dev/shm"  # noqa: S108
NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
OFF = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
LOADED: dict[str, Any] = {"cuda": None, "devices": [], "environment": OFF}


def listing(folder: Path) -> set[Path]:
    """Everything below a folder."""
    return set(folder.rglob("*"))


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow part is left out."""
    monkeypatch.setattr(doctor, "child", lambda _: nullcontext("not started"))


class TestPackages:
    @pytest.mark.parametrize(
        ("version", "state", "found"),
        [
            ("2.13.1", "ok", "2.13.1"),
            ("2.13.0+cpu", "ok", "2.13.0+cpu"),
            ("2.14.0", "missing", "2.14.0, outside <2.14,>=2.13"),
            ("2.12.9", "missing", "2.12.9, outside <2.14,>=2.13"),
            (None, "missing", "not installed"),
        ],
    )
    def test_a_version_is_held_against_its_range(
        self, version: str | None, state: str, found: str
    ) -> None:
        check = doctor.package(Requirement("torch>=2.13,<2.14"), version)
        assert (check.state, check.found) == (state, found)
        assert check.mend == ("" if state == "ok" else 'pip install "torch<2.14,>=2.13"')

    def test_the_list_is_the_metadatas_own_without_extras(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = ["typer>=0.1", "no-such-package>=3", 'ray>=1; extra == "ray"']
        monkeypatch.setattr(metadata, "requires", lambda _: asked)
        found = {check.name: check.state for check in doctor.packages()}
        assert found == {"python": "ok", "typer": "ok", "no-such-package": "missing"}

    def test_another_python_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "version_info", (3, 12, 1))
        check = doctor.packages()[0]
        assert (check.name, check.state) == ("python", "missing")
        assert check.found.startswith("3.12.1, outside")

    def test_fedveil_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def gone(name: str) -> None:
            raise metadata.PackageNotFoundError(name)

        monkeypatch.setattr(metadata, "metadata", gone)
        assert [(c.name, c.state) for c in doctor.packages()] == [("fedveil", "missing")]

    def test_no_packaging(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "packaging.requirements", None)
        assert [(c.name, c.mend) for c in doctor.packages()] == [
            ("packaging", "pip install packaging")
        ]


class TestProgram:
    def test_what_does_not_load_is_missing(self) -> None:
        (check,) = doctor.loaded("ImportError: libcudnn.so.9")
        assert (check.state, check.found) == (
            "missing",
            "does not load: ImportError: libcudnn.so.9",
        )

    def test_what_loads(self) -> None:
        assert [(c.name, c.state) for c in doctor.loaded(LOADED)] == [
            ("program", "ok"),
            ("gpu", "ok"),
            ("telemetry", "ok"),
        ]


class TestGpu:
    DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Tue Jan 14 2026"

    def test_name_memory_driver(self) -> None:
        check = doctor.gpu("12.8", [("NVIDIA H200", 139 * GIB)], self.DRIVER)
        assert check == Check("gpu", "ok", "NVIDIA H200 with 139 GiB, driver 570.86.15, CUDA 12.8")

    def test_none_is_no_fault(self) -> None:
        assert doctor.gpu(None, [], "") == Check("gpu", "ok", "none; everything runs on the CPU")

    def test_a_driver_that_torch_does_not_use(self) -> None:
        check = doctor.gpu(None, [], self.DRIVER)
        assert check.state == "warning"
        assert check.found == "torch sees none (CPU build), but there is driver 570.86.15"
        assert "CUDA build" in check.mend


class TestTelemetry:
    @pytest.mark.parametrize(
        ("environment", "within", "state", "word"),
        [
            ({}, OFF, "ok", "off"),
            ({"FLWR_TELEMETRY_ENABLED": "0"}, OFF, "ok", "off"),
            ({"FLWR_TELEMETRY_ENABLED": "1"}, OFF, "warning", "FLWR_TELEMETRY_ENABLED turns it on"),
            ({"RAY_USAGE_STATS_ENABLED": "1"}, OFF, "warning", "RAY_USAGE_STATS_ENABLED turns"),
            ({}, OFF | {"FLWR_TELEMETRY_ENABLED": None}, "warning", "is not off in Fedveil"),
        ],
    )
    def test_a_variable_that_turns_it_on_is_named(
        self, environment: dict[str, str], within: dict[str, str | None], state: str, word: str
    ) -> None:
        check = doctor.telemetry(environment, within)
        assert check.state == state
        assert word in check.found
        assert bool(check.mend) == (state == "warning")


class TestRay:
    WANTED = Requirement("ray==2.55.1")

    @pytest.fixture(autouse=True)
    def _asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "_version", lambda _: "2.55.1")
        monkeypatch.setattr(doctor, "_wanted_of_ray", lambda: self.WANTED)

    def test_whole(self) -> None:
        check = doctor.optional_ray({"version": "2.55.1"}, 2 * GIB)
        assert check == Check("ray", "ok", f"2.55.1, {SHARED} has 2.0 GiB free")

    @pytest.mark.parametrize(
        ("told", "shared", "found"),
        [
            ("ImportError: x", 2 * GIB, "does not load: ImportError: x"),
            ({"version": "2.50.0"}, 2 * GIB, "2.50.0, outside ==2.55.1"),
            ({"version": "2.55.1"}, 64 * 2**20, f"{SHARED} has 64 MiB free; too little"),
        ],
    )
    def test_what_troubles_it_is_a_warning(
        self, told: dict[str, str] | str, shared: int, found: str
    ) -> None:
        check = doctor.optional_ray(told, shared)
        assert (check.state, check.found) == ("warning", found)
        assert check.mend

    def test_it_is_optional(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(doctor, "_version", lambda _: None)
        check = doctor.optional_ray("not there", 0)
        assert (check.state, check.found) == ("ok", "not installed; it is optional")

    def test_the_range_is_flowers_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        asked = ["grpcio>=1", 'ray==1.2.3; extra == "simulation"', 'ray==9; extra == "other"']
        monkeypatch.setattr(metadata, "requires", lambda _: asked)
        assert str(doctor._wanted_of_ray().specifier) == "==1.2.3"


class TestMachine:
    @pytest.mark.parametrize(
        ("usable", "allowed", "state"), [(4, None, "ok"), (4, 4.0, "ok"), (4, 1.5, "warning")]
    )
    def test_cores(self, usable: int, allowed: float | None, state: str) -> None:
        assert doctor.cores(usable, allowed).state == state

    @pytest.mark.parametrize(
        ("free", "state", "found"),
        [
            (8 * GIB, "ok", "8.0 GiB free"),
            (int(1.5 * GIB), "warning", "1.5 GiB free"),
            (500 * 2**20, "missing", "500 MiB free; a run needs 1 GiB"),
        ],
    )
    def test_memory(self, free: int, state: str, found: str) -> None:
        check = doctor.memory(free)
        assert (check.state, check.found, bool(check.mend)) == (state, found, state != "ok")

    @pytest.mark.parametrize(
        ("free", "state"), [(GIB, "ok"), (GIB - 1, "warning"), (50 * 2**20, "missing")]
    )
    def test_disk(self, free: int, state: str) -> None:
        check = doctor.disk(Path("runs"), free)
        assert (check.state, bool(check.mend)) == (state, state != "ok")

    @pytest.mark.parametrize(
        ("ahead", "state"),
        [
            (timedelta(days=-30), "ok"),
            (timedelta(minutes=4), "ok"),
            (timedelta(hours=1), "warning"),
        ],
    )
    def test_a_clock_before_the_installation_is_wrong(self, ahead: timedelta, state: str) -> None:
        assert doctor.clock(NOW, NOW + ahead).state == state

    @pytest.mark.parametrize(
        ("told", "state", "found"),
        [
            (0, "ok", "keeps the clock"),
            (5, "warning", "none is known to keep the clock"),
            (None, "ok", "not known here"),
        ],
    )
    def test_time_server(self, told: int | None, state: str, found: str) -> None:
        check = doctor.time_server(told)
        assert (check.state, check.found) == (state, found)

    @pytest.mark.parametrize(
        ("limit", "state", "found"),
        [
            (1024, "ok", "1024, enough for 320 sites"),
            (90, "missing", "90, enough for 8 sites"),
            (10, "missing", "10, enough for 0 sites"),
            (-1, "ok", "no limit"),
        ],
    )
    def test_open_files(self, limit: int, state: str, found: str) -> None:
        check = doctor.open_files(limit)
        assert (check.state, check.found) == (state, found)

    def test_entropy(self) -> None:
        assert doctor.entropy().state == "ok"

    def test_a_generator_that_repeats_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "getrandom", lambda count, _: bytes(count))
        assert doctor.entropy().state == "missing"

    def test_a_generator_that_is_not_seeded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def waits(count: int, flags: int) -> bytes:
            raise BlockingIOError

        monkeypatch.setattr(os, "getrandom", waits)
        assert doctor.entropy().state == "missing"


class TestFolder:
    def test_all_is_tried_and_nothing_left(self, tmp_path: Path) -> None:
        before = listing(tmp_path)
        checks = doctor.folder("run folder", tmp_path / "new" / "runs")
        assert [c.name for c in checks] == ["run folder", *machine.TRIALS, "durability"]
        assert {c.state for c in checks[:-1]} == {"ok"}
        assert listing(tmp_path) == before

    @pytest.mark.parametrize("below", ["", "runs"])
    def test_a_file_in_its_place(self, below: str, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (check,) = doctor.folder("run folder", tmp_path / "file" / below)
        assert check.state == "missing"
        assert "cannot be written (Not a directory)" in check.found
        assert "--out" in check.mend

    def test_a_trial_that_fails_is_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuses(place: Path) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setitem(machine.TRIALS, "hard links", refuses)
        checks = {c.name: c for c in doctor.folder("run folder", tmp_path)}
        assert checks["hard links"].state == "missing"
        assert "Operation not permitted" in checks["hard links"].found
        assert checks["file locks"].state == "ok"
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("kind", "environment", "state"),
        [
            ("ext4", {}, "ok"),
            ("", {}, "ok"),
            ("tmpfs", {}, "warning"),
            ("nfs4", {}, "warning"),
            ("ext4", {"LD_PRELOAD": "/usr/lib/libeatmydata.so"}, "warning"),
        ],
    )
    def test_durability(self, kind: str, environment: dict[str, str], state: str) -> None:
        check = doctor.durability(kind, environment)
        assert (check.state, bool(check.mend)) == (state, state == "warning")

    def test_no_temporary_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def none() -> str:
            raise FileNotFoundError(2, "No usable temporary directory found")

        monkeypatch.setattr("tempfile.gettempdir", none)
        (check,) = doctor.temporary()
        assert (check.state, "TMPDIR" in check.mend) == ("missing", True)


class TestAll:
    def test_this_environment_can_simulate(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """For real, with its processes: nothing is missing here, and nothing stays behind."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", None)
        checks = doctor.examine(Path("runs"))
        assert [c for c in checks if c.state == "missing"] == []
        assert doctor.whole(checks)
        assert list(tmp_path.iterdir()) == []
        names = [c.name for c in checks]
        assert len(set(names)) == len(names)
        assert {"python", "torch", "program", "gpu", "telemetry", "memory", "clock"} <= set(names)

    @pytest.mark.usefixtures("no_processes")
    def test_it_never_raises(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*_: object) -> None:
            raise RuntimeError("odd\nmachine")

        looks = (
            "packages",
            "cores_allowed",
            "memory_available",
            "entropy",
            "clock_state",
            "folder",
        )
        for name in looks:
            monkeypatch.setattr(doctor, name, fails)
        found = {c.name: c for c in doctor.examine(tmp_path)}
        for name in ("packages", "cores", "memory", "run folder", "time server", "entropy"):
            told = "could not be looked at (RuntimeError: odd machine)"
            assert found[name] == Check(name, "warning", told)
        assert found["program"].found == "does not load: not started"


class TestCommand:
    CHECKS = (Check("python", "ok", "3.11.7"), Check("clock", "warning", "late [red]", "set it"))
    LACKS = (*CHECKS, Check("torch", "missing", "not installed", 'pip install "torch"'))

    def call(
        self, checks: tuple[Check, ...], arguments: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> int:
        """The exit code."""
        monkeypatch.setattr(doctor, "examine", lambda _: list(checks))
        monkeypatch.setattr(sys, "argv", ["fedveil", "doctor", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    def test_lines(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.call(self.LACKS, [], monkeypatch) == 1
        assert capsys.readouterr().out.splitlines() == [
            "ok       python           3.11.7",
            "warning  clock            late [red]; mend: set it",
            'missing  torch            not installed; mend: pip install "torch"',
        ]

    def test_warnings_are_no_failure(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.call(self.CHECKS, ["--json"], monkeypatch) == 0
        out = json.loads(capsys.readouterr().out)
        assert out["ok"] is True
        assert out["checks"][1] == {
            "name": "clock",
            "state": "warning",
            "found": "late [red]",
            "mend": "set it",
        }

    def test_json_of_a_machine_that_lacks_something(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.call(self.LACKS, ["--json"], monkeypatch) == 1
        assert json.loads(capsys.readouterr().out)["ok"] is False

    def test_the_table_keeps_brackets(self, capsys: pytest.CaptureFixture[str]) -> None:
        _print_table(list(self.LACKS))
        out = capsys.readouterr().out
        assert "late [red]" in out
        assert "missing" in out
