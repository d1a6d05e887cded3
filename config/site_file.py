"""Files that say what one site accepts: a real site's `site.toml`, a simulated one's policy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from .derived import Derived
from .options import NAME, Count, Options
from .policy import Policy, SitePolicy
from .reading import ConfigError, make_absolute, read_toml, validated_in

Column = Annotated[str, Field(min_length=1)]


class SitePlaces(Options):
    """Which site it is, and where its things are; paths are relative to the file."""

    name: str = Field(pattern=NAME, description="The site's name in the federation.")
    data: str = Field(min_length=1, description="Its records: a file or a folder.")
    ledger: str | None = Field(
        None,
        min_length=1,
        description="Its ledger, a file that outlives every run. Default: the kit's "
        "`state/ledger.sqlite`.",
    )
    keys: str | None = Field(
        None, min_length=1, description="Folder of its keys. Default: the kit's `keys`."
    )
    threads: Count | None = Field(
        None, description="CPU threads that training takes. Default: all cores."
    )


class SiteFile(Options):
    """A real site's own file. It never leaves the site, and it always wins.

    Attributes:
        site: Which site it is.
        columns: The file's `[map]`: the federation's column to this site's own.
        policy: What it accepts.
    """

    site: SitePlaces
    columns: Mapping[Column, Column] = Field(default_factory=dict, alias="map")
    policy: SitePolicy


class _SimulatedSite(Options):
    """The file of a simulated site, in the run's `policy.folder`."""

    policy: Policy


def read_site(path: Path | str) -> SiteFile:
    """Reads a `site.toml`.

    Args:
        path: The file; the paths in it are relative to it.

    Raises:
        ConfigError: It is missing, no TOML, or a value in it is unusable.
    """
    path = Path(path)
    raw = read_toml(path)
    make_absolute(raw, "site", ("data", "ledger", "keys"), path.parent)
    return validated_in(path, SiteFile, raw)


def site_policy(config: Derived, name: str) -> Policy:
    """The policy in force at a simulated site: the run's, over which the site's own file wins.

    Its lifetime limits are never `None` where they have a default: this run's.

    Args:
        config: The run, as whoever simulates it gave it: what a server sends has no policy.
        name: The site's name, `site-001`, ...

    Raises:
        ConfigError: The file or a value in it is unusable, or there is no such site.
    """
    if name not in _names(config):
        raise ConfigError(f"{name}: is no site of this run; they are {_named(config)}")
    policy = Policy.model_validate(config.policy.model_dump(exclude={"folder"}))
    if config.policy.folder is not None:
        path = Path(config.policy.folder) / f"{name}.toml"
        # Not `exists`: a file that cannot be looked at must not pass for one that is not there.
        if path.name in _listed(config.policy.folder):
            policy = _overlaid(path, policy)
    epsilon, delta = config.lifetime
    return policy.model_copy(
        update={
            "epsilon_lifetime": policy.epsilon_lifetime or epsilon,
            "delta_lifetime": policy.delta_lifetime or delta,
        }
    )


def check_policies(config: Derived) -> None:
    """Reads all that stands in `policy.folder`.

    Raises:
        ConfigError: A file there is unusable, or is no site's of this run.
    """
    if config.policy.folder is None:
        return
    names = _names(config)
    for entry in _listed(config.policy.folder):
        if entry.removesuffix(".toml") not in names or not entry.endswith(".toml"):
            raise ConfigError(
                f"{Path(config.policy.folder) / entry}: policy.folder may hold the policies of "
                f"this run's sites only, {_named(config, '.toml')}; move it elsewhere"
            )
        site_policy(config, entry.removesuffix(".toml"))


def _overlaid(path: Path, policy: Policy) -> Policy:
    raw = read_toml(path)
    own = raw.get("policy")
    if isinstance(own, dict):
        raw["policy"] = policy.model_dump() | own
    return validated_in(path, _SimulatedSite, raw).policy


def _listed(folder: str) -> list[str]:
    try:
        return sorted(entry.name for entry in Path(folder).iterdir())
    except OSError as error:
        raise ConfigError(
            f'policy.folder = "{folder}": cannot be read ({error.strerror}); check the path'
        ) from None


def _names(config: Derived) -> list[str]:
    return [f"site-{number:03d}" for number in range(1, config.federation.sites + 1)]


def _named(config: Derived, ending: str = "") -> str:
    first, *more = _names(config)
    return f"{first}{ending}" + (f" to {more[-1]}{ending}" if more else "")
