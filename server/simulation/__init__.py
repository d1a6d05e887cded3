"""A simulated federation: the apps, messages, ledgers and rules of a real one on one machine.

Only the transport differs from a deployment. An engine is a transport: `local` are threads of this
process, `ray` is Flower's own simulation over Ray.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

from ...client.site import Site
from ...config import RunConfig
from ...data_prep.schema import Schema
from ..coordinator import coordinator
from ..rounds import Observer
from ..store import RunFolder
from .begun import Begun, begin
from .sites import Shards, check_sites, pin_identities, simulated_site

Engine = Callable[[Begun, Mapping[int, Site], Observer], None]

ENGINES = {
    "local": "local:run_local",
    "ray": "ray:run_ray",
}


def check(config: RunConfig) -> None:
    """Refuses an engine that cannot run here, before anything is written.

    Raises:
        ConfigError: What it needs is missing.
    """
    if config.federation.engine == "ray":
        from .ray import check_cluster

        ledgers = Path(config.data.ledger) if config.data.ledger else None
        check_cluster(config.federation, ledgers)


def run(config: RunConfig, schema: Schema, shards: Shards, folder: Path, observe: Observer) -> None:
    """Runs a federation, or what is left of one that was cut off.

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
    module, name = ENGINES[config.federation.engine].split(":")
    engine: Engine = getattr(import_module(f".{module}", __name__), name)
    begun = begin(config, schema, folder)
    with ExitStack() as stack:
        sites: dict[int, Site] = {}
        pin_identities(len(shards.parts), folder)
        for node, raw in enumerate(shards.parts, start=1):
            sites[node] = simulated_site(node, raw, folder, config, shards.report.records)
            stack.callback(sites[node].close)
        known = begun.point.ledgers if begun.point else {}
        signer = coordinator(folder).identity.public
        refused = check_sites(sites, begun.run_id, known, config, schema, signer)
        if refused:
            _tell(RunFolder(folder), observe, refused)
        engine(begun, sites, observe)


def _tell(folder: RunFolder, observe: Observer, refused: Mapping[int, str]) -> None:
    """Whoever simulates is told who will refuse, and why; the run goes on without them."""
    event = {
        "event": "refused",
        "refused": [{"site": number, "reason": reason} for number, reason in refused.items()],
    }
    folder.append(event)
    observe(event)
