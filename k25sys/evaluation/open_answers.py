"""Open answers as MMMU reads them out of free text, and VideoMMMU after it."""

import math
import re
from collections.abc import Sequence

from k25sys.errors import ArgumentValueError, message
from k25sys.evaluation.math_answers import final_answer, numeric_equal

MMMU_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""What MMMU expects before an answer, within a line."""
VIDEO_MMMU_CUES = (
    *MMMU_CUES, "are ", "in total ", "total ", "identify ", "recognize ", "calculated as ", "counted as ",
    "measured as ", "observed as ", "concluded as ", "found to be ", "equals ", "determined to be ", "number of ",
    "value is ", "adds up to ", "have ", "has ",
)  # fmt: skip
"""What VideoMMMU expects."""

_LONGEST = 1000  # characters of a number
_DECIMALS = 2
# Digits are met at the start of their run alone: from within it no more is found, and a long run would be read anew
# from each of its digits.
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][-+]?\d+"),
    re.compile(r"-?(?:\.\d+|(?<!\d)\d+(?:\.\d+|\b))(?![eE][-+]?\d|[,\d])"),
)


def open_match(reply: str, answers: Sequence[str], cues: Sequence[str] = MMMU_CUES) -> float:
    r"""1 where a key phrase of the reply contains an accepted text, or has a number that is an accepted number.

    A line's key phrase is the shortest of what follows the last of each cue in it, and in the last line also the last
    "="; a reply without one is a key phrase itself. Numbers are compared after rounding to two decimals, texts without
    case; an answer of one character must have a space beside it. Source: MMMU (arXiv 2311.16502), its evaluation.

    Other than there, a reply that states its answer (\boxed{}, "answer is", "answer:") is read from there on alone, so
    that what it says on the way to another answer does not count; and an equal value in another form is right.

    Raises:
        ValueError: no answers, or a text in place of a list.
    """
    if isinstance(answers, str) or not answers:
        raise ArgumentValueError(message("open_match", "answers", repr(answers), "a list of one accepted text or more"))
    if any(numeric_equal(reply, answer, decimals=_DECIMALS) for answer in answers):
        return 1.0
    numbers, texts = _normalised(answers)
    phrases = _key_phrases(final_answer(reply), cues)
    in_phrases = [number for phrase in phrases for pattern in _NUMBERS for number in pattern.findall(phrase)]
    found_numbers, found_texts = _normalised([*phrases, *in_phrases])
    return float(bool(numbers & found_numbers) or any(text in found for text in texts for found in found_texts))


def _normalised(texts: Sequence[str]) -> tuple[set[float], set[str]]:
    """The rounded numbers among texts; the others, lower case."""
    numbers, others = set(), set()
    for text in texts:
        plain = text.strip().lower()
        number = _number(plain)
        if number is not None:
            numbers.add(round(number, _DECIMALS))
        elif len(plain) == 1:  # not within a word
            others.update((f" {plain}", f"{plain} "))
        else:
            others.add(plain)
    return numbers, others


def _number(text: str) -> float | None:
    try:
        value = float(text.replace(",", "")) if len(text) <= _LONGEST else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _key_phrases(text: str, cues: Sequence[str]) -> list[str]:
    text = text.strip().strip(".").lower()
    lines, found = text.split("\n"), []
    for i, line in enumerate(lines):
        shortest = ""
        for cue in (*cues, "=") if i == len(lines) - 1 else cues:
            tail = line.rpartition(cue)[2].strip() if cue in line else None
            if tail is not None and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in ":,.!?;'":
            found.append(shortest)
    return found or [text]
