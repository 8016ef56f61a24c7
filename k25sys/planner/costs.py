"""FLOPs and bytes of every part of a Kimi-K2.5 model, from its sizes alone.

Of products only: 2 m n k each. A backward needs the products of the inputs' and of the weights' gradients, as many
FLOPs as the forward each; attention's scores and values have no weights: all of their backward is the inputs'.
"""

from dataclasses import dataclass

from k25sys.models.config import KimiK25Config, TextConfig, VisionConfig


@dataclass(frozen=True, kw_only=True)
class Work:
    """FLOPs of a forward by the kind of product, and bytes that pass through memory beside them."""

    gemm: float = 0.0
    grouped_gemm: float = 0.0
    attention: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            gemm=self.gemm + other.gemm,
            grouped_gemm=self.grouped_gemm + other.grouped_gemm,
            attention=self.attention + other.attention,
            bytes=self.bytes + other.bytes,
        )

    def __mul__(self, factor: float) -> "Work":
        return Work(
            gemm=self.gemm * factor,
            grouped_gemm=self.grouped_gemm * factor,
            attention=self.attention * factor,
            bytes=self.bytes * factor,
        )

    @property
    def flops(self) -> float:
        """All products of the forward."""
        return self.gemm + self.grouped_gemm + self.attention


def attention_work(text: TextConfig, sequence: int) -> Work:
    """MLA, per token of a causal sequence of this length."""
    dim, heads, rank = text.hidden_size, text.num_attention_heads, text.q_lora_rank
    query_width = heads * text.qk_head_dim
    queries = dim * query_width if rank is None else dim * rank + rank * query_width
    latents = dim * (text.kv_lora_rank + text.qk_rope_head_dim)
    expanded = text.kv_lora_rank * heads * (text.qk_nope_head_dim + text.v_head_dim)
    out = heads * text.v_head_dim * dim
    pairs = (sequence + 1) / 2
    # Two norms and two residual sums read and write rows of the model's width; rotation passes over queries and keys.
    passes = 8 * dim + 3 * (rank or 0) + 3 * text.kv_lora_rank + 8 * query_width
    return Work(
        gemm=2.0 * (queries + latents + expanded + out),
        attention=2.0 * pairs * heads * (text.qk_head_dim + text.v_head_dim),
        bytes=2.0 * passes,
    )


def dense_mlp_work(text: TextConfig) -> Work:
    """The SwiGLU of a first, dense layer, per token."""
    return Work(gemm=6.0 * text.hidden_size * text.intermediate_size, bytes=2.0 * 3 * text.intermediate_size)


def experts_work(text: TextConfig) -> Work:
    """Router, routed and shared experts of a layer, per token."""
    dim, width = text.hidden_size, text.moe_intermediate_size
    rows = 2 * text.num_experts_per_tok * dim + 3 * text.num_experts_per_tok * width
    shared = text.n_shared_experts * width
    return Work(
        gemm=2.0 * dim * text.n_routed_experts + 6.0 * dim * shared,
        grouped_gemm=6.0 * dim * width * text.num_experts_per_tok,
        bytes=2.0 * (rows + 3 * shared),
    )


def layer_work(text: TextConfig, index: int, sequence: int) -> Work:
    """Decoder layer `index`, per token."""
    mlp = dense_mlp_work(text) if index < text.first_k_dense_replace else experts_work(text)
    return attention_work(text, sequence) + mlp


def head_work(text: TextConfig) -> Work:
    """The head and the loss, per token."""
    return Work(gemm=2.0 * text.hidden_size * text.vocab_size, bytes=2.0 * 4 * text.hidden_size)


def text_work(text: TextConfig, sequence: int) -> Work:
    """The whole language model, per token."""
    total = head_work(text)
    for index in range(text.num_hidden_layers):
        total = total + layer_work(text, index, sequence)
    return total


def vision_work(vision: VisionConfig, text_dim: int, grid: tuple[int, int, int]) -> Work:
    """Encoder and projector, for one clip (t, h, w)."""
    t, h, w = grid
    patches, dim = t * h * w, vision.hidden_size
    blocks = 2.0 * (4 * dim * dim + 2 * dim * vision.intermediate_size) * vision.num_hidden_layers
    embedding = 2.0 * 3 * vision.patch_size**2 * dim
    merged = vision.merged_size
    merge_h, merge_w = vision.merge_kernel_size
    rows = h * w / (merge_h * merge_w)
    return Work(
        gemm=patches * (blocks + embedding) + rows * 2.0 * merged * (merged + text_dim),
        attention=4.0 * patches * patches * dim * vision.num_hidden_layers,
        bytes=2.0 * patches * vision.num_hidden_layers * (16 * dim + 2 * vision.intermediate_size),
    )


def newton_schulz_flops(rows: int, columns: int, steps: int = 5) -> float:
    """Of Muon's orthogonalisation of one matrix: X X^T, its square, and their product with X, each step."""
    n, m = min(rows, columns), max(rows, columns)
    return steps * (4.0 * n * n * m + 2.0 * n**3)


@dataclass(frozen=True, kw_only=True)
class LayerParameters:
    """Parameters of one layer: those that every expert-parallel rank holds, and those that they share out."""

    dense: int
    expert: int


def layer_parameters(text: TextConfig, index: int) -> LayerParameters:
    """Decoder layer `index`."""
    dim, heads, rank = text.hidden_size, text.num_attention_heads, text.q_lora_rank
    query_width = heads * text.qk_head_dim
    queries = dim * query_width if rank is None else dim * rank + rank + rank * query_width
    latents = dim * (text.kv_lora_rank + text.qk_rope_head_dim) + text.kv_lora_rank
    expanded = text.kv_lora_rank * heads * (text.qk_nope_head_dim + text.v_head_dim)
    attention = queries + latents + expanded + heads * text.v_head_dim * dim + 2 * dim
    if index < text.first_k_dense_replace:
        return LayerParameters(dense=attention + 3 * dim * text.intermediate_size, expert=0)
    width = text.moe_intermediate_size
    router = text.n_routed_experts * (dim + 1)
    shared = 3 * dim * text.n_shared_experts * width
    return LayerParameters(dense=attention + router + shared, expert=text.n_routed_experts * 3 * dim * width)


def edge_parameters(text: TextConfig) -> tuple[int, int]:
    """What the first stage has beside its layers (the embedding), and the last (norm and head)."""
    table = text.vocab_size * text.hidden_size
    return table, table + text.hidden_size


def vision_parameters(config: KimiK25Config) -> int:
    """Encoder and projector; 0 without vision."""
    vision = config.vision
    if vision is None:
        return 0
    dim, mlp = vision.hidden_size, vision.intermediate_size
    block = 4 * dim * dim + 4 * dim + 2 * dim * mlp + mlp + dim + 4 * dim
    embedding = 3 * vision.patch_size**2 * dim + dim + vision.position_height * vision.position_width * dim
    merged, text_dim = vision.merged_size, config.text.hidden_size
    projector = 2 * dim + merged * merged + merged + merged * text_dim + text_dim
    return vision.num_hidden_layers * block + embedding + 2 * dim + projector
