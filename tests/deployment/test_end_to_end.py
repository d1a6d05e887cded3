"""A federation on loopback: real processes, TLS, one server, four sites; what users do, and others.

The tests of this file share one deployment and stand in the order in which they happen.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedveil
from fedveil.api import resolve
from fedveil.config import RunConfig, load_config
from fedveil.models.state import read_file
from fedveil.privacy.noise import Coins
from fedveil.server.simulation.sites import load_shards

EXAMPLE = Path(fedveil.__file__).parent / "examples" / "digits-vae.toml"
STARTED = Path(__file__).with_name("with_coins.py")
SITES = ("clinic-east", "clinic-north", "clinic-south", "clinic-west")
ROUNDS = 3
PATIENCE = 240.0  # seconds for anything at all, on a machine that does other things too
SETTINGS: dict[str, Any] = {
    "federation.sites": 4, "federation.rounds": ROUNDS, "federation.patience": 5.0,
    "evaluation.every": 0, "evaluation.samples": 200, "secagg.deadline": 120.0,
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
        options = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
        told = self.call("submit", EXAMPLE, "--kit", self.operator, *options, "--json")
        return str(json.loads(told)["run"])


@dataclass(frozen=True)
class Simulated:
    """The same federation in one process, with the same coins and the same split keys."""

    run: fedveil.Run
    parts: tuple[Any, ...]


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
        print([event["seconds"] for event in rounds])
