"""Quality as sums over records: bounded counts and histograms, which add up over sites.

An evaluation asks every record the same public questions and adds up the answers. The questions
(`Exam`) are made from synthetic records and the released model alone, so that they cost nothing;
each block of answers has L2 norm at most 1 a record, so that all B blocks together have sensitivity
sqrt(B). What can be said of the sums (`figures`) is post-processing.

Where a person is what is hidden, a record's answers are weighted by one over the number of the
person's records: a person's answers are then a mean of vectors of norm at most 1, of norm at most 1
themselves, and sqrt(B) stands for a whole person. Each person counts once: `count` is of persons,
and every figure is a mean over persons of what is found in each one's records.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from ..config import FedveilError
from ..data_prep.schema import ImageSchema, Schema, TextSchema
from . import histograms
from .family import Batch, Family
from .state import Arrays

SLACK = 1.001
"""The noise is for so many times the sensitivity, for what adding up in float64 may round."""

_SCORE_BINS = 12  # of a classifier's score, cut at synthetic quantiles and at one half
_HIDDEN = 64  # units of a classifier's hidden layer
_BOOTSTRAP = 200
_FLOOR_DRAWS = 50


class ExamError(FedveilError):
    """Questions that are none of ours, or that nobody can ask."""


@dataclass(frozen=True)
class Probe:
    """A small classifier that was trained on synthetic records; public.

    Attributes:
        name: What it is.
        layers: Weights [in, out] and biases [out] of each layer; ReLU between them.
        edges: [_SCORE_BINS - 1] ascending cuts of the second class's probability; empty unless
            there are two classes.
    """

    name: str
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    edges: np.ndarray


@dataclass(frozen=True)
class Exam:
    """The questions of one evaluation.

    Attributes:
        probes: Classifiers trained on synthetic records.
        one_way: Synthetic histograms, as `answers` makes them.
        two_way: The same of pairs.
    """

    probes: tuple[Probe, ...]
    one_way: np.ndarray
    two_way: np.ndarray


def blocks(schema: Schema) -> dict[str, tuple[int, ...]]:
    """Name and shape of each block of answers; each has L2 norm at most 1 a record."""
    shapes: dict[str, tuple[int, ...]] = {"count": (1,), "loss": (1,)}
    shapes |= {name: (sum(cells),) for name, cells in _tables(schema).items()}
    if isinstance(schema, TextSchema):
        shapes["characters"] = (1,)
    cells = (2, _SCORE_BINS) if len(schema.classes) == 2 else (2,)
    return shapes | {f"tstr_{name}": cells for name in _probe_names(schema)}


def noise_scale(noise_multiplier: float, schema: Schema) -> float:
    """Standard deviation of the noise of a whole vector of answers."""
    return noise_multiplier * math.sqrt(len(blocks(schema))) * SLACK


def loss_noise_scale(noise_multiplier: float) -> float:
    """The same of count and loss alone, which is all that training records are asked."""
    return noise_multiplier * math.sqrt(2) * SLACK


def size(schema: Schema, records: float = 1.0) -> tuple[int, float]:
    """Coordinates of a vector of answers, and its norm where one unit adds `records` records."""
    length = sum(math.prod(shape) for shape in blocks(schema).values())
    return length, noise_scale(records, schema)


def loss_size() -> tuple[int, float]:
    """The same of count and loss alone."""
    return 2, loss_noise_scale(1.0)


def prepare(synthetic: Batch, schema: Schema, seed: int) -> Exam:
    """Makes the questions from synthetic records: free of any privacy cost.

    Raises:
        ExamError: The records are not finite.
    """
    if not synthetic.x.isfinite().all():
        raise ExamError("synthetic records: are not finite; lower training.learning_rate")
    one_way, two_way = _histograms(synthetic, schema)
    return Exam(tuple(_fit(synthetic, schema, seed)), one_way, two_way)


def answers(
    kind: Family,
    module: nn.Module,
    exam: Exam,
    records: Batch,
    schema: Schema,
    weights: Tensor | None = None,
) -> Arrays:
    """The sums over records, exact: what leaves a site has noise first.

    Each record is answered for by itself, in products of one row. In a larger one the last bit of a
    record's answer hangs on how many others there are, and whoever sends the model or the exam may
    have made that bit decide on a whole answer, of all records at once.

    Args:
        kind: The module's family.
        module: The released model.
        exam: The questions.
        records: [N] records.
        schema: What a record is.
        weights: [N] what each record's answers count, in [0, 1]; `None`: once.

    Returns:
        Float64 by block, as `blocks` says.

    Raises:
        ValueError: A weight is missing or out of range.
    """
    sums = loss_answers(kind, module, records, weights)
    counted = None if weights is None else weights.double().numpy()
    one_way, two_way = _histograms(records, schema, counted)
    sums |= {"one_way": one_way, "two_way": two_way}
    if isinstance(schema, TextSchema):
        sums["characters"] = histograms.characters(records, schema, counted)
    for probe in exam.probes:
        sums[f"tstr_{probe.name}"] = _tested(probe, records, schema, counted)
    return {name: sums[name] for name in blocks(schema)}


def loss_answers(
    kind: Family, module: nn.Module, records: Batch, weights: Tensor | None = None
) -> Arrays:
    """Count and loss alone; the loss is clipped to the family's public bounds, as -1 to 1.

    Raises:
        ValueError: A weight is missing or out of range.
    """
    if weights is not None and (
        weights.shape != records.y.shape or not ((weights >= 0) & (weights <= 1)).all()
    ):
        raise ValueError(f"weights: must be {len(records.y)} numbers from 0 to 1")
    low, high = kind.score_bounds(module)
    scores = torch.cat(
        [torch.zeros(0), *(kind.scores(module, one) for one in _one_by_one(records))]
    )
    scores = scores.double().nan_to_num(nan=low, posinf=low, neginf=low).clamp(low, high)
    losses, count = 1 - 2 * (scores - low) / (high - low), float(len(records.y))
    if weights is not None:
        losses, count = losses * weights.double(), float(weights.double().sum())
    return {"count": np.array([count]), "loss": np.array([float(losses.sum())])}


def figures(
    sums: Mapping[str, np.ndarray], exam: Exam, schema: Schema, bounds: tuple[float, float]
) -> dict[str, float]:
    """What the sums say, each figure kept to its own range.

    Args:
        sums: Exact or noised, of all sites.
        exam: The questions.
        schema: What a record is.
        bounds: The family's public bounds of a score.

    Returns:
        `loss`: the mean clipped negative score; `one_way_tv` and `two_way_tv`: mean total variation
        between real and synthetic histograms; `tstr_accuracy_*` and, for two classes,
        `tstr_auroc_*` of classifiers trained on synthetic records and tested on real ones. Of
        texts, `bits_per_character`: the loss in bits over the number of bytes.
    """
    found = _unbounded(sums, exam, schema, bounds)
    kept = {name: min(max(value, 0.0), 1.0) for name, value in found.items()}
    if "bits_per_character" in found:
        kept["bits_per_character"] = max(found["bits_per_character"], 0.0)
    return kept | {"loss": mean_loss(sums, bounds)}


def _unbounded(
    sums: Mapping[str, np.ndarray], exam: Exam, schema: Schema, bounds: tuple[float, float]
) -> dict[str, float]:
    """The figures as the sums say them; noise may carry them out of their ranges."""
    found = {"loss": _raw_loss(sums, bounds)}
    if isinstance(schema, TextSchema):
        found["bits_per_character"] = found["loss"] / math.log(2) / _characters(sums, schema)
    for name, cells in _tables(schema).items():
        found[f"{name}_tv"] = _variation(sums[name], getattr(exam, name), cells)
    for probe in exam.probes:
        tested = sums[f"tstr_{probe.name}"]
        if len(schema.classes) == 2:
            middle = int(np.searchsorted(probe.edges, 0.5)) + 1
            right = tested[0, :middle].sum() + tested[1, middle:].sum()
            found[f"tstr_auroc_{probe.name}"] = _auroc(tested)
        else:
            right = tested[1]
        found[f"tstr_accuracy_{probe.name}"] = float(right) / _count(sums)
    return found


def mean_loss(sums: Mapping[str, np.ndarray], bounds: tuple[float, float]) -> float:
    """The mean clipped negative score, within its bounds."""
    low, high = bounds
    return min(max(_raw_loss(sums, bounds), -high), -low)


def _raw_loss(sums: Mapping[str, np.ndarray], bounds: tuple[float, float]) -> float:
    low, high = bounds
    return -high + (float(sums["loss"][0]) / _count(sums) + 1) / 2 * (high - low)


def _count(sums: Mapping[str, np.ndarray]) -> float:
    return max(float(sums["count"][0]), 1.0)


def _characters(sums: Mapping[str, np.ndarray], schema: Schema) -> float:
    """How many bytes a text has, in the mean; one at least."""
    return max(float(sums["characters"][0]) / _count(sums) * schema.shape[0], 1.0)


def noise_of_figures(
    sums: Mapping[str, np.ndarray],
    scales: Mapping[str, float],
    exam: Exam,
    schema: Schema,
    bounds: tuple[float, float],
) -> dict[str, float]:
    """Standard deviation of each figure by the noise of its sums, by a parametric bootstrap.

    It is drawn around the noised sums, from public randomness: post-processing.

    Args:
        sums: The noised sums.
        scales: Standard deviation of the noise by block.
        exam: See `figures`.
        schema: See `figures`.
        bounds: See `figures`.
    """
    # Before they are kept to their ranges: a figure at the end of its range is as noisy as any.
    drawn = [_unbounded(again, exam, schema, bounds) for again in _redrawn(sums, scales)]
    return {name: float(np.std([each[name] for each in drawn])) for name in drawn[0]}


def floors(
    sums: Mapping[str, np.ndarray], scales: Mapping[str, float], exam: Exam, schema: Schema
) -> dict[str, float]:
    """What each total variation would read if real records were drawn from the synthetic ones.

    A total variation is never below what noise and the few records make of it: near its floor it
    says nothing. Drawn from public randomness, as `noise_of_figures` is; where persons are counted,
    as if each had one record, which makes it too high rather than too low. Texts are taken as if
    their bytes had nothing to do with one another.

    Args:
        sums: The noised sums.
        scales: Standard deviation of the noise by block.
        exam: See `figures`.
        schema: See `figures`.
    """
    rng, found = np.random.default_rng(0), {}
    count = draws = max(int(sums["count"][0]), 1)
    if isinstance(schema, TextSchema):
        draws = int(count * _characters(sums, schema))
    for name, cells in _tables(schema).items():
        synthetic = getattr(exam, name)
        parts = np.split(synthetic, np.cumsum(cells)[:-1])
        drawn = []
        for _ in range(_FLOOR_DRAWS):
            drawn_parts = [rng.multinomial(draws, histograms.shares(part)) for part in parts]
            alike = histograms.joined(drawn_parts) * (count / draws)
            noised = alike + rng.normal(0, scales[name], alike.shape)
            drawn.append(_variation(noised, synthetic, cells))
        found[f"{name}_tv"] = float(np.mean(drawn))
    return found


def noise_of_loss(
    sums: Mapping[str, np.ndarray], scales: Mapping[str, float], bounds: tuple[float, float]
) -> float:
    """The same of `mean_loss` alone."""
    return float(np.std([_raw_loss(again, bounds) for again in _redrawn(sums, scales)]))


def _redrawn(
    sums: Mapping[str, np.ndarray], scales: Mapping[str, float]
) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for _ in range(_BOOTSTRAP):
        yield {name: a + rng.normal(0, scales[name], a.shape) for name, a in sums.items()}


def exam_to_arrays(exam: Exam) -> Arrays:
    """The probes as arrays, to be sent; a site needs no more of an exam."""
    arrays: Arrays = {}
    for probe in exam.probes:
        for index, (weights, biases) in enumerate(probe.layers):
            arrays[f"{probe.name}/weights/{index}"] = weights
            arrays[f"{probe.name}/biases/{index}"] = biases
        arrays[f"{probe.name}/edges"] = probe.edges
    return arrays


def exam_from_arrays(arrays: Mapping[str, np.ndarray], schema: Schema) -> Exam:
    """Reads what `exam_to_arrays` made, without the synthetic histograms.

    Raises:
        ExamError: The arrays are no probes for this schema.
    """
    probes = tuple(_probe(name, arrays, schema) for name in _probe_names(schema))
    known = exam_to_arrays(Exam(probes, np.zeros(0), np.zeros(0)))
    if known.keys() != arrays.keys():
        raise ExamError("exam: expected the arrays of its probes only")
    return Exam(probes, np.zeros(0), np.zeros(0))


def _probe(name: str, arrays: Mapping[str, np.ndarray], schema: Schema) -> Probe:
    layers = []
    for index, (inputs, outputs) in enumerate(pairwise(_widths(name, schema))):
        weights = arrays.get(f"{name}/weights/{index}")
        biases = arrays.get(f"{name}/biases/{index}")
        # Exactly so: sizes of the sender's choice could make a site fail by its number of records.
        if weights is None or biases is None or (weights.shape, biases.shape) != (
            (inputs, outputs), (outputs,),
        ):  # fmt: skip
            raise ExamError(f"exam: {name}: layer {index}: expected {inputs} x {outputs}")
        layers.append((weights, biases))
    edges = arrays.get(f"{name}/edges")
    cuts = _SCORE_BINS - 1 if len(schema.classes) == 2 else 0
    if edges is None or edges.shape != (cuts,) or not (edges[1:] >= edges[:-1]).all():
        raise ExamError(f"exam: {name}: edges: expected {cuts} ascending")
    return Probe(name, tuple(layers), edges)


def _widths(name: str, schema: Schema) -> tuple[int, ...]:
    """Sizes of a probe, from its input to its output."""
    hidden = {"logistic": (), "mlp": (_HIDDEN,)}[name]
    return (math.prod(schema.shape), *hidden, len(schema.classes))


def _probe_names(schema: Schema) -> tuple[str, ...]:
    """The classifiers: a linear one is too weak for images, and one of two views of a table."""
    if not schema.classes:
        return ()
    return ("mlp",) if isinstance(schema, ImageSchema) else ("logistic", "mlp")


def _fit(synthetic: Batch, schema: Schema, seed: int) -> Iterator[Probe]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    features = synthetic.x.flatten(1).double()
    x, y = features.numpy(), synthetic.y.numpy()
    for name in _probe_names(schema):
        if len(np.unique(y)) < 2:
            layers = _constant(_widths(name, schema), int(y[0]))
        else:
            model = (
                LogisticRegression(max_iter=300)
                if name == "logistic"
                else MLPClassifier(
                    (_HIDDEN,),
                    learning_rate_init=3e-3,
                    batch_size=min(128, len(y)),
                    max_iter=15,
                    random_state=seed,
                )
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(x, y)
            layers = _layers(model, len(schema.classes))
        probe = Probe(name, layers, np.zeros(0))
        if len(schema.classes) == 2:
            ranks = np.arange(1, _SCORE_BINS - 1) / (_SCORE_BINS - 1)
            cuts = np.quantile(_classifier(probe)(features)[:, 1].numpy(), ranks)
            probe = Probe(name, layers, np.sort(np.append(cuts, 0.5)))
        yield probe


def _layers(model: object, classes: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """A scikit-learn classifier's layers, with one output for each declared class."""
    if hasattr(model, "coefs_"):
        layers = list(zip(model.coefs_, model.intercepts_, strict=True))  # type: ignore[attr-defined]
    else:
        layers = [(model.coef_.T, model.intercept_)]  # type: ignore[attr-defined]
    weights, biases = layers[-1]
    if weights.shape[1] == 1:  # two classes share one output: the first one's is 0
        weights = np.hstack([np.zeros_like(weights), weights])
        biases = np.concatenate([np.zeros(1), biases])
    seen = model.classes_  # type: ignore[attr-defined]
    whole = np.zeros((len(weights), classes))
    offsets = np.full(classes, -1e9)  # a class that was never drawn is never predicted
    whole[:, seen], offsets[seen] = weights, biases
    return (*layers[:-1], (whole, offsets))


