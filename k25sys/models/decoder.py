"""The language model of Kimi K2.5: embeddings, pre-norm layers of MLA and (mixtures of) SwiGLU, an untied head.

Shape suffixes: T tokens of all documents, D model, V vocabulary, L layers, H heads, A sequences that decode.
"""

from torch import Tensor, nn

from k25sys.models.attention import LatentAttention
from k25sys.models.config import TextConfig
from k25sys.models.documents import Packing, TokenPacking
from k25sys.models.latent_cache import LatentCache, LayerCache
from k25sys.models.moe import MixtureOfExperts, SwiGLU
from k25sys.models.rope import RotaryTables, text_tables


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `index` decides between a dense mlp and experts."""

    def __init__(self, config: TextConfig, index: int, *, attention: str) -> None:
        super().__init__()
        dense = index < config.first_k_dense_replace
        self.self_attn = LatentAttention(config, implementation=attention)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size) if dense else MixtureOfExperts(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        x_TD: Tensor,
        tables: RotaryTables,
        documents: Packing,
        *,
        max_logits_H: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """(T, D) -> (T, D); see LatentAttention.forward for the arguments."""
        x_TD = x_TD + self.self_attn(
            self.input_layernorm(x_TD), tables, documents, max_logits_H=max_logits_H, cache=cache
        )
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))

    def decode(self, x_AD: Tensor, tables: RotaryTables, cache: LayerCache) -> Tensor:
        """One more token of each running sequence: (A, D) -> (A, D)."""
        x_AD = x_AD + self.self_attn.decode(self.input_layernorm(x_AD), tables, cache)
        return x_AD + self.mlp(self.post_attention_layernorm(x_AD))


class Decoder(nn.Module):
    """Embeddings, layers and the last norm. `layers` is keyed by number, so that a part of them keeps its names."""

    def __init__(self, config: TextConfig, *, attention: str) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict(
            {str(i): DecoderLayer(config, i, attention=attention) for i in range(config.num_hidden_layers)}
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        x_TD: Tensor,
        documents: TokenPacking,
        *,
        max_logits_LH: Tensor | None = None,
        cache: LatentCache | None = None,
    ) -> Tensor:
        """From embeddings to normalised hidden states, (T, D) -> (T, D).

        Args:
            x_TD: embeddings, media included.
            documents: the packing; positions restart in each document.
            max_logits_LH: (L, H) float32, raised in place to each head's largest softmax input.
            cache: gets the latents of all layers.
        """
        tables = text_tables(self.config, documents.positions_T)
        for i, layer in enumerate(self.layers.values()):
            x_TD = layer(
                x_TD,
                tables,
                documents,
                max_logits_H=None if max_logits_LH is None else max_logits_LH[i],
                cache=None if cache is None else cache.layers[i],
            )
        return self.norm(x_TD)

    def decode(self, input_ids_A: Tensor, cache: LatentCache) -> Tensor:
        """One more token of each running sequence: ids (A,) -> normalised hidden states (A, D)."""
        tables = text_tables(self.config, cache.next_positions())
        x_AD = self.embed_tokens(input_ids_A)
        for layer, layer_cache in zip(self.layers.values(), cache.layers, strict=True):
            assert isinstance(layer, DecoderLayer)
            x_AD = layer.decode(x_AD, tables, layer_cache)
        return self.norm(x_AD)


class LanguageModel(nn.Module):
    """The decoder and its head, under the released names `model` and `lm_head`."""

    def __init__(self, config: TextConfig, *, attention: str) -> None:
        super().__init__()
        self.model = Decoder(config, attention=attention)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
