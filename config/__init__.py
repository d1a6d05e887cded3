"""What a run is: frozen options, read from one TOML file and checked in one place.

Free of torch and Flower, so that the command line answers at once. An option that is left out
and whose default depends on others stays `None` here; the properties of `RunConfig` derive it,
and `RunConfig.resolved` writes the derived values in.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from .options import (
    Aggregation,
    Clean,
    CompositionName,
    Data,
    EncryptionName,
    Evaluation,
    Federation,
    MechanismName,
    Options,
    Policy,
    Privacy,
    Secagg,
    StrategyName,
    Training,
    UnitName,
    VaeOptions,
)
from .reading import (
    ConfigError,
    FedveilError,
    not_below,
    parse_setting,
    read_toml,
    small_not_below,
    validated,
)

__all__ = [
    "BUILT_IN_SIZES",
    "COMPATIBILITY",
    "TRANSPORT",
    "Aggregation",
    "Clean",
    "CompositionName",
    "ConfigError",
    "Data",
    "EncryptionName",
    "Federation",
    "FedveilError",
    "MechanismName",
    "Options",
    "Policy",
    "RunConfig",
    "Secagg",
    "StrategyName",
    "UnitName",
    "VaeOptions",
    "check_compatibility",
    "least_threshold",
    "load_config",
    "not_below",
    "override",
    "parse_setting",
    "read_toml",
    "small_not_below",
    "validated",
]


@dataclass(frozen=True)
class Allowed:
    """A row of the compatibility table: what a mechanism protects against and goes with.

    The first of each is the default.
    """

    against: str
    strategies: tuple[StrategyName, ...]
    units: tuple[UnitName, ...]
    encryptions: tuple[EncryptionName, ...] = ("none", "sealed", "secagg")


COMPATIBILITY: Mapping[MechanismName, Allowed] = {
    "distributed": Allowed(
        against="everyone: the server, and up to secagg.t_collude sites beside it",
        strategies=("adam", "sgd"),
        units=("record", "person"),
        encryptions=("secagg",),
    ),
    "central": Allowed(
        against="everyone but the server, which sees each site's un-noised sums",
        strategies=("adam", "sgd"),
        units=("record", "person"),
    ),
    "local": Allowed(
        against="everyone, the server and the other sites included",
        strategies=("fedavg", "fedprox", "fedadam", "median"),
        units=("record", "person"),
    ),
    "site": Allowed(
        against="everyone: the server, and up to secagg.t_collude sites beside it",
        strategies=("fedavg", "fedadam"),
        units=("site",),
        encryptions=("secagg", "none", "sealed"),
    ),
    "none": Allowed(
        against="NOBODY: THIS RUN IS NOT PRIVATE",
        strategies=("adam", "sgd", "fedavg", "fedprox", "fedadam", "median"),
        units=("record", "person"),
    ),
}

TRANSPORT = ("engine", "ray_address", "client_cpus", "client_gpus")
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
# Under `site`, every evaluation is of the same records as the training, and of its budget.
_EVALUATED_SHARE = 0.1


def least_threshold(n: int, t_collude: int) -> int:
    """floor((n + t_collude) / 2) + 1: the smallest safe threshold of a secure sum.

    For the server to have two sets of uploaders confirmed, t - t_collude honest sites must sign
    each, and none signs two: 2 (t - t_collude) <= n - t_collude. One more than that is impossible.
    """
    return (n + t_collude) // 2 + 1


class RunConfig(Options):
    """One run. Equal configurations price, build and train alike."""

    federation: Federation = Federation()
    data: Data
    clean: Clean = Clean()
    model: VaeOptions
    training: Training = Training()
    privacy: Privacy = Privacy()
    aggregation: Aggregation = Aggregation()
    secagg: Secagg = Secagg()
    evaluation: Evaluation = Evaluation()
    policy: Policy = Policy()

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
    def pool(self) -> float:
        """The declared number of records or persons that a step samples from: all, or a site's."""
        whole = self.records if self.unit == "site" else self.units
        pool = whole * (1 - self.data.holdout - self.data.audit)
        return pool / self.federation.sites if self.trains_at_sites else pool

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
            return math.ceil(self.federation.rounds / 4)
        return self.evaluation.every

    @property
    def evaluations(self) -> int:
        """How many evaluations the run makes; the last one, after all rounds, included."""
        if self.data.holdout == 0:
            return 0
        every = self.evaluate_every
        return 1 + ((self.federation.rounds - 1) // every if every else 0)

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
        return self.training.learning_rate or _LEARNING_RATES[self.strategy]

    @property
    def min_replies(self) -> int:
        """The fewest usable replies in force."""
        if self.encryption == "secagg":
            return self.n_min
        return self.federation.min_replies or self.federation.sites // 2 + 1

    def resolved(self) -> "RunConfig":
        """This configuration with every default written in that follows from it alone."""
        secagg = {}
        if self.encryption == "secagg":
            secagg = {"n_min": self.n_min, "threshold": self.threshold}
        return self.model_copy(
            update={
                "federation": self.federation.model_copy(update={"min_replies": self.min_replies}),
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

    def shared(self) -> "RunConfig":
        """This configuration without what is each site's own to say: what the sites are sent."""
        data = self.data.model_copy(update={"ledger": None})
        defaults = {name: Federation.model_fields[name].default for name in TRANSPORT}
        federation = self.federation.model_copy(update=defaults)
        return self.model_copy(update={"federation": federation, "data": data, "policy": Policy()})

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_compatibility(self)
        return self


def check_compatibility(config: RunConfig) -> None:
    """Holds a configuration against the compatibility table.

    Raises:
        ValueError: Names the option that does not go with the mechanism, and what does.
    """
    mechanism = config.privacy.mechanism
    allowed = COMPATIBILITY[mechanism]
    if config.strategy not in allowed.strategies:
        raise ValueError(
            f'aggregation.strategy = "{config.strategy}": does not go with privacy.mechanism = '
            f'"{mechanism}"; use {_either(allowed.strategies)}'
        )
    if config.unit not in allowed.units:
        raise ValueError(
            f'privacy.unit = "{config.unit}": does not go with privacy.mechanism = '
            f'"{mechanism}"; use {_either(allowed.units)}'
        )
    if config.encryption not in allowed.encryptions:
        raise ValueError(
            f'aggregation.encryption = "{config.encryption}": does not go with privacy.mechanism = '
            f'"{mechanism}", where a site adds a share of the noise and only the sum is private; '
            f"use {_either(allowed.encryptions)}"
        )
    _check_strategy(config)
    _check_unit(config)
    if config.encryption == "secagg":
        _check_secagg(config)
    if config.data.ledger is not None:
        _check_durable(config)
    if config.policy.composition == "rdp" and config.policy.epsilon_lifetime is None:
        raise ValueError(
            'policy.epsilon_lifetime: missing: policy.composition = "rdp" needs a limit that is '
            "fixed beforehand, above the run's own price"
        )
    if config.evaluation.training_share and not config.evaluations:
        raise ValueError(
            f"evaluation.training_share = {config.evaluation.training_share:g}: needs records to "
            "hold the figures against; set data.holdout > 0"
        )
    if config.min_replies > config.federation.sites:
        raise ValueError(
            f"federation.min_replies = {config.min_replies}: must be at most federation.sites = "
            f"{config.federation.sites}"
        )


def _check_strategy(config: RunConfig) -> None:
    """Refuses options that the strategy in force does not read."""
    if config.training.local_steps > 1 and not config.trains_at_sites:
        raise ValueError(
            f"training.local_steps = {config.training.local_steps}: {config.strategy} takes one "
            'step a round at the server; use 1, or aggregation.strategy = "fedavg"'
        )
    if config.strategy == "fedprox" and config.training.local_steps == 1:
        raise ValueError(
            "training.local_steps = 1: the first step begins at the server's model, where fedprox "
            'pulls nowhere; take more, or aggregation.strategy = "fedavg"'
        )
    for option, strategy in (("server_learning_rate", "fedadam"), ("proximal", "fedprox")):
        default = Aggregation.model_fields[option].default
        if config.strategy != strategy and getattr(config.aggregation, option) != default:
            raise ValueError(
                f'aggregation.{option}: goes with aggregation.strategy = "{strategy}" only'
            )


def _check_unit(config: RunConfig) -> None:
    """Sizes and options hang on what is hidden."""
    if (config.unit == "person") != (config.data.persons is not None):
        raise ValueError(
            "data.persons: declare the public number of persons, and only with privacy.unit = "
            '"person"'
        )
    # By the declared size only: to look at the data for it would be a release.
    known = config.data.records or BUILT_IN_SIZES.get(config.data.source)
    declared = config.units if config.unit != "record" else known
    if declared and config.delta >= 1 / declared:
        raise ValueError(
            f"privacy.delta = {config.delta:g}: must be below 1/{declared} {config.unit}s, or "
            f"publishing a {config.unit} whole would pass"
        )
    if config.unit != "site":
        for option in ("clipping", "clipping_quantile"):
            if getattr(config.privacy, option) != Privacy.model_fields[option].default:
                raise ValueError(f'privacy.{option}: goes with privacy.mechanism = "site" only')
        return
    if config.evaluations and config.epsilon_holdout >= config.privacy.epsilon:
        raise ValueError(
            f"privacy.epsilon_holdout = {config.epsilon_holdout:g}: must be below privacy.epsilon "
            f"= {config.privacy.epsilon:g}, for a site's held-out records are the same site's"
        )
    if config.evaluation.training_share:
        raise ValueError(
            f"evaluation.training_share = {config.evaluation.training_share:g}: goes with the "
            "units record and person"
        )


def _check_secagg(config: RunConfig) -> None:
    """What the secure sum asks of the roster; what its numbers must be, `plan` says."""
    sites, shared = config.federation.sites, config.privacy.mechanism in {"distributed", "site"}
    if sites < (3 if shared else 2):
        raise ValueError(
            f'federation.sites = {sites}: aggregation.encryption = "secagg" needs at least '
            f"{3 if shared else 2} sites; use more, or privacy.mechanism = "
            '"central" with aggregation.encryption = "none"'
        )
    if config.strategy == "median":
        raise ValueError(
            'aggregation.strategy = "median": needs each site\'s model, and aggregation.encryption '
            '= "secagg" shows their sum only; use "fedavg", or another encryption'
        )
    if config.federation.min_replies not in {None, config.n_min}:
        raise ValueError(
            f"federation.min_replies = {config.federation.min_replies}: set secagg.n_min instead, "
            f"here {config.n_min}"
        )


def _check_durable(config: RunConfig) -> None:
    """A ledger that outlives the run needs limits that were said beforehand."""
    if config.privacy.mechanism == "none":
        raise ValueError(
            'data.ledger: no budget pays for privacy.mechanism = "none"; leave data.ledger out'
        )
    for name in ("epsilon_lifetime", "delta_lifetime"):
        if getattr(config.policy, name) is None:
            raise ValueError(
                f"policy.{name}: missing: data.ledger outlives this run, so say what all runs "
                "together may spend"
            )


def load_config(path: Path | str, settings: Mapping[str, Any] | None = None) -> RunConfig:
    """Reads a configuration file.

    Paths in the file are relative to it; paths in `settings` to the working directory.

    Args:
        path: The TOML file.
        settings: Values that win over the file's, by dotted key (`{"privacy.epsilon": 3}`).

    Raises:
        ConfigError: The file or a value in it is unusable.
    """
    path = Path(path)
    raw = read_toml(path)
    # Before the settings come in: theirs are relative to where the user stands.
    _make_paths_absolute(raw, path.parent)
    return override(raw, settings or {})


def override(raw: dict[str, Any], settings: Mapping[str, Any]) -> RunConfig:
    """A configuration from plain values, where those of `settings` win, by dotted key.

    Raises:
        ConfigError: A value is unusable.
    """
    for key, value in settings.items():
        *sections, last = key.split(".")
        owner = raw
        for section in sections:
            owner = owner.setdefault(section, {})
            if not isinstance(owner, dict):
                raise ConfigError(f"{key}: {section} is no section")
        owner[last] = value
    _make_paths_absolute(raw, Path.cwd())
    return validated(RunConfig, raw)


def _make_paths_absolute(raw: dict[str, Any], base: Path) -> None:
    data = raw.get("data")
    for key in ("source", "schema", "ledger"):
        value = data.get(key) if isinstance(data, dict) else None
        if isinstance(value, str) and value and not value.startswith("sklearn:"):
            data[key] = str((base / value).resolve())  # type: ignore[index]


def _either(choices: tuple[str, ...]) -> str:
    return " or ".join(f'"{choice}"' for choice in choices)
