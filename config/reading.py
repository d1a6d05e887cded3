"""Reading TOML and values against models; every fault is one line for the user."""

import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

ModelT = TypeVar("ModelT", bound=BaseModel)


class FedveilError(Exception):
    """An error for the user: one line that names field, value and mend.

    `exit_code` is 1 for a run that failed.
    """

    exit_code = 1


class ConfigError(FedveilError):
    """A wrong call or configuration; exit code 2."""

    exit_code = 2


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        ConfigError: It is missing, unreadable or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None


def make_absolute(raw: Mapping[str, Any], section: str, keys: Iterable[str], base: Path) -> None:
    """Makes a section's paths absolute, in place; what is no path is left to the validation."""
    options = raw.get(section)
    for key in keys:
        value = options.get(key) if isinstance(options, dict) else None
        if isinstance(value, str) and value and not value.startswith("sklearn:"):
            options[key] = str((base / value).resolve())  # type: ignore[index]


def parse_setting(text: str) -> tuple[str, Any]:
    """Reads `a.b=c` as a dotted key and a TOML value; what is no TOML value is a string.

    Raises:
        ConfigError: There is no `=`, or the key names no section.
    """
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise ConfigError(f"--set {text}: must be section.key=value, such as privacy.epsilon=3")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    return key.strip(), parsed["value"] if parsed.keys() == {"value"} else value.strip()


def validated(model: type[ModelT], raw: Mapping[str, Any]) -> ModelT:
    """Validates raw values against a model.

    Raises:
        ConfigError: One line on the first wrong value, and how many more there are.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_one_line(model, error)) from None


def validated_in(path: Path, model: type[ModelT], raw: Mapping[str, Any]) -> ModelT:
    """Validates a file's values against a model.

    Raises:
        ConfigError: As `validated`, and it names the file.
    """
    try:
        return validated(model, raw)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def not_below(bound: float, digits: int = 3) -> str:
    """A bound as text, rounded up: what is printed must not promise more than what holds."""
    # A hair is taken off, or 0.3 would become 0.301: it is 0.299... times a thousand.
    return f"{math.ceil(bound * 10**digits - 1e-9) / 10**digits:.{digits}f}"


def small_not_below(bound: float) -> str:
    """The same of a small one, such as a delta, to two digits that count."""
    if bound <= 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(bound)) - 1)
    return f"{math.ceil(bound / unit - 1e-9) * unit:.2g}"


def _one_line(  # noqa: C901  one case a kind of error
    model: type[BaseModel], error: ValidationError
) -> str:
    # An unknown family explains every unknown option that comes with it, so it goes first; and a
    # key that is misspelt explains what is missing.
    ranks = {"extra_forbidden": 1, "missing": 2}
    first, *more = sorted(error.errors(), key=lambda e: ranks.get(e["type"], 0))
    location = _without_tags(model, first["loc"])
    field = ".".join(str(part) for part in location)
    value = json.dumps(first["input"], default=str, ensure_ascii=False)
    context = first.get("ctx", {})
    match first["type"]:
        case "value_error":
            line = str(context["error"])
        case "string_pattern_mismatch":
            line = f"{field} = {value}: must match {context['pattern']}"
        case "model_type" | "dict_type":
            line = f"{field} = {value}: must be a section, [{field}]"
        case "extra_forbidden":
            line = f"{field}: unknown key{_did_you_mean(model, first['loc'])}"
        case "union_tag_not_found":
            line = f"{field}.{_tag_name(context)}: missing: it has no default"
        case "union_tag_invalid":
            tag, known = context["tag"], context["expected_tags"]
            line = f"{field}.{_tag_name(context)} = {json.dumps(tag, ensure_ascii=False)}: "
            line += f"must be {known.replace(', ', ' or ')}"
            nearest = _nearest(tag, known.split("'")[1::2])
            line += nearest if "did you mean" in nearest else ""
        case "too_short" | "string_too_short":
            line = f"{field} = {value}: must not be empty"
        case "tuple_type":
            line = f"{field} = {value}: must be a list"
        case "missing":
            line = f"{field}: missing: it has no default"
        case "literal_error":
            line = f"{field} = {value}: must be {context['expected']}"
            nearest = _nearest(str(first["input"]), context["expected"].split("'")[1::2])
            line += nearest if "did you mean" in nearest else ""
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            line = f"{field} = {value}: must be {_BOUNDS[first['type']]} "
            line += f"{next(iter(context.values())):g}"
        case _:
            message = first["msg"].removeprefix("Input should be ")
            line = f"{field} = {value}: must be {message}"
    return line + (f" (and {len(more)} more)" if more else "")


_BOUNDS = {
    "greater_than": ">",
    "greater_than_equal": ">=",
    "less_than": "<",
    "less_than_equal": "<=",
}


def _tag_name(context: Mapping[str, Any]) -> str:
    """The option that says which of several sections it is."""
    return str(context["discriminator"]).strip("'")


def _without_tags(model: type[BaseModel], location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A location as the user knows it: a section's kind is no part of it."""
    field = model.model_fields.get(str(location[0])) if len(location) > 1 else None
    if field is None or field.discriminator is None:
        return location
    return location[0], *location[2:]


def _did_you_mean(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    owner = model
    for part in location[:-1]:
        if isinstance(part, str):  # a number counts within a list of sections
            fields = {field.alias or name: field for name, field in owner.model_fields.items()}
            if part in fields:
                found = [*_models_in(fields[part].annotation)]
                tagged = [m for m in found if location[1] in _tags(m)]
                owner = next(iter(tagged or found), owner)
    names = [field.alias or name for name, field in owner.model_fields.items()]
    return _nearest(str(location[-1]), names)


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    """The kinds of section that a model is of."""
    field = model.model_fields.get("family")
    return get_args(field.annotation) if field is not None else ()


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:  # noqa: ANN401
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def _nearest(word: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else f"; known are {', '.join(choices)}"
