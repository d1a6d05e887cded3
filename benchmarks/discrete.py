"""Exact integer noise, beside the continuous sampler and the keystream that it is made of."""

import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from harness import interleaved, start

from fedveil.privacy import discrete
from fedveil.privacy.noise import Coins
from fedveil.privacy.secagg import slices

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    """Seconds of the table; nanoseconds a sample on one thread, ratios, and on all cores."""
    report = start(__doc__ or "")
    coins = Coins.from_system()
    began = time.perf_counter()
    discrete.add_noise(np.zeros(1, dtype="<u4"), 0, coins)
    report.add("table_s", time.perf_counter() - began, "s, once a process")
    for count in (20_000, 1_000_000) if report.quick else (20_000, 1_000_000, 10_000_000):
        words = np.zeros(count, dtype="<u4")
        contestants: dict[str, Callable[[], object]] = {
            "base": partial(_alone, words, 0, coins),
            "stretched": partial(_alone, words, 256, coins),
            "stretched_all_cores": partial(discrete.add_noise, words, 256, coins),
            "gaussian": partial(coins.gaussian, (count,), 1.0),
            # The limit: the 16 bytes of AES-256-CTR that a stretched noise is made of.
            "keystream": partial(_keystream, count, coins),
        }
        seconds = interleaved(contestants, repeats=5 if count > 1_000_000 else 15)
        for name, value in seconds.items():
            report.add(f"{name}_ns_{count}", 1e9 * value / count, "ns a sample")
        for other in ("gaussian", "keystream"):
            ratio = seconds["stretched"] / seconds[other]
            report.add(f"stretched_over_{other}_{count}", ratio)
    report.finish()


def _alone(words: np.ndarray, stretch: int, coins: Coins) -> None:
    """On one thread: a slice at a time."""
    for first in range(0, len(words), slices.SLICE):
        discrete.add_noise(words[first : first + slices.SLICE], stretch, coins)


def _keystream(count: int, coins: Coins) -> None:
    for first in range(0, count, 1 << 14):
        coins.words(2 * min(1 << 14, count - first))


if __name__ == "__main__":
    main()
