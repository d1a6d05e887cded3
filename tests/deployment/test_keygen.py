"""A site's keys and its request: for its owner's eyes, never replaced unasked, never forged."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedveil.config import ConfigError
from fedveil.deployment.keygen import keygen, request_fingerprint
from fedveil.deployment.keys import (
    KEYS_OF,
    openssh,
    read_control,
    read_hex,
    read_identity,
    read_node,
)
from fedveil.deployment.request import Request, make_request, read_request
from fedveil.privacy.secagg.keys import Identity

Keys = tuple[Identity, ec.EllipticCurvePrivateKey, ec.EllipticCurvePrivateKey]
EMPTY = {"name": "n", "federation": "f", "identity": "", "node": "", "csr": "", "signatures": {}}


@pytest.fixture
def kit(kits: Path) -> Path:
    """The kit of the site north, before it has keys."""
    return kits / "sites" / "north"


@pytest.fixture
def other(kits: Path) -> dict[str, Any]:
    """A request that holds, of the site south."""
    found: dict[str, Any] = json.loads(keygen(kits / "sites" / "south").read_bytes())
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def own_keys(kit: Path) -> Keys:
    """The keys in a site's kit that its request is made of."""
    keys = kit / "keys"
    return (
        read_identity(keys / "identity.key"),
        read_node(keys / "node.key"),
        read_control(keys / "control.key"),
    )


