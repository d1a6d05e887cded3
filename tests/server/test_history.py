"""A run by its events: what was told twice, what is missing, how it ended."""

from typing import Any

import pytest

from fedveil.server.history import Absence, Resume, history, spans

PRIVACY = {"epsilon": 2.0, "target_epsilon": 2.0, "rounds": 4}
RUN: dict[str, Any] = {"event": "run", "run_id": "ab", "privacy": PRIVACY, "sites": 3}


def told(number: int, **other: Any) -> dict[str, Any]:  # noqa: ANN401
    """A `round` event."""
    seconds = {"sites": 1.0, "server": 0.5}
    return {
        "event": "round", "round": number, "epsilon": number / 2, "sites": 3, "dropped": [],
        "seconds": seconds, **other,
    }  # fmt: skip


def test_a_run_that_has_only_begun() -> None:
    found = history([RUN])
    assert (found.run_id, found.sites, found.planned) == ("ab", 3, 4)
    assert (found.ending, found.drawn, found.rounds) == ("unfinished", None, ())


def test_rounds_and_seconds_add_up_and_the_later_telling_holds() -> None:
    found = history([RUN, told(2, sites=1), told(1), told(2), {"event": "someday"}])
    assert [(one.number, one.sites) for one in found.rounds] == [(1, 3), (2, 3)]
    assert found.seconds == {"sites": 2.0, "server": 1.0}


def test_the_last_cost_is_what_was_drawn_an_evaluation_included() -> None:
    evaluated = {"event": "evaluated", "round": 1, "epsilon": 1.25, "quality": {"loss": {}}}
    found = history([RUN, told(1), evaluated])
    assert found.drawn == 1.25
    assert found.evaluations == {1: {"loss": {}}}


def test_absences_by_site_and_reason() -> None:
    silent, refused = {"site": 2, "reason": "no reply"}, {"site": 1, "reason": "refused"}
    events = [RUN, told(1, dropped=[silent]), told(2, dropped=[silent, refused]), told(3)]
    assert history(events).absences == (
        Absence(1, "refused", (2,)),
        Absence(2, "no reply", (1, 2)),
    )


@pytest.mark.parametrize(
    ("last", "ending", "cause"),
    [
        ({"event": "failed", "cause": "disk full"}, "failed", "disk full"),
        ({"event": "finished"}, "finished", ""),
        ({"event": "evaluated", "round": 1, "epsilon": 1, "quality": {}}, "unfinished", ""),
    ],
)
def test_endings(last: dict[str, Any], ending: str, cause: str) -> None:
    found = history([RUN, told(1), last])
    assert (found.ending, found.cause) == (ending, cause)


def test_a_run_that_failed_and_goes_on_is_unfinished_and_knows_what_it_lost() -> None:
    resumed = {**RUN, "event": "resumed", "round": 1, "lost": [2, 3], "damaged": ["torn"]}
    found = history([RUN, told(1), {"event": "failed", "cause": "x"}, resumed])
    assert (found.ending, found.cause) == ("unfinished", "")
    assert found.resumes == (Resume(1, (2, 3), ("torn",)),)
    assert found.lost == (2, 3)


@pytest.mark.parametrize("events", [[], [told(1)], [RUN, {"round": 1}], [RUN, {"event": "round"}]])
def test_events_that_are_none_of_ours(events: list[dict[str, Any]]) -> None:
    with pytest.raises((LookupError, TypeError, ValueError)):
        history(events)


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([3, 7, 8, 9], "3, 7-9"), ([1, 2], "1-2")]
)
def test_spans(numbers: list[int], text: str) -> None:
    assert spans(numbers) == text
