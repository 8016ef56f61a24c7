"""Answers of the generated problems, computed anew from the pictures and the questions alone, by other means."""

import re
from collections.abc import Callable, Mapping
from io import BytesIO
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import dijkstra

from k25sys.data.trajectories.task import PALETTE, Task

_COLOURS = "|".join(PALETTE)


def _pictures(task: Task, mode: str) -> list[np.ndarray]:
    return [np.array(Image.open(BytesIO(content)).convert(mode)) for content in task.files.values()]


def _of_colour(task: Task, colour: str) -> np.ndarray:
    """Mask of the pixels that are nearer to `colour` than to the others and to grey."""
    pixels = _pictures(task, "RGB")[0].astype(int)
    distance = np.stack([((pixels - value) ** 2).sum(2) for value in PALETTE.values()])
    nearest = distance.argmin(0) == list(PALETTE).index(colour)
    return nearest & (distance.min(0) < 2000)


def _labels(mask: np.ndarray) -> np.ndarray:
    """The number of its 4-connected region at each pixel, from 1."""
    found: Any = ndimage.label(mask)
    return found[0]


def _regions(mask: np.ndarray) -> np.ndarray:
    """Sizes of the 4-connected regions."""
    return np.bincount(_labels(mask).ravel())[1:]


def _first(pattern: str, task: Task) -> str:
    match = re.search(pattern, task.question)
    assert match, task.question
    return match.group(1)


def _count(task: Task) -> str:
    return str(int((_regions(_of_colour(task, _first(rf"\b({_COLOURS})\b", task))) >= 20).sum()))


def _area(task: Task) -> str:
    return str(int(_of_colour(task, _first(rf"\b({_COLOURS})\b", task)).sum()))


def _size(task: Task) -> str:
    labels = _labels(_of_colour(task, _first(rf"\b({_COLOURS})\b", task)))
    box = ndimage.find_objects(labels)[np.bincount(labels.ravel())[1:].argmax()]
    (marked,) = task.saves.values()
    (top, bottom), (left, right) = ((part.start, part.stop) for part in box)
    frame = np.zeros(labels.shape, bool)
    frame[top - 2 : bottom + 2, left - 2 : right + 2] = True
    frame[top - 1 : bottom + 1, left - 1 : right + 1] = False
    assert (np.where(frame[..., None], 0, _pictures(task, "RGB")[0]) == marked).all()
    return f"{right - left} x {bottom - top}"


def _distance(task: Task) -> str:
    colours = re.findall(rf"\b({_COLOURS})\b", task.question)
    centres = [np.array(ndimage.center_of_mass(_of_colour(task, colour))) for colour in colours]
    assert len(centres) == 2
    return str(round(float(np.linalg.norm(centres[0] - centres[1]))))


def _holes(task: Task) -> str:
    dark = _pictures(task, "L")[0] < 150
    return str(len(_regions(np.asarray(ndimage.binary_fill_holes(dark)) & ~dark)))


def _maze(task: Task) -> str:
    block = int(_first(r"(\d+) (?:x \d+ )?pixels", task))
    grey = _pictures(task, "L")[0]
    rows, columns = grey.shape[0] // block, grey.shape[1] // block
    free = grey.reshape(rows, block, columns, block).mean((1, 3)) > 128
    node = np.arange(rows * columns).reshape(rows, columns)
    across, down = free[:, 1:] & free[:, :-1], free[1:] & free[:-1]
    starts = np.concatenate([node[:, 1:][across], node[1:][down]])
    ends = np.concatenate([node[:, :-1][across], node[:-1][down]])
    graph = coo_matrix((np.ones(len(starts)), (starts, ends)), shape=(node.size, node.size))
    length = dijkstra(graph, directed=False, indices=node[1, 1])[node[-2, -2]]
    return "no way" if np.isinf(length) else str(int(length))


