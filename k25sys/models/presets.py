"""Named models: two small ones, the shape of Moonlight-16B-A3B, and Kimi-K2.5 itself."""

from k25sys.errors import ConfigError, message
from k25sys.models.config import KimiK25Config, TextConfig, TokenIds, VisionConfig, YarnConfig

# K2.5's stretch of 4,096 positions to 262,144.
_YARN = YarnConfig(
    factor=64.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0
)
# MoonViT-3D, initialised from SigLIP-SO-400M.
_MOONVIT = VisionConfig(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16)
_FIRST_SPECIAL_ID = 256  # of the byte-level vocabulary

# routed_scaling_factor is the mean of 1 / |p| over normal logits, p the renormalised top-k scores (Muon is Scalable,
# appendix C): 2.827 for 8 of 384, 2.446 for 6 of 64, 1.997 for 4 of 32, 1.409 for 2 of 8.


def preset(name: str) -> KimiK25Config:
    """The model called `name`: tiny, small, moonlight or k25.

    tiny: a training step takes a fraction of a second on one CPU core; byte-level vocabulary of 512.
    small: about 100 million parameters, byte-level vocabulary of 512.
    moonlight: Moonlight-16B-A3B (Muon is Scalable, table 7), the text decoder of K2.5's ViT training, with MoonViT-3D.
    k25: Kimi-K2.5 as released.

    Raises:
        ConfigError: an unknown name.
    """
    presets = {"tiny": _tiny, "small": _small, "moonlight": _moonlight, "k25": _k25}
    if name not in presets:
        raise ConfigError(message("preset", "name", repr(name), ", ".join(presets)))
    return presets[name]()


def _tiny() -> KimiK25Config:
    text = TextConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.409,
        rope_theta=50000.0,
        yarn=_YARN,
        max_position_embeddings=262144,
    )
    vision = VisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    return KimiK25Config(text=text, vision=vision, tokens=TokenIds.consecutive(_FIRST_SPECIAL_ID))


def _small() -> KimiK25Config:
    text = TextConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=2048,
        moe_intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        q_lora_rank=256,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.997,
        rope_theta=50000.0,
        yarn=_YARN,
        max_position_embeddings=262144,
    )
    vision = VisionConfig(hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8)
    return KimiK25Config(text=text, vision=vision, tokens=TokenIds.consecutive(_FIRST_SPECIAL_ID))


def _moonlight() -> KimiK25Config:
    text = TextConfig(
        vocab_size=163840,
        hidden_size=2048,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        first_k_dense_replace=1,
        routed_scaling_factor=2.446,
        rope_theta=50000.0,
        yarn=None,
        max_position_embeddings=8192,
    )
    return KimiK25Config(text=text, vision=_MOONVIT)


def _k25() -> KimiK25Config:
    text = TextConfig(
        vocab_size=163840,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=64,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=384,
        num_experts_per_tok=8,
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=2.827,
        rope_theta=50000.0,
        yarn=_YARN,
        max_position_embeddings=262144,
    )
    return KimiK25Config(text=text, vision=_MOONVIT)
