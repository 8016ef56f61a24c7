"""A toy model in stages, over deferred weight gradients and the experts' op, and micro-batches of different lengths."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k25sys import ops
from k25sys.parallel.weight_grads import Linear, WeightGradStore, accumulate_gradient

WIDTH = 16


@dataclass(frozen=True)
class Rows:
    """A micro-batch: inputs and targets (T, WIDTH), and a normaliser of the loss."""

    x_TD: Tensor
    target_TD: Tensor
    normalizer: float


def make_rows(number: int, dtype: torch.dtype) -> list[Rows]:
    """Micro-batches of 5, 12, 1, ... rows; the third has none."""
    generator = torch.Generator().manual_seed(5)
    lengths = [(5, 12, 0, 3, 8)[i % 5] for i in range(number)]
    drawn = [torch.randn(2, length, WIDTH, generator=generator, dtype=dtype) for length in lengths]
    return [Rows(both[0], both[1], float(sum(lengths))) for both in drawn]


class Layer(nn.Module):
    """x + linear(norm(x)), then x + experts(norm(x)): products through the store."""

    def __init__(self, index: int, dtype: torch.dtype, store: WeightGradStore) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(index)
        linear = nn.Linear(WIDTH, WIDTH)
        self.norm, self.expert_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.gate_up = nn.Parameter(torch.empty(4, 16, WIDTH))
        self.down = nn.Parameter(torch.empty(4, WIDTH, 8))
        self.linear = Linear(linear, store)
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.0, 0.3, generator=generator)
        self.store = store
        self.to(dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        x_TD = x_TD + self.linear(self.norm(x_TD))
        experts_TK = torch.stack([torch.arange(len(x_TD)) % 4, (torch.arange(len(x_TD)) + 1) % 4], 1).int()
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        weights_TK = torch.full((len(x_TD), 2), 0.5, dtype=dtype)
        return x_TD + ops.expert_mlp(
            self.expert_norm(x_TD), self.gate_up, self.down, weights_TK, experts_TK, defer_weight_grads=self._defer
        )

    def _defer(self, compute: ops.WeightGrads) -> None:
        def land() -> None:
            for weight, gradient in zip((self.gate_up, self.down), compute(), strict=True):
                assert gradient is not None
                accumulate_gradient(weight, gradient)

        self.store.put(land)


class ToyStage(nn.Module):
    """Some layers; on the last stage also the loss."""

    def __init__(self, layers: range, *, last: bool, dtype: torch.dtype, store: WeightGradStore) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): Layer(index, dtype, store) for index in layers})
        self.last, self.dtype = last, dtype

    def output_shape(self, microbatch: Rows) -> tuple[tuple[int, ...], torch.dtype]:
        """As the rows."""
        return tuple(microbatch.x_TD.shape), self.dtype

    def forward(self, microbatch: Rows, x: Tensor | None) -> Tensor:
        """Rows to rows, or to the loss."""
        x_TD = microbatch.x_TD if x is None else x
        for layer in self.layers.values():
            x_TD = layer(x_TD)
        return ((x_TD - microbatch.target_TD) ** 2).sum() / microbatch.normalizer if self.last else x_TD


def run_alone(num_layers: int, rows: list[Rows], dtype: torch.dtype) -> tuple[list[float], dict[str, Tensor]]:
    """One process, one micro-batch after the other: losses and gradients."""
    model = ToyStage(range(num_layers), last=True, dtype=dtype, store=WeightGradStore())
    losses = []
    for each in rows:
        loss = model(each, None)
        loss.backward()
        losses.append(float(loss.detach()))
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
