"""The executor catches what it is there for: each planted bug fails, by the check that names it."""

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from k25sys import ops
from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.device_ops import ORDERS, DeviceOps, clip_table
from tests.cuda_on_cpu.planted_bugs import DROPPED_BARRIER, PLANTED_BUGS, PlantedBug
from tests.ops.generators import MoeCase, PatchCase, relative_error
from tests.ops.test_policy_loss import BOUNDS, LossCase

CASE = MoeCase(
    num_tokens=40, num_experts=300, top_k=5, dim=400, width=24, dtype=torch.float32, routing="skewed", seed=4
)
PATCHES = PatchCase(
    clips=((2, 4, 6), (1, 2, 2), (3, 2, 4)), merge=(2, 2), dim=88, dtype=torch.float32, grid_dtype=torch.int64, seed=4
)
SHIFTS = (0, 1)  # elements away from an aligned address


def dequantized(x: torch.Tensor) -> torch.Tensor:
    """x after a trip through E4M3."""
    return ops.reference_dequantize_fp8(*ops.reference_quantize_fp8(x, (1, 128)), (1, 128))


def wrong_results(device: DeviceOps) -> list[str]:
    """Names of the ops whose result differs from the reference. A check of the executor raises RuntimeError."""
    t = CASE.tensors()
    plan = ops.reference_plan_dispatch(t.experts_TK, CASE.num_experts)
    _, experts = ops.reference_route_tokens(t.logits_TE, t.bias_E, top_k=5, scale=1.0)
    logits = t.logits_TE.clone().requires_grad_()
    ops.reference_route_tokens(logits, t.bias_E, top_k=5, scale=1.0)[0].backward(t.weights_TK)
    assert logits.grad is not None
    expected_grad_weights = (t.grad_TD.repeat_interleave(5, 0) * t.rows_MD[plan.row_of_slot_TK.view(-1).long()]).sum(1)
    rows = LossCase(num_tokens=3, vocab=5000, dim=6, dtype=torch.float32, with_loss=1.0, seed=1)
    hidden, head = rows.layer()
    targets, old, advantages, mask = rows.tokens(hidden @ head.T)
    loss_inputs = (hidden @ head.T, targets, old, advantages, mask.float() / 3)
    exact_logits = loss_inputs[0].double().requires_grad_()
    loss = ops.reference_vocab_parallel_clipped_log_ratio_loss(
        exact_logits, targets, old.double(), advantages.double(), mask, **BOUNDS
    )
    (grad_logits,) = torch.autograd.grad(loss, exact_logits)
    patches, grid, grad_pooled = PATCHES.tensors()
    clips, num_out = clip_table(grid, PATCHES.num_patches, PATCHES.merge)
    leaf = patches.clone().requires_grad_()
    pooled = ops.reference_pool_temporal_patches(leaf, grid)
    (grad_patches,) = torch.autograd.grad(pooled, leaf, grad_pooled)
    tile = torch.randn(6, 140, generator=torch.Generator().manual_seed(0))
    values, scales, values_t, scales_t = device.quantize_fp8(tile, square=False, power_of_two=False, transposed=True)
    square = ops.reference_quantize_fp8(tile.repeat(30, 1)[None] * torch.arange(1, 141), (128, 128))
    turned, turned_scales = device.transpose_fp8(*square)
    gate_up = torch.cat([t.rows_MD, t.rows_MD.flip(1)], 1)
    gate_up_leaf, weights_leaf = gate_up.clone().requires_grad_(), t.weights_TK.clone().requires_grad_()
    act = ops.reference_swiglu(gate_up_leaf) * weights_leaf.view(-1)[plan.slot_of_row_M.long()][:, None]
    weighted = (*torch.autograd.grad(act, (gate_up_leaf, weights_leaf), t.rows_MD), act.detach())
    device_weighted = device.weighted_swiglu_backward(t.rows_MD, gate_up, t.weights_TK, plan.slot_of_row_M)
    pairs = {
        "transpose_fp8": (turned.float(), square[0].mT.float()),
        "transpose_fp8 scales": (turned_scales, square[1].mT),
        "weighted_swiglu_backward": (device_weighted[0], weighted[0]),
        "weighted_swiglu_backward act": (device_weighted[1], weighted[2]),
        "weighted_swiglu_backward weights": (device_weighted[2], weighted[1]),
        "quantize_fp8": (ops.reference_dequantize_fp8(values, scales, (1, 128)), dequantized(tile)),
        "quantize_fp8 transposed": (ops.reference_dequantize_fp8(values_t, scales_t, (1, 128)), dequantized(tile.T)),
        "loss_rows": (
            device.loss_rows(*loss_inputs, objective=(0, *BOUNDS.values(), True), in_place=True)[3],
            grad_logits,
        ),
        "plan_dispatch": (device.plan_dispatch(t.experts_TK, CASE.num_experts).row_of_slot_TK, plan.row_of_slot_TK),
        "dispatch": (device.dispatch(t.x_TD, plan), ops.reference_dispatch(t.x_TD, plan)),
        "combine": (
            device.combine(t.rows_MD, t.weights_TK, plan),
            ops.reference_combine(t.rows_MD, t.weights_TK, plan),
        ),
        "combine_backward": (
            device.combine_backward(t.grad_TD, t.rows_MD, t.weights_TK, plan)[1].view(-1),
            expected_grad_weights,
        ),
        "route_tokens_backward": (
            device.route_tokens_backward(t.weights_TK, t.logits_TE, experts, scale=1.0),
            logits.grad,
        ),
        "pool_temporal_patches": (device.pool_temporal_patches(patches, clips, num_out, (2, 2)), pooled.detach()),
        "pool_temporal_patches_backward": (
            device.pool_temporal_patches_backward(grad_pooled, clips, PATCHES.num_patches, (2, 2)),
            grad_patches,
        ),
    }
    return [op for op, (ours, exact) in pairs.items() if not relative_error(ours, exact) <= 1e-5]


def test_without_a_bug_nothing_is_caught(executor: ModuleType) -> None:
    for name in ("ptx", "source"):
        for shift in SHIFTS:
            assert wrong_results(DeviceOps(executor, name, shift=shift)) == []


@pytest.mark.parametrize("bug", PLANTED_BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(bug: PlantedBug, tmp_path: Path) -> None:
    module = build.executor_module(bug.plant(tmp_path))
    caught = []
    for shift in SHIFTS:
        try:
            caught += wrong_results(DeviceOps(module, "ptx", shift=shift))
        except RuntimeError as error:
            caught.append(str(error))
    assert caught, "not caught"
    if bug.caught_as:
        assert any(re.search(bug.caught_as, text) for text in caught), caught


def test_a_dropped_barrier_shows_in_the_result_of_some_order_of_the_source(tmp_path: Path) -> None:
    module = build.executor_module(DROPPED_BARRIER.plant(tmp_path))
    experts = CASE.tensors().experts_TK
    reference = ops.reference_plan_dispatch(experts, CASE.num_experts).row_of_slot_TK
    wrong = []
    for order, seed in ORDERS:
        try:
            plan = DeviceOps(module, "source", order, seed).plan_dispatch(experts, CASE.num_experts)
            wrong.append(not torch.equal(plan.row_of_slot_TK, reference))
        except RuntimeError:
            wrong.append(True)
    assert any(wrong)
