"""Strategies: what the server does with one round's mean. Pairs of pure functions (init, apply)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..config import RunConfig, StrategyName

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class ServerState:
    """All that the server carries from round to round. Nothing in it is changed in place.

    Attributes:
        round: The plan's round that was applied last; 0 for none.
        steps: Rounds applied: fewer than `round` where some were lost in a crash.
        model: The parameters that the next round starts from.
        average: Their exponential moving average, which is what is released at the end.
        first: Adam's first moments; empty for others.
        second: Adam's second moments; empty for others.
    """

    round: int
    steps: int
    model: Arrays
    average: Arrays
    first: Arrays
    second: Arrays


@dataclass(frozen=True)
class Strategy:
    """One way to use the sites' replies.

    Attributes:
        replies: What a site sends: a gradient sum, or its model after local steps.
        init: model -> state.
        apply: (state, mean, config) -> the state one step on; its round is the caller's to set. The
            mean is the noised sum of gradients over the expected batch, or the uniform mean of the
            sites' models.
    """

    replies: Literal["gradients", "models"]
    init: Callable[[Arrays], ServerState]
    apply: Callable[[ServerState, Arrays, RunConfig], ServerState]


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


def init_plain(model: Arrays) -> ServerState:
    """A state without moments."""
    return ServerState(0, 0, dict(model), dict(model), {}, {})


def init_adam(model: Arrays) -> ServerState:
    """A state with zero moments."""
    zeros = {name: np.zeros_like(array) for name, array in model.items()}
    return ServerState(0, 0, dict(model), dict(model), zeros, dict(zeros))


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
    stepped = ServerState(state.round, step, model, state.average, first, second)
    return _averaged(stepped, config)


def apply_fedavg(state: ServerState, mean: Arrays, config: RunConfig) -> ServerState:
    """The uniform mean of the sites' models (McMahan et al. 2017, without weights by size).

    Record counts are private, so that they weigh nothing.
    """
    del config
    # What is frozen is not sent, and stays.
    model = {**state.model, **mean}
    return ServerState(state.round, state.steps + 1, model, model, {}, {})


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
    "sgd": Strategy("gradients", init_plain, apply_sgd),
    "adam": Strategy("gradients", init_adam, apply_adam),
    "fedavg": Strategy("models", init_plain, apply_fedavg),
}
