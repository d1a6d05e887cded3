"""A grid around another one, for what changes a part of it only."""

from collections.abc import Iterable

from . import FlowerRun, Grid, Message, RecordDict


class WrappedGrid(Grid):
    """Passes everything on, and back."""

    def __init__(self, grid: Grid) -> None:
        """Around a grid."""
        self._grid = grid

    def set_run(self, run: FlowerRun) -> None:
        """See `Grid`."""
        self._grid.set_run(run)

    @property
    def run(self) -> FlowerRun:
        """See `Grid`."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See `Grid`."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid`."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid`."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid`."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """See `Grid`."""
        return self._grid.send_and_receive(messages, timeout=timeout)
