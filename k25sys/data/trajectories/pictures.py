"""Problems of whole pictures: what differs, digits that are turned and blurred, grey levels, crops, turns."""

from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from k25sys.data.trajectories.task import (
    COMPONENTS,
    PALETTE,
    SHAPES,
    Step,
    Task,
    draw_shape,
    noisy,
    place,
    png,
)

_IMPORTS = "import numpy as np\nfrom PIL import Image, ImageDraw\n"


def two_pictures(rng: Random) -> Task:
    """In how many places two noisy pictures differ, by a map of differences."""
    size = (rng.randint(170, 240), rng.randint(140, 200))
    before = Image.new("L", size, 120)
    sides = [(rng.randint(12, 30), rng.randint(12, 30)) for _ in range(rng.randint(8, 12))]
    boxes = place(rng, size, sides, 5)
    changed = rng.sample(range(len(boxes)), min(rng.randint(1, 5), len(boxes)))
    after = before.copy()
    for i, box in enumerate(boxes):
        shape, level = rng.choice(SHAPES[:3]), rng.choice((30, 70, 180, 220))
        draw_shape(ImageDraw.Draw(before), shape, box, level)
        if i not in changed:
            draw_shape(ImageDraw.Draw(after), shape, box, level)
    one, two = rng.choice((("before.png", "after.png"), ("left.png", "right.png"), ("a.png", "b.png")))
    load = f'{_IMPORTS}a = np.array(Image.open("{one}").convert("L"))\nb = np.array(Image.open("{two}").convert("L"))\n'
    count = "print(mask.sum(), 'pixels differ')\nregions = components(mask)\nprint(len(regions))"
    why = "I subtract the two, threshold the difference well above the noise, and count the connected regions."
    wide = "difference = np.abs(a.astype(int) - b.astype(int))\nmask = difference > 25\n"
    save = "Image.fromarray((mask * 255).astype(np.uint8)).save('difference.png')\n"
    code = load + rng.choice(COMPONENTS[::2]) + "\n"  # the other takes too long where the first attempt finds thousands
    steps = [Step(thinking=why, code=code + wide + save + count)]
    if rng.random() < 0.5:
        steps = [
            Step(
                thinking=why,
                code=code + "mask = np.abs(a - b) > 25\nprint(mask.mean())\nprint(len(components(mask)))",
                misleads=True,
            ),
            Step(
                thinking="{output} regions, nearly all over the picture: a - b of uint8 wraps around, so that -1 "
                "became 255. I subtract as int.",
                code=wide + save + count,
            ),
        ]
    mask = np.array(before).astype(int) != np.array(after)
    return Task(
        question=rng.choice(
            (
                f"{one} and {two} show the same scene, with some things gone and a little noise. In how many places do "
                "they differ?",
                f"Compare {one} with {two}: how many objects are missing in the second? Both are a bit noisy.",
            )
        )
        + " Save the map of differences as difference.png, white where they differ.",
        answer=str(len(changed)),
        files={one: png(noisy(rng, np.array(before), 6)), two: png(noisy(rng, np.array(after), 6))},
        steps=tuple(steps),
        thinking="Each region is one object, so they differ in {output} places.",
        reply="They differ in {output} places; difference.png shows where.",
        saves={"difference.png": np.stack([mask * 255] * 3, 2).astype(np.uint8)},
    )


