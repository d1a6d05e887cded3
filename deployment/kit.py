"""A kit: the folder that one party of a federation is given, and all that it needs.

```
kit.toml          who it is for, where the server is, who signs runs
ca.pem            the authority's certificate, the root of all trust here
certificate.pem   the party's certificate
answer.json       a site's instead: its certificate and the roster, as the authority signed them
roster.json       who is in the federation, signed by the authority; the newest that is known
keys/             0700: private keys, 0600 each; a site makes its own, they never travel
state/            what the party's processes keep: ledger, runs, logs
```
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from cryptography import x509
from pydantic import Field

from ..config import PARTY, ConfigError, FedveilError, read_toml, validated_in
from ..config.options import Options
from ..files import replace_file
from ..privacy.secagg.keys import Identity
from .certificates import (
    check_authority,
    check_valid,
    fingerprint,
    is_issued,
    parse_certificate,
    read_certificate,
    subject_of,
)
from .keys import (
    CONTROL,
    COORDINATOR,
    IDENTITY,
    KEYS_OF,
    LINK,
    NODE,
    SPLIT,
    TLS,
    VAULT,
    check_private,
    openssh,
    read_control,
    read_hex,
    read_identity,
    read_node,
    read_secret,
)
from .roster import Roster, read_roster

KitRole = Literal["server", "site", "operator", "auditor"]


class KitFile(Options):
    """A kit's `kit.toml`; `fedveil provision` writes it.

    Attributes:
        federation: The federation's name.
        role: Who the kit is for.
        name: The party's name.
        server: Host name or address of the server.
        fleet_port: Port of the Fleet API, which sites reach.
        control_port: Port of the control plane, which everybody reaches.
        coordinator: Ed25519 public key that signs runs, 64 hexadecimal digits.
    """

    federation: str = Field(pattern=PARTY)
    role: KitRole
    name: str = Field(pattern=PARTY)
    server: str = Field(min_length=1)
    fleet_port: int = Field(ge=1, le=65535)
    control_port: int = Field(ge=1, le=65535)
    coordinator: str = Field(pattern=r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class Kit:
    """An opened kit; paths in it need not exist.

    Attributes:
        folder: Where it is.
        about: What it says of itself.
    """

    folder: Path
    about: KitFile

    @classmethod
    def read(cls, folder: Path, role: KitRole) -> Self:
        """Reads a kit's description.

        Raises:
            ConfigError: It is none, or another role's.
        """
        path = folder / "kit.toml"
        if not path.is_file():
            raise ConfigError(f"{folder}: is no kit; give the folder that holds kit.toml")
        about = validated_in(path, KitFile, read_toml(path))
        if about.role != role:
            raise ConfigError(
                f"{folder}: is the kit of {about.role} {about.name}; give one of "
                f"{'an' if role in {'operator', 'auditor'} else 'a'} {role}"
            )
        return cls(folder.resolve(), about)

    @property
    def name(self) -> str:
        """The party's name."""
        return self.about.name

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.pem"

    @property
    def roster(self) -> Path:
        """The signed roster."""
        return self.folder / "roster.json"

    @property
    def keys(self) -> Path:
        """The private keys."""
        return self.folder / "keys"

    @property
    def state(self) -> Path:
        """What the party's processes keep."""
        return self.folder / "state"

    @property
    def answer(self) -> Path:
        """What the authority answered to a site's request."""
        return self.folder / "answer.json"

    @property
    def fleet(self) -> str:
        """HOST:PORT of the Fleet API."""
        return f"{self._host}:{self.about.fleet_port}"

    @property
    def control(self) -> str:
        """HOST:PORT of the control plane."""
        return f"{self._host}:{self.about.control_port}"

    @property
    def _host(self) -> str:
        return f"[{self.about.server}]" if ":" in self.about.server else self.about.server

    @property
    def certificate_path(self) -> Path:
        """The file that the party's certificate is in."""
        return self.answer if self.about.role == "site" else self.folder / "certificate.pem"

    @property
    def private_key_path(self) -> Path:
        """The file of its certificate's private key."""
        return self.keys / (TLS if self.about.role == "server" else CONTROL)

    def authority(self) -> x509.Certificate:
        """The authority's certificate.

        Raises:
            ConfigError: It cannot be read, is none, or another federation's.
        """
        certificate = read_certificate(self.ca)
        check_authority(certificate, self.ca)
        if subject_of(certificate)[0] != self.about.federation:
            raise ConfigError(
                f"{self.ca}: is of another federation than {self.about.federation}; take the kit's"
            )
        return certificate

    def certificate(self) -> bytes:
        """The party's certificate (PEM).

        Raises:
            ConfigError: It is missing, or cannot be read.
        """
        if self.about.role == "site":
            return str(self._read_answer()["certificate"]).encode(errors="replace")
        return _read(self.certificate_path, "take it from the kit, or have it rotated")

    def private_key(self) -> bytes:
        """Its private key (PEM).

        Raises:
            ConfigError: It cannot be read, or others may read it.
        """
        return read_secret(self.private_key_path)

    def read_roster(self) -> Roster:
        """The newest roster in the kit.

        Raises:
            ConfigError: There is none, one is not this federation's, or two of one version differ.
        """
        found = []
        if self.roster.exists():
            data = _read(self.roster, "fetch it again")
            found.append(self._checked(data, self.roster))
        if self.about.role == "site" and self.answer.exists():
            data = json.dumps(self._read_answer()["roster"]).encode()
            found.append(self._checked(data, self.answer))
        if not found:
            raise ConfigError(f"{self.roster}: is missing; put the authority's there")
        newest = max(found, key=lambda roster: roster.version)
        if any(one.version == newest.version and one != newest for one in found):
            raise ConfigError(
                f"{self.roster}: has other members than {self.answer.name}, both as version "
                f"{newest.version}; ask the authority for a newer one"
            )
        return newest

    def keep_roster(self, data: bytes) -> Roster:
        """Takes a newer roster into the kit.

        Args:
            data: As `sign_roster` made it; it may come from anywhere.

        Returns:
            The newest roster; the one that was there if this is the same.

        Raises:
            ConfigError: It is not this federation's, or not newer: somebody who was revoked would
                come back by it. The kit is as it was.
            FedveilError: It cannot be written.
        """
        new = self._checked(data, self.roster)
        if self.roster.exists() or self.answer.exists():
            present = self.read_roster()
            if new == present:
                return present
            if new.version <= present.version:
                raise ConfigError(
                    f"roster: version {new.version} is not above {present.version}, which this kit "
                    "has; the server's is not the authority's newest, ask them"
                )
        try:
            replace_file(self.roster, data, 0o644)
        except OSError as error:
            raise FedveilError(f"{self.roster}: cannot be written ({error.strerror})") from None
        return new

    def _checked(self, data: bytes, path: Path) -> Roster:
        try:
            roster = read_roster(data, self.authority())
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        if roster.federation != self.about.federation:
            raise ConfigError(f"{path}: is the roster of another federation; take this one's")
        return roster

    def _read_answer(self) -> dict[str, Any]:
        content = _read(self.answer, "send request.json to the authority and put its answer there")
        with suppress(ValueError, RecursionError):
            raw = json.loads(content)
            if isinstance(raw, dict) and raw.keys() == {"certificate", "roster"}:
                return raw
        raise ConfigError(f"{self.answer}: is no answer of an authority; have it sent again")


