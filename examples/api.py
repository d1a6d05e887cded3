"""The Python API from one's own CSV to synthetic records and a comparison of two runs.

A script that is a notebook too: each `# %%` begins a cell (VS Code, PyCharm, Jupytext).
`python examples/api.py` takes half a minute on two cores and writes into a new temporary folder.
"""

# %% [markdown]
# ## Your own table
# scikit-learn's breast cancer data stands in for it, written as a CSV as you would have one.

# %%
import os
import tempfile
from pathlib import Path

import polars as pl
from sklearn.datasets import load_breast_cancer

import fedveil
from fedveil.compare import compare

ROUNDS = int(os.environ.get("FEDVEIL_EXAMPLE_ROUNDS", "100"))
FOLDER = Path(tempfile.mkdtemp(prefix="fedveil-api-"))

COLUMNS = ["mean radius", "mean texture", "mean smoothness", "mean concavity", "worst area"]
data = load_breast_cancer()
names = [str(name) for name in data.feature_names]
table = pl.DataFrame(data.data, schema=names).select(COLUMNS)
diagnosis = pl.Series("diagnosis", ["benign" if code else "malignant" for code in data.target])
table = table.with_columns(diagnosis)
table.write_csv(FOLDER / "mine.csv")
print(table.head(3))

# %% [markdown]
# ## What a record is
# All sites sign one schema. Its bounds and categories come from a code book, from what can be
# measured at all; never from the data. `fedveil data schema mine.csv` drafts one to be confirmed.

# %%
BOUNDS = {
    "mean radius": (5, 30),
    "mean texture": (5, 45),
    "mean smoothness": (0, 0.2),
    "mean concavity": (0, 0.5),
    "worst area": (100, 4500),
}
schema = 'modality = "table"\nlabel = "diagnosis"\n'
for name, (low, high) in BOUNDS.items():
    schema += f'[[column]]\nname = "{name}"\nkind = "numeric"\nbounds = [{low}, {high}]\n'
schema += '[[column]]\nname = "diagnosis"\nkind = "categorical"\n'
schema += 'categories = ["benign", "malignant"]\n'
(FOLDER / "mine.schema.toml").write_text(schema)

# %% [markdown]
# ## One run
# Five simulated hospitals, epsilon 8. `records` is public: a rounded size that may be published.
# Paths in the file are relative to it.

# %%
(FOLDER / "run.toml").write_text(f"""
[federation]
name = "mine"
sites = 5
rounds = {ROUNDS}

[data]
source = "mine.csv"
schema = "mine.schema.toml"
records = 570

[model]
family = "vae"
hidden = 32

[privacy]
epsilon = 8.0
sampling_rate = 1.0              # they are few: all are in each step
""")
run = fedveil.simulate(FOLDER / "run.toml", out=FOLDER / "epsilon-8")

# %% [markdown]
# ## What was promised, and how good it is
# Each figure is accounted for, and has its noise beside it; a total variation its floor, what it
# would read if real and synthetic records were alike.

# %%
for name in ("epsilon", "delta", "mechanism", "against", "unit"):
    print(f"{name:10} {run.privacy[name]}")
for name, figure in run.metrics["quality"].items():
    beside = f"floor {figure['floor']:.3f}" if "floor" in figure else f"+- {figure['noise']:.3f}"
    print(f"{name:24} {figure['value']:8.3f} {beside}")

# %% [markdown]
# ## What happened
# A line a round. `loss` stands in the evaluations, which are made now and then.

# %%
for event in run.events():
    if event["event"] == "evaluated":
        print(f"round {event['round']:4}: epsilon {event['epsilon']:.2f}, loss {event['loss']:.2f}")

# %% [markdown]
# ## Synthetic records
# As many as you like: they cost nothing more. `fedveil sample` writes them with their provenance.

# %%
synthetic = run.sample(len(table), seed=1)
assert isinstance(synthetic, pl.DataFrame)  # noqa: S101  images would come as an array
print(synthetic.head(3))

# %% [markdown]
# ## Against your own records
# From here on figures are exact: they are for you, who hold the records, and NOT PRIVATE.

# %%
print(f"{'':18} {'real mean':>10} {'synthetic':>10}")
for name in COLUMNS:
    real, drawn = (float(frame[name].to_numpy().mean()) for frame in (table, synthetic))
    print(f"{name:18} {real:10.3f} {drawn:10.3f}")
exact = run.evaluate(FOLDER / "mine.csv")
print(f"trained on synthetic, tested on real: AUROC {exact['figures']['tstr_auroc_logistic']:.3f}")

# %% [markdown]
# ## Another epsilon
# Options win over the file. Each run is paid for by itself: over the same records epsilons add up.

# %%
cautious = fedveil.simulate(FOLDER / "run.toml", out=FOLDER / "epsilon-1", privacy={"epsilon": 1.0})

# %% [markdown]
# ## The two side by side
# `fedveil runs compare` prints the same as a table. `best` names a run only where it is better by
# more than chance explains.

# %%
found = compare([run.path, cautious.path])
print("differs:", found.config)
print(f"both together: at most epsilon {found.epsilon:.2f}")
for name, place in found.best.items():
    print(f"{name}: {found.runs[place].path.name} is better")
if not found.best:
    print("no figure differs by more than chance explains")
print(f"all of it is in {FOLDER}")
