"""The executor catches what it is there for: each planted bug fails, by the check that names it."""

import re
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from k25sys import ops
from tests.cuda_on_cpu import build, mutations
from tests.cuda_on_cpu.device_ops import ORDERS, DeviceOps
from tests.cuda_on_cpu.kernel_checks import CASE, CHECKS, SHIFTS
from tests.cuda_on_cpu.mutations import ALL_BUGS, GEMM_CASES
from tests.cuda_on_cpu.planted_bugs import DROPPED_BARRIER, PlantedBug, Sort
from tests.cuda_on_cpu.ptx.parse import parse

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory, executor: ModuleType) -> dict[str, "Future[ModuleType]"]:
    """Of each bug; behind `executor`, whose objects they share."""
    return mutations.start_builds(ALL_BUGS, tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("kernel", CHECKS)
def test_without_a_bug_nothing_is_caught(executor: ModuleType, kernel: str) -> None:
    assert mutations.run_kernel_check(executor, kernel) == []
    for shift in SHIFTS:
        assert not CHECKS[kernel].is_wrong(DeviceOps(executor, "source", shift=shift))


@pytest.mark.parametrize("instance", range(len(GEMM_CASES)))
def test_without_a_bug_nothing_is_caught_in_a_product(instance: int) -> None:
    assert mutations.run_gemm_check(build.small_gemm_module(instance), instance) == []


@pytest.mark.parametrize("bug", ALL_BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_caught(bug: PlantedBug, modules: dict[str, "Future[ModuleType]"]) -> None:
    caught = mutations.run_with(bug, modules[bug.name].result())
    assert caught, "not caught"
    assert mutations.is_caught(bug, caught), caught


def test_there_are_bugs_of_every_sort_in_every_kernel() -> None:
    symbols = [e.symbol for op in (*build.OPS, "gemm") for e in parse(build.ptx_of(build.CSRC, op).read_text()).entries]
    kernels = {re.sub(r"^_ZN3k254cuda\d+(\w+?_kernel)[IE].*$", r"\1", symbol) for symbol in symbols}
    assert kernels == {*CHECKS, "gemm_kernel"} == {bug.kernel for bug in ALL_BUGS}
    assert {bug.sort for bug in ALL_BUGS} == set(get_args(Sort))
    assert len({bug.name for bug in ALL_BUGS}) == len(ALL_BUGS) >= 25


def test_a_dropped_barrier_shows_in_the_result_of_some_order_of_the_source(tmp_path: Path) -> None:
    copy = DROPPED_BARRIER.plant(tmp_path)
    module = build.planted_module(copy, "plan_dispatch", host=copy)
    experts = CASE.tensors().experts_TK
    reference = ops.reference_plan_dispatch(experts, CASE.num_experts).row_of_slot_TK
    wrong = []
    for order, seed in ORDERS:
        try:
            plan = DeviceOps(module, "source", order, seed).plan_dispatch(experts, CASE.num_experts)
            wrong.append(not bool((plan.row_of_slot_TK == reference).all()))
        except RuntimeError:
            wrong.append(True)
    assert any(wrong)
