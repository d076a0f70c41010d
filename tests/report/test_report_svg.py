"""The plots: ticks are round, points lie where they should, strange numbers do no harm."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightfold.report.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Line,
    interval_plot,
    line_plot,
    nice_ticks,
)

NUMBERS = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e9, max_value=1e9)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=20), st.booleans(), st.booleans())
def test_any_points_make_a_valid_drawing(points: list[tuple[float, float]], log: bool, percent: bool) -> None:
    svg = line_plot("t", [Line("a", "dense", sorted(points))], x_label="x", log=log, percent=percent)
    ElementTree.fromstring(svg)
    assert not re.search(r"nan|inf\b", svg)


def test_values_that_are_not_finite_are_left_out() -> None:
    points = [(0.0, 1.0), (1.0, math.nan), (2.0, math.inf), (3.0, 2.0)]
    svg = line_plot("t", [Line("a", "dense", points)], x_label="x")
    (path,) = re.findall(r'polyline class="line dense " points="([^"]*)"', svg)
    assert len(path.split()) == 2


def test_the_ends_of_a_line_lie_in_the_corners() -> None:
    x_axis, y_axis = Axis(0, 10, LEFT, WIDTH - RIGHT), Axis(1, 100, HEIGHT - BOTTOM, TOP, log=True)
    assert (x_axis.at(0), x_axis.at(10)) == (LEFT, WIDTH - RIGHT)
    assert (y_axis.at(1), y_axis.at(100)) == (HEIGHT - BOTTOM, TOP)
    assert y_axis.at(10) == pytest.approx((HEIGHT - BOTTOM + TOP) / 2)
    assert y_axis.ticks() == [1, 10, 100]


@given(NUMBERS, st.floats(1e-6, 1e9), st.integers(2, 10))
def test_ticks_are_few_and_inside(low: float, span: float, n: int) -> None:
    high = low + span
    if not high > low + abs(low) * 1e-9:
        return
    ticks = nice_ticks(low, high, n)
    assert len(ticks) <= 2 * n + 2
    margin = span * 1e-6 + abs(low) * 1e-9
    assert all(low - margin <= tick <= high + margin for tick in ticks)


def test_an_interval_beyond_the_limit_is_marked() -> None:
    assert "bad" in interval_plot("t", 0.0, 0.1, 0.2, 0.15, (-1, 1))
    assert "bad" not in interval_plot("t", 0.0, 0.1, 0.2, 0.25, (-1, 1))
