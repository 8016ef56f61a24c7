"""Which ranks work together: one grid of ranks with two factorizations, one for dense layers and one for experts (D9).

Dense: pipeline x data x context x tensor. Experts: pipeline x expert_data x expert x expert_tensor. Both split the same
ranks of one pipeline stage, data * context * tensor = expert_data * expert * expert_tensor, so that expert parallelism
folds into the ranks that the dense layers use otherwise. The last axis changes fastest with the rank: tensor (and
expert_tensor) peers are neighbours, then context (expert), so that the groups that talk most share a node's NVLink.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import timedelta
from itertools import product
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from k25sys.errors import ArgumentValueError, GridError, message

DENSE_AXES = ("pipeline", "data", "context", "tensor")
EXPERT_AXES = ("pipeline", "expert_data", "expert", "expert_tensor")
COMPOSITE_AXES = {
    "data_context": ("data", "context"),
    "stage": ("data", "context", "tensor"),
    "world": DENSE_AXES,
}
"""Axes made of several: the ranks that hold the same dense shard, the ranks of one pipeline stage, all ranks."""
AXES = (*DENSE_AXES, *EXPERT_AXES[1:], *COMPOSITE_AXES)


@dataclass(frozen=True, kw_only=True)
class GridSizes:
    """The number of ranks along each axis that can be chosen; `expert_data` follows from them.

    Raises:
        GridError: a size below 1, or ranks of a stage that experts do not divide.
    """

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise GridError(message("GridSizes", item.name, repr(value), "an int >= 1"))
        experts = self.expert * self.expert_tensor
        if self.ranks_per_stage % experts:
            got = f"{self.expert} x {self.expert_tensor} = {experts}"
            accepted = f"a divisor of data x context x tensor = {self.ranks_per_stage}"
            raise GridError(message("GridSizes", "expert x expert_tensor", got, accepted, "experts fold into a stage"))

    @property
    def ranks_per_stage(self) -> int:
        """Ranks that hold the same layers, in parts or in copies."""
        return self.data * self.context * self.tensor

    @property
    def expert_data(self) -> int:
        """Copies of each expert within a stage."""
        return self.ranks_per_stage // (self.expert * self.expert_tensor)

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pipeline * self.ranks_per_stage

    def size(self, axis: str) -> int:
        """Ranks along `axis`, one of AXES."""
        return prod(getattr(self, part) for part in _parts(axis))

    def coordinate(self, rank: int, axis: str) -> int:
        """The place of `rank` along `axis`: its index among `ranks(rank, axis)`."""
        places = self._places(rank, axis)
        index = 0
        for part in _parts(axis):
            index = index * getattr(self, part) + places[part]
        return index

    def ranks(self, rank: int, axis: str) -> tuple[int, ...]:
        """The ranks that differ from `rank` along `axis` only, itself included, in order of their coordinates."""
        parts, places = _parts(axis), self._places(rank, axis)
        found = []
        for values in product(*(range(getattr(self, part)) for part in parts)):
            found.append(self._rank({**places, **dict(zip(parts, values, strict=True))}))
        return tuple(found)

    def groups(self, axis: str) -> Iterator[tuple[int, ...]]:
        """All groups of ranks along `axis`, by ascending first rank; together they are all ranks."""
        seen: set[int] = set()
        for rank in range(self.world_size):
            if rank not in seen:
                group = self.ranks(rank, axis)
                seen.update(group)
                yield group

    def _places(self, rank: int, axis: str) -> dict[str, int]:
        if not 0 <= rank < self.world_size:
            raise ArgumentValueError(message("GridSizes", "rank", rank, f"0 to {self.world_size - 1}"))
        expert = any(part not in DENSE_AXES for part in _parts(axis))
        places = {}
        for part in reversed(EXPERT_AXES if expert else DENSE_AXES):
            rank, places[part] = divmod(rank, getattr(self, part))
        return places

    def _rank(self, places: dict[str, int]) -> int:
        rank = 0
        for part in EXPERT_AXES if "expert" in places else DENSE_AXES:
            rank = rank * getattr(self, part) + places[part]
        return rank


def _parts(axis: str) -> tuple[str, ...]:
    if axis not in AXES:
        raise ArgumentValueError(message("RankGrid", "axis", repr(axis), ", ".join(AXES)))
    return COMPOSITE_AXES.get(axis, (axis,))


class RankGrid:
    """The grid as one rank sees it: sizes, its own place, a process group for each axis. Pass it; nothing is global.

    Made by `RankGrid.create`. A grid of one rank needs no torch.distributed.
    """

    def __init__(self, sizes: GridSizes, rank: int, device_type: str, groups: dict[str, dist.ProcessGroup]) -> None:
        self.sizes, self.rank, self.device_type = sizes, rank, device_type
        self._groups = groups

    @classmethod
    def create(cls, sizes: GridSizes, *, device_type: str = "cpu", timeout: timedelta | None = None) -> "RankGrid":
        """Makes the process groups. Collective: every rank calls it with the same sizes.

        Args:
            sizes: their product is the world size of torch.distributed, which is initialised already where it is > 1.
            device_type: "cpu" (gloo) or "cuda" (NCCL).
            timeout: of every wait on these groups; None keeps torch's.

        Raises:
            GridError: torch.distributed is not initialised, or has another number of ranks.
        """
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if sizes.world_size != world_size:
            started = f"torch.distributed has {world_size} ranks" if dist.is_initialized() else "it is not initialised"
            hint = f"{started}; start as many processes as the axes multiply to"
            raise GridError(message("RankGrid", "sizes", f"{sizes.world_size} ranks", f"{world_size}", hint))
        groups: dict[str, dist.ProcessGroup] = {}
        for axis in AXES:
            if sizes.size(axis) > 1:
                groups[axis] = _make_group(sizes, axis, groups, timeout)
        return cls(sizes, dist.get_rank() if world_size > 1 else 0, device_type, groups)

    def size(self, axis: str) -> int:
        """Ranks along `axis`."""
        return self.sizes.size(axis)

    def index(self, axis: str) -> int:
        """This rank's place along `axis`."""
        return self.sizes.coordinate(self.rank, axis)

    def ranks(self, axis: str) -> tuple[int, ...]:
        """The global ranks along `axis` through this one, in order."""
        return self.sizes.ranks(self.rank, axis)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The process group of `ranks(axis)`; None where it is this rank alone, and nothing is to be communicated."""
        _parts(axis)
        return self._groups.get(axis)

    def device_mesh(self, axes: tuple[str, ...] = DENSE_AXES) -> DeviceMesh:
        """One of the two factorizations as torch's DeviceMesh, for DTensor, FSDP2 and others that take one.

        Collective, and makes process groups of its own: axes of a RankGrid over the same ranks share one.
        """
        if axes not in (DENSE_AXES, EXPERT_AXES):
            raise ArgumentValueError(message("RankGrid", "axes", axes, "DENSE_AXES or EXPERT_AXES"))
        shape = [self.size(axis) for axis in axes]
        return DeviceMesh(self.device_type, torch.arange(self.sizes.world_size).view(shape), mesh_dim_names=axes)


def _make_group(
    sizes: GridSizes, axis: str, groups: dict[str, dist.ProcessGroup], timeout: timedelta | None
) -> dist.ProcessGroup:
    """Axes over the same ranks share one group: it is a connection of every pair."""
    for other, group in groups.items():
        if list(sizes.groups(other)) == list(sizes.groups(axis)):
            return group
    mine = None
    for ranks in sizes.groups(axis):
        group = dist.new_group(list(ranks), timeout=timeout, group_desc=axis)
        if dist.get_rank() in ranks:
            mine = group
    assert isinstance(mine, dist.ProcessGroup)
    return mine
