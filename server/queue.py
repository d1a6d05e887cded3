"""The queue of a deployed server: runs that wait, the one that runs, those that ended.

All of it is plain files, so that the process that takes runs in and the one that runs them share it
and either may be killed. Below the server's state folder:

```
runs/RUN_ID/             a run folder, see `store`; it is there whole or not at all
queue/RUN_ID.json        it waits
queue/RUN_ID.running     a process has it: it holds a lock on this file, which ends with the process
queue/RUN_ID.cancel      somebody wants no more of it
```
"""

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import tomli_w

from ..compare import Facts, read_run
from ..config import ConfigError, FedveilError, RunConfig
from ..data_prep.schema import Schema
from ..files import replace_file, sync_folder

RunState = Literal["queued", "running", "finished", "failed", "cancelled", "interrupted"]

SUBMITTED = "submitted.json"
"""In the run folder: who submitted it, and when."""
_RUN_ID = re.compile(r"[0-9a-f]{16}", re.ASCII)


@dataclass(frozen=True)
class Summary:
    """A run, as a list shows it.

    Attributes:
        run_id: Sixteen hexadecimal digits.
        name: The name that its configuration gives it.
        state: Where it stands.
        round: The last round that is done.
        rounds: How many are planned.
        by: Who submitted it.
        at: When, in ISO form (UTC).
        mechanism: What makes it private; `none` if nothing does.
        epsilon: What its whole plan costs; `None` until it has begun, or if it is not private.
        cause: Why it failed; empty unless it did.
    """

    run_id: str
    name: str
    state: RunState
    round: int
    rounds: int
    by: str
    at: str
    mechanism: str
    epsilon: float | None
    cause: str


