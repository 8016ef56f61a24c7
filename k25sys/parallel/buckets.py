"""Gradients in flat buckets: where they add up, and how their sums reach the shards while the backward still runs.

A bucket holds parameters with the same copies, one after the other, padded so that the ranks along that axis get
equal shards. Parameters' `main_grad` are views of it. Every micro-batch adds one gradient to each parameter, in
whatever order a schedule has them; when as many as there are micro-batches have landed on all parameters of a bucket,
and the buckets before it have started, its reduce-scatter starts. What never lands is flushed at the end.

The order of the buckets is the same on every rank, and so is that of their reduce-scatters, over all axes together:
NCCL may hang where two ranks start two collectives in different orders, and on which rank a bucket is complete first
depends on its data.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from k25sys.parallel.grid import RankGrid
from k25sys.parallel.layout import ParameterLayout
from k25sys.parallel.weight_grads import accumulate_gradient


@dataclass(frozen=True)
class Slot:
    """A parameter in a bucket."""

    name: str
    parameter: nn.Parameter
    layout: ParameterLayout
    begin: int
    """Its first element in the bucket."""

    @property
    def end(self) -> int:
        """One past its last element."""
        return self.begin + self.parameter.numel()


@dataclass(frozen=True)
class Piece:
    """What this rank's shard holds of a parameter."""

    slot: Slot
    shard: slice
    """Where it lies in the shard."""
    begin: int
    """The first of the elements of the parameter's local part, flat; `end` is one past the last."""
    end: int


@dataclass
class Bucket:
    """Parameters whose copies lie along one axis."""

    axis: str
    slots: tuple[Slot, ...]
    group: dist.ProcessGroup | None
    gradients: Tensor
    """All of them, padded: float32, or wider."""
    index: int
    """This rank's place along the axis."""
    size: int
    shard: Tensor | None = None
    """Sums of this rank's elements, while a step is made."""
    _missing: dict[str, int] = field(default_factory=dict)
    """By parameter, gradients that have not landed."""
    _counted: bool = False
    """Whether anybody counts them."""
    _work: dist.Work | None = None

    @property
    def shard_size(self) -> int:
        """Elements of every rank's shard."""
        return self.gradients.numel() // self.size

    def shard_of(self, flat: Tensor) -> Tensor:
        """This rank's elements of a flat tensor like `gradients`."""
        return flat.narrow(0, self.index * self.shard_size, self.shard_size)

    def pieces(self, index: int | None = None) -> Iterator[Piece]:
        """What the shard of this rank, or of another place along the axis, holds."""
        index = self.index if index is None else index
        first, last = index * self.shard_size, (index + 1) * self.shard_size
        for slot in self.slots:
            begin, end = max(slot.begin, first), min(slot.end, last)
            if begin < end:
                yield Piece(slot, slice(begin - first, end - first), begin - slot.begin, end - slot.begin)

    @property
    def complete(self) -> bool:
        """Whether all gradients that were expected have landed."""
        return self._counted and not self._missing

    def expect(self, num_gradients: int, irregular: Collection[str]) -> None:
        """So many gradients will land on each parameter; a bucket with one of `irregular` waits until the end."""
        names = [slot.name for slot in self.slots]
        self._counted = not set(names) & set(irregular)
        self._missing = dict.fromkeys(names, num_gradients) if self._counted else {}

    def landed(self, name: str) -> bool:
        """A gradient was added. True when it completes the bucket."""
        assert self.shard is None, f"{name}: a gradient after its bucket was reduced"
        if not self._counted:
            return False
        assert name in self._missing, f"{name}: a gradient more than expected"
        self._missing[name] -= 1
        if self._missing[name] == 0:
            del self._missing[name]
        return not self._missing

    def start(self) -> None:
        """Starts the sum over the copies, each rank getting its shard."""
        if self.group is None:
            self.shard = self.gradients
            return
        self.shard = torch.empty(self.shard_size, dtype=self.gradients.dtype, device=self.gradients.device)
        self._work = dist.reduce_scatter_tensor(self.shard, self.gradients, group=self.group, async_op=True)

    def wait(self) -> Tensor:
        """The shard of sums, whose reduce-scatter was started."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        assert self.shard is not None
        return self.shard

    def clear(self) -> None:
        """Zeros, for the next step."""
        self.shard = None
        self._counted = False
        self._missing.clear()
        self.gradients.zero_()


class GradientBuckets:
    """The buckets of all parameters of a rank.

    Sets `main_grad` and `on_gradient` of every parameter; what autograd puts into .grad is moved into main_grad.

    Args:
        parameters: this rank's, by name; in reverse order of use in the forward their buckets fill one by one.
        layouts: of each.
        grid: every rank along an axis gives the same parameters in the same order.
        bucket_bytes: of one bucket; a parameter is never divided.
        irregular: names of parameters that get more or fewer gradients than one a micro-batch (an encoder's).
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        layouts: Mapping[str, ParameterLayout],
        grid: RankGrid,
        *,
        bucket_bytes: int,
        irregular: Collection[str] = (),
    ) -> None:
        self._irregular = irregular
        self.buckets: list[Bucket] = []
        self.started: list[str] = []
        """Names whose landing started a reduce-scatter since `expect`: what overlaps."""
        groups = _grouped(parameters, layouts, bucket_bytes)
        position = {name: number for number, name in enumerate(parameters)}
        for axis, names in sorted(groups, key=partial(_turn, position, irregular)):
            self.buckets.append(_make_bucket(axis, names, parameters, layouts, grid))
        self._next = 0
        for bucket in self.buckets:
            for slot in bucket.slots:
                slot.parameter.on_gradient = partial(self._landed, bucket, slot.name)  # pyright: ignore[reportAttributeAccessIssue]
                slot.parameter.register_post_accumulate_grad_hook(_move_gradient)

    def _landed(self, bucket: Bucket, name: str) -> None:
        if not bucket.landed(name):
            return
        first = self._next
        while self._next < len(self.buckets) and self.buckets[self._next].complete:
            self.buckets[self._next].start()
            self._next += 1
        if self._next > first:
            self.started.append(name)

    def expect(self, num_microbatches: int) -> None:
        """Call before the first backward of a step: from then on complete buckets are reduced at once."""
        self.started.clear()
        for bucket in self.buckets:
            bucket.expect(num_microbatches, self._irregular)

    def reduced(self) -> list[Tensor]:
        """The shards of sums, bucket by bucket: starts what has not started, and waits for all."""
        for bucket in self.buckets[self._next :]:
            bucket.start()
        self._next = len(self.buckets)
        return [bucket.wait() for bucket in self.buckets]

    def clear(self) -> None:
        """Zeros, for the next step."""
        self._next = 0
        for bucket in self.buckets:
            bucket.clear()


