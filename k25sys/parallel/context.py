"""Context parallel by gathering keys: packed tokens in causal-balanced chunks over the ranks of the axis "context".

T tokens of all documents are cut into 2 * size chunks of as equal a number of tokens as possible; rank r has chunks r
and 2 * size - 1 - r, so that early tokens, which see little, go with late ones. Everything but attention works on the
local tokens. In attention a rank gets what its tokens may see of the other ranks' tokens and nothing else: of MLA the
latents and rotated keys (576 channels a token of K2.5), which it expands to keys and values itself. The exchange is an
all-gather in which each rank is sent only rows that it needs; its backward is the reduce-scatter of the same rows.

Shape suffixes: T tokens of one rank, S rows that a rank's tokens may see, X channels.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from k25sys.errors import ArgumentValueError, GridError, ShapeError, message
from k25sys.parallel.grid import RankGrid
from k25sys.parallel.row_exchange import (
    RowExchange,
    ShardedRows,
    count,
    cumulated,
    make_block_mask,
    merge,
    place,
    rows_of,
)


def chunks(num_tokens: int, size: int, *, multiple: int = 1) -> tuple[range, ...]:
    """The 2 * size chunks of `num_tokens` tokens, in order; they differ by at most `multiple` tokens.

    Where `size` divides the tokens (in units of `multiple`), ranks have equally many.

    Args:
        multiple: of which each chunk's length is one, as sequence parallel over that many ranks needs it.

    Raises:
        ValueError: a size or multiple below 1, or tokens that `multiple` does not divide.
    """
    for name, value in (("size", size), ("multiple", multiple)):
        if value < 1:
            raise ArgumentValueError(message("chunks", name, value, "an int >= 1"))
    if num_tokens < 0 or num_tokens % multiple:
        hint = "pad the last document, or pack another number of tokens"
        raise ArgumentValueError(message("chunks", "num_tokens", num_tokens, f"a multiple of {multiple}", hint))
    units = num_tokens // multiple
    ends = [units * i // (2 * size) * multiple for i in range(2 * size + 1)]
    return tuple(range(begin, end) for begin, end in pairwise(ends))


@dataclass(frozen=True)
class ShardedDocuments(ShardedRows):
    """The tokens of rank `index` of `size`, of packed documents of `document_lengths`: a packing as models ask it.

    Any number of tokens: chunks may be uneven, or empty. Made by `shard_documents`, or directly for any rank.

    Raises:
        ValueError: sizes out of range, or tokens that `multiple` does not divide; see `chunks`.
    """

    causal = True

    document_lengths: tuple[int, ...]
    device: torch.device
    size: int
    index: int
    multiple: int = 1

    def __post_init__(self) -> None:
        if min(self.document_lengths, default=0) < 0:
            raise ArgumentValueError(
                message("ShardedDocuments", "document_lengths", self.document_lengths, "numbers of tokens >= 0")
            )
        chunks(self.num_all_rows, self.size, multiple=self.multiple)
        if not 0 <= self.index < self.size:
            raise ArgumentValueError(message("ShardedDocuments", "index", self.index, f"0 to {self.size - 1}"))

    @property
    def num_all_rows(self) -> int:
        """Tokens of all ranks."""
        return sum(self.document_lengths)

    @cached_property
    def owned(self) -> tuple[tuple[range, ...], ...]:
        """The two chunks of each rank."""
        parts = chunks(self.num_all_rows, self.size, multiple=self.multiple)
        return tuple((parts[r], parts[2 * self.size - 1 - r]) for r in range(self.size))

    @cached_property
    def _seen(self) -> tuple[tuple[tuple[range, range], ...], ...]:
        """By rank: tokens of one document in one chunk, and the tokens up to there that they see."""
        ends = list(accumulate(self.document_lengths))
        seen = []
        for parts in self.owned:
            pieces = []
            for part in parts:
                begin = part.start
                while begin < part.stop:
                    document = bisect_right(ends, begin)
                    end = min(part.stop, ends[document])
                    first = ends[document] - self.document_lengths[document]
                    pieces.append((range(begin, end), range(first, end)))
                    begin = end
            seen.append(tuple(pieces))
        return tuple(seen)

    @cached_property
    def exchange(self) -> RowExchange:
        """Chunks, and the documents up to them that their tokens belong to."""
        needed = tuple(merge(keys for _, keys in pieces) for pieces in self._seen)
        return RowExchange(self.owned, needed, self.index, self.device)

    @cached_property
    def pieces(self) -> tuple[tuple[range, range], ...]:
        """Local tokens of one document in one chunk, and their places of keys among those gathered."""
        owned, needed = self.owned[self.index], self.exchange.needed[self.index]
        pieces = []
        for tokens, keys in self._seen[self.index]:
            row, key = place(tokens.start, owned), place(keys.start, needed)
            pieces.append((range(row, row + len(tokens)), range(key, key + len(keys))))
        return tuple(pieces)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each piece; a document's two chunks are two pieces."""
        return tuple(len(rows) for rows, _ in self.pieces)

    @property
    def num_rows(self) -> int:
        """T: tokens of this rank."""
        return count(self.owned[self.index])

    @property
    def num_keys(self) -> int:
        """S: tokens that those of this rank may see."""
        return count(self.exchange.needed[self.index])

    @property
    def pairs_by_rank(self) -> tuple[int, ...]:
        """Pairs of tokens that attend to each other, on each rank: what its attention costs."""
        return tuple(
            sum(len(rows) * len(keys) - len(rows) * (len(rows) - 1) // 2 for rows, keys in pieces)
            for pieces in self._seen
        )

    @cached_property
    def tokens_T(self) -> Tensor:
        """(T,) int64: the place of each token among those of all ranks."""
        return rows_of(self.owned[self.index]).to(self.device)

    @cached_property
    def index_T(self) -> Tensor:
        """(T,) int64: the document of each token."""
        return torch.searchsorted(self._ends_N, self.tokens_T, right=True)

    @cached_property
    def positions_T(self) -> Tensor:
        """(T,) int64: the place of each token in its document."""
        lengths_N = torch.tensor(self.document_lengths, dtype=torch.int64, device=self.device)
        return self.tokens_T - (self._ends_N - lengths_N)[self.index_T]

    @cached_property
    def _ends_N(self) -> Tensor:
        return torch.tensor(self.document_lengths, dtype=torch.int64, device=self.device).cumsum(0)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(pieces + 1,) int32: the first row of each piece, and T."""
        return cumulated(self.lengths, self.device)

    @cached_property
    def key_cu_seqlens(self) -> Tensor:
        """(pieces + 1,) int32: the same of keys, each piece with its own copy of them."""
        return cumulated([len(keys) for _, keys in self.pieces], self.device)

    def block_mask(self, causal: bool) -> Any:
        """FlexAttention's BlockMask, (T, S): a token sees its document up to itself."""
        assert causal, "what comes after a chunk is not gathered"
        return self._causal_mask

    @cached_property
    def _causal_mask(self) -> Any:
        tokens_T, tokens_S = self.tokens_T, rows_of(self.exchange.needed[self.index]).to(self.device)
        index_T, index_S = self.index_T, torch.searchsorted(self._ends_N, tokens_S, right=True)
        return make_block_mask(
            lambda _b, _h, row, key: (index_T[row] == index_S[key]) & (tokens_T[row] >= tokens_S[key]),
            self.num_rows, self.num_keys, self.device,
        )  # fmt: skip


class WholeDocuments(Protocol):
    """What is cut: models.Documents."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document."""
        ...

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        ...


def shard_documents(documents: WholeDocuments, grid: RankGrid) -> ShardedDocuments:
    """This context rank's part; its number of tokens is a multiple of the ranks of "tensor", over which sequence
    parallel splits it further.

    Raises:
        ValueError: tokens that the ranks of "tensor" do not divide.
    """
    return ShardedDocuments(
        tuple(documents.lengths), documents.device, grid.size("context"), grid.index("context"), grid.size("tensor")
    )


def split_tokens(x_TX: Tensor, documents: ShardedDocuments) -> Tensor:
    """This rank's part (T, ...) of anything with a row for each token of all ranks: ids, labels, weights, embeddings.

    Raises:
        ShapeError: another number of rows.
    """
    if x_TX.dim() == 0 or x_TX.shape[0] != documents.num_all_rows:
        accepted = f"{documents.num_all_rows} rows, the tokens of all documents"
        raise ShapeError(message("split_tokens", "x_TX", f"shape {tuple(x_TX.shape)}", accepted))
    return torch.cat([x_TX[part.start : part.stop] for part in documents.owned[documents.index]])


def join_tokens(parts: Sequence[Tensor], documents: ShardedDocuments) -> Tensor:
    """The inverse of `split_tokens`, from the parts of all ranks (`documents` is that of any).

    Raises:
        ShapeError: parts that are not as many, or as long, as the ranks' chunks.
    """
    got, wanted = [len(part) for part in parts], [count(chunks) for chunks in documents.owned]
    if got != wanted:
        raise ShapeError(message("join_tokens", "parts", f"{got} rows", f"{wanted}, rank by rank"))
    order = torch.cat([rows_of(chunks) for chunks in documents.owned]).argsort()
    return torch.cat(list(parts)).index_select(0, order.to(parts[0].device))


def gather_tokens(x_TX: Tensor, documents: ShardedDocuments, grid: RankGrid) -> Tensor:
    """The rows of all ranks in order, on every rank: `join_tokens` over the axis "context", differentiable.

    The backward sums the gradients of all ranks: each computes its own part of the loss from the result.
    """
    everything = ((range(documents.num_all_rows),),) * documents.size
    exchange = RowExchange(documents.owned, everything, documents.index, documents.device)
    return exchange.gather(x_TX, grid.group("context"))


class ContextParallelCore(nn.Module):
    """An attention core that gathers what keys and values are made of over the axis "context".

    It stands where `core` stood, and attends as `core` does, only over ShardedRows: local queries, all the keys that
    they may see, exactly. Largest logits are those of the local queries: their maximum over "context" is the model's.
    For any other packing, whose rows are all here, it is `core`.

    Args:
        core: a models.AttentionCore. Whatever else it has is found here too.
        grid: of this rank.
    """

    def __init__(self, core: nn.Module, grid: RankGrid) -> None:
        super().__init__()
        self.core: Any = core
        self.grid = grid

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("core"), name)

    def gather(self, rows: tuple[Tensor, ...], documents: Any) -> tuple[Tensor, ...]:
        """(T, ...) tensors of this rank -> (S, ...), in order, in one exchange; see RowExchange.gather.

        Collective over "context", forward and backward: a rank without tokens takes part.

        Raises:
            GridError: rows cut for another number of ranks, or for another rank.
            ValueError: another number of rows, or rows cut for causal attention where `core` is not, or the reverse.
        """
        if not isinstance(documents, ShardedRows):
            return self.core.gather(rows, documents)
        exchange = documents.exchange
        got = exchange.index, len(exchange.owned)
        wanted = self.grid.index("context"), self.grid.size("context")
        if got != wanted:
            accepted = f"rank {wanted[0]} of {wanted[1]}, this one on the axis context"
            raise GridError(
                message("ContextParallelCore", "documents", f"those of rank {got[0]} of {got[1]}", accepted)
            )
        if documents.causal != self.core.causal:
            accepted = f"rows cut for attention with causal={self.core.causal}"
            raise ArgumentValueError(message("ContextParallelCore", "documents", type(documents).__name__, accepted))
        flat = [x.flatten(1) for x in rows]
        gathered = exchange.gather(torch.cat(flat, 1), self.grid.group("context")).split([x.shape[1] for x in flat], 1)
        return tuple(part.unflatten(1, x.shape[1:]).to(x.dtype) for part, x in zip(gathered, rows, strict=True))

    def forward(self, q_THQ: Tensor, k_SHQ: Tensor, v_SHV: Tensor, documents: Any) -> Tensor:
        """The attended values (T, H, V) of local queries."""
        return self.core(q_THQ, k_SHQ, v_SHV, documents)
