"""One small case for each kernel but the matrix products': what the executor computes beside the reference."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from k25sys import ops
from tests.cuda_on_cpu.device_ops import DeviceOps, clip_table
from tests.ops.generators import MoeCase, PatchCase, relative_error
from tests.ops.test_policy_loss import BOUNDS, LossCase

Pairs = list[tuple[Tensor, Tensor]]  # ours, exact

CASE = MoeCase(
    num_tokens=40, num_experts=300, top_k=5, dim=400, width=24, dtype=torch.float32, routing="skewed", seed=4
)
PATCHES = PatchCase(
    clips=((2, 4, 6), (1, 2, 2), (3, 2, 4)), merge=(2, 2), dim=88, dtype=torch.float32, grid_dtype=torch.int64, seed=4
)
SHIFTS = (0, 1)  # elements away from an aligned address
TOLERANCE = 1e-5


@dataclass(frozen=True)
class KernelCheck:
    """`op` is the kernel's folder in csrc; all data are float32, so that no other instance of a template runs."""

    op: str
    run: Callable[[DeviceOps], Pairs]

    def is_wrong(self, device: DeviceOps) -> bool:
        """Whether a result differs from the reference. A check of the executor raises RuntimeError."""
        return any(not relative_error(ours, exact) <= TOLERANCE for ours, exact in self.run(device))


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normally distributed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _route(device: DeviceOps) -> Pairs:
    t = CASE.tensors()
    ours = device.route_tokens(t.logits_TE, t.bias_E, top_k=5, scale=1.0)
    exact = ops.reference_route_tokens(t.logits_TE, t.bias_E, top_k=5, scale=1.0)
    return [(ours[0], exact[0]), (ours[1].double(), exact[1].double())]


def _route_backward(device: DeviceOps) -> Pairs:
    t = CASE.tensors()
    logits = t.logits_TE.clone().requires_grad_()
    weights, experts = ops.reference_route_tokens(logits, t.bias_E, top_k=5, scale=1.0)
    (grad,) = torch.autograd.grad(weights, logits, t.weights_TK)
    return [(device.route_tokens_backward(t.weights_TK, t.logits_TE, experts, scale=1.0), grad)]


def _plan(device: DeviceOps) -> Pairs:
    experts = CASE.tensors().experts_TK
    ours = device.plan_dispatch(experts, CASE.num_experts)[2:]
    exact = ops.reference_plan_dispatch(experts, CASE.num_experts)[2:]
    return [(a.double(), b.double()) for a, b in zip(ours, exact, strict=True)]


def _dispatch(device: DeviceOps) -> Pairs:
    t = CASE.tensors()
    plan = ops.reference_plan_dispatch(t.experts_TK, CASE.num_experts)
    return [(device.dispatch(t.x_TD, plan), ops.reference_dispatch(t.x_TD, plan))]


def _combine(device: DeviceOps) -> Pairs:
    t = CASE.tensors()
    plan = ops.reference_plan_dispatch(t.experts_TK, CASE.num_experts)
    return [(device.combine(t.rows_MD, t.weights_TK, plan), ops.reference_combine(t.rows_MD, t.weights_TK, plan))]


def _combine_backward(device: DeviceOps) -> Pairs:
    t = CASE.tensors()
    plan = ops.reference_plan_dispatch(t.experts_TK, CASE.num_experts)
    rows, weights = t.rows_MD.clone().requires_grad_(), t.weights_TK.clone().requires_grad_()
    exact = torch.autograd.grad(ops.reference_combine(rows, weights, plan), (rows, weights), t.grad_TD)
    return list(zip(device.combine_backward(t.grad_TD, t.rows_MD, t.weights_TK, plan), exact, strict=True))


GATE_UP = (3, 2600)  # several blocks for a row


def _swiglu(device: DeviceOps) -> Pairs:
    gate_up = random(*GATE_UP)
    return [(device.swiglu(gate_up), ops.reference_swiglu(gate_up))]


