"""What the events of a run say, put in order: rounds, evaluations, absences, how it ended."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from .store import Event

Quality = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Round:
    """A round that was stored.

    Attributes:
        number: Which.
        epsilon: What the run had cost after it; `None` without a mechanism.
        sites: How many usable replies came.
        dropped: The sites without one, each with the server's reason.
        seconds: The server's time by part.
        excess: How many times the accounted noise was in the sum, where it is shared out.
    """

    number: int
    epsilon: float | None
    sites: int
    dropped: tuple[tuple[int, str], ...]
    seconds: Mapping[str, float]
    excess: float | None = None


@dataclass(frozen=True)
class Described:
    """The round of statistics.

    Attributes:
        sites: How many usable replies came.
        cells: Coordinates that were released.
        dropped: The sites without a reply, each with the server's reason.
        seconds: The server's time by part, of making the model too.
        excess: As of a round.
    """

    sites: int
    cells: int
    dropped: tuple[tuple[int, str], ...]
    seconds: Mapping[str, float]
    excess: float | None = None


@dataclass(frozen=True)
class Absence:
    """A site that one reason kept out of some rounds."""

    site: int
    reason: str
    rounds: tuple[int, ...]


@dataclass(frozen=True)
class Resume:
    """A run went on after it was cut off: from which round, and what was lost."""

    after: int
    lost: tuple[int, ...]
    damaged: tuple[str, ...]


@dataclass(frozen=True)
class History:
    """A run by its events.

    Attributes:
        run_id: Which.
        privacy: What it was priced as.
        sites: How many there were.
        rounds: In order.
        evaluations: Accounted figures by the round of the model that they are of.
        drawn: What the run had cost at the last event that says so.
        resumes: In order.
        ending: Of the last process that was at it.
        cause: Why it failed; empty if it did not.
        described: The round of statistics, if one was made.
        lost_statistics: Whether it was cut off, and counts as spent.
    """

    run_id: str
    privacy: Mapping[str, Any]
    sites: int
    rounds: tuple[Round, ...] = ()
    evaluations: Mapping[int, Quality] = field(default_factory=dict)
    drawn: float | None = None
    resumes: tuple[Resume, ...] = ()
    ending: Literal["finished", "failed", "unfinished"] = "unfinished"
    cause: str = ""
    described: Described | None = None
    lost_statistics: bool = False

    @property
    def planned(self) -> int:
        """How many rounds the run was priced for."""
        return int(self.privacy["rounds"])

    @property
    def lost(self) -> tuple[int, ...]:
        """The rounds that were cut off; they count as spent."""
        return tuple(sorted({number for resume in self.resumes for number in resume.lost}))

    @property
    def absences(self) -> tuple[Absence, ...]:
        """Who was missing when, by site and reason."""
        missed: dict[tuple[int, str], list[int]] = {}
        for one in self.rounds:
            for dropped in one.dropped:
                missed.setdefault(dropped, []).append(one.number)
        return tuple(Absence(*who, tuple(rounds)) for who, rounds in sorted(missed.items()))

    @property
    def excess(self) -> tuple[float, float] | None:
        """The least and the most of the rounds."""
        found = [one.excess for one in self.rounds if one.excess is not None]
        return (min(found), max(found)) if found else None

    @property
    def seconds(self) -> dict[str, float]:
        """The time of all rounds by part."""
        parts: dict[str, float] = {}
        told = [one.seconds for one in self.rounds]
        for times in ([self.described.seconds] if self.described else []) + told:
            for part, seconds in times.items():
                parts[part] = parts.get(part, 0.0) + seconds
        return parts


def history(events: Sequence[Event]) -> History:
    """Reads a run's events; of what was told twice the later telling holds.

    Raises:
        LookupError, TypeError, ValueError: They are none of ours, or say nothing of a run's begin.
    """
    begun = [event for event in events if event["event"] in {"run", "resumed"}][-1]
    rounds = {event["round"]: _round(event) for event in events if event["event"] == "round"}
    evaluated = {e["round"]: e["quality"] for e in events if e["event"] == "evaluated"}
    costs = [e["epsilon"] for e in events if e["event"] in {"statistics", "round", "evaluated"}]
    resumes = tuple(
        Resume(event["round"], tuple(event["lost"]), tuple(event["damaged"]))
        for event in events
        if event["event"] == "resumed"
    )
    last = [e for e in events if e["event"] in {"run", "resumed", "failed", "finished"}][-1]
    return History(
        run_id=str(begun["run_id"]),
        privacy=begun["privacy"],
        sites=int(begun["sites"]),
        rounds=tuple(rounds[number] for number in sorted(rounds)),
        evaluations=dict(sorted(evaluated.items())),
        drawn=costs[-1] if costs else None,
        resumes=resumes,
        ending=last["event"] if last["event"] in {"failed", "finished"} else "unfinished",
        cause=str(last.get("cause", "")),
        described=_described(events),
        lost_statistics=any(event.get("lost_statistics") for event in events),
    )


def _described(events: Sequence[Event]) -> Described | None:
    asked = [event for event in events if event["event"] == "statistics"]
    if not asked:
        return None
    made = [event["seconds"] for event in events if event["event"] == "prepared"][-1:]
    seconds = {part: float(value) for part, value in asked[-1]["seconds"].items()}
    for found in made:
        seconds["prepared"] = float(found["server"])
    return Described(
        sites=int(asked[-1]["sites"]),
        cells=int(asked[-1]["cells"]),
        dropped=_dropped(asked[-1]),
        seconds=seconds,
        excess=asked[-1].get("excess"),
    )


def _dropped(event: Event) -> tuple[tuple[int, str], ...]:
    return tuple((int(one["site"]), str(one["reason"])) for one in event["dropped"])


def _round(event: Event) -> Round:
    return Round(
        number=int(event["round"]),
        epsilon=event["epsilon"],
        sites=int(event["sites"]),
        dropped=_dropped(event),
        seconds=event["seconds"],
        excess=event.get("excess"),
    )


def spans(numbers: Sequence[int]) -> str:
    """Ascending numbers as people write them: `3, 7-9`."""
    found = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        found.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ", ".join(found)
