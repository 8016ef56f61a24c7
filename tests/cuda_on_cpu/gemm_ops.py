"""Calls the executor's matrix products, and what they must give, in float64."""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from k25sys.ops import native
from tests.cuda_on_cpu.ptx_kernels import aligned
from tests.ops.generators import relative_error

SCALE_BLOCK = 128
# Executor, lazy, order, seed.
RUNS = (
    ("source", False, "in_order", 0),
    ("source", True, "random", 1),
    ("source", True, "reverse", 0),
    ("ptx", False, "in_order", 0),
    ("ptx", False, "reverse", 0),
    ("ptx", False, "random", 2),
    ("ptx", True, "in_order", 0),
    ("ptx", True, "reverse", 0),
    ("ptx", True, "random", 3),
)
TOLERANCES = {torch.bfloat16: 2e-3, torch.float32: 1e-5}


@dataclass(frozen=True, kw_only=True)
class GemmCase:
    """`rows_per_expert` empty: no offsets. `skipped_rows` lie before the first expert, and as many behind the last.

    `width` is the tile that the host must choose, 0 for any.
    """

    columns: int
    depth: int
    rows: int = 0
    rows_per_expert: tuple[int, ...] = ()
    skipped_rows: int = 0
    fp8: bool = False
    b_is_transposed: bool = False
    out_dtype: torch.dtype = torch.bfloat16
    width: int = 0

    @property
    def num_rows(self) -> int:
        return self.rows or sum(self.rows_per_expert) + 2 * self.skipped_rows

    @property
    def num_experts(self) -> int:
        return len(self.rows_per_expert) or 1

    @property
    def offsets(self) -> list[int]:
        """Of the experts' rows."""
        if not self.rows_per_expert:
            return [0, self.rows]
        starts = [self.skipped_rows]
        for count in self.rows_per_expert:
            starts.append(starts[-1] + count)
        return starts


@dataclass(frozen=True)
class Operands:
    a: Tensor  # (M, K)
    b: Tensor  # (E, N, K), or (E, K, N)
    a_scales: Tensor | None
    b_scales: Tensor | None


def blocks(size: int) -> int:
    """Scales along a dimension."""
    return -(-size // SCALE_BLOCK)


def operands_of(case: GemmCase) -> Operands:
    """Normally distributed; scales of FP8 lie between 1/4 and 4."""
    generator = torch.Generator().manual_seed(case.columns + 7 * case.depth)
    experts, columns, depth = case.num_experts, case.columns, case.depth
    a = torch.randn(case.num_rows, depth, generator=generator)
    b = torch.randn(experts, *((depth, columns) if case.b_is_transposed else (columns, depth)), generator=generator)
    if not case.fp8:
        return Operands(a.bfloat16(), b.bfloat16(), None, None)
    a_scales = torch.exp2(4 * torch.rand(case.num_rows, blocks(depth), generator=generator) - 2)
    b_scales = torch.exp2(4 * torch.rand(experts, blocks(columns), blocks(depth), generator=generator) - 2)
    return Operands(a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), a_scales, b_scales)


def exact(case: GemmCase, t: Operands) -> Tensor:
    """The result in float64; NaN in rows of no expert."""
    a, b = t.a.double(), t.b.double()
    if case.b_is_transposed:
        b = b.transpose(1, 2)
    if t.a_scales is not None and t.b_scales is not None:
        a = a * t.a_scales.double().repeat_interleave(SCALE_BLOCK, 1)[:, : case.depth]
        spread = t.b_scales.double().repeat_interleave(SCALE_BLOCK, 1).repeat_interleave(SCALE_BLOCK, 2)
        b = b * spread[:, : case.columns, : case.depth]
    out = torch.full((case.num_rows, case.columns), float("nan"), dtype=torch.float64)
    for expert, (start, end) in enumerate(zip(case.offsets, case.offsets[1:], strict=False)):
        out[start:end] = a[start:end] @ b[expert].T
    return out


def run_gemm(
    module: ModuleType, case: GemmCase, t: Operands, executor: str, lazy: bool, order: str, seed: int = 0
) -> Tensor:
    """The kernel's result in an output that held NaN."""
    module.set_options(order, seed, executor, lazy)
    module.clear_buffers()
    inputs = {"a": t.a, "b": t.b, "a_scales": t.a_scales, "b_scales": t.b_scales}
    if case.rows_per_expert:
        inputs["offsets"] = torch.tensor(case.offsets, dtype=torch.int32)
    placed = {name: aligned(value) for name, value in inputs.items() if value is not None}
    for name, value in placed.items():
        module.register_buffer(name, value.data_ptr(), value.nbytes, False)
    out = aligned(torch.full((case.num_rows, case.columns), float("nan"), dtype=case.out_dtype))
    module.register_buffer("out", out.data_ptr(), out.nbytes, True)
    at = {name: placed[name].data_ptr() if name in placed else 0 for name in (*inputs, "offsets")}
    sizes = [case.num_rows, case.columns, case.depth, case.num_experts]
    dtype = native.DTYPE_CODES[case.out_dtype]
    if case.fp8:
        pointers = [at["a"], at["b"], at["a_scales"], at["b_scales"], at["offsets"], out.data_ptr()]
        module.gemm_fp8(*pointers, *sizes, dtype, 0)
    else:
        pointers = [at["a"], at["b"], at["offsets"], out.data_ptr()]
        module.gemm_bf16(*pointers, *sizes, case.b_is_transposed, dtype, 0)
    return out


