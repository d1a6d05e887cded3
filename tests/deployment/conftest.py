"""A federation with real certificates on loopback, and real supervisors over small programs."""

import datetime as dt
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedveil.config import RunConfig
from fedveil.data_prep import run_schema
from fedveil.data_prep.schema import schema_to_json
from fedveil.deployment.certificates import (
    issue_member,
    issue_server,
    make_authority,
    new_key,
)
from fedveil.deployment.control import ControlClient
from fedveil.deployment.kit import Kit
from fedveil.deployment.roster import Member, Role, Roster, sign_roster
from fedveil.privacy.secagg.keys import Identity
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


def issue(name: str, role: str = "authority", issuer: Pair | None = None) -> Pair:
    """A certificate of an authority, or a new authority, as provisioning makes them."""
    key, now = new_key(), dt.datetime.now(dt.UTC)
    if issuer is None:
        return Pair(key, make_authority("trial", key, 1, now))
    if role == "server":
        names = ("localhost", "127.0.0.1")
        made = issue_server(issuer.certificate, issuer.key, key.public_key(), names, 1, now)
    else:
        member = name, role
        made = issue_member(issuer.certificate, issuer.key, key.public_key(), member, 1, now)
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

    def _signed(self, version: int) -> Any:  # noqa: ANN401
        return json.loads(sign_roster(self.roster(version), self.authority.key))

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
            "fleet_port": 1, "control_port": self.port,
            "coordinator": Identity(b"c" * 32).public.hex(),
        }  # fmt: skip
        (folder / "kit.toml").write_text(tomli_w.dumps(about), encoding="utf-8")
        (folder / "ca.pem").write_bytes((authority or self.authority).certificate_pem)
        (folder / "certificate.pem").write_bytes(pair.certificate_pem)
        if role == "site":
            answer = {"certificate": pair.certificate_pem.decode(), "roster": self._signed(1)}
            (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
        key = folder / "keys" / ("server.key" if role == "server" else "control.key")
        key.write_bytes(pair.key_pem)
        if role == "server":
            (folder / "keys" / "coordinator.key").write_text((b"c" * 64).hex(), encoding="ascii")
            (folder / "keys" / "link.key").write_text((b"l" * 32).hex(), encoding="ascii")
        for secret in (folder / "keys").iterdir():
            secret.chmod(0o600)
        (folder / "keys").chmod(0o700)
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
    authority, stranger = issue("authority"), issue("stranger")
    named = {name: issue(name, role, authority) for name, role in MEMBERS.items()}
    return {
        "authority": authority, "stranger": stranger, **named,
        "server": issue("server", "server", authority),
        "forged": issue("olga", "operator", stranger),
        "unlisted": issue("olga", "operator", authority),
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


_SUPERVISOR = """
import json, signal, sys
from fedveil.deployment import restarts
from fedveil.deployment.logs import configure
from fedveil.deployment.supervise import Program, supervise

restarts.FIRST = 0.02
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have set it aside
configure("supervisor")
given = json.loads(sys.argv[1])
sys.exit(supervise([Program(name, (sys.executable, "-c", text), 0.5) for name, text in given]))
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has reaped yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in {"Z", "X"}


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:  # noqa: ANN401
    """Waits for a condition, and gives what it gave."""
    last = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < last, "it did not come to pass"
        time.sleep(0.01)
    return found


@dataclass
class Supervisor:
    """A supervisor that runs, and what can be seen of it."""

    process: subprocess.Popen[bytes]
    log: Path
    notes: Path
    pids: set[int] = field(default_factory=set)

    def lines(self) -> list[dict[str, Any]]:
        """What is in its log so far, whole lines only."""
        text = self.log.read_text(encoding="utf-8")
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def events(self, program: str) -> list[str]:
        """What it logged of a program."""
        return [line["event"] for line in self.lines() if line.get("program") == program]

    def noted(self, count: int) -> list[str]:
        """The lines that the programs wrote into `notes`, once there are so many."""

        def there() -> list[str] | None:
            words = self.notes.read_text().splitlines() if self.notes.exists() else []
            return words if len(words) >= count else None

        found: list[str] = until(there)
        self.pids |= {int(word) for line in found for word in line.split() if word.isdigit()}
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Tells it to stop; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


StartSupervisor = Callable[..., Supervisor]


@pytest.fixture
def start_supervisor(tmp_path: Path) -> Iterator[StartSupervisor]:
    """Starts a supervisor over programs, given as name and Python text.

    In the text `note(words...)` adds a line to `notes`.
    """
    begun: list[Supervisor] = []
    notes = tmp_path / "notes"
    helpers = f"""
import os, signal, subprocess, sys
def note(*words):
    handle = os.open({str(notes)!r}, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.write(handle, (" ".join(map(str, words)) + "\\n").encode())
    os.close(handle)
def notes():
    return open({str(notes)!r}).read().splitlines() if os.path.exists({str(notes)!r}) else []
"""

    def start(*programs: tuple[str, str]) -> Supervisor:
        given: Sequence[tuple[str, str]] = [(name, helpers + text) for name, text in programs]
        log = tmp_path / "log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _SUPERVISOR, json.dumps(given)], stderr=errors
            )
        begun.append(Supervisor(process, log, notes))
        return begun[-1]

    yield start
    for one in begun:
        one.process.kill()
        one.process.wait()
        for pid in one.pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture(name="until")
def _until() -> Callable[..., Any]:
    return until


@pytest.fixture(name="alive")
def _alive() -> Callable[[int], bool]:
    return alive
