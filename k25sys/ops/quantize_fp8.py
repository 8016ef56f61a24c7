"""E4M3 values with one float32 scale a tile: K2.5's storage of activations (1 x 128), and weights of FP8 GEMMs."""

from typing import Any

import torch
from torch import Tensor

from k25sys.errors import ArgumentValueError, DTypeError, message
from k25sys.ops import checks, native

TILE = 128
E4M3 = torch.float8_e4m3fn
NARROW = (torch.float32, torch.bfloat16)
_LARGEST = 448.0
Block = tuple[int, int]


def tiles(size: int) -> int:
    """Tiles of 128 that cover `size`; the last may be ragged."""
    return -(-size // TILE)


def scales_shape(shape: torch.Size | tuple[int, ...], block: Block) -> tuple[int, ...]:
    """The shape of the scales beside values of `shape` (..., M, K)."""
    *batch, rows, cols = shape
    return (*batch, rows if block[0] == 1 else tiles(rows), tiles(cols))


def _per_element(scales: Tensor, shape: torch.Size, block: Block) -> Tensor:
    wide = scales.repeat_interleave(TILE, -1)[..., : shape[-1]]
    return wide if block[0] == 1 else wide.repeat_interleave(TILE, -2)[..., : shape[-2], :]


def reference_quantize_fp8(x: Tensor, block: Block, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """`quantize_fp8` in plain torch."""
    x = x.float()
    *batch, rows, cols = x.shape
    height = block[0]
    finite = torch.where(x.isfinite(), x.abs(), 0.0)
    padded = torch.nn.functional.pad(finite, (0, -cols % TILE, 0, -rows % height))
    largest = padded.reshape(*batch, -(-rows // height), height, tiles(cols), TILE).amax((-3, -1))
    scales = largest / _LARGEST
    if power_of_two:
        fraction, exponent = torch.frexp(scales.double())
        exponent = torch.where(fraction == 0.5, exponent - 1, exponent).clamp_min(-126)
        scales = torch.where(scales > 0, torch.ldexp(torch.ones_like(fraction), exponent).float(), 0.0)
    divisors = _per_element(torch.where(scales > 0, scales, torch.inf), x.shape, block)
    values = torch.where(x.isfinite(), (x / divisors).clamp(-_LARGEST, _LARGEST), torch.nan)
    return values.to(E4M3), scales


def reference_dequantize_fp8(
    values: Tensor, scales: Tensor, block: Block, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`dequantize_fp8` in plain torch."""
    return (values.float() * _per_element(scales, values.shape, block)).to(dtype)


def quantize_fp8(x: Tensor, block: Block, *, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Rounds x to E4M3 with a scale for each tile.

    Args:
        x: (M, K) or (B, M, K) float32 or bfloat16.
        block: (1, 128), or (128, 128). Last tiles may be ragged.
        power_of_two: round each scale up to a power of two.

    Returns:
        values of x's shape, float8_e4m3fn, and scales float32, (..., M, tiles of K) or (..., tiles of M, tiles of K):
        scale = amax / 448 over the finite numbers of the tile. NaN and infinities become NaN; a tile of zeros has scale
        0. Not differentiable.

    Raises:
        TypeError, ValueError: a wrong dtype, rank, device or block.
    """
    _check_block("quantize_fp8", block)
    checks.flag("quantize_fp8", "power_of_two", power_of_two)
    _check_input("quantize_fp8", x)
    return _QUANTIZE(x, block[0] != 1, power_of_two, False)[:2]


def quantize_fp8_both_ways(
    x: Tensor, block: Block = (1, TILE), *, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_fp8` of x, and of x^T in tiles of 1 x 128 along M, from one read of x: what a product and its weight
    gradient multiply.

    Args:
        x, block, power_of_two: as in `quantize_fp8`; `block` is that of x itself.

    Returns:
        values and scales as `quantize_fp8`; then values (..., K, M) and scales (..., K, tiles of M) of x^T.

    Raises:
        TypeError, ValueError: as `quantize_fp8`.
    """
    _check_block("quantize_fp8_both_ways", block)
    checks.flag("quantize_fp8_both_ways", "power_of_two", power_of_two)
    _check_input("quantize_fp8_both_ways", x)
    return _QUANTIZE(x, block[0] != 1, power_of_two, True)


def dequantize_fp8(values: Tensor, scales: Tensor, block: Block, dtype: torch.dtype = torch.float32) -> Tensor:
    """values times their tile's scale.

    Args:
        values, scales, block: as `quantize_fp8` returns and takes them.
        dtype: float32 or bfloat16 of the result.

    Returns:
        (M, K) or (B, M, K) of `dtype`. Not differentiable.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or block.
    """
    _check_block("dequantize_fp8", block)
    if dtype not in NARROW:
        raise DTypeError(message("dequantize_fp8", "dtype", dtype, "torch.float32 or torch.bfloat16"))
    return _DEQUANTIZE(values, scales, block[0] != 1, dtype == torch.bfloat16)


def reference_transpose_fp8(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """`transpose_fp8` in plain torch."""
    return values.mT.contiguous(), scales.mT.contiguous()


def transpose_fp8(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The transpose of what `quantize_fp8(x, (128, 128))` gave, which is what it gives for the transpose of x.

    On CUDA `fp8_grouped_gemm(transpose_b=True)` does this in each call; keep the result, and pass it without
    `transpose_b`, where weights are multiplied more than once before they change.

    Args:
        values: (M, K) or (B, M, K) float8_e4m3fn.
        scales: float32, one for each tile of 128 x 128.

    Returns:
        values (..., K, M) and scales (..., tiles of K, tiles of M). Not differentiable.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device.
    """
    check_values("transpose_fp8", "values", values, scales, "scales", (TILE, TILE))
    return _TRANSPOSE(values, scales)


def check_values(op: str, name: str, values: Tensor, scales: Tensor, scales_name: str, block: Block) -> None:
    """Raises unless `values` (..., M, K) are E4M3 and `scales` belong to them."""
    rank = values.dim() if isinstance(values, Tensor) and values.dim() == 3 else 2
    checks.tensor(op, name, values, (E4M3,), (None,) * rank, "BMK"[-rank:])
    shape = scales_shape(values.shape, block)
    hint = f"one for each tile of {block[0]} x {block[1]} of {name}"
    checks.tensor(op, scales_name, scales, (torch.float32,), shape, "BMK"[-rank:], hint)
    checks.same_device(op, name, values, {scales_name: scales})


def _check_block(op: str, block: Any) -> None:
    if not (isinstance(block, tuple) and block in ((1, TILE), (TILE, TILE))):
        raise ArgumentValueError(message(op, "block", repr(block), "(1, 128) or (128, 128)"))


def _check_input(op: str, x: Tensor) -> None:
    rank = x.dim() if isinstance(x, Tensor) and x.dim() == 3 else 2
    checks.tensor(op, "x", x, NARROW, (None,) * rank, "BMK"[-rank:])
    checks.same_device(op, "x", x, {})
    checks.row_count(op, "x", x.shape[:-1].numel(), 1)


def _quantize_fake(
    x: Tensor, square: bool, power_of_two: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_input("quantize_fp8", x)
    values = x.new_empty(x.shape, dtype=E4M3)
    scales = x.new_empty(scales_shape(x.shape, (TILE if square else 1, TILE)), dtype=torch.float32)
    shape = (*x.shape[:-2], x.shape[-1], x.shape[-2])
    if not transposed:
        return values, scales, x.new_empty((0,), dtype=E4M3), x.new_empty((0,), dtype=torch.float32)
    return (
        values, scales, x.new_empty(shape, dtype=E4M3), x.new_empty(scales_shape(shape, (1, TILE)), dtype=torch.float32)
    )  # fmt: skip


def _quantize_kernel(
    x: Tensor, square: bool, power_of_two: bool, transposed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, scales, values_t, scales_t = _quantize_fake(x, square, power_of_two, transposed)
    x = x.contiguous()
    batch = x.shape[0] if x.dim() == 3 else 1
    native.kernels("quantize_fp8", x.device).quantize_fp8(
        x.data_ptr(), values.data_ptr(), scales.data_ptr(), values_t.data_ptr() if transposed else 0,
        scales_t.data_ptr() if transposed else 0, batch, x.shape[-2], x.shape[-1], square, power_of_two,
        native.DTYPE_CODES[x.dtype], native.where(x.device),
    )  # fmt: skip
    return values, scales, values_t, scales_t


def _dequantize_fake(values: Tensor, scales: Tensor, square: bool, to_bf16: bool) -> Tensor:
    check_values("dequantize_fp8", "values", values, scales, "scales", (TILE if square else 1, TILE))
    return values.new_empty(values.shape, dtype=torch.bfloat16 if to_bf16 else torch.float32)


def _dequantize_kernel(values: Tensor, scales: Tensor, square: bool, to_bf16: bool) -> Tensor:
    out = _dequantize_fake(values, scales, square, to_bf16)
    values, scales = values.contiguous(), scales.contiguous()
    batch = values.shape[0] if values.dim() == 3 else 1
    native.kernels("dequantize_fp8", out.device).dequantize_fp8(
        values.data_ptr(), scales.data_ptr(), out.data_ptr(), batch, out.shape[-2], out.shape[-1], square,
        native.DTYPE_CODES[out.dtype], native.where(out.device),
    )  # fmt: skip
    return out


def _transpose_fake(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    check_values("transpose_fp8", "values", values, scales, "scales", (TILE, TILE))
    return values.new_empty(values.mT.shape), scales.new_empty(scales.mT.shape)


def _transpose_kernel(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    values_t, scales_t = _transpose_fake(values, scales)
    values, scales = values.contiguous(), scales.contiguous()
    batch = values.shape[0] if values.dim() == 3 else 1
    native.kernels("transpose_fp8", values.device).transpose_fp8(
        values.data_ptr(), scales.data_ptr(), values_t.data_ptr(), scales_t.data_ptr(), batch, *values.shape[-2:],
        native.where(values.device),
    )  # fmt: skip
    return values_t, scales_t


_QUANTIZE = native.define(
    "quantize_fp8(Tensor x, bool square, bool power_of_two, bool transposed) -> (Tensor, Tensor, Tensor, Tensor)",
    _quantize_kernel, _quantize_fake,
)  # fmt: skip
_DEQUANTIZE = native.define(
    "dequantize_fp8(Tensor values, Tensor scales, bool square, bool to_bf16) -> Tensor",
    _dequantize_kernel, _dequantize_fake,
)  # fmt: skip
_TRANSPOSE = native.define(
    "transpose_fp8(Tensor values, Tensor scales) -> (Tensor, Tensor)", _transpose_kernel, _transpose_fake
)
