"""What every program of a kit does first and last."""

import json
import os
import subprocess
import sys

import pytest

from fedveil.deployment.logs import LEVEL

PROGRAM = """
from fedveil.config import ConfigError, FedveilError
from fedveil.deployment.program import run_program

def serve(kit):
    {body}

run_program("node", serve)
"""


def run(body: str, *arguments: str, level: str = "INFO") -> tuple[int, list[dict[str, str]]]:
    """A program's exit code, and what it logged."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM.format(body=body), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {LEVEL: level},
    )
    assert done.stdout == ""
    return done.returncode, [json.loads(line) for line in done.stderr.splitlines()]


@pytest.mark.parametrize(("error", "code"), [("ConfigError", 2), ("FedveilError", 1)])
def test_an_error_is_one_line_and_its_code(error: str, code: int) -> None:
    ended, (line,) = run(f"raise {error}('node.key:\\n is missing')", "kit")
    assert ended == code
    assert (line["level"], line["process"]) == ("CRITICAL", "node")
    assert line["message"] == "node.key: is missing"
    assert "traceback" not in line


def test_with_a_traceback_below_debug() -> None:
    _, (line,) = run("raise ConfigError('no')", "kit", level="DEBUG")
    assert line["traceback"].startswith("Traceback")


def test_an_error_that_nobody_foresaw() -> None:
    ended, (line,) = run("raise KeyError('of a record')", "kit")
    assert ended == 1
    assert "of a record" not in json.dumps(line)


@pytest.mark.parametrize("arguments", [(), ("kit", "more")])
def test_a_wrong_call(arguments: tuple[str, ...]) -> None:
    ended, (line,) = run("pass", *arguments)
    assert (ended, line["message"]) == (2, "node: takes one argument, the folder of the kit")


def test_it_is_given_the_kit() -> None:
    assert run("assert str(kit) == 'a/kit'", "a/kit") == (0, [])
