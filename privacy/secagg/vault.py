"""Where a site's state is kept between messages: one encrypted file, replaced whole.

The file is AES-256-GCM under the site's own key, bound to the site and the run. It tells an altered
file from a right one, but not an older copy from the newest: what the state must never do twice is
counted by the site's ledger, too. A file system that keeps old versions (snapshots, backups, worn
flash cells) keeps the ciphertext of what was erased; the key should not be kept with them.
"""

import fcntl
import os
from pathlib import Path
from threading import Lock
from typing import Self

from ...files import replace_file
from .errors import LostStateError, StateInUseError
from .keys import NONCE_BYTES, digest, seal, system_entropy, unseal

_MAGIC = b"FVST\x01"


class Vault:
    """One process's hold on the state of one site in one run; a `state.Store`."""

    def __init__(
        self, path: Path, key: bytes, site: str, run: str, *, durable: bool = True
    ) -> None:
        """Takes hold of it; a file is made by the first `save`.

        Args:
            path: The file; a lock file lies beside it.
            key: 32 secret bytes that never leave the site.
            site: Whose state.
            run: Of which run.
            durable: Whether what is saved outlives a power cut: it must, but where no run goes on
                with the state that a process before it left.

        Raises:
            StateInUseError: Another process or object holds it: two could send two vectors.
            LostStateError: The folder cannot be used.
            ValueError: The key is not 32 bytes.
        """
        if len(key) != 32:
            raise ValueError(f"key = {len(key)} bytes: must be 32 secret bytes")
        self._path, self._key, self._durable = path, key, durable
        self._process, self._one_at_a_time = os.getpid(), Lock()
        self._about = digest("vault", site.encode(), run.encode())
        try:
            self._lock: int | None = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise LostStateError(f"{path}: {error.strerror}; check the path and the disk") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise StateInUseError(
                f"{path}: another process holds it; wait, or stop that one"
            ) from None
        except OSError as error:
            self.close()
            raise LostStateError(
                f"{path}: its disk has no locks ({error.strerror}); keep it on a local one"
            ) from None

    def load(self) -> bytes | None:
        """What was saved last, or nothing if nothing ever was.

        Raises:
            LostStateError: The file is not as it was saved, is another site's or run's, or cannot
                be read.
            StateInUseError: It is closed, or another process's.
        """
        self._check_open()
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LostStateError(f"{self._path}: {error.strerror}; check the file") from None
        start = len(_MAGIC) + NONCE_BYTES
        nonce, box = content[len(_MAGIC) : start], content[start:]
        state = None
        if content.startswith(_MAGIC) and len(nonce) == NONCE_BYTES:
            state = unseal(self._key, nonce, box, self._about)
        if state is None:
            raise LostStateError(
                f"{self._path}: is not as it was saved by this site in this run; move it away and "
                "begin a new epoch, and never put an older copy back"
            )
        return state

    def replace(self, before: bytes | None, after: bytes) -> None:
        """Puts `after` in place of `before`, durably before it returns.

        Raises:
            StateInUseError: Something else is there than `before`: another object has changed it.
                Or it is closed, or another process's.
            LostStateError: The disk refuses; there is what was saved before or, if only the sync of
                the folder failed, this.
        """
        with self._one_at_a_time:
            if self.load() != before:
                raise StateInUseError(
                    f"{self._path}: was changed since this site took it up, expected as it was "
                    "left; take it up anew"
                )
            self._save(after)

    def _save(self, content: bytes) -> None:
        nonce = system_entropy(NONCE_BYTES)
        sealed = _MAGIC + nonce + seal(self._key, nonce, content, self._about)
        try:
            replace_file(self._path, sealed, mode=0o600, sync=self._durable)
        except OSError as error:
            raise LostStateError(f"{self._path}: {error.strerror}; check the disk") from None

    def close(self) -> None:
        """Lets go of it, for good; again, it does nothing."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _check_open(self) -> None:
        if self._lock is None:
            raise StateInUseError(f"{self._path}: is closed, expected an open one")
        if os.getpid() != self._process:  # a fork holds the same lock, and would send twice
            raise StateInUseError(f"{self._path}: is of another process, expected one opened here")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
