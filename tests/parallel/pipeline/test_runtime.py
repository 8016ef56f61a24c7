"""The runtime under every schedule against one process: losses and gradients bit for bit, no product twice."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from k25sys.errors import ScheduleError, ShapeError
from k25sys.parallel import GridSizes, RankGrid, WeightGradStore
from k25sys.parallel.pipeline import Action, Kind, Schedule
from k25sys.parallel.pipeline.generators import make_schedule
from k25sys.parallel.pipeline.lowering import lower
from k25sys.parallel.pipeline.runtime import PipelineRuntime
from tests.parallel.pipeline.toy import ToyStage, make_rows, run_alone
from tests.parallel.processes import run_ranks

LAYERS = 8
CASES = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 1), ("zb_h1", 1)]


class CountProducts(TorchDispatchMode):
    """Counts calls of matrix products, torch's and ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[-2] if "." in str(func) else str(func)
        if any(part in name for part in ("mm", "gemm", "expert_mlp")):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def build(schedule: Schedule, grid: RankGrid, dtype: torch.dtype) -> tuple[PipelineRuntime, dict[int, ToyStage]]:
    store, place = WeightGradStore(), grid.index("pipeline")
    per = LAYERS // schedule.num_stages
    stages = {
        number: ToyStage(
            range(number * per, (number + 1) * per), last=number == schedule.num_stages - 1, dtype=dtype, store=store
        )
        for number in schedule.stages_of(place)
    }
    return PipelineRuntime(lower(schedule), stages, grid, weight_grads=store), stages


def _check_schedules(size: int, dtype: torch.dtype) -> dict[str, Counter[str]]:
    torch.set_num_threads(1)
    grid = RankGrid.create(GridSizes(pipeline=size))
    counts = {}
    for name, virtual_stages in CASES:
        for number in (size, 2 * size + 1):
            schedule = make_schedule(name, num_ranks=size, num_microbatches=number, virtual_stages=virtual_stages)
            runtime, stages = build(schedule, grid, dtype)
            rows = make_rows(number, dtype)
            with CountProducts() as counter:
                result = runtime.step(rows)
            losses, gradients = run_alone(LAYERS, rows, dtype)
            is_last = schedule.num_stages - 1 in stages
            assert [float(loss) for loss in result.losses] == (losses if is_last else [])
            for stage in stages.values():
                for key, parameter in stage.named_parameters():
                    assert parameter.grad is not None, (name, key)
                    assert torch.equal(parameter.grad, gradients[key]), (name, number, key)
            counts[f"{name} {number} {virtual_stages}"] = counter.calls
            evaluated = runtime.step(rows, forward_only=True)
            assert [float(loss) for loss in evaluated.losses] == (losses if is_last else [])
    return counts


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_schedule_is_one_process_bit_for_bit(size: int, dtype: torch.dtype) -> None:
    for counts in run_ranks(size, _check_schedules, size, dtype):
        for number in (size, 2 * size + 1):
            whole, split = counts[f"1f1b {number} 1"], counts[f"zb_h1 {number} 1"]
            assert whole == split  # no product twice


def _break(kind: str) -> str:
    grid = RankGrid.create(GridSizes(pipeline=1))
    schedule = make_schedule("1f1b", num_ranks=1, num_microbatches=2)
    runtime, stages = build(schedule, grid, torch.float32)
    rows = make_rows(2, torch.float32)
    try:
        if kind == "number":
            runtime.step(rows[:1])
        elif kind == "hook":
            actions = {0: (Action(0, Kind.VISION_FORWARD, 0), *schedule.actions[0])}
            vision = Schedule(name="v", num_microbatches=2, rank_of_stage=(0,), actions=actions)
            runtime.step(rows, schedule=vision)
        elif kind == "stages":
            PipelineRuntime(schedule, {1: stages[0]}, grid, weight_grads=WeightGradStore())
        else:
            two = make_schedule("gpipe", num_ranks=1, num_microbatches=2)
            wide = Schedule(name="w", num_microbatches=2, rank_of_stage=(0, 0), actions=two.actions)
            stage = ToyStage(range(1), last=False, dtype=torch.float64, store=WeightGradStore())
            stage.dtype = torch.float32
            both = {0: stage, 1: stage}
            doubled = make_rows(2, torch.float64)
            PipelineRuntime(wide, both, grid, weight_grads=WeightGradStore()).step(doubled)
    except (ScheduleError, ShapeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("number", "microbatches: got 1, accepted 2, those of 1f1b"),
        ("hook", "hooks: got none for 0VF0, accepted a hook for VISION_FORWARD"),
        ("stages", "stages: got (1,), accepted (0,), those of rank 0 in 1f1b"),
        ("shape", "output of stage 0: got torch.float64 (5, 16), accepted torch.float32 (5, 16)"),
    ],
)
def test_wrong_calls_are_refused(kind: str, text: str) -> None:
    assert text in _break(kind)
