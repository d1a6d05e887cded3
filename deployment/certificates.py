"""X.509 certificates of a federation: one authority, and all that it vouches for (RFC 5280).

Every key is EC P-256. The authority issues nobody who could issue further (path length 0); a
server's certificate is for servers only, a member's for clients only, so that no member can stand
in for the server.
"""

import ipaddress
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..config import ConfigError

_SKEW = timedelta(hours=1)
"""So far a member's clock may be behind the authority's."""


def new_key() -> ec.EllipticCurvePrivateKey:
    """A private key of the curve that all certificates here are for."""
    return ec.generate_private_key(ec.SECP256R1())


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as its file holds it: PKCS #8, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """A certificate as its file holds it."""
    return certificate.public_bytes(Encoding.PEM)


def make_authority(
    federation: str, key: ec.EllipticCurvePrivateKey, days: int, now: datetime
) -> x509.Certificate:
    """The authority's own certificate, the root of trust.

    Args:
        federation: The federation's name.
        key: The authority's.
        days: How long it holds.
        now: With a time zone.
    """
    name = subject_name(federation, "authority", "authority")
    usage = _usage(key_cert_sign=True, crl_sign=True)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA256())


def issue_server(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePublicKey,
    names: Iterable[str],
    days: int,
    now: datetime,
) -> x509.Certificate:
    """The server's TLS certificate.

    Args:
        authority: Who issues it.
        authority_key: With what.
        key: The server's.
        names: Host names and IP addresses that it holds for.
        days: How long; never longer than the authority's own.
        now: With a time zone.
    """
    builder = _issued(authority, key, ("server", "server"), days, now)
    builder = builder.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
    ).add_extension(x509.SubjectAlternativeName([_general(n) for n in names]), critical=False)
    return builder.sign(authority_key, hashes.SHA256())


def issue_member(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePublicKey,
    member: tuple[str, str],
    days: int,
    now: datetime,
) -> x509.Certificate:
    """A member's certificate for the control plane.

    Args:
        authority: Who issues it.
        authority_key: With what.
        key: The member's.
        member: Its name and its role.
        days: How long; never longer than the authority's own.
        now: With a time zone.
    """
    builder = _issued(authority, key, member, days, now).add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
    )
    return builder.sign(authority_key, hashes.SHA256())


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate (DER), 64 hexadecimal digits: what the roster lists."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def subject_name(federation: str, role: str, name: str) -> x509.Name:
    """Whom a certificate or a request for one is about."""
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def subject_of(
    certificate: x509.Certificate | x509.CertificateSigningRequest,
) -> tuple[str, str, str]:
    """Federation, role and name that a certificate says; an empty text for what it does not."""
    found = []
    for oid in (
        NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME, NameOID.COMMON_NAME,
    ):  # fmt: skip
        values = certificate.subject.get_attributes_for_oid(oid)
        found.append(str(values[0].value) if len(values) == 1 else "")
    return found[0], found[1], found[2]


def parse_certificate(pem: bytes, path: Path) -> x509.Certificate:
    """A certificate of PEM.

    Args:
        pem: One certificate.
        path: Where it came from, for the error.

    Raises:
        ConfigError: It is none.
    """
    # Several in a file would leave it open which of them is meant.
    with suppress(ValueError):
        if len(found := x509.load_pem_x509_certificates(pem)) == 1:
            return found[0]
    raise ConfigError(f"{path}: holds not one certificate (PEM); put a whole copy back")


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate of a PEM file.

    Raises:
        ConfigError: It cannot be read, or holds none.
    """
    try:
        return parse_certificate(path.read_bytes(), path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def parse_key(pem: bytes, path: Path) -> ec.EllipticCurvePrivateKey:
    """A private key of PEM.

    Args:
        pem: PKCS #8, P-256, not encrypted.
        path: Where it came from, for the error.

    Raises:
        ConfigError: It is none.
    """
    with suppress(ValueError, TypeError):  # a TypeError of one that is encrypted
        key = load_pem_private_key(pem, password=None)
        if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp256r1":
            return key
    raise ConfigError(f"{path}: holds no P-256 private key (PEM); put a whole copy back")


def check_authority(certificate: x509.Certificate, path: Path) -> ec.EllipticCurvePublicKey:
    """The key of an authority's certificate.

    Raises:
        ConfigError: It is not such a certificate.
    """
    key = certificate.public_key()
    with suppress(ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        certificate.verify_directly_issued_by(certificate)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        if constraints.value.ca and isinstance(key, ec.EllipticCurvePublicKey):
            return key
    raise ConfigError(f"{path}: is no authority's certificate; take the one of the kit")


def is_issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the authority signed it."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def check_valid(certificate: x509.Certificate, path: Path, now: datetime) -> None:
    """Checks that a certificate holds now.

    Args:
        certificate: The authority's or one that it issued.
        path: Where it is, for the error.
        now: With a time zone.

    Raises:
        ConfigError: It does not, since when, and how to mend it.
    """
    first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < first:
        raise ConfigError(
            f"{path}: is not yet valid, it holds from {first:%Y-%m-%d %H:%M} UTC; check the clock, "
            "or have the certificate made anew by `fedveil provision rotate`"
        )
    if now <= last:
        return
    mend = "have it made anew by `fedveil provision rotate`"
    if certificate.subject == certificate.issuer:
        mend = "the authority makes the federation's kits anew, `fedveil provision create`"
    raise ConfigError(f"{path}: expired at {last:%Y-%m-%d %H:%M} UTC; {mend}")


def _issued(
    authority: x509.Certificate,
    key: ec.EllipticCurvePublicKey,
    member: tuple[str, str],
    days: int,
    now: datetime,
) -> x509.CertificateBuilder:
    (name, role), (federation, _, _) = member, subject_of(authority)
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    last = min(now + timedelta(days=days), authority.not_valid_after_utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject_name(federation, role, name))
        .issuer_name(authority.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(max(now - _SKEW, authority.not_valid_before_utc))
        .not_valid_after(last)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier.value),
            critical=False,
        )
    )


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
