"""Parts of parameters: those of all ranks make up the whole, in the parameter's own dimensions."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from k25sys.errors import GridError, ShapeError
from k25sys.parallel import GridSizes, ParameterLayout
from k25sys.parallel.layout import local_part
from tests.parallel.parts import join_parts
from tests.parallel.test_grid import grids


@st.composite
def spread_parameters(draw: st.DrawFn) -> tuple[torch.Tensor, ParameterLayout, GridSizes]:
    """A parameter of up to four dimensions, viewed as one or two each; splits over axes of one factorization."""
    sizes = draw(grids())
    axes = draw(st.permutations(draw(st.sampled_from([["tensor"], ["expert", "expert_tensor"]]))))
    shape, view, splits = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        run = []
        for _ in range(draw(st.integers(1, 2))):
            size = draw(st.integers(1, 3))
            if axes and draw(st.booleans()):
                axis, *axes = axes
                size *= sizes.size(axis)
                splits.append((len(view) + len(run), axis))
            run.append(size)
        shape.append(prod(run))
        view += run
    whole = torch.arange(prod(shape), dtype=torch.float32).view(shape)
    return whole, ParameterLayout(shape=tuple(view), splits=tuple(splits)), sizes


@given(spread_parameters())
def test_the_parts_of_all_ranks_are_the_whole(case: tuple[torch.Tensor, ParameterLayout, GridSizes]) -> None:
    whole, layout, sizes = case
    parts = [local_part(whole, layout, sizes, rank) for rank in range(sizes.world_size)]
    assert all(part.dim() == whole.dim() and part.is_contiguous() for part in parts)
    assert all(part.numel() == prod(layout.local_shape(sizes)) for part in parts)
    assert torch.equal(join_parts(parts, whole.shape, layout, sizes), whole)


def test_stacked_matrices_are_each_split() -> None:
    """gate rows, then up rows of two experts: a rank gets half of the gates and half of the ups of one."""
    whole = torch.arange(16.0).view(2, 8, 1)
    layout = ParameterLayout(shape=(2, 2, 4, 1), splits=((0, "expert"), (2, "expert_tensor")))
    sizes = GridSizes(data=4, expert=2, expert_tensor=2)
    parts = [local_part(whole, layout, sizes, rank) for rank in range(4)]
    assert [part.flatten().tolist() for part in parts] == [
        [0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]
    ]  # fmt: skip
    assert {tuple(part.shape) for part in parts} == {(1, 4, 1)}


def test_a_part_is_a_copy_and_stays_on_meta() -> None:
    layout, sizes = ParameterLayout(shape=(4, 2)), GridSizes()
    whole = torch.zeros(4, 2)
    part = local_part(whole, layout, sizes, 0)
    part.add_(1)
    assert torch.equal(whole, torch.zeros(4, 2))
    split = ParameterLayout(shape=(4, 2), splits=((0, "tensor"),))
    on_meta = local_part(torch.empty(4, 2, device="meta"), split, GridSizes(tensor=2), 1)
    assert on_meta.device.type == "meta"
    assert on_meta.shape == (2, 2)


def test_layouts_of_other_parameters_are_refused() -> None:
    sizes = GridSizes(tensor=2)
    for shape, view in (((4, 2), (4, 3)), ((4, 2), (8,)), ((6, 2), (4, 3)), ((4,), (2, 1)), ((4, 2), (2, 2, 2, 2))):
        with pytest.raises(ShapeError, match=r"local_part: tensor: got shape \(.*, accepted a shape that \(.* views"):
            local_part(torch.zeros(shape), ParameterLayout(shape=view), sizes, 0)
    with pytest.raises(GridError, match=r"local_part: got 2 ranks along tensor, accepted a divisor of 3 \(dimension 0"):
        local_part(torch.zeros(3, 2), ParameterLayout(shape=(3, 2), splits=((0, "tensor"),)), sizes, 0)
