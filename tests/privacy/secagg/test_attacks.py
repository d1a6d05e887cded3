"""Each attack of the threat model is refused, by an error that is named after it.

The server is the attacker in most of them: the hook changes what it sends. Who refuses is said; the
others go on where enough remain.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from fedveil.privacy.secagg.encoding import decode, encode
from fedveil.privacy.secagg.errors import (
    AliveAndDeadError,
    BelowFloorError,
    DifferentContextError,
    DifferentModelError,
    DifferentRosterError,
    DifferentSetupError,
    ForgedSignatureError,
    LoweredThresholdError,
    MalformedMessageError,
    MisdirectedShareError,
    ReusedKeyError,
    RolledBackLedgerError,
    SecAggError,
    SecondUnmaskError,
    SplitViewError,
    StaleEpochError,
    SwappedIdentityError,
    SwappedKeysError,
    TamperedCiphertextError,
    TooFewConfirmationsError,
    TooFewSitesError,
    TooManyColludersError,
    TwoVectorsError,
    UnknownSiteError,
    UnsafeNumbersError,
    WeakKeyError,
    WrongPhaseError,
    WrongRoundError,
)
from fedveil.privacy.secagg.keys import Identity
from fedveil.privacy.secagg.masks import add_masks, pair_mask, self_mask
from fedveil.privacy.secagg.messages import (
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
    digest_of_shares,
    statement_on_uploaders,
)
from fedveil.privacy.secagg.shamir import combine
from fedveil.privacy.secagg.shares import MASK_KEYS
from fedveil.privacy.secagg.simulator import MODEL, Passing, Simulator
from fedveil.privacy.secagg.terms import (
    Block,
    Floor,
    Member,
    Numbers,
    Opening,
    Setup,
)
from fedveil.privacy.secagg.views import check_confirmed

Session = Callable[..., Simulator]
Vectors = Callable[..., dict[int, np.ndarray]]
Change = Callable[[Any], Any]
BLOCKS = [Block("sum", 10, 1.0, 1.0, 0.0, 1.0)]
HEAD = bytes(32)


def changing(kind: type, change: Change, site: int = 1) -> Callable[[Passing], object]:
    """A network that changes one kind of message to or from one site."""

    def hook(passing: Passing) -> object:
        hit = type(passing.message) is kind and site in {passing.source, passing.destination}
        return change(passing.message) if hit else passing.message

    return hook


def replaced(items: tuple[Any, ...], place: int, **changes: object) -> tuple[Any, ...]:
    """A tuple of messages with one of them changed."""
    return (*items[:place], replace(items[place], **changes), *items[place + 1 :])


def flipped(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


class TestSetUp:
    def refusal(self, session: Simulator, kind: type, change: Change) -> SecAggError:
        """What site 1 says of a changed message, while the others go on without it."""
        session.hook = changing(kind, change)
        members = session.set_up()
        assert set(session.refusals) == {1}
        assert members in {(0, 1, 2, 3), (0, 2, 3)}
        return session.refusals[1]

    def test_keys_that_are_swapped_for_the_servers(self, make_session: Session) -> None:
        def swap(roster: Roster) -> Roster:
            keys = (b"\7" * 32, *roster.advertisements[2].masks[1:])
            return Roster(replaced(roster.advertisements, 2, masks=keys))

        found = self.refusal(make_session(), Roster, swap)
        assert isinstance(found, SwappedKeysError)
        assert "advertisement of site-002: its keys are not signed by" in str(found)

    def test_a_channel_key_that_is_swapped(self, make_session: Session) -> None:
        def swap(roster: Roster) -> Roster:
            return Roster(replaced(roster.advertisements, 2, channel=b"\7" * 32))

        assert isinstance(self.refusal(make_session(), Roster, swap), SwappedKeysError)

    def test_this_sites_own_keys_swapped_for_older_ones_of_its(self, make_session: Session) -> None:
        made = make_session()
        made.set_up()
        old = made.aggregator._roster.advertisements[1]
        made.new_epoch(1)

        def swap(roster: Roster) -> Roster:
            setup = made.aggregator.setup.digest
            unsigned = replace(old, setup=setup)
            signature = made.identities[1].sign(unsigned.statement())
            stale = replace(unsigned, signature=signature)
            return Roster((roster.advertisements[0], stale, *roster.advertisements[2:]))

        assert isinstance(self.refusal(made, Roster, swap), SwappedKeysError)

    def test_an_identity_that_is_not_the_pinned_one(self, make_session: Session) -> None:
        def swap(setup: Setup) -> Setup:
            return replace(setup, roster=replaced(setup.roster, 2, identity=b"\7" * 32))

        found = self.refusal(make_session(), Setup, swap)
        assert isinstance(found, SwappedIdentityError)
        assert f"has identity {'07' * 32}, expected" in str(found)

    def test_a_site_that_nobody_pinned(self, make_session: Session) -> None:
        def add(setup: Setup) -> Setup:
            return replace(setup, roster=replaced(setup.roster, 3, name="sybil"))

        assert isinstance(self.refusal(make_session(), Setup, add), UnknownSiteError)

    def test_a_roster_without_this_site(self, make_session: Session) -> None:
        made = make_session()

        def leave_out(setup: Setup) -> Setup:
            other = Member("site-001x", Identity(b"\1" * 32).public)
            made.sites[1]._pinned = {**made.pinned, other.name: other.identity}
            return replace(setup, roster=(setup.roster[0], other, *setup.roster[2:]))

        found = self.refusal(made, Setup, leave_out)
        assert isinstance(found, UnknownSiteError)
        assert "expected site-001 among them" in str(found)

    def test_another_run(self, make_session: Session) -> None:
        def change(setup: Setup) -> Setup:
            return replace(setup, run="another")

        assert isinstance(self.refusal(make_session(), Setup, change), DifferentSetupError)

    def test_an_epoch_of_the_past(self, make_session: Session) -> None:
        made = make_session()
        made.new_epoch(5)
        made.set_up()
        made.new_epoch(4)
        with pytest.raises(TooFewSitesError):
            made.set_up()
        assert {type(found) for found in made.refusals.values()} == {StaleEpochError}

    def test_one_epoch_set_up_on_two_terms(self, make_session: Session) -> None:
        made = make_session()
        made.set_up()
        other = replace(made.aggregator.setup, rounds=7)
        with pytest.raises(StaleEpochError, match="epoch 0: expected 1"):
            made.sites[0].advertise(other)

    @pytest.mark.parametrize(
        ("floor", "match"),
        [
            (Floor(5, 3, 1), "n = 4: expected at least 5"),
            (Floor(3, 4, 1), "n_min = 3: expected at least 4"),
            (Floor(3, 3, 2), "t_collude = 1: expected at least 2"),
        ],
    )
    def test_a_federation_that_is_shrunk_below_the_sites_floor(
        self, make_session: Session, floor: Floor, match: str
    ) -> None:
        """The server and one site could invite a single other one, and open its vector."""
        made = make_session()
        made.sites[1]._floor = floor
        with pytest.raises(BelowFloorError, match=match):
            made.sites[1].advertise(made.aggregator.setup)
        made.sites[1]._floor = Floor(4, 3, 1)
        made.sites[1].advertise(made.aggregator.setup)

    def test_a_threshold_lowered_for_all(self, make_session: Session) -> None:
        setup = make_session().aggregator.setup
        place = encode(setup).index(bytes((4, 3, 3, 1)))
        lowered = bytearray(encode(setup))
        lowered[place + 1] = 2
        with pytest.raises(LoweredThresholdError, match="t = 2: expected at least 3"):
            decode(Setup, lowered)

    def test_a_threshold_lowered_for_some(self, make_session: Session) -> None:
        made = make_session(6, 5, 5, 1)

        def lower(setup: Setup) -> Setup:
            return replace(setup, numbers=Numbers(6, 4, 5, 1))

        made.hook = changing(Setup, lower)
        made.set_up()
        assert isinstance(made.refusals[1], DifferentSetupError)

    def test_terms_that_differ_are_seen_by_the_sites_too(self, make_session: Session) -> None:
        made = make_session(6, 5, 5, 1)
        made.set_up()
        other = replace(made.aggregator.setup, epoch=1)
        mixed = list(made.aggregator._roster.advertisements)
        mixed[1] = made.sites[1].advertise(other)
        with pytest.raises(DifferentSetupError, match="advertisement of site-001"):
            made.sites[0].deal(Roster(tuple(mixed)))

    def test_different_rosters_for_different_sites(self, make_session: Session) -> None:
        def leave_out(roster: Roster) -> Roster:
            return Roster(roster.advertisements[:3])

        made = make_session()
        made.hook = changing(Roster, leave_out)
        made.set_up()  # an honest aggregator drops site 1
        assert isinstance(made.refusals[1], DifferentRosterError)
        for site in (made.sites[0], made.sites[1]):  # a dishonest one cannot hide it from either
            with pytest.raises(DifferentRosterError, match="is signed on another roster"):
                site.accept(self.deals(made))

    @staticmethod
    def deals(session: Simulator) -> Deals:
        """What a server that mixes the two views would send."""
        own = {i: session.sites[i]._state.epoch for i in range(4)}
        dealt = tuple(e.deal.dealt() for e in own.values() if e is not None and e.deal is not None)
        shares = tuple(s for e in own.values() if e and e.deal for s in e.deal.shares[:1])
        return Deals(dealt, shares)

    def test_a_second_roster_for_one_site(self, session: Simulator) -> None:
        roster = session.aggregator._roster
        with pytest.raises(DifferentRosterError, match="another than the one that was dealt for"):
            session.sites[0].deal(Roster(roster.advertisements[:3]))

    def test_a_roster_on_which_two_sites_have_one_key(self, make_session: Session) -> None:
        made = make_session()

        def copy(roster: Roster) -> Roster:
            theirs = roster.advertisements[2]
            unsigned = replace(roster.advertisements[3], masks=theirs.masks)
            signed = replace(unsigned, signature=made.identities[3].sign(unsigned.statement()))
            return Roster((*roster.advertisements[:3], signed))

        assert isinstance(self.refusal(made, Roster, copy), ReusedKeyError)

    def test_a_roster_on_which_this_site_dealt_otherwise(self, session: Simulator) -> None:
        deals = _deals_for(session, 0)
        roster = session.aggregator._roster
        unsigned = replace(deals.dealt[0], shares=bytes(32))
        signature = session.identities[0].sign(unsigned.statement(roster.digest))
        forged = replace(deals, dealt=(replace(unsigned, signature=signature), *deals.dealt[1:]))
        with pytest.raises(UnknownSiteError, match="expected this site's own"):
            session.sites[0].accept(forged)

    def test_a_roster_of_too_few(self, make_session: Session) -> None:
        def leave_out(roster: Roster) -> Roster:
            return Roster(roster.advertisements[:2])

        assert isinstance(self.refusal(make_session(), Roster, leave_out), TooFewSitesError)

    def test_a_roster_that_lacks_this_site(self, make_session: Session) -> None:
        def leave_out(roster: Roster) -> Roster:
            return Roster((roster.advertisements[0], *roster.advertisements[2:]))

        assert isinstance(self.refusal(make_session(), Roster, leave_out), UnknownSiteError)

    def test_members_without_this_site_or_too_few(self, make_session: Session) -> None:
        def leave_out(deals: Deals) -> Deals:
            return replace(deals, dealt=(deals.dealt[0], *deals.dealt[2:]))

        def too_few(deals: Deals) -> Deals:
            return replace(deals, dealt=deals.dealt[:2], shares=deals.shares[:1])

        assert isinstance(self.refusal(make_session(), Deals, leave_out), UnknownSiteError)
        assert isinstance(self.refusal(make_session(), Deals, too_few), TooFewSitesError)

    def test_members_that_change(self, session: Simulator) -> None:
        deals = _deals_for(session, 0)
        fewer = replace(deals, dealt=deals.dealt[:3], shares=deals.shares[:2])
        session.sites[0].accept(deals)
        with pytest.raises(DifferentRosterError, match="as ever"):
            session.sites[0].accept(fewer)

    def test_a_tampered_share(self, make_session: Session) -> None:
        def tamper(deals: Deals) -> Deals:
            return replace(
                deals, shares=replaced(deals.shares, 0, box=flipped(deals.shares[0].box))
            )

        assert isinstance(self.refusal(make_session(), Deals, tamper), TamperedCiphertextError)

    def test_a_share_of_another_site(self, make_session: Session) -> None:
        def swap(deals: Deals) -> Deals:
            return replace(deals, shares=(deals.shares[1], deals.shares[0], deals.shares[2]))

        assert isinstance(self.refusal(make_session(), Deals, swap), MisdirectedShareError)

    def test_a_share_too_few(self, make_session: Session) -> None:
        def drop(deals: Deals) -> Deals:
            return replace(deals, shares=deals.shares[:2])

        assert isinstance(self.refusal(make_session(), Deals, drop), MalformedMessageError)


class TestHostileSitesInSetUp:
    """What a site does wrongly reaches the aggregator, which goes on without it."""

    def refusal(self, session: Simulator, kind: type, change: Change) -> SecAggError:
        session.hook = changing(kind, change)
        assert session.set_up() == (0, 2, 3)
        return session.refusals[1]

    def signed(self, session: Simulator, message: Advertisement) -> Advertisement:
        return replace(message, signature=session.identities[1].sign(message.statement()))

    @pytest.mark.parametrize("place", ["channel", "masks"])
    def test_a_key_of_small_order(self, make_session: Session, place: str) -> None:
        made = make_session()

        def weaken(message: Advertisement) -> Advertisement:
            if place == "channel":
                return self.signed(made, replace(message, channel=bytes(32)))
            return self.signed(made, replace(message, masks=(bytes(32), *message.masks[1:])))

        assert isinstance(self.refusal(made, Advertisement, weaken), WeakKeyError)

    def test_a_key_of_another_site(self, make_session: Session) -> None:
        made = make_session()

        def copy(message: Advertisement) -> Advertisement:
            theirs = made.aggregator._advertised[0].masks[0]
            return self.signed(made, replace(message, masks=(theirs, *message.masks[1:])))

        assert isinstance(self.refusal(made, Advertisement, copy), ReusedKeyError)

    def test_the_channel_key_of_another_site(self, make_session: Session) -> None:
        made = make_session()

        def copy(message: Advertisement) -> Advertisement:
            theirs = made.aggregator._advertised[0].channel
            return self.signed(made, replace(message, channel=theirs))

        assert isinstance(self.refusal(made, Advertisement, copy), ReusedKeyError)

    def test_a_key_for_a_round_too_few(self, make_session: Session) -> None:
        made = make_session()

        def leave_out(message: Advertisement) -> Advertisement:
            return self.signed(made, replace(message, masks=message.masks[:-1]))

        assert isinstance(self.refusal(made, Advertisement, leave_out), DifferentSetupError)

    def test_one_key_for_two_rounds(self, make_session: Session) -> None:
        advertised = make_session().sites[0].advertise(make_session().aggregator.setup)
        for masks in ((advertised.masks[0],) * 4, (advertised.channel, *advertised.masks[1:])):
            with pytest.raises(ReusedKeyError, match="expected a key for each round"):
                replace(advertised, masks=masks)

    def test_another_identity_than_the_sites_own(self, make_session: Session) -> None:
        made = make_session()
        made.identities[0] = Identity(bytes(32))
        with pytest.raises(SwappedIdentityError, match="check the site's key"):
            made.restart(0)

    def test_keys_in_the_name_of_another(self, make_session: Session) -> None:
        made = make_session()

        def claim(message: Advertisement) -> Advertisement:
            return self.signed(made, replace(message, site=2))

        assert isinstance(self.refusal(made, Advertisement, claim), SwappedKeysError)

    def test_a_site_beyond_the_roster(self, make_session: Session) -> None:
        made = make_session()

        def claim(message: Advertisement) -> Advertisement:
            return self.signed(made, replace(message, site=200))

        assert isinstance(self.refusal(made, Advertisement, claim), UnknownSiteError)

    def test_a_deal_that_leaves_one_out(self, make_session: Session) -> None:
        made = make_session()

        def leave_out(deal: Deal) -> Deal:
            unsigned = replace(deal, shares=deal.shares[:2])
            statement = unsigned.dealt().statement(made.aggregator._roster.digest)
            return replace(unsigned, signature=made.identities[1].sign(statement))

        assert isinstance(self.refusal(made, Deal, leave_out), MisdirectedShareError)

    def test_a_deal_sealed_with_a_key_of_small_order(self, make_session: Session) -> None:
        made = make_session()

        def weaken(deal: Deal) -> Deal:
            unsigned = replace(deal, channel=bytes(32))
            statement = unsigned.dealt().statement(made.aggregator._roster.digest)
            return replace(unsigned, signature=made.identities[1].sign(statement))

        assert isinstance(self.refusal(made, Deal, weaken), WeakKeyError)

    def test_a_deal_with_the_shares_of_another_signature(self, make_session: Session) -> None:
        def tamper(deal: Deal) -> Deal:
            return replace(deal, shares=replaced(deal.shares, 0, nonce=bytes(12)))

        assert isinstance(self.refusal(make_session(), Deal, tamper), DifferentRosterError)


def _deals_for(session: Simulator, site: int) -> Deals:
    """What the aggregator sent to a site at the end of the set-up."""
    sent: list[Deals] = []

    def hook(passing: Passing) -> object:
        if isinstance(passing.message, Deals) and passing.destination == site:
            sent.append(passing.message)
        return passing.message

    session.new_epoch(session.aggregator.setup.epoch + 1)
    session.hook = hook
    session.set_up()
    return sent[0]


class TestOpening:
    def opened(self, session: Simulator, **changes: object) -> None:
        opening = session.aggregator.open_round(MODEL, BLOCKS)
        session.sites[0].open_round(replace(opening, **changes), MODEL)  # type: ignore[arg-type]

    def test_another_model_than_the_signed_one(self, session: Simulator) -> None:
        with pytest.raises(DifferentModelError, match="as all sites sign"):
            self.opened(session, model=b"\1" * 32)

    def test_other_members(self, session: Simulator) -> None:
        with pytest.raises(DifferentRosterError, match="of members"):
            self.opened(session, members=(0, 1, 2))

    def test_other_keys(self, session: Simulator) -> None:
        with pytest.raises(DifferentRosterError, match="opening: keys"):
            self.opened(session, roster=bytes(32))

    @pytest.mark.parametrize("number", [4, 5, 65_535])
    def test_a_round_beyond_the_epoch(self, session: Simulator, number: int) -> None:
        with pytest.raises(WrongRoundError, match=f"round {number}: expected 0 to 3"):
            self.opened(session, round=number)

    def test_a_round_before_anyone_is_a_member(self, make_session: Session) -> None:
        made = make_session(
            hook=lambda passing: None if isinstance(passing.message, Deals) else passing.message
        )
        made.set_up()
        opening = made.aggregator.open_round(MODEL, BLOCKS)
        with pytest.raises(WrongPhaseError, match="expected deals first"):
            made.sites[0].open_round(replace(opening, members=()), MODEL)

    def test_a_round_that_is_over(self, session: Simulator, make_vectors: Vectors) -> None:
        session.round(make_vectors(4))
        session.round(make_vectors(4))
        with pytest.raises(WrongRoundError, match="round 0: expected 2 to 3"):
            self.opened(session, round=0)

    def test_a_round_opened_on_two_terms(self, session: Simulator) -> None:
        self.opened(session)
        opening = session.aggregator._round
        assert opening is not None
        other = replace(opening.opening, model=b"\2" * 32)
        with pytest.raises(TwoVectorsError, match="on other terms"):
            session.sites[0].open_round(other, b"\2" * 32)

    def test_a_round_opened_on_other_terms_after_the_vector_was_sent(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        """The attack that gives the difference of two vectors: refused before data is read."""
        opening = session.aggregator.open_round(MODEL, BLOCKS)
        site = session.sites[0]
        site.open_round(opening, MODEL)
        site.upload(opening, make_vectors(4)[0], 1, HEAD)
        session.restart(0)
        other = replace(opening, blocks=(replace(BLOCKS[0], sigma=1.0),))
        for again in (opening, other):
            with pytest.raises(TwoVectorsError):
                session.sites[0].open_round(again, MODEL)

    def test_noise_that_would_wrap_the_sum(self, session: Simulator) -> None:
        with pytest.raises(UnsafeNumbersError, match="leaves no room in 32 bits"):
            self.opened(session, blocks=(replace(BLOCKS[0], sigma=1e8),))

    def test_before_the_set_up_or_without_a_round(
        self, make_session: Session, session: Simulator, make_vectors: Vectors
    ) -> None:
        fresh = make_session().sites[0]
        opening = session.aggregator.open_round(MODEL, BLOCKS)
        with pytest.raises(SecAggError, match="begin a new one"):
            fresh.open_round(opening, MODEL)
        with pytest.raises(WrongPhaseError, match="no round is open"):
            session.sites[1].upload(opening, make_vectors(4)[1], 1, HEAD)


def refused(session: Simulator, make_vectors: Vectors, kind: type, change: Change) -> SecAggError:
    """What site 1 says of a changed message; the others' sum is as exact as ever."""
    session.hook = changing(kind, change)
    vectors = make_vectors(4)
    assert (session.round(vectors) == sum(vectors.values())).all()
    assert set(session.refusals) == {1}
    return session.refusals[1]


