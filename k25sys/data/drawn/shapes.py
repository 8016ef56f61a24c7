"""Coloured shapes, drawn without blending so that every pixel belongs to one of them or to none; and counting them."""

from collections import Counter

import numpy as np

from k25sys.data.boxes import Box
from k25sys.data.drawn.scene import Colour, Drawing, Line, blank

COLOURS: tuple[tuple[str, Colour], ...] = (
    ("red", (220, 40, 40)), ("green", (40, 160, 60)), ("blue", (50, 80, 220)), ("yellow", (235, 200, 30)),
    ("purple", (150, 50, 190)), ("orange", (245, 130, 20)), ("cyan", (40, 190, 210)), ("pink", (240, 130, 180)),
)  # fmt: skip
BACKGROUNDS: tuple[Colour, ...] = ((255, 255, 255), (235, 235, 230), (60, 60, 66))
KINDS = ("circle", "square", "triangle", "diamond", "cross", "ring")
_MIN_SIDE = 8
_TRIES = 40


def draw_shapes(rng: np.random.Generator, size: tuple[int, int]) -> Drawing:
    """A few shapes, described or asked for by name, place or side."""
    picture_HW3, owner_HW, labels = _scene(
        rng, size, int(rng.integers(1, 6)), max(_MIN_SIDE, min(size) // 3), _labels()
    )
    unique = [i for i, label in enumerate(labels) if labels.count(label) == 1]
    apart = _pairs_apart(owner_HW, unique)
    forms = ["describe", "list", "name"] + ["locate", "point"] * bool(unique) + ["side"] * bool(apart)
    form = forms[rng.integers(len(forms))]
    target = int(rng.integers(len(labels)))
    required, in_reading_order = {target}, False
    if form == "describe":
        question, answer = (), tuple(Line(f"a {label} at {{box}}", i) for i, label in enumerate(labels))
        in_reading_order = True
    elif form == "list":
        question = (Line("List all shapes with their boxes."),)
        answer = tuple(Line(f"{label} {{box}}", i) for i, label in enumerate(labels))
        in_reading_order = True
    elif form == "name":
        question, answer = (Line("What is at {box}?", target),), (Line(labels[target]),)
    elif form == "side":
        one, other = apart[rng.integers(len(apart))]
        xs = [np.flatnonzero((owner_HW == i + 1).any(0))[0] for i in (one, other)]
        required = {one, other}
        question = (Line(f"Is the {labels[one]} left or right of the {labels[other]}?"),)
        answer = (Line("left" if xs[0] < xs[1] else "right"),)
    else:
        target = unique[rng.integers(len(unique))]
        required = {target}
        verb, place = ("Where is", "{box}") if form == "locate" else ("Point at", "{point}")
        question = (Line(f"{verb} the {labels[target]}{'?' if form == 'locate' else '.'}"),)
        answer = (Line(place, target),)
    return Drawing(
        picture_HW3=picture_HW3,
        owner_HW=owner_HW,
        labels=labels,
        question=question,
        answer=answer,
        required=frozenset(required),
        has_writing=False,
        in_reading_order=in_reading_order,
    )


def draw_counting(rng: np.random.Generator, size: tuple[int, int]) -> Drawing:
    """Small shapes of few colours and kinds, to be counted: a crop that cuts one would make the answer wrong."""
    colours = rng.choice(len(COLOURS), 3, replace=False)
    kinds = rng.choice(len(KINDS), 2, replace=False)
    choice = [(COLOURS[c], KINDS[k]) for c in colours[:2] for k in kinds]
    picture_HW3, owner_HW, labels = _scene(rng, size, int(rng.integers(1, 13)), max(_MIN_SIDE, min(size) // 6), choice)
    form = ("all", "colour", "kind", "points")[rng.integers(4)]
    what, chosen = "shapes", list(range(len(labels)))
    if form == "colour":  # one of the three colours does not occur: the answer may be 0
        name = COLOURS[colours[rng.integers(3)]][0]
        what, chosen = f"{name} shapes", [i for i, label in enumerate(labels) if label.split()[0] == name]
    elif form == "kind":
        name = KINDS[kinds[rng.integers(2)]]
        what, chosen = _plural(name), [i for i, label in enumerate(labels) if label.split()[1] == name]
    elif form == "points":
        label, _ = Counter(labels).most_common(1)[0]
        what, chosen = _plural(label), [i for i, other in enumerate(labels) if other == label]
    is_list = form == "points"
    question = Line(f"Point at all {what}." if is_list else f"How many {what} are there?")
    answer = tuple(Line("{point}", i) for i in chosen) if is_list else (Line(str(len(chosen))),)
    return Drawing(
        picture_HW3=picture_HW3,
        owner_HW=owner_HW,
        labels=labels,
        question=(question,),
        answer=answer,
        required=frozenset(range(len(labels))),
        has_writing=False,
        in_reading_order=is_list,
    )


def shape_mask(kind: str, side: int) -> np.ndarray:
    """(side, side) bool: the pixels of a shape whose centres lie in it. It touches all four sides and is symmetric."""
    centres = (np.arange(side) * 2 + 1 - side) / side
    x, y = abs(centres)[None, :], centres[:, None]
    rounding = 1e-9
    if kind == "circle":
        return x**2 + y**2 <= 1 + rounding
    if kind == "square":
        return np.ones((side, side), bool)
    if kind == "triangle":
        # its apex, one or two pixels wide, is in the first row; its base is the last
        return x <= (y + 1) / 2 + 1 / side
    if kind == "diamond":
        return x + abs(y) <= 1 + rounding
    if kind == "cross":
        return (x <= 0.3) | (abs(y) <= 0.3)
    assert kind == "ring", kind
    return (x**2 + y**2 <= 1 + rounding) & (x**2 + y**2 >= 0.3)


def _labels() -> list[tuple[tuple[str, Colour], str]]:
    return [(colour, kind) for colour in COLOURS for kind in KINDS]


def _plural(name: str) -> str:
    return name + ("es" if name.endswith("s") else "s")


def _scene(
    rng: np.random.Generator,
    size: tuple[int, int],
    wanted: int,
    longest: int,
    choice: list[tuple[tuple[str, Colour], str]],
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Picture, owners and labels of up to `wanted` shapes, at least one; their boxes are a pixel apart or more."""
    height, width = size
    picture_HW3, owner_HW = blank(size, BACKGROUNDS[rng.integers(len(BACKGROUNDS))])
    boxes, labels = [], []
    for _ in range(_TRIES * wanted):
        if len(labels) == wanted:
            break
        side = int(rng.integers(_MIN_SIDE, longest, endpoint=True))
        x, y = int(rng.integers(width - side, endpoint=True)), int(rng.integers(height - side, endpoint=True))
        around = Box(x - 1, y - 1, x + side + 1, y + side + 1)
        if any(around.clipped(box).area for box in boxes):
            continue
        (colour_name, colour), kind = choice[rng.integers(len(choice))]
        mask = shape_mask(kind, side)
        picture_HW3[y : y + side, x : x + side][mask] = colour
        owner_HW[y : y + side, x : x + side][mask] = len(labels) + 1
        boxes.append(Box(x, y, x + side, y + side))
        labels.append(f"{colour_name} {kind}")
    return picture_HW3, owner_HW, tuple(labels)


def _pairs_apart(owner_HW: np.ndarray, marks: list[int]) -> list[tuple[int, int]]:
    """Pairs of marks that share no column, so that left and right are beyond doubt."""
    columns = {i: (owner_HW == i + 1).any(0) for i in marks}
    return [(i, j) for i in marks for j in marks if i != j and not (columns[i] & columns[j]).any()]
