"""The run folder: whole files or none, events one after the other, exact checkpoints."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from fedveil.config import ConfigError, FedveilError, RunConfig, read_toml, validated
from fedveil.data_prep import run_schema
from fedveil.data_prep.schema import schema_from_json
from fedveil.models.state import to_bytes
from fedveil.server import store
from fedveil.server.aggregation import ServerState
from fedveil.server.evaluation import Evaluated
from fedveil.server.store import Asked, Checkpoint, RunFolder, environment

MakeConfig = Callable[..., RunConfig]
TORN = [b"{", b'{"event": "rou', b'{"event": "round"}', b"\0" * 100, b"x" * 10_000, b"\xff"]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    """A new run folder, held by this process."""
    made = RunFolder(tmp_path / "run")
    with made.locked(resume=False):
        yield made


def files(folder: RunFolder) -> set[str]:
    """All files of a run folder but its lock."""
    paths = (p for p in folder.path.rglob("*") if p.is_file())
    return {str(path.relative_to(folder.path)) for path in paths} - {".lock"}


def refuse_disk(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Lets one system call fail as on a full disk."""

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner in (os, Path) if call == "open" else (os if call == "fsync" else Path,):
        monkeypatch.setattr(owner, call, fail)


HOLDER = """
import sys
from pathlib import Path
from fedveil.server.store import RunFolder
with RunFolder(Path(sys.argv[1])).locked(resume=False):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A second process that holds a run folder until it is killed or let go."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


class TestLocked:
    def test_a_new_folder_with_its_parents(self, tmp_path: Path) -> None:
        with RunFolder(tmp_path / "a" / "b").locked(resume=False):
            assert (tmp_path / "a" / "b" / "checkpoint").is_dir()

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with RunFolder(tmp_path).locked(resume=False):
            assert (tmp_path / "checkpoint").is_dir()

    def test_a_folder_that_holds_something(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
        with (
            pytest.raises(ConfigError, match=f"{tmp_path}: is not empty; choose another folder"),
            RunFolder(tmp_path).locked(resume=False),
        ):
            pass
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]

    def test_a_run_is_not_overwritten(self, folder: RunFolder) -> None:
        folder.append({"event": "run"})
        before = files(folder)
        with (
            pytest.raises(ConfigError, match=r"is not empty; .* or --resume what is in it"),
            folder.locked(resume=False),
        ):
            pass
        assert files(folder) == before
        assert list(folder.events()) == [{"event": "run"}]

    def test_nor_one_that_only_just_began(self, tmp_path: Path) -> None:
        """A lock and nothing else: the process was killed before it wrote anything."""
        (tmp_path / ".lock").touch()
        with (
            pytest.raises(ConfigError, match="not empty"),
            RunFolder(tmp_path).locked(resume=False),
        ):
            pass
        with RunFolder(tmp_path).locked(resume=True):
            assert (tmp_path / "checkpoint").is_dir()

    def test_a_run_is_resumed(self, tmp_path: Path) -> None:
        made = RunFolder(tmp_path / "run")
        with made.locked(resume=False):
            made.append({"event": "run"})
        with made.locked(resume=True):
            assert list(made.events()) == [{"event": "run"}]

    @pytest.mark.parametrize("there", [True, False])
    def test_what_never_began_begins(self, tmp_path: Path, there: bool) -> None:
        path = tmp_path if there else tmp_path / "run"
        with RunFolder(path).locked(resume=True):
            assert (path / "checkpoint").is_dir()

    def test_what_is_no_run_is_not_resumed(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
        with (
            pytest.raises(ConfigError, match=f"--resume {tmp_path}: holds no run; check the path"),
            RunFolder(tmp_path).locked(resume=True),
        ):
            pass
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]

    @pytest.mark.parametrize("resume", [True, False])
    @pytest.mark.parametrize("below", ["", "run", "deep/run"])
    def test_a_place_that_cannot_be_written(self, tmp_path: Path, below: str, resume: bool) -> None:
        file = tmp_path / "file"
        file.write_text("mine", encoding="utf-8")
        with (
            pytest.raises(ConfigError, match="cannot be written"),
            RunFolder(file / below).locked(resume=resume),
        ):
            pass
        assert file.read_text(encoding="utf-8") == "mine"

    @pytest.mark.parametrize("call", ["mkdir", "open", "fsync"])
    def test_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        refuse_disk(monkeypatch, call)
        with (
            pytest.raises(ConfigError, match=r"cannot be written .No space left on device"),
            RunFolder(tmp_path).locked(resume=False),
        ):
            pass

    def test_a_disk_that_fills_up_behind_the_lock(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mkdir = Path.mkdir

        def fail(
            self: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False
        ) -> None:
            if self.name == "checkpoint":
                raise OSError(errno.ENOSPC, "No space left on device")
            mkdir(self, mode, parents, exist_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", fail)
            with (
                pytest.raises(FedveilError, match=r"cannot be written .No space left on device"),
                RunFolder(tmp_path).locked(resume=False),
            ):
                pass
        with RunFolder(tmp_path).locked(resume=True):
            assert (tmp_path / "checkpoint").is_dir()

    def test_a_process_that_came_and_went_meanwhile(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the look at the folder and the lock: its run is not overwritten either."""
        path, flock = tmp_path / "run", fcntl.flock

        def late(lock: IO[str], how: int) -> None:
            (path / "config.toml").write_text("theirs", encoding="utf-8")
            flock(lock, how)

        monkeypatch.setattr(fcntl, "flock", late)
        with pytest.raises(ConfigError, match="not empty"), RunFolder(path).locked(resume=False):
            pass
        assert (path / "config.toml").read_text(encoding="utf-8") == "theirs"

    def test_one_process_at_a_time(self, tmp_path: Path) -> None:
        """The second one gets one line and changes nothing; a killed one holds nothing."""
        made = RunFolder(tmp_path / "run")
        with another_process(made.path) as process:
            before = files(made)
            for resume in (True, False):
                with pytest.raises(ConfigError) as caught, made.locked(resume=resume):
                    pass
                assert str(made.path) in str(caught.value)
                assert "\n" not in str(caught.value)
                busy = "another process is at it; wait for that one" in str(caught.value)
                assert busy or not resume
            assert files(made) == before
            process.kill()
            process.wait()
            with made.locked(resume=True):
                made.append({"event": "resumed"})
        assert list(made.events()) == [{"event": "resumed"}]

    def test_nor_does_one_that_let_go(self, tmp_path: Path) -> None:
        made = RunFolder(tmp_path / "run")
        for resume in (False, True, True):
            with made.locked(resume=resume):
                pass

    def test_one_that_failed_lets_go(self, tmp_path: Path) -> None:
        made = RunFolder(tmp_path / "run")
        with pytest.raises(RuntimeError), made.locked(resume=False):
            raise RuntimeError
        with made.locked(resume=True):
            pass

    def test_another_folder_is_free(self, folder: RunFolder, tmp_path: Path) -> None:
        with RunFolder(tmp_path / "other").locked(resume=False):
            folder.append({"event": "run"})


