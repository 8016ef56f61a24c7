"""The experts from grouped GEMMs and the kernels beside them, where no fused kernel exists: `expert_mlp` on CUDA.

What waits for the backward is what the fused kernel keeps too, the tokens and the inputs of SwiGLU; the rest is made
again from them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def forward(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, slot_of_row: Tensor, row_of_slot: Tensor
) -> tuple[Tensor, Tensor]:
    """The layer's result (T, D), and the inputs of SwiGLU (M, 2I)."""
    k25 = torch.ops.k25
    gate_up_MG = k25.grouped_gemm.default(
        k25.dispatch.default(x, slot_of_row, row_of_slot), gate_up, offsets, False, None
    )
    y_MD = k25.grouped_gemm.default(k25.swiglu.default(gate_up_MG), down, offsets, False, None)
    return k25.combine.default(y_MD, weights, slot_of_row, row_of_slot), gate_up_MG


def backward(
    saved: Sequence[Tensor], needs: Sequence[bool], main_grads: tuple[Tensor, Tensor] | None
) -> list[Tensor | None]:
    """The gradients of x, gate_up, down and the routing weights; None where not needed, or added to its main_grad."""
    k25 = torch.ops.k25
    x, gate_up, offsets, plan = saved[1], saved[2], saved[5], saved[6:8]
    grad_MD, grad_MG, weighted_act_MI, grad_weights = _swiglu_gradients(saved)
    grad_down = _weight_grad(grad_MD, weighted_act_MI, offsets, needs[2], main_grads and main_grads[1])
    del grad_MD, weighted_act_MI
    grad_gate_up = None
    if needs[1]:
        x_MD = k25.dispatch.default(x, *plan)
        grad_gate_up = _weight_grad(grad_MG, x_MD, offsets, True, main_grads and main_grads[0])
    grad_x = None
    if needs[0]:
        grad_x = k25.combine.default(k25.grouped_gemm.default(grad_MG, gate_up, offsets, True, None), None, *plan)
    return [grad_x, grad_gate_up, grad_down, grad_weights if needs[3] else None]


def backward_inputs(
    saved: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """The gradients of x and of the routing weights, of SwiGLU's inputs (M, 2I), and its weighted outputs (M, I)."""
    k25 = torch.ops.k25
    gate_up, offsets, plan = saved[2], saved[5], saved[6:8]
    _, grad_MG, weighted_act_MI, grad_weights = _swiglu_gradients(saved)
    grad_x = None
    if needs[0]:
        grad_x = k25.combine.default(k25.grouped_gemm.default(grad_MG, gate_up, offsets, True, None), None, *plan)
    return grad_x, grad_weights if needs[1] else None, grad_MG, weighted_act_MI


def backward_weights(
    grad: Tensor, x: Tensor, rows: tuple[Tensor, Tensor], offsets: Tensor, plan: tuple[Tensor, Tensor],
    needs: Sequence[bool], main_grads: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of gate_up and down from `rows`, what `backward_inputs` gives last; None where not needed, or added
    to its main_grad."""
    k25, (grad_MG, weighted_act_MI) = torch.ops.k25, rows
    grad_gate_up = grad_down = None
    if needs[1]:
        grad_down = _weight_grad(k25.dispatch.default(grad, *plan), weighted_act_MI, offsets, True, main_grads[1])
    if needs[0]:
        grad_gate_up = _weight_grad(grad_MG, k25.dispatch.default(x, *plan), offsets, True, main_grads[0])
    return grad_gate_up, grad_down


def _swiglu_gradients(saved: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of the gradient, those of SwiGLU's inputs, its weighted outputs, and the routing weights' gradient."""
    k25 = torch.ops.k25
    grad, _, _, down, weights, offsets, slot_of_row, row_of_slot, gate_up_MG = saved
    grad_MD = k25.dispatch.default(grad, slot_of_row, row_of_slot)
    grad_act_MI = k25.grouped_gemm.default(grad_MD, down, offsets, True, None)
    return (
        grad_MD,
        *k25.weighted_swiglu_backward.default(grad_act_MI, gate_up_MG, weights, slot_of_row),
    )


def _weight_grad(a: Tensor, b: Tensor, offsets: Tensor, needed: bool, main_grad: Tensor | None) -> Tensor | None:
    if not needed:
        return None
    if main_grad is None:
        return torch.ops.k25.grouped_gemm_wgrad.default(a, b, offsets, False)
    torch.ops.k25.grouped_gemm_wgrad_accumulate.default(a, b, offsets, main_grad)
    return None
