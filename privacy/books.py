"""What a ledger's entries mean: reservations and commits, as a pure state machine.

Nothing here touches a file. An entry changes the books only if every rule allows it, and reading a
ledger is replaying it: the rules that admitted an entry are those that verify it.

The hash chain binds each entry to all before it, so that an edited, removed, swapped or inserted
entry is noticed. It is not signed: whoever rewrites the whole file, or puts an older copy of it in
its place, is noticed only where a head (`Head`) is known elsewhere, as a run's server knows it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, NamedTuple, Self

import dp_accounting
from pydantic import Field, model_validator

from ..config import CompositionName, FedveilError, Options, UnitName, validated
from .accounting import event_from_plain, event_to_plain
from .limits import (
    Account,
    BudgetError,
    DamagedError,
    Draw,
    LedgerError,
    Lifetime,
    TermsError,
    check,
    spent,
)
from .plan import Part, PartName, Plan, Side

# The accountants of another version may find a reservation that was within a limit just beyond it.
_REPLAY_SLACK = Decimal("1.0001")


class Head(NamedTuple):
    """Which ledger this is: how many entries, and the hash that binds them all."""

    number: int
    hash: str


EMPTY = Head(0, "")


@dataclass(frozen=True)
class Entry:
    """One entry as it is kept.

    Attributes:
        sequence: From 1.
        time: UTC, ISO 8601; for people, no rule but its order rests on it.
        kind: `opened`, `dataset`, `reserve`, `commit` or `close`.
        body: Plain values.
        hash: SHA-256 over all of the above and the hash of the entry before.
    """

    sequence: int
    time: str
    kind: str
    body: Mapping[str, Any]
    hash: str


def sealed(head: Head, time: str, kind: str, body: Mapping[str, Any]) -> Entry:
    """The entry that comes after `head`."""
    sequence = head.number + 1
    text = canonical([sequence, time, kind, body, head.hash])
    return Entry(sequence, time, kind, body, hashlib.sha256(text.encode()).hexdigest())


def canonical(value: Any) -> str:  # noqa: ANN401
    """Plain values as the one JSON text that they have here.

    Raises:
        ValueError: A number is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


@dataclass(frozen=True)
class Charge:
    """What a run may take from one account: its price by the plan, and its releases."""

    side: Side
    epsilon: float | None
    delta: float
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Order:
    """A whole run, as a site reserves it.

    Attributes:
        run_id: Which run.
        terms: SHA-256 of the configuration and the schema that the site was shown.
        dataset_id: The site's own name of its data.
        unit: The privacy unit.
        charges: By account; sides are charged side by side, for no record is on two.
    """

    run_id: str
    terms: str
    dataset_id: str
    unit: UnitName
    charges: tuple[Charge, ...]


def order(run_id: str, terms: str, dataset_id: str, plan: Plan) -> Order:
    """The order of a planned run."""
    prices = {"training": plan.training_epsilon, "holdout": plan.holdout_epsilon}
    sides: tuple[Side, ...] = ("training", "holdout")
    parts = {side: tuple(part for part in plan.parts if part.side == side) for side in sides}
    charges = [Charge(s, prices[s], plan.delta, found) for s, found in parts.items() if found]
    return Order(run_id, terms, dataset_id, plan.unit, tuple(charges))


class KeptPart(Options):
    """A part of a reservation: `event` is what one commit stands for."""

    name: PartName
    event: dict[str, Any]
    count: int = Field(ge=1, le=2**53)

    @model_validator(mode="after")
    def _check(self) -> Self:
        event_from_plain(self.event)
        return self

    @property
    def dp_event(self) -> dp_accounting.DpEvent:
        """The event."""
        return event_from_plain(self.event)


class KeptCharge(Options):
    """What a reservation takes from one account."""

    side: Side
    epsilon: float | None = Field(ge=0)
    delta: float = Field(ge=0, lt=1)
    parts: list[KeptPart] = Field(min_length=1)


class KeptLifetime(Options):
    """The limits that a run was reserved under."""

    epsilon: float | None = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    composition: CompositionName


class Reservation(Options):
    """The body of a `reserve` entry; whatever else stands in one is refused."""

    run_id: Annotated[str, Field(min_length=1)]
    terms: str
    dataset_id: Annotated[str, Field(min_length=1)]
    unit: UnitName
    charges: list[KeptCharge] = Field(min_length=1)
    lifetime: KeptLifetime

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [part.name for charge in self.charges for part in charge.parts]
        sides = [charge.side for charge in self.charges]
        if len({*names}) < len(names) or len({*sides}) < len(sides):
            raise ValueError("charges: each side and each part must stand there once")
        return self

    @property
    def parts(self) -> dict[str, KeptPart]:
        """All parts by name."""
        return {part.name: part for charge in self.charges for part in charge.parts}


@dataclass(frozen=True)
class RunBook:
    """One run in the books.

    Attributes:
        reservation: What it reserved, and under which limits.
        last: The last committed index by part.
        made: Commits by part; fewer than `last` where the site missed some.
        closed: Whether no more may come.
    """

    reservation: Reservation
    last: Mapping[str, int]
    made: Mapping[str, int]
    closed: bool = False


