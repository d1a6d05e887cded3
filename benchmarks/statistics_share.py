"""Which share of a budget the statistics should have: a warm-started VAE by `statistics_share`.

The defaults of `privacy.statistics_share` come from here. The noise is added once, at a trusted
server, so that a run costs no secure sums: it is the noise of `distributed` but for its excess.
"""

import tempfile
from pathlib import Path
from statistics import fmean

from adult_scores import as_encoded, auroc, read
from harness import Report, start
from mnist import tstr

import fedveil
from fedveil.config import load_config

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
SHARES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
EPSILONS = (1.0, 3.0)


def main() -> None:
    """Runs each share, at each epsilon, on each kind of data."""
    report = start(str(__doc__).splitlines()[0])
    shares = (0.0, 1.0) if report.quick else SHARES
    seeds = range(1 if report.quick else 2)
    for epsilon in EPSILONS[-1:] if report.quick else EPSILONS:
        for share in shares:
            name = f"eps{epsilon:g}_share{share:g}".replace(".", "_")
            scores = [_adult(epsilon, share, seed, report) for seed in seeds]
            report.add(f"adult_auroc_{name}", fmean(scores))
            if not report.quick:
                report.add(f"mnist_tstr_{name}", _mnist(epsilon, share, report))
    report.finish()


def _adult(epsilon: float, share: float, seed: int, report: Report) -> float:
    """AUROC on the real test file of classifiers that learn from 32,000 synthetic records."""
    settings = {"data.records": 32561, "federation.rounds": 20 if report.quick else 200}
    run = _run("adult-vae.toml", epsilon, share, seed, settings)
    schema = run.schema
    return auroc(
        as_encoded(run.sample(32_000, seed), schema), read(DATA / "adult-test.csv", schema)
    )


def _mnist(epsilon: float, share: float, report: Report) -> float:
    """Accuracy on the real test images of a network that learns from synthetic ones."""
    del report
    settings = {"federation.rounds": 100, "data.partition": "iid"}
    return tstr(_run("mnist-vae.toml", epsilon, share, 0, settings), 20_000)


def _run(
    example: str, epsilon: float, share: float, seed: int, settings: dict[str, object]
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
