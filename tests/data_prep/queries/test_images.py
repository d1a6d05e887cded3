"""Class moments of images: what a record adds is bounded, whatever it is."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fedveil.config import ConfigError, Statistics
from fedveil.data_prep import Encoded
from fedveil.data_prep.queries import Workload, answers, noisy, workload
from fedveil.data_prep.queries import images as queries
from fedveil.data_prep.schema import ImageSchema

SMALL = ImageSchema(height=4, width=4)
CLASSES = ImageSchema(height=4, width=8, classes=("cat", "dog", "eel"))
COLOUR = ImageSchema(height=8, width=4, channels=3, classes=("cat", "dog"))
SCHEMAS = (SMALL, CLASSES, COLOUR)
KINDS = ("class", "shared", "diagonal")


def asked_of(schema: ImageSchema, kind: str = "class", size: int = 10) -> Workload:
    options = Statistics.model_validate({"image_coefficients": size, "image_covariances": kind})
    return workload(schema, options, 1000, 1.0)


def some(schema: ImageSchema, count: int, seed: int = 0) -> Encoded:
    rng = np.random.default_rng(seed)
    x = rng.random((count, *schema.shape), dtype=np.float32)
    return Encoded(x, rng.integers(0, max(1, len(schema.classes)), count))


def joined(one: Encoded, other: Encoded) -> Encoded:
    return Encoded(np.concatenate([one.x, other.x]), np.concatenate([one.y, other.y]))


def moved(asked: Workload, schema: ImageSchema, record: Encoded, others: Encoded) -> float:
    """By how much one record moves the sums."""
    more = answers(asked, joined(others, record), schema)
    return float(np.linalg.norm(more - answers(asked, others, schema)))


class TestSensitivity:
    @given(data=st.data())
    def test_bounds_what_any_record_adds(self, data: st.DataObject) -> None:
        schema = data.draw(st.sampled_from(SCHEMAS))
        asked = asked_of(schema, data.draw(st.sampled_from(KINDS)))
        widest = float(np.finfo(np.float32).max)
        pixels = st.one_of(
            st.sampled_from([0.0, 1.0, -1e6, 1e6, widest, -widest, math.nan, math.inf, -math.inf]),
            st.floats(0, 1, width=32),
        )
        x = data.draw(arrays.arrays(np.float32, (1, *schema.shape), elements=pixels))
        y = np.array([data.draw(st.integers(-3, 5))])
        found = moved(asked, schema, Encoded(x, y), some(schema, 5))
        assert found <= asked.norm * (1 + 1e-9)
        assert found < asked.sensitivity

    @given(data=st.data())
    def test_bounds_corners_of_the_box(self, data: st.DataObject) -> None:
        """Patterns of black and white that put as much as can be into a few coefficients."""
        schema = data.draw(st.sampled_from(SCHEMAS))
        asked = asked_of(schema, data.draw(st.sampled_from(KINDS)))
        slope = data.draw(
            arrays.arrays(np.float64, asked.queries[1].shape[1], elements=st.floats(-1, 1))
        )
        pattern = (
            queries.coefficients(
                np.eye(math.prod(schema.shape)).reshape(-1, *schema.shape), schema, len(slope)
            )
            @ slope
        )
        x = (pattern > 0).astype(np.float32).reshape(1, *schema.shape)
        assert moved(asked, schema, Encoded(x, np.array([0])), some(schema, 5)) <= asked.norm * (
            1 + 1e-9
        )

    @pytest.mark.parametrize("schema", SCHEMAS)
    @pytest.mark.parametrize("kind", ["class", "shared"])
    def test_is_reached_by_a_clipped_record(self, schema: ImageSchema, kind: str) -> None:
        """So that no noise is made for nothing."""
        asked = asked_of(schema, kind)
        loud = Encoded(np.full((1, *schema.shape), 1e3, dtype=np.float32), np.array([0]))
        assert moved(asked, schema, loud, some(schema, 0)) == pytest.approx(asked.norm)

    def test_is_that_of_the_block_by_hand(self) -> None:
        """sqrt(0.2^2 + 0.7^2 + 1^2), for any number of classes."""
        for schema in SCHEMAS:
            assert asked_of(schema).norm == pytest.approx(math.sqrt(1.53))

    @pytest.mark.parametrize("schema", SCHEMAS)
    def test_of_a_group_is_at_most_so_many_times_it(self, schema: ImageSchema) -> None:
        asked = asked_of(schema)
        group = Encoded(np.ones((7, *schema.shape), dtype=np.float32), np.zeros(7, dtype=np.int64))
        assert moved(asked, schema, group, some(schema, 3)) <= 7 * asked.norm * (1 + 1e-9)


class TestAnswers:
    def test_are_by_hand_of_a_small_image(self) -> None:
        """Coefficients of a 4x4 image whose left half is white, less the grey of a quarter.

        The lowest is the sum / 4 = (8 x 0.75 - 8 x 0.25) / 4 = 1; the first across is
        4 rows x (1/2) x sqrt(1/2) x sum of +-cos: (cos(pi/8) + cos(3 pi/8)) x sqrt(2) = 1.8478;
        the first down is 0, for the rows are alike.
        """
        x = np.zeros((1, 1, 4, 4), dtype=np.float32)
        x[..., :2] = 1
        across = math.sqrt(2) * (math.cos(math.pi / 8) + math.cos(3 * math.pi / 8))
        asked = asked_of(SMALL, size=3)
        raw = queries.coefficients(x.astype(np.float64) - 0.25, SMALL, 3)[0]
        assert sorted(raw.round(6)) == pytest.approx(sorted([1.0, across, 0.0]), abs=1e-6)
        assert raw[0] == pytest.approx(1.0)
        # Weights: power 1 at frequency 0 and 1 / (1 + 1/4) at 1, to the power of -1/4.
        z = raw * np.array([1, 1.25**0.25, 1.25**0.25])
        radius = asked.queries[1].norm
        assert np.linalg.norm(z) > radius
        z *= radius / np.linalg.norm(z)
        read = noisy(asked, answers(asked, Encoded(x, np.array([0])), SMALL), 0.0, 1)
        assert read.values["count"].tolist() == [1.0]
        assert read.values["sum"][0] == pytest.approx(z)
        squares = queries.matrix(read.values["square"][0], 3)
        assert squares == pytest.approx(np.outer(z, z))
        assert np.linalg.norm(read.values["square"]) == pytest.approx(radius**2)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("schema", SCHEMAS)
    def test_are_the_sums_of_single_records(self, schema: ImageSchema, kind: str) -> None:
        asked, records = asked_of(schema, kind), some(schema, 20)
        alone = [answers(asked, records.take(np.array([row])), schema) for row in range(20)]
        assert answers(asked, records, schema) == pytest.approx(np.sum(alone, axis=0))

    def test_do_not_depend_on_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked, records = asked_of(COLOUR), some(COLOUR, 33)
        whole = answers(asked, records, COLOUR)
        monkeypatch.setattr(queries, "_BLOCK", 1)
        assert answers(asked, records, COLOUR) == pytest.approx(whole)

    def test_of_a_class_are_its_records_alone(self) -> None:
        asked, records = asked_of(CLASSES), some(CLASSES, 30)
        dogs = Encoded(records.x[records.y == 1], records.y[records.y == 1])
        every = noisy(asked, answers(asked, records, CLASSES), 0.0, 30).values
        alone = noisy(asked, answers(asked, dogs, CLASSES), 0.0, 30).values
        for name, found in every.items():
            assert found[1] == pytest.approx(alone[name][1])
            assert not alone[name][[0, 2]].any()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_are_not_spoilt_by_one_record(self, bad: float) -> None:
        asked, records = asked_of(CLASSES), some(CLASSES, 9)
        spoilt = some(CLASSES, 1, seed=2)
        spoilt.x[0, 0, 1, 2] = bad
        assert answers(asked, joined(records, spoilt), CLASSES).tolist() == pytest.approx(
            answers(asked, records, CLASSES).tolist()
        )

    @pytest.mark.parametrize("label", [-1, 3, 2**40])
    def test_leave_out_a_label_that_is_no_class(self, label: int) -> None:
        asked = asked_of(CLASSES)
        odd = Encoded(some(CLASSES, 1).x, np.array([label]))
        assert not answers(asked, odd, CLASSES).any()

    def test_take_any_label_where_there_are_no_classes(self) -> None:
        asked = asked_of(SMALL)
        records = some(SMALL, 4)
        other = Encoded(records.x, records.y + 7)
        assert answers(asked, other, SMALL).tolist() == answers(asked, records, SMALL).tolist()

    def test_of_no_records_are_zero(self) -> None:
        asked = asked_of(COLOUR)
        found = answers(asked, some(COLOUR, 0), COLOUR)
        assert found.shape == (asked.length,)
        assert not found.any()

    def test_refuse_persons(self) -> None:
        with pytest.raises(ValueError, match="images carry no key"):
            answers(asked_of(SMALL), some(SMALL, 2), SMALL, np.zeros(2, dtype=np.int64))


class TestBasis:
    @pytest.mark.parametrize("schema", SCHEMAS)
    def test_is_orthonormal(self, schema: ImageSchema) -> None:
        pixels = math.prod(schema.shape)
        rows = queries.coefficients(np.eye(pixels).reshape(-1, *schema.shape), schema, pixels)
        assert rows @ rows.T == pytest.approx(np.eye(pixels), abs=1e-9)

    def test_has_the_lowest_frequencies_first(self) -> None:
        places, found = queries.lowest(ImageSchema(height=8, width=8), 4)
        assert sorted(places.tolist()) == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
        assert found.tolist() == pytest.approx([0, 1, 1, math.sqrt(2)])

    def test_weights_rise_with_frequency(self) -> None:
        found = queries.weights(COLOUR, 20)
        assert found[0] == 1
        assert (np.diff(found) >= -1e-12).all()

    def test_triangles_keep_the_norm_and_come_back(self) -> None:
        rng = np.random.default_rng(0)
        half = rng.normal(size=(6, 6))
        whole = half + half.T
        cells = queries.triangle(whole)
        assert np.linalg.norm(cells) == pytest.approx(np.linalg.norm(whole))
        assert queries.matrix(cells, 6) == pytest.approx(whole)


DIGITS = ImageSchema(height=28, width=28, classes=tuple("0123456789"))


def shapes(
    schema: ImageSchema, units: float, noise_multiplier: float, **options: object
) -> dict[str, tuple[int, ...]]:
    asked = workload(schema, Statistics.model_validate(options), units, noise_multiplier)
    return {query.name: query.shape for query in asked.queries}


class TestRule:
    def test_asks_squares_by_class_of_many_records(self) -> None:
        assert shapes(DIGITS, 60_000, 3.73) == {
            "count": (10,),
            "sum": (10, 144),
            "square": (10, 144 * 145 // 2),
        }

    @pytest.mark.parametrize(
        ("noise_multiplier", "square"), [(0.0, (10, 2080)), (1.4, (1, 2080)), (20.0, (1, 64))]
    )
    def test_asks_less_of_few_records_than_of_many(
        self, noise_multiplier: float, square: tuple[int, int]
    ) -> None:
        digits = ImageSchema(height=8, width=8, classes=tuple("0123456789"))
        assert shapes(digits, 1797, noise_multiplier)["square"] == square

    def test_takes_what_the_options_say(self) -> None:
        found = shapes(
            DIGITS, 10, 50.0, image_coefficients=12, image_covariances="class", max_cells=910
        )
        assert found == {"count": (10,), "sum": (10, 12), "square": (10, 78)}

    def test_comes_down_to_what_fits(self) -> None:
        many = ImageSchema(height=28, width=28, classes=tuple(f"class {i}" for i in range(100)))
        assert shapes(many, 1e6, 0.1)["square"] == (1, 144 * 145 // 2)
        assert shapes(many, 1e6, 0.1, max_cells=2000)["sum"] == (100, 16)

    def test_refuses_what_does_not_fit(self) -> None:
        with pytest.raises(ConfigError, match=r"^statistics\.max_cells = 909: .* 910 cells; .*$"):
            shapes(DIGITS, 10, 1.0, image_coefficients=12, image_covariances="class", max_cells=909)
        with pytest.raises(ConfigError, match=r"10 classes .* 1 coefficients have 21 cells"):
            shapes(DIGITS, 10, 1.0, max_cells=20)

    def test_of_colour_puts_grey_first(self) -> None:
        places, _ = queries.lowest(ImageSchema(height=32, width=32, channels=3), 144)
        assert (places[:10, 0] == 0).all()
        assert set(places[:, 0].tolist()) == {0, 1, 2}
