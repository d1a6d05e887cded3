"""Which share of a budget the statistics should have: a warm-started VAE by `statistics_share`.

The defaults of `privacy.statistics_share` come from here. The noise is added once, at a trusted
server, so that a run costs no secure sums: it is the noise of `distributed` but for its excess.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
from adult_scores import as_encoded, auroc, read
from harness import start
from mnist import accuracy

import fedveil
from fedveil.config import load_config
from fedveil.data_prep.schema import TableSchema

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
SHARES = (0.0, 0.3, 0.6, 0.9, 1.0)
EPSILONS = (1.0, 3.0)


def main() -> None:
    """Runs each share, at each epsilon, on each kind of data."""
    report = start(str(__doc__).splitlines()[0])
    shares = (0.0, 1.0) if report.quick else SHARES
    for epsilon in EPSILONS[-1:] if report.quick else EPSILONS:
        for share in shares:
            name = f"eps{epsilon:g}_share{share:g}".replace(".", "_")
            auroc_found = _adult(epsilon, share, 0, quick=report.quick)
            report.add(f"adult_auroc_{name}", auroc_found)
            if not report.quick:
                report.add(f"mnist_tstr_{name}", _mnist(epsilon, share))
    report.finish()


def _adult(epsilon: float, share: float, seed: int, *, quick: bool) -> float:
    """AUROC on the real test file of classifiers that learn from 32,000 synthetic records."""
    settings = {"data.records": 32561, "federation.rounds": 20 if quick else 200}
    run = _run("adult-vae.toml", epsilon, share, seed, settings)
    table, schema = run.sample(32_000, seed), run.schema
    if not isinstance(schema, TableSchema) or not isinstance(table, pl.DataFrame):
        raise TypeError("adult-vae.toml: makes no table")
    return auroc(as_encoded(table, schema), read(DATA / "adult-test.csv", schema))


def _mnist(epsilon: float, share: float) -> float:
    """Accuracy on the real test images of a network that learns from synthetic ones."""
    settings = {"federation.rounds": 100, "data.partition": "iid"}
    run = _run("mnist-vae.toml", epsilon, share, 0, settings)
    labels = [index % 10 for index in range(20_000)]
    with np.load(DATA / "mnist.npz") as arrays:
        test = arrays["test_images"], arrays["test_labels"]
    return accuracy((np.asarray(run.sample(len(labels), 0, labels)), np.array(labels)), test, 3)


def _run(
    example: str, epsilon: float, share: float, seed: int, settings: Mapping[str, object]
) -> fedveil.Run:
    config = load_config(
        ROOT / "examples" / example,
        {
            "privacy.epsilon": epsilon,
            "privacy.statistics_share": share,
            "privacy.mechanism": "central",
            "federation.seed": seed,
            "federation.sites": 4,
            "data.holdout": 0.0,
            **settings,
        },
    )
    return fedveil.simulate(config, out=Path(tempfile.mkdtemp(prefix="fedveil-")) / "run")


if __name__ == "__main__":
    main()
