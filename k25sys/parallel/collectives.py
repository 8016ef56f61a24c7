"""Rows of tokens between the ranks of a group: gathered, summed and scattered, for autograd and with overlap.

Shape suffixes: T tokens of the whole group, N = T / ranks consecutive ones of each rank, in the order of the ranks.
A group of None is one rank: nothing is copied and nothing is communicated.

Sums over ranks are in the dtype of the rows. Every rank of the group makes the same calls in the same order, in the
backward as well; that holds where all of them run the same modules.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from k25sys.errors import ArgumentValueError, ShapeError, message

Group = dist.ProcessGroup | None


class Pending:
    """Rows that are under way. NCCL moves them on its own stream, gloo on its own threads.

    `wait` makes the current stream (gloo: the host) wait; what was enqueued before it ran beside the communication.
    Buffers live as long as this object.
    """

    def __init__(self, result: Tensor, source: Tensor, work: dist.Work | None) -> None:
        self._result, self._source, self._work = result, source, work

    def wait(self) -> Tensor:
        """The rows."""
        if self._work is not None:
            self._work.wait()
        return self._result


def group_size(group: Group) -> int:
    """Ranks in `group`."""
    return 1 if group is None else group.size()


def start_gather(rows_NX: Tensor, group: Group) -> Pending:
    """Begins to gather (N, ...) of each rank into (T, ...)."""
    if group is None:
        return Pending(rows_NX, rows_NX, None)
    source = rows_NX.contiguous()
    result = source.new_empty((source.shape[0] * group.size(), *source.shape[1:]))
    work = dist.all_gather_into_tensor(result, source, group=group, async_op=True)
    return Pending(result, source, work)


def start_reduce_scatter(rows_TX: Tensor, group: Group) -> Pending:
    """Begins to sum (T, ...) over the ranks; each gets its N rows.

    Raises:
        ShapeError: T is not a multiple of the number of ranks.
    """
    if group is None:
        return Pending(rows_TX, rows_TX, None)
    source = rows_TX.contiguous()
    result = source.new_empty((rows_per_rank("reduce_scatter_rows", source.shape[0], group), *source.shape[1:]))
    work = dist.reduce_scatter_tensor(result, source, group=group, async_op=True)
    return Pending(result, source, work)


def rows_per_rank(op: str, num_rows: int, group: Group) -> int:
    """N. Raises ShapeError unless every rank gets as many of the rows."""
    ranks = group_size(group)
    if num_rows % ranks:
        hint = "sequence parallelism gives every rank as many tokens: pad or pack to a multiple"
        raise ShapeError(message(op, "T", f"{num_rows} rows over {ranks} ranks", f"a multiple of {ranks}", hint))
    return num_rows // ranks


def own_rows(op: str, rows_TX: Tensor, group: Group) -> Tensor:
    """This rank's N of T rows, as a view."""
    if group is None:
        return rows_TX
    part = rows_per_rank(op, rows_TX.shape[0], group)
    return rows_TX.narrow(0, group.rank() * part, part)


def gather_rows(rows_NX: Tensor, group: Group, *, gradient: str = "partial") -> Tensor:
    """(N, ...) of each rank -> (T, ...) on every rank.

    Args:
        rows_NX: as many rows on every rank.
        gradient: what each rank's gradient of the result is. "partial": a summand, as where each rank goes on with
            its heads or columns; the backward sums and scatters. "whole": the same sum on every rank, as
            ops.linear_cross_entropy gives it; the backward takes this rank's rows and sends nothing.
    """
    if gradient not in ("partial", "whole"):
        raise ArgumentValueError(message("gather_rows", "gradient", repr(gradient), "'partial' or 'whole'"))
    return rows_NX if group is None else _Gather.apply(rows_NX, group, gradient)


def reduce_scatter_rows(rows_TX: Tensor, group: Group) -> Tensor:
    """(T, ...) summands -> (N, ...): this rank's rows of their sum. The backward gathers."""
    return rows_TX if group is None else _ReduceScatter.apply(rows_TX, group)


def all_reduce(summand: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, on each; what follows is the same on every rank, so that the gradient passes as it is."""
    return summand if group is None else _AllReduce.apply(summand, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup, gradient: str) -> Tensor:
        ctx.group, ctx.gradient = group, gradient
        return start_gather(rows, group).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient == "whole":
            return own_rows("gather_rows", grad, ctx.group), None, None
        return start_reduce_scatter(grad, ctx.group).wait(), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return start_reduce_scatter(rows, group).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return start_gather(grad, ctx.group).wait(), None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, summand: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = summand.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None
