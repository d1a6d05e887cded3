"""The operations guide says what is so: its commands are there, its error lines are the code's."""

import ast
import re
import tomllib
from pathlib import Path

import click
import pytest
import typer.main

from fedveil import cli

ROOT = Path(cli.__file__).parents[1]
GUIDE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"fedveil ((?:--debug )?[a-z]+(?: [a-z]+)?)", GUIDE)))
ERRORS = re.findall(r"^\| `([^`]+)`", GUIDE.partition("## When something fails")[2], re.MULTILINE)


def template(node: ast.AST) -> str:
    """A text as it stands in the source, with an ellipsis for each value in it."""
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[a-z]", "…", node.value)
    return "…"


def texts() -> set[str]:
    """All texts of the package."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = set()
    for package in settings["tool"]["setuptools"]["packages"]:
        for file in ROOT.joinpath(*package.split(".")[1:]).glob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            nodes = (n for n in ast.walk(tree) if isinstance(n, ast.JoinedStr | ast.Constant))
            found |= {template(node) for node in nodes}
    return found


TEXTS = texts()


def test_there_are_both() -> None:
    assert len(COMMANDS) > 10
    assert len(ERRORS) > 20


@pytest.mark.parametrize("error", ERRORS)
def test_its_error_lines_are_the_code_s(error: str) -> None:
    pattern = ".*".join(re.escape(part) for part in error.split("…"))
    assert any(re.search(pattern, text) for text in TEXTS)


@pytest.mark.parametrize("words", COMMANDS)
def test_its_commands_are_there(words: str) -> None:
    command: click.Command = typer.main.get_command(cli.app)
    for word in words.removeprefix("--debug ").split():
        if not isinstance(command, click.Group):
            return
        assert word in command.commands
        command = command.commands[word]


def test_it_is_short() -> None:
    assert len(GUIDE.splitlines()) <= 300
