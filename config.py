"""What a run is: frozen options, read from one TOML file and checked in one place.

Free of torch and Flower, so that the command line answers at once. An option that is left out
and whose default depends on others stays `None` here; the properties of `RunConfig` derive it,
and `RunConfig.resolved` writes the derived values in.
"""

import difflib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MechanismName = Literal["none", "central", "local"]
StrategyName = Literal["sgd", "adam", "fedavg", "fedprox", "fedadam", "median"]
UnitName = Literal["record"]
CompositionName = Literal["addition", "rdp"]

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
ModelT = TypeVar("ModelT", bound=BaseModel)


class FedveilError(Exception):
    """An error for the user: one line that names field, value and mend.

    `exit_code` is 1 for a run that failed.
    """

    exit_code = 1


class ConfigError(FedveilError):
    """A wrong call or configuration; exit code 2."""

    exit_code = 2


class Options(BaseModel):
    """A frozen section of the configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Federation(Options):
    """Who takes part, for how long, and where it runs."""

    name: str = Field("fedveil", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Run name.")
    sites: Count = Field(10, description="Number of sites (simulated ones, in a simulation).")
    rounds: int = Field(200, ge=1, le=100_000, description="Rounds of training.")
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="Seed of public randomness: initial weights, simulated site split.",
    )
    engine: Literal["local", "ray"] = Field(
        "local",
        description="`local`: all sites in this process. `ray`: Flower's simulation over Ray, for "
        "clusters.",
    )
    ray_address: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9.-]+:[0-9]{1,5}$",
        description="HOST:PORT of a running Ray that sees this run's files. Default: a Ray of the "
        "run's own, on this machine.",
    )
    client_cpus: Count = Field(1, description="CPU cores of a client (`ray`).")
    client_gpus: float = Field(
        0.0, ge=0, le=64, description="GPUs of a client, or the share of one (`ray`)."
    )
    min_replies: Count | None = Field(
        None, description="Fewest usable replies a round may go on with; more than half the sites."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("ray_address", "client_cpus", "client_gpus"):
            default = type(self).model_fields[name].default
            if self.engine != "ray" and getattr(self, name) != default:
                raise ValueError(f'federation.{name}: goes with federation.engine = "ray" only')
        return self


class Data(Options):
    """Where the records come from and how they are shared out."""

    source: str = Field(
        min_length=1,
        description="A CSV or Parquet file, an npz, a folder of images by class, "
        "`sklearn:digits` or `sklearn:breast_cancer`. Relative to this file.",
    )
    schema_file: str | None = Field(
        None,
        alias="schema",
        description="The schema (TOML) that declares columns and bounds, or image shape and "
        "classes. Built in for `sklearn:` sources.",
    )
    records: Count | None = Field(
        None,
        description="Declared, public size of the whole federation's data; never read off the "
        "data. Known for `sklearn:` sources.",
    )
    partition: Literal["iid", "dirichlet", "column"] = Field(
        "iid", description="How a simulation shares the records out to its sites."
    )
    alpha: float = Field(
        0.5,
        gt=0,
        le=1e6,
        description="Dirichlet concentration of the label skew; small is more skewed.",
    )
    column: str | None = Field(
        None, description='The column that decides the site (`partition = "column"`).'
    )
    dataset_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="The ledger's account: declared, and the same for as long as the data is. "
        "Default: the run's name, while the ledger is new.",
    )
    ledger: str | None = Field(
        None,
        min_length=1,
        description="Folder of the simulated sites' durable ledgers and split keys, for several "
        "runs over one data set. Default: new ones in the run folder.",
    )
    holdout: Share = Field(0.1, description="Share of the records held out for evaluation.")
    audit: Share = Field(0.0, description="Share of the records kept for the audit.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.holdout + self.audit >= 1:
            raise ValueError(
                f"data.holdout + data.audit = {self.holdout + self.audit:g}: must leave records "
                "to train on; lower one of them below a sum of 1"
            )
        if self.partition == "column" and self.column is None:
            raise ValueError('data.column: missing: data.partition = "column" needs its name')
        if self.partition != "column" and self.column is not None:
            raise ValueError(
                f'data.column = "{self.column}": goes with data.partition = "column" only'
            )
        if self.ledger is not None and self.dataset_id is None:
            raise ValueError("data.dataset_id: missing: data.ledger needs the name of the account")
        return self


class Clean(Options):
    """What happens to a bad value; a missing value where none may be drops the record."""

    type_error: Literal["missing", "drop"] = Field(
        "missing", description="A value that is not of its column's kind."
    )
    unknown_category: Literal["missing", "drop"] = Field(
        "missing", description="A category that the schema does not declare."
    )
    out_of_bounds: Literal["clip", "missing", "drop"] = Field(
        "clip", description="A number outside the declared bounds."
    )


class VaeOptions(Options):
    """The conditional variational autoencoder (Kingma and Welling 2014)."""

    family: Literal["vae"] = Field(description="The kind of generator.")
    latent: Count = Field(8, description="Size of the latent code.")
    width: Count = Field(8, description="Channels of the first convolution (images).")
    hidden: Count = Field(96, description="Hidden units a layer (tables).")
    beta: Positive = Field(1.0, description="Weight of the KL term.")
    reconstruction: Literal["bce", "mse"] | None = Field(
        None,
        description="Loss of pixels and numbers. Default: `bce` for images; for tables `mse`, with "
        "a spread learnt for each column.",
    )


class Training(Options):
    """How steps are taken."""

    learning_rate: Positive | None = Field(
        None,
        description="Of the optimiser: the server's (`adam`, `sgd`), or else the sites' own.",
    )
    ema: Share = Field(
        0.9,
        description="Decay of the moving average of the weights (`adam`, `sgd`, `fedadam`); 0 is "
        "off.",
    )
    local_steps: Count = Field(
        1, description="Steps a site takes in a round (not under `adam` and `sgd`)."
    )
    micro_batch: Count = Field(
        64, description="Records processed at a time, a public size; memory, not privacy."
    )


class Privacy(Options):
    """What is promised, and how it is kept."""

    unit: UnitName = Field("record", description="What is hidden: one record.")
    mechanism: MechanismName = Field("central", description="Where noise is added; see below.")
    epsilon: float = Field(
        3.0, gt=0, le=100, description="Budget of the whole run over training records."
    )
    epsilon_holdout: float | None = Field(
        None,
        gt=0,
        le=100,
        description="Budget of all figures made from held-out records. Default: `privacy.epsilon`.",
    )
    delta: float | None = Field(None, gt=0, lt=1, description="Default: min(1e-5, records^-1.5).")
    clipping_norm: float = Field(
        1.0, ge=1e-6, le=1e6, description="L2 bound of one record's gradient."
    )
    sampling_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Chance of a record to be in a step. Default: 512 records a step expected.",
    )


class Aggregation(Options):
    """What the server does with the sites' replies."""

    strategy: StrategyName | None = Field(
        None, description="Default: `adam`; `fedavg` under `local`."
    )
    server_learning_rate: Positive = Field(
        0.01, description="Of the server's own step on the sites' mean change (`fedadam`)."
    )
    proximal: Positive = Field(
        0.01, description="Weight of what holds a site's model to the server's (`fedprox`)."
    )


