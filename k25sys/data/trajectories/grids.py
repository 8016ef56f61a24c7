"""Problems of pictures that are laid out: mazes, boards, bar charts, clocks."""

import math
from collections import deque
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from k25sys.data.trajectories.task import PALETTE, Step, Task, hue, noisy, png

_IMPORTS = "import numpy as np\nfrom PIL import Image, ImageDraw\n"
_NEAR = ((0, 1), (1, 0), (0, -1), (-1, 0))


def _maze(rng: Random, rows: int, columns: int) -> np.ndarray:
    """(2 rows + 1, 2 columns + 1) bool, true where one may walk: a random tree of passages, and a few more openings."""
    is_open = np.zeros((2 * rows + 1, 2 * columns + 1), bool)
    is_open[1, 1] = True
    stack = [(1, 1)]
    while stack:
        y, x = stack[-1]
        steps = [(dy, dx) for dy, dx in _NEAR if 0 < y + 2 * dy < 2 * rows and 0 < x + 2 * dx < 2 * columns]
        steps = [(dy, dx) for dy, dx in steps if not is_open[y + 2 * dy, x + 2 * dx]]
        if not steps:
            stack.pop()
            continue
        dy, dx = rng.choice(steps)
        is_open[y + dy, x + dx] = is_open[y + 2 * dy, x + 2 * dx] = True
        stack.append((y + 2 * dy, x + 2 * dx))
    for _ in range(rng.randint(0, 4)):
        row, column = rng.randint(1, rows), rng.randint(1, columns - 1)
        is_open[2 * row - 1, 2 * column] = True
    return is_open


def _steps(is_open: np.ndarray) -> int | None:
    """Moves from the top left block to the bottom right one; None without a way."""
    end = (is_open.shape[0] - 2, is_open.shape[1] - 2)
    distance, queue = {(1, 1): 0}, deque([(1, 1)])
    while queue:
        y, x = queue.popleft()
        for dy, dx in _NEAR:
            if is_open[y + dy, x + dx] and (y + dy, x + dx) not in distance:
                distance[y + dy, x + dx] = distance[y, x] + 1
                queue.append((y + dy, x + dx))
    return distance.get(end)


