"""The round loop: send the model, collect replies, add the server's noise, step, store."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import FedveilError, RunConfig
from ..data_prep.schema import Schema, schema_to_json
from ..flower import Grid, Message
from ..models import family
from ..models.layers import initialise
from ..models.state import Arrays, StateError, check_arrays, load_arrays, to_arrays, to_bytes
from ..privacy.mechanism import MECHANISMS
from ..privacy.noise import Coins
from ..privacy.plan import Plan, plan
from ..wire import TRAIN, Refused, Task, WireError, pack, read_reply
from .aggregation import STRATEGIES, ServerState
from .store import Event, RunFolder

Observer = Callable[[Event], None]


class RunError(FedveilError):
    """A run that cannot go on."""


@dataclass(frozen=True)
class Replies:
    """One round's replies: usable ones in site order, and why the others are not."""

    usable: tuple[Arrays, ...]
    dropped: Mapping[int, str]


def train(
    grid: Grid,
    config: RunConfig,
    schema: Schema,
    run_id: str,
    folder: RunFolder,
    observe: Observer,
) -> None:
    """Runs all rounds and writes the run folder.

    Args:
        grid: Reaches the sites.
        config: The resolved configuration.
        schema: What a record is.
        run_id: Names the run in every message.
        folder: Where everything is kept; it exists.
        observe: Sees every event as it is written.

    Raises:
        RunError: Too few usable replies. The folder keeps the last whole state.
    """
    start = time.perf_counter()
    module = family(config.model.family).build(config.model, schema)
    initialise(module, torch.Generator().manual_seed(config.federation.seed))
    nodes = tuple(sorted(grid.get_node_ids()))
    run = _Run(grid, nodes, config, schema, run_id, folder, observe, plan(config), module)
    state = STRATEGIES[config.strategy].init(to_arrays(module))
    run.tell("run", run_id=run_id, privacy=run.priced.as_dict(), sites=len(nodes))
    try:
        coins = Coins.from_system()
        while state.round < run.priced.rounds:
            state, facts = _round(run, state, coins)
            run.tell("round", **facts)
    except BaseException as error:
        # A run that stops early is charged its plan. Only our own errors have a text that is ours.
        cause = str(error) if isinstance(error, FedveilError) else type(error).__name__
        run.tell("failed", round=state.round, epsilon=run.priced.epsilon, cause=cause)
        raise
    total = round(time.perf_counter() - start, 3)
    metrics = _metrics(run, state, total)
    facts = {"run_id": run_id, "family": config.model.family, "privacy": metrics["privacy"]}
    folder.write("model.safetensors", to_bytes(state.average, facts))
    folder.write_json("metrics.json", metrics)
    run.tell("finished", rounds=state.round, seconds=total)


@dataclass(frozen=True)
class _Run:
    """What stays the same from round to round; `module` only lends its structure."""

    grid: Grid
    nodes: tuple[int, ...]
    config: RunConfig
    schema: Schema
    run_id: str
    folder: RunFolder
    observe: Observer
    priced: Plan
    module: nn.Module

    def tell(self, event: str, **facts: Any) -> None:  # noqa: ANN401
        line = {"event": event, **facts}
        self.folder.append(line)
        self.observe(line)


def _round(run: _Run, state: ServerState, coins: Coins) -> tuple[ServerState, dict[str, Any]]:
    """One round: the state after it, stored, and what may be told of it."""
    began = time.perf_counter()
    replies = _ask(run, state)
    _enough(replies, state.round + 1, run)
    asked = time.perf_counter()
    state = advance(state, replies, run.module, run.config, run.priced, coins)
    _still_finite(state)
    # The checkpoint comes before the event: a round that was told of is never lost.
    run.folder.save_checkpoint(state, {"run_id": run.run_id})
    return state, {
        "round": state.round,
        "epsilon": run.priced.epsilon_after(state.round),
        "sites": len(replies.usable),
        "dropped": [{"site": n, "reason": why} for n, why in replies.dropped.items()],
        "seconds": _seconds(sites=asked - began, server=time.perf_counter() - asked),
    }


