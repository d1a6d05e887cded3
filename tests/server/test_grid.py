"""The grid that asks often while a reply may come, with a clock of the test's own."""

from collections.abc import Callable, Iterable

import pytest

from fedveil.flower import ConfigRecord, Grid, Message, RecordDict, set_identity, set_message_id
from fedveil.flower.folding import fold
from fedveil.server.grid import LATER, SHARE, SOON, PollingGrid, pause
from fedveil.server.replies import RunError


class TestPause:
    def test_is_short_at_first_and_never_long(self) -> None:
        assert pause(0.0) == SOON
        assert pause(3600.0) == LATER

    @pytest.mark.parametrize("waited", [1.0, 5.0, 20.0])
    def test_is_a_share_of_what_was_waited(self, waited: float) -> None:
        assert pause(waited) == pytest.approx(SHARE * waited)


class Clock:
    """Seconds that pass only while somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, list[float]()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds


class Sites(Grid):
    """Sites that answer a question so many seconds after it; `None` for never."""

    def __init__(self, clock: Clock, after: Iterable[float | None], keeps: float = 0.0) -> None:
        self._clock, self._after, self._keeps = clock, list(after), keeps
        self.pushed: list[Message] = []
        self._due: dict[str, tuple[float, Message]] = {}
        self.asked: list[set[str]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        numbers = []
        for message, after in zip(messages, self._after, strict=True):
            number = str(message.metadata.dst_node_id)
            set_message_id(message, number)
            self.pushed.append(message)
            if after is not None:
                self._due[number] = (self._clock() + after, message)
            numbers.append(number)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.asked.append(set(message_ids))
        self._clock.now += self._keeps
        ready = [
            n for n in message_ids if n in self._due and self._due[n][0] <= self._clock() + 1e-9
        ]
        return [Message(self.reply(), reply_to=self._due.pop(n)[1]) for n in sorted(ready)]

    def reply(self) -> RecordDict:
        return fold(RecordDict({"facts": ConfigRecord({"a": 1})}))

    set_run = run = create_message = get_node_ids = send_and_receive = None  # type: ignore[assignment]


def messages(count: int) -> list[Message]:
    set_identity(7, 1)
    return [Message(RecordDict(), node, "train.step") for node in range(1, count + 1)]


def polled(
    sites: Sites, clock: Clock, stopped: Callable[[], str | None] = lambda: None
) -> PollingGrid:
    return PollingGrid(sites, stopped, clock.sleep, clock)


class TestPolling:
    def test_all_replies_are_found_soon_after_they_come(self) -> None:
        clock = Clock()
        sites = Sites(clock, [0.0, 2.0, 8.0])
        replies = list(polled(sites, clock).send_and_receive(messages(3), timeout=60.0))
        assert [reply.metadata.src_node_id for reply in replies] == [1, 2, 3]
        assert 8.0 <= clock.now - 100.0 <= 8.0 * (1 + SHARE) + SOON
        assert sites.asked[-1] == {"3"}  # who has answered is asked for no more

    def test_whoever_is_silent_is_left_out_when_the_time_is_out(self) -> None:
        clock = Clock()
        sites = Sites(clock, [None, 1.0, None])
        replies = list(polled(sites, clock).send_and_receive(messages(3), timeout=10.0))
        assert [reply.metadata.src_node_id for reply in replies] == [2]
        assert clock.now == pytest.approx(110.0)  # asked a last time at the very end

    def test_a_question_that_was_kept_is_not_waited_for_twice(self) -> None:
        clock = Clock()
        sites = Sites(clock, [6.0], keeps=2.0)
        list(polled(sites, clock).send_and_receive(messages(1), timeout=60.0))
        assert (clock.slept, clock.now) == ([], 106.0)

    def test_a_late_site_is_told_not_to_begin(self) -> None:
        clock = Clock()
        sites = Sites(clock, [0.0, 0.0])
        list(polled(sites, clock).send_and_receive(messages(2), timeout=30.0))
        assert [message.metadata.ttl for message in sites.pushed] == [30.0, 30.0]

    def test_a_run_that_nobody_wants_ends_at_once(self) -> None:
        clock = Clock()
        words = iter([None, None, "cancelled by an operator"])
        grid = polled(Sites(clock, [None]), clock, lambda: next(words))
        with pytest.raises(RunError, match=r"^cancelled by an operator$"):
            list(grid.send_and_receive(messages(1), timeout=None))
        assert len(clock.slept) == 2

    def test_messages_are_folded_and_replies_unfolded(self) -> None:
        clock = Clock()
        sites = Sites(clock, [0.0])
        (reply,) = polled(sites, clock).send_and_receive(messages(1))
        assert list(sites.pushed[0].content) == ["folded"]
        assert reply.content == RecordDict({"facts": ConfigRecord({"a": 1})})

    def test_a_reply_that_cannot_be_read_is_one_without_content(self) -> None:
        class Liars(Sites):
            def reply(self) -> RecordDict:
                return RecordDict({"folded": ConfigRecord({"folded": b"\xff"})})

        clock = Clock()
        (reply,) = polled(Liars(clock, [0.0]), clock).send_and_receive(messages(1))
        assert reply.content == RecordDict()