class Queue:
    """The runs below a server's state folder; any number of processes may look at them."""

    def __init__(self, state: Path) -> None:
        """Opens it, or makes it.

        Raises:
            FedveilError: The folder cannot be written.
        """
        self._runs, self._queue = state / "runs", state / "queue"
        self._held: dict[str, int] = {}  # open markers; they are locked until they are closed
        with _written(state):
            for folder in (self._runs, self._queue):
                folder.mkdir(parents=True, exist_ok=True)

    def submit(
        self, config: RunConfig, schema: Schema, by: str, identities: Mapping[str, bytes]
    ) -> str:
        """Takes a run in: its folder whole, then its place in the queue.

        Args:
            config: The resolved configuration.
            schema: What a record is.
            by: Who submits it.
            identities: The sites' public identities by name.

        Returns:
            Its number.

        Raises:
            FedveilError: The disk refuses; nothing is taken in.
        """
        from .collect import IDENTITIES
        from .store import RunFolder

        name, at = config.federation.name, datetime.now(UTC).isoformat(timespec="seconds")
        pins = {site: public.hex() for site, public in sorted(identities.items())}
        with self._alone(), _written(self._runs):
            self._sweep()
            # Flower keeps run numbers in signed 64 bits.
            run_id = f"{secrets.randbits(62):016x}"
            draft = self._runs / f".{run_id}.partial"
            draft.mkdir()
            folder = RunFolder(draft)
            folder.describe(config, schema)
            folder.write(IDENTITIES, tomli_w.dumps({"identities": pins}).encode())
            folder.write_json(SUBMITTED, {"by": by, "at": at, "name": name})
            (draft / ".lock").touch()  # what makes it a run folder that may be gone on with
            sync_folder(draft)
            draft.rename(self._runs / run_id)
            sync_folder(self._runs)
            self._enqueue(run_id, by, name)
        return run_id

    def resume(self, run_id: str, by: str) -> None:
        """Puts a run that stopped at the end of the queue; it goes on from its last whole round.

        Raises:
            ConfigError: There is none of this number, or it has not stopped.
            FedveilError: The disk refuses.
        """
        found = self.summary(run_id)
        with self._alone(), _written(self._queue):
            state = self._state(run_id, found)
            if state not in {"failed", "cancelled", "interrupted"}:
                raise ConfigError(
                    f"run {run_id}: is {state}; only one that failed, was cancelled or was "
                    "interrupted goes on"
                )
            # In this order a crash in between leaves it cancelled.
            self._enqueue(run_id, by, found.name)
            self._file(run_id, "cancel").unlink(missing_ok=True)
            sync_folder(self._queue)

    def cancel(self, run_id: str, by: str) -> None:
        """Takes a run out of the queue, or asks whoever runs it to stop.

        Raises:
            ConfigError: There is none of this number, or it is neither queued nor running.
            FedveilError: The disk refuses.
        """
        found = self.summary(run_id)
        with self._alone(), _written(self._queue):
            state = self._state(run_id, found)
            if state not in {"queued", "running"}:
                raise ConfigError(f"run {run_id}: is {state}; there is nothing to cancel")
            note = {"by": by, "at": datetime.now(UTC).isoformat(timespec="seconds")}
            replace_file(self._file(run_id, "cancel"), json.dumps(note).encode())
            self._file(run_id, "json").unlink(missing_ok=True)
            sync_folder(self._queue)

    def cancelled(self, run_id: str) -> bool:
        """Whether somebody wants no more of a run."""
        return self._file(run_id, "cancel").exists()

    def next(self) -> str | None:
        """The run that waits longest; `None` if none waits."""
        with self._alone():
            return next(iter(self._waiting()), None)

    def position(self, run_id: str) -> int | None:
        """A run's place among those that wait, from 1; `None` if it does not."""
        with self._alone():
            waiting = self._waiting()
        return waiting.index(run_id) + 1 if run_id in waiting else None

    def active(self) -> dict[str, RunState]:
        """The runs that wait or run, and which of both: a quick look, no run is read."""
        with self._alone():
            found: dict[str, RunState] = dict.fromkeys(self._waiting(), "queued")
            for file in self._queue.glob("*.running"):
                if _RUN_ID.fullmatch(file.stem) and self._is_held(file.stem):
                    found[file.stem] = "running"
        return found

    def begun(self, run_id: str) -> None:
        """Takes a queued run for this process: it is `running` until `ended`, or the process ends.

        Raises:
            ConfigError: It does not wait.
            FedveilError: Another process has it still, or the disk refuses.
        """
        with self._alone(), _written(self._queue):
            if run_id not in self._waiting():
                raise ConfigError(f"run {run_id}: is not queued")
            marker = os.open(self._file(run_id, "running"), os.O_CREAT | os.O_RDWR, 0o666)
            try:
                fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(marker)
                raise FedveilError(f"run {run_id}: another process is at it still") from None
            self._held[run_id] = marker
            os.ftruncate(marker, 0)
            os.write(marker, f"{os.getpid()}\n".encode())
            self._file(run_id, "json").unlink()
            sync_folder(self._queue)

    def ended(self, run_id: str) -> None:
        """Lets go of a run that this process had; how it ended is in its folder."""
        with self._alone(), _written(self._queue):
            marker = self._held.pop(run_id, None)
            if marker is not None:
                self._file(run_id, "running").unlink(missing_ok=True)
                os.close(marker)

    def path(self, run_id: str) -> Path:
        """A run's folder.

        Raises:
            ConfigError: There is none of this number, or it is no number of a run.
        """
        found = self._runs / run_id if _RUN_ID.fullmatch(run_id) else None
        if found is None or not found.is_dir():
            raise ConfigError(f"run {run_id!a}: there is none; `fedveil runs list` shows them")
        return found

    def listed(self) -> list[Summary]:
        """All runs, the newest first."""
        names = [path.name for path in self._runs.iterdir() if _RUN_ID.fullmatch(path.name)]
        found = [self.summary(name) for name in names]
        return sorted(found, key=lambda one: (one.at, one.run_id), reverse=True)

    def summary(self, run_id: str) -> Summary:
        """Where a run stands; one that is damaged has failed, and says so.

        Raises:
            ConfigError: There is none of this number.
        """
        path = self.path(run_id)
        with self._alone():
            # The markers first: whoever has a run writes its outcome before letting go of it.
            held, waits, stopped = (
                self._is_held(run_id), run_id in self._waiting(), self.cancelled(run_id),
            )  # fmt: skip
        try:
            facts: Facts | FedveilError = read_run(path)
        except FedveilError as error:
            facts = error
        return _summary(path, facts, held=held, waits=waits, stopped=stopped)

    def _state(self, run_id: str, found: Summary) -> RunState:
        """The state now that nobody else changes it: it may have been taken or have ended since."""
        if self._is_held(run_id):
            return "running"
        if run_id in self._waiting():
            return "queued"
        if (self._runs / run_id / "metrics.json").exists():
            return "finished"
        if self.cancelled(run_id):
            return "cancelled"
        return found.state if found.state == "failed" else "interrupted"

    def _is_held(self, run_id: str) -> bool:
        try:
            marker = self._file(run_id, "running").open("r")
        except FileNotFoundError:
            return False
        with marker:
            try:
                fcntl.flock(marker, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _waiting(self) -> list[str]:
        """Runs that wait, the longest first; a cancelled one waits no more."""
        found = [
            (_number(file), file.stem)
            for file in self._queue.glob("*.json")
            if _RUN_ID.fullmatch(file.stem) and not self.cancelled(file.stem)
        ]
        return [run_id for _, run_id in sorted(found)]

    def _enqueue(self, run_id: str, by: str, name: str) -> None:
        # A number, not the time: clocks are set back.
        number = max(map(_number, self._queue.glob("*.json")), default=0) + 1
        at = datetime.now(UTC).isoformat(timespec="seconds")
        note = {"by": by, "at": at, "name": name, "number": number}
        replace_file(self._file(run_id, "json"), json.dumps(note).encode())

    def _file(self, run_id: str, kind: str) -> Path:
        if not _RUN_ID.fullmatch(run_id):
            raise ConfigError(f"run {run_id!a}: is no number of a run")
        return self._queue / f"{run_id}.{kind}"

    def _sweep(self) -> None:
        """Removes what a process left that was killed while it took a run in."""
        for draft in self._runs.glob(".*.partial"):
            shutil.rmtree(draft, ignore_errors=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps all other processes and threads from looking and changing; held for an instant."""
        with (self._queue / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FedveilError(f"{path}: cannot be written ({error.strerror})") from None


def _number(file: Path) -> int:
    """A place in the queue; what cannot be read goes last."""
    number = _object(file).get("number")
    return number if isinstance(number, int) else 2**62


def _object(file: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        values = json.loads(file.read_bytes())
        if isinstance(values, dict):
            return values
    return {}


def _summary(
    path: Path, facts: Facts | FedveilError, *, held: bool, waits: bool, stopped: bool
) -> Summary:
    note = {key: str(value) for key, value in _object(path / SUBMITTED).items()}
    state: RunState
    if held:
        state = "running"
    elif waits:
        state = "queued"
    elif isinstance(facts, FedveilError):
        state = "failed"
    elif facts.state == "finished":
        state = "finished"
    elif stopped:
        state = "cancelled"
    else:
        state = "failed" if facts.state == "failed" else "interrupted"
    known = None if isinstance(facts, FedveilError) else facts
    cause = known.cause if known else str(facts)
    promised = known.told.privacy if known else None
    return Summary(
        run_id=path.name,
        name=note.get("name", ""),
        state=state,
        round=known.told.rounds if known else 0,
        rounds=known.config.get("federation.rounds", 0) if known else 0,
        by=note.get("by", ""),
        at=note.get("at", ""),
        mechanism=known.config.get("privacy.mechanism", "") if known else "",
        epsilon=promised.epsilon if promised else None,
        cause=cause if state == "failed" else "",
    )
