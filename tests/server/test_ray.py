"""The Ray engine: the same runs as the local one, behind a key, and gone when it is done."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

import fedveil
from fedveil import machine
from fedveil.client.site import Site
from fedveil.config import ConfigError, Federation, FedveilError, RunConfig
from fedveil.flower.superlink import KEY_HEADER
from fedveil.ledgers import check, find, known_heads
from fedveil.models.state import read_file
from fedveil.privacy.noise import Coins
from fedveil.server import simulation
from fedveil.server.replies import RunError
from fedveil.server.simulation import ray
from fedveil.server.simulation.sites import simulated_site

MakeConfig = Callable[..., RunConfig]
CORES = machine.cores()
KEY = "a1" * 32


class TestWhatIsAskedOfRay:
    """It is refused before anything runs, in one line."""

    def test_ray_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray, "find_spec", lambda _: None)
        with pytest.raises(ConfigError, match=r'engine = "ray": Ray is not installed; pip'):
            ray.check_cluster(Federation(engine="ray"))

    @pytest.mark.parametrize(
        "address", ["127.0.0.1:1", "127.0.0.1:99999", "no-such-host.invalid:6379"]
    )
    def test_nobody_answers_at_the_address(self, address: str) -> None:
        with pytest.raises(ConfigError) as caught:
            ray.check_cluster(Federation(engine="ray", ray_address=address))
        line = str(caught.value)
        assert line.startswith(f"federation.ray_address = {address}: no Ray answers there (")
        assert "\n" not in line

    def test_something_else_listens_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray, "_PATIENCE", 4.0)
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            address = f"127.0.0.1:{listening.getsockname()[1]}"
            with pytest.raises(ConfigError, match=r"no Ray answers there \(something else does\)"):
                ray.check_cluster(Federation(engine="ray", ray_address=address))

    def test_more_cores_than_there_are(self) -> None:
        with pytest.raises(ConfigError, match=rf"client_cpus = {CORES + 1}: .* {CORES} cores"):
            ray.check_cluster(Federation(engine="ray", client_cpus=CORES + 1))

    def test_more_memory_than_is_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray, "memory_available", lambda: CORES * ray.ACTOR_BYTES - 1)
        with pytest.raises(ConfigError, match=rf"client_cpus = 1: makes {CORES} actors"):
            ray.check_cluster(Federation(engine="ray"))

    def test_as_much_memory_as_is_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray, "memory_available", lambda: CORES * ray.ACTOR_BYTES)
        ray.check_cluster(Federation(engine="ray"))

    def test_fewer_actors_need_less(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray, "memory_available", lambda: ray.ACTOR_BYTES)
        ray.check_cluster(Federation(engine="ray", client_cpus=CORES))

    @pytest.mark.parametrize(("count", "share"), [(0, 1.0), (0, 0.1), (1, 2.0)])
    def test_gpus_that_are_not_there(
        self, count: int, share: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        with pytest.raises(ConfigError, match=rf"client_gpus = {share:g}: .* {count} GPUs; use 0"):
            ray.check_cluster(Federation(engine="ray", client_gpus=share))

    def test_gpus_bound_the_actors_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One GPU for one client at a time: one actor, whatever the cores."""
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
        monkeypatch.setattr(ray, "memory_available", lambda: ray.ACTOR_BYTES)
        ray.check_cluster(Federation(engine="ray", client_gpus=1.0))

    def test_a_durable_ledger_is_not_shared_over_a_network(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(ray, "on_network", lambda _: True)
        federation = Federation(engine="ray", ray_address="127.0.0.1:1")
        with pytest.raises(ConfigError, match=r"data\.ledger = .* is on a network disk, where"):
            ray.check_cluster(federation, tmp_path)
        with pytest.raises(ConfigError, match="no Ray answers"):
            ray.check_cluster(federation, None)

    def test_a_share_of_one_that_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
        ray.check_cluster(Federation(engine="ray", client_gpus=0.25))

    def test_the_run_folder_is_not_made(self, make_config: MakeConfig, tmp_path: Path) -> None:
        config = make_config(
            federation={"engine": "ray", "ray_address": "127.0.0.1:1"},
            privacy={"mechanism": "none"},
        )
        with pytest.raises(ConfigError, match="no Ray answers there"):
            fedveil.simulate(config, out=tmp_path / "run")
        assert not (tmp_path / "run").exists()


class TestTheEnvironment:
    def test_a_cluster_of_somebody_elses_is_not_joined_by_accident(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        found = ray._environment(tmp_path, None)
        assert "RAY_ADDRESS" not in found
        assert found["RAY_AUTH_MODE"] == "token"
        assert len(found["RAY_AUTH_TOKEN"]) == 64
        assert found["FLWR_HOME"].startswith(str(tmp_path))

    def test_a_given_one_is(self, tmp_path: Path) -> None:
        found = ray._environment(tmp_path, "10.0.0.2:6379")
        assert found["RAY_ADDRESS"] == "10.0.0.2:6379"
        assert "RAY_AUTH_TOKEN" not in found

    def test_a_proxy_sees_nothing_that_goes_between_our_processes(self, tmp_path: Path) -> None:
        found = ray._environment(tmp_path, None)
        for name in ("NO_PROXY", "no_proxy"):
            hosts = found[name].split(",")
            assert {"127.0.0.1", "localhost"} <= set(hosts)
            assert "" not in hosts  # which would stand for every host

    def test_nothing_is_told_to_the_outside(self, tmp_path: Path) -> None:
        found = ray._environment(tmp_path, None)
        assert found["FLWR_TELEMETRY_ENABLED"] == found["RAY_USAGE_STATS_ENABLED"] == "0"
        assert found["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"


def asked(port: int, path: str, key: str | None) -> int:
    """The status of an empty request to a SuperLink."""
    headers = {"content-type": "application/protobuf"} | ({KEY_HEADER: key} if key else {})
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", data=b"", headers=headers, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("key", ["", "a1", "A1" * 32, "g1" * 32])
def test_a_superlink_without_a_key_does_not_start(key: str, tmp_path: Path) -> None:
    environment = ray._environment(tmp_path, None)
    with (
        ray._child("superlink", environment, tmp_path / "log") as link,
        pytest.raises(RunError, match="does not start"),
    ):
        ray._told(link, key)
    assert link.returncode != 0


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_is_not_asked(name: str, tmp_path: Path) -> None:
    """What starts a run goes straight to loopback, whatever proxy is set."""
    code = (
        "import sys; from fedveil.flower.simulation import start_simulation;"
        "start_simulation(sys.argv[1], 'k', ('a:b', 'c:d'), {}, 1, 1, 0.0)"
    )
    with socket.socket() as proxy, socket.socket() as link:
        for listening in (proxy, link):
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            listening.settimeout(60)
        proxied = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        started = subprocess.Popen(
            [sys.executable, "-c", code, f"127.0.0.1:{link.getsockname()[1]}"],
            env={**os.environ, name: proxied}, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        connection, _ = link.accept()
        request = connection.recv(65536)
        connection.sendall(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        connection.close()
        _, said = started.communicate(timeout=60)
        proxy.settimeout(0)
        with pytest.raises(BlockingIOError):
            proxy.accept()
    assert request.startswith(b"POST /v1/control/start-run")
    assert b"x-fedveil-key: k" in request
    assert "OSError: Flower's SuperLink does not take the run" in said


def test_flowers_own_superlink_asks_for_the_key_or_a_token(tmp_path: Path) -> None:
    environment = ray._environment(tmp_path, None)
    with ray._child("superlink", environment, tmp_path / "log") as link:
        port = ray._told(link, KEY)
        assert asked(port, "/v1/control/list-runs", None) == 403
        assert asked(port, "/v1/control/list-runs", "b2" * 32) == 403
        assert asked(port, "/v1/control/list-runs", KEY) == 200
        assert asked(port, "/v1/runtime/acquire-task", None) == 403
        # Past the gate; Flower refuses it, for it carries no task's token.
        assert asked(port, "/v1/runtime/pull-task-input", None) in {401, 403, 422}
        assert asked(port, "/v1/runtime/get-nodes", None) in {401, 403, 422}
    assert link.returncode is not None


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that have to do with a run, by their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
            alive = b"State:\tZ" not in (process / "status").read_bytes()
        except OSError:
            continue
        if alive and f"FEDVEIL_TEST={folder}".encode() in environment:
            found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


@pytest.fixture
def marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose name all processes of the test have in their environment."""
    monkeypatch.setenv("FEDVEIL_TEST", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    return tmp_path


def fixed_site(*arguments: Any) -> Site:  # noqa: ANN401
    """A simulated site with fixed coins."""
    site = simulated_site(*arguments)
    site.coins = Coins(site.name.encode().ljust(32, b"."))
    return site


def test_parity_with_the_local_engine(
    make_config: MakeConfig, marked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same coins: the same models to 1e-6, figures and events; and nothing is left."""
    monkeypatch.setattr(ray, "APPS", (ray.APPS[0], "fixed_sites:client"))
    monkeypatch.setattr(simulation, "simulated_site", fixed_site)
    homes: list[str] = []

    class Kept(TemporaryDirectory[str]):
        def __enter__(self) -> str:
            homes.append(super().__enter__())
            return homes[-1]

    monkeypatch.setattr(ray, "TemporaryDirectory", Kept)
    runs = {}
    for engine in ("local", "ray"):
        # One actor, so that each site's coins are drawn in one process, in order.
        extra = {"client_cpus": CORES} if engine == "ray" else {}
        config = make_config(
            federation={"sites": 3, "rounds": 3, "engine": engine, **extra},
            data={"ledger": str(marked / "ledgers"), "dataset_id": "digits"},
            training={"local_steps": 2},
            privacy={"mechanism": "local", "epsilon": 2.0},
            evaluation={"every": 2, "samples": 500},
            policy={"epsilon_lifetime": 10.0, "delta_lifetime": 1e-3},
        )
        runs[engine] = fedveil.simulate(config, out=marked / engine)
    local, rayed = runs["local"], runs["ray"]
    models = [read_file(run.path / "model.safetensors")[0] for run in (local, rayed)]
    for name, array in models[0].items():
        assert np.allclose(models[1][name], array, rtol=0, atol=1e-6), name
        assert np.abs(array).max() > 0
    assert rayed.metrics["quality"].keys() == local.metrics["quality"].keys()
    for name, found in local.metrics["quality"].items():
        assert rayed.metrics["quality"][name]["value"] == pytest.approx(found["value"], abs=1e-4)
    kinds = [[event["event"] for event in run.events()] for run in (local, rayed)]
    assert kinds[0] == kinds[1]
    assert rayed.privacy == local.privacy
    # Sites keep their numbers, though Flower's nodes have others.
    assert list(known_heads(rayed.path)) == ["site-001", "site-002", "site-003"]
    verified = [check(file, known_heads(rayed.path)[file.stem]) for file in find(rayed.path)]
    assert [len(facts["prices"]) for facts in verified] == [4, 4, 4]  # two runs, two sides each
    assert processes_of(marked) == []
    assert [Path(name).exists() for name in homes] == [False]


CONFIG = """
[federation]
sites = 2
rounds = {rounds}
engine = "ray"
[data]
source = "sklearn:digits"
[model]
family = "vae"
width = 4
latent = 2
[privacy]
mechanism = "none"
[evaluation]
samples = 200
every = 0
"""


def started(folder: Path, *arguments: str, rounds: int = 3) -> subprocess.Popen[str]:
    """A process of the command line that simulates."""
    file = folder / "run.toml"
    file.write_text(CONFIG.format(rounds=rounds), encoding="utf-8")
    command = [sys.executable, "-m", "fedveil", "simulate", str(file), "--out", str(folder / "run")]
    return subprocess.Popen(
        [*command, *arguments], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def told(run: Path) -> list[dict[str, Any]]:
    """What a run folder's events say."""
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> bool:
    """Whether it came true in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def test_a_failing_run_ends_with_its_cause(marked: Path) -> None:
    process = started(marked, "--set", "training.learning_rate=1e38")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1
    [error] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "lower training.learning_rate" in error
    assert said.endswith(f"{error}\n")
    events = told(marked / "run")
    assert events[-1]["event"] == "failed"
    assert events[-1]["cause"] in said
    assert processes_of(marked) == []


def test_an_app_that_cannot_be_loaded_is_a_failed_run(
    make_config: MakeConfig, marked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "APPS", ("fedveil.server.simulation.ray_apps:nothing", ray.APPS[1]))
    config = make_config(federation={"engine": "ray"}, privacy={"mechanism": "none"})
    with pytest.raises(RunError, match=r"^Ray: .*nothing.*ray\.log says more$") as caught:
        fedveil.simulate(config, out=marked / "run")
    assert caught.value.exit_code == 1
    assert processes_of(marked) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_whoever_stops_it_leaves_nothing_behind_and_it_goes_on(
    marked: Path, how: signal.Signals
) -> None:
    """Killed, or interrupted, after a round: no process stays, and --resume repeats no round."""
    events = marked / "run" / "events.jsonl"
    process = started(marked, rounds=60)
    try:
        assert wait_for(lambda: events.exists() and b'"round": 2' in events.read_bytes())
    finally:
        process.send_signal(how)
    _, said = process.communicate(timeout=120)
    assert process.returncode == (130 if how is signal.SIGINT else -how)
    assert wait_for(lambda: processes_of(marked) == [], 60), processes_of(marked)
    assert ("--resume" in said) == (how is signal.SIGINT)
    again = started(marked, "--resume", rounds=60)
    _, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    seen = told(marked / "run")
    numbers = [event["round"] for event in seen if event["event"] == "round"]
    (resumed,) = [event for event in seen if event["event"] == "resumed"]
    assert sorted([*numbers, *resumed["lost"]]) == list(range(1, 61))
    assert processes_of(marked) == []
    run = fedveil.load(marked / "run")
    assert run.metrics["sites"] == 2
    for file in find(run.path):
        check(file, known_heads(run.path)[file.stem])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of somebody's own Ray of two cores."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}"]
    options = ["--num-cpus=2", "--include-dashboard=false", "--min-worker-port=0", "--block"]
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        started = subprocess.Popen(
            [*command, *options, "--max-worker-port=0", "--temp-dir", folder],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        )  # fmt: skip
        try:
            assert wait_for(lambda: ray._is_ray(f"127.0.0.1:{port}"))
            yield f"127.0.0.1:{port}"
        finally:
            os.killpg(started.pid, signal.SIGTERM)
            started.wait(60)


@pytest.mark.slow
def test_a_cluster_is_used_and_left_as_it_was(
    make_config: MakeConfig, tmp_path: Path, cluster: str
) -> None:
    def config(**more: Any) -> RunConfig:  # noqa: ANN401
        return make_config(
            federation={"sites": 3, "engine": "ray", "ray_address": cluster, **more},
            privacy={"mechanism": "none"},
            evaluation={"samples": 200},
        )

    run = fedveil.simulate(config(), out=tmp_path / "run")
    assert run.metrics["rounds"] == 2
    assert run.metrics["sites"] == 3
    # What it has not got is told as Ray tells it, and the next run may come.
    with pytest.raises(RunError, match=r"^Ray: ValueError: ActorPool is empty\..*ray\.log"):
        fedveil.simulate(config(client_gpus=1.0), out=tmp_path / "none")
    assert ray._is_ray(cluster)


@pytest.mark.slow
def test_records_that_make_a_site_fail_are_told_to_who_simulates(
    make_config: MakeConfig, marked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a federation nobody learns of it; the simulation stops and says where to look."""
    monkeypatch.setattr(ray, "APPS", (ray.APPS[0], "failing_sites:client"))
    config = make_config(federation={"engine": "ray"}, privacy={"mechanism": "none"})
    with pytest.raises(FedveilError, match=r"a simulated site failed and took part without"):
        fedveil.simulate(config, out=marked / "run")
    assert [path.name for path in (marked / "run" / "sites").glob("*.failed")] == [
        "site-002.failed"
    ]
    assert "no such records" in (marked / "run" / "sites" / "site.log").read_text(encoding="utf-8")
    assert "no such records" not in (marked / "run" / "events.jsonl").read_text(encoding="utf-8")
