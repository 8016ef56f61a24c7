"""SwiGLU over rows that hold gate first, then up."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k25sys.errors import ShapeError, message
from k25sys.ops import checks, native


def reference_swiglu(gate_up_MG: Tensor) -> Tensor:
    """`swiglu` in plain torch: computed in float32 (float64) and rounded once."""
    gate_MI, up_MI = gate_up_MG.to(checks.routing_dtype(gate_up_MG.dtype)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate_MI) * up_MI).to(gate_up_MG.dtype)


def swiglu(gate_up_MG: Tensor) -> Tensor:
    """silu(gate) * up for rows [gate, up].

    Args:
        gate_up_MG: (M, 2I) float32, bfloat16 (computed in float32, rounded once) or float64.

    Returns:
        act_MI (M, I), differentiable once.

    Raises:
        TypeError, ValueError: a wrong dtype, rank or device, or an odd number of columns.
    """
    return _OP(gate_up_MG)


def _check(gate_up: Tensor) -> None:
    checks.tensor("swiglu", "gate_up_MG", gate_up, checks.FLOATS, (None, None), "MG")
    checks.same_device("swiglu", "gate_up_MG", gate_up, {})
    checks.row_count("swiglu", "gate_up_MG", gate_up.shape[0], 1)
    if gate_up.shape[1] % 2:
        raise ShapeError(
            message("swiglu", "gate_up_MG", f"{gate_up.shape[1]} columns", "an even number: gate, then up")
        )


def _fake(gate_up: Tensor) -> Tensor:
    _check(gate_up)
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


def _kernel(gate_up: Tensor) -> Tensor:
    _check(gate_up)
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    act, gate_up = native.empty((num_rows, width), gate_up), gate_up.contiguous()
    native.kernels("swiglu", act.device).swiglu(
        gate_up.data_ptr(), act.data_ptr(), num_rows, width, native.DTYPE_CODES[act.dtype], native.where(act.device)
    )
    return act


def _backward_check(grad_act: Tensor, gate_up: Tensor) -> None:
    _check(gate_up)
    shape = (gate_up.shape[0], gate_up.shape[1] // 2)
    checks.tensor("swiglu_backward", "grad_act_MI", grad_act, (gate_up.dtype,), shape, "MI")
    checks.same_device("swiglu_backward", "gate_up_MG", gate_up, {"grad_act_MI": grad_act})


def _backward_fake(grad_act: Tensor, gate_up: Tensor) -> Tensor:
    _backward_check(grad_act, gate_up)
    return gate_up.new_empty(gate_up.shape)


def _backward_kernel(grad_act: Tensor, gate_up: Tensor) -> Tensor:
    _backward_check(grad_act, gate_up)
    grad = native.empty(gate_up.shape, gate_up)
    grad_act, gate_up = grad_act.contiguous(), gate_up.contiguous()
    native.kernels("swiglu", grad.device).swiglu_backward(
        grad_act.data_ptr(), gate_up.data_ptr(), grad.data_ptr(), *grad_act.shape, native.DTYPE_CODES[grad.dtype],
        native.where(grad.device),
    )  # fmt: skip
    return grad


def _weighted_check(grad_act: Tensor, gate_up: Tensor, weights: Tensor, slot_of_row: Tensor) -> None:
    op = "weighted_swiglu_backward"
    _backward_check(grad_act, gate_up)
    checks.tensor(op, "weights_TK", weights, (checks.routing_dtype(gate_up.dtype),), (None, None), "TK")
    rows = (weights.shape[0] * weights.shape[1],)
    checks.tensor(op, "plan.slot_of_row_M", slot_of_row, checks.INT32, rows, "M", checks.PLAN_HINT)
    checks.tensor(op, "gate_up_MG", gate_up, checks.FLOATS, (*rows, None), "MG", checks.PLAN_HINT)
    checks.same_device(op, "gate_up_MG", gate_up, {"weights_TK": weights, "plan.slot_of_row_M": slot_of_row})


def _weighted_fake(
    grad_act: Tensor, gate_up: Tensor, weights: Tensor, slot_of_row: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _weighted_check(grad_act, gate_up, weights, slot_of_row)
    return gate_up.new_empty(gate_up.shape), grad_act.new_empty(grad_act.shape), weights.new_empty(weights.shape)


def _weighted_kernel(
    grad_act: Tensor, gate_up: Tensor, weights: Tensor, slot_of_row: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _weighted_check(grad_act, gate_up, weights, slot_of_row)
    grad, act = native.empty(gate_up.shape, gate_up), native.empty(grad_act.shape, gate_up)
    grad_weights = native.empty(weights.shape, weights)
    grad_act, gate_up, weights, slot_of_row = (t.contiguous() for t in (grad_act, gate_up, weights, slot_of_row))
    native.kernels("swiglu", grad.device).weighted_swiglu_backward(
        grad_act.data_ptr(), gate_up.data_ptr(), weights.data_ptr(), slot_of_row.data_ptr(), grad.data_ptr(),
        act.data_ptr(), grad_weights.data_ptr(), *grad_act.shape, native.DTYPE_CODES[grad.dtype],
        native.where(grad.device),
    )  # fmt: skip
    return grad, act, grad_weights


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _OP.below_autograd(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_act: Tensor) -> Tensor:
        return _BACKWARD(grad_act, *ctx.saved_tensors)


def _autograd(gate_up: Tensor) -> Tensor:
    return _Swiglu.apply(gate_up) if native.wants_grad(gate_up) else _OP.below_autograd(gate_up)


_OP = native.define("swiglu(Tensor gate_up_MG) -> Tensor", _kernel, _fake, _autograd)
_BACKWARD = native.define(
    "swiglu_backward(Tensor grad_act_MI, Tensor gate_up_MG) -> Tensor", _backward_kernel, _backward_fake
)
# Behind the experts' down projection without routing weights: csrc/swiglu/api.h. Gives the gradient of gate_up, the
# weighted activation and the gradient of the weights.
native.define(
    "weighted_swiglu_backward(Tensor grad_act_MI, Tensor gate_up_MG, Tensor weights_TK, Tensor slot_of_row_M)"
    " -> (Tensor, Tensor, Tensor)",
    _weighted_kernel, _weighted_fake,
)  # fmt: skip
