"""A site's policy against a run: each rule refuses by its own code, and in doubt it refuses."""

import dataclasses
import itertools
import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.config import ConfigError, Policy, RunConfig, SitePolicy, validated
from fedveil.config.options import MOST_SITES
from fedveil.privacy.limits import LedgerError, Lifetime, TermsError
from fedveil.privacy.policy import (
    Asked,
    CoordinatorRefusal,
    EncryptionRefusal,
    FamilyRefusal,
    MechanismRefusal,
    ParametersRefusal,
    PolicyRefusal,
    PriceRefusal,
    RosterRefusal,
    Rule,
    UnitRefusal,
    check_policy,
    floor_of,
    lifetime_of,
)
from fedveil.privacy.secagg.errors import SecAggError
from fedveil.privacy.secagg.terms import MAX_SITES, Floor, Numbers

KEY = bytes(range(32))
TEN = Numbers(n=10, t=6, n_min=9, t_collude=1)
SHARED = Asked(
    mechanism="distributed",
    unit="record",
    family="vae",
    encryption="secagg",
    numbers=TEN,
    epsilon=3.0,
    delta=1e-5,
    parameters=1000,
    coordinator=None,
)
REFUSALS: list[type[PolicyRefusal]] = [
    RosterRefusal, MechanismRefusal, UnitRefusal, FamilyRefusal, EncryptionRefusal,
    ParametersRefusal, PriceRefusal, CoordinatorRefusal,
]  # fmt: skip


def asked(**changes: Any) -> Asked:  # noqa: ANN401
    return dataclasses.replace(SHARED, **changes)


def policy(**options: Any) -> Policy:  # noqa: ANN401
    return validated(Policy, options)


def site(**options: Any) -> SitePolicy:  # noqa: ANN401
    limits = {"dataset_id": "a", "epsilon_lifetime": 10.0, "delta_lifetime": 1e-4}
    return validated(SitePolicy, limits | options)


def refusal(rules: Policy, run: Asked) -> PolicyRefusal:
    with pytest.raises(PolicyRefusal) as caught:
        check_policy(rules, run)
    assert "\n" not in str(caught.value)
    return caught.value


class TestTheRules:
    """Each beside the limit: at it a run passes, beyond it one code refuses."""

    @pytest.mark.parametrize(
        ("rules", "changes", "code"),
        [
            ({"min_sites": 11}, {}, Rule.ROSTER),
            ({"min_uploaders": 10}, {}, Rule.ROSTER),
            ({"min_t_collude": 2}, {}, Rule.ROSTER),
            ({"mechanisms": ["site", "local"]}, {}, Rule.MECHANISM),
            ({"units": ["person"]}, {}, Rule.UNIT),
            ({"families": ["gan"]}, {}, Rule.FAMILY),
            ({"encryption": ["sealed", "none"]}, {}, Rule.ENCRYPTION),
            ({"max_parameters": 999}, {}, Rule.PARAMETERS),
            ({"max_parameters": 1000}, {"parameters": 1001}, Rule.PARAMETERS),
            ({"epsilon_per_run": 2.999}, {}, Rule.PRICE),
            ({"epsilon_per_run": 3.0}, {"epsilon": math.nextafter(3.0, 4.0)}, Rule.PRICE),
            ({"delta_per_run": 9e-6}, {}, Rule.PRICE),
            ({"delta_per_run": 1e-5}, {"delta": math.nextafter(1e-5, 1.0)}, Rule.PRICE),
            ({"coordinator": KEY.hex()}, {}, Rule.COORDINATOR),
            ({"coordinator": KEY.hex()}, {"coordinator": bytes(32)}, Rule.COORDINATOR),
            ({"coordinator": KEY.hex()}, {"coordinator": b""}, Rule.COORDINATOR),
            ({"coordinator": KEY.hex()}, {"coordinator": KEY[:31]}, Rule.COORDINATOR),
        ],
    )
    def test_refuse(self, rules: dict[str, Any], changes: dict[str, Any], code: Rule) -> None:
        assert refusal(policy(**rules), asked(**changes)).code is code

    @pytest.mark.parametrize(
        "rules",
        [
            {},
            {"min_sites": 10, "min_uploaders": 9, "min_t_collude": 1},
            {"mechanisms": ["distributed"]},
            {"units": ["person", "record"]},
            {"families": ["vae"]},
            {"encryption": ["secagg"]},
            {"max_parameters": 1000},
            {"epsilon_per_run": 3.0, "delta_per_run": 1e-5},
        ],
    )
    def test_let_pass_what_keeps_them(self, rules: dict[str, Any]) -> None:
        check_policy(policy(**rules), SHARED)
        check_policy(policy(**rules, coordinator=KEY.hex()), asked(coordinator=KEY))

    @pytest.mark.parametrize("name", ["epsilon", "delta"])
    @pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, -1.0])
    def test_a_price_that_is_none_is_no_low_price(self, name: str, value: float | None) -> None:
        limits = {"epsilon_per_run": 100.0, "delta_per_run": 0.9}
        assert refusal(policy(**limits), asked(**{name: value})).code is Rule.PRICE

    def test_no_noise_is_refused_wherever_a_run_has_a_limit(self) -> None:
        line = str(refusal(policy(epsilon_per_run=100.0), asked(mechanism="none", epsilon=None)))
        assert line == (
            "epsilon: a run without noise has no price, and the site accepts 100; use a mechanism, "
            "or have its owner change policy.epsilon_per_run"
        )
        check_policy(policy(), asked(mechanism="none", epsilon=None))

    @pytest.mark.parametrize("parameters", [-1, math.nan, 1001])
    def test_a_size_that_is_none_is_no_small_size(self, parameters: int) -> None:
        refused = refusal(policy(max_parameters=1000), asked(parameters=parameters))
        assert refused.code is Rule.PARAMETERS

    def test_a_coordinator_that_signs_unasked_is_no_reason_to_refuse(self) -> None:
        check_policy(policy(), asked(coordinator=KEY))

    def test_say_field_value_and_mend(self) -> None:
        assert str(refusal(policy(mechanisms=["local"]), SHARED)) == (
            'privacy.mechanism = "distributed": the site accepts "local"; use that, or have its '
            "owner change policy.mechanisms"
        )
        assert str(refusal(policy(epsilon_per_run=1), SHARED)) == (
            "epsilon = 3: the site accepts 1 of one run; ask for less, or have its owner change "
            "policy.epsilon_per_run"
        )
        assert str(refusal(policy(min_sites=11), SHARED)) == (
            "n = 10: expected at least 11, as this site's policy asks; raise it, or have the "
            "site's owner change policy.min_sites, min_uploaders, min_t_collude"
        )

    def test_a_wrong_coordinator_learns_of_no_other_rule(self) -> None:
        rules = policy(coordinator=KEY.hex(), mechanisms=["local"], units=["site"])
        assert refusal(rules, SHARED).code is Rule.COORDINATOR


