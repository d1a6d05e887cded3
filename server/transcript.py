"""The public transcript of a run's secure sums, as a file: appended, synced, mended, read."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from ..config import FedveilError
from ..privacy.secagg.errors import SecAggError
from ..privacy.secagg.terms import Setup
from ..privacy.secagg.transcript import Kept, Released, framed, verify_transcript

NAME = "transcript.bin"


class Transcript:
    """A transcript that is being written.

    The file is open for as long as a message takes: what is kept is in it, and nothing is held
    back that another process, or a later run of this one, would find in the midst of its own.
    """

    def __init__(self, path: Path) -> None:
        """Goes on with a file, behind its last whole message, or begins it.

        Raises:
            FedveilError: It cannot be written.
        """
        self.path = path
        try:
            with path.open("ab+") as file:
                file.truncate(_whole(file))
        except OSError as error:
            raise self._refused(error) from None

    def keep(self, message: Kept) -> None:
        """Adds a message.

        An epoch is noted durably before the sites are asked for it, for none is begun twice; and a
        sum once it is there.

        Raises:
            FedveilError: The disk refuses.
        """
        try:
            with self.path.open("ab") as file:
                file.write(framed(message))
                if isinstance(message, Setup | Released):
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise self._refused(error) from None

    def _refused(self, error: OSError) -> FedveilError:
        return FedveilError(f"{self.path}: cannot be written ({error.strerror})")


def taken_up(
    path: Path, identities: Mapping[str, bytes]
) -> tuple[int, dict[str, tuple[int, bytes]]]:
    """Where a run's secure sums go on: the next epoch, and the ledgers as signed last.

    Raises:
        FedveilError: The transcript is damaged.
    """
    if not path.exists() or not path.stat().st_size:
        return 0, {}
    try:
        verdict = verify_transcript(path.read_bytes(), identities)
    except SecAggError as error:
        raise FedveilError(f"{path}: {error}; begin a new run") from None
    return verdict.newest + 1, dict(verdict.ledgers)


def _whole(file: IO[bytes]) -> int:
    """Length of a file up to its last whole message; a crash may have torn the one behind."""
    end, start = file.seek(0, os.SEEK_END), 0
    while start + 4 <= end:
        file.seek(start)
        after = start + 4 + int.from_bytes(file.read(4), "big")
        if after > end:
            break
        start = after
    return start
