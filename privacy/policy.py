"""A site's policy, held against what is public about a run: pure, and before any data is read.

A refusal's code leaves the site, so it may rest on nothing but the configuration and the policy
(design.md, privacy rule 1): `Asked` has no field that could carry anything of a record, and the
rules are asked in one fixed order. Budgets over many runs are the ledger's (`privacy.limits`).

Formal guarantee: a run that `check_policy` lets pass breaks no rule of the policy. What is not
known to keep a rule breaks it: an epsilon of `None`, a number that is none, numbers that are not
there, a signature that nobody verified.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from ..config import EncryptionName, MechanismName, Policy, RunConfig, UnitName
from .limits import LedgerError, Lifetime, TermsError
from .plan import Plan
from .secagg.errors import BelowFloorError
from .secagg.terms import Floor, Numbers


class Rule(Enum):
    """The rules of a policy, and what a refusal by each of them says to the server."""

    ROSTER = "the secure sum has fewer sites, or is safe against fewer, than the site asks for"
    MECHANISM = "the site does not accept this mechanism"
    UNIT = "the site does not accept this privacy unit"
    FAMILY = "the site does not accept this family of models"
    ENCRYPTION = "the site does not accept this encryption of its replies"
    PARAMETERS = "the model has more parameters than the site accepts"
    PRICE = "the run costs more than the site accepts of one run"
    COORDINATOR = "the run is not signed by the coordinator that the site expects"


class PolicyRefusal(LedgerError):  # noqa: N818
    """A run that the site's owner does not accept; each rule has a type of its own.

    Attributes:
        code: The rule, which is all that the server learns.
    """

    code: ClassVar[Rule]


class RosterRefusal(PolicyRefusal):
    """A roster, `n_min` or `t_collude` below the site's floor."""

    code = Rule.ROSTER


class MechanismRefusal(PolicyRefusal):
    """A mechanism that the site does not accept."""

    code = Rule.MECHANISM


class UnitRefusal(PolicyRefusal):
    """A privacy unit that the site does not accept."""

    code = Rule.UNIT


class FamilyRefusal(PolicyRefusal):
    """A family of models that the site does not accept."""

    code = Rule.FAMILY


class EncryptionRefusal(PolicyRefusal):
    """Replies that travel otherwise than the site accepts."""

    code = Rule.ENCRYPTION


class ParametersRefusal(PolicyRefusal):
    """A larger model than the site accepts."""

    code = Rule.PARAMETERS


class PriceRefusal(PolicyRefusal):
    """A run that costs more than the site accepts of one."""

    code = Rule.PRICE


class CoordinatorRefusal(PolicyRefusal):
    """A run that the expected coordinator has not signed."""

    code = Rule.COORDINATOR


@dataclass(frozen=True)
class Asked:
    """What is public about a run, as the site itself read, priced and built it.

    Attributes:
        mechanism: Where noise is added.
        unit: What is hidden.
        family: The kind of generator.
        encryption: How replies travel.
        numbers: Those of the secure sum; `None` without one.
        epsilon: Of the site's own plan; `None` without noise.
        delta: Of that price.
        parameters: Of the model.
        coordinator: The Ed25519 key, 32 bytes, whose signature of the run the caller has verified;
            `None` if there is none.
    """

    mechanism: MechanismName
    unit: UnitName
    family: str
    encryption: EncryptionName
    numbers: Numbers | None
    epsilon: float | None
    delta: float
    parameters: int
    coordinator: bytes | None


def asked_by(config: RunConfig, priced: Plan, parameters: int, coordinator: bytes | None) -> Asked:
    """What a run asks for; see `Asked`."""
    return Asked(
        mechanism=config.privacy.mechanism,
        unit=config.unit,
        family=config.model.family,
        encryption=config.encryption,
        numbers=priced.numbers,
        epsilon=priced.epsilon,
        delta=priced.delta,
        parameters=parameters,
        coordinator=coordinator,
    )


