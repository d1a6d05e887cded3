"""`encryption = "sealed"`: what the aggregator reads, and what whoever carries it cannot do."""

import hmac
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from fedveil.privacy.secagg.encoding import decode, encode
from fedveil.privacy.secagg.errors import (
    DifferentContextError,
    ForgedSignatureError,
    MalformedMessageError,
    TamperedCiphertextError,
    UnknownSiteError,
    WeakKeyError,
)
from fedveil.privacy.secagg.keys import Identity, agree, digest, is_signed, public_of
from fedveil.privacy.secagg.sealed import SealedReply, open_reply, seal_reply

PRIVATE = bytes([9]) * 32
AGGREGATOR = public_of(PRIVATE)
ALICE, BOB = Identity(bytes([1]) * 32), Identity(bytes([2]) * 32)
PINNED = {"alice": ALICE.public, "bob": BOB.public}
CONTEXT = b"c" * 32
CONTENT = b"a reply that no relay may read"


def sealed(content: bytes = CONTENT) -> SealedReply:
    return seal_reply(content, "alice", ALICE, AGGREGATOR, CONTEXT)


def read(reply: SealedReply, private: bytes = PRIVATE, context: bytes = CONTEXT) -> bytes:
    return open_reply(reply, PINNED, private, context)


def signed(reply: SealedReply, identity: Identity = ALICE) -> SealedReply:
    """As a dishonest site would send it: altered, and signed all the same."""
    return replace(reply, signature=identity.sign(reply.statement()))


def extract(salt: bytes, label: bytes, value: bytes, suite: bytes) -> bytes:
    """RFC 9180, section 4: LabeledExtract."""
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + value, "sha256")


def expand(secret: bytes, label: bytes, info: bytes, length: int, suite: bytes) -> bytes:
    """RFC 9180, section 4: LabeledExpand, of one block at most."""
    labelled = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return hmac.digest(secret, labelled + b"\x01", "sha256")[:length]


def open_by_the_rfc(box: bytes, private: bytes, info: bytes) -> bytes:
    """RFC 9180, sections 4.1, 5.1 and 6.1: base mode, 0x0020 X25519, 0x0001 SHA-256, 0x0002 AES."""
    public, encapsulated = public_of(private), box[:32]
    kem = b"KEM" + b"\x00\x20"
    agreed = extract(b"", b"eae_prk", agree(private, encapsulated), kem)
    shared = expand(agreed, b"shared_secret", encapsulated + public, 32, kem)
    suite = b"HPKE" + b"\x00\x20" + b"\x00\x01" + b"\x00\x02"
    about = extract(b"", b"psk_id_hash", b"", suite) + extract(b"", b"info_hash", info, suite)
    secret = extract(shared, b"secret", b"", suite)
    key = expand(secret, b"key", b"\x00" + about, 32, suite)
    nonce = expand(secret, b"base_nonce", b"\x00" + about, 12, suite)
    return AESGCM(key).decrypt(nonce, box[32:], b"")


class TestSealAndOpen:
    @given(st.binary(max_size=300), st.binary(min_size=32, max_size=32))
    def test_gives_the_content_back(self, content: bytes, context: bytes) -> None:
        reply = seal_reply(content, "bob", BOB, AGGREGATOR, context)
        assert (reply.site, reply.context) == ("bob", context)
        assert len(reply.box) == 32 + len(content) + 16
        assert open_reply(reply, PINNED, PRIVATE, context) == content

    @given(st.binary(max_size=100))
    def test_survives_the_wire(self, content: bytes) -> None:
        reply = sealed(content)
        assert decode(SealedReply, encode(reply)) == reply
        assert read(decode(SealedReply, encode(reply))) == content

    def test_takes_a_view(self) -> None:
        assert read(seal_reply(memoryview(CONTENT), "alice", ALICE, AGGREGATOR, CONTEXT)) == CONTENT

    def test_is_hpke_by_the_rfc_about_context_site_and_key(self) -> None:
        about = digest("sealed", CONTEXT, b"alice", AGGREGATOR)
        assert open_by_the_rfc(sealed().box, PRIVATE, about) == CONTENT

    def test_is_signed_by_the_site_over_context_site_and_box(self) -> None:
        reply = sealed()
        statement = digest("sealed reply", CONTEXT, b"alice", reply.box)
        assert is_signed(ALICE.public, statement, reply.signature)

    def test_two_of_the_same_content_share_nothing(self) -> None:
        first, second = sealed(), sealed()
        assert first.box[:32] != second.box[:32]
        assert first.box[32:] != second.box[32:]


