"""F1 of tables and boxes: hand-calculated values, and matchings against all assignments."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25sys.evaluation.matches import box_f1, iou, is_box, markdown_table, read_boxes, table_f1

ANSWER = [
    {"City": "Rome", "Country": "Italy", "People": "2.8"},
    {"City": "Oslo", "Country": "Norway", "People": "0.7"},
]


def table(*rows: tuple[str, ...], header: tuple[str, ...] = ("City", "Country", "People")) -> list[dict[str, str]]:
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_items_and_rows_by_hand() -> None:
    prediction = table(("rome ", "italy", "3.0"), ("Oslo", "Norway", "0.7"), ("Bern", "Switzerland", "0.1"))
    score = table_f1(prediction, ANSWER, ["City"])
    assert score.item_f1 == pytest.approx(2 * 5 / (9 + 6))  # 2 of Rome's and 3 of Oslo's, of 9 and 6 items
    assert score.row_f1 == pytest.approx(2 * 1 / (3 + 2))


@pytest.mark.parametrize(
    ("prediction", "item_f1", "row_f1"),
    [
        (ANSWER, 1, 1),
        (ANSWER[::-1], 1, 1),
        ([*ANSWER, *ANSWER], 1, 1),
        ([], 0, 0),
        (table(("Rome", "Italy"), header=("City", "Country")), 0, 0),
        ([{**ANSWER[0], "More": "x"}], 0, 0),
        (table(("Oslo", "Sweden", "0.7"), ("Oslo", "Norway", "0.7")), 2 * 2 / 9, 0),
        (table(("", "", "")), 0, 0),
    ],
)
def test_tables(prediction: list[dict[str, str]], item_f1: float, row_f1: float) -> None:
    assert table_f1(prediction, ANSWER, ["City"]) == pytest.approx((item_f1, row_f1))


def test_tables_that_cannot_be_scored() -> None:
    for keys in ([], ["Mayor"]):
        with pytest.raises(ValueError, match="table_f1: keys"):
            table_f1(ANSWER, ANSWER, keys)
    assert table_f1([], [], ["City"]) == (1, 1)
    assert table_f1(ANSWER, [], ["City"]) == (0, 0)


def test_markdown_table() -> None:
    text = "first\n|x|\n|-|\n|1|\n\nthen:\n\n| City | Country |\n|:---|---:|\n| Rome | It\\|aly |\n| Oslo |\n\nend"
    assert markdown_table(text) == table(("Rome", "It|aly"), ("Oslo", ""), header=("City", "Country"))
    assert markdown_table("a | b\n--- | ---\n1 | 2") == [{"a": "1", "b": "2"}]
    assert markdown_table("no table\n---\n") == []


def test_iou() -> None:
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0
    assert iou((0, 0, 4, 3), (0, 0, 4, 3)) == 1


def test_boxes_by_hand() -> None:
    answers = [[0, 0, 10, 10], [20, 20, 30, 30]]
    assert box_f1([[0, 0, 10, 10], [100, 100, 110, 110], [20, 20, 30, 30]], answers) == pytest.approx(4 / 5)
    assert box_f1([[0, 0, 10, 5]], answers) == pytest.approx(2 / 3)  # IoU of exactly one half
    assert box_f1([[0, 0, 10, 4.99]], answers) == 0
    assert box_f1([[0, 0, 10, 10]] * 3, answers) == pytest.approx(2 / 5)  # a repeated box is right once
    assert box_f1([], []) == 1
    assert box_f1([], answers) == box_f1(answers, []) == 0
    assert box_f1([[math.nan, 0, 10, 10], [0, 0, 10], [10, 10, 0, 0], [0, 0, math.inf, 1], "text"], answers) == 0  # type: ignore[list-item]


def test_a_greedy_matching_would_miss_a_pair() -> None:
    answers = [[0, 0, 10, 10], [0, 4, 10, 14]]
    between, first = [0, 2, 10, 12], [0, -3, 10, 7]
    assert min(iou((0, 2, 10, 12), tuple(map(float, answer))) for answer in answers) >= 0.5  # type: ignore[arg-type]
    for order in itertools.permutations([between, first]):
        assert box_f1(order, answers) == 1


BOXES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 4), st.integers(1, 4)).map(
        lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
    ),
    max_size=5,
)


@given(BOXES, BOXES, st.sampled_from([0.2, 0.5, 0.8]))
def test_the_matching_is_the_largest(
    predictions: list[list[float]], answers: list[list[float]], threshold: float
) -> None:
    few, many = sorted((predictions, answers), key=len)
    most = max(
        sum(iou(tuple(a), tuple(b)) >= threshold for a, b in zip(few, chosen, strict=False))  # type: ignore[arg-type]
        for chosen in itertools.permutations(many, len(few))
    )
    total = len(predictions) + len(answers)
    assert box_f1(predictions, answers, threshold) == pytest.approx(2 * most / total if total else 1)


def test_bad_answers_and_thresholds() -> None:
    for box in ([0, 0, 0, 1], [0, 0, math.nan, 1], [0, 1], [0, 0, 1, True], [0, 0, 10**400, 1]):
        assert not is_box(box)
        with pytest.raises(ValueError, match=r"box_f1: answers\[0\]"):
            box_f1([], [box])
    for threshold in (0, 1.1, math.nan):
        with pytest.raises(ValueError, match="threshold"):
            box_f1([], [], threshold)


def test_read_boxes() -> None:
    reply = 'Here: ```json\n[{"bbox_2d": [1, 2, 3.5, 4e1]}, [-1,.5 , 6., 7]]``` and [1, 2, 3] and [1,2,3,4,5]'
    assert read_boxes(reply) == [[1, 2, 3.5, 40], [-1, 0.5, 6, 7]]
    assert read_boxes("none [nan, 0, 1, 1]") == []
