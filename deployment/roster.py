"""Who is in a federation: one list, signed by its authority, that replaces pinning by hand.

Every kit has the authority's certificate. The roster is signed with its key, which stays with the
authority and never on the server: so a server hands newer rosters on, and cannot make one. A site
takes only a version above its own, so nobody that was revoked comes back by an older list.
"""

import json
from dataclasses import asdict, dataclass
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from ..config import ConfigError

Role = Literal["operator", "auditor", "site"]
ROLES: tuple[Role, ...] = ("operator", "auditor", "site")
_LABEL = b"fedveil roster 1\n"


@dataclass(frozen=True)
class Member:
    """One who may speak to the server.

    Attributes:
        name: Unique in the federation.
        role: What for.
        certificate: SHA-256 of its control-plane certificate (DER), 64 hexadecimal digits.
        identity: A site's Ed25519 public key, 64 hexadecimal digits; signs in secure sums.
        node: A site's P-384 public key in OpenSSH form; it signs every request to the Fleet API.
    """

    name: str
    role: Role
    certificate: str
    identity: str = ""
    node: str = ""


@dataclass(frozen=True)
class Roster:
    """A federation's members.

    Attributes:
        federation: Its name.
        version: Grows with every change.
        members: Ascending by name.
    """

    federation: str
    version: int
    members: tuple[Member, ...]

    @property
    def sites(self) -> tuple[Member, ...]:
        """The sites, ascending by name: a site's number is its place here, from 1."""
        return tuple(member for member in self.members if member.role == "site")

    @property
    def identities(self) -> dict[str, bytes]:
        """The sites' public identities by name."""
        return {site.name: bytes.fromhex(site.identity) for site in self.sites}

    def holder(self, certificate: str) -> Member | None:
        """Whose certificate it is, by its SHA-256; nobody's if it was revoked."""
        return next((one for one in self.members if one.certificate == certificate), None)


def sign_roster(roster: Roster, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A roster as the file that is handed on: JSON with the authority's signature (ECDSA)."""
    statement = _canonical(asdict(roster))
    signature = key.sign(_LABEL + statement, ec.ECDSA(hashes.SHA256())).hex()
    return _canonical({"roster": json.loads(statement), "signature": signature}) + b"\n"


def read_roster(data: bytes, authority: x509.Certificate) -> Roster:
    """Reads what `sign_roster` made.

    Raises:
        ConfigError: It is no roster, or another authority's.
    """
    try:
        raw = json.loads(data)
        statement, signature = _canonical(raw["roster"]), bytes.fromhex(raw["signature"])
        public = authority.public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise ConfigError("ca.pem: is no certificate of a federation; take the kit's")
        public.verify(signature, _LABEL + statement, ec.ECDSA(hashes.SHA256()))
        members = tuple(Member(**member) for member in raw["roster"].pop("members"))
        return Roster(members=members, **raw["roster"])
    except InvalidSignature:
        raise ConfigError(
            "roster: is not signed by the federation's authority; fetch it again, or ask them"
        ) from None
    except (ValueError, TypeError, LookupError, RecursionError):
        raise ConfigError("roster: is none; fetch it again") from None


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
