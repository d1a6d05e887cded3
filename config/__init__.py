"""What a run is: frozen options, read from one TOML file and checked in one place.

Free of torch and Flower, so that the command line answers at once. An option that is left out
and whose default depends on others stays `None` here; the properties of `RunConfig` derive it,
and `RunConfig.resolved` writes the derived values in.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from .checks import check_compatibility
from .compatibility import COMPATIBILITY, least_threshold
from .derived import BUILT_IN_SIZES, TRANSPORT, Derived
from .federation_file import PARTY, FederationFile, Members, Server, read_federation
from .options import (
    Aggregation,
    Clean,
    CompositionName,
    Data,
    EncryptionName,
    Federation,
    MarginalOptions,
    MechanismName,
    Options,
    Secagg,
    Statistics,
    StrategyName,
    UnitName,
    VaeOptions,
)
from .policy import Policy, RunPolicy, SitePolicy
from .reading import (
    ConfigError,
    FedveilError,
    make_absolute,
    not_below,
    parse_setting,
    read_toml,
    small_not_below,
    validated,
    validated_in,
)
from .site_file import SiteFile, check_policies, read_site, site_policy

__all__ = [
    "BUILT_IN_SIZES",
    "COMPATIBILITY",
    "PARTY",
    "TRANSPORT",
    "Aggregation",
    "Clean",
    "CompositionName",
    "ConfigError",
    "Data",
    "EncryptionName",
    "Federation",
    "FederationFile",
    "FedveilError",
    "MarginalOptions",
    "MechanismName",
    "Members",
    "Options",
    "Policy",
    "RunConfig",
    "RunPolicy",
    "Secagg",
    "Server",
    "SiteFile",
    "SitePolicy",
    "Statistics",
    "StrategyName",
    "UnitName",
    "VaeOptions",
    "check_compatibility",
    "least_threshold",
    "load_config",
    "not_below",
    "override",
    "parse_setting",
    "read_federation",
    "read_site",
    "read_toml",
    "site_policy",
    "small_not_below",
    "validated",
    "validated_in",
]


class RunConfig(Derived):
    """One run. Equal configurations price, build and train alike."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_compatibility(self)
        return self


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
    config = validated(RunConfig, raw)
    check_policies(config)
    return config


def _make_paths_absolute(raw: Mapping[str, Any], base: Path) -> None:
    make_absolute(raw, "data", ("source", "schema", "ledger"), base)
    make_absolute(raw, "policy", ("folder",), base)
