"""The SuperLink's sites are the roster's; the database is a real one, nothing listens."""

import json
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedveil.deployment.keys import read_control
from fedveil.deployment.kit import Kit
from fedveil.deployment.provision import add, revoke, sign
from fedveil.deployment.roster import sign_roster
from fedveil.server import superlink
from fedveil.server.gate import Gate
from fedveil.server.superlink import keep_roster, link, watch

Look = Callable[[], object]
pytestmark = pytest.mark.filterwarnings("ignore:No path_separator:DeprecationWarning")


@pytest.fixture
def server(kits: Path) -> Kit:
    return Kit.read(kits / "server", "server")


def nodes(server: Kit) -> set[str]:
    return set(json.loads((server.state / superlink.NODES).read_text(encoding="utf-8")))


def watched(server: Kit, gate: Gate, app: object, looks: list[Look]) -> None:
    """Does these things, a look at the roster after each."""

    class Stop(threading.Event):
        def wait(self, _: float | None = None) -> bool:
            if not looks:
                return True
            looks.pop(0)()
            return False

    watch(server, gate, app, Stop())


def test_a_database_that_is_locked_for_a_while_does_not_end_the_watch(
    server: Kit, kits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, _ = link(server)
    gate = Gate(server)

    def lock() -> None:
        def fails(*_: object) -> None:
            monkeypatch.setattr(superlink, "keep_roster", keep_roster)
            raise sqlite3.OperationalError("database is locked")

        monkeypatch.setattr(superlink, "keep_roster", fails)

    watched(server, gate, app, [lock, lambda: revoke(kits, "west")])
    assert nodes(server) == {"north", "south"}


def test_an_older_roster_takes_nobody_off(server: Kit, kits: Path) -> None:
    """A SuperLink has each key once: who is taken off by a mistake would not come back."""
    app, _ = link(server)
    gate, newest, roster = Gate(server), server.roster.read_bytes(), server.read_roster()
    without = tuple(one for one in roster.members if one.name != "west")
    key = read_control(kits / "authority" / "ca.key")
    older = sign_roster(replace(roster, version=1, members=without), key)
    looks = [lambda: server.roster.write_bytes(older), lambda: server.roster.write_bytes(newest)]
    watched(server, gate, app, [*looks, lambda: None])
    assert nodes(server) == {"north", "south", "west"}


def test_a_key_that_was_taken_off_is_told(
    server: Kit, kits: Path, homes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app, _ = link(server)
    gate = Gate(server)
    watched(server, gate, app, [lambda: revoke(kits, "west")])

    def back() -> None:
        add(kits, "west", "site")
        sign(kits, homes / "west" / "request.json")

    watched(server, gate, app, [back, lambda: None])
    assert nodes(server) == {"north", "south"}
    told = [record.message for record in caplog.records if "west" in record.message]
    assert len([line for line in told if "have it rotated" in line]) == 1
