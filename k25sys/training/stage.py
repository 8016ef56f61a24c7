"""A pipeline stage of Kimi-K2.5: some of its layers; the first one embeds tokens, the last one computes the loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k25sys.errors import ArgumentValueError, MediaCountError, ShapeError, message
from k25sys.models import KimiK25
from k25sys.models.config import KimiK25Config
from k25sys.models.decoder import DecoderLayer
from k25sys.models.documents import Documents, TokenPacking
from k25sys.models.rope import text_tables
from k25sys.parallel.activation_store import SavedActivations
from k25sys.parallel.context import ShardedDocuments
from k25sys.parallel.dep import Clip, make_packs, splice, taken
from k25sys.parallel.grid import RankGrid
from k25sys.parallel.vocabulary import VocabParallelHead
from k25sys.training.microbatch import MediaSource, MicroBatch


@dataclass(frozen=True)
class LocalTokens:
    """What one rank of a stage computes of a micro-batch: its context rank's tokens, and its own part of those.

    Between layers a rank holds `own`, T / tensor consecutive ones of its context rank's tokens.
    """

    documents: TokenPacking
    """Of the context rank's tokens."""
    context_C: Tensor
    """(C,) int64: the place in the micro-batch of each token of the context rank."""
    own: slice
    """Which of those are this rank's."""

    @classmethod
    def of(cls, batch: MicroBatch, grid: RankGrid, rank: int | None = None) -> "LocalTokens":
        """Of this rank, or of another one of its stage.

        Raises:
            ValueError: tokens that the tensor ranks do not divide.
        """
        sizes = grid.sizes
        rank = grid.rank if rank is None else rank
        tensor = sizes.tensor
        lengths = tuple(end - begin for begin, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True))
        lengths, device = tuple(length for length in lengths if length), batch.input_ids_T.device
        if batch.num_tokens % tensor:
            accepted = f"a multiple of the {tensor} tensor ranks"
            raise ShapeError(message("Stage", "micro-batch", f"{batch.num_tokens} tokens", accepted, "pad it"))
        if sizes.context == 1:
            documents, context_C = Documents(lengths, device), torch.arange(batch.num_tokens, device=device)
        else:
            index = sizes.coordinate(rank, "context")
            documents = ShardedDocuments(lengths, device, sizes.context, index, tensor)
            context_C = torch.cat([torch.arange(part.start, part.stop) for part in documents.owned[index]]).to(device)
        part = len(context_C) // tensor
        place = sizes.coordinate(rank, "tensor")
        return cls(documents, context_C, slice(place * part, (place + 1) * part))

    @property
    def own_T(self) -> Tensor:
        """(T,): the place in the micro-batch of each of this rank's tokens."""
        return self.context_C[self.own]


def media_consumers(batch: MicroBatch, media_pad: int, grid: RankGrid, first_rank: int) -> Tensor:
    """(Q,): the rank of the first stage, global, that holds each media_pad position of a micro-batch.

    Args:
        first_rank: any rank of the first stage that shares the micro-batch's data coordinate.
    """
    owner_T = torch.full_like(batch.input_ids_T, -1)
    sizes = grid.sizes
    data = sizes.coordinate(first_rank, "data")
    for rank in sizes.ranks(first_rank, "stage"):
        if sizes.coordinate(rank, "data") == data:
            owner_T[LocalTokens.of(batch, grid, rank).own_T] = rank
    return owner_T[batch.input_ids_T == media_pad]


def encode_in_packs(
    encode: Callable[[Tensor, Tensor], Tensor], pixel_values: Tensor, grid_thw: Tensor, max_patches: int
) -> Tensor:
    """The clips of a micro-batch as embeddings (Q, D), in the packs of a decoupled encoder: the same products.

    Args:
        encode: (P, 3, patch, patch) and grids of one pack -> its rows.
        pixel_values, grid_thw: of all clips.
    """
    clips = [Clip(0, 0, index, (int(t), int(h), int(w))) for index, (t, h, w) in enumerate(grid_thw.tolist())]
    packs = make_packs(clips, max_patches=max_patches)
    parts = pixel_values.split([pack.num_patches for pack in packs])
    grids = [torch.tensor([clip.grid for clip in pack.clips]) for pack in packs]
    return torch.cat([encode(part, grid) for part, grid in zip(parts, grids, strict=True)])


