"""Shamir's sharing: the field's laws, a sum by hand, and what fewer shares than t say."""

from collections.abc import Callable
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.privacy.secagg import shamir
from fedveil.privacy.secagg.shamir import MAX_POINTS, combine, split

ALL = np.arange(256)
PRODUCT = shamir._PRODUCT


def fixed(coins: bytes) -> Callable[[int], bytes]:
    """A source that gives these coins, and no others."""

    def draw(count: int) -> bytes:
        assert count == len(coins)
        return coins

    return draw


def seeded(seed: int) -> Callable[[int], bytes]:
    """A source for tests."""
    return np.random.default_rng(seed).bytes


def by_hand(a: int, b: int) -> int:
    """FIPS 197, section 4.2: add a's multiples by the bits of b, reduced by x^8+x^4+x^3+x+1."""
    total = 0
    for bit in range(8):
        if b >> bit & 1:
            total ^= a << bit
    for bit in range(14, 7, -1):
        if total >> bit & 1:
            total ^= 0x11B << (bit - 8)
    return total


class TestTheField:
    def test_the_standard_s_examples(self) -> None:
        # FIPS 197, sections 4.2 and 4.2.1.
        assert PRODUCT[0x57, 0x83] == 0xC1
        assert [PRODUCT[0x57, 1 << i] for i in range(5)] == [0x57, 0xAE, 0x47, 0x8E, 0x07]
        assert PRODUCT[0x57, 0x13] == 0xFE

    def test_products_are_those_by_hand(self) -> None:
        expected = [[by_hand(a, b) for b in range(256)] for a in range(256)]
        assert np.array_equal(PRODUCT, expected)

    def test_products_commute_and_one_is_one(self) -> None:
        assert np.array_equal(PRODUCT, PRODUCT.T)
        assert np.array_equal(PRODUCT[1], ALL)
        assert not PRODUCT[0].any()

    def test_products_associate_and_distribute(self) -> None:
        a, b, c = ALL[:, None, None], ALL[None, :, None], ALL[None, None, ::5]
        assert np.array_equal(PRODUCT[PRODUCT[a, b], c], PRODUCT[a, PRODUCT[b, c]])
        assert np.array_equal(PRODUCT[a, b ^ c], PRODUCT[a, b] ^ PRODUCT[a, c])

    def test_every_unit_has_one_inverse(self) -> None:
        assert all(PRODUCT[a, shamir._INVERSE[a]] == 1 for a in range(1, 256))
        assert len(set(shamir._INVERSE[1:].tolist())) == 255
        assert shamir._INVERSE[0x53] == 0xCA  # FIPS 197, section 4.2: {53} * {ca} = {01}


class TestTwoOfThree:
    """f(x) = 0x42 + 0x57 x: f(1) = 0x15, f(2) = 0x42 ^ 0xae = 0xec, f(3) = 0x42 ^ 0xf9 = 0xbb."""

    SHARES = (b"\x15", b"\xec", b"\xbb")

    def test_the_shares_are_the_line_s_points(self) -> None:
        assert tuple(split(b"\x42", 2, 3, fixed(b"\x57"))) == self.SHARES

    def test_any_two_give_the_secret(self) -> None:
        for i, j in permutations(range(3), 2):
            assert combine({i: self.SHARES[i], j: self.SHARES[j]}) == b"\x42"

    def test_a_parabola_s_shares_need_three(self) -> None:
        # f(x) = 0x42 + 0x83 x + 0x57 x^2; f(1) = 0x42 ^ 0x83 ^ 0x57 = 0x96. At 2: 2 * 0x83 =
        # 0x106 ^ 0x11b = 0x1d and 4 * 0x57 = 0x47, so 0x42 ^ 0x1d ^ 0x47 = 0x18. At 3, where
        # 3^2 = 5: 0x1d ^ 0x83 = 0x9e and 0x47 ^ 0x57 = 0x10, so 0x42 ^ 0x9e ^ 0x10 = 0xcc.
        shares = split(b"\x42", 3, 4, fixed(b"\x57\x83"))  # the highest power first
        assert shares[:3] == [b"\x96", b"\x18", b"\xcc"]
        assert combine(dict(enumerate(shares[:3]))) == b"\x42"


@st.composite
def thresholds(draw: st.DrawFn) -> tuple[int, int]:
    """t of n."""
    count = draw(st.integers(1, 20))
    return draw(st.integers(1, count)), count