def turned_digits(rng: Random) -> Task:
    """Digits that are turned by quarters and blurred, read with templates of the same font."""
    digits, side = "".join(rng.choice("0123456789") for _ in range(rng.randint(3, 6))), rng.randint(28, 40)
    font, step = ImageFont.load_default(side), side + 2
    image = Image.new("L", (step * len(digits) + 8, side + 16), 0)
    for i, digit in enumerate(digits):
        ImageDraw.Draw(image).text((8 + i * step, 4), digit, fill=255, font=font)
    turns, blur = rng.randrange(4), rng.choice((1.0, 1.5, 2.0))
    picture = np.array(image.filter(ImageFilter.GaussianBlur(blur)).rotate(90 * turns, expand=True))
    file = rng.choice(("digits.png", "number.png", "label.png"))
    tools = (
        "import numpy as np\nfrom PIL import Image, ImageDraw, ImageFilter, ImageFont\n\n"
        f"font = ImageFont.load_default({side})\n\n"
        "def template(digit):\n"
        f"    image = Image.new('L', ({step + 8}, {side + 16}), 0)\n"
        "    ImageDraw.Draw(image).text((8, 4), digit, fill=255, font=font)\n"
        f"    return np.array(image.filter(ImageFilter.GaussianBlur({blur}))).astype(float)[:, :{step}]\n\n"
        "templates = {digit: template(digit) for digit in '0123456789'}\n\n"
        "def read(image):\n"
        '    """The digits, and the mean squared error of the best templates."""\n'
        "    pixels, text, errors = np.array(image).astype(float), '', []\n"
        f"    for x in range(0, pixels.shape[1] - {step} + 1, {step}):\n"
        f"        part = pixels[:, x : x + {step}]\n"
        "        fits = {d: float(((part - t) ** 2).mean()) for d, t in templates.items()}\n"
        "        text += min(fits, key=fits.get)\n        errors.append(min(fits.values()))\n"
        "    return text, round(sum(errors) / len(errors))\n\n"
    )
    load = f'image = Image.open("{file}").convert("L")\nprint(image.size)\n'
    search = (
        "best = []\nfor quarter in range(4):\n    turned = image.rotate(90 * quarter, expand=True)\n"
        "    if turned.height == " + str(side + 16) + ":\n"
        "        text, error = read(turned)\n        best.append((error, text))\n"
        "        print(90 * quarter, text, error)\nprint(min(best)[1])"
    )
    why = (
        "The font and size are known, so I draw each digit the same way, blur it as much, and compare squared errors. "
    )
    steps = [Step(thinking=why + "I try every quarter turn that gives the right height.", code=tools + load + search)]
    if turns and rng.random() < 0.5:
        steps = [
            Step(thinking=why, code=tools + load + "text, error = read(image)\nprint(error)\nprint(text)",
                 misleads=turns == 2, fails=turns != 2),
            Step(
                thinking="That cannot be right: the error is large"
                + (", so the writing is upside down. " if turns == 2 else ". The text does not lie along the rows. ")
                + "I try the quarter turns.",
                code=search,
            ),
        ]  # fmt: skip
        if turns != 2:
            shape = "The shapes do not match: the picture is higher than a line of digits, so it has been turned. "
            steps[1] = Step(thinking=shape + "I try the quarter turns.", code=search)
    return Task(
        question=rng.choice(
            (
                f"{file} shows a number in Pillow's default font of size {side}, {step} pixels from digit to digit, "
                f"from (8, 4) on a ground {side + 16} pixels high. It was blurred (Gaussian, radius {blur}) and then "
                "turned by some quarter turns. Which number is it?",
                f"Read the number in {file}. It was written with ImageFont.load_default({side}), white on black, each "
                f"digit {step} pixels after the one before, the first at (8, 4), the picture {side + 16} pixels high; "
                f"then blurred with GaussianBlur({blur}) and perhaps rotated by a multiple of 90 degrees.",
            )
        ),
        answer=digits,
        files={file: png(noisy(rng, picture, 12))},
        steps=tuple(steps),
        thinking="With the least error by far, the number reads {output}.",
        reply=rng.choice(("The number is {output}.", "It reads {output}.")),
    )


