"""The matrix products on the CPU: translated PTX and source, copies and wgmma at once and as late as allowed."""

import re
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.gemm_ops import (
    RUNS,
    GemmCase,
    WeightGradCase,
    exact,
    operands_of,
    run_gemm,
    run_weight_grads,
    wrong,
)
from tests.ops.generators import first_difference

pytestmark = pytest.mark.timeout(300)

PLAIN = (
    GemmCase(rows=128, columns=64, depth=64, width=64),
    GemmCase(rows=200, columns=264, depth=320, width=128),
    GemmCase(rows=1, columns=8, depth=8),
    GemmCase(rows=77, columns=61, depth=72, out_dtype=torch.float32),  # no row of the result is aligned
    GemmCase(rows=300, columns=520, depth=136, out_dtype=torch.float32),
    GemmCase(rows=120, columns=504, depth=456, width=256),  # more tiles of K than stages
    GemmCase(rows=2300, columns=40, depth=16),  # more row tiles than are walked together
)
GROUPED = (
    GemmCase(rows_per_expert=(5, 0, 128, 0, 200, 1), columns=136, depth=200),
    GemmCase(rows_per_expert=(129, 128, 3), skipped_rows=4, columns=264, depth=64, out_dtype=torch.float32),
    GemmCase(rows_per_expert=(0, 0, 0), skipped_rows=3, columns=64, depth=64),
)
TRANSPOSED = (
    GemmCase(rows=200, columns=264, depth=320, b_is_transposed=True, width=128),
    GemmCase(rows=128, columns=504, depth=72, b_is_transposed=True, width=256, out_dtype=torch.float32),
    GemmCase(rows_per_expert=(70, 0, 130), columns=40, depth=88, b_is_transposed=True, width=64),
)
FP8 = (
    GemmCase(fp8=True, rows=128, columns=64, depth=128, width=64),
    GemmCase(fp8=True, rows=200, columns=260, depth=400, width=128),
    GemmCase(fp8=True, rows=128, columns=576, depth=272, out_dtype=torch.float32, width=192),
    GemmCase(fp8=True, rows=77, columns=61, depth=16, out_dtype=torch.float32),
    GemmCase(fp8=True, rows_per_expert=(5, 0, 128, 0, 200, 1), columns=200, depth=144),
    GemmCase(fp8=True, rows_per_expert=(129, 40), skipped_rows=4, columns=456, depth=640, out_dtype=torch.float32),
)
WEIGHT_GRADS = (
    WeightGradCase(rows=64, a_width=128, b_width=128, width=128),
    WeightGradCase(rows=330, a_width=136, b_width=72, out_dtype=torch.bfloat16),
    WeightGradCase(rows_per_expert=(5, 0, 128, 130, 1), a_width=72, b_width=200),
    WeightGradCase(rows_per_expert=(100, 300), a_width=200, b_width=392, out_dtype=torch.bfloat16, width=256),
    WeightGradCase(rows_per_expert=(5, 0, 128, 130, 1), a_width=72, b_width=200, accumulate=True),
    WeightGradCase(rows_per_expert=(100, 30), a_width=136, b_width=72, accumulate=True, out_dtype=torch.bfloat16),
)
FP8_WEIGHT_GRADS = (
    WeightGradCase(fp8=True, rows=128, a_width=128, b_width=64, width=64),
    WeightGradCase(fp8=True, rows=1040, a_width=136, b_width=72, out_dtype=torch.bfloat16),  # more steps than stages
    WeightGradCase(fp8=True, rows_per_expert=(128, 0, 256, 0), a_width=72, b_width=200),
    WeightGradCase(fp8=True, rows_per_expert=(256, 144), a_width=61, b_width=77, width=128),  # nothing is aligned
    WeightGradCase(fp8=True, rows_per_expert=(128, 16), a_width=200, b_width=576, width=192, out_dtype=torch.bfloat16),
    WeightGradCase(fp8=True, rows_per_expert=(128, 0, 128), a_width=130, b_width=36, accumulate=True),
    WeightGradCase(fp8=True, rows_per_expert=(128, 32), a_width=9, b_width=5, accumulate=True),
)


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return build.gemm_module()


