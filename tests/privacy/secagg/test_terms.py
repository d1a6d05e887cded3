"""What a session is about: which numbers are safe, by enumeration, and what a context binds."""

import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.config import least_threshold
from fedveil.privacy.secagg.encoding import MAX_WORDS
from fedveil.privacy.secagg.errors import (
    LoweredThresholdError,
    TooFewSitesError,
    TooManyColludersError,
    UnsafeNumbersError,
)
from fedveil.privacy.secagg.messages import Advertisement, Roster
from fedveil.privacy.secagg.quantise import saturation
from fedveil.privacy.secagg.terms import (
    MAX_ROUNDS,
    MAX_SITES,
    Block,
    Member,
    Numbers,
    Opening,
    Setup,
    check_members,
)


def is_split(n: int, t: int, t_collude: int) -> bool:
    """Whether two sets of uploaders can each get t signatures, colluders signing both.

    By enumeration: so many honest sites sign the one set, so many of the others the other.
    """
    honest = n - t_collude
    return any(
        first + t_collude >= t and second + t_collude >= t
        for first in range(honest + 1)
        for second in range(honest - first + 1)
    )


def has_two_honest(n_min: int, t_collude: int) -> bool:
    """Whether two honest sites are in each sum of n_min, by who may collude."""
    return all(
        sum(site >= colluders for site in range(n_min)) >= 2 for colluders in range(t_collude + 1)
    )


class TestWhichNumbersAreSafe:
    @pytest.mark.parametrize("n", range(2, 13))
    def test_is_what_enumeration_says(self, n: int) -> None:
        accepted = 0
        for t in range(n + 2):
            for n_min in range(n + 2):
                for t_collude in range(n + 1):
                    safe = (
                        t <= n_min <= n
                        and has_two_honest(n_min, t_collude)
                        and not is_split(n, t, t_collude)
                    )
                    try:
                        Numbers(n, t, n_min, t_collude)
                    except UnsafeNumbersError:
                        assert not safe, (n, t, n_min, t_collude)
                    else:
                        assert safe, (n, t, n_min, t_collude)
                        accepted += 1
        assert accepted > 0

    @pytest.mark.parametrize("n", range(2, 13))
    def test_the_least_threshold_is_the_least_that_cannot_be_split(self, n: int) -> None:
        for t_collude in range(n):
            least = least_threshold(n, t_collude)
            assert not is_split(n, least, t_collude)
            assert is_split(n, least - 1, t_collude)

    @pytest.mark.parametrize("n", range(2, 13))
    def test_the_two_forms_of_the_rule_are_one(self, n: int) -> None:
        """t >= floor((n + t_collude) / 2) + 1 where t_collude <= 2t - n - 1, and nowhere else."""
        for t in range(n + 1):
            for t_collude in range(n):
                assert (t >= least_threshold(n, t_collude)) == (t_collude <= 2 * t - n - 1)

    @pytest.mark.parametrize("t_collude", range(4))
    def test_seven_of_ten_are_safe_against_three(self, t_collude: int) -> None:
        assert Numbers(10, 7, 7, t_collude).t == 7

    def test_seven_of_ten_are_not_safe_against_four_or_six(self) -> None:
        with pytest.raises(
            LoweredThresholdError, match=r"^t = 7: expected at least 8, .* n = 10 and t_collude = 4"
        ):
            Numbers(10, 7, 7, 4)
        with pytest.raises(LoweredThresholdError, match=r"^t = 7: expected at least 9"):
            Numbers(10, 7, 10, 6)
        with pytest.raises(TooManyColludersError, match=r"^t_collude = 6: expected at most 5"):
            Numbers(10, 7, 7, 6)

    def test_three_sites_with_a_colluder_need_all_three(self) -> None:
        found = []
        for t in range(4):
            for n_min in range(4):
                try:
                    found.append(Numbers(3, t, n_min, 1))
                except UnsafeNumbersError:
                    continue
        assert found == [Numbers(3, 3, 3, 1)]

    @pytest.mark.parametrize("numbers", [(3, 2, 3, 1), (10, 5, 10, 0), (4, 2, 4, 0), (10, 0, 9, 1)])
    def test_a_lowered_threshold_is_named_so(self, numbers: tuple[int, int, int, int]) -> None:
        with pytest.raises(LoweredThresholdError, match="raise t or lower t_collude"):
            Numbers(*numbers)

    @pytest.mark.parametrize("numbers", [(3, 3, 2, 1), (10, 9, 9, 8), (2, 2, 2, 1), (10, 10, 1, 0)])
    def test_too_many_colluders_are_named_so(self, numbers: tuple[int, int, int, int]) -> None:
        with pytest.raises(TooManyColludersError, match="raise n_min"):
            Numbers(*numbers)

    @pytest.mark.parametrize("numbers", [(10, 8, 7, 1), (10, 8, 11, 1), (10, 11, 10, 0)])
    def test_an_n_min_out_of_range_is_named_so(self, numbers: tuple[int, int, int, int]) -> None:
        with pytest.raises(UnsafeNumbersError, match="from t to n") as error:
            Numbers(*numbers)
        assert type(error.value) is UnsafeNumbersError

    @pytest.mark.parametrize("n", [0, 1, MAX_SITES + 1])
    def test_a_number_of_sites_out_of_range_is_named_so(self, n: int) -> None:
        with pytest.raises(UnsafeNumbersError, match=f"n = {n}: expected 2 to 255 sites"):
            Numbers(n, n, n, 0)


