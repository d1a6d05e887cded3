"""The commands that ask a server, and the server's own process."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import fedveil
from fedveil.deployment.control import ControlClient, UnreachableError
from fedveil.server.audit_log import verify
from fedveil.server.control import Serving

Call = Callable[..., Any]
Federation = Any
"""As in conftest.py, which cannot be imported."""
Queued = Callable[[], str]
Running = Callable[[str], AbstractContextManager[Path]]

CONFIG = """
[federation]
name = "digits"
sites = 10
rounds = 2
[data]
source = "sklearn:digits"
[model]
family = "vae"
[privacy]
epsilon = 8.0
"""


def line(result: Any, code: int) -> str:  # noqa: ANN401
    """The one line of an error."""
    assert (result.code, result.out) == (code, "")
    assert result.err.count("\n") == 1
    assert result.err.startswith("error: ")
    return str(result.err)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(CONFIG)
    return file


@pytest.fixture
def kit(federation: Federation, serving: Serving) -> Path:
    """Olga's kit."""
    assert serving.port == federation.port
    path: Path = federation.kit("olga").folder
    return path


class TestSubmit:
    def test_one_that_waits(
        self, call: Call, federation: Federation, kit: Path, config: Path
    ) -> None:
        result = call("submit", config, "--kit", kit, "--set", "federation.sites=3")
        assert (result.code, result.err) == (0, "")
        (summary,) = federation.queue.listed()
        assert (summary.state, summary.name, summary.by) == ("queued", "digits", "olga")
        assert result.out.startswith(f"run {summary.run_id}: submitted, place 1 in the queue")
        receipt = result.out.split("receipt ")[1].strip()
        result = call("audit", "log", federation.server.state / "audit.jsonl", "--receipt", receipt)
        assert result.code == 0

    def test_json(
        self, call: Call, federation: Federation, kit: Path, config: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setenv("FEDVEIL_KIT", str(kit))
        result = call("submit", config, "--set", "federation.sites=3", "--json")
        found = json.loads(result.out)
        assert [found["run"]] == [one.run_id for one in federation.queue.listed()]
        assert found["receipt"]["entry"] == 2

    def test_what_the_server_has_no_use_for_stays_here(
        self, call: Call, federation: Federation, kit: Path, config: Path
    ) -> None:
        settings = (
            "federation.sites=3", "data.ledger=mine", "data.dataset_id=digits",
            "policy.epsilon_lifetime=20", "policy.delta_lifetime=0.001",
        )  # fmt: skip
        flags = (word for setting in settings for word in ("--set", setting))
        assert call("submit", config, "--kit", kit, *flags).err == ""
        (summary,) = federation.queue.listed()
        assert "mine" not in (federation.queue.path(summary.run_id) / "config.toml").read_text()

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ([], "use --set federation.sites=3"),
            (["--set", "federation.rounds=0"], "federation.rounds = 0"),
            (["--set", "federation.engine=ray", "--set", "federation.sites=3"], "engine"),
        ],
    )
    def test_refused(
        self, call: Call, kit: Path, config: Path, options: list[str], said: str
    ) -> None:
        assert said in line(call("submit", config, "--kit", kit, *options), 2)

    @pytest.mark.usefixtures("serving")
    def test_not_by_an_auditor(self, call: Call, federation: Federation, config: Path) -> None:
        folder = federation.kit("ada").folder
        said = line(call("submit", config, "--kit", folder), 2)
        assert "is the kit of auditor ada; give one of an operator" in said


