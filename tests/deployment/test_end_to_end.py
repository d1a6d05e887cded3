"""A federation on loopback: real processes, TLS, one server, four sites; what users do, and others.

The tests of this file share one deployment and stand in the order in which they happen.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.build import build_fab_from_files
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control.control_http_client import ControlHttpClient

import fedveil
from fedveil.api import resolve
from fedveil.config import ConfigError, RunConfig, load_config
from fedveil.deployment.control import ControlClient
from fedveil.deployment.keys import LINK, read_hex
from fedveil.deployment.kit import Kit
from fedveil.flower import Message
from fedveil.flower.fleet import Fleet, RefusedError
from fedveil.flower.link import Address, RunGrid, run_at
from fedveil.flower.superlink import KEY_HEADER, WithKey
from fedveil.models.state import read_file
from fedveil.privacy.noise import Coins
from fedveil.server.grid import PollingGrid
from fedveil.server.simulation.sites import load_shards
from fedveil.wire import ADVERTISE, Step, pack

pytestmark = pytest.mark.xdist_group("deployment")  # one deployment, one worker

EXAMPLE = Path(fedveil.__file__).parent / "examples" / "digits-vae.toml"
STARTED = Path(__file__).with_name("with_coins.py")
SITES = ("clinic-east", "clinic-north", "clinic-south", "clinic-west")
ROUNDS = 3
PATIENCE = 240.0  # seconds for anything at all, on a machine that does other things too
SETTINGS: dict[str, Any] = {
    "federation.sites": 4, "federation.rounds": ROUNDS, "federation.patience": 5.0,
    "evaluation.every": 0, "evaluation.samples": 200,
    # With a round of statistics, and without half a minute of training on what they say.
    "privacy.statistics_share": 0.3, "model.warm_start": False,
}  # fmt: skip


def key_of(number: int) -> bytes:
    """Fixed coins: of site 1 to 4; 0 is the server."""
    return bytes([number]) * 32


def until(what: str, done: Callable[[], Any]) -> Any:  # noqa: ANN401
    """What `done` finds, as soon as it finds something."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := done():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {PATIENCE:.0f} s")


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports: list[int] = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


@dataclass
class Deployment:
    """Kits below a folder, and the processes that were started from them."""

    folder: Path
    fleet_port: int
    control_port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def kits(self) -> Path:
        return self.folder / "kits"

    @property
    def operator(self) -> Path:
        return self.kits / "operators" / "olga"

    def site(self, name: str) -> Path:
        return self.kits / "sites" / name

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def call(self, *arguments: object, code: int = 0) -> str:
        """What a command prints; or what it says on stderr, if it is to fail."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "fedveil", *map(str, arguments)],
            capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=self.folder,
        )  # fmt: skip
        assert done.returncode == code, done.stderr + done.stdout
        return done.stderr if code else done.stdout

    def up(self, name: str, number: int) -> None:
        """Starts the server (number 0) or a site, with its coins."""
        role, kit = ("site", self.site(name)) if number else ("server", self.kits / "server")
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-P", STARTED, "up", role, key_of(number).hex(), kit],
                stdout=log, stderr=log, cwd=self.folder,
            )  # fmt: skip

    def down(self, name: str) -> int:
        """Stops one as systemd does; its exit code."""
        process = self.processes.pop(name)
        process.terminate()
        return process.wait(PATIENCE)

    def connected(self) -> list[str]:
        path = self.kits / "server" / "state" / "nodes.json"
        if not path.exists():
            return []
        nodes = json.loads(path.read_text(encoding="utf-8"))
        return sorted(name for name, node in nodes.items() if node["online"])

    def answers(self) -> bool:
        """Whether the control plane is there."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.control_port)) == 0

    def run_folder(self, run: str) -> Path:
        return self.kits / "server" / "state" / "runs" / run

    def events(self, run: str) -> list[dict[str, Any]]:
        path = self.run_folder(run) / "events.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def state_of(self, run: str) -> str:
        listed = json.loads(self.call("runs", "list", "--kit", self.operator, "--json"))
        return next(str(one["state"]) for one in listed["runs"] if one["run_id"] == run)

    def submit(self, **settings: object) -> str:
        given = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
        options = [
            part for key, value in given.items() for part in ("--set", f"{key}={_toml(value)}")
        ]
        told = self.call("submit", EXAMPLE, "--kit", self.operator, *options, "--json")
        return str(json.loads(told)["run"])


