"""Checks of arguments from their metadata alone: no tensor is read, so they cost nothing on a device and trace into a
compiled graph. What depends on values (expert ids, NaN, plan entries) is checked by the CPU kernels."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from k25sys.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    DeviceError,
    DTypeError,
    LayoutError,
    ShapeError,
    message,
)

PLAN_HINT = "make the plan with plan_dispatch for these tokens"
MAX_EXPERTS = 512
MAX_TOP_K = 16
MAX_ROWS = 2**31 - 1  # rows are numbered in int32
FLOATS = (torch.float32, torch.bfloat16, torch.float64)
INT32 = (torch.int32,)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _wrong_shape(op: str, argument: str, value: Tensor, shape: Sequence[int | None], axes: str, hint: str) -> NoReturn:
    want = ", ".join(f"{axis}={size}" if size is not None else axis for axis, size in zip(axes, shape, strict=True))
    raise ShapeError(message(op, argument, f"shape {tuple(value.shape)}", f"({want})", hint))


def tensor(
    op: str,
    argument: str,
    value: Any,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | None],
    axes: str,
    hint: str = "",
) -> None:
    """Raises unless `value` is a dense tensor of one of `dtypes` whose sizes equal `shape` (None is any size).

    `axes` has one letter an axis; it and `hint` (what to do about a wrong shape) are for the message.
    """
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(message(op, argument, type(value).__name__, "a torch.Tensor"))
    if value.dtype not in dtypes:
        raise DTypeError(message(op, argument, f"dtype {value.dtype}", _names(dtypes), "convert it with .to(dtype)"))
    if value.layout is not torch.strided:
        raise LayoutError(message(op, argument, str(value.layout), "a dense tensor", "convert it with .to_dense()"))
    sizes = value.shape
    if len(sizes) != len(shape):
        _wrong_shape(op, argument, value, shape, axes, hint)
    for i, want in enumerate(shape):
        if want is not None and sizes[i] != want:
            _wrong_shape(op, argument, value, shape, axes, hint)


def same_device(op: str, first: str, value: Tensor, others: dict[str, Tensor | None]) -> None:
    """Raises unless every tensor lies on the device of `value` and that device has kernels (or is meta)."""
    device = value.device
    if device.type not in ("cpu", "cuda", "meta"):
        raise DeviceError(message(op, first, f"device {device}", "cpu or cuda"))
    for argument, other in others.items():
        if other is not None and other.device != device:
            raise DeviceError(
                message(
                    op, argument, f"device {other.device}", f"{device}, where {first} is", "move it with .to(device)"
                )
            )


def on_cuda(value: Tensor) -> bool:
    """Whether the tensor cores multiply `value`, which then has to suit them."""
    return value.device.type == "cuda"


def integer(op: str, argument: str, value: Any, least: int, most: int) -> None:
    """Raises unless `value` is an int (not a bool) in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise ArgumentTypeError(message(op, argument, f"{type(value).__name__} {value!r}", "an int"))
    if value < least or value > most:
        raise ArgumentValueError(message(op, argument, value, f"{least} to {most}"))


def flag(op: str, argument: str, value: Any) -> None:
    """Raises unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(message(op, argument, f"{type(value).__name__} {value!r}", "a bool"))


def row_count(op: str, argument: str, num_tokens: int, top_k: int) -> None:
    """Raises unless T * K rows can be numbered in int32."""
    if num_tokens * top_k > MAX_ROWS:
        raise ShapeError(
            message(op, argument, f"{num_tokens} x {top_k} rows", f"at most {MAX_ROWS}", "split the tokens into chunks")
        )


def routing_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of routing weights beside tokens of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
