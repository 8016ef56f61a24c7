"""Multi-head latent attention (MLA): keys and values of all heads come from one latent a token.

Shape suffixes: T tokens, S tokens whose keys they may see (the same ones, unless the core gathers others), D model,
H heads, Q = N + R query channels (N without position, R rotated), V value channels, C latent, A sequences that decode.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from k25sys.errors import ArgumentTypeError, message
from k25sys.models.attention_core import AttentionCore
from k25sys.models.config import TextConfig
from k25sys.models.documents import Documents, Packing
from k25sys.models.latent_cache import LayerCache
from k25sys.models.rope import RotaryTables, rotate_pairs, softmax_scale


def call(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """function(*inputs)."""
    return function(*inputs)


class LatentAttention(nn.Module):
    """MLA of DeepSeek-V2 as in Kimi K2; parameters carry the released names.

    The number of heads follows from the rows of the projections, so that a part of the heads works as well. `expand`
    calls the functions that make queries, keys and values out of latents; it may be replaced, by one that has them
    computed again in the backward.
    """

    def __init__(self, config: TextConfig, *, implementation: str) -> None:
        super().__init__()
        self.config = config
        dim, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(dim, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(dim, config.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=config.latent_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(dim, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=config.latent_norm_eps)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, dim, bias=False)
        self.core = AttentionCore(implementation, scale=softmax_scale(config), causal=True)
        self.expand: Callable[..., Any] = call

    def forward(
        self,
        x_TD: Tensor,
        tables: RotaryTables,
        documents: Packing,
        *,
        max_logits_H: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Causal attention within documents.

        Args:
            x_TD: (T, D).
            tables: cos and sin of the positions of these tokens.
            documents: the packing.
            max_logits_H: (H,) float32, raised in place to each head's largest softmax input.
            cache: gets the latents of these tokens, one document a prompt.

        Returns:
            (T, D).

        Raises:
            ArgumentTypeError: a cache beside documents of which some of the tokens are elsewhere.
        """
        whole = self.config.q_lora_rank is None
        q_THQ = self._queries(x_TD, *tables) if whole else self.expand(self._queries, self._query_latent(x_TD), *tables)
        latent_TC, k_rope_TR = self.latents(x_TD, tables)
        if cache is not None:
            if not isinstance(documents, Documents):
                got = type(documents).__name__
                raise ArgumentTypeError(message("LatentAttention", "documents", got, "Documents, beside a cache"))
            cache.store_prompts(torch.cat([latent_TC, k_rope_TR], -1), documents)
        latent_SC, k_rope_SR = self.core.gather((latent_TC, k_rope_TR), documents)
        k_SHQ, v_SHV = self.expand(self._keys_and_values, latent_SC, k_rope_SR)
        if max_logits_H is not None:
            torch.maximum(max_logits_H, self.core.max_logits(q_THQ, k_SHQ, documents), out=max_logits_H)
        attended_THV = self.core(q_THQ, k_SHQ, v_SHV, documents)[..., : self.config.v_head_dim]
        return self.o_proj(attended_THV.flatten(1))

    def queries(self, x_TD: Tensor, tables: RotaryTables) -> tuple[Tensor, Tensor]:
        """The queries without position (T, H, N) and the rotated ones (T, H, R)."""
        whole = self.config.q_lora_rank is None
        return self._split_queries(x_TD if whole else self._query_latent(x_TD), tables)

    def _query_latent(self, x_TD: Tensor) -> Tensor:
        return self.q_a_layernorm(self.q_a_proj(x_TD))

    def _split_queries(self, x_TX: Tensor, tables: RotaryTables) -> tuple[Tensor, Tensor]:
        config = self.config
        q = self.q_proj(x_TX) if config.q_lora_rank is None else self.q_b_proj(x_TX)
        q_nope, q_rope = q.unflatten(-1, (-1, config.qk_head_dim)).split(
            [config.qk_nope_head_dim, config.qk_rope_head_dim], -1
        )
        return q_nope, rotate_pairs(q_rope, tables)

    def _queries(self, x_TX: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
        return torch.cat(self._split_queries(x_TX, (cos_TF, sin_TF)), -1)

    def _keys_and_values(self, latent_SC: Tensor, k_rope_SR: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (S, H, Q), and values as wide as the core takes them."""
        k_nope, v_SHV = self._split_heads(self.kv_b_proj(latent_SC))
        k_SHQ = torch.cat([k_nope, k_rope_SR[:, None].expand(-1, k_nope.shape[1], -1)], -1)
        return k_SHQ, self.core.widen(v_SHV, k_SHQ.shape[-1])

    def latents(self, x_TD: Tensor, tables: RotaryTables) -> tuple[Tensor, Tensor]:
        """What a token leaves behind: its normalised latent (T, C) and its rotated key (T, R), shared by all heads."""
        config = self.config
        latent_TC, k_rope_TR = self.kv_a_proj_with_mqa(x_TD).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        return self.kv_a_layernorm(latent_TC), rotate_pairs(k_rope_TR[:, None], tables)[:, 0]

    def decode(self, x_AD: Tensor, tables: RotaryTables, cache: LayerCache) -> Tensor:
        """One more token of each sequence of `cache`: (A, D) -> (A, D).

        The projections that expand latents into keys and values are applied to the query and to the attended latent
        instead (DeepSeek-V2, section 2.1.2), so that the cache is read as it is stored.
        """
        q_nope, q_rope = self.queries(x_AD, tables)
        cache.append(torch.cat(self.latents(x_AD, tables), -1))
        expand_HGC = self.kv_b_proj.weight.unflatten(0, (q_nope.shape[1], -1))
        keys_HNC, values_HVC = expand_HGC.split([self.config.qk_nope_head_dim, self.config.v_head_dim], 1)
        q_AHC = torch.einsum("ahn,hnc->ahc", q_nope, keys_HNC)
        attended_AHC = cache.attend(torch.cat([q_AHC, q_rope], -1), scale=self.core.scale)
        out_AHV = torch.einsum("ahc,hvc->ahv", attended_AHC, values_HVC)
        return self.o_proj(out_AHV.flatten(1))

    def _split_heads(self, kv: Tensor) -> list[Tensor]:
        sizes = [self.config.qk_nope_head_dim, self.config.v_head_dim]
        return list(kv.unflatten(-1, (-1, sum(sizes))).split(sizes, -1))
