"""The run folder: written atomically, so that a crash leaves the last whole state."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from ..config import ConfigError, FedveilError, RunConfig
from ..data_prep.schema import Schema, schema_to_json
from ..models.state import read_file, to_bytes
from .aggregation import ServerState

if TYPE_CHECKING:
    import numpy as np

Event = dict[str, Any]
_KEPT_CHECKPOINTS = 2
_VERSIONED = (
    "fedveil", "flwr", "torch", "opacus", "dp-accounting", "numpy", "polars", "cryptography",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """Where everything about a run is kept."""

    path: Path

    def create(self) -> None:
        """Makes the folder.

        Raises:
            ConfigError: It holds something already, or cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                raise ConfigError(f"--out {self.path}: is not empty; choose another folder")
            (self.path / "checkpoint").mkdir()
        except OSError as error:
            raise ConfigError(
                f"--out {self.path}: cannot be written ({error.strerror}); choose another folder"
            ) from None

    def describe(self, config: RunConfig, schema: Schema) -> None:
        """Writes what the run is: `config.toml`, `schema.json`, `environment.json`."""
        plain = config.model_dump(by_alias=True, exclude_none=True)
        self.write("config.toml", tomli_w.dumps(plain).encode())
        self.write("schema.json", schema_to_json(schema).encode())
        self.write_json("environment.json", environment())

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole or not at all, and durably.

        Raises:
            FedveilError: The disk refuses; the file is as it was.
        """
        target = self.path / name
        partial = target.with_name(f".{target.name}.partial")
        try:
            with partial.open("wb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
            partial.replace(target)
            _sync_folder(target.parent)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise FedveilError(f"{target}: cannot be written ({error.strerror})") from None

    def write_json(self, name: str, values: Mapping[str, Any]) -> None:
        """Writes a JSON object."""
        self.write(name, (json.dumps(values, indent=2) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """Reads a JSON object.

        Raises:
            FedveilError: It is missing or damaged.
        """
        try:
            values = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            values = None
        if not isinstance(values, dict):
            raise FedveilError(f"{self.path}: holds no readable {name}; is it a finished run?")
        return values

    def append(self, event: Event) -> None:
        """Adds a line to `events.jsonl`."""
        try:
            with (self.path / "events.jsonl").open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(event) + "\n")
        except OSError as error:
            raise FedveilError(f"{self.path}: cannot be written ({error.strerror})") from None

    def events(self) -> Iterator[Event]:
        """The lines of `events.jsonl`."""
        try:
            text = (self.path / "events.jsonl").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise FedveilError(f"{self.path}: holds no readable events.jsonl") from None
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                event = json.loads(line)
            except ValueError:
                raise FedveilError(
                    f"{self.path}: events.jsonl, line {number}: is torn; the run was cut off there"
                ) from None
            yield event

    def save_checkpoint(self, state: ServerState, facts: Mapping[str, Any]) -> None:
        """Writes a round's whole state; the one before it is kept, older ones go."""
        arrays: dict[str, np.ndarray] = {}
        for part in ("model", "average", "first", "second"):
            arrays |= {f"{part}/{name}": a for name, a in getattr(state, part).items()}
        self.write(
            f"checkpoint/{state.round:06d}.safetensors",
            to_bytes(arrays, {**facts, "round": state.round}),
        )
        # Two, so that a crash while one is written leaves the one before.
        for old in sorted((self.path / "checkpoint").glob("*.safetensors"))[:-_KEPT_CHECKPOINTS]:
            old.unlink()

    def load_checkpoint(self) -> ServerState:
        """Reads the latest state.

        Raises:
            FedveilError: There is none, or it is damaged.
        """
        found = sorted((self.path / "checkpoint").glob("*.safetensors"))
        if not found:
            raise FedveilError(f"{self.path}: holds no checkpoint")
        arrays, facts = read_file(found[-1])
        parts: dict[str, dict[str, np.ndarray]] = {
            "model": {}, "average": {}, "first": {}, "second": {},
        }  # fmt: skip
        for key, array in arrays.items():
            part, _, name = key.partition("/")
            if part not in parts:
                raise FedveilError(f"{found[-1]}: holds no checkpoint of ours")
            parts[part][name] = array
        if not isinstance(facts.get("round"), int):
            raise FedveilError(f"{found[-1]}: does not say of which round it is")
        return ServerState(round=facts["round"], **parts)


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable: it is the folder's content that changed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def environment() -> dict[str, Any]:
    """Versions of the packages that matter, and a hash of our own source."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for folder in (".", "client", "data_prep", "models", "privacy", "server"):
        for file in sorted((root / folder).glob("*.py")):
            digest.update(f"{folder}/{file.name}\0".encode() + file.read_bytes())
    versions = {}
    for name in _VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": versions,
        "source_sha256": digest.hexdigest(),
    }
