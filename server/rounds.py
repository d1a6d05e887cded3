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
from ..data_prep.schema import Schema, schema_to_json
from ..flower import Grid, Message, RecordDict
from ..models import family, metrics
from ..models.layers import initialise
from ..models.metrics import Exam, exam_to_arrays
from ..models.state import Arrays, check_arrays, load_arrays, to_arrays, to_bytes
from ..privacy import vector
from ..privacy.mechanism import mechanism_of
from ..privacy.noise import Coins
from ..privacy.plan import Plan, plan
from ..privacy.secagg.encoding import decode
from ..privacy.secagg.pins import read_identities
from ..privacy.secagg.sealed import SealedReply, open_reply
from ..wire import (
    EVALUATE,
    NO_LEDGER,
    TRAIN,
    Task,
    Update,
    WireError,
    from_bytes,
    pack,
    pack_for,
    run_statement,
    site_name,
    task_digest,
)
from .aggregation import STRATEGIES, ServerState, adapted, scaled, summed
from .coordinator import Coordinator, coordinator
from .evaluation import evaluated, expected_sums, questions
from .replies import Collected, in_the_open, usable_replies
from .secure import Federation, RoundError, SecureSums
from .store import Asked, Checkpoint, Event, RunFolder
from .transcript import NAME, Transcript, taken_up

Observer = Callable[[Event], None]


IDENTITIES = "identities.toml"
"""The sites' pinned public identities, in the run folder."""


class RunError(FedveilError):
    """A run that cannot go on."""


def train(
    grid: Grid,
    sites: Mapping[int, int],
    config: RunConfig,
    schema: Schema,
    run_id: str,
    folder: RunFolder,
    observe: Observer,
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

    Raises:
        RunError: Too few usable replies. The folder keeps the last whole state.
        FedveilError: The folder is of another run, or of the same one priced otherwise.
    """
    run = _open(grid, sites, config, schema, run_id, folder, observe)
    point, damaged = folder.load_checkpoint()
    if point is None:
        point = _begin(run)
    else:
        _resume(run, point, damaged)
    coins = Coins.from_system()
    try:
        while folder.asked().round < run.priced.rounds:
            point = _round(run, point, coins)
        point = _last_evaluation(run, point, coins)
    except BaseException as error:
        # A run that stops early is charged its plan. Only our own errors have a text that is ours.
        cause = str(error) if isinstance(error, FedveilError) else type(error).__name__
        with suppress(FedveilError):  # such as of a full disk; the cause is what must be told
            run.tell("failed", round=point.state.round, epsilon=run.priced.epsilon, cause=cause)
        raise
    _finish(run, point)


@dataclass(frozen=True)
class _Run:
    """What stays the same from round to round; `module` only lends its structure."""

    grid: Grid
    sites: Mapping[int, int]
    config: RunConfig
    schema: Schema
    run_id: str
    folder: RunFolder
    observe: Observer
    priced: Plan
    module: nn.Module
    began: float
    config_json: str
    schema_json: str
    coordinator: Coordinator
    identities: Mapping[str, bytes]
    secure: SecureSums | None

    def tell(self, event: str, **facts: Any) -> None:  # noqa: ANN401
        line = {"event": event, **facts}
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
) -> _Run:
    began = time.perf_counter()
    module = family(config.model.family).build(config.model, schema)
    priced = plan(config)
    plain = config.encryption == "none"
    identities = {} if plain else read_identities(folder.path / IDENTITIES)
    return _Run(
        grid=grid,
        sites=sites,
        config=config,
        schema=schema,
        run_id=run_id,
        folder=folder,
        observe=observe,
        priced=priced,
        module=module,
        began=began,
        config_json=config.shared().model_dump_json(by_alias=True),
        schema_json=schema_to_json(schema),
        coordinator=coordinator(folder.path),
        identities=identities,
        secure=_secure_sums(grid, sites, config, priced, run_id, identities, folder),
    )


def _secure_sums(
    grid: Grid,
    sites: Mapping[int, int],
    config: RunConfig,
    priced: Plan,
    run_id: str,
    identities: Mapping[str, bytes],
    folder: RunFolder,
) -> SecureSums | None:
    """The run's secure sums, taken up behind their transcript."""
    if priced.numbers is None:
        return None
    names = {site: site_name(site) for site in sites}
    if unknown := sorted(set(names.values()) - identities.keys()):
        raise FedveilError(f"{folder.path / IDENTITIES}: {unknown[0]}: missing; pin its identity")
    made = Federation(
        run_id,
        sites,
        names,
        identities,
        priced.numbers,
        config.secagg.epoch_rounds,
        config.secagg.deadline,
    )
    path = folder.path / NAME
    epoch, ledgers = taken_up(path, identities)
    return SecureSums(grid, made, Transcript(path).keep, epoch, ledgers)


def _begin(run: _Run) -> Checkpoint:
    initialise(run.module, torch.Generator().manual_seed(run.config.federation.seed))
    state = STRATEGIES[run.config.strategy].init(to_arrays(run.module))
    if run.priced.adaptive:
        state = replace(state, clipping_norm=run.priced.clipping_norm)
    point = Checkpoint(run.run_id, _fingerprint(run.priced), state)
    run.folder.save_checkpoint(point)
    run.tell("run", run_id=run.run_id, privacy=run.priced.as_dict(), sites=len(run.sites))
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
        epsilon=run.priced.epsilon_after(*asked),
        damaged=damaged,
        privacy=run.priced.as_dict(),
        run_id=run.run_id,
        sites=len(run.sites),
    )
    run.folder.forget_after(point.state.round)


