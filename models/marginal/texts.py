"""Texts: a log-linear model of the next byte, of pairs, triples and fours of tokens with back-off.

log P(c | o, a, b) = pairs[b, c] + triples[a, b, c] + fours[o, a, b, c] - log of their sum over c,
where pairs are of tokens, and triples and fours of classes of tokens (`queries.texts`). Pairs say
P(c | b); the others say by how much, as a logarithm, what was counted exceeds what the simpler
counts let expect: nought where noise hides it (`counts.shrunk`). A record ends at `length` bytes or
when the token of its end is drawn.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from ...config import MarginalOptions
from ...data_prep.queries import Noisy
from ...data_prep.queries.texts import CLASS_OF, CLASSES, EDGE, HASHED, TOKENS, hashed
from ...data_prep.schema import PADDING, Schema
from ..family import Batch
from ..layers import Table
from .counts import shrunk

_EXACT = 0.5  # counts without noise are smoothed as if they had so much
_RATIO = 6.0  # the most that a count may differ from what was expected, as a logarithm
_FLOOR = -30.0  # of the logarithm of a chance
_PLACES = 16_384  # that are looked at at a time

# What is known of bytes without a look at any: how often, roughly, against one another. UTF-8 has
# none of the last, and of control characters cleaning leaves tabs and line ends only.
_GUESS = np.full(TOKENS, 0.02)
_GUESS[32:127] = 1.0
_GUESS[ord("a") : ord("z") + 1] = 4.0
_GUESS[ord(" ")], _GUESS[ord("\n")] = 16.0, 2.0
_GUESS[[*range(9), *range(11, 32), 127, 0xC0, 0xC1, *range(0xF5, 0x100)]] = 1e-6


class Runs(nn.Module):
    """Logarithms of chances and of ratios of counts, as the module says them."""

    def __init__(self, options: MarginalOptions, schema: Schema) -> None:
        super().__init__()
        self.options, self.schema = options, schema
        self.pairs = Table(TOKENS, TOKENS)
        self.triples = Table(CLASSES, CLASSES, CLASSES)
        self.fours = Table(HASHED)


def build(options: MarginalOptions, schema: Schema) -> Runs:
    """The module for a schema."""
    return Runs(options, schema)


@torch.no_grad()
def fit(
    options: MarginalOptions, schema: Schema, statistics: Noisy, generator: torch.Generator
) -> Runs:
    """Fits it to what was counted, from short runs to long ones; nothing is drawn."""
    del generator
    runs, values = Runs(options, schema), statistics.values
    noise = {name: max(scale, _EXACT) for name, scale in statistics.noise.items()}
    pairs = _pairs(values["bytes"], values["pairs"], noise["bytes"], noise["pairs"])
    chances = pairs / pairs.sum(axis=1, keepdims=True)
    _set(runs.pairs, np.log(chances).clip(min=_FLOOR))
    if "triples" in values:
        expected = _longer(_in_classes(pairs))
        triples = shrunk(values["triples"], expected, noise["triples"])
        _set(runs.triples, _ratio(triples, expected))
        if "fours" in values:
            cells = hashed(np.arange(CLASSES**4))
            expected = np.bincount(cells, _longer(triples).ravel(), minlength=HASHED)
            fours = shrunk(values["fours"], expected, noise["fours"])
            _set(runs.fours, _ratio(fours, expected))
    return runs


def _pairs(bytes_: np.ndarray, pairs: np.ndarray, own: float, noise: float) -> np.ndarray:
    """Counts of pairs [257, 257], > 0, of the noisy ones of tokens and of pairs."""
    # How often a token comes next is known twice: by its own count, and by its column's sum.
    summed = noise * math.sqrt(TOKENS)
    weight = summed**2 / (own**2 + summed**2)
    read = weight * bytes_ + (1 - weight) * pairs.sum(axis=0)
    total = max(float(read.sum()), 1.0)
    own *= math.sqrt(weight)
    tokens = shrunk(read, _guess(read, total, own), own)
    before = tokens.copy()
    before[EDGE] = max(float(pairs[EDGE].sum()), 1.0)
    return shrunk(pairs, np.outer(before, tokens) / before.sum(), noise)


def _guess(read: np.ndarray, total: float, noise: float) -> np.ndarray:
    """Expected counts of tokens; whether there is anything but ASCII shows in the sum of all of it.

    One by one 128 bytes that never occur would each keep a little for what noise may hide.
    """
    guess: np.ndarray = total * _GUESS / _GUESS.sum()
    high = slice(128, EDGE)
    sums = np.array([read[high].sum()]), np.array([guess[high].sum()])
    guess[high] *= shrunk(*sums, noise * math.sqrt(EDGE - 128)) / sums[1]
    return guess


def _in_classes(pairs: np.ndarray) -> np.ndarray:
    """Counts of pairs of tokens as counts of pairs of classes."""
    member = (CLASS_OF[:, None] == np.arange(CLASSES)).astype(np.float64)
    found: np.ndarray = member.T @ pairs @ member
    return found


def _longer(counts: np.ndarray) -> np.ndarray:
    """What counts of runs of classes [..., K] let expect of runs that are longer by one."""
    before = counts.copy()
    edges = (CLASSES - 1,) * (counts.ndim - 1)
    # Before a record's first token there are as many edges as one likes.
    before[(*edges, CLASSES - 1)] = counts[edges].sum()
    chances = counts / counts.sum(axis=-1, keepdims=True)
    longer: np.ndarray = before[..., None] * chances[None]
    return longer


def _ratio(counts: np.ndarray, expected: np.ndarray) -> np.ndarray:
    tiny = np.finfo(np.float64).tiny
    ratio: np.ndarray = np.log(np.maximum(counts, tiny) / np.maximum(expected, tiny))
    return ratio.clip(-_RATIO, _RATIO)


def _set(table: Table, values: np.ndarray) -> None:
    table.values.copy_(torch.from_numpy(values))


@torch.no_grad()
def sample(
    module: nn.Module, n: int, generator: torch.Generator, labels: Tensor | None = None
) -> Batch:
    """N synthetic records, byte by byte; labels [n] are all 0, for texts have no classes."""
    del labels
    runs = _runs(module)
    length = runs.schema.shape[0]
    tokens = torch.full((n, 3 + length), EDGE)
    going = torch.ones(n, dtype=torch.bool)
    for place in range(3, 3 + length):
        rows = going.nonzero()[:, 0]
        for some in torch.split(rows, _PLACES):
            chances = _next(runs, tokens[some, place - 3 : place]).double().exp()
            if place == 3:
                chances[:, EDGE] = 0  # no record is empty
            ends = chances.cumsum(dim=1)
            coins = torch.rand(len(some), 1, generator=generator, dtype=torch.float64)
            drawn = torch.searchsorted(ends, coins * ends[:, -1:], right=True)[:, 0]
            tokens[some, place] = drawn.clamp(max=EDGE - 1 if place == 3 else EDGE)
        going &= tokens[:, place] != EDGE
    return Batch(tokens[:, 3:].float() / PADDING, torch.zeros(n, dtype=torch.int64))


@torch.no_grad()
def scores(module: nn.Module, batch: Batch) -> Tensor:
    """[B] log-likelihoods in nats of all bytes and, of a record that is shorter, of its end."""
    runs = _runs(module)
    tokens = (batch.x * PADDING).round().clamp(0, PADDING).to(torch.int64)
    rows = max(1, _PLACES // tokens.shape[1])
    dtype = runs.pairs.values.dtype
    return torch.cat(
        [torch.zeros(0, dtype=dtype), *(_scored(runs, some) for some in torch.split(tokens, rows))]
    )


def score_bounds(module: nn.Module) -> tuple[float, float]:
    """Bounds of what a score may count for: as if all tokens were alike, and certainty."""
    return -_runs(module).schema.shape[0] * math.log(TOKENS), 0.0


def _scored(runs: Runs, tokens: Tensor) -> Tensor:
    count, length = tokens.shape
    padded = torch.cat([torch.full((count, 3), EDGE), tokens], dim=1)
    context = torch.stack([padded[:, place : place + length] for place in range(3)], dim=2)
    logs = _next(runs, context.view(-1, 3)).view(count, length, TOKENS)
    each = logs.gather(2, tokens[:, :, None])[:, :, 0]
    going = torch.ones(count, length, dtype=torch.bool)
    going[:, 1:] = (tokens != PADDING).cumprod(dim=1)[:, :-1].bool()
    return torch.where(going, each, torch.zeros(())).sum(dim=1)


def _next(runs: Runs, context: Tensor) -> Tensor:
    """Log chances of the next token [M, 257] after the three tokens before it [M, 3]."""
    classes = torch.from_numpy(CLASS_OF)
    far, near, last = classes[context].unbind(dim=1)
    run = ((far * CLASSES + near) * CLASSES + last)[:, None] * CLASSES + torch.arange(CLASSES)
    cells = torch.from_numpy(hashed(run.numpy()))
    ratios = runs.triples.values[near, last] + runs.fours.values[cells]
    logs: Tensor = runs.pairs.values[context[:, 2]] + ratios[:, classes]
    return logs.log_softmax(dim=1)


def _runs(module: nn.Module) -> Runs:
    if not isinstance(module, Runs):
        raise TypeError(f"{type(module).__name__}: is no Runs")
    return module
