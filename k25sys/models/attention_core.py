"""Softmax attention within documents: torch's SDPA, FlexAttention or flash-attn, chosen by name.

Shape suffixes: T rows of queries, S rows of keys (the same, unless they were gathered), H heads, Q query channels,
V value channels.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import flex_attention

from k25sys.errors import BackendError, message
from k25sys.models.documents import Packing

IMPLEMENTATIONS = ("sdpa", "flex", "flash_attn")
_TILE = 512  # rows and columns of the scores that max_softmax_logits holds at a time
_MASK_ENTRIES = 1 << 24  # of the masks for fewer rows than keys that the CPU's kernel needs


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

    def widen(self, v_SHV: Tensor, width: int) -> Tensor:
        """The values as the implementation saves them for the backward, beside queries of `width` channels: with zeros
        up to that width where it takes one width only. `forward` takes them like this too."""
        return v_SHV if self.implementation == "flex" else F.pad(v_SHV, (0, max(0, width - v_SHV.shape[-1])))

    def gather(self, rows: tuple[Tensor, ...], documents: Packing) -> tuple[Tensor, ...]:
        """Of what a row leaves behind for others to see, all that the rows here may see: here it is all there is.

        Args:
            rows: tensors (T, ...) of what keys and values are made of.

        Returns:
            As many, (S, ...).
        """
        return rows

    def forward(self, q_THQ: Tensor, k_SHQ: Tensor, v_SHV: Tensor, documents: Packing) -> Tensor:
        """The attended values (T, H, V) in the dtype of q."""
        if not q_THQ.shape[0]:
            return v_SHV[:0]
        attend = {"sdpa": _sdpa, "flex": _flex, "flash_attn": _flash_attn}[self.implementation]
        return attend(q_THQ, k_SHQ, v_SHV, documents, self.scale, self.causal)

    def max_logits(self, q_THQ: Tensor, k_SHQ: Tensor, documents: Packing) -> Tensor:
        """(H,) float32, without a gradient: see max_softmax_logits."""
        return max_softmax_logits(q_THQ, k_SHQ, documents, scale=self.scale, causal=self.causal)


def _pad_values(q: Tensor, v: Tensor) -> Tensor:
    """Values as wide as queries (192 channels for MLA's 128): fused kernels take one width only, and without one the
    scores would be materialised."""
    return F.pad(v, (0, q.shape[-1] - v.shape[-1]))


def _sees_itself(q: Tensor, k: Tensor, pieces: Sequence[tuple[range, range]]) -> bool:
    """Whether the keys are those of the rows of queries."""
    return len(q) == len(k) and all(rows == keys for rows, keys in pieces)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, documents: Packing, scale: float, causal: bool) -> Tensor:
    pieces, value_dim = documents.pieces, v.shape[-1]
    if value_dim < q.shape[-1]:
        v = _pad_values(q, v)
    if len({len(rows) for rows, _ in pieces}) == 1 and _sees_itself(q, k, pieces):
        query, key, value = (x.unflatten(0, (len(pieces), -1)).transpose(1, 2) for x in (q, k, v))
        attended = [F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)]
    else:
        attended = []
        for rows, keys in pieces:
            parts = (q[rows.start : rows.stop], k[keys.start : keys.stop], v[keys.start : keys.stop])
            query, key, value = (x[None].transpose(1, 2) for x in parts)
            attended += _sdpa_piece(query, key, value, scale, causal)
    return torch.cat([x.transpose(1, 2).flatten(0, 1) for x in attended])[..., :value_dim]


def _sdpa_piece(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> list[Tensor]:
    """Attended values of consecutive rows; causal: the last row of q sees all of k. All are (1, H, rows, channels)."""
    num_rows, num_keys = q.shape[2], k.shape[2]
    if not causal or num_rows in (1, num_keys):
        triangle = causal and num_rows > 1  # torch's own begins at the first key
        return [F.scaled_dot_product_attention(q, k, v, is_causal=triangle, scale=scale)]
    if q.device.type != "cpu":  # its fused kernels know where the diagonal ends
        return [F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(num_rows, num_keys), scale=scale)]
    step, attended = max(1, _MASK_ENTRIES // num_keys), []
    for row in range(0, num_rows, step):
        end = min(row + step, num_rows)
        seen = num_keys - num_rows + end
        visible = torch.ones(end - row, seen, dtype=torch.bool).tril(seen - (end - row))
        query, key, value = q[:, :, row:end], k[:, :, :seen], v[:, :, :seen]
        attended.append(F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale))
    return attended


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


def _flex(q: Tensor, k: Tensor, v: Tensor, documents: Packing, scale: float, causal: bool) -> Tensor:
    on_cpu = q.device.type == "cpu"
    if on_cpu and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        hint = "use 'sdpa' to train on the CPU"
        raise BackendError(message("attention", "implementation", "'flex' with a gradient on cpu", "'sdpa'", hint))
    mask = documents.block_mask(causal)
    attend: Callable[..., Any] = flex_attention if on_cpu else _compiled_flex_attention()
    query, key, value = (x[None].transpose(1, 2) for x in (q, k, v))
    return attend(query, key, value, block_mask=mask, scale=scale)[0].transpose(0, 1)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, documents: Packing, scale: float, causal: bool) -> Tensor:
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
    kernel: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, documents: Packing, scale: float, causal: bool
) -> Tensor:
    """`kernel` has flash_attn_varlen_func's signature and takes one width for queries, keys and values."""
    pieces, value_dim = documents.pieces, v.shape[-1]
    width = max(q.shape[-1], value_dim)
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    if not _sees_itself(q, k, pieces):  # pieces of one document share keys: each gets its own copy
        k, v = (torch.cat([x[keys.start : keys.stop] for _, keys in pieces]) for x in (k, v))
    longest = [max(len(piece[side]) for piece in pieces) for side in (0, 1)]
    # Causal: the last row sees the last key (flash-attn from 2.1 on).
    bounds = documents.cu_seqlens, documents.key_cu_seqlens
    return kernel(q, k, v, *bounds, *longest, softmax_scale=scale, causal=causal)[..., :value_dim]


@torch.no_grad()
def max_softmax_logits(
    q_THQ: Tensor, k_SHQ: Tensor, documents: Packing, *, scale: float, causal: bool = True
) -> Tensor:
    """(H,) float32: each head's largest softmax input, scale * q k, over the pairs of rows that see each other.

    S_h of QK-Clip (Kimi K2, algorithm 1). Tiles of 512 x 512 scores are held at a time. -inf without rows.
    """
    largest_H = q_THQ.new_full((q_THQ.shape[1],), float("-inf"), dtype=torch.float32)
    q_HTQ, k_HSQ = q_THQ.transpose(0, 1), k_SHQ.transpose(0, 1)
    for rows, keys in documents.pieces:
        diagonal = keys.stop - rows.stop  # row i sees keys up to i + diagonal
        for row in range(rows.start, rows.stop, _TILE):
            rows_end = min(row + _TILE, rows.stop)
            for column in range(keys.start, rows_end + diagonal if causal else keys.stop, _TILE):
                columns_end = min(column + _TILE, keys.stop)
                scores = q_HTQ[:, row:rows_end].float() @ k_HSQ[:, column:columns_end].float().mT
                if causal and columns_end > row + diagonal + 1:
                    future = scores.new_ones(scores.shape[1:], dtype=torch.bool).triu(row + diagonal - column + 1)
                    scores = scores.masked_fill_(future, float("-inf"))
                largest_H = torch.maximum(largest_H, scores.amax((1, 2)) * scale)
    return largest_H
