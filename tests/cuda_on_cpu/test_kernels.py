"""Every CUDA kernel on the CPU, as translated PTX and as source, in all thread orders, against the references."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from k25sys import ops
from tests.cuda_on_cpu.device_ops import ORDERS, DeviceOps, clip_table
from tests.ops.generators import (
    DTYPES,
    MoeCase,
    PatchCase,
    check_routing,
    first_difference,
    moe_cases,
    patch_cases,
    relative_error,
    tolerance,
)
from tests.ops.test_fp8 import Fp8Case, bits
from tests.ops.test_fp8 import cases as fp8_cases
from tests.ops.test_policy_loss import BOUNDS, LossCase, cases, near_a_bound

EXECUTORS = ("ptx", "source")
SCALE = 2.827

pytestmark = pytest.mark.timeout(300)
generated = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
shifts = st.sampled_from((0, 0, 1))


def gradients(function, upstream: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Gradients of the inputs in float64."""
    leaves = [value.double().requires_grad_() for value in inputs]
    return list(torch.autograd.grad(function(*leaves), leaves, upstream.double()))


def same_for_all_orders(module: ModuleType, executor: str, shift: int, call) -> list[Tensor]:
    """The results of call(ops), which every order of threads and blocks must give bit for bit."""
    results = [list(call(DeviceOps(module, executor, order, seed, shift))) for order, seed in ORDERS]
    for other in results[1:]:
        assert [first_difference(a, b) for a, b in zip(results[0], other, strict=True)] == [""] * len(other)
    return results[0]


@pytest.mark.parametrize("name", EXECUTORS)
@generated
@given(case=moe_cases(), shift=shifts)
def test_route_tokens(executor: ModuleType, name: str, case: MoeCase, shift: int) -> None:
    t = case.tensors()
    weights, experts = same_for_all_orders(
        executor, name, shift, lambda d: d.route_tokens(t.logits_TE, t.bias_E, top_k=case.top_k, scale=SCALE)
    )
    check_routing(case, weights, experts, SCALE)


@pytest.mark.parametrize("name", EXECUTORS)
@generated
@given(case=moe_cases(), shift=shifts)
def test_route_tokens_backward(executor: ModuleType, name: str, case: MoeCase, shift: int) -> None:
    t = case.tensors()
    _, experts = ops.reference_route_tokens(t.logits_TE, t.bias_E, top_k=case.top_k, scale=SCALE)
    upstream = t.weights_TK

    def weights_of(logits: Tensor) -> Tensor:
        chosen = logits.sigmoid().gather(1, experts.long())
        return chosen / chosen.sum(-1, keepdim=True) * SCALE

    (ours,) = same_for_all_orders(
        executor, name, shift, lambda d: [d.route_tokens_backward(upstream, t.logits_TE, experts, scale=SCALE)]
    )
    (exact,) = gradients(weights_of, upstream, t.logits_TE)
    # Against the upstream gradient's size: with one expert the exact gradient is 0, a difference of equal numbers.
    if ours.numel():
        size = max(float(exact.abs().max()), float(upstream.abs().max()))
        assert float((ours.double() - exact).abs().max()) <= tolerance(case.dtype) * size


@pytest.mark.parametrize("name", EXECUTORS)
@generated
@given(case=moe_cases(), shift=shifts, ids=st.sampled_from((torch.int32, torch.int64)))
def test_plan_dispatch(executor: ModuleType, name: str, case: MoeCase, shift: int, ids: torch.dtype) -> None:
    experts = case.tensors().experts_TK.to(ids)
    plan = same_for_all_orders(executor, name, shift, lambda d: d.plan_dispatch(experts, case.num_experts)[2:])
    reference = ops.reference_plan_dispatch(experts, case.num_experts)
    assert [first_difference(a, b) for a, b in zip(plan, reference[2:], strict=True)] == [""] * 4