@pytest.mark.parametrize("case", [*PLAIN, *GROUPED, *TRANSPOSED, *FP8], ids=str)
def test_gemm(module: ModuleType, case: GemmCase) -> None:
    """Against float64, and bit for bit the same in every order, eager and lazy, PTX and source."""
    operands = operands_of(case)
    expected = exact(case, operands)
    results = []
    for run in RUNS:
        results.append(run_gemm(module, case, operands, *run))
        assert wrong(case, results[-1], expected) == "", run
        if case.width:
            assert re.search(rf"Operands(, |ELi){case.width}\D", module.last_kernel())
    for other in results[1:]:
        assert first_difference(results[0].nan_to_num(7.0), other.nan_to_num(7.0)) == ""


@pytest.mark.parametrize("case", [*WEIGHT_GRADS, *FP8_WEIGHT_GRADS], ids=str)
def test_weight_grads(module: ModuleType, case: WeightGradCase) -> None:
    operands = case.operands()
    expected = case.exact(operands)
    results = []
    for run in RUNS:
        results.append(run_weight_grads(module, case, operands, *run))
        assert wrong(case, results[-1], expected) == "", run
        assert first_difference(results[0], results[-1]) == ""
        if case.width:
            assert re.search(rf"Operands(, |ELi){case.width}\D", module.last_kernel())


def test_nan_in_rows_of_one_expert_stays_in_its_weight_grads(module: ModuleType) -> None:
    case = WeightGradCase(rows_per_expert=(40, 40), a_width=64, b_width=64)
    for operand in ("a", "b"):
        operands = case.operands()
        getattr(operands, operand)[40:] = float("inf")
        result = run_weight_grads(module, case, operands, "ptx", True, "random")
        assert wrong(case, result[:1], case.exact(operands)[:1]) == ""


def test_nan_of_one_expert_stays_there(module: ModuleType) -> None:
    """Tiles of A, B and K reach into the next expert's operands; zeros times its NaN would be NaN."""
    for b_is_transposed in (False, True):
        case = GemmCase(rows_per_expert=(40, 40), columns=72, depth=40, b_is_transposed=b_is_transposed)
        operands = operands_of(case)
        operands.b[1] = float("nan")
        result = run_gemm(module, case, operands, "ptx", True, "random")
        expected = exact(case, operands)
        assert wrong(replace(case, rows_per_expert=(40,)), result[:40], expected[:40]) == ""


@pytest.mark.parametrize("offsets", [(0, 50, 40), (0, 40, 141), (-1, 40, 60)])
def test_bad_offsets_trap(module: ModuleType, offsets: tuple[int, ...]) -> None:
    class Bad(GemmCase):
        @property
        def offsets(self) -> list[int]:
            return list(offsets)

    case = Bad(rows_per_expert=(70, 70), columns=64, depth=64)
    with pytest.raises(RuntimeError, match="trap"):
        run_gemm(module, case, operands_of(case), "ptx", False, "in_order")


@pytest.mark.parametrize("rows_per_expert", [(64, 192), (128, 64, 64)])
def test_an_expert_that_begins_within_a_scale_traps(module: ModuleType, rows_per_expert: tuple[int, ...]) -> None:
    case = WeightGradCase(fp8=True, rows_per_expert=rows_per_expert, a_width=64, b_width=64)
    with pytest.raises(RuntimeError, match="trap"):
        run_weight_grads(module, case, case.operands(), "ptx", False, "in_order")


def test_fp8_rows_that_are_refused(module: ModuleType) -> None:
    case = WeightGradCase(fp8=True, rows=40, a_width=64, b_width=64)
    with pytest.raises(ValueError, match=r"gemm_fp8_weight_grads: rows is 40; it must be .* a multiple of 16"):
        run_weight_grads(module, case, case.operands(), "ptx", False, "in_order")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (GemmCase(rows=8, columns=8, depth=12), "gemm_bf16: depth is 12; it must be .* a multiple of 8"),
        (GemmCase(rows=8, columns=8, depth=24, fp8=True), "gemm_fp8: depth is 24; .* a multiple of 16"),
        (GemmCase(rows=8, columns=12, depth=8, b_is_transposed=True), "columns of a transposed b is 12"),
        (GemmCase(rows=8, columns=8, depth=0), "depth is 0"),
        (GemmCase(rows=8, columns=8, depth=8, out_dtype=torch.float64), "the result is bf16 or f32"),
    ],
)
def test_sizes_that_are_refused(module: ModuleType, case: GemmCase, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_gemm(module, case, operands_of(case), "ptx", False, "in_order")


def test_a_misaligned_operand_is_refused(module: ModuleType) -> None:
    space = torch.zeros(4096, dtype=torch.bfloat16)
    address = space.data_ptr() // 16 * 16 + 16
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        module.gemm_bf16(address + 2, address, 0, address, 8, 8, 8, 1, False, 1, 0)
