"""`fedveil server up`: what it refuses, and what it starts."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fedveil.config import ConfigError
from fedveil.deployment.kit import Kit
from fedveil.deployment.running import held
from fedveil.server import up as server_up
from fedveil.server.up import check_ports, programs, up

MakeKit = Callable[..., Path]


@pytest.fixture
def ports() -> tuple[int, int]:
    """Two ports that were free a moment ago."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


@pytest.fixture
def starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a program would be started."""

    def fail(*_: object) -> int:
        pytest.fail("something was started")

    monkeypatch.setattr(server_up, "keep_running", fail)


@pytest.mark.usefixtures("starts_nothing")
class TestWhatItRefuses:
    @pytest.mark.parametrize("name", ["fleet_port", "control_port"])
    def test_a_port_that_is_taken(
        self, name: str, taken: int, ports: tuple[int, int], make_kit: MakeKit
    ) -> None:
        values = {"fleet_port": ports[0], "control_port": ports[1], name: taken}
        with pytest.raises(ConfigError) as caught:
            up(make_kit("server", **values))
        assert str(caught.value) == (
            f"server.{name} = {taken}: is taken by another process; stop it, or change the port "
            "in kit.toml"
        )

    def test_one_port_for_both(self, ports: tuple[int, int], make_kit: MakeKit) -> None:
        with pytest.raises(ConfigError, match=r"server.control_port = \d+: is the fleet_port, too"):
            up(make_kit("server", fleet_port=ports[0], control_port=ports[0]))

    def test_another_role_s_kit(self, make_kit: MakeKit) -> None:
        with pytest.raises(ConfigError, match="is the kit of site the-site; give one of a server"):
            up(make_kit("site"))

    def test_no_kit(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is no kit"):
            up(tmp_path)

    def test_a_kit_that_is_up(self, ports: tuple[int, int], make_kit: MakeKit) -> None:
        folder = make_kit("server", fleet_port=ports[0], control_port=ports[1])
        with (
            held(Kit.read(folder, "server")),
            pytest.raises(ConfigError, match=f"is up already, pid {os.getpid()}; stop it first"),
        ):
            up(folder)

    def test_that_it_is_up_is_said_before_its_own_ports_are_found_taken(
        self, taken: int, make_kit: MakeKit
    ) -> None:
        folder = make_kit("server", fleet_port=taken)
        with (
            held(Kit.read(folder, "server")),
            pytest.raises(ConfigError, match="is up already"),
        ):
            up(folder)


def test_a_connection_that_has_just_ended_does_not_count(
    ports: tuple[int, int], make_kit: MakeKit
) -> None:
    """Or a restart would wait for a minute."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", ports[0]))
        listening.listen()
        with closing(socket.create_connection(("127.0.0.1", ports[0]))) as caller:
            listening.accept()[0].close()  # the server's side waits
            caller.recv(1)
    folder = make_kit("server", fleet_port=ports[0], control_port=ports[1])
    check_ports(Kit.read(folder, "server").about)


def test_it_starts_three_programs(make_kit: MakeKit) -> None:
    kit = Kit.read(make_kit("server"), "server")
    found = programs(kit)
    assert [program.name for program in found] == ["superlink", "executor", "control"]
    assert found[0].command == (
        sys.executable, "-P", "-m", "fedveil.server.superlink", str(kit.folder),
    )  # fmt: skip
    assert all(program.fatal == {2} for program in found)


def test_two_at_once(ports: tuple[int, int], make_kit: MakeKit, tmp_path: Path) -> None:
    """Two processes; the programs stand in for the real ones."""
    folder = make_kit("server", fleet_port=ports[0], control_port=ports[1])
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    text = f"""
import sys
from pathlib import Path
from fedveil.config import FedveilError
from fedveil.deployment.kit import Kit
from fedveil.deployment.supervise import Program
from fedveil.server import up
stay = "import signal; open({str(ready)!r}, 'w').close(); signal.pause()"
up.open_kit = Kit.read
up.programs = lambda kit: [Program("stays", (sys.executable, "-c", stay))]
try:
    sys.exit(up.up(Path(sys.argv[1])))
except FedveilError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    command = [sys.executable, "-P", "-c", text, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as first:
        try:
            ready.read_text()  # until the program is there
            second = subprocess.run(command, capture_output=True, text=True, check=False)
            assert second.returncode == 2
            assert second.stdout == f"{folder}: is up already, pid {first.pid}; stop it first\n"
        finally:
            first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 0
