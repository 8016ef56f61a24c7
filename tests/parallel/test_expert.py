"""Experts over ranks give what one process gives on all tokens together: outputs, all gradients, and nothing hangs."""

from collections import defaultdict

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from k25sys import ops
from k25sys.parallel import GridSizes, RankGrid, WeightGradStore
from k25sys.parallel.expert import ExpertParallel, expert_layouts
from tests.parallel.processes import run_ranks

NUM_EXPERTS, DIM, WIDTH, TOP_K = 8, 48, 16, 3


class Experts(nn.Module):
    """The whole layer, the same on every rank."""

    def __init__(self, dtype: torch.dtype = torch.float32, dim: int = DIM, device: str = "cpu") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        gate_up = torch.randn(NUM_EXPERTS, 2 * WIDTH, dim, generator=generator, dtype=torch.float64) * dim**-0.5
        down = torch.randn(NUM_EXPERTS, dim, WIDTH, generator=generator, dtype=torch.float64) * WIDTH**-0.5
        self.gate_up_proj = nn.Parameter(gate_up.to(device, dtype))
        self.down_proj = nn.Parameter(down.to(device, dtype))


def _tokens_of(case: str, rank: int) -> int:
    return {"no_tokens": 0, "one_rank": 9 if rank == 1 else 0}.get(case, 5 + 3 * rank if rank != 2 else 0)


def _inputs(case: str, rank: int, dtype: torch.dtype, dim: int = DIM) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, routing weights, experts and the output's gradient of a rank."""
    generator = torch.Generator().manual_seed(100 + rank)
    num_tokens, top_k = _tokens_of(case, rank), 1 if case == "one_expert" else TOP_K
    x_TD = torch.randn(num_tokens, dim, generator=generator, dtype=torch.float64).to(dtype)
    weights_TK = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64)
    weights_TK = weights_TK.to(dtype if dtype == torch.float64 else torch.float32)
    experts_TK = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :top_k].int()
    if case == "one_expert":
        experts_TK[:] = 5
    elif case == "idle_experts":
        experts_TK = experts_TK % 2 * 5 + 1  # 1 and 6, some tokens twice
    grad_TD = torch.randn(num_tokens, dim, generator=generator, dtype=torch.float64).to(dtype)
    return x_TD.requires_grad_(), weights_TK.requires_grad_(), experts_TK, grad_TD


def _one_process(case: str, world_size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """ops.expert_mlp on the tokens of all ranks."""
    whole = Experts(dtype)
    x, weights, experts, grad = (
        torch.cat(parts).detach()
        for parts in zip(*(_inputs(case, rank, dtype) for rank in range(world_size)), strict=True)
    )
    x.requires_grad_()
    weights.requires_grad_()
    y = ops.expert_mlp(x, whole.gate_up_proj, whole.down_proj, weights, experts)
    y.backward(grad)
    grads = {"y": y.detach(), "x": x.grad, "weights": weights.grad}
    grads |= {"gate_up_proj": whole.gate_up_proj.grad, "down_proj": whole.down_proj.grad}
    return {name: value for name, value in grads.items() if value is not None}


def _own(expected: dict[str, Tensor], case: str, grid: RankGrid) -> dict[str, Tensor]:
    """This rank's part of what one process computed."""
    before = sum(_tokens_of(case, rank) for rank in range(grid.rank))
    tokens = slice(before, before + _tokens_of(case, grid.rank))
    own = {name: expected[name][tokens] for name in ("y", "x", "weights")}
    for name, layout in expert_layouts(NUM_EXPERTS, DIM, WIDTH).items():
        box = tuple(slice(*ends) for ends in layout.box(grid.sizes, grid.rank))
        own[name] = expected[name].view(layout.shape)[box].flatten(1, -2)
    return own


def _difference(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    assert value.dtype == expected.dtype
    if not expected.numel():
        return 0.0
    return float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _summed(parameter: nn.Parameter, grid: RankGrid) -> Tensor:
    assert parameter.grad is not None
    if (group := grid.group("expert_data")) is not None:
        dist.all_reduce(parameter.grad, group=group)
    return parameter.grad


CASES = ("mixed", "one_expert", "idle_experts", "one_rank", "no_tokens")


def _differences_from_one_process(sizes: GridSizes) -> dict[tuple[str, str], float]:
    grid, worst = RankGrid.create(sizes), defaultdict(float)
    for dtype in (torch.float32, torch.float64):
        for case in CASES:
            expected = _own(_one_process(case, sizes.world_size, dtype), case, grid)
            layer = ExpertParallel(Experts(dtype), grid, WeightGradStore())
            x, weights, experts, grad = _inputs(case, grid.rank, dtype)
            y = layer(x, weights, experts)
            y.backward(grad)
            got = {"y": y.detach(), "x": x.grad, "weights": weights.grad}
            got |= {name: _summed(parameter, grid) for name, parameter in layer.named_parameters()}
            for name, value in got.items():
                assert value is not None
                key = (str(dtype), name)
                worst[key] = max(worst[key], _difference(value, expected[name]))
    return dict(worst)


GRIDS = {
    2: {"EP2": GridSizes(data=2, expert=2), "ETP2": GridSizes(tensor=2, expert_tensor=2), "DP2": GridSizes(data=2)},
    4: {
        "EP4": GridSizes(data=2, context=2, expert=4),
        "EP2xDP2": GridSizes(data=4, expert=2),
        "ETP2xDP2": GridSizes(data=2, tensor=2, expert_tensor=2),
        "EP2xETP2": GridSizes(data=2, tensor=2, expert=2, expert_tensor=2),
    },
    8: {"EP8": GridSizes(data=8, expert=8), "EP2xETP2xDP2": GridSizes(data=4, tensor=2, expert=2, expert_tensor=2)},
}


def _all_grids(world_size: int) -> dict[str, dict[tuple[str, str], float]]:
    return {name: _differences_from_one_process(sizes) for name, sizes in GRIDS[world_size].items()}


@pytest.mark.parametrize("world_size", GRIDS)
def test_equal_to_one_process(world_size: int) -> None:
    for differences in run_ranks(world_size, _all_grids, world_size):
        for grid, worst in differences.items():
            for (dtype, name), difference in worst.items():
                assert difference <= (1e-6 if dtype == "torch.float32" else 1e-13), (grid, dtype, name, difference)
