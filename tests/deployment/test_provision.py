"""What an authority does: kits, answers, and that no member's change touches another's kit."""

import json
import os
import shutil
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from fedveil import files as files_module
from fedveil.config import ConfigError, FedveilError, read_site, read_toml
from fedveil.deployment.certificates import fingerprint, parse_certificate, read_certificate
from fedveil.deployment.keygen import keygen, request_fingerprint
from fedveil.deployment.keys import read_control, read_hex, read_node
from fedveil.deployment.kit import Kit, KitRole, open_kit
from fedveil.deployment.provision import add, create, revoke, rotate, sign
from fedveil.deployment.roster import ROLES, Role, Roster, read_roster
from fedveil.privacy.secagg.keys import Identity

Files = dict[str, tuple[bytes, int, int]]


def roster_of(kits: Path) -> Roster:
    """The authority's roster; the server's kit has the same."""
    data = (kits / "authority" / "roster.json").read_bytes()
    assert (kits / "server" / "roster.json").read_bytes() == data
    return read_roster(data, read_certificate(kits / "authority" / "ca.pem"))


def snapshot(folder: Path) -> Files:
    """Every file below a folder: content, mode, time of its last change."""
    return {
        str(path.relative_to(folder)): (
            path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }  # fmt: skip


def names(kits: Path) -> list[str]:
    return [member.name for member in roster_of(kits).members]


def one_line(error: pytest.ExceptionInfo[ConfigError], said: str) -> None:
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def fresh(federation_file: Path, tmp_path: Path) -> Path:
    """Kits as they are made: no site has keys."""
    return create(federation_file, tmp_path / "fresh")


class TestCreate:
    def test_what_is_there(self, fresh: Path) -> None:
        site = {"kit.toml", "ca.pem", "README.md", "site.toml", "fedveil-site.service"}
        caller = {"kit.toml", "ca.pem", "certificate.pem", "keys/control.key", "README.md"}
        expected = {
            *("authority/" + name for name in (
                "ca.key", "ca.pem", "federation.toml", "members.toml", "roster.json",
                "coordinator.pub", "certificates/boss.pem", "certificates/judge.pem",
            )),
            *("server/" + name for name in (
                "kit.toml", "ca.pem", "certificate.pem", "roster.json", "README.md",
                "fedveil-server.service", "keys/server.key", "keys/coordinator.key",
                "keys/link.key",
            )),
            *(f"sites/{name}/{file}" for name in ("north", "south", "west") for file in site),
            *(f"operators/boss/{file}" for file in caller),
            *(f"auditors/judge/{file}" for file in caller),
        }  # fmt: skip
        assert set(snapshot(fresh)) == expected

    def test_nobody_else_can_read_what_is_secret(
        self, federation_file: Path, tmp_path: Path
    ) -> None:
        old = os.umask(0)
        try:
            kits = create(federation_file, tmp_path / "kits")
        finally:
            os.umask(old)
        secret = [*kits.glob("**/keys/*"), kits / "authority" / "ca.key"]
        assert len(secret) == 6
        for path in secret:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(kits.stat().st_mode) == 0o700

    def test_who_is_in_the_roster(self, fresh: Path) -> None:
        roster = roster_of(fresh)
        assert [(one.name, one.role) for one in roster.members] == [
            ("boss", "operator"), ("judge", "auditor"),
        ]  # fmt: skip
        found = read_certificate(fresh / "operators" / "boss" / "certificate.pem")
        holder = roster.holder(fingerprint(found))
        assert holder is not None
        assert holder.name == "boss"

    def test_the_kits_open(self, fresh: Path) -> None:
        server = open_kit(fresh / "server", "server")
        open_kit(fresh / "operators" / "boss", "operator")
        open_kit(fresh / "auditors" / "judge", "auditor")
        key = read_hex(server.keys / "coordinator.key", 64)
        for folder in (fresh / "sites").iterdir():
            site = Kit.read(folder, "site")
            assert site.about.coordinator == Identity(key[:32]).public.hex()
            assert site.fleet == "fedveil.example.org:9443"
        read_hex(server.keys / "link.key", 32)

    @pytest.mark.parametrize("name", ["north", "south", "west"])
    def test_a_site_s_own_file_can_be_read(self, fresh: Path, name: str) -> None:
        folder = fresh / "sites" / name
        found = read_site(folder / "site.toml")
        assert found.site.name == name
        assert found.site.ledger == str(folder / "state" / "ledger.sqlite")
        assert found.site.keys == str(folder / "keys")
        assert found.columns == {}
        assert found.policy.coordinator == Kit.read(folder, "site").about.coordinator
        assert (found.policy.min_sites, found.policy.approval) == (3, "automatic")
        assert found.policy.epsilon_lifetime == 10
        assert found.policy.delta_lifetime == 1e-5

    def test_the_example_in_it_can_be_taken(self, fresh: Path) -> None:
        path = fresh / "sites" / "north" / "site.toml"
        text = path.read_text(encoding="utf-8")
        for line in ("[map]", "age =", "systolic =", "epsilon_per_run ="):
            assert f"\n# {line}" in text
            text = text.replace(f"# {line}", line)
        path.write_text(text, encoding="utf-8")
        found = read_site(path)
        assert found.columns == {"age": "alter", "systolic": "bp_sys"}
        assert found.policy.epsilon_per_run == 4

    @pytest.mark.parametrize(("folder", "role"), [("sites/north", "site"), ("server", "server")])
    def test_the_units_are_hardened(self, fresh: Path, folder: str, role: str) -> None:
        text = (fresh / folder / f"fedveil-{role}.service").read_text(encoding="utf-8")
        lines = text.splitlines()
        for line in (
            "NoNewPrivileges=yes", "ProtectSystem=strict", "PrivateTmp=yes", "Restart=always",
            "ReadWritePaths=/srv/fedveil/kit", "CapabilityBoundingSet=",
            f"ExecStart=/opt/fedveil/bin/fedveil {role} up /srv/fedveil/kit",
        ):  # fmt: skip
            assert line in lines
        assert "$" not in text

    def test_the_readmes_say_each_step(self, fresh: Path) -> None:
        text = (fresh / "sites" / "north" / "README.md").read_text(encoding="utf-8")
        steps = (
            "site keygen KIT", "request.json", "answer.json", "site.toml", "site check KIT",
            "site up KIT",
        )  # fmt: skip
        places = [text.index(step) for step in steps]
        assert places == sorted(places)
        for path in fresh.glob("**/README.md"):
            assert "$" not in path.read_text(encoding="utf-8")

    def test_a_folder_that_is_taken(self, federation_file: Path, tmp_path: Path) -> None:
        taken = tmp_path / "taken"
        taken.mkdir()
        (taken / "mine").write_text("", encoding="utf-8")
        for out in (taken, taken / "mine"):
            with pytest.raises(ConfigError) as caught:
                create(federation_file, out)
            one_line(caught, f"{out}: is not empty; give a folder that is not there yet")
        assert [path.name for path in taken.iterdir()] == ["mine"]

    def test_an_empty_folder_is_filled(self, federation_file: Path, tmp_path: Path) -> None:
        (tmp_path / "kits").mkdir()
        open_kit(create(federation_file, tmp_path / "kits") / "server", "server")

    def test_a_broken_file_leaves_nothing(self, federation_file: Path, tmp_path: Path) -> None:
        text = federation_file.read_text(encoding="utf-8")
        federation_file.write_text(text.replace("operators", "operator"), encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            create(federation_file, tmp_path / "kits")
        one_line(caught, 'members.operator: unknown key; did you mean "operators"?')
        assert list(tmp_path.iterdir()) == [federation_file]

    @pytest.mark.parametrize("files", range(0, 34, 3))
    def test_a_full_disk_leaves_nothing(
        self,
        federation_file: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        files: int,
    ) -> None:
        written = 0

        def full(*arguments: Any, **options: Any) -> None:  # noqa: ANN401
            nonlocal written
            written += 1
            if written > files:
                raise OSError(28, "No space left on device")
            real(*arguments, **options)

        real = files_module.replace_file
        for module in ("provision", "authority"):
            monkeypatch.setattr(f"fedveil.deployment.{module}.replace_file", full)
        with pytest.raises(ConfigError) as caught:
            create(federation_file, tmp_path / "kits")
        one_line(caught, "cannot be written (No space left on device)")
        assert list(tmp_path.iterdir()) == [federation_file]


def secrets_of(keys: Path) -> list[bytes]:
    """A site's secrets in every form that they could stand in a file."""
    found = [read_hex(keys / name, 32) for name in ("identity.key", "vault.key", "split.key")]
    private = [read_control(keys / "control.key"), read_node(keys / "node.key")]
    for key in private:
        size = (key.curve.key_size + 7) // 8
        found.append(key.private_numbers().private_value.to_bytes(size, "big"))
    forms = [
        form for raw in found for form in (raw, raw.hex().encode(), raw.hex().upper().encode())
    ]
    for key in private:
        for layout in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL):
            pem = key.private_bytes(Encoding.PEM, layout, NoEncryption()).splitlines()
            forms += [line for line in pem if not line.startswith(b"-") and len(line) == 64]
    # A line of OpenSSH's form may be of its public half alone: one in the midst of it is not.
    return [*forms, (keys / "node.key").read_bytes().splitlines()[8]]


class TestSign:
    def test_no_private_key_of_a_site_is_outside_its_kit(
        self, kits: Path, homes: Path, tmp_path: Path
    ) -> None:
        homes_of = {folder.name: folder for folder in homes.iterdir()}
        for name, home in homes_of.items():
            hidden = secrets_of(home / "keys")
            assert any(form in (home / "keys" / "identity.key").read_bytes() for form in hidden)
            assert any(form in (home / "keys" / "control.key").read_bytes() for form in hidden)
            others = [path for path in tmp_path.rglob("*") if path.is_file()]
            others = [path for path in others if path.parent != home / "keys"]
            assert len([path for path in others if path.is_relative_to(kits)]) > 30
            for path in others:
                content = path.read_bytes()
                assert not any(form in content for form in hidden), (name, path)

    def test_the_roster_has_its_public_halves(self, kits: Path, homes: Path) -> None:
        assert names(kits) == ["boss", "judge", "north", "south", "west"]
        site = roster_of(kits).sites[0]
        keys = homes / "north" / "keys"
        answer = json.loads((homes / "north" / "answer.json").read_bytes())
        certificate = parse_certificate(answer["certificate"].encode(), keys)
        assert bytes.fromhex(site.identity) == Identity(read_hex(keys / "identity.key", 32)).public
        assert site.certificate == fingerprint(certificate)
        assert certificate.public_key() == read_control(keys / "control.key").public_key()

    def test_the_answer_opens_the_kit(self, fresh: Path) -> None:
        for name in ("west", "north", "south"):
            answer = sign(fresh, keygen(fresh / "sites" / name))
            assert answer == fresh / "answers" / f"{name}.json"
            shutil.copy2(answer, fresh / "sites" / name / "answer.json")
        for name in ("west", "north", "south"):
            open_kit(fresh / "sites" / name, "site")
        assert [site.name for site in roster_of(fresh).sites] == ["north", "south", "west"]

    def test_the_same_request_again(self, kits: Path, homes: Path, tmp_path: Path) -> None:
        before = roster_of(kits)
        (kits / "server" / "roster.json").write_bytes(b"an older one")  # as after a crash
        out = sign(kits, homes / "north" / "request.json", tmp_path / "sub" / "again.json")
        assert roster_of(kits) == before
        again, first = (
            json.loads(path.read_bytes()) for path in (out, homes / "north" / "answer.json")
        )
        assert again["certificate"] == first["certificate"]
        assert again["roster"]["roster"]["version"] == before.version

    def test_with_other_keys(self, kits: Path, homes: Path) -> None:
        request = keygen(homes / "north", rotate=True)
        before = snapshot(kits)
        with pytest.raises(ConfigError) as caught:
            sign(kits, request)
        one_line(caught, "north is in the roster with other keys; if these are to replace them")
        assert snapshot(kits) == before

    def test_a_request_of_another_federation(
        self, kits: Path, federation_file: Path, tmp_path: Path
    ) -> None:
        text = federation_file.read_text(encoding="utf-8").replace('"heart"', '"lung"')
        federation_file.write_text(text, encoding="utf-8")
        other = create(federation_file, tmp_path / "other")
        before = snapshot(kits)
        with pytest.raises(ConfigError) as caught:
            sign(kits, keygen(other / "sites" / "north"))
        one_line(caught, "is for the federation lung, and this is heart")
        assert snapshot(kits) == before

    def test_a_site_that_nobody_declared(
        self, kits: Path, federation_file: Path, tmp_path: Path
    ) -> None:
        text = federation_file.read_text(encoding="utf-8").replace('"north"', '"east"')
        federation_file.write_text(text, encoding="utf-8")
        other = create(federation_file, tmp_path / "other")
        with pytest.raises(ConfigError) as caught:
            sign(kits, keygen(other / "sites" / "east"))
        one_line(caught, "east is no site of this federation; they are north, south, west")

    def test_an_operator_s_name(self, kits: Path, homes: Path) -> None:
        text = (homes / "north" / "kit.toml").read_text(encoding="utf-8")
        (homes / "north" / "kit.toml").write_text(
            text.replace('"north"', '"boss"'), encoding="utf-8"
        )
        with pytest.raises(ConfigError) as caught:
            sign(kits, keygen(homes / "north", rotate=True))
        one_line(caught, "boss is no site of this federation")

    @pytest.mark.parametrize("field", ["name", "federation", "identity", "node", "csr"])
    def test_a_request_that_was_changed(self, fresh: Path, field: str) -> None:
        other = json.loads(keygen(fresh / "sites" / "south").read_bytes())
        path = keygen(fresh / "sites" / "north")
        raw = json.loads(path.read_bytes())
        raw[field] = "lung" if field == "federation" else other[field]
        path.write_text(json.dumps(raw), encoding="utf-8")
        before = snapshot(fresh)
        with pytest.raises(ConfigError) as caught:
            sign(fresh, path)
        one_line(caught, "is not signed by the keys in it; somebody changed it")
        assert snapshot(fresh) == before

    @pytest.mark.parametrize("name", ["identity.key", "node.key", "control.key"])
    def test_a_key_of_another_site(
        self, kits: Path, homes: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """A copied kit: two sites with one identity would count twice in a secure sum."""
        make = "fedveil.deployment.keygen.make_keys"

        def copied(folder: Path, wanted: tuple[str, ...]) -> None:
            real(folder, tuple(one for one in wanted if one != name))
            shutil.copy2(homes / "south" / "keys" / name, folder / name)

        from fedveil.deployment.keys import make_keys as real

        monkeypatch.setattr(make, copied)
        request = keygen(homes / "north", rotate=True)
        before = snapshot(kits)
        with pytest.raises(ConfigError) as caught:
            rotate(kits, "north", request)
        one_line(caught, "has a key of south; each site makes its own")
        assert snapshot(kits) == before

    def test_the_fingerprint_that_the_site_read_out(self, fresh: Path) -> None:
        request = keygen(fresh / "sites" / "north")
        shown = request_fingerprint(request)
        with pytest.raises(ConfigError) as caught:
            sign(fresh, request, expect="0000-0000-0000-0000-0000")
        one_line(caught, f"has the fingerprint {shown}, and 0000-0000-0000-0000-0000 is expected")
        assert names(fresh) == ["boss", "judge"]
        sign(fresh, request, expect=f" {shown.upper()} ")
        assert names(fresh) == ["boss", "judge", "north"]

    def test_an_expired_certificate_is_not_handed_out_again(self, kits: Path, homes: Path) -> None:
        later = datetime.now(UTC) + timedelta(days=826)
        request = homes / "north" / "request.json"
        with pytest.raises(ConfigError) as caught:
            sign(kits, request, now=later)
        one_line(caught, "north.pem: expired at ")
        answer = rotate(kits, "north", request, now=later)
        shutil.copy2(answer, homes / "north" / "answer.json")
        open_kit(homes / "north", "site", later)

    def test_two_at_once_both_come_in(self, fresh: Path) -> None:
        requests = [keygen(fresh / "sites" / name) for name in ("north", "south", "west")]
        threads = [threading.Thread(target=sign, args=(fresh, request)) for request in requests]
        version = roster_of(fresh).version
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert [site.name for site in roster_of(fresh).sites] == ["north", "south", "west"]
        assert roster_of(fresh).version == version + 3


class TestChanges:
    """Adding, rotating and revoking: who else notices."""

    def test_no_other_site_s_kit_changes(self, kits: Path, homes: Path) -> None:
        south, west = snapshot(homes / "south"), snapshot(homes / "west")
        given = snapshot(kits / "sites")
        server = snapshot(kits / "server")
        sign(kits, keygen(add(kits, "east", "site")))
        request = keygen(homes / "north", rotate=True)
        rotate(kits, "north", request)
        revoke(kits, "north")
        assert (snapshot(homes / "south"), snapshot(homes / "west")) == (south, west)
        after = snapshot(kits / "sites")
        assert {name: after[name] for name in given} == given
        assert {name.partition("/")[0] for name in after.keys() - given.keys()} == {"east"}
        changed = snapshot(kits / "server")
        assert {name for name in server if server[name] != changed[name]} == {"roster.json"}
        assert names(kits) == ["boss", "east", "judge", "south", "west"]

    def test_the_version_grows_with_each(self, kits: Path, homes: Path) -> None:
        versions = [roster_of(kits).version]
        for change in (
            lambda: sign(kits, keygen(add(kits, "east", "site"))),
            lambda: rotate(kits, "north", keygen(homes / "north", rotate=True)),
            lambda: add(kits, "chief", "operator"),
            lambda: rotate(kits, "chief"),
            lambda: revoke(kits, "east"),
        ):
            change()
            versions.append(roster_of(kits).version)
        assert versions == list(range(versions[0], versions[0] + 6))

    def test_a_member_without_the_server_s_kit_at_hand(self, kits: Path, homes: Path) -> None:
        shutil.rmtree(kits / "server")
        rotate(kits, "north", keygen(homes / "north", rotate=True))
        assert not (kits / "server").exists()
        with pytest.raises(ConfigError) as caught:
            rotate(kits, "server")
        one_line(caught, "server: is no kit")


class TestAdd:
    @pytest.mark.parametrize("role", ["operator", "auditor"])
    def test_a_caller_is_a_member_at_once(self, kits: Path, role: Role) -> None:
        kit = add(kits, "chief", role)
        assert kit == kits / f"{role}s" / "chief"
        certificate = parse_certificate(open_kit(kit, role).certificate(), kit)
        holder = roster_of(kits).holder(fingerprint(certificate))
        assert holder is not None
        assert (holder.name, holder.role) == ("chief", role)

    def test_a_site_is_one_once_it_is_signed_for(self, kits: Path) -> None:
        kit = add(kits, "east", "site")
        assert "east" not in names(kits)
        assert not (kit / "keys").exists()
        answer = sign(kits, keygen(kit), kit / "answer.json")
        assert answer == kit / "answer.json"
        open_kit(kit, "site")
        assert read_toml(kits / "authority" / "members.toml")["sites"][-1] == "east"

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("north", "is a site of this federation"),
            ("boss", "is an operator of this federation"),
            ("North", "stands twice"),
            ("server", "is the server's own"),
            ("a/b", "must match"),
            ("..", "must match"),
            ("", "must match"),
            ("x" * 65, "must match"),
            ("a\n", "must match"),
        ],
    )
    @pytest.mark.parametrize("role", ROLES)
    def test_names(self, kits: Path, name: str, said: str, role: Role) -> None:
        before = snapshot(kits)
        with pytest.raises(ConfigError) as caught:
            add(kits, name, role)
        assert said in str(caught.value)
        assert snapshot(kits) == before

    def test_roles(self, kits: Path) -> None:
        with pytest.raises(ConfigError, match='role = "server": must be one of'):
            add(kits, "x", "server")  # type: ignore[arg-type]

    def test_one_whose_kit_a_crash_left_out(self, kits: Path) -> None:
        shutil.rmtree(add(kits, "east", "site"))
        Kit.read(add(kits, "east", "site"), "site")
        assert read_toml(kits / "authority" / "members.toml")["sites"].count("east") == 1


