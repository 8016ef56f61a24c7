"""What one data rank trains on at a time: packed tokens and their media."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from k25sys.errors import ArgumentValueError, DTypeError, ShapeError, message


class MediaSource(Protocol):
    """Encoded media of one micro-batch, as a rank of the first stage takes them."""

    def rows(self) -> Tensor:
        """(R, D), or (R, C, D) of the tower where the projector is in the stage: the rows at this rank's media_pad
        positions, in order; waits for them."""
        ...

    def return_gradient(self, gradient: Tensor) -> None:
        """Takes the gradient of what `rows` gave, in its dtype."""
        ...


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """T packed tokens of one data rank. Every rank that shares its layers gets all of it and takes its part.

    Raises:
        TypeError, ValueError: tensors that do not describe the same tokens, or a normaliser that is not > 0.
    """

    input_ids_T: Tensor
    """(T,) int64, with media_pad where a media feature goes."""
    targets_T: Tensor
    """(T,) int64: the token that each position predicts; not read where it has no loss."""
    loss_mask_T: Tensor
    """(T,) bool."""
    cu_seqlens: tuple[int, ...]
    """Where documents begin, and T: 0 = c_0 < ... < c_n = T."""
    normalizer: float
    """The number of loss tokens of the whole step, over all micro-batches and data ranks."""
    pixel_values: Tensor | None = None
    """(P, 3, patch, patch), or None without media, or where another rank encodes them."""
    grid_thw: Tensor | None = None
    """(N, 3): t, h and w of each clip, in the order of their media_pad positions."""
    media: "MediaSource | None" = None
    """Where encoded media come from, in place of pixels."""

    def __post_init__(self) -> None:
        op, shape = "MicroBatch", tuple(self.input_ids_T.shape)
        if len(shape) != 1:
            raise ShapeError(message(op, "input_ids_T", shape, "(T,)"))
        for name, dtype in (("input_ids_T", torch.int64), ("targets_T", torch.int64), ("loss_mask_T", torch.bool)):
            value = getattr(self, name)
            if value.dtype != dtype:
                raise DTypeError(message(op, name, value.dtype, str(dtype)))
            if tuple(value.shape) != shape:
                raise ShapeError(message(op, name, tuple(value.shape), f"{shape}, as input_ids_T"))
        if self.cu_seqlens[:1] != (0,) or self.cu_seqlens[-1] != shape[0] or list(self.cu_seqlens) != sorted(
            self.cu_seqlens
        ):  # fmt: skip
            raise ArgumentValueError(message(op, "cu_seqlens", self.cu_seqlens, f"0 = c_0 <= ... <= c_n = {shape[0]}"))
        if not self.normalizer > 0:
            raise ArgumentValueError(message(op, "normalizer", self.normalizer, "a number > 0"))

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids_T.shape[0]
