"""Geometric augmentation of pictures: crop, resize, mirror, place on a canvas. Boxes and points follow exactly.

A plan is a handful of whole numbers that depend on (seed, index, epoch) alone. Its key, written into a MediaItem,
draws the same pixels at any later time. The canvas has the size of the picture rounded up to multiples of 28, so that
what a document costs does not depend on the epoch. Source: spec section 3.3 (coordinates stay consistent).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

import numpy as np

from k25sys.data.boxes import Box, Point, hull, read_boxes, read_points, replace_marks
from k25sys.data.geometry import CELL
from k25sys.errors import ArgumentTypeError, ArgumentValueError, OptionalPackageError, message

_SIDES = re.compile(r"\b(left|right|(anti|counter)?-?clockwise|mirror)", re.IGNORECASE)
_KEY = re.compile(r"\d{1,9}(,\d{1,9}){10}", re.ASCII)
_STREAM = 0x41554720  # apart from whatever else is drawn from the same seed and index


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How far pictures may be changed.

    Attributes:
        least_crop: the smallest share of each side that a crop keeps, in (0, 1]; 1 never crops.
        flip: the probability to mirror, left for right.
        scale: bounds of the factor of a resize; the canvas bounds it too.
        kept_area: a box of which a crop keeps a smaller share than this is dropped.
    """

    least_crop: float = 0.6
    flip: float = 0.5
    scale: tuple[float, float] = (0.6, 1.7)
    kept_area: float = 0.4

    def __post_init__(self) -> None:
        if not 0 < self.least_crop <= 1:
            raise ArgumentValueError(message("Augmentation", "least_crop", self.least_crop, "a number in (0, 1]"))
        if not 0 <= self.flip <= 1:
            raise ArgumentValueError(message("Augmentation", "flip", self.flip, "a number in [0, 1]"))
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ArgumentValueError(message("Augmentation", "scale", self.scale, "two numbers, 0 < least <= most"))
        if not 0 < self.kept_area <= 1:
            raise ArgumentValueError(message("Augmentation", "kept_area", self.kept_area, "a number in (0, 1]"))