class TestWrongKits:
    COMMANDS = (
        ["list"], ["watch", "0" * 16], ["cancel", "0" * 16], ["resume", "0" * 16],
        ["fetch", "0" * 16, "-o", "out"],
    )  # fmt: skip

    @pytest.mark.parametrize("command", COMMANDS)
    def test_none(self, call: Call, tmp_path: Path, command: list[str]) -> None:
        assert "is no kit" in line(call("runs", *command, "--kit", tmp_path), 2)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_the_servers(self, call: Call, federation: Federation, command: list[str]) -> None:
        kit = federation.server.folder
        assert "is the kit of server server" in line(call("runs", *command, "--kit", kit), 2)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_nobody_answers(
        self, call: Call, federation: Federation, command: list[str], tmp_path: Path
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            federation.port = free.getsockname()[1]
        said = line(call("runs", *command, "--kit", federation.kit("olga").folder), 1)
        assert f"127.0.0.1:{federation.port}: cannot be reached" in said
        assert "is the server up" in said
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("command", COMMANDS[1:])
    def test_nobodys_run(self, call: Call, kit: Path, command: list[str]) -> None:
        assert "there is none" in line(call("runs", *command, "--kit", kit), 2)

    @pytest.mark.parametrize("name", ["ca.pem", "certificate.pem", "keys/control.key"])
    def test_not_whole(self, call: Call, kit: Path, name: str) -> None:
        (kit / name).unlink()
        assert Path(name).name in line(call("runs", "list", "--kit", kit), 2)

    @pytest.mark.parametrize("name", ["certificate.pem", "keys/control.key"])
    @pytest.mark.parametrize("content", [b"", b"garbage\n"])
    def test_what_grpc_would_choke_on(
        self, call: Call, kit: Path, name: str, content: bytes
    ) -> None:
        (kit / name).write_bytes(content)
        said = line(call("runs", "list", "--kit", kit), 2)
        assert f"{Path(name).name}: holds no" in said

    def test_another_s_certificate(self, call: Call, kit: Path, federation: Federation) -> None:
        other = federation.kit("ada").folder / "certificate.pem"
        (kit / "certificate.pem").write_bytes(other.read_bytes())
        assert "is the certificate of auditor ada" in line(call("runs", "list", "--kit", kit), 2)

    def test_no_kit_is_a_wrong_call(self, call: Call) -> None:
        assert "--kit" in line(call("runs", "watch", "0" * 16), 2)


class TestRuns:
    def test_list(self, call: Call, kit: Path, queued: Queued) -> None:
        assert call("runs", "list", "--kit", kit).out.endswith(": has no runs\n")
        run_id = queued()
        assert f"{run_id}  fedveil" in call("runs", "list", "--kit", kit).out
        found = json.loads(call("runs", "list", "--kit", kit, "--json").out)
        assert [one["run_id"] for one in found["runs"]] == [run_id]

    def test_a_folder_still(
        self, call: Call, kit: Path, finished_run: fedveil.Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FEDVEIL_KIT", str(kit))
        assert finished_run.path.name in call("runs", "list", finished_run.path.parent).out

    def test_cancel_and_resume(
        self, call: Call, federation: Federation, kit: Path, queued: Queued
    ) -> None:
        run_id = queued()
        assert "cancelled; receipt 2:" in call("runs", "cancel", run_id, "--kit", kit).out
        assert federation.queue.summary(run_id).state == "cancelled"
        assert "there is nothing to cancel" in line(call("runs", "cancel", run_id, "--kit", kit), 2)
        assert "queued again" in call("runs", "resume", run_id, "--kit", kit).out
        result = call("runs", "cancel", run_id, "--kit", kit, "--json")
        assert json.loads(result.out)["run"] == run_id


class TestWatch:
    @pytest.fixture
    def failed(self, queued: Queued, running: Running) -> str:
        run_id = queued()
        with running(run_id) as folder:
            event = {"event": "failed", "round": 0, "cause": "no site answers"}
            (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
        return run_id

    def test_one_that_waits_for_an_owner(
        self, call: Call, kit: Path, queued: Queued, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_id = queued()
        held, away = {"site": 3, "reason": "not approved"}, {"site": 1, "reason": "is away"}
        events = [
            {"event": {"event": "waiting", "waiting": [away, held], "refused": []}},
            {"event": {"event": "waiting", "waiting": [held], "refused": [away]}},
        ]
        ended = {"end": {"state": "cancelled", "cause": None}}
        told = [
            "waits for site 1: is away", "waits for site 3: not approved",
            "site 1 refuses: is away",
        ]  # fmt: skip
        for state, expected in (("running", told), ("failed", [])):
            messages = iter([{"state": {"run_id": run_id, "state": state}}, *events, ended])
            monkeypatch.setattr("fedveil.deployment.watching.watch", lambda *_, m=messages: m)
            assert call("runs", "watch", run_id, "--kit", kit).err.splitlines()[1:-1] == expected

    def test_one_that_failed(self, call: Call, kit: Path, failed: str) -> None:
        result = call("runs", "watch", failed, "--kit", kit)
        assert result.code == 1
        assert result.err.endswith(f"error: run {failed}: failed: no site answers\n")
        found = json.loads(call("runs", "watch", failed, "--kit", kit, "--json").out)
        assert (found["state"], found["cause"]) == ("failed", "no site answers")

    def test_one_that_finished(
        self, call: Call, kit: Path, finished_run: fedveil.Run, queued: Queued, running: Running
    ) -> None:
        run_id = queued()
        with running(run_id) as folder:
            for name in ("events.jsonl", "metrics.json"):
                (folder / name).write_bytes((finished_run.path / name).read_bytes())
        result = call("runs", "watch", run_id, "--kit", kit)
        assert result.code == 0
        assert f"fedveil runs fetch {run_id}" in result.out

    def test_enough(
        self, call: Call, kit: Path, queued: Queued, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ctrl-C: the run goes on."""

        def interrupted(*_: object) -> Iterator[object]:
            raise KeyboardInterrupt

        run_id = queued()
        monkeypatch.setattr("fedveil.deployment.watching.watch", interrupted)
        result = call("runs", "watch", run_id, "--kit", kit)
        assert (result.code, result.out) == (130, "")
        assert result.err.startswith(f"run {run_id} goes on at the server")
        assert f"fedveil runs cancel {run_id} --kit {kit}" in result.err

    def test_submit_and_watch(
        self, call: Call, federation: Federation, kit: Path, config: Path
    ) -> None:
        def execute() -> None:
            queue, tired = federation.queue, threading.Event()
            while (run_id := queue.next()) is None and not tired.wait(0.01):
                pass
            queue.begun(run_id)
            event = {"event": "failed", "round": 0, "cause": "x"}
            (queue.path(run_id) / "events.jsonl").write_text(json.dumps(event) + "\n")
            queue.ended(run_id)

        executor = threading.Thread(target=execute)
        executor.start()
        result = call("submit", config, "--kit", kit, "--set", "federation.sites=3", "--watch")
        executor.join()
        assert (result.code, result.out) == (1, "")
        assert ": submitted, " in result.err


class TestFetch:
    @pytest.fixture
    def finished(self, queued: Queued, running: Running, finished_run: fedveil.Run) -> str:
        run_id = queued()
        with running(run_id) as folder:
            for file in finished_run.path.iterdir():
                if file.is_file() and not file.name.startswith("."):
                    (folder / file.name).write_bytes(file.read_bytes())
        return run_id

    def test_then_everything_works(
        self, call: Call, kit: Path, finished: str, tmp_path: Path
    ) -> None:
        result = call("runs", "fetch", finished, "--kit", kit, "-o", "out")
        assert (result.code, result.err) == (0, "")
        assert "Privacy: epsilon" in result.out
        assert "Protects one record against" in result.out
        assert "cleaning" not in result.out
        assert call("sample", "out", "-o", "a.npz", "-n", "3").code == 0
        assert call("report", "out", "-o", "r.html").code == 0
        assert fedveil.load(tmp_path / "out").finished
        assert "is there already" in line(
            call("runs", "fetch", finished, "--kit", kit, "-o", "out"), 2
        )

    def test_json(self, call: Call, kit: Path, finished: str) -> None:
        result = call("runs", "fetch", finished, "--kit", kit, "-o", "out", "--json")
        assert json.loads(result.out)["folder"] == "out"


class TestTheProcess:
    @pytest.fixture
    def free_port(self) -> int:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port: int = free.getsockname()[1]
            return port

    def start(
        self, federation: Federation, port: int, log: Path, **variables: str
    ) -> subprocess.Popen[bytes]:
        """The server's process, once it says that it is there."""
        kit = federation.server.folder
        text = (kit / "kit.toml").read_text()
        (kit / "kit.toml").write_text(
            text.replace("control_port = 1\n", f"control_port = {port}\n")
        )
        with log.open("wb") as opened:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "fedveil.server.control", str(kit)],
                stderr=opened, env={**os.environ, **variables},
            )  # fmt: skip

    def wait_for(self, log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
        tired = threading.Event()
        for _ in range(3000):
            if text in log.read_text() or process.poll() is not None:
                break
            tired.wait(0.02)
        assert text in log.read_text()

    def test_its_life(
        self, federation: Federation, pairs: dict[str, Any], free_port: int, tmp_path: Path
    ) -> None:
        """It answers, notes handshakes that gRPC refuses, and stops when it is asked to."""
        log = tmp_path / "log"
        process = self.start(federation, free_port, log, GRPC_VERBOSITY="NONE")
        try:
            self.wait_for(log, f"on port {free_port}", process)
            federation.port = free_port
            with ControlClient(federation.kit("ada")) as client:
                assert client.call("status")["queued"] == 0
            with (
                ControlClient(federation.kit("olga", pairs["forged"])) as client,
                pytest.raises(fedveil.config.ConfigError, match="does not accept"),
            ):
                client.call("status")
            self.wait_for(log, "CERTIFICATE_VERIFY_FAILED", process)
            self.wait_for(log, "PEER_DID_NOT_RETURN_A_CERTIFICATE", process)  # the diagnosis's own
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
        assert "Traceback" not in log.read_text()
        assert verify(federation.server.state / "audit.jsonl").count == 1
        with (
            ControlClient(federation.kit("ada")) as client,
            pytest.raises(UnreachableError, match="cannot be reached"),
        ):
            client.call("status")

    def test_a_busy_port(self, federation: Federation, serving: Serving, tmp_path: Path) -> None:
        process = self.start(federation, serving.port, tmp_path / "log")
        assert process.wait(60) == 2
        lines = (tmp_path / "log").read_text().splitlines()
        (told,) = [text for text in lines if '"ERROR"' in text]
        assert f"control_port = {serving.port}: cannot be listened on" in told

    def test_a_broken_audit_log(
        self, federation: Federation, free_port: int, tmp_path: Path
    ) -> None:
        federation.server.state.mkdir()
        (federation.server.state / "audit.jsonl").write_text("{}\n")
        process = self.start(federation, free_port, tmp_path / "log")
        assert process.wait(60) == 1
        assert "audit.jsonl, line 1:" in (tmp_path / "log").read_text()
