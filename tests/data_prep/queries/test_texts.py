"""What texts are asked: counts by hand, and that no record or person weighs more than accounted."""

import math
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.config import ConfigError, Statistics
from fedveil.data_prep import Encoded
from fedveil.data_prep.queries import Workload, answers, noisy, workload
from fedveil.data_prep.queries.texts import (
    CLASS_NAMES,
    CLASS_OF,
    CLASSES,
    CLIP,
    EDGE,
    HASHED,
    hashed,
    runs_of,
)
from fedveil.data_prep.queries.texts import workload as of_texts
from fedveil.data_prep.schema import ImageSchema, TextSchema
from fedveil.data_prep.texts import Texts, encode

SCHEMA = TextSchema(length=8)
ALL = workload(SCHEMA, Statistics(), 1e6, 1.0)


def encoded(*contents: bytes, schema: TextSchema = SCHEMA) -> Encoded:
    return encode(Texts(contents, ("",) * len(contents)), schema)


def counts(*contents: bytes, schema: TextSchema = SCHEMA) -> dict[str, np.ndarray]:
    """Answers without weights, of records that are too few to be clipped: scaled back."""
    asked = workload(schema, Statistics(), 1e6, 1.0)
    total = np.zeros(asked.length)
    for content in contents:
        one = answers(asked, encoded(content, schema=schema), schema)
        values = noisy(asked, one, 0.0, 1.0).values
        tokens = min(len(content) + 1, schema.length)
        total += one * tokens / values["bytes"].sum()
    return dict(noisy(asked, total, 0.0, 1.0).values)


class TestClasses:
    def test_are_public_and_fold_case(self) -> None:
        assert CLASS_OF.shape == (257,)
        assert (CLASS_OF[ord("a")], CLASS_OF[ord("A")], CLASS_OF[ord("z")]) == (0, 0, 25)
        assert len({CLASS_OF[ord(c)] for c in " \n0'.,;!-#a"}) == 11
        assert CLASS_OF[ord("7")] == CLASS_OF[ord("0")]
        assert CLASS_OF[EDGE] == CLASSES - 1
        assert (CLASS_OF[:EDGE] < CLASSES - 1).all()
        assert set(CLASS_OF[128:256].tolist()).isdisjoint(CLASS_OF[:128].tolist())
        assert sorted(set(CLASS_OF.tolist())) == list(range(CLASSES))

    def test_have_names_all_but_the_edge(self) -> None:
        assert len(CLASS_NAMES) == CLASSES - 1 == len(set(CLASS_NAMES))
        assert CLASS_NAMES[CLASS_OF[ord("Q")]] == "q"
        assert CLASS_NAMES[CLASS_OF[ord("\n")]] == "line end"
        assert CLASS_NAMES[CLASS_OF[ord(" ")]] == "blank"
        assert CLASS_NAMES[CLASS_OF[ord("?")]] == "! ?"
        assert CLASS_NAMES[CLASS_OF[ord("#")]] == "other below 128"

    def test_runs_of_four_spread_evenly_over_their_cells(self) -> None:
        cells = np.bincount(hashed(np.arange(CLASSES**4)), minlength=HASHED)
        assert len(cells) == HASHED
        expected = CLASSES**4 / HASHED
        assert abs(cells - expected).max() < 7 * math.sqrt(expected)

    def test_the_hash_is_what_it_is(self) -> None:
        """Sites of another version would count into other cells."""
        assert hashed(np.array([0, 1, 2, 48**4 - 1])).tolist() == [0, 10423, 774, 11693]


class TestRuns:
    def test_of_a_record_are_as_many_as_its_tokens_and_its_end(self) -> None:
        tokens = np.array([[97, 98, 256, 256], [99, 100, 101, 102]])
        found = runs_of(tokens)
        assert found.record.tolist() == [0, 0, 0, 1, 1, 1, 1]
        assert found.tokens.tolist() == [
            [256, 256, 256, 97],
            [256, 256, 97, 98],
            [256, 97, 98, 256],
            [256, 256, 256, 99],
            [256, 256, 99, 100],
            [256, 99, 100, 101],
            [99, 100, 101, 102],
        ]

    def test_nothing_follows_an_end(self) -> None:
        assert len(runs_of(np.array([[97, 256, 98, 99]])).record) == 2


