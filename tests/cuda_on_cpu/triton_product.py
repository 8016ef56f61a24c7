"""A matrix product in Triton, compiled for sm_90 without a GPU: a third party's use of what our kernels use."""
# pyright: reportMissingImports=false

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

VERSION: str = triton.__version__


@triton.jit
def product(
    a,
    b,
    c,
    column_tiles,
    depth,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    A_IS_TRANSPOSED: tl.constexpr,
    B_IS_TRANSPOSED: tl.constexpr,
):
    """c = a @ b for tensor descriptors: a (M, K) or (K, M), b (N, K) or, transposed, (K, N)."""
    tile = tl.program_id(0)
    row = tile // column_tiles * TILE_M
    column = tile % column_tiles * TILE_N
    sums = tl.zeros((TILE_M, TILE_N), tl.float32)
    for k in range(0, depth, TILE_K):
        left = a.load([k, row]).T if A_IS_TRANSPOSED else a.load([row, k])
        right = b.load([k, column]) if B_IS_TRANSPOSED else b.load([column, k]).T
        sums = tl.dot(left, right, sums)
    c.store([row, column], sums.to(c.dtype))


@dataclass(frozen=True, kw_only=True)
class CompiledProduct:
    """The kernel's PTX, and what its launch needs: for a, b and c the box (outermost first) and the swizzle's code."""

    ptx: str
    num_threads: int
    shared_bytes: int
    boxes: tuple[tuple[int, int], ...]
    swizzles: tuple[int, ...]


def compiled_product(
    dtype: str, out_dtype: str, tile: tuple[int, int, int], a_is_transposed: bool, b_is_transposed: bool, num_warps: int
) -> CompiledProduct:
    """`tile` is (M, N, K); the types are Triton's: bf16, fp8e4nv, fp32."""
    tile_m, tile_n, tile_k = tile
    constants: dict[str, Any] = {
        "TILE_M": tile_m, "TILE_N": tile_n, "TILE_K": tile_k,
        "A_IS_TRANSPOSED": a_is_transposed, "B_IS_TRANSPOSED": b_is_transposed,
    }  # fmt: skip
    box_a = (tile_k, tile_m) if a_is_transposed else (tile_m, tile_k)
    box_b = (tile_k, tile_n) if b_is_transposed else (tile_n, tile_k)
    signature = {
        "a": f"tensordesc<{dtype}[{box_a[0]},{box_a[1]}]>",
        "b": f"tensordesc<{dtype}[{box_b[0]},{box_b[1]}]>",
        "c": f"tensordesc<{out_dtype}[{tile_m},{tile_n}]>",
        "column_tiles": "i32",
        "depth": "i32",
        **dict.fromkeys(constants, "constexpr"),
    }
    source = ASTSource(fn=product, signature=signature, constexprs=constants, attrs={})
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # .loc directives
        triton.knobs.compilation.always_compile = True
        kernel = triton.compile(
            source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "num_stages": 3}
        )
    descriptors = kernel.metadata.tensordesc_meta
    return CompiledProduct(
        ptx=kernel.asm["ptx"],
        num_threads=32 * num_warps,
        shared_bytes=kernel.metadata.shared,
        boxes=tuple(tuple(each["block_size"]) for each in descriptors),
        swizzles=tuple(each["swizzle"] for each in descriptors),
    )
