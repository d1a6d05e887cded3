"""Keeps programs running: starts them, starts again what ended, and takes all of them along.

One thread, which waits for signals, output and time at once. When to start again is decided in
`restarts.py`. Each program is the leader of a session of its own; it is killed by the kernel when
the supervisor ends, however that ends, and what it has started itself is killed when it has ended,
unless that made a session of its own.
"""

import logging
import math
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from .logs import emit, read_line
from .processes import ending_with
from .restarts import WRONG_CALL, Again, GiveUp, Past, after

_STOP = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_NO_SUCH_PROGRAM = 127  # as a shell has it
_LONGEST_LINE = 2**16  # bytes of output that are kept while no line ends
_LAST_READS = 32  # of what a program left in its pipe, which may be larger than usual
_PATIENCE = 5.0  # seconds between looks at the children, should a signal be lost

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """What is to be kept running.

    Attributes:
        name: What the logs call it.
        command: The program and its arguments.
        grace: Seconds that it has to end after SIGTERM.
        fatal: Exit codes that no restart mends, while it starts.
    """

    name: str
    command: tuple[str, ...]
    grace: float = 10.0
    fatal: frozenset[int] = frozenset({WRONG_CALL})


@dataclass(frozen=True)
class Notice:
    """What happened to a program.

    Attributes:
        event: `ended` and is started again, `failed` for good, or `stopped` as it was told to.
        program: Its name.
        pid: Its process; 0 if there was none.
        code: How it ended; -N by signal N.
        wait: Seconds until it is started again.
        cause: The last error that it told.
    """

    event: Literal["started", "ended", "failed", "stopped"]
    program: str
    pid: int = 0
    code: int = 0
    wait: float = 0.0
    cause: str = ""


Announce = Callable[[Notice], None]


def log_notice(notice: Notice) -> None:
    """Logs what happened to a program."""
    about = {"event": notice.event, "program": notice.program, "pid": notice.pid}
    match notice.event:
        case "started":
            _logger.info("%s: started", notice.program, extra=about)
        case "ended":
            _logger.warning(
                "%s: ended %s; is started again in %g s",
                notice.program,
                how_ended(notice.code),
                notice.wait,
                extra=about | {"code": notice.code, "cause": notice.cause},
            )
        case "failed":
            _logger.error(
                "%s: %s",
                notice.program,
                notice.cause or f"ended {how_ended(notice.code)}",
                extra=about | {"code": notice.code},
            )
        case "stopped":
            _logger.info("%s: stopped", notice.program, extra=about | {"code": notice.code})


