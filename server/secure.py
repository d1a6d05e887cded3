"""The server's half of secure aggregation over a Grid: four phases of messages around one sum.

Thin: what is allowed, the aggregator (`privacy.secagg`) says, and the sites say it again. A site
that is silent, refuses or sends what does not hold counts as dropped for the round, with a reason
that is the server's own words; the round goes on while enough remain.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config import FedveilError
from ..flower import Grid, Message, RecordDict
from ..privacy.secagg.aggregator import Aggregator
from ..privacy.secagg.encoding import Message as Body
from ..privacy.secagg.encoding import decode, encode
from ..privacy.secagg.errors import SecAggError, SwappedIdentityError
from ..privacy.secagg.messages import (
    Advertisement,
    Confirmation,
    Deal,
    Deals,
    Unmasking,
    Upload,
)
from ..privacy.secagg.terms import Block, Member, Numbers, Opening, Setup
from ..privacy.secagg.transcript import Kept
from ..wire import (
    ADVERTISE,
    CONFIRM,
    DEAL,
    END,
    UNMASK,
    Refused,
    Step,
    WireError,
    pack,
    read_answer,
    read_reply,
)

Dropped = dict[int, str]


class RoundError(FedveilError):
    """Too few sites remain for a sum. What was debited stays so.

    Attributes:
        dropped: Who is missing, and why.
    """

    def __init__(self, cause: str, dropped: Mapping[int, str]) -> None:
        """Too few, at some point."""
        reasons = "; ".join(f"site {site}: {why}" for site, why in sorted(dropped.items()))
        super().__init__(f"{cause} ({reasons})" if reasons else cause)
        self.dropped = dict(dropped)


@dataclass(frozen=True)
class Federation:
    """Who takes part in a run's secure sums.

    Attributes:
        run_id: Which run.
        nodes: The node of each site, by the site's number.
        names: The name of each site.
        identities: Public identities by name, as pinned.
        numbers: n, t, n_min, t_collude.
        rounds: R: attempts that an epoch's keys are for.
        deadline: Seconds that a site has for each step.
    """

    run_id: str
    nodes: Mapping[int, int]
    names: Mapping[int, str]
    identities: Mapping[str, bytes]
    numbers: Numbers
    rounds: int
    deadline: float

    @property
    def roster(self) -> tuple[Member, ...]:
        """As a set-up has it."""
        return tuple(Member(name, self.identities[name]) for name in sorted(self.names.values()))

    @property
    def sites(self) -> tuple[int, ...]:
        """The site's number at each place of the roster."""
        number_of = {name: number for number, name in self.names.items()}
        return tuple(number_of[member.name] for member in self.roster)


@dataclass(frozen=True)
class Sum:
    """One round's sum.

    Attributes:
        total: [d] uint32.
        sites: Whose vectors are in it, by number.
        dropped: Who is missing, and why.
        left: Who is in the sum and did not stay to its unmasking, and why.
        ledgers: Count and head hash of each uploader's ledger, as it signed them.
    """

    total: np.ndarray
    sites: tuple[int, ...]
    dropped: Mapping[int, str]
    left: Mapping[int, str]
    ledgers: Mapping[int, tuple[int, str]]


