"""Tokens to the rows of their experts."""

from typing import Any

import torch
from torch import Tensor

from k25sys.ops import checks, native
from k25sys.ops.plan_dispatch import DispatchPlan, check_plan


def reference_dispatch(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """`dispatch` in plain torch."""
    return x_TD[plan.slot_of_row_M.long() // plan.top_k]


def dispatch(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Copies each token to the rows that `plan` gives it, grouped by expert.

    Args:
        x_TD: (T, D) float32, bfloat16 or float64. Differentiable: the gradient is the unweighted `combine`.
        plan: from `plan_dispatch` for these T tokens.

    Returns:
        x_MD (T * K, D).

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, or a plan for another number of tokens.
        IndexError: on the CPU, a plan entry outside its table.
    """
    check_plan("dispatch", plan)
    return _OP(x_TD, plan.slot_of_row_M, plan.row_of_slot_TK)


def _check(x: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> None:
    op = "dispatch"
    checks.tensor(op, "plan.row_of_slot_TK", row_of_slot, checks.INT32, (None, None), "TK")
    num_tokens, top_k = row_of_slot.shape
    checks.integer(op, "K (columns of plan.row_of_slot_TK)", top_k, 1, checks.MAX_TOP_K)
    checks.tensor(op, "x_TD", x, checks.FLOATS, (num_tokens, None), "TD", checks.PLAN_HINT)
    checks.tensor(op, "plan.slot_of_row_M", slot_of_row, checks.INT32, (num_tokens * top_k,), "M", checks.PLAN_HINT)
    checks.same_device(op, "x_TD", x, {"plan.slot_of_row_M": slot_of_row, "plan.row_of_slot_TK": row_of_slot})


def _fake(x: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    _check(x, slot_of_row, row_of_slot)
    return x.new_empty((row_of_slot.shape[0] * row_of_slot.shape[1], x.shape[1]))


def _kernel(x: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    _check(x, slot_of_row, row_of_slot)
    num_tokens, top_k = row_of_slot.shape
    rows = native.empty((num_tokens * top_k, x.shape[1]), x)
    x, slot_of_row = x.contiguous(), slot_of_row.contiguous()
    native.kernels("dispatch", x.device).dispatch(
        x.data_ptr(), slot_of_row.data_ptr(), rows.data_ptr(), num_tokens, rows.shape[0], x.shape[1], top_k,
        native.DTYPE_CODES[x.dtype], native.where(x.device),
    )  # fmt: skip
    return rows


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot_of_row, row_of_slot)
        return _OP.below_autograd(x, slot_of_row, row_of_slot)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.k25.combine.default(grad_rows, None, *ctx.saved_tensors), None, None


def _autograd(x: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    if native.wants_grad(x):
        return _Dispatch.apply(x, slot_of_row, row_of_slot)
    return _OP.below_autograd(x, slot_of_row, row_of_slot)


_OP = native.define(
    "dispatch(Tensor x_TD, Tensor slot_of_row_M, Tensor row_of_slot_TK) -> Tensor", _kernel, _fake, _autograd
)
