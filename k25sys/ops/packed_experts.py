"""Weights of the experts kept in the order in which the CPU kernels read them."""

import weakref

import torch
from torch import Tensor

from k25sys.errors import ArgumentValueError, message
from k25sys.ops import checks, native

# enum PackKind in csrc/expert_mlp/api.h: forward of gate_up and down, backward of down and gate_up.
_KINDS = (0, 1, 2, 3)
_SAMPLES = 64


class PackedExperts:
    """Packed gate_up and down, for calls that reuse the same weights: inference, or micro-batches between two steps.

    The pack costs as much memory as the weights (twice that with `backward`) and saves the packing of each call.
    It is made anew by itself when the weights have changed: another address, another `_version`, another instruction
    set, or another value among 64 sampled elements of each weight. The last catches what torch does not count (writes
    through .data, or by native code); where such a write may touch fewer elements than that, call `invalidate()`.
    """

    def __init__(self, gate_up_EGD: Tensor, down_EDI: Tensor, *, backward: bool = True) -> None:
        """Packs at once.

        Args:
            gate_up_EGD: (E, 2I, D) float32, bfloat16 or float64 on the CPU, contiguous.
            down_EDI: (E, D, I), same dtype.
            backward: whether to keep the packs of the backward too.

        Raises:
            TypeError, ValueError: a wrong dtype, shape, device or layout.
        """
        op = "PackedExperts"
        checks.tensor(op, "gate_up_EGD", gate_up_EGD, checks.FLOATS, (None, None, None), "EGD")
        num_experts, gate_up_width, dim = gate_up_EGD.shape
        checks.tensor(op, "down_EDI", down_EDI, (gate_up_EGD.dtype,), (num_experts, dim, gate_up_width // 2), "EDI")
        for name, weight in (("gate_up_EGD", gate_up_EGD), ("down_EDI", down_EDI)):
            if weight.device.type != "cpu" or not weight.is_contiguous():
                got = f"device {weight.device}, strides {weight.stride()}"
                raise ArgumentValueError(message(op, name, got, "a contiguous tensor on the CPU"))
        self._weights = (weakref.ref(gate_up_EGD), weakref.ref(down_EDI))
        self._kinds = _KINDS if backward else _KINDS[:2]
        self._packs: list[Tensor] = []
        self._state: tuple[object, ...] | None = None
        self._samples: list[Tensor] = []
        self.tensors(gate_up_EGD, down_EDI)

    @staticmethod
    def num_bytes(kind: int, gate_up_EGD: Tensor) -> int:
        """Size of the pack of this kind for weights of these shapes on the current instruction set."""
        num_experts, gate_up_width, dim = gate_up_EGD.shape
        rows, cols = (gate_up_width, dim) if kind in (0, 3) else (dim, gate_up_width // 2)
        code = native.DTYPE_CODES[gate_up_EGD.dtype]
        return native.kernels("expert_mlp", torch.device("cpu")).packed_bytes(num_experts, rows, cols, kind, code)

    @property
    def nbytes(self) -> int:
        """Memory of all packs, in bytes."""
        return sum(pack.nbytes for pack in self._packs)

    def invalidate(self) -> None:
        """Packs anew at the next use, whatever the weights look like."""
        self._state = None

    def tensors(self, gate_up_EGD: Tensor, down_EDI: Tensor) -> list[Tensor]:
        """The packs, made anew if the weights changed. Raises ValueError for weights that are not the packed ones."""
        weights = (gate_up_EGD, down_EDI)
        state = (native.kernels("expert_mlp", torch.device("cpu")).isa(), *(_identity(weight) for weight in weights))
        samples = [_sample(weight) for weight in weights]
        same_values = all(map(_bitwise_equal, samples, self._samples))
        if self._state == state and same_values:
            return self._packs
        known = self._state is not None and self._state[1:] == state[1:]
        if not known and not all(ref() is weight for ref, weight in zip(self._weights, weights, strict=True)):
            raise ArgumentValueError(
                message("expert_mlp", "packed", "packs of other weights", "packs of these", "make a new PackedExperts")
            )
        self._packs = [
            self._pack(kind, weights[0] if kind in (0, 3) else weights[1], gate_up_EGD) for kind in self._kinds
        ]
        self._state, self._samples = state, samples
        return self._packs

    @staticmethod
    def _pack(kind: int, weight: Tensor, gate_up: Tensor) -> Tensor:
        if not weight.is_contiguous():
            raise ArgumentValueError(
                message("PackedExperts", "weights", f"strides {weight.stride()}", "contiguous ones")
            )
        pack = native.empty((PackedExperts.num_bytes(kind, gate_up),), weight, torch.uint8)
        native.kernels("expert_mlp", weight.device).pack_weights(
            weight.data_ptr(), pack.data_ptr(), *weight.shape, kind, native.DTYPE_CODES[weight.dtype],
            native.where(weight.device),
        )  # fmt: skip
        return pack


def _identity(weight: Tensor) -> tuple[object, ...]:
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), tuple(weight.shape), weight.dtype, version


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].clone()


def _bitwise_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
