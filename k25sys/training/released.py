"""Weights of a folder in a released layout, as K2.5's own, into the pieces that a rank of a training run holds."""

from collections import defaultdict
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from k25sys.checkpoint import read_config
from k25sys.checkpoint.reshard import Part, Piece, copies
from k25sys.checkpoint.safetensors import SafetensorsFolder
from k25sys.checkpoint.sources import FolderSource
from k25sys.checkpoint.store import MANIFEST
from k25sys.checkpoint.verify import verify_weights
from k25sys.errors import CheckpointError
from k25sys.models.key_maps import model_piece, released_shapes
from k25sys.parallel import GridSizes, RankGrid
from k25sys.training.sharding_plan import plan


def released_names(folder: Path) -> list[str]:
    """The parameters, and biases of routers, of the model that the folder's config.json describes.

    Raises:
        CheckpointError, ConfigError: it describes none.
    """
    config = read_config(folder)
    return sorted({model_piece(name, config).name for name in released_shapes(config)})


def fill_released(folder: Path, grid: RankGrid, pieces: Sequence[Piece]) -> None:
    """Fills float32 tensors of `pieces`; of each file a rank reads what it has a part of, tensor by tensor.

    Raises:
        CheckpointError: a file is missing or truncated, tensors are not those of its config.json or not of the pieces'
            shapes; on rank 0, a file is not what the folder's manifest says, where it has one.
    """
    config = read_config(folder)
    layouts = plan(config, GridSizes())
    wanted: defaultdict[str, list[tuple[Part, torch.Tensor]]] = defaultdict(list)
    for piece in pieces:
        shape = layouts[piece.name].shape
        if shape != piece.layout.shape:
            raise CheckpointError(f"{folder}: {piece.name} of shape {shape}, this model's has {piece.layout.shape}")
        wanted[piece.name].append((piece.where(grid.sizes, grid.rank), piece.tensor.view(-1)))
    if grid.rank == 0 and (folder / MANIFEST).exists():
        verify_weights(folder)
    shapes = released_shapes(config)
    with SafetensorsFolder(folder) as files:
        source = FolderSource(files, config)
        for name in source.names_by_file():
            place = model_piece(name, config)
            shape, size = layouts[place.name].shape, prod(shapes[name])
            begin = 0
            if place.expert is not None:  # of a stack of experts it is a run of rows, in order
                begin = place.expert * prod(shape[1:]) + (place.rows[0] if place.rows else 0) * shape[-1]
            part = Part(
                name=place.name, key="parameter", dtype="F32", shape=shape, box=tuple((0, each) for each in shape),
                begin=begin, end=begin + size,
            )  # fmt: skip
            found = [(copy, tensor) for target, tensor in wanted[place.name] for copy in copies(part, target)]
            if found:
                values = source.read(name).float().reshape(-1)
                for copy, tensor in found:
                    copy.run(values, tensor)