class TestARelay:
    def test_reads_nothing(self) -> None:
        data = encode(sealed())
        assert all(CONTENT[i : i + 6] not in data for i in range(len(CONTENT) - 5))

    def test_alters_nothing(self) -> None:
        """Every bit of the whole message: refused, each time by a type of its own."""
        data = encode(sealed())
        expected = (
            MalformedMessageError,
            UnknownSiteError,
            DifferentContextError,
            ForgedSignatureError,
        )
        for bit in range(8 * len(data)):
            altered = bytearray(data)
            altered[bit // 8] ^= 1 << bit % 8
            with pytest.raises(expected):
                read(decode(SealedReply, altered))

    @pytest.mark.parametrize("place", [0, 31, 32, -1])
    def test_alters_no_byte_of_the_box(self, place: int) -> None:
        reply = sealed()
        box = bytearray(reply.box)
        box[place] ^= 1
        with pytest.raises(ForgedSignatureError, match="reply of alice: its signature"):
            read(replace(reply, box=bytes(box)))

    def test_passes_it_off_as_no_other_site_s(self) -> None:
        with pytest.raises(ForgedSignatureError, match="reply of bob"):
            read(replace(sealed(), site="bob"))

    def test_passes_it_off_as_no_unknown_site_s(self) -> None:
        with pytest.raises(UnknownSiteError, match="carol: expected one of alice, bob"):
            read(replace(sealed(), site="carol"))

    def test_replays_it_in_no_other_context(self) -> None:
        later = b"d" * 32
        with pytest.raises(DifferentContextError, match=f"expected {later.hex()}"):
            read(sealed(), context=later)
        with pytest.raises(ForgedSignatureError):
            read(replace(sealed(), context=later), context=later)

    def test_seals_nothing_in_a_site_s_name(self) -> None:
        with pytest.raises(ForgedSignatureError):
            read(seal_reply(CONTENT, "alice", Identity(bytes(32)), AGGREGATOR, CONTEXT))


class TestADishonestSite:
    """It signs what it sends; what it sends must still be sealed for this key in this context."""

    @pytest.mark.parametrize("place", [0, 31, 32, -1])
    def test_sends_an_altered_box(self, place: int) -> None:
        reply = sealed()
        box = bytearray(reply.box)
        box[place] ^= 1
        with pytest.raises(TamperedCiphertextError, match="reply of alice: does not open"):
            read(signed(replace(reply, box=bytes(box))))

    def test_sends_another_s_box_as_its_own(self) -> None:
        with pytest.raises(TamperedCiphertextError):
            read(signed(replace(sealed(), site="bob"), BOB))

    def test_sends_an_old_box_in_a_new_context(self) -> None:
        later = b"d" * 32
        with pytest.raises(TamperedCiphertextError):
            read(signed(replace(sealed(), context=later)), context=later)

    def test_sends_a_box_for_another_key(self) -> None:
        reply = seal_reply(CONTENT, "alice", ALICE, public_of(bytes([8]) * 32), CONTEXT)
        with pytest.raises(TamperedCiphertextError):
            read(reply)
        assert open_reply(reply, PINNED, bytes([8]) * 32, CONTEXT) == CONTENT

    @pytest.mark.parametrize("box", [b"", bytes(31), bytes(47), bytes(48), bytes(200)], ids=len)
    def test_sends_no_box_at_all_or_one_under_a_weak_key(self, box: bytes) -> None:
        with pytest.raises(TamperedCiphertextError):
            read(signed(replace(sealed(), box=box)))

    def test_signs_with_a_key_that_is_not_pinned(self) -> None:
        with pytest.raises(ForgedSignatureError, match=f"expected one by {ALICE.public.hex()}"):
            read(signed(sealed(), BOB))


class TestTheAggregator:
    def test_cannot_read_with_another_key(self) -> None:
        with pytest.raises(TamperedCiphertextError):
            read(sealed(), private=bytes([8]) * 32)

    @pytest.mark.parametrize(
        "key", [bytes(32), (1).to_bytes(32, "little"), b"", bytes(31), b"\x09" * 33], ids=bytes.hex
    )
    def test_has_a_key_that_is_one(self, key: bytes) -> None:
        with pytest.raises(WeakKeyError, match="aggregator's key"):
            seal_reply(CONTENT, "alice", ALICE, key, CONTEXT)

    def test_may_have_made_its_key_elsewhere(self) -> None:
        private = X25519PrivateKey.generate()
        public = private.public_key().public_bytes_raw()
        reply = seal_reply(CONTENT, "alice", ALICE, public, CONTEXT)
        assert read(reply, private=private.private_bytes_raw()) == CONTENT
