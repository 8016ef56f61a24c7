"""Every grid and schedule computes what one process computes: losses, all gradients, the largest logits."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from k25sys.models import KimiK25Config
from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.layout import ParameterLayout, local_part
from k25sys.parallel.pipeline.generators import make_schedule
from k25sys.parallel.pipeline.lowering import lower
from k25sys.parallel.pipeline.runtime import PipelineRuntime
from k25sys.training.microbatch import MicroBatch
from k25sys.training.parallelize import ParallelModel, ParallelOptions, parallelize
from tests.parallel.processes import run_ranks
from tests.training.batches import Reference, make_microbatches, reference, small_config

MICROBATCHES = 4  # for each data rank


@dataclass(frozen=True, kw_only=True)
class GridCase:
    """A grid, a schedule, and whether one process is matched bit for bit."""

    sizes: GridSizes
    schedule: str = "1f1b"
    virtual_stages: int = 1
    q_lora_rank: int | None = 24
    images: bool = True
    memory: tuple[str, ...] = ()
    projector: str = "encoder"

    @property
    def bitwise(self) -> bool:
        """The pipeline alone changes no sum."""
        return self.sizes.ranks_per_stage == 1

    def __str__(self) -> str:
        sizes = self.sizes
        axes = {"pp": sizes.pipeline, "dp": sizes.data, "cp": sizes.context, "tp": sizes.tensor, "ep": sizes.expert}
        axes["etp"] = sizes.expert_tensor
        projected = ["projector in stage 0"] if self.projector == "stage0" else []
        return " ".join([f"{name}{size}" for name, size in axes.items() if size > 1] + [self.schedule, *projected])


def build(
    case: GridCase,
    config: KimiK25Config,
    dtype: torch.dtype,
    grid: RankGrid,
    vision: str = "stage0",
    num_microbatches: int = MICROBATCHES,
) -> tuple[PipelineRuntime, ParallelModel]:
    """The model of this rank, and its runtime."""
    schedule = make_schedule(
        case.schedule,
        num_ranks=case.sizes.pipeline,
        num_microbatches=num_microbatches,
        virtual_stages=case.virtual_stages,
    )
    per = config.text.num_hidden_layers // schedule.num_stages
    model = parallelize(
        config,
        grid,
        layers_of_stage=tuple(range(i * per, (i + 1) * per) for i in range(schedule.num_stages)),
        stages=schedule.stages_of(grid.index("pipeline")),
        dtype=dtype,
        seed=1,
        options=ParallelOptions(memory=case.memory, vision=vision, projector=case.projector),
    )
    return PipelineRuntime(lower(schedule), model.stages, grid, weight_grads=model.weight_grads), model


def summed_gradient(parameter: Tensor, layout: ParameterLayout, grid: RankGrid) -> Tensor:
    """What ZeRO makes of the ranks' gradients."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    axes = [layout.replicas, *(["tensor"] if layout.sum_over_tensor else [])]
    for axis in axes:
        group = grid.group(axis)
        if group is not None:
            dist.all_reduce(gradient, group=group)
    return gradient


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected; the norm of `got` where nothing is."""
    scale = float(expected.norm())
    return float((got - expected).norm()) / scale if scale else float(got.norm())


def _check(cases: list[GridCase], dtype: torch.dtype) -> dict[str, float]:
    torch.set_num_threads(1)
    bound = {torch.float32: 1e-6, torch.float64: 1e-13}[dtype]
    worst = {}
    for case in cases:
        layers = max(4, case.sizes.pipeline * case.virtual_stages)
        config = small_config(layers=layers, q_lora_rank=case.q_lora_rank)
        batches = make_microbatches(data_ranks=case.sizes.data, per_rank=MICROBATCHES, dtype=dtype, images=case.images)
        flat = [batch for each in batches for batch in each]
        expected = reference(config, flat, dtype=dtype)
        rounding = {} if dtype == torch.float64 else rounding_errors(config, flat, expected)
        grid = RankGrid.create(case.sizes)
        runtime, model = build(case, config, dtype, grid)
        losses = runtime.step(batches[grid.index("data")]).losses
        worst[str(case)] = max(
            _check_losses(case, losses, expected, grid, bound),
            _check_gradients(case, model, expected, grid, bound, rounding),
        )
        _check_max_logits(case, model, expected, grid)
    return worst


def _check_losses(case: GridCase, losses: list[Tensor], expected: Reference, grid: RankGrid, bound: float) -> float:
    if grid.index("pipeline") != case.sizes.pipeline - 1:
        return 0.0
    parts = torch.stack(losses)
    context = grid.group("context")
    if context is not None:
        dist.all_reduce(parts, group=context)
    first = grid.index("data") * MICROBATCHES
    wanted = torch.tensor(expected.losses[first : first + MICROBATCHES], dtype=parts.dtype)
    if case.bitwise:
        assert torch.equal(parts, wanted), case
    error = relative_error(parts, wanted)
    assert error <= bound, (str(case), error)
    return error


def rounding_errors(config: KimiK25Config, batches: list[MicroBatch], single: Reference) -> dict[str, float]:
    """How far one process in float32 is from one in float64: no two orders of summation need be closer than that."""
    wide = [
        batch if batch.pixel_values is None else replace(batch, pixel_values=batch.pixel_values.double())
        for batch in batches
    ]
    double = reference(config, wide, dtype=torch.float64)
    return {name: relative_error(g.double(), double.gradients[name]) for name, g in single.gradients.items()}


def _check_gradients(
    case: GridCase, model: ParallelModel, expected: Reference, grid: RankGrid, bound: float, rounding: dict[str, float]
) -> float:
    worst = 0.0
    for name, parameter in model.parameters.items():
        layout = model.layouts[name]
        whole = expected.gradients.get(name)
        wanted = torch.zeros(()) if whole is None else local_part(whole, layout, grid.sizes, grid.rank)
        got = summed_gradient(parameter, layout, grid)
        if case.bitwise:
            assert torch.equal(got, wanted.expand_as(got)), (str(case), name, relative_error(got, wanted))
        error = relative_error(got, wanted.expand_as(got))
        assert error <= max(bound, 2 * rounding.get(name, 0.0)), (str(case), name, error)
        worst = max(worst, error)
    return worst


def _check_max_logits(case: GridCase, model: ParallelModel, expected: Reference, grid: RankGrid) -> None:
    for stage in model.stages.values():
        found_LH = stage.max_logits_LH.clone()
        group = grid.group("data_context")
        if group is not None:
            dist.all_reduce(found_LH, dist.ReduceOp.MAX, group=group)
        heads = found_LH.shape[1]
        mine = slice(grid.index("tensor") * heads, (grid.index("tensor") + 1) * heads)
        wanted_LH = expected.max_logits_LH[list(stage.layer_numbers), mine]
        torch.testing.assert_close(found_LH, wanted_LH, rtol=1e-5, atol=1e-5)


SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("zb_h1", 1)]


def cases_of(world_size: int) -> list[GridCase]:
    """All grids that are tried on so many ranks."""
    by_size = {
        1: [{}],
        2: [{"data": 2}, {"tensor": 2}, {"context": 2}, {"data": 2, "expert": 2}, {"tensor": 2, "expert": 2},
            {"data": 2, "expert_tensor": 2}],
        4: [{"data": 4, "expert": 4}, {"data": 2, "tensor": 2, "expert": 2, "expert_tensor": 2},
            {"context": 2, "tensor": 2, "expert": 4}, {"context": 4, "expert": 2}, {"tensor": 4},
            {"data": 2, "context": 2}, {"data": 4}, {"tensor": 2, "context": 2}, {"data": 2, "tensor": 2, "expert": 4}],
        8: [{"data": 2, "context": 2, "tensor": 2, "expert": 4}, {"data": 4, "tensor": 2, "expert": 8},
            {"context": 4, "tensor": 2, "expert": 2, "expert_tensor": 2}, {"data": 8, "expert": 8},
            {"data": 2, "tensor": 4, "expert": 4}, {"data": 4, "context": 2, "expert": 4, "expert_tensor": 2},
            {"data": 2, "context": 4, "expert": 2}],
    }  # fmt: skip
    found = [GridCase(sizes=GridSizes(**axes)) for axes in by_size[world_size]]
    for pipeline in (2, 4):
        inner = world_size // pipeline
        if world_size % pipeline == 0 and inner in by_size:
            for schedule, virtual_stages in SCHEDULES:
                sizes = [GridSizes(pipeline=pipeline, **by_size[inner][i]) for i in range(min(2, len(by_size[inner])))]
                found += [GridCase(sizes=each, schedule=schedule, virtual_stages=virtual_stages) for each in sizes]
    return found


SINGLE, DOUBLE = torch.float32, torch.float64


@pytest.mark.parametrize(
    ("world_size", "dtype"),
    [
        *((size, DOUBLE) for size in (1, 2, 4, 8)),
        (2, SINGLE),
        *(pytest.param(size, SINGLE, marks=pytest.mark.nightly) for size in (1, 4, 8)),
    ],
    ids=str,
)
def test_grids_compute_what_one_process_computes(world_size: int, dtype: torch.dtype) -> None:
    worst = run_ranks(world_size, _check, cases_of(world_size), dtype, timeout=300)
    print({case: f"{max(each[case] for each in worst):.1e}" for case in worst[0]})


def _check_stored_inputs(sizes: GridSizes) -> float:
    """Experts' tokens in E4M3, with experts on several ranks: the gradients of one process with the same plan."""
    torch.set_num_threads(1)
    dtype, memory, worst = torch.float32, ("expert_inputs",), 0.0
    config, alone, grid = small_config(), RankGrid(GridSizes(), 0, "cpu", {}), RankGrid.create(sizes)
    batches = make_microbatches(data_ranks=sizes.data, per_rank=MICROBATCHES, dtype=dtype)
    runtime, model = build(GridCase(sizes=sizes, memory=memory), config, dtype, grid)
    runtime.step(batches[grid.index("data")])
    expected: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    for gradients, names in ((expected, memory), (exact, ())):
        for each in batches:
            plain, whole = build(GridCase(sizes=GridSizes(), memory=names), config, dtype, alone)
            plain.step(each)
            for name, parameter in whole.parameters.items():
                if parameter.grad is not None:
                    gradients[name] = gradients.get(name, torch.zeros(())) + parameter.grad
    for name, parameter in model.parameters.items():
        layout = model.layouts[name]
        wanted, unstored = (local_part(each[name], layout, sizes, grid.rank) for each in (expected, exact))
        error = relative_error(summed_gradient(parameter, layout, grid), wanted)
        assert error <= 1e-6, (name, error)
        if name.endswith("gate_up_proj"):
            assert relative_error(wanted, unstored) > 1e-3, name  # the store is at work
        worst = max(worst, error)
    return worst


