"""A ClientApp for the Ray engine whose sites have fixed coins; loaded by Ray, not by pytest."""

from fedveil.client.app import client_app
from fedveil.client.site import Site
from fedveil.flower import Context
from fedveil.privacy.noise import Coins
from fedveil.server.simulation.ray_apps import open_site, with_number

_fixed: set[str] = set()


def _open(context: Context) -> Site:
    site = open_site(context)
    if site.name not in _fixed:
        site.coins = Coins(site.name.encode().ljust(32, b"."))
        _fixed.add(site.name)
    return site


client = with_number(client_app(_open))
