"""The byte form of every message: one for each value, and nothing else is read.

The strategies make messages from the annotations of their fields, so a new message or field is
tested the moment it is declared.
"""

import importlib
import math
import pkgutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fedveil.privacy.secagg
from fedveil.config import least_threshold
from fedveil.privacy.secagg.encoding import (
    MAX_WORDS,
    VERSION,
    Bytes,
    Codec,
    Keys,
    Many,
    Maybe,
    Message,
    Nested,
    Number,
    Real,
    Text,
    Words,
    decode,
    encode,
    layout,
    limit,
    pieces,
)
from fedveil.privacy.secagg.errors import (
    MalformedMessageError,
    ReusedKeyError,
    SecAggError,
    UnsafeNumbersError,
)
from fedveil.privacy.secagg.messages import (
    Advertisement,
    Confirmation,
    Confirmations,
    Deal,
    Deals,
    Dealt,
    Roster,
    SealedShare,
    Share,
    Unmasking,
    Upload,
    Uploaded,
    Uploaders,
)
from fedveil.privacy.secagg.sealed import SealedReply
from fedveil.privacy.secagg.state import SiteState
from fedveil.privacy.secagg.terms import Block, Member, Numbers, Opening, Setup
from fedveil.privacy.secagg.transcript import Released

PLAIN = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
HEADER = 4


def declared() -> dict[str, type[Message]]:
    """Every message of the package, by name, wherever it is declared."""
    package = fedveil.privacy.secagg
    found: dict[str, type[Message]] = {}
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and hasattr(value, "KIND"):
                assert found.setdefault(value.__name__, value) is value
    return found


KINDS = declared()
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@st.composite
def numbers(draw: st.DrawFn) -> Numbers:
    """Numbers that are safe, for up to six sites."""
    n = draw(st.integers(2, 6))
    t_collude = draw(st.integers(0, n - 2))
    t = draw(st.integers(least_threshold(n, t_collude), n))
    return Numbers(n, t, draw(st.integers(max(t, t_collude + 2), n)), t_collude)


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    """Set-ups whose roster is as long as their numbers say."""
    agreed = draw(numbers())
    names = sorted(draw(st.sets(NAMES, min_size=agreed.n, max_size=agreed.n)))
    keys = draw(st.sets(HASHES, min_size=agreed.n, max_size=agreed.n))
    roster = tuple(Member(name, key) for name, key in zip(names, sorted(keys), strict=True))
    return Setup(
        draw(NAMES), draw(st.integers(0, 2**32 - 2)), roster, agreed, draw(st.integers(1, 4096))
    )


def blocks() -> st.SearchStrategy[Block]:
    """Blocks that are in their ranges."""
    positive = st.floats(0, exclude_min=True, allow_infinity=False)
    scales = st.floats(0, 2.0**31, exclude_min=True)
    rates = st.floats(0, 1, exclude_min=True)
    noise = st.floats(0, allow_infinity=False).map(abs)
    return st.builds(Block, NAMES, st.integers(1, 1000), positive, scales, noise, rates)


@st.composite
def openings(draw: st.DrawFn) -> Opening:
    """Openings with a name for each block."""
    found = draw(st.lists(blocks(), min_size=1, max_size=3, unique_by=lambda block: block.name))
    members = tuple(sorted(draw(st.sets(st.integers(0, 255), max_size=5))))
    number = draw(st.integers(0, 2**16 - 1))
    return Opening(draw(HASHES), members, number, draw(HASHES), tuple(found))


@st.composite
def advertisements(draw: st.DrawFn) -> Advertisement:
    """Advertisements with no key twice."""
    keys = draw(st.lists(HASHES, min_size=2, max_size=4, unique=True))
    site, signature = draw(st.integers(0, 255)), draw(st.binary(min_size=64, max_size=64))
    return Advertisement(site, draw(HASHES), keys[0], tuple(keys[1:]), signature)


HASHES = st.binary(min_size=32, max_size=32)
NAMES = st.builds(
    lambda first, rest: first + rest,
    st.sampled_from(PLAIN),
    st.text(PLAIN + "_.-", max_size=63),
)
SPECIAL: dict[type, Callable[[], st.SearchStrategy[object]]] = {
    Numbers: numbers,
    Setup: setups,
    Block: blocks,
    Opening: openings,
    Advertisement: advertisements,
}


