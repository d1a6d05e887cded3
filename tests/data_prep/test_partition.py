"""Who holds which record: a split that a key decides, and a sharing-out that splits no person."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.config import ConfigError, Data
from fedveil.data_prep.partition import Sides, keyed_split, persons, places, share_out

KEY = bytes(range(16))
OTHER_KEY = bytes(range(1, 17))


def sides_of(sides: Sides, count: int) -> list[str]:
    """Each record's side by name; fails where a record has none or two."""
    found = [""] * count
    for name in ("training", "holdout", "audit"):
        for row in getattr(sides, name):
            assert found[row] == ""
            found[row] = name
    assert "" not in found
    return found


# Whose record it is.


def test_equal_keys_are_one_person_and_others_are_not() -> None:
    found = persons([b"ann", b"bob", b"ann", b"", b"Ann", b"bob"])
    assert found.tolist() == [0, 1, 0, 2, 3, 1]
    assert persons([]).tolist() == []
    assert found.dtype == persons([]).dtype == np.int64


@given(st.lists(st.binary(max_size=3), max_size=30))
def test_two_persons_are_never_one_whatever_bytes_end_their_keys(keys: list[bytes]) -> None:
    found = persons([*keys, b"a", b"a\0"]).tolist()
    assert len(set(found)) == len({*keys, b"a", b"a\0"})
    assert found[: len(keys)] == [found[keys.index(key)] for key in keys]
    assert set(found) == set(range(len(set(found))))


# The keyed split.

identity_lists = st.lists(st.binary(max_size=8), max_size=30)
keys = st.binary(min_size=16, max_size=40)
shares = st.tuples(st.floats(0, 0.6), st.floats(0, 0.39))


@given(identity_lists, keys, shares)
def test_the_sides_are_disjoint_complete_and_ascending(
    identities: list[bytes], key: bytes, share: tuple[float, float]
) -> None:
    sides = keyed_split(identities, key, *share)
    sides_of(sides, len(identities))
    for rows in (sides.training, sides.holdout, sides.audit):
        assert rows.tolist() == sorted(rows.tolist())


@given(identity_lists, identity_lists, st.binary(max_size=8), keys, shares)
def test_a_record_s_side_is_its_own_affair(
    before: list[bytes], after: list[bytes], one: bytes, key: bytes, share: tuple[float, float]
) -> None:
    alone = sides_of(keyed_split([one], key, *share), 1)[0]
    among = [*before, one, *after]
    assert sides_of(keyed_split(among, key, *share), len(among))[len(before)] == alone


@given(identity_lists, keys, shares)
def test_equal_identities_share_a_side(
    identities: list[bytes], key: bytes, share: tuple[float, float]
) -> None:
    twice = identities * 2
    found = sides_of(keyed_split(twice, key, *share), len(twice))
    assert found[: len(identities)] == found[len(identities) :]


@given(identity_lists, keys)
def test_raising_the_audit_share_moves_nobody_out_of_the_holdout(
    identities: list[bytes], key: bytes
) -> None:
    before = keyed_split(identities, key, 0.2, 0.0)
    after = keyed_split(identities, key, 0.2, 0.3)
    assert before.holdout.tolist() == after.holdout.tolist()
    assert set(after.training.tolist()) <= set(before.training.tolist())


def test_nothing_is_held_out_when_nothing_is_asked_for() -> None:
    sides = keyed_split([bytes([i]) for i in range(100)], KEY, 0.0, 0.0)
    assert sides.training.tolist() == list(range(100))


def test_the_split_is_the_keyed_hash_by_hand() -> None:
    """HMAC-SHA256's first eight bytes over 2^64, as RFC 4231's first case publishes them."""
    key, identity = b"\x0b" * 20, b"Hi There"
    place = 0xB0344C61D8DB3853 / 2**64  # 0.68829...
    for share, side in ((place - 1e-6, "training"), (place + 1e-6, "holdout")):
        assert sides_of(keyed_split([identity], key, share, 0.0), 1) == [side]
    assert sides_of(keyed_split([identity], key, 0.6, 0.2), 1) == ["audit"]


