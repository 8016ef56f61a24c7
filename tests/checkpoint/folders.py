"""Small checkpoints in the released layout, made without the library's own writer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from k25sys.checkpoint import released_tensors
from k25sys.checkpoint.config_files import config_json
from k25sys.models.config import KimiK25Config, VisionConfig
from k25sys.models.presets import preset

INDEX = "model.safetensors.index.json"


def small_config(**text: Any) -> KimiK25Config:
    """A dense layer and two of four experts; every size is another one where the layout allows it."""
    sizes: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 96, "intermediate_size": 80, "moe_intermediate_size": 32,
        "num_hidden_layers": 3, "num_attention_heads": 2, "q_lora_rank": 24, "kv_lora_rank": 16,
        "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "n_routed_experts": 4, **text,
    }  # fmt: skip
    base = preset("tiny")
    vision = VisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, position_height=8,
        position_width=8,
    )  # fmt: skip
    return replace(base, text=replace(base.text, **sizes), vision=vision)


def random_tensors(config: KimiK25Config, experts: str = "int4", seed: int = 0) -> dict[str, Tensor]:
    """Any codes and scales, whichever rule might have made them."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (shape, dtype) in released_tensors(config, experts=experts).items():
        if name.endswith("weight_packed"):
            tensors[name] = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).int()
        elif name.endswith("weight_scale"):
            tensors[name] = (torch.rand(shape, generator=generator) * 0.01).to(dtype)
        elif name.endswith("weight_shape"):
            tensors[name] = torch.tensor(matrix_shape(config, name), dtype=dtype)
        else:
            tensors[name] = (torch.randn(shape, generator=generator) * 0.05).to(dtype)
    return tensors


def matrix_shape(config: KimiK25Config, name: str) -> tuple[int, int]:
    """(O, I) of an expert's matrix."""
    width, model = config.text.moe_intermediate_size, config.text.hidden_size
    return (model, width) if ".down_proj." in name else (width, model)


def write_folder(folder: Path, config: KimiK25Config, tensors: dict[str, Tensor], num_shards: int = 3) -> Path:
    """Deals the tensors out to shards in turn, so that the parts of an expert lie in different files."""
    folder.mkdir(parents=True)
    names = list(tensors)
    weight_map = {}
    for i in range(num_shards):
        file = f"model-{i + 1:05d}-of-{num_shards:06d}.safetensors"
        shard = {name: tensors[name].contiguous() for name in names[i::num_shards]}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    int4 = any(name.endswith("weight_packed") for name in tensors)
    description = config_json(config, "released", dtype=torch.bfloat16, int4=int4)
    (folder / "config.json").write_text(json.dumps(description))
    return folder


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert torch.equal(a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)), name
