"""What the ledger costs: a commit beside a bare synced SQLite insert, and reading it all again."""

import json
import sqlite3
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from harness import interleaved, start

from fedveil.config import RunConfig
from fedveil.privacy.books import order
from fedveil.privacy.ledger import Ledger, verify
from fedveil.privacy.limits import Lifetime
from fedveil.privacy.plan import plan

ROUNDS = 20_000


def main() -> None:
    """Milliseconds a commit, the ratio to the bare insert, and verifications."""
    report = start(__doc__ or "")
    folder = Path(tempfile.mkdtemp(prefix="fedveil-bench-"))
    repeats = 200 if report.quick else 2000
    seconds = interleaved({"commit": _committer(folder), "bare": _inserter(folder)}, repeats)
    for name, value in seconds.items():
        report.add(f"{name}_ms", 1e3 * value, "ms, synced to the disk")
    report.add("commit_over_bare", seconds["commit"] / seconds["bare"])
    for entries in (1000,) if report.quick else (1000, 10_000):
        path = _filled(folder / f"{entries}.sqlite", entries)
        began = time.perf_counter()
        Ledger.open(path).close()
        report.add(f"open_{entries}_entries_s", time.perf_counter() - began, "s, all verified")
    began = time.perf_counter()
    verify(path)
    report.add("verify_with_price_s", time.perf_counter() - began, "s, its price recomputed too")
    report.finish()


def _ledger(path: Path) -> Ledger:
    raw = {
        "data": {"source": "sklearn:digits"},
        "model": {"family": "vae"},
        "federation": {"rounds": ROUNDS},
        "privacy": {"sampling_rate": 0.01},
    }
    priced = plan(RunConfig.model_validate(raw))
    Ledger.create(path, "bench", simulated=True)
    ledger = Ledger.open(path)
    ledger.reserve(order("run", "terms", "digits", priced), Lifetime(3.0, 1e-5))
    return ledger


def _committer(folder: Path) -> Callable[[], object]:
    ledger, index = _ledger(folder / "ours.sqlite"), count(1)
    return lambda: ledger.commit("run", [("rounds", next(index))])


def _inserter(folder: Path) -> Callable[[], object]:
    """The least that a durable, chained count can cost: one row of the same size, synced."""
    connection = sqlite3.connect(folder / "bare.sqlite", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE entries (sequence INTEGER PRIMARY KEY, body TEXT)")
    body = json.dumps({"run_id": "run", "part": "rounds", "index": 1, "hash": "0" * 300})
    return lambda: connection.execute("INSERT INTO entries (body) VALUES (?)", (body,))


def _filled(path: Path, entries: int) -> Path:
    ledger = _ledger(path)
    ledger.commit("run", [("rounds", index) for index in range(1, entries - 1)])
    ledger.close()
    return path


if __name__ == "__main__":
    main()
