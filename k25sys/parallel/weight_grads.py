"""Weight gradients that can wait: the backward of a linear layer in two halves, as zero-bubble schedules need them.

Autograd gives a weight's gradient with the input's. Here the function that needs a weight's gradient hands its
computation to a WeightGradStore: it runs at once, or, inside `deferring`, when the schedule says so. No product is
computed twice, and the graph is freed by the first half (torch keeps it for the second, and calls a custom
autograd.Function in both).
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def accumulate_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Adds to `parameter.main_grad` where the optimiser has put one (float32 or wider), else to `parameter.grad`.

    `parameter.on_gradient`, where set, is called afterwards: it tells buckets that this gradient is complete.
    """
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is not None:
        main_grad.add_(gradient)
        gradient_landed(parameter)
    elif parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)


def gradient_landed(parameter: Tensor) -> None:
    """Calls `parameter.on_gradient`, where set: for whoever adds to main_grad itself."""
    on_gradient = getattr(parameter, "on_gradient", None)
    if on_gradient is not None:
        on_gradient()


class WeightGradStore:
    """Computations of weight gradients, run at once or kept under the key of the micro-batch they belong to."""

    def __init__(self) -> None:
        self._key: Hashable | None = None
        self._kept: defaultdict[Hashable, list[Callable[[], None]]] = defaultdict(list)

    @property
    def is_deferring(self) -> bool:
        """Whether `put` keeps what it gets."""
        return self._key is not None

    @contextmanager
    def deferring(self, key: Hashable) -> Iterator[None]:
        """Inside, `put` keeps computations under `key` until `run(key)`."""
        assert self._key is None, f"{key} inside {self._key}"
        assert key not in self._kept, key
        self._key = key
        try:
            yield
        finally:
            self._key = None

    def put(self, compute: Callable[[], None]) -> None:
        """Runs `compute`, or keeps it."""
        if self._key is None:
            compute()
        else:
            self._kept[self._key].append(compute)

    @torch.no_grad()
    def run(self, key: Hashable) -> None:
        """Runs what is kept under `key`, in the order in which it came, and forgets it."""
        for compute in self._kept.pop(key, []):
            compute()

    @property
    def num_kept(self) -> int:
        """Computations that wait; 0 after a complete step."""
        return sum(map(len, self._kept.values()))

    def clear(self) -> None:
        """Forgets everything: after a failed step."""
        self._kept.clear()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, store: WeightGradStore) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Saved, the weight is checked for changes; under saved-tensor hooks it comes back as another object, without
        # its main_grad.
        ctx.weight, ctx.bias, ctx.store, ctx.dtype = weight, bias, store, x.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, _ = ctx.saved_tensors
        weight, bias, store = ctx.weight, ctx.bias, ctx.store
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad @ weight if needs_x else None
        if needs_weight or needs_bias:
            x = x.detach()  # or it would hold the graph that made it

            def compute() -> None:
                rows, grad_rows = x.flatten(0, -2), grad.flatten(0, -2)
                if needs_weight:
                    accumulate_gradient(weight, grad_rows.T @ rows)
                if needs_bias:
                    accumulate_gradient(bias, grad_rows.sum(0))

            store.put(compute)
        return grad_x, None, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, store: WeightGradStore) -> Tensor:
    """F.linear whose weight and bias gradients are computed when `store` says so, and accumulated by
    `accumulate_gradient`; autograd never sees them.

    Args:
        x: (..., K).
        weight: (N, K) leaf, dtype of x. bias: (N,) leaf or None.
    """
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias, store)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear over `linear`; takes over the parameters of `layer`."""

    def __init__(self, layer: nn.Linear, store: WeightGradStore) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.store = store

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return linear(input, self.weight, self.bias, self.store)