@dataclass
class SecureSums:
    """A run's secure sums, epoch by epoch.

    Attributes:
        grid: Reaches the sites.
        federation: Who takes part.
        keep: Takes the public transcript.
        epoch: The next epoch's number; lower ones are over.
        ledgers: Count and head of each site's ledger by name, as signed last.
    """

    grid: Grid
    federation: Federation
    keep: Callable[[Kept], None]
    epoch: int = 0
    ledgers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    _aggregator: Aggregator | None = None
    _deals: dict[int, Deals] = field(default_factory=dict)
    _used: int = 0

    def collect(
        self,
        digest: bytes,
        blocks: tuple[Block, ...],
        action: str,
        task_for: Callable[[int, bytes, bytes], RecordDict],
    ) -> Sum:
        """One round's sum.

        Args:
            digest: Of the task, which is every site's.
            blocks: The vector.
            action: `TRAIN` or `EVALUATE`.
            task_for: (site, opening, deals) -> the packed task for one site.

        Raises:
            RoundError: Too few sites remain; the next round begins a new epoch.
        """
        dropped = Dropped()
        try:
            aggregator = self._ready(dropped)
            opening = aggregator.open_round(digest, blocks)
            self._used += 1
            return self._sum(aggregator, opening, action, task_for, dropped)
        except SecAggError as error:
            self._aggregator = None  # who is missing may be back with new keys
            raise RoundError(f"secure sum: {error}", dropped) from None

    def end(self) -> None:
        """Has the sites erase the last epoch's keys, once no round will follow.

        Whoever does not hear of it keeps them, encrypted, until its next epoch.
        """
        made = self.federation
        asked = pack(Step(made.run_id, b""))
        sent = [Message(asked, node, END) for node in made.nodes.values()]
        self._aggregator = None
        list(self.grid.send_and_receive(sent, timeout=made.deadline))

    def _ready(self, dropped: Dropped) -> Aggregator:
        """The aggregator of an epoch that has a round left."""
        if self._aggregator is None or self._used == self.federation.rounds:
            self._aggregator = self._set_up(dropped)
        return self._aggregator

    def _set_up(self, dropped: Dropped) -> Aggregator:
        """A new epoch: both round trips in which the sites agree on keys."""
        made = self.federation
        setup = Setup(made.run_id, self.epoch, made.roster, made.numbers, made.rounds)
        aggregator = Aggregator(setup, self.keep, self.ledgers)
        self.epoch, self._used, self.ledgers = self.epoch + 1, 0, aggregator.ledgers
        everyone = dict.fromkeys(range(len(made.sites)), setup)
        self._step(ADVERTISE, everyone, Advertisement, aggregator.add_advertisement, dropped)
        roster = aggregator.close_advertisements()
        there = dict.fromkeys(roster.sites, roster)
        self._step(DEAL, there, Deal, aggregator.add_deal, dropped)
        self._deals = aggregator.close_deals()
        return aggregator

    def _sum(
        self,
        aggregator: Aggregator,
        opening: Opening,
        action: str,
        task_for: Callable[[int, bytes, bytes], RecordDict],
        dropped: Dropped,
    ) -> Sum:
        sites, opened = self.federation.sites, encode(opening)
        deals = {place: self._deals.get(place) for place in aggregator.members}
        tasks = {
            sites[place]: task_for(sites[place], opened, encode(found) if found else b"")
            for place, found in deals.items()
        }
        missing = [site for place, site in enumerate(sites) if place not in deals]
        dropped |= {site: "is no member of this epoch" for site in missing if site not in dropped}
        uploaded: dict[int, tuple[int, str]] = {}

        def take(place: int, message: Message) -> None:
            reply = read_reply(message)
            if isinstance(reply, Refused):
                raise WireError(f"refused: {reply.code.value}")
            if reply.arrays or reply.sums:
                raise WireError("reply: has arrays, expected a masked vector only")
            upload = decode(Upload, reply.upload)
            _check_sender(upload.uploaded.site, place)
            aggregator.add_upload(upload)
            signed = upload.uploaded
            uploaded[sites[place]] = signed.ledger_count, signed.ledger_head.hex()
            self._deals.pop(place, None)  # it has taken them

        self._ask(action, tasks, take, dropped)
        asked = aggregator.close_uploads()
        self._step(CONFIRM, asked, Confirmation, aggregator.add_confirmation, dropped)
        found = aggregator.close_confirmations()
        confirmed = dict.fromkeys((one.site for one in found.confirmations), found)
        self._step(UNMASK, confirmed, Unmasking, aggregator.add_unmasking, dropped)
        total = aggregator.total()
        inside = tuple(sorted(uploaded))
        # Who drops out after its upload is in the sum all the same.
        ordered = sorted(dropped.items())
        outside = {site: why for site, why in ordered if site not in uploaded}
        left = {site: why for site, why in ordered if site in uploaded}
        return Sum(total, inside, outside, left, uploaded)

    def _step(
        self,
        action: str,
        messages: Mapping[int, Body],
        kind: type[Any],
        add: Callable[[Any], None],
        dropped: Dropped,
    ) -> None:
        """One round trip of the protocol."""

        def take(place: int, message: Message) -> None:
            answer = read_answer(message)
            if isinstance(answer, Refused):
                raise WireError(f"refused: {answer.code.value}")
            body = decode(kind, answer.body)
            _check_sender(body.site, place)
            add(body)

        sites = self.federation.sites
        contents = {
            sites[place]: pack(Step(self.federation.run_id, encode(message)))
            for place, message in messages.items()
        }
        self._ask(action, contents, take, dropped)

    def _ask(
        self,
        action: str,
        contents: Mapping[int, RecordDict],
        take: Callable[[int, Message], None],
        dropped: Dropped,
    ) -> None:
        """Asks sites at once; those that are not heard of are asked once more, with the same."""
        sites, nodes = self.federation.sites, self.federation.nodes
        place_of = {nodes[site]: place for place, site in enumerate(sites)}
        waiting, failed = dict(contents), Dropped()
        until = time.monotonic() + self.federation.deadline
        for share in (2, 1):
            if not waiting:
                return
            left = max(0.0, until - time.monotonic()) / share
            sent = [
                Message(content, nodes[site], action, group_id=str(self.epoch))
                for site, content in waiting.items()
            ]
            for message in self.grid.send_and_receive(sent, timeout=left):
                place = place_of.get(message.metadata.src_node_id)
                if place is None or sites[place] not in waiting:
                    continue
                site = sites[place]
                if message.has_error():
                    failed[site] = f"Flower error {message.error.code}"
                    continue
                del waiting[site]
                try:
                    take(place, message)
                except (WireError, SecAggError) as error:
                    dropped[site] = str(error)
        dropped |= {site: failed.get(site, "no reply") for site in waiting}


def _check_sender(named: int, place: int) -> None:
    """A site answers for itself: another's message from its node would drop that other one."""
    if named != place:
        raise SwappedIdentityError(f"message: is of site {named}, expected {place}")
