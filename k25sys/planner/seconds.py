"""How long each part of a step takes on one GPU: FLOPs and bytes over the hardware's rates."""

from dataclasses import dataclass

from k25sys.models.config import VisionConfig
from k25sys.parallel.dep import EncoderCost
from k25sys.parallel.pipeline.placement import place_layers
from k25sys.planner.costs import Work, head_work, layer_work, newton_schulz_flops, vision_work
from k25sys.planner.hardware import Hardware
from k25sys.planner.request import PlanRequest

_KERNELS_PER_LAYER = 30
_KERNELS_PER_BLOCK = 15
_ATTENTION_BACKWARD = 2.5  # products of a fused backward over those of the forward: it forms the scores again
_REFERENCE_GRID = (1, 64, 64)  # of which the encoder's cost per patch is taken


def seconds(work: Work, hardware: Hardware, *, kernels: int = 0) -> float:
    """Products at their kind's rate, then what passes through memory, then the starts of kernels."""
    peak = hardware.peak_flops
    return (
        work.gemm / (peak * hardware.gemm_efficiency)
        + work.grouped_gemm / (peak * hardware.grouped_gemm_efficiency)
        + work.attention / (peak * hardware.attention_efficiency)
        + work.bytes / (hardware.memory_bandwidth * hardware.memory_efficiency)
        + kernels * hardware.call_latency
    )


@dataclass(frozen=True, kw_only=True)
class StageSeconds:
    """One micro-batch through one stage."""

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0
    exchange: float = 0.0
    """The experts' all-to-alls of a forward; a backward has as many."""

    def __add__(self, other: "StageSeconds") -> "StageSeconds":
        return StageSeconds(
            forward=self.forward + other.forward,
            backward_input=self.backward_input + other.backward_input,
            backward_weight=self.backward_weight + other.backward_weight,
            exchange=self.exchange + other.exchange,
        )

    def exposed(self, compute: float, *, overlapped: bool) -> float:
        """What of `exchange` is not hidden behind another micro-batch's `compute`."""
        return max(0.0, self.exchange - compute) if overlapped else self.exchange


def stage_layers(request: PlanRequest) -> tuple[range, ...]:
    """The layers of each stage: the contiguous partition whose slowest stage is fastest."""
    text = request.config.text
    costs = [sum_of(layer_seconds(request, index)) for index in range(text.num_hidden_layers)]
    return place_layers(costs, request.pp * request.vpp, last_extra=sum_of(head_seconds(request)))


def sum_of(stage: StageSeconds) -> float:
    """Forward and backward."""
    return stage.forward + stage.backward_input + stage.backward_weight


