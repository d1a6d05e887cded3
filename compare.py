"""Runs side by side: what differs in them, what each promised, which is better beyond chance.

A run folder is read as plain values: so runs of other versions can be compared, and without torch,
which the store of a run that goes on cannot do without. Figures are held against one another only
where they answer the same questions about the same data.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from .config import ConfigError, FedveilError, read_toml, validated

State = Literal["finished", "failed", "unfinished"]

# What decides on which data a figure is about, and how it is measured.
_ABOUT = ("data.source", "data.records", "clean.", "evaluation.samples")
_ABOUT_LOSS = ("model.family", "model.beta", "model.reconstruction")
_DEVIATIONS = 2.0  # so many are taken for chance


class Figure(BaseModel):
    """An accounted figure."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    value: float
    noise: float = 0.0
    floor: float | None = None


class Promise(BaseModel):
    """What a run promised and spent; without an epsilon it is not private."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    mechanism: str
    against: str
    unit: str
    epsilon: float | None
    target_epsilon: float | None
    delta: float | None
    rounds: int


class Told(BaseModel):
    """What is known of a run; all of it once it is finished."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    run_id: str = ""
    family: str = ""
    rounds: int = 0
    steps: int | None = None
    sites: int | None = None
    privacy: Promise | None = None
    quality: dict[str, Figure] = {}
    seconds: dict[str, float] = {}


class _Finished(Told):
    run_id: str
    family: str
    rounds: int
    privacy: Promise


