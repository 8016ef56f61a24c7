"""Scores of texts: hand-calculated values, and properties against slow definitions."""

import string
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25sys.evaluation.scores import (
    anls,
    choice_letter,
    contains_answer,
    edit_distance,
    edit_similarity,
    exact_match,
    multiple_choice,
    relaxed_accuracy,
)

WORDS = st.text(alphabet="ab c\U0001f600é", max_size=9)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1), ("a  cat", "Cat", 1), ("cats", "cat", 0), ("", "cat", 0), ("", "", 1),
        ("A", "B", 0), ("A", "A", 1), ("", "A", 0), ("+", "-", 0), ("+", "+", 1), ("theatre", "atre", 0),
    ],
)  # fmt: skip
def test_exact_match(prediction: str, answer: str, score: float) -> None:
    assert exact_match(prediction, [answer]) == score
    assert exact_match(prediction, ["something else", answer]) == score


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"), ("(b)", "B"), ("C.", "C"), ("B. Paris", "B"), ("**D**", "D"), ("Answer: C", "C"),
        ("Answer: a", "A"),
        ("**Answer:** **D**", "D"), (r"\boxed{\text{A}}", "A"), (r"so the answer is $\boxed{B}$", "B"),
        ("The correct choice is **(B) foo**", "B"), ("I think (C) is right", "C"), ("Answer\uff1aD", "D"),
        ("Answer: A. No, wait.\nThe answer is B.", "B"), ("It is long.\n\nB", "B"), ("Answer: B because of A", "B"),
        ("The final answer is (D).", "D"), ("(A) or (A)?", "A"),
        ("Answer: `B`", "B"), ("Answer: **B**", "B"), ("**Answer:** **`B`**", "B"), ("the answer is `b`.", "B"),
        ("`B`", "B"), ("It is long.\n\n`C`.", "C"), ("Answer: `(C)`", "C"), ("Answer:\n```\nD\n```", "D"),
        ("Answer: `B` because of A", "B"), ("`B` or `C`", None), ("Answer: `A` or `B`", None), ("Answer: `E`", None),
        ("Answer: **A** and **C**", None), ("Answer: `Blue`", None), ("Answer: `a dog`", None),
        ("", None), ("the answer is not B", None), ("The answer is a dog", None), ("A or B", None), ("A, B", None),
        ("the answer is B or C", None), ("Answer: A. The answer is B or C", None), ("The answer is I think so", None),
        ("A dog", None), ("(A) or (B)", None), ("Answer: E", None), ("Answer: Blue", None), (r"\boxed{AB}", None),
        ("Answer: A, then the answer is E", None), ("B'", None), ("answer is B2", None),
    ],
)  # fmt: skip
def test_choice_letter(reply: str, letter: str | None) -> None:
    assert choice_letter(reply, 4) == letter


def test_the_ninth_letter_is_also_a_word() -> None:
    assert choice_letter("The answer is I think so", 10) is None
    assert choice_letter("The answer is I", 10) == choice_letter("The answer is (I) think", 10) == "I"


@given(st.integers(2, 26), st.data())
def test_every_letter_in_every_form(num_choices: int, data: st.DataObject) -> None:
    letter = data.draw(st.sampled_from(string.ascii_uppercase))
    form = data.draw(
        st.sampled_from(
            [
                "{}",
                "({})",
                "`{}`",
                "Answer: `{}`",
                "Answer: **{}**",
                "Answer: {}",
                "the answer is ({}).",
                r"Hence \boxed{{{}}}",
                "**{}**",
            ]
        )
    )
    offered = letter in string.ascii_uppercase[:num_choices]
    assert choice_letter(form.format(letter), num_choices) == (letter if offered else None)
    assert multiple_choice(form.format(letter), letter, num_choices) == offered


@cache
def slow_distance(first: str, second: str) -> int:
    if not first or not second:
        return len(first) + len(second)
    substituted = slow_distance(first[1:], second[1:]) + (first[0] != second[0])
    return min(substituted, slow_distance(first[1:], second) + 1, slow_distance(first, second[1:]) + 1)


@given(WORDS, WORDS, WORDS)
def test_edit_distance(first: str, second: str, third: str) -> None:
    distance = edit_distance(first, second)
    assert distance == slow_distance(first, second) == edit_distance(second, first)
    assert distance <= edit_distance(first, third) + edit_distance(third, second)
    assert (distance == 0) == (first == second)


def test_edit_similarity() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_similarity("kitten", ["sitting"]) == pytest.approx(4 / 7)
    assert edit_similarity("a\n\n b", ["a b"]) == 1
    assert edit_similarity("", ["abc"]) == 0
    assert edit_similarity("", [""]) == 1
    assert edit_similarity("AB", ["ab"]) == 0
    assert edit_similarity("\ud800x", ["\ud800y"]) == 0.5  # a lone surrogate, as bytes that are no UTF-8 decode to


def test_anls() -> None:
    assert anls("Kitten", ["nothing like it", "sitting"]) == pytest.approx(4 / 7)
    assert anls("ab", ["ax"]) == 0  # a distance of exactly one half
    assert anls("abc", ["abx"]) == pytest.approx(2 / 3)
    assert anls("  New  York ", ["new york"]) == 1
    assert anls("", ["x"]) == 0


def test_contains_answer() -> None:
    assert contains_answer("The sign says\nSTOP now", ["stop now"]) == 1
    assert contains_answer("stop", ["stopped"]) == 0
    assert contains_answer(r"$\frac { a } { b }$", [r"\frac{a}{b}"], ignore_spaces=True) == 1
    assert contains_answer("A", ["a"], ignore_spaces=True) == 0
    assert contains_answer("anything", [""]) == 0
    assert contains_answer("", [""]) == 1


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("95", "100", 1), ("105", "100", 1), ("94.99", "100", 0), ("105.01", "100", 0), ("-95", "-100", 1),
        ("95", "-100", 0), ("0", "0", 1), ("0.0", "0", 1), ("0.001", "0", 0), ("12%", "0.12", 1), ("12", "12%", 0),
        ("$1,050", "1000", 1), ("Blue", "blue", 1), ("blue", "red", 0), ("", "5", 0), ("nan", "5", 0), ("inf", "5", 0),
        ("5", "nan", 0), ("2.1", "2", 1), ("5 apples", "5", 0),
    ],
)  # fmt: skip
def test_relaxed_accuracy(prediction: str, answer: str, score: float) -> None:
    assert relaxed_accuracy(prediction, [answer]) == score


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_relaxed_accuracy_is_a_band_of_five_percent(got: int, wanted: int) -> None:
    assert relaxed_accuracy(str(got), [str(wanted)]) == (20 * abs(got - wanted) <= abs(wanted))


@pytest.mark.parametrize("score", [exact_match, edit_similarity, anls, contains_answer, relaxed_accuracy])
def test_texts_are_scored_between_0_and_1_and_answers_are_a_list(score) -> None:
    for answers in ([], "text"):
        with pytest.raises(ValueError, match="answers"):
            score("text", answers)

    @given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=3))
    def check(prediction: str, answers: list[str]) -> None:
        assert 0 <= score(prediction, answers) <= 1
        assert score(answers[-1], answers) == 1

    check()
