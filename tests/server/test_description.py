"""What is said of the federation's data: hand-counted, and by the released vector alone."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest

from fedveil.config import Statistics
from fedveil.data_prep import queries, tabular
from fedveil.data_prep.modality import Encoded
from fedveil.data_prep.queries import Noisy, Query, Workload
from fedveil.data_prep.schema import Schema, parse_schema
from fedveil.server.description import ONE_GROUP, WITHIN, describe
from fedveil.server.intervals import BELOW, FEW

SCHEMA = parse_schema(
    {
        "label": "ill",
        "column": [
            {"name": "age", "kind": "integer", "bounds": [0, 9], "nullable": True},
            {"name": "dose", "kind": "numeric", "bounds": [0, 99], "transform": "log1p"},
            {"name": "hue", "kind": "categorical", "categories": ["red", "blue"],
             "nullable": True},
            {"name": "ill", "kind": "categorical", "categories": ["no", "yes"]},
        ],
    },
    "here",
)  # fmt: skip
ROWS: list[dict[str, Any]] = [
    *[{"age": 3, "dose": 0.0, "hue": "red", "ill": "no"}] * 40,
    *[{"age": 7, "dose": 9.0, "hue": "blue", "ill": "yes"}] * 20,
    *[{"age": None, "dose": 50.0, "hue": "blue", "ill": "yes"}] * 10,
    *[{"age": 4, "dose": 9.0, "hue": None, "ill": "no"}] * 30,
]


def encoded(rows: Sequence[Mapping[str, object]], schema: Schema = SCHEMA) -> Encoded:
    """Of rows that are clean."""
    types = {"age": pl.Int64, "dose": pl.Float64, "hue": pl.String, "ill": pl.String}
    return tabular.encode(pl.DataFrame([*rows], schema=types), schema)


def asked(units: float = 100.0, noise_multiplier: float = 0.0) -> Workload:
    """What a run asks of `SCHEMA`."""
    return queries.workload(SCHEMA, Statistics(), units, noise_multiplier)


def released(rows: Sequence[Mapping[str, object]], z: float = 0.0, seed: int = 0) -> Noisy:
    """One round."""
    workload = asked(float(len(rows)), z)
    exact = queries.answers(workload, encoded(rows), SCHEMA)
    scale = z * workload.sensitivity
    noise = np.random.default_rng(seed).normal(0, 1, workload.length) * scale
    return queries.noisy(workload, exact + noise, scale, float(len(rows)))


def columns(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By name."""
    return {column["name"]: column for column in facts["columns"]}


def share(value: float) -> dict[str, Any]:
    """Without any noise."""
    return {"value": value, "low": value, "high": value, "told": ""}


class TestByHand:
    """Without noise, so that everything can be counted in `ROWS`."""

    facts = describe(released(ROWS), SCHEMA)

    def test_the_total_and_what_intervals_are(self) -> None:
        assert self.facts["total"] == share(100.0)
        assert self.facts["units"] == 100.0
        assert self.facts["interval"]["level"] == 0.95
        assert self.facts["interval"]["of"] == "noise of the mechanism, not sampling error"

    def test_columns_are_those_of_the_schema_and_the_last_is_the_label(self) -> None:
        kinds = [(c["name"], c["kind"], c["label"]) for c in self.facts["columns"]]
        assert kinds == [
            ("age", "integer", False), ("dose", "numeric", False), ("hue", "categorical", False),
            ("ill", "categorical", True),
        ]  # fmt: skip

    def test_missing_values(self) -> None:
        found = columns(self.facts)
        assert found["age"]["missing"] == share(0.1)
        assert found["hue"]["missing"] == share(0.3)
        assert "missing" not in found["dose"]
        assert "missing" not in found["ill"]

    def test_groups_and_classes_are_of_all_records(self) -> None:
        found = columns(self.facts)
        assert found["hue"]["levels"] == [
            {"name": "red", **share(0.4)}, {"name": "blue", **share(0.3)},
        ]  # fmt: skip
        assert found["ill"]["levels"] == [
            {"name": "no", **share(0.7)}, {"name": "yes", **share(0.3)},
        ]  # fmt: skip

    def test_quantiles_of_whole_numbers_are_exact_values(self) -> None:
        """Of 90 who have an age: 40 are 3, 30 are 4, 20 are 7."""
        found = columns(self.facts)["age"]["quantiles"]
        assert [(q["part"], q["value"], q["low"], q["high"]) for q in found] == [
            (0.05, 3, 3, 3), (0.25, 3, 3, 3), (0.5, 4, 4, 4), (0.75, 4, 4, 4), (0.95, 7, 7, 7),
        ]  # fmt: skip

    def test_quantiles_come_back_in_the_columns_own_units(self) -> None:
        """Doses are 0, 9 and 50, each somewhere in one cell of a log scale."""
        found = columns(self.facts)["dose"]
        assert found["declared"] == [0.0, 99.0]
        assert found["transform"] == "log1p"
        for quantile, truth in zip(found["quantiles"], (0.0, 0.0, 9.0, 9.0, 50.0), strict=True):
            assert quantile["low"] <= quantile["value"] <= quantile["high"]
            assert quantile["low"] <= truth <= quantile["high"]
            assert (1 + quantile["high"]) / (1 + quantile["low"]) < 1.1

    def test_pairs(self) -> None:
        """Who has a hue has it by being ill: red is no, blue is yes, missing is no."""
        found = {tuple(pair["columns"]): pair for pair in self.facts["pairs"]}
        assert len(found) == 6
        hue = found["hue", "ill"]
        assert (hue["value"], hue["low"], hue["high"]) == pytest.approx((1, 1, 1), abs=1e-4)
        assert (hue["floor"], hue["told"]) == (0.0, "")

    def test_it_is_json_of_no_more_digits_than_the_noise_leaves(self) -> None:
        noisy = describe(released(ROWS * 100, 5.0), SCHEMA)
        assert json.loads(json.dumps(noisy)) == noisy
        missing = columns(noisy)["hue"]["missing"]
        assert 0.001 < missing["high"] - missing["low"] < 0.1
        assert all(round(missing[key], 5) == missing[key] for key in ("value", "low", "high"))
        total = noisy["total"]
        assert 10 < total["high"] - total["low"] < 1000
        assert all(round(total[key], 1) == total[key] for key in ("value", "low", "high"))


