"""Who writes which part of a tensor, and which stored parts make up one that is wanted: geometry without files.

A part of a parameter is a box of its whole (ParameterLayout.box), and of that box, flattened row by row, a range: ZeRO
cuts where it likes, in the middle of a row. Such a range is at most 2 n - 1 boxes in n dimensions, each contiguous in
the range; boxes of two parts intersect in boxes. So any part comes from any other parts by copies of boxes.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from k25sys.checkpoint.safetensors import DTYPES
from k25sys.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CheckpointError,
    DTypeError,
    LayoutError,
    ShapeError,
    message,
)
from k25sys.parallel.grid import GridSizes
from k25sys.parallel.layout import ParameterLayout

Box = tuple[tuple[int, int], ...]
WORDS = {dtype: word for word, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What one rank holds of one tensor: to be saved, or to be filled.

    `begin` and `end` are a range of the rank's part, layout.local_shape, flattened row by row; end None is to its end.
    """

    name: str
    """Of the parameter: the released one, the same on every rank that holds a part of it."""
    key: str
    """What it is of the parameter: "parameter", "master", "momentum", "exp_avg", "exp_avg_sq", "bias", ..."""
    layout: ParameterLayout
    tensor: Tensor
    """Contiguous, of any shape with end - begin elements."""
    begin: int = 0
    end: int | None = None

    def where(self, sizes: GridSizes, rank: int) -> "Part":
        """The piece without its numbers.

        Raises:
            TypeError, ValueError, GridError: the tensor does not fit the layout, the range, or a file.
        """
        op, what = "Piece", f"{self.key} of {self.name}"
        if not isinstance(self.tensor, Tensor):
            raise ArgumentTypeError(message(op, what, type(self.tensor).__name__, "a torch.Tensor"))
        if self.tensor.dtype not in WORDS:
            raise DTypeError(message(op, what, self.tensor.dtype, listed(WORDS)))
        self.layout.check(self.name, sizes)
        size = prod(self.layout.local_shape(sizes))
        if not size:
            raise ShapeError(message(op, what, f"a layout of shape {self.layout.shape}", "at least one element"))
        end = size if self.end is None else self.end
        if not 0 <= self.begin <= end <= size:
            raise ArgumentValueError(message(op, what, f"[{self.begin}, {end})", f"a range of {size} elements"))
        if self.tensor.numel() != end - self.begin:
            raise ShapeError(message(op, what, f"{self.tensor.numel()} elements", f"{end - self.begin}"))
        if not self.tensor.is_contiguous():
            raise LayoutError(message(op, what, f"strides {self.tensor.stride()}", "a contiguous tensor"))
        return Part(
            name=self.name, key=self.key, dtype=WORDS[self.tensor.dtype], shape=self.layout.shape,
            box=self.layout.box(sizes, rank), begin=self.begin, end=end,
        )  # fmt: skip


def listed(words: Any) -> str:
    """Names of dtypes, or of anything."""
    return ", ".join(sorted(str(word) for word in words))


