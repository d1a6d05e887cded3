"""Sealed shares: opened by whom they are for, where they belong, as they were; or not at all."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.privacy.secagg.encoding import decode, encode
from fedveil.privacy.secagg.errors import (
    MisdirectedShareError,
    TamperedCiphertextError,
    WeakKeyError,
)
from fedveil.privacy.secagg.keys import (
    NONCE_BYTES,
    TAG_BYTES,
    agree,
    derive,
    digest,
    public_of,
    seal,
    system_entropy,
)
from fedveil.privacy.secagg.messages import Deal, SealedShare
from fedveil.privacy.secagg.shares import MASK_KEYS, SEED, open_share, seal_share

SOURCE, DESTINATION, THIRD = (bytes([i]) * 32 for i in (1, 2, 3))
ROUTE = (SEED, 4, 7)
CONTEXT = b"c" * 32
CONTENT = bytes(range(32))


def counting(start: int = 0) -> Callable[[int], bytes]:
    """A source for tests."""
    return np.random.default_rng(start).bytes


def sealed(
    content: bytes = CONTENT, route: tuple[int, int, int] = ROUTE, context: bytes = CONTEXT
) -> SealedShare:
    return seal_share(content, route, context, SOURCE, public_of(DESTINATION), counting())


def read(
    share: SealedShare,
    route: tuple[int, int, int] = ROUTE,
    context: bytes = CONTEXT,
    length: int = len(CONTENT),
) -> bytes:
    return open_share(share, route, context, DESTINATION, public_of(SOURCE), length)


def check_tampered(share: SealedShare) -> None:
    with pytest.raises(TamperedCiphertextError, match="sealed share from 4: does not open as 32"):
        read(share)


class TestSealAndOpen:
    @given(
        st.binary(min_size=32, max_size=200),
        st.tuples(st.sampled_from([MASK_KEYS, SEED]), st.integers(0, 254), st.integers(0, 254)),
        st.binary(min_size=32, max_size=32),
    )
    def test_gives_the_content_back(
        self, content: bytes, route: tuple[int, int, int], context: bytes
    ) -> None:
        share = sealed(content, route, context)
        assert (share.kind, share.source, share.destination) == route
        assert read(share, route, context, len(content)) == content

    def test_survives_the_wire(self) -> None:
        deal = Deal(4, CONTEXT, (sealed(),), bytes(64))
        assert read(decode(Deal, encode(deal)).shares[0]) == CONTENT

    def test_is_bound_to_what_it_says_by_key_and_by_associated_data(self) -> None:
        route, nonce = bytes(ROUTE), counting()(NONCE_BYTES)
        secret = agree(SOURCE, public_of(DESTINATION))
        key = derive(secret, "share", CONTEXT, route)
        box = seal(key, nonce, CONTENT, digest("share", CONTEXT, route))
        assert sealed() == SealedShare(7, 4, SEED, nonce, box)

    def test_hides_the_content(self) -> None:
        share = sealed(b"a share that nobody else may read")
        assert len(share.box) == 33 + TAG_BYTES
        assert b"share" not in share.box + share.nonce

    def test_two_of_the_same_content_differ(self) -> None:
        first, second = (
            seal_share(CONTENT, ROUTE, CONTEXT, SOURCE, public_of(DESTINATION), entropy)
            for entropy in (system_entropy, system_entropy)
        )
        assert first.nonce != second.nonce
        assert first.box != second.box
        assert read(first) == read(second) == CONTENT

    def test_a_key_serves_one_kind_direction_and_context(self) -> None:
        """With one nonce, two boxes of one key would differ as their contents do: not at all."""
        routes = [ROUTE, (MASK_KEYS, 4, 7), (SEED, 7, 4), (SEED, 4, 8), (SEED, 5, 7)]
        boxes = [sealed(route=route).box for route in routes]
        boxes.append(sealed(context=b"d" * 32).box)
        assert len({box[: len(CONTENT)] for box in boxes}) == len(boxes)


class TestRefused:
    @pytest.mark.parametrize("route", [(MASK_KEYS, 4, 7), (SEED, 5, 7), (SEED, 4, 8), (SEED, 7, 4)])
    def test_what_says_that_it_is_another_s_or_another_kind(
        self, route: tuple[int, int, int]
    ) -> None:
        with pytest.raises(MisdirectedShareError, match=f"kind {SEED} from 4 for 7, expected kind"):
            read(sealed(), route)

    @pytest.mark.parametrize("route", [(MASK_KEYS, 4, 7), (SEED, 5, 7), (SEED, 4, 8), (SEED, 7, 4)])
    def test_what_is_made_to_say_that_it_is_this_one(self, route: tuple[int, int, int]) -> None:
        """A share of one kind served as another, or one site's as another's."""
        kind, source, destination = ROUTE
        other = sealed(route=route)
        check_tampered(replace(other, kind=kind, source=source, destination=destination))

    def test_any_one_bit_changed(self) -> None:
        share = sealed()
        for name in ("nonce", "box"):
            part: bytes = getattr(share, name)
            for bit in range(8 * len(part)):
                altered = bytearray(part)
                altered[bit // 8] ^= 1 << bit % 8
                check_tampered(replace(share, **{name: bytes(altered)}))  # type: ignore[arg-type]

    def test_what_is_cut_or_lengthened(self) -> None:
        share = sealed()
        for length in range(len(share.box)):
            check_tampered(replace(share, box=share.box[:length]))
        check_tampered(replace(share, box=share.box + b"\0"))

    def test_one_of_another_context(self) -> None:
        check_tampered(sealed(context=b"d" * 32))

    @pytest.mark.parametrize("length", [0, 31, 33, 64])
    def test_one_of_another_length(self, length: int) -> None:
        with pytest.raises(TamperedCiphertextError, match=f"as {length} bytes"):
            read(sealed(), length=length)
        check_tampered(sealed(bytes(length)))

    def test_one_for_another_key(self) -> None:
        for private, public in ((THIRD, SOURCE), (DESTINATION, THIRD)):
            with pytest.raises(TamperedCiphertextError):
                open_share(sealed(), ROUTE, CONTEXT, private, public_of(public), len(CONTENT))

    def test_a_weak_key_on_either_side(self) -> None:
        with pytest.raises(WeakKeyError):
            seal_share(CONTENT, ROUTE, CONTEXT, SOURCE, bytes(32), counting())
        with pytest.raises(WeakKeyError):
            open_share(sealed(), ROUTE, CONTEXT, DESTINATION, bytes(32), len(CONTENT))
