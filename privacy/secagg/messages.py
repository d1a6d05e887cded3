"""The messages of the protocol: frozen, with a byte limit each, and what is signed in them.

Round trips (`<` down to a site, `>` up from it): Setup < Advertisement >, Roster < Deal >, then in
each round Deals, Opening < Upload >, Uploaders < Confirmation >, Confirmations < Unmasking >.
"""

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Annotated, ClassVar

import numpy as np

from .encoding import Bytes, Hash, Index, Key, Keys, Many, Number, Signature, Words
from .errors import ReusedKeyError
from .keys import NONCE_BYTES, TAG_BYTES, digest
from .slices import over_slices
from .terms import MAX_ROUNDS, MAX_SITES, Sites

_MOST_SHARES = 32 * MAX_ROUNDS + TAG_BYTES


@dataclass(frozen=True)
class SealedShare:
    """Shamir shares from one site for another, which nobody else can read.

    Attributes:
        destination: For whom.
        source: From whom.
        kind: Of what.
        nonce: Drawn at random, for a key that seals nothing else.
        box: AES-256-GCM of the shares, bound to all of these and to the context.
    """

    destination: Index
    source: Index
    kind: Index
    nonce: Annotated[bytes, Bytes(NONCE_BYTES, NONCE_BYTES)]
    box: Annotated[bytes, Bytes(32 + TAG_BYTES, _MOST_SHARES)]


Shares = Annotated[tuple[SealedShare, ...], Many(1, MAX_SITES, ascending=True)]


def digest_of_shares(shares: tuple[SealedShare, ...]) -> bytes:
    """What stands for a site's sealed shares in what it signs."""
    parts: list[bytes] = []
    for share in shares:
        parts += (bytes((share.destination, share.source, share.kind)), share.nonce, share.box)
    return digest("shares", *parts)


@dataclass(frozen=True)
class Advertisement:
    """A site's public keys of an epoch.

    Attributes:
        site: Whose.
        setup: Hash of the set-up that they are for.
        channel: X25519 key that shares are sealed for.
        masks: X25519 keys, one an attempt at a round.
        signature: By the site's identity, over all of it.

    Raises:
        ReusedKeyError: Two of the keys are one.
    """

    KIND: ClassVar[int] = 2

    site: Index
    setup: Hash
    channel: Key
    masks: Annotated[tuple[bytes, ...], Keys(1, MAX_ROUNDS)]
    signature: Signature

    def __post_init__(self) -> None:
        if len({self.channel, *self.masks}) != 1 + len(self.masks):
            raise ReusedKeyError(
                f"site {self.site}: two of its round keys are one, expected a key for each round"
            )

    def statement(self) -> bytes:
        """What is signed."""
        site = bytes([self.site])
        return digest("advertisement", self.setup, site, self.channel, *self.masks)


@dataclass(frozen=True)
class Roster:
    """The round keys of all that advertised, ascending by site; its hash is the epoch's context."""

    KIND: ClassVar[int] = 3

    advertisements: Annotated[tuple[Advertisement, ...], Many(1, MAX_SITES, ascending=True)]

    @cached_property
    def sites(self) -> tuple[int, ...]:
        """Who is on it."""
        return tuple(advertised.site for advertised in self.advertisements)

    @cached_property
    def digest(self) -> bytes:
        """The context of what is sealed and signed until the first round.

        The set-up is in it with each advertisement.
        """
        return digest("roster", *(advertised.statement() for advertised in self.advertisements))


@dataclass(frozen=True)
class Deal:
    """A site's shares of its mask keys, and its word on which roster it saw.

    Attributes:
        site: Whose.
        channel: X25519 key that these shares are sealed with, and nothing else: once its private
            half is gone, the site itself could not open them.
        shares: One for every other site on the roster.
        signature: By the site's identity, over all of it and the roster.
    """

    KIND: ClassVar[int] = 4

    site: Index
    channel: Key
    shares: Shares
    signature: Signature

    def dealt(self) -> "Dealt":
        """What stands for it where the shares are not."""
        return Dealt(self.site, self.channel, digest_of_shares(self.shares), self.signature)


@dataclass(frozen=True)
class Dealt:
    """A deal without its shares: who signed which roster."""

    KIND: ClassVar[int] = 12

    site: Index
    channel: Key
    shares: Hash
    signature: Signature

    def statement(self, roster: bytes) -> bytes:
        """What is signed."""
        return digest("deal", roster, bytes([self.site]), self.channel, self.shares)


@dataclass(frozen=True)
class Deals:
    """What a site gets of the others' deals; whose is here (and its own) is a member.

    Attributes:
        dealt: Every member's word, ascending.
        shares: The other members' shares for this site.
    """

    KIND: ClassVar[int] = 6

    dealt: Annotated[tuple[Dealt, ...], Many(1, MAX_SITES, ascending=True)]
    shares: Annotated[tuple[SealedShare, ...], Many(1, MAX_SITES)]


