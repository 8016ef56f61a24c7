"""Parameters of every kind, gradients that differ on every rank, and the plain rules on whole parameters."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k25sys.optim.muon_clip import MuonClipConfig
from k25sys.parallel import GridSizes, ParameterLayout, RankGrid
from k25sys.parallel.layout import local_part

WHOLE: dict[str, tuple[tuple[int, ...], ParameterLayout]] = {
    "rows": ((24, 10), ParameterLayout(shape=(24, 10), splits=((0, "tensor"),), matrix=True)),
    "columns": ((7, 16), ParameterLayout(shape=(7, 16), splits=((1, "tensor"),), matrix=True)),
    "replicated": ((5, 9), ParameterLayout(shape=(5, 9), matrix=True, sum_over_tensor=True)),
    "gate_up": (
        (8, 16, 6),
        ParameterLayout(
            shape=(8, 2, 8, 6), splits=((0, "expert"), (2, "expert_tensor")), matrix=True, expert=True
        ),
    ),
    "down": (
        (8, 6, 8),
        ParameterLayout(shape=(8, 6, 8), splits=((0, "expert"), (2, "expert_tensor")), matrix=True, expert=True),
    ),
    "norm": ((11,), ParameterLayout(shape=(11,), sum_over_tensor=True)),
    "embedding": ((32, 5), ParameterLayout(shape=(32, 5), splits=((0, "tensor"),))),
    "encoder": ((6, 13), ParameterLayout(shape=(6, 13), matrix=True, everywhere=True)),
    "encoder_bias": ((13,), ParameterLayout(shape=(13,), everywhere=True)),
}  # fmt: skip
EVERYWHERE = ("encoder", "encoder_bias")


def whole_parameter(name: str, stage: int, dtype: torch.dtype) -> Tensor:
    """The same on every rank of a stage; of the encoder, on every rank."""
    stage = 0 if name in EVERYWHERE else stage
    generator = torch.Generator().manual_seed(100 * stage + list(WHOLE).index(name))
    return torch.randn(WHOLE[name][0], generator=generator, dtype=torch.float64).to(dtype)


def summand(name: str, stage: int, rank_in_sum: int, step: int, dtype: torch.dtype) -> Tensor:
    """A whole-parameter gradient: one of those that are summed."""
    stage = 0 if name in EVERYWHERE else stage
    seed = 7919 * step + 101 * rank_in_sum + 13 * list(WHOLE).index(name) + 1009 * stage
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(WHOLE[name][0], generator=generator, dtype=torch.float64).to(dtype)


def summed_ranks(name: str, sizes: GridSizes) -> int:
    """How many summands make up a gradient: it depends on the grid, which the reference takes into account."""
    layout = WHOLE[name][1]
    return sizes.size(layout.replicas) * (sizes.tensor if layout.sum_over_tensor else 1)


def local_summand(name: str, grid: RankGrid, step: int, dtype: torch.dtype) -> Tensor:
    """This rank's part of its summand."""
    layout = WHOLE[name][1]
    number = grid.index(layout.replicas)
    if layout.sum_over_tensor:
        number = number * grid.size("tensor") + grid.index("tensor")
    whole = summand(name, grid.index("pipeline"), number, step, dtype)
    return local_part(whole, layout, grid.sizes, grid.rank)


@dataclass
class PlainState:
    """A whole parameter and its moments."""

    parameter: Tensor
    first: Tensor
    second: Tensor


class PlainMuonClip:
    """The rules of the report, written for whole float64 parameters on one process."""

    def __init__(self, sizes: GridSizes, dtype: torch.dtype, config: MuonClipConfig) -> None:
        self.sizes, self.dtype, self.config, self.steps = sizes, dtype, config, 0
        self.states: dict[tuple[str, int], PlainState] = {}
        for name in WHOLE:
            for stage in range(1 if name in EVERYWHERE else sizes.pipeline):
                whole = whole_parameter(name, stage, dtype).double()
                self.states[name, stage] = PlainState(whole, torch.zeros_like(whole), torch.zeros_like(whole))

    def step(self, learning_rate: float) -> float:
        """One step; the norm of the gradient."""
        self.steps += 1
        gradients = {}
        for name, stage in self.states:
            parts = [
                summand(name, stage, k, self.steps, self.dtype).double() for k in range(summed_ranks(name, self.sizes))
            ]
            gradients[name, stage] = torch.stack(parts).sum(0)
        norm = float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
        limit = self.config.max_gradient_norm
        scale = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        for key, state in self.states.items():
            self._update(key[0], state, gradients[key] * scale, learning_rate)
        return norm

    def _update(self, name: str, state: PlainState, gradient: Tensor, learning_rate: float) -> None:
        config, layout = self.config, WHOLE[name][1]
        if layout.matrix:
            state.first = config.momentum * state.first + gradient
            chosen = config.momentum * state.first + gradient if config.nesterov else state.first
            update = torch.stack([_muon(m) for m in chosen.view(-1, *layout.shape[-2:])]).view(gradient.shape)
        else:
            b1, b2 = config.adam_betas
            state.first = b1 * state.first + (1 - b1) * gradient
            state.second = b2 * state.second + (1 - b2) * gradient**2
            corrected = state.second / (1 - b2**self.steps)
            update = state.first / (1 - b1**self.steps) / (corrected.sqrt() + config.adam_epsilon)
        state.parameter = state.parameter - learning_rate * (update + config.weight_decay * state.parameter)


def _muon(m: Tensor) -> Tensor:
    x = m.T if m.shape[0] > m.shape[1] else m
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    x = x.T if m.shape[0] > m.shape[1] else x
    return x * 0.2 * max(m.shape) ** 0.5


def make_parameters(grid: RankGrid, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """This rank's parts."""
    stage = grid.index("pipeline")
    return {
        name: nn.Parameter(local_part(whole_parameter(name, stage, dtype), layout, grid.sizes, grid.rank))
        for name, (_, layout) in WHOLE.items()
    }
