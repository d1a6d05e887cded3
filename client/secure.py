"""The site's half of a secure sum over Flower: where its keys are, and what it answers."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from ..privacy import vector
from ..privacy.noise import Coins
from ..privacy.plan import Plan
from ..privacy.secagg.encoding import Message, Text, decode, encode
from ..privacy.secagg.errors import (
    DifferentContextError,
    DifferentSetupError,
    LostStateError,
    MalformedMessageError,
    SwappedIdentityError,
    UnknownSiteError,
)
from ..privacy.secagg.keys import Identity
from ..privacy.secagg.messages import Confirmations, Deals, Roster, Upload, Uploaders
from ..privacy.secagg.site import Site as Party
from ..privacy.secagg.terms import Floor, Numbers, Opening, Setup
from ..privacy.secagg.vault import Vault
from ..wire import ADVERTISE, CONFIRM, DEAL, END, UNMASK, Step, Task

RUN_NAMES = Text(64)

STEPS: Mapping[str, tuple[type[Message], Callable[[Party, Any], Message]]] = {
    ADVERTISE: (Setup, Party.advertise),
    DEAL: (Roster, Party.deal),
    CONFIRM: (Uploaders, Party.confirm),
    UNMASK: (Confirmations, Party.unmask),
}
"""What each action asks with, and what answers it."""


@dataclass(frozen=True)
class Keys:
    """A site's long-lived secrets for secure sums, and whom it trusts to be whom.

    Attributes:
        identity: Its own.
        pinned: Public identities by name, as they came out of band.
        folder: Where it keeps the state of each run.
        vault: 32 secret bytes that encrypt it.
        durable: See `Vault`.
    """

    identity: Identity
    pinned: Mapping[str, bytes]
    folder: Path
    vault: bytes = field(repr=False)
    durable: bool = True


class SecureSite:
    """A site's part in secure sums, run by run."""

    def __init__(self, name: str, keys: Keys, floor: Floor, *, hold: bool = True) -> None:
        """Nothing is opened yet.

        Args:
            name: The site's.
            keys: Its secrets.
            floor: The least that its owner asks of a federation.
            hold: Whether to keep a run's state open between messages, and with it the vector that
                was sent last, which may be asked for again; not where other processes may get the
                next message.
        """
        self.name, self.keys = name, keys
        self._floor, self._hold, self._lock = floor, hold, Lock()
        self._open: dict[str, tuple[Vault, Party]] = {}

    @contextmanager
    def party(self, run_id: str) -> Iterator[Party]:
        """The state machine of a run, taken up where it was left.

        One message at a time: one that is sent again waits for the first's answer, and gets it.

        Raises:
            SecAggError: Its state cannot be used.
        """
        with self._lock:
            try:
                yield self._taken_up(run_id)
            finally:
                if not self._hold:
                    self.close()

    def answer(self, action: str, step: Step) -> Step:
        """Answers one message of the protocol.

        Raises:
            SecAggError: The site refuses.
        """
        if action == END:  # whoever asks for it: it gives nothing away, and ends what is open
            if not self._is_known(step.run_id):
                return Step(step.run_id, b"")  # nothing to erase, and no file to make for it
            with self.party(step.run_id) as party:
                party.end_epoch()
            return Step(step.run_id, b"")
        kind, handler = STEPS[action]
        message = decode(kind, step.body)
        with self.party(step.run_id) as party:
            return Step(step.run_id, encode(handler(party, message)))

    def check(self, numbers: Numbers) -> None:
        """Says whether the site could be in a secure sum of these numbers; opens nothing.

        Raises:
            SecAggError: It could not: by its floor, its identity, or for want of known sites.
        """
        self._floor.check(numbers)
        pinned, own = self.keys.pinned, self.keys.identity.public
        if pinned.get(self.name) != own:
            raise SwappedIdentityError(
                f"{self.name}: has identity {own.hex()}, expected the one that is pinned for this "
                "name; check the site's key"
            )
        if numbers.n > len(pinned):
            raise UnknownSiteError(
                f"n = {numbers.n}: {len(pinned)} sites are known here; take the newest roster"
            )

    def pin(self, pinned: Mapping[str, bytes]) -> None:
        """Trusts others from now on, in a run that is open, too.

        Who was revoked, or has another identity, is refused at the next round or epoch.
        """
        with self._lock:
            if not self.keys.pinned.items() <= pinned.items():  # else some only joined
                self.close()  # taken up again by the next message, with these
            self.keys = replace(self.keys, pinned=dict(pinned))

    def forget(self) -> None:
        """Erases what is left of all runs' epochs, such as of one that was cancelled.

        Formal guarantee: nothing here unmasks what was sent before. A run that goes on agrees on
        new keys, as after any lost state; what it may still send, the ledger says.

        Raises:
            LostStateError: The disk refuses.
        """
        with self._lock:
            self.close()
            try:
                for left in self.keys.folder.glob("*.state*"):
                    left.unlink(missing_ok=True)
            except OSError as error:
                raise LostStateError(
                    f"{self.keys.folder}: {error.strerror}; check the path and the disk"
                ) from None

    def close(self) -> None:
        """Lets go of all state files."""
        for vault, _ in self._open.values():
            vault.close()
        self._open.clear()

    def _is_known(self, run_id: str) -> bool:
        return run_id in self._open or self._path(run_id).exists()

    def _path(self, run_id: str) -> Path:
        check_name(run_id)
        return self.keys.folder / f"{run_id}.state"

    def _taken_up(self, run_id: str) -> Party:
        if run_id not in self._open:
            self.close()  # one run at a time
            path, keys = self._path(run_id), self.keys
            keys.folder.mkdir(parents=True, exist_ok=True)
            vault = Vault(path, keys.vault, self.name, run_id, durable=keys.durable)
            try:
                party = Party(self.name, run_id, keys.identity, keys.pinned, vault, self._floor)
            except BaseException:
                vault.close()
                raise
            self._open[run_id] = vault, party
        return self._open[run_id][1]


