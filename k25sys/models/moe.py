"""Mixture of experts of Kimi K2: a sigmoid router, routed experts as stacked weights, and a shared expert."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from k25sys import ops
from k25sys.models.config import TextConfig


def silu_and_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): the dense layers and the shared expert.

    `activate` may be replaced, by one that saves less for the backward.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, width, bias=False)
        self.up_proj = nn.Linear(dim, width, bias=False)
        self.down_proj = nn.Linear(width, dim, bias=False)
        self.activate: Callable[[Tensor, Tensor], Tensor] = silu_and_multiply

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        return self.down_proj(self.activate(self.gate_proj(x_TD), self.up_proj(x_TD)))


class _WideLinear(torch.autograd.Function):
    """x W^T in a wider dtype; saves x as the experts do, not its copy, which is twice as large in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(dtype), weight.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype) if needs_x else None
        grad_weight = (grad.T @ x.to(grad.dtype)).to(weight.dtype) if needs_weight else None
        return grad_x, grad_weight, None


class Router(nn.Module):
    """Chooses each token's experts: ops.route_tokens on float32 logits, whatever the dtype of the weight.

    A forward hook sees (weights_TK, experts_TK): that is where balancing reads the load of the experts. The bias is a
    parameter, as in the released model, but balancing sets it: it takes no gradient, so that optimisers pass over it.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.top_k, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        bias_E = torch.empty(config.n_routed_experts, dtype=torch.float32)
        self.e_score_correction_bias = nn.Parameter(bias_E, requires_grad=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(T, D) -> weights_TK float32 (float64 for float64 tokens), experts_TK int32."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            if x_TD.dtype == self.weight.dtype == dtype:
                logits_TE = F.linear(x_TD, self.weight)
            else:
                logits_TE = _WideLinear.apply(x_TD, self.weight, dtype)
        return ops.route_tokens(logits_TE, self.e_score_correction_bias, top_k=self.top_k, scale=self.scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        # model.to(bfloat16) must not round the bias: its steps of 1e-3 would be lost.
        bias_E = self.e_score_correction_bias.detach()
        super()._apply(fn, recurse)
        moved_E = self.e_score_correction_bias
        if moved_E.dtype != torch.float32:
            moved_E.data = bias_E.to(moved_E.device)
        return self


class Experts(nn.Module):
    """The routed experts, stacked: gate_up_proj (E, 2I, D), gate rows first, and down_proj (E, D, I).

    `activation_store` is that of ops.expert_mlp.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        experts, dim, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, dim))
        self.down_proj = nn.Parameter(torch.empty(experts, dim, width))
        self.activation_store = "exact"

    def forward(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        """(T, D) -> (T, D): the weighted sum of the chosen experts."""
        return ops.expert_mlp(
            x_TD, self.gate_up_proj, self.down_proj, weights_TK, experts_TK, activation_store=self.activation_store
        )


def as_it_is(x: Tensor) -> Tensor:
    """x."""
    return x


class MixtureOfExperts(nn.Module):
    """y = sum over the chosen experts + shared expert (Kimi K2, section 2.3).

    `store_input` sees the tokens first and returns them; it may have them saved for the backward in another form.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = SwiGLU(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)
        self.store_input: Callable[[Tensor], Tensor] = as_it_is

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        x_TD = self.store_input(x_TD)
        return self.experts(x_TD, *self.gate(x_TD)) + self.shared_experts(x_TD)
