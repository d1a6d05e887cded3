"""What a mechanism claims of its releases on known records, what was seen, and what was found."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Shares:
    """Noise that several sites add, a share each: sigma / sqrt(least) each.

    Attributes:
        sites: Shares in each release, |U|.
        least: How many of them the account counts on: n_min - t_collude; 1 if each is full.
        grid: Width of the integer grid that each site rounds to, in units of the release; 0 if
            none. Rounding adds at most grid^2 / 4 of variance a site.

    Raises:
        ValueError: They cannot be.
    """

    sites: int
    least: int
    grid: float = 0.0

    def __post_init__(self) -> None:
        _whole(sites=self.sites, least=self.least)
        if self.least > self.sites:
            raise ValueError(f"least = {self.least}: must be at most sites = {self.sites}")
        if not 0 <= self.grid < math.inf:
            raise ValueError(f"grid = {self.grid}: must be >= 0 and finite")


@dataclass(frozen=True)
class Claim:
    """What the releases are said to be; all of it public.

    Attributes:
        sigma: Standard deviation of the noise that is accounted for in each coordinate.
        clip: What each record adds to its slot: the clipping norm over `CLIPPING_SLACK`.
        rate: Chance of a record to be in a step, by its own coin.
        slots: Coordinates that records pull; the first ones.
        records: Records that pull each slot, over all sites that are in a release.
        steps: Releases made.
        per_commit: Releases that one commit in a ledger pays for.
        shares: How the noise is shared out; nothing if it is added once.

    Raises:
        ValueError: A number is out of its range.
    """

    sigma: float
    clip: float
    rate: float
    slots: int
    records: int
    steps: int
    per_commit: int = 1
    shares: Shares | None = None

    def __post_init__(self) -> None:
        for name in ("sigma", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} = {getattr(self, name)}: must be > 0 and finite")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate = {self.rate}: must be > 0 and at most 1")
        names = ("slots", "records", "steps", "per_commit")
        _whole(**{name: getattr(self, name) for name in names})
        if self.steps % self.per_commit:
            raise ValueError(f"per_commit = {self.per_commit}: must divide steps = {self.steps}")
        if self.shares and self.shares.grid > self.share / 2:
            raise ValueError(
                f"grid = {self.shares.grid}: must be at most {self.share / 2:g}, half of a share's "
                "standard deviation; take a finer one"
            )

    @property
    def share(self) -> float:
        """Standard deviation of one site's noise."""
        return self.sigma / math.sqrt(self.shares.least if self.shares else 1)

    @property
    def noise(self) -> float:
        """That of a release's noise: more than accounted for if more sites are in it."""
        return self.share * math.sqrt(self.sites)

    @property
    def sites(self) -> int:
        """Noises in a release."""
        return self.shares.sites if self.shares else 1

    @property
    def rounding(self) -> float:
        """By which factor rounding raises the standard deviation of a share, or of all, at most."""
        grid = self.shares.grid if self.shares else 0.0
        return math.sqrt(1 + (grid / self.share) ** 2 / 4)

    @property
    def grid_chance(self) -> float:
        """What one value of the grid has of a release's probability at most."""
        grid = self.shares.grid if self.shares else 0.0
        return grid / (self.noise * math.sqrt(2 * math.pi))


@dataclass(frozen=True, eq=False)
class Observed:
    """What was seen.

    Attributes:
        released: [steps, d], one release a row, in the units of the claim.
        committed: By ledger, the indices it has committed, from 1.
        shares: [sites, steps, k], each site's own noise at k coordinates without records, in the
            same units: its share before masking, or its release where it releases by itself.
    """

    released: np.ndarray
    committed: Mapping[str, tuple[int, ...]]
    shares: np.ndarray | None = None


@dataclass(frozen=True)
class Check:
    """One statistic against the interval that it keeps to when all is as claimed.

    Attributes:
        name: What is checked.
        statistic: What was found.
        low: Least that passes; may be infinite.
        high: Most that passes; may be infinite.
        passed: Whether it does.
        violation: What `detectable` and `wanted` measure.
        detectable: The smallest violation that would have failed with probability 0.9 (by a normal
            or chi-squared approximation where its law is not known); infinite if none would have.
        wanted: The violation that a conclusive test must be able to see; infinite if none.
    """

    name: str
    statistic: float
    low: float
    high: float
    passed: bool
    violation: str
    detectable: float
    wanted: float

    @property
    def conclusive(self) -> bool:
        """Whether there were enough data."""
        return self.detectable <= self.wanted


def _whole(**values: int) -> None:
    for name, value in values.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} = {value!r}: must be a whole number >= 1")