def maze_path(rng: Random) -> Task:
    """The length of the shortest way through a maze, by breadth-first search."""
    is_open = _maze(rng, rng.randint(4, 8), rng.randint(4, 9))
    if rng.random() < 0.2:  # a wall across: perhaps no way is left
        is_open[2 * rng.randint(1, is_open.shape[0] // 2 - 1), :] = False
    block, steps = rng.randint(4, 7), _steps(is_open)
    picture = np.where(is_open, 230, 40).repeat(block, 0).repeat(block, 1).astype(np.uint8)
    file = rng.choice(("maze.png", "labyrinth.png"))
    search = (
        "from collections import deque\n\n"
        "def shortest(free, start, end):\n"
        "    distance, queue = {start: 0}, deque([start])\n"
        "    while queue:\n"
        "        y, x = queue.popleft()\n"
        "        if (y, x) == end:\n"
        "            return distance[end]\n"
        "        for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):\n"
        "            if free[near] and near not in distance:\n"
        "                distance[near] = distance[y, x] + 1\n"
        "                queue.append(near)\n"
        "    return 'no way'\n\n"
    )
    load = f'{_IMPORTS}grey = np.array(Image.open("{file}").convert("L"))\nfree = grey > 128\nprint(free.shape)\n'
    by_blocks = Step(
        thinking=f"A block is {block} pixels wide, so I take the middle pixel of each and search on the blocks.",
        code=f"blocks = free[{block // 2}::{block}, {block // 2}::{block}]\nprint(blocks.shape)\n"
        "print(shortest(blocks, (1, 1), (blocks.shape[0] - 2, blocks.shape[1] - 2)))",
    )
    first = Step(thinking="Binarise the maze first: light is free, dark is wall.", code=load + search.rstrip())
    if rng.random() < 0.5:
        by_pixels = Step(
            thinking="Binarise the maze, then a breadth-first search from the top left to the bottom right.",
            code=load + search + f"print(shortest(free, ({block}, {block}), "
            f"(free.shape[0] - {block + 1}, free.shape[1] - {block + 1})))",
            misleads=True,
        )
        if steps is not None:
            why = "{output} moves, but those are pixels, whereas the question counts blocks. "
            first, by_blocks = by_pixels, Step(thinking=why + by_blocks.thinking, code=by_blocks.code)
    return Task(
        question=rng.choice(
            (
                f"{file} is a maze: light blocks of {block} x {block} pixels are free, dark ones are walls. How many "
                "moves from block to block does the shortest way take from the top left free block to the bottom "
                "right one?",
                f"Find the shortest route through the maze in {file}, from the free block in the top left corner to "
                f"that in the bottom right corner. Blocks are {block} pixels wide, and a move goes to a block beside, "
                "above or below. How many moves?",
            )
        )
        + " If there is none, say 'no way'.",
        answer="no way" if steps is None else str(steps),
        files={file: png(noisy(rng, picture, 30))},
        steps=(first, by_blocks),
        thinking="The search was exhaustive, so its result stands: {output}.",
        reply="There is no way through the maze." if steps is None else "The shortest way takes {output} moves.",
    )


def board_rows(rng: Random) -> Task:
    """How many squares of a board are dark, or which row has the most."""
    rows, columns, side = rng.randint(4, 9), rng.randint(4, 9), rng.randint(10, 18)
    while True:
        dark = np.array([[rng.random() < 0.45 for _ in range(columns)] for _ in range(rows)])
        counts = sorted(dark.sum(1).tolist())
        if counts[-1] > counts[-2]:
            break
    picture = np.where(dark, 70, 200).repeat(side, 0).repeat(side, 1).astype(np.uint8)
    picture[::side] = picture[:, ::side] = 130
    file, asks_row = rng.choice(("board.png", "grid.png")), rng.random() < 0.5
    centres = f"{side // 2}::{side}"
    read = f"dark = grey[{centres}, {centres}] < 128\nprint(dark.astype(int))\n"
    read += "print(int(dark.sum(axis=1).argmax()) + 1)" if asks_row else "print(int(dark.sum()))"
    why = f"Squares are {side} pixels wide. I sample the middle of each and compare with mid grey."
    steps = [Step(thinking=why, code=f'{_IMPORTS}grey = np.array(Image.open("{file}").convert("L"))\n{read}')]
    if rng.random() < 0.5:
        steps = [
            Step(
                thinking=why,
                code=f'{_IMPORTS}grey = np.array(Image.open("{file}"))\nheight, width = grey.shape\n{read}',
                fails=True,
            ),
            Step(
                thinking="The array has a third axis: the file is RGB. I convert it to grey first.",
                code=f'grey = np.array(Image.open("{file}").convert("L"))\nprint(grey.shape)\n{read}',
            ),
        ]
    what = "Which row has the most dark squares? Count rows from 1 at the top." if asks_row else "How many are dark?"
    return Task(
        question=rng.choice(
            (
                f"The board in {file} consists of dark and light squares, {side} pixels apart. {what}",
                f"{file} is a grid of squares {side} pixels wide, each dark or light. {what}",
            )
        ),
        answer=str(int(dark.sum(1).argmax()) + 1) if asks_row else str(int(dark.sum())),
        files={file: png(np.stack([noisy(rng, picture, 25)] * 3, 2))},
        steps=tuple(steps),
        thinking="The matrix shows it: {output}.",
        reply="Row {output} has the most dark squares." if asks_row else "{output} squares are dark.",
    )


def bar_chart(rng: Random) -> Task:
    """A value read off a bar chart by its grid lines."""
    unit, step = rng.choice((2, 3, 4)), rng.choice((5, 10))
    values = rng.sample(range(3, 41), rng.randint(3, 6))
    height, bottom = 42 * unit + 24, 42 * unit + 11
    image = Image.new("RGB", (20 + 30 * len(values), height), (245, 245, 245))
    draw = ImageDraw.Draw(image)
    for level in range(step, 42, step):
        draw.line((0, bottom - level * unit, image.width, bottom - level * unit), fill=(200, 200, 200))
    colour = rng.choice(sorted(PALETTE))
    for i, value in enumerate(values):
        left = 14 + 30 * i
        draw.rectangle((left, bottom - value * unit, left + 17, bottom - 1), fill=PALETTE[colour])
    draw.line((0, bottom, image.width, bottom), fill=(0, 0, 0))
    file = rng.choice(("chart.png", "bars.png"))
    what, expression, answer = rng.choice(
        (
            ("the value of the tallest bar", "max(values)", max(values)),
            ("the sum of all bars", "sum(values)", sum(values)),
            ("the difference between the tallest and the shortest bar", "max(values) - min(values)",
             max(values) - min(values)),
            ("the value of the second bar from the left", "values[1]", values[1]),
        )
    )  # fmt: skip
    lines = Step(
        thinking="The scale first: in the leftmost column there are no bars, only the grid lines and the axis.",
        code=f'{_IMPORTS}pixels = np.array(Image.open("{file}").convert("RGB")).astype(int)\n'
        "column = pixels[:, 2].sum(1)\naxis = int(np.nonzero(column < 300)[0][-1])\n"
        "grid = np.nonzero((column > 300) & (column < 680))[0]\nprint(axis, grid.tolist())\n"
        f"unit = int(grid[-1] - grid[-2]) / {step}\nprint(unit)",
    )
    measure = Step(
        thinking="{output} pixels are one unit. Bars are what has a strong colour: I cut the columns into runs and "
        "take each run's height above the axis.",
        code="strong = pixels.max(2) - pixels.min(2) > 60\ncolumns = strong.any(0)\n"
        "starts = np.nonzero(columns & ~np.roll(columns, 1))[0]\n"
        "values = [round((axis - int(np.nonzero(strong[:, x])[0][0])) / unit) for x in starts]\n"
        f"print(values)\nprint({expression})",
    )
    return Task(
        question=rng.choice(
            (
                f"In the bar chart {file} the grid lines are {step} units apart. What is {what}?",
                f"Read {what} off {file}. Its grid lines stand for steps of {step}, and the black axis for 0.",
            )
        ),
        answer=str(answer),
        files={file: png(np.array(image))},
        steps=(lines, measure),
        thinking=f"With the values of all bars known, {what} is {{output}}.",
        reply=rng.choice(("It is {output}.", f"{what[0].upper()}{what[1:]} is {{output}}.")),
    )


def clock_time(rng: Random) -> Task:
    """The time that the hands of a clock show."""
    while True:
        hour, minute = rng.randrange(12), rng.randrange(60)
        apart = abs((hour * 60 + minute) / 2 - minute * 6) % 360
        if min(apart, 360 - apart) > 15:  # neither hand hides the other
            break
    radius, (short, long) = rng.randint(70, 95), rng.sample(("red", "blue", "green", "purple"), 2)
    centre = radius + 6
    image = Image.new("RGB", (2 * centre + 1, 2 * centre + 1), (240, 240, 240))
    draw = ImageDraw.Draw(image)
    draw.ellipse((6, 6, 2 * radius + 6, 2 * radius + 6), fill=(255, 255, 255), outline=(0, 0, 0))
    for colour, length, turn in ((short, 0.5, (hour + minute / 60) / 12), (long, 0.85, minute / 60)):
        tip = (
            centre + length * radius * math.sin(math.tau * turn),
            centre - length * radius * math.cos(math.tau * turn),
        )
        draw.line((centre, centre, *tip), fill=PALETTE[colour], width=3)
    draw.ellipse((centre - 3, centre - 3, centre + 3, centre + 3), fill=(0, 0, 0))
    file = rng.choice(("clock.png", "dial.png"))
    angle = (
        f'{_IMPORTS}import math\n\nhsv = np.array(Image.open("{file}").convert("HSV")).astype(int)\n'
        "height, width = hsv.shape[:2]\ncy, cx = height // 2, width // 2\n\n"
        "def angle(hue):\n"
        '    """Degrees clockwise from 12 of the hand of that hue."""\n'
        "    off = np.abs(hsv[..., 0] - hue)\n"
        "    ys, xs = np.nonzero((np.minimum(off, 256 - off) < 10) & (hsv[..., 1] > 90))\n"
        "    return math.degrees(math.atan2((xs - cx).mean(), SIGN(ys - cy).mean())) % 360\n\n"
        f"hour_hand, minute_hand = angle({hue(short)}), angle({hue(long)})\n"
        "print(round(hour_hand, 1), round(minute_hand, 1))\n"
    )
    tell = (
        "minute = round(minute_hand / 6) % 60\nhour = round(hour_hand / 30 - minute / 60) % 12\n"
        "print(f'{hour or 12}:{minute:02}')"
    )
    right = angle.replace("SIGN", "-")
    why = (
        f"Two hands, two hues: {short} around {hue(short)} and {long} around {hue(long)}. I take the mean direction of "
    )
    why += "each hand's pixels from the centre, as an angle from 12 o'clock."
    steps = [Step(thinking=why, code=right + tell)]
    if rng.random() < 0.4 and minute not in (15, 45):
        steps = [
            Step(thinking=why, code=angle.replace("SIGN", "") + tell, misleads=True),
            Step(
                thinking="{output} cannot be trusted: rows grow downwards, so that 12 o'clock is at -y, and I measured "
                "from the bottom. The sign of y must be turned.",
                code="def angle(hue):\n" + right.split("def angle(hue):\n")[1] + tell,
            ),
        ]
    return Task(
        question=rng.choice(
            (
                f"What time does the clock in {file} show? The hour hand is {short}, the minute hand {long}.",
                f"Read the clock in {file} (short {short} hand: hours, long {long} hand: minutes).",
            )
        )
        + " Answer as h:mm, from 1:00 to 12:59.",
        answer=f"{hour or 12}:{minute:02}",
        files={file: png(np.array(image))},
        steps=tuple(steps),
        thinking="The angles of the two hands agree with {output}.",
        reply=rng.choice(("The clock shows {output}.", "It is {output}.")),
    )
