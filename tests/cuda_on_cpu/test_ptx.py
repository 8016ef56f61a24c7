"""The meaning of single PTX instructions where it is easy to get wrong, and that the unknown is refused."""

import struct
from types import ModuleType

import pytest
import torch

from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.ptx.parse import PtxError
from tests.cuda_on_cpu.ptx.translate import translate

NAN, ONE = 0x7FC00000, 0x3F800000
M1 = 2**32 - 1
MIN = 2**31


def f32(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


# (instruction on %a, %b, %c (32 bits) or %A, %B, %C (64 bits) that writes %d or %D, inputs, expected)
CASES = [
    ("add.s32 %d, %a, %b", (M1, 2), 1),
    ("sub.s32 %d, %a, %b", (0, 1), M1),
    ("mul.lo.s32 %d, %a, %b", (MIN, 3), MIN),
    ("mul.lo.u32 %d, %a, %b", (M1, M1), 1),
    ("mul.hi.s32 %d, %a, %b", (M1, 2), M1),
    ("mul.hi.u32 %d, %a, %b", (M1, 2), 1),
    ("mul.wide.s32 %D, %a, %b", (M1, 5), 2**64 - 5),
    ("mul.wide.u32 %D, %a, %b", (M1, M1), (2**32 - 1) ** 2),
    ("mad.lo.s32 %d, %a, %b, %c", (M1, 4, 3), M1),
    ("mad.wide.s32 %D, %a, %b, %C", (M1, 5, 7), 2),
    ("div.s32 %d, %a, %b", (2**32 - 7, 2), 2**32 - 3),
    ("div.s32 %d, %a, %b", (MIN, M1), MIN),
    ("div.u32 %d, %a, %b", (7, 0), M1),
    ("rem.s32 %d, %a, %b", (2**32 - 7, 2), M1),
    ("rem.u32 %d, %a, %b", (7, 0), 7),
    ("neg.s32 %d, %a", (MIN,), MIN),
    ("min.s32 %d, %a, %b", (M1, 1), M1),
    ("min.u32 %d, %a, %b", (M1, 1), 1),
    ("shl.b32 %d, %a, %b", (1, 32), 0),
    ("shl.b32 %d, %a, %b", (1, 31), MIN),
    ("shr.u32 %d, %a, %b", (M1, 33), 0),
    ("shr.s32 %d, %a, %b", (MIN, 40), M1),
    ("shr.s32 %d, %a, %b", (MIN, 1), 3 * 2**30),
    ("not.b32 %d, %a", (0,), M1),
    ("bfi.b32 %d, %a, %b, 8, 4", (0xF5, 0xFFFFFFFF), 0xFFFFF5FF),
    ("bfi.b32 %d, %a, %b, 40, 4", (0xF, 0x12), 0x12),
    ("bfi.b32 %d, %a, %b, 0, 32", (7, M1), 7),
    ("bfe.u32 %d, %a, 4, 8", (0xABCDE,), 0xCD),
    ("bfe.u32 %d, %a, 28, 8", (M1,), 0xF),
    ("bfe.u32 %d, %a, 40, 8", (M1,), 0),
    ("bfe.u32 %d, %a, 0, 0", (M1,), 0),
    ("bfe.s32 %d, %a, 4, 4", (0x80,), M1 - 7),
    ("bfe.s32 %d, %a, 40, 8", (MIN,), M1),
    ("bfe.s32 %d, %a, 0, 256", (M1,), 0),
    ("popc.b32 %d, %a", (0xF0F,), 8),
    ("prmt.b32 %d, %a, %b, 0x7240", (0x33221100, 0x77665544), 0x77224400),
    ("prmt.b32 %d, %a, %b, 0x9F80", (0x3322FF00, 0x87665544), 0xFFFF0000),
    ("cvt.s64.s32 %D, %a", (M1,), 2**64 - 1),
    ("cvt.u64.u32 %D, %a", (M1,), M1),
    ("cvt.u32.u64 %d, %A", (2**32 + 5,), 5),
    ("cvt.rn.f32.s32 %d, %a", (M1,), f32(-1.0)),
    ("cvt.rn.f32.u32 %d, %a", (2**24 + 1,), f32(2.0**24)),
    ("cvt.rzi.s32.f32 %d, %a", (f32(-2.9),), 2**32 - 2),
    ("cvt.rzi.s32.f32 %d, %a", (NAN,), 0),
    ("cvt.rzi.s32.f32 %d, %a", (f32(3e9),), 2**31 - 1),
    ("cvt.rzi.u32.f32 %d, %a", (f32(-3.0),), 0),
    ("cvt.rni.s32.f32 %d, %a", (f32(2.5),), 2),
    ("cvt.sat.f32.f32 %d, %a", (NAN,), 0),
    ("cvt.sat.f32.f32 %d, %a", (f32(7.0),), ONE),
    ("cvt.rn.bf16x2.f32 %d, %a, %b", (0x3F808000, 0x3F818000), 0x3F803F82),  # ties go to even
    ("cvt.rn.bf16x2.f32 %d, %a, %b", (NAN, 0x7F7FFFFF), 0x7FFF7F80),
    ("cvt.f64.f32 %D, %a", (f32(1.5),), 0x3FF8000000000000),
    ("fma.rn.f32 %d, %a, %b, %c", (0x3F800800, 0x3F800800, f32(-1.0)), 0x3A000400),
    ("fma.rm.f32 %d, %a, %b, %c", (ONE, ONE, 0x32000000), ONE),
    ("fma.rm.f32 %d, %a, %b, %c", (ONE, f32(-1.0), 0xB2000000), 0xBF800001),
    ("neg.f32 %d, %a", (0,), MIN),
    ("abs.f32 %d, %a", (0x80000000,), 0),
    ("min.f32 %d, %a, %b", (NAN, ONE), ONE),
    ("max.f32 %d, %a, %b", (0x80000000, 0), 0),
    ("min.f32 %d, %a, %b", (0, 0x80000000), 0x80000000),
    ("ex2.approx.ftz.f32 %d, %a", (f32(-149.0),), 0),
    ("ex2.approx.ftz.f32 %d, %a", (f32(3.0),), f32(8.0)),
    ("rcp.approx.ftz.f64 %D, %A", (0x4008000000000001,), 0x3FD5555500000000),  # 3 and a little
    ("cvt.rn.satfinite.e4m3x2.f32 %h, %a, %b;\n cvt.u32.u16 %d, %h", (f32(1e9), f32(-0.0009765625)), 0x7E80),  # a tie
    (
        "cvt.rn.satfinite.e4m3x2.f32 %h, %a, %b;\n cvt.u32.u16 %d, %h",
        (NAN, f32(17.0)),
        0x7F58,
    ),  # 17 lies between 16, 18
    ("rcp.approx.ftz.f64 %D, %A", (1,), 0x7FF0000000000000),
    ("setp.lt.s32 %p, %a, %b;\n selp.b32 %d, 1, 0, %p", (M1, 1), 1),
    ("setp.lt.u32 %p, %a, %b;\n selp.b32 %d, 1, 0, %p", (M1, 1), 0),
    ("setp.ne.f32 %p, %a, %b;\n selp.b32 %d, 1, 0, %p", (NAN, ONE), 0),
    ("setp.neu.f32 %p, %a, %b;\n selp.b32 %d, 1, 0, %p", (NAN, ONE), 1),
    ("setp.geu.f32 %p, %a, %b;\n selp.b32 %d, 1, 0, %p", (NAN, ONE), 1),
    ("setp.ge.f32 %p, %a, %b;\n selp.b32 %d, 1, 0, %p", (NAN, ONE), 0),
    ("setp.nan.f32 %p, %a, %a;\n selp.b32 %d, 1, 0, %p", (NAN,), 1),
    ("setp.eq.s32 %p, %a, 0;\n @!%p add.s32 %d, %a, 1", (4,), 5),
    ("mov.b64 %D, {%a, %b}", (1, 2), 2**33 + 1),
    ("mov.b64 {%c, %d}, %A", (7 * 2**32 + 9,), 7),
    ("mov.b32 %d, 0fBF800000", (), f32(-1.0)),
    ("mov.u32 %d, %tid.x", (), 0),
    # A label and a predicate that two scopes both declare.
    (
        "{\n .reg .pred done;\n loop:\n add.u32 %a, %a, 1;\n setp.ge.u32 done, %a, 3;\n @!done bra.uni loop;\n }\n "
        "{\n .reg .pred done;\n loop:\n add.u32 %b, %b, 1;\n setp.ge.u32 done, %b, 5;\n @!done bra.uni loop;\n }\n "
        "add.u32 %d, %a, %b",
        (0, 0),
        8,
    ),
    ("shfl.sync.bfly.b32 %d|%p, %a, 1, 31, 1", (5,), None),  # reads a lane outside the mask
]


def kernel_of(index: int, instruction: str) -> str:
    """Loads the inputs from parameters, runs the instruction and stores %d or %D as 64 bits."""
    moves = "\n".join(
        f" ld.param.b64 %{wide}, [case_{index}_param_{i + 1}];\n cvt.u32.u64 %{narrow}, %{wide};"
        for i, (wide, narrow) in enumerate((("A", "a"), ("B", "b"), ("C", "c")))
    )
    widen = "" if "%D" in instruction else " cvt.u64.u32 %D, %d;\n"
    parameters = ", ".join(f".param .b64 case_{index}_param_{i}" for i in range(4))
    return (
        f".visible .entry case_{index}({parameters})\n{{\n"
        f".reg .pred %p;\n .reg .b16 %h;\n .reg .b32 %a, %b, %c, %d;\n .reg .b64 %A, %B, %C, %D, %out;\n"
        f" ld.param.u64 %out, [case_{index}_param_0];\n{moves}\n {instruction};\n{widen}"
        f" st.global.u64 [%out], %D;\n ret;\n}}\n"
    )


HEADER = ".version 9.0\n.target sm_90a\n.address_size 64\n"


@pytest.fixture(scope="module")
def cases_module() -> ModuleType:
    return build.kernels_module(HEADER + "\n".join(kernel_of(i, case[0]) for i, case in enumerate(CASES)))


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{i}: {case[0]}" for i, case in enumerate(CASES)])
def test_instruction(cases_module: ModuleType, index: int) -> None:
    _, inputs, expected = CASES[index]
    out = torch.zeros(1, dtype=torch.int64)
    cases_module.clear_buffers()
    cases_module.register_buffer("out", out.data_ptr(), 8, True)
    values = [out.data_ptr(), *inputs, *[0] * (3 - len(inputs))]
    packed = [struct.pack("<Q", value) for value in values]
    if expected is None:
        with pytest.raises(RuntimeError, match=r"shfl.sync.bfly"):
            cases_module.run_kernel(f"case_{index}", 1, 32, 0, packed)
        return
    cases_module.run_kernel(f"case_{index}", 1, 1, 0, packed)
    assert hex(int(out[0]) % 2**64) == hex(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frob.s32 %a, %b, %c", "unknown instruction frob.s32"),
        ("add.sat.s32 %a, %b, %c", "unknown instruction add.sat.s32"),
        ("fma.rn.ftz.f32 %a, %b, %c, %d", "unknown instruction fma.rn.ftz.f32"),
        ("add.s32 %a, %b", "operands not understood"),
        ("mov.u32 %d, %clock", "operands not understood.*%clock"),
        ("bar.sync 0, 64, 1", "operands not understood"),
        ("ld.global.v4.u32 {%a, %b}, [%A]", "operands not understood"),
        (".shared .b32 x[4]", "unsupported|static shared"),
        ("call.uni (retval0), f, (param0)", "unknown instruction call.uni"),
    ],
)
def test_the_unknown_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(PtxError, match=rf"line \d+: .*({message})"):
        translate(HEADER + kernel_of(0, text))


