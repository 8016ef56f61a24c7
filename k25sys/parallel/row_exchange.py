"""Rows that lie on several ranks, and the exchange by which each gets those that its own may see.

An all-gather in which a rank is sent only what it needs; its backward is the reduce-scatter of the same rows.

Shape suffixes: T rows of one rank, S rows that it needs, M rows that it sends, X anything.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import create_block_mask

from k25sys.errors import GridError, ShapeError, message


def merge(ranges: Iterable[range]) -> tuple[range, ...]:
    """The rows of `ranges`, each once, in as few ascending ranges as there can be."""
    merged: list[range] = []
    for part in sorted((part for part in ranges if len(part)), key=lambda part: part.start):
        if merged and part.start <= merged[-1].stop:
            part = range(merged[-1].start, max(part.stop, merged.pop().stop))
        merged.append(part)
    return tuple(merged)


def common(some: Iterable[range], others: Iterable[range]) -> list[range]:
    """The rows that are in both; ascending where both are."""
    parts = [range(max(a.start, b.start), min(a.stop, b.stop)) for a in some for b in others]
    return [part for part in parts if len(part)]


def count(ranges: Iterable[range]) -> int:
    return sum(len(part) for part in ranges)


def place(row: int, ranges: Sequence[range]) -> int:
    """Where `row` is among the rows of `ranges`."""
    before = 0
    for part in ranges:
        if row in part:
            return before + row - part.start
        before += len(part)
    raise AssertionError((row, ranges))


def rows_of(ranges: Sequence[range]) -> Tensor:
    """The rows of `ranges`, int64 on the CPU."""
    return torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(p.start, p.stop) for p in ranges)])


@dataclass(frozen=True)
class RowExchange:
    """Rows that lie on several ranks, and those that each rank needs: ascending ranges, by rank. `index` is this one's.

    What is needed of a rank is what lies there.
    """

    owned: tuple[tuple[range, ...], ...]
    needed: tuple[tuple[range, ...], ...]
    index: int
    device: torch.device

    @cached_property
    def num_sent(self) -> list[int]:
        """Rows that go from here to each rank."""
        return [count(common(self.owned[self.index], needed)) for needed in self.needed]

    @cached_property
    def num_received(self) -> list[int]:
        """Rows that come from each rank."""
        return [count(common(owned, self.needed[self.index])) for owned in self.owned]

    @cached_property
    def sent_M(self) -> Tensor:
        """(M,) int64: places of the rows sent among the local ones, rank after rank."""
        owned_T = rows_of(self.owned[self.index])
        sent = [rows_of(common(self.owned[self.index], needed)) for needed in self.needed]
        return torch.searchsorted(owned_T, torch.cat(sent)).to(self.device)

    @cached_property
    def order_S(self) -> Tensor:
        """(S,) int64: places of the rows needed, ascending, among those received."""
        received = [rows_of(common(owned, self.needed[self.index])) for owned in self.owned]
        return torch.cat(received).argsort().to(self.device)

    @property
    def num_local(self) -> int:
        """Rows that lie here."""
        return count(self.owned[self.index])

    def gather(self, rows_TX: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """(T, ...) of this rank -> (S, ...), what it needs, ascending. Collective over `group`, forward and backward.

        Backward: the gradients of a row from all ranks that have seen it are sent in their own dtype, summed in float32
        (float64 for float64) in the order of the ranks, and rounded once.
        """
        if rows_TX.shape[0] != self.num_local:
            accepted = f"{self.num_local}, those of this rank"
            raise ShapeError(message("RowExchange", "rows", f"{rows_TX.shape[0]} rows", accepted))
        size = 1 if group is None else dist.get_world_size(group)
        if size != len(self.owned):
            accepted = f"{len(self.owned)} ranks, over which the rows lie"
            raise GridError(message("RowExchange", "group", f"a group of {size}", accepted))
        if group is None:
            return rows_TX
        return _Gather.apply(rows_TX, self, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: RowExchange, group: dist.ProcessGroup) -> Tensor:
        ctx.exchange, ctx.group = exchange, group
        received = rows.new_empty(sum(exchange.num_received), *rows.shape[1:])
        sent = rows.index_select(0, exchange.sent_M)
        dist.all_to_all_single(received, sent, exchange.num_received, exchange.num_sent, group=group)
        return received.index_select(0, exchange.order_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        exchange: RowExchange = ctx.exchange
        sent = torch.empty_like(grad, memory_format=torch.contiguous_format).index_copy_(0, exchange.order_S, grad)
        received = grad.new_empty(sum(exchange.num_sent), *grad.shape[1:])
        dist.all_to_all_single(received, sent, exchange.num_sent, exchange.num_received, group=ctx.group)
        dtype = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(exchange.num_local, *grad.shape[1:], dtype=dtype)
        # Rank by rank: one rank's rows are distinct, so that no two additions to a row meet on a device.
        counts = exchange.num_sent
        for places, part in zip(exchange.sent_M.split(counts), received.split(counts), strict=True):
            total.index_add_(0, places, part.to(dtype))
        return total.to(grad.dtype), None, None


class ShardedRows(ABC):
    """Rows of which this rank has some; their attention needs a ContextParallelCore."""

    causal: ClassVar[bool]
    """Whether a row sees no later one: which keys are gathered depends on it."""

    @property
    @abstractmethod
    def exchange(self) -> RowExchange:
        """Who has which rows, and whose keys each rank needs."""


def make_block_mask(visible: Callable[..., Tensor], num_rows: int, num_keys: int, device: torch.device) -> Any:
    """FlexAttention's BlockMask of visible(_, _, row, key); compiled on CUDA, where eager would hold all the pairs."""
    make = torch.compile(create_block_mask, dynamic=True) if device.type == "cuda" else create_block_mask
    return make(visible, None, None, num_rows, num_keys, device=device)


def cumulated(lengths: Iterable[int], device: torch.device) -> Tensor:
    """(n + 1,) int32: 0 and the running sums."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