def first_field(item: object) -> object:
    """By what a set's items are told apart."""
    return getattr(item, fields(item)[0].name) if is_dataclass(item) else item


def several(codec: Many) -> st.SearchStrategy[object]:
    """A few items; of a set each once, in order."""
    assert codec.item is not None
    items, most = values(codec.item), min(codec.high, codec.low + 2)
    if not codec.ascending:
        return st.lists(items, min_size=codec.low, max_size=most).map(tuple)
    found = st.lists(items, min_size=codec.low, max_size=most, unique_by=first_field)
    return found.map(lambda unordered: tuple(sorted(unordered, key=first_field)))  # type: ignore[arg-type]


def vectors() -> st.SearchStrategy[np.ndarray]:
    """Short vectors of words."""
    words = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9)
    return words.map(lambda found: np.array(found, dtype="<u4"))


def finite_reals() -> st.SearchStrategy[float]:
    """All of them, zero in its one form."""
    finite = st.floats(allow_nan=False, allow_infinity=False)
    return finite.map(lambda value: abs(value) if value == 0 else value)


def values(codec: Codec) -> st.SearchStrategy[object]:
    """What a field of this codec can hold."""
    found: st.SearchStrategy[object] | None = None
    match codec:
        case Number(width):
            found = st.integers(0, 256**width - 1)
        case Real():
            found = finite_reals()
        case Bytes(low, high):
            found = st.binary(min_size=low, max_size=min(high, low + 20))
        case Text():
            found = NAMES
        case Keys(low, high):
            key = st.binary(min_size=32, max_size=32)
            found = st.lists(key, min_size=low, max_size=min(high, low + 2)).map(tuple)
        case Maybe(item):
            found = st.none() | values(item)
        case Words():
            found = vectors()
        case Nested(kind):
            found = of(kind)
        case Many():
            found = several(codec)
    assert found is not None, f"{codec}: has no strategy"
    return found


@cache
def of(kind: type) -> st.SearchStrategy[object]:
    """Valid messages of a kind."""
    if kind in SPECIAL:
        return SPECIAL[kind]()
    return st.builds(kind, **{name: values(codec) for name, codec in layout(kind)})


