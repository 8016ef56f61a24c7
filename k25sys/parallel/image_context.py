"""Large images and clips over the ranks of the axis "context": rows of whole neighbourhoods, keys of the whole clip.

Each clip's rows of neighbourhoods (2 x 2 patches of the vision encoder) are cut over the ranks, all frames alike, so
that pooling over frames and neighbourhoods stays local. Everything but attention works on the local patches; attention
gathers the keys and values of the clip (RowExchange), through the ContextParallelCore that parallel documents use.

Shape suffixes: P patches, Q neighbourhoods.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from k25sys.errors import ArgumentValueError, ShapeError, message
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


@dataclass(frozen=True)
class ShardedClips(ShardedRows):
    """The patches of rank `index` of `size`, of `clips` (t, h, w): a packing as the vision encoder asks it.

    Rows of neighbourhoods are as even over the ranks as they can be: what one clip leaves over goes on from the rank at
    which the clip before it left off. A clip of fewer rows than ranks leaves some without a part of it. Made by
    `shard_clips`, or directly for any rank.

    Raises:
        ValueError: a rank or size out of range, or a clip that neighbourhoods do not divide.
    """

    causal = False

    clips: tuple[tuple[int, int, int], ...]
    device: torch.device
    size: int
    index: int
    merge_sizes: tuple[int, int] = (2, 2)
    """Height and width of a neighbourhood in patches."""

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.index < self.size:
            got = f"{self.index} of {self.size}"
            raise ArgumentValueError(message("ShardedClips", "index", got, "0 to size - 1 of size >= 1"))
        merge_h, merge_w = self.merge_sizes
        for i, (t, h, w) in enumerate(self.clips):
            if min(t, h, w) < 1 or h % merge_h or w % merge_w:
                accepted = f"t >= 1, h a multiple of {merge_h}, w of {merge_w}"
                raise ArgumentValueError(message("ShardedClips", f"clips[{i}]", (t, h, w), accepted))

    @cached_property
    def rows_by_rank(self) -> tuple[tuple[range, ...], ...]:
        """By rank and clip: its rows of patches."""
        merge_h, next_rank, by_clip = self.merge_sizes[0], 0, []
        for _, h, _ in self.clips:
            each, left_over = divmod(h // merge_h, self.size)
            units = [each + ((r - next_rank) % self.size < left_over) for r in range(self.size)]
            ends = [0, *accumulate(unit * merge_h for unit in units)]
            by_clip.append([range(begin, end) for begin, end in pairwise(ends)])
            next_rank = (next_rank + left_over) % self.size
        return tuple(tuple(parts[r] for parts in by_clip) for r in range(self.size))

    @property
    def rows(self) -> tuple[range, ...]:
        """Of each clip, the rows of patches that are here."""
        return self.rows_by_rank[self.index]

    @cached_property
    def _spans(self) -> tuple[range, ...]:
        """The patches of each clip among those of all."""
        spans, begin = [], 0
        for t, h, w in self.clips:
            spans.append(range(begin, begin + t * h * w))
            begin += t * h * w
        return tuple(spans)

    @property
    def num_all_rows(self) -> int:
        """Patches of all ranks."""
        return count(self._spans)

    @cached_property
    def owned(self) -> tuple[tuple[range, ...], ...]:
        """By rank: its patches, ascending: clip by clip, frame by frame."""
        owned = []
        for parts in self.rows_by_rank:
            patches = []
            for span, (t, h, w), part in zip(self._spans, self.clips, parts, strict=True):
                frames = (span.start + frame * h * w for frame in range(t))
                patches += [range(first + part.start * w, first + part.stop * w) for first in frames if len(part)]
            owned.append(tuple(patches))
        return tuple(owned)

    @cached_property
    def exchange(self) -> RowExchange:
        """Patches, and the clips that they belong to."""
        needed = tuple(
            merge(span for span, part in zip(self._spans, parts, strict=True) if len(part))
            for parts in self.rows_by_rank
        )
        return RowExchange(self.owned, needed, self.index, self.device)

    @cached_property
    def pieces(self) -> tuple[tuple[range, range], ...]:
        """Local patches of each clip, and the places of the clip's keys among those gathered."""
        needed, pieces, row = self.exchange.needed[self.index], [], 0
        for span, (t, _, w), part in zip(self._spans, self.clips, self.rows, strict=True):
            if len(part):
                key = place(span.start, needed)
                pieces.append((range(row, row + t * len(part) * w), range(key, key + len(span))))
                row = pieces[-1][0].stop
        return tuple(pieces)

    @property
    def num_rows(self) -> int:
        """P: patches of this rank."""
        return count(self.owned[self.index])

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(pieces + 1,) int32: the first patch of each piece, and P."""
        return cumulated((len(rows) for rows, _ in self.pieces), self.device)

    @cached_property
    def key_cu_seqlens(self) -> Tensor:
        """(pieces + 1,) int32: the same of keys."""
        return cumulated((len(keys) for _, keys in self.pieces), self.device)

    def block_mask(self, causal: bool) -> Any:
        """FlexAttention's BlockMask, (P, gathered): a patch sees its clip."""
        assert not causal, "patches see their whole clip"
        return self._block_mask

    @cached_property
    def _block_mask(self) -> Any:
        index_P, index_S = (
            torch.arange(len(self.pieces), device=self.device).repeat_interleave(bounds.diff().long())
            for bounds in (self.cu_seqlens, self.key_cu_seqlens)
        )
        return make_block_mask(
            lambda _b, _h, row, key: index_P[row] == index_S[key], len(index_P), len(index_S), self.device
        )

    @property
    def num_neighbourhoods(self) -> int:
        """Neighbourhoods of this rank, what the encoder returns."""
        return count(self._neighbourhoods[self.index])

    @cached_property
    def _neighbourhoods(self) -> tuple[tuple[range, ...], ...]:
        """By rank: its neighbourhoods among those of all clips."""
        merge_h, merge_w = self.merge_sizes
        by_rank = []
        for parts in self.rows_by_rank:
            begin, neighbourhoods = 0, []
            for (_, h, w), part in zip(self.clips, parts, strict=True):
                across = w // merge_w
                first, last = (begin + row // merge_h * across for row in (part.start, part.stop))
                neighbourhoods += [range(first, last)] if len(part) else []
                begin += h // merge_h * across
            by_rank.append(tuple(neighbourhoods))
        return tuple(by_rank)

    @property
    def neighbourhoods(self) -> RowExchange:
        """Of neighbourhoods: each rank has its own, and needs all."""
        num_all = sum(h * w for _, h, w in self.clips) // (self.merge_sizes[0] * self.merge_sizes[1])
        return RowExchange(self._neighbourhoods, ((range(num_all),),) * self.size, self.index, self.device)


def shard_clips(
    clips: Tensor | Sequence[Sequence[int]], device: torch.device, grid: RankGrid, merge_sizes: tuple[int, int] = (2, 2)
) -> ShardedClips:
    """This context rank's part of clips (t, h, w), given as numbers or as the encoder's grid_thw (N, 3)."""
    sizes = clips.tolist() if isinstance(clips, Tensor) else clips
    whole = tuple((int(t), int(h), int(w)) for t, h, w in sizes)
    return ShardedClips(whole, device, grid.size("context"), grid.index("context"), merge_sizes)


def split_patches(x_PX: Tensor, clips: ShardedClips) -> Tensor:
    """This rank's part of anything that has a row for each patch of all ranks: pixels.

    Raises:
        ShapeError: another number of rows.
    """
    if x_PX.dim() == 0 or x_PX.shape[0] != clips.num_all_rows:
        accepted = f"{clips.num_all_rows} rows, the patches of all clips"
        raise ShapeError(message("split_patches", "x_PX", f"shape {tuple(x_PX.shape)}", accepted))
    return x_PX.index_select(0, rows_of(clips.owned[clips.index]).to(x_PX.device))


def gather_neighbourhoods(x_QX: Tensor, clips: ShardedClips, grid: RankGrid) -> Tensor:
    """Anything with a row for each neighbourhood here -> those of all ranks, in order, on every rank; differentiable.

    Collective over "context". The backward sums the gradients of all ranks: each computes its own part of the loss from
    the result. A rank that uses none of it must still run its backward.
    """
    return clips.neighbourhoods.gather(x_QX, grid.group("context"))
