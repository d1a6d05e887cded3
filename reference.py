"""Documentation that is made from the configuration models: README tables and `fedveil init`."""

import json
import sys
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .config import COMPATIBILITY, FederationFile, RunConfig

START = "<!-- made by `make reference` from config/ -->"
END = "<!-- end of what `make reference` makes -->"

_HEAD = ("| option | values | default | what it is |", "| --- | --- | --- | --- |")

_FAMILY = "vae"
"""Of the template."""

_COMPATIBILITY_COLUMNS = (
    "`privacy.mechanism`",
    "protects against",
    "`aggregation.strategy`",
    "`privacy.unit`",
    "`aggregation.encryption`",
)


def markdown() -> str:
    """The reference of all options, and what goes with what, as Markdown tables."""
    lines = [
        *_table(RunConfig),
        "",
        "| " + " | ".join(_COMPATIBILITY_COLUMNS) + " |",
        "| --- " * len(_COMPATIBILITY_COLUMNS) + "|",
    ]
    for mechanism, allowed in COMPATIBILITY.items():
        columns = (allowed.strategies, allowed.units, allowed.encryptions)
        cells = " | ".join(", ".join(f"`{name}`" for name in column) for column in columns)
        lines.append(f"| `{mechanism}` | {allowed.against} | {cells} |")
    lines += ["", "The first of each is the default. `median` does not go with `secagg`."]
    lines += [
        "",
        "`FEDERATION.toml`, of which `fedveil provision create` makes a federation's kits:",
    ]
    lines += ["", *_table(FederationFile)]
    return "\n".join(lines)


def template() -> str:
    """A commented configuration to start from: every option with its default."""
    lines = ["# A Fedveil run. Every line that starts with # shows an option's default."]
    section = ""
    for owner, name, field in _options(RunConfig, _FAMILY):
        if owner != section:
            section = owner
            lines += ["", f"[{owner}]"]
        lines.append(f"# {_plain(field.description or '')}")
        if field.is_required():
            example = "sklearn:digits" if name == "source" else _FAMILY
            lines.append(f"{name} = {json.dumps(example)}")
        else:
            value = "" if field.default is None else _toml(field.default)
            lines.append(f"# {name} = {value}".rstrip())
    return "\n".join(lines) + "\n"


def updated(readme: str) -> str:
    """The README with the reference in place.

    Raises:
        ValueError: It has no place for it.
    """
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"README: needs the lines {START} and {END}")
    return f"{before}{START}\n{markdown()}\n{END}{after}"


def _table(file: type[BaseModel]) -> list[str]:
    """The rows of a file's options, below their head."""
    rows = [
        f"| `{section}.{name}` | {_values(field)} | {_shown(field)} | {field.description} |"
        for section, name, field in _options(file)
    ]
    return [*_HEAD, *rows]


def _options(
    file: type[BaseModel], kind_of: str | None = None
) -> Iterator[tuple[str, str, FieldInfo]]:
    """Each option's section, name and field; of a section of several kinds all, or one kind's."""
    for section, owner in file.model_fields.items():
        kinds = [kind for kind in _all_kinds(owner.annotation) if issubclass(kind, BaseModel)]
        if len(kinds) > 1:
            yield from _by_kind(section, str(owner.discriminator), kinds, kind_of)
            continue
        for kind in kinds:
            for name, field in kind.model_fields.items():
                yield section, field.alias or name, field


def _by_kind(
    section: str, tag: str, kinds: list[type[BaseModel]], kind_of: str | None
) -> Iterator[tuple[str, str, FieldInfo]]:
    """The options of a section that is of one of several kinds: each says whose it is."""
    names = {kind: _choices(kind.model_fields[tag].annotation)[0] for kind in kinds}
    choice = FieldInfo(
        annotation=Literal[tuple(names.values())],  # type: ignore[arg-type]
        description=kinds[0].model_fields[tag].description,
    )
    yield section, tag, choice
    owners: dict[str, list[str]] = {}
    fields: dict[str, FieldInfo] = {}
    for kind in kinds:
        for name, field in kind.model_fields.items():
            if name != tag:
                owners.setdefault(name, []).append(names[kind])
                fields.setdefault(name, field)
    for name, field in fields.items():
        if kind_of not in (None, *owners[name]):
            continue
        whose = ", ".join(f"`{owner}`" for owner in owners[name])
        yield section, name, _told(field, f"{field.description} ({whose})")


def _told(field: FieldInfo, description: str) -> FieldInfo:
    """A field with another description."""
    told = copy(field)
    told.description = description
    return told


def _all_kinds(annotation: Any) -> list[type]:  # noqa: ANN401
    return [kind for kind in _kinds(annotation) if isinstance(kind, type)]


def _values(field: FieldInfo) -> str:
    a_list = "list of " if tuple in _origins(field.annotation) else ""
    choices = _choices(field.annotation)
    if choices:
        return a_list + ", ".join(f"`{choice}`" for choice in choices)
    kinds = set(_kinds(field.annotation))
    names = {int: "integer", float: "number", str: "text", bool: "true, false"}
    bounds = [
        f"{sign} {getattr(rule, attribute):g}"
        for rule in _rules(field)
        for attribute, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if getattr(rule, attribute, None) is not None
    ]
    kind = next((text for known, text in names.items() if known in kinds), "number")
    return a_list + " ".join([kind, ", ".join(bounds)]).strip()


def _choices(annotation: Any) -> list[str]:  # noqa: ANN401
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    return [choice for part in get_args(annotation) for choice in _choices(part)]


def _origins(annotation: Any) -> Iterator[Any]:  # noqa: ANN401
    yield get_origin(annotation)
    for part in get_args(annotation):
        yield from _origins(part)


def _kinds(annotation: Any) -> Iterator[type]:  # noqa: ANN401
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def _rules(field: FieldInfo) -> list[Any]:
    nested = [m for part in get_args(field.annotation) for m in getattr(part, "__metadata__", ())]
    inner = [rule for meta in nested for rule in getattr(meta, "metadata", [meta])]
    return [*field.metadata, *inner]


def _shown(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "derived" if field.default is None else f"`{_toml(field.default)}`"


def _toml(value: Any) -> str:  # noqa: ANN401
    return json.dumps(value)


def _plain(text: str) -> str:
    return text.replace("`", "")


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