def _swiglu_backward(device: DeviceOps) -> Pairs:
    gate_up, upstream = random(*GATE_UP).requires_grad_(), random(GATE_UP[0], GATE_UP[1] // 2, seed=1)
    (exact,) = torch.autograd.grad(ops.reference_swiglu(gate_up), gate_up, upstream)
    return [(device.swiglu_backward(upstream, gate_up.detach()), exact)]


def _weighted_swiglu_backward(device: DeviceOps) -> Pairs:
    t = CASE.tensors()
    plan = ops.reference_plan_dispatch(t.experts_TK, CASE.num_experts)
    gate_up, weights = random(len(t.rows_MD), 2 * 140).requires_grad_(), t.weights_TK.clone().requires_grad_()
    act = ops.reference_swiglu(gate_up) * weights.view(-1)[plan.slot_of_row_M.long()][:, None]
    upstream = random(*act.shape, seed=1)
    grad_gate_up, grad_weights = torch.autograd.grad(act, (gate_up, weights), upstream)
    ours = device.weighted_swiglu_backward(upstream, gate_up.detach(), t.weights_TK, plan.slot_of_row_M)
    return list(zip(ours, (grad_gate_up, act.detach(), grad_weights), strict=True))


def _loss(device: DeviceOps, in_steps: bool) -> Pairs:
    """Log-probabilities, entropies and the logits' gradient."""
    rows = LossCase(num_tokens=3, vocab=5000, dim=6, dtype=torch.float32, with_loss=1.0, seed=1)
    hidden, head = rows.layer()
    logits = hidden @ head.T
    targets, old, advantages, mask = rows.tokens(logits)
    exact_logits = logits.double().requires_grad_()
    loss = ops.reference_vocab_parallel_clipped_log_ratio_loss(
        exact_logits, targets, old.double(), advantages.double(), mask, **BOUNDS
    )
    (grad,) = torch.autograd.grad(loss, exact_logits)
    logs = exact_logits.detach().log_softmax(1)
    inputs, objective = (logits, targets, old, advantages, mask.float() / 3), (0, *BOUNDS.values(), True)
    run = device.loss_rows_in_steps if in_steps else device.loss_rows
    _, logprobs, entropies, ours = run(*inputs, objective=objective, **({} if in_steps else {"in_place": True}))
    entropy = -(logs.exp() * logs).sum(1)
    return [(logprobs, logs.gather(1, targets[:, None].long())[:, 0]), (entropies, entropy), (ours, grad)]


def dequantized(x: Tensor, block: tuple[int, int] = (1, 128)) -> Tensor:
    """x after a trip through E4M3."""
    return ops.reference_dequantize_fp8(*ops.reference_quantize_fp8(x, block), block)


def _quantize(device: DeviceOps) -> Pairs:
    tile, back = random(6, 140), ops.reference_dequantize_fp8
    values, scales, values_t, scales_t = device.quantize_fp8(tile, square=False, power_of_two=False, transposed=True)
    squares = device.quantize_fp8(tile, square=True, power_of_two=False, transposed=False)
    return [
        (back(values, scales, (1, 128)), dequantized(tile)),
        (back(values_t, scales_t, (1, 128)), dequantized(tile.T.contiguous())),
        (back(squares[0], squares[1], (128, 128)), dequantized(tile, (128, 128))),
    ]


def _dequantize(device: DeviceOps) -> Pairs:
    values, scales = ops.reference_quantize_fp8(random(5, 300), (1, 128))
    ours = device.dequantize_fp8(values, scales, square=False, dtype=torch.float32)
    return [(ours, ops.reference_dequantize_fp8(values, scales, (1, 128)))]


def _transpose(device: DeviceOps) -> Pairs:
    tiles = random(1, 180, 140) * torch.arange(1, 141)
    values, scales = ops.reference_quantize_fp8(tiles, (128, 128))
    values_t, scales_t = device.transpose_fp8(values, scales)
    return [(values_t.float(), values.mT.float()), (scales_t, scales.mT)]


def _pool(device: DeviceOps) -> Pairs:
    patches, grid, _ = PATCHES.tensors()
    clips, num_out = clip_table(grid, PATCHES.num_patches, PATCHES.merge)
    exact = ops.reference_pool_temporal_patches(patches, grid)
    return [(device.pool_temporal_patches(patches, clips, num_out, (2, 2)), exact)]


def _pool_backward(device: DeviceOps) -> Pairs:
    patches, grid, upstream = PATCHES.tensors()
    clips, _ = clip_table(grid, PATCHES.num_patches, PATCHES.merge)
    leaf = patches.clone().requires_grad_()
    (exact,) = torch.autograd.grad(ops.reference_pool_temporal_patches(leaf, grid), leaf, upstream)
    return [(device.pool_temporal_patches_backward(upstream, clips, PATCHES.num_patches, (2, 2)), exact)]


_IN_STEPS = KernelCheck("policy_loss", lambda device: _loss(device, in_steps=True))
_PLAN = KernelCheck("plan_dispatch", _plan)
# By the kernel's name.
CHECKS = {
    "route_tokens_kernel": KernelCheck("route_tokens", _route),
    "route_tokens_backward_kernel": KernelCheck("route_tokens", _route_backward),
    "count_slots_kernel": _PLAN,
    "scan_blocks_kernel": _PLAN,
    "place_slots_kernel": _PLAN,
    "dispatch_kernel": KernelCheck("dispatch", _dispatch),
    "combine_kernel": KernelCheck("dispatch", _combine),
    "combine_backward_kernel": KernelCheck("dispatch", _combine_backward),
    "swiglu_kernel": KernelCheck("swiglu", _swiglu),
    "swiglu_backward_kernel": KernelCheck("swiglu", _swiglu_backward),
    "weighted_swiglu_grads_kernel": KernelCheck("swiglu", _weighted_swiglu_backward),
    "token_losses_kernel": _IN_STEPS,
    "logit_stats_kernel": _IN_STEPS,
    "logit_grad_kernel": _IN_STEPS,
    "loss_rows_kernel": KernelCheck("policy_loss", lambda device: _loss(device, in_steps=False)),
    "quantize_fp8_kernel": KernelCheck("fp8_quantize", _quantize),
    "dequantize_fp8_kernel": KernelCheck("fp8_quantize", _dequantize),
    "transpose_fp8_kernel": KernelCheck("fp8_quantize", _transpose),
    "pool_temporal_patches_kernel": KernelCheck("pool_temporal_patches", _pool),
    "pool_temporal_patches_backward_kernel": KernelCheck("pool_temporal_patches", _pool_backward),
}
