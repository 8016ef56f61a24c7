"""What each kernel has to move and to compute, by the sizes of its case, and small cases that count what it does.

A case has K2.5's layout (width 7168, 384 experts of which a token takes 8, expert width 2048, 163840 tokens of
vocabulary, patches of 1152) and few rows. Work is the algorithm's: every input read once, every result written once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from k25sys import ops
from tests.cuda_on_cpu.device_ops import DeviceOps, clip_table
from tests.cuda_on_cpu.gemm_ops import GemmCase, WeightGradCase, operands_of, run_gemm, run_weight_grads

DIM, WIDTH, EXPERTS, TOP_K, VOCAB, PATCH_DIM = 7168, 2048, 384, 8, 163840, 1152
BLOCK = 128  # values with one scale of FP8
INDEX = SCALE = 4  # bytes


@dataclass(frozen=True)
class Work:
    """Bytes of global memory and tensor-core FLOP."""

    read: int
    written: int
    flop: int = 0

    @property
    def moved(self) -> int:
        """Both ways."""
        return self.read + self.written


@dataclass(frozen=True, kw_only=True)
class RowCase:
    """A kernel whose work grows with a number of rows (tokens, rows of experts, or frames' patches).

    Attributes:
        op: folder in csrc.
        rows: of the counted case; `rows_at_scale` those of a K2.5 micro-batch on one GPU.
        unit: what a row is.
        run: computes `rows` rows of `dtype` on the executor.
        work: of so many rows with elements of so many bytes.
    """

    op: str
    rows: int
    rows_at_scale: int
    unit: str
    run: Callable[[DeviceOps, int, torch.dtype], object]
    work: Callable[[int, int], Work]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32, torch.float64)


def _normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _scalar(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _choices(tokens: int) -> Tensor:
    scores = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(0))
    return scores.topk(TOP_K).indices.int()


def _plan(tokens: int) -> ops.DispatchPlan:
    return ops.reference_plan_dispatch(_choices(tokens), EXPERTS)


def _route(device: DeviceOps, tokens: int, dtype: torch.dtype) -> object:
    return device.route_tokens(_normal(tokens, EXPERTS, dtype=dtype), torch.zeros(EXPERTS), top_k=TOP_K, scale=2.827)


def _route_backward(device: DeviceOps, tokens: int, dtype: torch.dtype) -> object:
    grad = _normal(tokens, TOP_K, dtype=_scalar(dtype))
    logits = _normal(tokens, EXPERTS, dtype=dtype)
    return device.route_tokens_backward(grad, logits, _choices(tokens), scale=2.827)


def _combine(device: DeviceOps, tokens: int, dtype: torch.dtype) -> object:
    weights = _normal(tokens, TOP_K, dtype=_scalar(dtype))
    return device.combine(_normal(tokens * TOP_K, DIM, dtype=dtype), weights, _plan(tokens))


def _combine_backward(device: DeviceOps, tokens: int, dtype: torch.dtype) -> object:
    weights = _normal(tokens, TOP_K, dtype=_scalar(dtype))
    rows = _normal(tokens * TOP_K, DIM, dtype=dtype)
    return device.combine_backward(_normal(tokens, DIM, dtype=dtype), rows, weights, _plan(tokens))


def _swiglu_backward(device: DeviceOps, rows: int, dtype: torch.dtype) -> object:
    return device.swiglu_backward(_normal(rows, WIDTH, dtype=dtype), _normal(rows, 2 * WIDTH, dtype=dtype))


def _loss(in_steps: bool) -> Callable[[DeviceOps, int, torch.dtype], object]:
    def run(device: DeviceOps, tokens: int, dtype: torch.dtype) -> object:
        scalar = _scalar(dtype)
        old, advantages, weights = torch.full((3, tokens), 0.5, dtype=scalar).unbind()
        inputs = (_normal(tokens, VOCAB, dtype=dtype), torch.arange(tokens), -20 * old, advantages, weights)
        objective = (0, -1.0, 1.0, 1.0, True)
        if in_steps:
            return device.loss_rows_in_steps(*inputs, objective=objective)
        return device.loss_rows(*inputs, objective=objective, in_place=False)

    return run


def _quantize(device: DeviceOps, rows: int, dtype: torch.dtype) -> object:
    return device.quantize_fp8(_normal(rows, DIM, dtype=dtype), square=False, power_of_two=False, transposed=True)


def _dequantize(device: DeviceOps, rows: int, dtype: torch.dtype) -> object:
    values = torch.zeros(rows, DIM, dtype=torch.float8_e4m3fn)
    return device.dequantize_fp8(values, torch.ones(rows, DIM // BLOCK), square=False, dtype=dtype)


FRAMES, SIDE = 4, 32  # a video clip's, in patches


def _clips(patches: int) -> tuple[Tensor, int]:
    count = patches // (FRAMES * SIDE * SIDE)
    return clip_table(torch.tensor([[FRAMES, SIDE, SIDE]] * count), patches, (2, 2))


def _pool(device: DeviceOps, patches: int, dtype: torch.dtype) -> object:
    return device.pool_temporal_patches(_normal(patches, PATCH_DIM, dtype=dtype), *_clips(patches), (2, 2))


def _pool_backward(device: DeviceOps, patches: int, dtype: torch.dtype) -> object:
    clips, num_out = _clips(patches)
    return device.pool_temporal_patches_backward(_normal(num_out, 4, PATCH_DIM, dtype=dtype), clips, patches, (2, 2))


def _per_scalar(size: int) -> int:
    """Bytes of what is f32 beside bf16 and f32, and f64 beside f64."""
    return max(size, SCALE)


TOKENS, FEW = 4096, 8
_STEPS = {"op": "policy_loss", "rows": 2, "rows_at_scale": TOKENS, "unit": "tokens"}
_PLAN = {
    "op": "plan_dispatch", "rows": 600, "rows_at_scale": TOKENS, "unit": "tokens", "dtypes": (torch.int32, torch.int64),
    "run": lambda device, tokens, dtype: device.plan_dispatch(_choices(tokens).to(dtype), EXPERTS),
}  # fmt: skip
_SLOTS_PER_BLOCK = 4096


def _plan_table(tokens: int) -> int:
    """Bytes of the counts of each block of slots."""
    return -(-tokens * TOP_K // _SLOTS_PER_BLOCK) * EXPERTS * INDEX


# By the kernel's name. Sizes of elements are s.
ROW_CASES: Mapping[str, RowCase] = {
    "route_tokens_kernel": RowCase(
        op="route_tokens", rows=FEW, rows_at_scale=TOKENS, unit="tokens", run=_route,
        work=lambda t, s: Work(t * EXPERTS * s + EXPERTS * 4, t * TOP_K * (INDEX + _per_scalar(s))),
    ),
    "route_tokens_backward_kernel": RowCase(
        op="route_tokens", rows=FEW, rows_at_scale=TOKENS, unit="tokens", run=_route_backward,
        work=lambda t, s: Work(t * TOP_K * (INDEX + _per_scalar(s) + s), t * EXPERTS * s),
    ),
    "count_slots_kernel": RowCase(**_PLAN, work=lambda t, s: Work(t * TOP_K * s, _plan_table(t))),
    "scan_blocks_kernel": RowCase(
        **_PLAN, work=lambda t, s: Work(_plan_table(t), _plan_table(t) + EXPERTS * INDEX)
    ),
    "place_slots_kernel": RowCase(
        **_PLAN,
        work=lambda t, s: Work(
            t * TOP_K * s + _plan_table(t) + EXPERTS * INDEX, 2 * t * TOP_K * INDEX + (EXPERTS + 1) * INDEX
        ),
    ),
    "dispatch_kernel": RowCase(
        op="dispatch", rows=FEW, rows_at_scale=TOKENS, unit="tokens",
        run=lambda device, tokens, dtype: device.dispatch(_normal(tokens, DIM, dtype=dtype), _plan(tokens)),
        work=lambda t, s: Work(t * DIM * s + t * TOP_K * INDEX, t * TOP_K * DIM * s),
    ),
    "combine_kernel": RowCase(
        op="dispatch", rows=FEW, rows_at_scale=TOKENS, unit="tokens", run=_combine,
        work=lambda t, s: Work(t * TOP_K * (DIM * s + INDEX + _per_scalar(s)), t * DIM * s),
    ),
    "combine_backward_kernel": RowCase(
        op="dispatch", rows=FEW, rows_at_scale=TOKENS, unit="tokens", run=_combine_backward,
        work=lambda t, s: Work(
            t * (TOP_K + 1) * DIM * s + t * TOP_K * (INDEX + _per_scalar(s)), t * TOP_K * (DIM * s + _per_scalar(s))
        ),
    ),
    "swiglu_kernel": RowCase(
        op="swiglu", rows=FEW, rows_at_scale=TOKENS * TOP_K, unit="rows",
        run=lambda device, rows, dtype: device.swiglu(_normal(rows, 2 * WIDTH, dtype=dtype)),
        work=lambda m, s: Work(2 * m * WIDTH * s, m * WIDTH * s),
    ),
    "swiglu_backward_kernel": RowCase(
        op="swiglu", rows=FEW, rows_at_scale=TOKENS * TOP_K, unit="rows", run=_swiglu_backward,
        work=lambda m, s: Work(3 * m * WIDTH * s, 2 * m * WIDTH * s),
    ),
    "token_losses_kernel": RowCase(
        **_STEPS, run=_loss(True), work=lambda t, s: Work(4 * t * _per_scalar(s), 2 * t * _per_scalar(s))
    ),
    "logit_stats_kernel": RowCase(
        **_STEPS, run=_loss(True), work=lambda t, s: Work(t * (VOCAB * s + 8 + _per_scalar(s)), 4 * t * _per_scalar(s))
    ),
    "logit_grad_kernel": RowCase(
        **_STEPS, run=_loss(True),
        work=lambda t, s: Work(t * (VOCAB * s + 8 + 2 * _per_scalar(s)), t * VOCAB * s),
    ),
    "loss_rows_kernel": RowCase(
        **_STEPS, run=_loss(False),
        work=lambda t, s: Work(t * (VOCAB * s + 8 + 3 * _per_scalar(s)), t * (VOCAB * s + 3 * _per_scalar(s))),
    ),
    "quantize_fp8_kernel": RowCase(
        op="fp8_quantize", rows=BLOCK, rows_at_scale=TOKENS * TOP_K, unit="rows", run=_quantize,
        work=lambda m, s: Work(m * DIM * s, 2 * m * DIM + 2 * m * DIM // BLOCK * SCALE),
        dtypes=(torch.bfloat16, torch.float32),
    ),
    "dequantize_fp8_kernel": RowCase(
        op="fp8_quantize", rows=FEW, rows_at_scale=TOKENS * TOP_K, unit="rows", run=_dequantize,
        work=lambda m, s: Work(m * DIM + m * DIM // BLOCK * SCALE, m * DIM * s),
        dtypes=(torch.bfloat16, torch.float32),
    ),
    "pool_temporal_patches_kernel": RowCase(
        op="pool_temporal_patches", rows=4096, rows_at_scale=65536, unit="patches", run=_pool,
        work=lambda p, s: Work(p * PATCH_DIM * s, p // FRAMES * PATCH_DIM * s),
    ),
    "pool_temporal_patches_backward_kernel": RowCase(
        op="pool_temporal_patches", rows=4096, rows_at_scale=65536, unit="patches", run=_pool_backward,
        work=lambda p, s: Work(p // FRAMES * PATCH_DIM * s, p * PATCH_DIM * s),
    ),
}  # fmt: skip
