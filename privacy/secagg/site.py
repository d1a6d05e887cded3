"""A site's half of the protocol: a state machine without I/O.

Protocol: Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine
Learning", CCS), figure 4, the version against active adversaries, over the full graph, with the
mask keys of many rounds agreed at once.

Formal guarantee: a server that deviates in any way, together with up to t_collude sites, learns of
an honest site's vector nothing beyond the sum, modulo 2^32, over the uploaders of a round: at least
n_min sites, of which at least n_min - t_collude are honest. It assumes that identities were pinned
rightly, that the site's floor is what its owner meant and blocks were looked at before a round is
opened (what noise they promise is the policy's business), that X25519, Ed25519, HKDF-SHA256,
AES-256 (CTR, GCM) and SHA-256 are what they are taken for, that the entropy is secret, and that the
store serves one site at a time, keeps what it has saved and is not put back to an older copy.

Whatever is sent is saved first. Each method may be called again with what it was called with: it
answers with the same bytes, or refuses; a refusal changes nothing that is kept.
"""

from collections.abc import Mapping
from dataclasses import replace
from threading import Lock
from typing import TypeVar

import numpy as np

from .encoding import decode, encode, in_keys
from .errors import (
    DifferentModelError,
    DifferentRosterError,
    LostStateError,
    MalformedMessageError,
    NotKeptError,
    SecAggError,
    SecondUnmaskError,
    SplitViewError,
    StaleEpochError,
    SwappedIdentityError,
    TwoVectorsError,
    WrongPhaseError,
    WrongRoundError,
)
from .keys import Entropy, Identity, digest, public_of, system_entropy
from .masks import Mask, add_masks, pair_mask, self_mask
from .messages import (
    Advertisement,
    Confirmation,
    Confirmations,
    Deal,
    Deals,
    Roster,
    Share,
    Unmasking,
    Upload,
    Uploaded,
    Uploaders,
    digest_of_seed,
    digest_of_shares,
    digest_of_vector,
    statement_on_uploaders,
)
from .shamir import split
from .shares import MASK_KEYS, SEED, open_shares, seal_shares
from .state import CurrentRound, Held, OpenEpoch, SiteState, Store
from .terms import Floor, Opening, Setup
from .turns import refusing
from .views import (
    check_confirmed,
    check_current,
    check_deals,
    check_identities,
    check_roster,
    check_setup,
    check_uploaders,
)

_NO_SIGNATURE = bytes(64)
_Signed = TypeVar("_Signed", Advertisement, Deal, Uploaded, Unmasking)


