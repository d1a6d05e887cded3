"""Files that a site keeps for itself: keys, and the ledger that goes with the split's key."""

import secrets
from contextlib import suppress
from pathlib import Path

from ..files import create_secret_file
from ..machine import on_network
from ..privacy.ledger import Journal, Ledger
from ..privacy.limits import UnavailableError


def ledger_and_key(
    ledger_file: Path,
    key_file: Path,
    witness: Path,
    site: str,
    *,
    simulated: bool,
) -> tuple[Ledger, bytes]:
    """A site's ledger and split key, made where they never were; they belong together.

    Another process may make them at the same time, and either's will do.

    Args:
        ledger_file: The ledger; the caller closes it.
        key_file: The key of the split.
        witness: A file that is there once the ledger was opened, and says so when it is lost.
        site: Whose they are.
        simulated: What a new ledger says of itself.

    Raises:
        LedgerError: The ledger was lost or cannot be used, or ledger and key are not of one site.
    """
    # Several hosts may open one ledger in turn.
    journal: Journal = "delete" if on_network(ledger_file.parent) else "wal"
    # The ledger comes first: a witness without one says that a ledger was lost.
    if not ledger_file.exists() and not witness.exists():
        with suppress(FileExistsError):
            Ledger.create(ledger_file, site, simulated=simulated, journal=journal)
    ledger = Ledger.open(ledger_file, journal=journal)
    try:
        if not key_file.exists():
            if ledger.read().datasets:
                raise UnavailableError(
                    f"{key_file}: is missing; put it back, or records would change their sides"
                )
            make_secret(key_file)
        return ledger, read_key(key_file)
    except BaseException:
        ledger.close()
        raise


def secret(path: Path) -> bytes:
    """32 secret bytes in a file, made where it is missing.

    Raises:
        UnavailableError: It cannot be made, or holds none.
    """
    if not path.exists():
        make_secret(path)
    return read_key(path)


def make_secret(path: Path) -> None:
    """Makes a file of 32 secret bytes; one that another process makes at the same time will do.

    Raises:
        UnavailableError: The disk refuses.
    """
    try:
        with suppress(FileExistsError):
            create_secret_file(path, f"{secrets.token_hex(32)}\n".encode())
    except OSError as error:
        raise UnavailableError(f"{path}: {error.strerror}; check the path and the disk") from None


def read_key(path: Path) -> bytes:
    """32 secret bytes, which stand in a file as 64 hexadecimal digits.

    Raises:
        UnavailableError: It holds none.
    """
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        key = b""
    if len(key) != 32:
        raise UnavailableError(f"{path}: holds no key; put a whole copy back")
    return key
