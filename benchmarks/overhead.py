"""What the framework costs: milliseconds a round and seconds to the first, with no-op clients.

Everything but the clients is real: ledgers, server, checkpoints and notes synced to disk. The sites
answer with zeros at once, under mechanism `none`. `loop` is a plain loop over the same app and
messages: as fast as Flower's apps can be called at all. `digits` has real sites and a priced run.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
from harness import Report, start

import fedveil
from fedveil.client.app import client_app
from fedveil.config import RunConfig, load_config
from fedveil.flower import ClientApp, Context, Message, RecordDict, set_identity
from fedveil.server.simulation import local, ray
from fedveil.server.simulation.ray_apps import with_number
from fedveil.wire import NO_LEDGER, TRAIN, Task, Update, pack, read_reply, read_task

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "digits-vae.toml"
WARM_UP = 3  # rounds that are not counted


class EnoughError(Exception):
    """The first round is over, and no more was wanted."""


client = ClientApp()


@client.train(TRAIN.partition(".")[2])
def answer(message: Message, context: Context) -> Message:
    """Zeros, at once, from a ledger that grows."""
    del context
    task = read_task(message.content)
    zeros = {name: np.zeros(array.shape) for name, array in task.arrays.items()}
    head = (task.ledger[0] + 1, "0" * 64)
    return Message(pack(Update(task.run_id, task.round, 0, zeros, {}, head)), reply_to=message)


with_number(client)


def main() -> None:
    """Every figure in one run; each of them in processes of its own, `local` and `ray` in turns."""
    if sys.argv[1:2] == ["run"]:
        print(json.dumps(_run(*sys.argv[2:])))
        return
    report = start(__doc__ or "")
    counts, repeats = ((10,), 1) if report.quick else ((2, 10, 100), 3)
    for sites in counts:
        found = [
            {engine: _process(engine, sites, report) for engine in ("local", "ray")}
            for _ in range(repeats)
        ]
        _add_rounds(report, sites, found)
        if sites == 10:
            for engine in ("local", "ray"):
                first = median(one[engine]["first"] for one in found)
                report.add(f"first_round_s_{engine}", first, "s")
    digits = [_process("digits", 10, report)["first"] for _ in range(repeats)]
    report.add("first_round_s_digits", median(digits), "s")
    report.finish()


def _add_rounds(
    report: Report, sites: int, found: Sequence[Mapping[str, Mapping[str, float]]]
) -> None:
    local_ms = median(one["local"]["round"] for one in found)
    loop_ms = median(one["local"]["loop"] for one in found)
    ray_ms = median(one["ray"]["round"] for one in found)
    report.add(f"loop_ms_{sites}", loop_ms, "ms")
    report.add(f"round_ms_{sites}_local", local_ms, "ms")
    report.add(f"round_ms_{sites}_ray", ray_ms, "ms")
    report.add(f"local_over_loop_{sites}", local_ms / loop_ms)
    report.add(f"ray_over_local_{sites}", ray_ms / local_ms)


def _process(engine: str, sites: int, report: Report) -> dict[str, float]:
    """Figures of one run in a process of its own; its start is when this asks for it."""
    rounds = {"local": 100, "ray": 30, "digits": 1}[engine]
    if report.quick:
        rounds = min(rounds, 20)
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, __file__, "run", engine, str(sites), str(rounds), str(time.monotonic())],
        stdout=subprocess.PIPE, check=True, env={**os.environ, "PYTHONPATH": here},
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _run(engine: str, sites: str, rounds: str, began: str) -> dict[str, float]:
    ends: list[float] = []

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            ends.append(time.monotonic())
            if engine == "digits":
                raise EnoughError

    with (
        tempfile.TemporaryDirectory(prefix="fedveil-bench-") as folder,
        mock.patch.object(ray, "APPS", (ray.APPS[0], "overhead:client")),
        mock.patch.object(local, "client_app", _client_of(engine)),
    ):
        config = _config(engine, int(sites), int(rounds))
        try:
            run = fedveil.simulate(config, out=Path(folder) / "run", observe=observe)
        except EnoughError:
            return {"first": ends[0] - float(began)}
        counted = ends[WARM_UP:]
        found = {
            "first": ends[0] - float(began),
            "round": 1e3 * (counted[-1] - counted[0]) / (len(counted) - 1),
        }
        if engine == "local":
            found["loop"] = _loop_ms(run, int(sites), int(rounds))
    return found


def _client_of(engine: str) -> Any:  # noqa: ANN401
    return client_app if engine == "digits" else lambda _: client


def _config(engine: str, sites: int, rounds: int) -> RunConfig:
    if engine == "digits":
        return load_config(EXAMPLE)
    return RunConfig.model_validate(
        {
            "federation": {"sites": sites, "rounds": rounds, "engine": engine},
            "data": {"source": "sklearn:digits", "holdout": 0.0},
            "model": {"family": "vae", "width": 4, "latent": 2},
            "privacy": {"mechanism": "none"},
        }
    )


def _loop_ms(run: fedveil.Run, sites: int, rounds: int) -> float:
    """A plain loop over the app, with a run's own messages."""
    config, schema = run.config.model_dump_json(by_alias=True), run.schema.model_dump_json()
    task = Task("0" * 16, 1, 0, config, schema, run._arrays, {}, {}, NO_LEDGER)  # noqa: SLF001
    set_identity(1, 0)
    contexts = [Context(1, node, {}, RecordDict(), {}) for node in range(1, sites + 1)]
    began = time.perf_counter()
    for _ in range(rounds):
        content = pack(task)
        for context in contexts:
            message = copy.deepcopy(Message(content, context.node_id, TRAIN))
            read_reply(client(message, context))
    return 1e3 * (time.perf_counter() - began) / rounds


if __name__ == "__main__":
    main()
