"""What the sites sent back: usable replies, and reasons for the others."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ..flower import Message
from ..models.state import StateError, check_arrays
from ..wire import Refused, Task, Update, WireError, read_reply


@dataclass(frozen=True)
class Replies:
    """One round's replies: usable ones by site, in site order, and why the others are not."""

    usable: Mapping[int, Update]
    dropped: Mapping[int, str]


def usable_replies(
    replies: Iterable[Message],
    site_of: Mapping[int, int],
    tasks: Mapping[int, Task],
    arrays: Mapping[str, np.ndarray],
    sums: Mapping[str, np.ndarray],
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
            if (reply.run_id, reply.round, reply.evaluation) != (
                task.run_id, task.round, task.evaluation,
            ):  # fmt: skip
                raise WireError("is for another run, round or evaluation")
            if isinstance(reply, Refused):
                raise WireError(f"refused: {reply.code.value}")
            check_arrays(reply.arrays, arrays)
            check_arrays(reply.sums, sums)
            if reply.ledger[0] <= task.ledger[0]:
                raise WireError("its ledger has not grown")
            usable[site] = reply
        except (WireError, StateError) as error:
            dropped[site] = str(error)
    dropped |= dict.fromkeys(tasks.keys() - usable.keys() - dropped.keys(), "no reply")
    return Replies(dict(sorted(usable.items())), dict(sorted(dropped.items())))