@pytest.mark.parametrize("sizes", [GridSizes(data=2, expert=2), GridSizes(data=2, expert_tensor=2)], ids=str)
def test_stored_inputs_of_experts_on_other_ranks(sizes: GridSizes) -> None:
    print(f"{max(run_ranks(2, _check_stored_inputs, sizes)):.1e}")


def _refusals() -> list[str]:
    grid = RankGrid.create(GridSizes(data=2, expert=2))
    found = []
    for options, layers in (
        (ParallelOptions(projector="stage0"), (range(4),)),
        (ParallelOptions(vision="dep", projector="stage1"), (range(4),)),
        (ParallelOptions(), (range(2), range(3, 4))),
    ):
        try:
            parallelize(
                small_config(), grid, layers_of_stage=layers, stages=(0,), dtype=torch.float32, seed=0, options=options
            )
        except ValueError as error:
            found.append(str(error))
    return found


def test_options_that_do_nothing_and_layers_that_are_not_the_models_are_refused() -> None:
    for found in run_ranks(2, _refusals):
        assert len(found) == 3
        assert "projector: got 'stage0' with vision 'stage0'" in found[0]
        assert "projector: got 'stage1', accepted 'encoder' or 'stage0'" in found[1]
        assert "layers_of_stage" in found[2]
