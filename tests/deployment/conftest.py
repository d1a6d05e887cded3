"""A federation with real certificates on loopback: its kits, its roster, a server that answers."""

import datetime as dt
import ipaddress
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedveil.config import RunConfig
from fedveil.data_prep import run_schema
from fedveil.data_prep.schema import schema_to_json
from fedveil.deployment.control import ControlClient
from fedveil.deployment.kit import Kit
from fedveil.deployment.roster import Member, Role, Roster, sign_roster
from fedveil.server.calls import Stream
from fedveil.server.control import Serving, serve
from fedveil.server.queue import Queue

MEMBERS: dict[str, Role] = {
    "ada": "auditor", "east": "site", "north": "site", "olga": "operator", "otto": "operator",
    "west": "site",
}  # fmt: skip
QUICK = Stream(wait=lambda _: False, check=lambda: None, poll=0.02, heartbeat=0.05, patience=0.2)


@dataclass(frozen=True)
class Pair:
    """A key and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def key_pem(self) -> bytes:
        kind = serialization.PrivateFormat.PKCS8
        return self.key.private_bytes(
            serialization.Encoding.PEM, kind, serialization.NoEncryption()
        )

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def digest(self) -> str:
        return sha256(self.certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


def issue(name: str, issuer: Pair | None = None) -> Pair:
    """A certificate of an authority, or a new authority."""
    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=5))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(issuer.key if issuer else key, hashes.SHA256())
    )
    return Pair(key, made)


class Federation:
    """An authority, a server and members, with kits below a folder."""

    def __init__(self, folder: Path, pairs: dict[str, Pair]) -> None:
        self.folder, self.pairs = folder, pairs
        self.authority = pairs["authority"]
        self.port = 1
        self.server = self._kit("server", "server", pairs["server"])
        self.write_roster(1)

    def roster(self, version: int, gone: tuple[str, ...] = ()) -> Roster:
        members = [
            Member(name, role, self.pairs[name].digest, sha256(name.encode()).hexdigest())
            for name, role in MEMBERS.items()
            if name not in gone
        ]
        return Roster("trial", version, tuple(members))

    def write_roster(self, version: int, gone: tuple[str, ...] = ()) -> None:
        data = sign_roster(self.roster(version, gone), self.authority.key)
        draft = self.server.folder / "roster.new"
        draft.write_bytes(data)
        draft.replace(self.server.roster)

    def kit(self, name: str, pair: Pair | None = None, authority: Pair | None = None) -> Kit:
        """A member's kit; with another's certificate or another authority's, if so wished."""
        made = self._kit(name, MEMBERS[name], pair or self.pairs[name], authority)
        if self.server.roster.exists():
            made.roster.write_bytes(self.server.roster.read_bytes())
        return made

    def _kit(self, name: str, role: str, pair: Pair, authority: Pair | None = None) -> Kit:
        folder = self.folder / name
        (folder / "keys").mkdir(parents=True, exist_ok=True)
        about = {
            "federation": "trial", "role": role, "name": name, "server": "127.0.0.1",
            "fleet_port": 1, "control_port": self.port, "coordinator": "0" * 64,
        }  # fmt: skip
        (folder / "kit.toml").write_text(tomli_w.dumps(about), encoding="utf-8")
        (folder / "ca.pem").write_bytes((authority or self.authority).certificate_pem)
        (folder / "certificate.pem").write_bytes(pair.certificate_pem)
        key = "server.key" if role == "server" else "control.key"
        (folder / "keys" / key).write_bytes(pair.key_pem)
        return Kit.read(folder, role)  # type: ignore[arg-type]

    @property
    def queue(self) -> Queue:
        return Queue(self.server.state)

    def log(self) -> list[dict[str, Any]]:
        """The audit log's entries."""
        text = (self.server.state / "audit.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="session")
def pairs() -> dict[str, Pair]:
    """Certificates of all parties; one authority, and a stranger's."""
    authority = issue("authority")
    named = {name: issue(name, authority) for name in ("server", *MEMBERS)}
    stranger = issue("stranger")
    return {
        "authority": authority, "stranger": stranger, "forged": issue("olga", stranger), **named,
    }  # fmt: skip


@pytest.fixture
def federation(tmp_path: Path, pairs: dict[str, Pair]) -> Federation:
    return Federation(tmp_path / "kits", pairs)


@pytest.fixture
def serving(federation: Federation) -> Iterator[Serving]:
    """A server that answers on a free port, which the kits made from here on know."""
    started = serve(federation.server, "127.0.0.1:0", QUICK)
    federation.port = started.port
    yield started
    started.stop(0)


@pytest.fixture
def client(federation: Federation, serving: Serving) -> Iterator[Callable[..., ControlClient]]:
    """Makes clients by name."""
    with ExitStack() as stack:

        def make(name: str, **options: str) -> ControlClient:
            return stack.enter_context(ControlClient(federation.kit(name), **options))

        yield make


@pytest.fixture
def submission(make_config: Callable[..., RunConfig]) -> dict[str, Any]:
    """What `submit` is asked for: a run of three sites."""
    config = make_config().resolved()
    return {
        "config": config.model_dump(mode="json", by_alias=True, exclude_none=True),
        "schema": json.loads(schema_to_json(run_schema(config))),
    }


@pytest.fixture
def queued(federation: Federation, make_config: Callable[..., RunConfig]) -> Callable[[], str]:
    """Puts a run into the queue without asking the server."""

    def put(by: str = "olga") -> str:
        config = make_config().resolved()
        return federation.queue.submit(
            config, run_schema(config), by, federation.roster(1).identities
        )

    return put


@pytest.fixture
def running(federation: Federation) -> Callable[[str], AbstractContextManager[Path]]:
    """This process has a run, as the executor does."""

    @contextmanager
    def having(run_id: str) -> Iterator[Path]:
        queue = federation.queue
        queue.begun(run_id)
        try:
            yield queue.path(run_id)
        finally:
            queue.ended(run_id)

    return having
