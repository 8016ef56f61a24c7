"""The grid of ranks: both factorizations cover the same ranks, neighbours are where NVLink is, groups work."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from k25sys.errors import GridError
from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.grid import AXES, DENSE_AXES, EXPERT_AXES
from tests.parallel.processes import run_ranks


@st.composite
def grids(draw: st.DrawFn) -> GridSizes:
    small = st.sampled_from([1, 2, 3, 4])
    pipeline, data, context, tensor = (draw(small) for _ in range(4))
    ranks = data * context * tensor
    experts = draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    expert = draw(st.sampled_from([n for n in range(1, experts + 1) if experts % n == 0]))
    return GridSizes(
        pipeline=pipeline, data=data, context=context, tensor=tensor, expert=expert, expert_tensor=experts // expert
    )


@given(grids())
def test_each_axis_divides_the_ranks(sizes: GridSizes) -> None:
    for axis in AXES:
        groups = list(sizes.groups(axis))
        assert sorted(rank for group in groups for rank in group) == list(range(sizes.world_size))
        assert all(len(group) == sizes.size(axis) for group in groups)
        for group in groups:
            assert [sizes.coordinate(rank, axis) for rank in group] == list(range(len(group)))
            assert all(sizes.ranks(rank, axis) == group for rank in group)


@given(grids())
def test_experts_fold_into_one_pipeline_stage(sizes: GridSizes) -> None:
    for rank in range(sizes.world_size):
        stage = set(sizes.ranks(rank, "stage"))
        for axis in ("expert_data", "expert", "expert_tensor", "data_context", "tensor"):
            assert set(sizes.ranks(rank, axis)) <= stage
    assert sizes.expert_data * sizes.expert * sizes.expert_tensor == sizes.ranks_per_stage


def test_those_that_talk_most_are_neighbours() -> None:
    sizes = GridSizes(pipeline=2, data=2, context=2, tensor=2, expert=4, expert_tensor=2)
    assert sizes.ranks(0, "tensor") == sizes.ranks(0, "expert_tensor") == (0, 1)
    assert sizes.ranks(0, "context") == (0, 2)
    assert sizes.ranks(0, "data") == (0, 4)
    assert sizes.ranks(0, "pipeline") == (0, 8)
    assert sizes.ranks(0, "expert") == (0, 2, 4, 6)
    assert sizes.ranks(5, "data_context") == (1, 3, 5, 7)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"pipeline": 0}, "GridSizes: pipeline: got 0, accepted an int >= 1"),
        ({"data": True}, "GridSizes: data: got True"),
        ({"tensor": 2.0}, "GridSizes: tensor: got 2.0"),
        ({"data": 4, "expert": 3}, "expert x expert_tensor: got 3 x 1 = 3, accepted a divisor of data x context x ten"),
        ({"expert": 2}, "got 2 x 1 = 2"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, int], text: str) -> None:
    with pytest.raises(GridError, match="GridSizes") as error:
        GridSizes(**sizes)
    assert text in str(error.value)


def test_more_ranks_than_processes_are_refused() -> None:
    with pytest.raises(GridError, match=r"got 4 ranks, accepted 1; it is not initialised; start as many processes"):
        RankGrid.create(GridSizes(data=4))


def _sums_over_every_axis(sizes: GridSizes) -> dict[str, float | None]:
    grid = RankGrid.create(sizes)
    sums: dict[str, float | None] = {}
    for axis in AXES:
        group = grid.group(axis)
        value = torch.tensor(float(grid.rank))
        if group is not None:
            assert dist.get_process_group_ranks(group) == list(grid.ranks(axis))
            dist.all_reduce(value, group=group)
        sums[axis] = float(value) if group is not None else None
    for axes in (DENSE_AXES, EXPERT_AXES):
        assert list(grid.device_mesh(axes).get_coordinate() or ()) == [grid.index(axis) for axis in axes]
    return sums


@pytest.mark.parametrize(
    "sizes",
    [GridSizes(pipeline=2, data=2, tensor=2, expert=2, expert_tensor=2), GridSizes(context=2, data=2, expert=4)],
)
def test_groups_reach_the_ranks_of_their_axis(sizes: GridSizes) -> None:
    for rank, sums in enumerate(run_ranks(sizes.world_size, _sums_over_every_axis, sizes)):
        for axis in AXES:
            expected = float(sum(sizes.ranks(rank, axis))) if sizes.size(axis) > 1 else None
            assert sums[axis] == expected
