"""The bridge to k25sys._C: which module runs a tensor, and how its arguments travel (addresses and codes as ints)."""

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

# Besides the devices that have kernels, those whose tensors the kernel's own checks refuse by argument name.
_KERNEL_KEYS = ("CPU", "CUDA", "SparseCPU", "SparseCsrCPU", "SparseCUDA", "SparseCsrCUDA", "QuantizedCPU", "MkldnnCPU")

LIBRARY = torch.library.Library("k25", "DEF")


class _OnDevice:
    """The CUDA kernels, each called with `device` as the current one: a stream belongs to its device."""

    def __init__(self, module: ModuleType, device: torch.device) -> None:
        self._module = module
        self._device = device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name)

        def call(*args: Any) -> Any:
            with torch.cuda.device(self._device):
                return function(*args)

        return call


def kernels(op: str, device: torch.device) -> Any:
    """The functions of k25sys._C that run on `device`. Raises DeviceError where none were built."""
    if device.type == "cpu":
        return _C.cpu
    cuda = getattr(_C, "cuda", None)
    if device.type != "cuda" or cuda is None:
        raise DeviceError(message(op, "device", str(device), "cpu", f"CUDA kernels: {_C.cuda_info()['reason']}"))
    return _OnDevice(cuda, device)


def cpu_only(op: str, device: torch.device) -> ModuleType:
    """`kernels`, for an op whose fused kernel exists on the CPU alone."""
    if device.type != "cpu":
        raise DeviceError(message(op, "device", str(device), "cpu"))
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
    out = like.new_empty(shape) if dtype is None else like.new_empty(shape, dtype=dtype)
    num_bytes = out.nbytes
    if num_bytes >= _HUGE_PAGES_FROM and out.device.type == "cpu":
        _C.cpu.advise_huge_pages(out.data_ptr(), num_bytes)
    return out


def or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    """`value`, or a tensor without elements where there is none: an op's schema cannot return None."""
    return like.new_empty(0) if value is None else value


class Op:
    """One entry of torch.ops.k25, and the short way to it.

    A call through torch's dispatcher that ends in a Python kernel costs tens of microseconds, most of it in crossings
    between C++ and Python. Where nothing but plain eager tensors is involved (no tracing, no mode, no transform, no
    subclass, no profiler) the dispatcher would do nothing else than call our own function, so it is called directly.
    """

    def __init__(self, name: str, kernel: Callable[..., Any], autograd: Callable[..., Any] | None) -> None:
        self._dispatched = getattr(torch.ops.k25, name).default
        self._kernel = kernel
        self._autograd = autograd or kernel

    def __call__(self, *args: Any) -> Any:
        """Calls the op, recording for autograd where an argument asks for it."""
        return self._autograd(*args) if _is_plain(args) else self._dispatched(*args)

    def below_autograd(self, *args: Any) -> Any:
        """Calls the op's kernel under the autograd key."""
        if _is_plain(args):
            return self._kernel(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self._dispatched(*args)


def _plain_key_sets() -> frozenset[int]:
    """Dispatch keys of an ordinary tensor, and of one made under inference_mode. Both are of the CPU: on CUDA a launch
    costs as much as the dispatcher."""
    with torch.inference_mode(False):
        ordinary = torch.empty(0)
    with torch.inference_mode():
        inference = torch.empty(0)
    return frozenset(torch._C._dispatch_keys(value).raw_repr() for value in (ordinary, inference))


_PLAIN_KEY_SETS = _plain_key_sets()


def _is_plain(args: Sequence[Any]) -> bool:
    """Whether torch's dispatcher has nothing to add to a call with these arguments."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
        or torch._C._autograd._profiler_enabled()  # pyright: ignore[reportAttributeAccessIssue]
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    for value in args:
        if isinstance(value, Tensor) and torch._C._dispatch_keys(value).raw_repr() not in _PLAIN_KEY_SETS:
            return False
    return True


def define(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], autograd: Callable[..., Any] | None = None
) -> Op:
    """Registers torch.ops.k25.<name>: `kernel` for CPU and CUDA tensors, `fake` for tracing, `autograd` above both.

    `autograd` is registered on the Autograd key itself: torch.library.register_autograd costs two to three times as
    much a call (perf/bench_moe.py prints call_overhead).
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    for key in _KERNEL_KEYS:
        LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"k25::{name}", fake, lib=LIBRARY)
    if autograd is not None:
        LIBRARY.impl(name, autograd, "Autograd")
    return Op(name, kernel, autograd)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record a call with these tensors.

    Inside forward-mode differentiation always: torch then refuses an op that has no jvp, where a call under the
    autograd key would drop the tangent without a word.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)
