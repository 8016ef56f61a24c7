"""The executor catches bugs of asynchronous kernels: each planted one fails, by the check that names it."""

import re
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType

import pytest
import torch

from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.gemm_ops import GemmCase, exact, operands_of, run_gemm, wrong
from tests.cuda_on_cpu.planted_gemm_bugs import PLANTED_GEMM_BUGS, PlantedGemmBug

pytestmark = pytest.mark.timeout(300)
# For each kind of kernel: its case has more tiles than blocks, and more tiles of K than stages.
CASES = (
    GemmCase(rows_per_expert=(130, 40, 150), columns=136, depth=584),
    GemmCase(rows_per_expert=(100, 60), columns=136, depth=136, b_is_transposed=True, out_dtype=torch.float32),
    GemmCase(rows_per_expert=(140, 30), columns=200, depth=656, fp8=True, out_dtype=torch.float32),
)


def failures(module: ModuleType, case: GemmCase) -> list[str]:
    """What the executor or the result says, eager and lazy; a right one says nothing."""
    said = []
    operands = operands_of(case)
    for lazy, order in ((False, "in_order"), (True, "random")):
        try:
            said.append(wrong(case, run_gemm(module, case, operands, "ptx", lazy, order), exact(case, operands)))
        except RuntimeError as error:
            said.append(str(error))
    return [text for text in said if text]


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[ModuleType]]:
    """Of each bug, built two at a time."""
    folder = tmp_path_factory.mktemp("planted")
    pool = ThreadPoolExecutor(2)
    futures = {
        bug.name: pool.submit(build.small_gemm_module, bug.kind, bug.plant(folder / str(i)))
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