def same(one: object, other: object) -> bool:
    """Whether two values are equal, vectors by their words."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if type(one) is not type(other):
        return False
    if is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    return one == other


def check_refused_or_canonical(kind: type[Message], data: bytes) -> None:
    """Bytes from anywhere are refused by a typed error, or are the one form of what they say."""
    with suppress(SecAggError):  # any other exception fails the test
        assert encode(decode(kind, data)) == data


def member(number: int) -> Member:
    return Member(f"site-{number}", bytes([number]) * 32)


SETUP = Setup("run-1", 3, (member(0), member(1), member(2)), Numbers(3, 3, 3, 1), 2)
UPLOADED = Uploaded(
    1, b"c" * 32, b"v" * 32, b"s" * 32, b"k" * 32, b"h" * 32, 9, b"l" * 32, b"g" * 64
)
SEALED = SealedShare(1, 0, 2, b"n" * 12, b"b" * 48)
ADVERTISED = Advertisement(0, b"a" * 32, b"k" * 32, (b"0" * 32, b"1" * 32), b"g" * 64)
BLOCKS = (Block("gradient", 10, 1.0, 65536.0, 12.5, 0.1), Block("counts", 2, 1.0, 1.0, 0.0, 1.0))
EXAMPLES: tuple[Message, ...] = (
    SETUP,
    ADVERTISED,
    Roster((ADVERTISED, replace(ADVERTISED, site=2))),
    Deal(0, b"r" * 32, (SEALED, replace(SEALED, destination=2)), b"g" * 64),
    Opening(b"r" * 32, (0, 1, 2), 7, b"m" * 32, BLOCKS),
    Uploaders(7, b"c" * 32, (0, 1), (2,), (UPLOADED,), (SEALED,)),
    Upload(np.arange(3, dtype="<u4"), UPLOADED, (SEALED,)),
    Unmasking(1, b"c" * 32, (Share(0, b"x" * 32), Share(1, b"y" * 32)), (), b"g" * 64),
    SealedReply("site-1", b"c" * 32, b"b" * 50, b"g" * 64),
)


def damaged(data: bytes, draw: st.DataObject) -> bytes:
    """A valid encoding with one thing done to it."""
    at = draw.draw(st.integers(0, len(data) - 1))
    what = draw.draw(st.sampled_from(["flip", "cut", "remove", "insert", "number", "double"]))
    if what == "flip":
        return data[:at] + bytes([data[at] ^ (1 << draw.draw(st.integers(0, 7)))]) + data[at + 1 :]
    if what == "cut":
        return data[:at]
    until = at + draw.draw(st.integers(1, 40))
    if what == "remove":
        return data[:at] + data[until:]
    if what == "double":
        return data[:until] + data[at:]
    if what == "insert":
        return data[:at] + draw.draw(st.binary(min_size=1, max_size=8)) + data[at:]
    counts = st.sampled_from([0, 1, 2, 255, 256, 2**16, 2**28, 2**28 + 1, 2**31, 2**32 - 1])
    return data[:at] + draw.draw(counts).to_bytes(4, "big") + data[at + 4 :]


class TestKinds:
    def test_all_of_the_protocol_are_found(self) -> None:
        expected = {
            Setup, Advertisement, Roster, Deal, Dealt, Opening, Deals, Upload, Uploaded, Uploaders,
            Confirmation, Confirmations, Unmasking, Released, SealedReply, SiteState,
        }  # fmt: skip
        assert expected <= set(KINDS.values())

    def test_no_two_have_one_number(self) -> None:
        assert len({kind.KIND for kind in KINDS.values()}) == len(KINDS)
        assert all(0 < kind.KIND < 256 for kind in KINDS.values())

    @EVERY_KIND
    def test_is_read_as_no_other_kind(self, kind: type[Message]) -> None:
        for message in EXAMPLES:
            if type(message) is not kind:
                # What is longer than one of its kind can be is not even read.
                refused = r"another kind or version|bytes, expected at most"
                with pytest.raises(MalformedMessageError, match=refused):
                    decode(kind, encode(message))


class TestEveryMessage:
    @EVERY_KIND
    @given(draw=st.data())
    def test_comes_back_from_its_bytes(self, kind: type[Message], draw: st.DataObject) -> None:
        message = draw.draw(of(kind))
        assert isinstance(message, kind)
        data = encode(message)
        assert same(decode(kind, data), message)
        assert encode(decode(kind, data)) == data  # a copy of the value has the same bytes
        assert b"".join(pieces(message)) == data
        assert len(data) <= limit(kind)
        assert data[:HEADER] == b"FV" + bytes([VERSION, kind.KIND])

    @EVERY_KIND
    @given(draw=st.data())
    def test_damaged_is_refused_or_another_in_its_one_form(
        self, kind: type[Message], draw: st.DataObject
    ) -> None:
        message = draw.draw(of(kind))
        assert isinstance(message, kind)
        data = encode(message)
        for _ in range(8):
            check_refused_or_canonical(kind, damaged(data, draw))

    @EVERY_KIND
    @given(body=st.binary(max_size=300))
    def test_random_bytes_are_refused_or_in_their_one_form(
        self, kind: type[Message], body: bytes
    ) -> None:
        check_refused_or_canonical(kind, body)
        check_refused_or_canonical(kind, b"FV" + bytes([VERSION, kind.KIND]) + body)

    @EVERY_KIND
    @given(draw=st.data(), tail=st.binary(min_size=1, max_size=5))
    @settings(max_examples=15)
    def test_with_more_behind_it_is_refused(
        self, kind: type[Message], draw: st.DataObject, tail: bytes
    ) -> None:
        message = draw.draw(of(kind))
        assert isinstance(message, kind)
        # Of a kind whose messages are all of one length it is not even read.
        with pytest.raises(MalformedMessageError, match=r"bytes too many|bytes, expected at most"):
            decode(kind, encode(message) + tail)

    @EVERY_KIND
    @given(draw=st.data())
    @settings(max_examples=5)
    def test_cut_off_anywhere_is_refused(self, kind: type[Message], draw: st.DataObject) -> None:
        message = draw.draw(of(kind))
        assert isinstance(message, kind)
        data = encode(message)
        for length in range(len(data)):
            with pytest.raises(MalformedMessageError):
                decode(kind, data[:length])

    @pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
    def test_any_one_bit_changed_is_refused_or_another_message(self, message: Message) -> None:
        data = encode(message)
        for bit in range(8 * len(data)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            check_refused_or_canonical(type(message), bytes(flipped))

    @EVERY_KIND
    @given(draw=st.data(), other=st.integers(0, 255))
    @settings(max_examples=10)
    def test_of_another_version_is_refused(
        self, kind: type[Message], draw: st.DataObject, other: int
    ) -> None:
        message = draw.draw(of(kind))
        assert isinstance(message, kind)
        data = encode(message)
        altered = data[:2] + bytes([other]) + data[3:]
        if other == VERSION:
            assert same(decode(kind, altered), message)
        else:
            with pytest.raises(MalformedMessageError, match="version"):
                decode(kind, altered)

    @EVERY_KIND
    def test_nothing_at_all_is_refused(self, kind: type[Message]) -> None:
        with pytest.raises(MalformedMessageError, match="has 0 bytes, expected 4"):
            decode(kind, b"")


class TestTheBytes:
    def test_of_a_confirmation_are_these(self) -> None:
        confirmation = Confirmation(7, bytes(range(32)), bytes(range(64)))
        assert encode(confirmation) == (
            b"FV\x01\x09" + b"\x07" + bytes(range(32)) + bytes(range(64))
        )

    def test_of_a_set_up_are_these(self) -> None:
        roster = b"".join(b"\x06site-%d" % i + bytes([i]) * 32 for i in range(3))
        epoch = members = b"\x00\x00\x00\x03"
        numbers, rounds = b"\x03\x03\x03\x01", b"\x00\x02"  # n, t, n_min, t_collude
        start = b"FV\x01\x01\x05run-1"
        assert encode(SETUP) == start + epoch + members + roster + numbers + rounds

    def test_of_reals_are_big_endian_doubles(self) -> None:
        block = Block("b", 1, 1.5, 2.0, 0.0, 0.25)
        data = encode(Opening(bytes(32), (), 0, bytes(32), (block,)))
        assert data.endswith(b"\x01b" + b"\0\0\0\x01" + struct.pack(">4d", 1.5, 2.0, 0.0, 0.25))

    def test_of_an_absent_value_are_a_zero_and_of_one_that_is_there_a_one(self) -> None:
        assert encode(SiteState("a", "b")) == b"FV\x01\x20" + b"\x01a\x01b" + bytes(4) + b"\0"

    def test_may_come_as_any_buffer(self) -> None:
        data = encode(SETUP)
        for buffer in (data, bytearray(data), memoryview(data), np.frombuffer(data, "u1").data):
            assert decode(Setup, buffer) == SETUP


def opened(data: bytes) -> Callable[[], Message]:
    return lambda: decode(Opening, b"FV\x01\x05" + data)


def reals(*numbers: float) -> bytes:
    """An opening's bytes up to its end, with one block of these reals."""
    return bytes(32 + 4 + 2 + 32) + b"\0\0\0\x01\x01b\0\0\0\x01" + struct.pack(">4d", *numbers)