def test_another_key_gives_another_split() -> None:
    """Half held out, 2,000 records: two independent splits agree on half, give or take 123.

    A fair coin's 2,000 throws leave [877, 1123] with chance below 5e-8 (5.5 standard deviations).
    """
    identities = [f"record {i}".encode() for i in range(2000)]
    one = sides_of(keyed_split(identities, KEY, 0.5, 0.0), 2000)
    other = sides_of(keyed_split(identities, OTHER_KEY, 0.5, 0.0), 2000)
    same = sum(a == b for a, b in zip(one, other, strict=True))
    assert 877 <= same <= 1123


def test_the_sides_have_their_shares() -> None:
    """20,000 records; each count is within 5.5 standard deviations of its binomial's mean.

    For one count the chance of more is below 5e-8, for the three below 2e-7; the key is fixed.
    """
    count = 20_000
    sides = keyed_split([f"record {i}".encode() for i in range(count)], KEY, 0.1, 0.05)
    for rows, share in ((sides.training, 0.85), (sides.holdout, 0.1), (sides.audit, 0.05)):
        room = 5.5 * math.sqrt(count * share * (1 - share))
        assert abs(len(rows) - count * share) < room


@pytest.mark.parametrize("length", [0, 1, 15])
def test_a_short_key_is_refused(length: int) -> None:
    with pytest.raises(ConfigError) as caught:
        keyed_split([b"x"], b"k" * length, 0.1, 0.0)
    assert str(caught.value) == f"split key = {length} bytes: must be at least 16 secret bytes"


# Sharing out.


def shared(
    partition: str,
    sites: int,
    count: int,
    seed: int = 0,
    alpha: float = 0.5,
    **given_values: Any,  # noqa: ANN401
) -> list[list[int]]:
    options = {"column": "x"} if partition == "column" else {}
    data = Data.model_validate(
        {"source": "x.csv", "partition": partition, "alpha": alpha, **options}
    )
    rng = np.random.default_rng(seed)
    return [rows.tolist() for rows in share_out(data, sites, count, rng, **given_values)]


def check(parts: list[list[int]], sites: int, count: int) -> None:
    """Every record at one site, every site with a record, rows ascending."""
    assert len(parts) == sites
    assert all(parts)
    assert sorted(row for rows in parts for row in rows) == list(range(count))
    assert all(rows == sorted(rows) for rows in parts)


@st.composite
def federations(draw: st.DrawFn) -> tuple[str, int, int, dict[str, Any]]:
    """A partition, sites, a count and values that can be shared out."""
    count = draw(st.integers(1, 40))
    some = st.lists(st.sampled_from("abcdefgh"), min_size=count, max_size=count)
    values: dict[str, Any] = {"labels": draw(some), "column": draw(some)}
    if draw(st.booleans()):
        values["persons"] = draw(some)
    persons = values.get("persons", [str(row) for row in range(count)])
    partition = draw(st.sampled_from(["iid", "dirichlet", "column"]))
    first = {person: row for row, person in reversed(list(enumerate(persons)))}
    most = len(first)
    if partition == "column":
        most = len({values["column"][row] for row in first.values()})
    return partition, draw(st.integers(1, most)), count, values


@given(federations(), st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 0.1, 0.5, 10.0, 1e6]))
def test_every_record_is_at_one_site_and_every_site_has_one(
    made: tuple[str, int, int, dict[str, Any]], seed: int, alpha: float
) -> None:
    partition, sites, count, values = made
    check(shared(partition, sites, count, seed, alpha, **values), sites, count)


@given(federations(), st.integers(0, 2**32 - 1))
def test_one_person_is_never_at_two_sites(
    made: tuple[str, int, int, dict[str, Any]], seed: int
) -> None:
    partition, sites, count, values = made
    persons = values.get("persons", [])
    parts = shared(partition, sites, count, seed, **values)
    homes = Counter(
        person for rows in parts for person in {persons[row] for row in rows if persons}
    )
    assert all(times == 1 for times in homes.values())


