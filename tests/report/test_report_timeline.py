"""The picture of a run: valid, readable without colours and in the dark, and true to the numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightfold.audit.timeline import KINDS, Mark, Row, Timeline
from weightfold.report.timeline import LEFT, MAX_ROWS, RIGHT, STYLES, WIDTH, _glyph, picture

SVG = "{http://www.w3.org/2000/svg}"
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


def timeline(rows: int = 2, **changes: Any) -> Timeline:
    made = tuple(Row(f"layer{n}", 8, ((0.0, 8), (40.0, 4))) for n in range(rows))
    marks = (Mark(2, 40, "accepted", ("layer0",), "fold 8 → 4"), Mark(3, 60, "refused", (), "refusal: too much"))
    losses = {"dense": [(1.0, 2.0), (99.0, 0.01)], "folded": [(1.0, 2.0), (99.0, 0.02)]}
    return replace(Timeline("net", made, marks, 100.0, "steps", losses), **changes)


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 4096)), min_size=1, max_size=6),
    st.lists(st.tuples(st.floats(0, 1e6), st.sampled_from(KINDS)), max_size=30),
    st.lists(st.tuples(st.integers(0, 1000), NUMBERS), max_size=30),
    st.booleans(),
)
@settings(deadline=None)
def test_any_run_makes_a_valid_drawing(points: list, marks: list, losses: list, alone: bool) -> None:
    row = Row("<&>", 64, tuple(sorted(points)))
    drawn = tuple(Mark(n, at, kind, ("<&>",), "a < b") for n, (at, kind) in enumerate(sorted(marks)))
    svg = picture(Timeline("<b>", (row,), drawn, 1e6, "steps", {"folded": sorted(losses)}), alone=alone)
    ElementTree.fromstring(svg)
    assert not re.search(r"\bnan\b|\binf\b", svg)


def test_the_height_of_a_row_is_the_share_that_lives() -> None:
    root = ElementTree.fromstring(picture(timeline(1), alone=True))
    (ground,) = [e for e in root.iter(f"{SVG}rect") if e.get("class") == "t-gone" and float(e.get("width")) > 100]
    top, height = float(ground.get("y")), float(ground.get("height"))
    edges = next(e for e in root.iter(f"{SVG}polyline") if e.get("class") == "t-edge").get("points").split()
    corners = [tuple(map(float, edge.split(","))) for edge in edges]
    at = LEFT + 0.4 * (WIDTH - RIGHT - LEFT)
    expected = [(LEFT, top), (at, top), (at, top + height / 2), (WIDTH - RIGHT, top + height / 2)]
    for corner, wanted in zip(corners, expected, strict=True):
        assert corner == pytest.approx(wanted, abs=0.11)


def test_a_screen_reader_is_told_what_it_shows() -> None:
    root = ElementTree.fromstring(picture(timeline(), alone=True))
    assert root.get("role") == "img"
    assert "16 channels at the start and 8 at the end" in root.get("aria-label")
    assert root.find(f"{SVG}desc").text in root.get("aria-label")
    titles = [element.text for element in root.iter(f"{SVG}title")]
    assert "entry 2, edit kept: fold 8 → 4" in titles
    assert "layer0: 8 from step 0, 4 from step 40" in titles


def test_marks_differ_in_shape_and_only_those_that_occur_are_explained() -> None:
    shapes = {re.sub(r'class="[^"]*"', "", _glyph(kind, 0, 0)) for kind in KINDS}
    assert len(shapes) == len(KINDS)
    svg = picture(timeline())
    assert {kind for kind, (_, words) in STYLES.items() if f">{words}<" in svg} == {"accepted", "refused"}


def test_a_picture_of_its_own_brings_its_colours_for_light_and_dark() -> None:
    svg = picture(timeline(), alone=True)
    assert "var(" not in svg
    assert "prefers-color-scheme: dark" in svg
    assert not re.search(r"(href|src)=|url\(|@import|<script", svg)
    style = svg[svg.index("<style>") : svg.index("</style>")]
    used = set(re.findall(r'class="([^"]*)"', svg[svg.index("</style>") :]))
    assert all(f".{name}" in style for classes in used for name in classes.split())
    assert "xmlns" not in picture(timeline())


def test_too_many_rows_leave_out_those_to_which_nothing_happened() -> None:
    mark = Mark(2, 40, "accepted", ("layer50",), "fold 8 → 4")
    svg = picture(timeline(60, marks=(mark,)))
    assert "layer50</text>" in svg
    assert f"and {60 - MAX_ROWS} more groups" in svg


def test_marks_at_one_step_lie_beside_each_other() -> None:
    marks = tuple(Mark(n, 40, "rolled back", ("layer0",), "x") for n in range(3))
    places = re.findall(r'class="t-mark t-rolled" d="M ([\d.]+)', picture(timeline(1, marks=marks)))
    xs = [float(x) for x in places[-3:]]
    assert xs[1] - xs[0] > 8
    assert xs[2] - xs[1] > 8