class TestReals:
    def test_the_frame_of_these_tests_is_right(self) -> None:
        block = Block("b", 1, 1.0, 1.0, 0.0, 1.0)
        assert opened(reals(1, 1, 0, 1))() == Opening(bytes(32), (), 0, bytes(32), (block,))

    @pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf, -0.0])
    @pytest.mark.parametrize("place", range(4))
    def test_what_is_not_finite_and_minus_zero_are_not_read(self, bad: float, place: int) -> None:
        numbers = [1.0, 1.0, 0.0, 1.0]
        numbers[place] = bad
        with pytest.raises(MalformedMessageError, match="expected a finite real"):
            opened(reals(*numbers))()

    def test_no_nan_of_any_payload_is_read(self) -> None:
        for pattern in (0x7FF0000000000001, 0x7FF8000000000000, 0xFFFFFFFFFFFFFFFF):
            data = reals(1, 1, 0, 1)[:-8] + pattern.to_bytes(8, "big")
            with pytest.raises(MalformedMessageError, match="expected a finite real"):
                opened(data)()

    @pytest.mark.parametrize("bad", [math.inf, -0.0, 1])
    def test_nor_written(self, bad: float) -> None:
        block = Block("b", 1, 1.0, 1.0, 0.0, 1.0)
        object.__setattr__(block, "sigma", bad)
        with pytest.raises(MalformedMessageError, match=r"sigma.* expected a finite real"):
            encode(Opening(bytes(32), (), 0, bytes(32), (block,)))

    @pytest.mark.parametrize(("place", "bad"), [(0, 0.0), (1, -1.0), (2, -1.0), (3, 1.5)])
    def test_out_of_range_are_refused_as_numbers(self, place: int, bad: float) -> None:
        numbers = [1.0, 1.0, 0.0, 1.0]
        numbers[place] = bad
        with pytest.raises(UnsafeNumbersError, match="block b"):
            opened(reals(*numbers))()


