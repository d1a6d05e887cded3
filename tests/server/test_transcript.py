"""The transcript as a file: what a crash leaves is taken up, and nothing is written twice."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedveil.config import FedveilError
from fedveil.privacy.secagg.encoding import Buffer
from fedveil.privacy.secagg.simulator import Simulator
from fedveil.privacy.secagg.terms import Numbers
from fedveil.privacy.secagg.transcript import verify_transcript
from fedveil.server import transcript as module
from fedveil.server.simulation.recorder import Crossing
from fedveil.server.transcript import NAME, Transcript, taken_up

World = Any
OpenWorld = Callable[..., World]


@pytest.fixture
def session() -> Simulator:
    """Two rounds of three sites, their transcript in memory."""
    made = Simulator(Numbers(3, 3, 3, 1), rounds=2, entropy=np.random.default_rng(0).bytes)
    made.set_up()
    for _ in range(2):
        made.round({site: np.zeros(4, dtype=np.uint32) for site in range(3)})
    return made


def pieces(data: Buffer) -> list[bytes]:
    """The framed messages, each with its length."""
    found, start, whole = [], 0, bytes(data)
    while start < len(whole):
        after = start + 4 + int.from_bytes(whole[start : start + 4], "big")
        found.append(whole[start:after])
        start = after
    return found


class _Kept:
    """Stands for a message whose frame is known already."""

    def __init__(self, frame: bytes) -> None:
        self.frame = frame


def written(path: Path, data: Buffer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes messages one by one, as a run does."""
    monkeypatch.setattr(module, "framed", lambda one: one.frame)
    made = Transcript(path)
    for frame in pieces(data):
        made.keep(_Kept(frame))  # type: ignore[arg-type]
    monkeypatch.undo()


def test_what_is_kept_is_the_messages_one_after_another(
    tmp_path: Path, session: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / NAME
    written(path, session.transcript, monkeypatch)
    assert path.read_bytes() == session.transcript
    epoch, ledgers = taken_up(path, session.pinned)
    assert epoch == 1
    assert ledgers == dict(verify_transcript(session.transcript, session.pinned).ledgers)
    assert sorted(ledgers) == sorted(session.pinned)


def test_each_message_is_in_the_file_once_it_is_kept(
    tmp_path: Path, session: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ends in the midst of a round, its objects still about, is not heard later."""
    path = tmp_path / NAME
    monkeypatch.setattr(module, "framed", lambda one: one.frame)
    made, length = Transcript(path), 0
    for frame in pieces(session.transcript):
        made.keep(_Kept(frame))  # type: ignore[arg-type]
        length += len(frame)
        assert path.stat().st_size == length


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 40])
def test_a_torn_message_is_mended(
    tmp_path: Path, session: Simulator, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    *whole, last = pieces(session.transcript)
    path = tmp_path / NAME
    path.write_bytes(b"".join(whole) + last[:cut])
    Transcript(path)
    assert path.read_bytes() == b"".join(whole)
    assert taken_up(path, session.pinned)[0] == 1
    written(path, last, monkeypatch)
    assert path.read_bytes() == session.transcript


@pytest.mark.parametrize("cut", range(1, 12))
def test_wherever_it_is_cut_it_can_be_taken_up(
    tmp_path: Path, session: Simulator, cut: int
) -> None:
    """At any message, in each phase of set-up and round."""
    found = pieces(session.transcript)
    path = tmp_path / NAME
    path.write_bytes(b"".join(found[: len(found) * cut // 12 or 1]))
    assert taken_up(path, session.pinned)[0] == 1


def test_nothing_there_begins_at_epoch_zero(tmp_path: Path) -> None:
    path = tmp_path / NAME
    assert taken_up(path, {}) == (0, {})
    Transcript(path)
    assert taken_up(path, {}) == (0, {})


def test_a_damaged_one_is_refused(tmp_path: Path, session: Simulator) -> None:
    content = bytearray(session.transcript)
    content[len(content) // 2] ^= 1
    path = tmp_path / NAME
    path.write_bytes(content)
    with pytest.raises(FedveilError, match=r"transcript.bin: .*; begin a new run$"):
        taken_up(path, session.pinned)


def test_one_of_others_is_refused(tmp_path: Path, session: Simulator) -> None:
    path = tmp_path / NAME
    path.write_bytes(session.transcript)
    strangers = {name: bytes(reversed(key)) for name, key in session.pinned.items()}
    with pytest.raises(FedveilError, match="begin a new run"):
        taken_up(path, strangers)


def test_epochs_and_sums_are_synced_before_it_goes_on(
    tmp_path: Path, open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is begun twice: a site is asked for an epoch only once the disk has it."""
    synced: list[int] = []
    sync = os.fsync

    def noted(number: int) -> None:
        sync(number)
        synced.append(world.folder.joinpath(NAME).stat().st_size)

    at_the_first: list[tuple[int, int]] = []

    def alter(crossing: Crossing) -> Any:  # noqa: ANN401
        if crossing.down and crossing.action == "query.advertise" and not at_the_first:
            at_the_first.append((len(synced), world.folder.joinpath(NAME).stat().st_size))
        return crossing.message

    world = open_world()
    world.alter = alter
    monkeypatch.setattr(os, "fsync", noted)
    world.ask(1)
    assert at_the_first == [(1, synced[0])]
    size = world.folder.joinpath(NAME).stat().st_size
    assert synced[-1] == size
    verdict = verify_transcript((world.folder / NAME).read_bytes(), world.channel.identities)
    assert verdict.rounds[0].released is not None


def test_a_folder_that_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(FedveilError, match="cannot be written"):
        Transcript(tmp_path / "missing" / NAME)


def test_a_run_goes_on_behind_a_torn_message(open_world: OpenWorld) -> None:
    world = open_world()
    world.ask(1)
    path = world.folder / NAME
    with path.open("ab") as file:
        file.write(bytes((0, 0, 1, 0, 70)))
    world.open()
    world.ask(2)
    world.check_sum(1, 2, 3, 4)
    verdict = verify_transcript(path.read_bytes(), world.channel.identities)
    assert [(one.epoch, one.round) for one in verdict.rounds] == [(0, 0), (1, 0)]