def signed(raw: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """A changed request, signed again by whoever has the keys."""
    plain = Request(**{key: text for key, text in raw.items() if key != "signatures"})
    ecdsa = ec.ECDSA(hashes.SHA256())
    signatures = {
        "identity": keys[0].sign(plain.statement).hex(),
        "node": keys[1].sign(plain.statement, ecdsa).hex(),
        "control": keys[2].sign(plain.statement, ecdsa).hex(),
    }
    return {**raw, "signatures": signatures}


class TestKeygen:
    def test_the_keys_are_all_there_and_nobody_else_s_to_read(self, kit: Path) -> None:
        old = os.umask(0)
        try:
            keygen(kit)
        finally:
            os.umask(old)
        assert {path.name for path in (kit / "keys").iterdir()} == set(KEYS_OF["site"])
        assert stat.S_IMODE((kit / "keys").stat().st_mode) == 0o700
        for path in (kit / "keys").iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        read_identity(kit / "keys" / "identity.key")
        read_hex(kit / "keys" / "vault.key", 32)
        read_hex(kit / "keys" / "split.key", 32)
        assert not list(kit.glob(".*"))

    def test_the_request_has_their_public_halves(self, kit: Path) -> None:
        path = keygen(kit)
        found = read_request(path)
        assert path == kit / "request.json"
        assert (found.name, found.federation) == ("north", "heart")
        keys = kit / "keys"
        assert found.identity == read_identity(keys / "identity.key").public.hex()
        assert found.node == openssh(read_node(keys / "node.key").public_key())
        assert found.control == read_control(keys / "control.key").public_key()

    def test_keys_that_are_there_stay(self, kit: Path) -> None:
        keygen(kit)
        before, request = contents(kit / "keys"), (kit / "request.json").read_bytes()
        with pytest.raises(ConfigError, match=r"identity.key: is there already; .*--rotate"):
            keygen(kit)
        assert contents(kit / "keys") == before
        assert (kit / "request.json").read_bytes() == request

    def test_one_key_is_enough_to_stop(self, kit: Path) -> None:
        (kit / "keys").mkdir()
        (kit / "keys" / "node.key").write_text("mine", encoding="ascii")
        with pytest.raises(ConfigError, match=r"node.key: is there already"):
            keygen(kit)
        assert contents(kit / "keys") == {"node.key": b"mine"}

    def test_a_rotation_keeps_the_old_ones_and_those_that_must_not_change(self, kit: Path) -> None:
        first = request_fingerprint(keygen(kit))
        before = contents(kit / "keys")
        assert request_fingerprint(keygen(kit, rotate=True)) != first
        after = contents(kit / "keys")
        assert {name for name in before if before[name] == after[name]} == {
            "vault.key", "split.key",
        }  # fmt: skip
        (old,) = (kit / "keys").glob("old-*")
        assert stat.S_IMODE(old.stat().st_mode) == 0o700
        assert contents(old) == {
            name: before[name] for name in ("identity.key", "node.key", "control.key")
        }

    def test_two_rotations_keep_both(self, kit: Path) -> None:
        keygen(kit)
        keygen(kit, rotate=True)
        keygen(kit, rotate=True)
        assert len(list((kit / "keys").glob("old-*"))) == 2

    def test_a_split_key_that_was_put_back_stays(self, kit: Path) -> None:
        (kit / "keys").mkdir(mode=0o755)
        (kit / "keys" / "split.key").write_text("ab" * 32, encoding="ascii")
        keygen(kit)
        assert contents(kit / "keys")["split.key"] == b"ab" * 32
        assert stat.S_IMODE((kit / "keys").stat().st_mode) == 0o700

    def test_no_two_are_alike(self, kits: Path) -> None:
        requests = [read_request(keygen(kits / "sites" / name)) for name in ("north", "south")]
        assert len({request.identity for request in requests}) == 2
        keys = [path.read_bytes() for path in (kits / "sites").glob("*/keys/*")]
        assert len(set(keys)) == 10

    def test_it_takes_a_site_s_kit_only(self, kits: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is the kit of operator boss; give one of a site"):
            keygen(kits / "operators" / "boss")
        with pytest.raises(ConfigError, match="is no kit"):
            keygen(tmp_path)

    def test_a_kit_that_cannot_be_written(self, kit: Path) -> None:
        (kit / "keys").write_text("", encoding="ascii")
        with pytest.raises(ConfigError, match="keys: cannot be written"):
            keygen(kit)
        assert not list(kit.glob(".*"))


class TestRequests:
    @staticmethod
    def refused(path: Path, raw: dict[str, Any]) -> None:
        path.write_text(json.dumps(raw), encoding="utf-8")
        with pytest.raises(ConfigError, match="is not signed by the keys in it"):
            read_request(path)

    @pytest.mark.parametrize(("field", "value"), [("name", "south"), ("federation", "lung")])
    def test_for_another_party(self, kit: Path, field: str, value: str) -> None:
        path = keygen(kit)
        self.refused(path, json.loads(path.read_bytes()) | {field: value})

    @pytest.mark.parametrize("its_signature_too", [False, True])
    @pytest.mark.parametrize(
        ("field", "signature"), [("identity", "identity"), ("node", "node"), ("csr", "control")]
    )
    def test_with_a_key_of_another_site(
        self,
        kit: Path,
        other: dict[str, Any],
        field: str,
        signature: str,
        its_signature_too: bool,
    ) -> None:
        path = keygen(kit)
        raw = json.loads(path.read_bytes()) | {field: other[field]}
        if its_signature_too:
            raw["signatures"][signature] = other["signatures"][signature]
        self.refused(path, raw)

    @pytest.mark.parametrize("signature", ["identity", "node", "control"])
    def test_without_a_signature(self, kit: Path, other: dict[str, Any], signature: str) -> None:
        path = keygen(kit)
        for value in (None, "", other["signatures"][signature]):
            raw = json.loads(path.read_bytes())
            raw["signatures"][signature] = value
            if value is None:
                del raw["signatures"][signature]
            self.refused(path, raw)
            path = keygen(kit, rotate=True)

    def test_with_a_key_that_the_roster_would_write_otherwise(self, kit: Path) -> None:
        """Else the site's own key would not be equal to the roster's."""
        keygen(kit)
        own = own_keys(kit)
        raw = json.loads(make_request("north", "heart", *own))
        for change in ({"node": raw["node"] + " me@there"}, {"identity": raw["identity"].upper()}):
            self.refused(kit / "request.json", signed(raw | change, own))

    def test_a_csr_of_another_party_is_refused_though_all_keys_signed(self, kit: Path) -> None:
        keygen(kit)
        own = own_keys(kit)
        raw = json.loads(make_request("south", "heart", *own))
        raw["csr"] = json.loads(make_request("north", "heart", *own))["csr"]
        self.refused(kit / "request.json", signed(raw, own))
        (kit / "request.json").write_text(
            json.dumps(signed(raw | {"name": "north"}, own)), encoding="ascii"
        )
        assert read_request(kit / "request.json").name == "north"

    @pytest.mark.parametrize(
        "text",
        [
            "", "{", "[]", "null", "{}", '{"signatures": {}}', "\0", "[" * 100_000,
            json.dumps({**EMPTY, "name": 1}), json.dumps({**EMPTY, "signatures": []}),
            json.dumps({**EMPTY, "more": ""}), json.dumps({**EMPTY, "signatures": {"node": "x"}}),
            json.dumps({key: text for key, text in EMPTY.items() if key != "csr"}),
        ],
    )  # fmt: skip
    def test_what_is_no_request(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "request.json"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="is no site's request"):
            read_request(path)

    @pytest.mark.parametrize("field", ["identity", "node", "csr"])
    @pytest.mark.parametrize("value", ["", "x", "\ud800", "00" * 32])
    def test_keys_that_are_none(self, kit: Path, field: str, value: str) -> None:
        path = keygen(kit)
        self.refused(path, json.loads(path.read_bytes()) | {field: value})

    def test_one_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read"):
            read_request(tmp_path / "request.json")

    def test_its_fingerprint_hangs_on_every_key(self, kit: Path) -> None:
        keygen(kit)
        own = own_keys(kit)
        keygen(kit, rotate=True)
        new = own_keys(kit)
        found = set()
        for place in (None, 0, 1, 2):
            identity, node, control = (new if i == place else own for i in range(3))
            mixed = make_request("north", "heart", identity[0], node[1], control[2])
            (kit / "mixed.json").write_bytes(mixed)
            found.add(request_fingerprint(kit / "mixed.json"))
        assert len(found) == 4
        assert all(len(text) == 24 and text.count("-") == 4 for text in found)
