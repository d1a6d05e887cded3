"""Plain Flower as its documentation deploys it: SuperLink, four SuperNodes, TLS, node keys.

The app is a small bundle. Its sites answer arrays of the same shapes at once, at random; its server
writes down when each round begins and ends.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography.hazmat.primitives import serialization as to
from cryptography.hazmat.primitives.asymmetric import ec
from deployment_ours import Processes, free_ports, until

from fedveil.deployment.certificates import (
    certificate_pem,
    issue_server,
    make_authority,
    new_key,
    private_pem,
)

NODES = 4
BIN = Path(sys.executable).parent
_MANIFEST = """
[project]
name = "peer"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "peer.server:app"
clientapp = "peer.client:app"
[tool.flwr.app.config]
shapes = "[[2]]"
rounds = 1
out = ""
"""
_CLIENT = """
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
random = np.random.default_rng()


@app.train()
def train(message, context):
    found = {
        name: Array((0.01 * random.standard_normal(array.shape, np.float32)))
        for name, array in message.content["arrays"].items()
    }
    return Message(RecordDict({"arrays": ArrayRecord(found)}), reply_to=message)
"""
_SERVER = """
import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    about = context.run_config
    random = np.random.default_rng()
    while len(nodes := list(grid.get_node_ids())) < 4:
        time.sleep(0.2)
    for number in range(1, about["rounds"] + 1):
        arrays = ArrayRecord({
            str(place): Array(random.standard_normal(shape, np.float32))
            for place, shape in enumerate(json.loads(about["shapes"]))
        })
        began = time.monotonic()
        replies = list(grid.send_and_receive([
            Message(RecordDict({"arrays": arrays}), node, "train", group_id=str(number))
            for node in nodes
        ]))
        took = time.monotonic() - began
        parts = [reply.content["arrays"] for reply in replies if reply.has_content()]
        with Path(about["out"]).open("a") as out:
            out.write(json.dumps({"seconds": took, "replies": len(parts)}) + "\\n")
"""


class Plain:
    """A SuperLink and its SuperNodes that are up."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        """Below a folder, with Flower's settings."""
        self._folder, self._env, self._runs = folder, env, 0

    def run(self, shapes: Sequence[Sequence[int]], rounds: int) -> list[float]:
        """Seconds of each round, from the question to the last reply, but for the first.

        Raises:
            RuntimeError: A round ends without all replies.
        """
        self._runs += 1
        out = self._folder / f"rounds-{self._runs}.jsonl"
        out.touch()
        config = f'shapes="{json.dumps(shapes)}" rounds={rounds} out="{out}"'
        app = self._folder / "app"
        _flwr(self._env, "run", str(app), "peer", "--run-config", config)

        def done() -> list[str] | None:
            lines = out.read_text(encoding="utf-8").splitlines()
            return lines if len(lines) == rounds else None

        found = [json.loads(line) for line in until("the rounds of plain Flower", done)]
        if any(one["replies"] != NODES for one in found):
            raise RuntimeError(f"plain Flower: {found}")
        return [one["seconds"] for one in found[1:]]


@contextmanager
def plain(poll: float | None = None) -> Iterator[Plain]:
    """Plain Flower, up; it is gone after the block.

    Args:
        poll: Seconds between an executor's looks for a task; Flower's own default where none.
    """
    with TemporaryDirectory(prefix="flower-bench-") as name:
        folder = Path(name)
        env = {
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        if poll is not None:
            env["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = str(poll)
        port, *ports = free_ports(1 + NODES)
        _write_app(folder / "app")
        _write_tls(folder)
        (folder / "home").mkdir()
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "peer"\n[superlink.peer]\naddress = "127.0.0.1:{port}"\n'
            f'root-certificates = "{folder / "tls" / "ca.pem"}"\n',
            encoding="utf-8",
        )
        with Processes(folder) as processes:
            _start(processes, folder, env, port, ports)
            yield Plain(folder, env)


def _start(
    processes: Processes, folder: Path, env: Mapping[str, str], port: int, ports: list[int]
) -> None:
    tls = folder / "tls"
    processes.start(
        "superlink",
        (
            BIN / "flower-superlink", "--host", "127.0.0.1", "--port", port, "--ssl-ca-certfile",
            tls / "ca.pem", "--ssl-certfile", tls / "server.pem", "--ssl-keyfile",
            tls / "server.key", "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        ),
        env,
    )  # fmt: skip
    for number, own in enumerate(ports, start=1):
        key = ec.generate_private_key(ec.SECP384R1())
        path = folder / f"node-{number}"
        form = to.Encoding.PEM, to.PrivateFormat.OpenSSH, to.NoEncryption()
        path.write_bytes(key.private_bytes(*form))
        public = folder / f"node-{number}.pub"
        public.write_bytes(
            key.public_key().public_bytes(to.Encoding.OpenSSH, to.PublicFormat.OpenSSH)
        )
        until(
            "plain Flower takes a node's key",
            partial(_flwr, env, "supernode", "register", str(public), "peer", check=False),
        )
        processes.start(
            f"supernode-{number}",
            (
                BIN / "flower-supernode", "--superlink", f"127.0.0.1:{port}", "--root-certificates",
                tls / "ca.pem", "--auth-supernode-private-key", path, "--host", "127.0.0.1",
                "--port", own,
            ),
            env,
        )  # fmt: skip


def _flwr(env: Mapping[str, str], *arguments: str, check: bool = True) -> bool:
    done = subprocess.run(
        [BIN / "flwr", *arguments], env={**os.environ, **env}, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    if check and done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode == 0


def _write_tls(folder: Path) -> None:
    (folder / "tls").mkdir()
    root, key, today = new_key(), new_key(), datetime.now(UTC)
    authority = make_authority("peer", root, 1, today)
    names = ("127.0.0.1", "localhost")
    server = issue_server(authority, root, key.public_key(), names, 1, today)
    (folder / "tls" / "ca.pem").write_bytes(certificate_pem(authority))
    (folder / "tls" / "server.pem").write_bytes(certificate_pem(server))
    (folder / "tls" / "server.key").write_bytes(private_pem(key))


def _write_app(folder: Path) -> None:
    (folder / "peer").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(_MANIFEST, encoding="utf-8")
    (folder / "peer" / "__init__.py").touch()
    (folder / "peer" / "client.py").write_text(_CLIENT, encoding="utf-8")
    (folder / "peer" / "server.py").write_text(_SERVER, encoding="utf-8")