class TestWrite:
    def test_whole(self, folder: RunFolder) -> None:
        folder.write("a.bin", b"one")
        folder.write("a.bin", b"two")
        assert (folder.path / "a.bin").read_bytes() == b"two"
        assert files(folder) == {"a.bin"}

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_or_not_at_all(
        self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        folder.write("a.bin", b"one")
        with monkeypatch.context() as patch:
            refuse_disk(patch, call)
            with pytest.raises(FedveilError, match=r"a\.bin: cannot be written .No space"):
                folder.write("a.bin", b"two")
        assert (folder.path / "a.bin").read_bytes() == b"one"
        assert files(folder) == {"a.bin"}

    def test_it_is_on_the_disk_before_it_has_its_name(
        self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order: list[str] = []
        sync, replace = os.fsync, Path.replace

        def noted_sync(descriptor: int) -> None:
            order.append("sync")
            sync(descriptor)

        def noted_replace(self: Path, target: Path) -> Path:
            order.append("replace")
            return replace(self, target)

        monkeypatch.setattr(os, "fsync", noted_sync)
        monkeypatch.setattr(Path, "replace", noted_replace)
        folder.write("a.bin", b"one")
        assert order[:2] == ["sync", "replace"]

    def test_below_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine", encoding="utf-8")
        with pytest.raises(FedveilError, match="cannot be written"):
            RunFolder(tmp_path / "file" / "run").write("a.bin", b"one")

    def test_in_a_folder_that_is_gone(self, tmp_path: Path) -> None:
        with pytest.raises(FedveilError, match="cannot be written"):
            RunFolder(tmp_path / "gone").write("a.bin", b"one")


class TestJson:
    def test_round_trip(self, folder: RunFolder) -> None:
        folder.write_json("m.json", {"a": [1, None, 0.5], "b": "ä"})
        assert folder.read_json("m.json") == {"a": [1, None, 0.5], "b": "ä"}

    @pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b"\xff\xfe"])
    def test_missing_or_damaged(self, folder: RunFolder, content: bytes | None) -> None:
        if content is not None:
            (folder.path / "m.json").write_bytes(content)
        with pytest.raises(FedveilError, match=r"m\.json"):
            folder.read_json("m.json")