def open_kit(folder: Path, role: KitRole, now: datetime | None = None) -> Kit:
    """Opens a kit that is whole: everything in it belongs to its party, and holds now.

    Args:
        folder: The kit.
        role: Whose it must be.
        now: With a time zone; the clock's where it is left out.

    Raises:
        ConfigError: What is wrong with it, and the mend.
    """
    try:
        kit = Kit.read(folder, role)
        _check(kit, now or datetime.now(UTC))
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: cannot be read ({error.strerror}); call it as the kit's owner"
        ) from None
    return kit


def _check(kit: Kit, now: datetime) -> None:
    check_valid(kit.authority(), kit.ca, now)
    _check_keys(kit)
    _check_certificate(kit, now)
    if kit.about.role == "site":
        _check_member(kit)
    if kit.about.role == "server":
        _check_server(kit)


def _check_keys(kit: Kit) -> None:
    for name in KEYS_OF[kit.about.role]:
        if not (kit.keys / name).exists():
            mend = "put it back, or have it rotated"
            if kit.about.role == "site":
                mend = f"make a site's keys by `fedveil site keygen {kit.folder}`"
            raise ConfigError(f"{kit.keys / name}: is missing; {mend}")
    check_private(kit.keys, kit.keys.stat().st_mode, "700")
    for name in KEYS_OF[kit.about.role]:
        read_secret(kit.keys / name)


def _check_certificate(kit: Kit, now: datetime) -> None:
    path = kit.certificate_path
    certificate = parse_certificate(kit.certificate(), path)
    if not is_issued(certificate, kit.authority()):
        raise ConfigError(f"{path}: is not signed by the federation's authority; take the kit's")
    check_valid(certificate, path, now)
    owner = subject_of(certificate)
    if owner != (kit.about.federation, kit.about.role, kit.name):
        raise ConfigError(
            f"{path}: is the certificate of {owner[1]} {owner[2]}, and the kit is of "
            f"{kit.about.role} {kit.name}; put its own there"
        )
    if read_control(kit.private_key_path).public_key() != certificate.public_key():
        raise ConfigError(
            f"{kit.private_key_path}: is not the key of {path.name}; put this {kit.about.role}'s "
            "own key back, or the answer to its newest request"
        )


def _check_member(kit: Kit) -> None:
    """That a site's other keys are those that the federation knows it by."""
    identity = read_identity(kit.keys / IDENTITY).public.hex()
    node = openssh(read_node(kit.keys / NODE).public_key())
    read_hex(kit.keys / VAULT, 32)
    read_hex(kit.keys / SPLIT, 32)
    known = next((one for one in kit.read_roster().sites if one.name == kit.name), None)
    if known is None:
        return
    for name, own, listed in (
        (IDENTITY, identity, known.identity),
        (NODE, node, known.node),
    ):
        if own != listed:
            raise ConfigError(
                f"{kit.keys / name}: is not the key that the roster has of {kit.name}; put its own "
                "back, or send request.json to the authority"
            )
    if fingerprint(parse_certificate(kit.certificate(), kit.answer)) != known.certificate:
        raise ConfigError(
            f"{kit.answer}: is not the certificate that the roster has of {kit.name}; put the "
            "authority's newest answer there"
        )


def _check_server(kit: Kit) -> None:
    path = kit.keys / COORDINATOR
    if Identity(read_hex(path, 64)[:32]).public.hex() != kit.about.coordinator:
        raise ConfigError(
            f"{path}: is not the key that all kits have of the coordinator; put its own back"
        )
    read_hex(kit.keys / LINK, 32)
    kit.read_roster()


def _read(path: Path, mend: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {mend}") from None
