"""`load_hf`: a folder of safetensors, in any of the layouts, into a model."""

import os
from pathlib import Path

import torch
from torch import nn

from k25sys.checkpoint.config_files import CONFIG
from k25sys.checkpoint.int4 import Int4Origin, dequantize_int4
from k25sys.checkpoint.safetensors import SafetensorsFolder, read_json
from k25sys.checkpoint.sources import FolderSource, ModelSource
from k25sys.checkpoint.store import MANIFEST
from k25sys.checkpoint.verify import verify_weights
from k25sys.models.config import KimiK25Config


def read_config(folder: str | os.PathLike[str]) -> KimiK25Config:
    """The model that the config.json of a folder describes.

    Raises:
        CheckpointError, ConfigError: no such file, no JSON, or no model of this kind.
    """
    return KimiK25Config.from_hf_config(read_json(Path(folder) / CONFIG))


def load_hf(model: nn.Module, folder: str | os.PathLike[str], *, verify: bool = True) -> None:
    """Loads the released layout (experts packed or whole), transformers' state dict, or what its save_pretrained gives.

    Reads tensor by tensor, file after file: beside the model there is never more in memory than one tensor, and of
    stacked experts two copies of one's matrix. Values are converted to the dtype of the model's tensors. Where experts
    were in INT4, `model.int4_origin` is set, a few bytes with which `save_hf` writes the same codes and scales again.

    Args:
        model: a KimiK25 that is not on the meta device.
        folder: model.safetensors.index.json with its files, or a single safetensors file.
        verify: compare weights and config.json with the manifest first, where there is one. Other files may have been
            added or changed (`python -m k25sys verify` finds them).

    Raises:
        CheckpointError: before the model is changed. A file is missing, truncated or altered, or tensors are missing,
            extra, mis-shaped or mis-typed: one error names them.
        ArgumentTypeError, DeviceError: not a KimiK25, or one without memory.
    """
    target = ModelSource("load_hf", model)
    if verify and (Path(folder) / MANIFEST).exists():
        verify_weights(folder)
    origin = Int4Origin()
    with SafetensorsFolder(folder) as files, torch.no_grad():
        source = FolderSource(files, target.config)
        for name in source.names_by_file():
            tensor = target.tensor(name)
            codes = source.codes(name)
            if codes is None:
                tensor.copy_(source.read(name))
            else:
                weight = dequantize_int4(*codes, tensor.dtype)
                tensor.copy_(weight)
                origin.remember(name, weight, *codes)
    object.__setattr__(model, "int4_origin", origin if origin.odd else None)
