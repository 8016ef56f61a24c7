"""Packed sequences as micro-batches, and the pixels that are decoded for them."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from k25sys.data import ByteTokenizer, Loader, MediaItem, TokenStream
from k25sys.errors import GridError
from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.dep import Clip, EncoderCost, EncodingPlan, assign, make_packs
from k25sys.training.batches import BatchMaker, StepBatch
from k25sys.training.pixels import PixelCache
from k25sys.training.reading import SourceThread, StepReader
from tests.training.toy_sources import toy_mixture

SPECIAL = ByteTokenizer().special
NUM_STREAMS = 4


@dataclass
class Counting:
    """A source of constant pictures that notes what is asked of it."""

    asked: list[str] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)

    def pixels(self, key: str) -> Tensor:
        self.asked.append(key)
        self.threads.add(threading.current_thread().name)
        if key == "13":
            raise OSError("no such picture")
        return torch.full((4, 3, 14, 14), float(key))


def item(key: int) -> MediaItem:
    return MediaItem(grid=(1, 2, 2), source="a", key=str(key))


def cache_of(source: Counting, room: int) -> PixelCache:
    size = 4 * 3 * 14 * 14 * 4
    return PixelCache({"a": source}, SourceThread(), most_bytes=room * size)  # pyright: ignore[reportArgumentType]


def test_pixels_are_decoded_once_while_there_is_room() -> None:
    source = Counting()
    cache = cache_of(source, room=2)
    for key in (1, 2, 1, 3, 1, 2):
        assert torch.equal(cache.get(item(key)), torch.full((4, 3, 14, 14), float(key)))
    assert source.asked == ["1", "2", "3", "2"]  # 2 was the one that nobody had asked for lately
    assert len(source.threads) == 1
    assert source.threads != {threading.current_thread().name}
    alone = cache_of(source, room=0)
    assert alone.get(item(5)) is alone.get(item(5))


def test_sources_are_read_by_one_thread_of_torchs_too() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert SourceThread().submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


def test_decoding_ahead_takes_half_of_the_room() -> None:
    source = Counting()
    cache = cache_of(source, room=4)
    for key in (1, 2):
        cache.get(item(key))
    cache.decode_ahead(item(key) for key in (3, 4, 5, 6))
    cache.get(item(4))
    assert source.asked == ["1", "2", "3", "4"]
    cache.get(item(1))
    assert source.asked == ["1", "2", "3", "4"]


def test_a_picture_that_fails_ahead_of_its_use_fails_when_it_is_asked_for_and_each_time() -> None:
    source = Counting()
    cache = cache_of(source, room=4)
    cache.decode_ahead([item(13)])
    for _ in range(2):
        with pytest.raises(OSError, match="no such picture"):
            cache.get(item(13))
    assert source.asked == ["13", "13"]


def make_loader(workers: int = 0) -> Loader:
    streams = [
        TokenStream(
            toy_mixture(), number=number, num_streams=NUM_STREAMS, sequence_length=96, num_sequences=400, seed=3,
            pad=SPECIAL.pad, media_pad=SPECIAL.media_pad,
        )
        for number in range(NUM_STREAMS)
    ]  # fmt: skip
    return Loader(streams, workers=workers)


def plan(clips: Sequence[Clip]) -> EncodingPlan:
    cost = EncoderCost.from_sizes(dim=16, mlp_dim=32, num_layers=2)
    return assign(make_packs(clips, max_patches=256), cost, 1)


def make_batches(microbatches: int, *, decoupled: bool, thread: SourceThread | None = None) -> BatchMaker:
    sources = {mixed.name: mixed.source for mixed in toy_mixture().sources}
    return BatchMaker(
        PixelCache(sources, thread or SourceThread()), RankGrid.create(GridSizes()), microbatches=microbatches,
        media_pad=SPECIAL.media_pad, plan=plan if decoupled else None, dtype=torch.float64,
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
        clips = [clip for pack in apart.media.plan.packs for clip in sorted(pack.clips) if clip.microbatch == number]
        if each.pixel_values is not None:
            assert torch.equal(torch.cat([apart.media.load_pixels(clip) for clip in clips]), each.pixel_values)
        positions = int((each.input_ids_T == SPECIAL.media_pad).sum())
        assert apart.media.consumers(0, number).tolist() == [0] * positions


def test_micro_batches_divide_the_sequences() -> None:
    with pytest.raises(GridError, match="microbatches: got 3 micro-batches, accepted a divisor of 4 sequences"):
        make_batches(3, decoupled=False).make(make_loader().next_step())


def make_reader(workers: int, *, decoupled: bool) -> StepReader:
    thread = SourceThread()
    return StepReader(make_loader(workers), make_batches(2, decoupled=decoupled, thread=thread), thread)


def same(found: StepBatch, expected: StepBatch) -> bool:
    pairs = list(zip(found.microbatches, expected.microbatches, strict=True))
    tokens = all(torch.equal(ours.input_ids_T, theirs.input_ids_T) for ours, theirs in pairs)
    if expected.media is not None:
        assert found.media is not None
        clips = [clip for pack in expected.media.plan.packs for clip in pack.clips]
        return tokens and all(found.media.load_pixels(c).equal(expected.media.load_pixels(c)) for c in clips)
    pixels = [(ours.pixel_values, theirs.pixel_values) for ours, theirs in pairs if theirs.pixel_values is not None]
    assert pixels
    return tokens and all(ours is not None and ours.equal(theirs) for ours, theirs in pixels)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_reading_ahead_gives_what_reading_step_by_step_does(workers: int, decoupled: bool) -> None:
    loader, batches, states, expected = make_loader(), make_batches(2, decoupled=decoupled), [], []
    for _ in range(5):
        expected.append(batches.make(loader.next_step()))
        states.append(loader.state())
    for begin in (0, 1, 3):
        reader = make_reader(workers, decoupled=decoupled)
        if begin:
            reader.restore(states[begin - 1])
            assert reader.state() == states[begin - 1]
        for step in range(begin, 5):
            assert same(reader.next_step(4 - step), expected[step])
            assert reader.state() == states[step]
        reader.close()


def test_a_reader_goes_back_when_it_is_ahead() -> None:
    loader = make_loader()
    loader.next_step()
    state, expected = loader.state(), make_batches(2, decoupled=False).make(loader.next_step())
    reader = make_reader(0, decoupled=False)
    for following in (9, 8):
        reader.next_step(following)
    reader.restore(state)
    assert same(reader.next_step(0), expected)
    reader.close()


def test_no_document_is_read_beyond_the_last_step() -> None:
    loader = make_loader()
    reading, reads = loader.next_step, []
    loader.next_step = lambda: reads.append(1) or reading()  # pyright: ignore[reportAttributeAccessIssue]
    thread = SourceThread()
    reader = StepReader(loader, make_batches(2, decoupled=False, thread=thread), thread)
    for following in (3, 2, 1, 0):
        reader.next_step(following)
    reader.close()
    assert len(reads) == 4
