"""Runs to hold the self-test against, of every mechanism."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from fedveil.client.self_test import Tested, self_test
from fedveil.config import RunConfig
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import Plan, plan

MakeConfig = Callable[..., RunConfig]
RATE = 0.1
FAST = {"epsilon": 2.0, "sampling_rate": 1.0}  # priced in a moment
PERSONS = {"data": {"persons": 500}, "privacy": {"unit": "person"}}
SECAGG = {"aggregation": {"encryption": "secagg"}}
OPTIONS: dict[str, dict[str, Any]] = {
    "central": {},
    "central, person": PERSONS,
    "distributed": {},
    "distributed, person": PERSONS,
    "local": {},
    "local, person": PERSONS,
    "site": {"aggregation": {"encryption": "none"}},
    "site, secagg": SECAGG,
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What is little work is no faster on more, least of all where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case(NamedTuple):
    """A run, and how many sites add noise to a sum of it."""

    config: RunConfig
    priced: Plan
    all_sites: int

    def tested(self, seed: int = 0, sites: int | None = None, **options: Any) -> Tested:  # noqa: ANN401
        """The self-test with fixed coins, of the sum over all sites by default."""
        sites = self.all_sites if sites is None else sites
        return self_test(self.config, self.priced, sites, self.coins(seed), **options)

    @staticmethod
    def coins(seed: int) -> Callable[[], Coins]:
        """Makes other coins at each call, the same ones for the same seed."""
        keys = iter(range(10**6))
        return lambda: Coins(seed.to_bytes(16, "big") + next(keys).to_bytes(16, "big"))


@pytest.fixture
def case(make_config: MakeConfig, one_thread: None) -> Callable[[str], Case]:
    """Makes a case; `plan` remembers its price."""
    del one_thread

    def make(name: str) -> Case:
        options = OPTIONS[name]
        privacy = {**FAST, "mechanism": name.partition(",")[0], **options.get("privacy", {})}
        rest = {key: value for key, value in options.items() if key != "privacy"}
        if name.startswith("site"):
            del privacy["sampling_rate"], privacy["epsilon"]
        config = make_config(federation={"sites": 5}, privacy=privacy, **rest).resolved()
        priced = plan(config)
        # What a rate costs is not what is tested.
        priced = replace(priced, sampling_rate=1.0 if name.startswith("site") else RATE)
        sites = priced.numbers.n if priced.shares_noise and priced.numbers else 1
        return Case(config, priced, sites)

    return make
