"""Virtual time: what a step would take if every rank had a processor of its own, from one machine that has fewer.

The real pipeline runs in as many processes as it has ranks, and a Recorder notes the thread's CPU time of every action:
waiting does not count, nor does whoever shares the core. Replayed through the simulator these make the timeline of the
step on a machine per rank. Backwards of the CPU run on the thread that calls them; with more threads than one
(torch.set_num_threads) the rest's time is missing. What it gives is measured and replayed, not measured: label it so.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import median

import torch.distributed as dist

from k25sys.errors import ScheduleError, listing, message
from k25sys.parallel.grid import RankGrid
from k25sys.parallel.pipeline.ir import SENDS, Action, Schedule
from k25sys.parallel.pipeline.recorder import Recorder
from k25sys.parallel.pipeline.simulator import LinkSeconds, simulate
from k25sys.parallel.pipeline.timeline import Span, Timeline, Transfer

Measured = Mapping[Action, float]
"""Seconds of every action of a step, of all ranks."""


def gather(recorder: Recorder, grid: RankGrid) -> tuple[Recorder, ...]:
    """What every rank of the pipeline recorded, by its place; on every one of them. Collective over "pipeline"."""
    group = grid.group("pipeline")
    if group is None:
        return (recorder,)
    gathered: list[Recorder | None] = [None] * grid.size("pipeline")
    dist.all_gather_object(gathered, recorder, group=group)
    return tuple(each for each in gathered if each is not None)


def as_run(recorders: Sequence[Recorder], schedule: Schedule) -> Timeline:
    """The step by the wall clock, on the machine that it ran on: for drawings and traces.

    The busy seconds of a span are its CPU time. A message lasts from its send until its receiver has seen that it is
    there, which may be long after it came. Clocks of ranks agree as well as they left the barrier before `begin`.
    """
    spans = tuple(
        tuple(Span(rank, each.action, each.start, each.end, each.cpu) for each in recorder.recorded)
        for rank, recorder in enumerate(recorders)
    )
    sent = {span.action: span for of_rank in spans for span in of_rank if span.action.kind in SENDS}
    transfers = []
    for rank, recorder in enumerate(recorders):
        for receive, seconds in recorder.arrivals.items():
            send = sent[receive.partner]
            transfers.append(Transfer(send.action, send.rank, rank, send.start, max(send.start, seconds)))
    transfers.sort(key=lambda transfer: transfer.start)
    return Timeline(name=f"{schedule.name} as run", spans=spans, transfers=tuple(transfers))


def measured(recorders: Sequence[Recorder]) -> dict[Action, float]:
    """The CPU seconds of every action of a step; D and R, on every rank, count as their slowest one."""
    seconds: dict[Action, float] = {}
    for recorder in recorders:
        for each in recorder.recorded:
            seconds[each.action] = max(each.cpu, seconds.get(each.action, 0.0))
    return seconds


def replay(schedule: Schedule, seconds: Measured, *, link_seconds: LinkSeconds = 0.0) -> Timeline:
    """The step of `schedule` in virtual time, each action as long as measured.

    Args:
        schedule: with its sends and receives, which take the time of their posting.
        seconds: of every action.

    Raises:
        ScheduleError: an action was not measured.
    """
    actions = [action for of_rank in schedule.actions.values() for action in of_rank]
    missing = [str(action) for action in actions if action not in seconds]
    if missing:
        raise ScheduleError(message("replay", "seconds", f"none for {listing(missing)}", "all actions of the schedule"))
    return simulate(schedule, seconds, link_seconds=link_seconds)


def of_stage_and_kind(action: Action) -> Hashable:
    """Micro-batches alike."""
    return action.stage, action.kind


def predict(steps: Sequence[Measured], key: Callable[[Action], Hashable] = of_stage_and_kind) -> dict[Action, float]:
    """Costs for the simulator from measured steps: the median over all actions that `key` puts together.

    Args:
        steps: one or more, of the same schedule.
        key: by default (stage, kind). Where micro-batches differ, make it say how (their length, or their number).
    """
    if not steps:
        raise ScheduleError(message("predict", "steps", "none", "one measured step or more"))
    classes: defaultdict[Hashable, list[float]] = defaultdict(list)
    for step in steps:
        for action, seconds in step.items():
            classes[key(action)].append(seconds)
    medians = {name: median(values) for name, values in classes.items()}
    return {action: medians[key(action)] for action in steps[0]}


def relative_error(
    schedule: Schedule,
    steps: Sequence[Measured],
    *,
    key: Callable[[Action], Hashable] = of_stage_and_kind,
    link_seconds: LinkSeconds = 0.0,
) -> float:
    """How far the simulator is from virtual time: |simulated - replayed| / replayed, of makespans.

    Simulated are costs that the even steps predict; replayed is each action as long as it took in the odd steps, in the
    median: the CPU time of single ones jumps with what shares caches and cores.

    Args:
        steps: two or more, of `schedule`, warm.
        key: see predict.

    Raises:
        ScheduleError: fewer than two steps, or an action that was not measured.
    """
    if len(steps) < 2:
        raise ScheduleError(message("relative_error", "steps", len(steps), "two measured steps or more"))
    simulated = replay(schedule, predict(steps[::2], key), link_seconds=link_seconds).makespan
    replayed = replay(schedule, predict(steps[1::2], _itself), link_seconds=link_seconds).makespan
    return abs(simulated - replayed) / replayed


def _itself(action: Action) -> Hashable:
    return action
