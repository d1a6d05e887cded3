"""Watching a run from afar: its events in order, each once, across lost connections."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from .control import ControlClient, Message, UnreachableError
from .kit import Kit

_LONGEST_WAIT = 30.0
_PATIENCE = 600.0


def watch(
    kit: Kit,
    run_id: str,
    told: Callable[[str], None],
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[Message]:
    """Yields what `watch` of the control plane sends, until the run ends.

    Where the connection is lost it is made anew, with longer and longer pauses, and goes on after
    the last event that came.

    Args:
        kit: An operator's or an auditor's.
        run_id: Which run.
        told: Hears in words that the server is away.
        pause: Waits so many seconds.

    Yields:
        `{"state": ...}`, `{"event": ..., "offset": ...}`, `{"end": ...}`.

    Raises:
        UnreachableError: The server could not be reached at all, or is away for ten minutes.
        FedveilError: It refuses, or failed.
    """
    offset, reached, waited, next_wait = 0, False, 0.0, 1.0
    while True:
        try:
            with ControlClient(kit) as client:
                for message in client.stream("watch", {"run": run_id, "offset": offset}):
                    reached, waited, next_wait = True, 0.0, 1.0
                    offset = _offset(message, offset)
                    if "alive" not in message:
                        yield message
                    if "end" in message:
                        return
            lost = UnreachableError(f"{kit.control}: hung up")
        except UnreachableError as error:
            lost = error
        if not reached or waited >= _PATIENCE:
            raise lost
        told(f"{lost}; trying again in {next_wait:g} s")
        pause(next_wait)
        waited, next_wait = waited + next_wait, min(2 * next_wait, _LONGEST_WAIT)


def _offset(message: Message, before: int) -> int:
    found: Any = message.get("offset", before)
    return found if isinstance(found, int) else before
