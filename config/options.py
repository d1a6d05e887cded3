"""The sections of a configuration: each option, its default and what it is, in one place."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

MechanismName = Literal["distributed", "central", "local", "site", "none"]
StrategyName = Literal["sgd", "adam", "fedavg", "fedprox", "fedadam", "median"]
UnitName = Literal["record", "person", "site"]
EncryptionName = Literal["none", "sealed", "secagg"]
CompositionName = Literal["addition", "rdp"]

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
MOST_SITES = 255
"""Of a secure sum: its shares of a secret are points of a field of 256."""
LEAST_NORM, MOST_NORM = 1e-6, 1e6
"""Between these is every clipping norm, also one that adapts."""


class Options(BaseModel):
    """A frozen section of the configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Federation(Options):
    """Who takes part, for how long, and where it runs."""

    name: str = Field("fedveil", pattern=NAME, description="Run name.")
    sites: Count = Field(10, description="Number of sites (simulated ones, in a simulation).")
    rounds: int = Field(
        200,
        ge=0,
        le=100_000,
        description="Rounds of training; none where the statistics have the whole budget.",
    )
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
        0.0,
        ge=0,
        le=64,
        description="GPUs that Ray keeps for a client, or the share of one (`ray`); no family "
        "computes on them yet.",
    )
    patience: Positive = Field(
        60.0,
        description="Seconds that a deployed run waits, before its first round, for sites that are "
        "away once enough others are ready.",
    )
    min_replies: Count | None = Field(
        None,
        description="Fewest usable replies a round may go on with. Default: more than half the "
        "sites; `secagg.n_min` under `secagg`.",
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
        description="A CSV or Parquet file, an npz, a folder of images by class, a .txt or .jsonl, "
        "a folder of .txt, `sklearn:digits` or `sklearn:breast_cancer`. Relative to this file.",
    )
    schema_file: str | None = Field(
        None,
        alias="schema",
        description="The schema (TOML) that declares columns and bounds, image shape and classes, "
        "or the length of a text. Built in for `sklearn:` sources.",
    )
    records: Count | None = Field(
        None,
        description="Declared, public size of the whole federation's data; never read off the "
        "data. Known for `sklearn:` sources.",
    )
    persons: Count | None = Field(
        None,
        description="Declared, public number of persons in the whole federation's data; goes with "
        '`privacy.unit = "person"`.',
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
        pattern=NAME,
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


Marginal = Annotated[tuple[str, ...], Strict(False), Field(min_length=1, max_length=3)]  # noqa: FBT003


class Statistics(Options):
    """The one round of noisy sums that describes the federation, before any training."""

    marginals: Annotated[tuple[Marginal, ...], Strict(False)] = Field(  # noqa: FBT003
        (),
        description="Tables: which columns are counted together, as a list of lists of one to "
        "three names, for who knows the columns that matter. Default: every two columns together "
        "with the label, as far as the noise leaves something of them.",
    )
    max_cells: int = Field(
        200_000,
        ge=1,
        le=4_000_000,
        description="Most cells that all queries of the round together may have.",
    )
    image_coefficients: int | None = Field(
        None,
        ge=1,
        le=144,
        description="Cosine coefficients, lowest frequencies first and all channels together, that "
        "describe an image. Default: by the declared size and the noise.",
    )
    image_covariances: Literal["class", "shared", "diagonal"] | None = Field(
        None,
        description="What is asked of how coefficients vary together: a matrix for each `class`, "
        "one `shared` by all, or variances alone (`diagonal`). Default: by the declared size and "
        "the noise.",
    )


class _Trained(Options):
    """What every family has that is trained."""

    warm_start: bool = Field(
        default=True,
        description="Whether it begins as trained, at the server and at no cost, on samples of "
        "what the noisy statistics say; goes with `privacy.statistics_share`.",
    )


class VaeOptions(_Trained):
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


class MarginalOptions(Options):
    """What the noisy statistics say, and nothing more: it is fitted to them and never trained."""

    family: Literal["marginal"] = Field(description="The kind of generator.")
    components: int = Field(
        256, ge=1, le=4096, description="Tables: products of columns that are mixed."
    )
    steps: Count = Field(
        800, description="Tables: steps of the fit, at the server; they cost no privacy."
    )


ModelOptions = Annotated[VaeOptions | MarginalOptions, Field(discriminator="family")]


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

    unit: UnitName | None = Field(
        None,
        description="What is hidden: one `record`, one `person` (all records with one value of the "
        "schema's `person`), one `site`. Default: the mechanism's first.",
    )
    mechanism: MechanismName = Field("distributed", description="Where noise is added; see below.")
    epsilon: float = Field(
        3.0, gt=0, le=100, description="Budget of the whole run over training records."
    )
    statistics_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Share of `privacy.epsilon` that pays for one round of noisy statistics before "
        "training; 0: there is none; 1: nothing is trained beyond them. Default: by the kind of "
        "data; 1 for the family `marginal`, 0 under unit `site`.",
    )
    epsilon_holdout: float | None = Field(
        None,
        gt=0,
        le=100,
        description="Budget of all figures made from held-out records. Default: `privacy.epsilon`; "
        "under unit `site` a tenth of it, and a part of it.",
    )
    delta: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Default: min(1e-5, n^-1.5) of n declared records, persons or sites.",
    )
    clipping_norm: float = Field(
        1.0,
        ge=LEAST_NORM,
        le=MOST_NORM,
        description="L2 bound of what one privacy unit adds: a gradient or, of a site, its update.",
    )
    clipping: Literal["fixed", "adaptive"] = Field(
        "fixed",
        description="`adaptive`: the bound follows a quantile of the sites' updates, from "
        '`clipping_norm` on (`mechanism = "site"`).',
    )
    clipping_quantile: float = Field(0.5, gt=0, lt=1, description="Which quantile (`adaptive`).")
    sampling_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Chance of a record or a person to be in a step. Default: 512 expected in one.",
    )


class Aggregation(Options):
    """What the server does with the sites' replies."""

    strategy: StrategyName | None = Field(
        None,
        description="How they become a model. Default: `adam`; `fedavg` under `local`, `site`.",
    )
    encryption: EncryptionName | None = Field(
        None,
        description="How replies travel: `secagg`, only their sum can be read; `sealed`, by the "
        "server only; `none`. Default: `secagg` under `distributed` and `site`.",
    )
    server_learning_rate: Positive = Field(
        0.01, description="Of the server's own step on the sites' mean change (`fedadam`)."
    )
    proximal: Positive = Field(
        0.01, description="Weight of what holds a site's model to the server's (`fedprox`)."
    )


class Secagg(Options):
    """The numbers of the secure sum, public and signed by every site; go with `secagg` only."""

    t_collude: int = Field(
        1, ge=0, le=253, description="Colluding sites, beside the server, that it is safe against."
    )
    n_min: Count | None = Field(
        None,
        description="The least number of sites in a sum. Default: a tenth of them may drop out, "
        "one at least, if the threshold allows it.",
    )
    threshold: Count | None = Field(
        None, description="Sites that must stay to the end of a round. Default: the least safe one."
    )
    epoch_rounds: int = Field(
        64, ge=1, le=4096, description="Rounds that the sites' keys are agreed for at once."
    )
    deadline: float = Field(
        600.0, gt=0, le=86_400, description="Seconds that a site has for each step of a round."
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