@dataclass(frozen=True, kw_only=True)
class Part:
    """A range of a box of a tensor of `shape`."""

    name: str
    key: str
    dtype: str
    """The word of safetensors."""
    shape: tuple[int, ...]
    box: Box
    begin: int
    end: int

    @property
    def num_bytes(self) -> int:
        """Of its numbers."""
        return (self.end - self.begin) * DTYPES[self.dtype].itemsize

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the box."""
        return tuple(last - first for first, last in self.box)

    @property
    def entry(self) -> str:
        """Its name in a file of one rank."""
        return f"{self.key}/{self.name}[{self.begin}:{self.end}]"

    def check(self) -> None:
        """That a part which was read from a file is one.

        Raises:
            TypeError, ValueError: it is not.
        """
        numbers = [*self.shape, *(bound for bounds in self.box for bound in bounds), self.begin, self.end]
        if any(type(number) is not int for number in numbers):
            raise ArgumentTypeError(message("Part", self.entry, numbers, "ints"))
        inside = all(0 <= first < last <= size for (first, last), size in zip(self.box, self.shape, strict=True))
        if not inside or not 0 <= self.begin < self.end <= prod(self.local_shape) or self.dtype not in DTYPES:
            raise ArgumentValueError(message("Part", self.entry, self, "a range of a box of the shape, and a dtype"))

    def digest(self) -> int:
        """The same number for the same part on another rank."""
        text = json.dumps([self.name, self.key, self.dtype, self.shape, self.box, self.begin, self.end])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")

    def split(self, most_bytes: int) -> Iterator["Part"]:
        """Ranges of at most `most_bytes`, of equal size but for one element."""
        size = self.end - self.begin
        count = max(1, -(-self.num_bytes // most_bytes))
        for i in range(count):
            begin, end = self.begin + size * i // count, self.begin + size * (i + 1) // count
            if begin < end:
                yield Part(**{**vars(self), "begin": begin, "end": end})


def assign_writers(parts_by_rank: Sequence[Sequence[tuple[int, int]]]) -> dict[int, int]:
    """Which rank writes each part: one of those that hold it, so that the fullest rank writes as little as can be.

    Longest first, to the holder that has least so far; parts with one holder come before. The same on every rank.

    Args:
        parts_by_rank: (digest, bytes) of what each rank holds.

    Returns:
        The rank by digest.
    """
    holders: defaultdict[int, list[int]] = defaultdict(list)
    sizes: dict[int, int] = {}
    for rank, parts in enumerate(parts_by_rank):
        for digest, num_bytes in parts:
            holders[digest].append(rank)
            sizes[digest] = num_bytes
    load = [0] * len(parts_by_rank)
    writers = {}
    for digest in sorted(holders, key=lambda digest: (len(holders[digest]) > 1, -sizes[digest], digest)):
        writer = min(holders[digest], key=lambda rank: (load[rank], rank))
        writers[digest] = writer
        load[writer] += sizes[digest]
    return writers


def check_complete(what: str, shape: tuple[int, ...], parts: Sequence[Part]) -> None:
    """That `parts` hold each element of a tensor of `shape` once.

    Raises:
        CheckpointError: an element is held twice, or not at all.
    """
    ranges: defaultdict[Box, list[tuple[int, int]]] = defaultdict(list)
    for part in parts:
        ranges[part.box].append((part.begin, part.end))
    for box, found in ranges.items():
        size, reached = prod(last - first for first, last in box), 0
        for begin, end in sorted(found):
            if begin != reached:
                state = "twice" if begin < reached else "by no rank"
                bounds = (begin, reached) if begin < reached else (reached, begin)
                raise CheckpointError(f"{what}: elements {bounds[0]} to {bounds[1]} of {box} are held {state}")
            reached = end
        if reached != size:
            raise CheckpointError(f"{what}: elements {reached} to {size} of {box} are held by no rank")
    boxes = sorted(ranges)
    for i, box in enumerate(boxes):
        for other in boxes[i + 1 :]:
            if intersection(box, other) is not None:
                raise CheckpointError(f"{what}: {box} and {other} are held by different ranks and overlap")
    held = sum(prod(last - first for first, last in box) for box in boxes)
    if held != prod(shape):
        raise CheckpointError(f"{what}: {held} of {prod(shape)} elements are held by any rank")


def intersection(a: Box, b: Box) -> Box | None:
    """What two boxes share; None where that is nothing."""
    shared = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return shared if all(first < last for first, last in shared) else None


def boxes_of_range(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """The boxes that make up elements [begin, end) of an array of `shape`, in order: each is contiguous."""
    if begin >= end:
        return
    if not shape:
        yield ()
        return
    row = prod(shape[1:])
    while begin < end:
        first, within = divmod(begin, row)
        whole_rows = (end - begin) // row
        if within or not whole_rows:  # a part of one row
            stop = min(end, (first + 1) * row)
            for box in boxes_of_range(shape[1:], within, stop - first * row):
                yield ((first, first + 1), *box)
            begin = stop
        else:
            yield ((first, first + whole_rows), *((0, size) for size in shape[1:]))
            begin += whole_rows * row


@dataclass(frozen=True)
class Copy:
    """A box to copy from one flat array to another: each is a contiguous block of `shape`, of which a box is meant."""

    source_begin: int
    source_shape: tuple[int, ...]
    source_box: Box
    target_begin: int
    target_shape: tuple[int, ...]
    target_box: Box

    def run(self, source: Tensor, target: Tensor) -> None:
        """Copies between flat tensors; nothing else of `source` is touched."""
        _block(target, self.target_begin, self.target_shape, self.target_box).copy_(
            _block(source, self.source_begin, self.source_shape, self.source_box)
        )

    @property
    def num_elements(self) -> int:
        """Copied."""
        return prod(last - first for first, last in self.source_box)


def _block(flat: Tensor, begin: int, shape: tuple[int, ...], box: Box) -> Tensor:
    block = flat[begin : begin + prod(shape)].view(shape)
    return block[tuple(slice(*bounds) for bounds in box)]


def copies(source: Part, target: Part) -> Iterator[Copy]:
    """What `source` has of `target`; positions count from the begin of each."""
    if source.box == target.box:  # ranges of the same array: one run
        begin, end = max(source.begin, target.begin), min(source.end, target.end)
        if begin < end:
            run = ((0, end - begin),)
            shape = (end - begin,)
            yield Copy(begin - source.begin, shape, run, begin - target.begin, shape, run)
        return
    if intersection(source.box, target.box) is None:
        return
    targets = list(_blocks(target))
    for source_begin, source_block in _blocks(source):
        for target_begin, target_block in targets:
            shared = intersection(source_block, target_block)
            if shared is not None:
                yield Copy(
                    source_begin, _shape(source_block), _within(shared, source_block), target_begin,
                    _shape(target_block), _within(shared, target_block),
                )  # fmt: skip


def _blocks(part: Part) -> Iterator[tuple[int, Box]]:
    """(where it begins in the part, bounds in the whole tensor) of each contiguous box."""
    at = 0
    for box in boxes_of_range(part.local_shape, part.begin, part.end):
        yield at, tuple((first + a, first + b) for (first, _), (a, b) in zip(part.box, box, strict=True))
        at += prod(b - a for a, b in box)


def _shape(box: Box) -> tuple[int, ...]:
    return tuple(last - first for first, last in box)


def _within(box: Box, outer: Box) -> Box:
    return tuple((first - origin, last - origin) for (first, last), (origin, _) in zip(box, outer, strict=True))
