"""Logs in one form: one line each, once, and nothing of a record in it."""

import io
import json
import logging
import logging.config
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.config import ConfigError
from fedveil.deployment import logs
from fedveil.deployment.logs import (
    as_json,
    as_text,
    configure,
    fields_of,
    level_asked,
    read_line,
    scrubbed,
)

QUOTED = "diabetes\nof Mrs Miller"


@pytest.fixture(autouse=True)
def _untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logging as it was before."""
    root = logging.getLogger()
    kept, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    tamed = {name: logging.getLogger(name) for name in logs._OTHERS}
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:], logging.raiseExceptions = kept, raising
    root.setLevel(level)
    for logger in tamed.values():
        vars(logger).pop("addHandler", None)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What was written to stderr; every line must be one JSON object."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n") or not err
    return [json.loads(line) for line in err.splitlines()]


def record(message: str, *arguments: object, error: BaseException | None = None,
           name: str = "fedveil.x", **extra: object) -> logging.LogRecord:  # fmt: skip
    """A log record; `error` is raised, so that it has a traceback."""
    about = None
    if error is not None:
        try:
            raise error
        except BaseException:  # noqa: BLE001
            about = sys.exc_info()
    made = logging.LogRecord(name, logging.INFO, "x.py", 1, message, arguments, about)
    made.__dict__ |= extra
    return made


class TestTheForm:
    def test_time_level_process_message_and_more(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure("control")
        logging.getLogger("fedveil.x").warning("site %s is late", "bern", extra={"round": 3})
        (line,) = lines(capsys)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
        assert line == {
            "level": "WARNING", "process": "control", "message": "site bern is late", "round": 3,
        }  # fmt: skip

    def test_twice_configured_it_speaks_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure("a")
        configure("b")
        logging.getLogger("fedveil").info("hello")
        assert [line["process"] for line in lines(capsys)] == ["b"]

    def test_below_its_level_it_is_silent(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure("a", logging.WARNING)
        logging.getLogger("fedveil").info("hello")
        assert lines(capsys) == []

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object(), b"\xff"])
    def test_values_that_json_has_no_form_for(self, value: object) -> None:
        text = as_json(fields_of(record("hello", value=value), "a"))
        json.loads(text, parse_constant=lambda _: pytest.fail("no JSON"))

    @given(st.text(), st.text())
    def test_any_text_is_one_line_and_comes_back(self, message: str, value: str) -> None:
        fields = fields_of(record("%s", message, value=value), "a")
        text = as_json(fields)
        assert len(text.splitlines()) == 1
        assert json.loads(text) == fields
        assert read_line(text, "b") == fields

    def test_arguments_that_do_not_fit(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure("a")
        logging.getLogger("fedveil").info("%d of %d", "x")  # noqa: PLE1206
        assert [line["message"] for line in lines(capsys)] == ["%d of %d"]

    def test_what_others_sent_does_not_fill_the_disk(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        configure("node")
        logging.getLogger("fedveil.x").error("refused run %s", "x" * 3_000_000)
        line = capsys.readouterr().err
        assert json.loads(line)["message"].startswith("refused run xxx")
        assert len(line) < 3000

    def test_on_a_terminal_it_is_plain(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        configure("control")
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        logging.getLogger("fedveil").error("site %s is late", "bern", extra={"round": 3})
        line = capsys.readouterr().err
        assert re.fullmatch(r"\S+Z ERROR   control site bern is late round=3\n", line)

    @given(st.text())
    def test_plain_text_that_a_terminal_cannot_obey(self, message: str) -> None:
        assert as_text(fields_of(record("%s", message), "a")).isprintable()

    def test_stderr_is_gone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        configure("a")
        gone = io.StringIO()
        gone.close()
        monkeypatch.setattr(sys, "stderr", gone)
        logging.getLogger("fedveil").info("hello")


class TestOtherPackages:
    @pytest.mark.parametrize("name", logs._OTHERS)
    def test_each_speaks_once(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        logging.getLogger(name).addHandler(logging.StreamHandler())
        configure("a")
        logging.getLogger(name).addHandler(logging.StreamHandler())  # imported only now
        logging.getLogger(name).warning("hello")
        found = lines(capsys)
        assert [(line["message"], line["logger"]) for line in found] == [("hello", name)]

    def test_one_that_we_do_not_know(self, capsys: pytest.CaptureFixture[str]) -> None:
        logging.getLogger("stranger").addHandler(logging.StreamHandler())
        configure("a")
        logging.getLogger("stranger").warning("hello")
        logging.getLogger("stranger").handlers.clear()
        assert len(lines(capsys)) == 1

    def test_their_small_talk_is_left_out(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure("a")
        logging.getLogger("flwr").setLevel(logging.DEBUG)  # as Flower does
        logging.getLogger("flwr").info("Starting Flower")
        logging.getLogger("httpx").info("POST https://server")
        assert lines(capsys) == []
        configure("a", logging.DEBUG)
        logging.getLogger("flwr").debug("Starting Flower")
        assert len(lines(capsys)) == 1

    def test_warnings_too(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure("a")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(capture=False)
            logging.captureWarnings(capture=True)
            warnings.warn("two\nlines", stacklevel=1)
        (line,) = lines(capsys)
        assert line["logger"] == "py.warnings"
        assert "two\nlines" in line["message"]

    def test_the_real_ones_in_a_process_of_their_own(self) -> None:
        """Whether imported before or after; Flower and uvicorn with handlers of their own."""
        text = """
