"""expert_mlp against its reference in float64: all instruction sets, shapes, threads, accumulation, packs."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from k25sys import ops
from k25sys.ops import native
from tests.ops.generators import LARGE_CASES, MoeCase, first_difference, moe_cases, relative_error, tolerance

ISAS = [*native._C.cpu.available_isas(), "emulated_bf16"]
NAMES = ("y", "x", "gate_up", "down", "weights")
SMALL = {"num_tokens": 50, "num_experts": 4, "top_k": 2, "dim": 40, "width": 24, "routing": "uniform", "seed": 5}


def run(case: MoeCase, function=ops.expert_mlp, dtype: torch.dtype | None = None, **options) -> list[Tensor]:
    """Value and gradients of the layer's four differentiable inputs."""
    t = case.tensors()
    layer = [value.to(dtype or value.dtype).clone().requires_grad_() for value in t.layer]
    y = function(*layer, t.experts_TK, **options)
    return [y.detach(), *torch.autograd.grad(y, layer, t.grad_TD.to(y.dtype))]


def weight_grad_scale(case: MoeCase) -> float:
    """What rounding of the gradients of routing weights is relative to: |grad_t| |y_tk|, of which each is a product."""
    t = case.tensors()
    x, gate_up, down, _ = (value.double() for value in t.layer)
    ones = torch.ones(case.num_tokens * case.top_k, 1, dtype=torch.float64)
    rows = x.repeat_interleave(case.top_k, 0)
    y = ops.reference_expert_mlp(rows, gate_up, down, ones, t.experts_TK.reshape(-1, 1))
    return float((y.norm(dim=1) * t.grad_TD.double().norm(dim=1).repeat_interleave(case.top_k)).norm())


def check(case: MoeCase, results: list[Tensor]) -> None:
    exact = run(case, ops.reference_expert_mlp, torch.float64)
    plain = run(case, ops.reference_expert_mlp)
    for name, value, reference, torchs in zip(NAMES, results, exact, plain, strict=True):
        assert torch.isfinite(value).all(), name
        if name == "weights" and value.numel() < 64:
            assert float((value - reference).norm()) <= tolerance(case.dtype) * weight_grad_scale(case), name
            continue
        # A result of a few elements may be the small difference of large numbers: there plain torch loses digits too.
        limit = max(tolerance(case.dtype), 2 * relative_error(torchs, reference)) if value.numel() < 64 else None
        error = relative_error(value, reference)
        assert error <= (limit or tolerance(case.dtype)), (name, error)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40)
@given(case=moe_cases(max_experts=61))
def test_expert_mlp(isa: str, case: MoeCase) -> None:
    native._C.cpu.set_isa(isa)
    try:
        results = run(case)
    finally:
        native._C.cpu.set_isa("auto")
    check(case, results)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", LARGE_CASES, ids=lambda c: f"{c.num_tokens}-{c.dim}-{c.width}-{c.dtype}")
def test_expert_mlp_beyond_one_block(isa: str, case: MoeCase) -> None:
    native._C.cpu.set_isa(isa)
    try:
        results = run(case)
    finally:
        native._C.cpu.set_isa("auto")
    check(case, results)


@pytest.mark.parametrize("num_experts", [384, 512])
def test_many_experts(num_experts: int) -> None:
    case = MoeCase(**{**SMALL, "num_experts": num_experts, "top_k": 16}, dtype=torch.float32)
    check(case, run(case))


def test_a_planted_error_in_one_gradient_is_seen() -> None:
    case = MoeCase(**SMALL, dtype=torch.float32)
    results = run(case)
    results[3] = results[3].clone()
    results[3][1, 7, 3] += 1e-3
    with pytest.raises(AssertionError, match="down"):
        check(case, results)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_independent_of_threads(isa: str, dtype: torch.dtype) -> None:
    case = MoeCase(num_tokens=400, num_experts=5, top_k=2, dim=530, width=90, dtype=dtype, routing="uniform", seed=2)
    threads = torch.get_num_threads()
    native._C.cpu.set_isa(isa)
    try:
        results = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(run(case))
    finally:
        torch.set_num_threads(threads)
        native._C.cpu.set_isa("auto")
    for other in results[1:]:
        assert [first_difference(a, b) for a, b in zip(results[0], other, strict=True)] == [""] * 5


