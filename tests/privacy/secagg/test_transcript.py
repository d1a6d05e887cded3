"""A transcript shows offline what the sites signed, and nothing else passes for one."""

import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.privacy.secagg.encoding import decode, encode
from fedveil.privacy.secagg.errors import (
    DifferentContextError,
    DifferentRosterError,
    DifferentSetupError,
    DuplicateMessageError,
    ForgedSignatureError,
    MalformedMessageError,
    ReusedKeyError,
    RolledBackLedgerError,
    SecAggError,
    SplitViewError,
    StaleEpochError,
    SwappedIdentityError,
    SwappedKeysError,
    TooFewConfirmationsError,
    TooFewSitesError,
    UnknownSiteError,
    WrongPhaseError,
    WrongRoundError,
)
from fedveil.privacy.secagg.keys import digest
from fedveil.privacy.secagg.messages import (
    Advertisement,
    Confirmation,
    Dealt,
    Upload,
    Uploaded,
    Uploaders,
    statement_on_uploaders,
)
from fedveil.privacy.secagg.simulator import MODEL, Passing, Simulator, deliver
from fedveil.privacy.secagg.terms import Numbers, Opening, Setup
from fedveil.privacy.secagg.transcript import Kept, Released, framed, verify_transcript

Session = Callable[..., Simulator]
Vectors = Callable[..., dict[int, np.ndarray]]
KINDS = (Setup, Advertisement, Dealt, Opening, Uploaded, Confirmation, Released)


@pytest.fixture
def finished(make_session: Session, make_vectors: Vectors) -> Simulator:
    """Two epochs: a whole round, one that is abandoned, one with a drop-out; then another."""
    made = make_session()
    made.set_up()
    vectors = make_vectors(4)
    made.round(vectors)

    def hook(passing: Passing) -> object:
        return None if isinstance(passing.message, Uploaders) else passing.message

    made.hook = hook
    with pytest.raises(SecAggError):
        made.round(vectors)
    made.hook = lambda passing: (
        None if isinstance(passing.message, Upload) and passing.source == 2 else passing.message
    )
    made.round(vectors)
    made.hook = deliver
    made.new_epoch(1)
    made.set_up()
    made.round(vectors)
    return made


def messages(session: Simulator) -> list[Kept]:
    """What a transcript is made of."""
    data, found = bytes(session.transcript), list[Kept]()
    by_kind: dict[int, type[Kept]] = {kind.KIND: kind for kind in KINDS}
    while data:
        (length,) = struct.unpack(">I", data[:4])
        found.append(decode(by_kind[data[7]], data[4 : 4 + length]))
        data = data[4 + length :]
    return found


def joined(found: list[Kept]) -> bytes:
    return b"".join(framed(message) for message in found)


def first(found: list[Kept], kind: type, skip: int = 0) -> int:
    """The place of a message of a kind."""
    return [place for place, message in enumerate(found) if type(message) is kind][skip]


class TestWhatItShows:
    def test_rounds_models_uploaders_and_ledgers(self, finished: Simulator) -> None:
        verdict = verify_transcript(bytes(finished.transcript), finished.pinned)
        assert verdict.run == "simulated"
        assert [setup.epoch for setup in verdict.epochs] == [0, 1]
        everyone = tuple(finished.names)
        three = (everyone[0], everyone[1], everyone[3])
        found = [(r.epoch, r.round, r.uploaders, r.confirmed) for r in verdict.rounds]
        assert found == [
            (0, 0, everyone, everyone),
            (0, 1, everyone, ()),
            (0, 2, three, three),
            (1, 0, everyone, everyone),
        ]
        assert [r.released is not None for r in verdict.rounds] == [True, False, True, True]
        assert {r.model for r in verdict.rounds} == {MODEL}
        ledger = (4, digest("ledger 4"))
        assert verdict.ledgers == dict.fromkeys(everyone, ledger)

    def test_an_epoch_that_nobody_signed_is_not_listed(
        self, make_session: Session, make_vectors: Vectors
    ) -> None:
        made = make_session()
        verdict = verify_transcript(made.transcript, made.pinned)  # its set-up, and nothing else
        assert (verdict.epochs, verdict.rounds) == ((), ())
        made.set_up()
        made.round(make_vectors(4))
        made.new_epoch(7)
        verdict = verify_transcript(made.transcript, made.pinned)
        assert [setup.epoch for setup in verdict.epochs] == [0]

    def test_the_hash_of_each_sum(self, make_session: Session, make_vectors: Vectors) -> None:
        made = make_session()
        made.set_up()
        total = made.round(make_vectors(4))
        opening = next(m for m in messages(made) if isinstance(m, Opening))
        (record,) = verify_transcript(made.transcript, made.pinned).rounds
        assert record.released == digest("total", opening.context, total.tobytes())

    def test_it_holds_no_vector_share_or_ciphertext(self, finished: Simulator) -> None:
        assert {type(message) for message in messages(finished)} == set(KINDS)
        assert len(finished.transcript) < 20_000


