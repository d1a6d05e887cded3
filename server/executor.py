"""The executor: it takes queued runs one by one and runs the installed ServerApp for each.

`python -m fedveil.server.executor KIT` goes on until it is told to stop. No bundle is unpacked: a
run at the SuperLink that was not begun here is refused.
"""

import json
import logging
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from ..config import FedveilError, RunConfig, load_config
from ..deployment.keys import LINK, read_hex
from ..deployment.kit import Kit, open_kit
from ..deployment.logs import configure, level_asked
from ..flower import Context, Grid, RecordDict
from ..flower.link import Address, RunGrid, run_at
from ..privacy.secagg.pins import read_identities
from .app import Setting, server_app
from .collect import IDENTITIES
from .coordinator import Coordinator, read_coordinator
from .grid import PollingGrid
from .queue import Queue
from .ready import wait_for_sites
from .replies import RunError
from .rounds import Observer
from .store import Event, RunFolder
from .superlink import NODES

log = logging.getLogger(__name__)

_LOOK = 0.5  # seconds between looks at the queue
_AGAIN = 5.0  # until a SuperLink that was not there is asked again


def main(folder: Path) -> int:
    """Runs what is queued in a server's kit."""
    configure("executor", level_asked())
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        kit = open_kit(folder, "server")
        secret = read_hex(kit.keys / LINK, 32)
        address = Address(f"127.0.0.1:{kit.about.fleet_port}", kit.ca.read_bytes(), secret)
        asks = read_coordinator(kit.keys / "coordinator.key")
    except FedveilError as error:
        log.error("%s", error)
        return error.exit_code
    log.info("ready")
    while not stop.is_set():
        stop.wait(work(kit, Queue(kit.state), address, asks, stop))
    return 0


def work(
    kit: Kit, queue: Queue, address: Address, asks: Coordinator, stop: threading.Event
) -> float:
    """Runs the oldest queued run to its end or until `stop` is set, if there is one.

    Returns:
        Seconds until it is worth to look again. A run whose SuperLink is not there stays queued.
    """
    run_id = queue.next()
    if run_id is None:
        return _LOOK
    with ExitStack() as stack:
        try:
            grid = stack.enter_context(run_at(address, partial(log.warning, "%s")))
        except OSError as error:
            log.error("run %s waits for the SuperLink: %s", run_id, error)
            return _AGAIN
        queue.begun(run_id)
        log.info("run %s begins", run_id)
        try:
            _run(kit, queue, run_id, grid, asks, stop)
        except Exception as error:
            log.error("run %s failed: %s", run_id, _cause(error))
            log.debug("its cause", exc_info=True)
        finally:
            queue.ended(run_id)
        log.info("run %s is over", run_id)
    return 0.0


def _run(
    kit: Kit,
    queue: Queue,
    run_id: str,
    grid: RunGrid,
    asks: Coordinator,
    stop: threading.Event,
) -> None:
    folder = RunFolder(queue.path(run_id))

    def stopped() -> str | None:
        if stop.is_set():
            return f"the server was stopped; `fedveil runs resume {run_id}` goes on with it"
        if queue.cancelled(run_id):
            return "cancelled by an operator"
        return "the SuperLink counts it as over" if grid.lost.is_set() else None

    setting = Setting(
        watch=lambda _: logged(run_id),
        roster=lambda _, config: nodes_of(kit, folder, config),
        coordinator=lambda _: asks,
        prepare=wait_for_sites,
    )
    polled: Grid = PollingGrid(grid, stopped)
    with folder.locked(resume=True):
        _, before = folder.events_from(0)
        try:
            values = _values(folder, run_id)
            server_app(setting)(polled, Context(grid.run.run_id, 0, {}, RecordDict(), values))
        except Exception as error:
            # A run that fails before its first event must say so as well.
            events, _ = folder.events_from(before)
            if not any(event["event"] == "failed" for event in events):
                told = {"event": "failed", "round": 0, "epsilon": None, "cause": _cause(error)}
                folder.append(told)
            raise


def _cause(error: Exception) -> str:
    """Only our own errors have a text that is ours."""
    return str(error) if isinstance(error, FedveilError) else type(error).__name__


def _values(folder: RunFolder, run_id: str) -> dict[str, bool | float | int | str]:
    """The run configuration of the app."""
    return {
        "config": load_config(folder.path / "config.toml").model_dump_json(by_alias=True),
        "schema": (folder.path / "schema.json").read_text(encoding="utf-8"),
        "run-id": run_id,
        "folder": str(folder.path),
    }


def nodes_of(kit: Kit, folder: RunFolder, config: RunConfig) -> Mapping[int, int]:
    """The node of each of a run's sites, as the SuperLink knows them.

    Raises:
        RunError: A site has left the federation since the run was submitted.
    """
    path = kit.state / NODES
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise RunError(f"{path}: cannot be read; is the SuperLink up?") from None
    names = list(read_identities(folder.path / IDENTITIES))
    if len(names) != config.federation.sites:
        raise RunError(
            f"federation.sites = {config.federation.sites}: the run was submitted to {len(names)}"
        )
    if gone := [name for name in names if name not in known]:
        raise RunError(f"site {gone[0]}: is no longer in the federation; submit a new run")
    return {number: int(known[name]["node"]) for number, name in enumerate(names, start=1)}


def logged(run_id: str) -> Observer:
    """Logs a run's events, without their figures."""

    def seen(event: Event) -> None:
        facts = {key: event[key] for key in ("round", "rounds", "cause") if key in event}
        dropped = event.get("dropped") or []
        log.info(
            "run %s: %s %s%s",
            run_id,
            event["event"],
            facts,
            f", without {', '.join(str(one['site']) for one in dropped)}" if dropped else "",
        )

    return seen


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
