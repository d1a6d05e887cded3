"""A kit opens only if all in it is its party's, holds now, and nobody else can read its keys."""

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedveil.config import ConfigError, FedveilError
from fedveil.deployment.certificates import new_key, private_pem, read_certificate
from fedveil.deployment.keygen import keygen
from fedveil.deployment.keys import KEYS_OF, read_control
from fedveil.deployment.kit import Kit, KitRole, open_kit
from fedveil.deployment.provision import create, revoke, rotate
from fedveil.deployment.roster import Roster, read_roster, sign_roster


@pytest.fixture
def north(homes: Path) -> Path:
    """The kit of the site north, at the site."""
    return homes / "north"


@pytest.fixture
def authority_key(kits: Path) -> ec.EllipticCurvePrivateKey:
    """What signs rosters."""
    return read_control(kits / "authority" / "ca.key")


@pytest.fixture
def stranger(federation_file: Path, tmp_path: Path) -> Path:
    """The kits of another federation that bears the same name."""
    return create(federation_file, tmp_path / "stranger")


def refused(folder: Path, said: str, role: KitRole = "site", now: datetime | None = None) -> None:
    with pytest.raises(ConfigError) as caught:
        open_kit(folder, role, now)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def edit_answer(kit: Path, **changes: Any) -> None:  # noqa: ANN401
    raw = json.loads((kit / "answer.json").read_bytes())
    (kit / "answer.json").write_text(json.dumps(raw | changes), encoding="utf-8")


class TestWhole:
    def test_a_site_s(self, north: Path) -> None:
        kit = open_kit(north, "site")
        assert (kit.name, kit.about.federation) == ("north", "heart")
        assert kit.control == "fedveil.example.org:9444"
        assert kit.certificate().startswith(b"-----BEGIN CERTIFICATE-----")
        assert kit.private_key() == (north / "keys" / "control.key").read_bytes()

    @pytest.mark.parametrize(
        ("folder", "role", "key"),
        [
            ("server", "server", "server.key"),
            ("operators/boss", "operator", "control.key"),
            ("auditors/judge", "auditor", "control.key"),
        ],
    )
    def test_the_others(self, kits: Path, folder: str, role: KitRole, key: str) -> None:
        kit = open_kit(kits / folder, role)
        assert kit.private_key() == (kits / folder / "keys" / key).read_bytes()
        assert kit.certificate() == (kits / folder / "certificate.pem").read_bytes()

    def test_an_address_of_ipv6(self, north: Path) -> None:
        kit = Kit.read(north, "site")
        about = kit.about.model_copy(update={"server": "::1"})
        assert replace(kit, about=about).fleet == "[::1]:9443"


class TestWrongKit:
    def test_of_another_role(self, kits: Path, north: Path) -> None:
        refused(kits / "server", "is the kit of server server; give one of a site")
        refused(north, "is the kit of site north; give one of an operator", "operator")

    def test_none(self, tmp_path: Path) -> None:
        refused(tmp_path, "is no kit; give the folder that holds kit.toml")

    @pytest.mark.parametrize(
        ("old", "new", "said"),
        [
            ('role = "site"', 'role = "sit"', 'did you mean "site"?'),
            ("fleet_port", "fleetport", 'fleetport: unknown key; did you mean "fleet_port"?'),
            ("federation =", "federation", "is not TOML"),
            ('name = "north"', 'name = "no/rth"', 'name = "no/rth": must match'),
        ],
    )
    def test_a_broken_description(self, north: Path, old: str, new: str, said: str) -> None:
        text = (north / "kit.toml").read_text(encoding="utf-8")
        assert old in text
        (north / "kit.toml").write_text(text.replace(old, new), encoding="utf-8")
        refused(north, said)
        refused(north, "kit.toml: ")

    def test_of_a_federation_of_another_name(self, north: Path) -> None:
        text = (north / "kit.toml").read_text(encoding="utf-8").replace('"heart"', '"lung"')
        (north / "kit.toml").write_text(text, encoding="utf-8")
        refused(north, "ca.pem: is of another federation than lung")


