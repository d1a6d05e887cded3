"""When a program is started again, by an injected clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.deployment.restarts import (
    FIRST,
    LONGEST,
    STEADY,
    WRONG_CALL,
    Again,
    GiveUp,
    Past,
    after,
    delay,
)

FATAL = frozenset({WRONG_CALL})


def waits(*lives: float, code: int = 1) -> list[float]:
    """What a program that lived so long, again and again, waited for each restart."""
    found, past, now = [], Past(began=100.0), 100.0
    for life in lives:
        past, now = Past(now, past.failures), now + life
        verdict = after(past, code, now, FATAL)
        assert isinstance(verdict, Again)
        found.append(verdict.at - now)
        past, now = verdict.past, verdict.at
    return found


class TestTheSchedule:
    def test_it_doubles_from_a_second_to_a_minute(self) -> None:
        assert waits(*[0.0] * 9) == [1, 2, 4, 8, 16, 32, 60, 60, 60]

    def test_a_minute_up_makes_the_next_restart_a_first_one(self) -> None:
        assert waits(0, 0, 0, 59.9, 60.0, 0, 0) == [1, 2, 4, 8, 1, 2, 4]

    def test_a_program_that_fails_for_a_year(self) -> None:
        assert delay(10**9) == LONGEST

    @given(st.integers(1, 10**6))
    def test_it_is_bounded_and_never_falls(self, failures: int) -> None:
        assert FIRST <= delay(failures) <= delay(failures + 1) <= LONGEST

    @pytest.mark.parametrize("code", [0, 1, 3, -9, -15])
    def test_however_it_ended_it_is_started_again(self, code: int) -> None:
        assert waits(0, code=code) == [FIRST]


class TestWhatNoRestartMends:
    def test_a_fatal_code_at_the_first_start(self) -> None:
        assert after(Past(0.0), WRONG_CALL, 1.0, FATAL) == GiveUp(WRONG_CALL)

    def test_a_fatal_code_at_a_later_start(self) -> None:
        """Such as a certificate that has expired since."""
        assert after(Past(0.0, failures=3), WRONG_CALL, 1.0, FATAL) == GiveUp(WRONG_CALL)

    def test_a_program_that_was_up_is_tried_once_more(self) -> None:
        assert isinstance(after(Past(0.0), WRONG_CALL, STEADY, FATAL), Again)

    def test_only_the_named_codes_are_fatal(self) -> None:
        assert isinstance(after(Past(0.0), WRONG_CALL, 1.0, frozenset()), Again)
