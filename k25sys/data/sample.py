"""What data sources give: documents as tokens with a loss mask, and their media as metadata, to be decoded later."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from k25sys.errors import ArgumentTypeError, ArgumentValueError, message


@dataclass(frozen=True, kw_only=True)
class MediaItem:
    """One picture, or one clip of up to four frames, of a document: known by metadata until somebody encodes it."""

    grid: tuple[int, int, int]
    """t, h, w: patches, before the merge of 2 x 2."""
    source: str
    """The name of the source that can load its pixels."""
    key: str
    """What the source needs for that, augmentation included: equal keys are equal pixels."""

    @property
    def num_patches(self) -> int:
        """t h w."""
        t, h, w = self.grid
        return t * h * w

    @property
    def num_rows(self) -> int:
        """Embeddings that it encodes to, and positions of media_pad: h w / 4."""
        return self.grid[1] * self.grid[2] // 4


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One document.

    Raises:
        ValueError: a mask of another length, or a number of media_pad positions that the media do not encode to (where
            `media_pad` is given to `check`).
    """

    ids_S: np.ndarray
    """(S,) int64: tokens, media_pad in place of embeddings, eos at the end where the document has one."""
    loss_S: np.ndarray
    """(S,) bool: which tokens are to be predicted from those before them."""
    media: tuple[MediaItem, ...] = ()
    """In the order of their positions."""

    def check(self, media_pad: int) -> None:
        """Raises ValueError: see the class."""
        if self.ids_S.shape != self.loss_S.shape or self.ids_S.ndim != 1:
            raise ArgumentValueError(
                message("Sample", "loss_S", self.loss_S.shape, f"{self.ids_S.shape[:1]}, as ids_S")
            )
        positions, rows = int((self.ids_S == media_pad).sum()), sum(item.num_rows for item in self.media)
        if positions != rows:
            accepted = f"{rows}, the rows that its media encode to"
            raise ArgumentValueError(message("Sample", "ids_S", f"{positions} positions of media_pad", accepted))


class Source(Protocol):
    """A finite collection of documents that can be read in any order: position is all there is to resume.

    One whose documents may change between a run and its resume, as those of files may, is `Fingerprinted` as well.
    """

    @property
    def name(self) -> str:
        """Unique within a mixture."""
        ...

    @property
    def has_media(self) -> bool:
        """Whether its documents count as vision data in a mixture."""
        ...

    def __len__(self) -> int:
        """The number of documents."""
        ...

    def sample(self, index: int, epoch: int) -> Sample:
        """Document `index`, as it is in the pass number `epoch` over the source: augmentation may depend on it.

        The same arguments give the same document, in any process. No pixels are decoded.
        """
        ...

    def pixels(self, key: str) -> Tensor:
        """(t h w, 3, 14, 14) float32 of a MediaItem of this source. In any process."""
        ...


@runtime_checkable
class Fingerprinted(Protocol):
    """What can tell whether its documents are those of before."""

    @property
    def fingerprint(self) -> str:
        """Another one where the documents are others, as far as can be told without reading all of them.

        Made once, so that it costs nothing to ask for; "": cannot tell.
        """
        ...


def fingerprint_of(documents: object) -> str:
    """The fingerprint of a source, or of the sequence that one reads; "" where it has none."""
    return documents.fingerprint if isinstance(documents, Fingerprinted) else ""


def check_position(op: str, index: Any, length: int, epoch: Any) -> None:
    """Raises TypeError or ValueError unless `index` is in [0, length) and `epoch` is not negative."""
    for argument, value, end in (("index", index, length), ("epoch", epoch, None)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise ArgumentTypeError(message(op, argument, f"{type(value).__name__} {value!r}", "an int"))
        if value < 0 or (end is not None and value >= end):
            accepted = "at least 0" if end is None else f"0 to {end - 1}"
            raise ArgumentValueError(message(op, argument, value, accepted))