class TestEvents:
    def test_they_append(self, folder: RunFolder) -> None:
        for number in (1, 2):
            RunFolder(folder.path).append({"event": "round", "round": number})
        assert list(folder.events()) == [
            {"event": "round", "round": 1},
            {"event": "round", "round": 2},
        ]
        text = (folder.path / "events.jsonl").read_text(encoding="utf-8")
        assert [json.loads(line)["round"] for line in text.splitlines()] == [1, 2]

    def test_none(self, folder: RunFolder) -> None:
        with pytest.raises(FedveilError, match=r"events\.jsonl"):
            list(folder.events())

    def test_no_place_for_them(self, tmp_path: Path) -> None:
        with pytest.raises(FedveilError, match="cannot be written"):
            RunFolder(tmp_path / "gone").append({"event": "run"})

    @pytest.mark.parametrize("torn", TORN)
    def test_a_torn_last_line_is_left_out(self, folder: RunFolder, torn: bytes) -> None:
        """What a crash in the midst of `append` leaves."""
        folder.append({"event": "run"})
        with (folder.path / "events.jsonl").open("ab") as opened:
            opened.write(torn)
        assert list(folder.events()) == [{"event": "run"}]

    @pytest.mark.parametrize("torn", TORN)
    @pytest.mark.parametrize("whole", [0, 1, 3])
    def test_and_replaced_by_the_next_one(self, folder: RunFolder, torn: bytes, whole: int) -> None:
        kept = [{"event": "round", "round": number} for number in range(whole)]
        for event in kept:
            folder.append(event)
        with (folder.path / "events.jsonl").open("ab") as opened:
            opened.write(torn)
        folder.append({"event": "resumed"})
        assert list(folder.events()) == [*kept, {"event": "resumed"}]
        lines = (folder.path / "events.jsonl").read_bytes().splitlines()
        assert [json.loads(line) for line in lines] == [*kept, {"event": "resumed"}]

    def test_reading_changes_nothing(self, folder: RunFolder) -> None:
        file = folder.path / "events.jsonl"
        file.write_bytes(b'{"event": "run"}\n{"event": "rou')
        list(folder.events())
        assert file.read_bytes() == b'{"event": "run"}\n{"event": "rou'

    @pytest.mark.parametrize("line", [b'{"event": "rou', b"\0\0\0", b"\xff\xfe", b""])
    def test_a_torn_line_in_the_middle_is_an_error(self, folder: RunFolder, line: bytes) -> None:
        """No crash of ours leaves one: someone edited the file."""
        file = folder.path / "events.jsonl"
        file.write_bytes(b'{"event": "run"}\n' + line + b'\n{"event": "round"}\n')
        with pytest.raises(FedveilError, match=r"events\.jsonl, line 2: .* was edited") as caught:
            list(folder.events())
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("call", ["fsync", "open"])
    def test_a_full_disk_leaves_the_lines_before(
        self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        folder.append({"event": "run"})
        with monkeypatch.context() as patch:
            refuse_disk(patch, call)
            with pytest.raises(FedveilError, match=r"cannot be written .No space left on device"):
                folder.append({"event": "round", "round": 1})
        assert next(folder.events()) == {"event": "run"}
        folder.append({"event": "round", "round": 2})
        assert list(folder.events())[-1] == {"event": "round", "round": 2}

    def test_a_line_is_on_the_disk_before_it_is_told_of(
        self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[int] = []
        sync = os.fsync

        def noted(descriptor: int) -> None:
            synced.append(os.fstat(descriptor).st_size)
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", noted)
        folder.append({"event": "run"})
        assert synced[:1] == [(folder.path / "events.jsonl").stat().st_size]


class TestAsked:
    def test_nothing_at_first(self, folder: RunFolder) -> None:
        assert folder.asked() == Asked(round=0, evaluation=0)

    def test_the_last_note_counts(self, folder: RunFolder) -> None:
        for note in (Asked(0, 0, 1), Asked(1, 0, 1), Asked(2, 1, 1), Asked(3, 1, 1)):
            folder.ask(note)
            assert RunFolder(folder.path).asked() == note

    @pytest.mark.parametrize("call", ["fsync", "replace", "open"])
    def test_it_is_durable_or_an_error(
        self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        """Nobody may be asked on the strength of a note that a power cut takes back."""
        folder.ask(Asked(1, 0))
        with monkeypatch.context() as patch:
            refuse_disk(patch, call)
            with pytest.raises(FedveilError, match=r"asked\.json: cannot be written .No space"):
                folder.ask(Asked(2, 1))
        assert folder.asked() == Asked(1, 0)

    def test_it_and_its_name_are_on_the_disk_when_it_returns(
        self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[str] = []
        sync, rename = os.fsync, Path.replace

        def noted_sync(descriptor: int) -> None:
            kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
            steps.append(f"sync {kind}")
            sync(descriptor)

        def noted_rename(self: Path, target: Path) -> Path:
            steps.append("rename")
            return rename(self, target)

        monkeypatch.setattr(os, "fsync", noted_sync)
        monkeypatch.setattr(Path, "replace", noted_rename)
        folder.ask(Asked(1, 0))
        assert steps == ["sync file", "rename", "sync folder"]

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"\0" * 34,
            b"[1, 0]",
            b"{}",
            b'{"round": 1}',
            b'{"round": 1, "evaluation": 0, "more": 0}',
            b'{"round": "1", "evaluation": 0}',
            b'{"round": 1.0, "evaluation": 0}',
            b'{"round": true, "evaluation": 0}',
            b'{"round": null, "evaluation": 0}',
        ],
    )
    def test_a_damaged_note_is_an_error(self, folder: RunFolder, content: bytes) -> None:
        """Never "nothing was asked": the sites would be asked for the same again."""
        folder.ask(Asked(1, 0))
        (folder.path / "checkpoint" / "asked.json").write_bytes(content)
        with pytest.raises(FedveilError, match=r"asked\.json") as caught:
            folder.asked()
        assert "\n" not in str(caught.value)


def state(number: int) -> ServerState:
    """A state with all its parts, of awkward values and shapes."""
    rng = np.random.default_rng(number)
    special = np.array([0.0, -0.0, 1e-45, 3.4e38, np.pi], dtype=np.float32)
    matrix = rng.normal(size=(2, 3)).astype(np.float32)
    return ServerState(
        round=number,
        steps=max(number - 2, 0),
        model={"a.weight": special, "b": matrix},
        average={"a.weight": special / 2, "b": matrix.T.copy().T},
        first={"b": matrix + 1},
        second={"b": matrix + 2, "empty": np.zeros((0, 4), dtype=np.float32)},
        clipping_norm=0.1 + number,
    )


def point(number: int) -> Checkpoint:
    """A checkpoint with something in every field."""
    sums = {"one_way": np.array([1 / 3, -0.0, 5e-324]), "two_way": np.array([[2.0**60, np.pi]])}
    quality = {"loss": {"value": 0.1 + 0.2, "noise": 1e-9}, "one_way_tv": {"value": 0.0}}
    return Checkpoint(
        run_id="run-a",
        plan="f" * 64,
        state=state(number),
        evaluated=Evaluated(count=2, round=number - 1, quality=quality, noises=6, sums=sums),
        ledgers={1: (12, "a" * 64), 4611686018427387904: (7, "b" * 64)},
        seconds=1.125,
        described=True,
    )


def plain(checkpoint: Checkpoint) -> dict[str, Any]:
    """All that a checkpoint holds, so that two of them can be compared bit by bit."""

    def bits(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {
            name: (a.shape, a.dtype.str, np.ascontiguousarray(a).tobytes())
            for name, a in arrays.items()
        }

    def parts(value: Any) -> dict[str, Any]:  # noqa: ANN401
        return {field.name: getattr(value, field.name) for field in fields(value)}

    state, evaluated = parts(checkpoint.state), parts(checkpoint.evaluated)
    for part in ("model", "average", "first", "second"):
        state[part] = bits(state[part])
    evaluated["sums"] = bits(evaluated["sums"])
    return parts(checkpoint) | {
        "state": state, "evaluated": evaluated, "ledgers": dict(checkpoint.ledgers),
    }  # fmt: skip


def loaded(folder: RunFolder) -> Checkpoint:
    """The checkpoint, of which no later one is damaged."""
    found, damaged = folder.load_checkpoint()
    assert found is not None
    assert damaged == []
    return found


class TestCheckpoint:
    def test_round_trip_is_exact(self, folder: RunFolder) -> None:
        saved = point(7)
        folder.save_checkpoint(saved)
        found = loaded(RunFolder(folder.path))
        assert plain(found) == plain(saved)
        # A later process goes on from it and keeps it: nothing is lost the second time either.
        folder.save_checkpoint(found)
        assert plain(loaded(folder)) == plain(saved)

    def test_no_field_is_left_out(self) -> None:
        """A field that this test does not fill would not be seen to be lost."""
        filled, empty = (
            plain(point(7)),
            plain(Checkpoint("", "", ServerState(0, 0, {}, {}, {}, {}))),
        )
        assert all(filled[name] != empty[name] for name in empty)
        for part in ("state", "evaluated"):
            assert all(filled[part][name] != empty[part][name] for name in empty[part])

    def test_a_new_one_is_mostly_empty(self, folder: RunFolder) -> None:
        saved = Checkpoint("run-a", "f" * 64, ServerState(0, 0, {}, {}, {}, {}))
        folder.save_checkpoint(saved)
        assert plain(loaded(folder)) == plain(saved)

    @given(
        sums=st.dictionaries(st.text(max_size=5), st.lists(st.floats(), max_size=3), max_size=3),
        heads=st.dictionaries(
            st.integers(0, 2**63), st.tuples(st.integers(1, 2**53), st.text(max_size=3))
        ),
        seconds=st.floats(0, 1e9),
    )
    def test_whatever_it_holds(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        sums: dict[str, list[float]],
        heads: dict[int, tuple[int, str]],
        seconds: float,
    ) -> None:
        folder = RunFolder(tmp_path_factory.mktemp("run") / "run")
        arrays = {name: np.array(values) for name, values in sums.items()}
        saved = replace(
            point(3), evaluated=Evaluated(count=1, sums=arrays), ledgers=heads, seconds=seconds
        )
        with folder.locked(resume=False):
            folder.save_checkpoint(saved)
            assert plain(loaded(folder)) == plain(saved)

    def test_a_single_number_keeps_its_shape(self, folder: RunFolder) -> None:
        scalar = {"s": np.array(2.5, dtype=np.float32)}
        folder.save_checkpoint(Checkpoint("x", "y", ServerState(1, 1, scalar, scalar, {}, {})))
        assert loaded(folder).state.model["s"].shape == ()

    def test_the_latest_two_are_kept(self, folder: RunFolder) -> None:
        for number in (1, 2, 9, 10, 11):
            folder.save_checkpoint(point(number))
        assert files(folder) == {"checkpoint/000010.safetensors", "checkpoint/000011.safetensors"}
        assert loaded(folder).state.round == 11

    def test_the_last_round_of_all_comes_last(self, folder: RunFolder) -> None:
        """Rounds go up to 100 000: six digits, in order."""
        for number in (99_998, 99_999, 100_000):
            folder.save_checkpoint(point(number))
        assert loaded(folder).state.round == 100_000
        assert len(files(folder)) == 2

    def test_a_round_evaluated_later_replaces_itself(self, folder: RunFolder) -> None:
        for number in (1, 2):
            folder.save_checkpoint(replace(point(number), seconds=1.0))
        folder.save_checkpoint(replace(point(2), seconds=2.0))
        assert loaded(folder).seconds == 2.0
        assert files(folder) == {"checkpoint/000001.safetensors", "checkpoint/000002.safetensors"}

    @pytest.mark.parametrize("call", ["fsync", "replace", "open"])
    def test_a_full_disk_leaves_the_last_whole_state(
        self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        for number in (1, 2):
            folder.save_checkpoint(point(number))
        with monkeypatch.context() as patch:
            refuse_disk(patch, call)
            with pytest.raises(FedveilError, match=r"cannot be written .No space") as caught:
                folder.save_checkpoint(point(3))
        assert "\n" not in str(caught.value)
        assert plain(loaded(folder)) == plain(point(2))
        assert len(files(folder)) == 2
        folder.save_checkpoint(point(3))
        assert plain(loaded(folder)) == plain(point(3))

    def test_what_a_killed_process_left_half_written_is_no_checkpoint(
        self, folder: RunFolder
    ) -> None:
        folder.save_checkpoint(point(1))
        (folder.path / "checkpoint" / ".000002.safetensors.partial").write_bytes(b"half")
        assert loaded(folder).state.round == 1
        folder.save_checkpoint(point(2))
        assert loaded(folder).state.round == 2
        assert len(files(folder)) == 2

    def test_there_is_none(self, folder: RunFolder) -> None:
        assert folder.load_checkpoint() == (None, [])

    def test_they_are_gone_but_the_sites_were_asked(self, folder: RunFolder) -> None:
        """The state is lost, not new: rounds that were asked for may not pass for the first."""
        folder.save_checkpoint(point(1))
        folder.ask(Asked(2, 0))
        (folder.path / "checkpoint" / "000001.safetensors").unlink()
        with pytest.raises(FedveilError, match="checkpoint"):
            folder.load_checkpoint()

    def test_one_byte_anywhere(self, folder: RunFolder) -> None:
        """Header, names, facts, numbers, the checksum itself: the one before is taken."""
        for number in (1, 2):
            folder.save_checkpoint(point(number))
        file = folder.path / "checkpoint" / "000002.safetensors"
        whole, first = file.read_bytes(), plain(point(1))
        for place in range(len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            found, faults = folder.load_checkpoint()
            assert found is not None
            assert plain(found) == first, place
            [fault] = faults
            assert str(file) in fault
            assert "\n" not in fault
        file.write_bytes(whole)
        assert plain(loaded(folder)) == plain(point(2))

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"garbage",
            to_bytes({"foreign": np.zeros(1, dtype=np.float32)}, {"round": 1}),
            to_bytes({"foreign/w": np.zeros(1, dtype=np.float32)}, {"round": 1}),
            to_bytes({"model/w": np.zeros(1, dtype=np.float32)}, {}),
            save({"model/w": np.zeros(1, dtype=np.float32)}),
        ],
        ids=["empty", "garbage", "foreign", "foreign part", "no round", "no checksum"],
    )
    def test_one_that_is_none_of_ours_falls_back(self, folder: RunFolder, content: bytes) -> None:
        folder.save_checkpoint(point(1))
        folder.write("checkpoint/000002.safetensors", content)
        found, faults = folder.load_checkpoint()
        assert found is not None
        assert plain(found) == plain(point(1))
        assert ["000002" in fault for fault in faults] == [True]

    @pytest.mark.parametrize("cut", [1, 3, 8, 200])
    def test_one_that_is_cut_short_falls_back(self, folder: RunFolder, cut: int) -> None:
        for number in (1, 2):
            folder.save_checkpoint(point(number))
        file = folder.path / "checkpoint" / "000002.safetensors"
        file.write_bytes(file.read_bytes()[:-cut])
        found, faults = folder.load_checkpoint()
        assert found is not None
        assert (found.state.round, len(faults)) == (1, 1)

    @pytest.mark.parametrize("count", [1, 2])
    def test_all_are_damaged(self, folder: RunFolder, count: int) -> None:
        for number in range(1, count + 1):
            folder.save_checkpoint(point(number))
        for file in (folder.path / "checkpoint").glob("*.safetensors"):
            whole = bytearray(file.read_bytes())
            whole[-1] ^= 1
            file.write_bytes(whole)
        with pytest.raises(FedveilError) as caught:
            folder.load_checkpoint()
        assert f"00000{count}.safetensors: is damaged" in str(caught.value)
        assert "no earlier checkpoint is whole, begin a new run" in str(caught.value)
        assert "\n" not in str(caught.value)


class TestDescribe:
    def test_what_a_run_is_can_be_read_back(
        self, folder: RunFolder, make_config: MakeConfig
    ) -> None:
        config = make_config().resolved()
        schema = run_schema(config)
        folder.describe(config, schema)
        assert files(folder) == {"config.toml", "schema.json", "environment.json"}
        assert validated(RunConfig, read_toml(folder.path / "config.toml")) == config
        text = (folder.path / "schema.json").read_text(encoding="utf-8")
        assert schema_from_json(text) == schema

    def test_options_that_are_off_are_left_out(
        self, folder: RunFolder, make_config: MakeConfig
    ) -> None:
        config = make_config()
        folder.describe(config, run_schema(config))
        text = (folder.path / "config.toml").read_text(encoding="utf-8")
        assert "None" not in text
        assert text == tomli_w.dumps(read_toml(folder.path / "config.toml"))


class TestEnvironment:
    def test_versions(self) -> None:
        found = environment()
        assert found["packages"]["torch"] == metadata.version("torch")
        assert {"fedveil", "flwr", "opacus", "dp-accounting", "numpy"} <= found["packages"].keys()
        assert "not installed" not in found["packages"].values()
        assert found["python"].startswith("3.11.")

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(store, "_VERSIONED", ("no-such-package",))
        assert environment()["packages"] == {"no-such-package": "not installed"}

    def test_the_source_has_a_hash(self) -> None:
        digest = environment()["source_sha256"]
        assert len(bytes.fromhex(digest)) == 32
        assert environment()["source_sha256"] == digest

    def test_another_source_has_another(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "server").mkdir()
        for text in ("a = 1", "a = 2"):
            (tmp_path / "config.py").write_text(text, encoding="utf-8")
            with monkeypatch.context() as patch:
                patch.setattr(store, "__file__", str(tmp_path / "server" / "store.py"))
                digest = environment()["source_sha256"]
            if text == "a = 1":
                first = digest
        assert digest != first
