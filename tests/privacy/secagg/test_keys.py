"""Hashes, key derivation, key agreement, signatures and sealed boxes, against published vectors."""

import hashlib
import hmac
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.privacy.secagg.errors import WeakKeyError
from fedveil.privacy.secagg.keys import (
    TAG_BYTES,
    Identity,
    agree,
    derive,
    digest,
    is_signed,
    public_of,
    seal,
    system_entropy,
    unseal,
)

SECRET = bytes(range(32))
PROTOCOL = b"fedveil secure aggregation 1"


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, sections 2.2 and 2.3, with SHA-256."""
    pseudorandom = hmac.digest(salt or bytes(32), secret, "sha256")
    found = block = b""
    counter = 0
    while len(found) < length:
        counter += 1
        block = hmac.digest(pseudorandom, block + info + bytes([counter]), "sha256")
        found += block
    return found[:length]


def by_the_book(label: str, *parts: bytes) -> bytes:
    """The digest as this protocol lays it out: protocol, label, number of parts, each counted."""
    laid_out = PROTOCOL + bytes([len(label)]) + label.encode() + len(parts).to_bytes(4, "big")
    for part in parts:
        laid_out += len(part).to_bytes(8, "big") + part
    return hashlib.sha256(laid_out).digest()


class TestDigest:
    @given(st.text("abcdef ", min_size=1), st.lists(st.binary(max_size=40), max_size=4))
    def test_is_sha_256_of_label_and_counted_parts(self, label: str, parts: list[bytes]) -> None:
        assert digest(label, *parts) == by_the_book(label, *parts)

    def test_of_one_list_of_parts_is_pinned(self) -> None:
        # By hashlib over the layout in `by_the_book`; it must not change within version 1.
        expected = "aededc67ff199cd3c02fd0829b0f3e04cb1747c01f463ca4ea95763567bfa629"
        assert digest("pair mask", bytes(32), b"\0\1").hex() == expected

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (("l", b"ab", b"c"), ("l", b"a", b"bc")),
            (("l", b"abc"), ("l", b"ab", b"c")),
            (("l", b"abc"), ("l", b"abc", b"")),
            (("l", b"", b"abc"), ("l", b"abc", b"")),
            (("l",), ("l", b"")),
            (("la", b"b"), ("l", b"ab")),
            (("l", b"ab"), ("L", b"ab")),
            (("l", b"a" + (1).to_bytes(8, "big") + b"b"), ("l", b"a", b"b")),
            (("l\0\0\0\0",), ("l",)),
        ],
    )
    def test_moves_with_every_boundary(
        self, one: tuple[str, *tuple[bytes, ...]], other: tuple[str, *tuple[bytes, ...]]
    ) -> None:
        assert digest(*one) != digest(*other)

    @given(st.binary(min_size=1, max_size=8), st.lists(st.integers(0, 8), max_size=3))
    def test_no_two_ways_to_cut_the_same_bytes_agree(self, whole: bytes, cuts: list[int]) -> None:
        places = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
        parts = [whole[a:b] for a, b in pairwise(places)]
        if parts == [whole]:
            assert digest("l", *parts) == digest("l", whole)
        else:
            assert digest("l", *parts) != digest("l", whole)

    @given(st.lists(st.tuples(st.text("ab"), st.lists(st.sampled_from([b"", b"a", b"ab"])))))
    def test_different_labels_and_parts_have_different_ones(
        self, inputs: list[tuple[str, list[bytes]]]
    ) -> None:
        asked = {(label, tuple(parts)) for label, parts in inputs}
        assert len({digest(label, *parts) for label, parts in asked}) == len(asked)

    def test_takes_any_buffer_of_bytes(self) -> None:
        assert digest("l", bytearray(b"abc"), memoryview(b"abc")) == digest("l", b"abc", b"abc")


class TestDerive:
    def test_the_hkdf_of_these_tests_is_that_of_the_rfc(self) -> None:
        # RFC 5869, appendix A.1.
        found = hkdf(
            b"\x0b" * 22,
            bytes.fromhex("000102030405060708090a0b0c"),
            bytes.fromhex("f0f1f2f3f4f5f6f7f8f9"),
            42,
        )
        assert found.hex() == (
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
        )

    @given(st.binary(min_size=32, max_size=32), st.text("abc ", min_size=1), st.lists(st.binary()))
    def test_is_hkdf_with_the_digest_as_info(
        self, secret: bytes, label: str, parts: list[bytes]
    ) -> None:
        expected = hkdf(secret, b"", by_the_book(label, *parts), 32)
        assert derive(secret, label, *parts) == expected

    @pytest.mark.parametrize(
        ("label", "expected"),
        [
            ("pair mask", "bf632e884b684dd5782ba54d04907876fe2e463d93540453485358de92698bb3"),
            ("self mask", "85bca304aac0ee0ec367fc4f4da6a7ed09ef16068bd039b64f4a4e498d1e1a1c"),
            ("share", "53c63973428dc4d354ec7fbf074e6401d8407cac2fcfb53cc789c0f9bf446d79"),
        ],
    )
    def test_the_keys_of_the_protocol_s_labels_are_pinned(self, label: str, expected: str) -> None:
        # The secret 00..1f, a zero context, the route 00 01; by `hkdf` above from stdlib's hmac.
        parts = (bytes(32), b"\0\1")
        assert hkdf(SECRET, b"", by_the_book(label, *parts), 32).hex() == expected
        assert derive(SECRET, label, *parts).hex() == expected


class TestIdentity:
    def test_signs_as_the_rfc_does(self) -> None:
        # RFC 8032, section 7.1, test 1: the empty message.
        identity = Identity(
            bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
        )
        assert identity.public.hex() == (
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
        )
        signature = identity.sign(b"")
        assert signature.hex() == (
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e"
            "39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
        )
        assert is_signed(identity.public, b"", signature)

    @given(st.integers(0, 511), st.binary(max_size=40))
    def test_a_signature_with_one_bit_changed_does_not_hold(
        self, bit: int, statement: bytes
    ) -> None:
        identity = Identity(SECRET)
        signature = bytearray(identity.sign(statement))
        assert is_signed(identity.public, statement, bytes(signature))
        signature[bit // 8] ^= 1 << bit % 8
        assert not is_signed(identity.public, statement, bytes(signature))

    def test_a_signature_holds_for_its_statement_and_its_signer_only(self) -> None:
        identity, other = Identity(SECRET), Identity(bytes(32))
        signature = identity.sign(b"statement")
        assert not is_signed(identity.public, b"statement.", signature)
        assert not is_signed(other.public, b"statement", signature)
        assert not is_signed(identity.public, b"", signature)

    @pytest.mark.parametrize("length", [0, 31, 33])
    def test_what_is_no_identity_signed_nothing(self, length: int) -> None:
        assert not is_signed(bytes(length), b"", bytes(64))

    @pytest.mark.parametrize("length", [0, 63, 65])
    def test_what_is_no_signature_does_not_hold(self, length: int) -> None:
        signature = (Identity(SECRET).sign(b"") * 2)[:length]
        assert not is_signed(Identity(SECRET).public, b"", signature)

    def test_signs_the_same_bytes_each_time(self) -> None:
        assert Identity(SECRET).sign(b"a") == Identity(SECRET).sign(b"a")

    @pytest.mark.parametrize("length", [0, 31, 33])
    def test_is_made_of_32_bytes_only(self, length: int) -> None:
        with pytest.raises(ValueError, match=f"seed = {length} bytes: must be 32"):
            Identity(bytes(length))


ALICE = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
BOB = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
PRIME = 2**255 - 19
SMALL_ORDER = [  # of order 1, 2, 4 and 8, and other forms of them: cr.yp.to/ecdh.html#validate
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (PRIME - 1).to_bytes(32, "little"),
    PRIME.to_bytes(32, "little"),
    (PRIME + 1).to_bytes(32, "little"),
]


class TestAgree:
    def test_is_that_of_the_rfc(self) -> None:
        # RFC 7748, section 6.1.
        assert public_of(ALICE).hex() == (
            "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
        )
        assert public_of(BOB).hex() == (
            "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
        )
        shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
        assert agree(ALICE, public_of(BOB)).hex() == shared
        assert agree(BOB, public_of(ALICE)).hex() == shared

    @pytest.mark.parametrize("public", SMALL_ORDER, ids=bytes.hex)
    def test_with_a_key_of_small_order_is_refused(self, public: bytes) -> None:
        masked = public[:31] + bytes([public[31] | 0x80])  # X25519 ignores the topmost bit
        for key in (public, masked):
            with pytest.raises(WeakKeyError, match=f"{key.hex()}: is of small order"):
                agree(ALICE, key)

    @pytest.mark.parametrize("length", [0, 31, 33])
    def test_with_what_is_no_key_is_refused(self, length: int) -> None:
        with pytest.raises(WeakKeyError):
            agree(ALICE, b"\x09" * length)


class TestSeal:
    KEY, NONCE = bytes(32), bytes(12)

    def test_is_that_of_gcm_s_test_vectors(self) -> None:
        # McGrew and Viega, The Galois/Counter Mode of Operation, test cases 13 and 14.
        assert seal(self.KEY, self.NONCE, b"", b"").hex() == "530f8afbc74536b9a963b4f1c4cb738b"
        assert seal(self.KEY, self.NONCE, bytes(16), b"").hex() == (
            "cea7403d4d606b6e074ec5d3baf39d18" + "d0d1c8a799996bf0265b98b5d48ab919"
        )

    @given(st.binary(max_size=100), st.binary(max_size=100))
    def test_opens_to_what_was_sealed(self, content: bytes, about: bytes) -> None:
        box = seal(SECRET, self.NONCE, content, about)
        assert len(box) == len(content) + TAG_BYTES
        assert unseal(SECRET, self.NONCE, box, about) == content

    def test_any_one_bit_changed_anywhere_opens_to_nothing(self) -> None:
        box = seal(SECRET, self.NONCE, b"content", b"what it is about")
        whole = (SECRET, self.NONCE, box, b"what it is about")
        assert unseal(*whole) == b"content"
        for place, part in enumerate(whole):
            for bit in range(8 * len(part)):
                flipped = bytearray(part)
                flipped[bit // 8] ^= 1 << bit % 8
                key, nonce, sealed, about = (
                    bytes(flipped) if i == place else whole[i] for i in range(4)
                )
                assert unseal(key, nonce, sealed, about) is None

    def test_cut_or_lengthened_it_opens_to_nothing(self) -> None:
        box = seal(SECRET, self.NONCE, b"content", b"a")
        for length in range(len(box)):
            assert unseal(SECRET, self.NONCE, box[:length], b"a") is None
        assert unseal(SECRET, self.NONCE, box + b"\0", b"a") is None
        assert unseal(SECRET, self.NONCE, box, b"") is None


def test_the_system_s_entropy_is_as_long_as_asked_and_never_the_same() -> None:
    assert [len(system_entropy(count)) for count in (0, 1, 32)] == [0, 1, 32]
    assert system_entropy(32) != system_entropy(32)
