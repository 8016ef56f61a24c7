"""The decoupled encoder against one that encodes in place: rows bitwise, gradients to rounding, over drawn steps."""

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import torch.distributed as dist

from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.dep import Clip, DecoupledEncoder, DecoupledOptions, EncoderCost, make_packs
from k25sys.parallel.pipeline.drawing import draw_svg
from k25sys.parallel.pipeline.generators import SCHEDULES, make_schedule
from k25sys.parallel.pipeline.ir import COMPUTE, VISION, Kind
from k25sys.parallel.pipeline.lowering import lower
from k25sys.parallel.pipeline.simulator import simulate
from k25sys.parallel.pipeline.tracer import write_perfetto
from k25sys.parallel.pipeline.validator import validate
from tests.parallel.dep.vision import WIDTH, DrawnStep, Encoder, draw_step, pixels_of, rows_of
from tests.parallel.processes import run_ranks

MICROBATCHES = 4
COST = EncoderCost.from_sizes(dim=16, mlp_dim=24, num_layers=2)


def upstream(clip: Clip, dtype: torch.dtype) -> torch.Tensor:
    """The gradient that the backbone would send for a clip's rows."""
    generator = torch.Generator().manual_seed(clip.microbatch * 100 + clip.index * 7 + clip.data_rank)
    return torch.randn(rows_of(clip), WIDTH, generator=generator, dtype=dtype)


def encode_in_place(drawn: DrawnStep, dtype: torch.dtype, max_patches: int) -> tuple[dict, dict]:
    """One pack after the other, in place: the rows of each clip, and the gradients of all of them."""
    encoder, rows = Encoder(dtype), {}
    for pack in make_packs(drawn.clips, max_patches=max_patches):
        pixels = torch.cat([pixels_of(clip, dtype) for clip in pack.clips])
        encoded = encoder(pixels, torch.tensor([clip.grid for clip in pack.clips]))
        encoded.backward(torch.cat([upstream(clip, dtype) for clip in pack.clips]))
        rows.update(zip(pack.clips, encoded.detach().split([rows_of(clip) for clip in pack.clips]), strict=True))
    zeros = {name: torch.zeros_like(parameter) for name, parameter in encoder.named_parameters()}
    return rows, {**zeros, **{name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}}


def one_step(
    decoupled: DecoupledEncoder, grid: RankGrid, drawn: DrawnStep, dtype: torch.dtype, *, train: bool = True
) -> dict[tuple[int, int], torch.Tensor]:
    """The three phases with a backbone that only hands gradients back; the rows that this rank consumed."""
    plan = decoupled.plan(drawn.clips)
    decoupled.begin(
        plan,
        lambda *key: torch.tensor(drawn.consumers[key]),
        lambda clip: pixels_of(clip, dtype),
        train=train,
    )
    for pack in plan.packs_of(grid.rank):
        decoupled.encode(pack.number)
    consumed = {}
    for microbatch in range(MICROBATCHES):
        decoupled.deliver(microbatch)
        key = (grid.index("data"), microbatch)
        consumed[key] = decoupled.rows(microbatch)
        clips = [clip for clip in sorted(drawn.clips) if clip.home == key]
        if train and clips:
            gradient = torch.cat([upstream(clip, dtype) for clip in clips])
            mine = torch.tensor(drawn.consumers[key]) == grid.rank
            decoupled.return_gradient(microbatch, gradient[mine])
        if train:
            decoupled.collect(microbatch)
    if train and not decoupled.options.deterministic:
        for pack in plan.packs_of(grid.rank):
            decoupled.backward(pack.number)
    decoupled.finish()
    assert decoupled.bytes_held == 0
    return consumed


def expected_rows(drawn: DrawnStep, rows: dict, key: tuple[int, int], rank: int, dtype: torch.dtype) -> torch.Tensor:
    clips = [clip for clip in sorted(drawn.clips) if clip.home == key]
    if not clips:
        return torch.empty(0, WIDTH, dtype=dtype)
    return torch.cat([rows[clip] for clip in clips])[torch.tensor(drawn.consumers[key]) == rank]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    scale = float(expected.abs().max())
    return float((got - expected).abs().max()) / scale if scale else float(got.abs().max())


