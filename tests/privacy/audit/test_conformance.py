"""The pure parts of the audit's conformance: debits against events, and what is said together."""

import json
import math
from dataclasses import replace

import pytest

from fedveil.client.self_test import Tested as Found
from fedveil.privacy.audit.conformance import Conformance, Debits
from fedveil.privacy.conformance.claim import Check
from fedveil.privacy.conformance.verdict import Outcome, Verdict

CHECK = Check("noise", 1.0, 0.99, 1.01, True, "noise wrong by this part", 0.01, 0.02)
WEAK = replace(CHECK, name="rate", detectable=math.inf)
FAILED = replace(CHECK, name="clipping", statistic=1.1, passed=False)


def verdict(*checks: Check) -> Verdict:
    """As `judge` puts checks together."""
    outcome: Outcome = "consistent"
    if not all(check.passed for check in checks):
        outcome = "violated"
    elif not all(check.conclusive for check in checks):
        outcome = "inconclusive"
    return Verdict(outcome, 5e-4, checks)


@pytest.mark.parametrize(
    ("made", "took_part", "asked", "holds"),
    [
        (2, 2, 2, True),
        (2, 0, 2, True),  # it paid, and its reply came too late
        (0, 0, 2, True),  # it was never there
        (1, 2, 2, False),  # a release that it did not pay for
        (3, 2, 2, False),  # a commit that nobody asked for
        (3, 2, 3, True),  # the third round was cut off: it counts as spent
    ],
)
def test_debits(made: int, took_part: int, asked: int, *, holds: bool) -> None:
    debits = Debits("site-001", made, took_part, asked)
    assert debits.holds is holds
    found = Conformance((Found(verdict(CHECK), verdict(CHECK)),), (debits,))
    assert found.outcome == ("consistent" if holds else "violated")
    assert found.failed == (() if holds else ("ledger of site-001",))


@pytest.mark.parametrize(
    ("noise", "records", "outcome"),
    [
        ((CHECK,), (CHECK,), "consistent"),
        ((CHECK, WEAK), (CHECK,), "consistent"),  # the rate is the other trial's business
        ((CHECK,), (WEAK,), "inconclusive"),
        ((replace(CHECK, detectable=0.1),), (CHECK,), "inconclusive"),
        ((CHECK,), (replace(CHECK, detectable=0.1),), "consistent"),
        ((FAILED,), (CHECK,), "violated"),
        ((CHECK,), (FAILED,), "violated"),
        ((WEAK,), (FAILED,), "violated"),
    ],
)
def test_what_two_trials_say_together(
    noise: tuple[Check, ...], records: tuple[Check, ...], outcome: Outcome
) -> None:
    assert Found(verdict(*noise), verdict(*records)).outcome == outcome


def test_what_failed_is_told_once_and_shown_wherever_it_did() -> None:
    noise = replace(CHECK, passed=False)
    weak = replace(WEAK, passed=False)
    found = Found(verdict(noise, weak), verdict(noise, FAILED))
    assert found.failed == ("noise", "rate", "clipping")
    names = [check.name for check in found.checks]
    assert names == ["noise", "rate", "noise, little noise", "clipping, little noise"]


def test_plain_values_are_json() -> None:
    """Infinity is none."""
    check = replace(CHECK, name="clipping bound", low=-math.inf, wanted=math.inf)
    found = Conformance((Found(verdict(CHECK), verdict(check)),), ()).as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["checks"][1]["low"] is found["checks"][1]["wanted"] is None
    assert found["checks"][1]["high"] == 1.01
    assert found["false_alarm_rate"] == 1e-3
