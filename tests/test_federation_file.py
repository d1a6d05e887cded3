"""A federation's file: what stands in it, and every fault in one line that names file and mend."""

from collections.abc import Callable
from pathlib import Path

import pytest

import fedveil
from fedveil.config import ConfigError, read_federation

WriteFile = Callable[[str, str], Path]
EXAMPLE = Path(fedveil.__file__).parent / "examples" / "federation.toml"
SMALL = """
[federation]
name = "heart"
[server]
address = "host.example.org"
[members]
sites = ["a", "b", "c"]
operators = ["o"]
"""


def test_the_example() -> None:
    found = read_federation(EXAMPLE)
    assert found.federation.name == "cardiology"
    assert found.members.sites == ("st-mary", "charite", "clinic-north", "clinic-south")
    assert found.members.auditors == ("data-protection",)
    assert found.server.names == (
        "fedveil.example.org", "192.0.2.10", "localhost", "127.0.0.1",
    )  # fmt: skip


def test_the_defaults(write_file: WriteFile) -> None:
    found = read_federation(write_file("f.toml", SMALL))
    assert (found.server.fleet_port, found.server.control_port) == (9443, 9444)
    assert (found.certificates.days, found.certificates.ca_days) == (825, 3650)
    assert found.members.auditors == ()


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "a-b.c1", "::1", "xn--bcher-kva.de"])
def test_addresses(write_file: WriteFile, address: str) -> None:
    text = SMALL.replace("host.example.org", address)
    assert read_federation(write_file("f.toml", text)).server.address == address


@pytest.mark.parametrize(
    "address",
    [
        "https://x.org", "x.org:9443", "0.0.0.0", "::", "a b", "-a", "a..b", "*.x.org", "10.0.0",  # noqa: S104
        "256.1.1.1", "fe80::1%eth0", "x" * 64, "b\\u00fccher.de", "x.org\\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["address", "addresses"])
def test_what_is_no_address(write_file: WriteFile, address: str, key: str) -> None:
    text = SMALL.replace("host.example.org", address)
    if key == "addresses":
        text = SMALL.replace("[server]", f'[server]\naddresses = ["x.org", "{address}"]')
    path = write_file("f.toml", text)
    with pytest.raises(ConfigError, match=rf"f.toml: server.{key} = .*must be a host name or"):
        read_federation(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("[federation]", "[federation", "is not TOML"),
        ("operators =", "operator =", 'members.operator: unknown key; did you mean "operators"?'),
        ("[server]", "[sever]", 'sever: unknown key; did you mean "server"?'),
        ('name = "heart"', 'name = "a b"', 'federation.name = "a b": must match'),
        ('name = "heart"', f'name = "{"x" * 65}"', "federation.name = "),
        ('"a", "b", "c"', '"a", "b"', 'members.sites = ["a", "b"]: must be at least 3 names'),
        ('"a", "b", "c"', '"a", "b", "../c"', 'members.sites.2 = "../c": must match'),
        ('"a", "b", "c"', '"a", "b", 3', "members.sites.2 = 3: must be"),
        ('"a", "b", "c"', '"a", "b", "b"', 'members.sites: "b" stands twice'),
        ('"a", "b", "c"', '"a", "b", "B"', 'members.sites: "B" stands twice'),
        ('["o"]', '["c"]', 'members.operators and members.sites: "c" stands twice'),
        ('["o"]', '["server"]', "is the server's own"),
        ('["o"]', "[]", "members.operators = []: must name one"),
        ('["o"]', '"o"', 'members.operators = "o": must be a list'),
        ('operators = ["o"]', "", "members.operators: missing"),
        ("[server]", "[server]\nfleet_port = 0", "server.fleet_port = 0: must be >= 1"),
        ("[server]", "[server]\ncontrol_port = 9443", "must differ from server.fleet_port"),
        ("[server]", "[certificates]\ndays = 0\n[server]", "certificates.days = 0: must be >= 1"),
        ("[server]", "[certificates]\ndays = 3651\n[server]", "must be <= certificates.ca_days"),
    ],
)
def test_faults(write_file: WriteFile, old: str, new: str, said: str) -> None:
    assert old in SMALL
    path = write_file("f.toml", SMALL.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        read_federation(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_sites_than_a_secure_sum_takes(write_file: WriteFile) -> None:
    names = ", ".join(f'"s{number}"' for number in range(256))
    path = write_file("f.toml", SMALL.replace('"a", "b", "c"', names))
    with pytest.raises(ConfigError, match=r"members.sites = 256 names: must be at most 255"):
        read_federation(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_federation(tmp_path / "none.toml")
