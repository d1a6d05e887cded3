"""The run folder: written atomically, so that a crash leaves the last whole state.

What a resume needs is in `checkpoint/`: the state after the last two rounds, and `asked.json`,
which is written before the sites are asked for anything. A release is asked for once, so what was
asked and is not in the state is lost, counts as spent, and is never asked for again.
"""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import tomli_w

from ..config import ConfigError, FedveilError, RunConfig
from ..data_prep.schema import Schema, schema_to_json
from ..files import replace_file, sync_folder
from ..models.state import read_file, to_bytes
from .aggregation import ServerState
from .evaluation import NOT_EVALUATED, Evaluated

if TYPE_CHECKING:
    import numpy as np

Event = dict[str, Any]
_KEPT_CHECKPOINTS = 2
_ASKED = "checkpoint/asked.json"
_STATE = ("model", "average", "first", "second")
_SOURCES = (
    ".", "cli", "client", "config", "data_prep", "data_prep/queries", "deployment", "flower",
    "models", "models/marginal", "privacy", "privacy/audit", "privacy/conformance",
    "privacy/secagg", "server", "server/simulation",
)  # fmt: skip
_SOURCE_ENDINGS = (".py", ".j2", ".css")
_VERSIONED = (
    "fedveil", "flwr", "torch", "opacus", "dp-accounting", "numpy", "polars", "cryptography",
)  # fmt: skip


class Asked(NamedTuple):
    """The last round, evaluation and statistics that the sites were ever asked for."""

    round: int
    evaluation: int
    statistics: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """All that a run carries from round to round.

    Attributes:
        run_id: Which run.
        plan: SHA-256 of what it was priced as.
        state: Model, average, optimiser.
        evaluated: What evaluations found so far.
        ledgers: Count and head hash of each site's ledger, by node, as last seen.
        seconds: The server's time so far, of all its processes.
        described: Whether the round of statistics is done, and all that is made of it.
    """

    run_id: str
    plan: str
    state: ServerState
    evaluated: Evaluated = NOT_EVALUATED
    ledgers: Mapping[int, tuple[int, str]] = field(default_factory=dict)
    seconds: float = 0.0
    described: bool = False


