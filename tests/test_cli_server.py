"""`fedveil server`: up, status."""

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedveil.deployment.kit import Kit
from fedveil.deployment.running import held

MakeKit = Callable[..., Path]
Call = Callable[..., Any]


def write_certificate(folder: Path, days: int) -> None:
    """A certificate of 127.0.0.1 that is its own authority, as `ca.pem`, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "trial")])
    today = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(today - timedelta(days=10))
        .not_valid_after(today + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "server.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Serves TLS on a port of loopback, as long as the test; for a client's certificate too."""
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(days: int = 30, *, mutual: bool = False, folder: Path = tmp_path) -> int:
        if not (folder / "ca.pem").exists():
            write_certificate(folder, days)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "ca.pem", folder / "server.key")
        context.verify_mode = ssl.CERT_REQUIRED if mutual else ssl.CERT_NONE
        listening = socket.create_server(("127.0.0.1", 0))
        sockets.append(listening)

        def answer() -> None:
            while True:
                try:
                    reached, _ = listening.accept()
                except OSError:
                    return
                try:
                    context.wrap_socket(reached, server_side=True).close()
                except OSError:
                    reached.close()

        threads.append(threading.Thread(target=answer, daemon=True))
        threads[-1].start()
        return int(listening.getsockname()[1])

    yield serve
    for one in sockets:
        one.shutdown(socket.SHUT_RDWR)
        one.close()
    for thread in threads:
        thread.join(30)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port at which nobody answers."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_a_server_that_is_well(call: Call, make_kit: MakeKit, serving: Callable[..., int]) -> None:
    """The control port asks for a client's certificate, which `status` has not."""
    ports = {"fleet_port": serving(), "control_port": serving(mutual=True)}
    folder = make_kit("server", **ports)
    (folder / "ca.pem").write_bytes((folder.parent / "ca.pem").read_bytes())
    day = f"{datetime.now(UTC) + timedelta(days=30):%Y-%m-%d}"
    with held(Kit.read(folder, "server")):
        (folder / "state" / "queue.json").write_text('{"running": null}')
        nodes = {"bern": {"node": 1, "online": True, "since": "today"}}
        (folder / "state" / "nodes.json").write_text(json.dumps(nodes))
        found = call("server", "status", folder, "--json")
        plain = call("server", "status", folder)
    assert found.code == plain.code == 0
    told = json.loads(found.out)
    assert told["well"] is True
    assert told["ports"]["fleet"] == {"port": ports["fleet_port"], "answers": True, "until": day}
    assert told["ports"]["control"]["answers"] is True
    assert told["state"]["queue"] == {"running": None}
    assert f"answers, certificate until {day}" in plain.out
    assert "site bern      connected since today" in plain.out


def test_a_server_that_is_down(call: Call, make_kit: MakeKit, silent_port: int) -> None:
    folder = make_kit("server", fleet_port=silent_port, control_port=silent_port)
    write_certificate(folder, 30)
    (folder / "state").mkdir()
    programs = {"control": {"state": "failed", "starts": 1, "since": "-", "cause": "no key"}}
    noted = {"pid": 1, "since": "yesterday", "programs": programs}
    (folder / "state" / "up.json").write_text(json.dumps(noted))
    (folder / "state" / "torn.json").write_text("{")
    found = call("server", "status", folder, "--json")
    assert found.code == 1
    told = json.loads(found.out)
    assert (told["well"], told["pid"], told["state"]["torn"]) == (False, None, None)
    assert told["ports"]["fleet"] == {
        "port": silent_port, "answers": False, "cause": "Connection refused",
    }  # fmt: skip
    plain = call("server", "status", folder)
    assert plain.code == 1
    assert "trial: server the-server is not up" in plain.out
    assert "control        failed since -, started 1 times, no key" in plain.out


@pytest.mark.parametrize(
    ("days", "why"), [(-1, "certificate has expired"), (30, "self-signed certificate")]
)
def test_a_certificate_that_does_not_hold(
    days: int, why: str, call: Call, make_kit: MakeKit, serving: Callable[..., int]
) -> None:
    port = serving(days)
    folder = make_kit("server", fleet_port=port, control_port=port)
    if days < 0:
        (folder / "ca.pem").write_bytes((folder.parent / "ca.pem").read_bytes())
    else:
        write_certificate(folder, days)  # another federation's
    told = json.loads(call("server", "status", folder, "--json").out)
    assert told["ports"]["fleet"]["cause"] == f"its certificate does not hold ({why})"


@pytest.mark.parametrize("content", [None, "nothing"])
def test_no_authority(content: str | None, call: Call, make_kit: MakeKit) -> None:
    folder = make_kit("server")
    if content:
        (folder / "ca.pem").write_text(content)
    found = call("server", "status", folder)
    assert found.code == 2
    assert found.err.startswith(f"error: {folder / 'ca.pem'}: cannot be read (")


def test_up_ends_with_the_supervisor_s_code(
    call: Call, make_kit: MakeKit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedveil.server.up.check_ports", lambda _: None)
    monkeypatch.setattr("fedveil.server.up.keep_running", lambda *_: 2)
    found = call("server", "up", make_kit("server"))
    assert found == (2, "", "")


def test_up_refuses_in_one_line(call: Call, tmp_path: Path) -> None:
    found = call("server", "up", tmp_path)
    assert found == (2, "", f"error: {tmp_path}: is no kit; give the folder that holds kit.toml\n")