@pytest.mark.parametrize("name", EXECUTORS)
@generated
@given(case=moe_cases(), shift=shifts)
def test_dispatch_and_combine(executor: ModuleType, name: str, case: MoeCase, shift: int) -> None:
    t = case.tensors()
    plan = ops.reference_plan_dispatch(t.experts_TK, case.num_experts)
    rows, out, unweighted = same_for_all_orders(
        executor,
        name,
        shift,
        lambda d: [
            d.dispatch(t.x_TD, plan),
            d.combine(t.rows_MD, t.weights_TK, plan),
            d.combine(t.rows_MD, None, plan),
        ],
    )
    assert not first_difference(rows, ops.reference_dispatch(t.x_TD, plan))
    exact = ops.reference_combine(t.rows_MD.double(), t.weights_TK.double(), plan)
    assert relative_error(out, exact) <= tolerance(case.dtype)
    exact = ops.reference_combine(t.rows_MD.double(), torch.ones_like(t.weights_TK).double(), plan)
    assert relative_error(unweighted, exact) <= tolerance(case.dtype)


@pytest.mark.parametrize("name", EXECUTORS)
@generated
@given(case=moe_cases(), shift=shifts)
def test_combine_backward(executor: ModuleType, name: str, case: MoeCase, shift: int) -> None:
    t = case.tensors()
    plan = ops.reference_plan_dispatch(t.experts_TK, case.num_experts)
    ours = same_for_all_orders(
        executor, name, shift, lambda d: d.combine_backward(t.grad_TD, t.rows_MD, t.weights_TK, plan)
    )
    exact = gradients(lambda y, w: ops.reference_combine(y, w, plan), t.grad_TD, t.rows_MD, t.weights_TK)
    assert relative_error(ours[0], exact[0]) <= tolerance(case.dtype)
    assert relative_error(ours[1], exact[1]) <= tolerance(case.dtype)


@pytest.mark.parametrize("name", EXECUTORS)
@generated
@given(case=moe_cases(), shift=shifts)
def test_swiglu(executor: ModuleType, name: str, case: MoeCase, shift: int) -> None:
    generator = torch.Generator().manual_seed(case.seed)
    gate_up = (3 * torch.randn(case.num_tokens, 2 * case.width, generator=generator)).to(case.dtype)
    upstream = torch.randn(case.num_tokens, case.width, generator=generator).to(case.dtype)
    act, grad = same_for_all_orders(
        executor, name, shift, lambda d: [d.swiglu(gate_up), d.swiglu_backward(upstream, gate_up)]
    )
    assert relative_error(act, ops.reference_swiglu(gate_up.double())) <= tolerance(case.dtype)
    (exact,) = gradients(ops.reference_swiglu, upstream, gate_up)
    assert relative_error(grad, exact) <= tolerance(case.dtype)


def check_pooling(module: ModuleType, executor: str, case: PatchCase, shift: int) -> None:
    """Value and gradient of temporal pooling in every order."""
    x, grid, upstream = case.tensors()
    clips, num_out = clip_table(grid, case.num_patches, case.merge)
    value, grad = same_for_all_orders(
        module, executor, shift,
        lambda d: [
            d.pool_temporal_patches(x, clips, num_out, case.merge),
            d.pool_temporal_patches_backward(upstream, clips, case.num_patches, case.merge),
        ],
    )  # fmt: skip
    reference = ops.reference_pool_temporal_patches
    assert relative_error(value, reference(x.double(), grid, case.merge)) <= tolerance(case.dtype)
    (exact,) = gradients(lambda x: reference(x, grid, case.merge), upstream, x)
    assert relative_error(grad, exact) <= tolerance(case.dtype)