class TestNoiseShares:
    def test_of_nine_uploaders_with_a_colluder_are_an_eighth_of_the_variance(self) -> None:
        share = Numbers(10, 7, 9, 1).noise_share(4.0)
        assert share == pytest.approx(4 / math.sqrt(8), rel=1e-15)

    @pytest.mark.parametrize(
        ("n_min", "t_collude", "excess"), [(9, 1, 1.118), (7, 3, 1.58), (8, 2, 1.291)]
    )
    def test_of_ten_uploaders_exceed_central_noise_by_this_factor(
        self, n_min: int, t_collude: int, excess: float
    ) -> None:
        numbers = Numbers(10, 7, n_min, t_collude)
        assert numbers.excess(10) == pytest.approx(excess, abs=0.002)
        assert numbers.excess(10) == pytest.approx(math.sqrt(10 * numbers.noise_share(1.0) ** 2))

    @given(st.data())
    def test_of_the_honest_of_the_least_uploaders_are_the_whole_noise(
        self, data: st.DataObject
    ) -> None:
        n = data.draw(st.integers(3, 100))
        t_collude = data.draw(st.integers(1, n - 2))
        t = data.draw(st.integers(least_threshold(n, t_collude), n))
        n_min = data.draw(st.integers(max(t, t_collude + 2), n))
        sigma = data.draw(st.floats(1e-3, 1e9))
        share = Numbers(n, t, n_min, t_collude).noise_share(sigma)
        assert (n_min - t_collude) * share**2 == pytest.approx(sigma**2, rel=1e-12)

    def test_are_refused_where_no_one_colludes(self) -> None:
        """For each site knows its own share, and could take it off."""
        with pytest.raises(UnsafeNumbersError, match="expects t_collude >= 1"):
            Numbers(10, 7, 9, 0).noise_share(1.0)


MEMBERS = tuple(Member(f"site-{i}", bytes([i]) * 32) for i in range(5))
SETUP = Setup("run-1", 3, MEMBERS, Numbers(5, 4, 4, 1), 8)
BLOCKS = (Block("gradient", 10, 1.0, 65536.0, 12.5, 0.1), Block("counts", 2, 1.0, 1.0, 0.0, 1.0))
OPENING = Opening(b"r" * 32, (0, 1, 2, 3), 7, b"m" * 32, BLOCKS)


class TestSetup:
    def test_a_roster_of_another_length_than_n_is_refused(self) -> None:
        with pytest.raises(UnsafeNumbersError, match="has 4 sites, expected n = 5"):
            replace(SETUP, roster=MEMBERS[:4])

    def test_two_names_of_one_identity_are_refused(self) -> None:
        """One holder would be two sites, and hold two shares of everything."""
        double = (*MEMBERS[:4], Member("site-4", MEMBERS[0].identity))
        with pytest.raises(UnsafeNumbersError, match="two names have one identity"):
            replace(SETUP, roster=double)

    @pytest.mark.parametrize("rounds", [0, MAX_ROUNDS + 1])
    def test_rounds_out_of_range_are_refused(self, rounds: int) -> None:
        with pytest.raises(UnsafeNumbersError, match=f"rounds = {rounds}: expected 1 to 4096"):
            replace(SETUP, rounds=rounds)

    @pytest.mark.parametrize("rounds", [1, MAX_ROUNDS])
    def test_rounds_up_to_the_last_are_taken(self, rounds: int) -> None:
        assert replace(SETUP, rounds=rounds).rounds == rounds

    def test_names_a_site_by_its_place(self) -> None:
        assert [SETUP.name(0), SETUP.name(4), SETUP.name(5)] == ["site-0", "site-4", "no. 5"]

    def test_members_must_be_n_min(self) -> None:
        check_members(SETUP, (0, 1, 2, 4), "members")
        with pytest.raises(TooFewSitesError, match=r"members: 3 sites, .* n_min = 4"):
            check_members(SETUP, (0, 1, 2), "members")


