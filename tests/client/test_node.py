"""How often a site asks, which nobody but its own clock says."""

import pytest

from fedveil.client.node import LATER, SHARE, SOON, pause


class TestPause:
    def test_is_short_after_a_message_and_never_long(self) -> None:
        """A secure sum has three steps: the next one comes soon."""
        assert pause(0.0) == SOON
        assert pause(86400.0) == LATER

    @pytest.mark.parametrize("idle", [2.0, 10.0, 30.0])
    def test_is_a_share_of_the_time_without_one(self, idle: float) -> None:
        assert pause(idle) == pytest.approx(SHARE * idle)
