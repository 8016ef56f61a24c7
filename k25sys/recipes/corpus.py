"""What the recipes read: the sample corpus and drawn pictures, which need no network, or a user's files."""

from collections.abc import Sequence

from k25sys.data import MixedSource, Mixture, Source, Tokenizer, hold_out
from k25sys.data.augmentation import Augmentation
from k25sys.data.corpus import Part, sample_corpus
from k25sys.data.drawn import DRAWN_KINDS, DrawnPictures
from k25sys.data.geometry import MediaLimits
from k25sys.data.sources.files import open_files
from k25sys.training.config import RunConfig

CORPUS_TEXTS = ("python-topics", "python-code", "python-functions")
_WEIGHTS = {"python-topics": 4.0, "python-code": 4.0, "python-functions": 2.0, "photographs": 4.0}
"""Of the corpus's sources within text and within vision; 1 for the others."""
_DRAWN = 100_000


def corpus_of(run: RunConfig, tokenizer: Tokenizer) -> Sequence[tuple[Source, float]]:
    """Sources with their weights within text and within vision, without what is held out.

    The user's files with text alone take the place of the corpus's text; those with media, of its pictures and videos.
    """
    files = _files(run, tokenizer)
    sources = [*_sample_corpus(run, tokenizer, Part.TRAINED, files), *_drawn(run, tokenizer, files, 0)]
    return _weighted([*sources, *(hold_out(source)[0] for source in files)])


def held_out_of(run: RunConfig, tokenizer: Tokenizer) -> dict[str, Mixture]:
    """Of text and of vision: every twentieth file, photograph or document, and nothing that is trained on with them."""
    files = _files(run, tokenizer)
    sources = [*_sample_corpus(run, tokenizer, Part.HELD_OUT, files), *_drawn(run, tokenizer, files, 1)]
    kinds: dict[str, list[MixedSource]] = {"text": [], "vision": []}
    for source, weight in _weighted([*sources, *(part for each in files if (part := hold_out(each)[1]))]):
        kinds["vision" if source.has_media else "text"].append(MixedSource(source, weight))
    return {kind: Mixture(sources) for kind, sources in kinds.items() if sources}


def _weighted(sources: Sequence[Source]) -> list[tuple[Source, float]]:
    return [(source, _WEIGHTS.get(source.name.removesuffix("-held-out"), 1.0)) for source in sources]


def _sample_corpus(run: RunConfig, tokenizer: Tokenizer, part: Part, files: Sequence[Source]) -> list[Source]:
    """A part of the corpus, as far as the user's files leave it."""
    replaced = {source.has_media for source in files}
    if len(replaced) == 2:
        return []
    corpus = sample_corpus(
        tokenizer, max_patches=_max_patches(run), augmentation=Augmentation(), seed=run.seed, part=part
    )
    return [source for source in corpus if source.has_media not in replaced]


def _drawn(run: RunConfig, tokenizer: Tokenizer, files: Sequence[Source], part: int) -> list[Source]:
    """Pictures that are drawn, what is trained on (0) or held out (1) of them, if the user's files have no media."""
    if any(source.has_media for source in files):
        return []
    drawn = (
        DrawnPictures(kind, tokenizer, seed=run.seed, length=_DRAWN, augmentation=Augmentation())
        for kind in DRAWN_KINDS
    )
    return [chosen for source in drawn if (chosen := hold_out(source)[part]) is not None]


def _max_patches(run: RunConfig) -> int:
    """Of a picture. A story of four, or of a video, must fit a sequence with all its text, which bytes make long."""
    length = run.batch.sequence_length
    return min(4096, length) if length >= 4096 else max(16, length // 8)


def _files(run: RunConfig, tokenizer: Tokenizer) -> list[Source]:
    augmentation = Augmentation() if run.data.augment else None
    return sources_of_files(
        run.data.files, tokenizer, max_patches=_max_patches(run), augmentation=augmentation, seed=run.seed
    )


def sources_of_files(
    files: Sequence[str], tokenizer: Tokenizer, *, max_patches: int, augmentation: Augmentation | None, seed: int
) -> list[Source]:
    """The user's files by what is in them, see `open_files`, under other names than those of the corpus."""
    corpus = (*CORPUS_TEXTS, "photographs", "picture-stories", "digits", "videos")
    return open_files(
        files, tokenizer, limits=MediaLimits(padded_patches=max_patches), augmentation=augmentation, seed=seed,
        taken=[*corpus, *(f"drawn-{kind}" for kind in DRAWN_KINDS)],
    )  # fmt: skip
