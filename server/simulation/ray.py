"""The Ray engine: Flower's own simulation, over a private SuperLink and a private or given Ray.

This process watches `events.jsonl`; a second one is the SuperLink, a third holds the ServerApp and
reaches the ClientApps in Ray's actors; all end with this one. It is for clusters: on one machine
the engine `local` starts and runs faster.
"""

import math
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from ...client.site import Site
from ...config import ConfigError, Federation
from ...flower.simulation import start_simulation
from ...machine import cores, memory_available, on_network
from ..replies import RunError
from ..rounds import Observer
from ..store import Event, RunFolder
from .begun import Begun

# Where ServerApp and ClientApp stand.
APPS = "fedveil.server.simulation.ray_apps:server", "fedveil.server.simulation.ray_apps:client"
ACTOR_BYTES = 700 * 2**20
"""Memory of one actor with torch, Flower and a small model; measured at 590 MiB."""

_POLL = 0.05  # seconds between looks at the events
_PATIENCE = 20.0  # seconds until a Ray must have answered
_BEGIN = 300.0  # seconds until a run must have begun
_GRACE = 15.0  # seconds that a finished run's process gets to end Ray
_ERROR = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception)\b.*")


def run_ray(begun: Begun, sites: Mapping[int, Site], observe: Observer) -> None:
    """Runs a federation over Ray; as an engine, see `simulation.run`.

    Args:
        begun: The run.
        sites: Its sites; the actors open them anew from their files.
        observe: Sees every event.

    Raises:
        RunError: The run failed.
    """
    federation = begun.config.federation
    store = RunFolder(begun.folder)
    _, seen = store.events_from(0)
    # Not where TMPDIR may say: the paths of Ray's sockets must be short.
    with TemporaryDirectory(prefix="fedveil-", dir="/tmp", ignore_cleanup_errors=True) as home:
        environment = _environment(Path(home), federation.ray_address)
        log = begun.folder / "sites" / "ray.log"
        logged = log.stat().st_size if log.exists() else 0
        with (
            _child("superlink", environment, log) as link,
            _child("ray_process", environment, log) as worker,
        ):
            key = secrets.token_hex(32)
            address = f"127.0.0.1:{_told(link, key)}"
            _tell(link, str(worker.pid))  # the group that it is to bury
            shares = federation.client_cpus, federation.client_gpus
            try:
                start_simulation(address, key, APPS, begun.values, len(sites), *shares)
            except OSError as error:
                raise RunError(f"Ray: {error}; {log} says more") from None
            _tell(worker, f"{address} {key}")
            last = _follow(store, seen, worker, observe)
    _check_end(last, log, logged)


def check_cluster(federation: Federation, ledgers: Path | None = None) -> None:
    """Refuses what Ray would wait for, or die of.

    Args:
        federation: What is asked for.
        ledgers: Where durable ledgers are, if there are any.

    Raises:
        ConfigError: Ray or what a client asks for is not there, or several hosts may not share it.
    """
    if find_spec("ray") is None:
        raise ConfigError(
            'federation.engine = "ray": Ray is not installed; pip install "fedveil[ray]", or use '
            'engine = "local"'
        )
    if federation.ray_address is not None:
        if ledgers is not None and on_network(ledgers):
            raise ConfigError(
                f"data.ledger = {ledgers}: is on a network disk, where several hosts cannot share "
                "a durable ledger; put it on a local one, or leave federation.ray_address out"
            )
        _check_address(federation.ray_address)
        return
    actors = cores() // federation.client_cpus
    if not actors:
        raise ConfigError(
            f"federation.client_cpus = {federation.client_cpus}: this machine has {cores()} cores; "
            "ask for fewer, or name a cluster in federation.ray_address"
        )
    _check_gpus(federation.client_gpus)
    if federation.client_gpus:
        actors = min(actors, int(_gpus() / federation.client_gpus))
    needed, free = actors * ACTOR_BYTES, memory_available()
    if needed > free:
        raise ConfigError(
            f"federation.client_cpus = {federation.client_cpus}: makes {actors} actors, which need "
            f"{needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free; raise it, "
            "so that fewer run at a time"
        )


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    reason: object
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
        # Ray itself would wait for minutes for something else that listens there.
        reason = "" if _is_ray(address) else "something else does"
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
    if reason:
        raise ConfigError(
            f"federation.ray_address = {address}: no Ray answers there ({reason}); check the "
            "address, or leave it out to start Ray on this machine"
        )