def _board(task: Task) -> str:
    side = int(_first(r"(\d+) pixels", task))
    grey = _pictures(task, "L")[0].astype(float)
    squares = grey.reshape(grey.shape[0] // side, side, grey.shape[1] // side, side)[:, 1:, :, 1:].mean((1, 3))
    dark = squares < 135
    return str(int(np.argmax(dark.sum(1))) + 1 if "row" in task.question else int(dark.sum()))


def _chart(task: Task) -> str:
    pixels, step = _pictures(task, "RGB")[0].astype(int), int(_first(r"(?:are|steps of) (\d+)", task))
    axis = int(np.flatnonzero((pixels == 0).all((1, 2)))[0])
    lines = np.flatnonzero((pixels[:, -1] == 200).all(1))
    unit = np.diff(lines)[0] / step
    strong = np.ptp(pixels, axis=2) > 60
    bars = ndimage.find_objects(_labels(strong))
    values = [round((axis - bar[0].start) / unit) for bar in sorted(bars, key=lambda bar: bar[1].start)]
    if "sum" in task.question:
        return str(sum(values))
    if "difference" in task.question:
        return str(max(values) - min(values))
    return str(values[1] if "second" in task.question else max(values))


def _clock(task: Task) -> str:
    short, long = re.findall(rf"\b({_COLOURS})\b", task.question)
    centre = _pictures(task, "L")[0].shape[0] // 2

    def degrees(colour: str) -> float:
        ys, xs = np.nonzero(_of_colour(task, colour))
        far = ((ys - centre) ** 2 + (xs - centre) ** 2).argsort()[-9:]
        return float(np.degrees(np.arctan2(xs[far].mean() - centre, centre - ys[far].mean())) % 360)

    minute = round(degrees(long) / 6) % 60
    return f"{round((degrees(short) - minute / 2) / 30) % 12 or 12}:{minute:02}"


def _difference(task: Task) -> str:
    one, two = (picture.astype(int) for picture in _pictures(task, "L"))
    mask = np.abs(one - two) > 30
    assert ((task.saves["difference.png"] == 255).all(2) == mask).all()
    return str(len(_regions(mask)))


def _digits(task: Task) -> str:
    """Tries digits one place after the other, drawing the whole number: what differs least from the picture."""
    side, step = int(_first(r"(?:size |load_default\()(\d+)", task)), int(_first(r"(\d+) pixels", task))
    blur = float(_first(r"(?:radius |GaussianBlur\()([\d.]+)", task))
    picture = _pictures(task, "L")[0].astype(float)
    if picture.shape[0] != side + 16:
        picture = np.rot90(picture)
    font, length = ImageFont.load_default(side), (picture.shape[1] - 8) // step

    def error(text: str, target: np.ndarray) -> float:
        image = Image.new("L", (target.shape[1], target.shape[0]))
        for place, digit in enumerate(text):
            ImageDraw.Draw(image).text((8 + place * step, 4), digit, fill=255, font=font)
        return float(np.abs(np.array(image.filter(ImageFilter.GaussianBlur(blur))) - target).mean())

    found = []
    for target in (picture, picture[::-1, ::-1]):
        text = ""
        for _ in range(length):
            text = min((text + digit for digit in "0123456789"), key=lambda text: error(text, target))
        found.append((error(text, target), text))
    assert min(found)[0] < 10
    return min(found)[1]


def _histogram(task: Task) -> str:
    levels = np.sort(_pictures(task, "L")[0].ravel())
    if "median" in task.question:
        return str(int(np.percentile(levels, 50, method="lower")))
    if "frequent" in task.question:
        values, counts = np.unique(levels, return_counts=True)
        return str(int(values[counts.argmax()]))
    return str(len(levels) - int(np.searchsorted(levels, int(_first(r"than (\d+)", task)), side="right")))


def _crop(task: Task) -> str:
    width, height = int(_first(r"(\d+) pixels wide", task)), int(_first(r"(\d+) high", task))
    x, y = (int(value) for value in re.findall(r"corner is \((\d+), (\d+)\)", task.question)[0])
    counts = {colour: int(_of_colour(task, colour)[y : y + height, x : x + width].sum()) for colour in PALETTE}
    return max(counts, key=lambda colour: counts[colour])


def _turn(task: Task) -> str:
    image = Image.open(BytesIO(next(iter(task.files.values()))))
    image = image.rotate(90 if "counter" in task.question else -90, expand=True)
    pixels = np.array(image)
    pixels = pixels[:, ::-1] if "left to right" in task.question else pixels[::-1]
    assert (pixels == task.saves["result.png"]).all()
    return str(tuple(pixels[int(_first(r"y = (\d+)", task)), int(_first(r"x = (\d+)", task))].tolist()))


ORACLES: Mapping[str, Callable[[Task], str]] = MappingProxyType(
    {
        "count": _count,
        "area": _area,
        "size": _size,
        "distance": _distance,
        "holes": _holes,
        "maze": _maze,
        "board": _board,
        "chart": _chart,
        "clock": _clock,
        "difference": _difference,
        "digits": _digits,
        "histogram": _histogram,
        "crop": _crop,
        "turn": _turn,
    }
)
