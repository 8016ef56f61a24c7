"""Traces: JSON of Chrome's format; slices nest nowhere, arrows begin and end in slices, counters add up."""

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from k25sys.errors import ScheduleError
from k25sys.parallel.pipeline import Action, Kind, Timeline, lower, make_schedule, simulate
from k25sys.parallel.pipeline.ir import COMMUNICATION
from k25sys.parallel.pipeline.timeline import Span
from k25sys.parallel.pipeline.tracer import write_perfetto
from tests.parallel.pipeline.sizes import COSTS, all_schedules


def _trace(folder: Path, timelines: Timeline | list[Timeline], **options: Any) -> list[dict[str, Any]]:
    write_perfetto(timelines, folder / "trace.json", **options)
    trace = json.loads((folder / "trace.json").read_text(), parse_constant=pytest.fail)
    assert trace["displayTimeUnit"] == "ms"
    return trace["traceEvents"]


def _check(events: list[dict[str, Any]]) -> None:
    """What Perfetto needs: numbers, names of every process and track, slices that do not overlap, arrows in pairs."""
    tracks, names, arrows = defaultdict(list), set(), defaultdict(list)
    for event in events:
        assert isinstance(event["pid"], int)
        if event["ph"] == "X":
            assert event["dur"] > 0
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] == "M":
            names.add((event["pid"], event.get("tid"), event["name"]))
        elif event["ph"] in "sf":
            arrows[event["id"]].append(event)
        else:
            assert event["ph"] == "C"
            assert isinstance(event["args"]["value"], (int, float))
    for (pid, tid), slices in tracks.items():
        assert (pid, tid, "thread_name") in names
        assert (pid, None, "process_name") in names
        for (_, end), (start, _) in pairwise(sorted(slices)):
            assert end <= start * (1 + 1e-12) + 1e-6
    for pair in arrows.values():
        first, last = sorted(pair, key=lambda event: event["ph"] == "f")
        assert (first["ph"], last["ph"], last["bp"]) == ("s", "f", "e")
        assert first["pid"] != last["pid"]
        assert first["ts"] <= last["ts"]
        for event in (first, last):
            slices = tracks[event["pid"], event["tid"]]
            assert any(start <= event["ts"] < end for start, end in slices)


def test_traces_of_all_schedules_are_valid(tmp_path: Path) -> None:
    for schedule in all_schedules(ranks=(1, 3), microbatches=(4,)):
        for each in (schedule, lower(schedule)):
            for link in (0.0, 0.3, 4.0):
                timeline = simulate(each, COSTS, link_seconds=link)
                events = _trace(tmp_path, timeline)
                _check(events)
                slices = [event for event in events if event["ph"] == "X"]
                computed = sorted(str(span.action) for span in timeline if span.action.kind not in COMMUNICATION)
                assert sorted(e["name"] for e in slices if not e["cat"].startswith(("SEND", "RECV"))) == computed
                assert len(slices) - len(computed) == 2 * len(timeline.transfers)
                assert sum(event["ph"] == "s" for event in events) == len(timeline.transfers)


def _vision() -> Timeline:
    base = make_schedule("1f1b", num_ranks=2, num_microbatches=2)
    actions = {
        0: (*map(Action.parse, ("0VF0", "0D0")), *base.actions[0], *map(Action.parse, ("0R0", "0VB0"))),
        1: (*map(Action.parse, ("0VF1", "0D0")), *base.actions[1], *map(Action.parse, ("0R0", "0VB1"))),
    }
    costs = {Kind.VISION_FORWARD: 2.0, Kind.VISION_BACKWARD: 6.0, Kind.DELIVER: 0.5, Kind.RETURN: 0.5} | COSTS
    return simulate(lower(replace(base, actions=actions)), costs, link_seconds=0.1)


def test_tracks_and_arguments(tmp_path: Path) -> None:
    events = _trace(tmp_path, _vision())
    _check(events)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    track = {(e["pid"], e["name"]): names[e["pid"], e["tid"]] for e in events if e["ph"] == "X"}
    assert track[0, "0F0"] == track[1, "1B1"] == "compute"
    assert track[1, "0VF1"] == track[0, "0VB0"] == "vision"
    assert track[0, "0D0"] == track[1, "0D0"] == track[1, "0R0"] == "communication"
    assert track[0, "0SF0"] == track[1, "1RF0"] == "communication"
    first = next(e for e in events if e["name"] == "0F1")
    assert first["args"] == {"stage": 0, "micro-batch": 1, "busy_us": 1e6}
    assert (first["cat"], first["dur"]) == ("FORWARD", 1e6)


def test_counters_add_up(tmp_path: Path) -> None:
    timeline = simulate(make_schedule("zb_h1", num_ranks=4, num_microbatches=6), COSTS)
    sizes = {Kind.FORWARD: 8.0, Kind.BACKWARD_INPUT: -6.0, Kind.BACKWARD_WEIGHT: -2.0}
    memory = {rank: timeline.memory(rank, lambda action: sizes[action.kind]) for rank in range(4)}
    events = _trace(tmp_path, timeline, memory=memory)
    for rank in range(4):
        counted = defaultdict(list)
        for event in events:
            if event["ph"] == "C" and event["pid"] == rank:
                counted[event["name"]].append(event["args"]["value"])
        assert max(counted["micro-batches in flight"]) == timeline.peak_in_flight[rank]
        assert counted["bytes held"] == [amount for _, amount in memory[rank]]
        assert counted["bytes held"][-1] == counted["micro-batches in flight"][-1] == 0
        assert max(counted["bytes held"]) <= 4 * 8


def test_planned_and_as_run_lie_in_processes_of_their_own(tmp_path: Path) -> None:
    """A run has no transfers of its own: its messages are told by its sends and receives."""
    planned = simulate(lower(make_schedule("1f1b", num_ranks=2, num_microbatches=3)), COSTS, link_seconds=0.5)
    shifted = [
        tuple(Span(s.rank, s.action, 7 + s.start * 1.1, 7.05 + s.end * 1.1, s.busy) for s in spans)
        for spans in planned.spans
    ]
    run = Timeline(name="as run", spans=tuple(shifted))
    assert len(run.messages) == len(planned.transfers) == 6
    events = _trace(tmp_path, [planned, run], memory=[{}, {0: [(7.0, 1e9)]}])
    _check([event for event in events if event["ph"] != "X" or event["cat"] != "FORWARD"])
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "1f1b rank 0", 1: "1f1b rank 1", 2: "as run rank 0", 3: "as run rank 1"}
    assert len({event["id"] for event in events if event["ph"] == "s"}) == 12
    assert [event["pid"] for event in events if event["name"] == "bytes held"] == [2]


def test_memory_of_unknown_ranks_is_refused(tmp_path: Path) -> None:
    timeline = simulate(make_schedule("1f1b", num_ranks=2, num_microbatches=3), COSTS)
    with pytest.raises(ScheduleError, match=r"memory: got ranks \[2\], accepted ranks 0 to 1"):
        write_perfetto(timeline, tmp_path / "trace.json", memory={2: []})
    with pytest.raises(ScheduleError, match="memory: got 1, accepted 2, one a timeline"):
        write_perfetto([timeline] * 2, tmp_path / "trace.json", memory=[{}])
