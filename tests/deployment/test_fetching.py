"""What a server sends of a run is kept whole, or not at all, and nowhere else."""

import base64
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from fedveil.config import ConfigError, FedveilError
from fedveil.deployment.fetching import receive

Message = dict[str, Any]
DATA = b"some bytes"
CHUNK = {"chunk": base64.b64encode(DATA).decode()}
END = {"sha256": sha256(DATA).hexdigest(), "size": len(DATA)}
WHOLE: list[Message] = [
    {"run": {"state": "finished", "cause": None}}, {"file": "config.toml"}, CHUNK, END, {"done": 1},
]  # fmt: skip


class TestReceiving:
    def test_whole(self, tmp_path: Path) -> None:
        receive(iter(WHOLE), tmp_path / "out")
        assert (tmp_path / "out" / "config.toml").read_bytes() == DATA

    @pytest.mark.parametrize("place", range(len(WHOLE)))
    def test_cut_off(self, tmp_path: Path, place: int) -> None:
        with pytest.raises(FedveilError, match="fetch it again"):
            receive(iter(WHOLE[:place]), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("place", range(len(WHOLE)))
    def test_one_message_missing(self, tmp_path: Path, place: int) -> None:
        with pytest.raises(FedveilError):
            receive(iter(WHOLE[:place] + WHOLE[place + 1 :]), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("place", "other"),
        [
            (2, {"chunk": base64.b64encode(b"some bytez").decode()}),
            (2, {"chunk": "###"}),
            (2, {"chunk": 7}),
            (0, {"run": "finished"}),
            (0, {"run": None}),
            (0, {"run": {"cause": None}}),
            (3, {**END, "size": 9}),
            (3, {**END, "sha256": "0" * 64}),
            (3, {"size": len(DATA)}),
            (4, {"done": 2}),
        ],
    )
    def test_other_bytes(self, tmp_path: Path, place: int, other: Message) -> None:
        with pytest.raises(FedveilError):
            receive(iter([*WHOLE[:place], other, *WHOLE[place + 1 :]]), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "name",
        [
            "../evil.toml", "/etc/passwd.txt", "..", "a/../../b.txt", "checkpoint/../../b.txt",
            ".lock", "sites/a.json", "", "a.toml\n", "a\\b.toml", "checkpoint/.a.toml", "a..toml",
        ],
    )  # fmt: skip
    def test_names_that_lead_elsewhere(self, tmp_path: Path, name: str) -> None:
        """A server that turned bad writes nothing outside the folder."""
        messages = [WHOLE[0], {"file": name}, *WHOLE[2:]]
        with pytest.raises(FedveilError, match="is no name of a run's file"):
            receive(iter(messages), tmp_path / "deep" / "out")
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    def test_one_file_twice(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be written"):
            receive(iter([*WHOLE[:4], *WHOLE[1:]]), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
