"""Makes malformed calls of the ops, one a line of output; test_malformed.py runs it in processes of its own, so that a
crash is one failing call with its inputs, and not the end of the suite.

    python -m tests.ops.malformed_calls FIRST LAST
"""

import random
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from k25sys import ops
from tests.ops.generators import MoeCase, MoeTensors

SIZES = {"num_tokens": 6, "num_experts": 5, "top_k": 2, "dim": 9, "width": 4, "routing": "uniform"}
NUMBERS = (0, -1, 6, 17, 513, 2**31, 2**63, -(2**63), True, 1.5, float("nan"), float("inf"), "2", None, [2], 1 + 1j)
# What else names the fault of an argument: logits are made of it, or tell which targets there are.
ALSO_NAMED = {"hidden_TD": "logit", "head_VD": "logit", "logits_shard_TV": "targets_T"}
IDS = (-1, 5, 512, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63))
DTYPES = (
    torch.float16, torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8,
    torch.bool, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip


def good_calls(seed: int, dtype: torch.dtype) -> dict[str, tuple[Callable, Callable, dict[str, Any]]]:
    """For each op: the op, its reference, and arguments that both accept."""
    t = MoeCase(**SIZES, dtype=dtype, seed=seed).tensors()
    plan = ops.plan_dispatch(t.experts_TK, 5)
    layer = {"x_TD": t.x_TD, "gate_up_EGD": t.gate_up_EGD, "down_EDI": t.down_EDI, "weights_TK": t.weights_TK}
    route = {"logits_TE": t.logits_TE, "bias_E": t.bias_E, "top_k": 2, "scale": 2.8}
    return {
        **good_losses(t, seed),
        **good_fp8(t),
        **good_products(t),
        "route_tokens": (ops.route_tokens, ops.reference_route_tokens, route),
        "plan_dispatch": (
            ops.plan_dispatch,
            ops.reference_plan_dispatch,
            {"experts_TK": t.experts_TK.long(), "num_experts": 5},
        ),
        "dispatch": (ops.dispatch, ops.reference_dispatch, {"x_TD": t.x_TD, "plan": plan}),
        "combine": (
            ops.combine,
            ops.reference_combine,
            {"y_MD": t.rows_MD, "weights_TK": t.weights_TK, "plan": plan},
        ),
        "swiglu": (ops.swiglu, ops.reference_swiglu, {"gate_up_MG": t.rows_MD[:, :8].contiguous()}),
        "expert_mlp": (ops.expert_mlp, ops.reference_expert_mlp, {**layer, "experts_TK": t.experts_TK}),
        "pool_temporal_patches": (
            ops.pool_temporal_patches,
            ops.reference_pool_temporal_patches,
            {"x_PD": t.rows_MD, "grid_thw_N3": torch.tensor([[1, 2, 2], [2, 2, 2]]), "merge": (2, 2)},
        ),
    }


def good_losses(t: MoeTensors, seed: int) -> dict[str, tuple[Callable, Callable, dict[str, Any]]]:
    """The entry points of the policy loss, and cross-entropy."""
    generator = torch.Generator().manual_seed(seed)
    targets, mask = torch.randint(0, 8, (6,), generator=generator), torch.arange(6) % 3 != 1
    tokens = {
        "old_logprobs_T": torch.randn(6, generator=generator), "advantages_T": torch.randn(6, generator=generator),
        "loss_mask_T": mask, "log_low": -0.7, "log_high": 0.6, "tau": 0.1,
    }  # fmt: skip
    hidden, head = t.x_TD, t.gate_up_EGD[0]
    layer = {"hidden_TD": hidden, "head_VD": head, "targets_T": targets}

    def value(function: Callable) -> Callable:
        return lambda **arguments: function(**arguments)[0]

    def exact(function: Callable, logits: str = "logits_TV") -> Callable:
        """The reference in float64, with the argument names of the op."""

        def run(**arguments: Any) -> Tensor:
            named = {logits if name == "logits_shard_TV" else name: v for name, v in arguments.items()}
            wide = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in named.items()}
            return function(**wide).float()

        return run

    def linear(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, **rest: Any) -> Tensor:
        names = ("old_logprobs_T", "advantages_T", "loss_mask_T")
        tensors = [rest.pop(name) for name in names]
        return ops.reference_linear_clipped_log_ratio_loss(hidden_TD, head_VD, targets_T, *tensors, **rest)

    return {
        "clipped_log_ratio_loss": (
            value(ops.clipped_log_ratio_loss),
            exact(ops.reference_clipped_log_ratio_loss),
            {"logprobs_T": torch.randn(6, generator=generator), **tokens},
        ),
        "vocab_parallel_clipped_log_ratio_loss": (
            value(ops.vocab_parallel_clipped_log_ratio_loss),
            exact(ops.reference_vocab_parallel_clipped_log_ratio_loss),
            {"logits_shard_TV": hidden @ head.T, "targets_T": targets, **tokens},
        ),
        "linear_clipped_log_ratio_loss": (
            value(ops.linear_clipped_log_ratio_loss), exact(linear), {**layer, **tokens}
        ),
        "linear_cross_entropy": (
            ops.linear_cross_entropy, exact(ops.reference_linear_cross_entropy), {**layer, "loss_mask_T": mask}
        ),
    }  # fmt: skip


