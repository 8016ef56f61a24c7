"""The executor catches bugs of asynchronous kernels: each planted one fails, by the check that names it."""

import re
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType

import pytest
import torch

from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.gemm_ops import (
    GemmCase,
    WeightGradCase,
    exact,
    operands_of,
    run_gemm,
    run_weight_grads,
    wrong,
)
from tests.cuda_on_cpu.planted_gemm_bugs import PLANTED_GEMM_BUGS, PlantedGemmBug

pytestmark = pytest.mark.timeout(300)
# For each kind of kernel: its case has more tiles than blocks, and more tiles of K than stages.
CASES = (
    GemmCase(rows_per_expert=(130, 40, 150), columns=136, depth=584),
    GemmCase(rows_per_expert=(100, 60), columns=136, depth=136, b_is_transposed=True, out_dtype=torch.float32),
    GemmCase(rows_per_expert=(140, 30), columns=200, depth=656, fp8=True, out_dtype=torch.float32),
    WeightGradCase(rows_per_expert=(130, 0, 70), a_width=136, b_width=136),
    WeightGradCase(rows_per_expert=(768, 0, 144), a_width=136, b_width=136, fp8=True),
    WeightGradCase(rows_per_expert=(130, 0, 70), a_width=136, b_width=136, accumulate=True),
)


def failure(module: ModuleType, case: GemmCase | WeightGradCase, lazy: bool, order: str) -> str:
    """What the executor or the result says; a right one says nothing."""
    try:
        if isinstance(case, GemmCase):
            operands = operands_of(case)
            return wrong(case, run_gemm(module, case, operands, "ptx", lazy, order), exact(case, operands))
        operands = case.operands()
        return wrong(case, run_weight_grads(module, case, operands, "ptx", lazy, order), case.exact(operands))
    except RuntimeError as error:
        return str(error)


def failures(module: ModuleType, case: GemmCase | WeightGradCase) -> list[str]:
    """Eager and lazy."""
    said = [failure(module, case, lazy, order) for lazy, order in ((False, "in_order"), (True, "random"))]
    return [text for text in said if text]


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[ModuleType]]:
    """Of each bug, built two at a time."""
    folder = tmp_path_factory.mktemp("planted")
    pool = ThreadPoolExecutor(2)
    futures = {
        bug.name: pool.submit(lambda bug=bug, i=i: build.small_gemm_module(bug.kind, bug.plant(folder / str(i))))
        for i, bug in enumerate(PLANTED_GEMM_BUGS)
    }
    pool.shutdown(wait=False)
    return futures


@pytest.mark.parametrize("kind", range(len(CASES)))
def test_without_a_bug_nothing_is_caught(kind: int) -> None:
    assert failures(build.small_gemm_module(kind), CASES[kind]) == []


@pytest.mark.parametrize("bug", PLANTED_GEMM_BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(bug: PlantedGemmBug, modules: dict[str, Future[ModuleType]]) -> None:
    caught = failures(modules[bug.name].result(), CASES[bug.kind])
    assert caught, "not caught"
    if bug.caught_as:
        assert any(re.search(bug.caught_as, text) for text in caught), caught
