"""The experts composed from torch's grouped_mm and the ops beside it: the backend "torch_grouped_mm"."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k25sys.ops.combine import combine
from k25sys.ops.dispatch import dispatch
from k25sys.ops.plan_dispatch import DispatchPlan
from k25sys.ops.swiglu import swiglu


class _AccumulateGrad(torch.autograd.Function):
    """The weight itself; its gradient goes into main_grad and no further."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.main_grad = main_grad
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.main_grad.add_(grad)
        return None, None


WeightGrads = Callable[[], tuple[Tensor | None, Tensor | None]]
"""The second half of a backward: see expert_mlp."""


@dataclass
class _Deferred:
    """Collects the weight gradients of both products, of which the down product's come first."""

    defer: Callable[[WeightGrads], None]
    main_grads: tuple[Tensor | None, Tensor | None]
    awaited: int
    computations: dict[int, Callable[[], Tensor]] = field(default_factory=dict)

    def add(self, index: int, compute: Callable[[], Tensor]) -> None:
        """Takes the computation of gate_up's gradient (0) or of down's (1), and hands both over with the last."""
        self.computations[index] = compute
        if len(self.computations) == self.awaited:
            self.defer(self._second_half)

    def _second_half(self) -> tuple[Tensor | None, Tensor | None]:
        gate_up, down = (self._result(index) for index in (0, 1))
        return gate_up, down

    def _result(self, index: int) -> Tensor | None:
        if index not in self.computations:
            return None
        gradient, main_grad = self.computations[index](), self.main_grads[index]
        if main_grad is None:
            return gradient
        main_grad.add_(gradient)
        return None


class _DeferredProduct(torch.autograd.Function):
    """grouped_mm, whose weight gradient is computed when it is asked for."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, w_ENK: Tensor, ends_E: Tensor, deferred: _Deferred, index: int) -> Tensor:
        ctx.save_for_backward(x_MK, w_ENK, ends_E)
        ctx.deferred, ctx.index = deferred, index
        return torch.nn.functional.grouped_mm(x_MK, w_ENK.transpose(1, 2), offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor | None, ...]:
        grouped_mm = torch.nn.functional.grouped_mm
        x_MK, w_ENK, ends_E = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            kept_MK = x_MK.detach()  # without the graph that made it
            ctx.deferred.add(ctx.index, lambda: grouped_mm(grad_MN.T, kept_MK, offs=ends_E))
        grad_x = grouped_mm(grad_MN, w_ENK, offs=ends_E) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None


def grouped_mm_expert_mlp(
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDI: Tensor,
    weights_TK: Tensor,
    plan: DispatchPlan,
    main_grads: tuple[Tensor | None, Tensor | None],
    defer: Callable[[WeightGrads], None] | None,
) -> Tensor:
    """dispatch -> grouped_mm -> swiglu -> grouped_mm -> combine; arguments as for `expert_mlp`, checked there."""
    ends_E = plan.offsets[1:]
    x_MD = dispatch(x_TD, plan)
    if defer is not None:
        awaited = sum(weight.requires_grad for weight in (gate_up_EGD, down_EDI))
        deferred = _Deferred(defer, main_grads, awaited)
        act_MI = swiglu(_DeferredProduct.apply(x_MD, gate_up_EGD, ends_E, deferred, 0))
        y_MD = _DeferredProduct.apply(act_MI, down_EDI, ends_E, deferred, 1)
        return combine(y_MD, weights_TK, plan)
    grouped_mm = torch.nn.functional.grouped_mm
    if main_grads[0] is not None and main_grads[1] is not None:
        gate_up_EGD = _AccumulateGrad.apply(gate_up_EGD, main_grads[0])
        down_EDI = _AccumulateGrad.apply(down_EDI, main_grads[1])
    act_MI = swiglu(grouped_mm(x_MD, gate_up_EGD.transpose(1, 2), offs=ends_E))
    y_MD = grouped_mm(act_MI, down_EDI.transpose(1, 2), offs=ends_E)
    return combine(y_MD, weights_TK, plan)
