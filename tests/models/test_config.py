"""Configurations: presets, config.json in both naming schemes, and what is refused."""

import copy
from typing import Any

import pytest
from transformers import Kimi_K25Config

from k25sys.errors import ConfigError
from k25sys.models import KimiK25Config, TokenIds
from k25sys.models.presets import preset
from k25sys.special_tokens import SPECIAL_NAMES
from tests.models.cases import plain_case

# The released config.json, without the fields that do not describe the architecture.
RELEASED: dict[str, Any] = {
    "architectures": ["KimiK25ForConditionalGeneration"],
    "bos_token_id": 163584,
    "eos_token_id": 163586,
    "pad_token_id": 163839,
    "ignore_index": -100,
    "media_placeholder_token_id": 163605,
    "model_type": "kimi_k25",
    "tie_word_embeddings": False,
    "use_unified_vision_chunk": True,
    "video_placeholder": "<|kimi_k25_video_placeholder|>",
    "dtype": "bfloat16",
    "text_config": {
        "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "first_k_dense_replace": 1,
        "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
        "kv_lora_rank": 512, "max_position_embeddings": 262144, "model_type": "kimi_k2", "moe_intermediate_size": 2048,
        "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 384, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-05, "rope_theta": 50000.0, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid",
        "seq_aux": True, "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc", "v_head_dim": 128,
        "vocab_size": 163840,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 64.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "quantization_config": {"quant_method": "compressed-tensors"},
    },
    "vision_config": {
        "init_pos_emb_height": 64, "init_pos_emb_time": 4, "init_pos_emb_width": 64, "merge_kernel_size": [2, 2],
        "merge_type": "sd2_tpool", "mm_hidden_size": 1152, "mm_projector_type": "patchmerger", "patch_size": 14,
        "pos_emb_type": "divided_fixed", "projector_hidden_act": "gelu", "projector_ln_eps": 1e-05,
        "text_hidden_size": 7168, "video_attn_type": "spatial_temporal", "vt_hidden_size": 1152,
        "vt_intermediate_size": 4304, "vt_num_attention_heads": 16, "vt_num_hidden_layers": 27,
    },
}  # fmt: skip


def changed(path: str, value: Any) -> dict[str, Any]:
    """RELEASED with one field set, or removed where `value` is `...`."""
    config = copy.deepcopy(RELEASED)
    *sections, name = path.split(".")
    fields = config
    for section in sections:
        fields = fields[section]
    if value is ...:
        del fields[name]
    else:
        fields[name] = value
    return config


def test_the_released_config_is_the_preset() -> None:
    assert KimiK25Config.from_hf_config(RELEASED) == preset("k25")


def test_transformers_reading_of_the_released_config_is_the_preset() -> None:
    assert KimiK25Config.from_hf_config(Kimi_K25Config(**changed("dtype", ...)).to_dict()) == preset("k25")


def test_unprefixed_names_of_the_vision_encoder_are_read() -> None:
    vision = {name.removeprefix("vt_"): value for name, value in RELEASED["vision_config"].items()}
    assert KimiK25Config.from_hf_config(changed("vision_config", vision)) == preset("k25")


def test_a_small_vocabulary_has_only_the_tokens_that_its_config_names() -> None:
    tokens = plain_case().config().tokens
    assert tokens == TokenIds.only((2,), bos=1, eos=2, media_pad=60, media_begin=61, media_end=62)


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("text_config.hidden_size", ..., "text_config.hidden_size: got nothing"),
        ("vision_config.vt_hidden_size", ..., "vision_config.vt_hidden_size: got nothing, accepted a value under vt_"),
        ("vision_config.hidden_size", 64, "vision_config: got {'vt_hidden_size': 1152, 'hidden_size': 64}"),
        ("vision_config.text_hidden_size", 64, "vision_config.text_hidden_size: got 64, accepted 7168"),
        ("vision_config.merge_type", "sd2", "vision_config.merge_type: got 'sd2', accepted 'sd2_tpool'"),
        ("vision_config", None, "vision_config: got NoneType, accepted a dict"),
        ("text_config.scoring_func", "softmax", "scoring_func: got 'softmax', accepted 'sigmoid'"),
        ("text_config.n_group", 8, "n_group: got 8, accepted 1"),
        ("text_config.num_key_value_heads", 8, "num_key_value_heads: got 8, accepted num_attention_heads 64"),
        ("text_config.rope_scaling.type", "linear", "rope_scaling.type: got 'linear', accepted 'yarn' or 'default'"),
        ("text_config.rope_scaling.mscale", ..., "rope_scaling.mscale: got nothing"),
        ("text_config.rope_scaling.beta_fast", 0.5, "beta_slow, beta_fast: got (1.0, 0.5)"),
        ("text_config.rope_parameters", {"rope_theta": 1e4}, "rope_theta: got [10000.0, 50000.0], accepted one value"),
        ("text_config.rope_parameters", {"factor": 32}, "{'factor': (64.0, 32)}, accepted the same values in both"),
        ("text_config.num_experts_per_tok", 17, "num_experts_per_tok: got 17, accepted 1 to 16"),
        ("text_config.n_routed_experts", 513, "n_routed_experts: got 513, accepted 1 to 512"),
        ("text_config.rope_scaling.factor", "64", "yarn.factor: got 64, accepted a number > 0"),
        ("text_config.rms_norm_eps", None, "rms_norm_eps: got None, accepted a number > 0"),
        ("text_config.num_hidden_layers", 0, "num_hidden_layers: got 0, accepted an int >= 1"),
        ("text_config.vocab_size", 1000, "tokens.media_pad: got 163605, accepted an id below vocab_size 1000"),
        ("tie_word_embeddings", True, "tie_word_embeddings: got True, accepted False; Kimi-K2.5's head is untied"),
        ("model_type", "llava", "model_type: got 'llava', accepted 'kimi_k25'"),
    ],
)
def test_what_is_not_kimi_k25_is_refused(path: str, value: Any, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KimiK25Config.from_hf_config(changed(path, value))
    assert error in str(caught.value)


def test_presets_and_their_tokens() -> None:
    with pytest.raises(ConfigError, match="got 'large', accepted tiny, small, moonlight, k25"):
        preset("large")
    tokens = preset("tiny").tokens
    released = TokenIds.released()
    by_released_id = sorted(SPECIAL_NAMES, key=lambda name: getattr(released, name))
    assert [getattr(tokens, name) for name in by_released_id] == list(range(256, 256 + len(by_released_id)))
    assert tokens.stop == (tokens.eos, tokens.im_end)
    assert released.stop == (released.eos, released.im_end)
