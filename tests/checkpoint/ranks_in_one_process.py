"""Saves and loads of many ranks in one process, and a model of parts whose bits are known."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k25sys.checkpoint import distributed
from k25sys.checkpoint.distributed import Piece
from k25sys.errors import CheckpointError
from k25sys.parallel import GridSizes, ParameterLayout, RankGrid

WIDTHS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
LAYOUTS = {
    "embed": ParameterLayout(shape=(24, 5), splits=((0, "tensor"),)),
    "norm": ParameterLayout(shape=(7,), sum_over_tensor=True),
    "q": ParameterLayout(shape=(36, 5), splits=((0, "tensor"),), matrix=True),
    "o": ParameterLayout(shape=(5, 24), splits=((1, "tensor"),), matrix=True),
    "gate_up": ParameterLayout(
        shape=(12, 2, 12, 3), splits=((0, "expert"), (2, "expert_tensor")), matrix=True, expert=True
    ),
    "down": ParameterLayout(shape=(12, 3, 12), splits=((0, "expert"), (2, "expert_tensor")), matrix=True, expert=True),
    "scale": ParameterLayout(shape=()),
}


def simulate(sizes: GridSizes, steps: Callable[[RankGrid], Any]) -> list[Any]:
    """`save_steps` or `load_steps` of every rank, exchange by exchange, as `drive` does it between processes."""
    grids = [RankGrid(sizes, rank, "cpu", {}) for rank in range(sizes.world_size)]
    running = [steps(grid) for grid in grids]
    received: list[Any] = [None] * len(running)
    while True:
        sent, results, failures = [], [], {}
        for rank, generator in enumerate(running):
            try:
                sent.append(generator.send(received[rank]))
            except StopIteration as stop:
                results.append(stop.value)
            except Exception as error:
                failures[rank] = error
        if failures:
            told = CheckpointError("; ".join(f"rank {rank} failed: {error}" for rank, error in failures.items()))
            for rank, generator in enumerate(running):
                if rank not in failures:
                    with suppress(CheckpointError):
                        generator.throw(told)
            raise next(iter(failures.values()))
        if results:
            assert len(results) == len(running)
            return results
        values = json.loads(json.dumps([one.value for one in sent]))
        received = [values if one.to_all or rank == 0 else [] for rank, one in enumerate(sent)]


def save(folder: Path, sizes: GridSizes, pieces: Callable[[int], list[Piece]], **options: Any) -> None:
    """What `distributed.save` does on every rank."""
    step, extra, file_bytes = options.get("step", 3), options.get("extra"), options.get("file_bytes", 1 << 20)
    simulate(sizes, lambda grid: distributed.save_steps(folder, grid, step, pieces(grid.rank), extra, file_bytes))


def load(folder: Path, sizes: GridSizes, pieces: Callable[[int], list[Piece]]) -> list[Any]:
    """What `distributed.load` does on every rank."""
    return simulate(sizes, lambda grid: distributed.load_steps(folder, grid, pieces(grid.rank)))


@dataclass(frozen=True)
class Model:
    """Layers of every layout: parameters in bfloat16, masters and momenta in float32, cut where `seed` says."""

    num_layers: int
    seed: int = 0

    def whole(self, name: str, key: str) -> Tensor:
        """Any bits, NaNs included."""
        shape = LAYOUTS[name.split(".")[1]].shape
        dtype = torch.bfloat16 if key == "parameter" else torch.float32
        generator = torch.Generator().manual_seed(sum(map(ord, name + key)) + self.seed)
        low, high = (-(2**15), 2**15) if dtype == torch.bfloat16 else (-(2**31), 2**31)
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int64).to(WIDTHS[dtype]).view(dtype)

    def pieces(self, sizes: GridSizes, rank: int, *, filled: bool, cut: int = 0) -> list[Piece]:
        """What `rank` holds; with `filled` False, tensors of other bits to be overwritten."""
        pieces = []
        for layer in range(self.num_layers):
            if layer * sizes.pipeline // self.num_layers != sizes.coordinate(rank, "pipeline"):
                continue
            for kind, layout in LAYOUTS.items():
                name = f"{layer}.{kind}"
                size = prod(layout.local_shape(sizes))
                ranges: dict[str, tuple[int, int | None]] = {"parameter": (0, None)}
                ranges["master"] = self._shard(sizes, rank, layout, size, cut)
                if layout.matrix:
                    ranges["momentum"] = self._shard(sizes, rank, layout, size, cut + 5)
                for key, (begin, end) in ranges.items():
                    part = self.whole(name, key)[tuple(slice(*b) for b in layout.box(sizes, rank))]
                    tensor = part.reshape(-1)[begin:end].clone()
                    if not filled:
                        tensor.view(torch.uint8).bitwise_not_()
                    if end is None:
                        tensor = tensor.view(layout.local_shape(sizes))
                    pieces.append(Piece(name=name, key=key, layout=layout, tensor=tensor, begin=begin, end=end))
        return pieces

    @staticmethod
    def _shard(sizes: GridSizes, rank: int, layout: ParameterLayout, size: int, cut: int) -> tuple[int, int]:
        """Ranges over the copies, in the middle of rows, some of them empty."""
        count, place = sizes.size(layout.replicas), sizes.coordinate(rank, layout.replicas)
        bounds = [min(size, max(0, size * i // count + (cut if 0 < i < count else 0))) for i in range(count + 1)]
        return bounds[place], bounds[place + 1]


def same_bits(got: list[Piece], expected: list[Piece]) -> bool:
    """Piece by piece."""
    return len(got) == len(expected) and all(
        torch.equal(a.tensor.reshape(-1).view(torch.uint8), b.tensor.reshape(-1).view(torch.uint8))
        for a, b in zip(got, expected, strict=True)
    )
