"""A federation of four sites on loopback for benchmarks: real processes, TLS, small runs."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np

from fedveil.api import resolve
from fedveil.config import RunConfig
from fedveil.data_prep.schema import schema_to_json
from fedveil.deployment.control import ControlClient
from fedveil.deployment.keygen import keygen
from fedveil.deployment.kit import Kit
from fedveil.deployment.provision import create, sign
from fedveil.server.simulation.sites import load_shards

SITES = ("clinic-east", "clinic-north", "clinic-south", "clinic-west")
HERE = Path(__file__).resolve().parent
PATIENCE = 300.0  # seconds for anything at all
_ANSWERED = re.compile(r"answered (\S+) of round \S+ in ([0-9.]+) s")
_FEDERATION = """
[federation]
name = "benchmark"
[server]
address = "127.0.0.1"
fleet_port = {fleet}
control_port = {control}
[members]
sites = {sites}
operators = ["olga"]
"""
_POLICY = (
    ("data/records.csv", "data/records.npz"),
    ('keys = "keys"', 'keys = "keys"\nthreads = 1'),
    ("epsilon_lifetime = 10.0", "epsilon_lifetime = 1000.0"),
    ("delta_lifetime = 1e-5", "delta_lifetime = 1e-3"),
    ("[policy]", "[policy]\nself_test = false"),
    ('["distributed", "site"]', '["distributed", "site", "none"]'),
    ('["secagg"]', '["secagg", "none"]'),
)


def until(what: str, done: Callable[[], Any]) -> Any:  # noqa: ANN401
    """What `done` finds, as soon as it finds something.

    Raises:
        TimeoutError: It finds nothing.
    """
    end = time.monotonic() + PATIENCE
    while not (found := done()):
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.1)
    return found


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody has."""
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports: list[int] = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def loopback_bytes() -> int:
    """What went over the loopback interface since the machine is up, headers included."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


class Processes:
    """Processes in groups of their own, all of which end with the block."""

    def __init__(self, log: Path) -> None:
        """With one log for each, below a folder."""
        self._log, self._all = log, list[subprocess.Popen[bytes]]()

    def start(self, name: str, command: Sequence[object], env: Mapping[str, str]) -> None:
        """Starts one."""
        with (self._log / f"{name}.log").open("wb") as log:
            self._all.append(
                subprocess.Popen(
                    [str(part) for part in command], stdout=log, stderr=log, cwd=self._log,
                    env={**os.environ, **env}, start_new_session=True,
                )
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            process.terminate()
        end = time.monotonic() + 20
        for process in self._all:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
        for process in self._all:
            with suppress(ProcessLookupError):  # whatever is left of the group
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass(frozen=True)
class Measured:
    """One run's rounds, but for the first.

    Attributes:
        seconds: From the question to the end, of each round.
        sites: From the question to the last reply.
        answers: The slowest site's own work: of all its steps.
        sent: Bytes over loopback.
    """

    seconds: list[float]
    sites: list[float]
    answers: list[float]
    sent: list[float]


class Deployed:
    """A federation whose server and sites are up."""

    def __init__(self, folder: Path) -> None:
        """Below a folder."""
        self.folder = folder

    def run(self, config: RunConfig) -> Measured:
        """Submits a run and waits for its end.

        Raises:
            RuntimeError: It fails.
        """
        before = {name: len(self._answers(name)) for name in SITES}
        resolved, schema = resolve(config)
        shared = resolved.shared().model_copy(update={"federation": resolved.federation})
        request = {
            "config": shared.model_dump(mode="json", by_alias=True, exclude_none=True),
            "schema": json.loads(schema_to_json(schema)),
        }
        with ControlClient(Kit.read(self.folder / "kits" / "operators" / "olga", "operator")) as to:
            run_id = to.call("submit", request)["run"]
        rounds, sent = self._followed(run_id, config.federation.rounds)
        steps = [self._answers(name)[before[name] :] for name in SITES]
        return Measured(
            seconds=[sum(event["seconds"].values()) for event in rounds[1:]],
            sites=[event["seconds"]["sites"] for event in rounds[1:]],
            answers=_slowest(steps, config.federation.rounds)[1:],
            sent=sent[1:],
        )

    def _followed(self, run_id: str, count: int) -> tuple[list[dict[str, Any]], list[float]]:
        """The events of the rounds, and what each sent."""
        path = self.folder / "kits" / "server" / "state" / "runs" / run_id / "events.jsonl"
        rounds: list[dict[str, Any]] = []
        marks = [loopback_bytes()]
        end = time.monotonic() + PATIENCE
        while len(rounds) < count:
            time.sleep(0.02)
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            events = [json.loads(line) for line in lines if line.endswith("}")]
            if failed := [event for event in events if event["event"] == "failed"]:
                raise RuntimeError(failed[0]["cause"])
            if time.monotonic() > end:
                raise TimeoutError(run_id)
            found = [event for event in events if event["event"] == "round"]
            if len(found) > len(rounds):
                rounds = found
                marks.append(loopback_bytes())
        until("it is over", (path.parent / "metrics.json").exists)
        return rounds, [float(b - a) for a, b in pairwise(marks)]

    def _answers(self, name: str) -> list[tuple[str, float]]:
        """Action and seconds of each message that a site has answered."""
        text = (self.folder / f"{name}.log").read_text(encoding="utf-8")
        return [(action, float(seconds)) for action, seconds in _ANSWERED.findall(text)]


_STEPS = ("train.step", "query.confirm", "query.unmask")


def _slowest(sites: list[list[tuple[str, float]]], rounds: int) -> list[float]:
    """The slowest site's own seconds of each round, summed over the round's steps."""
    total = [0.0] * rounds
    for step in _STEPS:
        taken = [[seconds for action, seconds in site if action == step] for site in sites]
        for number in range(rounds):
            total[number] += max((one[number] for one in taken if len(one) > number), default=0.0)
    return total


@contextmanager
def deployed(config: RunConfig) -> Iterator[Deployed]:
    """A new federation, with data for `config`; it is gone after the block."""
    with tempfile.TemporaryDirectory(prefix="fedveil-bench-") as name:
        folder = Path(name)
        _provision(folder, config)
        env = {"FEDVEIL_LOG_LEVEL": "INFO"}
        with Processes(folder) as processes:
            kits = folder / "kits"
            python = (sys.executable, "-P")
            server = (*python, "-m", "fedveil", "server", "up", kits / "server")
            processes.start("server", server, env)
            for site in SITES:
                kit = kits / "sites" / site
                processes.start(site, (*python, HERE / "deployment_site.py", "up", kit), env)
            until("all sites are connected", lambda: _connected(kits / "server") == len(SITES))
            yield Deployed(folder)


def _connected(server: Path) -> int:
    path = server / "state" / "nodes.json"
    nodes = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return sum(node["online"] for node in nodes.values())


def _provision(folder: Path, config: RunConfig) -> None:
    fleet, control = free_ports(2)
    text = _FEDERATION.format(fleet=fleet, control=control, sites=json.dumps(SITES))
    (folder / "federation.toml").write_text(text, encoding="utf-8")
    kits = create(folder / "federation.toml", folder / "kits")
    parts = load_shards(*resolve(config)).parts
    for name, part in zip(SITES, parts, strict=True):
        kit = kits / "sites" / name
        sign(kits, keygen(kit), kit / "answer.json")
        (kit / "data").mkdir()
        np.savez(kit / "data" / "records.npz", images=part.arrays(), labels=part.labels)
        text = (kit / "site.toml").read_text(encoding="utf-8")
        for old, new in _POLICY:
            text = text.replace(old, new)
        (kit / "site.toml").write_text(text, encoding="utf-8")