class TestWhatIsRefused:
    def refused(
        self,
        session: Simulator,
        error: type[SecAggError],
        change: Callable[[list[Kept]], None],
        match: str = "",
    ) -> None:
        found = messages(session)
        change(found)
        with pytest.raises(error, match=rf"transcript, message \d+: .*{match}") as caught:
            verify_transcript(joined(found), session.pinned)
        assert type(caught.value) is error

    def test_another_identity_than_the_auditor_has(self, finished: Simulator) -> None:
        pinned = {**finished.pinned, "site-002": bytes(32)}
        with pytest.raises(SwappedIdentityError, match="message 1"):
            verify_transcript(finished.transcript, pinned)
        with pytest.raises(UnknownSiteError, match="has site-002"):
            verify_transcript(
                finished.transcript,
                {name: key for name, key in finished.pinned.items() if name != "site-002"},
            )

    @pytest.mark.parametrize(
        ("kind", "field", "error"),
        [
            (Advertisement, "channel", SwappedKeysError),
            (Advertisement, "signature", SwappedKeysError),
            (Dealt, "channel", DifferentRosterError),
            (Dealt, "shares", DifferentRosterError),
            (Dealt, "signature", DifferentRosterError),
            (Opening, "roster", DifferentRosterError),
            (Opening, "model", DifferentContextError),
            (Uploaded, "context", DifferentContextError),
            (Uploaded, "vector", ForgedSignatureError),
            (Uploaded, "seed", ForgedSignatureError),
            (Uploaded, "channel", ForgedSignatureError),
            (Uploaded, "shares", ForgedSignatureError),
            (Uploaded, "ledger_head", ForgedSignatureError),
            (Uploaded, "signature", ForgedSignatureError),
            (Confirmation, "context", SplitViewError),
            (Confirmation, "signature", SplitViewError),
            (Released, "context", DifferentContextError),
        ],
    )
    def test_any_changed_field(
        self, finished: Simulator, kind: type, field: str, error: type[SecAggError]
    ) -> None:
        def change(found: list[Kept]) -> None:
            place = first(found, kind)
            old = getattr(found[place], field)
            flipped = bytes([old[0] ^ 1]) + old[1:]
            found[place] = replace(found[place], **{field: flipped})

        self.refused(finished, error, change)

    def test_another_ledger_count(self, finished: Simulator) -> None:
        def change(found: list[Kept]) -> None:
            place = first(found, Uploaded)
            message = found[place]
            assert isinstance(message, Uploaded)
            found[place] = replace(message, ledger_count=message.ledger_count + 100)

        self.refused(finished, ForgedSignatureError, change)

    def test_other_numbers(self, make_session: Session, make_vectors: Vectors) -> None:
        made = make_session(5, 4, 4, 1)
        made.set_up()
        made.round(make_vectors(5))

        def change(found: list[Kept]) -> None:
            setup = found[0]
            assert isinstance(setup, Setup)
            found[0] = replace(setup, numbers=replace(setup.numbers, n_min=5))

        self.refused(made, DifferentSetupError, change)

    @pytest.mark.parametrize(
        ("kind", "error"),
        [
            (Advertisement, DuplicateMessageError),
            (Dealt, DuplicateMessageError),
            (Opening, WrongRoundError),
            (Uploaded, DuplicateMessageError),
            (Confirmation, DuplicateMessageError),
            (Released, WrongPhaseError),
            (Setup, StaleEpochError),
        ],
    )
    def test_a_message_twice(
        self, finished: Simulator, kind: type, error: type[SecAggError]
    ) -> None:
        self.refused(finished, error, lambda f: f.insert(first(f, kind) + 1, f[first(f, kind)]))

    @pytest.mark.parametrize(
        ("kind", "error"),
        [
            (Setup, WrongPhaseError),
            (Advertisement, UnknownSiteError),
            (Dealt, DifferentRosterError),
            (Opening, WrongPhaseError),
            (Uploaded, UnknownSiteError),
        ],
    )
    def test_a_message_left_out(
        self, finished: Simulator, kind: type, error: type[SecAggError]
    ) -> None:
        def leave_out(found: list[Kept]) -> None:
            del found[first(found, kind)]

        self.refused(finished, error, leave_out)

    def test_confirmations_left_out_of_a_released_round(self, finished: Simulator) -> None:
        def change(found: list[Kept]) -> None:
            del found[first(found, Confirmation) : first(found, Confirmation) + 2]

        self.refused(finished, TooFewConfirmationsError, change, "of 2 sites")

    def test_an_upload_after_the_confirmations(self, finished: Simulator) -> None:
        def change(found: list[Kept]) -> None:
            place = first(found, Uploaded, 3)
            found.insert(first(found, Confirmation) + 1, found.pop(place))

        self.refused(finished, SplitViewError, change)

    def test_a_whole_round_left_out(self, finished: Simulator) -> None:
        def change(found: list[Kept]) -> None:
            del found[first(found, Opening, 1) : first(found, Opening, 2)]

        self.refused(finished, WrongRoundError, change, "round 2: expected 1")

    def test_an_upload_of_one_more_after_the_confirmations(self, finished: Simulator) -> None:
        """Site 2 was dropped in round 2: the server cannot count it in afterwards."""

        def change(found: list[Kept]) -> None:
            place = first(found, Uploaded, 8)  # of round 2
            message = found[place]
            assert isinstance(message, Uploaded)
            unsigned = replace(message, site=2)
            signature = finished.identities[2].sign(unsigned.statement())
            found.insert(first(found, Confirmation, 6) + 1, replace(unsigned, signature=signature))

        self.refused(finished, WrongPhaseError, change, "expected none once uploaders")

    def test_a_round_beyond_the_epoch(self, make_session: Session, make_vectors: Vectors) -> None:
        made = make_session(rounds=1)
        made.set_up()
        made.round(make_vectors(4))

        def change(found: list[Kept]) -> None:
            opening = found[first(found, Opening)]
            assert isinstance(opening, Opening)
            found.append(replace(opening, round=1))

        self.refused(made, WrongRoundError, change, "of 1 in the epoch")

    def test_keys_and_deals_out_of_their_time(self, finished: Simulator) -> None:
        def late_key(found: list[Kept]) -> None:
            found.insert(first(found, Dealt) + 1, found[first(found, Advertisement)])

        def late_deal(found: list[Kept]) -> None:
            found.insert(first(found, Opening) + 1, found[first(found, Dealt)])

        self.refused(finished, WrongPhaseError, late_key)
        self.refused(finished, WrongPhaseError, late_deal)

    def test_too_few_members_or_uploaders(self, finished: Simulator) -> None:
        def members(found: list[Kept]) -> None:
            del found[first(found, Dealt) : first(found, Dealt) + 2]

        def uploaders(found: list[Kept]) -> None:
            del found[first(found, Uploaded) : first(found, Uploaded) + 2]

        self.refused(finished, TooFewSitesError, members)
        self.refused(finished, TooFewSitesError, uploaders)

    def test_a_second_set_of_uploaders(self, finished: Simulator) -> None:
        def change(found: list[Kept]) -> None:
            place = first(found, Confirmation, 1)
            message = found[place]
            assert isinstance(message, Confirmation)
            statement = statement_on_uploaders(message.context, (0, 1, 2))
            signature = finished.identities[message.site].sign(statement)
            found[place] = replace(message, signature=signature)

        self.refused(finished, SplitViewError, change)

    def test_a_ledger_that_was_rolled_back(self, finished: Simulator) -> None:
        def change(found: list[Kept]) -> None:
            place = first(found, Uploaded, 11)  # of the last round
            message = found[place]
            assert isinstance(message, Uploaded)
            unsigned = replace(message, ledger_count=1)
            signature = finished.identities[message.site].sign(unsigned.statement())
            found[place] = replace(unsigned, signature=signature)

        self.refused(finished, RolledBackLedgerError, change, "has 1 entries")

    def test_one_key_of_two_sites(self, make_session: Session) -> None:
        made = make_session()
        setup = made.aggregator.setup
        one, two = (made.sites[i].advertise(setup) for i in (0, 1))
        copied = replace(two, masks=one.masks)
        signed = replace(copied, signature=made.identities[1].sign(copied.statement()))
        dealt = Dealt(0, bytes(32), bytes(32), bytes(64))
        with pytest.raises(ReusedKeyError):
            verify_transcript(joined([setup, one, signed, dealt]), made.pinned)

    def test_another_run_in_the_same_file(self, finished: Simulator) -> None:
        def change(found: list[Kept]) -> None:
            place = first(found, Setup, 1)
            setup = found[place]
            assert isinstance(setup, Setup)
            found[place] = replace(setup, run="another")

        self.refused(finished, StaleEpochError, change)


