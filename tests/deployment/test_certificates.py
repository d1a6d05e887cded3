"""Certificates: for whom, for what and how long they hold, tried with TLS itself."""

import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
)

from fedveil.config import ConfigError
from fedveil.deployment.certificates import (
    certificate_pem,
    check_authority,
    check_valid,
    fingerprint,
    is_issued,
    issue_member,
    issue_server,
    make_authority,
    new_key,
    parse_certificate,
    parse_key,
    private_pem,
    read_certificate,
    subject_of,
)

NOW = datetime.now(UTC).replace(microsecond=0)
NAMES = ("fedveil.example.org", "192.0.2.10", "::1", "localhost")
CA_KEY, SERVER_KEY, MEMBER_KEY = new_key(), new_key(), new_key()
CA = make_authority("heart", CA_KEY, 3650, NOW)
SERVER = issue_server(CA, CA_KEY, SERVER_KEY.public_key(), NAMES, 825, NOW)
MEMBER = issue_member(CA, CA_KEY, MEMBER_KEY.public_key(), ("north", "site"), 825, NOW)
OTHER_KEY = new_key()
OTHER_CA = make_authority("heart", OTHER_KEY, 3650, NOW)

Files = Callable[[x509.Certificate, ec.EllipticCurvePrivateKey], tuple[Path, Path]]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Writes a certificate and its key for `ssl`."""

    def write(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> tuple[Path, Path]:
        folder = tmp_path / fingerprint(certificate)[:8]
        folder.mkdir(exist_ok=True)
        (folder / "c.pem").write_bytes(certificate_pem(certificate))
        (folder / "k.pem").write_bytes(private_pem(key))
        return folder / "c.pem", folder / "k.pem"

    return write


def shake_hands(
    server: tuple[Path, Path], client: tuple[Path, Path], ca: x509.Certificate, host: str
) -> None:
    """Mutual TLS in memory; raises what either side finds wrong."""
    data = certificate_pem(ca).decode()
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.verify_mode = ssl.CERT_REQUIRED
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context, pair in ((ours, server), (theirs, client)):
        context.load_verify_locations(cadata=data)
        context.load_cert_chain(*pair)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        theirs.wrap_bio(down, up, server_hostname=host),
        ours.wrap_bio(up, down, server_side=True),
    ]
    waiting = ends
    for _ in range(6):
        waiting = [end for end in waiting if not is_done(end)]
    assert not waiting
    ends[0].write(b"x")
    assert ends[1].read(1) == b"x"  # under TLS 1.3 the server has checked the client only now


def is_done(end: ssl.SSLObject) -> bool:
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


@pytest.mark.parametrize("host", NAMES)
def test_the_server_is_known_by_each_name(files: Files, host: str) -> None:
    shake_hands(files(SERVER, SERVER_KEY), files(MEMBER, MEMBER_KEY), CA, host)


def test_another_name_is_refused(files: Files) -> None:
    pairs = files(SERVER, SERVER_KEY), files(MEMBER, MEMBER_KEY)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(*pairs, CA, "other.example.org")


def test_another_authority_of_the_same_name_is_refused(files: Files) -> None:
    pairs = files(SERVER, SERVER_KEY), files(MEMBER, MEMBER_KEY)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(*pairs, OTHER_CA, "localhost")


def test_a_member_cannot_stand_in_for_the_server(files: Files) -> None:
    key = new_key()
    member = issue_member(CA, CA_KEY, key.public_key(), ("localhost", "site"), 825, NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        shake_hands(files(member, key), files(MEMBER, MEMBER_KEY), CA, "localhost")


def test_a_server_cannot_stand_in_for_a_member(files: Files) -> None:
    with pytest.raises(ssl.SSLError, match=r"purpose|verify failed"):
        shake_hands(files(SERVER, SERVER_KEY), files(SERVER, SERVER_KEY), CA, "localhost")


def test_the_authority_lets_nobody_issue_further() -> None:
    constraints = CA.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    for certificate in (SERVER, MEMBER):
        found = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        assert not found.ca
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
        assert (usage.digital_signature, usage.key_cert_sign) == (True, False)


def test_what_a_certificate_says() -> None:
    assert subject_of(MEMBER) == ("heart", "site", "north")
    assert subject_of(CA) == ("heart", "authority", "authority")
    assert len(fingerprint(MEMBER)) == 64
    assert is_issued(MEMBER, CA)
    assert not is_issued(MEMBER, OTHER_CA)
    assert check_authority(CA, Path("ca.pem")) == CA_KEY.public_key()


def test_no_certificate_outlives_its_authority() -> None:
    short = make_authority("heart", CA_KEY, 10, NOW)
    made = issue_member(short, CA_KEY, MEMBER_KEY.public_key(), ("north", "site"), 825, NOW)
    assert made.not_valid_after_utc == short.not_valid_after_utc


class TestValidity:
    def test_it_holds_between_its_ends(self) -> None:
        for days in (0, 1, 825):
            check_valid(MEMBER, Path("c.pem"), NOW + timedelta(days=days))

    def test_expired(self) -> None:
        with pytest.raises(ConfigError) as caught:
            check_valid(MEMBER, Path("c.pem"), NOW + timedelta(days=825, seconds=1))
        day = f"{NOW + timedelta(days=825):%Y-%m-%d}"
        assert str(caught.value).startswith(f"c.pem: expired at {day} ")
        assert "fedveil provision rotate" in str(caught.value)

    def test_not_yet(self) -> None:
        with pytest.raises(ConfigError, match=r"c.pem: is not yet valid, it holds from .*rotate"):
            check_valid(MEMBER, Path("c.pem"), NOW - timedelta(hours=2))

    def test_an_expired_authority_is_made_anew(self) -> None:
        with pytest.raises(ConfigError, match="fedveil provision create"):
            check_valid(CA, Path("ca.pem"), NOW + timedelta(days=3651))


class TestFiles:
    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\0\xff",
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            private_pem(CA_KEY),
            certificate_pem(CA) + certificate_pem(MEMBER),
            certificate_pem(CA)[:-40],
        ],
    )
    def test_what_is_no_certificate(self, content: bytes) -> None:
        with pytest.raises(ConfigError, match=r"^x.pem: holds not one certificate"):
            parse_certificate(content, Path("x.pem"))

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\0\xff",
            certificate_pem(CA),
            private_pem(CA_KEY)[:-40],
            private_pem(ec.generate_private_key(ec.SECP384R1())),
            CA_KEY.private_bytes(
                Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
            ),
        ],
    )
    def test_what_is_no_key(self, content: bytes) -> None:
        with pytest.raises(ConfigError, match=r"^x.key: holds no P-256 private key"):
            parse_key(content, Path("x.key"))

    @pytest.mark.parametrize("certificate", [MEMBER, SERVER])
    def test_what_is_no_authority(self, certificate: x509.Certificate) -> None:
        with pytest.raises(ConfigError, match="is no authority's certificate"):
            check_authority(certificate, Path("ca.pem"))

    def test_one_that_signed_itself_and_may_issue_nothing(self) -> None:
        name = x509.Name([x509.NameAttribute(x509.oid.NameOID.ORGANIZATION_NAME, "heart")])
        builder = x509.CertificateBuilder(name, name, CA_KEY.public_key(), 1, NOW, NOW)
        plain = builder.sign(CA_KEY, hashes.SHA256())
        leaf = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        for certificate in (plain, leaf.sign(CA_KEY, hashes.SHA256())):
            with pytest.raises(ConfigError, match="is no authority's certificate"):
                check_authority(certificate, Path("ca.pem"))

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read"):
            read_certificate(tmp_path / "ca.pem")
