"""The experts of a MoE layer as one op: gather, gate/up GEMM, SwiGLU, down GEMM, weighted combine."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k25sys.errors import ArgumentTypeError, ArgumentValueError, LayoutError, ShapeError, message
from k25sys.ops import backends, checks, composed_experts, measure, native
from k25sys.ops.combine import reference_combine
from k25sys.ops.dispatch import reference_dispatch
from k25sys.ops.grouped_mm import WeightGrads, grouped_mm_expert_mlp
from k25sys.ops.packed_experts import PackedExperts
from k25sys.ops.plan_dispatch import DispatchPlan, check_plan, plan_dispatch, reference_plan_dispatch
from k25sys.ops.quantize_fp8 import dequantize_fp8, quantize_fp8
from k25sys.ops.swiglu import reference_swiglu

ACTIVATION_STORES = {
    "exact": (False, False), "fp8": (True, True), "fp8_x": (True, False), "fp8_gate_up": (False, True),
}  # fmt: skip
"""Whether E4M3 stores the tokens, and the inputs of SwiGLU."""


def reference_expert_mlp(
    x_TD: Tensor, gate_up_EGD: Tensor, down_EDI: Tensor, weights_TK: Tensor, experts_TK: Tensor
) -> Tensor:
    """`expert_mlp` in plain torch: one expert after the other, each step rounded to the dtype of `x_TD`."""
    plan = reference_plan_dispatch(experts_TK, gate_up_EGD.shape[0])
    ends = plan.offsets.tolist()
    x_MD = reference_dispatch(x_TD, plan)
    y_MD = torch.cat(
        [
            reference_swiglu(x_MD[begin:end] @ gate_up_GD.T) @ down_DI.T
            for begin, end, gate_up_GD, down_DI in zip(ends[:-1], ends[1:], gate_up_EGD, down_EDI, strict=True)
        ]
    )
    return reference_combine(y_MD, weights_TK, plan)


def expert_mlp(
    x_TD: Tensor,
    gate_up_EGD: Tensor,
    down_EDI: Tensor,
    weights_TK: Tensor,
    experts_TK: Tensor | None,
    *,
    plan: DispatchPlan | None = None,
    packed: PackedExperts | None = None,
    gate_up_main_grad: Tensor | None = None,
    down_main_grad: Tensor | None = None,
    backend: str | None = None,
    activation_store: str = "exact",
    defer_weight_grads: Callable[[WeightGrads], None] | None = None,
) -> Tensor:
    """y_t = sum over k of weights_tk * down_e (silu(gate_e x_t) * (up_e x_t)), e = experts_tk (Kimi K2's experts).

    Args:
        x_TD: (T, D) float32, bfloat16 or float64; bfloat16 is multiplied with float32 accumulation.
        gate_up_EGD: (E, 2I, D), dtype of x: gate rows first, then up rows.
        down_EDI: (E, D, I), dtype of x.
        weights_TK: (T, K) float32 (float64 for float64 tokens): routing weights.
        experts_TK: (T, K) int32 or int64 in [0, E); may be None where `plan` is given.
        plan: the plan of these experts, if the caller has it already.
        packed: weights packed by an earlier call (CPU, native backend); see PackedExperts.
        gate_up_main_grad, down_main_grad: both or neither; contiguous, of the weights' shapes, dtype of the weights or
            float32. The backward adds the weight gradients to them, and the weights' own .grad stays None (Megatron's
            gradient_accumulation_fusion).
        backend: None picks "native", on CUDA for bfloat16 (D and I are then multiples of 8) and "torch_grouped_mm" for
            other dtypes; see k25sys.ops.backends.
        activation_store: "exact" saves the tokens and the inputs of SwiGLU for the backward as they are; "fp8" as E4M3
            in tiles of 1 x 128, as K2.5 trains (K2, section 2.4.3): a little over half of the memory of bfloat16, and
            gradients of the rounded values; "fp8_x" only the tokens, "fp8_gate_up" only the inputs of SwiGLU. Native
            backend, float32 and bfloat16.
        defer_weight_grads: gets the second half of the backward as a function, and the weights get no gradient from
            autograd (zero-bubble schedules). Called, it returns the gradients of gate_up and down, the same bit for
            bit, None for one that is not needed, or adds them to the main_grad buffers and returns None for both. It is
            handed over in every backward of a call in which a weight requires a gradient. No product is computed twice.

    Returns:
        y_TD (T, D), differentiable (once) in x, both weights and the routing weights. On the native backend it and its
        gradients are bitwise independent of the number of threads.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device, plan or backend. Nothing is cast, under autocast neither.
        IndexError: on the CPU, an expert id or a plan entry out of range.
    """
    op = "expert_mlp"
    _check_tokens_and_weights(op, x_TD, gate_up_EGD, down_EDI, weights_TK)
    plan = _plan_of(op, x_TD, weights_TK, experts_TK, plan, gate_up_EGD.shape[0])
    main_grads = _checked_main_grads(op, x_TD, gate_up_EGD, down_EDI, gate_up_main_grad, down_main_grad)
    name = backends.choose(op, backend, x_TD.device, x_TD.dtype)
    if activation_store not in ACTIVATION_STORES:
        accepted = ", ".join(map(repr, ACTIVATION_STORES))
        raise ArgumentValueError(message(op, "activation_store", repr(activation_store), accepted))
    if activation_store != "exact" and (name != "native" or x_TD.dtype == torch.float64):
        got = f"{activation_store!r} with {x_TD.dtype} on backend {name}"
        accepted = f"{activation_store!r} with float32 or bfloat16 on native"
        raise ArgumentValueError(message(op, "activation_store", got, accepted))
    if name == "torch_grouped_mm":
        if packed is not None:
            raise ArgumentValueError(message(op, "packed", "PackedExperts", "None with backend torch_grouped_mm"))
        return grouped_mm_expert_mlp(x_TD, gate_up_EGD, down_EDI, weights_TK, plan, main_grads, defer_weight_grads)
    _check_for_cuda(op, x_TD, down_EDI)
    packs = [] if packed is None else packed.tensors(gate_up_EGD, down_EDI)
    if defer_weight_grads is not None and native.wants_grad(x_TD, gate_up_EGD, down_EDI, weights_TK):
        stores = list(ACTIVATION_STORES[activation_store])
        inputs = (
            x_TD, gate_up_EGD, down_EDI, weights_TK, plan.offsets, plan.slot_of_row_M, plan.row_of_slot_TK,
        )  # fmt: skip
        return _ExpertMlp.apply(packs, main_grads, stores, defer_weight_grads, *inputs)[0]
    return _OP(
        x_TD, gate_up_EGD, down_EDI, weights_TK, plan.offsets, plan.slot_of_row_M, plan.row_of_slot_TK, packs,
        *main_grads, False, list(ACTIVATION_STORES[activation_store]),
    )[0]  # fmt: skip


def _plan_of(
    op: str, x: Tensor, weights: Tensor, experts: Tensor | None, plan: DispatchPlan | None, num_experts: int
) -> DispatchPlan:
    """The caller's plan, or that of its experts; checked against the other arguments."""
    if experts is not None:
        hint = "T and K are those of weights_TK"
        checks.tensor(op, "experts_TK", experts, (torch.int32, torch.int64), weights.shape, "TK", hint)
        checks.same_device(op, "x_TD", x, {"experts_TK": experts})
    if plan is not None:
        check_plan(op, plan)
    elif experts is not None:
        plan = _plan(op, experts, num_experts)
    else:
        raise ArgumentTypeError(message(op, "experts_TK", None, "a torch.Tensor, or None beside a plan"))
    for name, want, got in (("num_experts", num_experts, plan.num_experts), ("top_k", weights.shape[1], plan.top_k)):
        if want != got:
            raise ShapeError(message(op, f"plan.{name}", got, str(want), "make the plan from these experts_TK"))
    return plan