class TestKeys:
    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o620])
    @pytest.mark.parametrize("name", KEYS_OF["site"])
    def test_open_to_others(self, north: Path, name: str, mode: int) -> None:
        path = north / "keys" / name
        path.chmod(mode)
        refused(north, f"{path}: is open to others (mode {mode:o}); `chmod 600 {path}`")

    @pytest.mark.parametrize("name", KEYS_OF["server"])
    def test_the_server_s_open_to_others(self, kits: Path, name: str) -> None:
        (kits / "server" / "keys" / name).chmod(0o640)
        refused(kits / "server", f"{name}: is open to others (mode 640)", "server")

    def test_the_folder_open_to_others(self, north: Path) -> None:
        (north / "keys").chmod(0o750)
        refused(north, "keys: is open to others (mode 750); `chmod 700")

    @pytest.mark.parametrize("name", KEYS_OF["site"])
    def test_missing(self, north: Path, name: str) -> None:
        (north / "keys" / name).unlink()
        refused(north, f"{name}: is missing; make a site's keys by `fedveil site keygen")

    def test_before_keygen(self, kits: Path) -> None:
        refused(kits / "sites" / "north", "identity.key: is missing; make a site's keys by")

    def test_a_folder_in_place_of_one(self, north: Path) -> None:
        (north / "keys" / "vault.key").unlink()
        (north / "keys" / "vault.key").mkdir()
        refused(north, "vault.key: cannot be read")

    @pytest.mark.parametrize("name", KEYS_OF["site"])
    @pytest.mark.parametrize("content", [b"", b"00" * 31, b"\xff\xfe", b"zz" * 32])
    def test_damaged(self, north: Path, name: str, content: bytes) -> None:
        (north / "keys" / name).write_bytes(content)
        refused(north, "put a whole copy back")

    @pytest.mark.parametrize("name", ["identity.key", "node.key", "control.key"])
    def test_another_site_s_key(self, homes: Path, north: Path, name: str) -> None:
        shutil.copy2(homes / "south" / "keys" / name, north / "keys" / name)
        refused(north, f"{name}: is not the key ")

    def test_another_site_s_keys_all(self, homes: Path, north: Path) -> None:
        shutil.rmtree(north / "keys")
        shutil.copytree(homes / "south" / "keys", north / "keys")
        refused(north, "control.key: is not the key of answer.json")

    def test_another_site_s_keys_and_answer(self, homes: Path, north: Path) -> None:
        shutil.rmtree(north / "keys")
        shutil.copytree(homes / "south" / "keys", north / "keys")
        shutil.copy2(homes / "south" / "answer.json", north / "answer.json")
        refused(north, "is the certificate of site south, and the kit is of site north")

    def test_another_server_s_coordinator(self, kits: Path, stranger: Path) -> None:
        names = "server/keys/coordinator.key"
        shutil.copy2(stranger / names, kits / names)
        refused(kits / "server", "coordinator.key: is not the key that all kits have", "server")


class TestCertificates:
    @pytest.mark.parametrize(
        ("folder", "role", "file"),
        [
            ("kits/server", "server", "certificate.pem"),
            ("kits/operators/boss", "operator", "certificate.pem"),
            ("homes/north", "site", "answer.json"),
        ],
    )
    @pytest.mark.usefixtures("kits", "homes")
    def test_expired(self, tmp_path: Path, folder: str, role: KitRole, file: str) -> None:
        now = datetime.now(UTC)
        open_kit(tmp_path / folder, role, now + timedelta(days=824))
        later, earlier = now + timedelta(days=826), now - timedelta(days=1)
        refused(tmp_path / folder, f"{file}: expired at ", role, later)
        refused(tmp_path / folder, "fedveil provision rotate", role, later)
        refused(tmp_path / folder, "ca.pem: is not yet valid", role, earlier)

    def test_expired_authority(self, north: Path) -> None:
        later = datetime.now(UTC) + timedelta(days=3651)
        refused(north, "ca.pem: expired at ", "site", later)

    def test_of_another_authority(self, kits: Path, stranger: Path) -> None:
        """It has the same name, and its certificate is for the same one."""
        for file in ("certificate.pem", "keys/control.key"):
            shutil.copy2(stranger / "operators/boss" / file, kits / "operators/boss" / file)
        refused(kits / "operators/boss", "is not signed by the federation's authority", "operator")

    def test_wrong_authority(self, kits: Path, stranger: Path, north: Path) -> None:
        shutil.copy2(stranger / "authority" / "ca.pem", north / "ca.pem")
        refused(north, "answer.json: is not signed by the federation's authority")
        shutil.copy2(kits / "operators/boss/certificate.pem", north / "ca.pem")
        refused(north, "ca.pem: is no authority's certificate")
        (north / "ca.pem").write_bytes(b"")
        refused(north, "ca.pem: holds not one certificate")
        (north / "ca.pem").unlink()
        refused(north, "ca.pem: cannot be read")

    def test_of_another_member(self, kits: Path) -> None:
        for file in ("certificate.pem", "keys/control.key"):
            shutil.copy2(kits / "auditors/judge" / file, kits / "operators/boss" / file)
        refused(kits / "operators/boss", "is the certificate of auditor judge", "operator")

    def test_missing(self, kits: Path) -> None:
        (kits / "operators/boss/certificate.pem").unlink()
        refused(kits / "operators/boss", "certificate.pem: cannot be read", "operator")

    def test_a_key_that_is_not_its_own(self, kits: Path) -> None:
        (kits / "operators/boss/keys/control.key").write_bytes(private_pem(new_key()))
        refused(
            kits / "operators/boss", "control.key: is not the key of certificate.pem", "operator"
        )


