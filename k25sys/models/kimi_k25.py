"""Kimi-K2.5: the language model with images and videos in place of its media_pad tokens.

Shape suffixes: B rows of S tokens, T = B * S, D model, V vocabulary, L layers, H heads, P patches, N clips, Q projected
neighbourhoods of patches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from k25sys.errors import ArgumentTypeError, ArgumentValueError, DTypeError, MediaCountError, ShapeError, message
from k25sys.models.config import KimiK25Config
from k25sys.models.decoder import LanguageModel
from k25sys.models.documents import Documents
from k25sys.models.latent_cache import LatentCache
from k25sys.models.moonvit import MoonViT3D, PatchMergerProjector
from k25sys.ops.checks import FLOATS


class KimiK25(nn.Module):
    """The whole model in plain modules; parameters carry the names of the released checkpoint.

    Only the routed experts differ: they are stacked, `...mlp.experts.gate_up_proj` and `...mlp.experts.down_proj`.

    Args:
        config: its sizes.
        attention: "sdpa", "flex" or "flash_attn"; see AttentionCore.
        generator: of the random weights. On the meta device nothing is drawn: after `to_empty`, call
            `reset_parameters`.
    """

    def __init__(
        self, config: KimiK25Config, *, attention: str = "sdpa", generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.language_model = LanguageModel(config.text, attention=attention)
        if config.vision is not None:
            self.vision_tower = MoonViT3D(config.vision, attention=attention)
            self.mm_projector = PatchMergerProjector(config.vision, config.text.hidden_size)
        if self.language_model.lm_head.weight.device.type != "meta":
            self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights ~ N(0, initializer_range), gains 1, biases 0 (the router's too)."""
        for module in self.modules():
            is_norm = isinstance(module, (nn.RMSNorm, nn.LayerNorm))
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("bias"):
                    parameter.zero_()
                elif is_norm:
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, self.config.text.initializer_range, generator=generator)

    def forward(
        self,
        input_ids_BS: Tensor,
        pixel_values: Tensor | None = None,
        grid_thw: Tensor | None = None,
        *,
        media_features: Tensor | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        max_logits_LH: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, S, V) in the dtype of the weights; see `hidden_states` for the arguments and errors."""
        hidden_BSD = self.hidden_states(
            input_ids_BS,
            pixel_values,
            grid_thw,
            media_features=media_features,
            cu_seqlens=cu_seqlens,
            max_logits_LH=max_logits_LH,
        )
        return self.language_model.lm_head(hidden_BSD)

    def hidden_states(
        self,
        input_ids_BS: Tensor,
        pixel_values: Tensor | None = None,
        grid_thw: Tensor | None = None,
        *,
        media_features: Tensor | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        max_logits_LH: Tensor | None = None,
        cache: LatentCache | None = None,
    ) -> Tensor:
        """What the head multiplies: (B, S, D), for losses that never form the logits.

        Args:
            input_ids_BS: (B, S) int32 or int64.
            pixel_values: (P, 3, patch, patch): the patches of all clips, in the order of their media_pad positions.
            grid_thw: (N, 3): (t, h, w) of each clip in patches; a clip fills h * w / 4 positions.
            media_features: (Q, D), what `encode_media` returned, in place of the two arguments above.
            cu_seqlens: where documents begin among the B * S tokens, row after row, and B * S: 0 = c_0 <= ... = B * S.
                Tokens attend, and positions count, within their document. None: each row is one document.
            max_logits_LH: (L, H) float32, on the device of the ids; raised in place to the largest softmax input of
                each head over all pairs of tokens that see each other (QK-Clip's S_h). Start from -inf.
            cache: gets the latents of each document (generation).

        Raises:
            MediaCountError: the media_pad positions are not as many as the projected neighbourhoods.
            TypeError, ValueError: a wrong shape, dtype, packing or grid, or a document longer than the positions.
        """
        self._check_dtype()
        documents = self._documents(input_ids_BS, cu_seqlens)
        self._check_max_logits(max_logits_LH)
        if media_features is None:
            media_features = self.encode_media(pixel_values, grid_thw)
        elif pixel_values is not None or grid_thw is not None:
            hint = "give the pixels or what they encode to"
            raise ArgumentValueError(message("KimiK25", "media_features", "pixels beside it", "one of both", hint))
        x_BSD = self.embed(input_ids_BS, media_features)
        x_TD = self.language_model.model(
            x_BSD.flatten(0, 1), documents, max_logits_LH=max_logits_LH, cache=cache
        )  # fmt: skip
        return x_TD.view(x_BSD.shape)

    def encode_media(self, pixel_values: Tensor | None, grid_thw: Tensor | None) -> Tensor | None:
        """The clips as embeddings (Q, D), in order; None without media."""
        if (pixel_values is None) != (grid_thw is None):
            missing = "pixel_values" if pixel_values is None else "grid_thw"
            raise ArgumentTypeError(message("KimiK25", missing, None, "both pixel_values and grid_thw, or neither"))
        if pixel_values is None or grid_thw is None:
            return None
        if self.config.vision is None:
            raise ArgumentValueError(message("KimiK25", "pixel_values", "a tensor", "None: this model has no vision"))
        return self.mm_projector(self.vision_tower(pixel_values, grid_thw))

    def embed(self, input_ids_BS: Tensor, media_features: Tensor | None) -> Tensor:
        """(B, S, D): token embeddings, with the rows of `media_features` (Q, D) in order at the media_pad positions.

        The number of those positions is read from the device.
        """
        vocabulary = self.config.text.vocab_size
        # On a device the embedding itself asserts it; here its own message would not say which argument is meant.
        if input_ids_BS.device.type == "cpu" and input_ids_BS.numel():
            low, high = (int(token) for token in input_ids_BS.aminmax())
            if low < 0 or high >= vocabulary:
                got = f"token {low if low < 0 else high}"
                raise ArgumentValueError(message("KimiK25", "input_ids_BS", got, f"0 to {vocabulary - 1}"))
        x_BSD = self.language_model.model.embed_tokens(input_ids_BS)
        if self.config.vision is None and media_features is None:
            return x_BSD
        is_media_BS = input_ids_BS == self.config.tokens.media_pad
        num_positions, dim = int(is_media_BS.sum()), x_BSD.shape[-1]
        if media_features is not None and media_features.shape[1:] != (dim,):
            raise ShapeError(message("KimiK25", "media_features", tuple(media_features.shape), f"(Q, {dim})"))
        num_features = 0 if media_features is None else media_features.shape[0]
        if num_positions != num_features:
            got = f"{num_positions} positions of media_pad (id {self.config.tokens.media_pad})"
            accepted = f"{num_features}, the rows that the media encode to"
            raise MediaCountError(message("KimiK25", "input_ids_BS", got, accepted, "a clip fills h * w / 4 positions"))
        if media_features is None:
            return x_BSD
        return x_BSD.masked_scatter(is_media_BS[..., None], media_features.to(x_BSD.dtype))

    def _check_dtype(self) -> None:
        dtype = self.language_model.model.embed_tokens.weight.dtype
        if dtype not in FLOATS:
            hint = "convert the model with .to(torch.bfloat16)"
            raise DTypeError(message("KimiK25", "weights", dtype, "bfloat16, float32 or float64", hint))

    def _documents(self, input_ids: Tensor, cu_seqlens: Tensor | Sequence[int] | None) -> Documents:
        if not isinstance(input_ids, Tensor):
            raise ArgumentTypeError(message("KimiK25", "input_ids_BS", type(input_ids).__name__, "a torch.Tensor"))
        if input_ids.dtype not in (torch.int32, torch.int64):
            raise DTypeError(message("KimiK25", "input_ids_BS", input_ids.dtype, "int32 or int64"))
        if input_ids.dim() != 2:
            raise ShapeError(message("KimiK25", "input_ids_BS", tuple(input_ids.shape), "(B, S)"))
        num_rows, length = input_ids.shape
        if cu_seqlens is None:
            documents = Documents((length,) * num_rows if length else (), input_ids.device)
        else:
            documents = Documents.from_cu_seqlens("KimiK25", cu_seqlens, num_rows * length, input_ids.device)
        most = self.config.text.max_position_embeddings
        if documents.max_length > most:
            got = f"a document of {documents.max_length} tokens"
            raise ArgumentValueError(message("KimiK25", "input_ids_BS", got, f"up to max_position_embeddings {most}"))
        return documents

    def _check_max_logits(self, max_logits: Tensor | None) -> None:
        shape = (self.config.text.num_hidden_layers, self.config.text.num_attention_heads)
        if max_logits is not None and (tuple(max_logits.shape) != shape or max_logits.dtype != torch.float32):
            got = f"{max_logits.dtype} of shape {tuple(max_logits.shape)}"
            raise ShapeError(message("KimiK25", "max_logits_LH", got, f"float32 of shape {shape}"))
