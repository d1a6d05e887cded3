"""Waiting for sites: who is waited for, for how long, and when a run is hopeless."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from fedveil.flower import Message, RecordDict, set_identity
from fedveil.flower.fleet import error_reply
from fedveil.server.ready import AWAY, wait_for_sites
from fedveil.server.replies import RunError
from fedveil.wire import NO_LEDGER, READY, Refusal, Refused, Step, Task, pack, read_task

QUESTION = Task("run", 0, 0, "{}", "{}", {}, {}, {}, NO_LEDGER)
NODES = {1: 101, 2: 102, 3: 103, 4: 104}
Answer = Refusal | str | None
"""A refusal, "ready", "away" (an error of Flower's), "garbage", or nothing at all."""


@pytest.fixture(autouse=True, scope="module")
def _identity() -> None:
    set_identity(1, 7)


@dataclass
class Sites:
    """A grid whose sites answer by a script, a line a question; the last line stays."""

    script: Mapping[int, list[Answer]]
    asked: list[list[int]] = field(default_factory=list)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None
    ) -> Iterator[Message]:
        assert timeout is not None
        sent = list(messages)
        self.asked.append([message.metadata.dst_node_id - 100 for message in sent])
        for message in sent:
            assert message.metadata.message_type == READY
            task = read_task(message.content)
            assert (task.round, task.evaluation, task.arrays) == (0, 0, {})
            lines = self.script[message.metadata.dst_node_id - 100]
            reply = self._reply(message, lines.pop(0) if len(lines) > 1 else lines[0])
            if reply is not None:
                reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
                yield reply

    def _reply(self, message: Message, answer: Answer) -> Message | None:
        if answer is None:
            return None
        if isinstance(answer, Refusal):
            return Message(pack(Refused("run", 0, 0, answer)), reply_to=message)
        if answer == "away":
            return error_reply(message)
        content = RecordDict() if answer == "garbage" else pack(Step("run", b""))
        return Message(content, reply_to=message)


@dataclass
class Waited:
    """What came of waiting."""

    sites: Sites
    told: list[dict[str, Any]]
    slept: list[float]

    def reasons(self, key: str) -> list[dict[int, str]]:
        return [{one["site"]: one["reason"] for one in event[key]} for event in self.told]


def wait(
    script: Mapping[int, list[Answer]], *, least: int = 3, patience: float = 10.0, most: int = 50
) -> Waited:
    """Waits with a clock that only sleeping moves, and gives up after so many questions."""
    sites, told, slept = Sites(script), list[dict[str, Any]](), list[float]()
    channel: Any = SimpleNamespace(
        sites={site: NODES[site] for site in script},
        grid=sites,
        config=SimpleNamespace(min_replies=least, federation=SimpleNamespace(patience=patience)),
        priced=SimpleNamespace(numbers=None, clipping_norm=1.0),
        question=lambda _: QUESTION,
    )

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) >= most:
            raise StillWaitingError

    wait_for_sites(channel, told.append, sleep, lambda: sum(slept))
    return Waited(sites, told, slept)


class StillWaitingError(Exception):
    """It would wait on."""


def test_all_are_ready_at_once() -> None:
    found = wait({site: ["ready"] for site in NODES})
    assert found.sites.asked == [[1, 2, 3, 4]]
    assert (found.told, found.slept) == ([], [])


def test_only_those_are_asked_again_who_were_not_ready() -> None:
    found = wait({1: ["ready"], 2: ["ready"], 3: ["ready"], 4: ["away", "away", "ready"]})
    assert found.sites.asked == [[1, 2, 3, 4], [4], [4]]
    assert found.reasons("waiting") == [{4: AWAY}]


def test_an_approval_is_waited_for_as_long_as_it_takes() -> None:
    """Far beyond the patience that there is with machines."""
    held = Refusal.APPROVAL
    found = wait({1: ["ready"], 2: ["ready"], 3: ["ready"], 4: [held] * 40 + ["ready"]})
    assert sum(found.slept) > 7 * 10
    assert found.reasons("waiting") == [{4: held.value}]  # told once


@pytest.mark.parametrize("answer", ["away", "garbage", None, Refusal.PAUSED])
def test_a_machine_and_a_paused_site_only_for_a_while(answer: Answer) -> None:
    found = wait({1: ["ready"], 2: ["ready"], 3: ["ready"], 4: [answer]})
    assert 10 < sum(found.slept) < 16
    assert found.told[-1]["ready"] == [1, 2, 3]


def test_not_without_enough_others() -> None:
    with pytest.raises(StillWaitingError):
        wait({1: ["ready"], 2: ["ready"], 3: ["away"], 4: ["away"]})


def test_a_human_keeps_the_others_waiting_for_machines_too() -> None:
    with pytest.raises(StillWaitingError):
        wait({1: ["ready"], 2: ["ready"], 3: ["ready"], 4: [Refusal.APPROVAL]})


def test_a_refusal_is_final_and_the_run_goes_on_without() -> None:
    found = wait({1: ["ready"], 2: ["ready"], 3: ["ready"], 4: [Refusal.PRICE, "ready"]})
    assert found.sites.asked == [[1, 2, 3, 4]]
    assert found.reasons("refused") == [{4: Refusal.PRICE.value}]


def test_too_many_refusals_end_it() -> None:
    script: Mapping[int, list[Answer]] = {
        1: ["ready"], 2: ["away"], 3: [Refusal.BUDGET], 4: [Refusal.MECHANISM],
    }  # fmt: skip
    with pytest.raises(RunError, match="2 of 4 sites refuse") as caught:
        wait(script)
    assert f"site 3: {Refusal.BUDGET.value}" in str(caught.value)
    assert f"site 4: {Refusal.MECHANISM.value}" in str(caught.value)


def test_what_is_told_changes_with_what_is_so() -> None:
    found = wait(
        {1: ["ready"], 2: ["away", "ready"], 3: ["ready"], 4: ["away", Refusal.APPROVAL, "ready"]}
    )
    assert found.reasons("waiting") == [{2: AWAY, 4: AWAY}, {4: Refusal.APPROVAL.value}]
    assert [event["ready"] for event in found.told] == [[1, 3], [1, 2, 3]]


def test_a_stranger_s_reply_is_nobody_s() -> None:
    sites = Sites({1: ["ready"]})
    real: Callable[..., Iterator[Message]] = sites.send_and_receive

    def from_another(messages: Iterable[Message], *, timeout: float | None) -> Iterator[Message]:
        for reply in real(messages, timeout=timeout):
            reply.metadata.__dict__["_src_node_id"] = 999
            yield reply

    sites.send_and_receive = from_another  # type: ignore[method-assign]
    channel: Any = SimpleNamespace(
        sites={1: 101},
        grid=sites,
        config=SimpleNamespace(min_replies=1, federation=SimpleNamespace(patience=1)),
        priced=SimpleNamespace(numbers=None, clipping_norm=1.0),
        question=lambda _: QUESTION,
    )

    def sleep(seconds: float) -> None:
        raise StillWaitingError

    with pytest.raises(StillWaitingError):
        wait_for_sites(channel, lambda _: None, sleep, lambda: 0.0)
