"""What the recipes read: the sample corpus and drawn pictures, which need no network, or a user's files."""

from collections.abc import Sequence

from k25sys.data import MixedSource, Mixture, Source, Tokenizer, hold_out
from k25sys.data.augmentation import Augmentation
from k25sys.data.corpus import sample_corpus
from k25sys.data.drawn import DRAWN_KINDS, DrawnPictures
from k25sys.data.geometry import MediaLimits
from k25sys.data.sources.files import open_files
from k25sys.training.config import RunConfig

_WEIGHTS = {"python-topics": 4.0, "python-code": 4.0, "python-functions": 2.0, "photographs": 4.0}
"""Of the corpus's sources within text and within vision; 1 for the others."""
_DRAWN = 100_000


def corpus_of(run: RunConfig, tokenizer: Tokenizer) -> Sequence[tuple[Source, float]]:
    """Sources with their weights within text and within vision, without the documents that are held out."""
    return [(hold_out(source)[0], weight) for source, weight in _whole_corpus(run, tokenizer)]


def held_out_of(run: RunConfig, tokenizer: Tokenizer) -> dict[str, Mixture]:
    """Every twentieth document of each source, of text and of vision."""
    kinds: dict[str, list[MixedSource]] = {"text": [], "vision": []}
    for source, weight in _whole_corpus(run, tokenizer):
        held_out = hold_out(source)[1]
        if held_out is not None:
            kinds["vision" if source.has_media else "text"].append(MixedSource(held_out, weight))
    return {kind: Mixture(sources) for kind, sources in kinds.items() if sources}


def _whole_corpus(run: RunConfig, tokenizer: Tokenizer) -> Sequence[tuple[Source, float]]:
    """The corpus and the drawn pictures.

    Files in data.files take the place of the corpus's text: .jsonl has {"text": ...} a line, anything else is a
    document each.
    """
    # A story of four pictures, or of a video, must fit a sequence with all its text, which bytes make long.
    length = run.batch.sequence_length
    patches = min(4096, length) if length >= 4096 else max(16, length // 8)
    corpus = sample_corpus(tokenizer, max_patches=patches, augmentation=Augmentation(), seed=run.seed)
    chosen = [source for source in corpus if source.has_media or not run.data.files]
    sources = [(source, _WEIGHTS.get(source.name, 1.0)) for source in chosen]
    sources += [
        (DrawnPictures(kind, tokenizer, seed=run.seed, length=_DRAWN, augmentation=Augmentation()), 1.0)
        for kind in DRAWN_KINDS
    ]
    files = sources_of_files(
        run.data.files, tokenizer, max_patches=patches, augmentation=Augmentation(), seed=run.seed
    )  # fmt: skip
    return [*sources, *((source, 1.0) for source in files)]


def sources_of_files(
    files: Sequence[str], tokenizer: Tokenizer, *, max_patches: int, augmentation: Augmentation, seed: int
) -> list[Source]:
    """The user's files by what is in them, see `open_files`, under other names than those of the corpus."""
    corpus = ("python-topics", "python-code", "python-functions", "photographs", "picture-stories", "digits", "videos")
    return open_files(
        files, tokenizer, limits=MediaLimits(padded_patches=max_patches), augmentation=augmentation, seed=seed,
        taken=[*corpus, *(f"drawn-{kind}" for kind in DRAWN_KINDS)],
    )  # fmt: skip