def check_name(run_id: str) -> None:
    """A run's name becomes a file's: it must be one that the protocol has.

    Raises:
        MalformedMessageError: It is not.
    """
    if not RUN_NAMES.fits(run_id):
        raise MalformedMessageError(f"run {run_id!a}: expected a name of plain characters")


@dataclass(frozen=True)
class Opened:
    """A round that this site takes part in.

    Attributes:
        party: The site's half.
        opening: What the round is about.
        blocks: Its vector, as the site itself derives it.
        sent: What was sent to this very opening before, if anything was.
    """

    party: Party
    opening: Opening
    blocks: tuple[vector.Placed, ...]
    sent: Upload | None


def open_round(party: Party, task: Task, blocks: tuple[vector.Placed, ...], priced: Plan) -> Opened:
    """Begins a round, before anything is debited and before a record is read.

    Formal guarantee: the noise that the opening promises for each block, and so signs, is what this
    site's own plan asks for; the numbers that it is shared out by are those that the epoch was set
    up with; and every site that signs has the same task, model and exam included.

    Raises:
        SecAggError: The round may not be.
    """
    if task.deals:
        party.accept(decode(Deals, task.deals))
    numbers = None if party.setup is None else party.setup.numbers
    if numbers != priced.numbers:
        raise DifferentSetupError(f"set-up: has {numbers}, expected {priced.numbers} as priced")
    opening = decode(Opening, task.opening)
    expected = tuple(one.block for one in blocks)
    if opening.blocks != expected:
        raise DifferentContextError(f"blocks: are {opening.blocks}, expected {expected} as priced")
    return Opened(party, opening, blocks, party.open_round(opening, task.digest))


def upload(
    opened: Opened,
    parts: Mapping[str, Mapping[str, np.ndarray]],
    priced: Plan,
    coins: Coins,
    count: int,
    head: bytes,
) -> Upload:
    """The site's vector, noised and masked.

    Args:
        opened: The round.
        parts: Arrays by name, by block.
        priced: The run's plan.
        coins: The site's own.
        count: Entries of its ledger, with this round's debit.
        head: Its head hash.
    """
    if priced.numbers is None:
        raise DifferentSetupError("plan: has no secure sum, expected one")
    words = vector.words(parts, opened.blocks, priced.numbers, coins)
    return opened.party.upload(opened.opening, words, count, head)
