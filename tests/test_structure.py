"""Who imports whom, held by reading the source; no cycle, no assert, no print."""

import ast
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import fedveil

ROOT = Path(fedveil.__file__).parent
EVERYTHING = ("",)

MAY_IMPORT: Mapping[str, tuple[str, ...]] = {
    "": EVERYTHING,
    "__main__": EVERYTHING,
    "cli": EVERYTHING,
    "api": EVERYTHING,
    "run": EVERYTHING,
    "ledgers": EVERYTHING,
    "reports": EVERYTHING,
    "export": EVERYTHING,
    "compare": ("config",),
    "doctor": ("machine",),
    "machine": ("files",),
    "reference": ("config",),
    "config": ("config",),
    "files": (),
    "flower": ("flower",),
    "wire": ("config", "flower"),
    "privacy": ("privacy", "config", "files"),
    # It shares its work out over the cores that there are.
    "privacy.secagg": ("privacy", "config", "files", "machine"),
    "privacy.audit": EVERYTHING,
    "data_prep": ("data_prep", "config"),
    # It writes files that are whole or not there.
    "data_prep.cleaned": ("data_prep", "config", "files"),
    "models": ("models", "data_prep.schema", "data_prep.queries", "config"),
    # Where the whole numbers of a column lie, its encoding knows.
    "models.marginal.tables": (
        "models", "data_prep.schema", "data_prep.queries", "data_prep.modality",
        "data_prep.tabular", "config",
    ),
    # Kits, roster and control plane: no model, no record.
    "deployment": ("deployment", "config", "files", "privacy.secagg.keys"),
    "client": (
        "client", "deployment", "models", "privacy", "data_prep", "wire", "config", "files",
        "flower",
    ),
    # The disk decides how a ledger is kept.
    "client.own_files": ("client", "privacy", "files", "machine"),
    "server": (
        "server", "deployment", "models", "privacy", "data_prep.schema", "data_prep.queries",
        "wire", "config", "files", "flower",
    ),
    # Where a run stands, as everybody reads it.
    "server.queue": ("compare", "config", "data_prep.schema", "files", "server"),
    "server.simulation": (
        "server", "client", "deployment", "models", "privacy", "data_prep", "wire", "config",
        "files", "flower", "machine",
    ),
}  # fmt: skip
"""By the longest prefix of a module's name within the package."""


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name."""

    line: int
    name: str
    relative: bool
    typing_only: bool


def packages() -> list[str]:
    """The packages that are shipped."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: list[str] = settings["tool"]["setuptools"]["packages"]
    return found


def sources() -> dict[str, Path]:
    """The shipped modules by full name; a package is called as its `__init__`."""
    found = {}
    for package in packages():
        for file in sorted(ROOT.joinpath(*package.split(".")[1:]).glob("*.py")):
            found[package if file.stem == "__init__" else f"{package}.{file.stem}"] = file
    return found


SOURCES = sources()
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in SOURCES.items()}
PACKAGES = set(packages())


