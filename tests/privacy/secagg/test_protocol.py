"""The protocol: exact sums whoever drops, one answer to one question, nothing kept too long."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedveil.config import least_threshold
from fedveil.privacy.noise import Coins
from fedveil.privacy.secagg import aggregator as aggregator_module
from fedveil.privacy.secagg import site as site_module
from fedveil.privacy.secagg import views
from fedveil.privacy.secagg.encoding import encode
from fedveil.privacy.secagg.errors import (
    BelowFloorError,
    DuplicateMessageError,
    LostStateError,
    MalformedMessageError,
    NotKeptError,
    SecAggError,
    StaleEpochError,
    StateInUseError,
    TamperedCiphertextError,
    TooFewConfirmationsError,
    TooFewSitesError,
    TwoVectorsError,
    UnknownSiteError,
    UnsafeNumbersError,
    WrongPhaseError,
    WrongRoundError,
    WrongShareError,
)
from fedveil.privacy.secagg.keys import digest, public_of
from fedveil.privacy.secagg.masks import add_masks, pair_mask, self_mask
from fedveil.privacy.secagg.messages import (
    Advertisement,
    Confirmation,
    Confirmations,
    Deal,
    Deals,
    Dealt,
    Roster,
    Share,
    Unmasking,
    Upload,
    Uploaded,
    Uploaders,
    digest_of_seed,
    digest_of_shares,
)
from fedveil.privacy.secagg.shamir import combine, split
from fedveil.privacy.secagg.shares import open_share
from fedveil.privacy.secagg.simulator import MODEL, SERVER, Passing, Simulator
from fedveil.privacy.secagg.site import Site
from fedveil.privacy.secagg.terms import Block, Floor, Numbers, Opening, Setup
from fedveil.privacy.secagg.transcript import Kept, verify_transcript

Vectors = Callable[..., dict[int, np.ndarray]]
Sum = Callable[..., np.ndarray]
Session = Callable[..., Simulator]
HEAD = bytes(32)


def losing(kind: type, sites: set[int]) -> Callable[[Passing], object]:
    """A network that loses one kind of message from or to some sites."""

    def hook(passing: Passing) -> object:
        lost = type(passing.message) is kind and {passing.source, passing.destination} & sites
        return None if lost else passing.message

    return hook


class Drops(NamedTuple):
    """A federation, and who is lost in which phase."""

    numbers: Numbers
    lost: dict[type, set[int]]


@st.composite
def drops(draw: st.DrawFn) -> Drops:
    """Numbers that are safe, and as many losses in every phase as they bear."""
    n = draw(st.integers(3, 9))
    t_collude = draw(st.integers(0, n - 2))
    least = least_threshold(n, t_collude)
    if least > n:
        t_collude, least = 0, least_threshold(n, 0)
    t = draw(st.integers(least, n))
    n_min = draw(st.integers(max(t, t_collude + 2), n))
    there = draw(st.permutations(range(n)))
    lost: dict[type, set[int]] = {}
    setting_up: tuple[type, ...] = (Advertisement, Roster, Deal, Deals, Opening, Upload)
    for kind in setting_up:
        count = draw(st.integers(0, len(there) - n_min))
        lost[kind], there = set(there[:count]), there[count:]
    afterwards: tuple[type, ...] = (Uploaders, Confirmation, Confirmations, Unmasking)
    for kind in afterwards:
        count = draw(st.integers(0, len(there) - t))
        lost[kind], there = set(there[:count]), there[count:]
    return Drops(Numbers(n, t, n_min, t_collude), lost)


class TestTheSum:
    @given(drops(), st.integers(1, 300), st.integers(0, 2**32))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
    def test_is_exactly_that_of_the_uploaders_whoever_drops_in_whichever_phase(
        self, make_vectors: Vectors, plain_sum: Sum, found: Drops, length: int, seed: int
    ) -> None:
        def hook(passing: Passing) -> object:
            return losing(type(passing.message), found.lost.get(type(passing.message), set()))(
                passing
            )

        entropy = np.random.default_rng(seed).bytes
        session = Simulator(found.numbers, rounds=2, hook=hook, entropy=entropy)
        session.set_up()
        vectors = make_vectors(found.numbers.n, length, seed)
        total = session.round(vectors)
        before = (Advertisement, Roster, Deal, Deals, Opening, Upload)
        away = set().union(*(found.lost[kind] for kind in before))
        uploaders = [site for site in range(found.numbers.n) if site not in away]
        assert len(uploaders) >= found.numbers.n_min
        assert (total == plain_sum(vectors, uploaders)).all()
        assert session.refusals.keys() <= away  # who lost its deals refuses, nobody else

    @pytest.mark.parametrize("length", [1, 131_071, 131_072, 131_073])
    def test_is_exact_around_the_blocks_of_the_masks(
        self, session: Simulator, make_vectors: Vectors, plain_sum: Sum, length: int
    ) -> None:
        vectors = make_vectors(4, length)
        assert (session.round(vectors) == plain_sum(vectors, [0, 1, 2, 3])).all()

    def test_is_exact_for_ten_million_words(self, session: Simulator) -> None:
        draws = np.random.default_rng(1)
        vectors = {i: draws.integers(0, 2**32, 10_000_000, dtype=np.uint32) for i in range(4)}
        session.hook = losing(Upload, {2})
        expected = vectors[0] + vectors[1] + vectors[3]
        assert (session.round(vectors) == expected).all()

    def test_whoever_dropped_is_back_in_the_next_round(
        self, session: Simulator, make_vectors: Vectors, plain_sum: Sum
    ) -> None:
        vectors = make_vectors(4)
        for round_number, away in enumerate([{0}, {1}, {2}, set()]):
            session.hook = losing(Upload, away)
            there = [site for site in range(4) if site not in away]
            assert (session.round(vectors) == plain_sum(vectors, there)).all(), round_number

    def test_needs_a_new_epoch_when_the_keys_are_used_up(
        self, session: Simulator, make_vectors: Vectors, plain_sum: Sum
    ) -> None:
        vectors = make_vectors(4)
        for _ in range(4):
            session.round(vectors)
        with pytest.raises(WrongRoundError, match="begin a new epoch"):
            session.round(vectors)
        session.new_epoch(1)
        session.set_up()
        assert (session.round(vectors) == plain_sum(vectors, [0, 1, 2, 3])).all()

    @pytest.mark.parametrize(
        ("kind", "error"),
        [
            (Upload, TooFewSitesError),
            (Confirmation, TooFewConfirmationsError),
            (Unmasking, TooFewSitesError),
        ],
    )
    def test_is_not_made_of_too_few_and_the_next_round_is_fine(
        self,
        session: Simulator,
        make_vectors: Vectors,
        plain_sum: Sum,
        kind: type,
        error: type[SecAggError],
    ) -> None:
        vectors = make_vectors(4)
        session.hook = losing(kind, {0, 1})
        with pytest.raises(error, match="expected at least"):
            session.round(vectors)
        session.hook = losing(kind, set())
        assert (session.round(vectors) == plain_sum(vectors, [0, 1, 2, 3])).all()
        assert session.aggregator._number == 2  # the attempt's number is burnt

    @pytest.mark.parametrize("kind", [Advertisement, Deal, Upload])
    def test_it_is_n_min_that_must_be_there_and_not_t(
        self, make_session: Session, make_vectors: Vectors, kind: type
    ) -> None:
        made = make_session(6, 4, 5, 1, hook=losing(kind, {0, 1}))
        run = made.set_up if kind is not Upload else partial(made.round, make_vectors(6))
        if kind is Upload:
            made.set_up()
        with pytest.raises(TooFewSitesError, match=r"4 sites, expected at least n_min = 5"):
            run()

    @pytest.mark.parametrize("kind", [Advertisement, Deal])
    def test_too_few_make_no_epoch(self, make_session: Session, kind: type) -> None:
        with pytest.raises(TooFewSitesError, match=r"2 sites, expected at least n_min = 3"):
            make_session(hook=losing(kind, {0, 1})).set_up()

    def test_runs_at_the_smallest_and_with_sites_to_spare(
        self, make_session: Session, make_vectors: Vectors, plain_sum: Sum
    ) -> None:
        for n, t, n_min, t_collude in [(2, 2, 2, 0), (3, 3, 3, 1), (20, 15, 16, 8)]:
            made = make_session(n, t, n_min, t_collude)
            assert made.set_up() == tuple(range(n))
            vectors = make_vectors(n)
            assert (made.round(vectors) == plain_sum(vectors, list(range(n)))).all()


class TestWrongShares:
    def lying(self, liars: set[int]) -> Callable[[Passing], object]:
        """A network in which some sites sign shares that are none."""

        def hook(passing: Passing) -> object:
            message = passing.message
            if isinstance(message, Unmasking) and passing.source in liars:
                (first, *rest) = message.seeds
                seeds = (replace(first, value=bytes(32)), *rest)
                unsigned = replace(message, seeds=seeds)
                identity = self.session.identities[passing.source]
                return replace(unsigned, signature=identity.sign(unsigned.statement()))
            return message

        return hook

    @pytest.mark.parametrize("liars", [{0}, {3}, {0, 1}, {1, 3}])
    def test_are_left_out_while_t_right_ones_remain(
        self, make_session: Session, make_vectors: Vectors, plain_sum: Sum, liars: set[int]
    ) -> None:
        self.session = make_session(6, 4, 5, 1)
        self.session.set_up()
        self.session.hook = self.lying(liars)
        vectors = make_vectors(6)
        assert (self.session.round(vectors) == plain_sum(vectors, list(range(6)))).all()

    def test_name_the_dealer_whose_secret_is_lost_and_nobody_else(
        self, make_session: Session, make_vectors: Vectors, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Site 4 deals shares that do not fit, and site 5 gives back wrong ones of site 0's."""
        self.session = make_session(6, 4, 5, 1)
        self.session.set_up()
        honest = split

        def misfit(secret: bytes, t: int, n: int, entropy: Any) -> list[bytes]:  # noqa: ANN401
            return [entropy(len(secret)) for _ in range(n)]

        def hook(passing: Passing) -> object:
            opens = isinstance(passing.message, Opening) and passing.destination == 4
            monkeypatch.setattr(site_module, "split", misfit if opens else honest)
            return self.lying({5})(passing)

        self.session.hook = hook
        with pytest.raises(WrongShareError, match="give what site-004 committed to"):
            self.session.round(make_vectors(6))

    def test_are_left_out_of_a_hundred_too(self) -> None:
        """A choice of 67 misses two liars with 0.107: all 2001 fail with less than 1e-98."""
        sites = tuple(range(100))
        tries = aggregator_module._choices(sites, 67)
        assert any(40 not in chosen and 50 not in chosen for chosen in tries)
        assert next(aggregator_module._choices(sites, 67)) == sites[:67]
        assert list(aggregator_module._choices(sites[:3], 3)) == [(0, 1, 2)]

    def test_of_a_dropped_sites_mask_key_are_left_out_too(
        self, make_session: Session, make_vectors: Vectors, plain_sum: Sum
    ) -> None:
        made = make_session(6, 4, 5, 1)
        made.set_up()

        def hook(passing: Passing) -> object:
            message = passing.message
            if isinstance(message, Upload) and passing.source == 3:
                return None
            if isinstance(message, Unmasking) and passing.source == 0:
                unsigned = replace(message, masks=(Share(3, bytes(32)),))
                signature = made.identities[0].sign(unsigned.statement())
                return replace(unsigned, signature=signature)
            return message

        made.hook = hook
        vectors = make_vectors(6)
        assert (made.round(vectors) == plain_sum(vectors, [0, 1, 2, 4, 5])).all()

    def test_never_give_a_wrong_sum(self, make_session: Session, make_vectors: Vectors) -> None:
        self.session = make_session(6, 4, 5, 1)
        self.session.set_up()
        self.session.hook = self.lying({0, 1, 2})
        with pytest.raises(
            WrongShareError,
            match="dealt wrongly, or too many were given back wrongly",
        ):
            self.session.round(make_vectors(6))


