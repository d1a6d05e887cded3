"""When a program that ended is started again: decisions only, no process and no clock."""

from dataclasses import dataclass, replace

FIRST = 1.0
"""Seconds until the first restart; each further one waits twice as long."""

LONGEST = 60.0
"""Seconds that none waits longer than."""

STEADY = 60.0
"""Seconds after which a program is up: the next restart is a first one again."""

WRONG_CALL = 2
"""Exit code of a wrong call or configuration, which no restart mends."""


@dataclass(frozen=True)
class Past:
    """What is known of a program's starts.

    Attributes:
        began: When it was started last, in seconds of a clock that only goes forward.
        failures: How often running it ended too soon, one after the other.
    """

    began: float = 0.0
    failures: int = 0


@dataclass(frozen=True)
class Again:
    """It is to be started again.

    Attributes:
        at: When.
        past: What is known of its starts by then.
    """

    at: float
    past: Past


@dataclass(frozen=True)
class GiveUp:
    """No restart mends it.

    Attributes:
        code: The exit code that says so.
    """

    code: int


def delay(failures: int) -> float:
    """Seconds to wait before a restart, after so many failures, at least one."""
    # The exponent is bounded: a program that fails for a year must not overflow.
    return min(LONGEST, FIRST * 2.0 ** min(failures - 1, 16))


def after(past: Past, code: int, now: float, fatal: frozenset[int]) -> Again | GiveUp:
    """What to do about a program that has ended.

    A fatal code counts while the program starts, at the first start or a later one: what it says
    is wrong it found out by then. Later it is a failure like any other.

    Args:
        past: Its starts.
        code: How it ended; -N by signal N.
        now: The time, of the same clock as `past.began`.
        fatal: Codes that no restart mends.
    """
    steady = now - past.began >= STEADY
    if code in fatal and not steady:
        return GiveUp(code)
    failures = 1 if steady else past.failures + 1
    return Again(now + delay(failures), replace(past, failures=failures))