def layer_seconds(request: PlanRequest, index: int) -> StageSeconds:
    """Decoder layer `index`, for the tokens of one micro-batch that one GPU computes."""
    text, hardware = request.config.text, request.hardware
    work = layer_work(text, index, request.sequence) * request.local_tokens
    again = Work()
    if request.recompute == "selective":
        heads = text.num_attention_heads
        up = (text.q_lora_rank or 0) * heads * text.qk_head_dim
        up += text.kv_lora_rank * heads * (text.qk_nope_head_dim + text.v_head_dim)
        again = Work(gemm=2.0 * up, bytes=work.bytes / request.local_tokens / 2) * request.local_tokens
    links = _split_seconds(request)
    weights = Work(gemm=work.gemm, grouped_gemm=work.grouped_gemm, bytes=work.bytes / 2)
    inputs = Work(
        gemm=work.gemm,
        grouped_gemm=work.grouped_gemm,
        attention=work.attention * _ATTENTION_BACKWARD,
        bytes=work.bytes,
    )
    return StageSeconds(
        forward=seconds(work, hardware, kernels=_KERNELS_PER_LAYER) + links,
        backward_input=seconds(inputs + again, hardware, kernels=2 * _KERNELS_PER_LAYER) + links,
        backward_weight=seconds(weights, hardware, kernels=_KERNELS_PER_LAYER // 3),
        exchange=0.0 if index < text.first_k_dense_replace else _exchange_seconds(request),
    )


def head_seconds(request: PlanRequest) -> StageSeconds:
    """Head and loss: the gradient is formed in the forward (D7)."""
    once = seconds(head_work(request.config.text) * request.local_tokens, request.hardware, kernels=10)
    return StageSeconds(forward=3 * once)


def _exchange_seconds(request: PlanRequest) -> float:
    """Dispatch and combine of one layer: rows in bf16 to the ranks that hold their experts."""
    hardware, text, experts = request.hardware, request.config.text, request.ep
    if experts == 1:
        return 0.0
    near = min(experts, hardware.gpus_per_node)
    rows = request.local_tokens * text.num_experts_per_tok * text.hidden_size * 2.0
    inside = rows * (near - 1) / experts / (hardware.nvlink_bandwidth * hardware.link_efficiency)
    outside = rows * (experts - near) / experts / (hardware.network_bandwidth * hardware.link_efficiency)
    return 2 * (max(inside, outside) + hardware.message_latency)


def _split_seconds(request: PlanRequest) -> float:
    """What tensor and context parallelism exchange in one layer and direction."""
    hardware, text, tp, cp = request.hardware, request.config.text, request.tp, request.cp
    tokens, dim = request.sequence / cp, text.hidden_size
    total = 0.0
    if tp > 1:  # latents gathered, attention's and the mlp's outputs scattered, the mlp's input gathered
        latents = (text.q_lora_rank or dim) + text.kv_lora_rank + text.qk_rope_head_dim
        moved = tokens * 2.0 * (latents + 3 * dim) * (tp - 1) / tp
        total += moved / (hardware.nvlink_bandwidth * hardware.link_efficiency) + 4 * hardware.message_latency
    if cp > 1:
        near = tp * cp <= hardware.gpus_per_node
        link = hardware.nvlink_bandwidth if near else hardware.network_bandwidth
        moved = request.sequence * 2.0 * (text.kv_lora_rank + text.qk_rope_head_dim) * (cp - 1) / cp
        total += moved / (link * hardware.link_efficiency) + hardware.message_latency
    return total


def message_seconds(request: PlanRequest) -> float:
    """Activations of a micro-batch from one stage to the next."""
    hardware = request.hardware
    near = request.sizes.ranks_per_stage * 2 <= hardware.gpus_per_node
    link = hardware.nvlink_bandwidth if near else hardware.network_bandwidth
    moved = request.local_tokens * request.config.text.hidden_size * 2.0
    return moved / (link * hardware.link_efficiency) + hardware.message_latency


def encoder_cost(request: PlanRequest, vision: VisionConfig) -> EncoderCost:
    """Seconds of one forward of the encoder and projector over a pack."""
    t, h, w = _REFERENCE_GRID
    work = vision_work(vision, request.config.text.hidden_size, _REFERENCE_GRID)
    patches = t * h * w
    linear = Work(gemm=work.gemm / patches, bytes=work.bytes / patches)
    pairs = Work(attention=work.attention / patches**2)
    return EncoderCost(
        per_patch=seconds(linear, request.hardware),
        per_pair=seconds(pairs, request.hardware),
        per_pack=vision.num_hidden_layers * _KERNELS_PER_BLOCK * request.hardware.call_latency,
    )


def optimizer_seconds(request: PlanRequest, layers: list[int], parameters: float, shards: float) -> float:
    """Muon over the matrices of these layers, shared by the stage's ranks, and the passes over a rank's state."""
    text, hardware = request.config.text, request.hardware
    dim, heads = text.hidden_size, text.num_attention_heads
    flops = 0.0
    for index in layers:
        query_width = heads * text.qk_head_dim
        matrices = [
            (text.kv_lora_rank + text.qk_rope_head_dim, dim, 1),
            (heads * (text.qk_nope_head_dim + text.v_head_dim), text.kv_lora_rank, 1),
            (dim, heads * text.v_head_dim, 1),
        ]
        rank = text.q_lora_rank
        matrices += [(query_width, dim, 1)] if rank is None else [(rank, dim, 1), (query_width, rank, 1)]
        if index < text.first_k_dense_replace:
            matrices.append((dim, text.intermediate_size, 3))
        else:
            width = text.moe_intermediate_size
            matrices += [(dim, width, 3 * text.n_routed_experts), (dim, width * text.n_shared_experts, 3)]
        flops += sum(count * newton_schulz_flops(rows, columns) for rows, columns, count in matrices)
    products = flops / request.sizes.ranks_per_stage / (hardware.peak_flops * hardware.gemm_efficiency)
    passes = (20.0 * shards + 2.0 * parameters) / (hardware.memory_bandwidth * hardware.memory_efficiency)
    gathered = 4.0 * shards / (hardware.network_bandwidth * hardware.link_efficiency) if request.data > 1 else 0.0
    return products + passes + gathered
