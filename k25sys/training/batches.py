"""Packed sequences of a step as the micro-batches of this rank, with the media of all ranks as metadata."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from k25sys.data import MediaItem, PackedSequence
from k25sys.errors import GridError, message
from k25sys.parallel.dep import Clip, EncodingPlan
from k25sys.parallel.grid import RankGrid
from k25sys.training.microbatch import MicroBatch
from k25sys.training.pixels import PixelCache
from k25sys.training.stage import media_consumers
from k25sys.training.step import StepMedia


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What this rank trains on in a step."""

    microbatches: list[MicroBatch]
    """Without pixels before `BatchMaker.load`, and with a decoupled encoder."""
    encoded_here: tuple[MediaItem, ...]
    """What this rank's encoder takes: of its own micro-batches in order on stage 0, or whatever it owns."""
    media: StepMedia | None
    """With a decoupled encoder."""
    num_tokens: int
    """Of the global batch, padding included."""
    loss_tokens: int
    patches: int
    """Of the global batch."""
    tokens_by_source: dict[str, int]
    """Of the global batch."""


@dataclass(frozen=True, kw_only=True)
class _About:
    """A micro-batch as its data rank tells it to the others: where its media lie, without tokens and pixels."""

    cu_seqlens: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    """Begin and end of the media_pad positions that follow each other."""
    items: tuple[MediaItem, ...]
    loss_tokens: int
    tokens_by_source: dict[str, int]


class BatchMaker:
    """Makes the batches of every step.

    Args:
        pixels: of every source of the mixture: any rank may have to decode any picture.
        grid: of all ranks.
        microbatches: of each data rank; its sequences are divided among them, in order.
        media_pad: the token in place of embeddings.
        plan: of a decoupled encoder, who encodes which clips of a step; None: stage 0 encodes its own.
        dtype: of pixels.
    """

    def __init__(
        self,
        pixels: PixelCache,
        grid: RankGrid,
        *,
        microbatches: int,
        media_pad: int | None,
        plan: Callable[[Sequence[Clip]], EncodingPlan] | None,
        dtype: torch.dtype,
    ) -> None:
        self.pixels, self.grid, self.num_microbatches = pixels, grid, microbatches
        self.media_pad, self.plan, self.dtype = media_pad, plan, dtype
        self._first_rank = {
            grid.sizes.coordinate(rank, "data"): rank for rank in reversed(range(grid.sizes.ranks_per_stage))
        }

    def make(self, sequences: Sequence[PackedSequence]) -> StepBatch:
        """`describe`, then `load`."""
        return self.load(self.describe(sequences))

    def describe(self, sequences: Sequence[PackedSequence]) -> StepBatch:
        """This data rank's sequences as micro-batches, all but the pixels. Collective over "data".

        Raises:
            GridError: sequences that the micro-batches do not divide.
        """
        if len(sequences) % self.num_microbatches:
            got, accepted = f"{self.num_microbatches} micro-batches", f"a divisor of {len(sequences)} sequences"
            raise GridError(message("run", "pipeline.microbatches", got, accepted))
        per = len(sequences) // self.num_microbatches
        groups = [sequences[i : i + per] for i in range(0, len(sequences), per)]
        everyone = self._gather([self._about(group) for group in groups])
        flat = [about for abouts in everyone for about in abouts]
        loss_tokens = sum(about.loss_tokens for about in flat)
        own = everyone[self.grid.index("data")]
        batches = [_microbatch(group, about, max(1, loss_tokens)) for group, about in zip(groups, own, strict=True)]
        media, encoded_here = self._media(everyone)
        tokens: dict[str, int] = {}
        for about in flat:
            for name, count in about.tokens_by_source.items():
                tokens[name] = tokens.get(name, 0) + count
        return StepBatch(
            microbatches=batches,
            encoded_here=encoded_here,
            media=media,
            num_tokens=sum(about.cu_seqlens[-1] for about in flat),
            loss_tokens=loss_tokens,
            patches=sum(item.num_patches for about in flat for item in about.items),
            tokens_by_source=tokens,
        )

    def _about(self, group: Sequence[PackedSequence]) -> _About:
        ids_T = torch.cat([sequence.input_ids_T for sequence in group])
        lengths = [end - begin for sequence in group for begin, end in pairwise(sequence.cu_seqlens)]
        tokens: dict[str, int] = {}
        for sequence in group:
            for name, count in sequence.tokens_by_source.items():
                tokens[name] = tokens.get(name, 0) + count
        return _About(
            cu_seqlens=tuple(accumulate(lengths, initial=0)),
            runs=() if self.media_pad is None else _runs(ids_T == self.media_pad),
            items=tuple(item for sequence in group for item in sequence.media),
            loss_tokens=sum(int(sequence.loss_mask_T.sum()) for sequence in group),
            tokens_by_source=tokens,
        )

    def _gather(self, own: list[_About]) -> list[list[_About]]:
        group = self.grid.group("data")
        if group is None:
            return [own]
        everyone: list[list[_About]] = [[] for _ in range(self.grid.size("data"))]
        dist.all_gather_object(everyone, own, group=group)
        return everyone

    def _media(self, everyone: list[list[_About]]) -> tuple[StepMedia | None, tuple[MediaItem, ...]]:
        if self.plan is None:
            own = everyone[self.grid.index("data")] if self.grid.index("pipeline") == 0 else []
            return None, tuple(item for about in own for item in about.items)
        items = {
            Clip(data, number, index, item.grid): item
            for data, abouts in enumerate(everyone)
            for number, about in enumerate(abouts)
            for index, item in enumerate(about.items)
        }

        def consumers(data: int, number: int) -> Tensor:
            assert self.media_pad is not None
            skeleton = _skeleton(everyone[data][number], self.media_pad)
            return media_consumers(skeleton, self.media_pad, self.grid, self._first_rank[data])

        plan = self.plan(tuple(items))
        media = StepMedia(plan=plan, consumers=consumers, load_pixels=lambda clip: self._pixels(items[clip]))
        return media, tuple(items[clip] for pack in plan.packs_of(self.grid.rank) for clip in pack.clips)

    def load(self, batch: StepBatch) -> StepBatch:
        """With the pixels that stage 0 encodes, where it does and this rank is of it. Raises what decoding raises."""
        if batch.media is not None or not batch.encoded_here:
            return batch
        items, microbatches = iter(batch.encoded_here), list(batch.microbatches)
        for number, each in enumerate(microbatches):
            if each.grid_thw is not None:
                pixels = torch.cat([self._pixels(next(items)) for _ in range(len(each.grid_thw))])
                microbatches[number] = replace(each, pixel_values=pixels)
        return replace(batch, microbatches=microbatches)

    def _pixels(self, item: MediaItem) -> Tensor:
        return self.pixels.get(item).to(self.dtype)


