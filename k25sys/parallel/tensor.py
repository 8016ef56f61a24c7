"""Linear layers whose weights are split over the tensor ranks, between tokens that are split over the same ranks.

Shape suffixes: T tokens of the tensor group, N = T / ranks of this rank, K channels in, I channels out or between.

Tensor parallelism comes with sequence parallelism (arXiv 2205.05198): between layers a rank has N tokens; where a layer
needs all T, they are gathered, and its output is summed and scattered. A layer that gathers its input saves its own N
rows alone and gathers them again in the backward. There, in the order of the calls,

    the input's gather starts | GEMM of the input's gradient | its reduce-scatter starts | GEMM of the weight's gradient

so that either communication has a GEMM to hide behind. On NCCL a trace shows two streams, each collective beside the
GEMM that follows it in this list (CUDA_DEVICE_MAX_CONNECTIONS=1 keeps the order of their launches); gloo moves bytes on
threads of its own. In a WeightGradStore that defers, the weight's half gathers when it runs: what waits is N rows.

Each layer takes the whole layer and keeps this rank's part, in the parameters' own names; a layer on meta stays there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from k25sys.errors import ArgumentTypeError, GridError, ShapeError, message
from k25sys.parallel.collectives import (
    Group,
    all_reduce,
    gather_rows,
    reduce_scatter_rows,
    start_gather,
    start_reduce_scatter,
)
from k25sys.parallel.grid import RankGrid
from k25sys.parallel.layout import ParameterLayout, local_part
from k25sys.parallel.weight_grads import WeightGradStore, accumulate_gradient, linear


def own_part(parameter: Tensor, grid: RankGrid, dim: int) -> Tensor:
    """This rank's part of a parameter that is split along `dim` over "tensor"; one rank keeps the parameter itself."""
    if grid.size("tensor") == 1:
        return parameter
    layout = ParameterLayout(shape=tuple(parameter.shape), splits=((dim, "tensor"),))
    part = local_part(parameter, layout, grid.sizes, grid.rank)
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


def check_split(op: str, name: str, size: int, unit: int, grid: RankGrid) -> None:
    """Raises GridError unless `size`, in units of `unit` that stay together, divides over the tensor ranks."""
    ranks = grid.size("tensor")
    if unit < 1 or size % (unit * ranks):
        units = "" if unit == 1 else f" in units of {unit}"
        accepted = f"a multiple of {ranks}{'' if unit == 1 else f' x {unit}'}"
        raise GridError(message(op, name, f"{size}{units} over {ranks} tensor ranks", accepted))


def _linear_layer(op: str, layer: object) -> nn.Linear:
    if not isinstance(layer, nn.Linear):
        raise ArgumentTypeError(message(op, "layer", type(layer).__name__, "a torch.nn.Linear"))
    return layer


def accumulating(parameter: Tensor) -> Tensor:
    """A parameter for an op that gives its gradient to autograd: it lands where other weight gradients do."""
    return _Accumulating.apply(parameter)


class _Accumulating(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> None:
        accumulate_gradient(ctx.parameter, grad)


class _Linear(nn.Module):
    """What the layers below share: the parameters of an nn.Linear, or parts of them."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, grid: RankGrid, store: WeightGradStore) -> None:
        super().__init__()
        self.group, self.store = grid.group("tensor"), store

    def extra_repr(self) -> str:
        """Sizes of this rank's part."""
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, bias={self.bias is not None}"


class ColumnParallelLinear(_Linear):
    """A rank has some of the outputs, for all T tokens.

    Args:
        layer: the whole layer, weight (I, K).
        grid: splits I over "tensor".
        store: of the weight gradients.
        gather_input: True: the input is this rank's N tokens, and so is its gradient. False: the input is all T tokens
            already, and its gradient the summand of this rank's outputs: `gather_rows` before
            this layer sums it.
        unit: outputs that stay together: the channels of an attention head.

    Raises:
        GridError: I does not divide.
    """

    def __init__(
        self, layer: nn.Linear, grid: RankGrid, store: WeightGradStore, *, gather_input: bool, unit: int = 1
    ) -> None:
        super().__init__(grid, store)
        _linear_layer("ColumnParallelLinear", layer)
        check_split("ColumnParallelLinear", "out_features", layer.out_features, unit, grid)
        self.weight = own_part(layer.weight, grid, 0)
        self.bias = None if layer.bias is None else own_part(layer.bias, grid, 0)
        self.gather_input = gather_input

    def forward(self, x: Tensor) -> Tensor:
        """(N, K) (or (..., K) where the input is gathered already) -> (T, I / ranks)."""
        if self.gather_input:
            return gathered_linears(x, [self], self.group, self.store)[0]
        return linear(x, self.weight, self.bias, self.store)


class RowParallelLinear(_Linear):
    """A rank has some of the inputs of all T tokens, and what it makes of them is a summand of the output.

    Args:
        layer: the whole layer, weight (K, I), bias added once.
        grid: splits I over "tensor".
        store: of the weight gradients.
        reduce_scatter_output: True: a rank gets the sum for its N tokens, and gathers the gradient in the backward.
            False: every rank gets all T.
        unit: inputs that stay together: the channels of an attention head.

    Raises:
        GridError: I does not divide.
        ShapeError: T does not divide, in the forward.
    """

    def __init__(
        self, layer: nn.Linear, grid: RankGrid, store: WeightGradStore, *, reduce_scatter_output: bool, unit: int = 1
    ) -> None:
        super().__init__(grid, store)
        _linear_layer("RowParallelLinear", layer)
        check_split("RowParallelLinear", "in_features", layer.in_features, unit, grid)
        self.weight = own_part(layer.weight, grid, 1)
        self.bias = layer.bias
        self.reduce_scatter_output = reduce_scatter_output

    def forward(self, x: Tensor) -> Tensor:
        """(T, I / ranks) -> (N, K), or (T, K) without reduce-scatter."""
        if self.group is None:
            return linear(x, self.weight, self.bias, self.store)
        summand = linear(x, self.weight, None, self.store)
        total = (reduce_scatter_rows if self.reduce_scatter_output else all_reduce)(summand, self.group)
        return total if self.bias is None else total + accumulating(self.bias)


class SequenceGatheredLinear(_Linear):
    """A whole weight on this rank's tokens, whose output is gathered: for outputs that are narrower than the input.

    MLA's down-projections send 2,112 channels a token of Kimi K2.5 (1,536 of queries, 512 + 64 of latent and rotated
    key) where gathering their input would send 7,168. What follows on every rank is a part of the heads, so that the
    gradient that comes back is a summand: the backward sums and scatters it. The weight's gradient covers N tokens:
    sum it over "tensor".
    """

    def __init__(self, layer: nn.Linear, grid: RankGrid, store: WeightGradStore) -> None:
        super().__init__(grid, store)
        _linear_layer("SequenceGatheredLinear", layer)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x_NK: Tensor) -> Tensor:
        """(N, K) -> (T, I)."""
        return gather_rows(linear(x_NK, self.weight, self.bias, self.store), self.group)


