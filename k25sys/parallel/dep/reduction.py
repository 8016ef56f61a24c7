"""Gradients summed pack by pack in one order, whoever computed them: the deterministic mode of phase (c)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from k25sys.parallel.weight_grads import accumulate_gradient


def sum_in_order(
    parameters: Sequence[nn.Parameter],
    owners: Sequence[int],
    rank: int,
    group: dist.ProcessGroup | None,
    compute: Callable[[int], None],
) -> None:
    """Runs `compute(number)` of every pack on its owner and leaves the sum on rank 0, zeros elsewhere.

    The sum is ((0 + pack 0) + pack 1) + ..., so that it does not depend on the number of ranks. Packs are taken in
    windows of as many as there are ranks: a rank holds the gradients of its packs of one window, the sum, and one copy
    that travels. Every pack's gradients go to every rank.

    Args:
        parameters: of the encoder.
        owners: by pack.
        compute: adds a pack's gradients to the parameters'.
    """
    total = _flat(parameters)
    window = 1 if group is None else dist.get_world_size(group)
    for first in range(0, len(owners), window):
        numbers = range(first, min(first + window, len(owners)))
        partial = {number: _flat(parameters) for number in numbers if owners[number] == rank}
        for number, gradients in partial.items():
            with _gradients_in(parameters, gradients):
                compute(number)
        for number in numbers:
            gradients = partial.pop(number) if number in partial else _flat(parameters)
            if group is not None:
                dist.broadcast(gradients, owners[number], group=group)
            total += gradients
    if rank == 0:
        for parameter, gradient in zip(parameters, _views(parameters, total), strict=True):
            accumulate_gradient(parameter, gradient.to(parameter.dtype) if _has_no_buffer(parameter) else gradient)


def _has_no_buffer(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "main_grad", None) is None


def _flat(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Zeros for all gradients, in float32 or wider."""
    first = parameters[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    return torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=dtype, device=first.device)


def _views(parameters: Sequence[nn.Parameter], flat: Tensor) -> list[Tensor]:
    parts = flat.split([parameter.numel() for parameter in parameters])
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]


@contextmanager
def _gradients_in(parameters: Sequence[nn.Parameter], flat: Tensor) -> Iterator[None]:
    """Inside, gradients are added to `flat` instead of where they were added before."""
    kept = [(getattr(p, "main_grad", None), getattr(p, "on_gradient", None), p.grad) for p in parameters]
    for parameter, view in zip(parameters, _views(parameters, flat), strict=True):
        parameter.main_grad, parameter.on_gradient, parameter.grad = view, None, None  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
        for parameter, view in zip(parameters, _views(parameters, flat), strict=True):
            if parameter.grad is not None:  # autograd's own, of a parameter without a hook that moves it
                view.add_(parameter.grad)
    finally:
        for parameter, (main_grad, on_gradient, grad) in zip(parameters, kept, strict=True):
            parameter.grad, parameter.on_gradient = grad, on_gradient  # pyright: ignore[reportAttributeAccessIssue]
            parameter.main_grad = main_grad  # pyright: ignore[reportAttributeAccessIssue]
