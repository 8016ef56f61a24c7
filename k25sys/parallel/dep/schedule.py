"""A pipeline's schedule with the actions of a decoupled encoder around and in it."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from k25sys.parallel.dep.balance import EncodingPlan
from k25sys.parallel.pipeline.ir import COMPUTE, Action, Kind, Schedule
from k25sys.parallel.pipeline.simulator import simulate

DeliveryPoints = Mapping[int, Mapping[int, Sequence[int]]]
"""By rank: the micro-batches whose rows are delivered before its action of each position."""

_ALIKE = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0, Kind.BACKWARD_INPUT: 1.0, Kind.BACKWARD_WEIGHT: 1.0}


def delivery_points(backbone: Schedule, prefetch: int) -> DeliveryPoints:
    """When the rows of each micro-batch leave for stage 0.

    On every rank that is the action that it does, were all stages alike, when stage 0 starts the forward `prefetch`
    micro-batches before: a late stage is then as many micro-batches behind stage 0 as the pipeline is deep, and still
    sends in time, and stage 0 gets no more ahead. What a rank waits for there, that earlier rows were taken, and what
    comes before are earlier on one clock for all ranks: so no order of waits goes round in a circle.

    Args:
        backbone: of compute, or lowered.
        prefetch: >= 1; with less, pipelines whose sends block could stand still.
    """
    timeline = simulate(backbone, _ALIKE)
    starts = {
        span.action.microbatch: span.start
        for span in timeline
        if span.action.kind is Kind.FORWARD and span.action.stage == 0
    }
    order = sorted(starts)
    points: dict[int, dict[int, list[int]]] = {}
    for rank, spans in enumerate(timeline.spans):
        # Right after what it computes before that time, and so before the receives that come next.
        positions = [position for position, span in enumerate(spans) if span.action.kind in COMPUTE]
        ends, of_rank = [spans[position].end for position in positions], points.setdefault(rank, {})
        for place, microbatch in enumerate(order):
            earlier = bisect_right(ends, starts[order[max(place - prefetch, 0)]])
            of_rank.setdefault(positions[earlier - 1] + 1 if earlier else 0, []).append(microbatch)
    return points


def add_vision(
    backbone: Schedule,
    plan: EncodingPlan,
    deliveries: DeliveryPoints,
    *,
    ranks: Sequence[int],
    data_rank: int,
    collects: bool,
    computes_gradients: bool,
) -> Schedule:
    """One replica's schedule with its part of the encoder's work.

    VF of a rank's packs come first and VB last; D of a micro-batch where `deliveries` says; R right after a rank's last
    backward of it. Both ends of every message have the same order of them.

    Args:
        ranks: of the grid, by place in the pipeline.
        data_rank: of the replica; its packs are those whose order the schedule can state (`requires`).
        collects: whether gradients of rows return: R.
        computes_gradients: whether packs have a backward in the schedule: VB.
    """
    actions = {}
    for place, own in backbone.actions.items():
        packs = [pack.number for pack in plan.packs_of(ranks[place])]
        returns = _collection_points(own) if collects else {}
        middle: list[Action] = []
        for position, action in enumerate(own):
            middle += [Action(0, Kind.DELIVER, m) for m in deliveries[place].get(position, ())]
            middle.append(action)
            middle += [Action(0, Kind.RETURN, m) for m in returns.get(position, ())]
        backwards = [Action(0, Kind.VISION_BACKWARD, number) for number in packs] if computes_gradients else []
        actions[place] = (*(Action(0, Kind.VISION_FORWARD, number) for number in packs), *middle, *backwards)
    return Schedule(
        name=f"{backbone.name}+dep",
        num_microbatches=backbone.num_microbatches,
        rank_of_stage=backbone.rank_of_stage,
        actions=actions,
        requires=_requires(actions, plan, data_rank),
    )


def _requires(
    actions: Mapping[int, tuple[Action, ...]], plan: EncodingPlan, data_rank: int
) -> dict[Action, tuple[Action, ...]]:
    """What the order of one rank does not say: a forward of stage 0 waits for all who deliver, and the backward of a
    pack for that of its micro-batch."""
    present = {action for own in actions.values() for action in own}
    found: dict[Action, tuple[Action, ...]] = {}
    for pack in plan.packs:
        of_pack, microbatch = pack.clips[0].home
        if of_pack != data_rank:
            continue
        found[Action(0, Kind.FORWARD, microbatch)] = (Action(0, Kind.DELIVER, microbatch),)
        vision = Action(0, Kind.VISION_BACKWARD, pack.number)
        if vision in present:
            backwards = (Action(0, kind, microbatch) for kind in (Kind.BACKWARD_INPUT, Kind.BACKWARD))
            found[vision] = tuple(action for action in backwards if action in present)
    return found


def _collection_points(actions: Sequence[Action]) -> dict[int, list[int]]:
    """After which action each micro-batch's gradients are collected."""
    last = {
        action.microbatch: position
        for position, action in enumerate(actions)
        if action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT)
    }
    after: dict[int, list[int]] = {}
    latest = -1
    for microbatch in sorted(last):  # never before an earlier micro-batch's
        latest = max(latest, last[microbatch])
        after.setdefault(latest, []).append(microbatch)
    return after