@dataclass(frozen=True, kw_only=True)
class AugmentationPlan:
    """What happens to one picture: cropped, resized, mirrored, placed on a black canvas, in this order.

    Attributes:
        crop: x0, y0, x1, y1 of what is kept, in whole pixels of the picture.
        resized: (height, width) that this is brought to.
        is_flipped: mirrored, left for right.
        offset: (y, x) of its upper left corner on the canvas.
        canvas: (height, width) of the result, multiples of 28.

    Raises:
        ValueError: an empty crop, or a result that does not lie on the canvas.
    """

    crop: tuple[int, int, int, int]
    resized: tuple[int, int]
    is_flipped: bool
    offset: tuple[int, int]
    canvas: tuple[int, int]

    def __post_init__(self) -> None:
        x0, y0, x1, y1 = self.crop
        if not (0 <= x0 < x1 and 0 <= y0 < y1 and min(self.resized) >= 1 and min(self.offset) >= 0):
            got = f"crop {self.crop}, resized {self.resized}, offset {self.offset}"
            raise ArgumentValueError(message("AugmentationPlan", "plan", got, "a crop that is not empty"))
        ends = [start + side for start, side in zip(self.offset, self.resized, strict=True)]
        is_inside = ends[0] <= self.canvas[0] and ends[1] <= self.canvas[1]
        if not is_inside or self.canvas[0] % CELL or self.canvas[1] % CELL:
            got = f"canvas {self.canvas} for a result that ends at {tuple(ends)}"
            raise ArgumentValueError(message("AugmentationPlan", "plan", got, f"multiples of {CELL} that hold it"))

    @property
    def key(self) -> str:
        """The plan as text."""
        return ",".join(map(str, (*self.crop, *self.resized, int(self.is_flipped), *self.offset, *self.canvas)))

    @classmethod
    def from_key(cls, key: str) -> "AugmentationPlan":
        """The plan whose `key` this is.

        Raises:
            ValueError: it is none.
        """
        numbers = [int(number) for number in key.split(",")] if _KEY.fullmatch(key) else []
        if not numbers or numbers[6] > 1:
            raise ArgumentValueError(message("AugmentationPlan.from_key", "key", repr(key), "11 whole numbers"))
        x0, y0, x1, y1, height, width, flip, y, x, canvas_height, canvas_width = numbers
        return cls(
            crop=(x0, y0, x1, y1),
            resized=(height, width),
            is_flipped=bool(flip),
            offset=(y, x),
            canvas=(canvas_height, canvas_width),
        )

    def apply(self, picture_HW3: np.ndarray) -> np.ndarray:
        """(*canvas, 3) uint8 of a (H, W, 3) uint8 picture.

        Raises:
            TypeError, ValueError: another type, shape or dtype, or a picture that does not hold the crop.
            ImportError: it has to be resized, and Pillow is not installed.
        """
        _check_picture(picture_HW3)
        x0, y0, x1, y1 = self.crop
        if y1 > picture_HW3.shape[0] or x1 > picture_HW3.shape[1]:
            got = f"shape {picture_HW3.shape}"
            raise ArgumentValueError(
                message("AugmentationPlan.apply", "picture_HW3", got, f"one that holds {self.crop}")
            )
        part = np.ascontiguousarray(picture_HW3[y0:y1, x0:x1])
        height, width = self.resized
        if part.shape[:2] != self.resized:
            part = _resized(part, self.resized)
        canvas = np.zeros((*self.canvas, 3), np.uint8)
        y, x = self.offset
        canvas[y : y + height, x : x + width] = part[:, ::-1] if self.is_flipped else part
        return canvas

    def map_point(self, point: Point) -> Point | None:
        """Where a point of the picture is on the canvas; None where the crop leaves it out."""
        x0, y0, x1, y1 = self.crop
        if not (x0 <= point.x <= x1 and y0 <= point.y <= y1):
            return None
        height, width = self.resized
        x, y = (point.x - x0) * width / (x1 - x0), (point.y - y0) * height / (y1 - y0)
        return Point(self.offset[1] + (width - x if self.is_flipped else x), self.offset[0] + y)

    def map_box(self, box: Box, *, kept_area: float) -> Box | None:
        """Where a box of the picture is on the canvas, cut by the crop; None where less than `kept_area` is kept.

        Raises:
            ValueError: a box without inside.
        """
        if box.area <= 0:
            raise ArgumentValueError(message("AugmentationPlan.map_box", "box", tuple(box), "x0 < x1 and y0 < y1"))
        kept = box.clipped(Box(*self.crop))
        # The smallest share still asks for some inside, whatever kept_area is.
        if kept.area <= 0 or kept.area < kept_area * box.area:
            return None
        first, last = self.map_point(Point(kept.x0, kept.y0)), self.map_point(Point(kept.x1, kept.y1))
        assert first is not None
        assert last is not None
        return Box(min(first.x, last.x), first.y, max(first.x, last.x), last.y)


