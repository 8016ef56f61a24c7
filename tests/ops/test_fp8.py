"""E4M3 quantisation bit for bit, and its matrix products against float64, on every instruction set."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from k25sys import ops
from k25sys.ops import native
from tests.ops.generators import first_difference, relative_error

ISAS = [*native._C.cpu.available_isas(), "emulated_bf16"]
BLOCKS = ((1, 128), (128, 128))
generated = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Any:
    native._C.cpu.set_isa(request.param)
    yield request.param
    native._C.cpu.set_isa("auto")


@dataclass(frozen=True, kw_only=True)
class Fp8Case:
    """Numbers of very different sizes, with zeros, infinities and NaN among them where `special`."""

    batch: int
    rows: int
    cols: int
    dtype: torch.dtype
    seed: int
    special: bool

    def x(self) -> Tensor:
        """(B, M, K), or (M, K) for batch 0."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.rows, self.cols) if self.batch else (self.rows, self.cols)
        x = torch.randn(shape, generator=generator) * torch.exp(4 * torch.randn(shape, generator=generator))
        if self.special:
            pick = torch.rand(shape, generator=generator)
            for i, value in enumerate((0.0, -0.0, math.inf, -math.inf, math.nan, 1e-44, 3e38)):
                x[(pick > i * 0.01) & (pick < (i + 1) * 0.01)] = value
            x.reshape(-1)[: x.numel() // 3] *= 0
        return x.to(self.dtype)


cases = st.builds(
    Fp8Case,
    batch=st.integers(0, 2),
    rows=st.integers(0, 5) | st.sampled_from((127, 128, 130, 257)),
    cols=st.integers(0, 40) | st.sampled_from((127, 128, 200, 256, 300)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 1000),
    special=st.booleans(),
)


def bits(values: Tensor) -> Tensor:
    """Codes as bytes; the sign of a NaN says nothing."""
    codes = values.view(torch.uint8)
    return torch.where(codes & 0x7F == 0x7F, 0x7F, codes)


@generated
@given(case=cases, block=st.sampled_from(BLOCKS), power_of_two=st.booleans())
def test_quantize_is_exact(isa: str, case: Fp8Case, block: tuple[int, int], power_of_two: bool) -> None:
    x = case.x()
    values, scales, values_t, scales_t = ops.quantize_fp8_both_ways(x, block, power_of_two=power_of_two)
    for ours, exact in (
        ((values, scales), ops.reference_quantize_fp8(x, block, power_of_two=power_of_two)),
        ((values_t, scales_t), ops.reference_quantize_fp8(x.mT, (1, 128), power_of_two=power_of_two)),
    ):
        assert not first_difference(bits(ours[0]), bits(exact[0]))
        assert not first_difference(ours[1], exact[1])
    alone = ops.quantize_fp8(x, block, power_of_two=power_of_two)
    assert torch.equal(bits(alone[0]), bits(values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_codes_decode_and_encode(isa: str, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    values, ones = codes.view(torch.float8_e4m3fn), torch.ones(3, 2)
    decoded = ops.dequantize_fp8(values, ones, (1, 128), dtype)
    exact = values.to(dtype)
    assert torch.equal(decoded.nan_to_num(9999), exact.nan_to_num(9999))
    again, scales = ops.quantize_fp8(decoded, (1, 128))
    assert torch.equal(bits(again), bits(values))
    assert torch.equal(scales, ones)


def test_rounding_between_all_neighbours(isa: str) -> None:
    """Just below, at and just above the middle of every two codes; the tile's scale is 1."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    middles = (codes[1:] + codes[:-1]) / 2
    x = torch.cat([middles, middles.nextafter(torch.zeros(())), middles.nextafter(torch.full((), 1e9))])
    x = torch.cat([x.float(), -x.float()])
    x = torch.nn.functional.pad(x, (0, -len(x) % 127)).view(-1, 127)
    x = torch.cat([x, torch.full((len(x), 1), 448.0)], 1)
    values, scales = ops.quantize_fp8(x, (1, 128))
    assert bool((scales == 1).all())
    assert torch.equal(values.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))


@generated
@given(case=cases, block=st.sampled_from(BLOCKS), dtype=st.sampled_from((torch.float32, torch.bfloat16)))
def test_dequantize(isa: str, case: Fp8Case, block: tuple[int, int], dtype: torch.dtype) -> None:
    values, scales = ops.reference_quantize_fp8(case.x(), block)
    ours = ops.dequantize_fp8(values, scales, block, dtype)
    exact = ops.reference_dequantize_fp8(values, scales, block, dtype)
    assert torch.equal(ours.nan_to_num(-7), exact.nan_to_num(-7))


sizes = st.integers(0, 30) | st.sampled_from((64, 128, 150, 256))


@generated
@given(m=sizes, n=sizes, k=sizes | st.sampled_from((300, 700)), seed=st.integers(0, 99))
def test_gemm(isa: str, m: int, n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = ops.reference_quantize_fp8(torch.randn(m, k, generator=generator), (1, 128))
    b = ops.reference_quantize_fp8(torch.randn(n, k, generator=generator), (128, 128))
    for dtype, limit in ((torch.bfloat16, 4e-3), (torch.float32, 2e-6)):
        exact = ops.reference_fp8_gemm(*a, *b, out_dtype=torch.float64)
        assert relative_error(ops.fp8_gemm(*a, *b, out_dtype=dtype), exact) <= limit


def offsets_of(sizes_of_groups: list[int]) -> Tensor:
    """(E + 1) offsets of groups of these sizes."""
    return torch.tensor([0, *sizes_of_groups]).cumsum(0).int()


@generated
@given(
    groups=st.lists(st.integers(0, 20) | st.sampled_from((0, 130)), min_size=1, max_size=5),
    n=sizes, k=sizes, transpose=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_grouped_gemm(isa: str, groups: list[int], n: int, k: int, transpose: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = ops.reference_quantize_fp8(torch.randn(sum(groups), k, generator=generator), (1, 128))
    shape = (len(groups), k, n) if transpose else (len(groups), n, k)
    b = ops.reference_quantize_fp8(torch.randn(shape, generator=generator), (128, 128))
    offsets = offsets_of(groups)
    ours = ops.fp8_grouped_gemm(*a, *b, offsets, transpose_b=transpose, out_dtype=torch.float32)
    exact = ops.reference_fp8_grouped_gemm(*a, *b, offsets, transpose_b=transpose, out_dtype=torch.float64)
    assert relative_error(ours, exact) <= 2e-6


@generated
@given(
    groups=st.lists(st.sampled_from((0, 128, 256)), min_size=0, max_size=3), last=st.integers(0, 140),
    n=sizes, k=sizes, seed=st.integers(0, 99),
)  # fmt: skip
def test_grouped_gemm_wgrad(isa: str, groups: list[int], last: int, n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    offsets = offsets_of([*groups, last])
    m = int(offsets[-1])
    a, b = (ops.reference_quantize_fp8(torch.randn(rows, m, generator=generator), (1, 128)) for rows in (n, k))
    ours = ops.fp8_grouped_gemm_wgrad(*a, *b, offsets)
    exact = ops.reference_fp8_grouped_gemm_wgrad(*a, *b, offsets, out_dtype=torch.float64)
    assert relative_error(ours, exact) <= 2e-6


def test_the_same_for_any_number_of_threads() -> None:
    a = ops.quantize_fp8(torch.randn(300, 500), (1, 128))
    b = ops.quantize_fp8(torch.randn(200, 500), (128, 128))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.fp8_gemm(*a, *b, out_dtype=torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert not first_difference(results[0], results[1]) + first_difference(results[0], results[2])


def test_offsets_are_checked() -> None:
    a = ops.quantize_fp8(torch.randn(10, 8), (1, 128))
    b = ops.quantize_fp8(torch.randn(2, 6, 8), (128, 128))
    for wrong in ([0, 5, 9], [1, 5, 10], [0, 11, 10], [0, -1, 10]):
        with pytest.raises(IndexError, match=r"fp8_grouped_gemm: offsets\[\d\]: got"):
            ops.fp8_grouped_gemm(*a, *b, torch.tensor(wrong).int())
    wide = ops.quantize_fp8(torch.randn(6, 200), (1, 128))
    with pytest.raises(IndexError, match="multiples of 128"):
        ops.fp8_grouped_gemm_wgrad(*wide, *wide, torch.tensor([0, 100, 200]).int())


def test_opcheck_and_compile() -> None:
    x = torch.randn(130, 140)
    k25 = torch.ops.k25
    # test_schema compares results through a sum, which torch has not for float8.
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    check = functools.partial(torch.library.opcheck, test_utils=utils)
    check(k25.quantize_fp8.default, (x, False, False, True))
    values, scales = ops.quantize_fp8(x, (128, 128))
    check(k25.dequantize_fp8.default, (values, scales, True, True))
    rows, row_scales = ops.quantize_fp8(x, (1, 128))
    check(k25.fp8_gemm.default, (rows, row_scales, values, scales, None, 0, True))

    def through_fp8(value: Tensor) -> Tensor:
        return ops.fp8_gemm(*ops.quantize_fp8(value, (1, 128)), values, scales)

    compiled = torch.compile(through_fp8, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), through_fp8(x))
