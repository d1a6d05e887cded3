"""What the control plane does for whom it lets in: plain functions over the queue, without gRPC."""

import base64
import hashlib
import json
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError, FedveilError, RunConfig, validated
from ..data_prep.schema import schema_from_json
from ..deployment.control import CHUNK, HEARTBEAT, Message, our_version
from ..deployment.kit import Kit
from ..deployment.roster import Member, Roster
from .queue import SUBMITTED, Queue, Summary

_ENDED = {"finished", "failed", "cancelled"}
_LISTED = 1000
"""Runs in an answer, so that it stays below the limit of a message."""
_LARGEST_EVENT = 1 << 19
_RELEASED = (
    "config.toml", "schema.json", "environment.json", "identities.toml", SUBMITTED, "events.jsonl",
    "transcript.bin", "metrics.json", "model.safetensors", "samples.csv", "samples.png",
    "report.html",
)  # fmt: skip
"""What leaves the server of a run, if it is there: no key, no lock, nothing of a site's own."""


@dataclass(frozen=True)
class Stream:
    """A caller who waits for more.

    Attributes:
        wait: Waits so many seconds; true if the caller or the server has gone.
        check: Refuses a caller who was revoked since.
        poll: Seconds between two looks.
        heartbeat: Seconds after which silence is broken.
        patience: Seconds that somebody has to resume an interrupted run, before a watch ends.
    """

    wait: Callable[[float], bool]
    check: Callable[[], None]
    poll: float = 0.25
    heartbeat: float = HEARTBEAT
    patience: float = 30.0


def submitted(config: dict[str, Any], schema: dict[str, Any], roster: Roster) -> RunConfig:
    """Holds a run against the federation, and prices it.

    Returns:
        The resolved configuration.

    Raises:
        FedveilError: It is no run, not one of this federation, or cannot be had at that price.
    """
    from ..data_prep.queries import run_workload
    from ..privacy.plan import plan

    known = schema_from_json(json.dumps(schema))
    found = validated(RunConfig, config).resolved(known.modality)
    sites = len(roster.sites)
    if found.federation.sites != sites:
        raise ConfigError(
            f"federation.sites = {found.federation.sites}: the federation has {sites} sites; use "
            f"--set federation.sites={sites}"
        )
    if found.federation.engine != "local":
        raise ConfigError(
            f'federation.engine = "{found.federation.engine}": is for simulations; the sites of a '
            "federation run it, leave it out"
        )
    priced = plan(found)
    if priced.statistics:
        run_workload(found, known, priced.statistics_noise)
    return found


def submit(
    queue: Queue, roster: Roster, member: Member, config: dict[str, Any], schema: dict[str, Any]
) -> Message:
    """Takes a run in; the answer is its number and its place in the queue."""
    resolved = submitted(config, schema, roster)
    known = schema_from_json(json.dumps(schema))
    run_id = queue.submit(resolved, known, member.name, roster.identities)
    return {"run": run_id, "position": queue.position(run_id)}


def listed(queue: Queue) -> Message:
    """The newest runs, and how many older ones there are."""
    found = queue.listed()
    return {
        "runs": [_told(queue, summary) for summary in found[:_LISTED]],
        "older": max(0, len(found) - _LISTED),
    }


def status(queue: Queue, kit: Kit) -> Message:
    """The server's version, how long the queue is, and which sites are connected, if it is known.

    `sites` is what the SuperLink's process keeps in `nodes.json`; `None` where it keeps nothing.
    """
    states = queue.active()
    return {
        "federation": kit.about.federation,
        "version": our_version(),
        "queued": sum(state == "queued" for state in states.values()),
        "running": sorted(run for run, state in states.items() if state == "running"),
        "sites": _nodes(kit.state / "nodes.json"),
    }


def handed_roster(kit: Kit) -> Message:
    """The signed roster as it is: whoever gets it checks the signature."""
    try:
        return {"roster": kit.roster.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError):
        raise FedveilError("roster.json: cannot be read at the server") from None


