"""Rows of tokens as they travel: in their own dtype, as bfloat16, or as E4M3 with their scales behind them."""

import torch
from torch import Tensor

from k25sys import ops
from k25sys.errors import ArgumentValueError, DTypeError, message
from k25sys.ops.quantize_fp8 import E4M3, TILE, tiles

PAYLOADS = ("exact", "bf16", "fp8")
_UNIT = 16
"""An FP8 row's bytes are a multiple of this, what copies of 128 bits and DeepEP want."""


def check(op: str, payload: str, dtype: torch.dtype | None = None) -> None:
    """Raises unless `payload` is known, and takes tokens of `dtype`."""
    if payload not in PAYLOADS:
        raise ArgumentValueError(message(op, "payload", repr(payload), ", ".join(map(repr, PAYLOADS))))
    if payload != "exact" and dtype == torch.float64:
        raise DTypeError(message(op, "x_TD", f"float64 with payload {payload!r}", "float32 or bfloat16, or 'exact'"))


def on_the_way_home(payload: str) -> str:
    """How outputs and all gradients travel where tokens travel as `payload`: FP8 goes out, bfloat16 comes back
    (DeepSeek-V3, section 3.2.2)."""
    return "exact" if payload == "exact" else "bf16"


def row_bytes(payload: str, dim: int, dtype: torch.dtype) -> int:
    """Bytes of a row of `dim` numbers of `dtype`."""
    if payload == "fp8":
        return _fp8_scales_at(dim) + -(-4 * tiles(dim) // _UNIT) * _UNIT
    return dim * (2 if payload == "bf16" else dtype.itemsize)


def pack(x_MD: Tensor, payload: str) -> Tensor:
    """(M, D) -> (M, C) of a dtype that ops.dispatch copies; `.view(torch.uint8)` of it is what travels."""
    if payload == "exact":
        return x_MD.contiguous()
    if payload == "bf16":
        return x_MD.bfloat16().contiguous()
    values_MD, scales_MS = ops.quantize_fp8(x_MD, (1, TILE))
    num_rows, dim = x_MD.shape
    begin = _fp8_scales_at(dim)
    rows_MB = values_MD.new_zeros((num_rows, row_bytes(payload, dim, x_MD.dtype)), dtype=torch.uint8)
    rows_MB[:, :dim] = values_MD.view(torch.uint8)
    rows_MB[:, begin : begin + 4 * scales_MS.shape[1]] = scales_MS.view(torch.uint8)
    return rows_MB.view(torch.float32)


def unpack(rows_MB: Tensor, payload: str, dim: int, dtype: torch.dtype) -> Tensor:
    """(M, B) uint8 -> (M, D) of `dtype`: the inverse of `pack`, but for what it rounded."""
    if payload == "exact":
        return rows_MB.view(dtype)
    if payload == "bf16":
        return rows_MB.view(torch.bfloat16).to(dtype)
    begin = _fp8_scales_at(dim)
    values_MD = rows_MB[:, :dim].contiguous().view(E4M3)
    scales_MS = rows_MB[:, begin : begin + 4 * tiles(dim)].contiguous().view(torch.float32)
    return ops.dequantize_fp8(values_MD, scales_MS, (1, TILE), dtype)


def _fp8_scales_at(dim: int) -> int:
    return -(-dim // _UNIT) * _UNIT
