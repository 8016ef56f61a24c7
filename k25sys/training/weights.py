"""Weights out of a run's checkpoint: into another run, whatever its grid, or into one plain model."""

import os
from pathlib import Path
from typing import Any

import torch

from k25sys.checkpoint import distributed
from k25sys.checkpoint.distributed import INDEX
from k25sys.checkpoint.reshard import Piece
from k25sys.checkpoint.safetensors import DTYPES, read_json
from k25sys.errors import CheckpointError, listing
from k25sys.models import KimiK25
from k25sys.models.presets import preset
from k25sys.optim import ZeroOptimizer
from k25sys.parallel import GridSizes, RankGrid
from k25sys.training.parallelize import ParallelModel
from k25sys.training.sharding_plan import plan

_WEIGHT_KEYS = ("master", "parameter", "bias")


def is_run_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` is a checkpoint of a training run (and not of a released layout)."""
    return (Path(folder) / INDEX).is_file()


def _stored(folder: Path) -> dict[str, tuple[str, torch.dtype]]:
    """By name of a weight, the key that it is stored under, and its dtype."""
    try:
        entries = read_json(folder / INDEX)["tensors"]
        found: dict[str, Any] = {e["name"]: (e["key"], DTYPES[e["dtype"]]) for e in entries
                                 if e["key"] in _WEIGHT_KEYS}  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / INDEX}: not the index of a checkpoint") from error
    return found


def load_weights(
    folder: str | os.PathLike[str], grid: RankGrid, model: ParallelModel, optimizer: ZeroOptimizer
) -> None:
    """Weights of another run into this one's parameters and masters; its moments stay as they are. Collective.

    Raises:
        CheckpointError: not intact, or of a model with other parameters.
    """
    folder = Path(folder)
    stored = _stored(folder)
    wanted: list[Piece] = []
    filled: list[tuple[torch.Tensor, torch.Tensor]] = []

    def want(name: str, target: torch.Tensor, begin: int = 0, end: int | None = None) -> None:
        key, dtype = _key_of(folder, stored, name)
        loaded = torch.empty(target.shape, dtype=dtype)
        filled.append((target, loaded))
        wanted.append(
            Piece(name=name, key=key, layout=model.layouts[name], tensor=loaded, begin=begin, end=end)
        )  # fmt: skip

    for shard in optimizer.shards():
        if shard.key == "master":
            want(shard.name, shard.tensor, shard.begin, shard.end)
    trained = {slot.name for bucket in optimizer.gradients.buckets for slot in bucket.slots}
    for name, parameter in {**model.parameters, **model.router_biases}.items():
        if name not in trained:
            want(name, parameter.detach())
    distributed.load(folder, grid, wanted)
    for target, loaded in filled:
        target.copy_(loaded)
    optimizer.publish()


def _key_of(folder: Path, stored: dict[str, tuple[str, torch.dtype]], name: str) -> tuple[str, torch.dtype]:
    if name not in stored:
        raise CheckpointError(f"{folder}: has no {name}; it has {listing(sorted(stored), most=3)}")
    return stored[name]


def load_model(folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32) -> KimiK25:
    """The whole model of a run's checkpoint, on the CPU of this process.

    Raises:
        CheckpointError: not intact, or not of a run.
    """
    folder = Path(folder)
    stored, sizes = _stored(folder), GridSizes()
    extra = read_json(folder / INDEX).get("extra", {})
    try:
        config = preset(extra["extra"]["config"]["preset"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX}: names no preset: not of a training run") from error
    with torch.device("meta"):
        model = KimiK25(config).to(dtype)
    model.to_empty(device="cpu")
    layouts = plan(config, sizes)
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    loaded = {name: torch.empty(value.shape, dtype=_key_of(folder, stored, name)[1]) for name, value in tensors.items()}
    pieces = [Piece(name=name, key=stored[name][0], layout=layouts[name], tensor=loaded[name]) for name in tensors]
    distributed.load(folder, RankGrid(sizes, 0, "cpu", {}), pieces)
    for name, value in tensors.items():
        value.copy_(loaded[name])
    return model
