"""Masks: the keystream by the book, what adding it does, and that masked words are uniform.

Statistical tests run on fixed keys, so that they answer alike every time; each single check has a
false-alarm rate of 1e-7 over the choice of the key.
"""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from fedveil.privacy.secagg import masks
from fedveil.privacy.secagg.errors import WeakKeyError
from fedveil.privacy.secagg.keys import agree, derive, public_of
from fedveil.privacy.secagg.masks import Mask, add_masks, pair_mask, self_mask

KEY = bytes(range(32))
CONTEXT = b"c" * 32
ALARM = 1e-7
BLOCK = masks._BLOCK
SIZES = st.integers(0, 70) | st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])


def keystream(key: bytes, words: int) -> np.ndarray:
    """AES-256 of the big-endian block numbers from 0: counter mode without a counter mode."""
    cipher = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305
    counters = np.zeros((-(-words // 4), 2), dtype=">u8")
    counters[:, 1] = np.arange(len(counters))
    return np.frombuffer(cipher.update(counters.tobytes()), dtype="<u4")[:words]


def masked(words: int, *added: Mask) -> np.ndarray:
    """A vector of zeros with masks."""
    vector = np.zeros(words, dtype="<u4")
    add_masks(vector, added)
    return vector


class TestKeystream:
    def test_the_aes_of_these_tests_is_that_of_the_standard(self) -> None:
        # NIST SP 800-38A, F.5.5 (CTR-AES256): the first block's input, output and plaintext.
        key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
        counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
        plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")
        block = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(counter)  # noqa: S305
        assert bytes(a ^ b for a, b in zip(block, plain, strict=True)).hex() == (
            "601ec313775789a5b7a7f504bbf3d228"
        )

    def test_under_a_zero_key_is_the_published_one(self) -> None:
        # AES-256 of 0, 1 and 2 under the zero key: McGrew and Viega, The Galois/Counter Mode of
        # Operation, test cases 13 and 14 (H, E(K, Y0), and the ciphertext of zeros under Y1).
        expected = (
            "dc95c078a2408989ad48a21492842087"
            "530f8afbc74536b9a963b4f1c4cb738b"
            "cea7403d4d606b6e074ec5d3baf39d18"
        )
        assert masked(12, Mask(bytes(32), negative=False)).tobytes().hex() == expected

    def test_under_another_key_is_pinned(self) -> None:
        # The key 00..1f of FIPS 197, C.3; its zero block is f290..., here with the two after it.
        expected = (
            "f29000b62a499fd0a9f39a6add2e7780f05d76ae4ab99fe5a6f69b3148c2363d0ebcb5deb52c83bd"
        )
        assert masked(10, Mask(KEY, negative=False)).tobytes().hex() == expected

    @given(st.binary(min_size=32, max_size=32), SIZES)
    @example(KEY, 2 * BLOCK + 3)
    @settings(max_examples=25)
    def test_is_aes_256_of_the_block_numbers_from_zero(self, key: bytes, words: int) -> None:
        assert np.array_equal(masked(words, Mask(key, negative=False)), keystream(key, words))

    def test_its_words_are_little_endian(self) -> None:
        assert masked(1, Mask(bytes(32), negative=False))[0] == 0x78C095DC


class TestAddMasks:
    def test_adds_and_takes_away_modulo_2_to_the_32(self) -> None:
        vector = np.array([0, 1, 2**32 - 1, 2**31], dtype="<u4")
        before = vector.astype(np.uint64)
        other = bytes(32)
        add_masks(vector, [Mask(KEY, negative=False), Mask(other, negative=True)])
        stream = keystream(KEY, 4).astype(np.uint64) - keystream(other, 4)  # modulo 2^64
        assert np.array_equal(vector, (before + stream) % 2**32)

    def test_works_in_place(self) -> None:
        vector = np.zeros(10, dtype="<u4")
        part = vector[2:7]
        add_masks(part, [Mask(KEY, negative=False)])
        assert np.array_equal(part, keystream(KEY, 5))
        assert not vector[:2].any()
        assert not vector[7:].any()

    @given(SIZES, st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=3))
    @example(1, [KEY])
    @example(BLOCK + 1, [KEY, bytes(32)])
    @settings(max_examples=25)
    def test_what_is_added_and_taken_away_is_gone(self, words: int, keys: list[bytes]) -> None:
        vector = np.arange(words, dtype="<u4") * np.uint32(0x9E3779B1)
        before = vector.copy()
        add_masks(vector, [Mask(key, negative=False) for key in keys])
        add_masks(vector, [Mask(key, negative=True) for key in reversed(keys)])
        assert np.array_equal(vector, before)

    @given(st.permutations([0, 1, 2, 3]))
    @settings(max_examples=10)
    def test_their_order_is_none(self, order: list[int]) -> None:
        given_masks = [Mask(bytes([i]) * 32, negative=i % 2 == 0) for i in range(4)]
        ordered = [given_masks[i] for i in order]
        assert np.array_equal(masked(9, *ordered), masked(9, *given_masks))

    def test_no_masks_and_no_words_change_nothing(self) -> None:
        vector = np.arange(5, dtype="<u4")
        add_masks(vector, [])
        assert vector.tolist() == [0, 1, 2, 3, 4]
        assert masked(0, Mask(KEY, negative=False)).size == 0


class TestPairMask:
    KEYS = (bytes([1]) * 32, bytes([2]) * 32, bytes([3]) * 32)

    def mask(self, own: int, other: int, context: bytes = CONTEXT) -> Mask:
        return pair_mask(self.KEYS[own], public_of(self.KEYS[other]), context, own, other)

    def test_is_derived_for_the_pair_in_the_context(self) -> None:
        secret = agree(self.KEYS[0], public_of(self.KEYS[1]))
        key = derive(secret, "pair mask", CONTEXT, b"\x00\x01")
        assert self.mask(0, 1) == Mask(key, negative=False)
        assert self.mask(1, 0) == Mask(key, negative=True)

    def test_cancels_in_the_sum_over_all_pairs(self) -> None:
        vectors = [
            masked(11, *(self.mask(own, other) for other in range(3) if other != own))
            for own in range(3)
        ]
        assert all(vector.any() for vector in vectors)
        assert not np.add.reduce(vectors, dtype="<u4").any()

    def test_is_another_for_another_pair_context_or_key(self) -> None:
        found = [
            self.mask(0, 1),
            self.mask(0, 2),
            self.mask(1, 2),
            self.mask(0, 1, b"d" * 32),
            pair_mask(self.KEYS[0], public_of(self.KEYS[1]), CONTEXT, 0, 3),
            pair_mask(self.KEYS[0], public_of(self.KEYS[2]), CONTEXT, 0, 1),
        ]
        assert len({mask.key for mask in found}) == len(found)

    def test_with_a_weak_key_is_refused(self) -> None:
        with pytest.raises(WeakKeyError):
            pair_mask(self.KEYS[0], bytes(32), CONTEXT, 0, 1)


class TestSelfMask:
    def test_is_derived_for_the_site_in_the_context(self) -> None:
        mask = self_mask(KEY, CONTEXT, 7)
        assert mask == Mask(derive(KEY, "self mask", CONTEXT, b"\x07"), negative=False)

    def test_is_another_for_another_seed_context_or_site(self) -> None:
        found = [
            self_mask(KEY, CONTEXT, 7),
            self_mask(KEY, CONTEXT, 8),
            self_mask(KEY, b"d" * 32, 7),
            self_mask(bytes(32), CONTEXT, 7),
        ]
        assert len({mask.key for mask in found}) == 4


def is_uniform(values: np.ndarray, bins: int) -> bool:
    """Chi-squared, upper tail at ALARM / 2 and lower at ALARM / 2."""
    counts = np.bincount(values.ravel(), minlength=bins)
    expected = values.size / bins
    statistic = float(((counts - expected) ** 2 / expected).sum())
    low, high = stats.chi2.ppf([ALARM / 2, 1 - ALARM / 2], bins - 1)
    return bool(low <= statistic <= high)


def bytes_of(vector: np.ndarray) -> np.ndarray:
    return vector.view(np.uint8).reshape(-1, 4)


class TestUniform:
    """Masked words say nothing of what they hide: here, of a vector of zeros and small numbers."""

    WORDS = 1 << 18

    @pytest.mark.parametrize("site", range(3))
    @pytest.mark.parametrize("plain", [0, 5, 2**32 - 1])
    def test_every_byte_of_a_masked_word_is(self, site: int, plain: int) -> None:
        vector = np.full(self.WORDS, plain, dtype="<u4")
        add_masks(vector, [self_mask(KEY, CONTEXT, site)])
        assert all(is_uniform(bytes_of(vector)[:, place], 256) for place in range(4))

    @pytest.mark.parametrize("site", range(3))
    def test_so_are_its_high_nibbles(self, site: int) -> None:
        keys = [bytes([i + 1]) * 32 for i in range(3)]
        vector = np.arange(self.WORDS, dtype="<u4") % np.uint32(7)
        others = [other for other in range(3) if other != site]
        add_masks(
            vector,
            [pair_mask(keys[site], public_of(keys[o]), CONTEXT, site, o) for o in others],
        )
        assert is_uniform(vector >> np.uint32(28), 16)

    def test_so_is_what_two_sites_of_three_add_up_to(self) -> None:
        keys = [bytes([i + 1]) * 32 for i in range(3)]
        vector = np.zeros(self.WORDS, dtype="<u4")
        for own, other in ((0, 1), (0, 2), (1, 0), (1, 2)):
            add_masks(vector, [pair_mask(keys[own], public_of(keys[other]), CONTEXT, own, other)])
        assert all(is_uniform(bytes_of(vector)[:, place], 256) for place in range(4))

    def test_the_test_itself_sees_words_that_are_not(self) -> None:
        """One word in fifty without its mask, a missing value, and words more even than chance."""
        good = masked(self.WORDS, self_mask(KEY, CONTEXT, 0))
        leaking = good.copy()
        leaking[::50] = 5
        assert not is_uniform(bytes_of(leaking)[:, 0], 256)
        assert not is_uniform(leaking >> np.uint32(28), 16)
        assert not is_uniform(np.minimum(bytes_of(good)[:, 0], 254), 256)
        assert not is_uniform(np.arange(self.WORDS) % 256, 256)