@dataclass(frozen=True)
class Uploaded:
    """What a site signs with its vector: it stands for the upload where the vector is not.

    Attributes:
        site: Whose.
        context: The round's.
        vector: Hash of the masked vector.
        seed: Hash of the self-mask seed, by which a wrongly rebuilt one is noticed.
        channel: X25519 key that the shares are sealed with, as in a Deal.
        shares: Hash of the sealed shares.
        ledger_count: Entries of the site's ledger, this round's debit among them.
        ledger_head: Its head hash.
        signature: By the site's identity, over all of it.
    """

    KIND: ClassVar[int] = 13

    site: Index
    context: Hash
    vector: Hash
    seed: Hash
    channel: Key
    shares: Hash
    ledger_count: Annotated[int, Number(8)]
    ledger_head: Hash
    signature: Signature

    def statement(self) -> bytes:
        """What is signed."""
        ledger = self.ledger_count.to_bytes(8, "big") + self.ledger_head
        own = bytes([self.site]), self.vector, self.seed, self.channel, self.shares
        return digest("upload", self.context, *own, ledger)


@dataclass(frozen=True, eq=False)
class Upload:
    """A site's masked vector, and shares of its self-mask seed.

    Attributes:
        vector: [d] uint32, uniform to whoever lacks the masks.
        uploaded: What is signed.
        shares: One for every other member.
    """

    KIND: ClassVar[int] = 7

    vector: Annotated[np.ndarray, Words()]
    uploaded: Uploaded
    shares: Shares


def digest_of_vector(context: bytes, vector: np.ndarray) -> bytes:
    """What stands for a masked vector in what is signed: the hash of its slices' hashes."""
    slices = over_slices(len(vector), lambda part: sha256(vector[part].data).digest())
    return digest("vector", context, len(vector).to_bytes(8, "big"), *slices)


def digest_of_seed(context: bytes, site: int, seed: bytes) -> bytes:
    """What stands for a self-mask seed; 256 random bits stay hidden behind it."""
    return digest("seed", context, bytes([site]), seed)


@dataclass(frozen=True)
class Uploaders:
    """Whose vectors are in the sum, and these sites' shares for the one that is asked.

    Attributes:
        round: Which.
        context: The round's.
        uploaders: U.
        dropped: The other members.
        uploaded: What each of U signed, ascending.
        shares: Theirs for this site.
    """

    KIND: ClassVar[int] = 8

    round: Annotated[int, Number(2)]
    context: Hash
    uploaders: Sites
    dropped: Sites
    uploaded: Annotated[tuple[Uploaded, ...], Many(1, MAX_SITES, ascending=True)]
    shares: Annotated[tuple[SealedShare, ...], Many(0, MAX_SITES)]


def statement_on_uploaders(context: bytes, uploaders: tuple[int, ...]) -> bytes:
    """What a site signs before it helps to unmask the sum over U: (context, U)."""
    return digest("uploaders", context, bytes(uploaders))


@dataclass(frozen=True)
class Confirmation:
    """A site's signature on the set of uploaders."""

    KIND: ClassVar[int] = 9

    site: Index
    context: Hash
    signature: Signature


@dataclass(frozen=True)
class Confirmations:
    """The signatures of all that confirmed, ascending by site."""

    KIND: ClassVar[int] = 10

    round: Annotated[int, Number(2)]
    context: Hash
    confirmations: Annotated[tuple[Confirmation, ...], Many(1, MAX_SITES, ascending=True)]


@dataclass(frozen=True)
class Share:
    """One site's share of one secret of another's.

    Attributes:
        owner: Whose secret.
        value: 32 bytes.
    """

    owner: Index
    value: Annotated[bytes, Bytes(32, 32)] = field(repr=False)


@dataclass(frozen=True)
class Unmasking:
    """A site's help to unmask the sum over U.

    Attributes:
        site: Whose.
        context: The round's.
        seeds: Its shares of the self-mask seeds of U.
        masks: Its shares of this round's mask keys of the members that are not in U.
        signature: By the site's identity, over all of it.
    """

    KIND: ClassVar[int] = 11

    site: Index
    context: Hash
    seeds: Annotated[tuple[Share, ...], Many(1, MAX_SITES, ascending=True)]
    masks: Annotated[tuple[Share, ...], Many(0, MAX_SITES, ascending=True)]
    signature: Signature

    def statement(self) -> bytes:
        """What is signed."""
        parts = [bytes([share.owner]) + share.value for share in (*self.seeds, *self.masks)]
        counts = bytes((self.site, len(self.seeds)))
        return digest("unmasking", self.context, counts, *parts)
