"""Tensor parallel layers with sequence parallel around them: heads and widths are split over the axis "tensor".

Between layers a rank holds its own consecutive rows of the tokens. A column-parallel layer gathers the rows of all
ranks and gives its own output columns; a row-parallel one takes its own input columns and scatters the rows of the
sum. Gathered inputs are not kept: the backward gathers them again, while it computes the gradient of the input; the
reduce-scatter of that gradient runs while the weight's is computed.

Layers take over a whole layer, whose tensors may be on meta, and keep this rank's part under the same names.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from k25sys.parallel.collectives import Group, all_gather, gather_rows, reduce_scatter, reduce_scatter_rows
from k25sys.parallel.grid import RankGrid
from k25sys.parallel.layout import ParameterLayout, local_part
from k25sys.parallel.weight_grads import WeightGradStore, accumulate_gradient, linear


def split_rows(parameter: Tensor, name: str, grid: RankGrid) -> nn.Parameter:
    """This rank's rows of a weight (N, K), or of a bias (N,)."""
    return _part(parameter, name, ParameterLayout(shape=tuple(parameter.shape), splits=((0, "tensor"),)), grid)


def split_columns(parameter: Tensor, name: str, grid: RankGrid) -> nn.Parameter:
    """This rank's columns of a weight (N, K)."""
    return _part(parameter, name, ParameterLayout(shape=tuple(parameter.shape), splits=((1, "tensor"),)), grid)


def _part(parameter: Tensor, name: str, layout: ParameterLayout, grid: RankGrid) -> nn.Parameter:
    layout.check(name, grid.sizes)
    part = local_part(parameter.detach(), layout, grid.sizes, grid.rank)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()


class _GatheredLinears(torch.autograd.Function):
    """The rows of all ranks through several weights: one gather for all of them."""

    @staticmethod
    def forward(ctx: Any, group: Group, store: WeightGradStore, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x)
        ctx.weights, ctx.group, ctx.store = weights, group, store
        rows, _ = all_gather(x, group)
        return tuple(F.linear(rows, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        weights, group, store = ctx.weights, ctx.group, ctx.store
        trained = [weight.requires_grad for weight in weights]
        rows, gathering = all_gather(x, group, async_op=True) if any(trained) else (x, None)
        grad_x, scattering = None, None
        if ctx.needs_input_grad[2]:
            grad_rows = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                grad_rows += grad @ weight
            grad_x, scattering = reduce_scatter(grad_rows, group, async_op=True)

        def compute() -> None:
            for grad, weight, needed in zip(grads, weights, trained, strict=True):
                if needed:
                    accumulate_gradient(weight, grad.T @ rows)

        _wait(gathering)
        if any(trained):
            store.put(compute)
        _wait(scattering)
        return None, None, grad_x, *(None for _ in weights)


def gathered_linears(x: Tensor, weights: tuple[Tensor, ...], group: Group, store: WeightGradStore) -> list[Tensor]:
    """x W^T of the rows of all ranks, for each W.

    Args:
        x: (T, K), this rank's rows.
        weights: (N, K) each, leaves.

    Returns:
        (size * T, N) for each weight.
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in weights)):
        return list(_GatheredLinears.apply(group, store, x, *weights))
    rows, _ = all_gather(x, group)
    return [F.linear(rows, weight) for weight in weights]


class ColumnParallelLinear(nn.Module):
    """Output columns split over "tensor": weight (N / size, K).

    Args:
        layer: nn.Linear without bias.
        gather_input: the input is this rank's rows, and is gathered; else it is the rows of all ranks already, and its
            gradient is this rank's part of a sum.

    Raises:
        GridError: an axis that does not divide N. ValueError: a layer with a bias.
    """

    def __init__(self, layer: nn.Linear, grid: RankGrid, store: WeightGradStore, *, gather_input: bool) -> None:
        super().__init__()
        assert layer.bias is None
        self.weight = split_rows(layer.weight, "weight", grid)
        self.gather_input, self.store, self.group = gather_input, store, grid.group("tensor")

    def forward(self, x: Tensor) -> Tensor:
        """(T, K), or (size * T, K) without gather_input, -> (size * T, N / size)."""
        if self.gather_input:
            return gathered_linears(x, (self.weight,), self.group, self.store)[0]
        return linear(x, self.weight, None, self.store)


class RowParallelLinear(nn.Module):
    """Input columns split over "tensor": weight (N, K / size); the rows of the sum are scattered.

    Raises:
        GridError: an axis that does not divide K.
    """

    def __init__(self, layer: nn.Linear, grid: RankGrid, store: WeightGradStore) -> None:
        super().__init__()
        assert layer.bias is None
        self.weight = split_columns(layer.weight, "weight", grid)
        self.store, self.group = store, grid.group("tensor")

    def forward(self, x: Tensor) -> Tensor:
        """(size * T, K / size) -> (T, N)."""
        return reduce_scatter_rows(linear(x, self.weight, None, self.store), self.group)


class SequenceGatheredLinear(nn.Module):
    """A whole weight on every rank, applied to this rank's rows; the output's rows are gathered.

    For outputs narrower than inputs (MLA's latents), whose gather costs less than the input's. Gradients of the weight
    are sums over this rank's rows: ParameterLayout.sum_over_tensor.
    """

    def __init__(self, layer: nn.Linear, grid: RankGrid, store: WeightGradStore) -> None:
        super().__init__()
        assert layer.bias is None
        self.weight, self.store, self.group = layer.weight, store, grid.group("tensor")

    def forward(self, x: Tensor) -> Tensor:
        """(T, K) -> (size * T, N)."""
        return gather_rows(linear(x, self.weight, None, self.store), self.group)


class _Weight(nn.Module):
    """A weight under the name that it had in the whole layer."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class TensorParallelSwiGLU(nn.Module):
    """down(activate(gate(x), up(x))) of this rank's rows: one gather, and one reduce-scatter.

    Args:
        swiglu: a module with gate_proj, up_proj and down_proj, and `activate`.

    Raises:
        GridError: an axis that does not divide the width.
    """

    def __init__(self, swiglu: nn.Module, grid: RankGrid, store: WeightGradStore) -> None:
        super().__init__()
        weight = {name: swiglu.get_parameter(f"{name}.weight") for name in ("gate_proj", "up_proj", "down_proj")}
        self.gate_proj = _Weight(split_rows(weight["gate_proj"], "gate_proj", grid))
        self.up_proj = _Weight(split_rows(weight["up_proj"], "up_proj", grid))
        self.down_proj = _Weight(split_columns(weight["down_proj"], "down_proj", grid))
        self.activate: Callable[[Tensor, Tensor], Tensor] = swiglu.activate  # pyright: ignore[reportAttributeAccessIssue]
        self.store, self.group = store, grid.group("tensor")

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        if self.group is None:  # two functions, as in the whole layer: the sum of their gradients is autograd's
            gate = linear(x, self.gate_proj.weight, None, self.store)
            up = linear(x, self.up_proj.weight, None, self.store)
        else:
            weights = (self.gate_proj.weight, self.up_proj.weight)
            gate, up = gathered_linears(x, weights, self.group, self.store)
        act = self.activate(gate, up)
        return reduce_scatter_rows(linear(act, self.down_proj.weight, None, self.store), self.group)
