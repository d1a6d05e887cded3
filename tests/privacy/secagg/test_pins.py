"""Pinned identities come from a file, and a wrong line of it is one clear error."""

from pathlib import Path

import pytest

from fedveil.config import ConfigError
from fedveil.privacy.secagg.pins import read_identities

ONE, TWO = "11" * 32, "2B" * 32


def test_names_and_keys(tmp_path: Path) -> None:
    file = tmp_path / "pins.toml"
    file.write_text(f'[identities]\nst-mary = "{ONE}"\nbank_7 = "{TWO}"\n', encoding="utf-8")
    assert read_identities(file) == {"st-mary": b"\x11" * 32, "bank_7": b"\x2b" * 32}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"holds nothing, expected one section \[identities\]"),
        ("[identities]\n", r"holds identities, expected one section"),
        ("identities = 3\n", "expected one section"),
        (f'[identities]\na = "{ONE}"\n[more]\n', "holds identities, more, expected one"),
        (f'[identities]\na = "{ONE[:-1]}"\n', "identities.a = .*: expected 64 hexadecimal digits"),
        (f'[identities]\na = "{ONE[:-1]}g"\n', "expected 64 hexadecimal digits"),
        ("[identities]\na = 7\n", "identities.a = 7: expected 64 hexadecimal digits"),
        (f'[identities]\n"a\\nb" = "{ONE}"\n', "expected a name of plain characters"),
        (f'[identities]\na = "{ONE}"\nb = "{ONE}"\n', "two names have one key"),
        ("[identities\n", "is not TOML"),
    ],
)
def test_a_wrong_file(tmp_path: Path, text: str, match: str) -> None:
    file = tmp_path / "pins.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=match) as caught:
        read_identities(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_identities(tmp_path / "none.toml")
