"""Cryptographic Gaussian noise, beside torch's generator and the keystream that it is made of."""

from functools import partial

import torch
from harness import interleaved, start

from fedveil.privacy.noise import Coins


def main() -> None:
    """Nanoseconds a sample, and ratios."""
    report = start(__doc__ or "")
    torch.set_num_threads(1)
    coins = Coins.from_system()
    for count in (20_000, 1_000_000) if report.quick else (20_000, 1_000_000, 10_000_000):
        seconds = interleaved(
            {
                "ours": partial(coins.gaussian, (count,), 1.0),
                # Opacus's secure mode: four draws a sample (from torch's generator here).
                "torch_four": partial(_four, count),
                "torch_one": partial(torch.randn, count),
                # The limit: the 32 bytes of AES-256-CTR that every sample is made of.
                "keystream": partial(coins.words, 4 * count),
            },
            repeats=5 if count > 1_000_000 else 15,
        )
        for name, value in seconds.items():
            report.add(f"{name}_ns_{count}", 1e9 * value / count, "ns a sample")
        report.add(f"ours_over_torch_four_{count}", seconds["ours"] / seconds["torch_four"])
        report.add(f"ours_over_keystream_{count}", seconds["ours"] / seconds["keystream"])
    report.finish()


def _four(count: int) -> torch.Tensor:
    return (torch.randn(4, count)).sum(dim=0) / 2


if __name__ == "__main__":
    main()
