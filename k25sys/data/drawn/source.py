"""Drawn pictures as a source: each is made from (seed, index) alone, its augmentation from the epoch too."""

from collections.abc import Callable
from types import MappingProxyType

import numpy as np
from torch import Tensor

from k25sys.data.augmentation import Augmentation, AugmentationPlan, plan_augmentation
from k25sys.data.drawn.charts import draw_charts
from k25sys.data.drawn.scene import Drawing, Truth, written
from k25sys.data.drawn.shapes import draw_counting, draw_shapes
from k25sys.data.drawn.writing import draw_writing
from k25sys.data.geometry import CELL, MERGE
from k25sys.data.images import normalised_patches
from k25sys.data.media_text import image_tokens
from k25sys.data.sample import MediaItem, Sample, check_position
from k25sys.data.tokenizer import Tokenizer
from k25sys.errors import ArgumentTypeError, ArgumentValueError, message

_DRAW: MappingProxyType[str, Callable[[np.random.Generator, tuple[int, int]], Drawing]] = MappingProxyType(
    {"shapes": draw_shapes, "counting": draw_counting, "writing": draw_writing, "charts": draw_charts}
)
DRAWN_KINDS = tuple(_DRAW)
"""What can be drawn."""


class DrawnPictures:
    """A picture, then perhaps a question (both without loss), then the answer and eos (with loss).

    Args:
        kind: one of DRAWN_KINDS.
        tokenizer: writes the texts.
        seed: other seeds give other pictures.
        length: number of documents.
        cells: least and most cells of 28 pixels, each a token of the language model, along a side of a picture.
        augmentation: how far pictures may be changed in each epoch; None leaves them as drawn.
        name: unique within a mixture; "drawn-<kind>" by default.

    Raises:
        TypeError, ValueError: an unknown kind, a negative seed, no documents, cells outside 2 <= least <= most <= 64.
    """

    def __init__(
        self,
        kind: str,
        tokenizer: Tokenizer,
        *,
        seed: int,
        length: int,
        cells: tuple[int, int] = (2, 4),
        augmentation: Augmentation | None = None,
        name: str | None = None,
    ) -> None:
        if kind not in _DRAW:
            raise ArgumentValueError(message("DrawnPictures", "kind", repr(kind), ", ".join(DRAWN_KINDS)))
        for argument, value, least in (("seed", seed, 0), ("length", length, 1)):
            _check_int("DrawnPictures", argument, value, least, None)
        if len(cells) != 2 or not 2 <= cells[0] <= cells[1] <= 64:
            raise ArgumentValueError(message("DrawnPictures", "cells", cells, "2 <= least <= most <= 64"))
        self._name = f"drawn-{kind}" if name is None else name
        self._kind, self._tokenizer, self._seed, self._length = kind, tokenizer, seed, length
        self._cells, self._augmentation = cells, augmentation

    @property
    def name(self) -> str:
        """Unique within a mixture."""
        return self._name

    @property
    def has_media(self) -> bool:
        """True."""
        return True

    def __len__(self) -> int:
        return self._length

    def sample(self, index: int, epoch: int) -> Sample:
        """Document `index` as it is in pass `epoch`.

        Raises:
            TypeError, ValueError: an index outside [0, len), a negative epoch.
        """
        drawing, plan = self._drawn(index, epoch)
        size = drawing.size if plan is None else plan.canvas
        question, answer = written(drawing, drawing.seen(plan, self._kept_area), size)
        grid = (1, size[0] // CELL * MERGE, size[1] // CELL * MERGE)
        prompt = image_tokens(grid, self._tokenizer) + self._tokenizer.encode(question)
        reply = [*self._tokenizer.encode(answer), self._tokenizer.special.eos]
        loss_S = np.zeros(len(prompt) + len(reply), bool)
        loss_S[len(prompt) :] = True
        key = f"{self._origin}/{index}/{plan.key if plan else ''}"
        item = MediaItem(grid=grid, source=self._name, key=key)
        return Sample(ids_S=np.array(prompt + reply, np.int64), loss_S=loss_S, media=(item,))

    def truth(self, index: int, epoch: int) -> Truth:
        """What the document shows and says. Raises as `sample` does."""
        drawing, plan = self._drawn(index, epoch)
        marks = drawing.seen(plan, self._kept_area)
        picture_HW3 = drawing.picture_HW3 if plan is None else plan.apply(drawing.picture_HW3)
        question, answer = written(drawing, marks, picture_HW3.shape[:2])
        shown = tuple(mark for mark in marks if mark is not None)
        return Truth(picture_HW3=picture_HW3, marks=shown, question=question, answer=answer)

    def pixels(self, key: str) -> Tensor:
        """(h w, 3, 14, 14) float32 in [-1, 1] of a MediaItem of this source.

        Raises:
            ValueError: the key is of another source, or of this one with another kind, seed or cells.
        """
        origin, _, rest = key.rpartition("/")
        origin, _, index = origin.rpartition("/")
        if origin != self._origin or not (index.isascii() and index.isdigit()) or int(index) >= self._length:
            accepted = f"{self._origin}/<index below {self._length}>/<augmentation>"
            raise ArgumentValueError(message("DrawnPictures.pixels", "key", repr(key), accepted))
        picture_HW3 = self._draw(int(index)).picture_HW3
        return normalised_patches(AugmentationPlan.from_key(rest).apply(picture_HW3) if rest else picture_HW3)

    @property
    def _origin(self) -> str:
        """What a picture depends on besides its index."""
        return f"{self._kind}/{self._seed}/{self._cells[0]}-{self._cells[1]}"

    @property
    def _kept_area(self) -> float:
        return self._augmentation.kept_area if self._augmentation else 1.0

    def _drawn(self, index: int, epoch: int) -> tuple[Drawing, AugmentationPlan | None]:
        check_position("DrawnPictures", index, self._length, epoch)
        drawing = self._draw(int(index))
        if self._augmentation is None:
            return drawing, None
        plan = plan_augmentation(
            self._augmentation,
            drawing.size,
            seed=self._seed,
            index=int(index),
            epoch=int(epoch),
            keep=drawing.keep,
            can_flip=drawing.can_flip,
            can_shrink=not drawing.has_writing,
        )
        return drawing, plan

    def _draw(self, index: int) -> Drawing:
        rng = np.random.default_rng((DRAWN_KINDS.index(self._kind), self._seed, index))
        height, width = (int(cells) * CELL for cells in rng.integers(*self._cells, 2, endpoint=True))
        return _DRAW[self._kind](rng, (height, width))


def _check_int(op: str, argument: str, value: object, least: int, end: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ArgumentTypeError(message(op, argument, f"{type(value).__name__} {value!r}", "an int"))
    if value < least or (end is not None and value >= end):
        accepted = f"at least {least}" if end is None else f"{least} to {end - 1}"
        raise ArgumentValueError(message(op, argument, value, accepted))
