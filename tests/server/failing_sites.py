"""A ClientApp for the Ray engine whose second site has records that cannot be read."""

from functools import lru_cache
from typing import Any

from fedveil.client.app import client_app
from fedveil.client.site import Site
from fedveil.data_prep.schema import Schema
from fedveil.flower import Context
from fedveil.server.simulation.ray_apps import open_site, site_of, with_number


def _unreadable(schema: Schema) -> Any:  # noqa: ANN401
    raise RuntimeError("no such records")


@lru_cache
def _spoilt(site: Site) -> Site:
    site._read = _unreadable
    return site


def _open(context: Context) -> Site:
    site = open_site(context)
    return _spoilt(site) if site_of(context) == 2 else site


client = with_number(client_app(_open))