@dataclass(frozen=True)
class RunFolder:
    """Where everything about a run is kept."""

    path: Path

    @contextmanager
    def locked(self, *, resume: bool) -> Iterator[None]:
        """Makes the folder, or opens it to go on, for this process alone.

        Raises:
            ConfigError: It holds something already (and nothing is resumed), is another process's,
                or cannot be written.
        """
        with self._lock(resume=resume) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    f"--out {self.path}: another process is at it; wait for that one"
                ) from None
            # Once more: another process may have come and gone since.
            if not resume and [*self.path.iterdir()] != [self.path / ".lock"]:
                raise ConfigError(f"--out {self.path}: is not empty; choose another folder")
            self._prepare()
            yield

    def _lock(self, *, resume: bool) -> IO[str]:
        """The lock file; a folder that is somebody else's is not written into."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not resume and any(self.path.iterdir()):
                raise ConfigError(
                    f"--out {self.path}: is not empty; choose another folder, or --resume what is "
                    "in it"
                )
            if any(self.path.iterdir()) and not (self.path / ".lock").exists():
                raise ConfigError(f"--resume {self.path}: holds no run; check the path")
            return (self.path / ".lock").open("w")
        except OSError as error:
            raise self._refused(error) from None

    def _prepare(self) -> None:
        """Under the lock: what is half-written here is of a process that was killed."""
        try:
            (self.path / "checkpoint").mkdir(exist_ok=True)
            for folder in (self.path, self.path.parent):
                sync_folder(folder)
            for draft in self.path.rglob(".*.partial"):
                draft.unlink()
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"--out {self.path}: cannot be written ({error.strerror}); choose another folder"
        )

    def describe(self, config: RunConfig, schema: Schema) -> None:
        """Writes what the run is: `config.toml`, `schema.json`, `environment.json`."""
        plain = config.model_dump(by_alias=True, exclude_none=True)
        self.write("config.toml", tomli_w.dumps(plain).encode())
        self.write("schema.json", schema_to_json(schema).encode())
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        self.write_json("environment.json", {**environment(), "begun": begun})

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole or not at all, and durably.

        Raises:
            FedveilError: The disk refuses; the file is as it was.
        """
        target = self.path / name
        try:
            replace_file(target, content)
        except OSError as error:
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
        """Adds a line to `events.jsonl`, durably, in place of a torn one if there is one."""
        try:
            with (self.path / "events.jsonl").open("ab+") as opened:
                opened.truncate(_whole_lines(opened))
                opened.write(json.dumps(event).encode() + b"\n")
                opened.flush()
                os.fsync(opened.fileno())
        except OSError as error:
            raise FedveilError(f"{self.path}: cannot be written ({error.strerror})") from None

    def events_from(self, start: int) -> tuple[list[Event], int]:
        """What was written to `events.jsonl` since byte `start`, and where that ends."""
        try:
            with (self.path / "events.jsonl").open("rb") as opened:
                opened.seek(start)
                lines, newline, _ = opened.read().rpartition(b"\n")
        except FileNotFoundError:
            return [], 0
        try:
            events = [json.loads(line) for line in lines.splitlines()]
        except ValueError:
            raise FedveilError(
                f"{self.path}: events.jsonl: is no JSON; the file was edited"
            ) from None
        return events, start + len(lines) + len(newline)

    def events(self) -> Iterator[Event]:
        """The lines of `events.jsonl`; a last one that a crash tore is left out."""
        try:
            lines = (self.path / "events.jsonl").read_bytes().split(b"\n")[:-1]
        except OSError:
            raise FedveilError(
                f"{self.path}: holds no readable events.jsonl; is it a run folder?"
            ) from None
        for number, line in enumerate(lines, start=1):
            try:
                event = json.loads(line)
            except ValueError:
                raise FedveilError(
                    f"{self.path}: events.jsonl, line {number}: is no JSON; the file was edited"
                ) from None
            yield event

    def ask(self, asked: Asked) -> None:
        """Notes durably what the sites are about to be asked for."""
        self.write_json(_ASKED, asked._asdict())

    def asked(self) -> Asked:
        """What the sites were ever asked for.

        Raises:
            FedveilError: The note is damaged.
        """
        newest = max((int(path.stem) for path in self._checkpoints()), default=0)
        if not newest and not (self.path / _ASKED).exists():
            return Asked(0, 0)
        try:
            asked = Asked(**self.read_json(_ASKED))
        except (FedveilError, TypeError):
            asked = Asked(-1, -1)
        # A crash cannot have done that: the note was whole before the checkpoint was written.
        if not all(type(number) is int for number in asked) or asked.round < newest:
            raise FedveilError(
                f"{self.path / _ASKED}: is missing or damaged, so that nobody knows what was asked "
                "for last; begin a new run"
            )
        return asked

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Writes a round's whole state; the one before it is kept, older ones go."""
        state, evaluated = checkpoint.state, checkpoint.evaluated
        parts = {part: getattr(state, part) for part in _STATE} | {"evaluated": evaluated.sums}
        arrays: dict[str, np.ndarray] = {}
        for part, named in parts.items():
            arrays |= {f"{part}/{name}": array for name, array in named.items()}
        facts = {
            "run_id": checkpoint.run_id,
            "plan": checkpoint.plan,
            "round": state.round,
            "steps": state.steps,
            "clipping_norm": state.clipping_norm,
            "evaluated": evaluated.facts(),
            "ledgers": {str(node): head for node, head in checkpoint.ledgers.items()},
            "seconds": checkpoint.seconds,
            "described": checkpoint.described,
        }
        self.write(f"checkpoint/{state.round:06d}.safetensors", to_bytes(arrays, facts))
        # Two, so that one that is damaged leaves the one before.
        for old in self._checkpoints()[:-_KEPT_CHECKPOINTS]:
            with suppress(OSError):
                old.unlink()

    def load_checkpoint(self) -> tuple[Checkpoint | None, list[str]]:
        """Reads the latest whole state.

        Returns:
            The state, or `None` where none was ever written; and what is wrong with later ones.

        Raises:
            FedveilError: All are damaged.
        """
        damaged: list[str] = []
        for path in reversed(self._checkpoints()):
            try:
                return _read_checkpoint(path), damaged
            except FedveilError as error:
                damaged.append(str(error))
        if damaged:
            raise FedveilError(f"{damaged[0]}; no earlier checkpoint is whole, begin a new run")
        if (self.path / _ASKED).exists():
            raise FedveilError(f"{self.path}: its checkpoints are gone; begin a new run")
        return None, []

    def forget_after(self, number: int) -> None:
        """Removes checkpoints of later rounds: damaged ones, which must not push out whole ones."""
        for path in self._checkpoints():
            if int(path.stem) > number:
                with suppress(OSError):
                    path.unlink()

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoint").glob("[0-9]*.safetensors"))


def _read_checkpoint(path: Path) -> Checkpoint:
    arrays, facts = read_file(path)
    parts: dict[str, dict[str, np.ndarray]] = {part: {} for part in (*_STATE, "evaluated")}
    try:
        for key, array in arrays.items():
            part, _, name = key.partition("/")
            parts[part][name] = array
        evaluated = Evaluated(sums=parts.pop("evaluated"), **facts["evaluated"])
        return Checkpoint(
            run_id=facts["run_id"],
            plan=facts["plan"],
            state=ServerState(
                round=facts["round"],
                steps=facts["steps"],
                clipping_norm=facts["clipping_norm"],
                **parts,
            ),
            evaluated=evaluated,
            ledgers={int(node): (head[0], head[1]) for node, head in facts["ledgers"].items()},
            seconds=facts["seconds"],
            described=facts["described"],
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        raise FedveilError(f"{path}: holds no checkpoint of ours") from None


def _whole_lines(opened: IO[bytes]) -> int:
    """Length of a file up to its last line end."""
    end = opened.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        opened.seek(start)
        found = opened.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def environment() -> dict[str, Any]:
    """Versions of the packages that matter, and a hash of our own source."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for file in sorted((root / folder).glob("*.*")):
            if file.suffix not in _SOURCE_ENDINGS:
                continue
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