def _check_steps(
    sizes: GridSizes, seeds: Sequence[int], dtype: torch.dtype, deterministic: bool
) -> list[dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    grid = RankGrid.create(sizes)
    first_stage = {
        data: [rank for rank in range(sizes.ranks_per_stage) if sizes.coordinate(rank, "data") == data]
        for data in range(sizes.data)
    }
    found = []
    for seed in seeds:
        drawn = draw_step(seed, data_ranks=sizes.data, microbatches=MICROBATCHES, consumers_of=first_stage)
        encoder = Encoder(dtype)
        options = DecoupledOptions(cost=COST, max_patches=64, prefetch=1 + seed % 3, deterministic=deterministic)
        decoupled = DecoupledEncoder(encoder, grid, row_shape=(WIDTH,), rows_of=rows_of, dtype=dtype, options=options)
        before = torch.random.get_rng_state()
        consumed = one_step(decoupled, grid, drawn, dtype)
        assert torch.equal(before, torch.random.get_rng_state())
        rows, gradients = encode_in_place(drawn, dtype, options.max_patches)
        for key, got in consumed.items():
            assert torch.equal(got, expected_rows(drawn, rows, key, grid.rank, dtype)), (seed, key)
        summed = {}
        for name, parameter in encoder.named_parameters():
            summed[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if grid.size("world") > 1:
                dist.all_reduce(summed[name])
            bound = 1e-6 if dtype == torch.float32 else 1e-14
            error = relative_error(summed[name], gradients[name])
            assert error <= bound, (seed, name, error)
        found.append(summed)
    return found


GRIDS = [
    GridSizes(),
    GridSizes(pipeline=2),
    GridSizes(pipeline=2, data=2),
    GridSizes(context=2, tensor=2),
    GridSizes(data=2, tensor=2),
]


@pytest.mark.parametrize("sizes", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_are_bitwise_and_gradients_those_of_the_encoder_in_place(sizes: GridSizes, dtype: torch.dtype) -> None:
    run_ranks(sizes.world_size, _check_steps, sizes, range(12), dtype, False)


def test_deterministic_gradients_do_not_depend_on_the_number_of_ranks() -> None:
    alone = run_ranks(1, _check_steps, GridSizes(), range(8), torch.float32, True)[0]
    for sizes in (GridSizes(pipeline=2), GridSizes(pipeline=4), GridSizes(pipeline=2, tensor=2)):
        spread = run_ranks(sizes.world_size, _check_steps, sizes, range(8), torch.float32, True)[0]
        for one, other in zip(alone, spread, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def _check_without_training(sizes: GridSizes) -> None:
    """A frozen encoder and an evaluation: the same rows, no gradients, nothing left behind."""
    grid = RankGrid.create(sizes)
    first_stage = {data: [data * sizes.ranks_per_stage // sizes.data] for data in range(sizes.data)}
    for seed in range(6):
        drawn = draw_step(seed, data_ranks=sizes.data, microbatches=MICROBATCHES, consumers_of=first_stage)
        rows, _ = encode_in_place(drawn, torch.float64, 64)
        for trainable, train in ((False, True), (True, False)):
            encoder = Encoder(torch.float64)
            options = DecoupledOptions(cost=COST, max_patches=64, trainable=trainable)
            decoupled = DecoupledEncoder(
                encoder, grid, row_shape=(WIDTH,), rows_of=rows_of, dtype=torch.float64, options=options
            )
            plan = decoupled.plan(drawn.clips)
            decoupled.begin(
                plan,
                lambda *key, drawn=drawn: torch.tensor(drawn.consumers[key]),
                lambda clip: pixels_of(clip, torch.float64),
                train=train,
            )
            backbone = make_schedule("1f1b", num_ranks=sizes.pipeline, num_microbatches=MICROBATCHES)
            kinds = {action.kind for action in decoupled.schedule(lower(backbone)).actions[0]}
            assert not kinds & {Kind.VISION_BACKWARD, Kind.RETURN}
            for pack in plan.packs_of(grid.rank):
                decoupled.encode(pack.number)
            for microbatch in range(MICROBATCHES):
                decoupled.deliver(microbatch)
                key = (grid.index("data"), microbatch)
                got = decoupled.rows(microbatch)
                assert torch.equal(got, expected_rows(drawn, rows, key, grid.rank, torch.float64))
            decoupled.finish()
            assert decoupled.bytes_held == 0
            assert all(parameter.grad is None for parameter in encoder.parameters())


@pytest.mark.parametrize("sizes", [GridSizes(), GridSizes(pipeline=2), GridSizes(data=2, pipeline=2)], ids=str)
def test_a_frozen_encoder_and_an_evaluation_end_with_phase_a(sizes: GridSizes) -> None:
    run_ranks(sizes.world_size, _check_without_training, sizes)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_with_vision_is_valid_and_can_be_timed_and_drawn(name: str, tmp_path: Path) -> None:
    encoder, grid = Encoder(torch.float32), RankGrid.create(GridSizes())
    options = DecoupledOptions(cost=COST, max_patches=64)
    decoupled = DecoupledEncoder(
        encoder, grid, row_shape=(WIDTH,), rows_of=rows_of, dtype=torch.float32, options=options
    )
    drawn = draw_step(5, data_ranks=1, microbatches=MICROBATCHES, consumers_of={0: [0]})
    assert drawn.clips
    consumers, plan = drawn.consumers, decoupled.plan(drawn.clips)
    decoupled.begin(plan, lambda *key: torch.tensor(consumers[key]), lambda clip: torch.empty(0))
    schedule = decoupled.schedule(lower(make_schedule(name, num_ranks=1, num_microbatches=MICROBATCHES)))
    validate(schedule)
    assert {Kind.DELIVER, Kind.RETURN} <= {action.kind for action in schedule.actions[0]}
    timeline = simulate(schedule, lambda action: 1.0)
    computed = [action for action in schedule.actions[0] if action.kind in COMPUTE | VISION]
    assert timeline.makespan == len(computed)
    ElementTree.fromstring(draw_svg(timeline))
    write_perfetto(timeline, tmp_path / "trace.json")
