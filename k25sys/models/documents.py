"""How rows divide into documents (of packed tokens) or clips (of patches): a row attends within its own only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from k25sys.errors import ArgumentTypeError, ArgumentValueError, message


class Packing(Protocol):
    """Which keys each row of queries sees: what attention asks of Documents, or of what stands for them where a process
    holds some of the rows only, while keys come from more."""

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        ...

    @property
    def num_rows(self) -> int:
        """T: rows of queries."""
        ...

    @cached_property
    def pieces(self) -> Sequence[tuple[range, range]]:
        """(rows of queries, rows of keys), in order of the queries, all of which are in one piece. A row sees the keys
        of its piece; causal: the last row sees them all, each row before it one fewer."""
        ...

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(pieces + 1,) int32: the first row of queries of each piece, and T."""
        ...

    @cached_property
    def key_cu_seqlens(self) -> Tensor:
        """(pieces + 1,) int32: the same of keys, each piece with its own copy of them."""
        ...

    def block_mask(self, causal: bool) -> Any:
        """FlexAttention's BlockMask of `pieces`."""
        ...


class TokenPacking(Packing, Protocol):
    """A packing of tokens: what the decoder asks of Documents."""

    @cached_property
    def positions_T(self) -> Tensor:
        """(T,) int64: the place of each row of queries in its document."""
        ...


@dataclass(frozen=True)
class Documents:
    """T rows = consecutive documents of `lengths`, all on `device`. The tensors are made at their first use."""

    lengths: tuple[int, ...]
    device: torch.device

    @classmethod
    def from_cu_seqlens(
        cls, op: str, cu_seqlens: Tensor | Sequence[int], num_rows: int, device: torch.device
    ) -> "Documents":
        """From the rows at which documents begin, and the number of rows: 0 = c_0 <= c_1 <= ... <= c_n = T.

        A tensor on a device is copied to the host, which waits for the device. Empty documents are dropped.

        Raises:
            TypeError, ValueError: not a 1-D sequence of integers that rises from 0 to `num_rows`.
        """
        if isinstance(cu_seqlens, Tensor):
            if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
                got = f"a {cu_seqlens.dtype} tensor of shape {tuple(cu_seqlens.shape)}"
                raise ArgumentTypeError(message(op, "cu_seqlens", got, "a 1-D tensor of integers"))
            cu_seqlens = cu_seqlens.tolist()
        bounds = list(cu_seqlens)
        if any(isinstance(bound, bool) or not isinstance(bound, int) for bound in bounds):
            raise ArgumentTypeError(message(op, "cu_seqlens", bounds, "integers"))
        lengths = [end - begin for begin, end in pairwise(bounds)]
        if not bounds or bounds[0] != 0 or bounds[-1] != num_rows or min(lengths, default=0) < 0:
            accepted = f"0, ..., {num_rows} (the number of rows), never falling"
            raise ArgumentValueError(message(op, "cu_seqlens", bounds, accepted))
        return cls(tuple(length for length in lengths if length), device)

    @property
    def num_rows(self) -> int:
        """T."""
        return sum(self.lengths)

    @property
    def max_length(self) -> int:
        """Rows of the longest document."""
        return max(self.lengths, default=0)

    @cached_property
    def pieces(self) -> tuple[tuple[range, range], ...]:
        """Each document's rows of queries, and the same of keys."""
        return tuple((range(begin, end), range(begin, end)) for begin, end in self.bounds)

    @cached_property
    def ends_N(self) -> Tensor:
        """(N,) int64: one past the last row of each document."""
        return torch.tensor(self.lengths, dtype=torch.int64, device=self.device).cumsum(0)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(N + 1,) int32, as varlen attention kernels take it."""
        return torch.nn.functional.pad(self.ends_N, (1, 0)).int()

    @cached_property
    def key_cu_seqlens(self) -> Tensor:
        """(N + 1,) int32: keys are those of the rows."""
        return self.cu_seqlens

    @cached_property
    def index_T(self) -> Tensor:
        """(T,) int64: the document of each row."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device=self.device)
        return torch.arange(len(self.lengths), device=self.device).repeat_interleave(lengths, output_size=self.num_rows)

    @cached_property
    def positions_T(self) -> Tensor:
        """(T,) int64: the place of each row in its document."""
        return torch.arange(self.num_rows, device=self.device) - self.cu_seqlens[self.index_T].long()

    def block_mask(self, causal: bool) -> Any:
        """FlexAttention's BlockMask: a row sees all of its document, or, causal, itself and what comes before it."""
        return self.causal_mask if causal else self.full_mask

    @cached_property
    def causal_mask(self) -> Any:
        """FlexAttention's BlockMask: a row sees itself and what comes before it in its document."""
        index_T = self.index_T
        return self._block_mask(lambda _b, _h, row, column: (index_T[row] == index_T[column]) & (row >= column))

    @cached_property
    def full_mask(self) -> Any:
        """FlexAttention's BlockMask: a row sees all of its document."""
        index_T = self.index_T
        return self._block_mask(lambda _b, _h, row, column: index_T[row] == index_T[column])

    def _block_mask(self, visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Any:
        make = create_block_mask
        if self.device.type == "cuda":
            make = torch.compile(create_block_mask, dynamic=True)  # eager, it would hold T x T booleans
        return make(visible, None, None, self.num_rows, self.num_rows, device=self.device)

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First row and one past the last, document by document."""
        ends = [0]
        for length in self.lengths:
            ends.append(ends[-1] + length)
        return list(pairwise(ends))
