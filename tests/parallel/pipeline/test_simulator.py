"""Simulated timelines: closed forms of the bubbles, unequal costs, links, experts in lockstep, vision actions."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25sys.errors import ScheduleError
from k25sys.parallel.pipeline import Action, Kind, Schedule, Timeline, lower, make_schedule, simulate
from k25sys.parallel.pipeline.simulator import simulate_replicas
from k25sys.parallel.pipeline.timeline import Span
from k25sys.parallel.pipeline.validator import peak_in_flight
from tests.parallel.pipeline.sizes import COSTS, all_schedules


def _costs(forward: float, backward_input: float, backward_weight: float, chunks: int = 1) -> dict[Kind, float]:
    """Of a stage that is one of `chunks` of its rank."""
    backward = backward_input + backward_weight
    each = (forward, backward_input, backward_weight, backward)
    kinds = (Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT, Kind.BACKWARD)
    return {kind: seconds / chunks for kind, seconds in zip(kinds, each, strict=True)}


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 1, 0.5), (1, 2, 1), (2, 1, 1), (1, 1.5, 0.75)])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("times", [1, 3])
def test_bubbles_have_closed_forms(p: int, times: int, weights: tuple[float, float, float]) -> None:
    """Idle seconds of each rank, of F, I, W seconds an action (B = I + W), for m a multiple of p:
    GPipe and 1F1B (p - 1)(F + B), interleaved a v-th of it, ZB-H1 (p - 1)(F + B - 2W) where W <= I; (p - 1)(F + I) for
    those with split backwards. The bubble is their share of idle + work."""
    f, i, w = weights
    m = p * times
    forms: list[tuple[Schedule, float, int]] = []
    for extra in (0, 1):
        for v in (1, 2, 4):
            for split in (False, True):
                schedule = make_schedule(
                    "interleaved_1f1b",
                    num_ranks=p,
                    num_microbatches=m,
                    virtual_stages=v,
                    extra_warmup=extra,
                    split_backward=split,
                )
                forms.append((schedule, (p - 1) * (f + i + w * (not split)) / v, v))
        schedule = make_schedule("1f1b", num_ranks=p, num_microbatches=m, extra_warmup=extra)
        forms.append((schedule, (p - 1) * (f + i + w), 1))
    split_1f1b = make_schedule("1f1b", num_ranks=p, num_microbatches=m, split_backward=True)
    forms.append((split_1f1b, (p - 1) * (f + i), 1))
    forms.append((make_schedule("gpipe", num_ranks=p, num_microbatches=m), (p - 1) * (f + i + w), 1))
    forms.append((make_schedule("zb_h1", num_ranks=p, num_microbatches=m), (p - 1) * (f + i - w), 1))
    for schedule, idle, v in forms:
        timeline = simulate(schedule, _costs(f, i, w, v))
        expected = idle / (idle + m * (f + i + w))
        assert timeline.bubbles == pytest.approx([expected] * p, abs=1e-9), schedule.name
        assert timeline.bubble == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 7])
def test_fewer_microbatches_than_ranks(m: int) -> None:
    """The forms of GPipe and 1F1B hold for any number."""
    for name in ("gpipe", "1f1b"):
        timeline = simulate(make_schedule(name, num_ranks=5, num_microbatches=m), COSTS)
        assert timeline.bubble == pytest.approx(4 / (m + 4), abs=1e-12)


@pytest.mark.parametrize(
    ("name", "v", "bubble"),
    [
        ("1f1b", 1, 0.1049),
        ("interleaved_1f1b", 1, 0.1049),
        ("interleaved_1f1b", 2, 0.0554),
        ("interleaved_1f1b", 4, 0.0285),
        ("zb_h1", 1, 0.0376),
    ],
)
def test_published_figures_of_16_ranks_and_128_microbatches(name: str, v: int, bubble: float) -> None:
    schedule = make_schedule(name, num_ranks=16, num_microbatches=128, virtual_stages=v)
    assert round(simulate(schedule, COSTS).bubble, 4) == bubble


def _longest_path(schedule: Schedule, costs: Callable[[Action], float], link: float) -> float:
    """The end of the last action, by recursion over what each waits for."""
    place = {action: (rank, i) for rank, actions in schedule.actions.items() for i, action in enumerate(actions)}

    @cache
    def sent(producer: Action) -> float:
        """When the message of `producer` has arrived: behind those that its rank sent to the same one before."""
        rank, i = place[producer]
        target = schedule.rank_of_stage[((send := schedule.send_of(producer)) and send.partner.stage) or 0]
        before = [
            action
            for action in schedule.actions[rank][:i]
            if (other := schedule.send_of(action)) and schedule.rank_of_stage[other.partner.stage] == target
        ]
        return max([end(producer), *(sent(action) for action in before[-1:])]) + link

    @cache
    def end(action: Action) -> float:
        rank, i = place[action]
        stage, kind, mb = action.stage, action.kind, action.microbatch
        starts = [0.0] + ([end(schedule.actions[rank][i - 1])] if i else [])
        sources = [Action(stage - 1, Kind.FORWARD, mb)] if kind is Kind.FORWARD else []
        if kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
            sources = [Action(stage + 1, kind, mb)]
        for source in sources:
            if source in place:
                starts.append(end(source) if place[source][0] == rank else sent(source))
        return max(starts) + costs(action)

    return max(end(actions[-1]) for actions in schedule.actions.values())


@settings(max_examples=60)
@given(st.data())
def test_unequal_costs_and_links_against_the_longest_path(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["1f1b", "zb_h1", "gpipe", "interleaved_1f1b"]))
    schedule = make_schedule(
        name,
        num_ranks=data.draw(st.integers(1, 4)),
        num_microbatches=data.draw(st.integers(1, 6)),
        virtual_stages=data.draw(st.integers(1, 3)) if name.startswith("inter") else 1,
    )
    costs = {action: data.draw(st.floats(0.0, 4.0)) for actions in schedule.actions.values() for action in actions}
    link = data.draw(st.sampled_from([0.0, 0.3, 2.0]))
    timeline = simulate(schedule, costs, link_seconds=link)
    assert timeline.end == pytest.approx(_longest_path(schedule, costs.__getitem__, link), rel=1e-12)
    assert simulate(schedule, costs.__getitem__, link_seconds=link) == timeline
    assert sum(span.busy for span in timeline) == pytest.approx(sum(costs.values()))


def test_peaks_in_flight_are_those_of_the_order() -> None:
    for schedule in all_schedules(ranks=(3,), microbatches=(1, 5)):
        assert simulate(schedule, COSTS).peak_in_flight == peak_in_flight(schedule)
        assert simulate(lower(schedule), COSTS).peak_in_flight == peak_in_flight(schedule)


def test_memory_is_held_from_the_start_of_what_allocates_to_the_end_of_what_frees() -> None:
    timeline = simulate(make_schedule("zb_h1", num_ranks=1, num_microbatches=2), COSTS)
    assert timeline.memory(0) == [(0.0, 1.0), (3.0, 0.0), (3.0, 1.0), (6.0, 0.0)]
    sizes = {Kind.FORWARD: 8.0, Kind.BACKWARD_INPUT: -5.0, Kind.BACKWARD_WEIGHT: -3.0}
    amounts = timeline.memory(0, lambda action: sizes[action.kind])
    assert amounts == [(0.0, 8.0), (2.0, 3.0), (3.0, 0.0), (3.0, 8.0), (5.0, 3.0), (6.0, 0.0)]


def test_messages_differ_and_overlap_compute() -> None:
    """Rank 0 sends two micro-batches, of 0.75 s and of 2.25 s, while it goes on computing."""
    schedule = make_schedule("gpipe", num_ranks=2, num_microbatches=2)
    asked: list[tuple[str, int, int]] = []

    def link(send: Action, source: int, target: int) -> float:
        asked.append((str(send), source, target))
        return 0.75 if send.microbatch == 0 else 2.25

    timeline = simulate(schedule, {Kind.FORWARD: 1.0, Kind.BACKWARD: 1.0}, link_seconds=link)
    there = [(t.start, t.end) for t in timeline.transfers if t.send.kind is Kind.SEND_FORWARD]
    assert there == [(1.0, 1.75), (2.0, 4.25)]
    assert [(span.start, span.end) for span in timeline.spans[0][:2]] == [(0.0, 1.0), (1.0, 2.0)]
    assert [(span.start, span.end) for span in timeline.spans[1][:2]] == [(1.75, 2.75), (4.25, 5.25)]
    assert sorted(asked) == [("0SF0", 0, 1), ("0SF1", 0, 1), ("1SB0", 1, 0), ("1SB1", 1, 0)]


def test_messages_of_one_link_follow_each_other() -> None:
    """Three messages that are made faster than they travel arrive one travelling time apart."""
    schedule = make_schedule("gpipe", num_ranks=2, num_microbatches=3)
    timeline = simulate(schedule, {Kind.FORWARD: 1.0, Kind.BACKWARD: 1.0}, link_seconds=5.0)
    assert [t.end for t in timeline.transfers if t.source == 0] == [6.0, 11.0, 16.0]


def test_a_message_waits_for_its_receive() -> None:
    """Rank 1 posts the receive only after it has done something long."""
    rows = "0F0 0SF0 0RB0 0B0\n1RF0 1F0 1B0 1SB0"
    schedule = Schedule.from_csv(rows.replace(" ", ","), name="two")
    actions = {0: schedule.actions[0], 1: (Action.parse("0VF0"), *schedule.actions[1])}
    schedule = replace(schedule, actions=actions)
    timeline = simulate(schedule, COSTS | {Kind.VISION_FORWARD: 10.0}, link_seconds=0.5)
    assert (timeline.transfers[0].start, timeline.transfers[0].end) == (10.0, 10.5)


def test_costs_of_sends_keep_the_rank_busy_but_are_no_work() -> None:
    lowered = lower(make_schedule("1f1b", num_ranks=2, num_microbatches=4))
    free = simulate(lowered, COSTS)
    paid = simulate(lowered, COSTS | {Kind.SEND_FORWARD: 0.5, Kind.SEND_BACKWARD: 0.5})
    assert paid.makespan > free.makespan
    assert paid.busy(0) == free.busy(0)
    assert simulate(lowered, lambda action: COSTS[action.kind]) == free  # is not asked for sends


def _alone(rows: str, **costs: float) -> tuple[Schedule, dict[Action, float]]:
    schedule = Schedule.from_csv(rows, name="replica")
    actions = [action for row in schedule.actions.values() for action in row]
    return schedule, {action: costs.get(f"_{action}", 1.0) for action in actions}


def test_replicas_in_lockstep_wait_for_the_slowest() -> None:
    """F0 takes 3 s in one replica, F1 takes 4 s in the other: both take 3 + 4 + 1 + 1 s, and work less."""
    rows = "0F0,0F1,0B0,0B1"
    schedule, slow_first = _alone(rows, _0F0=3.0)
    _, slow_second = _alone(rows, _0F1=4.0)
    alone = simulate_replicas([schedule] * 2, [slow_first, slow_second])
    assert [timeline.makespan for timeline in alone] == [6.0, 7.0]
    first, second = simulate_replicas([schedule] * 2, [slow_first, slow_second], lockstep=[0])
    assert first.makespan == second.makespan == 9.0
    assert [(span.end, span.busy) for span in first.spans[0]] == [(3.0, 3.0), (7.0, 1.0), (8.0, 1.0), (9.0, 1.0)]
    assert [(span.end, span.busy) for span in second.spans[0]] == [(3.0, 1.0), (7.0, 4.0), (8.0, 1.0), (9.0, 1.0)]
    assert first.bubble == pytest.approx(1 - 6 / 9)


def test_replicas_start_as_early_as_they_can_and_end_together() -> None:
    """Stage 0 has no experts: a replica that is late there starts late in stage 1, whose peers begin without it."""
    schedule = make_schedule("gpipe", num_ranks=2, num_microbatches=1)
    costs = {action: 1.0 for actions in schedule.actions.values() for action in actions}
    late = costs | {Action.parse("0F0"): 5.0}
    first, second = simulate_replicas([schedule] * 2, [costs, late], lockstep=[1])
    assert first.spans[0][0] == Span(0, Action.parse("0F0"), 0.0, 1.0, 1.0)
    assert first.spans[1][0] == Span(1, Action.parse("1F0"), 1.0, 6.0, 1.0)
    assert second.spans[1][0] == Span(1, Action.parse("1F0"), 5.0, 6.0, 1.0)


def test_equal_replicas_in_lockstep_are_each_as_alone() -> None:
    for schedule in all_schedules(ranks=(3,), microbatches=(5,)):
        every = range(schedule.num_stages)
        alone = simulate(schedule, COSTS, link_seconds=0.25)
        assert simulate_replicas([schedule] * 3, [COSTS] * 3, link_seconds=0.25, lockstep=every) == (alone,) * 3


def test_weight_gradients_are_not_in_lockstep() -> None:
    rows = "0F0,0I0,0W0"
    schedule, costs = _alone(rows)
    _, slow = _alone(rows, _0W0=9.0)
    first, second = simulate_replicas([schedule] * 2, [costs, slow], lockstep=[0])
    assert (first.makespan, second.makespan) == (3.0, 11.0)


def _vision(requires: bool) -> Timeline:
    base = make_schedule("1f1b", num_ranks=2, num_microbatches=1)
    actions = {
        0: tuple(map(Action.parse, ["0VF0", "0D0", "0F0", "0B0", "0R0", "0VB0"])),
        1: tuple(map(Action.parse, ["0VF1", "0VF2", "0D0", "1F0", "1B0", "0R0", "0VB1", "0VB2"])),
    }
    needs = {Action.parse("0F0"): (Action.parse("0D0"),)} if requires else {}
    costs = {Kind.VISION_FORWARD: 2.0, Kind.VISION_BACKWARD: 6.0, Kind.DELIVER: 0.5, Kind.RETURN: 0.25} | COSTS
    return simulate(replace(base, actions=actions, requires=needs), {**costs, Action.parse("0VF1"): 3.0})


def test_vision_actions_and_exchanges() -> None:
    """A D waits for no other rank, what requires it for all that have it; it is no work, vision is."""
    free, bound = _vision(requires=False), _vision(requires=True)
    assert [(span.start, span.end) for span in free.spans[0]][:3] == [(0.0, 2.0), (2.0, 2.5), (2.5, 3.5)]
    assert [(span.start, span.end) for span in free.spans[1]][1:4] == [(3.0, 5.0), (5.0, 5.5), (5.5, 6.5)]
    assert free.busy(0) == 2 + 1 + 2 + 6
    assert [(span.start, span.end) for span in free.spans[1]][4:6] == [(6.5, 8.5), (8.5, 8.75)]
    assert bound.spans[0][1] == free.spans[0][1]
    assert (bound.spans[0][2].start, bound.spans[1][3].start) == (5.5, 6.5)


@pytest.mark.parametrize("ranks", [(0, 1, 2), (2, 1, 0)])
@pytest.mark.parametrize("slowest", [0, 1, 2])
def test_a_forward_of_stage_0_starts_when_all_ranks_have_delivered(slowest: int, ranks: tuple[int, ...]) -> None:
    """Whichever rank is the last, and has stage 0; D itself takes no time unless `costs` names it."""
    base = make_schedule("1f1b", num_ranks=3, num_microbatches=2)
    actions = {
        rank: (*map(Action.parse, (f"0VF{rank}", "0D0", "0D1")), *base.actions[stage])
        for stage, rank in enumerate(ranks)
    }
    needs = {Action.parse(f"0F{i}"): (Action.parse(f"0D{i}"),) for i in range(2)}
    seconds = {Action.parse(f"0VF{rank}"): 9.0 if rank == slowest else 1.0 + rank for rank in range(3)}
    schedule = replace(base, rank_of_stage=ranks, actions=actions, requires=needs)
    for each in (schedule, lower(schedule)):
        timeline = simulate(each, {**COSTS, **seconds})
        starts = {(span.rank, str(span.action)): span.start for span in timeline}
        assert [starts[rank, "0D1"] for rank in range(3)] == [seconds[Action.parse(f"0VF{rank}")] for rank in range(3)]
        assert (starts[ranks[0], "0F0"], starts[ranks[1], "1F0"]) == (9.0, 10.0)
        later = simulate(each, {**COSTS, **seconds, Action.parse("0D1"): 4.0})
        starts = {str(span.action): span.start for span in later if span.action.kind is Kind.FORWARD}
        assert (starts["0F0"], starts["0F1"]) == ((13.0, 14.0) if slowest == ranks[0] else (9.0, 13.0))


@pytest.mark.parametrize(
    ("costs", "link", "text"),
    [
        ({Kind.FORWARD: 1.0}, 0.0, "simulate: cost of 1B0: got None, accepted seconds >= 0"),
        ({Kind.FORWARD: float("nan"), Kind.BACKWARD: 1.0}, 0.0, "cost of 0F0: got nan"),
        (lambda action: -1.0, 0.0, "cost of 0F0: got -1.0"),
        (COSTS, -1.0, "link_seconds of 0SF0: got -1.0, accepted seconds >= 0"),
        (COSTS, lambda *_: float("inf"), "link_seconds of 0SF0: got inf"),
    ],
)
def test_costs_that_are_none_are_refused(costs: object, link: object, text: str) -> None:
    schedule = make_schedule("gpipe", num_ranks=2, num_microbatches=1)
    with pytest.raises(ScheduleError, match=text):
        simulate(schedule, costs, link_seconds=link)  # pyright: ignore[reportArgumentType]


def test_deadlocks_are_told() -> None:
    deadlocked = Schedule.from_csv("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1", name="wrong")
    with pytest.raises(ScheduleError, match="wrong: got a deadlock: rank 0 before 0B0, rank 1 before 1F1"):
        simulate(deadlocked, COSTS)
    forth, back = (Schedule.from_csv(rows, name="r") for rows in ("0F0,0F1,0B0,0B1", "0F1,0F0,0B0,0B1"))
    with pytest.raises(ScheduleError, match="replicas wait for each other in different orders"):
        simulate_replicas([forth, back], [COSTS] * 2, lockstep=[0])
    with pytest.raises(ScheduleError, match="got 2 schedules, 1 costs, accepted one of each a replica"):
        simulate_replicas([forth, back], [COSTS])
