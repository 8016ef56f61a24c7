"""Parameter groups: the first match decides; scales and decays are the plain rules'; frozen parameters stay."""

from dataclasses import replace

import pytest
import torch

from k25sys.errors import ArgumentValueError
from k25sys.optim import MuonClipConfig, ParameterGroup, ZeroOptimizer
from k25sys.optim.groups import match_groups
from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.layout import local_part
from tests.optim.test_zero import LAYOUTS, RATE, add_gradients, relative_error
from tests.optim.toy import PlainMuonClip, make_parameters
from tests.parallel.processes import run_ranks

GROUPS = (
    ParameterGroup(pattern="encoder", learning_rate_scale=0.25, weight_decay=0.0),
    ParameterGroup(pattern="encoder*", frozen=True),
    ParameterGroup(pattern="norm", weight_decay=0.0),
    ParameterGroup(pattern="embedding", learning_rate_scale=2.0),
    ParameterGroup(pattern="gate*", frozen=True),
    ParameterGroup(pattern="down", learning_rate_scale=0.0, weight_decay=0.5),
)
FROZEN = {"encoder_bias", "gate_up"}
SCALES = {"encoder": (0.25, 0.0), "norm": (1.0, 0.0), "embedding": (2.0, 0.1), "down": (0.0, 0.5)}


def alone(parameters: dict | None = None, **options: object) -> ZeroOptimizer:
    grid = RankGrid(GridSizes(), 0, "cpu", {})
    parameters = parameters or make_parameters(grid, torch.float32)
    return ZeroOptimizer(parameters, LAYOUTS, grid, MuonClipConfig(), **options)  # pyright: ignore[reportArgumentType]


def _check(axes: dict[str, int], adamw: str) -> None:
    """Against the plain rules, run once for each pair of scale and decay on the gradients of all that is not frozen."""
    torch.set_num_threads(1)
    sizes = GridSizes(**axes)
    grid = RankGrid.create(sizes)
    parameters = make_parameters(grid, torch.float64)
    config = MuonClipConfig(max_gradient_norm=None)
    optimizer = ZeroOptimizer(parameters, LAYOUTS, grid, config, groups=GROUPS, adamw=adamw, bucket_bytes=600)
    assert set(optimizer.frozen) == FROZEN
    assert {shard.name for shard in optimizer.shards()}.isdisjoint(FROZEN)
    assert {name for name, p in parameters.items() if not p.requires_grad} == FROZEN
    assert not any(hasattr(parameters[name], "main_grad") for name in FROZEN)
    before = {name: parameters[name].detach().clone() for name in FROZEN}
    trained = {name: p for name, p in parameters.items() if name not in FROZEN}
    pairs = {SCALES.get(name, (1.0, 0.1)) for name in parameters}
    plain = {pair: PlainMuonClip(sizes, torch.float64, replace(config, weight_decay=pair[1])) for pair in pairs}
    for step in range(1, 4):
        add_gradients(optimizer, trained, grid, step, torch.float64)
        assert optimizer.gradients.started
        optimizer.step(RATE, {"gate_up": torch.full((2,), float("nan"))})
        for (scale, _), rules in plain.items():
            rules.step(RATE * scale)
    for name, parameter in trained.items():
        stage = 0 if name.startswith("encoder") else grid.index("pipeline")
        whole = plain[SCALES.get(name, (1.0, 0.1))].states[name, stage].parameter
        assert relative_error(parameter.detach(), local_part(whole, LAYOUTS[name], sizes, grid.rank)) <= 1e-13, name
    assert all(torch.equal(before[name], parameters[name]) for name in FROZEN)


@pytest.mark.parametrize("adamw", ["reference", "torch"])
def test_groups_are_the_plain_rules_with_their_constants(adamw: str) -> None:
    run_ranks(4, _check, {"pipeline": 2, "data": 2, "expert": 2}, adamw)


def test_one_group_of_everything_changes_nothing() -> None:
    found = []
    for groups in ((), (ParameterGroup(pattern="*"),)):
        grid = RankGrid(GridSizes(), 0, "cpu", {})
        parameters = make_parameters(grid, torch.float32)
        optimizer = alone(parameters, groups=groups)
        for step in (1, 2):
            add_gradients(optimizer, parameters, grid, step, torch.float32)
            optimizer.step(RATE)
        found.append(parameters)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def _unmatched_on_a_stage() -> str:
    """A pattern that matches on one stage only is no mistake; one that matches on none is one on all ranks."""
    grid = RankGrid.create(GridSizes(pipeline=2))
    parameters = make_parameters(grid, torch.float32)
    if grid.rank == 0:
        del parameters["norm"]
    groups = [ParameterGroup(pattern="norm", learning_rate_scale=0.5)]
    ZeroOptimizer(parameters, LAYOUTS, grid, MuonClipConfig(), groups=groups)
    with pytest.raises(ArgumentValueError) as error:
        ZeroOptimizer(parameters, LAYOUTS, grid, MuonClipConfig(), groups=[
            ParameterGroup(pattern="rows"), ParameterGroup(pattern="vision.*"), ParameterGroup(pattern="row*"),
        ])  # fmt: skip
    return str(error.value)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    for text in run_ranks(2, _unmatched_on_a_stage):
        assert text.startswith("ZeroOptimizer: groups: got 'vision.*', 'row*', accepted patterns that match")


def test_the_first_match_decides() -> None:
    names = ["vision_tower.a.weight", "mm_projector.b.weight", "language_model.lm_head.weight"]
    groups = [ParameterGroup(pattern="mm_*"), ParameterGroup(pattern="*.weight"), ParameterGroup(pattern="vision*")]
    assert match_groups(names, groups) == {names[0]: 1, names[1]: 0, names[2]: 1}
    assert match_groups(names, [ParameterGroup(pattern="weight")]) == {}


def test_frozen_parameters_may_be_trained_again() -> None:
    grid = RankGrid(GridSizes(), 0, "cpu", {})
    parameters = make_parameters(grid, torch.float32)
    alone(parameters)
    first = alone(parameters, groups=[ParameterGroup(pattern="rows", frozen=True)])
    assert not hasattr(parameters["rows"], "main_grad")
    assert set(first.frozen) == {"rows"}
    with pytest.raises(ArgumentValueError, match="parameters: got rows without requires_grad"):
        alone(parameters)
    parameters["rows"].requires_grad_(True)
    assert alone(parameters).frozen == {}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"learning_rate_scale": -1.0}, "ParameterGroup: learning_rate_scale: got -1.0"),
        ({"weight_decay": float("nan")}, "ParameterGroup: weight_decay: got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(fields: dict, text: str) -> None:
    with pytest.raises(ArgumentValueError) as error:
        ParameterGroup(pattern="*", **fields)
    assert text in str(error.value)