WRONG_NAMES = [
    "", "a\n", "\na", "a b", "é", "a\0", "-a", ".a", "_a", "a/b", "a" * 65,
    "\uff11", "\u017f", "\u212a",  # a digit, and letters that fold to s and K, elsewhere
]  # fmt: skip


class TestNames:
    @pytest.mark.parametrize("name", WRONG_NAMES, ids=ascii)
    def test_that_are_not_plain_are_not_written(self, name: str) -> None:
        with pytest.raises(MalformedMessageError, match="a name of 1 to 64 plain characters"):
            encode(SiteState(name, "run"))

    @pytest.mark.parametrize("name", WRONG_NAMES, ids=ascii)
    def test_nor_read(self, name: str) -> None:
        raw = name.encode("utf-8")
        data = b"FV\x01\x20" + bytes([len(raw)]) + raw + b"\x03run" + bytes(5)
        with pytest.raises(MalformedMessageError, match="a name of 1 to 64 plain characters"):
            decode(SiteState, data)

    @pytest.mark.parametrize("name", ["a", "Z9", "st-mary.2_b", "0" * 64])
    def test_that_are_plain_are_both(self, name: str) -> None:
        state = SiteState(name, "run")
        assert decode(SiteState, encode(state)) == state

    def test_an_error_shows_a_name_without_its_control_characters(self) -> None:
        with pytest.raises(MalformedMessageError) as error:
            encode(SiteState("a\x1b[2J\n", "run"))
        assert str(error.value).isprintable()


def uploaders(*sites: int) -> bytes:
    """The bytes of `Uploaders` with this U."""
    data = encode(EXAMPLES[5])
    start = HEADER + 2 + 32
    assert data[start : start + 6] == b"\0\0\0\x02\0\x01"
    return data[:start] + len(sites).to_bytes(4, "big") + bytes(sites) + data[start + 6 :]


class TestSets:
    @given(st.lists(st.integers(0, 6), max_size=5))
    def test_are_read_only_in_order_and_without_doubles(self, sites: list[int]) -> None:
        if all(a < b for a, b in pairwise(sites)):
            assert decode(Uploaders, uploaders(*sites)).uploaders == tuple(sites)
        else:
            with pytest.raises(MalformedMessageError, match="each once, ascending"):
                decode(Uploaders, uploaders(*sites))

    @pytest.mark.parametrize("sites", [(1, 0), (1, 1)])
    def test_nor_are_others_written(self, sites: tuple[int, int]) -> None:
        first, second = (replace(UPLOADED, site=site) for site in sites)
        for message in (
            Uploaders(0, bytes(32), sites, (), (UPLOADED,), ()),
            Uploaders(0, bytes(32), (), sites, (UPLOADED,), ()),
            Uploaders(0, bytes(32), (), (), (first, second), ()),
            Roster(tuple(replace(ADVERTISED, site=site) for site in sites)),
            Deal(0, bytes(32), tuple(replace(SEALED, destination=s) for s in sites), bytes(64)),
            Unmasking(0, bytes(32), tuple(Share(s, bytes(32)) for s in sites), (), bytes(64)),
        ):
            with pytest.raises(MalformedMessageError, match="each once, ascending"):
                encode(message)

    def test_of_members_go_by_their_names(self) -> None:
        with pytest.raises(MalformedMessageError, match="each once, ascending"):
            encode(replace(SETUP, roster=SETUP.roster[::-1]))
        double = replace(SETUP.roster[1], name="site-0")
        with pytest.raises(MalformedMessageError, match="each once, ascending"):
            encode(replace(SETUP, roster=(SETUP.roster[0], double, SETUP.roster[2])))

    def test_shares_for_one_site_may_come_from_several(self) -> None:
        shares = (replace(SEALED, source=3), replace(SEALED, source=2))
        deals = Deals((Dealt(0, bytes(32), bytes(32), bytes(64)),), shares)
        assert decode(Deals, encode(deals)).shares == shares

    def test_a_sequence_must_be_a_tuple(self) -> None:
        listed: tuple[int, ...] = [0, 1]  # type: ignore[assignment]
        with pytest.raises(MalformedMessageError, match="list: expected a tuple"):
            encode(Uploaders(0, bytes(32), listed, (), (UPLOADED,), ()))


