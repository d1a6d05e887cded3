"""MNIST from statistics alone: a small CNN trained on synthetic images, tested on real ones.

Ten simulated sites answer one secure round of class moments; the family `marginal` is fitted to it.
Needs ../shared/data/mnist.npz. `real` is the same CNN trained on the real training images.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import Report, start
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import fedveil
from fedveil.config import load_config

ROOT = Path(__file__).resolve().parents[1]
MNIST = ROOT.parent / "shared" / "data" / "mnist.npz"
CONFIG = """
[federation]
name = "mnist"
sites = 10

[data]
source = {source}
schema = {schema}
records = 60000
holdout = 0.0

[model]
family = "marginal"

[privacy]
epsilon = {epsilon}
delta = 1e-5
"""


def main() -> None:
    """Accuracies on the 10,000 real test images, and seconds."""
    report = start(__doc__ or "")
    if not MNIST.is_file():
        print(f"mnist: left out, there is no {MNIST}", file=sys.stderr)
        report.finish()
        return
    images, epochs = (10_000, 2) if report.quick else (60_000, 4)
    with np.load(MNIST) as arrays:
        train = (arrays["train_images"], arrays["train_labels"])
        test = (arrays["test_images"], arrays["test_labels"])
    for epsilon in (1, 10):
        synthetic(report, epsilon, images, epochs, test)
    some = np.random.default_rng(0).permutation(len(train[1]))[:images]
    report.add("tstr_real", accuracy((train[0][some], train[1][some]), test, epochs))
    report.finish()


def synthetic(
    report: Report, epsilon: int, images: int, epochs: int, test: tuple[np.ndarray, np.ndarray]
) -> None:
    """A run, its samples of equally many images a class, and the CNN that learns from them."""
    folder = Path(tempfile.mkdtemp(prefix="fedveil-bench-"))
    schema = ROOT / "examples" / "mnist.schema.toml"
    file = folder / "mnist.toml"
    text = CONFIG.format(source=f'"{MNIST}"', schema=f'"{schema}"', epsilon=float(epsilon))
    file.write_text(text, encoding="utf-8")
    began = time.perf_counter()
    run = fedveil.simulate(load_config(file), out=folder / "run")
    fitted = time.perf_counter()
    labels = [index % 10 for index in range(images)]
    x = np.asarray(run.sample(images, 0, labels))
    sampled = time.perf_counter()
    report.add(f"tstr_marginal_eps{epsilon}", accuracy((x, np.array(labels)), test, epochs))
    report.add(f"seconds_run_eps{epsilon}", fitted - began, "s")
    report.add(f"seconds_sample_eps{epsilon}", sampled - fitted, "s")


def accuracy(
    train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], epochs: int
) -> float:
    """Of the CNN trained on the one, over the other: images [N, 28, 28] uint8, labels [N]."""
    torch.manual_seed(0)
    x, y = _tensors(*train)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    batches = len(x) // 128
    optimiser = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        for rows in torch.randperm(len(x))[: batches * 128].view(batches, 128):
            optimiser.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
            schedule.step()
    with torch.no_grad():
        real, known = _tensors(*test)
        return float((model(real).argmax(dim=1) == known).float().mean())


def _tensors(images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    x = torch.from_numpy(images.reshape(-1, 1, 28, 28).astype(np.float32) / 255)
    return x, torch.from_numpy(labels.astype(np.int64))


if __name__ == "__main__":
    main()
