"""A long vector's work, shared out over this machine's cores.

The slices have a fixed length, so what is computed does not depend on how many cores there are.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ...machine import cores_allowed

SLICE = 1 << 18  # words, a megabyte
ResultT = TypeVar("ResultT")
_QUOTA = cores_allowed()


def over_slices(length: int, work: Callable[[slice], ResultT], size: int = SLICE) -> list[ResultT]:
    """What `work` gives for each slice, in order; it runs at several at once.

    Ciphers, hashes and numpy let go of the interpreter's lock on blocks of this length.
    """
    slices = [slice(start, min(start + size, length)) for start in range(0, length, size)]
    threads = min(len(slices), _cores())
    if threads < 2:
        return [work(part) for part in slices]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, slices))


def _cores() -> int:
    """Those of this process: a container's quota counts, not the host's number."""
    seen = len(os.sched_getaffinity(0))
    return seen if _QUOTA is None else max(1, min(seen, int(_QUOTA)))
