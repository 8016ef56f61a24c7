"""Plants each bug of planted_bugs.py and planted_gemm_bugs.py, runs the kernel that shows it and says what caught it.

python -m tests.cuda_on_cpu.mutations [--only TEXT] [--json FILE]

Exit status 1 if one is not caught, or not by the check that is there for it.
"""

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch

from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.device_ops import DeviceOps
from tests.cuda_on_cpu.gemm_ops import GemmCase, WeightGradCase, exact, operands_of, run_gemm, run_weight_grads, wrong
from tests.cuda_on_cpu.kernel_checks import CHECKS, SHIFTS
from tests.cuda_on_cpu.planted_bugs import PLANTED_BUGS, PlantedBug
from tests.cuda_on_cpu.planted_gemm_bugs import PLANTED_GEMM_BUGS, PlantedGemmBug

ALL_BUGS: tuple[PlantedBug, ...] = (*PLANTED_BUGS, *PLANTED_GEMM_BUGS)
# For each instance of small_gemm.cu: its case has more tiles than blocks, and more tiles of K than stages.
GEMM_CASES = (
    GemmCase(rows_per_expert=(130, 40, 150), columns=136, depth=584),
    GemmCase(rows_per_expert=(100, 60), columns=136, depth=136, b_is_transposed=True, out_dtype=torch.float32),
    GemmCase(rows_per_expert=(140, 30), columns=200, depth=656, fp8=True, out_dtype=torch.float32),
    WeightGradCase(rows_per_expert=(130, 0, 70), a_width=136, b_width=136),
    WeightGradCase(rows_per_expert=(768, 0, 144), a_width=136, b_width=136, fp8=True),
    WeightGradCase(rows_per_expert=(130, 0, 70), a_width=136, b_width=136, accumulate=True),
)
GEMM_RUNS = {"eager": (False, "in_order"), "lazy": (True, "random")}


@dataclass(frozen=True)
class Caught:
    """`run` is eager or lazy of a matrix product, else how many elements from an aligned address the tensors lie."""

    run: str
    said: str  # the executor's message, or that the result is wrong


def run_kernel_check(module: ModuleType, kernel: str) -> list[Caught]:
    """What the kernel's check finds; nothing if all is right."""
    caught = []
    for shift in SHIFTS:
        try:
            wrong_result = CHECKS[kernel].is_wrong(DeviceOps(module, "ptx", shift=shift))
            said = f"wrong result of {kernel}" if wrong_result else ""
        except RuntimeError as error:
            said = str(error)
        caught += [Caught(f"shift {shift}", said)] if said else []
    return caught


def run_gemm_check(module: ModuleType, instance: int) -> list[Caught]:
    """What the executor or the result of that instance of small_gemm.cu says, eager and lazy."""
    case, caught = GEMM_CASES[instance], []
    for name, (lazy, order) in GEMM_RUNS.items():
        try:
            if isinstance(case, GemmCase):
                operands = operands_of(case)
                said = wrong(case, run_gemm(module, case, operands, "ptx", lazy, order), exact(case, operands))
            else:
                operands = case.operands()
                said = wrong(case, run_weight_grads(module, case, operands, "ptx", lazy, order), case.exact(operands))
            said = f"wrong result of gemm_kernel: {said}" if said else ""
        except RuntimeError as error:
            said = str(error)
        caught += [Caught(name, said)] if said else []
    return caught


def build_with(bug: PlantedBug, folder: Path) -> ModuleType:
    """The executor with the kernel that shows the bug; `folder` gets a copy of csrc."""
    copy = bug.plant(folder)
    if isinstance(bug, PlantedGemmBug):
        return build.small_gemm_module(bug.instance, copy)
    # Only a bug in the code of launches needs that code compiled again.
    return build.planted_module(copy, CHECKS[bug.kernel].op, copy if bug.file.endswith(".cu") else build.CSRC)


def start_builds(bugs: Sequence[PlantedBug], folder: Path) -> dict[str, "Future[ModuleType]"]:
    """Of each bug by name, two at a time."""
    pool = ThreadPoolExecutor(2)
    futures = {bug.name: pool.submit(build_with, bug, folder / str(i)) for i, bug in enumerate(bugs)}
    pool.shutdown(wait=False)
    return futures


def run_with(bug: PlantedBug, module: ModuleType) -> list[Caught]:
    """What catches the bug in a module with it."""
    if isinstance(bug, PlantedGemmBug):
        return run_gemm_check(module, bug.instance)
    return run_kernel_check(module, bug.kernel)


def is_caught(bug: PlantedBug, caught: Sequence[Caught]) -> bool:
    """Whether one of them is the check that is there for the bug."""
    return any(re.search(bug.caught_as, each.said) for each in caught)


def _line(number: int, bug: PlantedBug, caught: Sequence[Caught]) -> str:
    verdict = "" if is_caught(bug, caught) else f"  NOT CAUGHT{' as ' + bug.caught_as if bug.caught_as else ''}"
    head = f"{number:3}  {bug.sort:10}  {bug.kernel:38}  {bug.file:34}  {bug.name}{verdict}"
    return "\n".join([head, *(f"       {each.run}: {' '.join(each.said.split())[:200]}" for each in caught)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the list and, last, the totals."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="bugs whose name, sort, kernel or file contains this")
    parser.add_argument("--json", help="file for the list")
    options = parser.parse_args(arguments)
    if build.find_nvcc() is None:
        parser.error("nvcc is not in K25_CUDA_HOME/bin, CUDA_HOME/bin or PATH: there is no PTX to run")
    bugs = [b for b in ALL_BUGS if any(options.only in text for text in (b.name, b.sort, b.kernel, b.file))]
    if not bugs:
        parser.error(f"--only {options.only!r} names none of the {len(ALL_BUGS)} bugs")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        modules = start_builds(bugs, Path(folder))
        for number, bug in enumerate(bugs, 1):
            caught = run_with(bug, modules[bug.name].result())
            print(_line(number, bug, caught), flush=True)
            rows.append((bug, caught))
    num_caught = sum(is_caught(bug, caught) for bug, caught in rows)
    sorts = ", ".join(f"{count} {sort}" for sort, count in Counter(bug.sort for bug in bugs).most_common())
    by_executor = sum(not all(each.said.startswith("wrong result") for each in caught) for _, caught in rows if caught)
    print(
        f"{len(bugs)} planted bugs ({sorts}): {num_caught} caught, {by_executor} by a check of the executor, the rest"
    )
    print("by the result alone")
    if options.json:
        listed = [{**asdict(bug), "caught": [asdict(each) for each in caught]} for bug, caught in rows]
        Path(options.json).write_text(json.dumps(listed, indent=1) + "\n")
    return 0 if num_caught == len(bugs) else 1


if __name__ == "__main__":
    sys.exit(main())