def wrong(case: "GemmCase | WeightGradCase", ours: Tensor, expected: Tensor) -> str:
    """What differs from the exact result, "" if nothing."""
    written = ~expected.isnan()
    if not torch.equal(ours.isnan(), ~written):
        return "NaN where there is a result, or a row of no expert was written"
    if not written.any():
        return ""
    error = relative_error(ours[written], expected[written])
    return "" if error <= TOLERANCES[case.out_dtype] else f"relative error {error}"


@dataclass(frozen=True, kw_only=True)
class WeightGradCase:
    """Of the rows of each expert, those of A (`a_width` columns) and of B. No rows per expert: no offsets.

    FP8 operands are (a_width, rows) and (b_width, rows), and experts but the last have multiples of 128 rows.
    `accumulate` adds to an output that holds numbers.
    """

    a_width: int
    b_width: int
    rows: int = 0
    rows_per_expert: tuple[int, ...] = ()
    fp8: bool = False
    accumulate: bool = False
    out_dtype: torch.dtype = torch.float32
    width: int = 0

    @property
    def num_rows(self) -> int:
        return self.rows or sum(self.rows_per_expert)

    @property
    def num_experts(self) -> int:
        return len(self.rows_per_expert) or 1

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *self.rows_per_expert]).cumsum(0).int()

    def operands(self) -> Operands:
        """Of bf16 (rows, width), of FP8 (width, rows) with scales between 1/4 and 4."""
        generator = torch.Generator().manual_seed(self.a_width + self.num_rows)
        a = torch.randn(self.num_rows, self.a_width, generator=generator)
        b = torch.randn(self.num_rows, self.b_width, generator=generator)
        if not self.fp8:
            return Operands(a.bfloat16(), b.bfloat16(), None, None)
        shapes = ((width, blocks(self.num_rows)) for width in (self.a_width, self.b_width))
        scales = [torch.exp2(4 * torch.rand(shape, generator=generator) - 2) for shape in shapes]
        return Operands(a.T.contiguous().to(torch.float8_e4m3fn), b.T.contiguous().to(torch.float8_e4m3fn), *scales)

    def start(self) -> Tensor:
        """What the output holds before: NaN, or what is added to."""
        shape = (self.num_experts, self.a_width, self.b_width)
        if not self.accumulate:
            return torch.full(shape, float("nan"), dtype=self.out_dtype)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self.out_dtype) * 20

    def exact(self, t: Operands) -> Tensor:
        """(E, a_width, b_width) in float64."""
        a, b = t.a.double(), t.b.double()
        if t.a_scales is not None and t.b_scales is not None:
            a, b = (
                (v * s.double().repeat_interleave(SCALE_BLOCK, 1)[:, : self.num_rows]).T
                for v, s in ((a, t.a_scales), (b, t.b_scales))
            )
        sizes = list(self.rows_per_expert or (self.rows,))
        grads = torch.stack([x.T @ y for x, y in zip(a.split(sizes), b.split(sizes), strict=True)])
        return grads + self.start().double() if self.accumulate else grads


def run_weight_grads(
    module: ModuleType, case: WeightGradCase, t: Operands, executor: str, lazy: bool, order: str, seed: int = 0
) -> Tensor:
    """The kernel's result."""
    module.set_options(order, seed, executor, lazy)
    module.clear_buffers()
    inputs = {"a": t.a, "b": t.b, "a_scales": t.a_scales, "b_scales": t.b_scales, "offsets": case.offsets}
    placed = {name: aligned(value) for name, value in inputs.items() if value is not None}
    for name, value in placed.items():
        module.register_buffer(name, value.data_ptr(), value.nbytes, False)
    out = aligned(case.start())
    module.register_buffer("out", out.data_ptr(), out.nbytes, True)
    offsets = placed["offsets"].data_ptr() if case.rows_per_expert else 0
    sizes = [case.num_rows, case.a_width, case.b_width, case.num_experts]
    rest = [offsets, out.data_ptr(), *sizes, case.accumulate, native.DTYPE_CODES[case.out_dtype], 0]
    if case.fp8:
        operands = [placed[name].data_ptr() for name in ("a", "b", "a_scales", "b_scales")]
        module.gemm_fp8_weight_grads(*operands, *rest)
    else:
        module.gemm_bf16_weight_grads(placed["a"].data_ptr(), placed["b"].data_ptr(), *rest)
    return out
