"""The runtime under every schedule against one process in plain autograd: bit for bit, and no product twice."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from k25sys.errors import ScheduleError, ShapeError
from k25sys.parallel import GridSizes, RankGrid, WeightGradStore
from k25sys.parallel.pipeline import Action, Kind, Schedule, lower, make_schedule
from k25sys.parallel.pipeline import runtime as runtime_module
from k25sys.parallel.pipeline.recorder import Recorder
from k25sys.parallel.pipeline.runtime import PipelineRuntime
from k25sys.parallel.weight_grads import Linear
from tests.parallel.pipeline.sizes import all_schedules
from tests.parallel.pipeline.toy import CountProducts, Rows, ToyStage, make_rows, run_alone
from tests.parallel.processes import run_ranks

LAYERS = 8
CASES = [
    ("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 1), ("zb_h1", 1),
]  # fmt: skip


def build(
    schedule: Schedule, grid: RankGrid, dtype: torch.dtype, **options: Any
) -> tuple[PipelineRuntime[Rows], dict[int, ToyStage]]:
    """The toy model's stages of this rank, and what runs them."""
    store, place = WeightGradStore(), grid.index("pipeline")
    per = LAYERS // schedule.num_stages
    stages = {
        number: ToyStage(
            range(number * per, (number + 1) * per), last=number == schedule.num_stages - 1, dtype=dtype, store=store
        )
        for number in schedule.stages_of(place)
    }
    return PipelineRuntime(lower(schedule), stages, grid, weight_grads=store, **options), stages


def with_extra_gradients(rows: list[Rows], found: dict[int, Tensor]) -> list[Rows]:
    """The rows, whose extra inputs are leaves that leave their gradients in `found`."""
    made = []
    for number, each in enumerate(rows):
        if each.extra_TD is not None:
            leaf = each.extra_TD.clone().requires_grad_()
            leaf.register_hook(lambda gradient, number=number: found.__setitem__(number, gradient.clone()))
            each = replace(each, extra_TD=leaf)
        made.append(each)
    return made


class Expected:
    """Of one process in plain autograd."""

    def __init__(self, number: int, dtype: torch.dtype) -> None:
        self.rows = make_rows(number, dtype)
        self.extra: dict[int, Tensor] = {}
        rows = with_extra_gradients(self.rows, self.extra)
        self.losses, self.gradients, self.products = run_alone(LAYERS, rows, dtype)


def _check_schedule(schedule: Schedule, grid: RankGrid, dtype: torch.dtype, alone: Expected) -> None:
    """Losses, gradients, evaluation and the number of products of one schedule."""
    runtime, stages = build(schedule, grid, dtype)
    rows, losses, gradients, expected = alone.rows, alone.losses, alone.gradients, alone.extra
    found: dict[int, Tensor] = {}
    with CountProducts() as counter:
        result = runtime.step(with_extra_gradients(rows, found))
    is_last = schedule.num_stages - 1 in stages
    assert [float(loss) for loss in result.losses] == (losses if is_last else [])
    for stage in stages.values():
        for key, parameter in stage.named_parameters():
            assert parameter.grad is not None, (schedule.name, key)
            assert torch.equal(parameter.grad, gradients[key]), (schedule.name, schedule.num_microbatches, dtype, key)
    assert set(found) == (set(expected) if 0 in stages else set())
    assert all(torch.equal(gradient, expected[number]) for number, gradient in found.items())
    evaluated = runtime.step(rows, forward_only=True)
    assert [float(loss) for loss in evaluated.losses] == (losses if is_last else [])
    total = torch.tensor([counter.total])
    if grid.size("world") > 1:
        dist.all_reduce(total)
    assert int(total) == alone.products.total, (schedule.name, counter.calls, alone.products.calls)


