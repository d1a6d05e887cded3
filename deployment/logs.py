"""Structured logs: one JSON object a line on stderr, or plain lines where a terminal reads them.

A line has `time` (UTC, milliseconds), `level`, `process`, `message`, and whatever was given as
`extra`. Of an exception it has the type, and a text only where that is our own: what others put
into theirs may quote a record. A traceback is logged at DEBUG only.
"""

import json
import logging
import math
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType

from ..config import FedveilError

LEVEL = "FEDVEIL_LOG_LEVEL"
"""Where a process that we start finds the level of its logs."""

_OTHERS = ("flwr", "flwr-telemetry", "uvicorn", "uvicorn.access", "uvicorn.error", "httpx", "grpc")
_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_LONGEST = 2000  # letters of a message
_FIRST = ("time", "level", "process", "message")

Fields = Mapping[str, object]


def configure(process: str, level: int | None = None) -> None:
    """Sends all logs of this process, other packages' too, to stderr in our form, each once.

    Other packages may be imported before or after. Of what they say only warnings and worse are
    shown, below DEBUG. An error that nobody caught, in any thread, is logged like any other.

    Args:
        process: What the lines call it.
        level: The least that is shown; by default what `level_asked` says.
    """
    level = level_asked() if level is None else level
    logging.raiseExceptions = False  # a reader of stderr that went away stops no run
    handler = _Handler(process, level)
    root = logging.getLogger()
    for old in tuple(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level)
    # Also those that we do not know, if they are there: a line of theirs would come out twice.
    for name in {*_OTHERS, *root.manager.loggerDict}:
        _tame(logging.getLogger(name))
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def level_asked() -> int:
    """The level that the process was started with; INFO where it was told none."""
    named = logging.getLevelNamesMapping().get(os.environ.get(LEVEL, "INFO").upper())
    return logging.INFO if named is None else named


def scrubbed(error: BaseException) -> str:
    """An exception as logs may show it: its type; its text if it is ours, or the system's own."""
    name = type(error).__name__
    if isinstance(error, FedveilError):
        return f"{name}: {' '.join(str(error).split())}"
    if isinstance(error, OSError) and isinstance(error.errno, int):
        # From the system's table of errors, and not `str`: that may be anybody's.
        return f"{name}: {os.strerror(error.errno)}"
    return name


def now() -> str:
    """The time as the logs write it."""
    return stamp(datetime.now(UTC).timestamp())


def stamp(seconds: float) -> str:
    """Seconds since 1970 as UTC in ISO 8601, to the millisecond."""
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def fields_of(record: logging.LogRecord, process: str, *, whole: bool = False) -> dict[str, object]:
    """A log record as plain values.

    Args:
        record: The record.
        process: Whose it is.
        whole: Whether exceptions are given with their texts and tracebacks.
    """
    found: dict[str, object] = {
        "time": stamp(record.created),
        "level": record.levelname,
        "process": process,
        "message": _message(record, whole=whole),
    }
    if not _is_ours(record):
        found["logger"] = record.name
    extra = {name: value for name, value in vars(record).items() if name not in _RECORD}
    found |= {name: _shown(value) for name, value in extra.items()}
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        found["error"] = scrubbed(error)
        if whole:
            found["traceback"] = "".join(traceback.format_exception(error))
    return found


def as_json(fields: Fields) -> str:
    """One JSON object on one line; what JSON has no form for is given as text."""
    return json.dumps(fields, default=str)


def as_text(fields: Fields) -> str:
    """Time, level, process, message and the other fields, for a person; only a traceback breaks."""
    time, level, process, message = (str(fields.get(name, "-")) for name in _FIRST)
    rest = "".join(
        f" {name}={value}"
        for name, value in fields.items()
        if name not in {*_FIRST, "logger", "traceback"}
    )
    text = f"{time} {level:7} {process} {message}{rest}"
    # What others sent may hold line breaks, or what a terminal would obey.
    line = "".join(letter if letter.isprintable() else " " for letter in text)
    return f"{line}\n{fields['traceback']}".rstrip() if "traceback" in fields else line


def read_line(line: str, process: str) -> dict[str, object]:
    """The fields of a line that a child wrote; one that is not in our form becomes its message."""
    with suppress(ValueError, RecursionError):
        found = json.loads(line)
        if isinstance(found, dict) and found.keys() >= set(_FIRST):
            return found
    text = line.strip()
    message = text.removeprefix("error: ")  # as the command line has it
    level = "INFO" if message == text else "ERROR"
    return {"time": now(), "level": level, "process": process, "message": message}


def emit(fields: Fields) -> None:
    """Writes one line to stderr; one that nobody can read any more is lost."""
    with suppress(OSError, ValueError):
        form = as_text if sys.stderr.isatty() else as_json
        sys.stderr.write(f"{form(fields)}\n")  # at once: lines of several processes do not mix
        sys.stderr.flush()


class _Handler(logging.Handler):
    """Writes records in our form; looks for stderr anew with each, as tests put another there."""

    def __init__(self, process: str, level: int) -> None:
        super().__init__(level)
        self._process = process
        self.addFilter(self._is_asked)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            emit(fields_of(record, self._process, whole=self.level <= logging.DEBUG))
        except Exception:  # noqa: BLE001  a value that cannot be shown stops no run
            self.handleError(record)

    def _is_asked(self, record: logging.LogRecord) -> bool:
        # Here and not by their levels: Flower sets its own when it is imported.
        return self.level <= logging.DEBUG or record.levelno >= logging.WARNING or _is_ours(record)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in {"fedveil", "root", "__main__"}


def _tame(logger: logging.Logger) -> None:
    """Leaves a logger the root's handler only; Flower would add its own when it is imported."""
    for handler in tuple(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True
    if logger.name in _OTHERS:
        logger.addHandler = _ignored  # type: ignore[method-assign]


def _ignored(hdlr: logging.Handler) -> None:
    """Adds no handler."""


def _message(record: logging.LogRecord, *, whole: bool) -> str:
    text = _formatted(record, whole=whole)
    # What others sent may be long, and would fill the disk.
    return text if len(text) <= _LONGEST or whole else f"{text[:_LONGEST]}..."


def _formatted(record: logging.LogRecord, *, whole: bool) -> str:
    given, text = record.args, str(record.msg)
    if not given:
        return text
    if not whole and isinstance(given, Mapping):
        given = {name: _shown(value) for name, value in given.items()}
    elif not whole:
        given = tuple(map(_shown, given))
    try:
        return text % given
    except (TypeError, ValueError, LookupError):  # arguments that do not fit the text
        return text


def _shown(value: object) -> object:
    """A value that a line may hold: no foreign exception's text, and no number without JSON."""
    if isinstance(value, FedveilError):
        return " ".join(str(value).split())
    if isinstance(value, BaseException):
        return scrubbed(value)
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    logging.getLogger(__name__).critical(
        "ended by an error that nobody foresaw", exc_info=(kind, error, trace)
    )


def _log_uncaught_in_thread(given: threading.ExceptHookArgs) -> None:
    if given.exc_value is not None and given.exc_type is not SystemExit:
        _log_uncaught(given.exc_type, given.exc_value, given.exc_traceback)
