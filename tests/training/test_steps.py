"""Three steps of MuonClip with QK-Clip on any grid are those of one process; the decoupled encoder's too."""

from dataclasses import replace

import pytest
import torch

from k25sys.optim import MuonClipConfig, ZeroOptimizer
from k25sys.optim.qk_clip import clip_factors
from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.dep import Clip, DecoupledEncoder, DecoupledOptions, EncoderCost
from k25sys.parallel.layout import local_part
from k25sys.training.microbatch import MicroBatch
from k25sys.training.sharding_plan import plan
from k25sys.training.stage import media_consumers
from k25sys.training.step import StepMedia, TrainStep, attention_row_factors
from tests.parallel.processes import run_ranks
from tests.training.batches import MEDIA_PAD, build_model, make_microbatches, run_plain, small_config
from tests.training.test_grids import MICROBATCHES, GridCase, build, relative_error

RATE, STEPS = 0.01, 3
CONFIG = MuonClipConfig(max_logit=0.3, max_gradient_norm=0.5)


def batches_of(step: int, data_ranks: int, dtype: torch.dtype) -> list[list[MicroBatch]]:
    return make_microbatches(data_ranks=data_ranks, per_rank=MICROBATCHES, dtype=dtype, seed=step)


def run_alone(data_ranks: int, layers: int, dtype: torch.dtype) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """One process, plain autograd: losses, the parameters after the last step, heads clipped."""
    config, sizes = small_config(layers=layers), GridSizes()
    model = build_model(config, dtype=dtype)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = ZeroOptimizer(parameters, plan(config, sizes), RankGrid(sizes, 0, "cpu", {}), CONFIG)
    totals, clipped = [], 0
    for step in range(STEPS):
        losses: list[float] = []
        flat = [batch for each in batches_of(step, data_ranks, dtype) for batch in each]
        gamma_LH = clip_factors(run_plain(model, flat, losses), 0.3)
        clipped += int((gamma_LH < 1).sum())
        factors = {}
        for layer, gamma_H in enumerate(gamma_LH):
            factors |= attention_row_factors(layer, gamma_H, config.text)
        optimizer.step(RATE, factors)
        totals.append(sum(losses))
    return totals, {name: parameter.detach() for name, parameter in parameters.items()}, clipped


def decouple(
    case: GridCase, model, grid: RankGrid, dtype: torch.dtype, *, deterministic: bool = False
) -> DecoupledEncoder:
    options = DecoupledOptions(
        cost=EncoderCost.from_sizes(dim=16, mlp_dim=24, num_layers=2), max_patches=16384, deterministic=deterministic
    )
    return DecoupledEncoder(
        model.encoder, grid, row_shape=model.row_shape, rows_of=lambda clip: clip.grid[1] * clip.grid[2] // 4,
        dtype=dtype, options=options,
    )  # fmt: skip


def media_of(batches: list[list[MicroBatch]], grid: RankGrid, decoupled: DecoupledEncoder) -> StepMedia:
    """Metadata and pixels of all data ranks."""
    clips, pixels = [], {}
    for data_rank, each in enumerate(batches):
        for number, batch in enumerate(each):
            if batch.grid_thw is None or batch.pixel_values is None:
                continue
            grids = [(int(t), int(h), int(w)) for t, h, w in batch.grid_thw.tolist()]
            parts = batch.pixel_values.split([t * h * w for t, h, w in grids])
            for index, (thw, part) in enumerate(zip(grids, parts, strict=True)):
                clip = Clip(data_rank, number, index, thw)
                clips.append(clip)
                pixels[clip] = part
    first = {grid.sizes.coordinate(r, "data"): r for r in reversed(range(grid.sizes.ranks_per_stage))}
    return StepMedia(
        plan=decoupled.plan(clips),
        consumers=lambda data, number: media_consumers(batches[data][number], MEDIA_PAD, grid, first[data]),
        load_pixels=pixels.__getitem__,
    )


def _check(cases: list[GridCase], dtype: torch.dtype, vision: str) -> dict[str, float]:
    torch.set_num_threads(1)
    # Not in float32: AdamW divides gradients by their own size, and those of the keys' biases are nothing but rounding.
    bound = 1e-12
    worst = {}
    for case in cases:
        layers = max(4, case.sizes.pipeline * case.virtual_stages)
        losses, expected, clipped = run_alone(case.sizes.data, layers, dtype)
        assert clipped > 0
        grid = RankGrid.create(case.sizes)
        runtime, model = build(case, small_config(layers=layers), dtype, grid, vision)
        encoder_names = [name for name in model.parameters if not name.startswith("language_model.")]
        optimizer = ZeroOptimizer(
            model.parameters, model.layouts, grid, CONFIG, bucket_bytes=20_000, irregular=encoder_names
        )
        decoupled = decouple(case, model, grid, dtype) if vision == "dep" else None
        step = TrainStep(model, runtime, optimizer, grid, decoupled=decoupled)
        found = []
        for number in range(STEPS):
            batches = batches_of(number, case.sizes.data, dtype)
            media = None if decoupled is None else media_of(batches, grid, decoupled)
            outcome = step.run(batches[grid.index("data")], learning_rate=RATE, media=media)
            assert outcome.finite
            found.append(outcome.loss)
        assert found == pytest.approx(losses, rel=bound)
        worst[str(case)] = 0.0
        for name, parameter in model.parameters.items():
            wanted = local_part(expected[name], model.layouts[name], grid.sizes, grid.rank)
            error = relative_error(parameter.detach(), wanted)
            assert error <= bound, (str(case), name, error)
            worst[str(case)] = max(worst[str(case)], error)
    return worst


