"""Adult by statistics alone: what classifiers learn from the synthetic table; beside peers.

All 32,561 training records at delta 1e-5, from the declared domain of `examples/adult.schema.toml`;
as many synthetic ones, scored on the real test file (`adult_scores.py`): mean AUROC of three
classifiers, and the distance of pairs of columns (`tvd2`). `pooled` is the same fit to the same
queries, asked at one place with as much noise as ten sites together add. The peers
(`adult_peers.py`) see all records at one place; they take turns with Fedveil, seed by seed. Their
domain is the declared one, so that none of their budget goes to finding it. `--quick` leaves them
out, and all but ten sites at epsilon 1. Without the files of ../shared/data nothing is measured.
"""

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import adult_peers
import numpy as np
import torch
from adult_scores import as_encoded, auroc, read, tvd2
from harness import Report, start

import fedveil
from fedveil.api import resolve
from fedveil.config import RunConfig, load_config
from fedveil.data_prep import Encoded, modality
from fedveil.data_prep.queries import answers, noisy, run_workload
from fedveil.data_prep.schema import TableSchema, load_schema
from fedveil.models import family
from fedveil.privacy.plan import plan

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
EXAMPLE = ROOT / "examples" / "adult-vae.toml"
DELTA = 1e-5
SEEDS = 3
PEERS = {"mst": SEEDS, "aim": SEEDS, "patectgan": SEEDS, "dpctgan": 1}
"""For how many seeds; the last takes about a quarter of an hour."""
LIMIT = 1800.0
"""Seconds after which a peer is given up."""

Made = tuple[Encoded, float]
"""Synthetic records, and the seconds of making them."""


def main() -> None:
    """AUROC, distance and seconds of each, means over the seeds; then all beside real records."""
    report = start(__doc__ or "")
    if not (DATA / "adult-test.csv").is_file():
        print(f"adult: left out, {DATA} has no adult-test.csv", file=sys.stderr)
        report.finish()
        return
    schema = load_schema(ROOT / "examples" / "adult.schema.toml")
    if not isinstance(schema, TableSchema):
        raise TypeError("adult.schema.toml: is no table's")
    train, test = (read(DATA / f"adult-{part}.csv", schema) for part in ("train", "test"))
    report.add("auroc_real", auroc(train, test))
    report.add("tvd2_real", tvd2(train, test, schema))
    found = _measured(report, train, test, schema)
    for name, figures in found.items():
        _add(report, name, figures)
    _beside_real(report, found)
    report.finish()


def _measured(
    report: Report, train: Encoded, test: Encoded, schema: TableSchema
) -> dict[str, dict[str, list[float]]]:
    """By contestant and figure, a number for each seed; the contestants take turns."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory(prefix="fedveil-bench-") as folder:
        makers = _ours(report, train, schema, Path(folder))
        if not report.quick:
            makers |= _theirs(train, schema, Path(folder))
        for seed in range(1 if report.quick else SEEDS):
            for name, make in tuple(makers.items()):
                made = make(seed)
                if made is None:
                    del makers[name]
                    continue
                records, seconds = made
                found[name]["auroc"].append(auroc(records, test, seed))
                found[name]["tvd2"].append(tvd2(records, test, schema))
                found[name]["seconds"].append(seconds)
    return found


# Fedveil.


def _ours(
    report: Report, train: Encoded, schema: TableSchema, folder: Path
) -> dict[str, Callable[[int], Made | None]]:
    def federated(epsilon: float, sites: int) -> Callable[[int], Made]:
        def make(seed: int) -> Made:
            out = folder / f"run-{epsilon:g}-{sites}-{seed}"
            began = time.perf_counter()
            run = fedveil.simulate(_config(epsilon, sites, seed), out=out)
            table: Any = run.sample(len(train.y), seed)
            seconds = time.perf_counter() - began
            return as_encoded(table, schema), seconds

        return make

    makers: dict[str, Callable[[int], Made | None]] = {"eps1": federated(1.0, 10)}
    if not report.quick:
        makers["pooled_eps1"] = lambda seed: _pooled(_config(1.0, 10, seed), train, seed)
        makers |= {"eps0_3": federated(0.3, 10), "100_sites_eps1": federated(1.0, 100)}
    return makers


def _config(epsilon: float, sites: int, seed: int) -> RunConfig:
    settings = {
        "model.family": "marginal", "federation.sites": sites, "federation.seed": seed,
        "data.source": str(DATA / "adult-train.csv"), "data.holdout": 0.0,
        "privacy.epsilon": epsilon, "privacy.delta": DELTA,
    }  # fmt: skip
    return load_config(EXAMPLE, settings)


def _pooled(asked_of: RunConfig, train: Encoded, seed: int) -> Made:
    """The run's own queries and fit, the records and the noise of all its sites at one place."""
    config, schema = resolve(asked_of)
    kind, priced = family(config.model.family), plan(config)
    assert kind.fit is not None
    began = time.perf_counter()
    asked = run_workload(config, schema, priced.statistics_noise)
    scale = priced.statistics_noise * asked.sensitivity * priced.excess
    noise = np.random.default_rng(seed).normal(0, scale, asked.length)
    released = noisy(asked, answers(asked, train, schema) + noise, scale, config.trained)
    generator = torch.Generator().manual_seed(seed)
    module = kind.fit(config.model, schema, released, generator)
    drawn = kind.sample(module, len(train.y), generator)
    table = modality(schema).decode(Encoded(drawn.x.numpy(), drawn.y.numpy()), schema)
    seconds = time.perf_counter() - began
    assert isinstance(schema, TableSchema)
    return as_encoded(table, schema), seconds


# Peers.


def _theirs(
    train: Encoded, schema: TableSchema, folder: Path
) -> dict[str, Callable[[int], Made | None]]:
    python = adult_peers.environment()
    if python is None:
        return {}

    def maker(peer: str, seeds: int) -> Callable[[int], Made | None]:
        def make(seed: int) -> Made | None:
            if seed >= seeds:
                return None
            order = adult_peers.Order(peer, 1.0, DELTA, seed, LIMIT)
            found = adult_peers.run(python, order, train, schema, folder)
            if found.records is None:
                print(f"{peer}: left out: {found.fault}", file=sys.stderr)
                return None
            return found.records, found.seconds

        return make

    return {f"{peer}_eps1": maker(peer, seeds) for peer, seeds in PEERS.items()}


# Figures.


def _add(report: Report, name: str, figures: dict[str, list[float]]) -> None:
    for figure, values in figures.items():
        report.add(f"{figure}_{name}", fmean(values), "s" if figure == "seconds" else "")
        if figure == "auroc" and len(values) > 1:
            report.add(f"{figure}_{name}_spread", max(values) - min(values))


def _beside_real(report: Report, found: dict[str, dict[str, list[float]]]) -> None:
    """What is left of the real records' advantage over chance, and the seconds."""
    if not report.as_json:
        print(f"\n{'':24} {'of real':>8} {'seconds':>9}")
    for name, figures in found.items():
        share = (fmean(figures["auroc"]) - 0.5) / (report.figures["auroc_real"] - 0.5)
        report.figures[f"of_real_{name}"] = round(share, 6)
        if not report.as_json:
            print(f"{name:24} {share:8.3f} {fmean(figures['seconds']):9.1f}")


if __name__ == "__main__":
    main()
