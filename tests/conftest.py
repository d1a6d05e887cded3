"""What all tests share: small configurations, fixed coins, a finished run."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

import fedveil
from fedveil import cli
from fedveil.config import RunConfig
from fedveil.privacy.noise import Coins

# New examples at every desk, the same ones in CI: a submission does not fail by another's find.
settings.register_profile("fedveil", deadline=None, max_examples=40)
settings.register_profile("ci", settings.get_profile("fedveil"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "fedveil")

MakeConfig = Callable[..., RunConfig]


class Result(NamedTuple):
    """How a command ended."""

    code: object
    out: str
    err: str


def make_config(**sections: dict[str, Any]) -> RunConfig:
    """A small run on digits; each keyword is a section whose options win."""
    raw: dict[str, Any] = {
        "federation": {"sites": 3, "rounds": 2},
        "data": {"source": "sklearn:digits"},
        "model": {"family": "vae", "width": 4, "latent": 2, "hidden": 8},
        "privacy": {"epsilon": 8.0, "mechanism": "central"},
        "policy": {"self_test": False},
    }
    for section, options in sections.items():
        raw.setdefault(section, {}).update(options)
    return RunConfig.model_validate(raw)


@pytest.fixture(name="make_config")
def _make_config() -> MakeConfig:
    return make_config


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Result]:
    """Calls the console script's function in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["fedveil", *map(str, arguments)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def coins() -> Coins:
    """Fixed coins: a statistical test on them gives the same answer every time."""
    return Coins(bytes(range(32)))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> fedveil.Run:
    """A finished run on digits, two rounds long."""
    return fedveil.simulate(make_config(), out=tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="session")
def finished_table_run(tmp_path_factory: pytest.TempPathFactory) -> fedveil.Run:
    """A finished run on breast cancer, two rounds long."""
    config = make_config(data={"source": "sklearn:breast_cancer"})
    return fedveil.simulate(config, out=tmp_path_factory.mktemp("runs") / "table")


@pytest.fixture
def write_file(tmp_path: Path) -> Callable[[str, str], Path]:
    """Writes a text file below the test's own folder."""

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_kit(tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a kit that holds `kit.toml` only."""

    def make(role: str, **values: object) -> Path:
        about = {
            "federation": "trial", "role": role, "name": f"the-{role}", "server": "localhost",
            "fleet_port": 9443, "control_port": 9444, "coordinator": "0" * 64,
        }  # fmt: skip
        folder = tmp_path / f"kit-{role}"
        folder.mkdir(exist_ok=True)
        lines = [f"{name} = {json.dumps(value)}" for name, value in (about | values).items()]
        (folder / "kit.toml").write_text("\n".join(lines), encoding="utf-8")
        return folder

    return make
