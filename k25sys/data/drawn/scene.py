"""What is known of a drawn picture: what it shows, where, and what may be asked and answered about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from k25sys.data.augmentation import AugmentationPlan, mentions_sides
from k25sys.data.boxes import Box, box_text, ink_box, point_text
from k25sys.errors import OptionalPackageError, message

if TYPE_CHECKING:
    from PIL import ImageFont

Colour = tuple[int, int, int]
_BEARING = 4  # pixels that a letter may reach to the left of where it is drawn


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something in a picture that has a place."""

    label: str
    box: Box
    """The smallest box around the pixels of it that are to be seen."""
    value: int | None = None
    """What it stands for in a chart."""


@dataclass(frozen=True)
class Line:
    """A line of a question or an answer.

    `{box}` and `{point}` in it stand for the box and its centre of mark number `mark`. An answer's line whose mark is
    not to be seen is left out.
    """

    text: str
    mark: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawing:
    """A picture as it was drawn, before any augmentation.

    Attributes:
        picture_HW3: uint8.
        owner_HW: uint16; 1 + the number of the mark that a pixel belongs to, 0 of none.
        labels: of the marks.
        values: of the marks of a chart; empty otherwise.
        question, answer: their lines. An answer of more than one mark comes in reading order where
            `in_reading_order` says so: rows of a picture from the top, then from the left.
        required: the marks that must stay whole, lest the answer become wrong.
        extent: what else must stay whole; None of a picture where marks are all.
        has_writing: it must neither be mirrored nor become smaller.
    """

    picture_HW3: np.ndarray
    owner_HW: np.ndarray
    labels: tuple[str, ...]
    values: tuple[int, ...] = ()
    question: tuple[Line, ...]
    answer: tuple[Line, ...]
    required: frozenset[int]
    has_writing: bool
    extent: Box | None = None
    in_reading_order: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.picture_HW3.shape[0], self.picture_HW3.shape[1]

    @property
    def can_flip(self) -> bool:
        """Whether its mirror image goes with the same text."""
        return not self.has_writing and not any(mentions_sides(line.text) for line in (*self.question, *self.answer))

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """The smallest box around the pixels of each mark."""
        boxes = [ink_box(self.owner_HW == i + 1) for i in range(len(self.labels))]
        assert all(boxes), "a mark without a pixel was drawn"
        return tuple(box for box in boxes if box is not None)

    @property
    def keep(self) -> list[Box]:
        """What no crop may cut."""
        return [self.boxes[i] for i in self.required] + ([self.extent] if self.extent else [])

    def seen(self, plan: AugmentationPlan | None, kept_area: float) -> list[Mark | None]:
        """The marks as the plan leaves them: of one that is cut, the box around what is left of its pixels.

        That is tighter than the old box cut by the crop where the mark is not a rectangle. None for a mark of which
        less than `kept_area` is left.
        """
        boxes: list[Box | None] = list(self.boxes)
        if plan is not None:
            boxes = [self._seen_box(i, plan, kept_area) for i in range(len(self.labels))]
        values = self.values or [None] * len(boxes)
        return [
            box and Mark(label=label, box=box, value=value)
            for label, box, value in zip(self.labels, boxes, values, strict=True)
        ]

    def _seen_box(self, mark: int, plan: AugmentationPlan, kept_area: float) -> Box | None:
        x0, y0, x1, y1 = plan.crop
        mask = self.owner_HW == mark + 1
        kept = np.zeros_like(mask)
        kept[y0:y1, x0:x1] = mask[y0:y1, x0:x1]
        box = ink_box(kept)
        if box is None or kept.sum() < kept_area * mask.sum():
            return None
        return plan.map_box(box, kept_area=1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """Everything about a document: what is seen, and what is said of it.

    Attributes:
        picture_HW3: uint8, as the model sees it: sides are multiples of 28.
        marks: what is to be seen, with exact boxes.
        question: text without loss; empty for a picture that is only described.
        answer: text with loss.
    """

    picture_HW3: np.ndarray
    marks: tuple[Mark, ...]
    question: str
    answer: str


def written(drawing: Drawing, marks: Sequence[Mark | None], size: tuple[int, int]) -> tuple[str, str]:
    """Question and answer, with boxes in a picture of `size`. A question ends with a line break, an answer does not."""
    answer = list(drawing.answer)
    if drawing.in_reading_order:
        answer.sort(key=lambda line: _reading_order(marks, line))
    question = "".join(_filled(line, marks, size) + "\n" for line in drawing.question)
    shown = [line for line in answer if line.mark is None or marks[line.mark] is not None]
    return question, "\n".join(_filled(line, marks, size) for line in shown)


def draw_text(
    picture_HW3: np.ndarray, at: tuple[int, int], text: str, font: "ImageFont.FreeTypeFont", colour: Colour
) -> np.ndarray:
    """Writes `text` into the picture, its corner `at` (x, y); gives the (H, W) bool mask of changed pixels."""
    from PIL import Image, ImageDraw

    width, height = text_extent(text, font)
    x, y = at
    x0, y0 = max(0, x - _BEARING), max(0, y)
    part = picture_HW3[y0 : max(0, y + height), x0 : max(0, x + width)]
    changed_HW = np.zeros(picture_HW3.shape[:2], bool)
    if part.size:
        ink = Image.new("L", (part.shape[1], part.shape[0]))
        ImageDraw.Draw(ink).text((x - x0, y - y0), text, fill=255, font=font)
        alpha_HW1 = np.asarray(ink, np.int32)[:, :, None]
        blend = ((part * (255 - alpha_HW1) + np.array(colour, np.int32) * alpha_HW1 + 127) // 255).astype(np.uint8)
        changed_HW[y0 : y + height, x0 : x + width] = (blend != part).any(2)
        part[:] = blend
    return changed_HW


def text_extent(text: str, font: "ImageFont.FreeTypeFont") -> tuple[int, int]:
    """(width, height) in pixels from the corner where text is drawn to the end of its ink, rounded up."""
    _, _, right, bottom = font.getbbox(text)
    return int(np.ceil(right)), int(np.ceil(bottom))


def blank(size: tuple[int, int], colour: Colour) -> tuple[np.ndarray, np.ndarray]:
    """An empty picture of `size` (height, width) and the owners of its pixels: nobody."""
    return np.full((*size, 3), colour, np.uint8), np.zeros(size, np.uint16)


def load_font(size: int) -> "ImageFont.FreeTypeFont":
    """Pillow's built-in font.

    Raises:
        ImportError: no Pillow, or one that was built without FreeType, so that it has no font of any size.
    """
    try:
        from PIL import ImageFont
    except ImportError as error:
        hint = "pip install 'k25sys[media]'"
        raise OptionalPackageError(message("load_font", "package", "no Pillow", "Pillow >= 11", hint)) from error

    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise OptionalPackageError(message("load_font", "Pillow", "a build without FreeType", "one with FreeType"))
    return font


def _reading_order(marks: Sequence[Mark | None], line: Line) -> tuple[float, float]:
    mark = None if line.mark is None else marks[line.mark]
    return (mark.box.y0, mark.box.x0) if mark else (0.0, 0.0)


def _filled(line: Line, marks: Sequence[Mark | None], size: tuple[int, int]) -> str:
    mark = None if line.mark is None else marks[line.mark]
    if mark is None:
        return line.text
    text = line.text.replace("{box}", box_text(mark.box, size)) if "{box}" in line.text else line.text
    return text.replace("{point}", point_text(mark.box.center, size)) if "{point}" in text else text