def check_policy(policy: Policy, asked: Asked) -> None:
    """Refuses whatever breaks a site's policy; the first broken rule names itself.

    Args:
        policy: What the site's owner accepts.
        asked: The run.

    Raises:
        PolicyRefusal: By the rule that is broken. It rests on configuration and policy only.
    """
    # First of all: whoever may not ask is told nothing else.
    _check_coordinator(policy, asked)
    _check_one_of(MechanismRefusal, "privacy.mechanism", asked.mechanism, policy.mechanisms)
    _check_one_of(EncryptionRefusal, "aggregation.encryption", asked.encryption, policy.encryption)
    _check_one_of(UnitRefusal, "privacy.unit", asked.unit, policy.units)
    _check_one_of(FamilyRefusal, "model.family", asked.family, policy.families)
    _check_roster(policy, asked)
    _check_sealed(policy, asked)
    _check_parameters(policy, asked)
    _check_price("epsilon", asked.epsilon, policy.epsilon_per_run)
    _check_price("delta", asked.delta, policy.delta_per_run)


def floor_of(policy: Policy) -> Floor:
    """The least that the site asks of any set-up of a secure sum."""
    return Floor(policy.min_sites, policy.min_uploaders, policy.min_t_collude)


def lifetime_of(policy: Policy) -> Lifetime:
    """What an account may spend under a policy that is in force (`config.site_policy`).

    Raises:
        TermsError: It does not say which delta.
    """
    if policy.delta_lifetime is None:
        raise TermsError(
            "policy.delta_lifetime: missing: an account needs a limit of delta; set it"
        )
    return Lifetime(policy.epsilon_lifetime, policy.delta_lifetime, policy.composition)


def _check_coordinator(policy: Policy, asked: Asked) -> None:
    if policy.coordinator is None:
        return
    if asked.coordinator is None or asked.coordinator != bytes.fromhex(policy.coordinator):
        found = "nobody" if asked.coordinator is None else asked.coordinator.hex()
        raise CoordinatorRefusal(
            f"coordinator = {found}: the run must be signed by {policy.coordinator}; have it "
            "signed, or change policy.coordinator"
        )


def _check_sealed(policy: Policy, asked: Asked) -> None:
    """A sealed reply is as good as the word of whoever says for whom it is sealed."""
    if asked.encryption == "sealed" and policy.coordinator is None:
        raise CoordinatorRefusal(
            'aggregation.encryption = "sealed": would be sealed for whoever asks, as long as '
            "policy.coordinator does not say who may; set it"
        )


def _check_one_of(
    refusal: type[PolicyRefusal], option: str, asked: str, accepted: Sequence[str] | None
) -> None:
    if accepted is not None and asked not in accepted:
        names = " or ".join(f'"{name}"' for name in accepted)
        raise refusal(
            f'{option} = "{asked}": the site accepts {names}; use that, or have its owner change '
            f"policy.{_POLICY_OPTION[refusal]}"
        )


_POLICY_OPTION: dict[type[PolicyRefusal], str] = {
    MechanismRefusal: "mechanisms",
    EncryptionRefusal: "encryption",
    UnitRefusal: "units",
    FamilyRefusal: "families",
}


def _check_roster(policy: Policy, asked: Asked) -> None:
    """Of a secure sum only: otherwise the server sees each reply, whatever the roster is."""
    if (asked.encryption == "secagg") != (asked.numbers is not None):
        raise RosterRefusal(
            f'aggregation.encryption = "{asked.encryption}": n, n_min and t_collude go with '
            '"secagg", and "secagg" with them; set both or neither'
        )
    if asked.numbers is None:
        return
    try:
        floor_of(policy).check(asked.numbers)
    except BelowFloorError as error:
        raise RosterRefusal(
            f"{error}; raise it, or have the site's owner change policy.min_sites, "
            "min_uploaders, min_t_collude"
        ) from None


def _check_parameters(policy: Policy, asked: Asked) -> None:
    most = policy.max_parameters
    # Written so that what is no number is refused: nothing compares with NaN.
    if most is not None and not 0 <= asked.parameters <= most:
        raise ParametersRefusal(
            f"model: has {asked.parameters} parameters, the site accepts {most}; use a smaller "
            "one, or have its owner change policy.max_parameters"
        )


def _check_price(name: str, asked: float | None, most: float | None) -> None:
    if most is None:
        return
    if asked is None:
        raise PriceRefusal(
            f"{name}: a run without noise has no price, and the site accepts {most:g}; use a "
            f"mechanism, or have its owner change policy.{name}_per_run"
        )
    if not 0 <= asked <= most:
        raise PriceRefusal(
            f"{name} = {asked:.6g}: the site accepts {most:g} of one run; ask for less, or have "
            f"its owner change policy.{name}_per_run"
        )
