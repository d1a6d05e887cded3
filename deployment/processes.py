"""Processes of ours that do not outlive the one that started them."""

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent() -> None:
    """Has the kernel kill this process when its parent's thread ends, by SIGKILL too.

    A server that went on by itself would write into a run folder that another one may hold by then.
    """
    ending_with(os.getppid())()


def ending_with(parent: int) -> Callable[[], None]:
    """The same, to be called in a child of the process `parent`, between fork and exec too.

    The kernel looks at the parent's *thread*: it must be one that lives as long as the process.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # before a fork: it takes locks

    def end() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended meanwhile
            os._exit(1)

    return end