def _check_schedules(size: int) -> None:
    grid = RankGrid.create(GridSizes(pipeline=size))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for number in (size, 2 * size + 1):
            alone = Expected(number, dtype)
            for name, virtual_stages in CASES:
                for split in (False, True) if dtype == torch.float32 and name != "zb_h1" else (False,):
                    schedule = make_schedule(
                        name, num_ranks=size, num_microbatches=number, virtual_stages=virtual_stages,
                        split_backward=split,
                    )  # fmt: skip
                    _check_schedule(schedule, grid, dtype, alone)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_schedule_is_one_process_bit_for_bit(size: int) -> None:
    run_ranks(size, _check_schedules, size)


def test_messages_of_lowered_schedules_have_one_order() -> None:
    for schedule in all_schedules(ranks=(2, 4), microbatches=(1, 4, 7)):
        runtime_module._check_messages(lower(schedule))


# --- one process ------------------------------------------------------------------------------------------------------


def _alone(name: str = "1f1b", number: int = 2) -> tuple[PipelineRuntime[Rows], list[Rows], Schedule]:
    schedule = make_schedule(name, num_ranks=1, num_microbatches=number)
    runtime, _ = build(schedule, RankGrid.create(GridSizes()), torch.float32)
    return runtime, make_rows(number, torch.float32), schedule


def test_a_wrong_number_of_microbatches() -> None:
    runtime, rows, _ = _alone()
    with pytest.raises(ScheduleError, match="microbatches: got 1, accepted 2, those of 1f1b"):
        runtime.step(rows[:1])


def _with_vision(schedule: Schedule, *, at: int, actions: tuple[Action, ...], **options: Any) -> Schedule:
    own = schedule.actions[0]
    return replace(schedule, name="vision", actions={0: (*own[:at], *actions, *own[at:])}, **options)


def test_vision_actions_and_exchanges_call_their_hooks_in_order() -> None:
    runtime, rows, schedule = _alone()
    encode, decode = Action(0, Kind.VISION_FORWARD, 3), Action(0, Kind.VISION_BACKWARD, 3)
    deliver, collect = Action(0, Kind.DELIVER, 1), Action(0, Kind.RETURN, 1)
    vision = _with_vision(schedule, at=0, actions=(encode, deliver))
    vision = replace(vision, actions={0: (*vision.actions[0], collect, decode)})
    called: list[tuple[str, int]] = []

    def hook(kind: Kind) -> Callable[[int], None]:
        return lambda number: called.append((kind.value, number))

    hooks = {action.kind: hook(action.kind) for action in (encode, deliver, collect, decode)}
    runtime.step(rows, schedule=vision, hooks=hooks)
    assert called == [("VF", 3), ("D", 1), ("R", 1), ("VB", 3)]
    called.clear()
    runtime.step(rows, schedule=vision, hooks=hooks, forward_only=True)
    assert called == [("VF", 3), ("D", 1)]
    with pytest.raises(ScheduleError, match="hooks: got none for 0VF3, accepted a hook for VISION_FORWARD"):
        runtime.step(rows, schedule=vision, hooks={Kind.DELIVER: hook(Kind.DELIVER)})
    del hooks[Kind.RETURN]
    with pytest.raises(ScheduleError, match="hooks: got none for 0R1, accepted a hook for RETURN"):
        runtime.step(rows, schedule=vision, hooks=hooks)
    other = make_schedule("gpipe", num_ranks=1, num_microbatches=2)
    with pytest.raises(ScheduleError, match="got gpipe with another order of rank 0, accepted that of 1f1b, with"):
        runtime.step(rows, schedule=other)


