"""One step of a state machine at a time, whatever threads ask for them."""

from collections.abc import Callable
from functools import wraps
from threading import Lock
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from .errors import StateInUseError


class Guarded(Protocol):
    """Whose steps are guarded."""

    busy: Lock


GuardedT = TypeVar("GuardedT", bound=Guarded)
Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")
_Step = Callable[Concatenate[GuardedT, Arguments], Answer]


def waiting(step: _Step[GuardedT, Arguments, Answer]) -> _Step[GuardedT, Arguments, Answer]:
    """Steps take turns."""
    return _guarded(step, blocking=True)


def refusing(step: _Step[GuardedT, Arguments, Answer]) -> _Step[GuardedT, Arguments, Answer]:
    """A second step while one is under way raises StateInUseError."""
    return _guarded(step, blocking=False)


def _guarded(
    step: _Step[GuardedT, Arguments, Answer], *, blocking: bool
) -> _Step[GuardedT, Arguments, Answer]:
    @wraps(step)
    def guarded(owner: GuardedT, /, *given: Arguments.args, **named: Arguments.kwargs) -> Answer:
        if not owner.busy.acquire(blocking=blocking):
            raise StateInUseError("this site is in another step, expected one at a time")
        try:
            return step(owner, *given, **named)
        finally:
            owner.busy.release()

    return guarded
