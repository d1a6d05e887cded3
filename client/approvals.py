"""What waits for the word of a site's owner: held runs, their approval, and a pause.

A held run is a file, `state/approvals/RUN_ID.json`: what it asks, in words and numbers, and once it
is approved by whom and when. An approval is of the run's terms, the hash of its configuration and
schema: the same name with other terms is another run, and is held anew. What cannot be read
approves nothing.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..config import ConfigError, FedveilError, RunConfig, not_below, small_not_below
from ..files import replace_file
from ..privacy.policy import Asked
from ..privacy.secagg.encoding import Text

_FOLDER, _PAUSED = "approvals", "paused"
_RUN_NAMES = Text(64)
_MOST_HELD = 100  # a coordinator that asks for more is not one whose questions a person reads
Left = Mapping[str, tuple[float | None, float | None]]
"""Epsilon and delta that an account may still spend, by side of the split; `None` is no limit."""


class ApprovalError(FedveilError):
    """A run that its owner has not approved."""


class PausedError(FedveilError):
    """A site whose owner lets nobody in just now."""


@dataclass(frozen=True)
class Held:
    """A run that waits, or waited, for its owner.

    Attributes:
        run_id: Which run.
        terms: The hash of its configuration and schema.
        asks: What it asks, by name: plain values.
        left: What the accounts may still spend, this run not counted.
        words: The same for people, a sentence each.
        asked_at: When it came first, UTC.
        approved_by: Who approved it; empty while nobody has.
        approved_at: When.
    """

    run_id: str
    terms: str
    asks: Mapping[str, Any]
    left: Left
    words: tuple[str, ...]
    asked_at: str
    approved_by: str = ""
    approved_at: str = ""

    @property
    def approved(self) -> bool:
        """Whether its owner has approved it."""
        return bool(self.approved_by)


def held(run_id: str, terms: str, asked: Asked, config: RunConfig, left: Left) -> Held:
    """A run as its owner is asked about it."""
    numbers = asked.numbers
    asks = {
        "name": config.federation.name,
        "family": asked.family,
        "parameters": asked.parameters,
        "rounds": config.rounds,
        "statistics": config.statistics_share > 0,
        "sites": config.federation.sites,
        "unit": asked.unit,
        "mechanism": asked.mechanism,
        "encryption": asked.encryption,
        "epsilon": asked.epsilon,
        "delta": asked.delta,
        "n_min": numbers.n_min if numbers else None,
        "t_collude": numbers.t_collude if numbers else None,
        "coordinator": asked.coordinator.hex() if asked.coordinator else None,
    }
    return Held(run_id, terms, asks, dict(left), _words(asks, left), _now())


def hold(state: Path, run: Held) -> None:
    """Puts a run before its owner; one that waits on the same terms is left as it is.

    Raises:
        ApprovalError: It cannot be kept, or too many wait already.
    """
    path = _path(state, run.run_id)
    known = _read(path)
    if known is not None and known.terms == run.terms:
        return
    if known is None and len(pending(state)) >= _MOST_HELD:
        raise ApprovalError(
            f"run {run.run_id}: {_MOST_HELD} runs wait for approval already; approve some, or "
            f"take their files out of {path.parent}"
        )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(path, run)
    except OSError as error:
        raise ApprovalError(f"{path}: cannot be written ({error.strerror})") from None


def approve(state: Path, run_id: str, by: str, terms: str | None = None) -> Held:
    """Approves a held run, on the terms that it was held with.

    Args:
        state: The site's state folder.
        run_id: The run.
        by: Who says so.
        terms: Those that whoever approves has seen; `None` for whichever are held.

    Raises:
        ConfigError: No such run waits, or it changed since it was looked at.
    """
    if not by.strip():
        raise ConfigError("by: is empty; say who approves")
    path = _path(state, run_id)
    run = _read(path)
    if run is None:
        waiting = ", ".join(one.run_id for one in pending(state)) or "none"
        raise ConfigError(f"{run_id}: no such run waits for approval; these do: {waiting}")
    if terms is not None and run.terms != terms:
        raise ConfigError(f"{run_id}: was asked for anew on other terms; look at it again")
    if run.approved:
        return run
    approved = replace(run, approved_by=by, approved_at=_now())
    try:
        _write(path, approved)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror})") from None
    return approved


def find(state: Path, run_id: str) -> Held | None:
    """A run that was put before the owner, approved or not; nothing if there is none to read."""
    return _read(_path(state, run_id))


def pending(state: Path) -> list[Held]:
    """The runs that wait for their owner, those that came first in front.

    Raises:
        ConfigError: The folder cannot be read.
    """
    folder = state / _FOLDER
    try:
        names = [entry.stem for entry in folder.iterdir() if entry.suffix == ".json"]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read ({error.strerror})") from None
    found = [_read(_path(state, name)) for name in names if _RUN_NAMES.fits(name)]
    waiting = [one for one in found if one is not None and not one.approved]
    return sorted(waiting, key=lambda one: (one.asked_at, one.run_id))


def is_approved(state: Path, run_id: str, terms: str) -> bool:
    """Whether the owner has approved a run on these very terms."""
    run = _read(_path(state, run_id))
    return run is not None and run.approved and run.terms == terms


def pause(state: Path) -> None:
    """Refuses everything from now on, runs that are under way included.

    Raises:
        ConfigError: The disk refuses.
    """
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(state / _PAUSED, f"{_now()}\n".encode(), 0o600)
    except OSError as error:
        raise ConfigError(f"{state / _PAUSED}: cannot be written ({error.strerror})") from None


def resume(state: Path) -> None:
    """Takes a pause back.

    Raises:
        ConfigError: The disk refuses.
    """
    try:
        (state / _PAUSED).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{state / _PAUSED}: cannot be taken away ({error.strerror})") from None


def is_paused(state: Path) -> bool:
    """Whether the owner has paused the site; where that cannot be told it counts as paused."""
    try:
        os.lstat(state / _PAUSED)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


@dataclass(frozen=True)
class Owner:
    """Whom a real site asks; a simulated one has none.

    Attributes:
        state: The site's state folder.
        manual: Whether a run waits for the owner's word, even if the policy accepts it.
    """

    state: Path
    manual: bool

    def check_pause(self) -> None:
        """Refuses everybody while there is a pause.

        Raises:
            PausedError: There is one.
        """
        if is_paused(self.state):
            raise PausedError(
                f"{self.state / _PAUSED}: the site is paused; `fedveil site resume` ends that"
            )

    def allows(self, run_id: str, terms: str) -> bool:
        """Whether a run on these terms needs no further word."""
        return not self.manual or is_approved(self.state, run_id, terms)


def _words(asks: Mapping[str, Any], left: Left) -> tuple[str, ...]:
    price = (
        "NOTHING HIDES YOUR RECORDS: it has no noise and no price."
        if asks["epsilon"] is None
        else f"It costs at most epsilon {not_below(asks['epsilon'])} and delta "
        f"{small_not_below(asks['delta'])} for each {asks['unit']}, by mechanism "
        f"{asks['mechanism']}."
    )
    summed = (
        "The server sees your site's own contribution: there is no secure sum."
        if asks["n_min"] is None
        else f"Nobody sees less than a sum over {asks['n_min']} sites, if at most "
        f"{asks['t_collude']} of them conspire with the server."
    )
    signed = asks["coordinator"] or "nobody"
    rounds = [f"{asks['rounds']} rounds of training a model of {asks['parameters']} parameters"]
    # Of runs that were held before there were any.
    first = ["one round of noisy statistics"] if asks.get("statistics") else []
    what = ", then ".join(first + (rounds if asks["rounds"] else []))
    return (
        f'"{asks["name"]}" makes a {asks["family"]} at {asks["sites"]} sites: {what}.',
        price,
        summed,
        f"The run is signed by {signed}.",
        *(f"Before it, {side} records have {_left(*pair)} left." for side, pair in left.items()),
    )


def _left(epsilon: float | None, delta: float | None) -> str:
    # Three digits, downwards: what is printed must not promise more than there is.
    said = "no limit of epsilon" if epsilon is None else f"epsilon {int(epsilon * 1000) / 1000:g}"
    return said if delta is None else f"{said} and delta {delta:.3g}"


def _path(state: Path, run_id: str) -> Path:
    """A run's file; its name came from outside.

    Raises:
        ConfigError: It could be another file's.
    """
    if not _RUN_NAMES.fits(run_id):
        raise ConfigError(f"run {run_id!a}: expected a name of plain characters")
    return state / _FOLDER / f"{run_id}.json"


def _read(path: Path) -> Held | None:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        found = Held(**raw)
        texts = (found.run_id, found.terms, found.asked_at, found.approved_by, found.approved_at)
        whole = all(isinstance(text, str) for text in (*texts, *found.words))
        if not whole or found.run_id != path.stem or not isinstance(found.asks, dict):
            return None
        left = {side: (pair[0], pair[1]) for side, pair in found.left.items()}
        return replace(found, left=left, words=tuple(found.words))
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return None


def _write(path: Path, run: Held) -> None:
    replace_file(path, f"{json.dumps(asdict(run), indent=2)}\n".encode(), 0o600)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