@pytest.mark.parametrize("name", EXECUTORS)
@generated
@given(case=patch_cases(max_side=2), shift=shifts)
def test_pool_temporal_patches(executor: ModuleType, name: str, case: PatchCase, shift: int) -> None:
    check_pooling(executor, name, case, shift)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pool_temporal_patches_of_k25(executor: ModuleType, name: str, dtype: torch.dtype) -> None:
    """Rows of 1152 channels: several accesses for each lane, the last ones of a part of the warp alone."""
    clips = ((4, 4, 6), (1, 2, 4), (3, 4, 2))
    case = PatchCase(clips=clips, merge=(2, 2), dim=1152, dtype=dtype, grid_dtype=torch.int64, seed=6)
    check_pooling(executor, name, case, 0)


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_clip_beyond_the_last_patch_traps(executor: ModuleType, name: str) -> None:
    x, device = torch.ones(24, 8), DeviceOps(executor, name)
    clips, num_out = clip_table(torch.tensor([[1, 2, 4], [2, 4, 2]]), 24, (2, 2))
    for column, value in ((2, 3), (0, 9), (3, 2)):
        wrong = clips.clone()
        wrong[1, column] = value
        with pytest.raises(RuntimeError, match="trap"):
            device.pool_temporal_patches(x, wrong, num_out, (2, 2))
        with pytest.raises(RuntimeError, match="trap"):
            device.pool_temporal_patches_backward(torch.ones(num_out, 4, 8), wrong, 24, (2, 2))


@pytest.mark.parametrize("name", EXECUTORS)
def test_k25_shapes(executor: ModuleType, name: str) -> None:
    """Rows of 7168 and experts of 2048 columns, 384 experts, top-8: more than one access for each thread."""
    for dtype in (torch.bfloat16, torch.float32):
        case = MoeCase(
            num_tokens=3, num_experts=384, top_k=8, dim=7168, width=2048, dtype=dtype, routing="uniform", seed=5
        )
        generator = torch.Generator().manual_seed(5)
        logits = torch.randn(3, 384, generator=generator).to(dtype)
        bias = 0.1 * torch.randn(384, generator=generator)
        device = DeviceOps(executor, name, "random", 3)
        weights, experts = device.route_tokens(logits, bias, top_k=8, scale=SCALE)
        expected = ops.reference_route_tokens(logits, bias, top_k=8, scale=SCALE)
        assert not first_difference(experts, expected[1])
        assert relative_error(weights, expected[0]) <= 1e-6
        plan = device.plan_dispatch(experts, 384)
        x = torch.randn(3, case.dim, generator=generator).to(dtype)
        rows = device.dispatch(x, plan)
        assert not first_difference(rows, ops.reference_dispatch(x, plan))
        exact = ops.reference_combine(rows.double(), weights.double(), plan)
        assert relative_error(device.combine(rows, weights, plan), exact) <= tolerance(dtype)
        gate_up = torch.randn(2, 2 * case.width, generator=generator).to(dtype)
        assert relative_error(device.swiglu(gate_up), ops.reference_swiglu(gate_up.double())) <= tolerance(dtype)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_plan_of_several_blocks(executor: ModuleType, name: str, ids: torch.dtype) -> None:
    """13,000 slots: four blocks, of which the last is not full, and experts without tokens."""
    experts = torch.randint(3, 60, (1625, 8), generator=torch.Generator().manual_seed(2)).to(ids)
    plan = same_for_all_orders(executor, name, 0, lambda d: d.plan_dispatch(experts, 64)[2:])
    reference = ops.reference_plan_dispatch(experts, 64)[2:]
    assert [first_difference(a, b) for a, b in zip(plan, reference, strict=True)] == [""] * 4


def test_both_executors_agree_bitwise_where_the_operations_are_the_same(executor: ModuleType) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        case = MoeCase(num_tokens=9, num_experts=8, top_k=4, dim=264, width=40, dtype=dtype, routing="uniform", seed=8)
        t = case.tensors()
        plan = ops.reference_plan_dispatch(t.experts_TK, 8)
        results = []
        for name in EXECUTORS:
            device = DeviceOps(executor, name)
            combined = device.combine(t.rows_MD, t.weights_TK, plan)
            results.append([combined, *device.combine_backward(t.grad_TD, t.rows_MD, t.weights_TK, plan)])
        assert [first_difference(a, b) for a, b in zip(*results, strict=True)] == [""] * 3


