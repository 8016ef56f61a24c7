"""Softmax attention within documents: torch's SDPA, FlexAttention or flash-attn, chosen by name.

Shape suffixes: T rows, H heads, Q query channels, V value channels.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from k25sys.errors import BackendError, message
from k25sys.models.documents import Documents

IMPLEMENTATIONS = ("sdpa", "flex", "flash_attn")
_TILE = 512  # rows and columns of the scores that max_softmax_logits holds at a time


class AttentionCore(nn.Module):
    """softmax(scale * q k^T) v within each document; `causal`: a row sees itself and what comes before it.

    It has no parameters: whoever distributes the heads or the rows puts another module in its place.

    Args:
        implementation: "sdpa" (a call per document, or one for all where their lengths agree), "flex" (compiled on
            CUDA; on the CPU eager, with the scores in memory and without a backward) or "flash_attn" (CUDA, the
            flash-attn package). None replaces another one silently.

    Raises:
        BackendError: an unknown implementation, or, when it is called, one that cannot run here, with the reason.
    """

    def __init__(self, implementation: str, *, scale: float, causal: bool) -> None:
        super().__init__()
        if implementation not in IMPLEMENTATIONS:
            raise BackendError(message("attention", "implementation", repr(implementation), ", ".join(IMPLEMENTATIONS)))
        self.implementation, self.scale, self.causal = implementation, scale, causal

    def widen(self, v_THV: Tensor, width: int) -> Tensor:
        """The values as the implementation saves them for the backward, beside queries of `width` channels: with zeros
        up to that width where it takes one width only. `forward` takes them like this too."""
        return v_THV if self.implementation == "flex" else F.pad(v_THV, (0, max(0, width - v_THV.shape[-1])))

    def forward(self, q_THQ: Tensor, k_THQ: Tensor, v_THV: Tensor, documents: Documents) -> Tensor:
        """The attended values (T, H, V) in the dtype of q."""
        attend = {"sdpa": _sdpa, "flex": _flex, "flash_attn": _flash_attn}[self.implementation]
        return attend(q_THQ, k_THQ, v_THV, documents, self.scale, self.causal)


def _pad_values(q: Tensor, v: Tensor) -> Tensor:
    """Values as wide as queries (192 channels for MLA's 128): fused kernels take one width only, and without one the
    scores would be materialised."""
    return F.pad(v, (0, q.shape[-1] - v.shape[-1]))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, causal: bool) -> Tensor:
    lengths, value_dim = documents.lengths, v.shape[-1]
    if not lengths:
        return v
    if value_dim < q.shape[-1]:
        v = _pad_values(q, v)
    if len(set(lengths)) == 1:
        groups = [tuple(x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (q, k, v))]
    else:
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        groups = [tuple(x[None].transpose(1, 2) for x in part) for part in parts]
    attended = [
        F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale) for query, key, value in groups
    ]
    return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in attended])[..., :value_dim]


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, causal: bool) -> Tensor:
    on_cpu = q.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        hint = "use 'sdpa' to train on the CPU"
        raise BackendError(message("attention", "implementation", "'flex' with a gradient on cpu", "'sdpa'", hint))
    mask = documents.causal_mask if causal else documents.full_mask
    attend: Callable[..., Any] = flex_attention if on_cpu else _compiled_flex_attention()
    query, key, value = (x[None].transpose(1, 2) for x in (q, k, v))
    return attend(query, key, value, block_mask=mask, scale=scale)[0].transpose(0, 1)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, causal: bool) -> Tensor:
    accepted = "'sdpa' or 'flex'"
    if importlib.util.find_spec("flash_attn") is None:
        hint = "the package flash-attn is not installed"
        raise BackendError(message("attention", "implementation", "'flash_attn'", accepted, hint))
    if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        got = f"'flash_attn' with {q.dtype} on {q.device}"
        raise BackendError(message("attention", "implementation", got, f"{accepted}, or bfloat16 on cuda"))
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return _varlen(flash_attn_varlen_func, q, k, v, documents, scale, causal)


def _varlen(
    kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, causal: bool
) -> Tensor:
    """`kernel` has flash_attn_varlen_func's signature and takes one width for queries, keys and values."""
    bounds, longest, width = documents.cu_seqlens, documents.max_length, max(q.shape[-1], v.shape[-1])
    padded = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    out = kernel(*padded, bounds, bounds, longest, longest, softmax_scale=scale, causal=causal)
    return out[..., : v.shape[-1]]


@torch.no_grad()
def max_softmax_logits(
    q_THQ: Tensor, k_THQ: Tensor, documents: Documents, *, scale: float, causal: bool = True
) -> Tensor:
    """(H,) float32: each head's largest softmax input, scale * q k, over the pairs of rows that see each other.

    S_h of QK-Clip (Kimi K2, algorithm 1). Tiles of 512 x 512 scores are held at a time. -inf without rows.
    """
    largest_H = q_THQ.new_full((q_THQ.shape[1],), float("-inf"), dtype=torch.float32)
    q_HTQ, k_HTQ = (x.transpose(0, 1) for x in (q_THQ, k_THQ))
    for begin, end in documents.bounds:
        for row in range(begin, end, _TILE):
            rows_end = min(row + _TILE, end)
            for column in range(begin, rows_end if causal else end, _TILE):
                columns_end = min(column + _TILE, end)
                scores = q_HTQ[:, row:rows_end].float() @ k_HTQ[:, column:columns_end].float().mT
                if causal and columns_end > row + 1:
                    future = scores.new_ones(scores.shape[1:], dtype=torch.bool).triu(row - column + 1)
                    scores = scores.masked_fill_(future, float("-inf"))
                largest_H = torch.maximum(largest_H, scores.amax((1, 2)) * scale)
    return largest_H
