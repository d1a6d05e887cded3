"""Files that are whole or not there, whatever happens while they are written."""

import os
import secrets
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, content: bytes, mode: int = 0o666, *, sync: bool = True) -> None:
    """Writes a file in place of another, durably; a crash leaves the one or the other.

    Args:
        path: The file.
        content: All of it.
        mode: Its permissions, before the umask.
        sync: Whether it must outlive a power cut, too; else it outlives the process.

    Raises:
        OSError: The disk refuses; the file is as it was or, if only the folder was not synced, new.
    """
    draft = path.with_name(f".{path.name}.partial")
    with suppress(OSError):
        draft.unlink()  # one that a crash left would keep its permissions
    try:
        _write(draft, content, os.O_TRUNC, mode, sync=sync)
        draft.replace(path)
        if sync:
            sync_folder(path.parent)
    except OSError:
        with suppress(OSError):
            draft.unlink()
        raise


def create_secret_file(path: Path, content: bytes) -> None:
    """Writes a new file for its owner's eyes, durably; of two at once one wins.

    Raises:
        FileExistsError: It is there already; it is as it was.
        OSError: The disk refuses; there is none.
    """
    draft = draft_of(path)
    try:
        _write(draft, content, os.O_EXCL, 0o600)
        publish(draft, path)
    finally:
        with suppress(OSError):
            draft.unlink()


def draft_of(path: Path) -> Path:
    """A name of its own for a file that is to become `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def publish(draft: Path, path: Path) -> None:
    """Gives a finished draft its name, durably, and never in place of another file.

    Raises:
        OSError: There is one already, or the disk refuses.
    """
    os.link(draft, path)  # unlike a rename it replaces nothing
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a name durable: it is the folder's content that changed.

    Raises:
        OSError: The disk refuses.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, content: bytes, flag: int, mode: int, *, sync: bool = True) -> None:
    handle = os.open(path, os.O_CREAT | os.O_WRONLY | flag, mode)
    with os.fdopen(handle, "wb") as opened:
        opened.write(content)
        opened.flush()
        if sync:
            os.fsync(opened.fileno())
