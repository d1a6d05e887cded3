"""The authority's folder: its key, who is a member, and what it has signed.

```
ca.key          0600: signs certificates and the roster; belongs on no machine with a network
ca.pem          its certificate
federation.toml what the federation was made from
members.toml    who is a member or is to be one
coordinator.pub the key that signs runs, for new kits
roster.json     the newest
certificates/   what was issued, by name
```
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from ..config import (
    ConfigError,
    FederationFile,
    Members,
    read_federation,
    read_toml,
    validated_in,
)
from ..files import draft_of, replace_file, sync_folder
from .certificates import (
    certificate_pem,
    check_authority,
    check_valid,
    issue_member,
    issue_server,
    read_certificate,
)
from .keys import read_control
from .roster import Member, Role, Roster, read_roster, sign_roster

FOLDERS: dict[Role, str] = {"site": "sites", "operator": "operators", "auditor": "auditors"}
"""Where a role's kits are, and the list of its members."""


@dataclass(frozen=True)
class Authority:
    """The opened folder of an authority, among the kits that it made.

    Attributes:
        kits: The folder of all kits.
        file: What the federation was made from.
        key: Signs certificates and the roster.
        certificate: Its own.
        now: When it acts, with a time zone.
    """

    kits: Path
    file: FederationFile
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    now: datetime

    @classmethod
    @contextmanager
    def opened(cls, kits: Path, now: datetime | None = None) -> Iterator[Self]:
        """Opens a federation's authority for a change, one process at a time.

        Raises:
            ConfigError: It is none, is damaged, or a file cannot be read or written.
        """
        folder = kits / "authority"
        try:
            if not (folder / "ca.key").exists():
                raise ConfigError(
                    f"{kits}: holds no authority; give the folder that `fedveil provision create` "
                    "made"
                )
            handle = os.open(folder, os.O_RDONLY)
            try:
                # Of two at once each would sign a roster of the same version.
                fcntl.flock(handle, fcntl.LOCK_EX)
                yield cls._read(kits, now or datetime.now(UTC))
            finally:
                os.close(handle)
        except OSError as error:
            raise ConfigError(
                f"{error.filename or kits}: cannot be read or written ({error.strerror}); check "
                "its owner and the disk"
            ) from None

    @classmethod
    def _read(cls, kits: Path, now: datetime) -> Self:
        folder = kits / "authority"
        key, path = read_control(folder / "ca.key"), folder / "ca.pem"
        certificate = read_certificate(path)
        if check_authority(certificate, path) != key.public_key():
            raise ConfigError(f"{folder / 'ca.key'}: is not the key of ca.pem; put its own back")
        check_valid(certificate, path, now)
        return cls(kits, read_federation(folder / "federation.toml"), key, certificate, now)

    @property
    def folder(self) -> Path:
        """The authority's own folder."""
        return self.kits / "authority"

    @property
    def federation(self) -> str:
        """The federation's name."""
        return self.file.federation.name

    @property
    def coordinator(self) -> str:
        """The public key that signs runs, 64 hexadecimal digits."""
        return (self.folder / "coordinator.pub").read_text(encoding="ascii").strip()

    @property
    def members(self) -> Members:
        """Who is a member, or is to be one."""
        path = self.folder / "members.toml"
        return validated_in(path, Members, read_toml(path))

    def role_of(self, name: str) -> Role | None:
        """What somebody is in the federation, if anything."""
        lists = {owner: role for role, owner in FOLDERS.items()}
        return next((lists[owner] for one, owner in self.members.roles() if one == name), None)

    def enlist(self, name: str, role: Role) -> None:
        """Adds somebody to the members."""
        self._keep({**self._names(), FOLDERS[role]: (*self._names()[FOLDERS[role]], name)})

    def strike(self, name: str) -> None:
        """Takes somebody out of the members."""
        lists = self._names().items()
        self._keep({owner: tuple(n for n in names if n != name) for owner, names in lists})

    def _names(self) -> dict[str, tuple[str, ...]]:
        return {owner: getattr(self.members, owner) for owner in FOLDERS.values()}

    def _keep(self, lists: dict[str, tuple[str, ...]]) -> None:
        path = self.folder / "members.toml"
        validated_in(path, Members, lists)
        replace_file(path, tomli_w.dumps(lists).encode())

    @property
    def roster(self) -> Roster:
        """The newest roster."""
        path = self.folder / "roster.json"
        try:
            return read_roster(path.read_bytes(), self.certificate)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def entry(self, name: str) -> Member | None:
        """A name's entry in the roster."""
        return next((one for one in self.roster.members if one.name == name), None)

    def enter(self, member: Member) -> None:
        """Puts a member into the roster, in place of its old entry, and publishes it."""
        others = [one for one in self.roster.members if one.name != member.name]
        self._sign(sorted([*others, member], key=lambda one: one.name))

    def remove(self, name: str) -> None:
        """Takes a name out of the roster, if it is there, and publishes it."""
        others = [one for one in self.roster.members if one.name != name]
        if len(others) < len(self.roster.members):
            self._sign(others)
        self.publish()

    def _sign(self, members: list[Member]) -> None:
        old = self.roster
        new = replace(old, version=old.version + 1, members=tuple(members))
        replace_file(self.folder / "roster.json", sign_roster(new, self.key), 0o644)
        self.publish()

    def publish(self) -> None:
        """Gives the server's kit the newest roster, if that kit is here."""
        content = (self.folder / "roster.json").read_bytes()
        target = self.kits / "server" / "roster.json"
        if target.parent.is_dir() and not (target.exists() and target.read_bytes() == content):
            replace_file(target, content, 0o644)

    def issued(self, name: str) -> x509.Certificate | None:
        """The certificate that a member was issued last, if it is there."""
        path = self.folder / "certificates" / f"{name}.pem"
        return read_certificate(path) if path.exists() else None

    def issue(self, name: str, role: Role, key: ec.EllipticCurvePublicKey) -> x509.Certificate:
        """Issues a member's certificate, and keeps a copy."""
        days = self.file.certificates.days
        made = issue_member(self.certificate, self.key, key, (name, role), days, self.now)
        path = self.folder / "certificates" / f"{name}.pem"
        replace_file(path, certificate_pem(made), 0o644)
        return made

    def issue_server(self, key: ec.EllipticCurvePublicKey) -> x509.Certificate:
        """Issues the server's certificate."""
        names, days = self.file.server.names, self.file.certificates.days
        return issue_server(self.certificate, self.key, key, names, days, self.now)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that is there whole or not at all: it is made under another name.

    Raises:
        OSError: The disk refuses, or there is something in it already.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = draft_of(path)
    draft.mkdir(mode=0o700)
    try:
        yield draft
        draft.rename(path)  # an empty folder is replaced, another is refused
        sync_folder(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