class TensorParallelSwiGLU(nn.Module):
    """down(activate(gate(x), up(x))) with the width split over "tensor"; the input is gathered once for gate and up.

    Args:
        swiglu: a module with gate_proj, up_proj (I, D) and down_proj (D, I), whose names stay, and `activate`.
        grid, store: as above.

    Raises:
        GridError: I does not divide.
    """

    def __init__(self, swiglu: nn.Module, grid: RankGrid, store: WeightGradStore) -> None:
        super().__init__()
        gate, up, down = (
            _linear_layer("TensorParallelSwiGLU", swiglu.get_submodule(name))
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        self.gate_proj = ColumnParallelLinear(gate, grid, store, gather_input=True)
        self.up_proj = ColumnParallelLinear(up, grid, store, gather_input=True)
        self.down_proj = RowParallelLinear(down, grid, store, reduce_scatter_output=True)
        self.activate: Callable[[Tensor, Tensor], Tensor] = swiglu.activate  # pyright: ignore[reportAttributeAccessIssue]
        self.group, self.store = grid.group("tensor"), store

    def forward(self, x_ND: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        gate_TI, up_TI = gathered_linears(x_ND, [self.gate_proj, self.up_proj], self.group, self.store)
        return self.down_proj(self.activate(gate_TI, up_TI))


def gathered_linears(
    x_NK: Tensor, layers: Sequence[ColumnParallelLinear], group: Group, store: WeightGradStore
) -> tuple[Tensor, ...]:
    """Several column-parallel layers of one input: (N, K) -> (T, I / ranks) of each. One gather, one reduce-scatter.

    Raises:
        ShapeError: x has not two dimensions.
    """
    if x_NK.dim() != 2:
        raise ShapeError(message("ColumnParallelLinear", "x", f"shape {tuple(x_NK.shape)}", "(N, K): rows of tokens"))
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if group is None:  # exactly what the whole layers compute, bit by bit
        return tuple(linear(x_NK, weight, bias, store) for weight, bias in zip(weights, biases, strict=True))
    return _GatheredLinears.apply(x_NK, group, store, *weights, *biases)


class _GatheredLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, store: WeightGradStore, *parameters: Any) -> tuple[Tensor, ...]:
        weights, biases = parameters[: len(parameters) // 2], parameters[len(parameters) // 2 :]
        # Saved, weights are checked for changes; under saved-tensor hooks they come back as other objects, without
        # their main_grad.
        ctx.save_for_backward(x, *weights)
        ctx.group, ctx.store, ctx.weights, ctx.biases = group, store, weights, biases
        rows = start_gather(x, group).wait()
        return tuple(F.linear(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, group, store = ctx.saved_tensors[0], ctx.weights, ctx.group, ctx.store
        needs = ctx.needs_input_grad[3:]
        targets = [p if need else None for p, need in zip((*weights, *ctx.biases), needs, strict=True)]
        with_weights = any(weight is not None for weight in targets[: len(weights)])
        gathering = start_gather(x, group) if with_weights and not store.is_deferring else None
        scattering = None
        if ctx.needs_input_grad[0]:
            grad_rows = grads[0] @ weights[0]
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                grad_rows.addmm_(grad, weight)
            scattering = start_reduce_scatter(grad_rows, group)

        def compute() -> None:
            rows = None
            if with_weights:
                rows = (gathering or start_gather(x, group)).wait()
            for grad, weight, bias in zip(grads, targets[: len(weights)], targets[len(weights) :], strict=True):
                if weight is not None and rows is not None:
                    accumulate_gradient(weight, grad.T @ rows)
                if bias is not None:
                    accumulate_gradient(bias, grad.sum(0))

        if with_weights or any(needs):
            store.put(compute)
        return None if scattering is None else scattering.wait(), None, None, *(None for _ in needs)
