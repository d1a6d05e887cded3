"""What all tests share: small configurations, fixed coins, a finished run, kits."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import settings

import fedveil
from fedveil import cli
from fedveil.config import RunConfig
from fedveil.deployment.certificates import issue_member, make_authority, new_key, private_pem
from fedveil.deployment.keygen import keygen
from fedveil.deployment.kit import Kit
from fedveil.deployment.provision import create, sign
from fedveil.deployment.roster import Member, Roster, sign_roster
from fedveil.privacy.noise import Coins
from fedveil.privacy.secagg.keys import Identity
from fedveil.server import warm_start

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
        "privacy": {"epsilon": 8.0, "mechanism": "central", "statistics_share": 0.0},
        "policy": {"self_test": False},
    }
    for section, options in sections.items():
        raw.setdefault(section, {}).update(options)
    return RunConfig.model_validate(raw)


@pytest.fixture(name="make_config")
def _make_config() -> MakeConfig:
    return make_config


@pytest.fixture(scope="session", autouse=True)
def _short_warm_start() -> Iterator[None]:
    """As many steps of public training as tests have time for; its own tests set their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_start, "_STEPS", 20)
        patch.setattr(warm_start, "_SAMPLES", 500)
        yield


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


SITE_TOML = """
[site]
name = "st-mary"
data = "records.csv"

[policy]
dataset_id = "cardiology"
epsilon_lifetime = 10.0
delta_lifetime = 1e-4
self_test = false
"""


@dataclass
class SiteKit:
    """A site's kit, as provisioning and keygen leave it, and who could change it."""

    folder: Path
    coordinator: Identity
    authority: ec.EllipticCurvePrivateKey
    members: tuple[Member, ...] = ()
    version: int = 0
    identity: Identity = field(default_factory=lambda: Identity(bytes(range(32))))

    @property
    def kit(self) -> Kit:
        return Kit.read(self.folder, "site")

    def write(self, name: str, content: str, mode: int = 0o600) -> Path:
        path = self.folder / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        path.chmod(mode)
        return path

    def site_toml(self, policy: str = "", section: str = "") -> None:
        """The site's own file with more lines of policy, and more sections."""
        self.write("site.toml", f"{SITE_TOML}{policy}\n{section}\n")

    def roster(self, **identities: bytes) -> Roster:
        """Signs a newer roster, in which some members have another identity, and keeps it."""
        changed = {name: public.hex() for name, public in identities.items()}
        self.version += 1
        self.members = tuple(
            replace(one, identity=changed.get(one.name.replace("-", "_"), one.identity))
            for one in self.members
        )
        roster = Roster("heart", self.version, self.members)
        (self.folder / "roster.json").write_bytes(sign_roster(roster, self.authority))
        return roster


@pytest.fixture
def site_kit(tmp_path: Path) -> SiteKit:
    """The kit of st-mary, one of three sites, with her keys and an answer in it."""
    authority = ec.generate_private_key(ec.SECP256R1())
    made = SiteKit(tmp_path / "kit", Identity(bytes(31) + b"c"), authority)
    made.folder.mkdir()
    now = datetime.now(UTC)
    ca = make_authority("heart", authority, 365, now)
    pem = serialization.Encoding.PEM
    made.write("ca.pem", ca.public_bytes(pem).decode())
    control = new_key()
    own = issue_member(ca, authority, control.public_key(), ("st-mary", "site"), 365, now)
    prints = {name: f"{place:02x}" * 32 for place, name in enumerate(("a-site", "b-site"))}
    prints["st-mary"] = own.fingerprint(hashes.SHA256()).hex()
    others = {name: Identity(name.encode().ljust(32)) for name in ("a-site", "b-site")}
    made.members = (
        *(Member(n, "site", prints[n], one.public.hex(), "") for n, one in others.items()),
        Member("operator", "operator", "ee" * 32),
        Member("st-mary", "site", prints["st-mary"], made.identity.public.hex(), ""),
    )
    made.write(
        "kit.toml",
        'federation = "heart"\nrole = "site"\nname = "st-mary"\nserver = "localhost"\n'
        f'fleet_port = 1\ncontrol_port = 2\ncoordinator = "{made.coordinator.public.hex()}"\n',
    )
    made.roster()
    roster = json.loads((made.folder / "roster.json").read_text(encoding="utf-8"))
    answer = {"certificate": own.public_bytes(pem).decode(), "roster": roster}
    made.write("answer.json", json.dumps(answer))
    made.write("keys/identity.key", f"{bytes(range(32)).hex()}\n")
    made.write("keys/control.key", private_pem(control).decode())
    made.write("keys/vault.key", f"{(b'v' * 32).hex()}\n")
    made.write("keys/split.key", f"{(b's' * 32).hex()}\n")
    made.write("records.csv", "".join(f"{n},{n % 2}\n" for n in range(40)))
    made.site_toml()
    return made


@pytest.fixture
def make_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes the folder of a kit that holds `kit.toml` only, with which one may go up all the same.

    What makes a kit whole is `open_kit`'s, and has tests of its own.
    """
    for module in ("client", "server"):
        monkeypatch.setattr(f"fedveil.{module}.up.open_kit", Kit.read)

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