def _round(run: _Run, point: Checkpoint, coins: Coins) -> Checkpoint:
    """One round: asked for once, its state stored before it is told of."""
    began, before = time.perf_counter(), run.folder.asked()
    asked = Asked(before.round + 1, before.evaluation + _is_due(run, point, before))
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
        dropped=[{"site": n, "reason": why} for n, why in replies.dropped.items()],
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
    asked, exam = Asked(before.round, before.evaluation + 1), _exam(run, point)
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
    run: _Run, point: Checkpoint, asked: Asked, exam: Exam | None, *, training: bool
) -> Collected:
    """Asks all sites, having noted so; what they sent, or an error if it is of too few."""
    config, model = run.config, point.state.model
    aggregator = run.coordinator.aggregator if config.encryption == "sealed" else b""
    statement = run_statement(run.run_id, run.config_json, run.schema_json, aggregator)
    task = Task(
        run_id=run.run_id,
        round=asked.round if training else 0,
        evaluation=asked.evaluation if exam else 0,
        config=run.config_json,
        schema=run.schema_json,
        arrays=model if training else {},
        released=point.state.average if exam else {},
        exam=exam_to_arrays(exam) if exam else {},
        ledger=NO_LEDGER,
        clipping_norm=point.state.clipping_norm or run.priced.clipping_norm,
        aggregator=aggregator,
        coordinator=run.coordinator.identity.public,
        signature=run.coordinator.identity.sign(statement),
    )
    run.folder.ask(asked)
    ask = _ask_each if run.secure is None else _ask_for_sum
    return ask(run, point, task, _expected(run, model, exam, training=training))


@dataclass(frozen=True)
class _Expected:
    """What replies must be like: names, shapes and types."""

    arrays: Arrays
    sums: Arrays


def _expected(
    run: _Run, model: Mapping[str, np.ndarray], exam: Exam | None, *, training: bool
) -> _Expected:
    arrays, sums = Arrays(), Arrays()
    if training:
        names = family(run.config.model.family).trainable(run.module)
        # Sums come as float64: the rounding of a sum to float32 would add to its sensitivity. So
        # does what a site clips and noises as a whole.
        exact = not run.config.trains_at_sites or run.priced.unit == "site"
        kind = np.float64 if exact else np.float32
        arrays = {name: model[name].astype(kind) for name in names}
        if run.priced.adaptive:
            sums["clipping/within"] = np.zeros(1)
    if exam:
        sums |= expected_sums(run.schema, run.priced)
    return _Expected(arrays, sums)