def recording(into: list[Any]) -> Change:
    """A change that only takes a note."""

    def keep(message: Any) -> Any:  # noqa: ANN401
        into.append(message)
        return message

    return keep


class TestUploaders:
    def test_a_site_listed_alive_and_dead(self, session: Simulator, make_vectors: Vectors) -> None:
        def both(message: Uploaders) -> Uploaders:
            return replace(message, dropped=(2,))

        found = refused(session, make_vectors, Uploaders, both)
        assert isinstance(found, AliveAndDeadError)
        assert "site-002 is listed twice, expected once" in str(found)

    def test_a_site_listed_neither_alive_nor_dead(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        def neither(message: Uploaders) -> Uploaders:
            return replace(
                message,
                uploaders=(0, 1, 3),
                uploaded=(*message.uploaded[:2], message.uploaded[3]),
                shares=(message.shares[0], message.shares[2]),
            )

        found = refused(session, make_vectors, Uploaders, neither)
        assert isinstance(found, AliveAndDeadError)
        assert "site-002 is listed nowhere, expected once" in str(found)

    def test_this_site_listed_as_dropped(self, session: Simulator, make_vectors: Vectors) -> None:
        def dead(message: Uploaders) -> Uploaders:
            rest = (message.uploaded[0], *message.uploaded[2:])
            return replace(message, uploaders=(0, 2, 3), dropped=(1,), uploaded=rest)

        found = refused(session, make_vectors, Uploaders, dead)
        assert isinstance(found, AliveAndDeadError)
        assert "it is this site, and has sent its vector" in str(found)

    def test_too_few_uploaders(self, session: Simulator, make_vectors: Vectors) -> None:
        def few(message: Uploaders) -> Uploaders:
            return replace(
                message,
                uploaders=(0, 1),
                dropped=(2, 3),
                uploaded=message.uploaded[:2],
                shares=message.shares[:1],
            )

        found = refused(session, make_vectors, Uploaders, few)
        assert isinstance(found, TooFewSitesError)
        assert "2 sites, expected at least n_min = 3" in str(found)

    def test_an_uploader_without_its_signed_upload(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        def leave_out(message: Uploaders) -> Uploaders:
            return replace(message, uploaded=(*message.uploaded[:2], message.uploaded[3]))

        found = refused(session, make_vectors, Uploaders, leave_out)
        assert isinstance(found, UnknownSiteError)
        assert "signed by (0, 1, 3), expected (0, 1, 2, 3)" in str(found)

    def test_an_unknown_uploader(self, session: Simulator, make_vectors: Vectors) -> None:
        def unknown(message: Uploaders) -> Uploaders:
            return replace(message, dropped=(9,))

        assert isinstance(refused(session, make_vectors, Uploaders, unknown), UnknownSiteError)

    def test_an_uploader_that_did_not_upload(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        """The server counts a site, and so its noise, whose vector it never got."""
        last: dict[int, Uploaded] = {}

        def phantom(passing: Passing) -> object:
            message = passing.message
            if isinstance(message, Upload) and passing.source == 2:
                if last:
                    return None
                last[2] = message.uploaded
            if isinstance(message, Uploaders) and message.round == 1 and passing.destination == 1:
                uploaded = (*message.uploaded[:2], last[2], message.uploaded[2])
                shares = (message.shares[0], *message.shares)
                all_of_them = (0, 1, 2, 3)
                return replace(
                    message, uploaders=all_of_them, dropped=(), uploaded=uploaded, shares=shares
                )
            return message

        session.hook = phantom
        for error in (DifferentContextError, ForgedSignatureError):
            last.clear()
            session.new_epoch(session.aggregator.setup.epoch + 1)
            session.set_up()
            session.round(make_vectors(4))
            if error is ForgedSignatureError:
                last[2] = replace(last[2], context=self.next_context(session))
            with pytest.raises(TooFewConfirmationsError):  # with 2 gone and 1 refusing
                session.round(make_vectors(4))
            assert isinstance(session.refusals[1], error)

    @staticmethod
    def next_context(session: Simulator) -> bytes:
        """That of round 1, as the simulator opens it."""
        aggregator = session.aggregator
        roster = aggregator._roster.digest
        return Opening(roster, aggregator.members, 1, MODEL, tuple(BLOCKS)).context

    def test_different_models_for_different_sites(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        """Site 1 trains another model; neither the server nor site 0 takes its vector for one."""
        theirs: list[Uploaded] = []

        def hook(passing: Passing) -> object:
            message = passing.message
            if isinstance(message, Opening) and passing.destination == 1:
                return replace(message, model=b"\3" * 32)
            if isinstance(message, Upload) and passing.source == 1:
                theirs.append(message.uploaded)
            if isinstance(message, Uploaders) and passing.destination == 0:
                uploaded = (message.uploaded[0], theirs[0], *message.uploaded[1:])
                shares = (message.shares[0], *message.shares)
                everyone = (0, 1, 2, 3)
                return replace(
                    message, uploaders=everyone, dropped=(), uploaded=uploaded, shares=shares
                )
            return message

        session.hook = hook
        with pytest.raises(TooFewConfirmationsError):
            session.round(make_vectors(4))
        assert isinstance(session.refusals[1], DifferentContextError)
        assert isinstance(session.refusals[0], DifferentContextError)
        assert "it has another model or other terms" in str(session.refusals[0])

    def test_a_tampered_ciphertext(self, session: Simulator, make_vectors: Vectors) -> None:
        def tamper(message: Uploaders) -> Uploaders:
            box = flipped(message.shares[1].box)
            return replace(message, shares=replaced(message.shares, 1, box=box))

        assert isinstance(
            refused(session, make_vectors, Uploaders, tamper), TamperedCiphertextError
        )

    @pytest.mark.parametrize("relabelled", [False, True])
    def test_a_share_of_one_kind_served_as_another(
        self, make_session: Session, make_vectors: Vectors, relabelled: bool
    ) -> None:
        """One round's mask key has the length of a seed; it must not be given out as one."""
        made = make_session(rounds=1)
        mask_keys = _deals_for(made, 1).shares[0]
        assert mask_keys.kind == MASK_KEYS

        def serve(message: Uploaders) -> Uploaders:
            kind = message.shares[0].kind if relabelled else MASK_KEYS
            other = {"kind": kind, "box": mask_keys.box, "nonce": mask_keys.nonce}
            return replace(message, shares=replaced(message.shares, 0, **other))

        found = refused(made, make_vectors, Uploaders, serve)
        expected = TamperedCiphertextError if relabelled else MisdirectedShareError
        assert type(found) is expected

    def test_shares_of_the_round_before(self, session: Simulator, make_vectors: Vectors) -> None:
        seen: list[Uploaders] = []

        def replay(message: Uploaders) -> Uploaders:
            seen.append(message)
            return replace(message, shares=seen[0].shares)

        session.hook = changing(Uploaders, replay)
        session.round(make_vectors(4))
        found = refused(session, make_vectors, Uploaders, replay)
        assert isinstance(found, TamperedCiphertextError)

    @pytest.mark.parametrize(
        ("keep", "error"), [("context", WrongRoundError), ("round", DifferentContextError)]
    )
    def test_uploaders_of_the_round_before(
        self, session: Simulator, make_vectors: Vectors, keep: str, error: type[SecAggError]
    ) -> None:
        seen: list[Uploaders] = []

        def replay(message: Uploaders) -> Uploaders:
            seen.append(message)
            old = seen[0]
            return old if keep == "context" else replace(old, round=message.round)

        session.hook = changing(Uploaders, replay)
        session.round(make_vectors(4))
        assert type(refused(session, make_vectors, Uploaders, replay)) is error

    def test_a_second_set_of_uploaders(self, session: Simulator, make_vectors: Vectors) -> None:
        def twice(message: Uploaders) -> Uploaders:
            other = replace(
                message,
                uploaders=(0, 1, 2),
                dropped=(3,),
                uploaded=message.uploaded[:3],
                shares=message.shares[:2],
            )
            first = session.sites[1].confirm(message)
            with pytest.raises(SplitViewError, match=r"expected \(0, 1, 2, 3\) as confirmed"):
                session.sites[1].confirm(other)
            assert session.sites[1].confirm(message) == first
            return message

        session.hook = changing(Uploaders, twice)
        session.round(make_vectors(4))
        assert not session.refusals

    def test_before_the_upload(self, session: Simulator, make_vectors: Vectors) -> None:
        sent: list[Uploaders] = []
        session.hook = changing(Uploaders, recording(sent))
        session.round(make_vectors(4))
        opening = session.aggregator.open_round(MODEL, BLOCKS)
        session.sites[1].open_round(opening, MODEL)
        with pytest.raises(WrongPhaseError, match="has sent no vector"):
            session.sites[1].confirm(sent[0])


class TestConfirmations:
    def test_too_few_signatures(self, session: Simulator, make_vectors: Vectors) -> None:
        def few(message: Confirmations) -> Confirmations:
            return replace(message, confirmations=message.confirmations[:2])

        found = refused(session, make_vectors, Confirmations, few)
        assert isinstance(found, TooFewConfirmationsError)
        assert "of 2 sites, expected at least t = 3" in str(found)

    def test_one_signature_twice(self, session: Simulator, make_vectors: Vectors) -> None:
        def twice(message: Confirmations) -> Confirmations:
            one, two, *_ = message.confirmations
            return replace(message, confirmations=(one, two, two))

        found = refused(session, make_vectors, Confirmations, twice)
        assert isinstance(found, MalformedMessageError)
        assert "each once, ascending" in str(found)

    def test_one_signature_twice_past_the_decoder(self, session: Simulator) -> None:
        setup, context = session.aggregator.setup, bytes(32)
        statement = statement_on_uploaders(context, (0, 1, 2))
        signed = [Confirmation(i, context, session.identities[i].sign(statement)) for i in range(3)]
        check_confirmed(setup, (0, 1, 2), context, tuple(signed))
        with pytest.raises(TooFewConfirmationsError, match="of 2 sites"):
            check_confirmed(setup, (0, 1, 2), context, (*signed[:2], signed[1]))

    def test_a_signature_on_another_set(self, session: Simulator, make_vectors: Vectors) -> None:
        def split(message: Confirmations) -> Confirmations:
            statement = statement_on_uploaders(message.context, (0, 1, 2))
            signature = session.identities[2].sign(statement)
            found = replaced(message.confirmations, 2, signature=signature)
            return replace(message, confirmations=found)

        found = refused(session, make_vectors, Confirmations, split)
        assert isinstance(found, SplitViewError)

    def test_a_signature_of_a_site_that_is_no_uploader(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        def add(passing: Passing) -> object:
            message = passing.message
            if isinstance(message, Upload) and passing.source == 3:
                return None
            if isinstance(message, Confirmations) and passing.destination == 1:
                statement = statement_on_uploaders(message.context, (0, 1, 2))
                fourth = Confirmation(3, message.context, session.identities[3].sign(statement))
                return replace(message, confirmations=(*message.confirmations[:2], fourth))
            return message

        session.hook = add
        with pytest.raises(TooFewSitesError):
            session.round(make_vectors(4))
        assert isinstance(session.refusals[1], UnknownSiteError)

    def test_a_second_unmasking(self, session: Simulator, make_vectors: Vectors) -> None:
        def twice(message: Confirmations) -> Confirmations:
            fewer = replace(message, confirmations=message.confirmations[:3])
            first = session.sites[1].unmask(fewer)
            assert session.sites[1].unmask(fewer) == first
            return message

        found = refused(session, make_vectors, Confirmations, twice)
        assert isinstance(found, SecondUnmaskError)

    @pytest.mark.parametrize(
        ("renumbered", "error"), [(False, WrongRoundError), (True, DifferentContextError)]
    )
    def test_a_replayed_unmasking(
        self,
        session: Simulator,
        make_vectors: Vectors,
        renumbered: bool,
        error: type[SecAggError],
    ) -> None:
        seen: list[Confirmations] = []

        def replay(message: Confirmations) -> Confirmations:
            seen.append(message)
            return replace(seen[0], round=message.round) if renumbered else seen[0]

        session.hook = changing(Confirmations, replay)
        session.round(make_vectors(4))
        assert type(refused(session, make_vectors, Confirmations, replay)) is error

    def test_before_the_confirmation(self, session: Simulator, make_vectors: Vectors) -> None:
        def early(passing: Passing) -> object:
            if isinstance(passing.message, Uploaders) and passing.destination == 1:
                return None
            if isinstance(passing.message, Confirmations) and passing.destination == 0:
                with pytest.raises(WrongPhaseError, match="has confirmed no uploaders"):
                    session.sites[1].unmask(passing.message)
            return passing.message

        session.hook = early
        session.round(make_vectors(4))


class TestHostileSitesInARound:
    """The aggregator drops what a site sends wrongly; the sum of the others is exact."""

    def refusal(
        self, session: Simulator, make_vectors: Vectors, kind: type, change: Change
    ) -> SecAggError:
        session.hook = changing(kind, change)
        vectors = make_vectors(4)
        total = session.round(vectors)
        there = [0, 2, 3] if kind is Upload else [0, 1, 2, 3]
        assert (total == np.sum([vectors[s] for s in there], axis=0, dtype=np.uint32)).all()
        return session.refusals[1]

    def test_a_tampered_vector(self, session: Simulator, make_vectors: Vectors) -> None:
        def tamper(upload: Upload) -> Upload:
            return replace(upload, vector=upload.vector + np.uint32(1))

        found = self.refusal(session, make_vectors, Upload, tamper)
        assert isinstance(found, ForgedSignatureError)

    def test_tampered_shares(self, session: Simulator, make_vectors: Vectors) -> None:
        def tamper(upload: Upload) -> Upload:
            return replace(upload, shares=replaced(upload.shares, 0, nonce=bytes(12)))

        found = self.refusal(session, make_vectors, Upload, tamper)
        assert isinstance(found, ForgedSignatureError)

    def test_a_share_too_few(self, session: Simulator, make_vectors: Vectors) -> None:
        def leave_out(upload: Upload) -> Upload:
            return replace(upload, shares=upload.shares[:2])

        found = self.refusal(session, make_vectors, Upload, leave_out)
        assert isinstance(found, MisdirectedShareError)

    def test_a_share_too_long(self, session: Simulator, make_vectors: Vectors) -> None:
        """It would be carried to every other site, as long as a message may be."""

        def lengthen(upload: Upload) -> Upload:
            shares = replaced(upload.shares, 0, box=upload.shares[0].box + bytes(1000))
            unsigned = replace(upload.uploaded, shares=digest_of_shares(shares))
            signature = session.identities[1].sign(unsigned.statement())
            return replace(upload, uploaded=replace(unsigned, signature=signature), shares=shares)

        found = self.refusal(session, make_vectors, Upload, lengthen)
        assert isinstance(found, MisdirectedShareError)

    def test_a_sealing_key_of_small_order(self, session: Simulator, make_vectors: Vectors) -> None:
        def weaken(upload: Upload) -> Upload:
            unsigned = replace(upload.uploaded, channel=bytes(32))
            signature = session.identities[1].sign(unsigned.statement())
            return replace(upload, uploaded=replace(unsigned, signature=signature))

        assert isinstance(self.refusal(session, make_vectors, Upload, weaken), WeakKeyError)

    def test_a_vector_in_the_name_of_another(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        def claim(upload: Upload) -> Upload:
            unsigned = replace(upload.uploaded, site=3)
            signature = session.identities[1].sign(unsigned.statement())
            return replace(upload, uploaded=replace(unsigned, signature=signature))

        found = self.refusal(session, make_vectors, Upload, claim)
        assert isinstance(found, ForgedSignatureError)

    def test_a_ledger_that_was_rolled_back(self, session: Simulator, make_vectors: Vectors) -> None:
        """After 5 entries come 4; or as many, as if this round had not been debited."""

        def signed(upload: Upload, count: int, head: bytes) -> Upload:
            unsigned = replace(upload.uploaded, ledger_count=count, ledger_head=head)
            signature = session.identities[1].sign(unsigned.statement())
            return replace(upload, uploaded=replace(unsigned, signature=signature))

        session.hook = changing(Upload, lambda upload: signed(upload, 5, HEAD))
        session.round(make_vectors(4))
        assert not session.refusals
        for count, head in [(4, HEAD), (5, b"\1" * 32)]:
            found = self.refusal(
                session,
                make_vectors,
                Upload,
                partial(signed, count=count, head=head),
            )
            assert isinstance(found, RolledBackLedgerError)
            assert f"has {count} entries" in str(found)

    def test_a_ledger_that_was_rolled_back_before_a_new_epoch(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        session.ledger = 10
        session.round(make_vectors(4))
        session.new_epoch(1)
        session.set_up()
        session.ledger = 2
        with pytest.raises(TooFewSitesError):
            session.round(make_vectors(4))
        assert {type(found) for found in session.refusals.values()} == {RolledBackLedgerError}

    def test_a_confirmation_of_another_set(self, session: Simulator, make_vectors: Vectors) -> None:
        def other(message: Confirmation) -> Confirmation:
            statement = statement_on_uploaders(message.context, (0, 1, 2))
            return replace(message, signature=session.identities[1].sign(statement))

        found = self.refusal(session, make_vectors, Confirmation, other)
        assert isinstance(found, SplitViewError)

    def test_shares_in_the_name_of_another(self, session: Simulator, make_vectors: Vectors) -> None:
        def claim(message: Unmasking) -> Unmasking:
            unsigned = replace(message, site=2)  # who has not answered yet
            signature = session.identities[1].sign(unsigned.statement())
            return replace(unsigned, signature=signature)

        found = self.refusal(session, make_vectors, Unmasking, claim)
        assert isinstance(found, ForgedSignatureError)
        assert "shares of site-002" in str(found)

    def test_both_kinds_of_shares_of_one_site(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        def both(message: Unmasking) -> Unmasking:
            unsigned = replace(message, masks=(Share(2, bytes(32)),))
            signature = session.identities[1].sign(unsigned.statement())
            return replace(unsigned, signature=signature)

        found = self.refusal(session, make_vectors, Unmasking, both)
        assert isinstance(found, AliveAndDeadError)

    def test_shares_of_another_round(self, session: Simulator, make_vectors: Vectors) -> None:
        def other(message: Unmasking) -> Unmasking:
            unsigned = replace(message, context=bytes(32))
            signature = session.identities[1].sign(unsigned.statement())
            return replace(unsigned, signature=signature)

        found = self.refusal(session, make_vectors, Unmasking, other)
        assert isinstance(found, DifferentContextError)

    def test_shares_that_were_altered_on_the_way(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        def tamper(message: Unmasking) -> Unmasking:
            return replace(message, seeds=replaced(message.seeds, 0, value=bytes(32)))

        found = self.refusal(session, make_vectors, Unmasking, tamper)
        assert isinstance(found, ForgedSignatureError)


class TestSplitView:
    """Two sets of uploaders, so that one group gives a site's seed and another its mask key.

    Sites 0, 1 and 2 are honest, 3 colludes with the server and signs and tells whatever it wants.
    The target is site 2: alive to site 0, dropped to site 1.
    """

    ALIVE, DEAD = (0, 2, 3), (0, 1, 3)

    def attack(self, session: Simulator, vectors: dict[int, np.ndarray]) -> np.ndarray:
        """Site 2's vector, if the sites let it happen."""
        places = range(4)
        opening = session.aggregator.open_round(MODEL, BLOCKS)
        context = opening.context
        for site in session.sites:
            site.open_round(opening, MODEL)
        uploads = [session.sites[i].upload(opening, vectors[i].copy(), 1, HEAD) for i in places]

        def view(members: tuple[int, ...], site: int) -> Uploaders:
            shares = [
                share
                for source in members
                for share in uploads[source].shares
                if share.destination == site
            ]
            signed = tuple(uploads[source].uploaded for source in members)
            dropped = tuple(i for i in places if i not in members)
            return Uploaders(0, context, members, dropped, signed, tuple(shares))

        def confirmations(members: tuple[int, ...], honest: int) -> Confirmations:
            own = session.sites[honest].confirm(view(members, honest))
            statement = statement_on_uploaders(context, members)
            colluder = Confirmation(3, context, session.identities[3].sign(statement))
            return Confirmations(0, context, (own, colluder))

        seeds = session.sites[0].unmask(confirmations(self.ALIVE, 0)).seeds
        masks = session.sites[1].unmask(confirmations(self.DEAD, 1)).masks
        session.sites[3].confirm(view(self.ALIVE, 3))
        epoch = session.sites[3]._state.epoch
        assert epoch is not None
        assert epoch.current is not None
        told = {share.owner: share.value for share in epoch.current.seeds}
        given_seeds = {share.owner: share.value for share in seeds}
        given_keys = {share.owner: share.value for share in masks}
        seed = combine({0: given_seeds[2], 3: told[2]})
        key = combine({1: given_keys[2], 3: epoch.share_of(2, 0)})
        opened = uploads[2].vector.copy()
        keys = session.aggregator._roster.advertisements
        pairs = [pair_mask(key, keys[i].masks[0], context, 2, i) for i in (0, 1, 3)]
        own = self_mask(seed, context, 2)
        add_masks(opened, [m._replace(negative=not m.negative) for m in (own, *pairs)])
        return opened

    def test_is_refused(self, session: Simulator, make_vectors: Vectors) -> None:
        with pytest.raises(TooFewConfirmationsError, match="of 2 sites, expected at least t = 3"):
            self.attack(session, make_vectors(4))

    def test_would_succeed_with_numbers_that_are_refused(
        self, make_session: Session, make_vectors: Vectors, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With t one lower, two disjoint groups sign two sets, and the vector comes out."""
        with pytest.raises(LoweredThresholdError, match="t = 2: expected at least 3"):
            Numbers(4, 2, 3, 1)
        monkeypatch.setattr(Numbers, "__post_init__", lambda _: None)
        made = make_session(4, 2, 3, 1)
        made.set_up()
        vectors = make_vectors(4)
        assert (self.attack(made, vectors) == vectors[2]).all()

    def test_one_colluder_more_is_refused(self) -> None:
        assert Numbers(10, 7, 7, 3).t_collude == 3
        with pytest.raises(LoweredThresholdError, match="t = 7: expected at least 8"):
            Numbers(10, 7, 7, 4)
        with pytest.raises(LoweredThresholdError):
            Numbers(10, 7, 8, 6)
        with pytest.raises(TooManyColludersError, match="at most 1, n_min - 2"):
            Numbers(3, 3, 3, 2)


class TestMaskedWords:
    def test_are_uniform_whatever_the_vector(self, session: Simulator) -> None:
        """Chi-squared of the bytes of zeros under masks; 255 degrees, beyond 400 with < 1e-7."""
        sent: list[Upload] = []
        session.hook = changing(Upload, recording(sent))
        vectors = {site: np.zeros(100_000, dtype=np.uint32) for site in range(4)}
        assert not session.round(vectors).any()
        counts = np.bincount(sent[0].vector.view(np.uint8), minlength=256)
        expected = counts.sum() / 256
        assert ((counts - expected) ** 2 / expected).sum() < 400
        plain = np.bincount(vectors[1].view(np.uint8), minlength=256)
        assert ((plain - expected) ** 2 / expected).sum() > 400

    def test_differ_from_round_to_round(self, session: Simulator) -> None:
        sent: list[Upload] = []
        session.hook = changing(Upload, recording(sent))
        vectors = {site: np.zeros(1000, dtype=np.uint32) for site in range(4)}
        session.round(vectors)
        session.round(vectors)
        assert (sent[0].vector == sent[1].vector).sum() <= 3  # by chance less than 1e-27


def test_every_refusal_has_a_type_and_a_meaning_of_its_own() -> None:
    kinds = [
        kind
        for parent in (SecAggError, UnsafeNumbersError, TwoVectorsError)
        for kind in parent.__subclasses__()
    ]
    assert len({kind.__name__ for kind in kinds}) == len(kinds) >= 30
    assert len({kind.__doc__ for kind in kinds}) == len(kinds)
    assert all(kind.exit_code == 1 for kind in kinds)