@given(federations(), st.integers(0, 2**32 - 1))
def test_the_same_seed_gives_the_same_sites(
    made: tuple[str, int, int, dict[str, Any]], seed: int
) -> None:
    partition, sites, count, values = made
    once = shared(partition, sites, count, seed, **values)
    assert shared(partition, sites, count, seed, **values) == once


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_another_seed_gives_other_sites(partition: str) -> None:
    labels = ["a", "b"] * 50
    assert shared(partition, 4, 100, 1, labels=labels) != shared(
        partition, 4, 100, 2, labels=labels
    )


def test_iid_sites_are_of_one_size() -> None:
    parts = shared("iid", 3, 11)
    check(parts, 3, 11)
    assert sorted(map(len, parts)) == [3, 4, 4]


def test_a_value_of_the_column_is_at_one_site() -> None:
    column = ["x"] * 5 + ["y"] * 4 + ["z"] * 3 + ["w"] * 2
    # The commonest first, each to the emptiest: x | y | then z to y's (4 < 5), w to x's (5 < 7).
    assert shared("column", 2, 14, column=column) == [
        [0, 1, 2, 3, 4, 12, 13],
        [5, 6, 7, 8, 9, 10, 11],
    ]


def test_a_person_goes_where_their_first_record_s_value_goes() -> None:
    persons = ["p", "q", "p", "r"]
    column = ["x", "y", "y", "y"]
    parts = shared("column", 2, 4, persons=persons, column=column)
    assert sorted(parts) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "column"])
def test_more_sites_than_records_are_refused(partition: str) -> None:
    values = ["a", "b"]
    with pytest.raises(ConfigError) as caught:
        shared(partition, 3, 2, labels=values, column=values)
    assert str(caught.value) == "federation.sites = 3: more sites than records (2); use fewer"


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "column"])
def test_more_sites_than_persons_are_refused(partition: str) -> None:
    values = ["a", "b", "c", "d"]
    with pytest.raises(ConfigError) as caught:
        shared(partition, 3, 4, persons=["p", "p", "q", "q"], labels=values, column=values)
    assert str(caught.value) == "federation.sites = 3: more sites than persons (2); use fewer"


def test_more_sites_than_values_of_the_column_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        shared("column", 3, 6, column=["x", "y"] * 3)
    assert str(caught.value) == (
        "federation.sites = 3: more sites than values of data.column (2); use fewer"
    )


def test_dirichlet_needs_labels() -> None:
    with pytest.raises(ConfigError, match=r'^data\.partition = "dirichlet": needs records with a'):
        shared("dirichlet", 2, 4)


def skew(alpha: float, seed: int) -> float:
    """Mean total variation distance between a site's mix of classes and everybody's."""
    labels = [str(row % 10) for row in range(2000)]
    parts = shared("dirichlet", 10, 2000, seed, alpha, labels=labels)
    check(parts, 10, 2000)
    distances = []
    for rows in parts:
        mix = np.bincount([int(labels[row]) for row in rows], minlength=10) / len(rows)
        distances.append(np.abs(mix - 0.1).sum() / 2)
    return float(np.mean(distances))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_small_alpha_is_more_skewed(seed: int) -> None:
    assert skew(0.05, seed) > skew(0.5, seed) > skew(5.0, seed) > skew(500.0, seed)
    assert skew(0.05, seed) > 0.6
    assert skew(500.0, seed) < 0.1


class TestPlaces:
    KEY = b"k" * 32

    @given(st.lists(st.binary(max_size=3), max_size=30), st.data())
    def test_hang_on_the_record_alone(self, records: list[bytes], data: st.DataObject) -> None:
        """Without one record the others keep theirs; of equal ones the last number is gone."""
        found = places(records, self.KEY)
        assert found.dtype == np.int64
        assert ((found >= 0) & (found < 2**62)).all()
        if not records:
            return
        out = data.draw(st.integers(0, len(records) - 1))
        rest = places(records[:out] + records[out + 1 :], self.KEY)
        left = Counter(found.tolist()) - Counter(rest.tolist())
        last = max(i for i, record in enumerate(records) if record == records[out])
        assert left == Counter([found[last]])

    def test_another_key_gives_others(self) -> None:
        records = [bytes([n]) for n in range(50)]
        assert not set(places(records, self.KEY)) & set(places(records, b"x" * 32))
