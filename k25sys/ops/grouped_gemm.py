"""Products of contiguous rows with the matrix of their expert: the GEMMs of a MoE layer, with their gradients."""

import itertools
from typing import Any

import torch
from torch import Tensor

from k25sys.errors import ArgumentValueError, DTypeError, LayoutError, ShapeError, message
from k25sys.ops import checks, native

_PAD_HINT = "pad it with zeros: rows of a matrix in the tensor cores' copies are multiples of 16 bytes"


def reference_grouped_gemm(a_MK: Tensor, b_ENK: Tensor, offsets: Tensor, *, transpose_b: bool = False) -> Tensor:
    """`grouped_gemm` in plain torch, one expert after the other."""
    b = b_ENK if transpose_b else b_ENK.transpose(1, 2)
    pairs = itertools.pairwise(offsets.tolist())
    return torch.cat([a_MK[begin:end] @ b[e] for e, (begin, end) in enumerate(pairs)])


def reference_grouped_gemm_wgrad(
    a_MN: Tensor, b_MK: Tensor, offsets: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`grouped_gemm_wgrad` in plain torch."""
    a, b = a_MN.to(out_dtype), b_MK.to(out_dtype)
    return torch.stack([a[begin:end].T @ b[begin:end] for begin, end in itertools.pairwise(offsets.tolist())])


def grouped_gemm(
    a_MK: Tensor, b_ENK: Tensor, offsets: Tensor, *, transpose_b: bool = False, main_grad: Tensor | None = None
) -> Tensor:
    """The rows offsets[e] to offsets[e + 1] of a, times the transpose of b[e].

    Args:
        a_MK: (M, K) float32, bfloat16 (accumulated in float32) or float64; on CUDA bfloat16, whose sizes K, and N with
            `transpose_b` or a gradient, are multiples of 8.
        b_ENK: (E, N, K), or (E, K, N) with `transpose_b`; dtype of a.
        offsets: (E + 1,) int32 that rise from 0 to M, on the device of a.
        transpose_b: b is (E, K, N): multiplies by b[e] itself, as the gradient of a does.
        main_grad: contiguous, of b's shape, its dtype or float32. The backward adds the gradient of b to it, and b's
            own .grad stays None (Megatron's gradient_accumulation_fusion).

    Returns:
        (M, N), dtype of a; differentiable in a and b, as often as wanted.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or layout.
        IndexError: on the CPU, offsets that do not rise from 0 to M; on CUDA they trap.
    """
    checks.flag("grouped_gemm", "transpose_b", transpose_b)
    _check(a_MK, b_ENK, offsets, transpose_b)
    if main_grad is not None:
        _check_buffer("grouped_gemm", "main_grad", main_grad, b_ENK, b_ENK.shape)
    return _OP(a_MK, b_ENK, offsets, transpose_b, main_grad)


def grouped_gemm_wgrad(
    a_MN: Tensor,
    b_MK: Tensor,
    offsets: Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    accumulate_into: Tensor | None = None,
) -> Tensor:
    """The transpose of a's rows of each expert, times b's: the gradient of `grouped_gemm`'s matrices.

    Args:
        a_MN: (M, N) float32, bfloat16 or float64: the gradient of a product. On CUDA bfloat16, N and K multiples of 8.
        b_MK: (M, K), dtype of a: what was multiplied.
        offsets: (E + 1,) int32 that rise from 0 to M.
        out_dtype: dtype of a (None), or float32.
        accumulate_into: contiguous (E, N, K) of one of these dtypes; the result is added to it, and rounded once.

    Returns:
        (E, N, K), zeros for an expert without rows, differentiable in a and b; or `accumulate_into`, which is not.

    Raises:
        TypeError, ValueError, IndexError: as `grouped_gemm`.
    """
    op = "grouped_gemm_wgrad"
    _check_wgrad(a_MN, b_MK, offsets)
    if out_dtype not in (None, a_MN.dtype, torch.float32) or (out_dtype and a_MN.dtype == torch.float64 != out_dtype):
        raise DTypeError(message(op, "out_dtype", out_dtype, f"None, {a_MN.dtype}, or torch.float32 for less"))
    if accumulate_into is None:
        return _WGRAD(a_MN, b_MK, offsets, out_dtype == torch.float32)
    if out_dtype not in (None, accumulate_into.dtype):
        raise DTypeError(message(op, "out_dtype", out_dtype, f"None beside accumulate_into ({accumulate_into.dtype})"))
    shape = (offsets.shape[0] - 1, a_MN.shape[1], b_MK.shape[1])
    _check_buffer(op, "accumulate_into", accumulate_into, a_MN, shape)
    _ACCUMULATE(a_MN, b_MK, offsets, accumulate_into)
    return accumulate_into


def _check(a: Tensor, b: Tensor, offsets: Tensor, transpose_b: bool) -> None:
    op = "grouped_gemm"
    checks.tensor(op, "a_MK", a, checks.FLOATS, (None, None), "MK")
    checks.row_count(op, "a_MK", a.shape[0], 1)
    axes, shape = ("EKN", (None, a.shape[1], None)) if transpose_b else ("ENK", (None, None, a.shape[1]))
    checks.tensor(op, "b_ENK", b, (a.dtype,), shape, axes)
    _check_offsets(op, "a_MK", a, offsets, b)
    checks.same_device(op, "a_MK", a, {"b_ENK": b, "offsets": offsets})
    widths = {"K (columns of a_MK)": a.shape[1]}
    if transpose_b:
        widths["N (columns of b_ENK)"] = b.shape[2]
    _check_for_cuda(op, "a_MK", a, widths)


def _check_wgrad(a: Tensor, b: Tensor, offsets: Tensor) -> None:
    op = "grouped_gemm_wgrad"
    checks.tensor(op, "a_MN", a, checks.FLOATS, (None, None), "MN")
    checks.row_count(op, "a_MN", a.shape[0], 1)
    checks.tensor(op, "b_MK", b, (a.dtype,), (a.shape[0], None), "MK")
    _check_offsets(op, "a_MN", a, offsets, None)
    checks.same_device(op, "a_MN", a, {"b_MK": b, "offsets": offsets})
    _check_for_cuda(op, "a_MN", a, {"N (columns of a_MN)": a.shape[1], "K (columns of b_MK)": b.shape[1]})


def _check_offsets(op: str, first: str, a: Tensor, offsets: Tensor, b_ENK: Tensor | None) -> None:
    count = None if b_ENK is None else b_ENK.shape[0] + 1
    checks.tensor(op, "offsets", offsets, checks.INT32, (count,), "N", "one more than E, the first size of b_ENK")
    checks.integer(op, "offsets (length)", offsets.shape[0], 2, 2**20)
    checks.same_device(op, first, a, {"offsets": offsets})


def _check_for_cuda(op: str, first: str, a: Tensor, widths: dict[str, int]) -> None:
    if not checks.on_cuda(a):
        return
    if a.dtype != torch.bfloat16:
        raise DTypeError(message(op, first, f"dtype {a.dtype} on CUDA", "bfloat16", "torch's grouped_mm takes others"))
    for name, size in widths.items():
        if size % 8:
            raise ShapeError(message(op, name, size, "a multiple of 8 on CUDA", _PAD_HINT))


def _check_buffer(op: str, name: str, buffer: Tensor, like: Tensor, shape: tuple[int, ...]) -> None:
    dtypes = (torch.float64,) if like.dtype == torch.float64 else tuple({like.dtype: 0, torch.float32: 0})
    checks.tensor(op, name, buffer, dtypes, shape, "ENK")
    checks.same_device(op, "the operands", like, {name: buffer})
    if not buffer.is_contiguous():
        raise LayoutError(message(op, name, f"strides {buffer.stride()}", "a contiguous buffer"))
    if buffer.requires_grad:
        raise ArgumentValueError(message(op, name, "requires_grad=True", "a plain buffer", "detach it"))


def _fake(a: Tensor, b: Tensor, offsets: Tensor, transpose_b: bool, main_grad: Tensor | None) -> Tensor:
    _check(a, b, offsets, transpose_b)
    return a.new_empty((a.shape[0], b.shape[2 if transpose_b else 1]))


def _kernel(a: Tensor, b: Tensor, offsets: Tensor, transpose_b: bool, main_grad: Tensor | None) -> Tensor:
    _check(a, b, offsets, transpose_b)
    out = native.empty((a.shape[0], b.shape[2 if transpose_b else 1]), a)
    if checks.on_cuda(a) and not a.shape[1]:
        return out.zero_()
    a, b, offsets = a.contiguous(), b.contiguous(), offsets.contiguous()
    native.kernels("grouped_gemm", a.device).grouped_gemm(
        a.data_ptr(), b.data_ptr(), offsets.data_ptr(), out.data_ptr(), *out.shape, a.shape[1], b.shape[0], transpose_b,
        native.DTYPE_CODES[a.dtype], native.where(a.device),
    )  # fmt: skip
    return out


def _wgrad_fake(a: Tensor, b: Tensor, offsets: Tensor, to_f32: bool) -> Tensor:
    _check_wgrad(a, b, offsets)
    dtype = torch.float32 if to_f32 else a.dtype
    return a.new_empty((offsets.shape[0] - 1, a.shape[1], b.shape[1]), dtype=dtype)


def _run_wgrad(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor, accumulate: bool) -> None:
    a, b, offsets = a.contiguous(), b.contiguous(), offsets.contiguous()
    native.kernels("grouped_gemm_wgrad", a.device).grouped_gemm_weight_grads(
        a.data_ptr(), b.data_ptr(), offsets.data_ptr(), out.data_ptr(), a.shape[0], a.shape[1], b.shape[1],
        out.shape[0], accumulate, native.DTYPE_CODES[a.dtype], native.DTYPE_CODES[out.dtype], native.where(a.device),
    )  # fmt: skip


def _wgrad_kernel(a: Tensor, b: Tensor, offsets: Tensor, to_f32: bool) -> Tensor:
    _check_wgrad(a, b, offsets)
    shape = (offsets.shape[0] - 1, a.shape[1], b.shape[1])
    out = native.empty(shape, a, torch.float32 if to_f32 else a.dtype)
    if checks.on_cuda(a) and not a.shape[0]:
        return out.zero_()
    _run_wgrad(a, b, offsets, out, False)
    return out


def _accumulate_fake(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor) -> None:
    _check_wgrad(a, b, offsets)


def _accumulate_kernel(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor) -> None:
    _check_wgrad(a, b, offsets)
    _check_buffer("grouped_gemm_wgrad", "out", out, a, (offsets.shape[0] - 1, a.shape[1], b.shape[1]))
    if a.shape[0] or not checks.on_cuda(a):
        _run_wgrad(a, b, offsets, out, True)


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, offsets: Tensor, transpose_b: bool, main_grad: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b, offsets)
        ctx.transpose_b, ctx.main_grad = transpose_b, main_grad
        return _OP.below_autograd(a, b, offsets, transpose_b, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, offsets = ctx.saved_tensors
        grad_a = _OP(grad, b, offsets, not ctx.transpose_b, None) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_a, None, None, None, None
        left, right = (a, grad) if ctx.transpose_b else (grad, a)
        if ctx.main_grad is None:
            return grad_a, _WGRAD(left, right, offsets, False), None, None, None
        _ACCUMULATE(left, right, offsets, ctx.main_grad)
        return grad_a, None, None, None, None


class _GroupedGemmWgrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, offsets: Tensor, to_f32: bool) -> Tensor:
        ctx.save_for_backward(a, b, offsets)
        return _WGRAD.below_autograd(a, b, offsets, to_f32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, offsets = ctx.saved_tensors
        grad = grad.to(a.dtype)
        grad_a = _OP(b, grad, offsets, False, None) if ctx.needs_input_grad[0] else None
        grad_b = _OP(a, grad, offsets, True, None) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None, None


def _autograd(a: Tensor, b: Tensor, offsets: Tensor, transpose_b: bool, main_grad: Tensor | None) -> Tensor:
    if native.wants_grad(a, b):
        return _GroupedGemm.apply(a, b, offsets, transpose_b, main_grad)
    return _OP.below_autograd(a, b, offsets, transpose_b, main_grad)


def _wgrad_autograd(a: Tensor, b: Tensor, offsets: Tensor, to_f32: bool) -> Tensor:
    if native.wants_grad(a, b):
        return _GroupedGemmWgrad.apply(a, b, offsets, to_f32)
    return _WGRAD.below_autograd(a, b, offsets, to_f32)


_OP = native.define(
    "grouped_gemm(Tensor a_MK, Tensor b_ENK, Tensor offsets, bool transpose_b, Tensor? main_grad) -> Tensor",
    _kernel, _fake, _autograd,
)  # fmt: skip
_WGRAD = native.define(
    "grouped_gemm_wgrad(Tensor a_MN, Tensor b_MK, Tensor offsets, bool to_f32) -> Tensor",
    _wgrad_kernel, _wgrad_fake, _wgrad_autograd,
)  # fmt: skip
_ACCUMULATE = native.define(
    "grouped_gemm_wgrad_accumulate(Tensor a_MN, Tensor b_MK, Tensor offsets, Tensor(a!) out) -> ()",
    _accumulate_kernel, _accumulate_fake,
)  # fmt: skip
