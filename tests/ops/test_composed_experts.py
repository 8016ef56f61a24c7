"""expert_mlp from grouped GEMMs, as CUDA runs it, on the CPU's kernels; tests/cuda_on_cpu runs the same on its own."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from k25sys import ops
from k25sys.ops import checks, native
from tests.ops.generators import MoeCase, first_difference, moe_cases, relative_error, tolerance

SMALL = MoeCase(
    num_tokens=40, num_experts=4, top_k=2, dim=136, width=72, dtype=torch.bfloat16, routing="uniform", seed=6
)


class Unfused:
    """The CPU's kernels without the fused experts; counts the products that are asked for."""

    def __init__(self) -> None:
        self.used: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("expert_mlp"):
            raise AttributeError(name)
        if name.startswith("grouped_gemm"):
            self.used[name] += 1
        return getattr(native._C.cpu, name)


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "kernels", lambda op, device: Unfused())


def run(case: MoeCase, function=ops.expert_mlp, dtype: torch.dtype | None = None, **options) -> list[Tensor]:
    """Value and gradients of the layer's four differentiable inputs."""
    t = case.tensors()
    layer = [value.to(dtype or value.dtype).clone().requires_grad_() for value in t.layer]
    y = function(*layer, t.experts_TK, **options)
    return [y.detach(), *torch.autograd.grad(y, layer, t.grad_TD.to(y.dtype))]


def check_layer(case: MoeCase) -> None:
    """Value and gradients against float64."""
    plan = ops.reference_plan_dispatch(case.tensors().experts_TK, case.num_experts)
    exact = run(case, ops.reference_expert_mlp, torch.float64)
    for name, ours, expected in zip(("y", "x", "gate_up", "down", "weights"), run(case, plan=plan), exact, strict=True):
        limit = 2**-6 if case.dtype == torch.bfloat16 else 2 * tolerance(case.dtype)
        error = (ours.double() - expected).norm()
        assert error <= limit * (expected.norm() + expected.numel() ** 0.5), name


def check_main_grads(buffer_dtype: torch.dtype) -> None:
    """Two steps add their gradients; the weights' own stay None."""
    t = SMALL.tensors()
    plan = ops.reference_plan_dispatch(t.experts_TK, SMALL.num_experts)
    expected = run(SMALL, ops.reference_expert_mlp, torch.float64)
    layer = t.leaves()
    buffers = [torch.randn(w.shape).to(buffer_dtype) for w in t.layer[1:3]]
    before = [buffer.clone() for buffer in buffers]
    for _ in range(2):
        y = ops.expert_mlp(*layer, None, plan=plan, gate_up_main_grad=buffers[0], down_main_grad=buffers[1])
        y.backward(t.grad_TD)
    assert layer[1].grad is None
    assert layer[2].grad is None
    for buffer, start, gradient in zip(buffers, before, expected[2:4], strict=True):
        assert relative_error(buffer, start.double() + 2 * gradient) <= 2**-6


def check_fp8_store() -> None:
    """The forward is the same; gradients are those of what was stored."""
    plan = ops.reference_plan_dispatch(SMALL.tensors().experts_TK, SMALL.num_experts)
    exact, rounded = run(SMALL, plan=plan), run(SMALL, plan=plan, activation_store="fp8")
    assert not first_difference(exact[0], rounded[0])
    for a, b in zip(rounded[1:], exact[1:], strict=True):
        assert 0 < relative_error(a, b) < 0.2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=moe_cases(max_experts=61))
def test_layer(unfused: None, case: MoeCase) -> None:
    check_layer(case)


@pytest.mark.parametrize("buffer_dtype", [torch.bfloat16, torch.float32])
def test_main_grads(unfused: None, buffer_dtype: torch.dtype) -> None:
    check_main_grads(buffer_dtype)


def test_widths_that_cuda_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "on_cuda", lambda _: True)
    for sizes, text in (({"dim": 20}, "x_TD: got D=20"), ({"width": 12}, "down_EDI: got I=12")):
        t = MoeCase(**{**SMALL.__dict__, **sizes}).tensors()
        with pytest.raises(ValueError, match=f"expert_mlp: {text}, accepted a multiple of 8 .* on CUDA; pad"):
            ops.expert_mlp(*t.layer, t.experts_TK)


