"""One round's question to the sites, and what comes back: each reply by itself, or their sum."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..config import FedveilError, RunConfig
from ..data_prep.queries import run_workload
from ..data_prep.schema import Schema, schema_to_json
from ..flower import Grid, Message, RecordDict
from ..models import metrics
from ..models.state import Arrays
from ..privacy import vector
from ..privacy.mechanism import mechanism_of
from ..privacy.plan import Plan
from ..privacy.secagg.encoding import decode
from ..privacy.secagg.pins import read_identities
from ..privacy.secagg.sealed import SealedReply, open_reply
from ..wire import (
    EVALUATE,
    NO_LEDGER,
    STATISTICS,
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
from .coordinator import Coordinator
from .evaluation import expected_sums
from .replies import Collected, RunError, in_the_open, usable_replies
from .secure import Federation, RoundError, SecureSums
from .store import RunFolder
from .transcript import NAME, Transcript, taken_up

IDENTITIES = "identities.toml"
"""The sites' pinned public identities, in the run folder."""

Ledgers = Mapping[int, tuple[int, str]]


@dataclass(frozen=True)
class Channel:
    """Reaches a run's sites, and adds up what they send.

    Attributes:
        grid: Carries messages.
        sites: The node of each site, by the site's number.
        names: The name of each site.
        config: The resolved configuration.
        schema: What a record is.
        priced: The run's plan.
        run_id: Names the run in every message.
        parameters: The trained parameters: their names and shapes.
        coordinator: Who asks.
        identities: The sites' public identities by name; none are needed for open replies.
        secure: The run's secure sums; `None` where each reply is read by itself.
    """

    grid: Grid
    sites: Mapping[int, int]
    names: Mapping[int, str]
    config: RunConfig
    schema: Schema
    priced: Plan
    run_id: str
    parameters: Mapping[str, np.ndarray]
    coordinator: Coordinator
    identities: Mapping[str, bytes]
    secure: SecureSums | None

    def question(self, clipping_norm: float) -> Task:
        """The part of a task that is the same in every round, signed."""
        config = self.config.shared().model_dump_json(by_alias=True)
        schema = schema_to_json(self.schema)
        sealed = self.config.encryption == "sealed"
        aggregator = self.coordinator.aggregator if sealed else b""
        identity = self.coordinator.identity
        return Task(
            run_id=self.run_id,
            round=0,
            evaluation=0,
            config=config,
            schema=schema,
            arrays={},
            released={},
            exam={},
            ledger=NO_LEDGER,
            clipping_norm=clipping_norm,
            aggregator=aggregator,
            coordinator=identity.public,
            signature=identity.sign(run_statement(self.run_id, config, schema, aggregator)),
        )

    def ask(self, task: Task, ledgers: Ledgers) -> Collected:
        """Asks all sites.

        Args:
            task: What for.
            ledgers: Count and head hash of each site's ledger, as seen last.

        Raises:
            RunError: Too few answered as they must.
        """
        if self.secure is None:
            return _each(self, task, ledgers)
        return _summed(self, self.secure, task, ledgers)


def open_channel(
    grid: Grid,
    sites: Mapping[int, int],
    config: RunConfig,
    schema: Schema,
    priced: Plan,
    run_id: str,
    parameters: Mapping[str, np.ndarray],
    folder: RunFolder,
    asks: Coordinator,
) -> Channel:
    """The channel of a run, its secure sums taken up behind their transcript.

    Raises:
        FedveilError: Identities, keys or transcript cannot be used.
    """
    path = folder.path / IDENTITIES
    identities = read_identities(path) if path.exists() or config.encryption != "none" else {}
    names = names_of(identities, len(sites), path)
    secure = _secure_sums(grid, sites, names, config, priced, run_id, identities, folder)
    return Channel(
        grid,
        sites,
        names,
        config,
        schema,
        priced,
        run_id,
        parameters,
        asks,
        identities,
        secure,
    )


def names_of(identities: Mapping[str, bytes], sites: int, path: Path) -> dict[int, str]:
    """The name of each site, by its number: its place among the pinned identities, from 1.

    Raises:
        FedveilError: There are not as many.
    """
    names = list(identities) or [site_name(number) for number in range(1, sites + 1)]
    if len(names) != sites:
        raise FedveilError(f"{path}: has {len(names)} sites, the run has {sites}; begin a new run")
    return dict(enumerate(names, start=1))


def _secure_sums(
    grid: Grid,
    sites: Mapping[int, int],
    names: Mapping[int, str],
    config: RunConfig,
    priced: Plan,
    run_id: str,
    identities: Mapping[str, bytes],
    folder: RunFolder,
) -> SecureSums | None:
    if priced.numbers is None:
        return None
    made = Federation(
        run_id,
        sites,
        names,
        identities,
        priced.numbers,
        min(config.secagg.epoch_rounds, _sums(priced)),
        config.secagg.deadline,
    )
    path = folder.path / NAME
    kept = Transcript(path)  # first of all: a crash may have torn its last message
    epoch, ledgers = taken_up(path, identities)
    return SecureSums(grid, made, kept.keep, epoch, ledgers)


def _sums(priced: Plan) -> int:
    """Secure sums of a whole run: the last evaluation has one of its own."""
    return max(1, priced.statistics + priced.rounds + min(1, priced.evaluations))


@dataclass(frozen=True)
class _Expected:
    """What replies must be like: names, shapes and types."""

    arrays: Arrays
    sums: Arrays


