"""QK-Clip: after the update, heads whose attention logits grew past a threshold are scaled back (K2, algorithm 1).

For a head with S_h = its largest softmax input > tau, gamma = tau / S_h: query rows without position and the key rows
of kv_b_proj times sqrt(gamma), rotated query rows times gamma; the shared rotated key and the value rows stay. Every
logit of that head is then multiplied by gamma.
"""

import torch
from torch import Tensor

from k25sys.errors import ShapeError, message


def clip_factors(max_logits_H: Tensor, max_logit: float) -> Tensor:
    """(H,) float32: gamma of each head, 1 where it is within `max_logit` or saw no tokens (-inf)."""
    return (max_logit / max_logits_H.float().clamp_min(max_logit)).clamp_max(1.0)


def query_row_factors(gamma_H: Tensor, *, nope: int, rope: int) -> Tensor:
    """(H * (nope + rope),): the factor of each row of q_proj or q_b_proj, head by head."""
    plain, turned = gamma_H.sqrt()[:, None].expand(-1, nope), gamma_H[:, None].expand(-1, rope)
    return torch.cat([plain, turned], 1).flatten()


def key_value_row_factors(gamma_H: Tensor, *, nope: int, value: int) -> Tensor:
    """(H * (nope + value),): the factor of each row of kv_b_proj, head by head: keys, then values, which stay."""
    keys = gamma_H.sqrt()[:, None].expand(-1, nope)
    return torch.cat([keys, torch.ones_like(gamma_H)[:, None].expand(-1, value)], 1).flatten()


@torch.no_grad()
def scale_rows(weight_part: Tensor, factors_N: Tensor, begin: int, columns: int) -> None:
    """Multiplies a flat piece of a weight (N, columns), from element `begin` on, by its rows' factors, in place.

    Raises:
        ShapeError: a piece that reaches past the weight.
    """
    end = begin + weight_part.numel()
    if end > len(factors_N) * columns:
        accepted = f"elements of a weight of {len(factors_N)} x {columns}"
        raise ShapeError(message("scale_rows", "weight_part", f"elements {begin} to {end}", accepted))
    first, last = begin // columns, -(-end // columns)
    factors = factors_N[first:last].to(weight_part.dtype).repeat_interleave(columns)
    offset = begin - first * columns
    weight_part.view(-1).mul_(factors[offset : offset + weight_part.numel()])
