"""Writing to be read: words, lines and small tables in Pillow's built-in font, with a box for every word."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from k25sys.data.drawn.scene import Colour, Drawing, Line, blank, draw_text, load_font, text_extent

if TYPE_CHECKING:
    from PIL import ImageFont

_MIN_FONT = 10
_MARGIN = 2
# Paper and ink.
_COLOURS: tuple[tuple[Colour, Colour], ...] = (
    ((255, 255, 255), (0, 0, 0)), ((250, 245, 230), (30, 40, 110)), ((30, 34, 40), (240, 240, 235)),
    ((255, 255, 255), (170, 20, 30)), ((225, 240, 225), (10, 70, 30)),
)  # fmt: skip
_LIST = (
    "air all and area at bank bed bell bird boat book box bread bridge cake car chair city clay cloud coat cold corn "
    "day deer desk door dust ear earth east egg end eye face farm field fire fish flag food game gate glass gold grass "
    "green hand hat hill home horse house ice in ink iron island jar key king lake lamp land leaf letter light line "
    "lion map market milk moon moth name net night north note oak oil old on open paper path pen plan plum pond queen "
    "rain red river road rock room rope salt sand sea seed ship shop sky snow south star stone sun table tea time to "
    "tower town tree up us valley village wall water wave way west wheel wind wood yard year"
)
_WORDS = tuple(_LIST.split())
_ONSETS, _VOWELS = (*"bcdfghjklmnprstvwz", "br", "ch", "dr", "gl", "pl", "sh", "st", "tr"), "aeiou"


@dataclass
class _Page:
    """What is written so far."""

    picture_HW3: np.ndarray
    owner_HW: np.ndarray
    font: "ImageFont.FreeTypeFont"
    ink: Colour
    words: list[str] = field(default_factory=list)

    def write(self, word: str, x: int, y: int) -> None:
        mask = draw_text(self.picture_HW3, (x, y), word, self.font, self.ink)
        self.words.append(word)
        self.owner_HW[mask] = len(self.words)


def draw_writing(rng: np.random.Generator, size: tuple[int, int]) -> Drawing:
    """A word, some lines or a table, to be read, or one of their words to be found."""
    kind = ("word", "lines", "table")[rng.integers(3)]
    paper, ink = _COLOURS[rng.integers(len(_COLOURS))]
    largest = max(_MIN_FONT, min(size) // (3 if kind == "word" else 5))
    font = load_font(int(rng.integers(_MIN_FONT, largest, endpoint=True)))
    page = _Page(*blank(size, paper), font, ink)
    if kind == "table":
        rows = _write_table(rng, page)
    else:
        rows = _write_lines(rng, page, 1 if kind == "word" else size[0], 1 if kind == "word" else size[1])
    unique = [i for i, word in enumerate(page.words) if page.words.count(word) == 1]
    form = ("plain", "read", "boxes", "find")[rng.integers(4 if unique else 3)]
    joint = " | " if kind == "table" else " "
    text = tuple(Line(joint.join(row)) for row in rows)
    if form == "plain":
        question, answer = (), text
    elif form == "read":
        question, answer = (Line("Read the table." if kind == "table" else "Read the text."),), text
    elif form == "boxes":
        question = (Line("Read every word and give its box."),)
        answer = tuple(Line(f"{word} {{box}}", i) for i, word in enumerate(page.words))
    else:
        target = unique[rng.integers(len(unique))]
        question, answer = (Line(f'Where does it say "{page.words[target]}"?'),), (Line("{box}", target),)
    return Drawing(
        picture_HW3=page.picture_HW3,
        owner_HW=page.owner_HW,
        labels=tuple(page.words),
        question=question,
        answer=answer,
        required=frozenset(range(len(page.words))),
        has_writing=True,
    )


def _word(rng: np.random.Generator) -> str:
    """A word of the list, one that does not exist (it cannot be guessed), or a number."""
    kind = rng.integers(4)
    if kind < 2:
        word = _WORDS[rng.integers(len(_WORDS))]
    elif kind == 2:
        syllables = rng.integers(1, 4)
        word = "".join(_ONSETS[rng.integers(len(_ONSETS))] + _VOWELS[rng.integers(5)] for _ in range(syllables))
    else:
        word = str(rng.integers(10 ** rng.integers(1, 5)))
    return (word, word, word.capitalize(), word.upper())[rng.integers(4)]


def _fitting_word(rng: np.random.Generator, font: "ImageFont.FreeTypeFont", room: int) -> str | None:
    """A word at most `room` pixels wide; None where not even a digit is."""
    for _ in range(8):
        word = _word(rng)
        if text_extent(word, font)[0] <= room:
            return word
    digit = str(rng.integers(10))
    return digit if text_extent(digit, font)[0] <= room else None


def _write_lines(rng: np.random.Generator, page: _Page, most_lines: int, most_words: int) -> list[list[str]]:
    """Lines from a random height on, each of a random number of words."""
    height, width, _ = page.picture_HW3.shape
    pitch = sum(page.font.getmetrics())
    lines = int(rng.integers(1, min(most_lines, (height - _MARGIN) // pitch), endpoint=True))
    top = int(rng.integers(height - lines * pitch, endpoint=True))
    space = max(3, text_extent("n", page.font)[0] // 2 + 1)
    left = _MARGIN + int(rng.integers(width // 4)) * (most_words == 1)
    rows = []
    for line in range(lines):
        x, row = left, []
        for _ in range(min(most_words, int(rng.integers(1, 7)))):
            word = _fitting_word(rng, page.font, width - _MARGIN - x)
            if word is None:
                break
            page.write(word, x, top + line * pitch)
            row.append(word)
            x += text_extent(word, page.font)[0] + space
        rows.append(row)
    return rows


def _write_table(rng: np.random.Generator, page: _Page) -> list[list[str]]:
    """A ruled table; a cell holds one word."""
    height, width, _ = page.picture_HW3.shape
    row_height = sum(page.font.getmetrics()) + 2 * _MARGIN
    least_width = 2 * text_extent("0", page.font)[0] + 2 * _MARGIN + 1
    num_rows = int(rng.integers(1, max(1, min(6, (height - 1) // row_height)), endpoint=True))
    num_columns = int(rng.integers(2, max(2, min(4, (width - 1) // least_width)), endpoint=True))
    column_width = (width - 1) // num_columns
    grey = (128, 128, 128)
    page.picture_HW3[: num_rows * row_height + 1 : row_height, : num_columns * column_width + 1] = grey
    page.picture_HW3[: num_rows * row_height + 1, : num_columns * column_width + 1 : column_width] = grey
    rows = []
    for row in range(num_rows):
        cells = []
        for column in range(num_columns):
            word = _fitting_word(rng, page.font, column_width - 2 * _MARGIN)
            assert word is not None, "a column is two digits wide at least"
            page.write(word, column * column_width + 1 + _MARGIN, row * row_height + 1 + _MARGIN)
            cells.append(word)
        rows.append(cells)
    return rows
