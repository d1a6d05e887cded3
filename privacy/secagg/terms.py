"""What a session is about: numbers, roster, blocks; and the hashes that bind everything to it.

The context of a round is a chain of hashes: the set-up (run, epoch, roster with identities,
numbers), then the round keys that every member signed, then members, round, model and blocks. Each
signature, associated data and key derivation has one of them in it, the last where there is one.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

from ...config import least_threshold
from .encoding import MAX_WORDS, Hash, Index, Key, Many, Name, Number, Real, encode
from .errors import (
    BelowFloorError,
    LoweredThresholdError,
    TooFewSitesError,
    TooManyColludersError,
    UnsafeNumbersError,
)
from .keys import digest
from .quantise import saturation
from .shamir import MAX_POINTS

MAX_SITES = MAX_POINTS  # the graph is full: it is meant for about a hundred
MAX_ROUNDS = 4096
MAX_EPOCH = 2**32 - 2  # the one after it has a number, too
MAX_SCALE = 2.0**62  # steps for one unit; however small that is
Sites = Annotated[tuple[Index, ...], Many(0, MAX_SITES, ascending=True)]
"""A set of sites, by their places on the roster."""


@dataclass(frozen=True)
class Numbers:
    """How many sites there are, and against how many the sum is safe; public and signed.

    Attributes:
        n: Sites on the roster.
        t: Threshold: shares that rebuild a secret, and signatures that a set of uploaders needs.
        n_min: The least number of uploaders that each site checks before it signs.
        t_collude: Colluding sites that the guarantee allows for, beside the server.

    Raises:
        UnsafeNumbersError: The guarantee would not hold.
    """

    n: Index
    t: Index
    n_min: Index
    t_collude: Index

    def __post_init__(self) -> None:
        for name in ("n", "t", "n_min", "t_collude"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise UnsafeNumbersError(f"{name} = {value!a}: expected a whole number >= 0")
        least = least_threshold(self.n, self.t_collude)
        if not 2 <= self.n <= MAX_SITES:
            raise UnsafeNumbersError(f"n = {self.n}: expected 2 to {MAX_SITES} sites")
        if self.t_collude > self.n_min - 2:
            raise TooManyColludersError(
                f"t_collude = {self.t_collude}: expected at most {self.n_min - 2}, n_min - 2, so "
                "that two honest sites are in each sum; raise n_min"
            )
        if self.t < least:
            raise LoweredThresholdError(
                f"t = {self.t}: expected at least {least}, floor((n + t_collude) / 2) + 1 with n = "
                f"{self.n} and t_collude = {self.t_collude}; raise t or lower t_collude"
            )
        if not self.t <= self.n_min <= self.n:
            raise UnsafeNumbersError(
                f"n_min = {self.n_min}: expected {self.t} to {self.n}, from t to n"
            )

    def noise_share(self, sigma: float) -> float:
        """The standard deviation that each site adds: sigma / sqrt(n_min - t_collude).

        The honest of any n_min uploaders then have `sigma` in the sum between them.

        Raises:
            UnsafeNumbersError: Nobody's noise is shared so: t_collude is 0, though each site knows
                its own share, or one site's noise would be all.
        """
        if self.t_collude < 1:
            raise UnsafeNumbersError(
                f"t_collude = {self.t_collude}: shared noise expects t_collude >= 1, for each site "
                "knows its own share"
            )
        return sigma / math.sqrt(self.n_min - self.t_collude)

    def excess(self, uploaders: int) -> float:
        """How many times the accounted noise is in a sum: sqrt(|U| / (n_min - t_collude)).

        Raises:
            UnsafeNumbersError: As `noise_share`.
        """
        return math.sqrt(uploaders) * self.noise_share(1.0)


@dataclass(frozen=True)
class Floor:
    """The least that a site's owner asks of any set-up; the server can only offer more.

    Attributes:
        sites: Smallest roster.
        uploaders: Smallest n_min.
        t_collude: So many colluders it must be safe against at least.
    """

    sites: int = 3
    uploaders: int = 3
    t_collude: int = 1

    def check(self, numbers: Numbers) -> None:
        """The numbers are no weaker.

        Raises:
            BelowFloorError: One is.
        """
        asked = {
            "n": (numbers.n, self.sites),
            "n_min": (numbers.n_min, self.uploaders),
            "t_collude": (numbers.t_collude, self.t_collude),
        }
        for name, (found, least) in asked.items():
            if found < least:
                raise BelowFloorError(
                    f"{name} = {found}: expected at least {least}, as this site's policy asks"
                )


@dataclass(frozen=True)
class Member:
    """A site on the roster.

    Attributes:
        name: Its name in the federation.
        identity: Its Ed25519 public key, as pinned.
    """

    name: Name
    identity: Key


@dataclass(frozen=True)
class Setup:
    """What an epoch is set up for; the server says it, each site checks and signs its hash.

    Attributes:
        run: The run.
        epoch: Counts up within a run, whenever keys are made anew.
        roster: Those invited, ascending by name; a site's index is its place here.
        numbers: See `Numbers`; n is the roster's length.
        rounds: R: attempts at rounds that there are keys for.

    Raises:
        UnsafeNumbersError: Roster and numbers disagree, or two members are one.
    """

    KIND: ClassVar[int] = 1

    run: Name
    epoch: Annotated[int, Number(4)]
    roster: Annotated[tuple[Member, ...], Many(2, MAX_SITES, ascending=True)]
    numbers: Numbers
    rounds: Annotated[int, Number(2)]

    def __post_init__(self) -> None:
        if len(self.roster) != self.numbers.n:
            raise UnsafeNumbersError(
                f"roster: has {len(self.roster)} sites, expected n = {self.numbers.n}"
            )
        if len({member.identity for member in self.roster}) != len(self.roster):
            raise UnsafeNumbersError("roster: two names have one identity; expected one each")
        if not 0 <= self.epoch <= MAX_EPOCH:
            raise UnsafeNumbersError(f"epoch = {self.epoch}: expected 0 to {MAX_EPOCH}")
        if not 1 <= self.rounds <= MAX_ROUNDS:
            raise UnsafeNumbersError(f"rounds = {self.rounds}: expected 1 to {MAX_ROUNDS}")

    @cached_property
    def digest(self) -> bytes:
        """The set-up's part of every context."""
        return digest("setup", encode(self))

    def name(self, index: int) -> str:
        """What a site is called in an error."""
        return self.roster[index].name if index < len(self.roster) else f"no. {index}"


