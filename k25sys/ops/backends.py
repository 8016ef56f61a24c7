"""Which implementations each op has, which of them run here, and why not the others. None is chosen silently."""

from dataclasses import dataclass

import torch

from k25sys.errors import BackendError, message
from k25sys.ops import native

OPS = (
    "combine", "dispatch", "expert_mlp", "grouped_gemm", "plan_dispatch", "pool_temporal_patches", "route_tokens",
    "swiglu", "dequantize_fp8", "fp8_gemm", "linear_loss", "loss_rows", "quantize_fp8", "token_losses", "transpose_fp8",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One implementation of an op on one kind of device."""

    name: str
    """"native" (k25sys._C) or "torch_grouped_mm"."""
    device: str
    """"cpu" or "cuda"."""
    available: bool
    reason: str
    """Why it is not available; empty where it is."""


def _cuda_reason() -> str:
    if not hasattr(native._C, "cuda"):
        return native._C.cuda_info()["reason"]
    return "" if torch.cuda.is_available() else "torch sees no CUDA device"


def _backend(name: str, device: str, reason: str) -> Backend:
    return Backend(name=name, device=device, available=not reason, reason=reason)


def listing(op: str) -> list[Backend]:
    """The backends of `op`, the default of each device first. Raises BackendError for an unknown op."""
    if op not in OPS:
        raise BackendError(message("backends.listing", "op", repr(op), ", ".join(OPS)))
    if op != "expert_mlp":
        return [_backend("native", "cpu", ""), _backend("native", "cuda", _cuda_reason())]
    no_grouped_mm = "" if hasattr(torch.nn.functional, "grouped_mm") else f"torch {torch.__version__} has no grouped_mm"
    return [
        _backend("native", "cpu", ""),
        _backend("torch_grouped_mm", "cpu", no_grouped_mm),
        _backend("native", "cuda", _cuda_reason()),
        _backend("torch_grouped_mm", "cuda", _cuda_reason() or no_grouped_mm),
    ]


def choose(op: str, name: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs: `name`, or the device's default: native, but on CUDA torch_grouped_mm for expert_mlp of
    what the tensor cores' kernel does not multiply. Raises BackendError where it cannot, with the reason."""
    kind = "cpu" if device.type == "meta" else device.type
    native_takes = op != "expert_mlp" or kind == "cpu" or dtype == torch.bfloat16
    chosen = name or ("native" if native_takes else "torch_grouped_mm")
    if chosen == "native" and not native_takes:
        got = f"'native' with {str(dtype).removeprefix('torch.')} on {kind}"
        raise BackendError(message(op, "backend", got, "bfloat16 for 'native', or 'torch_grouped_mm'"))
    if chosen == "torch_grouped_mm" and dtype == torch.float64:
        accepted = "'native' for float64" if kind == "cpu" else "bfloat16 or float32 there, or float64 on the CPU"
        raise BackendError(message(op, "backend", f"{chosen!r} with float64 on {kind}", accepted))
    if name is None:
        return chosen
    here = [backend for backend in listing(op) if backend.device == kind]
    if any(backend.name == name and backend.available for backend in here):
        return name
    accepted = ", ".join(repr(b.name) if b.available else f"{b.name!r} (unavailable: {b.reason})" for b in here)
    raise BackendError(message(op, "backend", repr(name), f"{accepted or 'none'} on {kind}"))