@dataclass(frozen=True)
class Statement:
    """An account's state, for people.

    Attributes:
        account: Whose.
        runs: Runs that reserved from it.
        made: Releases committed.
        reserved: Releases reserved, the committed ones included.
        epsilon: Spent, reservations included; `None` if a run without noise took part.
        delta: Spent.
        lifetime: Its limits, as the last run found them.
    """

    account: Account
    runs: int
    made: int
    reserved: int
    epsilon: float | None
    delta: float
    lifetime: Lifetime


@dataclass
class Books:
    """The state that a ledger's entries add up to."""

    head: Head = EMPTY
    time: str = ""
    opened: Mapping[str, Any] = field(default_factory=dict)
    datasets: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    runs: dict[str, RunBook] = field(default_factory=dict)

    def apply(self, entry: Entry) -> None:
        """Takes in the next entry of a ledger.

        Raises:
            DamagedError: It does not follow from what came before.
        """
        if entry.sequence != self.head.number + 1:
            raise DamagedError(
                f"entry {entry.sequence}: expected entry {self.head.number + 1}; one was removed "
                "or added"
            )
        try:
            whole = entry.hash == sealed(self.head, entry.time, entry.kind, entry.body).hash
            older = bool(self.time) and _moment(entry.time) < _moment(self.time)
        except (TypeError, ValueError, RecursionError):
            whole, older = False, False
        if not whole:
            raise DamagedError(
                f"entry {entry.sequence}: its hash does not fit; it was edited, or one before it "
                "was removed"
            )
        if older:
            raise DamagedError(f"entry {entry.sequence}: is older than the one before it")
        try:
            self._take(entry.kind, entry.body)
        except (FedveilError, ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise DamagedError(
                f"entry {entry.sequence}: no run of ours wrote it ({error})"
            ) from None
        self.head, self.time = Head(entry.sequence, entry.hash), entry.time

    def _take(self, kind: str, body: Mapping[str, Any]) -> None:
        if (kind == "opened") != (self.head == EMPTY):
            raise DamagedError("the first entry, and only the first, must be `opened`")
        match kind:
            case "opened":
                self.opened = body
            case "dataset":
                _same(self.bind(body["dataset_id"], body["terms"]), body)
                self.datasets[body["dataset_id"]] = body["terms"]
            case "reserve":
                reservation = validated(Reservation, body)
                self._admit(reservation, _REPLAY_SLACK)
                zeros = dict.fromkeys(reservation.parts, 0)
                self.runs[reservation.run_id] = RunBook(reservation, zeros, zeros)
            case "commit":
                _same(self.commit(body["run_id"], body["part"], body["index"]), body)
                run, part = self.runs[body["run_id"]], body["part"]
                last = {**run.last, part: body["index"]}
                made = {**run.made, part: run.made[part] + 1}
                self.runs[body["run_id"]] = replace(run, last=last, made=made)
            case "close":
                _same(self.close(body["run_id"]), body)
                self.runs[body["run_id"]] = replace(self.runs[body["run_id"]], closed=True)
            case _:
                raise DamagedError(f"unknown kind {kind!r}")

    def bind(self, dataset_id: str, terms: Mapping[str, Any]) -> dict[str, Any] | None:
        """The entry that fixes a data set's terms, or `None` if they stand there.

        The terms are whatever decides on which side a record is.

        Raises:
            TermsError: They differ from those of earlier runs.
        """
        if not isinstance(dataset_id, str) or not isinstance(terms, Mapping):
            raise TermsError("data set: needs a name and its terms")
        known = self.datasets.get(dataset_id)
        if known is None:
            return {"dataset_id": dataset_id, "terms": dict(terms)}
        for key in sorted(known.keys() | terms.keys()):
            if known.get(key) != terms.get(key):
                raise TermsError(
                    f'data set "{dataset_id}": {key} = {terms.get(key)}: was {known.get(key)} in '
                    "its first run, and a record may never change its side; keep it"
                )
        return None

    def reserve(self, asked: Order, lifetime: Lifetime) -> dict[str, Any] | None:
        """The entry that reserves a run, or `None` if it is reserved already.

        Raises:
            BudgetError: An account would be overdrawn.
            TermsError: The run was reserved on other terms, or the account adds up otherwise, or
                it is no order that can be kept.
        """
        known = self.runs.get(asked.run_id)
        # A run's limits are those that it was reserved under.
        limits = known.reservation.lifetime.model_dump() if known else asdict(lifetime)
        try:
            body = _plain(asked) | {"lifetime": limits}
            reservation = validated(Reservation, body)
        except FedveilError as error:
            raise TermsError(f"run {asked.run_id}: {error}") from None
        if known is None:
            self._admit(reservation)
            return body
        if reservation != known.reservation:
            raise TermsError(
                f"run {asked.run_id}: was reserved on other terms; the configuration, the schema "
                "or the accountants have changed"
            )
        if known.closed:
            raise BudgetError(f"run {asked.run_id}: is closed; begin a new run")
        return None

    def commit(self, run_id: str, part: str, index: int) -> dict[str, Any]:
        """The entry that commits one release of a reserved run: an integer check.

        Raises:
            BudgetError: It was made already, or is beyond what was reserved.
        """
        run = self._run(run_id)
        kept = run.reservation.parts.get(part)
        if kept is None:
            raise BudgetError(f"run {run_id}: {part}: none are reserved")
        if run.closed:
            raise BudgetError(f"run {run_id}: is closed; begin a new run")
        if type(index) is not int or not run.last[part] < index <= kept.count:
            raise BudgetError(
                f"run {run_id}: {part}: release {index} asked, {run.last[part]} of {kept.count} "
                "are used up"
            )
        return {"run_id": run_id, "part": part, "index": index, "event": kept.event}

    def close(self, run_id: str) -> dict[str, Any]:
        """The entry that ends a run; an account kept in RDP then gets its unused releases back.

        Raises:
            BudgetError: There is no such run.
        """
        self._run(run_id)
        return {"run_id": run_id}

    def statements(self) -> list[Statement]:
        """Every account."""
        runs = self.runs.values()
        accounts = {_account(run.reservation, c) for run in runs for c in run.reservation.charges}
        return [self._statement(account) for account in sorted(accounts)]

    def _run(self, run_id: str) -> RunBook:
        if run_id not in self.runs:
            raise BudgetError(f"run {run_id}: has reserved nothing")
        return self.runs[run_id]

    def _of(self, account: Account) -> list[tuple[RunBook, KeptCharge]]:
        """The runs that reserved from an account, each with its charge there."""
        return [
            (run, charge)
            for run in self.runs.values()
            for charge in run.reservation.charges
            if _account(run.reservation, charge) == account
        ]

    def _admit(self, asked: Reservation, slack: Decimal = Decimal(1)) -> None:
        if asked.run_id in self.runs:
            raise TermsError(f"run {asked.run_id}: is reserved already")
        lifetime = _lifetime(asked)
        for run in self.runs.values():
            _check_unit(run.reservation, asked)
        for charge in asked.charges:
            account = _account(asked, charge)
            earlier = [_draw(run, other) for run, other in self._of(account)]
            draw = Draw(charge.epsilon, charge.delta, events_of(charge), lifetime)
            check(account, earlier, draw, slack)

    def _statement(self, account: Account) -> Statement:
        found = self._of(account)
        lifetime = _lifetime(found[-1][0].reservation)
        parts = [(run, part) for run, charge in found for part in charge.parts]
        epsilon, delta = spent([_draw(run, charge) for run, charge in found], lifetime)
        return Statement(
            account=account,
            runs=len(found),
            made=sum(run.made[part.name] for run, part in parts),
            reserved=sum(part.count for _, part in parts),
            epsilon=None if epsilon.is_infinite() else float(epsilon),
            delta=float(delta),
            lifetime=lifetime,
        )


def _check_unit(before: Reservation, asked: Reservation) -> None:
    """A data set is kept in one unit: what a record is charged says nothing of its person.

    Nor the other way: without one of their records a person is another person, which is two steps
    of add-or-remove.
    """
    if before.dataset_id == asked.dataset_id and before.unit != asked.unit:
        raise TermsError(
            f'data set "{asked.dataset_id}": privacy.unit = "{asked.unit}": is kept by '
            f'"{before.unit}" since its first run; keep that'
        )


def _moment(time: str) -> datetime:
    return datetime.fromisoformat(time)


def events_of(charge: KeptCharge) -> Counter[dp_accounting.DpEvent]:
    """How often each event may run by a charge."""
    counts: Counter[dp_accounting.DpEvent] = Counter()
    for part in charge.parts:
        counts[part.dp_event] += part.count
    return counts


def _draw(run: RunBook, charge: KeptCharge) -> Draw:
    """What a run took, and may still take: nothing more once it is closed."""
    events: Counter[dp_accounting.DpEvent] = Counter()
    for part in charge.parts:
        still = 0 if run.closed else part.count - run.last[part.name]
        events[part.dp_event] += run.made[part.name] + still
    return Draw(charge.epsilon, charge.delta, events, _lifetime(run.reservation))


def _account(reservation: Reservation, charge: KeptCharge) -> Account:
    return Account(reservation.dataset_id, reservation.unit, charge.side)


def _lifetime(reservation: Reservation) -> Lifetime:
    return Lifetime(**reservation.lifetime.model_dump())


def _same(proposed: Mapping[str, Any] | None, body: Mapping[str, Any]) -> None:
    if proposed != body:
        raise LedgerError("it is not what the books would have written")


def _plain(asked: Order) -> dict[str, Any]:
    charges = [
        {
            "side": charge.side,
            "epsilon": charge.epsilon,
            "delta": charge.delta,
            "parts": [
                {"name": p.name, "event": event_to_plain(p.each.event), "count": p.count}
                for p in charge.parts
            ],
        }
        for charge in asked.charges
    ]
    return {
        "run_id": asked.run_id,
        "terms": asked.terms,
        "dataset_id": asked.dataset_id,
        "unit": asked.unit,
        "charges": charges,
    }
