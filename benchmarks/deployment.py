"""What a deployed round costs besides the sites' work: four sites on loopback, real processes, TLS.

Of ours, and of plain Flower as its documentation deploys it, in turns. A plain round is without a
mechanism, its sites answer random arrays at once; a secure one is the digits example under a secure
sum, by real sites. The overhead is the round's seconds less the slowest site's own work, step by
step. A round of 100 MB is 25 million float32 there and back, each site's
its own. `flower` polls as it does by default, `flower_quick` looks for tasks ten times a second.
`--quick` measures ours alone, without the 100 MB.
"""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

from deployment_flower import plain
from deployment_ours import Measured, deployed, loopback_bytes
from harness import Report, start

from fedveil.config import RunConfig, load_config

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "digits-vae.toml"
SMALL, LARGE = 4, 705  # widths of the model: 2 thousand parameters, 25 million
SHAPES = {SMALL: [[46, 46]], LARGE: [[5000, 5000]]}  # plain Flower's as many
QUICK_POLL = 0.1  # seconds


def main() -> None:
    """Every figure in one run."""
    report = start(__doc__ or "")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and so nothing is left behind
    turns, plain_rounds, secure_rounds = (1, 6, 3) if report.quick else (2, 6, 6)
    large_rounds = 0 if report.quick else 3
    found: dict[str, list[float]] = {}

    def keep(name: str, values: list[float]) -> None:
        found.setdefault(name, []).extend(values)

    for _ in range(turns):
        with deployed(secure(2)) as ours:
            _keep_ours(keep, "round", ours.run(without(SMALL, plain_rounds)))
            _keep_ours(keep, "secure_round", ours.run(secure(secure_rounds)))
            if large_rounds:
                measured = ours.run(without(LARGE, large_rounds))
                keep("round_100mb_s", measured.sites)
                keep("round_100mb_bytes", measured.sent)
        if report.quick:  # plain Flower takes a minute by itself
            continue
        for name, poll in (("flower", None), ("flower_quick", QUICK_POLL)):
            with plain(poll) as peer:
                keep(f"{name}_round_s", peer.run(SHAPES[SMALL], 1 + plain_rounds // 2))
                if poll is not None:
                    before = loopback_bytes()
                    keep("flower_100mb_s", peer.run(SHAPES[LARGE], large_rounds))
                    keep("flower_100mb_bytes", [(loopback_bytes() - before) / large_rounds])
    _tell(report, {name: median(values) for name, values in found.items()})
    report.finish()


def _keep_ours(keep: Callable[[str, list[float]], None], name: str, run: Measured) -> None:
    over = [whole - own for whole, own in zip(run.seconds, run.answers, strict=True)]
    keep(f"{name}_overhead_s", over)
    keep(f"{name}_sites_s", run.answers)
    keep(f"{name}_bytes", run.sent)


def _tell(report: Report, figures: dict[str, float]) -> None:
    for name, value in figures.items():
        report.add(name, value, "s" if name.endswith("_s") else "bytes")
    for ours, theirs in (
        ("round_overhead", "flower_round"),
        ("round_overhead", "flower_quick_round"),
        ("secure_round_overhead", "flower_round"),
        ("secure_round_overhead", "flower_quick_round"),
        ("round_100mb", "flower_100mb"),
    ):
        if f"{ours}_s" in figures and f"{theirs}_s" in figures:
            ratio = figures[f"{ours}_s"] / figures[f"{theirs}_s"]
            report.add(f"{ours}_over_{theirs}", ratio)


def secure(rounds: int) -> RunConfig:
    """The digits example, with four sites and no evaluation."""
    settings = {
        "federation.sites": 4, "federation.rounds": rounds, "federation.patience": 5.0,
        "evaluation.every": 0, "evaluation.samples": 200, "secagg.deadline": 120.0,
    }  # fmt: skip
    return load_config(EXAMPLE, settings)


def without(width: int, rounds: int) -> RunConfig:
    """A run without a mechanism, of a model of some width."""
    return RunConfig.model_validate(
        {
            "federation": {"sites": 4, "rounds": rounds, "patience": 5.0},
            "data": {"source": "sklearn:digits", "holdout": 0.0},
            "model": {"family": "vae", "width": width, "latent": 2},
            "privacy": {"mechanism": "none"},
            "aggregation": {"strategy": "fedavg"},
        }
    )


if __name__ == "__main__":
    main()
