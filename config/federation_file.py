"""What a federation of partner sites is: `FEDERATION.toml`, from which kits are made."""

import ipaddress
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from .options import MOST_SITES, Options
from .reading import read_toml, validated_in

PARTY = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
"""A name that fits into a certificate (64 characters, RFC 5280) and is a file's name."""
SERVER = "server"
"""The one name that is taken."""
_LEAST_SITES = 3
_HOST = re.compile(
    r"^(?=.{1,253}$)([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*"
    r"(?![0-9]+$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$"
)

Party = Annotated[str, Field(pattern=PARTY)]
Parties = Annotated[tuple[Party, ...], Field(strict=False)]
Address = Annotated[str, Field(min_length=1)]
Port = Annotated[int, Field(ge=1, le=65535)]
Days = Annotated[int, Field(ge=1, le=36525)]


class Named(Options):
    """Which federation it is."""

    name: Party = Field(description="The federation's name.")


class Server(Options):
    """Where the sites reach the server."""

    address: Address = Field(description="Host name or IP address that the sites reach it by.")
    addresses: Annotated[tuple[Address, ...], Field(strict=False)] = Field(
        (), description="Further names and addresses that its certificate is to hold for."
    )
    fleet_port: Port = Field(9443, description="Port of the Fleet API, which sites reach.")
    control_port: Port = Field(
        9444, description="Port of the control plane, which all members reach."
    )

    @property
    def names(self) -> tuple[str, ...]:
        """All that its certificate is to hold for; with its own machine, each once."""
        return tuple(dict.fromkeys((self.address, *self.addresses, "localhost", "127.0.0.1")))

    @model_validator(mode="after")
    def _check(self) -> Self:
        for field, value in (
            ("address", self.address),
            *(("addresses", one) for one in self.addresses),
        ):
            if not _is_address(value):
                raise ValueError(
                    f"server.{field} = {json.dumps(value)}: must be a host name or an IP address "
                    "that others reach, without scheme or port"
                )
        if self.fleet_port == self.control_port:
            raise ValueError(
                f"server.control_port = {self.control_port}: must differ from server.fleet_port"
            )
        return self


class Members(Options):
    """Who is to take part, by role; a name is one party's only."""

    sites: Parties = Field((), description="The sites: each trains on its own records.")
    operators: Parties = Field((), description="Who may submit, cancel and fetch runs.")
    auditors: Parties = Field((), description="Who may look at runs and fetch them.")

    def roles(self) -> Iterator[tuple[str, str]]:
        """Each name with the list that it stands in."""
        for role in ("sites", "operators", "auditors"):
            for name in getattr(self, role):
                yield name, role

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        seen: dict[str, str] = {}
        for name, role in self.roles():
            # Some disks hold no two folders that differ in their case only.
            if name.casefold() == SERVER:
                raise ValueError(f'members.{role}: "{name}" is the server\'s own; take another')
            if other := seen.get(name.casefold()):
                where = f"members.{role}" + ("" if other == role else f" and members.{other}")
                raise ValueError(f'{where}: "{name}" stands twice; give each party its own name')
            seen[name.casefold()] = role
        return self


class FirstMembers(Members):
    """Who is to take part from the beginning."""

    sites: Parties = Field(description="The sites, at least 3; each trains on its own records.")
    operators: Parties = Field(
        description="Who may submit, cancel and fetch runs; at least one.",
    )

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if len(self.sites) < _LEAST_SITES:
            raise ValueError(
                f"members.sites = {json.dumps(self.sites)}: must be at least {_LEAST_SITES} names; "
                "a secure sum of fewer hides no site among the others"
            )
        if len(self.sites) > MOST_SITES:
            raise ValueError(
                f"members.sites = {len(self.sites)} names: must be at most {MOST_SITES}, as many "
                "as a secure sum takes"
            )
        if not self.operators:
            raise ValueError("members.operators = []: must name one at least, who submits runs")
        return self


class Certificates(Options):
    """How long certificates hold."""

    days: Days = Field(825, description="Days that a member's or the server's certificate holds.")
    ca_days: Days = Field(3650, description="Days that the authority's certificate holds.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.days > self.ca_days:
            raise ValueError(
                f"certificates.days = {self.days}: must be <= certificates.ca_days, "
                f"{self.ca_days}; no certificate outlives its authority"
            )
        return self


class FederationFile(Options):
    """A federation, as its authority declares it.

    Attributes:
        federation: Which it is.
        server: Where the sites reach the server.
        members: Who takes part.
        certificates: How long certificates hold.
    """

    federation: Named
    server: Server
    members: FirstMembers
    certificates: Certificates = Certificates()


def read_federation(path: Path | str) -> FederationFile:
    """Reads a `FEDERATION.toml`.

    Raises:
        ConfigError: It is missing, no TOML, or a value in it is unusable.
    """
    path = Path(path)
    return validated_in(path, FederationFile, read_toml(path))


def _is_address(text: str) -> bool:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return _HOST.fullmatch(text) is not None
    # A scope is of one machine, and nobody reaches the unspecified address.
    return "%" not in text and not found.is_unspecified