class TestBytes:
    @pytest.mark.parametrize(
        ("data", "match"),
        [
            (b"", "is empty"),
            (b"\0\0\0", "has 3 bytes, expected 4"),
            (b"\0\0\0\x10abc", "has 3 bytes, expected 16"),
            (b"\xff\xff\xff\xff", "expected at most"),
            (b"\0\0\0\x04FV\x01\x07", "of kind 7"),
            (b"\0\0\0\0", "of kind 0"),
        ],
        ids=["empty", "cut length", "cut message", "huge", "an upload", "nothing"],
    )
    def test_what_is_no_transcript(self, data: bytes, match: str) -> None:
        with pytest.raises(MalformedMessageError, match=match):
            verify_transcript(data, {})

    def test_one_that_is_cut_off(self, finished: Simulator) -> None:
        with pytest.raises(MalformedMessageError):
            verify_transcript(bytes(finished.transcript)[:-1], finished.pinned)

    @given(st.data())
    def test_any_flipped_byte_is_a_typed_error_or_the_servers_own_word(
        self, data: st.DataObject
    ) -> None:
        session = _SESSION
        place = data.draw(st.integers(0, len(session.transcript) - 1))
        bit = 1 << data.draw(st.integers(0, 7))
        altered = bytearray(session.transcript)
        altered[place] ^= bit
        try:
            verdict = verify_transcript(altered, session.pinned)
        except SecAggError:
            return
        # Only the hash of the sum is not signed by a site; it is compared with the sum itself.
        before = verify_transcript(session.transcript, session.pinned)
        assert [replace(r, released=None) for r in verdict.rounds] == [
            replace(r, released=None) for r in before.rounds
        ]
        assert verdict.rounds != before.rounds

    @given(st.binary(max_size=200))
    def test_any_bytes_are_a_typed_error(self, data: bytes) -> None:
        with pytest.raises(SecAggError):
            verify_transcript(data, {})


def _session() -> Simulator:
    made = Simulator(Numbers(3, 3, 3, 1), 1, entropy=np.random.default_rng(0).bytes)
    made.set_up()
    made.round({site: np.zeros(4, dtype=np.uint32) for site in range(3)})
    return made


_SESSION = _session()


def test_encoding_of_a_kept_message_is_that_of_the_protocol() -> None:
    setup = _SESSION.aggregator.setup
    assert framed(setup) == struct.pack(">I", len(encode(setup))) + encode(setup)
