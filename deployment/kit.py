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

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from ..config import ConfigError, read_toml, validated
from ..config.options import NAME, Options

if TYPE_CHECKING:
    from .roster import Roster

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

    def certificate(self) -> bytes:
        """The party's certificate (PEM).

        Raises:
            ConfigError: It cannot be read.
        """
        return _read(self.folder / "certificate.pem")

    def private_key(self) -> bytes:
        """The key of the party's control-plane certificate (PEM).

        Raises:
            ConfigError: It cannot be read.
        """
        return _read(self.keys / "control.key")

    def read_roster(self) -> "Roster":
        """Who is in the federation.

        Raises:
            ConfigError: The list cannot be read, or is not signed by the kit's authority.
        """
        from cryptography.x509 import load_pem_x509_certificate

        from .roster import read_roster

        try:
            authority = load_pem_x509_certificate(_read(self.ca))
        except ValueError:
            raise ConfigError(f"{self.ca}: is no certificate; put the kit's back") from None
        return read_roster(_read(self.roster), authority)

    @property
    def fleet(self) -> str:
        """HOST:PORT of the Fleet API."""
        return f"{self.about.server}:{self.about.fleet_port}"

    @property
    def control(self) -> str:
        """HOST:PORT of the control plane."""
        return f"{self.about.server}:{self.about.control_port}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); take the whole kit"
        ) from None