class TestSplitAndCombine:
    @given(thresholds(), st.binary(max_size=70), st.integers(0, 2**32), st.data())
    def test_any_t_of_n_give_the_secret(
        self, numbers: tuple[int, int], secret: bytes, seed: int, data: st.DataObject
    ) -> None:
        threshold, count = numbers
        shares = split(secret, threshold, count, seeded(seed))
        assert len(shares) == count
        assert {len(share) for share in shares} == {len(secret)}
        chosen = data.draw(st.permutations(range(count)))[:threshold]
        assert combine({i: shares[i] for i in chosen}) == secret
        more = data.draw(st.permutations(range(count)))[: threshold + 1]
        assert combine({i: shares[i] for i in more}) == secret  # and no harm in one too many

    def test_every_choice_of_seven_of_ten_gives_it(self) -> None:
        secret = bytes(range(32))
        shares = split(secret, 7, 10, seeded(0))
        for chosen in combinations(range(10), 7):
            assert combine({i: shares[i] for i in chosen}) == secret

    def test_up_to_255_sites_have_one_each(self) -> None:
        shares = split(b"secret", 200, 255, seeded(0))
        assert combine({i: shares[i] for i in range(55, 255)}) == b"secret"
        assert len(set(shares)) == 255

    @given(st.integers(0, 2**32), st.integers(2, 6), st.binary(min_size=1, max_size=8))
    def test_a_wrong_share_gives_another_secret(
        self, seed: int, threshold: int, secret: bytes
    ) -> None:
        shares = split(secret, threshold, 8, seeded(seed))
        for wrong in range(threshold):
            chosen = dict(enumerate(shares[:threshold]))
            chosen[wrong] = bytes([chosen[wrong][0] ^ 1]) + chosen[wrong][1:]
            found = combine(chosen)
            assert found[:1] != secret[:1]
            assert found[1:] == secret[1:]

    def test_a_share_under_another_site_s_index_gives_another_secret(self) -> None:
        shares = split(b"\x42", 2, 3, fixed(b"\x57"))
        assert combine({0: shares[0], 2: shares[1]}) != b"\x42"

    def test_every_byte_has_coins_of_its_own(self) -> None:
        shares = split(bytes(2), 2, 2, fixed(b"\x01\x02"))
        assert shares == [b"\x01\x02", b"\x02\x04"]


class TestFewerThanTheThreshold:
    def test_one_share_of_two_says_nothing(self) -> None:
        """Given any value of any one share, each of the 256 secrets has exactly one coin."""
        secrets, coins = np.repeat(ALL, 256).astype("u1"), np.tile(ALL, 256).astype("u1")
        shares = split(secrets.tobytes(), 2, 255, fixed(coins.tobytes()))
        for share in shares:
            by_secret = np.frombuffer(share, dtype="u1").reshape(256, 256)
            assert (np.sort(by_secret, axis=1) == ALL).all()

    @pytest.mark.parametrize("secret", [0, 1, 0x42, 255])
    def test_two_shares_of_three_say_nothing(self, secret: int) -> None:
        """Over all coins, each two shares take each pair of values once, whatever the secret."""
        coins = np.concatenate([np.repeat(ALL, 256), np.tile(ALL, 256)]).astype("u1")
        shares = split(bytes([secret]) * 65536, 3, 4, fixed(coins.tobytes()))
        points = [np.frombuffer(share, dtype="u1").astype(int) for share in shares]
        for one, other in combinations(points, 2):
            assert len(np.unique(256 * one + other)) == 65536

    def test_they_combine_to_something_else(self) -> None:
        secret = bytes(range(32))
        shares = split(secret, 3, 5, seeded(0))
        assert all(
            combine({i: shares[i] for i in two}) != secret for two in combinations(range(5), 2)
        )

    def test_a_threshold_of_one_hides_nothing_and_draws_no_coins(self) -> None:
        assert split(b"ab", 1, 3, fixed(b"")) == [b"ab"] * 3


class TestRefused:
    @pytest.mark.parametrize(
        ("threshold", "count"), [(0, 3), (-1, 3), (4, 3), (2, MAX_POINTS + 1), (1, 0)]
    )
    def test_thresholds_and_counts_out_of_range(self, threshold: int, count: int) -> None:
        with pytest.raises(ValueError, match="must be 1 <= t <= n <= 255"):
            split(b"secret", threshold, count, seeded(0))

    @pytest.mark.parametrize("index", [-1, MAX_POINTS])
    def test_indices_that_are_no_site_s(self, index: int) -> None:
        with pytest.raises(ValueError, match="must be of sites 0 to 254"):
            combine({0: b"a", index: b"b"})

    def test_no_shares(self) -> None:
        with pytest.raises(ValueError, match="must be of sites"):
            combine({})

    def test_shares_of_different_lengths(self) -> None:
        with pytest.raises(ValueError, match="of one length"):
            combine({0: b"ab", 1: b"a"})

    def test_a_source_that_gives_too_few_coins(self) -> None:
        with pytest.raises(ValueError, match="reshape"):
            split(b"secret", 3, 3, lambda count: bytes(count - 1))
