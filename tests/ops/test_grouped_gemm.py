"""grouped_gemm and its weight gradients against float64, on every instruction set, and as torch sees them."""

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from k25sys import ops
from k25sys.ops import checks, native
from tests.ops.generators import DTYPES, first_difference, relative_error, tolerance

ISAS = [*native._C.cpu.available_isas(), "emulated_bf16"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Any:
    native._C.cpu.set_isa(request.param)
    yield request.param
    native._C.cpu.set_isa("auto")


@dataclass(frozen=True, kw_only=True)
class ProductCase:
    """Rows of each expert, and the sizes of their matrices."""

    rows: tuple[int, ...]
    columns: int
    depth: int
    transpose_b: bool
    dtype: torch.dtype
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a (M, K), b, offsets and a gradient (M, N)."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.depth, self.columns) if self.transpose_b else (self.columns, self.depth)
        sizes = ((sum(self.rows), self.depth), (len(self.rows), *shape), (sum(self.rows), self.columns))
        a, b, grad = (torch.randn(size, generator=generator, dtype=torch.float64).to(self.dtype) for size in sizes)
        return a, b, torch.tensor([0, *self.rows]).cumsum(0).int(), grad


cases = st.builds(
    ProductCase,
    rows=st.lists(st.integers(0, 9) | st.sampled_from((0, 40, 130)), min_size=1, max_size=5).map(tuple),
    columns=st.integers(0, 70),
    depth=st.integers(0, 70) | st.just(1100),
    transpose_b=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
generated = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    """Within what one rounding, and sums in float32, allow; a few numbers may cancel to less than their terms."""
    error = (ours.double() - exact).norm()
    return bool(error <= tolerance(dtype) * (exact.norm() + exact.numel() ** 0.5))


@generated
@given(case=cases)
def test_grouped_gemm(isa: str, case: ProductCase) -> None:
    a, b, offsets, _ = case.tensors()
    exact = ops.reference_grouped_gemm(a.double(), b.double(), offsets, transpose_b=case.transpose_b)
    ours = ops.grouped_gemm(a, b, offsets, transpose_b=case.transpose_b)
    assert ours.dtype == case.dtype
    assert close(ours, exact, case.dtype)


@generated
@given(case=cases, to_f32=st.booleans(), accumulate=st.booleans())
def test_weight_gradients(isa: str, case: ProductCase, to_f32: bool, accumulate: bool) -> None:
    b, _, offsets, a = case.tensors()
    out_dtype = torch.float32 if to_f32 and case.dtype != torch.float64 else case.dtype
    exact = ops.reference_grouped_gemm_wgrad(a, b, offsets, out_dtype=torch.float64)
    if not accumulate:
        assert close(ops.grouped_gemm_wgrad(a, b, offsets, out_dtype=out_dtype), exact, out_dtype)
        return
    start = torch.randn(exact.shape).to(out_dtype)
    buffer = start.clone()
    assert ops.grouped_gemm_wgrad(a, b, offsets, accumulate_into=buffer) is buffer
    assert close(buffer, start.double() + exact, out_dtype)


@pytest.mark.parametrize("transpose_b", [False, True])
def test_gradcheck_twice(transpose_b: bool) -> None:
    case = ProductCase(rows=(3, 0, 2), columns=4, depth=5, transpose_b=transpose_b, dtype=torch.float64, seed=1)
    a, b, offsets, _ = case.tensors()
    leaves = (a.requires_grad_(), b.requires_grad_())
    function = functools.partial(ops.grouped_gemm, offsets=offsets, transpose_b=transpose_b)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("transpose_b", [False, True])
@pytest.mark.parametrize("buffer_dtype", [torch.bfloat16, torch.float32])
def test_main_grad_is_added_to(transpose_b: bool, buffer_dtype: torch.dtype) -> None:
    case = ProductCase(rows=(30, 0, 9), columns=24, depth=16, transpose_b=transpose_b, dtype=torch.bfloat16, seed=1)
    a, b, offsets, grad = case.tensors()
    plain, fused = (v.clone().requires_grad_() for v in (b, b))
    start = torch.randn(b.shape).to(buffer_dtype)
    buffer = start.clone()
    ops.grouped_gemm(a, plain, offsets, transpose_b=transpose_b).backward(grad)
    ops.grouped_gemm(a, fused, offsets, transpose_b=transpose_b, main_grad=buffer).backward(grad)
    assert fused.grad is None
    assert plain.grad is not None
    assert close(buffer, start.double() + plain.grad.double(), torch.bfloat16)


def test_bitwise_independent_of_threads() -> None:
    case = ProductCase(
        rows=(200, 0, 31), columns=600, depth=530, transpose_b=False, dtype=torch.bfloat16, seed=2
    )  # fmt: skip
    a, b, offsets, grad = case.tensors()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((ops.grouped_gemm(a, b, offsets), ops.grouped_gemm_wgrad(grad, a, offsets)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert [first_difference(x, y) for x, y in zip(results[0], other, strict=True)] == ["", ""]


def test_opcheck_and_compile() -> None:
    case = ProductCase(rows=(3, 0, 2), columns=4, depth=5, transpose_b=False, dtype=torch.float32, seed=1)
    a, b, offsets, grad = case.tensors()
    k25 = torch.ops.k25
    leaves = (a.clone().requires_grad_(), b.clone().requires_grad_())
    torch.library.opcheck(k25.grouped_gemm.default, (*leaves, offsets, False, None))
    torch.library.opcheck(k25.grouped_gemm_wgrad.default, (grad.clone().requires_grad_(), leaves[0], offsets, True))
    torch.library.opcheck(k25.grouped_gemm_wgrad_accumulate.default, (grad, a, offsets, torch.zeros(3, 4, 5)))
    compiled = torch.compile(ops.grouped_gemm, fullgraph=True, backend="aot_eager")
    results = []
    for function in (ops.grouped_gemm, compiled):
        value = function(*leaves, offsets)
        results.append([value.detach(), *torch.autograd.grad(value, leaves, grad)])
    assert [first_difference(x, y) for x, y in zip(*results, strict=True)] == [""] * 3


def test_what_is_refused() -> None:
    case = ProductCase(rows=(3, 2), columns=4, depth=6, transpose_b=False, dtype=torch.bfloat16, seed=1)
    a, b, offsets, grad = case.tensors()
    for wrong in ([0, 3, 4], [1, 3, 5], [0, 6, 5], [0, -1, 5]):
        table = torch.tensor(wrong).int()
        with pytest.raises(IndexError, match=r"grouped_gemm: offsets\[\d\]: got"):
            ops.grouped_gemm(a, b, table)
        with pytest.raises(IndexError, match=r"grouped_gemm_wgrad: offsets\[\d\]: got"):
            ops.grouped_gemm_wgrad(grad, a, table)
    buffer = torch.zeros(2, 4, 6)
    for wrong_buffer, error, text in (
        (buffer.double(), TypeError, "dtype"),
        (buffer[:, :3], ValueError, "shape"),
        (buffer.transpose(1, 2).contiguous().transpose(1, 2), ValueError, "contiguous"),
        (buffer.clone().requires_grad_(), ValueError, "requires_grad"),
    ):
        with pytest.raises(error, match=rf"grouped_gemm: main_grad: got.*{text}"):
            ops.grouped_gemm(a, b, offsets, main_grad=wrong_buffer)
        with pytest.raises(error, match=rf"grouped_gemm_wgrad: accumulate_into: got.*{text}"):
            ops.grouped_gemm_wgrad(grad, a, offsets, accumulate_into=wrong_buffer)
    for out_dtype in (torch.float64, torch.float16):
        with pytest.raises(TypeError, match="grouped_gemm_wgrad: out_dtype: got"):
            ops.grouped_gemm_wgrad(grad, a, offsets, out_dtype=out_dtype)
    with pytest.raises(TypeError, match="grouped_gemm: transpose_b: got int 1"):
        ops.grouped_gemm(a, b, offsets, transpose_b=1)  # pyright: ignore[reportArgumentType]


def test_what_cuda_does_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks read metadata alone, so that tensors of the CPU stand in for those of a device."""
    monkeypatch.setattr(checks, "on_cuda", lambda _: True)
    offsets = torch.tensor([0, 4]).int()

    def product(depth: int, columns: int, transpose_b: bool, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        shape = (1, depth, columns) if transpose_b else (1, columns, depth)
        a, b = torch.ones(4, depth, dtype=dtype), torch.ones(shape, dtype=dtype)
        return ops.grouped_gemm(a, b, offsets, transpose_b=transpose_b)

    assert product(8, 5, False).shape == (4, 5)
    with pytest.raises(ValueError, match=r"K \(columns of a_MK\): got 12, accepted a multiple of 8 on CUDA; pad"):
        product(12, 8, False)
    with pytest.raises(ValueError, match=r"N \(columns of b_ENK\): got 12, accepted a multiple of 8 on CUDA"):
        product(8, 12, True)
    with pytest.raises(TypeError, match=r"a_MK: got dtype torch.float32 on CUDA, accepted bfloat16"):
        product(8, 8, False, torch.float32)
    narrow = torch.ones(4, 12, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"grouped_gemm_wgrad: N \(columns of a_MN\): got 12"):
        ops.grouped_gemm_wgrad(narrow, narrow, offsets)
    empty = torch.ones(0, 8, dtype=torch.bfloat16)
    assert ops.grouped_gemm_wgrad(empty, empty, torch.zeros(3).int()).eq(0).all()
    assert product(0, 8, False).eq(0).all()


def test_relative_error_of_large_products() -> None:
    """Beyond one panel, one block of the reduction and one chunk of rows."""
    case = ProductCase(rows=(700, 5), columns=300, depth=1500, transpose_b=False, dtype=torch.float32, seed=3)
    a, b, offsets, grad = case.tensors()
    exact = ops.reference_grouped_gemm(a.double(), b.double(), offsets)
    assert relative_error(ops.grouped_gemm(a, b, offsets), exact) <= tolerance(torch.float32)
    exact = ops.reference_grouped_gemm_wgrad(grad, a, offsets, out_dtype=torch.float64)
    assert relative_error(ops.grouped_gemm_wgrad(grad, a, offsets), exact) <= tolerance(torch.float32)
