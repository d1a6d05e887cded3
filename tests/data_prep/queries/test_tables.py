"""What is asked of a table, a site's answers, and what the noisy ones say."""

import math
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedveil.config import ConfigError, Statistics
from fedveil.data_prep import Encoded
from fedveil.data_prep.queries import Noisy, Workload, answers, noisy, workload
from fedveil.data_prep.queries import tables as queries
from fedveil.data_prep.queries.cells import Cells, cells, cells_of, codes
from fedveil.data_prep.schema import Column, TableSchema, parse_schema, schema_to_json
from fedveil.data_prep.tabular import breast_cancer_schema

AGE: dict[str, Any] = {"name": "age", "kind": "integer", "bounds": [0, 3]}
HUE: dict[str, Any] = {"name": "hue", "kind": "categorical", "categories": ["a", "b"]}
PAY: dict[str, Any] = {"name": "pay", "kind": "numeric", "bounds": [0, 8], "nullable": True}
ILL: dict[str, Any] = {"name": "ill", "kind": "categorical", "categories": ["no", "yes"]}


def table(*columns: dict[str, Any], label: str | None = None) -> TableSchema:
    schema = parse_schema({"column": list(columns), "label": label}, "test")
    assert isinstance(schema, TableSchema)
    return schema


SCHEMA = table(AGE, {**HUE, "nullable": True}, PAY, ILL, label="ill")
# age 3, hue b, pay 1 of 8, ill; age 0, hue missing, pay missing, not ill
X = np.array([[1, 0, 1, 0, 0.125, 1], [0, 0, 0, 1, 0, 0]], dtype=np.float32)
RECORDS = Encoded(X, np.array([1, 0]))
EVERYTHING = Statistics(max_cells=10**6)


def exact(schema: TableSchema, records: Encoded, asked: Workload | None = None) -> Noisy:
    asked = asked or workload(schema, EVERYTHING, 1, 0)
    return noisy(asked, answers(asked, records, schema), 1e-9, len(records.y))


class TestCells:
    def test_of_a_whole_number_with_few_values_are_its_values(self) -> None:
        age = cells_of(Column.model_validate(AGE))
        assert age.names == ("0", "1", "2", "3")
        assert age.edges == age.fine == pytest.approx((0, 1 / 6, 1 / 2, 5 / 6, 1))

    def test_of_a_whole_number_are_groups_of_its_values(self) -> None:
        age = cells_of(Column.model_validate({**AGE, "bounds": [17, 90], "bins": 2}))
        assert age.names == ("17 to 53", "54 to 90")
        assert age.fine_count == 74
        assert age.parts.tolist() == [0] * 37 + [1] * 37

    def test_of_another_number_are_equal_parts(self) -> None:
        pay = cells_of(Column.model_validate({**PAY, "bins": 4}))
        assert pay.names == ("0 to 2", "2 to 4", "4 to 6", "6 to 8", "missing")
        assert list(pay.edges) == [0, 0.25, 0.5, 0.75, 1]
        assert pay.fine_count == 101  # and "missing"
        assert np.bincount(pay.parts).tolist() == [25, 25, 25, 25, 1]

    def test_after_the_transform(self) -> None:
        column = {**PAY, "bounds": [0, 1023], "transform": "log1p", "bins": 10}
        assert cells_of(Column.model_validate(column)).names[:2] == ("0 to 1", "1 to 3")

    @pytest.mark.parametrize(
        "about",
        [
            {"bounds": [2**53 - 4, 2**53]},
            {"bounds": [1e15, 1e15 + 90], "transform": "log1p"},
        ],
    )
    def test_of_numbers_too_large_for_a_half_between_two_are_equal_parts(
        self, about: dict[str, Any]
    ) -> None:
        # Else the last edges were one, and a record in no cell of the column, but in another's.
        schema = table({**AGE, **about}, ILL, label="ill")
        age = cells(schema)[0]
        assert np.all(np.diff(age.fine) > 0)
        assert age.parts.max() == len(age.names) - 1
        asked = workload(schema, EVERYTHING, 1, 0)
        for value in (0, 0.5, 1, np.nan):
            record = Encoded(np.full((1, 1), value, dtype=np.float32), np.array([1]))
            assert np.linalg.norm(answers(asked, record, schema)) <= asked.sensitivity

    def test_the_labels_come_last(self) -> None:
        assert [c.column for c in cells(SCHEMA)] == ["age", "hue", "pay", "ill"]
        assert cells(SCHEMA)[-1] == Cells("ill", number=False, names=("no", "yes"))

    def test_that_records_are_in(self) -> None:
        found = [coarse.tolist() for coarse, _ in codes(RECORDS, SCHEMA)]
        assert found == [[3, 0], [1, 2], [1, 12], [1, 0]]  # pay 1 of 8: the second twelfth

    def test_every_value_of_a_whole_number_is_in_its_own(self) -> None:
        schema = table({**AGE, "bounds": [17, 90]})
        x = (np.arange(74) / 73).astype(np.float32)[:, None]
        assert codes(Encoded(x, np.zeros(74, dtype=np.int64)), schema)[0][1].tolist() == [
            *range(74)
        ]

    def test_bins_are_left_out_of_the_json_where_they_are_not_set(self) -> None:
        """A schema's hash in a ledger stays what it was."""
        assert "bins" not in schema_to_json(SCHEMA)
        assert '"bins":5' in schema_to_json(table({**AGE, "bins": 5}))


