"""The bridge to k25sys._C: which module runs a tensor, and how its arguments travel (addresses and codes as ints)."""

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from k25sys.errors import DeviceError, ExtensionMissingError, message

try:
    from k25sys import _C
except ImportError as error:
    raise ExtensionMissingError(
        f"k25sys.ops needs the native extension k25sys._C, which cannot be imported ({error}); "
        "build it with `pip install -e .` in the repository"
    ) from error

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}  # enum DType in csrc/common/types.h
_HUGE_PAGES_FROM = 4 << 20  # bytes; below it page faults are few

LIBRARY = torch.library.Library("k25", "DEF")


def kernels(op: str, device: torch.device) -> ModuleType:
    """The submodule of k25sys._C that runs on `device`. Raises DeviceError where none was built."""
    if device.type == "cpu":
        return _C.cpu
    cuda = getattr(_C, "cuda", None)
    if device.type != "cuda" or cuda is None:
        raise DeviceError(message(op, "device", str(device), "cpu", f"CUDA kernels: {_C.cuda_info()['reason']}"))
    return cuda


def cpu_only(op: str, device: torch.device) -> ModuleType:
    """`kernels`, for an op whose fused kernel exists on the CPU alone."""
    if device.type != "cpu":
        raise DeviceError(message(op, "device", str(device), "cpu", "on CUDA use backend='torch_grouped_mm'"))
    return _C.cpu


def where(device: torch.device) -> int:
    """The last argument of every kernel: the number of threads on the CPU, the current stream on CUDA."""
    if device.type == "cpu":
        return torch.get_num_threads()
    return torch.cuda.current_stream(device).cuda_stream


def address(value: Tensor | None) -> int:
    """data_ptr(), or 0 for None."""
    return 0 if value is None else value.data_ptr()


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor on the device of `like`; a large one on the CPU asks for huge pages."""
    out = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    if out.device.type == "cpu" and math.prod(shape) * out.element_size() >= _HUGE_PAGES_FROM:
        _C.cpu.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out


def define(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], autograd: Callable[..., Any] | None = None
) -> Any:
    """Registers torch.ops.k25.<name>: `kernel` for CPU and CUDA tensors, `fake` for tracing, `autograd` above both.

    `autograd` is registered on the Autograd key itself: torch.library.register_autograd costs two to three times as
    much a call (perf/bench_moe.py prints call_overhead).
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, kernel, "CPU")
    LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"k25::{name}", fake, lib=LIBRARY)
    if autograd is not None:
        LIBRARY.impl(name, autograd, "Autograd")
    return getattr(torch.ops.k25, name).default


def below_autograd(op: Any, *args: Any) -> Any:
    """Calls the op's kernel under the autograd key."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
