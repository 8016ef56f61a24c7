"""How one parameter is spread over the grid: what ZeRO, Muon and checkpoints must know of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from k25sys.errors import GridError, message
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

    @property
    def num_matrices(self) -> int:
        """Matrices in the whole parameter."""
        return prod(self.shape[:-2])

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


def local_part(whole: Tensor, layout: ParameterLayout, sizes: GridSizes, rank: int) -> Tensor:
    """A copy of what `rank` holds of a whole parameter, in the parameter's own dimensions.

    Splits lie along dimensions that the parameter has, or inside one that `layout.shape` views as several.
    """
    part = whole.reshape(layout.shape)[tuple(slice(*ends) for ends in layout.box(sizes, rank))]
    extra = len(layout.shape) - whole.dim()
    if extra > 0:  # the viewed dimensions lie after the leading ones, before the last
        kept = whole.dim() - 2
        part = part.flatten(kept, kept + extra)
    return part.clone(memory_format=torch.contiguous_format)
