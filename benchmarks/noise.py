"""Cryptographic Gaussian noise, beside torch's generator and the keystream that it is made of."""

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
                "ours": lambda count=count: coins.gaussian((count,), 1.0),  # type: ignore[misc]
                # Opacus's secure mode: four draws a sample (from torch's generator here).
                "torch_four": lambda count=count: sum(torch.randn(count) for _ in range(4)),  # type: ignore[misc]
                "torch_one": lambda count=count: torch.randn(count),  # type: ignore[misc]
                # The limit: the 32 bytes of AES-256-CTR that every sample is made of.
                "keystream": lambda count=count: coins.words(4 * count),  # type: ignore[misc]
            },
            repeats=5 if count > 1_000_000 else 15,
        )
        for name, value in seconds.items():
            report.add(f"{name}_ns_{count}", 1e9 * value / count, "ns a sample")
        report.add(f"ours_over_torch_four_{count}", seconds["ours"] / seconds["torch_four"])
        report.add(f"ours_over_keystream_{count}", seconds["ours"] / seconds["keystream"])
    report.finish()


if __name__ == "__main__":
    main()
