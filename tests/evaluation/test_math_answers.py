"""Values out of replies: hand-made pairs, and fractions written in every way."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25sys.evaluation.matches import markdown_table, read_boxes
from k25sys.evaluation.math_answers import final_answer, is_value, math_equal, numeric_equal
from k25sys.evaluation.open_answers import open_match
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
    (r"\boxed{m+n=73}", "73"), (r"Answer: $m+n=\frac{7}{2}$", "3.5"), (r"\boxed{2+2=3+1=4}", "4"),
    (r"\boxed{\sum_{k=1}^{3} k = 6}", "6"), (r"\boxed{3!=6}", "6"), ("f(2)=9", "9"),
    (r"\boxed{5!}", "120"), (r"\boxed{0!}", "1"), (r"\boxed{-3!^2}", "-36"), (r"\frac{10!}{3!7!}", "120"),
    (r"\boxed{2^{3!}}", "64"), ("500!/499!", "500"), ("500!", "500*499!"), ("The answer is 5!", "5"),
    ("The answer is 5!", "120"),
    (r"\boxed{\binom{5}{2}}", "10"), (r"3\dbinom52", "30"), (r"\binom{2025}{2}", "2049300"), (r"\binom23", "0"),
    (r"\binom{4000}{2000}", r"\frac{4000}{2000}\binom{3999}{1999}"),
    (r"\boxed{\ln 2}", r"\ln(2)"), (r"\ln\frac12", r"-\ln{2}"), (r"\pi\ln 2", r"\ln\left(2\right)\pi"),
    (r"\ln 2^3", r"3\ln 2"), (r"\ln(2)^2", r"(\ln 2)(\ln 2)"), (r"\ln 1", "0"), (r"\ln\ln 3", r"\ln(\ln 3)"),
]  # fmt: skip
DIFFERENT = [
    ("5 cm", "5 m"), (r"\boxed{5\text{ cm}^2}", r"5\text{ cm}^3"), (r"\boxed{3x}", "3"), (r"\boxed{12", "12"),
    (r"\boxed{1} and \boxed{12", "1"), ("nan", "nan"), ("inf", "inf"), ("", "0"), ("", ""), ("10^{10^{10}}", "1"),
    ("1e999", "1"), ("1/0", "0"), (r"\sqrt{-1}", "1"), ("1.2.3", "1.2"), ("12,34", "1234"), ("0.333", "1/3"),
    ("12", "2"), (r"\boxed{" + "(" * 400 + "1" + ")" * 400 + "}", "1"), ("9" * 5000, "9"),
    ("12\nunsure", "12"), (r"\boxed{}", "0"), ("-5", "5"), ("0^{-1}", "0"), ("2^3^2", "64"), ("that is 3x", "3"),
    (r"\boxed{73=m+n}", "73"), (r"\boxed{a=1, b=2}", "2"), (r"\boxed{a=1 \text{ or } a=2}", "2"),
    (r"\boxed{x <= 5}", "5"), (r"\boxed{x != 5}", "5"), (r"\boxed{x \not= 5}", "5"), (r"\boxed{\text{(x=5)}}", "5"),
    (r"\boxed{5!}", "5"), (r"\boxed{3!!}", "720"), (r"\boxed{3!!}", "3"), (r"\boxed{2^3!}", "64"),
    (r"\boxed{(-1)!}", "1"), (r"\boxed{(1/2)!}", "1"), ("501!", "501*500!"), ("9999999!", "1"), ("500!*500!", "1"),
    (r"\binom{4001}{1}", "4001"), (r"\binom{-1}{1}", "-1"), (r"\binom{9}{10000000}", "0"), (r"\boxed{\ln 0}", "0"),
    (r"\ln 2\pi", r"(\ln 2)\pi"), (r"\ln 2\pi", r"\ln(2\pi)"), (r"\ln^2 2", r"\ln 2"), (r"\ln", "0"),
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
        (r"\boxed{1 \text{ or } 2}", "1, 2", True), ("1, 2", r"2 \text{ or } 1", True),
        (r"\boxed{x=3, x=4, \text{ and } x = 5}", "3, 4, 5", True), ("Answer: 1 or 2", "1, 2", True),
        (r"\boxed{1 \text{ or } 2}", "1, 3", False), (r"\boxed{(1,2) \text{ or } (3,4)}", "(3,4), (1,2)", True),
        (r"\boxed{(1,2) \text{ or } (3,4)}", "(2,1), (3,4)", False), ("order", "der", False), ("and", "and", True),
        (r"\boxed{(a,b)=(1,2)}", "(1,2)", True), (r"\boxed{(a,b)=(1,2)}", "(2,1)", False),
        (r"\boxed{f(x)=x^2}", "x^2", True), (r"\boxed{f(x)=x^2}", "f(x) = x^2", True), (r"\boxed{x^2=y}", "x^2", False),
        (r"\boxed{f(x)=x \text{ or } f(x)=x^2}", "x, x^2", True),
        (r"\boxed{\ln(x)}", r"\ln x", True), (r"\boxed{\ln(x+1)}", r"\ln x+1", False),
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


@given(st.text(alphabet="0123456789.,/^{}()[]\\ -+*%$=! eansw:boxdfrctqlim\n|`", max_size=60))
def test_no_reply_is_an_error(reply: str) -> None:
    assert numeric_equal(reply, "7") in (True, False)
    assert math_equal(reply, "(7, x)") in (True, False)
    assert is_value(reply) in (True, False)
    assert choice_letter(reply, 4) in (None, "A", "B", "C", "D")
    open_match(reply, ["x", "7"])
    markdown_table(reply)
    read_boxes(reply)


def test_expressions_as_long_as_are_read_end() -> None:
    """Exact values are bounded in size, and nesting in depth."""
    for piece in (
        r"\ln",
        r"\ln ",
        r"\binom",
        r"\binom9",
        r"\sqrt",
        "500!*",
        "500!/499!*",
        "1/500!+1/499!+",
        "2^3!",
        "=",
        "!",
    ):
        for last in ("2", ""):
            reply = piece * ((1000 - len(last)) // len(piece)) + last
            assert not numeric_equal(rf"\boxed{{{reply}}}", "7")


@pytest.mark.parametrize(
    "piece",
    [
        "answer",
        "answer ",
        "answer___",
        " ",
        "\\boxed{",
        "{",
        ",111",
        "1",
        "[1,",
        "|-",
        "|",
        "(",
        "(A) or ",
        "A ",
        "`",
        "=",
        "x=",
        "5!",
        "!",
        "\\ln",
        "\\ln(",
        "\\text{ or } ",
        " or",
        ", ",
    ],
)
def test_degenerate_replies_end(piece: str) -> None:
    """Quadratic reading of these would take hours."""
    reply = piece * (200_000 // len(piece)) + "1"
    assert not numeric_equal(reply, "7")
    assert not math_equal(reply, "(7, x)")
    assert choice_letter(reply, 4) in (None, "A")
    assert not open_match(reply, ["q"])
    assert markdown_table(reply) == []
    read_boxes(reply)
