"""F1 of sets: items and rows of tables, and boxes. Scores 0 to 1; two empty sets are the same, 1."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from k25sys.errors import ArgumentValueError, message
from k25sys.evaluation.scores import exact_match

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 with x0 < x1 and y0 < y1."""
Table = Sequence[Mapping[str, str]]
"""Rows: column to cell."""

_RULE = re.compile(r"\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*")
_BAR = re.compile(r"(?<!\\)\|")


class TableScore(NamedTuple):
    """How much of a table is right."""

    item_f1: float
    row_f1: float


def table_f1(
    prediction: Table, answer: Table, keys: Sequence[str], *, equal: Callable[[str, str], bool] | None = None
) -> TableScore:
    """F1 over cells and over whole rows; rows are paired by the cells of their key columns.

    An item is right in a row whose key the answer has, where its cell is the answer's; a row where all its cells are.
    Of rows with one key the first counts, on both sides. A prediction whose columns are not the answer's scores 0.
    Names of columns and keys are compared without case and white space. Source: WideSearch (arXiv 2508.07999).

    Args:
        prediction: rows; a cell that is missing is empty.
        answer: rows, all with the same columns.
        keys: the columns that name a row.
        equal: of two cells; normalised exact match by default.

    Raises:
        ValueError: no keys, or keys or rows of the answer without the columns.
    """
    same = equal or (lambda got, wanted: bool(exact_match(got, [wanted])))
    wanted = [{_folded(name): cell for name, cell in row.items()} for row in answer]
    got = [{_folded(name): cell for name, cell in row.items()} for row in prediction]
    keys = [_folded(key) for key in keys]
    columns = set(wanted[0]) if wanted else set(keys)
    if not keys or not columns.issuperset(keys) or any(set(row) != columns for row in wanted):
        accepted = "one or more, columns of every row of the answer"
        raise ArgumentValueError(message("table_f1", "keys", keys, accepted))
    if not wanted and not got:
        return TableScore(1.0, 1.0)
    if not wanted or not got or set().union(*got) != columns:
        return TableScore(0.0, 0.0)
    wanted_by_key, got_by_key = _by_key(wanted, keys), _by_key(got, keys)
    items = rows = 0
    for key in wanted_by_key.keys() & got_by_key.keys():
        row, truth = got_by_key[key], wanted_by_key[key]
        right = len(keys) + sum(same(row.get(name, ""), truth[name]) for name in columns - set(keys))
        items += right
        rows += right == len(columns)
    num_rows = len(wanted_by_key) + len(got_by_key)
    return TableScore(2 * items / (num_rows * len(columns)), 2 * rows / num_rows)


def markdown_table(text: str) -> list[dict[str, str]]:
    r"""The rows of the last Markdown table in `text`; none where there is none. \| is a bar within a cell.

    A row with fewer cells than the header is filled with empty ones, further cells are dropped.
    """
    lines = text.splitlines()
    for i in range(len(lines) - 1, 0, -1):
        if "-" in lines[i] and _RULE.fullmatch(lines[i][:10_000]) and "|" in lines[i - 1]:
            header, rows = _cells(lines[i - 1]), []
            for line in lines[i + 1 :]:
                if "|" not in line:
                    break
                cells = _cells(line) + [""] * len(header)
                rows.append(dict(zip(header, cells, strict=False)))
            return rows
    return []


def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(first) + _area(second) - shared)


def box_f1(predictions: Sequence[Sequence[float]], answers: Sequence[Sequence[float]], threshold: float = 0.5) -> float:
    """F1 of boxes: 2 pairs / (predictions + answers), a pair being two boxes with IoU >= threshold, each used once.

    Pairs are a maximum matching. The greedy one of detection benchmarks takes predictions by falling confidence; a
    model that writes boxes as text gives none, and greedy in written order would make the score depend on the order and
    miss pairs. A predicted box that is none (NaN, infinite, no area) stays unpaired; so do repeated boxes but one.
    Source: PASCAL VOC's criterion (IoU >= 0.5). The report's reward for grounding weighs pairs by their IoU instead.

    Raises:
        ValueError: an answer that is no box, or a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ArgumentValueError(message("box_f1", "threshold", threshold, "a number in (0, 1]"))
    for i, box in enumerate(answers):
        if not is_box(box):
            raise ArgumentValueError(message("box_f1", f"answers[{i}]", box, "[x0, y0, x1, y1], x0 < x1 and y0 < y1"))
    if not predictions and not answers:
        return 1.0
    pairs = [
        [j for j, answer in enumerate(answers) if iou(_box(box), _box(answer)) >= threshold] if is_box(box) else []
        for box in predictions
    ]
    return 2 * _most_pairs(pairs) / (len(predictions) + len(answers))


def is_box(value: Any) -> bool:
    """Whether `value` is a list of four finite numbers that span an area."""
    if not isinstance(value, (list, tuple)) or len(value) != 4:
        return False
    if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in value):
        return False
    try:
        finite = all(math.isfinite(x) for x in value)
    except OverflowError:
        return False
    return finite and value[0] < value[2] and value[1] < value[3] and math.isfinite(_area(_box(value)))


def read_boxes(reply: str) -> list[list[float]]:
    """The boxes of a reply: each innermost [a, b, c, d] of four numbers, in order. Text around them is ignored."""
    number = r"\s*[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?\s*"
    return [
        [float(part) for part in match[1].split(",")]
        for match in re.finditer(rf"\[({number}(?:,{number}){{3}})\]", reply)
    ]


def _most_pairs(choices: Sequence[Sequence[int]]) -> int:
    """The size of a maximum matching (Kuhn's augmenting paths, without recursion)."""
    owner: dict[int, int] = {}
    for start in range(len(choices)):
        came_from: dict[int, int] = {}  # answer -> the prediction that reached it
        pending, free = [start], None
        while pending and free is None:
            prediction = pending.pop()
            for answer in choices[prediction]:
                if answer in came_from:
                    continue
                came_from[answer] = prediction
                if answer not in owner:
                    free = answer
                    break
                pending.append(owner[answer])
        while free is not None:
            prediction = came_from[free]
            previous = next((answer for answer, who in owner.items() if who == prediction), None)
            owner[free] = prediction
            free = previous
    return len(owner)


def _by_key(rows: Table, keys: Sequence[str]) -> dict[tuple[str, ...], Mapping[str, str]]:
    by_key: dict[tuple[str, ...], Mapping[str, str]] = {}
    for row in rows:
        by_key.setdefault(tuple(_folded(row.get(key, "")) for key in keys), row)
    return by_key


def _folded(text: str) -> str:
    return "".join(text.split()).lower()


def _cells(line: str) -> list[str]:
    line = line.strip().removeprefix("|")
    if line.endswith("|") and not line.endswith(r"\|"):
        line = line[:-1]
    return [cell.strip().replace(r"\|", "|") for cell in _BAR.split(line)]


def _box(values: Sequence[float]) -> Box:
    x0, y0, x1, y1 = (float(x) for x in values)
    return x0, y0, x1, y1


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