def _move_gradient(parameter: Tensor) -> None:
    gradient = parameter.grad
    if gradient is None:  # whose function has accumulated it itself
        return
    parameter.grad = None
    accumulate_gradient(parameter, gradient)


def _grouped(
    parameters: Mapping[str, nn.Parameter], layouts: Mapping[str, ParameterLayout], bucket_bytes: int
) -> Iterable[tuple[str, list[str]]]:
    """(axis, names) of each bucket: of one axis and dtype, in reverse order, as a backward reaches them."""
    kinds = {(layouts[name].replicas, parameters[name].dtype) for name in parameters}
    for axis, dtype in sorted(kinds, key=str):
        names: list[str] = []
        held = 0
        for name in reversed(list(parameters)):
            if (layouts[name].replicas, parameters[name].dtype) != (axis, dtype):
                continue
            size = parameters[name].numel() * torch.promote_types(dtype, torch.float32).itemsize
            if names and held + size > bucket_bytes:
                yield axis, names
                names, held = [], 0
            names.append(name)
            held += size
        yield axis, names


def _turn(position: Mapping[str, int], irregular: Collection[str], group: tuple[str, list[str]]) -> tuple[bool, int]:
    """Where a bucket comes among all: in the order in which a backward completes them. Last come those that complete at
    an unknown time, and those over all ranks: stages have different buckets beside them."""
    axis, names = group
    late = axis == "world" or bool(set(names) & set(irregular))
    return late, -min(position[name] for name in names)


def _make_bucket(
    axis: str, names: Sequence[str], parameters: Mapping[str, nn.Parameter], layouts: Mapping[str, ParameterLayout],
    grid: RankGrid,
) -> Bucket:  # fmt: skip
    slots, begin = [], 0
    for name in names:
        slots.append(Slot(name, parameters[name], layouts[name], begin))
        begin += parameters[name].numel()
    size, first = grid.size(axis), parameters[names[0]]
    padded = -(-begin // size) * size
    dtype = torch.promote_types(first.dtype, torch.float32)
    gradients = torch.zeros(padded, dtype=dtype, device=first.device)
    for slot in slots:
        view = gradients[slot.begin : slot.end].view(slot.parameter.shape)
        slot.parameter.main_grad = view  # pyright: ignore[reportAttributeAccessIssue]
    return Bucket(axis, tuple(slots), grid.group(axis), gradients, grid.index(axis), size)
