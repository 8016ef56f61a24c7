"""Sends and receives of a schedule: where each rank posts them."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace

from k25sys.errors import ScheduleError, message
from k25sys.parallel.pipeline.execution import Execution
from k25sys.parallel.pipeline.ir import SENDS, Action, Kind, Schedule
from k25sys.parallel.pipeline.simulator import Costs, LinkSeconds, simulate

_RELATIVE_COSTS = {
    Kind.FORWARD: 1.0,
    Kind.BACKWARD: 2.0,
    Kind.BACKWARD_INPUT: 1.0,
    Kind.BACKWARD_WEIGHT: 1.0,
    Kind.VISION_FORWARD: 1.0,
    Kind.VISION_BACKWARD: 3.0,
}


def lower(schedule: Schedule, costs: Costs | None = None, *, link_seconds: LinkSeconds | None = None) -> Schedule:
    """`schedule` with its sends and receives; stages of one rank that follow each other need none.

    A send follows what it sends, with nothing but receives between them. A receive is posted as late as the plan lets
    it without delaying its message: so many actions before its consumer that the message travels during them, but not
    before the action during which the message is made. It is posted earlier where a sender that blocks would otherwise
    be stuck: what comes out ends with sends and receives that block until both are reached (validator.validate), and
    the messages of two ranks are in the same order on both.

    Args:
        costs: Of the actions, in the plan; by default a backward takes twice a forward, each of its halves a forward.
        link_seconds: Of a message, in the plan; by default anything up to the cheapest action.

    Raises:
        ScheduleError: `schedule` has sends or receives already, or deadlocks.
    """
    if schedule.is_lowered:
        raise ScheduleError(message("lower", "schedule", f"{schedule.name} with sends and receives", "one without"))
    costs = costs or _RELATIVE_COSTS
    cheapest = min((span.busy for span in simulate(schedule, costs) if span.busy), default=0.0)
    plan = simulate(schedule, costs, link_seconds=cheapest / 4 if link_seconds is None else link_seconds)
    ahead = {
        transfer.send.partner: cheapest if link_seconds is None else transfer.end - transfer.start
        for transfer in plan.transfers
    }
    made = {send.partner: span.end for span in plan if (send := schedule.send_of(span.action)) is not None}
    orders = {}
    for rank, spans in enumerate(plan.spans):
        posted: list[list[Action]] = [[] for _ in spans]
        starts = [span.start for span in spans]
        for i, span in enumerate(spans):
            receive = _receive_of(span.action)
            if receive in made:
                latest = max(made[receive], span.start - ahead[receive])
                at = bisect_right(starts, latest, hi=i + 1) - 1
                posted[at if at >= 0 and spans[at].end > made[receive] else min(at + 1, i)].append(receive)
        order: list[Action] = []
        for receives, span in zip(posted, spans, strict=True):
            send = schedule.send_of(span.action)
            order += receives
            order += [span.action] if send is None else [span.action, send]
        orders[rank] = tuple(order)
    return _post_for_blocked_senders(replace(schedule, actions=orders), made)


def _receive_of(action: Action) -> Action | None:
    """What `action` uses of another stage."""
    if action.kind is Kind.FORWARD:
        return Action(action.stage, Kind.RECV_FORWARD, action.microbatch)
    if action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
        return Action(action.stage, Kind.RECV_BACKWARD, action.microbatch)
    return None


def _post_for_blocked_senders(schedule: Schedule, made: Mapping[Action, float]) -> Schedule:
    """Executes `schedule` with sends that block; whenever no rank can go on, posts there and then what the earliest of
    the blocked sends waits for.

    That always helps. In the order of the ends in the plan, every cause precedes its effect, sends follow what they
    send, and no receive precedes the making of its message. So of all that is left, the earliest in that order can go
    on, or it is a send.
    """
    execution = Execution(schedule, "rendezvous")
    while not execution.run():
        heads = execution.heads().values()
        receive = min((head.partner for head in heads if head.kind in SENDS), key=lambda receive: made[receive])
        execution.move_to_head(schedule.rank_of_stage[receive.stage], receive)
    return replace(schedule, actions=execution.actions)