class TestBlock:
    @pytest.mark.parametrize(
        ("field", "bad"),
        [
            ("length", 0),
            ("length", MAX_WORDS + 1),
            ("sensitivity", 0.0),
            ("sensitivity", -1.0),
            ("sensitivity", math.nan),
            ("scale", 0.0),
            ("scale", -1.0),
            ("scale", math.nan),
            ("sigma", -1e-9),
            ("sigma", math.nan),
            ("sampling_rate", 0.0),
            ("sampling_rate", 1.0000001),
            ("sampling_rate", math.nan),
        ],
    )
    def test_a_value_out_of_its_range_is_refused(self, field: str, bad: float) -> None:
        with pytest.raises(UnsafeNumbersError, match=rf"block gradient\.{field} = "):
            replace(BLOCKS[0], **{field: bad})  # type: ignore[arg-type]

    def test_the_ends_of_the_ranges_are_taken(self) -> None:
        block = Block("b", MAX_WORDS, 5e-324, 5e-324, 0.0, 1.0)
        assert replace(block, length=1).length == 1

    def test_saturates_by_the_sites_and_its_own_sigma(self) -> None:
        assert BLOCKS[0].saturation(SETUP.numbers) == saturation(5, 12.5) == 429496729 - 150

    def test_of_noise_that_fills_the_words_is_refused_when_it_saturates(self) -> None:
        with pytest.raises(UnsafeNumbersError, match="no room in 32 bits"):
            replace(BLOCKS[0], sigma=2.0**30).saturation(SETUP.numbers)