import sys, logging
import fedveil.flower
from fedveil.deployment.logs import configure
if sys.argv[1] == "after":
    for name in [n for n in sys.modules if n.startswith("flwr")]:
        del sys.modules[name]
    logging.getLogger("flwr").handlers.clear()
configure("node")
if sys.argv[1] == "after":
    import flwr.supercore.logger, flwr.supercore.telemetry
import uvicorn
uvicorn.Config(None, log_config=None)
from flwr.supercore.logger import log
log(logging.WARNING, "from Flower")
log(logging.INFO, "small talk")
for name in ("uvicorn.error", "uvicorn.access", "httpx", "grpc"):
    logging.getLogger(name).warning("from %s", name)
"""
        for when in ("before", "after"):
            done = subprocess.run(
                [sys.executable, "-P", "-c", text, when], capture_output=True, text=True, check=True
            )
            found = [json.loads(line) for line in done.stderr.splitlines()]
            assert done.stdout == ""
            assert [line["message"] for line in found] == [
                "from Flower", "from uvicorn.error", "from uvicorn.access", "from httpx",
                "from grpc",
            ]  # fmt: skip


class TestExceptions:
    def test_type_and_no_text(self) -> None:
        fields = fields_of(record("failed", error=ValueError(QUOTED)), "a")
        assert fields["error"] == "ValueError"
        assert "Miller" not in as_json(fields) + as_text(fields)

    def test_our_own_text_is_told_on_one_line(self) -> None:
        assert scrubbed(ConfigError("site.name =\n 3: no")) == "ConfigError: site.name = 3: no"

    def test_the_system_s_text_and_no_file_of_the_site(self) -> None:
        error = OSError(28, QUOTED, "/srv/records/miller.csv")
        assert scrubbed(error) == f"OSError: {os.strerror(28)}"
        assert scrubbed(OSError(QUOTED)) == "OSError"

    def test_a_text_that_is_no_number_of_the_system_s(self) -> None:
        assert scrubbed(KeyError(QUOTED)) == "KeyError"

    def test_as_an_argument_or_a_field(self) -> None:
        fields = fields_of(record("failed: %s", ValueError(QUOTED), cause=KeyError(QUOTED)), "a")
        assert (fields["message"], fields["cause"]) == ("failed: ValueError", "KeyError")
        named = fields_of(record("failed: %(why)s", {"why": ValueError(QUOTED)}), "a")
        assert named["message"] == "failed: ValueError"

    def test_our_own_as_an_argument(self) -> None:
        assert fields_of(record("%s", ConfigError("a\nb")), "a")["message"] == "a b"

    def test_a_cause_is_not_told_either(self) -> None:
        error = RuntimeError()
        error.__cause__ = ValueError(QUOTED)
        assert "Miller" not in as_json(fields_of(record("failed", error=error), "a"))

    def test_all_of_it_below_debug(self, capsys: pytest.CaptureFixture[str]) -> None:
        configure("a", logging.DEBUG)
        try:
            raise ValueError(QUOTED)
        except ValueError:
            logging.getLogger("fedveil").exception("failed")
        (line,) = lines(capsys)
        assert line["traceback"].startswith("Traceback")
        assert QUOTED in line["traceback"]

    def test_one_that_nobody_caught(self) -> None:
        text = """
import threading
from fedveil.deployment.logs import configure
configure("a")
def fail():
    raise ValueError("diabetes\\nof Mrs Miller")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
fail()
"""
        done = subprocess.run(
            [sys.executable, "-P", "-c", text], capture_output=True, text=True, check=False
        )
        found = [json.loads(line) for line in done.stderr.splitlines()]
        assert done.returncode == 1
        assert [(line["level"], line["error"]) for line in found] == [
            ("CRITICAL", "ValueError")
        ] * 2
        assert "Miller" not in done.stderr


class TestLinesOfAChild:
    @pytest.mark.parametrize(
        "line", ["plain", "{", "[]", "3", '{"time": "-"}', "[" * 100_000, '{"message": "x"}']
    )
    def test_what_is_not_in_our_form_is_a_message(self, line: str) -> None:
        fields = read_line(f"{line}\r", "node")
        assert (fields["process"], fields["level"], fields["message"]) == ("node", "INFO", line)

    def test_an_error_of_the_command_line(self) -> None:
        fields = read_line("error: port = 1: is taken", "node")
        assert (fields["level"], fields["message"]) == ("ERROR", "port = 1: is taken")


@pytest.mark.parametrize(
    ("given_level", "level"),
    [(None, logging.INFO), ("debug", logging.DEBUG), ("WARNING", logging.WARNING), ("x", 20)],
)
def test_the_level_asked_for(
    given_level: str | None, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(logs.LEVEL, raising=False)
    if given_level:
        monkeypatch.setenv(logs.LEVEL, given_level)
    assert level_asked() == level
    configure("a")
    assert logging.getLogger().level == level
