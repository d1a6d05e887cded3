"""Who may call the server: a certificate's holder by the roster as it is now, and what for.

Without gRPC, so that it can be read and tested alone.
"""

import threading
from contextlib import suppress
from pathlib import Path

from ..config import ConfigError, FedveilError
from ..deployment.control import METHODS, our_version
from ..deployment.kit import Kit
from ..deployment.roster import Member, Roster
from ..files import replace_file

_Stamp = tuple[int, int, int]
_VERSION = "roster.version"


class RefusedError(FedveilError):
    """A call that is refused.

    Attributes:
        code: The gRPC status, by name.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Gate:
    """Reads the roster again whenever its file changes; then a revocation acts at once."""

    def __init__(self, kit: Kit) -> None:
        """Reads the roster.

        Raises:
            ConfigError: It cannot be read, or is not signed by the authority.
        """
        self._kit, self._lock = kit, threading.Lock()
        self._stamp = _stamp(kit.roster)
        found = kit.read_roster()
        self._newest = _noted(kit)
        if found.version < self._newest:
            raise self._older(found)
        self._roster: Roster | ConfigError = found
        self._note(found)

    def roster(self) -> Roster:
        """The members now.

        Raises:
            RefusedError: The file is damaged, or older than what it was: then nobody is a member.
        """
        with self._lock:
            stamp = _stamp(self._kit.roster)
            if stamp != self._stamp:
                self._stamp, self._roster = stamp, self._read()
            if isinstance(self._roster, ConfigError):
                raise RefusedError("PERMISSION_DENIED", f"the server's {self._roster}")
            return self._roster

    def holder(self, certificate: str) -> Member:
        """Whose certificate it is, by its SHA-256.

        Raises:
            RefusedError: Nobody's: it was revoked, or replaced.
        """
        member = self.roster().holder(certificate)
        if member is None:
            raise RefusedError(
                "PERMISSION_DENIED",
                f"certificate {certificate[:16]}: is not in the roster (revoked or replaced); ask "
                "the authority for a new one",
            )
        return member

    def _read(self) -> Roster | ConfigError:
        try:
            found = self._kit.read_roster()
        except ConfigError as error:
            return error
        if found.version < self._newest:
            return self._older(found)
        self._note(found)
        return found

    def _older(self, found: Roster) -> ConfigError:
        """An older list would bring back who was revoked."""
        return ConfigError(
            f"roster.json: has version {found.version}, it had {self._newest}; put the newer one "
            "back"
        )

    def _note(self, found: Roster) -> None:
        """Keeps the version for the processes after this one."""
        self._newest = found.version
        with suppress(OSError):  # a full disk must not shut everybody out
            replace_file(self._kit.state / _VERSION, f"{found.version}\n".encode())


def refuse_role(method: str, member: Member) -> None:
    """Refuses what a member's role may not ask.

    Raises:
        RefusedError: It may not.
    """
    roles = METHODS[method].roles
    if member.role not in roles:
        raise RefusedError(
            "PERMISSION_DENIED",
            f"{method}: is for {' or '.join(roles)}; {member.name} is {member.role}",
        )


def refuse_version(theirs: str) -> None:
    """Refuses a caller of another major or minor version.

    Raises:
        RefusedError: It is.
    """
    ours = our_version()
    if theirs.split(".")[:2] != ours.split(".")[:2]:
        raise RefusedError(
            "FAILED_PRECONDITION",
            f"version {theirs or 'unknown'}: the server has fedveil {ours}, and major and minor "
            "must be equal; install that",
        )


def _noted(kit: Kit) -> int:
    """The newest version that a process before this one has seen; 0 if none says so."""
    try:
        return int((kit.state / _VERSION).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _stamp(path: Path) -> _Stamp:
    try:
        found = path.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_mtime_ns, found.st_size, found.st_ino)
