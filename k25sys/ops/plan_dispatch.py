"""The plan that groups (token, expert) pairs by expert: a stable counting sort and its inverse."""

from typing import NamedTuple

import torch
from torch import Tensor

from k25sys.errors import ArgumentTypeError, message
from k25sys.ops import checks, native


class DispatchPlan(NamedTuple):
    """Which row of the expert-grouped matrix holds which (token, slot) pair. M = T * K rows; every index is int32.

    Rows of one expert are neighbours, in rising order of token and then of slot, so a plan is a function of its
    input alone. A plan is a named tuple: it goes through torch.compile, and two of its ints are static there.
    """

    num_experts: int
    """E."""
    top_k: int
    """K."""
    tokens_per_expert_E: Tensor
    """(E,): rows of each expert; the sum is M."""
    offsets: Tensor
    """(E + 1,): expert e owns rows offsets[e] to offsets[e + 1]; offsets[0] is 0."""
    slot_of_row_M: Tensor
    """(M,): the flat index token * K + slot that row m came from."""
    row_of_slot_TK: Tensor
    """(T, K): the row that holds this pair; the inverse of slot_of_row_M."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.row_of_slot_TK.shape[0]


def reference_plan_dispatch(experts_TK: Tensor, num_experts: int) -> DispatchPlan:
    """`plan_dispatch` in plain torch."""
    flat_M = experts_TK.reshape(-1).long()
    slot_of_row_M = flat_M.argsort(stable=True)
    row_of_slot_M = torch.empty_like(slot_of_row_M)
    row_of_slot_M[slot_of_row_M] = torch.arange(len(flat_M), device=flat_M.device)
    tokens_per_expert_E = flat_M.bincount(minlength=num_experts)
    offsets = torch.cat([tokens_per_expert_E.new_zeros(1), tokens_per_expert_E.cumsum(0)])
    return DispatchPlan(
        num_experts,
        experts_TK.shape[1],
        tokens_per_expert_E.int(),
        offsets.int(),
        slot_of_row_M.int(),
        row_of_slot_M.int().view(experts_TK.shape),
    )


def plan_dispatch(experts_TK: Tensor, num_experts: int) -> DispatchPlan:
    """Groups (token, expert) pairs by expert.

    Args:
        experts_TK: (T, K) int32 or int64, each in [0, num_experts); 1 <= K <= 16.
        num_experts: E, 1 to 512.

    Raises:
        IndexError: an id outside [0, E), with its token and slot (on CUDA: a device-side trap).
        TypeError, ValueError: a wrong dtype, shape or number.
    """
    tensors = _OP(experts_TK, num_experts)
    return DispatchPlan(num_experts, experts_TK.shape[1], *tensors)


def check_plan(op: str, plan: DispatchPlan) -> None:
    """Raises unless `plan` is a DispatchPlan. The ops check the sizes of its tensors, and the kernels their values."""
    if not isinstance(plan, DispatchPlan):
        raise ArgumentTypeError(
            message(op, "plan", type(plan).__name__, "a DispatchPlan", "make it with plan_dispatch")
        )


def _fake(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "plan_dispatch"
    checks.tensor(op, "experts_TK", experts, (torch.int32, torch.int64), (None, None), "TK")
    checks.same_device(op, "experts_TK", experts, {})
    num_tokens, top_k = experts.shape
    checks.integer(op, "num_experts", num_experts, 1, checks.MAX_EXPERTS)
    checks.integer(op, "K (columns of experts_TK)", top_k, 1, checks.MAX_TOP_K)
    checks.row_count(op, "experts_TK", num_tokens, top_k)
    new = experts.new_empty
    return (
        new((num_experts,), dtype=torch.int32),
        new((num_experts + 1,), dtype=torch.int32),
        new((num_tokens * top_k,), dtype=torch.int32),
        new((num_tokens, top_k), dtype=torch.int32),
    )


def _kernel(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _fake(experts, num_experts)
    module = native.kernels("plan_dispatch", experts.device)
    experts = experts.contiguous()
    workspace = None
    if experts.device.type == "cuda":
        entries = module.plan_dispatch_workspace(experts.numel(), num_experts)
        workspace = torch.empty(entries, dtype=torch.int32, device=experts.device)
    module.plan_dispatch(
        experts.data_ptr(), experts.dtype == torch.int64, experts.shape[0], num_experts, experts.shape[1],
        *(output.data_ptr() for output in outputs), native.address(workspace), native.where(experts.device),
    )  # fmt: skip
    return outputs


_OP = native.define(
    "plan_dispatch(Tensor experts_TK, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)", _kernel, _fake
)
