"""How good a synthetic Adult is: classifiers trained on it and tested on real records, and pairs.

Synthetic and real records are treated alike: both are read as a table, cleaned and encoded by the
schema, where a missing category is a level of its own and a number lies in its declared range.
"""

from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np
import polars as pl

from fedveil.config import Clean
from fedveil.data_prep import Encoded, modality
from fedveil.data_prep.schema import Block, TableSchema

PARTS = 10
"""Equal parts of a number's encoded range, in distances."""


def read(path: Path, schema: TableSchema) -> Encoded:
    """The records of a file."""
    return as_encoded(modality(schema).read(str(path), schema), schema)


def as_encoded(table: pl.DataFrame, schema: TableSchema) -> Encoded:
    """The records of a decoded table."""
    kind = modality(schema)
    cleaned, _ = kind.clean(table.cast(pl.String), schema, Clean())
    return kind.encode(cleaned, schema)


def auroc(train: Encoded, test: Encoded, seed: int = 0) -> float:
    """Mean area under the ROC curve of `aurocs`."""
    return fmean(aurocs(train, test, seed).values())


def aurocs(train: Encoded, test: Encoded, seed: int = 0) -> dict[str, float]:
    """By classifier: trained on the one, tested on the other; 0.5 where a class is missing."""
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    models = {
        "logistic": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        "forest": RandomForestClassifier(200, min_samples_leaf=5, random_state=seed),
        "boosting": HistGradientBoostingClassifier(random_state=seed),
    }
    if len(np.unique(train.y)) < 2:
        return dict.fromkeys(models, 0.5)
    found = {}
    for name, model in models.items():
        chances = model.fit(train.x, train.y).predict_proba(test.x)[:, 1]
        found[name] = float(roc_auc_score(test.y, chances))
    return found


def tvd2(one: Encoded, other: Encoded, schema: TableSchema) -> float:
    """Total variation distance of two columns' joint histograms, mean over all pairs of columns.

    A number counts by ten equal parts of its encoded range; the label is a column.
    """
    sizes = [_cells(block) for block in schema.blocks] + [len(schema.classes)]
    ours, theirs = (_places(records, schema) for records in (one, other))
    return fmean(
        _distance(ours[a] * sizes[b] + ours[b], theirs[a] * sizes[b] + theirs[b])
        for a, b in combinations(range(len(sizes)), 2)
    )


def _cells(block: Block) -> int:
    column = block.column
    return column.levels if column.kind == "categorical" else PARTS + column.nullable


def _places(records: Encoded, schema: TableSchema) -> list[np.ndarray]:
    """Which cell each record is in, [N] for each column and the label."""
    found = []
    for block in schema.blocks:
        part = records.x[:, block.start : block.stop]
        if block.column.kind == "categorical":
            found.append(part.argmax(axis=1))
            continue
        place = np.floor(part[:, 0] * PARTS).astype(np.int64).clip(0, PARTS - 1)
        found.append(np.where(part[:, 1] < 0.5, PARTS, place) if block.column.nullable else place)
    return [*found, records.y]


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    size = int(max(ours.max(), theirs.max())) + 1
    shares = [np.bincount(places, minlength=size) / len(places) for places in (ours, theirs)]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)
