"""What ptxas makes of the kernels for sm_90a: no spills, and 16-byte accesses where they are promised."""

import re

import pytest

from tests.cuda_on_cpu import build
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
    ("swiglu", "swiglu_backward_kernelIfLb1"): (3, 2),
    ("swiglu", "swiglu_backward_kernelINS0_4Bf16ELb1"): (3, 2),
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


def wide_accesses(entry: Entry) -> tuple[int, int]:
    """Global loads and stores of 16 bytes in one instruction."""
    opcodes = [s.opcode for s in entry.statements if isinstance(s, Instruction)]
    wide = [op for op in opcodes if re.fullmatch(r"(ld|st)\.global(\.nc)?\.(v4\.[busf]32|v2\.[busf]64)", op)]
    return sum(op.startswith("ld") for op in wide), sum(op.startswith("st") for op in wide)


@pytest.mark.parametrize("op", [*build.OPS, "gemm"])
def test_no_kernel_spills(op: str) -> None:
    usage = build.resource_usage(op)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", usage)
    kernels = parse(build.ptx_of(build.CSRC, op).read_text()).entries
    assert len(spills) >= len(kernels) > 0
    assert set(spills) == {("0", "0", "0")}, usage


@pytest.mark.parametrize(("op", "symbol"), WIDE)
def test_accesses_of_16_bytes(op: str, symbol: str) -> None:
    entries = parse(build.ptx_of(build.CSRC, op).read_text()).entries
    (entry,) = [entry for entry in entries if symbol in entry.symbol]
    loads, stores = wide_accesses(entry)
    least = WIDE[op, symbol]
    assert loads >= least[0], f"{loads} loads"
    assert stores >= least[1], f"{stores} stores"


def test_matrix_products_use_tensor_cores_and_bulk_copies() -> None:
    """ptxas warns where it makes wgmma wait for each other (C7510) or ignores setmaxnreg (C7508)."""
    assert not re.search(r"C75\d\d|warning", build.resource_usage("gemm"))
    entries = parse(build.ptx_of(build.CSRC, "gemm").read_text()).entries
    assert len(entries) >= 9
    for entry in entries:
        opcodes = [s.opcode for s in entry.statements if isinstance(s, Instruction)]
        kind = "e4m3" if "E4m3" in entry.symbol else "bf16"
        assert sum(bool(re.fullmatch(rf"wgmma\.mma_async.*{kind}\.{kind}", op)) for op in opcodes) >= 4
        assert sum(op.startswith("cp.async.bulk.tensor") and "shared::cluster.global" in op for op in opcodes) >= 2
        assert sum(op.startswith("cp.async.bulk.tensor") and "global.shared::cta" in op for op in opcodes) >= 2
        assert sum(op.startswith("stmatrix") for op in opcodes) >= 4
        assert not any(op.startswith("mma.sync") for op in opcodes)
