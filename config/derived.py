"""What is in force in a run: each option as given or, where it was left out, as it follows.

An option that is left out and whose default depends on others stays `None`; a property derives it.
"""

import math
from collections.abc import Mapping
from typing import Self

from .compatibility import COMPATIBILITY, least_threshold
from .options import (
    Aggregation,
    Clean,
    Data,
    EncryptionName,
    Evaluation,
    Federation,
    ModelOptions,
    Options,
    Privacy,
    Secagg,
    Statistics,
    StrategyName,
    Training,
    UnitName,
)
from .policy import RunPolicy
from .reading import ConfigError

TRANSPORT = ("engine", "ray_address", "client_cpus", "client_gpus", "patience")
"""Options of `federation` that say where a run runs, and nothing of what it is."""

BUILT_IN_SIZES = {"sklearn:digits": 1797, "sklearn:breast_cancer": 569}
"""Published sizes of the data sets that scikit-learn ships."""

# As measured on digits and Adult. Adam's hardly depend on the clipping norm; plain descent's does.
_LEARNING_RATES: Mapping[StrategyName, float] = {
    "adam": 0.005, "sgd": 0.5, "fedavg": 0.005, "fedprox": 0.005, "fedadam": 0.005, "median": 0.005,
}  # fmt: skip
_SERVER_STEPS: tuple[StrategyName, ...] = ("adam", "sgd")
# More records a step drown the noise, at more seconds a round; beyond this the gain was small.
_EXPECTED_BATCH = 512
# As measured on Adult: who begins well is thrown back by steps that are mostly noise.
_AFTER_WARM_START = 0.2
# As measured (benchmarks/statistics_share.py): flat between a half and all of it, below that worse.
_STATISTICS_SHARES: Mapping[str, float] = {"table": 0.5, "image": 0.5, "text": 0.5}
# Under `site`, every evaluation is of the same records as the training, and of its budget.
_EVALUATED_SHARE = 0.1


