"""What a site must not forget: its keys, what it holds of others, and what it has sent."""

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Protocol

from .encoding import Bytes, Index, Key, Keys, Many, Name, Number
from .errors import LostStateError
from .messages import Advertisement, Confirmation, Deal, Roster, Share, Unmasking, Uploaded
from .terms import MAX_ROUNDS, MAX_SITES, Opening, Setup, Sites

_Secrets = Annotated[tuple[bytes, ...], Keys(0, MAX_ROUNDS)]
_SeedShares = Annotated[tuple[Share, ...], Many(0, MAX_SITES, ascending=True)]


class Store(Protocol):
    """Where a site's state is kept; `vault.Vault` is one."""

    def load(self) -> bytes | None:
        """What was saved last, or nothing if nothing ever was."""

    def replace(self, before: bytes | None, after: bytes) -> None:
        """Puts `after` in place of `before`, durably before it returns.

        Raises:
            StateInUseError: Something else is there than `before`: another one has changed it.
            LostStateError: The disk refuses; then either is there.
        """


@dataclass(frozen=True)
class Held:
    """The shares that a site holds of another's mask keys, a round each."""

    owner: Index
    shares: _Secrets = field(repr=False)


@dataclass(frozen=True)
class CurrentRound:
    """How far a site is in the round that is open.

    Attributes:
        opening: What it is about.
        uploaded: What was signed with the vector, once it was.
        seeds: Shares of self-mask seeds: its own from the upload on, those of U from the
            confirmation on, none from the unmasking on.
        uploaders: U, once confirmed.
        confirmation: What was answered to U.
        asked: Hash of what unmasking was asked with.
        unmasking: What was answered to it.
    """

    opening: Opening
    uploaded: Uploaded | None = None
    seeds: _SeedShares = ()
    uploaders: Sites = ()
    confirmation: Confirmation | None = None
    asked: Annotated[bytes, Bytes(0, 32)] = b""
    unmasking: Unmasking | None = None


@dataclass(frozen=True)
class OpenEpoch:
    """A site's side of an epoch.

    Attributes:
        setup: What it is about.
        channel: Private key that opens sealed shares.
        first: The round of the first key that is left.
        masks: Private mask keys from `first` on.
        advertisement: What was sent.
        roster: What was answered with a deal.
        deal: What was sent.
        members: Who dealt.
        held: Shares of the other members' mask keys, from `first` on.
        current: The round that is open, or was last.
    """

    setup: Setup
    channel: Key = field(repr=False)
    first: Annotated[int, Number(2)]
    masks: _Secrets = field(repr=False)
    advertisement: Advertisement
    roster: Roster | None = None
    deal: Deal | None = None
    members: Sites = ()
    held: Annotated[tuple[Held, ...], Many(0, MAX_SITES, ascending=True)] = ()
    current: CurrentRound | None = None

    def mask_key(self, number: int) -> bytes:
        """This site's private mask key of a round."""
        return self.masks[self._place(number)]

    def share_of(self, owner: int, number: int) -> bytes:
        """Its share of another's."""
        (held,) = (held for held in self.held if held.owner == owner)
        return held.shares[self._place(number)]

    def _place(self, number: int) -> int:
        if number < self.first:
            raise LostStateError(f"round {number}: its keys are erased, expected {self.first} on")
        return number - self.first

    def erased(self, before: int) -> "OpenEpoch":
        """Without the keys and shares of rounds before this one."""
        gone = before - self.first
        held = tuple(replace(held, shares=held.shares[gone:]) for held in self.held)
        return replace(self, first=before, masks=self.masks[gone:], held=held)


@dataclass(frozen=True)
class SiteState:
    """All of it, for one run.

    Attributes:
        site: Whose.
        run: Of which run.
        ended: Epochs below this one are over.
        epoch: The one that is open.
    """

    KIND: ClassVar[int] = 32

    site: Name
    run: Name
    ended: Annotated[int, Number(4)] = 0
    epoch: OpenEpoch | None = None