def _microbatch(group: Sequence[PackedSequence], about: _About, normalizer: float) -> MicroBatch:
    return MicroBatch(
        input_ids_T=torch.cat([sequence.input_ids_T for sequence in group]),
        targets_T=torch.cat([sequence.targets_T for sequence in group]),
        loss_mask_T=torch.cat([sequence.loss_mask_T for sequence in group]),
        cu_seqlens=about.cu_seqlens,
        normalizer=float(normalizer),
        grid_thw=torch.tensor([item.grid for item in about.items]) if about.items else None,
    )


def _runs(mask_T: Tensor) -> tuple[tuple[int, int], ...]:
    """Begin and end of each stretch of True."""
    runs, place = [], 0
    for value, stretch in groupby(mask_T.tolist()):
        end = place + len(list(stretch))
        if value:
            runs.append((place, end))
        place = end
    return tuple(runs)


def _skeleton(about: _About, media_pad: int) -> MicroBatch:
    """Another rank's micro-batch as far as it says where media lie."""
    num_tokens = about.cu_seqlens[-1]
    ids_T = torch.full((num_tokens,), media_pad + 1)
    for begin, end in about.runs:
        ids_T[begin:end] = media_pad
    return MicroBatch(
        input_ids_T=ids_T, targets_T=ids_T, loss_mask_T=torch.zeros(num_tokens, dtype=torch.bool),
        cu_seqlens=about.cu_seqlens, normalizer=1.0,
    )  # fmt: skip