class Site:
    """One site in one run.

    Besides what they name, all steps raise StateInUseError for a second one at a time or a store
    that another has changed, LostStateError for a store that fails, and WrongPhaseError for what
    comes too early.
    """

    def __init__(
        self,
        name: str,
        run: str,
        identity: Identity,
        pinned: Mapping[str, bytes],
        store: Store,
        floor: Floor,
        entropy: Entropy = system_entropy,
    ) -> None:
        """Takes up where the store says that the site was.

        Args:
            name: The site's own name.
            run: The run; each has a store of its own.
            identity: The site's own.
            pinned: Public identities by name, as they came out of band; never from the server.
            store: Where the state is kept.
            floor: The least that the site's owner asks of the numbers.
            entropy: Secret coins.

        Raises:
            SwappedIdentityError: The identity is not the one that is pinned for the name.
            LostStateError: The store holds no state of this site and run.
        """
        if pinned.get(name) != identity.public:
            raise SwappedIdentityError(
                f"{name}: has identity {identity.public.hex()}, expected the one that is pinned "
                "for this name; check the site's key"
            )
        self.name, self._run, self._identity, self._pinned = name, run, identity, pinned
        self._store, self._floor, self._entropy = store, floor, entropy
        self.busy = Lock()  # two steps at once could answer two ways
        self._sent: Upload | None = None  # a vector is kept in memory only, for as long as it may
        self._saved = store.load()
        self._state = SiteState(name, run)
        if self._saved is not None:
            self._state = _read_state(self._saved, name, run)

    @property
    def setup(self) -> Setup | None:
        """What the epoch that is open was set up for; `None` without one."""
        return None if self._state.epoch is None else self._state.epoch.setup

    # Set-up, once an epoch.

    @refusing
    def advertise(self, setup: Setup) -> Advertisement:
        """Begins an epoch: fresh keys for its rounds, signed. A former epoch ends, erased.

        Raises:
            UnknownSiteError: This or another site on the roster is none that is pinned.
            SwappedIdentityError: A name stands beside another identity than the pinned one.
            StaleEpochError: The epoch is over, or not newer than the one that is open.
            DifferentSetupError: It is another run's.
            BelowFloorError: The numbers are weaker than the site's owner asks.
        """
        own = check_setup(setup, self._run, self.name, self._pinned)
        self._floor.check(setup.numbers)
        epoch = self._state.epoch
        if epoch is not None and epoch.setup == setup:
            return epoch.advertisement
        newest = self._state.ended if epoch is None else epoch.setup.epoch + 1
        if setup.epoch < newest:
            raise StaleEpochError(f"epoch {setup.epoch}: expected {newest} or a later one")
        channel, *masks = (self._entropy(32) for _ in range(1 + setup.rounds))
        public = tuple(public_of(mask) for mask in masks)
        unsigned = Advertisement(own, setup.digest, public_of(channel), public, _NO_SIGNATURE)
        advertisement = self._signed(unsigned, unsigned.statement())
        self._save(OpenEpoch(setup, channel, 0, tuple(masks), advertisement))
        self._sent = None
        return advertisement

    @refusing
    def deal(self, roster: Roster) -> Deal:
        """Takes the others' keys and deals each a share of its own mask keys.

        Raises:
            DifferentSetupError: Another site signed another set-up: other numbers, say.
            SwappedKeysError: Keys are not those that their site signed.
            ReusedKeyError: A key is in two places.
            UnknownSiteError: A site is none of the set-up's, or this one is missing.
            TooFewSitesError: Fewer than n_min.
            DifferentRosterError: It was shown another roster before.
        """
        epoch = self._epoch()
        check_roster(epoch.setup, roster, epoch.advertisement)
        if epoch.deal is not None:
            if epoch.roster != roster:
                raise DifferentRosterError("roster: is another than the one that was dealt for")
            return epoch.deal
        own, setup = epoch.advertisement.site, epoch.setup
        context = roster.digest
        values = split(b"".join(epoch.masks), setup.numbers.t, setup.numbers.n, self._entropy)
        channel, shares = seal_shares(
            values, roster.sites, MASK_KEYS, own, context, roster, self._entropy
        )
        unsigned = Deal(own, channel, shares, _NO_SIGNATURE)
        deal = self._signed(unsigned, unsigned.dealt().statement(context))
        self._save(replace(epoch, roster=roster, deal=deal))
        return deal

    @refusing
    def accept(self, deals: Deals) -> None:
        """Takes the others' shares; whoever dealt is a member from here on.

        Raises:
            DifferentRosterError: Another site dealt for another roster, or members changed.
            UnknownSiteError: A member is none of the roster's, or this one is missing.
            TooFewSitesError: Fewer than n_min members.
            MisdirectedShareError: A share is of another kind, or for or from another.
            TamperedCiphertextError, WeakKeyError: A share does not open.
        """
        epoch = self._epoch()
        roster = self._roster(epoch)
        context = roster.digest
        members = check_deals(epoch.setup, roster, deals, self._deal(epoch))
        if epoch.members:
            if epoch.members != members:
                raise DifferentRosterError(f"members: {members}, expected {epoch.members} as ever")
            return
        length = 32 * epoch.setup.rounds
        channels = {dealt.site: dealt.channel for dealt in deals.dealt}
        own = epoch.advertisement.site
        opened = open_shares(deals.shares, MASK_KEYS, own, context, epoch.channel, channels, length)
        held = tuple(Held(owner, in_keys(value)) for owner, value in opened.items())
        self._save(replace(epoch, members=members, held=held))

    # Each round.

    @refusing
    def open_round(self, opening: Opening, model: bytes) -> Upload | None:
        """Begins a round; every one before it is over, its keys and shares are erased.

        To be asked before data is read, for it says whether the round may be at all.

        Args:
            opening: What the server asks for.
            model: Hash of the model as this site got it.

        Returns:
            What was sent to this very opening before, if it was: nothing is computed anew.

        Raises:
            DifferentModelError: The model is not the one that is signed.
            DifferentRosterError: Keys or members are not the epoch's.
            WrongRoundError: The round is over, burnt, or beyond the epoch.
            TwoVectorsError: The round was opened on other terms.
            NotKeptError: Its vector was sent before a restart: it is sent once. What comes next is
                answered as ever.
            UnsafeNumbersError: The noise of a block leaves no room in 32 bits.
            BelowFloorError, UnknownSiteError, SwappedIdentityError: Floor or pins have changed, and
                the epoch's terms would not be accepted any more.
        """
        epoch = self._epoch()
        current = epoch.current
        # Again, for a site's owner may have raised the floor or revoked an identity since.
        self._floor.check(epoch.setup.numbers)
        check_identities(epoch.setup, self._pinned)
        roster = self._roster(epoch).digest
        if not epoch.members:
            raise WrongPhaseError("opening: the epoch is not set up, expected deals first")
        if (opening.roster, opening.members) != (roster, epoch.members):
            raise DifferentRosterError(
                f"opening: keys {opening.roster.hex()} of members {opening.members}, expected "
                f"{roster.hex()} of {epoch.members}"
            )
        if opening.model != model:
            raise DifferentModelError(
                f"model: {model.hex()} was sent, expected {opening.model.hex()} as all sites sign"
            )
        for block in opening.blocks:
            block.saturation(epoch.setup.numbers)
        if current is not None and current.opening.round == opening.round:
            return self._again(current, opening)
        last = -1 if current is None else current.opening.round
        if not last < opening.round < epoch.setup.rounds:
            raise WrongRoundError(
                f"round {opening.round}: expected {last + 1} to {epoch.setup.rounds - 1}"
            )
        self._save(replace(epoch.erased(opening.round), current=CurrentRound(opening)))
        self._sent = None
        return None

    @refusing
    def upload(
        self, opening: Opening, vector: np.ndarray, ledger_count: int, ledger_head: bytes
    ) -> Upload:
        """Masks the vector of the round that is open.

        Args:
            opening: The one that the vector was made for.
            vector: [d] uint32, quantised, noised, the blocks one after another. It is masked in
                place and is the message's from then on.
            ledger_count: Entries of the site's ledger, with this round's debit.
            ledger_head: Its head hash, 32 bytes.

        Raises:
            WrongRoundError: Another round was opened since.
            TwoVectorsError: This round has had its vector.
            MalformedMessageError: The vector has another form than the opening says, or count and
                head are none.
            WeakKeyError: A member's key is none.
        """
        epoch, current = self._current()
        if current.opening != opening:
            raise WrongRoundError(
                f"vector: is of round {opening.round}, expected {current.opening.round} as opened "
                "since, on its own terms"
            )
        if current.uploaded is not None:
            raise TwoVectorsError(
                f"round {current.opening.round}: its vector was sent, expected a new round; two "
                "under the same masks would show their difference"
            )
        _check_vector(vector, opening.length)
        own, context = epoch.advertisement.site, opening.context
        seed = self._entropy(32)
        masks = [self_mask(seed, context, own), *self._pair_masks(epoch, opening)]
        values = split(seed, epoch.setup.numbers.t, epoch.setup.numbers.n, self._entropy)
        channel, shares = seal_shares(
            values, epoch.members, SEED, own, context, self._roster(epoch), self._entropy
        )
        unsigned = Uploaded(
            own,
            context,
            bytes(32),
            digest_of_seed(context, own, seed),
            channel,
            digest_of_shares(shares),
            ledger_count,
            ledger_head,
            _NO_SIGNATURE,
        )
        encode(unsigned)  # what has no place in it is refused while the vector is whole
        masked = vector.view()
        vector.flags.writeable = False  # from here on it is the message's, whatever happens
        add_masks(masked, masks)
        unsigned = replace(unsigned, vector=digest_of_vector(context, vector))
        uploaded = self._signed(unsigned, unsigned.statement())
        upload = Upload(vector, uploaded, shares)
        seeds = (Share(own, values[own]),)
        self._save(replace(epoch, current=replace(current, uploaded=uploaded, seeds=seeds)))
        self._sent = upload
        return upload

    @refusing
    def confirm(self, uploaders: Uploaders) -> Confirmation:
        """Takes the set U of those in the sum, and signs it; one set a round.

        Raises:
            WrongRoundError, DifferentContextError: It is not about the current round.
            AliveAndDeadError: A member is listed twice, or not at all, or this one as dropped.
            UnknownSiteError: One is no member.
            TooFewSitesError: Fewer than n_min.
            DifferentContextError: One of U uploaded on other terms: another model, say.
            ForgedSignatureError: One of U did not sign what is said to be its upload.
            MisdirectedShareError, TamperedCiphertextError, WeakKeyError: A share is not what its
                site sealed.
            SplitViewError: Another set was confirmed before.
        """
        epoch, current = self._current()
        if current.uploaded is None:
            raise WrongPhaseError("uploaders: this site has sent no vector, expected an upload")
        own, context = epoch.advertisement.site, current.opening.context
        check_current(current.opening, uploaders.round, uploaders.context, "uploaders")
        check_uploaders(epoch.setup, epoch.members, own, context, uploaders)
        if current.confirmation is not None:
            if current.uploaders != uploaders.uploaders:
                raise SplitViewError(
                    f"uploaders: {uploaders.uploaders}, expected {current.uploaders} as confirmed"
                )
            return current.confirmation
        channels = {uploaded.site: uploaded.channel for uploaded in uploaders.uploaded}
        opened = open_shares(uploaders.shares, SEED, own, context, epoch.channel, channels, 32)
        seeds = (*current.seeds, *(Share(owner, value) for owner, value in opened.items()))
        statement = statement_on_uploaders(context, uploaders.uploaders)
        confirmation = Confirmation(own, context, self._identity.sign(statement))
        after = replace(
            current,
            seeds=tuple(sorted(seeds, key=lambda share: share.owner)),
            uploaders=uploaders.uploaders,
            confirmation=confirmation,
        )
        self._save(replace(epoch, current=after))
        self._sent = None  # the server has it: this site is in U
        return confirmation

    @refusing
    def unmask(self, confirmations: Confirmations) -> Unmasking:
        """Gives its shares, once t of U have signed the very U that it has signed itself.

        Of a site in U it gives the self-mask seed's, of any other member the mask key's: never both
        of one site, for the two sets are one and the same signed U and what is without it. This
        round's keys and shares are erased, but for the answer itself, which goes with the round.

        Raises:
            WrongRoundError, DifferentContextError: It is not about the current round.
            UnknownSiteError: A signature of a site that is not in U.
            SplitViewError: A site signed another U.
            TooFewConfirmationsError: Fewer than t signed.
            SecondUnmaskError: It was asked before, with other signatures.
        """
        epoch, current = self._current()
        if current.confirmation is None:
            raise WrongPhaseError("confirmations: this site has confirmed no uploaders")
        opening, uploaders = current.opening, current.uploaders
        check_current(opening, confirmations.round, confirmations.context, "confirmations")
        asked = digest("asked", encode(confirmations))
        if current.unmasking is not None:
            if current.asked != asked:
                raise SecondUnmaskError(
                    f"round {opening.round}: unmasking was asked before with other signatures, "
                    "expected a new round"
                )
            return current.unmasking
        own, context = epoch.advertisement.site, opening.context
        check_confirmed(epoch.setup, uploaders, context, confirmations.confirmations)
        dropped = (member for member in epoch.members if member not in uploaders)
        masks = tuple(Share(owner, epoch.share_of(owner, opening.round)) for owner in dropped)
        unsigned = Unmasking(own, context, current.seeds, masks, _NO_SIGNATURE)
        unmasking = self._signed(unsigned, unsigned.statement())
        after = replace(current, seeds=(), asked=asked, unmasking=unmasking)
        self._save(replace(epoch.erased(opening.round + 1), current=after))
        return unmasking

    @refusing
    def end_epoch(self) -> None:
        """Erases all that is left of the epoch; it is never opened again."""
        if self._state.epoch is not None:
            self._save(None, ended=self._state.epoch.setup.epoch + 1)

    # What the steps above share.

    def _save(self, epoch: OpenEpoch | None, ended: int | None = None) -> None:
        """What is sent afterwards rests on what is saved here."""
        over = self._state.ended if ended is None else ended
        state = replace(self._state, ended=over, epoch=epoch)
        content = encode(state)
        self._store.replace(self._saved, content)
        self._state, self._saved = state, content
        if epoch is None:
            self._sent = None

    def _epoch(self) -> OpenEpoch:
        if self._state.epoch is None:
            raise LostStateError(
                f"{self.name}: holds no keys, expected an epoch that was set up; begin a new one"
            )
        return self._state.epoch

    def _current(self) -> tuple[OpenEpoch, CurrentRound]:
        epoch = self._epoch()
        if epoch.current is None:
            raise WrongPhaseError(f"{self.name}: no round is open, expected an opening first")
        return epoch, epoch.current

    @staticmethod
    def _roster(epoch: OpenEpoch) -> Roster:
        if epoch.roster is None:
            raise WrongPhaseError("the epoch is not set up, expected a roster first")
        return epoch.roster

    @staticmethod
    def _deal(epoch: OpenEpoch) -> Deal:
        if epoch.deal is None:
            raise WrongPhaseError("the epoch is not set up, expected a roster first")
        return epoch.deal

    def _again(self, current: CurrentRound, opening: Opening) -> Upload | None:
        """What to do about an opening of the round that is open."""
        if current.opening != opening:
            raise TwoVectorsError(
                f"round {opening.round}: was opened on other terms, expected the same ones; "
                "another attempt takes the next round"
            )
        if current.uploaded is not None and self._sent is None:
            raise NotKeptError(
                f"round {opening.round}: its vector was sent before this site was restarted and is "
                "not kept, expected the uploaders or a new round"
            )
        sent = self._sent
        if sent is not None and (
            digest_of_vector(opening.context, sent.vector) != sent.uploaded.vector
        ):
            raise TwoVectorsError(
                f"round {opening.round}: its vector was overwritten since it was sent, expected a "
                "new round"
            )
        return sent

    def _signed(self, unsigned: _Signed, statement: bytes) -> _Signed:
        return replace(unsigned, signature=self._identity.sign(statement))

    def _pair_masks(self, epoch: OpenEpoch, opening: Opening) -> list[Mask]:
        own, context = epoch.advertisement.site, opening.context
        private = epoch.mask_key(opening.round)
        return [
            pair_mask(private, other.masks[opening.round], context, own, other.site)
            for other in self._roster(epoch).advertisements
            if other.site in epoch.members and other.site != own
        ]


def _read_state(saved: bytes, name: str, run: str) -> SiteState:
    try:
        state = decode(SiteState, saved)
    except SecAggError as error:
        raise LostStateError(f"state of {name}: {error}; begin a new epoch") from None
    if (state.site, state.run) != (name, run):
        raise LostStateError(
            f"state: is of {state.site} in run {state.run}, expected {name} in {run}"
        )
    return state


def _check_vector(vector: np.ndarray, length: int) -> None:
    fits = vector.dtype == np.dtype("<u4") and vector.shape == (length,)
    if not fits or not vector.flags.c_contiguous or not vector.flags.writeable:
        raise MalformedMessageError(
            f"vector: {vector.dtype} of shape {vector.shape}, expected flat writeable uint32 of "
            f"shape ({length},)"
        )
