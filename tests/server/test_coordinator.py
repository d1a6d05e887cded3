"""The coordinator's secrets: made once, kept to itself, and what they sign holds."""

from pathlib import Path

import pytest

from fedveil.config import FedveilError
from fedveil.privacy.secagg.keys import is_signed, public_of
from fedveil.server.coordinator import coordinator
from fedveil.wire import run_statement

FILE = "coordinator.key"


def test_it_is_made_once(tmp_path: Path) -> None:
    one, again = coordinator(tmp_path), coordinator(tmp_path)
    assert (one.identity.public, one.sealing) == (again.identity.public, again.sealing)
    assert one.aggregator == public_of(one.sealing)


def test_each_run_has_its_own(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
    one, other = map(coordinator, folders)
    assert one.identity.public != other.identity.public
    assert one.aggregator != other.aggregator


def test_signing_and_sealing_keys_are_two(tmp_path: Path) -> None:
    made = coordinator(tmp_path)
    text = (tmp_path / FILE).read_text(encoding="ascii").strip()
    assert text[:64] != text[64:]
    assert made.sealing.hex() == text[64:]


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    coordinator(tmp_path)
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_it_does_not_show_its_secret(tmp_path: Path) -> None:
    made = coordinator(tmp_path)
    assert made.sealing.hex() not in repr(made)
    assert repr(made.sealing) not in repr(made)


def test_what_it_signs_is_one_run(tmp_path: Path) -> None:
    made = coordinator(tmp_path)
    about = ["run", "config", "schema", made.aggregator]
    signature = made.identity.sign(run_statement(*about))  # type: ignore[arg-type]
    assert is_signed(made.identity.public, run_statement(*about), signature)  # type: ignore[arg-type]
    for place in range(4):
        other = [*about]
        other[place] = other[place] + (b"x" if place == 3 else "x")  # type: ignore[operator]
        statement = run_statement(*other)  # type: ignore[arg-type]
        assert not is_signed(made.identity.public, statement, signature)
    # What one part ends with is not what the next one begins with.
    moved = run_statement("runc", "onfig", "schema", made.aggregator)
    assert not is_signed(made.identity.public, moved, signature)


@pytest.mark.parametrize("content", ["", "abc", "zz" * 64, "ab" * 63, "ab" * 65])
def test_a_damaged_one_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content, encoding="ascii")
    with pytest.raises(FedveilError, match="holds no coordinator's key; put a whole copy back"):
        coordinator(tmp_path)
    assert (tmp_path / FILE).read_text(encoding="ascii") == content  # and is left as it is


def test_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FedveilError, match="check the path and the disk"):
        coordinator(tmp_path / "missing")
