"""How often sites are asked whether they are ready."""

from types import SimpleNamespace
from typing import Any

import pytest

from fedveil.server import ready
from fedveil.server.ready import Readiness, wait_for_sites
from fedveil.wire import Refusal


def test_one_that_waits_for_its_owner_is_asked_less_and_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, slept = 0.0, list[float]()

    def sleep(seconds: float) -> None:
        nonlocal clock
        clock += seconds
        slept.append(seconds)

    def ask(_: object, found: Readiness) -> None:
        found.ready |= {1, 2}
        found.waiting = {3: Refusal.APPROVAL.value} if clock < 86400 else {}

    monkeypatch.setattr(ready, "_ask", ask)
    config = SimpleNamespace(min_replies=2, federation=SimpleNamespace(patience=60.0))
    priced = SimpleNamespace(numbers=None, clipping_norm=1.0)
    channel: Any = SimpleNamespace(priced=priced, config=config, sites={1: 1, 2: 2, 3: 3})
    told = list[dict[str, object]]()
    wait_for_sites(channel, told.append, sleep, lambda: clock)
    assert slept[:10] == [2.0] * 10  # whoever looks on sees an approval act
    assert slept[-1] == 30.0
    assert len(slept) < 3100
    assert len(told) == 1
