"""What federation costs in quality: `distributed` over 3, 10 and 50 sites beside pooled data.

Adult (../shared/data), a VAE, epsilon 3, the same rounds, batch, clipping and learning rate in each
arm; AUROC on the real test file of classifiers that were trained on 32,000 synthetic records, mean
of three classifiers and of the seeds. `pooled` is one site with a trusted server, `distributed` the
sites' shared noise in a secure sum (10 sites: n_min 9, t_collude 1, noise 1.118 times central),
`local` the same ten sites each for itself, its noise in full, at its own best schedule (30 rounds
of ten steps), `real` the classifiers trained on the real records.
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from adult_scores import aurocs
from harness import Report, start
from quality import ADULT, ROOT, encoded

import fedveil
from fedveil.config import Clean, load_config
from fedveil.data_prep import modality, run_schema

ARMS: Mapping[str, Mapping[str, Any]] = {
    "pooled": {"privacy.mechanism": "central", "federation.sites": 1},
    "distributed": {"federation.sites": 10, "secagg.n_min": 9, "secagg.t_collude": 1},
    "local": {
        "privacy.mechanism": "local",
        "federation.sites": 10,
        "federation.rounds": 30,
        "training.local_steps": 10,
    },
    "distributed_3": {"federation.sites": 3},
    "distributed_50": {"federation.sites": 50},
}


def main() -> None:
    """TSTR AUROC of each arm, its spread over seeds, seconds, and the gap to pooled data."""
    report = start(__doc__ or "")
    if not (ADULT / "adult-test.csv").is_file():
        print(f"federation_gap: {ADULT} has no adult-test.csv", file=sys.stderr)
        sys.exit(1)
    seeds = 1 if report.quick else 3
    arms = ("pooled", "distributed") if report.quick else tuple(ARMS)
    found: dict[str, list[float]] = {name: [] for name in arms}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    # Arm by arm within a seed, so that a slow hour of the machine is everybody's.
    for seed in range(seeds):
        for name in arms:
            run = _run(ARMS[name], seed, report)
            found[name].append(_auroc(run, seed))
            seconds[name].append(run.metrics["seconds"]["total"])
            print(f"seed {seed}, {name}: {found[name][-1]:.4f}", file=sys.stderr, flush=True)
    for name in arms:
        report.add(f"auroc_{name}", float(np.mean(found[name])))
        report.add(f"auroc_{name}_spread", max(found[name]) - min(found[name]))
        report.add(f"seconds_{name}", float(np.mean(seconds[name])), "s")
        report.add(f"excess_{name}", _excess(ARMS[name]), "times central noise")
    for name in arms[1:]:
        gap = float(np.mean(found["pooled"])) - float(np.mean(found[name]))
        report.add(f"gap_{name}", gap)
    if not report.quick:
        _real(report)
    report.finish()


def _settings(arm: Mapping[str, Any], seed: int, report: Report) -> dict[str, Any]:
    settings = {"federation.seed": seed, "evaluation.every": 0, **arm}
    if report.quick:
        settings |= {"federation.rounds": 20}
    return settings


def _run(arm: Mapping[str, Any], seed: int, report: Report) -> fedveil.Run:
    config = load_config(ROOT / "examples" / "adult-vae.toml", _settings(arm, seed, report))
    folder = Path(tempfile.mkdtemp(prefix="fedveil-bench-"))
    return fedveil.simulate(config, out=folder / "run")


def _auroc(run: fedveil.Run, seed: int) -> float:
    kind = modality(run.schema)
    test = encoded(ADULT / "adult-test.csv", run.schema)
    frame = pl.DataFrame(run.sample(32_000, seed))
    cleaned, _ = kind.clean(frame.cast(pl.String), run.schema, Clean())
    return float(np.mean(list(aurocs(kind.encode(cleaned, run.schema), test).values())))


def _excess(arm: Mapping[str, Any]) -> float:
    from fedveil.privacy.plan import plan

    return plan(load_config(ROOT / "examples" / "adult-vae.toml", dict(arm)).resolved()).excess


def _real(report: Report) -> None:
    schema = run_schema(load_config(ROOT / "examples" / "adult-vae.toml"))
    train, test = (encoded(ADULT / f"adult-{part}.csv", schema) for part in ("train", "test"))
    report.add("auroc_real", float(np.mean(list(aurocs(train, test).values()))))


if __name__ == "__main__":
    main()
