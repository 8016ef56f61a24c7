"""Documents of any length to sequences of exactly T tokens, without attention between documents."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from k25sys.data.sample import MediaItem, Sample


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedSequence:
    """T positions of one or more documents, or of parts of text documents."""

    input_ids_T: Tensor
    """(T,) int64."""
    targets_T: Tensor
    """(T,) int64: the token after each input, of the same document."""
    loss_mask_T: Tensor
    """(T,) bool: which targets count."""
    cu_seqlens: tuple[int, ...]
    """0, the ends of all documents, the last of them T: nothing attends across one. Padding is the last document."""
    media: tuple[MediaItem, ...]
    """In the order of their positions."""
    tokens_by_source: dict[str, int]
    """Positions by the source's name; T less padding in all."""


def num_positions(sample: Sample) -> int:
    """Positions of a whole document: each token but the first is predicted once."""
    return max(0, len(sample.ids_S) - 1)


class Packer:
    """One sequence in the making."""

    def __init__(self, sequence_length: int) -> None:
        self._input_ids_T = np.empty(sequence_length, np.int64)
        self._targets_T = np.empty(sequence_length, np.int64)
        self._loss_mask_T = np.zeros(sequence_length, np.bool_)
        self._ends = [0]
        self._media: list[MediaItem] = []
        self._tokens: dict[str, int] = {}

    @property
    def used(self) -> int:
        """Positions that are filled."""
        return self._ends[-1]

    @property
    def room(self) -> int:
        """Positions that are not."""
        return len(self._input_ids_T) - self.used

    def add(self, sample: Sample, source: str, offset: int) -> int:
        """Puts a document's positions from `offset` on, as many as there is room for; returns how many.

        A document with media must fit as a whole.
        """
        start, count = self.used, min(self.room, num_positions(sample) - offset)
        assert count > 0
        assert not sample.media or (offset == 0 and count == num_positions(sample)), "a document with media was cut"
        here, end = slice(start, start + count), offset + count
        self._input_ids_T[here] = sample.ids_S[offset:end]
        self._targets_T[here] = sample.ids_S[offset + 1 : end + 1]
        self._loss_mask_T[here] = sample.loss_S[offset + 1 : end + 1]
        self._ends.append(start + count)
        self._media += sample.media
        self._tokens[source] = self._tokens.get(source, 0) + count
        return count

    def finish(self, pad: int) -> PackedSequence:
        """The sequence; what is left becomes a document of `pad` that has no loss."""
        if self.room:
            self._input_ids_T[self.used :] = pad
            self._targets_T[self.used :] = pad
            self._ends.append(len(self._input_ids_T))
        return PackedSequence(
            input_ids_T=torch.from_numpy(self._input_ids_T),
            targets_T=torch.from_numpy(self._targets_T),
            loss_mask_T=torch.from_numpy(self._loss_mask_T),
            cu_seqlens=tuple(self._ends),
            media=tuple(self._media),
            tokens_by_source=self._tokens,
        )