def _expected(channel: Channel, task: Task) -> _Expected:
    arrays, sums = Arrays(), Arrays()
    if task.round:
        # Sums come as float64: the rounding of a sum to float32 would add to its sensitivity. So
        # does what a site clips and noises as a whole.
        exact = not channel.config.trains_at_sites or channel.priced.unit == "site"
        kind = np.float64 if exact else np.float32
        arrays = {name: array.astype(kind) for name, array in channel.parameters.items()}
        if channel.priced.adaptive:
            sums["clipping/within"] = np.zeros(1)
    if task.evaluation:
        sums |= expected_sums(channel.schema, channel.priced)
    if task.statistics:
        described = run_workload(channel.config, channel.schema, channel.priced.statistics_noise)
        sums["statistics/answers"] = np.zeros(described.length)
    return _Expected(arrays, sums)


def _each(channel: Channel, task: Task, ledgers: Ledgers) -> Collected:
    """Each site's reply by itself."""
    sites, config, expected = channel.sites, channel.config, _expected(channel, task)
    tasks = {n: replace(task, ledger=ledgers.get(n, NO_LEDGER)) for n in sites}
    action = _action(task)
    packed = pack(task)  # once: the model is the same for all
    messages = [
        Message(pack_for(packed, t.ledger), sites[n], action, group_id=str(task.round))
        for n, t in tasks.items()
    ]
    context = task_digest(packed)

    def unseal(site: int, reply: Update) -> Update:
        if reply.arrays or reply.sums:
            raise WireError("reply: has arrays, expected a sealed reply only")
        sealed = decode(SealedReply, reply.upload)
        if sealed.site != channel.names[site]:
            raise WireError("reply: is another site's")
        pinned, private = dict(channel.identities), channel.coordinator.sealing
        return from_bytes(open_reply(sealed, pinned, private, context))

    found = usable_replies(
        channel.grid.send_and_receive(messages, timeout=config.secagg.deadline),
        {node: site for site, node in sites.items()},
        tasks,
        expected.arrays,
        expected.sums,
        unseal if config.encryption == "sealed" else in_the_open,
    )
    if len(found.usable) < config.min_replies:
        reasons = "; ".join(f"site {n}: {why}" for n, why in list(found.dropped.items())[:3])
        raise RunError(
            f"{_about(task)}: {len(found.usable)} of {len(sites)} replies are usable, "
            f"federation.min_replies = {config.min_replies} ({reasons})"
        )
    return Collected(
        parts=tuple(found.usable.values()),
        sites=tuple(found.usable),
        dropped=found.dropped,
        ledgers={site: reply.ledger for site, reply in found.usable.items()},
        noises=_noises(channel.priced, len(found.usable)),
    )


def _action(task: Task) -> str:
    """How it is asked for."""
    if task.statistics:
        return STATISTICS
    return TRAIN if task.round else EVALUATE


def _about(task: Task) -> str:
    """What was asked for, in an error."""
    if task.statistics:
        return "statistics"
    return f"round {task.round}" if task.round else f"evaluation {task.evaluation}"


def _summed(channel: Channel, secure: SecureSums, task: Task, ledgers: Ledgers) -> Collected:
    """The sites' sum, and nothing else of them."""
    releases = _releases(channel, task)
    placed = vector.placed(releases, channel.priced)
    packed = pack(task)

    def task_for(site: int, opening: bytes, deals: bytes) -> RecordDict:
        return pack_for(packed, ledgers.get(site, NO_LEDGER), opening, deals)

    action = _action(task)
    blocks = tuple(one.block for one in placed)
    try:
        found = secure.collect(task_digest(packed), blocks, action, task_for)
    except RoundError as error:
        raise RunError(f"{_about(task)}: {error}") from None
    arrays, sums = _named(vector.reals(found.total, placed), _expected(channel, task))
    if channel.config.trains_at_sites:
        arrays = {name: array / len(found.sites) for name, array in arrays.items()}
    about = task.run_id, task.round, task.evaluation
    whole = Update(*about, arrays, sums, NO_LEDGER, statistics=task.statistics)
    return Collected(
        parts=(whole,),
        sites=found.sites,
        dropped=found.dropped,
        ledgers=found.ledgers,
        noises=_noises(channel.priced, len(found.sites)),
        left=found.left,
        rounding={
            release.name: vector.rounding(release, one.block, channel.priced)
            for release, one in zip(releases, placed, strict=True)
        },
    )


def _named(parts: Mapping[str, np.ndarray], expected: _Expected) -> tuple[Arrays, Arrays]:
    """The sum's blocks as arrays and sums by name."""
    arrays = vector.unflat(parts["update"], expected.arrays) if "update" in parts else {}
    sums = Arrays()
    for name in parts.keys() - {"update"}:
        like = {key: a for key, a in expected.sums.items() if key.startswith(f"{name}/")}
        sums |= vector.unflat(parts[name], like)
    return arrays, sums


def _noises(priced: Plan, replies: int) -> float:
    """Variance of the noise in what was collected, over the accounted one."""
    if priced.shares_noise:
        return replies / priced.honest
    return replies if mechanism_of(priced).noise_per_site else 1


def _releases(channel: Channel, task: Task) -> tuple[vector.Release, ...]:
    """The round's vector, by public numbers."""
    sizes = vector.Sizes(
        sum(array.size for array in channel.parameters.values()),
        task.clipping_norm,
        metrics.size(channel.schema, channel.priced.evaluation_units),
        metrics.loss_size(),
        channel.config.records,
    )
    if task.statistics:
        described = run_workload(channel.config, channel.schema, channel.priced.statistics_noise)
        whole = described.size(channel.priced.statistics_units)
        sizes = replace(sizes, statistics=whole, peak=described.peak)
    return vector.releases(
        sizes,
        channel.priced,
        at_sites=channel.config.trains_at_sites,
        training=bool(task.round),
        evaluating=bool(task.evaluation),
        describing=bool(task.statistics),
    )
