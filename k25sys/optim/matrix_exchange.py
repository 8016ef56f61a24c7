"""Whole matrices for Newton-Schulz out of sharded momenta, and the slices of the results back.

A matrix lies in fragments: its parts along "tensor", "expert" or "expert_tensor", each sharded over the copies. Every
matrix has one owner among the ranks that share its layers, chosen so that owners compute equally much. Fragments go to
owners in one all-to-all and come back in another; copies of a fragment are sent once, and each gets its slice.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from k25sys.optim.muon_clip import MuonClipConfig
from k25sys.optim.newton_schulz import orthogonalize, together
from k25sys.parallel.buckets import Bucket, Slot
from k25sys.parallel.grid import RankGrid


@dataclass(frozen=True)
class _Matrix:
    """One matrix of a parameter, and who orthogonalises it."""

    slot: Slot
    place: tuple[int, ...]
    """Its index in the leading dimensions of the layout."""
    owner: int


@dataclass(frozen=True)
class _Fragment:
    """What one rank's shard holds of a matrix."""

    matrix: int
    rank: int
    box: tuple[slice, slice]
    """The rows and columns of the part that it is a fragment of."""
    begin: int
    """Elements of that part, flat."""
    end: int
    shard_begin: int
    """Where it lies in the rank's piece of the parameter."""
    sends: bool
    """Whether this is the copy that is sent."""

    @property
    def size(self) -> int:
        return self.end - self.begin