@dataclass(frozen=True)
class Simulated:
    """The same federation in one process, with the same coins and the same split keys."""

    run: fedveil.Run
    parts: tuple[Any, ...]


def _toml(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value


def config_of() -> RunConfig:
    return load_config(EXAMPLE, {**SETTINGS, "policy.self_test": False})


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    keys = iter([key_of(number) for number in (1, 2, 3, 4, 0)])
    config = config_of()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Coins, "from_system", lambda: Coins(next(keys)))
        run = fedveil.simulate(config, out=tmp_path_factory.mktemp("simulated") / "run")
    assert next(keys, None) is None  # all were used, in this order
    return Simulated(run, load_shards(*resolve(config)).parts)


@pytest.fixture(scope="module")
def deployed(
    simulated: Simulated, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    fleet, control = free_ports(2)
    made = Deployment(tmp_path_factory.mktemp("deployed"), fleet, control)
    provision(made)
    for number, (name, part) in enumerate(zip(SITES, simulated.parts, strict=True), start=1):
        furnish(made.site(name), part, simulated.run.path, number)
    try:
        made.up("server", 0)
        for number, name in enumerate(SITES, start=1):
            made.up(name, number)
        until("all sites are connected", lambda: made.connected() == list(SITES))
        yield made
    finally:
        for process in made.processes.values():
            process.terminate()
        for process in made.processes.values():
            process.wait(60)


def provision(made: Deployment) -> None:
    """As the authority and the sites do it, each with its own command."""
    (made.folder / "federation.toml").write_text(
        f"""
[federation]
name = "end-to-end"
[server]
address = "127.0.0.1"
fleet_port = {made.fleet_port}
control_port = {made.control_port}
[members]
sites = {json.dumps(SITES)}
operators = ["olga"]
auditors = ["anton"]
"""
    )
    made.call("provision", "create", "federation.toml", "-o", "kits")
    for name in SITES:
        kit = made.site(name)
        made.call("site", "keygen", kit)
        made.call("provision", "sign", "kits", kit / "request.json", "-o", kit / "answer.json")


def furnish(kit: Path, part: Any, run: Path, number: int) -> None:  # noqa: ANN401
    """Gives a site its records, a generous budget, and the split key of the simulated one."""
    (kit / "data").mkdir()
    np.savez(kit / "data" / "records.npz", images=part.arrays(), labels=part.labels)
    split = (run / "ledger" / f"site-{number:03d}.SIMULATED-split.key").read_bytes()
    (kit / "keys" / "split.key").write_bytes(split)
    path = kit / "site.toml"
    text = path.read_text(encoding="utf-8")
    for old, new in (
        ("data/records.csv", "data/records.npz"),
        ('keys = "keys"', 'keys = "keys"\nthreads = 1'),
        ("epsilon_lifetime = 10.0", "epsilon_lifetime = 1000.0"),
        ("delta_lifetime = 1e-5", "delta_lifetime = 1e-3"),
        ("[policy]", "[policy]\nself_test = false"),  # it has tests of its own, and takes a while
    ):
        assert old in text
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def model_of(run: Path) -> Mapping[str, np.ndarray]:
    return read_file(run / "model.safetensors")[0]


class TestARun:
    def test_what_was_simulated_is_what_is_deployed(
        self, deployed: Deployment, simulated: Simulated, tmp_path: Path
    ) -> None:
        """provision, up, submit, watch, fetch, sample; and the model is the simulated one."""
        run = deployed.submit()
        deployed.call("runs", "watch", run, "--kit", deployed.operator)
        assert deployed.state_of(run) == "finished"
        fetched = tmp_path / "fetched"
        deployed.call("runs", "fetch", run, "--kit", deployed.operator, "-o", fetched)
        deployed.call("sample", fetched, "-n", 9, "-o", tmp_path / "nine.png")
        assert (tmp_path / "nine.png").stat().st_size > 0
        theirs, ours = model_of(fetched), model_of(simulated.run.path)
        assert theirs.keys() == ours.keys()
        for name, array in ours.items():
            assert np.array_equal(theirs[name], array), name
        assert fedveil.load(fetched).privacy == simulated.run.privacy
        rounds = [event for event in deployed.events(run) if event["event"] == "round"]
        assert [(event["round"], event["sites"], event["dropped"]) for event in rounds] == [
            (number, 4, []) for number in range(1, ROUNDS + 1)
        ]


def from_elsewhere(port: int, path: str, **headers: str) -> int:
    """What the Fleet port answers to a request from 127.0.0.2, which is not the server's own."""
    transport = httpx.HTTPTransport(verify=False, local_address="127.0.0.2")
    with httpx.Client(transport=transport) as client:
        sent = {"content-type": "application/protobuf", **headers}
        answer = client.post(f"https://127.0.0.1:{port}{path}", content=b"", headers=sent)
    return answer.status_code


def audited(deployed: Deployment) -> list[dict[str, Any]]:
    path = deployed.kits / "server" / "state" / "audit.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def refusal(deployed: Deployment, member: str, call: str) -> str:
    """What the audit log says of the last call of somebody."""
    found = [e for e in audited(deployed) if (e["member"], e["call"]) == (member, call)]
    return str(found[-1]["outcome"])


def link_address(deployed: Deployment) -> Address:
    kit = Kit.read(deployed.kits / "server", "server")
    secret = read_hex(kit.keys / LINK, 32)
    return Address(f"127.0.0.1:{deployed.fleet_port}", kit.ca.read_bytes(), secret)


@contextmanager
def foreign_run(address: Address, bundle: bytes) -> Iterator[RunGrid]:
    """A run that somebody starts who has all the server's secrets, with a bundle of theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedveil.flower.link.deployed_bundle", lambda: bundle)
        with run_at(address, print) as grid:
            yield grid


def bundle_with(name: str, text: str) -> bytes:
    """A bundle that holds a package of its own."""
    manifest = """
[project]
name = "theirs"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "them"
[tool.flwr.app.components]
serverapp = "fedveil.server.app:server_app"
clientapp = "fedveil.client.app:client_app"
[tool.flwr.app.config]
"""
    files = {"pyproject.toml": manifest.encode(), name: text.encode()}
    return bytes(build_fab_from_files(files)[0])


def assert_handshake_fails(
    deployed: Deployment, key: bytes | None = None, chain: bytes | None = None
) -> None:
    """The control plane hangs up, and its log has a line of it."""
    before = deployed.log("server").count("Handshake")
    ca = (deployed.operator / "ca.pem").read_bytes()
    credentials = grpc.ssl_channel_credentials(ca, key, chain)
    with grpc.secure_channel(f"127.0.0.1:{deployed.control_port}", credentials) as channel:
        ask = channel.unary_unary("/fedveil.Control/list")
        with pytest.raises(grpc.RpcError) as caught:
            ask(b"{}", timeout=20)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    until("a line of it", lambda: deployed.log("server").count("Handshake") > before)


class TestIntruders:
    """Each is refused, and leaves a line."""

    def test_without_a_certificate(self, deployed: Deployment) -> None:
        assert_handshake_fails(deployed)

    def test_with_another_authoritys_certificate(
        self, deployed: Deployment, tmp_path: Path
    ) -> None:
        deployed.call("provision", "create", "federation.toml", "-o", tmp_path / "theirs")
        kit = tmp_path / "theirs" / "operators" / "olga"
        key, chain = kit / "keys" / "control.key", kit / "certificate.pem"
        assert_handshake_fails(deployed, key.read_bytes(), chain.read_bytes())
        (kit / "ca.pem").write_bytes((deployed.operator / "ca.pem").read_bytes())
        told = deployed.call("runs", "list", "--kit", kit, code=2)
        assert "is not signed by the federation's authority" in told
        assert told.count("\n") == 1

    def test_a_site_as_an_operator(self, deployed: Deployment) -> None:
        kit = Kit.read(deployed.site(SITES[0]), "site")
        with ControlClient(kit) as client:
            for call in ("submit", "list", "cancel", "resume"):
                with pytest.raises(ConfigError, match=f"^{call}: is for operator"):
                    client.call(call, {})
                assert refusal(deployed, SITES[0], call).startswith(f"refused: {call}: is for")

    @pytest.mark.parametrize(
        "path",
        ["/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task", "/docs"],
    )
    def test_flowers_own_apis_from_elsewhere(self, deployed: Deployment, path: str) -> None:
        key = link_address(deployed).secret.hex()
        assert from_elsewhere(deployed.fleet_port, path) == 403
        assert from_elsewhere(deployed.fleet_port, path, **{KEY_HEADER: key}) == 403
        line = f"refused {path} from 127.0.0.2: HTTP 403"
        until("a line of it", lambda: deployed.log("server").count(line) >= 2)

    def test_a_node_that_nobody_knows(self, deployed: Deployment) -> None:
        ca = (deployed.operator / "ca.pem").read_bytes()
        address = f"127.0.0.1:{deployed.fleet_port}"
        key = ec.generate_private_key(ec.SECP384R1())
        with (
            closing(Fleet(address, ca, key)) as fleet,
            pytest.raises(RefusedError),
            fleet.session(0),
        ):
            pytest.fail("it is in")
        line = "refused /v1/fleet/activate-node from 127.0.0.1"
        until("a line of it", lambda: line in deployed.log("server"))

    def test_a_bundle_with_a_package_of_ours_in_it(
        self, deployed: Deployment, tmp_path: Path
    ) -> None:
        """By someone who has even the server's own secrets: sites refuse, and unpack nothing."""
        planted = tmp_path / "it-ran"
        bundle = bundle_with("fedveil/__init__.py", f"open({str(planted)!r}, 'w')")
        nodes = json.loads((deployed.kits / "server/state/nodes.json").read_text(encoding="utf-8"))
        with foreign_run(link_address(deployed), bundle) as grid:
            step = pack(Step("0" * 16, b""))
            sent = [Message(step, node["node"], ADVERTISE) for node in nodes.values()]
            replies = PollingGrid(grid, lambda: None).send_and_receive(sent, timeout=PATIENCE)
            found = list(replies)
            number = grid.run.run_id
        assert len(found) == len(SITES)
        # Not a word but the code, whoever asks.
        assert all(reply.has_error() and reply.error.code == 2 for reply in found)
        assert not any(reply.error.reason for reply in found)
        for name in SITES:
            assert f"refused run {number}: it was started with a bundle of its own" in deployed.log(
                name
            )
        assert not planted.exists()

    def test_a_run_that_the_executor_did_not_begin(self, deployed: Deployment) -> None:
        """It stays at the SuperLink until the next run, and is refused then."""
        address = link_address(deployed)
        with closing(
            ControlHttpClient.from_server_address(
                address.at,
                insecure=False,
                root_certificates=address.ca,
                interceptors=(WithKey(address.secret.hex()),),
            )
        ) as control:
            fab = Fab(content=bundle_with("fedveil/__init__.py", "raise SystemExit"))
            number = control.StartRun(StartRunRequest(fab=fab)).run_id
        run = deployed.submit(privacy__mechanism="central")  # which no site's policy allows
        until("it has failed", lambda: deployed.state_of(run) == "failed")
        assert f"run {number} at the SuperLink: was not begun here, refused" in deployed.log(
            "server"
        )

    def test_a_run_that_no_policy_allows(self, deployed: Deployment) -> None:
        run = deployed.submit(privacy__mechanism="central")
        told = deployed.call("runs", "watch", run, "--kit", deployed.operator, code=1)
        assert "its policy does not allow the mechanism" in told
        (failed,) = [e for e in deployed.events(run) if e["event"] == "failed"]
        assert "4 of 4 sites refuse" in failed["cause"]
        for name in SITES:
            until("a line of it", partial(said, deployed, name, "central"))

    def test_another_sites_key_in_a_kit(self, deployed: Deployment, tmp_path: Path) -> None:
        kit = tmp_path / "kit"
        shutil.copytree(deployed.site(SITES[0]), kit, ignore=shutil.ignore_patterns("state"))
        for name in ("identity.key", "node.key", "control.key"):
            own = (kit / "keys" / name).read_bytes()
            (kit / "keys" / name).write_bytes(
                (deployed.site(SITES[1]) / "keys" / name).read_bytes()
            )
            told = deployed.call("site", "up", kit, code=2)
            assert told.count("\n") == 1
            assert name in told
            (kit / "keys" / name).write_bytes(own)

    def test_whoever_was_revoked(self, deployed: Deployment) -> None:
        kit = deployed.kits / "auditors" / "anton"
        deployed.call("runs", "list", "--kit", kit)
        before = kits_of_sites(deployed)
        deployed.call("provision", "revoke", "kits", "anton")
        told = deployed.call("runs", "list", "--kit", kit, code=2)
        assert "is not in the roster" in told
        digest = next(e["member"] for e in reversed(audited(deployed)) if e["call"] == "list")
        assert refusal(deployed, digest, "list").startswith("refused: certificate ")
        assert kits_of_sites(deployed) == before

    def test_all_of_it_stands_in_an_unbroken_log(self, deployed: Deployment) -> None:
        log = deployed.kits / "server" / "state" / "audit.jsonl"
        found = json.loads(deployed.call("audit", "log", log, "--json"))
        assert (found["whole"], found["count"]) == (True, len(audited(deployed)))


class TestFaults:
    def test_a_site_is_killed_in_the_middle_of_a_round(self, deployed: Deployment) -> None:
        name = SITES[1]
        run = deployed.submit(federation__rounds=4)
        until("a round", lambda: rounds_of(deployed, run))
        status = deployed.site(name) / "state" / "status.json"

        def at_work() -> int:
            said = json.loads(status.read_text(encoding="utf-8"))
            return int(said["pid"]) if said["state"] == "working" else 0

        os.kill(until("it works", at_work), signal.SIGKILL)
        until("the run has ended", lambda: deployed.state_of(run) != "running")
        assert deployed.state_of(run) == "finished"
        found = rounds_of(deployed, run)
        assert [event["round"] for event in found] == [1, 2, 3, 4]
        assert all(event["sites"] >= 3 for event in found)
        until("it is back", lambda: deployed.connected() == list(SITES))

    def test_a_site_is_late_and_the_server_is_killed(self, deployed: Deployment) -> None:
        late = SITES[3]
        assert deployed.down(late) == 0
        until("it is away", lambda: late not in deployed.connected())
        run = deployed.submit(federation__rounds=6, secagg__epoch_rounds=2)
        until("a round", lambda: rounds_of(deployed, run))
        deployed.up(late, 4)
        until("it takes part", lambda: rounds_of(deployed, run)[-1]["sites"] == 4)
        assert [event["sites"] for event in rounds_of(deployed, run)[:2]] == [3, 3]
        server = deployed.processes.pop("server")
        server.kill()  # and its programs with it
        server.wait()
        until("its programs are gone", lambda: not deployed.answers())
        done = len(rounds_of(deployed, run))
        deployed.up("server", 0)
        until("the server answers", deployed.answers)
        assert deployed.state_of(run) == "interrupted"
        deployed.call("runs", "resume", run, "--kit", deployed.operator)
        until("the run has ended", lambda: deployed.state_of(run) not in {"queued", "running"})
        assert deployed.state_of(run) == "finished"
        assert [event["event"] for event in deployed.events(run)].count("resumed") == 1
        found = [event["round"] for event in rounds_of(deployed, run)]
        assert found[:done] == list(range(1, done + 1))
        # At most the round that was cut off is lost, be it the last.
        assert len(set(range(1, 7)) - set(found)) <= 1


def kits_of_sites(deployed: Deployment) -> dict[str, bytes]:
    """All that was given to the sites or made by them; not what their processes keep."""
    return {
        str(path): path.read_bytes()
        for name in SITES
        for path in sorted(deployed.site(name).rglob("*"))
        if path.is_file() and "state" not in path.parts
    }


def said(deployed: Deployment, name: str, text: str) -> bool:
    return text in deployed.log(name)


def rounds_of(deployed: Deployment, run: str) -> list[dict[str, Any]]:
    return [event for event in deployed.events(run) if event["event"] == "round"]
