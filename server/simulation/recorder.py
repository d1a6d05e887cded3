"""A grid that keeps what crosses it: for whoever must show what a server gets to see."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ...flower import Grid, Message, RecordDict
from ...flower.wrapped import WrappedGrid


@dataclass(frozen=True)
class Crossing:
    """One message on its way, as its sender sent it.

    Attributes:
        down: Whether it goes to a site; else it comes from one.
        site: The site's node.
        action: What it is about, see `wire`.
        message: A copy that nobody else holds.
    """

    down: bool
    site: int
    action: str
    message: Message

    @property
    def content(self) -> RecordDict | None:
        """What it says; nothing for an error."""
        return self.message.content if self.message.has_content() else None


Alter = Callable[[Crossing], Message | None]
"""What goes on in place of a message: itself (`crossing.message`), another one, or nothing."""


def passed_on(crossing: Crossing) -> Message | None:
    """Alters nothing."""
    return crossing.message


class RecordingGrid(WrappedGrid):
    """Passes everything on to another grid and back, and keeps a copy of each message.

    It sees what a server or a relay sees. For a test it may alter or lose what passes.

    Attributes:
        crossings: What was sent, in order, either way: before it was altered.
    """

    def __init__(self, grid: Grid, alter: Alter = passed_on) -> None:
        """Around a grid."""
        super().__init__(grid)
        self.crossings: list[Crossing] = []
        self._alter = alter

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid`; what is lost on its way has no id."""
        return self._grid.push_messages(self._crossed(messages, down=True))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid`."""
        return self._crossed(self._grid.pull_messages(message_ids), down=False)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """See `Grid`."""
        sent = self._crossed(messages, down=True)
        return self._crossed(self._grid.send_and_receive(sent, timeout=timeout), down=False)

    def _crossed(self, messages: Iterable[Message], *, down: bool) -> list[Message]:
        """What goes on, each message kept first."""
        passed = []
        for message in messages:
            about = message.metadata
            site = about.dst_node_id if down else about.src_node_id
            self.crossings.append(Crossing(down, site, about.message_type, copy.deepcopy(message)))
            after = self._alter(Crossing(down, site, about.message_type, message))
            if after is not None:
                passed.append(after)
        return passed
