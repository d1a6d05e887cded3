"""The signed public messages of a run's secure sums: kept by the server, verified by an auditor.

A transcript holds no vector, no share and no ciphertext, so it may be shown to whoever may know who
took part. Of each sum that it says was released it shows that the sites themselves agreed on
numbers, keys, model and uploaders, and which ledger entries they signed. The server kept it, and
could leave out whole epochs, the end, and what came of a round: that a round has no sum, or who
uploaded where nobody confirmed, is its word. Hold the ledgers against it, whose counts go up with
each upload.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from .encoding import VERSION, Buffer, Hash, Reader, decode, encode
from .errors import (
    DifferentContextError,
    DifferentRosterError,
    DuplicateMessageError,
    MalformedMessageError,
    SecAggError,
    StaleEpochError,
    WrongPhaseError,
    WrongRoundError,
)
from .messages import Advertisement, Confirmation, Dealt, Roster, Uploaded
from .terms import Opening, Setup, check_members
from .views import (
    check_advertisement,
    check_confirmation,
    check_confirmed,
    check_dealt,
    check_identities,
    check_keys,
    check_ledger,
    check_uploaded,
)

_MAX_MESSAGE = 1 << 20  # bytes; kept messages are far smaller


@dataclass(frozen=True)
class Released:
    """The server's own word that a round's sum was unmasked.

    Attributes:
        context: The round's.
        total: Hash of the sum.
    """

    KIND: ClassVar[int] = 14

    context: Hash
    total: Hash


Kept = Setup | Advertisement | Dealt | Opening | Uploaded | Confirmation | Released
_KINDS: Mapping[int, type[Kept]] = {
    kind.KIND: kind
    for kind in (Setup, Advertisement, Dealt, Opening, Uploaded, Confirmation, Released)
}


@dataclass(frozen=True)
class RoundRecord:
    """What is shown of one attempt at a round.

    Attributes:
        epoch: Of which epoch.
        round: Its number there.
        model: Hash of the model that all uploaders started from.
        uploaders: U, by name.
        confirmed: Who signed U, by name.
        released: Hash of the sum, or nothing if the server says of none.
    """

    epoch: int
    round: int
    model: bytes
    uploaders: tuple[str, ...]
    confirmed: tuple[str, ...]
    released: bytes | None


@dataclass(frozen=True)
class Verdict:
    """What a transcript shows; a fault raises instead.

    Attributes:
        run: The run.
        newest: The last epoch that was begun, whether or not it came to a round.
        epochs: Set-ups that n_min sites signed and a round was opened in, in order.
        rounds: Attempts at rounds, in order, burnt ones too.
        ledgers: Count and head of each site's ledger by name, as signed last.
    """

    run: str
    newest: int
    epochs: tuple[Setup, ...]
    rounds: tuple[RoundRecord, ...]
    ledgers: Mapping[str, tuple[int, bytes]]


def framed(message: Kept) -> bytes:
    """A message as it stands in a transcript, which is one after another."""
    body = encode(message)
    return len(body).to_bytes(4, "big") + body


def verify_transcript(data: Buffer, pinned: Mapping[str, bytes]) -> Verdict:
    """Verifies a run's transcript offline.

    Args:
        data: The framed messages.
        pinned: Public identities by name, as the auditor got them out of band.

    Raises:
        MalformedMessageError: It is cut off, or holds something else.
        SecAggError: A site did not sign what it says, or the protocol does not allow it; the
            errors are those of the sites themselves.
    """
    reading = _Reading(pinned)
    for number, message in enumerate(_messages(data), start=1):
        try:
            reading.take(message)
        except SecAggError as error:
            raise type(error)(f"transcript, message {number}: {error}") from None
    return reading.verdict()


def _messages(data: Buffer) -> Iterator[Kept]:
    reader = Reader(data)
    while not reader.is_over():
        length = reader.number(4, "transcript")
        if length > _MAX_MESSAGE:
            raise MalformedMessageError(
                f"transcript: a message of {length} bytes, expected at most {_MAX_MESSAGE}; "
                "it is no transcript, or was altered"
            )
        body = reader.take(length, "transcript")
        kind = body[3] if length > 3 else 0
        if kind not in _KINDS:
            raise MalformedMessageError(
                f"transcript: a message of kind {kind}, expected one of {sorted(_KINDS)} in "
                f"version {VERSION}; it is no transcript, or was altered"
            )
        yield decode(_KINDS[kind], body)


@dataclass
class _Epoch:
    """An epoch as far as it was read."""

    setup: Setup
    advertised: dict[int, Advertisement] = field(default_factory=dict)
    roster: Roster | None = None
    dealt: dict[int, Dealt] = field(default_factory=dict)
    opening: Opening | None = None
    uploaded: dict[int, Uploaded] = field(default_factory=dict)
    confirmed: dict[int, Confirmation] = field(default_factory=dict)
    released: bytes | None = None

    @property
    def uploaders(self) -> tuple[int, ...]:
        return tuple(sorted(self.uploaded))


class _Reading:
    """Takes the messages in the order in which an honest server kept them."""

    def __init__(self, pinned: Mapping[str, bytes]) -> None:
        self._pinned = pinned
        self._epochs: list[Setup] = []
        self._rounds: list[RoundRecord] = []
        self._ledgers: dict[str, tuple[int, bytes]] = {}
        self._open: _Epoch | None = None

    def take(self, message: Kept) -> None:
        if isinstance(message, Setup):
            self._begin(message)
            return
        if self._open is None:
            raise WrongPhaseError(f"{type(message).__name__}: expected a Setup first")
        if isinstance(message, Advertisement):
            self._advertise(self._open, message)
        elif isinstance(message, Dealt):
            self._deal(self._open, message)
        elif isinstance(message, Opening):
            self._open_round(self._open, message)
        else:
            self._in_round(self._open, message)

    def verdict(self) -> Verdict:
        if self._open is None:
            raise MalformedMessageError("transcript: is empty, expected a Setup first")
        self._end_round(self._open)
        return Verdict(
            self._open.setup.run,
            self._open.setup.epoch,
            tuple(self._epochs),
            tuple(self._rounds),
            dict(self._ledgers),
        )

    def _begin(self, setup: Setup) -> None:
        check_identities(setup, self._pinned)
        if self._open is not None:
            before = self._open.setup
            if setup.run != before.run or setup.epoch <= before.epoch:
                raise StaleEpochError(
                    f"set-up: epoch {setup.epoch} of run {setup.run}, expected one after "
                    f"{before.epoch} of {before.run}"
                )
            self._end_round(self._open)
        self._open = _Epoch(setup)

    @staticmethod
    def _advertise(epoch: _Epoch, message: Advertisement) -> None:
        if epoch.roster is not None:
            raise WrongPhaseError("advertisement: expected none once the roster was dealt for")
        _once(epoch.advertised, message.site, "advertisement")
        check_advertisement(epoch.setup, message)
        epoch.advertised[message.site] = message

    @staticmethod
    def _deal(epoch: _Epoch, message: Dealt) -> None:
        if epoch.opening is not None:
            raise WrongPhaseError("deal: expected none once a round was opened")
        if epoch.roster is None:
            epoch.roster = Roster(tuple(epoch.advertised[s] for s in sorted(epoch.advertised)))
            check_keys(epoch.roster)
        _once(epoch.dealt, message.site, "deal")
        check_dealt(epoch.setup, epoch.roster, message)
        epoch.dealt[message.site] = message

    def _open_round(self, epoch: _Epoch, message: Opening) -> None:
        members = tuple(sorted(epoch.dealt))
        check_members(epoch.setup, members, "members")
        if epoch.roster is None or (message.roster, message.members) != (
            epoch.roster.digest,
            members,
        ):
            raise DifferentRosterError(f"opening: of members {message.members}, expected {members}")
        following = 0 if epoch.opening is None else epoch.opening.round + 1
        if message.round != following or following >= epoch.setup.rounds:
            raise WrongRoundError(
                f"round {message.round}: expected {following}, of {epoch.setup.rounds} in the epoch"
            )
        if epoch.opening is None:
            self._epochs.append(epoch.setup)
        self._end_round(epoch)
        epoch.opening, epoch.released = message, None
        epoch.uploaded, epoch.confirmed = {}, {}

    def _in_round(self, epoch: _Epoch, message: Uploaded | Confirmation | Released) -> None:
        if epoch.opening is None or epoch.released is not None:
            raise WrongPhaseError(f"{type(message).__name__}: expected an Opening first")
        context = epoch.opening.context
        if isinstance(message, Uploaded):
            if epoch.confirmed:
                raise WrongPhaseError("upload: expected none once uploaders were confirmed")
            _once(epoch.uploaded, message.site, "upload")
            check_uploaded(epoch.setup, epoch.opening.members, context, message)
            name = epoch.setup.name(message.site)
            known = self._ledgers.get(name, (0, b""))
            self._ledgers[name] = check_ledger(epoch.setup, known, message)
            epoch.uploaded[message.site] = message
        elif isinstance(message, Confirmation):
            check_members(epoch.setup, epoch.uploaders, "uploaders")
            _once(epoch.confirmed, message.site, "confirmation")
            check_confirmation(epoch.setup, epoch.uploaders, context, message)
            epoch.confirmed[message.site] = message
        else:
            if message.context != context:
                raise DifferentContextError(
                    f"released: in context {message.context.hex()}, expected {context.hex()}"
                )
            found = tuple(epoch.confirmed.values())
            check_confirmed(epoch.setup, epoch.uploaders, context, found)
            epoch.released = message.total

    def _end_round(self, epoch: _Epoch) -> None:
        if epoch.opening is not None:
            self._rounds.append(
                RoundRecord(
                    epoch.setup.epoch,
                    epoch.opening.round,
                    epoch.opening.model,
                    tuple(epoch.setup.name(site) for site in epoch.uploaders),
                    tuple(epoch.setup.name(site) for site in sorted(epoch.confirmed)),
                    epoch.released,
                )
            )


def _once(found: Mapping[int, object], site: int, what: str) -> None:
    if site in found:
        raise DuplicateMessageError(f"{what} of site {site}: is there twice, expected once")
