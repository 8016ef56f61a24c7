"""A toy model in stages over deferred weight gradients, the same in plain autograd, and micro-batches of any length."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from k25sys import ops
from k25sys.parallel.weight_grads import Linear, WeightGradStore, accumulate_gradient

WIDTH, EXPERTS = 16, 4


@dataclass(frozen=True)
class Rows:
    """A micro-batch: inputs and targets (T, WIDTH), and a normaliser of the loss."""

    x_TD: Tensor
    target_TD: Tensor
    normalizer: float
    extra_TD: Tensor | None = None
    """What the first stage adds to the inputs: a leaf of its own, as encoded media are."""


def make_rows(number: int, dtype: torch.dtype, lengths: tuple[int, ...] = (5, 12, 0, 3, 8)) -> list[Rows]:
    """Micro-batches of these lengths in turn; with an extra input every second one."""
    generator = torch.Generator().manual_seed(5)
    all_lengths = [lengths[i % len(lengths)] for i in range(number)]
    drawn = [torch.randn(3, length, WIDTH, generator=generator, dtype=torch.float64) for length in all_lengths]
    return [
        Rows(x.to(dtype), target.to(dtype), float(sum(all_lengths)), None if i % 2 else extra.to(dtype))
        for i, (x, target, extra) in enumerate(drawn)
    ]


class Layer(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x)). Without a store all of it is plain autograd."""

    def __init__(self, index: int, dtype: torch.dtype, store: WeightGradStore | None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(index)
        qkv, out, router = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, EXPERTS, bias=False)
        self.norm, self.expert_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.gate_up = nn.Parameter(torch.empty(EXPERTS, 16, WIDTH))
        self.down = nn.Parameter(torch.empty(EXPERTS, WIDTH, 8))
        self.qkv, self.out, self.router = (
            layer if store is None else Linear(layer, store) for layer in (qkv, out, router)
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, 0.0, 0.3, generator=generator)
        self.store = store
        self.to(dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        q_TD, k_TD, v_TD = self.qkv(self.norm(x_TD)).chunk(3, -1)
        hidden_TT = torch.ones(len(x_TD), len(x_TD), dtype=torch.bool).triu(1)
        scores_TT = (q_TD @ k_TD.T / WIDTH**0.5).masked_fill(hidden_TT, float("-inf")).softmax(-1)
        x_TD = x_TD + self.out(scores_TT @ v_TD)
        rows_TD = self.expert_norm(x_TD)
        probabilities_TE = self.router(rows_TD).to(torch.promote_types(x_TD.dtype, torch.float32)).softmax(-1)
        weights_TK, experts_TK = probabilities_TE.topk(2, -1)
        defer = None if self.store is None else self._defer
        return x_TD + ops.expert_mlp(rows_TD, self.gate_up, self.down, weights_TK, experts_TK, defer_weight_grads=defer)

    def _defer(self, compute: ops.WeightGrads) -> None:
        def land() -> None:
            for weight, gradient in zip((self.gate_up, self.down), compute(), strict=True):
                assert gradient is not None
                accumulate_gradient(weight, gradient)

        assert self.store is not None
        self.store.put(land)


class ToyStage(nn.Module):
    """Some layers; on the last stage also the loss."""

    def __init__(self, layers: range, *, last: bool, dtype: torch.dtype, store: WeightGradStore | None) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): Layer(index, dtype, store) for index in layers})
        self.last, self.dtype = last, dtype

    def output_shape(self, microbatch: Rows) -> tuple[tuple[int, ...], torch.dtype]:
        """As the rows."""
        return tuple(microbatch.x_TD.shape), self.dtype

    def forward(self, microbatch: Rows, x: Tensor | None) -> Tensor:
        """Rows to rows, or to the loss."""
        if x is None:
            x = microbatch.x_TD if microbatch.extra_TD is None else microbatch.x_TD + microbatch.extra_TD
        for layer in self.layers.values():
            x = layer(x)
        assert x is not None
        return ((x - microbatch.target_TD) ** 2).sum() / microbatch.normalizer if self.last else x


def run_alone(
    num_layers: int, rows: list[Rows], dtype: torch.dtype
) -> tuple[list[float], dict[str, Tensor], "CountProducts"]:
    """One process in plain autograd, one micro-batch after the other: losses, gradients, products."""
    model = ToyStage(range(num_layers), last=True, dtype=dtype, store=None)
    losses = []
    with CountProducts() as counter:
        for each in rows:
            loss = model(each, None)
            loss.backward()
            losses.append(float(loss.detach()))
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, counter


class CountProducts(TorchDispatchMode):
    """Counts matrix products, torch's and those in our ops."""

    PRODUCTS: ClassVar[dict[str, int]] = {
        "mm": 1, "addmm": 1, "bmm": 1, "expert_mlp": 2, "expert_mlp_backward": 4, "expert_mlp_backward_inputs": 2,
        "grouped_gemm_wgrad": 1, "grouped_gemm_wgrad_accumulate": 1,
    }  # fmt: skip
    """In one call. tests/ops/test_composed_experts.py counts those of the halves of the experts' backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        self.calls[name] += name in self.PRODUCTS
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """All products."""
        return sum(self.PRODUCTS[name] * count for name, count in self.calls.items() if count)
