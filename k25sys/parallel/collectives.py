"""Collectives with gradients over a process group, or None for a single rank: rows are gathered, scattered, summed.

Rows are the first dimension. Every function's backward is the transpose of its forward, named beside it.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from k25sys.errors import ShapeError, message

Group = dist.ProcessGroup | None


def all_gather(x: Tensor, group: Group, *, async_op: bool = False) -> tuple[Tensor, "dist.Work | None"]:
    """The rows of all ranks, in order; without a gradient. The Work to wait for, if asynchronous."""
    if group is None:
        return x, None
    out = x.new_empty((x.shape[0] * dist.get_world_size(group), *x.shape[1:]))
    work = dist.all_gather_into_tensor(out, x.contiguous(), group=group, async_op=async_op)
    return out, work


def reduce_scatter(x: Tensor, group: Group, *, async_op: bool = False) -> tuple[Tensor, "dist.Work | None"]:
    """This rank's share of the rows of the sum over ranks; without a gradient."""
    if group is None:
        return x, None
    size = dist.get_world_size(group)
    if x.shape[0] % size:
        accepted = f"a multiple of the {size} ranks"
        raise ShapeError(message("reduce_scatter", "x", f"{x.shape[0]} rows", accepted, "pad the micro-batch"))
    out = x.new_empty((x.shape[0] // size, *x.shape[1:]))
    work = dist.reduce_scatter_tensor(out, x.contiguous(), group=group, async_op=async_op)
    return out, work


def own_rows(x: Tensor, group: Group) -> Tensor:
    """This rank's share of rows that every rank has."""
    if group is None:
        return x
    part = x.shape[0] // dist.get_world_size(group)
    return x.narrow(0, dist.get_rank(group) * part, part)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, gradient: str) -> Tensor:
        ctx.group, ctx.gradient = group, gradient
        return all_gather(x, group)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient == "slice":
            return own_rows(grad, ctx.group).contiguous(), None, None
        return reduce_scatter(grad, ctx.group)[0], None, None


def gather_rows(x: Tensor, group: Group, *, gradient: Literal["sum", "slice"] = "sum") -> Tensor:
    """(T, ...) of each rank -> (size * T, ...) on all.

    Args:
        gradient: "sum" where each rank's gradient of the result is a part (backward: reduce-scatter), "slice" where
            every rank has the whole one (backward: its own rows).
    """
    return x if group is None else _Gather.apply(x, group, gradient)


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduce_scatter(x, group)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_gather(grad, ctx.group)[0], None


def reduce_scatter_rows(x: Tensor, group: Group) -> Tensor:
    """(size * T, ...) partial sums on each rank -> (T, ...): its rows of their sum. Backward: all-gather.

    Raises:
        ShapeError: rows that the ranks do not divide.
    """
    return x if group is None else _ReduceScatter.apply(x, group)
