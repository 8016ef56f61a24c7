"""Event simulation of schedules: unequal costs, links, expert-parallel peers that wait for each other.

What it gives is calculated from the costs that it is given: label it so.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from math import isfinite
from typing import cast

from k25sys.errors import ScheduleError, listing, message
from k25sys.parallel.pipeline.ir import COMMUNICATION, EXCHANGES, RECEIVES, SENDS, Action, Kind, Schedule, dependencies
from k25sys.parallel.pipeline.timeline import Span, Timeline, Transfer

Costs = Callable[[Action], float] | Mapping[Action, float] | Mapping[Kind, float] | Mapping[Action | Kind, float]
"""Seconds of an action, in a mapping by action or else by kind. A mapping may name sends, receives, D and R, which then
keep their rank busy so long; otherwise they take none of its time. A callable is not asked for them."""
LinkSeconds = float | Callable[[Action, int, int], float]
"""Seconds of a message: the same for all, or of (send action, source rank, target rank)."""

_NO_COMPUTE = COMMUNICATION | EXCHANGES
_LOCKSTEP_KINDS = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT)


def simulate(schedule: Schedule, costs: Costs, *, link_seconds: LinkSeconds = 0.0) -> Timeline:
    """The timeline of `schedule` when every rank goes on as early as its order and the others let it.

    A message travels while its ranks compute; the messages of one directed pair of ranks follow each other. With sends
    and receives in the schedule it starts when both are reached, else when what it carries has been computed. D and
    R wait for nobody; what requires one waits until all ranks that have it have done it.

    Raises:
        ScheduleError: a cost is missing, negative or not finite; a deadlock.
    """
    return simulate_replicas([schedule], [costs], link_seconds=link_seconds)[0]


def simulate_replicas(
    schedules: Sequence[Schedule],
    costs: Sequence[Costs],
    *,
    link_seconds: LinkSeconds = 0.0,
    lockstep: Collection[int] = (),
) -> tuple[Timeline, ...]:
    """The timelines of data-parallel replicas whose experts are spread over all of them.

    Args:
        lockstep: The stages with routed experts: F, B and I through them exchange tokens among the replicas. Each
            replica starts as early as it can, and all end when the slowest one, from its own start, is through: what is
            unequal in an action lies before its first all-to-all (vision in stage 0, a micro-batch that came late).

    Raises:
        ScheduleError: as `simulate`; the replicas' orders cannot be in step.
    """
    if len(schedules) != len(costs) or not schedules:
        got = f"{len(schedules)} schedules, {len(costs)} costs"
        raise ScheduleError(message("simulate_replicas", "costs", got, "one of each a replica, one or more"))
    replicas = [_Replica(schedule, each, link_seconds) for schedule, each in zip(schedules, costs, strict=True)]
    ready = dict.fromkeys((replica, rank) for replica in replicas for rank in schedules[0].actions)
    while ready:
        (replica, rank), _ = ready.popitem()
        action = replica.head(rank)
        if action is None:
            continue
        parties = replicas if action.stage in lockstep and action.kind in _LOCKSTEP_KINDS else [replica]
        if any(each.head(rank) != action for each in parties):
            continue  # whoever comes last goes on for all
        starts = [each.earliest(rank, action) for each in parties]
        ends = [start + each.cost(action) for each, start in zip(parties, starts, strict=True) if start is not None]
        if len(ends) == len(parties):
            for each, start in zip(parties, starts, strict=True):
                woken = each.finish(rank, action, start or 0.0, max(ends))
                ready.update(dict.fromkeys((each, other) for other in woken))
    waits = [f"rank {rank} before {action}" for replica in replicas for rank, action in replica.heads().items()]
    if waits:
        hint = "replicas wait for each other in different orders" if len(replicas) > 1 else "validate() tells more"
        got = f"a deadlock: {listing(waits)}"
        raise ScheduleError(message("simulate", schedules[0].name, got, "an order that ends", hint))
    return tuple(replica.timeline() for replica in replicas)


class _Replica:
    """One pipeline on its way."""

    def __init__(self, schedule: Schedule, costs: Costs, link_seconds: LinkSeconds) -> None:
        self.schedule = schedule
        self._left = Counter(action for actions in schedule.actions.values() for action in actions)
        """Ranks that have not ended the action."""
        self._costs, self._link_seconds = costs, link_seconds
        self._is_lowered = schedule.is_lowered
        self._needs = dependencies(schedule)
        self._position = dict.fromkeys(schedule.actions, 0)
        self._free = dict.fromkeys(schedule.actions, 0.0)
        self._ended: dict[Action, float] = {}
        """When the last rank that has the action ended it."""
        self._latest: defaultdict[Action, float] = defaultdict(float)
        """The latest end of the action so far."""
        self._arrived: dict[Action, float] = {}
        """By send, and by receive."""
        self._waiting: defaultdict[Action, list[int]] = defaultdict(list)
        """Ranks to try again, by what they wait for."""
        self._link_free: defaultdict[tuple[int, int], float] = defaultdict(float)
        self._spans: dict[int, list[Span]] = {rank: [] for rank in schedule.actions}
        self._transfers: list[Transfer] = []

    def head(self, rank: int) -> Action | None:
        """What `rank` does next; None at its end."""
        order, position = self.schedule.actions.get(rank, ()), self._position.get(rank, 0)
        return order[position] if position < len(order) else None

    def heads(self) -> dict[int, Action]:
        """By rank that has not reached its end, what it does next."""
        return {rank: action for rank in self._position if (action := self.head(rank)) is not None}

    def cost(self, action: Action) -> float:
        """Seconds of `action`."""
        costs = self._costs
        seconds: float | None
        if callable(costs):
            seconds = costs(action) if action.kind not in _NO_COMPUTE else 0.0
        else:
            table = cast(Mapping[Action | Kind, float], costs)
            seconds = table.get(action, table.get(action.kind, 0.0 if action.kind in _NO_COMPUTE else None))
        if seconds is None or not isfinite(seconds) or seconds < 0:
            raise ScheduleError(message("simulate", f"cost of {action}", seconds, "seconds >= 0"))
        return seconds

    def earliest(self, rank: int, action: Action) -> float | None:
        """When `rank` can start `action`; None while that is open, and `rank` is then woken when it may be known."""
        start = self._free[rank]
        for need in self._needs[action]:
            times, event = self._ended, need
            if action.kind in RECEIVES and need == action.partner:
                continue  # a receive is posted; who waits for the message is its consumer
            send = self.schedule.send_of(need)
            if need.kind in RECEIVES:
                times = self._arrived
            elif not self._is_lowered and send is not None and self.schedule.rank_of_stage[send.partner.stage] == rank:
                times, event = self._arrived, send
            if event not in times:
                self._waiting[event].append(rank)
                return None
            start = max(start, times[event])
        return start

    def finish(self, rank: int, action: Action, start: float, end: float) -> list[int]:
        """Writes down that `rank` did `action`, and sends what it made on its way; the ranks that may go on."""
        self._spans[rank].append(Span(rank, action, start, end, self.cost(action)))
        self._position[rank] += 1
        self._free[rank] = end
        self._left[action] -= 1
        self._latest[action] = max(end, self._latest[action])
        if not self._left[action]:
            self._ended[action] = self._latest[action]
        events = [action]
        if action.kind in COMMUNICATION:
            send = action if action.kind in SENDS else action.partner
            if send in self._ended and send.partner in self._ended:
                events += self._transfer(send, max(self._ended[send], self._ended[send.partner]))
        elif not self._is_lowered and (send := self.schedule.send_of(action)) is not None:
            events += self._transfer(send, end)
        return [rank, *(woken for event in events for woken in self._waiting.pop(event, ()))]

    def _transfer(self, send: Action, posted: float) -> tuple[Action, Action]:
        """The message of `send`, which both ends have posted; what its arrival is known by."""
        source, target = (self.schedule.rank_of_stage[action.stage] for action in (send, send.partner))
        seconds = self._link_seconds
        seconds = seconds(send, source, target) if callable(seconds) else seconds
        if not isfinite(seconds) or seconds < 0:
            raise ScheduleError(message("simulate", f"link_seconds of {send}", seconds, "seconds >= 0"))
        start = max(posted, self._link_free[source, target])
        self._link_free[source, target] = start + seconds
        self._arrived[send] = self._arrived[send.partner] = start + seconds
        self._transfers.append(Transfer(send, source, target, start, start + seconds))
        return send, send.partner

    def timeline(self) -> Timeline:
        """What has been written down."""
        spans = tuple(tuple(self._spans[rank]) for rank in range(self.schedule.num_ranks))
        transfers = tuple(sorted(self._transfers, key=lambda transfer: transfer.start))
        return Timeline(name=self.schedule.name, spans=spans, transfers=transfers)
