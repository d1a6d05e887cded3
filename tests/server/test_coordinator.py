"""The coordinator's secrets: made once for a run, for its owner's eyes, and never guessed anew."""

import os
from pathlib import Path

import pytest

from fedveil.config import FedveilError
from fedveil.privacy.secagg.keys import is_signed
from fedveil.server.coordinator import coordinator
from fedveil.wire import run_statement


def test_it_is_the_same_as_long_as_the_folder_is(tmp_path: Path) -> None:
    first, again = coordinator(tmp_path), coordinator(tmp_path)
    assert first.identity.public == again.identity.public
    assert (first.sealing, first.aggregator) == (again.sealing, again.aggregator)
    statement = b"run".ljust(32)
    assert is_signed(again.identity.public, statement, first.identity.sign(statement))
    assert len(first.aggregator) == len(first.sealing) == 32


def test_another_folder_has_another(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        found.append(coordinator(tmp_path / name))
    assert found[0].identity.public != found[1].identity.public
    assert found[0].aggregator != found[1].aggregator


def test_its_file_is_for_its_owner_only_and_it_does_not_show_its_key(tmp_path: Path) -> None:
    made = coordinator(tmp_path)
    assert (tmp_path / "coordinator.key").stat().st_mode & 0o077 == 0
    assert made.sealing.hex() not in repr(made)
    assert repr(made.sealing) not in repr(made)


@pytest.mark.parametrize("text", ["", "no key", "ab" * 63, "ab" * 65, "\u0661" * 128])
def test_a_damaged_key_is_refused_and_stays(tmp_path: Path, text: str) -> None:
    """A new one would be another coordinator, whom no site expects."""
    file = tmp_path / "coordinator.key"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(FedveilError, match=r"coordinator\.key: holds no coordinator's key; put"):
        coordinator(tmp_path)
    assert file.read_text(encoding="utf-8") == text


def test_what_the_disk_refuses_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FedveilError, match=r"coordinator\.key: cannot be written \(No such file"):
        coordinator(tmp_path / "gone")
    (tmp_path / "coordinator.key").mkdir()
    with pytest.raises(FedveilError, match=r"coordinator\.key: cannot be read \(Is a directory\)"):
        coordinator(tmp_path)


def test_of_two_at_once_either_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    theirs, link = coordinator(tmp_path / "other"), os.link

    def too_late(draft: Path, path: Path) -> None:
        link(tmp_path / "other" / "coordinator.key", path)
        link(draft, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", too_late)
        found = coordinator(tmp_path)
    assert found.identity.public == theirs.identity.public


def test_signing_and_sealing_keys_are_two(tmp_path: Path) -> None:
    made = coordinator(tmp_path)
    text = (tmp_path / "coordinator.key").read_text(encoding="ascii").strip()
    assert text[:64] != text[64:]
    assert made.sealing.hex() == text[64:]


def test_what_it_signs_is_one_run(tmp_path: Path) -> None:
    made = coordinator(tmp_path)
    statement = run_statement("run", "config", "schema", made.aggregator)
    signature = made.identity.sign(statement)
    assert is_signed(made.identity.public, statement, signature)
    for other in (
        run_statement("runx", "config", "schema", made.aggregator),
        run_statement("run", "configx", "schema", made.aggregator),
        run_statement("run", "config", "schemax", made.aggregator),
        run_statement("run", "config", "schema", made.aggregator + b"x"),
        # What one part ends with is not what the next one begins with.
        run_statement("runc", "onfig", "schema", made.aggregator),
    ):
        assert not is_signed(made.identity.public, other, signature)
