"""A small model, micro-batches of real variety, and what one process computes from them in plain autograd."""

from dataclasses import dataclass

import torch
from torch import Tensor

from k25sys import ops
from k25sys.models import KimiK25, KimiK25Config
from k25sys.models.config import TextConfig, TokenIds, VisionConfig, YarnConfig
from k25sys.parallel import GridSizes
from k25sys.training.initialize import initialize
from k25sys.training.microbatch import MicroBatch
from k25sys.training.sharding_plan import plan

VOCABULARY = 96
MEDIA_PAD = 90
INITIALIZER_RANGE = 0.1  # large enough for every gradient to matter


def small_config(*, layers: int = 4, q_lora_rank: int | None = 24) -> KimiK25Config:
    """Every kind of layer, sizes that eight ranks can split in any way."""
    text = TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.409,
        rope_theta=50000.0,
        yarn=YarnConfig(
            factor=8.0,
            original_max_position_embeddings=64,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
        max_position_embeddings=512,
        initializer_range=INITIALIZER_RANGE,
    )
    vision = VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, position_height=8,
        position_width=8,
    )  # fmt: skip
    return KimiK25Config(text=text, vision=vision, tokens=TokenIds.only((1,), media_pad=MEDIA_PAD))


def make_microbatches(
    *, data_ranks: int, per_rank: int, dtype: torch.dtype, seed: int = 0, images: bool = True
) -> list[list[MicroBatch]]:
    """`per_rank` micro-batches for each data rank, of 48, 64 or 32 packed tokens; every third is text alone.

    The loss is the mean over the loss tokens of all of them.
    """
    generator = torch.Generator().manual_seed(seed)
    drafts = []
    for number in range(data_ranks * per_rank):
        length = (48, 64, 32)[number % 3]
        clips = [] if not images or number % 3 == 1 else [(1, 4, 6), (2, 2, 4)][: 1 + number % 2]
        drafts.append(draft(length, clips, dtype, generator))
    num_loss_tokens = float(sum(int(draft["loss_mask_T"].sum()) for draft in drafts))
    made = [MicroBatch(**draft, normalizer=num_loss_tokens) for draft in drafts]
    return [made[rank * per_rank : (rank + 1) * per_rank] for rank in range(data_ranks)]


def draft(length: int, clips: list[tuple[int, int, int]], dtype: torch.dtype, generator: torch.Generator) -> dict:
    """The fields of a MicroBatch, but for the normaliser: clips one after the other, with text between them."""
    ids_T = torch.randint(2, MEDIA_PAD, (length,), generator=generator)
    place = 3
    for _, h, w in clips:
        ids_T[place : place + h * w // 4] = MEDIA_PAD
        place += h * w // 4 + 5
    patches = sum(t * h * w for t, h, w in clips)
    return {
        "input_ids_T": ids_T,
        "targets_T": torch.randint(2, MEDIA_PAD, (length,), generator=generator),
        "loss_mask_T": (torch.rand(length, generator=generator) < 0.8) & (ids_T != MEDIA_PAD),
        "cu_seqlens": (0, 13, 14, length - 7, length),
        "pixel_values": torch.randn(patches, 3, 14, 14, generator=generator, dtype=dtype) if clips else None,
        "grid_thw": torch.tensor(clips) if clips else None,
    }


@dataclass(frozen=True)
class Reference:
    """What one process computes: the loss of each micro-batch, all gradients, and each layer's largest logits."""

    losses: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    max_logits_LH: Tensor


def build_model(config: KimiK25Config, *, dtype: torch.dtype, seed: int = 1) -> KimiK25:
    """The plain model with the weights that every grid starts from."""
    with torch.device("meta"):
        model = KimiK25(config)
    model = model.to_empty(device="cpu").to(dtype)
    sizes = GridSizes()
    parameters = dict(model.named_parameters())
    initialize(
        parameters, plan(config, sizes), sizes=sizes, rank=0, seed=seed, std=config.text.initializer_range
    )  # fmt: skip
    for buffer in model.buffers():
        buffer.zero_()
    return model


def reference(config: KimiK25Config, microbatches: list[MicroBatch], *, dtype: torch.dtype) -> Reference:
    """One pass over all micro-batches, in order."""
    model = build_model(config, dtype=dtype)
    losses: list[float] = []
    max_logits_LH = run_plain(model, microbatches, losses)
    return Reference(
        losses,
        {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None},
        {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        max_logits_LH,
    )


def run_plain(model: KimiK25, microbatches: list[MicroBatch], losses: list[float]) -> Tensor:
    """Forward and backward of each micro-batch; the losses are appended, the largest logits returned."""
    text = model.config.text
    max_logits_LH = torch.full((text.num_hidden_layers, text.num_attention_heads), float("-inf"))
    for batch in microbatches:
        hidden_1TD = model.hidden_states(
            batch.input_ids_T[None],
            batch.pixel_values,
            batch.grid_thw,
            cu_seqlens=batch.cu_seqlens,
            max_logits_LH=max_logits_LH,
        )
        loss = ops.linear_cross_entropy(
            hidden_1TD[0], model.language_model.lm_head.weight, batch.targets_T, batch.loss_mask_T,
            normalizer=batch.normalizer,
        )  # fmt: skip
        loss.backward()
        losses.append(float(loss.detach()))
    return max_logits_LH
