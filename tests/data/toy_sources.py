"""Sources whose every token says where it comes from, and streams over them."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from k25sys.data import MediaItem, MixedSource, Mixture, PackedSequence, Sample, TokenStream
from k25sys.errors import DataError, DataWorkerError

PAD, MEDIA_PAD, FIRST = 0, 1, 10
PLACES, DOCUMENTS, EPOCHS = 1000, 1000, 1000


class ToySource:
    """Documents of given lengths. Token = number of source, epoch, document, position, so no two tokens are equal."""

    def __init__(self, number: int, lengths: Sequence[int], rows: Sequence[int] = ()) -> None:
        """`rows`: embeddings of each document's picture, within its length; none for text."""
        self.name, self.number, self.lengths, self.rows = f"toy{number}", number, tuple(lengths), tuple(rows)
        self.has_media = bool(rows)

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int, epoch: int) -> Sample:
        length = self.lengths[index]
        code = ((self.number * EPOCHS + epoch) * DOCUMENTS + index) * PLACES
        ids_S = FIRST + code + np.arange(length, dtype=np.int64)
        media: tuple[MediaItem, ...] = ()
        if self.has_media and self.rows[index]:
            rows = self.rows[index]
            assert rows <= length - 2
            ids_S[1 : 1 + rows] = MEDIA_PAD
            media = (MediaItem(grid=(1, 2, 2 * rows), source=self.name, key=f"{index} of epoch {epoch}"),)
        return Sample(ids_S=ids_S, loss_S=(ids_S != MEDIA_PAD) & (np.arange(length) % 5 != 3), media=media)

    def pixels(self, key: str) -> torch.Tensor:
        raise AssertionError(f"streams decode nothing, and ask for {key}")


class PrintedSource(ToySource):
    """Says that its documents are those of `fingerprint`."""

    def __init__(self, number: int, lengths: Sequence[int], fingerprint: str) -> None:
        super().__init__(number, lengths)
        self.fingerprint = fingerprint


class BrokenSource(ToySource):
    """Fails at one document, until it is mended."""

    is_mended = False

    def sample(self, index: int, epoch: int) -> Sample:
        if (index, epoch) == (1, 1) and not self.is_mended:
            raise FileNotFoundError("photo.jpg is gone")
        return super().sample(index, epoch)


def document_of(token: int) -> tuple[int, int, int, int]:
    """Source number, epoch, index and position of a token."""
    rest, position = divmod(token - FIRST, PLACES)
    rest, index = divmod(rest, DOCUMENTS)
    return *divmod(rest, EPOCHS), index, position


def text_sources(number: int = 0, *, longest: int = 70) -> st.SearchStrategy[ToySource]:
    lengths = st.lists(st.integers(0, longest), min_size=1, max_size=12).filter(lambda found: max(found) > 1)
    return lengths.map(lambda found: ToySource(number, found))


@st.composite
def vision_sources(draw: st.DrawFn, number: int = 1, *, longest: int = 40) -> ToySource:
    lengths = draw(st.lists(st.integers(4, longest), min_size=1, max_size=8))
    return ToySource(number, lengths, [draw(st.integers(0, length - 2)) for length in lengths])


def toy_mixture(**options: Any) -> Mixture:
    """Two texts (one begins later) and two sources of pictures."""
    sources = [
        MixedSource(ToySource(0, [7, 30, 101, 2, 55, 16]), 2.0),
        MixedSource(ToySource(1, [12, 9, 40]), 1.0, start=0.25),
        MixedSource(ToySource(2, [12, 20, 31, 9], [8, 12, 20, 0]), 1.0),
        MixedSource(ToySource(3, [25, 6], [16, 4]), 0.5),
    ]
    return Mixture(sources, **({"vision_budget": 0.2, "inject": 0.25} | options))


def toy_streams(mixture: Mixture, numbers: Iterable[int], of: int, **options: Any) -> list[TokenStream]:
    settings = {"sequence_length": 48, "num_sequences": 40 * of, "seed": 5, "pad": PAD, "media_pad": MEDIA_PAD}
    return [TokenStream(mixture, number=b, num_streams=of, **(settings | options)) for b in numbers]


def until_error(step: Callable[[], Any]) -> tuple[list[Any], Exception]:
    """What the steps gave, and the error that ended them."""
    given = []
    while True:
        try:
            given.append(step())
        except (DataError, DataWorkerError) as error:
            return given, error


def plain(packed: PackedSequence) -> tuple[Any, ...]:
    """All that a sequence is, to be compared."""
    tensors = [packed.input_ids_T, packed.targets_T, packed.loss_mask_T]
    lists = [(tensor.dtype, tensor.tolist()) for tensor in tensors]
    return (*lists, packed.cu_seqlens, packed.media, packed.tokens_by_source)


def checked_targets(packed: PackedSequence, mixture: Mixture, length: int) -> Counter[tuple[int, int, int, int]]:
    """What a sequence predicts: (source, epoch, document, position) of each target. Asserts all that it must keep."""
    by_number = {mixed.source.number: mixed.source for mixed in mixture.sources}  # type: ignore[attr-defined]
    assert all(t.shape == (length,) for t in (packed.input_ids_T, packed.targets_T, packed.loss_mask_T))
    assert packed.input_ids_T.dtype == packed.targets_T.dtype == torch.int64
    assert packed.loss_mask_T.dtype == torch.bool
    assert packed.cu_seqlens[0] == 0
    assert packed.cu_seqlens[-1] == length
    found: Counter[tuple[int, int, int, int]] = Counter()
    media, tokens = [], Counter()
    for start, end in zip(packed.cu_seqlens, packed.cu_seqlens[1:], strict=False):
        assert start < end
        inputs, targets = packed.input_ids_T[start:end].tolist(), packed.targets_T[start:end].tolist()
        if set(inputs) == {PAD}:
            assert end == length
            assert set(targets) == {PAD}
            assert not packed.loss_mask_T[start:end].any()
            continue
        known = next(token for token in [*inputs, *targets] if token != MEDIA_PAD)
        number, epoch, index, _ = document_of(known)
        sample = by_number[number].sample(index, epoch)
        ids = sample.ids_S.tolist()
        offset = document_of(inputs[0])[-1]
        assert inputs == ids[offset : offset + end - start]
        assert targets == ids[offset + 1 : offset + 1 + end - start]
        assert packed.loss_mask_T[start:end].tolist() == sample.loss_S[offset + 1 : offset + 1 + end - start].tolist()
        if sample.media:
            assert end - start == len(ids) - 1, "a document with media was cut"
        found.update((number, epoch, index, offset + 1 + i) for i in range(end - start))
        media += sample.media
        tokens[by_number[number].name] += end - start
    assert packed.media == tuple(media)
    assert packed.tokens_by_source == tokens
    return found
