"""AdamW on many flat pieces at once: the plain rule as reference, torch's fused kernel, or apex's. Chosen by name.

torch's kernel agrees with the rule to the last bits of float32, but not bitwise: choose one and stay with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from k25sys.errors import BackendError, message
from k25sys.ops.backends import Backend
from k25sys.optim.muon_clip import MuonClipConfig, adamw_update, decay_and_step


@dataclass(frozen=True)
class AdamWPieces:
    """What is updated in one call: lists of one length, each piece flat, contiguous, of one dtype and device."""

    masters: Sequence[Tensor]
    gradients: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]


AdamWStep = Callable[[AdamWPieces, int, float, MuonClipConfig], None]
"""(pieces, step from 1, learning rate, constants): updates masters and moments in place."""


def _reference(pieces: AdamWPieces, step: int, learning_rate: float, config: MuonClipConfig) -> None:
    each = zip(pieces.masters, pieces.gradients, pieces.exp_avgs, pieces.exp_avg_sqs, strict=True)
    for master, gradient, exp_avg, exp_avg_sq in each:
        update = adamw_update(exp_avg, exp_avg_sq, gradient, step, config)
        decay_and_step(master, update, learning_rate, config)


def _torch(pieces: AdamWPieces, step: int, learning_rate: float, config: MuonClipConfig) -> None:
    # One a piece, counted up before it is read.
    done = [torch.full((), float(step - 1), device=master.device) for master in pieces.masters]
    adamw(
        list(pieces.masters), list(pieces.gradients), list(pieces.exp_avgs), list(pieces.exp_avg_sqs), [], done,
        fused=True, amsgrad=False, beta1=config.adam_betas[0], beta2=config.adam_betas[1],
        lr=learning_rate, weight_decay=config.weight_decay, eps=config.adam_epsilon, maximize=False,
    )  # fmt: skip


def _apex(pieces: AdamWPieces, step: int, learning_rate: float, config: MuonClipConfig) -> None:
    apply, kernels = _import_apex()
    lists = [list(each) for each in (pieces.gradients, pieces.masters, pieces.exp_avgs, pieces.exp_avg_sqs)]
    overflow = torch.zeros(1, dtype=torch.int32, device=pieces.masters[0].device)
    decoupled_decay, bias_correction = 1, 1
    apply.multi_tensor_applier(
        kernels.multi_tensor_adam, overflow, lists, learning_rate, *config.adam_betas, config.adam_epsilon, step,
        decoupled_decay, bias_correction, config.weight_decay,
    )  # fmt: skip


def _import_apex() -> tuple[ModuleType, ModuleType]:
    return import_module("apex.multi_tensor_apply"), import_module("amp_C")


def _apex_reason(device: str) -> str:
    if device != "cuda":
        return "its kernels run on CUDA only"
    try:
        _import_apex()
    except ImportError as error:
        return f"{error}; build apex with its CUDA extensions"
    return ""


_STEPS: tuple[tuple[str, AdamWStep], ...] = (("reference", _reference), ("torch", _torch), ("apex", _apex))


def listing() -> list[Backend]:
    """The backends on each device, the default first, with the reason where one does not run here."""
    found = []
    for device in ("cpu", "cuda"):
        absent = "" if device == "cpu" or torch.cuda.is_available() else "torch sees no CUDA device"
        for name, _ in _STEPS:
            reason = absent or (_apex_reason(device) if name == "apex" else "")
            found.append(Backend(name=name, device=device, available=not reason, reason=reason))
    return found


def choose(name: str, device: torch.device, dtype: torch.dtype) -> AdamWStep:
    """The rule called `name` for pieces of that device and dtype.

    Raises:
        BackendError: an unknown name, one that does not run here, or apex, which computes in float32, for wider pieces.
    """
    here = [backend for backend in listing() if backend.device == device.type]
    if not any(backend.name == name and backend.available for backend in here):
        accepted = ", ".join(repr(b.name) if b.available else f"{b.name!r} (unavailable: {b.reason})" for b in here)
        raise BackendError(message("AdamW", "backend", repr(name), f"{accepted or 'none'} on {device.type}"))
    if name == "apex" and dtype != torch.float32:
        got = f"'apex' with {str(dtype).removeprefix('torch.')}"
        raise BackendError(message("AdamW", "backend", got, "'reference' or 'torch', or float32 masters"))
    return dict(_STEPS)[name]