@dataclass(frozen=True)
class Facts:
    """A run, as its folder tells.

    Attributes:
        path: The folder.
        state: Whether it ended, and how.
        cause: Why it failed; empty unless it did.
        begun: When.
        config: The resolved configuration by dotted key.
        schema: What a record is; empty where it is not written yet.
        versions: Of Python and the packages, and a hash of the source.
        told: What it promised, what it found, how long it took.
    """

    path: Path
    state: State
    cause: str
    begun: datetime
    config: Mapping[str, Any]
    schema: Mapping[str, Any]
    versions: Mapping[str, Any]
    told: Told


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: In the order they were asked for.
        config: What differs, by dotted key; a value a run, `None` where it has none.
        versions: The same of versions.
        same_schema: Whether all have one schema.
        obstacles: Why figures cannot be held against one another; empty if they can.
        best: The run (its place) that is better than every other beyond chance, by figure.
        epsilon: What all cost those who are in all of them, by plain addition; `None` if one of
            them is not private, or they are not of the same data.
        delta: Of the same.
    """

    runs: tuple[Facts, ...]
    config: Mapping[str, tuple[Any, ...]]
    versions: Mapping[str, tuple[Any, ...]]
    same_schema: bool
    obstacles: tuple[str, ...]
    best: Mapping[str, int]
    epsilon: float | None
    delta: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "runs": [plain(facts) for facts in self.runs],
            "config": {key: list(values) for key, values in self.config.items()},
            "versions": {key: list(values) for key, values in self.versions.items()},
            "same_schema": self.same_schema,
            "comparable": not self.obstacles,
            "obstacles": list(self.obstacles),
            "best": {name: str(self.runs[place].path) for name, place in self.best.items()},
            "epsilon_together": self.epsilon,
            "delta_together": self.delta,
        }


def compare(paths: Sequence[Path]) -> Comparison:
    """Reads runs and holds them against one another.

    Raises:
        ConfigError: There are fewer than two, or one is none, or stands there twice.
        FedveilError: A run is damaged.
    """
    if len(paths) < 2:
        raise ConfigError(f"runs compare: needs two runs or more, got {len(paths)}")
    runs = tuple(map(read_run, paths))
    _refuse_twins(runs)
    obstacles = tuple(_obstacles(runs))
    return Comparison(
        runs=runs,
        config=_differences([facts.config for facts in runs]),
        versions=_differences([facts.versions for facts in runs]),
        same_schema=_one([facts.schema for facts in runs]),
        obstacles=obstacles,
        best={} if obstacles else _best(runs),
        epsilon=_together(runs),
        delta=math.fsum(p.delta or 0.0 for facts in runs if (p := facts.told.privacy)),
    )


def read_run(path: Path) -> Facts:
    """Reads a run's folder, finished or not.

    Raises:
        ConfigError: It holds no run.
        FedveilError: It is damaged.
    """
    check_run(path)
    try:
        config = dict(_flat(read_toml(path / "config.toml")))
    except ConfigError as error:
        raise FedveilError(f"{error}; put a whole copy back") from None
    state, cause, told = _told(path, config)
    schema, environment = (
        _object(path / name) if (path / name).exists() else {}
        for name in ("schema.json", "environment.json")
    )
    begun = _begun(path, environment.pop("begun", None))
    return Facts(path, state, cause, begun, config, schema, dict(_flat(environment)), told)


def _begun(path: Path, noted: object) -> datetime:
    """When a run was begun, by its own note; of older ones, when its configuration was written."""
    try:
        return datetime.fromisoformat(str(noted)).astimezone(UTC)
    except ValueError:
        return datetime.fromtimestamp((path / "config.toml").stat().st_mtime, UTC)


def is_run(path: Path) -> bool:
    """Whether a folder holds a run, whole or not."""
    return any((path / name).is_file() for name in ("config.toml", "events.jsonl", "metrics.json"))


def check_run(path: Path) -> None:
    """Refuses a path that is no run's: a wrong call, not a run that failed.

    Raises:
        ConfigError: It holds no run.
    """
    if path.is_file():
        raise ConfigError(f"{path}: is a file; give the folder of a run")
    if not is_run(path):
        raise ConfigError(f"{path}: holds no run; check the path")


def plain(facts: Facts) -> dict[str, Any]:
    """A run as plain values, for JSON."""
    return {
        "folder": str(facts.path),
        "state": facts.state,
        "cause": facts.cause or None,
        "begun": facts.begun.isoformat(timespec="seconds"),
        "rounds_planned": facts.config.get("federation.rounds"),
        **facts.told.model_dump(),
    }


# Reading


def _told(path: Path, config: Mapping[str, Any]) -> tuple[State, str, Told]:
    """State, cause of failure, and what is known: of a run that has not ended, by its events."""
    metrics, file = path / "metrics.json", path / "events.jsonl"
    if metrics.exists():
        return "finished", "", _checked(_Finished, _object(metrics), metrics)
    # The last line may be torn; a whole one ends.
    lines = _text(file).split("\n")[:-1] if file.exists() else []
    try:
        events = [json.loads(line) for line in lines]
        told = _checked(Told, _by_events(events, config), file)
        last = events[-1] if events else {}
        failed = last.get("event") == "failed"
    except (AttributeError, KeyError, TypeError, ValueError):
        raise _damaged(file) from None
    return "failed" if failed else "unfinished", str(last.get("cause", "")) if failed else "", told


def _object(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(_text(file))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise _damaged(file)
    return values


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise _damaged(file) from None


def _damaged(file: Path) -> FedveilError:
    return FedveilError(f"{file}: is damaged, or cannot be read; put a whole copy back")


def _by_events(events: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> dict[str, Any]:
    begun = next((event for event in events if "privacy" in event), {})
    rounds = [event for event in events if event.get("event") == "round"]
    evaluated = [event["quality"] for event in events if event.get("event") == "evaluated"]
    total = sum(sum(event["seconds"].values()) for event in rounds)
    return {
        "run_id": begun.get("run_id", ""),
        "family": config.get("model.family", ""),
        "rounds": rounds[-1]["round"] if rounds else 0,
        "sites": begun.get("sites"),
        "privacy": begun.get("privacy"),
        "quality": evaluated[-1] if evaluated else {},
        "seconds": {"total": round(total, 3)} if rounds else {},
    }


def _checked(model: type[Told], values: Mapping[str, Any], file: Path) -> Told:
    try:
        return validated(model, values)
    except ConfigError as error:
        raise FedveilError(f"{file}: {error}; put a whole copy back") from None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# Holding against one another


def _refuse_twins(runs: Sequence[Facts]) -> None:
    seen: dict[Path | str, Facts] = {}
    for facts in runs:
        names: tuple[Path | str, ...] = (facts.path.resolve(), facts.told.run_id)
        for name in names:
            if name and name in seen:
                raise ConfigError(
                    f"{facts.path}: is the same run as {seen[name].path}; name each run once"
                )
            seen[name] = facts


def _differences(columns: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = {key: tuple(column.get(key) for column in columns) for key in keys}
    return {key: values for key, values in rows.items() if not _one(values)}


def _one(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def _obstacles(runs: Sequence[Facts]) -> Iterator[str]:
    if not _one([facts.schema for facts in runs]):
        yield "their schemas differ"
    for key in _differences([facts.config for facts in runs]):
        if key.startswith(_ABOUT):
            yield f"{key} differs"
    if sum(_judged(facts) for facts in runs) < 2:
        yield "fewer than two are finished and have figures"


def _judged(facts: Facts) -> bool:
    return facts.state == "finished" and bool(facts.told.quality)


def _best(runs: Sequence[Facts]) -> dict[str, int]:
    places = [place for place, facts in enumerate(runs) if _judged(facts)]
    names = dict.fromkeys(name for place in places for name in runs[place].told.quality)
    one_loss = all(_one([facts.config.get(key) for facts in runs]) for key in _ABOUT_LOSS)
    found = {}
    for name in names:
        having = [place for place in places if name in runs[place].told.quality]
        if (name != "loss" or one_loss) and (place := _better(name, runs, having)) is not None:
            found[name] = place
    return found


def _better(name: str, runs: Sequence[Facts], places: Sequence[int]) -> int | None:
    """The run that is better than every other by more than chance explains, if one is."""
    sign = _direction(name)
    if sign == 0 or len(places) < 2:
        return None
    first = max(places, key=lambda place: sign * runs[place].told.quality[name].value)
    others = [place for place in places if place != first]
    clear = all(_differ(name, runs[first], runs[other]) for other in others)
    return first if clear else None


def _direction(name: str) -> int:
    """1 where more is better, -1 where less is, 0 where nobody has said."""
    if name == "loss" or name.endswith("_tv"):
        return -1
    return 1 if "accuracy" in name or "auroc" in name else 0


def _differ(name: str, one: Facts, other: Facts) -> bool:
    """Whether two figures differ by more than twice their standard deviations together.

    Noise lifts a total variation towards its floor, so that a difference of floors explains as much
    of one of values.
    """
    figures = [facts.told.quality[name] for facts in (one, other)]
    spread = math.hypot(*(_deviation(name, facts) for facts in (one, other)))
    floors = [figure.floor or 0.0 for figure in figures]
    explained = _DEVIATIONS * spread + abs(floors[0] - floors[1])
    # A figure that nobody knows the spread of says nothing.
    return spread > 0 and abs(figures[0].value - figures[1].value) > explained


def _deviation(name: str, facts: Facts) -> float:
    """Of noise, and for shares of the draw of the held-out records too; of a loss none is known."""
    figure = facts.told.quality[name]
    records, share_held = (facts.config.get(f"data.{key}") for key in ("records", "holdout"))
    if name == "loss" or not isinstance(records, int) or not isinstance(share_held, float):
        return figure.noise
    held_out = max(records * share_held, 1.0)
    value = min(max(figure.value, 0.0), 1.0)
    # Agresti and Coull's share, which is never certain; a total variation's worst case is a half.
    share = 0.5 if name.endswith("_tv") else (value * held_out + 2) / (held_out + 4)
    return math.sqrt(figure.noise**2 + share * (1 - share) / held_out)


def _together(runs: Sequence[Facts]) -> float | None:
    promises = [facts.told.privacy for facts in runs]
    spent = [promise.epsilon for promise in promises if promise and promise.epsilon is not None]
    one_source = _one([facts.config.get("data.source") for facts in runs])
    return math.fsum(spent) if one_source and len(spent) == len(runs) else None
