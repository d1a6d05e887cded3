"""Fetching a run: its files, each held against its hash, in a new folder, whole or not at all.

The server names the files, so their names are checked as anybody's would be.
"""

import base64
import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from ..config import ConfigError, FedveilError
from ..files import draft_of, sync_folder
from .control import Message

_FILE = re.compile(r"(checkpoint/)?[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)+", re.ASCII)
"""No folder but one, no dot at the start, no `..`."""
_SAID = {"state", "cause"}
"""What is told of a fetched run."""


def refuse_taken(out: Path) -> None:
    """Refuses a folder that holds something already.

    Raises:
        ConfigError: It does, or is a file.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise ConfigError(f"--out {out}: is there already; choose another folder")


def receive(messages: Iterator[Message], out: Path) -> Message:
    """Writes what `fetch` of the control plane sends.

    Args:
        messages: `{"run": ...}`, then of each file `{"file": name}`, `{"chunk": base64}` as often
            as it takes and `{"sha256": ..., "size": ...}`, and at last `{"done": files}`.
        out: A new folder, or an empty one.

    Returns:
        The run's summary.

    Raises:
        ConfigError: The folder holds something already, or cannot be written.
        FedveilError: A file did not come as it was sent, or not all came; there is no folder then.
    """
    refuse_taken(out)
    draft = draft_of(out)
    try:
        draft.mkdir(parents=True)
        summary = _receive(messages, draft)
        sync_folder(draft)
        draft.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise ConfigError(
            f"--out {out}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    finally:
        with suppress(OSError):
            shutil.rmtree(draft)
    return summary


def _receive(messages: Iterator[Message], draft: Path) -> Message:
    summary: Message = {}
    files = 0
    for message in messages:
        if "run" in message:
            if not isinstance(message["run"], dict) or not message["run"].keys() >= _SAID:
                break
            summary = message["run"]
        elif "file" in message:
            _receive_file(str(message["file"]), messages, draft)
            files += 1
        elif "done" in message:
            if message["done"] != files or not summary:
                break
            return summary
    raise FedveilError("fetch: not all of the run came; fetch it again")


def _receive_file(name: str, messages: Iterator[Message], draft: Path) -> None:
    if not _FILE.fullmatch(name):
        raise FedveilError(f"fetch: {name!a}: is no name of a run's file; nothing was kept")
    path = draft / name
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as opened:
        said = _receive_chunks(messages, opened)
        size, found = opened.tell(), said.get("sha256")
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if (found, said.get("size")) != (digest, size):
        raise FedveilError(f"fetch: {name}: came with other bytes than were sent; fetch it again")


def _receive_chunks(messages: Iterator[Message], opened: IO[bytes]) -> Message:
    for message in messages:
        if "chunk" not in message:
            return message
        try:
            opened.write(base64.b64decode(message["chunk"], validate=True))
        except (TypeError, ValueError):
            break
    raise FedveilError("fetch: what came is no run; fetch it again")
