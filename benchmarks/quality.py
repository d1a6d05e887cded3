"""How good the synthetic records are: trained on synthetic, tested on real (TSTR), and the seconds.

Digits need nothing; Adult needs the files of ../shared/data (or `--data FOLDER`) and is left out
where they are missing. `real` is the same classifier trained on the real training records.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from adult_scores import aurocs
from harness import Report, start

import fedveil
from fedveil.config import Clean, load_config
from fedveil.data_prep import Encoded, modality
from fedveil.data_prep.schema import Schema

ROOT = Path(__file__).resolve().parents[1]
ADULT = ROOT.parent / "shared" / "data"


def main() -> None:
    """TSTR by data set and mechanism, mean over the runs, and their seconds."""
    report = start(__doc__ or "")
    repeats = 1 if report.quick else 3
    digits(report, repeats)
    if (ADULT / "adult-test.csv").is_file():
        adult(report, 1 if report.quick else repeats)
    else:
        print(f"adult: left out, {ADULT} has no adult-test.csv", file=sys.stderr)
    report.finish()


def digits(report: Report, repeats: int) -> None:
    """Accuracy of logistic regression on all 1,797 real digits, those trained on included."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    bunch = load_digits()
    real_x, real_y = bunch.images.reshape(len(bunch.images), -1) / 16, bunch.target
    for mechanism in (
        ("distributed",) if report.quick else ("distributed", "central", "local", "none")
    ):
        scores, seconds, runs = [], [], []
        for seed in range(repeats):
            run = _simulate("digits-vae.toml", mechanism, seed, report)
            labels = [index % 10 for index in range(2000)]
            images = np.asarray(run.sample(2000, seed, labels)).reshape(2000, -1) / 255
            model = LogisticRegression(max_iter=1000).fit(images, labels)
            scores.append(float(model.score(real_x, real_y)))
            seconds.append(run.metrics["seconds"]["total"])
            runs.append(run)
        _add(report, f"digits_{mechanism}", "accuracy", scores, seconds)
        _accounted(report, f"digits_{mechanism}", runs, "sklearn:digits")


def adult(report: Report, repeats: int) -> None:
    """AUROC on the real test file, mean of three classifiers, of 32,000 synthetic records."""
    for mechanism in (
        ("distributed",) if report.quick else ("distributed", "central", "local", "none")
    ):
        scores, seconds, runs = [], [], []
        for seed in range(repeats):
            run = _simulate("adult-vae.toml", mechanism, seed, report)
            kind = modality(run.schema)
            test = encoded(ADULT / "adult-test.csv", run.schema)
            frame = pl.DataFrame(run.sample(32_000, seed))
            cleaned, _ = kind.clean(frame.cast(pl.String), run.schema, Clean())
            by_model = aurocs(kind.encode(cleaned, run.schema), test)
            for name, value in by_model.items():
                if repeats == 1:
                    report.add(f"adult_{mechanism}_auroc_{name}", value)
            scores.append(float(np.mean(list(by_model.values()))))
            seconds.append(run.metrics["seconds"]["total"])
            runs.append(run)
        _add(report, f"adult_{mechanism}", "auroc", scores, seconds)
        _accounted(report, f"adult_{mechanism}", runs, str(ADULT / "adult-test.csv"))
    train = encoded(ADULT / "adult-train.csv", run.schema)
    report.add("adult_real_auroc", float(np.mean(list(aurocs(train, test).values()))))


def _simulate(example: str, mechanism: str, seed: int, report: Report) -> fedveil.Run:
    settings: dict[str, Any] = {"privacy.mechanism": mechanism, "federation.seed": seed}
    if mechanism == "local":
        # Every release is a site's own and noised in full: what a trusted server adds once, each
        # site adds in each step. Thirty rounds of ten steps, as a federation would run them.
        settings |= {"federation.rounds": 30, "training.local_steps": 10}
    if report.quick:
        settings["federation.rounds"] = 60
    folder = Path(tempfile.mkdtemp(prefix="fedveil-bench-"))
    config = load_config(ROOT / "examples" / example, settings)
    return fedveil.simulate(config, out=folder / "run")


def _accounted(report: Report, prefix: str, runs: list[fedveil.Run], data: str) -> None:
    """The runs' own accounted figures of held-out records, beside exact ones of public data."""
    exact = [run.evaluate(data)["figures"] for run in runs]
    for name in runs[0].metrics["quality"]:
        figures = [run.metrics["quality"][name] for run in runs]
        report.add(f"{prefix}_accounted_{name}", float(np.mean([f["value"] for f in figures])))
        report.add(
            f"{prefix}_accounted_{name}_noise", float(np.mean([f["noise"] for f in figures]))
        )
        report.add(f"{prefix}_exact_{name}", float(np.mean([found[name] for found in exact])))


def encoded(path: Path, schema: Schema) -> Encoded:
    """The records of a file, cleaned and encoded."""
    kind = modality(schema)
    cleaned, _ = kind.clean(kind.read(str(path), schema), schema, Clean())
    return kind.encode(cleaned, schema)


def _add(
    report: Report, prefix: str, metric: str, scores: list[float], seconds: list[float]
) -> None:
    report.add(f"{prefix}_{metric}", float(np.mean(scores)))
    if len(scores) > 1:
        report.add(f"{prefix}_{metric}_spread", max(scores) - min(scores))
    report.add(f"{prefix}_seconds", float(np.mean(seconds)), "s")


if __name__ == "__main__":
    main()
