"""Strategies: what the server does with one round's replies. Pairs of functions (init, apply)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..config import RunConfig, StrategyName
from ..config.options import LEAST_NORM, MOST_NORM

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ServerState:
    """All that the server carries from round to round. Nothing in it is changed in place.

    Attributes:
        round: The plan's round that was applied last; 0 for none.
        steps: Rounds applied: fewer than `round` where some were lost in a crash.
        model: The parameters that the next round starts from.
        average: Their exponential moving average, which is what is released at the end.
        first: First moments, of `adam` and `fedadam`; empty for others.
        second: Second moments, of the same.
        clipping_norm: The bound of the sites' updates, where that follows them; else 0.
    """

    round: int
    steps: int
    model: Arrays
    average: Arrays
    first: Arrays
    second: Arrays
    clipping_norm: float = 0.0


@dataclass(frozen=True)
class Strategy:
    """One way to use the sites' replies.

    Attributes:
        init: model -> state.
        apply: (state, combined, config) -> the state one step on; its round is the caller's to set.
            Combined is the noised sum of gradients over the expected batch or, where sites train,
            one change of the model out of theirs.
        combine: The sites' changes -> that one. Theirs, or their sum, are noised already where
            there is noise at all, so that nothing done with them costs any more privacy.
    """

    init: Callable[[Arrays], ServerState]
    apply: Callable[[ServerState, Arrays, RunConfig], ServerState]
    combine: Callable[[Sequence[Arrays]], Arrays]


def summed(parts: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The sum of arrays by name, in the order given, accumulated in float64."""
    total: dict[str, np.ndarray] = {}
    for part in parts:
        for name, array in part.items():
            total[name] = total[name] + array if name in total else array.astype(np.float64)
    return total


def scaled(arrays: Mapping[str, np.ndarray], factor: float) -> dict[str, np.ndarray]:
    """Arrays times a number, as float32."""
    return {name: (array * factor).astype(np.float32) for name, array in arrays.items()}


def mean(changes: Sequence[Arrays]) -> Arrays:
    """The uniform mean: record counts are private, so that they weigh nothing."""
    return scaled(summed(changes), 1 / len(changes))


def median(changes: Sequence[Arrays]) -> Arrays:
    """The median of each coordinate (Yin et al. 2018, definition 1).

    Fewer than half of the sites, whatever they send, cannot move a coordinate beyond the others'.
    """
    return {
        name: np.median([change[name] for change in changes], axis=0).astype(np.float32)
        for name in changes[0]
    }


def init_plain(model: Arrays) -> ServerState:
    """A state without moments."""
    return ServerState(0, 0, dict(model), dict(model), {}, {})


def init_adam(model: Arrays) -> ServerState:
    """A state with zero moments."""
    zeros = {name: np.zeros_like(array) for name, array in model.items()}
    return ServerState(0, 0, dict(model), dict(model), zeros, dict(zeros))


_FEDADAM_FLOOR = 1e-3  # tau of the paper: how adaptive it is


def init_fedadam(model: Arrays) -> ServerState:
    """A state with the paper's moments: first 0, second tau^2."""
    state = init_adam(model)
    floor = np.float32(_FEDADAM_FLOOR**2)
    return replace(state, second={n: np.full_like(a, floor) for n, a in model.items()})


def apply_sgd(state: ServerState, mean: Arrays, config: RunConfig) -> ServerState:
    """A step of gradient descent."""
    rate = np.float32(config.learning_rate)
    model = {name: w - rate * mean[name] if name in mean else w for name, w in state.model.items()}
    return _averaged(replace(state, steps=state.steps + 1, model=model), config)


def apply_adam(
    state: ServerState, mean: Arrays, config: RunConfig, beta1: float = 0.9, beta2: float = 0.999
) -> ServerState:
    """A step of Adam (Kingma and Ba 2015, algorithm 1) with epsilon 1e-8."""
    step = state.steps + 1
    first, second, model = dict(state.first), dict(state.second), dict(state.model)
    for name, gradient in mean.items():
        first[name] = beta1 * first[name] + (1 - beta1) * gradient
        second[name] = beta2 * second[name] + (1 - beta2) * np.square(gradient)
        direction = (first[name] / (1 - beta1**step)) / (
            np.sqrt(second[name] / (1 - beta2**step)) + 1e-8
        )
        model[name] = (model[name] - config.learning_rate * direction).astype(np.float32)
    stepped = replace(state, steps=step, model=model, first=first, second=second)
    return _averaged(stepped, config)


def apply_change(state: ServerState, combined: Arrays, config: RunConfig) -> ServerState:
    """Takes the combined change as it is (with `mean`: McMahan et al. 2017, without weights)."""
    del config
    # What is frozen is not sent, and stays.
    changed = {name: state.model[name] + change for name, change in combined.items()}
    model = {**state.model, **changed}
    return replace(state, steps=state.steps + 1, model=model, average=model)


def apply_fedadam(
    state: ServerState, combined: Arrays, config: RunConfig, beta1: float = 0.9, beta2: float = 0.99
) -> ServerState:
    """A step of Adam on the mean change (Reddi et al. 2021, algorithm 2), without its weights.

    As there, moments are not corrected for their start, and the floor is outside the root.
    """
    first, second, model = dict(state.first), dict(state.second), dict(state.model)
    for name, change in combined.items():
        first[name] = beta1 * first[name] + (1 - beta1) * change
        second[name] = beta2 * second[name] + (1 - beta2) * np.square(change)
        step = first[name] / (np.sqrt(second[name]) + _FEDADAM_FLOOR)
        rate = config.aggregation.server_learning_rate
        model[name] = (model[name] + rate * step).astype(np.float32)
    stepped = replace(state, steps=state.steps + 1, model=model, first=first, second=second)
    return _averaged(stepped, config)


_CLIPPING_RATE = 0.2  # eta_C of the paper


def adapted(state: ServerState, within: float, config: RunConfig) -> ServerState:
    """Moves the clipping norm towards its quantile (Andrew et al. 2021, algorithm 1).

    Args:
        state: Its `clipping_norm` was in force.
        within: The noised share of updates that were below it.
        config: Says which quantile.
    """
    step = -_CLIPPING_RATE * (min(max(within, 0.0), 1.0) - config.privacy.clipping_quantile)
    norm = min(max(state.clipping_norm * math.exp(step), LEAST_NORM), MOST_NORM)
    return replace(state, clipping_norm=norm)


def _averaged(state: ServerState, config: RunConfig) -> ServerState:
    """Moves the average; its decay warms up, or it would remember the initial weights."""
    decay = np.float32(min(config.training.ema, state.steps / (state.steps + 9)))
    if config.training.ema == 0:
        return replace(state, average=state.model)
    average = {
        name: decay * state.average[name] + (1 - decay) * weights
        for name, weights in state.model.items()
    }
    return replace(state, average=average)


STRATEGIES: Mapping[StrategyName, Strategy] = {
    "sgd": Strategy(init_plain, apply_sgd, mean),
    "adam": Strategy(init_adam, apply_adam, mean),
    "fedavg": Strategy(init_plain, apply_change, mean),
    "fedprox": Strategy(init_plain, apply_change, mean),
    "fedadam": Strategy(init_fedadam, apply_fedadam, mean),
    "median": Strategy(init_plain, apply_change, median),
}
