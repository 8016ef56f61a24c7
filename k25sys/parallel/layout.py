"""How one parameter is spread over the grid: what ZeRO, Muon and checkpoints must know of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from k25sys.errors import GridError, ShapeError, message
from k25sys.parallel.grid import GridSizes, RankGrid


@dataclass(frozen=True, kw_only=True)
class ParameterLayout:
    """A parameter as a whole, and which of its dimensions are split over which axes.

    `shape` may view the parameter with more dimensions than it has, so that every split is even along one of them: the
    stacked gate_up_proj (E, 2I, D) is (E, 2, I, D), split over "expert" along 0 and over "expert_tensor" along 2. The
    last two dimensions are those of a matrix, the ones before count matrices: gate and up are two.

    Ranks that differ along no split axis hold copies. `replicas` names the axis over which ZeRO shards the optimiser
    state; gradients are summed over it, and over "tensor" too with `sum_over_tensor`.
    """

    shape: tuple[int, ...]
    splits: tuple[tuple[int, str], ...] = ()
    """(dimension of `shape`, axis)."""
    matrix: bool = False
    """Updated by Muon (the last two dimensions of `shape`); otherwise by AdamW."""
    expert: bool = False
    """Of a routed expert: copies lie along "expert_data" instead of "data_context"."""
    sum_over_tensor: bool = False
    """Whole on every tensor rank, each of which sees some of the tokens (sequence parallel), or some of the heads."""
    everywhere: bool = False
    """Whole on every rank of the grid, pipeline stages included: the decoupled encoder's."""

    @property
    def replicas(self) -> str:
        """The axis along which copies lie."""
        return "world" if self.everywhere else "expert_data" if self.expert else "data_context"

    def check(self, name: str, sizes: GridSizes) -> None:
        """Raises GridError where an axis does not divide its dimension."""
        for dim, axis in self.splits:
            if self.shape[dim] % sizes.size(axis):
                got = f"{sizes.size(axis)} ranks along {axis}"
                accepted = f"a divisor of {self.shape[dim]} (dimension {dim} of {self.shape})"
                raise GridError(message("ParameterLayout", name, got, accepted))

    def local_shape(self, sizes: GridSizes) -> tuple[int, ...]:
        """The part of one rank, viewed as `shape` is."""
        shape = list(self.shape)
        for dim, axis in self.splits:
            shape[dim] //= sizes.size(axis)
        return tuple(shape)

    def box(self, sizes: GridSizes, rank: int) -> tuple[tuple[int, int], ...]:
        """(first, one past the last) along each dimension of `shape` that `rank` holds."""
        box = [(0, size) for size in self.shape]
        for dim, axis in self.splits:
            part = self.shape[dim] // sizes.size(axis)
            first = sizes.coordinate(rank, axis) * part
            box[dim] = (first, first + part)
        return tuple(box)

    def holders(self, grid: RankGrid) -> Iterator[int]:
        """The ranks of this rank's pipeline stage that hold the same part, in order."""
        box = self.box(grid.sizes, grid.rank)
        for rank in grid.ranks("stage"):
            if self.box(grid.sizes, rank) == box:
                yield rank


def local_part(tensor: Tensor, layout: ParameterLayout, sizes: GridSizes, rank: int) -> Tensor:
    """What `rank` holds of a whole parameter, as a contiguous copy with as many dimensions as the parameter has.

    Args:
        tensor: the parameter, its gradient or a state of its optimiser, on any device, meta included.
        layout: `layout.shape` views the tensor, each of whose dimensions is a run of the layout's.

    Raises:
        ShapeError: the layout does not view this tensor.
        GridError: an axis does not divide its dimension.
    """
    folded = _fold(tensor.shape, layout)
    layout.check("local_part", sizes)
    box = tuple(slice(first, last) for first, last in layout.box(sizes, rank))
    local = layout.local_shape(sizes)
    part = tensor.detach().reshape(layout.shape)[box].reshape([prod(local[dim] for dim in run) for run in folded])
    return part.clone(memory_format=torch.contiguous_format)


def _fold(shape: tuple[int, ...], layout: ParameterLayout) -> list[range]:
    """The dimensions of `layout.shape` that make up each dimension of `shape`."""
    runs: list[range] = []
    begin = 0
    for i, size in enumerate(shape):
        end = begin + 1
        while end < len(layout.shape) and (prod(layout.shape[begin:end]) < size or i == len(shape) - 1):
            end += 1
        runs.append(range(begin, end))
        begin = end
    sizes = tuple(prod(layout.shape[run.start : run.stop]) for run in runs)
    if begin != len(layout.shape) or sizes != tuple(shape):
        accepted = f"a shape that {layout.shape} views"
        raise ShapeError(message("local_part", "tensor", f"shape {tuple(shape)}", accepted))
    return runs