def _is_ray(address: str) -> bool:
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(  # noqa: S603  Ray's own
            command, capture_output=True, check=False, timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _check_gpus(share: float) -> None:
    if share and _gpus() < share:
        raise ConfigError(
            f"federation.client_gpus = {share:g}: this machine has {_gpus()} GPUs; use 0, or name "
            "a cluster in federation.ray_address"
        )


def _environment(home: Path, ray_address: str | None) -> dict[str, str]:
    """The children's environment: Flower's and Ray's own files apart, no cluster by accident."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    kept |= {"FLWR_HOME": str(home / "flwr"), "PYTHONUNBUFFERED": "1"}
    if ray_address is not None:
        return kept | {"RAY_ADDRESS": ray_address}
    # Ray listens on the network without asking who is there, unless it is given a token.
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    return kept | token | {"RAY_TMPDIR": str(home)}


@contextmanager
def _child(module: str, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of ours that does not outlive the block, nor do its own children."""
    log.parent.mkdir(exist_ok=True)
    with log.open("ab") as errors:
        process = subprocess.Popen(  # noqa: S603  ourselves
            [sys.executable, "-m", f"{__package__}.{module}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if module == "superlink" else errors,
            stderr=errors,
            env=environment,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _told(link: subprocess.Popen[str], key: str) -> int:
    """Gives the SuperLink its key; the port that it then names."""
    _tell(link, key)
    line = link.stdout.readline() if link.stdout else ""
    if not line.strip().isdigit():
        raise RunError("Ray: Flower's SuperLink does not start; sites/ray.log says why")
    return int(line)


def _tell(process: subprocess.Popen[str], line: str) -> None:
    if process.stdin is not None:
        with suppress(BrokenPipeError):  # it has ended; that is seen soon enough
            process.stdin.write(f"{line}\n")
            process.stdin.flush()


def _follow(
    store: RunFolder, start: int, worker: subprocess.Popen[str], observe: Observer
) -> Event:
    """Shows the events that the other process writes, until it has ended; the last of them."""
    last: Event = {"event": "nothing"}
    patience = time.monotonic() + _BEGIN
    while True:
        # Looked at before the events: what it wrote before it ended is then not missed.
        ended = worker.poll() is not None
        events, start = store.events_from(start)
        for event in events:
            observe(event)
            last, patience = event, math.inf
        if last["event"] in {"finished", "failed"}:
            patience = min(patience, time.monotonic() + _GRACE)
        if ended or time.monotonic() > patience:
            return last
        time.sleep(_POLL)


def _check_end(last: Event, log: Path, start: int) -> None:
    if last["event"] == "finished":
        return
    if last["event"] == "failed":
        cause: str = last["cause"]
        if "Flower error" in cause:  # such as of an actor that the system has killed
            raise RunError(f"{cause}: {_first_error(log, start)}; {log} says more")
        # What nobody foresaw has a type only for its cause.
        raise RunError(cause if " " in cause else f"{cause}; {log} says more")
    raise RunError(f"Ray: {_first_error(log, start)}; {log} says more")


def _first_error(log: Path, start: int) -> str:
    """The first line of a log that names an error, since byte `start`: what others came of."""
    text = log.read_bytes()[start:].decode(errors="replace")
    named = (line.strip() for line in text.splitlines() if _ERROR.match(line.strip()))
    return next(named, "its process ended, or did nothing, before the run began")