class TestRotate:
    def test_a_site(self, kits: Path, homes: Path) -> None:
        old = next(site for site in roster_of(kits).sites if site.name == "north")
        answer = rotate(kits, "north", keygen(homes / "north", rotate=True))
        new = next(site for site in roster_of(kits).sites if site.name == "north")
        assert new.identity != old.identity
        assert new.node != old.node
        assert roster_of(kits).holder(old.certificate) is None
        shutil.copy2(answer, homes / "north" / "answer.json")
        open_kit(homes / "north", "site")

    @pytest.mark.parametrize(
        ("folder", "role", "name"),
        [("operators/boss", "operator", "boss"), ("auditors/judge", "auditor", "judge")],
    )
    def test_a_caller(self, kits: Path, folder: str, role: KitRole, name: str) -> None:
        old = open_kit(kits / folder, role)
        before = fingerprint(parse_certificate(old.certificate(), kits)), old.private_key()
        assert rotate(kits, name) == kits / folder
        new = open_kit(kits / folder, role)
        certificate = fingerprint(parse_certificate(new.certificate(), kits))
        assert new.private_key() != before[1]
        assert roster_of(kits).holder(before[0]) is None
        assert roster_of(kits).holder(certificate) is not None
        mode = (kits / folder / "keys" / "control.key").stat().st_mode
        assert stat.S_IMODE(mode) == 0o600

    def test_a_caller_whose_kit_is_elsewhere(self, kits: Path) -> None:
        shutil.rmtree(kits / "operators" / "boss")
        open_kit(rotate(kits, "boss"), "operator")

    def test_the_server(self, kits: Path) -> None:
        """Its TLS key; the coordinator's is pinned in every kit and stays."""
        before, version = snapshot(kits / "server"), roster_of(kits).version
        assert rotate(kits, "server") == kits / "server"
        after = snapshot(kits / "server")
        assert {name for name in before if before[name] != after[name]} == {
            "certificate.pem", "keys/server.key",
        }  # fmt: skip
        open_kit(kits / "server", "server")
        assert roster_of(kits).version == version

    @pytest.mark.parametrize("name", ["boss", "server", "nobody"])
    def test_a_request_that_is_nobody_s(self, kits: Path, homes: Path, name: str) -> None:
        with pytest.raises(ConfigError) as caught:
            rotate(kits, name, homes / "north" / "request.json")
        one_line(caught, f"{name} is no site, and needs none")

    def test_faults(self, kits: Path, homes: Path, fresh: Path) -> None:
        request = homes / "north" / "request.json"
        for arguments, said in (
            ((kits, "north"), "north: is a site, whose keys are its own"),
            ((kits, "south", request), "is of north, and south is to be rotated"),
            ((kits, "nobody"), "nobody: is no member of heart; they are boss, judge, north"),
            ((fresh, "north", request), "north: has no entry yet; `fedveil provision sign"),
            ((homes, "north"), "holds no authority; give the folder"),
        ):
            with pytest.raises(ConfigError) as caught:
                rotate(*arguments)
            one_line(caught, said)

    def test_the_fingerprint_is_compared(self, kits: Path, homes: Path) -> None:
        with pytest.raises(ConfigError, match="is expected; somebody changed it"):
            rotate(kits, "north", keygen(homes / "north", rotate=True), expect="1")


