"""Reads config.json: the released names (remote code) and those of transformers' Kimi_K25Config, each checked."""

from collections.abc import Mapping
from typing import Any

from k25sys.errors import ConfigError, listing, message
from k25sys.models.config import TextConfig, TokenIds, VisionConfig, YarnConfig
from k25sys.special_tokens import RELEASED_SPECIAL_IDS, RELEASED_VOCABULARY, SPECIAL_NAMES

_OP = "from_hf_config"

# What the architecture fixes: a config that says otherwise describes another model. Absent fields are not checked.
_TEXT_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("kimi_k2", "deepseek_v3"),
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "n_group": (1,),
    "topk_group": (1,),
    "norm_topk_prob": (True,),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "rope_interleave": (True,),
    "tie_word_embeddings": (False,),
}
_VISION_FIXED: dict[str, tuple[Any, ...]] = {
    "pos_emb_type": ("divided_fixed",),
    "merge_type": ("sd2_tpool",),
    "video_attn_type": ("spatial_temporal",),
    "mm_projector_type": ("patchmerger",),
    "projector_hidden_act": ("gelu",),
    "hidden_act": ("gelu_pytorch_tanh",),
}
_TEXT_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "first_k_dense_replace", "routed_scaling_factor",
    "max_position_embeddings", "rms_norm_eps", "initializer_range",
)  # fmt: skip
_VISION_SIZES = {
    "hidden_size": ("vt_hidden_size", "hidden_size"),
    "intermediate_size": ("vt_intermediate_size", "intermediate_size"),
    "num_hidden_layers": ("vt_num_hidden_layers", "num_hidden_layers"),
    "num_attention_heads": ("vt_num_attention_heads", "num_attention_heads"),
    "patch_size": ("patch_size",),
    "position_height": ("init_pos_emb_height", "pos_emb_height"),
    "position_width": ("init_pos_emb_width", "pos_emb_width"),
    "max_frames": ("init_pos_emb_time", "pos_emb_time"),
    "merge_kernel_size": ("merge_kernel_size",),
}
_YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_MISSING = object()