def good_fp8(t: MoeTensors) -> dict[str, tuple[Callable, Callable, dict[str, Any]]]:
    """Quantisation and the plain product."""
    a, a_scales = ops.quantize_fp8(t.x_TD, (1, 128))
    b, b_scales = ops.quantize_fp8(t.gate_up_EGD[0], (128, 128))
    product = {"a_MK": a, "a_scales": a_scales, "b_NK": b, "b_scales": b_scales}
    return {
        "quantize_fp8": (ops.quantize_fp8, ops.reference_quantize_fp8, {"x": t.x_TD, "block": (1, 128)}),
        "dequantize_fp8": (
            ops.dequantize_fp8,
            ops.reference_dequantize_fp8,
            {"values": a, "scales": a_scales, "block": (1, 128)},
        ),
        "transpose_fp8": (ops.transpose_fp8, ops.reference_transpose_fp8, {"values": b, "scales": b_scales}),
        "fp8_gemm": (numbers(ops.fp8_gemm), numbers(ops.reference_fp8_gemm), product),
    }


def numbers(function: Callable) -> Callable:
    """The function, with NaN for infinities: an infinite scale meets each element, or the sum of 128 of them."""

    def run(**arguments: Any) -> Tensor:
        result = function(**arguments)
        return torch.where(result.isfinite(), result, torch.nan)

    return run


def good_products(t: MoeTensors) -> dict[str, tuple[Callable, Callable, dict[str, Any]]]:
    """The grouped products of a layer."""
    offsets = ops.plan_dispatch(t.experts_TK, 5).offsets
    return {
        "grouped_gemm": (
            ops.grouped_gemm,
            ops.reference_grouped_gemm,
            {"a_MK": t.rows_MD, "b_ENK": t.gate_up_EGD, "offsets": offsets},
        ),
        "grouped_gemm_wgrad": (
            ops.grouped_gemm_wgrad,
            ops.reference_grouped_gemm_wgrad,
            {"a_MN": t.rows_MD, "b_MK": t.rows_MD[:, :4].contiguous(), "offsets": offsets},
        ),
    }


def break_tensor(value: Tensor, rng: random.Random) -> tuple[str, Any]:
    """One fault, or an unusual but valid form, of a tensor."""
    axis, dim = rng.randrange(value.dim()), value.dim()
    flat = value.reshape(-1)
    kinds: list[tuple[str, Callable[[], Any]]] = [
        ("None", lambda: None),
        ("list", value.tolist),
        ("number", lambda: 3),
        ("numpy", lambda: np.zeros(value.shape, dtype=np.float32)),
        ("dtype", lambda: value.to(rng.choice(DTYPES))),
        ("rank + 1", lambda: value[None]),
        ("rank - 1", lambda: value[0]),
        ("no rank", lambda: flat[0]),
        ("one more", lambda: torch.cat([value, value.narrow(axis, 0, 1)], axis)),
        ("one less", lambda: value.narrow(axis, 0, value.shape[axis] - 1)),
        ("empty", lambda: value.narrow(axis, 0, 0)),
        ("meta", lambda: value.to("meta")),
        ("sparse", lambda: (value.float() if value.dtype == torch.float8_e4m3fn else value).to_sparse()),
        ("transposed strides", lambda: value.transpose(0, dim - 1).contiguous().transpose(0, dim - 1)),
        ("stride 0", lambda: flat[:1].reshape([1] * dim).expand(value.shape)),
        ("huge stride 0", lambda: flat[:1].reshape([1] * dim).expand([2**33, *value.shape[1:]])),
        ("gap", lambda: torch.stack([value, value], dim=-1)[..., 0]),
        ("offset view", lambda: torch.cat([flat[:1], flat])[1:].view(value.shape)),
    ]
    if value.dtype in (torch.bool, torch.float8_e4m3fn):
        pass  # no value of theirs is wrong
    elif value.is_floating_point():
        special = rng.choice((float("nan"), float("inf"), -float("inf"), 1e30, 0.0))
        index = rng.randrange(value.numel())
        kinds += [
            (
                f"{special} at {index}",
                lambda: flat.clone().index_fill_(0, torch.tensor([index]), special).view(value.shape),
            ),
            ("requires_grad", lambda: value.clone().requires_grad_()),
            ("complex", lambda: torch.complex(value.float(), value.float())),
        ]
    else:
        fill = rng.choice([i for i in IDS if torch.iinfo(value.dtype).min <= i <= torch.iinfo(value.dtype).max])
        index = rng.randrange(value.numel())
        kinds += 3 * [
            (f"{fill} at {index}", lambda: flat.clone().index_fill_(0, torch.tensor([index]), fill).view(value.shape))
        ]
    name, make = rng.choice(kinds)
    return name, make()