class TestNoise:
    def test_intervals_grow_with_it_until_nothing_is_told(self) -> None:
        rows = ROWS * 20
        widths = []
        for z in (0.1, 1.0, 10.0):
            found = columns(describe(released(rows, z), SCHEMA))["hue"]["missing"]
            widths.append(found["high"] - found["low"])
        assert widths == sorted(widths)
        drowned = describe(released(ROWS, 1000.0), SCHEMA)
        told = {level["told"] for c in drowned["columns"] for level in c.get("levels", ())}
        assert told <= {BELOW, FEW}
        assert {pair["told"] for pair in drowned["pairs"]} <= {WITHIN, ONE_GROUP}
        age = columns(drowned)["age"]["quantiles"]
        assert all(q["high"] - q["low"] >= 5 for q in age)

    def test_quantiles_stay_within_declared_bounds_and_order(self) -> None:
        for seed in range(5):
            for column in describe(released(ROWS, 3.0, seed), SCHEMA)["columns"]:
                for q in column.get("quantiles", ()):
                    low, high = column["declared"]
                    assert low <= q["low"] <= q["value"] <= q["high"] <= high

    def test_the_truth_is_within_the_intervals(self) -> None:
        """Of 20 rounds of 13 figures each; a wrong noise std or cell would miss most."""
        exact = describe(released(ROWS * 100), SCHEMA)
        hits, count = 0, 0
        for seed in range(20):
            found = describe(released(ROWS * 100, 2.0, seed), SCHEMA)
            for truth, said in zip(figures(exact), figures(found), strict=True):
                hits += said["low"] - 1e-3 <= truth["value"] <= said["high"] + 1e-3
                count += 1
        assert count == 20 * 13
        # 247 are expected, with a standard deviation of 3.5 were they independent.
        assert hits >= 220

    def test_a_workload_that_asks_for_less_says_less(self) -> None:
        options = Statistics(marginals=(("hue", "ill"), ("age",)))
        workload = queries.workload(SCHEMA, options, 100.0, 0.0)
        exact = queries.answers(workload, encoded(ROWS), SCHEMA)
        facts = describe(queries.noisy(workload, exact, 0.0, 100.0), SCHEMA)
        pairs = [tuple(pair["columns"]) for pair in facts["pairs"]]
        assert ("hue", "ill") in pairs
        assert ("age", "hue") not in pairs
        assert columns(facts)["age"]["missing"] == share(0.1)


