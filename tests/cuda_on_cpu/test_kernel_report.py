"""What ptxas makes of the kernels for sm_90a, as perf/kernel_report.py reports it, and what they move: a gate.

No spills and no local memory, 16-byte accesses where they are promised, tensor cores and bulk copies in the products,
no warning of ptxas, and no more bytes than each kernel is known to move.
"""

import functools
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from tests.cuda_on_cpu import build, kernel_cases, machine_code
from tests.cuda_on_cpu.kernel_cases import ROW_CASES, count_row_case, moved
from tests.cuda_on_cpu.machine_code import occupancy, summarize
from tests.cuda_on_cpu.planted_gemm_bugs import KERNELS, PlantedGemmBug
from tests.cuda_on_cpu.ptx.parse import Entry, Instruction, parse

# Kernels whose fast path moves 16 bytes in each access: (op, a part of the symbol) -> loads, stores at least.
WIDE = {
    ("dispatch", "dispatch_kernelI5uint4"): (4, 4),
    ("dispatch", "14combine_kernelIfLb1"): (1, 1),
    ("dispatch", "14combine_kernelINS0_4Bf16ELb1"): (1, 1),
    ("dispatch", "combine_backward_kernelIfLb1"): (2, 1),
    ("dispatch", "combine_backward_kernelINS0_4Bf16ELb1"): (2, 1),
    ("swiglu", "13swiglu_kernelIfLb1"): (2, 1),
    ("swiglu", "13swiglu_kernelINS0_4Bf16ELb1"): (2, 1),
    ("swiglu", "22swiglu_backward_kernelIfLb1"): (3, 2),
    ("swiglu", "22swiglu_backward_kernelINS0_4Bf16ELb1"): (3, 2),
    ("pool_temporal_patches", "28pool_temporal_patches_kernelIfLb1"): (5, 1),
    ("pool_temporal_patches", "28pool_temporal_patches_kernelINS0_4Bf16ELb1"): (5, 1),
    ("pool_temporal_patches", "pool_temporal_patches_backward_kernelIfLb1"): (1, 1),
    ("pool_temporal_patches", "pool_temporal_patches_backward_kernelINS0_4Bf16ELb1"): (1, 1),
    ("route_tokens", "route_tokens_kernelIfLi3"): (3, 0),
    ("route_tokens", "route_tokens_kernelINS0_4Bf16ELi2"): (2, 0),
    ("route_tokens", "route_tokens_backward_kernelIfLb1"): (0, 1),
    ("policy_loss", "loss_rows_kernelIfLb1"): (2, 1),
    ("policy_loss", "loss_rows_kernelINS0_4Bf16ELb1"): (2, 1),
    ("policy_loss", "logit_grad_kernelINS0_4Bf16ELb1"): (1, 1),
    ("plan_dispatch", "count_slots_kernelIi"): (1, 0),
    ("plan_dispatch", "place_slots_kernelIi"): (1, 0),
}


needs_nvdisasm = pytest.mark.skipif(machine_code.find_nvdisasm() is None, reason=machine_code.HOW_TO_DISASSEMBLE)
ALL_OPS = (*build.OPS, "gemm")
WARNING = r"\(C\d+\)|Performance Loss|warning"  # C7508: setmaxnreg ignored; C7510, C7518: wgmma serialized


@functools.cache
def entries_of(op: str) -> tuple[Entry, ...]:
    return parse(build.ptx_of(build.CSRC, op).read_text()).entries


@pytest.fixture(scope="module")
def machine_instructions() -> dict[str, Counter[str]]:
    """Of every kernel, by symbol."""
    return {symbol: opcodes for op in ALL_OPS for symbol, opcodes in machine_code.instructions_of(op).items()}


@pytest.mark.parametrize("op", ALL_OPS)
def test_no_kernel_spills_and_ptxas_warns_of_nothing(op: str) -> None:
    for found in machine_code.resources_of(op).values():
        assert (found.stack_bytes, found.spill_store_bytes, found.spill_load_bytes) == (0, 0, 0), found
        assert found.max_threads > 0, "a kernel without __launch_bounds__"
        assert found.static_shared_bytes == 0, "kernels use dynamic shared memory"
    assert not re.search(WARNING, machine_code.usage_of(op)), machine_code.usage_of(op)


