"""Packed sequences as micro-batches, and the pixels that are decoded for them."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from k25sys.data import ByteTokenizer, Loader, MediaItem, TokenStream
from k25sys.errors import GridError
from k25sys.parallel import GridSizes, RankGrid
from k25sys.training.batches import BatchMaker, PixelCache
from tests.training.toy_sources import toy_mixture

SPECIAL = ByteTokenizer().special
NUM_STREAMS = 4


@dataclass
class Counting:
    """A source of constant pictures that notes what is asked of it."""

    asked: list[str] = field(default_factory=list)

    def pixels(self, key: str) -> Tensor:
        self.asked.append(key)
        return torch.full((4, 3, 14, 14), float(key))


def item(key: int) -> MediaItem:
    return MediaItem(grid=(1, 2, 2), source="a", key=str(key))


def test_pixels_are_decoded_once_while_there_is_room() -> None:
    source = Counting()
    size = 4 * 3 * 14 * 14 * 4
    cache = PixelCache({"a": source}, most_bytes=2 * size)  # pyright: ignore[reportArgumentType]
    for key in (1, 2, 1, 3, 1, 2):
        assert torch.equal(cache.pixels(item(key)), torch.full((4, 3, 14, 14), float(key)))
    assert source.asked == ["1", "2", "3", "2"]  # 2 was the one that nobody had asked for lately
    alone = PixelCache({"a": source}, most_bytes=1)  # pyright: ignore[reportArgumentType]
    assert alone.pixels(item(5)) is alone.pixels(item(5))


def make_loader() -> Loader:
    streams = [
        TokenStream(
            toy_mixture(), number=number, num_streams=NUM_STREAMS, sequence_length=96, num_sequences=400, seed=3,
            pad=SPECIAL.pad, media_pad=SPECIAL.media_pad,
        )
        for number in range(NUM_STREAMS)
    ]  # fmt: skip
    return Loader(streams)


def make_batches(microbatches: int, *, decoupled: bool) -> BatchMaker:
    sources = {mixed.name: mixed.source for mixed in toy_mixture().sources}
    return BatchMaker(
        sources, RankGrid.create(GridSizes()), microbatches=microbatches, media_pad=SPECIAL.media_pad,
        decoupled=decoupled, dtype=torch.float64,
    )  # fmt: skip


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_micro_batches_hold_the_sequences_in_order(microbatches: int) -> None:
    sequences = make_loader().next_step()
    batch = make_batches(microbatches, decoupled=False).make(sequences)
    for name in ("input_ids_T", "targets_T", "loss_mask_T"):
        whole = torch.cat([getattr(each, name) for each in batch.microbatches])
        assert torch.equal(whole, torch.cat([getattr(sequence, name) for sequence in sequences]))
    for each in batch.microbatches:
        assert each.normalizer == batch.loss_tokens == sum(int(s.loss_mask_T.sum()) for s in sequences)
    lengths = [e - b for each in batch.microbatches for b, e in zip(each.cu_seqlens, each.cu_seqlens[1:], strict=False)]
    assert lengths == [e - b for s in sequences for b, e in zip(s.cu_seqlens, s.cu_seqlens[1:], strict=False)]
    media = [one for sequence in sequences for one in sequence.media]
    assert media
    pixels = [each.pixel_values for each in batch.microbatches if each.pixel_values is not None]
    assert torch.cat(pixels).dtype == torch.float64
    assert len(torch.cat(pixels)) == batch.patches == sum(one.num_patches for one in media)
    assert batch.tokens_by_source.keys() == {"sentences", "drawn-shapes"}


def test_a_decoupled_encoder_gets_every_clip_with_its_consumers() -> None:
    sequences = make_loader().next_step()
    apart, together = (make_batches(2, decoupled=decoupled).make(sequences) for decoupled in (True, False))
    assert apart.media is not None
    assert together.media is None
    assert all(each.pixel_values is None for each in apart.microbatches)
    for number, each in enumerate(together.microbatches):
        clips = [clip for clip in apart.media.clips if clip.microbatch == number]
        if each.pixel_values is not None:
            assert torch.equal(torch.cat([apart.media.load_pixels(clip) for clip in clips]), each.pixel_values)
        positions = int((each.input_ids_T == SPECIAL.media_pad).sum())
        assert apart.media.consumers(0, number).tolist() == [0] * positions


def test_micro_batches_divide_the_sequences() -> None:
    with pytest.raises(GridError, match="microbatches: got 3 micro-batches, accepted a divisor of 4 sequences"):
        make_batches(3, decoupled=False).make(make_loader().next_step())