class Derived(Options):
    """All sections of a run, and what follows from them; `RunConfig` checks that they fit."""

    federation: Federation = Federation()
    data: Data
    clean: Clean = Clean()
    statistics: Statistics = Statistics()
    model: ModelOptions
    training: Training = Training()
    privacy: Privacy = Privacy()
    aggregation: Aggregation = Aggregation()
    secagg: Secagg = Secagg()
    evaluation: Evaluation = Evaluation()
    policy: RunPolicy = RunPolicy()

    @property
    def strategy(self) -> StrategyName:
        """The strategy in force: the one asked for, or the mechanism's first."""
        return self.aggregation.strategy or COMPATIBILITY[self.privacy.mechanism].strategies[0]

    @property
    def encryption(self) -> EncryptionName:
        """How replies travel: as asked for, or the mechanism's first."""
        allowed = COMPATIBILITY[self.privacy.mechanism]
        return self.aggregation.encryption or allowed.encryptions[0]

    @property
    def unit(self) -> UnitName:
        """The privacy unit in force: the one asked for, or the mechanism's first."""
        return self.privacy.unit or COMPATIBILITY[self.privacy.mechanism].units[0]

    @property
    def threshold(self) -> int:
        """The secure sum's threshold in force."""
        least = least_threshold(self.federation.sites, self.secagg.t_collude)
        return self.secagg.threshold or least

    @property
    def n_min(self) -> int:
        """The least number of sites in a secure sum in force."""
        sites = self.federation.sites
        return self.secagg.n_min or max(self.threshold, sites - max(1, sites // 10))

    @property
    def trains_at_sites(self) -> bool:
        """Whether sites take steps by themselves and send models; else they send gradient sums."""
        return self.strategy not in _SERVER_STEPS

    @property
    def statistics_share(self) -> float:
        """The statistics' share of the budget in force; none while nobody said what the data is."""
        return self._statistics_share("") or 0.0

    def _statistics_share(self, modality: str) -> float | None:
        if self.privacy.statistics_share is not None:
            return self.privacy.statistics_share
        if self.model.family == "marginal":
            return 1.0
        if self.unit == "site" or (modality != "table" and not self.model.warm_start):
            return 0.0  # drowned, or of no use: only tables learn how to scale from them, too
        return _STATISTICS_SHARES.get(modality)

    @property
    def rounds(self) -> int:
        """Rounds of training in force: none where the statistics have the whole budget."""
        return 0 if self.statistics_share == 1 else self.federation.rounds

    @property
    def warm_start(self) -> bool:
        """Whether the model is trained, before any round, on samples of the statistics."""
        asked = self.model.family != "marginal" and self.model.warm_start
        return asked and self.statistics_share > 0

    @property
    def records(self) -> int:
        """The declared public number of records of the whole federation."""
        declared = self.data.records or BUILT_IN_SIZES.get(self.data.source)
        if declared is None:
            raise ConfigError(
                "data.records: missing: declare the public size of the federation's data, a "
                "round number that may be published"
            )
        return declared

    @property
    def units(self) -> int:
        """The declared public number of privacy units in the whole federation."""
        if self.unit == "site":
            return self.federation.sites
        if self.unit == "record":
            return self.records
        if self.data.persons is None:
            raise ConfigError(
                "data.persons: missing: declare the public number of persons, a round number that "
                "may be published"
            )
        return self.data.persons

    @property
    def trained(self) -> float:
        """The declared number of records or persons that the whole federation trains on."""
        whole = self.records if self.unit == "site" else self.units
        return whole * (1 - self.data.holdout - self.data.audit)

    @property
    def pool(self) -> float:
        """The declared number of records or persons that a step samples from: all, or a site's."""
        return self.trained / self.federation.sites if self.trains_at_sites else self.trained

    @property
    def delta(self) -> float:
        """The delta in force."""
        return self.privacy.delta or min(1e-5, self.units**-1.5)

    @property
    def sampling_rate(self) -> float:
        """The Poisson sampling rate in force; where sites train, of each one's own records."""
        return self.privacy.sampling_rate or min(1.0, _EXPECTED_BATCH / self.pool)

    @property
    def epsilon_holdout(self) -> float:
        """The hold-out's epsilon in force; under unit `site` a part of the run's."""
        whole = self.privacy.epsilon
        default = _EVALUATED_SHARE * whole if self.unit == "site" else whole
        return self.privacy.epsilon_holdout or default

    @property
    def evaluate_every(self) -> int:
        """Rounds between evaluations in force; 0: only at the end."""
        if self.evaluation.every is None:
            return math.ceil(self.rounds / 4)
        return self.evaluation.every

    @property
    def evaluations(self) -> int:
        """How many evaluations the run makes; the last one, after all rounds, included."""
        if self.data.holdout == 0:
            return 0
        every = self.evaluate_every
        return 1 + (max(0, self.rounds - 1) // every if every else 0)

    @property
    def dataset_id(self) -> str:
        """The account in force, of simulated sites."""
        return self.data.dataset_id or self.federation.name

    @property
    def lifetime(self) -> tuple[float | None, float]:
        """Epsilon and delta that a simulated site's account may spend; `None` is no limit."""
        limit = self.policy.epsilon_lifetime
        if limit is None and self.privacy.mechanism != "none":
            limit = max(self.privacy.epsilon, self.epsilon_holdout)
        return limit, self.policy.delta_lifetime or self.delta

    @property
    def learning_rate(self) -> float:
        """The learning rate in force."""
        after = _AFTER_WARM_START if self.warm_start else 1.0
        return self.training.learning_rate or after * _LEARNING_RATES[self.strategy]

    @property
    def min_replies(self) -> int:
        """The fewest usable replies in force."""
        if self.encryption == "secagg":
            return self.n_min
        return self.federation.min_replies or self.federation.sites // 2 + 1

    def resolved(self, modality: str = "") -> Self:
        """This configuration with every default written in that follows from it.

        Args:
            modality: The schema's; a default that hangs on it stays open without.
        """
        share = self._statistics_share(modality)
        if share != self.privacy.statistics_share:
            privacy = self.privacy.model_copy(update={"statistics_share": share})
            return self.model_copy(update={"privacy": privacy}).resolved()
        secagg = {}
        if self.encryption == "secagg":
            secagg = {"n_min": self.n_min, "threshold": self.threshold}
        return self.model_copy(
            update={
                "federation": self.federation.model_copy(
                    update={"min_replies": self.min_replies, "rounds": self.rounds}
                ),
                "data": self.data.model_copy(
                    update={"records": self.records, "dataset_id": self.dataset_id}
                ),
                "training": self.training.model_copy(update={"learning_rate": self.learning_rate}),
                "privacy": self.privacy.model_copy(
                    update={
                        "unit": self.unit,
                        "delta": self.delta,
                        "sampling_rate": self.sampling_rate,
                        "epsilon_holdout": self.epsilon_holdout,
                    }
                ),
                "aggregation": self.aggregation.model_copy(
                    update={"strategy": self.strategy, "encryption": self.encryption}
                ),
                "secagg": self.secagg.model_copy(update=secagg),
                "evaluation": self.evaluation.model_copy(update={"every": self.evaluate_every}),
            }
        )

    def shared(self) -> Self:
        """This configuration without what is each site's own to say: what the sites are sent."""
        data = self.data.model_copy(update={"ledger": None})
        defaults = {name: Federation.model_fields[name].default for name in TRANSPORT}
        federation = self.federation.model_copy(update=defaults)
        return self.model_copy(
            update={"federation": federation, "data": data, "policy": RunPolicy()}
        )