@needs_nvdisasm
def test_no_kernel_has_local_memory(machine_instructions: dict[str, Counter[str]]) -> None:
    assert machine_instructions.keys() == {entry.symbol for op in ALL_OPS for entry in entries_of(op)}
    for symbol, opcodes in machine_instructions.items():
        summary = summarize(opcodes)
        assert (summary["LDL"], summary["STL"]) == (0, 0), symbol
        assert summary["total"] > 50, symbol


@needs_nvdisasm
def test_the_gate_sees_spills_and_local_memory(tmp_path: Path) -> None:
    source = tmp_path / "spills.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) spills(float* p) {\n"
        "  float x[64], y[64];\n"
        "  for (int i = 0; i < 64; ++i) x[i] = p[i * 1024 + threadIdx.x];\n"
        "  for (int i = 0; i < 64; ++i) y[i] = x[(i + threadIdx.x) % 64] * x[63 - i];\n"
        "  for (int i = 0; i < 64; ++i) p[i * 1024 + threadIdx.x] = y[i] + x[i];\n}\n"
    )
    folder = build.compiled(source, [])
    (found,) = machine_code.resources_from((folder / "usage.txt").read_text(), {}).values()
    assert found.stack_bytes > 0
    (opcodes,) = machine_code.instructions_in(folder / "kernels.cubin").values()
    assert summarize(opcodes)["LDL"] > 0
    assert summarize(opcodes)["STL"] > 0


WARNED = (
    PlantedGemmBug(
        name="sums touched while wgmma writes them",
        sort="wait",
        file=KERNELS,
        old="Config::kWeightGrads || k > 0, sums);\n",
        new="Config::kWeightGrads || k > 0, sums);\n    sums[0] += 1.0f;\n",
        caught_as="wgmma.mma_async instructions are serialized",
    ),
    PlantedGemmBug(
        name="no bound on the threads",
        sort="bounds",
        file=KERNELS,
        old="__global__ void __launch_bounds__(kGemmThreads, 1)",
        new="__global__ void",
        caught_as="C7508",
    ),
)


@pytest.mark.parametrize("bug", WARNED, ids=lambda bug: bug.name)
def test_the_gate_sees_what_ptxas_warns_of(bug: PlantedGemmBug, tmp_path: Path) -> None:
    usage = (build.compiled_small_gemm(bug.instance, bug.plant(tmp_path)) / "usage.txt").read_text()
    assert re.search(WARNING, usage)
    assert re.search(bug.caught_as, usage)


def wide_accesses(entry: Entry) -> tuple[int, int]:
    """Global loads and stores of 16 bytes in one PTX instruction."""
    opcodes = [s.opcode for s in entry.statements if isinstance(s, Instruction)]
    wide = [op for op in opcodes if re.fullmatch(r"(ld|st)\.global(\.nc)?\.(v4\.[busf]32|v2\.[busf]64)", op)]
    return sum(op.startswith("ld") for op in wide), sum(op.startswith("st") for op in wide)


@pytest.mark.parametrize(("op", "symbol"), WIDE)
def test_accesses_of_16_bytes(op: str, symbol: str) -> None:
    (entry,) = [entry for entry in entries_of(op) if symbol in entry.symbol]
    loads, stores = wide_accesses(entry)
    least = WIDE[op, symbol]
    assert loads >= least[0], f"{loads} loads"
    assert stores >= least[1], f"{stores} stores"


@needs_nvdisasm
@pytest.mark.parametrize(("op", "symbol"), WIDE)
def test_accesses_of_16_bytes_in_machine_code(
    op: str, symbol: str, machine_instructions: dict[str, Counter[str]]
) -> None:
    (opcodes,) = [opcodes for full, opcodes in machine_instructions.items() if symbol in full]
    loads, stores = WIDE[op, symbol]
    assert summarize(opcodes)["LDG128"] >= loads
    assert summarize(opcodes)["STG128"] >= stores