@dataclass(frozen=True)
class Block:
    """One part of the vector, clipped, scaled and noised for itself.

    Attributes:
        name: What it is.
        length: Coordinates.
        sensitivity: L2 bound of one privacy unit's contribution, in its own units.
        scale: Steps of the integer grid for one unit.
        sigma: Standard deviation of the noise that *each site* adds, in steps.
        sampling_rate: Of the Poisson sample that it is summed over; 1 for all.

    Raises:
        UnsafeNumbersError: A value is out of its range.
    """

    name: Name
    length: Annotated[int, Number(4)]
    sensitivity: Annotated[float, Real()]
    scale: Annotated[float, Real()]
    sigma: Annotated[float, Real()]
    sampling_rate: Annotated[float, Real()]

    def __post_init__(self) -> None:
        ranges = {
            "length": 1 <= self.length <= MAX_WORDS,
            "sensitivity": self.sensitivity > 0,
            "scale": 0 < self.scale <= MAX_SCALE,
            "sigma": self.sigma >= 0,
            "sampling_rate": 0 < self.sampling_rate <= 1,
        }
        for field, holds in ranges.items():
            if not holds:
                raise UnsafeNumbersError(
                    f"block {self.name}.{field} = {getattr(self, field)}: expected > 0 (sigma >= "
                    f"0), at most {MAX_WORDS} coordinates, a scale of at most 2^62, a rate of at "
                    "most 1"
                )

    def saturation(self, numbers: Numbers) -> int:
        """Where its coordinates saturate, see `quantise.saturation`."""
        return saturation(numbers.n, self.sigma)


@dataclass(frozen=True)
class Opening:
    """One attempt at one round; its hash is the round's context.

    Attributes:
        roster: Hash of the epoch's round keys, and so of all that was agreed before.
        members: Who takes part until the epoch ends: those that dealt shares of their keys.
        round: Counts up from 0 within the epoch, burnt attempts included; the key's number.
        model: Hash of the model that every site starts the round with.
        blocks: The vector, in order.

    Raises:
        UnsafeNumbersError: Two blocks have one name.
    """

    KIND: ClassVar[int] = 5

    roster: Hash
    members: Sites
    round: Annotated[int, Number(2)]
    model: Hash
    blocks: Annotated[tuple[Block, ...], Many(1, 64)]

    def __post_init__(self) -> None:
        if len({block.name for block in self.blocks}) != len(self.blocks):
            raise UnsafeNumbersError("blocks: two have one name; expected one each")
        if self.length > MAX_WORDS:
            raise UnsafeNumbersError(
                f"blocks: {self.length} coordinates in all, expected at most {MAX_WORDS}"
            )

    @property
    def length(self) -> int:
        """Coordinates of the whole vector."""
        return sum(block.length for block in self.blocks)

    @cached_property
    def context(self) -> bytes:
        """What everything in this round is bound to."""
        return digest("round", encode(self))


def check_members(setup: Setup, members: tuple[int, ...], what: str) -> None:
    """Enough of the roster are there for a round.

    Raises:
        TooFewSitesError: Fewer than n_min.
    """
    if len(members) < setup.numbers.n_min:
        raise TooFewSitesError(
            f"{what}: {len(members)} sites, expected at least n_min = {setup.numbers.n_min}; begin "
            "a new epoch with more"
        )
