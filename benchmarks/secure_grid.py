"""A secure round beside a plain one, both over the local engine: real apps, messages and ledgers.

The sites' work is left out: each adds the same gradient sum, made beforehand, under the mechanism
`none`. What is timed is the rest of a round, from the server's question to the sum: the model down,
checks, debit, grid, masks, uploads, both more round trips, unmasking; or the plain replies, checked
and added up. Checkpoints are left out of both.
"""

import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
from harness import Report

from fedveil.client import app as client
from fedveil.config import RunConfig
from fedveil.data_prep.schema import parse_schema
from fedveil.models import family
from fedveil.models.state import to_arrays
from fedveil.privacy.plan import plan
from fedveil.server.aggregation import summed
from fedveil.server.collect import Channel, open_channel
from fedveil.server.coordinator import coordinator
from fedveil.server.simulation.local import local_grid
from fedveil.server.simulation.sites import pin_identities, simulated_site
from fedveil.server.store import RunFolder

SITES = 10
COLUMNS = 500
RUN = "0" * 16


def over_plain_grid(report: Report, folder: Path, parameters: int, repeats: int) -> None:
    """Median seconds of both, taking turns, and their ratio; both sums are held equal."""
    with ExitStack() as stack:
        rounds = {
            encryption: _Rounds(stack, folder / encryption, encryption, parameters)
            for encryption in ("none", "secagg")
        }
        times: dict[str, list[float]] = {name: [] for name in rounds}
        for number in range(repeats + 1):
            found = {}
            for name, one in rounds.items():
                began = time.perf_counter()
                found[name] = one.ask(number + 1)
                times[name].append(time.perf_counter() - began)
            apart = np.abs(found["none"] - found["secagg"]).max()
            if not apart < 1e-3:
                raise RuntimeError(f"the secure sum is {apart} off the plain one")
    # The first of each has the set-up, or a cold start, and does not count.
    plain, secure = (median(times[name][1:]) for name in ("none", "secagg"))
    report.add("plain_round_s_grid", plain, "s")
    report.add("secure_round_s_grid", secure, "s")
    report.add("secure_round_over_plain_grid", secure / plain)
    report.add("secure_set_up_and_round_s_grid", times["secagg"][0], "s")


class _Rounds:
    """Rounds of one run, whose sites do no work."""

    def __init__(self, stack: ExitStack, folder: Path, encryption: str, parameters: int) -> None:
        config, schema = _config(encryption, parameters), _schema()
        folder.mkdir(parents=True)
        pin_identities(SITES, folder)
        sites = {n: simulated_site(n, None, folder, config, 1) for n in range(1, SITES + 1)}
        for site in sites.values():
            stack.callback(site.close)
        app = client.client_app(lambda context: sites[context.node_id])
        grid = stack.enter_context(local_grid(app, list(sites), 1))
        module = family("vae").build(config.model, schema)
        self._model = to_arrays(module)
        arrays = {name: a.astype(np.float64) for name, a in self._model.items()}
        work = mock.patch.object(
            client, "parts_of", side_effect=lambda *_: {"update": dict(arrays)}
        )
        stack.enter_context(work)
        nodes, store = {number: number for number in sites}, RunFolder(folder)
        priced = plan(config)
        self._channel: Channel = open_channel(
            grid, nodes, config, schema, priced, RUN, self._model, store, coordinator(folder)
        )
        self._ledgers: dict[int, tuple[int, str]] = {}

    def ask(self, number: int) -> np.ndarray:
        """One round; the sum, one parameter after another."""
        question = self._channel.question(self._channel.priced.clipping_norm)
        task = replace(question, round=number, arrays=self._model)
        found = self._channel.ask(task, self._ledgers)
        self._ledgers |= found.ledgers
        total = summed(part.arrays for part in found.parts)
        return np.concatenate([total[name].reshape(-1) for name in sorted(total)])


def _schema() -> Any:  # noqa: ANN401
    columns = [{"name": f"c{n}", "kind": "numeric", "bounds": [0, 1]} for n in range(COLUMNS)]
    return parse_schema({"modality": "table", "column": columns}, "benchmark")


def _config(encryption: str, parameters: int) -> RunConfig:
    # The widest layer of each half makes up nearly all of it.
    hidden = parameters // (2 * COLUMNS)
    return RunConfig.model_validate(
        {
            "federation": {"sites": SITES, "rounds": 1000},
            "data": {"source": "nowhere.csv", "records": 100_000, "holdout": 0.0},
            "model": {"family": "vae", "hidden": hidden},
            "privacy": {"mechanism": "none"},
            "aggregation": {"encryption": encryption},
        }
    ).resolved()