class TestAnswers:
    def test_are_counts_by_hand(self) -> None:
        found = counts(b"abab", b"a")
        assert {n: found["bytes"][ord(n)] for n in "abc"} == pytest.approx({"a": 3, "b": 2, "c": 0})
        assert found["bytes"][EDGE] == pytest.approx(2)
        pairs = found["pairs"]
        assert pairs[EDGE, ord("a")] == pytest.approx(2)
        assert pairs[ord("a"), ord("b")] == pytest.approx(2)
        assert pairs[ord("b"), ord("a")] == pytest.approx(1)
        assert pairs[[ord("a"), ord("b")], EDGE] == pytest.approx([1, 1])
        assert pairs.sum() == pytest.approx(7)
        edge = CLASSES - 1
        assert found["triples"][edge, edge, 0] == pytest.approx(2)
        assert found["triples"][edge, 0, 1] == pytest.approx(1)
        assert found["triples"][0, 1, 0] == pytest.approx(1)
        assert found["triples"][1, 0, 1] == pytest.approx(1)
        run = ((0 * CLASSES + 1) * CLASSES + 0) * CLASSES + 1
        assert found["fours"][hashed(np.array([run]))[0]] == pytest.approx(1)

    def test_a_whole_record_has_no_end(self) -> None:
        found = counts(b"abcdefgh")
        assert found["pairs"][:, EDGE].sum() == 0
        assert found["bytes"].sum() == pytest.approx(8)

    def test_stand_in_the_vector_with_their_weights(self) -> None:
        one = answers(ALL, encoded(b"a"), SCHEMA)
        spans = {query.name: one[span] for query, span in ALL.spans()}
        weights = {query.name: query.weight for query in ALL.queries}
        norms = {name: np.linalg.norm(part) for name, part in spans.items()}
        assert norms["pairs"] / norms["triples"] == pytest.approx(
            weights["pairs"] / weights["triples"]
        )
        assert norms["bytes"] / norms["pairs"] == pytest.approx(weights["bytes"] / weights["pairs"])

    def test_of_no_records_are_zeros(self) -> None:
        none = Encoded(np.zeros((0, 8), np.float32), np.zeros(0, np.int64))
        assert not answers(ALL, none, SCHEMA).any()
        assert not answers(ALL, none, SCHEMA, np.zeros(0, np.int64)).any()

    def test_add_up_over_sites(self) -> None:
        both = answers(ALL, encoded(b"one", b"two"), SCHEMA)
        apart = [answers(ALL, encoded(one), SCHEMA) for one in (b"one", b"two")]
        assert both == pytest.approx(sum(apart), abs=1e-12)

    def test_another_modality_is_refused(self) -> None:
        with pytest.raises(TypeError, match="no text"):
            of_texts(ImageSchema(height=8, width=8), Statistics(), 1, 1.0)


# Few letters, so that runs repeat: the more they do, the more a record weighs.
RECORD = st.one_of(st.binary(max_size=8), st.text("ab", max_size=8).map(str.encode))