def _ask_each(run: _Run, point: Checkpoint, task: Task, expected: _Expected) -> Collected:
    """Each site's reply by itself."""
    tasks = {n: replace(task, ledger=point.ledgers.get(n, NO_LEDGER)) for n in run.sites}
    action = TRAIN if task.round else EVALUATE
    packed = pack(task)  # once: the model is the same for all
    messages = [
        Message(pack_for(packed, t.ledger), run.sites[n], action, group_id=str(task.round))
        for n, t in tasks.items()
    ]
    context = task_digest(packed)

    def unseal(site: int, reply: Update) -> Update:
        sealed = decode(SealedReply, reply.upload)
        if sealed.site != site_name(site):
            raise WireError("reply: is another site's")
        opened = open_reply(sealed, dict(run.identities), run.coordinator.sealing, context)
        return from_bytes(opened)

    found = usable_replies(
        run.grid.send_and_receive(messages),
        {node: site for site, node in run.sites.items()},
        tasks,
        expected.arrays,
        expected.sums,
        unseal if run.config.encryption == "sealed" else in_the_open,
    )
    if len(found.usable) < run.config.min_replies:
        raise RunError(
            f"round {task.round}: {len(found.usable)} of {len(run.sites)} replies are usable, "
            f"federation.min_replies = {run.config.min_replies} ({_reasons(found.dropped)})"
        )
    return Collected(
        parts=tuple(found.usable.values()),
        sites=tuple(found.usable),
        dropped=found.dropped,
        ledgers={site: reply.ledger for site, reply in found.usable.items()},
        noises=len(found.usable) if mechanism_of(run.priced).noise_per_site else 1,
    )


def _reasons(dropped: Mapping[int, str]) -> str:
    return "; ".join(f"site {site}: {why}" for site, why in list(dropped.items())[:3])


def _ask_for_sum(run: _Run, point: Checkpoint, task: Task, expected: _Expected) -> Collected:
    """The sites' sum, and nothing else of them."""
    if run.secure is None:
        raise RunError('aggregation.encryption: is not "secagg"')
    asked = _releases(run, task)
    placed = vector.placed(asked, run.priced)
    packed = pack(task)

    def task_for(site: int, opening: bytes, deals: bytes) -> RecordDict:
        return pack_for(packed, point.ledgers.get(site, NO_LEDGER), opening, deals)

    action = TRAIN if task.round else EVALUATE
    blocks = tuple(one.block for one in placed)
    try:
        found = run.secure.collect(task_digest(packed), blocks, action, task_for)
    except RoundError as error:
        raise RunError(f"round {task.round}: {error}") from None
    parts = vector.reals(found.total, placed)
    arrays = vector.unflat(parts["update"], expected.arrays) if task.round else {}
    if run.config.trains_at_sites:
        arrays = scaled(arrays, 1 / len(found.sites))
    sums: Arrays = {}
    for name in parts.keys() - {"update"}:
        of = {key: a for key, a in expected.sums.items() if key.startswith(f"{name}/")}
        sums |= vector.unflat(parts[name], of)
    return Collected(
        parts=(Update(task.run_id, task.round, task.evaluation, arrays, sums, NO_LEDGER),),
        sites=found.sites,
        dropped=found.dropped,
        ledgers=found.ledgers,
        noises=_noises(run.priced, len(found.sites)),
        rounding={
            release.name: vector.rounding(release, one.block)
            for release, one in zip(asked, placed, strict=True)
        },
    )


def _noises(priced: Plan, uploaders: int) -> float:
    """Variance of the noise in a secure sum, over the accounted one."""
    if priced.shares_noise:
        return uploaders / priced.honest
    return uploaders if mechanism_of(priced).noise_per_site else 1


def _releases(run: _Run, task: Task) -> tuple[vector.Release, ...]:
    """The round's vector, by public numbers."""
    names = family(run.config.model.family).trainable(run.module)
    sizes = vector.Sizes(
        sum(task.arrays[name].size for name in names) if task.round else 0,
        task.clipping_norm,
        metrics.size(run.schema, run.priced.evaluation_units),
        metrics.loss_size(),
        run.config.records,
    )
    return vector.releases(
        sizes,
        run.priced,
        at_sites=run.config.trains_at_sites,
        training=bool(task.round),
        evaluating=bool(task.evaluation),
    )


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
        "sites": len(run.sites),
        "privacy": run.priced.as_dict() | {"not_claimed": _not_claimed(run.schema)},
        "quality": point.evaluated.quality,
        "evaluated": {"round": point.evaluated.round, "evaluations": point.evaluated.count},
        "ledgers": {str(node): {"count": c, "head": h} for node, (c, h) in point.ledgers.items()},
        "seconds": {"total": seconds},
    }


def _not_claimed(schema: Schema) -> list[str]:
    """What the unit leaves open."""
    if schema.person is None:
        return []
    return [f"a {schema.person} with several records is not hidden, only each record"]


def _seconds(**parts: float) -> dict[str, float]:
    return {name: round(value, 4) for name, value in parts.items()}
