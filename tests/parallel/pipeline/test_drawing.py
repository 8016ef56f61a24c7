"""Drawings: well-formed XML that needs nothing else, boxes where the actions are."""

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from k25sys.errors import ArgumentValueError
from k25sys.parallel.pipeline import Timeline, lower, make_schedule, simulate
from k25sys.parallel.pipeline.drawing import draw_svg
from k25sys.parallel.pipeline.ir import COMMUNICATION
from k25sys.parallel.pipeline.simulator import simulate_replicas
from tests.parallel.pipeline.sizes import COSTS, all_schedules
from tests.parallel.pipeline.test_tracer import _vision

SVG = "{http://www.w3.org/2000/svg}"


def _boxes(timeline: Timeline, width: int = 1600) -> dict[str, list[tuple[float, float, float]]]:
    """By title: (left, top, width) of its boxes, work first."""
    root = ElementTree.fromstring(draw_svg(timeline, width=width))
    assert root.tag == SVG + "svg"
    places = {}
    for group in root.iter(SVG + "g"):
        rects = group.findall(SVG + "rect")
        title = group.findtext(SVG + "title")
        assert title is not None
        places[title] = [(float(r.get("x", "")), float(r.get("y", "")), float(r.get("width", ""))) for r in rects]
    return places


def test_every_action_is_a_box_and_boxes_of_a_rank_do_not_overlap() -> None:
    for schedule in all_schedules(ranks=(1, 3), microbatches=(4,)):
        timeline = simulate(lower(schedule), COSTS, link_seconds=0.3)
        boxes = _boxes(timeline)
        assert len(boxes) == sum(span.action.kind not in COMMUNICATION for span in timeline)
        rows: dict[float, list[tuple[float, float]]] = {}
        for (left, top, wide), *_ in boxes.values():
            rows.setdefault(top, []).append((left, wide))
        assert len(rows) == schedule.num_ranks
        for row in rows.values():
            row.sort()
            for (left, wide), (after, _) in pairwise(row):
                assert left + wide <= after + 0.02
            assert row[0][0] >= 64
            assert row[-1][0] + row[-1][1] <= 1600 - 64 + 0.02


def test_what_is_drawn_is_where_it_happens() -> None:
    timeline = simulate(make_schedule("gpipe", num_ranks=2, num_microbatches=1), COSTS)
    boxes = _boxes(timeline, width=728)  # 600 pixels for 6 seconds
    assert boxes["1B0 on rank 1: 2 to 4 s, work 2 s"] == [(264.0, 78.0, 200.0)]
    text = draw_svg(timeline)
    assert "gpipe: 6 s, bubble 50.00%" in text
    assert not re.search(r"href|url\(|<script|<image|<style", text)


def test_waiting_is_drawn_apart_from_work() -> None:
    schedule = make_schedule("gpipe", num_ranks=1, num_microbatches=1)
    first, _ = simulate_replicas([schedule] * 2, [COSTS, lambda action: 3.0], lockstep=[0])
    (_, _, work), (_, _, wait) = _boxes(first)["0F0 on rank 0: 0 to 3 s, work 1 s"]
    assert wait == pytest.approx(2 * work, abs=0.02)


def test_vision_is_drawn_and_names_are_escaped() -> None:
    timeline = _vision()
    assert any(title.startswith("0VB1 on rank 1") for title in _boxes(timeline))
    named = Timeline(name="<a & b>", spans=timeline.spans, transfers=timeline.transfers)
    root = ElementTree.fromstring(draw_svg(named))
    texts = [element.text or "" for element in root.iter(SVG + "text")]
    assert texts[0].startswith("<a & b>: ")
    assert {"forward", "vision forward", "vision backward", "media to stage 0", "media gradients"} <= set(texts)


def test_nothing_and_too_narrow() -> None:
    ElementTree.fromstring(draw_svg(Timeline(name="empty", spans=((), ()))))
    with pytest.raises(ArgumentValueError, match="draw_svg: width: got 100, accepted 200 or more pixels"):
        draw_svg(Timeline(name="empty", spans=((),)), width=100)
