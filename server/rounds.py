"""The round loop: send the model, collect replies, add the server's noise, step, store.

A round is a release of the plan, asked for once. The note of what is asked comes before the asking
and the checkpoint after the replies; so after a crash the last round may have been released and be
lost. It counts as spent, its number is not used again, and the run ends with the plan, with as many
steps fewer as rounds were lost.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import FedveilError, RunConfig
from ..data_prep.queries import Noisy, run_workload
from ..data_prep.schema import Schema
from ..flower import Grid
from ..models import family
from ..models.layers import initialise
from ..models.metrics import Exam, exam_to_arrays
from ..models.state import check_arrays, load_arrays, to_arrays, to_bytes
from ..privacy.mechanism import mechanism_of
from ..privacy.noise import Coins
from ..privacy.plan import Plan, plan
from . import statistics
from .aggregation import STRATEGIES, ServerState, adapted, scaled, summed
from .collect import Channel, open_channel
from .coordinator import Coordinator
from .evaluation import evaluated, questions
from .replies import Collected, RunError
from .store import Asked, Checkpoint, Event, RunFolder
from .warm_start import begin

Observer = Callable[[Event], None]
Prepare = Callable[[Channel, Observer], None]
"""Waits until a run's sites are ready; it tells events of that."""


def at_once(channel: Channel, tell: Observer) -> None:
    """Sites that are ready as they are."""
    del channel, tell


def train(
    grid: Grid,
    sites: Mapping[int, int],
    config: RunConfig,
    schema: Schema,
    run_id: str,
    folder: RunFolder,
    observe: Observer,
    asks: Coordinator,
    prepare: Prepare = at_once,
) -> None:
    """Runs all rounds, or those that are left, and writes the run folder.

    Args:
        grid: Reaches the sites.
        sites: The node of each site, by the site's number.
        config: The resolved configuration.
        schema: What a record is.
        run_id: Names the run in every message.
        folder: Where everything is kept; it exists. A run that it holds the state of goes on.
        observe: Sees every event as it is written.
        asks: Signs the run.
        prepare: Waits until the sites are ready.

    Raises:
        RunError: Too few usable replies. The folder keeps the last whole state.
        FedveilError: The folder is of another run, or of the same one priced otherwise.
    """
    run = _open(grid, sites, config, schema, run_id, folder, observe, asks)
    prepare(run.channel, run.write)
    point, damaged = folder.load_checkpoint()
    if point is None:
        point = _begin(run)
    else:
        _resume(run, point, damaged)
    coins = Coins.from_system()
    try:
        point = _described(run, point, coins)
        while folder.asked().round < run.priced.rounds:
            point = _round(run, point, coins)
        point = _last_evaluation(run, point, coins)
    except BaseException as error:
        # A run that stops early is charged its plan. Only our own errors have a text that is ours.
        cause = str(error) if isinstance(error, FedveilError) else type(error).__name__
        with suppress(FedveilError):  # such as of a full disk; the cause is what must be told
            run.tell("failed", round=point.state.round, epsilon=run.priced.epsilon, cause=cause)
        raise
    if run.channel.secure is not None:
        run.channel.secure.end()
    _finish(run, point)


@dataclass(frozen=True)
class _Run:
    """What stays the same from round to round; `module` only lends its structure."""

    channel: Channel
    config: RunConfig
    schema: Schema
    run_id: str
    folder: RunFolder
    observe: Observer
    priced: Plan
    module: nn.Module
    began: float

    def tell(self, event: str, **facts: Any) -> None:  # noqa: ANN401
        self.write({"event": event, **facts})

    def write(self, line: Event) -> None:
        self.folder.append(line)
        self.observe(line)


def _open(
    grid: Grid,
    sites: Mapping[int, int],
    config: RunConfig,
    schema: Schema,
    run_id: str,
    folder: RunFolder,
    observe: Observer,
    asks: Coordinator,
) -> _Run:
    began = time.perf_counter()
    kind = family(config.model.family)
    module = kind.build(config.model, schema)
    priced, parameters = plan(config), to_arrays(module, kind.trainable(module))
    if priced.statistics:  # too many cells are refused before anybody is asked
        run_workload(config, schema, priced.statistics_noise)
    channel = open_channel(grid, sites, config, schema, priced, run_id, parameters, folder, asks)
    return _Run(channel, config, schema, run_id, folder, observe, priced, module, began)


