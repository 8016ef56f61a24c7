"""gradcheck, opcheck, torch.compile and the short way past torch's dispatcher."""

import pytest
import torch
from torch import Tensor

from k25sys import ops
from tests.ops.generators import MoeCase, MoeTensors, first_difference

CASE = {"num_tokens": 7, "num_experts": 3, "top_k": 2, "dim": 5, "width": 4, "routing": "uniform", "seed": 1}


def double_case() -> tuple[MoeTensors, ops.DispatchPlan]:
    t = MoeCase(**CASE, dtype=torch.float64).tensors()
    for value in (*t.layer, t.rows_MD, t.logits_TE):
        value.requires_grad_()
    return t, ops.plan_dispatch(t.experts_TK, 3)


def test_gradcheck() -> None:
    t, plan = double_case()
    check = torch.autograd.gradcheck
    assert check(lambda logits: ops.route_tokens(logits, t.bias_E, top_k=2, scale=2.8)[0], (t.logits_TE,))
    assert check(lambda x: ops.dispatch(x, plan), (t.x_TD,))
    assert torch.autograd.gradgradcheck(lambda x: ops.dispatch(x, plan), (t.x_TD,))
    assert check(lambda y, w: ops.combine(y, w, plan), (t.rows_MD, t.weights_TK))
    assert check(ops.swiglu, (t.gate_up_EGD[0].T,))
    assert check(lambda x, gate_up, down, w: ops.expert_mlp(x, gate_up, down, w, None, plan=plan), t.layer)


def test_a_second_derivative_is_refused_not_wrong() -> None:
    t, _ = double_case()
    (grad,) = torch.autograd.grad(ops.swiglu(t.gate_up_EGD[0].T).square().sum(), t.gate_up_EGD, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_opcheck() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        t = MoeCase(**CASE, dtype=dtype).tensors()
        plan = ops.plan_dispatch(t.experts_TK, 3)
        k25 = torch.ops.k25
        tables = (plan.slot_of_row_M, plan.row_of_slot_TK)
        layer = (*t.leaves(), plan.offsets, *tables)
        saved = (t.grad_TD, *t.layer, plan.offsets, *tables, torch.randn(14, 8).to(dtype), [])
        buffers = (torch.zeros(3, 8, 5), torch.zeros(3, 5, 4))
        gate_up_MG = torch.randn(14, 8).to(dtype)
        for op, args in (
            (k25.route_tokens, (t.logits_TE.clone().requires_grad_(), t.bias_E, 2, 2.8)),
            (k25.route_tokens_backward, (t.weights_TK, t.logits_TE, t.experts_TK, 2.8)),
            (k25.plan_dispatch, (t.experts_TK, 3)),
            (k25.dispatch, (t.x_TD.clone().requires_grad_(), *tables)),
            (k25.combine, (t.rows_MD.clone().requires_grad_(), t.weights_TK.clone().requires_grad_(), *tables)),
            (k25.combine, (t.rows_MD.clone().requires_grad_(), None, *tables)),
            (k25.combine_backward, (t.grad_TD, t.rows_MD, t.weights_TK, plan.slot_of_row_M)),
            (k25.swiglu, (gate_up_MG.clone().requires_grad_(),)),
            (k25.swiglu_backward, (torch.randn(14, 4).to(dtype), gate_up_MG)),
            (k25.expert_mlp, (*layer, [], None, None, False, [False, False])),
            (k25.expert_mlp_backward, (*saved, [True, True, False, True])),
            (k25.expert_mlp_backward_inputs, (*saved, [True, False])),
            (k25.expert_mlp_backward_accumulate, (*saved, *buffers, [True] * 4)),
        ):
            torch.library.opcheck(op.default, args)


def layer_from_logits(x: Tensor, gate_up: Tensor, down: Tensor, logits: Tensor, bias: Tensor) -> Tensor:
    """All ops in one function."""
    weights, experts = ops.route_tokens(logits, bias, top_k=2, scale=2.8)
    plan = ops.plan_dispatch(experts, gate_up.shape[0])
    rows = ops.dispatch(x, plan)
    y = ops.expert_mlp(x, gate_up, down, weights, experts, plan=plan)
    return y + ops.combine(ops.swiglu(torch.cat([rows, rows], 1)), weights, plan)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(backend: str, dynamic: bool) -> None:
    compiled = torch.compile(layer_from_logits, fullgraph=True, backend=backend, dynamic=dynamic)
    for num_tokens in (7, 12):
        t = MoeCase(**{**CASE, "num_tokens": num_tokens}, dtype=torch.float32).tensors()
        results = []
        for function in (layer_from_logits, compiled):
            x, gate_up, down, _ = t.leaves()
            inputs = (x, gate_up, down, t.logits_TE.clone().requires_grad_())
            y = function(*inputs, t.bias_E)
            results.append([y.detach(), *torch.autograd.grad(y, inputs, t.grad_TD)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


def test_the_short_way_is_left_where_the_dispatcher_matters() -> None:
    x = torch.randn(4, 6)
    expected = ops.swiglu(x)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = ops.swiglu(mode.from_tensor(x))
    assert isinstance(fake, torch._subclasses.FakeTensor)
    assert fake.shape == (4, 3)
    assert ops.swiglu(x.to("meta")).device.type == "meta"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.swiglu(x)
    assert any(event.key == "k25::swiglu" for event in profile.key_averages())
    imaginary = torch.complex(torch.zeros(4, 6), -x).conj().imag  # x behind torch's lazy negation
    assert imaginary.is_neg()
    assert not first_difference(ops.swiglu(imaginary), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises((NotImplementedError, RuntimeError)):
            ops.swiglu(dual)
    assert not first_difference(torch.func.vmap(ops.swiglu)(x[None])[0], expected)  # torch's own loop over the batch


def test_under_autocast_nothing_is_cast() -> None:
    t = MoeCase(**CASE, dtype=torch.float32).tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.expert_mlp(*t.layer, t.experts_TK).dtype == torch.float32
        with pytest.raises(TypeError, match=r"gate_up_EGD: got dtype torch\.float32, accepted bfloat16"):
            ops.expert_mlp(t.x_TD.bfloat16(), *t.layer[1:], t.experts_TK)


def test_backends_are_listed_and_chosen_by_name() -> None:
    t = MoeCase(**CASE, dtype=torch.float32).tensors()
    for op in ops.backends.OPS:
        for backend in ops.backends.listing(op):
            assert backend.available == (backend.reason == "")
    with pytest.raises(ValueError, match="expert_mlp: backend: got 'deep_gemm', accepted 'native'"):
        ops.expert_mlp(*t.layer, t.experts_TK, backend="deep_gemm")
    double = MoeCase(**CASE, dtype=torch.float64).tensors()
    with pytest.raises(ValueError, match="accepted 'native' for float64"):
        ops.expert_mlp(*double.layer, t.experts_TK, backend="torch_grouped_mm")
