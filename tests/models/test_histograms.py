"""The cells of columns: how many, what they are called, and back from the joined vector."""

import numpy as np
import pytest
import torch

from fedveil.data_prep.queries.cells import Cells
from fedveil.data_prep.schema import TextSchema, parse_schema
from fedveil.data_prep.texts import Texts, encode
from fedveil.models import Batch, histograms

TABLE = parse_schema(
    {
        "label": "ill",
        "column": [
            {"name": "age", "kind": "integer", "bounds": [0, 100], "nullable": True},
            {"name": "pay", "kind": "numeric", "bounds": [0, 1023], "transform": "log1p"},
            {"name": "ill", "kind": "categorical", "categories": ["no", "yes"]},
            {"name": "hue", "kind": "categorical", "categories": ["a", "b"], "nullable": True},
        ],
    },
    "here",
)
IMAGES = parse_schema({"modality": "image", "height": 4, "width": 4}, "here")


def test_cells_are_called_as_the_schema_says_and_the_label_comes_last() -> None:
    age, pay, hue, label = histograms.described(TABLE)
    assert age.names == (*(f"{10 * i} to {10 * i + 10}" for i in range(10)), "missing")
    assert age.number
    assert hue == Cells("hue", number=False, names=("a", "b", "missing"))
    assert label == Cells("ill", number=False, names=("no", "yes"))
    assert pay.names[:2] == ("0 to 1", "1 to 3")  # 2^1 - 1, 2^2 - 1
    assert pay.names[-1] == "511 to 1023"
    assert histograms.levels(TABLE) == [11, 10, 3, 2]


def test_images_without_classes_have_none() -> None:
    assert histograms.described(IMAGES) == []
    none = Batch(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))
    assert histograms.one_way(none, IMAGES).shape == (0,)
    assert histograms.parted(np.zeros(0), IMAGES) == []


TEXTS = TextSchema(length=4)


def texts(*contents: str) -> Batch:
    found = encode(Texts(tuple(c.encode() for c in contents), ("",) * len(contents)), TEXTS)
    return Batch(torch.from_numpy(found.x), torch.from_numpy(found.y))


def test_a_text_is_spread_over_the_classes_of_its_bytes() -> None:
    (cells,) = histograms.described(TEXTS)
    assert cells.column == "characters"
    found = histograms.one_way(texts("aAb", "b\u00e9"), TEXTS)
    shares = {name: share for name, share in zip(cells.names, found, strict=True) if share}
    # An e with an accent is two bytes of two classes.
    assert shares["a"] == pytest.approx(2 / 3)
    assert shares["b"] == pytest.approx(1 / 3 + 1 / 3)
    assert found.sum() == pytest.approx(2)
    assert histograms.parted(found, TEXTS)[0].tolist() == found.tolist()


def test_a_text_counts_by_its_weight_and_by_no_more_than_once() -> None:
    weights = np.array([0.5, 0.25])
    found = histograms.one_way(texts("aaaa", "b"), TEXTS, weights)
    assert found[:2].tolist() == [0.5, 0.25]
    assert histograms.characters(texts("aaaa", "b"), TEXTS).tolist() == [1.25]
    assert histograms.characters(texts("aaaa", "b"), TEXTS, weights).tolist() == [0.5625]
    empty = Batch(torch.ones(1, 4), torch.zeros(1, dtype=torch.int64))
    assert not histograms.one_way(empty, TEXTS).any()


def test_what_is_joined_can_be_parted() -> None:
    # age 95 and present, pay in the first tenth, hue b, ill
    x = torch.tensor([[0.95, 1.0, 0.05, 0.0, 1.0, 0.0]])
    joined = histograms.one_way(Batch(x, torch.tensor([1])), TABLE)
    assert np.linalg.norm(joined) == pytest.approx(1)
    age, pay, hue, label = histograms.parted(joined, TABLE)
    np.testing.assert_allclose(age, [0] * 9 + [1, 0], atol=1e-12)
    np.testing.assert_allclose(pay, [1] + [0] * 9, atol=1e-12)
    np.testing.assert_allclose(hue, [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(label, [0, 1], atol=1e-12)


def test_a_vector_of_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 26 cells"):
        histograms.parted(np.zeros(25), TABLE)


def test_the_nearest_distribution() -> None:
    np.testing.assert_allclose(histograms.nearest(np.array([0.5, 0.9, -0.4])), [0.3, 0.7, 0.0])
    np.testing.assert_allclose(histograms.nearest(np.array([-3.0, -3.0])), [0.5, 0.5])
