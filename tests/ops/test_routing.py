"""route_tokens and plan_dispatch against their references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k25sys import ops
from k25sys.ops import native
from tests.ops.generators import MoeCase, check_routing, first_difference, moe_cases, relative_error

ISAS = [*native._C.cpu.available_isas(), "emulated_bf16"]


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40)
@given(case=moe_cases(), scale=st.sampled_from((1.0, 2.827)))
def test_route_tokens_against_its_formula(isa: str, case: MoeCase, scale: float) -> None:
    t = case.tensors()
    native._C.cpu.set_isa(isa)
    try:
        weights, experts = ops.route_tokens(t.logits_TE, t.bias_E, top_k=case.top_k, scale=scale)
    finally:
        native._C.cpu.set_isa("auto")
    assert experts.dtype == torch.int32
    check_routing(case, weights, experts, scale)


@given(case=moe_cases())
def test_reference_route_tokens_against_the_formula(case: MoeCase) -> None:
    t = case.tensors()
    check_routing(case, *ops.reference_route_tokens(t.logits_TE, t.bias_E, top_k=case.top_k, scale=2.827), 2.827)


def test_a_wrong_router_is_seen() -> None:
    case = MoeCase(num_tokens=9, num_experts=8, top_k=2, dim=1, width=1, dtype=torch.float32, routing="uniform", seed=1)
    t = case.tensors()
    no_bias = ops.route_tokens(t.logits_TE, torch.zeros(8), top_k=2, scale=2.0)
    with pytest.raises(AssertionError):
        check_routing(case, *no_bias, 2.0)
    weights, experts = ops.route_tokens(t.logits_TE, t.bias_E, top_k=2, scale=2.0)
    with pytest.raises(AssertionError):
        check_routing(case, weights * (1 + 1e-5), experts, 2.0)


@settings(max_examples=60)
@given(case=moe_cases(dtypes=(torch.float32, torch.float64)))
def test_route_tokens_gradient(case: MoeCase) -> None:
    t = case.tensors()
    grads = []
    for function in (ops.route_tokens, ops.reference_route_tokens):
        logits = t.logits_TE.clone().requires_grad_()
        weights, _ = function(logits, t.bias_E, top_k=case.top_k, scale=2.827)
        (weights * torch.arange(weights.numel()).sin().view_as(weights)).sum().backward()
        grads.append(logits.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=2e-6)


def test_ties_go_to_the_lower_id() -> None:
    weights, experts = ops.route_tokens(torch.zeros(3, 40), torch.zeros(40), top_k=16, scale=1.0)
    assert experts.tolist() == [list(range(16))] * 3
    assert relative_error(weights, torch.full((3, 16), 1 / 16)) <= 1e-7


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[-1e30, -200.0, 200.0, 1e30], [-float("inf"), float("inf"), 0.0, 5.0]])
    weights, experts = ops.route_tokens(logits, torch.zeros(4), top_k=4, scale=2.0)
    assert torch.isfinite(weights).all()
    assert relative_error(weights.sum(-1), torch.full((2,), 2.0)) < 1e-6
    assert experts[1].tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("where", ["logits", "bias"])
def test_nan_is_refused_with_its_position(where: str) -> None:
    logits, bias = torch.zeros(3, 5), torch.zeros(5)
    (logits[2] if where == "logits" else bias)[4] = float("nan")
    with pytest.raises(ValueError, match=r"route_tokens: (logits_TE\[2, 4\]|bias_E\[4\]): got NaN"):
        ops.route_tokens(logits, bias, top_k=2, scale=1.0)


@settings(max_examples=150)
@given(case=moe_cases(), ids=st.sampled_from((torch.int32, torch.int64)))
def test_plan_is_the_stable_counting_sort(case: MoeCase, ids: torch.dtype) -> None:
    experts = case.tensors().experts_TK.to(ids)
    ours, reference = (f(experts, case.num_experts) for f in (ops.plan_dispatch, ops.reference_plan_dispatch))
    assert (ours.num_experts, ours.top_k, ours.num_tokens) == (case.num_experts, case.top_k, case.num_tokens)
    for a, b in zip(ours[2:], reference[2:], strict=True):
        assert a.dtype == torch.int32
        assert not first_difference(a, b)


def test_plan_accepts_a_transposed_view() -> None:
    experts = torch.randint(0, 7, (3, 20)).T
    for a, b in zip(ops.plan_dispatch(experts, 7), ops.reference_plan_dispatch(experts, 7), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
