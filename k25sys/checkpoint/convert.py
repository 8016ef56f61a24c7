"""`python -m k25sys convert`: one layout into another, tensor by tensor, without the model in memory."""

import copy
import os
from pathlib import Path
from typing import Any

import torch

from k25sys.checkpoint.config_files import CONFIG, config_json, quantization_config
from k25sys.checkpoint.safetensors import INDEX, PICKLES, SafetensorsFolder, read_json
from k25sys.checkpoint.save import SHARD_BYTES, write_hf
from k25sys.checkpoint.sources import FolderSource
from k25sys.checkpoint.store import MANIFEST, verify_manifest
from k25sys.models.config import KimiK25Config


def convert(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    layout: str,
    experts: str,
    scale_rule: str = "amax/7",
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Rewrites a checkpoint in another layout. Experts that are in INT4 and stay so keep their codes and scales.

    config.json keeps all its fields where the layout stays the same, and is written anew where it changes. Tokenizer,
    templates and other files are copied; weights in other formats are not.

    Args:
        source: a folder that `load_hf` reads, with config.json.
        folder: a new name.
        layout, experts, scale_rule, max_shard_bytes: as for `save_hf`.

    Raises:
        CheckpointError, ConfigError, ArgumentValueError: as `load_hf` and `save_hf`.
    """
    source = Path(source)
    described = read_json(source / CONFIG)
    config = KimiK25Config.from_hf_config(described)
    if (source / MANIFEST).exists():
        verify_manifest(source)
    with SafetensorsFolder(source) as files, torch.no_grad():
        tensors = FolderSource(files, config)
        dtype = tensors.dtype("language_model.lm_head.weight")
        write_hf(
            tensors, folder, layout=layout, experts=experts, scale_rule=scale_rule, max_shard_bytes=max_shard_bytes,
            config=_config(described, config, layout, dtype=dtype, int4=experts == "int4"), others=_others(source),
        )  # fmt: skip


def _config(
    described: dict[str, Any], config: KimiK25Config, layout: str, *, dtype: torch.dtype, int4: bool
) -> dict[str, Any]:
    is_released = "vt_hidden_size" in described["vision_config"]
    if is_released != (layout == "released"):
        return config_json(config, layout, dtype=dtype, int4=int4)
    kept = copy.deepcopy(described)
    kept.pop("quantization_config", None)
    text = kept["text_config"]
    text.pop("quantization_config", None)
    if int4:
        text["quantization_config"] = quantization_config()
    return kept


def _others(folder: Path) -> list[Path]:
    weights = (".safetensors", *PICKLES)
    written = (CONFIG, INDEX, MANIFEST)
    return [p for p in sorted(folder.iterdir()) if p.is_file() and p.name not in written and p.suffix not in weights]
