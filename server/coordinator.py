"""The coordinator's own secrets: who signs a run, and whom sealed replies are for."""

import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..config import FedveilError
from ..files import create_secret_file
from ..privacy.secagg.keys import Identity, public_of

_FILE = "coordinator.key"


@dataclass(frozen=True)
class Coordinator:
    """Who asks the sites.

    Attributes:
        identity: Signs each run; sites may have it pinned.
        sealing: X25519 private key that opens sealed replies.
    """

    identity: Identity
    sealing: bytes = field(repr=False)

    @property
    def aggregator(self) -> bytes:
        """The public key that replies are sealed for."""
        return public_of(self.sealing)


def coordinator(folder: Path) -> Coordinator:
    """The coordinator of the run in a folder, made where it is missing.

    Raises:
        FedveilError: Its key cannot be made, or is none.
    """
    path = folder / _FILE
    try:
        if not path.exists():
            with suppress(FileExistsError):  # of two at once either's will do
                create_secret_file(path, f"{secrets.token_hex(64)}\n".encode())
    except OSError as error:
        raise FedveilError(f"{path}: cannot be written ({error.strerror})") from None
    return read_coordinator(path)


def read_coordinator(path: Path) -> Coordinator:
    """The coordinator of a key file.

    Raises:
        FedveilError: It holds none.
    """
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii"))
    except OSError as error:
        raise FedveilError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        key = b""
    if len(key) != 64:
        raise FedveilError(f"{path}: holds no coordinator's key; put a whole copy back")
    return Coordinator(Identity(key[:32]), key[32:])