@pytest.mark.parametrize("name", EXECUTORS)
def test_route_tokens_ties_go_to_the_lower_id_and_nan_comes_last(executor: ModuleType, name: str) -> None:
    device = DeviceOps(executor, name)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        _, experts = device.route_tokens(torch.zeros(2, 70, dtype=dtype), torch.zeros(70), top_k=5, scale=1.0)
        assert experts.tolist() == [[0, 1, 2, 3, 4]] * 2
        logits = torch.full((1, 6), float("nan"), dtype=dtype)
        logits[0, 3], logits[0, 4] = -90.0, 1.0
        _, experts = device.route_tokens(logits, torch.zeros(6), top_k=3, scale=1.0)
        assert experts.tolist() == [[4, 3, 0]]


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("bad", [-1, 8, 2**31 + 3, -(2**63)])
def test_an_expert_id_out_of_range_traps(executor: ModuleType, name: str, bad: int) -> None:
    experts = torch.zeros(40, 2, dtype=torch.int64)
    experts[33, 1] = bad
    with pytest.raises(RuntimeError, match=r"count_slots_kernel.*trap"):
        DeviceOps(executor, name).plan_dispatch(experts, 8)


@pytest.mark.parametrize("name", EXECUTORS)
def test_a_plan_entry_out_of_range_traps(executor: ModuleType, name: str) -> None:
    device = DeviceOps(executor, name)
    plan = ops.reference_plan_dispatch(torch.tensor([[0, 1], [1, 0]]), 2)
    x, weights = torch.ones(2, 8), torch.ones(2, 2)
    for value in (-1, 4):
        plan.slot_of_row_M[1], plan.row_of_slot_TK[1, 1] = value, value
        with pytest.raises(RuntimeError, match="trap"):
            device.dispatch(x, plan)
        with pytest.raises(RuntimeError, match="trap"):
            device.combine(torch.ones(4, 8), weights, plan)
        with pytest.raises(RuntimeError, match="trap"):
            device.combine_backward(x, torch.ones(4, 8), weights, plan)


@pytest.mark.parametrize("name", EXECUTORS)
@generated
@given(case=cases, shift=shifts)
def test_policy_loss(executor: ModuleType, name: str, case: LossCase, shift: int) -> None:
    case = replace(case, num_tokens=min(case.num_tokens, 4), vocab=case.vocab * 8 if case.seed % 3 else case.vocab)
    hidden, head = case.layer()
    logits = (hidden.double() @ head.double().T).to(case.dtype)
    targets, old, advantages, mask = case.tokens(logits)
    if near_a_bound(case, logits):
        return
    weights = mask.to(old.dtype) / mask.sum().clamp_min(1)
    objective = (0, *BOUNDS.values(), case.penalty_on == "all")
    inputs = (logits, targets, old, advantages, weights)
    fused = same_for_all_orders(
        executor, name, shift, lambda d: d.loss_rows(*inputs, objective=objective, in_place=False)
    )
    steps = same_for_all_orders(executor, name, shift, lambda d: d.loss_rows_in_steps(*inputs, objective=objective))
    in_place = DeviceOps(executor, name, shift=shift).loss_rows(*inputs, objective=objective, in_place=True)
    assert [first_difference(a, b) for a, b in zip(fused, in_place, strict=True)] == [""] * 4
    leaf = logits.double().requires_grad_()
    exact = ops.reference_vocab_parallel_clipped_log_ratio_loss(
        leaf, targets, old.double(), advantages.double(), mask, **BOUNDS, penalty_on=case.penalty_on
    )
    (exact_grad,) = torch.autograd.grad(exact, leaf)
    entropy = torch.special.entr(leaf.detach().softmax(-1)).sum(-1) * mask
    for losses, _, entropies, grad in (fused, steps):
        assert relative_error(grad, exact_grad) <= tolerance(case.dtype)
        assert abs(float(losses.sum()) - float(exact.detach())) <= 1e-5 * max(1.0, abs(float(exact.detach())))
        assert relative_error(entropies * mask, entropy) <= 1e-4
        assert not grad[~mask].any()


