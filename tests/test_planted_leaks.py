"""Ways to leak that were planted on purpose: each is refused, or caught.

That exact frequencies are caught, `client/test_statistics_test.py` shows; that what is said of the
data hangs on the noisy vector alone, `server/test_description.py` and `server/test_statistics.py`.
"""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedveil
from fedveil.config import RunConfig, Statistics
from fedveil.data_prep.queries import noisy, workload
from fedveil.data_prep.schema import parse_schema
from fedveil.models import family
from fedveil.models.layers import initialise
from fedveil.models.scaling import Scaling, learn
from fedveil.models.state import to_arrays
from fedveil.server.warm_start import begin

Call = Callable[..., Any]
ROOT = Path(fedveil.__file__).parent
RUN = """
[data]
source = "records.csv"
schema = "draft.schema.toml"
records = 100
[model]
family = "marginal"
"""


def test_what_was_read_off_a_table_is_refused(call: Call, tmp_path: Path) -> None:
    """Bounds and categories: no run takes a draft that nobody has confirmed."""
    (tmp_path / "records.csv").write_text("age,colour\n" + "31,red\n52,blue\n" * 30, "utf-8")
    drafted = call("data", "schema", "records.csv", "-o", "draft.schema.toml")
    assert drafted.code == 0, drafted.err
    (tmp_path / "run.toml").write_text(RUN, encoding="utf-8")
    found = call("simulate", "run.toml", "--out", "run")
    assert found.code == 2
    assert "unconfirmed" in found.err
    assert not (tmp_path / "run").exists()


def test_nothing_is_read_off_a_text(call: Call, tmp_path: Path) -> None:
    """No alphabet, no vocabulary, no length: two texts have one draft."""
    drafts: list[str] = []
    for text in ("To be or not to be.\n" * 30, "Жил-был серенький козлик\n"):
        (tmp_path / "text.txt").write_text(text, encoding="utf-8")
        drafted = call("data", "schema", "text.txt", "-o", f"draft{len(drafts)}.toml")
        assert drafted.code == 0, drafted.err
        drafts.append((tmp_path / f"draft{len(drafts)}.toml").read_text(encoding="utf-8"))
    assert drafts[0] == drafts[1]


def imported(folder: str) -> set[str]:
    """Names that the modules of a package import from anywhere."""
    found = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                found |= {alias.name for alias in node.names} | {node.module or ""}
    return found


@pytest.mark.parametrize("folder", ["client", "data_prep"])
def test_no_site_learns_how_to_impute_or_scale_from_its_records(folder: str) -> None:
    """What a network is given for a missing number comes with the model, out of noisy sums."""
    assert not imported(folder) & {"learn", "Scaling", "models.scaling", "scaling"}


def test_no_tokenizer_or_encoder_is_fitted_to_data() -> None:
    """No vocabulary, no category encoder, no scaler of scikit-learn's at a site."""
    names = {name for folder in ("client", "data_prep") for name in imported(folder)}
    fitted = {
        "StandardScaler",
        "OneHotEncoder",
        "CountVectorizer",
        "KBinsDiscretizer",
        "GaussianMixture",
    }
    assert not names & fitted
    assert not {name for name in names if name.startswith("sklearn") and name != "sklearn.datasets"}


COLUMNS = [
    {"name": "age", "kind": "integer", "bounds": [0, 100]},
    {"name": "dose", "kind": "numeric", "bounds": [0, 10], "nullable": True},
    {"name": "sick", "kind": "categorical", "categories": ["no", "yes"]},
]
SCHEMA = parse_schema({"column": COLUMNS, "label": "sick"}, "test")


def test_a_prepared_model_hangs_on_the_noisy_vector_alone() -> None:
    """Post-processing: nothing else of the records can get into what rounds begin with."""
    raw = {
        "data": {"source": "records.csv", "records": 500},
        "model": {"family": "vae", "warm_start": False},
        "privacy": {"statistics_share": 0.5},
    }
    config = RunConfig.model_validate(raw)
    asked = workload(SCHEMA, Statistics(), 500, 1.0)
    vector = np.random.default_rng(3).normal(20, 5, asked.length)
    module = family("vae").build(config.model, SCHEMA)
    initialise(module, torch.Generator().manual_seed(0))
    first, again, other = (
        begin(config, SCHEMA, noisy(asked, values, 5.0, 500.0), to_arrays(module)).model
        for values in (vector, vector.copy(), vector[::-1].copy())
    )
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


def test_what_stands_for_a_missing_number_is_no_mean_of_anybodys() -> None:
    """It is the median's place, a constant; where that lies, the noisy histogram says."""
    asked = workload(SCHEMA, Statistics(), 500, 1.0)
    for seed in (1, 2):
        vector = np.random.default_rng(seed).normal(20, 5, asked.length)
        scaling = Scaling(SCHEMA)  # type: ignore[arg-type]
        learn(scaling, noisy(asked, vector, 0.1, 500.0), SCHEMA)  # type: ignore[arg-type]
        assert set(scaling.fill.tolist()) <= {0.0, 0.5}
