"""avg@k and pass@k against hand-calculated values and against counting."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25sys.evaluation.estimates import average_at_k, pass_at_k


def test_average_by_hand() -> None:
    average = average_at_k([[1, 0], [1, 1], [0, 0]])
    assert average.mean == 0.5
    assert average.standard_error == pytest.approx(math.sqrt(0.5 / 2 / 3))  # of the means 1/2, 1 and 0
    assert (average.num_problems, average.num_samples) == (3, 2)


def test_a_single_problem_has_no_standard_error() -> None:
    assert average_at_k([[1.0, 0.0]]).standard_error is None


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=2, max_size=8))
def test_average_is_the_mean_whatever_the_order(scores: list[list[float]]) -> None:
    average, other = average_at_k(scores), average_at_k([row[::-1] for row in scores[::-1]])
    assert average.mean == pytest.approx(float(sum(map(Fraction, itertools.chain(*scores))) / (3 * len(scores))))
    assert average.standard_error == pytest.approx(other.standard_error)


@pytest.mark.parametrize(
    "scores", [[], [[]], [[1.0], [1.0, 0.0]], [[math.nan]], [[math.inf]], [[True]], [["1"]]], ids=str
)
def test_scores_that_are_none(scores: list) -> None:
    with pytest.raises((ValueError, TypeError), match="average_at_k: scores_NK"):
        average_at_k(scores)


@given(st.integers(1, 7), st.data())
def test_pass_at_k_counts_draws(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-15)


def test_pass_at_k_of_many_samples() -> None:
    assert pass_at_k(200, 20, 1) == 0.1
    assert pass_at_k(2000, 1, 1999) == pytest.approx(1999 / 2000, abs=1e-15)


@pytest.mark.parametrize("arguments", [(5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6), (5, 2.0, 1), (True, 1, 1)], ids=str)
def test_pass_at_k_out_of_range(arguments: tuple) -> None:
    with pytest.raises((ValueError, TypeError), match="pass_at_k"):
        pass_at_k(*arguments)
