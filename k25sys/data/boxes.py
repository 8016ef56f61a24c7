"""Boxes and points of pictures, and how they are written: whole thousandths of the picture's sides.

A box is given by its edges, in pixels from the upper left corner of the picture: a single pixel (row 2, column 5) is
the box 5, 2, 6, 3 and its centre is the point 5.5, 2.5. Written, a box is [x0,y0,x1,y1] and a point is (x,y), each a
whole number from 0 to 1000. Kimi K2.5's own format is not disclosed.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from k25sys.errors import ArgumentValueError, message

THOUSANDTHS = 1000
_BOX = re.compile(r"\[(\d{1,4}),(\d{1,4}),(\d{1,4}),(\d{1,4})\]", re.ASCII)
_POINT = re.compile(r"\((\d{1,4}),(\d{1,4})\)", re.ASCII)


class Point(NamedTuple):
    """A place in a picture, in pixels."""

    x: float
    y: float


class Box(NamedTuple):
    """The edges of a box, in pixels; x1 and y1 are the edges behind its last pixels."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        """0 where it has no inside."""
        return max(0.0, self.x1 - self.x0) * max(0.0, self.y1 - self.y0)

    @property
    def center(self) -> Point:
        """The point in its middle."""
        return Point((self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2)

    def clipped(self, to: "Box") -> "Box":
        """What it has in common with `to`; of area 0 where that is nothing."""
        return Box(max(self.x0, to.x0), max(self.y0, to.y0), min(self.x1, to.x1), min(self.y1, to.y1))


def hull(boxes: Iterable[Box]) -> Box | None:
    """The smallest box around all `boxes`; None where there is none."""
    rows = list(boxes)
    if not rows:
        return None
    return Box(min(b.x0 for b in rows), min(b.y0 for b in rows), max(b.x1 for b in rows), max(b.y1 for b in rows))


def ink_box(mask_HW: np.ndarray) -> Box | None:
    """The smallest box around the true pixels of a (H, W) bool mask; None where there is none."""
    ys, xs = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    return Box(int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1) if len(ys) else None


def box_text(box: Box, size: tuple[int, int]) -> str:
    """[x0,y0,x1,y1] of a box in a picture of `size` (height, width).

    Raises:
        ValueError: it is not inside the picture, or has no inside.
    """
    height, width = size
    if not (0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height):
        accepted = f"a box inside a picture of {height} x {width}"
        raise ArgumentValueError(message("box_text", "box", tuple(box), accepted))
    x0, y0, x1, y1 = (_thousandths(a, side) for a, side in zip(box, (width, height, width, height), strict=True))
    return f"[{x0},{y0},{x1},{y1}]"


def point_text(point: Point, size: tuple[int, int]) -> str:
    """(x,y) of a point in a picture of `size` (height, width).

    Raises:
        ValueError: it is not inside the picture.
    """
    height, width = size
    if not (0 <= point.x <= width and 0 <= point.y <= height):
        accepted = f"a point inside a picture of {height} x {width}"
        raise ArgumentValueError(message("point_text", "point", tuple(point), accepted))
    return f"({_thousandths(point.x, width)},{_thousandths(point.y, height)})"


def read_boxes(text: str, size: tuple[int, int]) -> list[Box]:
    """The boxes that `text` holds, in order, in pixels of a picture of `size`; what is no box of one is passed over."""
    height, width = size
    found = [tuple(map(int, match.groups())) for match in _BOX.finditer(text)]
    return [
        Box(x0 * width / THOUSANDTHS, y0 * height / THOUSANDTHS, x1 * width / THOUSANDTHS, y1 * height / THOUSANDTHS)
        for x0, y0, x1, y1 in found
        if x0 < x1 <= THOUSANDTHS and y0 < y1 <= THOUSANDTHS
    ]


def read_points(text: str, size: tuple[int, int]) -> list[Point]:
    """The points that `text` holds, as `read_boxes` reads boxes."""
    height, width = size
    found = [tuple(map(int, match.groups())) for match in _POINT.finditer(text)]
    return [
        Point(x * width / THOUSANDTHS, y * height / THOUSANDTHS)
        for x, y in found
        if x <= THOUSANDTHS and y <= THOUSANDTHS
    ]


def replace_marks(
    text: str,
    size: tuple[int, int],
    new_size: tuple[int, int],
    box: Callable[[Box], Box],
    point: Callable[[Point], Point],
) -> str:
    """`text` with each box and point that `read_boxes` and `read_points` find in it where `box` and `point` put it.

    Raises:
        ValueError: one is put outside a picture of `new_size`.
    """

    def of_box(match: re.Match[str]) -> str:
        found = read_boxes(match[0], size)
        return box_text(box(found[0]), new_size) if found else match[0]

    def of_point(match: re.Match[str]) -> str:
        found = read_points(match[0], size)
        return point_text(point(found[0]), new_size) if found else match[0]

    return _POINT.sub(of_point, _BOX.sub(of_box, text))


def _thousandths(at: float, side: int) -> int:
    return int(at / side * THOUSANDTHS + 0.5)
