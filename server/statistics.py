"""The server's half of the round of statistics: what was released, kept, and what is made of it.

All but the noise of a trusted server is post-processing of the one noised vector.
"""

import math
from dataclasses import dataclass

import numpy as np

from ..config import FedveilError, RunConfig
from ..data_prep.queries import Noisy, Workload, noisy, run_workload
from ..data_prep.schema import Schema
from ..models.state import read_file, to_bytes
from ..privacy.mechanism import mechanism_of
from ..privacy.noise import Coins
from ..privacy.plan import Plan
from .aggregation import summed
from .description import describe
from .replies import Collected
from .store import RunFolder

FILE = "statistics.safetensors"
"""The released vector, in the run folder."""

DESCRIPTION = "statistics.json"
"""What it says of the federation's data."""


@dataclass(frozen=True)
class Released:
    """What the round released.

    Attributes:
        asked: The queries.
        vector: [length] float64, their noised and weighted answers.
        scale: Standard deviation of the noise in each coordinate.
    """

    asked: Workload
    vector: np.ndarray
    scale: float


def released(
    collected: Collected, config: RunConfig, schema: Schema, plan: Plan, coins: Coins
) -> Released:
    """The noised sum over all sites.

    Formal guarantee: under `central` only the noised sum is used from here on; elsewhere it comes
    with its noise.

    Args:
        collected: The usable sites' sums, or their one sum.
        config: The run.
        schema: What a record is.
        plan: Its price.
        coins: The server's, for its noise.
    """
    asked = run_workload(config, schema, plan.statistics_noise)
    scale = plan.statistics_noise * asked.sensitivity * plan.statistics_units
    total = summed([part.sums for part in collected.parts])
    rounded = scale * collected.rounding.get("statistics", 1.0)
    vector = mechanism_of(plan).at_server(total, rounded, coins)["statistics/answers"]
    return Released(asked, vector, rounded * math.sqrt(collected.noises))


def keep(
    folder: RunFolder, found: Released, run_id: str, config: RunConfig, schema: Schema, plan: Plan
) -> Noisy:
    """Writes what was released into the run folder, and in words what it says of the data.

    It is as public as the model.
    """
    facts = {"run_id": run_id, "scale": found.scale}
    folder.write(FILE, to_bytes({"answers": found.vector}, facts))
    answers = noisy(found.asked, found.vector, found.scale, config.trained)
    said = describe(answers, schema)
    said |= {"epsilon": plan.statistics_epsilon, "unit": plan.unit, "against": plan.against}
    folder.write_json(DESCRIPTION, said)
    return answers


def kept(folder: RunFolder, run_id: str, config: RunConfig, schema: Schema, plan: Plan) -> Noisy:
    """Reads what `keep` wrote.

    Raises:
        FedveilError: There is none, or it is damaged or of another run.
    """
    path = folder.path / FILE
    arrays, facts = read_file(path)
    if facts.get("run_id") != run_id:
        raise FedveilError(f"{path}: is of run {facts.get('run_id')}, not {run_id}")
    asked = run_workload(config, schema, plan.statistics_noise)
    try:
        return noisy(asked, arrays["answers"], float(facts["scale"]), config.trained)
    except (LookupError, TypeError, ValueError):
        raise FedveilError(f"{path}: holds no statistics of this run") from None