class Stage(nn.Module):
    """Consecutive layers with parallel parts, as the pipeline's runtime runs them.

    Parameters keep the released names below `language_model` (and `vision_tower`, `mm_projector`): see
    `parallelize`, which makes it.

    Args:
        model: KimiK25 with the parts of this stage alone, parallel where they are split.
        first, last: whether it embeds tokens; whether it computes the loss.
        max_patches: in a pack of the encoder, where it lies in this stage.
        memory: what the memory plan of `model` saves.
    """

    def __init__(
        self,
        model: KimiK25,
        config: KimiK25Config,
        grid: RankGrid,
        *,
        first: bool,
        last: bool,
        dtype: torch.dtype,
        max_patches: int,
        memory: SavedActivations,
    ) -> None:
        super().__init__()
        self.model, self.config, self.grid = model, config, grid
        self.first, self.last, self.dtype, self.memory = first, last, dtype, memory
        decoder = model.language_model.model
        self.layers = [layer for layer in decoder.layers.values() if isinstance(layer, DecoderLayer)]
        heads = config.text.num_attention_heads // grid.size("tensor")
        self.max_logits_LH = torch.full((len(self.layers), heads), float("-inf"), device=grid.device_type)
        self.max_patches = max_patches

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The numbers of its layers in the whole model."""
        return tuple(int(name) for name in self.model.language_model.model.layers)

    def output_shape(self, microbatch: MicroBatch) -> tuple[tuple[int, ...], torch.dtype]:
        """What leaves this rank's part of the stage: (T, D) in the model's dtype."""
        local = LocalTokens.of(microbatch, self.grid)
        return (len(local.own_T), self.config.text.hidden_size), self.dtype

    def forward(self, microbatch: MicroBatch, x_TD: Tensor | None) -> Tensor:
        """From tokens, or the (T, D) of the stage before, to (T, D), or on the last stage to the loss.

        The loss is this context rank's part of the micro-batch's; the sum over context and data ranks and micro-batches
        is the mean over the step's loss tokens.
        """
        local = LocalTokens.of(microbatch, self.grid)
        with self.memory.saving():
            hidden_TD = self._embed(microbatch, local) if self.first else x_TD
            assert hidden_TD is not None
            if torch.is_grad_enabled() and not hidden_TD.requires_grad:
                # With frozen embeddings, only ranks with media among their tokens have a gradient here; but those that
                # share layers exchange tokens in the backward, all of them or none.
                hidden_TD = hidden_TD.detach().requires_grad_()
            tables = text_tables(self.config.text, local.documents.positions_T)
            for layer, max_logits_H in zip(self.layers, self.max_logits_LH, strict=True):
                hidden_TD = layer(hidden_TD, tables, local.documents, max_logits_H=max_logits_H)
            return self._loss(microbatch, local, hidden_TD) if self.last else hidden_TD

    def _embed(self, batch: MicroBatch, local: LocalTokens) -> Tensor:
        vocabulary = self.config.text.vocab_size
        if batch.num_tokens:
            low, high = (int(token) for token in batch.input_ids_T.aminmax())
            if low < 0 or high >= vocabulary:
                got = f"token {low if low < 0 else high}"
                raise ArgumentValueError(message("Stage", "input_ids_T", got, f"0 to {vocabulary - 1}"))
        decoder = self.model.language_model.model
        x_TD = decoder.embed_tokens(batch.input_ids_T[local.context_C])
        is_media_T = batch.input_ids_T == self.config.tokens.media_pad
        if self.config.vision is None or not bool(is_media_T.any()):
            return x_TD
        index_R = is_media_T[local.own_T].nonzero()[:, 0]
        if batch.media is not None:
            return self._splice(x_TD, index_R, batch.media)
        features_QD = self._features(batch, int(is_media_T.sum()))
        place_T = is_media_T.cumsum(0) - 1
        return splice(x_TD, index_R, features_QD[place_T[local.own_T][index_R]])

    def _splice(self, x_TD: Tensor, index_R: Tensor, media: MediaSource) -> Tensor:
        """Media that were encoded elsewhere, projected here where the projector is here."""
        if not hasattr(self.model, "mm_projector"):
            return splice(x_TD, index_R, media.rows(), media.return_gradient)
        return splice(x_TD, index_R, self.model.mm_projector(taken(media.rows(), media.return_gradient)))

    def _features(self, batch: MicroBatch, num_positions: int) -> Tensor:
        if not hasattr(self.model, "vision_tower") or batch.pixel_values is None or batch.grid_thw is None:
            got = f"{num_positions} positions of media_pad without pixels"
            raise MediaCountError(message("Stage", "input_ids_T", got, "pixels and an encoder, or encoded media"))
        features_QD = encode_in_packs(self._encode, batch.pixel_values, batch.grid_thw, self.max_patches)
        if len(features_QD) != num_positions:
            got = f"{num_positions} positions of media_pad"
            accepted = f"{len(features_QD)}, the rows that the media encode to"
            raise MediaCountError(message("Stage", "input_ids_T", got, accepted))
        return features_QD

    def _encode(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        features_QD = self.model.encode_media(pixel_values, grid_thw)
        assert features_QD is not None
        return features_QD

    def _loss(self, batch: MicroBatch, local: LocalTokens, x_TD: Tensor) -> Tensor:
        language_model, at_C = self.model.language_model, local.context_C
        hidden_TD = language_model.model.norm(x_TD)
        head = language_model.lm_head
        assert isinstance(head, VocabParallelHead)
        return head.cross_entropy(
            hidden_TD, batch.targets_T[at_C], batch.loss_mask_T[at_C], normalizer=batch.normalizer
        )
