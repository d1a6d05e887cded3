"""Before the first round: are the sites there, and will they take part?

A site answers from its policy and its ledger; nothing is debited and no record is read. A run may
wait for days for a human's approval; whoever submitted it sees for whom, and may cancel it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..flower import Message
from ..wire import NO_LEDGER, READY, Refusal, Refused, Step, WireError, pack, pack_for, read_answer
from .collect import Channel
from .replies import RunError
from .rounds import Observer

OPEN = (Refusal.APPROVAL, Refusal.PAUSED)
"""Refusals that a site's owner may take back at any time."""
AWAY = "is not connected"
_AGAIN, _LONG_AGAIN, _SHARE = 2.0, 30.0, 0.05
"""Between two questions is this share of the wait so far, within these seconds: a run may wait for
days, and each question is a line in a site's log."""
_ANSWER = 120.0  # seconds that an answer may take: a site may test its mechanism first


@dataclass
class Readiness:
    """What each site said last, by number."""

    ready: set[int] = field(default_factory=set)
    waiting: dict[int, str] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)

    def as_event(self) -> dict[str, object]:
        """For whoever watches."""
        return {
            "event": "waiting",
            "ready": sorted(self.ready),
            "waiting": [
                {"site": site, "reason": why} for site, why in sorted(self.waiting.items())
            ],
            "refused": [
                {"site": site, "reason": why} for site, why in sorted(self.refused.items())
            ],
        }


def wait_for_sites(
    channel: Channel,
    tell: Observer,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Waits until enough sites are ready, and for the others for a while.

    It waits for an approval for as long as it takes, and for a site that is away or paused only
    until `federation.patience` is over, once enough others are ready.

    Args:
        channel: Reaches the sites.
        tell: Is told of each change.
        sleep: Waits for so many seconds.
        clock: Seconds.

    Raises:
        RunError: Too many refuse.
    """
    numbers, config = channel.priced.numbers, channel.config
    least = config.min_replies if numbers is None else numbers.n_min
    began, told = clock(), None
    found = Readiness(waiting=dict.fromkeys(channel.sites, AWAY))
    while found.waiting:
        _ask(channel, found)
        if (event := found.as_event()) != told and (found.waiting or found.refused):
            tell(event)
            told = event
        if len(channel.sites) - len(found.refused) < least:
            reasons = "; ".join(f"site {n}: {why}" for n, why in sorted(found.refused.items()))
            raise RunError(f"{len(found.refused)} of {len(channel.sites)} sites refuse ({reasons})")
        if not found.waiting:
            return
        held = Refusal.APPROVAL.value in found.waiting.values()
        waited = clock() - began
        late = waited > config.federation.patience
        if len(found.ready) >= least and late and not held:
            return
        sleep(min(_LONG_AGAIN, max(_AGAIN, _SHARE * waited)))


def _ask(channel: Channel, found: Readiness) -> None:
    """Asks those that are waited for."""
    packed = pack(channel.question(channel.priced.clipping_norm))
    nodes = {channel.sites[site]: site for site in found.waiting}
    messages = [Message(pack_for(packed, NO_LEDGER), node, READY) for node in nodes]
    for message in channel.grid.send_and_receive(messages, timeout=_ANSWER):
        site = nodes.get(message.metadata.src_node_id)
        if site is None:
            continue
        try:
            answer: Step | Refused | None = read_answer(message)
        except WireError:
            answer = None  # such as Flower's, that it is not connected
        found.waiting[site] = AWAY
        if isinstance(answer, Step):
            found.ready.add(site)
        elif answer is not None and answer.code in OPEN:
            found.waiting[site] = answer.code.value
            continue
        elif answer is not None:
            found.refused[site] = answer.code.value
        if answer is not None:
            del found.waiting[site]
