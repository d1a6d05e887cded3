"""The run folder: whole files or none, events one after the other, exact checkpoints."""

import errno
import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from fedveil.config import ConfigError, FedveilError, RunConfig, read_toml, validated
from fedveil.data_prep import run_schema
from fedveil.data_prep.schema import schema_from_json
from fedveil.models.state import to_bytes
from fedveil.server import store
from fedveil.server.aggregation import ServerState
from fedveil.server.store import RunFolder, environment

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A new run folder."""
    made = RunFolder(tmp_path / "run")
    made.create()
    return made


def files(folder: RunFolder) -> set[str]:
    """All files of a run folder."""
    return {str(p.relative_to(folder.path)) for p in folder.path.rglob("*") if p.is_file()}


def refuse_disk(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Lets one system call fail as on a full disk."""

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = os if call == "fsync" else Path
    monkeypatch.setattr(owner, call, fail)


class TestCreate:
    def test_a_new_folder_with_its_parents(self, tmp_path: Path) -> None:
        RunFolder(tmp_path / "a" / "b").create()
        assert (tmp_path / "a" / "b" / "checkpoint").is_dir()

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        RunFolder(tmp_path).create()

    def test_a_folder_that_holds_something(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
        with pytest.raises(ConfigError, match="not empty"):
            RunFolder(tmp_path).create()
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]

    @pytest.mark.parametrize("below", ["", "run", "deep/run"])
    def test_a_place_that_cannot_be_written(self, tmp_path: Path, below: str) -> None:
        file = tmp_path / "file"
        file.write_text("mine", encoding="utf-8")
        with pytest.raises(ConfigError, match="cannot be written"):
            RunFolder(file / below).create()
        assert file.read_text(encoding="utf-8") == "mine"


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

    def test_a_torn_last_line_is_no_traceback(self, folder: RunFolder) -> None:
        """What a crash in the midst of `append` leaves."""
        folder.append({"event": "run"})
        with (folder.path / "events.jsonl").open("a", encoding="utf-8") as opened:
            opened.write('{"event": "rou')
        try:
            found = list(folder.events())
        except FedveilError:
            return
        assert found == [{"event": "run"}]


def state(number: int) -> ServerState:
    """A state with all its parts, of awkward values and shapes."""
    rng = np.random.default_rng(number)
    special = np.array([0.0, -0.0, 1e-45, 3.4e38, np.pi], dtype=np.float32)
    matrix = rng.normal(size=(2, 3)).astype(np.float32)
    return ServerState(
        round=number,
        model={"a.weight": special, "b": matrix},
        average={"a.weight": special / 2, "b": matrix.T.copy().T},
        first={"b": matrix + 1},
        second={"b": matrix + 2, "empty": np.zeros((0, 4), dtype=np.float32)},
    )


class TestCheckpoint:
    def test_round_trip_is_exact(self, folder: RunFolder) -> None:
        saved = state(7)
        folder.save_checkpoint(saved, {"run_id": "x"})
        loaded = folder.load_checkpoint()
        assert loaded.round == 7
        for part in ("model", "average", "first", "second"):
            old, new = getattr(saved, part), getattr(loaded, part)
            assert old.keys() == new.keys()
            for name in old:
                assert (old[name].shape, old[name].dtype) == (new[name].shape, new[name].dtype)
                assert np.ascontiguousarray(old[name]).tobytes() == new[name].tobytes()

    def test_a_single_number_keeps_its_shape(self, folder: RunFolder) -> None:
        scalar = {"s": np.array(2.5, dtype=np.float32)}
        folder.save_checkpoint(ServerState(1, scalar, scalar, {}, {}), {})
        assert folder.load_checkpoint().model["s"].shape == ()

    def test_the_latest_two_are_kept(self, folder: RunFolder) -> None:
        for number in (1, 2, 9, 10, 11):
            folder.save_checkpoint(state(number), {})
        assert files(folder) == {"checkpoint/000010.safetensors", "checkpoint/000011.safetensors"}
        assert folder.load_checkpoint().round == 11

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_a_full_disk_leaves_the_last_whole_state(
        self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        for number in (1, 2):
            folder.save_checkpoint(state(number), {})
        with monkeypatch.context() as patch:
            refuse_disk(patch, call)
            with pytest.raises(FedveilError, match="cannot be written"):
                folder.save_checkpoint(state(3), {})
        assert folder.load_checkpoint().round == 2
        assert len(files(folder)) == 2

    def test_there_is_none(self, folder: RunFolder) -> None:
        with pytest.raises(FedveilError, match="no checkpoint"):
            folder.load_checkpoint()

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"garbage",
            to_bytes({"foreign": np.zeros(1, dtype=np.float32)}, {"round": 1}),
            to_bytes({"model/w": np.zeros(1, dtype=np.float32)}, {}),
        ],
        ids=["empty", "garbage", "foreign arrays", "no round"],
    )
    def test_it_is_damaged(self, folder: RunFolder, content: bytes) -> None:
        folder.write("checkpoint/000001.safetensors", content)
        with pytest.raises(FedveilError):
            folder.load_checkpoint()

    def test_it_is_cut_short(self, folder: RunFolder) -> None:
        folder.save_checkpoint(state(1), {})
        file = folder.path / "checkpoint" / "000001.safetensors"
        file.write_bytes(file.read_bytes()[:-3])
        with pytest.raises(FedveilError, match="000001"):
            folder.load_checkpoint()


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
