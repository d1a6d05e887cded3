"""What a site's owner accepts: options only; `privacy.policy` holds a run against them."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .options import (
    MOST_SITES,
    NAME,
    CompositionName,
    Count,
    EncryptionName,
    MechanismName,
    Options,
    Positive,
    UnitName,
)

Below1 = Annotated[float, Field(gt=0, lt=1)]
Sites = Annotated[int, Field(ge=2, le=MOST_SITES)]
# Lists that can be hashed, as all of a configuration can. What stands in one stays strict.
Mechanisms = Annotated[tuple[MechanismName, ...], Field(strict=False, min_length=1)]
Units = Annotated[tuple[UnitName, ...], Field(strict=False, min_length=1)]
Encryptions = Annotated[tuple[EncryptionName, ...], Field(strict=False, min_length=1)]
Families = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False, min_length=1)
]


class Policy(Options):
    """What a site accepts; `None` is no limit.

    These defaults accept all that a run's configuration can say: a simulated site has no owner who
    could ask for more. A real site's are those of `SitePolicy`.
    """

    epsilon_lifetime: Positive | None = Field(
        None, description="Limit of an account over all runs. Default: this run's, for new ledgers."
    )
    delta_lifetime: Below1 | None = Field(
        None, description="Limit of an account's delta. Default: this run's."
    )
    composition: CompositionName = Field(
        "addition",
        description="How runs add up: `addition` of their (epsilon, delta); `rdp`, a Renyi filter, "
        "for many runs.",
    )
    epsilon_per_run: Positive | None = Field(
        None,
        description="Most epsilon that one run may cost. Default: no limit but the lifetime's.",
    )
    delta_per_run: Below1 | None = Field(
        None, description="Most delta of one run. Default: no limit but the lifetime's."
    )
    min_sites: Sites = Field(2, description="Smallest roster of a secure sum.")
    min_uploaders: Sites = Field(2, description="Smallest `secagg.n_min`.")
    min_t_collude: int = Field(0, ge=0, le=253, description="Smallest `secagg.t_collude`.")
    mechanisms: Mechanisms | None = Field(
        None, description="Accepted `privacy.mechanism`s. Default: all."
    )
    units: Units | None = Field(None, description="Accepted `privacy.unit`s. Default: all.")
    families: Families | None = Field(
        None, description="Accepted families of models. Default: all that are installed."
    )
    encryption: Encryptions | None = Field(
        None, description="Accepted `aggregation.encryption`s. Default: all."
    )
    max_parameters: Count | None = Field(
        None, description="Most parameters that a model may have. Default: no limit."
    )
    coordinator: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="Ed25519 public key, 64 hex digits, that must have signed the run. Default: "
        "none is asked for.",
    )

    self_test: bool = Field(
        default=True,
        description="Whether the site tests the mechanism of its installed code before a run, and "
        "refuses if it is not as priced; about a second.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.composition == "rdp" and self.epsilon_lifetime is None:
            raise ValueError(
                'policy.epsilon_lifetime: missing: policy.composition = "rdp" needs a limit that '
                "is fixed beforehand, above the run's own price"
            )
        return self


class RunPolicy(Policy):
    """What all simulated sites of a run accept; a real site's policy never leaves it."""

    folder: str | None = Field(
        None,
        min_length=1,
        description="Folder of `site-001.toml`, ..., whose `[policy]` wins over this one at that "
        "simulated site. Relative to this file.",
    )


class SitePolicy(Policy):
    """What a real site accepts, in its `site.toml`: strict, unless its owner says otherwise."""

    dataset_id: str = Field(
        pattern=NAME,
        description="The ledger's account: declared, and the same for as long as the data is.",
    )
    epsilon_lifetime: Positive = Field(description="Limit of the account over all runs.")
    delta_lifetime: Below1 = Field(description="Limit of the account's delta over all runs.")
    min_sites: Sites = Field(3, description="Smallest roster of a secure sum.")
    min_uploaders: Sites = Field(3, description="Smallest `secagg.n_min`.")
    min_t_collude: int = Field(1, ge=0, le=253, description="Smallest `secagg.t_collude`.")
    mechanisms: Mechanisms | None = Field(
        ("distributed", "site"), description="Accepted `privacy.mechanism`s."
    )
    encryption: Encryptions | None = Field(
        ("secagg",), description="Accepted `aggregation.encryption`s."
    )
    approval: Literal["automatic", "manual"] = Field(
        "automatic",
        description="`automatic`: a run that the policy accepts needs no person's say; `manual`: "
        "it waits until `fedveil site approve`.",
    )
