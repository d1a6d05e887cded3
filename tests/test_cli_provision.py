"""`fedveil provision`: one JSON object or lines for people, one line an error."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedveil.deployment.keygen import keygen, request_fingerprint
from fedveil.deployment.kit import open_kit

Call = Callable[..., Any]


def facts(result: Any) -> dict[str, Any]:  # noqa: ANN401
    assert (result.code, result.err) == (0, "")
    found: dict[str, Any] = json.loads(result.out)
    assert result.out.count("\n") == 1
    return found


def fault(result: Any, said: str) -> None:  # noqa: ANN401
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert said in result.err


def test_from_the_file_to_a_site_that_opens(
    call: Call, federation_file: Path, tmp_path: Path
) -> None:
    made = facts(call("provision", "create", federation_file, "-o", "kits", "--json"))
    assert made["authority"] == "kits/authority"
    assert made["kits"] == [
        "kits/server", "kits/sites/north", "kits/sites/south", "kits/sites/west",
        "kits/operators/boss", "kits/auditors/judge",
    ]  # fmt: skip
    told = facts(call("site", "keygen", "kits/sites/north", "--json"))
    request, shown = told["request"], told["fingerprint"]
    options = ("--expect", shown, "-o", "kits/sites/north/answer.json", "--json")
    signed = facts(call("provision", "sign", "kits", request, *options))
    assert signed["name"] == "north"
    assert signed["fingerprint"] == shown
    assert signed["answer"] == "kits/sites/north/answer.json"
    kit = open_kit(tmp_path / "kits" / "sites" / "north", "site")
    assert kit.read_roster().version == signed["version"]


def test_what_people_are_told(call: Call, kits: Path, homes: Path) -> None:
    request = homes / "north" / "request.json"
    told = call("provision", "sign", kits, request).out
    assert request_fingerprint(request) in told
    assert "compare it with the site by telephone" in told
    assert "put it into the server's kit where that is elsewhere" in told


def test_the_site_is_told_what_to_read_out(call: Call, kits: Path) -> None:
    file, telephone = call("site", "keygen", kits / "sites" / "south").out.splitlines()
    request, shown = file.partition(":")[0], telephone.rpartition(" ")[2]
    options = ("--request", request, "--expect", shown)
    assert call("provision", "rotate", kits, "south", *options).code == 0


def test_later_changes(call: Call, kits: Path, homes: Path) -> None:
    added = facts(call("provision", "add", kits, "east", "--role", "site", "--json"))
    assert (added["name"], added["role"]) == ("east", "site")
    request = keygen(homes / "north", rotate=True)
    told = call("provision", "rotate", kits, "north", "--request", request, "--json")
    rotated = facts(told)
    assert rotated["fingerprint"] == request_fingerprint(request)
    shutil.copy2(rotated["answer"], homes / "north" / "answer.json")
    open_kit(homes / "north", "site")
    boss = facts(call("provision", "rotate", kits, "boss", "--json"))
    assert boss["version"] == rotated["version"] + 1
    open_kit(Path(boss["kit"]), "operator")
    revoked = facts(call("provision", "revoke", kits, "south", "--json"))
    assert revoked == {"name": "south", "version": boss["version"] + 1}
    assert call("provision", "revoke", kits, "west").out.startswith("west: is no member any more\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "none.toml", "-o", "out"), "none.toml: cannot be read"),
        (("create", "federation.toml"), "Missing option '-o'"),
        (("create", "federation.toml", "-o", "kits"), "kits: is not empty"),
        (("sign", "none", "homes/north/request.json"), "none: holds no authority"),
        (("sign", "kits", "none.json"), "none.json: cannot be read"),
        (("sign", "kits", "federation.toml"), "federation.toml: is no site's request"),
        (("sign", "kits", "homes/north/request.json", "--expect", "x"), "x is expected"),
        (("add", "kits", "x"), "Missing option '--role'"),
        (("add", "kits", "x", "--role", "boss"), "is not one of 'site', 'operator', 'auditor'"),
        (("add", "kits", "north", "--role", "site"), "north"),
        (("rotate", "kits", "north"), "north: is a site, whose keys are its own"),
        (("rotate", "kits", "nobody"), "nobody: is no member of heart"),
        (("revoke", "kits", "nobody"), "nobody: is no member of heart"),
    ],
)
@pytest.mark.usefixtures("kits", "homes", "federation_file")
def test_faults(call: Call, arguments: tuple[str, ...], said: str) -> None:
    fault(call("provision", *arguments), said)


def test_help_needs_no_cryptography(tmp_path: Path) -> None:
    """Importing it takes a tenth of a second, which whoever asks for help does not wait for."""
    code = (
        "import sys, fedveil.cli; "
        "print([m for m in ('cryptography', 'grpc', 'torch', 'flwr') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
