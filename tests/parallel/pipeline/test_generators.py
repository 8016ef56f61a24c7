"""Generated schedules: torch.distributed.pipelining's where it has them, their memory, and what is refused."""

import csv
import io
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import _schedule_visualizer, schedules

from k25sys.errors import ScheduleError
from k25sys.parallel.pipeline import Action, Kind, Schedule, lower, make_schedule, validate
from k25sys.parallel.pipeline.validator import peak_in_flight
from tests.parallel.pipeline.sizes import all_schedules

Ops = list[list[schedules._Action | None]]


def _torch_csv(torch_ops: Ops) -> str:
    """As torch's _dump_csv writes it."""
    text = io.StringIO()
    csv.writer(text).writerows(torch_ops)
    return text.getvalue()


def _torch_stage(num_ranks: int) -> mock.Mock:
    stage = mock.MagicMock()
    stage.group_rank, stage.group_size, stage.num_stages, stage.submod = 0, num_ranks, num_ranks, None
    return stage


def _torch_zb_h1(num_ranks: int, num_microbatches: int) -> Ops:
    """Its interleaved zero bubble with one stage a rank."""
    order = schedules.ScheduleInterleavedZeroBubble([_torch_stage(num_ranks)], num_microbatches).pipeline_order
    return [order[rank] for rank in range(num_ranks)]


def _torch_executed(cls: type[schedules.PipelineScheduleSingle], num_ranks: int, num_microbatches: int) -> Ops:
    """What torch's runtime does with its stages (its list of 1F1B, for drawings, numbers the last rank's from 1)."""
    order: Ops = []
    for rank in range(num_ranks):
        stage = _torch_stage(num_ranks)
        stage.stage_index, stage.device, stage.is_last, stage.has_backward = rank, "cpu", False, True
        for name in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
            getattr(stage, name).return_value = []
        done: list[schedules._Action | None] = []
        stage.forward_one_chunk.side_effect = lambda i, *_, rank=rank, done=done, **__: done.append(
            schedules._Action(rank, schedules.FORWARD, i)
        )
        stage.backward_one_chunk.side_effect = lambda i, rank=rank, done=done, **_: done.append(
            schedules._Action(rank, schedules.FULL_BACKWARD, i)
        )
        cls(stage, num_microbatches)._step_microbatches([()] * num_microbatches, [{}] * num_microbatches)
        order.append(done)
    return order


@pytest.mark.parametrize("p", [1, 2, 4, 5])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 6, 8, 10, 11, 16])
def test_actions_are_those_of_torch(p: int, m: int) -> None:
    ours = {name: make_schedule(name, num_ranks=p, num_microbatches=m) for name in ("gpipe", "1f1b", "zb_h1")}
    theirs = {"gpipe": _torch_executed(schedules.ScheduleGPipe, p, m)}
    if m >= p:  # fewer torch refuses
        theirs["1f1b"] = _torch_executed(schedules.Schedule1F1B, p, m)
    if m % max(1, m // p) == 0:  # others torch refuses
        theirs["zb_h1"] = _torch_zb_h1(p, m)
        for v in (2, 3):
            name = f"interleaved {v}"
            theirs[name] = _schedule_visualizer.get_schedule_ops("Interleaved1F1B", p, m, v)
            ours[name] = make_schedule("interleaved_1f1b", num_ranks=p, num_microbatches=m, virtual_stages=v)
    for name, torch_ops in theirs.items():
        schedule = Schedule.from_csv(_torch_csv(torch_ops), name=name)
        assert schedule.actions == ours[name].actions, name
        assert schedule.rank_of_stage == ours[name].rank_of_stage, name
        assert schedule.num_microbatches == m


@pytest.mark.parametrize("extra", [0, 1, 2])
def test_extra_warmup_moves_every_first_backward_behind_so_many_forwards(extra: int) -> None:
    """On the last stage the forward before a backward is then of another micro-batch."""
    p, m, v = 4, 12, 3
    schedule = make_schedule("interleaved_1f1b", num_ranks=p, num_microbatches=m, virtual_stages=v, extra_warmup=extra)
    for rank, actions in schedule.actions.items():
        kinds = [action.kind for action in actions]
        warmup = kinds.index(Kind.BACKWARD) - 1
        assert warmup == (v - 1) * p + 2 * (p - 1 - rank) + extra  # Megatron-LM's, and the extra
        assert kinds[warmup : 2 * (m * v - warmup) + warmup : 2] == [Kind.FORWARD] * (m * v - warmup)
    last = schedule.actions[p - 1]
    pairs = [(a, b) for a, b in pairwise(last) if (a.kind, b.kind) == (Kind.FORWARD, Kind.BACKWARD)]
    assert any((a.stage, a.microbatch) == (b.stage, b.microbatch) for a, b in pairs) == (extra == 0)


@pytest.mark.parametrize("p", [1, 2, 3, 5])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 6, 15, 30])
def test_peaks_in_flight_have_closed_forms(p: int, m: int) -> None:
    def peaks(name: str, **options: Any) -> tuple[int, ...]:
        return peak_in_flight(make_schedule(name, num_ranks=p, num_microbatches=m, **options))

    assert peaks("gpipe") == (m,) * p
    assert peaks("1f1b") == tuple(min(m, p - rank) for rank in range(p))
    assert max(peaks("zb_h1")) <= max(peaks("1f1b"))
    for v in (1, 2, 3):
        for extra in (0, 1):
            interleaved = peaks("interleaved_1f1b", virtual_stages=v, extra_warmup=extra)
            if m % p == 0:
                expected = [(v - 1) * p + 2 * (p - 1 - rank) + 1 + extra for rank in range(p)]
                assert interleaved == tuple(min(m * v, each) for each in expected)


