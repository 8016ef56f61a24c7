"""Steps with parts of the model frozen are those of one process that trains the rest, on a pipeline and under DEP."""

import torch

from k25sys.optim import MuonClipConfig, ParameterGroup, ZeroOptimizer
from k25sys.optim.groups import match_groups
from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.layout import local_part
from k25sys.training.sharding_plan import plan
from k25sys.training.step import TrainStep
from tests.parallel.processes import run_ranks
from tests.training.batches import build_model, run_plain, small_config
from tests.training.test_grids import GridCase, build, relative_error
from tests.training.test_steps import RATE, batches_of, decouple, media_of

STEPS = 2
CONFIG = MuonClipConfig(max_logit=None, max_gradient_norm=None)
CASE = GridCase(sizes=GridSizes(pipeline=2, data=2, expert=2), schedule="zb_h1")
GROUPS = {
    "projector only": (ParameterGroup(pattern="mm_projector.*"), ParameterGroup(pattern="*", frozen=True)),
    "encoder frozen": (
        ParameterGroup(pattern="vision_tower.*", frozen=True), ParameterGroup(pattern="mm_projector.*", frozen=True),
        ParameterGroup(pattern="*.lm_head.weight", learning_rate_scale=0.5, weight_decay=0.0),
    ),
    "half an expert": (ParameterGroup(pattern="*.experts.down_proj", frozen=True),),
}  # fmt: skip


def frozen_of(names: list[str], groups: tuple[ParameterGroup, ...]) -> set[str]:
    return {name for name, number in match_groups(names, groups).items() if groups[number].frozen}


def run_alone(groups: tuple[ParameterGroup, ...]) -> dict[str, torch.Tensor]:
    """Gradients of everything, and an optimiser that does not know the frozen parameters."""
    config, sizes = small_config(), GridSizes()
    model = build_model(config, dtype=torch.float64)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = frozen_of(list(parameters), groups)
    trained = {name: p for name, p in parameters.items() if name not in frozen}
    rest = tuple(group for group in groups if not group.frozen)
    grid = RankGrid(sizes, 0, "cpu", {})
    optimizer = ZeroOptimizer(trained, plan(config, sizes), grid, CONFIG, groups=rest)
    for step in range(STEPS):
        batches = batches_of(step, CASE.sizes.data, torch.float64)
        run_plain(model, [batch for each in batches for batch in each], [])
        optimizer.step(RATE)
    return {name: parameter.detach() for name, parameter in parameters.items()}


def _check(vision: str) -> None:
    torch.set_num_threads(1)
    grid = RankGrid.create(CASE.sizes)
    for label, groups in GROUPS.items():
        expected = run_alone(groups)
        runtime, model = build(CASE, small_config(), torch.float64, grid, vision)
        start = {name: parameter.detach().clone() for name, parameter in model.parameters.items()}
        irregular = [name for name in model.parameters if not name.startswith("language_model.")]
        optimizer = ZeroOptimizer(
            model.parameters, model.layouts, grid, CONFIG, groups=groups, bucket_bytes=20_000, irregular=irregular
        )
        decoupled = decouple(CASE, model, grid, torch.float64, deterministic=True) if vision == "dep" else None
        step = TrainStep(model, runtime, optimizer, grid, decoupled=decoupled)
        for number in range(STEPS):
            batches = batches_of(number, CASE.sizes.data, torch.float64)
            media = None if decoupled is None else media_of(batches, grid, decoupled)
            assert step.run(batches[grid.index("data")], learning_rate=RATE, media=media).finite
        frozen = frozen_of(list(model.parameters), groups)
        for name, parameter in model.parameters.items():
            wanted = local_part(expected[name], model.layouts[name], grid.sizes, grid.rank)
            assert relative_error(parameter.detach(), wanted) <= 1e-12, (label, name)
            assert torch.equal(parameter.detach(), start[name]) == (name in frozen), (label, name)


def test_frozen_parts_with_the_encoder_on_the_first_stage() -> None:
    run_ranks(4, _check, "stage0")


def test_frozen_parts_with_a_decoupled_encoder() -> None:
    run_ranks(4, _check, "dep")
