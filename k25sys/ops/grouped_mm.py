"""The experts composed from torch's grouped_mm and the ops beside it: the backend "torch_grouped_mm"."""

from typing import Any

import torch
from torch import Tensor

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


def grouped_mm_expert_mlp(
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDI: Tensor,
    weights_TK: Tensor,
    plan: DispatchPlan,
    main_grads: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """dispatch -> grouped_mm -> swiglu -> grouped_mm -> combine; arguments as for `expert_mlp`, checked there."""
    grouped_mm = torch.nn.functional.grouped_mm
    if main_grads[0] is not None and main_grads[1] is not None:
        gate_up_EGD = _AccumulateGrad.apply(gate_up_EGD, main_grads[0])
        down_EDI = _AccumulateGrad.apply(down_EDI, main_grads[1])
    ends_E = plan.offsets[1:]
    x_MD = dispatch(x_TD, plan)
    act_MI = swiglu(grouped_mm(x_MD, gate_up_EGD.transpose(1, 2), offs=ends_E))
    y_MD = grouped_mm(act_MI, down_EDI.transpose(1, 2), offs=ends_E)
    return combine(y_MD, weights_TK, plan)
