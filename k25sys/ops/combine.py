"""The rows of the experts back to their tokens: a weighted sum in a fixed order."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k25sys.errors import ArgumentTypeError, message
from k25sys.ops import checks, native
from k25sys.ops.plan_dispatch import DispatchPlan, check_plan


def reference_combine(y_MD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
    """`combine` in plain torch: summed in float32 (float64) in the order of the slots, rounded once."""
    sum_TD = torch.zeros((plan.num_tokens, y_MD.shape[1]), dtype=weights_TK.dtype, device=y_MD.device)
    for k in range(plan.top_k):
        sum_TD = sum_TD + y_MD[plan.row_of_slot_TK[:, k].long()].to(weights_TK.dtype) * weights_TK[:, k : k + 1]
    return sum_TD.to(y_MD.dtype)


def combine(y_MD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
    """y_TD[t] = sum over k of weights_TK[t, k] * y_MD[row of (t, k)], in the order k = 0, 1, ...: bitwise repeatable.

    Args:
        y_MD: (M, D) float32, bfloat16 or float64; summed in float32 (float64) and rounded once.
        weights_TK: (T, K) float32 (float64 for float64 rows).
        plan: from `plan_dispatch` for these T tokens.

    Returns:
        y_TD (T, D), differentiable in y_MD and weights_TK (once).

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device. IndexError: on the CPU, a bad plan entry.
    """
    check_plan("combine", plan)
    if weights_TK is None:
        raise ArgumentTypeError(message("combine", "weights_TK", None, "a torch.Tensor"))
    return _OP(y_MD, weights_TK, plan.slot_of_row_M, plan.row_of_slot_TK)


def _check(y: Tensor, weights: Tensor | None, slot_of_row: Tensor, row_of_slot: Tensor) -> None:
    op = "combine"
    checks.tensor(op, "plan.row_of_slot_TK", row_of_slot, checks.INT32, (None, None), "TK")
    num_tokens, top_k = row_of_slot.shape
    checks.integer(op, "K (columns of plan.row_of_slot_TK)", top_k, 1, checks.MAX_TOP_K)
    checks.tensor(op, "plan.slot_of_row_M", slot_of_row, checks.INT32, (num_tokens * top_k,), "M", checks.PLAN_HINT)
    checks.tensor(op, "y_MD", y, checks.FLOATS, (num_tokens * top_k, None), "MD", checks.PLAN_HINT)
    if weights is not None:
        checks.tensor(op, "weights_TK", weights, (checks.routing_dtype(y.dtype),), row_of_slot.shape, "TK")
    checks.same_device(
        op, "y_MD", y, {"weights_TK": weights, "plan.slot_of_row_M": slot_of_row, "plan.row_of_slot_TK": row_of_slot}
    )


def _fake(y: Tensor, weights: Tensor | None, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    _check(y, weights, slot_of_row, row_of_slot)
    return y.new_empty((row_of_slot.shape[0], y.shape[1]))


def _kernel(y: Tensor, weights: Tensor | None, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    _check(y, weights, slot_of_row, row_of_slot)
    num_tokens, top_k = row_of_slot.shape
    out = native.empty((num_tokens, y.shape[1]), y)
    y, row_of_slot = y.contiguous(), row_of_slot.contiguous()
    weights = None if weights is None else weights.contiguous()
    native.kernels("combine", y.device).combine(
        y.data_ptr(), native.address(weights), row_of_slot.data_ptr(), out.data_ptr(), num_tokens, *y.shape, top_k,
        native.DTYPE_CODES[y.dtype], native.where(y.device),
    )  # fmt: skip
    return out


def _backward_check(grad: Tensor, y: Tensor, weights: Tensor, slot_of_row: Tensor) -> None:
    op = "combine_backward"
    checks.tensor(op, "y_MD", y, checks.FLOATS, (None, None), "MD", checks.PLAN_HINT)
    checks.tensor(op, "weights_TK", weights, (checks.routing_dtype(y.dtype),), (None, None), "TK")
    checks.integer(op, "K (columns of weights_TK)", weights.shape[1], 1, checks.MAX_TOP_K)
    checks.tensor(op, "grad_TD", grad, (y.dtype,), (weights.shape[0], y.shape[1]), "TD")
    checks.tensor(
        op,
        "plan.slot_of_row_M",
        slot_of_row,
        checks.INT32,
        (weights.shape[0] * weights.shape[1],),
        "M",
        checks.PLAN_HINT,
    )
    checks.tensor(op, "y_MD", y, checks.FLOATS, (slot_of_row.shape[0], None), "MD", checks.PLAN_HINT)
    checks.same_device(op, "y_MD", y, {"grad_TD": grad, "weights_TK": weights, "plan.slot_of_row_M": slot_of_row})


def _backward_fake(grad: Tensor, y: Tensor, weights: Tensor, slot_of_row: Tensor) -> tuple[Tensor, Tensor]:
    _backward_check(grad, y, weights, slot_of_row)
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


def _backward_kernel(grad: Tensor, y: Tensor, weights: Tensor, slot_of_row: Tensor) -> tuple[Tensor, Tensor]:
    _backward_check(grad, y, weights, slot_of_row)
    grad_rows, grad_weights = native.empty(y.shape, y), native.empty(weights.shape, weights)
    grad, y, weights, slot_of_row = (t.contiguous() for t in (grad, y, weights, slot_of_row))
    native.kernels("combine", y.device).combine_backward(
        grad.data_ptr(), y.data_ptr(), weights.data_ptr(), slot_of_row.data_ptr(), grad_rows.data_ptr(),
        grad_weights.data_ptr(), weights.shape[0], *y.shape, weights.shape[1], native.DTYPE_CODES[y.dtype],
        native.where(y.device),
    )  # fmt: skip
    return grad_rows, grad_weights


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, slot_of_row)
        return _OP.below_autograd(y, weights, slot_of_row, row_of_slot)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_BACKWARD(grad, *ctx.saved_tensors), None, None


class _UnweightedCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot_of_row, row_of_slot)
        return _OP.below_autograd(y, None, slot_of_row, row_of_slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.k25.dispatch.default(grad, *ctx.saved_tensors), None, None


def _autograd(y: Tensor, weights: Tensor | None, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    if not native.wants_grad(y, weights):
        return _OP.below_autograd(y, weights, slot_of_row, row_of_slot)
    if weights is None:
        return _UnweightedCombine.apply(y, slot_of_row, row_of_slot)
    return _Combine.apply(y, weights, slot_of_row, row_of_slot)


_OP = native.define(
    "combine(Tensor y_MD, Tensor? weights_TK, Tensor slot_of_row_M, Tensor row_of_slot_TK) -> Tensor",
    _kernel, _fake, _autograd,
)  # fmt: skip
_BACKWARD = native.define(
    "combine_backward(Tensor grad_TD, Tensor y_MD, Tensor weights_TK, Tensor slot_of_row_M) -> (Tensor, Tensor)",
    _backward_kernel, _backward_fake,
)  # fmt: skip
