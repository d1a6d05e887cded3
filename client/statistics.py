"""What a site adds to the round of statistics: sums of bounded contributions, after its noise."""

import numpy as np

from ..config import RunConfig
from ..data_prep import Encoded
from ..data_prep.queries import answers, run_workload
from ..data_prep.schema import Schema
from ..models.state import Arrays
from ..privacy.mechanism import mechanism_of
from ..privacy.noise import Coins
from ..privacy.plan import Plan
from .site import Side
from .training import clipped_update


def statistics_sums(
    records: Side, config: RunConfig, schema: Schema, plan: Plan, coins: Coins
) -> Arrays:
    """What a site sends of its training records in the round of statistics.

    Formal guarantee: a function of the training records alone, with the workload's sensitivity in
    one privacy unit (a record, all records of a person, all of a site's), and the one release of
    statistics that the training account pays for: under `local` as it is, under `central` once the
    server has added its noise, under `distributed` in the secure sum. What is asked hangs on the
    schema and on declared numbers, never on records.
    """
    asked = run_workload(config, schema, plan.statistics_noise)
    persons = records.groups(plan.unit)
    encoded = Encoded(records.batch.x.numpy(), records.batch.y.numpy())
    found = answers(asked, encoded, schema, None if persons is None else persons.numpy())
    bound = asked.sensitivity * plan.statistics_units
    sums: Arrays = {"answers": np.asarray(found, dtype=np.float64)}
    if plan.unit == "site":
        # All its records are one unit's, which adds no more than so many records may.
        sums, _ = clipped_update(sums, bound)
    return mechanism_of(plan).at_site(sums, plan.statistics_noise * bound, coins)
