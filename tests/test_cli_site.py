"""`fedveil site`: what its owner sees, says and finds, and every fault in one line."""

import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import fedveil
from fedveil.cli import site_checks
from fedveil.client.approvals import Held, hold, is_approved, is_paused
from fedveil.client.deployed import open_deployed
from fedveil.client.status import Status, write_status
from fedveil.config import ConfigError
from fedveil.privacy.noise import Coins

Call = Callable[..., Any]
Kit = Any  # `conftest.SiteKit`; test modules cannot import it
TERMS = "a" * 64


def said(result: Any) -> str:  # noqa: ANN401
    """The one line of an error that a command ended with."""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    return str(result.err)


@pytest.fixture
def held(site_kit: Kit) -> Held:
    """A run that waits."""
    run = Held("run-a", TERMS, {"epsilon": 2.0}, {"training": (8.0, 1e-5)}, ("Costs 2.",), "2026")
    hold(site_kit.folder / "state", run)
    return run


class TestApprove:
    @pytest.mark.usefixtures("held")
    def test_shows_what_is_asked_and_asks(
        self, call: Call, site_kit: Kit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []
        monkeypatch.setattr("typer.confirm", lambda text: not asked.append(text))  # type: ignore[func-returns-value]
        found = call("site", "approve", site_kit.folder, "run-a")
        assert (found.code, asked) == (0, ["Approve it?"])
        assert found.out.startswith("Costs 2.\nrun-a: approved by ")
        assert is_approved(site_kit.folder / "state", "run-a", TERMS)

    @pytest.mark.usefixtures("held")
    def test_no_is_no(self, call: Call, site_kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("typer.confirm", lambda _: False)
        found = call("site", "approve", site_kit.folder, "run-a")
        assert (found.code, found.out) == (1, "Costs 2.\nrun-a: is not approved\n")
        assert not is_approved(site_kit.folder / "state", "run-a", TERMS)

    @pytest.mark.usefixtures("held")
    def test_so_is_nobody_to_be_asked(self, site_kit: Kit) -> None:
        found = subprocess.run(
            [sys.executable, "-P", "-m", "fedveil", "site", "approve", site_kit.folder, "run-a"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert found.returncode == 1
        assert "run-a: is not approved" in found.stdout
        assert not is_approved(site_kit.folder / "state", "run-a", TERMS)

    @pytest.mark.usefixtures("held")
    def test_yes_asks_nobody(self, call: Call, site_kit: Kit) -> None:
        assert call("site", "approve", site_kit.folder, "run-a", "--yes").code == 0
        assert is_approved(site_kit.folder / "state", "run-a", TERMS)

    @pytest.mark.usefixtures("held")
    def test_json_alone_approves_nothing(self, call: Call, site_kit: Kit) -> None:
        found = call("site", "approve", site_kit.folder, "run-a", "--json")
        assert (found.code, found.out) == (2, "")
        assert "--json: nobody could be asked" in found.err
        assert not is_approved(site_kit.folder / "state", "run-a", TERMS)

    @pytest.mark.usefixtures("held")
    def test_json_with_yes(self, call: Call, site_kit: Kit) -> None:
        found = call("site", "approve", site_kit.folder, "run-a", "--json", "--yes")
        told = json.loads(found.out)
        assert (told["run_id"], told["terms"], told["asks"]) == ("run-a", TERMS, {"epsilon": 2.0})
        assert told["approved_by"]

    @pytest.mark.usefixtures("held")
    def test_an_unknown_run(self, call: Call, site_kit: Kit) -> None:
        found = call("site", "approve", site_kit.folder, "run-b", "--yes")
        assert (found.code, found.out) == (2, "")
        assert "run-b: no such run waits for approval; these do: run-a" in said(found)
        assert call("site", "approve", site_kit.folder, "../a", "--yes").code == 2

    def test_a_run_that_changed_while_it_was_looked_at(
        self, call: Call, site_kit: Kit, held: Held, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        state = site_kit.folder / "state"

        def meanwhile(_: str) -> bool:
            hold(state, replace(held, terms="b" * 64))
            return True

        monkeypatch.setattr("typer.confirm", meanwhile)
        found = call("site", "approve", site_kit.folder, "run-a")
        assert found.code == 2
        assert "was asked for anew on other terms; look at it again" in said(found)
        assert not is_approved(state, "run-a", "b" * 64)


class TestPause:
    def test_and_resume(self, call: Call, site_kit: Kit) -> None:
        state = site_kit.folder / "state"
        assert call("site", "pause", site_kit.folder).out.endswith("everything is refused\n")
        assert is_paused(state)
        assert json.loads(call("site", "pause", site_kit.folder, "--json").out)["paused"] is True
        assert json.loads(call("site", "resume", site_kit.folder, "--json").out)["paused"] is False
        assert not is_paused(state)
        assert call("site", "resume", site_kit.folder).out.endswith("takes part again\n")

    @pytest.mark.parametrize("command", ["pause", "resume", "status"])
    def test_of_what_is_no_kit(self, call: Call, tmp_path: Path, command: str) -> None:
        found = call("site", command, tmp_path)
        assert found.code == 2
        assert "is no kit; give the folder that holds kit.toml" in said(found)
        assert list(tmp_path.iterdir()) == []


class TestStatus:
    def test_of_a_new_site(self, call: Call, site_kit: Kit) -> None:
        found = json.loads(call("site", "status", site_kit.folder, "--json").out)
        assert (found["site"], found["federation"]) == ("st-mary", "heart")
        assert (found["process"]["state"], found["paused"], found["held"]) == ("down", False, [])
        assert found["accounts"] == [
            {
                "account": "cardiology", "epsilon": 0.0, "delta": 0.0, "runs": 0,
                "epsilon_left": 10.0, "delta_left": 1e-4,
            }
        ]  # fmt: skip
        assert found["roster"]["version"] == 1
        assert {"name": "operator", "role": "operator"} in found["roster"]["members"]
        last = x509.load_pem_x509_certificate(site_kit.kit.certificate()).not_valid_after_utc
        assert found["certificate"]["last_day"] == f"{last:%Y-%m-%d}"
        assert not (site_kit.folder / "state").exists()

    @pytest.mark.usefixtures("held")
    def test_for_people(self, call: Call, site_kit: Kit) -> None:
        state = site_kit.folder / "state"
        status = Status("working", "h:9091", "run-z", 7, last_error="it rained")
        write_status(state, status)
        call("site", "pause", site_kit.folder)
        (state / "records.failed").touch()
        found = call("site", "status", site_kit.folder)
        assert found.code == 0
        for line in (
            f"st-mary in heart: working since {status.since}, server h:9091, run run-z, round 7\n",
            "  last error: it rained\n",
            "  PAUSED: everything is refused until `fedveil site resume`\n",
            "it took part WITHOUT its records",
            "  run run-a waits for approval since 2026:\n    Costs 2.\n",
            "  cardiology: epsilon 0 spent, 10 left; delta 0 spent, 0.0001 left; 0 runs\n",
            "  roster version 1: a-site (site), b-site (site), operator (operator), st-mary (site)",
        ):
            assert line in found.out

    def test_what_is_spent_and_left(self, call: Call, site_kit: Kit, make_config: Any) -> None:  # noqa: ANN401
        from fedveil.data_prep import run_schema
        from fedveil.privacy.books import EMPTY
        from fedveil.privacy.plan import plan

        config = make_config(privacy={"epsilon": 2.0, "sampling_rate": 1.0}).resolved()
        site = open_deployed(site_kit.kit, Coins(bytes(32)))
        priced, schema = plan(config), run_schema(config)
        site.debit("run-a", TERMS, [("rounds", 1)], EMPTY, config, schema, priced)
        site.close()
        found = json.loads(call("site", "status", site_kit.folder, "--json").out)["accounts"]
        training = next(one for one in found if one["account"].endswith("/training"))
        assert priced.training_epsilon is not None
        assert training["epsilon"] == pytest.approx(priced.training_epsilon)
        assert training["epsilon_left"] == pytest.approx(10 - priced.training_epsilon)
        assert training["delta_left"] == pytest.approx(1e-4 - config.privacy.delta)

    def test_a_lost_ledger_is_said(self, call: Call, site_kit: Kit) -> None:
        open_deployed(site_kit.kit, Coins(bytes(32))).close()
        (site_kit.folder / "state" / "ledger.sqlite").unlink()
        found = call("site", "status", site_kit.folder)
        assert found.code == 1
        assert "is missing; put the ledger back" in said(found)


class TestKeysAndUp:
    """Thin over what others hold: what they are given, and what is printed of it."""

    @pytest.mark.parametrize("code", [0, 2])
    def test_up(
        self, call: Call, site_kit: Kit, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        module = ModuleType("fedveil.client.up")
        module.up = lambda folder: code if folder == site_kit.folder else 9  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fedveil.client.up", module)
        found = call("site", "up", site_kit.folder, "--json")
        assert (found.code, json.loads(found.out)["code"]) == (code, code)
        assert call("site", "up", site_kit.folder).out == ""


def checks(found: Any) -> dict[str, tuple[bool, str]]:  # noqa: ANN401
    """What was found, by what it was of; the first fault of each."""
    told: dict[str, tuple[bool, str]] = {}
    for one in json.loads(found.out)["checks"]:
        if one["name"] not in told or told[one["name"]][0]:
            told[one["name"]] = (one["ok"], one["said"])
    return told


class TestCheckHere:
    @pytest.fixture(autouse=True)
    def _no_server(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(site_checks, "_server", lambda _: iter(()))

    @pytest.fixture
    def check(self, call: Call, site_kit: Kit) -> Callable[..., dict[str, tuple[bool, str]]]:
        def make(*options: object, code: int = 1) -> dict[str, tuple[bool, str]]:
            found = call("site", "check", site_kit.folder, "--json", *options)
            assert found.code == code
            assert json.loads(found.out)["ok"] is (code == 0)
            return checks(found)

        return make

    def test_a_whole_site(self, call: Call, site_kit: Kit) -> None:
        site_kit.write("records.csv", "alter,sex\n" + "30,1\n" * 20)
        site_kit.site_toml(section='[map]\nage = "alter"')
        before = {path: path.stat().st_mtime_ns for path in site_kit.folder.rglob("*")}
        found = call("site", "check", site_kit.folder)
        assert found.code == 0
        lines = found.out.splitlines()
        assert all(" ok: " in line for line in lines)
        assert [line.split()[0] for line in lines[:7]] == [
            "kit", "site.toml", "permissions", "ledger", "data", "roster", "certificate"
        ]  # fmt: skip
        assert "20 records, 2 columns; this number stays here, it is printed for you" in found.out
        assert {path: path.stat().st_mtime_ns for path in site_kit.folder.rglob("*")} == before

    def test_its_ledger_once_it_has_one(self, site_kit: Kit, check: Call) -> None:
        assert "none yet" in check(code=0)["ledger"][1]
        open_deployed(site_kit.kit, Coins(bytes(32))).close()
        assert "whole, 1 entries, 0 prices" in check(code=0)["ledger"][1]
        path = site_kit.folder / "state" / "ledger.sqlite"
        path.unlink()
        ok, line = check()["ledger"]
        assert (ok, "put the ledger back" in line) == (False, True)

    def test_what_is_no_kit(self, call: Call, tmp_path: Path) -> None:
        found = call("site", "check", tmp_path)
        assert found.code == 1
        assert found.out.startswith("kit          FAILED: ")
        assert found.out.count("\n") == 1

    def test_a_typo_hides_nothing_else(self, site_kit: Kit, check: Call) -> None:
        site_kit.site_toml("min_site = 3")
        told = check()
        assert told["site.toml"][1].endswith('unknown key; did you mean "min_sites"?')
        assert told["roster"][0]
        assert told["certificate"][0]

    def test_permissions_each_with_its_mend(self, call: Call, site_kit: Kit) -> None:
        for name in ("keys/identity.key", "keys/vault.key"):
            (site_kit.folder / name).chmod(0o644)
        found = call("site", "check", site_kit.folder)
        faults = [line for line in found.out.splitlines() if line.startswith("permissions  FAILED")]
        assert [line.split("; ")[1] for line in faults] == [
            f"chmod 600 {site_kit.folder / 'keys' / name}" for name in ("identity.key", "vault.key")
        ]

    @pytest.mark.parametrize(
        ("content", "columns", "fault"),
        [
            (None, "", "is no file; check the path"),
            ("age,sex\n", "", "holds no record"),
            ("", "", "holds no record"),
            ("alter,sex\n1,2\n", 'age = "altre"',
             'map.age = "altre": {} has no such column; did you mean "alter"?'),
            ("alter,sex\n1,2\n", 'age = "qqq"',
             'has no such column; it has "alter", "sex"'),
        ],
    )  # fmt: skip
    def test_data_that_cannot_be_used(
        self, site_kit: Kit, check: Call, content: str | None, columns: str, fault: str
    ) -> None:
        path = site_kit.write("records.csv", content or "")
        if content is None:
            path.unlink()
        site_kit.site_toml(section=f"[map]\n{columns}")
        ok, line = check()["data"]
        assert not ok
        assert fault.format(path) in line

    def test_data_as_a_run_would_have_them(
        self, site_kit: Kit, check: Call, tmp_path: Path
    ) -> None:
        (tmp_path / "schema.toml").write_text(
            '[[column]]\nname = "age"\nkind = "integer"\nbounds = [0, 100]\n', encoding="utf-8"
        )
        site_kit.write("records.csv", "alter\n30\n40\nzzz\n")
        site_kit.site_toml(section='[map]\nage = "alter"')
        ok, line = check("--schema", tmp_path / "schema.toml", code=0)["data"]
        assert (ok, "2 of 3 records are usable" in line) == (True, True)
        site_kit.site_toml(section='[map]\nagee = "alter"')
        ok, line = check("--schema", tmp_path / "schema.toml")["data"]
        assert (ok, 'did you mean "age"?' in line) == (False, True)

    def test_an_identity_that_is_not_the_rosters(self, site_kit: Kit, check: Call) -> None:
        site_kit.write("keys/identity.key", "ab" * 32)
        ok, line = check()["roster"]
        assert (ok, "has another identity of st-mary" in line) == (False, True)

    def test_a_certificate_that_the_roster_has_not(self, site_kit: Kit, check: Call) -> None:
        site_kit.members = tuple(replace(one, certificate="aa" * 32) for one in site_kit.members)
        site_kit.roster()
        ok, line = check()["certificate"]
        assert (ok, "is not the one that the roster has of st-mary" in line) == (False, True)

    def test_one_that_is_over_or_not_begun(self, site_kit: Kit) -> None:
        for days in (-3, 366):
            moment = datetime.now(UTC) + timedelta(days=days)
            with pytest.raises(ConfigError, match=r"its certificate holds from .* to .*, and the"):
                site_checks._certificate(site_kit.kit, moment)
        soon = datetime.now(UTC) + timedelta(days=350)
        assert site_checks._certificate(site_kit.kit, soon).endswith("have the site rotated soon")

    def test_no_answer_yet(self, site_kit: Kit, check: Call) -> None:
        (site_kit.folder / "answer.json").unlink()
        ok, line = check()["certificate"]
        assert (ok, "cannot be read" in line) == (False, True)

    def test_a_check_that_nobody_foresaw_to_fail(
        self, check: Call, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> str:
            raise RuntimeError("a\nb")

        monkeypatch.setattr(site_checks, "_roster", fail)
        assert check()["roster"] == (False, "RuntimeError: a b")


@pytest.fixture
def listening() -> Iterator[Callable[..., int]]:
    """Opens a port on which a server greets whoever comes, by TLS if it has a certificate."""
    opened: list[socket.socket] = []

    def make(context: ssl.SSLContext | None = None) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        opened.append(server)

        def serve() -> None:
            while True:
                try:
                    plain, _ = server.accept()
                except OSError:
                    return
                with plain, suppress(OSError):
                    if context is None:
                        plain.sendall(b"hello, this is something else\r\n")
                    else:
                        context.wrap_socket(plain, server_side=True).close()

        threading.Thread(target=serve, daemon=True).start()
        port: int = server.getsockname()[1]
        return port

    yield make
    for server in opened:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


class TestCheckTheServer:
    @pytest.fixture
    def context(self, site_kit: Kit, tmp_path: Path) -> ssl.SSLContext:
        """Of a server whose certificate the federation's authority signed."""
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        ca = x509.load_pem_x509_certificate((site_kit.folder / "ca.pem").read_bytes())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "server")]))
            .issuer_name(ca.subject)
            .public_key(key.public_key())
            .serial_number(7)
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .sign(site_kit.authority, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        private = key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (tmp_path / "server.pem").write_bytes(private + certificate.public_bytes(pem))
        found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        found.load_cert_chain(tmp_path / "server.pem")
        return found

    @staticmethod
    def at(site_kit: Kit, fleet: int, control: int, host: str = "localhost") -> Any:  # noqa: ANN401
        text = (site_kit.folder / "kit.toml").read_text(encoding="utf-8")
        text = text.replace("fleet_port = 1", f"fleet_port = {fleet}")
        text = text.replace("control_port = 2", f"control_port = {control}")
        site_kit.write("kit.toml", text.replace('"localhost"', f'"{host}"'))
        return {one.name: one for one in site_checks._server(site_kit.kit)}

    def test_that_is_the_federations(
        self, site_kit: Kit, context: ssl.SSLContext, listening: Call
    ) -> None:
        found = self.at(site_kit, listening(context), listening(context))
        assert list(found) == ["name", "fleet port", "fleet TLS", "control port", "control TLS"]
        assert all(one.ok for one in found.values()), found

    def test_that_another_authority_signed(
        self, site_kit: Kit, context: ssl.SSLContext, listening: Call
    ) -> None:
        own = ec.generate_private_key(ec.SECP256R1())
        other = x509.load_pem_x509_certificate((site_kit.folder / "ca.pem").read_bytes())
        forged = (
            x509.CertificateBuilder()
            .subject_name(other.subject)
            .issuer_name(other.subject)
            .public_key(own.public_key())
            .serial_number(8)
            .not_valid_before(other.not_valid_before_utc)
            .not_valid_after(other.not_valid_after_utc)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(own, hashes.SHA256())
        )
        port = listening(context)
        pem = forged.public_bytes(serialization.Encoding.PEM)
        (site_kit.folder / "ca.pem").write_bytes(pem)
        found = self.at(site_kit, port, port)["fleet TLS"]
        assert not found.ok
        assert "shows a certificate that is not the federation's" in found.said

    def test_that_has_another_name(
        self, site_kit: Kit, context: ssl.SSLContext, listening: Call
    ) -> None:
        port = listening(context)
        found = self.at(site_kit, port, port, "127.0.0.1")["fleet TLS"]
        assert (found.ok, "is not the federation's" in found.said) == (False, True)

    def test_that_speaks_otherwise(self, site_kit: Kit, listening: Call) -> None:
        port = listening()
        found = self.at(site_kit, port, port)
        assert found["fleet port"].ok
        assert (found["fleet TLS"].ok, "speaks no TLS" in found["fleet TLS"].said) == (False, True)

    def test_that_is_down(self, site_kit: Kit) -> None:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        found = self.at(site_kit, port, port)
        assert list(found) == ["name", "fleet port", "control port"]
        assert "cannot be reached" in found["control port"].said

    def test_that_has_no_address(self, site_kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", fail)
        found = self.at(site_kit, 1, 1)
        assert list(found) == ["name"]
        assert "localhost: has no address" in found["name"].said


def test_the_command_line_loads_nothing_heavy() -> None:
    code = (
        "import sys; import fedveil.cli; "
        "print([n for n in ('torch','flwr','grpc','cryptography','numpy') if n in sys.modules])"
    )
    root = Path(fedveil.__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert found.stdout.strip() == "[]"