class TestOpening:
    def test_two_blocks_of_one_name_are_refused(self) -> None:
        with pytest.raises(UnsafeNumbersError, match="blocks: two have one name"):
            replace(OPENING, blocks=(BLOCKS[0], replace(BLOCKS[1], name="gradient")))

    def test_more_coordinates_than_a_vector_has_are_refused(self) -> None:
        half = replace(BLOCKS[0], length=MAX_WORDS // 2)
        rest = replace(BLOCKS[1], length=MAX_WORDS - MAX_WORDS // 2)
        assert replace(OPENING, blocks=(half, rest)).length == MAX_WORDS
        with pytest.raises(UnsafeNumbersError, match=f"{MAX_WORDS + 1} coordinates in all"):
            replace(OPENING, blocks=(half, replace(rest, length=rest.length + 1)))

    def test_is_as_long_as_its_blocks(self) -> None:
        assert OPENING.length == 12


# One other value for each field; a field without one fails the tests below.
NUMBERS = (
    Numbers(6, 4, 4, 1),  # n alone: 4 >= (6 + 1) // 2 + 1
    Numbers(5, 5, 5, 1),
    Numbers(5, 4, 5, 1),
    Numbers(5, 4, 4, 0),
)
OTHER_SETUPS: dict[str, object] = {
    "run": "run-2",
    "epoch": 4,
    "roster": (*MEMBERS[:4], Member("site-5", MEMBERS[4].identity)),
    "numbers": NUMBERS[1],
    "rounds": 9,
}
OTHER_OPENINGS: dict[str, object] = {
    "roster": b"s" * 32,
    "members": (0, 1, 2, 4),
    "round": 8,
    "model": b"n" * 32,
    "blocks": BLOCKS[:1],
}
OTHER_BLOCKS: dict[str, object] = {
    "name": "gradients",
    "length": 11,
    "sensitivity": math.nextafter(1.0, 2),
    "scale": math.nextafter(65536.0, 0),
    "sigma": math.nextafter(12.5, 13),
    "sampling_rate": math.nextafter(0.1, 1),
}


def of_numbers(numbers: Numbers) -> bytes:
    """The context's part of a set-up with these numbers, and a roster to match."""
    members = tuple(Member(f"site-{i}", bytes([i]) * 32) for i in range(numbers.n))
    return Setup("run-1", 3, members, numbers, 8).digest


def openings() -> st.SearchStrategy[Opening]:
    """Openings from few values, so that two of them are often next to each other."""
    hashes = st.sampled_from([b"a" * 32, b"b" * 32])
    reals = st.sampled_from([0.5, 1.0])
    first, second = (
        st.builds(Block, st.just(name), st.integers(1, 2), reals, reals, reals, reals)
        for name in ("a", "b")
    )
    blocks = st.tuples(first) | st.tuples(first, second) | st.tuples(second)
    members = st.sampled_from([(), (0,), (0, 1)])
    return st.builds(Opening, hashes, members, st.integers(0, 1), hashes, blocks)


def setups() -> st.SearchStrategy[Setup]:
    """Set-ups from few values, too."""
    members = st.sampled_from([MEMBERS[:3], MEMBERS[1:4], MEMBERS[2:5]])
    numbers = st.sampled_from([Numbers(3, 2, 2, 0), Numbers(3, 2, 3, 0), Numbers(3, 3, 3, 1)])
    names = st.sampled_from(["a", "b"])
    return st.builds(Setup, names, st.integers(0, 1), members, numbers, st.integers(1, 2))


class TestContext:
    def test_the_set_up_s_moves_with_each_of_its_fields(self) -> None:
        assert set(OTHER_SETUPS) == {field.name for field in fields(Setup)}
        others = [replace(SETUP, **{name: value}) for name, value in OTHER_SETUPS.items()]  # type: ignore[arg-type]
        found = {SETUP.digest, *(other.digest for other in others)}
        assert len(found) == 1 + len(others)

    def test_the_set_up_s_moves_with_each_of_its_numbers(self) -> None:
        found = {of_numbers(numbers) for numbers in (SETUP.numbers, *NUMBERS)}
        assert len(found) == 1 + len(fields(Numbers)) == 5

    def test_the_set_up_s_moves_with_each_name_and_identity(self) -> None:
        found = {SETUP.digest}
        for place, member in enumerate(MEMBERS):
            for changed in (
                replace(member, name=f"site-{place}x"),
                replace(member, identity=bytes([99]) * 32),
            ):
                roster = (*MEMBERS[:place], changed, *MEMBERS[place + 1 :])
                found.add(replace(SETUP, roster=roster).digest)
        swapped = (
            replace(MEMBERS[0], identity=MEMBERS[1].identity),
            replace(MEMBERS[1], identity=MEMBERS[0].identity),
            *MEMBERS[2:],
        )
        found.add(replace(SETUP, roster=swapped).digest)
        assert len(found) == 1 + 2 * len(MEMBERS) + 1

    def test_a_round_s_moves_with_each_field_of_its_opening(self) -> None:
        assert set(OTHER_OPENINGS) == {field.name for field in fields(Opening)}
        others = [replace(OPENING, **{name: value}) for name, value in OTHER_OPENINGS.items()]  # type: ignore[arg-type]
        found = {OPENING.context, *(other.context for other in others)}
        assert len(found) == 1 + len(others)

    @pytest.mark.parametrize("place", [0, 1])
    def test_a_round_s_moves_with_each_field_of_each_block(self, place: int) -> None:
        assert set(OTHER_BLOCKS) == {field.name for field in fields(Block)}
        found = {OPENING.context}
        for name, value in OTHER_BLOCKS.items():
            blocks = list(BLOCKS)
            blocks[place] = replace(blocks[place], **{name: value})  # type: ignore[arg-type]
            found.add(replace(OPENING, blocks=tuple(blocks)).context)
        assert len(found) == 1 + len(OTHER_BLOCKS)

    def test_a_round_s_moves_with_the_order_of_its_blocks(self) -> None:
        assert replace(OPENING, blocks=BLOCKS[::-1]).context != OPENING.context

    def test_the_roster_s_moves_with_the_set_up_and_each_key(self) -> None:
        """It is what an opening names: so a round's context has all of the set-up in it."""
        keys = (b"0" * 32, b"1" * 32)
        first = Advertisement(0, SETUP.digest, b"k" * 32, keys, bytes(64))
        second = Advertisement(1, SETUP.digest, b"l" * 32, keys, bytes(64))
        found = [Roster((first, second)).digest]
        found += [
            Roster((replace(first, **changed), second)).digest
            for changed in (
                {"site": 2},
                {"setup": b"s" * 32},
                {"channel": b"m" * 32},
                {"masks": keys[::-1]},
                {"masks": keys[:1]},
            )
        ]
        found += [Roster((first,)).digest]
        assert len(set(found)) == len(found) == 7

    @given(st.data())
    def test_two_openings_share_one_only_if_they_are_equal(self, data: st.DataObject) -> None:
        one, other = data.draw(openings()), data.draw(openings())
        assert (one.context == other.context) == (one == other)

    @given(st.data())
    def test_two_set_ups_share_one_only_if_they_are_equal(self, data: st.DataObject) -> None:
        one, other = data.draw(setups()), data.draw(setups())
        assert (one.digest == other.digest) == (one == other)


@pytest.mark.parametrize("values", [(4, 3, 3, True), (4.0, 3, 3, 1), (4, 3, 3, -1), ("4", 3, 3, 1)])
def test_numbers_are_whole(values: tuple[int, int, int, int]) -> None:
    with pytest.raises(UnsafeNumbersError, match="expected a whole number >= 0"):
        Numbers(*values)
