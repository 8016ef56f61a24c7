"""Bar and line charts of whole numbers, with an axis to read them from; bars and points have exact boxes."""

from dataclasses import dataclass

import numpy as np

from k25sys.data.boxes import ink_box
from k25sys.data.drawn.scene import Colour, Drawing, Line, blank, draw_text, load_font, text_extent
from k25sys.data.drawn.shapes import COLOURS, shape_mask

_PAPER: Colour = (255, 255, 255)
_INK: Colour = (20, 20, 20)
_GRID: Colour = (215, 215, 215)
_LINE: Colour = (120, 120, 120)
_MIN_FONT = 9
_MARGIN = 6  # up to a sixth of a side stays empty
_DOT = 5  # pixels a side of a point
_NAMES = (
    ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug"),
    ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"),
    ("Q1", "Q2", "Q3", "Q4"),
    ("Oslo", "Rome", "Lima", "Cairo", "Delhi", "Quito"),
)
_LETTERS = tuple("ABCDEFGHKMNPRSTUVXYZ")


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where things are. The value v is the row `baseline - v * unit`."""

    font_size: int
    left: int
    baseline: int
    slot: int
    unit: int
    most: int  # end of the axis
    step: int  # between its numbers, at least one of which is not 0
    names: tuple[str, ...]
    values: tuple[int, ...]


def draw_charts(rng: np.random.Generator, size: tuple[int, int]) -> Drawing:
    """A chart, to be read as a table, by value, by comparison, or for a place."""
    picture_HW3, owner_HW = blank(size, _PAPER)
    height, width = (side - int(rng.integers(side // _MARGIN, endpoint=True)) for side in size)
    layout = _layout(rng, (height, width))
    y, x = int(rng.integers(size[0] - height, endpoint=True)), int(rng.integers(size[1] - width, endpoint=True))
    chart_HW3, chart_owner_HW = picture_HW3[y : y + height, x : x + width], owner_HW[y : y + height, x : x + width]
    _draw_axes(chart_HW3, layout)
    is_bars = bool(rng.integers(2))
    colours = rng.permutation(len(COLOURS)) if rng.integers(2) else np.full(len(COLOURS), rng.integers(len(COLOURS)))
    (_draw_bars if is_bars else _draw_line)(chart_HW3, chart_owner_HW, layout, [COLOURS[c][1] for c in colours])
    question, answer = _asked(rng, layout, "bar" if is_bars else "point")
    return Drawing(
        picture_HW3=picture_HW3,
        owner_HW=owner_HW,
        labels=layout.names,
        values=layout.values,
        question=question,
        answer=answer,
        required=frozenset(range(len(layout.names))),
        has_writing=True,
        extent=ink_box((picture_HW3 != _PAPER).any(2)),
    )


def _layout(rng: np.random.Generator, size: tuple[int, int]) -> _Layout:
    height, width = size
    font_size = max(_MIN_FONT, min(size) // 11)
    font = load_font(font_size)
    name_height = sum(font.getmetrics())
    top = max(_DOT // 2 + 1, name_height // 2)
    baseline = height - name_height - 2
    most = int(rng.integers(4, max(5, min(99, (baseline - top) // 3)), endpoint=True))
    unit = (baseline - top) // most
    step = next((step for step in (1, 2, 5, 10, 20, 50) if step * unit > name_height and step <= most), most)
    left = text_extent(str(most), font)[0] + 4
    most_bars = max(2, min(8, (width - left) // (font_size + 3)))
    count = int(rng.integers(2, most_bars, endpoint=True))
    slot = (width - left) // count
    names = _LETTERS if rng.integers(2) else _NAMES[rng.integers(len(_NAMES))]
    if len(names) < count or max(text_extent(name, font)[0] for name in names) >= slot:
        names = _LETTERS
    first = int(rng.integers(len(names) - count, endpoint=True))
    return _Layout(
        font_size=font_size,
        left=left,
        baseline=baseline,
        slot=slot,
        unit=unit,
        most=most,
        step=step,
        names=names[first : first + count],
        values=tuple(int(value) for value in rng.integers(1, most, count, endpoint=True)),
    )


def _draw_axes(picture_HW3: np.ndarray, layout: _Layout) -> None:
    font = load_font(layout.font_size)
    middle = sum(font.getmetrics()) // 2
    for value in range(0, layout.most + 1, layout.step):
        row = layout.baseline - value * layout.unit
        picture_HW3[row, layout.left :] = _GRID
        text = str(value)
        x = layout.left - 3 - text_extent(text, font)[0]
        draw_text(picture_HW3, (x, row - middle), text, font, _INK)
    picture_HW3[layout.baseline, layout.left :] = _INK
    picture_HW3[: layout.baseline + 1, layout.left - 1] = _INK
    for i, name in enumerate(layout.names):
        x = layout.left + i * layout.slot + (layout.slot - text_extent(name, font)[0]) // 2
        draw_text(picture_HW3, (x, layout.baseline + 1), name, font, _INK)


def _draw_bars(picture_HW3: np.ndarray, owner_HW: np.ndarray, layout: _Layout, colours: list[Colour]) -> None:
    thickness = max(3, layout.slot * 2 // 3)
    for i, value in enumerate(layout.values):
        x = layout.left + i * layout.slot + (layout.slot - thickness) // 2
        rows, columns = slice(layout.baseline - value * layout.unit, layout.baseline), slice(x, x + thickness)
        picture_HW3[rows, columns] = colours[i]
        owner_HW[rows, columns] = i + 1


def _draw_line(picture_HW3: np.ndarray, owner_HW: np.ndarray, layout: _Layout, colours: list[Colour]) -> None:
    from PIL import Image, ImageDraw

    xs = [layout.left + i * layout.slot + layout.slot // 2 for i in range(len(layout.values))]
    ys = [layout.baseline - value * layout.unit for value in layout.values]
    image = Image.fromarray(picture_HW3)
    ImageDraw.Draw(image).line(list(zip(xs, ys, strict=True)), fill=_LINE, width=1)
    picture_HW3[:] = np.asarray(image)
    mask, reach = shape_mask("circle", _DOT), _DOT // 2
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        rows, columns = slice(y - reach, y + reach + 1), slice(x - reach, x + reach + 1)
        picture_HW3[rows, columns][mask] = colours[i]
        owner_HW[rows, columns][mask] = i + 1


def _asked(rng: np.random.Generator, layout: _Layout, noun: str) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
    """Question and answer."""
    names, values = layout.names, layout.values
    highest, lowest = max(values), min(values)
    forms = ["describe", "table", "value", "difference", "sum", "place"]
    forms += ["highest"] * (values.count(highest) == 1) + ["lowest"] * (values.count(lowest) == 1)
    form = forms[rng.integers(len(forms))]
    one, other = (int(i) for i in rng.choice(len(names), 2, replace=False))
    table = tuple(Line(f"{name} | {value}") for name, value in zip(names, values, strict=True))
    if form == "describe":
        return (), table
    if form == "table":
        return (Line("Give the values as a table."),), table
    if form == "value":
        return (Line(f"What is the value of {names[one]}?"),), (Line(str(values[one])),)
    if form == "difference":
        question = f"How far apart are {names[one]} and {names[other]}?"
        return (Line(question),), (Line(str(abs(values[one] - values[other]))),)
    if form == "sum":
        return (Line("What is the sum of all values?"),), (Line(str(sum(values))),)
    if form == "place":
        place = "{box}" if noun == "bar" else "{point}"
        return (Line(f"Where is the {noun} of {names[one]}?"),), (Line(place, one),)
    extreme = highest if form == "highest" else lowest
    return (Line(f"Which value is {form}?"),), (Line(names[values.index(extreme)]),)
