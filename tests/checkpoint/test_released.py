"""The released layout: its exact list of tensors, and folders in and out of it without a model."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k25sys.checkpoint import SCALE_RULES, convert, released_tensors, verify_folder
from k25sys.checkpoint.config_files import config_json
from k25sys.errors import ArgumentValueError, ConfigError
from k25sys.models import key_maps
from k25sys.models.config import KimiK25Config
from k25sys.models.presets import preset
from tests.checkpoint.folders import (
    assert_same_tensors,
    random_tensors,
    read_folder,
    small_config,
    write_folder,
)

BF16, FP32, INT32 = torch.bfloat16, torch.float32, torch.int32
LAYER = "language_model.model.layers."
BLOCK = "vision_tower.encoder.blocks."
TABLE = {  # spec section 10
    "language_model.lm_head.weight": ((163840, 7168), BF16),
    "language_model.model.embed_tokens.weight": ((163840, 7168), BF16),
    "language_model.model.norm.weight": ((7168,), BF16),
    LAYER + "0.input_layernorm.weight": ((7168,), BF16),
    LAYER + "60.post_attention_layernorm.weight": ((7168,), BF16),
    LAYER + "0.self_attn.q_a_proj.weight": ((1536, 7168), BF16),
    LAYER + "0.self_attn.q_a_layernorm.weight": ((1536,), BF16),
    LAYER + "0.self_attn.q_b_proj.weight": ((12288, 1536), BF16),
    LAYER + "60.self_attn.kv_a_proj_with_mqa.weight": ((576, 7168), BF16),
    LAYER + "60.self_attn.kv_a_layernorm.weight": ((512,), BF16),
    LAYER + "60.self_attn.kv_b_proj.weight": ((16384, 512), BF16),
    LAYER + "60.self_attn.o_proj.weight": ((7168, 8192), BF16),
    LAYER + "0.mlp.gate_proj.weight": ((18432, 7168), BF16),
    LAYER + "0.mlp.up_proj.weight": ((18432, 7168), BF16),
    LAYER + "0.mlp.down_proj.weight": ((7168, 18432), BF16),
    LAYER + "1.mlp.gate.weight": ((384, 7168), BF16),
    LAYER + "60.mlp.gate.e_score_correction_bias": ((384,), FP32),
    LAYER + "1.mlp.shared_experts.gate_proj.weight": ((2048, 7168), BF16),
    LAYER + "1.mlp.shared_experts.up_proj.weight": ((2048, 7168), BF16),
    LAYER + "1.mlp.shared_experts.down_proj.weight": ((7168, 2048), BF16),
    LAYER + "1.mlp.experts.0.gate_proj.weight_packed": ((2048, 896), INT32),
    LAYER + "1.mlp.experts.383.up_proj.weight_scale": ((2048, 224), BF16),
    LAYER + "60.mlp.experts.383.down_proj.weight_packed": ((7168, 256), INT32),
    LAYER + "60.mlp.experts.383.down_proj.weight_scale": ((7168, 64), BF16),
    LAYER + "60.mlp.experts.383.down_proj.weight_shape": ((2,), INT32),
    "vision_tower.patch_embed.proj.weight": ((1152, 3, 14, 14), BF16),
    "vision_tower.patch_embed.proj.bias": ((1152,), BF16),
    "vision_tower.patch_embed.pos_emb.weight": ((64, 64, 1152), BF16),
    BLOCK + "0.wqkv.weight": ((3456, 1152), BF16),
    BLOCK + "26.wqkv.bias": ((3456,), BF16),
    BLOCK + "26.wo.weight": ((1152, 1152), BF16),
    BLOCK + "26.wo.bias": ((1152,), BF16),
    BLOCK + "0.norm0.weight": ((1152,), BF16),
    BLOCK + "0.norm1.bias": ((1152,), BF16),
    BLOCK + "0.mlp.fc0.weight": ((4304, 1152), BF16),
    BLOCK + "0.mlp.fc0.bias": ((4304,), BF16),
    BLOCK + "0.mlp.fc1.weight": ((1152, 4304), BF16),
    BLOCK + "0.mlp.fc1.bias": ((1152,), BF16),
    "vision_tower.encoder.final_layernorm.weight": ((1152,), BF16),
    "mm_projector.pre_norm.bias": ((1152,), BF16),
    "mm_projector.proj.0.weight": ((4608, 4608), BF16),
    "mm_projector.proj.0.bias": ((4608,), BF16),
    "mm_projector.proj.2.weight": ((7168, 4608), BF16),
    "mm_projector.proj.2.bias": ((7168,), BF16),
}


def test_k25_has_the_released_tensors() -> None:
    tensors = released_tensors(preset("k25"))
    assert len(tensors) == 208_550
    assert TABLE.items() <= tensors.items()
    assert sum(name.endswith("_packed") for name in tensors) == 60 * 384 * 3
    sizes = {BF16: 2, FP32: 4, INT32: 4}
    total = sum(torch.Size(shape).numel() * sizes[dtype] for shape, dtype in tensors.values())
    assert round(total / 2**30, 1) == 554.3
    whole = released_tensors(preset("k25"), experts="bf16")
    numbers = {part: 0 for part in ("language_model", "vision_tower", "mm_projector")}
    for name, (shape, _) in whole.items():
        numbers[name.split(".")[0]] += torch.Size(shape).numel()
    assert list(numbers.values()) == [1_026_408_232_448, 416_866_032, 54_277_888]


def test_widths_that_have_no_groups_are_refused() -> None:
    with pytest.raises(ArgumentValueError, match="moe_intermediate_size 24"):
        released_tensors(small_config(moe_intermediate_size=24))
    with pytest.raises(ArgumentValueError, match="'fp8', accepted 'bf16' or 'int4'"):
        released_tensors(preset("tiny"), experts="fp8")


configs = st.builds(
    small_config,
    q_lora_rank=st.none() | st.integers(1, 40),
    first_k_dense_replace=st.integers(0, 2),
    n_routed_experts=st.integers(2, 5),
    n_shared_experts=st.integers(1, 3),
    yarn=st.none() | st.just(preset("tiny").text.yarn),
)


@settings(max_examples=50)
@given(config=configs, data=st.data())
def test_every_spelling_of_a_name_is_recognised(config: KimiK25Config, data: st.DataObject) -> None:
    for name in key_maps.released_shapes(config):
        pieces = [piece.name for piece in key_maps.transformers_pieces(name, config)]
        spellings = [name, name.replace("language_model.model.", "language_model.", 1)]
        spellings.append(name.replace("language_model.model.layers.", "language_model.model.blocks."))
        for spelling in spellings:
            wrapped = data.draw(st.sampled_from(("", "module.", "_orig_mod.", "module._orig_mod."))) + spelling
            inside = wrapped.replace("layers.1.", "layers.1._orig_mod.").replace("blocks.0.", "blocks.0._orig_mod.")
            assert key_maps.standard_name(inside) == name
        for piece in pieces:
            assert key_maps.standard_name(key_maps.transformers_name(piece)) == piece
    shapes = key_maps.released_shapes(config)
    assert len({key_maps.standard_name(name) for name in shapes}) == len(shapes)


@settings(max_examples=50)
@given(config=configs, layout=st.sampled_from(("released", "transformers")))
def test_config_json_says_what_the_model_is(config: KimiK25Config, layout: str) -> None:
    written = json.loads(json.dumps(config_json(config, layout, dtype=BF16, int4=False)))
    read = KimiK25Config.from_hf_config(written)
    assert (read.text, read.vision, read.tokens.media_pad) == (config.text, config.vision, config.tokens.media_pad)
    assert read.tokens.stop == config.tokens.stop


def test_a_model_that_config_json_cannot_describe_is_refused() -> None:
    config = KimiK25Config(text=preset("tiny").text, vision=None, tokens=preset("tiny").tokens)
    with pytest.raises(ConfigError, match="vision encoder"):
        config_json(config, "released", dtype=BF16, int4=False)


@pytest.mark.parametrize("experts", ["int4", "bf16"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_converting_to_the_same_layout_changes_no_bit(tmp_path: Path, experts: str, num_shards: int) -> None:
    config = small_config()
    tensors = random_tensors(config, experts)
    source = write_folder(tmp_path / "source", config, tensors, num_shards)
    (source / "tokenizer.json").write_text("{}")
    (source / "old.bin").write_bytes(b"pickle")
    described = json.loads((source / "config.json").read_text()) | {"auto_map": {"AutoConfig": "c.C"}}
    (source / "config.json").write_text(json.dumps(described))
    convert(source, tmp_path / "copy", layout="released", experts=experts, max_shard_bytes=50_000)
    assert_same_tensors(read_folder(tmp_path / "copy"), tensors)
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 3
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == described
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "copy" / "old.bin").exists()
    verify_folder(tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").unlink()
    assert "unchecked" in verify_folder(tmp_path / "copy")


def test_released_to_transformers_and_back_changes_no_bit(tmp_path: Path) -> None:
    config = small_config()
    tensors = random_tensors(config, "bf16")
    source = write_folder(tmp_path / "source", config, tensors)
    convert(source, tmp_path / "theirs", layout="transformers", experts="bf16")
    names = read_folder(tmp_path / "theirs").keys()
    assert not any("wqkv" in name or ".experts.0." in name for name in names)
    convert(tmp_path / "theirs", tmp_path / "back", layout="released", experts="bf16")
    assert_same_tensors(read_folder(tmp_path / "back"), tensors)


@pytest.mark.parametrize("rule", ["amax/7", "amax/7.5"])
def test_packing_follows_the_rule_and_unpacking_is_exact(tmp_path: Path, rule: str) -> None:
    config = small_config()
    source = write_folder(tmp_path / "source", config, random_tensors(config, "bf16"))
    convert(source, tmp_path / "packed", layout="released", experts="int4", scale_rule=rule)
    quantization = json.loads((tmp_path / "packed" / "config.json").read_text())["text_config"]["quantization_config"]
    assert quantization["config_groups"]["group_0"]["weights"]["num_bits"] == 4
    packed = read_folder(tmp_path / "packed")
    assert released_tensors(config) == {name: (tuple(t.shape), t.dtype) for name, t in packed.items()}
    convert(tmp_path / "packed", tmp_path / "whole", layout="released", experts="bf16")
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())["text_config"]
    for other in SCALE_RULES:  # codes come back from the weights, whatever rule made them
        convert(tmp_path / "whole", tmp_path / other, layout="released", experts="int4", scale_rule=other)
        assert_same_tensors(read_folder(tmp_path / other), packed)
