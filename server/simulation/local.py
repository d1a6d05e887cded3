"""A federation in one process: real apps, real messages, only the transport is ours."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch

from ...client.app import client_app
from ...client.site import Site
from ...flower import (
    ClientApp,
    Context,
    Error,
    FlowerRun,
    Grid,
    Message,
    RecordDict,
    empty_run,
    set_identity,
    set_message_id,
)
from ...machine import cores
from ..app import Setting, server_app
from ..rounds import Observer
from ..store import Event, RunFolder
from .begun import Begun
from .sites import refuse_failed, site_log

_SERVER_NODE = 0
_CLIENT_APP_RAISED = 2


def alone(grid: Grid) -> Grid:
    """Nothing stands between the server and its grid."""
    return grid


def run_local(
    begun: Begun,
    sites: Mapping[int, Site],
    observe: Observer,
    around: Callable[[Grid], Grid] = alone,
) -> None:
    """Runs a federation on threads of this process; as an engine, see `simulation.run`."""
    app = client_app(lambda context: sites[context.node_id])
    run_apps(begun, app, list(sites), observe, around)


def run_apps(
    begun: Begun,
    app: ClientApp,
    nodes: list[int],
    observe: Observer,
    around: Callable[[Grid], Grid] = alone,
) -> None:
    """Runs the server over any sites' app.

    Args:
        begun: The run.
        app: Of every site.
        nodes: The sites' nodes.
        observe: Sees every event.
        around: What stands between the server and its grid, such as a `RecordingGrid`.
    """

    def watch(folder: RunFolder) -> Observer:
        refuse = refuse_failed(folder.path)

        def seen(event: Event) -> None:
            observe(event)
            refuse(event)

        return seen

    number = int(begun.run_id, 16)
    with site_log(begun.folder / "sites" / "site.log"), local_grid(app, nodes, number) as grid:
        context = Context(number, _SERVER_NODE, {}, RecordDict(), {**begun.values})
        server_app(Setting(watch))(around(grid), context)


@contextmanager
def local_grid(app: ClientApp, nodes: list[int], run_number: int) -> Iterator["LocalGrid"]:
    """A grid of threads, min(cores, sites) of them, each with one torch thread."""
    workers = min(cores(), len(nodes))
    # The identity is the process's, so that one simulation runs at a time in a process.
    set_identity(run_number, _SERVER_NODE)
    pool = ThreadPoolExecutor(workers, "site", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield LocalGrid(app, nodes, run_number, pool)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class LocalGrid(Grid):
    """Flower's public `Grid` over a `ClientApp` in this process."""

    def __init__(
        self, app: ClientApp, nodes: list[int], run_number: int, pool: ThreadPoolExecutor
    ) -> None:
        self._app, self._pool = app, pool
        self._contexts = {node: Context(run_number, node, {}, RecordDict(), {}) for node in nodes}
        self._run = empty_run(run_number)
        self._ids = itertools.count(1)
        self._pending: dict[str, Future[Message]] = {}

    def set_run(self, run: FlowerRun) -> None:
        """See `Grid`."""
        self._run = run

    @property
    def run(self) -> FlowerRun:
        """See `Grid`."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """See `Grid`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """See `Grid`."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid`."""
        pushed = []
        for message in messages:
            message_id = f"{next(self._ids):016x}"
            set_message_id(message, message_id)
            self._pending[message_id] = self._pool.submit(self._serve, message)
            pushed.append(message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See `Grid`."""
        done = [i for i in message_ids if i in self._pending and self._pending[i].done()]
        return [self._pending.pop(message_id).result() for message_id in done]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """See `Grid`."""
        pushed = list(self.push_messages(messages))
        wait([self._pending[message_id] for message_id in pushed], timeout)
        return self.pull_messages(pushed)

    def _serve(self, message: Message) -> Message:
        # A site gets a copy, as over a network: nothing it does may reach another's message.
        received = copy.deepcopy(message)
        try:
            return self._app(received, self._contexts[message.metadata.dst_node_id])
        except Exception:  # noqa: BLE001  what a site raised is not for the server to read
            return Message(Error(_CLIENT_APP_RAISED, ""), reply_to=received)
