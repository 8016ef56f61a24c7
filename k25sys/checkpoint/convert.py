"""`python -m k25sys convert`: one layout into another, tensor by tensor, without the model in memory."""

import copy
import os
from pathlib import Path
from typing import Any

import torch

from k25sys.checkpoint.config_files import CONFIG, config_json, layout_of, quantization_config
from k25sys.checkpoint.safetensors import INDEX, PICKLES, SafetensorsFolder, read_json
from k25sys.checkpoint.save import SHARD_BYTES, write_hf
from k25sys.checkpoint.sources import FolderSource
from k25sys.checkpoint.store import MANIFEST
from k25sys.checkpoint.verify import verify_weights
from k25sys.models.config import KimiK25Config

_WEIGHTS = (".safetensors", *PICKLES, ".gguf", ".h5", ".msgpack", ".onnx")


def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    layout: str,
    experts: str,
    scale_rule: str = "amax/7",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Rewrites a checkpoint in another layout. Experts that are in INT4 and stay so keep their codes and scales.

    config.json keeps all its fields where the layout stays the same, and is written anew where it changes. Tokenizer,
    templates and other files are copied, those in folders too; weights in other formats, their indices and what lies in
    hidden folders (.git, .cache) are not.

    Args:
        source: a folder that `load_hf` reads, with config.json. Where it has a manifest, what is read of it must be as
            written; files that were added are taken along.
        folder: a new name.
        layout, experts, scale_rule, dtype, max_shard_bytes: as for `save_hf`.

    Raises:
        CheckpointError, ConfigError, ArgumentValueError: as `load_hf` and `save_hf`.
    """
    source = Path(source)
    described = read_json(source / CONFIG)
    config = KimiK25Config.from_hf_config(described)
    others = _others(source)
    if (source / MANIFEST).exists():
        verify_weights(source, also=[name for name, _ in others])

    def describe(stored: torch.dtype) -> dict[str, Any]:
        if layout_of(described) != layout:
            return config_json(config, layout, dtype=stored, int4=experts == "int4")
        return _changed(described, dtype=stored, int4=experts == "int4")

    with SafetensorsFolder(source) as files, torch.no_grad():
        write_hf(
            FolderSource(files, config), folder, layout=layout, experts=experts, scale_rule=scale_rule, dtype=dtype,
            max_shard_bytes=max_shard_bytes, describe=describe, others=others,
        )  # fmt: skip


def _changed(described: dict[str, Any], *, dtype: torch.dtype, int4: bool) -> dict[str, Any]:
    """A config.json with what it says of dtype and packing, where it says it, set right."""
    kept = copy.deepcopy(described)
    text = kept["text_config"]
    for section in (kept, text, kept["vision_config"]):
        section.update(
            {name: str(dtype).removeprefix("torch.") for name in ("dtype", "torch_dtype") if section.get(name)}
        )
        if not int4:
            section.pop("quantization_config", None)
    if int4 and "quantization_config" not in kept:
        text.setdefault("quantization_config", quantization_config())
    return kept


def _others(folder: Path) -> list[tuple[str, Path]]:
    """The files to copy, with their paths in the folder."""
    others = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(root, name)
            relative = path.relative_to(folder).as_posix()
            is_index = name.endswith(".index.json")
            if relative not in (CONFIG, INDEX, MANIFEST) and not is_index and path.suffix not in _WEIGHTS:
                others.append((relative, path))
    return others