class MatrixExchange:
    """The plan of one group of two or more ranks: computed once, the same on all of them.

    Args:
        buckets: those whose matrices these ranks hold together.
        grid, axis: "stage", or "world" for what lies on every rank.
        config: of Newton-Schulz.
    """

    def __init__(self, buckets: Sequence[Bucket], grid: RankGrid, axis: str, config: MuonClipConfig) -> None:
        group = grid.group(axis)
        assert group is not None, "matrices that lie whole on one rank need no exchange"
        self._config, self._group, self._rank = config, group, grid.rank
        self._ranks = grid.ranks(axis)
        slots = [slot for bucket in buckets for slot in bucket.slots if slot.layout.matrix]
        self.matrices = _assign(slots, self._ranks)
        number = {(matrix.slot.name, matrix.place): i for i, matrix in enumerate(self.matrices)}
        self._fragments: list[_Fragment] = []
        for bucket in buckets:
            self._fragments += _fragments(bucket, grid, self._ranks, number, [matrix.owner for matrix in self.matrices])
        self._fragments.sort(key=lambda fragment: (fragment.matrix, fragment.rank))

    def orthogonalized(self, momenta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The orthogonal matrices, as far as this rank's pieces go. Collective.

        Args:
            momenta: by parameter, this rank's piece, flat: what is to be orthogonalised.

        Returns:
            The same shapes.
        """
        if not self.matrices:
            return {}
        like = self.matrices[0].slot.parameter
        device, dtype = like.device, self._config.newton_schulz_dtype or torch.promote_types(like.dtype, torch.float32)
        out = [f for f in self._fragments if f.rank == self._rank and f.sends]
        into = [f for f in self._fragments if self.matrices[f.matrix].owner == self._rank and f.sends]
        received = self._exchange(out, into, lambda f: self._piece(momenta, f).to(dtype), dtype, device, outward=True)
        updates = self._orthogonalize_owned(into, received, dtype, device)
        back = [f for f in self._fragments if self.matrices[f.matrix].owner == self._rank]
        mine = [f for f in self._fragments if f.rank == self._rank]
        slices = self._exchange(
            back, mine, lambda f: updates[f.matrix][f.box].reshape(-1)[f.begin : f.end], dtype, device, outward=False
        )
        results = {name: torch.empty_like(momentum) for name, momentum in momenta.items()}
        for fragment, part in zip(mine, slices, strict=True):
            self._piece(results, fragment).copy_(part)
        return results

    def _piece(self, pieces: Mapping[str, Tensor], fragment: _Fragment) -> Tensor:
        flat = pieces[self.matrices[fragment.matrix].slot.name]
        return flat[fragment.shard_begin : fragment.shard_begin + fragment.size]

    def _exchange(
        self, out: Sequence[_Fragment], into: Sequence[_Fragment], content: Callable[[_Fragment], Tensor],
        dtype: torch.dtype, device: torch.device, *, outward: bool,
    ) -> list[Tensor]:  # fmt: skip
        """Sends `content` of fragments to owners, or back to the ranks they lie on; the parts of `into`, in order."""

        def target(fragment: _Fragment) -> int:
            return self.matrices[fragment.matrix].owner if outward else fragment.rank

        def source(fragment: _Fragment) -> int:
            return fragment.rank if outward else self.matrices[fragment.matrix].owner

        send = [fragment for rank in self._ranks for fragment in out if target(fragment) == rank]
        receive = [fragment for rank in self._ranks for fragment in into if source(fragment) == rank]
        sent = torch.cat([torch.empty(0, dtype=dtype, device=device), *(content(f).reshape(-1) for f in send)])
        sizes = [
            [sum(f.size for f in side if end(f) == rank) for rank in self._ranks]
            for side, end in ((send, target), (receive, source))
        ]
        got = torch.empty(sum(sizes[1]), dtype=dtype, device=device)
        dist.all_to_all_single(got, sent, sizes[1], sizes[0], group=self._group)
        parts = dict(zip(map(id, receive), got.split([f.size for f in receive]), strict=True))
        return [parts[id(fragment)] for fragment in into]

    def _orthogonalize_owned(
        self, fragments: Sequence[_Fragment], parts: Sequence[Tensor], dtype: torch.dtype, device: torch.device
    ) -> dict[int, Tensor]:
        whole: dict[int, Tensor] = {}
        for fragment, part in zip(fragments, parts, strict=True):
            shape = self.matrices[fragment.matrix].slot.layout.shape[-2:]
            if fragment.matrix not in whole:
                whole[fragment.matrix] = torch.zeros(shape, dtype=dtype, device=device)
            view = whole[fragment.matrix][fragment.box]
            _fill(view, fragment.begin, part)
        by_shape: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, matrix in whole.items():
            by_shape[tuple(matrix.shape)].append(number)
        for shape, numbers in by_shape.items():
            batch = together(prod(shape), device.type)
            for first in range(0, len(numbers), batch):
                some = numbers[first : first + batch]
                stacked = torch.stack([whole[number] for number in some])
                whole.update(zip(some, orthogonalize(stacked, steps=self._config.newton_schulz_steps), strict=True))
        return whole


def _fill(view: Tensor, begin: int, part: Tensor) -> None:
    """Writes flat elements from `begin` on of a matrix that may be a part of a larger one, row by row where it must."""
    columns, done = view.shape[1], 0
    while done < len(part):
        row, column = divmod(begin + done, columns)
        if column == 0 and len(part) - done >= columns:
            rows = (len(part) - done) // columns
            view[row : row + rows] = part[done : done + rows * columns].view(rows, columns)
            done += rows * columns
        else:
            count = min(columns - column, len(part) - done)
            view[row, column : column + count] = part[done : done + count]
            done += count


def _assign(slots: Sequence[Slot], ranks: Sequence[int]) -> list[_Matrix]:
    """Every matrix of these parameters, the most work first onto the least loaded rank."""
    found = [(slot, place) for slot in slots for place in product(*map(range, slot.layout.shape[:-2]))]

    def work(slot: Slot) -> float:
        n, m = sorted(slot.layout.shape[-2:])
        return 4.0 * n * n * m + 2.0 * n**3

    heap = [(0.0, rank) for rank in ranks]
    owner: dict[int, int] = {}
    for number in sorted(range(len(found)), key=lambda i: (-work(found[i][0]), i)):
        load, rank = heapq.heappop(heap)
        owner[number] = rank
        heapq.heappush(heap, (load + work(found[number][0]), rank))
    return [_Matrix(slot, place, owner[number]) for number, (slot, place) in enumerate(found)]


def _fragments(
    bucket: Bucket, grid: RankGrid, ranks: Sequence[int], number: Mapping[tuple[str, tuple[int, ...]], int],
    owners: Sequence[int],
) -> list[_Fragment]:  # fmt: skip
    """What every rank holds of the bucket's matrices, as far as this rank has to know: its own, and those it owns."""
    sizes, found = grid.sizes, []
    seen: set[tuple[str, object, int]] = set()
    for rank in ranks:
        index = sizes.coordinate(rank, bucket.axis)
        for piece in bucket.pieces(index):
            layout = piece.slot.layout
            if not layout.matrix:
                continue
            box, local = layout.box(sizes, rank), layout.local_shape(sizes)
            key = (piece.slot.name, box, index)
            sends = key not in seen
            seen.add(key)
            inside, area = (slice(*box[-2]), slice(*box[-1])), local[-2] * local[-1]
            for k in range(piece.begin // area, -(-piece.end // area)):
                place = tuple(first + i for i, (first, _) in zip(_unravel(k, local[:-2]), box[:-2], strict=True))
                matrix = number[piece.slot.name, place]
                if rank != grid.rank and owners[matrix] != grid.rank:
                    continue
                begin, end = max(piece.begin, k * area), min(piece.end, (k + 1) * area)
                found.append(
                    _Fragment(matrix, rank, inside, begin - k * area, end - k * area, begin - piece.begin, sends)
                )
    return found


def _unravel(index: int, shape: Sequence[int]) -> list[int]:
    places = []
    for size in reversed(shape):
        index, place = divmod(index, size)
        places.append(place)
    return places[::-1]