class TestSensitivity:
    """One record, or person, more or less: searched for one that weighs more than is accounted."""

    @given(st.lists(RECORD, max_size=5), RECORD, st.integers(0, 3))
    def test_no_record_weighs_more(self, others: list[bytes], one: bytes, tier: int) -> None:
        asked = workload(SCHEMA, Statistics(), [1, 300, 900, 1e6][tier], 1.0)
        more = answers(asked, encoded(*others, one), SCHEMA)
        less = answers(asked, encoded(*others), SCHEMA)
        assert np.linalg.norm(more - less) <= asked.sensitivity

    @pytest.mark.parametrize("length", [4, 64, 4096])
    @pytest.mark.parametrize("content", [b"a", b"ab", b"abc", b"\x00\xff", bytes(range(256))])
    def test_not_even_one_that_repeats_itself(self, content: bytes, length: int) -> None:
        schema = TextSchema(length=length)
        asked = workload(schema, Statistics(), 1e6, 1.0)
        one = answers(asked, encoded((content * length)[:length], schema=schema), schema)
        assert np.linalg.norm(one) == pytest.approx(asked.norm)
        # Unclipped, "aaaa" would weigh some length / (CLIP * sqrt(length)) times as much.
        assert asked.norm == pytest.approx(
            CLIP * math.sqrt(length) * np.linalg.norm([q.weight for q in asked.queries])
        )

    @given(st.lists(st.tuples(RECORD, st.integers(0, 2)), max_size=7), st.integers(0, 2))
    def test_no_person_weighs_more(self, owned: list[tuple[bytes, int]], gone: int) -> None:
        whose = np.array([person for _, person in owned], dtype=np.int64)
        rest = [(content, person) for content, person in owned if person != gone]
        less = np.array([person for _, person in rest], dtype=np.int64)
        change = answers(ALL, encoded(*(c for c, _ in owned)), SCHEMA, whose) - answers(
            ALL, encoded(*(c for c, _ in rest)), SCHEMA, less
        )
        assert np.linalg.norm(change) <= ALL.sensitivity

    def test_records_of_a_person_are_clipped_together(self) -> None:
        records = encoded(*[b"abcdefgh"] * 9)
        alone = answers(ALL, records, SCHEMA)
        together = answers(ALL, records, SCHEMA, np.zeros(9, np.int64))
        assert np.linalg.norm(alone) == pytest.approx(9 * ALL.norm)
        assert np.linalg.norm(together) == pytest.approx(ALL.norm)

    def test_hostile_numbers_weigh_no_more(self) -> None:
        """A record that went through other code: nothing but its tokens counts."""
        x = np.array([[7.0, -3.0, 0.5, 1.0, 1e30, 0, 0, 0]], dtype=np.float32)
        found = answers(ALL, Encoded(x, np.zeros(1, np.int64)), SCHEMA)
        assert np.linalg.norm(found) <= ALL.sensitivity


def names(asked: Workload) -> list[str]:
    return [query.name for query in asked.queries]


class TestWorkload:
    def test_longer_runs_are_asked_where_signal_allows(self) -> None:
        schema = TextSchema(length=64)  # signal: units * 8 / noise
        assert names(workload(schema, Statistics(), 15_000, 3.73))[-1] == "fours"
        assert names(workload(schema, Statistics(), 1_500, 3.73))[-1] == "triples"
        assert names(workload(schema, Statistics(), 400, 3.73)) == ["bytes", "pairs"]
        assert names(workload(schema, Statistics(), 500, 0.1))[-1] == "fours"
        assert names(workload(schema, Statistics(), 1, 0.0))[-1] == "fours"

    def test_all_of_it_fits_by_default(self) -> None:
        assert ALL.length == 257 + 257**2 + 48**3 + 2**14 == 193_282
        assert ALL.length <= Statistics().max_cells

    @pytest.mark.parametrize(
        ("most", "last"), [(193_281, "triples"), (176_897, "pairs"), (66_306, "pairs")]
    )
    def test_the_longest_runs_go_where_cells_are_few(self, most: int, last: str) -> None:
        found = workload(SCHEMA, Statistics(max_cells=most), 1e6, 1.0)
        assert names(found)[-1] == last
        assert found.length <= most

    def test_too_few_cells_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"max_cells = 66305: must be at least 66306"):
            workload(SCHEMA, Statistics(max_cells=66_305), 1e6, 1.0)

    def test_is_the_same_for_all_that_have_the_same_numbers(self) -> None:
        again = workload(TextSchema(length=8), Statistics(), 1e6, 1.0)
        assert again == ALL


def test_what_is_no_number_ends_its_record_and_leaves_the_others_as_they_are() -> None:
    x = np.full((2, 8), np.nan, dtype=np.float32)
    x[0, :3] = encoded(b"abc").x[0, :3]
    x[1, :2] = [np.inf, -np.inf]
    found = answers(ALL, Encoded(x, np.zeros(2, dtype=np.int64)), SCHEMA)
    assert found == pytest.approx(answers(ALL, encoded(b"abc", b""), SCHEMA))


def test_blocks_of_records_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    records, whose = encoded(b"one", b"two", b"three", b"four"), np.array([1, 0, 1, 2])
    whole = [answers(ALL, records, SCHEMA), answers(ALL, records, SCHEMA, whose)]
    monkeypatch.setattr(import_module("fedveil.data_prep.queries.workload"), "_ENTRIES", 1)
    assert answers(ALL, records, SCHEMA) == pytest.approx(whole[0])
    assert answers(ALL, records, SCHEMA, whose) == pytest.approx(whole[1])