def _begin(run: _Run) -> Checkpoint:
    initialise(run.module, torch.Generator().manual_seed(run.config.federation.seed))
    state = STRATEGIES[run.config.strategy].init(to_arrays(run.module))
    if run.priced.adaptive:
        state = replace(state, clipping_norm=run.priced.clipping_norm)
    point = Checkpoint(run.run_id, _fingerprint(run.priced), state)
    run.folder.save_checkpoint(point)
    run.tell("run", run_id=run.run_id, privacy=run.priced.as_dict(), sites=len(run.channel.sites))
    return point


def _resume(run: _Run, point: Checkpoint, damaged: list[str]) -> None:
    """Checks that a stored state is this run's, and says what was lost."""
    if point.run_id != run.run_id:
        raise FedveilError(f"{run.folder.path}: holds run {point.run_id}, not {run.run_id}")
    if point.plan != _fingerprint(run.priced):
        raise FedveilError(
            f"{run.folder.path}: the run was priced otherwise; resume it with the versions in "
            "environment.json"
        )
    check_arrays(point.state.model, to_arrays(run.module))
    asked = run.folder.asked()
    run.tell(
        "resumed",
        round=point.state.round,
        lost=list(range(point.state.round + 1, asked.round + 1)),
        lost_evaluations=asked.evaluation - point.evaluated.count,
        lost_statistics=bool(asked.statistics) and not point.described and _left(run) is None,
        epsilon=run.priced.epsilon_after(*asked),
        damaged=damaged,
        privacy=run.priced.as_dict(),
        run_id=run.run_id,
        sites=len(run.channel.sites),
    )
    run.folder.forget_after(point.state.round)


def _described(run: _Run, point: Checkpoint, coins: Coins) -> Checkpoint:
    """The round of statistics, before all others; the model is fitted to it, or begins with it.

    Formal guarantee: what comes of it is post-processing of one release.

    Raises:
        RunError: A crash has lost it, and there is nothing but it to make a model of.
    """
    if point.described or not run.priced.statistics:
        return point
    before = run.folder.asked()
    if before.statistics:
        left = _left(run)
        if left is not None:
            return _begun(run, point, left)
        if not run.priced.rounds:
            raise RunError("statistics: were lost in a crash and are spent; begin a new run")
        return replace(point, described=True)  # the rounds are paid for, and go on without
    began = time.perf_counter()
    asked = before._replace(statistics=1)
    replies = _ask(run, point, asked, None, training=False, describing=True)
    replied = time.perf_counter()
    found = statistics.released(replies, run.config, run.schema, run.priced, coins)
    noisy = statistics.keep(run.folder, found, run.run_id, run.config, run.schema, run.priced)
    run.tell(
        "statistics",
        epsilon=run.priced.epsilon_after(*asked),
        sites=len(replies.sites),
        cells=found.asked.length,
        **_excess(run, replies),
        dropped=_reasons(replies.dropped),
        seconds=_seconds(sites=replied - began, server=time.perf_counter() - replied),
    )
    return _begun(run, replace(point, ledgers={**point.ledgers, **replies.ledgers}), noisy)


def _left(run: _Run) -> Noisy | None:
    """What a crash has left of the round of statistics: all of it once it was told of, or none."""
    if not any(event["event"] == "statistics" for event in run.folder.events()):
        return None
    try:
        return statistics.kept(run.folder, run.run_id, run.config, run.schema, run.priced)
    except FedveilError:
        return None


def _begun(run: _Run, point: Checkpoint, noisy: Noisy) -> Checkpoint:
    """The state that rounds begin with, or that nothing is trained beyond; it is stored."""
    began = time.perf_counter()
    made = begin(run.config, run.schema, noisy, point.state.model)
    begun = STRATEGIES[run.config.strategy].init(made.model)
    run.tell("prepared", **made.facts, seconds=_seconds(server=time.perf_counter() - began))
    state = replace(begun, clipping_norm=point.state.clipping_norm)
    point = replace(point, described=True, state=state)
    run.folder.save_checkpoint(replace(point, seconds=_total(run, point)))
    return point