class TestWrongLengths:
    @pytest.mark.parametrize("length", [0, 31, 33])
    def test_of_a_hash_are_not_written(self, length: int) -> None:
        with pytest.raises(MalformedMessageError, match=f"context = {length} bytes"):
            encode(Confirmation(0, bytes(length), bytes(64)))

    @pytest.mark.parametrize("length", [0, 63, 65])
    def test_of_a_signature_are_not_written(self, length: int) -> None:
        with pytest.raises(MalformedMessageError, match=f"signature = {length} bytes"):
            encode(Confirmation(0, bytes(32), bytes(length)))

    @pytest.mark.parametrize("length", [0, 47])
    def test_of_a_box_without_room_for_its_tag_are_neither_written_nor_read(
        self, length: int
    ) -> None:
        reply = SealedReply("a", bytes(32), bytes(length), bytes(64))
        with pytest.raises(MalformedMessageError, match=f"box = {length} bytes"):
            encode(reply)
        data = b"FV\x01\x14\x01a" + bytes(32) + length.to_bytes(4, "big") + bytes(length + 64)
        with pytest.raises(MalformedMessageError, match=f"box = {length} bytes"):
            decode(SealedReply, data)

    def test_bytes_must_be_bytes(self) -> None:
        text: bytes = "c" * 32  # type: ignore[assignment]
        with pytest.raises(MalformedMessageError, match="str: expected bytes"):
            encode(Confirmation(0, text, bytes(64)))


class TestNumbers:
    @pytest.mark.parametrize("bad", [-1, 256, True, 1.0, None, "1", np.int64(1)])
    def test_out_of_their_width_or_no_whole_number_are_not_written(self, bad: int) -> None:
        with pytest.raises(MalformedMessageError, match="a whole number of 0 to 255"):
            encode(Confirmation(bad, bytes(32), bytes(64)))

    def test_take_their_whole_width(self) -> None:
        uploaded = replace(UPLOADED, ledger_count=2**64 - 1)
        assert decode(Uploaded, encode(uploaded)) == uploaded
        with pytest.raises(MalformedMessageError, match="ledger_count"):
            encode(replace(UPLOADED, ledger_count=2**64))

    @pytest.mark.parametrize("there", [2, 255])
    def test_a_value_is_there_or_it_is_not(self, there: int) -> None:
        data = encode(SiteState("a", "b"))
        with pytest.raises(MalformedMessageError, match=f"epoch = {there}: expected 0 or 1"):
            decode(SiteState, data[:-1] + bytes([there]))

    def test_that_the_protocol_does_not_allow_are_refused_as_such(self) -> None:
        data = bytearray(encode(SETUP))
        data[-5] = 2  # t = 2 of 3 with a colluder
        with pytest.raises(UnsafeNumbersError, match="t = 2"):
            decode(Setup, data)
        with pytest.raises(ReusedKeyError):
            decode(Advertisement, encode(ADVERTISED).replace(b"1" * 32, b"0" * 32))


def claims() -> Iterator[tuple[type[Message], bytes]]:
    """Messages that say that much more follows than does, up to their limits and beyond."""
    for count in (2**32 - 1, MAX_WORDS, 4 * MAX_WORDS):
        huge = count.to_bytes(4, "big")
        yield Upload, b"FV\x01\x07" + huge + bytes(8)
        yield SealedReply, b"FV\x01\x14\x01a" + bytes(32) + huge + bytes(100)
    for count in (4096, 2**32 - 1):
        huge = count.to_bytes(4, "big")
        yield Advertisement, b"FV\x01\x02" + bytes(65) + huge + bytes(range(64))
    for count in (255, 2**32 - 1):
        yield Roster, b"FV\x01\x03" + count.to_bytes(4, "big") + bytes(100)


class TestHugeCounts:
    @pytest.mark.parametrize(("kind", "data"), list(claims()))
    def test_take_no_memory(self, kind: type[Message], data: bytes) -> None:
        with pytest.raises(MalformedMessageError):
            decode(kind, data)  # what is loaded once is loaded now
        tracemalloc.start()
        try:
            with pytest.raises(MalformedMessageError):
                decode(kind, data)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 1 << 17  # bytes; the least claim is as large, the others are gigabytes


