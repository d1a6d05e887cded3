"""What all tests share: small configurations, fixed coins, a finished run, kits."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

import fedveil
from fedveil import cli
from fedveil.config import RunConfig
from fedveil.deployment.keygen import keygen
from fedveil.deployment.provision import create, sign
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


FEDERATION = """
[federation]
name = "heart"
[server]
address = "fedveil.example.org"
addresses = ["192.0.2.10", "::1"]
[members]
sites = ["north", "south", "west"]
operators = ["boss"]
auditors = ["judge"]
"""


@pytest.fixture(scope="session", name="made_federation")
def _made_federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of three sites whose kits stand elsewhere, as in life."""
    root = tmp_path_factory.mktemp("federation")
    (root / "federation.toml").write_text(FEDERATION, encoding="utf-8")
    create(root / "federation.toml", root / "kits")
    for name in ("north", "south", "west"):
        shutil.copytree(root / "kits" / "sites" / name, root / "homes" / name)
        request = keygen(root / "homes" / name)
        sign(root / "kits", request, root / "homes" / name / "answer.json")
    return root


@pytest.fixture
def federation_file(tmp_path: Path) -> Path:
    """A FEDERATION.toml of three sites."""
    path = tmp_path / "federation.toml"
    path.write_text(FEDERATION, encoding="utf-8")
    return path


@pytest.fixture
def kits(made_federation: Path, tmp_path: Path) -> Path:
    """The authority's folder of all kits; every site is signed for."""
    shutil.copytree(made_federation / "kits", tmp_path / "kits")
    return tmp_path / "kits"


@pytest.fixture
def homes(made_federation: Path, tmp_path: Path) -> Path:
    """The sites' kits by name, where the sites have them."""
    shutil.copytree(made_federation / "homes", tmp_path / "homes")
    return tmp_path / "homes"