class TestTheRosterRule:
    def test_is_the_floor_of_the_secure_sum(self) -> None:
        assert floor_of(site()) == Floor() == Floor(3, 3, 1)
        assert floor_of(site(min_sites=5, min_uploaders=4, min_t_collude=2)) == Floor(5, 4, 2)

    @pytest.mark.parametrize("encryption", ["none", "sealed"])
    def test_is_of_secure_sums_only(self, encryption: str) -> None:
        """Without one the server sees every reply, however many sites there are."""
        rules = policy(min_sites=255, min_uploaders=255, min_t_collude=253, coordinator="ab" * 32)
        signer = bytes.fromhex("ab" * 32)
        check_policy(
            rules,
            asked(encryption=encryption, numbers=None, mechanism="local", coordinator=signer),
        )

    @pytest.mark.parametrize(
        "changes",
        [
            {"numbers": None},
            {"encryption": "none"},
            {"encryption": "sealed"},
        ],
    )
    def test_refuses_a_sum_without_numbers_and_numbers_without_a_sum(
        self, changes: dict[str, Any]
    ) -> None:
        assert refusal(policy(), asked(**changes)).code is Rule.ROSTER

    def test_a_sealed_reply_is_for_a_coordinator_that_the_site_knows(self) -> None:
        """Whoever relays the task could else put a key of its own in the place of the server's."""
        sealed = asked(encryption="sealed", numbers=None, mechanism="local")
        assert refusal(policy(), sealed).code is Rule.COORDINATOR

    def test_counts_no_further_than_a_sum_can(self) -> None:
        assert MOST_SITES == MAX_SITES


class TestARealSite:
    """As design.md's example has it."""

    @pytest.mark.parametrize("mechanism", ["distributed", "site"])
    def test_accepts_shared_noise_under_a_secure_sum(self, mechanism: str) -> None:
        check_policy(site(), asked(mechanism=mechanism))

    @pytest.mark.parametrize("mechanism", ["central", "local", "none"])
    def test_accepts_no_other_mechanism(self, mechanism: str) -> None:
        assert refusal(site(), asked(mechanism=mechanism)).code is Rule.MECHANISM

    @pytest.mark.parametrize("encryption", ["none", "sealed"])
    def test_accepts_no_other_encryption(self, encryption: str) -> None:
        run = asked(mechanism="site", encryption=encryption, numbers=None)
        assert refusal(site(), run).code is Rule.ENCRYPTION

    def test_accepts_no_pair_and_no_sum_that_one_colluder_opens(self) -> None:
        assert refusal(site(), asked(numbers=Numbers(2, 2, 2, 0))).code is Rule.ROSTER
        assert refusal(site(), asked(numbers=Numbers(3, 2, 3, 0))).code is Rule.ROSTER
        check_policy(site(), asked(numbers=Numbers(3, 3, 3, 1)))