def plan_augmentation(
    settings: Augmentation,
    size: tuple[int, int],
    *,
    seed: int,
    index: int,
    epoch: int,
    keep: Sequence[Box] = (),
    can_flip: bool = True,
    can_shrink: bool = True,
) -> AugmentationPlan:
    """The plan for document `index` in pass `epoch`.

    Args:
        settings: bounds of it.
        size: (height, width) of the picture.
        seed, index, epoch: what it depends on, besides the other arguments.
        keep: boxes that no crop may cut.
        can_flip: False where the picture has writing or its text tells left from right (`mentions_sides`).
        can_shrink: False where the picture has writing that smaller could not be read.

    Raises:
        ValueError: a negative number, a picture without pixels, a box of `keep` that is not inside the picture.
    """
    if min(seed, index, epoch) < 0 or min(size) < 1:
        got = f"seed {seed}, index {index}, epoch {epoch}, size {size}"
        raise ArgumentValueError(message("plan_augmentation", "arguments", got, "0 or more, and a size of at least 1"))
    height, width = size
    kept = hull(keep)
    if kept is not None and not (0 <= kept.x0 < kept.x1 <= width and 0 <= kept.y0 < kept.y1 <= height):
        raise ArgumentValueError(message("plan_augmentation", "keep", tuple(kept), f"boxes inside {height} x {width}"))
    rng = np.random.default_rng((_STREAM, seed, index, epoch))
    x0, x1 = _crop_side(rng, width, settings.least_crop, None if kept is None else (kept.x0, kept.x1))
    y0, y1 = _crop_side(rng, height, settings.least_crop, None if kept is None else (kept.y0, kept.y1))
    canvas = (-(-height // CELL) * CELL, -(-width // CELL) * CELL)
    least, most = settings.scale if can_shrink else [max(1.0, factor) for factor in settings.scale]
    most = min(most, canvas[0] / (y1 - y0), canvas[1] / (x1 - x0))
    least = min(least, most)
    scale = math.exp(rng.uniform(math.log(least), math.log(most)))
    resized = (
        min(canvas[0], max(1, round((y1 - y0) * scale))),
        min(canvas[1], max(1, round((x1 - x0) * scale))),
    )
    offset = (
        int(rng.integers(canvas[0] - resized[0], endpoint=True)),
        int(rng.integers(canvas[1] - resized[1], endpoint=True)),
    )
    is_flipped = bool(rng.random() < settings.flip) and can_flip
    return AugmentationPlan(crop=(x0, y0, x1, y1), resized=resized, is_flipped=is_flipped, offset=offset, canvas=canvas)


def plan_for_text(
    settings: Augmentation, size: tuple[int, int], text: str, *, seed: int, index: int, epoch: int,
    can_crop: bool = True, has_writing: bool = False,
) -> tuple[AugmentationPlan, str]:  # fmt: skip
    """A plan under which `text` stays true, as far as the arguments tell, and the text with its boxes and points moved.

    Args:
        settings, size, seed, index, epoch: as in `plan_augmentation`.
        text: as `boxes` writes them, its boxes and points are never cropped. Where it tells left from right, nothing is
            mirrored.
        can_crop: False where it counts, or speaks of the picture as a whole.
        has_writing: nothing is cropped, mirrored or made smaller.
    """
    height, width = size
    pixels = [(min(floor(p.x), width - 1), min(floor(p.y), height - 1)) for p in read_points(text, size)]
    marks = [*read_boxes(text, size), *(Box(x, y, x + 1, y + 1) for x, y in pixels)]
    keep = marks if can_crop and not has_writing else [Box(0, 0, width, height)]
    plan = plan_augmentation(
        settings, size, seed=seed, index=index, epoch=epoch, keep=keep, can_shrink=not has_writing,
        can_flip=not has_writing and not mentions_sides(text),
    )  # fmt: skip

    def moved_box(box: Box) -> Box:
        moved = plan.map_box(box, kept_area=1.0)
        assert moved is not None
        return moved

    def moved_point(point: Point) -> Point:
        moved = plan.map_point(point)
        assert moved is not None
        return moved

    return plan, replace_marks(text, size, plan.canvas, moved_box, moved_point)


def mentions_sides(text: str) -> bool:
    """Whether a mirrored picture might make `text` false: it says left, right or which way round something goes."""
    return _SIDES.search(text) is not None


def _crop_side(
    rng: np.random.Generator, side: int, least_share: float, kept: tuple[float, float] | None
) -> tuple[int, int]:
    """First and last edge of a crop along one side, around `kept`."""
    first, last = (math.floor(kept[0]), math.ceil(kept[1])) if kept else (side, 0)
    least = max(math.ceil(side * least_share), last - first)
    length = int(rng.integers(least, side, endpoint=True))
    start = int(rng.integers(max(0, last - length), min(first, side - length), endpoint=True))
    return start, start + length


def _resized(picture_HW3: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic, to (height, width)."""
    try:
        from PIL import Image
    except ImportError as error:
        hint = "pip install 'k25sys[media]'"
        raise OptionalPackageError(
            message("AugmentationPlan.apply", "package", "no Pillow", "Pillow >= 11", hint)
        ) from error
    return np.asarray(Image.fromarray(picture_HW3).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _check_picture(picture: np.ndarray) -> None:
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
        got = f"{type(picture).__name__} {getattr(picture, 'dtype', '')}".strip()
        raise ArgumentTypeError(message("AugmentationPlan.apply", "picture_HW3", got, "a numpy array of uint8"))
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise ArgumentValueError(
            message("AugmentationPlan.apply", "picture_HW3", f"shape {picture.shape}", "(H, W, 3)")
        )
