"""The ops of k25sys. Each has faces that agree: `reference_*` in plain torch, the CPU kernel, and the CUDA
kernel, which tests/cuda_on_cpu also runs without a device.

Shape suffixes: T tokens, E experts, K top-k, D model dimension, I expert width, G = 2I, M = T * K rows, V vocabulary,
P patches, N clips, Q pooled tokens of C patches.
"""

from k25sys.ops import backends
from k25sys.ops.combine import combine, reference_combine
from k25sys.ops.dispatch import dispatch, reference_dispatch
from k25sys.ops.experts import WeightGrads, expert_mlp, reference_expert_mlp
from k25sys.ops.fp8_gemm import (
    fp8_gemm,
    fp8_grouped_gemm,
    fp8_grouped_gemm_wgrad,
    reference_fp8_gemm,
    reference_fp8_grouped_gemm,
    reference_fp8_grouped_gemm_wgrad,
)
from k25sys.ops.grouped_gemm import (
    grouped_gemm,
    grouped_gemm_wgrad,
    reference_grouped_gemm,
    reference_grouped_gemm_wgrad,
)
from k25sys.ops.linear_loss import (
    linear_clipped_log_ratio_loss,
    linear_cross_entropy,
    reference_linear_clipped_log_ratio_loss,
    reference_linear_cross_entropy,
)
from k25sys.ops.measure import peak_flops, record_phases
from k25sys.ops.packed_experts import PackedExperts
from k25sys.ops.plan_dispatch import DispatchPlan, plan_dispatch, reference_plan_dispatch
from k25sys.ops.policy_loss import (
    clipped_log_ratio_loss,
    reference_clipped_log_ratio_loss,
    reference_vocab_parallel_clipped_log_ratio_loss,
    vocab_parallel_clipped_log_ratio_loss,
)
from k25sys.ops.pool_temporal_patches import pool_temporal_patches, reference_pool_temporal_patches
from k25sys.ops.quantize_fp8 import (
    dequantize_fp8,
    quantize_fp8,
    quantize_fp8_both_ways,
    reference_dequantize_fp8,
    reference_quantize_fp8,
    reference_transpose_fp8,
    transpose_fp8,
)
from k25sys.ops.route_tokens import reference_route_tokens, route_tokens
from k25sys.ops.swiglu import reference_swiglu, swiglu

__all__ = [
    "DispatchPlan",
    "PackedExperts",
    "WeightGrads",
    "backends",
    "clipped_log_ratio_loss",
    "combine",
    "dequantize_fp8",
    "dispatch",
    "expert_mlp",
    "fp8_gemm",
    "fp8_grouped_gemm",
    "fp8_grouped_gemm_wgrad",
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "linear_clipped_log_ratio_loss",
    "linear_cross_entropy",
    "peak_flops",
    "plan_dispatch",
    "pool_temporal_patches",
    "quantize_fp8",
    "quantize_fp8_both_ways",
    "record_phases",
    "reference_clipped_log_ratio_loss",
    "reference_combine",
    "reference_dequantize_fp8",
    "reference_dispatch",
    "reference_expert_mlp",
    "reference_fp8_gemm",
    "reference_fp8_grouped_gemm",
    "reference_fp8_grouped_gemm_wgrad",
    "reference_grouped_gemm",
    "reference_grouped_gemm_wgrad",
    "reference_linear_clipped_log_ratio_loss",
    "reference_linear_cross_entropy",
    "reference_plan_dispatch",
    "reference_pool_temporal_patches",
    "reference_quantize_fp8",
    "reference_route_tokens",
    "reference_swiglu",
    "reference_transpose_fp8",
    "reference_vocab_parallel_clipped_log_ratio_loss",
    "route_tokens",
    "swiglu",
    "transpose_fp8",
    "vocab_parallel_clipped_log_ratio_loss",
]