def test_matrix_products_use_tensor_cores_and_bulk_copies() -> None:
    entries = entries_of("gemm")
    assert len(entries) >= 9
    for entry in entries:
        opcodes = [s.opcode for s in entry.statements if isinstance(s, Instruction)]
        kind = "e4m3" if "E4m3" in entry.symbol else "bf16"
        assert sum(bool(re.fullmatch(rf"wgmma\.mma_async.*{kind}\.{kind}", op)) for op in opcodes) >= 4
        assert sum(op.startswith("cp.async.bulk.tensor") and "shared::cluster.global" in op for op in opcodes) >= 2
        assert sum(op.startswith("cp.async.bulk.tensor") and "global.shared::cta" in op for op in opcodes) >= 2
        assert sum(op.startswith("stmatrix") for op in opcodes) >= 4
        assert not any(op.startswith("mma.sync") for op in opcodes)


@needs_nvdisasm
def test_machine_code_of_the_matrix_products(machine_instructions: dict[str, Counter[str]]) -> None:
    for entry in entries_of("gemm"):
        summary = summarize(machine_instructions[entry.symbol])
        used, unused = ("QGMMA", "HGMMA") if "E4m3" in entry.symbol else ("HGMMA", "QGMMA")
        assert summary[used] >= 4, summary
        assert summary[unused] == summary["HMMA"] == 0, summary
        assert summary["UTMALDG"] >= 2, summary
        assert summary["UTMASTG"] >= 2, summary
        assert summary["USETMAXREG"] == 2, summary
        assert summary["SYNCS"] >= 4, summary


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks", "bound_by"),
    [
        (168, 384, 230400, 1, "registers"),  # the products: three warps of each quarter, one block's
        (32, 256, 0, 8, "threads"),
        (64, 256, 0, 4, "registers"),
        (72, 128, 0, 7, "registers"),
        (40, 256, 66080, 3, "shared memory"),
        (16, 32, 0, 32, "blocks"),
    ],
)
def test_occupancy(registers: int, threads: int, shared: int, blocks: int, bound_by: str) -> None:
    found = occupancy(registers, threads, shared)
    assert (found.blocks, found.bound_by) == (blocks, bound_by)
    assert found.share == blocks * threads / 2048


# Bytes loaded, as counted, over those that the algorithm must read; 1 for all others. Stores are always 1.
LOADED_AGAIN = {
    "route_tokens_kernel": 2.0,  # the bias, by every token
    "place_slots_kernel": 2.0,  # the slots, counted and placed
    "dispatch_kernel": 8.1,  # a token, by each of its 8 experts' rows
    "combine_kernel": 1.5,  # weights and row numbers, by every thread
    "combine_backward_kernel": 1.8,  # a token's gradient, by each of its 8 rows
    "weighted_swiglu_grads_kernel": 1.03,  # slot and weight, by every lane
    "logit_grad_kernel": 1.03,  # the row's numbers, by every thread
    "logit_stats_kernel": 1.01,
    "loss_rows_kernel": 2.05,  # logits, for their sum and for their gradient
    "dequantize_fp8_kernel": 1.5,  # scales, by every thread
    "pool_temporal_patches_kernel": 1.07,  # the clip's numbers, by every thread
    "pool_temporal_patches_backward_kernel": 1.3,
}


@pytest.mark.parametrize("kernel", ROW_CASES)
def test_bytes_that_a_kernel_moves(executor: ModuleType, kernel: str) -> None:
    case = ROW_CASES[kernel]
    counts = count_row_case(executor, case, case.dtypes[0])
    (found,) = [moved(one) for symbol, one in counts.items() if f"{len(kernel)}{kernel}" in symbol]
    expected = case.work(case.rows, case.dtypes[0].itemsize)
    assert found.written == expected.written
    assert 1 <= found.read / expected.read <= LOADED_AGAIN.get(kernel, 1)


def test_flop_and_bytes_of_a_matrix_product() -> None:
    """Whole tiles: nothing is multiplied in vain, each tile of columns loads all of A, and each of rows all of B."""
    products = build.gemm_module()
    for product in kernel_cases.SMALL_PRODUCTS:
        if product.columns != 384:
            continue
        ((symbol, counts),) = kernel_cases.count_product(products, product).items()
        width = re.search(r"OperandsELi(\d+)E", symbol)
        assert width
        tile = int(width[1])
        assert moved(counts).flop == product.work.flop
        assert counts["bulk_stored_bytes"] == product.work.written
        size = product.bits // 8
        inner = product.rows if product.kind == "weight_grads" else product.depth
        assert counts["bulk_loaded_bytes"] == 384 // tile * (128 + tile) * inner * size
        assert (counts["loaded_bytes"] > 0) == (size == 1)  # scales
