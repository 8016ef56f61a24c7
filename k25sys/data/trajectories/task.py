"""What a problem of a picture consists of: its files, its question, the cells that solve it and its exact answer."""

import colorsys
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw

PALETTE: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (220, 40, 40),
        "yellow": (235, 200, 40),
        "green": (40, 170, 60),
        "cyan": (40, 190, 200),
        "blue": (40, 80, 210),
        "purple": (140, 50, 180),
    }
)
"""Colours whose hues stay apart under the noise of `noisy`."""
SHAPES = ("rectangle", "ellipse", "diamond", "triangle")
Box = tuple[int, int, int, int]
"""Left, top, right, bottom; all four pixels belong to it."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One call of the tool. In `thinking`, {output} stands for the last line that the cell before gave."""

    thinking: str
    code: str
    text: str = ""
    """What is said to the user before the call."""
    fails: bool = False
    """The cell raises: a first attempt that the next step corrects."""
    misleads: bool = False
    """The cell's last line is not the answer, though it was meant to be: the next step's thinking says why."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A problem. It is solved when the last line that the last cell gave is `answer` and the files saved are `saves`.

    In `thinking` and `reply`, which end the conversation, {output} stands for that line.
    """

    question: str
    answer: str
    files: Mapping[str, bytes]
    steps: tuple[Step, ...]
    thinking: str
    reply: str
    saves: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Pictures, (H, W, 3) uint8 by name, that the cells have to write."""


def png(picture_HW3: np.ndarray) -> bytes:
    """A picture, (H, W, 3) or (H, W) uint8, as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture_HW3).save(file, "PNG")
    return file.getvalue()


def noisy(rng: Random, picture_HW3: np.ndarray, most: int) -> np.ndarray:
    """The uint8 picture with each number changed by -most ... most."""
    noise = np.frombuffer(rng.randbytes(picture_HW3.size), np.uint8).reshape(picture_HW3.shape)
    return (picture_HW3.astype(int) + noise % (2 * most + 1) - most).clip(0, 255).astype(np.uint8)


def hue(colour: str) -> int:
    """The hue of a colour of PALETTE as Pillow's HSV counts it, 0 to 255."""
    red, green, blue = (value / 255 for value in PALETTE[colour])
    return int(colorsys.rgb_to_hsv(red, green, blue)[0] * 255)


def place(rng: Random, size: tuple[int, int], sides: list[tuple[int, int]], gap: int) -> list[Box]:
    """Boxes of those (width, height) within `size` (width, height), at least `gap` pixels from each other and the rim.

    Those for which no place is found in 200 attempts are left out.
    """
    boxes: list[Box] = []
    for width, height in sides:
        for _ in range(200):
            left = rng.randint(gap, size[0] - width - gap)
            top = rng.randint(gap, size[1] - height - gap)
            new = (left, top, left + width - 1, top + height - 1)
            if all(
                new[0] > box[2] + gap or box[0] > new[2] + gap or new[1] > box[3] + gap or box[1] > new[3] + gap
                for box in boxes
            ):
                boxes.append(new)
                break
    return boxes


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, box: Box, fill: tuple[int, int, int] | int) -> None:
    """Draws one of SHAPES, filled, into its box."""
    left, top, right, bottom = box
    x, y = (left + right) // 2, (top + bottom) // 2
    if shape == "rectangle":
        draw.rectangle(box, fill=fill)
    elif shape == "ellipse":
        draw.ellipse(box, fill=fill)
    elif shape == "diamond":
        draw.polygon([(x, top), (right, y), (x, bottom), (left, y)], fill=fill)
    else:
        assert shape == "triangle"
        draw.polygon([(x, top), (right, bottom), (left, bottom)], fill=fill)


COMPONENTS = (
    '''
def components(mask):
    """Sizes and boxes (left, top, right, bottom) of the regions of a mask, by flood fill."""
    todo, found = mask.copy(), []
    for y, x in zip(*np.nonzero(mask)):
        if not todo[y, x]:
            continue
        todo[y, x] = False
        stack, ys, xs = [(y, x)], [], []
        while stack:
            y0, x0 = stack.pop()
            ys.append(int(y0)), xs.append(int(x0))
            for y1, x1 in ((y0 + 1, x0), (y0 - 1, x0), (y0, x0 + 1), (y0, x0 - 1)):
                if 0 <= y1 < mask.shape[0] and 0 <= x1 < mask.shape[1] and todo[y1, x1]:
                    todo[y1, x1] = False
                    stack.append((y1, x1))
        found.append((len(ys), (min(xs), min(ys), max(xs), max(ys))))
    return found
''',
    '''
def components(mask):
    """(size, (left, top, right, bottom)) of each connected region."""
    image, found = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).copy(), []
    while True:
        data = np.array(image)
        ys, xs = np.nonzero(data == 255)
        if len(ys) == 0:
            return found
        ImageDraw.floodfill(image, (int(xs[0]), int(ys[0])), 128)
        data = np.array(image)
        ys, xs = np.nonzero(data == 128)
        found.append((len(ys), tuple(int(v) for v in (xs.min(), ys.min(), xs.max(), ys.max()))))
        data[ys, xs] = 0
        image = Image.fromarray(data).copy()
''',
    """
from collections import deque

def components(mask):
    # breadth-first search from each pixel that has no label yet
    height, width = mask.shape
    seen, found = set(), []
    for start in zip(*(v.tolist() for v in np.nonzero(mask))):
        if start in seen:
            continue
        seen.add(start)
        queue, region = deque([start]), []
        while queue:
            y, x = queue.popleft()
            region.append((y, x))
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= near[0] < height and 0 <= near[1] < width and mask[near] and near not in seen:
                    seen.add(near)
                    queue.append(near)
        ys, xs = zip(*region)
        found.append((len(region), (min(xs), min(ys), max(xs), max(ys))))
    return found
""",
)
"""Programs of connected components, each as good as the others."""