@settings(max_examples=25)
@given(case=moe_cases(max_experts=8, dtypes=(torch.float32, torch.bfloat16)))
def test_grouped_mm_backend_agrees(case: MoeCase) -> None:
    if case.num_tokens == 0:
        return
    case = MoeCase(**{**case.__dict__, "dim": 8 * (case.dim // 8 + 1), "width": 8 * (case.width // 8 + 1)})
    results = run(case, backend="torch_grouped_mm")
    exact = run(case, ops.reference_expert_mlp, torch.float64)
    for name, value, reference in zip(NAMES, results, exact, strict=True):
        limit = 1e-5 if case.dtype == torch.float32 else 2**-6  # it rounds more often than the fused kernel
        assert relative_error(value, reference) <= limit, name


@pytest.mark.parametrize("backend", ["native", "torch_grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("buffer_dtype", [None, torch.float32])
def test_main_grad_is_added_to(backend: str, dtype: torch.dtype, buffer_dtype: torch.dtype | None) -> None:
    case = MoeCase(**SMALL, dtype=dtype)
    t = case.tensors()
    expected = run(case, backend=backend)
    layer = t.leaves()
    buffers = [torch.randn(w.shape).to(buffer_dtype or dtype) for w in t.layer[1:3]]
    before = [buffer.clone() for buffer in buffers]
    for _ in range(2):
        y = ops.expert_mlp(
            *layer, t.experts_TK, gate_up_main_grad=buffers[0], down_main_grad=buffers[1], backend=backend
        )
        y.backward(t.grad_TD)
    assert layer[1].grad is None
    assert layer[2].grad is None
    assert layer[0].grad is not None
    assert relative_error(layer[0].grad, 2 * expected[1].double()) <= tolerance(dtype)
    for buffer, start, gradient in zip(buffers, before, expected[2:4], strict=True):
        assert relative_error(buffer, start.double() + 2 * gradient.double()) <= max(tolerance(dtype), 1e-6)


@pytest.mark.parametrize("backend", ["native", "torch_grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("buffer_dtype", [None, torch.float32], ids=str)
def test_deferred_weight_gradients_are_those_of_one_piece(
    backend: str, dtype: torch.dtype, buffer_dtype: torch.dtype | None
) -> None:
    """Bit for bit, over two micro-batches, into .grad and into main_grad, whichever weights need one."""
    if backend == "torch_grouped_mm" and dtype == torch.float64:
        pytest.skip("torch's grouped_mm has no float64")
    if buffer_dtype is not None and dtype == torch.float64:
        buffer_dtype = dtype
    t = MoeCase(**SMALL, dtype=dtype).tensors()
    for needed in ((0, 1, 2, 3), (1, 2), (0, 1), (2, 3), (0, 3)):
        results = []
        for deferred in (False, True):
            layer, handed_over = t.leaves(needed), []
            buffers = [torch.ones(w.shape, dtype=buffer_dtype) for w in t.layer[1:3]] if buffer_dtype else [None, None]
            options = {"defer_weight_grads": handed_over.append} if deferred else {}
            for scale in (1.0, 2.0):
                y = ops.expert_mlp(
                    *layer, t.experts_TK, gate_up_main_grad=buffers[0], down_main_grad=buffers[1], backend=backend,
                    **options,
                )  # fmt: skip
                y.backward(scale * t.grad_TD)
                y = None
            assert len(handed_over) == (2 if deferred and {1, 2} & set(needed) else 0)
            if deferred and buffer_dtype is None:
                assert layer[1].grad is None
                assert layer[2].grad is None
            for compute in handed_over:
                for weight, gradient in zip(layer[1:3], compute(), strict=True):
                    assert (gradient is None) == (buffer_dtype is not None or not weight.requires_grad)
                    if gradient is not None:
                        weight.grad = gradient if weight.grad is None else weight.grad + gradient
            results.append([value.grad for value in layer] + buffers)
        for whole, split in zip(*results, strict=True):
            assert (whole is None) == (split is None)
            assert whole is None or split is None or not first_difference(whole, split)


def test_deferred_weight_gradients_keep_what_they_need_and_nothing_else() -> None:
    """After the first half of the backward the tokens in E4M3 and rows wait; the graph does not."""
    t = MoeCase(**{**SMALL, "dim": 128, "width": 64}, dtype=torch.bfloat16).tensors()
    handed_over: list[ops.WeightGrads] = []
    kept: dict[int, torch.Tensor] = {}

    def pack(value: Tensor) -> int:
        kept[id(value)] = value
        return id(value)

    layer = t.leaves()
    with torch.autograd.graph.saved_tensors_hooks(pack, kept.pop):
        y = ops.expert_mlp(*layer, t.experts_TK, activation_store="fp8", defer_weight_grads=handed_over.append)
    y.backward(t.grad_TD)
    assert not kept
    cells = [cell.cell_contents for cell in handed_over[0].__closure__ or ()]
    tensors = [value for cell in cells for value in (cell if isinstance(cell, tuple) else (cell,))]
    waiting = Counter((value.dtype, value.shape) for value in tensors if isinstance(value, Tensor))
    assert waiting[torch.float8_e4m3fn, t.x_TD.shape] == 1
    assert waiting[torch.bfloat16, t.x_TD.shape] == 1  # the output's gradient
    exact = t.leaves()
    ops.expert_mlp(*exact, t.experts_TK, activation_store="fp8").backward(t.grad_TD)
    for weight, gradient in zip(exact[1:3], handed_over[0](), strict=True):
        assert weight.grad is not None
        assert gradient is not None
        assert not first_difference(weight.grad, gradient)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_only_the_wanted_gradients_are_made(needed: tuple[int, ...]) -> None:
    case = MoeCase(**SMALL, dtype=torch.float32)
    t = case.tensors()
    expected = run(case)
    layer = t.leaves(needed)
    ops.expert_mlp(*layer, t.experts_TK).backward(t.grad_TD)
    for i, value in enumerate(layer):
        if i not in needed:
            assert value.grad is None
        else:
            assert value.grad is not None
            assert not first_difference(value.grad, expected[i + 1])


def test_plan_in_place_of_experts() -> None:
    case = MoeCase(**SMALL, dtype=torch.bfloat16)
    t = case.tensors()
    plan = ops.plan_dispatch(t.experts_TK, case.num_experts)
    assert not first_difference(ops.expert_mlp(*t.layer, None, plan=plan), ops.expert_mlp(*t.layer, t.experts_TK))


def test_inference_mode_and_no_grad_save_nothing() -> None:
    case = MoeCase(**SMALL, dtype=torch.float32)
    t = case.tensors()
    expected = run(case)[0]
    layer = t.leaves()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = ops.expert_mlp(*layer, t.experts_TK)
        assert not y.requires_grad
        assert not first_difference(y, expected)


def test_nan_routing_weights_stay_in_their_tokens() -> None:
    case = MoeCase(**SMALL, dtype=torch.float32)
    t = case.tensors()
    t.weights_TK[7, 1] = float("nan")
    y = ops.expert_mlp(*t.layer, t.experts_TK)
    assert y[7].isnan().all()
    assert torch.isfinite(y[torch.arange(50) != 7]).all()


class TestPackedExperts:
    @pytest.mark.parametrize("isa", ISAS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_bitwise_the_same_result(self, isa: str, dtype: torch.dtype) -> None:
        case = MoeCase(**{**SMALL, "dim": 600, "width": 83}, dtype=dtype)
        t = case.tensors()
        native._C.cpu.set_isa(isa)
        try:
            layer = t.leaves()
            packed = ops.PackedExperts(layer[1], layer[2])
            y = ops.expert_mlp(*layer, t.experts_TK, packed=packed)
            results = [y.detach(), *torch.autograd.grad(y, layer, t.grad_TD)]
            expected = run(case)
        finally:
            native._C.cpu.set_isa("auto")
        assert [first_difference(a, b) for a, b in zip(results, expected, strict=True)] == [""] * 5

    @pytest.mark.parametrize("change", ["in_place", "data", "data_ptr", "isa"])
    def test_made_anew_when_the_weights_change(self, change: str) -> None:
        case = MoeCase(**SMALL, dtype=torch.bfloat16)
        t = case.tensors()
        gate_up = torch.nn.Parameter(t.gate_up_EGD)
        packed = ops.PackedExperts(gate_up, t.down_EDI, backward=False)
        try:
            with torch.no_grad():
                if change == "in_place":
                    gate_up[2, 5, 1] = 3.0
                elif change == "data":
                    gate_up.data.mul_(2)
                elif change == "data_ptr":
                    gate_up.data = gate_up.data * 2
                else:
                    native._C.cpu.set_isa("emulated_bf16")
                inputs = (t.x_TD, gate_up, t.down_EDI, t.weights_TK, t.experts_TK)
                y = ops.expert_mlp(*inputs, packed=packed)
                assert not first_difference(y, ops.expert_mlp(*inputs))
        finally:
            native._C.cpu.set_isa("auto")

    def test_invalidate(self) -> None:
        case = MoeCase(**SMALL, dtype=torch.float32)
        t = case.tensors()
        packed = ops.PackedExperts(t.gate_up_EGD, t.down_EDI)
        t.gate_up_EGD.data[0, 0, 1] = 9.0  # one unsampled element through .data: documented as unseen
        packed.invalidate()
        y = ops.expert_mlp(*t.layer, t.experts_TK, packed=packed)
        assert not first_difference(y, ops.expert_mlp(*t.layer, t.experts_TK))

    def test_other_weights_are_refused(self) -> None:
        t = MoeCase(**SMALL, dtype=torch.float32).tensors()
        packed = ops.PackedExperts(t.gate_up_EGD, t.down_EDI)
        with pytest.raises(ValueError, match="expert_mlp: packed: got packs of other weights"):
            ops.expert_mlp(t.x_TD, t.gate_up_EGD.clone(), t.down_EDI, t.weights_TK, t.experts_TK, packed=packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_activation_store_gives_the_gradients_of_what_it_stored(dtype: torch.dtype) -> None:
    case = MoeCase(num_tokens=40, num_experts=4, top_k=2, dim=200, width=130, dtype=dtype, routing="uniform", seed=6)
    t = case.tensors()
    layer: Callable[..., Tensor] = ops.expert_mlp

    def run(store: str) -> tuple[list[Tensor], int]:
        leaves = [value.clone().requires_grad_() for value in t.layer]
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v) or v, lambda v: v):
            y = layer(*leaves, t.experts_TK, activation_store=store)
        held = sum(v.nbytes for v in saved if v.dim() == 2 and v.shape[0] in (40, 80) and v.shape[1] > 2)
        return [y.detach(), *torch.autograd.grad(y, leaves, t.grad_TD)], held

    (exact, exact_bytes), (rounded, rounded_bytes) = run("exact"), run("fp8")
    assert not first_difference(exact[0], rounded[0])
    for a, b in zip(rounded[1:], exact[1:], strict=True):
        assert 0 < relative_error(a, b) < 0.2
    assert rounded_bytes < 1.1 * exact_bytes / exact[0].element_size()
    (tokens, tokens_bytes), (rows, rows_bytes) = run("fp8_x"), run("fp8_gate_up")
    assert exact_bytes - tokens_bytes == 40 * 200 * (exact[0].element_size() - 1)  # beside the scales
    assert tokens_bytes + rows_bytes == exact_bytes + rounded_bytes
    for i, (from_tokens, from_rows) in enumerate(zip(tokens[1:], rows[1:], strict=True), start=1):
        # The tokens have a part in the gradient of gate_up only, and nothing else has it there alone.
        assert torch.equal(from_tokens, exact[i]) == (i != 2)
        assert torch.equal(from_rows, rounded[i]) == (i != 2)
    for store, backend in (("half", None), ("fp8", "torch_grouped_mm")):
        with pytest.raises(ValueError, match="expert_mlp: activation_store: got"):
            layer(*t.layer, t.experts_TK, activation_store=store, backend=backend)
