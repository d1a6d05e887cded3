"""The apps as Flower's Ray simulation loads them, in processes of its own.

Every process opens the sites from the run folder by itself: ledgers, keys and cleaned records are
the same in all of them, for they are on disk; coins are fresh in each.
"""

import time
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path

import torch

from ...client.app import client_app
from ...client.site import Site
from ...config import RunConfig
from ...data_prep.schema import schema_from_json
from ...flower import ClientApp, ConfigRecord, Context, Grid, Message, RecordDict
from ..app import Setting, server_app
from ..replies import RunError
from .sites import Shards, keep_log, load_shards, refuse_failed, simulated_site

_WHO = "query.site"
_PATIENCE = 120.0  # seconds until the sites of a new cluster must be there


def site_of(context: Context) -> int:
    """The number of the site that a context is of."""
    return int(context.node_config["partition-id"]) + 1


def with_number(app: ClientApp) -> ClientApp:
    """Lets a site say its number: Flower numbers the nodes of each simulation anew."""

    @app.query(_WHO.partition(".")[2])
    def who(message: Message, context: Context) -> Message:
        known = ConfigRecord({"number": site_of(context)})
        return Message(RecordDict({"site": known}), reply_to=message)

    return app


def roster(grid: Grid, config: RunConfig) -> Mapping[int, int]:
    """The node of each site, as they say themselves.

    Raises:
        RunError: One does not say.
    """
    until = time.monotonic() + _PATIENCE
    while len(nodes := list(grid.get_node_ids())) < config.federation.sites:
        if time.monotonic() > until:
            raise RunError(f"Ray: {len(nodes)} of {config.federation.sites} sites are there")
        time.sleep(0.02)
    replies = list(grid.send_and_receive([Message(RecordDict(), n, _WHO) for n in nodes]))
    if any(reply.has_error() for reply in replies):
        raise RunError("Ray: a site does not start; sites/ray.log says why")
    found = {int(str(r.content["site"]["number"])): r.metadata.src_node_id for r in replies}
    return dict(sorted(found.items()))


def open_site(context: Context) -> Site:
    """The site that a context is of, opened once in a process."""
    values = {key: str(value) for key, value in context.run_config.items()}
    return _site(values["folder"], values["config"], values["schema"], site_of(context))


@cache
def _site(folder: str, config: str, schema: str, number: int) -> Site:
    parsed, shards = RunConfig.model_validate_json(config), _shards(config, schema)
    raw, records = shards.parts[number - 1], shards.report.records
    torch.set_num_threads(max(1, parsed.federation.client_cpus))
    _log(folder)
    # Any of several actors may get the next message.
    return simulated_site(number, raw, Path(folder), parsed, records, hold=False)


@cache
def _log(folder: str) -> None:
    keep_log(Path(folder) / "sites" / "site.log")


@lru_cache(maxsize=1)
def _shards(config: str, schema: str) -> Shards:
    return load_shards(RunConfig.model_validate_json(config), schema_from_json(schema))


server = server_app(Setting(lambda folder: refuse_failed(folder.path), roster))
client = with_number(client_app(open_site))
