"""Values out of replies: hand-made pairs, and fractions written in every way."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25sys.evaluation.matches import markdown_table, read_boxes
from k25sys.evaluation.math_answers import final_answer, is_value, math_equal, numeric_equal
from k25sys.evaluation.scores import choice_letter

SAME = [
    ("204", "204"), (r"\boxed{025}", "25"), (r"so \boxed{\frac12}", "0.5"), (r"\boxed{\dfrac{1}{2}}", "1/2"),
    ("The answer is 1,234.", "1234"), (r"\boxed{1{,}234}", "1234"), (r"\boxed{2\frac{1}{2}}", "5/2"), ("1 1/2", "1.5"),
    ("-3", "\u22123"), ("-2^2", "-4"), ("(-2)^2", "4"), ("2^{-3}", "1/8"), ("6/2/3", "1"),
    (r"1.2\times10^{3}", "1200"), ("1.2e3", "1200"), (".5", "1/2"), ("5.", "5"), (r"\sqrt{16}", "4"),
    (r"\sqrt[3]{27}", "3"), (r"\boxed{\frac{9\sqrt{23}}{23}}", r"9/\sqrt{23}"), (r"\boxed{2\pi}", r"2\pi"),
    (r"\boxed{5\text{ cm}}", "5"), ("5 cm", "5 cm"), ("5", r"5\text{ cm}^2"), (r"$\boxed{90^\circ}$", "90 degrees"),
    ("42 apples", "42"), (r"50\%", "50"), ("It costs $5.", "5"), (r"\$18.90", "18.9"), ("x = 7", "7"),
    (r"\boxed{\text{1}} no, \boxed{2}", "2"), ("First 3, then\nit is 12", "12"), ("**Answer:** 12", "12"),
    (r"\left(3+4\right)\cdot2", "14"),
]  # fmt: skip
DIFFERENT = [
    ("5 cm", "5 m"), (r"\boxed{5\text{ cm}^2}", r"5\text{ cm}^3"), (r"\boxed{3x}", "3"), (r"\boxed{12", "12"),
    (r"\boxed{1} and \boxed{12", "1"), ("nan", "nan"), ("inf", "inf"), ("", "0"), ("", ""), ("10^{10^{10}}", "1"),
    ("1e999", "1"), ("1/0", "0"), (r"\sqrt{-1}", "1"), ("1.2.3", "1.2"), ("12,34", "1234"), ("0.333", "1/3"),
    ("12", "2"), (r"\boxed{" + "(" * 400 + "1" + ")" * 400 + "}", "1"), ("9" * 5000, "9"),
    ("12\nunsure", "12"), (r"\boxed{}", "0"), ("-5", "5"), ("0^{-1}", "0"), ("2^3^2", "64"), ("that is 3x", "3"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "answer"), SAME)
def test_same_value(reply: str, answer: str) -> None:
    assert numeric_equal(reply, answer)
    assert math_equal(reply, answer)


@pytest.mark.parametrize(("reply", "answer"), DIFFERENT)
def test_different_value(reply: str, answer: str) -> None:
    assert not numeric_equal(reply, answer)


@given(st.fractions(-1000, 1000, max_denominator=64), st.fractions(-1000, 1000, max_denominator=64))
def test_fractions_are_equal_in_every_form_and_only_then(value: Fraction, other: Fraction) -> None:
    n, d = value.numerator, value.denominator
    forms = [f"{n}/{d}", rf"\boxed{{\frac{{{n}}}{{{d}}}}}", f"The answer is {3 * n}/{3 * d}.", f"({n})*{d}^{{-1}}"]
    if 2**6 % d == 0:
        forms.append(f"{float(value):.10f}")
    for form in forms:
        assert numeric_equal(form, str(value))
        assert numeric_equal(form, str(other)) == (value == other)
    assert numeric_equal(f"{abs(n) * 1000:,}", str(abs(n) * 1000))


def test_decimals() -> None:
    assert numeric_equal("3.14159", "3.14", decimals=2)
    assert not numeric_equal("3.15", "3.14", decimals=2)
    assert numeric_equal(r"\boxed{\pi}", "3.1416", decimals=4)


@pytest.mark.parametrize(
    ("reply", "answer", "equal"),
    [
        ("1, 2", "2,1", True), ("(1,2)", "(2,1)", False), (r"(\frac12, 2)", "(0.5, 2)", True),
        ("(1,2]", "[1,2]", False), (r"\boxed{\{1,2\}}", r"\{2, 1\}", True),
        ("1, 1, 2", "1, 2, 2", False), ("1, 2", "1, 2, 3", False),
        ("x^2+1", "x^2 + 1", True), ("x^2+1", "x^2+2", False),
        (r"(3, \pi)", r"\left(3,\pi\right)", True), ("", "", False),
        (r"\boxed{\tfrac{x}{2}}", r"\frac{x}{2}", True), ("(1,2),(3,4)", "(3,4), (1,2)", True),
        ("(1,2),(3,4)", "(2,1),(3,4)", False), ("text", "", False),
    ],
)  # fmt: skip
def test_math_equal(reply: str, answer: str, equal: bool) -> None:
    assert math_equal(reply, answer) is equal


def test_final_answer() -> None:
    assert final_answer(r"\boxed{1} then \boxed{\frac{a}{\{b\}}} end") == r"\frac{a}{\{b\}}"
    assert final_answer("The answer is  **42**.\nThank you") == "42"
    assert final_answer("Answer: x. Answer: y.") in ("x. Answer: y", "y")
    assert final_answer("plain") == "plain"
    assert final_answer(r"\boxed{1} \boxed{2") == ""


@given(st.text(alphabet="0123456789.,/^{}()[]\\ -+*%$ eansw:boxdfrctql\n|", max_size=60))
def test_no_reply_is_an_error(reply: str) -> None:
    assert numeric_equal(reply, "7") in (True, False)
    assert math_equal(reply, "(7, x)") in (True, False)
    assert is_value(reply) in (True, False)
    assert choice_letter(reply, 4) in (None, "A", "B", "C", "D")
    markdown_table(reply)
    read_boxes(reply)


@pytest.mark.parametrize(
    "piece",
    ["answer", "answer ", "answer___", " ", "\\boxed{", "{", ",111", "1", "[1,", "|-", "|", "(", "(A) or ", "A "],
)
def test_degenerate_replies_end(piece: str) -> None:
    """Quadratic reading of these would take hours."""
    reply = piece * (200_000 // len(piece)) + "1"
    assert not numeric_equal(reply, "7")
    assert not math_equal(reply, "(7, x)")
    assert choice_letter(reply, 4) in (None, "A")
    assert markdown_table(reply) == []
    read_boxes(reply)
