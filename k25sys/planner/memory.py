"""Bytes that one GPU holds: weights, gradients, optimiser state as they are sharded, and what waits for a backward."""

from collections.abc import Callable
from dataclasses import dataclass, fields

from k25sys.models.config import TextConfig
from k25sys.parallel.pipeline.ir import Kind, Schedule

RECOMPUTE = ("none", "selective")
E4M3_BYTES = 1.0 + 4.0 / 128  # values, and a float32 scale for each 128
_BF16 = 2.0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by kind."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    embeddings: float = 0.0
    """Encoded media and their gradients."""
    buffers: float = 0.0
    """Exchanges, a chunk of logits, and, under DEP, the activations of one pack."""

    @property
    def total(self) -> float:
        """All of them."""
        return sum(getattr(self, item.name) for item in fields(self))


def parameter_memory(parameters: float, shards: int, *, adam: bool) -> Memory:
    """bf16 weights, float32 gradients; float32 master and momenta (one under Muon, two under AdamW) in `shards`."""
    return Memory(
        weights=2.0 * parameters, gradients=4.0 * parameters, optimizer=(12.0 if adam else 8.0) * parameters / shards
    )


def saved_bytes(text: TextConfig, index: int, recompute: str, *, ep: int) -> dict[str, float]:
    """What decoder layer `index` keeps of each token for its backward, in bfloat16, by name.

    "selective" is K2's list (section 2.4.3): norms, SwiGLU, MLA up-projections and MoE down-projections are computed
    again, and the inputs of the experts and of their SwiGLU are kept in E4M3. The outputs of MoE down-projections
    follow `ep` instead: on one expert-parallel rank ops.expert_mlp never keeps them, with several ops.combine keeps the
    rows that come home whatever `recompute` says (to compute them again would be another exchange). The same op keeps
    tokens where rows arrive from other ranks with several: one for each expert of a token.
    """
    dim, heads, rank = text.hidden_size, text.num_attention_heads, text.q_lora_rank or 0
    again = recompute == "selective"
    queries_keys_values = heads * (2 * text.qk_head_dim + text.v_head_dim)
    saved = {
        "residual stream": _BF16 * 2 * dim,
        "latents": _BF16 * (rank + text.kv_lora_rank + text.qk_rope_head_dim),
        "attention output": _BF16 * heads * text.v_head_dim + 4.0 * heads,
        "norms": 0.0 if again else _BF16 * (2 * dim + rank + text.kv_lora_rank),
        "mla_up": 0.0 if again else _BF16 * queries_keys_values,
    }
    if index < text.first_k_dense_replace:
        saved["swiglu inputs"] = (E4M3_BYTES if again else _BF16) * 2 * text.intermediate_size
        saved["swiglu"] = 0.0 if again else _BF16 * text.intermediate_size
        return saved
    width, top_k, shared = text.moe_intermediate_size, text.num_experts_per_tok, text.n_shared_experts
    stored = E4M3_BYTES if again else _BF16
    saved["router"] = 4.0 * text.n_routed_experts
    if ep > 1:
        saved["expert inputs"], saved["returned rows"] = stored * top_k * dim, _BF16 * top_k * dim
    elif again:
        saved["expert inputs"] = stored * dim  # else they are a norm's output, counted above
    saved["swiglu inputs"] = stored * 2 * width * (top_k + shared)
    saved["swiglu"] = 0.0 if again else _BF16 * shared * width  # the experts' own is never kept
    return saved


def peak_activations(schedule: Schedule, rank: int, bytes_of_stage: Callable[[int], float]) -> float:
    """The most that waits for a backward on a rank of the pipeline, at any time.

    A split backward frees its activations with the input's half; the weight's half keeps what it multiplies, at most as
    much as half of them.
    """
    held = peak = 0.0
    for action in schedule.actions[rank]:
        size = bytes_of_stage(action.stage)
        if action.kind is Kind.FORWARD:
            held += size
        elif action.kind is Kind.BACKWARD:
            held -= size
        elif action.kind in (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT):
            held -= size / 2
        peak = max(peak, held)
    return peak
