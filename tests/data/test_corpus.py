"""The sample corpus: documents of every source, their media, what it says where packages are missing."""

import ast
import gzip
import importlib.util
import json
import multiprocessing
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from k25sys.data import Tokenizer
from k25sys.data.augmentation import Augmentation
from k25sys.data.corpus import Part, sample_corpus
from k25sys.data.corpus.captions import PHOTOGRAPHS, VIDEOS
from k25sys.data.sample import Sample, Source
from k25sys.errors import ArgumentValueError, OptionalPackageError
from tests.data.source_digest import BYTES, digest, learnt

TEXTS = ("python-topics", "python-code", "python-functions")
MEDIA = ("photographs", "picture-stories", "digits", "videos")
MOST_PATCHES = 36


def corpus_of(tokenizer: Tokenizer) -> tuple[Source, ...]:
    return sample_corpus(tokenizer, max_patches=MOST_PATCHES, augmentation=Augmentation(), seed=1)


@pytest.fixture(scope="module")
def corpus() -> dict[str, Source]:
    return {source.name: source for source in corpus_of(BYTES)}


def test_its_sources(corpus: dict[str, Source]) -> None:
    assert tuple(corpus) == (*TEXTS, *MEDIA)
    assert [name for name, source in corpus.items() if source.has_media] == list(MEDIA)
    lengths = {name: len(source) for name, source in corpus.items()}
    assert lengths["digits"] == 1797
    assert lengths["photographs"] == len(PHOTOGRAPHS) == 29
    assert lengths["videos"] == len(VIDEOS) == 4
    least = {"python-topics": 60, "python-code": 100, "python-functions": 300, "picture-stories": 6}
    assert all(lengths[name] >= count for name, count in least.items()), lengths


@pytest.mark.parametrize("name", [*TEXTS, *MEDIA])
def test_each_document_keeps_to_the_contract(corpus: dict[str, Source], name: str) -> None:
    source = corpus[name]
    for index in range(len(source)):
        sample = source.sample(index, 0)
        sample.check(BYTES.special.media_pad)
        assert len(sample.ids_S) > 20
        assert bool(sample.media) == source.has_media
        for item in sample.media:
            assert item.grid[1] * item.grid[2] <= MOST_PATCHES
            if name != "digits" or index % 100 == 0:
                pixels = source.pixels(item.key)
                assert pixels.shape == (item.num_patches, 3, 14, 14)
                assert pixels.std() > 0.01, "a picture of nothing"


def digest_in_new_corpus(epoch: int) -> str:
    sources = {source.name: source for source in corpus_of(BYTES)}
    return digest([sources[name] for name in ("photographs", "videos", "python-functions")], epoch)


def test_another_process_gives_the_same() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(digest_in_new_corpus, (1,)) == digest_in_new_corpus(1)


def test_python_texts(corpus: dict[str, Source]) -> None:
    topics = "".join(learnt(corpus["python-topics"].sample(i, 0)) for i in range(len(corpus["python-topics"])))
    assert len(topics) > 300_000
    assert "list comprehension" in topics
    for index in range(0, len(corpus["python-functions"]), 7):
        tree = ast.parse(learnt(corpus["python-functions"].sample(index, 0)).removesuffix("[EOS]"))
        docstring, function = tree.body
        assert isinstance(docstring, ast.Expr)
        assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        assert ast.get_docstring(function) is None
    for index in range(0, len(corpus["python-code"]), 20):
        ast.parse(learnt(corpus["python-code"].sample(index, 0)).removesuffix("[EOS]"))


def test_digits_are_those_of_scikit_learn() -> None:
    (source,) = (source for source in sample_corpus(BYTES) if source.name == "digits")
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    with gzip.open(Path(spec.origin).parent / "datasets/data/digits.csv.gz", "rt") as file:
        rows = [[int(value) for value in line.split(",")] for line in file]
    for index in (0, 1, 777, 1796):
        sample = source.sample(index, 3)
        *pixels, digit = rows[index]
        assert f"digit {names[digit]} ({digit})" in learnt(sample)
        assert sample.media[0].grid == (1, 4, 4)
        patches = source.pixels(sample.media[0].key).view(4, 4, 3, 14, 14).permute(2, 0, 3, 1, 4).reshape(3, 56, 56)
        shades = (torch.tensor(pixels).view(8, 8) * 255 // 16).repeat_interleave(7, 0).repeat_interleave(7, 1)
        torch.testing.assert_close(patches, ((shades - 127.5) / 127.5).float().expand(3, 56, 56))


def test_captions_are_sentences_of_their_own(corpus: dict[str, Source]) -> None:
    texts = [pair.text for pair in (*PHOTOGRAPHS, *VIDEOS)]
    assert len(set(texts)) == len(texts)
    for index, pair in enumerate(PHOTOGRAPHS):
        assert 2 <= pair.text.count(". ") + 1 <= 3 or ";" in pair.text, pair.text
        assert learnt(corpus["photographs"].sample(index, 0)) == f"{pair.text}[EOS]"


def test_without_augmentation_epochs_are_alike() -> None:
    for source in sample_corpus(BYTES, max_patches=4):
        first, later = source.sample(1, 0), source.sample(1, 7)
        assert np.array_equal(first.ids_S, later.ids_S)
        assert first.media == later.media


def test_nothing_that_is_held_out_is_trained_on() -> None:
    trained, held_out = (
        {source.name.removesuffix("-held-out"): source for source in sample_corpus(BYTES, part=part)}
        for part in (Part.TRAINED, Part.HELD_OUT)
    )
    whole = {source.name: len(source) for source in sample_corpus(BYTES)}
    assert all(source.name.endswith("-held-out") for source in held_out.values())
    assert whole.keys() - held_out.keys() == {"picture-stories", "videos"}
    for name in held_out:
        assert len(trained[name]) + len(held_out[name]) == whole[name]
        assert 0 < len(held_out[name]) < whole[name] / 8
    modules = [BYTES.decode(sample.ids_S[:-1].tolist()) for sample in samples(trained["python-code"])]
    functions = [BYTES.decode(sample.ids_S[:-1].tolist()) for sample in samples(held_out["python-functions"])]
    for text in functions:
        docstring = text.split('"""')[1]  # short ones are alike in modules that are alike: bz2, gzip, lzma
        assert len(docstring) < 300 or not any(docstring in module for module in modules), text[:200]
    of_modules = {text.partition(".")[0] for text in functions}
    for sample in samples(trained["python-functions"]):
        assert BYTES.decode(sample.ids_S[:40].tolist()).partition(".")[0] not in of_modules
    unseen = {json.loads(item.key)["image"] for sample in samples(held_out["photographs"]) for item in sample.media}
    assert unseen
    for name in ("photographs", "picture-stories"):
        assert not unseen & {json.loads(i.key)["image"] for sample in samples(trained[name]) for i in sample.media}


def samples(source: Source) -> list[Sample]:
    return [source.sample(index, 0) for index in range(len(source))]


@pytest.mark.parametrize("package", ["scikit-image", "scikit-learn", "matplotlib", "scikit-video"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    distribution = metadata.distribution

    def without(name: str) -> metadata.Distribution:
        if name == package:
            raise metadata.PackageNotFoundError(name)
        return distribution(name)

    monkeypatch.setattr(metadata, "distribution", without)
    with pytest.raises(OptionalPackageError, match=rf"no {package}.*pip install 'k25sys\[corpus\]'"):
        sample_corpus(BYTES)


def test_bounds() -> None:
    with pytest.raises(ArgumentValueError, match="padded_patches: got 3, accepted at least 4"):
        sample_corpus(BYTES, max_patches=3)
