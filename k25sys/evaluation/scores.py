"""Scores of one reply against one answer, 0 to 1: words, letters, characters, chart values. Pure functions of text.

Wherever several answers are accepted, the best score counts. An empty reply scores 0 unless an empty answer is among
them.
"""

import re
import string
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from k25sys.errors import ArgumentValueError, message
from k25sys.evaluation.math_answers import plain_number

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
# A letter after "the answer is", "Answer:" or inside \boxed{}, bare or in brackets, bold, in backticks or in \text{}.
# \uff1a is the full-width colon, \u2019 an apostrophe. Repeats are bounded: replies may be degenerate.
_STATED = re.compile(
    r"(?:\b(?i:answer|option|choice)[*_]{0,4}\s{0,4}"
    r"(?:(?i:is|should\ be|would\ be)\b\s{0,4}[*_]{0,4}[:\uff1a]?|[*_]{0,4}[:\uff1a])[*_\s$`]{0,8}"
    r"(?:\\boxed\{)?|\\boxed\{)\s{0,4}(?:\\(?:text|textbf|mathrm|mathbf)\{)?\s{0,4}"
    r"(?P<open>[(\[*`]*)(?P<letter>[A-Za-z])(?![A-Za-z'\u2019\d])"
)
_CLOSING = r"[)\]}*_$`.:]*"
_SECOND_LETTER = re.compile(_CLOSING + r"\s*(?:or\b|and\b|,|/|&)\s*[(\[*_`]{0,8}[A-Z](?![A-Za-z0-9])")
_REST_OF_LINE = re.compile(_CLOSING + r"[ \t]*(?:\n|$)")
_ALONE = re.compile(r"[(\[*`]*(?P<letter>[A-Za-z])(?:[)\]*`]+(?=\s|[.:]|$)|[.:]\s|[.:]?$)")
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")