class TestRevoke:
    @pytest.mark.parametrize("name", ["north", "boss", "judge"])
    def test_it_is_out(self, kits: Path, name: str) -> None:
        member = next(one for one in roster_of(kits).members if one.name == name)
        roster = revoke(kits, name)
        assert roster == roster_of(kits)
        assert roster.holder(member.certificate) is None
        with pytest.raises(ConfigError, match=f"{name}: is no member of heart"):
            revoke(kits, name)

    def test_even_if_fewer_remain_than_a_federation_begins_with(self, kits: Path) -> None:
        for name in ("north", "south", "west", "boss", "judge"):
            revoke(kits, name)
        assert names(kits) == []

    def test_its_old_request_does_not_bring_it_back(self, kits: Path, homes: Path) -> None:
        revoke(kits, "north")
        with pytest.raises(ConfigError, match="north is no site of this federation"):
            sign(kits, homes / "north" / "request.json")

    def test_a_site_can_come_back(self, kits: Path, homes: Path) -> None:
        revoke(kits, "north")
        add(kits, "north", "site")
        sign(kits, keygen(homes / "north", rotate=True), homes / "north" / "answer.json")
        open_kit(homes / "north", "site")

    def test_a_caller_gets_no_old_kit_again(self, kits: Path) -> None:
        revoke(kits, "boss")
        with pytest.raises(ConfigError, match="is there already; move it away"):
            add(kits, "boss", "operator")

    def test_a_site_that_was_never_signed_for(self, fresh: Path) -> None:
        revoke(fresh, "north")
        with pytest.raises(ConfigError, match="is no site of this federation"):
            sign(fresh, keygen(fresh / "sites" / "north"))

    def test_the_server_is_no_member(self, kits: Path) -> None:
        with pytest.raises(ConfigError, match="server: is no member"):
            revoke(kits, "server")


