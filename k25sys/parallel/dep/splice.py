"""Encoded media into the stream of tokens: what phase (b) does on stage 0."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Splice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        anchor: Tensor,
        index_R: Tensor,
        rows_RD: Tensor,
        return_gradient: Callable[[Tensor], None],
    ) -> Tensor:
        ctx.save_for_backward(index_R)
        ctx.return_gradient, ctx.rows_dtype = return_gradient, rows_RD.dtype
        return x_TD.index_copy(0, index_R, rows_RD.to(x_TD.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        (index_R,) = ctx.saved_tensors
        ctx.return_gradient(grad_TD.index_select(0, index_R).to(ctx.rows_dtype))
        grad_x = grad_TD.index_fill(0, index_R, 0.0) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None


def splice(
    x_TD: Tensor, index_R: Tensor, rows_RD: Tensor, return_gradient: Callable[[Tensor], None] | None = None
) -> Tensor:
    """`x_TD` with `rows_RD` at the rows `index_R`.

    Args:
        x_TD: (T, D) embeddings.
        index_R: (R,) int64, ascending.
        rows_RD: (R, D). Differentiable where `return_gradient` is None.
        return_gradient: gets the gradient of `rows_RD`, in their dtype, during the backward; the rows themselves may
            then be freed as soon as this returns, and `x_TD` need not require a gradient.
    """
    if return_gradient is None:
        return x_TD.index_copy(0, index_R, rows_RD.to(x_TD.dtype))
    if not torch.is_grad_enabled():
        return x_TD.index_copy(0, index_R, rows_RD.detach().to(x_TD.dtype))
    anchor = x_TD.new_empty(0, requires_grad=True)
    return _Splice.apply(x_TD, anchor, index_R, rows_RD.detach(), return_gradient)


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, rows: Tensor, return_gradient: Callable[[Tensor], None]) -> Tensor:
        ctx.return_gradient = return_gradient
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.return_gradient(grad)
        return None, None, None


def taken(rows: Tensor, return_gradient: Callable[[Tensor], None]) -> Tensor:
    """`rows` for the layers that act on them before they are spliced.

    Args:
        rows: (R, ...); whoever saves them keeps them.
        return_gradient: gets their gradient during the backward.
    """
    if not torch.is_grad_enabled():
        return rows
    return _Taken.apply(rows.new_empty(0, requires_grad=True), rows.detach(), return_gradient)