def case(schedule: str = "1f1b", virtual_stages: int = 1, projector: str = "encoder", **axes: int) -> GridCase:
    sizes = GridSizes(**axes)
    return GridCase(sizes=sizes, schedule=schedule, virtual_stages=virtual_stages, projector=projector)


CASES = {
    1: [case()],
    2: [case(pipeline=2), case(data=2, expert=2), case(tensor=2), case(context=2), case("zb_h1", pipeline=2)],
    4: [
        case("interleaved_1f1b", 2, pipeline=2, data=2, expert=2), case(context=2, tensor=2, expert=4),
        case("zb_h1", pipeline=2, tensor=2, expert_tensor=2), case("gpipe", pipeline=4),
    ],
    8: [
        case(pipeline=2, data=2, tensor=2, expert=4), case("interleaved_1f1b", 2, pipeline=2, context=2, data=2),
    ],
}  # fmt: skip


PROJECTED = {
    1: [case(projector="stage0")],
    2: [case(pipeline=2, projector="stage0"), case(context=2, projector="stage0")],
    4: [
        case("zb_h1", pipeline=2, tensor=2, expert_tensor=2, projector="stage0"),
        case("interleaved_1f1b", 2, pipeline=2, data=2, expert=2, projector="stage0"),
    ],
    8: [],
}  # fmt: skip
"""Of a decoupled encoder: the projector apart from it."""


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("vision", ["stage0", "dep"])
def test_three_steps_are_those_of_one_process(world_size: int, vision: str) -> None:
    cases = CASES[world_size] + (PROJECTED[world_size] if vision == "dep" else [])
    worst = run_ranks(world_size, _check, cases, torch.float64, vision, timeout=280)
    print({key: f"{max(each[key] for each in worst):.1e}" for key in worst[0]})


def _check_dep_bitwise(cases: list[GridCase]) -> None:
    """The loss and the backbone's gradients under DEP are those of the encoder in place, bit for bit."""
    torch.set_num_threads(1)
    dtype = torch.float32
    for each in cases:
        layers = max(4, each.sizes.pipeline * each.virtual_stages)
        config, grid = small_config(layers=layers), RankGrid.create(each.sizes)
        batches = batches_of(0, 1, dtype)
        plain, model = build(each, config, dtype, grid, "stage0")
        expected = plain.step(batches[0]).losses
        runtime, other = build(each, config, dtype, grid, "dep")
        decoupled = decouple(each, other, grid, dtype)
        media = media_of(batches, grid, decoupled)
        decoupled.begin(media.plan, media.consumers, media.load_pixels)
        fed = [replace(b, pixel_values=None, media=decoupled.media(i)) for i, b in enumerate(batches[0])]
        found = runtime.step(fed, schedule=decoupled.schedule(runtime.schedule), hooks=decoupled.hooks()).losses
        decoupled.finish()
        assert [float(x) for x in found] == [float(x) for x in expected]
        for name, parameter in other.parameters.items():
            if name.startswith("language_model."):
                gradient, wanted = parameter.grad, model.parameters[name].grad
                assert (gradient is None) == (wanted is None)
                assert gradient is None or torch.equal(gradient, wanted), (str(each), name)  # pyright: ignore[reportArgumentType]


def test_the_backbone_does_not_see_where_its_media_were_encoded() -> None:
    schedules = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("zb_h1", 1)]
    run_ranks(2, _check_dep_bitwise, [case(name, virtual, pipeline=2) for name, virtual in schedules])


def _check_after_a_failure(vision: str) -> None:
    """A step that failed leaves nothing: the next one is that of a run without it."""
    torch.set_num_threads(1)
    norms = []
    for fails in (False, True):
        grid, each = RankGrid.create(GridSizes()), case()
        runtime, model = build(each, small_config(), torch.float64, grid, vision)
        names = [name for name in model.parameters if not name.startswith("language_model.")]
        optimizer = ZeroOptimizer(model.parameters, model.layouts, grid, CONFIG, irregular=names)
        decoupled = decouple(each, model, grid, torch.float64) if vision == "dep" else None
        step = TrainStep(model, runtime, optimizer, grid, decoupled=decoupled)
        batches = batches_of(0, 1, torch.float64)
        media = None if decoupled is None else media_of(batches, grid, decoupled)
        if fails:
            wrong = batches[0][2].input_ids_T.clone()
            wrong[-1] = 10**6
            bad = [*batches[0][:2], replace(batches[0][2], input_ids_T=wrong), *batches[0][3:]]
            with pytest.raises(ValueError, match="token 1000000, accepted 0 to 95"):
                step.run(bad, learning_rate=RATE, media=media)
        norms.append(step.run(batches[0], learning_rate=RATE, media=media).gradient_norm)
    assert norms[0] == norms[1]


@pytest.mark.parametrize("vision", ["stage0", "dep"])
def test_a_step_that_failed_leaves_nothing_behind(vision: str) -> None:
    _check_after_a_failure(vision)