class TestWorkload:
    def test_is_every_two_columns_with_the_label(self) -> None:
        asked = workload(SCHEMA, EVERYTHING, 1000, 0)
        pairs = [q.columns for q in asked.queries if len(q.columns) == 3]
        assert pairs == [("ill", "age", "hue"), ("ill", "age", "pay"), ("ill", "hue", "pay")]
        singles = [q.columns for q in queries.tables(asked) if len(q.columns) == 2]
        assert singles == [("ill", "age"), ("ill", "hue"), ("ill", "pay")]
        assert len({q.name for q in asked.queries}) == len(asked.queries)

    def test_is_pairs_and_single_columns_without_a_label(self) -> None:
        asked = queries.tables(workload(table(AGE, HUE), EVERYTHING, 1000, 0))
        assert [q.columns for q in asked] == [("age",), ("hue",), ("age", "hue")]
        assert queries.tables(workload(table(AGE), EVERYTHING, 1000, 0))[0].columns == ("age",)

    def test_leaves_pairs_out_of_which_the_noise_would_leave_nothing(self) -> None:
        schema = breast_cancer_schema()
        rich = workload(schema, Statistics(max_cells=1_000_000), 10**9, 1.0)
        poor = workload(schema, Statistics(), 512, 1.5)
        assert len(queries.tables(rich)) == 30 + 435
        assert len(queries.tables(poor)) < 60
        assert poor.sensitivity < rich.sensitivity

    def test_leaves_pairs_out_that_are_over_the_limit(self) -> None:
        schema = breast_cancer_schema()
        asked = workload(schema, Statistics(max_cells=20_000), 10**9, 1.0)
        assert 15_000 < asked.length <= 20_000

    def test_by_hand_chosen_marginals(self) -> None:
        options = Statistics.model_validate({"marginals": [["hue", "ill"], ["ill", "hue"]]})
        asked = workload(SCHEMA, options, 1000, 1)
        assert [q.columns for q in queries.tables(asked)] == [("ill", "hue"), ("age",), ("pay",)]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"marginals": [["hue", "agee"]]}, r'\["hue", "agee"\]: "agee" is no .* mean "age"\?$'),
            ({"marginals": [["age", "age"]]}, "names a column twice"),
            (
                {"marginals": [["age", "pay"]], "max_cells": 160},
                'tables asked have .* cells, .* column "pay" has 13: give it fewer `bins`',
            ),
            (
                {"marginals": [["ill", "hue"]], "max_cells": 1},
                "statistics.max_cells = 1: the tables asked have",
            ),
        ],
    )
    def test_faults_are_told_in_a_line(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message) as raised:
            workload(SCHEMA, Statistics.model_validate(options), 1000, 1)
        assert "\n" not in str(raised.value)

    def test_too_many_categories_are_named(self) -> None:
        wide = {"name": "zip", "kind": "categorical", "categories": [f"{i}" for i in range(900)]}
        with pytest.raises(ConfigError, match='"zip" has 900: declare fewer categories of it'):
            workload(table(wide, ILL, label="ill"), Statistics(max_cells=1000), 1000, 1)


