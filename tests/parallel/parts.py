"""The inverse of local_part."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from k25sys.parallel import GridSizes, ParameterLayout, RankGrid


def join_parts(parts: Sequence[Tensor], shape: Sequence[int], layout: ParameterLayout, sizes: GridSizes) -> Tensor:
    """A parameter of `shape` from what every rank holds of it, by rank; every element must be held by somebody."""
    whole = torch.full(layout.shape, float("nan"), dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        box = tuple(slice(first, last) for first, last in layout.box(sizes, rank))
        whole[box] = part.view(layout.local_shape(sizes))
    assert not whole.isnan().any()
    return whole.view(*shape)


def gather_parts(part: Tensor, shape: Sequence[int], layout: ParameterLayout, grid: RankGrid) -> Tensor:
    """The whole parameter, on every rank of a grid."""
    parts = [torch.empty_like(part) for _ in range(grid.sizes.world_size)]
    if len(parts) > 1:
        dist.all_gather(parts, part.contiguous())
    else:
        parts = [part]
    return join_parts(parts, shape, layout, grid.sizes)
