"""Calibration: kernels that Triton compiles for sm_90, which others run on GPUs, give the right result here too.

So the executor's TMA, mbarriers and wgmma do not mean only what our own kernels take them to mean.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.cuda_on_cpu import build
from tests.cuda_on_cpu.ptx_kernels import aligned
from tests.ops.generators import relative_error

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="triton is not installed (pip install triton==3.9.0, 1 GB): it compiles the kernels of this calibration",
    ),
]

DTYPES = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn, "fp32": torch.float32}
TENSOR_MAP_TYPES = {1: 0, 2: 9, 4: 7}  # CUtensorMapDataType for the bytes of an element: UINT8, BFLOAT16, FLOAT32
M, N, K = 200, 264, 336  # none is a multiple of its tile


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One of the layouts that csrc/gemm uses; `transposed` operands are MN-major."""

    name: str
    dtype: str
    out_dtype: str
    tile: tuple[int, int, int]
    a_is_transposed: bool = False
    b_is_transposed: bool = False
    num_warps: int = 4


LAYOUTS = (
    Layout(name="e4m3, both K-major", dtype="fp8e4nv", out_dtype="fp32", tile=(64, 128, 128)),
    Layout(name="e4m3, two warpgroups", dtype="fp8e4nv", out_dtype="bf16", tile=(128, 128, 128), num_warps=8),
    Layout(name="bf16, both K-major", dtype="bf16", out_dtype="bf16", tile=(64, 128, 64)),
    Layout(name="bf16, B MN-major", dtype="bf16", out_dtype="fp32", tile=(64, 256, 64), b_is_transposed=True),
    Layout(
        name="bf16, both MN-major", dtype="bf16", out_dtype="fp32", tile=(64, 128, 64),
        a_is_transposed=True, b_is_transposed=True,
    ),
    Layout(
        name="bf16, both MN-major, two warpgroups", dtype="bf16", out_dtype="bf16", tile=(128, 128, 64),
        a_is_transposed=True, b_is_transposed=True, num_warps=8,
    ),
)  # fmt: skip


def with_fences(ptx: str) -> str:
    """The executor asks for a fence behind the initialization of mbarriers, which Triton leaves out."""
    fenced, count = re.subn(r"(mbarrier\.init\.[^;]*;)", r"\1 fence.mbarrier_init.release.cluster;", ptx)
    assert count
    return fenced


def descriptor(tensor_map: Callable[..., bytes], tensor: Tensor, box: tuple[int, int], swizzle: int) -> list[bytes]:
    """A tensor descriptor as Triton passes it: the map, then sizes and strides."""
    rows, columns = tensor.shape
    pitch = columns * tensor.element_size()
    kind = TENSOR_MAP_TYPES[tensor.element_size()]
    made = tensor_map(tensor.data_ptr(), kind, [columns, rows], [pitch], [box[1], box[0]], swizzle)
    sizes = [size.to_bytes(4, "little") for size in (rows, columns)]
    return [made, *sizes, *(stride.to_bytes(8, "little") for stride in (columns, 1))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_triton_product(layout: Layout) -> None:
    from tests.cuda_on_cpu.triton_product import compiled_product

    kernel = compiled_product(
        layout.dtype, layout.out_dtype, layout.tile, layout.a_is_transposed, layout.b_is_transposed, layout.num_warps
    )
    opcodes = (
        "wgmma.mma_async",
        "mbarrier.try_wait",
        "cp.async.bulk.tensor.2d.shared",
        "cp.async.bulk.tensor.2d.global",
    )
    assert all(opcode in kernel.ptx for opcode in opcodes), "Triton compiled the product to something else"
    assert set(kernel.swizzles) == {3}, "not all tiles have 128-byte swizzle"
    module = build.kernels_module(with_fences(kernel.ptx))
    generator = torch.Generator().manual_seed(0)
    a = torch.randn((K, M) if layout.a_is_transposed else (M, K), generator=generator).to(DTYPES[layout.dtype])
    b = torch.randn((K, N) if layout.b_is_transposed else (N, K), generator=generator).to(DTYPES[layout.dtype])
    left, right = a.double(), b.double()
    exact = (left.T if layout.a_is_transposed else left) @ (right if layout.b_is_transposed else right.T)
    row_tiles, column_tiles = -(-M // layout.tile[0]), -(-N // layout.tile[1])
    for order, lazy in (("in_order", False), ("random", True), ("reverse", True)):
        module.set_options(order, 1, "ptx", lazy)
        module.clear_buffers()
        out = aligned(torch.full((M, N), float("nan"), dtype=DTYPES[layout.out_dtype]))
        placed = {"a": aligned(a), "b": aligned(b), "out": out}
        parameters = []
        for (name, tensor), box, swizzle in zip(placed.items(), kernel.boxes, kernel.swizzles, strict=True):
            module.register_buffer(name, tensor.data_ptr(), tensor.nbytes, name == "out")
            parameters += descriptor(module.tensor_map, tensor, box, swizzle)
        parameters += [number.to_bytes(4, "little") for number in (column_tiles, K)]
        parameters += [bytes(8), bytes(8)]  # Triton's scratch memory: none
        module.run_kernel("product", row_tiles * column_tiles, kernel.num_threads, kernel.shared_bytes, parameters)
        assert relative_error(out, exact) <= (2e-3 if layout.out_dtype == "bf16" else 1e-6), (order, lazy)
