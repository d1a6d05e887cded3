"""The self-test on the real code: false alarms, how often each fault is flagged, and its seconds.

Nulls are of the sum over all sites under `distributed`, and of `central`, in turns; each with fresh
coins. Where all is as claimed, at most 1 of 1000 may be called violated. With `--nulls N` there are
fewer; the figure's name says how many there were.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from harness import start

import fedveil
from fedveil.client import training
from fedveil.client.self_test import self_test
from fedveil.config import RunConfig
from fedveil.privacy import clipping, discrete, shared_noise, vector
from fedveil.privacy.audit.conformance import audit_conformance
from fedveil.privacy.books import Head, Order
from fedveil.privacy.ledger import Ledger
from fedveil.privacy.limits import Lifetime
from fedveil.privacy.noise import Coins
from fedveil.privacy.plan import Plan, plan

RATE = 0.1
Case = tuple[RunConfig, Plan, int]


def main() -> None:
    """False alarms, flags of each fault, and seconds at a site and of an audit."""
    torch.set_num_threads(1)
    given = sys.argv[1:]
    nulls = _nulls()
    report = start(__doc__ or "")
    sys.argv[1:] = given  # the report tells the command
    nulls, repeats = (10, 1) if report.quick else (nulls, 20)
    central, distributed = (_case(name) for name in ("central", "distributed"))
    own = [_seconds(lambda: self_test(*distributed[:2])) for _ in range(3 if report.quick else 9)]
    report.add("conformance_seconds", float(np.median(own)), "s at a site, its own share")
    report.add("conformance_audit_seconds", _audit_seconds(), "s of an audit, three sites")
    found = [_violated(central if turn % 2 else distributed) for turn in range(nulls)]
    report.add(f"conformance_false_alarms_{nulls}", sum(found))
    for name, (fault, case) in FAULTS.items():
        with fault():
            flags = [_violated({"central": central}.get(case, distributed)) for _ in range(repeats)]
        report.add(f"conformance_flag_rate_{name}", sum(flags) / repeats, f"of {repeats}")
    report.finish()


def _nulls() -> int:
    """Takes `--nulls N` from the command line."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--nulls", type=int, default=1000)
    options, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    return int(options.nulls)


def _config(mechanism: str) -> RunConfig:
    raw = {
        "federation": {"sites": 5, "rounds": 2},
        "data": {"source": "sklearn:digits"},
        "model": {"family": "vae", "width": 4, "latent": 2, "hidden": 8},
        "privacy": {"epsilon": 2.0, "mechanism": mechanism, "sampling_rate": 1.0},
        "policy": {"self_test": False},
    }
    return RunConfig.model_validate(raw).resolved()


def _case(mechanism: str) -> Case:
    """A run and how many sites add noise to a sum; what its rate costs is not what is measured."""
    config = _config(mechanism)
    priced = replace(plan(config), sampling_rate=RATE)
    return config, priced, priced.numbers.n if priced.numbers else 1


def _violated(case: Case) -> bool:
    """What a self-test with fresh coins says; a grid with too little noise is an error of its."""
    try:
        return self_test(*case).outcome == "violated"
    except fedveil.config.FedveilError:
        return True


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _audit_seconds() -> float:
    with TemporaryDirectory() as folder:
        run = fedveil.simulate(_config("distributed"), out=Path(folder) / "run")
        return _seconds(lambda: audit_conformance(run))


@contextmanager
def _less_noise() -> Iterator[None]:
    with _noise(lambda noise, _coins, _draw: 0.98 * noise):
        yield


@contextmanager
def _one_seed() -> Iterator[None]:
    with _noise(lambda _noise, _coins, draw: draw(Coins(bytes(32)))):
        yield


@contextmanager
def _round_without_noise() -> Iterator[None]:
    """One release in thirty."""
    calls: dict[int, int] = {}

    def change(noise: np.ndarray, coins: Coins, _draw: object) -> np.ndarray:
        calls[id(coins)] = calls.get(id(coins), -1) + 1
        return noise * (calls[id(coins)] % 30 != 17)

    with _noise(change):
        yield


@contextmanager
def _noise(change: Callable[..., np.ndarray]) -> Iterator[None]:
    """Changes the noise, continuous and integer."""
    gaussian, integer = Coins.gaussian, discrete.add_noise

    def drawn(coins: Coins, shape: tuple[int, ...], scale: float) -> np.ndarray:
        def again(other: Coins) -> np.ndarray:
            return gaussian(other, shape, scale)

        return change(again(coins), coins, again)

    def added(words: np.ndarray, stretch: int, coins: Coins) -> None:
        def again(other: Coins) -> np.ndarray:
            noise = np.zeros_like(words)
            integer(noise, stretch, other)
            return noise.view("<i4").astype(np.float64)

        words += np.rint(change(again(coins), coins, again)).astype(np.int64).astype("<u4")

    with patch.object(Coins, "gaussian", drawn), patch.object(discrete, "add_noise", added):
        yield


@contextmanager
def _clipped_to(factor: float) -> Iterator[None]:
    slack = clipping.CLIPPING_SLACK / factor
    with ExitStack() as stack:
        for module in (clipping, training):
            stack.enter_context(patch.object(module, "CLIPPING_SLACK", slack))
        yield


@contextmanager
def _sampled(chosen: Callable[[Coins, int, float], np.ndarray]) -> Iterator[None]:
    with patch.object(Coins, "poisson_sample", chosen):
        yield


def _fixed_size(coins: Coins, count: int, rate: float) -> np.ndarray:
    return np.sort(np.argsort(coins.uniform(count))[: round(count * rate)])


def _same_batch(coins: Coins, count: int, rate: float) -> np.ndarray:
    del coins
    return _POISSON(Coins(bytes(32)), count, rate)


_POISSON, _DEBIT, _CHOOSE = Coins.poisson_sample, Ledger.debit, shared_noise.choose_grid


@contextmanager
def _not_debited() -> Iterator[None]:
    def debit(
        ledger: Ledger,
        asked: Order,
        lifetime: Lifetime,
        terms: Mapping[str, Any],
        releases: Sequence[tuple[str, int]],
    ) -> Head:
        if releases == [("rounds", 17)]:
            return ledger.read().head
        return _DEBIT(ledger, asked, lifetime, terms, releases)

    with patch.object(Ledger, "debit", debit):
        yield


@contextmanager
def _grid(*, honest: int = 0, one: bool = False) -> Iterator[None]:
    """Noise for more honest sites than there may be, or for one coordinate."""

    def chosen(noise: float, norm: float, length: int, least: int) -> object:
        return _CHOOSE(noise, norm, 1 if one else length, least + honest)

    with patch.object(vector, "choose_grid", chosen):
        yield


FAULTS = {
    "noise_0.98": (_less_noise, "central"),
    "share_noise_0.98": (_less_noise, "distributed"),
    "noise_of_one_seed": (_one_seed, "central"),
    "round_without_noise": (_round_without_noise, "central"),
    "no_clipping": (lambda: _clipped_to(1e6), "central"),
    "clipping_1.1": (lambda: _clipped_to(1.1), "distributed"),
    "rate_1.2": (lambda: _sampled(lambda c, n, q: _POISSON(c, n, 1.2 * q)), "distributed"),
    "fixed_batch_size": (lambda: _sampled(_fixed_size), "central"),
    "same_batch": (lambda: _sampled(_same_batch), "central"),
    "not_debited": (_not_debited, "central"),
    "noise_shared_by_too_many": (lambda: _grid(honest=2), "distributed"),
    "grid_ignores_length": (lambda: _grid(one=True), "distributed"),
}

if __name__ == "__main__":
    main()
