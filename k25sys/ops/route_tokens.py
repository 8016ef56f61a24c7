"""K2's router: sigmoid scores, a bias that selects and never weighs, the chosen scores renormalised and scaled."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k25sys.errors import ArgumentTypeError, ArgumentValueError, message
from k25sys.ops import checks, native

WEIGHT_EPSILON = 1e-20


def reference_route_tokens(logits_TE: Tensor, bias_E: Tensor, *, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
    """`route_tokens` in plain torch."""
    scores_TE = logits_TE.to(checks.routing_dtype(logits_TE.dtype)).sigmoid()
    order_TE = (scores_TE.detach() + bias_E).sort(dim=-1, descending=True, stable=True).indices
    experts_TK = order_TE[:, :top_k]
    chosen_TK = scores_TE.gather(1, experts_TK)
    weights_TK = chosen_TK / (chosen_TK.sum(-1, keepdim=True) + WEIGHT_EPSILON) * scale
    return weights_TK, experts_TK.int()


def route_tokens(logits_TE: Tensor, bias_E: Tensor, *, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
    """Chooses `top_k` experts a token and weighs them (Kimi K2 router; DeepSeek-V3 `noaux_tc`).

    s = sigmoid(logits); the experts with the largest s + bias are chosen, in falling order, ties to the lower id;
    weight = s / (sum of the chosen s + 1e-20) * scale.

    Args:
        logits_TE: (T, E), float32, bfloat16 (computed in float32) or float64; 1 <= E <= 512.
        bias_E: (E,) float32: e_score_correction_bias. It gets no gradient.
        top_k: K, 1 to min(E, 16).
        scale: routed_scaling_factor, finite and > 0.

    Returns:
        weights_TK (T, K) float32 (float64 for float64 logits), differentiable in the logits; experts_TK (T, K) int32.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or number; on the CPU also a NaN, with its position.
    """
    return _OP(logits_TE, bias_E, top_k, scale)


def _check(logits: Tensor, bias: Tensor, top_k: int, scale: float) -> None:
    op = "route_tokens"
    checks.tensor(op, "logits_TE", logits, checks.FLOATS, (None, None), "TE")
    num_tokens, num_experts = logits.shape
    checks.integer(op, "E (columns of logits_TE)", num_experts, 1, checks.MAX_EXPERTS)
    checks.tensor(op, "bias_E", bias, (torch.float32,), (num_experts,), "E", "E is the columns of logits_TE")
    checks.same_device(op, "logits_TE", logits, {"bias_E": bias})
    checks.integer(op, "top_k", top_k, 1, min(num_experts, checks.MAX_TOP_K))
    checks.row_count(op, "logits_TE", num_tokens, num_experts)
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise ArgumentTypeError(message(op, "scale", type(scale).__name__, "a float"))
    if not (math.isfinite(scale) and scale > 0):
        raise ArgumentValueError(message(op, "scale", scale, "a finite number > 0"))


def _fake(logits: Tensor, bias: Tensor, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
    _check(logits, bias, top_k, scale)
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=checks.routing_dtype(logits.dtype)), logits.new_empty(shape, dtype=torch.int32)


def _kernel(logits: Tensor, bias: Tensor, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
    weights, experts = _fake(logits, bias, top_k, scale)
    logits, bias = logits.contiguous(), bias.contiguous()
    native.kernels("route_tokens", logits.device).route_tokens(
        logits.data_ptr(), bias.data_ptr(), weights.data_ptr(), experts.data_ptr(), native.DTYPE_CODES[logits.dtype],
        *logits.shape, top_k, scale, native.where(logits.device),
    )  # fmt: skip
    return weights, experts


def _backward_fake(grad_weights: Tensor, logits: Tensor, experts: Tensor, scale: float) -> Tensor:
    op = "route_tokens_backward"
    checks.tensor(op, "logits_TE", logits, checks.FLOATS, (None, None), "TE")
    checks.tensor(op, "experts_TK", experts, checks.INT32, (logits.shape[0], None), "TK")
    checks.integer(op, "K (columns of experts_TK)", experts.shape[1], 1, checks.MAX_TOP_K)
    dtype = checks.routing_dtype(logits.dtype)
    checks.tensor(op, "grad_weights_TK", grad_weights, (dtype,), experts.shape, "TK")
    checks.same_device(op, "logits_TE", logits, {"grad_weights_TK": grad_weights, "experts_TK": experts})
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _backward_kernel(grad_weights: Tensor, logits: Tensor, experts: Tensor, scale: float) -> Tensor:
    grad_logits = _backward_fake(grad_weights, logits, experts, scale)
    grad_weights, logits, experts = grad_weights.contiguous(), logits.contiguous(), experts.contiguous()
    native.kernels("route_tokens", logits.device).route_tokens_backward(
        grad_weights.data_ptr(), logits.data_ptr(), experts.data_ptr(), grad_logits.data_ptr(),
        native.DTYPE_CODES[logits.dtype], *logits.shape, experts.shape[1], scale, native.where(logits.device),
    )  # fmt: skip
    return grad_logits


class _RouteTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
        weights, experts = _OP.below_autograd(logits, bias, top_k, scale)
        ctx.save_for_backward(logits, experts)
        ctx.scale = scale
        ctx.mark_non_differentiable(experts)
        return weights, experts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return _BACKWARD(grad_weights, *ctx.saved_tensors, ctx.scale), None, None, None


def _autograd(logits: Tensor, bias: Tensor, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
    if native.wants_grad(logits):
        return _RouteTokens.apply(logits, bias, top_k, scale)
    return _OP.below_autograd(logits, bias, top_k, scale)


_OP = native.define(
    "route_tokens(Tensor logits_TE, Tensor bias_E, int top_k, float scale) -> (Tensor, Tensor)",
    _kernel, _fake, _autograd,
)  # fmt: skip
_BACKWARD = native.define(
    "route_tokens_backward(Tensor grad_weights_TK, Tensor logits_TE, Tensor experts_TK, float scale) -> Tensor",
    _backward_kernel, _backward_fake,
)  # fmt: skip
