"""The self-test of a run's statistics: their own code on public records of one column.

A record is in one level of it, so that what comes out of the workload, the clipping, the noise and
the grid can be held against the plan as in `self_test`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import product

import numpy as np
import torch

from ..config import RunConfig, Statistics
from ..data_prep import Encoded
from ..data_prep.queries import Workload, answers, run_workload
from ..data_prep.schema import Schema, parse_schema
from ..models import Batch
from ..models.state import Arrays
from ..privacy import vector
from ..privacy.conformance.claim import Claim
from ..privacy.conformance.verdict import ALARM
from ..privacy.noise import Coins
from ..privacy.plan import Plan
from .self_test import ConformanceError, Tested, Tried, check_grid, trials, whose
from .site import Side
from .statistics import statistics_sums

_OF_A_PERSON = 3  # records: more than if a record were what is clipped


def statistics_test(
    config: RunConfig,
    schema: Schema,
    priced: Plan,
    sites: int = 1,
    make: Callable[[], Coins] = Coins.from_system,
    *,
    alarm: float = ALARM,
) -> Tested:
    """Holds the installed code of the round of statistics against a plan.

    Formal guarantee: as of `self_test`.

    Args:
        config: The run.
        schema: What a record of the run is, whose own queries and grid are looked at, too.
        priced: Its plan.
        sites: See `self_test`.
        make: Gives each of them its coins.
        alarm: The false-alarm rate.

    Raises:
        ConformanceError: There are no statistics, or no mechanism; or the run's own queries have
            another sensitivity, or its grid less noise, than was priced.
    """
    if priced.epsilon is None or not priced.statistics:
        raise ConformanceError("statistics: the run releases none that could be tested")
    tried = Tried("statistics", "statistics", _own)
    asked = run_workload(config, schema, priced.statistics_noise)
    _check_whole_norm(asked, schema, priced)
    if priced.shares_noise:
        _check_own_grid(tried, asked, config, priced)
    norm = run_workload(_plain(config), _one_column(2), 1.0).sensitivity
    return trials(tried, config, _as_rounds(priced, norm), sites, make, alarm)


def _check_whole_norm(asked: Workload, schema: Schema, priced: Plan) -> None:
    """Computed anew: one record, or person, adds to all queries together what is accounted for."""
    count = _OF_A_PERSON if priced.unit == "person" else 1
    persons = np.zeros(count, dtype=np.int64) if priced.unit == "person" else None
    last = max(0, len(schema.classes) - 1)
    for value, label in product((0.0, 0.5, 1.0), (0, last)):
        x = np.full((count, *schema.shape), value, dtype=np.float32)
        records = Encoded(x, np.full(count, label, dtype=np.int64))
        moved = float(np.linalg.norm(answers(asked, records, schema, persons)))
        if not moved <= asked.sensitivity:
            raise ConformanceError(
                f"statistics = {moved:g}: one {priced.unit} must move all answers together by at "
                f"most {asked.sensitivity:g}; do not run, the installed code is not what was priced"
            )


def _check_own_grid(tried: Tried, asked: Workload, config: RunConfig, priced: Plan) -> None:
    """Holds the grid of the run's own vector against its price."""
    length, norm = asked.size(priced.statistics_units)
    none = (0, 0.0)
    sizes = vector.Sizes(0, norm, none, none, config.records, (length, norm), asked.peak)
    (release,) = vector.releases(
        sizes, priced, at_sites=False, training=False, evaluating=False, describing=True
    )
    check_grid(tried, _as_rounds(priced, norm), length, release.bound)


def _as_rounds(priced: Plan, norm: float) -> Plan:
    """A plan that says of its rounds what the plan says of its statistics."""
    return replace(
        priced,
        noise_multiplier=priced.statistics_noise,
        clipping_norm=norm,
        adaptive=False,
        sampling_rate=1.0,
        releases_per_round=1,
    )


def _own(
    config: RunConfig, priced: Plan, claim: Claim, width: int, place: int, coins: Coins
) -> Arrays:
    """What one site answers; see `Tried`."""
    mine, persons = whose(priced, claim, place)
    if priced.unit == "site":  # more than it may add, so that it is clipped
        mine = mine.repeat(2)
        persons = persons.repeat(2)
    x = torch.zeros(len(mine), width)
    x[torch.arange(len(mine)), mine] = 1.0
    records = Side(Batch(x, torch.zeros(len(mine), dtype=torch.int64)), persons)
    plan = replace(priced, statistics_noise=priced.noise_multiplier, statistics_units=1.0)
    return statistics_sums(records, _plain(config), _one_column(width), plan, coins)


def _plain(config: RunConfig) -> RunConfig:
    """Without what is asked of the run's own columns."""
    return config.model_copy(update={"statistics": Statistics()})


@lru_cache(maxsize=4)
def _one_column(levels: int) -> Schema:
    categories = [f"level-{level}" for level in range(levels)]
    column = {"name": "slot", "kind": "categorical", "categories": categories}
    return parse_schema({"column": [column]}, "self-test")
