"""What a Kimi-K2.5 model is: the sizes of its language model, of its vision encoder, and its special tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from k25sys.errors import ConfigError, message
from k25sys.ops.checks import MAX_EXPERTS, MAX_TOP_K
from k25sys.special_tokens import RELEASED_SPECIAL_IDS, SPECIAL_NAMES, SpecialTable


@dataclass(frozen=True, kw_only=True)
class TokenIds(SpecialTable[int | None]):
    """Ids of the special tokens. None: the vocabulary has no such token."""

    stop: tuple[int, ...]
    """Generation ends with any of these."""

    @classmethod
    def released(cls) -> "TokenIds":
        """Those of the released vocabulary of 163,840."""
        return cls(**RELEASED_SPECIAL_IDS, stop=(RELEASED_SPECIAL_IDS["eos"], RELEASED_SPECIAL_IDS["im_end"]))

    @classmethod
    def consecutive(cls, first: int) -> "TokenIds":
        """Ids from `first` on in the order of SPECIAL_NAMES: for a small vocabulary whose first ids are plain bytes."""
        ids = {name: first + i for i, name in enumerate(SPECIAL_NAMES)}
        return cls(**ids, stop=(ids["eos"], ids["im_end"]))

    @classmethod
    def only(cls, stop: tuple[int, ...], **named: int | None) -> "TokenIds":
        """These ids, and None for every other."""
        return cls(**{**dict.fromkeys(SPECIAL_NAMES), **named}, stop=stop)

    def named(self) -> dict[str, int]:
        """The tokens that the vocabulary has."""
        ids = {name: getattr(self, name) for name in SPECIAL_NAMES}
        return {name: token for name, token in ids.items() if token is not None}


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN: how rotary frequencies are stretched past the original context (spec: `rope_scaling`)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float

    def __post_init__(self) -> None:
        for name in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            _require(isinstance(value, (int, float)) and value > 0, f"yarn.{name}", value, "a number > 0")
        _require(self.factor >= 1, "yarn.factor", self.factor, "a number >= 1")
        _require_counts(self, "original_max_position_embeddings")
        rising = self.beta_slow < self.beta_fast
        _require(rising, "yarn.beta_slow, beta_fast", (self.beta_slow, self.beta_fast), "beta_slow < beta_fast")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The language model (K2): DeepSeek-V3's architecture without expert groups; names are those of its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width of the SwiGLU of the first, dense layers."""
    moe_intermediate_size: int
    """Width of one expert."""
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    """None: queries come from one projection, q_proj (Moonlight)."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    """The shared experts are one SwiGLU of width n_shared_experts * moe_intermediate_size."""
    first_k_dense_replace: int
    """The number of dense layers before the first mixture of experts."""
    routed_scaling_factor: float
    rope_theta: float
    yarn: YarnConfig | None
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    """Of every RMSNorm but the two on latents, which use `latent_norm_eps`."""
    latent_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        _require_counts(
            self, "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
            "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
            "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "max_position_embeddings",
        )  # fmt: skip
        if self.q_lora_rank is not None:
            _require_counts(self, "q_lora_rank")
        _require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", self.qk_rope_head_dim, "an even number")
        _require(self.n_routed_experts <= MAX_EXPERTS, "n_routed_experts", self.n_routed_experts, f"1 to {MAX_EXPERTS}")
        most = min(MAX_TOP_K, self.n_routed_experts)
        _require(self.num_experts_per_tok <= most, "num_experts_per_tok", self.num_experts_per_tok, f"1 to {most}")
        dense = self.first_k_dense_replace
        _require(
            isinstance(dense, int) and 0 <= dense <= self.num_hidden_layers,
            "first_k_dense_replace",
            dense,
            f"0 to {self.num_hidden_layers}",
        )
        for name in ("routed_scaling_factor", "rope_theta", "rms_norm_eps", "latent_norm_eps", "initializer_range"):
            value = getattr(self, name)
            _require(isinstance(value, (int, float)) and value > 0, name, value, "a number > 0")

    @property
    def qk_head_dim(self) -> int:
        """Channels of one head's query."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """MoonViT-3D and the projector."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    patch_size: int = 14
    position_height: int = 64
    """Rows of the learned grid of positions."""
    position_width: int = 64
    max_frames: int = 4
    """Rows of the temporal table: the longest clip."""
    merge_kernel_size: tuple[int, int] = (2, 2)
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    projector_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _require_counts(
            self, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size",
            "position_height", "position_width", "max_frames",
        )  # fmt: skip
        heads, hidden = self.num_attention_heads, self.hidden_size
        _require(hidden % (4 * heads) == 0, "hidden_size", hidden, f"a multiple of 4 x {heads} heads (2-D rotations)")
        merge = self.merge_kernel_size
        _require(len(merge) == 2 and min(merge) >= 1, "merge_kernel_size", merge, "two counts >= 1")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def merged_size(self) -> int:
        """Channels of one neighbourhood of patches, the projector's input."""
        return self.hidden_size * self.merge_kernel_size[0] * self.merge_kernel_size[1]


@dataclass(frozen=True, kw_only=True)
class KimiK25Config:
    """A Kimi-K2.5 model. `vision` None is a language model alone."""

    text: TextConfig
    vision: VisionConfig | None
    tokens: TokenIds = field(default_factory=TokenIds.released)

    def __post_init__(self) -> None:
        vocabulary = self.text.vocab_size
        ids = self.tokens.named() | {f"stop[{i}]": token for i, token in enumerate(self.tokens.stop)}
        for name, token in ids.items():
            inside = isinstance(token, int) and not isinstance(token, bool) and 0 <= token < vocabulary
            _require(inside, f"tokens.{name}", token, f"an id below vocab_size {vocabulary}")
        if self.vision is not None:
            _require(self.tokens.media_pad is not None, "tokens.media_pad", None, "an id, beside a vision encoder")

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> "KimiK25Config":
        """Reads the released config.json, or the dict of transformers' Kimi_K25Config.

        Sizes are never guessed: one that is missing, unknown or contradicts the architecture is an error. Keys that do
        not describe the architecture (dtype, auto_map, quantization_config, ...) are not read.

        Raises:
            ConfigError: with the field, what it holds, and what is accepted.
        """
        from k25sys.models.hf_config import read_hf_config

        return cls(**read_hf_config(config))


def _require(holds: bool, name: str, got: object, accepted: str, hint: str = "") -> None:
    if not holds:
        raise ConfigError(message("KimiK25Config", name, got, accepted, hint))


def _require_counts(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(isinstance(value, int) and not isinstance(value, bool) and value >= 1, name, value, "an int >= 1")