class Evaluation(Options):
    """How good the generator is, by noised sums over held-out records."""

    every: int | None = Field(
        None,
        ge=0,
        description="Rounds between evaluations; 0: only at the end. Default: a quarter of them.",
    )
    samples: int = Field(
        5000,
        ge=100,
        le=1_000_000,
        description="Synthetic records that an evaluation draws and trains its classifiers on.",
    )
    training_share: Share = Field(
        0.0,
        description="Share of `privacy.epsilon` that pays for the loss of training records, to "
        "hold beside the held-out one; 0: none is made.",
    )


class Policy(Options):
    """What a simulated site's policy says; a real site's is its own and never leaves it."""

    epsilon_lifetime: Positive | None = Field(
        None, description="Limit of an account over all runs. Default: this run's, for new ledgers."
    )
    delta_lifetime: float | None = Field(
        None, gt=0, lt=1, description="Limit of an account's delta. Default: this run's."
    )
    composition: CompositionName = Field(
        "addition",
        description="How runs add up: `addition` of their (epsilon, delta); `rdp`, a Renyi filter, "
        "for many runs.",
    )


@dataclass(frozen=True)
class Allowed:
    """A row of the compatibility table: what a mechanism protects against and goes with."""

    against: str
    strategies: tuple[StrategyName, ...]
    units: tuple[UnitName, ...]


