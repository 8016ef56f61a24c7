"""Timelines as traces for Perfetto (https://ui.perfetto.dev) and chrome://tracing, in Chrome's JSON format."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k25sys.errors import ScheduleError, message
from k25sys.parallel.pipeline.ir import COMMUNICATION, COMPUTE, EXCHANGES, VISION, Action, Kind
from k25sys.parallel.pipeline.timeline import Timeline

Memory = Mapping[int, Sequence[tuple[float, float]]]
"""By rank, (seconds, bytes held from then on): measured, or Timeline.memory of an estimate."""

_COLOURS = {
    Kind.FORWARD: "thread_state_running",
    Kind.BACKWARD: "rail_response",
    Kind.BACKWARD_INPUT: "rail_animation",
    Kind.BACKWARD_WEIGHT: "rail_idle",
    Kind.VISION_FORWARD: "cq_build_passed",
    Kind.VISION_BACKWARD: "cq_build_running",
}
_TRACKS = {"compute": COMPUTE, "communication": COMMUNICATION | EXCHANGES, "vision": VISION}
_Event = dict[str, Any]
_MOST_LANES = 1000
"""The tracks of a kind are numbered from a multiple of it."""


def write_perfetto(
    timelines: Timeline | Sequence[Timeline], path: str | Path, *, memory: Memory | Sequence[Memory] | None = None
) -> None:
    """Writes one trace with a process for every rank of every timeline (planned and as run, or several replicas).

    A process has the tracks compute, communication and vision, counters of the micro-batches in flight and of the
    memory, and an arrow from each send to its receive.

    Args:
        memory: Of the one timeline, or one of each.

    Raises:
        ScheduleError: not as many `memory` as timelines, or of a rank that the timeline has not.
    """
    timelines = [timelines] if isinstance(timelines, Timeline) else list(timelines)
    if memory is None:
        memory = [{}] * len(timelines)
    memories = [memory] if isinstance(memory, Mapping) else memory
    if len(memories) != len(timelines):
        raise ScheduleError(
            message("write_perfetto", "memory", f"{len(memories)}", f"{len(timelines)}, one a timeline")
        )
    events: list[_Event] = []
    first = 0
    for timeline, each in zip(timelines, memories, strict=True):
        unknown = sorted(set(each) - set(range(timeline.num_ranks)))
        if unknown:
            accepted = f"ranks 0 to {timeline.num_ranks - 1}"
            raise ScheduleError(message("write_perfetto", "memory", f"ranks {unknown}", accepted))
        events += _events(timeline, each, first)
        first += timeline.num_ranks
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, allow_nan=False))


@dataclass(frozen=True)
class _Slice:
    action: Action
    start: float
    end: float
    arguments: dict[str, float]
    arrow: tuple[str, str] | None = None
    """Phase and number of the flow event in it."""


def _events(timeline: Timeline, memory: Memory, first: int) -> Iterator[_Event]:
    """The events of `timeline`, whose rank 0 is process `first`."""
    slices: list[list[_Slice]] = [[] for _ in timeline.spans]
    for span in timeline:
        if span.action.kind not in COMMUNICATION:  # its messages are drawn instead
            slices[span.rank].append(_Slice(span.action, span.start, span.end, {"busy_us": span.busy * 1e6}))
    for i, transfer in enumerate(timeline.messages):
        send, start, end, flow = transfer.send, transfer.start, transfer.end, f"{first}.{i}"
        peers: dict[str, float] = {"source": transfer.source, "target": transfer.target}
        slices[transfer.source].append(_Slice(send, start, end, peers, ("s", flow)))
        slices[transfer.target].append(_Slice(send.partner, start, end, peers, ("f", flow)))
    for rank, mine in enumerate(slices):
        pid = first + rank
        yield _named("process_name", f"{timeline.name} rank {rank}", pid)
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
        for number, (track, kinds) in enumerate(_TRACKS.items()):
            yield from _track([each for each in mine if each.action.kind in kinds], pid, number * _MOST_LANES, track)
        for name, amounts in (("micro-batches in flight", timeline.memory(rank)), ("bytes held", memory.get(rank, ()))):
            for seconds, amount in amounts:
                yield {"ph": "C", "name": name, "pid": pid, "ts": seconds * 1e6, "args": {"value": amount}}


def _track(slices: list[_Slice], pid: int, first_tid: int, name: str) -> Iterator[_Event]:
    """The slices of one track, in as many lanes as overlap: those that overlap in one lane would be shown as nested."""
    ends: list[float] = []
    for each in sorted(slices, key=lambda each: each.start):
        end = max(each.end, each.start + 1e-9)  # arrows are drawn to nothing shorter than a nanosecond
        lane = next((lane for lane, before in enumerate(ends) if before <= each.start), len(ends))
        ends[lane : lane + 1] = [end]
        action = each.action
        place = {"pid": pid, "tid": first_tid + lane}
        about = {"name": str(action), "cat": action.kind.name, "ts": each.start * 1e6, "dur": (end - each.start) * 1e6}
        colour = {"cname": _COLOURS[action.kind]} if action.kind in _COLOURS else {}
        arguments = {"stage": action.stage, "micro-batch": action.microbatch} | each.arguments
        yield {"ph": "X", "args": arguments} | about | place | colour
        if each.arrow is not None:
            phase, flow = each.arrow
            ends_here = {"bp": "e"} if phase == "f" else {}
            time = {"ts": (each.start + end) / 2 * 1e6}
            yield {"ph": phase, "id": flow, "name": "message", "cat": "message"} | time | place | ends_here
    for lane in range(len(ends)):
        tid = first_tid + lane
        yield _named("thread_name", f"{name} {lane + 1}" if lane else name, pid) | {"tid": tid}
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}


def _named(what: str, name: str, pid: int) -> _Event:
    return {"ph": "M", "name": what, "pid": pid, "args": {"name": name}}