class TestARefusal:
    def test_each_rule_has_a_type_of_its_own(self) -> None:
        assert {kind.code for kind in REFUSALS} == set(Rule)
        assert len(REFUSALS) == len(Rule)
        assert all(kind.__base__ is PolicyRefusal for kind in REFUSALS)
        assert issubclass(PolicyRefusal, LedgerError)

    def test_is_made_of_one_text_and_travels_between_processes(self) -> None:
        for kind in REFUSALS:
            again = pickle.loads(pickle.dumps(kind("site-001: why")))  # noqa: S301
            assert (type(again), str(again), again.code) == (kind, "site-001: why", kind.code)

    def test_rests_on_nothing_of_a_record(self) -> None:
        """What is asked has no place for anything that a record could decide."""
        assert [field.name for field in dataclasses.fields(Asked)] == [
            "mechanism", "unit", "family", "encryption", "numbers", "epsilon", "delta",
            "parameters", "coordinator",
        ]  # fmt: skip

    def test_is_a_sentence_to_the_server_that_names_no_value(self) -> None:
        assert all(rule.value and not any(map(str.isdigit, rule.value)) for rule in Rule)


class TestALifetime:
    def test_is_the_policys(self) -> None:
        assert lifetime_of(site(composition="rdp")) == Lifetime(10.0, 1e-4, "rdp")

    def test_needs_a_delta(self) -> None:
        with pytest.raises(TermsError, match=r"^policy\.delta_lifetime: missing"):
            lifetime_of(policy(epsilon_lifetime=3.0))


names = st.sampled_from(["distributed", "central", "local", "site", "none"])
encryptions = st.sampled_from(["none", "sealed", "secagg"])


@given(
    st.builds(
        policy,
        mechanisms=st.none() | st.lists(names, min_size=1),
        encryption=st.none() | st.lists(encryptions, min_size=1),
        min_sites=st.integers(2, 12),
        min_uploaders=st.integers(2, 12),
        min_t_collude=st.integers(0, 3),
        max_parameters=st.none() | st.integers(1, 2000),
        epsilon_per_run=st.none() | st.floats(0.1, 10),
    ),
    st.builds(
        asked,
        mechanism=names,
        encryption=encryptions,
        numbers=st.sampled_from([None, TEN, Numbers(2, 2, 2, 0), Numbers(12, 8, 9, 2)]),
        epsilon=st.none() | st.floats(allow_nan=True),
        parameters=st.integers(0, 3000),
    ),
)
def test_a_run_passes_only_if_it_keeps_every_rule(rules: Policy, run: Asked) -> None:
    try:
        check_policy(rules, run)
    except PolicyRefusal:
        return
    assert rules.mechanisms is None or run.mechanism in rules.mechanisms
    assert rules.encryption is None or run.encryption in rules.encryption
    assert (run.encryption == "secagg") == (run.numbers is not None)
    if run.numbers is not None:
        assert run.numbers.n >= rules.min_sites
        assert run.numbers.n_min >= rules.min_uploaders
        assert run.numbers.t_collude >= rules.min_t_collude
    assert rules.max_parameters is None or run.parameters <= rules.max_parameters
    if rules.epsilon_per_run is not None:
        assert run.epsilon is not None
        assert run.epsilon <= rules.epsilon_per_run


def numbers_of(config: RunConfig) -> Numbers:
    return Numbers(config.federation.sites, config.threshold, config.n_min, config.secagg.t_collude)


def is_safe(config: RunConfig) -> bool:
    """By the protocol's own rules."""
    try:
        numbers = numbers_of(config)
        if config.privacy.mechanism == "distributed":
            numbers.noise_share(1.0)
    except SecAggError:
        return False
    return True


def is_allowed(raw: dict[str, Any]) -> bool:
    """By the configuration's."""
    try:
        validated(RunConfig, raw)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("sites", [1, 2, 3, 4, 5, 6, 255, 256])
@pytest.mark.parametrize("mechanism", ["distributed", "central"])
def test_the_configuration_allows_exactly_the_numbers_that_are_safe(
    mechanism: str, sites: int
) -> None:
    """Its own checks name the user's options; what they let pass is what `Numbers` does: all."""
    raw: dict[str, Any] = {
        "data": {"source": "sklearn:digits"},
        "model": {"family": "vae"},
        "privacy": {"mechanism": mechanism},
        "aggregation": {"encryption": "secagg"},
    }
    checked = validated(RunConfig, raw)
    few = sites < 10
    choices = [None, *range(1, sites + 2)] if few else [None, 127, 128, 129, 130, 254, 255, 256]
    for t_collude in range(sites + 1) if few else [0, 1, 2, 252, 253]:
        for n_min, threshold in itertools.product(choices, choices):
            numbers = {"t_collude": t_collude, "n_min": n_min, "threshold": threshold}
            # Past the checks: the same options, so that both are asked of the same.
            unchecked = checked.model_copy(
                update={
                    "federation": checked.federation.model_copy(update={"sites": sites}),
                    "secagg": checked.secagg.model_copy(update=numbers),
                }
            )
            asked = raw | {"federation": {"sites": sites}, "secagg": numbers}
            assert is_allowed(asked) == is_safe(unchecked), (sites, numbers)