class TestDamage:
    """An authority whose own files are not what they were."""

    def test_its_key_open_to_others(self, kits: Path) -> None:
        (kits / "authority" / "ca.key").chmod(0o644)
        with pytest.raises(ConfigError, match=r"ca.key: is open to others \(mode 644\)"):
            revoke(kits, "north")

    def test_another_s_key(self, kits: Path, fresh: Path) -> None:
        shutil.copy2(fresh / "authority" / "ca.key", kits / "authority" / "ca.key")
        with pytest.raises(ConfigError, match=r"ca.key: is not the key of ca.pem"):
            revoke(kits, "north")

    def test_another_s_roster(self, kits: Path, fresh: Path) -> None:
        shutil.copy2(fresh / "authority" / "roster.json", kits / "authority" / "roster.json")
        with pytest.raises(ConfigError, match=r"roster.json: roster: is not signed by"):
            revoke(kits, "north")

    @pytest.mark.parametrize("name", ["ca.pem", "roster.json", "members.toml", "federation.toml"])
    def test_a_file_that_is_missing(self, kits: Path, name: str) -> None:
        (kits / "authority" / name).unlink()
        with pytest.raises(ConfigError, match=rf"{name}: cannot be read"):
            revoke(kits, "north")

    @pytest.mark.parametrize("lists", [{"sites": ["a"], "operators": ["a"]}, {"sites": "a"}])
    def test_a_list_of_members_that_is_none(self, kits: Path, lists: dict[str, Any]) -> None:
        path = kits / "authority" / "members.toml"
        path.write_text(tomli_w.dumps(lists), encoding="utf-8")
        with pytest.raises(ConfigError, match=r"members.toml: "):
            revoke(kits, "north")

    def test_an_expired_authority(self, kits: Path) -> None:
        with pytest.raises(ConfigError, match=r"ca.pem: expired at .*provision create"):
            revoke(kits, "north", now=datetime.now(UTC) + timedelta(days=3651))

    @pytest.mark.parametrize("folder", ["", "sites", "none"])
    def test_a_folder_that_is_no_authority_s(self, kits: Path, folder: str) -> None:
        if not folder:
            shutil.rmtree(kits / "authority")
        for call in (
            lambda: revoke(kits / folder, "north"),
            lambda: add(kits / folder, "x", "site"),
            lambda: rotate(kits / folder, "north"),
        ):
            with pytest.raises(FedveilError, match="holds no authority; give the folder"):
                call()