def grey_levels(rng: Random) -> Task:
    """A statistic of a grey picture's histogram."""
    height, width = rng.randint(60, 120), rng.randint(60, 120)
    slope = np.linspace(rng.randint(10, 80), rng.randint(150, 240), width)
    picture = noisy(rng, np.repeat(slope[None].astype(np.uint8), height, 0), rng.randint(5, 40))
    threshold, counts = rng.randint(90, 200), np.bincount(picture.ravel(), minlength=256)
    while int((counts == counts.max()).sum()) > 1:  # one level is the most frequent
        picture[rng.randrange(height), rng.randrange(width)] = int(counts.argmax())
        counts = np.bincount(picture.ravel(), minlength=256)
    median = int(np.sort(picture.ravel())[(picture.size - 1) // 2])
    file = rng.choice(("grey.png", "scan.png", "photo.png"))
    ask, expression, answer = rng.choice(
        (
            (f"how many pixels are brighter than {threshold}", f"histogram[{threshold + 1}:].sum()",
             int((picture > threshold).sum())),
            ("which grey level is the most frequent", "histogram.argmax()", int(counts.argmax())),
            ("what is the median grey level (the lower one of two middle pixels)",
             f"(histogram.cumsum() >= {(picture.size + 1) // 2}).argmax()", median),
        )
    )  # fmt: skip
    first = rng.choice(
        (
            f'histogram = np.array(Image.open("{file}").histogram())\n',
            f'pixels = np.array(Image.open("{file}"))\nhistogram = np.bincount(pixels.ravel(), minlength=256)\n',
        )
    )
    look = f'{_IMPORTS}image = Image.open("{file}")\nprint(image.mode, image.size, image.getextrema())'
    return Task(
        question=rng.choice((f"In the grey picture {file}, {ask}?", f"Look at the histogram of {file}: {ask}?")),
        answer=str(answer),
        files={file: png(picture)},
        steps=(
            Step(thinking="I check that the file is grey with eight bits, and its range.", code=look),
            Step(
                thinking=f"{{output}}, as expected. The histogram answers {ask}.",
                code=first + f"assert histogram.sum() == {picture.size}\nprint({expression})",
            ),
        ),
        thinking="The histogram covers all pixels, so {output} is exact.",
        reply=rng.choice(("{output}.", "The answer is {output}.")),
    )


def crop_colour(rng: Random) -> Task:
    """Which colour fills most of a part of the picture."""
    size = (rng.randint(160, 240), rng.randint(140, 200))
    names = sorted(PALETTE)
    while True:
        image = Image.new("RGB", size, PALETTE[rng.choice(names)])
        for _ in range(12):
            left, top = rng.randrange(size[0]), rng.randrange(size[1])
            box = (left, top, left + rng.randint(20, 80), top + rng.randint(20, 80))
            draw_shape(ImageDraw.Draw(image), rng.choice(SHAPES), box, PALETTE[rng.choice(names)])
        width, height = rng.randint(30, 70), rng.randint(30, 70)
        x, y = rng.randint(80, size[0] - width), rng.randint(0, size[1] - height)
        part = np.array(image.crop((x, y, x + width, y + height)))
        counts = {name: int((part == PALETTE[name]).all(2).sum()) for name in names}
        first, second = sorted(counts.values())[-1:-3:-1]
        if first > second + 20:
            break
    file = rng.choice(("picture.png", "collage.png"))
    palette = ", ".join(f"{name} {PALETTE[name]}" for name in names)
    nearest = (
        f"palette = {{{', '.join(f'{name!r}: {PALETTE[name]}' for name in names)}}}\n"
        "pixels = np.array(part).astype(int)\n"
        "distance = np.stack([np.abs(pixels - c).sum(2) for c in palette.values()])\n"
        "counts = np.bincount(distance.argmin(0).ravel(), minlength=len(palette))\n"
        "print(dict(zip(palette, counts.tolist())))\nprint(list(palette)[counts.argmax()])"
    )
    load = f'{_IMPORTS}image = Image.open("{file}").convert("RGB")\n'
    crop = f"part = image.crop(({x}, {y}, {x + width}, {y + height}))\nprint(part.size)\n"
    steps = [
        Step(thinking="I crop that part and assign each pixel to the nearest named colour.", code=load + crop + nearest)
    ]
    if rng.random() < 0.5 and width < x:
        steps = [
            Step(
                thinking="I crop that part first.",
                code=load + f"part = image.crop(({x}, {y}, {width}, {height}))\nprint(part.size)",
                fails=True,
            ),
            Step(
                thinking="crop takes the corners (left, upper, right, lower), not a width and a height. Then I assign "
                "each pixel to the nearest named colour.",
                code=crop + nearest,
            ),
        ]
    where = f"{width} pixels wide and {height} high whose upper left corner is ({x}, {y})"
    return Task(
        question=rng.choice(
            (
                f"Which colour fills most of the part of {file} that is {where}? Choose from: {palette}.",
                f"Look at the region of {file} {where}. What is its most common colour? The colours are {palette}.",
            )
        ),
        answer=max(counts, key=lambda name: counts[name]),
        files={file: png(noisy(rng, np.array(image), 15))},
        steps=tuple(steps),
        thinking="By that count the region is mostly {output}.",
        reply=rng.choice(("Mostly {output}.", "The most common colour there is {output}.")),
    )


def turn_and_flip(rng: Random) -> Task:
    """A picture turned by a quarter, mirrored and saved; a pixel of the result."""
    height, width = rng.randint(50, 90), rng.randint(100, 140)
    picture = np.frombuffer(rng.randbytes(height // 10 * (width // 10) * 3), np.uint8)
    picture = picture.reshape(height // 10, width // 10, 3).repeat(10, 0).repeat(10, 1)
    clockwise, mirror = rng.random() < 0.5, rng.random() < 0.5
    result = np.rot90(picture, -1 if clockwise else 1)
    result = np.ascontiguousarray(result[:, ::-1] if mirror else result[::-1])
    y, x = rng.randrange(result.shape[0]), rng.randrange(result.shape[1])
    file = rng.choice(("picture.png", "tiles.png"))
    flip = "FLIP_LEFT_RIGHT" if mirror else "FLIP_TOP_BOTTOM"
    turn = "ROTATE_270" if clockwise else "ROTATE_90"
    end = f"result = turned.transpose(Image.Transpose.{flip})\nresult.save('result.png')\n"
    end += f"print(result.size)\nprint(result.getpixel(({x}, {y})))"
    load = f'{_IMPORTS}image = Image.open("{file}").convert("RGB")\nprint(image.size)\n'
    why = f"transpose is exact, and counts its angles counter-clockwise, so this quarter turn is {turn}."
    steps = [Step(thinking=why, code=f"{load}turned = image.transpose(Image.Transpose.{turn})\n{end}")]
    if rng.random() < 0.5:
        angle = -90 if clockwise else 90
        steps = [
            Step(
                thinking=f"Pillow counts angles counter-clockwise, so I rotate by {angle}.",
                code=f"{load}turned = image.rotate({angle})\nprint(turned.size)\n"
                "assert turned.size == image.size[::-1]",
                fails=True,
            ),
            Step(
                thinking="rotate keeps the size of the picture and cuts the corners off. " + why[0].upper() + why[1:],
                code=f"turned = image.transpose(Image.Transpose.{turn})\n{end}",
            ),
        ]
    way = "clockwise" if clockwise else "counter-clockwise"
    return Task(
        question=f"Turn {file} by 90 degrees {way}, "
        + ("mirror it left to right" if mirror else "flip it upside down")
        + rng.choice((", and save it as result.png. ", " and write the outcome to result.png. "))
        + f"What is the RGB value of the result's pixel at x = {x}, y = {y}?",
        answer=str(tuple(result[y, x].tolist())),
        files={file: png(picture)},
        steps=tuple(steps),
        thinking="The sizes are those of a quarter turn. The pixel is {output}.",
        reply=rng.choice(("It is {output}; the picture is saved as result.png.", "{output}. See result.png.")),
        saves={"result.png": result},
    )
