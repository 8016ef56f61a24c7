"""How a reply to a row is scored, which answers that takes, and what the model is told of the form of its answer."""

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from k25sys.evaluation.matches import box_f1, is_box, markdown_table, read_boxes, table_f1
from k25sys.evaluation.math_answers import final_answer, is_value, math_equal, numeric_equal
from k25sys.evaluation.open_answers import MMMU_CUES, VIDEO_MMMU_CUES, open_match
from k25sys.evaluation.rows import Row
from k25sys.evaluation.scores import (
    anls,
    contains_answer,
    edit_similarity,
    exact_match,
    multiple_choice,
    relaxed_accuracy,
)

_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A way to score replies."""

    metric: str
    """What the mean of its scores is called."""
    answers: str
    """The answers that it takes, in words."""
    score: Callable[[str, Row], float]
    """Of a reply (without thinking), 0 to 1."""
    takes: Callable[[Row], bool]
    """Whether a row has such an answer."""
    instruction: str = ""
    """Put below the prompt."""


def _texts(row: Row) -> list[str]:
    return [row.answer] if isinstance(row.answer, str) else list(row.answer)


def _is_texts(row: Row) -> bool:
    answers = [row.answer] if isinstance(row.answer, str) else row.answer
    return isinstance(answers, list) and bool(answers) and all(isinstance(a, str) and a.strip() for a in answers)


def _is_number(row: Row) -> bool:
    if isinstance(row.answer, bool) or not isinstance(row.answer, (str, int, float)):
        return False
    return is_value(str(row.answer)) and _has_decimals(row)


def _has_decimals(row: Row) -> bool:
    decimals = row.fields.get("decimals")
    return decimals is None or (isinstance(decimals, int) and not isinstance(decimals, bool) and 0 <= decimals <= 12)


def _is_letter(row: Row) -> bool:
    letters = string.ascii_uppercase[: row.num_choices]
    return isinstance(row.answer, str) and len(row.answer) == 1 and row.answer in letters


def _is_open(row: Row) -> bool:
    return _is_letter(row) if row.num_choices else _is_number(row) or (_is_texts(row) and _has_decimals(row))


def _is_table(row: Row) -> bool:
    keys, rows = row.fields.get("keys"), row.answer
    if not isinstance(rows, list) or not rows or not all(isinstance(each, dict) and each for each in rows):
        return False
    if any(set(each) != set(rows[0]) or not all(isinstance(x, str) for x in each.values()) for each in rows):
        return False
    return isinstance(keys, list) and bool(keys) and all(isinstance(key, str) and key in rows[0] for key in keys)


def _number(reply: str, row: Row) -> float:
    return float(numeric_equal(reply, str(row.answer), decimals=row.fields.get("decimals")))


def _choice(reply: str, row: Row) -> float:
    return multiple_choice(reply, row.answer, row.num_choices)


def _open(reply: str, row: Row) -> float:
    if row.num_choices:
        return _choice(reply, row)
    if _is_number(row):
        return _number(reply, row)
    same = any(math_equal(reply, answer) for answer in _texts(row))
    return 1.0 if same else exact_match(final_answer(reply), _texts(row))


def _mmmu(reply: str, row: Row, cues: Sequence[str]) -> float:
    if row.num_choices:
        return _choice(reply, row)
    answers = row.answer if isinstance(row.answer, list) else [str(row.answer)]
    return open_match(reply, answers, cues)


def _braces(reply: str, row: Row) -> float:
    found = _BRACES.findall(reply)
    return exact_match(found[-1], _texts(row)) if found else 0.0


def _contained(reply: str, row: Row) -> float:
    return contains_answer(reply, _texts(row), ignore_spaces=row.fields.get("dataset_name") == "HME100k")


def _table_items(reply: str, row: Row) -> float:
    return table_f1(markdown_table(reply), row.answer, row.fields["keys"]).item_f1


def _table_rows(reply: str, row: Row) -> float:
    return table_f1(markdown_table(reply), row.answer, row.fields["keys"]).row_f1


_A_TEXT = "a text, or a list of accepted texts"
_IN_A_BOX = r"Put your final answer within \boxed{}."
_A_TABLE = 'a list of objects with equal columns and text cells, and a field "keys" with the columns that name a row'
_WITH_TABLE = "Answer with one Markdown table."

NUMBER = Rule(
    metric="accuracy", answers='a number or arithmetic with a value; "decimals" where answers are to be rounded',
    score=_number, takes=_is_number, instruction=_IN_A_BOX,
)  # fmt: skip
MATH = Rule(
    metric="accuracy", answers="a text: a value, a list of values, or LaTeX",
    score=lambda reply, row: float(math_equal(reply, row.answer)),
    takes=lambda row: isinstance(row.answer, str) and bool(row.answer.strip()), instruction=_IN_A_BOX,
)  # fmt: skip
CHOICE = Rule(
    metric="accuracy", answers="the upper-case letter of one of the choices (choices or num_choices)",
    score=_choice, takes=_is_letter, instruction='Finish with a line "Answer: X", X being the letter of your choice.',
)  # fmt: skip
OPEN = Rule(
    metric="accuracy", answers=f"with choices a letter; else a number (with decimals, if any), or {_A_TEXT}",
    score=_open, takes=_is_open, instruction='Finish with a line "Answer: X", X being the letter or value you choose.',
)  # fmt: skip
MMMU = Rule(
    metric="accuracy", answers=f"with choices a letter; else a number, compared to two decimals, or {_A_TEXT}",
    score=lambda reply, row: _mmmu(reply, row, MMMU_CUES), takes=_is_open, instruction=OPEN.instruction,
)  # fmt: skip
VIDEO_MMMU = Rule(
    metric=MMMU.metric, answers=MMMU.answers, score=lambda reply, row: _mmmu(reply, row, VIDEO_MMMU_CUES),
    takes=_is_open, instruction=OPEN.instruction,
)  # fmt: skip
EXACT = Rule(
    metric="exact match", answers=_A_TEXT, score=lambda reply, row: exact_match(final_answer(reply), _texts(row)),
    takes=_is_texts, instruction="Answer with a word, a name or a short phrase.",
)  # fmt: skip
BRACES = Rule(
    metric="exact match", answers=_A_TEXT, score=_braces, takes=_is_texts,
    instruction="Think step by step, and give the final answer in curly braces: {final answer}",
)  # fmt: skip
CONTAINED = Rule(
    metric="contained", answers=f'{_A_TEXT}; "dataset_name": "HME100k" marks formulas',
    score=_contained, takes=_is_texts,
)  # fmt: skip
EDIT = Rule(
    metric="1 - NED", answers=_A_TEXT, score=lambda reply, row: edit_similarity(reply, _texts(row)), takes=_is_texts
)
ANLS = Rule(
    metric="ANLS", answers=_A_TEXT, score=lambda reply, row: anls(reply, _texts(row)), takes=_is_texts,
    instruction="Answer with a word, a number or a short phrase, and nothing else.",
)  # fmt: skip
CHART = Rule(
    metric="relaxed accuracy", answers=_A_TEXT,
    score=lambda reply, row: relaxed_accuracy(final_answer(reply), _texts(row)), takes=_is_texts,
    instruction="Answer with a word or a number, and nothing else.",
)  # fmt: skip
BOXES = Rule(
    metric="F1 at IoU 0.5", answers="a list of boxes [x0, y0, x1, y1]",
    score=lambda reply, row: box_f1(read_boxes(reply), row.answer),
    takes=lambda row: isinstance(row.answer, list) and all(is_box(box) for box in row.answer),
    instruction="Answer with a JSON list of boxes [x0, y0, x1, y1], the empty list for none.",
)  # fmt: skip
TABLE_ITEMS = Rule(metric="item F1", answers=_A_TABLE, score=_table_items, takes=_is_table, instruction=_WITH_TABLE)
TABLE_ROWS = Rule(metric="row F1", answers=_A_TABLE, score=_table_rows, takes=_is_table, instruction=_WITH_TABLE)
