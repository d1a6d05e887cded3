"""The vector of all queries: what a unit adds to it, and how it is read back."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from fedveil.data_prep.queries.workload import (
    SLACK,
    Query,
    Workload,
    clipped_sum,
    noisy,
    rows_at_a_time,
)

numbers = st.floats(width=64)
rows = hnp.arrays(np.float64, st.tuples(st.integers(1, 8), st.just(5)), elements=numbers)


def test_66_equal_queries_have_a_sensitivity_of_sqrt_66() -> None:
    asked = Workload(tuple(Query(f"q{i}", (2, 3)) for i in range(66)))
    assert asked.norm == pytest.approx(8.12, abs=0.005)
    assert asked.sensitivity == pytest.approx(math.sqrt(66) * SLACK)
    assert asked.length == 66 * 6


def test_weights_and_norms_multiply() -> None:
    asked = Workload((Query("a", (4,), norm=2.0, weight=0.5), Query("b", (), norm=1.0, weight=2.0)))
    assert asked.norm == pytest.approx(math.sqrt(1 + 4))


def test_a_released_vector_is_read_back_without_weights() -> None:
    asked = Workload((Query("a", (2, 2), weight=0.5), Query("b", (1,), weight=4.0)))
    found = noisy(asked, np.array([1.0, 2.0, 3.0, 4.0, 8.0]), scale=2.0, units=10)
    assert found.values["a"].tolist() == [[2, 4], [6, 8]]
    assert found.values["b"].tolist() == [2]
    assert found.noise == {"a": 4.0, "b": 0.5}
    with pytest.raises(ValueError, match="must be 5 coordinates"):
        noisy(asked, np.zeros(4), 1.0, 10)


class TestClippedSum:
    def test_by_hand(self) -> None:
        """Norms 5 and 1 under a bound of 2: the first is scaled by 2/5."""
        found = clipped_sum(sparse.csr_array([[3.0, 4.0], [0.0, 1.0]]), 2.0)
        assert found.tolist() == pytest.approx([1.2, 2.6])

    def test_a_person_is_clipped_as_a_whole(self) -> None:
        """Four records of norm 1 of one person: not 4, and not 4 times 1, but the bound."""
        ones = sparse.csr_array(np.ones((5, 1)))
        assert clipped_sum(ones, 1.0).tolist() == [5.0]
        assert clipped_sum(ones, 1.0, np.array([7, 7, 7, 7, 9])).tolist() == [2.0]

    def test_what_is_no_number_counts_for_nothing(self) -> None:
        found = clipped_sum(sparse.csr_array([[np.nan, 1.0], [np.inf, 0.0], [1.0, 0.0]]), 1.0)
        assert found.tolist() == [1.0, 0.0]

    def test_of_nothing_is_zero(self) -> None:
        nothing = sparse.csr_array((0, 3))
        assert clipped_sum(nothing, 1.0).tolist() == [0, 0, 0]
        assert clipped_sum(nothing, 1.0, np.zeros(0, dtype=np.int64)).tolist() == [0, 0, 0]

    @given(rows, st.floats(1e-3, 1e3), st.data())
    def test_a_unit_more_changes_it_by_at_most_the_bound(
        self, held: np.ndarray, bound: float, data: st.DataObject
    ) -> None:
        ids = hnp.arrays(np.int64, len(held), elements=st.integers(0, 3))
        persons = data.draw(st.none() | ids)
        without = np.zeros(len(held), dtype=bool)
        without[0] = True
        if persons is not None:
            without = persons == persons[0]
        others = None if persons is None else persons[~without]
        whole = clipped_sum(sparse.csr_array(held), bound, persons)
        less = clipped_sum(sparse.csr_array(held[~without]), bound, others)
        assert np.linalg.norm(whole - less) <= bound * SLACK


class TestRowsAtATime:
    @given(
        st.lists(st.integers(0, 5), max_size=30), st.sampled_from([1, 2**20, 2**21, 2**22, 2**30])
    )
    def test_every_record_is_in_one_block_with_all_of_its_person(
        self, persons: list[int], each: int
    ) -> None:
        whose = np.array(persons, dtype=np.int64)
        blocks = [block.tolist() for block in rows_at_a_time(len(persons), each, whose)]
        assert sorted(place for block in blocks for place in block) == list(range(len(persons)))
        of_blocks = [set(whose[block].tolist()) for block in blocks]
        assert sum(map(len, of_blocks)) == len(set(persons))

    def test_no_block_has_more_numbers_than_memory_is_meant_for(self) -> None:
        sizes = [len(block) for block in rows_at_a_time(10, 2**20)]
        assert sizes == [4, 4, 2]
        whose = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])  # two persons are too many for one block
        assert [len(b) for b in rows_at_a_time(10, 2**20, whose)] == [3, 2, 5]
