"""dispatch, combine and swiglu against their references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k25sys import ops
from k25sys.ops import native
from tests.ops.generators import MoeCase, first_difference, moe_cases, relative_error, tolerance

ISAS = [*native._C.cpu.available_isas(), "emulated_bf16"]


def values_and_gradients(function, *inputs: Tensor) -> list[Tensor]:
    """The function's value and the gradients of its inputs for an arbitrary upstream gradient."""
    inputs = tuple(value.clone().requires_grad_() for value in inputs)
    value = function(*inputs)
    upstream = torch.arange(value.numel()).sin().view_as(value).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, inputs, upstream)]


@settings(max_examples=60)
@given(case=moe_cases())
def test_dispatch_copies_bitwise_and_its_gradient_is_combine(case: MoeCase) -> None:
    t = case.tensors()
    plan = ops.plan_dispatch(t.experts_TK, case.num_experts)
    ours = values_and_gradients(lambda x: ops.dispatch(x, plan), t.x_TD)
    assert not first_difference(ours[0], ops.reference_dispatch(t.x_TD, plan))
    exact = values_and_gradients(lambda x: ops.reference_dispatch(x, plan), t.x_TD.double())
    assert relative_error(ours[1], exact[1]) <= tolerance(case.dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dim", "dtype"), [(1024, torch.float32), (1040, torch.bfloat16), (1027, torch.float64)])
def test_a_dispatch_larger_than_the_caches(isa: str, dim: int, dtype: torch.dtype) -> None:
    x_TD = torch.randn(600, dim).to(dtype)
    plan = ops.plan_dispatch(torch.rand(600, 9).argsort(1)[:, :8].int(), 9)
    threads = torch.get_num_threads()
    native._C.cpu.set_isa(isa)
    torch.set_num_threads(1)
    try:
        assert not first_difference(ops.dispatch(x_TD, plan), ops.reference_dispatch(x_TD, plan))
    finally:
        native._C.cpu.set_isa("auto")
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40)
@given(case=moe_cases())
def test_combine(isa: str, case: MoeCase) -> None:
    t = case.tensors()
    plan = ops.plan_dispatch(t.experts_TK, case.num_experts)
    native._C.cpu.set_isa(isa)
    try:
        ours = values_and_gradients(lambda y, w: ops.combine(y, w, plan), t.rows_MD, t.weights_TK)
    finally:
        native._C.cpu.set_isa("auto")
    exact = values_and_gradients(
        lambda y, w: ops.reference_combine(y, w, plan), t.rows_MD.double(), t.weights_TK.double()
    )
    for a, b in zip(ours[:2], exact[:2], strict=True):
        assert relative_error(a, b) <= tolerance(case.dtype)
    # A routing weight's gradient is a product of two vectors, whose terms may cancel: rounding is relative to them.
    upstream = torch.arange(ours[0].numel()).sin().view_as(exact[0])
    sizes = t.rows_MD.double().norm(dim=1)[plan.row_of_slot_TK.long()] * upstream.norm(dim=1)[:, None]
    assert ((ours[2] - exact[2]).abs() <= tolerance(case.dtype) * sizes).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_is_bitwise_repeatable_for_any_number_of_threads(dtype: torch.dtype) -> None:
    case = MoeCase(num_tokens=300, num_experts=9, top_k=7, dim=130, width=1, dtype=dtype, routing="uniform", seed=3)
    t = case.tensors()
    plan = ops.plan_dispatch(t.experts_TK, 9)
    threads = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3, 1):
            torch.set_num_threads(num_threads)
            results.append(values_and_gradients(lambda y, w: ops.combine(y, w, plan), t.rows_MD, t.weights_TK))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert [first_difference(a, b) for a, b in zip(results[0], other, strict=True)] == ["", "", ""]


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40)
@given(
    rows=st.integers(0, 40),
    width=st.integers(0, 70),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float64)),
    scale=st.sampled_from((1.0, 30.0, 300.0)),
)
def test_swiglu(isa: str, rows: int, width: int, dtype: torch.dtype, scale: float) -> None:
    gate_up = (torch.randn(rows, 2 * width) * scale).to(dtype)
    native._C.cpu.set_isa(isa)
    try:
        ours = values_and_gradients(ops.swiglu, gate_up)
    finally:
        native._C.cpu.set_isa("auto")
    exact = values_and_gradients(ops.reference_swiglu, gate_up.double())
    for a, b in zip(ours, exact, strict=True):
        assert torch.isfinite(a).all()
        assert relative_error(a, b) <= tolerance(dtype)


def test_non_contiguous_rows_are_accepted() -> None:
    wide = torch.randn(6, 40).T
    assert not first_difference(ops.swiglu(wide), ops.swiglu(wide.contiguous()))
    plan = ops.plan_dispatch(torch.randint(0, 3, (40, 2)), 3)
    assert not first_difference(ops.dispatch(wide, plan), ops.reference_dispatch(wide, plan))
    one = torch.randn(1, 6).expand(40, 6)
    assert not first_difference(ops.dispatch(one, plan), ops.reference_dispatch(one, plan))


def test_a_lost_row_is_seen() -> None:
    """The comparison that the tests above rest on can fail."""
    value = torch.randn(64, 16)
    wrong = value.clone()
    wrong[63, 15] += 1e-3
    assert relative_error(wrong, value) > tolerance(torch.float32)
    assert first_difference(wrong, value).startswith("1 of 1024 differ, first at (63, 15)")
