"""A real corpus that needs no network: what comes with Python and inside packages of the extra `corpus`."""

from k25sys.data.augmentation import Augmentation
from k25sys.data.corpus.part import Part
from k25sys.data.corpus.pictures import Digits, photographs, picture_stories, videos
from k25sys.data.corpus.python_texts import python_code, python_functions, python_topics
from k25sys.data.geometry import MediaLimits
from k25sys.data.sample import Source
from k25sys.data.tokenizer import Tokenizer

__all__ = ["Part", "sample_corpus"]


def sample_corpus(
    tokenizer: Tokenizer,
    *,
    max_patches: int = 64,
    fps: float = 2.0,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    part: Part = Part.WHOLE,
) -> tuple[Source, ...]:
    """Text: python-topics, python-code, python-functions. With media: photographs, picture-stories, digits, videos.

    Args:
        tokenizer: writes the texts.
        max_patches: patches that a picture, or a frame of a video, has at most, padding included; at least 4. Larger
            ones are shrunk. A fourth of them is its number of tokens.
        fps: frames a second that are taken from videos.
        augmentation: how far photographs may be changed in each pass; None leaves them.
        seed: other seeds give other changes.
        part: see Part. Stories and videos are too few to hold some out.

    Raises:
        ImportError: a package of the extra is not installed; the message names it.
        ValueError: max_patches or fps out of bounds.
    """
    limits = MediaLimits(padded_patches=max_patches, fps=fps)
    texts = (
        part.of_source(python_topics(tokenizer)), python_code(tokenizer, part), python_functions(tokenizer, part)
    )  # fmt: skip
    pictures = photographs(tokenizer, limits, augmentation=augmentation, seed=seed, part=part)
    digits = part.of_source(Digits(tokenizer, limits))
    if part is Part.HELD_OUT:
        return *texts, pictures, digits
    return *texts, pictures, picture_stories(tokenizer, limits, part), digits, videos(tokenizer, limits)