class TestAnswers:
    def test_none_yet(self, north: Path) -> None:
        (north / "answer.json").unlink()
        refused(north, "answer.json: cannot be read (No such file or directory); send request.json")

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "{}", '{"certificate": ""}', "[" * 100_000, "\0"]
    )
    def test_what_is_no_answer(self, north: Path, text: str) -> None:
        (north / "answer.json").write_text(text, encoding="utf-8")
        refused(north, "answer.json: is no answer of an authority")

    @pytest.mark.parametrize("value", [None, 1, "", {}, "\ud800"])
    def test_without_a_certificate(self, north: Path, value: object) -> None:
        edit_answer(north, certificate=value)
        refused(north, "answer.json: ")

    @pytest.mark.parametrize("value", [None, 1, "", {}, {"roster": 1, "signature": "00"}])
    def test_without_a_roster(self, north: Path, value: object) -> None:
        edit_answer(north, roster=value)
        refused(north, "answer.json: roster: is ")

    def test_with_a_roster_of_another_authority(self, north: Path, stranger: Path) -> None:
        roster = json.loads((stranger / "authority" / "roster.json").read_bytes())
        edit_answer(north, roster=roster)
        refused(north, "roster: is not signed by the federation's authority")

    def test_of_an_earlier_request(self, kits: Path, north: Path) -> None:
        keygen(north, rotate=True)
        refused(north, "control.key: is not the key of answer.json")
        answer = rotate(kits, "north", north / "request.json")
        shutil.copy2(answer, north / "answer.json")
        assert open_kit(north, "site").read_roster().version > 5

    def test_a_renewal_that_is_not_there_yet(self, kits: Path, north: Path) -> None:
        answer = rotate(kits, "north", north / "request.json")
        Kit.read(north, "site").keep_roster((kits / "authority" / "roster.json").read_bytes())
        refused(north, "put the authority's newest answer there")
        shutil.copy2(answer, north / "answer.json")
        open_kit(north, "site")


