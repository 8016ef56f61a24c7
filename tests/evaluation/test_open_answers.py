"""MMMU's rule for open answers: by hand, after its published evaluation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25sys.evaluation.open_answers import MMMU_CUES, VIDEO_MMMU_CUES, open_match


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("Answer: 1.333", "1.33", 1), ("Answer: 1.336", "1.33", 0), ("1.33", "1.334", 1), ("1,234", "1234", 1),
        ("about 1,234 of them", "1234", 1), ("-3.001 V", "-3", 1), ("it is 1.2e3 then", "1200", 1), ("3", "-3", 0),
        ("It is 12,34", "12", 0), ("$5", "5", 1), ("x2", "2", 1), ("H2O", "2", 0), ("nan", "inf", 0),
        (r"Answer: $\frac{4}{3}$", "1.33", 1),
        ("the mitral valve stenosis", "mitral valve", 1), ("Answer: **the Mitral Valve**", "mitral  valve", 0),
        ("Answer: **the Mitral Valve**", "MITRAL valve ", 1), ("the valve", "mitral valve", 0),
        (r"\boxed{\text{mitral valve}}", "mitral valve", 1), ("", "valve", 0), (r"\boxed{valve", "valve", 0),
        ("a cab here", "b", 1), ("cabs", "b", 0), ("the b side", "b", 1), ("b", "B", 1), ("Answer: b", "b", 1),
    ],
)  # fmt: skip
def test_numbers_to_two_decimals_and_texts_within_phrases(reply: str, answer: str, score: float) -> None:
    assert open_match(reply, [answer]) == score
    assert open_match(reply, ["no such answer", answer]) == score


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("The first is 5, so the sum is 7", "7", 1), ("The first is 5, so the sum is 7", "5", 0),
        ("The first is 5, so the sum is 7", "sum", 0),
        ("2 + 5 = 7", "7", 1), ("2 + 5 = 7", "2", 0), ("2 + 5 = 7 m\nas asked", "2", 1),  # "=" in the last line alone
        ("a valve is here\nand so a pump", "pump", 1), ("a valve is here\nand so a pump", "here", 1),
        ("a valve is here\nand so a pump", "valve", 0), ("It is ?\nnothing with a cue", "cue", 1),
        ("The number is 4 so \nI think", "4", 1), ("a valve is here\nno cue", "no cue", 0),
        ("It could be 3.\nHence the answer is 4", "3", 0), ("It could be 3.\nHence 4", "3", 1),  # stated, and not
        ("It is 3\nAnswer: 4", "3", 0), (r"It is 3, so \boxed{4}", "3", 0), ("The answer is 5, so x is 7", "5", 0),
    ],
)  # fmt: skip
def test_key_phrases(reply: str, answer: str, score: float) -> None:
    assert open_match(reply, [answer]) == score


def test_videos_have_further_cues() -> None:
    reply = "In 2 of them 3 shapes are found to be blue, 4 has not, adds up to seven"
    assert open_match(reply, ["3"], MMMU_CUES) == 1
    assert open_match(reply, ["3"], VIDEO_MMMU_CUES) == 0
    assert open_match(reply, ["seven"], VIDEO_MMMU_CUES) == 1


@pytest.mark.parametrize("piece", ["1", "1,111", ",111", "1e", "1.", "-", "so ", "=", "so \n", "a", ".1"])
def test_long_replies_end(piece: str) -> None:
    """Quadratic reading of these would take minutes."""
    for last in ("", "x", "q 7 "):
        reply = piece * (200_000 // len(piece)) + last
        assert open_match(reply, ["no such text"]) == 0


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=9).filter(str.strip), min_size=1, max_size=3))
def test_scores_are_0_or_1(reply: str, answers: list[str]) -> None:
    assert open_match(reply, answers) in (0, 1)


@given(st.decimals(-10_000, 10_000, places=2), st.integers(-4, 4))
def test_a_third_decimal_does_not_count(value, further: int) -> None:
    sign = "-" if value < 0 else ""
    written = f"{sign}{abs(value)}{abs(further)}"
    assert open_match(f"Answer: {written}", [str(value)]) == 1
    assert open_match(f"Answer: {value + 1}", [str(value)]) == 0


def test_answers_are_a_list() -> None:
    for answers in ([], "text"):
        with pytest.raises(ValueError, match="open_match: answers"):
            open_match("text", answers)
