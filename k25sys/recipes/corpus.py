"""What the recipes read: the sample corpus and drawn pictures, which need no network, or a user's files."""

from collections.abc import Sequence

from k25sys.data import MixedSource, Mixture, Source, Tokenizer, hold_out
from k25sys.data.augmentation import Augmentation
from k25sys.data.corpus import Part, sample_corpus
from k25sys.data.drawn import DRAWN_KINDS, DrawnPictures
from k25sys.data.geometry import MediaLimits
from k25sys.data.sources.files import open_files
from k25sys.training.config import RunConfig

_WEIGHTS = {"python-topics": 4.0, "python-code": 4.0, "python-functions": 2.0, "photographs": 4.0}
"""Of the corpus's sources within text and within vision; 1 for the others."""
_DRAWN = 100_000


def corpus_of(run: RunConfig, tokenizer: Tokenizer) -> Sequence[tuple[Source, float]]:
    """Sources with their weights within text and within vision, without what is held out."""
    others = [hold_out(source)[0] for source in _drawn_and_files(run, tokenizer)]
    return [*_weighted(_sample_corpus(run, tokenizer, Part.TRAINED)), *((source, 1.0) for source in others)]


def held_out_of(run: RunConfig, tokenizer: Tokenizer) -> dict[str, Mixture]:
    """Of text and of vision: every twentieth file, photograph or document, and nothing that is trained on with them."""
    others = [hold_out(source)[1] for source in _drawn_and_files(run, tokenizer)]
    weighted = [*_weighted(_sample_corpus(run, tokenizer, Part.HELD_OUT)), *((each, 1.0) for each in others if each)]
    kinds: dict[str, list[MixedSource]] = {"text": [], "vision": []}
    for source, weight in weighted:
        kinds["vision" if source.has_media else "text"].append(MixedSource(source, weight))
    return {kind: Mixture(sources) for kind, sources in kinds.items() if sources}


def _weighted(sources: Sequence[Source]) -> list[tuple[Source, float]]:
    return [(source, _WEIGHTS.get(source.name.removesuffix("-held-out"), 1.0)) for source in sources]


def _sample_corpus(run: RunConfig, tokenizer: Tokenizer, part: Part) -> list[Source]:
    """A part of the corpus; files in data.files take the place of its text."""
    corpus = sample_corpus(
        tokenizer, max_patches=_max_patches(run), augmentation=Augmentation(), seed=run.seed, part=part
    )
    return [source for source in corpus if source.has_media or not run.data.files]


def _max_patches(run: RunConfig) -> int:
    """Of a picture. A story of four, or of a video, must fit a sequence with all its text, which bytes make long."""
    length = run.batch.sequence_length
    return min(4096, length) if length >= 4096 else max(16, length // 8)


def _drawn_and_files(run: RunConfig, tokenizer: Tokenizer) -> list[Source]:
    """Pictures that are drawn, and the user's files."""
    drawn = [
        DrawnPictures(kind, tokenizer, seed=run.seed, length=_DRAWN, augmentation=Augmentation())
        for kind in DRAWN_KINDS
    ]
    files = sources_of_files(
        run.data.files, tokenizer, max_patches=_max_patches(run), augmentation=Augmentation(), seed=run.seed
    )
    return [*drawn, *files]


def sources_of_files(
    files: Sequence[str], tokenizer: Tokenizer, *, max_patches: int, augmentation: Augmentation, seed: int
) -> list[Source]:
    """The user's files by what is in them, see `open_files`, under other names than those of the corpus."""
    corpus = ("python-topics", "python-code", "python-functions", "photographs", "picture-stories", "digits", "videos")
    return open_files(
        files, tokenizer, limits=MediaLimits(padded_patches=max_patches), augmentation=augmentation, seed=seed,
        taken=[*corpus, *(f"drawn-{kind}" for kind in DRAWN_KINDS)],
    )  # fmt: skip