def statements(tree: ast.AST, *, typing_only: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below `tree`, and whether only a type checker sees it."""
    for node in ast.iter_child_nodes(tree):
        yield node, typing_only
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield child, True
                yield from statements(child, typing_only=True)
            for child in node.orelse:
                yield child, typing_only
                yield from statements(child, typing_only=typing_only)
        else:
            yield from statements(node, typing_only=typing_only)


def imports(module: str, tree: ast.AST, known: set[str], is_package: bool) -> list[Import]:
    """What a module imports, at its top and inside its functions."""
    found = []
    for node, typing_only in statements(tree):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, a.name, False, typing_only) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base]) if base else ".".join(parts)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                name = full if full in known else base
                found.append(Import(node.lineno, name, node.level > 0, typing_only))
    return found


IMPORTS = {
    name: imports(name, tree, set(SOURCES), name in PACKAGES) for name, tree in TREES.items()
}


def within(name: str) -> str:
    """A module's name within the package."""
    return name.partition(".")[2]


def is_below(name: str, owner: str) -> bool:
    """Whether a name is `owner` or in it; all are in the empty name."""
    return not owner or name == owner or name.startswith(owner + ".")


def allowed(module: str) -> tuple[str, ...]:
    """What a module may import, by the longest rule for it; the root's own rule is its own."""
    rules = [rule for rule in MAY_IMPORT if rule and is_below(within(module), rule)]
    if not within(module):
        return MAY_IMPORT[""]
    assert rules, f"{module}: has no rule yet; add one to design.md and here"
    return MAY_IMPORT[max(rules, key=len)]


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of one import cycle, if there is one."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, set())):
            if found := walk(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def ours(module: str, *, typing_too: bool) -> list[Import]:
    """A module's imports of our own modules."""
    return [
        i
        for i in IMPORTS[module]
        if is_below(i.name, "fedveil") and (typing_too or not i.typing_only)
    ]


class TestTheReaderItself:
    def test_relative_names(self) -> None:
        tree = ast.parse("from ..config import x\nfrom . import plan\nfrom .plan import y")
        found = imports("fedveil.privacy.noise", tree, {"fedveil.privacy.plan"}, is_package=False)
        assert [i.name for i in found] == [
            "fedveil.config",
            "fedveil.privacy.plan",
            "fedveil.privacy.plan",
        ]

    def test_relative_names_in_a_package(self) -> None:
        tree = ast.parse("from .family import x\nfrom ..config import y")
        found = imports("fedveil.models", tree, set(), is_package=True)
        assert [i.name for i in found] == ["fedveil.models.family", "fedveil.config"]

    def test_inside_functions_and_for_types(self) -> None:
        tree = ast.parse(
            "if TYPE_CHECKING:\n    from .run import Run\ndef f():\n    from .wire import g"
        )
        found = {i.name: i.typing_only for i in imports("fedveil.cli", tree, set(), False)}
        assert found == {"fedveil.run": True, "fedveil.wire": False}

    def test_cycles(self) -> None:
        assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
        assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []

    def test_it_sees_the_package(self) -> None:
        assert {"fedveil", "fedveil.cli", "fedveil.server", "fedveil.server.rounds"} <= set(SOURCES)
        assert any(i.name == "fedveil.wire" for i in IMPORTS["fedveil.server.collect"])


@pytest.mark.parametrize("module", SOURCES)
def test_who_may_import_whom(module: str) -> None:
    may = allowed(module)
    wrong = [
        f"line {i.line}: {i.name}"
        for i in ours(module, typing_too=True)
        if not any(is_below(within(i.name), owner) for owner in may)
    ]
    assert not wrong, f"{module} may import {', '.join(may)} only"


def test_only_the_command_line_imports_the_audit() -> None:
    outside = {
        name
        for name in SOURCES
        for i in ours(name, typing_too=True)
        if is_below(within(i.name), "privacy.audit") and not is_below(name, "fedveil.privacy.audit")
    }
    assert outside
    assert not {name for name in outside if not is_below(name, "fedveil.cli")}


def test_no_import_cycle() -> None:
    graph = {name: {i.name for i in ours(name, typing_too=False)} - {name} for name in SOURCES}
    assert cycle(graph) == []


@pytest.mark.parametrize("module", SOURCES)
def test_imports_inside_the_package_are_relative(module: str) -> None:
    bare = {within(name).partition(".")[0] for name in SOURCES} - {""}
    wrong = [
        f"line {i.line}: {i.name}"
        for i in IMPORTS[module]
        if not i.relative and i.name.partition(".")[0] in bare | {"fedveil"}
    ]
    assert not wrong


@pytest.mark.parametrize("module", SOURCES)
def test_flower_is_imported_in_one_place(module: str) -> None:
    touched = [i.line for i in IMPORTS[module] if is_below(i.name, "flwr")]
    assert not touched or is_below(module, "fedveil.flower")


@pytest.mark.parametrize("module", SOURCES)
def test_no_assert_statement(module: str) -> None:
    assert [n.lineno for n in ast.walk(TREES[module]) if isinstance(n, ast.Assert)] == []


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_prints_but_the_command_line(module: str) -> None:
    calls = [
        node.lineno
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not calls or module == "fedveil.cli"


def test_every_shipped_folder_is_declared() -> None:
    """A folder with code that pyproject.toml does not name would be missing from the wheel."""
    skipped = {"tests", "benchmarks", "examples", "build", "runs"}
    tops = [p for p in ROOT.iterdir() if p.is_dir() and p.name not in skipped]
    folders = {
        file.parent.relative_to(ROOT)
        for top in tops
        if not top.name.startswith(".")
        for file in top.rglob("__init__.py")
    }
    assert {".".join(("fedveil", *folder.parts)) for folder in folders} == PACKAGES - {"fedveil"}
