"""Real steps recorded on several ranks, as a timeline and replayed in the simulator."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from k25sys.errors import ScheduleError
from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.pipeline import Action, Kind, lower, make_schedule, simulate
from k25sys.parallel.pipeline.ir import COMMUNICATION, SENDS
from k25sys.parallel.pipeline.recorder import Recorded, Recorder
from k25sys.parallel.pipeline.virtual_time import as_run, gather, measured, predict, relative_error, replay
from tests.parallel.pipeline.test_runtime import build
from tests.parallel.pipeline.toy import make_rows
from tests.parallel.processes import run_ranks

RANKS, NUMBER = 2, 5
USERS = {Kind.RECV_FORWARD: [Kind.FORWARD], Kind.RECV_BACKWARD: [Kind.BACKWARD, Kind.BACKWARD_INPUT]}
SCHEDULES = [("1f1b", 1), ("zb_h1", 1), ("interleaved_1f1b", 2)]


@dataclass
class Recording:
    """What one rank knows after a step: the same on all ranks."""

    recorders: tuple[Recorder, ...]
    makespan: float


def _record(size: int) -> list[Recording]:
    grid = RankGrid.create(GridSizes(pipeline=size))
    made = []
    for name, virtual_stages in SCHEDULES:
        schedule = make_schedule(name, num_ranks=size, num_microbatches=NUMBER, virtual_stages=virtual_stages)
        recorder = Recorder()
        runtime, _ = build(schedule, grid, torch.float32, recorder=recorder)
        rows = make_rows(NUMBER, torch.float32)
        for _ in range(2):
            dist.barrier()
            recorder.begin()
            runtime.step(rows)
        recorders = gather(recorder, grid)
        made.append(Recording(recorders, replay(runtime.schedule, measured(recorders)).makespan))
    return made


@pytest.fixture(scope="module")
def recordings() -> list[list[Recording]]:
    """Of every rank."""
    return run_ranks(RANKS, _record, RANKS)


def test_every_rank_knows_every_action_of_the_last_step(recordings: list[list[Recording]]) -> None:
    for (name, virtual_stages), own, other in zip(SCHEDULES, *recordings, strict=True):
        schedule = make_schedule(name, num_ranks=RANKS, num_microbatches=NUMBER, virtual_stages=virtual_stages)
        lowered = lower(schedule)
        assert own.makespan == other.makespan
        for rank, recorder in enumerate(own.recorders):
            assert tuple(each.action for each in recorder.recorded) == lowered.actions[rank]
            assert all(0 <= each.start <= each.end for each in recorder.recorded)
            assert all(each.cpu > 0 for each in recorder.recorded)
        timeline = as_run(own.recorders, lowered)
        # The third micro-batch has no rows, and no messages.
        sends = {action for actions in lowered.actions.values() for action in actions if action.kind in SENDS}
        assert {transfer.send for transfer in timeline.transfers} == {send for send in sends if send.microbatch != 2}
        assert all(each.end >= each.start and each.source != each.target for each in timeline.messages)
        for spans in timeline.spans:
            assert all(a.end <= b.start for a, b in pairwise(spans))
        for recorder in own.recorders:
            starts = {each.action: each.start for each in recorder.recorded}
            for receive, seconds in recorder.arrivals.items():
                users = [replace(receive, kind=kind) for kind in USERS[receive.kind]]
                assert starts[receive] <= seconds <= max(starts.get(user, 0.0) for user in users)


def test_replay_is_the_simulation_of_what_was_measured(recordings: list[list[Recording]]) -> None:
    for (name, virtual_stages), own in zip(SCHEDULES, recordings[0], strict=True):
        schedule = make_schedule(name, num_ranks=RANKS, num_microbatches=NUMBER, virtual_stages=virtual_stages)
        seconds, lowered = measured(own.recorders), lower(schedule)
        replayed = replay(lowered, seconds)
        total = sum(seconds.values())
        assert total / RANKS <= replayed.makespan <= total
        for rank, recorder in enumerate(own.recorders):
            cpu = sum(each.cpu for each in recorder.recorded if each.action.kind not in COMMUNICATION)
            assert replayed.busy(rank) == pytest.approx(cpu)
        assert simulate(lowered, seconds).makespan == replayed.makespan
        longer = replay(lowered, {**seconds, Action(0, Kind.FORWARD, 0): seconds[Action(0, Kind.FORWARD, 0)] + 1.0})
        assert longer.makespan == pytest.approx(replayed.makespan + 1.0)  # nothing goes on before the first forward


def test_predictions_are_medians_of_alike_actions() -> None:
    f0, f1, w0 = Action(0, Kind.FORWARD, 0), Action(0, Kind.FORWARD, 1), Action(0, Kind.BACKWARD_WEIGHT, 0)
    steps = [{f0: 1.0, f1: 2.0, w0: 5.0}, {f0: 9.0, f1: 4.0, w0: 7.0}, {f0: 3.0, f1: 3.0, w0: 5.0}]
    assert predict(steps) == {f0: 3.0, f1: 3.0, w0: 5.0}
    assert predict(steps, key=lambda action: action) == {f0: 3.0, f1: 3.0, w0: 5.0}
    assert predict(steps[:1], key=lambda action: action) == steps[0]


def test_the_relative_error_compares_odd_steps_with_what_even_steps_predict() -> None:
    schedule = lower(make_schedule("1f1b", num_ranks=2, num_microbatches=4))
    actions = [action for of_rank in schedule.actions.values() for action in of_rank]
    step = {action: 0.0 if action.kind in COMMUNICATION else 1.0 for action in actions}
    slower = {action: 1.25 * seconds for action, seconds in step.items()}
    assert relative_error(schedule, [step, step, step, slower, step, step]) == 0.0
    assert relative_error(schedule, [step, slower, slower, slower, step, slower]) == pytest.approx(0.2)
    assert relative_error(schedule, [slower, step]) == pytest.approx(0.25)
    uneven = {**step, **{action: 3.0 for action in step if action.microbatch == 3 and action.kind is Kind.FORWARD}}
    assert relative_error(schedule, [uneven, uneven]) > 0.05  # micro-batches that are not alike
    assert relative_error(schedule, [uneven, uneven], key=lambda action: action) == 0.0
    for steps, text in ((steps, "two measured steps") for steps in ([], [step])):
        with pytest.raises(ScheduleError, match=text):
            relative_error(schedule, steps)
    with pytest.raises(ScheduleError, match="steps: got none, accepted one measured step or more"):
        predict([])
    del step[actions[0]]
    with pytest.raises(ScheduleError, match="seconds: got none for 0F0, accepted all actions of the schedule"):
        replay(schedule, step)


def test_what_is_on_every_rank_counts_as_its_slowest() -> None:
    deliver, collect = Action(0, Kind.DELIVER, 0), Action(0, Kind.RETURN, 0)
    recorders = [
        Recorder(recorded=[Recorded(deliver, 0.0, 1.0, cpu), Recorded(collect, 1.0, 2.0, 1.0 - cpu)])
        for cpu in (0.25, 0.875, 0.5)
    ]
    assert measured(recorders) == {deliver: 0.875, collect: 0.75}
