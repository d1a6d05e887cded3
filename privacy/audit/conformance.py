"""Whether the installed code is the mechanism that a run was priced for, and made what it paid for.

The run's own records and releases are not touched: the self-test runs a round's code anew on public
records, with fresh coins, by the run's plan; and the ledgers are held against the run's events.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...client.self_test import Tested, self_test
from ...client.statistics_test import statistics_test
from ...client.understanding import understand
from ...config import FedveilError
from ...data_prep.schema import schema_to_json
from ...ledgers import find
from ...run import Run
from ...server.history import History, history
from ...wire import site_name
from ..ledger import verify
from ..plan import Plan

# Of a price, what the mechanism and the claim rest on.
_PRICED = (
    "mechanism",
    "unit",
    "encryption",
    "numbers",
    "epsilon",
    "delta",
    "clipping_norm",
    "adaptive",
    "noise_multiplier",
    "sampling_rate",
    "rounds",
    "releases_per_round",
    "statistics",
    "statistics_noise",
    "statistics_units",
    "evaluations",
    "evaluation_noise",
    "figures_noise",
)
# What only a simulated run's folder has.
_SIMULATED = ("ledger", "sites")


@dataclass(frozen=True)
class Debits:
    """What one site's ledger has of the run.

    Attributes:
        site: Its name.
        made: Rounds committed, the one of statistics among them.
        took_part: Rounds that its part is in, by the run's events.
        asked: How many rounds the sites were asked for.
    """

    site: str
    made: int
    took_part: int
    asked: int

    @property
    def holds(self) -> bool:
        """Whether each release that it was in was paid for, and none beyond what was asked."""
        return self.took_part <= self.made <= self.asked


@dataclass(frozen=True)
class Conformance:
    """What was found.

    Attributes:
        tested: The self-tests: of rounds, of statistics.
        debits: Of each ledger that the run folder has; none of a deployed run, where they stay at
            the sites.
    """

    tested: tuple[Tested, ...]
    debits: tuple[Debits, ...]

    @property
    def outcome(self) -> str:
        """Consistent, violated or inconclusive."""
        kept = all(debit.holds for debit in self.debits)
        outcomes = {one.outcome for one in self.tested} | ({"violated"} if not kept else set())
        worst = ("violated", "inconclusive", "consistent")
        return next(outcome for outcome in worst if outcome in outcomes)

    @property
    def failed(self) -> tuple[str, ...]:
        """What did not hold."""
        ledgers = (f"ledger of {debit.site}" for debit in self.debits if not debit.holds)
        tests = (name for one in self.tested for name in one.failed)
        return (*tests, *ledgers)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: `None` for what is infinite."""
        return {
            "verdict": self.outcome,
            "failed": list(self.failed),
            "false_alarm_rate": sum(one.noise.alarm + one.records.alarm for one in self.tested),
            "checks": [_plain(asdict(check)) for one in self.tested for check in one.checks],
            "ledgers": [{**asdict(debit), "holds": debit.holds} for debit in self.debits],
        }


def audit_conformance(run: Run) -> Conformance:
    """Tests the mechanism that a run was priced for.

    Raises:
        FedveilError: The run folder is damaged, or the run was priced otherwise than this code
            prices it: then it says nothing about that run. Or a ledger does not hold.
        ConformanceError: The run has no mechanism.
    """
    config = run.config.shared().model_dump_json(by_alias=True)
    understood = understand(config, schema_to_json(run.schema))
    priced = understood.priced
    told = history(list(run.events()))
    _check_price(priced, told)
    debits = _debits(run, told)
    sites = priced.numbers.n if priced.shares_noise and priced.numbers else 1
    tested = []
    if priced.rounds or not priced.statistics:  # without a mechanism it says that there is none
        tested.append(self_test(run.config, priced, sites, parameters=understood.parameters))
    if priced.statistics:
        tested.append(statistics_test(run.config, run.schema, priced, sites))
    return Conformance(tuple(tested), debits)


def _check_price(priced: Plan, told: History) -> None:
    prices = json.loads(json.dumps(priced.as_dict()))  # as events have it: lists, no tuples
    for name in _PRICED:
        now, then = prices[name], told.privacy.get(name)
        if now != then:
            raise FedveilError(
                f"events.jsonl: privacy.{name} = {then}: this code prices the run at {now}; audit "
                "it with the versions in environment.json"
            )


def _debits(run: Run, told: History) -> tuple[Debits, ...]:
    if not any((run.path / name).is_dir() for name in _SIMULATED):
        return ()
    asked = max([one.number for one in told.rounds] + list(told.lost), default=0)
    asked += told.described is not None or told.lost_statistics
    away: dict[str, int] = {}
    for site, _ in told.described.dropped if told.described else ():
        away[site_name(site)] = 1
    for absence in told.absences:
        name = site_name(absence.site)
        away[name] = away.get(name, 0) + len(absence.rounds)
    files = {path.stem: path for path in find(run.path)}
    found = []
    for name in (site_name(number) for number in range(1, told.sites + 1)):
        # Of a ledger that is not there nothing was committed.
        book = verify(files[name]).books.runs.get(told.run_id) if name in files else None
        made = sum(book.made.get(part, 0) for part in ("statistics", "rounds")) if book else 0
        told_of = len(told.rounds) + (told.described is not None)
        found.append(Debits(name, made, told_of - away.get(name, 0), asked))
    return tuple(found)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    infinite = {key for key, v in values.items() if isinstance(v, float) and math.isinf(v)}
    return {key: None if key in infinite else value for key, value in values.items()}