def how_ended(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"with code {code}"
    with suppress(ValueError):
        return f"by {signal.Signals(-code).name}"
    return f"by signal {-code}"


def supervise(
    programs: Sequence[Program],
    *,
    environment: Mapping[str, str] | None = None,
    announce: Announce = log_notice,
) -> int:
    """Keeps programs running until SIGTERM, SIGINT or SIGHUP, or until one fails for good.

    It must be called in the main thread: signals come there, and programs are killed by the kernel
    when the thread that started them ends.

    Args:
        programs: In the order in which they are started; they are stopped in the reverse one.
        environment: Of the programs; by default this process's own.
        announce: Told what happens; the programs' output goes to stderr anyway, see `logs`.

    Returns:
        0 if it was told to stop, else the code of the program that failed.
    """
    children = [_Child(program, environment) for program in programs]
    with _wakeup() as wakeup:
        try:
            return _tend(children, wakeup, announce)
        finally:
            for child in reversed(children):
                _stop(child, wakeup, announce)


class _Wakeup:
    """Waits for signals, for output of children and for time."""

    def __init__(self, signals: socket.socket) -> None:
        self.selector = selectors.DefaultSelector()
        self._signals, self._seen = signals, set[int]()
        self.selector.register(signals, selectors.EVENT_READ, self._note)

    def wait(self, seconds: float) -> set[int]:
        """Returns when a signal or output came, or time is up; the signals."""
        for key, _ in self.selector.select(max(0.0, min(seconds, _PATIENCE))):
            key.data()
        seen, self._seen = self._seen, set()
        return seen

    def _note(self) -> None:
        with suppress(BlockingIOError):
            self._seen |= set(self._signals.recv(4096))


@contextmanager
def _wakeup() -> Iterator[_Wakeup]:
    """Has signals written into a socket, so that none is missed between a look and a wait."""
    reading, writing = socket.socketpair()
    with reading, writing:
        reading.settimeout(0)
        writing.settimeout(0)
        before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        # What nohup and shells have set aside for us stays aside.
        heard = {one for one in _STOP if signal.getsignal(one) is not signal.SIG_IGN}
        handlers = {one: signal.signal(one, _noted) for one in {*heard, signal.SIGCHLD}}
        wakeup = _Wakeup(reading)
        try:
            yield wakeup
        finally:
            for one, handler in handlers.items():
                signal.signal(one, handler)
            signal.set_wakeup_fd(before)
            wakeup.selector.close()


def _noted(number: int, frame: FrameType | None) -> None:
    """Does nothing: the signal's number is in the socket by now."""


class _Child:
    """A program, its process if it runs, and what is known of its starts."""

    def __init__(self, program: Program, environment: Mapping[str, str] | None) -> None:
        self.program, self._environment = program, environment
        self.past, self.due, self.cause = Past(), 0.0, ""
        self.process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def start(self, now: float, selector: selectors.BaseSelector) -> bool:
        """Starts it; whether there is a process now."""
        self.past, self.cause, self._rest = Past(now, self.past.failures), "", b""
        try:
            self.process = subprocess.Popen(  # noqa: S603  what we were given to run
                self.program.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
                preexec_fn=ending_with(os.getpid()),  # noqa: PLW1509  there is one thread
            )
        except OSError as error:
            self.cause = f"cannot be started ({error.strerror})"
            return False
        output = self._output(self.process)
        os.set_blocking(output, False)
        selector.register(output, selectors.EVENT_READ, lambda: self._relay(output, selector))
        return True

    def has_ended(self) -> bool:
        """Whether its process has; it is not reaped yet, so that its number stays its own."""
        if self.process is None:
            return False
        how = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, how) is not None

    def bury(self, selector: selectors.BaseSelector) -> int:
        """Kills its process, if it still runs, and all that this has started; how it ended."""
        process, self.process = self.process, None
        if process is None:
            return _NO_SUCH_PROGRAM
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        output = self._output(process)
        for _ in range(_LAST_READS):
            self._relay(output, selector)
        self._tell(self._rest)
        if output in selector.get_map():
            selector.unregister(output)
        if process.stdout is not None:
            process.stdout.close()
        return code

    @staticmethod
    def _output(process: subprocess.Popen[bytes]) -> int:
        return -1 if process.stdout is None else process.stdout.fileno()

    def _relay(self, output: int, selector: selectors.BaseSelector) -> None:
        """Hands on lines, not more at a time than a pipe holds: who talks on must not keep us."""
        if output not in selector.get_map():
            return
        with suppress(BlockingIOError):
            data = os.read(output, _LONGEST_LINE)
            *lines, self._rest = (self._rest + data).split(b"\n")
            if len(self._rest) > _LONGEST_LINE:
                lines, self._rest = [*lines, self._rest], b""
            for line in lines:
                self._tell(line)
            if not data:  # the end: it would be reported for ever
                selector.unregister(output)

    def _tell(self, line: bytes) -> None:
        if not line.strip():
            return
        fields = read_line(line.decode(errors="replace"), self.program.name)
        if fields["level"] in {"ERROR", "CRITICAL"}:
            self.cause = str(fields["message"])
        emit(fields)


def _tend(children: Sequence[_Child], wakeup: _Wakeup, announce: Announce) -> int:
    while True:
        for child in children:
            now = time.monotonic()
            if child.process is None and child.due <= now:
                if child.start(now, wakeup.selector):
                    pid = child.process.pid if child.process else 0
                    announce(Notice("started", child.program.name, pid))
                elif (code := _ended(child, wakeup, announce)) is not None:
                    return code
        waiting = [child.due for child in children if child.process is None]
        if wakeup.wait(min(waiting, default=math.inf) - time.monotonic()) & _STOP:
            return 0
        for child in children:
            if child.has_ended() and (code := _ended(child, wakeup, announce)) is not None:
                return code


def _ended(child: _Child, wakeup: _Wakeup, announce: Announce) -> int | None:
    """Sees to a program that has ended; its code if no restart mends it."""
    pid = child.process.pid if child.process else 0
    code, now = child.bury(wakeup.selector), time.monotonic()
    about = child.program.name, pid, code
    match after(child.past, code, now, child.program.fatal):
        case GiveUp(code):
            announce(Notice("failed", *about, cause=child.cause))
            return code
        case Again(at, past):
            child.due, child.past = at, past
            announce(Notice("ended", *about, wait=at - now, cause=child.cause))
    return None


def _stop(child: _Child, wakeup: _Wakeup, announce: Announce) -> None:
    if child.process is None:
        return
    pid, last = child.process.pid, time.monotonic() + child.program.grace
    child.process.terminate()
    while not child.has_ended() and (left := last - time.monotonic()) > 0:
        wakeup.wait(left)
    announce(Notice("stopped", child.program.name, pid, child.bury(wakeup.selector)))
