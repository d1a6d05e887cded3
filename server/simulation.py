"""A federation in one process: real apps, real messages, only the transport is ours."""

import copy
import logging
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..client.app import client_app, terms_of
from ..client.site import Budget, Site
from ..config import RunConfig
from ..data_prep import modality
from ..data_prep.clean import CleaningReport, refuse_unusable
from ..data_prep.partition import share_out
from ..data_prep.schema import Schema, schema_to_json
from ..files import create_secret_file
from ..flower import (
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
from ..privacy.books import Head
from ..privacy.ledger import Ledger
from ..privacy.limits import LedgerError, Lifetime, UnavailableError
from ..privacy.noise import Coins
from ..privacy.plan import plan
from ..wire import NO_LEDGER
from .app import server_app
from .rounds import Observer, RunError
from .store import Event, RunFolder

_SERVER_NODE = 0
_CLIENT_APP_RAISED = 2


@dataclass(frozen=True)
class Shards:
    """A simulation's raw records, shared out.

    Attributes:
        parts: One site's raw records each.
        report: What cleaning does to all of them; a simulation may look at it, a federation not.
    """

    parts: tuple[Any, ...]
    report: CleaningReport


def load_shards(config: RunConfig, schema: Schema) -> Shards:
    """Reads the source, checks that it is usable at all, and shares it out.

    Raises:
        DataError: The data cannot be used.
        ConfigError: They cannot be shared out so.
    """
    kind, data = modality(schema), config.data
    raw = kind.read(data.source, schema)
    # Cleaning is record-wise: the whole may be checked here, and each part cleaned at its site.
    _, report = kind.clean(raw, schema, config.clean)
    refuse_unusable(report)

    def column(name: str | None, *, wanted: bool) -> list[str]:
        return kind.values(raw, schema, name) if wanted and name is not None else []

    parts = share_out(
        data,
        config.federation.sites,
        report.records,
        np.random.default_rng(config.federation.seed),
        persons=column(schema.person, wanted=True),
        labels=column(schema.label, wanted=data.partition == "dirichlet"),
        column=column(data.column, wanted=True),
    )
    return Shards(tuple(kind.take(raw, rows) for rows in parts), report)


def run_local(
    config: RunConfig, schema: Schema, shards: Shards, folder: Path, observe: Observer
) -> None:
    """Runs a federation on threads of this process, or what is left of one that was cut off.

    Args:
        config: The resolved configuration.
        schema: What a record is.
        shards: The sites' raw records.
        folder: The run folder, locked; each simulated site has a folder in it.
        observe: Sees every event.

    Raises:
        LedgerError: A site's ledger does not admit the run. Nothing has run.
        FedveilError: The run failed.
    """
    store = RunFolder(folder)
    point, _ = store.load_checkpoint()
    # Flower keeps run numbers in signed 64 bits.
    run_id = point.run_id if point else f"{secrets.randbits(62):016x}"
    number = int(run_id, 16)
    if point is None:
        store.describe(config, schema)
    home = Path(config.data.ledger) if config.data.ledger else folder / "ledger"
    sites: dict[int, Site] = {}
    app = client_app(lambda context: sites[context.node_id])
    values = {
        "config": config.model_dump_json(by_alias=True),
        "schema": schema_to_json(schema),
        "run-id": run_id,
        "folder": str(folder),
    }

    def watch(event: Event) -> None:
        observe(event)
        # A federation must not be told; whoever simulates one must be.
        if event["event"] in {"round", "evaluated"} and (
            failed := [s.name for s in sites.values() if s.failed]
        ):
            raise RunError(
                f"{', '.join(failed[:3])}{', ...' if len(failed) > 3 else ''}: failed and took "
                f"part without records; {folder / 'sites' / 'site.log'} says why"
            )

    with ExitStack() as stack:
        for node, raw in enumerate(shards.parts, start=1):
            sites[node] = simulated_site(node, raw, folder, home, config, shards.report.records)
            stack.callback(sites[node].close)
        _check_ledgers(sites, run_id, point.ledgers if point else {}, config, schema)
        stack.enter_context(_site_log(folder / "sites" / "site.log"))
        grid = stack.enter_context(local_grid(app, list(sites), number))
        context = Context(number, _SERVER_NODE, {}, RecordDict(), {**values})
        server_app(watch)(grid, context)


def simulated_site(
    node: int,
    raw: Any,  # noqa: ANN401
    folder: Path,
    home: Path,
    config: RunConfig,
    records: int,
) -> Site:
    """A site with its ledger and its secrets, made where they are missing.

    They stand in the run folder, or where `data.ledger` says, and call themselves simulated: a
    simulation protects nobody from the one who runs it.

    Args:
        node: Its number.
        raw: Its raw records.
        folder: The run folder.
        home: Where its ledger and its split key are.
        config: The run.
        records: How many raw records all sites share: one more may change who holds which.

    Raises:
        LedgerError: The ledger cannot be used, or ledger and key are not of one site.
    """
    name = f"site-{node:03d}"
    own, ledger_file = folder / "sites" / name, home / f"{name}.sqlite"
    key_file = home / f"{name}.SIMULATED-split.key"
    try:
        for path in (own, home):
            path.mkdir(parents=True, exist_ok=True)
        # The ledger comes first: a key without one says that a ledger was lost. Another process may
        # make them at the same time, and either's will do.
        if not ledger_file.exists() and not key_file.exists():
            with suppress(FileExistsError):
                Ledger.create(ledger_file, name, simulated=True)
        ledger = Ledger.open(ledger_file)
        if not key_file.exists():
            if ledger.read().datasets:
                raise UnavailableError(
                    f"{key_file}: is missing; put it back, or records would change their sides"
                )
            with suppress(FileExistsError):
                create_secret_file(key_file, f"{secrets.token_hex(32)}\n".encode())
    except OSError as error:
        raise UnavailableError(f"{home}: {error.strerror}; check the path and the disk") from None
    data, (epsilon, delta) = config.data, config.lifetime
    budget = Budget(
        ledger,
        config.dataset_id,
        Lifetime(epsilon, delta, config.policy.composition),
        {
            "shared_out": f"{data.partition} to {config.federation.sites} sites, seed "
            f"{config.federation.seed}, alpha {data.alpha:g}, column {data.column}, of "
            f"{records} records"
        },
    )
    return Site(name, lambda: raw, _read_key(key_file), budget, Coins.from_system(), own)


def _read_key(path: Path) -> bytes:
    try:
        key = bytes.fromhex(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        key = b""
    if len(key) != 32:
        raise UnavailableError(f"{path}: holds no split key; put a whole copy back")
    return key


def _check_ledgers(
    sites: Mapping[int, Site],
    run_id: str,
    known: Mapping[int, tuple[int, str]],
    config: RunConfig,
    schema: Schema,
) -> None:
    """A federation learns of a refusal by its code; whoever simulates one is told why, at once."""
    shared = config.shared()
    terms = terms_of(shared.model_dump_json(by_alias=True), schema_to_json(schema))
    for node, site in sites.items():
        head = Head(*known.get(node, NO_LEDGER))
        try:
            site.check(run_id, terms, head, shared, schema, plan(shared))
        except LedgerError as error:
            raise type(error)(f"{site.name}: {error}") from None


@contextmanager
def _site_log(path: Path) -> Iterator[None]:
    """Keeps what the simulated sites log for themselves; nothing of it reaches the server."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logger = logging.getLogger(Site.__module__.rpartition(".")[0])
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


@contextmanager
def local_grid(app: ClientApp, nodes: list[int], run_number: int) -> Iterator["LocalGrid"]:
    """A grid of threads, min(cores, sites) of them, each with one torch thread."""
    workers = min(len(os.sched_getaffinity(0)), len(nodes))
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
            message_id = secrets.token_hex(8)
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
