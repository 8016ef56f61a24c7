"""mbarriers, named barriers, bulk tensor copies and proxy fences: what they do, and what misuse is found."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu.ptx.parse import PtxError
from tests.cuda_on_cpu.ptx.translate import translate
from tests.cuda_on_cpu.ptx_kernels import HEADER, Kernel, Runner, module_of

BF16, FLOAT32 = 9, 7  # CUtensorMapDataType
SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # CUtensorMapSwizzle to bytes

# Thread 0 initializes the mbarrier at byte 32768, and all threads see it.
INIT = """mov.u32 %r2, tiles; add.s32 %r3, %r2, 32768; setp.eq.u32 %p, %r0, 0;
@%p mbarrier.init.shared::cta.b64 [%r3], {count}; @%p fence.mbarrier_init.release.cluster; bar.sync 0;"""
INIT_1, INIT_2 = INIT.format(count=1), INIT.format(count=2)
WAIT = "mbarrier.try_wait.parity.shared::cta.b64 %q, [%r3], 0;"
LOAD_2D = "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
LOAD = f"{LOAD_2D} [%r2], [%d4, {{%r4, %r5}}], [%r3];"
START = "cvt.u32.u64 %r4, %d1; cvt.u32.u64 %r5, %d2;"
EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], {bytes};"
STORE = "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%d4, {%r4, %r5}], [%r2];"
ADD = "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%d4, {%r4, %r5}], [%r2];"
# Each thread writes its number to its word of shared memory.
WRITE = "shl.b32 %r6, %r0, 2; add.s32 %r6, %r6, %r2; st.shared.u32 [%r6], %r0;"
WRITE_FLOAT = WRITE.replace("st.shared.u32 [%r6], %r0", "cvt.rn.f32.u32 %f0, %r0; st.shared.f32 [%r6], %f0")
READ = "shl.b32 %r6, %r0, 2; add.s32 %r6, %r6, %r2; ld.shared.u32 %r1, [%r6];"
TILES = "mov.u32 %r2, tiles; setp.eq.u32 %p, %r0, 0;"


def one_thread(text: str) -> str:
    """The statements, for thread 0 alone."""
    return " ".join(f"@%p {line.strip()};" for line in text.split(";") if line.strip())


BOX_64_BY_8 = 64 * 8 * 2

RUNS = [
    # The second arrival opens the phase; what was written before the arrivals is seen behind the wait.
    Kernel(
        "mbarrier_orders",
        INIT_2
        + """setp.lt.u32 %q, %r0, 2; shl.b32 %r6, %r0, 2; add.s32 %r6, %r6, %r2;
        @%q st.shared.u32 [%r6], %r0; @%q mbarrier.arrive.shared::cta.b64 _, [%r3];"""
        + WAIT
        + "ld.shared.u32 %r1, [%r2+4]",
    ),
    Kernel(
        "mbarrier_phase_before_the_first",
        INIT_1 + "mbarrier.try_wait.parity.shared::cta.b64 %q, [%r3], 1; selp.u32 %r1, 1, 0, %q",
    ),
    Kernel(
        "mbarrier_count_of_arrivals",
        INIT_2 + one_thread("mbarrier.arrive.shared::cta.b64 _, [%r3], 2") + WAIT + "mov.u32 %r1, 1",
    ),
    Kernel(
        "mbarrier_inval_and_init",
        INIT_1
        + one_thread(
            """mbarrier.inval.shared::cta.b64 [%r3]; st.shared.u64 [%r3], %d1;
            mbarrier.init.shared::cta.b64 [%r3], 1; mbarrier.arrive.shared::cta.b64 _, [%r3]"""
        )
        + "bar.sync 0;"
        + WAIT
        + "mov.u32 %r1, 1",
    ),
    # Warps 0 and 1 wait at barrier 3 for warps 2 and 3, which only arrive.
    Kernel(
        "named_barrier_orders",
        "mov.u32 %r2, tiles; setp.lt.u32 %p, %r0, 64; add.s32 %r6, %r0, -64; shl.b32 %r6, %r6, 2;"
        "add.s32 %r6, %r6, %r2; @!%p st.shared.u32 [%r6], %r0; @!%p bar.arrive 3, 128; shl.b32 %r6, %r0, 2;"
        "add.s32 %r6, %r6, %r2;"
        "mov.u32 %r1, 1; @%p bar.sync 3, 128; @%p ld.shared.u32 %r1, [%r6]",
    ),
    Kernel(
        "elect_one_lane",
        "setp.ge.u32 %q, %r0, 4; mov.u32 %r1, 7; @%q elect.sync %r2|%p, 0xfffffff0; @%q selp.u32 %r1, %r2, 99, %p;"
        "griddepcontrol.wait; griddepcontrol.launch_dependents",
        threads=32,
    ),
]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    return module_of([*RUNS, *COPIES.values(), *(kernel for kernel, _ in ERRORS)])


EXPECTED = {
    "mbarrier_orders": [1] * 128,
    "mbarrier_phase_before_the_first": [1] * 128,
    "mbarrier_count_of_arrivals": [1] * 128,
    "mbarrier_inval_and_init": [1] * 128,
    "named_barrier_orders": [*range(64, 128), *[1] * 64],
    "elect_one_lane": [*[7] * 4, 4, *[99] * 27],
}


@pytest.mark.parametrize("order", ["in_order", "reverse", "random"])
@pytest.mark.parametrize("kernel", RUNS, ids=lambda kernel: kernel.name)
def test_barriers(module: ModuleType, kernel: Kernel, order: str) -> None:
    assert Runner(module, lazy=True, order=order).run(kernel).tolist() == EXPECTED[kernel.name]


COPIES = {
    # A tile of 64 x 8 bf16 from a place, read as 32-bit words.
    "load": Kernel(
        "load",
        INIT_1 + START + one_thread(EXPECT.format(bytes=BOX_64_BY_8) + LOAD) + WAIT
        + "cvt.u32.u64 %r7, %d3; add.s32 %r2, %r2, %r7;" + READ,
    ),
    "load_3d": Kernel(
        "load_3d",
        INIT_1 + START + "mov.u32 %r7, 1;"
        + one_thread(
            EXPECT.format(bytes=BOX_64_BY_8)
            + """cp.async.bulk.tensor.3d.shared::cta.global.mbarrier::complete_tx::bytes
            [%r2], [%d4, {%r4, %r5, %r7}], [%r3]; prefetch.tensormap [%d4]"""
        )
        + WAIT + READ,
    ),
    "store": Kernel(
        "store",
        TILES + START + WRITE + "fence.proxy.async.shared::cta; bar.sync 0;"
        + one_thread(STORE + "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0") + "mov.u32 %r1, 1",
    ),
    "add": Kernel(
        "add",
        TILES + START + WRITE_FLOAT + "fence.proxy.async.shared::cta; bar.sync 0;"
        + one_thread(ADD + "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0") + "mov.u32 %r1, 1",
    ),
}  # fmt: skip


def swizzled(words: Tensor, swizzle: int, row_bytes: int) -> Tensor:
    """32-bit words of a tile's rows as they lie in shared memory."""
    offsets = torch.arange(words.numel()) * 4
    span = SWIZZLES[swizzle]
    moved = offsets ^ (((offsets >> 7) & (span // 16 - 1)) << 4) if span else offsets
    assert row_bytes in (span, 128)
    out = torch.empty_like(words.reshape(-1))
    out[moved // 4] = words.reshape(-1)
    return out


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize("start", [(0, 0), (3, 2), (-2, -3), (30, 17)])
def test_bulk_load(module: ModuleType, lazy: bool, swizzle: int, start: tuple[int, int]) -> None:
    """Also outside the tensor, where zeros are."""
    runner = Runner(module, lazy)
    source = runner.buffer("source", torch.randn(20, 40).bfloat16())
    columns = (SWIZZLES[swizzle] or 128) // 2
    box = (columns, BOX_64_BY_8 // 2 // columns)
    tensor_map = runner.module.tensor_map(source.data_ptr(), BF16, [40, 20], [80], box, swizzle)
    expected = torch.zeros(box[1], box[0], dtype=torch.bfloat16)
    for y in range(box[1]):
        for x in range(box[0]):
            if 0 <= start[0] + x < 40 and 0 <= start[1] + y < 20:
                expected[y, x] = source[start[1] + y, start[0] + x]
    place = swizzled(expected.view(torch.int32), swizzle, columns * 2)
    for part in (0, 512):
        got = runner.run(COPIES["load"], start[0] % 2**64, start[1] % 2**64, part, tensor_map=tensor_map)
        assert torch.equal(got, place[part // 4 : part // 4 + 128])


def test_bulk_load_of_three_dimensions(module: ModuleType) -> None:
    runner = Runner(module, lazy=True)
    source = runner.buffer("source", torch.randn(2, 10, 48).bfloat16())
    tensor_map = runner.module.tensor_map(source.data_ptr(), BF16, [48, 10, 2], [96, 960], (64, 8, 1), 0)
    got = runner.run(COPIES["load_3d"], 8, 4, tensor_map=tensor_map).view(torch.bfloat16).view(4, 64)
    expected = torch.zeros(4, 64, dtype=torch.bfloat16)
    expected[:, :40] = source[1, 4:8, 8:]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("lazy", [False, True])
def test_bulk_store_leaves_out_what_is_outside(module: ModuleType, lazy: bool) -> None:
    runner = Runner(module, lazy)
    target = runner.buffer("target", torch.full((6, 12), -1.0), writable=True)
    tensor_map = runner.module.tensor_map(target.data_ptr(), FLOAT32, [10, 5], [48], (8, 4), 1)
    runner.run(COPIES["store"], 4, 2, tensor_map=tensor_map)
    tile = torch.empty(128, dtype=torch.int32)
    tile[:] = torch.arange(128)
    rows = torch.arange(32).view(4, 8)
    offsets = rows * 4
    moved = offsets ^ (((offsets >> 7) & 1) << 4)
    expected = torch.full((6, 12), -1.0)
    expected[2:5, 4:10] = tile[moved // 4].view(torch.float32)[:3, :6]
    assert torch.equal(target.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("lazy", [False, True])
def test_bulk_add(module: ModuleType, lazy: bool) -> None:
    """Also that it leaves out what is outside, and that only f32 is added."""
    runner = Runner(module, lazy)
    start = torch.randn(6, 12)
    target = runner.buffer("target", start, writable=True)
    tensor_map = runner.module.tensor_map(target.data_ptr(), FLOAT32, [10, 5], [48], (8, 4), 0)
    runner.run(COPIES["add"], 4, 2, tensor_map=tensor_map)
    expected = start.clone()
    expected[2:5, 4:10] += torch.arange(32).view(4, 8)[:3, :6]
    assert torch.equal(target, expected)
    narrow = runner.buffer("narrow", torch.zeros(8, 64).bfloat16(), writable=True)
    tensor_map = runner.module.tensor_map(narrow.data_ptr(), BF16, [64, 8], [128], (64, 8), 0)
    with pytest.raises(RuntimeError, match="adds what is not f32"):
        runner.run(COPIES["add"], 0, 0, tensor_map=tensor_map)


LOADED = INIT_1 + START + one_thread(EXPECT.format(bytes=BOX_64_BY_8) + LOAD)
ERRORS = [
    (Kernel("no_init", TILES + "mbarrier.arrive.shared::cta.b64 _, [%r2]"), "mbarrier at byte 0 .* is not initialized"),
    (Kernel("misaligned", TILES + one_thread("mbarrier.init.shared::cta.b64 [%r2+4], 1")), "misaligned"),
    (Kernel("count_0", TILES + one_thread("mbarrier.init.shared::cta.b64 [%r2], 0")), "mbarrier.init: a count of 0"),
    (
        Kernel("init_twice", INIT_1 + one_thread("mbarrier.init.shared::cta.b64 [%r3], 1")),
        "is initialized already",
    ),
    (
        Kernel(
            "too_many_arrivals",
            INIT_1 + one_thread(EXPECT.format(bytes=16) + "mbarrier.arrive.shared::cta.b64 _, [%r3]"),
        ),
        "1 arrivals at the mbarrier at byte 32768 .* waits for 0 of 1",
    ),
    (
        Kernel(
            "init_not_seen",
            TILES + one_thread("mbarrier.init.shared::cta.b64 [%r2], 1") + "mbarrier.arrive.shared::cta.b64 _, [%r2]",
        ),
        "was initialized by thread 0 of the block with no barrier between",
    ),
    (Kernel("never_completes", INIT_1 + WAIT), r"deadlock.*phase 0 lacks 1 arrivals and 0 bytes"),
    (Kernel("parity_2", INIT_1 + "mbarrier.try_wait.parity.shared::cta.b64 %q, [%r3], 2"), "a parity of 2"),
    (Kernel("load_of_an_mbarrier", INIT_1 + "ld.shared.u32 %r1, [%r3]"), "where an mbarrier is"),
    (
        Kernel("too_many_bytes", INIT_1 + START + one_thread(EXPECT.format(bytes=2048) + LOAD) + WAIT),
        r"deadlock.*lacks 0 arrivals and 1024 bytes",
    ),
    (
        Kernel("wrong_phase", LOADED + "mbarrier.try_wait.parity.shared::cta.b64 %q, [%r3], 1;" + READ),
        "race at byte .*a bulk copy to shared memory",
    ),
    (Kernel("no_wait", LOADED + READ), "race at byte .*a bulk copy to shared memory"),
    (
        Kernel("too_few_bytes", INIT_1 + START + one_thread(EXPECT.format(bytes=512) + LOAD) + WAIT),
        r"deadlock|race",
    ),
    (
        Kernel("two_copies_and_bytes_of_one", INIT_1 + START + one_thread(EXPECT.format(bytes=BOX_64_BY_8) + LOAD * 2)
               + WAIT),
        "race at byte .*a bulk copy to shared memory",
    ),
    (
        Kernel("bytes_of_one", INIT_1 + START + one_thread(EXPECT.format(bytes=BOX_64_BY_8) + LOAD
               + "add.s32 %r2, %r2, 8192;" + LOAD) + WAIT + "mov.u32 %r1, 0;" + WAIT.replace(", 0;", ", 1;")),
        "completes in phase 1, and was issued in phase 0",
    ),
    (Kernel("in_flight_at_the_end", LOADED), "the block ended with 1 bulk copies in flight"),
    (
        Kernel(
            "mbarrier_not_fenced",
            TILES
            + "add.s32 %r3, %r2, 32768;"
            + START
            + one_thread("mbarrier.init.shared::cta.b64 [%r3], 1;" + EXPECT.format(bytes=BOX_64_BY_8) + LOAD),
        ),
        "without a fence.mbarrier_init",
    ),
    (
        Kernel("to_a_misaligned_tile", INIT_1 + START + "add.s32 %r2, %r2, 64;" + one_thread(LOAD)),
        "misaligned bulk tensor copy: byte 64",
    ),
    (
        Kernel("over_unordered_reads", INIT_1 + START + WRITE + one_thread(LOAD)),
        "is accessed by a bulk copy to shared memory|race at byte .* of shared memory: .*written by a bulk copy",
    ),
    (
        Kernel("store_not_fenced", TILES + START + WRITE + "bar.sync 0;" + one_thread(STORE)),
        "is accessed by a bulk store from shared memory at line .* without a fence.proxy.async by the writer",
    ),
    (
        Kernel(
            "fenced_by_the_reader", TILES + START + WRITE + "bar.sync 0;" + one_thread("fence.proxy.async;" + STORE)
        ),
        "without a fence.proxy.async by the writer",
    ),
    (
        Kernel("store_not_ordered", TILES + START + WRITE + "fence.proxy.async;" + one_thread(STORE)),
        "race at byte .* of shared memory: .*a bulk store from shared memory",
    ),
    (
        Kernel("store_without_wait", TILES + START + WRITE + "fence.proxy.async; bar.sync 0;"
               + one_thread(STORE + "cp.async.bulk.commit_group")),
        "ended while bulk stores may still read shared memory",
    ),
    (
        Kernel("write_under_a_store", TILES + START + WRITE + "fence.proxy.async; bar.sync 0;"
               + one_thread(STORE + "cp.async.bulk.commit_group") + WRITE),
        "race at byte .* of shared memory: .*a bulk store from shared memory",
    ),
    (Kernel("barrier_16", "bar.sync 16"), "there are barriers 0 to 15"),
    (Kernel("barrier_of_40", "bar.sync 1, 40"), "40 threads, of 128 and in whole warps"),
    (
        Kernel("two_counts", "setp.lt.u32 %p, %r0, 64; @%p bar.sync 1, 64; @!%p bar.sync 1, 128", threads=128),
        "bar.sync 1 for 128 threads, while others wait there for 64|deadlock",
    ),
    (
        Kernel("other_barrier", TILES + WRITE + "setp.lt.u32 %p, %r0, 64; @%p bar.sync 1, 64; @!%p bar.sync 2, 64;"
               "xor.b32 %r6, %r6, 256; ld.shared.u32 %r1, [%r6]"),
        "race at byte .* of shared memory",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kernel", "message"), ERRORS, ids=lambda value: getattr(value, "name", ""))
def test_misuse_is_an_error(module: ModuleType, kernel: Kernel, message: str) -> None:
    runner = Runner(module, lazy=True)
    source = runner.buffer("source", torch.zeros(64, 64).bfloat16(), writable=True)
    tensor_map = runner.module.tensor_map(source.data_ptr(), BF16, [64, 64], [128], (64, 8), 0)
    with pytest.raises(RuntimeError, match=message):
        runner.run(kernel, tensor_map=tensor_map)


def test_what_a_tensor_map_must_be(module: ModuleType) -> None:
    runner = Runner(module, lazy=False)
    with pytest.raises(RuntimeError, match="a tensor map that no cuTensorMapEncodeTiled wrote"):
        runner.run(COPIES["load"])
    source = runner.buffer("source", torch.zeros(64, 64).bfloat16())
    make, address = runner.module.tensor_map, source.data_ptr()
    for arguments in (
        (address + 8, BF16, [64, 64], [128], (64, 8), 0),  # address
        (address, BF16, [60, 64], [120], (32, 8), 0),  # stride
        (address, BF16, [64, 64], [128], (4, 8), 0),  # bytes of a box's row
        (address, BF16, [64, 64], [128], (128, 8), 3),  # wider than the swizzle
        (address, BF16, [64, 64], [128], (64, 257), 3),
    ):
        with pytest.raises(RuntimeError, match="cuTensorMapEncodeTiled: CUresult 1"):
            make(*arguments)
    larger = make(address, BF16, [64, 65], [128], (64, 8), 0)
    with pytest.raises(RuntimeError, match=r"out of bounds: load of 128 bytes .* of source"):
        runner.run(COPIES["load"], 0, 60, tensor_map=larger)
    flat = make(address, BF16, [64], [], (64,), 0)
    with pytest.raises(RuntimeError, match="2 coordinates and a tensor map of 1 dimensions"):
        runner.run(COPIES["load"], tensor_map=flat)


@pytest.mark.parametrize(
    "text",
    [
        "mbarrier.test_wait.parity.shared::cta.b64 %p, [%r1], 0",
        "mbarrier.arrive.shared::cta.b64 %d1, [%r1]",
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r1]",
        f"{LOAD_2D}.multicast::cluster [%r1], [%d1, {{%r1, %r2}}], [%r3], %r4",
        f"{LOAD_2D} [%r1], [%d1, {{%r1}}], [%r3]",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%d1], 16, [%r2]",
        "fence.proxy.async.global",
        "barrier.cluster.arrive",
    ],
)
def test_the_unknown_is_refused(text: str) -> None:
    with pytest.raises(PtxError, match=r"line \d+: (unknown instruction|operands not understood)"):
        translate(HEADER + Kernel("unknown", text).ptx)
