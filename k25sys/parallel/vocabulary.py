"""The embedding with its vocabulary split over the axis "tensor"."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k25sys.parallel.collectives import reduce_scatter_rows
from k25sys.parallel.grid import RankGrid
from k25sys.parallel.tensor import split_rows


class VocabParallelEmbedding(nn.Module):
    """Rows [r V / size, (r + 1) V / size) of the table; ids of other rows give zeros, and the sum's rows are scattered.

    Raises:
        GridError: an axis that does not divide the vocabulary.
    """

    def __init__(self, embedding: nn.Embedding, grid: RankGrid) -> None:
        super().__init__()
        self.weight = split_rows(embedding.weight, "weight", grid)
        self.first, self.group = grid.index("tensor") * self.weight.shape[0], grid.group("tensor")

    def forward(self, ids_C: Tensor) -> Tensor:
        """(C,) ids of the whole vocabulary, the same on every rank -> (C / size, D): this rank's rows."""
        if self.group is None:
            return F.embedding(ids_C, self.weight)
        local_C = ids_C - self.first
        inside_C = (local_C >= 0) & (local_C < self.weight.shape[0])
        rows_CD = F.embedding(torch.where(inside_C, local_C, 0), self.weight)
        return reduce_scatter_rows(rows_CD * inside_C[:, None].to(rows_CD.dtype), self.group)
