"""Matrix products of E4M3 operands: activations in tiles of 1 x 128 by weights in tiles of 128 x 128.

K2.5 itself stores in FP8 and computes in bf16 (K2, section 2.4.3); these products are an option of the library.
Products of 128 of the reduction are summed in float32 and then scaled and added up, as on Hopper's tensor cores.
"""

import itertools

import torch
from torch import Tensor

from k25sys.errors import DTypeError, ShapeError, message
from k25sys.ops import checks, native
from k25sys.ops.quantize_fp8 import E4M3, NARROW, TILE, check_values, reference_dequantize_fp8

_ROWS, _ROWS_TRANSPOSED, _REDUCTION = 0, 1, 2  # enum Fp8Grouping in csrc/fp8_gemm/api.h
_ROW, _SQUARE = (1, TILE), (TILE, TILE)


def reference_fp8_gemm(
    a_MK: Tensor, a_scales: Tensor, b_NK: Tensor, b_scales: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """`fp8_gemm` in plain torch, summed in float64."""
    a = reference_dequantize_fp8(a_MK, a_scales, _ROW).double()
    return (a @ reference_dequantize_fp8(b_NK, b_scales, _SQUARE).double().T).to(out_dtype)


def reference_fp8_grouped_gemm(
    a_MK: Tensor, a_scales: Tensor, b_ENK: Tensor, b_scales: Tensor, offsets: Tensor, *,
    transpose_b: bool = False, out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """`fp8_grouped_gemm` in plain torch, summed in float64."""
    a = reference_dequantize_fp8(a_MK, a_scales, _ROW).double()
    b = reference_dequantize_fp8(b_ENK, b_scales, _SQUARE).double()
    b = b if transpose_b else b.transpose(1, 2)
    ends = offsets.tolist()
    groups = [a[begin:end] @ b[e] for e, (begin, end) in enumerate(itertools.pairwise(ends))]
    return torch.cat(groups).to(out_dtype) if groups else a.new_zeros((0, b.shape[2])).to(out_dtype)


def reference_fp8_grouped_gemm_wgrad(
    a_NM: Tensor, a_scales: Tensor, b_KM: Tensor, b_scales: Tensor, offsets: Tensor, *,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """`fp8_grouped_gemm_wgrad` in plain torch, summed in float64."""
    a, b = (reference_dequantize_fp8(v, s, _ROW).double() for v, s in ((a_NM, a_scales), (b_KM, b_scales)))
    ends = offsets.tolist()
    pairs = itertools.pairwise(ends)
    return torch.stack([a[:, begin:end] @ b[:, begin:end].T for begin, end in pairs]).to(out_dtype)


def fp8_gemm(
    a_MK: Tensor, a_scales: Tensor, b_NK: Tensor, b_scales: Tensor, *, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """a @ b^T of quantised operands.

    Args:
        a_MK, a_scales: float8_e4m3fn and its scales, from `quantize_fp8(a, (1, 128))`.
        b_NK, b_scales: from `quantize_fp8(b, (128, 128))`.
        out_dtype: bfloat16 or float32.

    Returns:
        (M, N) of `out_dtype`. Not differentiable.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; on CUDA, a K that is no multiple of 16.
    """
    return _call("fp8_gemm", a_MK, a_scales, b_NK, b_scales, None, _ROWS, out_dtype)


def fp8_grouped_gemm(
    a_MK: Tensor, a_scales: Tensor, b_ENK: Tensor, b_scales: Tensor, offsets: Tensor, *,
    transpose_b: bool = False, out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """Rows of each expert by that expert's weights: a grouped linear, or, transposed, its input gradient.

    Args:
        a_MK, a_scales: rows grouped by expert, in tiles of 1 x 128.
        b_ENK, b_scales: weights of each expert in tiles of 128 x 128; (E, K, N) with transpose_b.
        offsets: (E + 1,) int32: expert e has the rows offsets[e] to offsets[e + 1] (a DispatchPlan's offsets).
        out_dtype: bfloat16 or float32.

    Returns:
        (M, N) of `out_dtype`. Not differentiable.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; on CUDA, a K that is no multiple of 16.
        IndexError: on the CPU, offsets that do not rise from 0 to M.
    """
    grouping = _ROWS_TRANSPOSED if transpose_b else _ROWS
    return _call("fp8_grouped_gemm", a_MK, a_scales, b_ENK, b_scales, offsets, grouping, out_dtype)


def fp8_grouped_gemm_wgrad(
    a_NM: Tensor, a_scales: Tensor, b_KM: Tensor, b_scales: Tensor, offsets: Tensor, *,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """The weight gradient of each expert, a_NM[:, rows of e] @ b_KM[:, rows of e]^T.

    Args:
        a_NM, a_scales: the output's gradient, transposed, in tiles of 1 x 128 along the rows M
            (`quantize_fp8_both_ways`).
        b_KM, b_scales: the input, likewise.
        offsets: (E + 1,) int32, multiples of 128 (but for the last), so that no tile spans two experts.
        out_dtype: float32 or bfloat16.

    Returns:
        (E, N, K) of `out_dtype`. Not differentiable.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; on CUDA, an M that is no multiple of 16.
        IndexError: on the CPU, offsets that do not rise from 0 to M, or are no multiples of 128; on CUDA they trap.
    """
    return _call("fp8_grouped_gemm_wgrad", a_NM, a_scales, b_KM, b_scales, offsets, _REDUCTION, out_dtype)


def _call(
    op: str, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor | None, grouping: int,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if out_dtype not in NARROW:
        raise DTypeError(message(op, "out_dtype", out_dtype, "torch.bfloat16 or torch.float32"))
    _check(op, a, a_scales, b, b_scales, offsets, grouping)
    try:
        return _OP(a, a_scales, b, b_scales, offsets, grouping, out_dtype == torch.bfloat16)
    except IndexError as error:
        raise IndexError(str(error).replace("fp8_gemm", op, 1)) from None


def _check(
    op: str, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor | None, grouping: int
) -> None:
    names = ("a_NM", "b_KM") if grouping == _REDUCTION else ("a_MK", "b_NK" if offsets is None else "b_ENK")
    checks.tensor(op, names[0], a, (E4M3,), (None, None), names[0][-2:])
    depth = a.shape[1]
    if grouping == _REDUCTION:
        checks.tensor(op, names[1], b, (E4M3,), (None, depth), "KM")
    elif offsets is None:
        checks.tensor(op, names[1], b, (E4M3,), (None, depth), "NK")
    else:
        axes = (None, depth, None) if grouping == _ROWS_TRANSPOSED else (None, None, depth)
        checks.tensor(op, names[1], b, (E4M3,), axes, "EKN" if grouping == _ROWS_TRANSPOSED else "ENK")
    check_values(op, names[0], a, a_scales, "a_scales", _ROW)
    check_values(op, names[1], b, b_scales, "b_scales", _ROW if grouping == _REDUCTION else _SQUARE)
    if offsets is not None:
        count = None if grouping == _REDUCTION else b.shape[0] + 1
        checks.tensor(op, "offsets", offsets, checks.INT32, (count,), "N", "one more than experts")
        checks.integer(op, "offsets (length)", offsets.shape[0], 1, 2**20)
    checks.same_device(op, names[0], a, {names[1]: b, "offsets": offsets})
    _check_for_cuda(op, a, grouping)


def _check_for_cuda(op: str, a: Tensor, grouping: int) -> None:
    if checks.on_cuda(a) and a.shape[1] % 16:
        name = "M (columns of a_NM)" if grouping == _REDUCTION else "K (columns of a_MK)"
        hint = "pad it with zeros: the tensor cores' copies move rows of 16 bytes"
        raise ShapeError(message(op, name, a.shape[1], "a multiple of 16 on CUDA", hint))


def _out_shape(a: Tensor, b: Tensor, offsets: Tensor | None, grouping: int) -> tuple[int, ...]:
    if grouping == _REDUCTION and offsets is not None:
        return offsets.shape[0] - 1, a.shape[0], b.shape[0]
    return a.shape[0], b.shape[-1] if grouping == _ROWS_TRANSPOSED else b.shape[-2]


def _fake(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor | None, grouping: int, to_bf16: bool
) -> Tensor:
    _check("fp8_gemm", a, a_scales, b, b_scales, offsets, grouping)
    return a.new_empty(_out_shape(a, b, offsets, grouping), dtype=torch.bfloat16 if to_bf16 else torch.float32)


def _kernel(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, offsets: Tensor | None, grouping: int, to_bf16: bool
) -> Tensor:
    out = _fake(a, a_scales, b, b_scales, offsets, grouping, to_bf16)
    num_groups = 1 if offsets is None else offsets.shape[0] - 1
    a, a_scales, b, b_scales = (value.contiguous() for value in (a, a_scales, b, b_scales))
    offsets = None if offsets is None else offsets.contiguous()
    sizes = (a.shape[0], out.shape[-1], a.shape[1], num_groups)
    if checks.on_cuda(a):
        if not a.shape[1]:
            return out.zero_()
        if grouping == _ROWS_TRANSPOSED:
            b, b_scales = torch.ops.k25.transpose_fp8.default(b, b_scales)
            grouping = _ROWS
    elif offsets is None:
        offsets = torch.tensor([0, a.shape[0]], dtype=torch.int32)
    addresses = [native.address(v) for v in (a, a_scales, b, b_scales, offsets, out)]
    native.kernels("fp8_gemm", a.device).fp8_gemm(
        *addresses, *sizes, grouping, native.DTYPE_CODES[out.dtype], native.where(a.device)
    )
    return out


_OP = native.define(
    "fp8_gemm(Tensor a, Tensor a_scales, Tensor b, Tensor b_scales, Tensor? offsets, int grouping, bool to_bf16)"
    " -> Tensor",
    _kernel, _fake,
)  # fmt: skip
