"""Weights out of a run's checkpoint: into another run, whatever its grid, or into one plain model."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from k25sys.checkpoint import distributed
from k25sys.checkpoint.config_files import CONFIG
from k25sys.checkpoint.distributed import INDEX
from k25sys.checkpoint.reshard import Piece
from k25sys.checkpoint.safetensors import DTYPES, read_json
from k25sys.checkpoint.store import LATEST
from k25sys.errors import CheckpointError, listing
from k25sys.models import KimiK25
from k25sys.models.presets import preset
from k25sys.optim import ZeroOptimizer
from k25sys.parallel import GridSizes, RankGrid
from k25sys.parallel.agreement import agreed
from k25sys.training.parallelize import ParallelModel
from k25sys.training.released import fill_released, released_names
from k25sys.training.sharding_plan import plan

PARTS = ("language_model", "vision_tower", "mm_projector")
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


def stored_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration of the run that left this checkpoint, from its index alone.

    Raises:
        CheckpointError: not of a run, or its index is damaged.
    """
    try:
        return read_json(Path(folder) / INDEX)["extra"]["extra"]["config"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{Path(folder) / INDEX}: has no configuration: not of a training run") from error


def checkpoint_folder(path: str | os.PathLike[str]) -> Path:
    """The checkpoint that `path` means: itself, or the newest of a run's folder, or of the one that holds them."""
    folder = Path(path)
    if folder.name == LATEST and folder.is_file():
        folder = folder.parent
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    if (folder / LATEST).is_file():
        named = folder / (folder / LATEST).read_text(errors="replace").strip()
        return named if named.parent == folder and named.is_dir() else folder
    return folder


def load_weights(
    start_from: Sequence[str], grid: RankGrid, model: ParallelModel, optimizer: ZeroOptimizer
) -> list[str]:  # fmt: skip
    """Weights of other runs into this one's parameters and masters; its moments stay as they are. Collective.

    Args:
        start_from: FOLDER, or FOLDER:PATTERN for the weights whose names in the model match it (shell kind); where two
            have a weight, the later one's counts. FOLDER may be a run's: its newest checkpoint then. Or it is in a
            released layout, as K2.5's.

    Returns:
        The parts of the model, as "vision_tower", that none of them has: they stay as they are.

    Raises:
        CheckpointError: not intact, a pattern that matches nothing, or a part of the model of which some weights are
            missing. RankFailureError: another rank found so.
    """
    entries: list[_Entry] = []
    wanted: list[list[Piece]] = []
    filled: list[tuple[torch.Tensor, torch.Tensor]] = []
    with agreed(grid.group("world")):
        entries += [_Entry.read(each) for each in start_from]
        wanted += [[] for _ in entries]
        for name, target, begin, end in _held(model, optimizer):
            place = _place_of(name, entries)
            if place is not None:
                key, dtype = entries[place].stored[name]
                loaded = torch.empty(target.shape, dtype=dtype)
                filled.append((target, loaded))
                piece = Piece(name=name, key=key, layout=model.layouts[name], tensor=loaded, begin=begin, end=end)
                wanted[place].append(piece)
        for entry, pieces in zip(entries, wanted, strict=True):
            if not is_run_checkpoint(entry.folder):
                fill_released(entry.folder, grid, pieces)
    for entry, pieces in zip(entries, wanted, strict=True):
        if is_run_checkpoint(entry.folder):
            distributed.load(entry.folder, grid, pieces, partly=len(entries) > 1 or entry.pattern != "*")
    for target, loaded in filled:
        target.copy_(loaded)
    optimizer.publish()
    return [part for part in PARTS if not any(part in entry.parts for entry in entries)]


def _held(
    model: ParallelModel, optimizer: ZeroOptimizer
) -> Iterator[tuple[str, torch.Tensor, int, int | None]]:  # fmt: skip
    """What this rank has of each weight, where it counts: its piece of the master, or all of its part."""
    for shard in optimizer.shards():
        if shard.key == "master":
            yield shard.name, shard.tensor, shard.begin, shard.end
    trained = {slot.name for bucket in optimizer.gradients.buckets for slot in bucket.slots}
    for name, parameter in {**model.parameters, **model.router_biases}.items():
        if name not in trained:
            yield name, parameter.detach(), 0, None


def _place_of(name: str, entries: "Sequence[_Entry]") -> int | None:
    """The last entry that gives the weight; None where none gives any of its part of the model."""
    places = [place for place, entry in enumerate(entries) if name in entry.stored]
    having = [entry.folder for entry in entries if _part(name) in entry.parts]
    if having and not places:
        raise CheckpointError(f"{having[-1]}: gives weights of {_part(name)}, but no {name}")
    return places[-1] if places else None


@dataclass(frozen=True)
class _Entry:
    """One of checkpoint.start_from."""

    folder: Path
    pattern: str
    stored: Mapping[str, tuple[str, torch.dtype]]
    """Those of its weights that it is to give: see `_stored`."""

    @property
    def parts(self) -> set[str]:
        """Of the model."""
        return {_part(name) for name in self.stored}

    @classmethod
    def read(cls, text: str) -> "_Entry":
        is_path = ":" not in text or Path(text).exists()
        path, _, pattern = (text, "", "*") if is_path else text.rpartition(":")
        folder = checkpoint_folder(path)
        if is_run_checkpoint(folder) or not (folder / CONFIG).is_file():
            stored = _stored(folder)
        else:
            stored = dict.fromkeys(released_names(folder), ("parameter", torch.float32))
        chosen = {name: value for name, value in stored.items() if fnmatchcase(name, pattern)}
        if not chosen:
            raise CheckpointError(f"{folder}: no weight matches {pattern!r}; it has {listing(sorted(stored), most=3)}")
        return cls(folder, pattern, chosen)


def _part(name: str) -> str:
    return name.partition(".")[0]


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
    config = preset(str(stored_config(folder).get("preset")))
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