def _plan(op: str, experts: Tensor, num_experts: int) -> DispatchPlan:
    try:
        return plan_dispatch(experts, num_experts)
    except IndexError as error:
        raise IndexError(str(error).replace("plan_dispatch", op, 1)) from None


def _check_tokens_and_weights(op: str, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> None:
    checks.tensor(op, "x_TD", x, checks.FLOATS, (None, None), "TD")
    checks.tensor(op, "gate_up_EGD", gate_up, (x.dtype,), (None, None, x.shape[1]), "EGD")
    num_experts, gate_up_width, dim = gate_up.shape
    hint = "E and G = 2I are those of gate_up_EGD, D is that of x_TD"
    checks.integer(op, "E (first size of gate_up_EGD)", num_experts, 1, checks.MAX_EXPERTS)
    if gate_up_width % 2:
        raise ShapeError(message(op, "gate_up_EGD", f"G={gate_up_width}", "an even G: gate rows, then up rows"))
    checks.tensor(op, "down_EDI", down, (x.dtype,), (num_experts, dim, gate_up_width // 2), "EDI", hint)
    dtype = checks.routing_dtype(x.dtype)
    checks.tensor(op, "weights_TK", weights, (dtype,), (x.shape[0], None), "TK")
    checks.integer(op, "K (columns of weights_TK)", weights.shape[1], 1, checks.MAX_TOP_K)
    checks.row_count(op, "weights_TK", *weights.shape)
    checks.same_device(op, "x_TD", x, {"gate_up_EGD": gate_up, "down_EDI": down, "weights_TK": weights})


def _check_for_cuda(op: str, x: Tensor, down: Tensor) -> None:
    """Raises unless the tensor cores' copies take the rows of these matrices."""
    for name, axis, size in (("x_TD", "D", x.shape[1]), ("down_EDI", "I", down.shape[2])):
        if checks.on_cuda(x) and size % 8:
            hint = "pad tokens and weights with zeros"
            raise ShapeError(message(op, name, f"{axis}={size}", "a multiple of 8 with backend 'native' on CUDA", hint))


def _checked_main_grads(
    op: str, x: Tensor, gate_up: Tensor, down: Tensor, gate_up_main_grad: Tensor | None, down_main_grad: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if (gate_up_main_grad is None) != (down_main_grad is None):
        missing = "gate_up_main_grad" if gate_up_main_grad is None else "down_main_grad"
        raise ArgumentValueError(message(op, missing, None, "both main_grad buffers or neither"))
    if gate_up_main_grad is None or down_main_grad is None:
        return None, None
    dtypes = tuple(dict.fromkeys((x.dtype, torch.float32) if x.dtype != torch.float64 else (x.dtype,)))
    for name, buffer, weight, axes in (
        ("gate_up_main_grad", gate_up_main_grad, gate_up, "EGD"),
        ("down_main_grad", down_main_grad, down, "EDI"),
    ):
        checks.tensor(op, name, buffer, dtypes, weight.shape, axes)
        checks.same_device(op, "x_TD", x, {name: buffer})
        if not buffer.is_contiguous():
            raise LayoutError(message(op, name, f"strides {buffer.stride()}", "a contiguous buffer"))
        if buffer.requires_grad:
            raise ArgumentValueError(message(op, name, "requires_grad=True", "a plain buffer", "detach it"))
    checks.tensor(op, "down_main_grad", down_main_grad, (gate_up_main_grad.dtype,), down.shape, "EDI")
    return gate_up_main_grad, down_main_grad


def _check(
    op: str, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, slot_of_row: Tensor,
    row_of_slot: Tensor,
) -> None:  # fmt: skip
    _check_tokens_and_weights(op, x, gate_up, down, weights)
    checks.tensor(op, "plan.offsets", offsets, checks.INT32, (gate_up.shape[0] + 1,), "N")
    checks.tensor(op, "plan.row_of_slot_TK", row_of_slot, checks.INT32, weights.shape, "TK")
    checks.tensor(op, "plan.slot_of_row_M", slot_of_row, checks.INT32, (weights.shape[0] * weights.shape[1],), "M")
    checks.same_device(
        op, "x_TD", x, {"plan.offsets": offsets, "plan.slot_of_row_M": slot_of_row, "plan.row_of_slot_TK": row_of_slot}
    )


def _check_packs(op: str, packs: Sequence[Tensor], counts: tuple[int, ...], gate_up: Tensor) -> None:
    if len(packs) not in counts:
        raise ArgumentValueError(message(op, "packed", f"{len(packs)} tensors", " or ".join(map(str, counts))))
    for pack, kind in zip(packs, (0, 1, 2, 3) if len(packs) > 2 or counts[-1] > 2 else (2, 3), strict=False):
        num_bytes = PackedExperts.num_bytes(kind, gate_up)
        checks.tensor(op, "packed", pack, (torch.uint8,), (num_bytes,), "B")


def _fake(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, slot_of_row: Tensor,
    row_of_slot: Tensor, packs: list[Tensor], gate_up_main_grad: Tensor | None, down_main_grad: Tensor | None,
    save: bool, store_fp8: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check("expert_mlp", x, gate_up, down, weights, offsets, slot_of_row, row_of_slot)
    rows = x.new_empty((slot_of_row.shape[0], gate_up.shape[1])) if save else x.new_empty((0,))
    return x.new_empty(x.shape), rows


def _kernel(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, slot_of_row: Tensor,
    row_of_slot: Tensor, packs: list[Tensor], gate_up_main_grad: Tensor | None, down_main_grad: Tensor | None,
    save: bool, store_fp8: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "expert_mlp"
    _check(op, x, gate_up, down, weights, offsets, slot_of_row, row_of_slot)
    _check_packs(op, packs, (0, 2, 4), gate_up)
    kernels = native.kernels(op, x.device)
    if not hasattr(kernels, "expert_mlp"):
        out, rows = composed_experts.forward(x, gate_up, down, weights, offsets, slot_of_row, row_of_slot)
        return out, rows if save else x.new_empty((0,))
    num_rows, (num_tokens, dim), (num_experts, gate_up_width, _) = slot_of_row.shape[0], x.shape, gate_up.shape
    x, gate_up, down, weights = (t.contiguous() for t in (x, gate_up, down, weights))
    offsets, slot_of_row, row_of_slot = offsets.contiguous(), slot_of_row.contiguous(), row_of_slot.contiguous()
    gate_up_rows = native.empty((num_rows, gate_up_width) if save else (0,), x)
    act_rows = native.empty((num_rows, gate_up_width // 2), x)
    out_rows = native.empty((num_rows, dim), x)
    out = native.empty((num_tokens, dim), x)
    with measure.phase_buffer(measure.FORWARD_PHASES) as seconds:
        kernels.expert_mlp(
            x.data_ptr(), gate_up.data_ptr(), down.data_ptr(), *map(native.address, packs[:2] or (None, None)),
            weights.data_ptr(), offsets.data_ptr(), slot_of_row.data_ptr(), row_of_slot.data_ptr(),
            gate_up_rows.data_ptr() if save else 0, act_rows.data_ptr(), out_rows.data_ptr(), out.data_ptr(),
            num_tokens, num_experts, dim, gate_up_width // 2, weights.shape[1], native.DTYPE_CODES[x.dtype],
            native.address(seconds), native.where(x.device),
        )  # fmt: skip
    return out, gate_up_rows


def _backward_fake(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, slot_of_row: Tensor,
    row_of_slot: Tensor, gate_up_rows: Tensor, packs: list[Tensor], needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    _check_backward(grad, x, gate_up, down, weights, offsets, slot_of_row, row_of_slot, gate_up_rows)
    return [t.new_empty(t.shape if need else (0,)) for t, need in zip((x, gate_up, down, weights), needs, strict=True)]


def _check_backward(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, slot_of_row: Tensor,
    row_of_slot: Tensor, gate_up_rows: Tensor,
) -> None:  # fmt: skip
    op = "expert_mlp_backward"
    _check(op, x, gate_up, down, weights, offsets, slot_of_row, row_of_slot)
    checks.tensor(op, "grad_TD", grad, (x.dtype,), x.shape, "TD")
    shape = (slot_of_row.shape[0], gate_up.shape[1])
    checks.tensor(op, "gate_up_rows_MG", gate_up_rows, (x.dtype,), shape, "MG")
    checks.same_device(op, "x_TD", x, {"grad_TD": grad, "gate_up_rows_MG": gate_up_rows})


def _space_for_rows(num_rows: int, x: Tensor, grad_gate_up: Tensor | None, accumulate: bool) -> Tensor:
    """(M, D) for the rows of the input's gradient: in the weight gradient, which is written once they are combined."""
    size = num_rows * x.shape[1]
    if accumulate or grad_gate_up is None or grad_gate_up.numel() < size:
        return native.empty((num_rows, x.shape[1]), x)
    return grad_gate_up.view(-1)[:size].view(num_rows, x.shape[1])


def _run_backward(
    saved: Sequence[Tensor], packs: Sequence[Tensor], grads: Sequence[Tensor | None], accumulate: bool,
    rows: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Fills `grads` (of x, gate_up, down, weights; None where not wanted), and `rows`: the gradients of SwiGLU's inputs
    (M, 2I), and its weighted outputs (M, I)."""
    _check_backward(*saved)
    _check_packs("expert_mlp_backward", packs, (0, 2), saved[2])
    grad, x, gate_up, down, weights, offsets, slot_of_row, row_of_slot, gate_up_rows = (t.contiguous() for t in saved)
    num_rows, dim, width = slot_of_row.shape[0], x.shape[1], down.shape[2]
    grad_gate_up_rows, weighted_act_rows = rows or (
        native.empty((num_rows, 2 * width), x), native.empty((num_rows, width), x),
    )  # fmt: skip
    grad_x_rows = None if grads[0] is None else _space_for_rows(num_rows, x, grads[1], accumulate)
    down_pack, gate_up_pack = packs or (None, None)
    weight_grad = grads[1] if grads[1] is not None else grads[2]
    weight_grad_dtype = x.dtype if weight_grad is None else weight_grad.dtype
    with measure.phase_buffer(measure.BACKWARD_PHASES) as seconds:
        native.cpu_only("expert_mlp", x.device).expert_mlp_backward(
            grad.data_ptr(), x.data_ptr(), gate_up.data_ptr(), down.data_ptr(), native.address(gate_up_pack),
            native.address(down_pack), weights.data_ptr(), offsets.data_ptr(), slot_of_row.data_ptr(),
            row_of_slot.data_ptr(), gate_up_rows.data_ptr(), grad_gate_up_rows.data_ptr(), weighted_act_rows.data_ptr(),
            native.address(grad_x_rows), *(native.address(g) for g in grads), accumulate,
            native.DTYPE_CODES[weight_grad_dtype], x.shape[0], gate_up.shape[0], dim, width, weights.shape[1],
            native.DTYPE_CODES[x.dtype], native.address(seconds), native.where(x.device),
        )  # fmt: skip


def _backward_kernel(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, slot_of_row: Tensor,
    row_of_slot: Tensor, gate_up_rows: Tensor, packs: list[Tensor], needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    inputs = (x, gate_up, down, weights)
    saved = (grad, x, gate_up, down, weights, offsets, slot_of_row, row_of_slot, gate_up_rows)
    if hasattr(native.kernels("expert_mlp", x.device), "expert_mlp"):
        grads = [native.empty(t.shape, t) if need else None for t, need in zip(inputs, needs, strict=True)]
        _run_backward(saved, packs, grads, False)
    else:
        _check_backward(*saved)
        grads = composed_experts.backward(saved, needs, None)
    return [native.or_empty(grad, value) for grad, value in zip(grads, inputs, strict=True)]


def _accumulate_fake(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, slot_of_row: Tensor,
    row_of_slot: Tensor, gate_up_rows: Tensor, packs: list[Tensor], gate_up_main_grad: Tensor, down_main_grad: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_backward(grad, x, gate_up, down, weights, offsets, slot_of_row, row_of_slot, gate_up_rows)
    return x.new_empty(x.shape if needs[0] else (0,)), weights.new_empty(weights.shape if needs[3] else (0,))


def _accumulate_kernel(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, slot_of_row: Tensor,
    row_of_slot: Tensor, gate_up_rows: Tensor, packs: list[Tensor], gate_up_main_grad: Tensor, down_main_grad: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _checked_main_grads("expert_mlp_backward", x, gate_up, down, gate_up_main_grad, down_main_grad)
    saved = (grad, x, gate_up, down, weights, offsets, slot_of_row, row_of_slot, gate_up_rows)
    if hasattr(native.kernels("expert_mlp", x.device), "expert_mlp"):
        grad_x = native.empty(x.shape, x) if needs[0] else None
        grad_weights = native.empty(weights.shape, weights) if needs[3] else None
        main_grads = (gate_up_main_grad if needs[1] else None, down_main_grad if needs[2] else None)
        _run_backward(saved, packs, (grad_x, *main_grads, grad_weights), True)
    else:
        _check_backward(*saved)
        buffers = (gate_up_main_grad, down_main_grad)
        grad_x, _, _, grad_weights = composed_experts.backward(saved, needs, buffers)
    return native.or_empty(grad_x, x), native.or_empty(grad_weights, weights)


def _inputs_fake(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, slot_of_row: Tensor,
    row_of_slot: Tensor, gate_up_rows: Tensor, packs: list[Tensor], needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _check_backward(grad, x, gate_up, down, weights, offsets, slot_of_row, row_of_slot, gate_up_rows)
    grad_x = x.new_empty(x.shape if needs[0] else (0,))
    grad_weights = weights.new_empty(weights.shape if needs[1] else (0,))
    return grad_x, grad_weights, torch.empty_like(gate_up_rows), x.new_empty((len(gate_up_rows), down.shape[2]))


def _inputs_kernel(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, slot_of_row: Tensor,
    row_of_slot: Tensor, gate_up_rows: Tensor, packs: list[Tensor], needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    saved = (grad, x, gate_up, down, weights, offsets, slot_of_row, row_of_slot, gate_up_rows)
    if hasattr(native.kernels("expert_mlp", x.device), "expert_mlp"):
        rows = native.empty(gate_up_rows.shape, x), native.empty((len(gate_up_rows), down.shape[2]), x)
        grads = (
            native.empty(x.shape, x) if needs[0] else None,
            native.empty(weights.shape, weights) if needs[1] else None,
        )
        _run_backward(saved, packs, (grads[0], None, None, grads[1]), False, rows)
    else:
        _check_backward(*saved)
        *grads, grad_rows, act_rows = composed_experts.backward_inputs(saved, needs)
        rows = grad_rows, act_rows
    return native.or_empty(grads[0], x), native.or_empty(grads[1], weights), *rows


def _stored(value: Tensor, store_fp8: bool) -> tuple[Tensor, ...]:
    """An activation as it waits for the backward."""
    return quantize_fp8(value, (1, 128)) if store_fp8 else (value,)


def _restored(stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return stored[0] if len(stored) == 1 else dequantize_fp8(stored[0], stored[1], (1, 128), dtype)


def _first_half(
    grad: Tensor, stored_x: Sequence[Tensor], saved: Sequence[Tensor], packs: Sequence[Tensor], needs: Sequence[bool],
    main_grads: tuple[Tensor | None, Tensor | None], defer: Callable[[WeightGrads], None],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of x and of the routing weights now; those of the weights when `defer` calls for them. Tokens wait
    for that as they were stored."""
    offsets, plan = saved[4], (saved[5], saved[6])
    stored_x = tuple(value.detach() for value in stored_x)  # without the graph that made them
    grad_x, grad_weights, grad_gate_up_rows, act_rows = _INPUTS(grad, *saved, list(packs), [needs[0], needs[3]])

    def second_half() -> tuple[Tensor | None, Tensor | None]:
        x = _restored(stored_x, grad.dtype)
        rows = (grad_gate_up_rows, act_rows)
        return composed_experts.backward_weights(grad.contiguous(), x, rows, offsets, plan, needs[1:3], main_grads)

    if needs[1] or needs[2]:
        defer(second_half)
    return [grad_x, None, None, grad_weights]


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        packs: list[Tensor],
        main_grads: tuple[Tensor | None, Tensor | None],
        store_fp8: list[bool],
        defer: Callable[[WeightGrads], None] | None,
        *inputs: Tensor,
    ) -> Any:
        y, gate_up_rows = _OP.below_autograd(*inputs, packs, *main_grads, True, store_fp8)
        stored_x, stored_rows = _stored(inputs[0], store_fp8[0]), _stored(gate_up_rows, store_fp8[1])
        ctx.num_stored, ctx.dtype = (len(stored_x), len(stored_rows)), y.dtype
        ctx.save_for_backward(*stored_x, *stored_rows, *inputs[1:], *packs[2:])
        ctx.defer = defer
        ctx.main_grads = main_grads  # not saved tensors: they change between microbatches, and may
        ctx.mark_non_differentiable(gate_up_rows)
        return y, gate_up_rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[4:8])
        tensors, (count_x, count_rows) = ctx.saved_tensors, ctx.num_stored
        stored_x, stored_rows, rest = tensors[:count_x], tensors[count_x:][:count_rows], tensors[count_x + count_rows :]
        x, gate_up_rows = _restored(stored_x, ctx.dtype), _restored(stored_rows, ctx.dtype)
        saved, packs = (x, *rest[:6], gate_up_rows), list(rest[6:])
        if ctx.defer is not None:
            grads = _first_half(grad, stored_x, saved, packs, needs, ctx.main_grads, ctx.defer)
            needs = [needs[0], False, False, needs[3]]
        elif ctx.main_grads[0] is None:
            grads = list(_BACKWARD(grad, *saved, packs, needs))
        else:
            grad_x, grad_weights = _ACCUMULATE(grad, *saved, packs, *ctx.main_grads, needs)
            grads, needs = [grad_x, None, None, grad_weights], [needs[0], False, False, needs[3]]
        grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        return None, None, None, None, *grads, None, None, None


def _autograd(
    x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, offsets: Tensor, slot_of_row: Tensor,
    row_of_slot: Tensor, packs: list[Tensor], gate_up_main_grad: Tensor | None, down_main_grad: Tensor | None,
    save: bool, store_fp8: list[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    inputs, main_grads = (
        (x, gate_up, down, weights, offsets, slot_of_row, row_of_slot),
        (gate_up_main_grad, down_main_grad),
    )
    if native.wants_grad(x, gate_up, down, weights):
        return _ExpertMlp.apply(packs, main_grads, store_fp8, None, *inputs)
    return _OP.below_autograd(*inputs, packs, *main_grads, save, store_fp8)


_SAVED = (
    "Tensor x_TD, Tensor gate_up_EGD, Tensor down_EDI, Tensor weights_TK, Tensor offsets, Tensor slot_of_row_M, "
    "Tensor row_of_slot_TK"
)
_OP = native.define(
    f"expert_mlp({_SAVED}, Tensor[] packed, Tensor? gate_up_main_grad, Tensor? down_main_grad, bool save, "
    "bool[] store_fp8) -> (Tensor, Tensor)",
    _kernel, _fake, _autograd,
)  # fmt: skip
_BACKWARD = native.define(
    f"expert_mlp_backward(Tensor grad_TD, {_SAVED}, Tensor gate_up_rows_MG, Tensor[] packed, bool[] needs) -> Tensor[]",
    _backward_kernel, _backward_fake,
)  # fmt: skip
_INPUTS = native.define(
    f"expert_mlp_backward_inputs(Tensor grad_TD, {_SAVED}, Tensor gate_up_rows_MG, Tensor[] packed, bool[] needs) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _inputs_kernel, _inputs_fake,
)  # fmt: skip
_ACCUMULATE = native.define(
    f"expert_mlp_backward_accumulate(Tensor grad_TD, {_SAVED}, Tensor gate_up_rows_MG, Tensor[] packed, "
    "Tensor(a!) gate_up_main_grad, Tensor(b!) down_main_grad, bool[] needs) -> (Tensor, Tensor)",
    _accumulate_kernel, _accumulate_fake,
)  # fmt: skip