def watch(queue: Queue, run_id: str, offset: int, stream: Stream) -> Iterator[Message]:
    """A run's events as they come.

    Yields:
        `{"state": summary}` at first and whenever it changes, `{"event": ..., "offset": bytes}`,
        `{"alive": true}` when there was nothing to say for long, and last `{"end": summary}`.

    Raises:
        ConfigError: The offset is not where a line begins.
        RefusedError: The caller was revoked.
    """
    file = queue.path(run_id) / "events.jsonl"
    _refuse_offset(file, offset)
    told: object = None
    spoke = stopped = time.monotonic()
    while True:
        # Before the events: whoever has a run writes its last one before letting go of it.
        state, place = queue.active().get(run_id), queue.position(run_id)
        if (state, place) != told:
            told, spoke, stopped = (state, place), time.monotonic(), time.monotonic()
            yield {"state": _told(queue, queue.summary(run_id))}
        for event, end in _events(file, offset):
            stream.check()
            yield {"event": event, "offset": end}
            offset, spoke = end, time.monotonic()
        if state is None:
            found = queue.summary(run_id)
            # One whose process was killed goes on if an operator resumes it.
            late = time.monotonic() - stopped >= stream.patience
            if found.state in _ENDED or (found.state == "interrupted" and late):
                yield {"end": asdict(found)}
                return
        if stream.wait(stream.poll):
            return
        stream.check()
        if time.monotonic() - spoke >= stream.heartbeat:
            spoke = time.monotonic()
            yield {"alive": True}


def fetch(queue: Queue, run_id: str, member: Member, stream: Stream) -> Iterator[Message]:
    """A stopped run's files, as `deployment.fetching.receive` reads them.

    Its last checkpoint is for the operator alone who submitted it.

    Raises:
        ConfigError: The run has not stopped.
        RefusedError: The caller was revoked.
    """
    summary = queue.summary(run_id)
    if summary.state in {"queued", "running"}:
        raise ConfigError(
            f"run {run_id}: is {summary.state}; fetch it when it has ended, or cancel it"
        )
    folder = queue.path(run_id).resolve()
    yield {"run": asdict(summary)}
    own = member.role == "operator" and member.name == summary.by
    files = 0
    for name in _released(folder, own=own):
        yield {"file": name}
        for message in _chunks(folder / name):
            stream.check()
            yield message
        files += 1
    yield {"done": files}


def _told(queue: Queue, summary: Summary) -> Message:
    return {**asdict(summary), "position": queue.position(summary.run_id)}


def _refuse_offset(file: Path, offset: int) -> None:
    if offset == 0:
        return
    try:
        with file.open("rb") as opened:
            opened.seek(offset - 1)
            begins = opened.read(1) == b"\n"
    except FileNotFoundError:
        begins = False
    if not begins:
        raise ConfigError(f"offset = {offset}: no event begins there; watch from 0")


def _events(file: Path, offset: int) -> Iterator[tuple[Message, int]]:
    """Whole lines from a byte on, and where each ends."""
    try:
        opened = file.open("rb")
    except FileNotFoundError:
        return
    with opened:
        opened.seek(offset)
        for line in opened:
            if not line.endswith(b"\n"):
                return  # its writer is at it, or a crash tore it
            offset += len(line)
            try:
                event = json.loads(line) if len(line) <= _LARGEST_EVENT else None
            except ValueError:
                event = None
            if not isinstance(event, dict):
                raise FedveilError("events.jsonl: a line of it is damaged, or too long")
            yield event, offset


def _released(folder: Path, *, own: bool) -> Iterator[str]:
    names = list(_RELEASED)
    if own:
        checkpoints = sorted((folder / "checkpoint").glob("[0-9]*.safetensors"))
        names += [f"checkpoint/{path.name}" for path in checkpoints[-1:]]
    for name in names:
        path = folder / name
        # Nothing on the way is a link, so that nothing outside the folder is read.
        if path.resolve() == path and path.is_file():
            yield name


def _chunks(path: Path) -> Iterator[Message]:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    digest = hashlib.sha256()
    with os.fdopen(handle, "rb") as opened:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise FedveilError(f"{path.name}: is no plain file")
        while data := opened.read(CHUNK):
            digest.update(data)
            yield {"chunk": base64.b64encode(data).decode()}
        yield {"sha256": digest.hexdigest(), "size": opened.tell()}


def _nodes(file: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