COMPATIBILITY: Mapping[MechanismName, Allowed] = {
    "central": Allowed(
        against="everyone but the server, which sees each site's un-noised sums",
        strategies=("adam", "sgd"),
        units=("record",),
    ),
    "local": Allowed(
        against="everyone, the server and the other sites included",
        strategies=("fedavg", "fedprox", "fedadam", "median"),
        units=("record",),
    ),
    "none": Allowed(
        against="NOBODY: THIS RUN IS NOT PRIVATE",
        strategies=("adam", "sgd", "fedavg", "fedprox", "fedadam", "median"),
        units=("record",),
    ),
}

BUILT_IN_SIZES = {"sklearn:digits": 1797, "sklearn:breast_cancer": 569}
"""Published sizes of the data sets that scikit-learn ships."""

# As measured on digits and Adult. Adam's hardly depend on the clipping norm; plain descent's does.
_LEARNING_RATES: Mapping[StrategyName, float] = {
    "adam": 0.005, "sgd": 0.5, "fedavg": 0.005, "fedprox": 0.005, "fedadam": 0.005, "median": 0.005,
}  # fmt: skip
_SERVER_STEPS: tuple[StrategyName, ...] = ("adam", "sgd")
# More records a step drown the noise, at more seconds a round; beyond this the gain was small.
_EXPECTED_BATCH = 512