def test_backends_on_cuda() -> None:
    cuda = torch.device("cuda")
    assert [b.name for b in ops.backends.listing("expert_mlp") if b.device == "cuda"] == ["native", "torch_grouped_mm"]
    defaults = [ops.backends.choose("expert_mlp", None, cuda, dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert defaults == ["native", "torch_grouped_mm"]
    with pytest.raises(ValueError, match=r"got 'native' with float32 on cuda, accepted bfloat16 for 'native', or"):
        ops.backends.choose("expert_mlp", "native", cuda, torch.float32)
    for name in (None, "torch_grouped_mm"):
        with pytest.raises(
            ValueError, match=r"with float64 on cuda, accepted bfloat16 or float32 there, or float64 on"
        ):
            ops.backends.choose("expert_mlp", name, cuda, torch.float64)


def test_fp8_store(unfused: None) -> None:
    check_fp8_store()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_deferred_weight_gradients_cost_no_further_product(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    t = MoeCase(**{**SMALL.__dict__, "dtype": dtype}).tensors()
    plan = ops.reference_plan_dispatch(t.experts_TK, SMALL.num_experts)
    kernels = Unfused()
    monkeypatch.setattr(native, "kernels", lambda op, device: kernels)

    whole = t.leaves()
    ops.expert_mlp(*whole, None, plan=plan).backward(t.grad_TD)
    products, kernels.used = kernels.used, Counter()
    assert products == {"grouped_gemm": 4, "grouped_gemm_weight_grads": 2}

    split, handed_over = t.leaves(), []
    ops.expert_mlp(*split, None, plan=plan, defer_weight_grads=handed_over.append).backward(t.grad_TD)
    assert kernels.used == {"grouped_gemm": 4}
    gradients = handed_over[0]()
    assert kernels.used == products
    for ours, expected in zip((split[0].grad, *gradients, split[3].grad), whole, strict=True):
        assert ours is not None
        assert expected.grad is not None
        assert not first_difference(ours, expected.grad)


def test_gradcheck(unfused: None) -> None:
    case = MoeCase(num_tokens=5, num_experts=3, top_k=2, dim=4, width=3, dtype=torch.float64, routing="uniform", seed=1)
    t = case.tensors()
    plan = ops.reference_plan_dispatch(t.experts_TK, 3)

    def layer(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        return ops.expert_mlp(x, gate_up, down, weights, None, plan=plan)

    assert torch.autograd.gradcheck(layer, t.leaves())


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_only_the_wanted_gradients_are_made(unfused: None, needed: tuple[int, ...]) -> None:
    expected = run(SMALL)
    t = SMALL.tensors()
    layer = t.leaves(needed)
    ops.expert_mlp(*layer, t.experts_TK).backward(t.grad_TD)
    for i, value in enumerate(layer):
        if i not in needed:
            assert value.grad is None
        else:
            assert value.grad is not None
            assert not first_difference(value.grad, expected[i + 1])


def test_the_same_as_the_fused_kernel_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    case = MoeCase(**{**SMALL.__dict__, "dtype": torch.float64})
    fused = run(case)
    monkeypatch.setattr(native, "kernels", lambda op, device: Unfused())
    for a, b in zip(run(case), fused, strict=True):
        assert relative_error(a, b) <= 1e-13


def test_weighted_swiglu_backward() -> None:
    """Against autograd in float64, and the op's registration."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        gate_up = torch.randn(6, 22, generator=generator, dtype=torch.float64).to(dtype)
        grad = torch.randn(6, 11, generator=generator, dtype=torch.float64).to(dtype)
        weights = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        weights = weights if dtype == torch.float64 else weights.float()
        slots = torch.tensor([4, 0, 5, 1, 2, 3]).int()
        function = torch.ops.k25.weighted_swiglu_backward.default
        torch.library.opcheck(function, (grad, gate_up, weights, slots))
        leaf, weight_leaf = gate_up.double().requires_grad_(), weights.double().requires_grad_()
        act = ops.reference_swiglu(leaf) * weight_leaf.view(-1)[slots.long()][:, None]
        expected = torch.autograd.grad(act, (leaf, weight_leaf), grad.double())
        ours = function(grad, gate_up, weights, slots)
        for name, a, b in zip(("gate_up", "act", "weights"), ours, (expected[0], act, expected[1]), strict=True):
            assert relative_error(a.detach(), b.detach()) <= tolerance(dtype), (name, dtype)
    with pytest.raises(IndexError, match="weighted_swiglu_backward"):
        function(grad, gate_up, weights, slots + 1)