@pytest.mark.parametrize("name", EXECUTORS)
@generated
@given(case=fp8_cases, shift=shifts, square=st.booleans(), power_of_two=st.booleans())
def test_fp8(executor: ModuleType, name: str, case: Fp8Case, shift: int, square: bool, power_of_two: bool) -> None:
    x = replace(case, batch=0, rows=min(case.rows, 130), cols=min(case.cols, 200)).x()
    block = (128, 128) if square else (1, 128)
    flags = {"square": square, "power_of_two": power_of_two, "transposed": True}
    values, scales, values_t, scales_t = same_for_all_orders(
        executor, name, shift, lambda d: [t.view(torch.uint8) if t.dtype != torch.float32 else t
                                          for t in d.quantize_fp8(x, **flags)]
    )  # fmt: skip
    for ours, exact in (
        ((values, scales), ops.reference_quantize_fp8(x, block, power_of_two=power_of_two)),
        ((values_t, scales_t), ops.reference_quantize_fp8(x.mT, (1, 128), power_of_two=power_of_two)),
    ):
        if x.numel():  # nothing is launched, and nothing written, for an empty matrix
            assert not first_difference(bits(ours[0]), bits(exact[0]))
            assert not first_difference(ours[1], exact[1])
    if x.numel():
        device = DeviceOps(executor, name, shift=4 * shift)
        back = device.dequantize_fp8(values.view(torch.float8_e4m3fn), scales, square=square, dtype=case.dtype)
        exact_back = ops.reference_dequantize_fp8(values.view(torch.float8_e4m3fn), scales, block, case.dtype)
        assert torch.equal(back.nan_to_num(-7), exact_back.nan_to_num(-7))


@pytest.mark.parametrize("name", EXECUTORS)
@generated
@given(case=moe_cases(max_experts=3), shift=shifts)
def test_weighted_swiglu_backward(executor: ModuleType, name: str, case: MoeCase, shift: int) -> None:
    t = case.tensors()
    plan = ops.reference_plan_dispatch(t.experts_TK, case.num_experts)
    gate_up = torch.cat([t.rows_MD, t.rows_MD.flip(1)], 1)
    grad = t.rows_MD.roll(1, 0)
    ours = same_for_all_orders(
        executor, name, shift, lambda d: d.weighted_swiglu_backward(grad, gate_up, t.weights_TK, plan.slot_of_row_M)
    )
    leaf, weights = gate_up.double().requires_grad_(), t.weights_TK.double().requires_grad_()
    act = ops.reference_swiglu(leaf) * weights.view(-1)[plan.slot_of_row_M.long()][:, None]
    grads = torch.autograd.grad(act, (leaf, weights), grad.double())
    for result, expected in zip(ours, (grads[0], act.detach(), grads[1]), strict=True):
        error = (result.double() - expected).norm()
        assert error <= tolerance(case.dtype) * (expected.norm() + expected.numel() ** 0.5)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("shape", [(2, 300, 132), (1, 5, 7), (3, 128, 256), (1, 4, 140), (2, 131, 129)])
@pytest.mark.parametrize("shift", [0, 1])
def test_transpose_fp8(executor: ModuleType, name: str, shape: tuple[int, ...], shift: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1, shape[2] + 1)
    quantised = ops.reference_quantize_fp8(x, (128, 128))
    values, scales = same_for_all_orders(executor, name, shift, lambda d: d.transpose_fp8(*quantised))
    expected = ops.reference_transpose_fp8(*quantised)
    assert torch.equal(bits(values), bits(expected[0]))
    assert torch.equal(scales, expected[1])
