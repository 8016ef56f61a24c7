"""Documents in sequences: nothing lost, nothing twice, no document across a bound, media whole."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25sys.data import MixedSource, Mixture
from k25sys.errors import DataError
from tests.data.toy_sources import (
    MEDIA_PAD,
    PAD,
    BrokenSource,
    ToySource,
    checked_targets,
    plain,
    text_sources,
    toy_streams,
    until_error,
    vision_sources,
)


@settings(max_examples=60)
@given(
    text_sources(0),
    text_sources(1),
    vision_sources(2),
    st.integers(1, 4),
    st.integers(24, 90),
    st.lists(st.integers(1, 3), min_size=3, max_size=3),
    st.sampled_from([None, 0.1, 0.5]),
)
def test_each_token_of_each_epoch_is_predicted_exactly_once(text, more, vision, of, length, epochs, budget) -> None:
    sources = [MixedSource(s, 1.0, max_epochs=e) for s, e in zip([text, more, vision], epochs, strict=True)]
    mixture = Mixture(sources, vision_budget=budget)
    found: Counter[tuple[int, int, int, int]] = Counter()
    skipped = 0
    for stream in toy_streams(mixture, range(of), of, sequence_length=length):
        sequences, end = until_error(stream.next)
        for packed in sequences:
            found += checked_targets(packed, mixture, length)
        state = stream.state()
        used = sum(entry["tokens"] for entry in state["sources"].values())
        left = f"no document left for stream {stream.number} after {len(sequences)} sequences, {used} tokens"
        assert left in str(end)
        assert state["held"] == {}
        skipped += sum(entry["skipped"] for entry in state["sources"].values())
    wanted, unusable = Counter(), 0
    for mixed, source in zip(sources, [text, more, vision], strict=True):
        for epoch in range(mixed.max_epochs or 0):
            for index, size in enumerate(source.lengths):
                is_too_long = size - 1 > length and source.has_media and source.rows[index] > 0
                unusable += size < 2 or is_too_long
                if not is_too_long:
                    wanted.update((source.number, epoch, index, position) for position in range(1, size))
    assert found == wanted
    assert skipped == unusable


def test_media_wait_for_room_and_text_fills_or_padding_where_there_is_none() -> None:
    pictures = MixedSource(ToySource(1, [31], [20]), 1.0)
    (alone,) = toy_streams(Mixture([pictures]), [0], 1)
    packed = alone.next()
    assert packed.cu_seqlens == (0, 30, 48)
    assert packed.input_ids_T[30:].tolist() == packed.targets_T[30:].tolist() == [PAD] * 18
    assert packed.tokens_by_source == {"toy1": 30}
    mixture = Mixture([MixedSource(ToySource(0, [500]), 1.0), pictures], vision_budget=0.5)
    (mixed,) = toy_streams(mixture, [0], 1)
    seen = [mixed.next() for _ in range(20)]
    assert all(PAD not in packed.input_ids_T for packed in seen)
    assert sum(packed.tokens_by_source.get("toy1", 0) for packed in seen) == pytest.approx(480, abs=45)


def test_documents_that_cannot_be_used_are_counted_and_a_source_of_nothing_else_is_an_error() -> None:
    (stream,) = toy_streams(Mixture([MixedSource(ToySource(1, [60, 20], [40, 8]), 1.0)]), [0], 1)
    for _ in range(10):
        stream.next()
    assert stream.state()["sources"]["toy1"]["skipped"] >= 5
    for source in (ToySource(1, [60], [40]), ToySource(1, [1, 0])):
        (stream,) = toy_streams(Mixture([MixedSource(source, 1.0)]), [0], 1)
        with pytest.raises(DataError, match=r"'toy1'.* in a row that cannot be used"):
            stream.next()


class _Faulty(ToySource):
    """Breaks the contract in the way of its number."""

    def sample(self, index, epoch):
        sample = super().sample(index, epoch)
        if self.number == 4:
            object.__setattr__(sample, "loss_S", sample.loss_S[1:])
        if self.number == 5:
            object.__setattr__(sample, "ids_S", sample.ids_S.astype("float32"))
        if self.number == 6:
            sample.ids_S[0] = MEDIA_PAD
        if self.number == 7:
            object.__setattr__(sample, "ids_S", sample.ids_S[: self.rows[index] + 1])
            object.__setattr__(sample, "loss_S", sample.loss_S[: self.rows[index] + 1])
        if self.number == 8:
            self.has_media = False
        return sample


@pytest.mark.parametrize(
    ("number", "says"), [(4, "loss_S"), (5, "float32"), (6, "media_pad"), (7, "very end"), (8, "without has_media")]
)
def test_a_source_that_breaks_its_contract_is_named(number, says) -> None:
    (stream,) = toy_streams(Mixture([MixedSource(_Faulty(number, [30], [12]), 1.0)]), [0], 1)
    with pytest.raises(DataError, match=f"source 'toy{number}', document 0, epoch 0.*{says}"):
        stream.next()


def test_after_a_failure_the_stream_is_where_it_was() -> None:
    source = BrokenSource(3, [40, 30, 20])
    mixture = Mixture([MixedSource(source, 1.0), MixedSource(ToySource(0, [10, 7]), 1.0)])
    (stream,) = toy_streams(mixture, [0], 1)
    sequences, error = until_error(stream.next)
    assert "source 'toy3', document 1, epoch 1: got FileNotFoundError: photo.jpg is gone" in str(error)
    assert isinstance(error.__cause__, FileNotFoundError)
    assert str(until_error(stream.next)[1]) == str(error)
    source.is_mended = True
    (calm,) = toy_streams(mixture, [0], 1)
    assert [plain(calm.next()) for _ in sequences] == list(map(plain, sequences))
    assert calm.state() == stream.state()
    assert plain(calm.next()) == plain(stream.next())
    assert calm.state() == stream.state()