def test_the_input_half_of_a_backward_frees_the_graph() -> None:
    runtime, rows, schedule = _alone("zb_h1", 1)
    alive: list[weakref.ref[Any]] = []
    stage = runtime.stages[0]
    assert isinstance(stage, ToyStage)
    for module in stage.modules():
        if isinstance(module, Linear):
            module.register_forward_hook(lambda _module, _args, y: alive.append(weakref.ref(y.grad_fn)))
    counts: list[tuple[int, int]] = []

    def probe(number: int) -> None:
        gc.collect()
        counts.append((sum(ref() is not None for ref in alive), runtime.weight_grads.num_kept))

    probes = [Action(0, Kind.VISION_FORWARD, i) for i in range(3)]
    own = [x for pair in zip(schedule.actions[0], probes, strict=True) for x in pair]
    vision = replace(schedule, actions={0: tuple(own)})
    runtime.step(rows, schedule=vision, hooks={Kind.VISION_FORWARD: probe})
    assert counts == [(3 * LAYERS, 0), (0, 4 * LAYERS), (0, 0)]


def test_a_failed_step_leaves_no_weight_gradients_behind() -> None:
    runtime, rows, schedule = _alone("zb_h1", 2)

    def fail(number: int) -> None:
        assert runtime.weight_grads.num_kept > 0
        raise OSError("no decoder")

    at = [action.kind for action in schedule.actions[0]].index(Kind.BACKWARD_INPUT) + 1
    vision = _with_vision(schedule, at=at, actions=(Action(0, Kind.VISION_FORWARD, 0),))
    with pytest.raises(OSError, match="no decoder"):
        runtime.step(rows, schedule=vision, hooks={Kind.VISION_FORWARD: fail})
    assert runtime.weight_grads.num_kept == 0
    assert len(runtime.step(rows).losses) == 2


def test_wrong_schedules_and_stages_are_refused() -> None:
    runtime, _, schedule = _alone()
    grid, store = runtime.grid, WeightGradStore()
    with pytest.raises(ScheduleError, match=r"stages: got \(1,\), accepted \(0,\), those of rank 0 in 1f1b"):
        PipelineRuntime(schedule, {1: runtime.stages[0]}, grid, weight_grads=store)
    two = make_schedule("1f1b", num_ranks=2, num_microbatches=2)
    with pytest.raises(ScheduleError, match="schedule: got 2 ranks, accepted 1, the grid's"):
        PipelineRuntime(two, runtime.stages, grid, weight_grads=store)
    with pytest.raises(ScheduleError, match=r"schedule: got no 0SF0, accepted sends; lower\(\) it"):
        runtime_module._check_messages(two)
    lowered = lower(two)
    swapped = list(lowered.actions[1])
    receives = [i for i, action in enumerate(swapped) if action.kind is Kind.RECV_FORWARD]
    swapped[receives[0]], swapped[receives[1]] = swapped[receives[1]], swapped[receives[0]]
    with pytest.raises(ScheduleError, match="messages between ranks 0 and 1 in another order on each"):
        runtime_module._check_messages(replace(lowered, actions={0: lowered.actions[0], 1: tuple(swapped)}))


def test_an_output_of_another_shape_or_dtype_is_refused() -> None:
    wide = make_schedule("gpipe", num_ranks=1, num_microbatches=2)
    both = replace(wide, rank_of_stage=(0, 0))
    stage = ToyStage(range(1), last=False, dtype=torch.float64, store=WeightGradStore())
    stage.dtype = torch.float32
    runtime = PipelineRuntime(both, {0: stage, 1: stage}, RankGrid.create(GridSizes()), weight_grads=WeightGradStore())
    text = r"output of stage 0: got torch.float64 \(5, 16\), accepted torch.float32 \(5, 16\)"
    with pytest.raises(ShapeError, match=text):
        runtime.step(make_rows(2, torch.float64))


def test_a_recorder_sees_every_action_once() -> None:
    schedule = make_schedule("zb_h1", num_ranks=1, num_microbatches=3)
    recorder = Recorder()
    runtime, _ = build(schedule, RankGrid.create(GridSizes()), torch.float32, recorder=recorder)
    runtime.step(make_rows(3, torch.float32))
    assert tuple(each.action for each in recorder.recorded) == schedule.actions[0]