def _constant(widths: Sequence[int], label: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """What is learnt where every synthetic record has one label."""
    layers = [(np.zeros((a, b)), np.zeros(b)) for a, b in pairwise(widths)]
    layers[-1][1][:] = -1e9
    layers[-1][1][label] = 0
    return tuple(layers)


def _one_by_one(records: Batch) -> Iterator[Batch]:
    """Each record in memory of its own: even how a row is aligned may decide on its last bit."""
    for index in range(len(records.y)):
        yield Batch(*(values[index : index + 1].clone() for values in records))


def _classifier(probe: Probe) -> Callable[[Tensor], Tensor]:
    """X [N, width] float64 -> [N, classes] probabilities."""
    layers = [[torch.from_numpy(part.copy()).double() for part in layer] for layer in probe.layers]

    def chances(x: Tensor) -> Tensor:
        for index, (weights, biases) in enumerate(layers):
            x = torch.addmm(biases, x.relu() if index else x, weights)
        return x.softmax(dim=1)

    return chances


def _tested(
    probe: Probe, records: Batch, schema: Schema, weights: np.ndarray | None = None
) -> np.ndarray:
    """Of two classes [class, score bin] counts, of more [wrong, right]."""
    classify = _classifier(probe)
    rows = [classify(one.x.flatten(1).double()) for one in _one_by_one(records)]
    chances = torch.cat([torch.zeros(0, len(schema.classes)), *rows]).numpy()
    y = records.y.numpy()
    if len(schema.classes) != 2:
        right = (chances.argmax(axis=1) == y).astype(np.int64)
        return np.bincount(right, weights, minlength=2).astype(np.float64)
    # Not `searchsorted`, which takes its bracket from one record to the next.
    bins = (chances[:, 1:] >= probe.edges).sum(axis=1)
    cells = np.bincount(y * _SCORE_BINS + bins, weights, minlength=2 * _SCORE_BINS)
    return cells.astype(np.float64).reshape(2, _SCORE_BINS)


def _pairs(schema: Schema) -> list[tuple[int, int]]:
    """The pairs of columns that are looked at: each with the label, else with the next one."""
    last = len(histograms.levels(schema)) - 1
    if schema.classes:
        return [(column, last) for column in range(last)]
    return [(column, column + 1) for column in range(last)]


def _tables(schema: Schema) -> dict[str, list[int]]:
    """Cells of each histogram by block: of every column, and of every pair that is looked at."""
    levels = histograms.levels(schema)
    tables = {"one_way": levels, "two_way": [levels[a] * levels[b] for a, b in _pairs(schema)]}
    return {name: cells for name, cells in tables.items() if cells}


def _histograms(
    records: Batch, schema: Schema, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One- and two-way counts of records [N], each vector of L2 norm 1 (or its weight) a record."""
    found, sizes = histograms.cells(records, schema), histograms.levels(schema)
    two = [
        np.bincount(found[a] * sizes[b] + found[b], weights, minlength=sizes[a] * sizes[b])
        for a, b in _pairs(schema)
    ]
    return histograms.one_way(records, schema, weights), histograms.joined(two)


def _variation(real: np.ndarray, synthetic: np.ndarray, cells: Sequence[int]) -> float:
    """Mean total variation over the histograms that stand one after another, [0, 1]."""
    ends = np.cumsum(cells)[:-1]
    pairs = zip(np.split(real, ends), np.split(synthetic, ends), strict=True)
    shares = histograms.shares
    return float(np.mean([np.abs(shares(a) - shares(b)).sum() / 2 for a, b in pairs]))


def _auroc(tested: np.ndarray) -> float:
    """Area under the ROC curve of [class, score bin] counts; ties count one half.

    Counts below zero stay: cut off bin by bin they would pull a good classifier towards one half.
    """
    negatives, positives = tested
    below = np.cumsum(negatives) - negatives
    pairs = max(float(negatives.sum()), 0.0) * max(float(positives.sum()), 0.0)
    return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else 0.5
