"""config.json of a saved model, in the released form and in that of transformers' Kimi_K25Config."""

from types import MappingProxyType
from typing import Any

import torch

from k25sys.checkpoint.int4 import GROUP
from k25sys.errors import ConfigError, message
from k25sys.models.config import KimiK25Config, TokenIds, VisionConfig
from k25sys.special_tokens import RELEASED_VOCABULARY

_ROPE_THETA = 10000.0  # of the encoder's rotations; the released form says it nowhere
CONFIG = "config.json"
LAYOUTS = ("released", "transformers")
_VISION_FIELDS = MappingProxyType({  # which only the layout's own readers know
    "released": (
        "vt_hidden_size", "vt_intermediate_size", "vt_num_hidden_layers", "vt_num_attention_heads",
        "init_pos_emb_height", "init_pos_emb_width", "init_pos_emb_time",
    ),
    "transformers": (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "pos_emb_height", "pos_emb_width", "pos_emb_time",
    ),
})  # fmt: skip


def config_json(config: KimiK25Config, layout: str, *, dtype: torch.dtype, int4: bool) -> dict[str, Any]:
    """What config.json says of a model.

    Args:
        config: the model; it has a vision encoder.
        layout: "released" or "transformers".
        dtype: of the tensors.
        int4: whether the experts are packed.

    Raises:
        ConfigError: a model that neither form can describe.
    """
    if config.vision is None:
        raise ConfigError(message("save_hf", "config.vision", None, "a vision encoder, which both layouts have"))
    for name, value, fixed in (
        ("text.latent_norm_eps", config.text.latent_norm_eps, 1e-6),
        ("vision.norm_eps", config.vision.norm_eps, 1e-5),
    ):
        if value != fixed:
            raise ConfigError(message("save_hf", f"config.{name}", value, f"{fixed}, which config.json cannot change"))
    released = layout == "released"
    text: dict[str, Any] = {
        **_text(config),
        "model_type": "kimi_k2" if released else "deepseek_v3",
        "dtype": str(dtype).removeprefix("torch."),
    }
    rope = _rope(config)
    if released:
        text |= {"rope_theta": config.text.rope_theta, "rope_scaling": rope}
        text |= {"quantization_config": quantization_config()} if int4 else {}
    else:
        text["rope_parameters"] = {**(rope or {"rope_type": "default"}), "rope_theta": config.text.rope_theta}
        text["rope_parameters"].pop("type", None)
    return {
        "architectures": ["KimiK25ForConditionalGeneration" if released else "Kimi_K25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "dtype": text["dtype"],
        "tie_word_embeddings": False,
        "text_config": text,
        **_special_token_ids(config),
        **(_released_vision if released else _transformers_vision)(config, config.vision),
    }


def layout_of(described: dict[str, Any]) -> str | None:
    """In whose words a config.json describes the vision encoder; None for those of both, or of neither."""
    names = described["vision_config"].keys()
    words = [layout for layout, fields in _VISION_FIELDS.items() if names >= set(fields)]
    strangers = [layout for layout, fields in _VISION_FIELDS.items() if names & set(fields)]
    return words[0] if words == strangers and len(words) == 1 else None


def quantization_config() -> dict[str, Any]:
    """How the experts are packed, in the words of compressed-tensors."""
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False,
        "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {},
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None,
            }
        },
        "ignore": [
            "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        ],
    }  # fmt: skip


def _text(config: KimiK25Config) -> dict[str, Any]:
    text, tokens = config.text, config.tokens
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
        "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
        "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "first_k_dense_replace", "routed_scaling_factor",
        "max_position_embeddings", "rms_norm_eps", "initializer_range",
    )  # fmt: skip
    return {
        **{name: getattr(text, name) for name in same},
        "num_key_value_heads": text.num_attention_heads,
        "num_nextn_predict_layers": 0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "moe_layer_freq": 1,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": tokens.bos,
        "eos_token_id": list(tokens.stop) if len(tokens.stop) > 1 else next(iter(tokens.stop), None),
        "pad_token_id": tokens.pad,
    }


def _special_token_ids(config: KimiK25Config) -> dict[str, Any]:
    """Every special token by name, unless they are those of the released vocabulary: of most of them neither layout has
    a field, since there they are known."""
    if config.text.vocab_size == RELEASED_VOCABULARY and config.tokens == TokenIds.released():
        return {}
    return {"special_token_ids": config.tokens.named()}


def _rope(config: KimiK25Config) -> dict[str, Any] | None:
    yarn = config.text.yarn
    if yarn is None:
        return None
    names = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    return {"type": "yarn", "rope_type": "yarn", **{name: getattr(yarn, name) for name in names}}


def _released_vision(config: KimiK25Config, vision: VisionConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "model_type": "kimi_k25",
        "patch_size": vision.patch_size,
        "init_pos_emb_height": vision.position_height,
        "init_pos_emb_width": vision.position_width,
        "init_pos_emb_time": vision.max_frames,
        "pos_emb_type": "divided_fixed",
        "vt_num_attention_heads": vision.num_attention_heads,
        "vt_num_hidden_layers": vision.num_hidden_layers,
        "vt_hidden_size": vision.hidden_size,
        "vt_intermediate_size": vision.intermediate_size,
        "merge_kernel_size": list(vision.merge_kernel_size),
        "merge_type": "sd2_tpool",
        "video_attn_type": "spatial_temporal",
        "mm_projector_type": "patchmerger",
        "mm_hidden_size": vision.hidden_size,
        "text_hidden_size": config.text.hidden_size,
        "projector_hidden_act": "gelu",
        "projector_ln_eps": vision.projector_norm_eps,
    }
    if vision.rope_theta != _ROPE_THETA:
        fields["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision.rope_theta}
    top = {
        "media_placeholder_token_id": config.tokens.media_pad,
        "use_unified_vision_chunk": True,
        "ignore_index": -100,
    }
    return {"vision_config": fields, **top}


def _transformers_vision(config: KimiK25Config, vision: VisionConfig) -> dict[str, Any]:
    fields = {
        "model_type": "kimi_k25_vision",
        "patch_size": vision.patch_size,
        "pos_emb_height": vision.position_height,
        "pos_emb_width": vision.position_width,
        "pos_emb_time": vision.max_frames,
        "num_attention_heads": vision.num_attention_heads,
        "num_hidden_layers": vision.num_hidden_layers,
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "hidden_act": "gelu_pytorch_tanh",
        "merge_kernel_size": list(vision.merge_kernel_size),
        "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
    }
    top = {
        "projection_hidden_size": vision.hidden_size,
        "projection_layer_norm_eps": vision.projector_norm_eps,
        "image_token_id": config.tokens.media_pad,
    }
    marks = {"vision_start_token_id": config.tokens.media_begin, "vision_end_token_id": config.tokens.media_end}
    return {"vision_config": fields, **top, **{name: token for name, token in marks.items() if token is not None}}
