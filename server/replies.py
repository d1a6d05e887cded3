"""What the sites sent back: usable replies, and reasons for the others."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from ..config import FedveilError
from ..flower import Message
from ..models.state import check_arrays
from ..wire import Refused, Task, Update, WireError, read_reply


class RunError(FedveilError):
    """A run that cannot go on."""


@dataclass(frozen=True)
class Replies:
    """One round's replies: usable ones by site, in site order, and why the others are not."""

    usable: Mapping[int, Update]
    dropped: Mapping[int, str]


@dataclass(frozen=True)
class Collected:
    """What a round brought, however it travelled.

    Attributes:
        parts: Each site's reply or, of a secure sum, one that stands for all.
        sites: Whose are in it, by number.
        dropped: Why the others are not.
        ledgers: Count and head hash of each one's ledger.
        left: Who is in a secure sum and did not stay to its unmasking, and why.
        noises: Variance of the noise in the sum of the parts over the accounted one.
        rounding: How many times the noise that a block would need on a continuum it has, or needs,
            on the grid of a secure sum.
    """

    parts: tuple[Update, ...]
    sites: tuple[int, ...]
    dropped: Mapping[int, str]
    ledgers: Mapping[int, tuple[int, str]]
    noises: float
    left: Mapping[int, str] = field(default_factory=dict)
    rounding: Mapping[str, float] = field(default_factory=dict)


def in_the_open(site: int, reply: Update) -> Update:
    """A reply that is not sealed.

    Raises:
        WireError: It is.
    """
    del site
    if reply.upload:
        raise WireError("reply: is sealed, expected arrays")
    return reply


def usable_replies(
    replies: Iterable[Message],
    site_of: Mapping[int, int],
    tasks: Mapping[int, Task],
    arrays: Mapping[str, np.ndarray],
    sums: Mapping[str, np.ndarray],
    unseal: Callable[[int, Update], Update] = in_the_open,
) -> Replies:
    """Sorts one round's replies into usable ones, in site order, and reasons for the others.

    A reply is usable if it is its site's only one, for this run, round and evaluation, with arrays
    and sums of exactly the expected names, shapes and types, all finite, from a ledger that has
    grown. No text that a site wrote is passed on.

    Args:
        replies: What came.
        site_of: Which site each node is.
        tasks: What each site was asked.
        arrays: What the arrays must be like.
        sums: What the sums must be like.
        unseal: (site, reply) -> the reply with its arrays; raises FedveilError for one of others.
    """
    usable: dict[int, Update] = {}
    dropped: dict[int, str] = {}
    # Who replied first must not matter: sums of floats depend on their order.
    for message in replies:
        site = site_of.get(message.metadata.src_node_id)
        if site is None:
            continue
        if site in usable or site in dropped:
            usable.pop(site, None)
            dropped[site] = "replied twice"
            continue
        try:
            reply, task = read_reply(message), tasks[site]
            _check_about(reply, task)
            if isinstance(reply, Refused):
                raise WireError(f"refused: {reply.code.value}")
            reply = unseal(site, reply)
            _check_about(reply, task)
            check_arrays(reply.arrays, arrays)
            check_arrays(reply.sums, sums)
            if reply.ledger[0] <= task.ledger[0]:
                raise WireError("its ledger has not grown")
            usable[site] = reply
        except FedveilError as error:
            dropped[site] = str(error)
    dropped |= dict.fromkeys(tasks.keys() - usable.keys() - dropped.keys(), "no reply")
    return Replies(dict(sorted(usable.items())), dict(sorted(dropped.items())))


def _check_about(reply: Update | Refused, task: Task) -> None:
    asked = task.run_id, task.round, task.evaluation, task.statistics
    if (reply.run_id, reply.round, reply.evaluation, reply.statistics) != asked:
        raise WireError("is for another run, round or evaluation")
