"""Shares of tokens, by group and by source, at every moment of a run."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25sys.data import MixedSource, Mixture
from k25sys.errors import ArgumentTypeError, ArgumentValueError, DataError
from tests.data.toy_sources import ToySource, text_sources, toy_mixture, toy_streams, vision_sources

TEXT, MORE, PICTURES = ToySource(0, [30, 9, 17]), ToySource(1, [5, 44]), ToySource(2, [20, 33], [8, 12])


@settings(max_examples=60)
@given(
    text_sources(0),
    text_sources(1),
    vision_sources(2),
    vision_sources(3),
    st.tuples(*[st.floats(0.1, 5.0)] * 4),
    st.sampled_from([(None, 0.0), (0.1, 0.0), (0.1, 0.5), (0.2, 0.7), (0.4, 0.2)]),
    st.integers(1, 5),
)
def test_shares_are_within_a_document_of_the_wanted_ones(text, more, one, other, weights, shares, of) -> None:
    length, steps = 80, 40
    budget, inject = shares
    sources = [text, more, one, other]
    mixed = [MixedSource(source, weight) for source, weight in zip(sources, weights, strict=True)]
    mixture = Mixture(mixed, vision_budget=budget, inject=inject)
    ratio = (weights[2] + weights[3]) / sum(weights) if budget is None else budget / (1 - inject)
    longest = {source.name: max(source.lengths) for source in sources}
    picture, piece = max(longest["toy2"], longest["toy3"]), min(length, max(longest["toy0"], longest["toy1"]))
    options = {"sequence_length": length, "num_sequences": steps * of}
    for stream in toy_streams(mixture, range(of), of, **options):
        tokens: Counter[str] = Counter()
        for step in range(1, steps + 1):
            tokens.update(stream.next().tokens_by_source)
            assert tokens.total() == step * length
            vision, wanted = tokens["toy2"] + tokens["toy3"], ratio * max(0, step * length - inject * steps * length)
            assert wanted - picture - ratio * (piece + picture) - 1 <= vision <= wanted + picture + 1
            for a, b in ((0, 1), (2, 3)):
                group = tokens[f"toy{a}"] + tokens[f"toy{b}"]
                share = group * weights[a] / (weights[a] + weights[b])
                assert abs(tokens[f"toy{a}"] - share) <= max(longest[f"toy{a}"], longest[f"toy{b}"])


def test_early_mid_and_late_injection_see_the_same_vision_tokens() -> None:
    of, steps, length = 8, 100, 64
    budget, documents = 0.1, [20, 33, 11, 40]
    sources = [MixedSource(ToySource(0, [90, 31, 260]), 1.0), MixedSource(ToySource(1, documents, [9] * 4), 1.0)]
    for inject, ratio in ((0.0, 0.1), (0.5, 0.2), (0.8, 0.5)):
        mixture = Mixture(sources, vision_budget=budget, inject=inject)
        assert mixture.ratio == pytest.approx(ratio)
        options = {"sequence_length": length, "num_sequences": of * steps}
        vision = [0] * steps
        for stream in toy_streams(mixture, range(of), of, **options):
            for step in range(steps):
                vision[step] += stream.next().tokens_by_source.get("toy1", 0)
        begin = round(inject * steps)
        assert sum(vision[:begin]) == 0
        assert sum(vision) == pytest.approx(budget * of * steps * length, rel=0.02)


@pytest.mark.parametrize("of", [4, 8, 16])
def test_streams_do_not_all_draw_vision_in_the_same_step(of) -> None:
    sources = [MixedSource(ToySource(0, [49] * 3), 1.0), MixedSource(ToySource(1, [49] * 3, [9] * 3), 1.0)]
    streams = toy_streams(Mixture(sources, vision_budget=0.25), range(of), of)
    for _ in range(30):
        tokens = [stream.next().tokens_by_source.get("toy1", 0) for stream in streams]
        assert sum(tokens) == 48 * of // 4


def test_a_source_that_is_used_up_leaves_its_share_to_the_others() -> None:
    sources = [MixedSource(TEXT, 3.0, max_epochs=2), MixedSource(MORE, 1.0), MixedSource(PICTURES, 1.0, max_epochs=3)]
    (stream,) = toy_streams(Mixture(sources, vision_budget=0.3), [0], 1)
    tokens: Counter[str] = Counter()
    for _ in range(30):
        tokens.update(stream.next().tokens_by_source)
    assert tokens["toy0"] == 2 * sum(size - 1 for size in TEXT.lengths)
    assert tokens["toy2"] == 3 * sum(size - 1 for size in PICTURES.lengths)
    assert tokens.total() == 30 * 48


def test_a_source_begins_at_its_start_and_is_owed_nothing_from_before() -> None:
    of, steps = 2, 40
    for stream in toy_streams(toy_mixture(vision_budget=0.0, inject=0.0), range(of), of):
        tokens = [stream.next().tokens_by_source.get("toy1", 0) for _ in range(steps)]
        assert sum(tokens[:10]) == 0
        assert sum(tokens[10:]) == pytest.approx((steps - 10) * 48 / 3, abs=101)


def test_text_that_ends_before_the_injection_is_an_error_not_early_vision() -> None:
    mixture = Mixture([MixedSource(TEXT, 1.0, 1), MixedSource(PICTURES, 1.0)], vision_budget=0.1, inject=0.5)
    (stream,) = toy_streams(mixture, [0], 1)
    stream.next()
    stream.next()
    with pytest.raises(DataError, match=r"after 2 sequences, 53 tokens \(toy0 53, toy2 0\).*vision begins only at"):
        stream.next()


@pytest.mark.parametrize(
    ("sources", "options", "says"),
    [
        ([], {}, "one or more"),
        ([(TEXT, 1.0), (TEXT, 1.0)], {}, "different names"),
        ([(TEXT, 1.0)], {"vision_budget": 0.1}, "no source has media"),
        ([(PICTURES, 1.0)], {"vision_budget": 0.9}, "all sources have media"),
        ([(TEXT, 1.0), (PICTURES, 1.0)], {"inject": 0.5}, "vision_budget: got None with inject"),
        ([(TEXT, 1.0), (PICTURES, 1.0)], {"inject": 0.5, "vision_budget": 0.6}, "1 - inject = 0.5"),
        ([(TEXT, 1.0), (PICTURES, 1.0)], {"inject": 1.0, "vision_budget": 0.0}, r"inject.*\[0, 1\)"),
        ([(TEXT, 1.0, None, 0.1), (PICTURES, 1.0)], {"inject": 0.5, "vision_budget": 0.1}, "at least one text"),
        ([(TEXT, 0.0)], {}, "weight of source 'toy0'"),
        ([(TEXT, float("nan"))], {}, "weight of source 'toy0'"),
        ([(TEXT, 1.0, 0)], {}, "max_epochs of source 'toy0'"),
        ([(TEXT, 1.0, None, 1.0)], {}, "start of source 'toy0'"),
        ([(ToySource(7, []), 1.0)], {}, "'toy7': got 0 documents"),
    ],
)
def test_mixtures_that_cannot_be(sources, options, says) -> None:
    with pytest.raises(ArgumentValueError, match=says):
        Mixture([MixedSource(*arguments) for arguments in sources], **options)


def test_a_bare_source_is_refused() -> None:
    with pytest.raises(ArgumentTypeError, match="a MixedSource"):
        Mixture([TEXT])  # type: ignore[list-item]