class RunConfig(Options):
    """One run. Equal configurations price, build and train alike."""

    federation: Federation = Federation()
    data: Data
    clean: Clean = Clean()
    model: VaeOptions
    training: Training = Training()
    privacy: Privacy = Privacy()
    aggregation: Aggregation = Aggregation()
    evaluation: Evaluation = Evaluation()
    policy: Policy = Policy()

    @property
    def strategy(self) -> StrategyName:
        """The strategy in force: the one asked for, or the mechanism's first."""
        return self.aggregation.strategy or COMPATIBILITY[self.privacy.mechanism].strategies[0]

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
    def training_records(self) -> float:
        """The declared records less the shares that are held out."""
        return self.records * (1 - self.data.holdout - self.data.audit)

    @property
    def pool(self) -> float:
        """The declared number of records that a step samples from: all, or one site's."""
        pool = self.training_records
        return pool / self.federation.sites if self.trains_at_sites else pool

    @property
    def delta(self) -> float:
        """The delta in force."""
        return self.privacy.delta or min(1e-5, self.records**-1.5)

    @property
    def sampling_rate(self) -> float:
        """The Poisson sampling rate in force; where sites train, of each one's own records."""
        return self.privacy.sampling_rate or min(1.0, _EXPECTED_BATCH / self.pool)

    @property
    def epsilon_holdout(self) -> float:
        """The hold-out's epsilon in force."""
        return self.privacy.epsilon_holdout or self.privacy.epsilon

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
        return self.federation.min_replies or self.federation.sites // 2 + 1

    def resolved(self) -> "RunConfig":
        """This configuration with every default written in that follows from it alone."""
        return self.model_copy(
            update={
                "federation": self.federation.model_copy(update={"min_replies": self.min_replies}),
                "data": self.data.model_copy(
                    update={"records": self.records, "dataset_id": self.dataset_id}
                ),
                "training": self.training.model_copy(update={"learning_rate": self.learning_rate}),
                "privacy": self.privacy.model_copy(
                    update={
                        "delta": self.delta,
                        "sampling_rate": self.sampling_rate,
                        "epsilon_holdout": self.epsilon_holdout,
                    }
                ),
                "aggregation": self.aggregation.model_copy(update={"strategy": self.strategy}),
                "evaluation": self.evaluation.model_copy(update={"every": self.evaluate_every}),
            }
        )

    def shared(self) -> "RunConfig":
        """This configuration without what is each site's own to say: what the sites are sent."""
        data = self.data.model_copy(update={"ledger": None})
        return self.model_copy(update={"data": data, "policy": Policy()})

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
    if config.privacy.unit not in allowed.units:
        raise ValueError(
            f'privacy.unit = "{config.privacy.unit}": does not go with privacy.mechanism = '
            f'"{mechanism}"; use {_either(allowed.units)}'
        )
    _check_strategy(config)
    # By the declared size only: to look at the data for it would be a release.
    declared = config.data.records or BUILT_IN_SIZES.get(config.data.source)
    if declared and config.delta >= 1 / declared:
        raise ValueError(
            f"privacy.delta = {config.delta:g}: must be below 1/{declared} records, or "
            "publishing a record whole would pass"
        )
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
    for option, strategy in (("server_learning_rate", "fedadam"), ("proximal", "fedprox")):
        default = Aggregation.model_fields[option].default
        if config.strategy != strategy and getattr(config.aggregation, option) != default:
            raise ValueError(
                f'aggregation.{option}: goes with aggregation.strategy = "{strategy}" only'
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


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        ConfigError: It is missing, unreadable or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None


def parse_setting(text: str) -> tuple[str, Any]:
    """Reads `a.b=c` as a dotted key and a TOML value; what is no TOML value is a string.

    Raises:
        ConfigError: There is no `=`, or the key names no section.
    """
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise ConfigError(f"--set {text}: must be section.key=value, such as privacy.epsilon=3")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    return key.strip(), parsed["value"] if parsed.keys() == {"value"} else value.strip()


def validated(model: type[ModelT], raw: Mapping[str, Any]) -> ModelT:
    """Validates raw values against a model.

    Raises:
        ConfigError: One line on the first wrong value, and how many more there are.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_one_line(model, error)) from None


def not_below(bound: float, digits: int = 3) -> str:
    """A bound as text, rounded up: what is printed must not promise more than what holds."""
    # A hair is taken off, or 0.3 would become 0.301: it is 0.299... times a thousand.
    return f"{math.ceil(bound * 10**digits - 1e-9) / 10**digits:.{digits}f}"


def _make_paths_absolute(raw: dict[str, Any], base: Path) -> None:
    data = raw.get("data")
    for key in ("source", "schema", "ledger"):
        value = data.get(key) if isinstance(data, dict) else None
        if isinstance(value, str) and value and not value.startswith("sklearn:"):
            data[key] = str((base / value).resolve())  # type: ignore[index]


def _either(choices: tuple[str, ...]) -> str:
    return " or ".join(f'"{choice}"' for choice in choices)


def _one_line(model: type[BaseModel], error: ValidationError) -> str:
    # An unknown family explains every unknown option that comes with it, so it goes first.
    first, *more = sorted(error.errors(), key=lambda e: e["type"] == "extra_forbidden")
    field = ".".join(str(part) for part in first["loc"])
    value = json.dumps(first["input"], default=str, ensure_ascii=False)
    context = first.get("ctx", {})
    match first["type"]:
        case "value_error":
            line = str(context["error"])
        case "string_pattern_mismatch":
            line = f"{field} = {value}: must match {context['pattern']}"
        case "model_type":
            line = f"{field} = {value}: must be a section, [{field}]"
        case "extra_forbidden":
            line = f"{field}: unknown key{_did_you_mean(model, first['loc'])}"
        case "missing":
            line = f"{field}: missing: it has no default"
        case "literal_error":
            line = f"{field} = {value}: must be {context['expected']}"
            nearest = _nearest(str(first["input"]), context["expected"].split("'")[1::2])
            line += nearest if "did you mean" in nearest else ""
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            line = f"{field} = {value}: must be {_BOUNDS[first['type']]} "
            line += f"{next(iter(context.values())):g}"
        case _:
            message = first["msg"].removeprefix("Input should be ")
            line = f"{field} = {value}: must be {message}"
    return line + (f" (and {len(more)} more)" if more else "")


_BOUNDS = {
    "greater_than": ">",
    "greater_than_equal": ">=",
    "less_than": "<",
    "less_than_equal": "<=",
}


def _did_you_mean(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    owner = model
    for part in location[:-1]:
        if isinstance(part, str):  # a number counts within a list of sections
            fields = {field.alias or name: field for name, field in owner.model_fields.items()}
            owner = next(_models_in(fields[part].annotation), owner) if part in fields else owner
    names = [field.alias or name for name, field in owner.model_fields.items()]
    return _nearest(str(location[-1]), names)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:  # noqa: ANN401
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _nearest(word: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else f"; known are {', '.join(choices)}"