class TestKilledAndAskedAgain:
    """A site that is killed after any send answers with the same bytes, or refuses."""

    KINDS = (Setup, Roster, Deals, Opening, Uploaders, Confirmations)

    def asked_again(
        self, session: Simulator, vectors: dict[int, np.ndarray], kind: type, *, killed: bool
    ) -> list[tuple[bytes | None, bytes | SecAggError | None]]:
        """What site 1 answered to one kind of message, and what to the same again."""
        answers: list[tuple[bytes | None, bytes | SecAggError | None]] = []
        asked: list[object] = []

        def again(question: object) -> bytes | SecAggError | None:
            if killed:
                session.restart(1)
            try:
                return encoded(answer(session.sites[1], question, vectors[1]))
            except SecAggError as error:
                return error

        def hook(passing: Passing) -> object:
            if passing.destination == 1 and type(passing.message) is kind:
                asked.append(passing.message)
            if passing.source == 1 and asked and not answers and kind is not Deals:
                answers.append((encoded(passing.message), again(asked[0])))
            return passing.message

        session.hook = hook
        session.set_up()
        if kind is Deals:
            answers.append((None, again(asked[0])))
        session.round(vectors)
        assert not session.refusals
        return answers

    @pytest.mark.parametrize("killed", [True, False])
    @pytest.mark.parametrize("kind", KINDS)
    def test_it_sends_the_same_bytes_or_refuses(
        self, make_session: Session, make_vectors: Vectors, kind: type, killed: bool
    ) -> None:
        ((first, second),) = self.asked_again(make_session(), make_vectors(4), kind, killed=killed)
        if kind is Opening and killed:
            assert isinstance(second, NotKeptError)
        else:
            assert first == second

    def test_it_goes_on_in_each_phase_after_a_kill(
        self, make_session: Session, make_vectors: Vectors, plain_sum: Sum
    ) -> None:
        made = make_session()

        def hook(passing: Passing) -> object:
            if passing.source != SERVER:
                made.restart(passing.source)  # killed as soon as it has sent
            return passing.message

        made.hook = hook
        made.set_up()
        vectors = make_vectors(4)
        for _ in range(2):
            assert (made.round(vectors) == plain_sum(vectors, [0, 1, 2, 3])).all()
        assert not made.refusals

    def test_what_is_sent_was_saved_before(self, session: Simulator, make_vectors: Vectors) -> None:
        """With a disk that refuses, nothing is sent in any phase."""
        sent: list[Passing] = []

        def hook(passing: Passing) -> object:
            if passing.source == 1:
                sent.append(passing)
            return passing.message

        def full(content: bytes) -> None:
            raise LostStateError("disk: is full")

        for kind in (Opening, Uploaders, Confirmations):
            session.hook = hook
            save = session.stores[1].save

            def fill(passing: Passing, kind: type = kind) -> object:
                if passing.destination == 1 and type(passing.message) is kind:
                    session.stores[1].save = full  # type: ignore[method-assign]
                    sent.clear()
                return hook(passing)

            session.hook = fill
            session.round(make_vectors(4))
            assert isinstance(session.refusals[1], LostStateError)
            assert sent == []
            session.stores[1].save = save  # type: ignore[method-assign]

    def test_a_save_that_fails_after_masking_leaves_the_round_as_it_was(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        opening = session.aggregator.open_round(MODEL, [Block("sum", 10, 1.0, 1.0, 0.0, 1.0)])
        site, store = session.sites[1], session.stores[1]
        site.open_round(opening, MODEL)
        before, vector = store.content, make_vectors(4)[1]
        plain = vector.copy()

        def full(content: bytes) -> None:
            raise LostStateError("disk: is full")

        store.save = full  # type: ignore[method-assign]
        with pytest.raises(LostStateError):
            site.upload(opening, vector, 1, HEAD)
        assert store.content == before
        assert site.open_round(opening, MODEL) is None  # it has nothing to send again
        assert (vector != plain).any()
        del store.save
        upload = site.upload(opening, plain.copy(), 1, HEAD)  # nothing was sent: the vector may be
        session.aggregator.add_upload(upload)

    def test_a_vector_is_sent_once(self, session: Simulator, make_vectors: Vectors) -> None:
        opening = session.aggregator.open_round(MODEL, [Block("sum", 10, 1.0, 1.0, 0.0, 1.0)])
        site = session.sites[1]
        assert site.open_round(opening, MODEL) is None
        upload = site.upload(opening, make_vectors(4)[1], 1, HEAD)
        with pytest.raises(TwoVectorsError, match="its vector was sent"):
            site.upload(opening, make_vectors(4)[2], 1, HEAD)
        assert site.open_round(opening, MODEL) is upload
        with pytest.raises(ValueError, match="read-only"):
            upload.vector[0] = 1  # what may be sent again cannot be changed


def encoded(message: object) -> bytes | None:
    return None if message is None else encode(message)  # type: ignore[arg-type]


def answer(site: Site, message: object, vector: np.ndarray) -> object:
    """What a site answers to any message."""
    match message:
        case Setup():
            return site.advertise(message)
        case Roster():
            return site.deal(message)
        case Deals():
            site.accept(message)
            return None
        case Opening():
            return site.open_round(message, message.model) or site.upload(message, vector, 1, HEAD)
        case Uploaders():
            return site.confirm(message)
        case Confirmations():
            return site.unmask(message)
    raise TypeError(message)


class TestOneAtATime:
    """Whatever is asked at once, from two objects or after a failure, has one answer."""

    def open(self, session: Simulator) -> Opening:
        opening = session.aggregator.open_round(MODEL, [Block("sum", 10, 1.0, 1.0, 0.0, 1.0)])
        for site in session.sites:
            site.open_round(opening, MODEL)
        return opening

    @pytest.mark.parametrize("kind", [Setup, Roster, Deals, Opening, Uploaders, Confirmations])
    def test_a_second_step_at_once_is_refused(
        self, make_session: Session, make_vectors: Vectors, kind: type
    ) -> None:
        """Whichever step is being saved, and whichever is asked for meanwhile."""
        made, vectors = make_session(), make_vectors(4)
        asked: list[object] = []
        refused: list[str] = []
        save = made.stores[1].save

        def meanwhile(content: bytes) -> None:
            for message in asked:
                try:
                    answer(made.sites[1], message, vectors[1].copy())
                except StateInUseError as error:
                    refused.append(str(error))
            save(content)

        def hook(passing: Passing) -> object:
            if passing.destination == 1:
                asked.append(passing.message)
                saves = type(passing.message) is kind
                made.stores[1].save = meanwhile if saves else save  # type: ignore[method-assign]
            return passing.message

        made.hook = hook
        made.set_up()
        made.round(vectors)
        steps = [Setup, Roster, Deals, Opening, Uploaders, Confirmations].index(kind) + 1
        # An opening saves twice: when the round is opened, and with the vector.
        assert len(refused) == steps * (2 if kind is Opening else 1)
        assert all("is in another step, expected one at a time" in text for text in refused)
        with pytest.raises(StateInUseError), made.sites[1].busy:
            made.sites[1].end_epoch()

    def test_a_twin_on_the_same_store_is_refused(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        """Two objects could sign two sets of uploaders, and a vector would come out."""
        opening, vectors = self.open(session), make_vectors(4)
        twin = session._site(1)
        session.sites[1].upload(opening, vectors[1], 1, HEAD)
        with pytest.raises(StateInUseError, match="was changed since this site took it up"):
            twin.upload(opening, vectors[2], 1, HEAD)
        with pytest.raises(TwoVectorsError):
            session._site(1).upload(opening, vectors[3], 1, HEAD)

    def test_a_vector_that_was_made_for_another_opening_is_refused(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        """The server opens a round with noise, and another without while the site computes."""
        first = self.open(session)
        quiet = [Block("sum", 10, 1.0, 1.0, 9.0, 1.0)]
        second = session.aggregator.open_round(MODEL, quiet)
        session.sites[1].open_round(second, MODEL)
        vector = make_vectors(4)[1]
        plain = vector.copy()
        with pytest.raises(WrongRoundError, match="vector: is of round 0, expected 1 as opened"):
            session.sites[1].upload(first, vector, 1, HEAD)
        assert (vector == plain).all()

    def test_a_vector_that_was_overwritten_is_not_sent_again(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        opening, base = self.open(session), make_vectors(4)[1]
        session.sites[1].upload(opening, base[:], 1, HEAD)
        base[:] = 7777  # the caller's own array: what would go out is plain
        with pytest.raises(TwoVectorsError, match="was overwritten since it was sent"):
            session.sites[1].open_round(opening, MODEL)

    @pytest.mark.parametrize(
        ("count", "head"), [(-1, HEAD), (2**64, HEAD), (True, HEAD), (1, bytes(31)), (1, None)]
    )
    def test_a_ledger_that_is_none_is_refused_while_the_vector_is_whole(
        self,
        session: Simulator,
        make_vectors: Vectors,
        count: Any,  # noqa: ANN401
        head: Any,  # noqa: ANN401
    ) -> None:
        opening, vector = self.open(session), make_vectors(4)[1]
        plain = vector.copy()
        with pytest.raises(MalformedMessageError, match="ledger"):
            session.sites[1].upload(opening, vector, count, head)
        assert (vector == plain).all()
        session.sites[1].upload(opening, vector, 1, HEAD)

    def test_masks_that_fail_leave_a_vector_that_is_not_masked_again(
        self, session: Simulator, make_vectors: Vectors, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opening, vector = self.open(session), make_vectors(4)[1]

        def fail(words: np.ndarray, masks: object) -> None:
            words[:5] = 0
            raise MemoryError

        with monkeypatch.context() as broken:
            broken.setattr(site_module, "add_masks", fail)
            with pytest.raises(MemoryError):
                session.sites[1].upload(opening, vector, 1, HEAD)
        with pytest.raises(MalformedMessageError, match="expected flat writeable"):
            session.sites[1].upload(opening, vector, 1, HEAD)

    def test_an_opening_that_is_not_saved_leaves_the_round_before(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        opening, site = self.open(session), session.sites[1]
        upload = site.upload(opening, make_vectors(4)[1], 1, HEAD)
        following = session.aggregator.open_round(MODEL, [Block("sum", 10, 1.0, 1.0, 0.0, 1.0)])

        def full(content: bytes) -> None:
            raise LostStateError("disk: is full")

        session.stores[1].save = full  # type: ignore[method-assign]
        with pytest.raises(LostStateError):
            site.open_round(following, MODEL)
        assert site.open_round(opening, MODEL) is upload

    def test_a_vector_of_another_epochs_round_is_refused(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        first = self.open(session)
        session.new_epoch(1)
        session.set_up()
        self.open(session)
        with pytest.raises(WrongRoundError, match="vector: is of round 0"):
            session.sites[1].upload(first, make_vectors(4)[1], 1, HEAD)

    def test_the_vector_of_the_round_before_is_not_sent_for_the_next(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        opening, site = self.open(session), session.sites[1]
        site.upload(opening, make_vectors(4)[1], 1, HEAD)
        following = self.open(session)
        assert site.open_round(following, MODEL) is None
        site.upload(following, make_vectors(4)[1], 2, HEAD)
        site.end_epoch()
        assert site._sent is None

    def test_a_confirmed_vector_is_not_kept_in_memory(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        session.round(make_vectors(4))
        assert [site._sent for site in session.sites] == [None] * 4

    def test_a_floor_that_was_raised_and_a_pin_that_was_revoked_count_at_once(
        self, session: Simulator
    ) -> None:
        opening = session.aggregator.open_round(MODEL, [Block("sum", 10, 1.0, 1.0, 0.0, 1.0)])
        session.sites[0]._floor = Floor(5, 3, 1)
        with pytest.raises(BelowFloorError, match="n = 4: expected at least 5"):
            session.sites[0].open_round(opening, MODEL)
        session.sites[1]._pinned = {n: k for n, k in session.pinned.items() if n != "site-002"}
        with pytest.raises(UnknownSiteError, match="has site-002"):
            session.sites[1].open_round(opening, MODEL)

    def test_the_last_epoch_there_can_be_is_erased_too(self, make_session: Session) -> None:
        made = make_session()
        made.new_epoch(2**32 - 2)
        made.set_up()
        made.sites[0].end_epoch()
        with pytest.raises(
            UnsafeNumbersError, match="epoch = 4294967295: expected 0 to 4294967294"
        ):
            made.new_epoch(2**32 - 1)


class TestErasure:
    def session(self) -> tuple[Simulator, dict[str, bytes]]:
        """A federation whose site 0 has its secrets recorded as they are drawn."""
        drawn: list[bytes] = []
        draws = np.random.default_rng(0)

        def entropy(count: int) -> bytes:
            drawn.append(draws.bytes(count))
            return drawn[-1]

        made = Simulator(Numbers(4, 3, 3, 1), rounds=3, entropy=entropy)
        before = len(drawn)
        made.set_up()
        names = ("channel", "mask 0", "mask 1", "mask 2")
        secrets = dict(zip(names, drawn[before : before + 4], strict=True))
        epoch = made.sites[0]._state.epoch
        assert epoch is not None
        assert secrets["channel"] == epoch.channel
        for number in range(3):
            secrets[f"held {number}"] = epoch.share_of(1, number)
        return made, secrets

    def kept(self, session: Simulator, secrets: dict[str, bytes]) -> set[str]:
        content = session.stores[0].content
        assert content is not None
        return {name for name, secret in secrets.items() if secret in content}

    def test_keys_and_shares_go_with_their_round(self, make_vectors: Vectors) -> None:
        session, secrets = self.session()
        assert self.kept(session, secrets) == secrets.keys()
        session.round(make_vectors(4))
        assert self.kept(session, secrets) == secrets.keys() - {"mask 0", "held 0"}
        session.hook = losing(Uploaders, {0})  # abandoned by site 0 in round 1
        session.round(make_vectors(4))
        assert self.kept(session, secrets) == secrets.keys() - {"mask 0", "held 0"}

        def look(passing: Passing) -> object:
            if isinstance(passing.message, Upload) and passing.source == 0:
                assert self.kept(session, secrets) == {"channel", "mask 2", "held 2"}
            return passing.message

        session.hook = look
        session.round(make_vectors(4))
        assert self.kept(session, secrets) == {"channel"}
        session.sites[0].end_epoch()
        assert self.kept(session, secrets) == set()

    def test_a_new_epoch_erases_the_one_before(self) -> None:
        session, secrets = self.session()
        session.new_epoch(1)
        session.set_up()
        assert self.kept(session, secrets) == set()

    def test_a_site_cannot_open_what_it_sealed_itself(
        self, session: Simulator, make_vectors: Vectors
    ) -> None:
        """All of a site's state and all that crossed the network do not give its own past seed."""
        sent: list[Upload] = []

        def hook(passing: Passing) -> object:
            if isinstance(passing.message, Upload) and passing.source == 0:
                sent.append(passing.message)
            return passing.message

        session.hook = hook
        session.round(make_vectors(4))
        epoch = session.sites[0]._state.epoch
        assert epoch is not None
        share, context = sent[0].shares[0], sent[0].uploaded.context
        theirs = session.aggregator._roster.advertisements[share.destination].channel
        route = (share.kind, share.source, share.destination)
        with pytest.raises(TamperedCiphertextError):
            open_share(share, route, context, epoch.channel, theirs, 32)
        other = session.sites[share.destination]._state.epoch
        assert other is not None
        ours = sent[0].uploaded.channel
        assert len(open_share(share, route, context, other.channel, ours, 32)) == 32

    def test_keys_that_are_erased_are_not_another_rounds(self, session: Simulator) -> None:
        epoch = session.sites[0]._state.epoch
        assert epoch is not None
        later = epoch.erased(2)
        assert later.mask_key(2) == epoch.mask_key(2)
        for ask in (later.mask_key, lambda number: later.share_of(1, number)):
            with pytest.raises(LostStateError, match="round 1: its keys are erased"):
                ask(1)

    def test_secrets_are_not_printed(self, session: Simulator) -> None:
        epoch = session.sites[0]._state.epoch
        assert epoch is not None
        printed = repr(session.sites[0]._state)
        secrets = (epoch.channel, *epoch.masks, epoch.share_of(1, 0))
        assert not any(repr(secret) in printed for secret in secrets)

    def test_the_answer_to_unmasking_goes_with_the_next_round(self, make_vectors: Vectors) -> None:
        session, _ = self.session()
        given: list[bytes] = []

        def hook(passing: Passing) -> object:
            if isinstance(passing.message, Unmasking) and passing.source == 0:
                given.extend(share.value for share in passing.message.seeds)
            return passing.message

        session.hook = hook
        session.round(make_vectors(4))
        first = given.copy()
        assert len(first) == 4
        content = session.stores[0].content or b""
        assert [content.count(share) for share in first] == [1] * 4  # in the answer only
        session.round(make_vectors(4))
        assert not any(share in (session.stores[0].content or b"") for share in first)

    def test_a_burnt_round_is_not_opened_again(self, session: Simulator) -> None:
        blocks = [Block("sum", 10, 1.0, 1.0, 0.0, 1.0)]
        first = session.aggregator.open_round(MODEL, blocks)
        second = session.aggregator.open_round(MODEL, blocks)
        site = session.sites[0]
        site.open_round(second, MODEL)
        with pytest.raises(WrongRoundError, match=r"round 0: expected 2 to 3"):
            site.open_round(first, MODEL)

    def test_an_epoch_that_is_over_is_not_opened_again(self, session: Simulator) -> None:
        site = session.sites[0]
        site.end_epoch()
        for _ in range(2):
            with pytest.raises(StaleEpochError, match=r"epoch 0: expected 1 or a later one"):
                site.advertise(session.aggregator.setup)
            session.restart(0)
            site = session.sites[0]

    def test_state_of_another_site_or_run_is_none(self, session: Simulator) -> None:
        for site, run in [(1, session.run), (0, "another")]:
            with pytest.raises(LostStateError, match=f"expected site-00{site} in {run}"):
                Site(
                    session.names[site],
                    run,
                    session.identities[site],
                    session.pinned,
                    session.stores[0],
                    Floor(),
                )

    def test_lost_state_needs_a_new_epoch(self, session: Simulator, make_vectors: Vectors) -> None:
        session.stores[0].content = None
        session.restart(0)
        session.round(make_vectors(4))
        assert isinstance(session.refusals[0], LostStateError)
        session.new_epoch(1)
        session.set_up()
        session.round(make_vectors(4))
        assert not session.refusals


class TestLaterDrop:
    """A site that survives round 0 and drops in round 1: its first vector stays out of reach."""

    def attack(self, session: Simulator, vectors: dict[int, np.ndarray]) -> np.ndarray:
        """All that the server and site 3 can do for site 0's vector of round 0."""
        uploads: dict[int, Upload] = {}
        seeds: dict[int, dict[int, bytes]] = {}
        keys: list[dict[int, bytes]] = []

        def watch(passing: Passing) -> object:
            message = passing.message
            if isinstance(message, Upload) and passing.source == 0:
                if uploads:
                    return None  # it drops in round 1
                uploads[0] = message
            if isinstance(message, Unmasking):
                if len(uploads) == 1 and not message.masks:
                    seeds.setdefault(0, {})[passing.source] = message.seeds[0].value
                if message.masks:
                    keys.append({passing.source: message.masks[0].value})
            return message

        session.set_up()
        session.hook = watch
        session.round(vectors)
        session.round(vectors)
        seed = combine(dict(list(seeds[0].items())[:3]))
        shares = {site: value for found in keys for site, value in found.items()}
        rebuilt = combine(dict(list(shares.items())[:3]))
        roster = session.aggregator._roster
        assert public_of(rebuilt) == roster.advertisements[0].masks[1]
        context = uploads[0].uploaded.context
        opened = uploads[0].vector.copy()
        own = self_mask(seed, context, 0)._replace(negative=True)
        pairs = [
            pair_mask(rebuilt, roster.advertisements[other].masks[0], context, 0, other)
            for other in (1, 2, 3)
        ]
        add_masks(opened, [own, *(p._replace(negative=not p.negative) for p in pairs)])
        return opened

    def test_its_first_vector_stays_out_of_reach(
        self, make_session: Session, make_vectors: Vectors
    ) -> None:
        vectors = make_vectors(4, 1000)
        opened = self.attack(make_session(), vectors)
        # By chance a coordinate agrees with 2^-32: more than three do with less than 1e-27.
        assert (opened == vectors[0]).sum() <= 3

    def test_with_one_key_for_all_rounds_the_same_attack_opens_it(
        self, make_session: Session, make_vectors: Vectors, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Advertisement, "__post_init__", lambda _: None)
        monkeypatch.setattr(views, "check_keys", lambda _: None)
        monkeypatch.setattr(aggregator_module, "check_fresh", lambda *_: None)
        made = make_session()
        for site in made.sites:
            site._entropy = repeating(site._entropy)
        vectors = make_vectors(4, 1000)
        assert (self.attack(made, vectors) == vectors[0]).all()


def repeating(entropy: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """Coins that give one key for all rounds: the second of 32 bytes, again and again."""
    drawn: list[bytes] = []

    def draw(count: int) -> bytes:
        if count != 32 or len(drawn) > 5:
            return entropy(count)
        drawn.append(entropy(count) if len(drawn) < 2 else drawn[1])
        return drawn[-1]

    return draw


class TestWhatIsDealt:
    """Secrets are fresh, shared at exactly t, and sealed with keys that nobody has twice."""

    def messages(self, session: Simulator) -> list[Any]:
        """All that two rounds send up."""
        sent: list[Any] = []

        def hook(passing: Passing) -> object:
            if passing.source != SERVER:
                sent.append(passing.message)
            return passing.message

        session.hook = hook
        session.set_up()
        for number in range(2):
            session.round({site: np.full(5, number, np.uint32) for site in range(6)})
        return sent

    @pytest.fixture
    def made(self) -> Simulator:
        """Six sites, threshold 4: one fewer must not do."""
        return Simulator(Numbers(6, 4, 5, 1), entropy=np.random.default_rng(0).bytes)

    def test_seeds_need_all_of_t_shares(self, made: Simulator) -> None:
        sent = self.messages(made)
        upload = next(m for m in sent if isinstance(m, Upload) and m.uploaded.site == 2)
        given = [m for m in sent if isinstance(m, Unmasking)][:6]
        shares = {m.site: m.seeds[2].value for m in given}
        context = upload.uploaded.context
        for count, right in [(4, True), (3, False)]:
            for chosen in combinations(shares, count):
                seed = combine({site: shares[site] for site in chosen})
                assert (digest_of_seed(context, 2, seed) == upload.uploaded.seed) is right

    def test_mask_keys_need_all_of_t_shares(self, made: Simulator) -> None:
        made.set_up()
        public = made.aggregator._roster.advertisements[2].masks[3]
        epochs = {site: made.sites[site]._state.epoch for site in range(6) if site != 2}
        shares = {s: e.share_of(2, 3) for s, e in epochs.items() if e is not None}
        for count, right in [(4, True), (3, False)]:
            for chosen in combinations(shares, count):
                key = combine({site: shares[site] for site in chosen})
                assert (public_of(key) == public) is right

    def test_every_seed_and_every_key_is_fresh(self, made: Simulator) -> None:
        sent = self.messages(made)
        uploads = [m for m in sent if isinstance(m, Upload)]
        given = [m for m in sent if isinstance(m, Unmasking)]
        seeds = set()
        for answers in (given[:6], given[6:]):
            for owner in range(6):
                seeds.add(combine({m.site: m.seeds[owner].value for m in answers[:4]}))
        assert len(seeds) == len(uploads) == 12
        assert bytes(32) not in seeds
        keys = [key for m in sent if isinstance(m, Advertisement) for key in (m.channel, *m.masks)]
        keys += [m.channel for m in sent if isinstance(m, Deal)]
        keys += [m.uploaded.channel for m in uploads]
        assert len(set(keys)) == len(keys) == 6 * 5 + 6 + 12
        guessed = {public_of(bytes([byte]) * 32) for byte in range(256)}
        assert guessed.isdisjoint(keys)

    def test_a_share_cannot_change_its_kind_or_its_way_under_a_signature(
        self, made: Simulator
    ) -> None:
        sent = self.messages(made)
        shares = next(m for m in sent if isinstance(m, Upload)).shares
        first = shares[0]
        for other in (
            replace(first, destination=9), replace(first, source=9), replace(first, kind=1),
        ):  # fmt: skip
            assert digest_of_shares((other, *shares[1:])) != digest_of_shares(shares)
        given = next(m for m in sent if isinstance(m, Unmasking))
        moved = replace(given, seeds=given.seeds[:-1], masks=given.seeds[-1:])
        assert moved.statement() != given.statement()

    def test_a_seeds_hash_is_of_its_site_and_round(self) -> None:
        found = {
            digest_of_seed(context * 32, site, bytes(32))
            for context in (b"a", b"b")
            for site in (1, 2)
        }
        assert len(found) == 4


class TestNoiseShares:
    """What the honest sites' noise is, whoever drops, with the colluders' taken away."""

    NUMBERS = Numbers(6, 5, 5, 2)
    SIGMA, LENGTH = 200.0, 20_000

    def left_over(self, share: float, kind: type, sites: set[int]) -> float:
        """Variance of the sum of noise alone, less that of two colluders, over the accounted."""
        coins = Coins(bytes(range(32)))
        noise = {
            site: np.rint(coins.gaussian((self.LENGTH,), share)).astype(np.int32)
            for site in range(6)
        }
        entropy = np.random.default_rng(0).bytes
        session = Simulator(self.NUMBERS, hook=losing(kind, sites), entropy=entropy)
        session.set_up()
        total = session.round({site: values.view(np.uint32) for site, values in noise.items()})
        honest = total.view(np.int32) - noise[4] - noise[5]
        return float(np.mean(honest.astype(np.float64) ** 2)) / self.SIGMA**2

    # A chi-squared of 20,000 degrees is below 0.95 of its mean with less than 1e-6.
    FLOOR = 1 - 5 * math.sqrt(2 / LENGTH)

    @pytest.mark.parametrize("kind", [Advertisement, Deal, Upload, Confirmation, Unmasking])
    def test_is_at_least_the_accounted_one(self, kind: type) -> None:
        share = self.NUMBERS.noise_share(self.SIGMA)
        assert share == pytest.approx(self.SIGMA / math.sqrt(3))
        assert self.left_over(share, kind, {0}) > self.FLOOR

    def test_a_share_of_all_sites_would_be_too_little(self) -> None:
        assert self.left_over(self.SIGMA / math.sqrt(6), Upload, {0}) < self.FLOOR

    def test_who_drops_after_the_upload_keeps_its_noise_in_the_sum(self) -> None:
        share = self.NUMBERS.noise_share(self.SIGMA)
        after = self.left_over(share, Confirmation, {0})
        assert after == pytest.approx(4 / 3, rel=5 * math.sqrt(2 / self.LENGTH))


class TestTheAggregator:
    """What a site sends wrongly is refused, changes nothing, and the round goes on."""

    def test_second_and_late_messages_are_refused(
        self, make_session: Session, make_vectors: Vectors, plain_sum: Sum
    ) -> None:
        made = make_session()
        refused: list[type] = []
        seen: list[Any] = []

        def twice(passing: Passing) -> object:
            adders: dict[type, Callable[[Any], None]] = {
                Advertisement: made.aggregator.add_advertisement,
                Deal: made.aggregator.add_deal,
                Upload: made.aggregator.add_upload,
                Confirmation: made.aggregator.add_confirmation,
                Unmasking: made.aggregator.add_unmasking,
            }
            if passing.source == 1:
                adders[type(passing.message)](passing.message)
                for late in seen:
                    with pytest.raises(WrongPhaseError):
                        adders[type(late)](late)
                seen.append(passing.message)
            if passing.source == 2:
                assert isinstance(made.refusals.pop(1), DuplicateMessageError)
                refused.append(type(passing.message))
            return passing.message

        made.hook = twice
        made.set_up()
        vectors = make_vectors(4)
        assert (made.round(vectors) == plain_sum(vectors, [0, 1, 2, 3])).all()
        assert refused == [Advertisement, Deal, Upload, Confirmation, Unmasking]

    def test_a_sum_is_unmasked_whole_or_not_at_all(
        self,
        session: Simulator,
        make_vectors: Vectors,
        plain_sum: Sum,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(words: np.ndarray, masks: object) -> None:
            words[:5] = 0
            raise MemoryError

        vectors = make_vectors(4)
        with monkeypatch.context() as broken:
            broken.setattr(aggregator_module, "add_masks", fail)
            broken.setattr(site_module, "add_masks", add_masks)
            with pytest.raises(MemoryError):
                session.round(vectors)
        with pytest.raises(WrongPhaseError):
            session.aggregator.total()
        assert (session.round(vectors) == plain_sum(vectors, [0, 1, 2, 3])).all()
        (burnt, whole) = verify_transcript(session.transcript, session.pinned).rounds
        assert burnt.released is None
        assert whole.released is not None

    @pytest.mark.parametrize("kind", [Advertisement, Dealt, Uploaded, Confirmation])
    def test_what_the_transcript_could_not_keep_does_not_count(
        self, make_session: Session, make_vectors: Vectors, plain_sum: Sum, kind: type
    ) -> None:
        made = make_session()
        keep = made._keep

        def full(message: Kept) -> None:
            if type(message) is kind and getattr(message, "site", None) == 2:
                raise LostStateError("disk: is full")
            keep(message)

        made.aggregator._keep = full
        made.set_up()
        vectors = make_vectors(4)
        there = [0, 1, 2, 3] if kind is Confirmation else [0, 1, 3]
        assert (made.round(vectors) == plain_sum(vectors, there)).all()
        (record,) = verify_transcript(made.transcript, made.pinned).rounds
        assert record.uploaders == tuple(f"site-00{site}" for site in there)
        assert record.confirmed == ("site-000", "site-001", "site-003")

    def test_one_vector_from_two_threads_is_added_once(
        self, session: Simulator, make_vectors: Vectors, plain_sum: Sum
    ) -> None:
        """A retransmission while the first one is being hashed and kept."""
        aggregator, keep = session.aggregator, session._keep
        outcomes: list[type] = []

        def again(upload: Upload) -> None:
            try:
                aggregator.add_upload(upload)
            except SecAggError as error:
                outcomes.append(type(error))

        def hook(passing: Passing) -> object:
            if isinstance(passing.message, Upload) and passing.source == 1:
                thread = Thread(target=again, args=(passing.message,))

                def slowly(message: Kept) -> None:
                    if not thread.ident:
                        thread.start()  # it comes while this one is under way, and waits
                        thread.join(timeout=0.2)
                        assert thread.is_alive()
                    keep(message)

                aggregator._keep = slowly
                aggregator.add_upload(passing.message)
                thread.join()
                aggregator._keep = keep
                return None
            return passing.message

        session.hook = hook
        vectors = make_vectors(4)
        assert (session.round(vectors) == plain_sum(vectors, [0, 1, 2, 3])).all()
        assert outcomes == [DuplicateMessageError]

    def test_a_round_needs_a_set_up_and_room_in_32_bits(
        self, make_session: Session, session: Simulator
    ) -> None:
        block = Block("sum", 10, 1.0, 1.0, 0.0, 1.0)
        with pytest.raises(WrongPhaseError, match="the epoch is not set up"):
            make_session().aggregator.open_round(MODEL, [block])
        with pytest.raises(UnsafeNumbersError, match="leaves no room in 32 bits"):
            session.aggregator.open_round(MODEL, [replace(block, sigma=1e8)])

    def test_a_vector_of_another_length_is_refused(
        self, session: Simulator, make_vectors: Vectors, plain_sum: Sum
    ) -> None:
        vectors = make_vectors(4)

        def longer(passing: Passing) -> object:
            if isinstance(passing.message, Upload) and passing.source == 1:
                vector = np.append(passing.message.vector, np.uint32(1))
                return replace(passing.message, vector=vector)
            return passing.message

        session.hook = longer
        assert (session.round(vectors) == plain_sum(vectors, [0, 2, 3])).all()
        assert isinstance(session.refusals[1], MalformedMessageError)

    @pytest.mark.parametrize(
        "wrong",
        [
            np.zeros(10, dtype=np.int64),
            np.zeros(10, dtype=np.float32),
            np.zeros(9, dtype=np.uint32),
            np.zeros((2, 5), dtype=np.uint32),
            np.zeros(20, dtype=np.uint32)[::2],
            np.frombuffer(bytes(40), dtype=np.uint32),
            np.zeros(10, dtype=">u4"),
        ],
        ids=["int64", "float32", "short", "folded", "strided", "read-only", "big-endian"],
    )
    def test_a_site_masks_flat_words_of_the_right_length_only(
        self, session: Simulator, wrong: np.ndarray
    ) -> None:
        opening = session.aggregator.open_round(MODEL, [Block("sum", 10, 1.0, 1.0, 0.0, 1.0)])
        session.sites[0].open_round(opening, MODEL)
        with pytest.raises(MalformedMessageError, match="vector"):
            session.sites[0].upload(opening, wrong, 1, HEAD)

    def test_the_model_of_one_session_is_not_that_of_another(self, session: Simulator) -> None:
        assert digest("model of the simulator") == MODEL
        opening = session.aggregator.open_round(MODEL, [Block("sum", 10, 1.0, 1.0, 0.0, 1.0)])
        assert opening.context != replace(opening, model=bytes(32)).context
