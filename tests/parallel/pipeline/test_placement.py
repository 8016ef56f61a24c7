"""Placement of layers by cost, against every possible cut."""

from collections.abc import Iterator
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k25sys.errors import ScheduleError
from k25sys.parallel.pipeline.placement import place_layers


def _all_cuts(num_layers: int, num_stages: int) -> Iterator[tuple[range, ...]]:
    for inner in combinations(range(1, num_layers), num_stages - 1):
        bounds = (0, *inner, num_layers)
        yield tuple(range(begin, end) for begin, end in pairwise(bounds))


def _stage_costs(stages: tuple[range, ...], costs: list[int], first: int, last: int) -> list[int]:
    sums = [sum(costs[layer] for layer in layers) for layers in stages]
    sums[0] += first
    sums[-1] += last
    return sums


@given(st.data())
def test_no_cut_is_better(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=9))
    num_stages = data.draw(st.integers(1, len(costs)))
    first, last = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40))
    stages = place_layers(costs, num_stages, first_extra=first, last_extra=last)
    assert [layer for layers in stages for layer in layers] == list(range(len(costs)))
    assert len(stages) == num_stages
    assert all(len(layers) > 0 for layers in stages)

    def rank(cut: tuple[range, ...]) -> tuple[int, int]:
        sums = _stage_costs(cut, costs, first, last)
        return max(sums), sum(cost**2 for cost in sums)

    assert rank(stages) == min(map(rank, _all_cuts(len(costs), num_stages)))


def test_the_layers_of_k25_over_16_ranks_with_2_virtual_stages() -> None:
    """61 equal layers and a head that costs one more: two layers' worth a stage, three stages have less."""
    stages = place_layers([1.0] * 61, 32, last_extra=1.0)
    assert max(len(layers) for layers in stages) == 2
    assert len(stages[-1]) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([1.0] * 3, 4), "place_layers: num_stages: got 4, accepted an int from 1 to 3"),
        (([], 1), "num_stages: got 1, accepted an int from 1 to 0"),
        (([1.0] * 3, 0), "num_stages: got 0"),
        (([1.0, float("nan")], 1), r"costs\[1\]: got nan, accepted a finite number >= 0"),
        (([1.0, -1.0], 1), r"costs\[1\]: got -1"),
    ],
)
def test_what_cannot_be_placed_is_refused(arguments: tuple[list[float], int], text: str) -> None:
    with pytest.raises(ScheduleError, match=text):
        place_layers(*arguments)
    with pytest.raises(ScheduleError, match="last_extra: got inf"):
        place_layers([1.0], 1, last_extra=float("inf"))