def normalised(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces.

    Source: Rajpurkar et al., SQuAD (arXiv 1606.05250), evaluation script.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 where the normalised prediction is a normalised answer.

    An answer of nothing but punctuation or articles ("+", "A") is compared by its lower-case characters instead.
    """
    return float(any(_is_same(prediction, answer) for answer in _checked("exact_match", answers)))


def _is_same(prediction: str, answer: str) -> bool:
    wanted = normalised(answer)
    return normalised(prediction) == wanted if wanted else prediction.strip().lower() == answer.strip().lower()


def choice_letter(reply: str, num_choices: int) -> str | None:
    r"""The letter that a reply chooses, upper case; None where it does not choose exactly one of the letters offered.

    The last of "the answer is X", "Answer: X" and \boxed{X} counts; else a last or first line "X", "(X)", "X. ..." or
    "X: ..."; else the only letter in brackets. "X or Y" chooses nothing. Source: the patterns of GPQA (arXiv
    2311.12022) and MMLU-Pro (arXiv 2406.01574); other than in theirs, no letter is drawn at random or picked from prose
    where none is stated: such a reply is wrong.

    Args:
        reply: any text.
        num_choices: letters offered, from A on; 2 to 26.
    """
    if not 2 <= num_choices <= 26:
        raise ArgumentValueError(message("choice_letter", "num_choices", num_choices, "2 to 26"))
    offered = string.ascii_uppercase[:num_choices]
    stated = [match for match in _STATED.finditer(reply) if _is_choice(match, reply)]
    if stated:
        last = stated[-1]
        letter = last["letter"].upper()
        return letter if letter in offered and not _SECOND_LETTER.match(reply, last.end()) else None
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    for line in [*lines[-1:], *lines[:1]]:
        match = _ALONE.match(line)
        if match and match["letter"].upper() in offered and not _SECOND_LETTER.match(line, match.end("letter")):
            return match["letter"].upper()
    bracketed = set(_BRACKETED.findall(reply))
    return bracketed.pop() if len(bracketed) == 1 and bracketed <= set(offered) else None


def _is_choice(match: re.Match[str], reply: str) -> bool:
    """Whether the letter is a choice, not a word: "a dog", "I think"."""
    ends_line = bool(_REST_OF_LINE.match(reply, match.end()))
    if match["letter"] == "I" and not match["open"]:
        return ends_line or not reply[match.end() : match.end() + 2].strip(" ").islower()
    return match["letter"].isupper() or bool(match["open"]) or ends_line


def multiple_choice(reply: str, answer: str, num_choices: int) -> float:
    """1 where the reply chooses the letter `answer`. See `choice_letter`."""
    return float(choice_letter(reply, num_choices) == answer.upper())


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and substitutions of Unicode characters.

    O(n m), one row at a time: a page of 5,000 characters takes a fraction of a second.
    """
    if len(first) < len(second):
        first, second = second, first
    if not second:
        return len(first)
    columns = np.frombuffer(second.encode("utf-32-le", "surrogatepass"), np.uint32)
    steps = np.arange(len(second) + 1)
    row = steps
    for i, character in enumerate(first, 1):
        changed = np.minimum(row[1:] + 1, row[:-1] + (columns != ord(character)))
        # An insertion adds 1 a column: min over j' <= j of row[j'] + (j - j') is a running minimum of row - j.
        row = np.minimum.accumulate(np.concatenate(([i], changed)) - steps) + steps
    return int(row[-1])


def edit_similarity(prediction: str, answers: Sequence[str]) -> float:
    """1 - edit distance / length of the longer text: OCR's 1-NED, and OmniDocBench's as the report takes it.

    Runs of white space count as one space; case counts. Two empty texts are the same: 1. Source: spec 9 (report,
    appendix E) and OmniDocBench (arXiv 2412.07626).
    """
    texts = [" ".join(answer.split()) for answer in _checked("edit_similarity", answers)]
    prediction = " ".join(prediction.split())
    return max(_similarity(prediction, text) for text in texts)


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Average normalised Levenshtein similarity of one question: similarities below `threshold` count as 0.

    Case and white space do not count. Source: Biten et al., Scene Text VQA (arXiv 1905.13648), equation 1. A
    distance of exactly `threshold` counts as 0, as there (NL < tau).
    """
    texts = [" ".join(answer.lower().split()) for answer in _checked("anls", answers)]
    prediction = " ".join(prediction.lower().split())
    best = max(_similarity(prediction, text) for text in texts)
    return best if 1 - best < threshold else 0.0


def _similarity(first: str, second: str) -> float:
    longest = max(len(first), len(second))
    return 1.0 - edit_distance(first, second) / longest if longest else 1.0


def contains_answer(prediction: str, answers: Sequence[str], *, ignore_spaces: bool = False) -> float:
    """1 where an answer occurs in the prediction, case aside; with `ignore_spaces`, white space aside and case counts.

    An empty answer occurs only in an empty prediction. Source: OCRBench (arXiv 2305.07895); `ignore_spaces` is its rule
    for formulas (HME100k).
    """

    def folded(text: str) -> str:
        return "".join(text.split()) if ignore_spaces else " ".join(text.lower().split())

    text = folded(prediction)
    wanted = [folded(answer) for answer in _checked("contains_answer", answers)]
    return float(any(answer in text if answer else not text for answer in wanted))


def relaxed_accuracy(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """1 where a chart's value is within 5 % of a number, or is the text that is asked for, case aside.

    "12%" is 0.12, on both sides. An answer of 0 allows nothing but 0. Source: Masry et al., ChartQA (arXiv 2203.10244),
    after PlotQA. The bound is compared in fractions, so that a prediction on it is within.
    """
    return float(any(_is_near(prediction, answer, tolerance) for answer in _checked("relaxed_accuracy", answers)))


def _is_near(prediction: str, answer: str, tolerance: float) -> bool:
    value, wanted = plain_number(prediction), plain_number(answer)
    if value is None or wanted is None:
        return prediction.strip().lower() == answer.strip().lower()
    return abs(value - wanted) <= Fraction(str(tolerance)) * abs(wanted)


def _checked(op: str, answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str) or not answers:
        raise ArgumentValueError(message(op, "answers", repr(answers), "a list of one accepted text or more"))
    return answers
