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


def _weighted_swiglu_backward(device: DeviceOps, rows: int, dtype: torch.dtype) -> object:
    upstream, gate_up = _normal(rows, WIDTH, dtype=dtype), _normal(rows, 2 * WIDTH, dtype=dtype)
    weights, slots = _normal(rows // TOP_K, TOP_K, dtype=_scalar(dtype)), torch.arange(rows).int()
    return device.weighted_swiglu_backward(upstream, gate_up, weights, slots)


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


_in_steps = _loss(in_steps=True)


def _quantize(device: DeviceOps, rows: int, dtype: torch.dtype) -> object:
    return device.quantize_fp8(_normal(rows, DIM, dtype=dtype), square=False, power_of_two=False, transposed=True)


def _transpose(device: DeviceOps, rows: int, dtype: torch.dtype) -> object:
    values = torch.zeros(1, rows, DIM, dtype=dtype)
    return device.transpose_fp8(values, torch.ones(1, rows // BLOCK, DIM // BLOCK))


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
_ROUTER = (torch.float32, torch.bfloat16, torch.float64)  # K2's logits are float32
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
        op="route_tokens", rows=FEW, rows_at_scale=TOKENS, unit="tokens", run=_route, dtypes=_ROUTER,
        work=lambda t, s: Work(t * EXPERTS * s + EXPERTS * 4, t * TOP_K * (INDEX + _per_scalar(s))),
    ),
    "route_tokens_backward_kernel": RowCase(
        op="route_tokens", rows=FEW, rows_at_scale=TOKENS, unit="tokens", run=_route_backward, dtypes=_ROUTER,
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
    "weighted_swiglu_grads_kernel": RowCase(
        op="swiglu", rows=FEW, rows_at_scale=TOKENS * TOP_K, unit="rows", run=_weighted_swiglu_backward,
        work=lambda m, s: Work(
            3 * m * WIDTH * s + m * (INDEX + _per_scalar(s)), 3 * m * WIDTH * s + m * _per_scalar(s)
        ),
    ),
    "token_losses_kernel": RowCase(
        **_STEPS, run=_in_steps, work=lambda t, s: Work(4 * t * _per_scalar(s), 2 * t * _per_scalar(s))
    ),
    "logit_stats_kernel": RowCase(
        **_STEPS, run=_in_steps, work=lambda t, s: Work(t * (VOCAB * s + 8 + _per_scalar(s)), 4 * t * _per_scalar(s))
    ),
    "logit_grad_kernel": RowCase(
        **_STEPS, run=_in_steps,
        work=lambda t, s: Work(t * (VOCAB * s + 8 + 2 * _per_scalar(s)), t * VOCAB * s),
    ),
    "loss_rows_kernel": RowCase(
        **_STEPS, run=_loss(in_steps=False),
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
    "transpose_fp8_kernel": RowCase(
        op="fp8_quantize", rows=BLOCK, rows_at_scale=TOKENS * TOP_K, unit="rows", run=_transpose,
        work=lambda m, s: Work(*[m * DIM + m // BLOCK * (DIM // BLOCK) * SCALE] * 2),
        dtypes=(torch.float8_e4m3fn,),
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


@dataclass(frozen=True, kw_only=True)
class Product:
    """A matrix product: `groups` experts of `rows` rows each, by (columns, depth) matrices, `bits` of an operand.

    `kind` is rows or transposed_b; of weight_grads the result is (depth, columns) for each group, in float32.
    """

    kind: str
    bits: int
    rows: int
    columns: int
    depth: int
    groups: int = 1

    @property
    def name(self) -> str:
        """For a reader."""
        dtype = "bf16" if self.bits == 16 else "e4m3"
        return f"{dtype} {self.kind} {self.groups}x{self.rows}x{self.columns}x{self.depth}"

    @property
    def work(self) -> Work:
        """Scales of FP8 are read too."""
        m, n, k, e = self.rows * self.groups, self.columns, self.depth, self.groups
        size, flop = self.bits // 8, 2 * m * n * k
        if self.kind == "weight_grads":
            scales = 0 if self.bits == 16 else m // BLOCK * (k + n) * SCALE
            return Work(m * (k + n) * size + scales, e * k * n * 4, flop)
        scales = 0 if self.bits == 16 else (m * k // BLOCK + e * (n // BLOCK) * (k // BLOCK)) * SCALE
        return Work((m * k + e * n * k) * size + scales, m * n * 2, flop)

    def run(self, module: ModuleType) -> None:
        """On the executor."""
        if self.kind == "weight_grads":
            grads = WeightGradCase(a_width=self.depth, b_width=self.columns, rows=self.rows, fp8=self.bits == 8)
            run_weight_grads(module, grads, grads.operands(), "ptx", False, "in_order")
            return
        case = GemmCase(
            rows=self.rows, columns=self.columns, depth=self.depth,
            fp8=self.bits == 8, b_is_transposed=self.kind == "transposed_b",
        )  # fmt: skip
        run_gemm(module, case, operands_of(case), "ptx", False, "in_order")


_KINDS = (("rows", 8), ("rows", 16), ("transposed_b", 16), ("weight_grads", 8), ("weight_grads", 16))
# One row tile; on the executor's three multiprocessors, other tiles are best for other numbers of columns.
SMALL_PRODUCTS = tuple(
    Product(kind=kind, bits=bits, rows=1024 if kind == "weight_grads" else 128, columns=columns,
            depth=128 if kind == "weight_grads" else 1024)
    for kind, bits in _KINDS for columns in (384, 768, 192, 576)
)  # fmt: skip
# K2.5's experts, for two numbers of local ones: gate and up, and down, with the gradients of each.
_GATE_UP, _DOWN = (2 * WIDTH, DIM), (DIM, WIDTH)  # columns, depth
PRODUCTS_AT_SCALE = tuple(
    Product(kind=kind, bits=bits, rows=rows, columns=columns, depth=depth, groups=groups)
    for kind, bits in _KINDS
    for groups, rows in ((4, 8192), (8, 4096))
    for columns, depth in ((_GATE_UP[::-1], _DOWN[::-1]) if kind == "transposed_b" else (_GATE_UP, _DOWN))
)

Counts = dict[str, dict[str, int]]  # by symbol


def count_row_case(module: ModuleType, case: RowCase, dtype: torch.dtype, shift: int = 0) -> Counts:
    """What the kernels that the case launches moved; `shift` moves tensors by so many elements from alignment."""
    module.clear_counts()
    case.run(DeviceOps(module, "ptx", shift=shift), case.rows, dtype)
    return module.counts()


def count_product(module: ModuleType, product: Product) -> Counts:
    """The same of a product."""
    module.clear_counts()
    product.run(module)
    return module.counts()


def moved(counts: Mapping[str, int]) -> Work:
    """As the algorithm's work is given."""
    return Work(
        counts["loaded_bytes"] + counts["bulk_loaded_bytes"],
        counts["stored_bytes"] + counts["bulk_stored_bytes"],
        counts["bf16_flop"] + counts["e4m3_flop"],
    )