class TestVectors:
    def upload(self, vector: np.ndarray) -> Upload:
        return Upload(vector, UPLOADED, (SEALED,))

    def test_are_little_endian_words_behind_their_count(self) -> None:
        data = encode(self.upload(np.array([1, 0x01020304], dtype="<u4")))
        assert data[:16] == b"FV\x01\x07" + b"\0\0\0\x02" + b"\x01\0\0\0" + b"\x04\x03\x02\x01"

    def test_are_read_where_they_lie(self) -> None:
        data = bytearray(encode(self.upload(np.arange(1000, dtype="<u4"))))
        vector = decode(Upload, data).vector
        assert np.shares_memory(vector, np.frombuffer(data, dtype=np.uint8))
        assert vector.flags.aligned
        data[8] = 77
        assert vector[0] == 77

    def test_of_bytes_cannot_be_written_to(self) -> None:
        data = encode(self.upload(np.arange(4, dtype="<u4")))
        assert not decode(Upload, data).vector.flags.writeable

    def test_are_written_from_where_they_lie(self) -> None:
        vector = np.arange(1000, dtype="<u4")
        parts = pieces(self.upload(vector))
        shared = [
            part
            for part in parts
            if len(part) and np.shares_memory(np.frombuffer(part, dtype=np.uint8), vector)
        ]
        assert [len(part) for part in shared] == [4000]

    def test_are_written_without_taking_their_memory_again(self) -> None:
        upload = self.upload(np.zeros(1 << 20, dtype="<u4"))
        pieces(upload)  # what is loaded once is loaded now
        tracemalloc.start()
        try:
            pieces(upload)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 1 << 17  # bytes; the vector has 2^22

    @pytest.mark.parametrize(
        "vector",
        [
            np.zeros(0, dtype="<u4"),
            np.zeros((2, 2), dtype="<u4"),
            np.zeros(4, dtype=">u4"),
            np.zeros(4, dtype=np.int32),
            np.zeros(4, dtype=np.float32),
            np.zeros(4, dtype=np.uint64),
            np.zeros(8, dtype="<u4")[::2],
        ],
        ids=["empty", "square", "big-endian", "signed", "float", "long", "strided"],
    )
    def test_of_anything_but_flat_words_are_not_written(self, vector: np.ndarray) -> None:
        with pytest.raises(MalformedMessageError, match="words"):
            encode(self.upload(vector))

    def test_that_are_lists_are_not_written(self) -> None:
        listed: np.ndarray = [1, 2]  # type: ignore[assignment]
        with pytest.raises(MalformedMessageError, match="flat uint32 words"):
            encode(self.upload(listed))

    def test_of_no_words_are_not_read(self) -> None:
        data = encode(self.upload(np.zeros(1, dtype="<u4")))
        with pytest.raises(MalformedMessageError, match="0 words"):
            decode(Upload, data[:4] + bytes(4) + data[12:])


class TestLimits:
    def test_of_a_confirmation_is_its_length(self) -> None:
        assert limit(Confirmation) == len(encode(Confirmation(0, bytes(32), bytes(64)))) == 101

    def test_of_the_longest_set_up_is_its_length(self) -> None:
        names = [f"{i:03}".ljust(64, "x") for i in range(255)]
        roster = tuple(Member(name, bytes([i]) * 32) for i, name in enumerate(names))
        setup = Setup("r" * 64, 2**32 - 2, roster, Numbers(255, 200, 210, 100), 4096)
        assert len(encode(setup)) == limit(Setup)

    def test_of_the_longest_advertisement_is_its_length(self) -> None:
        keys = tuple(i.to_bytes(32, "big") for i in range(4096))
        longest = Advertisement(255, bytes(32), b"k" * 32, keys, bytes(64))
        assert len(encode(longest)) == limit(Advertisement)
        more = replace(longest, masks=(*keys, b"m" * 32))
        with pytest.raises(MalformedMessageError, match="4097 keys"):
            encode(more)

    def test_of_an_upload_leaves_room_for_the_longest_vector(self) -> None:
        assert 4 * MAX_WORDS < limit(Upload) < 4 * MAX_WORDS + (1 << 26)
