"""`fedveil site up`: what it refuses, and what it starts."""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fedveil.client import up as client_up
from fedveil.client.up import up
from fedveil.config import ConfigError
from fedveil.deployment.kit import Kit
from fedveil.deployment.running import held, holder
from fedveil.deployment.supervise import Program

MakeKit = Callable[..., Path]


def test_it_keeps_one_program_running(make_kit: MakeKit, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def keep(kit: Kit, programs: Sequence[Program], level: int) -> int:
        assert holder(kit) is not None
        seen.append((programs, level))
        return 2

    monkeypatch.setattr(client_up, "keep_running", keep)
    folder = make_kit("site")
    assert up(folder, level=logging.DEBUG) == 2
    (((program,), level),) = seen
    assert program.command == (sys.executable, "-P", "-m", "fedveil.client.node", str(folder))
    assert (program.name, level) == ("node", logging.DEBUG)


def test_another_role_s_kit(make_kit: MakeKit) -> None:
    with pytest.raises(ConfigError, match="is the kit of server the-server; give one of a site"):
        up(make_kit("server"))


def test_a_kit_that_is_up(make_kit: MakeKit) -> None:
    folder = make_kit("site")
    with held(Kit.read(folder, "site")), pytest.raises(ConfigError, match="is up already, pid"):
        up(folder)
