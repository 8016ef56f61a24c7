"""The proof of schedules: what is generated and lowered passes; what is broken is refused, and nothing else."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25sys.errors import ScheduleError
from k25sys.parallel.pipeline import Action, Kind, Schedule, lower, make_schedule, validate
from k25sys.parallel.pipeline.ir import COMMUNICATION
from tests.parallel.pipeline.sizes import all_schedules

SMALL = [each for schedule in all_schedules(ranks=(2, 3), microbatches=(2, 3)) for each in (schedule, lower(schedule))]


def test_all_schedules_are_valid_and_stay_so_when_lowered() -> None:
    for schedule in all_schedules():
        validate(schedule)
        validate(lower(schedule))


def _ends(schedule: Schedule) -> bool:
    """Executes blocking sends and receives with nothing but a set of what has ended."""
    orders = {rank: list(actions) for rank, actions in schedule.actions.items()}
    ended: set[str] = set()
    lowered = any(action.kind in COMMUNICATION for actions in orders.values() for action in actions)

    def has(stage: int, kinds: str, i: int) -> bool:
        return any(f"{stage}{kind}{i}" in ended for kind in kinds)

    def may_go(action: Action) -> bool:
        s, i, last = action.stage, action.microbatch, schedule.num_stages - 1
        if action.kind is Kind.FORWARD:
            arrives = lowered and s > 0 and schedule.rank_of_stage[s - 1] != schedule.rank_of_stage[s]
            return f"{s}RF{i}" in ended if arrives else s == 0 or has(s - 1, "F", i)
        if action.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
            arrives = lowered and s < last and schedule.rank_of_stage[s + 1] != schedule.rank_of_stage[s]
            above = f"{s}RB{i}" in ended if arrives else s == last or has(s + 1, "BI", i)
            return has(s, "F", i) and above
        if action.kind is Kind.BACKWARD_WEIGHT:
            return has(s, "I", i)
        return action.kind in COMMUNICATION and has(s, "F" if action.kind is Kind.SEND_FORWARD else "BI", i)

    while any(orders.values()):
        before = sum(map(len, orders.values()))
        for order in orders.values():
            if order and order[0].kind not in COMMUNICATION and may_go(order[0]):
                ended.add(str(order.pop(0)))
            elif order and order[0].kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD) and may_go(order[0]):
                there = next((o for o in orders.values() if o and o[0] == order[0].partner), None)
                if there is not None:
                    ended |= {str(order.pop(0)), str(there.pop(0))}
        if sum(map(len, orders.values())) == before:
            return False
    return True


def _accumulates_in_order(schedule: Schedule) -> bool:
    gradients = [
        [a.microbatch for a in actions if a.stage == stage and a.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT)]
        for stage in range(schedule.num_stages)
        for actions in schedule.actions.values()
    ]
    return all(each == sorted(each) for each in gradients)


def _mutate(data: st.DataObject, orders: dict[int, list[Action]]) -> None:
    """Breaks one thing, or several that may make up for each other."""
    rank = data.draw(st.sampled_from(sorted(orders)))
    order = orders[rank]
    at = data.draw(st.integers(0, len(order) - 1))
    change = data.draw(st.sampled_from(["swap", "move", "drop", "double", "other rank", "rename", "receive early"]))
    if change == "swap":
        other = data.draw(st.integers(0, len(order) - 1))
        order[at], order[other] = order[other], order[at]
    elif change == "move":
        order.insert(data.draw(st.integers(0, len(order) - 1)), order.pop(at))
    elif change == "drop":
        del order[at]
    elif change == "double":
        order.insert(data.draw(st.integers(0, len(order))), order[at])
    elif change == "other rank":
        orders[data.draw(st.sampled_from(sorted(orders)))].append(order.pop(at))
    elif change == "rename":
        kind, number = data.draw(st.sampled_from(Kind)), data.draw(st.integers(0, 3))
        order[at] = data.draw(st.sampled_from([replace(order[at], kind=kind), replace(order[at], microbatch=number)]))
    else:
        receives = [i for i, a in enumerate(order) if a.kind in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)]
        if receives:
            receive = data.draw(st.sampled_from(receives))
            order.insert(data.draw(st.integers(0, receive)), order.pop(receive))


@settings(max_examples=400)
@given(st.data())
def test_what_is_broken_is_refused_and_nothing_else(data: st.DataObject) -> None:
    schedule = data.draw(st.sampled_from(SMALL))
    orders = {rank: list(actions) for rank, actions in schedule.actions.items()}
    for _ in range(data.draw(st.integers(1, 2))):
        _mutate(data, orders)
    mutant = replace(schedule, actions={rank: tuple(order) for rank, order in orders.items()})
    complete = all(Counter(orders[rank]) == Counter(schedule.actions[rank]) for rank in orders)
    if complete and _accumulates_in_order(mutant) and _ends(mutant):
        validate(mutant)
    else:
        with pytest.raises(ScheduleError, match=f"^validate: {schedule.name}: got "):
            validate(mutant)


def _edited(schedule: Schedule, **rows: str) -> Schedule:
    actions = {int(rank[1:]): tuple(map(Action.parse, row.split())) for rank, row in rows.items()}
    return replace(schedule, actions={**schedule.actions, **actions})


TWO = make_schedule("1f1b", num_ranks=2, num_microbatches=2)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ({"r0": "0F0 0F1 0B0"}, "got 0B1 missing on rank 0, accepted every action once, on the rank of its stage"),
        ({"r0": "0F0 0F1 0B0 0B1 0B1"}, "0B1 2 times on rank 0"),
        ({"r0": "0F0 0F1 0B0 0B1 1F1"}, "1F1 out of place on rank 0"),
        ({"r0": "0F0 0F1 0I0 0B1"}, "0W0 missing on rank 0"),
        ({"r0": "0F0 0F1 0B0 0W0 0I0 0B1"}, "0B0 out of place on rank 0"),
        ({"r0": "0F0 0B0 0B1 0F1"}, "got 0B1 before 0F1 on rank 0, accepted 0F1 first: 0B1 needs it"),
        ({"r1": "1F0 1F1 1B1 1B0"}, "got 1B1 before 1B0 on rank 1, accepted weight gradients of a stage in the order"),
        (
            {"r0": "0F0 0B0 0F1 0B1", "r1": "1F0 1F1 1B0 1B1"},
            "a deadlock: rank 0 in 0B0 waits for 1B0 of rank 1; rank ",
        ),
        ({"r0": "0F0 0F1 0B0 0B1 0VB0"}, "0VB0 without 0VF0"),
        ({"r0": "0VB0 0VF0 0F0 0F1 0B0 0B1"}, "got 0VB0 before 0VF0 on rank 0, accepted 0VF0 first: 0VB0 needs it"),
        ({"r0": "0VF0 0F0 0F1 0B0 0B1", "r1": "0VF0 1F0 1B0 1F1 1B1"}, "0VF0 on 2 ranks"),
        ({"r0": "1VF0 0F0 0F1 0B0 0B1"}, "1VF0 of a stage other than 0"),
        ({"r0": "0F0 0F1 1D0 0B0 0B1"}, "1D0 of a stage other than 0"),
        ({"r1": "1F0 1B0 1R0 1F1 1B1"}, "1R0 of a stage other than 0"),
        ({"r0": "0D0 0F0 0D0 0F1 0B0 0B1", "r1": "0D0 1F0 1B0 1F1 1B1"}, "0D0 2 times on rank 0"),
        ({"r1": "1F0 1B0 0R0 1F1 0R0 1B1"}, "0R0 2 times on rank 1"),
        ({"r2": ""}, "got stages on ranks (0, 1), accepted one stage or more on each of ranks 0 to 2"),
    ],
)
def test_the_error_names_the_actions(rows: dict[str, str], text: str) -> None:
    with pytest.raises(ScheduleError) as error:
        validate(_edited(TWO, **rows))
    assert text in str(error.value)


def test_sizes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(
        ScheduleError, match=r"Schedule: 1f1b: got actions of ranks \[1, 2\], accepted those of ranks 0"
    ):
        replace(TWO, actions={rank + 1: actions for rank, actions in TWO.actions.items()})
    with pytest.raises(ScheduleError, match="got 0 micro-batches, accepted 1 or more"):
        replace(TWO, num_microbatches=0)
    with pytest.raises(ScheduleError, match=r"stages on ranks \(0, 2\), accepted one stage or more, on ranks 0 to 1"):
        replace(TWO, rank_of_stage=(0, 2))
    with pytest.raises(ScheduleError, match=r"got actions of stages \[0, 1, 2\], accepted stages 0 to 1"):
        _edited(TWO, r0="2F0 0F0")
    with pytest.raises(ScheduleError, match="0F2 missing on rank 0"):
        validate(replace(TWO, num_microbatches=3))
    with pytest.raises(ScheduleError, match="sends: got 'eager', accepted rendezvous, buffered"):
        validate(TWO, sends="eager")  # pyright: ignore[reportArgumentType]


def test_sends_that_block_deadlock_where_buffered_ones_do_not() -> None:
    """Each rank sends before it receives what the other one sends: the classic."""
    schedule = _edited(TWO, r0="0F0 0SF0 0F1 0SF1 0RB0 0B0 0RB1 0B1", r1="1RF0 1F0 1B0 1SB0 1RF1 1F1 1B1 1SB1")
    validate(schedule, sends="buffered")
    with pytest.raises(ScheduleError) as error:
        validate(schedule)
    waits = "rank 0 in 0SF1 waits for rank 1 to reach 1RF1; rank 1 in 1SB0 waits for rank 0 to reach 0RB0"
    assert f"a deadlock: {waits}" in str(error.value)
    validate(_edited(schedule, r1="1RF0 1F0 1B0 1RF1 1SB0 1F1 1B1 1SB1"))


def test_memory_bound() -> None:
    schedule = make_schedule("1f1b", num_ranks=4, num_microbatches=8)
    validate(schedule, max_in_flight=4)
    validate(schedule, max_in_flight=(4, 3, 2, 1))
    with pytest.raises(ScheduleError, match=r"got 4 micro-batches in flight on rank 0, accepted 3"):
        validate(schedule, max_in_flight=3)
    with pytest.raises(ScheduleError, match="got 2 micro-batches in flight on rank 2, accepted 1"):
        validate(schedule, max_in_flight=(4, 3, 1, 1))
    with pytest.raises(ScheduleError, match="max_in_flight: got 2 numbers, accepted one, or one for each of 4 ranks"):
        validate(schedule, max_in_flight=(4, 3))


VISION = replace(
    _edited(
        TWO,
        r0="0VF0 0D0 0D1 0F0 0F1 0B0 0R0 0B1 0R1 0VB0",
        r1="0VF1 0VF2 0D0 1F0 0D1 1B0 0R0 1F1 1B1 0R1 0VB2 0VB1",
    ),
    requires={
        Action.parse("0F0"): (Action.parse("0D0"),),
        Action.parse("0F1"): (Action.parse("0D1"),),
        Action.parse("0VB2"): (Action.parse("0B1"),),
    },
)


def test_vision_actions_are_ordinary_ones() -> None:
    validate(VISION)
    validate(lower(VISION))
    late = _edited(replace(VISION, requires={}), r0="0VF0 0D0 0F0 0F1 0D1 0B0 0R0 0B1 0R1 0VB0")
    validate(late)
    with pytest.raises(ScheduleError, match="got 0F1 before 0D1 on rank 0, accepted 0D1 first: 0F1 needs it"):
        validate(replace(late, requires=VISION.requires))
    stuck = _edited(VISION, r1="0VF1 0VF2 0D0 1F0 1B0 0R0 1F1 0D1 1B1 0R1 0VB2 0VB1")
    validate(replace(stuck, requires={}))
    waits = "rank 0 in 0F1 waits for 0D1 of rank 0, 1; rank 1 in 1F1 waits for 0F1 of rank 0"
    with pytest.raises(ScheduleError, match=f"deadlock: {waits}"):
        validate(stuck)
    early = _edited(VISION, r1="0VF1 0VF2 0D0 0D1 1F0 0VB2 1B0 0R0 1F1 1B1 0R1 0VB1")
    with pytest.raises(
        ScheduleError, match="deadlock: rank 0 in 0B0 waits for 1B0 of rank 1; rank 1 in 0VB2 waits for 0B1"
    ):
        validate(early)
    with pytest.raises(ScheduleError, match="0VF9 missing, which is required"):
        validate(replace(VISION, requires={Action.parse("0F0"): (Action.parse("0VF9"),)}))
    with pytest.raises(ScheduleError, match="0D1 missing, which is required"):
        validate(_edited(VISION, r0="0D0 0F0 0F1 0B0 0B1", r1="0VF2 0D0 1F0 1B0 1F1 1B1 0VB2"))


def test_deliveries_and_returns_wait_for_no_other_rank() -> None:
    """In any order on each rank, and so late that a collective would stand still."""
    rows = {"r0": "0D0 0D1 0F0 0F1 0B0 0R1 0R0 0B1", "r1": "1F0 1B0 0D1 0R0 1F1 0D0 1B1 0R1"}
    validate(_edited(TWO, **rows))
    validate(lower(_edited(TWO, **rows)))
