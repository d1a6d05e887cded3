"""A grid over a SuperLink that asks for replies often while they may come, and can be stopped.

Flower's own asks every three seconds, which is most of a short round.
"""

import time
from collections.abc import Callable, Iterable

from ..flower import Grid, Message, RecordDict
from ..flower.folding import fold, unfold
from ..flower.wrapped import WrappedGrid
from .replies import RunError

SOON, LATER, SHARE = 0.03, 1.0, 0.05
"""A wait is this share of the time waited so far, within these seconds."""


def pause(waited: float) -> float:
    """Seconds until the next look, after so many: a reply is late by a twentieth at most."""
    return min(LATER, max(SOON, SHARE * waited))


class PollingGrid(WrappedGrid):
    """Another grid, polled; it ends with an error once nobody wants the run any more."""

    def __init__(
        self,
        grid: Grid,
        stopped: Callable[[], str | None],
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Over `grid`.

        Args:
            grid: Pushes and pulls messages.
            stopped: Says why the run is to stop; `None` as long as it is not.
            sleep: Waits for so many seconds.
            clock: Seconds.
        """
        super().__init__(grid)
        self._stopped, self._sleep, self._clock = stopped, sleep, clock

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid`; small ones are folded."""
        pushed = list(messages)
        for message in pushed:
            message.content = fold(message.content)
        return self._grid.push_messages(pushed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid`; a reply that cannot be read is one without content."""
        found = list(self._grid.pull_messages(message_ids))
        for message in found:
            if message.has_content():
                try:
                    message.content = unfold(message.content)
                except ValueError:
                    message.content = RecordDict()
        return found

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Sends messages and waits for replies; a message is nobody's once the time is out.

        Raises:
            RunError: The run is to stop.
        """
        sent = list(messages)
        if timeout is not None:
            for message in sent:  # a late site must not begin what nobody waits for
                message.metadata.ttl = max(timeout, 1.0)
        began = self._clock()
        waiting = {number for number in self.push_messages(sent) if number}
        replies: list[Message] = []
        while waiting:
            if (why := self._stopped()) is not None:
                raise RunError(why)
            asked = self._clock()
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
            now = self._clock()
            waited = now - began
            if not waiting or (timeout is not None and waited >= timeout):
                break
            left = pause(waited) if timeout is None else min(pause(waited), timeout - waited)
            if left > now - asked:  # else the SuperLink has kept the question for as long
                self._sleep(left - (now - asked))
        return replies