class TestAnswers:
    def test_by_hand(self) -> None:
        found = exact(SCHEMA, RECORDS).values
        assert found['cells "ill" "hue"'].tolist() == [[0, 0, 1], [0, 1, 0]]
        assert found['fine "ill" "age"'].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
        assert found['moments "age"'].tolist() == [0, 2]  # z = 1 and -1
        assert found['moments "pay"'].tolist() == [-0.75, 0.5625]  # z = 2/8 - 1, and missing: 0

    def test_sensitivity_by_hand(self) -> None:
        """One query of each kind: 0.25 + 2 * 0.25 for the number, 1 for the pair."""
        schema = table(AGE, ILL, label="ill")
        options = Statistics.model_validate({"marginals": [["ill", "age"]]})
        asked = workload(schema, options, 1000, 1)
        weights = sorted(query.weight for query in asked.queries)
        assert weights == [0.5, 0.5, 1.0]
        assert asked.norm == pytest.approx(math.sqrt(1.75))

    def test_66_marginals_of_one_weight_have_a_sensitivity_of_8_12(self) -> None:
        described = [Cells(f"c{i}", number=False, names=("a", "b")) for i in range(12)]
        pairs = [(a.column, b.column) for i, a in enumerate(described) for b in described[:i]]
        asked = Workload(tuple(queries.marginal(pair, described) for pair in pairs))
        assert len(pairs) == 66
        assert asked.norm == pytest.approx(8.12, abs=0.005)

    def test_a_person_is_clipped_as_a_whole(self) -> None:
        """Three equal records: one person's count as one, three persons' as three."""
        records = Encoded(X[[0, 0, 0]], np.array([1, 1, 1]))
        asked = workload(SCHEMA, EVERYTHING, 10, 1)
        once = answers(asked, Encoded(X[:1], RECORDS.y[:1]), SCHEMA)
        apart = answers(asked, records, SCHEMA, np.array([5, 6, 7]))
        as_one = answers(asked, records, SCHEMA, np.array([5, 5, 5]))
        np.testing.assert_allclose(apart, 3 * once)
        np.testing.assert_allclose(as_one * np.linalg.norm(once), once * asked.norm)

    def test_of_nobody_are_zero(self) -> None:
        nobody = Encoded(X[:0], RECORDS.y[:0])
        asked = workload(SCHEMA, EVERYTHING, 10, 1)
        assert not answers(asked, nobody, SCHEMA).any()
        assert not answers(asked, nobody, SCHEMA, np.zeros(0, dtype=np.int64)).any()


names = st.sampled_from(["u", "v", "w"])


@st.composite
def columns(draw: st.DrawFn, name: str) -> dict[str, Any]:
    nullable = draw(st.booleans())
    if draw(st.booleans()):
        many = draw(st.integers(2, 4))
        found = {"kind": "categorical", "categories": [f"k{i}" for i in range(many)]}
        return {"name": name, **found, "nullable": nullable}
    kind, low = draw(st.sampled_from(["numeric", "integer"])), draw(st.integers(0, 3))
    high = low + draw(st.sampled_from([1, 5, 40, 5000]))
    bins = {"bins": draw(st.integers(2, 9))} if draw(st.booleans()) else {}
    transform = draw(st.sampled_from(["none", "log1p"]))
    bounds = {"bounds": [low, high], "transform": transform}
    return {"name": name, "kind": kind, **bounds, **bins, "nullable": nullable}


@st.composite
def schemas(draw: st.DrawFn) -> TableSchema:
    made = [draw(columns(name)) for name in draw(st.lists(names, unique=True, min_size=1))]
    label = draw(st.none() | st.just("ill"))
    return table(*made, ILL, label=label)


hostile = st.sampled_from([0, 1, 0.5, -3, 7, np.nan, np.inf, -np.inf, 1e-30]) | st.floats(width=32)


class TestAnswersUnderAttack:
    """A neighbour worse than the sensitivity says would break the guarantee: search for one."""

    @settings(max_examples=100)
    @given(schemas(), st.booleans(), st.data())
    def test_one_unit_changes_them_by_at_most_the_sensitivity(
        self, schema: TableSchema, by_person: bool, data: st.DataObject
    ) -> None:
        asked = workload(schema, EVERYTHING, 1000, 1)
        n = data.draw(st.integers(1, 6))
        x = data.draw(hnp.arrays(np.float32, (n, schema.width), elements=hostile))
        y = data.draw(hnp.arrays(np.int64, n, elements=st.integers(-5, 5)))
        if data.draw(st.booleans()):  # equal records are the worst that a person can have
            x[:], y[:] = x[0], y[0]
        persons = data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, 2)))
        left = persons != persons[0] if by_person else np.arange(n) > 0
        whole = answers(asked, Encoded(x, y), schema, persons if by_person else None)
        less = Encoded(x[left], y[left])
        others = answers(asked, less, schema, persons[left] if by_person else None)
        assert np.linalg.norm(whole - others) <= asked.sensitivity

    @given(schemas(), st.data())
    def test_a_record_is_in_one_cell_of_each_column(
        self, schema: TableSchema, data: st.DataObject
    ) -> None:
        x = data.draw(hnp.arrays(np.float32, (3, schema.width), elements=hostile))
        found = codes(Encoded(x, np.array([-9, 0, 9])), schema)
        for column, (coarse, fine) in zip(cells(schema), found, strict=True):
            assert ((coarse >= 0) & (coarse < len(column.names))).all()
            if column.number:
                assert ((fine >= 0) & (fine < column.fine_count)).all()