def _round(run: _Run, point: Checkpoint, coins: Coins) -> Checkpoint:
    """One round: asked for once, its state stored before it is told of."""
    began, before = time.perf_counter(), run.folder.asked()
    due = _is_due(run, point, before)
    asked = before._replace(round=before.round + 1, evaluation=before.evaluation + due)
    exam = _exam(run, point) if asked.evaluation > before.evaluation else None
    questioned = time.perf_counter()
    replies = _ask(run, point, asked, exam, training=True)
    replied = time.perf_counter()
    arrays = [reply.arrays for reply in replies.parts]
    stretch = replies.rounding.get("update", 1.0)
    state = advance(point.state, arrays, run.module, run.config, run.priced, coins, stretch)
    state = _adapted(state, replies, run)
    state = replace(state, round=asked.round)
    _still_finite(state)
    stepped = time.perf_counter()
    after = _evaluated(run, replace(point, state=state), point, replies, exam, coins)
    after = _saved(run, after, replies)
    run.tell(
        "round",
        round=asked.round,
        epsilon=run.priced.epsilon_after(*asked),
        sites=len(replies.sites),
        **_excess(run, replies),
        dropped=_reasons(replies.dropped),
        **({"left": _reasons(replies.left)} if replies.left else {}),
        seconds=_seconds(
            sites=replied - questioned,
            server=stepped - replied,
            evaluation=questioned - began if exam else 0.0,
            store=time.perf_counter() - stepped,
        ),
    )
    if exam is not None:
        _tell_quality(run, after, asked)
    return after


def _reasons(sites: Mapping[int, str]) -> list[dict[str, Any]]:
    return [{"site": site, "reason": why} for site, why in sites.items()]


def _excess(run: _Run, replies: Collected) -> dict[str, float]:
    """How many times the accounted noise is in the round, where it is shared out."""
    return {"excess": round(math.sqrt(replies.noises), 6)} if run.priced.shares_noise else {}


def _adapted(state: ServerState, replies: Collected, run: _Run) -> ServerState:
    """The clipping norm of the next round, by the noised share of updates within this one's."""
    if not run.priced.adaptive:
        return state
    halves = sum(float(part.sums["clipping/within"][0]) for part in replies.parts)
    return adapted(state, 0.5 + halves / len(replies.sites), run.config)


def _last_evaluation(run: _Run, point: Checkpoint, coins: Coins) -> Checkpoint:
    """Evaluates the model that is released, unless a crash has used up the last evaluation."""
    before = run.folder.asked()
    done = point.evaluated.count and point.evaluated.round == point.state.round
    if done or before.evaluation == run.priced.evaluations:
        return point
    asked, exam = before._replace(evaluation=before.evaluation + 1), _exam(run, point)
    replies = _ask(run, point, asked, exam, training=False)
    after = _saved(run, _evaluated(run, point, point, replies, exam, coins), replies)
    _tell_quality(run, after, asked)
    return after


def _is_due(run: _Run, point: Checkpoint, asked: Asked) -> bool:
    """Whether the model of the state is evaluated along with the next round.

    The last of the plan's evaluations is kept for the end, whatever a crash has cost.
    """
    every, done, last = run.config.evaluate_every, point.state.round, point.evaluated.round
    return (
        bool(every)
        and done // every > last // every
        and (run.priced.evaluations - asked.evaluation > 1)
    )


def _exam(run: _Run, point: Checkpoint) -> Exam:
    return questions(point.state.average, run.config, run.schema)


def _evaluated(
    run: _Run,
    after: Checkpoint,
    asked_at: Checkpoint,
    replies: Collected,
    exam: Exam | None,
    coins: Coins,
) -> Checkpoint:
    """The checkpoint with what an evaluation found of the model of `asked_at`, if there was one."""
    if exam is None:
        return after
    found = evaluated(
        asked_at.evaluated,
        asked_at.state.round,
        replies,
        exam,
        run.config,
        run.schema,
        run.priced,
        coins,
    )
    return replace(after, evaluated=found)


def _saved(run: _Run, point: Checkpoint, replies: Collected) -> Checkpoint:
    point = replace(point, ledgers={**point.ledgers, **replies.ledgers})
    # The checkpoint comes before the event: a round that was told of is never lost.
    run.folder.save_checkpoint(replace(point, seconds=_total(run, point)))
    return point


def _tell_quality(run: _Run, point: Checkpoint, asked: Asked) -> None:
    found = point.evaluated
    run.tell(
        "evaluated",
        round=found.round,
        evaluation=asked.evaluation,
        epsilon=run.priced.epsilon_after(*asked),
        loss=found.quality["loss"]["value"],
        quality=found.quality,
    )


