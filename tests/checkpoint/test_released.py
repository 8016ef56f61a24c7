"""The released layout: its exact list of tensors, and folders in and out of it without a model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Kimi_K25Config

from k25sys.checkpoint import SCALE_RULES, config_files, convert, released_tensors, save_hf, verify_folder
from k25sys.checkpoint.config_files import config_json
from k25sys.errors import ArgumentValueError, ConfigError
from k25sys.models import KimiK25, TokenIds, key_maps
from k25sys.models.config import KimiK25Config
from k25sys.models.presets import preset
from k25sys.special_tokens import SPECIAL_NAMES
from tests.checkpoint.folders import (
    INDEX,
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
    assert KimiK25Config.from_hf_config(written) == config


@pytest.mark.parametrize("layout", ["released", "transformers"])
@pytest.mark.parametrize("name", ["tiny", "small", "moonlight", "k25"])
def test_config_json_of_every_preset_comes_back(name: str, layout: str) -> None:
    config = preset(name)
    written = json.loads(json.dumps(config_json(config, layout, dtype=BF16, int4=False)))
    assert KimiK25Config.from_hf_config(written) == config
    if layout == "transformers":
        theirs = Kimi_K25Config(**written).to_dict()
        assert KimiK25Config.from_hf_config(theirs) == config


@settings(max_examples=60)
@given(
    base=st.sampled_from((preset("k25"), small_config())), data=st.data(), layout=st.sampled_from(config_files.LAYOUTS)
)
def test_any_special_tokens_come_back(base: KimiK25Config, data: st.DataObject, layout: str) -> None:
    ids = st.integers(0, base.text.vocab_size - 1)
    others = dict.fromkeys(set(SPECIAL_NAMES) - {"media_pad"}, st.none() | ids)
    named = data.draw(st.fixed_dictionaries({"media_pad": ids, **others}))
    config = replace(base, tokens=TokenIds(**named, stop=tuple(data.draw(st.lists(ids, max_size=3)))))
    written = json.loads(json.dumps(config_json(config, layout, dtype=BF16, int4=False)))
    assert KimiK25Config.from_hf_config(written) == config


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ([1], "special_token_ids: got list, accepted a dict"),
        ({"media_pad": 274, "think_begin": 3}, "special_token_ids: got 'think_begin', accepted bos, eos, im_end,"),
        ({"media_pad": 3}, "special_token_ids.media_pad: got 3, accepted 274, which the config names beside it"),
        ({"media_pad": 274, "think": 512}, "tokens.think: got 512, accepted an id below vocab_size 512"),
        ({"media_pad": 274, "think": "275"}, "tokens.think: got 275, accepted an id below vocab_size 512"),
    ],
)
def test_special_tokens_that_cannot_be_are_refused(table: Any, error: str) -> None:
    written = config_json(preset("tiny"), "released", dtype=BF16, int4=False)
    with pytest.raises(ConfigError, match=error):
        KimiK25Config.from_hf_config({**written, "special_token_ids": table})


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


def test_files_beside_the_weights_go_along_and_stale_indices_do_not(tmp_path: Path) -> None:
    config = small_config()
    source = write_folder(tmp_path / "source", config, random_tensors(config, "bf16"))
    kept = ("tiktoken.model", ".gitattributes", "figures/a.png", "figures/deep/b.svg")
    left = (
        "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "original/consolidated.00.pth",
        "onnx/model.onnx", "other/model.safetensors", ".git/config", ".cache/huggingface/x.metadata",
    )  # fmt: skip
    for name in (*kept, *left):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    convert(source, tmp_path / "new", layout="transformers", experts="bf16")
    found = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    weights = {name for name in found if name.endswith(".safetensors")}
    assert found - weights == {*kept, "config.json", "manifest.json", INDEX}
    assert all((tmp_path / "new" / name).read_text() == name for name in kept)
    verify_folder(tmp_path / "new")


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_convert_writes_the_dtype_asked_for_and_config_json_says_so(tmp_path: Path, dtype: torch.dtype | None) -> None:
    config = small_config()
    source = write_folder(tmp_path / "source", config, random_tensors(config, "bf16"))
    for layout, experts in (("released", "bf16"), ("released", "int4"), ("transformers", "bf16")):
        folder = tmp_path / f"{layout}-{experts}"
        convert(source, folder, layout=layout, experts=experts, dtype=dtype)
        stored = {name: tensor.dtype for name, tensor in read_folder(folder).items()}
        whole = {name for name in stored if not name.endswith(("_packed", "_scale", "_shape", "correction_bias"))}
        assert {stored[name] for name in whole} == {dtype or BF16}
        assert {kind for name, kind in stored.items() if name.endswith("_scale")} <= {BF16}
        described = json.loads((folder / "config.json").read_text())
        word = str(dtype or BF16).removeprefix("torch.")
        assert described["dtype"] == described["text_config"]["dtype"] == word
        (folder / "manifest.json").unlink()
        verify_folder(folder)  # by config.json, its dtype included


def test_int4_of_wider_weights_has_the_released_dtypes(tmp_path: Path) -> None:
    config = small_config()
    model = KimiK25(config)
    save_hf(model, tmp_path / "default", experts="int4")
    tensors = {name: (tuple(t.shape), t.dtype) for name, t in read_folder(tmp_path / "default").items()}
    assert tensors == released_tensors(config)
    assert json.loads((tmp_path / "default" / "config.json").read_text())["dtype"] == "bfloat16"
    save_hf(model, tmp_path / "wide", experts="int4", dtype=FP32)
    assert read_folder(tmp_path / "wide")["language_model.lm_head.weight"].dtype == FP32
    save_hf(model, tmp_path / "whole")
    assert read_folder(tmp_path / "whole")["language_model.lm_head.weight"].dtype == FP32
    convert(tmp_path / "whole", tmp_path / "packed", layout="released", experts="int4")
    assert_same_tensors(read_folder(tmp_path / "packed"), read_folder(tmp_path / "default"))


@pytest.mark.parametrize("kind", ["both", "unprefixed"])
def test_config_json_in_the_words_of_two_layouts_is_written_anew(tmp_path: Path, kind: str) -> None:
    """As transformers saves it again after reading the released one; or with the encoder's names unprefixed."""
    config = small_config()
    source = write_folder(tmp_path / "source", config, random_tensors(config, "bf16"))
    described = json.loads((source / "config.json").read_text())
    vision = described["vision_config"]
    if kind == "both":
        theirs = config_json(config, "transformers", dtype=BF16, int4=False)
        described = {**described, **theirs, "vision_config": {**vision, **theirs["vision_config"]}}
    else:
        described["vision_config"] = {name.removeprefix("vt_"): value for name, value in vision.items()}
    (source / "config.json").write_text(json.dumps(described))
    for layout in config_files.LAYOUTS:
        convert(source, tmp_path / layout, layout=layout, experts="bf16")
        written = json.loads((tmp_path / layout / "config.json").read_text())
        assert written == config_json(config, layout, dtype=BF16, int4=False)


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