def read_hf_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of KimiK25Config; see KimiK25Config.from_hf_config."""
    if not isinstance(config, Mapping):
        raise ConfigError(
            message(_OP, "config", type(config).__name__, "a dict: config.json, or .to_dict() of a config")
        )
    _check_fixed("", config, {"model_type": ("kimi_k25",), "tie_word_embeddings": (False,)})
    text = _section(config, "text_config")
    vision = _section(config, "vision_config")
    read_text = _read_text(text)
    return {
        "text": read_text,
        "vision": _read_vision(config, vision, read_text),
        "tokens": _read_tokens(config, text, read_text.vocab_size),
    }


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise ConfigError(message(_OP, name, type(section).__name__, "a dict", "read the config of the whole model"))
    return section


def _check_fixed(section: str, config: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for name, accepted in fixed.items():
        value = config.get(name)
        if value is not None and value not in accepted:
            hint = "this is another architecture"
            if name == "tie_word_embeddings":
                hint = "Kimi-K2.5's head is untied; transformers' config class says True unless told otherwise"
            raise ConfigError(message(_OP, section + name, repr(value), " or ".join(map(repr, accepted)), hint))


def _one_of(section: str, config: Mapping[str, Any], names: tuple[str, ...], default: Any = _MISSING) -> Any:
    """The value under any of `names`; two of them that differ are a contradiction."""
    found = {name: config[name] for name in names if name in config}
    if not found:
        if default is _MISSING:
            raise ConfigError(message(_OP, section + names[0], "nothing", f"a value under {' or '.join(names)}"))
        return default
    first, *others = found.values()
    if any(value != first for value in others):
        raise ConfigError(message(_OP, section.rstrip(".") or "config", found, "one value"))
    return first


def _read_text(text: Mapping[str, Any]) -> TextConfig:
    _check_fixed("text_config.", text, _TEXT_FIXED)
    sizes = {name: _one_of("text_config.", text, (name,)) for name in _TEXT_SIZES}
    heads = text.get("num_key_value_heads")
    if heads not in (None, sizes["num_attention_heads"]):
        accepted = f"num_attention_heads {sizes['num_attention_heads']}"
        raise ConfigError(message(_OP, "text_config.num_key_value_heads", heads, accepted))
    theta, yarn = _read_rope(text)
    return TextConfig(**sizes, rope_theta=theta, yarn=yarn)


def _read_rope(text: Mapping[str, Any]) -> tuple[float, YarnConfig | None]:
    """rope_theta beside rope_scaling (released), or both in rope_parameters (transformers 5)."""
    rope = text.get("rope_parameters") or {}
    scaling = text.get("rope_scaling") or {}
    differ = {name: (value, rope[name]) for name, value in scaling.items() if rope.get(name, value) != value}
    if differ:
        raise ConfigError(message(_OP, "text_config.rope_scaling, rope_parameters", differ, "the same values in both"))
    scaling = {**rope, **scaling}
    thetas = {value for value in (text.get("rope_theta"), rope.get("rope_theta")) if value is not None}
    if len(thetas) != 1:
        got = sorted(thetas) or "nothing"
        raise ConfigError(message(_OP, "text_config.rope_theta", got, "one value, there or in rope_parameters"))
    theta = thetas.pop()
    kind = _one_of("text_config.rope_scaling.", scaling, ("rope_type", "type"), "default")
    if kind == "default":
        return float(theta), None
    if kind != "yarn":
        raise ConfigError(message(_OP, "text_config.rope_scaling.type", repr(kind), "'yarn' or 'default'"))
    if scaling.get("attention_factor") is not None or scaling.get("truncate", True) is not True:
        got = {name: scaling[name] for name in ("attention_factor", "truncate") if name in scaling}
        raise ConfigError(message(_OP, "text_config.rope_scaling", got, "neither of these fields"))
    # The remote code and transformers agree on the defaults of the betas, not on those of the mscales.
    defaults = {"beta_fast": 32, "beta_slow": 1}
    values = {n: _one_of("text_config.rope_scaling.", scaling, (n,), defaults.get(n, _MISSING)) for n in _YARN}
    return float(theta), YarnConfig(**values)


def _read_vision(config: Mapping[str, Any], vision: Mapping[str, Any], text: TextConfig) -> VisionConfig:
    _check_fixed("vision_config.", vision, _VISION_FIXED)
    sizes = {name: _one_of("vision_config.", vision, names) for name, names in _VISION_SIZES.items()}
    sizes["merge_kernel_size"] = tuple(sizes["merge_kernel_size"])
    rope = vision.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") != "axial":
        raise ConfigError(message(_OP, "vision_config.rope_parameters.rope_type", rope["rope_type"], "'axial'"))
    # The released config keeps the projector's fields in vision_config, transformers beside it.
    for section, fields, name, want in (
        ("vision_config.", vision, "mm_hidden_size", sizes["hidden_size"]),
        ("vision_config.", vision, "text_hidden_size", text.hidden_size),
        ("", config, "projection_hidden_size", sizes["hidden_size"]),
    ):
        if fields.get(name) not in (None, want):
            raise ConfigError(message(_OP, section + name, fields[name], f"{want}, the size it is projected with"))
    eps = _one_of("vision_config.", vision, ("projector_ln_eps",), config.get("projection_layer_norm_eps", 1e-5))
    return VisionConfig(**sizes, projector_norm_eps=eps, rope_theta=float(rope.get("rope_theta", 10000.0)))


def _read_tokens(config: Mapping[str, Any], text: Mapping[str, Any], vocab_size: int) -> TokenIds:
    """The ids under special_token_ids; without it, the released table for the released vocabulary, and for another one
    the ids that Hugging Face's fields name."""
    media_pad = _one_of("", config, ("media_placeholder_token_id", "image_token_id"))
    both = {**{name: value for name, value in text.items() if value is not None}, **config}
    eos = both.get("eos_token_id")
    stop = tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,)
    table = config.get("special_token_ids")
    if table is not None:
        return _read_table(table, media_pad, stop)
    if vocab_size == RELEASED_VOCABULARY and media_pad == RELEASED_SPECIAL_IDS["media_pad"]:
        return TokenIds.released()
    named = {
        "bos": both.get("bos_token_id"), "pad": both.get("pad_token_id"),
        "media_begin": config.get("vision_start_token_id"), "media_end": config.get("vision_end_token_id"),
    }  # fmt: skip
    # transformers fills what a small vocabulary does not name with ids of the released one: they are no tokens of it.
    outside = range(vocab_size, RELEASED_VOCABULARY + 1)
    inside = {name: None if value in outside else value for name, value in named.items()}
    stop = tuple(token for token in stop if token not in outside)
    return TokenIds.only(stop, **inside, media_pad=media_pad, eos=stop[0] if stop else None)


def _read_table(table: Any, media_pad: Any, stop: tuple[Any, ...]) -> TokenIds:
    if not isinstance(table, Mapping):
        raise ConfigError(message(_OP, "special_token_ids", type(table).__name__, "a dict of names and ids"))
    unknown = [name for name in table if name not in SPECIAL_NAMES]
    if unknown:
        raise ConfigError(message(_OP, "special_token_ids", listing(map(repr, unknown)), ", ".join(SPECIAL_NAMES)))
    if table.get("media_pad") != media_pad:
        accepted = f"{media_pad}, which the config names beside it"
        raise ConfigError(message(_OP, "special_token_ids.media_pad", table.get("media_pad"), accepted))
    return TokenIds.only(stop, **table)
