"""A site reads and cleans its records once, keeps its report, and says so if it cannot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from fedveil.client.site import Records, Site, no_records
from fedveil.config import RunConfig
from fedveil.data_prep import modality, run_schema
from fedveil.data_prep.clean import DataError
from fedveil.data_prep.images import Images
from fedveil.data_prep.partition import keyed_split
from fedveil.data_prep.schema import ImageSchema, Schema, TableSchema
from fedveil.privacy.noise import Coins

MakeConfig = Callable[..., RunConfig]
KEY = bytes(range(32))
SCHEMA = ImageSchema(height=8, width=8, classes=tuple("0123456789"))


def images(count: int, seed: int = 1) -> Images:
    """So many different images, all usable."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 1)).astype(np.uint8)
    labels = np.array([str(index % 10) for index in range(count)])
    return Images(pixels, labels, np.ones(count, dtype=bool))


def site(raw: Any, coins: Coins, folder: Path | None = None, key: bytes = KEY) -> Site:  # noqa: ANN401
    """A site that holds these raw records."""
    return Site("site-001", lambda: raw, key, coins, folder)


def failing(error: Exception) -> Callable[[], Any]:
    """A reader that raises."""

    def read() -> Any:  # noqa: ANN401
        raise error

    return read


def sizes(records: Records) -> tuple[int, int, int]:
    """How many records each side has."""
    return len(records.training.y), len(records.holdout.y), len(records.audit.y)


@pytest.fixture
def config(make_config: MakeConfig) -> RunConfig:
    """With all three sides."""
    return make_config(data={"holdout": 0.3, "audit": 0.2})


def test_records_are_read_once(coins: Coins, config: RunConfig) -> None:
    reads = []

    def read() -> Images:
        reads.append(1)
        return images(20)

    one = Site("site-001", read, KEY, coins)
    assert reads == []
    assert one.records(config, SCHEMA) is one.records(config, SCHEMA)
    assert reads == [1]


def test_the_sides_are_the_keyed_split(coins: Coins, config: RunConfig) -> None:
    raw = images(200)
    records = site(raw, coins).records(config, SCHEMA)
    kind = modality(SCHEMA)
    encoded = kind.encode(raw, SCHEMA)
    sides = keyed_split(kind.identities(raw, SCHEMA), KEY, 0.3, 0.2)
    for batch, rows in (
        (records.training, sides.training),
        (records.holdout, sides.holdout),
        (records.audit, sides.audit),
    ):
        assert len(rows)
        assert np.array_equal(batch.x.numpy(), encoded.x[rows])
        assert np.array_equal(batch.y.numpy(), encoded.y[rows])
    assert sum(sizes(records)) == 200


def test_a_record_keeps_its_side_when_others_go(coins: Coins, config: RunConfig) -> None:
    raw = images(200)
    some = modality(SCHEMA).take(raw, np.arange(0, 200, 3))
    whole, part = (site(r, coins).records(config, SCHEMA) for r in (raw, some))
    for side in ("training", "holdout", "audit"):
        of_whole = {image.numpy().tobytes() for image in getattr(whole, side).x}
        assert all(image.numpy().tobytes() in of_whole for image in getattr(part, side).x)


def test_another_key_splits_otherwise(coins: Coins, config: RunConfig) -> None:
    first = site(images(200), coins).records(config, SCHEMA)
    second = site(images(200), coins, key=bytes(32)).records(config, SCHEMA)
    assert not torch.equal(first.training.y, second.training.y)


def test_unusable_records_are_in_no_side(coins: Coins, config: RunConfig) -> None:
    raw = images(50)
    raw.usable[:10] = False
    raw.labels[10:15] = "unknown"
    assert sum(sizes(site(raw, coins).records(config, SCHEMA))) == 35


def test_the_cleaning_report_stays_in_the_sites_folder(
    coins: Coins, config: RunConfig, tmp_path: Path
) -> None:
    raw = images(12)
    raw.usable[:2] = False
    site(raw, coins, tmp_path / "own").records(config, SCHEMA)
    report = json.loads((tmp_path / "own" / "cleaning.json").read_text(encoding="utf-8"))
    assert (report["records"], report["kept"]) == (12, 10)


@pytest.mark.parametrize("error", [DataError("no disk"), OSError("no disk")])
def test_data_that_fail_are_the_callers_to_handle(
    coins: Coins, config: RunConfig, tmp_path: Path, error: Exception
) -> None:
    """Nothing is made up here: `client.app` decides what a site without records sends."""
    own = tmp_path / "own"
    one = Site("site-007", failing(error), KEY, coins, own)
    for _ in range(2):
        with pytest.raises(type(error), match="no disk"):
            one.records(config, SCHEMA)
    assert not own.exists()


def test_a_failed_reading_leaves_nothing_behind(coins: Coins, config: RunConfig) -> None:
    """What a site has after a failure is all of its records, not the beginning of them."""
    outcomes: list[Images] = []

    def read() -> Images:
        outcomes.append(images(50))
        if len(outcomes) == 1:
            raise DataError("no disk")
        return outcomes[-1]

    one = Site("site-007", read, KEY, coins)
    with pytest.raises(DataError, match="no disk"):
        one.records(config, SCHEMA)
    assert sum(sizes(one.records(config, SCHEMA))) == 50


def test_a_site_has_not_failed_yet(coins: Coins, config: RunConfig) -> None:
    one = site(images(20), coins)
    one.records(config, SCHEMA)
    assert one.failed is False


@pytest.mark.parametrize("source", ["sklearn:digits", "sklearn:breast_cancer"])
def test_no_records_are_the_empty_batch(source: str, make_config: MakeConfig, coins: Coins) -> None:
    config = make_config(data={"source": source})
    schema: Schema = run_schema(config)
    nothing = no_records(schema)
    width = (30,) if isinstance(schema, TableSchema) else (1, 8, 8)
    assert nothing.x.shape == (0, *width)
    assert nothing.y.shape == (0,)
    assert nothing.x.dtype == torch.float32
    assert nothing.y.dtype == torch.int64
    # It is what a site whose data are in order has, if it has none.
    kind = modality(schema)
    emptied = kind.take(kind.read(source, schema), np.arange(0))
    training = site(emptied, coins).records(config, schema).training
    assert (training.x.shape, training.x.dtype) == (nothing.x.shape, nothing.x.dtype)
    assert (training.y.shape, training.y.dtype) == (nothing.y.shape, nothing.y.dtype)


def test_no_records_of_colour_images() -> None:
    colour = ImageSchema(height=8, width=12, channels=3, classes=("a", "b"))
    assert no_records(colour).x.shape == (0, 3, 8, 12)


def test_a_site_whose_records_are_all_unusable_has_none(
    coins: Coins, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(data={"source": "sklearn:breast_cancer"})
    schema = run_schema(config)
    assert isinstance(schema, TableSchema)
    raw = pl.DataFrame({c.name: ["nonsense"] * 3 for c in schema.columns})
    one = site(raw, coins, tmp_path / "own")
    assert sizes(one.records(config, schema)) == (0, 0, 0)
    assert one.records(config, schema) is one.records(config, schema)


def test_a_site_without_any_record_has_none(coins: Coins, config: RunConfig) -> None:
    assert sizes(site(images(0), coins).records(config, SCHEMA)) == (0, 0, 0)
