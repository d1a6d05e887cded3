"""Charts and bars as coordinates, by hand-computed numbers."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.server import bars, charts
from fedveil.server.bars import Box, Shares, histogram
from fedveil.server.charts import Series, line_chart

LEFT, RIGHT, TOP, BOTTOM = 52, 428, 12, 210


class TestLineChart:
    def test_corners(self) -> None:
        chart = line_chart("x", [Series("a", ((0.0, 0.0), (10.0, 4.0)))], 10)
        assert [tick.text for tick in chart.y] == ["0", "1", "2", "3", "4"]
        assert (chart.y[0].at, chart.y[-1].at) == (BOTTOM, TOP)
        assert [tick.text for tick in chart.x] == ["0", "5", "10"]
        line = chart.lines[0]
        assert line.path == f"M{LEFT}.0 {BOTTOM}.0L{RIGHT}.0 {TOP}.0"
        assert (line.band, line.marks) == ("", ())

    def test_a_band_is_two_standard_deviations_each_way_and_ends_at_the_range(self) -> None:
        series = Series("a", ((1.0, 0.5),), (0.1,), marked=True)
        chart = line_chart("x", [series], 4)
        middle, each = (TOP + BOTTOM) / 2, (BOTTOM - TOP) / 2
        assert [tick.text for tick in chart.y] == ["0.3", "0.4", "0.5", "0.6", "0.7"]
        assert chart.lines[0].band == f"M146.0 {middle - each}L146.0 {middle + each}Z"
        assert chart.lines[0].marks == ((146.0, middle),)
        wide = line_chart("x", [Series("a", ((1.0, 0.5),), (35.0,))], 4, within=(0.0, 1.0))
        assert (wide.y[0].text, wide.y[-1].text) == ("0.0", "1.0")
        assert wide.lines[0].band == f"M146.0 {TOP}.0L146.0 {BOTTOM}.0Z"

    def test_a_step_holds_until_the_next(self) -> None:
        series = Series("a", ((0.0, 0.0), (1.0, 0.0), (2.0, 1.0), (4.0, 1.0)), stepped=True)
        path = line_chart("x", [series], 4).lines[0].path
        assert path == f"M{LEFT}.0 {BOTTOM}.0H240.0V{TOP}.0H{RIGHT}.0V{TOP}.0"

    def test_a_limit_has_the_hue_of_the_line_before_it(self) -> None:
        one, two = Series("a", ((0.0, 1.0),)), Series("b", ((0.0, 2.0),))
        limit = Series("c", ((0.0, 3.0),), dashed=True)
        chart = line_chart("x", [one, limit, two, limit], 1)
        assert [line.hue for line in chart.lines] == [1, 1, 2, 2]

    def test_in_words(self) -> None:
        chart = line_chart("x", [Series("a", ((1.0, 0.5), (9.0, 0.25)))], 9)
        assert chart.summary == "a: 0.5 at round 1, 0.25 at round 9"

    def test_the_axis_holds_what_it_must(self) -> None:
        chart = line_chart("x", [Series("a", ((1.0, 9.0),))], 9, holds=(0.0,))
        assert chart.y[0].text == "0"

    def test_a_long_run_is_thinned_and_keeps_its_lows(self) -> None:
        points = tuple((float(i), 0.0 if i == 5001 else 10.0 + i % 7) for i in range(10_000))
        chart = line_chart("x", [Series("a", points)], 10_000)
        path = chart.lines[0].path
        assert path.count("L") <= charts._MOST_POINTS
        assert f" {BOTTOM}.0L" in path

    @given(
        st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=9),
        st.floats(0, 1e6),
        st.integers(1, 100_000),
    )
    def test_nothing_is_drawn_outside_the_frame(
        self, values: list[float], noise: float, rounds: int
    ) -> None:
        points = tuple((rounds * i / 9, value) for i, value in enumerate(values))
        series = Series("a", points, (noise,) * len(points), marked=True)
        chart = line_chart("x", [series], rounds)
        assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in chart.lines[0].marks)
        assert 2 <= len(chart.y) <= 9
        assert all(a.at > b.at for a, b in pairwise(chart.y))
        assert all(a.at < b.at for a, b in pairwise(chart.x))


class TestHistogram:
    def test_an_upright_one(self) -> None:
        shares = Shares("age", True, ("0 to 5", "5 to 9"), (0.5, 0.5), (0.1, 0.1), (0.25, 0.75))
        found = histogram(shares)
        assert found.top == pytest.approx(0.9)
        assert found.ends == ("0", "9")
        first = found.bars[0]
        # 96 high in all; half of 0.9 is 53.3 of it.
        assert first.real == Box(9.6, 56.7, 50.4, 53.3)
        assert first.synthetic == Box(60.0, 83.3, 50.4, 26.7)
        assert first.interval == Box(9.6, 35.3, 50.4, 42.7)  # 0.3 to 0.7
        assert first.words == "0 to 5: real 50.0% (30.0% to 70.0%), synthetic 25.0%"

    def test_a_lying_one_with_synthetic_shares_alone(self) -> None:
        found = histogram(Shares("hue", False, ("a", "b"), synthetic=(1.0, 0.0)))
        assert not found.upright
        assert found.height == 2 * 38
        assert found.bars[0].synthetic == Box(0.0, 26, 240.0, 7)
        assert (found.bars[0].real, found.bars[0].interval) == (None, None)
        assert found.bars[1].words == "b: synthetic 0.0%"

    def test_small_categories_are_added_up_with_their_noise(self) -> None:
        names = tuple(f"c{i}" for i in range(15))
        real = (*[0.03] * 4, *[0.08] * 11)
        found = histogram(Shares("x", False, names, real, (0.01,) * 15, real[::-1]))
        assert len(found.bars) == bars._MOST_ROWS
        last = found.bars[-1]
        assert last.name == "4 others"
        assert sum(1 for bar in found.bars if bar.name in names) == 11
        # Two standard deviations of four such noises: 0.04.
        assert "(" in last.words
        low, high = last.words.partition("(")[2].partition(")")[0].split(" to ")
        assert float(high.rstrip("%")) - float(low.rstrip("%")) == pytest.approx(8.0)

    def test_an_interval_ends_at_the_frame(self) -> None:
        found = histogram(Shares("x", False, ("a", "b"), (0.5, 0.5), (9.0, 9.0)))
        assert found.bars[0].interval == Box(0.0, 18, 240.0, 7)
