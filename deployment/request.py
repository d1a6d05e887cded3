"""A site's request to be taken into a federation: its public keys, signed with each private one.

The three signatures are over the whole statement, so that whoever sends it holds all three keys,
and no part of one request means anything in another. That it is the site which sent it nobody can
see from the file: the two compare its fingerprint by telephone.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_ssh_public_key

from ..config import ConfigError
from ..privacy.secagg.keys import Identity, digest, is_signed
from .certificates import subject_name, subject_of
from .keys import openssh

_ECDSA = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True)
class Request:
    """What a site asks its authority to sign.

    Attributes:
        name: The site's name.
        federation: The federation's.
        identity: Ed25519 public key, 64 hexadecimal digits.
        node: P-384 public key in OpenSSH's form.
        csr: Certificate signing request for the control plane (PEM, RFC 2986).
    """

    name: str
    federation: str
    identity: str
    node: str
    csr: str

    @property
    def statement(self) -> bytes:
        """What is signed, 32 bytes."""
        return digest("member request", _canonical(asdict(self)))

    @property
    def fingerprint(self) -> str:
        """80 bits of the statement, to be read out: nobody finds other keys with the same."""
        shown = self.statement.hex()[:20]
        return "-".join(shown[start : start + 4] for start in range(0, 20, 4))

    @property
    def control(self) -> ec.EllipticCurvePublicKey:
        """The public key that the certificate is asked for.

        Raises:
            ValueError: The signing request is none of a P-256 key that its holder signed.
        """
        try:
            csr = x509.load_pem_x509_csr(self.csr.encode())
            key = csr.public_key()
            valid = csr.is_signature_valid
            subject = subject_of(csr)
        except (UnsupportedAlgorithm, InvalidSignature) as error:
            raise ValueError(str(error)) from None
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise ValueError("csr: is not of a P-256 key")
        if not valid or subject != (self.federation, "site", self.name):
            raise ValueError("csr: is not signed, or of somebody else")
        return key


def make_request(
    name: str,
    federation: str,
    identity: Identity,
    node: ec.EllipticCurvePrivateKey,
    control: ec.EllipticCurvePrivateKey,
) -> bytes:
    """A site's request, as its file holds it.

    Args:
        name: The site's name.
        federation: The federation's.
        identity: Its key in secure sums.
        node: Its key at the Fleet API.
        control: Its key at the control plane.
    """
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject_name(federation, "site", name))
        .sign(control, hashes.SHA256())
        .public_bytes(Encoding.PEM)
        .decode()
    )
    request = Request(name, federation, identity.public.hex(), openssh(node.public_key()), csr)
    signatures = {
        "identity": identity.sign(request.statement).hex(),
        "node": node.sign(request.statement, _ECDSA).hex(),
        "control": control.sign(request.statement, _ECDSA).hex(),
    }
    return json.dumps({**asdict(request), "signatures": signatures}, indent=2).encode() + b"\n"


def read_request(path: Path) -> Request:
    """A request that holds: whoever made it has all three private keys.

    Raises:
        ConfigError: It cannot be read, is none, or was changed.
    """
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError):
        raw = None
    request, signatures = _parsed(raw)
    if request is None:
        raise ConfigError(
            f"{path}: is no site's request; take the request.json that `fedveil site keygen` wrote"
        )
    if not _holds(request, signatures):
        raise ConfigError(
            f"{path}: is not signed by the keys in it; somebody changed it, have it sent again"
        )
    return request


def request_fingerprint(path: Path) -> str:
    """What the site and the authority compare by telephone, such as `1a2b-...`, 80 bits.

    Raises:
        ConfigError: As `read_request`.
    """
    return read_request(path).fingerprint


def _parsed(raw: Any) -> tuple[Request | None, dict[str, bytes]]:  # noqa: ANN401
    names = {field.name for field in fields(Request)}
    with suppress(ValueError, TypeError, AttributeError, LookupError):
        signatures = {name: bytes.fromhex(text) for name, text in raw.pop("signatures").items()}
        if raw.keys() == names and all(isinstance(text, str) for text in raw.values()):
            return Request(**raw), signatures
    return None, {}


def _holds(request: Request, signatures: dict[str, bytes]) -> bool:
    """Whether all three keys signed the request, and each is written as the roster has it."""
    try:
        node = load_ssh_public_key(request.node.encode())
        if not isinstance(node, ec.EllipticCurvePublicKey) or node.curve.name != "secp384r1":
            return False
        identity = bytes.fromhex(request.identity)
        if (identity.hex(), openssh(node)) != (request.identity, request.node):
            return False
        node.verify(signatures["node"], request.statement, _ECDSA)
        request.control.verify(signatures["control"], request.statement, _ECDSA)
        return is_signed(identity, request.statement, signatures["identity"])
    except (ValueError, LookupError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