def break_plan(plan: ops.DispatchPlan, rng: random.Random) -> tuple[str, Any]:
    """Another kind of object, a plan for other tokens, or one of its fields broken."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice([("None", None), ("tuple", tuple(plan)), ("list", [1, 2])])
    if kind == 1:
        other = torch.randint(0, 5, (rng.choice((0, 1, 7)), rng.choice((1, 2, 3))))
        return f"plan of {tuple(other.shape)}", ops.plan_dispatch(other, 5)
    field = rng.choice(("slot_of_row_M", "row_of_slot_TK"))
    name, value = break_tensor(getattr(plan, field), rng)
    return f"plan.{field} {name}", plan._replace(**{field: value})


def break_argument(value: Any, rng: random.Random) -> tuple[str, Any]:
    """A broken form of one argument."""
    if isinstance(value, Tensor):
        return break_tensor(value, rng)
    if isinstance(value, ops.DispatchPlan):
        return break_plan(value, rng)
    number = rng.choice(NUMBERS)
    return repr(number), number


def same(a: Any, b: Any) -> bool:
    """Whether op and reference agree, in values or in that both are NaN."""
    if isinstance(a, tuple):
        return all(map(same, a, b))
    if not isinstance(a, Tensor):
        return a == b
    loose = a.dtype == torch.bfloat16
    return torch.allclose(
        a.double(), b.double(), rtol=2e-2 if loose else 1e-5, atol=2e-2 if loose else 1e-5, equal_nan=True
    )


def judge(op: str, argument: str, function: Callable, reference: Callable, arguments: dict[str, Any]) -> str:
    """ "error: ..." for a clear refusal, "correct" for a right result, "BAD: ..." for everything else."""
    try:
        result = function(**arguments)
    except (TypeError, ValueError, IndexError) as error:
        text = str(error)
        names = re.search(rf"^{op}: .*(got|expected)", text) and "accepted" in text
        mentions = (
            argument in text
            or argument.split("_")[0] in text
            or ALSO_NAMED.get(argument, argument) in text
            or f"E ({'columns' if op == 'route_tokens' else 'first'}" in text
        )
        return f"error: {text}" if names and mentions else f"BAD: an unclear error: {type(error).__name__}: {text}"
    except Exception as error:  # the point of this program is to see every other kind of failure
        return f"BAD: {type(error).__name__}: {error}"
    if any(isinstance(value, Tensor) and value.device.type == "meta" for value in arguments.values()):
        return "correct"  # shapes without values: nothing to compare
    try:
        expected = reference(**arguments)
    except Exception as error:
        return f"BAD: accepted, but the reference refuses: {error}"
    return "correct" if same(result, expected) else "BAD: a wrong result"


def call(index: int) -> str:
    """Makes the index-th call. Returns its line of output."""
    rng = random.Random(index)
    torch.manual_seed(index)
    good = good_calls(index % 7, rng.choice((torch.float32, torch.bfloat16)))
    op = rng.choice(list(good))
    function, reference, arguments = good[op]
    argument = rng.choice(list(arguments))
    kind, value = break_argument(arguments[argument], rng)
    print(f"{index} {op} {argument} {kind}", end=" -> ", flush=True)
    outcome = judge(op, argument, function, reference, {**arguments, argument: value})
    return outcome.replace("\n", " ")


def main() -> None:
    """Runs the calls FIRST to LAST - 1."""
    for index in range(int(sys.argv[1]), int(sys.argv[2])):
        print(call(index), flush=True)


if __name__ == "__main__":
    main()
