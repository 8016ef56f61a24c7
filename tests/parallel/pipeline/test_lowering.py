"""Sends and receives: where they stand, and that messages travel while ranks compute."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25sys.errors import ScheduleError
from k25sys.parallel.pipeline import Kind, lower, make_schedule, simulate, validate
from k25sys.parallel.pipeline.ir import COMMUNICATION, RECEIVES, SENDS
from tests.parallel.pipeline.sizes import COSTS, all_schedules


def test_sends_follow_what_they_send_and_nothing_else_changes() -> None:
    for schedule in all_schedules(ranks=(2, 3), microbatches=(3, 5)):
        lowered = lower(schedule)
        assert lowered.is_lowered
        assert not schedule.is_lowered
        for rank, actions in lowered.actions.items():
            assert tuple(a for a in actions if a.kind not in COMMUNICATION) == schedule.actions[rank]
            posted = [a for a in actions if a.kind not in RECEIVES]
            sends = [(before, action) for before, action in pairwise(posted) if action.kind in SENDS]
            assert all(schedule.send_of(before) == action for before, action in sends)


def test_stages_of_one_rank_send_nothing() -> None:
    schedule = make_schedule("interleaved_1f1b", num_ranks=1, num_microbatches=4, virtual_stages=3)
    assert lower(schedule) == schedule


def test_receives_of_1f1b_are_posted_an_action_ahead_at_most() -> None:
    """The buffer of a message is held while the rank does one other thing, not longer."""
    consumers = {Kind.RECV_FORWARD: Kind.FORWARD, Kind.RECV_BACKWARD: Kind.BACKWARD}
    for actions in lower(make_schedule("1f1b", num_ranks=4, num_microbatches=12)).actions.values():
        computed = [action for action in actions if action.kind not in COMMUNICATION]
        for i, action in enumerate(actions):
            if action.kind in RECEIVES:
                before = sum(other.kind not in COMMUNICATION for other in actions[:i])
                assert computed.index(replace(action, kind=consumers[action.kind])) - before <= 1


@pytest.mark.parametrize("link", [0.0, 0.25, 0.5])
def test_messages_of_half_a_forward_cost_no_more_than_without_receives(link: float) -> None:
    """Where nobody posts anything a message starts when it is made: no receive is posted later than that helps."""
    for schedule in all_schedules(microbatches=(1, 2, 5)):
        free = simulate(schedule, COSTS, link_seconds=link)
        posted = simulate(lower(schedule), COSTS, link_seconds=link)
        assert posted.makespan == pytest.approx(free.makespan, rel=1e-12), (schedule.name, schedule.rank_of_stage)


def test_a_plan_with_the_links_of_the_run_helps_where_messages_are_long() -> None:
    """Messages of three forwards are posted so much ahead when the plan knows it."""
    schedule = make_schedule("interleaved_1f1b", num_ranks=4, num_microbatches=8, virtual_stages=2)
    free = simulate(schedule, COSTS, link_seconds=3.0).makespan
    planned = simulate(lower(schedule, COSTS, link_seconds=3.0), COSTS, link_seconds=3.0).makespan
    unplanned = simulate(lower(schedule), COSTS, link_seconds=3.0).makespan
    assert free == planned < unplanned


@given(st.data())
def test_whatever_the_plan_nothing_deadlocks(data: st.DataObject) -> None:
    """Costs from nothing to far apart, links too: blocking sends and receives end, and messages keep one order."""
    name = data.draw(st.sampled_from(["1f1b", "zb_h1", "gpipe", "interleaved_1f1b"]))
    schedule = make_schedule(
        name,
        num_ranks=data.draw(st.integers(1, 4)),
        num_microbatches=data.draw(st.integers(1, 7)),
        virtual_stages=data.draw(st.integers(1, 3)) if name.startswith("inter") else 1,
    )
    seconds = st.sampled_from([0.0, 0.1, 1.0, 5.0])
    costs = {action: data.draw(seconds) for actions in schedule.actions.values() for action in actions}
    lowered = lower(schedule, costs, link_seconds=data.draw(seconds))
    validate(lowered)
    messages: dict[tuple[int, int], list[str]] = {}
    for rank, actions in lowered.actions.items():
        for action in actions:
            if action.kind in COMMUNICATION:
                send = action if action.kind in SENDS else action.partner
                messages.setdefault((rank, lowered.rank_of_stage[action.partner.stage]), []).append(str(send))
    for (rank, other), order in messages.items():
        assert order == messages[other, rank]


def test_what_is_lowered_already_is_refused() -> None:
    lowered = lower(make_schedule("1f1b", num_ranks=2, num_microbatches=2))
    with pytest.raises(ScheduleError, match="lower: schedule: got 1f1b with sends and receives, accepted one without"):
        lower(lowered)