def test_module_level_state_is_refused() -> None:
    for declaration in (".global .align 4 .b32 counter;", ".const .align 4 .b8 table[16];"):
        with pytest.raises(PtxError, match="unsupported declaration"):
            translate(HEADER + declaration + "\n" + kernel_of(0, "mov.u32 %d, 1"))


ERRORS = {
    "lane 1 waits at a barrier, lane 0 in a shuffle": (
        "setp.eq.u32 %p, %tid.x, 0;\n @!%p bar.sync 0;\n @%p shfl.sync.idx.b32 %d, %a, 0, 31, 3",
        r"deadlock in block 0: 1 threads \(first 1\) wait at bar.sync 0x00000000; 1 threads \(first 0\) wait at shfl",
    ),
    "the mask names a lane that has exited": (
        "setp.eq.u32 %p, %tid.x, 0;\n @%p ret;\n shfl.sync.idx.b32 %d, %a, 1, 31, 3",
        "names lane 0, which has exited",
    ),
    "two kinds of collective": (
        "setp.eq.u32 %p, %tid.x, 0;\n @%p bar.warp.sync 3;\n @!%p shfl.sync.idx.b32 %d, %a, 1, 31, 3",
        "while other lanes of the warp wait at bar.warp.sync",
    ),
    "past the end": ("st.global.u32 [%out+8], %a", "out of bounds: store of 4 bytes at PTX line .* at byte 8 of out"),
    "misaligned": ("ld.global.u32 %d, [%out+2]", "misaligned load of 4 bytes"),
    "unallocated shared memory": ("ld.shared.u32 %d, [%a+64]", "out of bounds: load of 4 bytes .* shared memory"),
    "two threads write one word": ("st.global.u32 [%out], %a", "race at byte 0 of out: written by thread 0"),
    "read-only load of written data": ("st.global.u32 [%out], %a;\n ld.global.nc.u32 %d, [%out]", "ld.global.nc"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_a_gpu_leaves_undefined_is_an_error(name: str) -> None:
    instruction, message = ERRORS[name]
    module = build.kernels_module(HEADER + kernel_of(0, instruction))
    out = torch.zeros(1, dtype=torch.int64)
    module.clear_buffers()
    module.register_buffer("out", out.data_ptr(), 8, True)
    parameters = [struct.pack("<Q", value) for value in (out.data_ptr(), 0, 0, 0)]
    with pytest.raises(RuntimeError, match=message):
        module.run_kernel("case_0", 1, 2, 64, parameters)