def advance(
    state: ServerState,
    replies: Replies,
    module: nn.Module,
    config: RunConfig,
    priced: Plan,
    coins: Coins,
) -> ServerState:
    """Applies one round's usable replies.

    Formal guarantee: under `central` only the noised sum is used from here on. The divisor is the
    public expected batch, whatever came.
    """
    strategy = STRATEGIES[config.strategy]
    if strategy.replies == "models":
        return strategy.apply(
            state, scaled(summed(replies.usable), 1 / len(replies.usable)), config
        )
    # The one place where a trusted server's noise comes in; nothing un-noised is kept after it.
    total = MECHANISMS[priced.mechanism].at_server(summed(replies.usable), priced, coins)
    mean = scaled(total, 1 / priced.expected_batch)
    kind = family(config.model.family)
    load_arrays(module, state.model)
    tensors = {name: torch.from_numpy(array) for name, array in mean.items()}
    stepped = kind.server_step(module, tensors, coins.generator())
    return strategy.apply(state, {n: t.numpy() for n, t in stepped.items()}, config)


def summed(parts: Iterable[Mapping[str, np.ndarray]]) -> Arrays:
    """The sum of arrays by name, in the order given, accumulated in float64."""
    total: Arrays = {}
    for part in parts:
        for name, array in part.items():
            total[name] = total[name] + array if name in total else array.astype(np.float64)
    return total


def scaled(arrays: Mapping[str, np.ndarray], factor: float) -> Arrays:
    """Arrays times a number, as float32."""
    return {name: (array * factor).astype(np.float32) for name, array in arrays.items()}


def usable_replies(
    replies: Iterable[Message],
    nodes: Iterable[int],
    run_id: str,
    number: int,
    like: Mapping[str, np.ndarray],
) -> Replies:
    """Sorts one round's replies into usable ones, in site order, and reasons for the others.

    A reply is usable if it is its site's only one, for this run and round, with arrays of exactly
    the expected names, shapes and type, all finite. No text that a site wrote is passed on.
    """
    usable: dict[int, Arrays] = {}
    dropped: dict[int, str] = {}
    known = set(nodes)
    # Who replied first must not matter: sums of floats depend on their order.
    for message in replies:
        node = message.metadata.src_node_id
        if node not in known:
            continue
        if node in usable or node in dropped:
            usable.pop(node, None)
            dropped[node] = "replied twice"
            continue
        try:
            reply = read_reply(message)
            if (reply.run_id, reply.round) != (run_id, number):
                raise WireError("is for another run or round")
            if isinstance(reply, Refused):
                raise WireError(f"refused: {reply.code.value}")
            check_arrays(reply.arrays, like)
            usable[node] = dict(reply.arrays)
        except (WireError, StateError) as error:
            dropped[node] = str(error)
    dropped |= dict.fromkeys(known - usable.keys() - dropped.keys(), "no reply")
    return Replies(tuple(usable[n] for n in sorted(usable)), dict(sorted(dropped.items())))


def _ask(run: _Run, state: ServerState) -> Replies:
    config, number = run.config, state.round + 1
    task = Task(
        run.run_id,
        number,
        config.model_dump_json(by_alias=True),
        schema_to_json(run.schema),
        state.model,
    )
    messages = [Message(pack(task), node, TRAIN, group_id=str(number)) for node in run.nodes]
    names = family(config.model.family).trainable(run.module)
    like = {name: state.model[name] for name in names}
    if STRATEGIES[config.strategy].replies == "gradients":
        # Sums come as float64: the rounding of a sum to float32 would add to its sensitivity.
        like = {name: array.astype(np.float64) for name, array in like.items()}
    return usable_replies(run.grid.send_and_receive(messages), run.nodes, run.run_id, number, like)


def _enough(replies: Replies, number: int, run: _Run) -> None:
    if len(replies.usable) >= run.config.min_replies:
        return
    reasons = "; ".join(f"site {node}: {why}" for node, why in list(replies.dropped.items())[:3])
    raise RunError(
        f"round {number}: {len(replies.usable)} of {len(run.nodes)} replies are usable, "
        f"federation.min_replies = {run.config.min_replies} ({reasons})"
    )


def _still_finite(state: ServerState) -> None:
    if not all(np.isfinite(array).all() for array in state.model.values()):
        raise RunError(
            f"round {state.round}: the model is no longer finite; lower training.learning_rate"
        )


def _metrics(run: _Run, state: ServerState, seconds: float) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "family": run.config.model.family,
        "rounds": state.round,
        "sites": len(run.nodes),
        "privacy": run.priced.as_dict() | {"not_claimed": _not_claimed(run.schema)},
        "quality": {},  # accounted figures only, and none is accounted for yet
        "seconds": {"total": seconds},
    }


def _not_claimed(schema: Schema) -> list[str]:
    """What the unit leaves open."""
    if schema.person is None:
        return []
    return [f"a {schema.person} with several records is not hidden, only each record"]


def _seconds(**parts: float) -> dict[str, float]:
    return {name: round(value, 4) for name, value in parts.items()}