class TestEstimates:
    def test_of_exact_answers_are_exact(self) -> None:
        known = exact(SCHEMA, RECORDS)
        assert float(queries.table_of((), known, SCHEMA)[0]) == pytest.approx(2)
        hue_ill = queries.table_of(("hue", "ill"), known, SCHEMA)[0]
        np.testing.assert_allclose(hue_ill, [[0, 0], [0, 1], [1, 0]], atol=1e-6)
        pay = queries.table_of(("pay",), known, SCHEMA)[0]
        np.testing.assert_allclose(pay, [0, 1, *[0] * 10, 1], atol=1e-6)

    def test_noise_is_that_of_the_inverse_variance_average(self) -> None:
        """Hue from 2 x 2 cells (noise 1, two summed: 3 and 7) and its own (noise 1): 2 to 1."""
        options = Statistics.model_validate({"marginals": [["hue", "ill"], ["hue"]]})
        asked = workload(table(HUE, ILL), options, 10, 1)
        known = noisy(asked, np.array([1.0, 2, 3, 4, 6, 9]), 1.0, 10)
        found, std = queries.table_of(("hue",), known, table(HUE, ILL))
        assert std == pytest.approx(math.sqrt(2 / 3))
        assert found.tolist() == pytest.approx([(3 + 2 * 6) / 3, (7 + 2 * 9) / 3])

    def test_columns_that_were_not_asked_together_are_unknown(self) -> None:
        options = Statistics.model_validate({"marginals": [["age"], ["hue"]]})
        known = exact(SCHEMA, RECORDS, workload(SCHEMA, options, 10, 1))
        assert queries.has_table(("age",), known)
        assert not queries.has_table(("age", "hue"), known)
        with pytest.raises(KeyError, match="no query about"):
            queries.table_of(("age", "hue"), known, SCHEMA)

    def test_a_fine_histogram_adds_up_to_what_is_known_of_the_cells(self) -> None:
        schema = table({**AGE, "bounds": [0, 39], "bins": 4})
        asked = workload(schema, EVERYTHING, 10, 1)
        rng = np.random.default_rng(3)
        known = noisy(asked, rng.normal(size=asked.length), 1.0, 10)
        counts, edges, _ = queries.fine_histogram("age", known, schema)
        assert len(edges) == 41
        coarse, _ = queries.table_of(("age",), known, schema)
        np.testing.assert_allclose(counts.reshape(4, 10).sum(axis=1), coarse)

    def test_moments_are_those_of_the_records_that_have_the_number(self) -> None:
        x = np.array([[0.25, 1], [0.75, 1], [0, 0]], dtype=np.float32)
        known = exact(table(PAY), Encoded(x, np.zeros(3, dtype=np.int64)))
        mean, spread = queries.mean_and_spread("pay", known, table(PAY))
        assert mean == pytest.approx(0.5)
        assert spread == pytest.approx(0.25)

    def test_quantiles_of_a_histogram(self) -> None:
        edges = np.array([0.0, 1, 2, 3])
        found = queries.quantiles(np.array([2.0, 0, 2]), edges, [0.25, 0.75, 1])
        assert found.tolist() == pytest.approx([0.5, 2.5, 3])
        assert queries.quantiles(np.zeros(3), edges, [0.5]).tolist() == [1.5]
        assert queries.quantiles(np.full(3, 1e-309), edges, [0.1, 0.5]).tolist() == [
            pytest.approx(0.3),
            1.5,
        ]

    @given(hnp.arrays(np.float64, 6, elements=st.floats(-50, 50)))
    def test_quantiles_rise_and_stay_within_the_edges(self, counts: np.ndarray) -> None:
        found = queries.quantiles(counts, np.linspace(2, 8, 7), [0, 0.1, 0.5, 0.9, 1])
        assert (np.diff(found) >= 0).all()
        assert (found >= 2).all()
        assert (found <= 8).all()


def test_blocks_of_records_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = workload(SCHEMA, EVERYTHING, 1, 0)
    records, whose = Encoded(X[[0, 1, 0, 1]], RECORDS.y[[0, 1, 0, 1]]), np.array([1, 0, 1, 2])
    whole = [answers(asked, records, SCHEMA), answers(asked, records, SCHEMA, whose)]
    monkeypatch.setattr(import_module("fedveil.data_prep.queries.workload"), "_ENTRIES", 1)
    assert np.array_equal(answers(asked, records, SCHEMA), whole[0])
    assert answers(asked, records, SCHEMA, whose) == pytest.approx(whole[1])


def test_of_very_many_columns_no_pair_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's schema may have thousands: a site must not sit over millions of pairs."""
    columns = [{**HUE, "name": f"c{place}"} for place in range(4)]
    asked = workload(table(*columns), Statistics(), 1e6, 0.1)
    assert max(len(query.columns) for query in asked.queries) == 2
    monkeypatch.setattr(queries, "_MOST_PAIRED", 3)
    asked = workload(table(*columns), Statistics(), 1e6, 0.1)
    assert [query.columns for query in asked.queries] == [(f"c{place}",) for place in range(4)]
