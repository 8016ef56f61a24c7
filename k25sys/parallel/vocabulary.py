"""The two layers that know the vocabulary, with its rows split over the tensor ranks: embedding and output head.

Shape suffixes: T tokens of the tensor group, N = T / ranks of this rank, D model, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from k25sys import ops
from k25sys.errors import ArgumentTypeError, ArgumentValueError, DTypeError, ShapeError, message
from k25sys.parallel.collectives import all_reduce, gather_rows, reduce_scatter_rows, rows_per_rank
from k25sys.parallel.grid import RankGrid
from k25sys.parallel.tensor import ColumnParallelLinear, accumulating, check_split, own_part
from k25sys.parallel.weight_grads import WeightGradStore, accumulate_gradient


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding split over "tensor": each rank looks up the tokens it has rows of, and the rest is zeros.

    Sums have one term that is not zero, so that the result is exact.

    Args:
        embedding: the whole nn.Embedding (V, D), or one on meta. Plain: no padding index, no norm.
        grid: splits V over "tensor".
        scatter_output: True: a rank gets the embeddings of its N tokens. False: of all tokens, of any shape.

    Raises:
        GridError: V does not divide.
    """

    def __init__(self, embedding: nn.Embedding, grid: RankGrid, *, scatter_output: bool) -> None:
        super().__init__()
        op = "VocabParallelEmbedding"
        if not isinstance(embedding, nn.Embedding):
            raise ArgumentTypeError(message(op, "embedding", type(embedding).__name__, "a torch.nn.Embedding"))
        if embedding.padding_idx is not None or embedding.max_norm is not None or embedding.scale_grad_by_freq:
            got = "padding_idx, max_norm or scale_grad_by_freq"
            raise ArgumentValueError(message(op, "embedding", got, "a plain embedding"))
        check_split(op, "num_embeddings", embedding.num_embeddings, 1, grid)
        self.num_embeddings = embedding.num_embeddings
        self.weight = own_part(embedding.weight, grid, 0)
        self.vocab_start = grid.index("tensor") * self.weight.shape[0]
        self.group, self.scatter_output = grid.group("tensor"), scatter_output

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings of the tokens of all tensor ranks.

        Args:
            ids: (T,) int32 or int64, the same on every tensor rank; any shape without scatter.

        Returns:
            (N, D), or (..., D) without scatter.

        Raises:
            DTypeError, ShapeError: other ids, or T that does not divide.
            ArgumentValueError: on the CPU, an id outside the vocabulary (a device asserts).
        """
        op = "VocabParallelEmbedding"
        if ids.dtype not in (torch.int32, torch.int64):
            raise DTypeError(message(op, "ids", ids.dtype, "int32 or int64"))
        if self.scatter_output:
            if ids.dim() != 1:
                raise ShapeError(message(op, "ids", f"shape {tuple(ids.shape)}", "(T,)"))
            rows_per_rank(op, ids.shape[0], self.group)
        if ids.device.type == "cpu" and ids.numel():
            low, high = (int(token) for token in ids.aminmax())
            if low < 0 or high >= self.num_embeddings:
                got = f"token {low if low < 0 else high}"
                raise ArgumentValueError(message(op, "ids", got, f"0 to {self.num_embeddings - 1}"))
        summand = _Lookup.apply(ids, self.weight, self.vocab_start, self.num_embeddings)
        return (reduce_scatter_rows if self.scatter_output else all_reduce)(summand, self.group)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, start: int, vocabulary: int) -> Tensor:
        local = ids - start
        ctx.others = (local < 0) | (local >= weight.shape[0])
        # An id outside the vocabulary stays outside the rows, so that the kernel finds it as nn.Embedding's does.
        outside = (ids < 0) | (ids >= vocabulary)
        ctx.local = torch.where(outside, weight.shape[0], local.masked_fill(ctx.others, 0))
        ctx.weight = weight
        return F.embedding(ctx.local, weight).masked_fill_(ctx.others[..., None], 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.masked_fill(ctx.others[..., None], 0.0)
        rows = torch.ops.aten.embedding_dense_backward(grad, ctx.local, ctx.weight.shape[0], -1, False)
        accumulate_gradient(ctx.weight, rows)
        return None, None, None, None


class VocabParallelHead(ColumnParallelLinear):
    """Rows of the output head split over "tensor", and the losses that never form the logits.

    The losses form the head's gradient in the forward (k25sys.ops.linear_loss): there is no GEMM left to defer.

    Args:
        layer: the whole nn.Linear (V, D) without bias, or one on meta.
        grid: splits V over "tensor".
        store: of the weight gradient of `forward`.

    Raises:
        GridError: V does not divide.
    """

    def __init__(self, layer: nn.Linear, grid: RankGrid, store: WeightGradStore) -> None:
        super().__init__(layer, grid, store, gather_input=True)
        if self.bias is not None:
            raise ArgumentValueError(message("VocabParallelHead", "layer", "a bias", "a head without bias"))
        self.vocab_start = grid.index("tensor") * self.weight.shape[0]

    def cross_entropy(
        self, hidden_ND: Tensor, targets_T: Tensor, loss_mask_T: Tensor, *, normalizer: str | float = "batch"
    ) -> Tensor:
        """ops.linear_cross_entropy over the whole vocabulary, from this rank's tokens.

        Args:
            hidden_ND: (N, D); its gradient is complete.
            targets_T, loss_mask_T: of the tokens of all tensor ranks.
            normalizer: as in the op.

        Returns:
            The loss of all T tokens, the same on every tensor rank.
        """
        hidden_TD = gather_rows(hidden_ND, self.group, gradient="whole")
        return ops.linear_cross_entropy(
            hidden_TD, accumulating(self.weight), targets_T, loss_mask_T, normalizer=normalizer,
            process_group=self.group, vocab_start=self.vocab_start,
        )  # fmt: skip

    def clipped_log_ratio_loss(
        self, hidden_ND: Tensor, targets_T: Tensor, old_logprobs_T: Tensor, advantages_T: Tensor, loss_mask_T: Tensor,
        *, log_low: float, log_high: float, tau: float, penalty_on: str = "all", normalizer: str | float = "group",
        group_ids_T: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """ops.linear_clipped_log_ratio_loss over the whole vocabulary, from this rank's tokens; see `cross_entropy`."""
        hidden_TD = gather_rows(hidden_ND, self.group, gradient="whole")
        return ops.linear_clipped_log_ratio_loss(
            hidden_TD, accumulating(self.weight), targets_T, old_logprobs_T, advantages_T, loss_mask_T, log_low=log_low,
            log_high=log_high, tau=tau, penalty_on=penalty_on, normalizer=normalizer, group_ids_T=group_ids_T,
            process_group=self.group, vocab_start=self.vocab_start,
        )  # fmt: skip
