"""The server's half of the protocol: a state machine without I/O.

It is not trusted: what it does wrongly, the sites refuse (`site.py`). What it checks here keeps a
broken or hostile *site* from spoiling a round: a message that does not hold is refused by a typed
error and changes nothing, and its site counts as dropped. It keeps its state in memory: if that is
lost, a new epoch is needed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from secrets import SystemRandom
from threading import Lock
from types import MappingProxyType

import numpy as np

from .encoding import in_keys
from .errors import (
    AliveAndDeadError,
    DifferentContextError,
    DuplicateMessageError,
    ForgedSignatureError,
    MalformedMessageError,
    MisdirectedShareError,
    TooFewSitesError,
    UnknownSiteError,
    WrongPhaseError,
    WrongRoundError,
    WrongShareError,
)
from .keys import TAG_BYTES, agree, digest, public_of, system_entropy
from .masks import Mask, add_masks, pair_mask, self_mask
from .messages import (
    Advertisement,
    Confirmation,
    Confirmations,
    Deal,
    Deals,
    Roster,
    SealedShare,
    Unmasking,
    Upload,
    Uploaded,
    Uploaders,
    digest_of_seed,
    digest_of_shares,
    digest_of_vector,
)
from .shamir import combine
from .shares import MASK_KEYS, SEED
from .terms import Block, Opening, Setup, check_members
from .transcript import Kept, Released
from .turns import waiting
from .views import (
    check_advertisement,
    check_confirmation,
    check_confirmed,
    check_dealt,
    check_fresh,
    check_ledger,
    check_signature,
    check_uploaded,
)

_MOST_TRIES = 2000  # choices of shares: four wrong ones of 100 with t = 67 take 133 on average


class Phase(IntEnum):
    """What the aggregator waits for."""

    ADVERTISEMENTS = 1
    DEALS = 2
    ROUND = 3
    UPLOADS = 4
    CONFIRMATIONS = 5
    UNMASKINGS = 6


@dataclass
class _Round:
    """What came in for the round that is open."""

    opening: Opening
    context: bytes
    total: np.ndarray
    uploaded: dict[int, Uploaded] = field(default_factory=dict)
    shares: dict[int, tuple[SealedShare, ...]] = field(default_factory=dict)
    confirmed: dict[int, Confirmation] = field(default_factory=dict)
    unmaskings: dict[int, Unmasking] = field(default_factory=dict)

    @property
    def uploaders(self) -> tuple[int, ...]:
        return tuple(sorted(self.uploaded))

    @property
    def dropped(self) -> tuple[int, ...]:
        return tuple(site for site in self.opening.members if site not in self.uploaded)


def _not_kept(message: Kept) -> None:
    """For a session of which no transcript is kept."""


class Aggregator:
    """The server in one epoch. What arrives in a phase is added; closing it gives what goes out.

    A close that fails for want of messages changes nothing and may be tried again. A second message
    of a site is a DuplicateMessageError, an identical one too, which the caller may overlook. Safe
    across threads.
    """

    def __init__(
        self,
        setup: Setup,
        keep: Callable[[Kept], None] = _not_kept,
        ledgers: Mapping[str, tuple[int, bytes]] = MappingProxyType({}),
    ) -> None:
        """Begins an epoch.

        Args:
            setup: What it is about; it goes to every site.
            keep: Takes each message of the transcript, in order, before anything rests on it.
            ledgers: Count and head of each site's ledger by name, as the epochs before left them.
        """
        self.setup, self._keep = setup, keep
        self.busy = Lock()  # a vector that comes twice at once is added once
        self.phase = Phase.ADVERTISEMENTS
        self._advertised: dict[int, Advertisement] = {}
        self._deals: dict[int, Deal] = {}
        self._keys: set[bytes] = set()
        self.ledgers = dict(ledgers)
        self._roster = Roster(())
        self._number = 0
        self._round: _Round | None = None
        keep(setup)

    # Set-up.

    @waiting
    def add_advertisement(self, message: Advertisement) -> None:
        """Takes a site's keys.

        Raises:
            SecAggError: See `views.check_advertisement`; WeakKeyError for a key that is none.
        """
        self._expect(Phase.ADVERTISEMENTS, self._advertised, message.site)
        check_advertisement(self.setup, message)
        _check_strong(message.channel, *message.masks)
        check_fresh(self._keys, message)
        self._keep(message)
        self._keys.update((message.channel, *message.masks))
        self._advertised[message.site] = message

    @waiting
    def close_advertisements(self) -> Roster:
        """The roster, for each site on it.

        Raises:
            TooFewSitesError: Fewer than n_min advertised.
        """
        self._expect(Phase.ADVERTISEMENTS)
        check_members(self.setup, tuple(self._advertised), "roster")
        self._roster = Roster(tuple(self._advertised[site] for site in sorted(self._advertised)))
        self.phase = Phase.DEALS
        return self._roster

    @waiting
    def add_deal(self, message: Deal) -> None:
        """Takes a site's shares of its mask keys.

        Raises:
            SecAggError: See `views.check_dealt`; MisdirectedShareError if not every other site on
                the roster has one.
        """
        self._expect(Phase.DEALS, self._deals, message.site)
        check_dealt(self.setup, self._roster, message.dealt())
        _check_strong(message.channel)
        _check_shares(
            message.shares, MASK_KEYS, message.site, self._roster.sites, 32 * self.setup.rounds
        )
        self._keep(message.dealt())
        self._deals[message.site] = message

    @waiting
    def close_deals(self) -> dict[int, Deals]:
        """What each member is to be sent, by site.

        Raises:
            TooFewSitesError: Fewer than n_min dealt.
        """
        self._expect(Phase.DEALS)
        members = self.members
        check_members(self.setup, members, "members")
        dealt = tuple(self._deals[site].dealt() for site in members)
        shares = {site: self._deals[site].shares for site in members}
        self.phase = Phase.ROUND
        return {site: Deals(dealt, _for_site(site, shares)) for site in members}

    @property
    def members(self) -> tuple[int, ...]:
        """Who takes part until the epoch ends: all that dealt."""
        return tuple(sorted(self._deals))

    # Each round.

    @waiting
    def open_round(self, model: bytes, blocks: Sequence[Block]) -> Opening:
        """Begins the next round, for each member.

        One that is open is abandoned and its number burnt, for its keys may be known by now.

        Args:
            model: Hash of the model that goes out with it.
            blocks: The vector.

        Raises:
            WrongRoundError: The epoch's keys are used up.
            WrongPhaseError: The epoch is not set up.
            UnsafeNumbersError: The blocks leave no room in 32 bits.
        """
        if self.phase < Phase.ROUND:
            raise WrongPhaseError("round: the epoch is not set up, expected deals first")
        if self._number >= self.setup.rounds:
            raise WrongRoundError(
                f"round {self._number}: expected 0 to {self.setup.rounds - 1}; begin a new epoch"
            )
        roster = self._roster.digest
        opening = Opening(roster, self.members, self._number, model, tuple(blocks))
        for block in blocks:
            block.saturation(self.setup.numbers)
        total = np.zeros(opening.length, dtype="<u4")
        self._keep(opening)
        self._round = _Round(opening, opening.context, total)
        self._number += 1
        self.phase = Phase.UPLOADS
        return opening

    @waiting
    def add_upload(self, message: Upload) -> None:
        """Takes a masked vector into the sum.

        Raises:
            SecAggError: See `views.check_uploaded` and `check_ledger`; MalformedMessageError for a
                vector of another length, MisdirectedShareError if not every other member has a
                share, ForgedSignatureError if vector or shares are not what was signed.
        """
        state = self._current(Phase.UPLOADS)
        uploaded = message.uploaded
        self._expect(Phase.UPLOADS, state.uploaded, uploaded.site)
        check_uploaded(self.setup, self.members, state.context, uploaded)
        if message.vector.shape != state.total.shape:
            raise MalformedMessageError(
                f"vector: of {message.vector.size} words, expected {state.total.size}"
            )
        _check_strong(uploaded.channel)
        _check_shares(message.shares, SEED, uploaded.site, self.members, 32)
        vector = digest_of_vector(state.context, message.vector)
        if (vector, digest_of_shares(message.shares)) != (uploaded.vector, uploaded.shares):
            raise ForgedSignatureError(
                f"upload of {self.setup.name(uploaded.site)}: its vector or shares are not the "
                "ones that it signed, expected those"
            )
        name = self.setup.name(uploaded.site)
        ledger = check_ledger(self.setup, self.ledgers.get(name, (0, b"")), uploaded)
        self._keep(uploaded)
        self.ledgers[name] = ledger
        np.add(state.total, message.vector, out=state.total)
        state.uploaded[uploaded.site] = uploaded
        state.shares[uploaded.site] = message.shares

    @waiting
    def close_uploads(self) -> dict[int, Uploaders]:
        """What each uploader is to be sent, by site.

        Raises:
            TooFewSitesError: Fewer than n_min uploaded.
        """
        state = self._current(Phase.UPLOADS)
        uploaders = state.uploaders
        check_members(self.setup, uploaders, "uploaders")
        self.phase = Phase.CONFIRMATIONS
        signed = tuple(state.uploaded[site] for site in uploaders)
        number, context = state.opening.round, state.context
        return {
            site: Uploaders(
                number, context, uploaders, state.dropped, signed, _for_site(site, state.shares)
            )
            for site in uploaders
        }

    @waiting
    def add_confirmation(self, message: Confirmation) -> None:
        """Takes a site's signature on U.

        Raises:
            SecAggError: See `views.check_confirmation`.
        """
        state = self._current(Phase.CONFIRMATIONS)
        self._expect(Phase.CONFIRMATIONS, state.confirmed, message.site)
        check_confirmation(self.setup, state.uploaders, state.context, message)
        self._keep(message)
        state.confirmed[message.site] = message

    @waiting
    def close_confirmations(self) -> Confirmations:
        """The signatures, for each site that confirmed.

        Raises:
            TooFewConfirmationsError: Fewer than t.
        """
        state = self._current(Phase.CONFIRMATIONS)
        found = tuple(state.confirmed[site] for site in sorted(state.confirmed))
        check_confirmed(self.setup, state.uploaders, state.context, found)
        self.phase = Phase.UNMASKINGS
        return Confirmations(state.opening.round, state.context, found)

    @waiting
    def add_unmasking(self, message: Unmasking) -> None:
        """Takes a site's shares.

        Raises:
            UnknownSiteError: It is no uploader.
            DifferentContextError: It is about another round.
            AliveAndDeadError: They are not the seeds' of U and the mask keys' of the others.
            ForgedSignatureError: The site did not sign it.
        """
        state = self._current(Phase.UNMASKINGS)
        self._expect(Phase.UNMASKINGS, state.unmaskings, message.site)
        name = self.setup.name(message.site)
        if message.site not in state.uploaders:
            raise UnknownSiteError(f"unmasking of {name}: expected one of {state.uploaders}")
        if message.context != state.context:
            raise DifferentContextError(
                f"unmasking of {name}: in context {message.context.hex()}, expected "
                f"{state.context.hex()}"
            )
        seeds = tuple(share.owner for share in message.seeds)
        masks = tuple(share.owner for share in message.masks)
        if (seeds, masks) != (state.uploaders, state.dropped):
            raise AliveAndDeadError(
                f"unmasking of {name}: of uploaders {seeds} and dropped {masks}, expected "
                f"{state.uploaders} and {state.dropped}"
            )
        check_signature(self.setup, message.site, message.statement(), message.signature, "shares")
        state.unmaskings[message.site] = message

    @waiting
    def total(self) -> np.ndarray:
        """The sum of the uploaders' vectors modulo 2^32, [d] uint32; the round is over.

        It is unmasked once: if that or keeping the record of it fails, the round is lost.

        Raises:
            TooFewSitesError: Fewer than t gave their shares so far.
            WrongShareError: No t of them give the secrets that were committed to.
        """
        state = self._current(Phase.UNMASKINGS)
        if len(state.unmaskings) < self.setup.numbers.t:
            raise TooFewSitesError(
                f"unmasking: {len(state.unmaskings)} sites, expected at least t = "
                f"{self.setup.numbers.t}"
            )
        seeds, keys = self._secrets(state)
        self._round, self.phase = None, Phase.ROUND  # unmasked once, and whole or not at all
        add_masks(state.total, list(self._masks(state, seeds, keys)))
        total = state.total.data.cast("B")
        self._keep(Released(state.context, digest("total", state.context, total)))
        return state.total

    # What the steps above share.

    def _expect(
        self, phase: Phase, found: Mapping[int, object] | None = None, site: int = 0
    ) -> None:
        if self.phase != phase:
            raise WrongPhaseError(
                f"{phase.name.lower()}: came while expecting {self.phase.name.lower()}"
            )
        if found is not None and site in found:
            raise DuplicateMessageError(
                f"{phase.name.lower()}: a second one of {self.setup.name(site)}, expected one"
            )

    def _current(self, phase: Phase) -> _Round:
        self._expect(phase)
        if self._round is None:
            raise WrongPhaseError(f"{phase.name.lower()}: no round is open, expected an opening")
        return self._round

    def _secrets(self, state: _Round) -> tuple[dict[int, bytes], dict[int, bytes]]:
        """The seeds of U and the mask keys of the dropped, by site.

        Each is held against its hash or its public key, so that a wrong share is left out while t
        right ones remain.
        """
        holders = {
            site: b"".join(share.value for share in (*message.seeds, *message.masks))
            for site, message in sorted(state.unmaskings.items())
        }
        owners = (*state.uploaders, *state.dropped)
        found: dict[int, bytes] = {}
        for chosen in _choices(tuple(holders), self.setup.numbers.t):
            secrets = in_keys(combine({site: holders[site] for site in chosen}))
            found |= {
                owner: secret
                for owner, secret in zip(owners, secrets, strict=True)
                if owner not in found and self._is_right(state, owner, secret)
            }
            if len(found) == len(owners):
                return {site: found[site] for site in state.uploaders}, {
                    site: found[site] for site in state.dropped
                }
        missing = ", ".join(self.setup.name(owner) for owner in owners if owner not in found)
        raise WrongShareError(
            f"unmasking: no {self.setup.numbers.t} of the shares of {tuple(holders)} give what "
            f"{missing} committed to, expected them to; the shares were dealt wrongly, or too many "
            "were given back wrongly"
        )

    def _is_right(self, state: _Round, owner: int, secret: bytes) -> bool:
        """Whether a rebuilt secret is the one that its owner committed to."""
        if owner in state.uploaded:
            return digest_of_seed(state.context, owner, secret) == state.uploaded[owner].seed
        return public_of(secret) == self._public_keys[owner][state.opening.round]

    def _masks(
        self, state: _Round, seeds: Mapping[int, bytes], keys: Mapping[int, bytes]
    ) -> Iterator[Mask]:
        """What makes the masked sum the plain one."""
        number, public = state.opening.round, self._public_keys
        for site, seed in seeds.items():
            yield self_mask(seed, state.context, site)._replace(negative=True)
        for dropped, key in keys.items():
            for site in state.uploaders:  # what the dropped site would have added cancels it
                yield pair_mask(key, public[site][number], state.context, dropped, site)

    @cached_property
    def _public_keys(self) -> dict[int, tuple[bytes, ...]]:
        return {a.site: a.masks for a in self._roster.advertisements}


def _check_strong(*keys: bytes) -> None:
    """No public key is one with which everybody agrees on the same; WeakKeyError otherwise."""
    probe = system_entropy(32)
    for key in keys:
        agree(probe, key)


def _check_shares(
    shares: Sequence[SealedShare], kind: int, source: int, sites: Sequence[int], length: int
) -> None:
    expected = [(kind, source, site, length + TAG_BYTES) for site in sites if site != source]
    found = [(share.kind, share.source, share.destination, len(share.box)) for share in shares]
    if found != expected:
        raise MisdirectedShareError(
            f"sealed shares of {source}: (kind, source, destination, bytes) are {found}, expected "
            f"{expected}"
        )


def _for_site(site: int, shares: Mapping[int, Sequence[SealedShare]]) -> tuple[SealedShare, ...]:
    """The other sites' shares for this one, ascending by source."""
    return tuple(
        share for source in sorted(shares) for share in shares[source] if share.destination == site
    )


def _choices(sites: tuple[int, ...], count: int) -> Iterator[tuple[int, ...]]:
    """Ways to take so many of the sites: the first ones, then at random.

    Of k wrong ones among m, a choice of t misses all with about (1 - t / m)^k.
    """
    yield sites[:count]
    if len(sites) > count:
        for _ in range(_MOST_TRIES):
            yield tuple(SystemRandom().sample(sites, count))