def _finish(run: _Run, point: Checkpoint) -> None:
    seconds = _total(run, point)
    metrics = _metrics(run, point, seconds)
    facts = {
        "run_id": run.run_id, "family": run.config.model.family, "privacy": metrics["privacy"],
    }  # fmt: skip
    run.folder.write("model.safetensors", to_bytes(point.state.average, facts))
    run.tell("finished", rounds=run.priced.rounds, steps=point.state.steps, seconds=seconds)
    run.folder.write_json("metrics.json", metrics)  # the last of all: it says that nothing is left


def _total(run: _Run, point: Checkpoint) -> float:
    """Seconds of the whole run so far, of the processes before this one too."""
    return round(point.seconds + time.perf_counter() - run.began, 3)


def _fingerprint(priced: Plan) -> str:
    return hashlib.sha256(json.dumps(asdict(priced), sort_keys=True).encode()).hexdigest()


def advance(
    state: ServerState,
    parts: Sequence[Mapping[str, np.ndarray]],
    module: nn.Module,
    config: RunConfig,
    priced: Plan,
    coins: Coins,
    rounding: float = 1.0,
) -> ServerState:
    """Applies one round's usable replies; whose round it is stays for the caller to say.

    Formal guarantee: under `central` only the noised sum is used from here on. The divisor is the
    public expected batch, whatever came; where sites train, how many came, which is public too.

    Args:
        state: Before.
        parts: The sites' gradient sums or changes; or their one sum, their one mean change.
        module: Lends its structure.
        config: The run.
        priced: Its price.
        coins: The server's.
        rounding: How many times its sensitivity the sum has by being rounded to a grid.
    """
    strategy = STRATEGIES[config.strategy]
    if config.trains_at_sites:
        return strategy.apply(state, strategy.combine(parts), config)
    # The one place where a trusted server's noise comes in; nothing un-noised is kept after it.
    scale = priced.noise_scale * rounding
    total = mechanism_of(priced).at_server(summed(parts), scale, coins)
    mean = scaled(total, 1 / priced.expected_batch)
    kind = family(config.model.family)
    load_arrays(module, state.model)
    tensors = {name: torch.from_numpy(array) for name, array in mean.items()}
    stepped = kind.server_step(module, tensors, coins.generator())
    return strategy.apply(state, {n: t.numpy() for n, t in stepped.items()}, config)


def _ask(
    run: _Run,
    point: Checkpoint,
    asked: Asked,
    exam: Exam | None,
    *,
    training: bool,
    describing: bool = False,
) -> Collected:
    """Asks all sites, having noted so; what they sent, or an error if it is of too few."""
    state = point.state
    task = replace(
        run.channel.question(state.clipping_norm or run.priced.clipping_norm),
        round=asked.round if training else 0,
        evaluation=asked.evaluation if exam else 0,
        statistics=asked.statistics if describing else 0,
        arrays=state.model if training else {},
        released=state.average if exam else {},
        exam=exam_to_arrays(exam) if exam else {},
    )
    run.folder.ask(asked)
    return run.channel.ask(task, point.ledgers)


def _still_finite(state: ServerState) -> None:
    if not all(np.isfinite(array).all() for array in state.model.values()):
        raise RunError(
            f"round {state.round}: the model is no longer finite; lower training.learning_rate"
        )


def _metrics(run: _Run, point: Checkpoint, seconds: float) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "family": run.config.model.family,
        "rounds": run.priced.rounds,
        "steps": point.state.steps,
        "sites": len(run.channel.sites),
        "privacy": run.priced.as_dict() | {"not_claimed": _not_claimed(run)},
        "quality": point.evaluated.quality,
        "evaluated": {"round": point.evaluated.round, "evaluations": point.evaluated.count},
        "ledgers": {str(node): {"count": c, "head": h} for node, (c, h) in point.ledgers.items()},
        "seconds": {"total": seconds},
    }


def _not_claimed(run: _Run) -> list[str]:
    """What the unit leaves open."""
    person, unit = run.schema.person, run.priced.unit
    if unit == "site":
        return ["that a site took part is not hidden, only its data"]
    if person is None and run.schema.modality == "text":
        length = run.schema.shape[0]
        several = f"a text of several records is not hidden, only each record of {length} bytes"
        return [f"{several}; what is put into a plain text moves all records behind it"]
    if person is None:
        return []
    if unit == "record":
        return [f"a {person} with several records is not hidden, only each record"]
    at_several = f"a {person} with records at k sites is hidden k times less"
    return [f"{at_several}: the sensitivity is k times as large, and the claim is for one site"]


def _seconds(**parts: float) -> dict[str, float]:
    return {name: round(value, 4) for name, value in parts.items()}
