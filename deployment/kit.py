"""A kit: the folder that one party of a federation is given, and all that it needs.

```
kit.toml          who it is for, where the server is, who signs runs
ca.pem            the authority's certificate, the root of all trust here
certificate.pem   the party's control-plane certificate (a site's is in answer.json)
roster.json       who is in the federation, signed by the authority
keys/             0700: private keys, 0600 each; a site makes its own, they never travel
state/            what the party's processes keep: ledger, runs, logs
```
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from cryptography import x509
from pydantic import Field

from ..config import ConfigError, read_toml, validated
from ..config.options import NAME, Options
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

    federation: str = Field(pattern=NAME)
    role: KitRole
    name: str = Field(pattern=NAME)
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
        try:
            about = validated(KitFile, read_toml(path))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        if about.role != role:
            raise ConfigError(
                f"{folder}: is the kit of {about.role} {about.name}; give one of a {role}"
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
    def fleet(self) -> str:
        """HOST:PORT of the Fleet API."""
        return f"{self.about.server}:{self.about.fleet_port}"

    @property
    def control(self) -> str:
        """HOST:PORT of the control plane."""
        return f"{self.about.server}:{self.about.control_port}"

    @property
    def answer(self) -> Path:
        """What the authority answered to a site's request."""
        return self.folder / "answer.json"

    def authority(self) -> x509.Certificate:
        """The authority's certificate.

        Raises:
            ConfigError: It cannot be read, or is none.
        """
        try:
            return x509.load_pem_x509_certificate(_read(self.ca))
        except ValueError:
            raise ConfigError(f"{self.ca}: holds no certificate; take the kit's") from None

    def certificate(self) -> bytes:
        """A site's certificate (PEM).

        Raises:
            ConfigError: It is missing, or cannot be read.
        """
        return str(self._read_answer()["certificate"]).encode()

    def read_roster(self) -> Roster:
        """The newest roster in the kit.

        Raises:
            ConfigError: There is none, or one is not this federation's.
        """
        found = []
        if self.roster.exists():
            found.append(self._checked(_read(self.roster), self.roster))
        if self.answer.exists():
            data = json.dumps(self._read_answer()["roster"]).encode()
            found.append(self._checked(data, self.answer))
        if not found:
            raise ConfigError(f"{self.roster}: is missing; put the authority's there")
        return max(found, key=lambda roster: roster.version)

    def _checked(self, data: bytes, path: Path) -> Roster:
        try:
            roster = read_roster(data, self.authority())
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        if roster.federation != self.about.federation:
            raise ConfigError(f"{path}: is the roster of another federation; take this one's")
        return roster

    def _read_answer(self) -> dict[str, Any]:
        try:
            raw = json.loads(_read(self.answer))
        except (ValueError, RecursionError):
            raw = None
        if isinstance(raw, dict) and raw.keys() == {"certificate", "roster"}:
            return raw
        raise ConfigError(f"{self.answer}: is no answer of an authority; have it sent again")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None