def figures(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Total, missing ones, levels, quantiles of whole numbers, V of what has few cells."""
    found = [facts["total"]]
    for column in facts["columns"]:
        found += [column["missing"]] if "missing" in column else []
        found += column.get("levels", [])
        found += column["quantiles"] if column["kind"] == "integer" else []
    return found + [p for p in facts["pairs"] if p["columns"] == ["hue", "ill"]]


class TestLeak:
    def test_facts_hang_on_the_released_vector_alone(self) -> None:
        """Two sets of records whose noise happens to make the same vector of them."""
        workload = asked()
        others = [*ROWS[5:], *[{"age": 0, "dose": 99.0, "hue": None, "ill": "yes"}] * 30]
        vector = np.random.default_rng(7).integers(0, 100, workload.length).astype(np.float64)
        said, sums = [], []
        for seed, rows in enumerate((ROWS, others)):
            np.random.seed(seed)  # noqa: NPY002  nor on any global state
            exact = queries.answers(workload, encoded(rows), SCHEMA)
            noise = vector - exact
            released = np.rint(exact + noise)  # whole, so that float64 adds them up alike
            facts = describe(queries.noisy(workload, released, 12.0, 100.0), SCHEMA)
            said.append(json.dumps(facts).encode())
            sums.append(exact)
        assert (sums[0] != sums[1]).any()
        assert said[0] == said[1]

    def test_another_vector_says_something_else(self) -> None:
        assert describe(released(ROWS, 1.0, 1), SCHEMA) != describe(released(ROWS, 1.0, 2), SCHEMA)


class TestOtherKinds:
    def test_kinds_of_characters_of_texts(self) -> None:
        """Of "Abb 1!": one each, two "b"; the end of a text is no character."""
        counts = np.zeros(257)
        for token in (*b"Abb 1!", 256):
            counts[token] += 1
        workload = Workload((Query("bytes", (257,)),))
        schema = parse_schema({"modality": "text"}, "here")
        facts = describe(Noisy(workload, {"bytes": counts}, {"bytes": 0.0}, 3.0), schema)
        found = {level["name"]: level["value"] for level in facts["columns"][0]["levels"]}
        sixth = round(1 / 6, 6)
        assert found == {
            "small letters": round(1 / 3, 6), "capital letters": sixth, "digits": sixth,
            "blanks": sixth, "marks and signs": sixth, "control characters": 0.0,
            "bytes beyond ASCII": 0.0,
        }  # fmt: skip

    def test_a_kind_of_characters_has_the_noise_of_all_its_bytes(self) -> None:
        workload = Workload((Query("bytes", (257,)),))
        schema = parse_schema({"modality": "text"}, "here")
        counts = np.full(257, 1e4)
        facts = describe(Noisy(workload, {"bytes": counts}, {"bytes": 10.0}, 3.0), schema)
        digits = next(x for x in facts["columns"][0]["levels"] if x["name"] == "digits")
        part = 10 / 256
        spread = math.sqrt(10 * 100 * (1 - part) ** 2 + 246 * 100 * part**2) / 256e4
        assert digits["high"] - digits["low"] == pytest.approx(2 * 1.96 * spread, rel=0.01)

    def test_images_have_a_total_and_classes(self) -> None:
        """Of 60 and 40 with noise 3 each: the total's is 3 sqrt(2), 1.96 times each way."""
        workload = Workload((Query("count", (2,)),))
        raw = {"modality": "image", "height": 8, "width": 8}
        told = Noisy(workload, {"count": np.array([60.0, 40.0])}, {"count": 3.0}, 90.0)
        facts = describe(told, parse_schema(raw | {"classes": ["cat", "dog"]}, "here"))
        assert facts["total"] == {"value": 100.0, "low": 91.7, "high": 108.3, "told": ""}
        (label,) = facts["columns"]
        assert (label["name"], label["label"]) == ("label", True)
        assert [(x["name"], x["value"], x["told"]) for x in label["levels"]] == [
            ("cat", 0.6, ""), ("dog", 0.4, ""),
        ]  # fmt: skip
        cat = label["levels"][0]
        # Sd of 60 of 100: 3 sqrt(0.4^2 + 0.6^2) / 100.
        width = 2 * 1.96 * 3 * math.sqrt(0.52) / 100
        assert cat["high"] - cat["low"] == pytest.approx(width, rel=0.02)

    def test_images_without_classes_have_a_total(self) -> None:
        schema = parse_schema({"modality": "image", "height": 8, "width": 8}, "here")
        told = Noisy(Workload(()), {"count": np.array([60.0])}, {"count": 3.0}, 90.0)
        assert set(describe(told, schema)) == {"modality", "units", "interval", "total"}

    def test_what_is_not_asked_is_absent(self) -> None:
        schema = parse_schema({"modality": "image", "height": 8, "width": 8}, "here")
        facts = describe(Noisy(Workload(()), {}, {}, 3.0), schema)
        assert set(facts) == {"modality", "units", "interval"}
