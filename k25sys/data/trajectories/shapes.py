"""Problems of coloured shapes: how many, how large, where, how far apart, with how many holes."""

import math
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from k25sys.data.trajectories.task import (
    COMPONENTS,
    PALETTE,
    SHAPES,
    Step,
    Task,
    draw_shape,
    hue,
    noisy,
    place,
    png,
)

_IMPORTS = "import numpy as np\nfrom PIL import Image, ImageDraw\n"
_NAMES = ("picture.png", "shapes.png", "input.png", "scene.png")


def _scene(rng: Random, colours: list[str], sides: tuple[int, int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """A light picture with a shape of each of the colours, and the mask of each: as many as found a place."""
    size = (rng.randint(180, 260), rng.randint(150, 220))
    image = Image.new("RGB", size, (rng.randint(225, 240),) * 3)
    draw, masks = ImageDraw.Draw(image), []
    wanted = [(rng.randint(*sides), rng.randint(*sides)) for _ in colours]
    for colour, box in zip(colours, place(rng, size, wanted, 6), strict=False):
        shape = rng.choice(SHAPES)
        draw_shape(draw, shape, box, PALETTE[colour])
        mask = Image.new("L", size)
        draw_shape(ImageDraw.Draw(mask), shape, box, 1)
        masks.append(np.array(mask) > 0)
    return np.array(image), masks


def _mask_code(file: str, colour: str) -> str:
    near = f"np.abs(hue - {hue(colour)})"
    if colour == "red":
        near = "np.minimum(hue, 256 - hue)"
    return (
        f'hsv = np.array(Image.open("{file}").convert("HSV")).astype(int)\n'
        "hue, saturation = hsv[..., 0], hsv[..., 1]\n"
        f"mask = ({near} < 14) & (saturation > 90)\n"
    )


def _naive_mask_code(file: str, colour: str) -> str:
    """A first attempt that finds too little: one side of red's hue, or the colour's exact numbers."""
    if colour == "red":
        return _mask_code(file, colour).replace("np.minimum(hue, 256 - hue)", "hue")
    return f'pixels = np.array(Image.open("{file}").convert("RGB"))\nmask = (pixels == {PALETTE[colour]}).all(axis=2)\n'


def _why_naive_fails(colour: str) -> str:
    if colour == "red":
        return (
            "{output} is too little: red lies around hue 0, where the circle closes, so that half of its pixels have "
            "hues near 255. I need the distance on the circle."
        )
    return (
        "Only {output}. Asking for one exact colour finds almost nothing, since the pixels are noisy. A band of hues "
        f"in HSV is sturdier: {colour} lies around {hue(colour)} of 255."
    )


def _load(rng: Random, file: str) -> Step:
    return Step(
        thinking=rng.choice(
            (
                f"I cannot judge this by eye; let me load {file} and look at its size and mode first.",
                "First I open the file to learn its size and mode.",
                f"Let me start by loading {file} with Pillow.",
            )
        ),
        code=f'{_IMPORTS}image = Image.open("{file}")\nprint(image.size, image.mode)',
    )


def count_shapes(rng: Random) -> Task:
    """How many shapes have a colour, with specks of the same colour that do not count."""
    colour, *others = rng.sample(sorted(PALETTE), 4)
    wanted = [colour] * rng.randint(2, 6) + [rng.choice(others) for _ in range(rng.randint(2, 5))]
    rng.shuffle(wanted)
    picture, masks = _scene(rng, wanted, (16, 34))
    answer = sum(c == colour for c in wanted[: len(masks)])
    specks = rng.choice((0, rng.randint(2, 5)))
    taken = np.logical_or.reduce(masks)
    for _ in range(specks):
        y, x = rng.randrange(4, picture.shape[0] - 4), rng.randrange(4, picture.shape[1] - 4)
        if not taken[y - 4 : y + 5, x - 4 : x + 5].any():
            picture[y : y + 2, x : x + 2] = PALETTE[colour]
            taken[y : y + 2, x : x + 2] = True
    has_specks = int((picture == PALETTE[colour]).all(2).sum()) > sum(
        int(m.sum()) for m, c in zip(masks, wanted, strict=False) if c == colour
    )
    file = rng.choice(_NAMES)
    code = _mask_code(file, colour) + rng.choice(COMPONENTS) + "\nregions = components(mask)\n"
    first = Step(
        thinking=rng.choice(
            (
                f"A mask of {colour} in HSV, then connected components: their number is the answer.",
                f"Plan: select the {colour} pixels by hue and count the connected regions among them.",
            )
        ),
        code=code
        + ("print(len(regions))" if has_specks else "print([size for size, _ in regions])\nprint(len(regions))"),
        misleads=has_specks,
    )
    correct = Step(
        thinking="{output} regions, but some may be mere specks, which the question leaves out. I look at the sizes "
        "and keep the regions of at least 20 pixels.",
        code="print(sorted(size for size, _ in regions))\nprint(sum(size >= 20 for size, _ in regions))",
    )
    question = rng.choice(
        (
            f"How many {colour} shapes are there in {file}? Specks of fewer than 20 pixels do not count.",
            f"Count the {colour} objects in the picture {file}, leaving out specks smaller than 20 pixels.",
            f"{file} shows shapes in several colours. How many of them are {colour}? (Ignore dots below 20 pixels.)",
        )
    )
    return Task(
        question=question,
        answer=str(answer),
        files={file: png(noisy(rng, picture, 8))},
        steps=(_load(rng, file), first, correct) if has_specks else (_load(rng, file), first),
        thinking="Every region that is left is a whole shape, so the count is {output}.",
        reply=rng.choice((f"There are {{output}} {colour} shapes.", f"I count {{output}} {colour} shapes in {file}.")),
    )


def colour_area(rng: Random) -> Task:
    """How many pixels have a colour."""
    colours = rng.sample(sorted(PALETTE), 3)
    colour = colours[0] if rng.random() < 0.6 else "red"
    wanted = [colour, *[c for c in colours if c != colour], colour]
    picture, masks = _scene(rng, wanted, (24, 60))
    answer = sum(int(m.sum()) for m, c in zip(masks, wanted, strict=False) if c == colour)
    file = rng.choice(_NAMES)
    steps = [_load(rng, file)] if rng.random() < 0.5 else []
    imports = "" if steps else _IMPORTS
    if rng.random() < 0.5:
        steps.append(
            Step(
                thinking=f"I select the {colour} pixels and count them.",
                code=imports + _naive_mask_code(file, colour) + "print(mask.sum())",
                misleads=True,
            )
        )
        why = _why_naive_fails(colour)
    else:
        why = f"In HSV a colour is a band of hues, whatever the noise: {colour} lies around {hue(colour)} of 255."
    steps.append(Step(thinking=why, code=imports + _mask_code(file, colour) + "print(mask.sum())"))
    return Task(
        question=rng.choice(
            (
                f"How many pixels of {file} are {colour}?",
                f"What area, in pixels, do the {colour} parts of {file} cover?",
                f"Measure the total {colour} area in {file} and give it in pixels.",
            )
        ),
        answer=str(answer),
        files={file: png(noisy(rng, picture, 8))},
        steps=tuple(steps),
        thinking=rng.choice(("The mask has {output} pixels.", "So the area is {output} pixels.")),
        reply=rng.choice((f"The {colour} area covers {{output}} pixels.", "{output} pixels.")),
    )


def largest_size(rng: Random) -> Task:
    """Width and height of the largest shape of a colour, and a box drawn around it."""
    colour, other = rng.sample(sorted(PALETTE), 2)
    wanted = [colour, other, colour, other, colour]
    while True:
        picture, masks = _scene(rng, wanted, (18, 64))
        sizes = sorted((int(m.sum()) for m, c in zip(masks, wanted, strict=False) if c == colour), reverse=True)
        if len(sizes) == 1 or sizes[0] > sizes[1]:
            break
    largest = next(m for m in masks if int(m.sum()) == sizes[0] and (picture[m] == PALETTE[colour]).all())
    ys, xs = np.nonzero(largest)
    box = (int(xs.min()), int(ys.min()), int(xs.max()), int(ys.max()))
    file, picture = rng.choice(_NAMES), noisy(rng, picture, 8)
    marked = Image.fromarray(picture)
    ImageDraw.Draw(marked).rectangle((box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2), outline=(0, 0, 0))
    measure = (
        _mask_code(file, colour) + rng.choice(COMPONENTS) + "\nsize, box = max(components(mask))\nprint(size, box)\n"
    )
    find = Step(
        thinking=f"I mask {colour} by its hue, take the connected regions, and keep the one with the most pixels.",
        code=measure + "print(f'{box[2] - box[0]} x {box[3] - box[1]}')",
        misleads=True,
    )
    fix = "{output} is one short each way: both ends of the box belong to the shape, so I add 1. "
    if rng.random() < 0.5:
        find = Step(thinking=find.thinking, code=measure.rstrip())
        fix = "The largest region is (pixels, box) {output}. "
    draw = Step(
        thinking=fix + "Then I draw the outline two pixels outside it and save the picture.",
        code='marked = Image.open("' + file + '").convert("RGB")\n'
        "left, top, right, bottom = box\n"
        "ImageDraw.Draw(marked).rectangle((left - 2, top - 2, right + 2, bottom + 2), outline=(0, 0, 0))\n"
        "marked.save('marked.png')\nprint(f'{right - left + 1} x {bottom - top + 1}')",
    )
    ask = rng.choice(
        (
            f"How wide and how high is the largest {colour} shape in {file}?",
            f"Find the largest {colour} shape in {file} and measure its bounding box.",
        )
    )
    return Task(
        question=f"{ask} Answer as width x height in pixels, and save the picture as marked.png with a black outline "
        "one pixel wide, two pixels outside that box.",
        answer=f"{box[2] - box[0] + 1} x {box[3] - box[1] + 1}",
        files={file: png(picture)},
        steps=(_load(rng, file), find, draw),
        thinking="The box measures {output} pixels, and marked.png is written.",
        reply=rng.choice(
            (
                f"The largest {colour} shape measures {{output}} pixels; marked.png shows it.",
                "It is {output} pixels. I saved the outlined picture as marked.png.",
            )
        ),
        saves={"marked.png": np.array(marked)},
    )


def centre_distance(rng: Random) -> Task:
    """The distance between the centroids of two shapes."""
    one, two, other = rng.sample(sorted(PALETTE), 3)
    while True:
        picture, masks = _scene(rng, [one, two, other], (20, 44))
        if len(masks) < 2:
            continue
        centres = [np.array([v.mean() for v in np.nonzero(mask)]) for mask in masks[:2]]
        distance = float(np.hypot(*(centres[0] - centres[1])))
        if abs(distance % 1 - 0.5) > 0.01:  # no matter of rounding
            break
    file = rng.choice(_NAMES)
    circle = "np.minimum(np.abs(hue - centre), 256 - np.abs(hue - centre))"
    code = (
        f'hsv = np.array(Image.open("{file}").convert("HSV")).astype(int)\n'
        "hue, saturation = hsv[..., 0], hsv[..., 1]\n\n"
        f"def centroid(centre):\n    ys, xs = np.nonzero(({circle} < 14) & (saturation > 90))\n"
        "    return ys.mean(), xs.mean()\n\n"
        f"a, b = centroid({hue(one)}), centroid({hue(two)})\nprint([round(float(v), 1) for v in (*a, *b)])\n"
    )
    end = rng.choice(("print(round(math.hypot(a[0] - b[0], a[1] - b[1])))", "print(round(math.dist(a, b)))"))
    steps = [
        Step(
            thinking=f"Centroids of the {one} and the {two} pixels, then the distance between them.",
            code=_IMPORTS + code + end,
            fails=True,
        ),
        Step(thinking="I forgot to import math; the centroids stand already.", code="import math\n" + end),
    ]
    if rng.random() < 0.6:
        steps = [Step(thinking=steps[0].thinking, code="import math\n" + _IMPORTS + code + end)]
    return Task(
        question=rng.choice(
            (
                f"How far is the centre of the {one} shape from that of the {two} one in {file}?",
                f"{file} has one {one} and one {two} shape. Give the distance between their centroids.",
            )
        )
        + " Round to whole pixels.",
        answer=str(round(distance)),
        files={file: png(noisy(rng, picture, 8))},
        steps=tuple(steps),
        thinking="The distance is {output} pixels.",
        reply=rng.choice(("About {output} pixels.", "Their centres are {output} pixels apart.")),
    )


def plate_holes(rng: Random) -> Task:
    """How many holes a dark plate has: regions of the background that do not reach the rim."""
    size = (rng.randint(150, 220), rng.randint(130, 180))
    image = Image.new("L", size, 235)
    draw = ImageDraw.Draw(image)
    draw.rectangle((12, 12, size[0] - 13, size[1] - 13), fill=60)
    sides = [(rng.randint(9, 26), rng.randint(9, 26)) for _ in range(rng.randint(2, 8))]
    holes = place(rng, (size[0] - 24, size[1] - 24), sides, 5)
    for left, top, right, bottom in holes:
        draw_shape(draw, rng.choice(SHAPES[:3]), (left + 12, top + 12, right + 12, bottom + 12), 235)
    level = math.floor(60 + 0.5 * (235 - 60))
    file = rng.choice(("plate.png", "part.png", "mask.png"))
    start = Step(
        thinking=rng.choice(
            (
                "Binarise: the plate is dark, everything else light. Holes are light regions, so I count those.",
                "I threshold the picture and count the light connected regions.",
            )
        ),
        code=f'{_IMPORTS}{rng.choice(COMPONENTS)}\ngrey = np.array(Image.open("{file}").convert("L"))\n'
        f"light = grey > {level}\nregions = components(light)\nprint(len(regions))",
        misleads=True,
    )
    outside = Step(
        thinking="{output} counts the surroundings of the plate as well: they are light too, but touch the rim of the "
        "picture. A hole does not.",
        code="height, width = light.shape\n"
        "inner = [r for r in regions if r[1][0] > 0 and r[1][1] > 0 and r[1][2] < width - 1 and r[1][3] < height - 1]\n"
        "print([size for size, _ in inner])\nprint(len(inner))",
    )
    return Task(
        question=rng.choice(
            (
                f"How many holes does the dark plate in {file} have?",
                f"Count the holes that are punched through the dark part shown in {file}.",
                f"{file}: a dark sheet on a light ground. How many openings are in it?",
            )
        ),
        answer=str(len(holes)),
        files={file: png(noisy(rng, np.array(image), 20))},
        steps=(start, outside),
        thinking=rng.choice(("So there are {output} holes.", "{output} light regions are enclosed by the plate.")),
        reply=rng.choice(("The plate has {output} holes.", "{output} holes.")),
    )
