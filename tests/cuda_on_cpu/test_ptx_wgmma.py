"""wgmma and its descriptors, stmatrix and ldmatrix, setmaxnreg: what they do, and what misuse is found."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu.ptx.parse import PtxError
from tests.cuda_on_cpu.ptx.translate import translate
from tests.cuda_on_cpu.ptx_kernels import HEADER, Kernel, Runner, module_of

ROWS = 64
B_AT = 16384  # byte of shared memory where operand B's image starts
IMAGE_BYTES = 49152
LAYOUT_CODES = {0: 0, 128: 1, 64: 2, 32: 3}

# All threads copy the image of shared memory at %d1; %d2 and %d3 are the descriptors.
COPY_IMAGE = f"""
mov.u32 %r2, tiles; shl.b32 %r4, %r0, 4; add.s32 %r3, %r2, %r4; cvt.u64.u32 %d5, %r4; add.s64 %d5, %d1, %d5;
mov.u32 %r4, 0;
$L_copy: ld.global.nc.v4.u32 {{%r5, %r6, %r7, %r8}}, [%d5]; st.shared.v4.u32 [%r3], {{%r5, %r6, %r7, %r8}};
add.s32 %r3, %r3, 2048; add.s64 %d5, %d5, 2048; add.s32 %r4, %r4, 1; setp.lt.u32 %p, %r4, {IMAGE_BYTES // 2048};
@%p bra $L_copy;
"""
FENCE = "fence.proxy.async; bar.sync 0;"


def registers(count: int) -> str:
    """The accumulators of one thread."""
    return "{" + ", ".join(f"%f{i}" for i in range(count)) + "}"


def store_registers(count: int) -> str:
    """To the place of the third buffer, whose address lies at the end of the image: a row of floats for each thread."""
    stores = "; ".join(f"st.global.f32 [%d5+{4 * i}], %f{i}" for i in range(count))
    return (
        f"ld.global.nc.u64 %d6, [%d1+{IMAGE_BYTES}]; mul.wide.u32 %d5, %r0, {4 * count}; add.s64 %d5, %d6, %d5;"
        f"{stores}; mov.u32 %r1, 0"
    )


def multiply(shape: str, columns: int, operands: str, before: str = "0f00000000") -> str:
    """One wgmma with accumulators that start as `before`, waited for."""
    sums = registers(columns // 2)
    start = "; ".join(f"mov.f32 %f{i}, {before}" for i in range(columns // 2))
    return (
        f"{start}; wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.{shape} {sums}, {operands};"
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" + store_registers(columns // 2)
    )


TRUE = "setp.eq.u32 %q, 0, 0;"
FALSE = "setp.ne.u32 %q, 0, 0;"
BF16, E4M3 = "m64n{n}k16.f32.bf16.bf16", "m64n{n}k32.f32.e4m3.e4m3"


def product(
    name: str, shape: str, columns: int, operands: str, before: str = "0f00000000", start: str = TRUE
) -> Kernel:
    return Kernel(name, COPY_IMAGE + FENCE + start + multiply(shape.format(n=columns), columns, operands, before))


PRODUCTS = {
    "bf16_n8": product("bf16_n8", BF16, 8, "%d2, %d3, %q, 1, 1, 0, 0"),
    "bf16_n64": product("bf16_n64", BF16, 64, "%d2, %d3, %q, 1, 1, 0, 0"),
    "bf16_n256": product("bf16_n256", BF16, 256, "%d2, %d3, %q, 1, 1, 0, 0"),
    "bf16_mn_major": product("bf16_mn_major", BF16, 128, "%d2, %d3, %q, 1, 1, 1, 1"),
    "bf16_b_mn_major": product("bf16_b_mn_major", BF16, 64, "%d2, %d3, %q, 1, 1, 0, 1"),
    "bf16_negated": product("bf16_negated", BF16, 64, "%d2, %d3, %q, -1, 1, 0, 0", "0f40000000"),
    "bf16_scale_d_0": product("bf16_scale_d_0", BF16, 64, "%d2, %d3, %q, 1, 1, 0, 0", "0f7fc00000", FALSE),
    "e4m3_n64": product("e4m3_n64", E4M3, 64, "%d2, %d3, %q, 1, 1"),
    "e4m3_n192": product("e4m3_n192", E4M3, 192, "%d2, %d3, %q, 1, 1", "0f3f800000"),
}
MMA = f"wgmma.mma_async.sync.aligned.{BF16.format(n=8)} {registers(4)}, %d2, %d3, %q, 1, 1, 0, 0;"
COMMIT, WAIT_0 = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
START = COPY_IMAGE + FENCE + TRUE
ZERO = "; ".join(f"mov.f32 %f{i}, 0f00000000" for i in range(8)) + ";"
READ_EARLY = Kernel(
    "read_early", START + ZERO + "wgmma.fence.sync.aligned;" + MMA + COMMIT + "mov.b32 %r1, %f1;" + WAIT_0
)
# Two groups on the same accumulators; the first is waited for, then the second.
CHAIN = Kernel(
    "chain",
    START + ZERO + "wgmma.fence.sync.aligned;" + (MMA + COMMIT) * 2 + "wgmma.wait_group.sync.aligned 1;"
    "mov.b32 %r9, %f0;" + WAIT_0 + store_registers(4) + "; mov.u32 %r1, %r9",
)
ERRORS = [
    (Kernel("no_fence", START + ZERO + MMA + COMMIT + WAIT_0), "before any wgmma.fence"),
    (Kernel("not_waited", START + ZERO + "wgmma.fence.sync.aligned;" + MMA + COMMIT), "that nobody waited for"),
    (Kernel("not_committed", START + ZERO + "wgmma.fence.sync.aligned;" + MMA + WAIT_0), "that nobody waited for"),
    (
        Kernel("no_proxy_fence", COPY_IMAGE + "bar.sync 0;" + TRUE + ZERO + "wgmma.fence.sync.aligned;" + MMA),
        "is accessed by wgmma at line .* without a fence.proxy.async",
    ),
    (
        Kernel("no_barrier", COPY_IMAGE + "fence.proxy.async;" + TRUE + ZERO + "wgmma.fence.sync.aligned;" + MMA),
        "race at byte .* of shared memory: written by thread .* read by wgmma",
    ),
    (
        Kernel("write_before_wait", START + ZERO + "wgmma.fence.sync.aligned;" + MMA + COMMIT
               + "setp.eq.u32 %p, %r0, 0; @%p st.shared.u32 [%r2], %r0;" + WAIT_0),
        "race at byte 0 of shared memory: read by wgmma at .* written at",
    ),
    (
        Kernel("operands_differ", START + ZERO + "cvt.u64.u32 %d6, %r0; shr.u64 %d6, %d6, 5; add.s64 %d2, %d2, %d6;"
               "wgmma.fence.sync.aligned;" + MMA + COMMIT + WAIT_0),
        "the operands differ within the warpgroup",
    ),
    (Kernel("half_a_warpgroup", TRUE + ZERO + "wgmma.fence.sync.aligned;" + MMA, threads=64), "fewer than 128 threads"),
    (
        Kernel("overlapping_accumulators", START + ZERO + "wgmma.fence.sync.aligned;" + MMA
               + MMA.replace("%f0, %f1, %f2, %f3", "%f3, %f4, %f5, %f6") + COMMIT + WAIT_0),
        "accumulators belong to another wgmma in flight",
    ),
    (Kernel("registers_7", "setmaxnreg.dec.sync.aligned.u32 28"), "a multiple of 8 from 24 to 256"),
    (Kernel("registers_too_many", "setmaxnreg.inc.sync.aligned.u32 232", threads=512), "take 118784 registers"),
    (
        Kernel("registers_disagree", "setp.lt.u32 %p, %r0, 32; @%p setmaxnreg.dec.sync.aligned.u32 40; mov.u32 %r1, 0"),
        "the warps of warpgroup 0 disagree",
    ),
    (
        Kernel("registers_up_by_dec", "setmaxnreg.dec.sync.aligned.u32 40; setmaxnreg.dec.sync.aligned.u32 48"),
        "the warp has 40 registers",
    ),
    (
        Kernel("misaligned_matrix", "mov.u32 %r2, tiles; shl.b32 %r3, %r0, 3; add.s32 %r2, %r2, %r3;"
               "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {%r0}", threads=32),
        "stmatrix.sync: misaligned row at byte 8",
    ),
]  # fmt: skip

# Lane l stores registers of 2 l and 2 l + 1 (+ 100 for each register), and reads its word of shared memory.
VALUES = "shl.b32 %r4, %r0, 1; mul.lo.u32 %r5, %r4, 65537; add.s32 %r5, %r5, 65536;" + "".join(
    f"add.s32 %r{6 + i}, %r{5 + i}, 6553700;" for i in range(3)
)
ROW = "mov.u32 %r2, tiles; shl.b32 %r3, %r0, 4; add.s32 %r3, %r3, %r2;"
WORD = "bar.sync 0; shl.b32 %r10, %r0, 2; add.s32 %r10, %r10, %r2; ld.shared.u32 %r1, [%r10+{at}]"
MATRICES = {
    "x1": ("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {{%r5}};", 1, False),
    "x2": ("stmatrix.sync.aligned.m8n8.x2.shared::cta.b16 [%r3], {{%r5, %r6}};", 2, False),
    "x4": ("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r3], {{%r5, %r6, %r7, %r8}};", 4, False),
    "x4_trans": ("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%r3], {{%r5, %r6, %r7, %r8}};", 4, True),
}
STORES = {
    (name, at): Kernel(f"stmatrix_{name}_{at}", VALUES + ROW + text.format() + WORD.format(at=128 * at), threads=32)
    for name, (text, count, _) in MATRICES.items()
    for at in range(count)
}
LOADS = {
    (name, at): Kernel(
        f"ldmatrix_{name}_{at}",
        ROW + "mov.u32 %r4, 0; shl.b32 %r5, %r0, 4; add.s32 %r5, %r5, 0;"
        + "".join(f"mul.lo.u32 %r6, %r0, 524296; add.s32 %r6, %r6, {(2 * i + 1) * 65536 + 2 * i};"
                  f"st.shared.u32 [%r3+{4 * i}], %r6;" for i in range(4))
        + "bar.warp.sync 0xffffffff;"
        + f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if trans else ''}.shared.b16 "
        + "{" + ", ".join(f"%r{20 + i}" for i in range(count)) + "}, [%r3];" + f"mov.u32 %r1, %r{20 + at}",
        threads=32,
    )
    for name, (_, count, trans) in MATRICES.items()
    for at in range(count)
}  # fmt: skip


@pytest.fixture(scope="module")
def module() -> ModuleType:
    kernels = [*PRODUCTS.values(), READ_EARLY, CHAIN, *(kernel for kernel, _ in ERRORS)]
    return module_of([*kernels, *STORES.values(), *LOADS.values()])


def descriptor(start: int, leading: int, stride: int, swizzle: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | LAYOUT_CODES[swizzle] << 62


def swizzled(offset: int, swizzle: int) -> int:
    return offset ^ ((offset >> 7) & (swizzle // 16 - 1)) << 4 if swizzle else offset


def place(image: Tensor, values: Tensor, start: int, swizzle: int, mn_major: bool) -> int:
    """Lays an operand (rows, K) out in the bytes of shared memory; returns its descriptor."""
    size = values.element_size()
    data = values.contiguous().view(torch.uint8).view(values.shape[0], values.shape[1], size)
    if mn_major:  # 64 rows in 128 bytes for each k, groups of 8 k, then the next 64 rows
        leading, stride = 2048, 1024
    else:  # the next 16 bytes of K (without swizzle), the next 8 rows
        leading, stride = (2048, 128) if swizzle == 0 else (16, 8 * swizzle)
    for row in range(values.shape[0]):
        for k in range(values.shape[1]):
            if mn_major:
                at = row // 64 * leading + k // 8 * stride + k % 8 * 128 + row % 64 * size
            elif swizzle == 0:
                at = row // 8 * stride + k * size // 16 * leading + row % 8 * 16 + k * size % 16
            else:
                at = row // 8 * stride + row % 8 * swizzle + k * size
            at = swizzled(start + at, swizzle)
            image[at : at + size] = data[row, k]
    return descriptor(start, leading, stride, swizzle)


def run_product(runner: Runner, kernel: Kernel, a: Tensor, b: Tensor, swizzle: int = 128, mn_major: str = "") -> Tensor:
    """The accumulators as a (64, N) matrix."""
    columns = b.shape[0]
    image = torch.zeros(IMAGE_BYTES + 16, dtype=torch.uint8)
    a_bits = place(image, a, 0, swizzle, "a" in mn_major)
    b_bits = place(image, b, B_AT, swizzle, "b" in mn_major)
    sums = runner.buffer("sums", torch.full((128, columns // 2), float("nan")), writable=True)
    image[IMAGE_BYTES : IMAGE_BYTES + 8] = torch.tensor([sums.data_ptr()]).view(torch.uint8)
    placed = runner.buffer("image", image)
    runner.last = runner.run(kernel, placed.data_ptr(), a_bits, b_bits)
    matrix = torch.empty(ROWS, columns)
    for thread in range(128):
        for i in range(columns // 2):
            row = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
            matrix[row, i // 4 * 8 + thread % 4 * 2 + i % 2] = sums[thread, i]
    return matrix


def operands(columns: int, e4m3: bool) -> tuple[Tensor, Tensor]:
    dtype, depth = (torch.float8_e4m3fn, 32) if e4m3 else (torch.bfloat16, 16)
    return torch.randn(ROWS, depth).to(dtype), torch.randn(columns, depth).to(dtype)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize(
    ("name", "columns", "sign", "before", "swizzle", "mn_major"),
    [
        ("bf16_n8", 8, 1, 0, 128, ""),
        ("bf16_n64", 64, 1, 0, 128, ""),
        ("bf16_n64", 64, 1, 0, 64, ""),
        ("bf16_n64", 64, 1, 0, 32, ""),
        ("bf16_n64", 64, 1, 0, 0, ""),
        ("bf16_n256", 256, 1, 0, 128, ""),
        ("bf16_mn_major", 128, 1, 0, 128, "ab"),
        ("bf16_b_mn_major", 64, 1, 0, 128, "b"),
        ("bf16_negated", 64, -1, 2, 128, ""),
        ("bf16_scale_d_0", 64, 1, 0, 128, ""),
        ("e4m3_n64", 64, 1, 0, 128, ""),
        ("e4m3_n64", 64, 1, 0, 64, ""),
        ("e4m3_n192", 192, 1, 1, 128, ""),
    ],
)
def test_product(
    module: ModuleType, lazy: bool, name: str, columns: int, sign: int, before: float, swizzle: int, mn_major: str
) -> None:
    a, b = operands(columns, name.startswith("e4m3"))
    ours = run_product(Runner(module, lazy), PRODUCTS[name], a, b, swizzle, mn_major)
    exact = before + sign * a.double() @ b.double().T
    assert float((ours - exact).abs().max()) <= 1e-5


def test_accumulators_hold_nan_until_they_are_waited_for(module: ModuleType) -> None:
    a, b = operands(8, False)
    eager, lazy = Runner(module, False), Runner(module, True)
    for runner, is_nan in ((eager, False), (lazy, True)):
        run_product(runner, READ_EARLY, a, b)
        assert runner.last.view(torch.float32).isnan().all().item() is is_nan
    ours = run_product(lazy, CHAIN, a, b)
    assert float((ours - 2 * (a.double() @ b.double().T)).abs().max()) <= 1e-5
    assert lazy.last.view(torch.float32).isnan().all()


@pytest.mark.parametrize(("kernel", "message"), ERRORS, ids=lambda value: getattr(value, "name", ""))
def test_misuse_is_an_error(module: ModuleType, kernel: Kernel, message: str) -> None:
    runner = Runner(module, lazy=True)
    with pytest.raises(RuntimeError, match=message):
        run_product(runner, kernel, *operands(8, False))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (128, "within the repeat of its swizzle"),
        (0x3FFF0, "out of bounds|within the repeat"),
        (1 << 50, "a base offset"),
        (1 << 53, "unknown bits"),
    ],
)
def test_bad_descriptors(module: ModuleType, start: int, message: str) -> None:
    runner = Runner(module, lazy=False)
    image = runner.buffer("image", torch.zeros(IMAGE_BYTES + 16, dtype=torch.uint8))
    good = descriptor(0, 16, 1024, 128)
    bad = good | start if start >= 1 << 50 else descriptor(start, 16, 1024, 128)
    with pytest.raises(RuntimeError, match=message):
        runner.run(PRODUCTS["bf16_n8"], image.data_ptr(), good, bad)


def word(j: int, row: int, column: int, transposed: bool) -> int:
    """The element that VALUES puts into row `row`, column `column` of matrix j."""
    if transposed:
        row, column = column, row
    return 2 * (row * 4 + column // 2) + column % 2 + 100 * j


@pytest.mark.parametrize(("name", "at"), STORES)
def test_stmatrix(module: ModuleType, name: str, at: int) -> None:
    elements = Runner(module, lazy=False).run(STORES[name, at]).view(torch.int16)
    transposed = MATRICES[name][2]
    assert elements.tolist() == [word(at, i // 8, i % 8, transposed) for i in range(64)]


@pytest.mark.parametrize(("name", "at"), LOADS)
def test_ldmatrix(module: ModuleType, name: str, at: int) -> None:
    """Row r of matrix j holds 8 (8 j + r) and the seven numbers behind it."""
    elements = Runner(module, lazy=False).run(LOADS[name, at]).view(torch.int16).view(32, 2)
    for lane in range(32):
        for half in range(2):
            row, column = lane // 4, lane % 4 * 2 + half
            if MATRICES[name][2]:
                row, column = column, row
            assert elements[lane, half] == 8 * (8 * at + row) + column


@pytest.mark.parametrize(
    "text",
    [
        f"wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16 {registers(6)}, %d1, %d2, %p, 1, 1, 0, 0",
        f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {registers(6)}, %d1, %d2, %p, 1, 1, 0, 0",
        f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {registers(4)}, %d1, %d2, %p, 1, 2, 0, 0",
        f"wgmma.mma_async.sync.aligned.m64n8k32.f32.bf16.bf16 {registers(4)}, %d1, %d2, %p, 1, 1, 0, 0",
        f"wgmma.mma_async.sync.aligned.m64n8k32.f32.e5m2.e4m3 {registers(4)}, %d1, %d2, %p, 1, 1",
        "wgmma.wait_group.sync.aligned %r1",
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r2, %r3}",
        "setmaxnreg.inc.sync.aligned.u32 %r1",
    ],
)
def test_the_unknown_is_refused(text: str) -> None:
    with pytest.raises(PtxError, match=r"line \d+: (unknown instruction|operands not understood)"):
        translate(HEADER + Kernel("unknown", text).ptx)