def test_groups_of_a_number_that_ranks_do_not_divide() -> None:
    """Eleven micro-batches on four ranks: two groups, the larger one first."""
    schedule = make_schedule("interleaved_1f1b", num_ranks=4, num_microbatches=11, virtual_stages=2)
    forwards = [(a.stage, a.microbatch) for a in schedule.actions[1] if a.kind is Kind.FORWARD]
    first, second = range(6), range(6, 11)
    assert forwards == [(stage, i) for group in (first, second) for stage in (1, 5) for i in group]


def test_split_backwards_are_adjacent() -> None:
    schedule = make_schedule("1f1b", num_ranks=2, num_microbatches=3, split_backward=True)
    assert ",".join(map(str, schedule.actions[0])) == "0F0,0F1,0I0,0W0,0F2,0I1,0W1,0I2,0W2"
    whole = make_schedule("1f1b", num_ranks=2, num_microbatches=3)
    assert ",".join(map(str, whole.actions[0])) == "0F0,0F1,0B0,0F2,0B1,0B2"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "1F1B"}, "make_schedule: name: got '1F1B', accepted gpipe, 1f1b, interleaved_1f1b, zb_h1"),
        ({"name": "zb-h1"}, "did you mean zb_h1?"),
        ({"name": "zbv"}, "got 'zbv'"),
        ({"num_ranks": 0}, "num_ranks: got 0, accepted an int >= 1"),
        ({"num_microbatches": 2.0}, "num_microbatches: got 2.0"),
        ({"num_microbatches": True}, "num_microbatches: got True"),
        ({"virtual_stages": 2}, "virtual_stages: got 2, accepted 1 for 1f1b; interleaved_1f1b has this option"),
        ({"name": "gpipe", "extra_warmup": 1}, "extra_warmup: got 1, accepted 0 for gpipe"),
        ({"extra_warmup": -1}, "extra_warmup: got -1, accepted an int >= 0"),
    ],
)
def test_what_no_schedule_has_is_refused(options: dict, text: str) -> None:
    with pytest.raises(ScheduleError) as error:
        make_schedule(**{"name": "1f1b", "num_ranks": 2, "num_microbatches": 4} | options)
    assert text in str(error.value)


def test_csv_comes_back() -> None:
    for schedule in all_schedules(ranks=(1, 3), microbatches=(1, 5)):
        for each in (schedule, lower(schedule)):
            assert Schedule.from_csv(each.to_csv(), name=each.name) == each


def test_torch_takes_lowered_csv_and_ends_with_it() -> None:
    """torch parses every cell as the action that it is, and its own execution of sends and receives ends."""
    for schedule in all_schedules(ranks=(2, 4), microbatches=(4, 8)):
        lowered = lower(schedule)
        rows = csv.reader(io.StringIO(lowered.to_csv()))
        order = {rank: [schedules._Action.from_str(cell) for cell in row] for rank, row in enumerate(rows)}
        assert {rank: [str(each) for each in row] for rank, row in order.items()} == {
            rank: row for rank, row in enumerate(csv.reader(io.StringIO(lowered.to_csv())))
        }
        owner = lowered.rank_of_stage
        schedules._simulate_comms_compute(order, lambda stage, owner=owner: owner[stage], lowered.num_stages)


def test_what_torch_lowers_is_valid_here() -> None:
    """Its sends and receives, with every stage's weight gradients in the order of the micro-batches."""
    for name in ("Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble"):
        ops = _schedule_visualizer.get_schedule_ops(name, 4, 8, 2, with_comms=True)
        validate(Schedule.from_csv(_torch_csv(ops), name=name))


@given(st.integers(0, 99), st.sampled_from(Kind), st.integers(0, 999))
def test_text_of_an_action_comes_back(stage: int, kind: Kind, microbatch: int) -> None:
    action = Action(stage, kind, microbatch)
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F", "0F", "F0", "0X1", "-1F0", "0F1.5", "0F0F0", "0SEND_F0"])
def test_other_text_is_no_action(text: str) -> None:
    with pytest.raises(ScheduleError, match="Action: text: got"):
        Action.parse(text)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("0F0,(0F1;1B2)OVERLAP_F_B", "Action: text"),
        ("1F0,1B0", r"got actions of stages \[1\], accepted actions of every stage from 0"),
        ("", "actions of every stage from 0"),
        ("0VF0", "actions of every stage from 0"),
    ],
)
def test_other_csv_is_refused(text: str, error: str) -> None:
    with pytest.raises(ScheduleError, match=error):
        Schedule.from_csv(text, name="text")
