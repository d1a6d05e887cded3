"""A whole session in one process, with a hook at every message: an attack is five lines.

Used by the tests, the benchmark and the audit's replay of attacks. The sites and the aggregator are
the real ones, each message crosses as its bytes; only the network between them is missing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from .aggregator import Aggregator
from .encoding import Message, decode, encode
from .errors import SecAggError, StateInUseError
from .keys import Entropy, Identity, digest, system_entropy
from .messages import Upload
from .site import Site
from .terms import Block, Floor, Member, Numbers, Opening, Setup
from .transcript import Kept, framed

MessageT = TypeVar("MessageT", bound=Message)
SERVER = -1
MODEL = digest("model of the simulator")


@dataclass(frozen=True)
class Passing:
    """A message on its way.

    Attributes:
        source: The site's index, or SERVER.
        destination: The same.
        message: What is sent; a hook returns it, another in its place, or nothing: it is lost.
    """

    source: int
    destination: int
    message: Any


Hook = Callable[[Passing], Any]


def deliver(passing: Passing) -> Any:  # noqa: ANN401
    """The hook of an honest network."""
    return passing.message


class MemoryStore:
    """A store that outlives its site and not the process."""

    def __init__(self) -> None:
        """An empty one."""
        self.content: bytes | None = None

    def load(self) -> bytes | None:
        """See `state.Store`."""
        return self.content

    def replace(self, before: bytes | None, after: bytes) -> None:
        """See `state.Store`."""
        if self.content != before:
            raise StateInUseError("state: was changed since this site took it up")
        self.save(after)

    def save(self, content: bytes) -> None:
        """What a test may make fail."""
        self.content = content


@dataclass
class Simulator:
    """Sites and an aggregator, honest but for what the hook does.

    Attributes:
        numbers: n, t, n_min, t_collude.
        rounds: R.
        hook: Sees every message, both ways.
        entropy: The sites' secret coins.
        run: The run.
        floor: The least that every site asks of the numbers.
        refusals: What a site or the aggregator refused, by the site concerned; it counts as dropped
            from there until the next round.
    """

    numbers: Numbers
    rounds: int = 4
    hook: Hook = deliver
    entropy: Entropy = system_entropy
    run: str = "simulated"
    floor: Floor = Floor(0, 0, 0)  # noqa: RUF009  it is frozen
    refusals: dict[int, SecAggError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.identities = [Identity(self.entropy(32)) for _ in range(self.numbers.n)]
        self.names = [f"site-{index:03}" for index in range(self.numbers.n)]
        self.pinned = {n: i.public for n, i in zip(self.names, self.identities, strict=True)}
        self.stores = [MemoryStore() for _ in self.names]
        self.sites = [self._site(index) for index in range(self.numbers.n)]
        self.transcript = bytearray()
        self.ledger = 0
        self.aggregator = self._aggregator(0, {})

    def _site(self, index: int) -> Site:
        return Site(
            self.names[index],
            self.run,
            self.identities[index],
            self.pinned,
            self.stores[index],
            self.floor,
            self.entropy,
        )

    def new_epoch(self, epoch: int) -> None:
        """The aggregator begins anew; the sites stay as they are until they are set up."""
        self.aggregator = self._aggregator(epoch, self.aggregator.ledgers)

    def _aggregator(self, epoch: int, ledgers: Mapping[str, tuple[int, bytes]]) -> Aggregator:
        roster = tuple(Member(name, self.pinned[name]) for name in self.names)
        setup = Setup(self.run, epoch, roster, self.numbers, self.rounds)
        return Aggregator(setup, self._keep, ledgers)

    def _keep(self, message: Kept) -> None:
        self.transcript += framed(message)

    def restart(self, index: int) -> None:
        """Kills a site; it comes back with what its store has."""
        self.sites[index] = self._site(index)

    def set_up(self) -> tuple[int, ...]:
        """Both round trips of an epoch; returns the members.

        Raises:
            SecAggError: The aggregator could not go on.
        """
        aggregator = self.aggregator
        everyone = dict.fromkeys(range(self.numbers.n), aggregator.setup)
        self._ask(everyone, Site.advertise, aggregator.add_advertisement)
        roster = aggregator.close_advertisements()
        there = [advertised.site for advertised in roster.advertisements]
        self._ask(dict.fromkeys(there, roster), Site.deal, aggregator.add_deal)
        self._ask(aggregator.close_deals(), Site.accept)
        return aggregator.members

    def round(self, vectors: Mapping[int, np.ndarray], sigma: float = 0.0) -> np.ndarray:
        """All three round trips of a round; returns the sum of the uploaders' vectors.

        Args:
            vectors: [d] uint32 by site; the sites mask copies of them.
            sigma: The noise that each is said to have.

        Raises:
            SecAggError: The aggregator could not go on.
        """
        aggregator = self.aggregator
        self.ledger += 1
        self.refusals.clear()
        length = len(next(iter(vectors.values())))
        opening = aggregator.open_round(MODEL, [Block("sum", length, 1.0, 1.0, sigma, 1.0)])

        def upload(site: Site, opening: Opening) -> Upload:
            again = site.open_round(opening, opening.model)
            vector = vectors[self.sites.index(site)].copy()
            return again or site.upload(
                opening, vector, self.ledger, digest(f"ledger {self.ledger}")
            )

        self._ask(dict.fromkeys(aggregator.members, opening), upload, aggregator.add_upload)
        asked = aggregator.close_uploads()
        self._ask(asked, Site.confirm, aggregator.add_confirmation)
        confirmations = aggregator.close_confirmations()
        confirmed = [found.site for found in confirmations.confirmations]
        self._ask(dict.fromkeys(confirmed, confirmations), Site.unmask, aggregator.add_unmasking)
        return aggregator.total()

    def _ask(
        self,
        messages: Mapping[int, MessageT],
        answer: Callable[[Site, MessageT], Any],
        add: Callable[[Any], None] | None = None,
    ) -> None:
        """One round trip: each message down, each answer up; what is refused or lost is dropped."""
        for index, message in messages.items():
            try:
                down = self._cross(Passing(SERVER, index, message))
                reply = None if down is None else answer(self.sites[index], down)
                up = None if reply is None else self._cross(Passing(index, SERVER, reply))
                if up is not None and add is not None:
                    add(up)
            except SecAggError as error:
                self.refusals[index] = error

    def _cross(self, passing: Passing) -> Any:  # noqa: ANN401
        message = self.hook(passing)
        return None if message is None else decode(type(message), encode(message))
