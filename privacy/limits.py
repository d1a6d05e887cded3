"""Accounts and their limits: what runs cost together, and whether one more may come.

Runs are chosen one after another, by what earlier ones gave out, so that they need a composition
that holds for adaptive choices: addition of (epsilon, delta), or a Renyi filter.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

import dp_accounting

from ..config import CompositionName, FedveilError, UnitName
from .accounting import filter_epsilon
from .plan import Side


class LedgerError(FedveilError):
    """A ledger that cannot serve. Its text rests on configuration and ledger only."""


class BudgetError(LedgerError):
    """What was asked for is not left, or was made already."""


class TermsError(LedgerError):
    """What was asked for is not what was agreed."""


class DamagedError(LedgerError):
    """Entries that no run of ours wrote, or that are gone."""


class UnavailableError(LedgerError):
    """A ledger that cannot be read or written just now."""


class Account(NamedTuple):
    """Whose budget it is: of a declared data set, a privacy unit, and one side of its split."""

    dataset_id: str
    unit: UnitName
    side: Side

    def __str__(self) -> str:
        """As refusals name it."""
        return f"account {self.dataset_id}/{self.unit}/{self.side}"


@dataclass(frozen=True)
class Lifetime:
    """What an account may spend over all runs; `epsilon` `None` is no limit."""

    epsilon: float | None
    delta: float
    composition: CompositionName = "addition"


@dataclass(frozen=True)
class Draw:
    """What one run takes from an account.

    Attributes:
        epsilon: The price of its whole plan; `None` without noise.
        delta: Of that price.
        events: How often each event ran, or may still run.
        lifetime: The limits that it was admitted under.
    """

    epsilon: float | None
    delta: float
    events: Counter[dp_accounting.DpEvent]
    lifetime: Lifetime


def spent(draws: Sequence[Draw], lifetime: Lifetime) -> tuple[Decimal, Decimal]:
    """Epsilon and delta of all draws together.

    Formal guarantee: while both stay within limits that were fixed beforehand, everything is
    (limit, delta)-DP. Addition is basic composition, which holds for adaptively chosen runs (Rogers
    et al. 2016, section 3), and charges a run its plan however early it stopped. For `rdp` see
    `filter_epsilon`; its figure means something beside its limit only.
    """
    if not draws:
        return Decimal(0), Decimal(0)
    if lifetime.composition == "rdp":
        events = sum((draw.events for draw in draws), Counter[dp_accounting.DpEvent]())
        return as_decimal(filter_epsilon(events, lifetime.delta)), as_decimal(lifetime.delta)
    # Exact decimals: three times 0.1 is 0.3.
    epsilon = sum((as_decimal(draw.epsilon) for draw in draws), Decimal(0))
    return epsilon, sum((as_decimal(draw.delta) for draw in draws), Decimal(0))


def check(
    account: Account, earlier: Sequence[Draw], asked: Draw, slack: Decimal = Decimal(1)
) -> None:
    """Says whether one more run may draw on an account.

    Args:
        account: Whose.
        earlier: What other runs took.
        asked: What this one asks for, and under which limits.
        slack: How many times the limits it may reach.

    Raises:
        BudgetError: An account would be overdrawn.
        TermsError: The account adds up in another way.
    """
    limits = asked.lifetime
    for draw in earlier:
        _check_rule(account, draw.lifetime, limits)
    before, before_delta = spent(earlier, limits)
    epsilon, delta = spent([*earlier, asked], limits)
    if epsilon > as_decimal(limits.epsilon) * slack:
        mend = "" if limits.composition == "rdp" else ", or have the site raise the limit"
        raise BudgetError(
            f"{account}: epsilon {float(before):.6g} of {limits.epsilon:.6g} is spent, "
            f"{float(as_decimal(asked.epsilon)):.6g} more is asked, which makes "
            f"{float(epsilon):.6g} by {limits.composition}; ask for less{mend} "
            "(policy.epsilon_lifetime)"
        )
    if delta > as_decimal(limits.delta) * slack:
        raise BudgetError(
            f"{account}: delta {float(before_delta):.6g} of {limits.delta:.6g} is spent, "
            f"{asked.delta:.6g} more is asked; ask for less, or have the site raise the "
            "limit (policy.delta_lifetime)"
        )


def _check_rule(account: Account, before: Lifetime, now: Lifetime) -> None:
    """How an account adds up is fixed by its first run: a filter's rule may not be chosen late."""
    if before.composition != now.composition:
        raise TermsError(
            f'{account}: policy.composition = "{now.composition}": it is kept by '
            f'"{before.composition}" since its first run; keep that'
        )
    if now.composition == "rdp" and before != now:
        raise TermsError(
            f"{account}: policy.epsilon_lifetime, delta_lifetime = {now.epsilon}, {now.delta}: it "
            f"is kept in RDP, for {before.epsilon}, {before.delta} fixed beforehand; keep those"
        )


def as_decimal(value: float | None) -> Decimal:
    """A float as it is written; `None`, no limit or no noise, is infinite."""
    return Decimal("Infinity") if value is None else Decimal(repr(float(value)))