class TestRosters:
    def signed(
        self,
        kit: Kit,
        key: ec.EllipticCurvePrivateKey,
        **changes: Any,  # noqa: ANN401
    ) -> bytes:
        return sign_roster(replace(kit.read_roster(), **changes), key)

    def test_the_newest_of_both_files(
        self, north: Path, authority_key: ec.EllipticCurvePrivateKey
    ) -> None:
        kit = Kit.read(north, "site")
        first = kit.read_roster()
        (north / "roster.json").write_bytes(self.signed(kit, authority_key, version=1))
        assert kit.read_roster() == first
        (north / "roster.json").write_bytes(self.signed(kit, authority_key, version=99))
        assert kit.read_roster().version == 99

    def test_two_of_one_version_that_differ_are_refused(
        self, north: Path, authority_key: ec.EllipticCurvePrivateKey
    ) -> None:
        """As an authority signs that was put back to an older copy of itself."""
        kit = Kit.read(north, "site")
        members = kit.read_roster().members[:-1]
        (north / "roster.json").write_bytes(self.signed(kit, authority_key, members=members))
        with pytest.raises(ConfigError, match="has other members than"):
            kit.read_roster()

    def test_a_newer_one_is_kept(self, kits: Path, north: Path) -> None:
        kit = open_kit(north, "site")
        roster = revoke(kits, "west")
        assert kit.keep_roster((kits / "server" / "roster.json").read_bytes()) == roster
        assert kit.read_roster() == roster
        assert [site.name for site in roster.sites] == ["north", "south"]

    def test_the_same_again_changes_nothing(self, kits: Path, north: Path) -> None:
        kit = open_kit(north, "site")
        revoke(kits, "west")
        data = (kits / "server" / "roster.json").read_bytes()
        first = kit.keep_roster(data)
        before = (north / "roster.json").stat()
        assert kit.keep_roster(data) == first
        assert (north / "roster.json").stat().st_ino == before.st_ino

    def test_an_older_one_is_refused(self, kits: Path, north: Path) -> None:
        kit = open_kit(north, "site")
        older = (kits / "server" / "roster.json").read_bytes()
        revoke(kits, "west")
        newer = (kits / "server" / "roster.json").read_bytes()
        kit.keep_roster(newer)
        with pytest.raises(ConfigError, match=r"version \d+ is not above \d+, which this kit has"):
            kit.keep_roster(older)
        assert (north / "roster.json").read_bytes() == newer

    def test_older_than_the_answer_s_is_refused(
        self, north: Path, authority_key: ec.EllipticCurvePrivateKey
    ) -> None:
        kit = open_kit(north, "site")
        with pytest.raises(ConfigError, match="is not above"):
            kit.keep_roster(self.signed(kit, authority_key, version=1))
        assert not (north / "roster.json").exists()

    def test_another_one_of_the_same_version_is_refused(
        self, north: Path, authority_key: ec.EllipticCurvePrivateKey
    ) -> None:
        kit = open_kit(north, "site")
        with pytest.raises(ConfigError, match="is not above"):
            kit.keep_roster(self.signed(kit, authority_key, members=()))

    def test_of_another_authority(self, north: Path, stranger: Path) -> None:
        kit = open_kit(north, "site")
        key = read_control(stranger / "authority" / "ca.key")
        with pytest.raises(ConfigError, match="is not signed by the federation's authority"):
            kit.keep_roster(self.signed(kit, key, version=99))
        assert not (north / "roster.json").exists()

    def test_of_another_federation_of_the_same_authority(
        self, north: Path, authority_key: ec.EllipticCurvePrivateKey
    ) -> None:
        kit = open_kit(north, "site")
        with pytest.raises(ConfigError, match="is the roster of another federation"):
            kit.keep_roster(self.signed(kit, authority_key, federation="lung", version=99))

    @pytest.mark.parametrize("data", [b"", b"{}", b"null", b"\xff", b"[" * 100_000])
    def test_none(self, north: Path, data: bytes) -> None:
        with pytest.raises(ConfigError, match="roster: is none; fetch it again"):
            open_kit(north, "site").keep_roster(data)

    @pytest.mark.parametrize("field", ["name", "role", "certificate", "identity", "node"])
    def test_changed(self, kits: Path, north: Path, field: str) -> None:
        raw = json.loads((kits / "server" / "roster.json").read_bytes())
        raw["roster"]["members"][1][field] = "00"
        with pytest.raises(ConfigError, match="is not signed by the federation's authority"):
            open_kit(north, "site").keep_roster(json.dumps(raw).encode())

    def test_a_disk_that_refuses(
        self, kits: Path, north: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        revoke(kits, "west")
        kit = open_kit(north, "site")
        monkeypatch.setattr("fedveil.deployment.kit.replace_file", full)
        with pytest.raises(FedveilError, match=r"roster.json: cannot be written") as caught:
            kit.keep_roster((kits / "server" / "roster.json").read_bytes())
        assert not isinstance(caught.value, ConfigError)

    def test_a_kit_without_one(self, kits: Path) -> None:
        with pytest.raises(ConfigError, match=r"roster.json: is missing"):
            open_kit(kits / "operators" / "boss", "operator").read_roster()
        (kits / "server" / "roster.json").unlink()
        refused(kits / "server", "roster.json: is missing", "server")

    def test_the_server_s_is_the_authority_s(self, kits: Path) -> None:
        ca = read_certificate(kits / "authority" / "ca.pem")
        roster: Roster = read_roster((kits / "authority" / "roster.json").read_bytes(), ca)
        assert open_kit(kits / "server", "server").read_roster() == roster
